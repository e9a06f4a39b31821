//! Penalties that concern the few tokens of a window: applied to these, not by a scan of the vocabulary.

use std::collections::{HashMap, VecDeque};

use super::spec::{Dry, RepeatPenalty, Vocabulary, check_token};
use crate::error::{Error, Result};
use crate::llama::{DryPenalty, Token};

/// The last tokens and how often each occurs among them.
pub(super) struct Window {
    pub(super) capacity: usize,
    pub(super) tokens: VecDeque<Token>,
    counts: HashMap<Token, u32>,
}

impl Window {
    pub(super) fn new(capacity: usize) -> Self {
        Self { capacity, tokens: VecDeque::new(), counts: HashMap::new() }
    }

    pub(super) fn push(&mut self, token: Token) {
        self.tokens.push_back(token);
        *self.counts.entry(token).or_default() += 1;
        if self.tokens.len() > self.capacity
            && let Some(oldest) = self.tokens.pop_front()
        {
            self.forget(oldest);
        }
    }

    fn forget(&mut self, token: Token) {
        if let Some(count) = self.counts.get_mut(&token) {
            *count -= 1;
            if *count == 0 {
                self.counts.remove(&token);
            }
        }
    }
}

/// Repeat, frequency and presence penalties with llama.cpp's formula and node-llama-cpp's window: the last generated
/// tokens, of which the user's filter takes some, less the newline.
pub(super) struct Penalties {
    pub(super) options: RepeatPenalty,
    newline: Option<Token>,
    window: Window,
    /// What is penalised at this step.
    pub(super) counts: HashMap<Token, u32>,
}

impl Penalties {
    pub(super) fn new(options: RepeatPenalty, newline: Option<Token>) -> Self {
        let window = Window::new(options.last_tokens);
        let newline = newline.filter(|_| !options.penalize_newline);
        Self { options, newline, window, counts: HashMap::new() }
    }

    pub(super) fn accept(&mut self, token: Token) {
        self.window.push(token);
    }

    pub(super) fn refresh(&mut self, n_vocab: usize) -> Result<()> {
        match &mut self.options.filter {
            None => self.counts.clone_from(&self.window.counts),
            Some(filter) => {
                let kept = filter.filter(self.window.tokens.make_contiguous()).map_err(Error::Foreign)?;
                self.counts.clear();
                for token in kept {
                    check_token("token returned by punish_tokens_filter", token, n_vocab)?;
                    *self.counts.entry(token).or_default() += 1;
                }
            }
        }
        if let Some(newline) = self.newline {
            self.counts.remove(&newline);
        }
        Ok(())
    }

    /// The arithmetic of `llama_sampler_penalties_apply`.
    pub(super) fn penalised(&self, logit: f32, count: u32) -> f32 {
        let scaled = if logit <= 0.0 { logit * self.options.penalty } else { logit / self.options.penalty };
        scaled - (count as f32 * self.options.frequency + self.options.presence)
    }
}

/// DRY with the tokens it looks at, which are the only ones it can penalise.
pub(super) struct DryWindow {
    native: DryPenalty,
    pub(super) window: Window,
}

impl DryWindow {
    pub(super) fn new(dry: &Dry, vocabulary: Vocabulary<'_>) -> Result<Self> {
        let model = vocabulary.model.ok_or_else(|| Error::Value("dry needs a model with a vocabulary".into()))?;
        // A window longer than the context sees no more than the context does.
        let capacity = dry.last_tokens.unwrap_or(usize::MAX).min(vocabulary.context_size.max(1));
        let last_tokens = i32::try_from(capacity).unwrap_or(i32::MAX);
        let native = DryPenalty::new(model, dry.multiplier, dry.base, dry.allowed_length, last_tokens, &dry.breakers)?;
        Ok(Self { native, window: Window::new(capacity) })
    }

    pub(super) fn accept(&mut self, token: Token) -> Result<()> {
        self.window.push(token);
        self.native.accept(token)
    }

    pub(super) fn penalties(&mut self) -> Result<impl Iterator<Item = (Token, f32)> + '_> {
        self.native.penalties(self.window.counts.keys().copied())
    }
}

//! From a row of logits to a token: what the user asked for, made into a chain.
//!
//! Order: the user's processor, biases and forbidden tokens; then the samplers as `order` says; then the draw.
//! Whatever concerns a few tokens only (biases, penalties, DRY) is applied to these tokens, not by a scan of all
//! candidates, and a chain that starts with top-k never builds an array of the whole vocabulary.
//!
//! Temperature 0 is greedy: penalties, DRY and biases count, all truncation (XTC and Mirostat too) is left out.
//! Mirostat takes the place of the truncation samplers, as in llama.cpp's `common`, but penalties and DRY stay.
mod chain;
mod penalties;
mod spec;

use std::collections::HashMap;
use std::mem;

use self::chain::{Edit, Link, Scan};
use self::penalties::{DryWindow, Penalties};
use super::grammar::{Constraint, Verdict};
use super::logits;
use crate::error::{Error, Result};
use crate::llama::{Candidates, Token};

pub use self::spec::{
    Dry, DynamicTemperature, LogitsProcessor, Mirostat, PunishFilter, RepeatPenalty, SamplerKind, SamplerSpec,
    Vocabulary, Xtc,
};

/// Log-probability of a drawn token and of the best ones, as the model gave them, before any sampler.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    /// Of the drawn token.
    pub logprob: f32,
    /// The n best, best first.
    pub top: Vec<(Token, f32)>,
}

/// A drawn token.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// The token.
    pub token: Token,
    /// If asked for.
    pub logprob: Option<TokenLogprob>,
}

/// What was drawn under a constraint.
#[derive(Clone, Debug, PartialEq)]
pub enum Within {
    /// A token that it allows.
    Drawn(Sampled),
    /// Nothing can follow, and the text may end.
    Nothing,
    /// A token after which the text could not come to its end within the limit: it is to be closed now.
    TooLong,
}

/// Draws the tokens of one prediction.
pub struct Sampler {
    n_vocab: usize,
    processor: Option<Box<dyn LogitsProcessor>>,
    /// Forbidden tokens are among them with -inf.
    bias: Vec<(Token, f32)>,
    penalties: Option<Penalties>,
    dry: Option<DryWindow>,
    /// Edits of single logits that come before any scan.
    edits: Vec<Edit>,
    scan: Scan,
    chain: Vec<Link>,
    logprobs: Option<usize>,
    /// Tokens generated so far; kept only for the processor.
    generated: Vec<Token>,
    row: Vec<f32>,
    ranked: Vec<(Token, f32)>,
    candidates: Candidates,
}

impl Sampler {
    /// Checks every value of `spec` and builds the chain.
    pub fn new(mut spec: SamplerSpec, vocabulary: Vocabulary<'_>) -> Result<Self> {
        spec::check(&spec, vocabulary)?;
        let links = chain::links(&spec, vocabulary)?;
        let (edits, scan, chain) = chain::split(links, &spec, vocabulary.size);
        let placed = |kind| spec.order.contains(&kind);
        let bias = chain::bias(&spec, vocabulary);
        let repeat = spec.repeat_penalty.take().filter(|_| placed(SamplerKind::Penalties));
        let dry = spec.dry.take().filter(|dry| placed(SamplerKind::Dry) && dry.multiplier > 0.0);
        Ok(Self {
            n_vocab: vocabulary.size,
            processor: spec.processor.take(),
            bias,
            penalties: repeat
                .filter(RepeatPenalty::is_active)
                .map(|options| Penalties::new(options, vocabulary.newline)),
            dry: dry.map(|dry| DryWindow::new(&dry, vocabulary)).transpose()?,
            edits,
            scan,
            chain,
            logprobs: spec.logprobs,
            generated: Vec::new(),
            row: Vec::new(),
            ranked: Vec::new(),
            candidates: Candidates::default(),
        })
    }

    /// Whether a draw is nothing but a search for the largest logit.
    #[must_use]
    pub fn is_greedy_argmax(&self) -> bool {
        self.scan == Scan::Best && !self.edits_row() && self.logprobs.is_none()
    }

    /// Whether user code runs in a draw; then it must not run on the decoder's thread.
    #[must_use]
    pub fn has_callbacks(&self) -> bool {
        self.processor.is_some() || self.penalties.as_ref().is_some_and(|penalties| penalties.options.filter.is_some())
    }

    /// About how long a draw takes, in nanoseconds, callbacks aside. The factors are measured with AVX2
    /// on a busy machine and good to a factor of two.
    #[must_use]
    pub fn cost_hint(&self) -> u64 {
        let logits = self.n_vocab as u64;
        let scan = match self.scan {
            Scan::Best => logits / 12,
            Scan::TopK(k) => logits / 8 + 80 * k as u64,
            // The array, its softmax, perhaps a sort.
            Scan::All => logits * 20,
        };
        let copy = if self.edits_row() { logits / 10 } else { 0 };
        let logprobs = self.logprobs.map_or(0, |n| logits + 80 * n as u64);
        let window = self.dry.as_ref().map_or(0, |dry| 20 * dry.window.tokens.len() as u64);
        scan + copy + logprobs + window
    }

    /// Whether drawing on the decoder's thread costs less than handing the row to another (a wake-up is 15 µs).
    #[must_use]
    pub fn is_cheap(&self) -> bool {
        const WAKE_UP: u64 = 15_000;
        !self.has_callbacks() && self.cost_hint() < WAKE_UP
    }

    /// Shows the prompt's tokens, or their tail. Of the samplers only DRY looks at it; penalties are for the reply.
    pub fn prime(&mut self, prompt: &[Token]) -> Result<()> {
        let Some(dry) = &mut self.dry else {
            return Ok(());
        };
        let skipped = prompt.len().saturating_sub(dry.window.capacity);
        prompt[skipped..].iter().try_for_each(|&token| dry.accept(token))
    }

    /// Draws a token from a row and counts it as generated.
    pub fn sample(&mut self, logits: &[f32]) -> Result<Sampled> {
        let token = self.pick(logits)?;
        self.force(logits, token)
    }

    /// Draws a token that the constraint allows, and counts it as generated.
    ///
    /// The plain draw comes first: most often it is allowed, and a look at one token is all that it takes.
    pub fn sample_within(&mut self, logits: &[f32], constraint: &mut Constraint) -> Result<Within> {
        let token = self.pick(logits)?;
        let decided = match constraint.judge(token)? {
            Verdict::Refused => self.draw_again(logits, constraint)?,
            verdict => Some((token, verdict)),
        };
        match decided {
            Some((token, Verdict::Allowed)) => self.force(logits, token).map(Within::Drawn),
            Some(_) => Ok(Within::TooLong),
            None if constraint.may_end()? => Ok(Within::Nothing),
            None => Err(nothing_allowed()),
        }
    }

    /// Draws from the same row, edits included, without what the constraint refuses.
    fn draw_again(&mut self, logits: &[f32], constraint: &mut Constraint) -> Result<Option<(Token, Verdict)>> {
        let mut row = mem::take(&mut self.row);
        if !self.edits_row() {
            row.clear();
            row.extend_from_slice(logits);
        }
        let drawn = self.draw_masked(&mut row, constraint);
        self.row = row;
        drawn
    }

    fn draw_masked(&mut self, row: &mut [f32], constraint: &mut Constraint) -> Result<Option<(Token, Verdict)>> {
        let allowed = constraint.mask()?;
        for (token, logit) in row.iter_mut().enumerate() {
            if !allowed.get(token) {
                *logit = f32::NEG_INFINITY;
            }
        }
        // A draw looks at the whole row. So that few are needed, each that is refused has twice as many tokens judged.
        let mut n_judged = 1;
        while logits::max(row) > f32::NEG_INFINITY {
            let token = self.draw(row)?;
            match constraint.judge(token)? {
                Verdict::Refused => change(row, token, |_| f32::NEG_INFINITY),
                verdict => return Ok(Some((token, verdict))),
            }
            self.strike_out(row, n_judged, constraint)?;
            n_judged = (2 * n_judged).min(row.len());
        }
        Ok(None)
    }

    /// Takes out what the constraint refuses of the `n` best.
    fn strike_out(&mut self, row: &mut [f32], n: usize, constraint: &mut Constraint) -> Result<()> {
        logits::top_n(row, n, &mut self.ranked);
        for &(token, _) in &self.ranked {
            if constraint.judge(token)? == Verdict::Refused {
                change(row, token, |_| f32::NEG_INFINITY);
            }
        }
        Ok(())
    }

    fn pick(&mut self, logits: &[f32]) -> Result<Token> {
        if logits.len() != self.n_vocab {
            let message = format!("a row of {} logits for a vocabulary of {}", logits.len(), self.n_vocab);
            return Err(Error::Decode(message));
        }
        if self.edits_row() { self.draw_edited(logits) } else { self.draw(logits) }
    }

    /// Takes this token as if it had been drawn from the row.
    pub fn force(&mut self, logits: &[f32], token: Token) -> Result<Sampled> {
        self.accept(token)?;
        let logprob = self.logprobs.map(|n| self.logprob(logits, token, n));
        Ok(Sampled { token, logprob })
    }

    /// Counts a token as generated that was not drawn here.
    pub fn accept(&mut self, token: Token) -> Result<()> {
        if self.processor.is_some() {
            self.generated.push(token);
        }
        if let Some(penalties) = &mut self.penalties {
            penalties.accept(token);
        }
        self.dry.as_mut().map_or(Ok(()), |dry| dry.accept(token))
    }

    fn edits_row(&self) -> bool {
        self.processor.is_some() || !self.bias.is_empty() || !self.edits.is_empty()
    }

    fn draw_edited(&mut self, logits: &[f32]) -> Result<Token> {
        let mut row = mem::take(&mut self.row);
        row.clear();
        row.extend_from_slice(logits);
        let drawn = self.edit(&mut row).and_then(|()| self.draw(&row));
        self.row = row;
        drawn
    }

    fn edit(&mut self, row: &mut [f32]) -> Result<()> {
        if let Some(processor) = &mut self.processor {
            processor.process(&self.generated, row).map_err(Error::Foreign)?;
        }
        for &(token, bias) in &self.bias {
            change(row, token, |logit| logit + bias);
        }
        for index in 0..self.edits.len() {
            self.edit_row(self.edits[index], row)?;
        }
        Ok(())
    }

    fn edit_row(&mut self, edit: Edit, row: &mut [f32]) -> Result<()> {
        match (edit, &mut self.penalties, &mut self.dry) {
            (Edit::Penalties, Some(penalties), _) => {
                penalties.refresh(self.n_vocab)?;
                for (&token, &count) in &penalties.counts {
                    change(row, token, |logit| penalties.penalised(logit, count));
                }
            }
            (Edit::Dry, _, Some(dry)) => {
                for (token, penalty) in dry.penalties()? {
                    change(row, token, |logit| logit + penalty);
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn draw(&mut self, row: &[f32]) -> Result<Token> {
        match self.scan {
            Scan::Best => return logits::argmax(row).ok_or_else(nothing_possible),
            Scan::TopK(k) => {
                logits::top_n(row, k, &mut self.ranked);
                self.candidates.fill_ranked(&self.ranked);
            }
            Scan::All => self.candidates.fill(row, logits::max(row)),
        }
        for index in 0..self.chain.len() {
            // Nothing is left to choose; several samplers cannot work on one candidate.
            if self.candidates.len() > 1 {
                self.apply(index)?;
            }
        }
        self.candidates.selected().ok_or_else(nothing_possible)
    }

    fn apply(&mut self, index: usize) -> Result<()> {
        match &mut self.chain[index] {
            Link::Native(sampler) => sampler.apply(&mut self.candidates),
            &mut Link::Edit(edit) => self.edit_candidates(edit),
        }
    }

    /// The same edits where the user ordered them after a sampler that looks at all candidates.
    fn edit_candidates(&mut self, edit: Edit) -> Result<()> {
        let possible = match (edit, &mut self.penalties, &mut self.dry) {
            (Edit::Penalties, Some(penalties), _) => {
                penalties.refresh(self.n_vocab)?;
                self.candidates.rewrite(|token, logit| {
                    penalties.counts.get(&token).map_or(logit, |&count| penalties.penalised(logit, count))
                })
            }
            (Edit::Dry, _, Some(dry)) => {
                let penalties: HashMap<Token, f32> = dry.penalties()?.collect();
                self.candidates.rewrite(|token, logit| logit + penalties.get(&token).unwrap_or(&0.0))
            }
            _ => true,
        };
        if possible { Ok(()) } else { Err(nothing_possible()) }
    }

    fn logprob(&mut self, logits: &[f32], token: Token, n: usize) -> TokenLogprob {
        let total = logits::log_sum_exp(logits, logits::max(logits));
        // A row with +inf: those tokens share all the probability.
        let of = |logit: f32| if logit == total { 0.0 } else { logit - total };
        logits::top_n(logits, n, &mut self.ranked);
        let drawn = usize::try_from(token).ok().and_then(|index| logits.get(index));
        TokenLogprob {
            logprob: drawn.map_or(f32::NEG_INFINITY, |&logit| of(logit)),
            top: self.ranked.iter().map(|&(token, logit)| (token, of(logit))).collect(),
        }
    }
}

fn change(row: &mut [f32], token: Token, new: impl FnOnce(f32) -> f32) {
    if let Some(logit) = usize::try_from(token).ok().and_then(|index| row.get_mut(index)) {
        *logit = new(*logit);
    }
}

fn nothing_possible() -> Error {
    Error::Decode("no token can be drawn: every logit is NaN or -inf, from the model or from the options".into())
}

fn nothing_allowed() -> Error {
    Error::Grammar(
        "no token of the model's vocabulary can follow in the grammar, or the options forbid all that could".into(),
    )
}

#[cfg(test)]
mod tests;

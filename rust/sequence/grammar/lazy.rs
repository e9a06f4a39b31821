//! A grammar that waits for a trigger: free text until a word, a token or a pattern comes, then the grammar, which
//! begins with what triggered it. As `llama_sampler_init_grammar_lazy_patterns` has it, but for `std::regex`, which
//! recurses for every character, and for a text that only looks like a trigger, which is no error: a token that
//! would trigger the grammar without fitting it is not allowed.

use std::sync::Arc;

use regex::bytes::{Regex, RegexBuilder};

use super::State;
use super::words::Words;
use crate::error::{Error, Result};
use crate::llama::Token;

/// What triggers a grammar.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Trigger {
    /// This text anywhere.
    Word(String),
    /// This token.
    Token(String),
    /// A regular expression that is found anywhere: the grammar begins with its first group that has a text.
    Pattern(String),
    /// One that the whole text matches.
    PatternFull(String),
}

/// Triggers, ready to be looked for.
#[derive(Debug)]
pub struct Triggers {
    /// With their lengths: nothing before the last so many bytes can be the beginning of a new one.
    words: Vec<(Regex, usize)>,
    tokens: Vec<Token>,
    patterns: Vec<Regex>,
}

/// Bytes that a compiled pattern may take.
const MAX_PATTERN_BYTES: usize = 4 * 1024 * 1024;

impl Triggers {
    /// # Errors
    /// `Grammar` for a pattern that is none, and for a token that the vocabulary does not have.
    pub fn new(triggers: &[Trigger], token: impl Fn(&str) -> Option<Token>) -> Result<Self> {
        let mut known = Self { words: Vec::new(), tokens: Vec::new(), patterns: Vec::new() };
        for trigger in triggers {
            match trigger {
                Trigger::Word(word) => known.words.push((compile(&regex::escape(word))?, word.len())),
                Trigger::Token(name) => {
                    known.tokens.push(token(name).ok_or_else(|| {
                        Error::Grammar(format!("the trigger {name:?} is not one token of this model"))
                    })?)
                }
                Trigger::Pattern(pattern) => known.patterns.push(compile(pattern)?),
                Trigger::PatternFull(pattern) => known.patterns.push(compile(&format!("^(?:{pattern})$"))?),
            }
        }
        Ok(known)
    }

    /// Where in the text, of which `seen` bytes were looked at before, the grammar begins.
    fn find(&self, text: &[u8], seen: usize) -> Option<usize> {
        let words = self
            .words
            .iter()
            .filter_map(|(word, length)| word.find_at(text, seen.saturating_sub(*length)).map(|found| found.start()));
        words.chain(self.patterns.iter().filter_map(|pattern| start(pattern, text))).min()
    }
}

fn compile(pattern: &str) -> Result<Regex> {
    RegexBuilder::new(pattern)
        .size_limit(MAX_PATTERN_BYTES)
        .build()
        .map_err(|error| Error::Grammar(format!("the trigger pattern {pattern:?} is malformed: {error}")))
}

/// Where the first group with a text begins, or the match.
fn start(pattern: &Regex, text: &[u8]) -> Option<usize> {
    let groups = pattern.captures(text)?;
    let group = groups.iter().skip(1).flatten().find(|group| !group.is_empty());
    group.or_else(|| groups.get(0)).map(|group| group.start())
}

/// A text that waits for a trigger.
#[derive(Clone)]
pub struct Waiting {
    triggers: Arc<Triggers>,
    /// What follows the trigger, at its beginning.
    inner: Box<State>,
    text: Vec<u8>,
    /// Each token, and where its text ends; `None` for text that no token brought.
    tokens: Vec<(Option<Token>, usize)>,
}

impl Waiting {
    pub fn new(triggers: Arc<Triggers>, inner: State) -> Self {
        Self { triggers, inner: Box::new(inner), text: Vec::new(), tokens: Vec::new() }
    }

    /// Whether the token may come next.
    pub fn allows(&mut self, token: Token, words: &Words) -> Result<bool> {
        let piece = self.inner.text(token, words).to_vec();
        Ok(match self.triggered(token, &piece) {
            None => true,
            Some(start) => self.begin(start, token, &piece, words)?.is_some(),
        })
    }

    /// Takes a token. The grammar's state, if it has begun.
    pub fn accept(&mut self, token: Token, words: &Words) -> Result<Option<State>> {
        let piece = self.inner.text(token, words).to_vec();
        if let Some(start) = self.triggered(token, &piece) {
            let state = self.begin(start, token, &piece, words)?;
            return state.map(Some).ok_or_else(super::not_allowed);
        }
        self.text.extend_from_slice(&piece);
        self.tokens.push((Some(token), self.text.len()));
        Ok(None)
    }

    /// Takes text that no token stands for. The grammar's state, if it has begun; `Err` inside if it does not fit.
    pub fn accept_bytes(&mut self, bytes: &[u8], words: &Words) -> Result<(bool, Option<State>)> {
        let seen = self.text.len();
        self.text.extend_from_slice(bytes);
        self.tokens.push((None, self.text.len()));
        let Some(start) = self.triggers.find(&self.text, seen) else { return Ok((true, None)) };
        let mut state = (*self.inner).clone();
        let fits = state.accept_bytes(&self.text[start..], words)?;
        Ok((fits, Some(state)))
    }

    /// Where the grammar begins if this token comes: in the text, or with the token itself (its end).
    fn triggered(&mut self, token: Token, piece: &[u8]) -> Option<usize> {
        let seen = self.text.len();
        if self.triggers.tokens.contains(&token) {
            return Some(seen);
        }
        self.text.extend_from_slice(piece);
        let found = self.triggers.find(&self.text, seen);
        self.text.truncate(seen);
        found
    }

    /// The grammar's state after everything from `start` on and the token; `None` if that does not fit.
    fn begin(&self, start: usize, token: Token, piece: &[u8], words: &Words) -> Result<Option<State>> {
        let mut state = (*self.inner).clone();
        let mut begun = 0;
        for &(earlier, end) in &self.tokens {
            let from = begun.max(start);
            let fits = match earlier {
                _ if end <= start => true,
                Some(token) if begun >= start => state.take(token, words)?,
                _ => state.accept_bytes(&self.text[from..end], words)?,
            };
            if !fits {
                return Ok(None);
            }
            begun = end;
        }
        let fits = match start <= self.text.len() {
            true => state.take(token, words)?,
            false => state.accept_bytes(&piece[start - self.text.len()..], words)?,
        };
        Ok(fits.then_some(state))
    }
}

//! How much room an answer has, and how it is brought to its end.
//!
//! Before a token is taken it is known that what completes the answer after it fits into the tokens that are left. So
//! it always fits; the first token after which it would not is not taken, and the end is written instead.

use super::State;
use super::words::Words;
use crate::error::Result;
use crate::llama::Token;
use crate::sequence::text::segments::SegmentOptions;

/// Blanks that may come before a start tag, in tokens.
const BLANKS: usize = 16;

/// What an answer may still take.
pub struct Budget {
    /// Tokens that may still come.
    pub left: usize,
    /// Tokens that close a stretch of reasoning.
    pub to_leave: usize,
    /// Tokens that close it and write the shortest answer.
    pub to_answer: usize,
    /// Tokens with which it can be opened, closed, and the shortest answer written.
    pub to_reason: usize,
    /// What brings the answer to its end, once that has begun.
    closing: Option<Vec<Token>>,
    n_forced: usize,
}

impl Budget {
    /// # Errors
    /// `Grammar` if the vocabulary cannot spell the shortest answer.
    pub fn new(fresh: &State, reasoning: Option<&SegmentOptions>, words: &Words) -> Result<Self> {
        let answer = fresh.closing_tokens(words)?.map(|tokens| tokens.len());
        let to_leave = reasoning.map_or(0, |reasoning| reasoning.closing.len());
        // Without a known end a limit just cuts: there is nothing to keep room for.
        let to_answer = answer.map_or(0, |answer| answer + to_leave);
        let to_open = reasoning.map_or(0, |reasoning| BLANKS + reasoning.start.text.len());
        let to_reason = answer.map_or(0, |_| to_answer + to_open);
        Ok(Self { left: usize::MAX, to_leave, to_answer, to_reason, closing: None, n_forced: 0 })
    }

    /// From here on these tokens come.
    pub fn close(&mut self, tokens: Vec<Token>) {
        self.closing = Some(tokens);
    }

    /// The token that comes next whatever is drawn.
    pub fn forced(&self) -> Option<Token> {
        self.closing.as_ref()?.get(self.n_forced).copied()
    }

    /// A token has come.
    pub fn accept(&mut self) {
        self.n_forced += usize::from(self.closing.is_some());
    }

    /// Whether all that was to be forced has come.
    pub fn is_closed(&self) -> bool {
        self.closing.as_ref().is_some_and(|tokens| self.n_forced >= tokens.len())
    }
}

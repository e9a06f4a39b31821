//! What a request says of reasoning, in terms of a vocabulary.

use super::text::segments::{SegmentOptions, Tag};
use crate::error::{Error, Result};
use crate::model::Model;

/// How the model's template marks reasoning.
#[derive(Clone, Debug)]
pub struct Reasoning {
    /// What opens it; empty if only the prompt does. Whitespace around tags does not matter.
    pub start: String,
    /// What closes it.
    pub end: String,
    /// Whether the prompt ends inside reasoning.
    pub opened: bool,
    /// What is written in the model's place once the budget is used up: an end tag with what surrounds it.
    pub closing: String,
    /// Tokens at most; `None` has no limit.
    pub budget: Option<usize>,
}

impl Reasoning {
    /// The same for the tokens of a model.
    ///
    /// # Errors
    /// `Value` without an end tag, or where the closing text has none; what the tokeniser fails with.
    pub fn resolve(&self, model: &Model) -> Result<SegmentOptions> {
        let (start, end) = (tag(&self.start, model)?, tag(&self.end, model)?);
        if end.text.is_empty() || !self.closing.contains(&end.text) {
            let message = format!("reasoning ends with {:?}, which must be part of {:?}", end.text, self.closing);
            return Err(Error::Value(message));
        }
        let closing = model.tokenize_continuation(&self.closing, true)?;
        Ok(SegmentOptions { start, end, opened: self.opened, budget: self.budget, closing })
    }
}

/// A tag is known by its tokens if one of them always stands for a text as a whole; of others a model may make the
/// same text in many ways.
fn tag(text: &str, model: &Model) -> Result<Tag> {
    let text = text.trim().to_owned();
    let tokens = model.tokenize_continuation(&text, true)?;
    let is_whole = tokens.iter().any(|&token| model.llama().is_whole(token));
    Ok(Tag { text, tokens: if is_whole { tokens } else { Vec::new() } })
}

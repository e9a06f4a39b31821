//! Grammars of which it is known how what was begun ends soonest: schemas and regular expressions.

use std::sync::{Arc, Mutex, PoisonError};

use llguidance::toktrie::SimpleVob;

use super::guided::Guided;
use super::schema::{Limits, Schema, Tracker};
use super::words::Words;
use crate::error::{Error, Result};
use crate::llama::Token;

/// A text on its way through a schema. The tracker decides; the matcher, which knows the masks, follows when one is
/// needed.
#[derive(Clone)]
pub struct Tracked {
    tracker: Tracker,
    /// Whether the text is empty and may stay so: the tracker begins with the first byte.
    may_be_empty: bool,
    /// The matcher at the beginning of a text, for all generations.
    pristine: Arc<Mutex<Guided>>,
    /// Our own, once a mask was needed.
    guided: Option<Guided>,
    /// Tokens that the matcher has not seen.
    behind: Vec<Token>,
    /// The token that was looked at last, and what it leads to.
    tried: Option<(Token, Option<Tracker>)>,
}

impl Tracked {
    /// Compiles a JSON Schema.
    ///
    /// # Errors
    /// `Grammar` naming the keyword that cannot be kept to.
    pub fn schema(words: &Words, text: &str) -> Result<Self> {
        let schema = serde_json::from_str(text)
            .map_err(|error| Error::Grammar(format!("the JSON Schema is not JSON: {error}")))?;
        Self::new(words, &Schema::compile(&schema, &Limits::default())?)
    }

    /// Compiles a regular expression that the whole text matches.
    ///
    /// # Errors
    /// `Grammar` if it is malformed or too big.
    pub fn regex(words: &Words, pattern: &str) -> Result<Self> {
        Self::new(words, &Schema::regex(pattern, &Limits::default())?)
    }

    fn new(words: &Words, schema: &Schema) -> Result<Self> {
        let pristine = Arc::new(Mutex::new(Guided::from_grammar(words, schema.grammar())?));
        let may_be_empty = schema.shortest().is_empty();
        Ok(Self { tracker: schema.tracker(), may_be_empty, pristine, guided: None, behind: Vec::new(), tried: None })
    }

    /// What comes of a text, if it is allowed.
    fn after(&self, text: &[u8]) -> Option<Tracker> {
        let mut tracker = self.tracker.clone();
        (!text.is_empty() && tracker.push(text)).then_some(tracker)
    }

    fn try_token(&mut self, token: Token, words: &Words) -> Option<&Tracker> {
        if self.tried.as_ref().is_none_or(|tried| tried.0 != token) {
            self.tried = Some((token, self.after(words.text(token))));
        }
        self.tried.as_ref()?.1.as_ref()
    }

    /// Whether the token may come next.
    pub fn allows(&mut self, token: Token, words: &Words) -> bool {
        self.try_token(token, words).is_some()
    }

    /// Goes on with a token if it is allowed.
    pub fn take(&mut self, token: Token, words: &Words) -> bool {
        let Some(tracker) = self.try_token(token, words).cloned() else { return false };
        self.tracker = tracker;
        self.may_be_empty = false;
        self.tried = None;
        self.behind.push(token);
        true
    }

    /// Goes on with a text if it is allowed.
    ///
    /// # Errors
    /// `Grammar` if the vocabulary cannot spell it.
    pub fn accept_bytes(&mut self, bytes: &[u8], words: &Words) -> Result<bool> {
        let Some(tracker) = self.after(bytes) else { return Ok(false) };
        self.tracker = tracker;
        self.may_be_empty = false;
        self.tried = None;
        self.behind.extend(words.spell(bytes)?);
        Ok(true)
    }

    /// The tokens that may come next, and perhaps some more.
    ///
    /// # Errors
    /// `Grammar` where the matcher fails.
    pub fn mask(&mut self, words: &Words) -> Result<SimpleVob> {
        let guided =
            self.guided.get_or_insert_with(|| self.pristine.lock().unwrap_or_else(PoisonError::into_inner).fork());
        for token in self.behind.drain(..) {
            guided.accept(token)?;
        }
        guided.mask(words)
    }

    /// Whether the text may end here.
    pub fn may_end(&self) -> bool {
        self.may_be_empty || self.tracker.is_complete()
    }

    /// Whether it must.
    pub fn is_over(&self) -> bool {
        self.tracker.is_complete() && !self.tracker.goes_on()
    }

    /// Bytes of the shortest end after a token, if it is allowed.
    pub fn closing_cost_after(&mut self, token: Token, words: &Words) -> Option<usize> {
        self.try_token(token, words).map(Tracker::closing_cost)
    }

    /// The shortest end after a token, if it is allowed.
    pub fn closing_after(&mut self, token: Token, words: &Words) -> Option<Vec<u8>> {
        self.try_token(token, words).map(Tracker::closing)
    }

    /// The shortest end.
    pub fn closing(&self) -> Vec<u8> {
        self.tracker.closing()
    }
}

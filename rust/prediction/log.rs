//! Everything a prediction has produced, and how far each reader has come. Pure: `mod.rs` locks and wakes.

use std::sync::Arc;
use std::time::Instant;

use super::Finished;
use super::stats::{Clock, Counts, Stats};
use crate::llama::Token;
use crate::sequence::{Drawn, Logprob, Outcome};

/// Names a reader of one prediction.
pub type ReaderId = usize;

/// What an event reader gets.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// So many prompt tokens are in the cache.
    Prompt {
        /// Tokens in the cache now.
        processed: usize,
        /// Of those, found there at the start.
        cached: usize,
        /// Tokens of the prompt.
        total: usize,
    },
    /// Text and the tokens that came with it.
    Text(String, Vec<Token>),
    /// Tokens were dropped because the context was full.
    Shift(usize),
}

/// An event that is no text, and where in the text it stands.
struct Note {
    at: usize,
    event: Event,
}

struct Reader {
    events: bool,
    /// Bytes of text delivered.
    text: usize,
    /// Tokens delivered.
    tokens: usize,
    /// Notes delivered.
    notes: usize,
    waiting: bool,
}

pub struct Log {
    pub text: String,
    tokens: Vec<Token>,
    logprobs: Vec<Logprob>,
    notes: Vec<Note>,
    readers: Vec<Option<Reader>>,
    n_readers: usize,
    n_waiters: usize,
    n_blocks: usize,
    max_pending: usize,
    pub touched: bool,
    pub clock: Clock,
    pub counts: Counts,
    shift: Option<(usize, usize)>,
    pub outcome: Option<Arc<Outcome>>,
}

impl Log {
    pub fn new(max_pending: Option<usize>) -> Self {
        Self {
            text: String::new(),
            tokens: Vec::new(),
            logprobs: Vec::new(),
            notes: Vec::new(),
            readers: Vec::new(),
            n_readers: 0,
            n_waiters: 0,
            n_blocks: 0,
            max_pending: max_pending.unwrap_or(usize::MAX),
            touched: false,
            clock: Clock::default(),
            counts: Counts::default(),
            shift: None,
            outcome: None,
        }
    }

    // ---- what comes in --------------------------------------------------------------------------------------------

    pub fn admitted(&mut self, cached: usize, total: usize) {
        if self.clock.admitted.is_none() {
            self.clock.admitted = Some(Instant::now());
            self.counts.prompt = total;
            self.counts.cached = cached;
        }
        self.progressed(cached, cached, total);
    }

    /// Progress before the first token only: a prompt that is evaluated again is no news.
    pub fn progressed(&mut self, processed: usize, cached: usize, total: usize) {
        if self.clock.first_token.is_some() {
            return;
        }
        let n_read = self.readers.iter().flatten().map(|reader| reader.notes).max().unwrap_or(0);
        // Where nobody has seen the last one, the newer one replaces it.
        let unseen = n_read < self.notes.len();
        if unseen && matches!(self.notes.last(), Some(Note { event: Event::Prompt { .. }, .. })) {
            self.notes.pop();
        }
        self.note(Event::Prompt { processed, cached, total });
    }

    pub fn shifted(&mut self, kept: usize, dropped: usize) {
        self.counts.shifted += dropped;
        self.shift = Some((kept, self.counts.shifted));
        self.note(Event::Shift(dropped));
    }

    fn note(&mut self, event: Event) {
        self.notes.push(Note { at: self.text.len(), event });
    }

    pub fn append(&mut self, drawn: Option<Drawn>, text: &str) {
        self.text.push_str(text);
        let Some(drawn) = drawn else { return };
        if self.clock.first_token.is_none() {
            self.clock.first_token = Some(Instant::now());
        }
        self.counts.predicted += 1;
        self.tokens.push(drawn.token);
        self.logprobs.extend(drawn.logprob);
    }

    pub fn finish(&mut self, outcome: Outcome) {
        self.clock.ended = Some(Instant::now());
        self.outcome = Some(Arc::new(outcome));
    }

    pub fn finished(&self) -> Finished {
        Finished {
            text: self.text.clone(),
            tokens: self.tokens.clone(),
            logprobs: self.logprobs.clone(),
            stats: Stats::at(Instant::now(), &self.clock, self.counts),
            shift: self.shift,
        }
    }

    // ---- who reads ------------------------------------------------------------------------------------------------

    pub fn open_reader(&mut self, events: bool) -> ReaderId {
        let reader = Reader { events, text: 0, tokens: 0, notes: 0, waiting: false };
        self.n_readers += 1;
        match self.readers.iter().position(Option::is_none) {
            Some(free) => {
                self.readers[free] = Some(reader);
                free
            }
            None => {
                self.readers.push(Some(reader));
                self.readers.len() - 1
            }
        }
    }

    pub fn close_reader(&mut self, reader: ReaderId) {
        if self.readers.get_mut(reader).and_then(Option::take).is_some() {
            self.n_readers -= 1;
        }
    }

    pub fn add_interest(&mut self, awaits_result: bool) {
        *self.interest(awaits_result) += 1;
    }

    pub fn drop_interest(&mut self, awaits_result: bool) {
        let count = self.interest(awaits_result);
        *count = count.saturating_sub(1);
    }

    fn interest(&mut self, awaits_result: bool) -> &mut usize {
        if awaits_result { &mut self.n_waiters } else { &mut self.n_blocks }
    }

    pub fn has_interest(&self) -> bool {
        self.n_readers + self.n_waiters + self.n_blocks > 0
    }

    /// Whether the generation should pause: nobody awaits the result and every reader has too much before it.
    pub fn lags(&self) -> bool {
        self.n_waiters == 0 && self.n_readers > 0 && self.readers.iter().flatten().all(|reader| self.is_behind(reader))
    }

    fn is_behind(&self, reader: &Reader) -> bool {
        !reader.waiting && self.tokens.len() - reader.tokens > self.max_pending
    }

    fn has_news(&self, reader: &Reader) -> bool {
        reader.text < self.text.len() || (reader.events && reader.notes < self.notes.len())
    }

    // ---- what goes out --------------------------------------------------------------------------------------------

    pub fn read(&mut self, reader: ReaderId) -> Option<String> {
        let (end, n_tokens) = (self.text.len(), self.tokens.len());
        let reader = self.readers.get_mut(reader)?.as_mut()?;
        let start = std::mem::replace(&mut reader.text, end);
        reader.tokens = n_tokens;
        if start == end {
            return None;
        }
        reader.waiting = false;
        Some(self.text[start..].to_owned())
    }

    pub fn read_event(&mut self, reader: ReaderId) -> Option<Event> {
        let note = self.readers.get(reader)?.as_ref().map(|reader| reader.notes)?;
        let next = self.notes.get(note);
        let end = next.map_or(self.text.len(), |note| note.at);
        let n_tokens = self.tokens.len();
        let reader = self.readers[reader].as_mut()?;
        if reader.text < end {
            let start = std::mem::replace(&mut reader.text, end);
            let first = std::mem::replace(&mut reader.tokens, n_tokens);
            reader.waiting = false;
            return Some(Event::Text(self.text[start..end].to_owned(), self.tokens[first..].to_vec()));
        }
        if let Some(note) = next {
            let event = note.event.clone();
            reader.notes += 1;
            reader.waiting = false;
            return Some(event);
        }
        // At the end, tokens that brought no text: a stop's, or control tokens.
        let silent = self.outcome.is_some() && reader.tokens < n_tokens;
        silent.then(|| {
            Event::Text(String::new(), self.tokens[std::mem::replace(&mut reader.tokens, n_tokens)..].to_vec())
        })
    }

    /// Whether there is something to read already.
    pub fn set_waiting(&mut self, reader: ReaderId, waiting: bool) -> bool {
        if let Some(Some(reader)) = self.readers.get_mut(reader) {
            reader.waiting = waiting;
        }
        let news = self.readers.get(reader).and_then(Option::as_ref).is_some_and(|reader| self.has_news(reader));
        waiting && (news || self.outcome.is_some())
    }

    /// Whether a suspended reader can go on.
    pub fn take_news(&mut self) -> bool {
        self.readers.iter().flatten().any(|reader| reader.waiting && self.has_news(reader))
    }
}

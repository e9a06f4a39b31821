//! What a generation may say: grammars, followed token by token.
//!
//! A [`Spec`] is what was asked for. [`Grammars`] compiles it for a model, on a thread with bounded time and memory,
//! and keeps what it has compiled. A [`Constraint`] belongs to one generation. The sampler draws first and asks it
//! about one token ([`Constraint::judge`]); only where that is refused the whole row is masked.

mod budget;
mod gate;
mod gbnf;
mod guided;
mod lazy;
pub mod schema;
mod tracked;
mod words;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use llguidance::toktrie::SimpleVob;

use self::budget::Budget;
use self::gate::{Gate, Phase};
use self::gbnf::{Matcher, Rules, Tokens};
use self::guided::{Guided, unanchored};
use self::lazy::{Triggers, Waiting};
use self::tracked::Tracked;
use self::words::Words;
use super::text::segments::SegmentOptions;
use crate::error::{Error, Result};
use crate::llama::{self, Bounds, Token, Unfinished, run_bounded, unstoppable};
use crate::model::Model;

pub use self::lazy::Trigger;

/// What compiling may take. The stack is virtual memory, of which a chain of rules uses as much as it is long.
const BOUNDS: Bounds = Bounds { memory: 512 * 1024 * 1024, time: Duration::from_secs(2), stack: 256 * 1024 * 1024 };

/// Bytes of a grammar, a regular expression or a schema.
const MAX_TEXT_BYTES: usize = 1024 * 1024;

/// Bytes of a text that GBNF follows like one token, whose work is bounded.
const MAX_TOKEN_BYTES: usize = 1024;

/// Compiled grammars that are kept for a model.
const MAX_KEPT: usize = 64;

/// Grammars that `Any` may have.
const MAX_CHOICES: usize = 64;

/// A grammar as it was given.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Spec {
    /// A JSON Schema, as JSON.
    JsonSchema(String),
    /// A regular expression that the whole text matches.
    Regex(String),
    /// A grammar in llguidance's dialect of Lark.
    Lark(String),
    /// A grammar in llama.cpp's notation.
    Gbnf {
        /// Its rules.
        text: String,
        /// The rule to begin with.
        root: String,
        /// Control tokens that the grammar may spell out, by their texts.
        preserved: Vec<String>,
        /// What of a text that fits has been said before the generation begins.
        prefix: String,
    },
    /// Whatever one of them allows.
    Any(Vec<Spec>),
    /// Free text until a trigger, then the grammar.
    Lazy {
        /// The grammar.
        of: Box<Spec>,
        /// What it waits for.
        triggers: Vec<Trigger>,
    },
}

impl Spec {
    fn check(&self) -> Result<()> {
        let length = match self {
            Self::JsonSchema(text) | Self::Regex(text) | Self::Lark(text) | Self::Gbnf { text, .. } => text.len(),
            Self::Lazy { of, .. } => return of.check(),
            Self::Any(choices) if choices.is_empty() || choices.len() > MAX_CHOICES => {
                return Err(Error::Grammar(format!("{} grammars to choose from; 1 to {MAX_CHOICES}", choices.len())));
            }
            Self::Any(choices) => return choices.iter().try_for_each(Self::check),
        };
        match length > MAX_TEXT_BYTES {
            true => Err(Error::Grammar(format!("the grammar has {length} bytes; at most {MAX_TEXT_BYTES}"))),
            false => Ok(()),
        }
    }

    /// The state at the beginning of a text.
    fn compile(&self, words: &Words, token: &dyn Fn(&str) -> Option<Token>) -> Result<State> {
        Ok(match self {
            Self::JsonSchema(text) => State::Tracked(Box::new(Tracked::schema(words, text)?)),
            Self::Regex(text) => regex(words, unanchored(text))?,
            Self::Lark(text) => State::Guided(named("Lark grammar", Guided::lark(words, text))?),
            Self::Gbnf { text, root, preserved, prefix } => {
                let tokens = Tokens { by_name: token, is_end: &|token| words.is_eog(token) };
                let matcher = Matcher::new(Arc::new(Rules::parse(text, root, tokens)?))?;
                let texts = preserved.iter().filter_map(|name| Some((token(name)?, name.clone().into_bytes())));
                let mut state = State::Gbnf(Box::new(matcher), Arc::new(texts.collect()));
                match state.accept_bytes(prefix.as_bytes(), words)? {
                    true => state,
                    false => return Err(not_begun(prefix)),
                }
            }
            Self::Any(choices) => {
                State::Any(choices.iter().map(|choice| choice.compile(words, token)).collect::<Result<_>>()?)
            }
            Self::Lazy { of, triggers } => {
                let triggers = Triggers::new(triggers, token)?;
                State::Waiting(Waiting::new(Arc::new(triggers), of.compile(words, token)?))
            }
        })
    }
}

/// One whose end is known if its states can be counted, else one that a limit just cuts.
fn regex(words: &Words, pattern: &str) -> Result<State> {
    Tracked::regex(words, pattern).map(|tracked| State::Tracked(Box::new(tracked))).or_else(|refused| {
        let guided = Guided::regex(words, pattern);
        guided.map(State::Guided).map_err(|_| refused)
    })
}

/// Says what llguidance speaks of.
fn named<T>(what: &str, compiled: Result<T>) -> Result<T> {
    compiled.map_err(|error| Error::Grammar(format!("the {what} cannot be used: {error}")))
}

/// Why a grammar cannot name a token.
fn ends_a_generation(name: &str) -> String {
    format!("{name} ends a generation: such a token comes where the text may end, and cannot be named")
}

fn not_begun(prefix: &str) -> Error {
    Error::Grammar(format!("no text that the grammar allows begins with {prefix:?}"))
}

fn not_allowed() -> Error {
    Error::Grammar("a token was drawn that the grammar does not allow".into())
}

/// What has come of compiling a grammar: its beginning, or what is wrong. Whoever compiles it has the lock.
type Compiled = Arc<Mutex<Option<Result<State, String>>>>;

/// Grammars of one model, compiled.
pub struct Grammars {
    words: Arc<Words>,
    llama: Option<Arc<llama::Model>>,
    /// The most recently used last.
    kept: Mutex<Vec<(Spec, Compiled)>>,
}

impl Grammars {
    /// Those of a model.
    ///
    /// # Errors
    /// `Grammar` where its vocabulary cannot be used.
    pub fn of(model: &Model) -> Result<Arc<Self>> {
        model.keep(|| {
            let llama = Some(Arc::clone(model.llama()));
            Ok(Self { words: Arc::new(Words::of(model)?), llama, kept: Mutex::default() })
        })
    }

    /// Those for texts that no model has written.
    fn of_bytes() -> Result<&'static Self> {
        static DETACHED: OnceLock<Grammars> = OnceLock::new();
        if let Some(grammars) = DETACHED.get() {
            return Ok(grammars);
        }
        let made = Self { words: Arc::new(Words::bytes()?), llama: None, kept: Mutex::default() };
        Ok(DETACHED.get_or_init(|| made))
    }

    /// A state at the beginning of a text. Those who want it while it is compiled wait, and share what comes of it.
    fn state(&self, spec: &Spec) -> Result<State> {
        spec.check()?;
        let compiled = self.recall(spec);
        let mut outcome = lock(&compiled);
        match outcome.get_or_insert_with(|| self.compile(spec).map_err(|error| error.to_string())) {
            Ok(state) => {
                self.forget_oldest();
                Ok(state.fork())
            }
            Err(message) => {
                // A busy machine may be what is wrong: who asks later tries again.
                lock(&self.kept).retain(|(_, kept)| !Arc::ptr_eq(kept, &compiled));
                Err(Error::Grammar(message.clone()))
            }
        }
    }

    /// What is kept of a grammar, or is to be.
    fn recall(&self, spec: &Spec) -> Compiled {
        let mut kept = lock(&self.kept);
        let entry = match kept.iter().position(|(known, _)| known == spec) {
            Some(index) => kept.remove(index),
            None => (spec.clone(), Compiled::default()),
        };
        let compiled = Arc::clone(&entry.1);
        kept.push(entry);
        compiled
    }

    fn forget_oldest(&self) {
        let mut kept = lock(&self.kept);
        let surplus = kept.len().saturating_sub(MAX_KEPT);
        kept.drain(..surplus);
    }

    fn compile(&self, spec: &Spec) -> Result<State> {
        let (words, wanted) = (Arc::clone(&self.words), spec.clone());
        // What takes too much keeps what it holds for ever: that must not be the model.
        let llama = self.llama.as_ref().map(Arc::downgrade);
        let token = move |name: &str| unstoppable(|| token_of(&*llama.as_ref()?.upgrade()?, name));
        run_bounded("llamactor-grammar", BOUNDS, move || wanted.compile(&words, &token)).map_err(unfinished)?
    }
}

/// What a panic has left is what it was before.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn unfinished(unfinished: Unfinished) -> Error {
    Error::Grammar(match unfinished {
        Unfinished::Time => format!("the grammar takes more than {} s to compile", BOUNDS.time.as_secs()),
        Unfinished::Memory => format!("the grammar takes more than {} MiB to compile", BOUNDS.memory >> 20),
        Unfinished::Panic => "the grammar cannot be compiled: its compiler failed".into(),
        Unfinished::NoThread(error) => format!("there is no thread to compile the grammar on: {error}"),
    })
}

/// The token that a text stands for as a whole.
fn token_of(model: &llama::Model, text: &str) -> Option<Token> {
    match model.tokenize(text, false, true).ok()?.as_slice() {
        &[token] => Some(token),
        _ => None,
    }
}

/// Whether a grammar allows a text as a whole. Compiles it first.
///
/// # Errors
/// `Grammar` if it is malformed, too large, or names tokens of a model.
pub fn accepts(spec: &Spec, text: &str) -> Result<bool> {
    let grammars = Grammars::of_bytes()?;
    let mut state = grammars.state(spec)?;
    Ok(state.accept_bytes(text.as_bytes(), &grammars.words)? && state.may_end()?)
}

/// Texts of control tokens that a grammar may spell out.
type Preserved = HashMap<Token, Vec<u8>>;

/// How far a text has come in a grammar.
#[derive(Clone)]
enum State {
    Tracked(Box<Tracked>),
    Guided(Guided),
    Gbnf(Box<Matcher>, Arc<Preserved>),
    Any(Vec<State>),
    Waiting(Waiting),
}

impl State {
    /// The same for another generation: nothing is shared that grows.
    fn fork(&self) -> Self {
        match self {
            Self::Guided(guided) => Self::Guided(guided.fork()),
            Self::Any(states) => Self::Any(states.iter().map(Self::fork).collect()),
            Self::Tracked(_) | Self::Gbnf(..) | Self::Waiting(_) => self.clone(),
        }
    }

    /// The text by which the grammar knows a token.
    fn text<'a>(&'a self, token: Token, words: &'a Words) -> &'a [u8] {
        match self {
            Self::Gbnf(_, preserved) => preserved.get(&token).map_or_else(|| words.text(token), Vec::as_slice),
            _ => words.text(token),
        }
    }

    fn allows(&mut self, token: Token, words: &Words) -> Result<bool> {
        match self {
            Self::Tracked(tracked) => Ok(tracked.allows(token, words)),
            Self::Guided(guided) => guided.allows(token),
            Self::Gbnf(matcher, preserved) => {
                let text = preserved.get(&token).map_or_else(|| words.text(token), Vec::as_slice);
                let allowed = matcher.allows_token(token) || (!text.is_empty() && matcher.allows(text));
                matcher.check().map(|()| allowed)
            }
            Self::Any(states) => any(states, |state| state.allows(token, words)),
            Self::Waiting(waiting) => waiting.allows(token, words),
        }
    }

    /// Goes on with a token if it is allowed. Where it is not, the state is undefined.
    fn take(&mut self, token: Token, words: &Words) -> Result<bool> {
        match self {
            Self::Tracked(tracked) => Ok(tracked.take(token, words)),
            Self::Guided(guided) => {
                let allowed = guided.allows(token)?;
                if allowed {
                    guided.accept(token)?;
                }
                Ok(allowed)
            }
            Self::Gbnf(matcher, preserved) => {
                let text = preserved.get(&token).map_or_else(|| words.text(token), Vec::as_slice);
                let taken = matcher.accept_token(token, text);
                matcher.check().map(|()| taken)
            }
            Self::Any(states) => keep_those(states, |state| state.take(token, words)),
            Self::Waiting(waiting) => {
                if !waiting.allows(token, words)? {
                    return Ok(false);
                }
                if let Some(begun) = waiting.accept(token, words)? {
                    *self = begun;
                }
                Ok(true)
            }
        }
    }

    /// Goes on with a text if it is allowed. Where it is not, the state is undefined.
    fn accept_bytes(&mut self, bytes: &[u8], words: &Words) -> Result<bool> {
        if bytes.is_empty() {
            return Ok(true);
        }
        match self {
            Self::Tracked(tracked) => tracked.accept_bytes(bytes, words),
            Self::Guided(guided) => guided.accept_bytes(bytes, words),
            Self::Gbnf(matcher, _) => {
                let taken = bytes.chunks(MAX_TOKEN_BYTES).all(|part| matcher.accept(part));
                matcher.check().map(|()| taken)
            }
            Self::Any(states) => keep_those(states, |state| state.accept_bytes(bytes, words)),
            Self::Waiting(waiting) => {
                let (fits, begun) = waiting.accept_bytes(bytes, words)?;
                if let Some(begun) = begun {
                    *self = begun;
                }
                Ok(fits)
            }
        }
    }

    /// The tokens that may come, and perhaps some more that `allows` refuses. Not those that end the generation.
    fn mask(&mut self, words: &Words) -> Result<SimpleVob> {
        match self {
            Self::Tracked(tracked) => tracked.mask(words),
            Self::Guided(guided) => guided.mask(words),
            Self::Gbnf(matcher, preserved) => {
                let mut mask = if matcher.speaks_of_tokens() { words.all() } else { words.none() };
                matcher.add_texts(words.trie(), &mut mask);
                preserved.keys().for_each(|&token| mask.allow_token(token as u32));
                matcher.check().map(|()| mask)
            }
            Self::Any(states) => {
                let mut mask = words.none();
                for state in states {
                    mask.or(&state.mask(words)?);
                }
                Ok(mask)
            }
            Self::Waiting(_) => Ok(words.all()),
        }
    }

    fn may_end(&mut self) -> Result<bool> {
        match self {
            Self::Tracked(tracked) => Ok(tracked.may_end()),
            Self::Guided(guided) => guided.may_end(),
            Self::Gbnf(matcher, _) => Ok(matcher.may_end()),
            Self::Any(states) => any(states, Self::may_end),
            Self::Waiting(_) => Ok(true),
        }
    }

    /// Bytes of the shortest end after a token that is allowed; `None` where that is not known.
    fn closing_cost_after(&mut self, token: Token, words: &Words) -> Option<usize> {
        match self {
            Self::Tracked(tracked) => tracked.closing_cost_after(token, words),
            Self::Any(states) => states.iter_mut().filter_map(|state| state.closing_cost_after(token, words)).min(),
            Self::Guided(_) | Self::Gbnf(..) | Self::Waiting(_) => None,
        }
    }

    /// The shortest end after a token that is allowed; `None` where that is not known.
    fn closing_after(&mut self, token: Token, words: &Words) -> Option<Vec<u8>> {
        match self {
            Self::Tracked(tracked) => tracked.closing_after(token, words),
            Self::Any(states) => {
                states.iter_mut().filter_map(|state| state.closing_after(token, words)).min_by_key(Vec::len)
            }
            Self::Guided(_) | Self::Gbnf(..) | Self::Waiting(_) => None,
        }
    }

    /// The shortest end; `None` where that is not known.
    fn closing(&self) -> Option<Vec<u8>> {
        match self {
            Self::Tracked(tracked) => Some(tracked.closing()),
            Self::Any(states) => states.iter().filter_map(Self::closing).min_by_key(Vec::len),
            Self::Guided(_) | Self::Gbnf(..) | Self::Waiting(_) => None,
        }
    }

    /// The tokens that bring the text to its end; `None` where that is not known.
    fn closing_tokens(&self, words: &Words) -> Result<Option<Vec<Token>>> {
        self.closing().map(|closing| words.spell(&closing)).transpose()
    }

    /// Whether nothing may follow.
    fn is_over(&self) -> bool {
        match self {
            Self::Tracked(tracked) => tracked.is_over(),
            Self::Guided(guided) => guided.is_over(),
            Self::Gbnf(matcher, _) => matcher.is_over(),
            Self::Any(states) => states.iter().all(Self::is_over),
            Self::Waiting(_) => false,
        }
    }
}

fn any(states: &mut [State], mut test: impl FnMut(&mut State) -> Result<bool>) -> Result<bool> {
    for state in states {
        if test(state)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Drops the states that cannot go on; false if none is left.
fn keep_those(states: &mut Vec<State>, mut step: impl FnMut(&mut State) -> Result<bool>) -> Result<bool> {
    let mut outcome = Ok(());
    states.retain_mut(|state| {
        step(state).unwrap_or_else(|error| {
            outcome = Err(error);
            false
        })
    });
    outcome.map(|()| !states.is_empty())
}

/// What becomes of a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It may come next.
    Allowed,
    /// It may not.
    Refused,
    /// The grammar allows it, but then the answer could not be brought to an end within the limit.
    TooLong,
}

/// The grammar of one generation.
pub struct Constraint {
    words: Arc<Words>,
    /// At the beginning of the content.
    fresh: State,
    state: State,
    gate: Gate,
    budget: Budget,
}

impl Constraint {
    /// Compiles what was asked for, or takes it from what is kept. With reasoning the grammar begins with the content.
    ///
    /// # Errors
    /// `Grammar` if it is malformed or too large.
    pub fn new(spec: &Spec, model: &Model, reasoning: Option<&SegmentOptions>) -> Result<Self> {
        let grammars = Grammars::of(model)?;
        let state = grammars.state(spec)?;
        let words = Arc::clone(&grammars.words);
        let budget = Budget::new(&state, reasoning, &words)?;
        let gate = reasoning.map_or_else(Gate::open, Gate::new);
        Ok(Self { words, fresh: state.clone(), state, gate, budget })
    }

    /// Begins with a text that the prompt holds already.
    ///
    /// # Errors
    /// `Grammar` if nothing that is allowed begins like this.
    pub fn begin_with(&mut self, prefix: &str) -> Result<()> {
        let content = self.gate.begin_with(prefix);
        if self.state.accept_bytes(content.as_bytes(), &self.words)? {
            return Ok(());
        }
        if self.gate.phase() != Phase::Start {
            return Err(not_begun(content));
        }
        self.gate.rule_content_out();
        Ok(())
    }

    // ---- limits ---------------------------------------------------------------------------------------------------

    /// Says how many tokens may still come. Where the shortest answer needs more, an error with both numbers; `limit`
    /// names what sets them.
    ///
    /// # Errors
    /// `Grammar`.
    pub fn begin_within(&mut self, left: usize, limit: &str) -> Result<()> {
        self.budget.left = left;
        let inside = self.gate.phase() == Phase::Inside;
        let Some(tokens) = self.state.closing_tokens(&self.words)? else { return Ok(()) };
        let needed = tokens.len() + if inside { self.budget.to_leave } else { 0 };
        match needed > left {
            false => Ok(()),
            true => Err(Error::Grammar(format!(
                "the shortest answer that the grammar allows needs {needed} tokens, but {limit} leaves {left}: raise it \
                 or allow less"
            ))),
        }
    }

    /// Says how many tokens may still come, the next one included.
    pub fn set_left(&mut self, left: usize) {
        self.budget.left = left;
    }

    /// Whether reasoning must be closed now, so that an answer still fits.
    #[must_use]
    pub fn must_leave_reasoning(&self) -> bool {
        self.gate.phase() == Phase::Inside && self.budget.left <= self.budget.to_answer
    }

    /// The token that comes next because the answer is being brought to its end.
    #[must_use]
    pub fn forced(&self) -> Option<Token> {
        self.budget.forced()
    }

    /// Whether the answer was brought to its end because of a limit.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.budget.is_closed()
    }

    /// Brings the answer to its end: from here on tokens are forced.
    ///
    /// # Errors
    /// `Grammar` if the vocabulary cannot spell the end.
    pub fn close(&mut self) -> Result<()> {
        let tokens = self.state.closing_tokens(&self.words)?.unwrap_or_default();
        self.budget.close(tokens);
        Ok(())
    }

    /// Whether the answer can still be brought to its end after a token.
    fn fits(&mut self, token: Token) -> Result<bool> {
        match self.state.closing_cost_after(token, &self.words) {
            None => Ok(true),
            // A token has a byte at least.
            Some(bytes) if bytes < self.budget.left => Ok(true),
            Some(_) => {
                let closing = self.state.closing_after(token, &self.words).unwrap_or_default();
                Ok(self.words.spell(&closing)?.len() < self.budget.left)
            }
        }
    }

    // ---- tokens ---------------------------------------------------------------------------------------------------

    /// Whether the token may come next.
    ///
    /// # Errors
    /// `Grammar` where the matcher fails.
    pub fn judge(&mut self, token: Token) -> Result<Verdict> {
        if self.words.is_eog(token) {
            return self.may_end().map(Verdict::of);
        }
        match self.gate.phase() {
            Phase::Inside => self.leaves_well(token).map(Verdict::of),
            Phase::Start if self.opens(token) => Ok(Verdict::Allowed),
            Phase::Start if !self.gate.may_be_content() => Ok(Verdict::Refused),
            Phase::Start | Phase::Content => match self.state.allows(token, &self.words)? {
                false => Ok(Verdict::Refused),
                true if self.fits(token)? => Ok(Verdict::Allowed),
                true => Ok(Verdict::TooLong),
            },
        }
    }

    /// Whether the token may be a part of the start tag, and there is room for reasoning and an answer.
    fn opens(&self, token: Token) -> bool {
        self.gate.opens(token, self.words.text(token))
            && (self.gate.is_opening() || self.budget.left > self.budget.to_reason)
    }

    /// Whether what a token brings of the content, if it ends the reasoning, may be its beginning.
    fn leaves_well(&self, token: Token) -> Result<bool> {
        match self.gate.rest_of(token, self.words.text(token)) {
            Some(rest) => self.fresh.clone().accept_bytes(&rest, &self.words),
            None => Ok(true),
        }
    }

    /// The tokens that may come next, and perhaps some more that [`Constraint::judge`] refuses.
    ///
    /// # Errors
    /// `Grammar` where the matcher fails.
    pub fn mask(&mut self) -> Result<SimpleVob> {
        let mut mask = match self.gate.phase() {
            Phase::Inside => self.words.all(),
            Phase::Start if !self.gate.may_be_content() => self.words.none(),
            Phase::Start | Phase::Content => self.state.mask(&self.words)?,
        };
        // A model that did not draw the start tag by itself is not led to it: its thoughts need have no end.
        if self.gate.phase() == Phase::Start && (self.gate.is_opening() || !self.gate.may_be_content()) {
            let opening = (0..self.words.trie().vocab_size() as Token).filter(|&token| self.opens(token));
            opening.for_each(|token| mask.allow_token(token as u32));
        }
        match self.may_end()? {
            true => mask.or(self.words.eog()),
            false => mask.sub(self.words.eog()),
        }
        Ok(mask)
    }

    /// Whether all that comes from this token on is content, so that no tag is to be looked for.
    #[must_use]
    pub fn settles(&self, token: Token) -> bool {
        match self.gate.phase() {
            Phase::Start => !self.gate.opens(token, self.words.text(token)),
            Phase::Inside => false,
            Phase::Content => true,
        }
    }

    /// Takes a token that has come; `inside` says whether it left the text inside reasoning.
    ///
    /// # Errors
    /// `Grammar` if it was not allowed.
    pub fn accept(&mut self, token: Token, inside: bool) -> Result<()> {
        self.budget.accept();
        let words = Arc::clone(&self.words);
        let text = words.text(token);
        let taken = match self.gate.phase() {
            Phase::Content => self.state.take(token, &words)?,
            Phase::Start if inside => {
                self.gate.enter();
                self.state = self.fresh.clone();
                true
            }
            Phase::Start => {
                let opens = self.gate.open_with(token, text);
                // Content that could not be ended is none: what may be the start tag is it.
                let fits = self.gate.may_be_content() && self.fits(token)? && self.state.take(token, &words)?;
                self.gate.decide(opens, fits)
            }
            Phase::Inside if inside => {
                self.gate.read(text);
                true
            }
            Phase::Inside => {
                let rest = self.gate.rest_of(token, text).unwrap_or_default();
                self.gate.leave();
                self.state.accept_bytes(&rest, &words)?
            }
        };
        if taken { Ok(()) } else { Err(not_allowed()) }
    }

    /// The reasoning was closed by a text that nobody drew.
    pub fn leave_reasoning(&mut self) {
        self.gate.leave();
    }

    /// Whether the text may end here.
    ///
    /// # Errors
    /// `Grammar` where the matcher fails.
    pub fn may_end(&mut self) -> Result<bool> {
        match self.gate.phase() {
            Phase::Inside => self.fresh.may_end(),
            Phase::Start if !self.gate.may_be_content() => Ok(false),
            _ => self.state.may_end(),
        }
    }

    /// Whether nothing may follow.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.gate.phase() == Phase::Content && self.state.is_over()
    }
}

impl Verdict {
    fn of(allowed: bool) -> Self {
        if allowed { Self::Allowed } else { Self::Refused }
    }
}

#[cfg(test)]
mod tests;

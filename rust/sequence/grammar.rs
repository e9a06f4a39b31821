//! What a generation may say: grammars, followed token by token.
//!
//! A [`Spec`] is what was asked for. [`Grammars`] compiles it for a model, on a thread with bounded time and memory,
//! and keeps what it has compiled. A [`Constraint`] belongs to one generation. The sampler draws first and asks it
//! about one token ([`Constraint::allows`]); only where that is refused the whole row is masked.

mod gate;
mod gbnf;
mod guided;
mod lazy;
mod words;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use llguidance::toktrie::SimpleVob;

use self::gate::{Gate, Phase};
use self::gbnf::{Matcher, Rules};
use self::guided::Guided;
use self::lazy::{Triggers, Waiting};
use self::words::Words;
use super::text::segments::SegmentOptions;
use crate::error::{Error, Result};
use crate::llama::{self, Bounds, Token, Unfinished, run_bounded};
use crate::model::Model;

pub use self::lazy::Trigger;

/// What compiling may take. The stack is virtual memory, of which a chain of rules uses as much as it is long.
const BOUNDS: Bounds = Bounds { memory: 512 * 1024 * 1024, time: Duration::from_secs(2), stack: 256 * 1024 * 1024 };

/// Bytes of a grammar, a regular expression or a schema.
const MAX_TEXT_BYTES: usize = 1024 * 1024;

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
            Self::JsonSchema(text) => State::Guided(named("JSON Schema", Guided::json(words, text))?),
            Self::Regex(text) => State::Guided(named("regular expression", Guided::regex(words, text))?),
            Self::Lark(text) => State::Guided(named("Lark grammar", Guided::lark(words, text))?),
            Self::Gbnf { text, root, preserved, prefix } => {
                let matcher = Matcher::new(Arc::new(Rules::parse(text, root, token)?))?;
                let texts = preserved.iter().filter_map(|name| Some((token(name)?, name.clone().into_bytes())));
                let mut state = State::Gbnf(matcher, Arc::new(texts.collect()));
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

/// Says what llguidance speaks of.
fn named<T>(what: &str, compiled: Result<T>) -> Result<T> {
    compiled.map_err(|error| Error::Grammar(format!("the {what} cannot be used: {error}")))
}

fn not_begun(prefix: &str) -> Error {
    Error::Grammar(format!("no text that the grammar allows begins with {prefix:?}"))
}

fn not_allowed() -> Error {
    Error::Grammar("a token was drawn that the grammar does not allow".into())
}

/// Grammars of one model, compiled.
pub struct Grammars {
    words: Arc<Words>,
    llama: Option<Arc<llama::Model>>,
    /// The most recently used last.
    kept: Mutex<Vec<(Spec, State)>>,
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

    /// A state at the beginning of a text.
    fn state(&self, spec: &Spec) -> Result<State> {
        if let Some(state) = self.recall(spec) {
            return Ok(state);
        }
        spec.check()?;
        let (words, llama, wanted) = (Arc::clone(&self.words), self.llama.clone(), spec.clone());
        let compiled = run_bounded("llamactor-grammar", BOUNDS, move || {
            wanted.compile(&words, &|name| token_of(llama.as_deref()?, name))
        });
        let state = compiled.map_err(unfinished)??;
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() >= MAX_KEPT {
            kept.remove(0);
        }
        kept.push((spec.clone(), state.fork()));
        Ok(state)
    }

    fn recall(&self, spec: &Spec) -> Option<State> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let index = kept.iter().position(|(known, _)| known == spec)?;
        let found = kept.remove(index);
        let state = found.1.fork();
        kept.push(found);
        Some(state)
    }
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
    Guided(Guided),
    Gbnf(Matcher, Arc<Preserved>),
    Any(Vec<State>),
    Waiting(Waiting),
}

impl State {
    /// The same for another generation: nothing is shared that grows.
    fn fork(&self) -> Self {
        match self {
            Self::Guided(guided) => Self::Guided(guided.fork()),
            Self::Any(states) => Self::Any(states.iter().map(Self::fork).collect()),
            Self::Gbnf(..) | Self::Waiting(_) => self.clone(),
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
            Self::Guided(guided) => guided.accept_bytes(bytes, words),
            Self::Gbnf(matcher, _) => {
                let taken = matcher.accept(bytes);
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
            Self::Guided(guided) => guided.may_end(),
            Self::Gbnf(matcher, _) => Ok(matcher.may_end()),
            Self::Any(states) => any(states, Self::may_end),
            Self::Waiting(_) => Ok(true),
        }
    }

    /// Whether nothing may follow.
    fn is_over(&self) -> bool {
        match self {
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

/// The grammar of one generation.
pub struct Constraint {
    words: Arc<Words>,
    /// At the beginning of the content.
    fresh: State,
    state: State,
    gate: Gate,
}

impl Constraint {
    /// Compiles what was asked for, or takes it from what is kept. With reasoning the grammar begins with the content.
    ///
    /// # Errors
    /// `Grammar` if it is malformed or too large.
    pub fn new(spec: &Spec, model: &Model, reasoning: Option<&SegmentOptions>) -> Result<Self> {
        let grammars = Grammars::of(model)?;
        let state = grammars.state(spec)?;
        let gate = reasoning.map_or_else(Gate::open, Gate::new);
        Ok(Self { words: Arc::clone(&grammars.words), fresh: state.clone(), state, gate })
    }

    /// Begins with a text that the prompt holds already.
    ///
    /// # Errors
    /// `Grammar` if nothing that is allowed begins like this.
    pub fn begin_with(&mut self, prefix: &str) -> Result<()> {
        let content = self.gate.begin_with(prefix);
        match self.state.accept_bytes(content.as_bytes(), &self.words)? {
            true => Ok(()),
            false if self.gate.phase() == Phase::Start && self.gate.may_open() => {
                self.gate.close_content();
                Ok(())
            }
            false => Err(not_begun(content)),
        }
    }

    /// Whether the token may come next.
    pub fn allows(&mut self, token: Token) -> Result<bool> {
        if self.words.is_eog(token) {
            return self.may_end();
        }
        match self.gate.phase() {
            Phase::Content => self.state.allows(token, &self.words),
            Phase::Inside => Ok(match self.gate.rest_of(token, self.words.text(token)) {
                None => true,
                Some(rest) => rest.is_empty() || self.fresh.clone().accept_bytes(&rest, &self.words)?,
            }),
            Phase::Start => Ok(self.gate.opens(token, self.words.text(token))
                || (self.gate.has_content() && self.state.allows(token, &self.words)?)),
        }
    }

    /// The tokens that may come next, and perhaps some more that [`Constraint::allows`] refuses.
    pub fn mask(&mut self) -> Result<SimpleVob> {
        let mut mask = match self.gate.phase() {
            Phase::Content => self.state.mask(&self.words)?,
            Phase::Inside => self.words.all(),
            Phase::Start => {
                let mut mask = if self.gate.has_content() { self.state.mask(&self.words)? } else { self.words.none() };
                for token in 0..self.words.trie().vocab_size() as Token {
                    if self.gate.opens(token, self.words.text(token)) {
                        mask.allow_token(token as u32);
                    }
                }
                mask
            }
        };
        match self.may_end()? {
            true => mask.or(self.words.eog()),
            false => mask.sub(self.words.eog()),
        }
        Ok(mask)
    }

    /// Whether the token that comes next can be no part of a tag, so that no more is looked for.
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
        let text = self.words.text(token);
        match self.gate.phase() {
            Phase::Content => self.take(token),
            Phase::Start if inside => {
                self.gate.enter();
                self.state = self.fresh.clone();
                Ok(())
            }
            Phase::Start => {
                let opens = self.gate.open_with(token, text);
                let fits = self.gate.has_content() && self.state.take(token, &self.words)?;
                self.gate.decide(opens, fits).then_some(()).ok_or_else(not_allowed)
            }
            Phase::Inside => {
                let rest = self.gate.rest_of(token, text);
                self.gate.read(text);
                if inside {
                    return Ok(());
                }
                self.gate.leave();
                match self.state.accept_bytes(&rest.unwrap_or_default(), &self.words)? {
                    true => Ok(()),
                    false => Err(not_allowed()),
                }
            }
        }
    }

    fn take(&mut self, token: Token) -> Result<()> {
        match self.state.take(token, &self.words)? {
            true => Ok(()),
            false => Err(not_allowed()),
        }
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
            Phase::Start if !self.gate.has_content() => Ok(false),
            _ => self.state.may_end(),
        }
    }

    /// Whether nothing may follow.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.gate.phase() == Phase::Content && self.state.is_over()
    }
}

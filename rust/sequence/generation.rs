//! One generation: a row of logits in, a token drawn, its text published, and how to go on.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

use super::grammar::Constraint;
use super::sampler::{Sampled, Sampler, TokenLogprob, Within};
use super::text::calls::Calls;
use super::text::segments::{Parts, Segments};
use super::text::{StopMatch, TextStream};
use super::{Outcome, Sink};
use crate::context::job::{End, Generator, Step};
use crate::error::{Error, Result};
use crate::llama::{Model, Token};

/// Why a generation ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StopReason {
    /// The model drew an end-of-generation token.
    #[default]
    Eos,
    /// A stop string or stop tokens matched.
    StopString,
    /// As many tokens as wanted.
    MaxTokens,
    /// The context is full.
    ContextFull,
    /// The model ended its turn and called tools in it.
    ToolCalls,
    /// Cancelled.
    Cancelled,
}

impl StopReason {
    const ALL: [Self; 6] =
        [Self::Eos, Self::StopString, Self::MaxTokens, Self::ContextFull, Self::ToolCalls, Self::Cancelled];

    /// The reason of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.name() == name)
    }

    /// The name users see.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Eos => "eos",
            Self::StopString => "stop_string",
            Self::MaxTokens => "max_tokens",
            Self::ContextFull => "context_full",
            Self::ToolCalls => "tool_calls",
            Self::Cancelled => "cancelled",
        }
    }
}

/// A token that was drawn.
pub struct Drawn {
    /// The token.
    pub token: Token,
    /// Its log-probability, if asked for.
    pub logprob: Option<Logprob>,
}

/// The log-probability of a drawn token, with texts: what is no whole character shows as U+FFFD.
#[derive(Clone, Debug)]
pub struct Logprob {
    /// The token's text.
    pub text: String,
    /// Its natural log-probability.
    pub logprob: f32,
    /// The best tokens at its place, with theirs.
    pub top: Vec<(Token, String, f32)>,
}

/// What becomes of the text.
pub enum Text {
    /// All of it is content.
    Plain(TextStream),
    /// Reasoning is told from content.
    Segmented(Box<Segments>),
    /// And both from calls of tools.
    Calling(Box<Calling>),
}

/// Text that may call tools.
pub struct Calling {
    /// Its stream.
    pub calls: Calls,
    /// Control tokens whose names tell calls from text.
    pub preserved: HashSet<Token>,
}

impl Text {
    fn begin(&mut self, prefix: &str, out: &mut Parts) {
        match self {
            Self::Plain(stream) => stream.prefix(prefix, &mut out.text),
            Self::Segmented(segments) => segments.begin(prefix, out),
            Self::Calling(calling) => calling.calls.begin(prefix, out),
        }
    }

    fn forced(&self) -> Option<Token> {
        match self {
            Self::Plain(_) => None,
            Self::Segmented(segments) => segments.forced(),
            Self::Calling(calling) => calling.calls.forced(),
        }
    }

    /// Whether the name of a token matters, if it has no other text.
    fn preserves(&self, token: Token) -> bool {
        matches!(self, Self::Calling(calling) if calling.preserved.contains(&token))
    }

    /// How many calls are whole.
    fn n_calls(&self) -> usize {
        match self {
            Self::Calling(calling) => calling.calls.n_whole(),
            _ => 0,
        }
    }

    fn push(&mut self, token: Token, piece: &[u8], hidden: bool, now: f64, out: &mut Parts) -> Option<StopMatch> {
        match self {
            Self::Plain(stream) => stream.push(token, piece, now, &mut out.text),
            Self::Segmented(segments) => segments.push(token, piece, now, out),
            Self::Calling(calling) => calling.calls.push(token, piece, hidden, now, out),
        }
    }

    /// Whether reasoning is going on.
    fn is_inside(&self) -> bool {
        match self {
            Self::Plain(_) => false,
            Self::Segmented(segments) => segments.is_inside(),
            Self::Calling(calling) => calling.calls.segments().is_inside(),
        }
    }

    /// Has the reasoning that is going on closed, whatever the model would draw.
    fn close_reasoning(&mut self, out: &mut Parts) {
        match self {
            Self::Plain(_) => {}
            Self::Segmented(segments) => segments.close_now(out),
            Self::Calling(calling) => calling.calls.segments_mut().close_now(out),
        }
    }

    /// From here on all is content.
    fn settle(&mut self) {
        match self {
            Self::Plain(_) => {}
            Self::Segmented(segments) => segments.settle(),
            Self::Calling(calling) => calling.calls.segments_mut().settle(),
        }
    }

    fn finish(&mut self, out: &mut Parts) -> Option<StopMatch> {
        match self {
            Self::Plain(stream) => stream.finish(&mut out.text),
            Self::Segmented(segments) => segments.finish(out),
            Self::Calling(calling) => calling.calls.finish(out),
        }
    }
}

/// The state of one generation between two rows.
pub struct Generation {
    pub sampler: Sampler,
    pub text: Text,
    pub constraint: Option<Box<Constraint>>,
    pub sink: Arc<dyn Sink>,
    pub model: Arc<Model>,
    pub ignore_eos: bool,
    pub max_tokens: Option<usize>,
    /// Tokens until the context is full, where that ends the generation.
    pub room: usize,
    pub started: Instant,
    pub n_drawn: usize,
    /// Whether the text needs the clock (token batching).
    pub needs_clock: bool,
    pub piece: Vec<u8>,
    pub shown: Parts,
    pub ended: Option<(StopReason, Option<String>)>,
    pub error: Option<Error>,
}

impl Generation {
    /// Whether drawing costs less than waking another thread.
    pub fn is_cheap(&self) -> bool {
        self.constraint.is_none() && self.sampler.is_cheap() && !matches!(self.text, Text::Calling(_))
    }

    /// Whether nothing is to be drawn at all.
    pub fn is_complete(&self) -> bool {
        self.ended.is_some() || self.is_used_up()
    }

    fn is_used_up(&self) -> bool {
        self.max_tokens.is_some_and(|limit| self.n_drawn >= limit)
    }

    /// Shows the response prefix, which is text like the rest; there may be none.
    ///
    /// # Errors
    /// `Grammar` if nothing that the constraint allows begins like this, or fits into the limits.
    pub fn begin_with(&mut self, prefix: &str) -> Result<()> {
        let left = self.left();
        let limit = match self.limit() {
            StopReason::MaxTokens => format!("max_tokens={left}"),
            _ => "the context".to_owned(),
        };
        if let Some(constraint) = &mut self.constraint {
            constraint.begin_with(prefix)?;
            constraint.begin_within(left, &limit)?;
            if constraint.is_over() {
                self.ended = Some((StopReason::Eos, None));
            }
        }
        self.text.begin(prefix, &mut self.shown);
        self.show(None);
        Ok(())
    }

    fn stop(&mut self, reason: StopReason, stop_string: Option<String>) -> Step {
        self.ended = Some((reason, stop_string));
        Step::Stop
    }

    /// Ends it with an error.
    pub fn fail(&mut self, error: Error) -> Step {
        self.error = Some(error);
        Step::Stop
    }

    fn now(&self) -> f64 {
        if self.needs_clock { self.started.elapsed().as_secs_f64() } else { 0.0 }
    }

    /// Publishes the text that the last token brought.
    fn show(&mut self, drawn: Option<Drawn>) -> bool {
        let paused = self.sink.publish(drawn, &self.shown.text, &self.shown.marks);
        self.shown.clear();
        paused
    }

    fn take_token(&mut self, drawn: Drawn) -> Step {
        let token = drawn.token;
        if !self.ignore_eos && self.model.is_eog(token) {
            return self.stop(StopReason::Eos, None);
        }
        let hidden = match self.read_piece(token) {
            Ok(hidden) => hidden,
            Err(error) => return self.fail(error),
        };
        self.n_drawn += 1;
        let stopped = match self.push(token, hidden) {
            Ok(stopped) => stopped,
            Err(error) => return self.fail(error),
        };
        let ended = self.constraint.as_ref().and_then(|constraint| self.end_of(constraint));
        let paused = self.show(Some(drawn));
        if let Some(stop) = stopped {
            let text = self.stop_text(stop);
            return self.stop(StopReason::StopString, Some(text));
        }
        if let Some(reason) = ended {
            return self.stop(reason, None);
        }
        match (self.is_used_up(), paused) {
            (true, _) => self.stop(StopReason::MaxTokens, None),
            (false, true) => Step::Pause(token),
            (false, false) => Step::Next(token),
        }
    }

    /// Takes the text of a token, or the name of one that has none where that matters: then it is hidden.
    fn read_piece(&mut self, token: Token) -> Result<bool> {
        self.piece.clear();
        self.model.token_to_piece(token, false, &mut self.piece)?;
        let hidden = self.piece.is_empty() && self.text.preserves(token);
        if hidden {
            self.model.token_to_piece(token, true, &mut self.piece)?;
        }
        Ok(hidden)
    }

    /// Has the token, whose text is in `piece`, go into the text, and followed by the constraint.
    fn push(&mut self, token: Token, hidden: bool) -> Result<Option<StopMatch>> {
        let now = self.now();
        let forced = self.text.forced().is_some();
        if let Some(constraint) = &self.constraint
            && !forced
            && constraint.settles(token)
        {
            self.text.settle();
        }
        let stopped = self.text.push(token, &self.piece, hidden, now, &mut self.shown);
        let inside = self.text.is_inside();
        match &mut self.constraint {
            Some(constraint) if !forced => constraint.accept(token, inside)?,
            Some(constraint) if !inside => constraint.leave_reasoning(),
            _ => {}
        }
        Ok(stopped)
    }

    /// Why nothing follows, where nothing may: the answer was whole, or had to be closed.
    fn end_of(&self, constraint: &Constraint) -> Option<StopReason> {
        match (constraint.is_closed(), constraint.is_over()) {
            (true, _) => Some(self.limit()),
            (false, true) => Some(StopReason::Eos),
            (false, false) => None,
        }
    }

    /// Tokens that may still be drawn.
    fn left(&self) -> usize {
        let limit = self.max_tokens.unwrap_or(usize::MAX).min(self.room);
        limit.saturating_sub(self.n_drawn)
    }

    /// Why it ends where the limits end it.
    fn limit(&self) -> StopReason {
        if self.max_tokens.is_some_and(|limit| limit <= self.room) {
            StopReason::MaxTokens
        } else {
            StopReason::ContextFull
        }
    }

    /// Draws a token; `None` where nothing may follow.
    fn draw(&mut self, logits: &[f32]) -> Result<Option<Sampled>> {
        let left = self.left();
        let Some(constraint) = &mut self.constraint else {
            return match self.text.forced() {
                Some(token) => self.sampler.force(logits, token).map(Some),
                None => self.sampler.sample(logits).map(Some),
            };
        };
        constraint.set_left(left);
        if constraint.must_leave_reasoning() {
            self.text.close_reasoning(&mut self.shown);
        }
        if let Some(token) = self.text.forced().or_else(|| constraint.forced()) {
            return self.sampler.force(logits, token).map(Some);
        }
        match self.sampler.sample_within(logits, constraint)? {
            Within::Drawn(sampled) => Ok(Some(sampled)),
            Within::Nothing => Ok(None),
            Within::TooLong => {
                constraint.close()?;
                constraint.forced().map(|token| self.sampler.force(logits, token)).transpose()
            }
        }
    }

    fn named(&self, token: Token, logprob: TokenLogprob) -> Logprob {
        let top = logprob.top.into_iter().map(|(token, logprob)| (token, self.token_text(token), logprob)).collect();
        Logprob { text: self.token_text(token), logprob: logprob.logprob, top }
    }

    fn token_text(&self, token: Token) -> String {
        let mut piece = Vec::new();
        // A drawn token is in the vocabulary.
        let _ = self.model.token_to_piece(token, true, &mut piece);
        String::from_utf8_lossy(&piece).into_owned()
    }

    /// The text of a stop; control tokens in a list have one only when special tokens are shown.
    fn stop_text(&self, stop: StopMatch) -> String {
        if stop.tokens.is_empty() {
            return stop.stop;
        }
        self.model.detokenize(&stop.tokens, true).unwrap_or(stop.stop)
    }

    /// Publishes what is left and how it ended.
    pub fn finish(mut self, end: End) {
        let (mut reason, mut stop_string) = self.ended.take().unwrap_or_default();
        let mut error = self.error.take();
        match end {
            End::Done | End::Parked => {}
            End::Cancelled => reason = StopReason::Cancelled,
            End::ContextFull => reason = StopReason::ContextFull,
            End::Failed(reason) => error = Some(reason),
        }
        if let Some(stop) = self.text.finish(&mut self.shown) {
            (reason, stop_string) = (StopReason::StopString, Some(self.stop_text(stop)));
        }
        if reason == StopReason::Eos && self.text.n_calls() > 0 {
            reason = StopReason::ToolCalls;
        }
        self.show(None);
        let completed =
            self.constraint.is_none() || (matches!(reason, StopReason::Eos | StopReason::ToolCalls) && error.is_none());
        self.sink.finish(Outcome { stop_reason: reason, stop_string, error, completed });
    }
}

impl Generator for Generation {
    fn advance(&mut self, logits: &[f32]) -> Step {
        match self.draw(logits) {
            Ok(Some(sampled)) => {
                let logprob = sampled.logprob.map(|logprob| self.named(sampled.token, logprob));
                self.take_token(Drawn { token: sampled.token, logprob })
            }
            Ok(None) => {
                let reason = self.constraint.as_ref().and_then(|constraint| self.end_of(constraint));
                self.stop(reason.unwrap_or_default(), None)
            }
            Err(error) => self.fail(error),
        }
    }
}

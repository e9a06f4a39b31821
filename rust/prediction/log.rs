//! Everything a prediction has produced, and how far each reader has come. Pure: `mod.rs` locks and wakes.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use super::Finished;
use super::stats::{Clock, Counts, Stats};
use crate::context::parking::Source;
use crate::llama::Token;
use crate::sequence::{CallEvent, Drawn, Logprob, Mark, Outcome, StopReason};

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
    /// Content and the tokens that came with it.
    Text(String, Vec<Token>),
    /// Reasoning and the tokens that came with it.
    Reasoning(String, Vec<Token>),
    /// Reasoning begins.
    SegmentStart,
    /// Reasoning has ended.
    SegmentEnd,
    /// Tokens were dropped because the context was full.
    Shift(usize),
    /// A tool is called; calls are counted in their round.
    Call(CallEvent),
    /// Whoever drives the rounds has put in an event of its own, this one in its list.
    Note(usize),
}

/// A stretch of reasoning.
#[derive(Clone, Debug, PartialEq)]
pub struct Segment {
    /// Its text.
    pub text: String,
    /// Its first token, which is its start tag's if that was drawn.
    pub first: usize,
    /// Its tokens, tags included.
    pub tokens: Vec<Token>,
    /// Seconds from its first token to its last.
    pub duration: f64,
    /// Whether its end tag has come.
    pub closed: bool,
    /// Whether that was because the budget was used up.
    pub forced: bool,
}

/// A call of a tool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToolCall {
    /// The model's id for it, or a drawn one.
    pub id: String,
    /// The tool.
    pub name: String,
    /// Its arguments, as JSON.
    pub arguments: String,
    /// Whether it has come to its end.
    whole: bool,
}

/// The same as it is kept.
struct Stretch {
    /// Bytes of reasoning.
    text: Range<usize>,
    tokens: Range<usize>,
    began: Instant,
    ended: Option<Instant>,
    closed: bool,
    forced: bool,
}

/// An event that is no text, and where it stands: in the reasoning inside a segment, else in the content.
struct Note {
    at: usize,
    /// Tokens that belong before it.
    n_tokens: usize,
    event: Event,
}

/// Whether something is being generated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Not begun, or between two rounds.
    Waiting,
    /// A round runs; with `more`, another may follow.
    Running { more: bool },
}

/// How much there was when a round began.
#[derive(Clone, Copy, Default)]
struct Start {
    text: usize,
    reasoning: usize,
    stretches: usize,
    calls: usize,
    tokens: usize,
    logprobs: usize,
}

/// The round that has ended last.
struct Round {
    start: Start,
    outcome: Arc<Outcome>,
    content_start: Option<usize>,
    stats: Stats,
    shift: Option<(usize, usize)>,
}

struct Reader {
    events: bool,
    /// Bytes of content delivered.
    text: usize,
    /// Bytes of reasoning delivered.
    reasoning: usize,
    /// Whether what comes next is reasoning.
    inside: bool,
    /// Tokens delivered.
    tokens: usize,
    /// Tokens of which everything else was delivered.
    seen: usize,
    /// Notes delivered.
    notes: usize,
    waiting: bool,
}

pub struct Log {
    /// Content.
    pub text: String,
    reasoning: String,
    stretches: Vec<Stretch>,
    /// Of all rounds.
    content_start: Option<usize>,
    calls: Vec<ToolCall>,
    tokens: Vec<Token>,
    logprobs: Vec<Logprob>,
    notes: Vec<Note>,
    readers: Vec<Option<Reader>>,
    n_readers: usize,
    n_waiters: usize,
    n_blocks: usize,
    max_pending: usize,
    pub touched: bool,
    phase: Phase,
    created: Instant,
    ended: Option<Instant>,
    /// Of the round that runs.
    start: Start,
    clock: Clock,
    counts: Counts,
    round_content_start: Option<usize>,
    /// Tokens kept by its last shift.
    kept: usize,
    /// Of all rounds: the last shift's kept tokens, and all that were dropped.
    shift: Option<(usize, usize)>,
    /// What the rounds took that have ended.
    past: Stats,
    n_rounds: usize,
    last: Option<Round>,
    /// Whether whoever drives the rounds does not know of all calls.
    driver_news: bool,
    pub outcome: Option<Arc<Outcome>>,
}

impl Log {
    pub fn new(max_pending: Option<usize>) -> Self {
        let clock = Clock::default();
        Self {
            text: String::new(),
            reasoning: String::new(),
            stretches: Vec::new(),
            content_start: None,
            calls: Vec::new(),
            tokens: Vec::new(),
            logprobs: Vec::new(),
            notes: Vec::new(),
            readers: Vec::new(),
            n_readers: 0,
            n_waiters: 0,
            n_blocks: 0,
            max_pending: max_pending.unwrap_or(usize::MAX),
            touched: false,
            phase: Phase::Running { more: false },
            created: clock.created,
            ended: None,
            start: Start::default(),
            clock,
            counts: Counts::default(),
            round_content_start: None,
            kept: 0,
            shift: None,
            past: Stats::default(),
            n_rounds: 0,
            last: None,
            driver_news: false,
            outcome: None,
        }
    }

    /// A log of what has not begun.
    pub fn deferred(max_pending: Option<usize>) -> Self {
        Self { phase: Phase::Waiting, ..Self::new(max_pending) }
    }

    // ---- rounds ---------------------------------------------------------------------------------------------------

    /// Whether it has not begun, or is between two rounds.
    pub fn is_waiting(&self) -> bool {
        self.phase == Phase::Waiting && self.outcome.is_none()
    }

    /// How many rounds have ended.
    pub fn n_rounds(&self) -> usize {
        self.n_rounds
    }

    /// Begins a round; false when one runs, or all is over.
    pub fn begin(&mut self, more: bool) -> bool {
        if !self.is_waiting() {
            return false;
        }
        self.phase = Phase::Running { more };
        if self.n_rounds > 0 {
            self.clock = Clock::default();
        }
        true
    }

    /// Ends a round, and everything if no other may follow or it failed or was cancelled.
    pub fn finish(&mut self, outcome: Outcome) {
        let goes_on = self.phase == Phase::Running { more: true }
            && outcome.error.is_none()
            && outcome.stop_reason != StopReason::Cancelled;
        let outcome = Arc::new(outcome);
        self.end_round(&outcome);
        if !goes_on {
            self.ended = self.clock.ended;
            self.outcome = Some(outcome);
        }
    }

    fn end_round(&mut self, outcome: &Arc<Outcome>) {
        if self.is_inside() {
            self.close(self.tokens.len() - self.start.tokens, false, false);
        }
        self.clock.ended = Some(Instant::now());
        let stats = Stats::at(Instant::now(), &self.clock, self.counts);
        self.past = self.past.plus(&stats);
        self.n_rounds += 1;
        self.phase = Phase::Waiting;
        let end = self.now();
        self.last = Some(Round {
            start: std::mem::replace(&mut self.start, end),
            outcome: Arc::clone(outcome),
            content_start: self.round_content_start.take(),
            stats,
            shift: (self.counts.shifted > 0).then_some((self.kept, self.counts.shifted)),
        });
        self.counts = Counts::default();
    }

    /// Ends what waits: nothing more will come.
    pub fn end_waiting(&mut self, outcome: Outcome) {
        self.ended = Some(Instant::now());
        if self.n_rounds == 0 {
            self.clock.ended = self.ended;
        }
        self.outcome = Some(Arc::new(outcome));
    }

    /// How the last round has ended; `None` before the first end.
    pub fn last_outcome(&self) -> Option<&Arc<Outcome>> {
        self.last.as_ref().map(|round| &round.outcome)
    }

    fn now(&self) -> Start {
        Start {
            text: self.text.len(),
            reasoning: self.reasoning.len(),
            stretches: self.stretches.len(),
            calls: self.calls.len(),
            tokens: self.tokens.len(),
            logprobs: self.logprobs.len(),
        }
    }

    /// The whole calls of all rounds, from the `start`-th on.
    pub fn whole_calls(&self, start: usize) -> impl Iterator<Item = &ToolCall> {
        self.calls.iter().filter(|call| call.whole).skip(start)
    }

    /// What all of it took so far.
    pub fn stats(&self) -> Stats {
        let now = Instant::now();
        if self.n_rounds == 0 {
            return Stats::at(now, &self.clock, self.counts);
        }
        let running = match self.phase {
            Phase::Running { .. } => Stats::at(now, &self.clock, self.counts),
            Phase::Waiting => Stats { shifted_tokens: self.counts.shifted, ..Stats::default() },
        };
        let total_time = self.ended.unwrap_or(now).saturating_duration_since(self.created).as_secs_f64();
        Stats { total_time, ..self.past.plus(&running) }
    }

    // ---- what comes in --------------------------------------------------------------------------------------------

    pub fn admitted(&mut self, cached: usize, total: usize, source: Source) {
        if self.clock.admitted.is_none() {
            self.clock.admitted = Some(Instant::now());
            self.counts.prompt = total;
            self.counts.cached = cached;
            self.counts.source = (cached > 0).then_some(source);
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
        self.kept = kept;
        self.shift = Some((kept, self.shift.map_or(0, |(_, before)| before) + dropped));
        self.note(Event::Shift(dropped));
    }

    /// Puts in an event that is no text; nothing once all is over, since its readers may be gone.
    pub fn note(&mut self, event: Event) {
        if self.outcome.is_none() {
            self.note_after(self.tokens.len(), event);
        }
    }

    fn note_after(&mut self, n_tokens: usize, event: Event) {
        let at = self.place();
        self.notes.push(Note { at, n_tokens, event });
    }

    /// Where a note stands now.
    fn place(&self) -> usize {
        if self.is_inside() { self.reasoning.len() } else { self.text.len() }
    }

    fn is_inside(&self) -> bool {
        self.stretches.last().is_some_and(|stretch| stretch.ended.is_none())
    }

    pub fn append_marked(&mut self, drawn: Option<Drawn>, text: &str, marks: &[(usize, Mark)]) {
        self.append_token(drawn);
        let mut start = 0;
        for (end, mark) in marks {
            self.append_text(&text[start..*end]);
            self.apply(mark);
            start = *end;
        }
        self.append_text(&text[start..]);
    }

    /// A mark counts the tokens and calls of its round.
    fn apply(&mut self, mark: &Mark) {
        match mark {
            Mark::Content { token } => {
                self.round_content_start = Some(*token);
                self.content_start.get_or_insert(self.start.tokens + token);
            }
            Mark::Open { token } => self.open(*token),
            Mark::Close { token, forced } => self.close(*token, true, *forced),
            Mark::Call(event) => self.call(event),
        }
    }

    fn call(&mut self, event: &CallEvent) {
        match event {
            CallEvent::Start { id, name, .. } => {
                let (id, name) = (id.clone(), name.clone());
                self.calls.push(ToolCall { id, name, arguments: String::new(), whole: false });
            }
            CallEvent::Delta { index, text } => {
                if self.join_delta(*index, text) {
                    return;
                }
            }
            CallEvent::End { index, arguments } => {
                if let Some(call) = self.calls.get_mut(self.start.calls + index) {
                    (call.arguments, call.whole) = (arguments.clone(), true);
                    self.driver_news = self.phase == Phase::Running { more: true };
                }
            }
        }
        self.note(Event::Call(event.clone()));
    }

    /// Adds arguments to those that nobody has read yet. Whether there are any.
    fn join_delta(&mut self, index: usize, more: &str) -> bool {
        let n_read = self.readers.iter().flatten().map(|reader| reader.notes).max().unwrap_or(0);
        let (n_notes, n_tokens, here) = (self.notes.len(), self.tokens.len(), self.place());
        match self.notes.last_mut().filter(|last| n_read < n_notes && last.at == here) {
            Some(Note { event: Event::Call(CallEvent::Delta { index: last, text }), n_tokens: of_note, .. })
                if *last == index =>
            {
                text.push_str(more);
                *of_note = n_tokens;
                true
            }
            _ => false,
        }
    }

    fn open(&mut self, token: usize) {
        let token = self.start.tokens + token;
        self.note_after(token, Event::SegmentStart);
        let (text, tokens) = (self.reasoning.len()..self.reasoning.len(), token..token);
        let began = Instant::now();
        self.stretches.push(Stretch { text, tokens, began, ended: None, closed: false, forced: false });
    }

    fn close(&mut self, token: usize, closed: bool, forced: bool) {
        let token = self.start.tokens + token;
        self.note_after(token, Event::SegmentEnd);
        let Some(stretch) = self.stretches.last_mut() else { return };
        stretch.text.end = self.reasoning.len();
        stretch.tokens.end = token;
        stretch.ended = Some(Instant::now());
        (stretch.closed, stretch.forced) = (closed, forced);
    }

    fn append_text(&mut self, text: &str) {
        match self.is_inside() {
            true => self.reasoning.push_str(text),
            false => self.text.push_str(text),
        }
    }

    fn append_token(&mut self, drawn: Option<Drawn>) {
        let Some(drawn) = drawn else { return };
        if self.clock.first_token.is_none() {
            self.clock.first_token = Some(Instant::now());
        }
        self.counts.predicted += 1;
        self.tokens.push(drawn.token);
        self.logprobs.extend(drawn.logprob);
    }

    /// Everything that was produced.
    pub fn finished(&self) -> Finished {
        let content_start = self.content_start.unwrap_or(if self.stretches.is_empty() { 0 } else { self.tokens.len() });
        let stats = self.stats();
        Finished { content_start, stats, shift: self.shift, ..self.since(&Start::default(), &self.now()) }
    }

    /// What the last round has produced; its segments count its own tokens. `None` before the first end.
    pub fn round(&self) -> Option<Finished> {
        let round = self.last.as_ref()?;
        let found = self.since(&round.start, &self.start);
        let without = if found.segments.is_empty() { 0 } else { found.tokens.len() };
        let content_start = round.content_start.unwrap_or(without);
        Some(Finished { content_start, stats: round.stats, shift: round.shift, ..found })
    }

    fn since(&self, from: &Start, to: &Start) -> Finished {
        let stretches = &self.stretches[from.stretches..to.stretches];
        Finished {
            text: self.text[from.text..to.text].to_owned(),
            reasoning: self.reasoning[from.reasoning..to.reasoning].to_owned(),
            segments: stretches.iter().map(|stretch| self.segment(stretch, from.tokens)).collect(),
            content_start: 0,
            calls: self.calls[from.calls..to.calls].iter().filter(|call| call.whole).cloned().collect(),
            tokens: self.tokens[from.tokens..to.tokens].to_vec(),
            logprobs: self.logprobs[from.logprobs..to.logprobs].to_vec(),
            stats: Stats::default(),
            shift: None,
        }
    }

    fn segment(&self, stretch: &Stretch, first: usize) -> Segment {
        let ended = stretch.ended.unwrap_or_else(Instant::now);
        Segment {
            text: self.reasoning[stretch.text.clone()].to_owned(),
            first: stretch.tokens.start - first,
            tokens: self.tokens[stretch.tokens.clone()].to_vec(),
            duration: ended.saturating_duration_since(stretch.began).as_secs_f64(),
            closed: stretch.closed,
            forced: stretch.forced,
        }
    }

    // ---- who reads ------------------------------------------------------------------------------------------------

    pub fn open_reader(&mut self, events: bool) -> ReaderId {
        let reader =
            Reader { events, text: 0, reasoning: 0, inside: false, tokens: 0, seen: 0, notes: 0, waiting: false };
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
        !reader.waiting && self.tokens.len() - reader.tokens.max(reader.seen) > self.max_pending
    }

    fn has_news(&self, reader: &Reader) -> bool {
        let more = reader.reasoning < self.reasoning.len() || reader.notes < self.notes.len();
        reader.text < self.text.len() || (reader.events && more)
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
        let place = self.readers.get_mut(reader)?.as_mut()?;
        let next = self.notes.get(place.notes);
        let (delivered, text) = match place.inside {
            true => (&mut place.reasoning, &self.reasoning),
            false => (&mut place.text, &self.text),
        };
        let end = next.map_or(text.len(), |note| note.at);
        let is_border = |event: &Event| matches!(event, Event::SegmentStart | Event::SegmentEnd | Event::Note(_));
        let border = next.filter(|note| is_border(&note.event));
        let n_tokens = next.map_or(self.tokens.len(), |note| note.n_tokens).max(place.tokens);
        // Tokens that brought no text are told at a border and at the end: tags, a stop's, control tokens.
        let silent = (border.is_some() || (next.is_none() && self.outcome.is_some())) && place.tokens < n_tokens;
        if *delivered < end || silent {
            let start = std::mem::replace(delivered, end.max(*delivered));
            let first = std::mem::replace(&mut place.tokens, n_tokens);
            place.waiting = false;
            let (text, tokens) = (text[start..end.max(start)].to_owned(), self.tokens[first..n_tokens].to_vec());
            return Some(if place.inside { Event::Reasoning(text, tokens) } else { Event::Text(text, tokens) });
        }
        let Note { event, n_tokens, .. } = next?;
        let event = event.clone();
        place.seen = *n_tokens;
        place.notes += 1;
        place.waiting = false;
        match event {
            Event::SegmentStart => place.inside = true,
            Event::SegmentEnd => place.inside = false,
            _ => {}
        }
        Some(event)
    }

    /// Whether there is something to read already.
    pub fn set_waiting(&mut self, reader: ReaderId, waiting: bool) -> bool {
        if let Some(Some(reader)) = self.readers.get_mut(reader) {
            reader.waiting = waiting;
        }
        let news = self.readers.get(reader).and_then(Option::as_ref).is_some_and(|reader| self.has_news(reader));
        waiting && (news || self.outcome.is_some())
    }

    /// Whether a suspended reader can go on, or a call can be carried out.
    pub fn take_news(&mut self) -> bool {
        let news = std::mem::take(&mut self.driver_news);
        news || self.readers.iter().flatten().any(|reader| reader.waiting && self.has_news(reader))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::error::Error;

    fn drawn(token: Token) -> Option<Drawn> {
        Some(Drawn { token, logprob: None })
    }

    impl Log {
        /// As all is where nobody reasons.
        fn append(&mut self, drawn: Option<Drawn>, text: &str) {
            self.append_marked(drawn, text, &[]);
        }
    }

    fn outcome() -> Outcome {
        Outcome { stop_reason: StopReason::Eos, stop_string: None, error: None, completed: true }
    }

    fn with_text(text: &str) -> Log {
        let mut log = Log::new(None);
        log.append(None, text);
        log
    }

    fn prompt(processed: usize) -> Event {
        Event::Prompt { processed, cached: 1, total: 9 }
    }

    fn text(text: &str, tokens: &[Token]) -> Event {
        Event::Text(text.into(), tokens.into())
    }

    fn all_events(log: &mut Log, reader: ReaderId) -> Vec<Event> {
        std::iter::from_fn(|| log.read_event(reader)).collect()
    }

    // ---- readers --------------------------------------------------------------------------------------------------

    #[test]
    fn every_reader_begins_at_the_first_piece_however_late() {
        let mut log = with_text("one ");
        let early = log.open_reader(false);
        assert_eq!(log.read(early).as_deref(), Some("one "));
        log.append(drawn(1), "two");
        log.finish(outcome());
        let late = log.open_reader(false);
        assert_eq!(log.read(late).as_deref(), Some("one two"));
        assert_eq!(log.read(early).as_deref(), Some("two"));
        assert_eq!((log.read(early), log.read(late)), (None, None));
    }

    #[test]
    fn a_closed_reader_gets_nothing_and_its_place_is_taken_by_a_new_one() {
        let mut log = with_text("text");
        let closed = log.open_reader(true);
        log.close_reader(closed);
        assert_eq!((log.read(closed), log.read_event(closed)), (None, None));
        let next = log.open_reader(false);
        assert_eq!((next, log.read(next).as_deref()), (closed, Some("text")));
    }

    #[test]
    fn a_reader_that_never_was_gets_nothing() {
        let mut log = with_text("text");
        assert_eq!((log.read(7), log.read_event(7)), (None, None));
        assert!(!log.set_waiting(7, true));
        log.close_reader(7);
    }

    // ---- events ---------------------------------------------------------------------------------------------------

    #[test]
    fn events_stand_where_they_happened() {
        let mut log = Log::new(None);
        log.admitted(1, 9, Source::Cells);
        let reader = log.open_reader(true);
        assert_eq!(log.read_event(reader), Some(prompt(1)));
        log.progressed(9, 1, 9);
        log.append(drawn(1), "a");
        log.append(drawn(2), "b");
        log.shifted(4, 7);
        assert_eq!(all_events(&mut log, reader), [prompt(9), text("ab", &[1, 2]), Event::Shift(7)]);
        log.append(drawn(3), "c");
        assert_eq!(all_events(&mut log, reader), [text("c", &[3])]);
    }

    #[test]
    fn of_progress_that_nobody_saw_only_the_newest_is_told() {
        let mut log = Log::new(None);
        let reader = log.open_reader(true);
        log.admitted(1, 9, Source::Cells);
        log.progressed(4, 1, 9);
        assert_eq!(all_events(&mut log, reader), [prompt(4)]);
        log.progressed(6, 1, 9);
        log.progressed(9, 1, 9);
        assert_eq!(all_events(&mut log, reader), [prompt(9)]);
    }

    #[test]
    fn a_prompt_that_is_evaluated_again_is_no_news() {
        let mut log = Log::new(None);
        log.admitted(1, 9, Source::Cells);
        log.append(drawn(1), "a");
        log.admitted(8, 10, Source::Cells);
        log.progressed(10, 8, 10);
        let reader = log.open_reader(true);
        assert_eq!(all_events(&mut log, reader), [prompt(1), text("a", &[1])]);
        assert_eq!((log.counts.prompt, log.counts.cached), (9, 1));
    }

    #[test]
    fn tokens_without_text_come_with_the_next_text_or_at_the_end() {
        let mut log = Log::new(None);
        let reader = log.open_reader(true);
        log.append(drawn(1), "");
        assert_eq!(log.read_event(reader), None);
        log.append(drawn(2), "b");
        assert_eq!(log.read_event(reader), Some(text("b", &[1, 2])));
        log.append(drawn(3), "");
        assert_eq!(log.read_event(reader), None);
        log.finish(outcome());
        assert_eq!(all_events(&mut log, reader), [text("", &[3])]);
    }

    #[test]
    fn a_text_reader_is_not_woken_by_an_event_without_text() {
        let mut log = Log::new(None);
        let (words, events) = (log.open_reader(false), log.open_reader(true));
        log.set_waiting(words, true);
        log.shifted(0, 5);
        assert!(!log.take_news());
        assert!(log.set_waiting(events, true), "it can go on at once");
        assert!(log.take_news());
    }

    #[test]
    fn reasoning_comes_as_events_in_its_place_and_never_as_text() {
        let mut log = Log::new(None);
        let (words, events) = (log.open_reader(false), log.open_reader(true));
        log.append_marked(drawn(1), "", &[(0, Mark::Open { token: 0 })]);
        log.append(drawn(2), "hm");
        assert_eq!((log.read(words), log.set_waiting(words, true)), (None, false), "it has nothing to read");
        log.append_marked(drawn(3), "", &[(0, Mark::Close { token: 3, forced: false })]);
        log.append_marked(drawn(4), "yes", &[(0, Mark::Content { token: 3 })]);
        let reasoning = Event::Reasoning("hm".into(), vec![1, 2, 3]);
        let told = [Event::SegmentStart, reasoning, Event::SegmentEnd, text("yes", &[4])];
        assert_eq!(all_events(&mut log, events), told);
        assert_eq!(log.read(words).as_deref(), Some("yes"));
        log.finish(outcome());
        let finished = log.finished();
        assert_eq!((finished.reasoning.as_str(), finished.text.as_str(), finished.content_start), ("hm", "yes", 3));
    }

    fn call(event: CallEvent) -> [(usize, Mark); 1] {
        [(0, Mark::Call(event))]
    }

    fn start(index: usize) -> CallEvent {
        CallEvent::Start { index, id: format!("id{index}"), name: "now".into() }
    }

    fn delta(index: usize, text: &str) -> CallEvent {
        CallEvent::Delta { index, text: text.into() }
    }

    fn end(index: usize) -> CallEvent {
        CallEvent::End { index, arguments: "{}".into() }
    }

    #[test]
    fn calls_come_as_events_in_their_place_and_late_readers_get_their_deltas_joined() {
        let mut log = Log::new(None);
        let early = log.open_reader(true);
        log.append(drawn(1), "So.");
        log.append_marked(drawn(2), "", &call(start(0)));
        log.append_marked(drawn(3), "", &call(delta(0, "{")));
        let so_far = [text("So.", &[1, 2]), Event::Call(start(0)), Event::Call(delta(0, "{"))];
        assert_eq!(all_events(&mut log, early), so_far);
        let late = log.open_reader(true);
        log.append_marked(drawn(4), "", &call(delta(0, "}")));
        log.append_marked(drawn(5), "", &call(end(0)));
        log.append_marked(drawn(6), "", &call(start(1)));
        for text in ["{", "\"a\"", ":1"] {
            log.append_marked(None, "", &call(delta(1, text)));
        }
        log.finish(outcome());
        let rest = [delta(0, "}"), end(0), start(1), delta(1, "{\"a\":1")].map(Event::Call);
        let silent = [text("", &[3, 4, 5, 6])];
        assert_eq!(all_events(&mut log, early), [&rest[..], &silent].concat());
        assert_eq!(all_events(&mut log, late), [&so_far[..], &rest, &silent].concat());
    }

    #[test]
    fn calls_that_are_whole_are_in_the_outcome_and_in_their_round() {
        let mut log = Log::deferred(None);
        log.begin(true);
        log.append_marked(drawn(1), "", &call(start(0)));
        log.append_marked(drawn(2), "", &call(end(0)));
        log.append_marked(drawn(3), "", &call(start(1)));
        log.finish(outcome());
        log.begin(true);
        log.append_marked(drawn(4), "", &call(start(0)));
        log.append_marked(drawn(5), "", &call(end(0)));
        log.finish(outcome());
        assert_eq!((log.finished().calls.len(), log.round().map(|round| round.calls.len())), (2, Some(1)));
    }

    #[test]
    fn a_reader_that_follows_a_long_call_does_not_lag() {
        let mut log = Log::new(Some(MAX_PENDING));
        let reader = log.open_reader(true);
        for token in 0..2 * MAX_PENDING as Token {
            log.append_marked(drawn(token), "", &call(delta(0, "x")));
        }
        assert!(log.lags());
        assert!(log.read_event(reader).is_some());
        assert!(!log.lags());
    }

    #[test]
    fn what_is_open_at_the_end_ends_there_unclosed() {
        let mut log = Log::new(None);
        let reader = log.open_reader(true);
        log.append_marked(None, "", &[(0, Mark::Open { token: 0 })]);
        log.append(drawn(1), "hm");
        log.finish(outcome());
        let told = [Event::SegmentStart, Event::Reasoning("hm".into(), vec![1]), Event::SegmentEnd];
        assert_eq!(all_events(&mut log, reader), told);
        let finished = log.finished();
        assert_eq!((finished.segments[0].closed, finished.content_start), (false, 1));
    }

    // ---- what is told of it ---------------------------------------------------------------------------------------

    #[test]
    fn everything_is_there_at_the_end() {
        let mut log = Log::new(None);
        log.append(None, "prefix ");
        let logprob = Logprob { text: "a".into(), logprob: -0.5, top: Vec::new() };
        log.append(Some(Drawn { token: 1, logprob: Some(logprob) }), "a");
        log.shifted(3, 5);
        log.shifted(2, 6);
        log.append(drawn(2), "b");
        log.finish(outcome());
        let finished = log.finished();
        assert_eq!((finished.text.as_str(), finished.tokens), ("prefix ab", vec![1, 2]));
        assert_eq!(finished.logprobs.len(), 1);
        assert_eq!(finished.shift, Some((2, 11)), "kept by the last shift, dropped by all");
        assert_eq!((finished.stats.predicted_tokens, finished.stats.shifted_tokens), (2, 11));
    }

    #[test]
    fn a_prefix_is_no_first_token() {
        let mut log = with_text("prefix");
        assert!(log.clock.first_token.is_none());
        log.append(drawn(1), "");
        assert!(log.clock.first_token.is_some());
    }

    // ---- rounds ---------------------------------------------------------------------------------------------------

    fn ended(stop_reason: StopReason) -> Outcome {
        Outcome { stop_reason, stop_string: None, error: None, completed: true }
    }

    /// A log between two rounds: the first one has said "one".
    fn between_rounds() -> Log {
        let mut log = Log::deferred(None);
        assert!(log.begin(true));
        log.admitted(2, 7, Source::Cells);
        log.append(drawn(1), "one");
        log.finish(ended(StopReason::Eos));
        log
    }

    #[test]
    fn a_round_that_may_have_another_is_not_the_end() {
        let mut log = between_rounds();
        assert!(log.is_waiting() && log.outcome.is_none());
        assert!(log.begin(false), "the last one");
        assert!(!log.begin(false), "while it runs");
        log.append(drawn(2), " two");
        log.finish(ended(StopReason::MaxTokens));
        assert_eq!(log.outcome.as_ref().map(|outcome| outcome.stop_reason), Some(StopReason::MaxTokens));
        assert!(!log.begin(false), "all is over");
        assert_eq!((log.text.as_str(), log.finished().tokens, log.n_rounds()), ("one two", vec![1, 2], 2));
    }

    #[test]
    fn a_round_that_failed_or_was_cancelled_is_the_end() {
        for outcome in [ended(StopReason::Cancelled), Outcome { error: Some(Error::Cancelled), ..outcome() }] {
            let mut log = Log::deferred(None);
            log.begin(true);
            log.finish(outcome);
            assert!(log.outcome.is_some() && !log.is_waiting());
        }
    }

    #[test]
    fn a_round_tells_what_it_alone_has_produced() {
        let mut log = Log::deferred(None);
        assert!(log.round().is_none());
        log.begin(true);
        log.append_marked(drawn(1), "", &[(0, Mark::Open { token: 0 })]);
        log.append(drawn(2), "hm");
        log.append_marked(drawn(3), "yes", &[(0, Mark::Close { token: 3, forced: false })]);
        log.finish(ended(StopReason::Eos));
        log.begin(true);
        log.shifted(4, 7);
        log.append_marked(drawn(4), "", &[(0, Mark::Open { token: 0 })]);
        log.append_marked(drawn(5), "ohno", &[(2, Mark::Close { token: 1, forced: true })]);
        log.append_marked(None, "", &[(0, Mark::Content { token: 1 })]);
        log.finish(ended(StopReason::Eos));
        let round = log.round().expect("it has ended");
        assert_eq!((round.text.as_str(), round.reasoning.as_str()), ("no", "oh"));
        assert_eq!((round.tokens, round.content_start, round.shift), (vec![4, 5], 1, Some((4, 7))));
        let own = Segment { first: 0, ..round.segments[0].clone() };
        assert_eq!((round.segments, own.tokens, own.forced), (vec![round_segment(&log, 0)], vec![4], true));
        let all = log.finished();
        assert_eq!((all.text.as_str(), all.reasoning.as_str(), all.content_start), ("yesno", "hmoh", 4));
        assert_eq!(all.segments.iter().map(|segment| segment.first).collect::<Vec<_>>(), [0, 3]);
    }

    /// The last segment of all, as its round counts.
    fn round_segment(log: &Log, first: usize) -> Segment {
        let last = log.finished().segments.pop().expect("there is one");
        Segment { first, ..last }
    }

    #[test]
    fn what_rounds_take_adds_up_and_a_pause_between_them_is_nobody_s() {
        let mut log = between_rounds();
        assert_eq!(log.stats().predicted_tokens, 1);
        log.shifted(1, 3);
        assert_eq!(log.stats().shifted_tokens, 3, "before the next round begins");
        log.begin(true);
        log.admitted(7, 9, Source::Cells);
        log.append(drawn(2), "two");
        log.append(drawn(3), "three");
        let stats = log.stats();
        assert_eq!((stats.prompt_tokens, stats.cached_tokens, stats.predicted_tokens), (16, 9, 3));
        assert_eq!((stats.first_tokens, stats.shifted_tokens), (2, 3));
        log.finish(ended(StopReason::Eos));
        assert_eq!(log.round().expect("it has ended").stats.predicted_tokens, 2);
        log.end_waiting(ended(StopReason::Eos));
        let (one, other) = (log.finished().stats, log.finished().stats);
        assert_eq!((one.total_time, one.predicted_tokens), (other.total_time, 3), "after the end nothing changes");
        assert!(one.queue_time + one.prefill_time + one.decode_time <= one.total_time);
    }

    #[test]
    fn notes_come_in_their_place_after_the_tokens_before_them_and_never_after_the_end() {
        let mut log = Log::deferred(None);
        let reader = log.open_reader(true);
        log.note(Event::Note(0));
        log.begin(true);
        log.append(drawn(1), "a");
        log.append(drawn(2), "");
        log.finish(ended(StopReason::Eos));
        log.note(Event::Note(1));
        log.begin(false);
        log.append(drawn(3), "b");
        log.finish(ended(StopReason::Eos));
        log.note(Event::Note(2));
        let told = [Event::Note(0), text("a", &[1, 2]), Event::Note(1), text("b", &[3])];
        assert_eq!(all_events(&mut log, reader), told);
        let late = log.open_reader(true);
        assert_eq!(all_events(&mut log, late), told);
    }

    // ---- back-pressure and interest -------------------------------------------------------------------------------

    const MAX_PENDING: usize = 3;

    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Place {
        /// It has read all.
        There,
        /// As much before it as it may have.
        AtLimit,
        Behind,
        /// Behind, but suspended until it is woken.
        Waiting,
    }

    /// A log of more than enough tokens with readers at these places.
    fn with_readers(places: &[Place], max_pending: Option<usize>) -> Log {
        let mut log = Log::new(max_pending);
        let readers: Vec<_> = places.iter().map(|_| log.open_reader(false)).collect();
        (0..=MAX_PENDING as Token).for_each(|token| {
            log.append(drawn(token), "x");
            if token == 0 {
                catch_up(&mut log, &readers, places, Place::AtLimit);
            }
        });
        catch_up(&mut log, &readers, places, Place::There);
        for (&reader, _) in readers.iter().zip(places).filter(|(_, place)| **place == Place::Waiting) {
            log.set_waiting(reader, true);
        }
        log
    }

    fn catch_up(log: &mut Log, readers: &[ReaderId], places: &[Place], which: Place) {
        for (&reader, _) in readers.iter().zip(places).filter(|(_, place)| **place == which) {
            log.read(reader);
        }
    }

    /// All lists of up to three places.
    fn lists_of_places() -> Vec<Vec<Place>> {
        let places = [Place::There, Place::AtLimit, Place::Behind, Place::Waiting];
        let longer = |lists: &[Vec<Place>]| -> Vec<Vec<Place>> {
            lists.iter().flat_map(|list| places.map(|place| [list.as_slice(), &[place]].concat())).collect()
        };
        let mut lists = vec![vec![]];
        for _ in 0..3 {
            lists = lists.iter().cloned().chain(longer(&lists)).collect();
        }
        lists
    }

    #[test]
    fn it_lags_only_while_nobody_awaits_the_result_and_every_reader_is_behind() {
        for places in lists_of_places() {
            let behind = !places.is_empty() && places.iter().all(|place| *place == Place::Behind);
            let mut log = with_readers(&places, Some(MAX_PENDING));
            assert_eq!(log.lags(), behind, "{places:?}");
            log.add_interest(false);
            assert_eq!(log.lags(), behind, "{places:?} in an open block");
            log.add_interest(true);
            assert!(!log.lags(), "{places:?} while somebody awaits the result");
            log.add_interest(true);
            log.drop_interest(true);
            assert!(!log.lags(), "{places:?} while one of two awaits it still");
            log.drop_interest(true);
            assert_eq!(log.lags(), behind, "{places:?} after that");
            assert!(!with_readers(&places, None).lags(), "{places:?} without a limit");
        }
    }

    #[test]
    fn a_woken_reader_lags_again_once_it_has_read_and_left_too_much() {
        let mut log = with_readers(&[Place::Waiting], Some(MAX_PENDING));
        assert!(!log.lags());
        log.read(0);
        (0..MAX_PENDING as Token).for_each(|token| log.append(drawn(token), "x"));
        assert!(!log.lags());
        log.append(drawn(9), "x");
        assert!(log.lags());
    }

    #[test]
    fn a_reader_that_waits_no_longer_lags_like_any_other() {
        let mut log = with_readers(&[Place::Waiting], Some(MAX_PENDING));
        assert!(!log.set_waiting(0, false));
        assert!(log.lags());
    }

    #[test]
    fn a_closed_reader_holds_nobody_up_and_nobody_on() {
        let mut log = with_readers(&[Place::Behind, Place::There], Some(MAX_PENDING));
        assert!(!log.lags());
        log.close_reader(1);
        assert!(log.lags());
        log.close_reader(0);
        assert!(!log.lags());
    }

    #[test]
    fn interest_is_a_reader_or_a_waiter_or_an_open_block() {
        let mut log = Log::new(None);
        assert!(!log.has_interest());
        for awaits_result in [true, false] {
            log.add_interest(awaits_result);
            log.drop_interest(!awaits_result);
            assert!(log.has_interest(), "dropping one kind keeps the other");
            log.drop_interest(awaits_result);
            assert!(!log.has_interest());
        }
        let (one, two) = (log.open_reader(false), log.open_reader(true));
        log.close_reader(one);
        log.close_reader(one);
        assert!(log.has_interest(), "closing twice counts once");
        log.close_reader(two);
        assert!(!log.has_interest());
    }

    // ---- any interleaving -----------------------------------------------------------------------------------------

    #[derive(Clone, Debug)]
    enum Op {
        Append(bool, &'static str),
        /// The same with a border after the first character: into reasoning or out of it.
        Cross(bool, &'static str),
        Progress,
        Shift(usize),
        /// A call's arguments go on.
        Call(&'static str),
        Note,
        /// The round ends and the next begins.
        Round,
        Open(bool),
        Read(usize),
        Wait(usize),
        Close(usize),
    }

    fn op() -> impl Strategy<Value = Op> {
        let piece = prop::sample::select(vec!["", "a", "bc", "ü", "日本", "🙂"]);
        prop_oneof![
            8 => (prop::bool::weighted(0.8), piece.clone()).prop_map(|(token, piece)| Op::Append(token, piece)),
            2 => (prop::bool::weighted(0.8), piece).prop_map(|(token, piece)| Op::Cross(token, piece)),
            2 => Just(Op::Progress),
            2 => (1..9usize).prop_map(Op::Shift),
            3 => prop::sample::select(vec!["{", "\"a\"", ": 1}"]).prop_map(Op::Call),
            1 => Just(Op::Note),
            1 => Just(Op::Round),
            2 => any::<bool>().prop_map(Op::Open),
            8 => (0..4usize).prop_map(Op::Read),
            4 => (0..4usize).prop_map(Op::Wait),
            1 => (0..4usize).prop_map(Op::Close),
        ]
    }

    /// What a reader has got so far.
    #[derive(Debug, Default)]
    struct Got {
        events: bool,
        text: String,
        tokens: Vec<Token>,
        reasoning: String,
        /// What came as reasoning.
        reasoned: Vec<Token>,
        /// Where in content and reasoning the borders came.
        borders: Vec<(usize, usize)>,
        /// Shifts, and where in all text they came.
        shifts: Vec<(usize, usize)>,
        /// Characters of arguments, and where in all text they came.
        arguments: Vec<(usize, char)>,
        /// Notes, and where in all text they came.
        notes: Vec<(usize, usize)>,
        /// How far the prompt was, and where in all text that came.
        progress: Vec<(usize, usize)>,
        waiting: bool,
    }

    impl Got {
        fn take(&mut self, event: Event) {
            let place = self.text.len() + self.reasoning.len();
            let inside = self.borders.len() % 2 == 1;
            match event {
                Event::Text(text, tokens) => {
                    assert!(!inside && (!text.is_empty() || !tokens.is_empty()), "an event of nothing");
                    self.text.push_str(&text);
                    self.tokens.extend(tokens);
                }
                Event::Reasoning(text, tokens) => {
                    assert!(inside && (!text.is_empty() || !tokens.is_empty()), "an event of nothing");
                    self.reasoning.push_str(&text);
                    self.reasoned.extend(&tokens);
                    self.tokens.extend(tokens);
                }
                Event::SegmentStart | Event::SegmentEnd => {
                    assert_eq!(inside, event == Event::SegmentEnd);
                    self.borders.push((self.text.len(), self.reasoning.len()));
                }
                Event::Shift(dropped) => self.shifts.push((place, dropped)),
                Event::Prompt { processed, .. } => self.progress.push((place, processed)),
                Event::Call(CallEvent::Delta { text, .. }) => {
                    self.arguments.extend(text.chars().map(|c| (place, c)));
                }
                Event::Call(event) => panic!("nobody has said {event:?}"),
                Event::Note(index) => self.notes.push((place, index)),
            }
        }
    }

    /// A log, what came in, and what each reader got out.
    struct Run {
        log: Log,
        text: String,
        reasoning: String,
        reasoned: Vec<Token>,
        borders: Vec<(usize, usize)>,
        tokens: Vec<Token>,
        shifts: Vec<(usize, usize)>,
        arguments: Vec<(usize, char)>,
        notes: Vec<(usize, usize)>,
        progress: Vec<(usize, usize)>,
        /// Tokens before this round.
        first: usize,
        readers: Vec<Option<Got>>,
    }

    impl Run {
        fn new() -> Self {
            let mut log = Log::deferred(Some(MAX_PENDING));
            log.begin(true);
            let (text, tokens) = Default::default();
            let (reasoning, reasoned, borders) = Default::default();
            let (shifts, arguments, notes, progress, first, readers) = Default::default();
            Self { log, text, reasoning, reasoned, borders, tokens, shifts, arguments, notes, progress, first, readers }
        }

        fn is_inside(&self) -> bool {
            self.borders.len() % 2 == 1
        }

        /// Characters of all text.
        fn place(&self) -> usize {
            self.text.len() + self.reasoning.len()
        }

        fn apply(&mut self, op: &Op) {
            match *op {
                Op::Append(token, piece) => self.append(token, piece, None),
                Op::Cross(token, piece) => {
                    let first = piece.chars().next().map_or(0, char::len_utf8);
                    self.append(token, piece, Some(first));
                }
                Op::Progress => self.advance(),
                Op::Shift(dropped) => {
                    self.shifts.push((self.place(), dropped));
                    self.log.shifted(0, dropped);
                }
                Op::Call(arguments) => {
                    let place = self.place();
                    self.arguments.extend(arguments.chars().map(|c| (place, c)));
                    let delta = CallEvent::Delta { index: 0, text: arguments.into() };
                    self.log.append_marked(None, "", &[(0, Mark::Call(delta))]);
                }
                Op::Note => {
                    self.notes.push((self.place(), self.notes.len()));
                    self.log.note(Event::Note(self.notes.len() - 1));
                }
                Op::Round => self.end_round(),
                Op::Open(events) => self.open(events),
                Op::Read(reader) => drop(self.read(reader)),
                Op::Wait(reader) => self.wait(reader),
                Op::Close(reader) => self.close(reader),
            }
            self.check_wake_ups();
        }

        /// The next one begins at once; what is open ends with the round.
        fn end_round(&mut self) {
            self.log.finish(outcome());
            if self.is_inside() {
                self.borders.push((self.text.len(), self.reasoning.len()));
            }
            self.first = self.tokens.len();
            assert!(self.log.begin(true));
        }

        /// A token that opens or closes a segment belongs to it.
        fn append(&mut self, with_token: bool, piece: &str, border: Option<usize>) {
            let token = self.tokens.len() as Token;
            self.tokens.extend(with_token.then_some(token));
            let reasons = self.is_inside() || border.is_some();
            self.reasoned.extend((with_token && reasons).then_some(token));
            let mark = match self.is_inside() {
                true => Mark::Close { token: self.tokens.len() - self.first, forced: false },
                false => Mark::Open { token: token as usize - self.first },
            };
            let (before, after) = piece.split_at(border.unwrap_or(piece.len()));
            self.append_text(before);
            if border.is_some() {
                self.borders.push((self.text.len(), self.reasoning.len()));
            }
            self.append_text(after);
            let marks: Vec<_> = border.map(|at| (at, mark)).into_iter().collect();
            self.log.append_marked(with_token.then_some(Drawn { token, logprob: None }), piece, &marks);
        }

        fn append_text(&mut self, text: &str) {
            if self.is_inside() { self.reasoning.push_str(text) } else { self.text.push_str(text) }
        }

        fn advance(&mut self) {
            let processed = self.progress.len();
            if self.tokens.len() == self.first {
                self.progress.push((self.place(), processed));
            }
            self.log.progressed(processed, 0, 99);
        }

        fn open(&mut self, events: bool) {
            let reader = self.log.open_reader(events);
            let got = Some(Got { events, ..Got::default() });
            match self.readers.get_mut(reader) {
                Some(place) => *place = got,
                None => self.readers.push(got),
            }
        }

        fn close(&mut self, reader: usize) {
            self.log.close_reader(reader);
            self.readers.get_mut(reader).map(Option::take);
        }

        /// Whether there was anything.
        fn read(&mut self, reader: usize) -> bool {
            let Some(Some(got)) = self.readers.get_mut(reader) else {
                assert_eq!((self.log.read(reader), self.log.read_event(reader)), (None, None));
                return false;
            };
            let event = match got.events {
                true => self.log.read_event(reader),
                false => self.log.read(reader).map(|text| Event::Text(text, Vec::new())),
            };
            got.waiting &= event.is_none();
            event.is_some_and(|event| {
                got.take(event);
                true
            })
        }

        /// As an iterator does: it suspends itself only if a read brings nothing.
        fn wait(&mut self, reader: usize) {
            let brought_something = self.read(reader);
            let Some(Some(got)) = self.readers.get_mut(reader) else { return };
            if !brought_something {
                got.waiting = true;
                let over = self.log.outcome.is_some();
                assert_eq!(self.log.set_waiting(reader, true), over, "nothing to read, so it sleeps");
            }
        }

        /// There is a wake-up just when one of those who wait can read on.
        fn check_wake_ups(&mut self) {
            let n_notes = self.log.notes.len();
            let can_go_on = self.readers.iter().zip(&self.log.readers).any(|(got, reader)| {
                let (Some(got), Some(reader)) = (got, reader) else { return false };
                let more = reader.notes < n_notes || got.reasoning.len() < self.reasoning.len();
                got.waiting && (got.text.len() < self.text.len() || (got.events && more))
            });
            assert_eq!(self.log.take_news(), can_go_on);
        }

        fn finish(&mut self) {
            self.end_round();
            self.log.finish(ended(StopReason::Cancelled));
            for reader in 0..self.readers.len() {
                while self.read(reader) {}
            }
        }

        fn check(&self) {
            assert_eq!((&self.log.text, &self.log.tokens), (&self.text, &self.tokens));
            let segments = self.log.finished().segments;
            let tokens: Vec<Token> = segments.iter().flat_map(|segment| segment.tokens.clone()).collect();
            assert_eq!(tokens, self.reasoned);
            assert_eq!(segments.iter().map(|segment| segment.text.as_str()).collect::<String>(), self.reasoning);
            for got in self.readers.iter().flatten() {
                assert_eq!(got.text, self.text, "reads join to the text");
                if got.events {
                    assert_eq!(got.tokens, self.tokens, "deltas' tokens join to all tokens");
                    assert_eq!(got.reasoning, self.reasoning, "and to the reasoning");
                    assert_eq!(got.reasoned, self.reasoned, "its tokens are told as such");
                    assert_eq!(got.borders, self.borders, "borders come at their places");
                    assert_eq!(got.shifts, self.shifts, "shifts come at their places");
                    assert_eq!(got.arguments, self.arguments, "arguments come at theirs");
                    assert_eq!(got.notes, self.notes, "notes come at theirs");
                    self.check_progress(&got.progress);
                }
            }
        }

        /// Some of it, in order and in its place, and always the last.
        fn check_progress(&self, got: &[(usize, usize)]) {
            assert!(got.windows(2).all(|pair| pair[0].1 < pair[1].1), "{got:?}");
            assert!(got.iter().all(|progress| self.progress.contains(progress)), "{got:?} of {:?}", self.progress);
            assert_eq!(got.last(), self.progress.last());
        }
    }

    proptest! {
        #[test]
        fn every_reader_gets_everything_once_and_in_order(ops in prop::collection::vec(op(), 0..60)) {
            let mut run = Run::new();
            run.open(true);
            ops.iter().for_each(|op| run.apply(op));
            run.finish();
            run.check();
        }
    }
}

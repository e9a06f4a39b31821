//! ⑤ The hand-off between a sequence, which runs on its own, and readers on an event loop.

mod hub;
mod log;
mod stats;

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

pub use hub::{Hub, Target};
use log::Log;
pub use log::{Event, ReaderId, Segment, ToolCall};
pub use stats::{Counts, Stats};

use crate::context::job::{End, Flow};
use crate::context::parking::Source;
use crate::error::{Error, closed};
use crate::llama::Token;
use crate::sequence::{Drawn, Logprob, Mark, Nudge, Outcome, Resume, Sink, StopReason};

const RUNNING: u8 = 0;
const CANCELLED: u8 = 1;
const CLOSED: u8 = 2;

/// A running or finished prediction. Everything may be called from any thread.
pub struct Prediction {
    target: Arc<Target>,
    cancel: Arc<AtomicBool>,
    /// Why `cancel` is set.
    why: AtomicU8,
    /// Makes whoever runs or queues it look at its flags.
    nudge: Mutex<Option<Nudge>>,
    resume: Mutex<Option<Resume>>,
    paused: AtomicBool,
    log: Mutex<Log>,
}

/// Everything about a finished prediction.
pub struct Finished {
    /// All content.
    pub text: String,
    /// All reasoning.
    pub reasoning: String,
    /// Each stretch of reasoning.
    pub segments: Vec<Segment>,
    /// The token in which content begins, or the number of tokens.
    pub content_start: usize,
    /// The calls that are whole.
    pub calls: Vec<ToolCall>,
    /// All drawn tokens.
    pub tokens: Vec<Token>,
    /// Their log-probabilities, if asked for.
    pub logprobs: Vec<Logprob>,
    /// Numbers.
    pub stats: Stats,
    /// Tokens kept and dropped by context shifts.
    pub shift: Option<(usize, usize)>,
}

impl Prediction {
    /// A prediction whose readers lag at most `max_pending` tokens before it pauses; `None` never pauses.
    #[must_use]
    pub fn new(hub: &Arc<Hub>, max_pending: Option<usize>) -> Arc<Self> {
        Self::with_log(hub, Log::new(max_pending))
    }

    /// One whose prompt is not known yet. Cancelled before it begins, it ends at once.
    #[must_use]
    pub fn deferred(hub: &Arc<Hub>, max_pending: Option<usize>) -> Arc<Self> {
        Self::with_log(hub, Log::deferred(max_pending))
    }

    fn with_log(hub: &Arc<Hub>, log: Log) -> Arc<Self> {
        Arc::new(Self {
            target: hub.target(),
            cancel: Arc::default(),
            why: AtomicU8::new(RUNNING),
            nudge: Mutex::default(),
            resume: Mutex::default(),
            paused: AtomicBool::new(false),
            log: Mutex::new(log),
        })
    }

    /// Begins a deferred one, or its next round; with `more`, another may follow this. False when a round runs, or
    /// all is over.
    pub fn begin(&self, more: bool) -> bool {
        let mut log = self.log();
        let begins = log.begin(more);
        if begins {
            // The round before may have ended while it was to pause.
            self.paused.store(false, Ordering::SeqCst);
        }
        begins
    }

    /// Ends a deferred one that will not begin, or go on, as cancelled; no effect on any other.
    pub fn abandon(&self) {
        self.end_waiting(|_| self.cancelled());
    }

    /// Ends it with what the rounds so far have produced and how the last of them ended, or with another reason. No
    /// effect while one runs.
    pub fn conclude(&self, reason: Option<StopReason>) {
        self.end_waiting(|log| match log.last_outcome() {
            Some(last) => Outcome {
                stop_reason: reason.unwrap_or(last.stop_reason),
                stop_string: last.stop_string.clone(),
                error: None,
                completed: last.completed,
            },
            None => self.cancelled(),
        });
    }

    fn cancelled(&self) -> Outcome {
        let (stop_reason, error) = (StopReason::Cancelled, self.cancel_error());
        Outcome { stop_reason, stop_string: None, error, completed: true }
    }

    /// Ends it here and now if nothing runs.
    fn end_waiting(&self, outcome: impl FnOnce(&Log) -> Outcome) -> bool {
        let mut log = self.log();
        if !log.is_waiting() {
            return false;
        }
        let outcome = outcome(&log);
        log.end_waiting(outcome);
        drop(log);
        self.target.post();
        true
    }

    /// How many rounds have ended.
    #[must_use]
    pub fn n_rounds(&self) -> usize {
        self.log().n_rounds()
    }

    /// The whole calls of tools so far, of all rounds, from the `start`-th on.
    #[must_use]
    pub fn calls(&self, start: usize) -> Vec<ToolCall> {
        self.log().whole_calls(start).cloned().collect()
    }

    /// Puts an event of its driver's own in; `index` is its place in the driver's list.
    pub fn note(&self, index: usize) {
        self.log().note(Event::Note(index));
        self.flush();
    }

    fn nudge(&self) {
        // Called outside the lock: it may end the prediction here and now, which takes the lock again.
        let nudge = lock(&self.nudge).clone();
        if let Some(nudge) = nudge {
            nudge();
        }
    }

    /// Names it when its hub is drained.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.target.id()
    }

    /// Asks it to end; what was drawn is kept. Idempotent, returns at once.
    pub fn cancel(&self) {
        self.log().touched = true;
        self.stop(CANCELLED, End::Cancelled);
    }

    fn stop(&self, why: u8, end: End) {
        if self.why.compare_exchange(RUNNING, why, Ordering::SeqCst, Ordering::SeqCst).is_err() {
            return;
        }
        self.cancel.store(true, Ordering::SeqCst);
        if self.end_waiting(|_| self.cancelled()) {
            return;
        }
        let resume = lock(&self.resume).take();
        match resume {
            Some(resume) => resume(Some(end)),
            None => self.nudge(),
        }
    }

    /// Whether it has ended.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.log().outcome.is_some()
    }

    /// All content so far.
    #[must_use]
    pub fn text(&self) -> String {
        self.log().text.clone()
    }

    /// The numbers so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.log().stats()
    }

    /// Whether it was ever read, awaited or cancelled.
    #[must_use]
    pub fn is_touched(&self) -> bool {
        self.log().touched
    }

    /// Opens a reader at the first piece. It is interest until closed.
    pub fn open_reader(&self, events: bool) -> ReaderId {
        let mut log = self.log();
        log.touched = true;
        log.open_reader(events)
    }

    /// Closes a reader; the last interest that goes cancels what still runs.
    pub fn close_reader(&self, reader: ReaderId) {
        let mut log = self.log();
        log.close_reader(reader);
        self.interest_dropped(log);
    }

    /// Somebody awaits the result, or holds a block open.
    pub fn add_interest(&self, awaits_result: bool) {
        let mut log = self.log();
        log.touched = true;
        log.add_interest(awaits_result);
        self.maybe_resume(log);
    }

    /// The opposite of [`Prediction::add_interest`].
    pub fn drop_interest(&self, awaits_result: bool) {
        let mut log = self.log();
        log.drop_interest(awaits_result);
        self.interest_dropped(log);
    }

    fn interest_dropped(&self, log: std::sync::MutexGuard<'_, Log>) {
        let abandoned = !log.has_interest() && log.outcome.is_none();
        if abandoned {
            drop(log);
            self.stop(CANCELLED, End::Cancelled);
        } else {
            self.maybe_resume(log);
        }
    }

    /// All content since the reader's last read.
    pub fn read(&self, reader: ReaderId) -> Option<String> {
        let mut log = self.log();
        let text = log.read(reader);
        self.maybe_resume(log);
        text
    }

    /// The next event of the reader.
    pub fn read_event(&self, reader: ReaderId) -> Option<Event> {
        let mut log = self.log();
        let event = log.read_event(reader);
        self.maybe_resume(log);
        event
    }

    /// The reader is suspended until there is something to read, or no longer. News that came before is posted now.
    pub fn set_waiting(&self, reader: ReaderId, waiting: bool) {
        let mut log = self.log();
        let news = log.set_waiting(reader, waiting);
        self.maybe_resume(log);
        if news {
            self.target.post();
        }
    }

    /// Lets a paused generation go on once readers have caught up.
    fn maybe_resume(&self, log: std::sync::MutexGuard<'_, Log>) {
        if !self.paused.load(Ordering::SeqCst) || log.lags() {
            return;
        }
        drop(log);
        if !self.paused.swap(false, Ordering::SeqCst) {
            return;
        }
        let resume = lock(&self.resume).take();
        match resume {
            Some(resume) => resume(None),
            None => self.nudge(),
        }
    }

    /// Calls `look` with the outcome and everything that was produced, once it has ended.
    pub fn with_outcome<T>(&self, look: impl FnOnce(&Outcome, Finished) -> T) -> Option<T> {
        let (finished, outcome) = {
            let log = self.log();
            (log.finished(), Arc::clone(log.outcome.as_ref()?))
        };
        Some(look(&outcome, finished))
    }

    /// The same of the round that has ended last, whether or not others follow.
    pub fn with_round<T>(&self, look: impl FnOnce(&Outcome, Finished) -> T) -> Option<T> {
        let (finished, outcome) = {
            let log = self.log();
            (log.round()?, Arc::clone(log.last_outcome()?))
        };
        Some(look(&outcome, finished))
    }

    /// A prediction that was cancelled before its context closed ended by the cancel.
    fn first_reason(&self, outcome: Outcome) -> Outcome {
        let cancelled = self.why.load(Ordering::SeqCst) == CANCELLED;
        match outcome.error {
            Some(Error::Closed(_)) if cancelled => {
                Outcome { stop_reason: StopReason::Cancelled, stop_string: None, error: None, completed: true }
            }
            _ => outcome,
        }
    }

    fn log(&self) -> std::sync::MutexGuard<'_, Log> {
        lock(&self.log)
    }
}

impl Flow for Prediction {
    fn cancel_flag(&self) -> &Arc<AtomicBool> {
        &self.cancel
    }

    fn cancel_error(&self) -> Option<Error> {
        (self.why.load(Ordering::SeqCst) == CLOSED).then(|| closed("sequence"))
    }

    fn is_paused(&self) -> bool {
        self.paused.load(Ordering::SeqCst)
    }

    fn admitted(&self, n_cached: usize, n_total: usize, source: Source) {
        self.log().admitted(n_cached, n_total, source);
        self.flush();
    }

    fn progressed(&self, n_processed: usize, n_cached: usize, n_total: usize) {
        self.log().progressed(n_processed, n_cached, n_total);
    }

    fn shifted(&self, n_kept: usize, n_dropped: usize) {
        self.log().shifted(n_kept, n_dropped);
    }

    fn flush(&self) {
        let news = self.log().take_news();
        if news {
            self.target.post();
        }
    }
}

impl Sink for Prediction {
    fn publish(&self, drawn: Option<Drawn>, text: &str, marks: &[(usize, Mark)]) -> bool {
        let mut log = self.log();
        log.append_marked(drawn, text, marks);
        let lags = log.lags();
        if lags {
            // Under the lock: a reader that catches up now must see it.
            self.paused.store(true, Ordering::SeqCst);
        }
        lags
    }

    fn finish(&self, outcome: Outcome) {
        // Before others may begin the next round, and set theirs.
        let nudge = lock(&self.nudge).take();
        drop(nudge);
        self.log().finish(self.first_reason(outcome));
        if self.cancel.load(Ordering::SeqCst) {
            // It came when the round had ended.
            self.end_waiting(|_| self.cancelled());
        }
        self.target.post();
    }

    fn parked(&self, resume: Resume) {
        *lock(&self.resume) = Some(resume);
        // Whoever cancelled or caught up before found nothing to call.
        let stopped = self.cancel.load(Ordering::SeqCst);
        let goes_on = !self.paused.load(Ordering::SeqCst);
        if !stopped && !goes_on {
            return;
        }
        let Some(resume) = lock(&self.resume).take() else { return };
        match (stopped, self.cancel_error()) {
            (true, Some(error)) => resume(Some(End::Failed(error))),
            (true, None) => resume(Some(End::Cancelled)),
            (false, _) => resume(None),
        }
    }

    fn on_nudge(&self, nudge: Nudge) {
        *lock(&self.nudge) = Some(nudge);
        if self.cancel.load(Ordering::SeqCst) {
            self.nudge();
        }
    }

    fn close(&self) {
        self.stop(CLOSED, End::Failed(closed("sequence")));
    }

    fn as_flow(self: Arc<Self>) -> Arc<dyn Flow> {
        self
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

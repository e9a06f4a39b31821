//! Who holds which sequence of a context, and the threads behind them.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Instant;

use super::actor::{Actor, Command, Envelope, Prediction, Queued, STACK_BYTES};
use super::{Done, Prompt, Request, Sink};
use crate::context::alarms::Late;
use crate::context::job::{Chat, Holder};
use crate::context::parking::Budget;
use crate::context::pool::WaiterId;
use crate::context::{self, Shared, Slot};
use crate::error::{Error, Result, closed};
use crate::llama::{ContextParams, Token};
use crate::model::Model;

/// A context with the actors of its sequences.
pub struct Sequences {
    shared: Arc<Shared>,
    inboxes: Vec<OnceLock<Sender<Envelope>>>,
    /// Predictions that hold no sequence, so that closing the context finds them.
    parked: Mutex<Vec<Weak<dyn Sink>>>,
    this: Weak<Self>,
}

/// All contexts of the process, for the end of the interpreter.
static CONTEXTS: Mutex<Vec<Weak<Sequences>>> = Mutex::new(Vec::new());

impl Sequences {
    /// Makes a context. Blocks while llama.cpp allocates.
    ///
    /// # Errors
    /// What making the context failed with.
    pub fn start(model: &Arc<Model>, params: ContextParams, parking: Budget) -> Result<Arc<Self>> {
        let shared = context::start(model, params, parking)?;
        let n = shared.info.n_sequences;
        let sequences = Arc::new_cyclic(|this| Self {
            shared,
            inboxes: (0..n).map(|_| OnceLock::new()).collect(),
            parked: Mutex::default(),
            this: this.clone(),
        });
        let mut contexts = CONTEXTS.lock().unwrap_or_else(PoisonError::into_inner);
        contexts.retain(|context| context.strong_count() > 0);
        contexts.push(Arc::downgrade(&sequences));
        Ok(sequences)
    }

    /// All contexts that are alive.
    #[must_use]
    pub fn all() -> Vec<Arc<Self>> {
        CONTEXTS.lock().unwrap_or_else(PoisonError::into_inner).iter().filter_map(Weak::upgrade).collect()
    }

    /// The context.
    #[must_use]
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// A sequence when one is free; first come, first served. The result names the waiter, so that it can leave.
    pub fn acquire(&self, chat: Chat, done: Done<Lease>) -> WaiterId {
        let this = self.this.clone();
        let grant = Box::new(move |slot: Result<Slot>| done(slot.and_then(|slot| lease(&this, slot, chat))));
        self.shared.pool.take_for(chat, 0, None, grant)
    }

    /// A sequence if one is free now.
    ///
    /// # Errors
    /// `Closed` for a closed context.
    pub fn try_acquire(&self) -> Result<Option<Lease>> {
        let slot = self.shared.pool.try_take()?;
        slot.map(|slot| lease(&self.this, slot, 0)).transpose()
    }

    /// Predicts on a sequence of its own, as soon as one is free.
    pub fn predict(&self, request: Request, sink: Arc<dyn Sink>) {
        let (priority, deadline) = (request.priority, request.deadline);
        let chat = request.chat.as_ref().map_or(0, |turn| turn.chat);
        let prediction = Prediction { request, sink: Arc::clone(&sink) };
        self.enter(&sink, chat, priority, deadline, move |lease| match lease {
            Ok(lease) => lease.send_last(Command::Predict(Queued::new(prediction))),
            Err(error) => prediction.fail(error),
        });
    }

    /// Calls `run` with a sequence that gives itself back after its last command. Cancelled while it waits, the
    /// prediction is told so at once.
    pub(super) fn enter(
        &self,
        sink: &Arc<dyn Sink>,
        chat: Chat,
        priority: i32,
        deadline: Option<Instant>,
        run: impl FnOnce(Result<Lease>) + Send + 'static,
    ) {
        let this = self.this.clone();
        let grant = Box::new(move |slot: Result<Slot>| run(slot.and_then(|slot| lease(&this, slot, chat))));
        let waiter = self.shared.pool.take_for(chat, priority, deadline, grant);
        let (waiting, shared) = (Arc::downgrade(sink), Arc::clone(&self.shared));
        sink.on_nudge(Arc::new(move || {
            let cancelled = waiting.upgrade().is_some_and(|sink| sink.cancel_flag().load(Ordering::SeqCst));
            match cancelled.then(|| shared.pool.leave(waiter)).flatten() {
                Some(grant) => grant(Err(Error::Cancelled)),
                None => shared.wake(),
            }
        }));
        // The decoder keeps the deadlines and parks paused jobs for those who wait.
        self.shared.wake();
    }

    /// The actor of a sequence; its thread starts with its first command and lives as long as the context.
    fn inbox(&self, slot: Slot) -> Result<Sender<Envelope>> {
        let cell = &self.inboxes[slot as usize];
        if let Some(inbox) = cell.get() {
            return Ok(inbox.clone());
        }
        let (inbox, commands) = channel();
        let actor = Actor::new(slot, Arc::clone(&self.shared), self.this.clone(), commands);
        std::thread::Builder::new()
            .name(format!("llamactor-seq-{slot}"))
            .stack_size(STACK_BYTES)
            .spawn(move || actor.run())
            .map_err(|source| Error::Io { context: "cannot start a sequence's thread".into(), source })?;
        Ok(cell.get_or_init(|| inbox).clone())
    }

    /// Remembers a prediction that was parked.
    pub(super) fn remember_parked(&self, sink: &Arc<dyn Sink>) {
        let mut parked = self.parked.lock().unwrap_or_else(PoisonError::into_inner);
        parked.retain(|sink| sink.strong_count() > 0);
        parked.push(Arc::downgrade(sink));
    }

    /// Begins to close the context: see [`Shared::close`]. The actors end with their inboxes.
    pub fn close(&self) {
        self.shared.close();
        let parked = std::mem::take(&mut *self.parked.lock().unwrap_or_else(PoisonError::into_inner));
        for sink in parked.iter().filter_map(Weak::upgrade) {
            sink.close();
        }
        for inbox in self.inboxes.iter().filter_map(OnceLock::get) {
            let _ = inbox.send(Envelope::new(Command::End));
        }
    }
}

impl Drop for Sequences {
    fn drop(&mut self) {
        self.close();
    }
}

fn lease(sequences: &Weak<Sequences>, slot: Slot, chat: Chat) -> Result<Lease> {
    let sequences = sequences.upgrade().ok_or_else(|| closed("context"))?;
    let inbox = match sequences.inbox(slot) {
        Ok(inbox) => inbox,
        Err(error) => {
            sequences.shared.pool.give_back(slot);
            return Err(error);
        }
    };
    let before = sequences.shared.usage(slot).snapshot();
    let hold = Hold::new(slot, chat, &sequences.shared);
    Ok(Lease { slot, before, inbox, hold, running: Arc::default(), sequences })
}

/// Who works with a sequence.
#[derive(Clone, Copy, Debug)]
pub(super) struct Owner {
    pub holder: Holder,
    pub chat: Chat,
}

/// The hold on a sequence: it ends when the holder has closed it and nothing asked of it is left to do.
pub(super) struct Hold {
    slot: Slot,
    owner: Owner,
    shared: Arc<Shared>,
    state: Mutex<HoldState>,
}

#[derive(Default)]
struct HoldState {
    closed: bool,
    n_commands: usize,
}

impl Hold {
    fn new(slot: Slot, chat: Chat, shared: &Arc<Shared>) -> Arc<Self> {
        let owner = Owner { holder: shared.hold(slot), chat };
        Arc::new(Self { slot, owner, shared: Arc::clone(shared), state: Mutex::default() })
    }

    pub fn owner(&self) -> Owner {
        self.owner
    }

    pub fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// A command begins its way; `None` after closing.
    fn ticket(self: &Arc<Self>) -> Option<Ticket> {
        let mut state = self.lock();
        if state.closed {
            return None;
        }
        state.n_commands += 1;
        Some(Ticket(Arc::clone(self)))
    }

    /// False if it was closed before.
    fn close(&self) -> bool {
        let mut state = self.lock();
        let first = !std::mem::replace(&mut state.closed, true);
        let over = first && state.n_commands == 0;
        drop(state);
        if over {
            self.shared.pool.give_back(self.slot);
        }
        first
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HoldState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps the hold while a command is on its way or carried out.
pub(super) struct Ticket(Arc<Hold>);

impl std::ops::Deref for Ticket {
    type Target = Arc<Hold>;

    fn deref(&self) -> &Arc<Hold> {
        &self.0
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.n_commands -= 1;
        let over = state.closed && state.n_commands == 0;
        drop(state);
        if over {
            self.0.shared.pool.give_back(self.0.slot);
        }
    }
}

/// A held sequence. Dropping it gives the sequence back; its cached tokens stay until the room is needed.
pub struct Lease {
    slot: Slot,
    inbox: Sender<Envelope>,
    hold: Arc<Hold>,
    /// Set by `close` to end what runs.
    running: Arc<Mutex<Vec<Weak<dyn Sink>>>>,
    /// What had gone through the sequence before.
    before: [u64; 3],
    sequences: Arc<Sequences>,
}

impl Lease {
    /// Index of the sequence in its context.
    #[must_use]
    pub fn slot(&self) -> Slot {
        self.slot
    }

    /// The context.
    #[must_use]
    pub fn shared(&self) -> &Arc<Shared> {
        self.sequences.shared()
    }

    /// Whether it was closed, or its context was.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.hold.is_closed() || self.shared().is_closing()
    }

    /// Prompt, cached and predicted tokens of this holder.
    #[must_use]
    pub fn usage(&self) -> [u64; 3] {
        let now = self.shared().usage(self.slot).snapshot();
        std::array::from_fn(|index| now[index] - self.before[index])
    }

    fn require_open(&self) -> Result<()> {
        if self.is_closed() { Err(closed("sequence")) } else { Ok(()) }
    }

    fn send(&self, command: Command) {
        self.send_with(command, false);
    }

    /// Sends a last command, which is carried out although nobody holds the sequence any more; then it goes back.
    pub(super) fn send_last(self, command: Command) {
        self.send_with(command, true);
    }

    fn send_with(&self, command: Command, last: bool) {
        match self.hold.ticket() {
            Some(ticket) => {
                drop(self.inbox.send(Envelope::new(Command::Leased { ticket, last, command: Box::new(command) })))
            }
            None => command.refuse(closed("sequence")),
        }
    }

    pub(super) fn holder(&self) -> Holder {
        self.hold.owner().holder
    }

    /// Continues the prompt, after what was asked of the sequence before. The result can leave that queue.
    pub fn predict(&self, request: Request, sink: Arc<dyn Sink>) -> Arc<Queued> {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.retain(|sink| sink.strong_count() > 0);
        running.push(Arc::downgrade(&sink));
        drop(running);
        let deadline = request.deadline;
        let queued = Queued::new(Prediction { request, sink });
        if let Some(deadline) = deadline {
            self.shared().alarms.set(deadline, &(Arc::clone(&queued) as Arc<dyn Late>));
            self.shared().wake();
        }
        self.send(Command::Predict(Arc::clone(&queued)));
        queued
    }

    /// Evaluates a prompt; gives the number of tokens that were not cached.
    pub fn prefill(&self, prompt: Prompt, cancel: Arc<AtomicBool>, done: Done<usize>) {
        self.send(Command::Prefill { prompt, cancel, done });
    }

    /// Log-probabilities of `tokens` after what the sequence holds.
    pub fn score(&self, tokens: Vec<Token>, cancel: Arc<AtomicBool>, done: Done<Vec<f32>>) {
        self.send(Command::Score { tokens, cancel, done });
    }

    /// Another sequence that holds the same tokens. With `wait`, as soon as one is free; the result names the waiter.
    pub fn fork(&self, wait: bool, done: Done<Lease>) -> Option<WaiterId> {
        if let Err(error) = self.require_open() {
            done(Err(error));
            return None;
        }
        let (inbox, hold) = (self.inbox.clone(), Arc::clone(&self.hold));
        let copy = move |lease: Result<Lease>| match (lease, hold.ticket()) {
            (Ok(lease), Some(ticket)) => {
                let command = Box::new(Command::Fork { lease, done });
                drop(inbox.send(Envelope::new(Command::Leased { ticket, last: false, command })));
            }
            (Ok(_), None) => done(Err(closed("sequence"))),
            (Err(error), _) => done(Err(error)),
        };
        if wait {
            return Some(self.sequences.acquire(0, Box::new(copy)));
        }
        match self.sequences.try_acquire() {
            Ok(Some(lease)) => copy(Ok(lease)),
            Ok(None) => copy(Err(Error::Busy(format!(
                "all {} sequences of the context are held; close one, pass a timeout, or open the context with more",
                self.shared().info.n_sequences
            )))),
            Err(error) => copy(Err(error)),
        }
        None
    }

    /// Removes ranges of tokens and closes the gaps.
    pub fn erase(&self, ranges: Vec<(usize, usize)>, cancel: Arc<AtomicBool>, done: Done<()>) {
        self.send(Command::Erase { ranges, cancel, done });
    }

    /// Forgets all tokens.
    pub fn clear(&self, done: Done<()>) {
        self.send(Command::Clear { done });
    }

    /// Writes tokens and state to a file, with a note beside them.
    pub fn save(&self, path: PathBuf, note: Vec<u8>, done: Done<()>) {
        self.send(Command::Save { path, note, done });
    }

    /// Reads tokens and state from a file.
    pub fn load(&self, path: PathBuf, done: Done<()>) {
        self.send(Command::Load { path, done });
    }

    /// Closes it at once: what runs or waits on it ends with `Closed`. Idempotent.
    pub fn close(&self) {
        if !self.hold.close() {
            return;
        }
        let running = std::mem::take(&mut *self.running.lock().unwrap_or_else(PoisonError::into_inner));
        for sink in running.iter().filter_map(Weak::upgrade) {
            sink.close();
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.close();
    }
}

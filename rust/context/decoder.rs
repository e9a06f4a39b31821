//! The thread that owns a `llama_context`: receive → settle → plan → decode → hand rows out.
//!
//! A job goes through these states; every transition is in this file.
//!
//! ```text
//! Waiting ──cells reserved──▶ Evaluating ──row handed to the sequence's thread──▶ Drawing
//!    ▲  ▲                       │  ▲                                                │
//!    │  └────── preempted ──────┘  └─────────────── Drawn(Next) ────────────────────┤
//!    └──────────── reader caught up ── Paused ◀──────────── Drawn(Pause) ───────────┘
//! ```
//!
//! Cheap generators are advanced here, so that their job stays in *Evaluating*.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use super::Shared;
use super::batch::{Limits, Phase, Planner, Take, Work};
use super::cache::{Cells, Reuse, Slot, merged_ranges, plan_reuse};
use super::cost::CostModel;
use super::job::{End, Generator, Goal, Holder, Job, MemoryOp, MemoryReply, Message, Overflow, Reply, Step};
use super::memory::Capabilities;
use crate::error::{Error, Result, closed};
use crate::llama::{Batch, CancelFlags, Context, ContextParams, Decoded, Token};

/// Deep graphs and regular expressions inside llama.cpp recurse.
pub const STACK_BYTES: usize = 16 * 1024 * 1024;

/// Prompt tokens beside running generations: bounds what a long prompt adds to their next token.
const PREFILL_BESIDE_DECODE: u32 = 128;

/// A straggler may hold the others up for this share of a step at most, and never longer than `MAX_GRACE`.
const GRACE_SHARE: f64 = 0.25;
const MAX_GRACE: Duration = Duration::from_millis(2);

/// A paused job gives its sequence up after this time, when others wait for one.
const PARK_AFTER: Duration = Duration::from_millis(100);

/// Saved states per sequence, where the memory cannot be rolled back.
const CHECKPOINTS: usize = 2;

/// Share of the context that goes when it is full, as one over this.
const SHIFT_PARTS: usize = 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Waiting,
    Evaluating,
    /// Since this step (see `Decoder::n_steps`).
    Drawing(u64),
    Paused(Instant),
}

/// A decode of single tokens, whose cost is known when the next one begins: drawing and handing out count too.
struct Decoding {
    started: Instant,
    previous_width: usize,
    width: usize,
}

/// A job with what has become of it.
struct Running {
    job: Job,
    state: State,
    /// Tokens that were in the prompt.
    n_prompt: usize,
    /// Tokens of the prompt found in the cache.
    n_cached: usize,
    /// When it came: the newest is preempted first.
    order: u64,
    /// Whether it had cells before.
    was_admitted: bool,
    scores: Vec<f32>,
}

impl Running {
    /// Whether it takes cells of the shared cache while others wait for some.
    fn is_growing(&self) -> bool {
        matches!(self.state, State::Evaluating | State::Drawing(_)) && !self.job.alone
    }
}

/// A state that cannot be rolled back, as it was at `length` tokens.
struct Checkpoint {
    length: usize,
    bytes: Vec<u8>,
}

struct Sequence {
    running: Option<Running>,
    /// Whose tokens the cells hold.
    holder: Holder,
    /// What the sequence stands for although its cells had to go: evaluated again before it is worked with.
    lost: Vec<Token>,
    last_used: u64,
    checkpoints: Vec<Checkpoint>,
}

/// A context of one sequence for jobs that must repeat bit for bit: attention adds in the order of the cells, and
/// in the shared cache their places depend on everybody. Made for the first such job.
struct Private {
    context: Context,
    /// Whose job it works on.
    slot: Option<Slot>,
    n_evaluated: usize,
}

pub struct Decoder {
    shared: Arc<Shared>,
    context: Context,
    private: Option<Private>,
    params: ContextParams,
    messages: Receiver<Message>,
    can: Capabilities,
    cells: Cells,
    sequences: Vec<Sequence>,
    planner: Planner,
    cost: CostModel,
    batch: Batch,
    cancel: CancelFlags,
    work: Vec<Work>,
    takes: Vec<Take>,
    /// Index in the batch of the token whose row goes to each take's job.
    rows: Vec<Option<usize>>,
    spare_rows: Vec<Vec<f32>>,
    previous_width: usize,
    /// The last step, if it only decoded and the next one follows without waiting.
    step: Option<Decoding>,
    mean_step: f64,
    /// When the last decode call returned.
    last_step: Instant,
    /// Decode calls so far.
    n_steps: u64,
    /// Whether waiting jobs found no room, so that trying again needs a change first.
    blocked: bool,
    /// Whether more than the last step's sequences have changed their tokens.
    changed: bool,
    clock: u64,
}

impl Decoder {
    pub fn new(shared: Arc<Shared>, context: Context, params: ContextParams, messages: Receiver<Message>) -> Self {
        let info = &shared.info;
        let n = info.n_sequences;
        let unified = info.n_cells == info.context_size;
        let has_window = context.model().n_swa() > 0;
        let can = Capabilities::of(info.memory, unified || n == 1, context.can_shift(), has_window);
        Self {
            can,
            cells: Cells::new(n, info.n_cells, info.context_size),
            sequences: (0..n)
                .map(|_| Sequence { running: None, holder: 0, lost: Vec::new(), last_used: 0, checkpoints: Vec::new() })
                .collect(),
            planner: Planner::new(n),
            cost: CostModel::new(n.min(context.n_batch()).min(context.n_outputs_max())),
            batch: Batch::new(context.n_batch()),
            cancel: CancelFlags::new(Arc::clone(&shared.closing)),
            work: Vec::with_capacity(n),
            takes: Vec::with_capacity(n),
            rows: Vec::with_capacity(n),
            spare_rows: Vec::new(),
            previous_width: 0,
            step: None,
            mean_step: 0.0,
            last_step: Instant::now(),
            n_steps: 0,
            blocked: false,
            changed: true,
            clock: 0,
            shared,
            context,
            private: None,
            params,
            messages,
        }
    }

    /// Works until it is told to close. A panic ends its jobs with an error instead of leaving them waiting.
    pub fn run(mut self) {
        let outcome = catch_unwind(AssertUnwindSafe(|| while self.turn() {}));
        self.shared.closing.store(true, Ordering::Release);
        self.shared.pool.close();
        let crashed = outcome.is_err();
        self.end_all(|| match crashed {
            true => Error::WorkerCrashed("the decoder died; the context must be opened again".into()),
            false => closed("context"),
        });
    }

    /// One turn of the loop; false when the context is to be closed.
    fn turn(&mut self) -> bool {
        if !self.receive() {
            return false;
        }
        self.settle();
        self.admit();
        self.list_work();
        let limits = self.limits();
        self.planner.plan(&self.work, &limits, &mut self.takes);
        if !self.takes.is_empty() {
            self.decode();
        } else if !self.work.is_empty() {
            self.make_room();
        }
        self.publish();
        true
    }

    // ---- receive ------------------------------------------------------------------------------------------------

    /// Takes what has come; waits where there is nothing to evaluate. False when told to close.
    fn receive(&mut self) -> bool {
        loop {
            let message = match self.patience() {
                Patience::None => match self.messages.try_recv() {
                    Ok(message) => message,
                    Err(_) => return true,
                },
                Patience::Until(instant) => {
                    let wait = instant.saturating_duration_since(Instant::now());
                    match self.messages.recv_timeout(wait) {
                        Ok(message) => message,
                        Err(RecvTimeoutError::Timeout) => return true,
                        Err(RecvTimeoutError::Disconnected) => return false,
                    }
                }
                Patience::Forever => match self.messages.recv() {
                    Ok(message) => message,
                    Err(_) => return false,
                },
            };
            if !self.handle(message) {
                return false;
            }
        }
    }

    /// How long to wait for the next message.
    fn patience(&mut self) -> Patience {
        let ready = self.any(|running| self.is_ready(running));
        // A straggler that has missed a step is not waited for again.
        let drawing = self.any(|running| running.state == State::Drawing(self.n_steps));
        match (ready, drawing) {
            (true, false) => Patience::None,
            // Rows were handed out: a step begins when all have answered, or without the stragglers.
            (true, true) => Patience::Until(self.grace_ends()),
            (false, _) => {
                self.step = None;
                self.next_alarm().map_or(Patience::Forever, Patience::Until)
            }
        }
    }

    fn grace_ends(&self) -> Instant {
        let grace = Duration::from_secs_f64(self.mean_step * GRACE_SHARE).min(MAX_GRACE);
        self.last_step + grace
    }

    fn is_ready(&self, running: &Running) -> bool {
        match running.state {
            State::Evaluating => true,
            State::Waiting => !self.blocked || is_cancelled(&running.job),
            State::Paused(_) => !running.job.flow.is_paused() || is_cancelled(&running.job),
            State::Drawing(_) => is_cancelled(&running.job),
        }
    }

    /// The next moment at which something is to be done without a message.
    fn next_alarm(&self) -> Option<Instant> {
        let others_wait = self.shared.pool.n_waiting() > 0;
        let jobs = self.sequences.iter().filter_map(|sequence| sequence.running.as_ref());
        let alarms = jobs.flat_map(|running| {
            let park = match running.state {
                State::Paused(since) if others_wait && running.job.parkable => Some(since + PARK_AFTER),
                _ => None,
            };
            [running.job.deadline, park].into_iter().flatten()
        });
        alarms.chain(self.shared.pool.next_deadline()).chain(self.shared.alarms.next()).min()
    }

    fn any(&self, test: impl Fn(&Running) -> bool) -> bool {
        self.sequences.iter().any(|sequence| sequence.running.as_ref().is_some_and(&test))
    }

    fn handle(&mut self, message: Message) -> bool {
        self.blocked = false;
        match message {
            Message::Begin(job) => self.begin(*job),
            Message::Drawn { slot, step, row } => {
                self.spare_rows.push(row);
                self.drawn(slot, step);
            }
            Message::Memory { slot, holder, op, reply } => self.change_memory(slot, holder, op, &reply),
            Message::Wake => {}
            Message::Close => return false,
        }
        true
    }

    // ---- jobs begin, wait, end ----------------------------------------------------------------------------------

    fn begin(&mut self, job: Job) {
        self.clock += 1;
        let running = Running {
            state: State::Waiting,
            n_prompt: job.tokens.len(),
            n_cached: 0,
            order: self.clock,
            was_admitted: false,
            scores: Vec::new(),
            job,
        };
        let slot = running.job.slot;
        self.planner.forget(slot);
        self.sequences[slot as usize].running = Some(running);
    }

    fn running(&mut self, slot: Slot) -> Option<&mut Running> {
        self.sequences[slot as usize].running.as_mut()
    }

    /// Ends jobs that were cancelled or are late, wakes paused ones, parks those that block others.
    fn settle(&mut self) {
        let others_wait = self.shared.pool.n_waiting() > 0 || self.shared.alarms.next().is_some();
        let needs_clock = others_wait || self.any(|running| running.job.deadline.is_some());
        let now = needs_clock.then(Instant::now);
        if let Some(now) = now {
            self.shared.pool.expire(now);
            self.shared.alarms.ring(now);
        }
        for slot in 0..self.sequences.len() as Slot {
            if let Some(end) = self.verdict(slot, now) {
                self.end(slot, end);
            }
        }
    }

    fn verdict(&mut self, slot: Slot, now: Option<Instant>) -> Option<End> {
        let others_wait = self.shared.pool.n_waiting() > 0;
        let running = self.running(slot)?;
        if is_cancelled(&running.job) {
            return Some(running.job.flow.cancel_error().map_or(End::Cancelled, End::Failed));
        }
        if running.job.deadline.is_some_and(|deadline| now.is_some_and(|now| deadline <= now)) {
            return Some(End::Failed(Error::DeadlineExceeded("the deadline passed; the text so far is kept".into())));
        }
        let State::Paused(since) = running.state else { return None };
        if !running.job.flow.is_paused() {
            // Its cells may have gone to others meanwhile.
            running.state = State::Waiting;
        } else if others_wait && running.job.parkable && now.is_some_and(|now| now >= since + PARK_AFTER) {
            return Some(End::Parked);
        }
        None
    }

    /// Takes the job off its sequence and tells the sequence's thread. What was evaluated stays in the cache.
    fn end(&mut self, slot: Slot, end: End) {
        let Some(running) = self.sequences[slot as usize].running.take() else { return };
        self.leave_private(slot, &running);
        self.clock += 1;
        self.blocked = false;
        self.sequences[slot as usize].last_used = self.clock;
        self.changed = true;
        self.publish();
        let generator = match running.job.goal {
            Goal::Generate(generator) => generator,
            Goal::Evaluate | Goal::Score(_) => None,
        };
        let reply = Reply::Ended { generator, end, scores: running.scores, tokens: running.job.tokens };
        let _ = running.job.replies.send(reply);
    }

    fn end_all(&mut self, error: impl Fn() -> Error) {
        for slot in 0..self.sequences.len() as Slot {
            self.end(slot, End::Failed(error()));
        }
    }

    /// Lets waiting jobs begin, the highest priority first, as far as their prompts have room.
    fn admit(&mut self) {
        while let Some(slot) = self.next_waiting() {
            if !self.try_admit(slot) {
                self.blocked = true;
                break;
            }
        }
    }

    fn next_waiting(&self) -> Option<Slot> {
        let private_is_free = self.private.as_ref().is_none_or(|private| private.slot.is_none());
        self.slots(|running| running.state == State::Waiting && (private_is_free || !running.job.alone))
            .min_by_key(|&(_, running)| (std::cmp::Reverse(running.job.priority), running.order))
            .map(|(slot, _)| slot)
    }

    fn slots(&self, test: impl Fn(&Running) -> bool) -> impl Iterator<Item = (Slot, &Running)> {
        self.sequences.iter().enumerate().filter_map(move |(index, sequence)| {
            sequence.running.as_ref().filter(|running| test(running)).map(|running| (index as Slot, running))
        })
    }

    /// Reserves cells for a job's prompt and prepares its cache. False when it must wait for others to end.
    fn try_admit(&mut self, slot: Slot) -> bool {
        let Some(running) = self.sequences[slot as usize].running.as_ref() else { return true };
        let (n_tokens, alone) = (running.job.tokens.len(), running.job.alone);
        let limit = self.cells.per_slot();
        if n_tokens > limit {
            self.end(slot, End::Failed(overflow(n_tokens, limit)));
            return true;
        }
        if alone {
            if let Err(error) = self.enter_private(slot) {
                self.end(slot, End::Failed(error));
            }
            return true;
        }
        let others = self.slots(Running::is_growing).count();
        loop {
            let reuse = self.plan_reuse(slot);
            if self.has_room(slot, reuse) || (others == 0 && self.evictable(slot).next().is_none()) {
                self.apply_reuse(slot, reuse);
                self.admit_now(slot);
                return true;
            }
            // What is evicted may be what would have been shared: plan again.
            if !self.could_have_room(slot) || !self.evict_one(slot) {
                return false;
            }
        }
    }

    /// Whether the tokens that `reuse` leaves to evaluate fit, beside what others have reserved.
    fn has_room(&self, slot: Slot, reuse: Reuse) -> bool {
        let Some(running) = self.sequences[slot as usize].running.as_ref() else { return true };
        let missing = running.job.tokens.len() - reuse.n_cached();
        // Its own cells beyond what it keeps become free.
        let kept = match reuse {
            Reuse::Own(n) | Reuse::Checkpoint(n) => n,
            Reuse::Share { .. } => 0,
        };
        let returned = self.cells.n_private_from(slot, kept);
        self.cells.n_free() + returned >= missing + self.reserved_by_others(slot) + self.headroom(slot)
    }

    /// Whether clearing everything that can be cleared would make room.
    fn could_have_room(&self, slot: Slot) -> bool {
        let Some(running) = self.sequences[slot as usize].running.as_ref() else { return true };
        let held: usize = self.evictable(slot).map(|other| self.cells.len(other)).sum();
        let most = self.cells.n_free() + held + self.cells.len(slot);
        let others = self.slots(Running::is_growing).count();
        others == 0 || most >= running.job.tokens.len() + self.reserved_by_others(slot) + self.headroom(slot)
    }

    /// Prepares the private context for a job.
    fn enter_private(&mut self, slot: Slot) -> Result<()> {
        let limit = self.cells.per_slot();
        if self.private.is_none() {
            let params = ContextParams { n_seq_max: 1, n_ctx: limit as u32, ..self.params.clone() };
            let context = Context::new(Arc::clone(self.context.model()), &params)?;
            self.private = Some(Private { context, slot: None, n_evaluated: 0 });
        }
        if let Some(private) = &mut self.private {
            private.context.remove_from(0, 0);
            private.slot = Some(slot);
            private.n_evaluated = 0;
        }
        self.take_over(slot);
        self.truncate(slot, 0);
        self.admit_now(slot);
        Ok(())
    }

    /// The sequence goes on to stand for what its private job evaluated, which has no cells in the shared cache.
    fn leave_private(&mut self, slot: Slot, running: &Running) {
        if let Some(private) = self.private.as_mut().filter(|private| private.slot == Some(slot)) {
            private.slot = None;
            self.sequences[slot as usize].lost = running.job.tokens[..private.n_evaluated].to_vec();
            self.shared.stand_for(slot, running.job.holder, &running.job.tokens[..private.n_evaluated]);
        }
    }

    /// Tokens of the job that are evaluated, wherever it runs.
    fn n_evaluated(&self, slot: Slot) -> usize {
        match &self.private {
            Some(private) if private.slot == Some(slot) => private.n_evaluated,
            _ => self.cells.len(slot),
        }
    }

    fn is_private(&self, slot: Slot) -> bool {
        self.private.as_ref().is_some_and(|private| private.slot == Some(slot))
    }

    fn admit_now(&mut self, slot: Slot) {
        let n_cached = self.cells.len(slot);
        let Some(running) = self.running(slot) else { return };
        running.state = State::Evaluating;
        let complete = n_cached == running.job.tokens.len();
        let first = !std::mem::replace(&mut running.was_admitted, true);
        if first {
            running.n_cached = n_cached.min(running.n_prompt);
            running.job.flow.admitted(running.n_cached, running.n_prompt);
            self.shared.stats.cached_tokens(n_cached as u64);
            self.shared.usage(slot).cached.fetch_add(n_cached as u64, Ordering::Relaxed);
        }
        if complete && matches!(self.goal(slot), Some(Goal::Evaluate)) {
            self.end(slot, End::Done);
        }
    }

    /// Cells beyond its tokens that a job waits for: one for each that grows beside it, and enough to get somewhere
    /// before it would be preempted again.
    fn headroom(&self, slot: Slot) -> usize {
        let growing = self.slots(Running::is_growing).count();
        let again = self.sequences[slot as usize].running.as_ref().is_some_and(|running| running.was_admitted);
        if again && growing > 0 { self.cells.capacity() / SHIFT_PARTS } else { growing }
    }

    /// Clears idle sequences, then paused ones, if that can make `needed` cells free.
    fn free_cells(&mut self, slot: Slot, needed: usize) {
        let held: usize = self.evictable(slot).map(|other| self.cells.len(other)).sum();
        if self.cells.n_free() + held < needed {
            return;
        }
        while self.cells.n_free() < needed && self.evict_one(slot) {}
    }

    /// Cells that admitted prompts have yet to fill.
    fn reserved_by_others(&self, slot: Slot) -> usize {
        self.slots(Running::is_growing)
            .filter(|&(other, _)| other != slot)
            .map(|(other, running)| running.job.tokens.len().saturating_sub(self.cells.len(other)))
            .sum()
    }

    // ---- the cache ----------------------------------------------------------------------------------------------

    /// The longest usable prefix of the job's tokens, wherever it is.
    fn plan_reuse(&self, slot: Slot) -> Reuse {
        let sequence = &self.sequences[slot as usize];
        let Some(running) = sequence.running.as_ref() else { return Reuse::Own(0) };
        let wanted = &running.job.tokens;
        let limit = match running.job.goal {
            _ if running.job.alone => 0,
            Goal::Evaluate => wanted.len(),
            // Its row is wanted, so the last token must be evaluated.
            Goal::Generate(_) => wanted.len() - 1,
            Goal::Score(from) => from.saturating_sub(1),
        };
        let lengths: Vec<usize> = sequence.checkpoints.iter().map(|checkpoint| checkpoint.length).collect();
        let same_holder = sequence.holder == running.job.holder;
        plan_reuse(&self.cells, slot, &wanted[..limit.min(wanted.len())], same_holder, self.can, &lengths)
    }

    /// Makes that prefix the content of the job's sequence.
    fn apply_reuse(&mut self, slot: Slot, reuse: Reuse) {
        self.take_over(slot);
        match reuse {
            Reuse::Own(n) => self.truncate(slot, n),
            Reuse::Share { from, n } => self.share(from, slot, n),
            Reuse::Checkpoint(length) => self.roll_back(slot, length),
        }
    }

    /// The cells are the job's from now on.
    fn take_over(&mut self, slot: Slot) {
        let sequence = &mut self.sequences[slot as usize];
        if let Some(running) = &sequence.running {
            sequence.holder = running.job.holder;
            sequence.lost.clear();
        }
    }

    /// Keeps the first `n` tokens, or none where the memory cannot remove a tail.
    fn truncate(&mut self, slot: Slot, n: usize) {
        if n >= self.cells.len(slot) {
            return;
        }
        self.changed = true;
        let kept = if self.can.remove_tail || n == 0 { n } else { 0 };
        let removed = self.context.remove_from(slot, kept);
        let kept = if removed { kept } else { 0 };
        if !removed {
            self.context.remove_from(slot, 0);
        }
        self.cells.truncate(slot, kept);
        self.sequences[slot as usize].checkpoints.retain(|checkpoint| checkpoint.length <= kept);
    }

    fn share(&mut self, from: Slot, to: Slot, n: usize) {
        self.truncate(to, 0);
        self.changed = true;
        self.context.copy(from, to, Some(n));
        self.cells.share(from, to, n);
        self.shared.stats.copied_tokens(n as u64);
    }

    /// Goes back to a saved state; to nothing when llama.cpp refuses it.
    fn roll_back(&mut self, slot: Slot, length: usize) {
        let sequence = &mut self.sequences[slot as usize];
        sequence.checkpoints.retain(|checkpoint| checkpoint.length <= length);
        let Some(checkpoint) = sequence.checkpoints.iter().find(|checkpoint| checkpoint.length == length) else {
            return self.truncate(slot, 0);
        };
        let restored = self.context.restore_sequence(slot, &checkpoint.bytes, true)
            && self.context.remove_from(slot, length)
            && self.context.last_position(slot) == length as i32 - 1;
        if restored {
            self.cells.truncate(slot, length);
        } else {
            self.truncate(slot, 0);
        }
    }

    /// Saves the state after a prompt, where it could not be reached again otherwise.
    fn checkpoint(&mut self, slot: Slot) {
        if !self.can.checkpoints {
            return;
        }
        let length = self.cells.len(slot);
        let Ok(bytes) = self.context.sequence_state(slot, true) else { return };
        let checkpoints = &mut self.sequences[slot as usize].checkpoints;
        checkpoints.retain(|checkpoint| checkpoint.length != length);
        if checkpoints.len() == CHECKPOINTS {
            checkpoints.remove(0);
        }
        checkpoints.push(Checkpoint { length, bytes });
    }

    /// Sequences that can be cleared: idle ones, and those whose job is paused or waits, which are evaluated again.
    fn evictable(&self, except: Slot) -> impl Iterator<Item = Slot> {
        (0..self.sequences.len() as Slot).filter(move |&slot| {
            let running = self.sequences[slot as usize].running.as_ref();
            let resting = running.is_none_or(|running| matches!(running.state, State::Paused(_) | State::Waiting));
            slot != except && resting && !self.cells.is_empty(slot)
        })
    }

    /// Clears the sequence that was used longest ago, idle ones first. False when there is none.
    fn evict_one(&mut self, except: Slot) -> bool {
        let oldest = self.evictable(except).min_by_key(|&slot| {
            let sequence = &self.sequences[slot as usize];
            (sequence.running.is_some(), !self.shared.pool.is_free(slot), sequence.last_used)
        });
        let Some(slot) = oldest else { return false };
        self.lose(slot);
        match self.running(slot) {
            Some(_) => self.shared.stats.preemptions(1),
            None => self.shared.stats.evictions(1),
        }
        true
    }

    /// Takes a sequence's cells; it goes on to stand for their tokens.
    fn lose(&mut self, slot: Slot) {
        self.sequences[slot as usize].lost = self.cells.tokens(slot).to_vec();
        self.truncate(slot, 0);
    }

    /// No token of any job has a cell: evict an idle prefix, else let the newest of the lowest priority wait.
    fn make_room(&mut self) {
        if self.evict_one(Slot::MAX) {
            return;
        }
        let evaluating = || self.slots(|running| running.state == State::Evaluating && !running.job.alone);
        let newest = evaluating().min_by_key(|&(_, running)| (running.job.priority, std::cmp::Reverse(running.order)));
        let Some((slot, _)) = newest else { return };
        if evaluating().count() > 1 || self.any(|running| matches!(running.state, State::Drawing(_))) {
            self.preempt(slot);
        } else {
            self.end(slot, End::ContextFull);
        }
    }

    /// Takes a job's cells; it is evaluated again when there is room, and its output goes on unbroken.
    fn preempt(&mut self, slot: Slot) {
        self.lose(slot);
        if let Some(running) = self.running(slot) {
            running.state = State::Waiting;
            running.scores.clear();
        }
        self.shared.stats.preemptions(1);
    }

    // ---- one step -----------------------------------------------------------------------------------------------

    fn goal(&self, slot: Slot) -> Option<&Goal> {
        self.sequences[slot as usize].running.as_ref().map(|running| &running.job.goal)
    }

    /// What waits to be evaluated. Jobs that have filled their context shift or end here.
    fn list_work(&mut self) {
        self.work.clear();
        for slot in 0..self.sequences.len() as Slot {
            if self.is_full(slot) {
                self.full(slot);
            }
            let Some(running) = self.sequences[slot as usize].running.as_ref() else { continue };
            if running.state != State::Evaluating {
                continue;
            }
            let missing = running.job.tokens.len() - self.n_evaluated(slot);
            let prefilling = missing > 1 || running.job.tokens.len() == running.n_prompt;
            // The state before the last token is saved: the same prompt can begin there again.
            let splits = self.can.checkpoints && missing > 1 && !running.job.alone;
            let n_tokens = if splits { missing - 1 } else { missing };
            self.work.push(Work {
                slot,
                phase: if prefilling { Phase::Prefill } else { Phase::Decode },
                n_tokens: n_tokens as u32,
                priority: running.job.priority,
                alone: running.job.alone,
                n_outputs_max: matches!(running.job.goal, Goal::Score(_))
                    .then_some(self.context.n_outputs_max() as u32),
            });
        }
    }

    fn is_full(&self, slot: Slot) -> bool {
        let Some(running) = self.sequences[slot as usize].running.as_ref() else { return false };
        running.state == State::Evaluating
            && running.job.tokens.len() > self.cells.per_slot()
            && self.n_evaluated(slot) == self.cells.per_slot()
    }

    /// The sequence holds as much as it may and wants one token more.
    fn full(&mut self, slot: Slot) {
        let limit = self.cells.per_slot();
        let Some(running) = self.running(slot) else { return };
        let n_keep = match running.job.overflow {
            Overflow::Stop => return self.end(slot, End::ContextFull),
            Overflow::RollingWindow => usize::from(limit > 1),
            Overflow::TruncateMiddle => limit / SHIFT_PARTS,
        };
        let n_discard = (limit / SHIFT_PARTS).max(1).min(limit - n_keep);
        running.job.tokens.drain(n_keep..n_keep + n_discard);
        running.n_prompt = 0;
        running.job.flow.shifted(n_keep, n_discard);
        self.shared.stats.shifted_tokens(n_discard as u64);
        self.close_gap(slot, n_keep, n_discard);
    }

    /// Removes cells in the middle; later ones move down where that is possible and touches nobody else, else they
    /// are evaluated again.
    fn close_gap(&mut self, slot: Slot, start: usize, n: usize) {
        let end = start + n;
        self.blocked = false;
        if let Some(private) = self.private.as_mut().filter(|private| private.slot == Some(slot)) {
            return private.close_gap(start, n, self.can.shift);
        }
        let movable = self.can.shift && !self.cells.is_shared_from(slot, end);
        if movable && self.context.remove(slot, start, Some(end)) {
            self.context.move_down(slot, end, n);
            self.cells.remove(slot, start..end);
            self.changed = true;
        } else {
            self.truncate(slot, start);
        }
    }

    fn limits(&mut self) -> Limits {
        // Beside a prompt chunk another token costs next to nothing: the width is asked for only without one.
        let only_decoding = self.work.iter().all(|work| work.phase == Phase::Decode && !work.alone);
        let ready = if only_decoding { self.work.len() } else { 0 };
        Limits {
            // One micro-batch at a time: a cancel waits for no more, whoever else is in it.
            batch: self.context.n_batch().min(self.shared.info.ubatch_size) as u32,
            ubatch: self.shared.info.ubatch_size as u32,
            prefill_beside_decode: PREFILL_BESIDE_DECODE.min(self.shared.info.ubatch_size as u32),
            outputs: self.context.n_outputs_max() as u32,
            width: if ready > 0 { self.cost.width(ready) as u32 } else { 1 },
            cells: self.cells.n_free() as u32,
        }
    }

    fn decode(&mut self) {
        self.fill_batch();
        let started = Instant::now();
        self.learn(started);
        let private = self.private.as_mut().filter(|private| private.slot == self.takes.first().map(|take| take.slot));
        let context = private.map_or(&mut self.context, |private| &mut private.context);
        let outcome = context.decode(&mut self.batch, &self.cancel);
        let elapsed = started.elapsed();
        self.last_step = started + elapsed;
        self.shared.stats.decode_nanoseconds(elapsed.as_nanos() as u64);
        match outcome {
            Ok(Decoded::Done) => {
                self.note_width(started, elapsed);
                self.advance();
            }
            Ok(Decoded::NoRoom) => self.no_room(),
            Ok(Decoded::Aborted) => self.resynchronise(),
            Err(error) => self.decode_failed(&error),
        }
    }

    fn fill_batch(&mut self) {
        self.batch.clear();
        self.cancel.clear();
        self.rows.clear();
        for take in &self.takes {
            let Some(running) = self.sequences[take.slot as usize].running.as_ref() else { continue };
            self.cancel.push(Arc::clone(running.job.flow.cancel_flag()));
            let start = self.n_evaluated(take.slot);
            let end = start + take.n_tokens as usize;
            let sequence = if self.is_private(take.slot) { 0 } else { take.slot };
            let wants_row = end == running.job.tokens.len() && matches!(running.job.goal, Goal::Generate(_));
            let scores_from = match running.job.goal {
                Goal::Score(from) => from.saturating_sub(1),
                _ => usize::MAX,
            };
            let mut last = None;
            for position in start..end {
                let output = (wants_row && position + 1 == end) || position >= scores_from;
                last = self.batch.push(running.job.tokens[position], position, sequence, output);
            }
            self.rows.push(last);
        }
    }

    /// Remembers what the last step cost, from its beginning to that of this one.
    fn learn(&mut self, now: Instant) {
        if let Some(Decoding { started, previous_width, width }) = self.step.take() {
            self.cost.record(previous_width, width, (now - started).as_secs_f64());
        }
    }

    /// Notes a step that only decoded. Prompt chunks say nothing about widths.
    fn note_width(&mut self, started: Instant, elapsed: Duration) {
        let width = self.takes.len();
        let only_decoding = self.work.iter().all(|work| work.phase == Phase::Decode && !work.alone);
        if only_decoding && self.batch.len() == width {
            self.step = Some(Decoding { started, previous_width: self.previous_width, width });
            self.previous_width = width;
            self.mean_step += (elapsed.as_secs_f64() - self.mean_step) * 0.1;
        } else {
            self.previous_width = 0;
        }
    }

    /// The batch was evaluated: move the jobs on.
    fn advance(&mut self) {
        let n_tokens = self.batch.len();
        self.n_steps += 1;
        self.shared.stats.batches(1);
        self.shared.stats.micro_batches(n_tokens.div_ceil(self.shared.info.ubatch_size) as u64);
        self.shared.stats.evaluated_tokens(n_tokens as u64);
        let takes = std::mem::take(&mut self.takes);
        let rows = std::mem::take(&mut self.rows);
        let mut first = 0;
        for (take, row) in takes.iter().zip(&rows) {
            self.advance_one(take, *row, first);
            first += take.n_tokens as usize;
        }
        for take in &takes {
            self.publish_slot(take.slot);
            if let Some(running) = self.running(take.slot) {
                running.job.flow.flush();
            }
        }
        self.takes = takes;
        self.rows = rows;
    }

    fn advance_one(&mut self, take: &Take, row: Option<usize>, first: usize) {
        let slot = take.slot;
        let Some(running) = self.sequences[slot as usize].running.as_ref() else { return };
        let start = self.n_evaluated(slot);
        let end = start + take.n_tokens as usize;
        match self.private.as_mut().filter(|private| private.slot == Some(slot)) {
            Some(private) => private.n_evaluated = end,
            None => self.cells.append(slot, &running.job.tokens[start..end]),
        }
        let in_prompt = end <= running.n_prompt;
        if in_prompt {
            self.shared.stats.prompt_tokens(u64::from(take.n_tokens));
            self.shared.usage(slot).prompt.fetch_add(u64::from(take.n_tokens), Ordering::Relaxed);
            running.job.flow.progressed(end, running.n_cached, running.n_prompt);
        } else {
            self.shared.stats.decoded_tokens(u64::from(take.n_tokens));
        }
        let complete = end == running.job.tokens.len();
        match running.job.goal {
            Goal::Score(from) => self.score(slot, start, first, from, take.n_tokens as usize),
            Goal::Evaluate if complete => self.end(slot, End::Done),
            Goal::Generate(_) if complete => self.hand_out(slot, row),
            Goal::Evaluate | Goal::Generate(_) if end + 1 == running.job.tokens.len() && !running.job.alone => {
                self.checkpoint(slot);
            }
            Goal::Evaluate | Goal::Generate(_) => {}
        }
    }

    /// Gives a job the row of its last token.
    fn hand_out(&mut self, slot: Slot, row: Option<usize>) {
        let Some(index) = row else { return };
        let Some(running) = self.sequences[slot as usize].running.as_mut() else { return };
        let private = self.private.as_mut().filter(|private| private.slot == Some(slot));
        let context = private.map_or(&mut self.context, |private| &mut private.context);
        let logits = match context.logits(index) {
            Ok(logits) => logits,
            Err(error) => return self.end(slot, End::Failed(error)),
        };
        if let Goal::Generate(Some(generator)) = &mut running.job.goal {
            let step = advance_safely(generator.as_mut(), logits);
            return match step {
                Ok(step) => self.drawn(slot, step),
                Err(error) => self.end(slot, End::Failed(error)),
            };
        }
        running.state = State::Drawing(self.n_steps);
        let mut copy = self.spare_rows.pop().unwrap_or_default();
        copy.clear();
        copy.extend_from_slice(logits);
        if running.job.replies.send(Reply::Row(copy)).is_err() {
            self.end(slot, End::Cancelled);
        }
    }

    /// A generator has answered.
    fn drawn(&mut self, slot: Slot, step: Step) {
        let Some(running) = self.running(slot) else { return };
        match step {
            Step::Next(token) => {
                running.job.tokens.push(token);
                running.state = State::Evaluating;
            }
            Step::Pause(token) => {
                running.job.tokens.push(token);
                running.state = State::Paused(Instant::now());
                // Its cells can go to those who wait.
                self.blocked = false;
            }
            Step::Stop => self.end(slot, End::Done),
        }
    }

    /// Log-probabilities of the tokens that follow those just evaluated.
    fn score(&mut self, slot: Slot, start: usize, first: usize, from: usize, n: usize) {
        for position in start.max(from.saturating_sub(1))..start + n {
            let Some(running) = self.sequences[slot as usize].running.as_mut() else { return };
            let Some(&next) = running.job.tokens.get(position + 1) else { break };
            match self.context.logits(first + position - start) {
                Ok(logits) => running.scores.push(log_probability(logits, next)),
                Err(error) => return self.end(slot, End::Failed(error)),
            }
        }
        if self.running(slot).is_some_and(|running| running.job.tokens.len() == start + n) {
            self.end(slot, End::Done);
        }
    }

    // ---- what can go wrong with a decode --------------------------------------------------------------------------

    /// llama.cpp found no cells although the ledger says that there are some: fragmentation, or windows.
    fn no_room(&mut self) {
        if self.evict_one(Slot::MAX) {
            return;
        }
        let newest = self
            .takes
            .iter()
            .filter_map(|take| self.sequences[take.slot as usize].running.as_ref())
            .min_by_key(|running| (running.job.priority, std::cmp::Reverse(running.order)))
            .map(|running| running.job.slot);
        let Some(slot) = newest else { return };
        if self.takes.len() > 1 {
            self.preempt(slot);
        } else {
            self.end(slot, End::ContextFull);
        }
    }

    /// Micro-batches before an abort stay: find out what each sequence holds now.
    fn resynchronise(&mut self) {
        self.changed = true;
        self.blocked = false;
        for index in 0..self.takes.len() {
            let take = self.takes[index];
            self.resynchronise_one(take);
        }
    }

    fn resynchronise_one(&mut self, take: Take) {
        let slot = take.slot;
        if let Some(private) = self.private.as_mut().filter(|private| private.slot == Some(slot)) {
            return private.close_gap(0, private.n_evaluated, false);
        }
        let known = self.cells.len(slot);
        let present = usize::try_from(self.context.last_position(slot) + 1).unwrap_or(0);
        if present < known || !self.can.remove_tail {
            // Lost, or in a state that no longer matches: begin again from nothing.
            self.context.remove_from(slot, 0);
            self.cells.truncate(slot, 0);
            self.sequences[slot as usize].checkpoints.clear();
            return;
        }
        let Some(running) = self.sequences[slot as usize].running.as_ref() else { return };
        let end = present.min(known + take.n_tokens as usize);
        self.shared.stats.evaluated_tokens((end - known) as u64);
        self.shared.stats.prompt_tokens((end - known) as u64);
        self.cells.append(slot, &running.job.tokens[known..end]);
    }

    fn decode_failed(&mut self, error: &Error) {
        self.resynchronise();
        for index in 0..self.takes.len() {
            let slot = self.takes[index].slot;
            self.end(slot, End::Failed(Error::Decode(error.to_string())));
        }
    }

    // ---- memory operations ----------------------------------------------------------------------------------------

    fn change_memory(&mut self, slot: Slot, holder: Holder, op: MemoryOp, reply: &Sender<Result<MemoryReply>>) {
        let outcome = self.changed_memory(slot, holder, op);
        self.changed = true;
        self.publish();
        let _ = reply.send(outcome);
    }

    fn changed_memory(&mut self, slot: Slot, holder: Holder, op: MemoryOp) -> Result<MemoryReply> {
        let sequence = &mut self.sequences[slot as usize];
        if sequence.holder != holder {
            sequence.holder = holder;
            sequence.lost.clear();
            self.truncate(slot, 0);
        }
        let lost = std::mem::take(&mut self.sequences[slot as usize].lost);
        let replaces = matches!(op, MemoryOp::Clear | MemoryOp::Restore(..));
        if !lost.is_empty() && !replaces {
            return Ok(MemoryReply::Lost(lost));
        }
        match op {
            MemoryOp::Clear => {
                self.truncate(slot, 0);
                Ok(MemoryReply::Done)
            }
            MemoryOp::Erase(ranges) => Ok(self.erase(slot, &ranges)),
            MemoryOp::CopyTo(to, holder) => {
                self.sequences[to as usize].holder = holder;
                self.sequences[to as usize].lost.clear();
                Ok(self.copy_to(slot, to))
            }
            MemoryOp::Save => self
                .context
                .sequence_state(slot, false)
                .map(|state| MemoryReply::State(self.cells.tokens(slot).to_vec(), state)),
            MemoryOp::Restore(tokens, state) => self.restore(slot, &tokens, &state),
        }
    }

    fn erase(&mut self, slot: Slot, ranges: &[(usize, usize)]) -> MemoryReply {
        let mut wanted = self.cells.tokens(slot).to_vec();
        for range in merged_ranges(ranges, wanted.len()).into_iter().rev() {
            wanted.drain(range.clone());
            self.close_gap(slot, range.start, range.len());
        }
        if self.cells.len(slot) == wanted.len() { MemoryReply::Done } else { MemoryReply::Reevaluate(wanted) }
    }

    /// Shares cells where possible; else copies the whole state; else the copy is evaluated again.
    fn copy_to(&mut self, from: Slot, to: Slot) -> MemoryReply {
        self.truncate(to, 0);
        let n = self.cells.len(from);
        if n == 0 {
            return MemoryReply::Done;
        }
        if self.can.share_prefix {
            self.share(from, to, n);
            return MemoryReply::Done;
        }
        let tokens = self.cells.tokens(from).to_vec();
        let copied = self.can.restore
            && self.cells.n_free() >= n
            && self
                .context
                .sequence_state(from, false)
                .is_ok_and(|state| self.context.restore_sequence(to, &state, false));
        if copied {
            self.cells.append(to, &tokens);
            return MemoryReply::Done;
        }
        self.context.remove_from(to, 0);
        MemoryReply::Reevaluate(tokens)
    }

    /// Puts saved tokens and state in place of what the sequence holds; what is refused changes nothing.
    fn restore(&mut self, slot: Slot, tokens: &[Token], state: &[u8]) -> Result<MemoryReply> {
        let limit = self.cells.per_slot();
        if tokens.len() > limit {
            return Err(overflow(tokens.len(), limit));
        }
        let returned = self.cells.n_private_from(slot, 0);
        self.free_cells(slot, tokens.len().saturating_sub(returned));
        if !self.can.restore || tokens.len() > self.cells.n_free() + returned {
            // Evaluated instead, for which it waits its turn.
            return Ok(MemoryReply::Reevaluate(tokens.to_vec()));
        }
        let before = (self.cells.tokens(slot).to_vec(), self.context.sequence_state(slot, false)?);
        self.truncate(slot, 0);
        if self.put(slot, tokens, state) {
            return Ok(MemoryReply::Done);
        }
        if !self.put(slot, &before.0, &before.1) {
            self.sequences[slot as usize].lost = before.0;
        }
        Err(Error::StateMismatch("llama.cpp refused the saved state; evaluate the prompt again".into()))
    }

    /// Fills an empty sequence with a state; false, and empty, when llama.cpp refuses it.
    fn put(&mut self, slot: Slot, tokens: &[Token], state: &[u8]) -> bool {
        let fits = tokens.is_empty()
            || (self.context.restore_sequence(slot, state, false)
                && self.context.last_position(slot) == tokens.len() as i32 - 1);
        if fits {
            self.cells.append(slot, tokens);
        } else {
            self.context.remove_from(slot, 0);
        }
        fits
    }

    // ---- for others to see ------------------------------------------------------------------------------------------

    fn publish(&mut self) {
        if std::mem::take(&mut self.changed) {
            for slot in 0..self.sequences.len() as Slot {
                self.publish_slot(slot);
            }
        }
        self.shared.n_cells_used.store(self.cells.n_used(), Ordering::Relaxed);
    }

    /// Brings the public view of a sequence's tokens up to date, touching only what changed. A view that belongs to a
    /// newer holder, or stands for tokens that lost their cells, is left alone.
    fn publish_slot(&mut self, slot: Slot) {
        let sequence = &self.sequences[slot as usize];
        let mut view = self.shared.view(slot);
        if view.holder != sequence.holder || !sequence.lost.is_empty() {
            return;
        }
        let from = self.cells.take_change(slot).min(view.tokens.len());
        let tokens = self.cells.tokens(slot);
        view.tokens.truncate(from);
        view.tokens.extend_from_slice(&tokens[from..]);
    }
}

impl Private {
    /// Removes evaluated tokens; later ones move down, or all are evaluated again.
    fn close_gap(&mut self, start: usize, n: usize, can_shift: bool) {
        if can_shift && self.context.remove(0, start, Some(start + n)) {
            self.context.move_down(0, start + n, n);
            self.n_evaluated -= n;
        } else {
            self.context.remove_from(0, 0);
            self.n_evaluated = 0;
        }
    }
}

enum Patience {
    None,
    Until(Instant),
    Forever,
}

fn is_cancelled(job: &Job) -> bool {
    job.flow.cancel_flag().load(Ordering::Relaxed)
}

/// A panic in a generator ends its job, not the decoder.
fn advance_safely(generator: &mut dyn Generator, logits: &[f32]) -> Result<Step> {
    catch_unwind(AssertUnwindSafe(|| generator.advance(logits)))
        .map_err(|_| Error::WorkerCrashed("drawing a token panicked".into()))
}

fn log_probability(logits: &[f32], token: Token) -> f32 {
    let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f32 = logits.iter().map(|logit| (logit - best).exp()).sum();
    logits[token as usize] - best - sum.ln()
}

fn overflow(n_tokens: usize, limit: usize) -> Error {
    Error::ContextOverflow(format!(
        "{n_tokens} tokens do not fit into a context of {limit}; shorten the prompt, raise context_size, or choose \
         overflow=\"truncate_middle\" or \"rolling_window\""
    ))
}

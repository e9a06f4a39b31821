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
//! Cheap generators are advanced here, so that their job stays in *Evaluating*. One that is preempted while its
//! row is out is *Displaced*: what it draws is taken, and then it waits.

mod jobs;
mod memory;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use super::Shared;
use super::batch::{Limits, Phase, Planner, Take, Work};
use super::cache::{Cells, Slot};
use super::cost::CostModel;
use super::job::{Chat, End, Generator, Goal, Holder, Job, Message, Overflow, Reply, Step};
use super::memory::Capabilities;
use super::parking::Source;
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
    /// The same, but its cells have gone to others.
    Displaced,
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
    /// Where they were.
    source: Source,
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
    /// Whose chat they are: parked before they go.
    chat: Chat,
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
                .map(|_| Sequence {
                    running: None,
                    holder: 0,
                    chat: 0,
                    lost: Vec::new(),
                    last_used: 0,
                    checkpoints: Vec::new(),
                })
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
            State::Drawing(_) | State::Displaced => is_cancelled(&running.job),
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
            Message::Memory { slot, holder, chat, op, reply } => self.change_memory(slot, (holder, chat), op, &reply),
            Message::Forget(chat) => self.forget(chat),
            Message::Wake => {}
            Message::Close => return false,
        }
        true
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
        let n_keep = n_keep.max(running.job.n_keep).min(limit - 1);
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
        self.learn(Instant::now());
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

    /// Remembers what the last step cost, from its beginning to that of this one; before the next width is chosen.
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
                running.state = match running.state {
                    State::Displaced => State::Waiting,
                    _ => State::Evaluating,
                };
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

//! Jobs begin, wait for room, and end.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::super::cache::{Reuse, Slot};
use super::super::job::{End, Goal, Job, Reply};
use super::super::parking::Source;
use super::memory::Prefix;
use super::{Decoder, PARK_AFTER, Private, Running, SHIFT_PARTS, State, is_cancelled, overflow};
use crate::error::{Error, Result};
use crate::llama::{Context, ContextParams};

impl Decoder {
    pub(super) fn begin(&mut self, job: Job) {
        self.clock += 1;
        let running = Running {
            state: State::Waiting,
            n_prompt: job.tokens.len(),
            n_cached: 0,
            source: Source::Cells,
            order: self.clock,
            was_admitted: false,
            scores: Vec::new(),
            job,
        };
        let slot = running.job.slot;
        self.planner.forget(slot);
        self.sequences[slot as usize].running = Some(running);
    }

    pub(super) fn running(&mut self, slot: Slot) -> Option<&mut Running> {
        self.sequences[slot as usize].running.as_mut()
    }

    /// Ends jobs that were cancelled or are late, wakes paused ones, parks those that block others.
    pub(super) fn settle(&mut self) {
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

    pub(super) fn verdict(&mut self, slot: Slot, now: Option<Instant>) -> Option<End> {
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
    pub(super) fn end(&mut self, slot: Slot, end: End) {
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

    pub(super) fn end_all(&mut self, error: impl Fn() -> Error) {
        for slot in 0..self.sequences.len() as Slot {
            self.end(slot, End::Failed(error()));
        }
    }

    /// Lets waiting jobs begin, the highest priority first, as far as their prompts have room.
    pub(super) fn admit(&mut self) {
        while let Some(slot) = self.next_waiting() {
            if !self.try_admit(slot) {
                self.blocked = true;
                break;
            }
        }
    }

    pub(super) fn next_waiting(&self) -> Option<Slot> {
        let private_is_free = self.private.as_ref().is_none_or(|private| private.slot.is_none());
        self.slots(|running| running.state == State::Waiting && (private_is_free || !running.job.alone))
            .min_by_key(|&(_, running)| (std::cmp::Reverse(running.job.priority), running.order))
            .map(|(slot, _)| slot)
    }

    pub(super) fn slots(&self, test: impl Fn(&Running) -> bool) -> impl Iterator<Item = (Slot, &Running)> {
        self.sequences.iter().enumerate().filter_map(move |(index, sequence)| {
            sequence.running.as_ref().filter(|running| test(running)).map(|running| (index as Slot, running))
        })
    }

    /// Reserves cells for a job's prompt and prepares its cache. False when it must wait for others to end.
    pub(super) fn try_admit(&mut self, slot: Slot) -> bool {
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
        self.drop_from_window(slot);
        let others = self.slots(Running::is_growing).count();
        loop {
            let prefix = self.plan_prefix(slot);
            if self.has_room(slot, &prefix) || (others == 0 && self.evictable(slot).next().is_none()) {
                self.apply_prefix(slot, prefix);
                self.admit_now(slot);
                return true;
            }
            // What is evicted may be what would have been shared: plan again.
            if !self.could_have_room(slot) || !self.evict_one(slot) {
                return self.admit_without_parked(slot, &prefix);
            }
        }
    }

    /// Admits a job for whose parked state there is no room, if there is for its prompt.
    fn admit_without_parked(&mut self, slot: Slot, planned: &Prefix) -> bool {
        let prefix = Prefix::Cells(self.plan_cells(slot));
        let fits = matches!(planned, Prefix::Parked(_)) && self.has_room(slot, &prefix);
        if fits {
            self.apply_prefix(slot, prefix);
            self.admit_now(slot);
        }
        fits
    }

    /// Whether the tokens that `prefix` leaves to evaluate fit, beside what others have reserved.
    pub(super) fn has_room(&self, slot: Slot, prefix: &Prefix) -> bool {
        let Some(running) = self.sequences[slot as usize].running.as_ref() else { return true };
        let n_tokens = running.job.tokens.len();
        // Its own cells beyond what it keeps become free. A parked state comes back whole before it is cut.
        let (kept, missing) = match prefix {
            Prefix::Cells(Reuse::Own(n) | Reuse::Checkpoint(n)) => (*n, n_tokens - n),
            Prefix::Cells(Reuse::Share { n, .. }) => (0, n_tokens - n),
            Prefix::Parked(found) => (0, n_tokens.max(found.state.tokens.len())),
        };
        let returned = self.cells.n_private_from(slot, kept);
        self.cells.n_free() + returned >= missing + self.reserved_by_others(slot) + self.headroom(slot)
    }

    /// Whether clearing everything that can be cleared would make room.
    pub(super) fn could_have_room(&self, slot: Slot) -> bool {
        let Some(running) = self.sequences[slot as usize].running.as_ref() else { return true };
        let held: usize = self.evictable(slot).map(|other| self.cells.len(other)).sum();
        let most = self.cells.n_free() + held + self.cells.len(slot);
        let others = self.slots(Running::is_growing).count();
        others == 0 || most >= running.job.tokens.len() + self.reserved_by_others(slot) + self.headroom(slot)
    }

    /// Prepares the private context for a job.
    pub(super) fn enter_private(&mut self, slot: Slot) -> Result<()> {
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
        self.take_over(slot, false);
        self.truncate(slot, 0);
        self.admit_now(slot);
        Ok(())
    }

    /// The sequence goes on to stand for what its private job evaluated, which has no cells in the shared cache.
    pub(super) fn leave_private(&mut self, slot: Slot, running: &Running) {
        if let Some(private) = self.private.as_mut().filter(|private| private.slot == Some(slot)) {
            private.slot = None;
            self.sequences[slot as usize].lost = running.job.tokens[..private.n_evaluated].to_vec();
            self.shared.stand_for(slot, running.job.holder, &running.job.tokens[..private.n_evaluated]);
        }
    }

    /// Tokens of the job that are evaluated, wherever it runs.
    pub(super) fn n_evaluated(&self, slot: Slot) -> usize {
        match &self.private {
            Some(private) if private.slot == Some(slot) => private.n_evaluated,
            _ => self.cells.len(slot),
        }
    }

    pub(super) fn is_private(&self, slot: Slot) -> bool {
        self.private.as_ref().is_some_and(|private| private.slot == Some(slot))
    }

    pub(super) fn admit_now(&mut self, slot: Slot) {
        let n_cached = self.cells.len(slot);
        let Some(running) = self.running(slot) else { return };
        running.state = State::Evaluating;
        let complete = n_cached == running.job.tokens.len();
        let first = !std::mem::replace(&mut running.was_admitted, true);
        if first {
            running.n_cached = n_cached.min(running.n_prompt);
            running.job.flow.admitted(running.n_cached, running.n_prompt, running.source);
            self.shared.stats.cached_tokens(n_cached as u64);
            self.shared.usage(slot).cached.fetch_add(n_cached as u64, Ordering::Relaxed);
        }
        if complete && matches!(self.goal(slot), Some(Goal::Evaluate)) {
            self.end(slot, End::Done);
        }
    }

    /// Cells beyond its tokens that a job waits for: one for each that grows beside it, and enough to get somewhere
    /// before it would be preempted again.
    pub(super) fn headroom(&self, slot: Slot) -> usize {
        let growing = self.slots(Running::is_growing).count();
        let again = self.sequences[slot as usize].running.as_ref().is_some_and(|running| running.was_admitted);
        if again && growing > 0 { self.cells.capacity() / SHIFT_PARTS } else { growing }
    }

    /// Clears idle sequences, then paused ones, if that can make `needed` cells free.
    pub(super) fn free_cells(&mut self, slot: Slot, needed: usize) {
        let held: usize = self.evictable(slot).map(|other| self.cells.len(other)).sum();
        if self.cells.n_free() + held < needed {
            return;
        }
        while self.cells.n_free() < needed && self.evict_one(slot) {}
    }

    /// Cells that admitted prompts have yet to fill.
    pub(super) fn reserved_by_others(&self, slot: Slot) -> usize {
        self.slots(Running::is_growing)
            .filter(|&(other, _)| other != slot)
            .map(|(other, running)| running.job.tokens.len().saturating_sub(self.cells.len(other)))
            .sum()
    }
}

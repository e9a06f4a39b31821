//! What happens to the cells of a sequence: reuse, checkpoints, eviction, and what its holder asks for.

use std::sync::mpsc::Sender;

use super::super::cache::{Reuse, Slot, common_prefix, merged_ranges, plan_reuse};
use super::super::job::{Chat, End, Goal, Holder, Job, MemoryOp, MemoryReply, SavedState};
use super::super::parking::Found;
use super::{CHECKPOINTS, Checkpoint, Decoder, Running, State, overflow};
use crate::error::{Error, Result};
use crate::llama::Token;

/// What a job begins with.
pub(super) enum Prefix {
    /// In cells.
    Cells(Reuse),
    /// In a parked state.
    Parked(Found),
}

impl Decoder {
    /// The longest usable prefix of the job's tokens, wherever it is.
    pub(super) fn plan_prefix(&self, slot: Slot) -> Prefix {
        let reuse = self.plan_cells(slot);
        let Some(running) = self.sequences[slot as usize].running.as_ref() else { return Prefix::Cells(reuse) };
        let wanted = reusable(&running.job);
        match self.shared.parking.find(running.job.chat, wanted, self.can.remove_tail, reuse.n_cached()) {
            Some(found) => Prefix::Parked(found),
            None => Prefix::Cells(reuse),
        }
    }

    /// The longest usable prefix of the job's tokens in cells.
    pub(super) fn plan_cells(&self, slot: Slot) -> Reuse {
        let sequence = &self.sequences[slot as usize];
        let Some(running) = sequence.running.as_ref() else { return Reuse::Own(0) };
        let (wanted, chat) = (reusable(&running.job), running.job.chat);
        let lengths: Vec<usize> = sequence.checkpoints.iter().map(|checkpoint| checkpoint.length).collect();
        let same_holder = sequence.holder == running.job.holder || (chat != 0 && chat == sequence.chat);
        plan_reuse(&self.cells, slot, wanted, same_holder, self.can, &lengths)
    }

    /// Makes that prefix the content of the job's sequence.
    pub(super) fn apply_prefix(&mut self, slot: Slot, prefix: Prefix) {
        let keeps_all = matches!(prefix, Prefix::Cells(Reuse::Own(n)) if n == self.cells.len(slot));
        self.take_over(slot, keeps_all);
        match prefix {
            Prefix::Cells(Reuse::Own(n)) => self.truncate(slot, n),
            Prefix::Cells(Reuse::Share { from, n }) => self.share(from, slot, n),
            Prefix::Cells(Reuse::Checkpoint(length)) => self.roll_back(slot, length),
            Prefix::Parked(found) => self.put_back(slot, &found),
        }
    }

    /// The cells are the job's from now on; what another chat left in them is parked unless all of it stays.
    pub(super) fn take_over(&mut self, slot: Slot, keeps_all: bool) {
        let Some(running) = &self.sequences[slot as usize].running else { return };
        let (holder, chat) = (running.job.holder, running.job.chat);
        if !keeps_all {
            self.park(slot, chat);
        }
        let sequence = &mut self.sequences[slot as usize];
        (sequence.holder, sequence.chat) = (holder, chat);
        sequence.lost.clear();
    }

    // ---- parking ------------------------------------------------------------------------------------------------

    /// Parks what a chat left in a sequence that `chat` needs now.
    fn park(&mut self, slot: Slot, chat: Chat) {
        let owner = self.sequences[slot as usize].chat;
        let worth = self.can.restore && self.shared.parking.wants(self.cells.len(slot));
        if owner == 0 || owner == chat {
            return;
        }
        self.sequences[slot as usize].chat = 0;
        if worth && let Ok(state) = self.saved(slot) {
            self.shared.parking.park(owner, state);
            self.shared.stats.parked_states(1);
        }
    }

    /// Fills the job's sequence from a parked state.
    fn put_back(&mut self, slot: Slot, found: &Found) {
        self.truncate(slot, 0);
        if !self.put(slot, &found.state) {
            return self.shared.parking.discard(&found.state);
        }
        self.truncate(slot, found.n);
        self.changed = true;
        self.shared.stats.restored_tokens(found.n as u64);
        self.shared.parking.forget(self.sequences[slot as usize].chat);
        if let Some(running) = self.running(slot) {
            running.source = found.source;
        }
    }

    /// A chat is over.
    pub(super) fn forget(&mut self, chat: Chat) {
        for sequence in self.sequences.iter_mut().filter(|sequence| sequence.chat == chat) {
            sequence.chat = 0;
        }
    }

    /// Moves a chat's cells down over what its window has dropped, where they are still here and can be moved.
    pub(super) fn drop_from_window(&mut self, slot: Slot) {
        let Some(running) = self.running(slot) else { return };
        let (chat, Some(dropped)) = (running.job.chat, running.job.dropped.take()) else { return };
        let last = dropped.ranges.iter().map(|range| range.1).max().unwrap_or(0);
        let is_here = chat != 0
            && self.sequences[slot as usize].chat == chat
            && common_prefix(self.cells.tokens(slot), &dropped.before) >= last;
        if is_here && self.can.shift {
            self.erase(slot, &dropped.ranges);
            self.shared.stats.shifted_tokens(dropped.ranges.iter().map(|(start, end)| (end - start) as u64).sum());
        }
    }

    // ---- reuse --------------------------------------------------------------------------------------------------

    /// Keeps the first `n` tokens, or none where the memory cannot remove a tail.
    pub(super) fn truncate(&mut self, slot: Slot, n: usize) {
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

    pub(super) fn share(&mut self, from: Slot, to: Slot, n: usize) {
        self.truncate(to, 0);
        self.changed = true;
        self.context.copy(from, to, Some(n));
        self.cells.share(from, to, n);
        self.shared.stats.copied_tokens(n as u64);
    }

    /// Goes back to a saved state; to nothing when llama.cpp refuses it.
    pub(super) fn roll_back(&mut self, slot: Slot, length: usize) {
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
    pub(super) fn checkpoint(&mut self, slot: Slot) {
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
    pub(super) fn evictable(&self, except: Slot) -> impl Iterator<Item = Slot> {
        (0..self.sequences.len() as Slot).filter(move |&slot| {
            let running = self.sequences[slot as usize].running.as_ref();
            let resting = running.is_none_or(|running| matches!(running.state, State::Paused(_) | State::Waiting));
            slot != except && resting && !self.cells.is_empty(slot)
        })
    }

    /// Clears the sequence that was used longest ago, idle ones first. False when there is none.
    pub(super) fn evict_one(&mut self, except: Slot) -> bool {
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
    pub(super) fn lose(&mut self, slot: Slot) {
        self.park(slot, 0);
        self.sequences[slot as usize].lost = self.cells.tokens(slot).to_vec();
        self.truncate(slot, 0);
    }

    /// No token of any job has a cell: evict an idle prefix, else let the newest of the lowest priority wait.
    pub(super) fn make_room(&mut self) {
        if self.evict_one(Slot::MAX) {
            return;
        }
        let growing = || self.slots(Running::is_growing);
        let newest = growing().min_by_key(|&(_, running)| (running.job.priority, std::cmp::Reverse(running.order)));
        let Some((slot, _)) = newest else { return };
        if growing().count() > 1 {
            self.preempt(slot);
        } else {
            self.end(slot, End::ContextFull);
        }
    }

    /// Takes a job's cells; it is evaluated again when there is room, and its output goes on unbroken.
    pub(super) fn preempt(&mut self, slot: Slot) {
        self.lose(slot);
        if let Some(running) = self.running(slot) {
            running.state = match running.state {
                State::Drawing(_) => State::Displaced,
                _ => State::Waiting,
            };
            running.scores.clear();
        }
        self.shared.stats.preemptions(1);
    }

    pub(super) fn change_memory(
        &mut self,
        slot: Slot,
        owner: (Holder, Chat),
        op: MemoryOp,
        reply: &Sender<Result<MemoryReply>>,
    ) {
        let outcome = self.changed_memory(slot, owner, op);
        self.changed = true;
        self.publish();
        let _ = reply.send(outcome);
    }

    pub(super) fn changed_memory(
        &mut self,
        slot: Slot,
        (holder, chat): (Holder, Chat),
        op: MemoryOp,
    ) -> Result<MemoryReply> {
        if self.sequences[slot as usize].holder != holder {
            self.park(slot, chat);
            let sequence = &mut self.sequences[slot as usize];
            (sequence.holder, sequence.chat) = (holder, chat);
            sequence.lost.clear();
            self.truncate(slot, 0);
        }
        let lost = &mut self.sequences[slot as usize].lost;
        match op {
            MemoryOp::Clear => lost.clear(),
            // A state that is refused leaves things as they were.
            MemoryOp::Restore(..) => {}
            _ if !lost.is_empty() => return Ok(MemoryReply::Lost(lost.clone())),
            _ => {}
        }
        match op {
            MemoryOp::Clear => {
                self.truncate(slot, 0);
                Ok(MemoryReply::Done)
            }
            MemoryOp::Erase(ranges) => Ok(self.erase(slot, &ranges)),
            MemoryOp::CopyTo(to, holder) => {
                self.park(to, 0);
                self.sequences[to as usize].holder = holder;
                self.sequences[to as usize].lost.clear();
                Ok(self.copy_to(slot, to))
            }
            MemoryOp::Save => self.saved(slot).map(MemoryReply::State),
            MemoryOp::Restore(state) => self.restore(slot, &state),
        }
    }

    pub(super) fn erase(&mut self, slot: Slot, ranges: &[(usize, usize)]) -> MemoryReply {
        let mut wanted = self.cells.tokens(slot).to_vec();
        for range in merged_ranges(ranges, wanted.len()).into_iter().rev() {
            wanted.drain(range.clone());
            self.close_gap(slot, range.start, range.len());
        }
        if self.cells.len(slot) == wanted.len() { MemoryReply::Done } else { MemoryReply::Reevaluate(wanted) }
    }

    /// Shares cells where possible; else copies the whole state; else the copy is evaluated again.
    pub(super) fn copy_to(&mut self, from: Slot, to: Slot) -> MemoryReply {
        self.truncate(to, 0);
        let n = self.cells.len(from);
        if n == 0 {
            return MemoryReply::Done;
        }
        if self.can.share_prefix {
            self.share(from, to, n);
            return MemoryReply::Done;
        }
        let fits = self.can.restore && self.cells.n_free() >= n;
        let copied = fits && self.saved(from).is_ok_and(|state| self.put(to, &state));
        match copied {
            true => MemoryReply::Done,
            false => MemoryReply::Reevaluate(self.cells.tokens(from).to_vec()),
        }
    }

    fn saved(&mut self, slot: Slot) -> Result<SavedState> {
        let bytes = self.context.sequence_state(slot, false)?;
        Ok(SavedState { tokens: self.cells.tokens(slot).to_vec(), n_exact: self.cells.exact(slot).len(), bytes })
    }

    /// Puts a saved state in place of what the sequence holds; one that is refused changes nothing.
    fn restore(&mut self, slot: Slot, state: &SavedState) -> Result<MemoryReply> {
        let (n_tokens, limit) = (state.tokens.len(), self.cells.per_slot());
        if n_tokens > limit {
            return Err(overflow(n_tokens, limit));
        }
        let returned = self.cells.n_private_from(slot, 0);
        self.free_cells(slot, n_tokens.saturating_sub(returned));
        if !self.can.restore || n_tokens > self.cells.n_free() + returned {
            // Evaluated instead, for which it waits its turn.
            return Ok(MemoryReply::Reevaluate(state.tokens.clone()));
        }
        let before = self.saved(slot)?;
        self.truncate(slot, 0);
        if self.put(slot, state) {
            self.sequences[slot as usize].lost.clear();
            return Ok(MemoryReply::Done);
        }
        if !self.put(slot, &before) {
            self.sequences[slot as usize].lost = before.tokens;
        }
        Err(Error::StateMismatch("llama.cpp refused the saved state; evaluate the prompt again".into()))
    }

    /// Fills an empty sequence with a state; false, and empty, when llama.cpp refuses it.
    fn put(&mut self, slot: Slot, state: &SavedState) -> bool {
        let fits = state.tokens.is_empty()
            || (self.context.restore_sequence(slot, &state.bytes, false)
                && self.context.last_position(slot) == state.tokens.len() as i32 - 1);
        if fits {
            self.cells.append(slot, &state.tokens);
            self.cells.limit_exact(slot, state.n_exact);
        } else {
            self.context.remove_from(slot, 0);
        }
        fits
    }
}

/// The tokens of a job that need not be evaluated if they are cached.
fn reusable(job: &Job) -> &[Token] {
    let n = match job.goal {
        _ if job.alone => 0,
        Goal::Evaluate => job.tokens.len(),
        // Its row is wanted, so the last token must be evaluated.
        Goal::Generate(_) => job.tokens.len() - 1,
        Goal::Score(from) => from.saturating_sub(1),
    };
    &job.tokens[..n.min(job.tokens.len())]
}

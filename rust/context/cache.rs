//! Which tokens are in which cells, and what of them a new prompt can use. Pure: `decoder.rs` does to llama.cpp's
//! memory what it has done here.

use std::ops::Range;

use super::memory::Capabilities;
use crate::llama::Token;

/// Index of a sequence inside its context (`llama_seq_id`).
pub type Slot = u32;

/// The cells of all sequences of a context. A cell that several sequences share counts once.
#[derive(Debug)]
pub struct Cells {
    slots: Vec<Row>,
    /// How many sequences hold each cell.
    holders: Vec<u32>,
    /// Cells that nobody holds.
    unused: Vec<u32>,
    n_used: usize,
    capacity: usize,
    per_slot: usize,
}

#[derive(Debug, Default)]
struct Row {
    tokens: Vec<Token>,
    cells: Vec<u32>,
    /// First index that changed since the last look (see [`Cells::take_change`]).
    changed_from: usize,
    /// Tokens whose cells were computed after exactly the tokens that now stand before them.
    n_exact: usize,
}

impl Cells {
    /// Room for `capacity` tokens in all and `per_slot` in each of `n_slots` sequences.
    #[must_use]
    pub fn new(n_slots: usize, capacity: usize, per_slot: usize) -> Self {
        Self {
            slots: (0..n_slots).map(|_| Row::default()).collect(),
            holders: Vec::new(),
            unused: Vec::new(),
            n_used: 0,
            capacity,
            per_slot,
        }
    }

    /// Sequences.
    #[must_use]
    pub fn n_slots(&self) -> usize {
        self.slots.len()
    }

    /// Cells in all.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Tokens that one sequence may hold.
    #[must_use]
    pub fn per_slot(&self) -> usize {
        self.per_slot
    }

    /// Cells in use.
    #[must_use]
    pub fn n_used(&self) -> usize {
        self.n_used
    }

    /// Cells free for any sequence.
    #[must_use]
    pub fn n_free(&self) -> usize {
        self.capacity - self.n_used
    }

    /// The evaluated tokens of a sequence.
    #[must_use]
    pub fn tokens(&self, slot: Slot) -> &[Token] {
        &self.row(slot).tokens
    }

    /// Number of evaluated tokens of a sequence.
    #[must_use]
    pub fn len(&self, slot: Slot) -> usize {
        self.row(slot).tokens.len()
    }

    /// Whether a sequence holds nothing.
    #[must_use]
    pub fn is_empty(&self, slot: Slot) -> bool {
        self.len(slot) == 0
    }

    /// Cells that would become free if the sequence kept only its first `from` tokens.
    #[must_use]
    pub fn n_private_from(&self, slot: Slot, from: usize) -> usize {
        let cells = &self.row(slot).cells;
        cells[from.min(cells.len())..].iter().filter(|&&cell| self.holders[cell as usize] == 1).count()
    }

    /// Whether any cell at or after `from` belongs to another sequence too.
    #[must_use]
    pub fn is_shared_from(&self, slot: Slot, from: usize) -> bool {
        let cells = &self.row(slot).cells;
        cells[from.min(cells.len())..].iter().any(|&cell| self.holders[cell as usize] > 1)
    }

    /// Appends evaluated tokens, each in a new cell.
    ///
    /// # Panics
    /// When there is no room: the planner was given the number of free cells.
    pub fn append(&mut self, slot: Slot, tokens: &[Token]) {
        assert!(tokens.len() <= self.n_free(), "{} tokens for {} free cells", tokens.len(), self.n_free());
        for &token in tokens {
            let cell = self.take_cell();
            let row = self.row_mut(slot);
            // One after a moved cell is as inexact as that.
            row.n_exact += usize::from(row.n_exact == row.tokens.len());
            row.tokens.push(token);
            row.cells.push(cell);
        }
        self.n_used += tokens.len();
    }

    fn take_cell(&mut self) -> u32 {
        if let Some(cell) = self.unused.pop() {
            self.holders[cell as usize] = 1;
            return cell;
        }
        self.holders.push(1);
        (self.holders.len() - 1) as u32
    }

    /// Keeps the first `n` tokens of a sequence.
    pub fn truncate(&mut self, slot: Slot, n: usize) {
        let end = self.len(slot);
        self.remove(slot, n.min(end)..end);
    }

    /// Removes tokens in the middle; later ones move down.
    pub fn remove(&mut self, slot: Slot, range: Range<usize>) {
        let row = &mut self.slots[slot as usize];
        row.changed_from = row.changed_from.min(range.start);
        row.n_exact = row.n_exact.min(range.start);
        row.tokens.drain(range.clone());
        for cell in row.cells.drain(range) {
            let holders = &mut self.holders[cell as usize];
            *holders -= 1;
            if *holders == 0 {
                self.unused.push(cell);
                self.n_used -= 1;
            }
        }
    }

    /// Lets only the first `n` tokens of a sequence serve as a prefix for others.
    pub fn limit_exact(&mut self, slot: Slot, n: usize) {
        let row = self.row_mut(slot);
        row.n_exact = row.n_exact.min(n);
    }

    /// Makes `to`, which is empty, hold the first `n` cells of `from` too.
    ///
    /// # Panics
    /// When `to` holds something.
    pub fn share(&mut self, from: Slot, to: Slot, n: usize) {
        assert!(from != to && self.is_empty(to), "only an empty sequence can share another's cells");
        let source = self.row(from);
        let (tokens, cells) = (source.tokens[..n].to_vec(), source.cells[..n].to_vec());
        let n_exact = source.n_exact.min(n);
        for &cell in &cells {
            self.holders[cell as usize] += 1;
        }
        let row = self.row_mut(to);
        row.tokens = tokens;
        row.cells = cells;
        row.changed_from = 0;
        row.n_exact = n_exact;
    }

    /// Leading tokens of a sequence that serve as a prefix for others: what follows a cell that was moved remembers
    /// tokens that have gone.
    #[must_use]
    pub fn exact(&self, slot: Slot) -> &[Token] {
        let row = self.row(slot);
        &row.tokens[..row.n_exact]
    }

    /// The index from which the sequence's tokens changed since this was last asked; its length if nothing was
    /// changed before the end.
    pub fn take_change(&mut self, slot: Slot) -> usize {
        let row = self.row_mut(slot);
        std::mem::replace(&mut row.changed_from, row.tokens.len())
    }

    fn row(&self, slot: Slot) -> &Row {
        &self.slots[slot as usize]
    }

    fn row_mut(&mut self, slot: Slot) -> &mut Row {
        &mut self.slots[slot as usize]
    }
}

/// What of the cache a prompt can use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reuse {
    /// Keep the sequence's own first `n` tokens and remove the rest.
    Own(usize),
    /// Clear the sequence and share the first `n` cells of another.
    Share {
        /// The sequence that holds the prefix.
        from: Slot,
        /// Tokens to share.
        n: usize,
    },
    /// Restore the sequence's checkpoint at this length.
    Checkpoint(usize),
}

impl Reuse {
    /// Tokens that need not be evaluated.
    #[must_use]
    pub fn n_cached(self) -> usize {
        match self {
            Self::Own(n) | Self::Share { n, .. } | Self::Checkpoint(n) => n,
        }
    }
}

/// How to begin a prompt of `wanted` tokens, those of them that may come from the cache (the last one of a prompt must
/// be evaluated for its logits). `same_holder`: whoever asks has made the sequence what it is, moved cells included.
/// `checkpoints` are lengths at which the sequence's state was saved.
#[must_use]
pub fn plan_reuse(
    cells: &Cells,
    slot: Slot,
    wanted: &[Token],
    same_holder: bool,
    can: Capabilities,
    checkpoints: &[usize],
) -> Reuse {
    let usable = if same_holder { cells.tokens(slot) } else { cells.exact(slot) };
    let own = common_prefix(usable, wanted);
    let kept = if can.remove_tail || own == cells.len(slot) { Reuse::Own(own) } else { rolled_back(own, checkpoints) };
    if !can.share_prefix {
        return kept;
    }
    let others = (0..cells.n_slots() as Slot).filter(|&other| other != slot);
    let best = others.map(|other| (common_prefix(cells.exact(other), wanted), other)).max_by_key(|&(n, _)| n);
    match best {
        Some((n, from)) if n > kept.n_cached() => Reuse::Share { from, n },
        _ => kept,
    }
}

fn rolled_back(own: usize, checkpoints: &[usize]) -> Reuse {
    match checkpoints.iter().copied().filter(|&length| length <= own).max() {
        Some(length) => Reuse::Checkpoint(length),
        None => Reuse::Own(0),
    }
}

/// Length of the longest prefix that both have.
#[must_use]
pub fn common_prefix(a: &[Token], b: &[Token]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// The parts of a sequence of `length` tokens that `ranges` (any order, overlapping, beyond the end) name, in order,
/// none touching the next.
#[must_use]
pub fn merged_ranges(ranges: &[(usize, usize)], length: usize) -> Vec<Range<usize>> {
    let mut sorted: Vec<_> =
        ranges.iter().map(|&(a, b)| a.min(length)..b.min(length)).filter(|r| !r.is_empty()).collect();
    sorted.sort_by_key(|range| range.start);
    let mut merged: Vec<Range<usize>> = Vec::new();
    for range in sorted {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use proptest::prelude::*;

    use super::*;
    use crate::context::memory::MemoryKind;

    const N_SLOTS: usize = 4;
    const CAPACITY: usize = 24;

    const EVERYTHING: Capabilities = Capabilities {
        remove_tail: true,
        share_prefix: true,
        shift: true,
        checkpoints: false,
        restore: true,
        cells: true,
    };
    /// Of a recurrent model: all or nothing.
    const RECURRENT: Capabilities =
        Capabilities { remove_tail: false, share_prefix: false, shift: false, checkpoints: true, ..EVERYTHING };

    fn cells_of(slots: &[&[Token]]) -> Cells {
        let mut cells = Cells::new(slots.len(), 100, 100);
        for (slot, tokens) in slots.iter().enumerate() {
            cells.append(slot as Slot, tokens);
        }
        cells
    }

    fn plan(cells: &Cells, wanted: &[Token], can: Capabilities) -> Reuse {
        plan_reuse(cells, 0, wanted, true, can, &[])
    }

    // ---- one thing at a time --------------------------------------------------------------------------------------

    #[test]
    fn a_shared_cell_counts_once_and_is_private_to_nobody() {
        let mut cells = cells_of(&[&[1, 2, 3], &[]]);
        cells.share(0, 1, 2);
        cells.append(1, &[9]);
        assert_eq!((cells.n_used(), cells.n_free()), (4, 96));
        assert_eq!((cells.n_private_from(0, 0), cells.n_private_from(1, 0)), (1, 1));
        assert!(cells.is_shared_from(0, 1) && !cells.is_shared_from(0, 2));
    }

    #[test]
    fn a_shared_cell_is_free_when_its_last_holder_lets_go() {
        let mut cells = cells_of(&[&[1, 2], &[]]);
        cells.share(0, 1, 2);
        cells.truncate(0, 0);
        assert_eq!((cells.n_used(), cells.tokens(1)), (2, [1, 2].as_slice()));
        cells.truncate(1, 1);
        assert_eq!(cells.n_used(), 1);
    }

    #[test]
    fn looking_beyond_the_end_finds_no_cell() {
        let cells = cells_of(&[&[1, 2]]);
        assert_eq!(cells.n_private_from(0, 7), 0);
        assert!(!cells.is_shared_from(0, 7));
    }

    #[test]
    fn what_follows_a_gap_is_no_prefix_for_others_and_neither_is_what_comes_after_it() {
        let mut cells = cells_of(&[&[1, 2, 3, 4], &[]]);
        cells.remove(0, 1..2);
        cells.append(0, &[5]);
        assert_eq!((cells.tokens(0), cells.exact(0)), ([1, 3, 4, 5].as_slice(), [1].as_slice()));
        cells.share(0, 1, 3);
        assert_eq!(cells.exact(1), [1], "a copy of a moved cell is as inexact");
    }

    #[test]
    fn without_its_moved_cells_a_sequence_is_exact_again() {
        let mut cells = cells_of(&[&[1, 2, 3]]);
        cells.remove(0, 1..2);
        cells.truncate(0, 1);
        cells.append(0, &[7, 8]);
        assert_eq!(cells.exact(0), [1, 7, 8]);
    }

    #[test]
    #[should_panic(expected = "3 tokens for 2 free cells")]
    fn more_tokens_than_free_cells_are_a_bug_of_the_caller() {
        Cells::new(1, 2, 2).append(0, &[1, 2, 3]);
    }

    #[test]
    #[should_panic(expected = "only an empty sequence")]
    fn sharing_over_what_a_sequence_holds_is_a_bug_of_the_caller() {
        cells_of(&[&[1], &[2]]).share(0, 1, 1);
    }

    #[test]
    fn of_two_equal_prefixes_its_own_is_kept() {
        let cells = cells_of(&[&[1, 2, 3], &[1, 2, 4]]);
        assert_eq!(plan(&cells, &[1, 2, 9], EVERYTHING), Reuse::Own(2));
    }

    #[test]
    fn a_longer_prefix_elsewhere_is_shared_where_that_is_possible() {
        let cells = cells_of(&[&[1, 5], &[1, 2, 3], &[1, 2]]);
        assert_eq!(plan(&cells, &[1, 2, 3, 4], EVERYTHING), Reuse::Share { from: 1, n: 3 });
        let split = Capabilities { share_prefix: false, ..EVERYTHING };
        assert_eq!(plan(&cells, &[1, 2, 3, 4], split), Reuse::Own(1));
    }

    #[test]
    fn moved_cells_serve_only_the_one_who_moved_them() {
        let mut cells = cells_of(&[&[1, 2, 3], &[]]);
        cells.remove(0, 1..2);
        assert_eq!(plan_reuse(&cells, 0, &[1, 3], true, EVERYTHING, &[]), Reuse::Own(2));
        assert_eq!(plan_reuse(&cells, 0, &[1, 3], false, EVERYTHING, &[]), Reuse::Own(1));
        assert_eq!(plan_reuse(&cells, 1, &[1, 3], true, EVERYTHING, &[]), Reuse::Share { from: 0, n: 1 });
    }

    #[test]
    fn a_recurrent_sequence_goes_on_or_back_to_its_last_fitting_checkpoint_or_begins_anew() {
        let cells = cells_of(&[&[1, 2, 3, 4]]);
        assert_eq!(plan(&cells, &[1, 2, 3, 4, 5], RECURRENT), Reuse::Own(4));
        let back = |checkpoints: &[usize]| plan_reuse(&cells, 0, &[1, 2, 3, 9], true, RECURRENT, checkpoints);
        assert_eq!(back(&[1, 4, 2]), Reuse::Checkpoint(2));
        assert_eq!(back(&[4]), Reuse::Own(0));
    }

    #[test]
    fn a_common_prefix_ends_at_the_first_difference_or_with_the_shorter() {
        assert_eq!(common_prefix(&[1, 2, 3], &[1, 2, 4]), 2);
        assert_eq!(common_prefix(&[1, 2], &[1, 2, 4]), 2);
        assert_eq!(common_prefix(&[], &[1]), 0);
    }

    #[test]
    fn ranges_merge_where_they_touch() {
        assert_eq!(merged_ranges(&[(5, 7), (0, 2), (2, 4), (6, 99), (3, 3), (9, 8)], 10), [0..4, 5..10]);
    }

    // ---- any order of everything ----------------------------------------------------------------------------------

    /// A cell as the model knows it: never used twice.
    #[derive(Clone, Debug)]
    struct Held {
        token: Token,
        id: u64,
        /// What stood before it when it was evaluated.
        before: Vec<u64>,
    }

    #[derive(Clone, Debug)]
    enum Op {
        Append(usize, Vec<Token>),
        Truncate(usize, usize),
        Remove(usize, usize, usize),
        Share(usize, usize, usize),
        Clear(usize),
        Look(usize),
        Serve { slot: usize, wanted: Vec<Token>, same_holder: bool },
    }

    /// Few different tokens, so that prefixes agree.
    fn some_tokens(most: usize) -> impl Strategy<Value = Vec<Token>> {
        prop::collection::vec(0..3i32, 0..=most)
    }

    fn op() -> impl Strategy<Value = Op> {
        let slot = || 0..N_SLOTS;
        let length = || 0..CAPACITY / 2;
        prop_oneof![
            4 => (slot(), some_tokens(6)).prop_map(|(slot, tokens)| Op::Append(slot, tokens)),
            2 => (slot(), length()).prop_map(|(slot, n)| Op::Truncate(slot, n)),
            2 => (slot(), length(), length()).prop_map(|(slot, start, end)| Op::Remove(slot, start, end)),
            3 => (slot(), slot(), length()).prop_map(|(from, to, n)| Op::Share(from, to, n)),
            1 => slot().prop_map(Op::Clear),
            3 => slot().prop_map(Op::Look),
            2 => (slot(), some_tokens(8), any::<bool>())
                .prop_map(|(slot, wanted, same_holder)| Op::Serve { slot, wanted, same_holder }),
        ]
    }

    fn ops() -> impl Strategy<Value = Vec<Op>> {
        prop::collection::vec(op(), 0..60)
    }

    /// The cells, beside what they must be and a view of them that is kept up to date as the decoder does.
    struct Pair {
        cells: Cells,
        model: Vec<Vec<Held>>,
        views: Vec<Vec<Token>>,
        next_id: u64,
    }

    impl Pair {
        fn new() -> Self {
            Self {
                cells: Cells::new(N_SLOTS, CAPACITY, CAPACITY),
                model: vec![Vec::new(); N_SLOTS],
                views: vec![Vec::new(); N_SLOTS],
                next_id: 0,
            }
        }

        fn after(ops: &[Op]) -> Self {
            let mut pair = Self::new();
            ops.iter().for_each(|op| pair.apply(op));
            pair
        }

        fn apply(&mut self, op: &Op) {
            match *op {
                Op::Append(slot, ref tokens) => self.append(slot, tokens),
                Op::Truncate(slot, n) => self.truncate(slot, n),
                Op::Remove(slot, start, end) => self.remove(slot, start, end),
                Op::Share(from, to, n) => self.share(from, to, n),
                Op::Clear(slot) => self.truncate(slot, 0),
                Op::Look(slot) => self.look(slot),
                Op::Serve { slot, ref wanted, same_holder } => self.serve(slot, wanted, same_holder),
            }
        }

        /// Like the decoder, gives no more than there is room for.
        fn append(&mut self, slot: usize, tokens: &[Token]) {
            let tokens = &tokens[..tokens.len().min(self.cells.n_free())];
            self.cells.append(slot as Slot, tokens);
            for &token in tokens {
                let before = self.model[slot].iter().map(|held| held.id).collect();
                self.model[slot].push(Held { token, id: self.next_id, before });
                self.next_id += 1;
            }
        }

        fn truncate(&mut self, slot: usize, n: usize) {
            self.cells.truncate(slot as Slot, n);
            self.model[slot].truncate(n);
        }

        fn remove(&mut self, slot: usize, start: usize, end: usize) {
            let end = end.min(self.model[slot].len());
            if start < end {
                self.cells.remove(slot as Slot, start..end);
                self.model[slot].drain(start..end);
            }
        }

        fn share(&mut self, from: usize, to: usize, n: usize) {
            if from == to {
                return;
            }
            let n = n.min(self.model[from].len());
            self.truncate(to, 0);
            self.cells.share(from as Slot, to as Slot, n);
            self.model[to] = self.model[from][..n].to_vec();
        }

        fn look(&mut self, slot: usize) {
            let view = &mut self.views[slot];
            let from = self.cells.take_change(slot as Slot).min(view.len());
            view.truncate(from);
            view.extend_from_slice(&self.cells.tokens(slot as Slot)[from..]);
            assert_eq!(view, self.cells.tokens(slot as Slot), "the view of {slot}");
            assert_eq!(self.cells.take_change(slot as Slot), view.len(), "nothing changed since");
        }

        /// What a job does to the cache: plan, apply, evaluate the rest.
        fn serve(&mut self, slot: usize, wanted: &[Token], same_holder: bool) {
            let reuse = plan_reuse(&self.cells, slot as Slot, wanted, same_holder, EVERYTHING, &[]);
            match reuse {
                Reuse::Own(n) => self.truncate(slot, n),
                Reuse::Share { from, n } => self.share(from as usize, slot, n),
                Reuse::Checkpoint(_) => unreachable!("nothing was saved"),
            }
            self.append(slot, &wanted[reuse.n_cached()..]);
            let now = self.cells.tokens(slot as Slot);
            assert_eq!(now, &wanted[..now.len()], "{reuse:?} and the rest are what was wanted");
            assert!(same_holder || self.cells.exact(slot as Slot) == now, "{reuse:?} gave moved cells to a new holder");
        }

        /// By definition: leading cells with exactly those before them that they were evaluated after.
        fn n_exact(&self, slot: usize) -> usize {
            let ids: Vec<_> = self.model[slot].iter().map(|held| held.id).collect();
            self.model[slot].iter().enumerate().take_while(|(i, held)| held.before == ids[..*i]).count()
        }

        fn n_holders(&self, id: u64) -> usize {
            self.model.iter().flatten().filter(|held| held.id == id).count()
        }

        fn check(&self) {
            self.check_identity();
            let ids: HashSet<_> = self.model.iter().flatten().map(|held| held.id).collect();
            assert_eq!(self.cells.n_used(), ids.len(), "distinct cells");
            assert_eq!(self.cells.n_free(), CAPACITY - ids.len());
            assert_eq!(self.cells.holders.len(), ids.len() + self.cells.unused.len(), "every cell is held or unused");
            assert!(self.cells.holders.len() <= CAPACITY, "no cell is lost");
            (0..N_SLOTS).for_each(|slot| self.check_slot(slot));
        }

        /// Two places have the same cell exactly where the model says so.
        fn check_identity(&self) {
            let mut ids = HashMap::new();
            let mut numbers = HashMap::new();
            for (row, model) in self.cells.slots.iter().zip(&self.model) {
                assert_eq!(row.cells.len(), model.len());
                for (&cell, held) in row.cells.iter().zip(model) {
                    assert_eq!(*ids.entry(cell).or_insert(held.id), held.id, "cell {cell} stands for two tokens");
                    assert_eq!(*numbers.entry(held.id).or_insert(cell), cell, "a shared token has two cells");
                    assert_eq!(self.cells.holders[cell as usize] as usize, self.n_holders(held.id));
                }
                assert_eq!(row.cells.iter().collect::<HashSet<_>>().len(), row.cells.len(), "twice in one sequence");
            }
        }

        fn check_slot(&self, index: usize) {
            let (slot, model) = (index as Slot, &self.model[index]);
            let tokens: Vec<_> = model.iter().map(|held| held.token).collect();
            assert_eq!(self.cells.tokens(slot), tokens);
            assert_eq!((self.cells.len(slot), self.cells.is_empty(slot)), (tokens.len(), tokens.is_empty()));
            assert_eq!(self.cells.exact(slot), &tokens[..self.n_exact(index)]);
            for from in 0..tokens.len() + 2 {
                let rest = || model.iter().skip(from).map(|held| self.n_holders(held.id));
                assert_eq!(self.cells.n_private_from(slot, from), rest().filter(|&n| n == 1).count());
                assert_eq!(self.cells.is_shared_from(slot, from), rest().any(|n| n > 1));
            }
        }
    }

    fn any_kind() -> impl Strategy<Value = Capabilities> {
        let kinds = [MemoryKind::Attention, MemoryKind::SlidingWindow, MemoryKind::Recurrent, MemoryKind::Hybrid];
        (prop::sample::select(kinds.to_vec()), any::<[bool; 3]>())
            .prop_map(|(kind, [unified, can_shift, window])| Capabilities::of(kind, unified, can_shift, window))
    }

    /// A prompt as it comes: much of what some sequence holds, then something else.
    fn wanted(cells: &Cells, like: Slot, n: usize, rest: &[Token]) -> Vec<Token> {
        cells.tokens(like).iter().take(n).chain(rest).copied().collect()
    }

    fn is_prefix(a: &[Token], b: &[Token], n: usize) -> bool {
        a.len() >= n && b.len() >= n && a[..n] == b[..n]
    }

    proptest! {
        #[test]
        fn cells_are_what_a_naive_model_says_whatever_is_done_in_whatever_order(ops in ops()) {
            let mut pair = Pair::new();
            for op in &ops {
                pair.apply(op);
                pair.check();
            }
            (0..N_SLOTS).for_each(|slot| pair.look(slot));
        }

        #[test]
        fn letting_everything_go_frees_every_cell(ops in ops()) {
            let mut pair = Pair::after(&ops);
            (0..N_SLOTS).for_each(|slot| pair.truncate(slot, 0));
            pair.check();
            prop_assert_eq!(pair.cells.n_free(), CAPACITY);
        }

        #[test]
        fn what_is_cached_is_really_there_and_may_be_used(
            ops in ops(),
            can in any_kind(),
            same_holder: bool,
            (like, n, rest) in (0..N_SLOTS as Slot, 0..CAPACITY, some_tokens(4)),
            checkpoints in prop::collection::vec(0..CAPACITY, 0..4),
        ) {
            let cells = Pair::after(&ops).cells;
            let wanted = wanted(&cells, like, n, &rest);
            let reuse = plan_reuse(&cells, 0, &wanted, same_holder, can, &checkpoints);
            prop_assert!(reuse.n_cached() <= wanted.len());
            let usable = if same_holder { cells.tokens(0) } else { cells.exact(0) };
            match reuse {
                Reuse::Own(n) => {
                    prop_assert!(is_prefix(usable, &wanted, n));
                    prop_assert!(can.remove_tail || n == 0 || n == cells.len(0), "a part of a state that has no parts");
                }
                Reuse::Share { from, n } => {
                    prop_assert!(can.share_prefix && from != 0);
                    prop_assert!(is_prefix(cells.exact(from), &wanted, n));
                    prop_assert!(n > common_prefix(usable, &wanted), "its own is kept where it is as long");
                }
                Reuse::Checkpoint(n) => {
                    prop_assert!(!can.remove_tail && checkpoints.contains(&n));
                    prop_assert!(is_prefix(usable, &wanted, n));
                }
            }
        }

        #[test]
        fn no_usable_prefix_is_longer_than_the_one_that_is_chosen(
            ops in ops(),
            same_holder: bool,
            (like, n, rest) in (0..N_SLOTS as Slot, 0..CAPACITY, some_tokens(4)),
        ) {
            let cells = Pair::after(&ops).cells;
            let wanted = wanted(&cells, like, n, &rest);
            let own = if same_holder { cells.tokens(0) } else { cells.exact(0) };
            let others = (1..N_SLOTS as Slot).map(|slot| cells.exact(slot));
            let longest = others.chain([own]).map(|tokens| common_prefix(tokens, &wanted)).max();
            prop_assert_eq!(Some(plan_reuse(&cells, 0, &wanted, same_holder, EVERYTHING, &[]).n_cached()), longest);
        }

        #[test]
        fn merged_ranges_name_each_index_that_any_range_names_once(
            ranges in prop::collection::vec((0..30usize, 0..30usize), 0..8),
            length in 0..25usize,
        ) {
            let merged = merged_ranges(&ranges, length);
            let named = |index: usize| ranges.iter().any(|&(start, end)| (start..end).contains(&index));
            let expected: Vec<_> = (0..length).filter(|&index| named(index)).collect();
            prop_assert_eq!(merged.iter().cloned().flatten().collect::<Vec<_>>(), expected);
            prop_assert!(merged.windows(2).all(|pair| pair[0].end < pair[1].start), "in order, none touches the next");
            prop_assert!(merged.iter().all(|range| !range.is_empty()));
        }
    }
}

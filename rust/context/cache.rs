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

/// The parts of a sequence of `length` tokens that stay when `ranges` (any order, overlapping, beyond the end) go.
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

//! What chats left in cells that others needed: their states, in host memory under a budget, then on disk under
//! another, then nowhere. The decoder parks and takes back; it never touches the disk. Sequences' threads, which
//! may wait, move states between memory and disk ([`Parking::spill`], [`Parking::fetch`]).

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::cache::common_prefix;
use super::job::{Chat, SavedState};
use crate::llama::Token;

/// States of fewer tokens are not worth keeping: evaluating them again costs about as much.
pub const MIN_TOKENS: usize = 16;

/// Putting a state back costs about as much as evaluating one token in so many of it.
const TOKENS_PER_EVALUATED: usize = 8;

/// Share of the budget that [`Parking::spill`] keeps free for the decoder, as one over this; room for two more
/// states at least.
const FREE_PARTS: usize = 4;

/// How much may be parked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Budget {
    /// Bytes in host memory.
    pub host_bytes: usize,
    /// Bytes on disk.
    pub disk_bytes: usize,
}

/// Where the evaluated prefix of a prompt was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// In the cells of a sequence.
    Cells,
    /// Parked in host memory.
    Host,
    /// Parked on disk.
    Disk,
}

impl Source {
    /// The name users see.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Cells => "cells",
            Self::Host => "host",
            Self::Disk => "disk",
        }
    }
}

/// A prompt's prefix among the parked states.
#[derive(Clone, Debug)]
pub struct Found {
    /// The state that begins with it.
    pub state: Arc<SavedState>,
    /// Tokens of it that the prompt can use.
    pub n: usize,
    /// Where it lay.
    pub source: Source,
}

/// How much is parked now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Parked {
    /// States.
    pub n_states: usize,
    /// Their bytes in host memory.
    pub host_bytes: usize,
    /// Their bytes on disk.
    pub disk_bytes: usize,
}

/// The parked states of a context. Locked for short, never while reading or writing a file.
#[derive(Debug, Default)]
pub struct Parking {
    budget: Budget,
    inner: Mutex<Vec<Entry>>,
}

/// Least recently parked first.
#[derive(Debug)]
struct Entry {
    chat: Chat,
    tokens: Arc<[Token]>,
    n_exact: usize,
    size: usize,
    place: Place,
}

#[derive(Clone, Debug)]
enum Place {
    Host {
        state: Arc<SavedState>,
        from_disk: bool,
    },
    /// A file without a name: it goes with its last handle, whatever happens to the process.
    Disk(Arc<File>),
}

impl Entry {
    fn in_host(&self) -> bool {
        matches!(self.place, Place::Host { .. })
    }

    /// Tokens of `wanted` that it can serve to `chat`. One that cannot lose its tail serves whole or not at all.
    fn serves(&self, chat: Chat, wanted: &[Token], divisible: bool) -> usize {
        let usable = if self.chat == chat { &self.tokens[..] } else { &self.tokens[..self.n_exact] };
        let n = common_prefix(usable, wanted);
        if divisible || n == self.tokens.len() { n } else { 0 }
    }
}

impl Parking {
    /// Room for as much as `budget` says.
    #[must_use]
    pub fn new(budget: Budget) -> Self {
        Self { budget, inner: Mutex::default() }
    }

    /// Whether a state of so many tokens would be kept.
    #[must_use]
    pub fn wants(&self, n_tokens: usize) -> bool {
        self.budget.host_bytes > 0 && n_tokens >= MIN_TOKENS
    }

    /// Keeps a chat's state in place of its earlier one. What exceeds the budget goes, the oldest first.
    pub fn park(&self, chat: Chat, state: SavedState) {
        let size = size_of_state(&state);
        let mut entries = self.lock();
        entries.retain(|entry| entry.chat != chat);
        if size > self.budget.host_bytes {
            return;
        }
        while host_bytes(&entries) + size > self.budget.host_bytes {
            let oldest = entries.iter().position(Entry::in_host);
            oldest.map(|index| entries.remove(index));
        }
        let (tokens, n_exact) = (state.tokens.as_slice().into(), state.n_exact);
        let place = Place::Host { state: Arc::new(state), from_disk: false };
        entries.push(Entry { chat, tokens, n_exact, size, place });
    }

    /// The longest prefix of `wanted` in host memory, if it is worth putting back where `n_cached` tokens of it are
    /// in cells.
    #[must_use]
    pub fn find(&self, chat: Chat, wanted: &[Token], divisible: bool, n_cached: usize) -> Option<Found> {
        let entries = self.lock();
        let in_host = entries.iter().filter(|entry| entry.in_host());
        let (n, entry) = best(in_host, chat, wanted, divisible, n_cached)?;
        match &entry.place {
            Place::Host { state, from_disk } => {
                let source = if *from_disk { Source::Disk } else { Source::Host };
                Some(Found { state: Arc::clone(state), n, source })
            }
            Place::Disk(_) => None,
        }
    }

    /// Reads what would serve `wanted` best back from disk, if it lies there and is worth it. Blocks.
    pub fn fetch(&self, chat: Chat, wanted: &[Token], divisible: bool) {
        let entries = self.lock();
        let Some((_, entry)) = best(entries.iter(), chat, wanted, divisible, 0) else { return };
        let Place::Disk(file) = &entry.place else { return };
        let (file, tokens, n_exact, size) = (Arc::clone(file), Arc::clone(&entry.tokens), entry.n_exact, entry.size);
        let owner = entry.chat;
        drop(entries);
        let bytes = read_back(&file);
        let mut entries = self.lock();
        let Some(index) = entries.iter().position(|entry| entry.chat == owner && Arc::ptr_eq(&entry.tokens, &tokens))
        else {
            return;
        };
        let mut entry = entries.remove(index);
        // A file that cannot be read is evaluated again.
        let Ok(bytes) = bytes else { return };
        drop(entries);
        self.spill_to(self.budget.host_bytes.saturating_sub(size));
        let mut entries = self.lock();
        make_room(&mut entries, self.budget.host_bytes.saturating_sub(size));
        let state = SavedState { tokens: tokens.to_vec(), n_exact, bytes };
        entry.place = Place::Host { state: Arc::new(state), from_disk: true };
        entries.push(entry);
    }

    /// Moves the oldest states from a filling host memory to disk. Blocks.
    pub fn spill(&self) {
        let largest = self.lock().iter().map(|entry| entry.size).max().unwrap_or(0);
        let free = (self.budget.host_bytes / FREE_PARTS).max(largest * 2);
        self.spill_to(self.budget.host_bytes.saturating_sub(free));
    }

    fn spill_to(&self, limit: usize) {
        while let Some((tokens, state)) = self.oldest_to_spill(limit) {
            let written = write_out(&state.bytes);
            let mut entries = self.lock();
            let Some(index) = entries.iter().position(|entry| Arc::ptr_eq(&entry.tokens, &tokens)) else { continue };
            match written {
                Ok(file) => entries[index].place = Place::Disk(Arc::new(file)),
                // No disk, no second chance: it is evaluated again.
                Err(_) => drop(entries.remove(index)),
            }
            while disk_bytes(&entries) > self.budget.disk_bytes {
                let oldest = entries.iter().position(|entry| !entry.in_host());
                oldest.map(|index| entries.remove(index));
            }
        }
    }

    fn oldest_to_spill(&self, limit: usize) -> Option<(Arc<[Token]>, Arc<SavedState>)> {
        let entries = self.lock();
        if host_bytes(&entries) <= limit {
            return None;
        }
        entries.iter().find_map(|entry| match &entry.place {
            Place::Host { state, .. } if entry.size <= self.budget.disk_bytes => {
                Some((Arc::clone(&entry.tokens), Arc::clone(state)))
            }
            _ => None,
        })
    }

    /// Forgets a chat's state: it is in cells again, or the chat is over.
    pub fn forget(&self, chat: Chat) {
        self.lock().retain(|entry| entry.chat != chat);
    }

    /// Forgets a state that llama.cpp refused.
    pub fn discard(&self, refused: &Arc<SavedState>) {
        self.lock().retain(|entry| !matches!(&entry.place, Place::Host { state, .. } if Arc::ptr_eq(state, refused)));
    }

    /// How much is parked.
    #[must_use]
    pub fn parked(&self) -> Parked {
        let entries = self.lock();
        Parked { n_states: entries.len(), host_bytes: host_bytes(&entries), disk_bytes: disk_bytes(&entries) }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The entry that serves most of `wanted`, of those worth putting back.
fn best<'a>(
    entries: impl Iterator<Item = &'a Entry>,
    chat: Chat,
    wanted: &[Token],
    divisible: bool,
    n_cached: usize,
) -> Option<(usize, &'a Entry)> {
    entries
        .map(|entry| (entry.serves(chat, wanted, divisible), entry))
        .filter(|&(n, entry)| is_worth_it(n.saturating_sub(n_cached), entry.tokens.len()))
        .max_by_key(|&(n, _)| n)
}

/// Whether sparing the evaluation of `n_gained` tokens is worth putting a state of `n_tokens` back: a long one must
/// not come back for the few words that all prompts begin with.
fn is_worth_it(n_gained: usize, n_tokens: usize) -> bool {
    n_gained >= MIN_TOKENS && n_gained * TOKENS_PER_EVALUATED >= n_tokens
}

fn make_room(entries: &mut Vec<Entry>, limit: usize) {
    while host_bytes(entries) > limit
        && let Some(index) = entries.iter().position(Entry::in_host)
    {
        entries.remove(index);
    }
}

fn size_of_state(state: &SavedState) -> usize {
    state.bytes.len() + std::mem::size_of_val(state.tokens.as_slice()) * 2
}

fn host_bytes(entries: &[Entry]) -> usize {
    entries.iter().filter(|entry| entry.in_host()).map(|entry| entry.size).sum()
}

fn disk_bytes(entries: &[Entry]) -> usize {
    entries.iter().filter(|entry| !entry.in_host()).map(|entry| entry.size).sum()
}

fn write_out(bytes: &[u8]) -> io::Result<File> {
    let mut file = tempfile::tempfile()?;
    file.write_all(bytes)?;
    Ok(file)
}

fn read_back(mut file: &File) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A state of these tokens that takes `SIZE` bytes in all.
    const SIZE: usize = 2000;

    /// The tokens that every state here begins with: enough of them to be worth putting back.
    const HEAD: usize = MIN_TOKENS;

    fn after_head(tokens: &[Token]) -> Vec<Token> {
        [&[0; HEAD], tokens].concat()
    }

    fn state(tokens: &[Token]) -> SavedState {
        let bytes = vec![tokens[0] as u8; SIZE - (HEAD + tokens.len()) * 8];
        let tokens = after_head(tokens);
        SavedState { n_exact: tokens.len(), tokens, bytes }
    }

    fn parking(host: usize, disk: usize) -> Parking {
        Parking::new(Budget { host_bytes: host * SIZE, disk_bytes: disk * SIZE })
    }

    fn found(parking: &Parking, chat: Chat, wanted: &[Token]) -> Option<(usize, Source)> {
        parking.find(chat, &after_head(wanted), true, 0).map(|found| (found.n - HEAD, found.source))
    }

    #[test]
    fn the_longest_prefix_is_found_whoever_parked_it() {
        let parking = parking(4, 0);
        parking.park(1, state(&[1, 2, 3]));
        parking.park(2, state(&[1, 2, 9, 9]));
        assert_eq!(found(&parking, 3, &[1, 2, 3, 4]), Some((3, Source::Host)));
        assert!(parking.find(3, &[7], true, 0).is_none());
    }

    #[test]
    fn a_state_comes_back_only_for_what_evaluating_would_cost_more_than() {
        let parking = parking(4, 4);
        parking.park(1, state(&[1; TOKENS_PER_EVALUATED * HEAD]));
        parking.park(2, state(&[2, 3]));
        // All begin alike, but only the short one is worth putting back for that.
        assert_eq!(found(&parking, 3, &[9]), Some((0, Source::Host)));
        parking.forget(2);
        assert_eq!(found(&parking, 3, &[9]), None);
        assert_eq!(found(&parking, 3, &[1; HEAD]), Some((HEAD, Source::Host)));
        // What is in cells is no gain.
        assert!(parking.find(3, &after_head(&[1; HEAD]), true, HEAD + 1).is_none());
        parking.spill_to(0);
        parking.fetch(3, &after_head(&[9]), true);
        assert_eq!(parking.parked().host_bytes, 0);
        parking.fetch(3, &after_head(&[1; HEAD]), true);
        assert_eq!(found(&parking, 3, &[1; HEAD]), Some((HEAD, Source::Disk)));
    }

    #[test]
    fn a_state_that_cannot_be_cut_serves_whole_or_not_at_all() {
        let parking = parking(4, 0);
        parking.park(1, state(&[1, 2, 3]));
        assert!(parking.find(1, &after_head(&[1, 2, 4]), false, 0).is_none());
        assert_eq!(parking.find(1, &after_head(&[1, 2, 3, 4]), false, 0).map(|found| found.n), Some(HEAD + 3));
    }

    #[test]
    fn moved_cells_serve_the_chat_that_moved_them_and_nobody_else() {
        let parking = parking(4, 0);
        parking.park(1, SavedState { n_exact: HEAD + 1, ..state(&[1, 2, 3]) });
        assert_eq!(found(&parking, 1, &[1, 2, 3]), Some((3, Source::Host)));
        assert_eq!(found(&parking, 2, &[1, 2, 3]), Some((1, Source::Host)));
    }

    #[test]
    fn a_chat_has_one_state_the_last() {
        let parking = parking(4, 0);
        parking.park(1, state(&[1, 2]));
        parking.park(1, state(&[5, 6]));
        assert_eq!((found(&parking, 1, &[1, 2]), parking.parked().n_states), (Some((0, Source::Host)), 1));
        parking.forget(1);
        assert_eq!(parking.parked(), Parked::default());
    }

    #[test]
    fn what_fills_host_memory_goes_to_disk_and_comes_back_the_same() {
        let parking = parking(3, 4);
        for chat in 1..=2 {
            parking.park(chat, state(&[chat as Token, 2, 3]));
        }
        parking.spill();
        assert_eq!(parking.parked(), Parked { n_states: 2, host_bytes: SIZE, disk_bytes: SIZE });
        assert_eq!(found(&parking, 1, &[1, 2, 3]), Some((0, Source::Host)));
        parking.fetch(1, &after_head(&[1, 2, 3]), true);
        let back = parking.find(1, &after_head(&[1, 2, 3]), true, 0).expect("it was fetched");
        assert_eq!((back.source, &*back.state), (Source::Disk, &state(&[1, 2, 3])));
    }

    #[test]
    fn without_a_disk_the_oldest_is_dropped() {
        let parking = parking(2, 0);
        for chat in 1..=3 {
            parking.park(chat, state(&[chat as Token]));
            parking.spill();
        }
        assert_eq!(parking.parked(), Parked { n_states: 2, host_bytes: 2 * SIZE, disk_bytes: 0 });
        let common = Some((0, Source::Host));
        assert_eq!((found(&parking, 1, &[1]), found(&parking, 3, &[3])), (common, Some((1, Source::Host))));
    }

    #[test]
    fn a_state_larger_than_the_budget_is_not_kept() {
        let parking = Parking::new(Budget { host_bytes: SIZE / 2, disk_bytes: 0 });
        parking.park(1, state(&[1]));
        assert_eq!(parking.parked().n_states, 0);
        assert!(!Parking::default().wants(1000) && !parking.wants(MIN_TOKENS - 1) && parking.wants(MIN_TOKENS));
    }

    proptest! {
        #[test]
        fn no_budget_is_ever_exceeded(
            host in 0..4usize, disk in 0..4usize, steps in prop::collection::vec((0..4u8, 1..6u64), 0..60)
        ) {
            let parking = parking(host, disk);
            for (what, chat) in steps {
                let tokens = [chat as Token, 2, 3];
                match what {
                    0 => parking.spill(),
                    1 => parking.fetch(chat, &after_head(&tokens), true),
                    2 => parking.forget(chat),
                    _ => parking.park(chat, state(&tokens)),
                }
                let parked = parking.parked();
                prop_assert!(parked.host_bytes <= host * SIZE);
                prop_assert!(parked.disk_bytes <= disk * SIZE);
            }
        }
    }
}

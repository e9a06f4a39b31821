//! Where a text names special tokens: llama.cpp's partition (`tokenizer_st_partition`), in linear time.
//!
//! llama.cpp takes one special token after the other, the longest text first, and cuts every stretch of text that
//! is left at each of its occurrences, from left to right. Each cut walks over the list of all stretches, so a
//! prompt of special tokens takes quadratic time, and every token's search reads the whole text.
//!
//! Here one automaton reads the text once and says for each position which special token is the longest to begin
//! there. A position then waits in the queue of that token; the queues are served in llama.cpp's order. Who finds
//! the place taken joins the queue of the next shorter token that begins there and still fits.

use std::collections::HashSet;
use std::ops::Range;

use aho_corasick::automaton::Automaton;
use aho_corasick::nfa::contiguous::NFA;
use aho_corasick::{Anchored, MatchKind};

use super::Token;

/// A part of a text. What lies between two pieces was whitespace that a token strips from its neighbours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Bytes that name no special token.
    Text(Range<usize>),
    /// The name of a special token.
    Special {
        /// Where it stands.
        range: Range<usize>,
        /// The token.
        token: Token,
    },
}

/// A special token as the vocabulary has it.
#[derive(Clone, Debug, Default)]
pub(super) struct Special {
    pub token: Token,
    pub text: Vec<u8>,
    /// Whitespace on the left side belongs to the token.
    pub strips_left: bool,
    /// Whitespace on the right side belongs to the token.
    pub strips_right: bool,
    /// Plain text even where nothing may be special, such as a run of spaces that has a token of its own.
    pub harmless: bool,
}

/// Finds special tokens. Their place in the list is their priority.
pub(super) struct Splitter {
    automaton: Option<NFA>,
    specials: Vec<Special>,
    /// For each token the longest other one that its text begins with.
    shorter: Vec<Option<usize>>,
}

impl Splitter {
    /// `specials` in the order in which llama.cpp takes them: never a shorter text before a longer one.
    /// `None` if they are too many for an automaton: 2³¹ bytes.
    pub fn new(mut specials: Vec<Special>) -> Option<Self> {
        let mut seen = HashSet::new();
        specials.retain(|special| !special.text.is_empty() && seen.insert(special.text.clone()));
        let automaton = if specials.is_empty() { None } else { Some(backwards(&specials)?) };
        let shorter = match &automaton {
            Some(automaton) => specials.iter().map(|special| second(automaton, &special.text)).collect(),
            None => Vec::new(),
        };
        Some(Self { automaton, specials, shorter })
    }

    /// Cuts a text at its special tokens. Nothing that touches a protected range is special, except what is harmless.
    pub fn partition(&self, text: &[u8], protected: &[Range<usize>]) -> Vec<Piece> {
        let protected = Protected::new(protected);
        let mut queues = self.queues(text, &protected);
        let mut taken = Taken::new(text.len());
        let mut places = Vec::new();
        for special in 0..self.specials.len() {
            let mut queue = std::mem::take(&mut queues[special]);
            queue.sort_unstable();
            for start in queue {
                let start = start as usize;
                let room = taken.next(start) - start;
                if room >= self.specials[special].text.len() {
                    places.push(self.take(text, start, special, &mut taken));
                } else if room > 0
                    && let Some(next) = self.fitting(special, start, room, &protected)
                {
                    queues[next].push(start as u32);
                }
            }
        }
        places.sort_unstable_by_key(|place| place.range.start);
        pieces(&places, text.len())
    }

    /// Where the texts of special tokens begin that are not harmless, in falling order.
    pub fn dangers(&self, text: &[u8]) -> Vec<usize> {
        let mut starts = Vec::new();
        self.longest(text, |start, special| {
            let mut candidates = std::iter::successors(Some(special), |&special| self.shorter[special]);
            if candidates.any(|special| !self.specials[special].harmless) {
                starts.push(start);
            }
        });
        starts
    }

    /// For each special token the places where it is the longest to begin.
    fn queues(&self, text: &[u8], protected: &Protected) -> Vec<Vec<u32>> {
        let mut queues = vec![Vec::new(); self.specials.len()];
        self.longest(text, |start, special| {
            if let Some(special) = self.fitting(special, start, usize::MAX, protected) {
                queues[special].push(start as u32);
            }
        });
        queues
    }

    /// Calls `found` for each position at which special tokens begin, with the longest; from the end to the front.
    fn longest(&self, text: &[u8], mut found: impl FnMut(usize, usize)) {
        let Some(automaton) = &self.automaton else { return };
        let mut state = start(automaton);
        for (position, &byte) in text.iter().enumerate().rev() {
            state = automaton.next_state(Anchored::No, state, byte);
            if automaton.is_match(state) {
                found(position, automaton.match_pattern(state, 0).as_usize());
            }
        }
    }

    /// The first of `special` and the shorter ones that fits into the room and may stand there.
    fn fitting(&self, special: usize, start: usize, room: usize, protected: &Protected) -> Option<usize> {
        std::iter::successors(Some(special), |&special| self.shorter[special]).find(|&special| {
            let Special { text, harmless, .. } = &self.specials[special];
            text.len() <= room && (*harmless || !protected.touches(start..start + text.len()))
        })
    }

    fn take(&self, text: &[u8], start: usize, special: usize, taken: &mut Taken) -> Place {
        let Special { token, text: name, strips_left, strips_right, .. } = &self.specials[special];
        let range = start..start + name.len();
        let mut gone = range.clone();
        while *strips_left && gone.start > 0 && is_space(text[gone.start - 1]) && !taken.contains(gone.start - 1) {
            gone.start -= 1;
        }
        while *strips_right && text.get(gone.end).is_some_and(|&byte| is_space(byte)) && !taken.contains(gone.end) {
            gone.end += 1;
        }
        taken.insert(gone.clone());
        Place { range, gone, token: *token }
    }
}

struct Place {
    range: Range<usize>,
    /// The range with the whitespace that the token strips.
    gone: Range<usize>,
    token: Token,
}

fn pieces(places: &[Place], end: usize) -> Vec<Piece> {
    let mut pieces = Vec::with_capacity(2 * places.len() + 1);
    let mut from = 0;
    for Place { range, gone, token } in places {
        if from < gone.start {
            pieces.push(Piece::Text(from..gone.start));
        }
        pieces.push(Piece::Special { range: range.clone(), token: *token });
        from = gone.end;
    }
    if from < end {
        pieces.push(Piece::Text(from..end));
    }
    pieces
}

/// `isspace` of C's own locale.
fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t'..=b'\r')
}

/// Reads texts from their end: in each state the first match is the longest text that begins there.
fn backwards(specials: &[Special]) -> Option<NFA> {
    let reversed = specials.iter().map(|special| special.text.iter().rev().copied().collect::<Vec<u8>>());
    NFA::builder().match_kind(MatchKind::Standard).build(reversed).ok()
}

fn start(automaton: &NFA) -> aho_corasick::automaton::StateID {
    automaton.start_state(Anchored::No).expect("an automaton of MatchKind::Standard starts anywhere")
}

/// The second longest pattern that a pattern's text begins with; the longest is the pattern itself.
fn second(automaton: &NFA, text: &[u8]) -> Option<usize> {
    let read = |state, &byte: &u8| automaton.next_state(Anchored::No, state, byte);
    let state = text.iter().rev().fold(start(automaton), read);
    (automaton.match_len(state) > 1).then(|| automaton.match_pattern(state, 1).as_usize())
}

/// Ranges in which nothing is special, in order and apart from each other.
struct Protected(Vec<Range<usize>>);

impl Protected {
    fn new(ranges: &[Range<usize>]) -> Self {
        let mut ranges: Vec<_> = ranges.iter().filter(|range| !range.is_empty()).cloned().collect();
        ranges.sort_unstable_by_key(|range| range.start);
        let mut apart: Vec<Range<usize>> = Vec::with_capacity(ranges.len());
        for range in ranges {
            match apart.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => apart.push(range),
            }
        }
        Self(apart)
    }

    fn touches(&self, range: Range<usize>) -> bool {
        let next = self.0.partition_point(|protected| protected.end <= range.start);
        self.0.get(next).is_some_and(|protected| protected.start < range.end)
    }
}

/// A set of positions that answers "which is the next one?" in a few steps: 64 bits of each level have one in the
/// level above.
struct Taken {
    levels: Vec<Vec<u64>>,
    end: usize,
}

impl Taken {
    fn new(end: usize) -> Self {
        let mut levels = vec![vec![0; end / 64 + 1]];
        while levels[levels.len() - 1].len() > 1 {
            levels.push(vec![0; levels[levels.len() - 1].len() / 64 + 1]);
        }
        Self { levels, end }
    }

    fn contains(&self, position: usize) -> bool {
        self.levels[0][position / 64] >> (position % 64) & 1 == 1
    }

    fn insert(&mut self, range: Range<usize>) {
        for position in range {
            let mut index = position;
            for level in &mut self.levels {
                let word = &mut level[index / 64];
                let known = *word != 0;
                *word |= 1 << (index % 64);
                if known {
                    break;
                }
                index /= 64;
            }
        }
    }

    /// The first member from `position` on, or the end.
    fn next(&self, position: usize) -> usize {
        let mut index = position;
        for (height, level) in self.levels.iter().enumerate() {
            let Some(word) = level.get(index / 64) else { return self.end };
            let rest = word >> (index % 64);
            if rest != 0 {
                return self.first_below(height, index + rest.trailing_zeros() as usize);
            }
            index = index / 64 + 1;
        }
        self.end
    }

    /// The lowest position under a bit of a level.
    fn first_below(&self, height: usize, mut index: usize) -> usize {
        for level in self.levels[..height].iter().rev() {
            index = index * 64 + level[index].trailing_zeros() as usize;
        }
        index
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn special(token: Token, text: &str) -> Special {
        Special { token, text: text.into(), ..Special::default() }
    }

    /// llama.cpp's way, step by step.
    fn by_the_book(specials: &[Special], text: &[u8]) -> Vec<Piece> {
        let mut list = if text.is_empty() { Vec::new() } else { vec![Piece::Text(0..text.len())] };
        for special in specials {
            list = list.into_iter().flat_map(|piece| cut(special, text, piece)).collect();
        }
        list
    }

    fn cut(special: &Special, text: &[u8], piece: Piece) -> Vec<Piece> {
        let Piece::Text(mut rest) = piece else { return vec![piece] };
        let mut out = Vec::new();
        let find = |range: Range<usize>| text[range].windows(special.text.len()).position(|part| part == special.text);
        while let Some(at) = find(rest.clone()) {
            let range = rest.start + at..rest.start + at + special.text.len();
            let mut left = rest.start..range.start;
            while special.strips_left && !left.is_empty() && is_space(text[left.end - 1]) {
                left.end -= 1;
            }
            rest.start = range.end;
            while special.strips_right && !rest.is_empty() && is_space(text[rest.start]) {
                rest.start += 1;
            }
            out.extend((!left.is_empty()).then_some(Piece::Text(left)));
            out.push(Piece::Special { range, token: special.token });
        }
        out.extend((!rest.is_empty()).then_some(Piece::Text(rest)));
        out
    }

    fn specials() -> impl Strategy<Value = Vec<Special>> {
        prop::collection::vec(("[ab ]{1,6}", any::<bool>(), any::<bool>()), 0..8).prop_map(|made| {
            let strips = |(text, strips_left, strips_right): (String, bool, bool)| Special {
                text: text.into(),
                strips_left,
                strips_right,
                ..Special::default()
            };
            let mut specials: Vec<_> = made.into_iter().map(strips).collect();
            specials.sort_by_key(|special| std::cmp::Reverse(special.text.len()));
            specials.dedup_by_key(|special| special.text.clone());
            (0..).zip(&mut specials).for_each(|(token, special)| special.token = token);
            specials
        })
    }

    fn texts(pieces: &[Piece]) -> Vec<Range<usize>> {
        let range = |piece: &Piece| match piece {
            Piece::Text(range) => Some(range.clone()),
            Piece::Special { .. } => None,
        };
        pieces.iter().filter_map(range).collect()
    }

    proptest! {
        #[test]
        fn a_text_is_cut_as_by_the_book(mut specials in specials(), text in "[abc \t]{0,80}") {
            let mut seen = BTreeSet::new();
            specials.retain(|special| seen.insert(special.text.clone()));
            let splitter = Splitter::new(specials.clone()).unwrap();
            prop_assert_eq!(splitter.partition(text.as_bytes(), &[]), by_the_book(&specials, text.as_bytes()));
        }

        #[test]
        fn nothing_in_a_protected_range_is_special(
            specials in specials(), text in "[abc ]{0,40}", ranges in prop::collection::vec((0usize..40, 0usize..9), 0..4),
        ) {
            let ranges: Vec<_> = ranges.into_iter().map(|(start, length)| start..start + length).collect();
            let splitter = Splitter::new(specials).unwrap();
            for piece in splitter.partition(text.as_bytes(), &ranges) {
                let Piece::Special { range, .. } = piece else { continue };
                prop_assert!(ranges.iter().all(|other| other.is_empty() || other.end <= range.start || range.end <= other.start));
            }
        }

        #[test]
        fn the_next_taken_position_is_found(
            taken in prop::collection::btree_set(0usize..20_000, 0..40), asked in prop::collection::vec(0usize..20_000, 40),
        ) {
            let mut set = Taken::new(20_000);
            taken.iter().for_each(|&position| set.insert(position..position + 1));
            for position in asked {
                prop_assert_eq!(set.next(position), taken.range(position..).next().copied().unwrap_or(20_000));
                prop_assert_eq!(set.contains(position), taken.contains(&position));
            }
        }
    }

    #[test]
    fn harmless_tokens_stay_in_protected_ranges_and_shorter_ones_take_the_place_of_forbidden_ones() {
        let mut spaces = special(2, "  ");
        spaces.harmless = true;
        let splitter = Splitter::new(vec![special(0, "<s><s>"), special(1, "<s>"), spaces]).unwrap();
        let protected = std::slice::from_ref(&(3..8));
        let pieces = splitter.partition(b"<s><s>  <s>", protected);
        assert_eq!(
            pieces,
            [
                Piece::Special { range: 0..3, token: 1 },
                Piece::Text(3..6),
                Piece::Special { range: 6..8, token: 2 },
                Piece::Special { range: 8..11, token: 1 },
            ]
        );
        assert_eq!(splitter.dangers(b"  <s> <s>"), [6, 2]);
    }

    #[test]
    fn whitespace_that_a_token_strips_is_in_no_piece() {
        let mut strips = special(7, "<x>");
        (strips.strips_left, strips.strips_right) = (true, true);
        let pieces = Splitter::new(vec![strips]).unwrap().partition(b" a \n<x>\t\x0b b", &[]);
        assert_eq!(texts(&pieces), [0..2, 10..11]);
    }

    #[test]
    fn a_vocabulary_without_special_tokens_cuts_nothing() {
        let splitter = Splitter::new(Vec::new()).unwrap();
        assert_eq!(splitter.partition(b"text", &[]), [Piece::Text(0..4)]);
        assert_eq!(splitter.partition(b"", &[]), []);
    }
}

//! SentencePiece vocabularies (SPM): llama.cpp's algorithm (`llm_tokenizer_spm_session`), in time n log n.
//!
//! llama.cpp makes room for the bytes of each character that has no token by itself, exactly, and so copies all
//! tokens again each time: a text of such characters takes quadratic time. Its bookkeeping of merges (`rev_merge`)
//! is left out here: it knows texts of tokens only, and is asked for characters without one.

use std::cmp::{Ordering, Reverse};
use std::collections::{BinaryHeap, HashMap};

use rustc_hash::FxBuildHasher;

use super::Token;

/// What a space becomes before tokenising: U+2581.
const SPACE: &[u8] = "\u{2581}".as_bytes();

const NONE: u32 = u32::MAX;

/// A vocabulary, ready to be looked up.
pub(super) struct Spm {
    tokens: HashMap<Box<[u8]>, Token, FxBuildHasher>,
    entries: Vec<Entry>,
    bytes: Vec<Option<Token>>,
    longest: usize,
    space_prefix: bool,
}

/// What the vocabulary says of a token.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    /// The higher it is, the earlier two parts are merged into this token.
    pub score: f32,
    /// May not be made of text that was protected.
    pub guarded: bool,
}

/// Buffers that texts of one call share.
#[derive(Default)]
pub(super) struct Scratch {
    text: Vec<u8>,
    symbols: Vec<Symbol>,
    merges: BinaryHeap<Merge>,
}

/// A part of the text, from `start` to the start of the next one.
struct Symbol {
    start: u32,
    previous: u32,
    next: u32,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// One character, as it stands in the text.
    Character,
    Token(Token),
    /// Part of the symbol before it.
    Merged,
}

/// Two neighbours that are a token together. Greatest first: the higher score, then the one further left.
struct Merge {
    score: f32,
    left: Reverse<u32>,
    size: u32,
    token: Token,
}

impl Ord for Merge {
    fn cmp(&self, other: &Self) -> Ordering {
        let scores = self.score.partial_cmp(&other.score).unwrap_or(Ordering::Equal);
        scores.then(self.left.cmp(&other.left))
    }
}

impl PartialOrd for Merge {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Merge {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Merge {}

impl Spm {
    /// The tokens in the order of their ids. `None` when a score is not a number: then the order of merges depends on
    /// how llama.cpp's queue happens to lie.
    pub fn new(tokens: impl Iterator<Item = (Box<[u8]>, Entry)>, space_prefix: bool) -> Option<Self> {
        let (texts, entries): (Vec<_>, Vec<_>) = tokens.unzip();
        if entries.iter().any(|entry| entry.score.is_nan()) {
            return None;
        }
        let longest = texts.iter().map(|text| text.len()).max().unwrap_or(0);
        let tokens: HashMap<_, _, _> = texts.into_iter().zip(0..).collect();
        let byte = |byte: u8| tokens.get(format!("<0x{byte:02X}>").as_bytes()).or_else(|| tokens.get(&[byte][..]));
        let bytes = (0..=u8::MAX).map(|value| byte(value).copied()).collect();
        Some(Self { tokens, entries, bytes, longest, space_prefix })
    }

    /// Appends the tokens of a text that begins, or follows a special token. `guarded` keeps tokens from being made
    /// that may not come from such a text.
    ///
    /// # Errors
    /// The byte that has no token.
    pub fn tokenize(&self, text: &[u8], guarded: bool, scratch: &mut Scratch, out: &mut Vec<Token>) -> Result<(), u8> {
        escape(text, self.space_prefix, &mut scratch.text);
        Merging { spm: self, guarded, scratch }.run();
        self.collect(scratch, guarded, out)
    }

    fn find(&self, text: &[u8], guarded: bool) -> Option<Token> {
        let token = if text.len() > self.longest { None } else { self.tokens.get(text).copied() };
        token.filter(|&token| !(guarded && self.entries[token as usize].guarded))
    }

    fn collect(&self, scratch: &Scratch, guarded: bool, out: &mut Vec<Token>) -> Result<(), u8> {
        for (index, symbol) in scratch.symbols.iter().enumerate() {
            match symbol.state {
                State::Token(token) => out.push(token),
                State::Merged => {}
                State::Character => self.spell(scratch.text_of(index as u32), guarded, out)?,
            }
        }
        Ok(())
    }

    /// A character by itself: its token, or those of its bytes.
    fn spell(&self, character: &[u8], guarded: bool, out: &mut Vec<Token>) -> Result<(), u8> {
        if let Some(token) = self.find(character, guarded) {
            out.push(token);
            return Ok(());
        }
        for &byte in character {
            out.push(self.bytes[usize::from(byte)].ok_or(byte)?);
        }
        Ok(())
    }
}

impl Scratch {
    fn end_of(&self, symbol: u32) -> u32 {
        match self.symbols[symbol as usize].next {
            NONE => self.text.len() as u32,
            next => self.symbols[next as usize].start,
        }
    }

    fn text_of(&self, symbol: u32) -> &[u8] {
        &self.text[self.symbols[symbol as usize].start as usize..self.end_of(symbol) as usize]
    }
}

struct Merging<'a> {
    spm: &'a Spm,
    guarded: bool,
    scratch: &'a mut Scratch,
}

impl Merging<'_> {
    /// Joins the best pair of neighbours as long as there is one.
    fn run(&mut self) {
        self.split();
        for left in 0..self.scratch.symbols.len() as u32 {
            self.propose(left);
        }
        while let Some(merge) = self.scratch.merges.pop() {
            self.apply(&merge);
        }
    }

    /// One symbol for each character.
    fn split(&mut self) {
        let Scratch { text, symbols, merges } = &mut *self.scratch;
        symbols.clear();
        merges.clear();
        let mut start = 0;
        while start < text.len() {
            let index = symbols.len() as u32;
            let previous = index.checked_sub(1).unwrap_or(NONE);
            symbols.push(Symbol { start: start as u32, previous, next: index + 1, state: State::Character });
            start += width(text[start]);
        }
        if let Some(last) = symbols.last_mut() {
            last.next = NONE;
        }
    }

    /// Notes that a symbol and the next one are a token together, if they are.
    fn propose(&mut self, left: u32) {
        let next = self.scratch.symbols[left as usize].next;
        if next == NONE {
            return;
        }
        let range = self.scratch.symbols[left as usize].start..self.scratch.end_of(next);
        let text = &self.scratch.text[range.start as usize..range.end as usize];
        if let Some(token) = self.spm.find(text, self.guarded) {
            let score = self.spm.entries[token as usize].score;
            self.scratch.merges.push(Merge { score, left: Reverse(left), size: range.end - range.start, token });
        }
    }

    fn apply(&mut self, merge: &Merge) {
        let left = merge.left.0;
        let Symbol { start, next: right, state, previous, .. } = self.scratch.symbols[left as usize];
        // Symbols only grow: another size says that one of the two was merged since.
        if state == State::Merged || right == NONE || self.scratch.end_of(right) - start != merge.size {
            return;
        }
        let after = self.scratch.symbols[right as usize].next;
        self.scratch.symbols[right as usize].state = State::Merged;
        self.scratch.symbols[left as usize].state = State::Token(merge.token);
        self.scratch.symbols[left as usize].next = after;
        if after != NONE {
            self.scratch.symbols[after as usize].previous = left;
        }
        if previous != NONE {
            self.propose(previous);
        }
        self.propose(left);
    }
}

/// The text with U+2581 for each space, and one before it if the vocabulary wants it.
fn escape(text: &[u8], prefix: bool, escaped: &mut Vec<u8>) {
    escaped.clear();
    escaped.reserve(text.len() + SPACE.len());
    if prefix {
        escaped.extend_from_slice(SPACE);
    }
    for &byte in text {
        match byte {
            b' ' => escaped.extend_from_slice(SPACE),
            _ => escaped.push(byte),
        }
    }
}

/// Bytes of a character, told by its first one as llama.cpp does (`unicode_len_utf8`).
fn width(first: u8) -> usize {
    match first >> 4 {
        0..0xC => 1,
        0xC | 0xD => 2,
        0xE => 3,
        _ => 4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vocabulary(pieces: &[(&str, f32, bool)]) -> Spm {
        let bytes = (0..=u8::MAX).map(|byte| (format!("<0x{byte:02X}>"), 0.0, false));
        let pieces = pieces.iter().map(|&(text, score, guarded)| (text.to_owned(), score, guarded));
        let entry = |(text, score, guarded): (String, f32, bool)| (text.into_bytes().into(), Entry { score, guarded });
        Spm::new(bytes.chain(pieces).map(entry), false).unwrap()
    }

    fn tokenize(spm: &Spm, text: &str, guarded: bool) -> Vec<Token> {
        let mut out = Vec::new();
        spm.tokenize(text.as_bytes(), guarded, &mut Scratch::default(), &mut out).unwrap();
        out
    }

    #[test]
    fn the_best_pair_is_merged_first_and_of_equals_the_left_one() {
        let spm = vocabulary(&[("a", -9.0, false), ("aa", -1.0, false), ("ab", -0.5, false), ("aab", -2.0, false)]);
        assert_eq!(tokenize(&spm, "aaa", false), [257, 256]);
        assert_eq!(tokenize(&spm, "aaab", false), [257, 258]);
        assert_eq!(tokenize(&spm, "aab", false), [259]);
    }

    #[test]
    fn characters_without_a_token_become_bytes() {
        assert_eq!(tokenize(&vocabulary(&[("é", 0.0, false)]), "éü ", false), [256, 0xC3, 0xBC, 0xE2, 0x96, 0x81]);
    }

    #[test]
    fn a_guarded_token_is_not_made_of_guarded_text() {
        let spm = vocabulary(&[("</", -1.0, false), ("s>", -2.0, false), ("</s>", 0.0, true)]);
        assert_eq!(tokenize(&spm, "</s>", false), [258]);
        assert_eq!(tokenize(&spm, "</s>", true), [256, 257]);
    }

    #[test]
    fn a_byte_without_a_token_is_an_error() {
        let spm = Spm::new([(b"a"[..].into(), Entry { score: 0.0, guarded: false })].into_iter(), true).unwrap();
        let mut out = Vec::new();
        assert_eq!(spm.tokenize(b"a", false, &mut Scratch::default(), &mut out), Err(0xE2));
    }

    #[test]
    fn scores_that_are_no_numbers_are_left_to_llama_cpp() {
        assert!(Spm::new([(b"a"[..].into(), Entry { score: f32::NAN, guarded: false })].into_iter(), true).is_none());
    }
}

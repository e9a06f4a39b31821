//! Calls of tools, found in generated text and read while they come.
//!
//! A scanner looks for *triggers*, the texts that open a call. What cannot become one goes on to [`Segments`], token
//! by token, so that reasoning, stops and budgets are treated as ever; inside of reasoning nothing is looked for.
//! From a trigger on the text is a *unit*: it is kept, and llama.cpp's parser reads it again and again as it grows.
//! What the parser knows is told at once: the call's name, its arguments as far as they came, its end.
//!
//! Reading costs as much as the unit is long. At first every token is worth one; later only as many as keep the sum
//! within a multiple of the unit's length, and the end. So a call of n bytes costs O(n), and what is told in all, the
//! deltas joined, does not depend on how the text was cut into tokens.
//!
//! A unit ends where the parser says that it fails, or that something else follows. Up to there its whole calls
//! stand; the rest is text again and searched anew, so nothing a model says is lost. A unit without a whole call was
//! none: its first character is text, and the search goes on behind it. Only a call that was told and then cut short
//! stays what it is, a call without an end.

use std::collections::VecDeque;

use super::segments::{Mark, Parts, Segments};
use super::{Automaton, ROOT, StopMatch, Utf8Assembler};
use crate::llama::{CallReader, Reading, ReadingState, Token};

/// Bytes that may be read of a unit before reading is rationed.
const FREE_BYTES: usize = 64 * 1024;

/// Bytes read per byte of a unit, in the long run; twice as many where a call may end.
const READ_PER_BYTE: usize = 32;

/// Deepest nesting of brackets in a unit: the parser recurses.
const MAX_NESTING: usize = 256;

/// Characters that are taken back in search of the end of the last call: half a trigger, and space before it.
const MAX_STEPS_BACK: usize = 96;

/// What is told of calls. Indices count those of one generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CallEvent {
    /// A tool is called.
    Start {
        /// Which call.
        index: usize,
        /// The model's id for it, or a drawn one.
        id: String,
        /// The tool.
        name: String,
    },
    /// More of its arguments.
    Delta {
        /// Which call.
        index: usize,
        /// JSON that follows what was told.
        text: String,
    },
    /// The call is whole.
    End {
        /// Which call.
        index: usize,
        /// All of its arguments, as JSON.
        arguments: String,
    },
}

/// How calls are found and read.
pub struct CallOptions {
    /// Reads units.
    pub reader: CallReader,
    /// What opens a unit.
    pub triggers: Vec<String>,
    /// What is neither content nor call.
    pub silent: Vec<String>,
    /// Whether calls carry ids.
    pub has_ids: bool,
}

/// The text of a token, or what is left of it.
#[derive(Clone, Debug)]
struct Bit {
    /// The token, unless a part of its text went on already.
    token: Option<Token>,
    number: usize,
    text: Vec<u8>,
    /// A control token, whose text is for the parser only.
    hidden: bool,
}

/// Text that may belong to calls, from a trigger on.
#[derive(Default)]
struct Unit {
    text: String,
    utf8: Utf8Assembler,
    /// The tokens, each with where its text starts.
    bits: Vec<(usize, Bit)>,
    /// Bytes that were read.
    n_read: usize,
    /// Bytes that are known to have the format.
    good: usize,
    /// Brackets that are open.
    nesting: usize,
    too_deep: bool,
    told: Vec<Told>,
}

/// A call of a unit as far as it was told.
struct Told {
    index: usize,
    arguments: String,
    ended: bool,
}

/// What the scanner has found, with the bytes that it has.
enum Found {
    Trigger { start: usize },
    Silent { start: usize, end: usize },
}

/// The text of one generation that may call tools. Used as [`Segments`], which it contains.
pub struct Calls {
    inner: Segments,
    reader: CallReader,
    has_ids: bool,
    silent: Vec<Vec<u8>>,
    automaton: Option<Automaton<u8>>,
    node: usize,
    /// Text that could still become a trigger.
    held: VecDeque<Bit>,
    /// Bytes of it that the automaton has seen.
    n_seen: usize,
    unit: Option<Box<Unit>>,
    n_units: usize,
    n_tokens: usize,
    n_started: usize,
    n_whole: usize,
}

impl Calls {
    /// A stream at the start of its answer, over one that tells reasoning from content.
    pub fn new(options: CallOptions, mut inner: Segments) -> Self {
        inner.precede_calls();
        let markers = options.triggers.iter().chain(&options.silent);
        Self {
            inner,
            reader: options.reader,
            has_ids: options.has_ids,
            automaton: Automaton::new(markers.map(|marker| marker.as_bytes())),
            silent: options.silent.into_iter().map(String::into_bytes).collect(),
            node: ROOT,
            held: VecDeque::new(),
            n_seen: 0,
            unit: None,
            n_units: 0,
            n_tokens: 0,
            n_started: 0,
            n_whole: 0,
        }
    }

    /// How many calls are whole.
    pub fn n_whole(&self) -> usize {
        self.n_whole
    }

    /// What tells reasoning from content.
    pub fn segments(&self) -> &Segments {
        &self.inner
    }

    /// The same, to be told what to do.
    pub fn segments_mut(&mut self) -> &mut Segments {
        &mut self.inner
    }

    /// The token that comes next, whatever the model would draw.
    pub fn forced(&self) -> Option<Token> {
        self.inner.forced()
    }

    /// Publishes the response prefix, as [`Segments::begin`] does; it may open a call.
    pub fn begin(&mut self, prefix: &str, out: &mut Parts) {
        let trigger = self.first_trigger(prefix).filter(|_| !self.inner.begins_inside());
        let (before, call) = prefix.split_at(trigger.unwrap_or(prefix.len()));
        self.inner.begin(before, out);
        if !call.is_empty() {
            let bit = Bit { token: None, number: 0, text: call.into(), hidden: false };
            self.unit = Some(Box::new(Unit::new([bit])));
        }
    }

    fn first_trigger(&self, text: &str) -> Option<usize> {
        let automaton = self.automaton.as_ref()?;
        let mut node = ROOT;
        text.bytes().enumerate().find_map(|(at, byte)| {
            node = automaton.step(node, byte);
            let start = at + 1 - automaton.nodes[node].longest;
            let marker = &text.as_bytes()[start..=at];
            (!marker.is_empty() && !self.is_silent(marker)).then_some(start)
        })
    }

    fn is_silent(&self, marker: &[u8]) -> bool {
        self.silent.iter().any(|silent| silent == marker)
    }

    /// Takes in one token and its bytes, as [`Segments::push`] does. `hidden`: the bytes are the name of a control
    /// token, which is no text.
    #[must_use = "a match ends the generation"]
    pub fn push(&mut self, token: Token, piece: &[u8], hidden: bool, now: f64, out: &mut Parts) -> Option<StopMatch> {
        let bit = Bit { token: Some(token), number: self.n_tokens, text: piece.to_vec(), hidden };
        self.n_tokens += 1;
        match &mut self.unit {
            Some(unit) => {
                unit.add(bit);
                self.read(false, now, out)
            }
            None => {
                self.held.push_back(bit);
                self.scan(now, out)
            }
        }
    }

    /// Publishes all that was held back, for the generation ended without a stop.
    #[must_use = "a waiting stop string may have matched"]
    pub fn finish(&mut self, out: &mut Parts) -> Option<StopMatch> {
        while self.unit.is_some() {
            let n_units = self.n_units;
            if let Some(stop) = self.read(true, 0.0, out) {
                return Some(stop);
            }
            // Reading may have left this one, and found the next.
            if self.unit.is_some()
                && self.n_units == n_units
                && let Some(stop) = self.close_unit(out)
            {
                return Some(stop);
            }
        }
        loop {
            let size = self.held_bytes();
            if let Some(stop) = self.release(size, 0.0, out) {
                return Some(stop);
            }
            if !self.take_back() {
                return self.inner.finish(out);
            }
        }
    }

    // ---- before a call -------------------------------------------------------------------------

    fn held_bytes(&self) -> usize {
        self.held.iter().map(|bit| bit.text.len()).sum()
    }

    /// Looks for what opens a call, and lets go of what cannot.
    fn scan(&mut self, now: f64, out: &mut Parts) -> Option<StopMatch> {
        while self.unit.is_none() {
            let found = if self.inner.is_inside() { None } else { self.find() };
            let limit = match found {
                Some(Found::Trigger { start } | Found::Silent { start, .. }) => start,
                None if self.inner.is_inside() => self.held_bytes(),
                None => self.n_seen - self.depth(),
            };
            let searched = !self.inner.is_inside();
            if let Some(stop) = self.release(limit, now, out) {
                return Some(stop);
            }
            if !searched {
                self.rewind();
            }
            // What was let go may have ended or begun a stretch of reasoning.
            if self.take_back() || (found.is_some() && self.inner.is_inside()) {
                continue;
            }
            match found {
                None => return None,
                Some(Found::Silent { start, end }) => self.drop_held(end - start),
                Some(Found::Trigger { .. }) => {
                    self.rewind();
                    self.unit = Some(Box::new(Unit::new(self.held.drain(..))));
                    self.n_units += 1;
                    return self.read(false, now, out);
                }
            }
        }
        None
    }

    /// How many of the bytes that were seen could become a marker.
    fn depth(&self) -> usize {
        self.automaton.as_ref().map_or(0, |automaton| automaton.nodes[self.node].depth)
    }

    /// Looks for the next marker in what is held.
    fn find(&mut self) -> Option<Found> {
        let automaton = self.automaton.as_ref()?;
        let unseen = self.held.iter().flat_map(|bit| &bit.text).skip(self.n_seen);
        for &byte in unseen {
            self.node = automaton.step(self.node, byte);
            self.n_seen += 1;
            let length = automaton.nodes[self.node].longest;
            if length > 0 {
                let (start, end) = (self.n_seen - length, self.n_seen);
                let marker: Vec<u8> =
                    self.held.iter().flat_map(|bit| &bit.text).copied().skip(start).take(length).collect();
                return Some(if self.is_silent(&marker) {
                    Found::Silent { start, end }
                } else {
                    Found::Trigger { start }
                });
            }
        }
        None
    }

    /// Forgets what was seen.
    fn rewind(&mut self) {
        (self.node, self.n_seen) = (ROOT, 0);
    }

    /// Hands the first `size` bytes on, and the tokens without text behind them.
    fn release(&mut self, mut size: usize, now: f64, out: &mut Parts) -> Option<StopMatch> {
        while let Some(mut bit) = self.held.pop_front() {
            if bit.text.len() > size && size == 0 {
                self.held.push_front(bit);
                break;
            }
            let rest = bit.text.split_off(size.min(bit.text.len()));
            size -= bit.text.len();
            self.n_seen = self.n_seen.saturating_sub(bit.text.len());
            if !rest.is_empty() {
                self.held.push_front(Bit { token: None, text: rest, ..bit.clone() });
            }
            let shown: &[u8] = if bit.hidden { &[] } else { &bit.text };
            let stop = self.inner.take(bit.number, bit.token, shown, now, out);
            if stop.is_some() || self.inner.has_rest() {
                return stop;
            }
        }
        None
    }

    /// Takes back what came behind the end of reasoning, to be searched. Whether there was any.
    fn take_back(&mut self) -> bool {
        let Some((number, text)) = self.inner.take_rest() else { return false };
        self.rewind();
        self.held.push_front(Bit { token: None, number, text, hidden: false });
        true
    }

    /// Drops the first `size` bytes.
    fn drop_held(&mut self, mut size: usize) {
        self.rewind();
        while size > 0
            && let Some(mut bit) = self.held.pop_front()
        {
            let rest = bit.text.split_off(size.min(bit.text.len()));
            size -= bit.text.len();
            if !rest.is_empty() {
                self.held.push_front(Bit { token: None, text: rest, ..bit });
            }
        }
    }

    // ---- in a call -----------------------------------------------------------------------------

    /// Reads the unit, if it is worth it, and tells what is new.
    fn read(&mut self, at_end: bool, now: f64, out: &mut Parts) -> Option<StopMatch> {
        let Some(unit) = &mut self.unit else { return None };
        if at_end {
            unit.utf8.finish(&mut unit.text);
        } else if !unit.is_due() {
            return None;
        }
        unit.n_read += unit.text.len();
        let length = unit.text.len();
        match self.reading(length) {
            Some(reading) if reading.state == ReadingState::Success && reading.end < length => {
                self.settle(reading.end, now, out)
            }
            Some(reading) => {
                if let Some(unit) = &mut self.unit {
                    unit.good = length;
                }
                self.tell(&reading, out)
            }
            None => self.fail(now, out),
        }
    }

    /// Ends a unit that has lost its format. What it said before is told however it came.
    fn fail(&mut self, now: f64, out: &mut Parts) -> Option<StopMatch> {
        let good = self.last_good();
        if let Some(reading) = self.reading(good)
            && let Some(stop) = self.tell(&reading, out)
        {
            return Some(stop);
        }
        self.settle(self.end_before(good), now, out)
    }

    /// What the first `length` bytes of the unit say; `None` if they do not have the format.
    fn reading(&self, length: usize) -> Option<Reading> {
        let unit = self.unit.as_ref().filter(|unit| !unit.too_deep)?;
        let mut reading = self.reader.read(&unit.text[..length]).ok()?;
        reading.whole = reading.whole.min(reading.calls.len());
        (reading.state != ReadingState::Fail).then_some(reading)
    }

    /// The longest beginning of the unit that has the format. Most units that fail do so at once.
    fn last_good(&self) -> usize {
        let Some(unit) = &self.unit else { return 0 };
        let is_boundary = |at: &usize| unit.text.is_char_boundary(*at);
        let is_good = |end: usize| self.reading(end).is_some_and(|reading| !reading.is_short(end));
        let (mut good, mut bad, mut step) = (unit.good, unit.text.len(), 1);
        while let Some(next) = (good + step..bad).find(is_boundary) {
            match is_good(next) {
                true => (good, step) = (next, 2 * step),
                false => bad = next,
            }
        }
        loop {
            let middle = good.midpoint(bad);
            let above = (middle.max(good + 1)..bad).find(is_boundary);
            let Some(next) = above.or_else(|| (good + 1..middle).rev().find(is_boundary)) else { break };
            match is_good(next) {
                true => good = next,
                false => bad = next,
            }
        }
        good
    }

    /// The last place up to `limit` where the unit could end; 0 if it has no whole call.
    fn end_before(&self, limit: usize) -> usize {
        let Some(unit) = &self.unit else { return 0 };
        if self.reading(limit).is_none_or(|reading| reading.whole == 0) {
            return 0;
        }
        let ends = unit.text[..limit].char_indices().rev().map(|(at, _)| at);
        let is_whole = |&end: &usize| {
            let reading = self.reading(end);
            reading.is_some_and(|reading| reading.state == ReadingState::Success && reading.whole > 0)
        };
        std::iter::once(limit).chain(ends).take(MAX_STEPS_BACK).find(is_whole).unwrap_or(limit)
    }

    /// Ends the unit at `end`: its calls stand if there are whole ones, the rest is text again.
    fn settle(&mut self, end: usize, now: f64, out: &mut Parts) -> Option<StopMatch> {
        let reading = self.reading(end).filter(|reading| reading.whole > 0 && end > 0);
        if let Some(reading) = &reading
            && let Some(stop) = self.tell(reading, out)
        {
            return Some(stop);
        }
        self.leave(if reading.is_some() { end } else { 0 }, now, out)
    }

    /// Ends the unit with the generation. What was not told of it is text; a call that was told stays without an end.
    fn close_unit(&mut self, out: &mut Parts) -> Option<StopMatch> {
        let unit = self.unit.as_ref()?;
        let length = unit.text.len();
        let is_cut = unit.told.iter().any(|told| !told.ended);
        self.leave(if is_cut { length } else { self.end_before(length) }, 0.0, out)
    }

    /// Goes back to searching, behind the calls or, where there are none, behind the first character.
    fn leave(&mut self, end: usize, now: f64, out: &mut Parts) -> Option<StopMatch> {
        let unit = self.unit.take()?;
        self.rewind();
        self.held = unit.rest(end);
        if end > 0 {
            self.inner.follow_call();
        } else {
            let first = self.held.front().map_or(0, |bit| first_character(&bit.text, bit.hidden));
            let stop = self.release(first, now, out);
            if stop.is_some() {
                return stop;
            }
        }
        self.scan(now, out)
    }

    // ---- what is told --------------------------------------------------------------------------

    /// Tells what is new of the unit's calls.
    fn tell(&mut self, reading: &Reading, out: &mut Parts) -> Option<StopMatch> {
        for (place, call) in reading.calls.iter().enumerate() {
            let is_whole = place < reading.whole;
            let Some(unit) = &mut self.unit else { return None };
            if place >= unit.told.len() {
                let is_known = !call.name.is_empty() && (is_whole || !self.has_ids || !call.id.is_empty());
                if !is_known {
                    return None;
                }
                let is_first = place == 0;
                let (index, token) = (self.n_started, unit.first_token());
                unit.told.push(Told { index, arguments: String::new(), ended: false });
                self.n_started += 1;
                if is_first && let Some(stop) = self.inner.interrupt(token, out) {
                    return Some(stop);
                }
                let id = if call.id.is_empty() { drawn_id() } else { call.id.clone() };
                out.tell(CallEvent::Start { index, id, name: call.name.clone() });
            }
            let Some(unit) = &mut self.unit else { return None };
            if unit.told[place].take(&call.arguments, is_whole, out) {
                self.n_whole += 1;
            }
        }
        None
    }
}

impl Told {
    /// Tells more arguments, and the end of a whole call. Whether it ended.
    fn take(&mut self, arguments: &str, is_whole: bool, out: &mut Parts) -> bool {
        let arguments = if is_whole && arguments.is_empty() { "{}" } else { arguments };
        // What was told must stand: a reading that takes it back is not believed.
        let Some(more) = arguments.strip_prefix(self.arguments.as_str()).filter(|_| !self.ended) else { return false };
        if !more.is_empty() {
            out.tell(CallEvent::Delta { index: self.index, text: more.into() });
            self.arguments.push_str(more);
        }
        if is_whole {
            out.tell(CallEvent::End { index: self.index, arguments: self.arguments.clone() });
            self.ended = true;
        }
        is_whole
    }
}

impl Unit {
    fn new(bits: impl IntoIterator<Item = Bit>) -> Self {
        let mut unit = Self::default();
        bits.into_iter().for_each(|bit| unit.add(bit));
        unit
    }

    fn add(&mut self, bit: Bit) {
        let start = self.text.len();
        self.utf8.push(&bit.text, &mut self.text);
        for byte in self.text[start..].bytes() {
            match byte {
                b'[' | b'{' => self.nesting += 1,
                b']' | b'}' => self.nesting = self.nesting.saturating_sub(1),
                _ => {}
            }
            self.too_deep |= self.nesting > MAX_NESTING;
        }
        self.bits.push((start, bit));
    }

    fn first_token(&self) -> usize {
        self.bits.first().map_or(0, |(_, bit)| bit.number)
    }

    /// Whether reading it now keeps the sum of all readings in bounds.
    fn is_due(&self) -> bool {
        let may_end = self.bits.last().is_some_and(|(start, _)| self.text[*start..].contains(['}', '>', ']', ')']));
        let ratio = if may_end { 2 * READ_PER_BYTE } else { READ_PER_BYTE };
        self.n_read + self.text.len() <= FREE_BYTES + ratio * self.text.len()
    }

    /// What lies behind `end`, as text of its tokens.
    fn rest(mut self, end: usize) -> VecDeque<Bit> {
        let mut ends: Vec<usize> = self.bits.iter().skip(1).map(|&(start, _)| start).collect();
        ends.push(self.text.len());
        let bits = std::mem::take(&mut self.bits)
            .into_iter()
            .zip(ends)
            .filter(|&((start, _), until)| until > end || start >= end);
        let mut rest: VecDeque<Bit> = bits
            .map(|((start, bit), until)| {
                let token = bit.token.filter(|_| start >= end);
                Bit { token, text: self.text[start.max(end)..until].into(), ..bit }
            })
            .collect();
        if let Some(last) = rest.back_mut() {
            // The beginning of a character.
            last.text.extend_from_slice(&self.utf8.partial[..self.utf8.len]);
        }
        rest
    }
}

impl Reading {
    /// Whether the parser stopped before the end of what it was given.
    fn is_short(&self, length: usize) -> bool {
        self.state == ReadingState::Success && self.end < length
    }
}

impl Parts {
    fn tell(&mut self, event: CallEvent) {
        self.mark(Mark::Call(event));
    }
}

/// The bytes of the first character; a control token counts as one.
fn first_character(text: &[u8], hidden: bool) -> usize {
    if hidden {
        return text.len();
    }
    let continues = |byte: &u8| *byte & 0xC0 == 0x80;
    text.len().min(1 + text.iter().skip(1).take_while(|byte| continues(byte)).count())
}

/// An id for a call whose format has none: nine letters and digits, which is what the strictest templates want.
fn drawn_id() -> String {
    use std::hash::{BuildHasher, RandomState};
    const SIGNS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    let mut number = RandomState::new().hash_one(0u8);
    let sign = || {
        let sign = SIGNS[(number % 62) as usize];
        number /= 62;
        char::from(sign)
    };
    std::iter::repeat_with(sign).take(9).collect()
}

#[cfg(test)]
mod tests;

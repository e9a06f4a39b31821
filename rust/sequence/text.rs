//! Bytes of generated tokens in, text that may be published out.
//!
//! Text flows through four small stages, in this order:
//!
//! 1. [`Utf8Assembler`] holds back a character whose bytes have not all come, and puts U+FFFD where
//!    bytes are not UTF-8, as [`String::from_utf8_lossy`] of the whole would.
//! 2. `Stops` looks for stop strings and stop token lists and holds back what could still become one.
//! 3. `Trim` holds back whitespace that could turn out to be trailing.
//! 4. `Batcher` gathers tokens, so that pieces come in fewer, larger parts that split no grapheme.
//!
//! What is decoded but not published lies in one buffer, `Pending`. The stages move no text: each
//! answers with a position, "up to here it is mine no more", and the last one is published. Positions
//! count bytes from the start of the content. Nothing here knows threads, llama.cpp or a clock.
//!
//! [`segments`] has what a model says that reasons before it answers: two such streams behind one that
//! finds the borders. [`calls`] has what calls tools, before that.

pub mod calls;
pub mod segments;

use std::collections::VecDeque;

use unicode_segmentation::GraphemeCursor;

use crate::llama::Token;

/// A grapheme cluster that has grown to this many bytes is published without waiting for its end, so
/// that endless combining marks or joiners can neither hide all text nor make each token dearer.
/// The longest sequence that Unicode recommends (a family of emoji with skin tones) has 41 bytes.
pub const MAX_CLUSTER_BYTES: usize = 256;

// ------------------------------------------------------------------------------------- options

/// What is done to the text of one generation.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TextOptions {
    /// Texts that end the generation; empty ones are treated as absent.
    pub stop_strings: Vec<String>,
    /// Sequences of tokens that end the generation; empty ones are treated as absent.
    pub stop_tokens: Vec<Vec<Token>>,
    /// Drop whitespace at the end of the content.
    pub trim_trailing_whitespace: bool,
    /// Publish in larger pieces; `None` publishes whatever a token brings.
    pub batching: Option<Batching>,
}

/// When a piece is large or late enough to be published.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Batching {
    /// Publish once this many tokens have gathered since the last piece.
    pub tokens: u32,
    /// Publish with the first token that comes this many seconds or more after the last piece (after
    /// the first token, if there was no piece yet).
    pub interval: f64,
}

/// The stop that ended a generation. Its text is not part of the content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StopMatch {
    /// The stop string, or the text of the matched tokens (empty if they have none).
    pub stop: String,
    /// The matched tokens if a token list matched; empty for a stop string.
    pub tokens: Vec<Token>,
}

// -------------------------------------------------------------------------------------- stream

/// The text of one generation, from the pieces of its tokens.
///
/// Call [`prefix`](Self::prefix) first if there is a response prefix, [`push`](Self::push) for each
/// token, then [`finish`](Self::finish). All append to `out` what may be published now.
///
/// **Which stop wins.** Among stop strings the one that starts first; of those that start at the same
/// place, the longest that is complete when the place is decided. So a complete stop waits while one
/// that starts before it is still possible (`"bc"` in `abc`, with `"abcd"` also a stop), and for nothing
/// else (`"\n"` does not wait for `"\n\n"`). A token list matches with its last token and waits for
/// nothing; nor does a string wait for a list. When a list matches and a string is complete as well, the
/// earlier start wins, then the longer text, then the string.
pub struct TextStream {
    utf8: Utf8Assembler,
    stops: Option<Box<Stops>>,
    trim: Option<Trim>,
    batcher: Option<Batcher>,
    pending: Pending,
    /// Whether `trim` holds white space back for a while only.
    keeps_tail: bool,
    done: bool,
}

impl TextStream {
    /// A stream at the start of its content.
    pub fn new(options: TextOptions) -> Self {
        Self {
            utf8: Utf8Assembler::default(),
            stops: Stops::new(&options.stop_strings, options.stop_tokens).map(Box::new),
            trim: options.trim_trailing_whitespace.then(Trim::default),
            batcher: options.batching.map(Batcher::new),
            pending: Pending::default(),
            keeps_tail: false,
            done: false,
        }
    }

    /// Holds white space at the end back until more text follows or all text ends: it may turn out to stand before
    /// something that is no text.
    pub fn hold_tail(&mut self) {
        self.keeps_tail = self.trim.is_none();
        self.trim.get_or_insert_default();
    }

    /// Publishes what waits for a batch, and drops white space at the end: something else follows that is no text.
    pub fn drop_tail(&mut self, out: &mut String) {
        self.flush(out);
        let mut tail = String::new();
        self.pending.publish(self.pending.end(), &mut tail);
    }

    /// Publishes the response prefix: content like the rest, but no stop matches in it or across its end.
    ///
    /// To be called before the first token. Whitespace at its end is held back when trimming, its last
    /// grapheme when batching; neither waits for a batch to fill.
    pub fn prefix(&mut self, text: &str, out: &mut String) {
        debug_assert!(!self.done, "prefix after the end");
        self.pending.text.push_str(text);
        let limit = self.trimmed(self.pending.end());
        self.publish_clusters(limit, out);
    }

    /// Takes in one token and its bytes (none, part of a character or several, valid or not), at `now`
    /// seconds on any steady clock, and publishes what can be.
    ///
    /// A match ends the stream: all that precedes the stop has been published, and further calls do
    /// nothing.
    #[must_use = "a match ends the generation"]
    pub fn push(&mut self, token: Token, piece: &[u8], now: f64, out: &mut String) -> Option<StopMatch> {
        if self.done {
            return None;
        }
        if self.is_direct() {
            self.utf8.push(piece, out);
            return None;
        }
        self.push_staged(token, piece, now, out)
    }

    /// Publishes what waits for a batch or for the end of a grapheme, but neither what could become a stop nor what may
    /// be trimmed: other text comes before this one goes on.
    pub fn flush(&mut self, out: &mut String) {
        let end = self.pending.end();
        let free = self.stops.as_ref().map_or(end, |stops| stops.free(end));
        let limit = self.trimmed(free);
        self.pending.publish(limit, out);
    }

    /// Publishes all that was held back, for the generation ended without a stop.
    ///
    /// Returns the stop string that was complete but still waited for one that starts before it, if
    /// there is such: the content ends before it, and the generation did end by a stop.
    #[must_use = "a waiting stop string may have matched"]
    pub fn finish(&mut self, out: &mut String) -> Option<StopMatch> {
        if std::mem::replace(&mut self.done, true) {
            return None;
        }
        if self.is_direct() {
            self.utf8.finish(out);
            return None;
        }
        let at = self.pending.end();
        self.utf8.finish(&mut self.pending.text);
        let text = self.pending.since(at);
        let found = self.stops.as_mut().and_then(|stops| stops.finish(text, at));
        self.end(found, out)
    }

    /// Whether decoded text goes straight out.
    fn is_direct(&self) -> bool {
        // A prefix leaves nothing pending without trim and batching.
        self.stops.is_none() && self.trim.is_none() && self.batcher.is_none()
    }

    fn push_staged(&mut self, token: Token, piece: &[u8], now: f64, out: &mut String) -> Option<StopMatch> {
        let at = self.pending.end();
        self.utf8.push(piece, &mut self.pending.text);
        let text = self.pending.since(at);
        let stops = self.stops.as_mut();
        if let Some(found) = stops.and_then(|stops| stops.push(Some(token), text, at)) {
            self.done = true;
            return self.end(Some(found), out);
        }
        self.publish_due(now, out);
        None
    }

    /// Publishes what no stage holds back at `now`.
    fn publish_due(&mut self, now: f64, out: &mut String) {
        let end = self.pending.end();
        let free = self.stops.as_ref().map_or(end, |stops| stops.free(end));
        let limit = self.trimmed(free);
        let due = self.batcher.as_mut().is_none_or(|batcher| batcher.is_due(now));
        if due && self.publish_clusters(limit, out) {
            self.batcher.iter_mut().for_each(|batcher| batcher.restart(now));
        }
    }

    /// Where trailing whitespace begins in the content up to `position`, if that is to be trimmed.
    fn trimmed(&mut self, position: usize) -> usize {
        match &mut self.trim {
            Some(trim) => trim.limit(&self.pending, position),
            None => position,
        }
    }

    /// Publishes up to `limit`, with batching only whole graphemes. Whether anything was published.
    fn publish_clusters(&mut self, limit: usize, out: &mut String) -> bool {
        let limit = match self.batcher {
            Some(_) => self.pending.cluster_limit(limit),
            None => limit,
        };
        self.pending.publish(limit, out)
    }

    /// Publishes the tail: up to the stop if one was found, all otherwise.
    fn end(&mut self, found: Option<Found>, out: &mut String) -> Option<StopMatch> {
        let cut = found.as_ref().map_or(self.pending.end(), |found| found.start);
        let stop = found.map(|found| StopMatch {
            stop: self.pending.between(found.start, found.end).to_owned(),
            tokens: found.tokens,
        });
        let limit = if self.keeps_tail { cut } else { self.trimmed(cut) };
        self.pending.publish(limit, out);
        stop
    }
}

// ------------------------------------------------------------------------------------- pending

/// Text that is decoded but not published.
#[derive(Default)]
struct Pending {
    /// Published text that has not been cleared away yet, then the pending text.
    text: String,
    /// Where in `text` the pending text begins.
    start: usize,
    /// The position of that place in the content.
    published: usize,
}

impl Pending {
    fn as_str(&self) -> &str {
        &self.text[self.start..]
    }

    /// The position after the last decoded character.
    fn end(&self) -> usize {
        self.published + self.text.len() - self.start
    }

    fn since(&self, position: usize) -> &str {
        &self.text[self.index(position)..]
    }

    fn between(&self, start: usize, end: usize) -> &str {
        &self.text[self.index(start)..self.index(end)]
    }

    fn index(&self, position: usize) -> usize {
        position - self.published + self.start
    }

    /// Moves the text before `position` to `out`. Whether there was any.
    fn publish(&mut self, position: usize, out: &mut String) -> bool {
        if position <= self.published {
            return false;
        }
        out.push_str(self.between(self.published, position));
        self.start = self.index(position);
        self.published = position;
        self.clear_away();
        true
    }

    /// Forgets published text once it is at least half of the buffer: each byte moves a bounded number
    /// of times, however long the text that is held back.
    fn clear_away(&mut self) {
        if self.start == self.text.len() {
            self.text.clear();
            self.start = 0;
        } else if self.start * 2 >= self.text.len() {
            self.text.drain(..self.start);
            self.start = 0;
        }
    }

    /// The last position up to `limit` where a grapheme cluster surely ends.
    ///
    /// Whether a cluster ends somewhere depends on its own characters and on the one that follows, so
    /// what is held back counts as a witness, and the end of the known text decides nothing. Since
    /// pieces end where clusters do, the text before the pending one does not matter.
    fn cluster_limit(&self, limit: usize) -> usize {
        let (text, limit) = (self.as_str(), limit.saturating_sub(self.published));
        let whole = last_cluster_end(text, limit);
        if whole == 0 && limit >= MAX_CLUSTER_BYTES {
            return self.published + limit;
        }
        self.published + whole
    }
}

/// The last boundary of grapheme clusters in `text`, up to `limit` and before its end (0 if none).
fn last_cluster_end(text: &str, limit: usize) -> usize {
    if limit == 0 {
        return 0;
    }
    let mut cursor = GraphemeCursor::new(limit, text.len(), true);
    if limit < text.len() && cursor.is_boundary(text, 0) == Ok(true) {
        return limit;
    }
    // Neither call can fail, since the cursor sees all of the text.
    cursor.prev_boundary(text, 0).ok().flatten().unwrap_or(0)
}

// ---------------------------------------------------------------------------------------- utf8

/// Makes text of bytes that come in arbitrary parts: the parts join to what
/// [`String::from_utf8_lossy`] makes of all bytes, and no character is split.
#[derive(Debug, Clone, Default)]
pub struct Utf8Assembler {
    /// The start of a character; four bytes always decide.
    partial: [u8; 4],
    len: usize,
}

impl Utf8Assembler {
    /// Appends the characters that `bytes` completes.
    pub fn push(&mut self, bytes: &[u8], out: &mut String) {
        let rest = match self.len {
            0 => bytes,
            _ => self.complete(bytes, out),
        };
        match std::str::from_utf8(rest) {
            Ok(text) => out.push_str(text),
            Err(_) => self.push_lossy(rest, out),
        }
    }

    /// Appends U+FFFD if a character was left incomplete.
    pub fn finish(&mut self, out: &mut String) {
        if std::mem::take(&mut self.len) > 0 {
            out.push(char::REPLACEMENT_CHARACTER);
        }
    }

    /// Goes on with the character begun; returns the bytes that do not belong to it.
    fn complete<'a>(&mut self, bytes: &'a [u8], out: &mut String) -> &'a [u8] {
        for (index, &byte) in bytes.iter().enumerate() {
            self.partial[self.len] = byte;
            match std::str::from_utf8(&self.partial[..=self.len]) {
                Ok(text) => out.push_str(text),
                Err(error) if error.error_len().is_none() => {
                    self.len += 1;
                    continue;
                }
                Err(_) => {
                    // What was begun is one error; the byte that broke it starts anew.
                    self.finish(out);
                    return &bytes[index..];
                }
            }
            self.len = 0;
            return &bytes[index + 1..];
        }
        &[]
    }

    fn push_lossy(&mut self, bytes: &[u8], out: &mut String) {
        let mut left = bytes.len();
        for chunk in bytes.utf8_chunks() {
            out.push_str(chunk.valid());
            left -= chunk.valid().len() + chunk.invalid().len();
            match chunk.invalid() {
                [] => {}
                tail if left == 0 && is_incomplete(tail) => self.hold(tail),
                _ => out.push(char::REPLACEMENT_CHARACTER),
            }
        }
    }

    fn hold(&mut self, tail: &[u8]) {
        self.partial[..tail.len()].copy_from_slice(tail);
        self.len = tail.len();
    }
}

/// Whether more bytes could make these a character.
fn is_incomplete(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}

// --------------------------------------------------------------------------------------- stops

/// Where a stop lies in the content.
struct Found {
    start: usize,
    end: usize,
    /// The tokens of a token list.
    tokens: Vec<Token>,
}

/// Finds stop strings and stop token lists; see [`TextStream`] for which one wins.
struct Stops {
    strings: Option<StringStops>,
    lists: Option<ListStops>,
}

impl Stops {
    /// `None` if there is nothing to stop at.
    fn new(strings: &[String], lists: Vec<Vec<Token>>) -> Option<Self> {
        let strings = Automaton::new(strings.iter().map(String::as_bytes)).map(StringStops::new);
        let lists = Automaton::new(lists.iter().map(Vec::as_slice)).map(ListStops::new);
        (strings.is_some() || lists.is_some()).then_some(Self { strings, lists })
    }

    /// Takes in a token whose text starts at position `at`, or text that is not to count for lists.
    fn push(&mut self, token: Option<Token>, text: &str, at: usize) -> Option<Found> {
        let end = at + text.len();
        if let Some(strings) = &mut self.strings {
            strings.push(text, at);
        }
        let lists = self.lists.as_mut().zip(token);
        let list = lists.and_then(|(lists, token)| lists.push(token, at, end));
        match list {
            Some(list) => Some(self.earlier_string(&list).unwrap_or(list)),
            None => self.strings.as_mut()?.take_settled(end),
        }
    }

    /// Takes in the last text; what waited need not wait any longer.
    fn finish(&mut self, text: &str, at: usize) -> Option<Found> {
        let strings = self.strings.as_mut()?;
        strings.push(text, at);
        strings.best.take()
    }

    /// Forgets what was read: nothing matches across this place.
    fn reset(&mut self) {
        if let Some(strings) = &mut self.strings {
            (strings.node, strings.best) = (ROOT, None);
        }
        if let Some(lists) = &mut self.lists {
            lists.node = ROOT;
            lists.alive.clear();
        }
    }

    fn earlier_string(&mut self, list: &Found) -> Option<Found> {
        let best = &mut self.strings.as_mut()?.best;
        best.take_if(|found| (found.start, list.end) <= (list.start, found.end))
    }

    /// Up to where text can no longer be part of a stop, if `end` is the end of the known text.
    fn free(&self, end: usize) -> usize {
        let strings = self.strings.as_ref().map_or(end, |s| s.alive_from(end));
        let lists = self.lists.as_ref().map_or(end, |l| l.alive_from(end));
        strings.min(lists)
    }
}

/// Finds stop strings in text that comes in parts.
struct StringStops {
    automaton: Automaton<u8>,
    node: usize,
    /// Whether a stop string starts with this byte: most text is passed over with this alone.
    starts: [bool; 256],
    /// The stop string found that starts first.
    best: Option<Found>,
}

impl StringStops {
    fn new(automaton: Automaton<u8>) -> Self {
        let mut starts = [false; 256];
        for &(byte, _) in &automaton.nodes[ROOT].edges {
            starts[usize::from(byte)] = true;
        }
        Self { automaton, node: ROOT, starts, best: None }
    }

    fn push(&mut self, text: &str, at: usize) {
        for (position, &byte) in (at + 1..).zip(text.as_bytes()) {
            if self.node == ROOT && !self.starts[usize::from(byte)] {
                continue;
            }
            self.node = self.automaton.step(self.node, byte);
            let len = self.automaton.nodes[self.node].longest;
            if len > 0 {
                self.keep(position - len, position);
            }
        }
    }

    /// Remembers a stop string unless one is known that starts before it.
    fn keep(&mut self, start: usize, end: usize) {
        // With equal starts the later end is the longer string.
        if self.best.as_ref().is_none_or(|best| start <= best.start) {
            let tokens = Vec::new();
            self.best = Some(Found { start, end, tokens });
        }
    }

    /// The stop string found, once none that starts before it is possible any more.
    fn take_settled(&mut self, end: usize) -> Option<Found> {
        let alive = self.alive_from(end);
        self.best.take_if(|best| best.start <= alive)
    }

    /// Where the longest text that could still become a stop string starts.
    fn alive_from(&self, end: usize) -> usize {
        end - self.automaton.nodes[self.node].depth
    }
}

/// Finds stop token lists.
struct ListStops {
    automaton: Automaton<Token>,
    node: usize,
    /// The last tokens that could still become a token list, each with the position of its text. If
    /// the text starts within a character, that is the position of this character: it goes as well.
    alive: VecDeque<(Token, usize)>,
}

impl ListStops {
    fn new(automaton: Automaton<Token>) -> Self {
        Self { automaton, node: ROOT, alive: VecDeque::new() }
    }

    /// The longest list that this token completes.
    fn push(&mut self, token: Token, at: usize, end: usize) -> Option<Found> {
        self.node = self.automaton.step(self.node, token);
        let node = &self.automaton.nodes[self.node];
        self.alive.push_back((token, at));
        while self.alive.len() > node.depth {
            self.alive.pop_front();
        }
        (node.longest > 0).then(|| self.found(node.longest, end))
    }

    fn found(&self, len: usize, end: usize) -> Found {
        let first = self.alive.len() - len;
        Found { start: self.alive[first].1, end, tokens: self.alive.range(first..).map(|&(token, _)| token).collect() }
    }

    fn alive_from(&self, end: usize) -> usize {
        self.alive.front().map_or(end, |&(_, at)| at)
    }
}

// ----------------------------------------------------------------------------------- automaton

const ROOT: usize = 0;

/// The automaton of Aho and Corasick, fed symbol by symbol at amortised constant cost.
///
/// The `aho-corasick` crate does not say how deep a state is, and that is how much must be held back.
struct Automaton<S> {
    nodes: Vec<Node<S>>,
}

/// The longest end of what was read that some pattern starts with.
struct Node<S> {
    /// Sorted by symbol.
    edges: Vec<(S, usize)>,
    /// The node of the next shorter such end.
    fail: usize,
    /// Its length.
    depth: usize,
    /// The length of the longest pattern that ends here (0: none does).
    longest: usize,
}

impl<S: Copy + Ord> Automaton<S> {
    /// `None` if there is no pattern; empty ones do not count.
    fn new<'a>(patterns: impl Iterator<Item = &'a [S]>) -> Option<Self>
    where
        S: 'a,
    {
        let mut automaton = Self { nodes: vec![Node::at(0)] };
        patterns.for_each(|pattern| automaton.insert(pattern));
        automaton.link();
        (automaton.nodes.len() > 1).then_some(automaton)
    }

    fn insert(&mut self, pattern: &[S]) {
        let mut node = ROOT;
        for &symbol in pattern {
            node = self.child_or_new(node, symbol);
        }
        self.nodes[node].longest = pattern.len();
    }

    fn child_or_new(&mut self, node: usize, symbol: S) -> usize {
        match self.nodes[node].find(symbol) {
            Ok(index) => self.nodes[node].edges[index].1,
            Err(index) => {
                let child = self.nodes.len();
                self.nodes.push(Node::at(self.nodes[node].depth + 1));
                self.nodes[node].edges.insert(index, (symbol, child));
                child
            }
        }
    }

    /// Sets `fail` and the `longest` it passes on, shallow nodes first.
    fn link(&mut self) {
        let mut queue = VecDeque::from([ROOT]);
        while let Some(node) = queue.pop_front() {
            for index in 0..self.nodes[node].edges.len() {
                let (symbol, child) = self.nodes[node].edges[index];
                self.link_child(node, symbol, child);
                queue.push_back(child);
            }
        }
    }

    fn link_child(&mut self, node: usize, symbol: S, child: usize) {
        let fail = match node {
            ROOT => ROOT,
            _ => self.step(self.nodes[node].fail, symbol),
        };
        self.nodes[child].fail = fail;
        // A pattern that is the whole path is longer than any that is only its end.
        if self.nodes[child].longest == 0 {
            self.nodes[child].longest = self.nodes[fail].longest;
        }
    }

    fn step(&self, mut node: usize, symbol: S) -> usize {
        loop {
            let here = &self.nodes[node];
            match here.find(symbol) {
                Ok(index) => return here.edges[index].1,
                Err(_) if node == ROOT => return ROOT,
                Err(_) => node = here.fail,
            }
        }
    }
}

impl<S: Copy + Ord> Node<S> {
    fn at(depth: usize) -> Self {
        Self { edges: Vec::new(), fail: ROOT, depth, longest: 0 }
    }

    fn find(&self, symbol: S) -> Result<usize, usize> {
        self.edges.binary_search_by_key(&symbol, |edge| edge.0)
    }
}

// ---------------------------------------------------------------------------- trim and batching

/// Knows where trailing whitespace starts; looks at each character once.
#[derive(Default)]
struct Trim {
    /// The position after the last character that is no whitespace.
    solid: usize,
    /// The position up to which that is known.
    seen: usize,
}

impl Trim {
    /// Where whitespace at the end of the content up to `position` starts.
    fn limit(&mut self, pending: &Pending, position: usize) -> usize {
        let solid = pending.between(self.seen, position).trim_end().len();
        if solid > 0 {
            self.solid = self.seen + solid;
        }
        self.seen = position;
        self.solid
    }
}

/// Counts tokens and time since the last piece.
struct Batcher {
    options: Batching,
    tokens: u32,
    since: Option<f64>,
}

impl Batcher {
    fn new(options: Batching) -> Self {
        Self { options, tokens: 0, since: None }
    }

    /// Counts a token. Whether a piece is due with it.
    fn is_due(&mut self, now: f64) -> bool {
        self.tokens = self.tokens.saturating_add(1);
        let since = *self.since.get_or_insert(now);
        self.tokens >= self.options.tokens || now - since >= self.options.interval
    }

    fn restart(&mut self, now: f64) {
        self.tokens = 0;
        self.since = Some(now);
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use unicode_segmentation::UnicodeSegmentation;

    use super::*;

    // ------------------------------------------------------------------------------- helpers

    /// What a generation published with each push and at its end, and the stop it ended by.
    #[derive(Default)]
    struct Run {
        pieces: Vec<String>,
        stop: Option<StopMatch>,
        pushes: usize,
    }

    impl Run {
        fn content(&self) -> String {
            self.pieces.concat()
        }

        fn stop_text(&self) -> Option<&str> {
            self.stop.as_ref().map(|found| found.stop.as_str())
        }
    }

    /// Pushes every piece (as token 0, one second apart) and finishes.
    fn run<P: AsRef<[u8]>>(options: TextOptions, pieces: &[P]) -> Run {
        run_tokens(options, pieces.iter().map(|piece| (0, piece.as_ref())))
    }

    fn run_tokens<'a>(options: TextOptions, tokens: impl IntoIterator<Item = (Token, &'a [u8])>) -> Run {
        let mut stream = TextStream::new(options);
        let mut run = Run::default();
        for (token, piece) in tokens {
            let mut out = String::new();
            run.stop = stream.push(token, piece, run.pushes as f64, &mut out);
            run.pieces.push(out);
            run.pushes += 1;
            if run.stop.is_some() {
                break;
            }
        }
        let mut out = String::new();
        let late = stream.finish(&mut out);
        run.stop = run.stop.or(late);
        run.pieces.push(out);
        run
    }

    fn stops(strings: &[&str]) -> TextOptions {
        TextOptions { stop_strings: strings.iter().map(ToString::to_string).collect(), ..TextOptions::default() }
    }

    fn lists(lists: &[&[Token]]) -> TextOptions {
        TextOptions { stop_tokens: lists.iter().map(|list| list.to_vec()).collect(), ..TextOptions::default() }
    }

    fn batches(tokens: u32, interval: f64) -> TextOptions {
        TextOptions { batching: Some(Batching { tokens, interval }), ..TextOptions::default() }
    }

    fn trimming() -> TextOptions {
        TextOptions { trim_trailing_whitespace: true, ..TextOptions::default() }
    }

    // ------------------------------------------------------------- whole characters, plain path

    #[test]
    fn plain_text_comes_out_with_its_token_and_is_buffered_nowhere() {
        let mut stream = TextStream::new(TextOptions::default());
        let mut out = String::new();
        assert_eq!(stream.push(0, b"Once", 0.0, &mut out), None);
        assert_eq!(out, "Once");
        assert_eq!(stream.push(0, "€ upon".as_bytes(), 0.0, &mut out), None);
        assert_eq!(out, "Once€ upon");
        assert_eq!(stream.pending.text.capacity(), 0);
    }

    #[test]
    fn a_character_comes_out_with_its_last_byte() {
        let run = run(TextOptions::default(), &[&b"a\xf0\x9f"[..], b"\x98", b"", b"\x80b"]);
        assert_eq!(run.pieces, ["a", "", "", "😀b", ""]);
    }

    #[test]
    fn bytes_that_are_no_character_become_a_replacement_character() {
        let run = run(TextOptions::default(), &[&b"a\xe2\x82"[..], b"b\xff", b"c\xe2\x82"]);
        assert_eq!(run.pieces, ["a", "\u{fffd}b\u{fffd}", "c", "\u{fffd}"]);
    }

    // ------------------------------------------------------------------------------ stop strings

    #[test]
    fn a_stop_string_is_found_across_tokens_and_left_out() {
        let run = run(stops(&["</s>"]), &["Hi <", "/", "s> there"]);
        assert_eq!(run.pieces, ["Hi ", "", "", ""]);
        assert_eq!(run.stop_text(), Some("</s>"));
    }

    #[test]
    fn a_stop_string_is_found_across_the_bytes_of_its_characters() {
        let run = run(stops(&["€€"]), &[&b"a\xe2"[..], b"\x82\xac\xe2\x82", b"\xac", b"b"]);
        assert_eq!((run.content().as_str(), run.pushes), ("a", 3));
    }

    #[test]
    fn text_that_cannot_become_a_stop_string_is_out_at_once() {
        let run = run(stops(&["abcd"]), &["xab", "c", "a", "z", "abc"]);
        assert_eq!(run.pieces, ["x", "", "abc", "az", "", "abc"]);
        assert_eq!(run.stop, None);
    }

    #[test]
    fn the_stop_string_that_starts_first_wins() {
        let run = run(stops(&["bc", "abcd"]), &["xabc", "d", "never"]);
        assert_eq!(run.content(), "x");
        assert_eq!((run.stop_text(), run.pushes), (Some("abcd"), 2));
    }

    #[test]
    fn a_complete_stop_string_wins_when_the_one_before_it_fails() {
        let run = run(stops(&["bc", "abcd"]), &["xabc", "e", "never"]);
        assert_eq!(run.content(), "xa");
        assert_eq!((run.stop_text(), run.pushes), (Some("bc"), 2));
    }

    #[test]
    fn a_complete_stop_string_counts_at_the_end_of_the_generation() {
        let run = run(stops(&["bc", "abcd"]), &["xabc"]);
        assert_eq!(run.content(), "xa");
        assert_eq!(run.stop_text(), Some("bc"));
    }

    #[test]
    fn a_stop_string_does_not_wait_for_a_longer_one() {
        let split = run(stops(&["\n", "\n\n"]), &["a\n", "\n"]);
        assert_eq!((split.stop_text(), split.pushes), (Some("\n"), 1));
        let whole = run(stops(&["\n", "\n\n"]), &["a\n\n"]);
        assert_eq!(whole.content(), "a");
        assert_eq!(whole.stop_text(), Some("\n\n"));
    }

    #[test]
    fn an_empty_stop_is_no_stop() {
        let mut options = stops(&[""]);
        options.stop_tokens = vec![vec![]];
        let run = run(options, &["a", "b"]);
        assert_eq!(run.pieces, ["a", "b", ""]);
        assert_eq!(run.stop, None);
    }

    #[test]
    fn nothing_comes_after_a_stop() {
        let mut stream = TextStream::new(stops(&["x"]));
        let mut out = String::new();
        assert!(stream.push(0, b"axb", 0.0, &mut out).is_some());
        assert_eq!(stream.push(0, b"more", 0.0, &mut out), None);
        assert_eq!(stream.finish(&mut out), None);
        assert_eq!(out, "a");
    }

    // ------------------------------------------------------------------------------- token lists

    #[test]
    fn a_token_list_is_found_and_its_text_left_out() {
        let tokens: [(Token, &[u8]); 5] = [(1, b"a"), (2, b"b"), (3, b"c"), (2, b"b"), (4, b"d")];
        let run = run_tokens(lists(&[&[2, 4]]), tokens);
        assert_eq!(run.pieces, ["a", "", "bc", "", "", ""]);
        let found = run.stop.expect("the list matches");
        assert_eq!((found.stop.as_str(), found.tokens), ("bd", vec![2, 4]));
    }

    #[test]
    fn a_token_without_text_ends_a_generation() {
        let run = run_tokens(lists(&[&[9]]), [(1, &b"a"[..]), (9, b""), (1, b"a")]);
        assert_eq!(run.content(), "a");
        assert_eq!(run.stop_text(), Some(""));
    }

    #[test]
    fn a_token_list_does_not_wait_for_a_string_that_may_come() {
        let mut options = lists(&[&[9]]);
        options.stop_strings = vec!["<end>".into()];
        let run = run_tokens(options, [(1, &b"a<e"[..]), (9, b""), (1, b"nd>")]);
        assert_eq!((run.content().as_str(), run.pushes), ("a<e", 2));
    }

    #[test]
    fn a_character_begun_before_a_token_list_goes_with_it() {
        let run = run_tokens(lists(&[&[7]]), [(1, &b"a\xe2"[..]), (7, b"\x82\xac"), (1, b"b")]);
        assert_eq!((run.content().as_str(), run.pushes), ("a", 2));
    }

    #[test]
    fn of_a_string_and_a_token_list_the_one_that_starts_first_wins() {
        let tokens = [(1, &b"a"[..]), (2, b"bx"), (3, b"c")];
        let mut options = lists(&[&[2, 3]]);
        options.stop_strings = vec!["xc".into()];
        let run = run_tokens(options.clone(), tokens);
        assert_eq!(run.stop_text(), Some("bxc"));
        options.stop_strings = vec!["abxc".into()];
        let run = run_tokens(options, tokens);
        assert_eq!(run.stop_text(), Some("abxc"));
    }

    // ---------------------------------------------------------------------- prefix and whitespace

    #[test]
    fn the_prefix_comes_first_and_no_stop_matches_in_it_or_across_its_end() {
        let mut stream = TextStream::new(stops(&["ab"]));
        let mut out = String::new();
        stream.prefix("ab a", &mut out);
        assert_eq!(out, "ab a");
        assert_eq!(stream.push(0, b"b", 0.0, &mut out), None);
        assert!(stream.push(0, b"ab", 0.0, &mut out).is_some());
        assert_eq!(out, "ab ab");
    }

    #[test]
    fn a_prefix_does_not_wait_for_a_batch_but_for_the_end_of_its_last_grapheme() {
        let mut stream = TextStream::new(batches(10, 9.0));
        let mut out = String::new();
        stream.prefix("Answer", &mut out);
        assert_eq!(out, "Answe");
    }

    #[test]
    fn trailing_whitespace_is_held_until_more_text_comes() {
        let run = run(trimming(), &["a ", "\n", "b\u{3000}", " "]);
        assert_eq!(run.pieces, ["a", "", " \nb", "", ""]);
    }

    #[test]
    fn whitespace_before_a_stop_is_trimmed_too() {
        let mut options = stops(&["END"]);
        options.trim_trailing_whitespace = true;
        assert_eq!(run(options, &["a \n", "E", "ND"]).content(), "a");
    }

    #[test]
    fn whitespace_at_the_end_of_the_prefix_is_trimmed_if_nothing_follows() {
        let mut stream = TextStream::new(trimming());
        let mut out = String::new();
        stream.prefix("Answer: ", &mut out);
        assert_eq!(stream.finish(&mut out), None);
        assert_eq!(out, "Answer:");
    }

    // ---------------------------------------------------------------------------------- batching

    #[test]
    fn a_batch_is_full_after_its_tokens_and_keeps_the_last_grapheme() {
        let run = run(batches(3, 100.0), &["ab", "cd", "ef", "g", "h", "i", "j"]);
        assert_eq!(run.pieces, ["", "", "abcde", "", "", "fgh", "", "ij"]);
    }

    #[test]
    fn a_batch_is_late_after_its_interval() {
        let run = run(batches(100, 2.0), &["a", "b", "c", "d", "e"]);
        assert_eq!(run.pieces, ["", "", "ab", "", "cd", "e"]);
    }

    #[test]
    fn a_family_of_emoji_is_one_piece() {
        let family = "\u{1f469}\u{200d}\u{1f469}\u{200d}\u{1f467}";
        let characters: Vec<String> = family.chars().chain(['!']).map(String::from).collect();
        let run = run(batches(1, 0.0), &characters);
        assert_eq!(run.pieces, ["", "", "", "", "", family, "!"]);
    }

    #[test]
    fn held_back_text_decides_where_a_grapheme_ends() {
        let mut options = batches(1, 0.0);
        options.stop_strings = vec!["\nUser".into()];
        let run = run(options, &["a", "b\n", "!"]);
        assert_eq!(run.pieces, ["", "ab", "\n", "!"]);
    }

    #[test]
    fn an_endless_grapheme_comes_out_in_bounded_pieces() {
        let mut pieces = vec!["\u{301}"; 100_000];
        pieces[0] = "a";
        let run = run(batches(1, 0.0), &pieces);
        let longest = run.pieces.iter().map(String::len).max();
        assert!(longest <= Some(MAX_CLUSTER_BYTES + 1));
        assert_eq!(run.content(), pieces.concat());
    }

    // -------------------------------------------------------------------------------- properties

    /// Characters of one to four bytes that start alike, join to graphemes or are whitespace.
    const CHARACTERS: &str =
        "aabc \n\ré€₭\u{1f469}\u{1f3fd}\u{200d}\u{301}\u{1f1e9}\u{1f1ea}\u{915}\u{94d}\u{fffd}\u{3000}";

    fn text(max: usize) -> impl Strategy<Value = String> {
        let characters: Vec<char> = CHARACTERS.chars().collect();
        vec(prop::sample::select(characters), 0..max).prop_map(String::from_iter)
    }

    /// Text with some bytes broken.
    fn bytes(max: usize) -> impl Strategy<Value = Vec<u8>> {
        let broken = vec((any::<prop::sample::Index>(), any::<u8>()), 0..4);
        (text(max), broken).prop_map(|(text, broken)| {
            let mut bytes = text.into_bytes();
            let len = bytes.len();
            for (index, byte) in broken.into_iter().filter(|_| len > 0) {
                bytes[index.index(len)] = byte;
            }
            bytes
        })
    }

    /// Bytes cut into pieces anywhere, some of them empty.
    fn pieces(bytes: impl Strategy<Value = Vec<u8>>) -> impl Strategy<Value = Vec<Vec<u8>>> {
        (bytes, vec(0..6_usize, 1..12)).prop_map(|(bytes, lens)| cut(&bytes, &lens))
    }

    fn cut(mut bytes: &[u8], lens: &[usize]) -> Vec<Vec<u8>> {
        let mut pieces = Vec::new();
        for len in lens.iter().copied().chain([1]).cycle() {
            if bytes.is_empty() {
                break;
            }
            let (piece, rest) = bytes.split_at(len.min(bytes.len()));
            pieces.push(piece.to_vec());
            bytes = rest;
        }
        pieces
    }

    fn stop_set() -> impl Strategy<Value = Vec<String>> {
        vec(text(5), 0..5)
    }

    fn batching() -> impl Strategy<Value = Batching> {
        (1..6_u32, 1..6_u32).prop_map(|(tokens, interval)| Batching { tokens, interval: interval.into() })
    }

    /// The characters that are complete in `bytes`.
    fn decoded(bytes: &[u8]) -> String {
        let mut text = String::from_utf8_lossy(bytes).into_owned();
        let last = bytes.utf8_chunks().last();
        if last.is_some_and(|chunk| is_incomplete(chunk.invalid())) {
            text.pop();
        }
        text
    }

    /// Where the first complete stop starts.
    fn first_complete(text: &str, stops: &[String]) -> Option<usize> {
        let stops = stops.iter().filter(|stop| !stop.is_empty());
        stops.filter_map(|stop| text.find(stop.as_str())).min()
    }

    /// Where the longest end of `text` starts that could still become a stop.
    fn first_possible(text: &str, stops: &[String]) -> usize {
        let proper = |stop: &String, end: &str| stop.len() > end.len() && stop.starts_with(end);
        let possible = |at: &usize| stops.iter().any(|stop| proper(stop, &text[*at..]));
        let mut starts = text.char_indices().map(|(at, _)| at);
        starts.find(possible).unwrap_or(text.len())
    }

    /// The content that these bytes must have, however they are cut.
    fn expected(bytes: &[u8], stops: &[String], trim: bool) -> String {
        let text = String::from_utf8_lossy(bytes);
        let content = &text[..first_complete(&text, stops).unwrap_or(text.len())];
        let content = if trim { content.trim_end() } else { content };
        content.to_owned()
    }

    fn is_cluster_end(text: &str, at: usize) -> bool {
        at == text.len() || text.grapheme_indices(true).any(|(start, _)| start == at)
    }

    /// The text of a test's tokens.
    fn text_of(tokens: &[Token]) -> String {
        const TEXTS: [&str; 4] = ["", "a", "bb", "€"];
        tokens.iter().map(|&token| TEXTS[token as usize]).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn any_bytes_in_any_parts_become_their_lossy_text(
            parts in vec(prop_oneof![vec(any::<u8>(), 0..5), vec(0x80..0xf8_u8, 0..5), bytes(4)], 0..12),
        ) {
            let whole = parts.concat();
            let run = run(TextOptions::default(), &parts);
            prop_assert_eq!(run.content(), String::from_utf8_lossy(&whole));
        }

        #[test]
        fn any_options_publish_the_text_before_the_first_stop(
            pieces in pieces(bytes(24)),
            stop_strings in stop_set(),
            trim_trailing_whitespace in any::<bool>(),
            batching in prop::option::of(batching()),
        ) {
            let expected = expected(&pieces.concat(), &stop_strings, trim_trailing_whitespace);
            let options = TextOptions { stop_strings, trim_trailing_whitespace, batching, ..TextOptions::default() };
            prop_assert_eq!(run(options, &pieces).content(), expected);
        }

        #[test]
        fn only_what_can_become_a_stop_is_held_back_and_only_while_it_can(
            pieces in pieces(bytes(24)),
            stop_strings in stop_set(),
        ) {
            let options = TextOptions { stop_strings: stop_strings.clone(), ..TextOptions::default() };
            let mut stream = TextStream::new(options);
            let (mut seen, mut out) = (Vec::new(), String::new());
            for piece in &pieces {
                seen.extend_from_slice(piece);
                let text = decoded(&seen);
                let possible = first_possible(&text, &stop_strings);
                let complete = first_complete(&text, &stop_strings).filter(|&start| start <= possible);
                let found = stream.push(0, piece, 0.0, &mut out);
                prop_assert_eq!(found.is_some(), complete.is_some());
                prop_assert_eq!(&out, &text[..complete.unwrap_or(possible)]);
                if let Some(found) = found {
                    let matched = stop_strings.iter().filter(|stop| text[out.len()..].starts_with(*stop));
                    prop_assert_eq!(Some(&found.stop), matched.max_by_key(|stop| stop.len()));
                    break;
                }
            }
        }

        #[test]
        fn token_lists_match_with_their_last_token_and_hold_back_no_more_than_they_must(
            tokens in vec(0..4_i32, 0..24),
            stop_tokens in vec(vec(0..4_i32, 0..4), 0..4),
        ) {
            let options = TextOptions { stop_tokens: stop_tokens.clone(), ..TextOptions::default() };
            let mut stream = TextStream::new(options);
            let mut out = String::new();
            for (index, &token) in tokens.iter().enumerate() {
                let seen = &tokens[..=index];
                let matched = stop_tokens.iter().filter(|list| !list.is_empty() && seen.ends_with(list));
                let longest = matched.max_by_key(|list| list.len());
                let possible = |at: &usize| stop_tokens.iter().any(|list| list.starts_with(&seen[*at..]));
                let possible = (0..seen.len()).find(possible).unwrap_or(seen.len());
                let cut = longest.map_or(possible, |list| seen.len() - list.len());
                let found = stream.push(token, text_of(&[token]).as_bytes(), 0.0, &mut out);
                prop_assert_eq!(found.as_ref().map(|found| &found.tokens), longest);
                prop_assert_eq!(&out, &text_of(&seen[..cut]));
                if let Some(found) = found {
                    prop_assert_eq!(found.stop, text_of(&found.tokens));
                    break;
                }
            }
        }

        #[test]
        fn only_whitespace_at_the_end_is_held_when_trimming(pieces in pieces(bytes(24))) {
            let mut stream = TextStream::new(trimming());
            let (mut seen, mut out) = (Vec::new(), String::new());
            for piece in &pieces {
                seen.extend_from_slice(piece);
                prop_assert_eq!(stream.push(0, piece, 0.0, &mut out), None);
                let text = decoded(&seen);
                prop_assert_eq!(&out, text.trim_end());
            }
        }

        #[test]
        fn batches_end_where_graphemes_of_the_whole_text_end(
            pieces in pieces(text(40).prop_map(String::into_bytes)),
            stop_strings in stop_set(),
            trim_trailing_whitespace in any::<bool>(),
            batching in batching(),
        ) {
            let batching = Some(batching);
            let options = TextOptions { stop_strings, trim_trailing_whitespace, batching, ..TextOptions::default() };
            let run = run(options, &pieces);
            let (content, mut end) = (run.content(), 0);
            for piece in &run.pieces {
                end += piece.len();
                prop_assert!(is_cluster_end(&content, end), "{} in {:?}", end, content);
            }
        }

        #[test]
        fn a_full_batch_holds_back_its_last_grapheme_only(
            pieces in pieces(text(40).prop_map(String::into_bytes)),
        ) {
            let mut stream = TextStream::new(batches(1, 0.0));
            let (mut seen, mut out) = (Vec::new(), String::new());
            for piece in &pieces {
                seen.extend_from_slice(piece);
                prop_assert_eq!(stream.push(0, piece, 0.0, &mut out), None);
                let text = decoded(&seen);
                let last = text.grapheme_indices(true).next_back().map_or(0, |(start, _)| start);
                prop_assert_eq!(&out, &text[..last]);
            }
        }
    }
}

//! Generated text, cut into reasoning and content.
//!
//! A start tag opens a segment of reasoning, an end tag closes it; a prompt may have opened the first.
//! The tags are no text, nor is the whitespace after one, that between the beginning and a start tag, or
//! that before an end tag. All else is reasoning or content, and both go through a [`TextStream`] of
//! their own, so that whitespace, graphemes and batches are treated in them as anywhere.
//!
//! Stops end content only. Reasoning names what it shall stop at, quotes the question and has empty
//! lines: a stop that counted there would lose the answer. Neither tags nor stops match across a border.
//!
//! What is decoded but could still become a tag or a stop waits in one buffer. Once `budget` tokens of
//! reasoning have come, the tokens in `closing` follow whatever the model would draw: see
//! [`Segments::forced`].

use std::collections::VecDeque;

use super::calls::CallEvent;
use super::{Batching, Found, Pending, StopMatch, Stops, TextOptions, TextStream, Utf8Assembler};
use crate::llama::Token;

/// Tokens more than the budget that a character gets to become whole.
const CHARACTER_TOKENS: usize = 3;

/// A text that opens or closes reasoning.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Tag {
    /// The text. Empty: there is no such tag.
    pub text: String,
    /// Its tokens where the vocabulary has them as wholes, which need not show as text: then these are
    /// looked for, and not the text.
    pub tokens: Vec<Token>,
}

/// How reasoning is told from content.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SegmentOptions {
    /// Opens a segment.
    pub start: Tag,
    /// Closes it.
    pub end: Tag,
    /// Whether the prompt ends inside a segment.
    pub opened: bool,
    /// Tokens that a segment may have before it is closed; `None` has no limit.
    pub budget: Option<usize>,
    /// The tokens that close it then.
    pub closing: Vec<Token>,
}

/// What happens between two stretches of text. Tokens are counted from the first that was pushed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mark {
    /// Reasoning begins, with this token.
    Open {
        /// The first token of the tag.
        token: usize,
    },
    /// Reasoning has ended, before this token.
    Close {
        /// The token after the tag.
        token: usize,
        /// Whether the budget was used up.
        forced: bool,
    },
    /// Content begins in this token.
    Content {
        /// The token of its first character.
        token: usize,
    },
    /// A tool is called.
    Call(CallEvent),
}

/// Text that may be published, and the marks in it, each with the byte before which it stands.
#[derive(Debug, Default, PartialEq)]
pub struct Parts {
    /// Reasoning and content as they come.
    pub text: String,
    /// In the order of the text.
    pub marks: Vec<(usize, Mark)>,
}

impl Parts {
    /// Forgets everything.
    pub fn clear(&mut self) {
        self.text.clear();
        self.marks.clear();
    }

    /// Puts a mark behind the text.
    pub(super) fn mark(&mut self, mark: Mark) {
        self.marks.push((self.text.len(), mark));
    }
}

/// Looks for the tag of one side, and in content for stops too.
struct Finder {
    stops: Option<Box<Stops>>,
    tag: Tag,
}

impl Finder {
    /// A tag that is also a stop is a stop.
    fn new(tag: &Tag, strings: &[String], lists: &[Vec<Token>]) -> Self {
        let (mut strings, mut lists) = (strings.to_vec(), lists.to_vec());
        let is_stop = match tag.tokens.is_empty() {
            true => strings.contains(&tag.text),
            false => lists.contains(&tag.tokens),
        };
        let tag = if is_stop { Tag::default() } else { tag.clone() };
        match tag.tokens.is_empty() {
            true => strings.push(tag.text.clone()),
            false => lists.push(tag.tokens.clone()),
        }
        Self { stops: Stops::new(&strings, lists).map(Box::new), tag }
    }

    fn push(&mut self, token: Option<Token>, text: &str, at: usize) -> Option<Found> {
        self.stops.as_mut()?.push(token, text, at)
    }

    fn finish(&mut self, text: &str, at: usize) -> Option<Found> {
        self.stops.as_mut()?.finish(text, at)
    }

    fn free(&self, end: usize) -> usize {
        self.stops.as_ref().map_or(end, |stops| stops.free(end))
    }

    fn reset(&mut self) {
        if let Some(stops) = &mut self.stops {
            stops.reset();
        }
    }

    fn begins_with(&self, token: Token) -> bool {
        self.tag.tokens.first() == Some(&token)
    }

    /// Whether what was found, which has this text, is the tag.
    fn is_tag(&self, found: &Found, text: &str) -> bool {
        match found.tokens.is_empty() {
            true => self.tag.tokens.is_empty() && text == self.tag.text,
            false => found.tokens == self.tag.tokens,
        }
    }
}

/// Which token each pending character began in.
#[derive(Default)]
struct Origins {
    /// The token of text that is older than the first entry.
    first: usize,
    /// Where the text of a token starts, and which it is.
    starts: VecDeque<(usize, usize)>,
}

impl Origins {
    fn token_at(&self, position: usize) -> usize {
        let place = self.starts.partition_point(|&(start, _)| start <= position).saturating_sub(1);
        self.starts.get(place).map_or(self.first, |&(_, token)| token)
    }

    /// The next token is this one; nothing is pending.
    fn restart(&mut self, token: usize) {
        self.starts.clear();
        self.first = token;
    }

    /// Drops the tokens whose text lies before `position` as a whole.
    fn forget(&mut self, position: usize) {
        while self.starts.get(1).is_some_and(|&(next, _)| next <= position) {
            self.starts.pop_front();
        }
    }
}

/// What becomes of whitespace that comes next.
#[derive(Clone, Copy, PartialEq)]
enum Blank {
    /// It is text.
    Shown,
    /// It comes after a tag.
    Dropped,
    /// A start tag may follow, which drops it; up to this position there is nothing else.
    Held(usize),
}

/// The text of one generation that may reason.
///
/// Call [`begin`](Self::begin), then [`push`](Self::push) for each token, then
/// [`finish`](Self::finish). Text that was published never changes sides, whatever comes.
pub struct Segments {
    utf8: Utf8Assembler,
    pending: Pending,
    origins: Origins,
    /// For content and for reasoning.
    finders: [Finder; 2],
    /// For content in which no tag is looked for any more.
    settled: Option<Finder>,
    content: TextStream,
    reasoning: TextStream,
    batching: Option<Batching>,
    opened: bool,
    inside: bool,
    blank: Blank,
    has_content: bool,
    n_tokens: usize,
    /// Tokens that came in this segment.
    n_reasoned: usize,
    budget: Option<usize>,
    closing: Vec<Token>,
    /// How many of `closing` have come, once they are due.
    n_forced: Option<usize>,
    /// Whether calls are looked for before text comes here: then what follows reasoning within a token goes back.
    precedes_calls: bool,
    /// What goes back, and the token it belongs to.
    rest: Option<(usize, Vec<u8>)>,
    scratch: String,
    done: bool,
}

impl Segments {
    /// A stream at the start of its answer.
    pub fn new(options: SegmentOptions, text: TextOptions) -> Self {
        let outside = Finder::new(&options.start, &text.stop_strings, &text.stop_tokens);
        let inside = Finder::new(&options.end, &[], &[]);
        let settled = Finder::new(&Tag::default(), &text.stop_strings, &text.stop_tokens);
        let content = TextOptions { stop_strings: Vec::new(), stop_tokens: Vec::new(), ..text };
        Self {
            utf8: Utf8Assembler::default(),
            pending: Pending::default(),
            origins: Origins::default(),
            finders: [outside, inside],
            settled: Some(settled),
            batching: content.batching,
            content: TextStream::new(content),
            reasoning: TextStream::new(TextOptions::default()),
            opened: options.opened,
            inside: false,
            blank: Blank::Held(0),
            has_content: false,
            n_tokens: 0,
            n_reasoned: 0,
            budget: options.budget,
            closing: options.closing,
            n_forced: None,
            precedes_calls: false,
            rest: None,
            scratch: String::new(),
            done: false,
        }
    }

    /// Says that text was searched for calls before it comes here.
    pub fn precede_calls(&mut self) {
        self.precedes_calls = true;
        self.content.hold_tail();
    }

    /// Opens the segment that the prompt has opened and publishes the response prefix, in which tags count by their
    /// text. No stop matches in it, and nothing across its end.
    pub fn begin(&mut self, prefix: &str, out: &mut Parts) {
        if self.opened {
            self.open(0, out);
        }
        let mut rest = prefix;
        while let Some((before, after)) = self.split_at_tag(rest) {
            if !before.chars().all(is_blank) {
                self.show_prefix(before, out);
            }
            match self.inside {
                true => self.close(0, false, out),
                false => self.open(0, out),
            }
            rest = after;
        }
        self.show_prefix(rest, out);
        self.close_if_exhausted(0.0, out);
    }

    fn split_at_tag<'a>(&self, text: &'a str) -> Option<(&'a str, &'a str)> {
        let tag = self.finders[usize::from(self.inside)].tag.text.as_str();
        if tag.is_empty() { None } else { text.split_once(tag) }
    }

    fn show_prefix(&mut self, text: &str, out: &mut Parts) {
        let text = if self.blank == Blank::Dropped { text.trim_start_matches(is_blank) } else { text };
        if text.is_empty() {
            return;
        }
        self.blank = Blank::Shown;
        self.note_content(0, out);
        self.stream().prefix(text, &mut out.text);
    }

    /// The token that comes next, whatever the model would draw.
    pub fn forced(&self) -> Option<Token> {
        self.n_forced.and_then(|n_forced| self.closing.get(n_forced).copied())
    }

    /// Whether reasoning is going on.
    pub fn is_inside(&self) -> bool {
        self.inside
    }

    /// From the next token on all is content, whatever it says.
    pub fn settle(&mut self) {
        let Some(mut settled) = self.settled.take() else { return };
        // What is pending may be the beginning of a stop.
        let pending = self.pending.published;
        let _ = settled.push(None, self.pending.since(pending), pending);
        self.finders[0] = settled;
    }

    /// Takes in one token and its bytes, as [`TextStream::push`] does.
    #[must_use = "a match ends the generation"]
    pub fn push(&mut self, token: Token, piece: &[u8], now: f64, out: &mut Parts) -> Option<StopMatch> {
        self.take(self.n_tokens, Some(token), piece, now, out)
    }

    /// Takes in the text of the token with this number: all of it, or without its name more of it.
    #[must_use = "a match ends the generation"]
    pub fn take(
        &mut self,
        number: usize,
        token: Option<Token>,
        piece: &[u8],
        now: f64,
        out: &mut Parts,
    ) -> Option<StopMatch> {
        if self.done {
            return None;
        }
        self.n_tokens = number + 1;
        if let Some(n_forced) = self.n_forced {
            self.push_forced(n_forced + 1, out);
            return None;
        }
        self.n_reasoned += usize::from(self.inside && token.is_some());
        let found = self.push_drawn(token, piece, now, out);
        if found.is_none() {
            self.close_if_exhausted(now, out);
        }
        found
    }

    /// A token of the closing text has come. Its text is a tag's: nobody sees or searches it.
    fn push_forced(&mut self, n_forced: usize, out: &mut Parts) {
        self.origins.restart(self.n_tokens);
        self.n_forced = (n_forced < self.closing.len()).then_some(n_forced);
        if self.n_forced.is_none() {
            self.close(self.n_tokens, true, out);
        }
    }

    fn push_drawn(&mut self, token: Option<Token>, piece: &[u8], now: f64, out: &mut Parts) -> Option<StopMatch> {
        let at = self.decode(token, piece);
        let mut at = self.skip_blank(at);
        // Text after a tag belongs to no token that a list could name.
        let mut name = token;
        while let Some(found) = self.finders[usize::from(self.inside)].push(name, self.pending.since(at), at) {
            if !self.is_tag(&found) {
                return Some(self.stop(found, now, out));
            }
            self.cross(&found, now, out);
            if self.precedes_calls && !self.inside {
                self.give_back(found.end);
                return None;
            }
            (at, name) = (self.skip_blank(found.end), None);
        }
        let limit = self.finders[usize::from(self.inside)].free(self.pending.end());
        self.release(limit, now, out);
        None
    }

    /// Adds the characters that a token completes to the pending text; returns where they start.
    fn decode(&mut self, token: Option<Token>, piece: &[u8]) -> usize {
        if token.is_some_and(|token| self.finders[usize::from(self.inside)].begins_with(token)) {
            // A tag without text must not join what stands before and after it.
            self.utf8.finish(&mut self.pending.text);
        }
        let begun = self.utf8.len > 0;
        let at = self.pending.end();
        self.utf8.push(piece, &mut self.pending.text);
        // The character that was begun belongs to the token that began it.
        let first = self.pending.since(at).chars().next().map_or(1, char::len_utf8);
        self.origins.starts.push_back((at + if begun { first } else { 0 }, self.n_tokens - 1));
        at
    }

    /// Publishes all that was held back, for the generation ended without a stop.
    ///
    /// Returns a stop string that was complete but still waited, as [`TextStream::finish`] does.
    #[must_use = "a waiting stop string may have matched"]
    pub fn finish(&mut self, out: &mut Parts) -> Option<StopMatch> {
        if self.done {
            return None;
        }
        let stop = self.drain(out);
        if stop.is_none() {
            self.end(self.pending.end(), 0.0, out);
        }
        stop
    }

    /// Finds what waited for a tag or stop that could still begin before it.
    fn drain(&mut self, out: &mut Parts) -> Option<StopMatch> {
        let mut at = self.pending.end();
        self.utf8.finish(&mut self.pending.text);
        while let Some(found) = self.finders[usize::from(self.inside)].finish(self.pending.since(at), at) {
            if !self.is_tag(&found) {
                return Some(self.stop(found, 0.0, out));
            }
            self.cross(&found, 0.0, out);
            at = self.skip_blank(found.end);
        }
        None
    }

    /// Publishes what precedes a stop, and nothing more.
    fn stop(&mut self, found: Found, now: f64, out: &mut Parts) -> StopMatch {
        let stop = self.pending.between(found.start, found.end).to_owned();
        self.end(found.start, now, out);
        StopMatch { stop, tokens: found.tokens }
    }

    fn end(&mut self, limit: usize, now: f64, out: &mut Parts) {
        if matches!(self.blank, Blank::Held(_)) {
            self.blank = Blank::Shown;
        }
        self.release(limit, now, out);
        self.finish_stream(out);
        self.done = true;
    }

    // ---- calls ---------------------------------------------------------------------------------

    /// Whether the prompt opened a segment.
    pub fn begins_inside(&self) -> bool {
        self.opened
    }

    /// Lets go of the text behind the end of reasoning: it is searched first.
    fn give_back(&mut self, from: usize) {
        let mut text = self.pending.since(from).as_bytes().to_vec();
        text.extend_from_slice(&self.utf8.partial[..self.utf8.len]);
        self.utf8.len = 0;
        self.drop_text(self.pending.end());
        self.rest = Some((self.n_tokens - 1, text)).filter(|(_, text)| !text.is_empty());
    }

    /// Whether there is text to take back.
    pub fn has_rest(&self) -> bool {
        self.rest.is_some()
    }

    /// Takes text back that came behind the end of reasoning, with the number of its token.
    pub fn take_rest(&mut self) -> Option<(usize, Vec<u8>)> {
        self.rest.take()
    }

    /// Publishes the content that was held back, but for white space at its end: a call comes, with this token.
    ///
    /// Returns a stop string that was complete but still waited, as [`finish`](Self::finish) does.
    #[must_use = "a waiting stop string may have matched"]
    pub fn interrupt(&mut self, token: usize, out: &mut Parts) -> Option<StopMatch> {
        if let Some(stop) = self.drain(out) {
            return Some(stop);
        }
        if matches!(self.blank, Blank::Held(_)) {
            self.drop_text(self.pending.end());
        } else {
            self.release(self.pending.end(), 0.0, out);
        }
        self.finders[usize::from(self.inside)].reset();
        self.content.drop_tail(&mut out.text);
        self.note_content(token, out);
        None
    }

    /// A call has ended: white space behind it is nothing.
    pub fn follow_call(&mut self) {
        self.blank = Blank::Dropped;
    }

    // ---- borders -------------------------------------------------------------------------------

    fn is_tag(&self, found: &Found) -> bool {
        let text = self.pending.between(found.start, found.end);
        self.finders[usize::from(self.inside)].is_tag(found, text)
    }

    /// Goes over to the other side.
    fn cross(&mut self, tag: &Found, now: f64, out: &mut Parts) {
        let (first, next) = match tag.tokens.len() {
            0 => (self.origins.token_at(tag.start), self.origins.token_at(tag.end - 1) + 1),
            n => (self.n_tokens - n, self.n_tokens),
        };
        self.release(tag.start, now, out);
        self.drop_text(tag.end);
        match self.inside {
            true => self.close(next, false, out),
            false => self.open(first, out),
        }
    }

    fn open(&mut self, token: usize, out: &mut Parts) {
        self.content.flush(&mut out.text);
        out.mark(Mark::Open { token });
        self.reasoning = TextStream::new(TextOptions {
            trim_trailing_whitespace: true,
            batching: self.batching,
            ..TextOptions::default()
        });
        self.n_reasoned = 0;
        self.turn(true);
    }

    fn close(&mut self, token: usize, forced: bool, out: &mut Parts) {
        self.finish_stream(out);
        out.mark(Mark::Close { token, forced });
        self.turn(false);
    }

    fn turn(&mut self, inside: bool) {
        self.inside = inside;
        self.blank = Blank::Dropped;
        self.finders[usize::from(inside)].reset();
    }

    /// Has the segment closed once its budget is used up, but not within a character.
    fn close_if_exhausted(&mut self, now: f64, out: &mut Parts) {
        let (Some(budget), true) = (self.budget, self.inside) else { return };
        let patience = if self.utf8.len > 0 { CHARACTER_TOKENS } else { 0 };
        if self.n_reasoned >= budget.saturating_add(patience) {
            self.force(now, out);
        }
    }

    /// Has the segment that is open closed: its closing tokens come next.
    pub fn close_now(&mut self, out: &mut Parts) {
        if self.inside && self.n_forced.is_none() {
            self.force(0.0, out);
        }
    }

    fn force(&mut self, now: f64, out: &mut Parts) {
        self.utf8.finish(&mut self.pending.text);
        self.release(self.pending.end(), now, out);
        self.finish_stream(out);
        self.n_forced = Some(0);
    }

    /// Drops the whitespace with which the text at `at` begins, if nothing but a tag stands before it; returns where
    /// the rest starts. No stop sees it.
    fn skip_blank(&mut self, at: usize) -> usize {
        if self.blank != Blank::Dropped || at > self.pending.published {
            return at;
        }
        let text = self.pending.since(at);
        let start = at + text.len() - text.trim_start_matches(is_blank).len();
        self.drop_text(start);
        start
    }

    /// Drops the pending text before a position.
    fn drop_text(&mut self, position: usize) {
        self.pending.publish(position, &mut self.scratch);
        self.scratch.clear();
    }

    // ---- text ----------------------------------------------------------------------------------

    fn stream(&mut self) -> &mut TextStream {
        if self.inside { &mut self.reasoning } else { &mut self.content }
    }

    /// No stream here has stops that could match.
    fn finish_stream(&mut self, out: &mut Parts) {
        let _ = self.stream().finish(&mut out.text);
    }

    /// Hands the text up to `limit` to the stream of its side.
    fn release(&mut self, limit: usize, now: f64, out: &mut Parts) {
        if let Blank::Held(seen) = self.blank
            && self.pending.between(seen, limit).chars().all(is_blank)
        {
            self.blank = Blank::Held(limit);
            return;
        }
        if self.pending.published < limit {
            self.blank = Blank::Shown;
            self.note_content(self.origins.token_at(self.pending.published), out);
        }
        self.pending.publish(limit, &mut self.scratch);
        self.origins.forget(self.pending.published);
        let stream = if self.inside { &mut self.reasoning } else { &mut self.content };
        let stopped = stream.push(0, self.scratch.as_bytes(), now, &mut out.text);
        debug_assert!(stopped.is_none(), "the streams have no stops");
        self.scratch.clear();
    }

    fn note_content(&mut self, token: usize, out: &mut Parts) {
        if !self.inside && !std::mem::replace(&mut self.has_content, true) {
            out.mark(Mark::Content { token });
        }
    }
}

/// What C calls space: the whitespace that tags are surrounded with.
fn is_blank(c: char) -> bool {
    matches!(c, ' ' | '\t'..='\r')
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    // ---- helpers --------------------------------------------------------------------------------

    /// What a generation was cut into.
    #[derive(Clone, Debug, Default, PartialEq)]
    struct Split {
        content: String,
        /// The text of each segment and whether it was closed, by force or not.
        segments: Vec<(String, Option<bool>)>,
        /// From the first token of a segment to the one after its last.
        tokens: Vec<(usize, usize)>,
        content_start: Option<usize>,
        stop: Option<StopMatch>,
    }

    impl Split {
        fn take(&mut self, parts: &Parts) {
            let mut start = 0;
            for (end, mark) in &parts.marks {
                self.add(&parts.text[start..*end]);
                self.apply(mark.clone());
                start = *end;
            }
            self.add(&parts.text[start..]);
        }

        fn add(&mut self, text: &str) {
            match self.segments.last_mut() {
                Some((segment, None)) => segment.push_str(text),
                _ => self.content.push_str(text),
            }
        }

        fn apply(&mut self, mark: Mark) {
            match mark {
                Mark::Content { token } => {
                    assert_eq!(self.content_start.replace(token), None, "content begins once");
                }
                Mark::Open { token } => {
                    assert!(self.segments.last().is_none_or(|last| last.1.is_some()), "opened twice");
                    self.segments.push((String::new(), None));
                    self.tokens.push((token, token));
                }
                Mark::Close { token, forced } => {
                    let closed = self.segments.last_mut().and_then(|last| last.1.replace(forced));
                    assert_eq!(closed, None, "closed twice");
                    self.tokens.last_mut().expect("a segment").1 = token;
                }
                Mark::Call(call) => panic!("nobody looks for {call:?}"),
            }
        }

        fn texts(&self) -> Vec<&str> {
            self.segments.iter().map(|(text, _)| text.as_str()).collect()
        }
    }

    fn by_text(text: &str) -> Tag {
        Tag { text: text.into(), tokens: Vec::new() }
    }

    fn by_tokens(text: &str, tokens: &[Token]) -> Tag {
        Tag { text: text.into(), tokens: tokens.into() }
    }

    fn tags(start: &str, end: &str, opened: bool) -> SegmentOptions {
        SegmentOptions { start: by_text(start), end: by_text(end), opened, ..SegmentOptions::default() }
    }

    fn thinks() -> SegmentOptions {
        tags("<t>", "</t>", false)
    }

    fn run<P: AsRef<[u8]>>(options: SegmentOptions, text: TextOptions, pieces: &[P]) -> Split {
        run_tokens(options, text, pieces.iter().map(|piece| (0, piece.as_ref())))
    }

    fn run_tokens<'a>(
        options: SegmentOptions,
        text: TextOptions,
        tokens: impl IntoIterator<Item = (Token, &'a [u8])>,
    ) -> Split {
        let mut stream = Segments::new(options, text);
        let (mut split, mut parts) = (Split::default(), Parts::default());
        stream.begin("", &mut parts);
        for (index, (token, piece)) in tokens.into_iter().enumerate() {
            split.stop = stream.push(token, piece, index as f64, &mut parts);
            split.take(&parts);
            parts.clear();
            if split.stop.is_some() {
                break;
            }
        }
        let late = stream.finish(&mut parts);
        split.take(&parts);
        split.stop = split.stop.take().or(late);
        split
    }

    fn plain() -> TextOptions {
        TextOptions::default()
    }

    fn stops(strings: &[&str]) -> TextOptions {
        TextOptions { stop_strings: strings.iter().map(ToString::to_string).collect(), ..TextOptions::default() }
    }

    fn closed(text: &str) -> (String, Option<bool>) {
        (text.into(), Some(false))
    }

    // ---- tags as text ----------------------------------------------------------------------------

    #[test]
    fn reasoning_is_no_content_and_tags_and_the_whitespace_at_them_are_neither() {
        let split = run(thinks(), plain(), &["\n<t>", "\n", "Let me", " think.\n", "</t>\n", "\n", "It is ", "4.\n"]);
        assert_eq!((split.content.as_str(), split.segments), ("It is 4.\n", vec![closed("Let me think.")]));
        assert_eq!((split.tokens, split.content_start), (vec![(0, 5)], Some(6)));
    }

    #[test]
    fn one_token_can_open_close_and_open_again() {
        let split = run(thinks(), plain(), &["a<t>b</t>c<t>d", "</t>e"]);
        assert_eq!((split.content.as_str(), split.texts()), ("ace", vec!["b", "d"]));
        assert_eq!((split.tokens, split.content_start), (vec![(0, 1), (0, 2)], Some(0)));
    }

    #[test]
    fn a_segment_that_the_prompt_opened_begins_with_the_first_token() {
        let split = run(tags("<t>", "</t>", true), plain(), &["\nhm", "</t>", "yes"]);
        assert_eq!((split.content.as_str(), split.segments), ("yes", vec![closed("hm")]));
        assert_eq!((split.tokens, split.content_start), (vec![(0, 2)], Some(2)));
    }

    #[test]
    fn what_is_never_closed_is_reasoning_to_its_end() {
        let split = run(tags("<t>", "</t>", true), plain(), &["so on ", "and </t"]);
        assert_eq!((split.content.as_str(), split.segments), ("", vec![("so on and </t".into(), None)]));
        assert_eq!(split.content_start, None);
    }

    #[test]
    fn what_only_looked_like_a_tag_is_text() {
        let split = run(thinks(), plain(), &["  <", "t", "x> <", "<t>y</", "/t></t>"]);
        assert_eq!((split.content.as_str(), split.texts()), ("  <tx> <", vec!["y<//t>"]));
        assert_eq!((split.tokens, split.content_start), (vec![(3, 5)], Some(0)));
    }

    #[test]
    fn whitespace_at_the_beginning_stays_where_no_tag_follows() {
        assert_eq!(run(thinks(), plain(), &[" \n", " a"]).content, " \n a");
        assert_eq!(run(thinks(), plain(), &[" \n", " "]).content, " \n ");
    }

    #[test]
    fn only_what_can_become_a_tag_is_held_back() {
        let mut stream = Segments::new(thinks(), plain());
        let mut parts = Parts::default();
        for (piece, shown) in
            [("a ", "a "), ("<", ""), ("t", ""), ("<", "<t"), ("b ", "<b "), ("<t>c", "c"), ("</", "")]
        {
            assert_eq!(stream.push(0, piece.as_bytes(), 0.0, &mut parts), None);
            assert_eq!(parts.text, shown, "after {piece:?}");
            parts.clear();
        }
    }

    #[test]
    fn a_model_without_a_start_tag_reasons_once() {
        let split = run(tags("", "</t>", true), plain(), &["a</t>", "b<t>c</t>d"]);
        assert_eq!((split.content.as_str(), split.texts()), ("b<t>c</t>d", vec!["a"]));
    }

    #[test]
    fn content_begins_in_the_token_that_has_the_first_byte_of_its_first_character() {
        let split = run(thinks(), plain(), &[&b"<t>a</t>"[..], b"\n", b"\xf0\x9f", b"\x98", b"\x80b"]);
        assert_eq!((split.content.as_str(), split.content_start), ("😀b", Some(2)));
    }

    // ---- tags as tokens --------------------------------------------------------------------------

    fn special() -> SegmentOptions {
        SegmentOptions { start: by_tokens("<t>", &[8]), end: by_tokens("</t>", &[9]), ..SegmentOptions::default() }
    }

    #[test]
    fn a_tag_that_is_a_token_is_found_though_it_has_no_text() {
        let tokens = [(1, &b"\n"[..]), (8, b""), (1, b"hm"), (9, b""), (1, b"\n"), (1, b"yes")];
        let split = run_tokens(special(), plain(), tokens);
        assert_eq!((split.content.as_str(), split.segments), ("yes", vec![closed("hm")]));
        assert_eq!((split.tokens, split.content_start), (vec![(1, 4)], Some(5)));
    }

    #[test]
    fn its_text_is_left_out_where_it_has_one_and_means_nothing_where_it_was_spelt() {
        let tokens = [(8, &b"<t>"[..]), (1, b"a </t> b"), (9, b"</t>"), (1, b"<t> is a tag")];
        let split = run_tokens(special(), plain(), tokens);
        assert_eq!((split.content.as_str(), split.texts()), ("<t> is a tag", vec!["a </t> b"]));
    }

    #[test]
    fn a_character_begun_before_a_tag_does_not_go_on_behind_it() {
        let tokens = [(1, &b"a\xe2"[..]), (8, b""), (1, b"\x82\xacb\xe2"), (9, b""), (1, b"\x82\xac")];
        let split = run_tokens(special(), plain(), tokens);
        assert_eq!(split.content, "a\u{fffd}\u{fffd}\u{fffd}");
        assert_eq!(split.texts(), ["\u{fffd}\u{fffd}b\u{fffd}"]);
    }

    #[test]
    fn a_tag_of_several_tokens_holds_their_text_back_until_it_is_decided() {
        let mut options = special();
        options.start = by_tokens("<c>analysis<m>", &[8, 3, 7]);
        let tokens = [(8, &b""[..]), (3, b"analysis"), (1, b"x"), (8, b""), (3, b"analysis"), (7, b""), (1, b"y")];
        let split = run_tokens(options, plain(), tokens);
        assert_eq!((split.content.as_str(), split.texts()), ("analysisx", vec!["y"]));
        assert_eq!((split.tokens, split.content_start), (vec![(3, 3)], Some(1)));
    }

    // ---- stops -----------------------------------------------------------------------------------

    #[test]
    fn a_stop_ends_content_and_not_reasoning() {
        let split = run(thinks(), stops(&["\n", "End"]), &["<t>a\nEnd\n</t>\n\nb", "En", "d c"]);
        assert_eq!((split.content.as_str(), split.texts()), ("b", vec!["a\nEnd"]));
        assert_eq!(split.stop.map(|found| found.stop).as_deref(), Some("End"));
    }

    #[test]
    fn a_list_of_tokens_ends_content_and_not_reasoning() {
        let text = TextOptions { stop_tokens: vec![vec![5]], ..plain() };
        let tokens = [(8, &b""[..]), (5, b"x"), (9, b""), (1, b"y <"), (5, b"x")];
        let split = run_tokens(special(), text, tokens);
        assert_eq!((split.content.as_str(), split.texts()), ("y <", vec!["x"]));
        assert_eq!(split.stop.map(|found| found.tokens), Some(vec![5]));
    }

    #[test]
    fn a_start_tag_that_is_a_stop_is_a_stop() {
        let split = run(thinks(), stops(&["<t>"]), &["a<", "t>b"]);
        assert_eq!((split.content.as_str(), split.texts()), ("a", vec![]));
        assert!(split.stop.is_some());
    }

    #[test]
    fn no_stop_matches_across_a_segment() {
        let split = run(thinks(), stops(&["ab"]), &["a<t>x</t>b", "ab"]);
        assert_eq!((split.content.as_str(), split.texts()), ("ab", vec!["x"]));
    }

    // ---- prefix ----------------------------------------------------------------------------------

    fn after_prefix(options: SegmentOptions, prefix: &str, piece: &str) -> Split {
        let mut stream = Segments::new(options, stops(&["Stop"]));
        let (mut split, mut parts) = (Split::default(), Parts::default());
        stream.begin(prefix, &mut parts);
        assert_eq!(stream.push(0, piece.as_bytes(), 0.0, &mut parts), None);
        assert_eq!(stream.finish(&mut parts), None);
        split.take(&parts);
        split
    }

    #[test]
    fn a_prefix_is_what_its_tags_say() {
        let split = after_prefix(thinks(), "Stop: ", "a");
        assert_eq!((split.content.as_str(), split.content_start), ("Stop: a", Some(0)));
        let split = after_prefix(thinks(), "\n<t>\nFirst", " a</t>b");
        assert_eq!((split.content.as_str(), split.texts()), ("b", vec!["First a"]));
        let split = after_prefix(tags("<t>", "</t>", true), "no need.</t>\n\n", "\nb");
        assert_eq!((split.content.as_str(), split.texts()), ("b", vec!["no need."]));
        assert_eq!(split.content_start, Some(0));
    }

    // ---- budget ----------------------------------------------------------------------------------

    const CLOSING: [Token; 3] = [20, 21, 22];

    /// Pushes what a model would draw, and what it is made to draw in between.
    fn run_with_budget(budget: usize, options: SegmentOptions, pieces: &[&[u8]]) -> (Split, Vec<Token>) {
        let options = SegmentOptions { budget: Some(budget), closing: CLOSING.into(), ..options };
        let mut stream = Segments::new(options, plain());
        let (mut split, mut parts, mut tokens) = (Split::default(), Parts::default(), Vec::new());
        stream.begin("", &mut parts);
        let mut pieces = pieces.iter();
        loop {
            let (token, piece) = match (stream.forced(), pieces.len()) {
                (Some(token), _) => (token, &b"</t>\n"[..]),
                (None, 0) => break,
                (None, _) => (1, *pieces.next().expect("one more")),
            };
            tokens.push(token);
            assert_eq!(stream.push(token, piece, 0.0, &mut parts), None);
        }
        assert_eq!(stream.finish(&mut parts), None);
        split.take(&parts);
        (split, tokens)
    }

    #[test]
    fn a_budget_closes_a_segment_with_the_closing_tokens_which_are_no_text() {
        let (split, tokens) = run_with_budget(2, thinks(), &[b"<t>", b"a", b" b", b"\n\nc", b"d"]);
        assert_eq!((split.content.as_str(), split.segments), ("cd", vec![("a b".into(), Some(true))]));
        assert_eq!(tokens, [1, 1, 1, 20, 21, 22, 1, 1]);
        assert_eq!((split.tokens, split.content_start), (vec![(0, 6)], Some(6)));
    }

    #[test]
    fn a_budget_of_nothing_closes_at_once() {
        let (split, tokens) = run_with_budget(0, tags("<t>", "</t>", true), &[b"c"]);
        assert_eq!((split.content.as_str(), split.segments), ("c", vec![(String::new(), Some(true))]));
        assert_eq!((tokens, split.content_start), (vec![20, 21, 22, 1], Some(3)));
        let (split, tokens) = run_with_budget(0, thinks(), &[b"a", b"<t>", b"c"]);
        assert_eq!((split.content.as_str(), split.texts()), ("ac", vec![""]));
        assert_eq!(tokens, [1, 1, 20, 21, 22, 1]);
    }

    #[test]
    fn a_budget_does_not_matter_to_a_segment_that_ends_by_itself() {
        let (split, tokens) = run_with_budget(3, thinks(), &[b"<t>", b"a", b"b", b"</t>", b"c", b"d", b"e"]);
        assert_eq!((split.content.as_str(), split.segments), ("cde", vec![closed("ab")]));
        assert_eq!(tokens, [1; 7]);
    }

    #[test]
    fn every_segment_has_the_whole_budget() {
        let (split, tokens) = run_with_budget(1, thinks(), &[b"<t>", b"a", b"b<t>", b"c", b"d"]);
        assert_eq!((split.content.as_str(), split.texts()), ("bd", vec!["a", "c"]));
        assert_eq!(tokens.len(), 5 + 2 * CLOSING.len());
    }

    #[test]
    fn a_character_begun_within_the_budget_is_finished() {
        let euro: [&[u8]; 5] = [b"<t>", b"\xe2", b"\x82", b"\xac", b"c"];
        let (split, tokens) = run_with_budget(1, thinks(), &euro);
        assert_eq!((split.content.as_str(), split.texts()), ("c", vec!["€"]));
        assert_eq!(tokens, [1, 1, 1, 1, 20, 21, 22, 1]);
    }

    #[test]
    fn a_character_that_is_never_finished_ends_with_the_patience() {
        let endless: [&[u8]; 6] = [b"<t>", b"\xe2", b"", b"", b"", b"c"];
        let (split, _) = run_with_budget(1, thinks(), &endless);
        assert_eq!((split.content.as_str(), split.texts()), ("c", vec!["\u{fffd}"]));
    }

    #[test]
    fn half_an_end_tag_at_the_limit_is_reasoning() {
        let (split, _) = run_with_budget(1, thinks(), &[b"<t>", b"a</", b"t>c"]);
        assert_eq!((split.content.as_str(), split.texts()), ("t>c", vec!["a</"]));
    }

    // ---- any cut ---------------------------------------------------------------------------------

    const TAGS: [(&str, &str); 5] = [("<t>", "</t>"), ("<t>", "<t>"), ("aab", "bab"), ("a", "bb"), ("", "</t>")];

    /// The whole text cut at once. Besides, where the first content is, where tags are, and where the last tag ends.
    struct Naive {
        split: Split,
        content_at: Option<usize>,
        tags: Vec<(usize, usize)>,
        rest: usize,
        inside: bool,
    }

    impl Naive {
        fn new(text: &str, (start, end): (&str, &str), opened: bool) -> Self {
            let split = Split { segments: vec![(String::new(), None); usize::from(opened)], ..Split::default() };
            let mut naive = Self { split, content_at: None, tags: Vec::new(), rest: 0, inside: opened };
            loop {
                let tag = if naive.inside { end } else { start };
                let found = text[naive.rest..].find(tag).filter(|_| !tag.is_empty()).map(|at| naive.rest + at);
                naive.add(text, found);
                let Some(at) = found else { return naive };
                naive.tags.push((at, at + tag.len()));
                naive.rest = at + tag.len();
                match naive.inside {
                    true => naive.split.segments.last_mut().expect("a segment").1 = Some(false),
                    false => naive.split.segments.push((String::new(), None)),
                }
                naive.inside = !naive.inside;
            }
        }

        /// Text from the last tag to the next.
        fn add(&mut self, text: &str, next: Option<usize>) {
            let part = &text[self.rest..next.unwrap_or(text.len())];
            let at_beginning = self.tags.is_empty() && !self.inside;
            let after_tag = part.trim_start_matches(is_blank);
            let shown = match (self.inside, at_beginning) {
                (true, _) => after_tag.trim_end(),
                (false, true) if after_tag.is_empty() && next.is_some() => "",
                (false, true) => part,
                (false, false) => after_tag,
            };
            if self.inside {
                self.split.segments.last_mut().expect("a segment").0.push_str(shown);
            } else if !shown.is_empty() {
                let skipped = if at_beginning { 0 } else { part.len() - after_tag.len() };
                self.content_at.get_or_insert(self.rest + skipped);
                self.split.content.push_str(shown);
            }
        }
    }

    fn text(max: usize) -> impl Strategy<Value = String> {
        let words = vec!["<t>", "</t>", "<", "/", "t>", "a", "aab", "bab", "b", " ", "\n", "€", "\u{301}", "👍"];
        vec(prop::sample::select(words), 0..max).prop_map(|words| words.concat())
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

    fn lens() -> impl Strategy<Value = Vec<usize>> {
        vec(0..7_usize, 1..12)
    }

    fn batching() -> impl Strategy<Value = Option<Batching>> {
        prop::option::of(
            (1..5_u32, 1..5_u32).prop_map(|(tokens, interval)| Batching { tokens, interval: interval.into() }),
        )
    }

    /// The piece that has this byte.
    fn piece_of(pieces: &[Vec<u8>], byte: usize) -> usize {
        let mut end = 0;
        pieces
            .iter()
            .position(|piece| {
                end += piece.len();
                byte < end
            })
            .expect("a byte of the text")
    }

    /// The characters that are complete in `bytes`.
    fn decoded(bytes: &[u8]) -> &str {
        match std::str::from_utf8(bytes) {
            Ok(text) => text,
            Err(error) => std::str::from_utf8(&bytes[..error.valid_up_to()]).expect("valid up to here"),
        }
    }

    /// The longest end of `text` that is the start of the tag.
    fn possible(text: &str, tag: &str) -> usize {
        (1..tag.len()).rev().find(|&len| text.ends_with(&tag[..len])).unwrap_or(0)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn any_cut_splits_as_the_whole_text_does(
            text in text(24),
            lens in lens(),
            tag in prop::sample::select(TAGS.to_vec()),
            opened in any::<bool>(),
            batching in batching(),
        ) {
            let pieces = cut(text.as_bytes(), &lens);
            let naive = Naive::new(&text, tag, opened);
            let split = run(tags(tag.0, tag.1, opened), TextOptions { batching, ..plain() }, &pieces);
            prop_assert_eq!(&split.content, &naive.split.content);
            prop_assert_eq!(&split.segments, &naive.split.segments);
            prop_assert_eq!(split.content_start, naive.content_at.map(|at| piece_of(&pieces, at)));
            let opens = naive.tags.iter().skip(usize::from(opened)).step_by(2).map(|tag| piece_of(&pieces, tag.0));
            let closes = naive.tags.iter().skip(1 - usize::from(opened)).step_by(2);
            let closes = closes.map(|tag| piece_of(&pieces, tag.1 - 1) + 1);
            let opened = opened.then_some(0).into_iter();
            prop_assert!(split.tokens.iter().map(|tokens| tokens.0).eq(opened.chain(opens)));
            prop_assert!(closes.eq(split.tokens.iter().take(closes_of(&split)).map(|tokens| tokens.1)));
        }

        #[test]
        fn only_what_can_become_a_tag_and_whitespace_at_tags_are_held_back(
            text in text(24),
            lens in lens(),
            tag in prop::sample::select(TAGS.to_vec()),
            opened in any::<bool>(),
        ) {
            let mut stream = Segments::new(tags(tag.0, tag.1, opened), plain());
            let (mut split, mut parts, mut seen) = (Split::default(), Parts::default(), Vec::new());
            stream.begin("", &mut parts);
            for piece in cut(text.as_bytes(), &lens) {
                seen.extend_from_slice(&piece);
                prop_assert_eq!(stream.push(0, &piece, 0.0, &mut parts), None);
                split.take(&parts);
                parts.clear();
                let text = decoded(&seen);
                let naive = Naive::new(text, tag, opened);
                let awaited = if naive.inside { tag.1 } else { tag.0 };
                let held = possible(&text[naive.rest..], awaited);
                let mut naive = Naive::new(&text[..text.len() - held], tag, opened);
                if naive.tags.is_empty() && !opened && text[..text.len() - held].chars().all(is_blank) {
                    naive.split.content.clear();
                }
                prop_assert_eq!(&split.content, &naive.split.content);
                prop_assert_eq!(&split.segments, &naive.split.segments);
            }
        }

        #[test]
        fn any_bytes_are_split_as_their_lossy_text(
            bytes in vec(prop_oneof![prop::sample::select(b"<t>/ a".to_vec()), 0x80..0xf8_u8], 0..40),
            lens in lens(),
            opened in any::<bool>(),
        ) {
            let naive = Naive::new(&String::from_utf8_lossy(&bytes), TAGS[0], opened);
            let split = run(tags("<t>", "</t>", opened), plain(), &cut(&bytes, &lens));
            prop_assert_eq!((&split.content, &split.segments), (&naive.split.content, &naive.split.segments));
        }

        #[test]
        fn the_content_ends_before_the_first_stop_in_it(
            text in text(24),
            lens in lens(),
            opened in any::<bool>(),
            stop in prop::sample::select(vec!["a", "ab", "b<", "t>", "\n", "€"]),
            batching in batching(),
        ) {
            let whole = Naive::new(&text, TAGS[0], opened);
            let mut borders = vec![0];
            borders.extend(whole.tags.iter().flat_map(|tag| [tag.0, tag.1]));
            borders.push(text.len());
            // Where a stop begins in content, which may hide the tag that follows.
            let sides = borders.chunks(2).enumerate().filter(|(index, _)| (index % 2 == 1) == opened);
            let ends = sides.filter_map(|(index, side)| {
                let rest = &text[side[0]..];
                let skipped = if index > 0 { rest.len() - rest.trim_start_matches(is_blank).len() } else { 0 };
                rest[skipped..].find(stop).map(|at| side[0] + skipped + at).filter(|&at| at < side[1])
            });
            let end = ends.min();
            let expected = Naive::new(&text[..end.unwrap_or(text.len())], TAGS[0], opened);
            let options = TextOptions { stop_strings: vec![stop.into()], batching, ..plain() };
            let split = run(tags("<t>", "</t>", opened), options, &cut(text.as_bytes(), &lens));
            prop_assert_eq!(split.stop.is_some(), end.is_some());
            prop_assert_eq!((&split.content, split.texts()), (&expected.split.content, expected.split.texts()));
        }

        #[test]
        fn tags_that_are_tokens_split_between_tokens(
            tokens in vec(prop::sample::select(vec![1, 2, 3, 4, 8, 9]), 0..24),
            visible in any::<bool>(),
        ) {
            let piece = |token: Token| -> &[u8] {
                match token { 1 => b"a", 2 => b"<t>", 3 => b"\xe2\x82", 4 => "€ ".as_bytes(), 8 if visible => b"<t>", 9 if visible => b"</t>", _ => b"" }
            };
            let mut sides = vec![Vec::new()];
            for &token in &tokens {
                match (token, sides.len() % 2) {
                    (8, 1) | (9, 0) => sides.push(Vec::new()),
                    _ => sides.last_mut().expect("a side").extend_from_slice(piece(token)),
                }
            }
            let lossy = |side: &Vec<u8>| String::from_utf8_lossy(side).into_owned();
            let content: String = sides.iter().step_by(2).map(lossy).collect();
            let reasoning: Vec<String> = sides.iter().skip(1).step_by(2).map(|side| lossy(side).trim_end().to_owned()).collect();
            let split = run_tokens(special(), plain(), tokens.iter().map(|&token| (token, piece(token))));
            prop_assert_eq!((&split.content, split.texts()), (&content, reasoning.iter().map(String::as_str).collect()));
        }

        #[test]
        fn no_segment_has_more_tokens_than_the_budget(
            text in text(24),
            lens in vec(1..7_usize, 1..12),
            budget in 0..6_usize,
            opened in any::<bool>(),
        ) {
            let text = text.replace(|c: char| !c.is_ascii(), "");
            let pieces = cut(text.as_bytes(), &lens);
            let pieces: Vec<&[u8]> = pieces.iter().map(Vec::as_slice).collect();
            let (split, tokens) = run_with_budget(budget, tags("<t>", "</t>", opened), &pieces);
            prop_assert_eq!(tokens.iter().filter(|&&token| token == 1).count(), pieces.len());
            for (index, (&(first, next), (_, closed))) in split.tokens.iter().zip(&split.segments).enumerate() {
                let own = tokens[first..next].iter().filter(|&&token| token == 1).count();
                let tag = if opened && index == 0 { 0 } else { "<t>".len() };
                match closed {
                    Some(true) => {
                        prop_assert!(own <= budget + tag);
                        prop_assert_eq!(&tokens[next - CLOSING.len()..next], CLOSING);
                    }
                    Some(false) => prop_assert!(own <= budget.max(1) + tag),
                    None => {}
                }
            }
        }
    }

    fn closes_of(split: &Split) -> usize {
        split.segments.iter().filter(|segment| segment.1.is_some()).count()
    }
}

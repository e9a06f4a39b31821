//! Where reasoning ends and the grammar begins.
//!
//! Nothing is constrained inside a segment of reasoning. At the very beginning a text may be content or open a
//! segment: both are followed until one of them is left. After a segment, and once content has begun, no other
//! segment opens.

use crate::llama::Token;
use crate::sequence::text::segments::{SegmentOptions, Tag};

/// Blanks before a start tag, in bytes.
const MAX_BLANKS: usize = 16;

/// Where a text is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// At the beginning: content, or the start tag.
    Start,
    /// Reasoning.
    Inside,
    /// Content.
    Content,
}

/// Tells reasoning from content before [`super::super::text::segments::Segments`] has seen a token.
#[derive(Clone)]
pub struct Gate {
    phase: Phase,
    start: Tag,
    end: Tag,
    /// What has come that may become the start tag.
    opening: Vec<u8>,
    /// How many tokens of the start tag have come.
    n_opening: usize,
    /// Whether what has come may be content.
    has_content: bool,
    /// The last bytes of the reasoning: too few for the end tag.
    tail: Vec<u8>,
}

impl Gate {
    /// There is no reasoning.
    pub fn open() -> Self {
        Self { phase: Phase::Content, ..Self::new(&SegmentOptions::default()) }
    }

    pub fn new(reasoning: &SegmentOptions) -> Self {
        let phase = match (reasoning.opened, reasoning.start.text.is_empty()) {
            (true, _) => Phase::Inside,
            (false, false) => Phase::Start,
            (false, true) => Phase::Content,
        };
        Self {
            phase,
            start: reasoning.start.clone(),
            end: reasoning.end.clone(),
            opening: Vec::new(),
            n_opening: 0,
            has_content: true,
            tail: Vec::new(),
        }
    }

    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Whether what has come at the beginning may be content.
    pub fn may_be_content(&self) -> bool {
        self.has_content
    }

    /// It is not.
    pub fn rule_content_out(&mut self) {
        self.has_content = false;
    }

    /// Whether a part of the start tag has come.
    pub fn is_opening(&self) -> bool {
        self.n_opening > 0 || self.opening.iter().any(|&byte| !is_blank(char::from(byte)))
    }

    /// Takes a response prefix, in which tags count by their texts; returns the content at its end.
    pub fn begin_with<'a>(&mut self, prefix: &'a str) -> &'a str {
        let mut rest = prefix;
        while let Some((_, after)) = split_at(rest, self.tag()) {
            rest = after.trim_start_matches(is_blank);
            self.phase = if self.phase == Phase::Inside { Phase::Content } else { Phase::Inside };
        }
        match self.phase {
            Phase::Inside => {
                self.tail = rest.as_bytes().to_vec();
                ""
            }
            Phase::Start if !rest.is_empty() && !self.open_text(rest.as_bytes()) => {
                self.phase = Phase::Content;
                rest
            }
            Phase::Start => {
                self.opening = rest.as_bytes().to_vec();
                rest
            }
            Phase::Content => rest,
        }
    }

    /// The tag that the text may come to next.
    fn tag(&self) -> &str {
        match self.phase {
            Phase::Start => &self.start.text,
            Phase::Inside => &self.end.text,
            Phase::Content => "",
        }
    }

    // ---- at the beginning -----------------------------------------------------------------------------------------

    /// Whether the token may be a part of the start tag, or of the blanks before it.
    pub fn opens(&self, token: Token, text: &[u8]) -> bool {
        match self.start.tokens.get(self.n_opening) {
            Some(&expected) if token == expected => true,
            _ if self.n_opening > 0 => false,
            _ => !text.is_empty() && self.open_text(&[&self.opening, text].concat()),
        }
    }

    /// Whether a text may become the start tag, or has more than it.
    fn open_text(&self, text: &[u8]) -> bool {
        let begun = text.iter().take_while(|&&byte| is_blank(char::from(byte))).count();
        let (text, tag) = (&text[begun..], self.start.text.as_bytes());
        if text.is_empty() || begun > MAX_BLANKS {
            return begun <= MAX_BLANKS;
        }
        self.start.tokens.is_empty() && (tag.starts_with(text) || text.starts_with(tag))
    }

    /// Takes a token at the beginning; returns whether it may be a part of the start tag.
    pub fn open_with(&mut self, token: Token, text: &[u8]) -> bool {
        let opens = self.opens(token, text);
        match self.start.tokens.get(self.n_opening) {
            Some(&expected) if token == expected => self.n_opening += 1,
            _ => self.opening.extend_from_slice(text),
        }
        opens
    }

    /// What becomes of the beginning after a token. False if it can be nothing.
    pub fn decide(&mut self, opens: bool, fits: bool) -> bool {
        self.has_content = fits;
        if !opens {
            self.phase = Phase::Content;
        }
        opens || fits
    }

    // ---- inside ---------------------------------------------------------------------------------------------------

    /// Reasoning begins.
    pub fn enter(&mut self) {
        self.phase = Phase::Inside;
        self.has_content = true;
    }

    /// Reasoning has ended.
    pub fn leave(&mut self) {
        self.phase = Phase::Content;
    }

    /// What of a token's text is content already, if it ends the reasoning.
    pub fn rest_of(&self, token: Token, text: &[u8]) -> Option<Vec<u8>> {
        if !self.end.tokens.is_empty() {
            return (self.end.tokens.last() == Some(&token)).then(Vec::new);
        }
        let read = [&self.tail, text].concat();
        let tag = self.end.text.as_bytes();
        let end = read.windows(tag.len().max(1)).position(|window| window == tag)? + tag.len();
        let blanks = read[end..].iter().take_while(|&&byte| is_blank(char::from(byte))).count();
        Some(read[end + blanks..].to_vec())
    }

    /// Takes a token of the reasoning.
    pub fn read(&mut self, text: &[u8]) {
        self.tail.extend_from_slice(text);
        let kept = self.end.text.len().saturating_sub(1).min(self.tail.len());
        self.tail.drain(..self.tail.len() - kept);
    }
}

fn split_at<'a>(text: &'a str, tag: &str) -> Option<(&'a str, &'a str)> {
    if tag.is_empty() { None } else { text.split_once(tag) }
}

/// What surrounds tags.
fn is_blank(c: char) -> bool {
    matches!(c, ' ' | '\t'..='\r')
}

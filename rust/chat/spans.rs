//! Which characters of a rendered prompt came from contents.
//!
//! A template is rendered a second time with *shaded* contents: every character is replaced, one by one, by a code
//! point of the private planes that stands for it. Whatever the template does with a content (trims, splits, joins,
//! repeats it), its characters stay recognisable in the output, and the first and the last of each message carry its
//! number. White space stays as it is, so that trimming works as ever. Undoing the shading must give the real
//! rendering; then each of its characters is known to be the template's or the content's.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use super::json::escape;

/// The private planes: two stretches of code points that no script uses.
const PLANES: [Range<u32>; 2] = [0xF_0000..0xF_FFFE, 0x10_0000..0x10_FFFE];

/// Whether a character lies in the private planes.
fn is_private(c: char) -> bool {
    PLANES.iter().any(|plane| plane.contains(&u32::from(c)))
}

/// White space to Python's `str.strip`.
#[must_use]
pub fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// The first or last character of what a message says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Mark {
    plain: char,
    message: usize,
    is_content: bool,
    first: bool,
    last: bool,
}

/// Whose text is shaded.
#[derive(Clone, Copy, Debug)]
pub struct Owner {
    /// Index of the message.
    pub message: usize,
    /// Whether it is the content, and not the reasoning or an argument of a tool call.
    pub is_content: bool,
}

/// What stands for what, in one rendering. Shared with the functions that the template calls.
#[derive(Debug, Default)]
pub struct Alphabet {
    codes: Mutex<Codes>,
    reserved: HashSet<char>,
}

#[derive(Debug, Default)]
struct Codes {
    /// Code points given out, those passed over included.
    given: u32,
    shades: HashMap<char, char>,
    plain: HashMap<char, char>,
    marks: HashMap<char, Mark>,
    exhausted: bool,
}

impl Alphabet {
    /// An alphabet that leaves alone what occurs in `texts`.
    pub fn avoiding<'a>(texts: impl IntoIterator<Item = &'a str>) -> Self {
        let reserved = texts.into_iter().flat_map(str::chars).filter(|&c| is_private(c)).collect();
        Self { codes: Mutex::default(), reserved }
    }

    fn codes(&self) -> std::sync::MutexGuard<'_, Codes> {
        self.codes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether more different characters were shaded than the private planes hold.
    #[must_use]
    pub fn is_exhausted(&self) -> bool {
        self.codes().exhausted
    }

    /// Shades all of a text but its white space, and marks its first and last character.
    #[must_use]
    pub fn shade(&self, text: &str, owner: Owner) -> String {
        let mut codes = self.codes();
        self.with_marks(&mut codes, text, owner, |alphabet, codes, _, c| alphabet.shade_char(codes, c))
    }

    /// Shades the control tokens that a text names, and marks its first and last character.
    #[must_use]
    pub fn shade_controls(&self, text: &str, owner: Owner, controls: &[String]) -> String {
        let named = ranges_of_controls(text, controls);
        let mut codes = self.codes();
        self.with_marks(
            &mut codes,
            text,
            owner,
            |alphabet, codes, at, c| {
                if contains(&named, at) { alphabet.shade_char(codes, c) } else { c }
            },
        )
    }

    /// Shades the control tokens that a text names and nothing else.
    #[must_use]
    pub fn hide_controls(&self, text: &str, controls: &[String]) -> String {
        let named = ranges_of_controls(text, controls);
        if named.is_empty() {
            return text.to_owned();
        }
        let mut codes = self.codes();
        let shade = |(at, c)| if contains(&named, at) { self.shade_char(&mut codes, c) } else { c };
        text.char_indices().map(shade).collect()
    }

    /// Shades a character that has no owner, such as the quote of an escape.
    #[must_use]
    pub fn shade_anonymous(&self, c: char) -> char {
        self.shade_char(&mut self.codes(), c)
    }

    fn with_marks(
        &self,
        codes: &mut Codes,
        text: &str,
        owner: Owner,
        shade: impl Fn(&Self, &mut Codes, usize, char) -> char,
    ) -> String {
        let first = text.find(|c| !is_space(c));
        let last = text.rfind(|c| !is_space(c));
        let mut shaded = String::with_capacity(text.len() * 2);
        for (at, c) in text.char_indices() {
            let (first, last) = (first == Some(at), last == Some(at));
            shaded.push(if first || last {
                let mark = Mark { plain: c, message: owner.message, is_content: owner.is_content, first, last };
                self.mark_char(codes, mark)
            } else {
                shade(self, codes, at, c)
            });
        }
        shaded
    }

    fn shade_char(&self, codes: &mut Codes, c: char) -> char {
        if is_space(c) {
            return c;
        }
        if let Some(&shade) = codes.shades.get(&c) {
            return shade;
        }
        let shade = self.next_code(codes);
        codes.shades.insert(c, shade);
        codes.plain.insert(shade, c);
        shade
    }

    fn mark_char(&self, codes: &mut Codes, mark: Mark) -> char {
        let code = self.next_code(codes);
        codes.plain.insert(code, mark.plain);
        codes.marks.insert(code, mark);
        code
    }

    fn next_code(&self, codes: &mut Codes) -> char {
        loop {
            let size = PLANES[0].end - PLANES[0].start;
            let (plane, offset) = if codes.given < size { (0, codes.given) } else { (1, codes.given - size) };
            codes.given += 1;
            match char::from_u32(PLANES[plane].start + offset).filter(|&c| is_private(c)) {
                Some(code) if self.reserved.contains(&code) => {}
                Some(code) => return code,
                None => {
                    codes.exhausted = true;
                    return char::REPLACEMENT_CHARACTER;
                }
            }
        }
    }

    /// Whether the character is a shade.
    #[must_use]
    pub fn is_shade(&self, c: char) -> bool {
        is_private(c) && self.codes().plain.contains_key(&c)
    }

    /// The text that shades stand for.
    #[must_use]
    pub fn plain<'a>(&self, text: &'a str) -> Cow<'a, str> {
        if !text.contains(is_private) {
            return Cow::Borrowed(text);
        }
        let codes = self.codes();
        text.chars().map(|c| codes.plain.get(&c).copied().unwrap_or(c)).collect::<String>().into()
    }

    /// The character that a shade stands for; any other is itself.
    #[must_use]
    pub fn plain_char(&self, c: char) -> char {
        if is_private(c) { self.codes().plain.get(&c).copied().unwrap_or(c) } else { c }
    }

    /// Lays a shaded rendering of `messages` messages beside the real one, which may show contents as JSON writes
    /// them: not every renderer escapes what shades stand for.
    #[must_use]
    pub fn align(&self, rendered: &str, real: &str, messages: usize) -> Option<Layout> {
        let codes = self.codes();
        let mut layout = Layout::empty(messages);
        let mut rest = real;
        let mut chars = rendered.chars().peekable();
        while let Some(&c) = chars.peek() {
            if !codes.plain.contains_key(&c) {
                rest = rest.strip_prefix(c)?;
                layout.text.push(c);
                chars.next();
                continue;
            }
            let run: Vec<char> = std::iter::from_fn(|| chars.next_if(|c| codes.plain.contains_key(c))).collect();
            let plain: Vec<char> = run.iter().map(|c| codes.plain[c]).collect();
            let written = WRITINGS.iter().map(|write| plain.iter().map(|&c| write(c)).collect::<Vec<_>>());
            let parts = written.into_iter().find(|parts| rest.starts_with(&parts.concat()))?;
            for (c, part) in run.iter().zip(parts) {
                rest = rest.strip_prefix(part.as_str())?;
                layout.push_content(codes.marks.get(c), &part);
            }
        }
        rest.is_empty().then_some(layout)
    }

    /// Undoes the shading of a rendered text of `messages` messages.
    #[must_use]
    pub fn read(&self, rendered: &str, messages: usize) -> Layout {
        let codes = self.codes();
        let mut layout = Layout::empty(messages);
        for c in rendered.chars() {
            match codes.plain.get(&c) {
                None => layout.text.push(c),
                Some(plain) => layout.push_content(codes.marks.get(&c), plain.encode_utf8(&mut [0; 4])),
            }
        }
        layout
    }
}

/// How a renderer may write a character of a content: as JSON in ASCII, as JSON, as it is. In this order, since a
/// backslash as it is begins one that is escaped.
const WRITINGS: [fn(char) -> String; 3] =
    [|c| escape(c, true).unwrap_or_else(|| c.into()), |c| escape(c, false).unwrap_or_else(|| c.into()), String::from];

/// A rendered prompt, and what of it came from whom. Ranges are in bytes of the text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The prompt as text.
    pub text: String,
    /// What is content, in order, without overlaps; white space between two contents included.
    pub protected: Vec<Range<usize>>,
    /// For each message, from the first to the last of its characters.
    pub messages: Vec<Option<Range<usize>>>,
    /// The same for its content alone.
    pub contents: Vec<Option<Range<usize>>>,
}

impl Layout {
    fn empty(messages: usize) -> Self {
        Self {
            text: String::new(),
            protected: Vec::new(),
            messages: vec![None; messages],
            contents: vec![None; messages],
        }
    }

    /// Adds what a shade stands for.
    fn push_content(&mut self, mark: Option<&Mark>, text: &str) {
        let start = self.text.len();
        self.text.push_str(text);
        let range = start..self.text.len();
        if let Some(mark) = mark {
            self.note(*mark, range.clone());
        }
        self.protect(range);
    }

    fn note(&mut self, mark: Mark, range: Range<usize>) {
        widen(&mut self.messages[mark.message], range.clone());
        if mark.is_content {
            widen(&mut self.contents[mark.message], range);
        }
    }

    /// Adds a range behind all others; white space alone does not separate two.
    fn protect(&mut self, range: Range<usize>) {
        match self.protected.last_mut() {
            Some(last) if self.text[last.end..range.start].chars().all(is_space) => last.end = range.end,
            _ => self.protected.push(range),
        }
    }

    /// Protects each message as a whole: for a rendering in which not every character of a content is shaded.
    pub fn protect_messages(&mut self) {
        let mut ranges: Vec<_> = self.protected.drain(..).chain(self.messages.iter().flatten().cloned()).collect();
        ranges.sort_by_key(|range| range.start);
        for range in ranges {
            match self.protected.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => self.protected.push(range),
            }
        }
    }

    /// Cuts the text at a byte.
    pub fn truncate(&mut self, end: usize) {
        self.text.truncate(end);
        self.protected.retain(|range| range.start < end);
        for range in self.protected.iter_mut().chain(self.messages.iter_mut().chain(&mut self.contents).flatten()) {
            range.end = range.end.min(end);
            range.start = range.start.min(end);
        }
    }
}

fn widen(known: &mut Option<Range<usize>>, range: Range<usize>) {
    *known = Some(match known.take() {
        Some(known) => known.start.min(range.start)..known.end.max(range.end),
        None => range,
    });
}

/// Where a text names control tokens, overlapping ones included; in order.
fn ranges_of_controls(text: &str, controls: &[String]) -> Vec<Range<usize>> {
    let mut ranges = Vec::new();
    for control in controls {
        let mut from = 0;
        while let Some(at) = text[from..].find(control) {
            let start = from + at;
            ranges.push(start..start + control.len());
            from = start + text[start..].chars().next().map_or(1, char::len_utf8);
        }
    }
    ranges.sort_by_key(|range| range.start);
    ranges
}

fn contains(ranges: &[Range<usize>], at: usize) -> bool {
    ranges.iter().any(|range| range.contains(&at))
}

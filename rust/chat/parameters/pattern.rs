//! Regular expressions that llama.cpp can make a grammar of, and does not misread.

use std::iter::Peekable;
use std::str::Chars;

/// Deepest nesting of groups.
const MAX_DEPTH: usize = 50;
/// Most repetitions.
const MAX_TIMES: u32 = 1_000;
/// Signs that stand for themselves in a class.
const SIGNS: &str = "_./+*?()$ :,@#%&!=<>~;'";

/// A pattern of JSON Schema as llama.cpp reads it: anchored at both ends, of characters that JSON does not escape.
/// `None` where it has more to say; then it does not constrain.
pub fn plain(pattern: &str) -> Option<String> {
    let body = pattern.strip_prefix('^')?.strip_suffix('$')?;
    let mut reader = Reader { rest: body.chars().peekable(), out: String::from("^"), depth: 0, may_repeat: false };
    reader.read()?;
    reader.out.push('$');
    Some(reader.out)
}

struct Reader<'a> {
    rest: Peekable<Chars<'a>>,
    out: String,
    depth: usize,
    /// Whether something stands before that can be repeated, or end an alternative.
    may_repeat: bool,
}

impl Reader<'_> {
    fn read(&mut self) -> Option<()> {
        let mut is_empty = true;
        while let Some(c) = self.rest.next() {
            match c {
                '\\' => self.escape()?,
                '[' => self.class()?,
                '(' => self.open()?,
                ')' | '|' if is_empty => return None,
                ')' => self.close()?,
                '*' | '+' | '?' => self.repeat(c)?,
                '{' => self.times()?,
                '|' => self.put("|", false),
                '.' | '^' | '$' | '"' | ']' | '}' => return None,
                ' '..='~' => self.put(c.encode_utf8(&mut [0; 4]), true),
                _ => return None,
            }
            is_empty = matches!(c, '(' | '|');
        }
        (self.depth == 0 && !is_empty).then_some(())
    }

    fn put(&mut self, text: &str, may_repeat: bool) {
        self.out.push_str(text);
        self.may_repeat = may_repeat;
    }

    /// What llama.cpp would join with what precedes it, and repeat with it, becomes a class.
    fn escape(&mut self) -> Option<()> {
        match self.rest.next()? {
            'd' => self.put("[0-9]", true),
            'w' => self.put("[0-9A-Za-z_]", true),
            c if SIGNS.contains(c) || "{}|-".contains(c) => self.put(&format!("[{c}]"), true),
            _ => return None,
        }
        Some(())
    }

    /// A class of letters, digits and signs that have no meaning in one.
    fn class(&mut self) -> Option<()> {
        let (mut set, mut has_dash) = (String::new(), false);
        loop {
            match self.rest.next()? {
                ']' => break,
                '\\' => set.push_str(self.escaped_in_class()?),
                '-' if self.rest.peek() == Some(&']') => has_dash = true,
                '-' => self.range(set.chars().next_back()?, &mut set)?,
                c if c.is_ascii_alphanumeric() || SIGNS.contains(c) => set.push(c),
                _ => return None,
            }
        }
        // A dash that is none of a range stands beside the class.
        let text = if has_dash { format!("([{set}]|[-])") } else { format!("[{set}]") };
        self.put(&text, true);
        (!set.is_empty()).then_some(())
    }

    fn escaped_in_class(&mut self) -> Option<&'static str> {
        match self.rest.next()? {
            'd' => Some("0-9"),
            'w' => Some("0-9A-Za-z_"),
            c => SIGNS.find(c).map(|at| &SIGNS[at..=at]),
        }
    }

    /// A range of characters of one kind.
    fn range(&mut self, from: char, set: &mut String) -> Option<()> {
        let to = self.rest.next()?;
        let kinds = [char::is_ascii_digit, char::is_ascii_lowercase, char::is_ascii_uppercase];
        let is_range = from < to && kinds.iter().any(|is| is(&from) && is(&to));
        set.extend(['-', to]);
        is_range.then_some(())
    }

    fn open(&mut self) -> Option<()> {
        self.depth += 1;
        if self.rest.next_if_eq(&'?').is_some() {
            self.rest.next_if_eq(&':')?;
        }
        self.put("(", false);
        (self.depth <= MAX_DEPTH).then_some(())
    }

    fn close(&mut self) -> Option<()> {
        self.depth = self.depth.checked_sub(1)?;
        self.put(")", true);
        Some(())
    }

    fn repeat(&mut self, sign: char) -> Option<()> {
        if !self.may_repeat {
            return None;
        }
        self.put(sign.encode_utf8(&mut [0; 4]), false);
        Some(())
    }

    fn times(&mut self) -> Option<()> {
        let mut text = String::new();
        loop {
            match self.rest.next()? {
                '}' => break,
                c if c.is_ascii_digit() || c == ',' => text.push(c),
                _ => return None,
            }
        }
        let (low, high) = text.split_once(',').unwrap_or((&text, &text));
        let low: u32 = low.parse().ok()?;
        let high = if high.is_empty() { low.max(1) } else { high.parse().ok()? };
        if !self.may_repeat || high < low.max(1) || high > MAX_TIMES {
            return None;
        }
        self.put(&format!("{{{text}}}"), false);
        Some(())
    }
}

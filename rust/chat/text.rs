//! Python's methods of strings, for texts that may be shaded.
//!
//! They look at what the shades stand for and cut the shaded text at the same characters, so that a template decides
//! the same with shaded contents as with real ones.

use std::borrow::Cow;
use std::ops::Range;

use super::spans::{Alphabet, is_space};

/// A text character by character, as it is and as what it stands for.
pub struct Text {
    shaded: Vec<char>,
    plain: Vec<char>,
}

impl Text {
    /// Takes a text apart.
    #[must_use]
    pub fn new(text: &str, alphabet: &Alphabet) -> Self {
        let plain = match alphabet.plain(text) {
            Cow::Borrowed(text) => text.chars().collect(),
            Cow::Owned(text) => text.chars().collect(),
        };
        Self { shaded: text.chars().collect(), plain }
    }

    fn cut(&self, range: Range<usize>) -> String {
        self.shaded[range].iter().collect()
    }

    fn len(&self) -> usize {
        self.plain.len()
    }

    /// Where `needle` occurs at or after `from`.
    fn find_from(&self, needle: &[char], from: usize) -> Option<usize> {
        if needle.is_empty() {
            return (from <= self.len()).then_some(from);
        }
        let last = self.len().checked_sub(needle.len())?;
        (from..=last).find(|&at| self.plain[at..].starts_with(needle))
    }

    /// Every occurrence of `needle`, none overlapping; at most `limit`.
    fn find_all(&self, needle: &[char], limit: Option<usize>) -> Vec<usize> {
        let mut found = Vec::new();
        let mut from = 0;
        while limit.is_none_or(|limit| found.len() < limit) {
            let Some(at) = self.find_from(needle, from) else { break };
            found.push(at);
            from = at + needle.len().max(1);
        }
        found
    }

    /// `str.strip`, `lstrip` and `rstrip`: without `chars`, white space.
    #[must_use]
    pub fn strip(&self, chars: Option<&str>, left: bool, right: bool) -> String {
        let goes = |c: &char| chars.map_or_else(|| is_space(*c), |chars| chars.contains(*c));
        let start = if left { self.plain.iter().take_while(|c| goes(c)).count() } else { 0 };
        let rest = &self.plain[start..];
        let end = if right { rest.iter().rev().take_while(|c| goes(c)).count() } else { 0 };
        self.cut(start..self.len() - end)
    }

    /// `str.split(separator, limit)`.
    #[must_use]
    pub fn split(&self, separator: &str, limit: Option<usize>) -> Vec<String> {
        let needle: Vec<char> = separator.chars().collect();
        self.cut_around(&self.find_all(&needle, limit), needle.len())
    }

    /// `str.rsplit(separator, limit)`.
    #[must_use]
    pub fn split_right(&self, separator: &str, limit: Option<usize>) -> Vec<String> {
        let needle: Vec<char> = separator.chars().collect();
        let mut found = Vec::new();
        let mut end = self.len();
        while limit.is_none_or(|limit| found.len() < limit) {
            let at = (0..=end.saturating_sub(needle.len()))
                .rev()
                .find(|&at| at + needle.len() <= end && self.plain[at..].starts_with(&needle));
            let Some(at) = at else { break };
            found.push(at);
            if at == 0 {
                break;
            }
            end = at;
        }
        found.reverse();
        self.cut_around(&found, needle.len())
    }

    fn cut_around(&self, found: &[usize], width: usize) -> Vec<String> {
        let starts = std::iter::once(0).chain(found.iter().map(|at| at + width));
        let ends = found.iter().copied().chain(std::iter::once(self.len()));
        starts.zip(ends).map(|(start, end)| self.cut(start..end)).collect()
    }

    /// `str.split()`: at any white space.
    #[must_use]
    pub fn split_space(&self, limit: Option<usize>) -> Vec<String> {
        let mut parts = Vec::new();
        let mut at = 0;
        loop {
            at += self.plain[at..].iter().take_while(|c| is_space(**c)).count();
            if at == self.len() {
                return parts;
            }
            if limit.is_some_and(|limit| parts.len() >= limit) {
                parts.push(self.cut(at..self.len()));
                return parts;
            }
            let end = at + self.plain[at..].iter().take_while(|c| !is_space(**c)).count();
            parts.push(self.cut(at..end));
            at = end;
        }
    }

    /// `str.splitlines(keep)`.
    #[must_use]
    pub fn lines(&self, keep: bool) -> Vec<String> {
        let mut lines = Vec::new();
        let mut start = 0;
        while start < self.len() {
            let end = start + self.plain[start..].iter().take_while(|c| !matches!(c, '\n' | '\r')).count();
            let width = match self.plain[end..] {
                ['\r', '\n', ..] => 2,
                [_, ..] => 1,
                [] => 0,
            };
            lines.push(self.cut(start..if keep { end + width } else { end }));
            start = end + width;
        }
        lines
    }

    /// `str.replace(old, new, limit)`.
    #[must_use]
    pub fn replace(&self, old: &str, new: &str, limit: Option<usize>) -> String {
        self.split_for_replace(old, limit).join(new)
    }

    fn split_for_replace(&self, old: &str, limit: Option<usize>) -> Vec<String> {
        self.split(old, limit)
    }

    /// `str.partition(separator)`.
    #[must_use]
    pub fn partition(&self, separator: &str, from_right: bool) -> [String; 3] {
        let mut parts = if from_right { self.split_right(separator, Some(1)) } else { self.split(separator, Some(1)) };
        match (parts.pop(), parts.pop(), from_right) {
            (Some(after), Some(before), _) => [before, separator.to_owned(), after],
            (Some(all), _, false) => [all, String::new(), String::new()],
            (all, _, _) => [String::new(), String::new(), all.unwrap_or_default()],
        }
    }

    /// The rest of a text after characters that it begins with.
    #[must_use]
    pub fn without_prefix(&self, prefix: &str) -> String {
        let prefix: Vec<char> = prefix.chars().collect();
        self.cut(if self.plain.starts_with(&prefix) { prefix.len() } else { 0 }..self.len())
    }

    /// The rest of a text before characters that it ends with.
    #[must_use]
    pub fn without_suffix(&self, suffix: &str) -> String {
        let suffix: Vec<char> = suffix.chars().collect();
        self.cut(0..self.len() - if self.plain.ends_with(&suffix) { suffix.len() } else { 0 })
    }

    /// Applies a change of case, or the like, to what the text stands for.
    #[must_use]
    pub fn recased(&self, alphabet: &Alphabet, change: impl Fn(&str) -> String) -> String {
        let plain: String = self.plain.iter().collect();
        let changed: Vec<char> = change(&plain).chars().collect();
        if self.shaded == self.plain {
            return changed.into_iter().collect();
        }
        if changed.len() != self.len() {
            return changed.into_iter().map(|c| alphabet.shade_anonymous(c)).collect();
        }
        let keep = |at: usize, c: char| {
            let (shaded, plain) = (self.shaded[at], self.plain[at]);
            if c == plain || shaded == plain {
                if c == plain { shaded } else { c }
            } else {
                alphabet.shade_anonymous(c)
            }
        };
        changed.into_iter().enumerate().map(|(at, c)| keep(at, c)).collect()
    }
}

/// Writes each character of a text as `escape` says, shaded where the character was; `None` leaves it as it is.
pub fn escape_into(out: &mut String, text: &str, alphabet: &Alphabet, escape: impl Fn(char) -> Option<String>) {
    for c in text.chars() {
        match escape(alphabet.plain_char(c)) {
            None => out.push(c),
            Some(escaped) if alphabet.is_shade(c) => {
                out.extend(escaped.chars().map(|c| alphabet.shade_anonymous(c)));
            }
            Some(escaped) => out.push_str(&escaped),
        }
    }
}

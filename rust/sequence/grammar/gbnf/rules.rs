//! GBNF, llama.cpp's notation for grammars, becomes rules.
//!
//! What it says and how it fails is llama.cpp's (`llama_grammar_parser`), but for two things: a rule may begin with
//! itself, and a repetition makes a rule of what it repeats, so that nothing grows by multiplication.

use std::collections::HashMap;

use rustc_hash::FxHashMap;

use crate::error::{Error, Result};
use crate::llama::Token;
use crate::sequence::grammar::ends_a_generation;

/// Groups within groups.
const MAX_DEPTH: usize = 200;
/// Terminals and references in all rules together, repetitions written out.
const MAX_ELEMENTS: usize = 200_000;
/// Times that something may be repeated; a larger upper end counts as none, as in llama.cpp.
const MAX_REPETITIONS: usize = 2_000;

const MAX_CHAR: u32 = 0x10_ffff;
const SURROGATES: (u32, u32) = (0xd800, 0xdfff);

/// Ranges of characters: sorted, apart, without surrogates.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Chars(Vec<(u32, u32)>);

impl Chars {
    fn new(mut ranges: Vec<(u32, u32)>) -> Self {
        ranges.retain(|range| range.0 <= range.1);
        ranges.sort_unstable();
        let mut merged: Vec<(u32, u32)> = Vec::new();
        for (low, high) in ranges {
            match merged.last_mut() {
                Some(last) if low <= last.1.saturating_add(1) => last.1 = last.1.max(high),
                _ => merged.push((low, high)),
            }
        }
        Self(merged)
    }

    /// All characters but these, the null and surrogates.
    fn inverse(mut excluded: Vec<(u32, u32)>) -> Self {
        excluded.extend([(0, 0), SURROGATES]);
        let mut ranges = Vec::new();
        let mut next = 0;
        for &(low, high) in &Self::new(excluded).0 {
            if next < low {
                ranges.push((next, low - 1));
            }
            next = high.saturating_add(1);
        }
        if next <= MAX_CHAR {
            ranges.push((next, MAX_CHAR));
        }
        Self(ranges)
    }

    /// Whether there is one of them from `low` to `high`.
    pub fn meets(&self, low: u32, high: u32) -> bool {
        let after = self.0.partition_point(|range| range.1 < low);
        self.0.get(after).is_some_and(|range| range.0 <= high)
    }
}

/// One step of an alternative.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    /// One of these characters (`Rules::sets`).
    Chars(u32),
    /// This token, whatever its text.
    Token(Token),
    /// Any other token.
    NotToken(Token),
    /// What the rule says.
    Rule(u32),
    /// The alternative is over.
    End,
}

/// A grammar: alternatives lie one after the other, each closed by an `End`.
#[derive(Debug)]
pub struct Rules {
    /// All alternatives of all rules.
    pub elements: Vec<Element>,
    /// Where the alternatives of each rule begin.
    pub starts: Vec<Vec<u32>>,
    /// Sets of characters.
    pub sets: Vec<Chars>,
    /// The rule to begin with.
    pub root: u32,
}

/// What is known of tokens.
#[derive(Clone, Copy)]
pub struct Tokens<'a> {
    /// The token that a name in angle brackets stands for, if it is one.
    pub by_name: &'a dyn Fn(&str) -> Option<Token>,
    /// Whether it ends a generation.
    pub is_end: &'a dyn Fn(Token) -> bool,
}

impl Rules {
    /// Reads a grammar.
    ///
    /// # Errors
    /// `Grammar` with what is wrong and where, as llama.cpp says it.
    pub fn parse(text: &str, root: &str, tokens: Tokens<'_>) -> Result<Self> {
        let mut parser = Parser::new(text, tokens);
        parser.grammar().map_err(|message| parser.at(&message))?;
        parser.finish(root)
    }
}

type Sequence = Vec<Element>;
type Parsed<T> = Result<T, String>;

struct Parser<'a> {
    text: &'a str,
    position: usize,
    depth: usize,
    n_elements: usize,
    names: HashMap<String, u32>,
    /// The alternatives of each rule, once they are known.
    rules: Vec<Option<Vec<Sequence>>>,
    sets: Vec<Chars>,
    known_sets: FxHashMap<Chars, u32>,
    tokens: Tokens<'a>,
}

impl<'a> Parser<'a> {
    fn new(text: &'a str, tokens: Tokens<'a>) -> Self {
        Self {
            text,
            position: 0,
            depth: 0,
            n_elements: 0,
            names: HashMap::new(),
            rules: Vec::new(),
            sets: Vec::new(),
            known_sets: FxHashMap::default(),
            tokens,
        }
    }

    /// An error with the place that was reached.
    fn at(&self, message: &str) -> Error {
        let before = &self.text[..self.position.min(self.text.len())];
        let line = before.matches('\n').count() + 1;
        let column = before.chars().rev().take_while(|&c| c != '\n').count() + 1;
        let rest: String = self.text[before.len()..].chars().take(24).take_while(|&c| c != '\n').collect();
        Error::Grammar(format!("the GBNF grammar is malformed in line {line}, column {column}, at {rest:?}: {message}"))
    }

    /// Lays the rules out.
    fn finish(self, root: &str) -> Result<Rules> {
        let mut rules = Rules { elements: Vec::new(), starts: Vec::new(), sets: self.sets, root: 0 };
        for (id, alternatives) in self.rules.into_iter().enumerate() {
            let Some(alternatives) = alternatives else {
                let name = self.names.iter().find(|(_, rule)| **rule as usize == id).map_or("", |(name, _)| name);
                return Err(Error::Grammar(format!(
                    "the GBNF grammar is incomplete: Undefined rule identifier '{name}'"
                )));
            };
            let mut starts = Vec::with_capacity(alternatives.len());
            for alternative in alternatives {
                starts.push(rules.elements.len() as u32);
                rules.elements.extend(alternative);
                rules.elements.push(Element::End);
            }
            rules.starts.push(starts);
        }
        rules.root = *self.names.get(root).ok_or_else(|| {
            let mut known: Vec<_> = self.names.keys().take(8).map(String::as_str).collect();
            known.sort_unstable();
            Error::Grammar(format!("the GBNF grammar does not contain a '{root}' symbol; it has {}", known.join(", ")))
        })?;
        Ok(rules)
    }

    // ---- rules ----------------------------------------------------------------------------------------------------

    fn grammar(&mut self) -> Parsed<()> {
        self.space(true);
        while self.peek().is_some() {
            self.rule()?;
        }
        Ok(())
    }

    fn rule(&mut self) -> Parsed<()> {
        let name = self.name()?;
        let id = self.named(&name);
        self.space(false);
        if !self.eat("::=") {
            return Err("expecting ::=".into());
        }
        self.space(true);
        let alternatives = self.alternatives(false)?;
        self.rules[id as usize] = Some(alternatives);
        match self.peek() {
            None | Some('\r' | '\n') => self.space(true),
            Some(_) => return Err("expecting newline or end".into()),
        }
        Ok(())
    }

    fn alternatives(&mut self, nested: bool) -> Parsed<Vec<Sequence>> {
        let mut alternatives = vec![self.sequence(nested)?];
        while self.eat("|") {
            self.space(true);
            alternatives.push(self.sequence(nested)?);
        }
        Ok(alternatives)
    }

    fn sequence(&mut self, nested: bool) -> Parsed<Sequence> {
        let mut sequence = Sequence::new();
        let mut last = 0;
        while let Some(next) = self.peek() {
            let begun = sequence.len();
            match next {
                '"' => self.literal(&mut sequence)?,
                '[' => sequence.push(self.class()?),
                '<' | '!' => sequence.push(self.token()?),
                '(' => sequence.push(self.group()?),
                '.' => {
                    self.position += 1;
                    sequence.push(self.chars(Chars::inverse(Vec::new()))?);
                }
                '*' | '+' | '?' | '{' => {
                    let (min, max) = self.repetition(nested)?;
                    let item = sequence.split_off(last);
                    self.repeat(item, min, max, &mut sequence)?;
                    continue;
                }
                c if is_word(c) => {
                    let name = self.name()?;
                    sequence.push(Element::Rule(self.named(&name)));
                    self.count(1)?;
                }
                _ => break,
            }
            last = begun;
            self.space(nested);
        }
        Ok(sequence)
    }

    fn group(&mut self) -> Parsed<Element> {
        self.position += 1;
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(format!("groups lie more than {MAX_DEPTH} deep in each other"));
        }
        self.space(true);
        let alternatives = self.alternatives(true)?;
        if !self.eat(")") {
            return Err("expecting ')'".into());
        }
        self.depth -= 1;
        self.unnamed(alternatives)
    }

    /// Reads `*`, `+`, `?`, `{n}`, `{n,}` or `{n,m}`: at least and at most how often.
    fn repetition(&mut self, nested: bool) -> Parsed<(usize, Option<usize>)> {
        let mark = self.next_char();
        self.space(nested);
        let range = match mark {
            Some('*') => return Ok((0, None)),
            Some('+') => return Ok((1, None)),
            Some('?') => return Ok((0, Some(1))),
            _ => self.braces(nested)?,
        };
        self.space(nested);
        Ok(range)
    }

    fn braces(&mut self, nested: bool) -> Parsed<(usize, Option<usize>)> {
        let min = self.number()?;
        self.space(nested);
        let mut max = Some(min);
        if self.eat(",") {
            self.space(nested);
            max = if self.peek().is_some_and(|c| c.is_ascii_digit()) { Some(self.number()?) } else { None };
            self.space(nested);
        }
        if !self.eat("}") {
            return Err("expecting '}'".into());
        }
        if min > MAX_REPETITIONS {
            return Err(format!("{min} repetitions; at most {MAX_REPETITIONS} can be demanded"));
        }
        if max.is_some_and(|max| max < min) {
            return Err("a repetition ends below its beginning".into());
        }
        Ok((min, max.filter(|&max| max <= MAX_REPETITIONS)))
    }

    /// `S{m,n}` is S m times, then up to n - m nested options of one more.
    fn repeat(&mut self, item: Sequence, min: usize, max: Option<usize>, out: &mut Sequence) -> Parsed<()> {
        let element = match item.as_slice() {
            [] => return Err("expecting preceding item to */+/?/{".into()),
            &[element] => element,
            _ => self.unnamed(vec![item])?,
        };
        out.extend(std::iter::repeat_n(element, min));
        self.count(min)?;
        match max {
            None => {
                let again = self.reserve();
                self.rules[again as usize] = Some(vec![vec![element, Element::Rule(again)], Vec::new()]);
                out.push(Element::Rule(again));
            }
            Some(max) => {
                let mut rest = None;
                for _ in min..max {
                    let one = [Some(element), rest].into_iter().flatten().collect();
                    rest = Some(self.unnamed(vec![one, Vec::new()])?);
                }
                out.extend(rest);
            }
        }
        self.count(2)
    }

    // ---- terminals ------------------------------------------------------------------------------------------------

    fn literal(&mut self, sequence: &mut Sequence) -> Parsed<()> {
        self.position += 1;
        while !self.eat("\"") {
            let c = self.character()?;
            sequence.push(self.chars(Chars::new(vec![(c, c)]))?);
        }
        Ok(())
    }

    fn class(&mut self) -> Parsed<Element> {
        self.position += 1;
        let inverse = self.eat("^");
        let mut ranges = Vec::new();
        while !self.eat("]") {
            let low = self.character()?;
            let mut high = low;
            if self.text[self.position..].starts_with('-') && !self.text[self.position..].starts_with("-]") {
                self.position += 1;
                high = self.character()?;
            }
            ranges.push((low, high));
        }
        if ranges.is_empty() && !inverse {
            return Err("a class of no characters".into());
        }
        self.chars(if inverse { Chars::inverse(ranges) } else { Chars::new(ranges) })
    }

    fn chars(&mut self, chars: Chars) -> Parsed<Element> {
        self.count(1)?;
        let next = self.sets.len() as u32;
        let id = *self.known_sets.entry(chars.clone()).or_insert(next);
        if id == next {
            self.sets.push(chars);
        }
        Ok(Element::Chars(id))
    }

    /// `<name>`, `<[id]>`, or one of them after `!`.
    fn token(&mut self) -> Parsed<Element> {
        let inverse = self.eat("!");
        let start = self.position;
        let token = self.named_token()?;
        self.count(1)?;
        match (inverse, (self.tokens.is_end)(token)) {
            (true, _) => Ok(Element::NotToken(token)),
            (false, false) => Ok(Element::Token(token)),
            (false, true) => Err(ends_a_generation(&self.text[start..self.position])),
        }
    }

    fn named_token(&mut self) -> Parsed<Token> {
        let start = self.position;
        if !self.eat("<") {
            return Err("expecting '<'".into());
        }
        if self.eat("[") {
            let id = self.number()?;
            if !self.eat("]>") {
                return Err("expecting ']>'".into());
            }
            return Token::try_from(id).map_err(|_| format!("token {id} is too large"));
        }
        let length = self.text[start..].find('>').ok_or("expecting '>'")?;
        self.position = start + length + 1;
        let name = &self.text[start..self.position];
        (self.tokens.by_name)(name).ok_or_else(|| format!("invalid token '{name}': not one token of a model"))
    }

    fn character(&mut self) -> Parsed<u32> {
        match self.next_char().ok_or("unexpected end of input")? {
            '\\' => self.escape(),
            c => Ok(c.into()),
        }
    }

    fn escape(&mut self) -> Parsed<u32> {
        match self.next_char().ok_or("unexpected end of input")? {
            'x' => self.hex(2),
            'u' => self.hex(4),
            'U' => self.hex(8),
            't' => Ok('\t'.into()),
            'r' => Ok('\r'.into()),
            'n' => Ok('\n'.into()),
            c @ ('\\' | '"' | '[' | ']' | '-') => Ok(c.into()),
            c => Err(format!("unknown escape \\{c}")),
        }
    }

    fn hex(&mut self, digits: usize) -> Parsed<u32> {
        let code = self.text.get(self.position..self.position + digits);
        let code = code.and_then(|code| u32::from_str_radix(code, 16).ok());
        self.position += digits;
        code.ok_or_else(|| {
            self.position -= digits;
            format!("expecting {digits} hex chars")
        })
    }

    // ---- parts ----------------------------------------------------------------------------------------------------

    fn peek(&self) -> Option<char> {
        self.text[self.position..].chars().next()
    }

    fn next_char(&mut self) -> Option<char> {
        let next = self.peek()?;
        self.position += next.len_utf8();
        Some(next)
    }

    fn eat(&mut self, text: &str) -> bool {
        let found = self.text[self.position..].starts_with(text);
        self.position += if found { text.len() } else { 0 };
        found
    }

    /// Passes over blanks and comments, and over line breaks where they may be.
    fn space(&mut self, newline: bool) {
        while let Some(next) = self.peek() {
            match next {
                ' ' | '\t' => self.position += 1,
                '\r' | '\n' if newline => self.position += 1,
                '#' => {
                    let rest = &self.text[self.position..];
                    self.position += rest.find(['\r', '\n']).unwrap_or(rest.len());
                }
                _ => return,
            }
        }
    }

    fn name(&mut self) -> Parsed<String> {
        let rest = &self.text[self.position..];
        let length = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
        if length == 0 {
            return Err("expecting name".into());
        }
        self.position += length;
        Ok(rest[..length].to_owned())
    }

    fn number(&mut self) -> Parsed<usize> {
        let rest = &self.text[self.position..];
        let length = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        if length == 0 {
            return Err("expecting integer".into());
        }
        self.position += length;
        rest[..length].parse().map_err(|_| format!("{} is too large", &rest[..length.min(40)]))
    }

    fn named(&mut self, name: &str) -> u32 {
        if let Some(&id) = self.names.get(name) {
            return id;
        }
        let id = self.reserve();
        self.names.insert(name.to_owned(), id);
        id
    }

    fn reserve(&mut self) -> u32 {
        self.rules.push(None);
        (self.rules.len() - 1) as u32
    }

    fn unnamed(&mut self, alternatives: Vec<Sequence>) -> Parsed<Element> {
        self.count(alternatives.len())?;
        let id = self.reserve();
        self.rules[id as usize] = Some(alternatives);
        Ok(Element::Rule(id))
    }

    fn count(&mut self, n: usize) -> Parsed<()> {
        self.n_elements += n;
        match self.n_elements > MAX_ELEMENTS {
            true => Err(format!("the grammar has more than {MAX_ELEMENTS} elements, repetitions written out")),
            false => Ok(()),
        }
    }
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '-'
}

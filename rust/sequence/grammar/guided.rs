//! llguidance's matchers: regular expressions, Lark, and the grammars of schemas.

use llguidance::api::{GrammarInit, StopReason, TopLevelGrammar};
use llguidance::toktrie::SimpleVob;
use llguidance::{Matcher, TokenParser};

use super::words::Words;
use crate::error::{Error, Result};
use crate::llama::Token;

/// A text on its way through a grammar of llguidance.
#[derive(Clone)]
pub struct Guided {
    matcher: Box<Matcher>,
    /// Whether the text may end although no token may follow: such a matcher answers nothing else any more.
    stuck: Option<bool>,
}

impl Guided {
    /// Compiles a Lark grammar.
    ///
    /// # Errors
    /// `Grammar` with llguidance's words.
    pub fn lark(words: &Words, text: &str) -> Result<Self> {
        let parser = parser(words, GrammarInit::Serialized(TopLevelGrammar::from_lark(text.to_owned())))?;
        match named_end(&parser, words) {
            Some(end) => Err(Error::Grammar(super::ends_a_generation(&words.name(end)))),
            None => Ok(Self::new(parser)),
        }
    }

    /// Compiles a regular expression that the whole text must match.
    ///
    /// # Errors
    /// `Grammar` with llguidance's words.
    pub fn regex(words: &Words, text: &str) -> Result<Self> {
        Self::from_grammar(words, GrammarInit::Serialized(TopLevelGrammar::from_regex(text)))
    }

    /// A matcher for a grammar.
    ///
    /// # Errors
    /// `Grammar` with llguidance's words.
    pub fn from_grammar(words: &Words, grammar: GrammarInit) -> Result<Self> {
        parser(words, grammar).map(Self::new)
    }

    fn new(parser: TokenParser) -> Self {
        Self { matcher: Box::new(Matcher::new(Ok(parser))), stuck: None }
    }

    /// The same state, with caches of its own.
    pub fn fork(&self) -> Self {
        Self { matcher: Box::new(self.matcher.deep_clone()), stuck: self.stuck }
    }

    /// Whether the token may come next. Never one that ends the generation.
    pub fn allows(&mut self, token: Token) -> Result<bool> {
        if self.is_over() {
            return Ok(false);
        }
        self.matcher.validate_tokens(&[token as u32]).map(|n| n > 0).map_err(refused)
    }

    /// The tokens that may come next, those that end the generation perhaps among them.
    pub fn mask(&mut self, words: &Words) -> Result<SimpleVob> {
        if self.is_over() {
            return Ok(words.none());
        }
        let may_end = self.may_end()?;
        let mask = self.matcher.compute_mask();
        if self.matcher.stop_reason() == StopReason::NoExtensionBias {
            self.stuck = Some(may_end);
            return Ok(words.none());
        }
        mask.map_err(refused)
    }

    /// Takes a token that is allowed.
    pub fn accept(&mut self, token: Token) -> Result<()> {
        self.matcher.consume_token(token as u32).map_err(refused)
    }

    /// Takes bytes. False if they are not allowed.
    pub fn accept_bytes(&mut self, bytes: &[u8], words: &Words) -> Result<bool> {
        let tokens: Vec<u32> = words.spell(bytes)?.into_iter().map(|token| token as u32).collect();
        self.matcher.try_consume_tokens(&tokens).map(|n| n == tokens.len()).map_err(refused)
    }

    /// Whether the text may end here.
    pub fn may_end(&mut self) -> Result<bool> {
        match self.stuck {
            Some(may_end) => Ok(may_end),
            None if self.matcher.is_stopped() => Ok(self.matcher.stop_reason().is_ok()),
            None => self.matcher.is_accepting().map_err(refused),
        }
    }

    /// Whether nothing may follow.
    pub fn is_over(&self) -> bool {
        self.stuck.is_some() || self.matcher.is_stopped()
    }
}

fn parser(words: &Words, grammar: GrammarInit) -> Result<TokenParser> {
    words.factory().create_parser_from_init_default(grammar).map_err(refused)
}

/// A token that the grammar names, and no other with it, although it ends a generation.
fn named_end(parser: &TokenParser, words: &Words) -> Option<Token> {
    let tokens = || 0..words.trie().vocab_size() as Token;
    let ends: Vec<Token> = tokens().filter(|&token| words.is_eog(token)).collect();
    parser.parser.grammar().lexer_spec().lexemes.iter().find_map(|lexeme| {
        let names = |&token: &Token| lexeme.contains_token(token as u32);
        let end = ends.iter().copied().find(names)?;
        tokens().filter(names).all(|token| words.is_eog(token)).then_some(end)
    })
}

/// A pattern without the anchors at its ends: the whole text must match in any case.
pub fn unanchored(regex: &str) -> &str {
    let regex = regex.strip_prefix('^').unwrap_or(regex);
    match regex.strip_suffix('$') {
        // `\$` is a dollar, `\\$` a backslash and the end.
        Some(rest) if rest.bytes().rev().take_while(|&byte| byte == b'\\').count() % 2 == 0 => rest,
        _ => regex,
    }
}

/// Characters of llguidance's messages, which may repeat the whole grammar.
const MAX_MESSAGE: usize = 500;

/// Without the states and backtraces that llguidance adds.
pub fn refused(error: impl std::fmt::Display) -> Error {
    let message = error.to_string();
    let end = ["\n<state>", "\n<non-verbose/>", "\n<backtrace>"].iter().filter_map(|mark| message.find(mark)).min();
    let message = message[..end.unwrap_or(message.len())].trim();
    match message.char_indices().nth(MAX_MESSAGE) {
        Some((end, _)) => Error::Grammar(format!("{}…", &message[..end])),
        None => Error::Grammar(message.to_owned()),
    }
}

//! The texts of a model's tokens, as grammars need them.

use std::sync::Arc;

use llguidance::ParserFactory;
use llguidance::api::ParserLimits;
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::{
    ApproximateTokEnv, INVALID_TOKEN, InferenceCapabilities, SimpleVob, TokEnv, TokRxInfo, TokTrie,
};

use crate::error::{Error, Result};
use crate::llama::Token;
use crate::model::Model;

/// Shown by token: what content will have of it.
///
/// Control tokens have no text there, so no grammar allows them by their text: what it allows is what readers get.
/// Lark and GBNF can name them.
pub struct Words {
    env: TokEnv,
    factory: ParserFactory,
    eog: SimpleVob,
}

impl Words {
    /// Of a model.
    ///
    /// # Errors
    /// `Grammar` where a vocabulary cannot be used.
    pub fn of(model: &Model) -> Result<Self> {
        let llama = model.llama();
        let n_vocab = llama.n_vocab();
        let mut words = Vec::with_capacity(n_vocab);
        for token in 0..n_vocab as Token {
            words.push(word(model, token)?);
        }
        Self::new(words, model.eog_tokens())
    }

    /// Of single bytes: for texts that no model has written.
    ///
    /// # Errors
    /// None that are known.
    pub fn bytes() -> Result<Self> {
        let mut words: Vec<Vec<u8>> = (0..=u8::MAX).map(|byte| vec![byte]).collect();
        words.push(Vec::new());
        Self::new(words, &[256])
    }

    fn new(words: Vec<Vec<u8>>, eog: &[Token]) -> Result<Self> {
        let end = eog.first().map_or(INVALID_TOKEN, |&token| token as u32);
        let trie = TokTrie::from(&TokRxInfo::new(words.len() as u32, end), &words);
        let mut ends = trie.alloc_token_set();
        eog.iter().for_each(|&token| ends.allow_token(token as u32));
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let slices = SlicedBiasComputer::general_slices();
        let mut factory =
            ParserFactory::new(&env, InferenceCapabilities::default(), &slices).map_err(super::guided::refused)?;
        factory.quiet();
        *factory.limits_mut() = ParserLimits { verbose_errors: false, ..ParserLimits::default() };
        Ok(Self { env, factory, eog: ends })
    }

    /// The tokens as a tree of their bytes.
    pub fn trie(&self) -> &TokTrie {
        self.env.tok_trie()
    }

    /// What makes matchers.
    pub fn factory(&self) -> &ParserFactory {
        &self.factory
    }

    /// Whether the token ends a generation.
    pub fn is_eog(&self, token: Token) -> bool {
        usize::try_from(token).is_ok_and(|token| token < self.eog.len() && self.eog.get(token))
    }

    /// The tokens that do.
    pub fn eog(&self) -> &SimpleVob {
        &self.eog
    }

    /// What a grammar calls a token.
    pub fn name(&self, token: Token) -> String {
        match self.trie().token(token as u32) {
            [TokTrie::SPECIAL_TOKEN_MARKER, name @ ..] => String::from_utf8_lossy(name).into_owned(),
            _ => format!("<[{token}]>"),
        }
    }

    /// The text of a token; empty if it has none.
    pub fn text(&self, token: Token) -> &[u8] {
        match self.trie().token(token as u32) {
            [TokTrie::SPECIAL_TOKEN_MARKER, ..] => &[],
            text => text,
        }
    }

    /// No token.
    pub fn none(&self) -> SimpleVob {
        self.trie().alloc_token_set()
    }

    /// All tokens.
    pub fn all(&self) -> SimpleVob {
        let mut all = self.none();
        (0..self.trie().vocab_size()).for_each(|token| all.allow_token(token as u32));
        all
    }

    /// Tokens whose texts make these bytes.
    ///
    /// # Errors
    /// `Grammar` if there are none.
    pub fn spell(&self, bytes: &[u8]) -> Result<Vec<Token>> {
        let tokens = self.trie().greedy_tokenize(bytes).into_iter().map(|token| token as Token).collect::<Vec<_>>();
        if tokens.iter().flat_map(|&token| self.text(token)).eq(bytes) {
            return Ok(tokens);
        }
        let text = String::from_utf8_lossy(bytes);
        Err(Error::Grammar(format!("the model's vocabulary cannot spell {text:?}, which the grammar needs")))
    }
}

/// What the token shows; for a control token the marker and its name, by which Lark grammars call it.
fn word(model: &Model, token: Token) -> Result<Vec<u8>> {
    let mut text = Vec::new();
    model.llama().token_to_piece(token, false, &mut text)?;
    if text.is_empty() {
        model.llama().token_to_piece(token, true, &mut text)?;
        match text.is_empty() {
            true => {}
            false => text.insert(0, TokTrie::SPECIAL_TOKEN_MARKER),
        }
    }
    Ok(text)
}

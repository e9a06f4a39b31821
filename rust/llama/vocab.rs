//! What the vocabulary says of its tokens, and tokens back to text. [`super::tokenizer`] has text to tokens.

use llama_cpp_sys_2 as sys;

use super::model::Model;
use super::tokenizer::MAX_TEXT_BYTES;
use super::{Token, guarded};
use crate::error::{Error, Result};

unsafe extern "C" {
    fn llamactor_token_to_piece(
        vocab: *const sys::llama_vocab,
        token: Token,
        piece: *mut std::ffi::c_char,
        capacity: i32,
        special: bool,
        message: *mut std::ffi::c_char,
        size: usize,
    ) -> i32;
    fn llamactor_detokenize(
        vocab: *const sys::llama_vocab,
        tokens: *const Token,
        count: i32,
        text: *mut std::ffi::c_char,
        capacity: i32,
        special: bool,
        message: *mut std::ffi::c_char,
        size: usize,
    ) -> i32;
}

/// The vocabulary's special tokens, where it has them (`llama_vocab_bos` and siblings).
#[derive(Clone, Debug, Default)]
#[allow(missing_docs)]
pub struct SpecialTokens {
    pub bos: Option<Token>,
    pub eos: Option<Token>,
    pub eot: Option<Token>,
    pub sep: Option<Token>,
    pub nl: Option<Token>,
    pub pad: Option<Token>,
    pub mask: Option<Token>,
    pub fim_prefix: Option<Token>,
    pub fim_suffix: Option<Token>,
    pub fim_middle: Option<Token>,
    pub fim_pad: Option<Token>,
    pub fim_repo: Option<Token>,
    pub fim_separator: Option<Token>,
}

impl Model {
    /// The vocabulary's special tokens.
    #[must_use]
    pub fn special_tokens(&self) -> SpecialTokens {
        let ask = |which: unsafe extern "C" fn(*const sys::llama_vocab) -> Token| {
            // SAFETY: the vocabulary is alive; each of these functions only reads it.
            let token = unsafe { which(self.vocab_ptr()) };
            (token >= 0).then_some(token)
        };
        SpecialTokens {
            bos: ask(sys::llama_vocab_bos),
            eos: ask(sys::llama_vocab_eos),
            eot: ask(sys::llama_vocab_eot),
            sep: ask(sys::llama_vocab_sep),
            nl: ask(sys::llama_vocab_nl),
            pad: ask(sys::llama_vocab_pad),
            mask: ask(sys::llama_vocab_mask),
            fim_prefix: ask(sys::llama_vocab_fim_pre),
            fim_suffix: ask(sys::llama_vocab_fim_suf),
            fim_middle: ask(sys::llama_vocab_fim_mid),
            fim_pad: ask(sys::llama_vocab_fim_pad),
            fim_repo: ask(sys::llama_vocab_fim_rep),
            fim_separator: ask(sys::llama_vocab_fim_sep),
        }
    }

    /// Whether prompts of this model begin with its BOS token.
    #[must_use]
    pub fn adds_bos(&self) -> bool {
        // SAFETY: the vocabulary is alive.
        unsafe { sys::llama_vocab_get_add_bos(self.vocab_ptr()) }
    }

    /// Whether the token ends a generation. False outside the vocabulary.
    #[must_use]
    pub fn is_eog(&self, token: Token) -> bool {
        // SAFETY: the vocabulary is alive and the token inside it.
        self.contains(token) && unsafe { sys::llama_vocab_is_eog(self.vocab_ptr(), token) }
    }

    /// Whether the token is in the vocabulary.
    #[must_use]
    pub fn contains(&self, token: Token) -> bool {
        usize::try_from(token).is_ok_and(|index| index < self.n_vocab())
    }

    /// Whether the token stands for a text as a whole: one that the tokeniser cuts out before anything else, be it a
    /// control token or one that the file's maker added. False outside the vocabulary.
    #[must_use]
    pub fn is_whole(&self, token: Token) -> bool {
        let wanted = sys::LLAMA_TOKEN_ATTR_CONTROL | sys::LLAMA_TOKEN_ATTR_USER_DEFINED;
        // SAFETY: the vocabulary is alive and the token inside it.
        self.contains(token) && unsafe { sys::llama_vocab_get_attr(self.vocab_ptr(), token) } & wanted != 0
    }

    /// The tokens that the file says must never be drawn.
    #[must_use]
    pub fn suppressed_tokens(&self) -> Vec<Token> {
        let mut count = 0;
        // SAFETY: the vocabulary is alive and owns the array of `count` tokens.
        unsafe {
            let tokens = sys::llama_vocab_get_suppress_tokens(self.vocab_ptr(), &raw mut count);
            match usize::try_from(count) {
                Ok(count) if count > 0 && !tokens.is_null() => std::slice::from_raw_parts(tokens, count).to_vec(),
                _ => Vec::new(),
            }
        }
    }

    /// Appends the bytes of one token: perhaps a part of a character, perhaps nothing.
    ///
    /// # Errors
    /// `Value` for a token outside the vocabulary.
    pub fn token_to_piece(&self, token: Token, special: bool, piece: &mut Vec<u8>) -> Result<()> {
        if !self.contains(token) {
            return Err(self.outside(token));
        }
        let start = piece.len();
        piece.resize(start + 64, 0);
        let mut length = self.piece_into(token, special, &mut piece[start..])?;
        if length < 0 {
            piece.resize(start + length.unsigned_abs() as usize, 0);
            length = self.piece_into(token, special, &mut piece[start..])?;
        }
        piece.truncate(start + length.max(0) as usize);
        Ok(())
    }

    fn piece_into(&self, token: Token, special: bool, piece: &mut [u8]) -> Result<i32> {
        guarded(|message, size| {
            // SAFETY: the token was checked; the piece is a live slice.
            unsafe {
                llamactor_token_to_piece(
                    self.vocab_ptr(),
                    token,
                    piece.as_mut_ptr().cast(),
                    piece.len() as i32,
                    special,
                    message,
                    size,
                )
            }
        })
        .map_err(Error::Value)
    }

    /// The text of tokens, the inverse of [`Model::tokenize`]; bytes that are not UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// `Value` for a token outside the vocabulary or for more than 16 Mi tokens.
    pub fn detokenize(&self, tokens: &[Token], special: bool) -> Result<String> {
        if tokens.len() > MAX_TEXT_BYTES {
            return Err(Error::Value(format!("{} tokens; at most {MAX_TEXT_BYTES} at once", tokens.len())));
        }
        if let Some(&token) = tokens.iter().find(|&&token| !self.contains(token)) {
            return Err(self.outside(token));
        }
        let mut text = vec![0u8; tokens.len() * 6 + 16];
        let mut length = self.detokenize_into(tokens, special, &mut text)?;
        if length < 0 {
            text.resize(length.unsigned_abs() as usize, 0);
            length = self.detokenize_into(tokens, special, &mut text)?;
        }
        text.truncate(length.max(0) as usize);
        Ok(String::from_utf8(text).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned()))
    }

    fn detokenize_into(&self, tokens: &[Token], special: bool, text: &mut [u8]) -> Result<i32> {
        guarded(|message, size| {
            // SAFETY: every token was checked; both slices are alive and shorter than 2³¹.
            unsafe {
                llamactor_detokenize(
                    self.vocab_ptr(),
                    tokens.as_ptr(),
                    tokens.len() as i32,
                    text.as_mut_ptr().cast(),
                    text.len() as i32,
                    special,
                    message,
                    size,
                )
            }
        })
        .map_err(Error::Value)
    }

    /// The error for a token that the vocabulary does not have.
    #[must_use]
    pub fn outside(&self, token: Token) -> Error {
        Error::Value(format!("token {token} is outside the vocabulary (0 to {})", self.n_vocab() - 1))
    }
}

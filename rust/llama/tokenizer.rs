//! Texts to tokens, exactly as llama.cpp makes them, but in bounded time and on a stack that is large enough.
//!
//! A short text goes to llama.cpp as it is. A longer one is cut at its special tokens first ([`super::special`]);
//! each stretch between them is then tokenised by itself, as llama.cpp does it too: by [`super::spm`] if it is of that
//! kind, else by llama.cpp.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::OnceLock;

use llama_cpp_sys_2 as sys;

use super::model::Model;
use super::pretokenizer::Pretokenizer;
use super::special::{Piece, Special, Splitter};
use super::spm::{Entry, Scratch, Spm};
use super::{Token, guarded};
use crate::error::{Error, Result};

unsafe extern "C" {
    fn llamactor_tokenize(
        vocab: *const sys::llama_vocab,
        text: *const std::ffi::c_char,
        length: i32,
        tokens: *mut Token,
        capacity: i32,
        add_special: bool,
        parse_special: bool,
        message: *mut std::ffi::c_char,
        size: usize,
    ) -> i32;
    fn llamactor_special_tokens(vocab: *const sys::llama_vocab, tokens: *mut Token, capacity: i32) -> i32;
}

/// Longest text to tokenise at once, in bytes: lengths are 32-bit inside llama.cpp.
pub const MAX_TEXT_BYTES: usize = 16 * 1024 * 1024;

/// Longest text that llama.cpp gets as it is: the square of its length is still little.
const WHOLE_BYTES: usize = 16 * 1024;

/// Different stretches of one text whose expressions take time to compile, up to a millisecond each.
const MAX_COMPILED: usize = 16 * 1024;

/// Longest stretch whose tokens are remembered for the next time it comes, and how many are.
const KNOWN_BYTES: usize = 64;
const MAX_KNOWN: usize = 16 * 1024;

/// What a model needs to tokenise long texts, made when first needed.
#[derive(Default)]
pub(super) struct Tables {
    /// Without and with control tokens.
    splitters: [OnceLock<Option<Splitter>>; 2],
    spm: OnceLock<Option<Spm>>,
    pretokenizer: Option<Pretokenizer>,
    /// Bytes of RWKV vocabularies that begin tokens but are none.
    endless: OnceLock<Vec<u8>>,
}

impl Tables {
    /// `pre` is the value of `tokenizer.ggml.pre`, with overrides.
    pub fn new(kind: sys::llama_vocab_type, pre: &str) -> Self {
        let is_bpe = kind == sys::LLAMA_VOCAB_TYPE_BPE;
        Self { pretokenizer: if is_bpe { Pretokenizer::named(pre) } else { None }, ..Self::default() }
    }
}

impl Model {
    /// The tokens of a text. `parse_special` lets the text name control tokens.
    ///
    /// # Errors
    /// `Value` for more than 16 MiB, a text that would take too long or too much stack, or what the tokeniser threw;
    /// `Unsupported` if the vocabulary lacks the tokens that a text shall begin or end with.
    pub fn tokenize(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Vec<Token>> {
        if text.len() > MAX_TEXT_BYTES {
            return Err(Error::Value(format!(
                "text has {} bytes; at most {MAX_TEXT_BYTES} (16 MiB) are tokenised at once: split it",
                text.len()
            )));
        }
        if text.len() <= WHOLE_BYTES {
            return self.tokenize_whole(text.as_bytes(), add_special, parse_special);
        }
        self.tokenize_in_pieces(text.as_bytes(), add_special, parse_special)
    }

    /// Cuts a text at its special tokens, in the order of the text. Nothing that touches a protected range is special,
    /// except plain text that the vocabulary has tokens of its own for, such as runs of spaces.
    ///
    /// # Errors
    /// `Unsupported` for a vocabulary with too many special tokens.
    pub fn partition(&self, text: &[u8], parse_special: bool, protected: &[Range<usize>]) -> Result<Vec<Piece>> {
        Ok(self.splitter(parse_special)?.partition(text, protected))
    }

    pub(super) fn tokenize_in_pieces(&self, text: &[u8], add_special: bool, parse_special: bool) -> Result<Vec<Token>> {
        let ends = if add_special { self.tokenize_whole(b"", true, false)? } else { Vec::new() };
        let (before, after) = ends.split_at(self.leading().min(ends.len()));
        let mut stretches = Stretches::new(self, false);
        stretches.tokens.extend(before);
        for piece in self.partition(text, parse_special, &[])? {
            match piece {
                Piece::Special { token, .. } => stretches.push(token),
                Piece::Text(range) => stretches.tokenize(&text[range])?,
            }
        }
        stretches.tokens.extend(after);
        Ok(stretches.finish())
    }

    /// How many of the tokens that llama.cpp adds stand before the text.
    fn leading(&self) -> usize {
        match self.vocab_kind() {
            sys::LLAMA_VOCAB_TYPE_WPM => 1,
            _ => usize::from(self.adds_bos()),
        }
    }

    /// llama.cpp's own tokens of a whole text.
    pub(super) fn tokenize_whole(&self, text: &[u8], add_special: bool, parse_special: bool) -> Result<Vec<Token>> {
        self.check_ends(add_special)?;
        let mut tokens = Vec::new();
        self.append_whole(text, add_special, parse_special, &mut 0, &mut tokens)?;
        Ok(tokens)
    }

    /// `steps` counts what regular expressions cost, over all stretches of a text.
    fn append_whole(
        &self,
        text: &[u8],
        add_special: bool,
        parse_special: bool,
        steps: &mut usize,
        tokens: &mut Vec<Token>,
    ) -> Result<()> {
        self.check_endless(text)?;
        let run = |tokens: &mut Vec<Token>| self.append_here(text, add_special, parse_special, tokens);
        match self.tables().pretokenizer.map_or(Ok(None), |pretokenizer| pretokenizer.stack(text, steps))? {
            None => run(tokens),
            Some(stack) => on_stack(stack, || run(tokens)),
        }
    }

    /// On the caller's stack.
    fn append_here(&self, text: &[u8], add_special: bool, parse_special: bool, tokens: &mut Vec<Token>) -> Result<()> {
        let start = tokens.len();
        tokens.resize(start + text.len() + 8, 0);
        let mut count = self.tokenize_into(text, add_special, parse_special, &mut tokens[start..])?;
        if count < 0 {
            tokens.resize(start + count.unsigned_abs() as usize, 0);
            count = self.tokenize_into(text, add_special, parse_special, &mut tokens[start..])?;
        }
        tokens.truncate(start + count.max(0) as usize);
        Ok(())
    }

    /// Number of tokens written, or the negative number that would be needed.
    fn tokenize_into(&self, text: &[u8], add_special: bool, parse_special: bool, tokens: &mut [Token]) -> Result<i32> {
        guarded(|message, size| {
            // SAFETY: text and tokens are live slices whose lengths fit 32 bits (16 MiB at most).
            unsafe {
                llamactor_tokenize(
                    self.vocab_ptr(),
                    text.as_ptr().cast(),
                    text.len() as i32,
                    tokens.as_mut_ptr(),
                    tokens.len() as i32,
                    add_special,
                    parse_special,
                    message,
                    size,
                )
            }
        })
        .map_err(|reason| refused(text, &reason))
    }

    /// llama.cpp aborts the process when it shall add a token that the vocabulary does not have.
    fn check_ends(&self, add_special: bool) -> Result<()> {
        match if add_special { self.lacking_end() } else { None } {
            None => Ok(()),
            Some(name) => Err(Error::Unsupported(format!("texts of this model have a {name} token, but it has none"))),
        }
    }

    fn lacking_end(&self) -> Option<&'static str> {
        let tokens = self.special_tokens();
        match self.vocab_kind() {
            sys::LLAMA_VOCAB_TYPE_RWKV | sys::LLAMA_VOCAB_TYPE_TEST => None,
            sys::LLAMA_VOCAB_TYPE_WPM if tokens.bos.is_none() => Some("BOS"),
            sys::LLAMA_VOCAB_TYPE_WPM => tokens.sep.is_none().then_some("SEP"),
            _ if self.adds_bos() && tokens.bos.is_none() => Some("BOS"),
            _ => (self.adds_eos() && tokens.eos.is_none()).then_some("EOS"),
        }
    }

    /// In RWKV vocabularies llama.cpp does not get past a byte that begins tokens but matches none.
    fn check_endless(&self, text: &[u8]) -> Result<()> {
        if self.vocab_kind() != sys::LLAMA_VOCAB_TYPE_RWKV {
            return Ok(());
        }
        let endless = self.tables().endless.get_or_init(|| self.endless_bytes());
        match text.iter().find(|byte| endless.contains(byte)) {
            None => Ok(()),
            Some(byte) => Err(refused(text, &format!("the vocabulary has no token for byte 0x{byte:02X}"))),
        }
    }

    fn endless_bytes(&self) -> Vec<u8> {
        let (mut begins, mut is_token) = ([false; 256], [false; 256]);
        for token in 0..self.n_vocab() as Token {
            match unescape(self.token_text(token)).as_slice() {
                [] => {}
                [byte] => is_token[usize::from(*byte)] = true,
                [first, ..] => begins[usize::from(*first)] = true,
            }
        }
        (0..=u8::MAX).filter(|&byte| begins[usize::from(byte)] && !is_token[usize::from(byte)]).collect()
    }

    fn splitter(&self, parse_special: bool) -> Result<&Splitter> {
        self.tables().splitters[usize::from(parse_special)]
            .get_or_init(|| Splitter::new(self.specials(parse_special)))
            .as_ref()
            .ok_or_else(|| Error::Unsupported("the special tokens of this vocabulary are too many".into()))
    }

    /// The special tokens in the order in which llama.cpp looks for them.
    fn specials(&self, parse_special: bool) -> Vec<Special> {
        let mut tokens = vec![0; self.n_vocab()];
        // SAFETY: the vocabulary is alive, the slice as long as it says.
        let count = unsafe { llamactor_special_tokens(self.vocab_ptr(), tokens.as_mut_ptr(), tokens.len() as i32) };
        tokens.truncate(count.max(0) as usize);
        tokens.retain(|&token| parse_special || self.token_attributes(token) & NAMED == 0);
        tokens.into_iter().map(|token| self.special(token)).collect()
    }

    fn special(&self, token: Token) -> Special {
        let (text, attributes) = (self.token_text(token), self.token_attributes(token));
        Special {
            token,
            text: text.to_vec(),
            strips_left: attributes & sys::LLAMA_TOKEN_ATTR_LSTRIP != 0,
            strips_right: attributes & sys::LLAMA_TOKEN_ATTR_RSTRIP != 0,
            harmless: attributes & NAMED == 0 && !self.is_guarded(token),
        }
    }

    /// Whether protected text must never become this token: control tokens, and those user-defined ones that read
    /// like markup (`<think>`, `<|start|>`), which mean as much to a model.
    fn is_guarded(&self, token: Token) -> bool {
        let attributes = self.token_attributes(token);
        let is_markup =
            || String::from_utf8_lossy(self.token_text(token)).contains(['<', '>', '[', ']', '|', '｜', '◁']);
        attributes & sys::LLAMA_TOKEN_ATTR_CONTROL != 0
            || attributes & sys::LLAMA_TOKEN_ATTR_USER_DEFINED != 0 && is_markup()
    }

    /// Texts of the tokens that protected text never becomes, and that of the unknown token.
    #[must_use]
    pub fn guarded_texts(&self) -> Vec<String> {
        let unknown = |token| self.token_attributes(token) & sys::LLAMA_TOKEN_ATTR_UNKNOWN != 0;
        let guarded = (0..self.n_vocab() as Token).filter(|&token| self.is_guarded(token) || unknown(token));
        let texts = guarded.filter_map(|token| std::str::from_utf8(self.token_text(token)).ok());
        texts.filter(|text| !text.is_empty()).map(str::to_owned).collect()
    }

    /// The vocabulary as SentencePiece merges it; `None` if it is of another kind.
    fn spm(&self) -> Option<&Spm> {
        if self.vocab_kind() != sys::LLAMA_VOCAB_TYPE_SPM {
            return None;
        }
        self.tables().spm.get_or_init(|| self.make_spm()).as_ref()
    }

    /// Whether spaces are put before texts is asked of llama.cpp itself.
    fn make_spm(&self) -> Option<Spm> {
        const PROBE: &[u8] = "\u{10fffd}".as_bytes();
        let make = |space_prefix| {
            let tokens = (0..self.n_vocab() as Token).map(|token| (self.token_text(token).into(), self.entry(token)));
            Spm::new(tokens, space_prefix)
        };
        let bare = make(false)?;
        let mut tokens = Vec::new();
        let is_bare = bare.tokenize(PROBE, false, &mut Scratch::default(), &mut tokens).is_ok()
            && self.tokenize_whole(PROBE, false, false).is_ok_and(|whole| whole == tokens);
        if is_bare { Some(bare) } else { make(true) }
    }

    fn entry(&self, token: Token) -> Entry {
        let unknown = self.token_attributes(token) & sys::LLAMA_TOKEN_ATTR_UNKNOWN != 0;
        Entry { score: self.token_score(token), guarded: unknown || self.is_guarded(token) }
    }

    /// A token's text as the vocabulary writes it.
    fn token_text(&self, token: Token) -> &[u8] {
        assert!(self.contains(token), "token {token} is outside the vocabulary");
        // SAFETY: the token is in the vocabulary, which owns the NUL-terminated text as long as the model lives.
        unsafe { std::ffi::CStr::from_ptr(sys::llama_vocab_get_text(self.vocab_ptr(), token)) }.to_bytes()
    }

    fn token_score(&self, token: Token) -> f32 {
        assert!(self.contains(token), "token {token} is outside the vocabulary");
        // SAFETY: the token is in the vocabulary, which is alive.
        unsafe { sys::llama_vocab_get_score(self.vocab_ptr(), token) }
    }

    fn token_attributes(&self, token: Token) -> sys::llama_token_attr {
        assert!(self.contains(token), "token {token} is outside the vocabulary");
        // SAFETY: the token is in the vocabulary, which is alive.
        unsafe { sys::llama_vocab_get_attr(self.vocab_ptr(), token) }
    }

    fn vocab_kind(&self) -> sys::llama_vocab_type {
        // SAFETY: the vocabulary is alive.
        unsafe { sys::llama_vocab_type(self.vocab_ptr()) }
    }

    fn adds_eos(&self) -> bool {
        // SAFETY: the vocabulary is alive.
        unsafe { sys::llama_vocab_get_add_eos(self.vocab_ptr()) }
    }
}

/// Attributes of tokens that only a text with `parse_special` names.
const NAMED: sys::llama_token_attr = sys::LLAMA_TOKEN_ATTR_CONTROL | sys::LLAMA_TOKEN_ATTR_UNKNOWN;

/// Tokens of a text that was cut by [`Model::partition`], stretch by stretch.
pub struct Stretches<'a> {
    model: &'a Model,
    /// The text was protected, or a part of it.
    guarded: bool,
    tokens: Vec<Token>,
    scratch: Scratch,
    /// Where the tokens of short stretches are that came before.
    known: HashMap<&'a [u8], Range<usize>>,
    compiled: usize,
    /// What the expressions cost so far.
    steps: usize,
}

impl<'a> Stretches<'a> {
    /// Nothing yet. `guarded` stretches become no control tokens and no user-defined ones that read like markup, not
    /// even where llama.cpp would merge their texts into such.
    #[must_use]
    pub fn new(model: &'a Model, guarded: bool) -> Self {
        let (tokens, scratch, known) = Default::default();
        Self { model, guarded, tokens, scratch, known, compiled: 0, steps: 0 }
    }

    /// How many tokens there are so far.
    #[must_use]
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there are none so far.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Appends a special token.
    pub fn push(&mut self, token: Token) {
        self.tokens.push(token);
    }

    /// All tokens.
    #[must_use]
    pub fn finish(mut self) -> Vec<Token> {
        self.tokens.shrink_to_fit();
        self.tokens
    }

    /// Appends the tokens of a stretch between special tokens, or between one and an end of the text.
    ///
    /// # Errors
    /// As [`Model::tokenize`].
    pub fn tokenize(&mut self, text: &'a [u8]) -> Result<()> {
        if let Some(range) = self.known.get(text) {
            self.tokens.extend_from_within(range.clone());
            return Ok(());
        }
        let start = self.tokens.len();
        if let Some(spm) = self.model.spm() {
            return spm
                .tokenize(text, self.guarded, &mut self.scratch, &mut self.tokens)
                .map_err(|byte| refused(text, &format!("the vocabulary has no token for byte 0x{byte:02X}")));
        }
        self.check(text)?;
        if self.guarded {
            self.append_guarded(text)?
        } else {
            self.append(text)?
        }
        if text.len() <= KNOWN_BYTES && self.known.len() < MAX_KNOWN {
            self.known.insert(text, start..self.tokens.len());
        }
        Ok(())
    }

    fn append(&mut self, text: &[u8]) -> Result<()> {
        self.model.append_whole(text, false, false, &mut self.steps, &mut self.tokens)
    }

    /// Only llama.cpp knows these vocabularies: texts of guarded tokens are cut behind their first character, and as a
    /// last resort (lower case may make such a text of another one) every character is taken by itself.
    fn append_guarded(&mut self, text: &[u8]) -> Result<()> {
        let (model, start) = (self.model, self.tokens.len());
        let dangers: [&dyn Fn() -> Result<Vec<usize>>; 3] =
            [&|| Ok(model.splitter(false)?.dangers(text)), &|| Ok(model.splitter(true)?.dangers(text)), &|| {
                Ok((0..text.len()).rev().filter(|&position| text[position] & 0xC0 != 0x80).collect())
            }];
        for dangers in dangers {
            let dangers = dangers()?;
            self.tokens.truncate(start);
            self.append_cut(text, dangers)?;
            if !self.tokens[start..].iter().any(|&token| model.is_guarded(token)) {
                return Ok(());
            }
        }
        Err(refused(text, "one of its characters is a control token"))
    }

    /// `dangers` in falling order.
    fn append_cut(&mut self, text: &[u8], dangers: Vec<usize>) -> Result<()> {
        let mut from = 0;
        for danger in dangers.into_iter().rev() {
            let to = danger + 1 + text[danger + 1..].iter().take_while(|&byte| byte & 0xC0 == 0x80).count();
            self.append(&text[from..to])?;
            from = to;
        }
        if from < text.len() { self.append(&text[from..]) } else { Ok(()) }
    }

    fn check(&mut self, text: &[u8]) -> Result<()> {
        if text.len() > WHOLE_BYTES && self.model.vocab_kind() == sys::LLAMA_VOCAB_TYPE_SPM {
            return Err(refused(text, "scores that are not numbers; at most 16384 bytes are possible"));
        }
        self.compiled +=
            usize::from(self.model.tables().pretokenizer.is_some_and(|pretokenizer| pretokenizer.compiles));
        if self.compiled > MAX_COMPILED {
            return Err(Error::Value(format!(
                "the text has more than {MAX_COMPILED} different stretches between special tokens; this model's \
                 pre-tokenizer takes about a millisecond for each: split the text"
            )));
        }
        Ok(())
    }
}

fn refused(text: &[u8], reason: &str) -> Error {
    Error::Value(format!("the tokeniser refused a text of {} bytes: {reason}", text.len()))
}

/// Runs on a thread of its own with a stack of that many bytes.
fn on_stack(bytes: usize, run: impl FnOnce() -> Result<()> + Send) -> Result<()> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("llamactor-tokenize".into()).stack_size(bytes);
        let thread = thread.spawn_scoped(scope, run).map_err(|source| Error::Io {
            context: format!("cannot start the thread llamactor-tokenize with a stack of {bytes} bytes"),
            source,
        })?;
        thread.join().map_err(|_| Error::WorkerCrashed("the tokeniser's thread died".into()))?
    })
}

/// A token's bytes, which RWKV vocabularies write with escapes (`llama_unescape_rwkv_token`).
fn unescape(escaped: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(escaped.len());
    let mut rest = escaped.iter();
    while let Some(&byte) = rest.next() {
        let byte = match byte {
            b'\\' => match rest.next() {
                None => break,
                Some(b't') => b'\t',
                Some(b'n') => b'\n',
                Some(b'r') => b'\r',
                Some(b'x') => match (rest.next(), rest.next()) {
                    (Some(&high), Some(&low)) => (nibble(high) << 4).wrapping_add(nibble(low)),
                    _ => break,
                },
                Some(&other) => other,
            },
            other => other,
        };
        bytes.push(byte);
    }
    bytes
}

fn nibble(digit: u8) -> u8 {
    if digit >= b'a' { digit - b'a' + 10 } else { digit.wrapping_sub(b'0') }
}

#[cfg(test)]
mod tests;

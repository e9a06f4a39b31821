//! ① A GGUF file becomes a shared, read-only model.

mod info;

use std::any::Any;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

pub use info::ModelInfo;

use crate::error::{Error, Result};
use crate::llama::{self, LoadParams, OverrideValue, Token, gguf};

/// A loaded model, its description and what tells it from others.
pub struct Model {
    llama: Arc<llama::Model>,
    info: ModelInfo,
    fingerprint: u128,
    path: PathBuf,
    overrides: Vec<(String, OverrideValue)>,
    eog_tokens: Vec<Token>,
    suppressed_tokens: Vec<Token>,
    guarded_texts: OnceLock<Vec<String>>,
    kept: Mutex<Option<Arc<dyn Any + Send + Sync>>>,
}

impl Model {
    /// Checks the file's header, then loads it. Blocks; `on_progress` hears 0 to 1 and returns whether to go on.
    ///
    /// # Errors
    /// `ModelNotFound`, `ModelLoad` with what is wrong with the file, `LoadCancelled`.
    pub fn load(path: &Path, params: &LoadParams, on_progress: &mut dyn FnMut(f32) -> bool) -> Result<Self> {
        let header = check(path, params)?;
        for (adapter, _) in &params.lora {
            gguf::check_adapter_file(adapter)?;
        }
        if !on_progress(0.0) {
            return Err(Error::LoadCancelled);
        }
        let llama = Arc::new(llama::Model::load(path, params, on_progress)?);
        Ok(Self {
            info: ModelInfo::new(&llama, &header, path, params),
            fingerprint: info::fingerprint(&header, path, params)?,
            eog_tokens: (0..llama.n_vocab() as Token).filter(|&token| llama.is_eog(token)).collect(),
            suppressed_tokens: llama.suppressed_tokens(),
            guarded_texts: OnceLock::new(),
            kept: Mutex::default(),
            llama,
            path: path.to_owned(),
            overrides: params.overrides.clone(),
        })
    }

    /// The wrapped model of llama.cpp.
    #[must_use]
    pub fn llama(&self) -> &Arc<llama::Model> {
        &self.llama
    }

    /// What the file says of itself.
    #[must_use]
    pub fn info(&self) -> &ModelInfo {
        &self.info
    }

    /// Differs between models, quantisations and LoRA adapters: a saved state fits only its own.
    #[must_use]
    pub fn fingerprint(&self) -> u128 {
        self.fingerprint
    }

    /// Tokens that end a generation.
    #[must_use]
    pub fn eog_tokens(&self) -> &[Token] {
        &self.eog_tokens
    }

    /// Tokens that must never be drawn.
    #[must_use]
    pub fn suppressed_tokens(&self) -> &[Token] {
        &self.suppressed_tokens
    }

    /// Texts of the tokens that nothing but a template or a developer may name.
    #[must_use]
    pub fn guarded_texts(&self) -> &[String] {
        self.guarded_texts.get_or_init(|| self.llama.guarded_texts())
    }

    /// What a later room keeps with the model: made when it is first asked for, the same from then on.
    ///
    /// # Errors
    /// What making it fails with; then nothing is kept.
    pub fn keep<T: Any + Send + Sync>(&self, make: impl FnOnce() -> Result<T>) -> Result<Arc<T>> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Ok(known)) = kept.clone().map(Arc::downcast) {
            return Ok(known);
        }
        let made = Arc::new(make()?);
        *kept = Some(Arc::clone(&made) as Arc<dyn Any + Send + Sync>);
        Ok(made)
    }

    /// The tokens of a prompt, on the caller's stack: BOS first where the model wants it.
    ///
    /// # Errors
    /// As [`llama::Model::tokenize`].
    pub fn tokenize_prompt(&self, text: &str, parse_special: bool) -> Result<Vec<Token>> {
        self.llama.tokenize(text, self.llama.adds_bos(), parse_special)
    }

    /// The tokens of a text that goes on after others: without BOS, and without the space that some vocabularies put
    /// before a text.
    ///
    /// # Errors
    /// As [`llama::Model::tokenize`].
    pub fn tokenize_continuation(&self, text: &str, parse_special: bool) -> Result<Vec<Token>> {
        let tokens = self.llama.tokenize(text, false, parse_special)?;
        let mut first = Vec::new();
        if let Some(&token) = tokens.first() {
            self.llama.token_to_piece(token, true, &mut first)?;
        }
        if text.starts_with(' ') || !first.starts_with(b" ") {
            return Ok(tokens);
        }
        // After a line break no space is put: the tokens that follow it are those of the bare text.
        let before = self.llama.tokenize("\n", false, false)?;
        let after = self.llama.tokenize(&format!("\n{text}"), false, parse_special)?;
        Ok(after.strip_prefix(before.as_slice()).map_or(tokens, <[Token]>::to_vec))
    }

    /// The scalars of the file's header as text, with the overrides in place of what they replaced.
    #[must_use]
    pub fn metadata(&self) -> BTreeMap<String, String> {
        let mut metadata: BTreeMap<_, _> = self.llama.metadata().into_iter().collect();
        metadata.extend(self.overrides.iter().map(|(key, value)| (key.clone(), value.to_string())));
        metadata
    }

    /// The file it came from.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// The header's rules, with the overrides that llama.cpp will apply to the same keys.
fn check(path: &Path, params: &LoadParams) -> Result<gguf::Header> {
    let overrides: Vec<_> = params.overrides.iter().map(|(key, value)| (key.clone(), value.as_gguf())).collect();
    Ok(gguf::check_model_file(path, params.vocab_only, &overrides)?)
}

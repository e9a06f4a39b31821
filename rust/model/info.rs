//! What a model file says of itself.

use std::path::Path;

use xxhash_rust::xxh3::Xxh3;

use crate::llama::gguf::Header;
use crate::llama::{LoadParams, Model};

/// Description of a loaded model.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct ModelInfo {
    pub architecture: String,
    pub name: String,
    pub parameters: u64,
    pub size_bytes: u64,
    pub quantization: String,
    pub train_context_size: usize,
    pub embedding_size: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub vocab_size: usize,
    pub chat_template: Option<String>,
    pub is_recurrent: bool,
    pub is_hybrid: bool,
    pub sliding_window: usize,
    pub has_encoder: bool,
    pub has_decoder: bool,
    pub path: String,
    pub vocab_only: bool,
}

impl ModelInfo {
    pub(super) fn new(model: &Model, header: &Header, path: &Path) -> Self {
        let text = |key| header.get(key).and_then(|value| value.as_str()).map(str::to_owned);
        let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
        Self {
            architecture: header.architecture().unwrap_or_default().to_owned(),
            name: text("general.name").or(stem).unwrap_or_default(),
            parameters: model.n_params(),
            size_bytes: model.size(),
            quantization: model.quantization(),
            train_context_size: model.n_ctx_train(),
            embedding_size: model.n_embd(),
            layers: model.n_layer(),
            heads: model.n_head(),
            kv_heads: model.n_head_kv(),
            vocab_size: model.n_vocab(),
            chat_template: model.chat_template(),
            is_recurrent: model.is_recurrent(),
            is_hybrid: model.is_hybrid(),
            sliding_window: model.n_swa(),
            has_encoder: model.has_encoder() || !is_causal(header),
            has_decoder: model.has_decoder() && is_causal(header),
            path: path.display().to_string(),
            vocab_only: model.is_vocab_only(),
        }
    }
}

/// Encoders such as BERT say that their attention is not causal.
fn is_causal(header: &Header) -> bool {
    let key = format!("{}.attention.causal", header.architecture().unwrap_or_default());
    !matches!(header.get(&key), Some(crate::llama::gguf::Value::Bool(false)))
}

/// Hash of everything in the header (keys, values, tensors), the overrides and the adapters.
pub(super) fn fingerprint(header: &Header, params: &LoadParams) -> u128 {
    let mut hash = Xxh3::new();
    hash.update(&header.file_size.to_le_bytes());
    hash.update(format!("{:?}{:?}", header.metadata, header.tensors).as_bytes());
    hash.update(format!("{:?}{:?}", params.overrides, params.lora).as_bytes());
    hash.digest128()
}

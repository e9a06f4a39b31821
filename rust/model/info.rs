//! What a model file says of itself.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::Xxh3;

use crate::error::{Error, Result};
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
    pub(super) fn new(model: &Model, header: &Header, path: &Path, params: &LoadParams) -> Self {
        let overridden =
            |key: &str| params.overrides.iter().find(|(name, _)| name == key).map(|(_, value)| value.to_string());
        let text =
            |key| overridden(key).or_else(|| header.get(key).and_then(|value| value.as_str()).map(str::to_owned));
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

/// Places of a file's data that are read to tell it from others of the same shape.
const SAMPLES: u64 = 64;
const SAMPLE_BYTES: u64 = 4096;

/// Hash of the header, of samples of the weights, of the overrides, and of the adapters with their scales. Two
/// fine-tunes of one model differ all over, so samples tell them apart without reading gigabytes.
pub(super) fn fingerprint(header: &Header, path: &Path, params: &LoadParams) -> Result<u128> {
    let mut hash = Xxh3::new();
    hash.update(format!("{:?}{:?}", header.metadata, header.tensors).as_bytes());
    hash.update(format!("{:?}", params.overrides).as_bytes());
    for part in parts(path, header.split_count()) {
        sample(&part, &mut hash)?;
    }
    for (adapter, scale) in &params.lora {
        sample(adapter, &mut hash)?;
        hash.update(&scale.to_le_bytes());
    }
    Ok(hash.digest128())
}

/// The files of a split model: `name-00001-of-00003.gguf` and its siblings.
fn parts(path: &Path, n_parts: u32) -> Vec<PathBuf> {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    if n_parts < 2 {
        return vec![path.to_owned()];
    }
    (1..=n_parts).map(|part| path.with_file_name(name.replacen("-00001-of-", &format!("-{part:05}-of-"), 1))).collect()
}

fn sample(path: &Path, hash: &mut Xxh3) -> Result<()> {
    sample_file(path, hash).map_err(|source| Error::Io { context: format!("cannot read {}", path.display()), source })
}

fn sample_file(path: &Path, hash: &mut Xxh3) -> std::io::Result<()> {
    let mut file = File::open(path)?;
    let size = file.metadata()?.len();
    hash.update(&size.to_le_bytes());
    let step = (size / SAMPLES).max(SAMPLE_BYTES);
    let mut buffer = Vec::with_capacity(SAMPLE_BYTES as usize);
    for start in (0..size).step_by(step as usize) {
        buffer.clear();
        file.seek(SeekFrom::Start(start))?;
        (&mut file).take(SAMPLE_BYTES).read_to_end(&mut buffer)?;
        hash.update(&buffer);
    }
    Ok(())
}

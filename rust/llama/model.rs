//! A loaded model file: read-only weights and vocabulary, shared by all contexts and threads.

use std::ffi::{CStr, CString, c_char, c_void};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::ptr::{NonNull, null_mut};

use llama_cpp_sys_2 as sys;

use super::gguf::Value;
use super::tokenizer::Tables;
use super::{backend, log};
use crate::error::{Error, Result};

/// How a model is split over several GPUs (`llama_split_mode`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SplitMode {
    /// One GPU only.
    None,
    /// Layers and KV across GPUs.
    #[default]
    Layer,
    /// Rows across GPUs.
    Row,
}

/// A value that replaces one of the file's metadata.
#[derive(Clone, Debug, PartialEq)]
pub enum OverrideValue {
    /// A boolean.
    Bool(bool),
    /// An integer.
    Int(i64),
    /// A float.
    Float(f64),
    /// A string of at most 127 bytes.
    Str(String),
}

impl OverrideValue {
    /// As a value of the file's header.
    #[must_use]
    pub fn as_gguf(&self) -> Value {
        match self {
            Self::Bool(value) => Value::Bool(*value),
            Self::Int(value) => Value::I64(*value),
            Self::Float(value) => Value::F64(*value),
            Self::Str(value) => Value::String(value.clone()),
        }
    }
}

impl fmt::Display for OverrideValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bool(value) => value.fmt(f),
            Self::Int(value) => value.fmt(f),
            Self::Float(value) => value.fmt(f),
            Self::Str(value) => value.fmt(f),
        }
    }
}

/// How to load a model (`llama_model_params`).
#[derive(Clone, Debug)]
pub struct LoadParams {
    /// Layers to put on a GPU; negative means all.
    pub n_gpu_layers: i32,
    /// Indices of the devices to use; `None` means all.
    pub devices: Option<Vec<usize>>,
    /// The GPU that holds everything when `split_mode` is `None`.
    pub main_gpu: i32,
    /// How to split over GPUs.
    pub split_mode: SplitMode,
    /// Share of each GPU.
    pub tensor_split: Option<Vec<f32>>,
    /// Map the file instead of reading it.
    pub use_mmap: bool,
    /// Keep the model in RAM.
    pub use_mlock: bool,
    /// Load only the vocabulary.
    pub vocab_only: bool,
    /// Read the header and lay tensors out, but allocate and read none of them.
    pub outline: bool,
    /// Validate the tensors' data while loading.
    pub check_tensors: bool,
    /// Replaced metadata.
    pub overrides: Vec<(String, OverrideValue)>,
    /// LoRA adapters and their scales.
    pub lora: Vec<(std::path::PathBuf, f32)>,
}

/// Longest key or string value of an override, without its NUL (`llama_model_kv_override`).
const OVERRIDE_BYTES: usize = 127;

/// A loaded model. Freed when the last reference goes.
pub struct Model {
    ptr: NonNull<sys::llama_model>,
    adapters: Vec<(NonNull<sys::llama_adapter_lora>, f32)>,
    vocab_only: bool,
    outline: bool,
    tables: Tables,
}

// SAFETY: weights and vocabulary are read-only after loading; llama.h declares tokenisation thread-safe, and
// contexts of one model on different threads are supported.
unsafe impl Send for Model {}
// SAFETY: as above.
unsafe impl Sync for Model {}

impl Model {
    /// Loads a file that [`super::gguf::check_model_file`] has accepted. `on_progress` hears 0 to 1 and returns
    /// whether to go on.
    ///
    /// # Errors
    /// `LoadCancelled` when `on_progress` said stop; `ModelLoad` with llama.cpp's reason otherwise.
    pub fn load(path: &Path, params: &LoadParams, on_progress: &mut dyn FnMut(f32) -> bool) -> Result<Self> {
        backend::initialise();
        let c_path = path_to_c(path)?;
        let overrides = native_overrides(&params.overrides)?;
        let split = padded_split(params.tensor_split.as_deref())?;
        let mut devices = native_devices(params.devices.as_deref())?;
        let mut progress = Progress { callback: on_progress, stopped: false };
        // SAFETY: returns plain data.
        let mut native = unsafe { sys::llama_model_default_params() };
        native.n_gpu_layers = params.n_gpu_layers;
        native.split_mode = match params.split_mode {
            SplitMode::None => sys::LLAMA_SPLIT_MODE_NONE,
            SplitMode::Layer => sys::LLAMA_SPLIT_MODE_LAYER,
            SplitMode::Row => sys::LLAMA_SPLIT_MODE_ROW,
        };
        native.main_gpu = params.main_gpu;
        native.no_alloc = params.outline;
        native.load_mode = if params.outline {
            sys::LLAMA_LOAD_MODE_NONE // nothing is read, so there is nothing to map
        } else {
            load_mode(params.use_mmap, params.use_mlock)
        };
        native.vocab_only = params.vocab_only;
        native.check_tensors = params.check_tensors;
        native.progress_callback = Some(report_progress);
        native.progress_callback_user_data = (&raw mut progress).cast();
        if !params.overrides.is_empty() {
            native.kv_overrides = overrides.as_ptr();
        }
        if let Some(split) = &split {
            native.tensor_split = split.as_ptr();
        }
        if let Some(devices) = &mut devices {
            native.devices = devices.as_mut_ptr();
        }
        log::take_last_error();
        // SAFETY: the path and every array live until the call returns; upstream catches its own exceptions here.
        let ptr = unsafe { sys::llama_model_load_from_file(c_path.as_ptr(), native) };
        match NonNull::new(ptr) {
            Some(ptr) => Self {
                ptr,
                adapters: Vec::new(),
                vocab_only: params.vocab_only,
                outline: params.outline,
                tables: Tables::default(),
            }
            .with_tables(&params.overrides)
            .with_adapters(if params.outline { &[] } else { &params.lora }),
            None if progress.stopped => Err(Error::LoadCancelled),
            None => Err(load_failure(path)),
        }
    }

    fn with_tables(mut self, overrides: &[(String, OverrideValue)]) -> Self {
        let overridden = |key| overrides.iter().find(|(name, _)| name == key).map(|(_, value)| value.to_string());
        let value = |key| overridden(key).or_else(|| self.metadata_value(key)).unwrap_or_default();
        let is_gemma = value("tokenizer.ggml.model") == "gemma4";
        let pre = if is_gemma { "gemma4".to_owned() } else { value("tokenizer.ggml.pre") };
        // SAFETY: the vocabulary is alive.
        self.tables = Tables::new(unsafe { sys::llama_vocab_type(self.vocab_ptr()) }, &pre);
        self
    }

    fn with_adapters(mut self, adapters: &[(std::path::PathBuf, f32)]) -> Result<Self> {
        for (path, scale) in adapters {
            let c_path = path_to_c(path)?;
            log::take_last_error();
            // SAFETY: the model is alive; upstream catches its own exceptions and returns null.
            let adapter = unsafe { sys::llama_adapter_lora_init(self.ptr.as_ptr(), c_path.as_ptr()) };
            let adapter = NonNull::new(adapter).ok_or_else(|| load_failure(path))?;
            self.adapters.push((adapter, *scale));
        }
        Ok(self)
    }

    pub(super) fn as_ptr(&self) -> *mut sys::llama_model {
        self.ptr.as_ptr()
    }

    pub(super) fn tables(&self) -> &Tables {
        &self.tables
    }

    pub(super) fn adapters(&self) -> &[(NonNull<sys::llama_adapter_lora>, f32)] {
        &self.adapters
    }

    /// Pointer to the vocabulary, valid as long as the model.
    #[must_use]
    pub(crate) fn vocab_ptr(&self) -> *const sys::llama_vocab {
        // SAFETY: the model is alive; the vocabulary is part of it.
        unsafe { sys::llama_model_get_vocab(self.as_ptr()) }
    }

    /// Whether only the vocabulary was loaded: such a model cannot have a context.
    #[must_use]
    pub fn is_vocab_only(&self) -> bool {
        self.vocab_only
    }

    /// Whether it has no weights, only their layout: it can be measured, and tokenises.
    #[must_use]
    pub fn is_outline(&self) -> bool {
        self.outline
    }

    /// Tokens in the vocabulary.
    #[must_use]
    pub fn n_vocab(&self) -> usize {
        // SAFETY: the vocabulary is alive.
        unsafe { sys::llama_vocab_n_tokens(self.vocab_ptr()) }.max(0) as usize
    }

    /// Context size that the model was trained with, in tokens.
    #[must_use]
    pub fn n_ctx_train(&self) -> usize {
        // SAFETY: the model is alive.
        unsafe { sys::llama_model_n_ctx_train(self.as_ptr()) }.max(0) as usize
    }

    /// Width of an embedding.
    #[must_use]
    pub fn n_embd(&self) -> usize {
        // SAFETY: the model is alive.
        unsafe { sys::llama_model_n_embd(self.as_ptr()) }.max(0) as usize
    }

    /// Layers.
    #[must_use]
    pub fn n_layer(&self) -> usize {
        // SAFETY: the model is alive.
        unsafe { sys::llama_model_n_layer(self.as_ptr()) }.max(0) as usize
    }

    /// Attention heads; 0 of a vocabulary alone.
    #[must_use]
    pub fn n_head(&self) -> usize {
        if self.vocab_only {
            return 0;
        }
        // SAFETY: the model is alive and its layers were read: llama.cpp aborts without them.
        unsafe { sys::llama_model_n_head(self.as_ptr()) }.max(0) as usize
    }

    /// Key and value heads; 0 of a vocabulary alone.
    #[must_use]
    pub fn n_head_kv(&self) -> usize {
        if self.vocab_only {
            return 0;
        }
        // SAFETY: the model is alive and its layers were read: llama.cpp aborts without them.
        unsafe { sys::llama_model_n_head_kv(self.as_ptr()) }.max(0) as usize
    }

    /// Width of the sliding window in tokens; 0 without one.
    #[must_use]
    pub fn n_swa(&self) -> usize {
        if self.vocab_only {
            return 0;
        }
        // SAFETY: the model is alive and its layers were read: llama.cpp aborts without them.
        unsafe { sys::llama_model_n_swa(self.as_ptr()) }.max(0) as usize
    }

    /// Bytes of all tensors.
    #[must_use]
    pub fn size(&self) -> u64 {
        // SAFETY: the model is alive.
        unsafe { sys::llama_model_size(self.as_ptr()) }
    }

    /// Parameters.
    #[must_use]
    pub fn n_params(&self) -> u64 {
        // SAFETY: the model is alive.
        unsafe { sys::llama_model_n_params(self.as_ptr()) }
    }

    /// Whether the memory is recurrent (Mamba, RWKV).
    #[must_use]
    pub fn is_recurrent(&self) -> bool {
        // SAFETY: the model is alive.
        unsafe { sys::llama_model_is_recurrent(self.as_ptr()) }
    }

    /// Whether the memory is part attention, part recurrent (Jamba, Granite 4).
    #[must_use]
    pub fn is_hybrid(&self) -> bool {
        // SAFETY: the model is alive.
        unsafe { sys::llama_model_is_hybrid(self.as_ptr()) }
    }

    /// Whether the model has an encoder that needs `llama_encode`.
    #[must_use]
    pub fn has_encoder(&self) -> bool {
        // SAFETY: the model is alive.
        unsafe { sys::llama_model_has_encoder(self.as_ptr()) }
    }

    /// Whether the model has a decoder.
    #[must_use]
    pub fn has_decoder(&self) -> bool {
        // SAFETY: the model is alive.
        unsafe { sys::llama_model_has_decoder(self.as_ptr()) }
    }

    /// Name of the quantisation, such as `Q4_1`.
    #[must_use]
    pub fn quantization(&self) -> String {
        // SAFETY: the model is alive; the name is a static string.
        let name = unsafe { CStr::from_ptr(sys::llama_ftype_name(sys::llama_model_ftype(self.as_ptr()))) };
        name.to_string_lossy().into_owned()
    }

    /// The model's default chat template (Jinja), if it has one.
    #[must_use]
    pub fn chat_template(&self) -> Option<String> {
        // SAFETY: the model is alive; a null name asks for the default.
        let text = unsafe { sys::llama_model_chat_template(self.as_ptr(), std::ptr::null()) };
        // SAFETY: a non-null result is a NUL-terminated string owned by the model.
        (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
    }

    /// Scalar metadata of the file as strings, in the order of their keys.
    #[must_use]
    pub fn metadata(&self) -> Vec<(String, String)> {
        // SAFETY: the model is alive.
        let count = unsafe { sys::llama_model_meta_count(self.as_ptr()) };
        (0..count)
            .filter_map(|i| {
                let key = self.read_text(|model, buffer, size| {
                    // SAFETY: `read_text` passes a buffer of `size` bytes and a live model.
                    unsafe { sys::llama_model_meta_key_by_index(model, i, buffer, size) }
                })?;
                let value = self.read_text(|model, buffer, size| {
                    // SAFETY: as above.
                    unsafe { sys::llama_model_meta_val_str_by_index(model, i, buffer, size) }
                })?;
                Some((key, value))
            })
            .collect()
    }

    fn metadata_value(&self, key: &str) -> Option<String> {
        let key = CString::new(key).ok()?;
        self.read_text(|model, buffer, size| {
            // SAFETY: `read_text` passes a buffer of `size` bytes and a live model; the key ends in NUL.
            unsafe { sys::llama_model_meta_val_str(model, key.as_ptr(), buffer, size) }
        })
    }

    /// Calls `read` with a buffer, again with a larger one when the text is longer.
    fn read_text(&self, read: impl Fn(*const sys::llama_model, *mut c_char, usize) -> i32) -> Option<String> {
        let mut buffer = vec![0u8; 256];
        loop {
            let length = read(self.as_ptr(), buffer.as_mut_ptr().cast(), buffer.len());
            let length = usize::try_from(length).ok()?;
            if length < buffer.len() {
                return Some(String::from_utf8_lossy(&buffer[..length]).into_owned());
            }
            buffer.resize(length + 1, 0);
        }
    }
}

impl Drop for Model {
    fn drop(&mut self) {
        // SAFETY: no context lives any more (each holds an `Arc` of its model); adapters are freed with the model.
        unsafe { sys::llama_model_free(self.ptr.as_ptr()) }
    }
}

struct Progress<'a> {
    callback: &'a mut dyn FnMut(f32) -> bool,
    stopped: bool,
}

unsafe extern "C" fn report_progress(fraction: f32, data: *mut c_void) -> bool {
    // SAFETY: `data` is the `Progress` on the stack of `Model::load`, used by its thread alone.
    let progress = unsafe { &mut *data.cast::<Progress<'_>>() };
    // A panic must not unwind into C++: it stops the load instead.
    let go_on = catch_unwind(AssertUnwindSafe(|| (progress.callback)(fraction))).unwrap_or(false);
    progress.stopped |= !go_on;
    go_on
}

fn load_failure(path: &Path) -> Error {
    let reason = log::take_last_error();
    let reason = if reason.is_empty() { "llama.cpp gave no reason".to_owned() } else { reason };
    Error::ModelLoad(format!("cannot load {}: {reason}", path.display()))
}

fn load_mode(use_mmap: bool, use_mlock: bool) -> sys::llama_load_mode {
    match (use_mmap, use_mlock) {
        (true, true) => sys::LLAMA_LOAD_MODE_MMAP_MLOCK,
        (true, false) => sys::LLAMA_LOAD_MODE_MMAP,
        (false, true) => sys::LLAMA_LOAD_MODE_MLOCK,
        (false, false) => sys::LLAMA_LOAD_MODE_NONE,
    }
}

fn path_to_c(path: &Path) -> Result<CString> {
    CString::new(path.as_os_str().as_encoded_bytes())
        .map_err(|_| Error::Value(format!("path {path:?} contains a NUL byte; paths cannot")))
}

/// The array that llama.cpp expects: ended by an entry with an empty key.
fn native_overrides(overrides: &[(String, OverrideValue)]) -> Result<Vec<sys::llama_model_kv_override>> {
    let mut native = overrides.iter().map(|(key, value)| native_override(key, value)).collect::<Result<Vec<_>>>()?;
    // SAFETY: plain data for which all zeroes is a valid value.
    native.push(unsafe { std::mem::zeroed() });
    Ok(native)
}

fn native_override(key: &str, value: &OverrideValue) -> Result<sys::llama_model_kv_override> {
    // SAFETY: plain data for which all zeroes is a valid value.
    let mut native: sys::llama_model_kv_override = unsafe { std::mem::zeroed() };
    copy_text(key, &mut native.key, "metadata override key")?;
    match value {
        OverrideValue::Bool(value) => {
            native.tag = sys::LLAMA_KV_OVERRIDE_TYPE_BOOL;
            native.__bindgen_anon_1.val_bool = *value;
        }
        OverrideValue::Int(value) => {
            native.tag = sys::LLAMA_KV_OVERRIDE_TYPE_INT;
            native.__bindgen_anon_1.val_i64 = *value;
        }
        OverrideValue::Float(value) => {
            native.tag = sys::LLAMA_KV_OVERRIDE_TYPE_FLOAT;
            native.__bindgen_anon_1.val_f64 = *value;
        }
        OverrideValue::Str(value) => {
            native.tag = sys::LLAMA_KV_OVERRIDE_TYPE_STR;
            let mut text = [0; OVERRIDE_BYTES + 1];
            copy_text(value, &mut text, "metadata override")?;
            native.__bindgen_anon_1.val_str = text;
        }
    }
    Ok(native)
}

fn copy_text(text: &str, target: &mut [c_char], what: &str) -> Result<()> {
    if text.len() > OVERRIDE_BYTES || text.contains('\0') {
        return Err(Error::Value(format!(
            "{what} {text:?} has {} bytes; at most {OVERRIDE_BYTES} without NUL are possible",
            text.len()
        )));
    }
    for (target, byte) in target.iter_mut().zip(text.bytes()) {
        *target = byte as c_char;
    }
    Ok(())
}

/// `tensor_split` as llama.cpp reads it: one share for each possible device.
fn padded_split(split: Option<&[f32]>) -> Result<Option<Vec<f32>>> {
    let Some(split) = split else { return Ok(None) };
    let limit = llama_cpp_2::max_devices();
    if split.len() > limit {
        return Err(Error::Value(format!(
            "tensor_split has {} shares; this build knows at most {limit} devices",
            split.len()
        )));
    }
    let mut padded = split.to_vec();
    padded.resize(limit.max(1), 0.0);
    Ok(Some(padded))
}

/// The null-terminated list of devices.
fn native_devices(devices: Option<&[usize]>) -> Result<Option<Vec<sys::ggml_backend_dev_t>>> {
    let Some(devices) = devices else { return Ok(None) };
    // SAFETY: asks the registry for a number.
    let count = unsafe { sys::ggml_backend_dev_count() };
    let mut native = Vec::with_capacity(devices.len() + 1);
    for &index in devices {
        if index >= count {
            return Err(Error::Value(format!("device {index} does not exist; there are {count} (0 to {})", count - 1)));
        }
        // SAFETY: the index was checked.
        native.push(unsafe { sys::ggml_backend_dev_get(index) });
    }
    native.push(null_mut());
    Ok(Some(native))
}

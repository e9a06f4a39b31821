//! How much memory a model and a context of it will take, before anything is allocated.

use std::ffi::{CStr, c_char};
use std::ptr::NonNull;

use llama_cpp_sys_2 as sys;

use super::context::{ContextParams, creation_failure};
use super::model::Model;
use super::{guarded, log};
use crate::error::{Error, Result};

/// Kinds of buffers that are told apart at most; each device has a handful.
const MAX_KINDS: usize = 128;
const NAME_BYTES: usize = 64;

/// `llamactor_usage` of the shim.
#[repr(C)]
#[derive(Clone, Copy)]
struct NativeUsage {
    device: [c_char; NAME_BYTES],
    buffer: [c_char; NAME_BYTES],
    host: bool,
    weights: u64,
    cache: u64,
    compute: u64,
}

unsafe extern "C" {
    fn llamactor_footprint(
        ctx: *const sys::llama_context,
        usages: *mut NativeUsage,
        capacity: i32,
        message: *mut c_char,
        size: usize,
    ) -> i32;
}

/// What one kind of buffer will hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Usage {
    /// The device, as [`super::devices`] names it; empty for memory of the host that belongs to none.
    pub device: String,
    /// Kind of buffer, such as `CPU`, `CPU_REPACK` or `CUDA0`.
    pub buffer: String,
    /// Whether it is in the host's memory, whatever device uses it.
    pub host: bool,
    /// Bytes of weights.
    pub weights: u64,
    /// Bytes of keys and values, or of recurrent states.
    pub cache: u64,
    /// Bytes of a graph's intermediate results.
    pub compute: u64,
}

impl NativeUsage {
    const EMPTY: Self =
        Self { device: [0; NAME_BYTES], buffer: [0; NAME_BYTES], host: false, weights: 0, cache: 0, compute: 0 };

    fn read(&self) -> Usage {
        Usage {
            device: text(&self.device),
            buffer: text(&self.buffer),
            host: self.host,
            weights: self.weights,
            cache: self.cache,
            compute: self.compute,
        }
    }
}

fn text(name: &[c_char; NAME_BYTES]) -> String {
    // SAFETY: the shim ends every name with a NUL inside the array.
    unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned()
}

/// A context without memory, of an outline; freed when dropped.
struct Layout(NonNull<sys::llama_context>);

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: made by `llama_init_from_model` and freed once.
        unsafe { sys::llama_free(self.0.as_ptr()) };
    }
}

impl Model {
    /// What the buffers of this outline and of a context of it would take, one entry per kind of buffer.
    ///
    /// # Errors
    /// `Unsupported` if it is no outline, or cannot have such a context.
    pub fn footprint(&self, params: &ContextParams) -> Result<Vec<Usage>> {
        if !self.is_outline() || self.is_vocab_only() {
            return Err(Error::Unsupported("only an outline of a model with its layers can be measured".into()));
        }
        log::take_last_error();
        // SAFETY: the model is alive and upstream catches its own exceptions, returning null.
        let context = unsafe { sys::llama_init_from_model(self.as_ptr(), params.native()) };
        let layout = Layout(NonNull::new(context).ok_or_else(|| creation_failure(params))?);
        usages(layout.0)
    }
}

/// What the buffers of a context and of its model take. The context must be alive, and not be decoding.
pub(super) fn usages(context: NonNull<sys::llama_context>) -> Result<Vec<Usage>> {
    let mut usages = [NativeUsage::EMPTY; MAX_KINDS];
    let count = guarded(|message, size| {
        // SAFETY: the context is alive; the array has `MAX_KINDS` entries.
        unsafe { llamactor_footprint(context.as_ptr(), usages.as_mut_ptr(), MAX_KINDS as i32, message, size) }
    })
    .map_err(Error::Decode)?;
    Ok(usages[..count as usize].iter().map(NativeUsage::read).collect())
}

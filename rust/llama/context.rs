//! One `llama_context`: made, used and freed by one thread.

use std::ffi::{c_char, c_void};
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use llama_cpp_sys_2 as sys;

use super::batch::Batch;
use super::footprint::{self, Usage};
use super::model::Model;
use super::{guarded, log};
use crate::error::{Error, Result};

unsafe extern "C" {
    fn llamactor_decode(
        ctx: *mut sys::llama_context,
        batch: *const sys::llama_batch,
        message: *mut c_char,
        size: usize,
    ) -> i32;
    fn llamactor_logits(
        ctx: *mut sys::llama_context,
        index: i32,
        row: *mut *mut f32,
        message: *mut c_char,
        size: usize,
    ) -> i32;
    fn llamactor_set_adapters(
        ctx: *mut sys::llama_context,
        adapters: *mut *mut sys::llama_adapter_lora,
        count: usize,
        scales: *mut f32,
        message: *mut c_char,
        size: usize,
    ) -> i32;
}

/// Data type of the KV cache's keys or values (`ggml_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum KvType {
    F32,
    F16,
    Bf16,
    Q8_0,
    Q4_0,
    Q4_1,
    Iq4Nl,
    Q5_0,
    Q5_1,
}

impl KvType {
    /// Names that [`KvType::from_name`] understands.
    pub const NAMES: [&str; 9] = ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"];

    /// The type of this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "f32" => Self::F32,
            "f16" => Self::F16,
            "bf16" => Self::Bf16,
            "q8_0" => Self::Q8_0,
            "q4_0" => Self::Q4_0,
            "q4_1" => Self::Q4_1,
            "iq4_nl" => Self::Iq4Nl,
            "q5_0" => Self::Q5_0,
            "q5_1" => Self::Q5_1,
            _ => return None,
        })
    }

    fn native(self) -> sys::ggml_type {
        match self {
            Self::F32 => sys::GGML_TYPE_F32,
            Self::F16 => sys::GGML_TYPE_F16,
            Self::Bf16 => sys::GGML_TYPE_BF16,
            Self::Q8_0 => sys::GGML_TYPE_Q8_0,
            Self::Q4_0 => sys::GGML_TYPE_Q4_0,
            Self::Q4_1 => sys::GGML_TYPE_Q4_1,
            Self::Iq4Nl => sys::GGML_TYPE_IQ4_NL,
            Self::Q5_0 => sys::GGML_TYPE_Q5_0,
            Self::Q5_1 => sys::GGML_TYPE_Q5_1,
        }
    }
}

/// When flash attention is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FlashAttention {
    /// Where the backend can.
    #[default]
    Auto,
    /// Always.
    On,
    /// Never.
    Off,
}

/// How to make a context (`llama_context_params`). `None` leaves the model's or llama.cpp's own value.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct ContextParams {
    pub n_ctx: u32,
    pub n_batch: u32,
    pub n_ubatch: u32,
    pub n_seq_max: u32,
    /// Output rows at most in one decode call.
    pub n_outputs_max: u32,
    pub n_threads: u32,
    pub n_threads_batch: u32,
    pub flash_attention: FlashAttention,
    pub type_k: Option<KvType>,
    pub type_v: Option<KvType>,
    pub kv_unified: bool,
    pub swa_full: bool,
    pub rope_freq_base: Option<f32>,
    pub rope_freq_scale: Option<f32>,
    pub yarn_ext_factor: Option<f32>,
    pub yarn_attn_factor: Option<f32>,
    pub yarn_beta_fast: Option<f32>,
    pub yarn_beta_slow: Option<f32>,
    pub yarn_orig_ctx: Option<u32>,
}

impl ContextParams {
    pub(super) fn native(&self) -> sys::llama_context_params {
        // SAFETY: returns plain data.
        let mut native = unsafe { sys::llama_context_default_params() };
        native.n_ctx = self.n_ctx;
        native.n_batch = self.n_batch;
        native.n_ubatch = self.n_ubatch;
        native.n_seq_max = self.n_seq_max;
        native.n_outputs_max = self.n_outputs_max;
        native.n_threads = self.n_threads as i32;
        native.n_threads_batch = self.n_threads_batch as i32;
        native.flash_attn_type = match self.flash_attention {
            FlashAttention::Auto => sys::LLAMA_FLASH_ATTN_TYPE_AUTO,
            FlashAttention::On => sys::LLAMA_FLASH_ATTN_TYPE_ENABLED,
            FlashAttention::Off => sys::LLAMA_FLASH_ATTN_TYPE_DISABLED,
        };
        native.type_k = self.type_k.map_or(native.type_k, KvType::native);
        native.type_v = self.type_v.map_or(native.type_v, KvType::native);
        native.kv_unified = self.kv_unified;
        native.swa_full = self.swa_full;
        native.no_perf = true;
        native.rope_freq_base = self.rope_freq_base.unwrap_or(native.rope_freq_base);
        native.rope_freq_scale = self.rope_freq_scale.unwrap_or(native.rope_freq_scale);
        native.yarn_ext_factor = self.yarn_ext_factor.unwrap_or(native.yarn_ext_factor);
        native.yarn_attn_factor = self.yarn_attn_factor.unwrap_or(native.yarn_attn_factor);
        native.yarn_beta_fast = self.yarn_beta_fast.unwrap_or(native.yarn_beta_fast);
        native.yarn_beta_slow = self.yarn_beta_slow.unwrap_or(native.yarn_beta_slow);
        native.yarn_orig_ctx = self.yarn_orig_ctx.unwrap_or(native.yarn_orig_ctx);
        native
    }
}

/// What a decode call came to (`llama_decode`'s return codes).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decoded {
    /// Every token was evaluated.
    Done,
    /// No room for the batch; memory is as before.
    NoRoom,
    /// The flags stopped it; micro-batches done before stay.
    Aborted,
}

/// Flags of those who are in a batch: when all are set, nobody wants the result and the CPU stops computing.
#[derive(Default)]
pub struct CancelFlags {
    flags: Vec<Arc<AtomicBool>>,
    /// Set when the context is closing: stops any batch.
    closing: Arc<AtomicBool>,
}

impl CancelFlags {
    /// No members yet; `closing` stops any batch.
    #[must_use]
    pub fn new(closing: Arc<AtomicBool>) -> Self {
        Self { flags: Vec::new(), closing }
    }

    /// Forgets the members.
    pub fn clear(&mut self) {
        self.flags.clear();
    }

    /// Adds a member of the next batch.
    pub fn push(&mut self, flag: Arc<AtomicBool>) {
        self.flags.push(flag);
    }

    fn nobody_waits(&self) -> bool {
        let all_cancelled = !self.flags.is_empty() && self.flags.iter().all(|flag| flag.load(Ordering::Relaxed));
        all_cancelled || self.closing.load(Ordering::Relaxed)
    }
}

unsafe extern "C" fn should_abort(data: *mut c_void) -> bool {
    // SAFETY: set by `Context::decode` to flags that live for the whole call; only shared reads happen.
    let flags = unsafe { (*data.cast::<AbortCell>()).flags };
    // SAFETY: as above.
    !flags.is_null() && unsafe { &*flags }.nobody_waits()
}

/// What the abort callback looks at: null between decode calls.
struct AbortCell {
    flags: *const CancelFlags,
}

/// A context. Not `Send`: the thread that makes it uses and frees it.
pub struct Context {
    ptr: NonNull<sys::llama_context>,
    /// Freed after the context, whose compute threads these are.
    _threads: ThreadPool,
    /// Shared with the abort callback, so reached by pointer only; freed in `Drop`.
    abort: NonNull<AbortCell>,
    model: Arc<Model>,
    n_batch: usize,
    n_ctx_seq: usize,
    n_seq_max: usize,
    n_outputs_max: usize,
    unified: bool,
    type_k: Option<KvType>,
}

impl Context {
    /// Makes a context of the model with its LoRA adapters.
    ///
    /// # Errors
    /// `InsufficientMemory` with llama.cpp's reason; `Unsupported` for a model without weights or without memory.
    pub fn new(model: Arc<Model>, params: &ContextParams) -> Result<Self> {
        if model.is_vocab_only() {
            return Err(Error::Unsupported("a model loaded with vocab_only=True has no weights to evaluate".into()));
        }
        if model.is_outline() {
            return Err(Error::Unsupported("an outline of a model has no weights to evaluate".into()));
        }
        let abort = NonNull::from(Box::leak(Box::new(AbortCell { flags: std::ptr::null() })));
        let mut native = params.native();
        native.abort_callback = Some(should_abort);
        native.abort_callback_data = abort.as_ptr().cast();
        log::take_last_error();
        // SAFETY: the model is alive and upstream catches its own exceptions, returning null.
        let ptr = unsafe { sys::llama_init_from_model(model.as_ptr(), native) };
        let Some(ptr) = NonNull::new(ptr) else {
            // SAFETY: no context was made that could call back.
            drop(unsafe { Box::from_raw(abort.as_ptr()) });
            return Err(creation_failure(params));
        };
        let threads = ThreadPool::attach(ptr, params.n_threads.max(params.n_threads_batch))?;
        // SAFETY: the context is alive.
        let (n_batch, n_ctx_seq) = unsafe { (sys::llama_n_batch(ptr.as_ptr()), sys::llama_n_ctx_seq(ptr.as_ptr())) };
        let context = Self {
            ptr,
            _threads: threads,
            abort,
            n_batch: n_batch as usize,
            n_ctx_seq: n_ctx_seq as usize,
            n_seq_max: params.n_seq_max as usize,
            n_outputs_max: params.n_outputs_max as usize,
            unified: params.kv_unified,
            type_k: params.type_k,
            model,
        };
        context.require_memory()?;
        context.apply_adapters()?;
        Ok(context)
    }

    /// Encoder-only models have no memory and cannot generate.
    fn require_memory(&self) -> Result<()> {
        if self.memory().is_null() || (self.model.has_encoder() && self.model.has_decoder()) {
            return Err(Error::Unsupported(
                "this model has an encoder, so it cannot complete text; load a decoder-only model".into(),
            ));
        }
        Ok(())
    }

    fn apply_adapters(&self) -> Result<()> {
        let (mut adapters, mut scales): (Vec<_>, Vec<_>) =
            self.model.adapters().iter().map(|(adapter, scale)| (adapter.as_ptr(), *scale)).unzip();
        if adapters.is_empty() {
            return Ok(());
        }
        guarded(|message, size| {
            // SAFETY: adapters live as long as the model; both arrays have `len` entries.
            unsafe {
                llamactor_set_adapters(
                    self.ptr.as_ptr(),
                    adapters.as_mut_ptr(),
                    adapters.len(),
                    scales.as_mut_ptr(),
                    message,
                    size,
                )
            }
        })
        .map(drop)
        .map_err(Error::Decode)
    }

    /// Tokens that one sequence may hold.
    #[must_use]
    pub fn n_ctx_seq(&self) -> usize {
        self.n_ctx_seq
    }

    /// What its buffers and those of its model take.
    ///
    /// # Errors
    /// `Decode` if llama.cpp cannot say.
    pub fn usages(&self) -> Result<Vec<Usage>> {
        footprint::usages(self.ptr)
    }

    /// Sequences it has.
    #[must_use]
    pub fn n_seq_max(&self) -> usize {
        self.n_seq_max
    }

    /// Tokens at most in one decode call, as llama.cpp clamped it.
    #[must_use]
    pub fn n_batch(&self) -> usize {
        self.n_batch
    }

    /// Output rows at most in one decode call.
    #[must_use]
    pub fn n_outputs_max(&self) -> usize {
        self.n_outputs_max
    }

    /// Evaluates a batch; with all of `cancel`'s flags set a CPU stops in the middle.
    ///
    /// # Errors
    /// `Decode` for a batch that llama.cpp would refuse or abort on, or when it failed.
    pub fn decode(&mut self, batch: &mut Batch, cancel: &CancelFlags) -> Result<Decoded> {
        self.check(batch)?;
        let native = batch.native();
        self.watch(cancel);
        let code = guarded(|message, size| {
            // SAFETY: the batch was checked; its arrays live during the call.
            unsafe { llamactor_decode(self.ptr.as_ptr(), &raw const native, message, size) }
        });
        self.watch(std::ptr::null());
        match code {
            Ok(0) => Ok(Decoded::Done),
            Ok(1) => Ok(Decoded::NoRoom),
            Ok(2) => Ok(Decoded::Aborted),
            Ok(code) => Err(Error::Decode(format!("llama_decode failed with code {code} on {} tokens", batch.len()))),
            Err(reason) => Err(Error::Decode(format!("llama_decode failed: {reason}"))),
        }
    }

    /// What the abort callback looks at from now on.
    fn watch(&mut self, flags: *const CancelFlags) {
        // SAFETY: the cell lives until `Drop`; the callback runs inside `decode` only, on this thread.
        unsafe { (*self.abort.as_ptr()).flags = flags };
    }

    /// Everything in a batch that trips an assertion inside `llama_decode`.
    fn check(&self, batch: &Batch) -> Result<()> {
        if batch.is_empty() || batch.len() > self.n_batch || batch.n_outputs() > self.n_outputs_max {
            return Err(Error::Decode(format!(
                "a batch of {} tokens with {} outputs; 1 to {} tokens and at most {} outputs are possible",
                batch.len(),
                batch.n_outputs(),
                self.n_batch,
                self.n_outputs_max
            )));
        }
        if !batch.is_within(self.model.n_vocab(), self.n_seq_max) {
            return Err(Error::Decode("a token or a sequence of the batch is out of range".into()));
        }
        Ok(())
    }

    /// The logits of the batch's token `index`, which must have asked for output. Valid until the next decode.
    ///
    /// # Errors
    /// `Decode` for a token without output.
    pub fn logits(&mut self, index: usize) -> Result<&mut [f32]> {
        let mut row = null_mut();
        guarded(|message, size| {
            // SAFETY: the context is alive; upstream checks the index and returns null for a wrong one.
            unsafe { llamactor_logits(self.ptr.as_ptr(), index as i32, &raw mut row, message, size) }
        })
        .map_err(Error::Decode)?;
        if row.is_null() {
            return Err(Error::Decode(format!("token {index} of the batch has no logits")));
        }
        // SAFETY: a non-null row has one float per token of the vocabulary and stays until the next decode, which
        // needs `&mut self`.
        Ok(unsafe { std::slice::from_raw_parts_mut(row, self.model.n_vocab()) })
    }

    fn memory(&self) -> sys::llama_memory_t {
        // SAFETY: the context is alive.
        unsafe { sys::llama_get_memory(self.ptr.as_ptr()) }
    }

    fn assert_sequence(&self, sequence: u32) {
        assert!((sequence as usize) < self.n_seq_max, "sequence {sequence} of {}", self.n_seq_max);
    }

    /// Whether positions of this memory can be moved (`llama_memory_can_shift`).
    #[must_use]
    pub fn can_shift(&self) -> bool {
        // Moving cells rotates their keys. ggml cannot do that in BF16 and reads beyond quantised rows of some widths:
        // it would abort or crash in the next decode.
        let rotates = matches!(self.type_k, None | Some(KvType::F16 | KvType::F32));
        // SAFETY: the context is alive.
        rotates && unsafe { sys::llama_memory_can_shift(self.memory()) }
    }

    /// Removes the cells of positions `from..` of a sequence; false where this memory cannot remove a part.
    pub fn remove_from(&mut self, sequence: u32, from: usize) -> bool {
        self.remove(sequence, from, None)
    }

    /// Removes the cells of positions `from..to`; false where this memory cannot remove a part.
    pub fn remove(&mut self, sequence: u32, from: usize, to: Option<usize>) -> bool {
        self.assert_sequence(sequence);
        let to = to.map_or(-1, |to| to as i32);
        // SAFETY: the sequence is in range.
        unsafe { sys::llama_memory_seq_rm(self.memory(), sequence as i32, from as i32, to) }
    }

    /// Lets `to` share the cells of positions `0..end` of `from`, or all of them.
    ///
    /// # Panics
    /// On a partial copy in split KV, which llama.cpp would abort on.
    pub fn copy(&mut self, from: u32, to: u32, end: Option<usize>) {
        self.assert_sequence(from);
        self.assert_sequence(to);
        assert!(self.unified || end.is_none(), "a partial copy across streams");
        let (start, end) = end.map_or((-1, -1), |end| (0, end as i32));
        // SAFETY: both sequences are in range and a partial copy stays inside one stream.
        unsafe { sys::llama_memory_seq_cp(self.memory(), from as i32, to as i32, start, end) }
    }

    /// Moves the cells of positions `from..` down by `distance`. The caller has checked [`Context::can_shift`].
    ///
    /// # Panics
    /// Where the memory cannot shift, since llama.cpp would abort in the next decode.
    pub fn move_down(&mut self, sequence: u32, from: usize, distance: usize) {
        self.assert_sequence(sequence);
        assert!(self.can_shift(), "this memory cannot shift");
        // SAFETY: the sequence is in range and the memory can shift.
        unsafe { sys::llama_memory_seq_add(self.memory(), sequence as i32, from as i32, -1, -(distance as i32)) }
    }

    /// Smallest position still present, -1 when empty.
    #[must_use]
    pub fn first_position(&self, sequence: u32) -> i32 {
        self.assert_sequence(sequence);
        // SAFETY: the sequence is in range.
        unsafe { sys::llama_memory_seq_pos_min(self.memory(), sequence as i32) }
    }

    /// Largest position present, -1 when empty.
    #[must_use]
    pub fn last_position(&self, sequence: u32) -> i32 {
        self.assert_sequence(sequence);
        // SAFETY: the sequence is in range.
        unsafe { sys::llama_memory_seq_pos_max(self.memory(), sequence as i32) }
    }

    /// The bytes of a sequence's state; `partial` takes only what cannot be rolled back (recurrent states, windows).
    ///
    /// # Errors
    /// `Decode` when llama.cpp cannot write it.
    pub fn sequence_state(&mut self, sequence: u32, partial: bool) -> Result<Vec<u8>> {
        self.assert_sequence(sequence);
        let (ctx, flags) = (self.ptr.as_ptr(), state_flags(partial));
        // SAFETY: the sequence is in range; upstream catches its own exceptions.
        let size = unsafe { sys::llama_state_seq_get_size_ext(ctx, sequence as i32, flags) };
        let mut bytes = vec![0u8; size];
        // SAFETY: the buffer has the size that llama.cpp asked for.
        let written =
            unsafe { sys::llama_state_seq_get_data_ext(ctx, bytes.as_mut_ptr(), size, sequence as i32, flags) };
        if written == 0 && size != 0 {
            return Err(Error::Decode("llama.cpp could not write the sequence's state".into()));
        }
        bytes.truncate(written);
        Ok(bytes)
    }

    /// Restores bytes of [`Context::sequence_state`] made by the same model and layout; false when llama.cpp
    /// refuses them, and the sequence is then empty or lost.
    pub fn restore_sequence(&mut self, sequence: u32, bytes: &[u8], partial: bool) -> bool {
        self.assert_sequence(sequence);
        // SAFETY: the sequence is in range, the slice is alive; upstream catches its own exceptions.
        let read = unsafe {
            sys::llama_state_seq_set_data_ext(
                self.ptr.as_ptr(),
                bytes.as_ptr(),
                bytes.len(),
                sequence as i32,
                state_flags(partial),
            )
        };
        read != 0
    }

    /// The model.
    #[must_use]
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: made by this thread, used by nobody else; the pool outlives the context by being freed after it.
        unsafe {
            sys::llama_detach_threadpool(self.ptr.as_ptr());
            sys::llama_free(self.ptr.as_ptr());
            drop(Box::from_raw(self.abort.as_ptr()));
        }
    }
}

/// `LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY`, a macro that the bindings leave out.
const STATE_PARTIAL_ONLY: u32 = 1;

fn state_flags(partial: bool) -> u32 {
    if partial { STATE_PARTIAL_ONLY } else { 0 }
}

pub(super) fn creation_failure(params: &ContextParams) -> Error {
    let reason = log::take_last_error();
    let what = format!("cannot create a context of {} tokens for {} sequences", params.n_ctx, params.n_seq_max);
    let of_memory = ["alloc", "memory", "buffer"].iter().any(|word| reason.contains(word));
    match (reason.is_empty(), of_memory) {
        (true, _) => {
            Error::InsufficientMemory(format!("{what}: llama.cpp gave no reason; a smaller context_size may work"))
        }
        (_, true) => Error::InsufficientMemory(format!("{what}: {reason}; a smaller context_size or kv_type may work")),
        (_, false) => Error::Unsupported(format!("{what}: {reason}")),
    }
}

/// The context's own compute threads: no OpenMP team that spins beside it, none made for each graph.
struct ThreadPool(NonNull<sys::ggml_threadpool>);

impl ThreadPool {
    fn attach(context: NonNull<sys::llama_context>, n_threads: u32) -> Result<Self> {
        // SAFETY: plain data; the pool is created with valid parameters.
        let pool = unsafe {
            let mut params = sys::ggml_threadpool_params_default(n_threads as i32);
            // Workers sleep between graphs at once: an idle context costs nothing.
            params.poll = 0;
            sys::ggml_threadpool_new(&raw mut params)
        };
        let pool = NonNull::new(pool)
            .ok_or_else(|| Error::InsufficientMemory(format!("cannot start {n_threads} compute threads")))?;
        // SAFETY: both are alive; the context is freed before the pool.
        unsafe { sys::llama_attach_threadpool(context.as_ptr(), pool.as_ptr(), pool.as_ptr()) };
        Ok(Self(pool))
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        // SAFETY: the context that used it was freed before (see `Context::drop`).
        unsafe { sys::ggml_threadpool_free(self.0.as_ptr()) };
    }
}

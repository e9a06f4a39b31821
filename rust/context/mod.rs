//! ③ Many sequences, one `llama_context`, one decoder thread.

pub mod alarms;
pub mod batch;
pub mod cache;
pub mod cost;
mod decoder;
pub mod job;
pub mod memory;
pub mod parking;
pub mod pool;
mod stats;

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use alarms::Alarms;
pub use cache::Slot;
use job::{Chat, Holder, Message};
use memory::MemoryKind;
use parking::{Budget, Parking};
use pool::Pool;
pub use stats::{Snapshot, Stats};

use crate::error::{Error, Result, closed};
use crate::llama::{self, ContextParams, Token};
use crate::model::Model;

/// Output rows in one call: enough for every sequence, and for scoring at a fair pace.
const MIN_OUTPUTS: u32 = 32;

static NEXT_HOLDER: AtomicU64 = AtomicU64::new(1);
static NEXT_CHAT: AtomicU64 = AtomicU64::new(1);

/// What is known about a context once it is made.
#[derive(Clone, Debug)]
pub struct ContextInfo {
    /// Tokens that one sequence may hold.
    pub context_size: usize,
    /// Sequences.
    pub n_sequences: usize,
    /// Tokens at most in one decode call.
    pub batch_size: usize,
    /// Tokens at most in one micro-batch.
    pub ubatch_size: usize,
    /// Threads that compute single tokens.
    pub n_threads: usize,
    /// Threads that compute prompts.
    pub n_threads_batch: usize,
    /// Cells in all.
    pub n_cells: usize,
    /// Kind of memory.
    pub memory: MemoryKind,
    /// What its buffers and the model's took when it was opened.
    pub usages: Vec<llama::Usage>,
}

/// What everybody who uses a context shares.
pub struct Shared {
    /// The model; none once the context has ended, so that a forgotten handle does not keep the weights.
    model: Mutex<Option<Arc<Model>>>,
    /// What the context is like.
    pub info: ContextInfo,
    /// Sizes and types that a saved state must agree with.
    pub layout: String,
    /// Free sequences.
    pub pool: Pool,
    /// What chats left in cells that others needed.
    pub parking: Parking,
    /// Deadlines of predictions that wait behind others on their sequence.
    pub alarms: Alarms,
    /// Counters.
    pub stats: Stats,
    /// Tokens of each sequence, as evaluated.
    views: Vec<Mutex<View>>,
    usages: Vec<Usage>,
    n_cells_used: AtomicUsize,
    closing: Arc<AtomicBool>,
    inbox: Sender<Message>,
    ended: Gate,
}

/// What a holder's sequence stands for.
#[derive(Default)]
struct View {
    holder: Holder,
    tokens: Vec<Token>,
}

/// Tokens that went through a sequence, all its holders together.
#[derive(Debug, Default)]
pub struct Usage {
    /// Evaluated as part of a prompt.
    pub prompt: AtomicU64,
    /// Found in the cache.
    pub cached: AtomicU64,
    /// Drawn.
    pub predicted: AtomicU64,
}

impl Usage {
    /// Prompt, cached and predicted tokens now.
    #[must_use]
    pub fn snapshot(&self) -> [u64; 3] {
        [&self.prompt, &self.cached, &self.predicted].map(|count| count.load(Ordering::Relaxed))
    }
}

/// Opens once and lets everybody through.
#[derive(Default)]
struct Gate {
    open: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    fn open(&self) {
        *self.open.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.opened.notify_all();
    }

    fn wait(&self, timeout: Duration) -> bool {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let (open, _) =
            self.opened.wait_timeout_while(open, timeout, |open| !*open).unwrap_or_else(PoisonError::into_inner);
        *open
    }
}

/// The parameters, with room for as many rows of logits as a decode call may have.
#[must_use]
pub fn with_outputs(params: ContextParams) -> ContextParams {
    ContextParams { n_outputs_max: params.n_seq_max.max(MIN_OUTPUTS), ..params }
}

/// Makes a `llama_context`, which stays on this thread.
///
/// # Errors
/// `InsufficientMemory`, or `Unsupported` by the model.
pub fn open(model: &Model, params: &ContextParams) -> Result<llama::Context> {
    require_memory(model, params)?;
    llama::Context::new(Arc::clone(model.llama()), params)
}

/// Starts a context: its decoder thread makes the `llama_context` and reports before it takes work.
///
/// # Errors
/// What making the context failed with.
pub fn start(model: &Arc<Model>, params: ContextParams, parking: Budget) -> Result<Arc<Shared>> {
    let params = with_outputs(params);
    let (inbox, messages) = channel();
    let (report, reported) = channel();
    let model = Arc::clone(model);
    std::thread::Builder::new()
        .name("llamactor-decoder".into())
        .stack_size(decoder::STACK_BYTES)
        .spawn(move || open_and_run(model, params, parking, inbox, messages, report))
        .map_err(|source| Error::Io { context: "cannot start the decoder thread".into(), source })?;
    reported.recv().map_err(|_| Error::WorkerCrashed("the decoder died while making its context".into()))?
}

/// What a context would take with its model, of which only an outline is there.
///
/// # Errors
/// As [`llama::Model::footprint`].
pub fn footprint(model: &Model, params: ContextParams) -> Result<Vec<llama::Usage>> {
    model.llama().footprint(&with_outputs(params))
}

/// The decoder thread's life: make the context, tell, run, free.
fn open_and_run(
    model: Arc<Model>,
    params: ContextParams,
    parking: Budget,
    inbox: Sender<Message>,
    messages: Receiver<Message>,
    report: Sender<Result<Arc<Shared>>>,
) {
    let context = match open(&model, &params) {
        Ok(context) => context,
        Err(error) => return drop(report.send(Err(error))),
    };
    let shared = Arc::new(share(model, &params, &context, parking, inbox));
    let decoder = decoder::Decoder::new(Arc::clone(&shared), context, params, messages);
    if report.send(Ok(Arc::clone(&shared))).is_ok() {
        decoder.run();
    } else {
        drop(decoder);
    }
    shared.model.lock().unwrap_or_else(PoisonError::into_inner).take();
    shared.ended.open();
}

/// Refuses a cache that is larger than all memory there is, before the system has to end somebody for it.
fn require_memory(model: &Model, params: &ContextParams) -> Result<()> {
    let llama = model.llama();
    if llama.is_recurrent() || llama.n_head() == 0 {
        return Ok(());
    }
    let width = llama.n_embd() as u64 / llama.n_head() as u64 * llama.n_head_kv() as u64;
    // Two values, of half a byte at least, for each layer.
    let bytes = u64::from(params.n_ctx) * llama.n_layer() as u64 * width;
    let total: u64 = llama::devices().iter().map(|device| device.memory_total as u64).sum();
    if bytes > total {
        return Err(Error::InsufficientMemory(format!(
            "a context of {} tokens needs {bytes} bytes at least for its cache, but there are {total} bytes of memory \
             in all; choose a smaller context_size",
            params.n_ctx
        )));
    }
    Ok(())
}

fn share(
    model: Arc<Model>,
    params: &ContextParams,
    context: &llama::Context,
    parking: Budget,
    inbox: Sender<Message>,
) -> Shared {
    let memory = MemoryKind::of(model.llama(), params.swa_full);
    let n_sequences = params.n_seq_max as usize;
    // llama.cpp rounds the size up; the user's number is the limit.
    let per_sequence = if params.kv_unified { params.n_ctx as usize } else { context.n_ctx_seq() };
    let pooled = params.kv_unified && memory != MemoryKind::Recurrent;
    let info = ContextInfo {
        context_size: per_sequence.min(context.n_ctx_seq()),
        n_sequences,
        batch_size: context.n_batch(),
        ubatch_size: params.n_ubatch as usize,
        n_threads: params.n_threads as usize,
        n_threads_batch: params.n_threads_batch as usize,
        n_cells: if pooled { per_sequence } else { per_sequence * n_sequences },
        memory,
        usages: context.usages().unwrap_or_default(),
    };
    Shared {
        layout: layout(params, memory),
        pool: Pool::new(n_sequences),
        parking: Parking::new(parking),
        alarms: Alarms::default(),
        stats: Stats::default(),
        views: (0..n_sequences).map(|_| Mutex::default()).collect(),
        usages: (0..n_sequences).map(|_| Usage::default()).collect(),
        n_cells_used: AtomicUsize::new(0),
        closing: Arc::default(),
        inbox,
        ended: Gate::default(),
        model: Mutex::new(Some(model)),
        info,
    }
}

/// Everything that decides what the bytes of a cell mean: kinds and types, streams, and how keys were rotated.
fn layout(params: &ContextParams, memory: MemoryKind) -> String {
    let n_streams = if params.kv_unified { 1 } else { params.n_seq_max };
    let rope = (params.rope_freq_base, params.rope_freq_scale, params.yarn_orig_ctx);
    let yarn = (params.yarn_ext_factor, params.yarn_attn_factor, params.yarn_beta_fast, params.yarn_beta_slow);
    format!("{memory:?} {:?} {:?} {} {n_streams} {rope:?} {yarn:?}", params.type_k, params.type_v, params.swa_full)
}

impl Shared {
    /// The model.
    ///
    /// # Errors
    /// `Closed` once the context has ended.
    pub fn model(&self) -> Result<Arc<Model>> {
        self.model.lock().unwrap_or_else(PoisonError::into_inner).clone().ok_or_else(|| closed("context"))
    }

    /// Sends the decoder a message; lost when it has ended, which its replies' closed channels tell.
    pub fn send(&self, message: Message) {
        let _ = self.inbox.send(message);
    }

    /// Makes the decoder look at flags that have changed.
    pub fn wake(&self) {
        self.send(Message::Wake);
    }

    /// The tokens of a sequence, as its holder left them.
    #[must_use]
    pub fn tokens(&self, slot: Slot) -> Vec<Token> {
        self.view(slot).tokens.clone()
    }

    /// Number of tokens of a sequence.
    #[must_use]
    pub fn length(&self, slot: Slot) -> usize {
        self.view(slot).tokens.len()
    }

    /// Lets a holder's sequence show these tokens.
    fn stand_for(&self, slot: Slot, holder: Holder, tokens: &[Token]) {
        let mut view = self.view(slot);
        if view.holder == holder {
            view.tokens = tokens.to_vec();
        }
    }

    /// A new holder sees an empty sequence, whatever its cells hold.
    #[must_use]
    pub fn hold(&self, slot: Slot) -> Holder {
        let holder = NEXT_HOLDER.fetch_add(1, Ordering::Relaxed);
        *self.view(slot) = View { holder, tokens: Vec::new() };
        holder
    }

    /// A new chat, which has left nothing anywhere yet.
    #[must_use]
    pub fn new_chat() -> Chat {
        NEXT_CHAT.fetch_add(1, Ordering::Relaxed)
    }

    /// A chat is over: what it left serves as a prefix for others at most.
    pub fn forget_chat(&self, chat: Chat) {
        self.parking.forget(chat);
        self.send(Message::Forget(chat));
    }

    fn view(&self, slot: Slot) -> std::sync::MutexGuard<'_, View> {
        self.views[slot as usize].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What went through a sequence.
    #[must_use]
    pub fn usage(&self, slot: Slot) -> &Usage {
        &self.usages[slot as usize]
    }

    /// Cells in use by running and idle sequences.
    #[must_use]
    pub fn n_cells_used(&self) -> usize {
        self.n_cells_used.load(Ordering::Relaxed)
    }

    /// Whether closing has begun.
    #[must_use]
    pub fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    /// `Closed` once closing has begun.
    ///
    /// # Errors
    /// See above.
    pub fn require_open(&self) -> Result<()> {
        if self.is_closing() { Err(closed("context")) } else { Ok(()) }
    }

    /// Begins to close: running jobs end with `Closed`, waiting callers too. Idempotent; returns at once.
    pub fn close(&self) {
        if !self.closing.swap(true, Ordering::AcqRel) {
            self.pool.close();
            self.send(Message::Close);
        }
    }

    /// Whether the decoder has freed its context.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.ended.wait(Duration::ZERO)
    }

    /// Waits until the decoder has freed its context; false when that took longer.
    pub fn wait_ended(&self, timeout: Duration) -> bool {
        self.ended.wait(timeout)
    }
}

/// The instant `seconds` from now; `None` for none or for one too far away to matter.
#[must_use]
pub fn deadline_after(seconds: Option<f64>) -> Option<Instant> {
    let duration = Duration::try_from_secs_f64(seconds?).ok()?;
    Instant::now().checked_add(duration)
}

//! A loaded model.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::call::{Call, State, Value};
use super::chat;
use super::hub::Hub;
use super::options::{ContextOptions, LoadOptions};
use super::process::{Native, require_own_process};
use crate::context;
use crate::error::{Error, Result, closed};
use crate::llama::{self, LogLevel, Token};
use crate::model;
use crate::sequence::{BareLoop, Sequences, note};

/// Longest text that is tokenised on the caller's stack; a longer one gets a thread with a larger one.
const OWN_STACK_BYTES: usize = 4 * 1024;

/// How often, and how far apart, a closing model looks whether it is used by nobody any more; half a second in all.
const LET_GO_STEPS: u32 = 500;
const LET_GO_STEP: Duration = Duration::from_millis(1);

/// Loading, and tokenising long texts, recurses.
const STACK_BYTES: usize = 64 * 1024 * 1024;

/// A loaded model.
#[pyclass(frozen, module = "llamactor._core")]
pub struct Model(Native<Arc<Holder>>);

struct Holder {
    model: Mutex<Option<Arc<model::Model>>>,
    contexts: Mutex<Vec<Weak<Sequences>>>,
}

impl Holder {
    /// Remembers a context, so that closing the model closes it; refuses one that came too late.
    fn adopt(&self, context: Arc<Sequences>) -> Result<Arc<Sequences>> {
        let mut contexts = lock(&self.contexts);
        contexts.retain(|context| context.strong_count() > 0);
        contexts.push(Arc::downgrade(&context));
        drop(contexts);
        // `close` empties the model first and then takes the list: one of the two sees the other.
        if lock(&self.model).is_none() { Err(closed("model")) } else { Ok(context) }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // Unmapping gigabytes takes a while: not on the thread that happened to drop the last reference.
        let model = lock(&self.model).take();
        if model.is_some() {
            let _ = spawn("llamactor-free", move || drop(model));
        }
    }
}

impl Model {
    pub fn new(model: Arc<model::Model>) -> Self {
        Self(Native::new(Arc::new(Holder { model: Mutex::new(Some(model)), contexts: Mutex::default() })))
    }

    pub(super) fn open(&self) -> PyResult<Arc<model::Model>> {
        Ok(lock(&self.0.get()?.model).clone().ok_or_else(|| closed("model"))?)
    }
}

#[pymethods]
impl Model {
    #[getter]
    fn closed(&self) -> bool {
        self.0.here().is_none_or(|holder| lock(&holder.model).is_none())
    }

    fn info<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let model = self.open()?;
        let info = model.info();
        let dict = PyDict::new(py);
        dict.set_item("architecture", &info.architecture)?;
        dict.set_item("name", &info.name)?;
        dict.set_item("parameters", info.parameters)?;
        dict.set_item("size_bytes", info.size_bytes)?;
        dict.set_item("quantization", &info.quantization)?;
        dict.set_item("train_context_size", info.train_context_size)?;
        dict.set_item("embedding_size", info.embedding_size)?;
        dict.set_item("layers", info.layers)?;
        dict.set_item("heads", info.heads)?;
        dict.set_item("kv_heads", info.kv_heads)?;
        dict.set_item("vocab_size", info.vocab_size)?;
        dict.set_item("chat_template", &info.chat_template)?;
        dict.set_item("is_recurrent", info.is_recurrent)?;
        dict.set_item("is_hybrid", info.is_hybrid)?;
        dict.set_item("sliding_window", info.sliding_window)?;
        dict.set_item("has_encoder", info.has_encoder)?;
        dict.set_item("has_decoder", info.has_decoder)?;
        dict.set_item("path", &info.path)?;
        dict.set_item("vocab_only", info.vocab_only)?;
        Ok(dict)
    }

    fn metadata(&self) -> PyResult<BTreeMap<String, String>> {
        Ok(self.open()?.metadata())
    }

    fn special_tokens(&self) -> PyResult<BTreeMap<&'static str, Option<Token>>> {
        let tokens = self.open()?.llama().special_tokens();
        Ok(BTreeMap::from([
            ("bos", tokens.bos),
            ("eos", tokens.eos),
            ("eot", tokens.eot),
            ("sep", tokens.sep),
            ("nl", tokens.nl),
            ("pad", tokens.pad),
            ("mask", tokens.mask),
            ("fim_prefix", tokens.fim_prefix),
            ("fim_suffix", tokens.fim_suffix),
            ("fim_middle", tokens.fim_middle),
            ("fim_pad", tokens.fim_pad),
            ("fim_repo", tokens.fim_repo),
            ("fim_separator", tokens.fim_separator),
        ]))
    }

    fn add_bos(&self) -> PyResult<bool> {
        Ok(self.open()?.llama().adds_bos())
    }

    fn vocab_size(&self) -> PyResult<usize> {
        Ok(self.open()?.llama().n_vocab())
    }

    fn is_eog(&self, token: Token) -> PyResult<bool> {
        Ok(self.open()?.llama().is_eog(token))
    }

    fn tokenize(&self, py: Python<'_>, text: String, add_bos: bool, special: bool) -> PyResult<Vec<Token>> {
        let model = self.open()?;
        Ok(py.detach(move || tokenize(&model, text, add_bos, special))?)
    }

    /// The tokens of a text that goes on after others: no space is put before it.
    fn tokenize_continuation(&self, py: Python<'_>, text: String, special: bool) -> PyResult<Vec<Token>> {
        let model = self.open()?;
        let tokenize = move || model.tokenize_continuation(&text, special);
        Ok(py.detach(move || on_deep_stack(tokenize))?)
    }

    fn count_tokens(&self, py: Python<'_>, text: String) -> PyResult<usize> {
        Ok(self.tokenize(py, text, false, false)?.len())
    }

    fn detokenize(&self, py: Python<'_>, tokens: Vec<Token>, special: bool) -> PyResult<String> {
        let model = self.open()?;
        Ok(py.detach(move || model.llama().detokenize(&tokens, special))?)
    }

    fn render_chat(&self, hub: &Hub, request: Vec<u8>) -> PyResult<Call> {
        chat::render(self.open()?, hub, request)
    }

    fn chat_format(&self, hub: &Hub, request: Vec<u8>) -> PyResult<Call> {
        chat::format(self.open()?, hub, request)
    }

    /// Writes a chat's note to a file that has no state.
    fn save_note(&self, hub: &Hub, path: PathBuf, note: Vec<u8>) -> PyResult<Call> {
        let (model, state) = (self.open()?, State::new(hub)?);
        let reporter = Arc::clone(&state);
        spawn("llamactor-save", move || {
            reporter.finish(note::write(&path, &model, &note).map(|()| Value::None));
        })?;
        Ok(Call::new(state))
    }

    /// Reads a chat's note; its first byte says whether a state is beside it.
    fn load_note(&self, hub: &Hub, path: PathBuf) -> PyResult<Call> {
        let (model, state) = (self.open()?, State::new(hub)?);
        let reporter = Arc::clone(&state);
        spawn("llamactor-restore", move || {
            let noted = note::read(&path, &model);
            reporter.finish(noted.map(|(note, has_state)| Value::Bytes([&[u8::from(has_state)], &note[..]].concat())));
        })?;
        Ok(Call::new(state))
    }

    fn create_context(&self, hub: &Hub, options: ContextOptions) -> PyResult<Call> {
        let model = self.open()?;
        let parking = options.parking();
        let params = options.into_params()?;
        let state = State::new(hub)?;
        let reporter = Arc::clone(&state);
        let holder = Arc::clone(self.0.get()?);
        spawn("llamactor-open", move || {
            let context = Sequences::start(&model, params, parking).and_then(|context| holder.adopt(context));
            reporter.finish(context.map(Value::Context));
        })?;
        Ok(Call::new(state))
    }

    /// What a context of this outline would take: see `footprint` in `_core.pyi`.
    fn footprint(&self, hub: &Hub, options: ContextOptions) -> PyResult<Call> {
        let (model, params, state) = (self.open()?, options.into_params()?, State::new(hub)?);
        let reporter = Arc::clone(&state);
        spawn("llamactor-measure", move || {
            reporter.finish(context::footprint(&model, params).map(Value::Usages));
        })?;
        Ok(Call::new(state))
    }

    /// Makes a context that nothing stands round, to compare with.
    fn bare_loop(&self, hub: &Hub, options: ContextOptions) -> PyResult<Call> {
        let (model, state) = (self.open()?, State::new(hub)?);
        let params = options.into_params()?;
        let reporter = Arc::clone(&state);
        spawn("llamactor-open", move || {
            reporter.finish(BareLoop::start(&model, params).map(Value::BareLoop));
        })?;
        Ok(Call::new(state))
    }

    fn close(&self, hub: &Hub) -> PyResult<Call> {
        let state = State::new(hub)?;
        let holder = self.0.get()?;
        let model = lock(&holder.model).take();
        let contexts = std::mem::take(&mut *lock(&holder.contexts));
        let reporter = Arc::clone(&state);
        spawn("llamactor-close", move || {
            for context in contexts.iter().filter_map(Weak::upgrade) {
                context.close();
                context.shared().wait_ended(Duration::MAX);
            }
            if let Some(model) = model {
                let_go(model);
            }
            reporter.finish(Ok(Value::None));
        })?;
        Ok(Call::new(state))
    }
}

/// Frees a model, after the threads that worked with it have let it go: they do so a moment after their context has
/// ended, and whoever closes a model wants its memory.
fn let_go(model: Arc<model::Model>) {
    for _ in 0..LET_GO_STEPS {
        if Arc::strong_count(&model) == 1 {
            break;
        }
        std::thread::sleep(LET_GO_STEP);
    }
}

fn tokenize(model: &Arc<model::Model>, text: String, add_bos: bool, special: bool) -> Result<Vec<Token>> {
    if text.len() <= OWN_STACK_BYTES {
        return model.llama().tokenize(&text, add_bos, special);
    }
    let model = Arc::clone(model);
    on_deep_stack(move || model.llama().tokenize(&text, add_bos, special))
}

/// Runs what recurses with the length of a text.
fn on_deep_stack<T: Send + 'static>(run: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let thread = spawn("llamactor-tokenize", run)?;
    thread.join().map_err(|_| Error::WorkerCrashed("the tokeniser's thread died".into()))?
}

pub(super) fn spawn<T: Send + 'static>(
    name: &str,
    run: impl FnOnce() -> T + Send + 'static,
) -> Result<std::thread::JoinHandle<T>> {
    std::thread::Builder::new()
        .name(name.into())
        .stack_size(STACK_BYTES)
        .spawn(run)
        .map_err(|source| Error::Io { context: format!("cannot start the thread {name}"), source })
}

/// Loads a model on a thread of its own.
#[pyfunction]
pub fn load_model(hub: &Hub, path: PathBuf, options: LoadOptions) -> PyResult<Call> {
    let params = options.into_params()?;
    let state = State::new(hub)?;
    let reporter = Arc::clone(&state);
    spawn("llamactor-load", move || {
        let cancel = reporter.cancel_flag();
        let mut on_progress = |fraction| {
            reporter.progressed(fraction);
            !cancel.load(Ordering::Relaxed)
        };
        let model = model::Model::load(&path, &params, &mut on_progress);
        let outcome = match model {
            Ok(model) if cancel.load(Ordering::SeqCst) => {
                drop(model); // before anybody is told
                Err(Error::LoadCancelled)
            }
            model => model.map(|model| Value::Model(Arc::new(model))),
        };
        reporter.finish(outcome);
    })?;
    Ok(Call::new(state))
}

/// The devices that can hold layers.
#[pyfunction]
pub fn devices(py: Python<'_>) -> PyResult<Vec<Bound<'_, PyDict>>> {
    require_own_process()?;
    let found = py.detach(llama::devices);
    found
        .into_iter()
        .map(|device| {
            let dict = PyDict::new(py);
            dict.set_item("name", device.name)?;
            dict.set_item("description", device.description)?;
            dict.set_item("backend", device.backend)?;
            dict.set_item("kind", device.kind)?;
            dict.set_item("memory_total", device.memory_total)?;
            dict.set_item("memory_free", device.memory_free)?;
            Ok(dict)
        })
        .collect()
}

/// Instruction sets and backends of this build.
#[pyfunction]
pub fn system_info() -> PyResult<String> {
    require_own_process()?;
    Ok(llama::system_info())
}

/// How much of llama.cpp's log goes to stderr.
#[pyfunction]
pub fn set_log_level(level: &str) -> PyResult<()> {
    llama::set_log_level(level.parse::<LogLevel>().map_err(Error::Value)?);
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

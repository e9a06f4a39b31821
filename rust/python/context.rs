//! Many sequences in one context.

use std::sync::Arc;
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::call::{Call, State, Value, usage};
use super::hub::Hub;
use super::options::{PredictOptions, TextOrTokens, TurnOptions};
use super::prediction::Prediction;
use super::process::Native;
use super::sequence::Sequence;
use crate::context::Shared;
use crate::context::pool::WaiterId;
use crate::error::Error;
use crate::prediction;
use crate::sequence::Sequences;

/// A context.
#[pyclass(frozen, module = "llamactor._core")]
pub struct Context(Native<Arc<Sequences>>);

impl Context {
    pub fn new(context: Arc<Sequences>) -> Self {
        Self(Native::new(context))
    }
}

#[pymethods]
impl Context {
    #[getter]
    fn closed(&self) -> bool {
        self.0.here().is_none_or(|context| context.shared().is_closing())
    }

    fn info<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let info = &self.0.get()?.shared().info;
        let dict = PyDict::new(py);
        dict.set_item("context_size", info.context_size)?;
        dict.set_item("sequences", info.n_sequences)?;
        dict.set_item("batch_size", info.batch_size)?;
        dict.set_item("ubatch_size", info.ubatch_size)?;
        dict.set_item("threads", info.n_threads)?;
        dict.set_item("threads_batch", info.n_threads_batch)?;
        dict.set_item("memory", info.memory.name())?;
        dict.set_item("usages", info.usages.iter().map(usage).collect::<Vec<_>>())?;
        Ok(dict)
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let shared = self.0.get()?.shared();
        let counters = shared.stats.snapshot();
        let (used, total) = (shared.n_cells_used(), shared.info.n_cells);
        let dict = PyDict::new(py);
        dict.set_item("cells_total", total)?;
        dict.set_item("cells_used", used)?;
        dict.set_item("cells_free", total - used)?;
        dict.set_item("occupancy", used as f64 / total.max(1) as f64)?;
        dict.set_item("sequences_total", shared.info.n_sequences)?;
        dict.set_item("sequences_active", shared.pool.n_active())?;
        dict.set_item("sequences_waiting", shared.pool.n_waiting())?;
        dict.set_item("batches", counters.batches)?;
        dict.set_item("micro_batches", counters.micro_batches)?;
        dict.set_item("evaluated_tokens", counters.evaluated_tokens)?;
        dict.set_item("prompt_tokens", counters.prompt_tokens)?;
        dict.set_item("decoded_tokens", counters.decoded_tokens)?;
        dict.set_item("cached_tokens", counters.cached_tokens)?;
        dict.set_item("copied_tokens", counters.copied_tokens)?;
        dict.set_item("shifted_tokens", counters.shifted_tokens)?;
        dict.set_item("preemptions", counters.preemptions)?;
        dict.set_item("evictions", counters.evictions)?;
        let parked = shared.parking.parked();
        dict.set_item("parked_states", parked.n_states)?;
        dict.set_item("parked_bytes", parked.host_bytes)?;
        dict.set_item("parked_disk_bytes", parked.disk_bytes)?;
        dict.set_item("restored_tokens", counters.restored_tokens)?;
        dict.set_item("decode_time", counters.decode_nanoseconds as f64 / 1e9)?;
        Ok(dict)
    }

    fn acquire(&self, hub: &Hub, chat: u64) -> PyResult<Call> {
        let state = State::new(hub)?;
        let context = self.0.get()?;
        let waiter = context.acquire(chat, state.done(Value::Sequence));
        leave_on_cancel(&state, context.shared(), waiter);
        Ok(Call::new(state))
    }

    fn try_acquire(&self) -> PyResult<Option<Sequence>> {
        Ok(self.0.get()?.try_acquire()?.map(Sequence::new))
    }

    fn predict(
        &self,
        py: Python<'_>,
        hub: &Hub,
        prompt: TextOrTokens,
        options: PredictOptions,
    ) -> PyResult<Prediction> {
        let context = self.0.get()?;
        context.shared().require_open()?;
        let max_pending = options.max_pending;
        let (request, terms) = options.into_request(py, prompt, None)?;
        let native = prediction::Prediction::new(hub.native()?, max_pending);
        context.predict(request, native.clone());
        Ok(Prediction::new(native, terms))
    }

    /// A prediction whose prompt is not known yet; `begin` gives it one.
    fn defer(&self, hub: &Hub, max_pending: Option<usize>) -> PyResult<Prediction> {
        self.0.get()?.shared().require_open()?;
        Ok(Prediction::deferred(prediction::Prediction::deferred(hub.native()?, max_pending)))
    }

    /// Queues a deferred prediction, or its next round. False when it has ended already.
    fn begin(
        &self,
        py: Python<'_>,
        prediction: &Prediction,
        prompt: TextOrTokens,
        options: PredictOptions,
        turn: TurnOptions,
    ) -> PyResult<bool> {
        let context = self.0.get()?;
        context.shared().require_open()?;
        let more = turn.more;
        let (request, terms) = options.into_request(py, prompt, Some(turn))?;
        let native = prediction.begin(terms, more)?;
        let begins = native.is_some();
        if let Some(native) = native {
            context.predict(request, native);
        }
        Ok(begins)
    }

    #[staticmethod]
    fn new_chat() -> u64 {
        Shared::new_chat()
    }

    /// Forgets what a chat left, but for what serves others as a prefix.
    fn forget_chat(&self, chat: u64) {
        if let Some(context) = self.0.here() {
            context.shared().forget_chat(chat);
        }
    }

    fn close(&self, hub: &Hub) -> PyResult<Call> {
        let state = State::new(hub)?;
        let context = Arc::clone(self.0.get()?);
        let reporter = Arc::clone(&state);
        context.close();
        std::thread::Builder::new().name("llamactor-close".into()).spawn(move || {
            context.shared().wait_ended(Duration::MAX);
            drop(context);
            reporter.finish(Ok(Value::None));
        })?;
        Ok(Call::new(state))
    }
}

/// Makes a cancel leave the queue.
pub fn leave_on_cancel(state: &State, shared: &Arc<Shared>, waiter: WaiterId) {
    let shared = Arc::clone(shared);
    state.on_cancel(move || {
        if let Some(grant) = shared.pool.leave(waiter) {
            grant(Err(Error::Cancelled));
        }
    });
}

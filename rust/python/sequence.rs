//! A held sequence of a context.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use pyo3::prelude::*;

use super::call::{Call, State, Value};
use super::context::leave_on_cancel;
use super::hub::Hub;
use super::options::{PredictOptions, TextOrTokens};
use super::prediction::Prediction;
use super::process::{Native, is_forked};
use crate::error::{Error, closed};
use crate::llama::Token;
use crate::prediction;
use crate::sequence::{Lease, Sink};

/// A sequence.
#[pyclass(frozen, module = "llamactor._core")]
pub struct Sequence {
    lease: Native<Lease>,
    id: u32,
}

impl Sequence {
    pub fn new(lease: Lease) -> Self {
        Self { id: lease.slot(), lease: Native::new(lease) }
    }

    fn open(&self) -> PyResult<&Lease> {
        let lease = self.lease.get()?;
        if lease.is_closed() { Err(closed("sequence").into()) } else { Ok(lease) }
    }

    /// An operation that wakes the decoder when it is cancelled.
    fn call(&self, hub: &Hub, start: impl FnOnce(&Lease, &Arc<State>)) -> PyResult<Call> {
        let lease = self.open()?;
        let state = State::new(hub)?;
        let shared = Arc::clone(lease.shared());
        state.on_cancel(move || shared.wake());
        start(lease, &state);
        Ok(Call::new(state))
    }
}

#[pymethods]
impl Sequence {
    #[getter]
    fn id(&self) -> u32 {
        self.id
    }

    #[getter]
    fn closed(&self) -> bool {
        self.lease.here().is_none_or(Lease::is_closed)
    }

    fn tokens(&self) -> PyResult<Vec<Token>> {
        let lease = self.open()?;
        Ok(lease.shared().tokens(lease.slot()))
    }

    fn length(&self) -> PyResult<usize> {
        let lease = self.open()?;
        Ok(lease.shared().length(lease.slot()))
    }

    fn usage(&self) -> PyResult<BTreeMap<&'static str, u64>> {
        let [prompt, cached, predicted] = self.lease.get()?.usage();
        Ok(BTreeMap::from([("prompt_tokens", prompt), ("cached_tokens", cached), ("predicted_tokens", predicted)]))
    }

    fn predict(
        &self,
        py: Python<'_>,
        hub: &Hub,
        prompt: TextOrTokens,
        options: PredictOptions,
    ) -> PyResult<Prediction> {
        let lease = self.open()?;
        let max_pending = options.max_pending;
        let (request, terms) = options.into_request(py, prompt, None)?;
        let native = prediction::Prediction::new(hub.native()?, max_pending);
        let sink: Arc<prediction::Prediction> = Arc::clone(&native);
        let queued = lease.predict(request, sink);
        let shared = Arc::clone(lease.shared());
        // Before its turn only a cancel nudges, and ends it here; later the decoder looks.
        native.on_nudge(Arc::new(move || {
            if !queued.leave(Error::Cancelled) {
                shared.wake();
            }
        }));
        Ok(Prediction::new(native, terms))
    }

    fn prefill(&self, hub: &Hub, prompt: TextOrTokens, special: bool) -> PyResult<Call> {
        self.call(hub, |lease, state| {
            lease.prefill(prompt.into_prompt(special), state.cancel_flag(), state.done(Value::Count));
        })
    }

    fn fork(&self, hub: &Hub, wait: bool) -> PyResult<Call> {
        let lease = self.open()?;
        let state = State::new(hub)?;
        if let Some(waiter) = lease.fork(wait, state.done(Value::Sequence)) {
            leave_on_cancel(&state, lease.shared(), waiter);
        }
        Ok(Call::new(state))
    }

    fn erase(&self, hub: &Hub, ranges: Vec<(usize, usize)>) -> PyResult<Call> {
        self.call(hub, |lease, state| lease.erase(ranges, state.cancel_flag(), state.done(|()| Value::None)))
    }

    fn shift(&self, hub: &Hub, n_keep: usize, n_discard: usize) -> PyResult<Call> {
        self.erase(hub, vec![(n_keep, n_keep.saturating_add(n_discard))])
    }

    fn clear(&self, hub: &Hub) -> PyResult<Call> {
        self.call(hub, |lease, state| lease.clear(state.done(|()| Value::None)))
    }

    fn save(&self, hub: &Hub, path: PathBuf, note: Vec<u8>) -> PyResult<Call> {
        self.call(hub, |lease, state| lease.save(path, note, state.done(|()| Value::None)))
    }

    fn load(&self, hub: &Hub, path: PathBuf) -> PyResult<Call> {
        self.call(hub, |lease, state| lease.load(path, state.done(|()| Value::None)))
    }

    fn score(&self, hub: &Hub, tokens: Vec<Token>) -> PyResult<Call> {
        self.call(hub, |lease, state| lease.score(tokens, state.cancel_flag(), state.done(Value::Floats)))
    }

    fn close(&self) {
        if !is_forked()
            && let Ok(lease) = self.lease.get()
        {
            lease.close();
        }
    }
}

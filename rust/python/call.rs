//! One asynchronous operation of the core, as an event loop sees it.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::bare::BareLoop;
use super::context::Context;
use super::hub::Hub;
use super::model::Model;
use super::process::Native;
use super::sequence::Sequence;
use crate::error::{Error, Result};
use crate::llama::Usage;
use crate::prediction::Target;
use crate::sequence::{self, BareReplies, Done, Lease, Sequences};

/// What an operation gives.
pub enum Value {
    None,
    Count(usize),
    Floats(Vec<f32>),
    Bytes(Vec<u8>),
    Usages(Vec<Usage>),
    Model(Arc<crate::model::Model>),
    Context(Arc<Sequences>),
    Sequence(Lease),
    BareLoop(sequence::BareLoop),
    Replies(BareReplies),
}

type OnCancel = Box<dyn FnOnce() + Send>;

pub struct State {
    target: Arc<Target>,
    outcome: Mutex<Option<Result<Value>>>,
    done: AtomicBool,
    cancel: Arc<AtomicBool>,
    on_cancel: Mutex<Option<OnCancel>>,
    /// Bits of an `f32` from 0 to 1.
    progress: AtomicU32,
}

impl State {
    pub fn new(hub: &Hub) -> PyResult<Arc<Self>> {
        Ok(Arc::new(Self {
            target: hub.native()?.target(),
            outcome: Mutex::default(),
            done: AtomicBool::new(false),
            cancel: Arc::default(),
            on_cancel: Mutex::default(),
            progress: AtomicU32::new(0),
        }))
    }

    /// Set once the operation is cancelled.
    pub fn cancel_flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.cancel)
    }

    /// What a cancel does besides setting the flag; at once if it was cancelled before.
    pub fn on_cancel(&self, act: impl FnOnce() + Send + 'static) {
        *lock(&self.on_cancel) = Some(Box::new(act));
        if self.cancel.load(Ordering::SeqCst) {
            self.run_on_cancel();
        }
    }

    fn run_on_cancel(&self) {
        let act = lock(&self.on_cancel).take();
        if let Some(act) = act {
            act();
        }
    }

    /// News while it runs, from 0 to 1; posted in steps of a hundredth.
    pub fn progressed(&self, fraction: f32) {
        let before = f32::from_bits(self.progress.load(Ordering::Relaxed));
        let moved = (fraction * 100.0).floor() > (before * 100.0).floor();
        if moved {
            self.progress.store(fraction.to_bits(), Ordering::Relaxed);
            self.target.post();
        }
    }

    pub fn finish(&self, outcome: Result<Value>) {
        *lock(&self.outcome) = Some(self.unless_cancelled(outcome));
        let act = lock(&self.on_cancel).take();
        drop(act);
        self.progress.store(1.0f32.to_bits(), Ordering::Relaxed);
        self.done.store(true, Ordering::SeqCst);
        self.target.post();
    }

    /// A value that comes after the cancel has no taker: what it holds is let go here.
    fn unless_cancelled(&self, outcome: Result<Value>) -> Result<Value> {
        let holds =
            matches!(outcome, Ok(Value::Sequence(_) | Value::Context(_) | Value::Model(_) | Value::BareLoop(_)));
        if holds && self.cancel.load(Ordering::SeqCst) { Err(Error::Cancelled) } else { outcome }
    }

    /// Where the core puts a value of one kind.
    pub fn done<T>(self: &Arc<Self>, wrap: impl FnOnce(T) -> Value + Send + 'static) -> Done<T> {
        let state = Arc::clone(self);
        Box::new(move |outcome| state.finish(outcome.map(wrap)))
    }
}

/// One asynchronous operation.
#[pyclass(frozen, generic, module = "llamactor._core")]
pub struct Call(Native<Arc<State>>);

impl Call {
    pub fn new(state: Arc<State>) -> Self {
        Self(Native::new(state))
    }
}

#[pymethods]
impl Call {
    #[getter]
    fn id(&self) -> PyResult<u64> {
        Ok(self.0.get()?.target.id())
    }

    #[getter]
    fn done(&self) -> PyResult<bool> {
        Ok(self.0.get()?.done.load(Ordering::SeqCst))
    }

    #[getter]
    fn progress(&self) -> PyResult<f32> {
        Ok(f32::from_bits(self.0.get()?.progress.load(Ordering::Relaxed)))
    }

    fn take(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let outcome = lock(&self.0.get()?.outcome).take();
        let value =
            outcome.unwrap_or_else(|| Err(Error::Value("this call has no value yet, or it was taken".into())))?;
        into_python(py, value)
    }

    fn cancel(&self) {
        if let Ok(state) = self.0.get()
            && !state.cancel.swap(true, Ordering::SeqCst)
        {
            state.run_on_cancel();
        }
    }
}

fn into_python(py: Python<'_>, value: Value) -> PyResult<Py<PyAny>> {
    Ok(match value {
        Value::None => py.None(),
        Value::Count(n) => n.into_pyobject(py)?.into_any().unbind(),
        Value::Bytes(bytes) => PyBytes::new(py, &bytes).into_any().unbind(),
        Value::Usages(usages) => usages.iter().map(usage).collect::<Vec<_>>().into_pyobject(py)?.into_any().unbind(),
        Value::Floats(floats) => floats.into_pyobject(py)?.into_any().unbind(),
        Value::Model(model) => Py::new(py, Model::new(model))?.into_any(),
        Value::Context(context) => Py::new(py, Context::new(context))?.into_any(),
        Value::Sequence(lease) => Py::new(py, Sequence::new(lease))?.into_any(),
        Value::BareLoop(bare) => Py::new(py, BareLoop::new(bare))?.into_any(),
        Value::Replies(replies) => {
            (replies.first, replies.total, replies.tokens).into_pyobject(py)?.into_any().unbind()
        }
    })
}

/// `Usage` of `_core.pyi`.
pub fn usage(usage: &Usage) -> (&str, &str, bool, u64, u64, u64) {
    (&usage.device, &usage.buffer, usage.host, usage.weights, usage.cache, usage.compute)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

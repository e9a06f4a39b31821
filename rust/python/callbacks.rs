//! A user's Python functions that take part in drawing a token. They run on their sequence's thread only.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyList};

use crate::error::ForeignError;
use crate::llama::Token;
use crate::sequence::sampler::{LogitsProcessor, PunishFilter};

/// `logits_processor(tokens, logits)`: changes the float32 view of the logits in place.
pub struct PythonProcessor {
    callable: Py<PyAny>,
    /// The same list for the whole generation, so that a token costs one append.
    tokens: Py<PyList>,
}

impl PythonProcessor {
    pub fn new(py: Python<'_>, callable: Py<PyAny>) -> Self {
        Self { callable, tokens: PyList::empty(py).unbind() }
    }

    fn call(&self, py: Python<'_>, tokens: &[Token], logits: &mut [f32]) -> PyResult<()> {
        let list = self.tokens.bind(py);
        for token in &tokens[list.len().min(tokens.len())..] {
            list.append(*token)?;
        }
        let bytes = PyByteArray::new_with(py, size_of_val(logits), |bytes| {
            for (bytes, logit) in bytes.chunks_exact_mut(4).zip(logits.iter()) {
                bytes.copy_from_slice(&logit.to_ne_bytes());
            }
            Ok(())
        })?;
        let view = py.import("builtins")?.getattr("memoryview")?.call1((&bytes,))?.call_method1("cast", ("f",))?;
        call(|| self.callable.call1(py, (list, &view)))?;
        let changed = bytes.to_vec();
        if changed.len() != size_of_val(logits) {
            return Err(PyValueError::new_err("logits_processor must change the logits in place"));
        }
        for (logit, bytes) in logits.iter_mut().zip(changed.chunks_exact(4)) {
            *logit = f32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        Ok(())
    }
}

impl LogitsProcessor for PythonProcessor {
    fn process(&mut self, tokens: &[Token], logits: &mut [f32]) -> Result<(), ForeignError> {
        attached(|py| self.call(py, tokens, logits))
    }
}

/// `punish_tokens_filter(tokens) -> tokens`.
pub struct PythonFilter(pub Py<PyAny>);

impl PunishFilter for PythonFilter {
    fn filter(&mut self, tokens: &[Token]) -> Result<Vec<Token>, ForeignError> {
        attached(|py| call(|| self.0.call1(py, (tokens.to_vec(),)))?.extract::<Vec<Token>>(py))
    }
}

/// Callbacks that are running, and whether the interpreter is about to end, after which none begins.
static IN_FLIGHT: Mutex<InFlight> = Mutex::new(InFlight { n: 0, ending: false });
static LANDED: Condvar = Condvar::new();

struct InFlight {
    n: usize,
    ending: bool,
}

/// Lets no further callback begin and waits, without the GIL, for those that run.
pub fn end_callbacks(timeout: Duration) {
    let mut in_flight = in_flight();
    in_flight.ending = true;
    let _ = LANDED.wait_timeout_while(in_flight, timeout, |in_flight| in_flight.n > 0);
}

fn in_flight() -> MutexGuard<'static, InFlight> {
    IN_FLIGHT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A callback in the air.
struct Flight;

impl Flight {
    fn begin() -> Option<Self> {
        let mut in_flight = in_flight();
        if in_flight.ending {
            return None;
        }
        in_flight.n += 1;
        Some(Self)
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        in_flight().n -= 1;
        LANDED.notify_all();
    }
}

/// Runs with the GIL; fails where the interpreter is ending, instead of waiting for ever.
fn attached<T>(run: impl FnOnce(Python<'_>) -> PyResult<T>) -> Result<T, ForeignError> {
    let flight = Flight::begin();
    let outcome = flight.as_ref().and_then(|_| Python::try_attach(run));
    match outcome {
        Some(Ok(value)) => Ok(value),
        Some(Err(error)) => Err(ForeignError(Box::new(error))),
        None => Err(ForeignError(Box::new("the interpreter is ending"))),
    }
}

/// Calls into Python. An interpreter that has ended meanwhile unwinds threads that come back to it (CPython before
/// 3.14 does so with `pthread_exit`), which would abort the process in Rust frames: such a thread stops here instead.
fn call<T>(run: impl FnOnce() -> T) -> T {
    struct Unwound;
    impl Drop for Unwound {
        fn drop(&mut self) {
            while in_flight().ending {
                std::thread::park();
            }
        }
    }
    let guard = Unwound;
    let value = run();
    std::mem::forget(guard);
    value
}

//! A user's Python functions that take part in drawing a token. They run on their sequence's thread only.

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
        self.callable.call1(py, (list, &view))?;
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
        attached(|py| self.0.call1(py, (tokens.to_vec(),))?.extract::<Vec<Token>>(py))
    }
}

/// Runs with the GIL; fails where the interpreter is ending, instead of waiting for ever.
fn attached<T>(run: impl FnOnce(Python<'_>) -> PyResult<T>) -> Result<T, ForeignError> {
    match Python::try_attach(run) {
        Some(Ok(value)) => Ok(value),
        Some(Err(error)) => Err(ForeignError(Box::new(error))),
        None => Err(ForeignError(Box::new("the interpreter is ending"))),
    }
}

//! What happens to the core when its process forks or ends.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pyo3::prelude::*;

use super::callbacks::end_callbacks;
use super::error::to_python;
use crate::error::{Error, closed};
use crate::sequence::Sequences;

/// Set in a forked child: none of the core's threads exist there, and any lock may be held for ever.
static FORKED: AtomicBool = AtomicBool::new(false);

/// Marks the core dead in a forked child: every call raises `ClosedError`, nothing is joined or freed.
#[pyfunction]
pub fn after_fork_in_child() {
    FORKED.store(true, Ordering::SeqCst);
}

/// Whether this is a forked child.
pub fn is_forked() -> bool {
    FORKED.load(Ordering::Relaxed)
}

/// `ClosedError` in a forked child.
pub fn require_own_process() -> PyResult<()> {
    if is_forked() {
        return Err(to_python(&Error::Closed(
            "this process was forked from one that used llamactor; load models in the child, or use spawn".into(),
        )));
    }
    Ok(())
}

/// A value that is left alone in a forked child, where dropping it could wait for threads that do not exist.
pub struct Native<T>(Option<T>);

impl<T> Native<T> {
    pub fn new(value: T) -> Self {
        Self(Some(value))
    }

    /// The value, or `None` in a forked child, where all is closed.
    pub fn here(&self) -> Option<&T> {
        self.0.as_ref().filter(|_| !is_forked())
    }

    /// The value, in the process that made it.
    pub fn get(&self) -> PyResult<&T> {
        require_own_process()?;
        self.0.as_ref().ok_or_else(|| to_python(&closed("object")))
    }
}

impl<T> Drop for Native<T> {
    fn drop(&mut self) {
        if is_forked() {
            std::mem::forget(self.0.take());
        }
    }
}

/// Ends all contexts and waits for their threads, `timeout` seconds at most. For the end of the interpreter.
#[pyfunction]
pub fn shutdown(py: Python<'_>, timeout: f64) {
    if is_forked() {
        return;
    }
    py.detach(|| {
        let deadline = Instant::now() + Duration::try_from_secs_f64(timeout).unwrap_or(Duration::ZERO);
        let contexts = Sequences::all();
        for context in &contexts {
            context.close();
        }
        let remaining = || deadline.saturating_duration_since(Instant::now());
        end_callbacks(remaining());
        for context in &contexts {
            context.shared().wait_ended(remaining());
        }
    });
}

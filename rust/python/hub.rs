//! One wake-up for everything an event loop waits for.

use std::sync::Arc;

use pyo3::prelude::*;

use super::process::{Native, is_forked};
use crate::prediction;

/// Collects who has news for one event loop behind one descriptor.
#[pyclass(frozen, module = "llamactor._core")]
pub struct Hub(Native<Arc<prediction::Hub>>);

impl Hub {
    pub fn native(&self) -> PyResult<&Arc<prediction::Hub>> {
        self.0.get()
    }
}

#[pymethods]
impl Hub {
    #[new]
    fn new() -> PyResult<Self> {
        super::process::require_own_process()?;
        Ok(Self(Native::new(prediction::Hub::new()?)))
    }

    fn fileno(&self) -> PyResult<i32> {
        Ok(self.native()?.descriptor())
    }

    fn drain(&self) -> PyResult<Vec<u64>> {
        Ok(self.native()?.drain())
    }

    fn close(&self) {
        if !is_forked()
            && let Ok(hub) = self.native()
        {
            hub.close();
        }
    }
}

//! The bare loop that predictions are compared with.

use std::sync::{Arc, Mutex, PoisonError};

use pyo3::prelude::*;

use super::call::{Call, State, Value};
use super::hub::Hub;
use super::model::spawn;
use super::process::Native;
use crate::error::closed;
use crate::llama::Token;
use crate::sequence;

/// A bare loop over a model.
#[pyclass(frozen, module = "llamactor._core")]
pub struct BareLoop(Native<Mutex<Option<sequence::BareLoop>>>);

impl BareLoop {
    pub fn new(bare: sequence::BareLoop) -> Self {
        Self(Native::new(Mutex::new(Some(bare))))
    }
}

#[pymethods]
impl BareLoop {
    fn run(&self, hub: &Hub, prompts: Vec<Vec<Token>>, length: usize) -> PyResult<Call> {
        let state = State::new(hub)?;
        let bare = self.0.get()?.lock().unwrap_or_else(PoisonError::into_inner);
        let bare = bare.as_ref().ok_or_else(|| closed("bare loop"))?;
        bare.run(prompts, length, state.cancel_flag(), state.done(Value::Replies));
        Ok(Call::new(state))
    }

    fn close(&self, hub: &Hub) -> PyResult<Call> {
        let state = State::new(hub)?;
        let bare = self.0.get()?.lock().unwrap_or_else(PoisonError::into_inner).take();
        let reporter = Arc::clone(&state);
        spawn("llamactor-close", move || {
            if let Some(bare) = bare {
                bare.close();
            }
            reporter.finish(Ok(Value::None));
        })?;
        Ok(Call::new(state))
    }
}

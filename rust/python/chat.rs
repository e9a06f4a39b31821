//! Chat templates.

use std::sync::Arc;

use pyo3::prelude::*;

use super::call::{Call, State, Value};
use super::hub::Hub;
use super::model::spawn;
use crate::chat;
use crate::error::{Error, Result};
use crate::model::Model;

/// Renders a request on a thread of its own; both ways as JSON.
pub fn render(model: Arc<Model>, hub: &Hub, request: Vec<u8>) -> PyResult<Call> {
    let state = State::new(hub)?;
    let reporter = Arc::clone(&state);
    spawn("llamactor-chat", move || reporter.finish(render_json(&model, &request).map(Value::Bytes)))?;
    Ok(Call::new(state))
}

fn render_json(model: &Model, request: &[u8]) -> Result<Vec<u8>> {
    let request: chat::Request = serde_json::from_slice(request).map_err(unreadable)?;
    serde_json::to_vec(&chat::render(model, &request)?).map_err(unreadable)
}

fn unreadable(error: serde_json::Error) -> Error {
    Error::Value(format!("the messages cannot be passed on as JSON: {error}"))
}

//! Chat templates.

use std::sync::Arc;

use pyo3::prelude::*;

use super::call::{Call, State, Value};
use super::hub::Hub;
use super::model::spawn;
use super::process::require_own_process;
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
    to_json(&chat::render(model, &from_json(request)?)?)
}

/// What llama.cpp makes of a conversation: prompt, grammar, triggers, tags, parser. The template is rendered within
/// bounds first.
pub fn format(model: Arc<Model>, hub: &Hub, request: Vec<u8>) -> PyResult<Call> {
    let state = State::new(hub)?;
    let reporter = Arc::clone(&state);
    spawn("llamactor-chat", move || reporter.finish(format_json(&model, &request).map(Value::Bytes)))?;
    Ok(Call::new(state))
}

fn format_json(model: &Model, request: &[u8]) -> Result<Vec<u8>> {
    to_json(&chat::format(model, &from_json(request)?)?)
}

/// Tries a template with llama.cpp's own renderer, which has no bounds: for a process that may be killed.
#[pyfunction]
pub fn try_chat_template(py: Python<'_>, request: Vec<u8>) -> PyResult<Vec<u8>> {
    require_own_process()?;
    Ok(py.detach(move || to_json(&chat::try_template(&from_json(&request)?)?))?)
}

/// Reads an answer with the parser that `format` gave: a message in OpenAI's form.
#[pyfunction]
pub fn parse_chat_answer(py: Python<'_>, request: Vec<u8>) -> PyResult<Vec<u8>> {
    require_own_process()?;
    Ok(py.detach(move || to_json(&chat::parse(&from_json(&request)?)?))?)
}

fn from_json<T: serde::de::DeserializeOwned>(request: &[u8]) -> Result<T> {
    serde_json::from_slice(request).map_err(unreadable)
}

fn to_json(answer: &impl serde::Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec(answer).map_err(unreadable)
}

fn unreadable(error: serde_json::Error) -> Error {
    Error::Value(format!("the messages cannot be passed on as JSON: {error}"))
}

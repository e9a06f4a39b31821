//! What llama.cpp knows of a template: the tags of thoughts, stops, and how calls of tools are written.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Map, Value, json};

use crate::error::Result;
use crate::llama::{ChatFormat, ChatFormats, FormatRequest};

/// Templates that are kept, the last used ones.
const MAX_KEPT: usize = 16;

/// A template with the texts of its special tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// The template's text.
    pub template: Arc<str>,
    /// The beginning of a text.
    pub bos: String,
    /// The end of a text.
    pub eos: String,
}

/// A template, and what it was asked before.
struct Entry {
    source: Source,
    formats: Arc<ChatFormats>,
    asked: VecDeque<(String, Arc<ChatFormat>)>,
}

static KEPT: Mutex<VecDeque<Entry>> = Mutex::new(VecDeque::new());

/// What llama.cpp makes of a conversation. Only for a template that was rendered within bounds: here are none.
///
/// # Errors
/// `ChatTemplate` with llama.cpp's reason.
pub fn apply(source: &Source, request: &FormatRequest) -> Result<ChatFormat> {
    formats_of(source)?.apply(request)
}

/// How an answer looks, whatever was said before: what [`apply`] says of one question.
///
/// # Errors
/// As [`apply`].
pub fn describe(source: &Source, tools: &[Value], kwargs: &Map<String, Value>) -> Result<Arc<ChatFormat>> {
    let question = json!([tools, kwargs]).to_string();
    if let Some(known) = with_entry(source, |entry| find(&entry.asked, &question)).flatten() {
        return Ok(known);
    }
    let format = Arc::new(apply(source, &one_question(tools, kwargs))?);
    with_entry(source, |entry| {
        entry.asked.push_front((question, Arc::clone(&format)));
        entry.asked.truncate(MAX_KEPT);
    });
    Ok(format)
}

/// Whether a template was read before.
#[must_use]
pub fn is_known(source: &Source) -> bool {
    with_entry(source, |_| ()).is_some()
}

fn find(asked: &VecDeque<(String, Arc<ChatFormat>)>, question: &str) -> Option<Arc<ChatFormat>> {
    asked.iter().find(|(known, _)| known == question).map(|(_, format)| Arc::clone(format))
}

/// Does something with what is kept of a template, if it is.
fn with_entry<T>(source: &Source, act: impl FnOnce(&mut Entry) -> T) -> Option<T> {
    let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    let at = kept.iter().position(|entry| entry.source == *source)?;
    let entry = kept.remove(at)?;
    kept.push_front(entry);
    kept.front_mut().map(act)
}

fn formats_of(source: &Source) -> Result<Arc<ChatFormats>> {
    if let Some(formats) = with_entry(source, |entry| Arc::clone(&entry.formats)) {
        return Ok(formats);
    }
    let formats = Arc::new(ChatFormats::new(&source.template, &source.bos, &source.eos)?);
    let entry = Entry { source: source.clone(), formats: Arc::clone(&formats), asked: VecDeque::new() };
    let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    kept.push_front(entry);
    kept.truncate(MAX_KEPT);
    Ok(formats)
}

/// A request of one short question.
#[must_use]
pub fn one_question(tools: &[Value], kwargs: &Map<String, Value>) -> FormatRequest {
    let mut kwargs = kwargs.clone();
    let thinking = kwargs.remove("enable_thinking").and_then(|value| value.as_bool());
    FormatRequest {
        messages: vec![json!({"role": "user", "content": "x"})],
        tools: tools.to_vec(),
        tool_choice: "auto".into(),
        parallel_tool_calls: true,
        add_generation_prompt: true,
        enable_thinking: thinking.unwrap_or(true),
        json_schema: String::new(),
        kwargs,
    }
}

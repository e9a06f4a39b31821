//! What llama.cpp knows of a template: the tags of thoughts, stops, and how calls of tools are written.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Map, Value, json};

use super::parameters;
use crate::error::{Error, Result};
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

/// A template, and what it was asked before; failures are remembered too.
struct Entry {
    source: Source,
    formats: Result<Arc<ChatFormats>, String>,
    asked: VecDeque<(String, Answer)>,
}

/// What llama.cpp says of a template, or why it does not.
type Answer = Result<Arc<ChatFormat>, String>;

static KEPT: Mutex<VecDeque<Entry>> = Mutex::new(VecDeque::new());

/// What llama.cpp makes of a conversation. Only for a template that was rendered within bounds: here are none, but for
/// the parameters of tools.
///
/// # Errors
/// `ChatTemplate` with llama.cpp's reason; `Grammar` for parameters that cannot be read.
pub fn apply(source: &Source, request: &FormatRequest) -> Result<ChatFormat> {
    let request = FormatRequest { tools: parameters::readable(&request.tools)?, ..request.clone() };
    formats_of(source).map_err(Error::ChatTemplate)?.apply(&request)
}

/// How an answer looks, whatever was said before: what [`apply`] says of [`one_question`].
///
/// # Errors
/// As text, what [`apply`] says.
pub fn describe(source: &Source, request: &FormatRequest) -> Answer {
    let question = json!(request).to_string();
    if let Some(known) = with_entry(source, |entry| find(&entry.asked, &question)).flatten() {
        return known;
    }
    let format = apply(source, request).map(Arc::new).map_err(|error| error.to_string());
    with_entry(source, |entry| {
        entry.asked.push_front((question, format.clone()));
        entry.asked.truncate(MAX_KEPT);
    });
    format
}

/// Whether a template was read before.
#[must_use]
pub fn is_known(source: &Source) -> bool {
    with_entry(source, |_| ()).is_some()
}

fn find(asked: &VecDeque<(String, Answer)>, question: &str) -> Option<Answer> {
    asked.iter().find(|(known, _)| known == question).map(|(_, format)| format.clone())
}

/// Does something with what is kept of a template, if it is.
fn with_entry<T>(source: &Source, act: impl FnOnce(&mut Entry) -> T) -> Option<T> {
    let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    let at = kept.iter().position(|entry| entry.source == *source)?;
    let entry = kept.remove(at)?;
    kept.push_front(entry);
    kept.front_mut().map(act)
}

fn formats_of(source: &Source) -> Result<Arc<ChatFormats>, String> {
    if let Some(formats) = with_entry(source, |entry| entry.formats.clone()) {
        return formats;
    }
    let formats = ChatFormats::new(&source.template, &source.bos, &source.eos);
    let formats = formats.map(Arc::new).map_err(|error| error.to_string());
    let entry = Entry { source: source.clone(), formats: formats.clone(), asked: VecDeque::new() };
    let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    kept.push_front(entry);
    kept.truncate(MAX_KEPT);
    formats
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
        reads_reasoning: true,
        kwargs,
    }
}

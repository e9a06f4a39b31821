//! ② Messages become a prompt. A template renders them, bounded in every way; its own text may name control tokens,
//! what users, tools and models said never becomes one.

pub mod calls;
pub mod formats;
mod job;
mod json;
mod methods;
mod parameters;
mod prompt;
mod reasoning;
mod spans;
mod template;
#[cfg(test)]
mod tests;
mod text;
mod turns;

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

pub use calls::CallSpec;
use calls::{CallFormat, Rewriting, ToolChoice, Wanted};
pub use reasoning::ReasoningTags;
pub use turns::Turn;

use crate::error::{Error, Result};
use crate::llama::{self, ChatFormat, FormatRequest, ParseRequest, Token};
use crate::model::Model;
use formats::Source;
use job::Job;
use template::Failure;

/// What to render.
#[derive(Clone, Debug, Deserialize)]
pub struct Request {
    /// A template in place of the model's.
    pub template: Option<String>,
    /// The messages as the template gets them.
    pub messages: Vec<Value>,
    /// For each message the tokens that a model has written of it.
    pub turns: Vec<Option<Turn>>,
    /// Definitions of tools.
    pub tools: Vec<Value>,
    /// What of them may be called; `None` leaves everything to the template.
    #[serde(default)]
    pub tool_choice: Option<ToolChoice>,
    /// Whether several may be called at once.
    #[serde(default)]
    pub parallel_tools: bool,
    /// Further names for the template.
    pub kwargs: Map<String, Value>,
    /// Whether the header of an answer follows.
    pub add_generation_prompt: bool,
    /// Whether the prompt ends with the last message's content.
    pub open_ended: bool,
    /// Who renders.
    #[serde(default)]
    pub renderer: Renderer,
}

/// Who renders a template.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Renderer {
    /// minijinja, within bounds.
    #[default]
    Bounded,
    /// llama.cpp, which has no bounds: for a template that was tried in a process that could be killed.
    LlamaCpp,
}

/// What came of a request.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// A prompt.
    Rendered(Box<Rendered>),
    /// The bounded renderer cannot, for this reason; llama.cpp might.
    Unsupported(String),
}

/// A prompt.
#[derive(Clone, Debug, Serialize)]
pub struct Rendered {
    /// As text.
    pub text: String,
    /// As tokens.
    pub tokens: Vec<Token>,
    /// For each message how many tokens the prompt has up to its end.
    pub ends: Vec<usize>,
    /// What encloses the thoughts of the answer.
    pub reasoning: Option<ReasoningTags>,
    /// What ends the answer besides the model's own tokens.
    pub stops: Vec<String>,
    /// Whether the template treats contents that name control tokens differently: they were hidden from it.
    pub neutralised: bool,
    /// How the answer calls tools, if it may.
    pub calls: Option<CallFormat>,
}

/// Renders messages and tokenises the prompt. Blocks for as long as the template runs.
///
/// # Errors
/// `ChatTemplate` when the template fails, refuses the messages or leaves one out; `Value` for bad tokens; `Grammar` for
/// tools whose parameters no grammar can be made of.
pub fn render(model: &Model, request: &Request) -> Result<Outcome> {
    let Some(choice) = request.tool_choice.filter(|_| has_tools(request)) else { return render_plain(model, request) };
    let job = Job::new(model, request);
    let probe = [probe()];
    let tools = if request.tools.is_empty() { &probe[..] } else { &request.tools };
    let wanted = Wanted { tools, kwargs: &request.kwargs, choice, parallel: request.parallel_tools };
    parameters::readable(tools)?;
    let native = job.call_format(&wanted);
    let outcome = match &native {
        Some(CallFormat { shows_tools: true, .. }) => render_plain(model, request)?,
        Some(_) => render_described(model, request, false)?,
        None => render_described(model, request, true)?,
    };
    let may_call = choice != ToolChoice::None && !request.tools.is_empty();
    let calls = may_call.then(|| native.map_or_else(|| calls::described(&wanted), Ok)).transpose()?;
    Ok(outcome.with_calls(calls))
}

impl Outcome {
    fn with_calls(self, calls: Option<CallFormat>) -> Self {
        match self {
            Self::Rendered(rendered) => Self::Rendered(Box::new(Rendered { calls, ..*rendered })),
            unsupported => unsupported,
        }
    }
}

/// Whether tools are offered, or were called before.
fn has_tools(request: &Request) -> bool {
    let is_call = |message: &Value| message.get("tool_calls").is_some() || message["role"] == "tool";
    !request.tools.is_empty() || request.messages.iter().any(is_call)
}

/// Stands for the tools of before where none is offered now.
fn probe() -> Value {
    json!({"type": "function", "function": {"name": "probe", "description": "", "parameters": {}}})
}

/// Renders for a template that does not show tools, or not even calls of them: they are described in the system
/// message, or where the template refuses one, in the first message of the user.
fn render_described(model: &Model, request: &Request, with_calls: bool) -> Result<Outcome> {
    let render = |in_system| {
        let how = Rewriting { in_system, with_calls };
        let rewritten = calls::rewrite(&request.tools, &request.messages, &request.turns, how);
        let (messages, turns) = (rewritten.messages, rewritten.turns);
        let tools = if with_calls { Vec::new() } else { request.tools.clone() };
        let plain = Request { messages, turns, tools, ..request.clone() };
        render_plain(model, &plain).map(|outcome| outcome.with_places(&rewritten.places))
    };
    render(true).or_else(|error| render(false).map_err(|_| error))
}

impl Outcome {
    /// Tells the ends of other messages: each has the place of one that was rendered.
    fn with_places(self, places: &[usize]) -> Self {
        match self {
            Self::Rendered(rendered) => {
                let ends = places.iter().map(|&place| rendered.ends[place]).collect();
                Self::Rendered(Box::new(Rendered { ends, ..*rendered }))
            }
            unsupported => unsupported,
        }
    }
}

fn render_plain(model: &Model, request: &Request) -> Result<Outcome> {
    let job = Job::new(model, request);
    match job.layout() {
        Ok((layout, neutralised)) => Ok(Outcome::Rendered(Box::new(job.finish(layout, neutralised)?))),
        Err(Failure::Unsupported(error)) => Ok(Outcome::Unsupported(error.to_string())),
        Err(Failure::Final(error)) => Err(error),
    }
}
/// What llama.cpp makes of a conversation, once the template has rendered it within bounds.
///
/// # Errors
/// As [`render`], and `ChatTemplate` where llama.cpp cannot use the template.
pub fn format(model: &Model, request: &FormattingRequest) -> Result<ChatFormat> {
    let job = Job::new(model, &request.chat);
    job.rendered(&request.chat.messages, None, &Arc::default()).map_err(Failure::into_error)?;
    if !job.is_tame() {
        return Err(Error::ChatTemplate("the chat template takes too long for a short question".into()));
    }
    let mut wanted = job.format_request(&request.chat.messages, None);
    wanted.tool_choice.clone_from(&request.tool_choice);
    wanted.parallel_tool_calls = request.parallel_tool_calls;
    wanted.json_schema.clone_from(&request.json_schema);
    formats::apply(&job.source, &wanted)
}

/// What to ask llama.cpp of a conversation.
#[derive(Clone, Debug, Deserialize)]
pub struct FormattingRequest {
    /// The conversation.
    pub chat: Request,
    /// `auto`, `none` or `required`.
    pub tool_choice: String,
    /// Whether several tools may be called at once.
    pub parallel_tool_calls: bool,
    /// A JSON Schema for the answer as text, or nothing.
    pub json_schema: String,
}

/// A template and a conversation, for a trial without a model.
#[derive(Clone, Debug, Deserialize)]
pub struct Trial {
    /// The template.
    pub template: String,
    /// The conversation.
    pub messages: Vec<Value>,
    /// Definitions of tools.
    pub tools: Vec<Value>,
    /// Further names for the template.
    pub kwargs: Map<String, Value>,
}

/// The prompt that llama.cpp's own renderer makes. It has no bounds: only for a process that may be killed.
///
/// # Errors
/// `ChatTemplate` with llama.cpp's reason.
pub fn try_template(trial: &Trial) -> Result<String> {
    let source = Source { template: trial.template.as_str().into(), bos: String::new(), eos: String::new() };
    let messages = trial.messages.clone();
    let request = FormatRequest { messages, ..formats::one_question(&trial.tools, &trial.kwargs) };
    Ok(formats::apply(&source, &request)?.prompt)
}

/// Deepest nesting of brackets in an answer that is parsed: the parser recurses.
const MAX_NESTING: usize = 256;

/// Reads an answer with the parser of its format.
///
/// # Errors
/// `Value` when the answer does not have the format, or nests too deeply.
pub fn parse(request: &ParseRequest) -> Result<Value> {
    let mut depth = 0usize;
    for c in request.text.bytes() {
        match c {
            b'[' | b'{' => depth += 1,
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > MAX_NESTING {
            return Err(Error::Value(format!("the answer nests more than {MAX_NESTING} brackets")));
        }
    }
    llama::parse_answer(request)
}

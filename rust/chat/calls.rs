//! How calls of tools are written and read: as llama.cpp knows it of a template, or in our own way where a template
//! has none.
//!
//! llama.cpp derives a parser and a grammar from what a template makes of trial conversations. Its parser reads whole
//! answers, header included. Here it reads what begins with a *trigger*, the text that opens a call in this format;
//! what precedes is content, or reasoning, which others tell apart. So the grammar that is taken begins with the
//! trigger as well.

mod grammar;
mod own;
mod syntax;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

pub use own::{Rewriting, Rewritten, rewrite};

use super::formats::{self, Source};
use crate::error::{Error, Result};
use crate::llama::{CallSyntax, ChatFormat, FormatRequest};

/// What may be called.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToolChoice {
    /// Whatever the model likes.
    #[default]
    Auto,
    /// Nothing.
    None,
    /// One tool at least.
    Required,
}

impl ToolChoice {
    fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::None => "none",
            Self::Required => "required",
        }
    }
}

/// How calls are written, constrained and read.
#[derive(Clone, Debug, Serialize)]
pub struct CallFormat {
    /// llama.cpp's name of the format, or `hermes` for our own.
    pub name: String,
    /// Whether the template has no format, so that the prompt describes our own.
    pub described: bool,
    /// How an answer is read.
    pub reader: CallSpec,
    /// What an answer must obey: a constraint as `predict` takes it, or nothing.
    pub constraint: Value,
    /// Whether the template says what may be called.
    #[serde(skip)]
    pub shows_tools: bool,
}

/// How calls are found in an answer and read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallSpec {
    /// The parser.
    #[serde(flatten)]
    pub syntax: CallSyntax,
    /// What opens a call.
    pub triggers: Vec<String>,
    /// What stands between messages and is never content.
    pub silent: Vec<String>,
    /// Texts whose control tokens the parser must see.
    pub preserved: Vec<String>,
    /// What ends reasoning where calls may follow it, if that is less than what the template says.
    pub reasoning_end: Option<String>,
    /// Whether calls carry ids.
    pub has_ids: bool,
}

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// Definitions in OpenAI's form.
    pub tools: &'a [Value],
    /// Further names for the template.
    pub kwargs: &'a Map<String, Value>,
    /// What may be called.
    pub choice: ToolChoice,
    /// Whether several may be called at once.
    pub parallel: bool,
}

impl Wanted<'_> {
    fn names(&self) -> impl Iterator<Item = &str> {
        self.tools.iter().filter_map(|tool| tool["function"]["name"].as_str())
    }

    fn request(&self, choice: ToolChoice) -> FormatRequest {
        FormatRequest {
            tool_choice: choice.name().into(),
            parallel_tool_calls: self.parallel,
            reads_reasoning: false,
            ..formats::one_question(self.tools, self.kwargs)
        }
    }
}

/// How calls look in answers of a template, as llama.cpp knows it; `None` where it does not.
#[must_use]
pub fn of_template(source: &Source, wanted: &Wanted<'_>) -> Option<CallFormat> {
    let free = formats::describe(source, &wanted.request(ToolChoice::Auto)).ok()?;
    let reader = syntax::reader(&free)?;
    let constraint = constraint(source, wanted, &free, &reader).ok()?;
    let shows_tools = wanted.names().all(|name| free.prompt.contains(name));
    Some(CallFormat { name: free.format.clone(), described: false, reader, constraint, shows_tools })
}

/// Our own format, for templates that have none.
///
/// # Errors
/// `Grammar` with llama.cpp's reason where it can make no grammar of the tools: the format itself knows any.
pub fn described(wanted: &Wanted<'_>) -> Result<CallFormat> {
    let source = Source { template: own::TEMPLATE.into(), bos: String::new(), eos: String::new() };
    let wanted = Wanted { kwargs: &Map::new(), ..*wanted };
    let found = of_template(&source, &wanted).ok_or_else(|| refusal(&source, &wanted))?;
    Ok(CallFormat { name: "hermes".into(), described: true, ..found })
}

/// Why llama.cpp makes nothing of the tools.
fn refusal(source: &Source, wanted: &Wanted<'_>) -> Error {
    let choices = [ToolChoice::Auto, ToolChoice::Required].into_iter();
    let reason = choices.map(|choice| formats::describe(source, &wanted.request(choice))).find_map(Result::err);
    let reason = reason.unwrap_or_else(|| "their calls cannot be read".into());
    Error::Grammar(format!("no grammar can be made of the tools: {reason}"))
}

/// What the answer must obey: a call, or free text in which calls obey.
fn constraint(
    source: &Source,
    wanted: &Wanted<'_>,
    free: &ChatFormat,
    reader: &CallSpec,
) -> std::result::Result<Value, String> {
    let grammar = |format: &ChatFormat| {
        let text = grammar::of_calls(format, free, wanted.parallel, reader.reasoning_end.is_some())?;
        Some(json!({"kind": "gbnf", "text": text, "root": "root", "preserved": reader.preserved}))
    };
    let required = || formats::describe(source, &wanted.request(ToolChoice::Required)).map(|format| grammar(&format));
    let found = match wanted.choice {
        ToolChoice::None => None,
        ToolChoice::Required => required()?,
        ToolChoice::Auto if free.grammar_lazy => grammar(free).map(|of| lazy(of, json!(free.triggers))),
        // Without a trigger of its own a call is known by its first key.
        ToolChoice::Auto => required()?.map(|of| lazy(of, json!([grammar::first_key()]))),
    };
    Ok(found.unwrap_or_default())
}

fn lazy(of: Value, triggers: Value) -> Value {
    json!({"kind": "lazy", "of": of, "triggers": triggers, "preserved": of["preserved"]})
}

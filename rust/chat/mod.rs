//! ② Messages become a prompt. A template renders them, bounded in every way; its own text may name control tokens,
//! what users, tools and models said never becomes one.

mod json;
mod methods;
mod prompt;
mod reasoning;
mod spans;
mod template;
mod text;
mod turns;

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

pub use reasoning::ReasoningTags;
pub use turns::Turn;

use crate::error::{Error, Result};
use crate::llama::{ControlToken, Token};
use crate::model::Model;
use spans::{Alphabet, Layout};
use turns::{Shader, Shading};

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
    /// Further names for the template.
    pub kwargs: Map<String, Value>,
    /// Whether the header of an answer follows.
    pub add_generation_prompt: bool,
    /// Whether the prompt ends with the last message's content.
    pub open_ended: bool,
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
}

/// Renders messages and tokenises the prompt. Blocks for as long as the template runs.
///
/// # Errors
/// `ChatTemplate` when the template fails, refuses the messages or leaves one out; `Value` for bad tokens.
pub fn render(model: &Model, request: &Request) -> Result<Rendered> {
    let source = source_of(model, request);
    let template: Arc<str> = source.as_deref().unwrap_or(template::FALLBACK).into();
    let job = Job { model, request, template, controls: model.control_tokens() };
    let (mut layout, neutralised) = job.layout()?;
    job.check_complete(&layout)?;
    if request.open_ended {
        job.end_with_content(&mut layout)?;
    }
    let pieces = prompt::cut(&layout.text, &layout.protected, job.controls);
    let kept = turns::kept_turns(model, &layout, &request.turns)?;
    let tokens = prompt::tokenise(model, &layout.text, &pieces, &kept)?;
    let mut ends = prompt::message_ends(&layout, &pieces, |token| model.llama().is_eog(token));
    if request.open_ended
        && let Some(end) = ends.last_mut()
    {
        *end = layout.text.len();
    }
    let answer = layout.text.get(ends.last().copied().unwrap_or(0)..).unwrap_or_default();
    Ok(Rendered {
        reasoning: reasoning::find(&job.template, if request.add_generation_prompt { answer } else { "" }),
        ends: ends.into_iter().map(|end| tokens.count_until(end)).collect(),
        tokens: tokens.ids,
        stops: if source.is_none() { template::FALLBACK_STOPS.map(str::to_owned).into() } else { Vec::new() },
        neutralised,
        text: layout.text,
    })
}

/// The template to use; `None` where there is none at all.
fn source_of(model: &Model, request: &Request) -> Option<String> {
    if request.template.is_some() {
        return request.template.clone();
    }
    let of_tools = || model.metadata().remove("tokenizer.chat_template.tool_use");
    let with_tools = if request.tools.is_empty() { None } else { of_tools() };
    with_tools.or_else(|| model.info().chat_template.clone())
}

/// One call of [`render`].
struct Job<'a> {
    model: &'a Model,
    request: &'a Request,
    template: Arc<str>,
    controls: &'a [ControlToken],
}

impl Job<'_> {
    /// The prompt as the template makes it of the real contents, and what of it is content. Where the template
    /// decides by what contents say, fewer of their characters are shaded; where it decides by the control tokens
    /// that they name, these stay hidden from it, and the answer's second part is true.
    fn layout(&self) -> Result<(Layout, bool)> {
        let real = template::render(&self.template, &self.context(&self.request.messages, None), &Arc::default())?;
        let full = self.shaded(Shading::Full)?;
        if full.text == real {
            return Ok((full, false));
        }
        let mut hidden = self.shaded(Shading::Controls)?;
        hidden.protect_messages();
        let neutralised = hidden.text != real;
        Ok((hidden, neutralised))
    }

    fn shaded(&self, shading: Shading) -> Result<Layout> {
        let request = self.request;
        let others =
            [Value::from(request.messages.clone()), request.tools.clone().into(), request.kwargs.clone().into()];
        let others = others.map(|value| value.to_string());
        let texts = others.iter().map(String::as_str).chain([&*self.template]);
        let alphabet = Arc::new(Alphabet::avoiding(texts));
        let shader = Shader { alphabet: &alphabet, controls: self.controls, shading };
        let messages = request.messages.iter().enumerate();
        let messages: Vec<_> = messages.map(|(index, message)| shader.message(message, index)).collect();
        let text = template::render(&self.template, &self.context(&messages, Some(&shader)), &alphabet)?;
        if alphabet.is_exhausted() {
            return Err(Error::ChatTemplate(
                "the messages have more different characters than can be told apart".into(),
            ));
        }
        Ok(alphabet.read(&text, messages.len()))
    }

    /// The names that Hugging Face gives a template, and the caller's own.
    fn context(&self, messages: &[Value], shader: Option<&Shader<'_>>) -> Value {
        let tools = Value::from(self.request.tools.clone());
        let tools = match shader {
            _ if self.request.tools.is_empty() => Value::Null,
            Some(shader) => shader.hidden(&tools),
            None => tools,
        };
        let mut names = self.special_tokens();
        names.insert("messages".into(), messages.into());
        names.insert("tools".into(), tools);
        names.insert("documents".into(), Value::Null);
        names.insert("add_generation_prompt".into(), json!(self.request.add_generation_prompt));
        names.extend(self.request.kwargs.clone());
        names.into()
    }

    fn special_tokens(&self) -> Map<String, Value> {
        let llama = self.model.llama();
        let tokens = llama.special_tokens();
        let named = [
            ("bos_token", tokens.bos),
            ("eos_token", tokens.eos),
            ("pad_token", tokens.pad),
            ("sep_token", tokens.sep),
            ("mask_token", tokens.mask),
        ];
        let text = |token| {
            let mut piece = Vec::new();
            llama.token_to_piece(token, true, &mut piece).ok()?;
            String::from_utf8(piece).ok()
        };
        named.into_iter().filter_map(|(name, token)| Some((name.to_owned(), json!(text(token?)?)))).collect()
    }

    /// Every message that says something must show.
    fn check_complete(&self, layout: &Layout) -> Result<()> {
        for (index, message) in self.request.messages.iter().enumerate() {
            if says_something(message) && layout.contents[index].is_none() && !shows_a_call(message, &layout.text) {
                let role = message.get("role").and_then(Value::as_str).unwrap_or("?");
                return Err(Error::ChatTemplate(format!(
                    "the chat template leaves out message {index} (role {role:?}); leave it away, or say it in a \
                     message that the template shows"
                )));
            }
        }
        Ok(())
    }

    /// Cuts the prompt behind the last content, as it was given.
    fn end_with_content(&self, layout: &mut Layout) -> Result<()> {
        let Some(message) = self.request.messages.last() else { return Ok(()) };
        let content = message.get("content").and_then(Value::as_str).unwrap_or_default();
        let tail = &content[content.trim_end_matches(spans::is_space).len()..];
        let Some(range) = layout.contents.last().cloned().flatten() else {
            return self.end_before_content(layout, tail);
        };
        layout.truncate(range.end);
        layout.text.push_str(tail);
        Ok(())
    }

    /// The same for a content without a visible character: another one shows where it would stand.
    fn end_before_content(&self, layout: &mut Layout, tail: &str) -> Result<()> {
        let mut request = self.request.clone();
        if let Some(Value::Object(fields)) = request.messages.last_mut() {
            fields.insert("content".into(), json!("x"));
        }
        let (probe, _) = Job { request: &request, template: Arc::clone(&self.template), ..*self }.layout()?;
        let Some(range) = probe.contents.last().cloned().flatten() else {
            return Err(Error::ChatTemplate("the chat template leaves out the last message".into()));
        };
        *layout = probe;
        layout.truncate(range.start);
        layout.text.push_str(tail);
        Ok(())
    }
}

/// Whether the content of a message has a visible character.
fn says_something(message: &Value) -> bool {
    let visible = |value: &Value| value.as_str().is_some_and(|text| !text.trim_matches(spans::is_space).is_empty());
    match message.get("content") {
        Some(Value::Array(parts)) => parts.iter().filter_map(|part| part.get("text")).any(visible),
        Some(content) => visible(content),
        None => false,
    }
}

/// Templates may show the calls of a message in place of its content.
fn shows_a_call(message: &Value, text: &str) -> bool {
    let calls = message.get("tool_calls").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    calls.iter().any(|call| {
        let name = call.get("function").unwrap_or(call).get("name").and_then(Value::as_str);
        name.is_some_and(|name| text.contains(name))
    })
}

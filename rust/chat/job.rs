//! One request: rendered twice, aligned, tokenised.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::calls::{self, CallFormat, Wanted};
use super::formats::{self, Source};
use super::reasoning::{self, ReasoningTags};
use super::spans::{self, Alphabet, Layout};
use super::template::{self, Failure};
use super::turns::{self, Shader, Shading};
use super::{Rendered, Renderer, Request, prompt};
use crate::error::{Error, Result};
use crate::llama::{FormatRequest, Token};
use crate::model::Model;

/// One call of [`render`].
pub struct Job<'a> {
    model: &'a Model,
    request: &'a Request,
    /// The template in use.
    pub source: Source,
    is_fallback: bool,
    controls: &'a [String],
}

impl<'a> Job<'a> {
    /// Takes the template and the vocabulary that a request needs.
    #[must_use]
    pub fn new(model: &'a Model, request: &'a Request) -> Self {
        let template = source_of(model, request);
        let tokens = model.llama().special_tokens();
        let source = Source {
            template: template.as_deref().unwrap_or(template::FALLBACK).into(),
            bos: text_of(model, tokens.bos).unwrap_or_default(),
            eos: text_of(model, tokens.eos).unwrap_or_default(),
        };
        Self { model, request, source, is_fallback: template.is_none(), controls: model.guarded_texts() }
    }

    /// From the text to tokens and to what is known of the answer.
    ///
    /// # Errors
    /// `ChatTemplate` when a message does not show; `Value` for bad tokens.
    pub fn finish(&self, mut layout: Layout, neutralised: bool) -> Result<Rendered> {
        let (model, request) = (self.model, self.request);
        self.check_complete(&layout)?;
        if request.open_ended {
            self.end_with_content(&mut layout)?;
        }
        let pieces = model.llama().partition(layout.text.as_bytes(), true, &layout.protected)?;
        let kept = turns::kept_turns(model, &layout, &request.turns)?;
        let tokens = prompt::tokenise(model, &layout, &pieces, &kept)?;
        let mut ends = prompt::message_ends(&layout, &pieces, |token| model.llama().is_eog(token));
        if request.open_ended
            && let Some(end) = ends.last_mut()
        {
            *end = layout.text.len();
        }
        let header = layout.text.get(ends.last().copied().unwrap_or(0)..).unwrap_or_default();
        let (reasoning, stops) = self.answer(if request.add_generation_prompt { header } else { "" });
        let ends = ends.into_iter().map(|end| tokens.count_until(end)).collect();
        Ok(Rendered { text: layout.text, tokens: tokens.ids, ends, reasoning, stops, neutralised, calls: None })
    }

    /// What is known of an answer that follows a header: the tags of its thoughts, and what ends it.
    fn answer(&self, header: &str) -> (Option<ReasoningTags>, Vec<String>) {
        if self.is_fallback {
            return (None, template::FALLBACK_STOPS.map(str::to_owned).into());
        }
        let question = formats::one_question(&self.request.tools, &self.request.kwargs);
        let describe = || formats::describe(&self.source, &question).ok();
        let format = self.is_tame().then(describe).flatten();
        let tags = reasoning::find(self.model, &self.source.template, format.as_deref(), header);
        (tags, format.map(|format| format.stops.clone()).unwrap_or_default())
    }

    /// How the template's answers call tools; `None` where it knows none.
    #[must_use]
    pub fn call_format(&self, wanted: &Wanted<'_>) -> Option<CallFormat> {
        let is_known = !self.is_fallback && self.is_tame();
        is_known.then(|| calls::of_template(&self.source, wanted)).flatten()
    }

    /// Whether llama.cpp, which has no bounds, may read the template: it renders a question with little fuel.
    #[must_use]
    pub fn is_tame(&self) -> bool {
        if self.request.renderer == Renderer::LlamaCpp || formats::is_known(&self.source) {
            return true;
        }
        let question = self.context(&formats::one_question(&[], &Map::new()).messages, None);
        template::render(&self.source.template, &question, &Arc::default(), template::TRIAL_FUEL).is_ok()
    }

    /// The prompt as the template makes it of the real contents, and what of it is content. Where the template
    /// decides by what contents say, fewer of their characters are shaded; where it decides by the control tokens
    /// that they name, these stay hidden from it, and the answer's second part is true.
    ///
    /// # Errors
    /// Why the template gives no text.
    pub fn layout(&self) -> Result<(Layout, bool), Failure> {
        let real = self.rendered(&self.request.messages, None, &Arc::default())?;
        let (full, is_real) = self.shaded(Shading::Full, &real)?;
        if is_real {
            return Ok((full, false));
        }
        let (mut hidden, is_real) = self.shaded(Shading::Controls, &real)?;
        hidden.protect_messages();
        Ok((hidden, !is_real))
    }

    /// What the template makes of messages, shaded or not.
    ///
    /// # Errors
    /// Why the template gives no text.
    pub fn rendered(
        &self,
        messages: &[Value],
        shader: Option<&Shader<'_>>,
        alphabet: &Arc<Alphabet>,
    ) -> Result<String, Failure> {
        match self.request.renderer {
            Renderer::Bounded => {
                template::render(&self.source.template, &self.context(messages, shader), alphabet, template::FUEL)
            }
            Renderer::LlamaCpp => self.rendered_by_llama_cpp(messages, shader).map_err(Failure::Final),
        }
    }

    fn rendered_by_llama_cpp(&self, messages: &[Value], shader: Option<&Shader<'_>>) -> Result<String> {
        Ok(formats::apply(&self.source, &self.format_request(messages, shader))?.prompt)
    }

    /// The conversation as llama.cpp takes it.
    #[must_use]
    pub fn format_request(&self, messages: &[Value], shader: Option<&Shader<'_>>) -> FormatRequest {
        FormatRequest {
            messages: messages.to_vec(),
            tools: self.tools(shader),
            add_generation_prompt: self.request.add_generation_prompt,
            ..formats::one_question(&[], &self.request.kwargs)
        }
    }

    fn tools(&self, shader: Option<&Shader<'_>>) -> Vec<Value> {
        let tools = self.request.tools.iter();
        tools.map(|tool| shader.map_or_else(|| tool.clone(), |shader| shader.hidden(tool))).collect()
    }

    /// A rendering with shaded contents, and whether it is the real one in all else.
    fn shaded(&self, shading: Shading, real: &str) -> Result<(Layout, bool), Failure> {
        let request = self.request;
        let others =
            [Value::from(request.messages.clone()), request.tools.clone().into(), request.kwargs.clone().into()];
        let others = others.map(|value| value.to_string());
        let texts = others.iter().map(String::as_str).chain([&*self.source.template]);
        let alphabet = Arc::new(Alphabet::avoiding(texts));
        let shader = Shader { alphabet: &alphabet, controls: self.controls, shading };
        let messages = request.messages.iter().enumerate();
        let messages: Vec<_> = messages.map(|(index, message)| shader.message(message, index)).collect();
        let text = self.rendered(&messages, Some(&shader), &alphabet)?;
        if alphabet.is_exhausted() {
            let reason = "the messages have more different characters than can be told apart";
            return Err(Failure::Final(Error::ChatTemplate(reason.into())));
        }
        let layout = alphabet.read(&text, messages.len());
        if layout.text == real {
            return Ok((layout, true));
        }
        let aligned = alphabet.align(&text, real, messages.len());
        let is_real = aligned.is_some();
        Ok((aligned.unwrap_or(layout), is_real))
    }

    /// The names that Hugging Face gives a template, and the caller's own.
    fn context(&self, messages: &[Value], shader: Option<&Shader<'_>>) -> Value {
        let tools = self.tools(shader);
        let tools = if tools.is_empty() { Value::Null } else { tools.into() };
        let mut names = self.special_tokens();
        names.insert("messages".into(), messages.into());
        names.insert("tools".into(), tools);
        names.insert("documents".into(), Value::Null);
        names.insert("add_generation_prompt".into(), json!(self.request.add_generation_prompt));
        names.extend(self.request.kwargs.clone());
        names.into()
    }

    fn special_tokens(&self) -> Map<String, Value> {
        let tokens = self.model.llama().special_tokens();
        let named = [
            ("bos_token", tokens.bos),
            ("eos_token", tokens.eos),
            ("pad_token", tokens.pad),
            ("sep_token", tokens.sep),
            ("mask_token", tokens.mask),
        ];
        let text = |(name, token): (&str, _)| Some((name.to_owned(), json!(text_of(self.model, token)?)));
        named.into_iter().filter_map(text).collect()
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
        let probe = Job { request: &request, source: self.source.clone(), ..*self };
        let (probe, _) = probe.layout().map_err(Failure::into_error)?;
        let Some(range) = probe.contents.last().cloned().flatten() else {
            return Err(Error::ChatTemplate("the chat template leaves out the last message".into()));
        };
        *layout = probe;
        layout.truncate(range.start);
        layout.text.push_str(tail);
        Ok(())
    }
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

/// The text of a special token.
fn text_of(model: &Model, token: Option<Token>) -> Option<String> {
    let mut piece = Vec::new();
    model.llama().token_to_piece(token?, true, &mut piece).ok()?;
    String::from_utf8(piece).ok()
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

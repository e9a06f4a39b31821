//! Messages as a template gets them, shaded or not, and what a model has written before.

use std::ops::Range;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::prompt::Kept;
use super::spans::{Alphabet, Layout, Owner, is_space};
use crate::error::Result;
use crate::llama::Token;
use crate::model::Model;

/// Fields whose text is the model's thoughts.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// How much of the contents is shaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shading {
    /// Every character.
    Full,
    /// The control tokens that they name, and both ends.
    Controls,
}

/// Shades messages, tools and the like.
pub struct Shader<'a> {
    /// What stands for what.
    pub alphabet: &'a Alphabet,
    /// What must not be named.
    pub controls: &'a [String],
    /// How much.
    pub shading: Shading,
}

impl Shader<'_> {
    /// A shaded copy of a message.
    #[must_use]
    pub fn message(&self, message: &Value, index: usize) -> Value {
        let owner = Owner { message: index, is_content: false };
        let Value::Object(fields) = message else { return self.hidden(message) };
        let shaded = fields.iter().map(|(key, value)| {
            let value = match key.as_str() {
                "content" => self.content(value, Owner { is_content: true, ..owner }),
                key if REASONING.contains(&key) => self.all(value, owner),
                "tool_calls" => self.calls(value, owner),
                _ => self.hidden(value),
            };
            (self.key(key), value)
        });
        Value::Object(shaded.collect())
    }

    /// A copy in which no string names a control token.
    #[must_use]
    pub fn hidden(&self, value: &Value) -> Value {
        self.map(value, &|text| self.alphabet.hide_controls(text, self.controls))
    }

    fn key(&self, key: &str) -> String {
        self.alphabet.hide_controls(key, self.controls)
    }

    fn shade(&self, text: &str, owner: Owner) -> String {
        match self.shading {
            Shading::Full => self.alphabet.shade(text, owner),
            Shading::Controls => self.alphabet.shade_controls(text, owner, self.controls),
        }
    }

    fn all(&self, value: &Value, owner: Owner) -> Value {
        self.map(value, &|text| self.shade(text, owner))
    }

    /// A text, or a list of parts that have one.
    fn content(&self, value: &Value, owner: Owner) -> Value {
        match value {
            Value::Array(parts) => parts.iter().map(|part| self.fields(part, "text", owner)).collect(),
            Value::String(text) => Value::String(self.shade(text, owner)),
            _ => self.all(value, owner),
        }
    }

    /// Shades one field and hides in the others; below `function`, its `arguments`.
    fn fields(&self, value: &Value, name: &str, owner: Owner) -> Value {
        let Value::Object(fields) = value else { return self.hidden(value) };
        let shaded = fields.iter().map(|(key, value)| {
            let value = match key.as_str() {
                key if key == name => self.all(value, owner),
                "function" => self.fields(value, name, owner),
                _ => self.hidden(value),
            };
            (self.key(key), value)
        });
        Value::Object(shaded.collect())
    }

    fn calls(&self, value: &Value, owner: Owner) -> Value {
        match value {
            Value::Array(calls) => calls.iter().map(|call| self.fields(call, "arguments", owner)).collect(),
            _ => self.hidden(value),
        }
    }

    fn map(&self, value: &Value, change: &dyn Fn(&str) -> String) -> Value {
        match value {
            Value::String(text) => Value::String(change(text)),
            Value::Array(items) => items.iter().map(|item| self.map(item, change)).collect(),
            Value::Object(fields) => {
                let fields = fields.iter().map(|(key, value)| (self.key(key), self.map(value, change)));
                Value::Object(fields.collect::<Map<_, _>>())
            }
            _ => value.clone(),
        }
    }
}

/// The tokens of an assistant's turn, from behind its header to before the token that ended it.
#[derive(Clone, Debug, Deserialize)]
pub struct Turn {
    /// The ids.
    pub tokens: Vec<Token>,
    /// Where among them the content begins, behind the reasoning.
    pub content_start: usize,
}

/// Finds the turns whose text the prompt shows unchanged or only trimmed: there their tokens are kept.
///
/// # Errors
/// `Value` for a token outside the vocabulary.
pub fn kept_turns(model: &Model, layout: &Layout, turns: &[Option<Turn>]) -> Result<Vec<Kept>> {
    let mut kept = Vec::new();
    for (index, turn) in turns.iter().enumerate() {
        if let Some(turn) = turn
            && let Some(found) = kept_turn(model, layout, index, turn)?
        {
            kept.push(found);
        }
    }
    Ok(kept)
}

fn kept_turn(model: &Model, layout: &Layout, index: usize, turn: &Turn) -> Result<Option<Kept>> {
    let window = window_of(layout, index);
    let whole = pieces_of(model, &turn.tokens)?;
    if let Some(range) = find_turn(layout, index, &window, &whole) {
        return Ok(Some(Kept { range, tokens: turn.tokens.clone() }));
    }
    let content = turn.tokens.get(turn.content_start..).unwrap_or_default();
    let text = pieces_of(model, content)?;
    let range = find_content(layout, index, &window, &text);
    Ok(range.map(|range| Kept { range, tokens: content.to_vec() }))
}

/// The text of tokens, control tokens written out; empty where it is not UTF-8.
fn pieces_of(model: &Model, tokens: &[Token]) -> Result<String> {
    let mut text = Vec::new();
    for &token in tokens {
        model.llama().token_to_piece(token, true, &mut text)?;
    }
    Ok(String::from_utf8(text).unwrap_or_default())
}

/// What lies between the neighbours of a message.
fn window_of(layout: &Layout, index: usize) -> Range<usize> {
    let before = layout.messages[..index].iter().flatten().last().map_or(0, |range| range.end);
    let after = layout.messages[index + 1..].iter().flatten().next().map_or(layout.text.len(), |range| range.start);
    before..after.max(before)
}

/// Where a whole turn stands: it must cover all that the template shows of the message.
fn find_turn(layout: &Layout, index: usize, window: &Range<usize>, text: &str) -> Option<Range<usize>> {
    let own = layout.messages[index].clone()?;
    let core = text.trim_matches(is_space);
    if core.is_empty() || own.start < window.start || own.end > window.end {
        return None;
    }
    let found = layout.text[window.clone()].match_indices(core).find_map(|(at, _)| {
        let start = window.start + at;
        (start <= own.start && start + core.len() >= own.end).then_some(start..start + core.len())
    })?;
    Some(with_space(&layout.text, window, found, text))
}

/// Where the content stands, if it is the text of the tokens.
fn find_content(layout: &Layout, index: usize, window: &Range<usize>, text: &str) -> Option<Range<usize>> {
    let own = layout.contents[index].clone()?;
    let same = !text.is_empty() && layout.text[own.clone()] == *text.trim_matches(is_space);
    same.then(|| with_space(&layout.text, window, own, text))
}

/// Widens a range by the white space round `text` where the prompt has the same.
fn with_space(prompt: &str, window: &Range<usize>, range: Range<usize>, text: &str) -> Range<usize> {
    let core = text.trim_matches(is_space);
    let lead = &text[..text.len() - text.trim_start_matches(is_space).len()];
    let trail = &text[lead.len() + core.len()..];
    let start = if prompt[window.start..range.start].ends_with(lead) { range.start - lead.len() } else { range.start };
    let end = if prompt[range.end..window.end].starts_with(trail) { range.end + trail.len() } else { range.end };
    start..end
}

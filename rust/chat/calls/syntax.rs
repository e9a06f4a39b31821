//! llama.cpp's parsers of answers, made to read calls alone, and more forgiving of white space.

use std::collections::BTreeSet;

use serde_json::Value;

use super::CallSpec;
use crate::llama::{CallSyntax, ChatFormat};

/// How Harmony's thoughts begin and end; a call may follow them as well as the answer.
const HARMONY: (&str, &str) = ("<|channel|>analysis<|message|>", "<|end|>");

/// What opens a call in Harmony, and what encloses its other messages.
const HARMONY_CALLS: [&str; 3] =
    ["<|channel|>commentary to=functions.", "<|channel|>analysis to=functions.", " to=functions."];
const HARMONY_HEADERS: [&str; 4] =
    ["<|start|>assistant", "<|channel|>final<|message|>", "<|channel|>commentary<|message|>", "<|end|>"];

/// How the calls of a format are found and read; `None` where it has none.
pub fn reader(format: &ChatFormat) -> Option<CallSpec> {
    let mut parser = Parser::new(&format.parser)?;
    if !parser.has_tag("tool-name") {
        return None;
    }
    parser.forgive_spaces();
    let is_harmony = format.thinking_start_tag == HARMONY.0;
    let triggers = if is_harmony { HARMONY_CALLS.map(str::to_owned).into() } else { parser.triggers(format)? };
    let silent = if is_harmony { HARMONY_HEADERS.map(str::to_owned).into() } else { Vec::new() };
    let mut preserved: BTreeSet<String> = format.preserved_tokens.iter().cloned().collect();
    preserved.extend(parser.literals());
    Some(CallSpec {
        has_ids: parser.has_tag("tool-id"),
        syntax: CallSyntax { format_id: format.format_id, parser: parser.0.to_string(), prefix: prefix(format) },
        triggers,
        silent,
        preserved: preserved.into_iter().collect(),
        reasoning_end: is_harmony.then(|| HARMONY.1.into()),
    })
}

/// The header that the parser expects: that of the answer, up to thoughts that it opens.
fn prefix(format: &ChatFormat) -> String {
    let header = format.generation_prompt.as_str();
    let start = format.thinking_start_tag.as_str();
    let end = if start.is_empty() { None } else { header.find(start) };
    header[..end.unwrap_or(header.len())].into()
}

/// llama.cpp's parser as its JSON: a list of parsers that name each other by their places.
struct Parser(Value);

impl Parser {
    fn new(text: &str) -> Option<Self> {
        let parser: Value = serde_json::from_str(text).ok()?;
        parser.get("parsers")?.as_array()?;
        Some(Self(parser))
    }

    fn all(&self) -> &[Value] {
        self.0["parsers"].as_array().map_or(&[], Vec::as_slice)
    }

    fn has_tag(&self, tag: &str) -> bool {
        self.all().iter().any(|parser| parser["tag"] == tag)
    }

    fn child(&self, id: &Value) -> &Value {
        id.as_u64().and_then(|id| self.all().get(usize::try_from(id).ok()?)).unwrap_or(&Value::Null)
    }

    fn literals(&self) -> impl Iterator<Item = String> {
        self.all().iter().filter_map(|parser| parser["literal"].as_str()).map(str::to_owned)
    }

    /// The parsers that follow each other in sequences.
    fn neighbours(&self) -> impl Iterator<Item = (&Value, &Value)> {
        let sequences = self.all().iter().filter_map(|parser| match parser["type"].as_str() {
            Some("sequence") => parser["children"].as_array(),
            _ => None,
        });
        sequences.flat_map(|children| children.windows(2)).map(|pair| (&pair[0], &pair[1]))
    }

    /// Drops white space from literals where the parser allows any beside them: templates write a line break after
    /// `<tool_call>`, models need not.
    fn forgive_spaces(&mut self) {
        let is_space = |id: &Value| self.child(id)["type"] == "space";
        let (mut before, mut after) = (BTreeSet::new(), BTreeSet::new());
        for (left, right) in self.neighbours() {
            if is_space(left) {
                before.extend(right.as_u64());
            }
            if is_space(right) {
                after.extend(left.as_u64());
            }
        }
        let mut changed = Vec::new();
        for (id, parser) in (0..).zip(self.all()) {
            let Some(text) = parser["literal"].as_str() else { continue };
            let shorter = if before.contains(&id) { text.trim_start() } else { text };
            let shorter = if after.contains(&id) { shorter.trim_end() } else { shorter };
            if shorter != text && !shorter.is_empty() {
                changed.push((id, text.to_owned(), shorter.to_owned()));
            }
        }
        self.replace(&changed);
    }

    /// Replaces literals, and what content ends at where that is one of them.
    fn replace(&mut self, changed: &[(u64, String, String)]) {
        let Some(parsers) = self.0["parsers"].as_array_mut() else { return };
        for (id, parser) in (0..).zip(parsers) {
            if let Some((.., shorter)) = changed.iter().find(|(place, ..)| *place == id) {
                parser["literal"] = shorter.as_str().into();
            }
            let Some(ends) = parser.get_mut("delimiters").and_then(Value::as_array_mut) else { continue };
            for end in ends {
                if let Some((_, _, shorter)) = changed.iter().find(|(_, text, _)| end == text) {
                    *end = shorter.as_str().into();
                }
            }
        }
    }

    /// What opens a call: what content ends at, and the words that start the grammar.
    fn triggers(&self, format: &ChatFormat) -> Option<Vec<String>> {
        let mut found: BTreeSet<String> = self.content_ends().collect();
        if format.triggers.iter().any(|trigger| trigger.kind.starts_with("pattern")) {
            return None;
        }
        for trigger in &format.triggers {
            // White space at its end was forgiven.
            found.insert(trigger.value.trim_end().into());
        }
        let longer: Vec<String> = found.iter().filter(|text| is_shortened(text, &found)).cloned().collect();
        found.retain(|text| !text.is_empty() && !longer.contains(text));
        (!found.is_empty()).then(|| found.into_iter().collect())
    }

    /// Where content ends, save at its own closing tag.
    fn content_ends(&self) -> impl Iterator<Item = String> {
        let own: BTreeSet<&str> = self.neighbours().filter_map(|(left, right)| self.closing(left, right)).collect();
        let contents = self.all().iter().filter(|parser| parser["tag"] == "content");
        let ends = contents.filter_map(|parser| self.child(&parser["child"])["delimiters"].as_array());
        let ends: BTreeSet<String> = ends.flatten().filter_map(Value::as_str).map(str::to_owned).collect();
        ends.into_iter().filter(move |end| !own.contains(end.as_str())).collect::<Vec<_>>().into_iter()
    }

    /// The literal that follows a content.
    fn closing(&self, left: &Value, right: &Value) -> Option<&str> {
        let is_content = self.child(left)["tag"] == "content";
        if is_content { self.child(right)["literal"].as_str() } else { None }
    }
}

/// Whether another text is this one without its end.
fn is_shortened(text: &str, others: &BTreeSet<String>) -> bool {
    others.iter().any(|other| !other.is_empty() && other.len() < text.len() && text.starts_with(other.as_str()))
}

//! What encloses the thoughts of an answer.

use serde::Serialize;

use crate::llama::ChatFormat;
use crate::model::Model;

/// The tags round the thoughts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ReasoningTags {
    /// What opens them.
    pub start: String,
    /// What ends them.
    pub end: String,
    /// Whether the prompt has opened them already.
    pub opened: bool,
}

impl ReasoningTags {
    /// Whether the header of an answer opens the thoughts shows in itself.
    fn new(start: &str, end: &str, header: &str) -> Self {
        let opened = header.rfind(start) > header.rfind(end);
        Self { start: start.into(), end: end.into(), opened }
    }
}

/// Harmony's thoughts are a message of their own, and the answer is the next: its header belongs to the end.
const HARMONY: (&str, &str) =
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>");

/// Pairs that templates of reasoning models name.
const PAIRS: [(&str, &str); 6] = [
    ("<think>", "</think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<thinking>", "</thinking>"),
    HARMONY,
];

/// The tags of a template's answers: what llama.cpp knows of its format, or else a pair whose start the template
/// names, or whose tags are tokens of the vocabulary.
#[must_use]
pub fn find(model: &Model, template: &str, format: Option<&ChatFormat>, header: &str) -> Option<ReasoningTags> {
    let (start, end) = format.and_then(of_format).or_else(|| of_template(template)).or_else(|| of_vocabulary(model))?;
    Some(ReasoningTags::new(start, end, header))
}

fn of_format(format: &ChatFormat) -> Option<(&str, &str)> {
    let (start, end) = (format.thinking_start_tag.as_str(), format.thinking_end_tags.first()?.as_str());
    let is_known = format.supports_thinking && !start.is_empty() && !end.is_empty();
    is_known.then_some(if start == HARMONY.0 { HARMONY } else { (start, end) })
}

fn of_template(template: &str) -> Option<(&'static str, &'static str)> {
    PAIRS.into_iter().find(|(start, _)| template.contains(start))
}

fn of_vocabulary(model: &Model) -> Option<(&'static str, &'static str)> {
    PAIRS.into_iter().find(|(start, end)| is_token(model, start) && is_token(model, end))
}

fn is_token(model: &Model, tag: &str) -> bool {
    let tokens = model.llama().tokenize(tag, false, true).unwrap_or_default();
    matches!(tokens.as_slice(), [token] if model.llama().is_whole(*token))
}

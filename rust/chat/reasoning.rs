//! What encloses the thoughts of an answer.

use serde::Serialize;

use crate::llama::ChatFormat;

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

/// The tags that llama.cpp knows of a format, and whether the header of the answer opens them.
#[must_use]
pub fn of_format(format: &ChatFormat, header: &str) -> Option<ReasoningTags> {
    let end = format.thinking_end_tags.first()?;
    let (start, end) = (format.thinking_start_tag.as_str(), end.as_str());
    (format.supports_thinking && !end.is_empty()).then(|| tags(start, end, header))
}

fn tags(start: &str, end: &str, header: &str) -> ReasoningTags {
    let opened = header.rfind(start) > header.rfind(end);
    ReasoningTags { start: start.into(), end: end.into(), opened }
}

/// Pairs that templates of reasoning models name.
const PAIRS: [(&str, &str); 6] = [
    ("<think>", "</think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<thinking>", "</thinking>"),
    ("<|channel|>analysis<|message|>", "<|end|>"),
];

/// The tags that a template names, and whether the header of the answer opens them.
#[must_use]
pub fn find(template: &str, header: &str) -> Option<ReasoningTags> {
    let named = |(start, end): &&(&str, &str)| template.contains(end) && template.contains(start);
    let (start, end) = *PAIRS.iter().find(named)?;
    Some(tags(start, end, header))
}

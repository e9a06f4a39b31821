//! What a request says of calls and reasoning, as the stream of text that tells them apart.

use std::collections::HashSet;

use super::Reasoning;
use super::generation::{Calling, Text};
use super::text::calls::{CallOptions, Calls};
use super::text::segments::{SegmentOptions, Segments};
use super::text::{TextOptions, TextStream};
use crate::chat::CallSpec;
use crate::error::Result;
use crate::llama::{CallReader, Token};
use crate::model::Model;

/// How reasoning is told from content, where it may be followed by calls or not.
///
/// # Errors
/// `Value` for tags that are none; what the tokeniser fails with.
pub fn segments_of(
    model: &Model,
    reasoning: Option<Reasoning>,
    calls: Option<&CallSpec>,
) -> Result<Option<SegmentOptions>> {
    let Some(reasoning) = reasoning else { return Ok(None) };
    let end = calls.and_then(|spec| spec.reasoning_end.clone()).unwrap_or_else(|| reasoning.end.clone());
    Reasoning { end, ..reasoning }.resolve(model).map(Some)
}

/// The stream for one answer.
///
/// # Errors
/// `Value` for a parser that is none; what the tokeniser fails with.
pub fn text_of(
    model: &Model,
    segments: Option<SegmentOptions>,
    calls: Option<CallSpec>,
    text: TextOptions,
) -> Result<Text> {
    let Some(spec) = calls else {
        return Ok(match segments {
            None => Text::Plain(TextStream::new(text)),
            Some(segments) => Text::Segmented(Box::new(Segments::new(segments, text))),
        });
    };
    let preserved = preserved_tokens(model, &spec.preserved)?;
    let calls = Calls::new(options(spec)?, Segments::new(segments.unwrap_or_default(), text));
    Ok(Text::Calling(Box::new(Calling { calls, preserved })))
}

/// How calls are read.
///
/// # Errors
/// `Value` for a parser that is none.
pub fn options(spec: CallSpec) -> Result<CallOptions> {
    let reader = CallReader::new(&spec.syntax)?;
    Ok(CallOptions { reader, triggers: spec.triggers, silent: spec.silent, has_ids: spec.has_ids })
}

/// The control tokens that some texts name.
fn preserved_tokens(model: &Model, texts: &[String]) -> Result<HashSet<Token>> {
    let mut found = HashSet::new();
    for text in texts {
        let tokens = model.llama().tokenize(text, false, true)?;
        found.extend(tokens.into_iter().filter(|&token| model.llama().is_whole(token)));
    }
    Ok(found)
}

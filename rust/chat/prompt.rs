//! From the text of a prompt to its tokens: control tokens where the template names them, and nowhere else.

use std::ops::Range;

use super::spans::{Layout, is_space};
use crate::error::Result;
use crate::llama::{ControlToken, Token};
use crate::model::Model;

/// A stretch of the text that is one control token, or is tokenised as a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where it lies in the text; white space that a control token takes belongs to no piece.
    pub range: Range<usize>,
    /// The control token.
    pub control: Option<Token>,
}

/// Cuts a text at the control tokens outside of the protected ranges, as llama.cpp does: the longest first.
#[must_use]
pub fn cut(text: &str, protected: &[Range<usize>], controls: &[ControlToken]) -> Vec<Piece> {
    let open = complement(protected, text.len());
    let mut pieces = Vec::new();
    if !text.is_empty() {
        pieces.push(Piece { range: 0..text.len(), control: None });
    }
    for control in controls {
        if open.iter().any(|range| text[range.clone()].contains(&control.text)) {
            pieces = pieces.into_iter().flat_map(|piece| cut_piece(text, piece, &open, control)).collect();
        }
    }
    pieces
}

fn complement(protected: &[Range<usize>], end: usize) -> Vec<Range<usize>> {
    let starts = std::iter::once(0).chain(protected.iter().map(|range| range.end));
    let ends = protected.iter().map(|range| range.start).chain(std::iter::once(end));
    starts.zip(ends).map(|(start, end)| start..end).filter(|range| !range.is_empty()).collect()
}

fn cut_piece(text: &str, piece: Piece, open: &[Range<usize>], control: &ControlToken) -> Vec<Piece> {
    if piece.control.is_some() {
        return vec![piece];
    }
    let mut pieces = Vec::new();
    let mut rest = piece.range;
    while let Some(at) = find_open(text, &rest, open, &control.text) {
        let end = at + control.text.len();
        let left = text[rest.start..at].trim_end_matches(|c| control.strips_left && is_c_space(c));
        pieces.push(Piece { range: rest.start..rest.start + left.len(), control: None });
        pieces.push(Piece { range: at..end, control: Some(control.id) });
        let right = text[end..rest.end].trim_start_matches(|c| control.strips_right && is_c_space(c));
        rest = rest.end - right.len()..rest.end;
    }
    pieces.push(Piece { range: rest, control: None });
    pieces.retain(|piece| !piece.range.is_empty());
    pieces
}

/// The first place of `needle` in `within` that lies whole in an open range.
fn find_open(text: &str, within: &Range<usize>, open: &[Range<usize>], needle: &str) -> Option<usize> {
    let first = open.partition_point(|range| range.end <= within.start);
    open[first..].iter().take_while(|range| range.start < within.end).find_map(|range| {
        let (start, end) = (range.start.max(within.start), range.end.min(within.end));
        text[start..end].find(needle).map(|at| start + at)
    })
}

fn is_c_space(c: char) -> bool {
    matches!(c, ' ' | '\t'..='\r')
}

/// Tokens that take the place of a stretch of text: what a model has written before.
#[derive(Clone, Debug)]
pub struct Kept {
    /// The stretch.
    pub range: Range<usize>,
    /// Its tokens.
    pub tokens: Vec<Token>,
}

/// The tokens of a prompt, and where in the text each of them ends.
#[derive(Debug, Default)]
pub struct Tokens {
    /// The ids.
    pub ids: Vec<Token>,
    ends: Vec<usize>,
}

impl Tokens {
    /// How many tokens the text has up to a byte.
    #[must_use]
    pub fn count_until(&self, end: usize) -> usize {
        self.ends.partition_point(|&token_end| token_end <= end)
    }

    fn push(&mut self, token: Token, end: usize) {
        self.ids.push(token);
        self.ends.push(end.max(self.ends.last().copied().unwrap_or(0)));
    }

    /// Adds the tokens of a stretch, whose ends follow from the lengths of their texts.
    fn extend(&mut self, model: &Model, range: &Range<usize>, tokens: &[Token]) -> Result<()> {
        let mut text = Vec::new();
        let mut lengths = Vec::with_capacity(tokens.len());
        for &token in tokens {
            model.llama().token_to_piece(token, true, &mut text)?;
            lengths.push(text.len());
        }
        // A vocabulary may put a space before the text.
        let extra = text.len().saturating_sub(range.len());
        for (&token, length) in tokens.iter().zip(lengths) {
            self.push(token, (range.start + length.saturating_sub(extra)).min(range.end));
        }
        Ok(())
    }

    /// Adds a stretch of text, which may go on after tokens that were kept.
    fn extend_with_text(&mut self, model: &Model, text: &str, range: Range<usize>, goes_on: bool) -> Result<()> {
        if range.start >= range.end {
            return Ok(());
        }
        let stretch = &text[range.clone()];
        let goes_on = goes_on && range.start > 0;
        let ids = if goes_on {
            model.tokenize_continuation(stretch, false)
        } else {
            model.llama().tokenize(stretch, false, false)
        };
        self.extend(model, &range, &ids?)
    }

    /// Puts the beginning-of-text token first where the model wants it and the template has not.
    fn begin(&mut self, model: &Model) {
        let bos = model.llama().special_tokens().bos.filter(|_| model.llama().adds_bos());
        if let Some(bos) = bos
            && self.ids.first() != Some(&bos)
        {
            self.ids.insert(0, bos);
            self.ends.insert(0, 0);
        }
    }
}

/// Tokenises pieces: each stretch whole and without special parsing, so that nothing in it becomes a control token.
///
/// # Errors
/// What the tokeniser says.
pub fn tokenise(model: &Model, text: &str, pieces: &[Piece], kept: &[Kept]) -> Result<Tokens> {
    let mut tokens = Tokens::default();
    let mut kept = kept.iter().peekable();
    let mut done = 0; // end of the last stretch that was kept
    for piece in pieces {
        let mut start = piece.range.start.max(done);
        while let Some(next) = kept.next_if(|next| next.range.start < piece.range.end) {
            tokens.extend_with_text(model, text, start..next.range.start, start == done)?;
            tokens.extend(model, &next.range, &next.tokens)?;
            done = next.range.end;
            start = done;
        }
        match piece.control {
            Some(control) if start < piece.range.end => tokens.push(control, piece.range.end),
            Some(_) => {}
            None => tokens.extend_with_text(model, text, start..piece.range.end, start == done)?,
        }
    }
    tokens.begin(model);
    Ok(tokens)
}

/// Where each message ends in the text: behind the token that ends its turn, or else with its last character.
#[must_use]
pub fn message_ends(layout: &Layout, pieces: &[Piece], is_eog: impl Fn(Token) -> bool) -> Vec<usize> {
    let mut end = 0;
    let count = layout.messages.len();
    let mut ends = Vec::with_capacity(count);
    for index in 0..count {
        let own = layout.messages[index].as_ref().map_or(end, |range| range.end.max(end));
        let next = layout.messages[index + 1..].iter().flatten().next().map_or(layout.text.len(), |range| range.start);
        let closing = pieces
            .iter()
            .find(|piece| piece.range.start >= own && piece.range.end <= next && piece.control.is_some_and(&is_eog));
        end = closing.map_or(own, |piece| after_space(&layout.text, piece.range.end));
        ends.push(end);
    }
    ends
}

fn after_space(text: &str, at: usize) -> usize {
    at + text[at..].len() - text[at..].trim_start_matches(is_space).len()
}

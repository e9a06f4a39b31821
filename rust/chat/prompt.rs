//! From the text of a prompt to its tokens: special tokens where the template names them, and nowhere else.

use std::ops::Range;

use super::spans::{Layout, is_space};
use crate::error::Result;
use crate::llama::{Piece, Stretches, Token};
use crate::model::Model;

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

/// A part of the prompt, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    /// A special token, and where its text ends.
    Special(Token, usize),
    /// What was written before, by its place in the list.
    Kept(usize),
    /// Text, and whether it follows what was kept.
    Text(Range<usize>, bool),
}

/// Puts what is kept in the place of the pieces below it.
fn plan(pieces: &[Piece], kept: &[Kept]) -> Vec<Part> {
    let mut parts = Vec::new();
    let mut next = 0;
    let mut done = 0; // end of the last stretch that was kept
    for piece in pieces {
        let (range, special) = match piece {
            Piece::Text(range) => (range, None),
            Piece::Special { range, token } => (range, Some(*token)),
        };
        let mut start = range.start.max(done);
        while let Some(stretch) = kept.get(next).filter(|stretch| stretch.range.start < range.end) {
            parts.push(Part::Text(start..stretch.range.start, start == done));
            parts.push(Part::Kept(next));
            (done, next) = (stretch.range.end, next + 1);
            start = done;
        }
        match special {
            Some(token) if start < range.end => parts.push(Part::Special(token, range.end)),
            Some(_) => {}
            None => parts.push(Part::Text(start..range.end, start == done)),
        }
    }
    parts.retain(|part| !matches!(part, Part::Text(range, _) if range.start >= range.end));
    parts
}

/// Tokenises pieces: each stretch whole and without special parsing, so that nothing in it becomes a special token.
///
/// # Errors
/// What the tokeniser says.
pub fn tokenise(model: &Model, layout: &Layout, pieces: &[Piece], kept: &[Kept]) -> Result<Tokens> {
    let parts = plan(pieces, kept);
    let mut stretches = [Stretches::new(model.llama(), false), Stretches::new(model.llama(), true)];
    let mut places = Vec::new();
    for part in &parts {
        if let Part::Text(range, _) = part {
            let guarded = usize::from(is_protected(&layout.protected, range));
            let start = stretches[guarded].len();
            stretches[guarded].tokenize(&layout.text.as_bytes()[range.clone()])?;
            places.push((guarded, start..stretches[guarded].len()));
        }
    }
    let found = stretches.map(Stretches::finish);
    let mut places = places.into_iter();
    let mut tokens = Tokens::default();
    for part in &parts {
        match part {
            Part::Special(token, end) => tokens.push(*token, *end),
            Part::Kept(index) => tokens.extend(model, &kept[*index].range, &kept[*index].tokens)?,
            Part::Text(range, follows) => {
                let Some((guarded, place)) = places.next() else { continue };
                let ids = &found[guarded][place];
                if *follows && range.start > 0 && guarded == 0 {
                    let ids = model.tokenize_continuation(&layout.text[range.clone()], false)?;
                    tokens.extend(model, range, &ids)?;
                } else {
                    tokens.extend(model, range, ids)?;
                }
            }
        }
    }
    tokens.begin(model);
    Ok(tokens)
}

fn is_protected(protected: &[Range<usize>], range: &Range<usize>) -> bool {
    let first = protected.partition_point(|part| part.end <= range.start);
    protected.get(first).is_some_and(|part| part.start < range.end)
}

/// Where each message ends in the text: behind the token that ends its turn, or else with its last character.
#[must_use]
pub fn message_ends(layout: &Layout, pieces: &[Piece], is_eog: impl Fn(Token) -> bool) -> Vec<usize> {
    let mut closings = pieces.iter().filter_map(|piece| match piece {
        Piece::Special { range, token } if is_eog(*token) => Some(range.clone()),
        _ => None,
    });
    let mut closing = closings.next();
    let mut end = 0;
    let mut ends = Vec::with_capacity(layout.messages.len());
    for (index, own) in layout.messages.iter().enumerate() {
        end = own.as_ref().map_or(end, |range| range.end.max(end));
        while closing.as_ref().is_some_and(|range| range.start < end) {
            closing = closings.next();
        }
        let next = layout.messages[index + 1..].iter().flatten().next().map_or(layout.text.len(), |range| range.start);
        if let Some(range) = closing.clone().filter(|range| range.end <= next) {
            end = after_space(&layout.text, range.end);
        }
        ends.push(end);
    }
    ends
}

fn after_space(text: &str, at: usize) -> usize {
    at + text[at..].len() - text[at..].trim_start_matches(is_space).len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(range: Range<usize>) -> Kept {
        Kept { range, tokens: vec![7] }
    }

    #[test]
    fn what_is_kept_takes_the_place_of_what_lies_below_it() {
        let pieces = [
            Piece::Special { range: 0..3, token: 1 },
            Piece::Text(3..10),
            Piece::Special { range: 10..12, token: 2 },
            Piece::Text(12..20),
        ];
        let parts = plan(&pieces, &[kept(5..8), kept(10..15)]);
        let expected = [
            Part::Special(1, 3),
            Part::Text(3..5, false),
            Part::Kept(0),
            Part::Text(8..10, true),
            Part::Kept(1),
            Part::Text(15..20, true),
        ];
        assert_eq!(parts, expected);
    }

    #[test]
    fn a_message_ends_behind_the_token_that_closes_it() {
        let text = "<u>hi<e>\n<a>yo<e>\n<a>".to_owned();
        let special = |range, token| Piece::Special { range, token };
        let pieces = [
            special(0..3, 0),
            Piece::Text(3..5),
            special(5..8, 9),
            Piece::Text(8..9),
            special(9..12, 1),
            Piece::Text(12..14),
            special(14..17, 9),
            Piece::Text(17..18),
            special(18..21, 1),
        ];
        let layout = |messages| Layout { text: text.clone(), protected: vec![], messages, contents: vec![] };
        let ends = |messages| message_ends(&layout(messages), &pieces, |token| token == 9);
        assert_eq!(ends(vec![Some(3..5), Some(12..14)]), [9, 18]);
        assert_eq!(ends(vec![None, Some(12..14)]), [9, 18]);
        assert_eq!(ends(vec![Some(3..5), None]), [9, 18]);
        assert_eq!(ends(vec![Some(3..5), None, None]), [9, 18, 18]);
    }
}

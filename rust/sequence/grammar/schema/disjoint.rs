//! Whether two branches of `oneOf` can never both match.

use llguidance::derivre::RegexAst;
use serde_json::Value;

use super::build::Builder;
use super::rules::{All, MembersRule, Rules, Size, Types};
use crate::error::Result;

/// Objects within objects that are looked into.
const DEPTH: u32 = 3;

/// Whether no value fulfils both branches, each given by its alternatives.
pub fn branches(builder: &mut Builder, ones: &[Rules], others: &[Rules]) -> Result<bool> {
    Apart { builder, depth: DEPTH }.all(ones, others)
}

struct Apart<'a, 's, 'l> {
    builder: &'a mut Builder<'s, 'l>,
    depth: u32,
}

impl Apart<'_, '_, '_> {
    fn all(&mut self, ones: &[Rules], others: &[Rules]) -> Result<bool> {
        for one in ones {
            for other in others {
                if !self.rules(one, other)? {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    fn rules(&mut self, one: &Rules, other: &Rules) -> Result<bool> {
        let shared = one.types.and(other.types);
        if let Some(values) = &one.values {
            return self.values(values, one, other);
        }
        if let Some(values) = &other.values {
            return self.values(values, other, one);
        }
        Ok(!shared.has(Types::NULL)
            && !shared.has(Types::BOOLEAN)
            && (!shared.has(Types::NUMBER) || self.numbers(one, other))
            && (!shared.has(Types::STRING) || self.strings(one, other))
            && (!shared.has(Types::ARRAY) || sizes(one.items.size, other.items.size))
            && (!shared.has(Types::OBJECT) || self.members(&one.members, &other.members)?))
    }

    fn values(&mut self, values: &[Value], own: &Rules, other: &Rules) -> Result<bool> {
        for value in values {
            let told = |value: &Value| {
                other.values.as_ref().is_none_or(|values| values.iter().any(|known| super::rules::equal(value, known)))
            };
            if self.builder.admits(own, value)? && told(value) && self.builder.admits(other, value)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn numbers(&mut self, one: &Rules, other: &Rules) -> bool {
        let both = one.number.and(&other.number);
        // Of numbers between bounds with fewer digits than may be written, one can be written too, if there are any.
        both.is_empty() || !both.is_fine() && self.never(both.regex())
    }

    fn strings(&mut self, one: &Rules, other: &Rules) -> bool {
        sizes(one.text.size, other.text.size) || self.never(RegexAst::And(vec![one.text.regex(), other.text.regex()]))
    }

    fn never(&mut self, ast: RegexAst) -> bool {
        self.builder.dfa(&ast).is_ok_and(|dfa| dfa.is_empty())
    }

    /// One asks for a member that the other forbids, or both ask for one that cannot be the same.
    fn members(&mut self, one: &MembersRule, other: &MembersRule) -> Result<bool> {
        if sizes(one.size, other.size) {
            return Ok(true);
        }
        for name in one.required.iter().chain(&other.required) {
            if self.member(one.of(name), other.of(name))? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn member(&mut self, one: &All, other: &All) -> Result<bool> {
        if self.depth == 0 {
            return Ok(false);
        }
        let ones = self.every(one)?;
        let others = self.every(other)?;
        Apart { builder: self.builder, depth: self.depth - 1 }.all(&ones, &others)
    }

    fn every(&mut self, all: &All) -> Result<Vec<Rules>> {
        let alternatives = self.builder.alternatives(all)?;
        alternatives.iter().map(|all| Rules::of(&mut self.builder.source, all)).collect()
    }
}

/// Whether no size is in both.
fn sizes(one: Size, other: Size) -> bool {
    let above = |high: Size, low: Size| low.max.is_some_and(|max| max < high.min);
    above(one, other) || above(other, one)
}

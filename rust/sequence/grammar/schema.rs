//! JSON Schemas: what may be written, and how what was begun ends soonest.
//!
//! A schema is brought into a normal form (`program.rs`), and from this one form come both the grammar for llguidance
//! (`emit.rs`), which knows the masks, and the [`Tracker`], which knows the shortest end. The language of both is the
//! same, but for two things that the tracker alone refuses: what leads deeper than [`DEEPEST`], and equal keys where
//! `minProperties` counts them.
//!
//! Documents are written in one order: properties as the schema lists them, then all others. Between tokens there is
//! at most a blank or one line break with blanks or tabs; nothing is before or after the document. Numbers have so
//! few digits that floats keep them.

mod build;
mod closing;
mod dfa;
mod disjoint;
mod emit;
mod number;
mod pattern;
mod program;
mod rules;
mod shortest;
mod source;
mod text;
mod tracker;

use std::sync::Arc;

use llguidance::api::GrammarInit;
use llguidance::derivre::RegexAst;
use serde_json::Value;

use crate::error::{Error, Result};
use dfa::Refused;
pub use pattern::portable;
use program::Program;
pub use tracker::{DEEPEST, Tracker};

/// What a schema may ask for, so that compiling it stays short.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Different places for values.
    pub nodes: usize,
    /// Ways through the `anyOf`, `oneOf` and `allOf` of one value.
    pub alternatives: usize,
    /// States of one pattern.
    pub states: usize,
    /// Work for one pattern, in derivre's units.
    pub fuel: u64,
    /// Properties in a row that are not required.
    pub optional: usize,
    /// Properties without names of their own that an object must have.
    pub others: usize,
    /// Symbols of the grammar.
    pub symbols: usize,
    /// Bytes of the shortest document.
    pub shortest: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            nodes: 30_000,
            alternatives: 1_000,
            states: 10_000,
            fuel: 5_000_000,
            optional: 1_000,
            others: 1_000,
            symbols: 60_000,
            shortest: 1 << 20,
        }
    }
}

/// A compiled schema. Cheap to clone.
#[derive(Clone)]
pub struct Schema {
    program: Arc<Program>,
    grammar: Arc<GrammarInit>,
    shortest: Arc<str>,
}

impl Schema {
    /// Compiles a JSON Schema (2020-12; the spellings of draft 7 where they mean the same). [`Error::Grammar`] names
    /// the keyword that is not supported, or what is too big, and its JSON pointer.
    pub fn compile(schema: &Value, limits: &Limits) -> Result<Self> {
        let program = build::program(schema, limits)?;
        Self::of(program, limits)
    }

    /// Texts that match a regular expression from beginning to end, in the syntax of the `regex` crate.
    pub fn regex(pattern: &str, limits: &Limits) -> Result<Self> {
        let program = build::regex_program(RegexAst::Regex(pattern.into()), limits).map_err(|refused| {
            Error::Grammar(match refused {
                Refused::Malformed(why) => format!("the regular expression cannot be used: {why}"),
                Refused::TooBig => {
                    format!("the regular expression is too big: it needs more than {} states", limits.states)
                }
            })
        })?;
        Self::of(program, limits)
    }

    fn of(program: Program, limits: &Limits) -> Result<Self> {
        let root = &program.nodes[program.root as usize];
        if root.cost > limits.shortest || root.height > DEEPEST {
            return Err(Error::Grammar(format!(
                "the schema is too big: its shortest document has {} bytes in {} levels; at most {} bytes in {DEEPEST} levels are allowed",
                root.cost, root.height, limits.shortest
            )));
        }
        let grammar = emit::grammar(&program, limits)?;
        let mut shortest = Vec::new();
        program.close_node(program.root, &mut shortest);
        let shortest = String::from_utf8_lossy(&shortest).into();
        Ok(Self { program: Arc::new(program), grammar: Arc::new(grammar), shortest })
    }

    /// The grammar for llguidance.
    pub fn grammar(&self) -> GrammarInit {
        GrammarInit::clone(&self.grammar)
    }

    /// At the beginning of a document.
    pub fn tracker(&self) -> Tracker {
        Tracker::new(self.program.clone())
    }

    /// A shortest document, or nearly.
    pub fn shortest(&self) -> &str {
        &self.shortest
    }
}

#[cfg(test)]
mod tests;

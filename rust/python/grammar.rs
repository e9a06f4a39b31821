//! Grammars without a model.

use pyo3::prelude::*;

use super::options::Constraint;
use crate::sequence::grammar;

/// Whether a constraint allows a text as a whole.
#[pyfunction]
pub fn grammar_accepts(py: Python<'_>, constraint: Constraint, text: &str) -> PyResult<bool> {
    Ok(py.detach(|| grammar::accepts(&constraint.0, text))?)
}

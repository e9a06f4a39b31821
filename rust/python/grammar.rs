//! Grammars without a model.

use pyo3::prelude::*;

use super::options::Constraint;
use super::process::require_own_process;
use crate::sequence::grammar;

/// Whether a constraint allows a text as a whole.
#[pyfunction]
pub fn grammar_accepts(py: Python<'_>, constraint: Constraint, text: &str) -> PyResult<bool> {
    require_own_process()?;
    Ok(py.detach(|| grammar::accepts(&constraint.0, text))?)
}

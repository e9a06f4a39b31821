//! Regular expressions of JSON Schemas, read as grammars read them, for data that no grammar has made.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use regex::Regex;

use crate::sequence::grammar::schema::portable;

/// A compiled expression, in which no text is searched longer than in proportion to its length.
#[pyclass(frozen)]
pub struct Pattern(Regex);

#[pymethods]
impl Pattern {
    #[new]
    fn new(pattern: &str) -> PyResult<Self> {
        let compiled = Regex::new(&portable(pattern)).map_err(|error| PyValueError::new_err(error.to_string()))?;
        Ok(Self(compiled))
    }

    /// Whether it matches anywhere in `text`.
    fn search(&self, py: Python<'_>, text: &str) -> bool {
        py.detach(|| self.0.is_match(text))
    }
}

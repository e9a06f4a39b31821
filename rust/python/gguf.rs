//! What a file says of itself, without loading it.

use std::path::PathBuf;

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use crate::error::Error;
use crate::llama::gguf::{self, Header, TensorInfo, Value, ValueType};

/// Reads the header of a file and applies every rule of GGUF itself.
#[pyfunction]
pub fn read_gguf_header(py: Python<'_>, path: PathBuf) -> PyResult<Bound<'_, PyDict>> {
    let header = py.detach(|| Header::read(&path)).map_err(Error::from)?;
    header_to_python(py, &header)
}

/// The same of the first bytes of a file that is somewhere else; `None` if the header goes on after them.
#[pyfunction]
pub fn parse_gguf_header<'py>(
    py: Python<'py>,
    start: &[u8],
    file_size: u64,
    name: PathBuf,
) -> PyResult<Option<Bound<'py, PyDict>>> {
    let header = py.detach(|| Header::read_start(start, file_size, &name)).map_err(Error::from)?;
    header.map(|header| header_to_python(py, &header)).transpose()
}

/// Applies every rule that loading the file would, its parts included; says what breaks one.
#[pyfunction]
pub fn check_model_file(py: Python<'_>, path: PathBuf) -> PyResult<()> {
    py.detach(|| gguf::check_model_file(&path, false, &[])).map_err(Error::from)?;
    Ok(())
}

fn header_to_python<'py>(py: Python<'py>, header: &Header) -> PyResult<Bound<'py, PyDict>> {
    let metadata = PyDict::new(py);
    for (key, value) in &header.metadata {
        metadata.set_item(key, value_to_python(py, value)?)?;
    }
    let tensors = header.tensors.iter().map(|tensor| tensor_to_python(py, tensor));
    let dict = PyDict::new(py);
    dict.set_item("version", header.version)?;
    dict.set_item("alignment", header.alignment)?;
    dict.set_item("metadata", metadata)?;
    dict.set_item("tensors", tensors.collect::<PyResult<Vec<_>>>()?)?;
    dict.set_item("data_offset", header.data_offset)?;
    dict.set_item("file_size", header.file_size)?;
    dict.set_item("parts", header.split_count())?;
    Ok(dict)
}

fn value_to_python<'py>(py: Python<'py>, value: &Value) -> PyResult<Bound<'py, PyAny>> {
    Ok(match value {
        Value::Bool(value) => value.into_pyobject(py)?.to_owned().into_any(),
        Value::F32(value) => value.into_pyobject(py)?.into_any(),
        Value::F64(value) => value.into_pyobject(py)?.into_any(),
        Value::String(text) => text.into_pyobject(py)?.into_any(),
        Value::Array { element: ValueType::Bool, integers: Some(values), .. } => {
            values.iter().map(|value| *value != 0).collect::<Vec<_>>().into_pyobject(py)?
        }
        Value::Array { integers: Some(values), .. } => values.into_pyobject(py)?.into_any(),
        Value::Array { element, len, .. } => {
            let dict = PyDict::new(py);
            dict.set_item("type", element.name())?;
            dict.set_item("length", len)?;
            dict.into_any()
        }
        value => value.as_integer().into_pyobject(py)?.into_any(),
    })
}

/// Name, dimensions (innermost first, without the last ones that are 1), type, offset and bytes.
fn tensor_to_python<'py>(py: Python<'py>, tensor: &TensorInfo) -> PyResult<Bound<'py, PyTuple>> {
    let last = tensor.dimensions.iter().rposition(|size| *size != 1).unwrap_or(0);
    let dimensions = PyTuple::new(py, &tensor.dimensions[..=last])?;
    (&tensor.name, dimensions, tensor.kind.name, tensor.offset, tensor.bytes).into_pyobject(py)
}

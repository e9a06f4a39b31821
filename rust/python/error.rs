//! Errors of the core as exceptions of `llamactor.errors`.

use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;

use crate::error::{Error, ForeignError};

mod exceptions {
    use pyo3::import_exception;
    import_exception!(llamactor.errors, BusyError);
    import_exception!(llamactor.errors, ChatTemplateError);
    import_exception!(llamactor.errors, ClosedError);
    import_exception!(llamactor.errors, ContextOverflowError);
    import_exception!(llamactor.errors, DeadlineExceededError);
    import_exception!(llamactor.errors, DecodeError);
    import_exception!(llamactor.errors, GrammarError);
    import_exception!(llamactor.errors, InsufficientMemoryError);
    import_exception!(llamactor.errors, LlamactorError);
    import_exception!(llamactor.errors, LoadCancelledError);
    import_exception!(llamactor.errors, ModelLoadError);
    import_exception!(llamactor.errors, ModelNotFoundError);
    import_exception!(llamactor.errors, StateMismatchError);
    import_exception!(llamactor.errors, UnsupportedError);
    import_exception!(llamactor.errors, WorkerCrashedError);
}

use exceptions as raise;

/// The exception for an error. May be called again for the same one.
pub fn to_python(error: &Error) -> PyErr {
    let message = error.to_string();
    match error {
        Error::ModelLoad(_) => raise::ModelLoadError::new_err(message),
        Error::LoadCancelled => raise::LoadCancelledError::new_err(message),
        Error::ModelNotFound(_) => raise::ModelNotFoundError::new_err(message),
        Error::InsufficientMemory(_) => raise::InsufficientMemoryError::new_err(message),
        Error::ContextOverflow(_) => raise::ContextOverflowError::new_err(message),
        Error::ChatTemplate(_) => raise::ChatTemplateError::new_err(message),
        Error::Grammar(_) => raise::GrammarError::new_err(message),
        Error::Decode(_) => raise::DecodeError::new_err(message),
        Error::StateMismatch(_) => raise::StateMismatchError::new_err(message),
        Error::Closed(_) => raise::ClosedError::new_err(message),
        Error::Busy(_) => raise::BusyError::new_err(message),
        Error::DeadlineExceeded(_) => raise::DeadlineExceededError::new_err(message),
        Error::Unsupported(_) => raise::UnsupportedError::new_err(message),
        Error::WorkerCrashed(_) => raise::WorkerCrashedError::new_err(message),
        Error::Cancelled => raise::LlamactorError::new_err(message),
        Error::Value(_) => PyValueError::new_err(message),
        Error::Io { context, source } => from_system(context, source),
        Error::Foreign(foreign) => from_foreign(foreign, message),
    }
}

/// `OSError` of the kind that fits the number (`FileNotFoundError`, `PermissionError`, …).
fn from_system(context: &str, source: &std::io::Error) -> PyErr {
    match source.raw_os_error() {
        Some(number) => PyOSError::new_err((number, format!("{context}: {source}"))),
        None => PyOSError::new_err(format!("{context}: {source}")),
    }
}

/// The exception that a user's callback raised, itself.
fn from_foreign(foreign: &ForeignError, message: String) -> PyErr {
    match foreign.0.downcast_ref::<PyErr>() {
        Some(error) => Python::attach(|py| error.clone_ref(py)),
        None => raise::LlamactorError::new_err(message),
    }
}

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        to_python(&error)
    }
}

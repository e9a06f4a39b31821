//! The one error of the core. `rust/python/error.rs` turns each kind into its Python exception.

use std::any::Any;
use std::fmt;

/// An error that belongs to somebody else (a Python exception raised by a user's callback), carried unread.
pub struct ForeignError(pub Box<dyn Any + Send + Sync>);

impl fmt::Debug for ForeignError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ForeignError")
    }
}

/// What can go wrong. Messages say what was wrong, the value, the limit and what would work.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The model file cannot be loaded.
    #[error("{0}")]
    ModelLoad(String),
    /// The load was cancelled.
    #[error("the load was cancelled")]
    LoadCancelled,
    /// There is no such file.
    #[error("{0}")]
    ModelNotFound(String),
    /// Memory for a model or a context could not be had.
    #[error("{0}")]
    InsufficientMemory(String),
    /// A prompt cannot fit into the context.
    #[error("{0}")]
    ContextOverflow(String),
    /// A chat template refused the messages, failed, or cannot be had.
    #[error("{0}")]
    ChatTemplate(String),
    /// A grammar or a schema is malformed, too large, or cannot be kept to.
    #[error("{0}")]
    Grammar(String),
    /// llama.cpp failed to decode or to sample.
    #[error("{0}")]
    Decode(String),
    /// A saved state belongs to another model or layout, or is damaged.
    #[error("{0}")]
    StateMismatch(String),
    /// The object was closed.
    #[error("{0}")]
    Closed(String),
    /// Nothing is free and waiting was not wanted.
    #[error("{0}")]
    Busy(String),
    /// The deadline passed.
    #[error("{0}")]
    DeadlineExceeded(String),
    /// This model or device cannot do it.
    #[error("{0}")]
    Unsupported(String),
    /// A thread of the core died.
    #[error("{0}")]
    WorkerCrashed(String),
    /// The call was cancelled before it was done.
    #[error("cancelled")]
    Cancelled,
    /// An argument has a wrong value.
    #[error("{0}")]
    Value(String),
    /// The operating system refused.
    #[error("{context}: {source}")]
    Io {
        /// What was attempted.
        context: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// A user's callback raised.
    #[error("a callback raised an exception")]
    Foreign(ForeignError),
}

/// `Result` with the core's error.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Shorthand for [`Error::Closed`] of a named object.
#[must_use]
pub fn closed(what: &str) -> Error {
    Error::Closed(format!("the {what} is closed; open a new one"))
}

//! What a chat keeps of itself in a file: a note, with the state of its sequence or without.

use std::path::Path;

use super::state::{self, Fingerprint};
use crate::context::job::SavedState;
use crate::error::Result;
use crate::model::Model;

/// Writes a note without a state.
///
/// # Errors
/// `Io` when it cannot be written.
pub fn write(path: &Path, model: &Model, note: &[u8]) -> Result<()> {
    state::write(path, Fingerprint::new(model.fingerprint(), ""), &SavedState::default(), note)
}

/// Reads a note, and whether a state is beside it.
///
/// # Errors
/// `StateMismatch` for another model or a damaged file; `Io` when it cannot be read.
pub fn read(path: &Path, model: &Model) -> Result<(Vec<u8>, bool)> {
    state::read_note(path, model.fingerprint())
}

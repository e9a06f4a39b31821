//! A sequence's state in a file: tokens, the bytes of its cells, and what they belong to.
//!
//! ```text
//! "LLAMACTOR-STATE\n"  version u32  fingerprint u128  layout hash u64  n_tokens u64  n_exact u64  n_bytes u64  n_note u64
//! tokens (i32 each)  state bytes  note bytes  xxh3-128 of everything before
//! ```
//! All little-endian. The note is what a chat keeps beside its state; a file may have no state and only a note. llama.cpp trusts the bytes it is given, so nothing reaches it that is not exactly what was
//! written by the same model with the same layout.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

use crate::context::job::SavedState;
use crate::error::{Error, Result};
use crate::llama::Token;

const MAGIC: &[u8; 16] = b"LLAMACTOR-STATE\n";
const VERSION: u32 = 2;
const HEADER_BYTES: usize = 16 + 4 + 16 + 8 + 4 * 8;
const CHECKSUM_BYTES: usize = 16;

/// Tells the temporary files of this process apart.
static SERIAL: AtomicU64 = AtomicU64::new(0);

const OTHER_LAYOUT: &str =
    "it was saved with another layout (kv_type_k, kv_type_v, swa_full, kv_unified, rope or yarn options)";

/// What a state belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fingerprint {
    /// The model, its quantisation and its adapters.
    pub model: u128,
    /// Hash of the cache's types and kind.
    pub layout: u64,
}

impl Fingerprint {
    /// Of a model in a context of this layout.
    #[must_use]
    pub fn new(model: u128, layout: &str) -> Self {
        Self { model, layout: xxh3_64(layout.as_bytes()) }
    }
}

/// Writes the file at once or not at all.
///
/// # Errors
/// `Io` when it cannot be written, `Value` when the path names no file.
pub fn write(path: &Path, fingerprint: Fingerprint, saved: &SavedState, note: &[u8]) -> Result<()> {
    let bytes = encode(fingerprint, saved, note);
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = path.file_name().ok_or_else(|| Error::Value(format!("{} names no file", path.display())))?;
    let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
    let temporary = directory.join(format!(".{}.{}-{serial}.partial", name.to_string_lossy(), std::process::id()));
    let written = write_and_rename(&temporary, path, &bytes);
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written.map_err(|source| Error::Io { context: format!("cannot save the state to {}", path.display()), source })
}

fn write_and_rename(temporary: &Path, path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = fs::File::create_new(temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(temporary, path)
}

fn encode(fingerprint: Fingerprint, saved: &SavedState, note: &[u8]) -> Vec<u8> {
    let SavedState { tokens, n_exact, bytes: state } = saved;
    let mut bytes = Vec::with_capacity(HEADER_BYTES + tokens.len() * 4 + state.len() + note.len() + CHECKSUM_BYTES);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&fingerprint.model.to_le_bytes());
    bytes.extend_from_slice(&fingerprint.layout.to_le_bytes());
    for count in [tokens.len(), *n_exact, state.len(), note.len()] {
        bytes.extend_from_slice(&(count as u64).to_le_bytes());
    }
    bytes.extend(tokens.iter().flat_map(|token| token.to_le_bytes()));
    bytes.extend_from_slice(state);
    bytes.extend_from_slice(note);
    let checksum = xxh3_128(&bytes);
    bytes.extend_from_slice(&checksum.to_le_bytes());
    bytes
}

/// Reads tokens and state of a file that belongs to `expected`.
///
/// # Errors
/// `StateMismatch` for another model, another layout, or a damaged file; `Io` when it cannot be read.
pub fn read(path: &Path, expected: Fingerprint) -> Result<SavedState> {
    let saved = decoded(path, expected.model, |content| {
        if u64::from_le_bytes(array(content, 36)) != expected.layout {
            return Err(OTHER_LAYOUT.into());
        }
        split(content)
    })?;
    Ok(saved.0)
}

/// Reads the note of a file that belongs to the model, and whether there is a state beside it.
///
/// # Errors
/// As [`read`], but the layout does not matter.
pub fn read_note(path: &Path, model: u128) -> Result<(Vec<u8>, bool)> {
    let (saved, note) = decoded(path, model, split)?;
    Ok((note, !saved.tokens.is_empty()))
}

fn decoded<T>(path: &Path, model: u128, take: impl FnOnce(&[u8]) -> Result<T, String>) -> Result<T> {
    let bytes = read_regular(path)
        .map_err(|source| Error::Io { context: format!("cannot read the state {}", path.display()), source })?;
    let outcome = checked(&bytes, model).and_then(take);
    outcome.map_err(|reason| Error::StateMismatch(format!("{}: {reason}", path.display())))
}

/// A FIFO would block for ever and a device never end.
fn read_regular(path: &Path) -> std::io::Result<Vec<u8>> {
    if !fs::metadata(path)?.is_file() {
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, "not a regular file"));
    }
    fs::read(path)
}

/// The content of a file that is whole and of this model.
fn checked(bytes: &[u8], model: u128) -> Result<&[u8], String> {
    if bytes.len() < HEADER_BYTES + CHECKSUM_BYTES || &bytes[..16] != MAGIC {
        return Err("this is not a saved sequence state, or it was cut off".into());
    }
    let (content, checksum) = bytes.split_at(bytes.len() - CHECKSUM_BYTES);
    let version = u32::from_le_bytes(array(content, 16));
    if version != VERSION {
        return Err(format!("its version is {version}; this release reads version {VERSION}"));
    }
    if xxh3_128(content) != u128::from_le_bytes(array(checksum, 0)) {
        return Err("its checksum does not match: the file is truncated or was changed".into());
    }
    if u128::from_le_bytes(array(content, 20)) != model {
        return Err("it was saved by another model, quantisation or LoRA".into());
    }
    Ok(content)
}

/// State and note.
fn split(content: &[u8]) -> Result<(SavedState, Vec<u8>), String> {
    let [n_tokens, n_exact, n_bytes, n_note] = [44, 52, 60, 68].map(|start| u64::from_le_bytes(array(content, start)));
    let body = &content[HEADER_BYTES..];
    let expected = n_tokens
        .checked_mul(4)
        .and_then(|tokens| tokens.checked_add(n_bytes))
        .and_then(|state| state.checked_add(n_note));
    if expected != Some(body.len() as u64) {
        return Err(format!(
            "it announces {n_tokens} tokens, {n_bytes} bytes of state and {n_note} of a note but holds {}",
            body.len()
        ));
    }
    let (tokens, rest) = body.split_at(n_tokens as usize * 4);
    let (state, note) = rest.split_at(n_bytes as usize);
    let tokens = tokens.chunks_exact(4).map(|bytes| Token::from_le_bytes(array(bytes, 0))).collect();
    let saved = SavedState { tokens, n_exact: n_exact.min(n_tokens) as usize, bytes: state.to_vec() };
    Ok((saved, note.to_vec()))
}

/// `N` bytes at `start`, which the caller knows to be there.
fn array<const N: usize>(bytes: &[u8], start: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[start..start + N]);
    array
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODEL: u128 = 7;
    const HERE: Fingerprint = Fingerprint { model: MODEL, layout: 9 };

    fn saved(tokens: &[Token], bytes: &[u8]) -> SavedState {
        SavedState { tokens: tokens.to_vec(), n_exact: tokens.len() / 2, bytes: bytes.to_vec() }
    }

    fn decode(bytes: &[u8]) -> Result<(SavedState, Vec<u8>), String> {
        checked(bytes, MODEL).and_then(split)
    }

    #[test]
    fn state_and_note_come_back_as_they_were() {
        for (state, note) in [(saved(&[1, -2, 3], b"state"), b"note".as_slice()), (saved(&[], b""), b"")] {
            assert_eq!(decode(&encode(HERE, &state, note)), Ok((state, note.to_vec())));
        }
    }

    #[test]
    fn every_changed_byte_is_noticed() {
        let bytes = encode(HERE, &saved(&[1, 2], b"state"), b"note");
        for index in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[index] ^= 1;
            assert!(decode(&damaged).is_err(), "byte {index}");
        }
    }

    #[test]
    fn every_truncation_is_noticed() {
        let bytes = encode(HERE, &saved(&[1, 2], b"state"), b"note");
        assert!((0..bytes.len()).all(|length| decode(&bytes[..length]).is_err()));
    }

    #[test]
    fn another_model_or_layout_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("state");
        write(&path, HERE, &saved(&[1], b""), b"note").expect("it is written");
        let refused = |expected| read(&path, expected).expect_err("it is refused").to_string();
        assert!(refused(Fingerprint { model: 8, ..HERE }).contains("another model"));
        assert!(refused(Fingerprint { layout: 8, ..HERE }).contains("another layout"));
        assert_eq!(read_note(&path, MODEL).ok(), Some((b"note".to_vec(), true)));
    }
}

//! ⓪ The thin, checked wrapper over llama.cpp. All `unsafe` of the crate lives in this room, and whatever could
//! trip a `GGML_ASSERT` or let a C++ exception out is checked here before the call.

mod backend;
mod batch;
mod bounded;
mod common;
mod context;
mod footprint;
pub mod gguf;
#[cfg(test)]
pub mod grammar;
mod log;
mod model;
mod pretokenizer;
mod sampler;
mod special;
mod spm;
mod tokenizer;
mod vocab;

pub use backend::{Device, devices, initialise, system_info};
pub use batch::Batch;
pub use bounded::{Bounds, Unfinished, is_given_up, run_bounded, unstoppable};
pub use common::{
    CallReader, CallReading, CallSyntax, ChatFormat, ChatFormats, FormatRequest, ParseRequest, Reading, ReadingState,
    Trigger, parse_answer,
};
pub use context::{CancelFlags, Context, ContextParams, Decoded, FlashAttention, KvType};
pub use footprint::Usage;
pub use log::{LogLevel, set_log_level};
pub use model::{LoadParams, Model, OverrideValue, SplitMode};
pub use sampler::*;
pub use special::Piece;
pub use tokenizer::Stretches;
pub use vocab::SpecialTokens;

/// Index into the vocabulary (`llama_token`).
pub type Token = i32;

/// Longest message that the shim writes.
const MESSAGE_BYTES: usize = 512;

/// Runs a call of the shim that reports an exception by returning `i32::MIN` and writing its message.
fn guarded(call: impl FnOnce(*mut std::ffi::c_char, usize) -> i32) -> Result<i32, String> {
    let mut message = [0u8; MESSAGE_BYTES];
    let code = call(message.as_mut_ptr().cast(), message.len());
    if code == i32::MIN {
        let end = message.iter().position(|&b| b == 0).unwrap_or(0);
        return Err(String::from_utf8_lossy(&message[..end]).into_owned());
    }
    Ok(code)
}

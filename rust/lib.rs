//! The native core of llamactor: weights → tokens → logits → text → events → Python.
//!
//! One crate, seven rooms, in the order of the data's flow. A room uses what stands before it:
//!
//! | room | what |
//! |---|---|
//! | [`llama`] | the checked wrapper over llama.cpp; all `unsafe` |
//! | [`model`] | a file becomes a shared model |
//! | [`chat`] | messages become a prompt |
//! | [`context`] | many sequences, one decoder thread |
//! | [`sequence`] | one actor per sequence |
//! | [`prediction`] | the hand-off to readers |
//! | [`python`] | the classes of `llamactor._core` |

pub mod chat;
pub mod context;
pub mod error;
pub mod llama;
pub mod model;
pub mod prediction;
mod python;
pub mod sequence;

/// The native module; private to the package `llamactor`.
#[pyo3::pymodule(gil_used = true)]
mod _core {
    #[pymodule_export]
    use crate::python::{
        BareLoop, Call, Context, Hub, Model, Pattern, Prediction, Sequence, after_fork_in_child, check_model_file,
        devices, grammar_accepts, load_model, parse_chat_answer, parse_gguf_header, read_gguf_header, set_log_level,
        shutdown, system_info, try_chat_template,
    };
}

//! ⑥ What Python sees: thin classes over the rooms before, one file each. Nothing is decided here.

mod bare;
mod call;
mod callbacks;
mod chat;
mod context;
mod error;
mod gguf;
mod grammar;
mod hub;
mod model;
mod options;
mod pattern;
mod prediction;
mod process;
mod sequence;

pub use bare::BareLoop;
pub use call::Call;
pub use chat::{parse_chat_answer, try_chat_template};
pub use context::Context;
pub use gguf::{check_model_file, parse_gguf_header, read_gguf_header};
pub use grammar::grammar_accepts;
pub use hub::Hub;
pub use model::{Model, devices, load_model, set_log_level, system_info};
pub use pattern::Pattern;
pub use prediction::Prediction;
pub use process::{after_fork_in_child, shutdown};
pub use sequence::Sequence;

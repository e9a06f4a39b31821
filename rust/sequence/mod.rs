//! ④ One actor, one thread, one prediction at a time.

mod actor;
mod bare;
mod calling;
mod generation;
pub mod grammar;
mod lease;
pub mod logits;
pub mod note;
mod reasoning;
pub mod sampler;
mod state;
pub mod text;

use std::sync::Arc;

pub use actor::Queued;
pub use bare::{BareLoop, BareReplies};
pub use generation::{Drawn, Logprob, StopReason};
pub use lease::{Lease, Sequences};
pub use reasoning::Reasoning;
pub use state::Fingerprint;
pub use text::calls::CallEvent;
pub use text::segments::Mark;

use crate::chat::CallSpec;
use crate::context::job::{Chat, Dropped, End, Flow, Overflow};
use crate::error::{Error, Result};
use crate::llama::Token;
use sampler::SamplerSpec;
use text::TextOptions;

/// What to continue.
#[derive(Clone, Debug)]
pub enum Prompt {
    /// Text; `parse_special` lets it name control tokens.
    Text {
        /// The text.
        text: String,
        /// Whether control tokens may be named.
        parse_special: bool,
    },
    /// Tokens as they are.
    Tokens {
        /// The tokens.
        tokens: Vec<Token>,
        /// Whether a response prefix after them may name control tokens.
        parse_special: bool,
    },
}

/// How to generate.
pub struct Request {
    /// What to continue.
    pub prompt: Prompt,
    /// How tokens are drawn.
    pub sampler: SamplerSpec,
    /// How text is cut and stopped.
    pub text: TextOptions,
    /// How reasoning is told from content; `None` takes all for content.
    pub reasoning: Option<Reasoning>,
    /// How calls of tools are told from both; `None` looks for none.
    pub calls: Option<CallSpec>,
    /// What the content may be; `None` allows everything.
    pub constraint: Option<grammar::Spec>,
    /// Tokens at most; `None` has no limit.
    pub max_tokens: Option<usize>,
    /// Text that the answer begins with.
    pub response_prefix: Option<String>,
    /// Evaluated alone, in fixed chunks, without reuse.
    pub deterministic: bool,
    /// Higher comes first.
    pub priority: i32,
    /// When to give up.
    pub deadline: Option<std::time::Instant>,
    /// What to do with a prompt that is too long, and when the context is full. `None`: refuse, and stop.
    pub overflow: Option<Overflow>,
    /// The chat it is a turn of.
    pub chat: Option<Turn>,
}

/// What a prediction has to do with a chat.
#[derive(Clone, Debug)]
pub struct Turn {
    /// The chat.
    pub chat: Chat,
    /// Tokens at the front that never go when the context is full.
    pub n_keep: usize,
    /// What the chat's window has lost since its last turn.
    pub dropped: Option<Dropped>,
}

/// How a prediction ended.
#[derive(Debug)]
pub struct Outcome {
    /// Why, where it did not fail.
    pub stop_reason: StopReason,
    /// The stop string that matched.
    pub stop_string: Option<String>,
    /// What it failed with.
    pub error: Option<Error>,
    /// False where a constraint had not come to its end by itself.
    pub completed: bool,
}

/// Where a generation's output goes.
pub trait Sink: Flow {
    /// Takes a drawn token, the text that can be shown now and the marks in it. Returns whether readers lag, so that
    /// the generation should pause.
    fn publish(&self, drawn: Option<Drawn>, text: &str, marks: &[(usize, Mark)]) -> bool;
    /// The prediction is over.
    fn finish(&self, outcome: Outcome);
    /// The sequence was given up while paused. To be called once: with nothing to get a sequence again and go on, or
    /// with an end.
    fn parked(&self, resume: Resume);
    /// Sets what makes the core look at the flags; called at once if one is set already.
    fn on_nudge(&self, nudge: Nudge);
    /// The sequence or its context was closed: end with `Closed`.
    fn close(&self);
    /// As `Flow`, which a job needs.
    fn as_flow(self: Arc<Self>) -> Arc<dyn Flow>;
}

/// What happens to the core when readers change their minds.
pub type Nudge = Arc<dyn Fn() + Send + Sync>;

/// How a parked prediction goes on or ends.
pub type Resume = Box<dyn FnOnce(Option<End>) + Send>;

/// What becomes of an asynchronous operation.
pub type Done<T> = Box<dyn FnOnce(Result<T>) + Send>;

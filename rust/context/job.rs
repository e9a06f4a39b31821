//! What a sequence asks of the decoder, and what the decoder answers.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::Sender;
use std::time::Instant;

use super::cache::Slot;
use super::parking::Source;
use crate::error::{Error, Result};
use crate::llama::Token;

/// Names who holds a sequence; never the same again. 0 is nobody.
pub type Holder = u64;

/// Names a chat, which holds a sequence only while it works; never the same again. 0 is none.
pub type Chat = u64;

/// What to do when a sequence has filled the context.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Overflow {
    /// Stop there.
    #[default]
    Stop,
    /// Drop the oldest tokens.
    RollingWindow,
    /// Keep the beginning, drop the tokens after it.
    TruncateMiddle,
}

/// Draws tokens from logits and says how to go on. Lives on its sequence's thread, or travels to the decoder's when
/// it is cheap enough to run there.
pub trait Generator: Send + Any {
    /// Draws the next token from its logits.
    fn advance(&mut self, logits: &[f32]) -> Step;
}

/// How a generation goes on.
#[derive(Debug)]
pub enum Step {
    /// Evaluate this token and come back with its logits.
    Next(Token),
    /// The same, but not before the reader has caught up ([`Flow::is_paused`]).
    Pause(Token),
    /// The generation has ended; it knows why.
    Stop,
}

/// What those outside tell a running job, and are told. Called on the decoder's thread: must not block.
pub trait Flow: Send + Sync {
    /// Set once nobody wants the job any more.
    fn cancel_flag(&self) -> &Arc<AtomicBool>;
    /// Why it was cancelled, if that was an error (a closed sequence); `None` for a plain cancel.
    fn cancel_error(&self) -> Option<Error> {
        None
    }
    /// Whether readers lag too far behind.
    fn is_paused(&self) -> bool {
        false
    }
    /// Evaluation begins: `n_cached` of `n_total` prompt tokens need not be evaluated. `source` had them.
    fn admitted(&self, _n_cached: usize, _n_total: usize, _source: Source) {}
    /// So many tokens of the prompt are in the cache now.
    fn progressed(&self, _n_processed: usize, _n_cached: usize, _n_total: usize) {}
    /// The context was full; `n_dropped` tokens after the first `n_kept` went.
    fn shifted(&self, _n_kept: usize, _n_dropped: usize) {}
    /// A step is over: wake whoever waits for what it brought.
    fn flush(&self) {}
}

/// What a job is for.
pub enum Goal {
    /// Have the tokens in the cache.
    Evaluate,
    /// Evaluate the tokens from this index on and give their log-probabilities.
    Score(usize),
    /// Generate. A cheap generator comes along; otherwise rows go to the sequence's thread.
    Generate(Option<Box<dyn Generator>>),
}

/// Tokens that a chat's window had and has no more: what follows them is moved, where the cells are still there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dropped {
    /// The window before, as it was evaluated.
    pub before: Vec<Token>,
    /// What of it goes.
    pub ranges: Vec<(usize, usize)>,
}

/// Work on one sequence, from its prompt to its end.
pub struct Job {
    /// The sequence.
    pub slot: Slot,
    /// Who holds it.
    pub holder: Holder,
    /// Whose chat the tokens are.
    pub chat: Chat,
    /// What the chat has dropped from its window since its last job.
    pub dropped: Option<Dropped>,
    /// All tokens that the sequence shall hold before the first is drawn.
    pub tokens: Vec<Token>,
    /// What for.
    pub goal: Goal,
    /// Higher comes first.
    pub priority: i32,
    /// When to give up.
    pub deadline: Option<Instant>,
    /// Evaluated in calls of its own, in fixed chunks, without reuse (`deterministic=True`).
    pub alone: bool,
    /// Whether the sequence may be given to others while the job is paused.
    pub parkable: bool,
    /// What to do when the context is full.
    pub overflow: Overflow,
    /// Tokens at the front that never go when it is.
    pub n_keep: usize,
    /// The outside.
    pub flow: Arc<dyn Flow>,
    /// Where rows and the end go.
    pub replies: Sender<Reply>,
}

/// How a job ended.
#[derive(Debug)]
pub enum End {
    /// The goal was reached, or the generator stopped.
    Done,
    /// Cancelled by those outside.
    Cancelled,
    /// The context is full.
    ContextFull,
    /// Paused for long while others waited: the sequence must be given up.
    Parked,
    /// It failed.
    Failed(Error),
}

/// From the decoder to a sequence's thread.
pub enum Reply {
    /// The logits to draw from, a copy; comes back with the answer to be used again.
    Row(Vec<f32>),
    /// The job is over.
    Ended {
        /// The generator that came with the job.
        generator: Option<Box<dyn Generator>>,
        /// How.
        end: End,
        /// Log-probabilities, where the goal was to score.
        scores: Vec<f32>,
        /// Tokens that the sequence was to hold at the end: the prompt and what was drawn.
        tokens: Vec<Token>,
    },
}

/// What a sequence holds, to be put back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SavedState {
    /// Its tokens.
    pub tokens: Vec<Token>,
    /// How many of them serve as a prefix for others (see `Cells::exact`).
    pub n_exact: usize,
    /// The bytes of its cells.
    pub bytes: Vec<u8>,
}

/// A change of a sequence's memory while no job runs on it.
#[derive(Debug)]
pub enum MemoryOp {
    /// Remove everything.
    Clear,
    /// Remove these ranges and close the gaps.
    Erase(Vec<(usize, usize)>),
    /// Let another sequence, which is cleared first, have the same tokens.
    CopyTo(Slot, Holder),
    /// Take the tokens and the bytes of the state.
    Save,
    /// Put tokens and state back.
    Restore(SavedState),
}

/// What a memory operation gives back.
#[derive(Debug)]
pub enum MemoryReply {
    /// It was done.
    Done,
    /// Tokens must be evaluated again for it: these shall be the sequence's.
    Reevaluate(Vec<Token>),
    /// The sequence's cells had to go to others: evaluate these tokens again, then ask once more.
    Lost(Vec<Token>),
    /// Tokens and state.
    State(SavedState),
}

/// Everything the decoder is told.
pub enum Message {
    /// A sequence has work.
    Begin(Box<Job>),
    /// The answer to [`Reply::Row`].
    Drawn {
        /// The sequence.
        slot: Slot,
        /// What the generator said.
        step: Step,
        /// The row's buffer.
        row: Vec<f32>,
    },
    /// Change a sequence's memory.
    Memory {
        /// The sequence.
        slot: Slot,
        /// Who holds it: what others left in it is not the holder's.
        holder: Holder,
        /// The holder's chat.
        chat: Chat,
        /// How.
        op: MemoryOp,
        /// Where the outcome goes.
        reply: Sender<Result<MemoryReply>>,
    },
    /// A chat is over: what it left is nobody's.
    Forget(Chat),
    /// Something that the decoder looks at has changed (a cancel, a reader, a waiting caller).
    Wake,
    /// End everything and free the context.
    Close,
}

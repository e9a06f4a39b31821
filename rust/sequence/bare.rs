//! The bare loop: what llama.cpp does when nothing stands round it, for `llamactor bench` to show beside predictions.
//!
//! A `llama_context` of its own with the same parameters, on one thread: fill the batch, decode, take the likeliest
//! token, again. Nobody waits for a turn, reads a piece or stops at a text.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Instant;

use super::actor::STACK_BYTES;
use super::{Done, logits};
use crate::context;
use crate::error::{Error, Result};
use crate::llama::{Batch, CancelFlags, Context, ContextParams, Decoded, Token};
use crate::model::Model;

/// Replies of the bare loop and what they took.
#[derive(Debug)]
pub struct BareReplies {
    /// Seconds until every sequence had its first token.
    pub first: f64,
    /// Seconds until every sequence had its last one.
    pub total: f64,
    /// What was generated, for each prompt.
    pub tokens: Vec<Vec<Token>>,
}

/// One run: a reply of `length` tokens to each prompt.
struct Run {
    prompts: Vec<Vec<Token>>,
    length: usize,
    cancel: Arc<AtomicBool>,
    done: Done<BareReplies>,
}

/// The thread that has the context of a bare loop; it ends with this.
pub struct BareLoop {
    inbox: Sender<Run>,
    thread: JoinHandle<()>,
}

impl BareLoop {
    /// Makes the context. Blocks while llama.cpp allocates.
    ///
    /// # Errors
    /// What making the context failed with.
    pub fn start(model: &Arc<Model>, params: ContextParams) -> Result<Self> {
        let (inbox, runs) = channel();
        let (report, reported) = channel();
        let (model, params) = (Arc::clone(model), context::with_outputs(params));
        let thread = std::thread::Builder::new()
            .name("llamactor-bare".into())
            .stack_size(STACK_BYTES)
            .spawn(move || match context::open(&model, &params) {
                Ok(context) => {
                    let _ = report.send(Ok(()));
                    Bare::new(context).serve(&runs);
                }
                Err(error) => drop(report.send(Err(error))),
            })
            .map_err(|source| Error::Io { context: "cannot start the bare loop's thread".into(), source })?;
        reported.recv().map_err(|_| Error::WorkerCrashed("the bare loop died while making its context".into()))??;
        Ok(Self { inbox, thread })
    }

    /// Generates `length` tokens after each prompt, all of them in one batch per step; runs come one after the other.
    pub fn run(&self, prompts: Vec<Vec<Token>>, length: usize, cancel: Arc<AtomicBool>, done: Done<BareReplies>) {
        if let Err(refused) = self.inbox.send(Run { prompts, length, cancel, done }) {
            (refused.0.done)(Err(Error::WorkerCrashed("the bare loop's thread died".into())));
        }
    }

    /// Frees the context and waits until that is done.
    pub fn close(self) {
        drop(self.inbox);
        let _ = self.thread.join();
    }
}

/// A context and the batch that it evaluates.
struct Bare {
    context: Context,
    batch: Batch,
    cancel: CancelFlags,
}

impl Bare {
    fn new(context: Context) -> Self {
        let batch = Batch::new(context.n_batch());
        Self { context, batch, cancel: CancelFlags::new(Arc::default()) }
    }

    fn serve(&mut self, runs: &Receiver<Run>) {
        for run in runs {
            self.cancel = CancelFlags::new(run.cancel);
            let replies = self.check(&run.prompts, run.length).and_then(|()| self.generate(&run.prompts, run.length));
            (run.done)(replies);
        }
    }

    fn check(&self, prompts: &[Vec<Token>], length: usize) -> Result<()> {
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
        let most = self.context.n_seq_max().min(self.context.n_outputs_max());
        if !(1..=most).contains(&prompts.len()) || prompts.iter().any(Vec::is_empty) || length == 0 {
            return Err(Error::Value(format!(
                "{} prompts with replies of {length} tokens; 1 to {most} prompts and at least one token each are possible",
                prompts.len()
            )));
        }
        if longest + length > self.context.n_ctx_seq() {
            return Err(Error::ContextOverflow(format!(
                "a prompt of {longest} tokens and {length} more; the context holds {}",
                self.context.n_ctx_seq()
            )));
        }
        Ok(())
    }

    fn generate(&mut self, prompts: &[Vec<Token>], length: usize) -> Result<BareReplies> {
        for sequence in 0..self.context.n_seq_max() as u32 {
            self.context.remove_from(sequence, 0);
        }
        let mut replies = vec![Vec::with_capacity(length); prompts.len()];
        let start = Instant::now();
        self.prefill(prompts, &mut replies)?;
        let first = start.elapsed().as_secs_f64();
        for step in 1..length {
            for (sequence, reply) in replies.iter().enumerate() {
                self.push(reply[step - 1], prompts[sequence].len() + step - 1, sequence, true)?;
            }
            self.decode()?;
            for (row, reply) in replies.iter_mut().enumerate() {
                reply.push(self.choice(row)?);
            }
        }
        Ok(BareReplies { first, total: start.elapsed().as_secs_f64(), tokens: replies })
    }

    /// Evaluates the prompts in full batches and draws the first token of each reply.
    fn prefill(&mut self, prompts: &[Vec<Token>], replies: &mut [Vec<Token>]) -> Result<()> {
        let mut pending = Vec::new();
        for (sequence, prompt) in prompts.iter().enumerate() {
            for (position, &token) in prompt.iter().enumerate() {
                if self.batch.len() == self.context.n_batch() {
                    self.draw_first(&mut pending, replies)?;
                }
                let output = position + 1 == prompt.len();
                if output {
                    pending.push((sequence, self.batch.len()));
                }
                self.push(token, position, sequence, output)?;
            }
        }
        self.draw_first(&mut pending, replies)
    }

    fn draw_first(&mut self, pending: &mut Vec<(usize, usize)>, replies: &mut [Vec<Token>]) -> Result<()> {
        self.decode()?;
        for (sequence, row) in pending.drain(..) {
            replies[sequence].push(self.choice(row)?);
        }
        Ok(())
    }

    fn push(&mut self, token: Token, position: usize, sequence: usize, output: bool) -> Result<()> {
        let pushed = self.batch.push(token, position, sequence as u32, output);
        pushed.map(drop).ok_or_else(|| Error::Decode("the batch is full".into()))
    }

    /// Evaluates the batch and empties it.
    fn decode(&mut self) -> Result<()> {
        let decoded = self.context.decode(&mut self.batch, &self.cancel);
        self.batch.clear();
        match decoded? {
            Decoded::Done => Ok(()),
            Decoded::Aborted => Err(Error::Cancelled),
            Decoded::NoRoom => Err(Error::Decode("the cache has no room for the batch; choose a larger one".into())),
        }
    }

    fn choice(&mut self, row: usize) -> Result<Token> {
        let row = self.context.logits(row)?;
        logits::argmax(row).ok_or_else(|| Error::Decode("every token is impossible".into()))
    }
}

//! The thread of a sequence: prompt → prefill → (sample → text → next)* → done, one command after the other.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Instant;

use super::calling;
use super::generation::Generation;
use super::grammar::Constraint;
use super::lease::{Lease, Owner, Sequences, Ticket};
use super::sampler::{Sampler, Vocabulary};
use super::state::{self, Fingerprint};
use super::text::segments::Parts;
use super::{Done, Outcome, Prompt, Request, Sink, StopReason};
use crate::context::alarms::Late;
use crate::context::job::{
    Chat, Dropped, End, Flow, Generator, Goal, Job, MemoryOp, MemoryReply, Message, Overflow, Reply,
};
use crate::context::parking::Source;
use crate::context::{Shared, Slot};
use crate::error::{Error, Result, closed};
use crate::llama::Token;

/// The tokeniser's regular expressions recurse.
pub const STACK_BYTES: usize = 16 * 1024 * 1024;

/// A prompt that must be cut leaves at most this share of the context for the answer, as one over this.
const ANSWER_PARTS: usize = 4;

/// A prediction that waits for its sequence.
pub struct Prediction {
    pub request: Request,
    pub sink: Arc<dyn Sink>,
}

impl Prediction {
    pub fn fail(self, error: Error) {
        let end = match error {
            // It left the queue: a plain cancel, unless its context was closed.
            Error::Cancelled => cancelled(&*self.sink),
            error => End::Failed(error),
        };
        finish_early(&*self.sink, end);
    }
}

/// A prediction in the queue of its sequence. It can leave before its turn comes.
pub struct Queued(Mutex<Option<Prediction>>);

impl Queued {
    pub(super) fn new(prediction: Prediction) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Some(prediction))))
    }

    /// Its turn has come, or it leaves: whoever takes it first ends it.
    fn take(&self) -> Option<Prediction> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Ends it if its turn has not come. Returns whether it was still waiting.
    pub fn leave(&self, error: Error) -> bool {
        let prediction = self.take();
        let waited = prediction.is_some();
        if let Some(prediction) = prediction {
            prediction.fail(error);
        }
        waited
    }
}

impl Late for Queued {
    fn late(&self) {
        self.leave(Error::DeadlineExceeded("the deadline passed while waiting behind others on the sequence".into()));
    }
}

/// A generation whose sequence was given up while its reader lagged.
pub struct Parked {
    generation: Box<Generation>,
    tokens: Vec<Token>,
    terms: Terms,
}

/// What a job needs of its request.
#[derive(Clone, Copy)]
struct Terms {
    priority: i32,
    deadline: Option<Instant>,
    deterministic: bool,
    overflow: Option<Overflow>,
    n_keep: usize,
}

impl Terms {
    fn of(request: &Request) -> Self {
        Self {
            priority: request.priority,
            deadline: request.deadline,
            deterministic: request.deterministic,
            overflow: request.overflow,
            n_keep: request.chat.as_ref().map_or(0, |chat| chat.n_keep),
        }
    }

    /// Of work that nobody waits for in a hurry.
    const PLAIN: Self = Self { priority: 0, deadline: None, deterministic: false, overflow: None, n_keep: 0 };
}

/// What a generation is to work on.
struct Work {
    tokens: Vec<Token>,
    dropped: Option<Dropped>,
    terms: Terms,
    parkable: bool,
}

/// What a sequence is asked.
pub enum Command {
    /// For a holder, who may have closed the sequence meanwhile unless this was to be the last command.
    Leased {
        ticket: Ticket,
        last: bool,
        command: Box<Command>,
    },
    Predict(Arc<Queued>),
    Resume(Box<Parked>),
    Prefill {
        prompt: Prompt,
        cancel: Arc<AtomicBool>,
        done: Done<usize>,
    },
    Score {
        tokens: Vec<Token>,
        cancel: Arc<AtomicBool>,
        done: Done<Vec<f32>>,
    },
    Fork {
        lease: Lease,
        done: Done<Lease>,
    },
    Erase {
        ranges: Vec<(usize, usize)>,
        cancel: Arc<AtomicBool>,
        done: Done<()>,
    },
    Clear {
        done: Done<()>,
    },
    Save {
        path: PathBuf,
        note: Vec<u8>,
        done: Done<()>,
    },
    Load {
        path: PathBuf,
        done: Done<()>,
    },
    /// The context is closing.
    End,
}

/// A command on its way. One that is dropped unopened, because the actor ended, is refused: nobody waits for ever.
pub struct Envelope(Option<Command>);

impl Envelope {
    pub fn new(command: Command) -> Self {
        Self(Some(command))
    }

    fn open(mut self) -> Option<Command> {
        self.0.take()
    }
}

impl Drop for Envelope {
    fn drop(&mut self) {
        if let Some(command) = self.0.take() {
            command.refuse(closed("context"));
        }
    }
}

impl Command {
    /// Answers a command that cannot be carried out.
    pub fn refuse(self, error: Error) {
        match self {
            Self::Leased { ticket, command, .. } => {
                command.refuse(error);
                drop(ticket);
            }
            Self::Predict(queued) => drop(queued.leave(error)),
            Self::Resume(parked) => parked.generation.finish(End::Failed(error)),
            Self::Prefill { done, .. } => done(Err(error)),
            Self::Score { done, .. } => done(Err(error)),
            Self::Fork { done, .. } => done(Err(error)),
            Self::Erase { done, .. } | Self::Clear { done } | Self::Save { done, .. } | Self::Load { done, .. } => {
                done(Err(error));
            }
            Self::End => {}
        }
    }
}

/// A cancel flag for operations without a reader.
struct Cancel(Arc<AtomicBool>);

impl Flow for Cancel {
    fn cancel_flag(&self) -> &Arc<AtomicBool> {
        &self.0
    }
}

pub struct Actor {
    slot: Slot,
    shared: Arc<Shared>,
    sequences: Weak<Sequences>,
    commands: Receiver<Envelope>,
    reply_sender: Sender<Reply>,
    replies: Receiver<Reply>,
}

/// What a job came to.
struct Ended {
    generation: Option<Box<Generation>>,
    end: End,
    scores: Vec<f32>,
    tokens: Vec<Token>,
}

impl Actor {
    pub fn new(slot: Slot, shared: Arc<Shared>, sequences: Weak<Sequences>, commands: Receiver<Envelope>) -> Self {
        let (reply_sender, replies) = channel();
        Self { slot, shared, sequences, commands, reply_sender, replies }
    }

    /// Carries commands out until the context closes; what is still waiting then is refused by its envelope.
    pub fn run(self) {
        while let Some(command) = self.commands.recv().ok().and_then(Envelope::open) {
            match command {
                Command::End => break,
                command => self.carry_out(command),
            }
        }
    }

    /// Only the holder's commands come here; the hold lasts until they are done.
    fn carry_out(&self, command: Command) {
        let Command::Leased { ticket, last, command } = command else { return };
        if self.shared.is_closing() {
            return command.refuse(closed("context"));
        }
        if ticket.is_closed() && !last {
            return command.refuse(closed("sequence"));
        }
        let owner = ticket.owner();
        // The hold ends before anybody hears of the outcome: who does may want the sequence.
        match *command {
            Command::Predict(queued) => match queued.take() {
                Some(prediction) => self.predict(ticket, prediction, last),
                None => drop(ticket),
            },
            Command::Resume(parked) => self.resume(ticket, *parked),
            Command::Prefill { prompt, cancel, done } => answer(self.prefill(owner, prompt, cancel), ticket, done),
            Command::Score { tokens, cancel, done } => answer(self.score(owner, tokens, cancel), ticket, done),
            Command::Fork { lease, done } => answer(self.fork(owner, lease), ticket, done),
            Command::Erase { ranges, cancel, done } => answer(self.erase(owner, ranges, cancel), ticket, done),
            Command::Clear { done } => answer(self.change(owner, || MemoryOp::Clear).map(drop), ticket, done),
            Command::Save { path, note, done } => answer(self.save(owner, &path, &note), ticket, done),
            Command::Load { path, done } => answer(self.load(owner, &path), ticket, done),
            Command::Leased { .. } | Command::End => {}
        }
    }

    // ---- predictions ----------------------------------------------------------------------------------------------

    fn predict(&self, ticket: Ticket, prediction: Prediction, parkable: bool) {
        let Prediction { request, sink } = prediction;
        if sink.cancel_flag().load(Ordering::Relaxed) {
            drop(ticket);
            return finish_early(&*sink, cancelled(&*sink));
        }
        let terms = Terms::of(&request);
        let dropped = request.chat.as_ref().and_then(|chat| chat.dropped.clone());
        match self.prepare(request, &sink) {
            Ok((generation, tokens)) => {
                let parkable = parkable && !terms.deterministic;
                self.fetch(ticket.owner(), &tokens);
                self.generate(ticket, generation, Work { tokens, dropped, terms, parkable });
            }
            Err(error) => {
                drop(ticket);
                finish_early(&*sink, End::Failed(error));
            }
        }
    }

    /// Tokenises the prompt and builds what the generation needs.
    fn prepare(&self, request: Request, sink: &Arc<dyn Sink>) -> Result<(Box<Generation>, Vec<Token>)> {
        let mut tokens = self.tokenize(&request.prompt, request.response_prefix.as_deref())?;
        if let Some((start, n_dropped)) = self.fit(&mut tokens, &request)? {
            sink.shifted(start, n_dropped);
        }
        let model = self.shared.model()?;
        let needs_clock = request.text.batching.is_some();
        let ignore_eos = request.sampler.ignore_eos;
        let reasoning = calling::segments_of(&model, request.reasoning.clone(), request.calls.as_ref())?;
        let constraint = match &request.constraint {
            Some(spec) => Some(Box::new(Constraint::new(spec, &model, reasoning.as_ref())?)),
            None => None,
        };
        let text = calling::text_of(&model, reasoning, request.calls, request.text)?;
        let mut generation = Box::new(Generation {
            sampler: self.sampler(request.sampler)?,
            text,
            constraint,
            sink: Arc::clone(sink),
            model: Arc::clone(model.llama()),
            ignore_eos,
            max_tokens: request.max_tokens,
            room: self.room(tokens.len(), request.overflow),
            started: Instant::now(),
            n_drawn: 0,
            needs_clock,
            piece: Vec::new(),
            shown: Parts::default(),
            ended: None,
            error: None,
        });
        generation.sampler.prime(&tokens)?;
        generation.begin_with(request.response_prefix.as_deref().unwrap_or_default())?;
        Ok((generation, tokens))
    }

    /// Tokens that can follow a prompt until the context is full; the last one need not be evaluated.
    fn room(&self, n_prompt: usize, overflow: Option<Overflow>) -> usize {
        match overflow {
            None | Some(Overflow::Stop) => self.shared.info.context_size.saturating_sub(n_prompt) + 1,
            Some(_) => usize::MAX,
        }
    }

    /// Brings what a chat left on disk into memory, where the decoder finds it, and makes room for what it parks.
    fn fetch(&self, owner: Owner, tokens: &[Token]) {
        let parking = &self.shared.parking;
        if owner.chat != 0 {
            parking.fetch(owner.chat, tokens, self.shared.info.memory.is_divisible());
        }
        parking.spill();
    }

    fn sampler(&self, spec: super::sampler::SamplerSpec) -> Result<Sampler> {
        let model = self.shared.model()?;
        let vocabulary = Vocabulary {
            size: model.llama().n_vocab(),
            newline: model.llama().special_tokens().nl,
            eog: model.eog_tokens(),
            suppressed: model.suppressed_tokens(),
            context_size: self.shared.info.context_size,
            model: Some(model.llama()),
        };
        Sampler::new(spec, vocabulary)
    }

    fn tokenize(&self, prompt: &Prompt, response_prefix: Option<&str>) -> Result<Vec<Token>> {
        let model = self.shared.model()?;
        let tokens = match (prompt, response_prefix) {
            (Prompt::Text { text, parse_special }, None) => model.tokenize_prompt(text, *parse_special)?,
            (Prompt::Text { text, parse_special }, Some(prefix)) => {
                model.tokenize_prompt(&format!("{text}{prefix}"), *parse_special)?
            }
            (Prompt::Tokens { tokens, .. }, None) => tokens.clone(),
            (Prompt::Tokens { tokens, parse_special }, Some(prefix)) => {
                [tokens.clone(), model.tokenize_continuation(prefix, *parse_special)?].concat()
            }
        };
        if let Some(&token) = tokens.iter().find(|&&token| !model.llama().contains(token)) {
            return Err(model.llama().outside(token));
        }
        match tokens.is_empty() {
            true => Err(Error::Value("the prompt is empty: it has no tokens, and this model adds no BOS token".into())),
            false => Ok(tokens),
        }
    }

    /// Cuts a prompt that is too long, where the caller allows it; says after how many tokens how many went.
    fn fit(&self, tokens: &mut Vec<Token>, request: &Request) -> Result<Option<(usize, usize)>> {
        let limit = self.shared.info.context_size;
        if tokens.len() <= limit {
            return Ok(None);
        }
        let reserve = (limit / ANSWER_PARTS).min(request.max_tokens.unwrap_or(usize::MAX)).max(1);
        let room = limit.saturating_sub(reserve).max(1);
        match request.overflow {
            None | Some(Overflow::Stop) => Err(Error::ContextOverflow(format!(
                "the prompt has {} tokens but the context holds {limit}; shorten it, raise context_size, or choose \
                 overflow=\"truncate_middle\" or \"rolling_window\"",
                tokens.len()
            ))),
            Some(overflow) => {
                let dropped = tokens.len() - room;
                let start = if overflow == Overflow::RollingWindow { 1.min(room - 1) } else { room / 2 };
                tokens.drain(start..start + dropped);
                Ok(Some((start, dropped)))
            }
        }
    }

    /// Runs a generation to its end, or until its sequence is needed by others.
    fn generate(&self, ticket: Ticket, generation: Box<Generation>, work: Work) {
        let Work { tokens, dropped, terms, parkable } = work;
        let sink = Arc::clone(&generation.sink);
        let flow = Arc::clone(&sink).as_flow();
        if generation.is_complete() {
            return self.evaluate_only(ticket, generation, tokens, terms, flow);
        }
        let n_drawn_before = generation.n_drawn;
        let cheap = generation.is_cheap();
        let (along, mut here) =
            if cheap { (Some(generation as Box<dyn Generator>), None) } else { (None, Some(generation)) };
        self.begin(Job { parkable, dropped, ..self.job(ticket.owner(), tokens, Goal::Generate(along), terms, flow) });
        let ended = self.attend(&mut here);
        let Some(generation) = here.or(ended.generation) else {
            drop(ticket);
            return finish_early(&*sink, ended.end);
        };
        let chat = ticket.owner().chat;
        let n_drawn = generation.n_drawn - n_drawn_before;
        self.shared.usage(self.slot).predicted.fetch_add(n_drawn as u64, Ordering::Relaxed);
        drop(ticket);
        match ended.end {
            End::Parked => self.park(Parked { generation, tokens: ended.tokens, terms }, chat),
            end => generation.finish(end),
        }
    }

    /// `max_tokens=0`, or a response prefix after which nothing may follow: the prompt is evaluated and nothing drawn.
    fn evaluate_only(
        &self,
        ticket: Ticket,
        mut generation: Box<Generation>,
        tokens: Vec<Token>,
        terms: Terms,
        flow: Arc<dyn Flow>,
    ) {
        self.begin(self.job(ticket.owner(), tokens, Goal::Evaluate, terms, flow));
        let ended = self.attend(&mut None);
        drop(ticket);
        generation.ended.get_or_insert((StopReason::MaxTokens, None));
        generation.finish(ended.end);
    }

    fn park(&self, parked: Parked, chat: Chat) {
        let sink = Arc::clone(&parked.generation.sink);
        let sequences = self.sequences.clone();
        if let Some(sequences) = sequences.upgrade() {
            sequences.remember_parked(&sink);
        }
        sink.parked(Box::new(move |end| match (end, sequences.upgrade()) {
            (Some(end), _) => parked.generation.finish(end),
            (None, None) => parked.generation.finish(End::Failed(closed("context"))),
            (None, Some(sequences)) => {
                let Terms { priority, deadline, .. } = parked.terms;
                let sink = Arc::clone(&parked.generation.sink);
                sequences.enter(&sink, chat, priority, deadline, move |lease| match lease {
                    Ok(lease) => lease.send_last(Command::Resume(Box::new(parked))),
                    Err(Error::Cancelled) => {
                        let end = cancelled(&*parked.generation.sink);
                        parked.generation.finish(end);
                    }
                    Err(error) => parked.generation.finish(End::Failed(error)),
                });
            }
        }));
    }

    fn resume(&self, ticket: Ticket, parked: Parked) {
        let work = Work { tokens: parked.tokens, dropped: None, terms: parked.terms, parkable: true };
        self.fetch(ticket.owner(), &work.tokens);
        self.generate(ticket, parked.generation, work);
    }

    // ---- jobs -----------------------------------------------------------------------------------------------------

    fn job(&self, owner: Owner, tokens: Vec<Token>, goal: Goal, terms: Terms, flow: Arc<dyn Flow>) -> Job {
        Job {
            slot: self.slot,
            holder: owner.holder,
            chat: owner.chat,
            dropped: None,
            tokens,
            goal,
            priority: terms.priority,
            deadline: terms.deadline,
            alone: terms.deterministic,
            parkable: false,
            overflow: terms.overflow.unwrap_or_default(),
            n_keep: terms.n_keep,
            flow,
            replies: self.reply_sender.clone(),
        }
    }

    fn begin(&self, job: Job) {
        self.shared.send(Message::Begin(Box::new(job)));
    }

    /// Answers the decoder until the job is over.
    fn attend(&self, generation: &mut Option<Box<Generation>>) -> Ended {
        loop {
            // The decoder may be gone: it answers every job before it goes, unless the job came too late.
            let reply = match self.replies.recv_timeout(LIVENESS_CHECK) {
                Ok(reply) => reply,
                Err(_) if self.shared.has_ended() => match self.replies.try_recv() {
                    Ok(reply) => reply,
                    Err(_) => return Ended::failed(closed("context")),
                },
                Err(_) => continue,
            };
            match reply {
                Reply::Row(row) => self.draw(generation.as_deref_mut(), row),
                Reply::Ended { generator, end, scores, tokens } => {
                    let generation = generator.and_then(|generator| (generator as Box<dyn Any>).downcast().ok());
                    return Ended { generation, end, scores, tokens };
                }
            }
        }
    }

    fn draw(&self, generation: Option<&mut Generation>, row: Vec<f32>) {
        let Some(generation) = generation else { return };
        let drawn = catch_unwind(AssertUnwindSafe(|| generation.advance(&row)));
        let step = drawn.unwrap_or_else(|_| generation.fail(Error::WorkerCrashed("drawing a token panicked".into())));
        generation.sink.flush();
        self.shared.send(Message::Drawn { slot: self.slot, step, row });
    }

    /// Runs a job without a generation.
    fn run_job(&self, owner: Owner, tokens: Vec<Token>, goal: Goal, cancel: Arc<AtomicBool>) -> Result<Vec<f32>> {
        self.begin(self.job(owner, tokens, goal, Terms::PLAIN, Arc::new(Cancel(cancel))));
        let ended = self.attend(&mut None);
        match ended.end {
            End::Done => Ok(ended.scores),
            End::Cancelled | End::Parked => Err(Error::Cancelled),
            End::ContextFull => Err(self.too_long(ended.tokens.len())),
            End::Failed(error) => Err(error),
        }
    }

    fn too_long(&self, n_tokens: usize) -> Error {
        Error::ContextOverflow(format!(
            "{n_tokens} tokens do not fit into a context of {}; other sequences may hold some of its cells",
            self.shared.info.context_size
        ))
    }

    // ---- the other commands ---------------------------------------------------------------------------------------

    fn prefill(&self, owner: Owner, prompt: Prompt, cancel: Arc<AtomicBool>) -> Result<usize> {
        let tokens = self.tokenize(&prompt, None)?;
        let n_tokens = tokens.len();
        if n_tokens > self.shared.info.context_size {
            return Err(self.too_long(n_tokens));
        }
        let counter = Arc::new(Counted { cancel, n_cached: std::sync::atomic::AtomicUsize::new(0) });
        let flow: Arc<dyn Flow> = counter.clone();
        self.fetch(owner, &tokens);
        self.begin(self.job(owner, tokens, Goal::Evaluate, Terms::PLAIN, flow));
        match self.attend(&mut None).end {
            End::Done => Ok(n_tokens - counter.n_cached.load(Ordering::Relaxed)),
            End::Cancelled | End::Parked => Err(Error::Cancelled),
            End::ContextFull => Err(self.too_long(n_tokens)),
            End::Failed(error) => Err(error),
        }
    }

    fn score(&self, owner: Owner, tokens: Vec<Token>, cancel: Arc<AtomicBool>) -> Result<Vec<f32>> {
        let model = self.shared.model()?;
        if let Some(&token) = tokens.iter().find(|&&token| !model.llama().contains(token)) {
            return Err(model.llama().outside(token));
        }
        let mut all = self.shared.tokens(self.slot);
        let from = all.len();
        all.extend_from_slice(&tokens);
        if all.len() > self.shared.info.context_size {
            return Err(self.too_long(all.len()));
        }
        let mut scores = self.run_job(owner, all, Goal::Score(from), cancel)?;
        if from == 0 {
            // Nothing comes before the first token, so nothing predicts it.
            scores.insert(0, f32::NAN);
        }
        Ok(scores)
    }

    fn fork(&self, owner: Owner, lease: Lease) -> Result<Lease> {
        match self.change(owner, || MemoryOp::CopyTo(lease.slot(), lease.holder()))? {
            MemoryReply::Reevaluate(tokens) => {
                let prompt = Prompt::Tokens { tokens, parse_special: false };
                let (report, reported) = channel();
                lease.prefill(prompt, Arc::default(), Box::new(move |outcome| drop(report.send(outcome))));
                reported.recv().map_err(|_| closed("context"))??;
                Ok(lease)
            }
            _ => Ok(lease),
        }
    }

    fn erase(&self, owner: Owner, ranges: Vec<(usize, usize)>, cancel: Arc<AtomicBool>) -> Result<()> {
        match self.change(owner, || MemoryOp::Erase(ranges.clone()))? {
            MemoryReply::Reevaluate(tokens) if !tokens.is_empty() => {
                self.run_job(owner, tokens, Goal::Evaluate, cancel).map(drop)
            }
            _ => Ok(()),
        }
    }

    fn fingerprint(&self) -> Result<Fingerprint> {
        Ok(Fingerprint::new(self.shared.model()?.fingerprint(), &self.shared.layout))
    }

    fn save(&self, owner: Owner, path: &Path, note: &[u8]) -> Result<()> {
        match self.change(owner, || MemoryOp::Save)? {
            MemoryReply::State(saved) => state::write(path, self.fingerprint()?, &saved, note),
            _ => Ok(()),
        }
    }

    fn load(&self, owner: Owner, path: &Path) -> Result<()> {
        let saved = state::read(path, self.fingerprint()?)?;
        match self.change(owner, || MemoryOp::Restore(saved.clone()))? {
            MemoryReply::Reevaluate(tokens) => self.run_job(owner, tokens, Goal::Evaluate, Arc::default()).map(drop),
            _ => Ok(()),
        }
    }

    /// Changes the sequence's memory; what it lost to others is evaluated again first.
    fn change(&self, owner: Owner, op: impl Fn() -> MemoryOp) -> Result<MemoryReply> {
        loop {
            match self.ask(owner, op())? {
                // Others may take the cells again before the next question arrives.
                MemoryReply::Lost(tokens) => drop(self.run_job(owner, tokens, Goal::Evaluate, Arc::default())?),
                reply => return Ok(reply),
            }
        }
    }

    fn ask(&self, owner: Owner, op: MemoryOp) -> Result<MemoryReply> {
        let (reply, replied) = channel();
        self.shared.send(Message::Memory { slot: self.slot, holder: owner.holder, chat: owner.chat, op, reply });
        replied.recv().map_err(|_| closed("context"))?
    }
}

/// Lets the sequence go where its holder has closed it, then tells the outcome.
fn answer<T>(outcome: Result<T>, ticket: Ticket, done: Done<T>) {
    drop(ticket);
    done(outcome);
}

/// How long to wait for the decoder before asking whether it still lives.
const LIVENESS_CHECK: std::time::Duration = std::time::Duration::from_millis(500);

impl Ended {
    fn failed(error: Error) -> Self {
        Self { generation: None, end: End::Failed(error), scores: Vec::new(), tokens: Vec::new() }
    }
}

/// A flow that remembers how much was cached.
struct Counted {
    cancel: Arc<AtomicBool>,
    n_cached: std::sync::atomic::AtomicUsize,
}

impl Flow for Counted {
    fn cancel_flag(&self) -> &Arc<AtomicBool> {
        &self.cancel
    }

    fn admitted(&self, n_cached: usize, _n_total: usize, _source: Source) {
        self.n_cached.store(n_cached, Ordering::Relaxed);
    }
}

fn cancelled(sink: &dyn Sink) -> End {
    sink.cancel_error().map_or(End::Cancelled, End::Failed)
}

/// Ends a prediction that drew nothing.
pub fn finish_early(sink: &dyn Sink, end: End) {
    let (stop_reason, error) = match end {
        End::Failed(error) => (StopReason::Cancelled, Some(error)),
        End::ContextFull => (StopReason::ContextFull, None),
        End::Done | End::Cancelled | End::Parked => (StopReason::Cancelled, None),
    };
    sink.finish(Outcome { stop_reason, stop_string: None, error, completed: true });
}

//! The bare loop: what llama.cpp does when nothing stands round it.
//!
//! Every figure of `make bench` is a ratio to this program, so it uses the parameters of llamactor's own context and
//! the shortest loop they allow: fill the batch, `llama_decode`, argmax, again. It stays alive and takes one command
//! per line, so that a bench can interleave its rounds with llamactor's and never compare two moments of a shared
//! machine:
//!
//! ```text
//! raw MODEL.gguf [--threads 1] [--context 8192] [--sequences 8] [--batch 512] [--ubatch 512]
//!                [--flash auto|on|off] [--extra-buffers on|off]
//! info                                    the parameters in use
//! prompt <n> [seed]                       the token ids that seed's prompt of n tokens consists of
//! single <prompt> <generated> [seed]      one sequence
//! batched <n> <prompt> <generated>        n sequences (seeds 0..n), one batch per step
//! telling <n> <prompt> <generated>        the same, waking a thread after every step: the least that it costs to
//!                                         hand tokens to anybody else
//! prefill <n>                             cold prompt up to its first token
//! abort <n> [delay_ms]                    from the abort flag, raised in a prefill of n tokens, to the return
//! depth <from> <to>                       cost per token at two depths of one run
//! quit
//! ```
//!
//! Answers are one JSON object per line; times are in seconds, `depth` in microseconds per token.
#![allow(unsafe_code, reason = "the point is to call llama.cpp with nothing in between")]

use std::collections::HashMap;
use std::ffi::CString;
use std::fs::File;
use std::io::{BufRead, Read, Write};
use std::os::raw::{c_char, c_void};
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use llama_cpp_sys_2 as sys;
use rustix::event::{EventfdFlags, eventfd};

type Token = i32;
type Answer = Result<String, String>;

/// Tokens over which `depth` averages; the window ends at the depth it is named after.
const WINDOW: usize = 100;

/// Raised by `abort`, read by llama.cpp at every node of the graph, as llamactor's flag is.
static ABORT: AtomicBool = AtomicBool::new(false);

extern "C" fn aborted(_data: *mut c_void) -> bool {
    ABORT.load(Ordering::Relaxed)
}

extern "C" fn silence(_level: sys::ggml_log_level, _text: *const c_char, _data: *mut c_void) {}

/// What may differ between two runs; the defaults are llamactor's.
struct Options {
    threads: i32,
    context: u32,
    sequences: u32,
    batch: u32,
    ubatch: u32,
    flash: sys::llama_flash_attn_type,
    extra_buffers: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            threads: 1,
            context: 8192,
            sequences: 8,
            batch: 512,
            ubatch: 512,
            flash: sys::LLAMA_FLASH_ATTN_TYPE_AUTO,
            extra_buffers: true,
        }
    }
}

impl Options {
    fn set(&mut self, flag: &str, value: &str) -> Result<(), String> {
        match flag {
            "--threads" => self.threads = number(value)?,
            "--context" => self.context = number(value)?,
            "--sequences" => self.sequences = number(value)?,
            "--batch" => self.batch = number(value)?,
            "--ubatch" => self.ubatch = number(value)?,
            "--flash" => self.flash = flash(value)?,
            "--extra-buffers" => self.extra_buffers = value == "on",
            _ => return Err(format!("unknown option {flag}")),
        }
        Ok(())
    }

    fn context_params(&self) -> sys::llama_context_params {
        // SAFETY: returns a plain value.
        let mut params = unsafe { sys::llama_context_default_params() };
        params.n_ctx = self.context;
        params.n_batch = self.batch;
        params.n_ubatch = self.ubatch;
        params.n_seq_max = self.sequences;
        params.n_outputs_max = self.sequences.max(32);
        params.n_threads = self.threads;
        params.n_threads_batch = self.threads;
        params.flash_attn_type = self.flash;
        params.abort_callback = Some(aborted);
        params.no_perf = true;
        params.swa_full = true;
        params.kv_unified = true;
        params
    }
}

fn number<T: std::str::FromStr>(text: &str) -> Result<T, String> {
    text.parse().map_err(|_| format!("{text:?} is no number in range"))
}

fn flash(text: &str) -> Result<sys::llama_flash_attn_type, String> {
    match text {
        "auto" => Ok(sys::LLAMA_FLASH_ATTN_TYPE_AUTO),
        "on" => Ok(sys::LLAMA_FLASH_ATTN_TYPE_ENABLED),
        "off" => Ok(sys::LLAMA_FLASH_ATTN_TYPE_DISABLED),
        _ => Err(format!("--flash takes auto, on or off, not {text:?}")),
    }
}

/// The compute threads; without OpenMP and without one of these ggml starts new threads for every graph.
struct Pool(*mut sys::ggml_threadpool);

impl Pool {
    fn attach(context: NonNull<sys::llama_context>, threads: i32) -> Self {
        if threads < 2 {
            return Self(null_mut());
        }
        // SAFETY: the pool is owned by the returned value, which outlives the context (see Raw's field order).
        unsafe {
            let mut params = sys::ggml_threadpool_params_default(threads);
            let pool = sys::ggml_threadpool_new(&raw mut params);
            sys::llama_attach_threadpool(context.as_ptr(), pool, pool);
            Self(pool)
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // SAFETY: made by ggml_threadpool_new or null, which is accepted; nothing computes on it any more.
        unsafe { sys::ggml_threadpool_free(self.0) }
    }
}

struct Model(NonNull<sys::llama_model>);

impl Model {
    fn load(path: &str, options: &Options) -> Result<Self, String> {
        let name = CString::new(path).map_err(|_| "NUL byte in the path".to_owned())?;
        // SAFETY: `name` lives through the call; a failed load is null.
        let model = unsafe {
            let mut params = sys::llama_model_default_params();
            params.use_extra_bufts = options.extra_buffers;
            sys::llama_model_load_from_file(name.as_ptr(), params)
        };
        NonNull::new(model).map(Self).ok_or_else(|| format!("{path} does not load"))
    }

    fn vocab(&self) -> *const sys::llama_vocab {
        // SAFETY: the model is alive as long as `self`.
        unsafe { sys::llama_model_get_vocab(self.0.as_ptr()) }
    }

    fn vocab_size(&self) -> usize {
        // SAFETY: as above; the size is never negative.
        unsafe { sys::llama_vocab_n_tokens(self.vocab()) as usize }
    }

    fn is_ordinary(&self, token: Token) -> bool {
        // SAFETY: callers pass ids below the size of the vocabulary.
        unsafe { !sys::llama_vocab_is_control(self.vocab(), token) && !sys::llama_vocab_is_eog(self.vocab(), token) }
    }
}

impl Drop for Model {
    fn drop(&mut self) {
        // SAFETY: loaded by llama.cpp; its context went first (see Raw's field order).
        unsafe { sys::llama_model_free(self.0.as_ptr()) }
    }
}

struct Context(NonNull<sys::llama_context>);

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: owned, freed once.
        unsafe { sys::llama_free(self.0.as_ptr()) }
    }
}

struct Batch {
    inner: sys::llama_batch,
    capacity: usize,
}

impl Batch {
    fn new(capacity: u32) -> Self {
        // SAFETY: allocates arrays of `capacity` rows, one sequence id each.
        let inner = unsafe { sys::llama_batch_init(capacity as i32, 0, 1) };
        Self { inner, capacity: capacity as usize }
    }

    fn is_full(&self) -> bool {
        self.inner.n_tokens as usize == self.capacity
    }

    /// Adds a row and returns its index.
    fn push(&mut self, token: Token, pos: usize, sequence: usize, output: bool) -> i32 {
        assert!(!self.is_full(), "a batch has no more than n_batch rows");
        let row = self.inner.n_tokens;
        // SAFETY: the arrays have `capacity` rows and `row` is below it.
        unsafe {
            let at = row as usize;
            *self.inner.token.add(at) = token;
            *self.inner.pos.add(at) = pos as i32;
            *self.inner.n_seq_id.add(at) = 1;
            **self.inner.seq_id.add(at) = sequence as i32;
            *self.inner.logits.add(at) = i8::from(output);
        }
        self.inner.n_tokens += 1;
        row
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        // SAFETY: allocated by llama_batch_init, freed once.
        unsafe { sys::llama_batch_free(self.inner) }
    }
}

/// One timed generation.
struct Run {
    prefill: Duration,
    /// When each step after the first token ended, counted from the end of the prefill.
    steps: Vec<Duration>,
}

impl Run {
    fn decode(&self) -> f64 {
        self.steps.last().map_or(0.0, Duration::as_secs_f64)
    }

    /// Mean microseconds per token of the window that ends at the given generated token.
    fn cost_at(&self, depth: usize) -> Result<f64, String> {
        let last = depth.checked_sub(2).and_then(|at| self.steps.get(at));
        let first = depth.checked_sub(2 + WINDOW).and_then(|at| self.steps.get(at));
        let (Some(last), Some(first)) = (last, first) else {
            return Err(format!("depth {depth} is not within the run, less {WINDOW} tokens"));
        };
        Ok((*last - *first).as_secs_f64() * 1e6 / WINDOW as f64)
    }
}

/// Model, context and batch. Fields drop in this order: the context before its threads and its model.
struct Raw {
    context: Context,
    _pool: Pool,
    batch: Batch,
    model: Model,
    options: Options,
    prefill_times: HashMap<usize, Duration>,
    /// Who is told of every step.
    listener: Option<Listener>,
}

impl Raw {
    fn open(path: &str, options: Options) -> Result<Self, String> {
        // SAFETY: the callback is a plain function; the backend is initialised once, before anything else.
        unsafe {
            sys::llama_log_set(Some(silence), null_mut());
            sys::llama_backend_init();
        }
        let model = Model::load(path, &options)?;
        // SAFETY: the model outlives the context (field order); a failure is null.
        let context = unsafe { sys::llama_init_from_model(model.0.as_ptr(), options.context_params()) };
        let context = NonNull::new(context).ok_or("the context cannot be created")?;
        Ok(Self {
            _pool: Pool::attach(context, options.threads),
            context: Context(context),
            batch: Batch::new(options.batch),
            model,
            options,
            prefill_times: HashMap::new(),
            listener: None,
        })
    }

    fn clear(&mut self) {
        ABORT.store(false, Ordering::Relaxed);
        // SAFETY: nothing computes; only the bookkeeping is reset, the buffers stay as they are.
        unsafe { sys::llama_memory_clear(sys::llama_get_memory(self.context.0.as_ptr()), false) }
        self.batch.inner.n_tokens = 0;
    }

    /// Evaluates the batch and empties it; the code is llama.cpp's (2: aborted).
    fn decode(&mut self) -> i32 {
        // SAFETY: rows are complete, tokens and sequences in range (checked where commands are read).
        let code = unsafe {
            let code = sys::llama_decode(self.context.0.as_ptr(), self.batch.inner);
            sys::llama_synchronize(self.context.0.as_ptr());
            code
        };
        self.batch.inner.n_tokens = 0;
        code
    }

    fn decode_all(&mut self) -> Result<(), String> {
        match self.decode() {
            0 => Ok(()),
            code => Err(format!("llama_decode returned {code}")),
        }
    }

    /// The greedy choice of a row of the last decode.
    fn choice(&self, row: i32) -> Token {
        // SAFETY: the row asked for logits, which hold one float per token of the vocabulary until the next decode.
        let logits = unsafe {
            let start = sys::llama_get_logits_ith(self.context.0.as_ptr(), row);
            std::slice::from_raw_parts(start, self.model.vocab_size())
        };
        argmax(logits)
    }

    /// Fixed pseudo-random ordinary tokens: the same for every run and for llamactor's rounds.
    fn prompt(&self, length: usize, seed: u64) -> Vec<Token> {
        let size = self.model.vocab_size() as u64;
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let draw = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 33) % size) as Token
        };
        std::iter::repeat_with(draw).filter(|&token| self.model.is_ordinary(token)).take(length).collect()
    }

    /// Evaluates the prompts together in full batches and returns the first token of each.
    fn prefill(&mut self, prompts: &[Vec<Token>]) -> Result<Vec<Token>, String> {
        let mut first = vec![0; prompts.len()];
        let mut pending = Vec::new();
        for (sequence, prompt) in prompts.iter().enumerate() {
            for (pos, &token) in prompt.iter().enumerate() {
                if self.batch.is_full() {
                    self.collect(&mut pending, &mut first)?;
                }
                let output = pos + 1 == prompt.len();
                let row = self.batch.push(token, pos, sequence, output);
                if output {
                    pending.push((sequence, row));
                }
            }
        }
        self.collect(&mut pending, &mut first)?;
        Ok(first)
    }

    /// Decodes and reads the choice of every row that asked for one.
    fn collect(&mut self, pending: &mut Vec<(usize, i32)>, tokens: &mut [Token]) -> Result<(), String> {
        self.decode_all()?;
        for (sequence, row) in pending.drain(..) {
            tokens[sequence] = self.choice(row);
        }
        Ok(())
    }

    fn generate(&mut self, prompts: &[Vec<Token>], length: usize) -> Result<Run, String> {
        self.check(prompts, length)?;
        self.clear();
        let mut steps = Vec::with_capacity(length);
        let start = Instant::now();
        let mut tokens = self.prefill(prompts)?;
        let prefill = start.elapsed();
        for step in 1..length {
            for (sequence, token) in tokens.iter().enumerate() {
                self.batch.push(*token, prompts[sequence].len() + step - 1, sequence, true);
            }
            self.decode_all()?;
            for (row, token) in tokens.iter_mut().enumerate() {
                *token = self.choice(row as i32);
            }
            if let Some(listener) = &mut self.listener {
                listener.tell(1);
            }
            steps.push(start.elapsed() - prefill);
        }
        Ok(Run { prefill, steps })
    }

    fn check(&self, prompts: &[Vec<Token>], length: usize) -> Result<(), String> {
        let cells: usize = prompts.iter().map(|prompt| prompt.len() + length).sum();
        if prompts.len() > self.options.sequences as usize {
            return Err(format!("{} sequences, at most {}", prompts.len(), self.options.sequences));
        }
        if prompts.iter().any(Vec::is_empty) || length == 0 {
            return Err("a prompt and a generation have at least one token".to_owned());
        }
        if cells > self.options.context as usize {
            return Err(format!("{cells} tokens, the context holds {}", self.options.context));
        }
        Ok(())
    }

    fn answer(&mut self, line: &str) -> Answer {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (command, rest) = words.split_first().ok_or("an empty command")?;
        let given = rest.iter().map(|word| number(word)).collect::<Result<Vec<usize>, _>>()?;
        match (*command, given[..].as_ref()) {
            ("info", []) => Ok(self.info()),
            ("prompt", [n]) => Ok(self.show_prompt(*n, 0)),
            ("prompt", [n, seed]) => Ok(self.show_prompt(*n, *seed)),
            ("single", [prompt, length]) => self.single(*prompt, *length, 0),
            ("single", [prompt, length, seed]) => self.single(*prompt, *length, *seed),
            ("batched", [n, prompt, length]) => self.batched(*n, *prompt, *length),
            ("telling", [n, prompt, length]) => self.telling(*n, *prompt, *length),
            ("prefill", [n]) => self.cold(*n),
            ("abort", [n]) => self.abort(*n, None),
            ("abort", [n, delay]) => self.abort(*n, Some(Duration::from_millis(*delay as u64))),
            ("depth", [from, to]) => self.depth(*from, *to),
            _ => Err(format!("{line:?} is no command")),
        }
    }

    fn info(&self) -> String {
        let o = &self.options;
        format!(
            r#"{{"threads":{},"context":{},"sequences":{},"batch":{},"ubatch":{},"vocab":{}}}"#,
            o.threads,
            o.context,
            o.sequences,
            o.batch,
            o.ubatch,
            self.model.vocab_size()
        )
    }

    fn show_prompt(&self, length: usize, seed: usize) -> String {
        format!(r#"{{"tokens":{:?}}}"#, self.prompt(length, seed as u64))
    }

    fn single(&mut self, prompt: usize, length: usize, seed: usize) -> Answer {
        let run = self.generate(&[self.prompt(prompt, seed as u64)], length)?;
        Ok(report(1, length, &run))
    }

    fn batched(&mut self, n: usize, prompt: usize, length: usize) -> Answer {
        let prompts: Vec<_> = (0..n as u64).map(|seed| self.prompt(prompt, seed)).collect();
        let run = self.generate(&prompts, length)?;
        Ok(report(n, length, &run))
    }

    fn telling(&mut self, n: usize, prompt: usize, length: usize) -> Answer {
        self.listener = Some(Listener::new().map_err(|error| error.to_string())?);
        let answer = self.batched(n, prompt, length);
        self.listener = None;
        answer
    }

    fn cold(&mut self, n: usize) -> Answer {
        let run = self.generate(&[self.prompt(n, 0)], 1)?;
        self.prefill_times.insert(n, run.prefill);
        Ok(format!(r#"{{"prefill":{:.9},"tokens":{n}}}"#, run.prefill.as_secs_f64()))
    }

    fn depth(&mut self, from: usize, to: usize) -> Answer {
        let run = self.generate(&[self.prompt(32, 0)], from.max(to))?;
        let (from_us, to_us) = (run.cost_at(from)?, run.cost_at(to)?);
        Ok(format!(r#"{{"from_us":{from_us:.3},"to_us":{to_us:.3}}}"#))
    }

    /// Without a delay the flag goes up two fifths into the prefill, as long as an earlier one took.
    fn abort(&mut self, n: usize, delay: Option<Duration>) -> Answer {
        if delay.is_none() && !self.prefill_times.contains_key(&n) {
            self.cold(n)?;
        }
        let delay = delay.unwrap_or_else(|| self.prefill_times[&n].mul_f64(0.4));
        let prompt = self.prompt(n, 0);
        self.check(std::slice::from_ref(&prompt), 1)?;
        self.clear();
        let flag = thread::spawn(move || {
            thread::sleep(delay);
            let raised = Instant::now();
            ABORT.store(true, Ordering::Relaxed);
            raised
        });
        let ended = self.prefill(&[prompt]);
        let returned = Instant::now();
        let raised = flag.join().map_err(|_| "the thread that aborts died".to_owned())?;
        let hit = ended.is_err();
        let latency = returned.saturating_duration_since(raised).as_secs_f64();
        Ok(format!(r#"{{"latency":{latency:.9},"aborted":{hit},"delay":{:.9}}}"#, delay.as_secs_f64()))
    }
}

/// A thread that sleeps until it is told something.
struct Listener {
    line: File,
    thread: Option<JoinHandle<()>>,
}

impl Listener {
    /// More than the steps that it can have missed.
    const END: u64 = 1 << 32;

    fn new() -> std::io::Result<Self> {
        let line = File::from(eventfd(0, EventfdFlags::CLOEXEC)?);
        let mut heard = line.try_clone()?;
        let listen = move || {
            let mut count = [0u8; 8];
            while heard.read_exact(&mut count).is_ok() && u64::from_ne_bytes(count) < Self::END {}
        };
        Ok(Self { line, thread: Some(thread::spawn(listen)) })
    }

    fn tell(&mut self, count: u64) {
        // Only a counter that overflows could refuse.
        let _ = self.line.write(&count.to_ne_bytes());
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.tell(Self::END);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// The index of the largest value, the first of equals; in two passes, which the compiler turns into vectors.
fn argmax(values: &[f32]) -> Token {
    let mut lanes = [f32::NEG_INFINITY; 16];
    let (rows, rest) = values.as_chunks::<16>();
    for row in rows {
        for (lane, value) in lanes.iter_mut().zip(row) {
            *lane = if *value > *lane { *value } else { *lane };
        }
    }
    let best = lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max);
    values.iter().position(|value| *value == best).unwrap_or(0) as Token
}

fn report(streams: usize, length: usize, run: &Run) -> String {
    format!(
        r#"{{"prefill":{:.9},"decode":{:.9},"tokens":{},"streams":{streams},"steps":{}}}"#,
        run.prefill.as_secs_f64(),
        run.decode(),
        streams * length,
        run.steps.len()
    )
}

fn parse(arguments: &[String]) -> Result<Option<(String, Options)>, String> {
    let mut options = Options::default();
    let mut path = None;
    let mut words = arguments.iter();
    while let Some(word) = words.next() {
        match word.as_str() {
            // what `cargo bench` adds
            "--bench" => {}
            flag if flag.starts_with("--") => {
                options.set(flag, words.next().ok_or_else(|| format!("{flag} needs a value"))?)?;
            }
            _ => path = Some(word.clone()),
        }
    }
    Ok(path.map(|path| (path, options)))
}

fn serve(mut raw: Raw) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", raw.info())?;
    out.flush()?;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        if line.trim() == "quit" {
            break;
        }
        let answer = raw.answer(&line).unwrap_or_else(|error| format!(r#"{{"error":{error:?}}}"#));
        writeln!(out, "{answer}")?;
        out.flush()?;
    }
    Ok(())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let Some((path, options)) = parse(&arguments)? else {
        println!("raw: driven by benches/ratios.py; usage: raw MODEL.gguf [options]");
        return Ok(());
    };
    Ok(serve(Raw::open(&path, options)?)?)
}

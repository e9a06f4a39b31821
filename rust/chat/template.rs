//! Rendering of chat templates: Jinja with Hugging Face's settings, and with bounds on everything.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, ErrorKind, Value};
use xxhash_rust::xxh3::xxh3_64;

use super::methods;
use super::spans::Alphabet;
use crate::error::{Error, Result};
use crate::llama::{Bounds, Unfinished, run_bounded};

/// Instructions that a rendering may execute; long histories take some hundred thousand.
pub const FUEL: u64 = 5_000_000;

/// Instructions for one short question; the longest known templates take some thousand.
pub const TRIAL_FUEL: u64 = 200_000;

/// Bytes that a rendering may write, what it captures included; a shaded text takes four per character.
const MAX_OUTPUT: usize = 64 * 1024 * 1024;

/// Longest template. The longest known ones have some 30 KB.
const MAX_SOURCE: usize = 1024 * 1024;

/// Parser and interpreter recurse; the time is that of a machine at its limits.
const BOUNDS: Bounds = Bounds { memory: 512 * 1024 * 1024, time: Duration::from_secs(20), stack: 64 * 1024 * 1024 };

/// Precedes what a template says with `raise_exception`.
const REFUSAL: &str = "\u{1}refused: ";

/// For models without a template: plain names before the contents.
pub const FALLBACK: &str = "\
{% for message in messages %}\
{% if message.role == 'system' %}{{ message.content }}\n\n\
{% elif message.role == 'assistant' %}Assistant: {{ message.content }}\n\n\
{% elif message.role == 'tool' %}Result: {{ message.content }}\n\n\
{% else %}User: {{ message.content }}\n\n\
{% endif %}{% endfor %}\
{% if add_generation_prompt %}Assistant:{% endif %}";

/// What ends an answer to the fallback template.
pub const FALLBACK_STOPS: [&str; 2] = ["\nUser:", "\nResult:"];

/// Why a template gives no text.
#[derive(Debug)]
pub enum Failure {
    /// It failed, refused the messages or went out of bounds.
    Final(Error),
    /// It uses what this renderer does not know, or knows otherwise.
    Unsupported(Error),
}

impl Failure {
    /// The error in either case.
    #[must_use]
    pub fn into_error(self) -> Error {
        match self {
            Self::Final(error) | Self::Unsupported(error) => error,
        }
    }
}

fn failure(reason: String) -> Failure {
    Failure::Final(Error::ChatTemplate(reason))
}

/// Renders a template on a thread of its own, within bounds.
///
/// # Errors
/// `ChatTemplate` with the cause.
pub fn render(
    source: &Arc<str>,
    context: &serde_json::Value,
    alphabet: &Arc<Alphabet>,
    fuel: u64,
) -> Result<String, Failure> {
    if source.len() > MAX_SOURCE {
        let size = source.len();
        return Err(failure(format!("the chat template has {size} bytes; at most {MAX_SOURCE} are read")));
    }
    if is_stopped(source) {
        return Err(too_large());
    }
    let (text, context, alphabet) = (Arc::clone(source), Value::from(Serde(context)), Arc::clone(alphabet));
    run_bounded("llamactor-template", BOUNDS, move || render_here(&text, context, &alphabet, fuel)).unwrap_or_else(
        |why| {
            Err(match why {
                Unfinished::Memory => {
                    remember_stopped(source);
                    too_large()
                }
                Unfinished::Time => {
                    failure(format!("the chat template runs for more than {} seconds", BOUNDS.time.as_secs()))
                }
                Unfinished::Panic => failure("the chat template crashes its interpreter".into()),
                Unfinished::NoThread(source) => {
                    Failure::Final(Error::Io { context: "cannot start the thread llamactor-template".into(), source })
                }
            })
        },
    )
}

fn too_large() -> Failure {
    failure(format!("the chat template takes more than {} MiB of memory", BOUNDS.memory >> 20))
}

/// Templates that were stopped for their memory, by hash: each of them keeps it, so none is run again.
static STOPPED: Mutex<BTreeSet<u64>> = Mutex::new(BTreeSet::new());

fn is_stopped(source: &str) -> bool {
    STOPPED.lock().unwrap_or_else(PoisonError::into_inner).contains(&xxh3_64(source.as_bytes()))
}

fn remember_stopped(source: &str) {
    STOPPED.lock().unwrap_or_else(PoisonError::into_inner).insert(xxh3_64(source.as_bytes()));
}

fn render_here(source: &str, context: Value, alphabet: &Arc<Alphabet>, fuel: u64) -> Result<String, Failure> {
    let env = environment(alphabet, fuel);
    let source = without_generation_blocks(source);
    let template = env.template_from_str(&source).map_err(|error| unreadable(&error))?;
    let mut out = Bounded::default();
    template.render_captured_to(context, &mut out).map_err(|error| failed(&error))?;
    String::from_utf8(out.0).map_err(|error| failure(format!("the chat template failed: {error}")))
}

fn environment(alphabet: &Arc<Alphabet>, fuel: u64) -> Environment<'static> {
    let mut env = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    env.set_syntax(syntax.unwrap_or_default());
    env.set_fuel(Some(fuel));
    env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    env.add_function("raise_exception", refuse);
    env.add_function("strftime_now", strftime_now);
    methods::install(&mut env, alphabet);
    limit_output(&mut env);
    env
}

/// Counts what is written, into captures too, which the writer does not see.
fn limit_output(env: &mut Environment<'_>) {
    let written = AtomicUsize::new(0);
    env.set_formatter(move |out, _, value| {
        let owned;
        let text = match value.as_str() {
            Some(text) => text,
            None => {
                owned = value.to_string();
                &owned
            }
        };
        if written.fetch_add(text.len(), Ordering::Relaxed) + text.len() > MAX_OUTPUT {
            return Err(minijinja::Error::new(ErrorKind::WriteFailure, TOO_LONG));
        }
        out.write_str(text).map_err(minijinja::Error::from)
    });
}

const TOO_LONG: &str = "it writes more than 64 MiB";

/// Takes at most [`MAX_OUTPUT`] bytes.
#[derive(Default)]
struct Bounded(Vec<u8>);

impl io::Write for Bounded {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if self.0.len() + data.len() > MAX_OUTPUT {
            return Err(io::Error::other(TOO_LONG));
        }
        self.0.extend_from_slice(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn refuse(message: &str) -> Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, format!("{REFUSAL}{message}")))
}

fn strftime_now(format: &str) -> Result<String, minijinja::Error> {
    let mut text = String::new();
    match write!(text, "{}", chrono::Local::now().format(format)) {
        Ok(()) => Ok(text),
        Err(_) => {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now cannot read {format:?}")))
        }
    }
}

fn unreadable(error: &minijinja::Error) -> Failure {
    Failure::Unsupported(Error::ChatTemplate(format!("the chat template cannot be read: {}", describe(error))))
}

fn failed(error: &minijinja::Error) -> Failure {
    if let Some((_, message)) = error.detail().and_then(|detail| detail.split_once(REFUSAL)) {
        return failure(format!("the chat template refuses these messages: {message}"));
    }
    let reason = format!("the chat template failed: {}", describe(error));
    match error.kind() {
        ErrorKind::OutOfFuel => failure(format!("the chat template executes more than {FUEL} instructions")),
        ErrorKind::WriteFailure | ErrorKind::UndefinedError | ErrorKind::TemplateNotFound => failure(reason),
        _ if error.detail().is_some_and(|detail| detail.contains("recursion limit")) => failure(reason),
        _ => Failure::Unsupported(Error::ChatTemplate(reason)),
    }
}

/// The innermost cause with its line.
fn describe(error: &minijinja::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    let line = error.line().map(|line| format!(" (line {line})")).unwrap_or_default();
    match cause.downcast_ref::<minijinja::Error>() {
        Some(inner) => {
            let detail = inner.detail().map(|detail| format!(": {detail}")).unwrap_or_default();
            format!("{}{detail}{line}", inner.kind())
        }
        None => format!("{cause}{line}"),
    }
}

/// Hugging Face's `{% generation %}` blocks mark what a model wrote, for training; here they change nothing.
fn without_generation_blocks(source: &str) -> String {
    if !source.contains("generation") {
        return source.to_owned();
    }
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some((before, block)) = rest.split_once("{%") {
        let Some((inside, after)) = block.split_once("%}") else { break };
        let name = inside.trim_matches(|c: char| c == '-' || c == '+' || c.is_whitespace());
        let inside = match name {
            "generation" => inside.replace("generation", "if true"),
            "endgeneration" => inside.replace("endgeneration", "endif"),
            _ => inside.to_owned(),
        };
        out.extend([before, "{%", &inside, "%}"]);
        rest = after;
    }
    out.push_str(rest);
    out
}

//! Dictionaries of options, checked by the Python layer, as values of the core.

use std::collections::BTreeMap;
use std::path::PathBuf;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use super::callbacks::{PythonFilter, PythonProcessor};
use super::prediction::Terms;
use crate::chat::CallSpec;
use crate::context::deadline_after;
use crate::context::job::{Dropped, Overflow};
use crate::context::parking::Budget;
use crate::llama::{
    self, CallSyntax, ContextParams, FlashAttention, KvType, LoadParams, OverrideValue, SplitMode, Token,
};
use crate::sequence::grammar::{Spec, Trigger};
use crate::sequence::sampler::{Dry, DynamicTemperature, Mirostat, RepeatPenalty, SamplerKind, SamplerSpec, Xtc};
use crate::sequence::text::{Batching, TextOptions};
use crate::sequence::{Prompt, Reasoning, Request, Turn};

/// A string or a list of tokens.
#[derive(FromPyObject)]
pub enum TextOrTokens {
    Text(String),
    Tokens(Vec<Token>),
}

impl TextOrTokens {
    pub fn into_prompt(self, parse_special: bool) -> Prompt {
        match self {
            Self::Text(text) => Prompt::Text { text, parse_special },
            Self::Tokens(tokens) => Prompt::Tokens { tokens, parse_special },
        }
    }
}

type DryItems = (f32, f32, i32, Option<usize>, Vec<String>);
/// Start tag, end tag, whether the prompt opened it, closing text.
type ReasoningItems = (String, String, bool, String);
type DroppedItems = (Vec<Token>, Vec<(usize, usize)>);
type PenaltyItems = (f32, usize, f32, f32, bool, Option<Py<PyAny>>);

/// How calls of tools are found and read, as a rendered chat has it.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct CallItems {
    format_id: i32,
    parser: String,
    prefix: String,
    triggers: Vec<String>,
    silent: Vec<String>,
    preserved: Vec<String>,
    reasoning_end: Option<String>,
    has_ids: bool,
}

impl CallItems {
    fn into_spec(self) -> CallSpec {
        CallSpec {
            syntax: CallSyntax { format_id: self.format_id, parser: self.parser, prefix: self.prefix },
            triggers: self.triggers,
            silent: self.silent,
            preserved: self.preserved,
            reasoning_end: self.reasoning_end,
            has_ids: self.has_ids,
        }
    }
}

/// What an answer may be: a dictionary with `kind`, and what that kind has.
pub struct Constraint(pub Spec);

impl<'py> FromPyObject<'_, 'py> for Constraint {
    type Error = PyErr;

    fn extract(dict: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        let text = |key: &str| dict.get_item(key)?.extract::<String>();
        let texts = |key: &str| optional::<Vec<String>>(&dict, key).map(Option::unwrap_or_default);
        let kind = text("kind")?;
        Ok(Self(match kind.as_str() {
            "json_schema" => Spec::JsonSchema(text("text")?),
            "regex" => Spec::Regex(text("text")?),
            "lark" => Spec::Lark(text("text")?),
            "gbnf" => Spec::Gbnf {
                text: text("text")?,
                root: text("root")?,
                preserved: texts("preserved")?,
                prefix: optional(&dict, "prefix")?.unwrap_or_default(),
            },
            "any" => {
                let choices: Vec<Self> = dict.get_item("of")?.extract()?;
                Spec::Any(choices.into_iter().map(|choice| choice.0).collect())
            }
            "lazy" => {
                lazy(dict.get_item("of")?.extract()?, dict.get_item("triggers")?.extract()?, texts("preserved")?)?
            }
            _ => return Err(PyValueError::new_err(format!("a constraint of kind {kind:?} is unknown"))),
        }))
    }
}

fn optional<'py, T: FromPyObjectOwned<'py, Error = PyErr>>(
    dict: &Borrowed<'_, 'py, PyAny>,
    key: &str,
) -> PyResult<Option<T>> {
    if dict.contains(key)? { dict.get_item(key)?.extract() } else { Ok(None) }
}

#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct TriggerItems {
    kind: String,
    value: String,
}

fn lazy(Constraint(mut of): Constraint, triggers: Vec<TriggerItems>, preserved: Vec<String>) -> PyResult<Spec> {
    if let Spec::Gbnf { preserved: known, .. } = &mut of {
        known.extend(preserved);
    }
    let triggers = triggers.into_iter().map(|TriggerItems { kind, value }| match kind.as_str() {
        "word" => Ok(Trigger::Word(value)),
        "token" => Ok(Trigger::Token(value)),
        "pattern" => Ok(Trigger::Pattern(value)),
        "pattern_full" => Ok(Trigger::PatternFull(value)),
        _ => Err(PyValueError::new_err(format!("a trigger of kind {kind:?} is unknown"))),
    });
    Ok(Spec::Lazy { of: Box::new(of), triggers: triggers.collect::<PyResult<_>>()? })
}

/// The options of `predict`.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct PredictOptions {
    max_tokens: Option<usize>,
    stop: Vec<TextOrTokens>,
    temperature: f32,
    deterministic: bool,
    top_k: i32,
    top_p: f32,
    min_p: f32,
    typical_p: Option<f32>,
    top_n_sigma: Option<f32>,
    xtc: Option<(f32, f32)>,
    dry: Option<DryItems>,
    mirostat: Option<(i32, f32, f32)>,
    dynamic_temperature: Option<(f32, f32)>,
    repeat_penalty: Option<PenaltyItems>,
    logit_bias: Vec<(Token, f32)>,
    seed: Option<u32>,
    sampler_order: Option<Vec<String>>,
    logprobs: Option<usize>,
    logits_processor: Option<Py<PyAny>>,
    ignore_eos: bool,
    constraint: Option<Constraint>,
    response_prefix: Option<String>,
    trim_trailing_whitespace: bool,
    reasoning: Option<ReasoningItems>,
    reasoning_budget: Option<usize>,
    calls: Option<CallItems>,
    priority: i32,
    deadline: Option<f64>,
    overflow: Option<String>,
    pub max_pending: Option<usize>,
    token_batching: Option<(u32, f64)>,
    special: bool,
}

/// What a prediction has to do with a chat.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct TurnOptions {
    chat: u64,
    keep: usize,
    /// The window before, and what of it has gone.
    dropped: Option<DroppedItems>,
    /// Whether another round may follow.
    pub more: bool,
}

impl TurnOptions {
    fn into_turn(self) -> Turn {
        let dropped = self.dropped.map(|(before, ranges)| Dropped { before, ranges });
        Turn { chat: self.chat, n_keep: self.keep, dropped }
    }
}

impl PredictOptions {
    /// The name of what is done when the context is full.
    fn policy(&self) -> &'static str {
        match self.overflow.as_deref() {
            Some("rolling_window") => "rolling_window",
            Some("truncate_middle") => "truncate_middle",
            _ => "stop_at_limit",
        }
    }

    /// The request, and what its result will repeat of the options.
    pub fn into_request(
        self,
        py: Python<'_>,
        prompt: TextOrTokens,
        turn: Option<TurnOptions>,
    ) -> PyResult<(Request, Terms)> {
        let seed = self.seed.unwrap_or_else(random_seed);
        let terms = Terms { seed, policy: self.policy(), logprobs: self.logprobs.is_some() };
        let overflow = self.overflow.as_deref().map(overflow).transpose()?;
        let deadline = deadline_after(self.deadline);
        let text = text_options(self.stop, self.trim_trailing_whitespace, self.token_batching);
        let order = match &self.sampler_order {
            Some(names) => names.iter().map(|name| sampler(name)).collect::<PyResult<Vec<_>>>()?,
            None => SamplerKind::DEFAULT_ORDER.to_vec(),
        };
        let sampler = SamplerSpec {
            temperature: normal(self.temperature),
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            typical_p: self.typical_p,
            top_n_sigma: self.top_n_sigma,
            xtc: self.xtc.map(|(probability, threshold)| Xtc { probability, threshold }),
            dry: self.dry.map(|(multiplier, base, allowed_length, last_tokens, breakers)| Dry {
                multiplier: normal(multiplier),
                base,
                allowed_length,
                last_tokens,
                breakers,
            }),
            mirostat: self.mirostat.map(|(version, tau, eta)| Mirostat { version, tau, eta }),
            dynamic_temperature: self
                .dynamic_temperature
                .map(|(range, exponent)| DynamicTemperature { range, exponent }),
            repeat_penalty: self.repeat_penalty.map(repeat_penalty),
            logit_bias: self.logit_bias,
            ignore_eos: self.ignore_eos,
            seed,
            order,
            logprobs: self.logprobs,
            processor: self.logits_processor.map(|callable| Box::new(PythonProcessor::new(py, callable)) as _),
        };
        let budget = self.reasoning_budget;
        let reasoning =
            self.reasoning.map(|(start, end, opened, closing)| Reasoning { start, end, opened, closing, budget });
        let request = Request {
            prompt: prompt.into_prompt(self.special),
            sampler,
            text,
            reasoning,
            calls: self.calls.map(CallItems::into_spec),
            constraint: self.constraint.map(|constraint| constraint.0),
            max_tokens: self.max_tokens,
            response_prefix: self.response_prefix,
            deterministic: self.deterministic,
            priority: self.priority,
            deadline,
            overflow,
            chat: turn.map(TurnOptions::into_turn),
        };
        Ok((request, terms))
    }
}

/// What is too small for a normal number counts as 0, as it does for the caller.
fn normal(number: f32) -> f32 {
    if number.is_subnormal() { 0.0 } else { number }
}

fn text_options(stop: Vec<TextOrTokens>, trim_trailing_whitespace: bool, batching: Option<(u32, f64)>) -> TextOptions {
    let mut options = TextOptions {
        trim_trailing_whitespace,
        batching: batching.map(|(tokens, interval)| Batching { tokens, interval }),
        ..TextOptions::default()
    };
    for stop in stop {
        match stop {
            TextOrTokens::Text(text) => options.stop_strings.push(text),
            TextOrTokens::Tokens(tokens) => options.stop_tokens.push(tokens),
        }
    }
    options
}

fn repeat_penalty(
    (penalty, last_tokens, frequency, presence, penalize_newline, filter): PenaltyItems,
) -> RepeatPenalty {
    RepeatPenalty {
        penalty,
        last_tokens,
        frequency,
        presence,
        penalize_newline,
        filter: filter.map(|callable| Box::new(PythonFilter(callable)) as _),
    }
}

fn sampler(name: &str) -> PyResult<SamplerKind> {
    SamplerKind::from_name(name).ok_or_else(|| PyValueError::new_err(format!("sampler {name:?} is unknown")))
}

fn overflow(name: &str) -> PyResult<Overflow> {
    match name {
        "stop_at_limit" => Ok(Overflow::Stop),
        "rolling_window" => Ok(Overflow::RollingWindow),
        "truncate_middle" => Ok(Overflow::TruncateMiddle),
        _ => Err(PyValueError::new_err(format!("overflow {name:?} is unknown"))),
    }
}

/// A seed from the hasher's random keys, which the standard library draws from the system.
fn random_seed() -> u32 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(0u8) as u32 & 0x7fff_ffff
}

#[derive(FromPyObject)]
enum Scalar {
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
}

/// The options of `load_model`.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct LoadOptions {
    gpu_layers: i32,
    devices: Option<Vec<String>>,
    main_gpu: i32,
    split_mode: String,
    tensor_split: Option<Vec<f32>>,
    use_mmap: bool,
    use_mlock: bool,
    vocab_only: bool,
    outline: bool,
    check_tensors: bool,
    /// In the order of the keys: two equal loads have one fingerprint.
    metadata_overrides: BTreeMap<String, Scalar>,
    lora: Vec<(PathBuf, f32)>,
}

impl LoadOptions {
    pub fn into_params(self) -> PyResult<LoadParams> {
        let devices = self.devices.map(|names| names.iter().map(|name| device(name)).collect()).transpose()?;
        Ok(LoadParams {
            n_gpu_layers: self.gpu_layers,
            devices,
            main_gpu: self.main_gpu,
            split_mode: split_mode(&self.split_mode)?,
            tensor_split: self.tensor_split,
            use_mmap: self.use_mmap,
            use_mlock: self.use_mlock,
            vocab_only: self.vocab_only,
            outline: self.outline,
            check_tensors: self.check_tensors,
            overrides: self.metadata_overrides.into_iter().map(|(key, value)| (key, value.into())).collect(),
            lora: self.lora,
        })
    }
}

impl From<Scalar> for OverrideValue {
    fn from(scalar: Scalar) -> Self {
        match scalar {
            Scalar::Bool(value) => Self::Bool(value),
            Scalar::Int(value) => Self::Int(value),
            Scalar::Float(value) => Self::Float(value),
            Scalar::Text(value) => Self::Str(value),
        }
    }
}

fn device(name: &str) -> PyResult<usize> {
    let devices = llama::devices();
    let found = devices.iter().find(|device| device.name == name).map(|device| device.index);
    found.ok_or_else(|| {
        let known: Vec<_> = devices.iter().map(|device| device.name.as_str()).collect();
        PyValueError::new_err(format!("device {name:?} does not exist; there are {}", known.join(", ")))
    })
}

fn split_mode(name: &str) -> PyResult<SplitMode> {
    match name {
        "none" => Ok(SplitMode::None),
        "layer" => Ok(SplitMode::Layer),
        "row" => Ok(SplitMode::Row),
        _ => Err(PyValueError::new_err(format!("split_mode {name:?} is unknown; use none, layer or row"))),
    }
}

/// The options of `create_context`.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct ContextOptions {
    context_size: u32,
    sequences: u32,
    batch_size: Option<u32>,
    ubatch_size: Option<u32>,
    threads: Option<u32>,
    threads_batch: Option<u32>,
    flash_attention: String,
    kv_type_k: Option<String>,
    kv_type_v: Option<String>,
    kv_unified: bool,
    swa_full: bool,
    rope_freq_base: Option<f32>,
    rope_freq_scale: Option<f32>,
    yarn_ext_factor: Option<f32>,
    yarn_attn_factor: Option<f32>,
    yarn_beta_fast: Option<f32>,
    yarn_beta_slow: Option<f32>,
    yarn_orig_context: Option<u32>,
    parking_bytes: usize,
    parking_disk_bytes: usize,
}

/// Tokens in a micro-batch, and so in a batch: a cancel waits for one micro-batch at most.
const UBATCH: u32 = 512;

impl ContextOptions {
    /// How much of what chats leave may be kept outside of the cells.
    pub fn parking(&self) -> Budget {
        Budget { host_bytes: self.parking_bytes, disk_bytes: self.parking_disk_bytes }
    }

    pub fn into_params(self) -> PyResult<ContextParams> {
        let n_ubatch =
            self.ubatch_size.or(self.batch_size).unwrap_or(UBATCH).min(UBATCH.max(self.ubatch_size.unwrap_or(0)));
        let n_threads = at_most_processors(self.threads.unwrap_or_else(default_threads));
        Ok(ContextParams {
            n_ctx: self.context_size,
            n_batch: self.batch_size.unwrap_or(n_ubatch).max(n_ubatch),
            n_ubatch,
            n_seq_max: self.sequences,
            n_outputs_max: 0,
            n_threads,
            n_threads_batch: at_most_processors(self.threads_batch.unwrap_or(n_threads)),
            flash_attention: flash_attention(&self.flash_attention)?,
            type_k: self.kv_type_k.as_deref().map(kv_type).transpose()?,
            type_v: self.kv_type_v.as_deref().map(kv_type).transpose()?,
            kv_unified: self.kv_unified,
            swa_full: self.swa_full,
            rope_freq_base: self.rope_freq_base,
            rope_freq_scale: self.rope_freq_scale,
            yarn_ext_factor: self.yarn_ext_factor,
            yarn_attn_factor: self.yarn_attn_factor,
            yarn_beta_fast: self.yarn_beta_fast,
            yarn_beta_slow: self.yarn_beta_slow,
            yarn_orig_ctx: self.yarn_orig_context,
        })
    }
}

fn flash_attention(name: &str) -> PyResult<FlashAttention> {
    match name {
        "auto" => Ok(FlashAttention::Auto),
        "on" => Ok(FlashAttention::On),
        "off" => Ok(FlashAttention::Off),
        _ => Err(PyValueError::new_err(format!("flash_attention {name:?} is unknown; use auto, on or off"))),
    }
}

fn kv_type(name: &str) -> PyResult<KvType> {
    KvType::from_name(name).ok_or_else(|| {
        PyValueError::new_err(format!("KV type {name:?} is unknown; use one of {}", KvType::NAMES.join(", ")))
    })
}

/// Physical cores less one, which the event loop keeps; at least one.
fn default_threads() -> u32 {
    num_cpus::get_physical().saturating_sub(1).max(1) as u32
}

/// More threads than processors wait for each other at every node of the graph, for minutes.
fn at_most_processors(n_threads: u32) -> u32 {
    n_threads.min(num_cpus::get().max(1) as u32)
}

//! What the user asked for: every option of a draw, and the limits of its value.

use std::sync::Arc;

use crate::error::{Error, ForeignError, Result};
use crate::llama::{Model, Token, within};

/// A sampler that `SamplerSpec::order` can place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SamplerKind {
    /// Repeat, frequency and presence penalties.
    Penalties,
    /// "Don't repeat yourself".
    Dry,
    /// Logits within n standard deviations of the best.
    TopNSigma,
    /// The k best.
    TopK,
    /// Locally typical tokens.
    TypicalP,
    /// The nucleus of probability p.
    TopP,
    /// Tokens not much less probable than the best.
    MinP,
    /// Exclude top choices.
    Xtc,
    /// Temperature, dynamic or not.
    Temperature,
}

impl SamplerKind {
    /// The order of llama.cpp's `common`.
    pub const DEFAULT_ORDER: [Self; 9] = [
        Self::Penalties,
        Self::Dry,
        Self::TopNSigma,
        Self::TopK,
        Self::TypicalP,
        Self::TopP,
        Self::MinP,
        Self::Xtc,
        Self::Temperature,
    ];

    /// The name of the option, as in `sampler_order`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Penalties => "penalties",
            Self::Dry => "dry",
            Self::TopNSigma => "top_n_sigma",
            Self::TopK => "top_k",
            Self::TypicalP => "typical_p",
            Self::TopP => "top_p",
            Self::MinP => "min_p",
            Self::Xtc => "xtc",
            Self::Temperature => "temperature",
        }
    }

    /// The sampler of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::DEFAULT_ORDER.into_iter().find(|kind| kind.name() == name)
    }
}

/// Exclude top choices.
#[derive(Clone, Copy, Debug)]
pub struct Xtc {
    /// How often it acts.
    pub probability: f32,
    /// All but the last token above this probability are dropped.
    pub threshold: f32,
}

/// Penalty on continuing a repetition.
#[derive(Clone, Debug)]
pub struct Dry {
    /// Strength; 0 is off.
    pub multiplier: f32,
    /// Growth per repeated token.
    pub base: f32,
    /// Repetitions up to this length are free.
    pub allowed_length: i32,
    /// Tokens of prompt and reply looked at; `None`: the whole context.
    pub last_tokens: Option<usize>,
    /// Texts that no repetition reaches across.
    pub breakers: Vec<String>,
}

/// Keeps the surprise of each token near a target.
#[derive(Clone, Copy, Debug)]
pub struct Mirostat {
    /// 1 or 2.
    pub version: i32,
    /// Target surprise in bits.
    pub tau: f32,
    /// Learning rate.
    pub eta: f32,
}

/// Temperature that follows the entropy.
#[derive(Clone, Copy, Debug)]
pub struct DynamicTemperature {
    /// Greatest distance from `temperature`.
    pub range: f32,
    /// Shape of the mapping from entropy.
    pub exponent: f32,
}

/// Penalties on tokens of the reply so far.
pub struct RepeatPenalty {
    /// Divides positive logits, multiplies others; 1 is off.
    pub penalty: f32,
    /// Generated tokens looked at.
    pub last_tokens: usize,
    /// Subtracted per occurrence.
    pub frequency: f32,
    /// Subtracted once.
    pub presence: f32,
    /// Whether the newline token counts.
    pub penalize_newline: bool,
    /// The user's choice among the tokens of the window, asked before each draw.
    pub filter: Option<Box<dyn PunishFilter>>,
}

impl RepeatPenalty {
    /// Whether it changes any logit.
    pub(super) fn is_active(&self) -> bool {
        self.last_tokens > 0 && (self.penalty != 1.0 || self.frequency != 0.0 || self.presence != 0.0)
    }
}

/// A user's callback that edits the logits before anything else does.
pub trait LogitsProcessor: Send {
    /// `tokens` are all tokens generated so far, one more at each call.
    fn process(&mut self, tokens: &[Token], logits: &mut [f32]) -> Result<(), ForeignError>;
}

/// A user's callback that chooses which tokens to penalise.
pub trait PunishFilter: Send {
    /// `tokens` is the window, oldest first; the answer may repeat tokens.
    fn filter(&mut self, tokens: &[Token]) -> Result<Vec<Token>, ForeignError>;
}

/// How tokens are drawn. The defaults are those of the Python options.
pub struct SamplerSpec {
    /// Divides the logits; 0 or less is greedy.
    pub temperature: f32,
    /// How many of the best tokens are kept; 0 or less is all.
    pub top_k: i32,
    /// Nucleus; 1 is off.
    pub top_p: f32,
    /// Least probability relative to the best; 0 is off.
    pub min_p: f32,
    /// Locally typical sampling.
    pub typical_p: Option<f32>,
    /// Logits within n standard deviations of the best.
    pub top_n_sigma: Option<f32>,
    /// Exclude top choices.
    pub xtc: Option<Xtc>,
    /// "Don't repeat yourself".
    pub dry: Option<Dry>,
    /// Target surprise, instead of the truncation samplers.
    pub mirostat: Option<Mirostat>,
    /// Makes the temperature follow the entropy.
    pub dynamic_temperature: Option<DynamicTemperature>,
    /// Penalties on generated tokens.
    pub repeat_penalty: Option<RepeatPenalty>,
    /// Added to logits; -inf is "never".
    pub logit_bias: Vec<(Token, f32)>,
    /// Tokens that end generation are never drawn.
    pub ignore_eos: bool,
    /// Of all random draws. The caller draws one where the user gave none.
    pub seed: u32,
    /// Samplers not named here do not act.
    pub order: Vec<SamplerKind>,
    /// Log-probabilities: 0 of the drawn token only, n also of the n best.
    pub logprobs: Option<usize>,
    /// The user's own edit of the logits.
    pub processor: Option<Box<dyn LogitsProcessor>>,
}

impl Default for SamplerSpec {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 40,
            top_p: 1.0,
            min_p: 0.0,
            typical_p: None,
            top_n_sigma: None,
            xtc: None,
            dry: None,
            mirostat: None,
            dynamic_temperature: None,
            repeat_penalty: None,
            logit_bias: Vec::new(),
            ignore_eos: false,
            seed: 0,
            order: SamplerKind::DEFAULT_ORDER.to_vec(),
            logprobs: None,
            processor: None,
        }
    }
}

/// What a sampler must know of the model and the context.
#[derive(Clone, Copy)]
pub struct Vocabulary<'a> {
    /// Tokens in a row of logits.
    pub size: usize,
    /// The newline token.
    pub newline: Option<Token>,
    /// Tokens that end generation.
    pub eog: &'a [Token],
    /// Tokens that the model's file says must not be drawn.
    pub suppressed: &'a [Token],
    /// Positions of the context: DRY's window if it has no other.
    pub context_size: usize,
    /// Needed by DRY, whose breakers are texts.
    pub model: Option<&'a Arc<Model>>,
}

/// Refuses values that no sampler would take.
pub(super) fn check(spec: &SamplerSpec, vocabulary: Vocabulary<'_>) -> Result<()> {
    within("temperature", spec.temperature, f32::MIN..=f32::MAX)?;
    within("top_p", spec.top_p, 0.0..=1.0)?;
    within("min_p", spec.min_p, 0.0..=1.0)?;
    within("number of logprobs", spec.logprobs.unwrap_or(0), ..=vocabulary.size)?;
    if let Some(mirostat) = spec.mirostat {
        within("mirostat version", mirostat.version, 1..=2)?;
    }
    if let Some(repeat) = &spec.repeat_penalty {
        within("repeat_penalty penalty", repeat.penalty, f32::MIN_POSITIVE..=f32::MAX)?;
        within("repeat_penalty frequency_penalty", repeat.frequency, f32::MIN..=f32::MAX)?;
        within("repeat_penalty presence_penalty", repeat.presence, f32::MIN..=f32::MAX)?;
    }
    if let Some(dry) = &spec.dry {
        within("dry multiplier", dry.multiplier, 0.0..=f32::MAX)?;
    }
    for &(token, bias) in &spec.logit_bias {
        check_token("logit_bias token", token, vocabulary.size)?;
        within("logit_bias", bias, f32::NEG_INFINITY..=f32::MAX)?;
    }
    check_order(&spec.order)
}

fn check_order(order: &[SamplerKind]) -> Result<()> {
    match order.iter().enumerate().find(|&(index, kind)| order[..index].contains(kind)) {
        Some((_, twice)) => Err(Error::Value(format!("sampler_order names {} twice", twice.name()))),
        None => Ok(()),
    }
}

pub(super) fn check_token(name: &str, token: Token, n_vocab: usize) -> Result<()> {
    within(name, i64::from(token), 0..=n_vocab as i64 - 1)
}

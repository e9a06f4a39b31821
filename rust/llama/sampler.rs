//! One sampler of llama.cpp at a time over an array of candidates.
//!
//! Nothing here can trip an assertion of llama.cpp or hand its `std::sort` a NaN: constructors refuse values out of
//! range, and [`Candidates`] keeps three promises between calls: it is never applied empty, no logit is NaN or above
//! zero, and the best one is zero (logits are taken relative to the best, which changes no distribution).

use std::ffi::{CString, c_char};
use std::fmt::{Debug, Display};
use std::ops::{Bound, RangeBounds};
use std::ptr::NonNull;
use std::sync::Arc;

use llama_cpp_sys_2 as sys;

use super::{Model, Token, guarded};
use crate::error::{Error, Result};

unsafe extern "C" {
    pub(super) fn llamactor_sampler_apply(
        sampler: *mut sys::llama_sampler,
        candidates: *mut sys::llama_token_data_array,
        message: *mut c_char,
        size: usize,
    ) -> i32;
    pub(super) fn llamactor_sampler_accept(
        sampler: *mut sys::llama_sampler,
        token: Token,
        message: *mut c_char,
        size: usize,
    ) -> i32;
    fn llamactor_sampler_init_dry(
        sampler: *mut *mut sys::llama_sampler,
        vocab: *const sys::llama_vocab,
        multiplier: f32,
        base: f32,
        allowed_length: i32,
        last_tokens: i32,
        breakers: *mut *const c_char,
        n_breakers: usize,
        message: *mut c_char,
        size: usize,
    ) -> i32;
}

/// llama.cpp keeps at least this many candidates in every truncation.
const MIN_KEEP: usize = 1;
/// Candidates that Mirostat 1 looks at for its estimate; the value of llama.cpp's own tools.
const MIROSTAT_M: i32 = 100;
/// `LLAMA_DEFAULT_SEED`, a macro that has no binding.
const DEFAULT_SEED: u32 = u32::MAX;
/// Candidates this far below the best have probabilities too small to be drawn, and to take a logarithm of.
const NEGLIGIBLE: f32 = -70.0;
/// llama.cpp cuts longer breakers, perhaps inside a character.
const MAX_BREAKER_BYTES: usize = 40;
/// Each breaker costs a scan of the whole vocabulary.
const MAX_BREAKERS: usize = 64;

/// The tokens still in question, each with its logit relative to the best.
#[derive(Default)]
pub struct Candidates {
    data: Vec<sys::llama_token_data>,
    /// XTC drops from the front by moving the start.
    start: usize,
    size: usize,
    selected: Option<usize>,
    sorted: bool,
    /// What was subtracted from every logit, scaled as the logits are.
    offset: f32,
}

impl Candidates {
    /// Takes all of `logits` except NaN and -inf; `best` is their maximum. The memory is reused.
    pub fn fill(&mut self, logits: &[f32], best: f32) {
        self.clear(best);
        let relative = logits.iter().zip(0..).map(|(&logit, id)| entry(id, logit - best));
        self.data.extend(relative);
        // +inf says "this one": what is left of inf - inf is its zero.
        if best == f32::INFINITY {
            self.keep_infinite(logits);
        }
        self.data.retain(|candidate| candidate.logit > f32::NEG_INFINITY);
        self.size = self.data.len();
    }

    /// Takes `(token, logit)` pairs that come best first, none NaN or -inf.
    pub fn fill_ranked(&mut self, ranked: &[(Token, f32)]) {
        let best = ranked.first().map_or(0.0, |first| first.1);
        self.clear(best);
        self.data.extend(
            ranked
                .iter()
                .take_while(|pair| best < f32::INFINITY || pair.1 == best)
                .map(|&(id, logit)| entry(id, if logit == best { 0.0 } else { logit - best })),
        );
        self.sorted = true;
        self.size = self.data.len();
    }

    /// How many are left.
    #[must_use]
    pub fn len(&self) -> usize {
        self.size
    }

    /// Whether none is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.size == 0
    }

    /// The tokens left and their logits relative to the best, in no order that means anything.
    pub fn iter(&self) -> impl Iterator<Item = (Token, f32)> + '_ {
        self.live().iter().map(|candidate| (candidate.id, candidate.logit))
    }

    /// The token that the last sampler selected, or the only one left.
    #[must_use]
    pub fn selected(&self) -> Option<Token> {
        let index = self.selected.or((self.size == 1).then_some(0))?;
        self.live().get(index).map(|candidate| candidate.id)
    }

    /// Puts `change(token, logit)` in place of every logit, where logits are as the model and the temperature made
    /// them, not relative. Returns false if that leaves no token possible; the candidates are then empty.
    pub fn rewrite(&mut self, mut change: impl FnMut(Token, f32) -> f32) -> bool {
        let offset = self.offset;
        for candidate in self.live_mut() {
            let logit = change(candidate.id, candidate.logit + offset) - offset;
            candidate.logit = if logit.is_nan() { f32::NEG_INFINITY } else { logit.min(f32::MAX) };
        }
        self.sorted = false;
        self.rebase();
        !self.is_empty()
    }

    fn clear(&mut self, best: f32) {
        self.data.clear();
        self.start = 0;
        self.size = 0;
        self.selected = None;
        self.sorted = false;
        self.offset = if best.is_finite() { best } else { 0.0 };
    }

    fn keep_infinite(&mut self, logits: &[f32]) {
        for (candidate, &logit) in self.data.iter_mut().zip(logits) {
            candidate.logit = if logit == f32::INFINITY { 0.0 } else { f32::NEG_INFINITY };
        }
    }

    /// Makes the best logit zero again and drops what became impossible.
    fn rebase(&mut self) {
        let best = self.iter().fold(f32::NEG_INFINITY, |best, (_, logit)| best.max(logit));
        self.retain(|logit| logit > f32::NEG_INFINITY);
        for candidate in self.live_mut() {
            candidate.logit -= best;
        }
        self.offset += if best.is_finite() { best } else { 0.0 };
    }

    /// Keeps the order, so a sorted array stays sorted.
    fn retain(&mut self, keep: impl Fn(f32) -> bool) {
        let live = self.live_mut();
        let mut kept = 0;
        for index in 0..live.len() {
            if keep(live[index].logit) {
                live[kept] = live[index];
                kept += 1;
            }
        }
        self.size = kept;
    }

    /// Before samplers that sort everything: theirs sorts by buckets made for absolute logits and is several times slower.
    fn sort(&mut self) {
        if !self.sorted {
            self.live_mut().sort_unstable_by(|a, b| b.logit.total_cmp(&a.logit));
            self.sorted = true;
        }
    }

    fn lowest(&self) -> f32 {
        self.iter().filter(|(_, logit)| logit.is_finite()).fold(0.0, |lowest, (_, logit)| lowest.min(logit))
    }

    fn live(&self) -> &[sys::llama_token_data] {
        &self.data[self.start..self.start + self.size]
    }

    fn live_mut(&mut self) -> &mut [sys::llama_token_data] {
        &mut self.data[self.start..self.start + self.size]
    }

    /// Lends the array to llama.cpp and takes back what it says of it.
    fn lend(&mut self, call: impl FnOnce(&mut sys::llama_token_data_array) -> Result<i32, String>) -> Result<()> {
        let sorted = self.sorted;
        let mut array =
            sys::llama_token_data_array { data: self.live_mut().as_mut_ptr(), size: self.size, selected: -1, sorted };
        call(&mut array).map_err(|message| Error::Decode(format!("sampling failed: {message}")))?;
        self.take_back(&array)
    }

    fn take_back(&mut self, array: &sys::llama_token_data_array) -> Result<()> {
        let bytes = (array.data as usize).wrapping_sub(self.live().as_ptr() as usize);
        let moved = bytes / size_of::<sys::llama_token_data>();
        if moved.saturating_add(array.size) > self.size || array.size == 0 {
            return Err(Error::Decode("sampling failed: the sampler left no valid candidates".into()));
        }
        self.start += moved;
        self.size = array.size;
        self.sorted = array.sorted;
        self.selected = usize::try_from(array.selected).ok().filter(|&index| index < self.size);
        Ok(())
    }
}

fn entry(id: Token, logit: f32) -> sys::llama_token_data {
    // A comparison with NaN is false.
    let logit = if logit <= 0.0 { logit } else { f32::NEG_INFINITY };
    sys::llama_token_data { id, logit, p: 0.0 }
}

/// What a sampler needs before, or does to the scale after.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Plain,
    /// Takes logarithms of probabilities: a zero among them spoils all.
    TakesLogarithms,
    Temperature(f32),
    DynamicTemperature,
}

/// A sampler of llama.cpp: one link of a chain.
pub struct NativeSampler {
    raw: NonNull<sys::llama_sampler>,
    kind: Kind,
}

// SAFETY: a sampler is touched by one thread at a time (`&mut self`) and has no ties to the thread that made it; those
// made here keep neither the vocabulary nor a context.
unsafe impl Send for NativeSampler {}

impl Drop for NativeSampler {
    fn drop(&mut self) {
        // SAFETY: `raw` came from an init function, belongs to no chain and is freed once.
        unsafe { sys::llama_sampler_free(self.raw.as_ptr()) }
    }
}

impl NativeSampler {
    /// Keeps the `k` best.
    pub fn top_k(k: i32) -> Result<Self> {
        within("top_k", k, 1..)?;
        // SAFETY: plain values; any k above zero is valid.
        Self::own(unsafe { sys::llama_sampler_init_top_k(k) }, Kind::Plain)
    }

    /// Keeps the smallest set of best tokens whose probabilities reach `p`.
    pub fn top_p(p: f32) -> Result<Self> {
        within("top_p", p, 0.0..=1.0)?;
        // SAFETY: plain values in range.
        Self::own(unsafe { sys::llama_sampler_init_top_p(p, MIN_KEEP) }, Kind::Plain)
    }

    /// Keeps tokens at least `p` times as probable as the best.
    pub fn min_p(p: f32) -> Result<Self> {
        within("min_p", p, 0.0..=1.0)?;
        // SAFETY: plain values in range.
        Self::own(unsafe { sys::llama_sampler_init_min_p(p, MIN_KEEP) }, Kind::Plain)
    }

    /// Keeps the tokens whose information content is nearest to the expected one, up to probability `p`.
    pub fn typical(p: f32) -> Result<Self> {
        within("typical_p", p, 0.0..=1.0)?;
        // SAFETY: plain values in range.
        let raw = unsafe { sys::llama_sampler_init_typical(p, MIN_KEEP) };
        Self::own(raw, Kind::TakesLogarithms)
    }

    /// Keeps logits within `n` standard deviations of the best.
    pub fn top_n_sigma(n: f32) -> Result<Self> {
        within("top_n_sigma", n, 0.0..=f32::MAX)?;
        // SAFETY: a plain value in range.
        Self::own(unsafe { sys::llama_sampler_init_top_n_sigma(n) }, Kind::Plain)
    }

    /// Now and then drops all but the least probable of the tokens above `threshold`.
    pub fn xtc(probability: f32, threshold: f32, seed: u32) -> Result<Self> {
        within("xtc probability", probability, 0.0..=1.0)?;
        within("xtc threshold", threshold, 0.0..=1.0)?;
        let seed = repeatable(seed);
        // SAFETY: plain values in range.
        let raw = unsafe { sys::llama_sampler_init_xtc(probability, threshold, MIN_KEEP, seed) };
        Self::own(raw, Kind::Plain)
    }

    /// Divides the logits.
    pub fn temperature(temperature: f32) -> Result<Self> {
        within("temperature", temperature, f32::MIN_POSITIVE..=f32::MAX)?;
        // SAFETY: a plain value in range.
        let raw = unsafe { sys::llama_sampler_init_temp(temperature) };
        Self::own(raw, Kind::Temperature(temperature))
    }

    /// Divides the logits by a temperature between `temperature - range` and `temperature + range`, by entropy.
    pub fn dynamic_temperature(temperature: f32, range: f32, exponent: f32) -> Result<Self> {
        within("temperature", temperature, f32::MIN_POSITIVE..=f32::MAX)?;
        within("dynamic_temperature range", range, 0.0..=f32::MAX)?;
        within("dynamic_temperature exponent", exponent, 0.0..=f32::MAX)?;
        within("temperature plus range", temperature + range, 0.0..=f32::MAX)?;
        // SAFETY: plain values in range.
        let raw = unsafe { sys::llama_sampler_init_temp_ext(temperature, range, exponent) };
        Self::own(raw, Kind::DynamicTemperature)
    }

    /// Selects a token by its probability.
    pub fn dist(seed: u32) -> Result<Self> {
        // SAFETY: a plain value.
        Self::own(unsafe { sys::llama_sampler_init_dist(repeatable(seed)) }, Kind::Plain)
    }

    /// Selects a token so that the surprise stays near `tau` (Mirostat 1).
    pub fn mirostat(n_vocab: usize, seed: u32, tau: f32, eta: f32) -> Result<Self> {
        check_mirostat(tau, eta)?;
        let n_vocab = i32::try_from(n_vocab).map_err(|_| out_of_range("n_vocab", n_vocab, i32::MAX))?;
        // SAFETY: plain values in range.
        let raw = unsafe { sys::llama_sampler_init_mirostat(n_vocab, repeatable(seed), tau, eta, MIROSTAT_M) };
        Self::own(raw, Kind::TakesLogarithms)
    }

    /// Selects a token so that the surprise stays near `tau` (Mirostat 2).
    pub fn mirostat_v2(seed: u32, tau: f32, eta: f32) -> Result<Self> {
        check_mirostat(tau, eta)?;
        // SAFETY: plain values in range.
        let raw = unsafe { sys::llama_sampler_init_mirostat_v2(repeatable(seed), tau, eta) };
        Self::own(raw, Kind::TakesLogarithms)
    }

    /// Runs it over the candidates, of which there must be one at least.
    pub fn apply(&mut self, candidates: &mut Candidates) -> Result<()> {
        if candidates.is_empty() {
            return Err(Error::Decode("sampling failed: no token is possible".into()));
        }
        if self.kind == Kind::TakesLogarithms {
            candidates.retain(|logit| logit > NEGLIGIBLE);
        }
        if matches!(self.kind, Kind::TakesLogarithms | Kind::DynamicTemperature) {
            candidates.sort();
        }
        let before = if self.kind == Kind::DynamicTemperature { candidates.lowest() } else { 0.0 };
        self.call(candidates)?;
        self.rescale(candidates, before);
        Ok(())
    }

    fn call(&mut self, candidates: &mut Candidates) -> Result<()> {
        let raw = self.raw.as_ptr();
        candidates.lend(|array| {
            // SAFETY: `raw` is alive and ours; the array describes memory that `lend` borrowed mutably; it is not empty.
            guarded(|message, size| unsafe { llamactor_sampler_apply(raw, array, message, size) })
        })
    }

    /// Keeps the offset in step with the logits.
    fn rescale(&self, candidates: &mut Candidates, lowest_before: f32) {
        let scale = match self.kind {
            Kind::Temperature(temperature) => 1.0 / temperature,
            Kind::DynamicTemperature => candidates.lowest() / lowest_before,
            Kind::Plain | Kind::TakesLogarithms => return,
        };
        let offset = candidates.offset * scale;
        if offset.is_finite() {
            candidates.offset = offset;
        }
    }

    fn accept(&mut self, token: Token) -> Result<()> {
        let raw = self.raw.as_ptr();
        // SAFETY: `raw` is alive and ours; samplers made here take any token.
        guarded(|message, size| unsafe { llamactor_sampler_accept(raw, token, message, size) })
            .map(drop)
            .map_err(|message| Error::Decode(format!("the sampler refused token {token}: {message}")))
    }

    fn own(raw: *mut sys::llama_sampler, kind: Kind) -> Result<Self> {
        let raw = NonNull::new(raw).ok_or_else(|| Error::InsufficientMemory("no memory for a sampler".into()))?;
        Ok(Self { raw, kind })
    }
}

/// The "don't repeat yourself" penalty of llama.cpp, asked for the few tokens that it can concern.
pub struct DryPenalty {
    sampler: NativeSampler,
    scratch: Candidates,
    /// llama.cpp does not promise that the sampler forgets the vocabulary.
    _model: Arc<Model>,
}

impl DryPenalty {
    /// `last_tokens` is the length of the window; `breakers` are texts that no repetition reaches across.
    pub fn new(
        model: &Arc<Model>,
        multiplier: f32,
        base: f32,
        allowed_length: i32,
        last_tokens: i32,
        breakers: &[String],
    ) -> Result<Self> {
        within("dry multiplier", multiplier, f32::MIN_POSITIVE..=f32::MAX)?;
        within("dry base", base, 1.0..=f32::MAX)?;
        within("dry allowed_length", allowed_length, 0..)?;
        within("dry last_tokens", last_tokens, 1..)?;
        let breakers = checked_breakers(breakers)?;
        let mut breakers: Vec<*const c_char> = breakers.iter().map(|text| text.as_ptr()).collect();
        let mut raw = std::ptr::null_mut();
        guarded(|message, size| {
            // SAFETY: the vocabulary lives in `model`; the texts end in NUL and outlive the call, which copies them.
            unsafe {
                llamactor_sampler_init_dry(
                    &raw mut raw,
                    model.vocab_ptr(),
                    multiplier,
                    base,
                    allowed_length,
                    last_tokens,
                    breakers.as_mut_ptr(),
                    breakers.len(),
                    message,
                    size,
                )
            }
        })
        .map_err(|message| Error::Value(format!("the dry sequence breakers cannot be tokenised: {message}")))?;
        let sampler = NativeSampler::own(raw, Kind::Plain)?;
        Ok(Self { sampler, scratch: Candidates::default(), _model: Arc::clone(model) })
    }

    /// Adds a token of the prompt or of the reply.
    pub fn accept(&mut self, token: Token) -> Result<()> {
        self.sampler.accept(token)
    }

    /// What to add to the logit of each of `tokens`, where that is not zero. Only tokens of the window can have any.
    pub fn penalties(
        &mut self,
        tokens: impl Iterator<Item = Token>,
    ) -> Result<impl Iterator<Item = (Token, f32)> + '_> {
        self.scratch.clear(0.0);
        self.scratch.data.extend(tokens.map(|id| entry(id, 0.0)));
        self.scratch.size = self.scratch.data.len();
        if !self.scratch.is_empty() {
            self.sampler.call(&mut self.scratch)?;
        }
        Ok(self.scratch.iter().filter(|&(_, penalty)| penalty < 0.0))
    }
}

fn checked_breakers(breakers: &[String]) -> Result<Vec<CString>> {
    within("number of dry sequence breakers", breakers.len(), ..=MAX_BREAKERS)?;
    breakers.iter().map(|text| checked_breaker(text)).collect()
}

fn checked_breaker(text: &str) -> Result<CString> {
    within("length of a dry sequence breaker in bytes", text.len(), 1..=MAX_BREAKER_BYTES)?;
    CString::new(text).map_err(|_| Error::Value(format!("the dry sequence breaker {text:?} contains a NUL character")))
}

fn check_mirostat(tau: f32, eta: f32) -> Result<()> {
    within("mirostat tau", tau, 0.0..=f32::MAX)?;
    within("mirostat eta", eta, 0.0..=f32::MAX)
}

/// llama.cpp takes its default seed as a wish for a random one.
fn repeatable(seed: u32) -> u32 {
    if seed == DEFAULT_SEED { seed - 1 } else { seed }
}

/// Refuses a value out of range, and NaN.
pub(crate) fn within<T, R>(name: &str, value: T, range: R) -> Result<()>
where
    T: PartialOrd + Display,
    R: RangeBounds<T> + Debug,
{
    if range.contains(&value) {
        return Ok(());
    }
    Err(Error::Value(format!("{name} is {value}; it must be {}", limits(&range))))
}

fn limits<T: Display>(range: &impl RangeBounds<T>) -> String {
    match (range.start_bound(), range.end_bound()) {
        (Bound::Unbounded, Bound::Included(end)) => format!("at most {end}"),
        (Bound::Included(start), Bound::Included(end)) => format!("from {start} to {end}"),
        (Bound::Included(start), _) => format!("at least {start}"),
        _ => "in range".into(),
    }
}

fn out_of_range(name: &str, value: impl Display, limit: impl Display) -> Error {
    Error::Value(format!("{name} is {value}; it must be at most {limit}"))
}

/// What llama.cpp's own sampler makes of `logits` after `history`: the tests compare our arithmetic with it.
#[cfg(test)]
pub(crate) fn penalised_by_llama_cpp(
    logits: &[f32],
    history: &[Token],
    last_tokens: i32,
    penalty: f32,
    frequency: f32,
    presence: f32,
) -> Vec<f32> {
    let n_vocab = logits.len() as i32;
    let mut data: Vec<_> =
        logits.iter().zip(0..).map(|(&logit, id)| sys::llama_token_data { id, logit, p: 0.0 }).collect();
    let mut array =
        sys::llama_token_data_array { data: data.as_mut_ptr(), size: data.len(), selected: -1, sorted: false };
    // SAFETY: plain values in range; the array describes `data`, which outlives the calls; the sampler is freed once.
    unsafe {
        let sampler = sys::llama_sampler_init_penalties(n_vocab, last_tokens, penalty, frequency, presence);
        history.iter().for_each(|&token| sys::llama_sampler_accept(sampler, token));
        sys::llama_sampler_apply(sampler, &raw mut array);
        sys::llama_sampler_free(sampler);
    }
    data.iter().map(|candidate| candidate.logit).collect()
}

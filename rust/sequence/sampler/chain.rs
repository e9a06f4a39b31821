//! Options become a chain: which edits, which first look at the row, which samplers after it.

use super::spec::{Mirostat, RepeatPenalty, SamplerKind, SamplerSpec, Vocabulary};
use crate::error::Result;
use crate::llama::{NativeSampler, Token};

/// The first look at the whole row.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Scan {
    Best,
    TopK(usize),
    All,
}

/// One step over the candidates.
pub(super) enum Link {
    Edit(Edit),
    Native(NativeSampler),
}

/// A change of a few logits.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Edit {
    Penalties,
    Dry,
}

/// What is added to single logits, forbidden tokens among them with -inf.
pub(super) fn bias(spec: &SamplerSpec, vocabulary: Vocabulary<'_>) -> Vec<(Token, f32)> {
    let eog: &[Token] = if spec.ignore_eos { vocabulary.eog } else { &[] };
    let forbidden = eog.iter().chain(vocabulary.suppressed).map(|&token| (token, f32::NEG_INFINITY));
    spec.logit_bias.iter().copied().filter(|&(_, bias)| bias != 0.0).chain(forbidden).collect()
}

/// All links in order, inactive ones left out; the last one draws.
pub(super) fn links(spec: &SamplerSpec, vocabulary: Vocabulary<'_>) -> Result<Vec<(Option<SamplerKind>, Link)>> {
    let mut links = Vec::new();
    for &kind in &spec.order {
        // Built even for a greedy draw, where they do not act, so that bad values are refused.
        links.extend(link(kind, spec)?.map(|link| (Some(kind), link)));
    }
    let last = match spec.mirostat {
        Some(Mirostat { version: 1, tau, eta }) => NativeSampler::mirostat(vocabulary.size, spec.seed, tau, eta)?,
        Some(Mirostat { tau, eta, .. }) => NativeSampler::mirostat_v2(spec.seed, tau, eta)?,
        None => NativeSampler::dist(spec.seed)?,
    };
    links.push((None, Link::Native(last)));
    Ok(links)
}

fn link(kind: SamplerKind, spec: &SamplerSpec) -> Result<Option<Link>> {
    let native = match kind {
        SamplerKind::Penalties => {
            let active = spec.repeat_penalty.as_ref().is_some_and(RepeatPenalty::is_active);
            return Ok(active.then_some(Link::Edit(Edit::Penalties)));
        }
        SamplerKind::Dry => {
            let active = spec.dry.as_ref().is_some_and(|dry| dry.multiplier > 0.0);
            return Ok(active.then_some(Link::Edit(Edit::Dry)));
        }
        SamplerKind::Temperature => temperature(spec)?,
        _ => truncation(kind, spec)?.filter(|_| spec.mirostat.is_none()),
    };
    Ok(native.map(Link::Native))
}

fn temperature(spec: &SamplerSpec) -> Result<Option<NativeSampler>> {
    if spec.temperature <= 0.0 {
        return Ok(None);
    }
    match spec.dynamic_temperature {
        Some(dynamic) => NativeSampler::dynamic_temperature(spec.temperature, dynamic.range, dynamic.exponent),
        None => NativeSampler::temperature(spec.temperature),
    }
    .map(Some)
}

fn truncation(kind: SamplerKind, spec: &SamplerSpec) -> Result<Option<NativeSampler>> {
    match kind {
        SamplerKind::TopNSigma => spec.top_n_sigma.map(NativeSampler::top_n_sigma),
        SamplerKind::TopK => (spec.top_k > 0).then(|| NativeSampler::top_k(spec.top_k)),
        SamplerKind::TypicalP => spec.typical_p.map(NativeSampler::typical),
        SamplerKind::TopP => (spec.top_p < 1.0).then(|| NativeSampler::top_p(spec.top_p)),
        SamplerKind::MinP => (spec.min_p > 0.0).then(|| NativeSampler::min_p(spec.min_p)),
        SamplerKind::Xtc => spec.xtc.map(|xtc| NativeSampler::xtc(xtc.probability, xtc.threshold, spec.seed)),
        SamplerKind::Penalties | SamplerKind::Dry | SamplerKind::Temperature => None,
    }
    .transpose()
}

/// Leading edits work on the row, and a top-k right after them is the scan itself.
pub(super) fn split(
    mut links: Vec<(Option<SamplerKind>, Link)>,
    spec: &SamplerSpec,
    n_vocab: usize,
) -> (Vec<Edit>, Scan, Vec<Link>) {
    let edit = |(_, link): &(_, Link)| {
        if let Link::Edit(edit) = link { Some(*edit) } else { None }
    };
    if spec.temperature <= 0.0 {
        return (links.iter().filter_map(edit).collect(), Scan::Best, Vec::new());
    }
    let edits: Vec<Edit> = links.iter().map_while(edit).collect();
    let mut rest = links.drain(edits.len()..).peekable();
    let scan = match (rest.next_if(|(kind, _)| *kind == Some(SamplerKind::TopK)), usize::try_from(spec.top_k)) {
        (Some(_), Ok(k)) => Scan::TopK(k.min(n_vocab)),
        _ => Scan::All,
    };
    (edits, scan, rest.map(|(_, link)| link).collect())
}

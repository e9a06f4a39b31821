//! A prediction as its readers see it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyTuple};

use super::error::to_python;
use super::process::Native;
use crate::context::job::Flow;
use crate::context::parking::Source;
use crate::prediction::{self, Event, Finished, Segment, Stats};
use crate::sequence::{Outcome, Sink, StopReason};

/// A running or finished prediction.
#[pyclass(frozen, module = "llamactor._core")]
pub struct Prediction {
    native: Native<Arc<prediction::Prediction>>,
    terms: OnceLock<Terms>,
    /// Whether it has begun, or ended before it could.
    begun: Arc<AtomicBool>,
}

/// What the result repeats of the options.
#[derive(Clone, Copy, Default)]
pub struct Terms {
    /// Drawn if none was given.
    pub seed: u32,
    /// What is done when the context is full.
    pub policy: &'static str,
    /// Whether log-probabilities were asked for.
    pub logprobs: bool,
}

impl Prediction {
    pub fn new(native: Arc<prediction::Prediction>, terms: Terms) -> Self {
        Self { native: Native::new(native), terms: terms.into(), begun: Arc::new(AtomicBool::new(true)) }
    }

    /// One whose prompt is not known yet. Cancelled before it begins, it ends at once.
    pub fn deferred(native: Arc<prediction::Prediction>) -> Self {
        let begun = Arc::new(AtomicBool::new(false));
        let (weak, flag) = (Arc::downgrade(&native), Arc::clone(&begun));
        native.on_nudge(Arc::new(move || {
            if let Some(native) = weak.upgrade()
                && native.cancel_flag().load(Ordering::SeqCst)
                && !flag.swap(true, Ordering::SeqCst)
            {
                end_unbegun(&native);
            }
        }));
        Self { native: Native::new(native), terms: OnceLock::new(), begun }
    }

    /// Takes it, to begin it; `None` when it has ended already.
    pub fn begin(&self, terms: Terms) -> PyResult<Option<Arc<prediction::Prediction>>> {
        let native = self.native.get()?;
        if self.begun.swap(true, Ordering::SeqCst) {
            return Ok(None);
        }
        let _ = self.terms.set(terms);
        Ok(Some(Arc::clone(native)))
    }
}

fn end_unbegun(native: &prediction::Prediction) {
    let (stop_reason, error) = (StopReason::Cancelled, native.cancel_error());
    native.finish(Outcome { stop_reason, stop_string: None, error, completed: true });
}

#[pymethods]
impl Prediction {
    #[getter]
    fn id(&self) -> PyResult<u64> {
        Ok(self.native.get()?.id())
    }

    #[getter]
    fn done(&self) -> PyResult<bool> {
        Ok(self.native.get()?.is_done())
    }

    fn cancel(&self) -> PyResult<()> {
        self.native.get()?.cancel();
        Ok(())
    }

    /// Notes that a deferred one begins with a window that has lost tokens.
    fn shifted(&self, n_kept: usize, n_dropped: usize) -> PyResult<()> {
        self.native.get()?.shifted(n_kept, n_dropped);
        Ok(())
    }

    /// Ends a deferred one that will not begin; no effect on any other.
    fn abandon(&self) -> PyResult<()> {
        let native = self.native.get()?;
        if !self.begun.swap(true, Ordering::SeqCst) {
            end_unbegun(native);
        }
        Ok(())
    }

    fn text(&self) -> PyResult<String> {
        Ok(self.native.get()?.text())
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        stats(py, &self.native.get()?.stats())
    }

    fn touched(&self) -> PyResult<bool> {
        Ok(self.native.get()?.is_touched())
    }

    fn open_reader(&self, events: bool) -> PyResult<usize> {
        Ok(self.native.get()?.open_reader(events))
    }

    fn close_reader(&self, reader: usize) -> PyResult<()> {
        self.native.get()?.close_reader(reader);
        Ok(())
    }

    fn add_interest(&self, result: bool) -> PyResult<()> {
        self.native.get()?.add_interest(result);
        Ok(())
    }

    fn drop_interest(&self, result: bool) -> PyResult<()> {
        self.native.get()?.drop_interest(result);
        Ok(())
    }

    fn read(&self, reader: usize) -> PyResult<Option<String>> {
        Ok(self.native.get()?.read(reader))
    }

    fn read_event<'py>(&self, py: Python<'py>, reader: usize) -> PyResult<Option<Bound<'py, PyTuple>>> {
        let event = self.native.get()?.read_event(reader);
        event.map(|event| tuple(py, event)).transpose()
    }

    fn set_waiting(&self, reader: usize) -> PyResult<()> {
        self.native.get()?.set_waiting(reader, true);
        Ok(())
    }

    fn clear_waiting(&self, reader: usize) -> PyResult<()> {
        self.native.get()?.set_waiting(reader, false);
        Ok(())
    }

    fn outcome<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = self.native.get()?.with_outcome(|outcome, finished| self.describe(py, outcome, &finished));
        dict.unwrap_or_else(|| Err(pyo3::exceptions::PyRuntimeError::new_err("the prediction has not ended")))
    }
}

impl Prediction {
    fn describe<'py>(&self, py: Python<'py>, outcome: &Outcome, finished: &Finished) -> PyResult<Bound<'py, PyDict>> {
        let terms = self.terms.get().copied().unwrap_or_default();
        let dict = PyDict::new(py);
        dict.set_item("content", &finished.text)?;
        dict.set_item("reasoning", Some(&finished.reasoning).filter(|text| !text.is_empty()))?;
        dict.set_item("segments", segments(py, finished)?)?;
        dict.set_item("content_start", finished.content_start)?;
        dict.set_item("tokens", &finished.tokens)?;
        dict.set_item("logprobs", terms.logprobs.then(|| logprobs(py, finished)).transpose()?)?;
        dict.set_item("stop_reason", outcome.stop_reason.name())?;
        dict.set_item("stop_string", &outcome.stop_string)?;
        dict.set_item("completed", outcome.completed)?;
        dict.set_item("seed", terms.seed)?;
        dict.set_item("context_shift", shift(py, terms.policy, finished)?)?;
        dict.set_item("stats", stats(py, &finished.stats)?)?;
        dict.set_item("error", outcome.error.as_ref().map(|error| to_python(error).into_value(py)))?;
        Ok(dict)
    }
}

fn tuple(py: Python<'_>, event: Event) -> PyResult<Bound<'_, PyTuple>> {
    match event {
        Event::Prompt { processed, cached, total } => ("prompt", processed, cached, total).into_pyobject(py),
        Event::Text(text, tokens) => ("text", text, tokens).into_pyobject(py),
        Event::Reasoning(text, tokens) => ("reasoning", text, tokens).into_pyobject(py),
        Event::SegmentStart => ("segment_start",).into_pyobject(py),
        Event::SegmentEnd => ("segment_end",).into_pyobject(py),
        Event::Shift(dropped) => ("shift", dropped).into_pyobject(py),
    }
}

fn shift<'py>(py: Python<'py>, policy: &str, finished: &Finished) -> PyResult<Option<Bound<'py, PyDict>>> {
    let Some((kept, dropped)) = finished.shift else { return Ok(None) };
    let dict = PyDict::new(py);
    dict.set_item("policy", policy)?;
    dict.set_item("kept", kept)?;
    dict.set_item("dropped", dropped)?;
    Ok(Some(dict))
}

fn segments<'py>(py: Python<'py>, finished: &Finished) -> PyResult<Bound<'py, PyList>> {
    let list = PyList::empty(py);
    for segment in &finished.segments {
        let Segment { text, first, tokens, duration, closed, forced } = segment;
        list.append((text, *first, PyTuple::new(py, tokens)?, *duration, *closed, *forced))?;
    }
    Ok(list)
}

fn logprobs<'py>(py: Python<'py>, finished: &Finished) -> PyResult<Bound<'py, PyList>> {
    let list = PyList::empty(py);
    for (token, logprob) in finished.tokens.iter().zip(&finished.logprobs) {
        list.append((*token, &logprob.text, logprob.logprob, logprob.top.clone()))?;
    }
    Ok(list)
}

fn stats<'py>(py: Python<'py>, stats: &Stats) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("prompt_tokens", stats.prompt_tokens)?;
    dict.set_item("cached_tokens", stats.cached_tokens)?;
    dict.set_item("predicted_tokens", stats.predicted_tokens)?;
    dict.set_item("total_tokens", stats.prompt_tokens + stats.predicted_tokens)?;
    dict.set_item("queue_time", stats.queue_time)?;
    dict.set_item("prefill_time", stats.prefill_time)?;
    dict.set_item("time_to_first_token", stats.time_to_first_token)?;
    dict.set_item("decode_time", stats.decode_time)?;
    dict.set_item("total_time", stats.total_time)?;
    dict.set_item("tokens_per_second", stats.tokens_per_second())?;
    dict.set_item("prompt_tokens_per_second", stats.prompt_tokens_per_second())?;
    dict.set_item("shifted_tokens", stats.shifted_tokens)?;
    dict.set_item("prefix_source", stats.prefix_source.map(Source::name))?;
    Ok(dict)
}

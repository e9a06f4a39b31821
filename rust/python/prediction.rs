//! A prediction as its readers see it.

use std::sync::{Arc, OnceLock};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyTuple};

use super::error::to_python;
use super::process::Native;
use crate::context::job::Flow as _;
use crate::context::parking::Source;
use crate::prediction::{self, Event, Finished, Segment, Stats, ToolCall};
use crate::sequence::{CallEvent, Outcome, StopReason};

/// A running or finished prediction.
#[pyclass(frozen, module = "llamactor._core")]
pub struct Prediction {
    native: Native<Arc<prediction::Prediction>>,
    /// Those of the first round.
    terms: OnceLock<Terms>,
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
        Self { native: Native::new(native), terms: terms.into() }
    }

    /// One whose prompt is not known yet.
    pub fn deferred(native: Arc<prediction::Prediction>) -> Self {
        Self { native: Native::new(native), terms: OnceLock::new() }
    }

    /// Takes it, to begin it or its next round; `None` when it has ended already.
    pub fn begin(&self, terms: Terms, more: bool) -> PyResult<Option<Arc<prediction::Prediction>>> {
        let native = self.native.get()?;
        if !native.begin(more) {
            return Ok(None);
        }
        let _ = self.terms.set(terms);
        Ok(Some(Arc::clone(native)))
    }
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

    /// Ends a deferred one that will not begin, or not go on; no effect on any other.
    fn abandon(&self) -> PyResult<()> {
        self.native.get()?.abandon();
        Ok(())
    }

    /// Ends one that is between two rounds with what it has.
    #[pyo3(signature = (stop_reason=None))]
    fn conclude(&self, stop_reason: Option<&str>) -> PyResult<()> {
        self.native.get()?.conclude(stop_reason.map(named).transpose()?);
        Ok(())
    }

    #[getter]
    fn rounds(&self) -> PyResult<usize> {
        Ok(self.native.get()?.n_rounds())
    }

    /// Id, tool and arguments of the whole calls so far, of all rounds, from the `start`-th on.
    fn calls<'py>(&self, py: Python<'py>, start: usize) -> PyResult<Bound<'py, PyList>> {
        tool_calls(py, &self.native.get()?.calls(start))
    }

    /// Puts in an event of the driver's own.
    fn note(&self, index: usize) -> PyResult<()> {
        self.native.get()?.note(index);
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

    /// What the round that has ended last has produced.
    fn round<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyDict>>> {
        let dict = self.native.get()?.with_round(|outcome, finished| self.describe(py, outcome, &finished));
        dict.transpose()
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
        dict.set_item("tool_calls", tool_calls(py, &finished.calls)?)?;
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

fn named(stop_reason: &str) -> PyResult<StopReason> {
    StopReason::from_name(stop_reason)
        .ok_or_else(|| PyValueError::new_err(format!("stop reason {stop_reason:?} is unknown")))
}

fn tuple(py: Python<'_>, event: Event) -> PyResult<Bound<'_, PyTuple>> {
    match event {
        Event::Prompt { processed, cached, total } => ("prompt", processed, cached, total).into_pyobject(py),
        Event::Text(text, tokens) => ("text", text, tokens).into_pyobject(py),
        Event::Reasoning(text, tokens) => ("reasoning", text, tokens).into_pyobject(py),
        Event::SegmentStart => ("segment_start",).into_pyobject(py),
        Event::SegmentEnd => ("segment_end",).into_pyobject(py),
        Event::Shift(dropped) => ("shift", dropped).into_pyobject(py),
        Event::Call(CallEvent::Start { index, id, name }) => ("call_start", index, id, name).into_pyobject(py),
        Event::Call(CallEvent::Delta { index, text }) => ("call_delta", index, text).into_pyobject(py),
        Event::Call(CallEvent::End { index, arguments }) => ("call_end", index, arguments).into_pyobject(py),
        Event::Note(index) => ("note", index).into_pyobject(py),
    }
}

fn tool_calls<'py>(py: Python<'py>, calls: &[ToolCall]) -> PyResult<Bound<'py, PyList>> {
    PyList::new(py, calls.iter().map(|call| (&call.id, &call.name, &call.arguments)))
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

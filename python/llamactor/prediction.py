"""A prediction: one running generation that one can iterate, await, cancel and measure.

Theory of operation. The generation runs on Rust threads and keeps its own text; nothing is copied
to Python until somebody reads. The public handle (`Prediction`) owns an internal `_State`, which is
all the loop's hub knows. Waiters, live iterators and open ``async with`` blocks are counted in Rust
as interest; when the last one goes, Rust cancels by itself, so that finalisers on any thread only
have to say that they went. Every waiter and iterator holds the handle, so once the handle itself is
dropped nobody is left, and what still runs is cancelled.

A reader that finds nothing suspends on a future of its own, which the hub's news resolves. Nothing
is read before the reader really runs again, so a cancelled `anext` or `await` loses nothing.

The result is built once, by whoever wants it first, and always on the loop: what a chat or a
schema's type does with it runs where the user's code runs, wherever a handle is dropped.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
import weakref
from collections import Counter
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import msgspec

from llamactor._hub import LoopHub, call_on_loop, check_loop, finalisers_rest, hub_for, running_loop
from llamactor._work import work_of
from llamactor.calls import ToolCall, read_call
from llamactor.errors import ClosedError, LlamactorError, SchemaValidationError
from llamactor.options import generation_options, native_options, native_prompt
from llamactor.schema import schema_of

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Generator, Mapping, Sequence
    from types import TracebackType

    from llamactor import _core
    from llamactor.chat.messages import Message
    from llamactor.options import ReasoningMarks
    from llamactor.schema import PartialReader, Schema

T = TypeVar("T")

StopReason: TypeAlias = Literal[
    "eos", "stop_string", "max_tokens", "context_full", "tool_calls", "cancelled"
]

OnSettled: TypeAlias = "Callable[[PredictionResult, BaseException | None], object]"
"""Takes the outcome of a prediction."""

SegmentKind: TypeAlias = Literal["reasoning"]

READS_PER_TURN = 64
"""Pieces one iterator takes without suspending before it lets the loop run."""

CHARACTERS_PER_VALUE = 4096
"""Characters that one partial value takes in at most; reading them takes a few milliseconds."""


class PredictionStats(msgspec.Struct, frozen=True):
    """What a prediction took; a snapshot while it runs. Times are in seconds."""

    prompt_tokens: int = 0
    """Tokens of the prompt, cached ones included."""
    cached_tokens: int = 0
    """Tokens of the prompt that were not evaluated again."""
    predicted_tokens: int = 0
    """Tokens generated."""
    total_tokens: int = 0
    """Prompt and generated tokens."""
    queue_time: float = 0.0
    """From the call until a sequence began to work on it."""
    prefill_time: float = 0.0
    """Evaluating the prompt."""
    time_to_first_token: float = 0.0
    """From the call to the first generated token."""
    decode_time: float = 0.0
    """From the first generated token to the last."""
    total_time: float = 0.0
    """From the call to the end."""
    tokens_per_second: float = 0.0
    """Generated tokens, but for the first, per second of `decode_time`; 0 with fewer than two."""
    prompt_tokens_per_second: float = 0.0
    """Evaluated prompt tokens per second of `prefill_time`."""
    draft_tokens: int = 0
    """Tokens a draft proposed; there are no drafts yet, so 0."""
    accepted_draft_tokens: int = 0
    """Proposed tokens that were taken; 0 likewise."""
    shifted_tokens: int = 0
    """Tokens dropped to make room."""
    prefix_source: Literal["cells", "host", "disk"] | None = None
    """Where the cached tokens were: in the context's cells, or parked in host memory or on disk."""


class TokenLogprob(msgspec.Struct, frozen=True):
    """One generated token with its natural log-probability, and the best tokens at its place."""

    token: int
    """Id in the vocabulary."""
    text: str
    """Its text; incomplete characters show as U+FFFD."""
    logprob: float
    """Natural logarithm of its probability before sampling."""
    top: tuple[TokenLogprob, ...] = ()
    """The n best, likeliest first, with ``logprobs=n``."""


class ContextShift(msgspec.Struct, frozen=True):
    """What was dropped from the context to make room during a prediction."""

    dropped: int
    """Tokens dropped in all."""
    kept: int
    """Tokens at the front that stayed in place."""


class Segment(msgspec.Struct, frozen=True):
    """A stretch of what was generated that is no content."""

    kind: SegmentKind
    """What it is."""
    text: str
    """Its text, without tags and the white space at them."""
    start: int
    """Index of its first token in the result's `tokens`."""
    tokens: tuple[int, ...]
    """Its tokens, tags included."""
    duration: float
    """Seconds from its first token to its last."""
    closed: bool
    """Whether its end tag came; False where the generation ended before."""
    forced: bool
    """Whether it was closed because `reasoning_budget` was used up."""


class PredictionResult(msgspec.Struct, frozen=True):
    """The outcome of a prediction; of a cancelled or failed one, as far as it came."""

    content: str
    """All text that is no reasoning, response prefix included."""
    tokens: list[int]
    """The generated token ids, those of reasoning and its tags included."""
    logprobs: list[TokenLogprob] | None
    """One entry per generated token if `logprobs` was asked for."""
    stop_reason: StopReason | None
    """Why it ended; None if it failed."""
    stop_string: str | None
    """The stop text that ended it."""
    stats: PredictionStats
    """What it took."""
    seed: int
    """The seed used, drawn if none was given."""
    context_shift: ContextShift | None
    """What was dropped to make room, if anything."""
    reasoning: str | None = None
    """All reasoning; None where there was none but white space."""
    segments: tuple[Segment, ...] = ()
    """The stretches of reasoning, in order."""
    content_start: int = 0
    """Index of the token in which content begins; the number of tokens if reasoning is all."""
    tool_calls: tuple[ToolCall, ...] = ()
    """The calls that the model made, of all rounds and in order."""
    rounds: int = 1
    """How often the model was asked: once, and once more for the results of each round of calls."""
    messages: tuple[Message, ...] = ()
    """What a chat has gained: answers with their calls, results, the last answer. Put behind the
    messages that were asked, they are how the chat goes on."""
    parsed: Any = None
    """The value that the content says, of the type that `schema` asked for.

    None without a schema, of a cancelled prediction, and where the answer was cut off before it was
    whole, as by a stop text.
    """
    completed: bool = True
    """False where a grammar, schema or regular expression had not come to its end by itself.

    A limit has closed the content then, or cut it; or a stop or a cancel has.
    """

    @property
    def pending_calls(self) -> tuple[ToolCall, ...]:
        """The calls that nobody has answered: of tools without a handler, or cut off by the end."""
        answers = Counter(
            (getattr(message, "tool_call_id", None), getattr(message, "name", None))
            for message in self.messages
        )
        pending = []
        for call in self.tool_calls:
            # Models may use an id again in a later round, so each answer is for one call.
            key = call.id, call.name
            answers[key] -= 1
            if answers[key] < 0:
                pending.append(call)
        return tuple(pending)

    def __str__(self) -> str:
        """Return the content."""
        return self.content


class PromptProgress(msgspec.Struct, frozen=True, tag=True):
    """So much of the prompt is evaluated."""

    processed: int
    """Tokens evaluated or taken from the cache."""
    cached: int
    """Tokens taken from the cache."""
    total: int
    """Tokens of the prompt."""


class TextDelta(msgspec.Struct, frozen=True, tag=True):
    """New text of a prediction."""

    text: str
    """Whole characters; none where only tokens are told, at the end of a segment or of all."""
    tokens: list[int]
    """The tokens generated since the last delta."""
    segment: SegmentKind | None = None
    """Kind of the segment it belongs to; None is plain content."""


class SegmentStart(msgspec.Struct, frozen=True, tag=True):
    """What comes now is no content, until `SegmentEnd`."""

    kind: SegmentKind
    """What it is."""


class SegmentEnd(msgspec.Struct, frozen=True, tag=True):
    """A segment has ended, closed or with the generation: every start has its end."""

    kind: SegmentKind
    """What it was."""


class ToolCallStart(msgspec.Struct, frozen=True, tag=True):
    """The model begins to call a tool."""

    index: int
    """Which call of its round, counted from 0."""
    id: str
    """What its result will answer to."""
    name: str
    """Name of the tool."""


class ToolCallDelta(msgspec.Struct, frozen=True, tag=True):
    """New text of a call's arguments; the deltas of a call join to a JSON object."""

    index: int
    """Which call of its round."""
    arguments: str
    """The text."""


class ToolCallEnd(msgspec.Struct, frozen=True, tag=True):
    """A call is complete; a handler starts now, while the model may go on."""

    call: ToolCall
    """The call."""


class ToolResult(msgspec.Struct, frozen=True, tag=True):
    """A call was answered."""

    call: ToolCall
    """The call as the model made it."""
    content: str
    """What the model is told."""
    error: LlamactorError | None = None
    """`ToolCallError` for a wrong or denied call, `ToolExecutionError` for a failed handler."""


class RoundStart(msgspec.Struct, frozen=True, tag=True):
    """The model is asked: at first, and once the calls of a round are answered."""

    index: int
    """Which round, counted from 0."""


class RoundEnd(msgspec.Struct, frozen=True, tag=True):
    """The model has stopped; results of its calls follow."""

    index: int
    """Which round."""


class ContextShifted(msgspec.Struct, frozen=True, tag=True):
    """Tokens were dropped from the context to make room."""

    dropped: int
    """How many."""


class Finished(msgspec.Struct, frozen=True, tag=True):
    """The last event of a prediction that did not fail."""

    result: PredictionResult
    """The whole result."""


Event: TypeAlias = (
    PromptProgress
    | TextDelta
    | SegmentStart
    | SegmentEnd
    | ToolCallStart
    | ToolCallDelta
    | ToolCallEnd
    | ToolResult
    | RoundStart
    | RoundEnd
    | ContextShifted
    | Finished
)


_ANSWERS_NOTHING = frozenset({"cancelled", "tool_calls"})
"""Reasons to end without a whole answer, whatever the text."""


class _State:
    """What the loop's hub knows of a prediction; never holds the public handle."""

    __slots__ = (
        "error",
        "failure",
        "hub",
        "ident",
        "lease",
        "loop",
        "native",
        "notes",
        "on_result",
        "on_round",
        "on_settled",
        "owner",
        "readers",
        "result",
        "retrieved",
        "schema",
        "waiters",
    )

    def __init__(
        self,
        native: _core.Prediction,
        hub: LoopHub,
        loop: asyncio.AbstractEventLoop,
        owner: object,
        schema: Schema[Any] | None,
    ) -> None:
        self.native = native
        self.hub = hub
        self.loop = loop
        # Whatever the sequence lives in must not be collected, and so closed, under a running
        # prediction.
        self.owner = owner
        self.schema = schema
        self.ident = native.id
        work = work_of(owner)
        self.lease = None if work is None else work.begin()
        self.readers: set[asyncio.Future[None]] = set()
        self.waiters: set[asyncio.Future[None]] = set()
        self.result: PredictionResult | None = None
        self.error: BaseException | None = None
        self.retrieved = False
        self.failure: BaseException | None = None
        """What it failed with before it began."""
        self.on_settled: OnSettled | None = None
        self.on_result: Callable[[PredictionResult], PredictionResult] | None = None
        """Adds what only its driver knows of the result."""
        self.on_round: Callable[[], object] | None = None
        """Tells its driver of news."""
        self.notes: list[Event] = []
        """Events that its driver has put in."""
        hub.listen(self.ident, self.on_news)

    def on_news(self) -> None:
        """Wake the readers, and at the end everybody, after whoever keeps the outcome."""
        done = self.native.done  # looked at once: an end that comes meanwhile is news of its own
        if done and self.on_settled is not None:
            self.settle()
        if self.on_round is not None:
            self.on_round()
        for reader in self.readers:
            _wake(reader)
        if done:
            self.hub.forget(self.ident)
            self.end_lease()
            for waiter in self.waiters:
                _wake(waiter)

    def end_lease(self) -> None:
        """Let the model go: it is not at work for this prediction any more."""
        lease, self.lease = self.lease, None
        if lease is not None:
            tokens: Any = self.native.stats()["predicted_tokens"]
            lease.settle(tokens)

    async def finished(self) -> None:
        """Wait for the end; the waiter is interest while it waits."""
        if self.native.done:
            return
        waiter = self.loop.create_future()
        self.waiters.add(waiter)
        self.native.add_interest(result=True)
        try:
            await waiter
        finally:
            self.waiters.discard(waiter)
            self.native.drop_interest(result=True)

    def settle(self) -> PredictionResult:
        """Return the result, building it the first time; on the loop, unless that is closed."""
        if self.result is None:
            outcome: dict[str, Any] = self.native.outcome()
            self.error = outcome.pop("error") or self.failure
            parsed = None if self.error is not None else self._parsed(outcome)
            result = result_of(outcome, self.error, parsed)
            self.result = self._completed(result)
            self.owner = self.on_result = self.on_round = None
            self.end_lease()
            if self.error is not None:
                _attach_partial(self.error, self.result)
            self._tell_settled(self.result)
        return self.result

    def _completed(self, result: PredictionResult) -> PredictionResult:
        """Return the result with what its driver adds; one that fails must not hide the end."""
        if self.on_result is None:
            return result
        try:
            return self.on_result(result)
        except Exception as error:
            self.error = self.error or error
            return msgspec.structs.replace(result, stop_reason=None, parsed=None)

    def _parsed(self, outcome: dict[str, Any]) -> Any:
        """Return the value of the content, if it has to be one; note why it is none."""
        reason = outcome["stop_reason"]
        if self.schema is None or reason in _ANSWERS_NOTHING:
            return None
        # With rounds it is the last one that answers.
        last: Any = self.native.round() if self.native.rounds > 1 else outcome
        try:
            return self.schema.read(last["content"])
        except SchemaValidationError as error:
            if reason == "eos":
                self.error = error
        except Exception as error:  # code of the user's type
            self.error = error
        return None

    def _tell_settled(self, result: PredictionResult) -> None:
        on_settled, self.on_settled = self.on_settled, None
        if on_settled is not None:
            on_settled(result, self.error)

    def deliver(self) -> PredictionResult:
        """Return the result of a finished prediction or raise its failure."""
        result = self.settle()
        if self.error is not None:
            self.retrieved = True
            raise self.error.with_traceback(None)
        return result


class Prediction:
    """One running generation, bound to the event loop it was created in.

    Iterate it for text, await it for the result, or both, in any order and by any number of
    readers. It starts at once; iterating replays from the first piece. When everybody who waited
    for it or iterated it is gone, it is cancelled; hold it in ``async with`` to leave an iteration
    and go on. One that nobody reads runs to its end, or until its last reference is dropped.
    """

    def __init__(self, state: _State) -> None:
        """Wrap a running generation; made by `Sequence.predict`, `Model.complete` and the like."""
        self._state = state
        self._native = state.native

    @property
    def done(self) -> bool:
        """Whether it has ended, for whatever reason. From any thread."""
        return self._native.done

    @property
    def text(self) -> str:
        """All content so far. From any thread."""
        return self._native.text()

    @property
    def stats(self) -> PredictionStats:
        """What it took so far. From any thread."""
        result = self._state.result
        return _stats(self._native.stats()) if result is None else result.stats

    def cancel(self) -> None:
        """Ask it to stop: returns at once, idempotent, from any thread.

        It then ends normally with the text so far and ``stop_reason="cancelled"``; evaluation stops
        within one decode.
        """
        self._native.cancel()

    async def result(self) -> PredictionResult:
        """Return the result: awaiting, as a coroutine for `create_task` and the like.

        Cancelling this re-raises `CancelledError`; the prediction is cancelled with it if nobody
        else is interested, and a later await returns what there is.

        Raises:
            LlamactorError: the prediction failed; `.partial` has what it produced.
            RuntimeError: called in another event loop than the prediction's.
        """
        check_loop(self._state.loop, "awaiting a prediction")
        await self._state.finished()
        return self._state.deliver()

    def __await__(self) -> Generator[Any, None, PredictionResult]:
        """Return the result; see `result` for what cancelling does."""
        return self.result().__await__()

    def __aiter__(self) -> PredictionIterator[str]:
        """Iterate over the text from its first piece; the pieces join to the result's content.

        Reasoning is not among them: `events` has it.

        Cancelling an `anext` loses nothing while the iterator lives; dropping the iterator ends its
        interest.
        """
        check_loop(self._state.loop, "iterating a prediction")
        return _TextIterator(self, self._state)

    def events(self) -> PredictionIterator[Event]:
        """Iterate over typed events, ending with `Finished`; cancelling is as with the text."""
        check_loop(self._state.loop, "iterating a prediction")
        return _EventIterator(self, self._state)

    def partial_values(self) -> PredictionIterator[Any]:
        """Iterate over the value that the answer says so far, each time it has changed.

        JSON Schemas give plain data. Types give values of a partial class as long as an object is
        open: the same attributes, each of which is `msgspec.UNSET` until it has come. Texts are
        shown as they grow; numbers, words, and texts that stand for something else (an enum, a
        date) when they are whole. The last value is the result's `parsed`. Values share what they
        have in common, so do not change them.

        Like iterating the text, it begins with the first piece, and cancelling an `anext` loses
        nothing while the iterator lives.

        Raises:
            ValueError: the prediction has no `schema`.
        """
        check_loop(self._state.loop, "iterating a prediction")
        if self._state.schema is None:
            raise ValueError("this prediction has no values: it was made without schema=")
        return _ValueIterator(self, self._state, self._state.schema)

    async def __aenter__(self) -> Prediction:
        """Hold it while the block is open, whatever happens to iterators. Never suspends."""
        check_loop(self._state.loop, "entering a prediction")
        self._native.add_interest(result=False)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Cancel what still runs; never raises and never waits."""
        # Only a forked child cannot; it has nothing to cancel.
        with contextlib.suppress(ClosedError):
            self._native.cancel()
            self._native.drop_interest(result=False)

    def __repr__(self) -> str:
        """Return the state in words."""
        if finalisers_rest():
            return f"<Prediction {self._state.ident} of another process>"
        return f"<Prediction {self._state.ident} {'done' if self.done else 'running'}>"

    def __del__(self) -> None:
        """Cancel what nobody can reach any more, report what nobody saw; on whatever thread."""
        state = getattr(self, "_state", None)
        if state is None or finalisers_rest():
            return
        done = state.native.done
        if done:
            # There, since that is where everybody else looks at the outcome.
            call_on_loop(state.loop, functools.partial(_report_unretrieved, state))
        # A chat wants to hear of the end. A closed loop hears nothing: its hub must not keep it.
        closed = state.loop.is_closed()
        if closed or done:
            state.end_lease()
        if closed or state.on_settled is None:
            state.hub.forget(state.ident)
            _end_lease_later(state)
        if done:
            return
        forgotten = not state.native.touched()
        state.native.cancel()
        if forgotten:
            message = "a prediction was dropped unfinished, and never read, awaited or cancelled"
            warnings.warn(message, RuntimeWarning, stacklevel=2, source=self)


class PredictionIterator(AsyncIterator[T]):
    """Reads one prediction from its start; a plain object, so that dropping it is enough."""

    __slots__ = (
        "_burst",
        "_native",
        "_open",
        "_prediction",
        "_reader",
        "_state",
        "_suspended",
        "_take",
    )

    _take: Callable[[int], T | None]

    def __init__(self, prediction: Prediction, state: _State, *, events: bool) -> None:
        """Open a reader of `prediction`."""
        self._open = False
        self._prediction: Prediction = prediction
        self._state = state
        self._native = state.native
        self._reader = state.native.open_reader(events)
        self._open = True
        self._burst = 0
        self._suspended = False

    def __aiter__(self) -> PredictionIterator[T]:
        """Return itself; never suspends."""
        return self

    async def __anext__(self) -> T:
        """Return what is new, or wait for it.

        Cancelling this loses nothing: the next call, on the same iterator, returns it.

        Raises:
            LlamactorError: the prediction failed, after everything it produced was read.
            RuntimeError: another task waits on this iterator, or this is another event loop.
        """
        state = self._state
        if running_loop("iterating a prediction") is not state.loop:
            check_loop(state.loop, "iterating a prediction")
        if self._suspended:
            raise RuntimeError(
                "another task is waiting on this iterator; give each task an iterator of its own"
            )
        native, reader = state.native, self._reader
        while self._open:
            if self._burst >= READS_PER_TURN:
                waiter = self._turn()
            else:
                done = native.done  # before the read: what comes after it is read by the next round
                item = self._take(reader)
                if item is not None:
                    self._burst += 1
                    return item
                if done:
                    break
                waiter = self._news()
            try:
                await waiter
            except BaseException:
                native.clear_waiting(reader)
                self._resume(waiter)
                # A traceback keeps this frame, which must not keep the iterator: its end is news.
                del self
                raise
            self._resume(waiter)
        return self._end()

    def _news(self) -> asyncio.Future[None]:
        """Return a future that the next news resolves."""
        waiter = self._state.loop.create_future()
        self._state.readers.add(waiter)
        self._native.set_waiting(self._reader)
        self._suspended = True
        return waiter

    def _turn(self) -> asyncio.Future[None]:
        """Return a future that the next turn of the loop resolves."""
        waiter = self._state.loop.create_future()
        self._state.loop.call_soon(_wake, waiter)
        self._suspended = True
        return waiter

    def _resume(self, waiter: asyncio.Future[None]) -> None:
        self._suspended = False
        self._burst = 0
        self._state.readers.discard(waiter)

    def _end(self) -> T:
        self._close()
        self._state.deliver()
        raise StopAsyncIteration

    def _close(self) -> None:
        if self._open:
            self._open = False
            self._native.close_reader(self._reader)

    def __del__(self) -> None:
        """End the interest of this reader; on whatever thread this runs."""
        if not finalisers_rest():
            self._close()


class _TextIterator(PredictionIterator[str]):
    __slots__ = ()

    def __init__(self, prediction: Prediction, state: _State) -> None:
        super().__init__(prediction, state, events=False)
        self._take = state.native.read


class _EventIterator(PredictionIterator[Event]):
    __slots__ = ("_finished",)

    def __init__(self, prediction: Prediction, state: _State) -> None:
        super().__init__(prediction, state, events=True)
        self._finished = False
        read, notes = state.native.read_event, state.notes
        calls: dict[int, tuple[str, str]] = {}
        self._take = lambda reader: _event(read(reader), notes, calls)

    def _end(self) -> Event:
        self._close()
        result = self._state.deliver()
        if self._finished:
            raise StopAsyncIteration
        self._finished = True
        return Finished(result)


class _Values:
    """The text of one reader as values; apart from its iterator, which nothing may hold."""

    __slots__ = ("_read", "_reader", "_unread", "last")

    def __init__(self, read: Callable[[int], str | None], reader: PartialReader) -> None:
        self._read = read
        self._reader = reader
        self._unread = ""
        self.last: Any = msgspec.UNSET
        """The value that was taken last."""

    @property
    def is_null(self) -> bool:
        """Whether the whole document says null, which is no value to grow."""
        return self._reader.value is None

    def take(self, reader: int) -> Any:
        """Read until the value changes; None if nothing more has come."""
        while True:
            self._unread = self._unread or self._read(reader) or ""
            if not self._unread:
                return None
            text = self._unread[:CHARACTERS_PER_VALUE]
            self._unread = self._unread[CHARACTERS_PER_VALUE:]
            value = self._reader.value if self._reader.feed(text) else None
            if value is not None and value is not msgspec.UNSET:
                self.last = value
                return value


class _ValueIterator(PredictionIterator[Any]):
    __slots__ = ("_values",)

    def __init__(self, prediction: Prediction, state: _State, schema: Schema[Any]) -> None:
        super().__init__(prediction, state, events=False)
        self._values = _Values(state.native.read, schema.reader())
        self._take = self._values.take

    def _end(self) -> Any:
        self._close()
        parsed, values = self._state.deliver().parsed, self._values
        if (parsed is None and not values.is_null) or parsed == values.last:
            raise StopAsyncIteration
        values.last = parsed
        return parsed


def start_prediction(
    start: Callable[[_core.Hub, str | list[int], dict[str, object]], _core.Prediction],
    model: _core.Model,
    owner: object,
    prompt: str | Sequence[int],
    keywords: Mapping[str, Any],
    reasoning: ReasoningMarks | None = None,
) -> Prediction:
    """Check the arguments, start a native prediction on the running loop and return its handle."""
    loop = running_loop("a prediction")
    wanted = generation_options(keywords)
    options = native_options(wanted, model, reasoning)
    checked = native_prompt(prompt, model)
    hub = hub_for(loop)
    schema = None if wanted.schema is None else schema_of(wanted.schema)
    return Prediction(_State(start(hub.native, checked, options), hub, loop, owner, schema))


class Deferred:
    """The other end of a prediction whose prompt is not known yet; never holds the public handle.

    A chat makes the prediction at the call, waits its turn and renders its prompt meanwhile.
    """

    __slots__ = ("_context", "_state")

    def __init__(self, context: _core.Context, state: _State) -> None:
        """Wrap the state of a prediction that has not begun."""
        self._context = context
        self._state = state

    @property
    def done(self) -> bool:
        """Whether it has ended, as it does when it is cancelled before it begins."""
        return self._state.native.done

    def start(
        self,
        prompt: list[int],
        options: dict[str, object],
        *,
        chat: int = 0,
        keep: int = 0,
        dropped: tuple[list[int], list[tuple[int, int]]] | None = None,
        more: bool = False,
    ) -> bool:
        """Begin with `prompt`, or begin the next round; return False if it has ended already.

        Args:
            prompt: Token ids.
            options: As `native_options` gives them.
            chat: The chat it is a turn of.
            keep: Tokens at the front that stay when the context is full.
            dropped: The tokens that the chat's window had before, and the ranges of them that have
                gone since: what follows is moved where the memory can, instead of evaluated again.
            more: Whether another round may follow: its end is not that of the prediction then,
                unless it fails or is cancelled.
        """
        turn: dict[str, object] = {"chat": chat, "keep": keep, "dropped": dropped, "more": more}
        return self._context.begin(self._state.native, prompt, options, turn)

    def note_shift(self, kept: int, dropped: int) -> None:
        """Say that the prompt has lost `dropped` tokens after the first `kept`."""
        self._state.native.shifted(kept, dropped)

    @property
    def rounds(self) -> int:
        """How many rounds have ended."""
        return self._state.native.rounds

    def calls(self, start: int) -> list[tuple[str, str, str]]:
        """Return id, tool and arguments as JSON of the complete calls from the `start`-th on."""
        return self._state.native.calls(start)

    def last_round(self) -> PredictionResult | None:
        """Return what the round that has ended last has produced; None before the first end."""
        outcome: dict[str, Any] | None = self._state.native.round()
        return None if outcome is None else result_of(outcome, outcome.pop("error"))

    def tell(self, event: Event) -> None:
        """Put an event in, behind what is there; nothing once it has ended."""
        self._state.notes.append(event)
        self._state.native.note(len(self._state.notes) - 1)

    def on_round(self, callback: Callable[[], object]) -> None:
        """Call `callback` on the loop whenever there is news."""
        self._state.on_round = callback

    def on_result(self, complete: Callable[[PredictionResult], PredictionResult]) -> None:
        """Let `complete` add to the result what is not known here."""
        self._state.on_result = complete

    def conclude(self, stop_reason: StopReason | None = None) -> None:
        """End it between two rounds, as the last one has ended or for this reason."""
        self._state.native.conclude(stop_reason)

    def fail(self, error: BaseException) -> None:
        """End it with `error` if it has not ended; what runs must be cancelled besides."""
        if not self._state.native.done:
            self._state.failure = error
            self._state.native.abandon()

    def cancel(self) -> None:
        """Cancel it, as its handle does."""
        self._state.native.cancel()


def defer_prediction(
    context: _core.Context,
    owner: object,
    max_pending: int | None,
    on_settled: OnSettled,
    schema: Any = None,
) -> tuple[Prediction, Deferred]:
    """Return a prediction that begins later, and what begins it.

    Args:
        context: Where it will run.
        owner: What must live as long as it runs.
        max_pending: Tokens that all its readers may lag before it pauses.
        on_settled: Called once with the result and the failure, on the loop and before anybody
            who waits for the prediction goes on.
        schema: What the answer is to be, as `schema_of` takes it.
    """
    loop = running_loop("a prediction")
    hub = hub_for(loop)
    wanted = None if schema is None else schema_of(schema)
    state = _State(context.defer(hub.native, max_pending), hub, loop, owner, wanted)
    state.on_settled = on_settled
    return Prediction(state), Deferred(context, state)


def _end_lease_later(state: _State) -> None:
    """Let the model go once a prediction that nobody can reach has ended; on whatever thread."""
    native, lease, hub = state.native, state.lease, weakref.ref(state.hub)
    if lease is None:
        return

    def on_news() -> None:
        # Holds neither the state nor the loop, which would keep each other.
        if native.done:
            tokens: Any = native.stats()["predicted_tokens"]
            lease.settle(tokens)
            if (listening := hub()) is not None:
                listening.forget(native.id)

    state.hub.listen(state.ident, on_news)
    on_news()


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _stats(values: dict[str, object]) -> PredictionStats:
    return msgspec.convert(values, PredictionStats)


def result_of(
    outcome: dict[str, Any], error: BaseException | None, parsed: Any = None
) -> PredictionResult:
    """Return the result that the core's account of a prediction, or of a round, stands for.

    `parsed` is the value that its content says.
    """
    logprobs, shift = outcome["logprobs"], outcome["context_shift"]
    return PredictionResult(
        content=outcome["content"],
        tokens=outcome["tokens"],
        logprobs=None if logprobs is None else [_logprob(*entry) for entry in logprobs],
        stop_reason=None if error is not None else outcome["stop_reason"],
        stop_string=outcome["stop_string"],
        stats=_stats(outcome["stats"]),
        seed=outcome["seed"],
        context_shift=None if shift is None else msgspec.convert(shift, ContextShift),
        reasoning=outcome["reasoning"],
        segments=tuple(Segment("reasoning", *segment) for segment in outcome["segments"]),
        content_start=outcome["content_start"],
        tool_calls=tuple(read_call(*call) for call in outcome["tool_calls"]),
        parsed=parsed,
        completed=outcome["completed"],
    )


def _logprob(
    token: int, text: str, logprob: float, top: list[tuple[int, str, float]]
) -> TokenLogprob:
    return TokenLogprob(token, text, logprob, tuple(TokenLogprob(*entry) for entry in top))


def _event(
    native: tuple[Any, ...] | None, notes: Sequence[Event], calls: dict[int, tuple[str, str]]
) -> Event | None:
    """Return the event; `calls` has id and name of the round's calls so far."""
    match native:
        case None:
            return None
        case ("note", int(index)):
            return notes[index]
        case ("text", text, tokens):
            return TextDelta(text, tokens)
        case ("reasoning", text, tokens):
            return TextDelta(text, tokens, "reasoning")
        case ("segment_start",):
            return SegmentStart("reasoning")
        case ("segment_end",):
            return SegmentEnd("reasoning")
        case ("prompt", processed, cached, total):
            return PromptProgress(processed, cached, total)
        case ("shift", dropped):
            return ContextShifted(dropped)
        case (kind, index, *rest):
            return _call_event(kind, index, rest, calls)
    raise AssertionError(f"unknown event {native!r}")


def _call_event(
    kind: str, index: int, rest: Sequence[str], calls: dict[int, tuple[str, str]]
) -> Event:
    match kind, rest:
        case "call_start", (ident, name):
            calls[index] = (ident, name)
            return ToolCallStart(index, ident, name)
        case "call_delta", (arguments,):
            return ToolCallDelta(index, arguments)
        case "call_end", (arguments,):
            return ToolCallEnd(read_call(*calls[index], arguments))
    raise AssertionError(f"unknown event {kind!r}")


def _attach_partial(error: BaseException, result: PredictionResult) -> None:
    if isinstance(error, LlamactorError):
        error.partial = result
        return
    # An exception of a user's callback may refuse attributes.
    with contextlib.suppress(AttributeError):
        error.partial = result  # type: ignore[attr-defined]


def _report_unretrieved(state: _State) -> None:
    """Tell the loop's exception handler of a failure that nobody saw."""
    state.settle()
    if state.error is None or state.retrieved:
        return
    context = {
        "message": "a prediction failed and nobody retrieved the failure",
        "exception": state.error,
    }
    report_to_loop(state.loop, context)


def report_to_loop(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Call the exception handler of `loop` on its own thread, or here if the loop is closed."""
    call_on_loop(loop, functools.partial(loop.call_exception_handler, context))

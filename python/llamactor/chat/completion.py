"""Suggestions while the user types: what is known at once, the rest in the background.

Theory of operation. Every text that was completed is an entry of the cache: the text, what the
model wrote after it, and how many tokens it may still write. `CompletionEngine.complete` looks for
an entry whose text and suggestion begin with what is asked for, and answers with the rest of it.
At most one entry is being written. Typing along it leaves it alone. Anything else supersedes it:
the prediction is cancelled, and what it had produced stays in its entry, to be gone on with later.

Suggestions belong to one state of the history. The session says when that changes (`invalidate`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias, Unpack

from llamactor import _checks as check
from llamactor._hub import check_loop, running_loop
from llamactor.errors import ClosedError
from llamactor.options import GenerationKeywords, generation_options

if TYPE_CHECKING:
    from types import TracebackType

    from llamactor.chat.session import ChatSession
    from llamactor.prediction import Prediction, PredictionResult

OnGeneration: TypeAlias = Callable[[str, str], object]
"""Takes what the user has typed and what may follow."""

MAX_TOKENS = 256
"""Tokens of a suggestion, if nobody says otherwise."""

ENDINGS = ("eos", "stop_string", "context_full")
"""Stop reasons after which there is nothing to go on with."""


class Entry:
    """A text and how it goes on, as far as known."""

    __slots__ = ("ended", "left", "suggestion", "text")

    def __init__(self, text: str, left: int) -> None:
        """Begin without a suggestion, and with `left` tokens to write."""
        self.text = text
        self.suggestion = ""
        self.left = left
        """Tokens that it may still write."""
        self.ended = False
        """Whether the model has said all it had to say."""

    @property
    def whole(self) -> str:
        """Text and suggestion."""
        return self.text + self.suggestion

    def rest(self, text: str) -> str | None:
        """Return what follows `text`, or None if this is about something else."""
        if text.startswith(self.text) and self.whole.startswith(text):
            return self.whole[len(text) :]
        return None


class CompletionCache:
    """Entries by their texts; the one that was used longest ago goes first. Pure."""

    def __init__(self, max_cached: int) -> None:
        """Keep `max_cached` entries."""
        self._max = max_cached
        self._entries: dict[str, Entry] = {}  # in the order of their use

    def __len__(self) -> int:
        """Return how many entries there are."""
        return len(self._entries)

    def __contains__(self, text: str) -> bool:
        """Return whether there is an entry for exactly this text."""
        return text in self._entries

    def find(self, text: str) -> Entry | None:
        """Return an entry that says what follows `text`, and count that as a use of it.

        Of several, it is the one used last, so that a suggestion somebody types along stays; one
        that says nothing more is for want of a better one.
        """
        found = [entry for entry in self._entries.values() if entry.rest(text) is not None]
        saying = [entry for entry in found if entry.rest(text)]
        return self._use((saying or found)[-1]) if found else None

    def open(self, text: str, left: int) -> Entry:
        """Return a new entry for `text` in place of any other; the oldest one may go for it."""
        self._entries.pop(text, None)
        while len(self._entries) >= self._max:
            del self._entries[next(iter(self._entries))]
        return self._use(Entry(text, left))

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()

    def _use(self, entry: Entry) -> Entry:
        self._entries.pop(entry.text, None)
        self._entries[entry.text] = entry
        return entry


class _Job:
    """The entry that is being written."""

    __slots__ = ("entry", "prediction", "task")

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.prediction: Prediction | None = None
        self.task: asyncio.Task[None]

    @property
    def waits(self) -> bool:
        """Whether it has not come to an end, for all one can see."""
        return self.prediction is None or not self.prediction.done

    def cancel(self) -> None:
        """Stop the prediction at once, and the task where it waits."""
        if self.prediction is not None:
            self.prediction.cancel()
        self.task.cancel()


class CompletionEngine:
    """Completes what the user is typing into a chat, keystroke by keystroke.

    ::

        engine = session.completion_engine(on_generation=show)
        show(typed, engine.complete(typed))  # with every keystroke; never waits

    It belongs to the event loop of its session. Close it with `aclose`, or use it with
    ``async with``. A prompt to the session cancels what is being written, and whatever changes the
    history makes it forget all suggestions.
    """

    def __init__(
        self,
        session: ChatSession,
        *,
        max_cached: int = 100,
        on_generation: OnGeneration | None = None,
        **options: Unpack[GenerationKeywords],
    ) -> None:
        """Make an engine; `ChatSession.completion_engine` does it.

        Args:
            session: Whose next prompt is completed.
            max_cached: Texts whose suggestions are kept.
            on_generation: Called on the loop with the current text and all that may follow it
                whenever that has grown. If it raises, the loop's exception handler hears of it, and
                the suggestion is not gone on with.
            **options: See `GenerationOptions`, laid over the session's. ``max_tokens`` is 256 for a
                suggestion unless given.

        Raises:
            TypeError: an option is unknown or has the wrong type.
            ValueError: an option is out of range.
            RuntimeError: called without a running event loop.
        """
        # Wrong options are an error here, not with the first keystroke.
        max_tokens = generation_options(options).max_tokens
        self._max_tokens = MAX_TOKENS if max_tokens is None else max_tokens
        self._cache = CompletionCache(check.check_int("max_cached", max_cached, 1))
        if on_generation is not None:
            check.check_callable("on_generation", on_generation)
        self._loop = running_loop("a completion engine")
        self._session = session
        self._on_generation = on_generation
        self._options: dict[str, Any] = dict(options)
        self._current = ""
        self._job: _Job | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def running(self) -> bool:
        """Whether a suggestion is being written."""
        return self._job is not None

    def complete(self, text: str) -> str:
        """Return what is known to follow `text`, perhaps nothing, and go on in the background.

        Never waits. News comes by `on_generation`, until another text is asked for. Typing along a
        suggestion starts no new work; only at its end the next one begins.

        Args:
            text: All that the user has typed into the prompt so far.

        Raises:
            ClosedError: the engine or its session was closed.
            RuntimeError: called outside of the engine's event loop.
            TypeError: `text` is no str.
        """
        check_loop(self._loop, "a completion engine")
        check.check_text("text", text)
        if self._closed or self._session.closed:
            raise ClosedError("the completion engine or its chat session was closed")
        self._current = text
        entry = self._cache.find(text)
        if entry is None or self._is_used_up(entry):
            entry = self._cache.open(text, self._max_tokens)
        if self._job is None or self._job.entry is not entry:
            self._supersede()
            if entry.left:
                self._start(entry)
        return entry.whole[len(text) :]

    def invalidate(self) -> None:
        """Forget all suggestions, since the history has changed; the session calls it.

        One that was waiting for its turn is asked for anew.
        """
        self._cache.clear()
        waits = self._job is not None and self._job.waits
        self._supersede()
        if waits and not self._closed:
            self._start(self._cache.open(self._current, self._max_tokens))

    async def aclose(self) -> None:
        """Cancel what is being written and wait until its task has ended; idempotent.

        Cancelling this does not stop the closing, only the waiting for it.
        """
        check_loop(self._loop, "a completion engine")
        self._closed = True
        self._supersede()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def __aenter__(self) -> CompletionEngine:
        """Return itself; never suspends."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close it; cancelling is as with `aclose`."""
        await self.aclose()

    def _is_used_up(self, entry: Entry) -> bool:
        """Whether an entry stopped at its limit of tokens, and all of them have been typed."""
        return entry.whole == self._current and not entry.left and not entry.ended

    def _supersede(self) -> None:
        """Stop what is being written: nothing more of it is delivered."""
        job, self._job = self._job, None
        if job is not None:
            job.cancel()

    def _start(self, entry: Entry) -> None:
        job = self._job = _Job(entry)
        job.task = self._loop.create_task(self._write(job), name="llamactor-completion")
        self._tasks.add(job.task)
        job.task.add_done_callback(self._ended)

    async def _write(self, job: _Job) -> None:
        """Let the session go on with an entry, and keep what comes."""
        entry = job.entry
        before = entry.suggestion
        options = {**self._options, "max_tokens": entry.left}
        prediction = job.prediction = self._session.complete(entry.whole, **options)
        try:
            async with prediction:
                async for _ in prediction:
                    entry.suggestion = before + prediction.text
                    self._tell(job)
                _finish(entry, await prediction)
        finally:
            # Not all may have been read when it was superseded.
            entry.suggestion = before + prediction.text
            entry.left = max(0, entry.left - prediction.stats.predicted_tokens)
            if self._job is job:
                self._job = None

    def _tell(self, job: _Job) -> None:
        rest = job.entry.rest(self._current)
        if self._job is job and rest and self._on_generation is not None:
            self._on_generation(self._current, rest)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if isinstance(error, ClosedError) and self._session.closed:
            return  # whoever closed it knows
        context = {"message": "llamactor: a completion failed", "exception": error, "task": task}
        self._loop.call_exception_handler(context)


def _finish(entry: Entry, result: PredictionResult) -> None:
    """Note why a prediction ended by itself."""
    entry.ended = result.stop_reason in ENDINGS
    if result.stop_reason != "cancelled":
        entry.left = 0

"""A sequence: one row of a context's memory, and the actor that drives it."""

from __future__ import annotations

import asyncio
import itertools
import warnings
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

import msgspec

from llamactor import _checks as check
from llamactor._hub import check_loop, finalisers_rest, finish, hub_for, running_loop
from llamactor.errors import BusyError
from llamactor.options import MAX_INT, GenerationKeywords, native_prompt
from llamactor.prediction import Prediction, start_prediction

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable
    from collections.abc import Sequence as Items
    from types import TracebackType

    from llamactor import _core
    from llamactor._home import Home

T = TypeVar("T")


class SequenceUsage(msgspec.Struct, frozen=True):
    """Tokens a sequence has worked on since it was opened."""

    prompt_tokens: int = 0
    """Prompt tokens evaluated."""
    cached_tokens: int = 0
    """Prompt tokens reused instead."""
    predicted_tokens: int = 0
    """Tokens generated."""


class Sequence:
    """One sequence of a context; belongs to the event loop it was opened in.

    Predictions and changes on one sequence run one after the other, in the order of the calls.
    Once it, its context or its model is closed, they raise `ClosedError`.
    """

    def __init__(self, native: _core.Sequence, home: Home) -> None:
        """Wrap an acquired native sequence; made by `Context.sequence` and `fork`."""
        self._native = native
        self._model = home.model
        self._of = home
        self._loop = running_loop("a sequence")

    @property
    def id(self) -> int:
        """Its number within the context."""
        return self._native.id

    @property
    def closed(self) -> bool:
        """Whether it, its context or its model was closed."""
        return self._native.closed

    @property
    def tokens(self) -> list[int]:
        """The tokens it holds, in order: prompts, and of an answer all but the last token."""
        return self._native.tokens()

    @property
    def usage(self) -> SequenceUsage:
        """Tokens it has worked on since it was opened."""
        return msgspec.convert(self._native.usage(), SequenceUsage)

    def predict(
        self, prompt: str | Items[int], **options: Unpack[GenerationKeywords]
    ) -> Prediction:
        """Start a prediction that continues `prompt`, reusing the prefix that is evaluated here.

        A second prediction while one runs waits its turn. It is cancelled when everybody who
        waited for it or iterated it is gone; see `Prediction`.

        Args:
            prompt: The whole text, special tokens parsed unless ``special=False``, or token ids;
                not empty.
            **options: See `GenerationOptions`.

        Raises:
            TypeError: an option is unknown or has the wrong type.
            ValueError: the prompt is empty or an option out of range.
            RuntimeError: called outside of the sequence's event loop.
        """
        check_loop(self._loop, "a sequence")
        return start_prediction(self._native.predict, self._model, self, prompt, options)

    async def prefill(self, prompt: str | Items[int], *, special: bool = True) -> int:
        """Evaluate `prompt` without generating, and return how many tokens had to be evaluated.

        Cancelling this stops within one decode call; what is evaluated by then stays and is reused.

        Args:
            prompt: The whole text that the sequence shall hold, or its token ids; not empty.
            special: Parse special tokens such as ``<|im_start|>`` in a text.

        Raises:
            ContextOverflowError: the prompt does not fit into the context.
        """
        checked = native_prompt(prompt, self._model)
        check.check_bool("special", special)
        return await self._run(lambda hub: self._native.prefill(hub, checked, special))

    async def fork(self, *, timeout: float | None = 0) -> Sequence:
        """Return a new sequence with the same tokens, whose memory cells both share.

        Cancelling this leaves the queue; a sequence that was already granted goes back.

        Args:
            timeout: Seconds to wait for a free sequence; 0 does not wait, None has no limit.

        Raises:
            BusyError: no sequence became free in time.
        """
        limit = check.check_timeout("timeout", timeout)
        check_loop(self._loop, "a sequence")
        try:
            async with asyncio.timeout(limit or None):
                native = await self._run(
                    lambda hub: self._native.fork(hub, limit != 0),
                    discard=lambda late: late.close(),
                )
        except TimeoutError as error:
            message = (
                f"no sequence became free within {limit} s; close one or open the context with more"
            )
            raise BusyError(message) from error
        return Sequence(native, self._of)

    async def erase(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Remove tokens by position and close the gaps, so that positions stay consecutive.

        Cancelling this leaves the sequence either unchanged or wholly changed.

        Args:
            ranges: Half-open ``(start, end)`` pairs of positions before the call; they may not
                overlap.

        Raises:
            ValueError: a range ends before it starts or beyond the last token, or two overlap.
        """
        checked = _checked_ranges(ranges, self._native.length())
        await self._run(lambda hub: self._native.erase(hub, checked))

    async def shift(self, n_keep: int, n_discard: int) -> None:
        """Drop `n_discard` tokens after the first `n_keep` and move the rest down.

        Cancelling this leaves the sequence either unchanged or wholly changed.

        Args:
            n_keep: Tokens at the front that stay.
            n_discard: Tokens after them that go.

        Raises:
            ValueError: there are fewer tokens.
        """
        keep = check.check_int("n_keep", n_keep, 0, MAX_INT)
        discard = check.check_int("n_discard", n_discard, 0, MAX_INT)
        length = self._native.length()
        if keep + discard > length:
            raise ValueError(
                f"n_keep + n_discard must be at most the {length} tokens there are, "
                f"not {keep + discard}"
            )
        await self._run(lambda hub: self._native.shift(hub, keep, discard))

    async def clear(self) -> None:
        """Remove all tokens. Cancelling this leaves the sequence either unchanged or empty."""
        await self._run(self._native.clear)

    async def save(self, path: str | os.PathLike[str]) -> None:
        """Write the evaluated state to a file, with a fingerprint of model and layout.

        Cancelling this does not leave half a file: it appears whole or not at all.

        Args:
            path: The file, which is replaced; its folder must exist.

        Raises:
            OSError: it cannot be written.
        """
        checked = check.check_path("path", path)
        await self._run(lambda hub: self._native.save(hub, checked, b""))

    async def load(self, path: str | os.PathLike[str]) -> None:
        """Replace the evaluated state by a saved one.

        Cancelling this leaves the sequence either as it was or loaded.

        Args:
            path: A file that `save` wrote, with the same model and layout of memory.

        Raises:
            StateMismatchError: the file is of another model, layout or adapter, or damaged.
            ContextOverflowError: it holds more tokens than there is room for.
            FileNotFoundError: there is no such file.
        """
        checked = check.check_path("path", path)
        await self._run(lambda hub: self._native.load(hub, checked))

    async def score(self, tokens: Items[int]) -> list[float]:
        """Return the natural log-probability of each of `tokens` after what is evaluated here.

        The sequence holds them afterwards. Cancelling this stops within one decode call; what is
        evaluated by then stays.

        Args:
            tokens: Ids of the vocabulary, at least one. The first one in an empty sequence has
                nothing before it that could predict it: NaN.

        Raises:
            ContextOverflowError: they do not fit into the context.
        """
        checked = check.check_tokens("tokens", tokens, self._model.vocab_size())
        return await self._run(lambda hub: self._native.score(hub, checked))

    async def aclose(self) -> None:
        """Give the sequence back at once; idempotent.

        A prediction running on it fails with `ClosedError`. Never
        suspends, so there is nothing to cancel.
        """
        self._native.close()

    async def __aenter__(self) -> Sequence:
        """Return itself; never suspends."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close it; never suspends."""
        self._native.close()

    def _home(self) -> Home:
        return self._of

    async def _run(
        self,
        start: Callable[[_core.Hub], _core.Call[T]],
        discard: Callable[[T], object] | None = None,
    ) -> T:
        check_loop(self._loop, "a sequence")
        hub = hub_for(self._loop)
        return await finish(hub, start(hub.native), discard=discard)

    def __repr__(self) -> str:
        """Return the state in words."""
        return f"<Sequence {self.id} {'closed' if self.closed else 'open'}>"

    def __del__(self) -> None:
        """Warn of a forgotten sequence and give it back; on whatever thread this runs."""
        native = getattr(self, "_native", None)
        if native is None or finalisers_rest() or native.closed:
            return
        warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)
        native.close()


ContextSequence = Sequence
"""The same class under a name that is less crowded in Python."""


def _checked_ranges(ranges: Any, length: int) -> list[tuple[int, int]]:
    checked = []
    for i, pair in enumerate(check.check_items("ranges", ranges)):
        name = f"ranges[{i}]"
        ends = check.check_items(name, pair)
        if len(ends) != 2:
            raise ValueError(f"{name} must be a pair (start, end), not {len(ends)} values")
        start = check.check_int(
            f"{name} start", ends[0], 0, length, hint=f"the sequence has {length} tokens"
        )
        end = check.check_int(
            f"{name} end", ends[1], start, length, hint=f"the sequence has {length} tokens"
        )
        checked.append((start, end))
    checked.sort()
    for (_, end), (start, _) in itertools.pairwise(checked):
        if start < end:
            raise ValueError(
                f"ranges must not overlap: one ends at {end}, the next starts at {start}"
            )
    return [(start, end) for start, end in checked if start < end]

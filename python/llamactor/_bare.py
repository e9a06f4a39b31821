"""The bare llama.cpp loop over a loaded model, to compare predictions with."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Unpack

from llamactor._hub import finish, hub_for, running_loop
from llamactor._opening import Opening
from llamactor.options import ContextKeywords, ContextOptions, context_options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llamactor import _core
    from llamactor.model import Model


class BareReplies(NamedTuple):
    """What the bare loop generated, and what that took."""

    first: float
    """Seconds until every prompt had the first token of its reply."""
    total: float
    """Seconds until every prompt had the last one."""
    tokens: list[list[int]]
    """The likeliest tokens, for each prompt."""


class BareLoop:
    """A context of its own on a thread of its own that decodes and nothing else.

    It shares the weights with the model and has the parameters of the model's contexts. It fills a
    batch, calls ``llama_decode``, takes the likeliest token, and again; all replies are in one
    batch. Nobody waits for a turn, reads a piece, or is cancelled alone.
    """

    def __init__(self, native: _core.BareLoop) -> None:
        """Wrap an open one; made by `bare_loop`."""
        self._native = native

    async def replies(self, prompts: Sequence[Sequence[int]], length: int) -> BareReplies:
        """Generate `length` tokens after each prompt, which must all fit into the context.

        Cancelling this stops the evaluation within one decode call.

        Raises:
            ValueError: a prompt is empty, or there are more than sequences.
            ContextOverflowError: a prompt and its reply do not fit.
            DecodeError: the prompts do not fit together.
        """
        hub = hub_for(running_loop("a bare loop"))
        call = self._native.run(hub.native, [list(prompt) for prompt in prompts], length)
        return BareReplies(*await finish(hub, call))

    async def aclose(self) -> None:
        """Free the context. Cancelling this does not stop that, only the waiting for it."""
        hub = hub_for(running_loop("a bare loop"))
        await finish(hub, self._native.close(hub.native), cancellable=False)


def bare_loop(model: Model, **options: Unpack[ContextKeywords]) -> Opening[BareLoop]:
    """Open one: ``await`` it or enter it with ``async with``. Cancelling leaves nothing open.

    Args:
        model: A loaded model; the loop keeps its weights.
        **options: See `ContextOptions`.

    Raises:
        TypeError: an option is unknown or has the wrong type.
        ValueError: an option is out of range.
        InsufficientMemoryError: memory for it could not be had.
        UnsupportedError: the model cannot generate.
    """
    return Opening(_open(model, context_options(options)))


async def _open(model: Model, options: ContextOptions) -> BareLoop:
    hub = hub_for(running_loop("a bare loop"))
    native = model._home().model  # noqa: SLF001 -- for this
    call = native.bare_loop(hub.native, options.native(model.info.train_context_size))
    return BareLoop(await finish(hub, call, discard=lambda late: late.close(hub.native)))

"""A chat in a file: what was said, what the context holds of it, how to go on, and its state.

The file is that of a sequence's state (``rust/sequence/state.rs``): written at once or not at all,
with a checksum and the fingerprint of the model. What a chat adds is a note in JSON.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from llamactor._hub import finish, hub_for, running_loop
from llamactor.chat.messages import Message  # noqa: TC001 -- the note is decoded as it
from llamactor.chat.shift import LastMessages, Strategy, Window, check_overflow, last_messages
from llamactor.errors import ContextOverflowError, StateMismatchError
from llamactor.options import (
    Dry,
    DynamicTemperature,
    GenerationOptions,
    Mirostat,
    RepeatPenalty,
    TokenBatching,
    Xtc,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llamactor import _core
    from llamactor._home import Home

NOTE_VERSION = 1
"""Version of the note; a reader refuses versions it does not know."""

_STRUCTS: dict[str, type[msgspec.Struct]] = {
    "xtc": Xtc,
    "dry": Dry,
    "mirostat": Mirostat,
    "dynamic_temperature": DynamicTemperature,
    "repeat_penalty": RepeatPenalty,
    "token_batching": TokenBatching,
}


class SavedChat(msgspec.Struct, frozen=True, kw_only=True):
    """What the note says."""

    version: int = NOTE_VERSION
    """See `NOTE_VERSION`."""
    history: tuple[Message, ...]
    """Everything that was said."""
    window: Window | None
    """What the context holds instead of its beginning."""
    options: dict[str, Any]
    """How to generate, as far as JSON can say it: functions cannot be saved."""
    tools: tuple[dict[str, Any], ...] = ()
    """Schemas of tools."""
    template: str | None = None
    """Chat template, if it is not the model's own."""
    template_kwargs: dict[str, Any] = {}
    """Variables for the template."""


class _Version(msgspec.Struct):
    version: int = 0


async def write_chat(
    home: Home, chat: int, path: str, saved: SavedChat, state: list[int] | None
) -> None:
    """Write a chat to a file, which appears whole or not at all.

    Cancelling this leaves the file as it was, or writes all of it.

    Args:
        home: Where the chat runs.
        chat: Its key.
        path: The file.
        saved: What to say of it.
        state: The tokens whose evaluated state is written too; what of them is not evaluated is
            evaluated for it. None writes none.
    """
    note = msgspec.json.encode(saved)
    hub = hub_for(running_loop("a chat session"))
    if not state:
        await finish(hub, home.model.save_note(hub.native, path, note))
        return
    sequence = await _sequence(home, chat)
    try:
        await finish(hub, sequence.prefill(hub.native, state, special=False))
        await finish(hub, sequence.save(hub.native, path, note))
    finally:
        sequence.close()


async def read_chat(home: Home, path: str) -> tuple[SavedChat, bool]:
    """Return what a file says of a chat, and whether it has a state.

    Cancelling this keeps nothing.

    Raises:
        StateMismatchError: it is of another model, damaged, or of a later release.
        OSError: it cannot be read.
    """
    hub = hub_for(running_loop("a chat session"))
    data = await finish(hub, home.model.load_note(hub.native, path))
    return _decoded(data[1:], path), data[0] == 1


async def put_state_back(home: Home, chat: int, path: str) -> None:
    """Put the state of a file into the cells, as far as this context can take it.

    Where it cannot, the first prompt evaluates the history again. Cancelling this does no harm.
    """
    hub = hub_for(running_loop("a chat session"))
    sequence = await _sequence(home, chat)
    try:
        await finish(hub, sequence.load(hub.native, path))
    except (StateMismatchError, ContextOverflowError):
        pass  # another layout, or a smaller context
    finally:
        sequence.close()


async def _sequence(home: Home, chat: int) -> _core.Sequence:
    hub = hub_for(running_loop("a chat session"))
    call = home.context.acquire(hub.native, chat)
    return await finish(hub, call, discard=lambda late: late.close())


def _decoded(note: bytes, path: str) -> SavedChat:
    try:
        version = msgspec.json.decode(note, type=_Version).version
        if version != NOTE_VERSION:
            raise StateMismatchError(
                f"{path}: its note is of version {version}; "
                f"this release reads version {NOTE_VERSION}"
            )
        return msgspec.json.decode(note, type=SavedChat)
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError) as error:
        if isinstance(error, StateMismatchError):
            raise
        raise StateMismatchError(f"{path}: this is no saved chat: {error}") from None


# --- options as JSON ------------------------------------------------------------------------------


def plain_options(options: GenerationOptions) -> dict[str, Any]:
    """Return what JSON can say of options, without what is as by default."""
    default = GenerationOptions()
    plain: dict[str, Any] = {}
    for name in GenerationOptions.__struct_fields__:
        value = getattr(options, name)
        if value != getattr(default, name):
            plain |= _plain(name, value)
    return plain


def _plain(name: str, value: Any) -> dict[str, Any]:
    if name == "logit_bias":
        value = list(value.items())  # JSON would make texts of the ids
    elif name == "overflow":
        value = _strategy_name(value)
    try:
        return {name: msgspec.to_builtins(value)}
    except TypeError:
        return {}  # a function


def _strategy_name(value: Any) -> Any:
    if isinstance(value, str):
        return value
    strategy = check_overflow(value)
    if isinstance(strategy, LastMessages):
        return ["last_messages", strategy.n]
    return strategy.name if isinstance(strategy, Strategy) else value


def full_options(plain: Mapping[str, Any]) -> GenerationOptions:
    """Return the options of `plain_options`.

    Raises:
        StateMismatchError: an option is unknown or has a value that is refused.
    """
    try:
        return GenerationOptions(**{name: _full(name, value) for name, value in plain.items()})
    except (TypeError, ValueError) as error:
        raise StateMismatchError(f"the saved options are refused: {error}") from error


def _full(name: str, value: Any) -> Any:
    if name in _STRUCTS and isinstance(value, dict):
        fields = {key: tuple(it) if isinstance(it, list) else it for key, it in value.items()}
        return _STRUCTS[name](**fields)
    if name == "logit_bias":
        return {token: bias for token, bias in value}  # noqa: C416 -- says that they are pairs
    if name == "overflow" and isinstance(value, list):
        return last_messages(value[1])
    return value

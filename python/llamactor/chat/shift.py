"""What of a chat stays in the context: decided from token counts, by pure functions.

Theory of operation. A chat's *window* is what its prompt is rendered from: at first the whole
history, later less. The next window is the last one and what has been said since. If its rendering
leaves room for the answer it stays as it is, so that everything evaluated serves again. If not, a
strategy plans what goes (`Strategy.plan`, from sizes alone), the plan becomes messages, and the
messages are rendered, since only the rendering is the truth: templates leave out old reasoning, or
put the tools into whichever message comes first. What a plan missed by is added to the next one.

A shift frees more than it must, down to three quarters of what a prompt may take (less than half of
the context would forget too much, more than four fifths would shift again after one or two turns):
the next turns then fit as they come, and evaluate only what is new.

A *turn* is a user message with everything that answers it, tool calls and results included. Turns
go whole, so that no answer is left without its question. The turn before the newest, which a prompt
such as "go on" is about, is rather cut than dropped. The system prompt never goes.
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Awaitable, Callable, Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Generic, Literal, ParamSpec, Protocol, TypeAlias, TypeVar

import msgspec

from llamactor import _checks as check
from llamactor.chat.messages import (
    AssistantMessage,
    Message,
    SystemMessage,
    UserMessage,
    to_messages,
)
from llamactor.errors import ContextOverflowError

if TYPE_CHECKING:
    from llamactor import _core
    from llamactor.options import Overflow

P = ParamSpec("P")
T = TypeVar("T")

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]

LEAST_TEXT = 32
"""Tokens that trimming leaves of a text: less says nothing, and the newest prompt must say more."""

LEAST_MOVED = 16
"""Tokens in a row that must be saved for moving cells to be worth it."""

MAX_RANGES = 4
"""Ranges that `erased_ranges` gives at most."""

MAX_PLACES = 64
"""Places at which `erased_ranges` looks for what follows a gap."""

LONGEST_TOKEN = 64
"""Characters per token that are looked at to cut a text; hardly any token has more."""

SHORT_TEXT = 4096
"""Characters that are tokenised on the loop's own thread."""

MAX_PLANS = 8
"""Plans that are made for one prompt: the second one knows by how much the first was wrong."""


# --- sizes and room -------------------------------------------------------------------------------


class MessageSize(msgspec.Struct, frozen=True):
    """What a message takes of the context."""

    role: Role
    """Who speaks."""
    tokens: int
    """Tokens of all that the template writes for it."""
    text: int = 0
    """How many of these are its text, which can be trimmed."""


class Kept(msgspec.Struct, frozen=True):
    """A message that stays."""

    index: int
    """Which one."""
    last: int | None = None
    """So many tokens of its text, from the end; None is all of it."""


class Room(msgspec.Struct, frozen=True):
    """What a prompt may take, everything included, and what a shift brings it down to."""

    limit: int
    """Tokens of a prompt at most."""
    target: int
    """Tokens that a shift leaves if it can."""

    @classmethod
    def within(cls, context_size: int, answer: int | None, least: int = 0) -> Room:
        """Return the room of a prompt whose answer wants `answer` tokens.

        Args:
            context_size: Tokens that a sequence holds.
            answer: The most tokens of the answer; None is an eighth of the context. It gets a
                quarter of the context at most: what exceeds that shifts while it is written.
            least: What the prompt cannot do without; the answer has to do with what is left.

        Raises:
            ContextOverflowError: `least` leaves no token for the answer.
        """
        wanted = context_size // 8 if answer is None else answer
        share = min(max(wanted, 1), max(context_size // 4, 1))
        limit = max(context_size - share, least)
        if limit >= context_size:
            raise ContextOverflowError(
                f"system prompt, template, tools and the least of the newest prompt take {least} "
                f"tokens, and the context has {context_size}, of which the answer needs one; use a "
                "larger context_size, a shorter system prompt or fewer tools"
            )
        return cls(limit, limit * 3 // 4)


def message_sizes(messages: Sequence[Message], ends: Sequence[int]) -> list[MessageSize]:
    """Return the sizes of rendered messages, without their texts.

    Args:
        messages: What was rendered.
        ends: Tokens of the rendering up to and including each of them.
    """
    starts = [0, *ends]
    return [
        MessageSize(role_of(message), end - start)
        for message, (start, end) in zip(messages, pairwise(starts), strict=True)
    ]


def role_of(message: Message) -> Role:
    """Return who speaks."""
    match message:
        case SystemMessage():
            return "system"
        case UserMessage():
            return "user"
        case AssistantMessage():
            return "assistant"
    return "tool"


def _parts(roles: Sequence[Role], first: int, opens: Role) -> list[range]:
    """The stretches from `first` on; each but perhaps the first begins with `opens`."""
    cuts = [i for i in range(first + 1, len(roles)) if roles[i] == opens]
    return [range(a, b) for a, b in pairwise([first, *cuts, len(roles)]) if a < b]


def _head(roles: Sequence[Role]) -> int:
    """How many messages are the system prompt."""
    return next((i for i, role in enumerate(roles) if role != "system"), len(roles))


class _Draft:
    """A plan in the making: what is left, and what it takes."""

    def __init__(self, sizes: Sequence[MessageSize], overhead: int) -> None:
        self.sizes = sizes
        self.total = overhead + sum(size.tokens for size in sizes)
        roles = [size.role for size in sizes]
        self.head = _head(roles)
        self.turns = _parts(roles, self.head, "user")
        self.left = dict.fromkeys(range(len(sizes)))
        self._texts = [size.text for size in sizes]
        self._trimmed: set[int] = set()

    def drop(self, messages: Iterable[int]) -> None:
        """Let messages go."""
        for i in messages:
            del self.left[i]
            self.total -= self.sizes[i].tokens - self.sizes[i].text + self._texts[i]

    def drop_turn(self, which: int) -> None:
        """Let a turn go."""
        self.drop(self.turns.pop(which))

    def trim(self, messages: Iterable[int], goal: int, least: int) -> None:
        """Cut texts from their beginning, in order, down to `least` each, until `goal` is met."""
        for i in messages:
            cut = min(self.total - goal, self._texts[i] - least)
            if cut > 0:
                self._texts[i] -= cut
                self.total -= cut
                self._trimmed.add(i)

    def spare(self, messages: Iterable[int]) -> int:
        """How many tokens `trim` can take from messages."""
        return sum(max(0, self._texts[i] - LEAST_TEXT) for i in messages)

    def cut_last_but_one(self, room: Room, first: int) -> None:
        """Cut the turn before the newest if that is the `first` one and makes it fit, or drop it.

        What was said last is what the newest prompt is about: it stays as long as it can.
        """
        if len(self.turns) != first + 2 or self.total <= room.limit:
            return
        turn = self.turns[first]
        if self.total - self.spare(turn) <= room.limit:
            self.trim(turn, room.target, LEAST_TEXT)
        else:
            self.drop_turn(first)

    def shrink_newest(self, limit: int) -> None:
        """Cut the newest turn down to `limit`: rounds of tool calls, texts, at last the prompt."""
        if not self.turns:
            return
        prompt, rounds = self._newest()
        while len(rounds) > 1 and self.total > limit:
            self.drop(rounds.pop(0))
        texts = rounds[0] if rounds else range(0)
        for messages, least in ((texts, LEAST_TEXT), (prompt, LEAST_TEXT), (texts, 0)):
            self.trim(messages, limit, least)

    def _newest(self) -> tuple[range, list[range]]:
        """The newest prompt, and the rounds of tool calls and answers after it."""
        turn = self.turns[-1]
        roles = [size.role for size in self.sizes]
        after = turn.start + (roles[turn.start] == "user")
        return range(turn.start, after), _parts(roles, after, "assistant")

    def plan(self) -> tuple[Kept, ...]:
        """What is left."""
        return tuple(Kept(i, self._texts[i] if i in self._trimmed else None) for i in self.left)


def least_tokens(sizes: Sequence[MessageSize], overhead: int) -> int:
    """Return what is left when all has gone that can: the system prompt and a bit of the newest."""
    draft = _Draft(sizes, overhead)
    while len(draft.turns) > 1:
        draft.drop_turn(0)
    draft.shrink_newest(0)
    return draft.total


# --- strategies -----------------------------------------------------------------------------------


class Strategy(msgspec.Struct, frozen=True):
    """One of the strategies that come with the package; calling it answers a `ShiftRequest`."""

    @property
    def name(self) -> str:
        """What it is called."""
        return type(self).__name__

    def select(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        """Return the messages that may be in the window at all, however much room there is."""
        return messages

    def room(self, context_size: int, answer: int | None, least: int) -> Room:
        """Return what a prompt may take; see `Room.within`."""
        return Room.within(context_size, answer, least)

    def plan(self, sizes: Sequence[MessageSize], overhead: int, room: Room) -> tuple[Kept, ...]:
        """Return what stays of messages that do not fit, in their order.

        Pure. It fits into ``room.limit`` by the counts given, if anything can.

        Args:
            sizes: What each message takes.
            overhead: Tokens of the prompt that belong to no message.
            room: What the prompt may take.
        """
        raise NotImplementedError

    async def __call__(self, request: ShiftRequest) -> ShiftResult:
        """Answer a request, for strategies that use this one; cancelling it has no effect."""
        room = Room(request.limit, request.target)
        sizes = await _with_texts(request.messages, request.sizes, request.texts)
        plan = self.plan(sizes, request.overhead, room)
        return ShiftResult(await _materialise(request.messages, plan, request.texts))


class EraseOldest(Strategy, frozen=True):
    """See `erase_oldest`."""

    @property
    def name(self) -> str:
        """What it is called."""
        return "erase_oldest"

    def plan(self, sizes: Sequence[MessageSize], overhead: int, room: Room) -> tuple[Kept, ...]:
        """Return what stays; see `Strategy.plan`."""
        draft = _Draft(sizes, overhead)
        while len(draft.turns) > 2 and draft.total > room.target:
            draft.drop_turn(0)
        draft.cut_last_but_one(room, first=0)
        draft.shrink_newest(room.limit)
        return draft.plan()


class TruncateMiddle(Strategy, frozen=True):
    """See `truncate_middle`."""

    @property
    def name(self) -> str:
        """What it is called."""
        return "truncate_middle"

    def plan(self, sizes: Sequence[MessageSize], overhead: int, room: Room) -> tuple[Kept, ...]:
        """Return what stays; see `Strategy.plan`."""
        draft = _Draft(sizes, overhead)
        while len(draft.turns) > 3 and draft.total > room.target:
            draft.drop_turn(1)
        draft.cut_last_but_one(room, first=1)
        draft.cut_last_but_one(room, first=0)
        draft.shrink_newest(room.limit)
        return draft.plan()


class RollingWindow(Strategy, frozen=True):
    """See `rolling_window`."""

    @property
    def name(self) -> str:
        """What it is called."""
        return "rolling_window"

    def plan(self, sizes: Sequence[MessageSize], overhead: int, room: Room) -> tuple[Kept, ...]:
        """Return what stays; see `Strategy.plan`."""
        draft = _Draft(sizes, overhead)
        while len(draft.turns) > 2 and draft.total > room.target:
            if draft.total - draft.spare(draft.turns[0]) <= room.target:
                draft.trim(draft.turns[0], room.target, LEAST_TEXT)
            else:
                draft.drop_turn(0)
        draft.cut_last_but_one(room, first=0)
        draft.shrink_newest(room.limit)
        return draft.plan()


class StopAtLimit(Strategy, frozen=True):
    """See `stop_at_limit`."""

    @property
    def name(self) -> str:
        """What it is called."""
        return "stop_at_limit"

    def room(self, context_size: int, answer: int | None, least: int) -> Room:
        """Return all but one token: the answer ends where the context does."""
        del answer, least  # nothing makes room
        return Room(context_size - 1, context_size - 1)

    def plan(self, sizes: Sequence[MessageSize], overhead: int, room: Room) -> tuple[Kept, ...]:
        """Return everything if it fits.

        Raises:
            ContextOverflowError: it does not fit.
        """
        draft = _Draft(sizes, overhead)
        if draft.total > room.limit:
            raise ContextOverflowError(
                f"the prompt has {draft.total} tokens and at most {room.limit} fit; stop_at_limit "
                "drops nothing: use a larger context_size, a shorter prompt, or another overflow"
            )
        return draft.plan()


class LastMessages(EraseOldest, frozen=True):
    """See `last_messages`."""

    n: int
    """How many."""

    @property
    def name(self) -> str:
        """What it is called."""
        return f"last_messages({self.n})"

    def select(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        """Return the system prompt and the last n messages, beginning with a user's."""
        roles = [role_of(message) for message in messages]
        head, first = _head(roles), len(messages) - self.n
        turns = _parts(roles, head, "user")
        cut = next((turn.start for turn in turns if turn.start >= first), None)
        if cut is None:
            cut = turns[-1].start if turns else head
        return messages[:head] + messages[cut:]


def erase_oldest() -> Strategy:
    """Drop the oldest turns whole; the default.

    The system prompt stays. When two turns are left and still do not fit, the texts of the first
    are cut from their beginning if that is enough, else it goes too. When one is left and does not
    fit, its oldest rounds of tool calls go, then its texts are cut, and the newest prompt at last.
    """
    return EraseOldest()


def truncate_middle() -> Strategy:
    """Keep the system prompt and the first turn, and drop the oldest of those between.

    When only the first and the newest turn are left and do not fit, it is like `erase_oldest`.
    """
    return TruncateMiddle()


def rolling_window() -> Strategy:
    """Keep as many of the newest tokens as fit.

    Like `erase_oldest`, but the oldest turn that is left is cut rather than dropped if that frees
    enough, so that the room is used to the last token.
    """
    return RollingWindow()


def stop_at_limit() -> Strategy:
    """Drop nothing: a prompt that does not fit is `ContextOverflowError`.

    An answer that comes to the end of the context stops there, with ``stop_reason="context_full"``.
    """
    return StopAtLimit()


def last_messages(n: int) -> Strategy:
    """Keep the last `n` messages besides the system prompt, beginning with a user's.

    The newest turn stays whole even if it has more. What does not fit is dropped as with
    `erase_oldest`. The window moves with every turn, however much room there is.

    Args:
        n: At least 1.

    Raises:
        TypeError: `n` is no integer.
        ValueError: `n` is below 1.
    """
    return LastMessages(check.check_int("n", n, 1))


STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "erase_oldest": erase_oldest,
    "truncate_middle": truncate_middle,
    "rolling_window": rolling_window,
    "stop_at_limit": stop_at_limit,
}


# --- custom strategies ----------------------------------------------------------------------------


class Texts(Protocol):
    """Counts and cuts texts; a model's tokenizer does it."""

    async def count(self, text: str) -> int:
        """Return how many tokens a text has; cancelling this changes nothing."""

    async def tail(self, text: str, n: int) -> str:
        """Return the last `n` tokens of a text as text; cancelling this changes nothing."""


class ModelTexts:
    """The texts of a model: its tokenizer, off the loop where that may take long."""

    def __init__(self, model: _core.Model) -> None:
        """Take the native model."""
        self._model = model

    async def count(self, text: str) -> int:
        """Return how many tokens a text has; cancelling this changes nothing."""
        return await _off_loop(len(text), self._model.count_tokens, text)

    async def tail(self, text: str, n: int) -> str:
        """Return the last `n` tokens of a text as text; cancelling this changes nothing.

        It begins with a whole character, so it may be a bit shorter.
        """
        return await _off_loop(n * LONGEST_TOKEN, self._tail, text, n)

    def _tail(self, text: str, n: int) -> str:
        tokens = self._model.tokenize(text[-n * LONGEST_TOKEN :], add_bos=False, special=False)
        return self._model.detokenize(tokens[-n:], special=False).lstrip("\ufffd")


async def _off_loop(size: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call in a thread if `size` characters are many."""
    if size <= SHORT_TEXT:
        return function(*args, **kwargs)
    return await asyncio.to_thread(function, *args, **kwargs)


class ShiftRequest(msgspec.Struct, frozen=True):
    """What a strategy is asked: which of these messages stay."""

    messages: tuple[Message, ...]
    """The last window and what has been said since; the newest prompt is the last user message."""
    sizes: tuple[int, ...]
    """Tokens of each message as the template writes it."""
    overhead: int
    """Tokens that belong to no message: glue, tools, the header of the answer."""
    limit: int
    """Tokens that the whole prompt may have: what is checked afterwards, as `count` counts."""
    target: int
    """Tokens to come down to, so that the next turns need no shift; only advice."""
    count: Callable[[Sequence[Message]], Awaitable[int]]
    """Async: the tokens of a whole prompt of these messages, tools and template included."""
    history: tuple[Message, ...]
    """All that was ever said, the newest prompt included."""
    texts: Texts
    """Counts and cuts single texts: ``await texts.tail(text, n)``."""


class ShiftResult(msgspec.Struct, frozen=True):
    """What a strategy answers."""

    messages: tuple[Message, ...]
    """The window; messages that were not there before, such as a summary, are welcome."""

    def __post_init__(self) -> None:
        """Take lists and dicts too."""
        messages = to_messages(self.messages)
        msgspec.structs.force_setattr(self, "messages", messages)


CustomStrategy: TypeAlias = Callable[[ShiftRequest], Awaitable[ShiftResult]]
"""A strategy of the user's own, an async function.

It is called when the window does not fit. What does not fit afterwards, or a strategy that raises,
is a `RuntimeWarning`, and `erase_oldest` does it instead.
"""


def check_overflow(value: object) -> Strategy | CustomStrategy:
    """Return the strategy that an `overflow` option means; None is `erase_oldest`.

    Raises:
        TypeError: it is neither a name nor a strategy nor callable.
        ValueError: the name is unknown.
    """
    if value is None:
        return erase_oldest()
    if isinstance(value, str):
        check.check_choice("overflow", value, STRATEGIES)
        return STRATEGIES[value]()
    if not callable(value) or isinstance(value, type):
        raise TypeError(
            f"overflow must be one of {', '.join(STRATEGIES)}, a strategy of "
            "llamactor.context_shift, or an async function that takes a ShiftRequest, not "
            f"{check.describe(value)}"
        )
    return value


def native_overflow(strategy: Strategy | CustomStrategy) -> Overflow:
    """Return what the core does when the context fills while an answer is written."""
    match strategy:
        case TruncateMiddle():
            return "truncate_middle"
        case StopAtLimit():
            return "stop_at_limit"
    return "rolling_window"


# --- windows --------------------------------------------------------------------------------------


class Rendered(Protocol):
    """Messages as tokens."""

    @property
    def tokens(self) -> Sequence[int]:
        """All of them."""

    @property
    def ends(self) -> Sequence[int]:
        """How many there are up to and including each message."""


R = TypeVar("R", bound=Rendered)
Render: TypeAlias = Callable[[tuple[Message, ...]], Awaitable[R]]


class Window(msgspec.Struct, frozen=True):
    """What a chat keeps in its context, from one turn to the next."""

    messages: tuple[Message, ...]
    """The messages, shortened ones among them."""
    covers: int
    """How many messages of the history it stands for."""
    context_size: int
    """The context it was made for."""


class Chosen(msgspec.Struct, Generic[R], frozen=True):
    """A window that fits."""

    window: Window
    """To be given as `previous` next time, if the turn is recorded."""
    rendered: R
    """Its rendering."""
    dropped: int = 0
    """Tokens by which it is shorter than the previous one with what came since."""


class Chooser(Generic[R]):
    """Chooses windows that fit into one context, for one way of rendering."""

    def __init__(self, render: Render[R], texts: Texts, context_size: int) -> None:
        """Take what renders messages, what counts and cuts texts, and the tokens there are."""
        self._render = render
        self._texts = texts
        self._size = context_size

    async def choose(
        self,
        strategy: Strategy | CustomStrategy,
        history: tuple[Message, ...],
        *,
        previous: Window | None = None,
        answer: int | None = None,
    ) -> Chosen[R]:
        """Return the next window of a chat, and its rendering.

        It ends after a bounded number of renderings. Cancelling it changes nothing.

        Args:
            strategy: What decides if something has to go.
            history: All messages, the newest prompt included.
            previous: The last window, if the history has only grown since.
            answer: The most tokens of the answer; see `Room.within`.

        Raises:
            ContextOverflowError: nothing more can go and it does not fit.
        """
        builtin = strategy if isinstance(strategy, Strategy) else erase_oldest()
        messages = builtin.select(_continued(previous, history, self._size))
        rendered = await self._render(messages)
        room = builtin.room(self._size, answer, 0)
        before = len(rendered.tokens)
        if before > room.limit:
            chosen = await self._custom(strategy, history, messages, rendered, room)
            messages, rendered = chosen or await self._shift(builtin, messages, rendered, answer)
        window = Window(messages, len(history), self._size)
        return Chosen(window, rendered, max(0, before - len(rendered.tokens)))

    async def _shift(
        self, strategy: Strategy, messages: tuple[Message, ...], rendered: R, answer: int | None
    ) -> tuple[tuple[Message, ...], R]:
        """Plan, render and look, until it fits."""
        sizes = await _with_texts(messages, _token_counts(rendered), self._texts)
        overhead = len(rendered.tokens) - (rendered.ends[-1] if rendered.ends else 0)
        for attempt in range(MAX_PLANS):
            room = strategy.room(self._size, answer, least_tokens(sizes, overhead))
            plan = strategy.plan(sizes, overhead, room)
            kept = await _materialise(messages, plan, self._texts)
            rendered = await self._render(kept)
            excess = len(rendered.tokens) - room.limit
            if excess <= 0:
                return kept, rendered
            # Sizes do not add up exactly; the plan used all of the limit at most.
            overhead += (len(rendered.tokens) - _planned(plan, sizes, overhead)) << (attempt // 2)
        raise ContextOverflowError(
            f"the prompt still has {excess} tokens more than the {room.limit} that fit after all "
            "was dropped that may be; use a larger context_size"
        )

    async def _custom(
        self,
        strategy: Strategy | CustomStrategy,
        history: tuple[Message, ...],
        messages: tuple[Message, ...],
        rendered: R,
        room: Room,
    ) -> tuple[tuple[Message, ...], R] | None:
        """Ask a strategy of the user's own; None if there is none, or it fails."""
        if isinstance(strategy, Strategy):
            return None
        counts = _token_counts(rendered)
        overhead = len(rendered.tokens) - sum(counts)
        request = ShiftRequest(
            *(messages, counts, overhead, room.limit, room.target),
            *(self._count, history, self._texts),
        )
        try:
            kept = _answered(await strategy(request), messages)
            rendered = await self._render(kept)
        except Exception as error:
            _warn(strategy, f"failed with {type(error).__name__}: {error}")
            return None
        if len(rendered.tokens) > room.limit:
            _warn(strategy, f"left {len(rendered.tokens)} tokens where {room.limit} fit")
            return None
        return kept, rendered

    async def _count(self, messages: Sequence[Message]) -> int:
        return len((await self._render(to_messages(messages))).tokens)


def _answered(result: object, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages of a result, if it is one and still ends with the newest message."""
    if not isinstance(result, ShiftResult):
        raise TypeError(f"it returned {check.describe(result)}, not a ShiftResult")
    if not result.messages or role_of(result.messages[-1]) != role_of(messages[-1]):
        raise ValueError(f"the newest message, of the {role_of(messages[-1])}, must stay the last")
    return result.messages


def _continued(
    previous: Window | None, history: tuple[Message, ...], context_size: int
) -> tuple[Message, ...]:
    """The previous window and what came since; all that there is if the context has grown."""
    if previous is None or previous.context_size < context_size or previous.covers > len(history):
        return history
    return previous.messages + history[previous.covers :]


def _token_counts(rendered: Rendered) -> tuple[int, ...]:
    return tuple(end - start for start, end in pairwise([0, *rendered.ends]))


async def _with_texts(
    messages: tuple[Message, ...], counts: Sequence[int], texts: Texts
) -> list[MessageSize]:
    """Sizes with the part of each that can be trimmed."""
    return [
        MessageSize(role_of(message), count, min(count, await texts.count(message.content)))
        for message, count in zip(messages, counts, strict=True)
    ]


async def _materialise(
    messages: tuple[Message, ...], plan: tuple[Kept, ...], texts: Texts
) -> tuple[Message, ...]:
    """The messages of a plan, their texts cut as it says."""
    return tuple([await _cut(messages[kept.index], kept.last, texts) for kept in plan])


async def _cut(message: Message, last: int | None, texts: Texts) -> Message:
    if last is None:
        return message
    text = await texts.tail(message.content, last) if last else ""
    if isinstance(message, AssistantMessage):
        return msgspec.structs.replace(message, content=text, tokens=None, content_start=0)
    return msgspec.structs.replace(message, content=text)


def _planned(plan: tuple[Kept, ...], sizes: Sequence[MessageSize], overhead: int) -> int:
    """Tokens that a plan has by the sizes it was made from."""
    left = ((sizes[kept.index], kept.last) for kept in plan)
    return overhead + sum(
        size.tokens if last is None else size.tokens - size.text + last for size, last in left
    )


def _warn(strategy: CustomStrategy, what: str) -> None:
    name = getattr(strategy, "__qualname__", None) or type(strategy).__qualname__
    message = f"the context shift strategy {name} {what}; erase_oldest was used instead"
    warnings.warn(message, RuntimeWarning, stacklevel=2)


# --- cells ----------------------------------------------------------------------------------------


def erased_ranges(cells: Sequence[int], wanted: Sequence[int]) -> list[tuple[int, int]]:
    """Return which ranges of evaluated tokens have to go for the rest to be reused.

    After a shift the new prompt is the old one with some of its middle gone. Where that is so, the
    cells behind the gap can be moved instead of being evaluated again.

    Args:
        cells: The tokens that were evaluated: the old prompt and its answer.
        wanted: The tokens of the new prompt.

    Returns:
        Ranges ``(start, end)`` of `cells`, ascending and apart, `end` excluded. Without them,
        `cells` has a longer prefix in common with `wanted`. Empty if nothing can be moved: there
        is no gap, or something else stands in it.
    """
    ranges: list[tuple[int, int]] = []
    kept = done = common_prefix(cells, wanted)
    while len(ranges) < MAX_RANGES:
        place, run = _best_match(cells, kept + 1, wanted[done:])
        if not run:
            break
        ranges.append((kept, place))
        kept, done = place + run, done + run
    return ranges


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many items two sequences begin with alike."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _best_match(cells: Sequence[int], first: int, wanted: Sequence[int]) -> tuple[int, int]:
    """Where `cells` from `first` on have the longest beginning of `wanted`, and how long it is."""
    best = (0, 0)
    for place in _places(cells, first, wanted[:LEAST_MOVED]):
        run = common_prefix(cells[place : place + len(wanted)], wanted)
        best = max(best, (place, run), key=lambda match: match[1])
    return best


def _places(cells: Sequence[int], first: int, probe: Sequence[int]) -> list[int]:
    """Where `cells` from `first` on have `probe`, if that is of full length."""
    places: list[int] = []
    if len(probe) < LEAST_MOVED:
        return places
    width = 4
    needle = b"".join(token.to_bytes(width, "little") for token in probe)
    hay = b"".join(token.to_bytes(width, "little") for token in cells[first:])
    found = hay.find(needle)
    while found >= 0 and len(places) < MAX_PLACES:
        if found % width == 0:
            places.append(first + found // width)
        found = hay.find(needle, found + 1)
    return places

"""One prediction of a chat: from the call, through its turn in the line, to what is recorded.

Theory of operation. The prediction exists at once, but its prompt is known only when the turns
before it have ended. So each turn has a task of its own, the driver: it waits its turn, chooses the
window, renders it off the loop, starts the prediction and waits for its end. What the turn changes
is computed beside the chat's state and put in place when the prediction has settled, before anybody
who waits for it goes on; until then nothing has changed, so a failure has nothing to undo.

With tools that have handlers a turn has rounds (`rounds.py`): when the model has stopped, its calls
are carried out, which began as each was complete, and the prediction goes on with their results.

The driver never holds the public handle: when that is dropped, the prediction is cancelled as
everywhere, and the driver hears of it like anybody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import weakref
from collections.abc import AsyncIterator, Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec

from llamactor.calls import ToolCall, read_call
from llamactor.chat.history import History, leading_system
from llamactor.chat.line import Line
from llamactor.chat.messages import AssistantMessage, Message, UserMessage
from llamactor.chat.rounds import Rounds
from llamactor.chat.shift import (
    Chooser,
    CustomStrategy,
    ModelTexts,
    Strategy,
    common_prefix,
    erased_ranges,
    native_overflow,
)
from llamactor.chat.template import ReasoningTags, RenderedChat, render_chat
from llamactor.chat.tools import ToolCalls, ToolUse
from llamactor.errors import ClosedError, DeadlineExceededError
from llamactor.options import GenerationOptions, ReasoningMarks, native_options
from llamactor.prediction import (
    Deferred,
    Prediction,
    PredictionResult,
    RoundEnd,
    RoundStart,
    defer_prediction,
)

if TYPE_CHECKING:
    from llamactor import _core
    from llamactor._home import Home
    from llamactor.chat.completion import CompletionEngine
    from llamactor.prediction import StopReason

OnMessage: TypeAlias = Callable[[Message], object]

_driven: contextvars.ContextVar[ChatState | None] = contextvars.ContextVar("driven", default=None)
"""The chat whose turn this code is a part of: a strategy of the user's own runs in the driver."""

_UNTIL_THE_TEXT = (UserMessage("a"), UserMessage("b"))
"""What two prompts have in common whose text differs from its first character on."""


class ChatUsage(msgspec.Struct, frozen=True):
    """What the predictions of a chat took so far, those that were not recorded among them."""

    predictions: int = 0
    """How many have ended."""
    prompt_tokens: int = 0
    """Tokens of their prompts."""
    cached_tokens: int = 0
    """Of those, tokens that were not evaluated again."""
    predicted_tokens: int = 0
    """Tokens generated."""

    def plus(self, result: PredictionResult) -> ChatUsage:
        """Return it with one more prediction."""
        stats = result.stats
        return ChatUsage(
            self.predictions + 1,
            self.prompt_tokens + stats.prompt_tokens,
            self.cached_tokens + stats.cached_tokens,
            self.predicted_tokens + stats.predicted_tokens,
        )


class ChatState:
    """What changes in a chat; its turns share it."""

    __slots__ = (
        "_history",
        "cells",
        "engines",
        "home",
        "key",
        "line",
        "revision",
        "turns",
        "usage",
    )

    def __init__(self, history: History, key: int) -> None:
        """Begin with a history; `key` is the chat's in the core, 0 for none."""
        self._history = history
        self.revision = 0
        """How often the history was replaced."""
        self.key = key
        self.cells: list[int] = []
        """The tokens that were last evaluated for it, prompt and answer."""
        self.home: Home | None = None
        """Where its last turn ran."""
        self.line = Line()
        self.turns: set[Turn] = set()
        self.engines: weakref.WeakSet[CompletionEngine] = weakref.WeakSet()
        """Those whose suggestions go when the history changes."""
        self.usage = ChatUsage()

    @property
    def history(self) -> History:
        """What was said, and what of it the context holds."""
        return self._history

    @history.setter
    def history(self, history: History) -> None:
        """Replace it."""
        self._history = history
        self.revision += 1
        for engine in list(self.engines):
            engine.invalidate()

    def move_to(self, home: Home) -> None:
        """Run there from now on; another context holds nothing of it, and may have other tokens."""
        before, self.home = self.home, home
        if before is not None and before.context is not home.context:
            self.cells = []
            self.history = self.history.without_tokens()


class TurnRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a turn is to do."""

    added: tuple[Message, ...]
    """Messages that it adds before the answer."""
    options: GenerationOptions
    """How to generate."""
    template: str | None
    """Jinja text; None is the plain fallback."""
    template_kwargs: Mapping[str, Any]
    """Variables for the template."""
    tools: ToolUse
    """What tools there are, and how they are used."""
    strategy: Strategy | CustomStrategy | None
    """What decides what goes when not all fits; None never drops anything."""
    room: int | None = None
    """Tokens that the window leaves for an answer; None is the default share."""
    record: bool = False
    """Whether prompt and answer enter the history."""
    on_message: OnMessage | None = None
    """Called with each message that does."""
    open_ended: bool = False
    """Go on with the last message instead of answering it."""
    until_text: bool = False
    """Stop before the text of the last message: whatever it is, so much will be the same."""
    yields: bool = False
    """Whether it gives way to whatever changes the history."""


class Prompt(msgspec.Struct, frozen=True):
    """A rendered window, the response prefix included."""

    rendered: RenderedChat
    """As the template has it."""
    prefix: list[int]
    """Tokens of the response prefix."""

    @property
    def tokens(self) -> list[int]:
        """All tokens."""
        return self.rendered.tokens + self.prefix

    @property
    def ends(self) -> list[int]:
        """Tokens up to and including each message."""
        return self.rendered.ends


class Turn:
    """A prediction of a chat, and the task that drives it."""

    def __init__(self, home: Home, state: ChatState, request: TurnRequest) -> None:
        """Check what depends on the model; nothing runs yet."""
        self._home = home
        self._state = state
        self._request = request
        strategy = request.strategy
        options = msgspec.structs.replace(
            request.options,
            overflow=None if strategy is None else native_overflow(strategy),
            special=False,
        )
        self._native: dict[str, Any] = native_options(options, home.model)
        self._prefix = _prefix_tokens(home.model, options.response_prefix)
        self._begun = False
        self._ended = asyncio.Event()
        self._gone = asyncio.Event()
        self._deadline: float | None = None
        self._task: asyncio.Task[None] | None = None
        self._deferred: Deferred
        self._pending = History()
        self._tokens: list[int] = []
        self._rounds = Rounds(request.tools, options.max_tokens)

    def launch(self, owner: object) -> Prediction:
        """Take a place in the line and return the prediction; `owner` lives until it has ended."""
        loop = asyncio.get_running_loop()
        options, state = self._request.options, self._state
        prediction, self._deferred = defer_prediction(
            self._home.context, owner, options.max_pending, self._settled, options.schema
        )
        self._deferred.on_result(self._completed)
        if options.deadline is not None:
            self._deadline = loop.time() + options.deadline
        self._place = state.line.join()
        state.turns.add(self)
        task = loop.create_task(self._drive(), name="llamactor-chat")
        if not task.done():
            self._task = task
        task.add_done_callback(self._leave)
        return prediction

    def give_way(self) -> None:
        """Be cancelled if whatever changes the history goes first."""
        if self._request.yields:
            self._deferred.cancel()

    def close(self, error: BaseException) -> asyncio.Event:
        """Fail with `error`; return what is set when nothing of it runs any more."""
        self._fail(error)
        return self._gone

    def _fail(self, error: BaseException) -> None:
        self._deferred.fail(error)
        self._deferred.cancel()

    # --- the driver -------------------------------------------------------------------------------

    async def _drive(self) -> None:
        _driven.set(self._state)
        try:
            async with self._in_time():
                await self._place.reached()
                self._state.move_to(self._home)
                await self._begin(self._state.history.added(*self._request.added))
            while self._rounds.may_follow and not self._ended.is_set():
                await self._round()
        except Exception as error:
            self._fail(error)
        await self._ended.wait()

    @contextlib.asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        """Raise when the deadline passes; while the model writes, the core does."""
        try:
            async with asyncio.timeout_at(self._deadline) as limit:
                yield
        except TimeoutError as error:
            if limit.expired():
                raise _too_late(self._request.options, begun=self._begun) from error
            raise

    def _leave(self, _: asyncio.Task[None]) -> None:
        """Let the next one have its turn; also when the task was cancelled before it ran."""
        self._task = None
        self._deferred.cancel()
        self._state.turns.discard(self)
        self._place.leave()
        self._gone.set()

    async def _begin(self, wanted: History) -> None:
        history, prompt, dropped = await self._choose(wanted)
        tokens = prompt.rendered.tokens
        if self._request.until_text:
            tokens = await self._common(history.shown, tokens)
        if not tokens:
            self._deferred.cancel()
            return
        moved: list[tuple[int, int]] = []
        if history.shown != wanted.shown:
            moved = erased_ranges(self._state.cells, tokens)
            self._note_shift(dropped or sum(end - start for start, end in moved), tokens)
        self._pending = history
        self._start(tokens, prompt.rendered, history.shown, moved)

    async def _choose(self, history: History) -> tuple[History, Prompt, int]:
        """The history with the window to show, its rendering, and how many tokens it has lost."""
        request = self._request
        if request.strategy is None:
            return history, await self._render(history.shown), 0
        chooser = Chooser(self._render, ModelTexts(self._home.model), self._home.context_size)
        room = request.room if self._rounds.ended == 0 else self._rounds.left
        chosen = await chooser.choose(
            request.strategy, history.messages, previous=history.window, answer=room
        )
        return history.shifted(chosen.window), chosen.rendered, chosen.dropped

    async def _render(self, messages: tuple[Message, ...]) -> Prompt:
        request = self._request
        rendered = await render_chat(
            self._home.model,
            request.template,
            messages,
            tools=self._rounds.definitions,
            tool_choice=self._rounds.choice(messages),
            add_generation_prompt=not request.open_ended,
            open_ended=request.open_ended,
            kwargs=request.template_kwargs,
        )
        return Prompt(rendered, self._prefix)

    async def _common(self, messages: tuple[Message, ...], tokens: list[int]) -> list[int]:
        """What `tokens` have in common with a prompt that has another text at its end."""
        other = await self._render((*messages[:-1], _UNTIL_THE_TEXT[1]))
        return tokens[: common_prefix(tokens, other.tokens)]

    def _note_shift(self, dropped: int, tokens: list[int]) -> None:
        """Tell readers that the prompt has lost tokens."""
        if dropped:
            self._deferred.note_shift(common_prefix(self._state.cells, tokens), dropped)

    def _start(
        self,
        tokens: list[int],
        rendered: RenderedChat,
        messages: tuple[Message, ...],
        moved: list[tuple[int, int]],
    ) -> None:
        state, options = self._state, self._options(rendered)
        self._tokens = tokens
        if self._rounds.may_follow:
            self._deferred.tell(RoundStart(self._rounds.ended))
        begun = self._deferred.start(
            tokens,
            options,
            chat=state.key,
            keep=_kept(messages, rendered.ends, self._native["overflow"]),
            dropped=(state.cells, moved) if moved else None,
            more=self._rounds.may_follow,
        )
        self._begun = self._begun or begun

    def _options(self, rendered: RenderedChat) -> dict[str, Any]:
        """How the core is to generate in this round."""
        native = dict(self._native)
        native["stop"] = [*native["stop"], *rendered.stops]
        if not self._request.open_ended:
            native["reasoning"] = _marks(rendered.reasoning)
        if rendered.calls is not None:
            native["calls"] = rendered.calls.reader
            native["constraint"] = _constraint(native["constraint"], rendered.calls.constraint)
        if self._rounds.ended:
            native["response_prefix"], native["max_tokens"] = None, self._rounds.left
        if self._deadline is not None:
            left = self._deadline - asyncio.get_running_loop().time()
            native["deadline"] = max(left, 0.001)  # the core says what it thinks of that
        return native

    # --- rounds -----------------------------------------------------------------------------------

    async def _round(self) -> None:
        """See a round to its end, have its calls carried out, and go on or conclude."""
        calls = ToolCalls(self._request.tools, tell=self._deferred.tell, fail=self._fail)
        try:
            last = await self._heard(calls)
            if last is not None:
                async with self._in_time():
                    await self._go_on(last, calls)
        except Exception as error:
            # At once, and its end cancels this: the next turn waits for the handlers, not this one.
            self._fail(error)
            await self._ended.wait()
        finally:
            await calls.aclose()

    async def _heard(self, calls: ToolCalls) -> PredictionResult | None:
        """Start each call as it is complete; return the round, or None if it ended everything."""
        news, deferred, rounds = asyncio.Event(), self._deferred, self._rounds

        def look() -> None:
            # There is news with every token that somebody reads.
            if deferred.rounds > rounds.ended or deferred.calls(rounds.calls + len(calls.calls)):
                news.set()

        deferred.on_round(look)
        while not self._ended.is_set():
            news.clear()
            is_over = deferred.rounds > rounds.ended
            for call in deferred.calls(rounds.calls + len(calls.calls)):
                calls.add(read_call(*call))
            if is_over and not deferred.done:
                return deferred.last_round()
            await news.wait()
        return None

    async def _go_on(self, last: PredictionResult, calls: ToolCalls) -> None:
        rounds = self._rounds
        self._deferred.tell(RoundEnd(rounds.ended))
        self._hold(last)
        rounds.end(last, self._answer(last, calls.calls))
        self._prefix = []
        added = rounds.settle(await calls.messages())
        self._pending = self._pending.added(*added)
        goes_on, reason = rounds.verdict(last, calls)
        if not goes_on:
            self._deferred.conclude(reason)
            await self._ended.wait()
            return
        self._native["seed"] = last.seed
        await self._begin(self._pending)

    def _hold(self, last: PredictionResult) -> None:
        """Take note of what the cells hold after a round."""
        self._state.cells = self._tokens + self._prefix + last.tokens

    # --- the end ----------------------------------------------------------------------------------

    def _completed(self, result: PredictionResult) -> PredictionResult:
        """Add to the result what the chat gains, as far as it is whole."""
        if self._request.yields:
            return result
        ended = self._deferred.rounds
        last = self._deferred.last_round() if ended > self._rounds.ended else None
        ending = None if last is None else self._ending(last, result.stop_reason)
        said = self._rounds.said(ending, result.stop_reason)
        return msgspec.structs.replace(
            result,
            rounds=max(ended, 1),
            messages=tuple(said),
            # That calls are kept to a form is nobody's wish.
            completed=result.completed or self._native["constraint"] is None,
        )

    def _ending(
        self, last: PredictionResult, stop_reason: StopReason | None
    ) -> AssistantMessage | None:
        """What the last round has said; None for nothing, which a cut call is too."""
        if stop_reason == "cancelled" and last.tool_calls:
            # It came between the end of the round and the calls: they were not made.
            said = last.content or last.reasoning
            return AssistantMessage(last.content, last.reasoning) if said else None
        if last.stop_reason not in (None, "cancelled"):
            return self._answer(last, last.tool_calls)
        only_calls = self._rounds.definitions and not (last.content or last.reasoning)
        return None if only_calls or not last.tokens else self._answer(last, ())

    def _settled(self, result: PredictionResult, error: BaseException | None) -> None:
        """Take over what the turn has changed; on the loop, before anybody hears of the end."""
        self._ended.set()
        if self._task is not None:
            # It may wait for its place, for a template or for handlers.
            self._task.cancel()
        if not self._begun:
            return
        state = self._state
        state.usage = state.usage.plus(result)
        if self._deferred.rounds > self._rounds.ended:
            self._hold(self._deferred.last_round() or result)
        if error is None and result.messages:
            self._take_over(result.messages)

    def _take_over(self, said: tuple[Message, ...]) -> None:
        if self._request.record:
            self._state.history = self._pending.added(*said[len(self._rounds.made) :])
        for message in (*self._request.added, *said):
            self._tell(message)

    def _answer(self, result: PredictionResult, calls: tuple[ToolCall, ...]) -> AssistantMessage:
        """What a round has said, with the ids of the whole turn where they are known."""
        tokens = [*self._prefix, *result.tokens]
        start = len(self._prefix) + result.content_start if result.segments else 0
        if calls:
            # Where the template writes calls as the model has, the ids are found again.
            return AssistantMessage(result.content, result.reasoning, calls, tuple(tokens), start)
        content = None
        with contextlib.suppress(ClosedError):  # nobody needs the ids of a closed model
            content = self._content_tokens(tokens[start:], result)
        if content is None:
            return AssistantMessage(result.content, result.reasoning)
        turn = (*tokens[:start], *content)
        return AssistantMessage(result.content, result.reasoning, (), turn, start)

    def _content_tokens(self, tokens: list[int], result: PredictionResult) -> list[int] | None:
        """Those of `tokens` that make up the content; None if they say something else."""
        model = self._home.model
        if result.stop_string is not None or self._request.options.trim_trailing_whitespace:
            return cut_tokens(model, tokens, result.content)
        if not result.segments and not self._rounds.definitions:
            return tokens
        # Reasoning or a part of a call may have come in the middle, or after a response prefix.
        shown = model.detokenize(tokens, special=False)
        return tokens if shown.strip() == result.content.strip() else None

    def _tell(self, message: Message) -> None:
        """Call the user's function; what it raises is no failure of the turn."""
        if self._request.on_message is None:
            return
        try:
            self._request.on_message(message)
        except Exception as error:
            context = {"message": "on_message of a chat failed", "exception": error}
            asyncio.get_running_loop().call_exception_handler(context)


def require_outside(state: ChatState) -> None:
    """Raise `RuntimeError` for code that a turn of this chat waits for: it would wait for ever."""
    if _driven.get() is state:
        raise RuntimeError(
            "a context shift strategy or a tool cannot use the session that waits for it; "
            "model.respond works, and so does a session of its own"
        )


def cut_tokens(model: _core.Model, tokens: list[int], text: str) -> list[int] | None:
    """Return the tokens of `text`, which is what is shown of `tokens`: a stop or white space went.

    All of `tokens` stay that belong to `text` alone. None if they do not begin with it.
    """

    def shown(n: int) -> str:
        return model.detokenize(tokens[:n], special=False)

    n = len(tokens)
    if not shown(n).startswith(text):
        return None
    while n and shown(n - 1).startswith(text):
        n -= 1
    if shown(n) == text:
        return tokens[:n]
    head = shown(n - 1)
    if not text.startswith(head):
        return None
    return tokens[: n - 1] + model.tokenize_continuation(text[len(head) :], special=False)


def respond(home: Home, request: TurnRequest, messages: tuple[Message, ...]) -> Prediction:
    """Start the answer to `messages`, which leaves nothing behind but a cached prefix."""
    return Turn(home, ChatState(History(messages), 0), request).launch(home.owner)


def _constraint(
    wished: dict[str, Any] | None, of_calls: dict[str, Any] | None
) -> dict[str, Any] | None:
    """What an answer must obey that may call tools, and else be what is wished for."""
    if wished is None or of_calls is None:
        return wished or of_calls
    if of_calls["kind"] != "lazy":
        return of_calls  # the call comes first
    return {"kind": "any", "of": [of_calls["of"], wished]}


def _marks(tags: ReasoningTags | None) -> ReasoningMarks | None:
    """The tags with what closes a thought whose budget is used up, as templates write it."""
    if tags is None:
        return None
    closing = f"\n{tags.end}\n\n" if tags.end.startswith("</") else tags.end
    return tags.start, tags.end, tags.opened, closing


def _prefix_tokens(model: _core.Model, prefix: str | None) -> list[int]:
    return [] if prefix is None else model.tokenize_continuation(prefix, special=False)


def _kept(messages: tuple[Message, ...], ends: list[int], overflow: str | None) -> int:
    """Tokens at the front that stay when the context fills up: the system prompt at least."""
    n = len(leading_system(messages))
    if overflow == "truncate_middle":
        turns = History(messages).turns
        n = turns[1] if len(turns) > 1 else n
    return ends[n - 1] if n else 0


def _too_late(options: GenerationOptions, *, begun: bool) -> DeadlineExceededError:
    reason = (
        "while tools were carried out"
        if begun
        else "before the prediction could begin; those made before it on this chat took that long"
    )
    return DeadlineExceededError(f"the deadline of {options.deadline} s passed {reason}")

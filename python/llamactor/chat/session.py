"""A chat session: the history of one conversation, and everything one does with it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack

import msgspec

from llamactor import _checks as check
from llamactor._home import Moving
from llamactor._hub import check_loop, finalisers_rest, running_loop
from llamactor._opening import Opening
from llamactor._work import Work, work_of
from llamactor.chat.completion import CompletionEngine, OnGeneration
from llamactor.chat.history import History, leading_system
from llamactor.chat.messages import Message, MessageLike, SystemMessage, UserMessage, to_messages
from llamactor.chat.rounds import Rounds
from llamactor.chat.saved import (
    SavedChat,
    full_options,
    plain_options,
    put_state_back,
    read_chat,
    write_chat,
)
from llamactor.chat.shift import check_overflow
from llamactor.chat.template import check_template_names, render_chat
from llamactor.chat.tools import (
    Guard,
    OnToolError,
    Toolbox,
    ToolLike,
    ToolUse,
    check_tool_use,
    to_toolbox,
)
from llamactor.chat.turn import (
    ChatState,
    ChatUsage,
    OnMessage,
    Turn,
    TurnRequest,
    require_outside,
    respond,
)
from llamactor.errors import ClosedError
from llamactor.options import GenerationKeywords, GenerationOptions, generation_options

if TYPE_CHECKING:
    import os
    from types import TracebackType

    from llamactor._home import Home, Housing
    from llamactor.prediction import Prediction

MAX_COMPLETION = 256
"""Tokens of a completion of the user's text, if nobody says otherwise."""


class ChatSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a session was made with, and what its prompts may replace."""

    options: GenerationOptions
    """How to generate."""
    tools: Toolbox
    """Tools that the model may call."""
    template: str | None = None
    """Jinja text of the chat template; None is the plain fallback."""
    template_kwargs: Mapping[str, Any] = {}
    """Variables for the template."""
    on_message: OnMessage | None = None
    """Called with each message that enters the history."""


class ChatSession:
    """A conversation with a model; belongs to the event loop it was made in.

    It holds a sequence only while it works, so there may be far more sessions than sequences. What
    it left in the context's cells is found again by its next prompt, or put aside when others need
    the room; a session itself owns no native memory, and one that is forgotten leaves nothing.

    Prompts, and whatever else needs the history, run one after the other in the order of the calls.
    Once it, its context or its model is closed, they raise `ClosedError`.
    """

    def __init__(
        self,
        target: Housing | Home,
        *,
        system_prompt: str | None = None,
        history: Iterable[MessageLike] | History = (),
        tools: Iterable[ToolLike] | Toolbox | None = None,
        chat_template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        on_message: OnMessage | None = None,
        **options: Unpack[GenerationKeywords],
    ) -> None:
        """Begin a conversation.

        Args:
            target: A model, whose default context it uses, or a context, or a sequence, whose
                context it uses, or a runtime's handle, which it follows.
            system_prompt: What the model is told first; None leaves that to the template.
            history: Messages to begin with, after `system_prompt`.
            tools: Tools that the model may call, unless a prompt has its own; see `prompt`.
            chat_template: Jinja text instead of the model's own template.
            template_kwargs: Variables for the template, such as ``{"enable_thinking": False}``.
            on_message: Called with each message that enters the history by a prompt.
            **options: See `GenerationOptions`; the prompts' own go first. ``overflow`` is a
                strategy of `llamactor.context_shift`, or its name, or an async function; None is
                ``erase_oldest``.

        Raises:
            TypeError: an option is unknown or has the wrong type.
            ValueError: an option is out of range, or there are two system prompts.
            UnsupportedError: the model cannot generate.
            ClosedError: model or context was closed.
            RuntimeError: called without a running event loop.
        """
        self._loop = running_loop("a chat session")
        home = target if isinstance(target, tuple) else target._home()  # noqa: SLF001 -- for this
        self._last_home: Home = home
        self._moving = target if isinstance(target, Moving) else None
        self._settings = ChatSettings(
            options=generation_options(options),
            tools=to_toolbox(tools),
            template=home.template if chat_template is None else _template(chat_template),
            template_kwargs=_kwargs(template_kwargs),
            on_message=_callback(on_message),
        )
        check_overflow(self._settings.options.overflow)
        self._closed = False
        self._check_open()
        self._state = ChatState(_beginning(system_prompt, history), home.context.new_chat())

    @property
    def _home(self) -> Home:
        """Where it runs now; a handle may mean another model than before.

        Raises:
            ModelNotLoadedError: it was made with a handle that means none now.
        """
        if self._moving is not None:
            home, before = self._moving._home(), self._last_home  # noqa: SLF001 -- for this
            if home.template != before.template and self._settings.template == before.template:
                self._settings = msgspec.structs.replace(self._settings, template=home.template)
            self._last_home = home
        return self._last_home

    @property
    def _work(self) -> Work | None:
        """What counts its predictions as work of the model."""
        return work_of(self._home.owner)

    # --- what it is -------------------------------------------------------------------------------

    @property
    def history(self) -> tuple[Message, ...]:
        """All messages that were said and recorded, the system prompt included."""
        return self._state.history.messages

    @property
    def context_window(self) -> tuple[Message, ...]:
        """The messages that the context has room for: the history, or what a shift has left of it.

        Some of them may be shortened, or stand for several.
        """
        return self._state.history.shown

    @property
    def revision(self) -> int:
        """A number that grows whenever the history changes."""
        return self._state.revision

    @property
    def usage(self) -> ChatUsage:
        """What its predictions took so far."""
        return self._state.usage

    @property
    def closed(self) -> bool:
        """Whether it, its context or its model was closed."""
        if self._moving is not None:
            return self._closed or self._moving.closed
        return self._closed or self._last_home.context.closed

    # --- what it says -----------------------------------------------------------------------------

    def prompt(
        self,
        text: str | MessageLike | Sequence[MessageLike],
        *,
        tools: Iterable[ToolLike] | None = None,
        tool_choice: str = "auto",
        max_rounds: int | None = None,
        parallel_tools: bool = True,
        on_tool_error: OnToolError = "report",
        guard: Guard | None = None,
        record: bool = True,
        on_message: OnMessage | None = None,
        **options: Unpack[GenerationKeywords],
    ) -> Prediction:
        """Say `text` to the model and start the prediction of its answer.

        It waits for the prompts before it, and completions and preloads give way to it. All
        messages enter the history when the answer has ended. A prediction that fails leaves
        history, window and cache as they were. One that is cancelled does too if nothing was
        generated yet; else it is recorded as far as it came. It is cancelled when everybody who
        waited for it or iterated it is gone; see `Prediction`. One that pauses because its readers
        lag holds up those behind it.

        Calls of tools with a handler are carried out, and the model is asked again with their
        results, until it calls none or one without a handler: then the prediction ends with
        ``stop_reason="tool_calls"``, and `PredictionResult.pending_calls` are the program's to
        answer. Wrong calls are told to the model. Handlers start as soon as their call is
        complete; cancelling the prediction cancels those that run, and leaves threads alone.

        Args:
            text: What the user says; or messages, such as the results of calls.
            tools: Tools instead of the session's: functions, `Tool`, or bare definitions with
                "name", "description" and "parameters", whose calls are returned.
            tool_choice: ``"auto"``, ``"none"``, ``"required"``, or the name of the tool to call;
                once calls were answered the model is free.
            max_rounds: How often the model is asked at most; the last time it has no tools. None
                is no limit. ``max_tokens`` counts over all rounds.
            parallel_tools: False carries out one call after the other, in order.
            on_tool_error: ``"report"`` tells the model of a handler that failed; ``"raise"`` ends
                the prediction with `ToolExecutionError`.
            guard: Called with each `ToolCall` before it is carried out, one after the other: True
                or None allows it, False or a reason denies it, a dict has other arguments. The
                model is told of both.
            record: False leaves no trace in the history.
            on_message: Called with each message that enters the history, instead of the session's.
            **options: See `GenerationOptions`, laid over the session's.

        Raises:
            TypeError: an option or a tool is unknown or has the wrong type.
            ValueError: an option is out of range, a tool's name is wrong or there twice, or there
                is nothing to answer.
            ClosedError: the session, its context or its model was closed.
            RuntimeError: called outside of the session's event loop.
        """
        check.check_bool("record", record)
        use = check_tool_use(
            self._settings.tools if tools is None else to_toolbox(tools),
            tool_choice=tool_choice,
            max_rounds=max_rounds,
            parallel_tools=parallel_tools,
            on_tool_error=on_tool_error,
            guard=guard,
        )
        teller = _callback(on_message) or self._settings.on_message
        several = isinstance(text, (list, tuple, Message, Mapping))
        request = self._request(
            said_by(text) if several else (UserMessage(text),),  # type: ignore[arg-type]
            options,
            tools=use,
            record=record,
            on_message=teller if record else None,
        )
        return self._launch(request)

    def complete(self, text: str, **options: Unpack[GenerationKeywords]) -> Prediction:
        """Start a prediction of how the user's own text goes on; its content is what follows.

        Invisible: nothing of it enters the history or the next prompt. It waits for what was asked
        before it, and is cancelled by a prompt and by whatever changes the history. It is cancelled
        when everybody who waited for it or iterated it is gone; see `Prediction`.

        Args:
            text: What the user has written so far.
            **options: See `GenerationOptions`, laid over the session's. ``max_tokens`` is 256, or
                half of the context if that is less, unless given here.

        Raises:
            TypeError: an option is unknown or has the wrong type.
            ValueError: an option is out of range.
            ClosedError: the session, its context or its model was closed.
            RuntimeError: called outside of the session's event loop.
        """
        given = {"response_prefix": None, **options}
        if "options" not in options:
            given.setdefault("max_tokens", self._longest_completion())
        request = self._request((UserMessage(text),), given, yields=True, open_ended=True)
        return self._launch(request)

    def completion_engine(
        self,
        *,
        max_cached: int = 100,
        on_generation: OnGeneration | None = None,
        **options: Unpack[GenerationKeywords],
    ) -> CompletionEngine:
        """Return what completes the user's text while it is typed; close it with ``aclose``.

        Args:
            max_cached: Texts whose suggestions are kept; the one used longest ago goes first.
            on_generation: Called on the loop with the current text and what may follow it,
                whenever that has grown.
            **options: See `GenerationOptions`, laid over the session's. ``max_tokens`` is as with
                `complete`.

        Raises:
            TypeError: an option is unknown or has the wrong type.
            ValueError: an option is out of range.
            ClosedError: the session, its context or its model was closed.
            RuntimeError: called outside of the session's event loop.
        """
        self._check_open()
        if "options" not in options:
            options.setdefault("max_tokens", self._longest_completion())
        engine = CompletionEngine(
            self, max_cached=max_cached, on_generation=on_generation, **options
        )
        self._state.engines.add(engine)
        return engine

    async def preload(self, text: str = "") -> None:
        """Evaluate the history and the beginning of the next prompt, so that it starts sooner.

        The history stays as it is. A prompt, or whatever changes the history, ends this early;
        what was evaluated by then serves the prompt all the same. Cancelling this stops within one
        decode call; what is evaluated stays cached.

        Args:
            text: What the user has written so far; without it, everything up to there.

        Raises:
            ContextOverflowError: it does not fit, and the strategy drops nothing.
            ClosedError: the session, its context or its model was closed.
        """
        said = (UserMessage(text or "a"),)
        options: dict[str, Any] = {"max_tokens": 0, "response_prefix": None}
        request = self._request(
            said, options, yields=True, open_ended=bool(text), until_text=not text
        )
        await self._launch(request).result()

    # --- what it remembers ------------------------------------------------------------------------

    async def set_history(self, history: Iterable[MessageLike]) -> None:
        """Replace all messages, the system prompt included.

        It waits for what was asked before it. Cancelling this leaves the history as it was.

        Args:
            history: Messages or dicts.

        Raises:
            TypeError: one is no message; the error says which.
            ValueError: the same.
            ClosedError: the session was closed.
        """
        messages = to_messages(history, name="history")
        async with self._editing() as state:
            state.history = History(messages)

    async def reset(self) -> None:
        """Forget everything but the system messages that the history begins with.

        It waits for what was asked before it. Cancelling this leaves the history as it was.
        """
        async with self._editing() as state:
            state.history = History(leading_system(state.history.messages))

    async def rewind(self, n_turns: int = 1) -> tuple[Message, ...]:
        """Take back the last turns, and return their messages.

        A turn is a user's message and everything until the next one. It waits for what was asked
        before it. Cancelling this leaves the history as it was.

        Args:
            n_turns: How many.

        Raises:
            ValueError: there are fewer.
            ClosedError: the session was closed.
        """
        async with self._editing() as state:
            turns = state.history.turns
            hint = f"the history has {len(turns)} turns"
            n = check.check_int("n_turns", n_turns, 0, len(turns), hint=hint)
            return self._cut(turns[-n] if n else len(state.history.messages))

    async def delete_from(self, index: int) -> tuple[Message, ...]:
        """Delete a message and all after it, and return them.

        It waits for what was asked before it. Cancelling this leaves the history as it was.

        Args:
            index: Of the first message to go, counted from 0.

        Raises:
            ValueError: there are fewer messages.
            ClosedError: the session was closed.
        """
        async with self._editing() as state:
            length = len(state.history.messages)
            hint = f"the history has {length} messages"
            return self._cut(check.check_int("index", index, 0, length, hint=hint))

    async def fork(self) -> ChatSession:
        """Return a session with the same history and settings that goes its own way from here.

        Both share the evaluated tokens as far as they are the same. It waits for what was asked
        before it. Cancelling this leaves no session behind.

        Raises:
            ClosedError: the session was closed.
        """
        async with self._waiting() as state:
            settings = self._settings
            session = ChatSession(
                self._moving or self._home,
                history=state.history,
                tools=settings.tools,
                chat_template=settings.template,
                template_kwargs=settings.template_kwargs,
                on_message=settings.on_message,
                options=settings.options,
            )
            session._state.home = state.home
            return session

    # --- what is kept of it -----------------------------------------------------------------------

    async def save(self, path: str | os.PathLike[str], *, include_state: bool = True) -> None:
        """Write history, window and settings to a file, with the fingerprint of the model.

        Functions among the options (a logits processor, a custom strategy) can't be saved: give
        them to `restore` again. It waits for what was asked before it, and for a free sequence if
        the state is included. Cancelling this leaves the file as it was, or writes all of it.

        Args:
            path: The file, which is replaced at once; its folder must exist.
            include_state: Also write what is evaluated, so that the next prompt goes on at once.
                It takes much more room than the history.

        Raises:
            OSError: it cannot be written.
            ClosedError: the session was closed.
        """
        checked = check.check_path("path", path)
        async with self._waiting() as state:
            state.move_to(self._home)
            tokens = await self._window_tokens() if include_state else None
            await write_chat(self._home, state.key, checked, self._saved(), tokens)

    @classmethod
    def restore(
        cls,
        path: str | os.PathLike[str],
        target: Housing,
        *,
        tools: Iterable[ToolLike] | None = None,
        on_message: OnMessage | None = None,
        **options: Unpack[GenerationKeywords],
    ) -> Opening[ChatSession]:
        """Return the session that a file holds: ``await`` it or enter it with ``async with``.

        The state is used if the file has one and the context can take it; else the first prompt
        evaluates the history again. Cancelling it leaves no session behind.

        Args:
            path: A file that `save` wrote, with the same model.
            target: The model, or a context or sequence of it, where the session goes on.
            tools: Tools instead of those that were saved, which have lost their handlers.
            on_message: Called with each message that enters the history by a prompt.
            **options: Laid over those that were saved; see `GenerationOptions`.

        Raises:
            StateMismatchError: the file is of another model, damaged, or of a later release.
            FileNotFoundError: there is no such file.
            ClosedError: model or context was closed.
        """
        box = None if tools is None else to_toolbox(tools)
        checked = check.check_path("path", path)
        return Opening(cls._restored(checked, target, box, on_message, options))

    @classmethod
    async def _restored(
        cls,
        path: str,
        target: Housing,
        tools: Toolbox | None,
        on_message: OnMessage | None,
        options: Mapping[str, Any],
    ) -> ChatSession:
        home = target._home()  # noqa: SLF001 -- for this
        saved, has_state = await read_chat(home, path)
        session = cls(
            target if isinstance(target, Moving) else home,
            history=History(saved.history, saved.window),
            tools=saved.tools if tools is None else tools,
            chat_template=saved.template,
            template_kwargs=saved.template_kwargs,
            on_message=on_message,
            options=generation_options({"options": full_options(saved.options), **options}),
        )
        session._state.move_to(home)
        if has_state:
            try:
                await put_state_back(home, session._state.key, path)
            except BaseException:
                await session.aclose()
                raise
        return session

    def _saved(self) -> SavedChat:
        settings, history = self._settings, self._state.history
        own = settings.template == self._last_home.template
        return SavedChat(
            history=history.messages,
            window=history.window,
            options=plain_options(settings.options),
            tools=tuple(dict(tool) for tool in settings.tools.definitions),
            template=None if own else settings.template,
            template_kwargs=dict(settings.template_kwargs),
        )

    async def _window_tokens(self) -> list[int]:
        """What the next prompt will begin with, as far as the context has room for it."""
        messages, settings = self._state.history.shown, self._settings
        if not messages:
            return []
        rendered = await render_chat(
            self._home.model,
            settings.template,
            messages,
            tools=settings.tools.definitions,
            tool_choice=Rounds(ToolUse(tools=settings.tools), None).choice(messages),
            add_generation_prompt=False,
            kwargs=settings.template_kwargs,
        )
        return rendered.tokens[: self._home.context_size]

    async def aclose(self) -> None:
        """End the conversation; idempotent. What still runs or waits fails with `ClosedError`.

        History and window can still be read. Cancelling this does not stop the closing, only the
        waiting for it.
        """
        check_loop(self._loop, "a chat session")
        self._closed = True
        error = ClosedError("the chat session was closed")
        for ended in [turn.close(error) for turn in self._state.turns]:
            await ended.wait()
        self._last_home.context.forget_chat(self._state.key)

    async def __aenter__(self) -> ChatSession:
        """Return itself; never suspends."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close it, as `aclose` does; cancelling is as there."""
        await self.aclose()

    # --- how --------------------------------------------------------------------------------------

    def _request(
        self,
        added: tuple[Message, ...],
        keywords: Mapping[str, Any],
        *,
        tools: ToolUse | None = None,
        on_message: OnMessage | None = None,
        **flags: bool,
    ) -> TurnRequest:
        _ = self._home  # a handle may mean another model by now, with another template
        settings = self._settings
        options = generation_options({"options": settings.options, **keywords})
        # What only prepares a prompt has the window of one.
        room = settings.options.max_tokens if flags.get("yields") else options.max_tokens
        return TurnRequest(
            added=added,
            options=options,
            template=settings.template,
            template_kwargs=settings.template_kwargs,
            tools=ToolUse(tools=settings.tools) if tools is None else tools,
            strategy=check_overflow(options.overflow),
            room=room,
            on_message=on_message,
            **flags,
        )

    def _longest_completion(self) -> int:
        """Tokens of a completion, if nobody says otherwise."""
        return min(MAX_COMPLETION, max(1, self._home.context_size // 2))

    def _launch(self, request: TurnRequest) -> Prediction:
        self._check_open()
        require_outside(self._state)
        turn = Turn(self._home, self._state, request)
        if not request.yields:
            self._supersede()
        return turn.launch(self)

    def _supersede(self) -> None:
        """Let everything give way that does."""
        for turn in self._state.turns:
            turn.give_way()

    def _check_open(self) -> None:
        check_loop(self._loop, "a chat session")
        if self.closed:
            what = "the chat session" if self._closed else "the chat session's context"
            raise ClosedError(f"{what} was closed")

    @contextlib.asynccontextmanager
    async def _waiting(self) -> AsyncIterator[ChatState]:
        """Have the session to oneself, in the order of the calls."""
        self._check_open()
        require_outside(self._state)
        async with self._state.line.join():
            self._check_open()
            yield self._state

    @contextlib.asynccontextmanager
    async def _editing(self) -> AsyncIterator[ChatState]:
        """The same, for what changes the history."""
        self._check_open()
        require_outside(self._state)
        self._supersede()
        async with self._waiting() as state:
            yield state

    def _cut(self, length: int) -> tuple[Message, ...]:
        history = self._state.history
        self._state.history = history.cut(length)
        return history.messages[length:]

    def __repr__(self) -> str:
        """Return length and state in words."""
        state = "closed" if self._closed else "open"
        return f"<ChatSession of {len(self.history)} messages, {state}>"

    def __del__(self) -> None:
        """Forget what it left in the context; on whatever thread this runs."""
        state = getattr(self, "_state", None)
        if state is not None and not finalisers_rest():
            self._last_home.context.forget_chat(state.key)


def respond_to(
    home: Home,
    messages: str | Iterable[MessageLike],
    *,
    tools: ToolUse,
    template_kwargs: Mapping[str, Any] | None,
    on_message: OnMessage | None,
    keywords: Mapping[str, Any],
) -> Prediction:
    """Check the arguments and start a prediction that answers `messages`, without a session."""
    options = generation_options(keywords)
    request = TurnRequest(
        added=(),
        options=options,
        template=home.template,
        template_kwargs=_kwargs(template_kwargs),
        tools=tools,
        on_message=_callback(on_message),
        strategy=None if options.overflow is None else check_overflow(options.overflow),
        room=options.max_tokens,
    )
    return respond(home, request, said_by(messages))


def said_by(messages: str | MessageLike | Iterable[MessageLike]) -> tuple[Message, ...]:
    """Return messages to answer: a text is a user's.

    Raises:
        TypeError: one is no message.
        ValueError: there is none.
    """
    if isinstance(messages, str):
        return (UserMessage(messages),)
    single = isinstance(messages, (Message, Mapping))
    given = to_messages([messages] if single else messages, name="messages")  # type: ignore[list-item, arg-type]
    if not given:
        raise ValueError("messages must not be empty: there is nothing to answer")
    return given


def _beginning(system_prompt: str | None, history: Iterable[MessageLike] | History) -> History:
    if isinstance(history, History):
        return history
    messages = to_messages(history, name="history")
    if system_prompt is None:
        return History(messages)
    if leading_system(messages):
        raise ValueError(
            "history begins with a system message already; leave system_prompt out, or that message"
        )
    check.check_text("system_prompt", system_prompt)
    return History((SystemMessage(system_prompt), *messages))


def _template(value: object) -> str:
    return check.check_text("chat_template", value, empty=False)


def _kwargs(value: object) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"template_kwargs must be a dict by name, not {check.describe(value)}")
    return check_template_names(value)


def _callback(value: object) -> OnMessage | None:
    return None if value is None else check.check_callable("on_message", value)

"""A model: weights and vocabulary, read-only, shared by all its contexts."""

from __future__ import annotations

import warnings
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Unpack

import msgspec

from llamactor import _checks as check
from llamactor._home import Home
from llamactor._hub import finalisers_rest, finish, hub_for, running_loop
from llamactor._opening import Opening
from llamactor._work import Work
from llamactor.chat.messages import to_messages
from llamactor.chat.session import ChatSession, respond_to
from llamactor.chat.template import check_template_names, check_tool_definitions, render_chat
from llamactor.chat.tools import check_tool_use, to_toolbox
from llamactor.context import Context
from llamactor.errors import UnsupportedError
from llamactor.options import ContextKeywords, ContextOptions, GenerationKeywords, context_options
from llamactor.prediction import Prediction, start_prediction

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from types import TracebackType

    from llamactor import _core
    from llamactor.chat.messages import MessageLike
    from llamactor.chat.tools import Guard, OnToolError, Toolbox, ToolLike
    from llamactor.chat.turn import OnMessage


class ModelInfo(msgspec.Struct, frozen=True):
    """What a model is; of a vocabulary alone, sizes and counts of layers are 0."""

    architecture: str
    """Architecture, such as "llama"."""
    name: str | None
    """Name the file gives itself."""
    parameters: int
    """Number of weights."""
    size_bytes: int
    """Size of the weights in bytes."""
    quantization: str
    """Type of most weights, such as "Q4_1"."""
    train_context_size: int
    """Context it was trained with, in tokens."""
    embedding_size: int
    """Width of the embeddings."""
    layers: int
    """Number of layers."""
    heads: int
    """Attention heads."""
    kv_heads: int
    """Attention heads of keys and values."""
    vocab_size: int
    """Tokens in the vocabulary."""
    chat_template: str | None
    """Jinja text of the chat template."""
    is_recurrent: bool
    """Whether its memory is a running state instead of one cell per token."""
    is_hybrid: bool
    """Whether it has both kinds of memory."""
    sliding_window: int
    """Width of the sliding attention window in tokens; 0 is none."""
    has_encoder: bool
    """Whether it encodes its input first."""
    has_decoder: bool
    """Whether it can generate."""
    path: str
    """The file it was loaded from."""
    vocab_only: bool
    """Whether only vocabulary and metadata were loaded."""


class SpecialTokens(msgspec.Struct, frozen=True):
    """Ids of the special tokens; None where the vocabulary has none."""

    bos: int | None = None
    """Beginning of the text."""
    eos: int | None = None
    """End of the text."""
    eot: int | None = None
    """End of a turn."""
    sep: int | None = None
    """Separator of sentences."""
    nl: int | None = None
    """New line."""
    pad: int | None = None
    """Padding."""
    mask: int | None = None
    """Mask."""
    fim_prefix: int | None = None
    """Fill in the middle: what stands before."""
    fim_suffix: int | None = None
    """Fill in the middle: what stands behind."""
    fim_middle: int | None = None
    """Fill in the middle: where to write."""
    fim_pad: int | None = None
    """Fill in the middle: padding."""
    fim_repo: int | None = None
    """Fill in the middle: repository name."""
    fim_separator: int | None = None
    """Fill in the middle: file separator."""


class Model:
    """A loaded model; serves any event loop and outlives the one that loaded it."""

    def __init__(
        self,
        native: _core.Model,
        context: _core.Context | None,
        chat_template: str | None = None,
    ) -> None:
        """Wrap a loaded native model and its default context; made by `load_model`."""
        self._native = native
        self._context = context
        self._chat_template = chat_template
        self._closing = False
        self._work = Work()
        self._info = msgspec.convert(native.info(), ModelInfo)
        self._tokens = msgspec.convert(native.special_tokens(), SpecialTokens)
        self._metadata = MappingProxyType(native.metadata())

    @property
    def info(self) -> ModelInfo:
        """What it is."""
        return self._info

    @property
    def metadata(self) -> Mapping[str, str]:
        """The file's metadata, overrides applied, values as text."""
        return self._metadata

    @property
    def tokens(self) -> SpecialTokens:
        """Ids of its special tokens."""
        return self._tokens

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._native.closed

    def tokenize(self, text: str, *, add_bos: bool = False, special: bool = False) -> list[int]:
        """Return the tokens of `text`.

        Args:
            text: At most 16 MiB of UTF-8.
            add_bos: Put the beginning-of-text token first, if the model uses one.
            special: Parse special tokens such as ``<|im_start|>``; otherwise they are plain text.

        Raises:
            TypeError: `text` is no string.
            ValueError: the text is too long, UTF-8 cannot say it, or it would take this model's
                pre-tokenizer too much time or memory, such as 262,145 letters in a row.
        """
        check.check_bool("add_bos", add_bos)
        check.check_bool("special", special)
        return self._native.tokenize(check.check_text("text", text), add_bos, special)

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Return the text of `tokens`; bytes that are not UTF-8 become U+FFFD.

        Args:
            tokens: Ids of this model's vocabulary; at most 16 Mi of them.
            special: Also write out special tokens.

        Raises:
            TypeError: a token is no integer.
            ValueError: a token is outside the vocabulary, or there are too many.
        """
        check.check_bool("special", special)
        checked = check.check_tokens("tokens", tokens, self._info.vocab_size, empty=True)
        if len(checked) > check.MAX_TEXT_BYTES:
            raise ValueError(
                f"tokens has {len(checked)} ids, the limit is {check.MAX_TEXT_BYTES}; "
                "pass them in parts"
            )
        return self._native.detokenize(checked, special)

    def count_tokens(self, text: str) -> int:
        """Return how many tokens `text` (at most 16 MiB) has, special tokens not parsed."""
        return self._native.count_tokens(check.check_text("text", text))

    def create_context(self, **options: Unpack[ContextKeywords]) -> Opening[Context]:
        """Open a context beside the default one: ``await`` it or enter it with ``async with``.

        Cancelling it leaves nothing open.

        Args:
            **options: See `ContextOptions`.

        Raises:
            TypeError: an option is unknown or has the wrong type.
            ValueError: an option is out of range.
            InsufficientMemoryError: memory for it could not be had.
            UnsupportedError: the model cannot have such a context.
        """
        return Opening(self._open_context(context_options(options)))

    def complete(
        self, prompt: str | Sequence[int], **options: Unpack[GenerationKeywords]
    ) -> Prediction:
        """Start a prediction that continues `prompt`, on its own sequence of the default context.

        It waits for a free sequence if need be. It is cancelled when everybody who waited for it
        or iterated it is gone; see `Prediction`.

        Args:
            prompt: Text, special tokens parsed unless ``special=False``, or token ids; not empty.
            **options: See `GenerationOptions`.

        Raises:
            TypeError: an option is unknown or has the wrong type.
            ValueError: the prompt is empty or an option out of range.
            UnsupportedError: the model cannot generate.
            RuntimeError: called without a running event loop.
        """
        context = self._default_context()
        return start_prediction(context.predict, self._native, self, prompt, options)

    def respond(
        self,
        messages: str | Iterable[MessageLike],
        *,
        tools: Iterable[ToolLike] | Toolbox | None = None,
        tool_choice: str = "auto",
        max_rounds: int | None = None,
        parallel_tools: bool = True,
        on_tool_error: OnToolError = "report",
        guard: Guard | None = None,
        on_message: OnMessage | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[GenerationKeywords],
    ) -> Prediction:
        """Start a prediction that answers a chat, on its own sequence of the default context.

        Nothing is remembered but the evaluated tokens, as a prefix for whoever comes with the same.
        It waits for a free sequence if need be. It is cancelled when everybody who waited for it
        or iterated it is gone; see `Prediction`.

        Calls of tools without a handler are returned: ``stop_reason`` is ``"tool_calls"`` then.
        With handlers it goes on as `act` does.

        Args:
            messages: The whole chat, messages or dicts, or the text of one user's message.
            tools: Tools that the model may call; this and what follows are as with
                `ChatSession.prompt`.
            tool_choice: Whether it may, or must, or which one.
            max_rounds: How often the model is asked at most.
            parallel_tools: Whether calls of one round are carried out at the same time.
            on_tool_error: What a handler's failure does.
            guard: Looks at each call before it is carried out.
            on_message: Called with each message of `PredictionResult.messages` at the end.
            template_kwargs: Variables for the template.
            **options: See `GenerationOptions`. Without ``overflow`` a chat that does not fit is
                `ContextOverflowError`.

        Raises:
            TypeError: an option is unknown or has the wrong type, or a message has.
            ValueError: an option or a message is wrong, or there is none.
            UnsupportedError: the model cannot generate.
            RuntimeError: called without a running event loop.
        """
        use = check_tool_use(
            to_toolbox(tools),
            tool_choice=tool_choice,
            max_rounds=max_rounds,
            parallel_tools=parallel_tools,
            on_tool_error=on_tool_error,
            guard=guard,
        )
        return respond_to(
            self._home(),
            messages,
            tools=use,
            template_kwargs=template_kwargs,
            on_message=on_message,
            keywords=options,
        )

    def act(
        self,
        messages: str | Iterable[MessageLike],
        tools: Iterable[ToolLike],
        *,
        tool_choice: str = "auto",
        max_rounds: int | None = None,
        parallel_tools: bool = True,
        on_tool_error: OnToolError = "report",
        guard: Guard | None = None,
        on_message: OnMessage | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[GenerationKeywords],
    ) -> Prediction:
        """Start a prediction that answers a chat with the help of tools.

        The model is asked, its calls are carried out, and it is asked again with their results,
        until it makes none: `PredictionResult.messages` has all of that. It is cancelled, and
        with it the handlers that run, when everybody who waited for it or iterated it is gone; see
        `Prediction`.

        Args:
            messages: The whole chat, messages or dicts, or the text of one user's message.
            tools: Functions, `Tool`, or bare definitions, whose calls end it; this and what follows
                are as with `ChatSession.prompt`.
            tool_choice: Whether the model may call tools, or must, or which one.
            max_rounds: How often the model is asked at most; the last time it has no tools.
            parallel_tools: Whether calls of one round are carried out at the same time.
            on_tool_error: What a handler's failure does.
            guard: Looks at each call before it is carried out.
            on_message: Called with each message of `PredictionResult.messages` at the end.
            template_kwargs: Variables for the template.
            **options: See `GenerationOptions`. Without ``overflow`` a chat that does not fit is
                `ContextOverflowError`.

        Raises:
            TypeError: an option is unknown or has the wrong type, or a message or tool has.
            ValueError: an option, a message or a tool is wrong, or there is none.
            UnsupportedError: the model cannot generate.
            RuntimeError: called without a running event loop.
        """
        box = to_toolbox(tools)
        if not box:
            raise ValueError("tools must not be empty; without any, model.respond answers")
        return self.respond(
            messages,
            tools=box,
            tool_choice=tool_choice,
            max_rounds=max_rounds,
            parallel_tools=parallel_tools,
            on_tool_error=on_tool_error,
            guard=guard,
            on_message=on_message,
            template_kwargs=template_kwargs,
            **options,
        )

    def chat(
        self,
        *,
        context: Context | None = None,
        system_prompt: str | None = None,
        history: Iterable[MessageLike] = (),
        tools: Iterable[ToolLike] | None = None,
        chat_template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        on_message: OnMessage | None = None,
        **options: Unpack[GenerationKeywords],
    ) -> ChatSession:
        """Begin a conversation; returns at once, and opens what it needs when it is used.

        Args:
            context: Where it runs, one of this model's; None is the default context.
            system_prompt: What the model is told first; None leaves that to the template.
            history: Messages to begin with, after `system_prompt`.
            tools: Tools that the model may call, unless a prompt has its own; see
                `ChatSession.prompt`.
            chat_template: Jinja text instead of the model's own template.
            template_kwargs: Variables for the template, such as ``{"enable_thinking": False}``.
            on_message: Called with each message that enters the history by a prompt.
            **options: See `GenerationOptions`: what prompts use unless they have their own.

        Raises:
            TypeError: an option is unknown or has the wrong type.
            ValueError: an option is out of range, or there are two system prompts.
            UnsupportedError: the model cannot generate.
            ClosedError: model or context was closed.
            RuntimeError: called without a running event loop.
        """
        return ChatSession(
            self if context is None else context,
            system_prompt=system_prompt,
            history=history,
            tools=tools,
            chat_template=chat_template,
            template_kwargs=template_kwargs,
            on_message=on_message,
            **options,
        )

    def _default_context(self) -> _core.Context:
        if self._context is None:
            reason = (
                "it was loaded with vocab_only=True"
                if self._info.vocab_only
                else "it has no decoder"
            )
            raise UnsupportedError(f"this model cannot generate: {reason}")
        return self._context

    def _home(self) -> Home:
        context = self._default_context()
        size: Any = context.info()["context_size"]
        return Home(context, self._native, self._chat_template, size, self)

    async def apply_chat_template(
        self,
        messages: Iterable[MessageLike],
        *,
        tools: Iterable[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """Return the prompt that the chat template makes of messages, as text.

        The text shows what contents say as it is. Tokenising it with special tokens parsed may
        therefore yield control tokens that a user has spelt; a session does not do that.
        Cancelling this keeps nothing.

        Args:
            messages: Messages or plain ``{"role", "content"}`` dicts.
            tools: Definitions with "name", "description" and "parameters" (JSON Schema).
            add_generation_prompt: End with the header of an answer.
            **kwargs: Further names for the template, such as ``enable_thinking``.

        Raises:
            TypeError: a message or tool has the wrong type.
            ValueError: a message is wrong.
            ChatTemplateError: the template fails, refuses the messages, or leaves one out.
            ClosedError: the model is closed.
        """
        check.check_bool("add_generation_prompt", add_generation_prompt)
        rendered = await render_chat(
            self._native,
            self._chat_template,
            to_messages(messages),
            tools=check_tool_definitions(tools or ()),
            add_generation_prompt=add_generation_prompt,
            kwargs=check_template_names(kwargs),
        )
        return rendered.text

    async def _open_context(self, options: ContextOptions) -> Context:
        hub = hub_for(running_loop("a model"))
        call = self._native.create_context(
            hub.native, options.native(self._info.train_context_size)
        )
        lease = self._work.begin()
        try:
            native = await finish(hub, call, discard=lambda late: late.close(hub.native))
        except BaseException:
            lease.release()
            raise
        return Context(native, self._native, self, self._chat_template, lease)

    async def aclose(self) -> None:
        """Close it with all its contexts; idempotent. Their predictions fail with `ClosedError`.

        Cancelling this does not stop the closing, only the waiting for it.
        """
        self._closing = True
        if not self._native.closed:
            hub = hub_for(running_loop("a model"))
            await finish(hub, self._native.close(hub.native), cancellable=False)

    async def __aenter__(self) -> Model:
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

    def __repr__(self) -> str:
        """Return name and state in words."""
        name = self._info.name or self._info.path
        return f"<Model {name!r} {'closed' if self.closed else 'loaded'}>"

    def __del__(self) -> None:
        """Warn of a forgotten model, on whatever thread; dropping the native one releases it."""
        if getattr(self, "_closing", True) or finalisers_rest() or self._native.closed:
            return
        warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)


def default_context_options(
    info: Mapping[str, Any], options: ContextOptions
) -> dict[str, object] | None:
    """Return the native options of the default context; None if the model cannot generate."""
    if info["vocab_only"] or not info["has_decoder"]:
        return None
    return options.native(info["train_context_size"])

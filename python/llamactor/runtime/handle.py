"""A handle: whichever loaded model satisfies a query now."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Unpack

from llamactor.chat.session import ChatSession
from llamactor.errors import ModelNotLoadedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from llamactor._home import Home
    from llamactor._opening import Opening
    from llamactor.chat.messages import MessageLike
    from llamactor.chat.tools import ToolKeywords, ToolLike
    from llamactor.chat.turn import OnMessage
    from llamactor.context import Context
    from llamactor.model import Model, ModelInfo, SpecialTokens
    from llamactor.options import ContextKeywords, GenerationKeywords
    from llamactor.prediction import Prediction
    from llamactor.runtime.core import RuntimeCore
    from llamactor.runtime.residents import LoadedModel, Query, Resident


class ModelHandle:
    """Whichever loaded model satisfies a query, each time something is asked of it.

    It has what a `Model` has. The model may be unloaded, loaded again, or swapped for another: the
    handle then means the one that satisfies the query now, and raises `ModelNotLoadedError` while
    there is none. A prediction stays with the model it began on. Options that the model was loaded
    with (a preset's, or its own) lie below those of a call.
    """

    moves: Literal[True] = True
    """A chat made with it follows it to another model."""

    def __init__(self, core: RuntimeCore, query: Query) -> None:
        """Refer to what satisfies `query`; made by `Runtime.get`, `load` and `model`."""
        self._core = core
        self._query = query

    # --- what it means ----------------------------------------------------------------------------

    @property
    def loaded(self) -> LoadedModel | None:
        """The model that it means now, as a snapshot; None while there is none."""
        resident = self._find()
        return None if resident is None else resident.described(self._core.now)

    @property
    def identifier(self) -> str | None:
        """The name in the runtime of the model it means now; None while there is none."""
        resident = self._find()
        return None if resident is None else resident.identifier

    @property
    def path(self) -> str | None:
        """The file of the model it means now; None while there is none."""
        resident = self._find()
        return None if resident is None else resident.wanted.path

    @property
    def epoch(self) -> int | None:
        """Which load it means now: another one after a reload or swap; None while there is none."""
        resident = self._find()
        return None if resident is None else resident.epoch

    @property
    def info(self) -> ModelInfo | None:
        """What the model it means now is; None while there is none."""
        resident = self._find()
        return None if resident is None else resident.model.info

    @property
    def metadata(self) -> Mapping[str, str]:
        """The metadata of the model's file."""
        return self._model().metadata

    @property
    def tokens(self) -> SpecialTokens:
        """Ids of the model's special tokens."""
        return self._model().tokens

    @property
    def closed(self) -> bool:
        """Whether its runtime was closed: it will never mean a model again."""
        return self._core.closed

    # --- what a model does ------------------------------------------------------------------------

    def complete(
        self, prompt: str | Sequence[int], **options: Unpack[GenerationKeywords]
    ) -> Prediction:
        """Start a prediction that continues `prompt`: `Model.complete`, cancelled like that.

        Args:
            prompt: Text, special tokens parsed unless ``special=False``, or token ids; not empty.
            **options: See `GenerationOptions`, laid over the model's own.

        Raises:
            TypeError: an option is unknown or has the wrong type.
            ValueError: the prompt is empty or an option out of range.
            UnsupportedError: the model cannot generate.
            ModelNotLoadedError: no loaded model satisfies the query.
        """
        resident = self._resident()
        return resident.model.complete(prompt, **_laid_over(resident, options))

    def respond(
        self,
        messages: str | Iterable[MessageLike],
        *,
        tools: Iterable[ToolLike] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[ToolKeywords],
    ) -> Prediction:
        """Start a prediction that answers a chat: `Model.respond`, cancelled like that.

        Args:
            messages: The whole chat, messages or dicts, or the text of one user's message.
            tools: Tools that the model may call.
            template_kwargs: Variables for the template.
            **options: How tools are used, as with `Model.respond`; and see `GenerationOptions`,
                laid over the model's own.

        Raises:
            TypeError: an option is unknown or has the wrong type, or a message has.
            ValueError: an option or a message is wrong, or there is none.
            UnsupportedError: the model cannot generate.
            ModelNotLoadedError: no loaded model satisfies the query.
        """
        resident = self._resident()
        return resident.model.respond(
            messages,
            tools=tools,
            template_kwargs=template_kwargs,
            **_laid_over(resident, options),
        )

    def act(
        self,
        messages: str | Iterable[MessageLike],
        tools: Iterable[ToolLike],
        *,
        template_kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[ToolKeywords],
    ) -> Prediction:
        """Start a prediction that answers with the help of tools: `Model.act`, cancelled like that.

        Args:
            messages: The whole chat, messages or dicts, or the text of one user's message.
            tools: Functions, `Tool`, or bare definitions, whose calls end it.
            template_kwargs: Variables for the template.
            **options: How tools are used, as with `Model.act`; and see `GenerationOptions`, laid
                over the model's own.

        Raises:
            TypeError: an option is unknown or has the wrong type, or a message or tool has.
            ValueError: an option, a message or a tool is wrong, or there is none.
            UnsupportedError: the model cannot generate.
            ModelNotLoadedError: no loaded model satisfies the query.
        """
        resident = self._resident()
        return resident.model.act(
            messages,
            tools,
            template_kwargs=template_kwargs,
            **_laid_over(resident, options),
        )

    def chat(
        self,
        *,
        system_prompt: str | None = None,
        history: Iterable[MessageLike] = (),
        tools: Iterable[ToolLike] | None = None,
        chat_template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        on_message: OnMessage | None = None,
        **options: Unpack[GenerationKeywords],
    ) -> ChatSession:
        """Begin a conversation that follows the handle: see `Model.chat`.

        It goes on with whichever model the handle means when something is asked of it; after a
        reload or swap the next prompt evaluates the history again.

        Args:
            system_prompt: What the model is told first; None leaves that to the template.
            history: Messages to begin with, after `system_prompt`.
            tools: Tools that the model may call, unless a prompt has its own.
            chat_template: Jinja text instead of the model's own template.
            template_kwargs: Variables for the template, such as ``{"enable_thinking": False}``.
            on_message: Called with each message that enters the history by a prompt.
            **options: See `GenerationOptions`, laid over the model's own.

        Raises:
            TypeError: an option is unknown or has the wrong type.
            ValueError: an option is out of range, or there are two system prompts.
            UnsupportedError: the model cannot generate.
            ModelNotLoadedError: no loaded model satisfies the query.
        """
        return ChatSession(
            self,
            system_prompt=system_prompt,
            history=history,
            tools=tools,
            chat_template=chat_template,
            template_kwargs=template_kwargs,
            on_message=on_message,
            **_laid_over(self._resident(), options),
        )

    def create_context(self, **options: Unpack[ContextKeywords]) -> Opening[Context]:
        """Open a context beside the default one: `Model.create_context`, cancelled like that.

        The model is at work while it is open. Its memory does not count against the limit.

        Args:
            **options: See `ContextOptions`.

        Raises:
            TypeError: an option is unknown or has the wrong type.
            ValueError: an option is out of range.
            ModelNotLoadedError: no loaded model satisfies the query.
        """
        return self._model().create_context(**options)

    def tokenize(self, text: str, *, add_bos: bool = False, special: bool = False) -> list[int]:
        """Return the tokens of `text`: see `Model.tokenize`.

        Args:
            text: At most 16 MiB of UTF-8.
            add_bos: Put the beginning-of-text token first, if the model uses one.
            special: Parse special tokens such as ``<|im_start|>``.

        Raises:
            TypeError: `text` is no string.
            ValueError: the text cannot be tokenised.
            ModelNotLoadedError: no loaded model satisfies the query.
        """
        return self._model().tokenize(text, add_bos=add_bos, special=special)

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Return the text of `tokens`: see `Model.detokenize`.

        Args:
            tokens: Ids of this model's vocabulary; at most 16 Mi of them.
            special: Also write out special tokens.

        Raises:
            TypeError: a token is no integer.
            ValueError: a token is outside the vocabulary, or there are too many.
            ModelNotLoadedError: no loaded model satisfies the query.
        """
        return self._model().detokenize(tokens, special=special)

    def count_tokens(self, text: str) -> int:
        """Return how many tokens `text` (at most 16 MiB) has, special tokens not parsed."""
        return self._model().count_tokens(text)

    async def apply_chat_template(
        self,
        messages: Iterable[MessageLike],
        *,
        tools: Iterable[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """Return the prompt that the chat template makes of messages: `Model.apply_chat_template`.

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
            ModelNotLoadedError: no loaded model satisfies the query.
        """
        model = self._model()
        lease = model._work.begin()  # noqa: SLF001 -- it must not be unloaded meanwhile
        try:
            return await model.apply_chat_template(
                messages, tools=tools, add_generation_prompt=add_generation_prompt, **kwargs
            )
        finally:
            lease.release()

    async def aclose(self) -> None:
        """Unload the model it means now, if any: its predictions fail with `ClosedError`.

        The handle can be used on when a model satisfies its query again. Cancelling this does not
        stop the unloading, only the waiting for it.
        """
        resident = self._find()
        if resident is not None:
            await self._core.unloaded(resident, drain=False)

    # --- how --------------------------------------------------------------------------------------

    def _find(self) -> Resident | None:
        return self._core.residents.find(self._query)

    def _resident(self) -> Resident:
        """The model that is used now."""
        self._core.bind_loop()
        resident = self._find()
        if resident is None:
            raise ModelNotLoadedError(
                f"no loaded model satisfies the handle{self._query}; "
                f"{self._core.residents.hint(self._query.text or '')}"
            )
        self._core.used(resident)
        return resident

    def _model(self) -> Model:
        return self._resident().model

    def _home(self) -> Home:
        """Where a chat with it runs now."""
        return self._resident().home

    def __repr__(self) -> str:
        """Return the query and what it means now."""
        return f"<ModelHandle{self._query}: {self.identifier or 'no model'}>"


def _laid_over(resident: Resident, options: Mapping[str, Any]) -> Any:
    """The options of a call, over those of the model unless it has all of its own."""
    given = {**options}
    if given.get("options") is None:
        given["options"] = resident.defaults
    return given

"""Where a chat runs: what it needs of the model, context or sequence that it was made with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from llamactor import _core


class Home(NamedTuple):
    """The native objects, and what keeps them open."""

    context: _core.Context
    """Where its predictions run."""
    model: _core.Model
    """Whose vocabulary it uses."""
    template: str | None
    """Jinja text of the chat template; None is the plain fallback."""
    context_size: int
    """Tokens that one sequence may hold."""
    owner: object
    """Must live as long as the chat."""


class Housing(Protocol):
    """A model, a context or a sequence."""

    def _home(self) -> Home:
        """Return where a chat with it runs."""


@runtime_checkable
class Moving(Housing, Protocol):
    """A handle: where a chat with it runs may change."""

    moves: Literal[True]
    """What tells it from a model."""

    @property
    def closed(self) -> bool:
        """Whether it will never mean anything again."""

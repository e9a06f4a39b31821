"""The models that are loaded, by identifier: who is meant, who is idle, and who goes first."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import msgspec

from llamactor.errors import ModelNotLoadedError
from llamactor.options import GenerationOptions
from llamactor.store.rules import absolute

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from llamactor._home import Home
    from llamactor.model import Model
    from llamactor.runtime.estimate import Wanted
    from llamactor.runtime.loads import Job
    from llamactor.runtime.memory import DeviceUsage

State: TypeAlias = Literal["idle", "busy", "leaving"]


class LoadedModel(msgspec.Struct, frozen=True):
    """A model that a runtime has loaded; a snapshot."""

    identifier: str
    """The name it has in the runtime."""
    ref: str
    """What it was asked for by."""
    path: str
    """Its file."""
    architecture: str
    """Its architecture, such as "llama"."""
    epoch: int
    """A number that no other load of this runtime has."""
    state: State
    """Whether something runs at it, or it only finishes what runs."""
    leases: int
    """How many predictions, contexts and blocks hold it."""
    predictions: int
    """How many predictions have ended."""
    predicted_tokens: int
    """Tokens that they generated."""
    idle_time: float
    """Seconds since it was last used; 0 while something runs."""
    ttl: float | None
    """Seconds of idleness after which it is unloaded; None is never."""
    keep: bool
    """Whether it is never unloaded to make room."""
    context_size: int
    """Cells of its default context, in tokens."""
    memory_bytes: int
    """What it takes on all devices."""


class Resident:
    """A loaded model and how it came to be so."""

    def __init__(
        self,
        identifier: str,
        ref: str,
        wanted: Wanted,
        model: Model,
        usages: dict[str, DeviceUsage],
        epoch: int,
    ) -> None:
        """Be a model that has just been loaded."""
        self.identifier = identifier
        self.ref = ref
        self.wanted = wanted
        self.parts = absolute(wanted.path).parts
        """Of its file's path, from the root."""
        self.model = model
        self.usages = usages
        self.epoch = epoch
        self.job: Job
        """The load that made it, of which whoever finds it takes a share."""
        self.defaults = GenerationOptions()
        """What its predictions use unless they have their own."""
        self.ttl: float | None = None
        self.keep = False
        self.leaving = False
        self.order = 0
        """Grows with each use: the least is the one that was used longest ago."""
        self._home: Home | None = None
        self.idle_since = 0.0
        """By the clock of the event loop."""

    @property
    def busy(self) -> bool:
        """Whether something runs at it."""
        return self.model._work.leases > 0  # noqa: SLF001 -- for this

    @property
    def state(self) -> State:
        """Whether something runs at it, or it is about to go."""
        if self.leaving:
            return "leaving"
        return "busy" if self.busy else "idle"

    @property
    def home(self) -> Home:
        """Where chats with it run: always the same object, so that a chat knows when it has moved.

        Raises:
            UnsupportedError: the model cannot generate.
        """
        if self._home is None:
            self._home = self.model._home()  # noqa: SLF001 -- for this
        return self._home

    def described(self, now: float) -> LoadedModel:
        """Return a snapshot."""
        work = self.model._work  # noqa: SLF001 -- for this
        size = self.wanted.context.context_size
        return LoadedModel(
            identifier=self.identifier,
            ref=self.ref,
            path=self.wanted.path,
            architecture=self.model.info.architecture,
            epoch=self.epoch,
            state=self.state,
            leases=work.leases,
            predictions=work.predictions,
            predicted_tokens=work.predicted_tokens,
            idle_time=0.0 if self.busy else max(0.0, now - self.idle_since),
            ttl=self.ttl,
            keep=self.keep,
            context_size=0 if size == "auto" else size,
            memory_bytes=sum(usage.total for usage in self.usages.values()),
        )


class Query(msgspec.Struct, frozen=True):
    """Which loaded model is meant: all that is given must hold; nothing given means any."""

    text: str | None = None
    """An identifier, or else a reference, a path or folder, or an architecture."""
    identifier: str | None = None
    """Its name in the runtime."""
    path: str | None = None
    """Its file, or a folder above it."""
    architecture: str | None = None
    """Its architecture."""

    def matches(self, resident: Resident) -> bool:
        """Whether a model is meant."""
        return (
            (self.text is None or self._matches_text(resident))
            and self.identifier in {None, resident.identifier}
            and (self.path is None or _is_at(resident.parts, self.path))
            and self.architecture in {None, resident.model.info.architecture}
        )

    def _matches_text(self, resident: Resident) -> bool:
        assert self.text is not None
        if self.text in {resident.identifier, resident.ref, resident.model.info.architecture}:
            return True
        # A bare word is a name, even where a folder is called so.
        bare = Path(self.text).name == self.text and not self.text.endswith(".gguf")
        return not bare and _is_at(resident.parts, self.text)

    def __str__(self) -> str:
        """Return it for a message."""
        parts = [
            f"{name}={value!r}"
            for name in self.__struct_fields__[1:]
            if (value := getattr(self, name))
        ]
        if self.text is not None:
            parts.insert(0, repr(self.text))
        return " with " + ", ".join(parts) if parts else ""


def _is_at(parts: tuple[str, ...], place: str) -> bool:
    """Whether a file is the one at `place`, or below that folder; ``owner/repo`` is one, too."""
    whole, wanted = absolute(place).parts, Path(place).parts
    if parts[: len(whole)] == whole:
        return True
    if len(wanted) < 2 and not place.endswith(".gguf"):
        return False
    starts = range(len(parts) - len(wanted) + 1)
    return any(parts[start : start + len(wanted)] == wanted for start in starts)


class Residents:
    """Those that can be found, and those that finish what they have begun."""

    def __init__(self) -> None:
        """Begin with none."""
        self._bound: dict[str, Resident] = {}
        self._leaving: set[Resident] = set()
        self._uses = 0
        self._epochs = 0

    def __iter__(self) -> Iterator[Resident]:
        """Iterate over those that can be found, in the order they were loaded."""
        return iter(list(self._bound.values()))

    @property
    def all(self) -> list[Resident]:
        """All that take memory."""
        return [*self._bound.values(), *self._leaving]

    def next_epoch(self) -> int:
        """Return a number for a load."""
        self._epochs += 1
        return self._epochs

    def bind(self, resident: Resident) -> Resident | None:
        """Let its identifier mean this model; return the one it meant until now, which leaves."""
        before = self._bound.pop(resident.identifier, None)
        if before is not None:
            self._leave(before)
        self._bound[resident.identifier] = resident
        self.used(resident)
        return before

    def unbind(self, resident: Resident) -> None:
        """Let nobody find it any more."""
        if self._bound.get(resident.identifier) is resident:
            del self._bound[resident.identifier]
        self._leave(resident)

    def _leave(self, resident: Resident) -> None:
        resident.leaving = True
        self._leaving.add(resident)

    def gone(self, resident: Resident) -> None:
        """Its memory is free again."""
        self._leaving.discard(resident)

    def used(self, resident: Resident) -> None:
        """Note that it was used now."""
        self._uses += 1
        resident.order = self._uses

    def find(self, query: Query) -> Resident | None:
        """Return the model that is meant: by identifier first, then the one used last."""
        if query.text is not None and (exact := self._bound.get(query.text)):
            return exact
        found = [resident for resident in self if query.matches(resident)]
        return max(found, key=lambda resident: resident.order, default=None)

    def named(self, identifier: str) -> Resident:
        """Return the model with this identifier.

        Raises:
            ModelNotLoadedError: there is none.
        """
        resident = self._bound.get(identifier)
        if resident is None:
            raise ModelNotLoadedError(
                f"no model is loaded as {identifier!r}; {self.hint(identifier)}"
            )
        return resident

    def hint(self, identifier: str) -> str:
        """Return what may have been meant, or what there is."""
        near = difflib.get_close_matches(identifier, self._bound, n=3)
        if near:
            return f"did you mean {' or '.join(map(repr, near))}?"
        return f"loaded are: {', '.join(sorted(self._bound)) or 'none'}"

    def evictable(self) -> list[Resident]:
        """Return the idle models that may be unloaded to make room, used longest ago first."""
        idle = [one for one in self if not one.busy and not one.keep]
        return sorted(idle, key=lambda resident: resident.order)


def free_name(name: str, taken: Iterable[str]) -> str:
    """Return `name`, or ``name:2`` and so on if it is taken."""
    used = set(taken)
    if name not in used:
        return name
    number = 2
    while f"{name}:{number}" in used:
        number += 1
    return f"{name}:{number}"

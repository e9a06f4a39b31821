"""What runs at a model: counted, so that whoever owns the model knows when it is idle.

Every unfinished prediction of a model's default context and every other context that is open holds
one `Lease`. A `Runtime` listens; without one there is nothing but two numbers to keep.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Work:
    """The leases of one model; from any thread."""

    def __init__(self) -> None:
        """Begin idle."""
        self.listener: Callable[[], object] | None = None
        """Called after every change, on whatever thread made it."""
        self.predictions = 0
        """How many have ended."""
        self.predicted_tokens = 0
        """Tokens that they generated."""
        self._lock = threading.Lock()
        self._leases = 0

    @property
    def leases(self) -> int:
        """How many are held."""
        return self._leases

    def begin(self) -> Lease:
        """Count something that begins, and return what ends it."""
        self._add(1)
        return Lease(self)

    def count(self, predicted_tokens: int) -> None:
        """Note a prediction that has ended."""
        with self._lock:
            self.predictions += 1
            self.predicted_tokens += predicted_tokens

    def _add(self, change: int) -> None:
        with self._lock:
            self._leases += change
        if self.listener is not None:
            self.listener()


class Lease:
    """One thing at work; ends once."""

    __slots__ = ("_work",)

    def __init__(self, work: Work) -> None:
        """Be one of `work`; made by `Work.begin`."""
        self._work: Work | None = work

    def release(self) -> None:
        """End it; idempotent."""
        work, self._work = self._work, None
        if work is not None:
            work._add(-1)  # noqa: SLF001 -- the other half

    def settle(self, predicted_tokens: int) -> None:
        """End it as a prediction that generated so many tokens; idempotent."""
        if self._work is not None:
            self._work.count(predicted_tokens)
        self.release()


def work_of(owner: object) -> Work | None:
    """Return what counts the predictions of `owner`, if anything does."""
    work: Work | None = getattr(owner, "_work", None)
    return work

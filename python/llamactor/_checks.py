"""Checks of arguments: each returns the clean value or raises.

The message says name, value, limit and what would work.
"""

from __future__ import annotations

import difflib
import math
import numbers
import operator
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

MAX_TEXT_BYTES = 16 * 1024 * 1024
"""The most text that is tokenised at once; llama.cpp's tokenisers count in 32 bits."""

MAX_FLOAT = 3.4028234e38
"""The greatest number llama.cpp can hold, which computes in 32 bits."""
MIN_FLOAT = 1.1754943508222875e-38
"""The smallest normal float32."""


def check_known(names: Iterable[str], known: Collection[str], what: str) -> None:
    """Raise `TypeError` for the first of `names` that is not in `known`, naming near matches."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
            hint = (
                f"did you mean {' or '.join(map(repr, near))}?"
                if near
                else f"known: {', '.join(sorted(known))}"
            )
            raise TypeError(f"unknown {what} {name!r}; {hint}")


def check_bool(name: str, value: object) -> bool:
    """Return `value` if it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {describe(value)}")
    return value


def check_int(name: str, value: Any, low: int, high: int | None = None, *, hint: str = "") -> int:
    """Return `value` as an int in `low..high`, both included; a bool is not an int."""
    if isinstance(value, bool) or not hasattr(type(value), "__index__"):
        raise TypeError(f"{name} must be an integer, not {describe(value)}{_tail(hint)}")
    number = operator.index(value)
    if number < low or (high is not None and number > high):
        raise ValueError(f"{name} must be {_between(low, high)}, not {number}{_tail(hint)}")
    return number


def check_float(
    name: str,
    value: object,
    low: float,
    high: float | None = None,
    *,
    above: bool = False,
    hint: str = "",
) -> float:
    """Return `value` as a finite float in `low..high`; `above` leaves `low` itself out."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, not {describe(value)}{_tail(hint)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not abs(number) <= MAX_FLOAT:  # not for NaN either
        raise ValueError(f"{name} must be a finite number, not {number}{_tail(hint)}")
    # What is nearer to 0 than a normal float32 counts as 0.
    too_low = number <= low or number < MIN_FLOAT if above else number < low
    if too_low or (high is not None and number > high):
        least = f" ({MIN_FLOAT:.3g} is the least)" if low < number < MIN_FLOAT else ""
        raise ValueError(
            f"{name} must be {_between(low, high, above=above)}{least}, not {value}{_tail(hint)}"
        )
    return number


def check_text(name: str, value: object, *, empty: bool = True) -> str:
    """Return `value` if it is a str that UTF-8 can say, of at most 16 MiB."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, not {describe(value)}")
    if not value and not empty:
        raise ValueError(f"{name} must not be empty")
    size = len(value) if value.isascii() else _utf8_size(name, value)
    if size > MAX_TEXT_BYTES:
        raise ValueError(
            f"{name} has {size} bytes of UTF-8, the limit is {MAX_TEXT_BYTES} (16 MiB); "
            "pass it in parts"
        )
    return value


def check_choice(name: str, value: object, choices: Collection[str], *, hint: str = "") -> str:
    """Return `value` if it is one of `choices`."""
    if not isinstance(value, str):
        raise TypeError(
            f"{name} must be one of {_listed(choices)}, not {describe(value)}{_tail(hint)}"
        )
    if value not in choices:
        raise ValueError(f"{name} must be one of {_listed(choices)}, not {value!r}{_tail(hint)}")
    return value


def check_callable(name: str, value: object) -> Callable[..., Any]:
    """Return `value` if it can be called."""
    if not callable(value):
        raise TypeError(f"{name} must be callable, not {describe(value)}")
    return value


def check_items(name: str, value: object) -> list[Any]:
    """Return the items of a list, tuple or other iterable that is not text."""
    if isinstance(value, (str, bytes, bytearray)) or not hasattr(type(value), "__iter__"):
        raise TypeError(f"{name} must be a list, not {describe(value)}")
    return list(value)  # type: ignore[call-overload,no-any-return]


def check_tokens(name: str, value: object, vocab_size: int, *, empty: bool = False) -> list[int]:
    """Return `value` as a list of token ids below `vocab_size`."""
    tokens = check_items(name, value)
    if not tokens and not empty:
        raise ValueError(f"{name} must not be empty")
    if set(map(type, tokens)) <= {int} and (
        not tokens or (min(tokens) >= 0 and max(tokens) < vocab_size)
    ):
        return tokens
    return [check_token(f"{name}[{i}]", token, vocab_size) for i, token in enumerate(tokens)]


def check_token(name: str, value: object, vocab_size: int) -> int:
    """Return `value` if it is a token id of a vocabulary of `vocab_size` tokens."""
    return check_int(name, value, 0, vocab_size - 1, hint=f"the vocabulary has {vocab_size} tokens")


def check_path(name: str, value: object) -> str:
    """Return a path as str; NUL bytes and the empty path are refused."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} must be a path (str or os.PathLike), not {describe(value)}")
    path = os.fsdecode(value)
    if not path:
        raise ValueError(f"{name} must not be empty")
    if "\0" in path:
        raise ValueError(f"{name} must not contain NUL bytes: {path!r}")
    return path


def check_timeout(name: str, value: object) -> float | None:
    """Return a time limit in seconds; None is no limit."""
    return None if value is None else check_float(name, value, 0.0, hint="None means no limit")


def describe(value: object) -> str:
    """Return what to call a value in a message: itself where that is plain and short."""
    plain = value is None or isinstance(value, (bool, int, float, str, bytes))
    shown = repr(value) if plain else ""
    return (
        f"{shown} ({type(value).__name__})" if 0 < len(shown) <= 60 else f"a {type(value).__name__}"
    )


def _utf8_size(name: str, value: str) -> int:
    try:
        return len(value.encode())
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has a lone surrogate ({value[error.start]!r} at index {error.start}), which "
            "UTF-8 cannot say; decode the bytes with errors='replace' first"
        ) from None


def _between(low: float, high: float | None, *, above: bool = False) -> str:
    if high is None:
        return f"above {low:g}" if above else f"at least {low}"
    return f"above {low:g} and at most {high:g}" if above else f"between {low} and {high}"


def _listed(choices: Collection[str]) -> str:
    return ", ".join(map(repr, choices))


def _tail(hint: str) -> str:
    return f"; {hint}" if hint else ""

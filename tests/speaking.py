"""Models that each say their own letters, so that an answer tells which of them has given it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.models import byte_tokens, tiny_scripted

if TYPE_CHECKING:
    from pathlib import Path

SAYS = {"alpha": "abcdefgh", "beta": "ABCDEFGH", "gamma": "12345678"}
"""What each of them says after any prompt, over and over."""

SMALL: dict[str, Any] = {"context_size": 512, "sequences": 8, "threads": 1}
"""Load options for them."""


def speaking_models(folder: Path) -> dict[str, Path]:
    """Write them and return their files by name."""
    return {
        name: tiny_scripted(folder / f"{name}.gguf", byte_tokens(text))
        for name, text in SAYS.items()
    }

"""The command line: ``llamactor chat`` and ``llamactor complete``, also ``python -m llamactor``."""

from __future__ import annotations

from llamactor.cli.program import main

__all__ = ("main",)

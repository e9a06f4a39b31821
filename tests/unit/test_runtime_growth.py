"""What a runtime says that a model takes, beside what the process really grows by."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.conftest import PATIENCE
from tests.models import tiny_llama

if TYPE_CHECKING:
    from pathlib import Path

SHAPES = {
    "wide": {"width": 512, "layers": 8, "heads": 8, "kv_heads": 4, "vocab": 4096},
    "deep": {"width": 256, "layers": 32, "heads": 4, "kv_heads": 4},
    "many words": {"width": 256, "layers": 4, "heads": 4, "kv_heads": 2, "vocab": 32_000},
}


def grown(ref: str | Path, context_size: int) -> tuple[int, int]:
    """Bytes that were planned, and bytes that a process of its own has grown by."""
    command = [sys.executable, "-m", "tests.growth", str(ref), str(context_size)]
    # Else the C library raises the threshold by itself, and then keeps what was freed for later.
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": str(128 * 1024)}
    done = subprocess.run(
        command, capture_output=True, check=True, env=environment, text=True, timeout=PATIENCE
    )
    planned, real = map(int, done.stdout.split())
    return planned, real


@pytest.mark.parametrize("context_size", [512, 2048, 8192])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_process_grows_by_what_was_planned(models: Path, shape: str, context_size: int) -> None:
    path = models / f"{shape}.gguf"
    if not path.exists():
        tiny_llama(path, **SHAPES[shape])  # type: ignore[arg-type]
    planned, real = grown(path, context_size)
    assert abs(real - planned) <= 0.1 * planned, (planned, real)

"""What a runtime says that SmolLM2 takes, beside what the process really grows by."""

from __future__ import annotations

import pytest

from tests.unit.test_runtime_growth import grown

pytestmark = pytest.mark.model


@pytest.mark.parametrize("context_size", [512, 2048, 8192])
def test_the_process_grows_by_what_was_planned(context_size: int) -> None:
    planned, real = grown("smollm2", context_size)
    assert abs(real - planned) <= 0.1 * planned, (planned, real)

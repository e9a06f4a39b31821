"""What the tests of the runtime share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.speaking import speaking_models

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def spoken(models: Path) -> dict[str, Path]:
    """Files of models, each of which says its own letters after any prompt."""
    return speaking_models(models)

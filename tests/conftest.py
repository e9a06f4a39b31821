"""What all tests share: loops to run on, models to load, gates to hold a generation at."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import uvloop
from hypothesis import settings

import llamactor
from tests.models import tiny_llama

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping

TIME_SCALE = float(os.environ.get("LLAMACTOR_TEST_TIME_SCALE", "1"))
"""Multiplies every limit of the tests; raise it on a slow machine."""

TINYCHAT = Path(__file__).parent / "tinychat" / "tinychat-3m-Q8_0.gguf"
"""A chat model of 3 MB that remembers names and calls tools; see tests/tinychat/."""

PATIENCE = 60.0 * TIME_SCALE
"""Seconds after which a test that waits for something has failed."""


os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported, which reads it then
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "every_loop: runs on asyncio and on uvloop")


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    if item.get_closest_marker("every_loop") is None:
        return {"asyncio": asyncio.new_event_loop}
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


class Gate:
    """A logits processor that lets one token through per permit.

    It runs on the sequence's own thread, so a closed gate stalls that sequence and nothing else.
    """

    def __init__(self) -> None:
        self._permits = threading.Semaphore(0)
        self._arrivals = threading.Semaphore(0)
        self._open = False
        self.arrived = 0

    def __call__(self, tokens: list[int], logits: memoryview[float]) -> None:
        self.arrived += 1
        self._arrivals.release()
        if not self._open and not self._permits.acquire(timeout=PATIENCE):
            raise TimeoutError("nobody opened the gate")

    def allow(self, count: int = 1) -> None:
        """Let `count` more tokens through."""
        self._permits.release(count)

    def open(self) -> None:
        """Let everything through from now on."""
        self._open = True
        self._permits.release(1000)

    async def reached(self) -> None:
        """Wait until a generation stands before the gate once more."""
        arrived = await asyncio.to_thread(self._arrivals.acquire, timeout=PATIENCE)
        assert arrived, "no generation reached the gate"


@pytest.fixture
def gate() -> Iterator[Gate]:
    """A closed gate; opened at the end, so that no thread stays behind it."""
    gate = Gate()
    yield gate
    gate.open()


def meanwhile(
    monkeypatch: pytest.MonkeyPatch,
    place: object,
    name: str,
    act: Callable[[], object],
    *,
    after: bool = False,
) -> None:
    """Do something just before, or after, the next call of a function, as another process may."""
    function = getattr(place, name)

    def called(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(place, name, function)
        if not after:
            act()
        result = function(*arguments, **options)
        if after:
            act()
        return result

    monkeypatch.setattr(place, name, called)


@pytest.fixture(scope="session", autouse=True)
def _own_store(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The default model store of the tests and of the programs that they start."""
    os.environ["LLAMACTOR_MODELS_DIR"] = str(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of generated models."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def tiny_model_path(models: Path) -> Path:
    """A file with a Llama of 64 by 4 and random weights; it never ends by itself."""
    return tiny_llama(models / "tiny.gguf")


@pytest.fixture
async def tiny_model(tiny_model_path: Path) -> AsyncIterator[llamactor.Model]:
    """The tiny model with 8 sequences in 2,048 cells, on one thread."""
    async with llamactor.load_model(tiny_model_path, context_size=2048, threads=1) as model:
        yield model


@pytest.fixture
async def smollm2() -> AsyncIterator[llamactor.Model]:
    """SmolLM2-135M-Instruct, the default model."""
    async with llamactor.load_model("smollm2", context_size=2048, threads=1) as model:
        yield model


@pytest.fixture
async def tinychat() -> AsyncIterator[llamactor.Model]:
    """The tinychat model with 4 sequences in 4,096 cells, on one thread."""
    async with llamactor.load_model(TINYCHAT, context_size=1024, sequences=4, threads=1) as model:
        yield model

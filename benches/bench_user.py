"""What a user feels, on a model that itself costs next to nothing: `pytest benches`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

import llamactor
from tests.models import tiny_llama

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_benchmark.fixture import BenchmarkFixture

TEXT = "Once upon a time there lived a king whose kingdom was very small. " * 150
"""About 10 kB."""

OPTIONS = llamactor.GenerationOptions(ignore_eos=True)
AWAITS = 1000


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def model(
    runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[llamactor.Model]:
    path = tiny_llama(tmp_path_factory.mktemp("model") / "tiny.gguf", quantised=True)

    async def load() -> llamactor.Model:
        return await llamactor.load_model(path, threads=1)

    model = runner.run(load())
    yield model
    runner.run(model.aclose())


def test_first_piece(
    benchmark: BenchmarkFixture, runner: asyncio.Runner, model: llamactor.Model
) -> None:
    async def first_piece() -> None:
        async with model.complete("Once upon a time", options=OPTIONS) as prediction:
            await anext(aiter(prediction))

    benchmark(lambda: runner.run(first_piece()))


def test_reply_of_64_tokens_read_by_piece(
    benchmark: BenchmarkFixture, runner: asyncio.Runner, model: llamactor.Model
) -> None:
    async def reply() -> None:
        async for _ in model.complete("Once upon a time", max_tokens=64, options=OPTIONS):
            pass

    benchmark(lambda: runner.run(reply()))


def test_1000_awaits_of_a_finished_prediction(
    benchmark: BenchmarkFixture, runner: asyncio.Runner, model: llamactor.Model
) -> None:
    async def finished() -> llamactor.Prediction:
        prediction = model.complete("Once upon a time", max_tokens=8, options=OPTIONS)
        await prediction
        return prediction

    async def awaits() -> None:
        for _ in range(AWAITS):
            await prediction

    prediction = runner.run(finished())
    benchmark(lambda: runner.run(awaits()))


def test_tokenize_10_kb(benchmark: BenchmarkFixture, model: llamactor.Model) -> None:
    benchmark(model.tokenize, TEXT)


def test_detokenize_10_kb(benchmark: BenchmarkFixture, model: llamactor.Model) -> None:
    benchmark(model.detokenize, model.tokenize(TEXT))

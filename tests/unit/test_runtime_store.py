"""A runtime and its store: names, downloads, default options, presets and counts."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

import pytest

from llamactor import (
    LoadCancelledError,
    ModelNotFoundError,
    ModelNotLoadedError,
    PresetNotFoundError,
    Presets,
    Runtime,
)
from tests.conftest import PATIENCE
from tests.contexts import until
from tests.speaking import SAYS, SMALL

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.hub import Hub

pytestmark = pytest.mark.usefixtures("no_models")


@pytest.fixture
async def runtime(tmp_path: Path) -> AsyncIterator[Runtime]:
    presets = Presets(tmp_path / "presets.toml")
    async with Runtime(tmp_path / "store", memory_limit=None, presets=presets) as runtime:
        yield runtime


async def test_a_model_of_the_store_is_loaded_by_its_name(
    runtime: Runtime, spoken: dict[str, Path]
) -> None:
    await runtime.store.import_(spoken["alpha"], name="speaker")
    handles = [await runtime.load("speaker", **SMALL) for _ in range(2)]
    assert [handle.identifier for handle in handles] == ["speaker", "speaker:2"]
    assert (await runtime.model("speaker")).epoch == handles[0].epoch
    assert (await runtime.estimate("speaker", **SMALL)).path == handles[0].path
    with pytest.raises(ModelNotFoundError, match="speaker"):
        await runtime.load("speeker")


async def test_uses_and_tokens_are_counted_in_the_store(
    runtime: Runtime, spoken: dict[str, Path]
) -> None:
    await runtime.store.import_(spoken["alpha"], name="speaker")
    async with runtime.load("speaker", **SMALL) as model:
        await model.complete("x", max_tokens=7)
    assert (await runtime.store.get("speaker")).usage_count == 1
    assert (await runtime.store.get("speaker")).tokens_generated == 7


async def test_of_two_who_unload_an_idle_model_at_once_one_does(
    runtime: Runtime, spoken: dict[str, Path]
) -> None:
    await runtime.store.import_(spoken["alpha"], name="speaker")
    model = await runtime.load("speaker", **SMALL)
    await model.complete("x", max_tokens=7)
    await asyncio.sleep(0)
    outcomes = await asyncio.gather(
        *(runtime.unload("speaker", "refuse") for _ in range(2)), return_exceptions=True
    )
    assert [type(outcome) for outcome in outcomes] == [type(None), ModelNotLoadedError]
    assert (await runtime.store.get("speaker")).tokens_generated == 7


async def test_options_of_a_call_come_before_a_preset_s_and_those_before_the_model_s(
    runtime: Runtime, spoken: dict[str, Path], tmp_path: Path
) -> None:
    await runtime.store.import_(spoken["alpha"], name="speaker")
    own: dict[str, dict[str, Any]] = {
        "load": {"context_size": 768, "sequences": 2, "threads": 1},
        "generation": {"max_tokens": 3, "stop": ["g"]},
    }
    await runtime.store.update("speaker", default_options=own)
    presets = Presets(tmp_path / "presets.toml")
    await presets.set("short", load={"context_size": 512}, generation={"max_tokens": 5})
    async with runtime.load("speaker") as model:
        assert model.loaded is not None
        assert model.loaded.context_size == 768
        assert (await model.complete("x")).content == "abc"
    async with runtime.load("speaker", preset="short") as model:
        assert model.loaded is not None
        assert model.loaded.context_size == 512
        assert (await model.complete("x")).content == "abcde"
        assert (await model.complete("x", max_tokens=8)).content == "abcdef"  # stops before g
        assert (await model.complete("x", max_tokens=8, stop=None)).content == SAYS["alpha"]
        async with model.chat() as session:
            assert (await session.prompt("hi")).content == "abcde"
    async with runtime.load("speaker", preset="short", context_size=256) as model:
        assert model.loaded is not None
        assert model.loaded.context_size == 256


async def test_an_unknown_preset_is_told_with_what_is_near(
    runtime: Runtime, spoken: dict[str, Path], tmp_path: Path
) -> None:
    await Presets(tmp_path / "presets.toml").set("creative", generation={"temperature": 1.0})
    with pytest.raises(PresetNotFoundError, match="creative"):
        await runtime.load(spoken["alpha"], preset="creativ")
    assert runtime.snapshot.memory_bytes == 0


async def test_the_runtime_s_threads_lie_below_all_other_options(
    tmp_path: Path, spoken: dict[str, Path]
) -> None:
    async with Runtime(tmp_path / "store", memory_limit=None, threads=1) as runtime:
        await runtime.load(spoken["alpha"], context_size=512)
        await runtime.load(spoken["alpha"], context_size=512, threads=2)
        residents = tuple(runtime._core.residents)
        assert [resident.wanted.context.threads for resident in residents] == [1, 2]
        contexts = [resident.model._context for resident in residents]
        most = min(2, len(os.sched_getaffinity(0)))
        assert [context.info()["threads"] for context in contexts if context] == [1, most]


async def test_progress_covers_download_and_load(
    runtime: Runtime, hub: Hub, spoken: dict[str, Path]
) -> None:
    hub.add("owner/Speaker", "speaker-Q8_0.gguf", spoken["alpha"].read_bytes())
    loading = runtime.model("hf:owner/Speaker", **SMALL)
    seen = [progress async for progress in loading]
    fractions = [progress.fraction for progress in seen]
    assert fractions == sorted(fractions)
    assert (fractions[-1], fractions.count(1.0)) == (1.0, 1)
    assert {"downloading", "ready"} <= {progress.stage for progress in seen}
    model = await loading
    assert (await model.complete("x", max_tokens=8)).content == SAYS["alpha"]
    assert (await runtime.model("hf:owner/Speaker")).epoch == model.epoch


async def test_a_load_cancelled_while_downloading_leaves_no_model(
    runtime: Runtime, hub: Hub, spoken: dict[str, Path]
) -> None:
    content = spoken["alpha"].read_bytes()
    file = hub.add("owner/Speaker", "speaker-Q8_0.gguf", content)
    file.stalls = [len(content) // 2]
    loading = runtime.load("hf:owner/Speaker", **SMALL)
    assert await asyncio.to_thread(hub.stalled.wait, PATIENCE)
    loading.cancel()
    with pytest.raises(LoadCancelledError):
        await loading
    await until(lambda: not runtime.snapshot.loading)  # although the hub sends nothing
    hub.release.set()
    assert runtime.snapshot.models == ()
    assert list(runtime.store.path.rglob("*.gguf")) == []

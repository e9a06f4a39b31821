"""Memory: what is measured beforehand, who waits, who goes, and that the limit holds."""

from __future__ import annotations

import asyncio
import itertools
import random
import re
from typing import TYPE_CHECKING, Any

import psutil
import pytest

import llamactor
from llamactor import Device, InsufficientMemoryError, Runtime, UnsupportedError
from llamactor.runtime.core import insufficient
from llamactor.runtime.estimate import Wanted, estimate, read_usages, suggest
from llamactor.runtime.memory import (
    Budget,
    DeviceUsage,
    MemoryPlan,
    Usages,
    check_limit,
    in_words,
    read_budget,
    room_on_devices,
)
from tests import models as generated
from tests.contexts import soon, until
from tests.speaking import SAYS, SMALL
from tests.unit.test_loading import is_mapped

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import Gate


async def bytes_of(*paths: Path) -> int:
    """What these models take together."""
    async with Runtime(memory_limit=None) as runtime:
        plans = [await runtime.estimate(path, **SMALL) for path in paths]
    return sum(plan.total_bytes for plan in plans)


# --- estimates ------------------------------------------------------------------------------------


KINDS: dict[str, Callable[[Path], Path]] = {
    "llama": generated.tiny_llama,
    "quantised": lambda path: generated.tiny_llama(path, quantised=True),
    "sliding": generated.tiny_sliding_window,
    "recurrent": generated.tiny_recurrent,
    "hybrid": generated.tiny_hybrid,
    "rollback": generated.tiny_hybrid_rollback,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "quantised cache": {"kv_type_k": "q8_0", "kv_type_v": "q8_0"},
    "streams": {"kv_unified": False, "sequences": 3},
    "small batches": {"ubatch_size": 64, "flash_attention": "off", "swa_full": False},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
async def test_what_is_measured_on_an_outline_is_what_the_buffers_take(
    tmp_path: Path, kind: str, layout: str
) -> None:
    path = KINDS[kind](tmp_path / "model.gguf")
    options = {"context_size": 1000, "threads": 1, "use_mmap": False, **LAYOUTS[layout]}
    async with Runtime(memory_limit=None) as runtime:
        plan = await runtime.estimate(path, **options)
        model = await llamactor.load_model(path, **options)
        async with model:
            assert model._context is not None
            usages: Any = model._context.info()["usages"]
            real = read_usages(usages)
        loaded = await runtime.load(path, **options)
        assert loaded.loaded is not None
        assert loaded.loaded.memory_bytes == plan.total_bytes
    planned = plan.per_device["CPU"]
    assert real["CPU"] == DeviceUsage(planned.weights, planned.cache, planned.compute)
    assert plan.total_bytes == planned.total


async def test_estimating_loads_nothing(tmp_path: Path) -> None:
    path = generated.tiny_llama(tmp_path / "model.gguf")
    async with Runtime() as runtime:
        plan = await runtime.estimate(path, context_size=2048)
        assert not is_mapped(path)
        assert runtime.snapshot.models == ()
        assert (plan.fits, plan.evicts, plan.waits_for, plan.suggestion) == (True, (), (), None)
        assert (plan.path, plan.context_size, plan.gpu_layers) == (str(path), 2048, 0)
        parts = (plan.weights_bytes, plan.cache_bytes, plan.compute_bytes)
        assert all(parts)
        assert sum(parts) < plan.total_bytes < (plan.free_bytes or 0)


async def test_a_split_model_and_its_adapters_are_counted_whole(tmp_path: Path) -> None:
    whole = generated.tiny_llama(tmp_path / "whole.gguf")
    parts = generated.tiny_split(tmp_path)
    async with Runtime() as runtime:
        plans = [await runtime.estimate(path, **SMALL) for path in (whole, parts[0])]
        assert plans[0].weights_bytes == plans[1].weights_bytes
        only_words = await runtime.estimate(whole, vocab_only=True)
        assert 0 < only_words.total_bytes < plans[0].total_bytes


async def test_a_model_that_cannot_generate_is_counted_without_a_context(tmp_path: Path) -> None:
    path = generated.tiny_encoder(tmp_path / "encoder.gguf")
    async with Runtime(memory_limit=None) as runtime:
        plan = await runtime.estimate(path)
        assert plan.weights_bytes > 0
        assert plan.cache_bytes == plan.compute_bytes == 0
        model = await runtime.load(path)
        with pytest.raises(UnsupportedError, match="no decoder"):
            _ = model.complete("x")
        with pytest.raises(UnsupportedError, match="no decoder"):
            model.chat()


async def test_an_enormous_context_is_computed_without_laying_it_out(tmp_path: Path) -> None:
    path = generated.tiny_llama(tmp_path / "model.gguf")
    async with Runtime(memory_limit=None) as runtime:
        small = await runtime.estimate(path, context_size=1 << 20)
        large = await runtime.estimate(path, context_size=1 << 30)
        assert large.cache_bytes == small.cache_bytes << 10


async def test_an_automatic_context_is_the_largest_that_fits(tmp_path: Path) -> None:
    path = generated.tiny_llama(tmp_path / "model.gguf", layers=8)
    async with Runtime(memory_limit=None) as runtime:
        usual = await runtime.estimate(path)
        tight = (await runtime.estimate(path, context_size=3000)).total_bytes
    assert usual.context_size == 8192
    async with Runtime(memory_limit=tight) as runtime:
        plan = await runtime.estimate(path)
        assert plan.fits
        assert plan.context_size == 2816  # the next multiple of 256 would not fit
        model = await runtime.load(path)
        assert model.loaded is not None
        assert model.loaded.context_size == 2816
        assert runtime.snapshot.memory_bytes <= tight
        with pytest.raises(InsufficientMemoryError):
            await runtime.load(path, context_size=8192)


async def test_what_can_never_fit_is_refused_with_what_would(tmp_path: Path) -> None:
    path = generated.tiny_llama(tmp_path / "model.gguf")
    async with Runtime(memory_limit=None) as runtime:
        limit = (await runtime.estimate(path, context_size=1024)).total_bytes
    async with Runtime(memory_limit=limit) as runtime:
        with pytest.raises(InsufficientMemoryError, match="context_size=1024 would fit") as caught:
            await runtime.load(path, context_size=5000)
        plan = caught.value.plan
        assert plan is not None
        assert plan.suggestion == {"context_size": 1024}
        assert not plan.fits
        smaller = await runtime.load(path, **plan.suggestion)
        assert smaller.info is not None
        assert isinstance(caught.value, MemoryError)
    async with Runtime(memory_limit=10_000) as runtime:
        with pytest.raises(InsufficientMemoryError, match="a smaller model or quantisation may"):
            await runtime.load(path)


async def test_memory_that_llama_cpp_cannot_have_is_told_with_what_was_planned(
    tmp_path: Path,
) -> None:
    path = generated.tiny_llama(tmp_path / "model.gguf", width=256, layers=16)
    async with Runtime(memory_limit=None) as runtime:
        with pytest.raises(InsufficientMemoryError) as caught:
            await runtime.load(path, context_size=1 << 30)
        plan = caught.value.plan
        assert plan is not None
        assert (plan.fits, plan.context_size) == (False, 1 << 30)
        assert plan.total_bytes > psutil.virtual_memory().total
        assert runtime.snapshot.memory_bytes == 0


async def test_an_idle_model_that_would_go_is_not_counted_against_what_does_not_fit(
    spoken: dict[str, Path],
) -> None:
    limit = await bytes_of(spoken["alpha"])
    async with Runtime(memory_limit=limit) as runtime:
        await runtime.load(spoken["alpha"], **SMALL)
        await asyncio.sleep(0)
        left = f"memory_limit leaves {in_words(limit)} beside the models that stay"
        with pytest.raises(InsufficientMemoryError, match=re.escape(left)) as caught:
            await runtime.load(spoken["beta"], **{**SMALL, "context_size": 100_000})
        assert caught.value.plan is not None
        assert caught.value.plan.free_bytes == 0
        await runtime.load(spoken["beta"], **{**SMALL, **(caught.value.plan.suggestion or {})})


async def test_a_quantised_cache_is_suggested_where_a_smaller_context_is_not_enough(
    tmp_path: Path,
) -> None:
    path = generated.tiny_llama(tmp_path / "m.gguf", width=256, layers=16, heads=4, kv_heads=4)
    wanted = Wanted(str(path), llamactor.LoadOptions(), llamactor.ContextOptions(context_size=4096))

    def limited(n_bytes: int) -> Callable[[Usages], bool]:
        return lambda usages: sum(usage.total for usage in usages.values()) <= n_bytes

    found = await estimate(wanted, limited(0))
    least = await estimate(
        Wanted(str(path), wanted.load, llamactor.ContextOptions(context_size=512)), limited(0)
    )
    room = sum(usage.total for usage in least.usages.values()) - 1000
    suggestion = await suggest(found, limited(room))
    assert suggestion is not None
    assert suggestion["kv_type_k"] == suggestion["kv_type_v"] == "q8_0"
    assert suggestion["context_size"] >= 512
    assert await suggest(found, limited(0)) is None


# --- limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        *((None, None), (5_000, 5_000), ("80%", 0.8), ("100 %", 1.0), ("0.5%", 0.005)),
        *(("1GiB", 2**30), ("1.5 GB", 1_500_000_000), ("512M", 512_000_000), ("7", 7)),
    ],
)
def test_limits_are_bytes_sizes_and_shares(given: Any, meant: float | None) -> None:
    assert check_limit(given) == meant
    assert type(check_limit(given)) is type(meant)


@pytest.mark.parametrize("given", ["", "much", "0%", "101%", "-3", 0, -1, "5 XB", "0"])
def test_other_limits_are_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="memory_limit"):
        Runtime(memory_limit=given)


@pytest.mark.parametrize("given", [True, 0.8, b"1"])
def test_limits_of_another_type_are_refused(given: Any) -> None:
    with pytest.raises(TypeError, match="memory_limit"):
        Runtime(memory_limit=given)


def test_a_share_is_never_more_than_what_is_free_or_held() -> None:
    ram = psutil.virtual_memory()
    assert read_budget(0.01, {}).per_device["CPU"] == int(0.01 * ram.total)
    everything = read_budget(1.0, {}).per_device["CPU"]
    assert everything <= ram.total
    assert abs(everything - psutil.virtual_memory().available) < 2**30
    assert read_budget(None, {}).excess([{"CPU": DeviceUsage(weights=2**60)}]) == 0
    assert read_budget(None, {}).total is None


def test_what_a_model_holds_and_others_could_have_all_the_same_is_free_only_once() -> None:
    """Mapped weights are available to the system, and so are pages that nobody has written."""
    available, process = psutil.virtual_memory().available, psutil.Process().memory_info()
    room = read_budget(1.0, {"CPU": 2**60}).per_device["CPU"]
    assert room - available - (process.rss - process.shared) < 2**30


def test_other_devices_than_the_host_never_give_more_than_they_have() -> None:
    def device(name: str, kind: str, free: int) -> Device:
        return Device(name, "", name[:-1], kind, memory_total=100, memory_free=free)

    found = [device("CPU", "cpu", 90), device("CUDA0", "gpu", 80), device("CUDA1", "gpu", 10)]
    assert room_on_devices(found, 0.5, {}) == {"CUDA0": 50, "CUDA1": 10}
    assert room_on_devices(found, 1.0, {"CUDA1": 20}) == {"CUDA0": 80, "CUDA1": 30}
    others = {one.name for one in llamactor.devices() if one.kind != "cpu" and one.memory_total}
    assert set(read_budget(None, {}).per_device) == others
    assert set(read_budget(2**30, {}).per_device) == others
    assert set(read_budget(0.5, {}).per_device) == {"CPU", *others}


def test_what_does_not_fit_on_a_device_is_told_with_its_name() -> None:
    usages = {"CPU": DeviceUsage(weights=1 << 20), "CUDA0": DeviceUsage(cache=9 << 20)}
    plan = MemoryPlan("x", "x.gguf", 512, 4, usages, fits=False, suggestion={"gpu_layers": 2})
    left = Budget({"CUDA0": 8 << 20}, together=64 << 20).left([{"CUDA0": usages["CPU"]}])
    assert left == {"CUDA0": 7 << 20, "": 63 << 20}
    assert str(insufficient(plan, 64 << 20, left)) == (
        "'x' with context_size=512 takes 9.0 MiB on CUDA0, and that has 7.0 MiB beside the models "
        "that stay; gpu_layers=2 would fit"
    )


def test_a_budget_counts_each_device_or_all_together() -> None:
    one = {"CPU": DeviceUsage(weights=10, overhead=5), "CUDA0": DeviceUsage(cache=20)}
    assert Budget({"CPU": 15, "CUDA0": 20}).excess([one]) == 0
    assert Budget({"CPU": 15, "CUDA0": 20}).excess([one, one]) == 20
    assert Budget(together=35).excess([one]) == 0
    assert Budget(together=34).excess([one]) == 1
    assert Budget({"CUDA0": 1}).excess([]) == 0
    totals = [Budget({"CPU": 2, "CUDA0": 1}).total, Budget({"CUDA0": 1}, together=5).total]
    assert [*totals, Budget({"CUDA0": 1}).total] == [3, 5, None]
    assert [in_words(n) for n in (5, 2048, 3 << 20, 3 << 40)] == [
        *("5 B", "2.0 KiB", "3.0 MiB", "3.0 TiB")
    ]


# --- who goes, who waits --------------------------------------------------------------------------


async def test_the_model_that_was_used_longest_ago_goes_first(spoken: dict[str, Path]) -> None:
    limit = await bytes_of(spoken["alpha"], spoken["beta"])
    async with Runtime(memory_limit=limit) as runtime:
        alpha = await runtime.load(spoken["alpha"], **SMALL)
        await runtime.load(spoken["beta"], **SMALL)
        await alpha.complete("x", max_tokens=1)
        await asyncio.sleep(0)
        plan = await runtime.estimate(spoken["gamma"], **SMALL)
        assert (plan.fits, plan.evicts) == (True, ("beta",))
        await runtime.load(spoken["gamma"], **SMALL)
        assert [handle.identifier for handle in runtime.loaded()] == ["alpha", "gamma"]
        assert not is_mapped(spoken["beta"])
        assert runtime.snapshot.memory_bytes <= limit


async def test_no_more_models_go_than_must(tmp_path: Path, spoken: dict[str, Path]) -> None:
    large = generated.tiny_llama(tmp_path / "large.gguf", width=256)
    small, big = await bytes_of(spoken["alpha"]), await bytes_of(large)
    assert small < big
    async with Runtime(memory_limit=small + big) as runtime:
        await runtime.load(spoken["alpha"], **SMALL)  # the oldest, but too small to help
        await runtime.load(large, **SMALL)
        await asyncio.sleep(0)
        plan = await runtime.estimate(large, **SMALL)
        assert plan.evicts == ("large",)
        await runtime.load(large, **SMALL)
        assert [handle.identifier for handle in runtime.loaded()] == ["alpha", "large:2"]


async def test_a_model_at_work_is_waited_for_and_never_taken(
    spoken: dict[str, Path], gate: Gate
) -> None:
    limit = await bytes_of(spoken["alpha"])
    async with Runtime(memory_limit=limit) as runtime:
        alpha = await runtime.load(spoken["alpha"], **SMALL)
        prediction = alpha.complete("x", max_tokens=8, logits_processor=gate)
        await gate.reached()
        plan = await runtime.estimate(spoken["beta"], **SMALL)
        assert (plan.fits, plan.evicts, plan.waits_for) == (False, (), ("alpha",))
        first = runtime.load(spoken["beta"], **SMALL)
        await until(lambda: first.progress.stage == "waiting")
        second = runtime.load(spoken["gamma"], **SMALL)
        await until(lambda: second.progress.stage == "waiting")
        assert (first.progress.position, second.progress.position) == (1, 2)
        assert not prediction.done
        third = runtime.load(spoken["gamma"], **SMALL)
        await until(lambda: third.progress.position == 3)
        second.cancel()
        await until(lambda: third.progress.position == 2)
        gate.open()
        assert (await prediction).content == SAYS["alpha"]
        beta = await soon(first.result())
        assert (await beta.complete("x", max_tokens=8)).content == SAYS["beta"]
        gamma = await soon(third.result())
        assert (await gamma.complete("x", max_tokens=8)).content == SAYS["gamma"]
        assert runtime.snapshot.memory_bytes <= limit


async def test_progress_of_a_load_that_waits_never_falls(
    spoken: dict[str, Path], gate: Gate
) -> None:
    async with Runtime(memory_limit=await bytes_of(spoken["alpha"])) as runtime:
        alpha = await runtime.load(spoken["alpha"], **SMALL)
        prediction = alpha.complete("x", max_tokens=8, logits_processor=gate)
        await gate.reached()
        loading = runtime.load(spoken["beta"], **SMALL)
        seen = []
        async for progress in loading:
            seen.append(progress)
            if progress.stage == "waiting":
                gate.open()
        fractions = [progress.fraction for progress in seen]
        assert fractions == sorted(fractions)
        stages = [stage for stage, _ in itertools.groupby(progress.stage for progress in seen)]
        assert len(stages) == len(set(stages))
        assert {"waiting", "ready"} <= set(stages)
        assert fractions[-1] == 1.0
        await loading
        await prediction


async def test_a_model_to_be_kept_never_goes(spoken: dict[str, Path]) -> None:
    limit = await bytes_of(spoken["alpha"])
    async with Runtime(memory_limit=limit) as runtime:
        alpha = await runtime.load(spoken["alpha"], keep=True, **SMALL)
        with pytest.raises(InsufficientMemoryError, match="leaves nothing"):
            await runtime.load(spoken["beta"], **SMALL)
        assert alpha.info is not None
        await runtime.unload("alpha")
        beta = await runtime.load(spoken["beta"], **SMALL)
        assert beta.info is not None


async def test_a_block_keeps_its_model_from_going(spoken: dict[str, Path]) -> None:
    limit = await bytes_of(spoken["alpha"])
    async with Runtime(memory_limit=limit) as runtime:
        async with runtime.model(spoken["alpha"], **SMALL) as alpha:
            other = runtime.model(spoken["beta"], **SMALL)
            await until(lambda: other.progress.stage == "waiting")
            for _ in range(3):
                assert (await alpha.complete("x", max_tokens=8)).content == SAYS["alpha"]
        beta = await soon(other.result())
        assert (await beta.complete("x", max_tokens=8)).content == SAYS["beta"]


async def test_a_load_cancelled_while_it_waits_leaves_the_line(
    spoken: dict[str, Path], gate: Gate
) -> None:
    limit = await bytes_of(spoken["alpha"])
    async with Runtime(memory_limit=limit) as runtime:
        alpha = await runtime.load(spoken["alpha"], **SMALL)
        prediction = alpha.complete("x", max_tokens=8, logits_processor=gate)
        await gate.reached()
        loading = runtime.load(spoken["beta"], **SMALL)
        await until(lambda: loading.progress.stage == "waiting")
        loading.cancel()
        await until(lambda: not runtime.snapshot.loading)
        assert runtime.snapshot.memory_bytes <= limit
        gate.open()
        await prediction
        assert alpha.info is not None


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.9, 0.99])
async def test_what_a_cancelled_load_was_promised_counts_until_it_is_free(
    spoken: dict[str, Path], fraction: float
) -> None:
    async with Runtime(memory_limit=None) as runtime:
        loading = runtime.load(spoken["alpha"], **SMALL)
        async for progress in loading:
            if progress.stage == "weights" and progress.fraction >= fraction:
                break
            if progress.stage == "context":
                break
        loading.cancel()
        async for status in runtime.status():
            if not status.memory_bytes:
                break
            assert status.loading or status.models
        assert not is_mapped(spoken["alpha"])


async def test_a_swap_that_does_not_fit_beside_the_old_model_is_refused(
    spoken: dict[str, Path],
) -> None:
    async with Runtime(memory_limit=await bytes_of(spoken["alpha"])) as runtime:
        alpha = await runtime.load(spoken["alpha"], **SMALL)
        with pytest.raises(InsufficientMemoryError):
            await runtime.swap("alpha", spoken["beta"], **SMALL)
        assert (await alpha.complete("x", max_tokens=8)).content == SAYS["alpha"]


async def test_a_swap_leaves_room_for_the_old_model(tmp_path: Path) -> None:
    path = generated.tiny_llama(tmp_path / "model.gguf", layers=8)
    async with Runtime(memory_limit=None) as runtime:
        least = (await runtime.estimate(path, context_size=512)).total_bytes
        usual = (await runtime.estimate(path)).total_bytes
    async with Runtime(memory_limit=usual + least // 2) as runtime:
        await runtime.load(path, identifier="mine", context_size=512)
        with pytest.raises(InsufficientMemoryError, match="would fit") as caught:
            await runtime.swap("mine", path, context_size=8192)
        assert caught.value.plan is not None
        suggestion = caught.value.plan.suggestion
        assert suggestion is not None
        assert 512 <= suggestion["context_size"] < 8192
        handle = await runtime.swap("mine", path)
        assert handle.loaded is not None
        assert handle.loaded.context_size == suggestion["context_size"]


@pytest.mark.parametrize("seed", range(2))
async def test_two_models_that_do_not_fit_together_serve_everybody(
    spoken: dict[str, Path], seed: int
) -> None:
    """One hundred requests, with random times to think, whichever model is in memory."""
    draw = random.Random(seed)
    one = await bytes_of(spoken["alpha"])
    limit = one + one // 2
    seen: list[int] = []
    async with Runtime(memory_limit=limit) as runtime:

        async def watch() -> None:
            async for status in runtime.status():
                both = is_mapped(spoken["alpha"]) and is_mapped(spoken["beta"])
                seen.append(2 * one if both else status.memory_bytes)

        async def ask(name: str, think: float, tokens: int) -> tuple[str, str]:
            await asyncio.sleep(think)
            model = await runtime.model(spoken[name], **SMALL)
            result = await model.complete("x", max_tokens=tokens)
            assert result.stop_reason == "max_tokens"
            return name, result.content

        watching = asyncio.create_task(watch())
        answers = await asyncio.gather(
            *(
                ask(draw.choice(["alpha", "beta"]), draw.random() / 2, draw.randrange(1, 9))
                for _ in range(100)
            )
        )
    await soon(watching)
    assert len(answers) == 100
    assert {name for name, _ in answers} == {"alpha", "beta"}
    assert all(SAYS[name].startswith(content) and content for name, content in answers)
    assert max(seen) <= limit
    assert len(seen) > 10

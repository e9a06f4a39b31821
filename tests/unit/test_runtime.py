"""The runtime: many models by name, found, held, swapped, and let go."""

from __future__ import annotations

import asyncio
import gc
import inspect
import threading
from typing import TYPE_CHECKING, Any

import pytest

import llamactor
from llamactor import (
    BusyError,
    ChatSession,
    ClosedError,
    LoadCancelledError,
    ModelHandle,
    ModelNotFoundError,
    ModelNotLoadedError,
    Runtime,
    StateMismatchError,
)
from llamactor.chat.tools import ToolKeywords
from tests.conftest import PATIENCE
from tests.contexts import soon, until
from tests.models import tiny_llama
from tests.speaking import SAYS, SMALL
from tests.unit.test_loading import is_mapped, until_unmapped

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.conftest import Gate


pytestmark = pytest.mark.every_loop


def state(runtime: Runtime) -> str:
    """The state of the first model."""
    return runtime.snapshot.models[0].state


def bound(handle: ModelHandle) -> bool:
    """Whether it means a model now."""
    return handle.info is not None


@pytest.fixture
async def runtime() -> AsyncIterator[Runtime]:
    async with Runtime(memory_limit=None) as runtime:
        yield runtime


async def test_a_loaded_model_predicts_and_has_the_name_of_its_file(
    runtime: Runtime, spoken: dict[str, Path]
) -> None:
    model = await runtime.load(spoken["alpha"], **SMALL)
    assert (await model.complete("x", max_tokens=8)).content == SAYS["alpha"]
    assert (model.identifier, model.path) == ("alpha", str(spoken["alpha"]))
    assert model.info is not None
    assert model.info.architecture == "llama"
    assert [handle.identifier for handle in runtime.loaded()] == ["alpha"]


async def test_the_next_load_of_a_file_gets_a_number(
    runtime: Runtime, spoken: dict[str, Path]
) -> None:
    loadings = [runtime.load(spoken["alpha"], **SMALL) for _ in range(3)]
    models = [await loading for loading in loadings]
    # Each is named once its file is known, which may be in another order than they were asked for.
    assert {model.identifier for model in models} == {"alpha", "alpha:2", "alpha:3"}
    assert len({model.epoch for model in models}) == 3


async def test_a_taken_name_is_refused_while_loading_and_after(
    runtime: Runtime, spoken: dict[str, Path]
) -> None:
    loading = runtime.load(spoken["alpha"], identifier="mine", **SMALL)
    for _ in range(2):
        with pytest.raises(ValueError, match="'mine' is taken"):
            _ = runtime.load(spoken["beta"], identifier="mine", **SMALL)
        await loading


async def test_progress_never_falls_and_ends_at_one(
    runtime: Runtime, spoken: dict[str, Path]
) -> None:
    loading = runtime.load(spoken["alpha"], **SMALL)
    seen = [progress async for progress in loading]
    fractions = [progress.fraction for progress in seen]
    assert fractions == sorted(fractions)
    assert fractions.count(1.0) == 1
    assert (seen[0].stage, seen[-1].stage) == ("resolving", "ready")
    await loading


async def test_models_asked_for_at_once_share_one_load(
    runtime: Runtime, spoken: dict[str, Path]
) -> None:
    wanted = [runtime.model(spoken["alpha"], **SMALL) for _ in range(20)]
    models = await asyncio.gather(*(loading.result() for loading in wanted))
    assert len({model.epoch for model in models}) == 1
    assert len(runtime.loaded()) == 1
    again = await runtime.model(spoken["alpha"])
    assert again.epoch == models[0].epoch
    assert (await runtime.model("alpha")).epoch == models[0].epoch
    assert (await runtime.model()).epoch == models[0].epoch


async def test_any_model_is_none_while_nothing_is_loaded(runtime: Runtime) -> None:
    with pytest.raises(ModelNotLoadedError, match="say which one"):
        _ = runtime.model()


async def test_one_of_those_who_share_a_load_may_leave(
    runtime: Runtime, spoken: dict[str, Path]
) -> None:
    leaving, staying = (runtime.model(spoken["alpha"], **SMALL) for _ in range(2))
    leaving.cancel()
    with pytest.raises(LoadCancelledError, match="cancelled by its caller"):
        await leaving
    assert (await staying).info is not None


@pytest.mark.parametrize("turns", [0, 1, 2, 5, 20, 100, 300])
async def test_a_load_cancelled_at_any_time_leaves_nothing(
    runtime: Runtime, spoken: dict[str, Path], turns: int
) -> None:
    loading = runtime.load(spoken["gamma"], **SMALL)
    for _ in range(turns):
        await asyncio.sleep(0)
    loading.cancel()
    with pytest.raises(LoadCancelledError):
        await soon(loading.result())
    await until(lambda: not runtime.snapshot.models and not runtime.snapshot.loading)
    assert runtime.snapshot.memory_bytes == 0
    await until_unmapped(spoken["gamma"])
    assert runtime.loaded() == ()


async def test_a_load_given_up_in_the_very_moment_it_ends_leaves_nothing(
    runtime: Runtime, spoken: dict[str, Path]
) -> None:
    loading = runtime.load(spoken["gamma"], **SMALL)
    async for status in runtime.status():
        if status.models:
            loading.cancel()
            break
    with pytest.raises(LoadCancelledError):
        await loading
    await until(lambda: not runtime.snapshot.models)
    await until_unmapped(spoken["gamma"])


async def test_a_finished_load_that_nobody_got_is_unloaded(
    runtime: Runtime, spoken: dict[str, Path]
) -> None:
    loading = runtime.load(spoken["gamma"], **SMALL)
    async for _ in loading:
        pass
    assert loading.done
    del loading
    gc.collect()
    await until(lambda: not runtime.snapshot.models)
    await until_unmapped(spoken["gamma"])


async def test_a_finished_load_that_is_given_up_stays_for_those_who_found_its_model(
    runtime: Runtime, spoken: dict[str, Path]
) -> None:
    loading = runtime.model(spoken["alpha"], **SMALL)
    async for _ in loading:
        pass
    later = runtime.model(spoken["alpha"])
    async with runtime.model(spoken["alpha"]) as model:
        loading.cancel()
        assert (await model.complete("x", max_tokens=8)).content == SAYS["alpha"]
        assert (await later).epoch == model.epoch
    await until(lambda: state(runtime) == "idle")
    with pytest.raises(LoadCancelledError, match="cancelled by its caller"):
        await loading


async def test_a_finished_load_goes_when_all_who_asked_for_it_have_given_up(
    runtime: Runtime, spoken: dict[str, Path]
) -> None:
    first = runtime.model(spoken["alpha"], **SMALL)
    async for _ in first:
        pass
    second = runtime.model(spoken["alpha"])
    first.cancel()
    assert len(runtime.loaded()) == 1
    second.cancel()
    assert runtime.loaded() == ()
    await until_unmapped(spoken["alpha"])


@pytest.mark.parametrize("turns", [1, 5, 20, 40])
async def test_a_load_that_is_being_cancelled_is_nobody_else_s(
    runtime: Runtime, spoken: dict[str, Path], turns: int
) -> None:
    loading = runtime.model(spoken["alpha"], **SMALL)
    for _ in range(turns):
        await asyncio.sleep(0)
    loading.cancel()
    model = await runtime.model(spoken["alpha"], **SMALL)
    assert model.identifier == "alpha"
    assert (await model.complete("x", max_tokens=8)).content == SAYS["alpha"]


async def test_leaving_the_block_of_a_load_unloads_it(
    runtime: Runtime, spoken: dict[str, Path]
) -> None:
    async with runtime.load(spoken["alpha"], **SMALL) as model:
        assert bound(model)
    assert not bound(model)
    assert runtime.loaded() == ()


async def test_leaving_the_block_of_a_found_model_only_lets_it_go(
    runtime: Runtime, spoken: dict[str, Path]
) -> None:
    async with runtime.model(spoken["alpha"], **SMALL) as model:
        await asyncio.sleep(0)
        assert state(runtime) == "busy"
        epoch = model.epoch
    assert state(runtime) == "idle"
    assert model.epoch == epoch


async def test_a_loading_that_is_entered_twice_lets_its_model_go_twice(
    runtime: Runtime, spoken: dict[str, Path]
) -> None:
    loading = runtime.model(spoken["alpha"], **SMALL)
    async with loading, loading:
        await asyncio.sleep(0)
        assert runtime.snapshot.models[0].leases == 2
    assert state(runtime) == "idle"
    await soon(runtime.unload("alpha"))


async def test_a_reference_that_leads_nowhere_keeps_its_kind(
    runtime: Runtime, tmp_path: Path
) -> None:
    with pytest.raises(ModelNotFoundError, match=r"missing\.gguf"):
        await runtime.load(tmp_path / "missing.gguf")
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(llamactor.ModelLoadError, match="not a GGUF"):
        await runtime.load(tmp_path / "text.gguf")
    with pytest.raises(ModelNotFoundError, match=r"missing\.gguf"):
        await runtime.estimate(tmp_path / "missing.gguf")


async def test_a_failed_load_that_nobody_awaits_goes_to_the_exception_handler(
    runtime: Runtime, tmp_path: Path
) -> None:
    reports: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reports.append(context))
    loading = runtime.load(tmp_path / "missing.gguf")
    await until(lambda: not runtime.snapshot.loading)
    del loading
    gc.collect()
    await asyncio.sleep(0)
    assert [type(report["exception"]) for report in reports] == [ModelNotFoundError]


# --- handles --------------------------------------------------------------------------------------


async def test_a_handle_finds_by_name_path_folder_and_architecture(
    runtime: Runtime, spoken: dict[str, Path]
) -> None:
    path = spoken["alpha"]
    await runtime.load(path, identifier="first", **SMALL)
    folder = f"{path.parent.name}/{path.name}"
    for query in ("first", str(path), str(path.parent), folder, "llama", None):
        assert runtime.get(query).identifier == "first", query
    assert runtime.get(path=path).identifier == "first"
    assert runtime.get(identifier="first", architecture="llama").identifier == "first"
    for handle in (runtime.get("second"), runtime.get(identifier="first", architecture="mamba")):
        assert handle.identifier is None
        assert handle.info is None


async def test_a_path_may_be_given_in_another_way_than_the_model_was_loaded_by(
    runtime: Runtime, spoken: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = spoken["alpha"].parent
    monkeypatch.chdir(folder.parent)
    await runtime.load(f"{folder.name}/alpha.gguf", **SMALL)
    above = f"../{folder.parent.name}"
    for place in (
        f"./{folder.name}",
        f"{above}/{folder.name}",
        f"{above}/{folder.name}/alpha.gguf",
    ):
        assert runtime.get(path=place).identifier == "alpha", place
        assert runtime.get(place).identifier == "alpha", place
    for path in (folder.name, folder, "."):
        assert runtime.get(path=path).identifier == "alpha", path
    assert runtime.get(folder.name).identifier is None  # a bare word is a name, and no folder
    assert runtime.get(path=f"{folder.name}/alph").identifier is None


async def test_of_several_models_a_handle_means_the_one_used_last(
    runtime: Runtime, spoken: dict[str, Path]
) -> None:
    alpha = await runtime.load(spoken["alpha"], **SMALL)
    await runtime.load(spoken["beta"], **SMALL)
    anyone = runtime.get()
    assert anyone.identifier == "beta"
    alpha.tokenize("x")
    assert anyone.identifier == "alpha"


async def test_a_handle_survives_unloading_and_means_what_is_loaded_then(
    runtime: Runtime, spoken: dict[str, Path]
) -> None:
    handle = runtime.get("mine")
    epochs: list[int | None] = []
    for name in ("alpha", "beta", "alpha"):
        assert (handle.info, handle.epoch, handle.path) == (None, None, None)
        with pytest.raises(ModelNotLoadedError, match="no loaded model satisfies"):
            _ = handle.complete("x")
        await runtime.load(spoken[name], identifier="mine", **SMALL)
        epochs.append(handle.epoch)
        assert (await handle.complete("x", max_tokens=8)).content == SAYS[name]
        await runtime.unload("mine")
    assert len(set(epochs)) == 3


async def test_a_handle_has_all_that_a_model_has() -> None:
    def public(kind: type) -> dict[str, Any]:
        return {name: item for name, item in vars(kind).items() if not name.startswith("_")}

    model, handle = public(llamactor.Model), public(ModelHandle)
    assert set(model) <= set(handle)
    for name, item in model.items():
        if inspect.isfunction(item):
            wanted = set(inspect.signature(item).parameters)
            if name == "chat":  # a chat with a handle moves from one default context to the next
                wanted.remove("context")
            given = set(inspect.signature(handle[name]).parameters)
            assert given <= wanted, name
            assert wanted - given <= set(ToolKeywords.__annotations__), name  # among its options


async def test_what_a_handle_computes_is_what_its_model_computes(
    runtime: Runtime, spoken: dict[str, Path]
) -> None:
    handle = await runtime.load(spoken["alpha"], **SMALL)
    tokens = handle.tokenize("once upon a time")
    assert handle.detokenize(tokens) == "once upon a time"
    assert handle.count_tokens("once upon a time") == len(tokens)
    assert handle.tokens.eos is not None
    assert handle.metadata["general.architecture"] == "llama"
    messages = [{"role": "user", "content": "hi"}]
    assert "<|im_start|>user\nhi<|im_end|>" in await handle.apply_chat_template(messages)
    assert (await handle.respond(messages, max_tokens=8)).content == SAYS["alpha"]
    assert "alpha" in repr(handle)
    await handle.aclose()
    assert handle.info is None
    await handle.aclose()


async def test_a_chat_of_a_handle_goes_on_with_the_model_that_is_loaded_then(
    runtime: Runtime, spoken: dict[str, Path]
) -> None:
    handle = await runtime.load(spoken["alpha"], identifier="mine", **SMALL)
    async with handle.chat(max_tokens=8) as session:
        assert (await session.prompt("one")).content == SAYS["alpha"]
        await runtime.unload("mine")
        assert not session.closed
        with pytest.raises(ModelNotLoadedError):
            _ = session.prompt("two")
        await runtime.load(spoken["beta"], identifier="mine", **SMALL)
        branch = await session.fork()
        for talk in (session, branch):
            assert (await talk.prompt("two")).content == SAYS["beta"]
            assert [message.content for message in talk.history] == [
                *("one", SAYS["alpha"], "two", SAYS["beta"])
            ]


async def test_a_chat_of_a_handle_is_saved_and_restored_wherever_it_runs(
    runtime: Runtime, spoken: dict[str, Path], tmp_path: Path
) -> None:
    handle = await runtime.load(spoken["alpha"], identifier="mine", **SMALL)
    async with handle.chat(max_tokens=8) as session:
        await session.prompt("one")
        await session.save(tmp_path / "chat")
        await runtime.swap("mine", spoken["beta"], **SMALL)
        with pytest.raises(StateMismatchError):
            await ChatSession.restore(tmp_path / "chat", handle)
        await session.save(tmp_path / "chat")
    async with ChatSession.restore(tmp_path / "chat", handle) as session:
        await runtime.unload("mine")
        await runtime.load(spoken["beta"], identifier="mine", **SMALL)
        assert (await session.prompt("two")).content == SAYS["beta"]
        assert [message.content for message in session.history] == [
            *("one", SAYS["alpha"], "two", SAYS["beta"])
        ]


async def test_a_handle_passes_on_how_tools_are_used(
    runtime: Runtime, spoken: dict[str, Path]
) -> None:
    handle = await runtime.load(spoken["alpha"], **SMALL)
    definition = {"name": "look", "description": "Look.", "parameters": {"type": "object"}}
    with pytest.raises(ValueError, match="max_rounds"):
        _ = handle.respond("x", tools=[definition], max_rounds=0)
    with pytest.raises(ValueError, match="max_rounds"):
        _ = handle.act("x", [definition], max_rounds=0)


# --- unloading ------------------------------------------------------------------------------------


async def test_unloading_waits_for_what_runs(
    runtime: Runtime, spoken: dict[str, Path], gate: Gate
) -> None:
    model = await runtime.load(spoken["alpha"], **SMALL)
    prediction = model.complete("x", max_tokens=8, logits_processor=gate)
    await gate.reached()
    unloading = asyncio.create_task(runtime.unload("alpha"))
    await until(lambda: runtime.snapshot.models[0].state == "leaving")
    assert model.info is None
    with pytest.raises(ModelNotLoadedError):
        _ = model.complete("x")
    with pytest.raises(ModelNotLoadedError):
        await runtime.unload("alpha")
    gate.open()
    assert (await prediction).content == SAYS["alpha"]
    await soon(unloading)
    assert runtime.snapshot.models == ()
    assert not is_mapped(spoken["alpha"])


async def test_unloading_without_draining_fails_what_runs(
    runtime: Runtime, spoken: dict[str, Path], gate: Gate
) -> None:
    model = await runtime.load(spoken["alpha"], **SMALL)
    prediction = model.complete("x", logits_processor=gate)
    await gate.reached()
    unloading = asyncio.create_task(runtime.unload("alpha", drain=False))
    gate.open()
    with pytest.raises(ClosedError):
        await prediction
    await soon(unloading)


async def test_unloading_can_be_refused_while_something_runs(
    runtime: Runtime, spoken: dict[str, Path], gate: Gate
) -> None:
    model = await runtime.load(spoken["alpha"], **SMALL)
    prediction = model.complete("x", max_tokens=4, logits_processor=gate)
    with pytest.raises(BusyError, match="drain=True waits"):
        await runtime.unload("alpha", drain="refuse")
    gate.open()
    await prediction
    await runtime.unload("alpha", drain="refuse")
    fresh = await runtime.load(spoken["alpha"], **SMALL)
    await runtime.unload("alpha", drain="refuse")
    assert fresh.info is None


async def test_cancelling_an_unload_stops_only_the_waiting(
    runtime: Runtime, spoken: dict[str, Path], gate: Gate
) -> None:
    model = await runtime.load(spoken["alpha"], **SMALL)
    prediction = model.complete("x", max_tokens=8, logits_processor=gate)
    unloading = asyncio.create_task(runtime.unload("alpha"))
    await gate.reached()
    unloading.cancel()
    await asyncio.wait([unloading])
    gate.open()
    assert (await prediction).content == SAYS["alpha"]
    await until(lambda: not runtime.snapshot.models)


async def test_an_unknown_name_is_told_with_what_is_near(
    runtime: Runtime, spoken: dict[str, Path]
) -> None:
    await runtime.load(spoken["alpha"], **SMALL)
    with pytest.raises(ModelNotLoadedError, match="did you mean 'alpha'"):
        await runtime.unload("alhpa")
    with pytest.raises(ModelNotLoadedError, match="loaded are: alpha"):
        await runtime.swap("zzz", spoken["beta"])


async def test_an_open_context_keeps_the_model_at_work(
    runtime: Runtime, spoken: dict[str, Path]
) -> None:
    model = await runtime.load(spoken["alpha"], **SMALL)
    async with model.create_context(context_size=256, sequences=1, threads=1):
        await asyncio.sleep(0)
        with pytest.raises(BusyError):
            await runtime.unload("alpha", drain="refuse")
    assert runtime.snapshot.models[0].leases == 0
    forgotten = await model.create_context(context_size=256, sequences=1, threads=1)
    with pytest.warns(ResourceWarning, match="unclosed <Context"):
        del forgotten
    assert runtime.snapshot.models[0].leases == 0


async def test_what_ended_is_counted_and_nothing_stays_at_work(
    runtime: Runtime, spoken: dict[str, Path]
) -> None:
    model = await runtime.load(spoken["alpha"], **SMALL)
    await asyncio.gather(*(model.complete("x", max_tokens=5).result() for _ in range(10)))
    prediction = model.complete("x")
    async for _ in prediction:
        break  # the last interest goes
    async with model.chat(max_tokens=5) as session:
        await session.prompt("hi")
    prediction.cancel()
    await prediction
    described = runtime.snapshot.models[0]
    assert (described.leases, described.predictions) == (0, 12)
    assert described.predicted_tokens >= 55


async def test_predictions_of_another_loop_keep_the_model_too(
    runtime: Runtime, spoken: dict[str, Path], gate: Gate
) -> None:
    await runtime.load(spoken["alpha"], **SMALL)
    resident = next(iter(runtime._core.residents))
    done: list[str] = []

    async def elsewhere() -> None:
        done.append(
            (await resident.model.complete("x", max_tokens=8, logits_processor=gate)).content
        )

    thread = threading.Thread(target=lambda: asyncio.run(elsewhere()))
    thread.start()
    await gate.reached()
    unloading = asyncio.create_task(runtime.unload("alpha"))
    await until(lambda: runtime.snapshot.models[0].state == "leaving")
    gate.open()
    await soon(unloading)
    await asyncio.to_thread(thread.join, PATIENCE)
    assert done == [SAYS["alpha"]]


# --- swapping -------------------------------------------------------------------------------------


async def test_predictions_in_flight_end_on_the_model_they_began_with(
    runtime: Runtime, spoken: dict[str, Path], gate: Gate
) -> None:
    model = await runtime.load(spoken["alpha"], identifier="mine", **SMALL)
    epoch = model.epoch
    before = [
        model.complete("x", max_tokens=64, logits_processor=None if i else gate) for i in range(50)
    ]
    await gate.reached()
    swapping = asyncio.create_task(runtime.swap("mine", spoken["beta"], **SMALL))
    await until(lambda: model.epoch != epoch)
    after = [model.complete("x", max_tokens=64) for _ in range(50)]
    assert not swapping.done()
    gate.open()
    assert {(await prediction).content for prediction in before} == {8 * SAYS["alpha"]}
    assert {(await prediction).content for prediction in after} == {8 * SAYS["beta"]}
    handle = await soon(swapping)
    assert handle.path == model.path == str(spoken["beta"])
    assert [entry.identifier for entry in runtime.snapshot.models] == ["mine"]
    assert not is_mapped(spoken["alpha"])


async def test_there_is_no_moment_without_a_model_during_a_swap(
    runtime: Runtime, spoken: dict[str, Path]
) -> None:
    handle = await runtime.load(spoken["alpha"], identifier="mine", **SMALL)
    swapping = asyncio.create_task(runtime.swap("mine", spoken["beta"], **SMALL))
    said = set()
    while not swapping.done():
        said.add((await handle.complete("x", max_tokens=8)).content)
    said.add((await handle.complete("x", max_tokens=8)).content)
    assert said <= {SAYS["alpha"], SAYS["beta"]}
    assert SAYS["beta"] in said


async def test_a_swap_that_fails_leaves_the_old_model(
    runtime: Runtime, spoken: dict[str, Path], tmp_path: Path
) -> None:
    handle = await runtime.load(spoken["alpha"], identifier="mine", ttl=60, **SMALL)
    with pytest.raises(ModelNotFoundError):
        await runtime.swap("mine", tmp_path / "missing.gguf")
    assert (await handle.complete("x", max_tokens=8)).content == SAYS["alpha"]
    await runtime.swap("mine", spoken["beta"], **SMALL)
    assert handle.loaded is not None
    assert handle.loaded.ttl == 60


async def test_a_swap_without_draining_fails_what_runs(
    runtime: Runtime, spoken: dict[str, Path], gate: Gate
) -> None:
    model = await runtime.load(spoken["alpha"], identifier="mine", **SMALL)
    prediction = model.complete("x", logits_processor=gate)
    await gate.reached()
    swapping = asyncio.create_task(runtime.swap("mine", spoken["beta"], drain=False, **SMALL))
    await until(lambda: model.path == str(spoken["beta"]))
    gate.open()
    with pytest.raises(ClosedError):
        await prediction
    await soon(swapping)


async def test_cancelling_a_swap_before_the_change_leaves_everything(
    runtime: Runtime, spoken: dict[str, Path]
) -> None:
    handle = await runtime.load(spoken["alpha"], identifier="mine", **SMALL)
    epoch = handle.epoch
    swapping = asyncio.create_task(runtime.swap("mine", spoken["beta"], **SMALL))
    await asyncio.sleep(0)
    swapping.cancel()
    await asyncio.wait([swapping])
    gc.collect()
    await until(lambda: not runtime.snapshot.loading)
    assert handle.epoch == epoch
    await until_unmapped(spoken["beta"])


@pytest.mark.parametrize("turns", range(3))
async def test_cancelling_a_swap_after_the_change_stops_only_the_waiting(
    runtime: Runtime, spoken: dict[str, Path], turns: int
) -> None:
    handle = await runtime.load(spoken["alpha"], identifier="mine", **SMALL)
    epoch = handle.epoch
    swapping = asyncio.create_task(runtime.swap("mine", spoken["beta"], **SMALL))
    async for _ in runtime.status():
        if handle.epoch != epoch:
            break
    for _ in range(turns):
        await asyncio.sleep(0)
    swapping.cancel()
    await asyncio.wait([swapping])
    gc.collect()
    await until(lambda: len(runtime.snapshot.models) == 1)
    assert (await handle.complete("x", max_tokens=8)).content == SAYS["beta"]
    await until_unmapped(spoken["alpha"])


# --- time to live ---------------------------------------------------------------------------------


class ClockLoop(asyncio.SelectorEventLoop):
    """A loop whose clock goes as fast as one likes."""

    ahead = 0.0

    def time(self) -> float:
        return super().time() + self.ahead


async def pass_time(seconds: float) -> None:
    """Let that much time go by at once, and everything that is due happen."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, ClockLoop)
    loop.ahead += seconds
    for _ in range(3):
        await asyncio.sleep(0)


def test_an_idle_model_goes_when_its_time_is_over(spoken: dict[str, Path]) -> None:
    async def main() -> None:
        async with Runtime(memory_limit=None) as runtime:
            model = await runtime.load(spoken["alpha"], ttl=3600, **SMALL)
            await runtime.load(spoken["beta"], **SMALL)
            await asyncio.sleep(0)
            await pass_time(3500)
            assert model.loaded is not None
            assert 3500 <= model.loaded.idle_time < 3600
            assert (await model.complete("x", max_tokens=8)).content == SAYS["alpha"]
            await pass_time(3500)  # using it has begun a new hour
            assert bound(model)
            model.count_tokens("so does this")
            await pass_time(3500)
            assert bound(model)
            await pass_time(200)
            assert not bound(model)
            await until(lambda: len(runtime.snapshot.models) == 1)
            assert runtime.get("beta").info is not None

    with asyncio.Runner(loop_factory=ClockLoop) as runner:
        runner.run(main())


def test_a_model_at_work_outlives_its_time(spoken: dict[str, Path], gate: Gate) -> None:
    async def main() -> None:
        async with Runtime(memory_limit=None) as runtime:
            model = await runtime.load(spoken["alpha"], ttl=10, **SMALL)
            prediction = model.complete("x", max_tokens=8, logits_processor=gate)
            await gate.reached()
            await pass_time(1000)
            assert bound(model)
            gate.open()
            assert (await prediction).content == SAYS["alpha"]
            await pass_time(9)
            assert bound(model)
            await pass_time(2)
            assert not bound(model)

    with asyncio.Runner(loop_factory=ClockLoop) as runner:
        runner.run(main())


def test_a_time_of_zero_unloads_as_soon_as_nothing_runs(spoken: dict[str, Path]) -> None:
    async def main() -> None:
        async with Runtime(memory_limit=None) as runtime:
            model = await runtime.load(spoken["alpha"], ttl=0, **SMALL)
            assert (await model.complete("x", max_tokens=8)).content == SAYS["alpha"]
            await until(lambda: not runtime.snapshot.models)

    asyncio.run(main())


# --- the whole ------------------------------------------------------------------------------------


async def test_status_tells_every_change_until_the_end(spoken: dict[str, Path]) -> None:
    seen: list[llamactor.RuntimeStatus] = []
    async with Runtime(memory_limit=None) as runtime:

        async def watch() -> None:
            async for status in snapshots:
                seen.append(status)  # noqa: PERF401 -- as they come

        snapshots = runtime.status()
        seen.append(await anext(snapshots))
        watching = asyncio.create_task(watch())
        await runtime.load(spoken["alpha"], **SMALL)
        await asyncio.sleep(0)
        await runtime.unload("alpha")
        await asyncio.sleep(0)
    await soon(watching)
    assert (seen[0].models, seen[0].loading) == ((), ())
    assert any(status.loading for status in seen)
    states = [status.models[0].state for status in seen if status.models]
    assert states[-1] == "leaving"
    assert [status.closed for status in seen].count(True) == 1
    assert seen[-1].memory_bytes == 0


async def test_closing_stops_loads_and_closes_models(spoken: dict[str, Path], gate: Gate) -> None:
    runtime = Runtime(memory_limit=None)
    model = await runtime.load(spoken["alpha"], **SMALL)
    prediction = model.complete("x", logits_processor=gate)
    await gate.reached()
    context = await model.create_context(context_size=256, sequences=1, threads=1)
    draining = asyncio.create_task(runtime.unload("alpha"))
    await until(lambda: runtime.snapshot.models[0].state == "leaving")
    loading = runtime.load(spoken["beta"], **SMALL)
    closing = asyncio.create_task(runtime.aclose())
    await asyncio.sleep(0)
    gate.open()
    await soon(closing)
    with pytest.raises(ClosedError):
        await prediction
    with pytest.raises(LoadCancelledError):
        await loading
    await soon(draining)
    assert context.closed
    assert model.closed
    for path in spoken.values():
        await until_unmapped(path)
    with pytest.raises(ClosedError, match="runtime was closed"):
        _ = runtime.load(spoken["alpha"])
    with pytest.raises(ClosedError, match="runtime was closed"):
        _ = runtime.model("alpha")
    await runtime.aclose()
    await context.aclose()


@pytest.mark.parametrize("turns", [0, 1, 2, 10])
async def test_closing_waits_for_a_load_that_was_cancelled(
    spoken: dict[str, Path], turns: int
) -> None:
    runtime = Runtime(memory_limit=None)
    loading = runtime.load(spoken["alpha"], **SMALL)
    async for progress in loading:
        if progress.stage == "weights":
            break
    loading.cancel()
    for _ in range(turns):
        await asyncio.sleep(0)
    await runtime.aclose()
    assert runtime.snapshot.closed
    assert not is_mapped(spoken["alpha"])
    names = {task.get_name() for task in asyncio.all_tasks()}
    assert not {name for name in names if name.startswith("llamactor")}


async def test_cancelling_a_close_stops_only_the_waiting(
    spoken: dict[str, Path], gate: Gate
) -> None:
    runtime = Runtime(memory_limit=None)
    model = await runtime.load(spoken["alpha"], **SMALL)
    prediction = model.complete("x", logits_processor=gate)
    await gate.reached()
    closing = asyncio.create_task(runtime.aclose())
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.wait([closing])
    assert closing.cancelled()
    gate.open()
    with pytest.raises(ClosedError):
        await prediction
    await soon(runtime.aclose())
    assert runtime.snapshot.closed
    assert runtime.snapshot.memory_bytes == 0
    await until_unmapped(spoken["alpha"])


async def test_cancelling_an_estimate_leaves_nothing(
    runtime: Runtime, spoken: dict[str, Path]
) -> None:
    for turns in range(8):
        estimating = asyncio.create_task(runtime.estimate(spoken["alpha"], **SMALL))
        for _ in range(turns):
            await asyncio.sleep(0)
        estimating.cancel()
        await asyncio.wait([estimating])
    await until_unmapped(spoken["alpha"])
    assert runtime.snapshot.memory_bytes == 0
    assert (await runtime.estimate(spoken["alpha"], **SMALL)).fits


def test_a_runtime_belongs_to_one_loop(spoken: dict[str, Path]) -> None:
    runtime = Runtime()

    async def use() -> None:
        await runtime.memory()

    async def close() -> None:
        with pytest.raises(RuntimeError, match="bound to the event loop"):
            await runtime.memory()

    asyncio.run(use())
    asyncio.run(close())
    with pytest.raises(RuntimeError, match="running asyncio event loop"):
        _ = runtime.load(spoken["alpha"])


def test_a_finished_load_that_outlives_its_loop_can_be_cancelled(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "model.gguf")

    async def load() -> llamactor.Loading[ModelHandle]:
        loading = Runtime(memory_limit=None).load(path, **SMALL)
        async for _ in loading:
            pass
        return loading

    loading = asyncio.run(load())
    loading.cancel()
    del loading
    with pytest.warns(ResourceWarning, match="unclosed <Model"):
        gc.collect()


async def test_closing_from_another_loop_is_refused_and_changes_nothing(
    spoken: dict[str, Path],
) -> None:
    runtime = Runtime(memory_limit=None)
    model = await runtime.load(spoken["alpha"], **SMALL)

    async def close(what: Runtime | ModelHandle) -> None:
        with pytest.raises(RuntimeError, match="bound to the event loop"):
            await what.aclose()

    for what in (model, runtime):
        await asyncio.to_thread(lambda what=what: asyncio.run(close(what)))  # type: ignore[misc]
        assert (await model.complete("x", max_tokens=8)).content == SAYS["alpha"]
    await soon(runtime.aclose())
    assert runtime.snapshot.closed
    assert not is_mapped(spoken["alpha"])


async def test_wrong_arguments_raise_at_the_call(runtime: Runtime) -> None:
    with pytest.raises(TypeError, match="did you mean 'context_size'"):
        _ = runtime.load("x", contxt_size=5)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="ttl must be between 0"):
        _ = runtime.load("x", ttl=-1)
    with pytest.raises(ValueError, match="contradict each other"):
        _ = runtime.load("x", ttl=1, keep=True)
    with pytest.raises(ValueError, match="identifier must not be empty"):
        _ = runtime.load("x", identifier="")
    with pytest.raises(ValueError, match="query must not be empty"):
        runtime.get("")
    with pytest.raises(ValueError, match="sequences must be between"):
        _ = runtime.model("x", sequences=1000)
    with pytest.raises(ValueError, match="threads must be between"):
        Runtime(threads=0)
    with pytest.raises(TypeError, match=r"presets must be Presets or None, not 'x\.toml'"):
        Runtime(presets="x.toml")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="drain must be True or False"):
        await runtime.swap("x", "y", drain="yes")  # type: ignore[arg-type]


async def test_a_runtime_says_what_it_has(runtime: Runtime, spoken: dict[str, Path]) -> None:
    assert repr(runtime) == "<Runtime without models>"
    await runtime.load(spoken["alpha"], **SMALL)
    assert repr(runtime) == "<Runtime alpha>"
    assert "CPU" in {device.name for device in runtime.devices}
    memory = await runtime.memory()
    assert memory.planned_bytes == runtime.snapshot.memory_bytes > 0
    assert memory.ram_total > memory.ram_available > 0
    assert memory.process_resident > 0
    assert memory.limit_bytes is None
    assert memory.devices == runtime.devices or memory.devices

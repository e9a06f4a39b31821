"""The hub: one per loop, bounded passes, closed with its loop, a thread where descriptors fail."""

from __future__ import annotations

import asyncio
import gc
import os
from typing import TYPE_CHECKING, Any

import pytest

import llamactor
from llamactor import _hub

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Descriptorless(asyncio.SelectorEventLoop):
    """A loop that refuses to watch descriptors, as the Proactor loop of Windows does."""

    def add_reader(self, fd: Any, callback: Callable[..., Any], *args: Any) -> None:  # type: ignore[override]
        raise NotImplementedError


async def predict(path: Path) -> str:
    async with llamactor.load_model(path, context_size=512, threads=1) as model:
        return (await model.complete("once", max_tokens=20)).content


async def own_hub() -> _hub.LoopHub:
    return _hub.hub_for(asyncio.get_running_loop())


@pytest.mark.every_loop
async def test_a_loop_has_one_hub() -> None:
    assert await own_hub() is await own_hub()


@pytest.mark.every_loop
async def test_a_flood_of_news_is_handled_in_bounded_passes() -> None:
    hub, loop = await own_hub(), asyncio.get_running_loop()
    idents = range(-1000, 0)  # native ids are positive
    heard: list[int] = []
    for ident in idents:
        hub.listen(ident, lambda ident=ident: heard.append(ident))  # type: ignore[misc]
    hub._backlog.extend(idents)
    loop.call_soon(hub._on_news)
    passes = []
    while len(heard) < len(idents):
        await asyncio.sleep(0)
        passes.append(len(heard))
    steps = [after - before for before, after in zip([0, *passes], passes, strict=False)]
    assert max(steps) == _hub.MAX_IDS_PER_PASS
    assert heard == list(idents)


@pytest.mark.every_loop
async def test_a_broken_listener_does_not_swallow_the_news_of_others() -> None:
    reports: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reports.append(context))
    hub = await own_hub()
    heard = []
    hub.listen(-2, lambda: 1 // 0)  # type: ignore[arg-type]
    hub.listen(-1, lambda: heard.append(-1))
    hub._backlog.extend((-2, -1))
    hub._on_news()
    assert heard == [-1]
    assert isinstance(reports[0]["exception"], ZeroDivisionError)


def test_loops_one_after_the_other_leave_no_descriptor(tiny_model_path: Path) -> None:
    asyncio.run(predict(tiny_model_path))
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 -- counts, no paths wanted
    for _ in range(5):
        asyncio.run(predict(tiny_model_path))
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before  # noqa: PTH208


def test_a_loop_that_is_closed_but_kept_gives_its_descriptor_back() -> None:
    loop = asyncio.new_event_loop()
    hub = loop.run_until_complete(own_hub())
    loop.close()
    asyncio.run(own_hub())
    assert hub.close_if_loop_closed()
    assert loop not in _hub._hubs


def test_a_loop_that_cannot_watch_descriptors_gets_a_thread(tiny_model_path: Path) -> None:
    with asyncio.Runner(loop_factory=Descriptorless) as runner:
        content = runner.run(predict(tiny_model_path))
    assert content == asyncio.run(predict(tiny_model_path))

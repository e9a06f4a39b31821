"""The end of the interpreter, forks and closed loops: no hang, no traceback from native code."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

from tests.conftest import PATIENCE

if TYPE_CHECKING:
    from pathlib import Path

PREAMBLE = """
import asyncio, os, sys
import llamactor

def endless(model):
    return model.complete("once", overflow="rolling_window", ignore_eos=True)

async def load():
    return await llamactor.load_model(sys.argv[1], context_size=256, threads=1)
"""


def run(path: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run a script over the tiny model in a process of its own."""
    command = [sys.executable, "-X", "faulthandler", "-c", PREAMBLE + script, str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)


def test_the_interpreter_ends_in_the_middle_of_decoding(tiny_model_path: Path) -> None:
    script = """
async def main():
    model = await load()
    predictions = [endless(model) for _ in range(4)]
    readers = [aiter(prediction) for prediction in predictions]
    for reader in readers:
        await anext(reader)
    print("decoding", flush=True)
    sys.exit(3)

asyncio.run(main())
"""
    ended = run(tiny_model_path, script)
    assert (ended.returncode, ended.stdout) == (3, "decoding\n"), ended.stderr
    assert ended.stderr == ""


def test_objects_kept_to_the_end_hold_nothing_up(tiny_model_path: Path) -> None:
    script = """
async def main():
    global model, prediction, reader
    model = await load()
    prediction = endless(model)
    reader = aiter(prediction)
    await anext(reader)

asyncio.run(main())
print("loop closed", flush=True)
"""
    ended = run(tiny_model_path, script)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "loop closed\n", "")


def test_a_prediction_outlives_its_closed_loop_only_to_be_cancelled(tiny_model_path: Path) -> None:
    script = """
async def start():
    global model
    model = await load()
    return endless(model)

prediction = asyncio.run(start())
prediction.cancel()
while not prediction.done:
    pass
assert prediction.text is not None
del prediction
asyncio.run(model.aclose())
print("closed")
"""
    ended = run(tiny_model_path, script)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "closed\n", "")


def test_a_forked_child_gets_closed_errors_and_ends_while_the_parent_goes_on(
    tiny_model_path: Path,
) -> None:
    script = """
import gc, warnings
warnings.simplefilter("ignore", DeprecationWarning)

def child(model, prediction):
    refused = 0
    for call in (
        lambda: model.tokenize("a"),
        lambda: prediction.done,
        lambda: prediction.cancel(),
        lambda: asyncio.run(load()),
    ):
        try:
            call()
        except llamactor.ClosedError:
            refused += 1
    return refused

async def main():
    async with await load() as model:
        async with endless(model) as prediction:
            reader = aiter(prediction)
            await anext(reader)
            pid = os.fork()
            if pid == 0:
                refused = child(model, prediction)
                del model, prediction, reader
                gc.collect()
                os._exit(refused)
            _, status = os.waitpid(pid, 0)
            print("refused", os.waitstatus_to_exitcode(status))
            await anext(reader)
            print("goes on")

asyncio.run(main())
"""
    ended = run(tiny_model_path, script)
    assert ended.stdout == "refused 4\ngoes on\n", ended.stderr
    assert (ended.returncode, ended.stderr) == (0, "")

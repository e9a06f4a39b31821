"""The end of the interpreter, forks and closed loops: no hang, no traceback from native code."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

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


EIGHT = """
async def eight():
    global model, predictions, readers
    model = await load()
    predictions = [endless(model) for _ in range(8)]
    readers = [aiter(prediction) for prediction in predictions]
    for reader in readers:
        await anext(reader)
    print("decoding", flush=True)
"""

NATIVE_COMPLAINTS = (
    *("terminate called", "panicked", "fatal runtime error", "Fatal Python error"),
    *("GGML_ASSERT", "Exception ignored", "Exception in thread", "Warning"),
)


def complaints(ended: subprocess.CompletedProcess[str]) -> list[str]:
    """What native code, finalisers or warnings wrote to stderr."""
    return [complaint for complaint in NATIVE_COMPLAINTS if complaint in ended.stderr]


# --- the end of the interpreter -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "code", "last_line"),
    [
        ("return", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("await asyncio.create_task(exits())", 5, ""),
        ("raise LookupError('mine')", 1, "LookupError: mine"),
        ("os.kill(os.getpid(), signal.SIGINT); await asyncio.sleep(60)", -2, "KeyboardInterrupt"),
        ("os.kill(os.getpid(), signal.SIGTERM); await asyncio.sleep(60)", -15, ""),
        ("os._exit(4)", 4, ""),
        ("model = predictions = readers = None; sys.exit(6)", 6, ""),
    ],
)
def test_eight_running_predictions_do_not_hold_up_the_end(
    tiny_model_path: Path, ending: str, code: int, last_line: str
) -> None:
    script = f"""
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits SIG_IGN
{EIGHT}
async def exits():
    sys.exit(5)

async def main():
    await eight()
    {ending}

asyncio.run(main())
"""
    ended = run(tiny_model_path, script)
    assert (ended.returncode, ended.stdout) == (code, "decoding\n"), ended.stderr
    assert ended.stderr.splitlines()[-1:] == ([last_line] if last_line else [])
    assert complaints(ended) == []


@pytest.mark.parametrize(
    ("work", "ending"),
    [
        ("time.sleep(0.002)", "return"),
        ("time.sleep(0.002)", "sys.exit(0)"),
        ("sum(range(20_000))", "sys.exit(0)"),
        ("time.sleep(60)", "return"),
    ],
)
def test_a_callback_does_not_hold_up_the_end_nor_crash_it(
    tiny_model_path: Path, work: str, ending: str
) -> None:
    script = f"""
import threading, time
started = threading.Semaphore(0)

def process(tokens, logits):
    started.release()
    {work}

async def main():
    global model, predictions
    model = await load()
    predictions = [
        model.complete("a", overflow="rolling_window", ignore_eos=True, logits_processor=process)
        for _ in range(8)
    ]
    await asyncio.to_thread(started.acquire)
    {ending}

asyncio.run(main())
"""
    ended = run(tiny_model_path, script)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("turns", [0, 5])
@pytest.mark.parametrize("opening", ["load()", "opened.create_context(context_size=512)"])
@pytest.mark.parametrize("ending", ["sys.exit(3)", "os._exit(3)"])
def test_the_end_comes_while_something_is_being_opened(
    tiny_model_path: Path, opening: str, ending: str, turns: int
) -> None:
    script = f"""
async def main():
    global opened, task
    opened = await load()
    task = asyncio.ensure_future({opening})
    for _ in range({turns}):
        await asyncio.sleep(0)
    {ending}

asyncio.run(main())
"""
    ended = run(tiny_model_path, script)
    assert (ended.returncode, ended.stderr) == (3, "")


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
        lambda: llamactor.Grammar.regex("a").accepts("a"),
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
    assert ended.stdout == "refused 5\ngoes on\n", ended.stderr
    assert (ended.returncode, ended.stderr) == (0, "")


FORKED = """
import gc

async def open_everything():
    global model, context, sequence, prediction, reader, loading
    model = await load()
    context = await model.create_context(context_size=256, sequences=2, threads=1)
    sequence = await context.sequence()
    prediction = sequence.predict("once", overflow="rolling_window", ignore_eos=True)
    reader = aiter(prediction)
    await anext(reader)

async def close_everything():
    await anext(reader)
    prediction.cancel()
    assert (await prediction).stop_reason == "cancelled"
    await sequence.aclose()
    await context.aclose()
    await model.aclose()

CALLS = {
    "tokenize": lambda: model.tokenize("a"),
    "detokenize": lambda: model.detokenize([20]),
    "count_tokens": lambda: model.count_tokens("a"),
    "complete": lambda: model.complete("a"),
    "context.stats": lambda: context.stats,
    "context.try_sequence": lambda: context.try_sequence(),
    "sequence.tokens": lambda: sequence.tokens,
    "sequence.usage": lambda: sequence.usage,
    "sequence.predict": lambda: sequence.predict("a"),
    "prediction.done": lambda: prediction.done,
    "prediction.text": lambda: prediction.text,
    "prediction.stats": lambda: prediction.stats,
    "prediction.cancel": lambda: prediction.cancel(),
    "aiter": lambda: aiter(prediction),
    "events": lambda: prediction.events(),
    "load_model": lambda: llamactor.load_model(sys.argv[1]),
    "grammar.accepts": lambda: llamactor.Grammar.regex("a").accepts("a"),
    "grammar.parse": lambda: llamactor.Grammar.regex("a").parse("a"),
}
AWAITED = {
    "create_context": lambda: model.create_context(context_size=256),
    "context.sequence": lambda: context.sequence(),
    "fork": lambda: sequence.fork(),
    "prefill": lambda: sequence.prefill("a"),
    "erase": lambda: sequence.erase([(0, 1)]),
    "shift": lambda: sequence.shift(0, 1),
    "clear": lambda: sequence.clear(),
    "save": lambda: sequence.save("state"),
    "load": lambda: sequence.load("state"),
    "score": lambda: sequence.score([20]),
    "anext": lambda: anext(reader),
    "result": lambda: prediction.result(),
}

async def unrefused():
    "Names of the calls that did not raise ClosedError."
    names = []
    for name, call in {**CALLS, **AWAITED}.items():
        try:
            outcome = call()
            if name in AWAITED:
                await outcome
        except llamactor.ClosedError:
            continue
        except BaseException as error:
            name += f" ({error!r})"
        names.append(name)
    return names

def forget_everything():
    global model, context, sequence, prediction, reader
    del model, context, sequence, prediction, reader
    gc.collect()

def wait_for(pid):
    _, status = os.waitpid(pid, 0)
    print("child", os.waitstatus_to_exitcode(status), flush=True)

def run(main):
    "Not asyncio.run: a child that leaves it takes the parent's self-pipe out of the shared epoll."
    loop = asyncio.new_event_loop()
    loop.run_until_complete(main())
    loop.close()
"""


@pytest.mark.parametrize("end", ["sys.exit(7)", "os._exit(7)", "forget_everything(); sys.exit(7)"])
def test_every_call_of_a_forked_child_is_refused(tiny_model_path: Path, end: str) -> None:
    script = f"""
{FORKED}
async def main():
    await open_everything()
    pid = os.fork()
    if pid == 0:
        print("not refused:", await unrefused(), flush=True)
        {end}
    wait_for(pid)
    await close_everything()

run(main)
"""
    ended = run(tiny_model_path, script)
    assert ended.stdout == "not refused: []\nchild 7\n", ended.stderr
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_new_loop_in_a_forked_child_is_refused_too(tiny_model_path: Path) -> None:
    script = f"""
{FORKED}
async def main():
    await open_everything()
    pid = os.fork()
    if pid == 0:
        with asyncio.Runner() as runner:
            print("not refused:", runner.run(unrefused()), flush=True)
        sys.exit(7)
    wait_for(pid)
    await close_everything()

run(main)
"""
    ended = run(tiny_model_path, script)
    assert ended.stdout == "not refused: []\nchild 7\n", ended.stderr
    assert (ended.returncode, ended.stderr) == (0, "")


def test_worker_processes_may_be_forked_in_the_middle_of_decoding(tiny_model_path: Path) -> None:
    script = f"""
import multiprocessing
{FORKED}
def work(number):
    try:
        model.tokenize("a")
    except llamactor.ClosedError:
        return number * number

async def main():
    await open_everything()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        print(pool.map(work, range(5)), flush=True)
        pool.close()
        pool.join()
    await close_everything()

asyncio.run(main())
"""
    ended = run(tiny_model_path, script)
    assert ended.stdout == "[0, 1, 4, 9, 16]\n", ended.stderr
    assert (ended.returncode, ended.stderr) == (0, "")


# --- closed loops ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ending", ["raise LookupError", "asyncio.current_task().cancel(); await anext(readers[0])"]
)
@pytest.mark.parametrize("kind", ["asyncio", "uvloop"])
def test_a_model_serves_the_next_loop_after_one_that_ended_in_the_middle(
    tiny_model_path: Path, kind: str, ending: str
) -> None:
    script = f"""
import uvloop
{EIGHT}
async def ends():
    await eight()
    {ending}

async def goes_on():
    for prediction in predictions:
        try:
            await prediction
        except RuntimeError:
            prediction.cancel()
    result = await model.complete("once", max_tokens=3)
    await model.aclose()
    print(result.stop_reason)

try:
    with asyncio.Runner(loop_factory={kind}.new_event_loop) as runner:
        runner.run(ends())
except (LookupError, asyncio.CancelledError):
    asyncio.run(goes_on())
"""
    ended = run(tiny_model_path, script)
    assert ended.stdout == "decoding\nmax_tokens\n", ended.stderr
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_loop_may_be_closed_under_what_runs_on_it(tiny_model_path: Path) -> None:
    script = f"""
{EIGHT}
loop = asyncio.new_event_loop()
loop.run_until_complete(eight())
loop.close()
readers.clear()
predictions.clear()

async def goes_on():
    print((await model.complete("once", max_tokens=3)).stop_reason)
    await model.aclose()

asyncio.run(goes_on())
"""
    ended = run(tiny_model_path, script)
    assert ended.stdout == "decoding\nmax_tokens\n", ended.stderr
    assert (ended.returncode, ended.stderr) == (0, "")

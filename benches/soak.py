"""Random traffic on the default model for some minutes: memory, descriptors and threads per minute.

python -m benches.soak [--minutes N] [--clients N] [--seed N] [--model GGUF]

Not a test: it prints figures to look at. It returns 1 when something failed or is left over.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import gc
import os
import random
import time
from collections import Counter
from pathlib import Path

import llamactor
from llamactor import BusyError, Context, Model, Prediction

TEXTS = (
    "Once upon a time",
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Question: why is the sky blue?\nAnswer:",
    "Dear Sir or Madam, I am writing to you because",
)


class Client:
    """Somebody who asks for this and that, and leaves in the middle every now and then."""

    def __init__(self, model: Model, context: Context, rng: random.Random, done: Counter[str]):
        self.model = model
        self.context = context
        self.rng = rng
        self.done = done

    async def work(self, deadline: float) -> None:
        """Do random things until the deadline."""
        things = (self.stream, self.give_up, self.leave, self.branch, self.score, self.long_prompt)
        while time.monotonic() < deadline:
            thing = self.rng.choice(things)
            await thing()
            self.done[thing.__name__] += 1

    def start(self) -> Prediction:
        prompt = self.rng.choice(TEXTS) * self.rng.randrange(1, 6)
        return self.model.complete(
            prompt,
            max_tokens=self.rng.randrange(1, 120),
            temperature=self.rng.choice((0.0, 0.8)),
            logprobs=self.rng.choice((None, 2)),
        )

    async def stream(self) -> None:
        prediction = self.start()
        text = "".join([piece async for piece in prediction])
        assert (await prediction).content == text

    async def give_up(self) -> None:
        prediction = self.start()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.rng.random()):
                await prediction
        await prediction

    async def leave(self) -> None:
        async with self.start() as prediction:
            async for _ in prediction:
                if self.rng.random() < 0.2:
                    break

    async def branch(self) -> None:
        async with self.context.sequence() as sequence:
            await sequence.prefill(self.rng.choice(TEXTS) * 3)
            with contextlib.suppress(BusyError):
                async with await sequence.fork() as branch:
                    await asyncio.gather(
                        branch.predict("And so", max_tokens=8),
                        sequence.predict("But then", max_tokens=8),
                    )

    async def score(self) -> None:
        async with self.context.sequence() as sequence:
            await sequence.score(self.model.tokenize(self.rng.choice(TEXTS) * 4))

    async def long_prompt(self) -> None:
        prediction = self.model.complete(self.rng.choice(TEXTS) * 60, max_tokens=4)
        if self.rng.random() < 0.5:
            await asyncio.sleep(self.rng.random())
            prediction.cancel()
        await prediction


def usage() -> str:
    """Resident memory, threads and descriptors now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    resident = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    threads = len(os.listdir("/proc/self/task"))  # noqa: PTH208 -- counts, no paths wanted
    descriptors = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    return f"RSS {resident:7.1f} MiB   threads {threads:3}   descriptors {descriptors:3}"


async def report(minutes: int, done: Counter[str]) -> None:
    """Print a line per minute."""
    for minute in range(1, minutes + 1):
        await asyncio.sleep(60)
        print(f"minute {minute:3}   {usage()}   things done {done.total():6}", flush=True)


async def soak(ref: str, minutes: int, n_clients: int, seed: int) -> None:
    """Let the clients work, then look whether anything is left."""
    done: Counter[str] = Counter()
    async with (
        llamactor.load_model(ref, context_size=4096, sequences=6, threads=1) as model,
        model.create_context(context_size=2048, sequences=4, threads=1) as context,
    ):
        print(f"loaded       {usage()}", flush=True)
        deadline = time.monotonic() + 60 * minutes
        async with asyncio.TaskGroup() as group:
            group.create_task(report(minutes, done))
            for number in range(n_clients):
                rng = random.Random(f"{seed}-{number}")
                group.create_task(Client(model, context, rng, done).work(deadline))
        held = [await context.sequence(timeout=10) for _ in range(context.sequences)]
        for sequence in held:
            await sequence.clear()
            await sequence.aclose()
        assert context.stats.cells_used == 0
        print(f"at rest      {usage()}   {dict(sorted(done.items()))}", flush=True)
    print(f"closed       {usage()}", flush=True)


def main() -> None:
    """Read the arguments and soak."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=int, default=5)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default=llamactor.store.refs.DEFAULT_MODEL)
    arguments = parser.parse_args()
    asyncio.run(soak(arguments.model, arguments.minutes, arguments.clients, arguments.seed))


if __name__ == "__main__":
    main()

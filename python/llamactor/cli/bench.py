"""``llamactor bench``: how fast a model is here, beside the bare llama.cpp loop."""

from __future__ import annotations

import asyncio
import random
import statistics
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from cyclopts import Group, Parameter

from llamactor._bare import bare_loop
from llamactor.cli.flags import Json, LoadFlags, Reference
from llamactor.cli.tables import show_json, show_table, show_values, size
from llamactor.cli.terminal import Status, Work, loaded, progress
from llamactor.loading import load_model
from llamactor.options import ContextOptions
from llamactor.store.refs import DEFAULT_MODEL
from llamactor.system import system_info

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llamactor._bare import BareLoop
    from llamactor.cli.terminal import Interrupts
    from llamactor.model import Model
    from llamactor.prediction import Prediction

WORK = Group("The work", sort_key=1)
MAX_STREAMS = 256
"""Sequences that a context may have."""
CELLS_TO_SPARE = 64
"""Of the cache, beyond what a case fills."""


class Case(msgspec.Struct, frozen=True):
    """One kind of work."""

    name: str
    """As llama-bench calls it: pp is reading a prompt, tg generating."""
    streams: int
    """Replies at once."""
    prompt_tokens: int
    """Tokens of each prompt."""
    tokens: int
    """Tokens of each reply."""

    @property
    def counted(self) -> int:
        """Tokens that the speed is about: of the reply, or of the prompt where that has but one."""
        return self.streams * (self.tokens if self.tokens > 1 else self.prompt_tokens)


class Speed(msgspec.Struct, frozen=True):
    """Tokens per second of one way to do the work."""

    median: float
    """The median over the rounds."""
    rounds: list[float]
    """Each of them."""

    @classmethod
    def of(cls, case: Case, seconds: Sequence[float]) -> Speed:
        """Return how fast it was."""
        rounds = [case.counted / each for each in seconds]
        return cls(statistics.median(rounds), rounds)


class Result(msgspec.Struct, frozen=True):
    """What a case came to."""

    case: Case
    """The work."""
    llamactor: Speed
    """By predictions, each read to its end."""
    bare: Speed
    """By the bare loop."""
    ratio: float
    """Median of llamactor's speed to that of the bare loop in the same round."""
    ratios: list[float]
    """That of each round."""


class BenchArguments(msgspec.Struct, frozen=True, kw_only=True):
    """What a bench was told."""

    model: str
    """Reference of the model."""
    loading: Any
    """Options of the load."""
    cases: list[Case]
    """The work."""
    rounds: int
    """How often it is done in either way."""
    json: bool
    """Whether the results are for a program."""


def bench(
    ref: Reference = DEFAULT_MODEL,
    /,
    *,
    prompt_tokens: Annotated[int, Parameter(group=WORK, metavar="N")] = 512,
    tokens: Annotated[int, Parameter(group=WORK, metavar="N")] = 64,
    parallel: Annotated[
        tuple[int, ...],
        Parameter(group=WORK, metavar="N", consume_multiple=True),
    ] = (2, 4, 8),
    rounds: Annotated[int, Parameter(group=WORK, metavar="N")] = 5,
    loading: LoadFlags = LoadFlags(),  # noqa: B008 -- frozen
    json: Json = False,
) -> Work:
    """Measure how fast a model is here, beside the bare llama.cpp loop.

    pp512 is a prompt of 512 tokens up to the first token of its reply, tg64 a reply of 64 tokens to
    a prompt of one, "tg64 x 4" four of them at once: tokens per second, of all streams together,
    median over the rounds. Both ways use the same weights, threads and context, the bare loop with
    all streams in one batch; they take turns, and the ratio is that of neighbouring rounds.

    Parameters
    ----------
    prompt_tokens
        Tokens of the long prompt.
    tokens
        Tokens of a reply.
    parallel
        Replies at once, a case for each number.
    rounds
        Times that every case is measured in either way, after once for warmth.
    """
    for name, value, most in (
        ("--prompt-tokens", prompt_tokens, None),
        ("--tokens", tokens, None),
        ("--rounds", rounds, None),
        *(("--parallel", each, MAX_STREAMS) for each in parallel),
    ):
        _require(name, value, most)
    cases = [Case(f"pp{prompt_tokens}", 1, prompt_tokens, 1), Case(f"tg{tokens}", 1, 1, tokens)]
    cases += [Case(f"tg{tokens} x {n}", n, 1, tokens) for n in parallel if n > 1]
    cells = max(case.streams * (case.prompt_tokens + case.tokens) for case in cases)
    arguments = BenchArguments(
        model=ref,
        loading=loading.keywords(
            context_size=cells + CELLS_TO_SPARE, sequences=max(case.streams for case in cases)
        ),
        cases=cases,
        rounds=rounds,
        json=json,
    )
    return partial(_bench, arguments)


def _require(name: str, value: int, most: int | None) -> None:
    if value < 1 or (most is not None and value > most):
        limit = "at least 1" if most is None else f"1 to {most}"
        raise ValueError(f"{name} must be {limit}, not {value}")


async def _bench(arguments: BenchArguments, _: Interrupts) -> int:
    """Measure, show and return the exit status. Cancelling this stops and closes everything."""
    context = {
        name: value
        for name, value in arguments.loading.items()
        if name in ContextOptions.__struct_fields__
    }
    async with (
        await loaded(load_model(arguments.model, **arguments.loading)) as model,
        bare_loop(model, **context) as bare,
    ):
        results = await _measure_all(model, bare, arguments)
        about = _about(model, arguments)
    if arguments.json:
        show_json({**about, "results": results})
    else:
        show_values({**about, "size": size(model.info.size_bytes)})
        _show(results)
    return Status.DONE


def _about(model: Model, arguments: BenchArguments) -> dict[str, object]:
    info = model.info
    return {
        "model": info.name or info.path,
        "quantization": info.quantization,
        "parameters": info.parameters,
        "size": info.size_bytes,
        "options": " ".join(f"{name}={value}" for name, value in arguments.loading.items()),
        "rounds": arguments.rounds,
        "system": system_info(),
    }


def _show(results: list[Result]) -> None:
    rows = [
        (
            result.case.name,
            f"{result.llamactor.median:.1f}",
            f"{result.bare.median:.1f}",
            f"{result.ratio:.3f}",
            f"{min(result.ratios):.2f} to {max(result.ratios):.2f}",
        )
        for result in results
    ]
    columns = ("WORK", "LLAMACTOR t/s", "BARE LOOP t/s", "RATIO", "RANGE")
    show_table(columns, rows, right=columns[1:])


async def _measure_all(model: Model, bare: BareLoop, arguments: BenchArguments) -> list[Result]:
    results: list[Result] = []
    steps = (arguments.rounds + 1) * len(arguments.cases)
    with progress("measuring", total=steps) as bar:
        for number, case in enumerate(arguments.cases):
            ours: list[float] = []
            theirs: list[float] = []
            for index in range(arguments.rounds + 1):
                bar.at(number * (arguments.rounds + 1) + index, what=case.name)
                prompts = [_prompt(model, case, (index, stream)) for stream in range(case.streams)]
                ours.append(await _predictions(model, case, prompts))
                theirs.append((await bare.replies(prompts, case.tokens)).total)
            results.append(_result(case, ours[1:], theirs[1:]))
    return results


def _result(case: Case, ours: list[float], theirs: list[float]) -> Result:
    ratios = [bare / seconds for seconds, bare in zip(ours, theirs, strict=True)]
    return Result(
        case=case,
        llamactor=Speed.of(case, ours),
        bare=Speed.of(case, theirs),
        ratio=statistics.median(ratios),
        ratios=ratios,
    )


def _prompt(model: Model, case: Case, seed: tuple[int, int]) -> list[int]:
    """Return ordinary tokens, others for every seed, so that nothing of them is known before."""
    draw = random.Random(f"{case.name} {seed}")
    tokens: list[int] = []
    while len(tokens) < case.prompt_tokens:
        token = draw.randrange(model.info.vocab_size)
        if model.detokenize([token]):
            tokens.append(token)
    return tokens


async def _predictions(model: Model, case: Case, prompts: list[list[int]]) -> float:
    """Return the seconds that replies take from the first call to the last piece."""
    start = perf_counter()
    try:
        async with asyncio.TaskGroup() as group:
            for prompt in prompts:
                group.create_task(
                    _read(model.complete(prompt, max_tokens=case.tokens, ignore_eos=True))
                )
    except ExceptionGroup as failures:  # the first ends the others
        raise failures.exceptions[0] from None
    return perf_counter() - start


async def _read(prediction: Prediction) -> None:
    async for _ in prediction:
        pass
    await prediction

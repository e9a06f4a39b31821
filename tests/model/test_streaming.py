"""The main job on the default model: load with progress, stream, await, measure, eight at once."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING

import msgspec
import pytest

import llamactor
from llamactor import LoadProgress, Prediction, PredictionResult, PredictionStats
from tests.contexts import soon

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Any

    from tests.conftest import Gate

pytestmark = [pytest.mark.model, pytest.mark.every_loop]

PROMPT = "Once upon a time"
MEASURED = {name for name in PredictionStats.__struct_fields__ if "time" in name or "_per_" in name}


def without_suspending(coroutine: Coroutine[Any, Any, PredictionResult]) -> PredictionResult:
    """What a coroutine returns at its first step; fails if it suspends."""
    with pytest.raises(StopIteration) as finished:
        coroutine.send(None)
    result = finished.value.value
    assert isinstance(result, PredictionResult)
    return result


async def test_load_with_progress_stream_await_at_no_cost_and_print_every_number(
    capsys: pytest.CaptureFixture[str],
) -> None:
    loading = llamactor.load_model("smollm2", context_size=1024, threads=1)
    stages = [progress async for progress in loading]
    assert stages[-1] == LoadProgress("ready", 1.0)
    assert any(0 < progress.fraction < 1 for progress in stages)
    assert all(a.fraction <= b.fraction for a, b in itertools.pairwise(stages))

    async with loading as model:
        prediction = model.complete(PROMPT, max_tokens=24)
        pieces = [text async for text in prediction]
        result = without_suspending(prediction.result())
        assert without_suspending(prediction.result()) is result

        assert len(pieces) > 1
        assert "".join(pieces) == result.content == prediction.text == str(result)
        assert result.stop_reason == "max_tokens"
        assert model.detokenize(result.tokens) == result.content

        for name, value in msgspec.structs.asdict(result.stats).items():
            print(f"{name} = {value}")  # noqa: T201 -- what the program in README does
        shown = dict(line.split(" = ") for line in capsys.readouterr().out.splitlines())
        assert shown.pop("prefix_source") == "None"
        counted = {name: int(value) for name, value in shown.items() if name not in MEASURED}
        n_prompt = len(model.tokenize(PROMPT, add_bos=True))
        assert counted == {
            "prompt_tokens": n_prompt,
            "cached_tokens": 0,
            "predicted_tokens": 24,
            "total_tokens": n_prompt + 24,
            "draft_tokens": 0,
            "accepted_draft_tokens": 0,
            "shifted_tokens": 0,
        }
        assert all(float(shown[name]) > 0 for name in MEASURED)


async def test_the_times_of_a_prediction_add_up(smollm2: llamactor.Model) -> None:
    stats = (await smollm2.complete(PROMPT, max_tokens=8)).stats
    assert stats.time_to_first_token == pytest.approx(stats.queue_time + stats.prefill_time)
    assert stats.total_time == pytest.approx(stats.time_to_first_token + stats.decode_time)
    assert stats.tokens_per_second == pytest.approx(7 / stats.decode_time)


async def test_the_first_piece_arrives_while_the_rest_is_still_to_be_made(
    smollm2: llamactor.Model, gate: Gate
) -> None:
    prediction = smollm2.complete(PROMPT, logits_processor=gate, max_tokens=24)
    gate.allow(1)
    assert await soon(anext(aiter(prediction)))
    assert not prediction.done
    assert prediction.stats.predicted_tokens == 1


async def test_eight_predictions_stream_side_by_side(smollm2: llamactor.Model) -> None:
    begun: set[Prediction] = set()

    async def read(prediction: Prediction) -> str:
        text = ""
        async for piece in prediction:
            text += piece
            begun.add(prediction)
            if len(begun) == 8:
                prediction.cancel()
        return text

    endless: dict[str, Any] = {"ignore_eos": True, "overflow": "rolling_window"}
    predictions = [smollm2.complete(f"Number {number} is", **endless) for number in range(8)]
    texts = await soon(asyncio.gather(*map(read, predictions)))
    results = await soon(asyncio.gather(*predictions))
    assert texts == [result.content for result in results]
    assert {result.stop_reason for result in results} == {"cancelled"}

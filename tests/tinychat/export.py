"""Write a trained network as GGUF: `python -m tests.tinychat.export RUN FILE`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import torch

from tests.tinychat.chatml import CONTROL, END, MARKS, TEMPLATE
from tests.tinychat.network import Shape

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_TYPES = {"F32": gguf.LlamaFileType.ALL_F32, "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}


def export(run: Path, path: Path, kind: str) -> None:
    """Write the last checkpoint of `run`, tokenizer and chat template included."""
    tokenizer = json.loads((run / "tokenizer.json").read_text())
    network = torch.load(run / "checkpoint.pt")["network"]
    writer = gguf.GGUFWriter(path, "qwen3")
    _describe(writer, kind)
    _add_tokenizer(writer, tokenizer)
    for name, weight in network.items():
        _add_tensor(writer, name, weight.float().numpy(), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: gguf.GGUFWriter, kind: str) -> None:
    shape = Shape()
    writer.add_name("tinychat")
    writer.add_description("Tiny chat model for tests, trained from scratch on a synthetic corpus.")
    writer.add_license("MIT")
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.heads)
    writer.add_key_length(shape.head)
    writer.add_value_length(shape.head)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.epsilon)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_file_type(_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: dict[str, Any]) -> None:
    ids: dict[str, int] = tokenizer["model"]["vocab"]
    ids |= {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    tokens = sorted(ids, key=lambda token: ids[token])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([_token_type(token) for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(ids[CONTROL[0]])
    writer.add_eos_token_id(ids[END])
    writer.add_pad_token_id(ids[CONTROL[0]])
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)


def _token_type(token: str) -> gguf.TokenType:
    if token in CONTROL:
        return gguf.TokenType.CONTROL
    return gguf.TokenType.USER_DEFINED if token in MARKS else gguf.TokenType.NORMAL


def _add_tensor(writer: gguf.GGUFWriter, name: str, weight: NDArray[np.float32], kind: str) -> None:
    if weight.ndim == 1 or kind == "F32":
        writer.add_tensor(name, weight)
        return
    quantised = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(name, gguf.quants.quantize(weight, quantised), raw_dtype=quantised)


def main() -> None:
    """Write one file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("path", type=Path)
    parser.add_argument("--type", choices=_TYPES, default="Q8_0")
    arguments = parser.parse_args()
    export(arguments.run, arguments.path, arguments.type)


if __name__ == "__main__":
    main()

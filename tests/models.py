"""Tiny GGUF files with random weights, made on the spot for tests and benches.

Every function writes the same bytes for the same arguments, takes well under a second and returns
the path. `python tests/models.py DIRECTORY` writes one of each.

The weights are random but not careless:

* Queries and keys are scaled so that attention picks out single positions; greedy text then depends
  on the whole prompt and does not fall into a short loop at once.
* Channel 0 of the residual stream is a constant that no layer writes to, so a row of the output
  matrix can carry a bias there. Tokens that are *silent* (special ones, and pieces that are not
  UTF-8 by themselves) get a large negative one: random text is valid UTF-8 and never ends by
  itself, at any sensible temperature. `speaks="bytes"` silences control tokens only,
  `speaks="anything"` nothing.
* `tiny_scripted` says exactly the tokens it was given, for tests that must know the text.
"""

from __future__ import annotations

import os
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice, pairwise, product
from pathlib import Path
from string import ascii_lowercase
from typing import Literal

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize

Array = npt.NDArray[np.float32]
Value = str | bool | int | float | list[str] | list[int] | list[float] | list[bool]
Speaks = Literal["text", "bytes", "anything"]

VOCAB_SIZE = 929
"""Tokens of a vocabulary unless told otherwise; an odd number, as in the published comparisons."""

TRAIN_CONTEXT = 16_384
"""`context_length` of every generated decoder."""

SLIDING_WINDOW = 64
"""Tokens that the sliding layers of `tiny_sliding_window` can see."""

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# --- vocabularies --------------------------------------------------------------------------------

CONTROL = (
    "<|begin|>",
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|pad|>",
    "<|fim_prefix|>",
    "<|fim_suffix|>",
    "<|fim_middle|>",
)
USER_DEFINED = ("<tool_call>", "</tool_call>", "<think>", "</think>")
BOS, EOS, IM_START, IM_END, PAD = range(5)
FIRST_BYTE = len(CONTROL) + len(USER_DEFINED)
"""Id of the token for byte 0 in the byte-pair vocabulary; byte `b` is `FIRST_BYTE + b`."""

_CORPUS = """
the sun was low over the harbour when the old boat came home and nobody on the quay had thought
to wait for it. there were four people who knew the story of that winter, and three of them
would never tell it again. she counted the lights along the water: one, two, three, then
darkness where the mill should have been. "you are late," said the keeper, without turning
round. "we were lost," he answered; "we are still lost." they walked together through the narrow
streets, past the market, past the school with its broken clock, until the road became a path
and the path became sand. every house has a window that looks at the sea. what do you remember
about the storm? nothing, almost nothing, only the sound of stones. in the morning the children
found a letter under the door. it said that there is no such thing as silence, that everything
which has been spoken goes on speaking somewhere, and that whoever reads these words should
write an answer before night. so they began to write. once upon a time there lived a king whose
kingdom was so small that his shadow crossed the border every evening. The teacher asked: how
many numbers are between zero and one? More than I can count, replied the girl. def main():
return print("hello world") if x == 10 else None # comment, with some code, for i in range(100)
1 2 3 4 5 10 20 100 2024 привет мир это письмо для всех été déjà vu naïve café über größe straße
日本語 中文 字 “quoted” — dash… 😀 😁 🙂 🚀 🎉
"""

# Real vocabularies have such tokens too: a space and half a letter, the first half of an emoji.
_STRADDLING = ((" ", "п"), (" ", "р"), ("😀", ""), ("—", ""))


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens and tokenizer metadata, ready to be written."""

    model: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    pieces: tuple[bytes, ...]
    """What each token stands for in text; empty for control tokens."""
    extra: Mapping[str, Value] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.tokens)

    def id(self, piece: str | bytes) -> int:
        """Return the id of the token that stands for `piece`, or of the special token named so."""
        if isinstance(piece, str) and piece in self.tokens:
            return self.tokens.index(piece)
        return self.pieces.index(piece.encode() if isinstance(piece, str) else piece)

    def silent(self, speaks: Speaks) -> list[int]:
        """Return the ids that a random model must never choose."""
        if speaks == "anything":
            return []
        if speaks == "bytes":
            return [i for i, piece in enumerate(self.pieces) if not piece]
        plain = (
            kind == TokenType.NORMAL and _is_text(piece)
            for kind, piece in zip(self.types, self.pieces, strict=True)
        )
        return [i for i, speakable in enumerate(plain) if not speakable]

    def metadata(self) -> dict[str, Value]:
        """Return the `tokenizer.*` entries."""
        own: dict[str, Value] = {
            "tokenizer.ggml.model": self.model,
            "tokenizer.ggml.tokens": list(self.tokens),
            "tokenizer.ggml.token_type": [int(kind) for kind in self.types],
        }
        return own | dict(self.extra)


def byte_tokens(data: bytes | str) -> list[int]:
    """Spell text with one token per byte, unlike the tokenizer (byte-pair vocabulary)."""
    return [FIRST_BYTE + byte for byte in (data.encode() if isinstance(data, str) else data)]


@cache
def bpe_vocabulary(size: int = VOCAB_SIZE) -> Vocabulary:
    """A byte-level vocabulary in the manner of GPT-2: specials, the 256 bytes, then merges."""
    letters = _byte_letters()
    merges = list(islice(_merges(), max(0, size - FIRST_BYTE - 256)))
    words = [a + b for a, b in merges]
    if size != FIRST_BYTE + 256 + len(words):
        raise ValueError(
            f"a byte-level vocabulary has at least {FIRST_BYTE + 256} tokens, got size={size}"
        )
    unletter = {letter: bytes([byte]) for byte, letter in enumerate(letters)}
    texts = [*letters, *words]
    return Vocabulary(
        model="gpt2",
        tokens=(*CONTROL, *USER_DEFINED, *texts),
        types=(
            *[TokenType.CONTROL] * len(CONTROL),
            *[TokenType.USER_DEFINED] * len(USER_DEFINED),
            *[TokenType.NORMAL] * len(texts),
        ),
        pieces=(
            *[b""] * len(CONTROL),
            *(text.encode() for text in USER_DEFINED),
            *(b"".join(unletter[letter] for letter in text) for text in texts),
        ),
        extra={
            "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.merges": [f"{a} {b}" for a, b in merges],
            "tokenizer.ggml.bos_token_id": BOS,
            "tokenizer.ggml.eos_token_id": EOS,
            "tokenizer.ggml.eot_token_id": IM_END,
            "tokenizer.ggml.padding_token_id": PAD,
            "tokenizer.ggml.add_bos_token": False,
            "tokenizer.chat_template": CHATML,
        },
    )


@cache
def spm_vocabulary(size: int = VOCAB_SIZE) -> Vocabulary:
    """A SentencePiece vocabulary with byte fallback, a space prefix and a leading BOS."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    head = ["<unk>", "<s>", "</s>", *bytes_]
    singles = ["▁", *sorted({chr(i) for i in range(33, 127)})]
    words = list(islice(_spm_words(), max(0, size - len(head) - len(singles))))
    texts = [*words, *singles]
    if size != len(head) + len(texts):
        raise ValueError(
            f"this vocabulary has at least {len(head) + len(singles)} tokens, got size={size}"
        )
    return Vocabulary(
        model="llama",
        tokens=(*head, *texts),
        types=(
            TokenType.UNKNOWN,
            *[TokenType.CONTROL] * 2,
            *[TokenType.BYTE] * 256,
            *[TokenType.NORMAL] * len(texts),
        ),
        pieces=(
            *[b""] * 3,
            *(bytes([i]) for i in range(256)),
            *(t.replace("▁", " ").encode() for t in texts),
        ),
        extra={
            # The higher the score, the earlier a merge: same order as in the byte-level vocabulary.
            "tokenizer.ggml.scores": [0.0] * len(head) + [-float(i) for i in range(len(texts))],
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 0,
            "tokenizer.ggml.add_bos_token": True,
            "tokenizer.ggml.add_eos_token": False,
            "tokenizer.ggml.add_space_prefix": True,
        },
    )


@cache
def wordpiece_vocabulary() -> Vocabulary:
    """A WordPiece vocabulary: `▁` starts a word, all else continues one."""
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    letters = [chr(i) for i in range(33, 127) if not chr(i).isupper()]
    texts = [*(f"▁{letter}" for letter in letters), *letters, "▁the", "▁sea", "▁and", "ing"]
    return Vocabulary(
        model="bert",
        tokens=(*special, *texts),
        types=(*[TokenType.CONTROL] * len(special), *[TokenType.NORMAL] * len(texts)),
        pieces=(*[b""] * len(special), *(text.replace("▁", " ").encode() for text in texts)),
        extra={
            "tokenizer.ggml.padding_token_id": 0,
            "tokenizer.ggml.unknown_token_id": 1,
            "tokenizer.ggml.bos_token_id": 2,
            "tokenizer.ggml.seperator_token_id": 3,
            "tokenizer.ggml.mask_token_id": 4,
            "tokenizer.ggml.token_type_count": 2,
        },
    )


def _is_text(piece: bytes) -> bool:
    """Say whether a piece may stand anywhere in UTF-8 text and is not a stray control character."""
    try:
        return piece.decode().strip("\n").isprintable()
    except UnicodeDecodeError:
        return False


@cache
def _byte_letters() -> tuple[str, ...]:
    """Return the printable letter for each byte: GPT-2's table, which the engine knows by heart."""
    own = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return tuple(chr(byte if byte in own else next(spare)) for byte in range(256))


def _spell(text: str) -> str:
    letters = _byte_letters()
    return "".join(letters[byte] for byte in text.encode())


def _merges() -> Iterator[tuple[str, str]]:
    """Yield merges: straddling ones, those the corpus teaches, then half a million of letters."""
    seen: set[str] = set()
    for a, b in (*_straddling_merges(), *_learnt_merges(), *_letter_merges()):
        if a + b not in seen:
            seen.add(a + b)
            yield a, b


def _straddling_merges() -> Iterator[tuple[str, str]]:
    for before, after in _STRADDLING:
        letters = _spell(before + after)
        yield letters[0], letters[1]


def _letter_merges() -> Iterator[tuple[str, str]]:
    for length in (1, 2, 3):
        for *head, last in product(ascii_lowercase, repeat=length + 1):
            yield "".join(head), last


@cache
def _learnt_merges() -> tuple[tuple[str, str], ...]:
    """Learn merges from the corpus, most frequent pair first, ties in alphabetical order."""
    words: Counter[tuple[str, ...]] = Counter(tuple(_spell(" " + word)) for word in _CORPUS.split())
    learnt: list[tuple[str, str]] = []
    while pairs := _pairs(words):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        learnt.append(best)
        words = Counter({_join(word, best): n for word, n in words.items()})
    return tuple(learnt)


def _pairs(words: Mapping[tuple[str, ...], int]) -> Counter[tuple[str, str]]:
    pairs: Counter[tuple[str, str]] = Counter()
    for word, count in words.items():
        for pair in pairwise(word):
            pairs[pair] += count
    return pairs


def _join(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    joined: list[str] = []
    for letter in word:
        if joined and (joined[-1], letter) == pair:
            joined[-1] += letter
        else:
            joined.append(letter)
    return tuple(joined)


def _spm_words() -> Iterator[str]:
    space = _byte_letters()[32]
    for a, b in _merges():
        word = (a + b).replace(space, "▁")
        if word.replace("▁", "").isascii():
            yield word


# --- weights -------------------------------------------------------------------------------------


class Weights:
    """Random tensors under the names that llama.cpp looks for; shapes are (rows, columns)."""

    def __init__(self, seed: int) -> None:
        """Start empty."""
        self._random = np.random.default_rng(seed)
        self.tensors: dict[str, Array] = {}

    def matrix(self, name: str, rows: int, columns: int, gain: float = 1.0) -> Array:
        """Add a matrix that keeps the scale of what it is applied to, times `gain`."""
        tensor = self._random.standard_normal((rows, columns), dtype=np.float32) * np.float32(
            gain / columns**0.5
        )
        self.tensors[name] = tensor
        return tensor

    def residual(self, name: str, rows: int, columns: int, gain: float = 1.0) -> None:
        """Add a matrix that writes to the residual stream, where channel 0 stays as it is."""
        self.matrix(name, rows, columns, gain)[0] = 0

    def fill(self, name: str, value: float, *shape: int) -> None:
        """Add a tensor of one value."""
        self.tensors[name] = np.full(shape, value, dtype=np.float32)

    def tokens(self, vocab: int, width: int, silent: Sequence[int]) -> None:
        """Add embedding and output matrix."""
        self.matrix("token_embd.weight", vocab, width, gain=width**0.5)[:, 0] = 1
        self.fill("output_norm.weight", 1, width)
        output = self.matrix("output.weight", vocab, width, gain=3)
        output[:, 0] = 0
        output[list(silent), 0] = -200

    def attention(self, block: str, width: int, heads: int, kv_heads: int, head_width: int) -> None:
        """Add the four matrices of an attention layer."""
        self.matrix(f"{block}.attn_q.weight", heads * head_width, width, gain=2)
        self.matrix(f"{block}.attn_k.weight", kv_heads * head_width, width, gain=2)
        self.matrix(f"{block}.attn_v.weight", kv_heads * head_width, width, gain=1.5)
        self.residual(f"{block}.attn_output.weight", width, heads * head_width, gain=1.5)

    def feed_forward(self, block: str, width: int, inner: int) -> None:
        """Add a gated feed-forward layer with its norm."""
        self.fill(f"{block}.ffn_norm.weight", 1, width)
        self.matrix(f"{block}.ffn_gate.weight", inner, width)
        self.matrix(f"{block}.ffn_up.weight", inner, width)
        self.residual(f"{block}.ffn_down.weight", width, inner, gain=2)

    def mamba(self, block: str, width: int, state: int, rank: int, conv: int) -> None:
        """Add a selective state space layer (Mamba 1)."""
        inner = 2 * width
        self.matrix(f"{block}.ssm_in.weight", 2 * inner, width)
        self.matrix(f"{block}.ssm_conv1d.weight", inner, conv)
        self.fill(f"{block}.ssm_conv1d.bias", 0, inner)
        self.matrix(f"{block}.ssm_x.weight", rank + 2 * state, inner, gain=2)
        self.matrix(f"{block}.ssm_dt.weight", inner, rank)
        self.fill(f"{block}.ssm_dt.bias", -2, inner)
        # Decay rates 1, 2, ... as Mamba is initialised: some channels forget fast, others slowly.
        self.tensors[f"{block}.ssm_a"] = np.tile(
            -np.arange(1, state + 1, dtype=np.float32), (inner, 1)
        )
        self.fill(f"{block}.ssm_d", 1, inner)
        self.residual(f"{block}.ssm_out.weight", width, inner, gain=2)


def _write(
    path: Path | str,
    architecture: str,
    metadata: Mapping[str, Value],
    tensors: Mapping[str, Array],
    *,
    quantised: bool = False,
    parts: int = 1,
) -> Path:
    """Write a GGUF file, or `parts` of them; `.key` stands for `ARCHITECTURE.key`."""
    path = Path(path)
    per_part = -(-len(tensors) // parts) if parts > 1 else 0
    writer = GGUFWriter(path, architecture, split_max_tensors=per_part)
    for key, value in metadata.items():
        _add(writer, architecture + key if key.startswith(".") else key, value)
    for name, tensor in tensors.items():
        if quantised and _quantisable(name, tensor):
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(name, quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: GGUFWriter, key: str, value: Value) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def _quantisable(name: str, tensor: Array) -> bool:
    return (
        tensor.ndim == 2
        and tensor.shape[1] % 32 == 0
        and not name.endswith(("conv1d.weight", "ssm_a"))
    )


def _decoder_metadata(
    name: str, width: int, layers: int, inner: int, context: int
) -> dict[str, Value]:
    return {
        "general.type": "model",
        "general.name": name,
        ".context_length": context,
        ".embedding_length": width,
        ".block_count": layers,
        ".feed_forward_length": inner,
        ".attention.layer_norm_rms_epsilon": 1e-5,
    }


def _llama_metadata(
    width: int, layers: int, heads: int, kv_heads: int, context: int, size: int
) -> dict[str, Value]:
    return _decoder_metadata("tiny llama", width, layers, 2 * width, context) | {
        ".attention.head_count": heads,
        ".attention.head_count_kv": kv_heads,
        ".rope.dimension_count": width // heads,
        ".vocab_size": size,
    }


def _llama_weights(
    width: int, layers: int, heads: int, kv_heads: int, seed: int, size: int, silent: list[int]
) -> Weights:
    weights = Weights(seed)
    weights.tokens(size, width, silent)
    for layer in range(layers):
        block = f"blk.{layer}"
        weights.fill(f"{block}.attn_norm.weight", 1, width)
        weights.attention(block, width, heads, kv_heads, width // heads)
        weights.feed_forward(block, width, 2 * width)
    return weights


# --- models --------------------------------------------------------------------------------------


def tiny_llama(
    path: Path | str,
    *,
    width: int = 64,
    layers: int = 4,
    vocab: int = VOCAB_SIZE,
    context: int = TRAIN_CONTEXT,
    heads: int = 2,
    kv_heads: int = 1,
    seed: int = 0,
    quantised: bool = False,
    speaks: Speaks = "text",
    parts: int = 1,
    extra: Mapping[str, Value] | None = None,
) -> Path:
    """A plain Llama with a byte-level vocabulary: everything can be shared, cut and shifted.

    Args:
        path: The file to write.
        width: Size of an embedding; a multiple of 32 times `heads`, so that quantised caches work.
        layers: Number of layers.
        vocab: Number of tokens.
        context: `context_length` to claim.
        heads: Number of query heads.
        kv_heads: Number of key and value heads.
        seed: Other seed, other weights.
        quantised: Matrices as Q8_0 instead of F32.
        speaks: Which tokens may be chosen, see the module.
        parts: Write that many files, `STEM-00001-of-0000N.gguf`, instead of one.
        extra: Further metadata, or other values for what is written anyway.
    """
    vocabulary = bpe_vocabulary(vocab)
    metadata = (
        _llama_metadata(width, layers, heads, kv_heads, context, vocab)
        | vocabulary.metadata()
        | dict(extra or {})
    )
    weights = _llama_weights(width, layers, heads, kv_heads, seed, vocab, vocabulary.silent(speaks))
    return _write(path, "llama", metadata, weights.tensors, quantised=quantised, parts=parts)


def tiny_split(directory: Path | str, *, parts: int = 3, name: str = "tiny-split") -> list[Path]:
    """`tiny_llama` in several files; returns their paths, the first part first."""
    directory = Path(directory)
    tiny_llama(directory / f"{name}.gguf", parts=parts)
    return [directory / f"{name}-{i + 1:05}-of-{parts:05}.gguf" for i in range(parts)]


def tiny_spm(path: Path | str, *, seed: int = 0, speaks: Speaks = "text") -> Path:
    """`tiny_llama` with a SentencePiece vocabulary: byte fallback, space prefix, BOS in front."""
    vocabulary = spm_vocabulary()
    size = len(vocabulary)
    metadata = _llama_metadata(64, 4, 2, 1, TRAIN_CONTEXT, size) | vocabulary.metadata()
    weights = _llama_weights(64, 4, 2, 1, seed, size, vocabulary.silent(speaks))
    return _write(path, "llama", metadata, weights.tensors)


def tiny_scripted(
    path: Path | str,
    script: Sequence[int],
    *,
    then: int | None = None,
    context: int = TRAIN_CONTEXT,
) -> Path:
    """A Llama that says `script` after any prompt, at any sensible temperature.

    Each token of the script leads to the next one, whatever stood before; any other token leads to
    the first. Prompts that end in a token of the script continue from there.

    Args:
        path: The file to write.
        script: Different ids of the byte-level vocabulary, see `byte_tokens` and `Vocabulary.id`.
        then: What follows the last one: `EOS` ends the text; `None` starts over.
        context: `context_length` to claim.
    """
    if not script or len(set(script)) != len(script) or then in script:
        raise ValueError(f"a script has distinct tokens, got {list(script)} and then={then}")
    width, vocabulary = 64, bpe_vocabulary()
    size = len(vocabulary)
    weights = _llama_weights(width, 1, 2, 1, 0, size, [])
    tensors = weights.tensors
    for name in ("blk.0.attn_output.weight", "blk.0.ffn_down.weight"):
        tensors[name][:] = 0  # the layer adds nothing: what goes in comes out
    embedding, output = tensors["token_embd.weight"], tensors["output.weight"]
    successors = [*script[1:], script[0] if then is None else then]
    keys = _directions(len(script), width - 1)
    embedding[:, 1:] = 0
    embedding[list(script), 1:] = keys
    output[:] = 0
    output[:, 0] = -200
    output[successors, 1:] = 8 * keys
    output[successors, 0] = 0
    output[script[0], 0] = 8
    metadata = _llama_metadata(width, 1, 2, 1, context, size) | vocabulary.metadata()
    return _write(path, "llama", metadata, tensors)


def _directions(count: int, width: int) -> Array:
    """Return vectors of length 3: at right angles while there are few, far apart when many."""
    rows = np.random.default_rng(1).standard_normal((count, width), dtype=np.float32)
    if count <= width:
        rows = np.linalg.qr(rows.T)[0].T
    return np.asarray(3 * rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float32)


def tiny_sliding_window(path: Path | str, *, window: int = SLIDING_WINDOW, seed: int = 0) -> Path:
    """Gemma 3 with a small window: layers 0 and 2 see `window` tokens, layers 1 and 3 all."""
    width, layers, heads, kv_heads, head_width, vocabulary = 64, 4, 2, 1, 32, bpe_vocabulary()
    weights = Weights(seed)
    weights.tokens(len(vocabulary), width, vocabulary.silent("text"))
    for layer in range(layers):
        block = f"blk.{layer}"
        for norm, size in {
            "attn_norm": width,
            "attn_q_norm": head_width,
            "attn_k_norm": head_width,
        }.items():
            weights.fill(f"{block}.{norm}.weight", 2 if size == head_width else 1, size)
        weights.attention(block, width, heads, kv_heads, head_width)
        weights.feed_forward(block, width, 2 * width)
        # The embedding is scaled by the root of the width (8), the layers must keep up with it.
        weights.fill(f"{block}.post_attention_norm.weight", 8, width)
        weights.fill(f"{block}.post_ffw_norm.weight", 8, width)
    metadata = _decoder_metadata("tiny gemma3", width, layers, 2 * width, TRAIN_CONTEXT) | {
        ".attention.head_count": heads,
        ".attention.head_count_kv": kv_heads,
        ".attention.key_length": head_width,
        ".attention.value_length": head_width,
        ".attention.sliding_window": window,
        ".attention.sliding_window_pattern": [True, False] * (layers // 2),
    }
    return _write(path, "gemma3", metadata | vocabulary.metadata(), weights.tensors)


def tiny_recurrent(path: Path | str, *, seed: int = 0) -> Path:
    """Mamba: the past is one state per sequence, of which no part can be removed."""
    width, layers, vocabulary = 64, 3, bpe_vocabulary()
    weights = Weights(seed)
    weights.tokens(len(vocabulary), width, vocabulary.silent("text"))
    for layer in range(layers):
        weights.fill(f"blk.{layer}.attn_norm.weight", 1, width)
        weights.mamba(f"blk.{layer}", width, state=8, rank=4, conv=4)
    metadata = _decoder_metadata("tiny mamba", width, layers, 0, TRAIN_CONTEXT) | _mamba_metadata(
        width
    )
    metadata |= {".attention.head_count": 0}
    return _write(path, "mamba", metadata | vocabulary.metadata(), weights.tensors)


def tiny_hybrid(path: Path | str, *, seed: int = 0) -> Path:
    """Jamba: layers 0 and 2 are recurrent, 1 and 3 attend. Its state cannot be rolled back."""
    width, layers, heads, vocabulary = 64, 4, 2, bpe_vocabulary()
    weights = Weights(seed)
    weights.tokens(len(vocabulary), width, vocabulary.silent("text"))
    for layer in range(layers):
        block = f"blk.{layer}"
        weights.fill(f"{block}.attn_norm.weight", 1, width)
        if layer % 2:
            weights.attention(block, width, heads, 1, width // heads)
        else:
            weights.mamba(block, width, state=8, rank=4, conv=4)
            for norm, size in {"ssm_dt_norm": 4, "ssm_b_norm": 8, "ssm_c_norm": 8}.items():
                weights.fill(f"{block}.{norm}.weight", 1, size)
        weights.feed_forward(block, width, 2 * width)
    metadata = _decoder_metadata(
        "tiny jamba", width, layers, 2 * width, TRAIN_CONTEXT
    ) | _mamba_metadata(width)
    metadata |= {".attention.head_count": heads, ".attention.head_count_kv": [0, 1] * (layers // 2)}
    return _write(path, "jamba", metadata | vocabulary.metadata(), weights.tensors)


def tiny_hybrid_rollback(path: Path | str, *, seed: int = 0) -> Path:
    """LFM2: layers 0 and 2 convolve, 1 and 3 attend. Rolls back up to `n_rs_seq` tokens."""
    width, layers, heads, vocabulary = 64, 4, 2, bpe_vocabulary()
    weights = Weights(seed)
    weights.tokens(len(vocabulary), width, vocabulary.silent("text"))
    weights.tensors["token_embd_norm.weight"] = weights.tensors.pop("output_norm.weight")
    for layer in range(layers):
        block = f"blk.{layer}"
        weights.fill(f"{block}.attn_norm.weight", 1, width)
        if layer % 2:
            weights.attention(block, width, heads, 1, width // heads)
            weights.fill(f"{block}.attn_q_norm.weight", 2, width // heads)
            weights.fill(f"{block}.attn_k_norm.weight", 2, width // heads)
        else:
            weights.matrix(f"{block}.shortconv.conv.weight", width, 3, gain=1.5)
            weights.matrix(f"{block}.shortconv.in_proj.weight", 3 * width, width)
            weights.residual(f"{block}.shortconv.out_proj.weight", width, width, gain=1.5)
        weights.feed_forward(block, width, 2 * width)
    metadata = _decoder_metadata("tiny lfm2", width, layers, 2 * width, TRAIN_CONTEXT) | {
        ".attention.head_count": heads,
        ".attention.head_count_kv": [0, 1] * (layers // 2),
        ".shortconv.l_cache": 3,
    }
    return _write(path, "lfm2", metadata | vocabulary.metadata(), weights.tensors)


def _mamba_metadata(width: int) -> dict[str, Value]:
    return {
        ".ssm.conv_kernel": 4,
        ".ssm.inner_size": 2 * width,
        ".ssm.state_size": 8,
        ".ssm.time_step_rank": 4,
    }


def tiny_encoder(path: Path | str, *, seed: int = 0) -> Path:
    """BERT: makes embeddings and has no memory; it cannot complete anything."""
    width, layers, inner, context, vocabulary = 64, 2, 128, 512, wordpiece_vocabulary()
    weights = Weights(seed)
    weights.matrix("token_embd.weight", len(vocabulary), width, gain=width**0.5)
    weights.matrix("token_types.weight", 2, width)
    weights.matrix("position_embd.weight", context, width)
    _layer_norm(weights, "token_embd_norm", width)
    for layer in range(layers):
        block = f"blk.{layer}"
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            _linear(weights, f"{block}.{part}", width, width)
        _layer_norm(weights, f"{block}.attn_output_norm", width)
        _linear(weights, f"{block}.ffn_up", inner, width)
        _linear(weights, f"{block}.ffn_down", width, inner)
        _layer_norm(weights, f"{block}.layer_output_norm", width)
    metadata = _decoder_metadata("tiny bert", width, layers, inner, context) | {
        ".attention.head_count": 2,
        ".attention.layer_norm_epsilon": 1e-12,
        ".attention.causal": False,
        ".pooling_type": 1,
    }
    return _write(path, "bert", metadata | vocabulary.metadata(), weights.tensors)


def _linear(weights: Weights, name: str, rows: int, columns: int) -> None:
    weights.matrix(f"{name}.weight", rows, columns)
    weights.fill(f"{name}.bias", 0, rows)


def _layer_norm(weights: Weights, name: str, size: int) -> None:
    weights.fill(f"{name}.weight", 1, size)
    weights.fill(f"{name}.bias", 0, size)


def vocabulary_only(
    path: Path | str,
    controls: Sequence[str],
    *,
    bos: str,
    eos: str,
    adds_bos: bool = False,
    template: str | None = None,
) -> Path:
    """The byte-level vocabulary with other control tokens, for loading with vocab_only=True.

    Args:
        path: The file to write.
        controls: Texts of the control tokens; those of the user and the bytes stay.
        bos: Which of them begins a text.
        eos: Which of them ends a turn.
        adds_bos: Whether prompts begin with `bos`.
        template: The chat template.
    """
    plain = bpe_vocabulary()
    count = len(plain) - len(CONTROL) + len(controls)
    metadata = _llama_metadata(64, 1, 2, 1, TRAIN_CONTEXT, count) | plain.metadata()
    metadata |= {
        "tokenizer.ggml.tokens": [*controls, *plain.tokens[len(CONTROL) :]],
        "tokenizer.ggml.token_type": [
            *[int(TokenType.CONTROL)] * len(controls),
            *(int(kind) for kind in plain.types[len(CONTROL) :]),
        ],
        "tokenizer.ggml.bos_token_id": controls.index(bos),
        "tokenizer.ggml.eos_token_id": controls.index(eos),
        "tokenizer.ggml.eot_token_id": controls.index(eos),
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": adds_bos,
    }
    del metadata["tokenizer.chat_template"]
    if template is not None:
        metadata["tokenizer.chat_template"] = template
    weights = _llama_weights(64, 1, 2, 1, 0, count, [])
    return _write(path, "llama", metadata, weights.tensors)


def no_vocab(path: Path | str) -> Path:
    """A valid Llama without a tokenizer: loads, but any question about text kills llama.cpp."""
    metadata = _llama_metadata(64, 1, 2, 1, TRAIN_CONTEXT, VOCAB_SIZE) | {
        "tokenizer.ggml.model": "no_vocab"
    }
    return _write(path, "llama", metadata, _llama_weights(64, 1, 2, 1, 0, VOCAB_SIZE, []).tensors)


def tiny_lora(
    path: Path | str,
    *,
    width: int = 64,
    layers: int = 4,
    heads: int = 2,
    kv_heads: int = 1,
    rank: int = 4,
    alpha: float = 8.0,
    seed: int = 0,
    architecture: str = "llama",
    extra: Mapping[str, Value] | None = None,
) -> Path:
    """A LoRA adapter for a `tiny_llama` of the same shape, strong enough to change what it says."""
    head_width = width // heads
    targets = {
        "attn_q": (heads * head_width, width),
        "attn_v": (kv_heads * head_width, width),
        "ffn_up": (2 * width, width),
    }
    weights = Weights(1000 + seed)
    for layer in range(layers):
        for target, (rows, columns) in targets.items():
            weights.matrix(f"blk.{layer}.{target}.weight.lora_a", rank, columns)
            weights.matrix(f"blk.{layer}.{target}.weight.lora_b", rows, rank, gain=0.5)
    metadata: dict[str, Value] = {
        "general.type": "adapter",
        "general.name": "tiny adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": alpha,
    }
    return _write(path, architecture, metadata | dict(extra or {}), weights.tensors)


# --- files that must be refused ------------------------------------------------------------------

Patch = Callable[[bytearray], bytearray]


def malformed(directory: Path | str) -> dict[str, Path]:
    """Write broken files (and worse things that have a path): each is wrong in exactly one way.

    The names say what is wrong. Nobody may open `fifo` without `O_NONBLOCK`: it has no writer.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    seed = directory / "good.gguf"
    good = tiny_llama(
        seed, width=32, layers=2, heads=1, extra={"general.alignment": 32}
    ).read_bytes()
    seed.unlink()
    paths = {name: directory / f"{name}.gguf" for name in ("directory", "fifo", *_PATCHES)}
    paths["directory"].mkdir(exist_ok=True)
    paths["fifo"].unlink(missing_ok=True)
    os.mkfifo(paths["fifo"])
    for name, patch in _PATCHES.items():
        paths[name].write_bytes(patch(bytearray(good)))
    return paths


def _cut(at: int) -> Patch:
    return lambda data: data[:at]


def _cut_after(text: bytes, more: int) -> Patch:
    return lambda data: data[: data.index(text) + len(text) + more]


def _whole(text: bytes) -> Patch:
    return lambda _: bytearray(text)


def _put(layout: str, at: int, value: int) -> Patch:
    """Overwrite a number at a fixed place."""
    return _put_after(b"", at, layout, value)


def _put_after(text: bytes, at: int, layout: str, value: int) -> Patch:
    """Overwrite a number that stands `at` bytes behind the first occurrence of `text`."""

    def patch(data: bytearray) -> bytearray:
        struct.pack_into("<" + layout, data, data.index(text) + len(text) + at, value)
        return data

    return patch


def _rename(old: bytes, new: bytes) -> Patch:
    """Overwrite the first occurrence of a name with another of the same length."""

    def patch(data: bytearray) -> bytearray:
        at = data.index(old)
        data[at : at + len(old)] = new
        return data

    return patch


# Layout: magic, version (at 4), tensor count (8), entry count (16), entries (24): key length, key,
# type, value (an array: element type, length, elements); tensors: name length, name, dimension
# count, dimensions, type, offset.
_TOKENS, _CONTEXT, _ALIGNMENT = (
    b"tokenizer.ggml.tokens",
    b"llama.context_length",
    b"general.alignment",
)
_MATRIX, _NORM = b"output.weight", b"blk.0.attn_norm.weight"

_PATCHES: dict[str, Patch] = {
    "empty": _cut(0),
    "only_magic": _cut(4),
    "truncated_header": _cut(20),
    "truncated_key": _cut(24 + 8 + 5),
    "truncated_metadata": _cut_after(_TOKENS, 200),
    "truncated_tensor_info": _cut_after(_MATRIX, 10),
    "truncated_data": lambda data: data[:-100],
    "no_data": _cut_after(b"output_norm.weight", 24),
    "html": _whole(
        b"<!DOCTYPE html>\n<html><head><title>404</title></head><body>Not found</body></html>\n" * 9
    ),
    "lfs_pointer": _whole(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 143000000\n"
    ),
    "zeros": _whole(bytes(4096)),
    "unknown_architecture": _rename(b"llama", b"lemma"),
    "wrong_magic": _rename(b"GGUF", b"GGML"),
    "version_0": _put("I", 4, 0),
    "version_1": _put("I", 4, 1),
    "version_99": _put("I", 4, 99),
    "big_endian": _put("I", 4, 3 << 24),
    "absurd_tensor_count": _put("Q", 8, 1 << 60),
    "negative_tensor_count": _put("q", 8, -1),
    "tensor_count_too_high": lambda data: _put("Q", 8, int.from_bytes(data[8:16], "little") + 1)(
        data
    ),
    "absurd_metadata_count": _put("Q", 16, 1 << 60),
    "negative_metadata_count": _put("q", 16, -1),
    "key_length_past_end": _put("Q", 24, 1 << 40),
    "key_length_overflow": _put("Q", 24, (1 << 64) - 1),
    "key_length_zero": _put("Q", 24, 0),
    "string_length_past_end": _put_after(b"general.architecture", 4, "Q", 1 << 40),
    "string_length_overflow": _put_after(b"general.architecture", 4, "Q", (1 << 64) - 1),
    "unknown_value_type": _put_after(_CONTEXT, 0, "I", 77),
    "unknown_element_type": _put_after(_TOKENS, 4, "I", 77),
    "nested_array": _put_after(_TOKENS, 4, "I", 9),
    "array_length_past_end": _put_after(_TOKENS, 8, "Q", 1 << 40),
    "array_length_overflow": _put_after(_TOKENS, 8, "Q", (1 << 64) - 1),
    "duplicate_key": _rename(b"general.name", b"general.type"),
    "alignment_0": _put_after(_ALIGNMENT, 4, "I", 0),
    "alignment_3": _put_after(_ALIGNMENT, 4, "I", 3),
    "alignment_huge": _put_after(_ALIGNMENT, 4, "I", 1 << 31),
    "alignment_wrong_type": _put_after(_ALIGNMENT, 0, "I", 6),
    "context_length_wrong_type": _put_after(_CONTEXT, 0, "I", 6),
    "duplicate_tensor": _rename(b"blk.1.attn_q.weight", b"blk.0.attn_q.weight"),
    "tensor_name_length_past_end": lambda data: _put("Q", data.index(_NORM) - 8, 1 << 40)(data),
    "too_many_dimensions": _put_after(_MATRIX, 0, "I", 5),
    "absurd_dimension_count": _put_after(_MATRIX, 0, "I", (1 << 32) - 1),
    "negative_dimension": _put_after(_MATRIX, 4, "q", -32),
    "zero_dimension": _put_after(_MATRIX, 4, "Q", 0),
    "dimension_product_overflow": _put_after(_MATRIX, 4, "Q", 1 << 62),
    "dimension_bytes_overflow": _put_after(_MATRIX, 4, "Q", (1 << 63) // VOCAB_SIZE),
    "tensor_past_end": _put_after(_MATRIX, 4, "Q", 1 << 30),
    "unknown_tensor_type": _put_after(_MATRIX, 20, "I", 999),
    "removed_tensor_type": _put_after(_MATRIX, 20, "I", 4),
    "rows_not_whole_blocks": _put_after(_MATRIX, 20, "I", 12),
    "tensor_offset_past_end": _put_after(_MATRIX, 24, "Q", 1 << 40),
    "tensor_offset_overflow": _put_after(_MATRIX, 24, "Q", (1 << 64) - 32),
    "tensor_offset_unaligned": _put_after(_MATRIX, 24, "Q", 1),
    "tensors_overlap": _put_after(_MATRIX, 24, "Q", 0),
}


def poisoned(directory: Path | str) -> dict[str, Path]:
    """Write files with a sound header and values in it that no model can have.

    A header check alone lets them through; llama.cpp aborts the process on some and refuses others.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    return {
        name: tiny_llama(directory / f"{name}.gguf", layers=1, extra=extra)
        for name, extra in _POISON.items()
    }


def poisoned_loras(directory: Path | str) -> dict[str, Path]:
    """Write LoRA adapters with metadata of a wrong type: llama.cpp aborts on each."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    return {
        name: tiny_lora(directory / f"{name}.gguf", extra=extra)
        for name, extra in _LORA_POISON.items()
    }


def _same_token_twice() -> list[str]:
    return [*bpe_vocabulary().tokens[:-1], bpe_vocabulary().tokens[-2]]


_POISON: dict[str, Mapping[str, Value]] = {
    "no_layers": {".block_count": 0},
    "too_many_layers": {".block_count": 100_000},
    "more_layers_than_tensors": {".block_count": 2},
    "no_heads": {".attention.head_count": 0},
    "no_kv_heads": {".attention.head_count_kv": 0},
    "more_kv_heads_than_heads": {".attention.head_count_kv": 7},
    "uneven_heads": {".attention.head_count": 3},
    "no_width": {".embedding_length": 0},
    "no_context": {".context_length": 0},
    "huge_context": {".context_length": 0xFFFF_FFFF},
    "context_is_text": {".context_length": "many"},
    "experts_used_but_none": {".expert_used_count": 2},
    "too_many_experts": {".expert_count": 1_000_000, ".expert_used_count": 1},
    "rope_scaling_unknown": {".rope.scaling.type": "nonsense"},
    "rope_dimension_odd": {".rope.dimension_count": 31},
    "token_twice": {"tokenizer.ggml.tokens": _same_token_twice()},
    "token_types_short": {"tokenizer.ggml.token_type": [1]},
    "tokens_are_numbers": {"tokenizer.ggml.tokens": [1, 2, 3]},
    "merges_are_numbers": {"tokenizer.ggml.merges": [1, 2, 3]},
    "tokenizer_unknown": {"tokenizer.ggml.model": "llamactor"},
    "pretokenizer_unknown": {"tokenizer.ggml.pre": "llamactor"},
    "bos_out_of_range": {"tokenizer.ggml.bos_token_id": 1 << 20},
    "split_count_without_parts": {"split.count": 3, "split.no": 0},
}


_LORA_POISON: dict[str, Mapping[str, Value]] = {
    "type_is_number": {"general.type": 3},
    "adapter_type_is_number": {"adapter.type": 3},
    "alpha_is_text": {"adapter.lora.alpha": "strong"},
}


def write_all(directory: Path | str) -> list[Path]:
    """Write one of each good model."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    makers: Iterable[Callable[[Path], Path]] = (
        tiny_llama,
        tiny_spm,
        tiny_sliding_window,
        tiny_recurrent,
        tiny_hybrid,
        tiny_hybrid_rollback,
        tiny_encoder,
        tiny_lora,
        no_vocab,
    )
    paths = [make(directory / f"{make.__name__}.gguf") for make in makers]
    paths.append(tiny_llama(directory / "tiny_llama_q8_0.gguf", quantised=True))
    paths.append(tiny_scripted(directory / "tiny_scripted.gguf", byte_tokens("scrıpt"), then=EOS))
    return paths + tiny_split(directory)


def main(directory: Path) -> None:
    """Write everything there is and list it."""
    broken = malformed(directory / "malformed") | poisoned(directory / "poisoned")
    broken |= poisoned_loras(directory / "poisoned_loras")
    for path in [*write_all(directory), *broken.values()]:
        sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""The vocabulary: byte-level BPE that llama.cpp reads as `gpt2` with the pre-tokenizer `qwen2`.

Merges are learnt on runs of letters alone, so that `Ada`, ` Ada` and `"Ada` share their tokens and
copying a word is copying tokens. Frequent words then get a merge with the space before them.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.tinychat.chatml import CONTROL, MARKS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SHORT = ("a", "is", "of", "to", "in", "I", "an", "it", "on", "or", "at", "the")
_SPACE = "Ġ"


def train(texts: Sequence[str], size: int, spaced: int) -> Tokenizer:
    """Learn a vocabulary of `size` entries, `spaced` of them words with their space."""
    texts = [_unmarked(text) for text in texts]
    learnt = _learnt(texts, size - spaced - len(CONTROL) - len(MARKS))
    vocabulary, merges = learnt["vocab"], [tuple(merge) for merge in learnt["merges"]]
    for word in _frequent(texts, vocabulary)[:spaced]:
        vocabulary.setdefault(_SPACE + word, len(vocabulary))
        merges.append((_SPACE, word))
    return _assembled(vocabulary, merges)


def _unmarked(text: str) -> str:
    for mark in CONTROL + MARKS:
        text = text.replace(mark, " ")
    return text


def _bytes() -> pre_tokenizers.ByteLevel:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def _splits(*patterns: str) -> pre_tokenizers.Sequence:
    parts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*parts, _bytes()])


def _learnt(texts: Iterable[str], size: int) -> dict[str, Any]:
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = _splits(_QWEN2, r"\p{L}+")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, max_token_length=12, show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    model: dict[str, Any] = json.loads(learner.to_str())["model"]
    return model


def _frequent(texts: Iterable[str], vocabulary: dict[str, int]) -> list[str]:
    """Words that are one token and stand after a space, the most frequent first."""
    words = Counter(word.strip(".,:?!") for text in texts for word in text.split(" ")[1:])
    long_enough = (word for word, _ in words.most_common() if len(word) > 2 or word in _SHORT)
    plain = (word for word in long_enough if word.isascii() and word.isalpha())
    return [word for word in plain if word in vocabulary]


def _assembled(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = _splits(_QWEN2)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*CONTROL])
    tokenizer.add_tokens([*MARKS])
    return tokenizer

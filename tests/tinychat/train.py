"""Train the chat model: `python -m tests.tinychat.train RUN --steps N` writes into the folder RUN.

A run is a function of its arguments: no clock, one thread, fixed seeds. Stopped, it goes on from
its last checkpoint as if it had not been. The learning rate stands still until the last part of
the run, so a run that was stopped before that part can be given another number of steps.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from tests.tinychat import tokenizer
from tests.tinychat.chatml import Conversation, write
from tests.tinychat.corpus import conversations
from tests.tinychat.network import Network, Shape
from tests.tinychat.words import Draw

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

LONGEST = 1536
_GRAIN = 32
_POOL = 2500
_SHORT_FIRST = (96, 96, 96, 160, 160, 160, 256, 256, 400)
"""The longest talks of the first pools, in tokens: copying is learnt best from short ones."""
_WARMUP = 120
_DECAY = 0.4
"""The part of the run, at its end, in which the learning rate falls."""
_LOWEST = 0.02
_RATES = (5e-3, 3e-3)
_BESIDE = 0.1
"""What a token counts that the assistant does not write."""
_EVERY = 500


class Span(NamedTuple):
    """Where an answer stands in the tokens."""

    skill: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Encoded:
    """A conversation in tokens."""

    tokens: list[int]
    spans: list[Span]


class Batch(NamedTuple):
    """Conversations of like length, padded: tokens and what each counts, (batch, length)."""

    tokens: Tensor
    weights: Tensor
    spans: list[list[Span]]


def encode(vocabulary: Tokenizer, talks: Sequence[Conversation]) -> list[Encoded]:
    """The conversations in tokens, each piece by itself, as it is when a model writes it."""
    pieces = [list(write(talk)) for talk in talks]
    texts = iter(vocabulary.encode_batch([piece.text for talk in pieces for piece in talk]))
    return [_joined([(piece.skill, next(texts).ids) for piece in talk]) for talk in pieces]


def _joined(pieces: Sequence[tuple[str | None, list[int]]]) -> Encoded:
    tokens, spans = list[int](), list[Span]()
    for skill, ids in pieces:
        if skill is not None:
            spans.append(Span(skill, len(tokens), len(tokens) + len(ids)))
        tokens += ids
    return Encoded(tokens, spans)


def batches(talks: Iterable[Encoded], budget: int) -> Iterator[Batch]:
    """The conversations in batches of at most `budget` tokens, the longest in each at its end."""
    group = list[Encoded]()
    for talk in sorted(talks, key=lambda talk: len(talk.tokens)):
        if group and (len(group) + 1) * _padded(talk) > budget:
            yield _batch(group)
            group = []
        group.append(talk)
    if group:
        yield _batch(group)


def _padded(talk: Encoded) -> int:
    return -(-len(talk.tokens) // _GRAIN) * _GRAIN


def _batch(group: Sequence[Encoded]) -> Batch:
    tokens = np.zeros((len(group), _padded(group[-1])), np.int64)
    weights = np.zeros(tokens.shape, np.float32)
    for row, talk in enumerate(group):
        tokens[row, : len(talk.tokens)] = talk.tokens
        weights[row, : len(talk.tokens)] = _BESIDE
        for span in talk.spans:
            weights[row, span.start : span.stop] = 1
    return Batch(torch.from_numpy(tokens), torch.from_numpy(weights), [one.spans for one in group])


def stream(vocabulary: Tokenizer, seed: str, budget: int) -> Iterator[Batch]:
    """Endless batches of ever new conversations."""
    for pool in itertools.count():
        longest = _SHORT_FIRST[pool] if pool < len(_SHORT_FIRST) else LONGEST
        talks = itertools.islice(_fitting(vocabulary, f"{seed}-{pool}", longest), _POOL)
        yield from Draw(f"order-{seed}-{pool}").shuffled(list(batches(talks, budget)))


def _fitting(vocabulary: Tokenizer, seed: str, longest: int) -> Iterator[Encoded]:
    talks = conversations(seed)
    while True:
        group = encode(vocabulary, list(itertools.islice(talks, 500)))
        yield from (talk for talk in group if len(talk.tokens) <= longest)


@torch.no_grad()
def accuracy(network: nn.Module, vocabulary: Tokenizer, talks: int) -> dict[str, tuple[int, int]]:
    """Right and all answers to unseen questions, by skill.

    An answer is right where the likeliest token is the wanted one all along: the same as if the
    model had written it greedily.
    """
    right, asked = Counter[str](), Counter[str]()
    unseen = list(itertools.islice(conversations("watch", unseen=True), talks))
    for batch in batches(encode(vocabulary, unseen), 8192):
        with torch.autocast("cpu", torch.bfloat16):
            hits = network(batch.tokens).argmax(-1)[:, :-1] == batch.tokens[:, 1:]
        for row, spans in zip(hits, batch.spans, strict=True):
            for span in spans:
                asked[span.skill] += 1
                right[span.skill] += bool(row[span.start - 1 : span.stop - 1].all())
    return {skill: (right[skill], asked[skill]) for skill in sorted(asked)}


def rate(step: int, steps: int) -> float:
    """What the learning rates are multiplied with: up, level, and down along a cosine."""
    falling = (step / steps - (1 - _DECAY)) / _DECAY
    level = _LOWEST + (1 - _LOWEST) * (0.5 + 0.5 * math.cos(math.pi * max(0.0, falling)))
    return min(1.0, (step + 1) / _WARMUP) * level


class Trainer:
    """A network with its optimisers, at some step of its run."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        torch.manual_seed(arguments.seed)
        self.folder, self.arguments, self.step = folder, arguments, 0
        self.vocabulary = self._vocabulary()
        self.shape = Shape(vocabulary=self.vocabulary.get_vocab_size())
        self.network = Network(self.shape)
        self._run = torch.compile(self.network, dynamic=True) if arguments.compile else self.network
        self._small = [p for n, p in self.network.named_parameters() if p.dim() == 1 or "embd" in n]
        large = [p for n, p in self.network.named_parameters() if p.dim() == 2 and "embd" not in n]
        self._optimisers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(large, lr=1, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(self._small, lr=1, betas=(0.9, 0.98), weight_decay=0),
        ]
        self._resume()

    def _vocabulary(self) -> Tokenizer:
        path = self.folder / "tokenizer.json"
        if not path.exists():
            talks = itertools.islice(conversations("vocabulary"), 12_000)
            texts = ["".join(piece.text for piece in write(talk)) for talk in talks]
            tokenizer.train(texts, Shape().vocabulary, 208).save(str(path))
        return Tokenizer.from_file(str(path))

    def _resume(self) -> None:
        path = self.folder / "checkpoint.pt"
        if path.exists():
            state = torch.load(path)
            self.step = state["step"]
            self.network.load_state_dict(state["network"])
            for optimiser, saved in zip(self._optimisers, state["optimisers"], strict=True):
                optimiser.load_state_dict(saved)

    def save(self) -> None:
        """Write the checkpoint in one go."""
        state = {
            "step": self.step,
            "network": self.network.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self._optimisers],
        }
        torch.save(state, self.folder / "checkpoint.tmp")
        (self.folder / "checkpoint.tmp").rename(self.folder / "checkpoint.pt")

    def learn(self, batch: Batch) -> float:
        """One step; returns the loss per token that counts in full or in part."""
        with torch.autocast("cpu", torch.bfloat16):
            logits = self._run(batch.tokens[:, :-1])
        wanted, weights = batch.tokens[:, 1:].flatten(), batch.weights[:, 1:].flatten()
        losses = functional.cross_entropy(logits.float().flatten(0, 1), wanted, reduction="none")
        loss = (losses * weights).sum() / weights.sum()
        loss.backward()
        self._advance()
        return float(loss.detach())

    def _advance(self) -> None:
        nn.utils.clip_grad_norm_(self._small, 1.0)
        scale = rate(self.step, self.arguments.steps)
        for optimiser, base in zip(self._optimisers, _RATES, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = base * scale
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step += 1

    def train(self) -> None:
        """Go on to the last step."""
        seed, budget = str(self.arguments.seed), self.arguments.tokens
        tokens, started, smooth = 0, time.monotonic(), 0.0
        for batch in itertools.islice(stream(self.vocabulary, seed, budget), self.step, None):
            if self.step >= self.arguments.steps:
                break
            loss = self.learn(batch)
            smooth = loss if not smooth else 0.97 * smooth + 0.03 * loss
            tokens += int((batch.weights > 0).sum())
            if self.step % 25 == 0:
                speed = int(tokens / (time.monotonic() - started))
                self._say(step=self.step, loss=round(smooth, 4), tokens=tokens, speed=speed)
            if self.step % _EVERY == 0:
                self.save()
                self._report(150)
        self.save()
        self._report(2000)

    def _report(self, talks: int) -> None:
        rates = accuracy(self.network, self.vocabulary, talks)
        self._say(**{skill: f"{right}/{asked}" for skill, (right, asked) in rates.items()})

    def _say(self, **news: Any) -> None:
        sys.stdout.write(json.dumps(news) + "\n")
        sys.stdout.flush()


def main() -> None:
    """Train, or go on training."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--tokens", type=int, default=4096, help="in one step, padding included")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="faster once compiled")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    Trainer(arguments.folder, arguments).train()


if __name__ == "__main__":
    main()

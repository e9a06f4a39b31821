"""The network: a decoder of Qwen3's shape, whose tensors go by llama.cpp's names."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the network, in llama.cpp's words."""

    vocabulary: int = 1280
    width: int = 192
    layers: int = 6
    heads: int = 3
    inner: int = 512
    context: int = 2048
    rope_base: float = 10000.0
    epsilon: float = 1e-6

    @property
    def head(self) -> int:
        """Width of one head."""
        return self.width // self.heads


class Norm(nn.Module):
    """Root-mean-square norm, in single precision whatever it is given."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.ones(width)), epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        normed = functional.rms_norm(x.float(), self.weight.shape, self.weight, self.epsilon)
        return normed.type_as(x)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def _rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Positions in the NEOX layout: the first half of a head turns with the second."""
    left, right = x.chunk(2, -1)
    return torch.cat((left * cosine - right * sine, right * cosine + left * sine), -1)


@torch.autocast("cpu", enabled=False)
def _attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What each position takes from those up to it, in the precision that it is given."""
    length = query.shape[1]
    later = torch.full((length, length), -1e4, dtype=query.dtype).triu(1)
    return torch.baddbmm(later, query, key.transpose(1, 2)).softmax(-1) @ value


class Block(nn.Module):
    """Attention with normed queries and keys, then a gated feed-forward part."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.head = shape.heads, shape.head
        self.attn_norm = Norm(shape.width, shape.epsilon)
        self.attn_q, self.attn_k, self.attn_v, self.attn_output = (
            _linear(shape.width, shape.width) for _ in range(4)
        )
        self.attn_q_norm = Norm(shape.head, shape.epsilon)
        self.attn_k_norm = Norm(shape.head, shape.epsilon)
        self.ffn_norm = Norm(shape.width, shape.epsilon)
        self.ffn_gate, self.ffn_up = (_linear(shape.width, shape.inner) for _ in range(2))
        self.ffn_down = _linear(shape.inner, shape.width)

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, self.head).transpose(1, 2)

    def _attention(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Plainly: at this size a CPU trains it faster than the fused kernel."""
        query = _rotated(self.attn_q_norm(self._split(self.attn_q(x))), cosine, sine)
        key = _rotated(self.attn_k_norm(self._split(self.attn_k(x))), cosine, sine)
        value = self._split(self.attn_v(x)).flatten(0, 1)
        query, key = (query * self.head**-0.5).flatten(0, 1), key.flatten(0, 1)
        mixed: Tensor = _attended(query.type_as(value), key.type_as(value), value)
        return mixed.view(len(x), self.heads, -1, self.head).transpose(1, 2).reshape(x.shape)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """One layer."""
        x = x + self.attn_output(self._attention(self.attn_norm(x), cosine, sine))
        hidden = self.ffn_norm(x)
        return x + self.ffn_down(functional.silu(self.ffn_gate(hidden)) * self.ffn_up(hidden))


class Network(nn.Module):
    """Token ids in, logits out; the embedding serves at both ends."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.token_embd = nn.Embedding(shape.vocabulary, shape.width)
        self.blk = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.output_norm = Norm(shape.width, shape.epsilon)
        steps = shape.rope_base ** (-torch.arange(0, shape.head, 2).float() / shape.head)
        angles = torch.outer(torch.arange(shape.context).float(), steps)
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        for name, weight in self.named_parameters():
            if "embd" in name:
                nn.init.normal_(weight, std=0.02)
            elif weight.dim() == 2:
                gain = 1e-3 if name.endswith(("attn_output.weight", "ffn_down.weight")) else 1.0
                nn.init.normal_(weight, std=gain * weight.shape[1] ** -0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits for what follows each token, (batch, length) to (batch, length, vocabulary)."""
        cosine, sine = self.cosine[: tokens.shape[1]], self.sine[: tokens.shape[1]]
        x = self.token_embd(tokens)
        for block in self.blk:
            x = block(x, cosine, sine)
        return functional.linear(self.output_norm(x), self.token_embd.weight)

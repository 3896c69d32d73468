"""What `fusedopt demo` trains: a small Llama-style language model over bytes, the text it reads, and one run of it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from fusedopt._patch import Report

PHASES = ("forward", "backward", "optimizer")
EPS = 1e-6  # of the norms: Llama's


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a `Llama`; `context` is the longest input in bytes."""

    dim: int
    layers: int
    heads: int
    hidden: int
    context: int
    vocabulary: int = 256


SIZES = {
    "tiny": ModelConfig(dim=32, layers=2, heads=2, hidden=88, context=32),
    "small": ModelConfig(dim=256, layers=6, heads=8, hidden=688, context=128),
}


def rotary_angles(context: int, head_dim: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position times frequency, each (context, head_dim / 2)."""
    frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(context, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + head_dim / 2]) of x (..., length, head_dim) by their position's angle."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Attention(nn.Module):
    """Causal self-attention with rotary positions: (batch, length, dim) to the same shape."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(-2))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): (..., dim) to the same shape."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.dim, config.hidden, bias=False)
        self.up = nn.Linear(config.dim, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """One layer: attention and MLP, each on a normed copy of the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=EPS)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.dim, eps=EPS)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


class Llama(nn.Module):
    """Byte ids (batch, length), int64, to next-byte logits (batch, length, vocabulary)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.context = config.context
        self.embedding = nn.Embedding(config.vocabulary, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=EPS)
        self.head = nn.Linear(config.dim, config.vocabulary, bias=False)
        cos, sin = rotary_angles(config.context, config.dim // config.heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        # Llama's initialization, with GPT-2's smaller one where a layer writes to the residual stream,
        # so that the stream's variance does not grow with depth.
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                depth = 2 * config.layers if name.endswith(("out.weight", "down.weight")) else 1
                nn.init.normal_(parameter, std=0.02 / depth**0.5)

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))


def english_bytes() -> Tensor:
    """The language reference that CPython carries for `help()`: about 460 kB of English, (bytes,) uint8."""
    from pydoc_data.topics import topics  # half a megabyte of source: imported only where it is read

    return torch.frombuffer(bytearray("\n".join(topics.values()), "utf-8"), dtype=torch.uint8)


def windows(text: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Inputs and next-byte targets, each (len(starts), length) int64, read from text (bytes,) at `starts`."""
    rows = text[starts[:, None] + torch.arange(length + 1)].long()
    return rows[:, :-1], rows[:, 1:]


def warmup_cosine(step: int, steps: int) -> float:
    """Factor of the learning rate: a linear warmup over the first tenth, then half a cosine down to a tenth."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


@dataclass
class Run:
    """One model in training, with the record of its steps: losses, and seconds by phase.

    optimizers: which share the parameters among them; each has one of the schedulers.
    patched: what `fusedopt.patch` says of the model, where it is patched.
    """

    label: str
    model: Llama
    optimizers: Sequence[torch.optim.Optimizer]
    schedulers: Sequence[LambdaLR]
    patched: Report | None = None
    losses: list[float] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in (*PHASES, "step")})

    def step(self, text: Tensor, starts: Tensor) -> None:
        """One training step on the sequences of `text` that begin at `starts`."""
        begin = time.perf_counter()
        inputs, targets = windows(text, starts, self.model.context)
        marks = [time.perf_counter()]
        loss = F.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())
        marks.append(time.perf_counter())
        loss.backward()
        marks.append(time.perf_counter())
        for optimizer in self.optimizers:
            optimizer.step()
        marks.append(time.perf_counter())
        for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
            optimizer.zero_grad()
            scheduler.step()
        self.losses.append(loss.item())
        self.seconds["step"].append(time.perf_counter() - begin)
        for name, (start, end) in zip(PHASES, pairwise(marks), strict=True):
            self.seconds[name].append(end - start)

    @torch.no_grad()
    def validation_loss(self, text: Tensor) -> float:
        """Mean cross-entropy in nats a byte over `text`, read in consecutive sequences."""
        length = self.model.context
        starts = torch.arange(0, len(text) - length, length)
        losses = []
        for part in starts.split(64):
            inputs, targets = windows(text, part, length)
            losses.append(F.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten(), reduction="none"))
        return torch.cat(losses).mean().item()

    def milliseconds(self, name: str) -> float:
        """Median over the steps."""
        return 1e3 * median(self.seconds[name])

    def model_milliseconds(self) -> float:
        """Of forward and backward."""
        return self.milliseconds("forward") + self.milliseconds("backward")

    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def state_bytes(self) -> int:
        states = [state for optimizer in self.optimizers for state in optimizer.state.values()]
        tensors = [x for state in states for x in state.values() if isinstance(x, Tensor)]
        return sum(x.numel() * x.element_size() for x in tensors)

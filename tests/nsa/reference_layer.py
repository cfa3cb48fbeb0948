"""The layer once more, from the design's sentences, with plain loops over batch, token, group and head.

Shares no code with ``nsa`` but the parameter names of ``NSAAttention.state_dict()``. In float64 it is the oracle; in
the working dtype it is "the same formula computed eagerly", whose error the bounds are derived from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

BRANCHES = ("compression", "selection", "window")


@dataclass
class Reference:
    """Output (B, S, dim); blocks and scores of row (b, t, g)."""

    y: Tensor
    blocks: dict[tuple[int, int, int], list[int]] = field(default_factory=dict)
    scores: dict[tuple[int, int, int], list[float]] = field(default_factory=dict)


def rotated(vector: Tensor, position: int, base: float) -> Tensor:
    """(D,) turned by its position: pair i is (i, i + D/2), angle position * base ** (-2 i / D)."""
    half = vector.shape[0] // 2
    angles = [position * base ** (-2 * i / vector.shape[0]) for i in range(half)]
    cosine = torch.tensor([math.cos(angle) for angle in angles], dtype=torch.float64).to(vector.dtype)
    sine = torch.tensor([math.sin(angle) for angle in angles], dtype=torch.float64).to(vector.dtype)
    low, high = vector[:half], vector[half:]
    return torch.cat((low * cosine - high * sine, high * cosine + low * sine))


def attention(query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """One query (Dk,) over a list of keys; the softmax written out."""
    scores = torch.stack([query @ key for key in keys]) * query.shape[0] ** -0.5
    weights = torch.exp(scores - scores.max())
    return (weights / weights.sum()) @ torch.stack(values)


def compress(tokens: list[Tensor], weights: dict[str, Tensor], name: str, config) -> list[Tensor]:
    """All complete compressed tokens of one group's raw tokens."""
    out = []
    start = 0
    while start + config.kernel_size <= len(tokens):
        block = torch.stack(tokens[start : start + config.kernel_size])
        if config.compression == "mean":
            out.append(block.sum(0) / config.kernel_size)
        else:
            inner = (block + weights[f"{name}.position"]).reshape(-1)
            inner = weights[f"{name}.hidden.weight"] @ inner + weights[f"{name}.hidden.bias"]
            inner = inner / (1 + torch.exp(-inner))
            out.append(weights[f"{name}.output.weight"] @ inner)
        start += config.kernel_stride
    return out


def score_blocks(probabilities: list[list[float]], position: int, config) -> list[float]:
    """Scores of the blocks that start at or before the position, from each head's probabilities (h lists of N)."""
    stride, size = config.kernel_stride, config.kernel_size
    scores = []
    for block in range(position // config.block_size + 1):
        inside = range(block * config.block_size, (block + 1) * config.block_size)
        score = 0.0
        for head in probabilities:
            for i, probability in enumerate(head):
                shared = max(0, min(inside.stop, i * stride + size) - max(inside.start, i * stride))
                score += probability * shared / stride
        scores.append(score)
    return scores


def pick_blocks(scores: list[float], position: int, config) -> list[int]:
    """Forced blocks, then by score, ties to the lower block."""
    own = position // config.block_size
    chosen: list[int] = []
    for block in (0, own, own - 1):
        if 0 <= block <= own and block not in chosen and len(chosen) < config.topk:
            chosen.append(block)
    rest = sorted((block for block in range(own + 1) if block not in chosen), key=lambda j: (-scores[j], j))
    return sorted(chosen + rest[: config.topk - len(chosen)])


def by_part(config, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rows of ``project.weight`` under a name per part: queries, keys and values by branch, gates."""
    groups, heads = config.num_kv_heads, config.num_heads
    sizes = {"query": heads * config.head_dim}
    sizes |= {f"keys.{branch}": groups * config.head_dim for branch in BRANCHES}
    sizes |= {f"values.{branch}": groups * (config.value_head_dim or config.head_dim) for branch in BRANCHES}
    sizes["gate"] = heads * len(BRANCHES)
    parts = weights["project.weight"].split(list(sizes.values()))
    named = {f"{name}.weight": part for name, part in zip(sizes, parts, strict=True)}
    return weights | named | {"gate.bias": weights["gate_bias"]}


def reference_layer(config, weights: dict[str, Tensor], x: Tensor) -> Reference:
    """x (B, S, dim) and the state dict, both in the dtype to compute in -> outputs, blocks and scores."""
    weights = by_part(config, weights)
    batch, tokens, _ = x.shape
    groups, heads = config.num_kv_heads, config.num_heads // config.num_kv_heads
    key_width = config.head_dim
    value_width = config.value_head_dim or key_width
    result = Reference(y=x.new_zeros(0))
    rows = []
    for b in range(batch):
        keys: dict[tuple[str, int], list[Tensor]] = {}
        values: dict[tuple[str, int], list[Tensor]] = {}
        for branch in BRANCHES:
            for g in range(groups):
                part = weights[f"keys.{branch}.weight"][g * key_width : (g + 1) * key_width]
                keys[branch, g] = [rotated(part @ x[b, t], t, config.rotary_base) for t in range(tokens)]
                part = weights[f"values.{branch}.weight"][g * value_width : (g + 1) * value_width]
                values[branch, g] = [part @ x[b, t] for t in range(tokens)]
        compressed_keys = [compress(keys["compression", g], weights, "compress_key", config) for g in range(groups)]
        compressed_values = [
            compress(values["compression", g], weights, "compress_value", config) for g in range(groups)
        ]
        for t in range(tokens):
            gate = torch.sigmoid(weights["gate.weight"] @ x[b, t] + weights["gate.bias"]).reshape(-1, 3)
            mixed = []
            exist = sum(1 for i in range(tokens) if i * config.kernel_stride + config.kernel_size <= t + 1)
            for g in range(groups):
                queries = []
                for head in range(g * heads, (g + 1) * heads):
                    part = weights["query.weight"][head * key_width : (head + 1) * key_width]
                    queries.append(rotated(part @ x[b, t], t, config.rotary_base))
                ck, cv = compressed_keys[g][:exist], compressed_values[g][:exist]
                probabilities = [
                    softmax([float(query.detach() @ key.detach()) * key_width**-0.5 for key in ck]) for query in queries
                ]
                scores = score_blocks(probabilities, t, config)
                blocks = pick_blocks(scores, t, config)
                result.scores[b, t, g], result.blocks[b, t, g] = scores, blocks
                read = [j for j in range(t + 1) if j // config.block_size in blocks]
                near = range(max(0, t - config.window_size + 1), t + 1)
                for head, query in enumerate(queries, g * heads):
                    outs = [
                        attention(query, ck, cv) if exist else x.new_zeros(value_width),
                        attention(query, *pick(keys["selection", g], values["selection", g], read)),
                        attention(query, *pick(keys["window", g], values["window", g], near)),
                    ]
                    mixed.append(sum(gate[head, branch] * out for branch, out in enumerate(outs)))
            rows.append(weights["output.weight"] @ torch.cat(mixed))
    result.y = torch.stack(rows).reshape(batch, tokens, -1)
    return result


def pick(keys: list[Tensor], values: list[Tensor], chosen: Iterable[int]) -> tuple[list[Tensor], list[Tensor]]:
    """The chosen keys and values."""
    places = list(chosen)
    return [keys[t] for t in places], [values[t] for t in places]


def softmax(scores: list[float]) -> list[float]:
    """Of a list of numbers; empty for an empty one."""
    top = max(scores, default=0.0)
    weights = [math.exp(score - top) for score in scores]
    return [weight / sum(weights) for weight in weights]


def bound(eager_error: float, dtype: torch.dtype, largest: float) -> float:
    """The design's: twice the error of the same formula computed eagerly in the working dtype, or 4 eps max|v|."""
    return max(2 * eager_error, 4 * torch.finfo(dtype).eps * largest)


def cast(weights: dict[str, Tensor], dtype: torch.dtype, *, grad: bool = False) -> dict[str, Tensor]:
    """A copy of a state dict in another dtype."""
    return {name: tensor.detach().to(dtype).clone().requires_grad_(grad) for name, tensor in weights.items()}

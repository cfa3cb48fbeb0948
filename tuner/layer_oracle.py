"""Layer oracle: the output of NSAAttention from its weights and tokens, written from the paper's sentences.

It shares no code with ``nsa``, only the names of its parameters and its configuration. Computed for some query tokens,
in float64 as the truth and in the working dtype as "the same formula computed eagerly". Mean compression only.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nsa import NSAConfig

BRANCHES = ("compression", "selection", "window")
MARGIN = 1e-3
"""Relative gap of the last chosen score to the first left out, above which a row's choice of blocks is decided in
float32 and wider (scores are right to 3e-7 there). In 16 bits a row is decided where it selects all it may."""

Weights = Mapping[str, Tensor]


def weights_of(state: Mapping[str, Tensor], config: NSAConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """The layer's matrices by role in another dtype: query, key and value per branch, gate, gate_bias, output."""
    names = ["query", *(f"{kind}.{branch}" for kind in ("keys", "values") for branch in BRANCHES), "gate"]
    key, value = config.num_kv_heads * config.head_dim, config.num_kv_heads * config.value_width
    rows = [config.num_heads * config.head_dim, key, key, key, value, value, value, config.num_heads * 3]
    found = dict(zip(names, torch.split(state["project.weight"], rows), strict=True))
    found |= {"gate_bias": state["gate_bias"], "output": state["output.weight"]}
    return {name: tensor.detach().to(dtype) for name, tensor in found.items()}


def reordered(weights: Weights, order: Tensor) -> dict[str, Tensor]:
    """The same matrices for tokens whose components stand in another order."""
    inner = {name: matrix[:, order] for name, matrix in weights.items() if name not in ("gate_bias", "output")}
    return {**weights, **inner}


def turned(vectors: Tensor, positions: Tensor, base: float) -> Tensor:
    """(B, n, G, [h,] D) turned by its positions (n,): pair i is (i, i + D/2), angle position * base ** (-2 i / D)."""
    half = vectors.shape[-1] // 2
    place = torch.arange(half, dtype=torch.float64, device=vectors.device)
    angles = positions.double()[:, None] * base ** (-place / half)
    shape = (1, len(positions), *(1,) * (vectors.dim() - 3), half)
    cosine, sine = angles.cos().to(vectors.dtype).view(shape), angles.sin().to(vectors.dtype).view(shape)
    low, high = vectors[..., :half], vectors[..., half:]
    return torch.cat((low * cosine - high * sine, high * cosine + low * sine), -1)


def queries(config: NSAConfig, weights: Weights, x: Tensor, rows: Tensor) -> Tensor:
    """(B, R, G, h, Dk) of the tokens ``rows`` (R,)."""
    flat = x[:, rows] @ weights["query"].T
    shape = (config.num_kv_heads, config.heads_per_group, config.head_dim)
    return turned(torch.unflatten(flat, -1, shape), rows, config.rotary_base)


def keys_and_values(config: NSAConfig, weights: Weights, x: Tensor, branch: str) -> tuple[Tensor, Tensor]:
    """(B, T, G, Dk) and (B, T, G, Dv); of the compression branch the means of their blocks, (B, N, G, D)."""
    everywhere = torch.arange(x.shape[1], device=x.device)
    groups = (config.num_kv_heads, -1)
    key = turned(torch.unflatten(x @ weights[f"keys.{branch}"].T, -1, groups), everywhere, config.rotary_base)
    value = torch.unflatten(x @ weights[f"values.{branch}"].T, -1, groups)
    if branch == "compression":
        size, stride = config.kernel_size, config.kernel_stride
        return key.unfold(1, size, stride).mean(-1), value.unfold(1, size, stride).mean(-1)
    return key, value


def probabilities(query: Tensor, key: Tensor, read: Tensor) -> Tensor:
    """(B, R, G, h, keys): softmax over the keys that ``read`` (B or 1, R, G or 1, keys) names; zeros where none is."""
    scores = torch.einsum("brghd,btgd->brght", query, key) * query.shape[-1] ** -0.5
    scores = scores.masked_fill(~read[:, :, :, None], float("-inf"))
    top = scores.amax(-1, keepdim=True).detach()
    weights = torch.exp(scores - torch.where(top.isfinite(), top, 0.0))
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total > 0, total, 1.0)


def complete_tokens(config: NSAConfig, tokens: int, rows: Tensor) -> Tensor:
    """(1, R, 1, N): compressed token i exists for the row at position t iff i*d + l <= t + 1."""
    count = max(0, (tokens - config.kernel_size) // config.kernel_stride + 1)
    ends = torch.arange(count, device=rows.device) * config.kernel_stride + config.kernel_size
    return (ends <= rows[:, None] + 1)[None, :, None]


def chosen_blocks(config: NSAConfig, weights: Weights, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(B, R, G, blocks) bool, which blocks each row selects, and (B, R, G) the relative gap behind the last of them,
    infinite where it selects all it may. In float64."""
    key, _ = keys_and_values(config, weights, x, "compression")
    exist = complete_tokens(config, x.shape[1], rows)
    heads = probabilities(queries(config, weights, x, rows), key, exist).sum(3)
    block = torch.arange(-(-x.shape[1] // config.block_size), device=x.device)
    start = torch.arange(key.shape[1], device=x.device)[:, None] * config.kernel_stride
    first = block * config.block_size
    shared = torch.minimum(start + config.kernel_size, first + config.block_size) - torch.maximum(start, first)
    score = heads @ (shared.clamp_min(0) / config.kernel_stride).to(heads.dtype)
    own = rows[:, None] // config.block_size
    forced = (block == 0) | (block == own) | (block == own - 1)
    eligible = first <= rows[:, None]
    ranked = score.masked_fill(forced[None, :, None], float("inf")).masked_fill(~eligible[None, :, None], -1.0)
    best, order = ranked.sort(dim=-1, descending=True, stable=True)
    topk = min(config.topk, len(block))
    taken = torch.zeros_like(ranked, dtype=torch.bool).scatter_(-1, order[..., :topk], best[..., :topk] >= 0)
    if topk == len(block):
        return taken, torch.full_like(best[..., 0], float("inf"))
    last, next_one = best[..., topk - 1], best[..., topk]
    return taken, torch.where((next_one < 0) | last.isinf(), float("inf"), (last - next_one) / last)


def layer_rows(config: NSAConfig, weights: Weights, x: Tensor, rows: Tensor, taken: Tensor) -> Tensor:
    """The layer's output (B, R, dim) at the tokens ``rows``, given the blocks that they select; in the dtype of x."""
    query, token = queries(config, weights, x, rows), torch.arange(x.shape[1], device=x.device)
    seen = (token <= rows[:, None])[None, :, None]
    read = {
        "compression": complete_tokens(config, x.shape[1], rows),
        "selection": taken[..., token // config.block_size] & seen,
        "window": seen & (token > rows[:, None] - config.window_size)[None, :, None],
    }
    gates = torch.sigmoid(x[:, rows] @ weights["gate"].T + weights["gate_bias"])
    gates = torch.unflatten(gates, -1, (config.num_kv_heads, config.heads_per_group, 3))
    mixed: Tensor | float = 0.0
    for place, branch in enumerate(BRANCHES):
        key, value = keys_and_values(config, weights, x, branch)
        out = torch.einsum("brght,btgd->brghd", probabilities(query, key, read[branch]), value)
        mixed = mixed + gates[..., place, None] * out
    assert isinstance(mixed, Tensor)
    return mixed.flatten(2) @ weights["output"].T


def decided(gap: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, R) bool: rows whose choice of blocks rounding cannot change."""
    enough = gap > MARGIN if dtype in (torch.float32, torch.float64) else gap.isinf()
    return enough.all(-1)

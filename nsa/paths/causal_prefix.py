"""Path ``causal_prefix``: rows that can select their whole context run as dense causal attention, the rest elsewhere.

Exact where a selection is complete: the first topk * block_size tokens have no more blocks than topk, so they select
all of them. The remaining rows go to ``inner`` at its defaults. It decides by the declared feature alone and never
reads the indices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..attend import FLASH_ATTN, by_tokens, flash_attn_attention, widened
from ..device import installed
from ..errors import UnsupportedPathError
from ..kernels import support
from ..problem import DTYPE_NAMES, SelectionProblem
from ..rows import tracked
from ..selection import Selection
from ..trace import ParameterValue, as_part, executed
from ..workspace import Workspace
from .base import Evidence, Parameter, Parameters, need_blocks, registered

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
OPERATORS = {
    "flash": r"^aten::_scaled_dot_product_flash_attention(_for_cpu)?$",
    "cudnn": r"^aten::_scaled_dot_product_cudnn_attention$",
    "efficient": r"^aten::_scaled_dot_product_efficient_attention$",
    "math": r"^aten::_scaled_dot_product_attention_math$",
}
FLASH_ATTN_4 = {
    "prefill": {r"flash_attncute.*FlashAttentionForwardSm": 1},
    "train": {r"flash_attncute.*FlashAttentionForwardSm": 1, r"flash_attncute.*FlashAttentionBackwardSm": 1},
}
"""Kernels of FlashAttention-4 by mode: it registers no operator."""
PACKAGES = {"flash_attn": "flash-attn", "flash_attn_4": "flash-attn-4"}
PREFIXES = {"cpu": ("flash", "math"), "cuda": ("flash", "cudnn", "efficient", *PACKAGES, "math")}
INNER = {"cpu": ("dense", "gather"), "cuda": ("triton_union", "triton_block", "triton_token", "dense")}


def tunables(problem: SelectionProblem, device: torch.device) -> tuple[Parameter, ...]:
    """``prefix``: what runs dense causal attention, ``flash_attn`` and ``flash_attn_4`` by their packages, else a
    backend of torch's SDPA; ``inner``: the path of the remaining rows."""
    prefixes = PREFIXES[device.type]
    able = [name for name in prefixes if prefix_reason(name, problem, device) is None]
    return (
        Parameter("prefix", prefixes, able[0] if able else "math"),
        Parameter("inner", INNER[device.type], INNER[device.type][0]),
    )


def prefix_rows(topk: int, block_size: int, queries: int) -> int:
    """Query tokens whose rows select their whole context."""
    return min(queries, topk * block_size)


def prefix_reason(prefix: str, problem: SelectionProblem, device: torch.device) -> str | None:
    """Why dense causal attention cannot run by that backend; None if it can."""
    half = problem.dtype in ("bfloat16", "float16")
    same, most = problem.Dk == problem.Dv, max(problem.Dk, problem.Dv)
    fits = {
        "math": True,
        "efficient": problem.dtype != "float64" and most <= 256 and problem.Dk % 8 == problem.Dv % 8 == 0,
        "flash": same and (device.type == "cpu" or (half and most <= 256 and most % 8 == 0)),
        "cudnn": half and same and most <= 128 and most % 8 == 0,
        "flash_attn": half and most <= 256 and most % 8 == 0,
        "flash_attn_4": half and ((same and most <= 256 and most % 8 == 0) or wide_keys(problem)),
    }
    if not fits[prefix]:
        return f"{prefix} has no causal attention for {problem.dtype} with head dims {problem.Dk} and {problem.Dv}"
    if prefix in PACKAGES and not installed(prefix):
        return f"{prefix} needs the package {PACKAGES[prefix]}"
    if prefix == "flash_attn_4" and torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] != 9:
        return "flash_attn_4 is taken on compute capability 9.x only, whose head dims are known here"
    return None


def wide_keys(problem: SelectionProblem) -> bool:
    """Keys of 192 with values of 128, which FlashAttention-4 runs, but for the backward of heads that share keys."""
    return (problem.Dk, problem.Dv) == (192, 128) and (problem.mode != "train" or problem.h == 1)


def unsupported(problem: SelectionProblem, device: torch.device, parameters: Parameters) -> str | None:
    """A whole prompt in blocks, a backend that takes it, and an inner path that takes the rest."""
    if reason := need_blocks(problem):
        return reason
    if problem.S != problem.T:
        return f"causal_prefix needs a whole prompt, got {problem.S} queries of a context of {problem.T}"
    default = tunables(problem, device)
    prefix, inner = (str(parameters.get(item.name, item.default)) for item in default)
    if reason := prefix_reason(prefix, problem, device):
        return reason
    rest = inner_problem(problem)
    if rest is None:
        return None
    path = registered(inner)
    reason = path.unsupported_reason(rest, device, path.defaults(rest, device))
    return f"inner {reason}" if reason else None


def inner_problem(problem: SelectionProblem) -> SelectionProblem | None:
    """The problem of the remaining rows; None where there are none."""
    rest = problem.S - prefix_rows(problem.topk, problem.block_size, problem.S)
    return msgspec.structs.replace(problem, S=rest) if rest else None


def evidence(
    problem: SelectionProblem, device: torch.device, parameters: Parameters, lengths: Sequence[int]
) -> Evidence:
    """One call of dense attention, by its backend and on the first rows' queries, and what the inner path declares; no
    Triton kernel where every row is dense."""
    prefix, rest = str(parameters["prefix"]), inner_problem(problem)
    ran = support.LIBRARIES[prefix if prefix in PACKAGES else "sdpa"]
    shapes: dict[str, Any] = {}
    if prefix == "flash_attn":
        required = {FLASH_ATTN: 1}
    elif prefix == "flash_attn_4":
        required = FLASH_ATTN_4[problem.mode]
    else:
        first = (problem.B, problem.G * problem.h, problem.S - (rest.S if rest else 0), problem.Dk)
        required, shapes = {OPERATORS[prefix]: 1}, {OPERATORS[prefix]: ((0, first),)}
    absent = tuple(pattern for pattern in support.LIBRARIES.values() if pattern != ran)
    if rest is None:
        return Evidence(required=required, forbidden=(*support.KERNELS.values(), *absent), shapes=shapes)
    path = registered(str(parameters["inner"]))
    inside = path.evidence(rest, device, path.defaults(rest, device), lengths)
    if ran in inside.required:  # the inner path may take the same backend
        required = dict.fromkeys(required, 0)
    inner = {name: count + 1 if name == ran and count else count for name, count in inside.required.items()}
    forbidden = dict.fromkeys(name for name in (*inside.forbidden, *absent) if name not in (ran, *inside.required))
    others = {name: calls for name, calls in inside.shapes.items() if name != ran}
    return Evidence(required=required | inner, forbidden=tuple(forbidden), shapes=shapes | others)


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    *,
    scale: float,
    workspace: Workspace | None = None,
    prefix: ParameterValue = "flash",
    inner: ParameterValue = "dense",
) -> Tensor:
    """Selection attention of a whole prompt, its first rows dense. Shapes as in ``nsa.problem``."""
    queries, topk, size = query.shape[1], selection.blocks.shape[3], selection.block_size
    if not selection.complete:
        raise UnsupportedPathError("causal_prefix needs a selection that is declared complete")
    length = selection.context_length
    if isinstance(length, Tensor) or length != queries or selection.query_positions is not None:
        raise UnsupportedPathError("causal_prefix needs a whole prompt: one context length, that of the queries")
    rows = prefix_rows(topk, size, queries)
    out = causal_attention(query[:, :rows], key[:, :, :rows], value[:, :, :rows], scale, str(prefix))
    if rows < queries:
        rest = replace(selection, indices=selection.indices[:, rows:])
        path, last = registered(str(inner)), query[:, rows:]
        defaults = path.defaults(problem_of(last, key, value, rest), query.device)
        with as_part():
            more = path.function()(last, key, value, rest, scale=scale, workspace=workspace, **defaults)
        out = torch.cat((out, more), 1)
    executed("selection", "causal_prefix", {"prefix": prefix, "inner": inner})
    return out


def problem_of(query: Tensor, key: Tensor, value: Tensor, selection: Selection) -> SelectionProblem:
    """The problem of the remaining rows, for their path's defaults."""
    batch, queries, groups, heads, width = query.shape
    return SelectionProblem(
        mode="train" if tracked(query, key, value) else "prefill",
        dtype=DTYPE_NAMES[query.dtype],
        B=batch,
        S=queries,
        T=key.shape[2],
        G=groups,
        h=heads,
        Dk=width,
        Dv=value.shape[3],
        block_size=selection.block_size,
        topk=selection.blocks.shape[3],
        overlap=selection.overlap_hint,
        complete=True,
    )


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, prefix: str) -> Tensor:
    """Every row against all keys up to its own: (B, P, G, h, Dk), (B, G, P, Dk), (B, G, P, Dv) -> (B, P, G, h, Dv)."""
    batch, rows, groups, heads, width = query.shape
    out: Tensor
    if prefix == "flash_attn":  # takes equal head dims
        wide = max(width, value.shape[3])
        out = flash_attn_attention(widened(query, wide), widened(key, wide), widened(value, wide), scale)
        return out[..., : value.shape[3]]
    if prefix == "flash_attn_4":
        from flash_attn.cute import flash_attn_func  # optional package; compiles when first run, for seconds

        out, _ = flash_attn_func(*by_tokens(query, key, value), softmax_scale=scale, causal=True)
        return out.reshape(batch, rows, groups, heads, -1)
    if prefix == "efficient":  # knows no grouped heads
        key, value = key.repeat_interleave(heads, 1), value.repeat_interleave(heads, 1)
    with sdpa_kernel(BACKENDS[prefix]):  # one backend, which raises where it cannot run
        out = F.scaled_dot_product_attention(
            query.flatten(2, 3).transpose(1, 2),
            key,
            value,
            is_causal=True,
            scale=scale,
            enable_gqa=heads > 1 and prefix != "efficient",
        )
    return out.transpose(1, 2).reshape(batch, rows, groups, heads, -1)

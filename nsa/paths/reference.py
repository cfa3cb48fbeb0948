"""The oracle: selection attention in float64, written from the formula, row by row in the mathematics.

out[b,s,g,i] = softmax over the union of the row's selected keys of (q . k * scale), times v. It reads the raw blocks or
ranges and positions that the caller passed and shares no code with Selection's derived forms or with any path. It is
never a dispatch choice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..problem import SelectionProblem
from ..selection import Selection
from ..trace import ParameterValue, executed
from ..workspace import Workspace
from .base import Evidence, Parameter, Parameters

SCORE_ELEMENTS = 2**24
"""Score elements per chunk of queries: 128 MiB in float64."""
KEY_ELEMENTS = 2**27
"""Elements of keys or values that are converted at once, whole sequences: 1 GiB in float64."""


def tunables(problem: SelectionProblem, device: torch.device) -> tuple[Parameter, ...]:
    """Nothing to tune."""
    return ()


def unsupported(problem: SelectionProblem, device: torch.device, parameters: Parameters) -> str | None:
    """Runs everything."""
    return None


def evidence(
    problem: SelectionProblem, device: torch.device, parameters: Parameters, lengths: Sequence[int]
) -> Evidence:
    """Matrix products and nobody's attention kernel."""
    return Evidence(required={r"^aten::einsum$": 0}, forbidden=(r"scaled_dot_product", r"flash_attn"))


def selected_keys(selection: Selection, keys: int, first: int, end: int) -> Tensor:
    """Mask (B, end - first, G, keys): key t is read by query s of group g. From the definition, one slot at a time."""
    raw = selection.indices[:, first:end]
    batch, queries = selection.indices.shape[:2]
    length = torch.as_tensor(selection.context_length, device=raw.device).expand(batch)
    if selection.query_positions is None:
        position = length[:, None] - queries + torch.arange(queries, device=raw.device)
    else:
        position = selection.query_positions.expand(batch, queries)
    position = position[:, first:end, None, None]
    token = torch.arange(keys, device=raw.device)
    mask = torch.zeros((*raw.shape[:3], keys), dtype=torch.bool, device=raw.device)
    for slot in range(raw.shape[3]):
        entry = raw[:, :, :, slot]
        if selection.block_size:
            chosen = (entry[..., None] >= 0) & (token // selection.block_size == entry[..., None])
        else:
            chosen = (token >= entry[..., 0, None]) & (token < entry[..., 1, None])
        mask |= chosen
    return mask & (token <= position) & (token < length[:, None, None, None])


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    *,
    scale: float,
    workspace: Workspace | None = None,
    compute_dtype: ParameterValue = "float64",
) -> Tensor:
    """Selection attention computed in ``compute_dtype``, returned in it. Shapes as in ``nsa.problem``."""
    dtype = getattr(torch, str(compute_dtype))
    some = max(1, KEY_ELEMENTS // max(1, key[0].numel(), value[0].numel()))
    parts = []
    for first in range(0, query.shape[0], some):
        q, k, v = (tensor[first : first + some].to(dtype) for tensor in (query, key, value))
        parts.append(attend(q, k, v, of_sequences(selection, first, first + len(q)), scale))
    executed(selection.operation, "reference", {"compute_dtype": compute_dtype})
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def of_sequences(selection: Selection, first: int, end: int) -> Selection:
    """The selection of sequences ``first`` to ``end`` of a batch."""
    batch = selection.indices.shape[0]
    length, positions = selection.context_length, selection.query_positions
    if isinstance(length, Tensor):
        length = length.expand(batch)[first:end]
    if positions is not None:
        positions = positions.expand(batch, -1)[first:end]
    return Selection(selection.indices[first:end], selection.block_size, length, positions)


def attend(q: Tensor, k: Tensor, v: Tensor, selection: Selection, scale: float) -> Tensor:
    """The formula, in the dtype of what it is given, some query tokens at a time."""
    batch, queries, groups, heads, _ = q.shape
    step = max(1, SCORE_ELEMENTS // (batch * groups * heads * k.shape[2]))
    parts = []
    for first in range(0, queries, step):
        end = min(queries, first + step)
        mask = selected_keys(selection, k.shape[2], first, end)[:, :, :, None, :]
        scores = torch.einsum("bsghd,bgtd->bsght", q[:, first:end], k) * scale
        scores = scores.masked_fill(~mask, float("-inf"))  # NaN of keys that the row does not select goes here
        top = scores.amax(-1, keepdim=True).detach()
        weights = torch.exp(scores - torch.where(top.isfinite(), top, 0.0))
        total = weights.sum(-1, keepdim=True)
        weights = weights / torch.where(total > 0, total, 1.0)
        part = torch.einsum("bsght,bgtd->bsghd", weights, v.nan_to_num(0.0, 0.0, 0.0))
        taints = torch.einsum("bsgt,bgtd->bsgd", mask[:, :, :, 0].to(q.dtype), (~v.isfinite()).to(q.dtype)) > 0
        parts.append(part.masked_fill(taints[:, :, :, None], float("nan")))
    return torch.cat(parts, 1)

"""Drill: deliberately broken paths, one for each way in which a path of PR31 was broken, and the answer each must get.

``nsa-tune selftest`` and the tests put each of them through the worker, which must answer with the named outcome and
never with a time. Each is a twin of a real path: it declares that path's evidence and does something else. A worker is
pointed at them by ``Trial(registry="tuner.drill:PATHS")``; no dispatch table and no sweep knows them.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import torch
from torch import Tensor
from torch.nn import functional as F

from nsa.paths import PATHS as REAL
from nsa.paths import Candidate, Parameter, SelectionPath, dense, gather, packed, varlen
from nsa.paths.base import reserve_parameter
from nsa.problem import Mode, SelectionProblem
from nsa.rows import flat_ranges, key_rows, padded_positions, row_width
from nsa.selection import Selection
from nsa.trace import ParameterValue, executed
from nsa.workspace import Workspace
from tuner.record import Outcome
from tuner.trial import Trial

SYNCHRONISATIONS = 64
RESERVE_OF_PR31 = 33_554_432
"""Rows of [h, D]: 16 GiB of float32 each for keys and values at h = 4, D = 32."""
MEMORY_LIMIT_BYTES = 8 * 2**30
"""Of the worker that gets the 32 GiB reserve, so that a large machine refuses it too."""


def runs_packed(
    query: Tensor, key: Tensor, value: Tensor, selection: Selection, *, scale: float,
    workspace: Workspace | None = None, **parameters: ParameterValue,
) -> Tensor:  # fmt: skip
    """Declares varlen and runs packed: right and plausible, and the wrong thing timed."""
    return packed.run(query, key, value, selection, scale=scale, workspace=workspace)


def swallows_its_error(
    query: Tensor, key: Tensor, value: Tensor, selection: Selection, *, scale: float,
    workspace: Workspace | None = None, **parameters: ParameterValue,
) -> Tensor:  # fmt: skip
    """Gives varlen keys of half the head dim, swallows the shape error, and runs packed."""
    try:
        return varlen.run(query, key[..., ::2], value, selection, scale=scale, workspace=workspace, **parameters)
    except RuntimeError:  # the defect itself: PR31's model did this
        return packed.run(query, key, value, selection, scale=scale, workspace=workspace)


def crashes_with_gradients(
    query: Tensor, key: Tensor, value: Tensor, selection: Selection, *, scale: float,
    workspace: Workspace | None = None, query_chunk: ParameterValue = 0,
) -> Tensor:  # fmt: skip
    """Dense, with its result bound on the branch without gradients only."""
    if not (torch.is_grad_enabled() and query.requires_grad):
        out = dense.run(query, key, value, selection, scale=scale, workspace=workspace, query_chunk=query_chunk)
    return out


def aligned_top_left(
    query: Tensor, key: Tensor, value: Tensor, selection: Selection, *, scale: float,
    workspace: Workspace | None = None, row_chunk: ParameterValue = 0,
) -> Tensor:  # fmt: skip
    """Gather with ``is_causal=True`` over one query row: torch aligns top-left, so only the first key is seen."""
    k, v = padded_keys(key, value, selection)
    rows = query.reshape(-1, *query.shape[3:])[:, :, None]
    out = F.scaled_dot_product_attention(rows, k, v, is_causal=True, scale=scale, enable_gqa=True)
    executed("selection", "gather", {"row_chunk": row_chunk})
    return out[:, :, 0].reshape(*query.shape[:4], -1)


def uses_reserve_unsliced(
    query: Tensor, key: Tensor, value: Tensor, selection: Selection, *, scale: float,
    workspace: Workspace | None = None, row_chunk: ParameterValue = 0, reserve_rows: ParameterValue = 0,
) -> Tensor:  # fmt: skip
    """Gather whose keys fill the whole of a buffer, which fits while the reserve stays below the need."""
    k, v = padded_keys(key, value, selection)
    if workspace is not None and not torch.is_grad_enabled():
        rows = max(k.shape[0], int(reserve_rows))
        buffer = workspace.take("unsliced.key", rows, k[0].numel(), dtype=k.dtype, device=k.device)
        k = buffer.copy_(k.flatten(1)).view(k.shape)
    return padded_twin(query.flatten(0, 2)[:, None], k, v, selection).reshape(*query.shape[:4], -1)


def replicates_heads(
    query: Tensor, key: Tensor, value: Tensor, selection: Selection, *, scale: float,
    workspace: Workspace | None = None, row_chunk: ParameterValue = 0, reserve_rows: ParameterValue = 0,
) -> Tensor:  # fmt: skip
    """Gather with K and V copied once per head, and a reserve that counts rows of [h, D]."""
    heads = query.shape[3]
    k, v = (part.repeat_interleave(heads, 1) for part in padded_keys(key, value, selection))
    for role, part in (("replicated.key", k), ("replicated.value", v)):
        if workspace is not None and int(reserve_rows):
            width = heads * part.shape[3]
            workspace.take(role, 1, width, dtype=part.dtype, device=part.device, reserve_rows=int(reserve_rows))
    return padded_twin(query.flatten(0, 2)[:, :, None], k, v, selection).reshape(*query.shape[:4], -1)


def forgets_its_workspace(
    query: Tensor, key: Tensor, value: Tensor, selection: Selection, *, scale: float,
    workspace: Workspace | None = None, row_chunk: ParameterValue = 0,
) -> Tensor:  # fmt: skip
    """Gather through buffers of exactly this call's size: shapes that alternate allocate anew every time."""
    parts = []
    for role, part in zip(("key", "value"), padded_keys(key, value, selection), strict=True):
        if workspace is not None and not torch.is_grad_enabled():
            held = workspace._buffers.get((role, part.dtype, part.device))
            if held is not None and held.numel() != part.numel():
                del workspace._buffers[role, part.dtype, part.device]
            buffer = workspace.take(role, part.shape[0], part[0].numel(), dtype=part.dtype, device=part.device)
            part = buffer.copy_(part.flatten(1)).view(part.shape)
        parts.append(part)
    return padded_twin(query.flatten(0, 2)[:, None], parts[0], parts[1], selection).reshape(*query.shape[:4], -1)


def sees_the_future(
    query: Tensor, key: Tensor, value: Tensor, selection: Selection, *, scale: float,
    workspace: Workspace | None = None, query_chunk: ParameterValue = 0,
) -> Tensor:  # fmt: skip
    """Dense with every row at the last position: the row's own block shows keys that come after it."""
    last = torch.full(query.shape[1:2], key.shape[2] - 1, device=selection.indices.device)
    later = Selection(selection.indices, selection.block_size, selection.context_length, last)
    return dense.run(query, key, value, later, scale=scale, workspace=workspace, query_chunk=query_chunk)


def synchronises(
    query: Tensor, key: Tensor, value: Tensor, selection: Selection, *, scale: float,
    workspace: Workspace | None = None, row_chunk: ParameterValue = 0,
) -> Tensor:  # fmt: skip
    """Gather, after reading 64 numbers back to the host one by one."""
    for _ in range(SYNCHRONISATIONS):
        query.flatten()[0].item()
    return gather.run(query, key, value, selection, scale=scale, workspace=workspace, row_chunk=row_chunk)


def padded_keys(key: Tensor, value: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
    """Each row's keys and values, padded: (R, 1, w, Dk) and (R, 1, w, Dv)."""
    ranges, width = flat_ranges(selection), row_width(selection, key.shape[2])
    positions, _ = padded_positions(ranges, width)
    parts = []
    for tensor in (key, value):
        view, base, step = key_rows(tensor, selection.indices.shape[1])
        index = (base[:, None] + positions * step).flatten()
        parts.append(view.index_select(0, index).view(ranges.shape[0], 1, width, -1))
    return parts[0], parts[1]


def padded_twin(query: Tensor, key: Tensor, value: Tensor, selection: Selection) -> Tensor:
    """SDPA over ``padded_keys``; rows without keys give zeros."""
    _, present = padded_positions(flat_ranges(selection), key.shape[2])
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=present[:, None, None])
    return out.nan_to_num(0.0)


class Item(msgspec.Struct, frozen=True, kw_only=True):
    """A broken path, the outcome that must be its answer, and the call on which it shows."""

    path: SelectionPath
    expected: Outcome
    mode: Mode = "decode"
    parameters: dict[str, ParameterValue] = {}
    memory_limit_bytes: int = 0

    def problem(self) -> SelectionProblem:
        """The PR31 shape at a context of 256: small, with tail blocks and rows that differ."""
        queries = {"decode": 1, "prefill": 250, "train": 250}[self.mode]
        return SelectionProblem(
            mode=self.mode, dtype="float32", B=1, S=queries, T=250, G=2, h=4, Dk=32, Dv=32, block_size=64, topk=16
        )

    def trial(self, device: str) -> Trial:
        """What a worker prepares for it."""
        return Trial(problem=self.problem(), pattern="scored", seed=0, device=device, registry="tuner.drill:PATHS")

    def candidate(self, device: str) -> Candidate:
        """What a worker is asked to assess: defaults, and what makes the defect show."""
        filled = self.path.defaults(self.problem(), torch.device(device))
        return Candidate(path=self.path.name, parameters={**filled, **self.parameters})


def twin(of: str, run: Callable[..., Tensor], *, reserve: bool = False) -> SelectionPath:
    """A path that declares everything as ``of`` does and runs ``run``; ``reserve`` adds a ladder of reserved rows."""

    def with_reserve(problem: SelectionProblem, device: torch.device) -> tuple[Parameter, ...]:
        return (*REAL[of].tunables(problem, device), reserve_parameter("reserve_rows", problem.rows))

    return msgspec.structs.replace(
        REAL[of], name=run.__name__, target=f"{__name__}:{run.__name__}", summary=(run.__doc__ or "").strip(),
        dispatchable=False, tunables=with_reserve if reserve else REAL[of].tunables,
    )  # fmt: skip


ITEMS: dict[str, Item] = {
    "1 another path runs": Item(path=twin("varlen", runs_packed), expected="fell_back"),
    "2 error swallowed": Item(path=twin("varlen", swallows_its_error), expected="fell_back", mode="prefill"),
    "3 crash with gradients": Item(path=twin("dense", crashes_with_gradients), expected="crash", mode="train"),
    "4 first key only": Item(path=twin("gather", aligned_top_left), expected="wrong"),
    "5 reserve unsliced": Item(path=twin("gather", uses_reserve_unsliced, reserve=True), expected="crash"),
    "6 heads replicated": Item(path=twin("gather", replicates_heads, reserve=True), expected="fell_back"),
    "6 reserve of 32 GiB": Item(
        path=twin("gather", replicates_heads, reserve=True), expected="oom",
        parameters={"reserve_rows": RESERVE_OF_PR31}, memory_limit_bytes=MEMORY_LIMIT_BYTES,
    ),
    "7 workspace forgotten": Item(path=twin("gather", forgets_its_workspace), expected="wrong"),
    "8 future seen": Item(path=twin("dense", sees_the_future), expected="wrong", mode="prefill"),
    "9 synchronises": Item(path=twin("gather", synchronises), expected="fell_back"),
}  # fmt: skip
"""Numbered as the defects of PR31; those of its CI guard and its table are records, not paths."""

PATHS: dict[str, SelectionPath] = {item.path.name: item.path for item in ITEMS.values()}

DRILL: dict[str, Outcome] = {name: item.expected for name, item in ITEMS.items()}
"""Item -> the outcome that must be the answer."""

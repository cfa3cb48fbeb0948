"""Paths that misbehave, for the tests of the tuner: twins of real paths that declare the real one's evidence.

A worker is pointed at them by the registry ``tests.tuner.misbehaving:PATHS``, with the real defaults of a CPU.
What PR31 did wrong has its twins in ``tuner.drill``; these do what any process or workspace can do wrong.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from nsa.paths import PATHS as REAL
from nsa.paths import Parameter, SelectionPath, dense, gather, packed, reference
from nsa.paths.base import reserve_parameter
from nsa.problem import SelectionProblem
from nsa.selection import Selection
from nsa.workspace import Workspace

REGISTRY = f"{__name__}:PATHS"


def being_timed() -> bool:
    """Whether a stopwatch is running, as opposed to a check, a profiler or a first call."""
    return any(Path(frame.filename).name == "measure.py" for frame in traceback.extract_stack())


# What ends or stops a process


def exits(*args: Any, **options: Any) -> Tensor:
    """Ends the process without a word."""
    os._exit(3)


def segfaults(*args: Any, **options: Any) -> Tensor:
    """Ends the process as a wild pointer does."""
    os.kill(os.getpid(), signal.SIGSEGV)
    return dense.run(*args, **options)


def forks(*args: Any, **options: Any) -> Tensor:
    """Goes on as two processes."""
    os.fork()
    return off_by_a_percent(*args, **options)


def prints(*args: Any, **options: Any) -> Tensor:
    """Talks."""
    os.write(1, b"a word from a path\n")
    return dense.run(*args, **options)


def hangs(*args: Any, **options: Any) -> Tensor:
    """Never answers."""
    time.sleep(1000)
    return dense.run(*args, **options)


def runs_out_of_memory(*args: Any, **options: Any) -> Tensor:
    """Asks for more than there is."""
    raise MemoryError("64 GiB for a mask")


def raises(*args: Any, **options: Any) -> Tensor:
    """Has a defect."""
    raise ZeroDivisionError("a defect")


def exits_while_timed(*args: Any, **options: Any) -> Tensor:
    """Right, until somebody reads a clock."""
    if being_timed():
        os._exit(3)
    return dense.run(*args, **options)


def exits_while_built(*args: Any, **options: Any) -> Tensor:
    """Right where it is proven, and the end of the process that is to time it."""
    if any(frame.name == "build" for frame in traceback.extract_stack()):
        os._exit(4)
    return dense.run(*args, **options)


def raises_while_timed(*args: Any, **options: Any) -> Tensor:
    """Right, until somebody reads a clock."""
    if being_timed():
        raise ZeroDivisionError("a defect under load")
    return dense.run(*args, **options)


def needs_a_gpu(*args: Any, **options: Any) -> Tensor:
    """Says beforehand that it cannot run."""
    raise AssertionError("it said so")


# What gives another result


def off_by_a_percent(*args: Any, **options: Any) -> Tensor:
    """Wrong by what a careless eye takes for rounding."""
    return dense.run(*args, **options) * 1.01


def runs_packed(query: Tensor, key: Tensor, value: Tensor, selection: Selection, **options: Any) -> Tensor:
    """Declares dense and runs packed: right, and not what is timed."""
    return packed.run(query, key, value, selection, scale=options["scale"], workspace=options["workspace"])


def nan_in_one_place(*args: Any, **options: Any) -> Tensor:
    """One element of the last row is not a number."""
    out = dense.run(*args, **options)
    out[-1, -1, -1, -1, -1] = float("nan")
    return out


def leaves_rows_unwritten(*args: Any, **options: Any) -> Tensor:
    """The last query's row stays what the allocator handed out."""
    right = dense.run(*args, **options)
    out = torch.empty_like(right)
    out[:, :-1] = right[:, :-1]
    return out


def returns_another_dtype(*args: Any, **options: Any) -> Tensor:
    """In float64, whatever the value's dtype."""
    return dense.run(*args, **options).double()


def returns_another_shape(*args: Any, **options: Any) -> Tensor:
    """Heads flattened."""
    return dense.run(*args, **options).flatten(2, 3)


def keeps_state(*args: Any, workspace: Workspace, **options: Any) -> Tensor:
    """Takes its second answer from what the first one left in the workspace."""
    out = dense.run(*args, workspace=workspace, **options)
    kept = workspace.take("kept", out.shape[0], out[0].numel(), dtype=out.dtype, device=out.device)
    if workspace.reuses == 0:
        kept.copy_(out.flatten(1))
    return kept.clone().view(out.shape)


KEPT: dict[Any, Tensor] = {}


def keeps_blocks_by_address(query: Tensor, key: Tensor, value: Tensor, selection: Selection, **options: Any) -> Tensor:
    """Derives from a selection once and looks it up by where the indices lie."""
    own, place = selection.indices, (query.data_ptr(), selection.indices.data_ptr(), selection.indices.shape)
    kept = KEPT.setdefault(place, own.clone())
    return dense.run(query, key, value, dataclasses.replace(selection, indices=kept), **options)


def keeps_keys_by_address(query: Tensor, key: Tensor, *args: Any, **options: Any) -> Tensor:
    """Copies keys into a layout of its own once and looks the copy up by where they lie."""
    kept = KEPT.setdefault((query.data_ptr(), key.data_ptr(), key.shape, key.stride()), key.detach().clone())
    return dense.run(query, kept, *args, **options)


def returns_its_workspace(*args: Any, workspace: Workspace, **options: Any) -> Tensor:
    """Its output is a buffer that the next call overwrites."""
    out = dense.run(*args, workspace=workspace, **options)
    kept = workspace.take("out", out.shape[0], out[0].numel(), dtype=out.dtype, device=out.device)
    return kept.copy_(out.flatten(1)).view(out.shape)


def drops_a_block(query: Tensor, key: Tensor, value: Tensor, selection: Selection, **options: Any) -> Tensor:
    """Reads all but the last of topk blocks."""
    fewer = selection.indices.clone()
    fewer[..., -1] = -1
    return dense.run(query, key, value, dataclasses.replace(selection, indices=fewer), **options)


def changes_the_process(*args: Any, **options: Any) -> Tensor:
    """Right, and whatever runs after it multiplies by other rules."""
    torch.set_float32_matmul_precision("medium")
    return dense.run(*args, **options)


def sorts_in_place(query: Tensor, key: Tensor, value: Tensor, selection: Selection, **options: Any) -> Tensor:
    """Sorts the caller's own blocks."""
    selection.indices.copy_(selection.indices.sort(-1).values)
    return dense.run(query, key, value, selection, **options)


def cleans_the_cache(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
    """Overwrites what lies in the caller's cache behind the context."""
    with torch.no_grad():
        value.nan_to_num_(0.0)
    return dense.run(query, key, value, *args, **options)


def without_a_maximum(query: Tensor, key: Tensor, value: Tensor, selection: Selection, **options: Any) -> Tensor:
    """Weights are exp(score), whatever the score."""
    read = reference.selected_keys(selection, key.shape[2], 0, query.shape[1])[:, :, :, None]
    scores = torch.einsum("bsghd,bgtd->bsght", query, key.nan_to_num()) * options["scale"]
    weights = torch.exp(scores) * read
    total = weights.sum(-1, keepdim=True)
    return torch.einsum("bsght,bgtd->bsghd", weights / torch.where(total > 0, total, 1.0), value.nan_to_num())


def forgets_the_last_tile(query: Tensor, *args: Any, **options: Any) -> Tensor:
    """Right for the queries of whole tiles of 64, and for fewer than a tile."""
    out, queries = dense.run(query, *args, **options), query.shape[1]
    return torch.where(torch.arange(queries)[:, None, None, None] < max(queries // 64, 1) * 64, out, 0.0)


def as_contiguous(tensor: Tensor) -> Tensor:
    """The tensor as a kernel sees it that is not told its strides."""
    return tensor.as_strided(tensor.shape, torch.empty(tensor.shape).stride())


def minds_strided_queries(query: Tensor, *args: Any, **options: Any) -> Tensor:
    """Reads queries as if they were contiguous."""
    return dense.run(as_contiguous(query), *args, **options)


def minds_strided_blocks(query: Tensor, key: Tensor, value: Tensor, selection: Selection, **options: Any) -> Tensor:
    """Reads blocks as if they were contiguous."""
    given = dataclasses.replace(selection, indices=as_contiguous(selection.indices))
    return dense.run(query, key, value, given, **options)


def minds_positions(query: Tensor, key: Tensor, value: Tensor, selection: Selection, **options: Any) -> Tensor:
    """Takes the queries for the last of the context, whatever the caller says."""
    return dense.run(query, key, value, dataclasses.replace(selection, query_positions=None), **options)


class Spoilt(torch.autograd.Function):
    """Passes a tensor on; its gradient goes through ``change``."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.change(grad), None


def counts_duplicates_in_its_gradient(
    query: Tensor, key: Tensor, value: Tensor, selection: Selection, **options: Any
) -> Tensor:
    """The key's gradient is right where no row names a block twice."""
    ordered = selection.indices.sort(-1).values
    twice = bool(((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any())
    return dense.run(query, Spoilt.apply(key, lambda grad: grad * (2 if twice else 1)), value, selection, **options)


def minds_a_strided_gradient(*args: Any, **options: Any) -> Tensor:
    """Its backward reads what it is handed as if that were contiguous."""
    return Spoilt.apply(dense.run(*args, **options), as_contiguous)


def asks_the_query_alone(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
    """Keys and values have gradients where the query has one."""
    if not query.requires_grad:
        key, value = key.detach(), value.detach()
    return dense.run(query, key, value, *args, **options)


def minds_a_small_reserve(*args: Any, reserve_rows: int, **options: Any) -> Tensor:
    """Computes as many rows as were reserved."""
    out = dense.run(*args, **options)
    if 0 < reserve_rows < out.shape[:3].numel():
        out.flatten(0, 2)[reserve_rows:] = 0.0
    return out


def minds_a_large_reserve(*args: Any, reserve_rows: int, **options: Any) -> Tensor:
    """Counts the reserved rows as keys."""
    out = dense.run(*args, **options)
    return out * 0.5 if reserve_rows > out.shape[:3].numel() else out


def grows_with_every_change(*args: Any, workspace: Workspace, **options: Any) -> Tensor:
    """A fresh buffer for each shape that is not the last one's."""
    out = dense.run(*args, workspace=workspace, **options)
    workspace.take(f"out.{out.shape[1]}.{workspace.reuses}", 1, out.numel(), dtype=out.dtype, device=out.device)
    return out


def wrong_gradient(query: Tensor, key: Tensor, value: Tensor, selection: Selection, **options: Any) -> Tensor:
    """Right forward; the value's gradient is off."""
    return dense.run(query, key, value, selection, **options) + 0.01 * (value - value.detach()).nan_to_num().sum()


def wrong_gradient_in_the_second_step(query: Tensor, *args: Any, workspace: Workspace, **options: Any) -> Tensor:
    """What backward needs lies in the workspace, and survives one step."""
    out = dense.run(query, *args, workspace=workspace, **options)
    if torch.is_grad_enabled() and query.requires_grad:
        factor = workspace.take("factor", 1, 1, dtype=out.dtype, device=out.device)
        if workspace.reuses == 0:
            factor.fill_(1.0)
        out = out * factor.clone()
    return out


def gather_off_by_a_percent(*args: Any, **options: Any) -> Tensor:
    """Wrong."""
    return gather.run(*args, **options) * 1.01


def gather_without_room_while_timed(*args: Any, **options: Any) -> Tensor:
    """Right, until somebody reads a clock."""
    if being_timed():
        raise MemoryError("no room beside the others")
    return gather.run(*args, **options)


def twin(run: Callable[..., Tensor], *, reserve: bool = False) -> SelectionPath:
    """A path that declares everything as dense does; ``reserve`` adds a ladder of reserved rows."""

    def with_reserve(problem: SelectionProblem, device: torch.device) -> tuple[Parameter, ...]:
        return (*dense.tunables(problem, device), reserve_parameter("reserve_rows", problem.rows))

    return msgspec.structs.replace(
        REAL["dense"], name=run.__name__, target=f"{__name__}:{run.__name__}", summary=(run.__doc__ or "").strip(),
        dispatchable=False, tunables=with_reserve if reserve else dense.tunables,
    )  # fmt: skip


TWINS = (
    *(exits, segfaults, hangs, forks, prints, runs_out_of_memory, raises),
    *(exits_while_built, exits_while_timed, raises_while_timed),
    *(off_by_a_percent, runs_packed, nan_in_one_place, leaves_rows_unwritten, returns_another_dtype),
    *(returns_another_shape, keeps_state, grows_with_every_change, wrong_gradient, wrong_gradient_in_the_second_step),
    *(keeps_blocks_by_address, keeps_keys_by_address, returns_its_workspace, drops_a_block),
    *(
        changes_the_process,
        sorts_in_place,
        cleans_the_cache,
        without_a_maximum,
        forgets_the_last_tile,
        minds_strided_queries,
    ),
    *(minds_strided_blocks, minds_positions, counts_duplicates_in_its_gradient, minds_a_strided_gradient),
    *(asks_the_query_alone, changes_the_process),
)
RESERVING = (minds_a_small_reserve, minds_a_large_reserve)

PATHS: dict[str, SelectionPath] = {
    **{name: REAL[name] for name in ("dense", "gather")},
    "needs_a_gpu": msgspec.structs.replace(twin(needs_a_gpu), unsupported=lambda *_: "needs a GPU"),
    **{run.__name__: twin(run) for run in TWINS},
    **{run.__name__: twin(run, reserve=True) for run in RESERVING},
    "complete_alone": msgspec.structs.replace(twin(forgets_the_last_tile), needs_complete=True),
}

WRONG_DEFAULT, FAILING_DEFAULT = (
    {
        **{name: REAL[name] for name in ("packed", "dense")},
        "gather": msgspec.structs.replace(REAL["gather"], target=f"{__name__}:{run.__name__}"),
    }
    for run in (gather_off_by_a_percent, gather_without_room_while_timed)
)
"""The default of a decode on a CPU is wrong in the one, and out of memory under the clock in the other."""

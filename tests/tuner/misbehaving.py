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
from nsa.paths import Parameter, SelectionPath, dense, gather, packed
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
    *(exits, segfaults, hangs, runs_out_of_memory, raises),
    *(exits_while_built, exits_while_timed, raises_while_timed),
    *(off_by_a_percent, runs_packed, nan_in_one_place, leaves_rows_unwritten, returns_another_dtype),
    *(returns_another_shape, keeps_state, grows_with_every_change, wrong_gradient, wrong_gradient_in_the_second_step),
    *(keeps_blocks_by_address, keeps_keys_by_address, returns_its_workspace, drops_a_block),
)
RESERVING = (minds_a_small_reserve, minds_a_large_reserve)

PATHS: dict[str, SelectionPath] = {
    **{name: REAL[name] for name in ("dense", "gather")},
    "needs_a_gpu": msgspec.structs.replace(twin(needs_a_gpu), unsupported=lambda *_: "needs a GPU"),
    **{run.__name__: twin(run) for run in TWINS},
    **{run.__name__: twin(run, reserve=True) for run in RESERVING},
}

WRONG_DEFAULT, FAILING_DEFAULT = (
    {
        **{name: REAL[name] for name in ("packed", "dense")},
        "gather": msgspec.structs.replace(REAL["gather"], target=f"{__name__}:{run.__name__}"),
    }
    for run in (gather_off_by_a_percent, gather_without_room_while_timed)
)
"""The default of a decode on a CPU is wrong in the one, and out of memory under the clock in the other."""

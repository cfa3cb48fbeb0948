"""The kernels that ours are timed beside: the yardsticks' file, which stays outside, and flash-linear-attention.

Each is a function of one call's Inputs that gives the output (B, S, G, h, Dv), or None where it cannot run the shape.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nsa.problem import SelectionProblem
from tuner.inputs import Inputs

Peer = Callable[[Inputs], Tensor]
SPLITS = (2, 4, 8)


def load(file: Path | None) -> Any:
    """The yardsticks' module, or None."""
    if file is None:
        return None
    spec = importlib.util.spec_from_file_location("selection_yardsticks", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def peers(problem: SelectionProblem, yardsticks: Any, kind: str) -> dict[str, Peer]:
    """Name -> peer, of those that can run the problem in this kind: ``forward``, ``backward`` or ``decode``."""
    found: dict[str, Peer] = {}
    if yardsticks is not None and kind == "decode":
        found |= {f"yardstick split {n}": partial(_split, yardsticks, n) for n in SPLITS if n <= problem.topk}
    if yardsticks is not None and kind == "forward" and problem.B == 1:
        names = ["tok_fwd", "kvc_fwd"] if problem.S <= 2**14 or problem.h < 8 else ["tok_fwd"]  # 34 GB of partials
        names += ["union_fwd"] if problem.topk * 4 <= 128 else []
        found |= {f"yardstick {name}": partial(_yardstick, yardsticks, name) for name in names}
    if kind != "decode" and problem.h >= 16 and importlib.util.find_spec("fla") is not None:
        found["flash-linear-attention"] = _fla
    return found


def _ordered(blocks: Tensor) -> Tensor:
    """Blocks ascending, -1 last."""
    last = 2**30
    ordered = torch.where(blocks < 0, last, blocks).sort(-1).values
    return torch.where(ordered == last, -1, ordered).int()


def _yardstick(module: Any, name: str, inputs: Inputs) -> Tensor:
    _, queries, groups, heads, width = inputs.query.shape
    blocks = inputs.selection.blocks[0].transpose(0, 1).contiguous()
    key, value = inputs.key[0].transpose(0, 1), inputs.value[0].transpose(0, 1)
    query = inputs.query[0].flatten(1, 2)
    out: Tensor = getattr(module, name)(query, key, value, blocks, inputs.selection.block_size, width**-0.5)
    return out.view(1, queries, groups, heads, -1)


def _split(module: Any, splits: int, inputs: Inputs) -> Tensor:
    batch, _, groups, heads, width = inputs.query.shape
    blocks = inputs.selection.blocks[:, 0].transpose(0, 1)
    key, value = inputs.key.transpose(1, 2), inputs.value.transpose(1, 2)
    lengths = torch.full((batch,), key.shape[1], dtype=torch.int32, device=key.device)
    query = inputs.query[:, 0].flatten(1, 2)
    size = inputs.selection.block_size
    out: Tensor = module.splitk_decode(query, key, value, blocks, lengths, size, width**-0.5, S=splits)
    return out.view(batch, 1, groups, heads, -1)


def _fla(inputs: Inputs) -> Tensor:
    from fla.ops.nsa.parallel import ParallelNSAFunction  # the extra "peers"

    batch, queries, groups, heads, width = inputs.query.shape
    out: Tensor = ParallelNSAFunction.apply(
        inputs.query.flatten(2, 3), inputs.key.transpose(1, 2), inputs.value.transpose(1, 2), inputs.selection.blocks,
        inputs.selection.blocks.shape[3], inputs.selection.block_size, width**-0.5, None,
    )  # fmt: skip
    return out.view(batch, queries, groups, heads, -1)


def prepared(inputs: Inputs) -> Inputs:
    """The same call, each row's blocks ascending with -1 last, as the yardsticks want them: sorted before the clock."""
    selection = inputs.selection
    ordered = type(selection).from_blocks(
        _ordered(selection.blocks).contiguous(), block_size=selection.block_size,
        context_length=selection.context_length, overlap=selection.overlap_hint, complete=selection.complete,
    )  # fmt: skip
    return Inputs(inputs.query, inputs.key, inputs.value, ordered, inputs.union)

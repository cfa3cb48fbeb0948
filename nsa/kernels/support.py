"""Leaf. Where the Triton paths can run, and what they share as descriptions. Imports no Triton by itself."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Literal, TypedDict

import torch
from torch import Tensor

from ..attend import SDPA
from ..device import installed
from ..problem import SelectionProblem
from ..trace import ParameterValue

SHARED_BYTES = 232_448
"""Shared memory that one program can have on sm_90."""
KERNELS = {
    "triton_token": r"^nsa_token_forward$",
    "triton_union": r"^nsa_union_forward$",
    "triton_block": r"^nsa_block_forward$",
    "triton_decode": r"^nsa_decode_forward$",
}
"""The kernel by which each path is recognised. A profiler shows a Triton function under its own name."""
RING_WIDTHS = (64, 128)
"""Head dims of the Gluon kernels: whole rows of their swizzled shared memory."""
LIBRARIES = {
    "sdpa": SDPA,
    "flash_attn": r"^flash_attn::",
    "flash_attn_4": r"flash_attncute",
}
"""What shows that a library's attention ran: its operators, or for FlashAttention-4, which has none, its kernels, which
the CuTe DSL names by module and class."""

ITEMS = 2048
"""Items of the backward that an H200's 264 programs at a time share evenly."""
BACKWARD = {"nsa_gradient_rows": 1, "nsa_gradient_block": 0, "nsa_gradient_query": 0, "nsa_gradient_key": 0}
"""Kernels of the common backward, and how often one call launches them; 0 = at least once."""


Route = Literal["auto", "torch", "triton"]
"""How an operation that is no path runs; ``auto`` = by Triton on a GPU that has it, else by torch's operators."""


def by_triton(route: Route, tensor: Tensor) -> bool:
    """Whether an operation on the tensor runs by Triton kernels."""
    return route == "triton" or (route == "auto" and tensor.is_cuda and installed("triton"))


class Ladder(TypedDict):
    """What a path needs for ``paths.base.Parameter``, which this leaf does not import."""

    name: str
    ladder: tuple[ParameterValue, ...]
    default: ParameterValue


def common_reason(path: str, problem: SelectionProblem, device: torch.device) -> str | None:
    """Why no Triton path can run the problem on the device; None if some can."""
    if not installed("triton"):
        return f"{path} needs the package triton"
    if problem.form != "blocks":
        return "needs blocks"
    if problem.dtype == "float64":
        return f"{path} has no float64"
    if problem.block_size not in (16, 32, 64, 128):
        return f"{path} needs a block_size of 16, 32, 64 or 128, got {problem.block_size}"
    if max(problem.Dk, problem.Dv) > 256:
        return f"{path} needs head dims up to 256, got {problem.Dk} and {problem.Dv}"
    if problem.topk > 64:
        return f"{path} needs a topk up to 64, got {problem.topk}"
    if problem.h > 64:
        return f"{path} needs up to 64 query heads per group, got {problem.h}"
    return device_reason(path, device)


def device_reason(path: str, device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on the device; None if they can."""
    if not installed("triton"):
        return f"{path} needs the package triton"
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return f"{path} needs a CUDA device, and this torch finds none"
        return capability_reason(path, torch.cuda.current_device() if device.index is None else device.index)
    if device.type == "cpu" and interpreted():
        return None
    return f"{path} needs a CUDA device, or Triton's interpreter on a CPU"


@cache
def capability_reason(path: str, index: int) -> str | None:
    """Why the CUDA device is too old; None if it is not."""
    capability = torch.cuda.get_device_capability(index)
    return None if capability >= (8, 0) else f"{path} needs compute capability 8.0, got {capability}"


@cache
def interpreted() -> bool:
    """Whether Triton functions of this process run in its interpreter: asked of one of them, not of the environment."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(tl.cdiv, InterpretedFunction)


def loads_reason(path: str, loads: str, problem: SelectionProblem, device: torch.device) -> str | None:
    """Why key and value blocks cannot be loaded like that; None if they can. Strides are the call's to check."""
    if loads == "pointer":
        return None
    if device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (9, 0):
        return f"{path} with descriptor loads needs compute capability 9.0"
    if problem.Dk * problem.item_bytes % 16 or problem.Dv * problem.item_bytes % 16:
        return f"{path} with descriptor loads needs head dims of a multiple of 16 bytes"
    return None


def loads_ladder(path: str, problem: SelectionProblem, device: torch.device) -> Ladder:
    """How blocks are loaded: by ``descriptor`` (one instruction a block, a third fewer registers) where that can be.

    Decode keeps ``pointer``: making two descriptors costs the host more than the kernel takes.
    """
    if loads_reason(path, "descriptor", problem, device):
        return {"name": "loads", "ladder": ("pointer",), "default": "pointer"}
    best = "descriptor" if device.type == "cuda" and problem.mode != "decode" else "pointer"
    return {"name": "loads", "ladder": ("pointer", "descriptor"), "default": best}


def shared_reason(path: str, needed: int) -> str | None:
    """Why a program of about ``needed`` bytes of shared memory cannot start; None if it can."""
    if needed <= SHARED_BYTES:
        return None
    return f"{path} with these parameters needs about {needed} bytes of shared memory, {SHARED_BYTES} are there"


def padded(size: int, least: int = 1) -> int:
    """The smallest power of two that is at least ``size`` and ``least``."""
    return max(least, 1 << (size - 1).bit_length())


def parts(size: int, part: int) -> int:
    """How many parts of ``part`` cover ``size``."""
    return -(-size // part)


def block_bytes(problem: SelectionProblem) -> int:
    """Bytes of one block's keys and values as kernels hold them."""
    return problem.block_size * (padded(problem.Dk, 16) + padded(problem.Dv, 16)) * problem.item_bytes


def backward_ladders(path: str, problem: SelectionProblem, device: torch.device) -> list[Ladder]:
    """The tunables of the common backward, for problems of mode ``train``.

    One stage is left out: Triton 3.6 compiles the products of the unpipelined loop to shared reads out of bounds
    (docs/log.md). Rows are as many as leave room for three stages twice on a multiprocessor, and for the accumulators
    in registers; items are smaller where few would leave multiprocessors idle.
    """
    if problem.mode != "train":
        return []
    ring = ring_reason(path, problem, device) is None
    row_bytes = (padded(problem.Dk, 16) + padded(problem.Dv, 16)) * problem.item_bytes
    pair_rows = problem.B * problem.S * problem.G * problem.topk * padded(problem.h)
    rows = 64 if row_bytes < 512 else 32 if row_bytes == 512 else 16
    items = [size for size in (2048, 4096) if size * ITEMS <= pair_rows]
    return [
        {"name": "backward_rows", "ladder": (16, 32, 64), "default": rows},
        {"name": "backward_item_rows", "ladder": (1024, 2048, 4096), "default": items[-1] if items else 1024},
        {"name": "backward_span", "ladder": (0, 4096, 16384, 65536), "default": 16384},
        {"name": "backward_partial", "ladder": ("value", "float32"), "default": "value"},
        {"name": "backward_warps", "ladder": (4, 8), "default": 4},
        {"name": "backward_stages", "ladder": (2, 3, 4), "default": 3 if row_bytes < 1024 else 2},
        {"name": "backward_registers", "ladder": (0, 128, 168), "default": 0},
        {"name": "backward_loads", "ladder": ("pointer", "ring") if ring else ("pointer",), "default": "pointer"},
    ]


def backward_reason(
    path: str, problem: SelectionProblem, device: torch.device, parameters: Mapping[str, ParameterValue]
) -> str | None:
    """Why the common backward cannot run with these parameters; None if it can, or is not asked for."""
    if problem.mode != "train":
        return None
    rows = max(int(parameters.get("backward_rows", 32)), padded(problem.h))
    stages = int(parameters.get("backward_stages", 3))
    row_bytes = (padded(problem.Dk, 16) + padded(problem.Dv, 16)) * problem.item_bytes
    if parameters.get("backward_loads", "pointer") == "ring":
        if why := ring_reason(path, problem, device):
            return why
        at_once = rows // padded(problem.h) * padded(problem.h)
        if at_once not in (16, 32) or stages < 3 or int(parameters.get("backward_warps", 4)) != 4:
            return f"{path} with backward_loads='ring' needs 16 or 32 rows, 3 stages or more and 4 warps"
        if int(parameters.get("backward_registers", 0)):
            return f"{path} with backward_loads='ring' has its own backward_registers"
    return shared_reason(
        path + " backward", block_bytes(problem) + stages * rows * row_bytes + 2 * rows * problem.block_size * 4
    )


def ring_reason(path: str, problem: SelectionProblem, device: torch.device) -> str | None:
    """Why the backward's kernel ``gradient_ring`` cannot run the problem on the device; None if it can."""
    name = f"{path} with backward_loads='ring'"
    if why := hopper_reason(name, problem, device):
        return why
    if problem.block_size != 64:
        return f"{name} needs a block_size of 64, got {problem.block_size}"
    if padded(problem.h) not in (8, 16, 32):
        return f"{name} needs 5 to 32 query heads per group, got {problem.h}"
    return None


def hopper_reason(name: str, problem: SelectionProblem, device: torch.device) -> str | None:
    """Why a Gluon kernel for compute capability 9.0 cannot run the problem on the device; None if it can."""
    if device.type != "cuda":
        return f"{name} needs a CUDA device"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] != 9:
        return f"{name} is written for compute capability 9.0"
    if problem.dtype not in ("float16", "bfloat16"):
        return f"{name} needs float16 or bfloat16, got {problem.dtype}"
    if problem.Dk not in RING_WIDTHS or problem.Dv not in RING_WIDTHS:
        return f"{name} needs head dims of {RING_WIDTHS}, got {problem.Dk} and {problem.Dv}"
    return None


def required(
    path: str, problem: SelectionProblem, device: torch.device, parameters: Mapping[str, ParameterValue], **more: int
) -> dict[str, int]:
    """One launch of a path's kernel, ``more`` others by name, and in mode train those of its backward. Nothing under
    the interpreter, which leaves no trace."""
    if device.type != "cuda":
        return {}
    backward = BACKWARD if problem.mode == "train" else {}
    if backward and parameters.get("backward_loads") == "ring":
        backward = {name.replace("block", "ring"): count for name, count in BACKWARD.items()}
    return {KERNELS[path]: 1} | {rf"^{name}$": count for name, count in (more | backward).items()}


def forbidden(path: str) -> tuple[str, ...]:
    """What must not be seen while ``path`` runs: the other Triton paths and every library attention."""
    others = tuple(pattern for name, pattern in KERNELS.items() if name != path)
    return (*others, *LIBRARIES.values(), r"^aten::_local_scalar_dense$")

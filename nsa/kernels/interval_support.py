"""Leaf. Where the interval kernels can run, and their tunables, as descriptions. Imports no Triton by itself."""

from __future__ import annotations

import torch

from ..problem import SelectionProblem
from ..trace import ParameterValue
from .support import Ladder, device_reason, hopper_reason, loads_ladder, loads_reason, padded, shared_reason

FORWARD = r"^nsa_interval_(forward|ring)$"


def ladders(path: str, problem: SelectionProblem, device: torch.device) -> list[Ladder]:
    """``tokens`` and ``keys`` of the forward's tile, its ``warps``, ``stages``, ``loads`` and the most ``registers`` of
    a thread (0 = as many as the compiler wants); in mode train the same of the backward's two kernels, and the
    ``splits`` of a key tile's queries (0 = enough to fill a GPU)."""
    wide = problem.dtype == "float32"
    heads = padded(problem.h)
    tiles = tuple(size for size in (1, 2, 4, 8, 16, 32, 64) if 16 <= size * heads <= 256) or (1,)

    def near(rows: int) -> int:
        return min(tiles, key=lambda size: abs(size * heads - rows))

    loads = _loads(path, problem, device)
    few = loads["default"] == "ring"  # ptxas does not fit the others' tile into 128 registers
    forward: list[Ladder] = [
        {"name": "tokens", "ladder": tiles, "default": near(32 if wide else 128)},
        {"name": "keys", "ladder": (32, 64, 128), "default": 32 if wide else 64},
        {"name": "warps", "ladder": (4, 8), "default": 4 if wide else 8},
        {"name": "stages", "ladder": (1, 2, 3), "default": 1 if wide else 2},
        loads,
        {"name": "registers", "ladder": (0, 128), "default": 128 if few else 0},
    ]
    if problem.mode != "train":
        return forward
    return [
        *forward,
        {"name": "query_tokens", "ladder": tiles, "default": near(32 if wide else 64)},
        {"name": "query_keys", "ladder": (32, 64, 128), "default": 32 if wide else 64},
        {"name": "key_tokens", "ladder": tiles, "default": near(32 if wide else 64)},
        {"name": "key_keys", "ladder": (32, 64, 128), "default": 32 if wide else 64},
        {"name": "splits", "ladder": (0, 1, 2, 4, 8, 16), "default": 0},
        {"name": "backward_warps", "ladder": (4, 8), "default": 4},
        {"name": "backward_stages", "ladder": (1, 2), "default": 1 if wide else 2},
        {"name": "backward_registers", "ladder": (0, 128), "default": 0},
    ]


def _loads(path: str, problem: SelectionProblem, device: torch.device) -> Ladder:
    """``loads_ladder``, and ``ring``, the kernel written for compute capability 9.0, where a tile of the default fits
    it. Decode keeps ``pointer``."""
    usual = loads_ladder(path, problem, device)
    if ring_reason(path, problem, device):
        return usual
    best = usual["default"] if problem.mode == "decode" or padded(problem.h) < 2 else "ring"
    return {**usual, "ladder": (*usual["ladder"], "ring"), "default": best}


def ring_reason(path: str, problem: SelectionProblem, device: torch.device) -> str | None:
    """Why the kernel ``ring`` cannot run the problem on the device; None if it can."""
    return hopper_reason(f"{path} with loads='ring'", problem, device)


def reason(
    path: str, problem: SelectionProblem, device: torch.device, parameters: dict[str, ParameterValue]
) -> str | None:
    """Why the interval kernels cannot run the problem on the device; None if they can."""
    if problem.dtype == "float64":
        return f"{path} has no float64"
    if max(problem.Dk, problem.Dv) > 256:
        return f"{path} needs head dims up to 256, got {problem.Dk} and {problem.Dv}"
    if problem.h > 64:
        return f"{path} needs up to 64 query heads per group, got {problem.h}"
    if why := device_reason(path, device):
        return why
    values = {ladder["name"]: ladder["default"] for ladder in ladders(path, problem, device)} | parameters
    if values["loads"] == "ring":
        rows = int(values["tokens"]) * padded(problem.h)
        if why := ring_reason(path, problem, device):
            return why
        if rows != 16 * int(values["warps"]) or int(values["stages"]) < 2:
            return f"{path} with loads='ring' needs 16 rows a warp and 2 stages, got {rows} rows and {values}"
    elif why := loads_reason(path, str(values["loads"]), problem, device):
        return why
    elif device.type == "cuda" and values["loads"] == "descriptor" and values["registers"]:
        return f"{path} with loads='descriptor' does not compile for {values['registers']} registers"
    return _shared_reason(path, problem, values)


def _shared_reason(path: str, problem: SelectionProblem, values: dict[str, ParameterValue]) -> str | None:
    heads = padded(problem.h)
    row = (padded(problem.Dk, 16) + padded(problem.Dv, 16)) * problem.item_bytes

    def rows(name: str) -> int:
        return max(16, int(values[name]) * heads)

    query_bytes = rows("tokens") * padded(problem.Dk, 16) * problem.item_bytes
    why = shared_reason(path, query_bytes + int(values["stages"]) * int(values["keys"]) * row)
    if why or problem.mode != "train":
        return why
    stages = int(values["backward_stages"])
    needed = rows("query_tokens") + stages * int(values["query_keys"])
    other = int(values["key_keys"]) + stages * rows("key_tokens")
    return shared_reason(path + " backward", max(needed, other) * row)

"""One fused decode step of a layer on a cache, made once and run for every token: scratch memory and seven launches.

Used by ``nsa.decode``. The kernels are ``nsa.kernels.step_append`` and ``.step``; a learnt compressor runs between them
as torch operators. Nothing here waits for the device.
"""

from __future__ import annotations

from typing import Any, Protocol

import msgspec
import torch
from torch import Tensor, nn

from .cache import BRANCHES, Branch, NSACache
from .config import NSAConfig
from .flags import Flags
from .kernels import support
from .rotary import frequencies
from .trace import ParameterValue, announce, executed

PROCESSORS = 132
"""Multiprocessors that splits are made for."""


class Layer(Protocol):
    """What a step takes of an ``NSAAttention``."""

    config: NSAConfig
    flags: Flags
    project: nn.Linear
    gate_bias: nn.Parameter
    compress_key: nn.Module
    compress_value: nn.Module
    output: nn.Linear


class StepParameters(msgspec.Struct, frozen=True, kw_only=True):
    """Tunables of the step: programs per row of each branch (powers of two) and of the choice, keys per tile, warps and
    stages. Up to ``counted_blocks`` (a power of two, 0 = never) blocks are chosen by counting, more one by one."""

    compressed_splits: int
    selected_splits: int
    window_splits: int
    compressed_tile: int = 64
    tile: int = 64
    choice_splits: int = 1
    blocks_at_once: int = 64
    counted_blocks: int = 256
    compressed_warps: int = 4
    choose_warps: int = 4
    attend_warps: int = 4
    combine_warps: int = 2
    compressed_stages: int = 2
    attend_stages: int = 3


def default_parameters(config: NSAConfig, rows: int, capacity: int, dtype: torch.dtype) -> StepParameters:
    """About two programs per multiprocessor and kernel, and no more programs of a row than it has tiles."""
    share = 1 << (max(1, 2 * PROCESSORS // rows).bit_length() - 1)
    tile, compressed_tile = min(64, support.padded(config.block_size, 16)), 32 if dtype == torch.float32 else 64
    tiles = max(1, capacity // config.kernel_stride // compressed_tile)
    blocks = -(-capacity // config.block_size)
    at_once = min(128, max(16, (1024 if dtype == torch.float32 else 2048) // support.padded(config.heads_per_group)))
    return StepParameters(
        compressed_splits=min(64, 2 * share, support.padded(tiles)),
        selected_splits=min(support.padded(config.topk), max(2, share)),
        window_splits=min(support.padded(-(-config.window_size // tile)), max(1, share // 2)),
        compressed_tile=compressed_tile,
        tile=tile,
        choice_splits=min(16, max(2, share // 4), support.padded(-(-blocks // 64))),
        blocks_at_once=at_once,
        attend_stages=2 if dtype == torch.float32 else 3,
    )


class Launch:
    """One kernel with all its arguments. The first call goes through Triton, later ones launch what it returned.

    Those pass addresses, not tensors; ``held`` keeps them alive.
    """

    __slots__ = ("arguments", "constants", "grid", "held", "kernel", "launcher", "options")

    def __init__(self, kernel: Any, grid: tuple[int, int], arguments: tuple[Any, ...], constants: dict[str, Any],
                 **options: int) -> None:  # fmt: skip
        self.kernel, self.grid, self.held, self.arguments = kernel, grid, arguments, arguments
        self.options = options
        self.constants = {name: constants[name] for name in kernel.arg_names[len(arguments) :]}
        self.launcher: Any = None

    def __call__(self) -> None:
        if self.launcher is not None:
            self.launcher(*self.grid, self.arguments)
            return
        compiled = self.kernel[(*self.grid, 1)](*self.arguments, **self.constants, **self.options)
        if compiled is not None:  # the interpreter compiles nothing
            from .kernels.launch import Launcher

            addresses = (item.data_ptr() if isinstance(item, Tensor) else item for item in self.held)
            self.arguments = (*addresses, *self.constants.values())
            self.launcher = Launcher(compiled)


class FusedStep:
    """What one step of a layer on a cache needs, made once: scratch memory and launches.

    Good while ``key`` is what ``step_key`` says: the storage of the cache and the layer's weights stay where they are.
    ``branch``: the one whose gates are 1, the others are not run; None = the layer's gates.
    """

    def __init__(self, layer: Layer, cache: NSACache, branch: Branch | None, parameters: StepParameters | None) -> None:
        config, weight, batch = layer.config, layer.project.weight, cache.batch
        rows, heads, topk = batch * config.num_kv_heads, config.heads_per_group, config.topk
        wide = torch.float64 if weight.dtype == torch.float32 else torch.float32
        self.key = step_key(layer, cache, branch, parameters)
        self.layer, self.branch, self.capacity = layer, branch, cache.reach
        self.parameters = parameters or default_parameters(config, rows, self.capacity, weight.dtype)
        self.parts = self._parts()
        self._eager: dict[str, ParameterValue] = {**msgspec.structs.asdict(self.parameters), "graph": False}
        self._replayed = self._eager | {"graph": True}

        def empty(*shape: int, dtype: torch.dtype = weight.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=weight.device)

        with torch.inference_mode(False):
            self.projected, self.query = empty(batch, weight.shape[0]), empty(rows, heads, config.head_dim)
            self.mixed = empty(batch, config.num_heads * config.value_width)
            blocks = -(-self.capacity // config.block_size)
            self.scores = empty(rows, heads, 2, (blocks + 16) // 16 * 16, dtype=wide)
            self.ranks = empty(rows, support.padded(blocks), dtype=torch.int64)
            self.picks = empty(rows, topk, dtype=torch.int32)
            self.counter = torch.zeros(rows, dtype=torch.int32, device=weight.device)
            self.part = empty(rows, sum(self.parts), heads, config.value_width, dtype=torch.float32)
            self.top, self.total = (empty(rows, sum(self.parts), heads, dtype=wide) for _ in range(2))
            self.recent = [
                empty(batch, config.num_kv_heads, config.kernel_size, width)
                for width in (config.head_dim, config.value_width)
                if config.compression == "mlp"
            ]
            self.fresh = [empty(rows, recent.shape[-1]) for recent in self.recent]
        self._project, self._output = weight.detach().t(), layer.output.weight.detach().t()
        self.before, self.after = self._launches(cache)

    def run(self, x: Tensor) -> Tensor:
        """x (B, 1, dim) -> y (B, 1, dim); the cache is one token longer on the device, not yet on the host."""
        layer = self.layer
        torch.mm(x[:, 0], self._project, out=self.projected)
        for launch in self.before:
            launch()
        if self.fresh:
            self.fresh[0].copy_(layer.compress_key(self.recent[0]).flatten(0, 2))
            self.fresh[1].copy_(layer.compress_value(self.recent[1]).flatten(0, 2))
        for launch in self.after:
            launch()
        return torch.mm(self.mixed, self._output)[:, None]

    def report(self, status: str, reason: str, replayed: bool) -> None:
        """Tell ``trace`` that the step ran."""
        announce(status, reason)
        executed("decode", "fused", self._replayed if replayed else self._eager)

    def _parts(self) -> tuple[int, int, int]:
        """Programs per row of each branch, 0 for one that is not run; selection needs the scores of compression."""
        sizes = self.parameters
        compressed = 0 if self.branch == "window" else sizes.compressed_splits
        selected = sizes.selected_splits if self.branch in (None, "selection") else 0
        return compressed, selected, sizes.window_splits if self.branch in (None, "window") else 0

    def _launches(self, cache: NSACache) -> tuple[list[Launch], list[Launch]]:
        """The kernels up to a learnt compression of what the new token completes, and those behind it."""
        from .kernels import step, step_append, step_choose, step_combine  # Triton, loaded when first run

        sizes, constants = self.parameters, self._constants(cache)
        batch, groups = cache.batch, cache.groups
        compressed, selected, window = self.parts
        rows, slots, width = batch * groups, cache.keys.shape[1], self.projected.shape[1]
        room, few, pages = cache.keys.shape[3], cache.compressed_keys.shape[2], cache.table.shape[1]
        lengths, table, stat = cache.lengths, cache.table, (self.part, self.top, self.total)
        turn = frequencies(self.layer.config.head_dim, self.layer.config.rotary_base, lengths.device)
        storage = cache.keys, cache.values, cache.compressed_keys, cache.compressed_values
        before = [
            Launch(step_append.nsa_step_append, (rows, 4),
                   (self.projected, self.query, *storage, lengths, table, turn, slots, room, few, pages, self.capacity,
                    width), constants, num_warps=2)
        ]  # fmt: skip
        after = []
        for source, target, recent, fresh in zip(storage[:2], storage[2:], self.recent, self.fresh, strict=False):
            sized = constants | {"D": recent.shape[-1], "DP": support.padded(recent.shape[-1])}
            before.append(Launch(
                step_append.nsa_step_recent, (rows, 1),
                (source, recent, lengths, table, slots, room, pages, self.capacity), sized, num_warps=4))  # fmt: skip
            after.append(Launch(
                step_append.nsa_step_keep, (rows, 1),
                (fresh, target, lengths, table, slots, few, pages, self.capacity), sized, num_warps=4))  # fmt: skip
        if compressed:
            after.append(Launch(
                step.nsa_step_compressed, (rows * compressed, 1),
                (self.query, *storage[2:], lengths, table, self.scores, *stat, slots, few, pages, self.capacity,
                 self.scores.shape[3]), constants | {"BN": sizes.compressed_tile},
                num_warps=sizes.compressed_warps, num_stages=sizes.compressed_stages))  # fmt: skip
        if selected:
            after.append(Launch(
                step_choose.nsa_step_choose, (rows * sizes.choice_splits, 1),
                (self.scores, self.top, self.total, lengths, self.ranks, self.picks, self.counter, self.capacity,
                 self.scores.shape[3]), constants, num_warps=sizes.choose_warps))  # fmt: skip
        if selected or window:
            after.append(Launch(
                step.nsa_step_attend, (rows * (selected + window), 1),
                (self.query, *storage[:2], lengths, table, self.picks, *stat, slots, room, pages, self.capacity),
                constants, num_warps=sizes.attend_warps, num_stages=sizes.attend_stages))  # fmt: skip
        after.append(Launch(
            step_combine.nsa_step_combine, (rows * self.layer.config.heads_per_group, 1),
            (self.projected, self.layer.gate_bias, *stat, self.mixed, lengths, width),
            constants | {"COMPRESSED": compressed if self.branch != "selection" else 0},
            num_warps=sizes.combine_warps))  # fmt: skip
        return before, after

    def _constants(self, cache: NSACache) -> dict[str, Any]:
        """The compile-time arguments of all kernels, by name."""
        config, sizes, (compressed, selected, window) = self.layer.config, self.parameters, self.parts
        heads, width, wide = config.heads_per_group, config.head_dim, self.scores.dtype == torch.float64
        return {
            "G": config.num_kv_heads, "H": heads, "HP": support.padded(heads),
            "M": support.padded(heads, 1 if wide else 16),  # float32 has no use for a tensor core's rows
            "DK": width, "DKP": support.padded(width, 16), "HALF": support.padded(width // 2),
            "DV": config.value_width, "DVP": support.padded(config.value_width, 16),
            "L": config.kernel_size, "LP": support.padded(config.kernel_size), "STRIDE": config.kernel_stride,
            "BS": config.block_size, "TOPK": config.topk, "TP": support.padded(config.topk),
            "WINDOW": config.window_size, "PAGE": cache.page_size, "SCALE": width**-0.5, "WIDE": wide,
            "MEAN_ROLE": 0 if config.compression == "mean" else -1, "CHUNK": 16 if wide else 0,
            "BN": sizes.tile, "BJ": sizes.blocks_at_once, "NB": self.ranks.shape[1], "SHARES": sizes.choice_splits,
            "FEW": sizes.counted_blocks,
            "SPLITS": compressed,
            "SCORED": bool(selected), "VALUED": self.branch != "selection", "GATED": self.branch is None,
            "BEFORE": compressed, "SELECTED": selected, "RECENT": window, "PARTS": compressed + selected + window,
            "SECOND": compressed, "THIRD": compressed + selected,
            "GATE": config.num_heads * width + len(BRANCHES) * config.num_kv_heads * (width + config.value_width),
        }  # fmt: skip


def step_key(
    layer: Layer, cache: NSACache, branch: Branch | None, parameters: StepParameters | None
) -> tuple[object, ...]:
    """What a FusedStep depends on: it serves as long as this is the same."""
    weights = layer.project.weight, layer.gate_bias, layer.output.weight
    return id(layer), *(weight.data_ptr() for weight in weights), cache.generation, branch, parameters


def step_of(
    layer: Layer, cache: NSACache, branch: Branch | None = None, parameters: StepParameters | None = None
) -> FusedStep:
    """The cache's FusedStep, made anew where there is none that serves. ``parameters`` None = the default ones."""
    held = cache.plan
    if isinstance(held, FusedStep) and held.key == step_key(layer, cache, branch, parameters):
        return held
    made = FusedStep(layer, cache, branch, parameters)
    cache.plan = made
    return made

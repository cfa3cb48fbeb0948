"""NSAAttention: the whole layer. Compression, selection and window branches, gated and added; train, prefill, decode.

Top of the runtime: projects, scores, calls ``selection_attention`` and the two other branches. Flags are read when a
layer is constructed. It tunes nothing and holds no tokens: a context lives in its ``NSACache``.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from .cache import BRANCHES, Branch, NSACache, check_branch
from .compression import MeanCompressor, MLPCompressor, compressed_attention
from .config import NSAConfig
from .decode import Route, decode_route, fused_decode
from .dispatch import active_dispatch_table, selection_attention
from .dispatch_table import DispatchTable, load_dispatch_table
from .errors import ArgumentError
from .flags import Flags, read_flags
from .mix import mix_branches
from .opaque import opaque
from .problem import compressed_count
from .projection import Parts, projection_widths, split_projection
from .ranges import blocks_to_ranges_v1
from .rotary import rotation
from .scoring import choose_blocks
from .selection import LogSums, Selection
from .trace import announce, executed
from .window import window_attention
from .workspace import Workspace

_own = threading.local()


@opaque
def shared_workspace(device: torch.device) -> Workspace:
    """The workspace that layers share unless they are given one: one per device, thread and CUDA stream."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    name = f"{device} {stream}"
    if not hasattr(_own, name):
        setattr(_own, name, Workspace())
    return cast(Workspace, getattr(_own, name))


class NSAAttention(nn.Module):
    """Native Sparse Attention over tokens (B, S, dim).

    ``workspace``: None = the one all layers on a device share. ``dispatch_table``: None = the one in force at the call.
    ``flags``: None = read from the environment, now, which may raise FlagError. Calls raise what
    ``selection_attention`` does, a path that flags force and that cannot run included.
    ``project`` makes, of each token and in this order, queries, keys by branch, values by branch and gates; ``widths``
    are theirs. ``branch`` of a call: gates of 1 for that one, the other branches are not run; None = the gates.
    """

    def __init__(
        self,
        config: NSAConfig,
        *,
        workspace: Workspace | None = None,
        dispatch_table: DispatchTable | None = None,
        flags: Flags | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config, self.dim = config, config.dim
        self.flags = read_flags() if flags is None else flags
        self.workspace = workspace
        named = self.flags.dispatch_table
        self.dispatch_table = load_dispatch_table(named) if named and dispatch_table is None else dispatch_table

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False, device=device, dtype=dtype)

        def compressor(width: int) -> nn.Module:
            if config.compression == "mean":
                return MeanCompressor(config.kernel_size, config.kernel_stride)
            return MLPCompressor(config.kernel_size, config.kernel_stride, width, device=device, dtype=dtype)

        heads = config.num_heads
        self.widths = projection_widths(config)
        self.project = linear(config.dim, sum(self.widths))
        self.gate_bias = nn.Parameter(torch.zeros(self.widths[-1], device=device, dtype=dtype))
        self.compress_key = compressor(config.head_dim)
        self.compress_value = compressor(config.value_width)
        self.output = linear(heads * config.value_width, config.dim)

    def extra_repr(self) -> str:
        """The configuration, for ``print(layer)``."""
        return repr(self.config)

    def forward(self, x: Tensor, *, branch: Branch | None = None) -> Tensor:
        """x (B, S, dim), a whole context -> y (B, S, dim); for training, and without a cache."""
        self._check(x, branch)
        return cast(Tensor, self.output(self._whole(self.project(x), branch)))

    @opaque
    def _whole(self, projected: Tensor, branch: Branch | None) -> Tensor:
        """What lies between the projections of a whole context, at one break of a compiled graph."""
        query, gates, keys, values = self._split(projected, 0)
        compressed_key = self.compress_key(keys["compression"])
        compressed_value = self.compress_value(values["compression"])
        return self._attend(query, gates, keys, values, compressed_key, compressed_value, 0, branch)

    @torch.no_grad()
    def prefill(
        self, x: Tensor, *, capacity: int = 0, page_size: int = 0, branch: Branch | None = None
    ) -> tuple[Tensor, NSACache]:
        """x (B, S, dim), S >= 1, from an empty cache -> y (B, S, dim) and the cache, without gradients.

        ``capacity``: tokens that the cache has room for from the start; ``page_size`` as in ``empty_cache``.
        """
        self._check(x, branch)
        room = max(capacity, x.shape[1])
        cache = self.empty_cache(x.shape[0], capacity=room, device=x.device, page_size=page_size)
        if self.flags.batched_prefill:
            return self._extend(x, cache, branch), cache
        return torch.cat([self._extend(x[:, t : t + 1], cache, branch) for t in range(x.shape[1])], 1), cache

    def empty_cache(self, batch: int, *, capacity: int, device: torch.device, page_size: int = 0) -> NSACache:
        """A cache without tokens that has room for ``capacity`` of them; ``decode`` may start from it too.

        ``page_size``: tokens per page, a multiple of kernel_stride; 0 = each entry in one piece.
        """
        config = self.config
        autocast = torch.is_autocast_enabled(device.type)
        return NSACache(
            batch,
            config.num_kv_heads,
            config.head_dim,
            config.value_width,
            dtype=torch.get_autocast_dtype(device.type) if autocast else self.project.weight.dtype,
            device=device,
            kernel_size=config.kernel_size,
            kernel_stride=config.kernel_stride,
            capacity=capacity,
            page_size=page_size,
        )

    @torch.no_grad()
    def decode(
        self, x: Tensor, cache: NSACache, *, route: Route = "auto", branch: Branch | None = None
    ) -> tuple[Tensor, NSACache]:
        """x (B, 1, dim), the next token -> y (B, 1, dim) and the cache, updated in place; without gradients.

        ``route``: ``fused`` is one step in few kernels on the device, ``branches`` the three branches by torch
        operators and selection paths; see ``decode_route``. A call that fails leaves the cache as it was.
        """
        self._check(x, branch)
        if x.shape[1] != 1:
            raise ArgumentError(f"decode takes one token, x (B, 1, {self.config.dim}), got {tuple(x.shape)}")
        if x.shape[0] != cache.batch:
            raise ArgumentError(f"cannot append a token of batch {x.shape[0]} to a cache of batch {cache.batch}")
        taken, status, reason = decode_route(self, x, cache, route)
        if taken == "fused":
            return fused_decode(self, x, cache, branch, status, reason), cache
        y = self._extend(x, cache, branch)
        announce(status, reason)
        executed("decode", taken, {})
        return y, cache

    def _extend(self, x: Tensor, cache: NSACache, branch: Branch | None) -> Tensor:
        """Append tokens x (B, S, dim) to the cache and attend; a call that fails leaves the cache as it was."""
        config, first, done = self.config, cache.length, cache.compressed_length
        finished = False
        try:
            query, gates, keys, values = self._split(self.project(x), first)
            cache.append(keys, values)
            if compressed_count(cache.length, config.kernel_size, config.kernel_stride) > done:
                fresh = slice(done * config.kernel_stride, None)
                cache.append_compressed(
                    self.compress_key(cache.key("compression")[:, :, fresh]),
                    self.compress_value(cache.value("compression")[:, :, fresh]),
                )
            keys = {branch: cache.key(branch) for branch in BRANCHES}
            values = {branch: cache.value(branch) for branch in BRANCHES}
            compressed = cache.compressed_key, cache.compressed_value
            y: Tensor = self.output(self._attend(query, gates, keys, values, *compressed, first, branch))
            finished = True
        finally:
            if not finished:
                cache.truncate(first)
        return y

    def _split(self, projected: Tensor, first: int) -> Parts:
        """``split_projection`` of tokens at positions ``first`` .."""
        config, tokens = self.config, projected.shape[1]
        turn = rotation(
            first, tokens, config.head_dim, config.rotary_base, dtype=projected.dtype, device=projected.device
        )
        return split_projection(projected, turn, self.gate_bias, config)

    def _attend(
        self,
        query: Tensor,
        gates: Tensor,
        keys: Mapping[Branch, Tensor],
        values: Mapping[Branch, Tensor],
        compressed_key: Tensor,
        compressed_value: Tensor,
        first: int,
        branch: Branch | None,
    ) -> Tensor:
        """The three branches of queries at positions ``first`` .., gated and added: (B, S, G * h * Dv).

        The window comes first: it waits for no other branch, and while it runs the host prepares the others' launches.
        """
        config = self.config
        table = (self.dispatch_table or active_dispatch_table(query.device.type)).of_layer()
        outs: dict[Branch, Tensor] = {}
        workspace = shared_workspace(query.device) if self.workspace is None else self.workspace
        sums = LogSums()
        if branch in (None, "window"):
            outs["window"] = window_attention(
                query,
                keys["window"],
                values["window"],
                window=config.window_size,
                flash_attention=self.flags.flash_attention_window,
                workspace=workspace,
                table=table,
            )
        if branch in (None, "compression"):
            outs["compression"] = compressed_attention(
                query,
                compressed_key,
                compressed_value,
                first_position=first,
                kernel_size=config.kernel_size,
                kernel_stride=config.kernel_stride,
                flash_attention=self.flags.flash_attention_compression,
                sums=sums,
                workspace=workspace,
                table=table,
            )
        if branch in (None, "selection"):
            raw = keys["selection"], values["selection"]
            outs["selection"] = self._select(query, *raw, compressed_key, sums.tensor, workspace, table)
        if branch:
            return outs[branch].flatten(2)
        compression, selection, window = (outs[name] for name in BRANCHES)
        return mix_branches(gates, compression, selection, window).flatten(2)

    def _check(self, x: Tensor, branch: Branch | None) -> None:
        check_branch(branch)
        if x.dim() != 3 or x.shape[2] != self.dim or min(x.shape) < 1:
            raise ArgumentError(f"x has shape {tuple(x.shape)}, expected (B, S, {self.dim}), B and S at least 1")

    def _select(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        compressed_key: Tensor,
        logsum: Tensor | None,
        workspace: Workspace,
        table: DispatchTable,
    ) -> Tensor:
        config = self.config
        blocks = choose_blocks(
            query,
            compressed_key,
            context_length=key.shape[2],
            kernel_size=config.kernel_size,
            kernel_stride=config.kernel_stride,
            block_size=config.block_size,
            topk=config.topk,
            logsum=logsum,
        )
        selection = Selection.from_blocks(
            blocks, block_size=config.block_size, context_length=key.shape[2], complete=True
        )
        if not self.flags.ranges_v2:
            ranges = blocks_to_ranges_v1(blocks, config.block_size, selection.limits)
            selection = Selection.from_ranges(ranges, context_length=key.shape[2])
        flags = self.flags
        reservable = {path: flags.adjust(path, {}) for path in ("varlen", "packed")}
        return selection_attention(
            query,
            key,
            value,
            selection,
            path=flags.path or "auto",
            parameters=flags.adjust(flags.path, {}) if flags.path else None,
            overrides={path: parameters for path, parameters in reservable.items() if parameters},
            workspace=workspace,
            table=table,
        )

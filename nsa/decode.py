"""Which route a decode step takes, the fused one run now, and its CUDA graph.

Between ``nsa.step``, which is the fused step, and ``nsa.attention``, which asks ``decode_route`` and else runs the
branches. Positions live on the device and the host counts along, so nothing here waits.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from .cache import Branch, NSACache, check_branch
from .errors import ArgumentError, UnsupportedPathError
from .flags import Flags
from .kernels import support
from .step import FusedStep, Layer, StepParameters, step_key, step_of

Route = Literal["auto", "fused", "branches"]
ROUTES: tuple[Route, ...] = get_args(Route)
USUAL = Flags()
MOST_BLOCKS = 2**13
"""Blocks that one program ranks at once."""


def fused_decode(layer: Layer, x: Tensor, cache: NSACache, branch: Branch | None, status: str, reason: str) -> Tensor:
    """One step now: x (B, 1, dim) -> y (B, 1, dim). A call that fails leaves the cache as it was.

    Under capture nothing runs and the host's length stays: count replays with ``cache.advance``.
    """
    cache.reserve(cache.length + 1)
    step = step_of(layer, cache, branch)
    finished = False
    try:
        y = step.run(x)
        finished = True
    finally:
        if not finished:
            cache.truncate(cache.length)  # the device may have counted the token already
    if not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        cache.advance()
    step.report(status, reason, replayed=False)
    return y


def unsupported_reason(layer: Layer, x: Tensor, cache: NSACache) -> str | None:
    """Why the route ``fused`` cannot run this step; None if it can."""
    weight, config = layer.project.weight, layer.config
    device, dtype = x.device, x.dtype
    if torch.is_autocast_enabled(device.type):
        return "fused does not run under autocast"
    if not dtype == weight.dtype == cache.keys.dtype or not device == weight.device == cache.keys.device:
        return "fused needs token, weights and cache of one dtype on one device"
    if not type(layer.project) is type(layer.output) is nn.Linear:  # an adapter's forward adds to its base's weight
        return f"fused reads weights of nn.Linear, got {type(layer.project).__name__}, {type(layer.output).__name__}"
    room = 2 * cache.reach if cache.length == cache.reach else cache.reach  # a full cache doubles before the step
    if room > MOST_BLOCKS * config.block_size:
        return f"fused ranks up to {MOST_BLOCKS} blocks, the cache has room for {room} tokens in this step"
    if isinstance(cache.plan, FusedStep):
        return None
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"fused has no {x.dtype}"
    if max(config.topk, config.heads_per_group) > 64:
        return f"fused needs topk and query heads per group up to 64, got {config.topk} and {config.heads_per_group}"
    if max(config.head_dim, config.value_width) > 256:
        return f"fused needs head dims up to 256, got {config.head_dim} and {config.value_width}"
    ratio = config.block_size // config.kernel_stride
    if ratio & (ratio - 1) or ratio > 16 or config.kernel_size > config.block_size + config.kernel_stride:
        return (
            "fused needs block_size / kernel_stride to be 1, 2, 4, 8 or 16 and kernel_size up to block_size + "
            f"kernel_stride, got {config.block_size}, {config.kernel_stride}, {config.kernel_size}"
        )
    return support.device_reason("fused", x.device)


def decode_route(layer: Layer, x: Tensor, cache: NSACache, route: Route) -> tuple[str, str, str]:
    """(route, status, reason). Forced by the argument, else by NSA_USE_FUSED_DECODE, and then never another one.

    Otherwise ``fused`` where it can run, unless a flag names what only ``branches`` does. Raises UnsupportedPathError,
    and ArgumentError for a route that there is not.
    """
    if route not in ROUTES:
        raise ArgumentError(f"unknown route {route!r}; expected one of {list(ROUTES)}")
    forced, by = (route, "argument") if route != "auto" else (layer.flags.decode_route, "flag")
    if forced == "branches":
        return "branches", "forced", f"asked for by {by}"
    reason = unsupported_reason(layer, x, cache)
    if forced == "fused":
        if reason:
            raise UnsupportedPathError(reason)
        return "fused", "forced", f"asked for by {by}"
    reason = steering_flag(layer.flags) or reason or (None if x.is_cuda else "an interpreter is for tests")
    return ("branches", "default", reason) if reason else ("fused", "default", "allowed and able to run")


def steering_flag(flags: Flags) -> str | None:
    """The flag that names how a branch runs, which the fused step does not heed; None if there is none."""
    if flags.path:
        return f"flags force selection path {flags.path}"
    named = [name for name in ("NSA_USE_FA2", "NSA_USE_FA2_CMP", "NSA_USE_FA2_WIN") if name in flags.given]
    if named:
        return f"{', '.join(named)} steers the branches"
    for name in ("flash_attention", "flash_attention_compression", "flash_attention_window"):
        if getattr(flags, name) != getattr(USUAL, name):
            return f"flags set {name}"
    return None if flags.ranges_v2 else "NSA_SEL_RANGES_V2=0 names how ranges are derived"


def graph_key(
    layer: Layer, cache: NSACache, branch: Branch | None, parameters: StepParameters | None
) -> tuple[object, ...]:
    """What a captured step depends on: all that a FusedStep does, and the weights of a learnt compression."""
    learnt = (layer.compress_key, layer.compress_value) if layer.config.compression == "mlp" else ()
    addresses = (weight.data_ptr() for module in learnt for weight in module.parameters())
    return *step_key(layer, cache, branch, parameters), *addresses


class DecodeGraph:
    """The fused step of a layer on a cache as one CUDA graph: captured once, replayed for every token.

    ``branch`` and ``parameters`` as in ``FusedStep``. Captured again where the cache's storage or the layer's weights
    have moved, as after a growth. Raises UnsupportedPathError where the fused step cannot run, or without CUDA.
    """

    def __init__(
        self,
        layer: Layer,
        cache: NSACache,
        *,
        branch: Branch | None = None,
        parameters: StepParameters | None = None,
    ) -> None:
        check_branch(branch)
        self.layer, self.cache, self.branch, self.parameters = layer, cache, branch, parameters
        self.captures = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._step: FusedStep | None = None
        self._key: tuple[object, ...] = ()
        self._x = torch.empty(cache.batch, 1, layer.config.dim, dtype=cache.keys.dtype, device=cache.keys.device)
        self._y = self._x
        reason = unsupported_reason(layer, self._x, cache)
        if reason or not self._x.is_cuda:
            raise UnsupportedPathError(reason or "a graph needs a CUDA device")

    @torch.no_grad()
    def step(self, x: Tensor) -> Tensor:
        """x (B, 1, dim), the next token -> y (B, 1, dim), valid until the next step; the cache is one token longer."""
        if x.shape != self._x.shape:
            raise ArgumentError(f"x has shape {tuple(x.shape)}, expected {tuple(self._x.shape)}")
        self.cache.reserve(self.cache.length + 1)
        self._x.copy_(x)
        key = graph_key(self.layer, self.cache, self.branch, self.parameters)
        if self._graph is None or self._step is None or self._key != key:
            self._graph, self._step = self._capture()
            self._key = key
        self._graph.replay()
        self.cache.advance()
        self._step.report("forced", "asked for by DecodeGraph", replayed=True)
        return self._y

    def _capture(self) -> tuple[torch.cuda.CUDAGraph, FusedStep]:
        """Run the step once, which loads its kernels, set the lengths back, and record it."""
        step = step_of(self.layer, self.cache, self.branch, self.parameters)
        lengths = self.cache.lengths.clone()
        step.run(self._x)
        self.cache.lengths.copy_(lengths)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._y = step.run(self._x)
        self.captures += 1
        return graph, step

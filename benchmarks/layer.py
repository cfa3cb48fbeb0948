"""The whole layer without projections against dense causal attention: ``python benchmarks/layer.py --out DIR``.

For each context and mode (prefill; train: forward and backward) the branches, in train their gradients too, are first
held against the float64 oracles of ``tuner``, then timed, each alone and all together, in rounds of fresh random order,
L2 flushed before every sample. Dense is cuDNN's SDPA and flash-attn, where they can run. One JSON line per figure goes
to DIR/layer.jsonl; times are milliseconds, memory is the allocator's peak above the inputs, per token. Dispatch chooses
the paths, unless ``--route window=triton_window:tokens=4,keys=64`` names one and its parameters. Queries walk, so that
neighbouring tokens agree as in the sweeps' ``scored`` pattern.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from calls import checked  # beside this file
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nsa.compression import MeanCompressor, compressed_attention
from nsa.device import installed
from nsa.dispatch import selection_attention
from nsa.mix import mix_branches
from nsa.scoring import choose_blocks
from nsa.selection import LogSums, Selection
from nsa.trace import record_paths
from nsa.window import window_attention
from tuner.gradient_oracle import GradientOracle
from tuner.inputs import CORRELATION, Inputs, walk
from tuner.oracle import Oracle, WrongResult

SIZES = {"kernel_size": 32, "kernel_stride": 16}
BLOCK, TOPK, WINDOW = 64, 16, 512
BRANCHES = ("compression", "selection", "window")
QUANTITIES = {Oracle: "output", GradientOracle: "gradients"}


class Layer:
    """One context's tensors and the layer's steps over them. Queries (1, S, G, h, D); keys and values per branch."""

    def __init__(self, context: int, mode: str, options: argparse.Namespace) -> None:
        self.context, self.routes, self.device = context, options.route, options.device
        self.beside = [name for name in options.dense if name == "cudnn" or installed(name)]
        heads, groups, width = options.heads, options.groups, options.width
        generator = torch.Generator(self.device).manual_seed(context)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=self.device)

        dtype = getattr(torch, options.dtype)
        noise = normal(1, context, groups, heads // groups, width)
        self.query = walk(noise, CORRELATION).to(dtype)
        self.gates = torch.sigmoid(normal(1, context, groups, heads // groups, 3)).to(dtype)
        self.pull = normal(*self.query.shape).to(dtype)
        shape = (1, groups, context, width)
        longer = {"compression": width**0.5, "selection": 1.0, "window": 1.0}  # a mean of random keys is short
        self.keys = {name: (normal(*shape) * longer[name]).to(dtype) for name in BRANCHES}
        self.values = {name: normal(*shape).to(dtype) for name in BRANCHES}
        self.compressor = MeanCompressor(**SIZES)
        self.leaves = [self.query, self.gates, *self.keys.values(), *self.values.values()]
        with torch.no_grad():
            self.compressed = self.compressor(self.keys["compression"]), self.compressor(self.values["compression"])
        self.leaves += self.compressed
        for leaf in self.leaves:
            leaf.requires_grad_(mode == "train")
        self.compression()
        self.blocks = self.choose()

    def compress(self) -> tuple[Tensor, Tensor]:
        """Raw keys and values to compressed ones."""
        return self.compressor(self.keys["compression"]), self.compressor(self.values["compression"])

    def compression(self, tokens: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The compressed branch."""
        return self.attend("compression", self.query, *(self.compressed if tokens is None else tokens))

    def choose(self, tokens: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Scoring and top-k."""
        key = (self.compressed if tokens is None else tokens)[0]
        return choose_blocks(
            self.query, key, context_length=self.context, block_size=BLOCK, topk=TOPK, logsum=self.sums.tensor, **SIZES
        )

    def selection(self, blocks: Tensor | None = None) -> Tensor:
        """The selection branch."""
        return self.attend("selection", self.query, self.keys["selection"], self.values["selection"], blocks)

    def window(self) -> Tensor:
        """The window branch."""
        return self.attend("window", self.query, self.keys["window"], self.values["window"])

    def attend(self, branch: str, query: Tensor, key: Tensor, value: Tensor, blocks: Tensor | None = None) -> Tensor:
        """A branch over tensors of its shapes; compression leaves log-sum-exps where its path has them."""
        route = self.routes.get(branch, {})
        if branch == "selection":
            return selection_attention(query, key, value, self.chosen(blocks), **route)
        if branch == "window":
            return window_attention(query, key, value, window=WINDOW, **route)
        self.sums = LogSums()
        return compressed_attention(query, key, value, first_position=0, **SIZES, sums=self.sums, **route)

    def call(self, branch: str, case: Inputs) -> Tensor:
        """A branch over the tensors of one call."""
        return self.attend(branch, case.query, case.key, case.value)

    def chosen(self, blocks: Tensor | None = None) -> Selection:
        """What the selection branch reads."""
        blocks = self.blocks if blocks is None else blocks
        return Selection.from_blocks(blocks, block_size=BLOCK, context_length=self.context, complete=True)

    def mix(self) -> Tensor:
        """The gated sum, of three tensors of the output's shape."""
        return mix_branches(self.gates, self.query, self.pull, self.pull)

    def whole(self) -> Tensor:
        """Everything between the projections, in the layer's order."""
        window = self.window()
        tokens = self.compress()
        compression = self.compression(tokens)
        selection = self.selection(self.choose(tokens))
        return mix_branches(self.gates, compression, selection, window)

    def dense(self, backend: str) -> Tensor:
        """Dense causal attention over the selection branch's keys."""
        key, value = self.keys["selection"], self.values["selection"]
        query = self.query.flatten(2, 3)
        if backend == "flash_attn":
            from flash_attn import flash_attn_func

            return flash_attn_func(query, key.transpose(1, 2), value.transpose(1, 2), causal=True)
        heads = self.query.shape[3]
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION if backend == "cudnn" else SDPBackend.MATH):
            key, value = (tensor.repeat_interleave(heads, 1) for tensor in (key, value))
            return F.scaled_dot_product_attention(query.transpose(1, 2), key, value, is_causal=True).transpose(1, 2)


def check(layer: Layer, mode: str, say: Callable[..., None]) -> bool:
    """The outputs of the three branches against the oracle in float64, and in train their gradients."""
    whole, key, value = {"rows": (1, layer.context, layer.query.shape[2])}, layer.keys, layer.values
    compressed = Selection.compressed(*SIZES.values(), first_position=0, device=layer.query.device, **whole)
    window = Selection.window(WINDOW, context_length=layer.context, device=layer.query.device, **whole)
    cases = {
        "compression": (*layer.compressed, compressed),
        "selection": (key["selection"], value["selection"], layer.chosen()),
        "window": (key["window"], value["window"], window),
    }
    right = True
    for name, (key, value, selection) in cases.items():
        inputs = Inputs(layer.query.detach(), key.detach(), value.detach(), selection, None)
        for oracle in (Oracle, GradientOracle) if mode == "train" else (Oracle,):
            told = {"kind": "check", "mode": mode, "operation": name, "quantity": QUANTITIES[oracle]}
            try:
                found = checked(partial(layer.call, name), inputs, oracle(inputs, layer.query.shape[4] ** -0.5), name)
                say(**told, ok=True, **found)
            except WrongResult as error:
                say(**told, ok=False, reason=str(error))
                right = False
    return right


def steps(layer: Layer, train: bool) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    parts: dict[str, Callable[[], object]] = {
        "compress": layer.compress,
        "compression": layer.compression,
        "selection": layer.selection,
        "window": layer.window,
        "mix": layer.mix,
        "whole": layer.whole,
    }
    if layer.device == "cuda" and layer.query.dtype in (torch.float16, torch.bfloat16):
        for backend in layer.beside:
            parts[f"dense {backend}"] = partial(layer.dense, backend)
    else:
        parts["dense math"] = lambda: layer.dense("math")
    if not train:
        return {**parts, "scoring": layer.choose}

    def both(run: Callable[[], object]) -> Callable[[], object]:
        def call() -> None:
            for leaf in layer.leaves:
                leaf.grad = None
            out = run()
            outs = out if isinstance(out, tuple) else (out,)
            pulls = [
                layer.pull.reshape(one.shape) if one.numel() == layer.pull.numel() else one.detach() for one in outs
            ]
            torch.autograd.backward(outs, pulls)

        return call

    return {**{name: both(run) for name, run in parts.items()}, "scoring": layer.choose}


def sample(run: Callable[[], object], scratch: Tensor) -> float:
    """Milliseconds of one call, after a flush of the L2 cache."""
    scratch.zero_()
    if not scratch.is_cuda:
        began = time.perf_counter()
        run()
        return (time.perf_counter() - began) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def measure(layer: Layer, mode: str, options: argparse.Namespace, say: Callable[..., None]) -> None:
    """All steps of one mode."""
    cuda = layer.device == "cuda"
    parts = steps(layer, mode == "train")
    scratch = torch.empty(2**26 if cuda else 1, dtype=torch.int32, device=layer.device)
    peaks, samples, executed = {}, {name: [] for name in parts}, {}
    for name, run in parts.items():
        run()
        for leaf in layer.leaves:
            leaf.grad = None
        before = torch.cuda.memory_allocated() if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        with record_paths() as seen:
            run()
        executed[name] = [f"{one.path} {one.parameters}" for one in seen.executed]
        peaks[name] = torch.cuda.max_memory_allocated() - before if cuda else 0
    for turn in range(options.rounds):
        order = list(parts)
        random.Random(turn).shuffle(order)
        for name in order:
            samples[name].append(sample(parts[name], scratch))
    medians = {name: statistics.median(times) for name, times in samples.items()}
    dense = min(value for name, value in medians.items() if name.startswith("dense"))
    for name, times in samples.items():
        say(kind="time", mode=mode, name=name, median_ms=round(medians[name], 4),
            samples_ms=[round(x, 4) for x in times], dense_ratio=round(dense / medians[name], 3),
            peak_bytes=peaks[name], bytes_per_token=peaks[name] // layer.context, executed=executed[name])  # fmt: skip


def route(text: str) -> tuple[str, dict[str, object]]:
    """``operation=path`` or ``operation=path:name=value,...``."""
    operation, _, rest = text.partition("=")
    path, _, values = rest.partition(":")
    pairs = (pair.split("=") for pair in values.split(",") if pair)
    return operation, {"path": path, "parameters": {name: int(v) if v.isdigit() else v for name, v in pairs}}


def main() -> None:
    """Check, then measure, every context and mode."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--contexts", type=lambda text: [int(one) for one in text.split(",")], default=[1024])
    parser.add_argument("--modes", type=lambda text: text.split(","), default=["prefill", "train"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--route", type=route, action="append", default=[])
    parser.add_argument("--dense", type=lambda text: text.split(","), default=["cudnn", "flash_attn"])
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    options.route = dict(options.route)
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "layer.jsonl").open("a") as lines:
        for context in options.contexts:

            def say(context: int = context, **fields: object) -> None:
                line = json.dumps({"context": context, **fields})
                lines.write(line + "\n")
                lines.flush()
                print(
                    line if fields["kind"] == "check" else json.dumps({**json.loads(line), "samples_ms": 0}), flush=True
                )

            for mode in options.modes:
                with torch.set_grad_enabled(mode == "train"):
                    layer = Layer(context, mode, options)
                    if check(layer, mode, say):
                        measure(layer, mode, options, say)
                    del layer


if __name__ == "__main__":
    main()

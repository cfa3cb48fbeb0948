"""The decode step of a whole layer: eager and replayed, against the float64 reference and the floor of its bytes.

    python3 benchmarks/decode_step.py --out FOLDER [--only NAME ...] [--contexts 512,8192] [--room N] [--branches]

Shapes: ``pr31`` (dim 256, 8 heads in 2 groups, head dim 32) in float32 and bfloat16, contexts 512 to 64k; ``large``
(dim 8192, 64 heads in 4 groups, head dim 128, bfloat16) at 64k, batch 1 and 64. Contents are random. The cache has room
for 64k at every context, as one graph for all of them needs. Every layer is first held against a float64 twin that runs
the branches on the ``reference`` path, within the design's bound. Each time is the median of samples of 20 steps, which
start at the context; ``host_us`` is the time to launch a step, ``queued_us`` the device's time when the host is ahead,
``device_us`` the step's kernels as a profiler saw them, ``branches`` the same step by torch operators. L2 stays warm:
``pr31`` fits it, ``large`` does not. The floor is weights, compressed, selected and window bytes at 4.3 TB/s.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nsa import NSAAttention, NSACache, NSAConfig
from nsa.decode import DecodeGraph
from nsa.flags import Flags
from nsa.step import FusedStep

STEPS = 20
SAMPLES = 15
BYTES_PER_US = 4.3e6
SLEEP_CYCLES = 10_000_000
"""About 5 ms, longer than the host takes for STEPS steps."""
FLAT_TO = 8192
"""Contexts up to which a step should take one time, whatever its context."""
SHAPES: dict[str, dict[str, int]] = {
    "pr31": {"dim": 256, "num_heads": 8, "num_kv_heads": 2, "head_dim": 32},
    "large": {"dim": 8192, "num_heads": 64, "num_kv_heads": 4, "head_dim": 128},
}
CASES: dict[str, tuple[str, torch.dtype, int, tuple[int, ...]]] = {
    "pr31-float32": ("pr31", torch.float32, 1, (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)),
    "pr31-bfloat16": ("pr31", torch.bfloat16, 1, (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)),
    "large-B1": ("large", torch.bfloat16, 1, (65536,)),
    "large-B64": ("large", torch.bfloat16, 64, (65536,)),
}


def build(name: str, dtype: torch.dtype, flags: Flags | None = None) -> NSAAttention:
    torch.manual_seed(0)
    with torch.device("cuda"):
        return NSAAttention(NSAConfig(**SHAPES[name]), flags=flags or Flags(), dtype=dtype)


def filled(layer: NSAAttention, batch: int, context: int, room: int = 65536) -> NSACache:
    """A cache of random tokens; compressed ones are what the layer makes of them, entry by entry."""
    cache = layer.empty_cache(batch, capacity=max(context, room) + 2 * STEPS, device=torch.device("cuda"))
    cache.keys.normal_()
    cache.values.normal_()
    cache.advance(context)
    cache.lengths.fill_(context)
    with torch.no_grad():
        for entry in range(batch):
            one = slice(entry, entry + 1)
            for raw, few, compress in (
                (cache.keys, cache.compressed_keys, layer.compress_key),
                (cache.values, cache.compressed_values, layer.compress_value),
            ):
                few[one, :, : cache.compressed_length] = compress(raw[0, one, :, :context])
    return cache


def check(layer: NSAAttention, cache: NSACache, x: torch.Tensor, context: int) -> dict[str, float]:
    """One step of the first two entries against float64; raises where it exceeds the bound. Leaves the context."""
    entries = min(2, cache.batch)
    y, _ = layer.decode(x, cache, route="fused")
    assert isinstance(cache.plan, FusedStep)
    picks = [set(row) for row in cache.plan.picks[: entries * cache.groups].tolist()]
    cache.truncate(context)
    results = {}
    for dtype in (torch.float64, layer.project.weight.dtype):
        twin = NSAAttention(layer.config, flags=Flags(path="reference"), dtype=dtype, device="cuda")
        twin.load_state_dict(layer.state_dict())
        small = twin.empty_cache(entries, capacity=context + 1, device=x.device)
        for mine, theirs in ((small.keys, cache.keys), (small.values, cache.values)):
            mine.copy_(theirs[:, :entries, :, : context + 1])
        for mine, theirs in (
            (small.compressed_keys, cache.compressed_keys),
            (small.compressed_values, cache.compressed_values),
        ):
            mine.copy_(theirs[:entries, :, : mine.shape[2]])
        small.advance(context)
        results[dtype] = twin.decode(x[:entries].to(dtype), small, route="branches")[0]
    oracle, eager = results[torch.float64], results[layer.project.weight.dtype].double()
    eps = torch.finfo(x.dtype).eps
    limit = max(2 * float((eager - oracle).abs().max()), 4 * eps * float(oracle.abs().max()))
    error = float((y[:entries].double() - oracle).abs().max())
    if not error <= limit:
        raise SystemExit(f"wrong: error {error:.3g}, bound {limit:.3g} at context {context}")
    return {"error": error, "bound": limit, "blocks": statistics.mean(len(row) for row in picks)}


def timed(run: Callable[[], Any], reset: Callable[[], None]) -> dict[str, float]:
    """Microseconds of a step: ``us`` from the first launch to the end of the last kernel, ``host_us`` until all was
    launched, ``queued_us`` on the device when the host is ahead, which a kernel that sleeps before them sees to."""
    whole, host, queued = [], [], []
    for _ in range(SAMPLES + 2):
        reset()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(STEPS):
            run()
        launched = time.perf_counter()
        torch.cuda.synchronize()
        whole.append((time.perf_counter() - begin) / STEPS * 1e6)
        host.append((launched - begin) / STEPS * 1e6)
        reset()
        begins, ends = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(SLEEP_CYCLES)
        begins.record()
        for _ in range(STEPS):
            run()
        ends.record()
        torch.cuda.synchronize()
        queued.append(begins.elapsed_time(ends) / STEPS * 1e3)
    low, median, high = statistics.quantiles(whole[2:], n=4)
    return {
        "us": median,
        "low_us": low,
        "high_us": high,
        "host_us": statistics.median(host[2:]),
        "queued_us": statistics.median(queued[2:]),
    }


def profiled(run: Callable[[], Any], reset: Callable[[], None]) -> dict[str, Any]:
    """Kernels of a step, their microseconds, and the host's waits, as the profiler saw them."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    reset()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        for _ in range(STEPS):
            run()
    torch.cuda.synchronize()
    kernels: dict[str, list[float]] = {}
    waits = 0
    for event in seen.events():
        if event.device_type == DeviceType.CUDA:
            kernels.setdefault(event.name[:60], []).append(event.time_range.elapsed_us())
        waits += event.name in ("aten::item", "aten::_local_scalar_dense", "cudaStreamSynchronize", "cudaMemcpy")
    table = {name: [len(times) / STEPS, sum(times) / STEPS] for name, times in kernels.items()}
    return {
        "launches": sum(count for count, _ in table.values()),
        "device_us": sum(total for _, total in table.values()),
        "host_waits": waits / STEPS,
        "kernels": table,
    }


def floor_us(layer: NSAAttention, batch: int, context: int) -> float:
    config, item = layer.config, layer.project.weight.element_size()
    weights = layer.project.weight.numel() + layer.output.weight.numel()
    compressed = (context - config.kernel_size) // config.kernel_stride + 1
    read = compressed + min(context, config.topk * config.block_size) + min(context, config.window_size)
    cache = batch * config.num_kv_heads * read * (config.head_dim + config.value_width)
    return (weights + cache) * item / BYTES_PER_US


def measure(name: str, context: int, room: int, branches: bool) -> dict[str, Any]:
    shape, dtype, batch, _ = CASES[name]
    layer = build(shape, dtype)
    cache = filled(layer, batch, context, room)
    x = torch.randn(batch, 1, layer.config.dim, device="cuda", dtype=dtype)
    record: dict[str, Any] = {"case": name, "context": context, "room": room, "check": check(layer, cache, x, context)}

    def reset() -> None:
        cache.truncate(context)

    def eager() -> None:
        layer.decode(x, cache, route="fused")

    graph = DecodeGraph(layer, cache)
    graph.step(x)
    record["floor_us"] = floor_us(layer, batch, context)
    record["eager"] = timed(eager, reset)
    record["graph"] = timed(lambda: graph.step(x), reset)
    record["profile"] = profiled(lambda: graph.step(x), reset)
    torch.cuda.set_sync_debug_mode("error")
    eager()
    torch.cuda.set_sync_debug_mode("default")
    if branches:
        record["branches"] = timed(lambda: layer.decode(x, cache, route="branches"), reset)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--contexts", default="")
    parser.add_argument("--room", type=int, default=65536)
    parser.add_argument("--branches", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    wanted = [int(text) for text in options.contexts.split(",") if text]
    for name in options.only:
        flat: list[float] = []
        for context in wanted or CASES[name][3]:
            record = measure(name, context, options.room, options.branches)
            with open(options.out / f"{name}.jsonl", "a") as lines:
                lines.write(json.dumps(record) + "\n")
            eager, profile, found = record["eager"], record["profile"], record["check"]
            print(
                f"{name:14} {context:6} floor {record['floor_us']:6.1f}  graph {record['graph']['us']:6.1f}"
                f" (queued {record['graph']['queued_us']:5.1f})"
                f"  eager {eager['us']:6.1f} (host {eager['host_us']:5.1f})"
                f"  device {profile['device_us']:6.1f} in {profile['launches']:.0f} launches"
                f"  waits {profile['host_waits']:.0f}  error {found['error']:.1e} of {found['bound']:.1e}",
                flush=True,
            )
            flat += [record["graph"]["queued_us"]] if context <= FLAT_TO else []
            if "branches" in record:
                print(f"{'':21} branches {record['branches']['us']:.0f} us", flush=True)
            torch.cuda.empty_cache()
        if len(flat) > 1:
            spread = max(flat) / min(flat) - 1
            print(f"{name:14} up to {FLAT_TO} the longest queued step is {spread:+.0%} over the shortest")


if __name__ == "__main__":
    main()

"""Selection forward, backward and decode on one GPU: check every path on spot rows, then time them side by side.

    python3 benchmarks/selection.py --commit $(git rev-parse HEAD) --out OUT --time-limit 480 --yardsticks FILE
    TRITON_INTERPRET=1 python3 benchmarks/selection.py --tiny --out OUT      (dry run on a CPU, times mean nothing)

Writes ``selection.jsonl`` under --out, one line per candidate and shape, and prints a table of the best of each path
last. A candidate is timed only if its output matched float64 on spot rows (gradients: on spot rows and blocks). Times
are medians over rounds, every round all candidates in fresh random order, L2 flushed before each launch, CUDA events.
Decode is timed eagerly so, by the host's clock without a flush, and as replays of a CUDA graph, warm and cold.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from nsa.paths import PATHS
from nsa.problem import SelectionProblem
from nsa.selection import Selection

COMPILE_S = 90
"""Seconds that compiling ahead may take; a kernel that hangs there would otherwise take the whole run."""
EXTRAS = ("graph_us", "graph_cold_us", "host_us")
SPOTS = 24
"""Rows whose output and query gradient are compared with float64."""


class DeviceLostError(RuntimeError):
    """After an illegal access every later call of the process fails; the text names the candidate."""


class Shape(NamedTuple):
    """A benchmark case: B, S query tokens, T keys, G groups of h heads, head dims, pattern of the selection."""

    name: str
    B: int
    S: int
    T: int
    G: int
    h: int
    Dk: int
    Dv: int
    pattern: str = "random"
    topk: int = 16
    block: int = 64
    skip: tuple[str, ...] = ()
    """Paths, and ``backward``, that are not worth device time here."""


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("A-16k", 1, 16384, 16384, 4, 16, 128, 128),
        Shape("A-16k-scored", 1, 16384, 16384, 4, 16, 128, 128, "scored", skip=("triton_token", "triton_block")),
        Shape(
            "A-16k-smooth",
            1,
            16384,
            16384,
            4,
            16,
            128,
            128,
            "smooth",
            skip=("triton_token", "triton_block", "backward"),
        ),
        Shape("A-4k", 1, 4096, 4096, 4, 16, 128, 128, skip=("triton_token", "triton_block")),
        Shape("A-1k", 1, 1024, 1024, 4, 16, 128, 128, skip=("triton_token", "triton_block")),
        Shape("A-64k", 1, 65536, 65536, 4, 16, 128, 128, skip=("triton_token",)),
        Shape("A-64k-scored", 1, 65536, 65536, 4, 16, 128, 128, "scored", skip=("triton_token", "backward")),
        Shape("P-16k", 1, 16384, 16384, 4, 16, 192, 128, skip=("triton_token",)),
        Shape("G1-16k", 1, 16384, 16384, 16, 1, 128, 128, skip=("triton_token",)),
        Shape("H4-16k", 1, 16384, 16384, 8, 4, 128, 128, skip=("triton_token",)),
        *(Shape(f"decode-B{b}-T{t}k", b, 1, t * 1024, 4, 16, 128, 128) for b in (1, 8, 64) for t in (1, 64)),
        Shape("tiny", 1, 72, 72, 2, 4, 16, 16, "scored", 3, 16),
        Shape("tiny-decode", 2, 1, 72, 2, 4, 16, 16, "random", 3, 16),
    )
}


class Case(NamedTuple):
    """Inputs of one shape."""

    shape: Shape
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    grad: torch.Tensor
    selection: Selection
    scale: float


class Timed(NamedTuple):
    """A candidate that passed its check: ``call()`` launches it."""

    path: str
    parameters: dict[str, Any]
    error: float
    call: Callable[[], object]


def chosen_blocks(shape: Shape, device: torch.device, seed: int) -> torch.Tensor:
    """(B, S, G, n) int32: block 0 and two local ones, the rest by score; ``random`` scores are independent, ``smooth``
    ones drift over hundreds of tokens, ``scored`` ones are smooth plus noise (4 neighbours share about half)."""
    generator = torch.Generator(device).manual_seed(seed)
    blocks = -(-shape.T // shape.block)
    positions = torch.arange(shape.T - shape.S, shape.T, device=device)
    own = positions // shape.block
    out = torch.full((shape.B, shape.S, shape.G, shape.topk), -1, dtype=torch.int32, device=device)
    noise = {"random": 1.0, "scored": 0.5, "smooth": 0.0}[shape.pattern]
    anchors = shape.S // 256 + 2
    for b, g in itertools.product(range(shape.B), range(shape.G)):
        for first in range(0, shape.S, 8192):
            part = slice(first, min(shape.S, first + 8192))
            count = part.stop - part.start
            if first == 0:
                grid = torch.randn(anchors, blocks, generator=generator, device=device)
            where = torch.arange(part.start, part.stop, device=device) / 256
            low, mix = where.long(), (where % 1)[:, None]
            score = torch.randn(count, blocks, generator=generator, device=device) * noise
            if noise < 1:
                score += grid[low] * (1 - mix) + grid[low + 1] * mix
            index = torch.arange(blocks, device=device)[None]
            mine = own[part, None]
            score = score.masked_fill((index == 0) | (index == mine) | (index == mine - 1), 1e9)
            score = score.masked_fill(index > mine, -1e9)
            best, chosen = score.topk(min(shape.topk, blocks), dim=1)
            out[b, part, g, : chosen.shape[1]] = torch.where(best > -1e8, chosen, -1).int()
    return out


def make_case(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Case:
    """Random inputs of a shape, laid out as a model has them: (B, tokens, heads, D) seen as the path's shapes."""
    generator = torch.Generator(device).manual_seed(seed + 1)

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator, device=device, dtype=dtype)

    query = draw(shape.B, shape.S, shape.G, shape.h, shape.Dk)
    key = draw(shape.B, shape.G, shape.T, shape.Dk)
    value = draw(shape.B, shape.G, shape.T, shape.Dv)
    grad = draw(shape.B, shape.S, shape.G, shape.h, shape.Dv)
    blocks = chosen_blocks(shape, device, seed)
    selection = Selection.from_blocks(blocks, block_size=shape.block, context_length=shape.T)
    return Case(shape, query, key, value, grad, selection, shape.Dk**-0.5)


def rows_in_double(case: Case, b: int, g: int, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Output, weights, keys, values and key positions of some rows of (b, g) in float64: (r, h, Dv), (r, h, w), ..."""
    shape = case.shape
    blocks = case.selection.blocks[b, rows, g].long()
    offsets = torch.arange(shape.block, device=blocks.device)
    positions = (blocks[..., None] * shape.block + offsets).flatten(1)
    limit = rows + shape.T - shape.S + 1
    mask = (blocks[..., None] >= 0).expand(-1, -1, shape.block).flatten(1) & (positions < limit[:, None])
    positions = positions.clamp(0, shape.T - 1)
    key, value = case.key[b, g][positions].double(), case.value[b, g][positions].double()
    score = torch.einsum("rhd,rwd->rhw", case.query[b, rows, g].double(), key) * case.scale
    weight = score.masked_fill(~mask[:, None], float("-inf")).softmax(-1)
    return torch.einsum("rhw,rwd->rhd", weight, value), weight, key, value, positions


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over the norm of ``wanted``; NaN where anything is NaN."""
    return float((found.double() - wanted).norm() / wanted.norm())


def output_error(case: Case, out: torch.Tensor) -> float:
    """Largest relative error over spot rows of every (b, g)."""
    generator = torch.Generator().manual_seed(int(time.time()))
    worst = 0.0
    for b, g in itertools.product(range(min(4, case.shape.B)), range(case.shape.G)):
        rows = torch.randint(case.shape.S, (SPOTS,), generator=generator)
        rows[0], rows[1] = 0, case.shape.S - 1
        rows = rows.to(out.device)
        error = relative(out[b, rows, g], rows_in_double(case, b, g, rows)[0])
        worst = error if error != error or error > worst else worst
    return worst


def gradient_error(case: Case, grads: tuple[torch.Tensor, ...]) -> float:
    """Largest relative error of query gradients of spot rows, and of key and value gradients of one block per group."""
    shape, worst = case.shape, 0.0
    for g in range(shape.G):
        block = (g * 7 + 3) % (-(-shape.T // shape.block))
        rows = (case.selection.blocks[0, :, g] == block).any(-1).nonzero()[:, 0]
        key_sum = value_sum = 0.0
        spans = torch.arange(block * shape.block, min(shape.T, (block + 1) * shape.block), device=rows.device)
        for part in rows.split(256):
            out, weight, key, value, positions = rows_in_double(case, 0, g, part)
            grad, query = case.grad[0, part, g].double(), case.query[0, part, g].double()
            slope = torch.einsum("rhd,rwd->rhw", grad, value) - (grad * out).sum(-1, keepdim=True)
            slope = weight * slope * case.scale
            errors = [relative(grads[0][0, part, g], torch.einsum("rhw,rwd->rhd", slope, key))]
            here = (positions[:, None, :] == spans[:, None]) & (weight[:, :1] > 0)
            here = here.to(torch.float64)
            key_sum = key_sum + torch.einsum("rhw,rkw,rhd->kd", slope, here, query)
            value_sum = value_sum + torch.einsum("rhw,rkw,rhd->kd", weight, here, grad)
            worst = max(worst, *errors) if worst == worst else worst
        for found, wanted in ((grads[1], key_sum), (grads[2], value_sum)):
            error = relative(found[0, g, spans], wanted)
            worst = error if error != error or error > worst else worst
    return worst


FORWARD: dict[str, list[dict[str, Any]]] = {
    "triton_token": [
        {"step": k, "warps": w, "stages": s, "order": "group", "loads": loads}
        for k, w, s, loads in (
            (64, 2, 3, "descriptor"),
            (32, 1, 3, "descriptor"),
            (32, 1, 4, "descriptor"),
            (32, 2, 3, "descriptor"),
            (16, 1, 4, "descriptor"),
            (64, 1, 2, "descriptor"),
            (64, 4, 2, "pointer"),
        )
    ],
    "triton_union": [
        {"tokens": t, "step": step, "warps": w, "stages": s, "loads": loads}
        for t, step, w, s, loads in (
            (4, 32, 4, 3, "descriptor"),
            (4, 32, 4, 2, "descriptor"),
            (4, 64, 4, 2, "descriptor"),
            (4, 32, 4, 3, "pointer"),
            (4, 32, 4, 4, "descriptor"),
            (2, 32, 4, 3, "descriptor"),
            (2, 64, 4, 2, "descriptor"),
            (8, 32, 8, 3, "descriptor"),
            (8, 64, 8, 2, "descriptor"),
            (8, 64, 4, 2, "descriptor"),
            (8, 32, 4, 3, "descriptor"),
            (16, 32, 4, 3, "descriptor"),
            (16, 64, 4, 2, "descriptor"),
        )
    ],
    "triton_block": [
        {"span": span, "rows": r, "item_rows": i, "warps": w, "stages": s, "loads": loads}
        for span, r, i, w, s, loads in (
            (8192, 64, 512, 4, 3, "pointer"),
            (8192, 64, 512, 4, 2, "pointer"),
            (8192, 64, 1024, 4, 3, "pointer"),
            (8192, 128, 512, 8, 3, "pointer"),
            (8192, 128, 512, 4, 2, "pointer"),
            (8192, 64, 512, 4, 3, "descriptor"),
            (2048, 64, 512, 4, 3, "pointer"),
            (32768, 64, 512, 4, 3, "pointer"),
        )
    ],
}
BACKWARD = [
    {"backward_rows": r, "backward_item_rows": i, "backward_warps": w, "backward_stages": s}
    for r, i, w, s in (
        (32, 2048, 4, 3), (32, 2048, 4, 2), (32, 4096, 4, 3), (64, 2048, 8, 3), (64, 2048, 8, 2), (32, 2048, 8, 3),
        (32, 1024, 4, 3), (32, 2048, 4, 4), (64, 2048, 4, 3),
    )
]  # fmt: skip
DECODE = [
    {"splits": n, "combine": c, "warps": w, "stages": s, "loads": "pointer"}
    for n, c, w, s in (
        (1, "inside", 4, 3), (2, "inside", 4, 3), (2, "inside", 4, 2), (4, "inside", 4, 2), (8, "inside", 4, 2),
        (16, "inside", 4, 2), (8, "launch", 4, 2), (4, "launch", 4, 3), (16, "inside", 8, 2), (8, "inside", 8, 2),
        (16, "inside", 2, 2), (8, "inside", 2, 3), (16, "launch", 4, 2), (4, "inside", 2, 3),
    )
]  # fmt: skip


def problem_of(shape: Shape, mode: str, dtype: str) -> SelectionProblem:
    """The dispatch problem of a shape."""
    return SelectionProblem(
        mode=mode, dtype=dtype, B=shape.B, S=shape.S, T=shape.T, G=shape.G, h=shape.h, Dk=shape.Dk, Dv=shape.Dv,
        block_size=shape.block, topk=shape.topk, overlap="high",
    )  # fmt: skip


def candidates(shape: Shape, device: torch.device, dtype: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(kind, path, parameters): kind ``forward``, ``backward`` or ``decode``; what cannot run is left out."""
    few = 2 if device.type == "cpu" else None
    if shape.S == 1:
        yield from (("decode", "triton_decode", p) for p in DECODE[:few] if p["splits"] <= shape.topk)
        return
    mode = "train"
    for path, choices in FORWARD.items():
        if path in shape.skip:
            continue
        for parameters in choices[:few]:
            if PATHS[path].unsupported_reason(problem_of(shape, mode, dtype), device, parameters) is None:
                yield "forward", path, parameters
    for parameters in () if "backward" in shape.skip else BACKWARD[:few]:
        if PATHS["triton_token"].unsupported_reason(problem_of(shape, mode, dtype), device, parameters) is None:
            yield "backward", "triton_token", parameters


def prepare(case: Case, kind: str, path: str, parameters: dict[str, Any]) -> Timed:
    """Run once, check, and return what is timed. Raises what the kernel raises, ValueError where it is wrong."""
    run = PATHS[path].function()
    tensors = (case.query, case.key, case.value)
    limit = 2e-2 if case.query.dtype == torch.bfloat16 else 1e-4
    if kind == "backward":
        leaves = tuple(t.detach().requires_grad_() for t in tensors)
        out = run(*leaves, case.selection, scale=case.scale, workspace=None, **parameters)

        def call() -> object:
            return torch.autograd.grad(out, leaves, case.grad, retain_graph=True)

        error = gradient_error(case, call())  # type: ignore[arg-type]
    else:

        def call() -> object:
            return run(*tensors, case.selection, scale=case.scale, workspace=None, **parameters)

        with torch.no_grad():
            error = output_error(case, call())  # type: ignore[arg-type]
    if not error <= limit:
        raise ValueError(f"wrong: relative error {error:.3e} above {limit:.0e}")
    return Timed(path if kind != "backward" else "backward", parameters, error, call)


def yardsticks(module: Any, case: Case) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """The untuned kernels to beat, on the same inputs; their outputs as (B, S, G, h, Dv)."""
    shape = case.shape
    split = 1 << (shape.Dk.bit_length() - 1) == shape.Dk
    if shape.S == 1:
        key, value = case.key.transpose(1, 2), case.value.transpose(1, 2)
        index = case.selection.blocks[:, 0].permute(1, 0, 2).sort(-1).values.contiguous()
        lengths = torch.full((shape.B,), shape.T, dtype=torch.int32, device=index.device)
        query = case.query[:, 0].flatten(1, 2)
        for count in (4, 8):

            def decode(count: int = count) -> torch.Tensor:
                out = module.splitk_decode(query, key, value, index, lengths, shape.block, case.scale, S=count)
                return out.view(shape.B, 1, shape.G, shape.h, -1)

            yield f"yardstick_splitk{count}", decode
        return
    query = case.query[0].flatten(1, 2)
    key, value = case.key[0].transpose(0, 1), case.value[0].transpose(0, 1)
    index = case.selection.blocks[0].transpose(0, 1)
    index = torch.where(index < 0, 2**30, index).sort(-1).values
    index = torch.where(index == 2**30, -1, index).int().contiguous()
    for name in ("tok_fwd", "kvc_fwd", "union_fwd"):
        if name == "kvc_fwd" and shape.S > 20000 and shape.h > 4:
            continue  # 34 GB of partials, seen in figures-h200.md

        def forward(name: str = name) -> torch.Tensor:
            out = getattr(module, name)(query, key, value, index, shape.block, case.scale)
            return out.view(1, shape.S, shape.G, shape.h, -1)

        if split or name != "union_fwd":
            yield f"yardstick_{name}", forward


class Timer:
    """Medians of interleaved rounds, by CUDA events with L2 flushed, or by the host's clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.flush = torch.empty(64 * 2**20 if self.cuda else 1, dtype=torch.int32, device=device)

    def once(self, call: Callable[[], object]) -> float:
        """Microseconds of one call."""
        if not self.cuda:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e6
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flush.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3

    def rounds(self, calls: list[Callable[[], object]], budget_s: float) -> list[list[float]]:
        """Samples per call, at least 3 and at most 25 rounds within about ``budget_s``."""
        samples: list[list[float]] = [[] for _ in calls]
        start = time.perf_counter()
        for done in range(25 if self.cuda else 1):
            for i in random.sample(range(len(calls)), len(calls)):
                samples[i].append(self.once(calls[i]))
            if done >= 2 and time.perf_counter() - start > budget_s:
                break
        return samples


def graph_us(calls: list[Callable[[], object]], repeats: int = 30) -> float:
    """Microseconds per launch when ``calls`` are captured one after the other in one CUDA graph and replayed."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    samples = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) * 1e3 / len(calls))
    del kept
    return statistics.median(samples)


def decode_extras(case: Case, timed: Timed) -> dict[str, float]:
    """Graph replays, warm and cold (every launch reads other blocks), and the host's time per eager call."""
    if case.query.device.type != "cuda":
        return {}
    with torch.no_grad():
        for _ in range(10):
            timed.call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(200):
            timed.call()
        torch.cuda.synchronize()
        extras = {"host_us": (time.perf_counter() - start) * 5e3, "graph_us": graph_us([timed.call] * 20)}
        if case.shape.B > 1 or case.shape.T < 32768:
            return extras
        blocks = case.shape.T // case.shape.block
        calls = []
        order = torch.randperm(blocks, device=case.query.device).int()
        for start_block in range(0, blocks - case.shape.topk, case.shape.topk):
            chosen = order[start_block : start_block + case.shape.topk].expand(1, 1, case.shape.G, -1)
            selection = Selection.from_blocks(
                chosen.contiguous(), block_size=case.shape.block, context_length=case.shape.T
            )
            other = case._replace(selection=selection)
            run = PATHS[timed.path].function()
            calls.append(
                lambda other=other, run=run: run(
                    other.query, other.key, other.value, other.selection, scale=other.scale, workspace=None,
                    **timed.parameters,
                )
            )  # fmt: skip
        return extras | {"graph_cold_us": graph_us(calls)}


def compile_ahead(job: tuple[str, str, str, dict[str, Any]]) -> None:
    """In a worker process: run one candidate so that Triton's cache holds its kernels. Failures show up later."""
    name, kind, path, parameters = job
    device = torch.device("cuda")
    shape = SHAPES[name]._replace(pattern="random")
    blocks = torch.zeros(shape.B, shape.S, shape.G, shape.topk, dtype=torch.int32, device=device)
    draw = [torch.zeros(s, device=device, dtype=torch.bfloat16) for s in (
        (shape.B, shape.S, shape.G, shape.h, shape.Dk), (shape.B, shape.G, shape.T, shape.Dk),
        (shape.B, shape.G, shape.T, shape.Dv))]  # fmt: skip
    if kind == "backward":
        draw = [t.requires_grad_() for t in draw]
    selection = Selection.from_blocks(blocks, block_size=shape.block, context_length=shape.T)
    try:
        out = PATHS[path].function()(*draw, selection, scale=1.0, workspace=None, **parameters)
        if kind == "backward":
            out.sum().backward()
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001  the main process meets it again and records it
        print("compile", path, parameters, str(error)[:200], file=sys.stderr)


class Ledger:
    """Records of a run: each is written when it is known, so that a run that dies keeps what it had."""

    def __init__(self, out: Any, commit: str) -> None:
        self.out, self.commit, self.records = out, commit, []

    def keep(self, shape: Shape, kind: str, path: str, **fields: Any) -> None:
        """Write one line."""
        record = {"shape": shape.name, "pattern": shape.pattern, "commit": self.commit, "kind": kind, "path": path}
        self.records.append(record | fields)
        self.out.write(json.dumps(self.records[-1]) + "\n")
        self.out.flush()


def bench(case: Case, kind: str, jobs: list[tuple[str, Callable[[], Timed]]], timer: Timer, ledger: Ledger,
          stop: float, budget_s: float) -> None:  # fmt: skip
    """Check, then time, the candidates of one shape and kind. Raises DeviceLostError after an illegal access."""
    ready = []
    for name, make in jobs:
        if time.perf_counter() > stop:
            break
        try:
            ready.append(make())
        except Exception as error:  # a candidate that fails is a record, not the end of the run
            ledger.keep(case.shape, kind, name, outcome=type(error).__name__, reason=str(error)[:300])
            if "illegal" in str(error):
                raise DeviceLostError(name) from error
    with torch.set_grad_enabled(kind == "backward"):
        samples = timer.rounds([timed.call for timed in ready], budget_s)
    for timed, times in zip(ready, samples, strict=True):
        extras = decode_extras(case, timed) if kind == "decode" and timed.parameters else {}
        ledger.keep(
            case.shape, kind, timed.path, outcome="ok", parameters=timed.parameters,
            median_us=statistics.median(times), low_us=min(times), samples=len(times), error=timed.error, **extras,
        )  # fmt: skip


def jobs_of(case: Case, module: Any) -> dict[str, list[tuple[str, Callable[[], Timed]]]]:
    """What to check and time, by kind; yardsticks beside the paths."""
    jobs: dict[str, list[tuple[str, Callable[[], Timed]]]] = {}
    dtype = str(case.query.dtype).removeprefix("torch.")
    for kind, path, parameters in candidates(case.shape, case.query.device, dtype):
        name = f"{path} {parameters}"
        jobs.setdefault(kind, []).append((name, partial(prepare, case, kind, path, parameters)))
    for name, call in yardsticks(module, case) if module else ():
        kind = "decode" if case.shape.S == 1 else "forward"
        jobs[kind].append((name, lambda name=name, call=call: Timed(name, {}, output_error(case, call()), call)))
    return jobs


def line(record: dict) -> str:
    """One candidate of the table."""
    if record["outcome"] != "ok":
        return f"  {record['path']} {record['outcome']}: {record['reason'][:100]}"
    extras = " ".join(f"{name}={record[name]:.1f}" for name in EXTRAS if name in record)
    values = ",".join(str(value) for value in record["parameters"].values())
    return f"  {record['path']:20s} {record['median_us']:10.1f} us  err {record['error']:.1e}  {values} {extras}"


def table(records: list[dict]) -> str:
    """Per shape and kind: the best few of each path, and the failures."""
    lines = []
    groups: dict[tuple[str, str], list[dict]] = {}
    for record in records:
        groups.setdefault((record["shape"], record["kind"]), []).append(record)
    for (shape, kind), members in groups.items():
        lines.append(f"{shape} {kind}")
        timed = [record for record in members if record["outcome"] == "ok"]
        timed.sort(key=lambda record: record.get("graph_us", record["median_us"]))
        for path in dict.fromkeys(record["path"] for record in members):
            lines += [line(record) for record in timed if record["path"] == path][:4]
        lines += [line(record) for record in members if record["outcome"] != "ok"]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--shapes", default="", help="comma-separated names; default all but tiny")
    parser.add_argument("--time-limit", type=float, default=480.0, help="seconds after which nothing new is begun")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds of timing rounds per shape and kind")
    parser.add_argument("--yardsticks", type=Path, help="selection_yardsticks.py, timed beside the paths")
    parser.add_argument("--compile-processes", type=int, default=0)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    stop = time.perf_counter() + arguments.time_limit
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        from tests.interpreter import prepare as interpret

        interpret()
    names = [n for n in arguments.shapes.split(",") if n]
    names = names or [n for n in SHAPES if n.startswith("tiny") == arguments.tiny]
    arguments.out.mkdir(parents=True, exist_ok=True)
    module = None
    if arguments.yardsticks:
        spec = importlib.util.spec_from_file_location("selection_yardsticks", arguments.yardsticks)
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        spec.loader.exec_module(module)  # type: ignore[union-attr]
    if arguments.compile_processes and device.type == "cuda":
        started = time.perf_counter()
        fresh = [n for n in names if SHAPES[n].pattern == "random" and SHAPES[n].S <= 16384]
        jobs = [(n, *job) for n in fresh for job in candidates(SHAPES[n], device, "bfloat16")]
        with multiprocessing.get_context("spawn").Pool(arguments.compile_processes) as pool:
            pool.map_async(compile_ahead, jobs, chunksize=1).get(COMPILE_S)
        print(f"compiled {len(jobs)} in {time.perf_counter() - started:.0f} s", file=sys.stderr)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    timer = Timer(device)
    with (arguments.out / "selection.jsonl").open("a") as out:
        ledger = Ledger(out, arguments.commit)
        for name in names:
            if time.perf_counter() > stop:
                print(f"not run: {name}", file=sys.stderr)
                continue
            started = time.perf_counter()
            case = make_case(SHAPES[name], device, dtype)
            overlap = case.selection.overlap() if case.shape.S > 3 else 0.0
            try:
                for kind, jobs in jobs_of(case, module).items():
                    bench(case, kind, jobs, timer, ledger, stop, arguments.budget)
            except DeviceLostError as error:
                print(f"{name}: the device is lost, nothing after this is run: {error}", file=sys.stderr)
                break
            seconds = time.perf_counter() - started
            print(f"{name}: overlap {overlap:.2f}, {seconds:.1f} s", file=sys.stderr, flush=True)
            del case
            if device.type == "cuda":
                torch.cuda.empty_cache()
    print(table(ledger.records))


if __name__ == "__main__":
    main()

"""Selection on one GPU, ours beside others' in one run: forward, backward, and decode by graph and eagerly.

    python3 benchmarks/selection.py --out OUT --commit $(git rev-parse HEAD) --yardsticks FILE
    TRITON_INTERPRET=1 python3 benchmarks/selection.py --out OUT --shapes tiny,tiny-decode --candidates FILE
                                                                     (dry run on a CPU, times mean nothing)

Ours is ``path="auto"``, the table's choice, and what --candidates names: {"shape or *": [{"kind", "path",
"parameters"}]}. Nothing is timed that did not match its oracle, for outputs ``tuner.oracle``, for gradients
``tuner.gradient_oracle``: ``checked_tokens`` query tokens (and all keys' gradients), the largest error ``of_bound`` in
units of its derived bound. Times are medians in microseconds over rounds, each all candidates in fresh
random order: CUDA events behind 1.5 ms of reading, which flushes L2 and lets a host that is not slower run ahead
(``event_us``), and for decode the host's clock (``host_us``) and CUDA graphs, ``warm_us`` reading the same blocks again
and ``cold_us`` others, over more than twice L2. OUT/selection.jsonl gets a line per candidate; shapes that stand there
for the same commit are not run again.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import math
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import selection_peers  # beside this file, like the next two
from calls import backward, checked, with_leaves
from selection_clock import Clock, Replay

import nsa
from nsa.errors import NSAError
from nsa.problem import SelectionProblem
from tuner.gradient_oracle import GradientOracle
from tuner.inputs import Inputs, make_inputs
from tuner.oracle import Oracle, WrongResult

FLOPS_PER_US, BYTES_PER_US = 790e6, 4.3e6
"""Measured bf16 matmul and copy of the device that the floors are for, an H200."""
ROTATION_BYTES = 130e6
COMPILE_S = 120


class Shape(NamedTuple):
    """A problem and the pattern of its selections."""

    problem: SelectionProblem
    pattern: str


def _shape(
    pattern: str,
    context: int,
    heads: int,
    groups: int,
    dims: tuple[int, int] = (128, 128),
    *,
    batch: int = 1,
    decode: bool = False,
    size: int = 64,
    topk: int = 16,
    dtype: str = "bfloat16",
) -> Shape:
    problem = SelectionProblem(
        mode="decode" if decode else "prefill", dtype=dtype, B=batch, S=1 if decode else context, T=context, G=groups,
        h=heads // groups, Dk=dims[0], Dv=dims[1], block_size=size, topk=topk, complete=not decode,
        overlap="low" if pattern == "random" else "high", cache="cold",
    )  # fmt: skip
    return Shape(problem, pattern)


CONTEXTS = {"1k": 1024, "4k": 4096, "16k": 16384, "64k": 65536}
SHAPES = {
    **{f"A-{n}-{p}": _shape(p, t, 64, 4) for n, t in CONTEXTS.items() for p in ("random", "scored")},
    "A-16k-smooth": _shape("smooth", 16384, 64, 4),
    "A-64k-smooth": _shape("smooth", 65536, 64, 4),
    **{f"P-16k-{p}": _shape(p, 16384, 64, 4, (192, 128)) for p in ("random", "scored")},
    **{f"G1-16k-{p}": _shape(p, 16384, 16, 16) for p in ("random", "scored")},
    **{f"H4-16k-{p}": _shape(p, 16384, 32, 8) for p in ("random", "scored")},
    **{f"decode-B{b}-{n}": _shape("random", CONTEXTS[n], 64, 4, batch=b, decode=True)
       for b in (1, 8, 64) for n in ("1k", "64k")},
    "tiny": _shape("random", 72, 8, 2, (16, 16), size=16, topk=3, dtype="float32"),
    "tiny-decode": _shape("random", 72, 8, 2, (16, 16), size=16, topk=3, dtype="float32", batch=2, decode=True),
}  # fmt: skip


class Candidate(NamedTuple):
    """What is timed: a name, its parameters where it is one of ours, and a function of Inputs."""

    name: str
    parameters: dict[str, Any]
    run: Callable[[Inputs], Tensor]


def ours(path: str, parameters: dict[str, Any], table: nsa.DispatchTable | None) -> Candidate:
    """One of our paths, or the table's choice, through dispatch as a layer calls it."""

    def run(inputs: Inputs) -> Tensor:
        chosen = {"parameters": parameters} if path != "auto" else {"table": table}
        return nsa.selection_attention(inputs.query, inputs.key, inputs.value, inputs.selection, path=path, **chosen)

    return Candidate(path, parameters, run)


def chosen_by_table(candidate: Candidate, inputs: Inputs, kind: str) -> Candidate:
    """``auto`` with the path and parameters that the table chose, for the record."""
    with nsa.record_paths() as recorder:
        candidate.run(with_leaves(inputs) if kind == "backward" else inputs)
    seen = recorder.executed[-1]
    return candidate._replace(parameters={"path": seen.path, "status": seen.status, **seen.parameters})


def floor_us(problem: SelectionProblem, inputs: Inputs, kind: str) -> float:
    """The least time that the needed products, or the bytes that must move once, take on the device."""
    p, item = problem, problem.item_bytes
    keys = float(inputs.selection.lengths.sum())
    products = p.Dk + p.Dv if kind != "backward" else 3 * p.Dk + 2 * p.Dv
    rows = p.rows * p.h * (p.Dk + p.Dv) * item
    distinct = keys if p.S == 1 else min(keys, p.B * p.G * p.T)
    moved = (1 if kind != "backward" else 2) * (rows + distinct * (p.Dk + p.Dv) * item)
    return max(2 * keys * p.h * products / FLOPS_PER_US, moved / BYTES_PER_US)


def failures() -> tuple[type[BaseException], ...]:
    """Of a candidate: a record, not the end of the run. Anything else is a fault of this run, and ends it."""
    from triton.errors import TritonError  # the interpreter, without a GPU, is set up before Triton is imported

    return NSAError, WrongResult, TritonError, torch.OutOfMemoryError


def measure(kind: str, ready: list[tuple[Candidate, Inputs, Callable[[], object]]], rotation: list[Inputs],
            clock: Clock, budget_s: float) -> list[dict[str, Any]]:  # fmt: skip
    """Samples by measure for each candidate, in shared rounds of random order, and what its graph captured."""
    measures: list[dict[str, Callable[[], float]]] = []
    for candidate, inputs, call in ready:
        mine: dict[str, Callable[[], float]] = {"event_us": lambda call=call: clock.event_us(call)}
        if kind == "decode" and clock.cuda:
            mine["host_us"] = lambda call=call: clock.host_us(call)
            turned = [selection_peers.prepared(case) for case in rotation] if candidate.name[0] == "y" else rotation
            mine["warm_us"] = Replay(candidate.run, [inputs] * 20, clock)
            mine["cold_us"] = Replay(candidate.run, turned, clock)
        measures.append(mine)
    samples: list[dict[str, Any]] = [{name: [] for name in mine} for mine in measures]
    start = time.perf_counter()
    for done in range(25 if clock.cuda else 1):
        for i in random.sample(range(len(measures)), len(measures)):
            for name, take in measures[i].items():
                samples[i][name].append(take())
        if done >= 4 and time.perf_counter() - start > budget_s:
            break
    for mine, found in zip(measures, samples, strict=True):
        if isinstance(replay := mine.get("cold_us"), Replay):
            found["captured"] = replay.captured
    return samples


def bench(name: str, kind: str, candidates: list[Candidate], clock: Clock, device: torch.device, commit: str,
          budget_s: float) -> list[dict[str, Any]]:  # fmt: skip
    """Check and time the candidates of one shape and kind; a record for each, failures included."""
    problem, pattern = SHAPES[name]
    inputs = make_inputs(problem, pattern, 0, device)
    weight = torch.randn(*inputs.query.shape[:4], problem.Dv, device=device, dtype=inputs.value.dtype)
    oracle = (GradientOracle if kind == "backward" else Oracle)(inputs, problem.Dk**-0.5)
    rotation: list[Inputs] = []
    if kind == "decode" and device.type == "cuda":
        read = problem.rows * problem.row_width * (problem.Dk + problem.Dv) * problem.item_bytes
        rotation = [
            make_inputs(problem, pattern, seed, device) for seed in range(1, 2 + math.ceil(ROTATION_BYTES / read))
        ]
    common = {"shape": name, "pattern": pattern, "kind": kind, "commit": commit, "union": inputs.union}
    common["floor_us"] = floor_us(problem, inputs, kind)
    ready, records = [], []
    with torch.set_grad_enabled(kind == "backward"):
        for candidate in candidates:
            record = {**common, "name": candidate.name, "parameters": candidate.parameters}
            case = (
                inputs if candidate.name in nsa.PATHS or candidate.name == "auto" else selection_peers.prepared(inputs)
            )
            try:
                if candidate.name == "auto":
                    candidate = chosen_by_table(candidate, case, kind)
                    record["parameters"] = candidate.parameters
                record |= {"outcome": "ok", **checked(candidate.run, case, oracle, candidate.name)}
                run = candidate.run
                call = backward(run, case, weight) if kind == "backward" else partial(run, case)
                ready.append((candidate, case, call))
            except failures() as error:
                record |= {"outcome": type(error).__name__, "reason": str(error)[:300]}
            records.append(record)
        timed = iter(measure(kind, ready, rotation, clock, budget_s))
    for record in records:
        if record["outcome"] == "ok":
            samples = next(timed)
            if "captured" in samples:
                record["captured"] = samples.pop("captured")
            record |= {label: round(statistics.median(values), 2) for label, values in samples.items()}
            record["rounds"] = len(samples["event_us"])
    return records


def jobs(names: list[str], kinds: list[str], named: dict[str, list[dict[str, Any]]], yardsticks: Any,
         table: nsa.DispatchTable | None, auto: bool) -> list[tuple[str, str, list[Candidate]]]:  # fmt: skip
    """(shape, kind, candidates) in order."""
    found = []
    for name in names:
        problem = SHAPES[name].problem
        for kind in ("decode",) if problem.S == 1 else ("forward", "backward"):
            chosen = [entry for key in ("*", name) for entry in named.get(key, []) if entry["kind"] == kind]
            mine = [ours("auto", {}, table)] if auto else []
            mine += [ours(entry["path"], entry["parameters"], table) for entry in chosen]
            others = selection_peers.peers(problem, yardsticks, kind)
            mine += [Candidate(label, {}, run) for label, run in others.items()]
            if kind in kinds and mine:
                found.append((name, kind, mine))
    return found


def compile_ahead(job: tuple[str, str, dict[str, Any]]) -> None:
    """In a worker process: run one candidate on at most 16k tokens, so that Triton's cache holds its kernels.

    Failures show up later, where they are recorded.
    """
    name, kind, entry = job
    problem = SHAPES[name].problem
    tokens = min(problem.T, 2**14)
    problem = msgspec.structs.replace(problem, T=tokens, S=min(problem.S, tokens), B=min(problem.B, 8))
    run = ours(entry["path"], entry["parameters"], None).run
    try:
        inputs = make_inputs(problem, "random", 0, torch.device("cuda"))
        if kind == "backward":
            backward(run, inputs, torch.zeros_like(inputs.query[..., : problem.Dv]))()
        else:
            run(inputs)
        torch.cuda.synchronize()
    except failures() as error:
        print("compile", name, entry, str(error)[:200], file=sys.stderr)
    torch.cuda.empty_cache()


def line(record: dict[str, Any]) -> str:
    """One candidate of the printed table."""
    values = ",".join(f"{value}" for value in record["parameters"].values())
    if record["outcome"] != "ok":
        return f"  {record['name']:24s} {record['outcome']}: {record['reason'][:90]} {values}"
    labels = [label for label in ("event_us", "host_us", "warm_us", "cold_us") if label in record]
    times = " ".join(f"{label[:-3]} {record[label]:.1f}" for label in labels)
    return f"  {record['name']:24s} {times}  floor {record['floor_us']:.1f}  {values}"


def main() -> int:
    """Command line; 1 where the time did not suffice."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--shapes", default="", help="comma-separated names; default all but tiny ones")
    parser.add_argument("--kinds", default="forward,backward,decode")
    parser.add_argument("--candidates", type=Path, help="JSON of named candidates beside the table's choice")
    parser.add_argument("--no-auto", action="store_true", help="leave the table's choice out")
    parser.add_argument("--table", type=Path, help="a dispatch table instead of the one in force")
    parser.add_argument("--yardsticks", type=Path, help="selection_yardsticks.py")
    parser.add_argument("--leave-out", default="", help="comma-separated beginnings of peers' names")
    parser.add_argument("--time-limit", type=float, default=480.0, help="seconds after which nothing new is begun")
    parser.add_argument("--budget", type=float, default=1.5, help="seconds of rounds per shape and kind")
    parser.add_argument("--compile-processes", type=int, default=0)
    options = parser.parse_args()
    faulthandler.enable()  # others' kernels are compiled and tuned in this process
    stop = time.perf_counter() + options.time_limit
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        from tests.interpreter import prepare

        prepare()
    names = [name for name in options.shapes.split(",") if name] or [n for n in SHAPES if not n.startswith("tiny")]
    named = json.loads(options.candidates.read_text()) if options.candidates else {}
    table = nsa.load_dispatch_table(options.table) if options.table else None
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "selection.jsonl"
    known = [json.loads(text) for text in file.read_text().splitlines()] if file.exists() else []
    known = [record for record in known if record["commit"] == options.commit]
    done = {(record["shape"], record["kind"]) for record in known}
    todo = jobs(names, options.kinds.split(","), named, selection_peers.load(options.yardsticks), table,
                not options.no_auto)  # fmt: skip
    left_out = tuple(start for start in options.leave_out.split(",") if start)
    todo = [
        (name, kind, [candidate for candidate in candidates if not candidate.name.startswith(left_out)])
        for name, kind, candidates in todo
        if (name, kind) not in done
    ]
    if options.compile_processes and device.type == "cuda":
        ahead = [
            (n, k, {"path": c.name, "parameters": c.parameters})
            for n, k, all_ in todo
            for c in all_
            if c.name in nsa.PATHS
        ]
        with multiprocessing.get_context("spawn").Pool(options.compile_processes) as pool:
            pool.map_async(compile_ahead, ahead, chunksize=1).get(COMPILE_S)
    clock, code = Clock(device), 0
    for name, kind, candidates in todo:
        if time.perf_counter() > stop:
            print(f"not run: {name} {kind}", file=sys.stderr)
            code = 1
            continue
        begun = time.perf_counter()
        records = bench(name, kind, candidates, clock, device, options.commit, options.budget)
        with file.open("a") as out:
            out.writelines(json.dumps(record) + "\n" for record in records)
        known += records
        print(f"{name} {kind}: {time.perf_counter() - begun:.1f} s", file=sys.stderr, flush=True)
    for name, kind in dict.fromkeys((record["shape"], record["kind"]) for record in known):
        print(name, kind)
        mine = [record for record in known if (record["shape"], record["kind"]) == (name, kind)]
        mine.sort(key=lambda record: record.get("warm_us", record.get("event_us", float("inf"))))
        print(*map(line, mine), sep="\n")
    return code


if __name__ == "__main__":
    raise SystemExit(main())

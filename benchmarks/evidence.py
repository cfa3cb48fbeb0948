"""What a release says of a GPU, in one go in a time limit: tests, sanitizer, targets, sweeps. Run again, it resumes.

    python benchmarks/evidence.py --out OUT --commit $(git rev-parse HEAD) --time-limit 540
    python benchmarks/evidence.py --out OUT --commit $(git rev-parse HEAD) --steps backward,train-64k
    python benchmarks/evidence.py --dry-run

Each GPU takes one step after the other, from one list in order, with its share of the CPU cores; so nothing is timed
beside another user of the same GPU. A step is a command in a process of its own, ended at its limit, that writes
OUT/<step>.txt and its results under OUT. OUT/evidence.jsonl gets a line per step; one that this commit ended with exit
code 0 is not run again, and sweeps and benchmarks that were cut short go on where they stopped. Benchmarks read the
packaged table, whatever sweeps find beside them; ``nsa-tune export OUT/records/...`` puts that into it, and
``targets.py OUT/*/selection.jsonl`` reads the lines. Exits with 1 unless all steps were seen to end well.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import queue
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent))
from sanitize import FILES  # beside this file

ROOT = Path(__file__).parents[1]
SHORTEST_S = 25.0
"""With less time left no step is begun."""
BESIDE_S = 12.0
"""Of a step's limit, what its own time limit leaves for starting and for writing down."""


PARALLEL = ("-n", "6", "--dist", "loadfile") if importlib.util.find_spec("xdist") else ()


class Step(NamedTuple):
    """``words`` after ``python``, with {out}, {commit}, {limit} (seconds it may plan with) put in; ``seconds``: at most
    so many."""

    name: str
    seconds: float
    words: tuple[str, ...]


def bench(kind: str, seconds: float, shapes: str) -> Step:
    """Lines of the table's choice alone; peers beside it take minutes to compile."""
    words = ("--out", f"{{out}}/{kind}", "--commit", "{commit}", "--kinds", kind, "--leave-out", "yard,flash")
    limits = ("--time-limit", "{limit}", "--budget", "0.6", "--shapes", shapes)
    return Step(kind, seconds, ("benchmarks/selection.py", *words, *limits))


def sweep(step: str, seconds: float, name: str, *sets: str) -> Step:
    """``nsa-tune sweep`` of a part of a sweep."""
    words = ("-m", "tuner", "sweep", name, "--out", "{out}", "--commit", "{commit}", "--budget", "{limit}")
    return Step(step, seconds, (*words, "--no-figures", *(word for one in sets for word in ("--set", one))))


def sanitize(tool: str, file: str, seconds: float) -> Step:
    """A file of tests under compute-sanitizer."""
    words = ("--tool", tool, "--files", f"test_{file}", "--time-limit", "{limit}")
    return Step(
        f"{tool}-{file}", seconds, ("benchmarks/sanitize.py", *words, *(("--workers", "4") if PARALLEL else ()))
    )


def tests(step: str, seconds: float, *words: str) -> Step:
    """Tests, several at a time where pytest-xdist is installed."""
    return Step(step, seconds, ("-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", *PARALLEL, *words))


STEPS = (
    tests("gpu-tests", 180, "-m", "gpu", "tests"),
    sweep("train-64k", 170, "h200-64-4-train-64k"),
    tests("kernel-tests", 130, *(f"tests/nsa/{file}.py" for file in FILES)),  # and the sanitizer's kernels compiled
    bench("backward", 220,
          "A-64k-scored,A-16k-scored,A-4k-random,A-16k-random,P-16k-random,G1-16k-random,H4-16k-random,A-16k-smooth,"
          "A-1k-random,A-64k-random,A-64k-smooth"),
    sanitize("memcheck", "decode", 300),
    sanitize("memcheck", "gradient_ring", 400),
    bench("decode", 45, "decode-B8-1k,decode-B8-64k,decode-B1-64k,decode-B1-1k,decode-B64-64k,decode-B64-1k"),
    bench("forward", 120,
          "A-64k-random,A-16k-random,A-4k-random,A-1k-random,P-16k-random,G1-16k-random,H4-16k-random,A-16k-scored,"
          "A-16k-smooth,A-64k-scored,A-64k-smooth"),
    sweep("decode-graphs-contexts", 120, "h200-64-4-decode-contexts", "execution=graph"),
    sweep("decode-graphs-batches", 150, "h200-64-4-decode-batches", "execution=graph"),
    sweep("decode-graphs-16-16", 90, "h200-16-16-decode", "execution=graph"),
    sweep("decode-graphs-paper", 90, "h200-paper-decode", "execution=graph"),
    sweep("decode-graphs-others", 150, "h200-others-decode", "execution=graph"),
    sweep("decode-graphs-pr31", 80, "h200-pr31-decode", "execution=graph"),
    sweep("others-train", 160, "h200-others-train"),
    *(sanitize("racecheck", file, 300) for file in ("gradient_ring", "interval", "triton_paths")),
    *(sanitize("synccheck", file, 200) for file in ("interval", "triton_paths")),
)  # fmt: skip


def ended_well(ledger: Path, commit: str) -> set[str]:
    """Steps that the ledger shows to have ended with exit code 0 at a commit."""
    lines = [json.loads(text) for text in ledger.read_text().splitlines()] if ledger.exists() else []
    return {line["step"] for line in lines if line["commit"] == commit and line["exit"] == 0}


def run(step: Step, options: argparse.Namespace, lane: int, lanes: int, limit_s: float) -> dict[str, Any]:
    """Run a step on the lane's GPU and cores; what the ledger gets."""
    filled = {"out": options.out, "commit": options.commit, "limit": f"{max(1.0, limit_s - BESIDE_S):.0f}"}
    command = [sys.executable, *(word.format(**filled) for word in step.words)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    gpu = visible[lane] if lane < len(visible) and visible[0] else str(lane)
    cores = sorted(os.sched_getaffinity(0))
    cores = cores[lane * len(cores) // lanes : max(1, (lane + 1) * len(cores) // lanes)]
    path = os.pathsep.join((str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])))
    own = {"CUDA_VISIBLE_DEVICES": gpu, "PYTHONPATH": path, "XDG_DATA_HOME": str(options.out / "data" / step.name)}
    pinned = ["taskset", "--cpu-list", ",".join(map(str, cores))]
    began = time.monotonic()
    with (options.out / f"{step.name}.txt").open("w") as file:
        ended = subprocess.run(
            ["timeout", "--kill-after=5", f"{limit_s:.0f}", *pinned, *command],
            cwd=ROOT, env={**os.environ, **own}, stdout=file, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
    taken = round(time.monotonic() - began, 1)
    return {"step": step.name, "commit": options.commit, "exit": ended.returncode, "seconds": taken}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("evidence"))
    parser.add_argument("--commit", default="unknown", help="of this tree, for the records")
    parser.add_argument("--steps", default="", help="comma-separated names, in order; default all")
    parser.add_argument("--time-limit", type=float, default=540.0, help="seconds for everything")
    parser.add_argument("--lanes", type=int, default=torch.cuda.device_count(), help="GPUs to use")
    parser.add_argument("--dry-run", action="store_true", help="print the steps and their commands")
    options = parser.parse_args(arguments)
    stop = time.monotonic() + options.time_limit
    known = {step.name: step for step in STEPS}
    if unknown := set(filter(None, options.steps.split(","))) - known.keys():
        parser.error(f"no step named {', '.join(sorted(unknown))}; expected some of {', '.join(known)}")
    wanted = [known[name] for name in options.steps.split(",") if name] or list(STEPS)
    if options.dry_run:
        print(*(f"{step.name}, {step.seconds:.0f} s: python {' '.join(step.words)}" for step in wanted), sep="\n")
        return 0
    if options.lanes < 1:
        parser.error("no GPU is visible, and a step that skips its tests shows nothing")
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    ledger = options.out / "evidence.jsonl"
    before = ended_well(ledger, options.commit)
    waiting: queue.SimpleQueue[Step] = queue.SimpleQueue()
    for step in wanted:
        if step.name not in before:
            waiting.put(step)

    def lane(number: int) -> None:
        while (left := stop - time.monotonic()) >= SHORTEST_S:
            try:
                step = waiting.get_nowait()
            except queue.Empty:
                return
            line = run(step, options, number, options.lanes, min(step.seconds, left))
            with ledger.open("a") as file:
                file.write(json.dumps(line) + "\n")
            tail = (options.out / f"{step.name}.txt").read_text().splitlines()[-12:]
            print(f"== {step.name}: exit {line['exit']}, {line['seconds']:.0f} s", *tail, sep="\n", flush=True)

    with ThreadPool(options.lanes) as pool:
        pool.map(lane, range(options.lanes), chunksize=1)
    missing = [step.name for step in wanted if step.name not in ended_well(ledger, options.commit)]
    print(f"not seen to end well: {', '.join(missing)}" if missing else "every step ended well")
    return 1 if missing else 0


if __name__ == "__main__":
    raise SystemExit(main())

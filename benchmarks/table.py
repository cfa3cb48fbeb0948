"""A device's table in one go: sweep after sweep, checked, timed and exported, in a time limit; run again, it resumes.

    python benchmarks/table.py --out results --time-limit 540
    python benchmarks/table.py --out results --sweeps h200-64-4-prefill,h200-64-4-train

Sweeps run in the order given, each in a process of its own. One that this commit has completed below OUT is not run
again; one that was cut short goes on where it stopped. What was not run is listed at the end and the exit code is then
1. Sweeps named ``*-exhaustive`` and ``*-transfer`` are for judging a table and are not exported; for them the regret of
OUT's table is written beside their records, and that of the others with each problem's own entry held out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from nsa.device import device_identity
from tuner.record import RunFolder, run_folders
from tuner.sweep import read_sweep

ROOT = Path(__file__).parents[1]
ORDER = (
    *("h200-64-4-prefill", "h200-64-4-decode", "h200-64-4-train"),
    *("h200-16-16-prefill", "h200-16-16-decode", "h200-16-16-train"),
    *("h200-paper-prefill", "h200-paper-decode", "h200-paper-train"),
    *("h200-pr31-prefill", "h200-pr31-decode", "h200-pr31-train"),
    *("h200-64-4-window", "h200-64-4-compression", "h200-64-4-exhaustive", "h200-16-16-exhaustive"),
    *("h200-12-2-train", "h200-others-prefill", "h200-others-decode", "h200-others-train"),
    *("h200-64-4-transfer", "h200-64-4-smooth", "h200-64-4-layer"),
    *("h200-64-4-decode-contexts", "h200-64-4-decode-batches", "h200-64-4-train-64k"),
)
JUDGES = ("-exhaustive", "-transfer")
SHORTEST_S = 25.0
"""With less time left no sweep is begun: its workers would hardly have started."""


def complete_run(records: Path, sweep: str, commit: str) -> RunFolder | None:
    """The complete run of a sweep at a commit."""
    found = [folder for folder in run_folders(records / sweep) if folder.complete]
    return next((folder for folder in reversed(found) if folder.environment().commit == commit), None)


def tune(*words: str, log: Path, limit_s: float) -> int:
    """``nsa-tune`` in a process of its own, ended at the limit; its exit code."""
    with log.open("a") as file:
        try:
            return subprocess.run(
                [sys.executable, "-m", "tuner", *words],
                cwd=ROOT,
                stdout=file,
                stderr=file,
                timeout=limit_s,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            return 124


def regret(run: RunFolder, table: Path, *, hold_out: bool) -> str:
    """The last line of ``nsa-tune regret``, whose text goes beside the run's records."""
    words = [sys.executable, "-m", "tuner", "regret", str(run.path), "--table", str(table)]
    answer = subprocess.run(
        [*words, *(["--hold-out"] if hold_out else [])], cwd=ROOT, capture_output=True, text=True, check=False
    )
    (run.path / ("regret-held-out.txt" if hold_out else "regret.txt")).write_text(answer.stdout or answer.stderr)
    return (answer.stdout or answer.stderr).strip().splitlines()[-1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    parser.add_argument("--commit", required=True, help="of this tree, for the records")
    parser.add_argument("--sweeps", default=",".join(ORDER), help="names or files, comma-separated, in order")
    parser.add_argument("--time-limit", type=float, default=540.0, help="seconds for everything")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    stop = time.monotonic() + options.time_limit
    slug = device_identity(options.device).slug
    out = options.out.resolve()
    records, table = out / "records" / slug, out / "dispatch_tables" / f"{slug}.json"
    out.mkdir(parents=True, exist_ok=True)
    left: list[str] = []
    for name in options.sweeps.split(","):
        sweep = read_sweep(name)
        run, began = complete_run(records, sweep.name, options.commit), time.monotonic()
        time_left = stop - began
        code: int | str = "already complete"
        if run is None:
            if time_left < SHORTEST_S:
                left.append(name)
                continue
            judge = sweep.name.endswith(JUDGES)
            code = tune(
                *("sweep", name, "--out", str(out), "--commit", options.commit, "--device", options.device),
                *("--budget", f"{min(sweep.budget_s, time_left):.0f}", "--no-figures"),
                *([] if judge else ["--export"]),
                log=out / f"{sweep.name}.log", limit_s=time_left,
            )  # fmt: skip
            run = complete_run(records, sweep.name, options.commit)
        if run is None:
            left.append(name)
        print(f"{name}: exit {code}, {time.monotonic() - began:.0f} s", flush=True)
    for name in options.sweeps.split(","):
        sweep = read_sweep(name)
        run = complete_run(records, sweep.name, options.commit)
        if run is not None and table.exists() and sweep.level == "branch":
            print(f"{name}: {regret(run, table, hold_out=not sweep.name.endswith(JUDGES))}", flush=True)
    if left:
        print(f"not run to the end: {', '.join(left)}")
    return 1 if left else 0


if __name__ == "__main__":
    raise SystemExit(main())

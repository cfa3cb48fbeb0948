"""The tests of the Triton kernels, whose sizes are small, under compute-sanitizer on a GPU.

    python benchmarks/sanitize.py --time-limit 300 --processes 4
    python benchmarks/sanitize.py --tool racecheck --files test_gradient_ring

Each file runs in a process of its own, ``--processes`` of them at a time. Torch's memory is not cached, so that a
tensor ends where its allocation ends; graphs cannot be captured so, and tests of graphs and replays are left out. A
file without tests that ran, or cut by the clock, is not clean. Exits with 1 unless all files are.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = (
    *("test_gradient_ring", "test_triton_union", "test_triton_paths", "test_decode", "test_interval"),
    *("test_score_kernels", "test_compress_kernel", "test_projection"),
)
LEFT_OUT = "not graph and not replay and not capture and not never_synchronises"


def command(sanitizer: str, tool: str, file: str, workers: int = 0) -> list[str]:
    """A file's tests under a tool; leaks are of no interest, and one error is as good as a thousand."""
    options = ["--tool", tool, "--error-exitcode", "9", "--print-limit", "5"]
    spread = ["-n", str(workers)] if workers else []
    tests = ["-m", "pytest", "-p", "no:cacheprovider", *spread, "-k", LEFT_OUT, f"tests/nsa/{file}.py"]
    return [sanitizer, *options, sys.executable, *tests]


def verdict(output: str, code: int) -> tuple[bool, str]:
    """Whether a file is clean, and why: tests passed, a summary of no errors, and an exit code that agrees."""
    errors = [int(number.replace(",", "")) for number in re.findall(r"SUMMARY: ([\d,]+) (?:error|hazard)", output)]
    passed = re.search(r"(\d+) passed", output)
    end = "cut by the clock" if code == 124 else f"exit {code}"
    said = f"{passed.group(1) if passed else 0} passed, {sum(errors) if errors else 'no summary of'} errors, {end}"
    return bool(errors and passed) and not sum(errors) and code == 0, said


def sanitized(options: argparse.Namespace, stop: float, file: str) -> bool:
    """Run a file's tests; print what was seen, and what was printed where it is not clean."""
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    began = time.monotonic()
    limit = ["timeout", "--kill-after=5", f"{max(1.0, stop - began):.0f}"]  # of the sanitizer and what it started
    done = subprocess.run(
        [*limit, *command(options.sanitizer, options.tool, file, options.workers)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    printed = done.stdout + done.stderr
    clean, said = verdict(printed, done.returncode)
    found = [line for line in printed.splitlines() if line.startswith("=========")]
    details = "" if clean else "\n".join([*found[:60], printed[-3000:], ""])
    print(f"{details}{file}: {'clean' if clean else 'NOT CLEAN'}, {said}, {time.monotonic() - began:.0f} s", flush=True)
    return clean


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tool", choices=("memcheck", "racecheck", "synccheck", "initcheck"), default="memcheck")
    parser.add_argument("--files", default=",".join(FILES), help="names below tests/nsa, comma-separated, in order")
    parser.add_argument("--time-limit", type=float, default=540.0, help="seconds for everything")
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    parser.add_argument("--sanitizer", default=found, required=found is None, help="the program, where it is not found")
    parser.add_argument("--processes", type=int, default=1, help="files at a time")
    parser.add_argument("--workers", type=int, default=0, help="of a file's tests, by pytest-xdist; 0: one process")
    options = parser.parse_args()
    run = partial(sanitized, options, time.monotonic() + options.time_limit)
    with ThreadPool(options.processes) as pool:
        return 0 if all(pool.map(run, options.files.split(","), chunksize=1)) else 1


if __name__ == "__main__":
    raise SystemExit(main())

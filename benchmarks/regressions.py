"""Does history mark, and bisect find, the commit that really slowed the varlen path? On this machine, really timed.

`python benchmarks/regressions.py` makes a git repository of eight commits of this nsa, one of which does a few small
matrix products more per varlen call (about 4 %, or --products), measures its history against the first commit, bisects
it, and draws the regression plot. It goes on where it was stopped as long as OUT stays. `--quick` takes three commits.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from gate import EXTRA, MARK, ROOT

from tuner.bisect import Bisecting
from tuner.compare_record import Question, scenarios_of
from tuner.gate_commands import bisect_text, history_text
from tuner.history import history
from tuner.marks import points_of
from tuner.plot_regressions import draw_regressions
from tuner.sweep import read_sweep
from tuner.trees import Tree

AUTHOR = {"GIT_AUTHOR_NAME": "n", "GIT_AUTHOR_EMAIL": "n@n", "GIT_COMMITTER_NAME": "n", "GIT_COMMITTER_EMAIL": "n@n"}
DATES = {"GIT_AUTHOR_DATE": "2026-01-01T00:00:00Z", "GIT_COMMITTER_DATE": "2026-01-01T00:00:00Z"}  # equal hashes again


def git(folder: Path, *arguments: str) -> str:
    """What git says."""
    environment = {**os.environ, **AUTHOR, **DATES}
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()


def make_repository(folder: Path, commits: int, culprit: int, products: int) -> list[str]:
    """A repository of ``commits`` commits after the first; hashes, the first one first."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "nsa", folder / "nsa", ignore=shutil.ignore_patterns("__pycache__", "dispatch_tables"))
    git(folder, "init", "--quiet", "--initial-branch=main")
    hashes = []
    for place in range(-1, commits):
        if place == culprit:
            file = folder / "nsa" / "paths" / "varlen.py"
            slowed = file.read_text().replace(MARK, f"    _slower()\n{MARK}") + EXTRA.format(products=products)
            file.write_text(slowed)
        with (folder / "nsa" / "errors.py").open("a") as opened:
            opened.write(f"# commit {place}\n")
        git(folder, "add", "--all")
        git(folder, "commit", "--quiet", "--message", f"commit {place}" + (" is slower" if place == culprit else ""))
        hashes.append(git(folder, "rev-parse", "HEAD"))
    return hashes


def main() -> int:
    """Run both, print what they say; 0 where both name the commit."""
    parser = argparse.ArgumentParser(description="history and bisect on a real slowdown")
    parser.add_argument("--products", type=int, default=13, help="per call; benchmarks/gate.py counts what 4 %% takes")
    parser.add_argument("--seconds", type=float, default=60.0, help="budget of each comparison")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 leaves its own choice")
    parser.add_argument("--out", type=Path, default=Path("out/regressions"))
    parser.add_argument("--quick", action="store_true", help="three commits")
    arguments = parser.parse_args()
    if arguments.threads:
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
        torch.set_num_threads(arguments.threads)
    commits, culprit = (3, 1) if arguments.quick else (7, 4)
    hashes = make_repository(arguments.out / "repository", commits, culprit, arguments.products)
    sweep = read_sweep("quick", ["modes=decode", "contexts=1024"])
    scenarios = scenarios_of(sweep, "cpu", ("varlen",))
    began = time.monotonic()
    told = history(
        f"{hashes[0]}..main", repository=arguments.out / "repository", scenarios=scenarios, out=arguments.out,
        budget_s=arguments.seconds,
    )  # fmt: skip
    print(f"{history_text(told)}history took {time.monotonic() - began:.0f} s\n")
    title = f"a slowdown of varlen at {hashes[culprit + 1][:7]}\n{commits} commits against {hashes[0][:7]}"
    figures = draw_regressions(points_of(told.lines), told.change_points, arguments.out / "figures", title)
    print("\n".join(map(str, figures)))
    nobody = Tree(asked="", folder="")
    ask = Question(base=nobody, head=nobody, scenarios=scenarios, budget_s=arguments.seconds)
    began = time.monotonic()
    found = Bisecting(hashes[0], "main", repository=arguments.out / "repository", ask=ask, out=arguments.out).run()
    print(f"{bisect_text(found)}bisect took {time.monotonic() - began:.0f} s")
    right = [mark.commit for mark in told.marks] == [hashes[culprit + 1]] and found.culprit == hashes[culprit + 1]
    print("both name the commit" if right else f"NOT FOUND: it is {hashes[culprit + 1]}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())

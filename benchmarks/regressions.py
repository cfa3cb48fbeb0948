"""Does history mark, and bisect find, the commit that brought a defect? On this machine, with its own clock.

`python benchmarks/regressions.py` makes a git repository with ten branches of seven commits of this nsa: on one of them
a commit does a few small matrix products more per varlen call (about 4 %, or --products), on each of the others one
brings a defect of the drill. It measures each branch's history against the first commit, draws its regression plot and
bisects it. It goes on where it was stopped as long as OUT stays. `--quick` takes two branches of three commits.
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch
from gate import EXTRA, MARK, ROOT

sys.path.insert(0, str(ROOT))  # the defects are the tests' own

from tests.tuner.scripted import DEFECTS, Repository, append, both, replace, scenario
from tuner.bisect import Bisecting
from tuner.compare_record import LineFile, Question, Scenario, scenarios_of
from tuner.history import history
from tuner.marks import points_of
from tuner.plot_regressions import draw_regressions
from tuner.sweep import read_sweep
from tuner.trees import Tree

DATES = {"GIT_AUTHOR_DATE": "2026-01-01T00:00:00Z", "GIT_COMMITTER_DATE": "2026-01-01T00:00:00Z"}  # equal hashes again
SLOWER = "varlen slower"


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """What was said of one branch. ``marked`` and ``bisected``: places of commits, -1 for none."""

    case: str
    culprit: int
    marked: list[int]
    what: str
    history_s: float
    bisected: int
    bisect_s: float

    @property
    def right(self) -> bool:
        """Whether both name the commit."""
        return self.marked == [self.culprit] and self.bisected == self.culprit


def cases(products: int) -> dict[str, tuple[Callable[[Path], None], Scenario]]:
    """Case -> the edit that brings it, and the scenario in which it shows."""
    slower = both(
        replace("paths/varlen.py", (MARK, f"    _slower()\n{MARK}")),
        append("paths/varlen.py", EXTRA.format(products=products)),
    )
    (decode,) = scenarios_of(read_sweep("quick", ["modes=decode", "contexts=1024"]), "cpu", ("varlen",))
    defects = {f"drill {name}": (edit, scenario(path, mode)) for name, (edit, path, mode, _, _) in DEFECTS.items()}
    return {SLOWER: (slower, decode), **defects}


def measure(repository: Repository, case: str, commits: list[str], culprit: int, asked: Scenario, out: Path,
            budget_s: float) -> Found:  # fmt: skip
    """History, plot and bisect of one branch."""
    span, began = f"{repository.first}..{commits[-1]}", time.monotonic()
    told = history(span, repository=repository.folder, scenarios=(asked,), out=out, budget_s=budget_s)
    history_s = time.monotonic() - began
    title = f"{case}, at {commits[culprit][:7]}\n{len(commits)} commits against {repository.first[:7]}"
    figures = out / "figures" / case.replace(" ", "-").lower()
    draw_regressions(points_of(told.lines), told.change_points, figures, title)
    nobody, began = Tree(asked="", folder=""), time.monotonic()
    ask = Question(base=nobody, head=nobody, scenarios=(asked,), budget_s=budget_s)
    found = Bisecting(repository.first, commits[-1], repository=repository.folder, ask=ask, out=out).run()
    return Found(
        case=case, culprit=culprit, marked=[commits.index(mark.commit) for mark in told.marks],
        what="; ".join(mark.what for mark in told.marks)[:120], history_s=round(history_s, 1),
        bisected=commits.index(found.culprit) if found.culprit else -1, bisect_s=round(time.monotonic() - began, 1),
    )  # fmt: skip


def main() -> int:
    """Measure what is missing, print a line per branch; 0 where history and bisect name every commit."""
    parser = argparse.ArgumentParser(description="history and bisect on real defects")
    parser.add_argument("--products", type=int, default=13, help="per call; benchmarks/gate.py counts what 4 %% takes")
    parser.add_argument("--seconds", type=float, default=60.0, help="budget of each comparison")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 leaves its own choice")
    parser.add_argument("--out", type=Path, default=Path("out/regressions"))
    parser.add_argument("--quick", action="store_true", help="two branches of three commits")
    arguments = parser.parse_args()
    if arguments.threads:
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
        torch.set_num_threads(arguments.threads)
    os.environ.update(DATES)
    count, culprit = (3, 1) if arguments.quick else (7, 4)
    wanted = cases(arguments.products)
    if arguments.quick:
        wanted = dict(list(wanted.items())[:2])
    shutil.rmtree(arguments.out / "repository", ignore_errors=True)
    repository = Repository(arguments.out / "repository")
    file = LineFile[Found](arguments.out / f"found-{repository.first[:10]}-{arguments.products}-{count}.jsonl", Found)
    known = {found.case: found for found in file.read()}
    for case, (edit, asked) in wanted.items():
        commits = repository.seven(case.replace(" ", "-"), {culprit: edit})[:count]
        if case not in known:
            known[case] = measure(repository, case, commits, culprit, asked, arguments.out, arguments.seconds)
            file.append(known[case])
        found = known[case]
        words = "both name it" if found.right else f"NOT FOUND: history {found.marked}, bisect {found.bisected}"
        print(
            f"{case:28s} {words} (of {count}: the {found.culprit}th); history {found.history_s:.0f} s, "
            f"bisect {found.bisect_s:.0f} s; {found.what}", flush=True,
        )  # fmt: skip
    return 0 if all(found.right for found in known.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

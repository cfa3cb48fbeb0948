"""A scripted gate: a clock that reads costs from the trees, workers in this process, and a git repository with defects.

Checks are real. Times are not: a sample of a side takes ``BASE_US`` times what the side's ``nsa/__init__.py`` says
(``KERNEL_COST`` for every call, ``DISPATCH_COST`` for dispatched ones), with 0.4 % of noise.
"""

from __future__ import annotations

import itertools
import math
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nsa.device import device_identity, software_identity
from nsa.problem import Mode, SelectionProblem
from tuner.compare_record import Question, Scenario
from tuner.lanes import Padded
from tuner.trees import Tree
from tuner.worker import CandidateFailed, WorkerDied, classify, open_bench

ROOT = Path(__file__).parent.parent.parent
BASE_US, NOISE, UNIT_US = 3000.0, 0.004, 10.0
SEEDS = itertools.count()


@contextmanager
def one_thread() -> Iterator[None]:
    """Two threads on two shared cores wait for one another: 10 ms a call instead of 50 us."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Watch:
    """Named in ``Question.watch``; drawn anew per process and scenario."""

    noise = NOISE

    def __init__(self, _device: torch.device, **_cold: bool) -> None:
        self.random = random.Random(next(SEEDS))

    def calls_for(self, _call: Any, _target_us: float) -> int:
        return 1

    def sample_us(self, call: Any, _calls: int) -> float:
        if not isinstance(call, Padded):
            return UNIT_US
        package = call.side.package
        cost = getattr(package, "KERNEL_COST", 1.0)
        cost *= getattr(package, "DISPATCH_COST", 1.0) if call.path == "auto" else 1.0
        return BASE_US * cost * math.exp(self.random.gauss(0.0, self.noise)) + (1 + call.extra) * UNIT_US


class NoisyWatch(Watch):
    """Half as loud again as any slowdown that matters: nothing can be told."""

    noise = 0.5


class BiasedWatch(Watch):
    """A machine on which whatever is not base takes 5 % longer: the A/A lane must alarm."""

    def sample_us(self, call: Any, _calls: int) -> float:
        us = super().sample_us(call, _calls)
        return us * 1.05 if isinstance(call, Padded) and call.side.side != "base" else us


class LocalWorker:
    """A worker in this process. ``dies_at``: the asks, by count over all workers, at which it is killed."""

    count = 0
    dies_at: tuple[int, ...] = ()

    def __init__(self) -> None:
        self.doing, self.alive, self.bench = "starting", True, None

    def ask(self, verb: str, argument: Any = None, **_timeout_s: float) -> Any:
        assert self.alive, "a dead worker was asked"
        LocalWorker.count += 1
        if LocalWorker.count in LocalWorker.dies_at:
            self.alive = False
            raise WorkerDied("oom", "the worker was ended by SIGKILL", self.doing)
        try:
            if verb == "identify":
                return device_identity("cpu"), software_identity(), {"threads": 1}
            if verb == "prepare":
                self.bench = open_bench(argument, self._about, 0)
                return self.bench.prepared()
            return getattr(self.bench, verb)(*argument)
        except Exception as error:
            raise CandidateFailed(*classify(error)) from error

    def _about(self, what: str) -> None:
        self.doing = what

    def close(self) -> None:
        self.alive = False


class Clock:
    """Every look costs a tenth of a second."""

    def __init__(self, step_s: float = 0.1) -> None:
        self.now, self.step_s = 0.0, step_s

    def __call__(self) -> float:
        self.now += self.step_s
        return self.now


def scenario(path: str = "auto", mode: Mode = "decode") -> Scenario:
    """A small problem with a tail block."""
    queries = {"decode": 1, "prefill": 100, "train": 100}[mode]
    problem = SelectionProblem(
        mode=mode, dtype="float32", B=1, S=queries, T=100, G=2, h=4, Dk=32, Dv=32, block_size=64, topk=16
    )
    return Scenario(name=f"{mode} T=100 {path}", problem=problem, pattern="scored", path=path)


def question(base: Tree, head: Tree, *scenarios: Scenario, **settings: Any) -> Question:
    """Asked with the scripted watch."""
    defaults: dict[str, Any] = {"watch": "tests.tuner.scripted:Watch", "budget_s": 60.0, "launches": 1}
    return Question(base=base, head=head, scenarios=scenarios or (scenario(),), **(defaults | settings))


class Repository:
    """A git repository that holds a copy of this checkout's nsa; ``commit`` edits and commits."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT / "nsa", folder / "nsa", ignore=shutil.ignore_patterns("__pycache__", "dispatch_tables"))
        self.git("init", "--quiet", "--initial-branch=main")
        self.first = self.commit("the first")

    def git(self, *arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(self.folder), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def commit(self, subject: str, edit: Callable[[Path], None] | None = None) -> str:
        """Edit (by default: a comment), commit, and return the hash."""
        (edit or remark(subject))(self.folder / "nsa")
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", subject)
        return self.git("rev-parse", "HEAD")

    def branch(self, name: str) -> None:
        """A new branch from the first commit."""
        self.git("checkout", "--quiet", "-b", name, self.first)

    def seven(self, name: str, edits: dict[int, Callable[[Path], None]]) -> list[str]:
        """A branch of seven commits; ``edits`` at their places, comments elsewhere."""
        self.branch(name)
        return [self.commit(f"commit {place} of {name}", edits.get(place)) for place in range(7)]


def remark(text: str) -> Callable[[Path], None]:
    return append("errors.py", f"# {text}\n")


def append(file: str, text: str) -> Callable[[Path], None]:
    def edit(nsa: Path) -> None:
        with (nsa / file).open("a") as opened:
            opened.write(text)

    return edit


def replace(file: str, *pairs: tuple[str, str]) -> Callable[[Path], None]:
    def edit(nsa: Path) -> None:
        text = (nsa / file).read_text()
        for old, new in pairs:
            assert old in text, f"{old!r} is not in nsa/{file}: adapt the test's defect"
            text = text.replace(old, new, 1)
        (nsa / file).write_text(text)

    return edit


def both(*edits: Callable[[Path], None]) -> Callable[[Path], None]:
    def edit(nsa: Path) -> None:
        for each in edits:
            each(nsa)

    return edit


def cost(kernel: float = 1.0, dispatch: float = 1.0) -> Callable[[Path], None]:
    """From this commit on, calls take so many times as long."""
    return append("__init__.py", f"\nKERNEL_COST = {kernel}\nDISPATCH_COST = {dispatch}\n")


def runs(path: str, function: str) -> Callable[[Path], None]:
    """From this commit on, the path runs a broken twin of the drill."""
    return replace("paths/__init__.py", (f'target=".{path}:run"', f'target="tuner.drill:{function}"'))


RESERVE = replace(
    "paths/gather.py",
    ("capture_reason, chunk_parameter", "capture_reason, chunk_parameter, reserve_parameter"),
    ("problem.rows),)", 'problem.rows), reserve_parameter("reserve_rows", problem.rows))'),
)

DEFECTS: dict[str, tuple[Callable[[Path], None], str, Mode, str, str]] = {
    "1 another path runs": (runs("varlen", "runs_packed"), "varlen", "decode", "fell_back", "no longer executes"),
    "2 error swallowed": (runs("varlen", "swallows_its_error"), "varlen", "prefill", "fell_back", "no longer executes"),
    "3 crash with gradients": (runs("dense", "crashes_with_gradients"), "dense", "train", "crash", "fails now"),
    "4 first key only": (runs("gather", "aligned_top_left"), "gather", "decode", "wrong", "wrong now"),
    "5 reserve unsliced": (
        both(runs("gather", "uses_reserve_unsliced"), RESERVE), "gather", "decode", "crash", "fails now",
    ),
    "6 heads replicated": (
        both(runs("gather", "replicates_heads"), RESERVE), "gather", "decode", "fell_back", "no longer executes",
    ),
    "7 workspace forgotten": (runs("gather", "forgets_its_workspace"), "gather", "decode", "wrong", "wrong now"),
    "8 future seen": (runs("dense", "sees_the_future"), "dense", "prefill", "wrong", "wrong now"),
    "9 synchronises": (runs("gather", "synchronises"), "gather", "decode", "fell_back", "no longer executes"),
}  # fmt: skip
"""Defect -> edit, path and mode of the scenario in which it shows, verdict, and what changed."""

BALLAST = replace("paths/gather.py", ("    parts = []\n", "    parts = []\n    ballast = query.new_empty(1_000_000)\n"))
"""4 MB more at the peak of a call."""


@contextmanager
def deaths(*asks: int) -> Iterator[None]:
    """Within it, workers die at these asks, counted from now."""
    LocalWorker.count, LocalWorker.dies_at = 0, asks
    try:
        yield
    finally:
        LocalWorker.dies_at = ()

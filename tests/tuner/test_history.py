"""A history marks the commit that brought each defect, goes on after a kill, and its change points only attribute."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.tuner.scripted import (
    BALLAST,
    DEFECTS,
    Clock,
    LocalWorker,
    Repository,
    append,
    both,
    cost,
    one_thread,
    replace,
    scenario,
)
from tuner.history import HistoryResult, history, parse_range
from tuner.marks import NO_IMPORT, CommitLine, CommitScenario, change_points, marks_of, points_of
from tuner.trees import TreeError


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Repository]:
    with one_thread():
        yield Repository(tmp_path_factory.mktemp("history") / "repository")


def measured(repository: Repository, out: Path, branch: str, path: str = "auto", mode: Any = "decode") -> HistoryResult:
    """The branch's history against its first commit."""
    return history(
        f"{repository.first}..{branch}", repository=repository.folder, scenarios=(scenario(path, mode),), out=out,
        hire=LocalWorker, clock=Clock(), watch="tests.tuner.scripted:Watch", launches=1, budget_s=60.0,
    )  # fmt: skip


SLOWDOWNS: dict[str, tuple[Callable[[Path], None], str]] = {
    "slower kernel": (cost(kernel=1.04), "kernel slower"),
    "dearer dispatch": (cost(dispatch=1.04), "dispatch dearer"),
    "more memory": (BALLAST, "more memory"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_the_commit_that_brought_a_defect_is_marked(repository: Repository, tmp_path: Path, name: str) -> None:
    edit, path, mode, outcome, kind = DEFECTS[name]
    branch = f"defect-{name.split()[0]}"
    commits = repository.seven(branch, {5: edit})[:]
    result = history(
        f"{commits[3]}..{branch}", repository=repository.folder, scenarios=(scenario(path, mode),), out=tmp_path,
        anchor=repository.first, hire=LocalWorker, clock=Clock(), watch="tests.tuner.scripted:Watch", launches=1,
    )  # fmt: skip
    assert [(mark.commit, mark.what.split(";")[0]) for mark in result.marks] == [(commits[5], outcome)]
    assert kind in result.marks[0].what
    assert [line.verdict for line in result.lines] == ["passed", "regressed", "regressed"]
    assert result.exit_code == 3


@pytest.mark.parametrize("name", SLOWDOWNS)
def test_the_commit_that_costs_is_marked_among_seven(repository: Repository, tmp_path: Path, name: str) -> None:
    edit, kind = SLOWDOWNS[name]
    commits = repository.seven(name.replace(" ", "-"), {3: edit})
    result = measured(repository, tmp_path, name.replace(" ", "-"))
    assert [mark.commit for mark in result.marks] == [commits[3]]
    assert kind in result.marks[0].what
    if kind != "more memory":
        assert result.change_points == {scenario().name: (commits[3],)}
    assert [point.order for point in points_of(result.lines)] == list(range(7))


def test_a_history_goes_on_where_it_was_killed_and_skips_what_does_not_import(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = append("__init__.py", "\nimport no_such_module\n")
    mended = replace("__init__.py", ("\nimport no_such_module\n", ""))
    commits = repository.seven("killed", {2: broken, 3: both(mended, cost(kernel=1.05))})
    real, seen = LocalWorker.ask, list[str]()

    def until_the_fifth(self: LocalWorker, verb: str, argument: Any = None, **timeout: float) -> Any:
        tree = getattr(argument, "tree", None)
        if tree is not None and tree.commit == commits[4]:
            raise KeyboardInterrupt
        return real(self, verb, argument, **timeout)

    monkeypatch.setattr(LocalWorker, "ask", until_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        measured(repository, tmp_path, "killed")
    monkeypatch.undo()
    file = next(tmp_path.glob("history/*.jsonl"))
    before = file.read_bytes()
    assert before.count(b"\n") == 4
    file.write_bytes(before + b'{"commit":"half a li')

    def noting(self: LocalWorker, verb: str, argument: Any = None, **timeout: float) -> Any:
        seen.extend(tree.commit for tree in [getattr(argument, "tree", None)] if tree is not None)
        return real(self, verb, argument, **timeout)

    monkeypatch.setattr(LocalWorker, "ask", noting)
    result = measured(repository, tmp_path, "killed")
    assert file.read_bytes().startswith(before)
    assert not set(seen) & set(commits[:4])
    assert [line.verdict for line in result.lines] == [
        *("passed", "passed", "does not import"), *["regressed"] * 4
    ]  # fmt: skip
    assert "no_such_module" in result.lines[2].reason
    assert [(mark.commit, mark.suspects) for mark in result.marks] == [(commits[3], (commits[2],))]


def test_a_history_begun_on_another_device_is_refused(repository: Repository, tmp_path: Path) -> None:
    repository.branch("device")
    repository.commit("one")
    measured(repository, tmp_path, "device")
    file = next(tmp_path.glob("history/*.jsonl"))
    file.write_bytes(file.read_bytes().replace(b'"device":"cpu', b'"device":"another-cpu'))
    with pytest.raises(TreeError, match="was measured on another-cpu"):
        measured(repository, tmp_path, "device")


@pytest.mark.parametrize("commits", ["HEAD", "..HEAD", "a..", "a...b"])
def test_a_range_that_is_none_is_refused(commits: str) -> None:
    with pytest.raises(TreeError, match=r"FIRST\.\.LAST"):
        parse_range(commits)


def line(order: int, **fields: Any) -> CommitLine:
    """A line of one scenario."""
    found = CommitScenario(scenario="s", **fields)
    return CommitLine(
        commit=f"c{order}", date="", subject="", order=order, anchor="a", device="d", settings="", verdict="",
        scenarios=(found,),
    )  # fmt: skip


def ratio(order: int, value: float, verdict: str = "same") -> CommitLine:
    return line(order, verdict=verdict, ratio=value, ratio_low=value - 0.005, ratio_high=value + 0.005, pairs=40)


def test_a_second_slowdown_on_top_of_the_first_is_marked_too() -> None:
    lines = [ratio(0, 1.0), ratio(1, 1.05, "slower"), ratio(2, 1.051, "slower"), ratio(3, 1.1, "slower")]
    assert [mark.commit for mark in marks_of(lines)] == ["c1", "c3"]


def test_an_undecided_commit_is_neither_marked_nor_a_new_start() -> None:
    lines = [ratio(0, 1.0), ratio(1, 1.05, "slower"), line(2, verdict="undecided"), ratio(3, 1.05, "slower")]
    assert [mark.commit for mark in marks_of(lines)] == ["c1"]


def test_a_mark_names_the_commits_before_it_that_could_not_be_told() -> None:
    absent = msgspec.structs.replace(line(2, verdict="same"), verdict=NO_IMPORT, scenarios=())
    slower = [ratio(0, 1.0), line(1, verdict="undecided"), absent, ratio(3, 1.05, "slower")]
    wrong = [*slower[:3], line(3, verdict="wrong", reason="x")]  # an undecided commit passed its checks
    assert [mark.suspects for mark in marks_of(slower)] == [("c1", "c2")]
    assert [mark.suspects for mark in marks_of(wrong)] == [("c2",)]
    assert [mark.suspects for mark in marks_of([ratio(0, 1.0), ratio(1, 1.05, "slower")])] == [()]


def test_what_was_mended_may_break_again() -> None:
    lines = [line(0, verdict="wrong", reason="x"), ratio(1, 1.0), line(2, verdict="wrong", reason="x")]
    assert [mark.commit for mark in marks_of(lines)] == ["c0", "c2"]


def test_change_points_are_where_levels_change_and_nowhere_else() -> None:
    noise = [0.001 * math.sin(7 * place) for place in range(20)]
    flat = [ratio(place, 1.0 + noise[place]) for place in range(20)]
    step = [ratio(place, (1.0 if place < 12 else 1.03) + noise[place]) for place in range(20)]
    assert change_points(flat) == {"s": ()}
    assert change_points(step) == {"s": ("c12",)}
    assert change_points(flat[:1]) == {}

"""Bisect finds the commit that brought each defect, spends its pairs near it, and says what it had to skip."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    deaths,
    one_thread,
    question,
    replace,
    scenario,
)
from tuner.bisect import Bisecting, BisectResult, Probe, next_place, suspicions
from tuner.trees import Tree, TreeError

NOWHERE = Tree(asked="", folder="/nowhere")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Repository]:
    with one_thread():
        yield Repository(tmp_path_factory.mktemp("bisect") / "repository")


def bisecting(repository: Repository, out: Path, branch: str, path: str = "auto", mode: Any = "decode") -> Bisecting:
    ask = question(NOWHERE, NOWHERE, scenario(path, mode))
    return Bisecting(
        repository.first, branch, repository=repository.folder, ask=ask, out=out, hire=LocalWorker, clock=Clock()
    )


def found(repository: Repository, out: Path, branch: str, path: str = "auto", mode: Any = "decode") -> BisectResult:
    return bisecting(repository, out, branch, path, mode).run()


@pytest.mark.parametrize("name", DEFECTS)
def test_the_commit_that_brought_a_defect_is_found_without_a_time(
    repository: Repository, tmp_path: Path, name: str
) -> None:
    edit, path, mode, outcome, _ = DEFECTS[name]
    place = int(name.split()[0]) % 7
    commits = repository.seven(f"bad-{name.split()[0]}", {place: edit})
    result = found(repository, tmp_path, f"bad-{name.split()[0]}", path, mode)
    assert result.culprit == commits[place], result.reason
    assert result.confirmed is not None
    assert result.confirmed.verdict == outcome
    assert (result.pairs, result.exit_code) == (0, 0)
    assert result.visits <= 3


@pytest.mark.parametrize(
    ("name", "edit", "kind"),
    [("kernel", cost(kernel=1.04), "kernel slower"), ("dispatch", cost(dispatch=1.03), "dispatch dearer")],
)
def test_the_commit_that_costs_is_found_by_pairs(
    repository: Repository, tmp_path: Path, name: str, edit: Any, kind: str
) -> None:
    commits = repository.seven(f"slow-{name}", {4: edit})
    result = found(repository, tmp_path, f"slow-{name}")
    assert result.culprit == commits[4], result.reason
    assert result.subject == f"commit 4 of slow-{name}"
    assert result.confirmed is not None
    assert [change.kind for change in result.confirmed.changes] == [kind]
    assert result.exit_code == 0


def test_the_commit_that_takes_more_memory_is_found(repository: Repository, tmp_path: Path) -> None:
    commits = repository.seven("memory", {2: BALLAST})
    result = found(repository, tmp_path, "memory")
    assert (result.culprit, result.exit_code) == (commits[2], 0)


def test_commits_that_do_not_import_are_skipped_and_named_as_suspects(repository: Repository, tmp_path: Path) -> None:
    broken = both(append("__init__.py", "\nimport no_such_module\n"), cost(kernel=1.05))
    mended = replace("__init__.py", ("\nimport no_such_module\n", ""))
    commits = repository.seven("skips", {3: broken, 4: mended})
    result = found(repository, tmp_path, "skips")
    assert result.culprit == commits[4]
    assert result.suspects == (commits[3],)
    assert "no_such_module" in result.skipped[commits[3]]


def test_sides_that_do_not_differ_have_no_culprit(repository: Repository, tmp_path: Path) -> None:
    repository.seven("equal", {})
    result = found(repository, tmp_path, "equal")
    assert (result.culprit, result.exit_code, result.visits) == ("", 4, 0)
    assert "not shown to be worse" in result.reason


def test_an_end_that_does_not_import_is_an_error(repository: Repository, tmp_path: Path) -> None:
    repository.seven("no-end", {6: append("__init__.py", "\nimport no_such_module\n")})
    with pytest.raises(TreeError, match="does not import"):
        found(repository, tmp_path, "no-end")


def test_a_killed_search_goes_on_with_what_it_knew(repository: Repository, tmp_path: Path) -> None:
    commits = repository.seven("resumed", {5: cost(kernel=1.05)})
    first = bisecting(repository, tmp_path, "resumed")
    real, probes = first.probe, list[str]()

    def once(commit: str, *rest: Any) -> Probe:
        if probes:
            raise KeyboardInterrupt
        probes.append(commit)
        return real(commit, *rest)

    first.probe = once  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        first.run()
    again = bisecting(repository, tmp_path, "resumed")
    assert [probe.commit for probe in again.probes] == probes
    assert again.run().culprit == commits[5]


def test_a_killed_worker_costs_a_visit_and_not_the_culprit(repository: Repository, tmp_path: Path) -> None:
    commits = repository.seven("murdered", {3: cost(kernel=1.05)})
    search = bisecting(repository, tmp_path, "murdered")
    real = search.probe

    def dying_once(*arguments: Any) -> Probe:
        search.probe = real  # type: ignore[method-assign]
        with deaths(4):  # load, prepare and check, then the pairs' worker
            return real(*arguments)

    search.probe = dying_once  # type: ignore[method-assign]
    result = search.run()
    assert result.culprit == commits[3]
    assert not result.skipped


# --- where pairs go ---


def simulated(culprit: int, count: int, step: float, noise: float, seed: int) -> tuple[int, dict[int, int]]:
    """A search over ``count`` commits with pairs from a scripted clock: (found, visits by place)."""
    coin, commits = random.Random(seed), [str(place) for place in range(count)]
    probes, visits = list[Probe](), dict[int, int]()
    while (place := next_place(commits, probes, step, 0.001)) is not None:
        mean = step if place >= culprit else 0.0
        probes.append(Probe(commit=commits[place], ratios=[coin.gauss(mean, noise) for _ in range(12)]))
        visits[place] = visits.get(place, 0) + 1
        assert len(probes) < 200
    suspicion = suspicions(commits, probes, step)
    return max(suspicion, key=suspicion.__getitem__), visits


def test_the_culprit_is_found_under_noise_as_large_as_the_slowdown() -> None:
    answers = [simulated(seed % 16, 16, 0.04, 0.04, seed) for seed in range(60)]
    assert sum(answer != seed % 16 for seed, (answer, _) in enumerate(answers)) <= 1


def test_visits_gather_next_to_the_culprit() -> None:
    near = total = 0
    for seed in range(30):
        _, visits = simulated(21, 32, 0.04, 0.04, seed)
        near += sum(count for place, count in visits.items() if abs(place - 20.5) <= 2)
        total += sum(visits.values())
    assert near > total / 2
    assert total / 30 < 32  # fewer visits than commits


def test_a_check_outweighs_any_pairs_and_a_skip_leaves_the_rest() -> None:
    commits = list("abcd")
    told = [Probe(commit="b", bad=False), Probe(commit="c", bad=True)]
    assert suspicions(commits, told, None)[2] > 0.999
    assert next_place(commits, told, None, 0.001) is None
    skipped = suspicions(commits, [Probe(commit="b", skipped="why")], None)
    assert sorted(skipped) == [0, 2, 3]
    assert sum(skipped.values()) == pytest.approx(1.0)

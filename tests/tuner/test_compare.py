"""The gate says slower, faster, same or undecided, and what changed; it audits itself and survives kills. Scripted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from tests.tuner.scripted import (
    BALLAST,
    DEFECTS,
    Clock,
    LocalWorker,
    Repository,
    append,
    cost,
    deaths,
    one_thread,
    question,
    replace,
    scenario,
)
from tuner import compare_report
from tuner.compare import Comparing
from tuner.compare_record import (
    CompareFolder,
    Facts,
    Lane,
    Launched,
    Line,
    LineFile,
    Measured,
    Pair,
    Question,
    Scenario,
    scenarios_of,
)
from tuner.hiring import DeviceError, hire_for
from tuner.judge import CompareResult, judge
from tuner.record import RecordError
from tuner.sweep import SweepError, read_sweep
from tuner.trees import Tree, TreeError, open_trees


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Repository]:
    with one_thread():
        yield Repository(tmp_path_factory.mktemp("compare") / "repository")


def run(
    repository: Repository, out: Path, edit: Any, *scenarios: Scenario, clock: Clock | None = None, **settings: Any
) -> CompareResult:
    """Compare the first commit with one more that ``edit`` makes."""
    repository.git("checkout", "--quiet", "--detach", repository.first)
    head = repository.commit("a change", edit)
    with open_trees(repository.first, head, repository=repository.folder) as (base_tree, head_tree):
        asked = question(base_tree, head_tree, *scenarios, **settings)
        return Comparing(asked, out=out, hire=LocalWorker, clock=clock or Clock()).run()


def test_the_same_code_is_the_same_and_the_audit_passes(repository: Repository, tmp_path: Path) -> None:
    result = run(repository, tmp_path, None, launches=3)
    found = result.scenarios[0]
    assert (found.verdict, result.verdict, result.exit_code) == ("same", "passed", 0)
    assert result.audit.passed
    assert result.audit.lanes["slow_4"].verdict == "slower"
    assert not result.audit.alarm
    assert result.audit.smallest_effect is not None
    assert result.launches == 3
    assert not found.changes


@pytest.mark.parametrize(
    ("edit", "verdict", "kind", "code"),
    [
        (cost(kernel=1.04), "slower", "kernel slower", 3),
        (cost(dispatch=1.04), "slower", "dispatch dearer", 3),
        (cost(kernel=0.95), "faster", None, 0),
        (cost(kernel=1.002), "same", None, 0),
    ],
)
def test_a_change_of_time_gets_its_verdict_and_its_cause(
    repository: Repository, tmp_path: Path, edit: Any, verdict: str, kind: str | None, code: int
) -> None:
    result = run(repository, tmp_path, edit)
    found = result.scenarios[0]
    assert found.verdict == verdict, found.reason
    assert [change.kind for change in found.changes] == ([kind] if kind else [])
    assert result.exit_code == code


def test_a_worse_choice_is_told_apart_from_a_slower_kernel(repository: Repository, tmp_path: Path) -> None:
    def another_default(nsa: Path) -> None:
        replace("defaults.py", ('("cpu", "decode"): ("gather",)', '("cpu", "decode"): ("packed",)'))(nsa)
        cost(kernel=1.06)(nsa)

    found = run(repository, tmp_path, another_default).scenarios[0]
    assert found.verdict == "slower"
    assert [change.kind for change in found.changes] == ["choice worse"]
    assert "gather" in found.changes[0].detail
    assert "packed" in found.changes[0].detail


BRANCHES = {
    "window": ({"window": 20}, "sdpa_window"),
    "compression": ({"kernel_size": 16, "kernel_stride": 8}, "sdpa_compressed"),
}


def branch_scenario(operation: str, path: str = "auto") -> Scenario:
    ranged = {"form": "ranges", "block_size": 0, "topk": 1, "operation": operation, **BRANCHES[operation][0]}
    posed = msgspec.structs.replace(scenario(mode="prefill").problem, **ranged)
    return Scenario(name=f"{operation} {path}", problem=posed, pattern="fixed", path=path)


@pytest.mark.parametrize("operation", BRANCHES)
def test_the_branches_are_compared_as_what_they_are(repository: Repository, tmp_path: Path, operation: str) -> None:
    path = BRANCHES[operation][1]
    both = branch_scenario(operation), branch_scenario(operation, path)
    result = run(repository, tmp_path, cost(kernel=1.06), *both)
    assert [found.verdict for found in result.scenarios] == ["slower", "slower"]
    assert all(path in found.changes[0].detail for found in result.scenarios)


def test_a_side_that_knows_no_branches_is_unsupported_there(repository: Repository, tmp_path: Path) -> None:
    older = replace("problem.py", ("    operation: Operation =", "    op: Operation ="), ("self.operation", "self.op"))
    result = run(repository, tmp_path, older, branch_scenario("window"))
    assert (result.scenarios[0].verdict, result.scenarios[0].reason) == (
        "unsupported", "this side dispatches selection alone, not window",
    )  # fmt: skip


def test_a_named_path_is_a_scenario_of_its_own(repository: Repository, tmp_path: Path) -> None:
    result = run(repository, tmp_path, cost(kernel=1.05), scenario("varlen"))
    assert [change.kind for change in result.scenarios[0].changes] == ["kernel slower"]
    assert "varlen" in result.scenarios[0].changes[0].detail


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_of_the_drill_gets_its_outcome_and_no_time(repository: Repository, tmp_path: Path, name: str) -> None:
    edit, path, mode, outcome, kind = DEFECTS[name]
    result = run(repository, tmp_path, edit, scenario(path, mode))
    found = result.scenarios[0]
    assert (found.verdict, [change.kind for change in found.changes]) == (outcome, [kind])
    assert found.reason
    assert found.comparison is None
    assert (result.verdict, result.exit_code, result.rounds) == ("regressed", 3, 0)


def test_dispatch_that_falls_back_is_caught_through_auto(repository: Repository, tmp_path: Path) -> None:
    edit = replace(
        "dispatch.py",
        ("from .planning import", "from .paths import PATHS\nfrom .planning import"),
        ("out = attempt.function(", "out = PATHS['packed'].function()("),
        ("workspace=workspace, **candidate.parameters", "workspace=workspace"),
    )
    found = run(repository, tmp_path, edit).scenarios[0]
    assert (found.verdict, found.reason.split(" (")[0]) == ("fell_back", "the table chooses gather, packed ran")


def test_more_memory_is_a_regression_of_its_own(repository: Repository, tmp_path: Path) -> None:
    result = run(repository, tmp_path, BALLAST)
    found = result.scenarios[0]
    assert found.verdict == "same"
    assert [change.kind for change in found.changes] == ["more memory"]
    assert result.exit_code == 3


def test_more_growths_are_a_regression_of_their_own(repository: Repository, tmp_path: Path) -> None:
    take = '    if workspace: workspace.take("more", 1, 1, dtype=query.dtype, device=query.device)\n'
    result = run(repository, tmp_path, replace("paths/gather.py", ("    parts = []\n", "    parts = []\n" + take)))
    assert [change.kind for change in result.scenarios[0].changes] == ["more growths"]
    assert result.exit_code == 3


def test_a_base_that_is_wrong_leaves_nothing_to_compare_with(repository: Repository, tmp_path: Path) -> None:
    repository.git("checkout", "--quiet", "--detach", repository.first)
    broken = repository.commit("broken", DEFECTS["4 first key only"][0])
    with open_trees(broken, repository.first, repository=repository.folder) as (base, head):
        asked = question(base, head, scenario("gather"))
        result = Comparing(asked, out=tmp_path, hire=LocalWorker, clock=Clock()).run()
    assert (result.scenarios[0].verdict, result.exit_code) == ("undecided", 4)
    assert "base is wrong" in result.scenarios[0].reason


def test_scenarios_share_alpha(repository: Repository, tmp_path: Path) -> None:
    result = run(repository, tmp_path, cost(kernel=1.04), scenario("auto"), scenario("varlen"), scenario("packed"))
    assert {found.comparison.scenarios for found in result.scenarios if found.comparison} == {3}
    assert all(found.comparison.e_value >= 3 / 0.001 for found in result.scenarios if found.comparison)
    assert result.rounds >= max(found.comparison.pairs for found in result.scenarios if found.comparison)
    assert {lane.pairs for lane in result.audit.lanes.values()} == {result.rounds}


def test_a_biased_machine_alarms_and_no_verdict_stands(repository: Repository, tmp_path: Path) -> None:
    result = run(repository, tmp_path, None, watch="tests.tuner.scripted:BiasedWatch")
    assert result.audit.alarm
    found = result.scenarios[0]
    assert (found.verdict, result.exit_code) == ("undecided", 4)
    assert "A/A lane alarms" in found.reason
    assert "machine changed" in [change.kind for change in found.changes]


def test_a_gate_that_cannot_see_says_undecided_never_green(repository: Repository, tmp_path: Path) -> None:
    clock = Clock(step_s=1.0)
    result = run(repository, tmp_path, cost(1.04), clock=clock, budget_s=20.0, watch="tests.tuner.scripted:NoisyWatch")
    assert (result.verdict, result.exit_code) == ("undecided", 4)
    assert "4 % lane was missed" in result.scenarios[0].reason


def test_a_budget_too_short_for_three_launches_is_undecided(repository: Repository, tmp_path: Path) -> None:
    result = run(repository, tmp_path, None, clock=Clock(step_s=2.0), budget_s=20.0, launches=3)
    assert result.launches < 3
    assert result.exit_code == 4
    assert "launches: more time is needed" in result.scenarios[0].reason


def test_each_launch_loads_the_sides_in_an_order_of_its_own(repository: Repository, tmp_path: Path) -> None:
    result = run(repository, tmp_path, None, launches=5)
    lines = CompareFolder(Path(result.run)).lines.read()
    orders = [line.order for line in lines if isinstance(line, Launched)]
    assert len(orders) == 5
    assert len(set(orders)) > 1
    pairs = [pair for line in lines if isinstance(line, Measured) for pair in line.pairs]
    first = sum(pair.base_first for pair in pairs) / len(pairs)
    assert 0.3 < first < 0.7


def test_launches_that_contradict_a_verdict_make_it_undecided() -> None:
    heads = [head_line(launch, ratio) for launch, ratio in enumerate((1.2, 1.2, 0.99))]
    found = judge(bare_question(), [*audit_lines(launches=3, rounds=30), *heads]).scenarios[0]
    assert found.comparison is not None
    assert (found.comparison.verdict, found.verdict) == ("slower", "undecided")
    assert "launches disagree" in found.reason


def offset_lines(lane: Lane, ratios: Sequence[float], rounds: int = 30) -> list[Measured]:
    """Pairs of a lane, each launch about a ratio of its own."""
    return [
        Measured(
            launch=launch,
            pairs=[
                Pair(scenario().name, lane, turn, True, 100.0, 100.0 * ratio * math.exp(0.002 * (-1) ** turn))
                for turn in range(rounds)
            ],
        )
        for launch, ratio in enumerate(ratios)
    ]


@pytest.mark.parametrize(
    ("itself", "verdict"), [((1.001, 0.998, 1.002), "slower"), ((1.001, 0.965, 1.03), "undecided")]
)
def test_a_verdict_must_exceed_what_launches_read_of_base_against_itself(
    itself: tuple[float, ...], verdict: str
) -> None:
    audit = [line for line in audit_lines(launches=3, rounds=30) if not isinstance(line, Measured)]
    lanes: list[tuple[Lane, Sequence[float]]] = [
        ("aa", itself), ("slow_4", (1.04,) * 3), ("slow_1", (1.01,) * 3), ("head", (1.02, 1.025, 1.03)),
    ]  # fmt: skip
    result = judge(bare_question(), [*audit, *(line for lane, ratios in lanes for line in offset_lines(lane, ratios))])
    found = result.scenarios[0]
    assert found.comparison is not None
    assert (found.comparison.verdict, found.verdict) == ("slower", verdict)
    if verdict == "undecided":
        assert "one of base against itself is off by 3.6%" in found.reason
        assert "launch 2 alone reads base against itself as 0.965" in result.audit.reason


# --- resuming ---


def test_a_killed_run_goes_on_where_it_stopped(repository: Repository, tmp_path: Path) -> None:
    with open_trees(repository.first, repository.first, repository=repository.folder) as (base, head):
        asked = question(base, head)
        killed = Comparing(asked, out=tmp_path, hire=LocalWorker, clock=Clock())
        killed.write = interrupting(killed.write, after=4)  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            killed.run()
        before = CompareFolder(killed.folder.path).lines.read()
        assert len(before) == 4
        result = Comparing(asked, out=tmp_path, hire=LocalWorker, clock=Clock()).run()
    assert Path(result.run) == killed.folder.path
    after = CompareFolder(killed.folder.path).lines.read()
    assert after[: len(before)] == before
    assert result.verdict == "passed"
    rounds = [pair.round for line in after if isinstance(line, Measured) for pair in line.pairs if pair.lane == "head"]
    assert rounds == sorted(set(rounds))


def interrupting(write: Any, after: int) -> Any:
    """``write`` until that many lines are out; then the tool is killed."""
    lines = iter(range(after))

    def wrapped(line: Line) -> None:
        if next(lines, None) is None:
            raise KeyboardInterrupt
        write(line)

    return wrapped


def test_what_another_version_left_unfinished_is_left_alone(repository: Repository, tmp_path: Path) -> None:
    with open_trees(repository.first, repository.first, repository=repository.folder) as (base, head):
        asked = question(base, head)
        first = Comparing(asked, out=tmp_path, hire=LocalWorker, clock=Clock()).run()
        folder = CompareFolder(Path(first.run))
        folder.done_file.unlink()
        text = folder.environment_file.read_text()
        folder.environment_file.write_text(text.replace('"budget_s": 60.0', '"budget_s": "what was this"'))
        second = Comparing(asked, out=tmp_path, hire=LocalWorker, clock=Clock()).run()
        CompareFolder(Path(second.run)).done_file.unlink()
        third = Comparing(asked, out=tmp_path, hire=LocalWorker, clock=Clock(), tool_commit="of other samples").run()
    assert len({first.run, second.run, third.run}) == 3
    assert second.verdict == third.verdict == "passed"


@pytest.mark.parametrize("ask", [4, 8, 9, 11])
def test_a_killed_worker_costs_a_launch_and_no_verdict(repository: Repository, tmp_path: Path, ask: int) -> None:
    with deaths(ask):
        result = run(repository, tmp_path, None)
    assert result.verdict == "passed", result.scenarios[0].reason


def test_a_scenario_that_kills_its_worker_twice_is_a_crash(repository: Repository, tmp_path: Path) -> None:
    with deaths(9, 11):
        result = run(repository, tmp_path, None)
    assert result.scenarios[0].verdict == "oom", compare_report.as_text(result)
    assert "while timed" in result.scenarios[0].reason


def test_a_half_written_line_is_cut_off_and_the_rest_kept(tmp_path: Path) -> None:
    file: LineFile[Facts] = LineFile(tmp_path / "lines.jsonl", Facts)
    file.append(Facts(outcome="ok"), Facts(outcome="wrong", reason="why"))
    with file.path.open("ab") as opened:
        opened.write(b'{"outcome":"ok","rea')
    assert [facts.outcome for facts in file.read()] == ["ok", "wrong"]
    file.append(Facts(outcome="crash"))
    assert [facts.outcome for facts in file.read()] == ["ok", "wrong", "crash"]
    file.path.write_bytes(b'{"outcome":"nonsense"}\n')
    with pytest.raises(RecordError, match=r"lines\.jsonl:1"):
        file.read()


def test_a_full_disk_ends_the_run_and_what_is_written_stays_whole(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_trees(repository.first, repository.first, repository=repository.folder) as (base, head):
        asked = question(base, head)
        comparing = Comparing(asked, out=tmp_path, hire=LocalWorker, clock=Clock())
        real, calls = LineFile.append, iter(range(3))

        def filling(self: Any, *lines: Any) -> None:
            if next(calls, None) is None:
                with self.path.open("ab") as opened:
                    opened.write(msgspec.json.encode(lines[0])[:20])
                raise OSError(28, "No space left on device")
            real(self, *lines)

        monkeypatch.setattr(LineFile, "append", filling)
        with pytest.raises(OSError, match="No space left"):
            comparing.run()
        monkeypatch.undo()
        assert Comparing(asked, out=tmp_path, hire=LocalWorker, clock=Clock()).run().verdict == "passed"


@pytest.mark.slow
def test_real_workers_measure_with_the_scripted_clock_and_one_may_be_killed(
    repository: Repository, tmp_path: Path
) -> None:
    with open_trees(repository.first, repository.first, repository=repository.folder) as (base, head):
        asked = question(base, head, launches=3, budget_s=600.0)
        hire, hired = hire_for(asked), list[Any]()

        def counted() -> Any:
            hired.append(hire())
            if len(hired) == 3:  # the first launch
                hired[-1].process.kill()
            return hired[-1]

        result = Comparing(asked, out=tmp_path, hire=counted).run()
    assert result.verdict == "passed"
    assert len(hired) == 6
    assert not any(worker.process.is_alive() for worker in hired)


# --- what cannot be compared ---


def test_a_head_that_does_not_import_is_an_error_not_a_verdict(repository: Repository, tmp_path: Path) -> None:
    with pytest.raises(TreeError, match=r"does not import: .*no_such_module"):
        run(repository, tmp_path, append("__init__.py", "\nimport no_such_module\n"))


def test_a_dirty_tree_is_noted_in_the_result(repository: Repository, tmp_path: Path) -> None:
    repository.git("checkout", "--quiet", "--detach", repository.first)
    append("errors.py", "# not committed\n")(repository.folder / "nsa")
    with open_trees("HEAD", None, repository=repository.folder) as (base, head):
        result = Comparing(question(base, head), out=tmp_path, hire=LocalWorker, clock=Clock()).run()
    repository.git("checkout", "--", "nsa")
    assert any("uncommitted changes" in note for note in result.notes)


def test_pairs_from_two_devices_are_never_judged_together() -> None:
    lines = audit_lines(launches=3, rounds=30)
    lines[0] = Launched(number=0, order=("base", "twin", "head"), device="another")
    found = judge(bare_question(), [*lines, *(head_line(launch, 1.2) for launch in range(3))])
    assert (found.scenarios[0].verdict, found.exit_code) == ("undecided", 4)
    assert "two devices" in found.scenarios[0].reason


def test_a_device_that_is_not_there_is_an_error(repository: Repository, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with open_trees(repository.first, repository.first, repository=repository.folder) as (base, head):
        asked = question(base, head, device="cuda")
        with pytest.raises(DeviceError, match="use --device cpu"):
            Comparing(asked, out=tmp_path, hire=hire_for(asked)).run()


@pytest.mark.parametrize(
    ("settings", "words"), [({"effect": 0.05}, "4 % lane"), ({"alpha": 0.0}, "rate"), ({"scenarios": ()}, "nothing")]
)
def test_a_question_without_an_answer_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SweepError, match=words):
        msgspec.structs.replace(bare_question(), **settings)


# --- the PR31 figures ---

PR31 = {512: (5.75, 6.00), 1024: (5.98, 6.29), 2048: (6.46, 6.71)}


def test_the_figures_of_pr31_are_undecided_one_run_per_arm() -> None:
    names = {context: f"decode T={context} varlen" for context in PR31}
    scenarios = tuple(msgspec.structs.replace(scenario("varlen"), name=name) for name in names.values())
    pairs = [Pair(names[context], "head", 0, True, off * 1e3, on * 1e3) for context, (off, on) in PR31.items()]
    result = judge(msgspec.structs.replace(bare_question(), scenarios=scenarios), [Measured(launch=0, pairs=pairs)])
    assert (result.verdict, result.exit_code) == ("undecided", 4)
    for found, (off, on) in zip(result.scenarios, PR31.values(), strict=True):
        assert found.verdict == "undecided"
        assert found.reason.startswith(f"one run per arm: {on / off - 1:+.1%}")
        assert found.comparison is not None
        assert found.comparison.spread_needed is not None
        assert 0.005 < found.comparison.spread_needed < 0.02  # the team's runs spread by 1.9 to 3.8 %


# --- what is shown ---


def test_the_report_says_all_in_three_forms(repository: Repository, tmp_path: Path) -> None:
    result = run(repository, tmp_path, cost(kernel=1.04))
    text, markdown = compare_report.as_text(result), compare_report.as_markdown(result)
    decoded = msgspec.json.decode(compare_report.as_json(result))
    assert decoded["exit_code"] == compare_report.exit_code(result) == 3
    assert decoded["scenarios"][0]["verdict"] == "slower"
    assert msgspec.json.decode(compare_report.as_json(result), type=CompareResult) == result
    for shown in (text, markdown):
        assert "REGRESSED" in shown
        assert "kernel slower" in shown
        assert "base against itself" in shown
        assert "smallest slowdown that this run finds" in shown
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({row.replace("\\|", "").count("|") for row in rows}) == 1


def test_scenarios_are_what_a_user_gets_and_the_paths_that_a_sweep_names() -> None:
    found = scenarios_of(read_sweep("quick", ["contexts=512"]), "cpu")
    assert [each.name for each in found] == ["decode T=512 auto", "prefill T=512 auto"]
    named = scenarios_of(read_sweep("quick", ["contexts=512", "modes=decode"]), "cpu", ("auto", "varlen"))
    assert [each.path for each in named] == ["auto", "varlen"]
    assert {each.path for each in scenarios_of(read_sweep("reserve"), "cpu")} == {"auto", "packed", "varlen"}


def bare_question() -> Question:
    """One scenario, trees that nobody opens."""
    tree = Tree(asked="x", folder="/nowhere", digest="0")
    return question(tree, msgspec.structs.replace(tree, digest="1"))


def audit_lines(*, launches: int, rounds: int) -> list[Line]:
    """Launches whose audit lanes are as they should be."""
    name, lines = scenario().name, list[Line]()
    for number in range(launches):
        lines.append(Launched(number=number, order=("base", "twin", "head"), device="cpu"))
    for number in range(launches):
        pairs = [
            Pair(name, lane, number * rounds + turn, True, 100.0, 100.0 * share * math.exp(0.002 * (-1) ** turn))
            for turn in range(rounds)
            for lane, share in (("aa", 1.0), ("slow_1", 1.01), ("slow_4", 1.04))
        ]
        lines.append(Measured(launch=number, pairs=pairs))
    return lines


def head_line(launch: int, ratio: float) -> Measured:
    """Thirty pairs of head about a ratio."""
    times = [100.0 * ratio * math.exp(0.002 * (-1) ** turn) for turn in range(30)]
    pairs = [Pair(scenario().name, "head", turn, True, 100.0, us) for turn, us in enumerate(times)]
    return Measured(launch=launch, pairs=pairs)

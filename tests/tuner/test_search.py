"""Claims about a whole sweep: it runs end to end, a kill loses what was being measured, broken paths stop nothing."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import optuna
import pytest
import torch
from optuna.storages.journal import JournalFileBackend

from nsa.device import device_identity, software_identity
from nsa.paths import PATHS, Candidate, Parameter
from tests.tuner import misbehaving
from tuner.measure import CALLS_PER_GRAPH
from tuner.record import Environment, Record, RunFolder, Sample, by_problem, resume_or_start
from tuner.report import compared_with
from tuner.search import Listener, Search, fewest_pairs
from tuner.space import EFFORTS, narrowed, reserve_rungs, space_of
from tuner.sweep import families, read_sweep
from tuner.table import entries_of

ROOT = Path(__file__).parents[2]
QUICK = EFFORTS["quick"]
LISTED = ("gather", "dense", "varlen", "packed")
BROKEN = {
    "exits": "crash",
    "raises": "crash",
    "exits_while_timed": "crash",
    "runs_out_of_memory": "oom",
    "off_by_a_percent": "wrong",
    "runs_packed": "fell_back",
    "needs_a_gpu": "unsupported",
}
SWEEP = """
name = "tiny"
description = "two contexts in decode"
budget_s = 4.0
paths = [{paths}]
[axes]
modes = ["decode"]
contexts = [32, 64]
heads = [2]
kv_heads = [1]
head_dim = [8]
block_size = [16]
topk = [2]
[ladders.packed]
bucket_rounding = [16]
"""

RUN_UNTIL_KILLED = """
import os, signal, sys
from pathlib import Path
from tests.tuner.test_search import search
from tuner.search import Listener

class Killer(Listener):
    def recorded(self, record):
        if record.stage == "shootout":
            os.kill(os.getpid(), signal.SIGKILL)

search(Path(sys.argv[1]), Path(sys.argv[2]), Killer()).run()
"""


def written(folder: Path, paths: tuple[str, ...]) -> Path:
    """The sweep's file."""
    file = folder / "tiny.toml"
    file.write_text(SWEEP.replace("{paths}", ", ".join(f'"{name}"' for name in paths)))
    return file


class Ear(Listener):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.word, self.resumed = "", 0
        self.told: list[tuple[str, float]] = []
        self.records: list[Record] = []
        self.done: list[float] = []

    def started(self, environment: Environment, problems: int, resumed: int, word: str) -> None:
        self.environment, self.problems, self.resumed, self.word = environment, problems, resumed, word

    def working(self, what: str, done: float, seconds_left: float) -> None:
        self.done.append(done)
        self.told.append((what, seconds_left))

    def recorded(self, record: Record) -> None:
        self.records.append(record)


class Swept(msgspec.Struct):
    """A sweep that reached its end, and what its file held when it had been killed."""

    folder: RunFolder
    records: list[Record]
    heard: Any
    before: bytes = b""
    killed: str = ""
    exit_code: int = 0


def search(file: Path, out: Path, ear: Listener | None = None, budget_s: float | None = None, **changes: Any) -> Search:
    """A search over the real paths unless told, with a short self-test: on busy cores the whole one takes 20 s."""
    options = {"device": "cpu", "commit": "abc", "effort": QUICK, "paths": PATHS, **changes}
    sweep = read_sweep(str(file))
    if budget_s:
        sweep = msgspec.structs.replace(sweep, budget_s=budget_s)
    found = Search(sweep, out=out, listener=ear, **options)
    ask = found.session.ask
    found.session.ask = lambda verb, argument=None: ask(verb, 3 if verb == "self_test" else argument)  # type: ignore[method-assign]
    return found


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """A sweep killed after its first shoot-out record, with a line half written, and run again for a second longer."""
    place = tmp_path_factory.mktemp("resumed")
    file, out = written(place, LISTED), place / "out"
    command = [sys.executable, "-c", RUN_UNTIL_KILLED, str(file), str(out)]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    (trials,) = out.glob("records/*/tiny/*/trials.jsonl")
    before = trials.read_bytes()
    trials.write_bytes(before + b'{"run_id":"2026')
    ear = Ear()
    folder = search(file, out, ear, budget_s=5.0).run()
    records, word = folder.records()
    assert word == ""
    return Swept(folder, records, ear, before, trials.parent.name, killed.returncode)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """A sweep over twins that misbehave, beside the default and a right path."""
    place = tmp_path_factory.mktemp("broken")
    file, ear = written(place, ("gather", "dense", *BROKEN)), Ear()
    folder = search(
        file, place / "out", ear, paths=misbehaving.PATHS, registry=misbehaving.REGISTRY
    ).run()  # fmt: skip
    return Swept(folder, folder.records()[0], ear)


def seen(records: list[Record], stage: str) -> set[tuple[Any, str]]:
    """(context, path) of a stage."""
    return {(record.problem["T"], record.path) for record in records if record.stage == stage}


# A kill


def test_a_killed_sweep_goes_on_in_the_same_run_under_any_budget_and_keeps_every_line(resumed: Swept) -> None:
    assert resumed.exit_code == -9
    assert resumed.before.endswith(b"\n")
    assert resumed.folder.path.name == resumed.killed
    assert len(list(resumed.folder.path.parent.iterdir())) == 1
    assert resumed.folder.trials_file.read_bytes().startswith(resumed.before)
    assert resumed.folder.complete


def test_what_was_resumed_and_what_was_dropped_is_told(resumed: Swept) -> None:
    assert resumed.heard.resumed == len(resumed.before.splitlines())
    assert resumed.heard.word == "dropped a half-written line of 15 bytes"
    assert resumed.heard.records == resumed.records[resumed.heard.resumed :]


def test_a_shoot_out_that_was_measured_is_not_measured_again(resumed: Swept) -> None:
    shootouts = [(record.problem["T"], record.candidate) for record in resumed.records if record.stage == "shootout"]
    assert len(shootouts) == len(set(shootouts))
    before = {
        (record.problem["T"]) for record in resumed.records[: resumed.heard.resumed] if record.stage == "shootout"
    }
    assert before == {32}
    assert {T for T, _ in shootouts} == {32, 64}


def test_a_finalist_that_no_shoot_out_has_met_gets_one(resumed: Swept, tmp_path: Path) -> None:
    """As where more time let a run that went on screen what it had left out."""
    place = resumed.folder.path.parents[4]
    file, out = written(tmp_path, LISTED), tmp_path / "out"
    shutil.copytree(place / "out", out)
    (trials,) = out.glob("records/*/tiny/*/trials.jsonl")
    lines = trials.read_text().splitlines()
    late = [line for line in lines if '"stage":"shootout"' in line and '"baseline":false' in line]
    trials.write_text("".join(f"{line}\n" for line in lines if line not in late))
    RunFolder(trials.parent).done_file.unlink()
    again, _ = search(file, out).run().records()
    assert late
    for line in late:
        lost = msgspec.json.decode(line, type=Record)
        assert any(
            (one.stage, one.candidate, one.problem) == ("shootout", lost.candidate, lost.problem) for one in again
        )
    base = [one for one in again if one.stage == "shootout" and one.baseline]
    assert len(base) == 2 * len({str(one.problem) for one in base})
    rounds = [sample.round for one in base for sample in one.samples if one.problem["T"] == 32]
    assert len(rounds) == len(set(rounds))


def test_the_ledger_survives_the_kill_without_trials_left_running(resumed: Swept) -> None:
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(resumed.folder.path / "optuna.journal")))
    (name,) = optuna.get_all_study_names(storage)
    states = {trial.state.name for trial in optuna.load_study(study_name=name, storage=storage).get_trials()}
    assert "COMPLETE" in states
    assert not states & {"RUNNING", "WAITING"}


def opened(sweep: Search) -> tuple[RunFolder, str]:
    """The folder that a search would write to, and the word about it."""
    environment = sweep.environment(device_identity("cpu"), software_identity(), {}, {})
    return resume_or_start(sweep.out / "records", environment)


@pytest.mark.parametrize(
    "change", [{"commit": "def"}, {"effort": EFFORTS["full"]}, {"registry": misbehaving.REGISTRY}, {}], ids=str
)
def test_another_sweep_or_a_finished_one_starts_a_run_of_its_own(
    resumed: Swept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    if change:
        monkeypatch.setattr(RunFolder, "complete", False)
    next_one = search(written(tmp_path, LISTED), resumed.folder.path.parents[3], **change)
    monkeypatch.setattr(RunFolder, "start", lambda *_: None)
    folder, word = opened(next_one)
    assert folder.path != resumed.folder.path
    assert word == ""


def test_a_run_timed_by_graphs_of_another_number_of_calls_is_not_gone_on_with(
    resumed: Swept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = resumed.folder.environment()
    assert before.sweep["calls_per_graph"] == CALLS_PER_GRAPH
    monkeypatch.setattr(RunFolder, "complete", False)
    old = {name: value for name, value in before.sweep.items() if name != "calls_per_graph"}
    monkeypatch.setattr(RunFolder, "environment", lambda _: msgspec.structs.replace(before, sweep=old))
    monkeypatch.setattr(RunFolder, "start", lambda *_: None)
    next_one = search(written(tmp_path, LISTED), resumed.folder.path.parents[3])
    folder, _ = opened(next_one)
    assert folder.path != resumed.folder.path


def test_the_same_sweep_unfinished_is_gone_on_with(
    resumed: Swept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunFolder, "complete", False)
    same = search(written(tmp_path, LISTED), resumed.folder.path.parents[3])
    assert opened(same)[0].path == resumed.folder.path


# End to end


def test_every_listed_path_has_records_on_every_problem(resumed: Swept) -> None:
    assert seen(resumed.records, "screen") == {(T, name) for T in (32, 64) for name in LISTED}
    assert {record.outcome for record in resumed.records} == {"ok"}


def test_every_problem_has_a_shoot_out_with_its_default_and_fresh_shared_rounds(resumed: Swept) -> None:
    shootouts = [record for record in resumed.records if record.stage == "shootout"]
    for group in by_problem(shootouts).values():
        assert [record.path for record in group if record.baseline] == ["gather"]
        assert len(group) >= 2
        rounds = [[sample.round for sample in record.samples] for record in group]
        assert all(numbers == rounds[0] for numbers in rounds)
        assert len(rounds[0]) == len(set(rounds[0])) >= fewest_pairs(len(group)) - 4
        for record in group:
            assert {sample.position for sample in record.samples} <= set(range(len(group)))


def test_what_has_samples_was_proven_first(resumed: Swept) -> None:
    for record in resumed.records:
        assert record.oracle_error is not None
        assert record.oracle_bound is not None
        assert record.oracle_error <= record.oracle_bound
        assert record.kernels
        assert record.peak_bytes
        assert record.calls_per_sample or record.sequence
        assert min(sample.us for sample in (*record.samples, *record.sequence)) > 0


def test_reserves_are_measured_by_call_sequence_at_one_context(resumed: Swept) -> None:
    reserves = [record for record in resumed.records if record.stage == "reserve"]
    assert {record.path for record in reserves} == {"packed", "varlen"}
    assert {record.problem["T"] for record in reserves} == {32}
    for record in reserves:
        assert record.samples == []
        assert [sample.step for sample in record.sequence] == list(range(16))
        assert record.workspace_bytes
        assert record.growths


def test_every_problem_gets_a_table_entry_from_this_run(resumed: Swept) -> None:
    entries = entries_of(resumed.records)
    assert [entry.T for entry in entries] == [32, 64]
    assert {entry.run_id for entry in entries} == {resumed.folder.path.name}


def test_the_environment_tells_where_and_how(resumed: Swept) -> None:
    environment = resumed.folder.environment()
    assert environment.device["slug"] == device_identity("cpu").slug
    assert environment.software["torch"] == torch.__version__
    assert (environment.run_id, environment.commit) == (resumed.folder.path.name, "abc")
    assert (environment.sweep["name"], environment.sweep["effort"]) == ("tiny", "quick")
    assert {"1.00 reads", "1.01 low", "1.04 high"} <= set(environment.timer)


def test_progress_goes_from_nothing_to_everything(resumed: Swept) -> None:
    assert resumed.heard.environment == resumed.folder.environment()
    assert resumed.heard.problems == 2
    assert {32, 64} == {T for T in (32, 64) for what, _ in resumed.heard.told if f"T={T}:" in what}
    assert all(0.0 <= left <= 4.0 for _, left in resumed.heard.told)
    assert resumed.heard.done == sorted(resumed.heard.done)
    assert 0.0 <= resumed.heard.done[0] <= resumed.heard.done[-1] <= 1.0


def test_where_time_is_out_a_path_is_measured_by_what_was_fastest_at_the_nearest_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path, ("gather", "packed"))
    file.write_text(
        file.read_text().replace("[32, 64]", "[32, 64, 256]").replace("rounding = [16]", "rounding = [64, 16]")
    )
    sweep = search(file, tmp_path / "out")
    (family,) = sweep.families
    ratios = {32: {64: 0.7, 16: 0.5}, 64: {64: 0.6}}  # at 64 time was out
    asked: dict[int, list[int]] = {}

    def prove(wanted: list[Candidate], _: float, *, thorough: bool, begun: Any) -> list[Candidate]:
        problem = family.problems[len(asked)]
        asked[problem.T] = [int(one.parameters["bucket_rounding"]) for one in wanted if one.path == "packed"]
        timed = {0: 1.0, **ratios.get(problem.T, {})}
        for one in wanted:
            rounding = int(one.parameters.get("bucket_rounding", 0))
            if rounding not in timed:
                continue
            sweep.records.append(
                Record(
                    run_id="r", commit="c", date="d", stage="screen", problem=msgspec.to_builtins(problem),
                    pattern=family.pattern, path=one.path, parameters=one.parameters, baseline=one == wanted[0],
                    outcome="ok", samples=[Sample(0, 0, 100.0 * timed[rounding])],
                )
            )  # fmt: skip
        return []

    monkeypatch.setattr(sweep.session, "prove", prove)
    monkeypatch.setattr(Search, "shoot_out", lambda *_: None)
    sweep.folder, sweep.began = RunFolder(tmp_path / "run"), 0.0
    sweep.folder.path.mkdir()
    sweep.run_family(family)
    assert asked == {32: [64, 16], 64: [16, 64], 256: [64, 16]}


# Paths that misbehave


def test_broken_paths_do_not_stop_a_sweep_and_have_their_outcomes(broken: Swept) -> None:
    assert broken.folder.complete
    for name, outcome in BROKEN.items():
        found = [record for record in broken.records if record.path == name]
        assert {record.outcome for record in found} == {outcome}, name
        assert all(record.reason for record in found)


def test_broken_paths_never_have_a_time(broken: Swept) -> None:
    for record in broken.records:
        if record.outcome != "ok":
            assert record.samples == []
            assert record.sequence == []
            assert record.calls_per_sample == 0


def test_right_paths_are_measured_beside_broken_ones(broken: Swept) -> None:
    good = [record for record in broken.records if record.outcome == "ok"]
    for T in (32, 64):
        assert {path for context, path in seen(good, "screen") if context == T} == {"gather", "dense"}
        assert {path for context, path in seen(good, "shootout") if context == T} == {"gather", "dense"}
    assert [entry.T for entry in entries_of(broken.records)] == [32, 64]


def test_who_failed_at_one_context_is_not_tried_at_the_next(broken: Swept) -> None:
    for name in set(BROKEN) - {"needs_a_gpu"}:
        assert {record.problem["T"] for record in broken.records if record.path == name} == {32}, name
    assert {record.problem["T"] for record in broken.records if record.path == "needs_a_gpu"} == {32, 64}


@pytest.mark.parametrize(("name", "outcome"), [("WRONG_DEFAULT", "wrong"), ("FAILING_DEFAULT", "oom")])
def test_where_the_default_fails_a_right_path_stands_in_and_the_table_takes_a_right_one(
    name: str, outcome: str, tmp_path: Path
) -> None:
    file = written(tmp_path, ("gather", "packed", "dense"))
    registry = f"{misbehaving.__name__}:{name}"
    folder = search(file, tmp_path / "out", paths=getattr(misbehaving, name), registry=registry).run()
    records, _ = folder.records()
    assert {record.outcome for record in records if record.path == "gather" and record.stage == "screen"} == {outcome}
    for T in (32, 64):
        mine = [record for record in records if record.problem["T"] == T]
        assert {record.path for record in mine if record.stage == "shootout" and record.samples} == {"packed", "dense"}
        assert {record.path for record in mine if record.samples and record.baseline} == {"packed"}
    entries = entries_of(records)
    assert [entry.T for entry in entries] == [32, 64]
    assert all(entry.path in ("packed", "dense") for entry in entries)
    assert all(entry.default is not None and entry.default.path == "packed" for entry in entries)
    assert {"packed, the default failing", "runner-up dense"} >= {compared_with(entry, "cpu") for entry in entries}


# The space


def test_a_ladder_is_narrowed_to_what_the_sweep_names_and_the_path_offers() -> None:
    item = Parameter("row_chunk", (0, 64, 256), 64)
    assert narrowed(item, None) == item
    assert narrowed(item, (64, 0)) == Parameter("row_chunk", (0, 64), 64)
    assert narrowed(item, (256, 4096)) == Parameter("row_chunk", (256,), 256)
    assert narrowed(item, (4096,)) == Parameter("row_chunk", (64,), 64)


def test_a_space_crosses_ladders_without_reserves_and_tells_who_is_left_out(tmp_path: Path) -> None:
    sweep = read_sweep(str(written(tmp_path, (*LISTED, "needs_a_gpu"))))
    paths = {**PATHS, **misbehaving.PATHS}
    (family,) = families(sweep, "cpu")
    space, left_out = space_of(sweep, QUICK, paths, family, "cpu")
    assert left_out == {"needs_a_gpu": "needs a GPU"}
    assert {item.name for item in space["packed"]} == {"bucket_rounding", "row_chunk"}
    assert {item.name: item.ladder for item in space["packed"]}["bucket_rounding"] == (16,)
    whole, _ = space_of(sweep, EFFORTS["full"], paths, family, "cpu")
    assert {item.name: item.ladder for item in whole["packed"]}["bucket_rounding"] == (16, 64, 256)


def test_what_is_slow_to_build_waits_for_full_effort_on_a_cpu(tmp_path: Path) -> None:
    sweep = read_sweep(str(written(tmp_path, ("gather", "slow"))))
    slow = msgspec.structs.replace(PATHS["dense"], name="slow", slow_to_build=True)
    (family,) = families(sweep, "cpu")
    for effort, expected in ((QUICK, {"gather"}), (EFFORTS["full"], {"gather", "slow"})):
        space, left_out = space_of(sweep, effort, {**PATHS, "slow": slow}, family, "cpu")
        assert set(space) == expected
        assert set(left_out) == {"gather", "slow"} - expected


def test_reserves_climb_their_ladders_together(tmp_path: Path) -> None:
    (family,) = families(read_sweep(str(written(tmp_path, LISTED))), "cpu")
    problem, cpu = family.problems[0], torch.device("cpu")
    rungs = reserve_rungs(PATHS["varlen"], problem, cpu)
    ladders = {item.name: item.ladder for item in PATHS["varlen"].tunables(problem, cpu) if item.reserve}
    assert set(ladders) == {"reserve_rows", "reserve_keys"}
    for name, ladder in ladders.items():
        assert tuple(rung.parameters[name] for rung in rungs) == ladder
    assert reserve_rungs(PATHS["gather"], problem, cpu) == []

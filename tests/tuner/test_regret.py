"""Claims about regret: against which rounds it is read, what is unknown, and what a held-out entry is answered by."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from nsa.device import device_identity, software_identity
from nsa.dispatch_table import DispatchTable
from tests.tuner.test_table import problem, record
from tuner.cli import app
from tuner.record import Environment, Record, RunFolder
from tuner.regret import mean_regrets, regrets
from tuner.table import entries_of

US = {"gather": 100.0, "dense": 50.0, "packed": 150.0}


def measured(T: int, us: dict[str, float] = US, **changes: Any) -> list[Record]:
    """A shoot-out at a context."""
    return [record(path, time, problem=msgspec.to_builtins(problem(T)), **changes) for path, time in us.items()]


def table_of(records: list[Record]) -> DispatchTable:
    """The table that a run gives."""
    return DispatchTable(
        device=device_identity("cpu"), software=software_identity(), entries=tuple(entries_of(records))
    )


def test_the_fastest_has_none_and_another_answer_has_what_it_is_slower() -> None:
    table = table_of(measured(32) + measured(64, {"gather": 100.0, "dense": 200.0, "packed": 50.0}))
    (same,) = regrets(table, measured(32))
    assert (same.regret, same.best, same.answer) == (0.0, same.answer, "dense(query_chunk=0)")
    (other,) = regrets(table, measured(32, {"gather": 100.0, "dense": 60.0, "packed": 50.0}))
    assert other.answer == "dense(query_chunk=0)"
    assert other.best.startswith("packed")
    assert other.regret == pytest.approx(0.2, abs=0.01)
    assert (other.stage, other.rounds, other.status) == ("shootout", 60, "exact")


def test_software_of_another_version_here_makes_no_answer_stale() -> None:
    table = table_of(measured(64))
    then = msgspec.structs.replace(table.software, torch="1.0.0")
    older = DispatchTable(device=table.device, software=then, entries=table.entries)
    assert older.lookup(problem(64)).status == "stale"
    assert [one.status for one in regrets(older, measured(64))] == ["exact"]


def test_an_answer_that_missed_the_shoot_out_is_read_in_the_screening() -> None:
    table = table_of(measured(32))
    screened = measured(32, {"gather": 100.0, "dense": 60.0, "packed": 50.0}, stage="screen")
    finalists = measured(32, {"gather": 100.0, "packed": 50.0})
    (found,) = regrets(table, screened + finalists)
    assert (found.stage, found.candidates) == ("screen", 3)
    assert found.regret == pytest.approx(0.2, abs=0.01)


def test_an_answer_without_times_has_no_regret_and_says_why() -> None:
    (found,) = regrets(table_of(measured(32)), measured(32, {"gather": 100.0, "packed": 50.0}))
    assert found.regret is None
    assert found.reason == "the run has no times of this answer"
    assert mean_regrets([found]) == {}


def test_held_out_a_problem_is_answered_by_its_neighbours() -> None:
    upper = {"gather": 100.0, "dense": 200.0, "packed": 50.0}
    records = measured(32) + measured(64) + measured(128, upper)
    found = regrets(table_of(records), records, hold_out=True)
    assert [one.status for one in found] == ["extrapolated", "interpolated", "extrapolated"]
    assert found[1].answer.startswith("packed")
    assert found[1].regret == pytest.approx(2.0, abs=0.02)
    means = mean_regrets(found)
    assert means["interpolated"] == (found[1].regret, found[1].regret, 1)
    assert means["extrapolated"] == pytest.approx((1.5, 3.0, 2), abs=0.05)


def test_held_out_what_was_measured_for_the_same_calls_without_the_hint_is_held_out_too() -> None:
    prefill = {"mode": "prefill", "complete": True}
    us = {"dense": 100.0, "gather": 60.0, "causal_prefix": 40.0}
    records = [
        record(path, time, baseline=path == "dense", problem=msgspec.to_builtins(problem(T, S=T, **prefill)))
        for T in (32, 64, 128)
        for path, time in us.items()
    ]
    found = regrets(table_of(records), records, hold_out=True)
    assert [one.status for one in found] == ["extrapolated", "interpolated", "extrapolated"]


def test_the_command_prints_each_problem_and_the_mean(tmp_path: Path) -> None:
    folder, table = RunFolder(tmp_path / "run"), tmp_path / "table.json"
    folder.start(
        Environment(
            run_id="run", commit="abc", date="2026-11-22", tool="nsa-tune sweep", device={}, software={}, clocks={},
            timer={}, sweep={},
        )
    )  # fmt: skip
    folder.append(measured(32, {"gather": 100.0, "dense": 60.0, "packed": 50.0}))
    table.write_bytes(table_of(measured(32)).encode())
    shown = CliRunner().invoke(app, ["regret", str(folder.path), "--table", str(table)])
    assert shown.exit_code == 0
    assert "dense(query_chunk=0)" in shown.stdout
    assert "in the mean" in shown.stdout
    raw = CliRunner().invoke(app, ["regret", str(folder.path), "--table", str(table), "--json"])
    assert msgspec.json.decode(raw.stdout)["means"]["exact"] == pytest.approx([0.2, 0.2, 1], abs=0.01)


def test_a_folder_that_holds_no_run_is_a_usage_error(tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["regret", str(tmp_path)])
    assert shown.exit_code == 2
    assert "no run in" in shown.stderr

"""Claims about tables made from records: who wins, what a tie keeps, what the evidence says, how files merge."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from nsa.device import device_identity, software_identity
from nsa.dispatch_entry import DispatchEntry
from nsa.dispatch_table import DispatchTable, read_dispatch_table
from nsa.errors import DispatchTableError
from nsa.problem import SelectionProblem
from tuner.record import Environment, Record, RecordError, RunFolder, Sample, run_folders
from tuner.table import entries_of, entry_of, write_table

PARAMETERS = {
    "gather": {"row_chunk": 0},
    "dense": {"query_chunk": 0},
    "packed": {"bucket_rounding": 16, "row_chunk": 0},
    "causal_prefix": {"prefix": "flash", "inner": "gather"},
}
ROUNDS = 60


def problem(T: int = 32, **changes: Any) -> SelectionProblem:
    """A decode problem, whose default on a CPU is gather."""
    fields = {
        "mode": "decode", "dtype": "float32", "B": 1, "S": 1, "T": T, "G": 2, "h": 2, "Dk": 8, "Dv": 8,
        "block_size": 16, "topk": 2,
    }  # fmt: skip
    return SelectionProblem(**{**fields, **changes})


def samples(path: str, us: float, rounds: int = ROUNDS) -> list[Sample]:
    """Rounds of about ``us`` with noise of 0.5 %, each path its own."""
    noise = np.random.default_rng(sum(path.encode())).normal(0.0, 0.005, rounds)
    return [Sample(number, 0, float(us * np.exp(noise[number]))) for number in range(rounds)]


def record(path: str, us: float = 100.0, **changes: Any) -> Record:
    """A shoot-out record of a path at its only parameters."""
    return Record(**{
        "run_id": "new-run", "commit": "abc", "date": "2026-11-22", "stage": "shootout", "pattern": "scored",
        "problem": msgspec.to_builtins(problem()), "path": path, "parameters": PARAMETERS[path],
        "baseline": path == "gather", "outcome": "ok", "oracle_error": 1e-7, "oracle_bound": 1e-6,
        "kernels": {"aten::mm": 2, "aten::bmm": 1}, "samples": samples(path, us), "peak_bytes": 1000, **changes,
    })  # fmt: skip


def only(records: Sequence[Record]) -> DispatchEntry:
    """The single entry of these records."""
    (entry,) = entries_of(records)
    return entry


# What is no evidence


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"oracle_error": 2e-6}, "has times and an error of 2e-06 where 1e-06 is allowed"),
        ({"oracle_error": None}, "was not checked"),
        ({"kernels": {}}, "was not seen to execute"),
    ],
)
def test_a_winner_without_proof_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecordError, match=said):
        entries_of([record("gather"), record("dense", 50.0, **changes)])


def test_a_run_over_another_registry_never_becomes_a_table_even_where_its_names_are_the_runtimes(
    tmp_path: Path,
) -> None:
    folder = run(tmp_path, [record("gather"), record("dense", 50.0)])
    theirs = msgspec.structs.replace(folder.environment(), sweep={"registry": "mine:PATHS"})
    folder.start(theirs)
    with pytest.raises(RecordError, match="is of mine:PATHS, whose paths the runtime does not know"):
        write_table(tmp_path / "table.json", folder, keep=False)
    assert not (tmp_path / "table.json").exists()


# Entries


def test_a_certified_winner_gets_the_entry_with_its_evidence() -> None:
    entry = only([record("gather"), record("dense", 50.0), record("packed", 150.0)])
    assert (entry.path, entry.parameters) == ("dense", {"query_chunk": 0})
    assert entry.problem() == problem()
    assert entry.pairs == ROUNDS
    assert entry.ratio == pytest.approx(0.5, rel=0.02)
    assert entry.ratio_low is not None
    assert entry.ratio_high is not None
    assert entry.ratio_low < entry.ratio < entry.ratio_high < 1.0
    assert entry.e_value is not None
    assert entry.e_value >= 2 / 0.001
    assert entry.runner_up is not None
    assert entry.runner_up.path == "gather"
    assert entry.tied == ()
    assert entry.median_us == pytest.approx(50.0, rel=0.01)
    assert (entry.peak_bytes, entry.oracle_error, entry.oracle_bound) == (1000, 1e-7, 1e-6)
    assert entry.kernels == ("aten::bmm", "aten::mm")
    assert (entry.run_id, entry.date, entry.pattern) == ("new-run", "2026-11-22", "scored")


def test_a_shoot_out_over_complete_selections_serves_those_that_do_not_say_so() -> None:
    prefill = {"mode": "prefill", "S": 32, "complete": True}
    us = {"dense": 100.0, "gather": 60.0, "causal_prefix": 40.0}
    records = [
        record(path, time, baseline=path == "dense", problem=msgspec.to_builtins(problem(32, **prefill)))
        for path, time in us.items()
    ]
    entries = {entry.complete: entry for entry in entries_of(records)}
    assert {complete: entry.path for complete, entry in entries.items()} == {True: "causal_prefix", False: "gather"}
    assert entries[False].ratio == pytest.approx(0.6, rel=0.02)
    assert [entry.complete for entry in entries_of(records[:2])] == [True]


def test_a_tie_keeps_the_default_and_names_who_is_tied() -> None:
    entry = only([record("gather"), record("dense", 100.0), record("packed", 150.0)])
    assert entry.path == "gather"
    assert [candidate.path for candidate in entry.tied] == ["dense"]
    assert entry.runner_up is not None
    assert entry.runner_up.path == "dense"
    assert entry.ratio == pytest.approx(1.0, rel=0.02)


def test_where_the_default_wins_the_ratio_is_to_the_runner_up() -> None:
    entry = only([record("gather"), record("dense", 200.0), record("packed", 400.0)])
    assert entry.path == "gather"
    assert entry.runner_up is not None
    assert entry.runner_up.path == "dense"
    assert entry.ratio == pytest.approx(0.5, rel=0.02)
    assert entry.tied == ()


def test_tied_winners_are_ordered_by_peak_then_by_name() -> None:
    dense, packed = record("dense", 50.0, peak_bytes=2000), record("packed", 50.0, peak_bytes=1000)
    assert only([record("gather"), dense, packed]).path == "packed"
    even = msgspec.structs.replace(packed, peak_bytes=2000)
    entry = only([record("gather"), dense, even])
    assert entry.path == "dense"
    assert [candidate.path for candidate in entry.tied] == ["packed"]


def test_screening_samples_never_count() -> None:
    assert entries_of([record("gather", stage="screen"), record("dense", 50.0, stage="screen")]) == []
    entry = only([record("gather"), record("dense", 100.0), record("dense", 10.0, stage="screen")])
    assert entry.path == "gather"


@pytest.mark.parametrize("outcome", ["wrong", "fell_back", "crash", "hang", "oom", "unsupported", "compile_error"])
def test_only_what_is_ok_can_be_picked(outcome: str) -> None:
    broken = record("dense", outcome=outcome, samples=[], reason="why")
    entry = only([record("gather"), broken, record("packed", 150.0)])
    assert entry.path == "gather"
    assert entry.runner_up is not None
    assert entry.runner_up.path == "packed"


def test_without_the_default_or_without_enough_pairs_there_is_no_entry() -> None:
    assert entry_of([record("dense", 50.0), record("packed")]) is None
    assert entry_of([]) is None
    few = [record(path, us, samples=samples(path, us, 3)) for path, us in (("gather", 100.0), ("dense", 50.0))]
    assert entry_of(few) is None


def test_pairs_are_rounds_in_which_both_have_a_sample() -> None:
    dense = record("dense", 50.0)
    entry = only([record("gather"), msgspec.structs.replace(dense, samples=dense.samples[10:])])
    assert entry.pairs == ROUNDS - 10


def test_every_problem_has_an_entry_of_its_own() -> None:
    longer = msgspec.to_builtins(problem(64))
    found = entries_of(
        [
            record("gather"),
            record("dense", 50.0),
            record("gather", problem=longer),
            record("dense", 200.0, problem=longer),
        ]
    )
    assert [(entry.T, entry.path) for entry in found] == [(32, "dense"), (64, "gather")]


@pytest.mark.parametrize("order", [("scored", "smooth"), ("smooth", "scored")])
def test_of_two_patterns_of_one_problem_the_one_nearest_to_use_gives_the_entry(order: tuple[str, str]) -> None:
    us = {"scored": 50.0, "smooth": 200.0}
    records = [
        each
        for pattern in order
        for each in (record("gather", pattern=pattern), record("dense", us[pattern], pattern=pattern))
    ]
    entry = only(records)
    assert (entry.pattern, entry.path) == ("scored", "dense")


def test_the_same_records_give_the_same_table() -> None:
    records = [record("gather"), record("dense", 50.0), record("packed", 99.0)]
    assert entries_of(records) == entries_of(list(reversed(records))) == entries_of(records)


# Files


def run(tmp_path: Path, records: Sequence[Record], slug: str | None = None, **software: str) -> RunFolder:
    """A run on this device with these records."""
    device = device_identity("cpu")
    folder = RunFolder(tmp_path / "records" / f"run{len(list(tmp_path.glob('records/*')))}")
    folder.start(
        Environment(
            run_id=folder.path.name, commit="abc", date="2026-11-22", tool="test",
            device=msgspec.to_builtins(msgspec.structs.replace(device, slug=slug or device.slug)),
            software=msgspec.to_builtins(msgspec.structs.replace(software_identity(), **software)), clocks={}, timer={},
            sweep={"name": "tiny"},
        )
    )  # fmt: skip
    folder.append(list(records))
    return folder


def pair(T: int, us: float = 50.0, run_id: str = "new-run") -> list[Record]:
    """A shoot-out at a context that dense wins, unless ``us`` says otherwise."""
    posed = msgspec.to_builtins(problem(T))
    return [record("gather", problem=posed, run_id=run_id), record("dense", us, problem=posed, run_id=run_id)]


def test_a_written_table_is_what_is_read_back(tmp_path: Path) -> None:
    file = tmp_path / "tables" / "cpu.json"
    table, word = write_table(file, run(tmp_path, [*pair(32), *pair(64)]), keep=True)
    assert word == ""
    found = read_dispatch_table(file)
    assert found.entries == table.entries
    assert (found.device, found.software) == (device_identity("cpu"), software_identity())
    assert found.lookup(problem(64)).path == "dense"
    assert found.lookup(problem(64)).status == "exact"


def test_merging_keeps_other_problems_and_replaces_those_measured_now(tmp_path: Path) -> None:
    file = tmp_path / "cpu.json"
    write_table(file, run(tmp_path, [*pair(32, run_id="old-run"), *pair(64, run_id="old-run")]), keep=True)
    table, word = write_table(file, run(tmp_path, [*pair(64, us=200.0), *pair(128)]), keep=True)
    assert word == ""
    assert {entry.T: (entry.path, entry.run_id) for entry in table.entries} == {
        32: ("dense", "old-run"), 64: ("gather", "new-run"), 128: ("dense", "new-run")
    }  # fmt: skip
    assert read_dispatch_table(file).entries == table.entries


def test_a_certified_pick_that_a_later_run_could_not_certify_is_named_with_its_run(tmp_path: Path) -> None:
    file = tmp_path / "cpu.json"
    write_table(file, run(tmp_path, [*pair(32, run_id="old-run"), *pair(64, run_id="old-run")]), keep=True)
    table, word = write_table(file, run(tmp_path, [*pair(32, us=100.0), *pair(64)]), keep=True)
    assert [entry.certified for entry in sorted(table.entries, key=lambda entry: entry.T)] == [False, True]
    assert word.startswith("certified before and a tie by this run: decode B1 T=32 dense; ")
    assert "export old-run again" in word


def test_a_pick_that_a_later_run_replaces_without_having_tried_it_is_named_with_its_run(tmp_path: Path) -> None:
    file, posed = tmp_path / "cpu.json", msgspec.to_builtins(problem(32))
    write_table(file, run(tmp_path, pair(32, run_id="old-run")), keep=True)
    others = [record("gather", problem=posed), record("packed", 50.0, problem=posed)]
    table, word = write_table(file, run(tmp_path, others), keep=True)
    assert [entry.path for entry in table.entries] == ["packed"]
    assert word.startswith("replaced without having been tried by this run: decode B1 T=32 dense; ")
    assert "export old-run again" in word
    slow = record("dense", 80.0, problem=posed, stage="screen")  # tried: screening left it out
    assert write_table(file, run(tmp_path, pair(32, run_id="old-run")), keep=True)[1] != ""
    assert write_table(file, run(tmp_path, [*others, slow]), keep=True)[1] == ""


def test_an_environment_without_a_device_is_an_error_that_names_its_file(tmp_path: Path) -> None:
    folder = run(tmp_path, pair(32))
    whole = msgspec.json.decode(folder.environment_file.read_bytes())
    folder.environment_file.write_bytes(msgspec.json.encode({**whole, "device": {}}))
    with pytest.raises(RecordError, match=r"environment\.json: not an environment of a sweep: .*`slug`"):
        write_table(tmp_path / "cpu.json", folder, keep=False)


def test_without_keeping_only_this_runs_entries_are_written(tmp_path: Path) -> None:
    file = tmp_path / "cpu.json"
    write_table(file, run(tmp_path, pair(32)), keep=True)
    table, _ = write_table(file, run(tmp_path, pair(64)), keep=False)
    assert [entry.T for entry in table.entries] == [64]


def test_entries_of_other_software_are_dropped_with_a_word(tmp_path: Path) -> None:
    file = tmp_path / "cpu.json"
    write_table(file, run(tmp_path, [*pair(32), *pair(48)], torch="1.13.1"), keep=True)
    table, word = write_table(file, run(tmp_path, pair(64)), keep=True)
    assert [entry.T for entry in table.entries] == [64]
    assert word.startswith(f"left out 2 entries of {file}: torch 1.13.1 then")
    assert "sweep them again" in word


def test_a_table_of_another_device_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "cpu.json"
    write_table(file, run(tmp_path, pair(32), slug="cpu-abacus-x2"), keep=True)
    before = file.read_bytes()
    with pytest.raises(DispatchTableError) as raised:
        write_table(file, run(tmp_path, pair(64)), keep=True)
    assert "cpu-abacus-x2" in str(raised.value)
    assert device_identity("cpu").slug in str(raised.value)
    assert file.read_bytes() == before


@pytest.mark.parametrize("data", [b"{", b'{"version": 1}', b""])
def test_an_unreadable_table_is_an_error_and_left_as_it_was(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "cpu.json"
    file.write_bytes(data)
    with pytest.raises(DispatchTableError, match=r"cpu\.json"):
        write_table(file, run(tmp_path, pair(64)), keep=True)
    assert file.read_bytes() == data


def test_a_run_without_a_shoot_out_keeps_what_the_table_had(tmp_path: Path) -> None:
    file = tmp_path / "cpu.json"
    write_table(file, run(tmp_path, pair(32)), keep=True)
    table, _ = write_table(file, run(tmp_path, [record("gather", stage="screen")]), keep=True)
    assert [entry.T for entry in table.entries] == [32]
    assert isinstance(table, DispatchTable)


COMMITTED = sorted((Path(__file__).parents[2] / "results" / "dispatch_tables").glob("*.json"))


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.stem)
def test_the_committed_table_is_what_the_committed_records_give(file: Path) -> None:
    table = read_dispatch_table(file)
    given: dict[tuple[str, SelectionProblem], DispatchEntry] = {}
    for folder in run_folders(file.parents[1] / "records" / table.device.slug):
        if folder.path.name in {entry.run_id for entry in table.entries}:
            given |= {(folder.path.name, entry.problem()): entry for entry in entries_of(folder.records()[0])}
    for entry in table.entries:
        assert given[entry.run_id, entry.problem()] == entry

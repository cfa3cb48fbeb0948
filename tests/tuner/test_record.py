"""Claims about run folders: records survive a kill and a full disk, and what is not a record is named."""

import errno
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tuner import record as module
from tuner.record import (
    Environment,
    Record,
    RunFolder,
    Sample,
    SequenceSample,
    by_problem,
    new_run_id,
    run_folders,
    write_whole,
)


def record(**changes: Any) -> Record:
    """A record with every kind of field filled."""
    fields: dict[str, Any] = {
        "run_id": "run", "commit": "abc", "date": "2026-11-22", "stage": "screen", "pattern": "scored", "union": 0.4,
        "problem": {"mode": "decode", "T": 32}, "path": "dense", "parameters": {"query_chunk": 64}, "outcome": "ok",
        "oracle_error": 1e-7, "oracle_bound": 1e-6, "kernels": {"aten::mm": 2}, "peak_bytes": 4096, "growths": 0,
        "samples": [Sample(0, 1, 12.5), Sample(1, 0, 12.25)], "sequence": [SequenceSample(0, 32, 9.5, 1)],
        "workspace_bytes": 0,
    }  # fmt: skip
    return Record(**{**fields, **changes})


def environment(run_id: str) -> Environment:
    """An environment with hardly anything in it."""
    return Environment(
        run_id=run_id, commit="abc", date="2026-11-22", tool="test", device={"slug": "cpu"}, software={}, clocks={},
        timer={}, sweep={"name": "tiny"},
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A started run with two records."""
    found = RunFolder(tmp_path / "records" / "run")
    found.start(environment("run"))
    found.append([record(), record(path="gather")])
    return found


def entries(path: Path) -> list[str]:
    """Names in a folder, hidden ones too."""
    return sorted(os.listdir(path))


def test_records_come_back_equal_in_order(folder: RunFolder) -> None:
    more = [record(outcome="crash", reason="why\nso", samples=[], union=None), record(stage="reserve", baseline=True)]
    folder.append(more)
    found, word = folder.records()
    assert found == [record(), record(path="gather"), *more]
    assert word == ""
    assert len(folder.trials_file.read_bytes().splitlines()) == 4


def test_an_environment_comes_back_equal(folder: RunFolder) -> None:
    assert folder.environment() == environment("run")


def test_a_run_without_records_has_none(tmp_path: Path) -> None:
    assert RunFolder(tmp_path).records() == ([], "")


@pytest.mark.parametrize("kept", [1, 40, -1], ids=["a byte", "some", "all but the end of line"])
def test_a_half_written_last_line_is_dropped_with_a_word_and_repaired(folder: RunFolder, kept: int) -> None:
    whole = folder.trials_file.read_bytes()
    line = msgspec.json.encode(record(path="packed")) + b"\n"
    half = line[:kept]
    folder.trials_file.write_bytes(whole + half)
    found, word = folder.records()
    assert [each.path for each in found] == ["dense", "gather"]
    assert word == f"dropped a half-written line of {len(half)} bytes"
    assert folder.repair() == word
    assert folder.trials_file.read_bytes() == whole
    assert folder.repair() == ""
    folder.append([record(path="packed")])
    assert [each.path for each in folder.records()[0]] == ["dense", "gather", "packed"]


def test_a_first_line_that_is_half_written_leaves_no_record(folder: RunFolder) -> None:
    folder.trials_file.write_bytes(b'{"run_id":')
    assert folder.repair() == "dropped a half-written line of 10 bytes"
    assert folder.trials_file.read_bytes() == b""


@pytest.mark.parametrize("after", [b"", b'{"op_code":1}\n'], ids=["at the end", "appended to"])
def test_a_ledger_that_a_full_disk_tore_is_cut_where_it_is_whole_and_a_whole_one_is_left(
    folder: RunFolder, after: bytes
) -> None:
    whole = b'{"op_code":0}\n{"op_code":4}\n'
    folder.ledger_file.write_bytes(whole)
    assert (folder.repair(), folder.ledger_file.read_bytes()) == ("", whole)
    torn = b'{"op_code":4,"tri' + after
    folder.ledger_file.write_bytes(whole + torn)
    assert folder.repair() == f"cut {len(torn)} unreadable bytes off the ledger"
    assert folder.ledger_file.read_bytes() == whole


@pytest.mark.parametrize("line", [b"{", b"\x00\x00", b"[]", b'{"run_id":"run"}'])
def test_a_corrupt_line_in_the_middle_is_an_error_naming_file_and_line(folder: RunFolder, line: bytes) -> None:
    first, second = folder.trials_file.read_bytes().splitlines()
    folder.trials_file.write_bytes(b"\n".join((first, line, second, b"")))
    before = folder.trials_file.read_bytes()
    for read in (folder.records, folder.repair):
        with pytest.raises(ValueError, match=r"trials\.jsonl:2: not a record"):
            read()
    assert folder.trials_file.read_bytes() == before


def test_unknown_fields_are_refused_by_name(folder: RunFolder) -> None:
    foreign = msgspec.json.encode({**msgspec.to_builtins(record()), "verdict": "faster"})
    with folder.trials_file.open("ab") as file:
        file.write(foreign + b"\n")
    with pytest.raises(ValueError, match=r"trials\.jsonl:3: .*verdict"):
        folder.records()


def test_an_unknown_outcome_is_refused(folder: RunFolder) -> None:
    foreign = msgspec.json.encode({**msgspec.to_builtins(record()), "outcome": "inf"})
    folder.trials_file.write_bytes(foreign + b"\n")
    with pytest.raises(ValueError, match=r"trials\.jsonl:1: .*inf"):
        folder.records()


def no_room(*_: Any) -> None:
    """What the kernel says of a full disk."""
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("step", ["fsync", "replace", "chmod"])
@pytest.mark.parametrize("old", [None, b"old"], ids=["new file", "existing file"])
def test_a_write_that_fails_leaves_the_old_file_and_no_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, old: bytes | None
) -> None:
    file = tmp_path / "folder" / "table.json"
    if old is not None:
        write_whole(file, old)
    monkeypatch.setattr(module.os, step, no_room)
    with pytest.raises(OSError, match="No space left"):
        write_whole(file, b"new")
    monkeypatch.undo()
    assert entries(file.parent) == ([] if old is None else ["table.json"])
    if old is not None:
        assert file.read_bytes() == old


def test_a_write_interrupted_by_the_user_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "table.json", b"new")
    assert entries(tmp_path) == []


def test_a_write_makes_its_folder_and_replaces_the_whole(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "table.json"
    for data in (b"longer than the next", b"short"):
        write_whole(file, data)
        assert file.read_bytes() == data
    assert entries(file.parent) == ["table.json"]
    assert file.stat().st_mode & 0o777 == 0o644


def test_the_data_is_synced_before_the_name_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(module.os, name, lambda *args, name=name, real=real: (steps.append(name), real(*args)))
    write_whole(tmp_path / "table.json", b"new")
    assert steps == ["fsync", "replace"]


def test_a_repair_on_a_full_disk_loses_nothing(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    with folder.trials_file.open("ab") as file:
        file.write(b'{"half')
    before = folder.trials_file.read_bytes()
    monkeypatch.setattr(module.os, "fsync", no_room)
    with pytest.raises(OSError, match="No space left"):
        folder.repair()
    assert folder.trials_file.read_bytes() == before


def test_a_run_is_complete_once_it_is_finished(folder: RunFolder) -> None:
    assert not folder.complete
    folder.finish()
    assert folder.complete


def test_runs_are_found_oldest_first_by_their_environment(tmp_path: Path) -> None:
    for name, run_id in (("b-sweep", "20260102"), ("a-sweep", "20260103"), ("c-sweep", "20260101")):
        RunFolder(tmp_path / name / run_id).start(environment(run_id))
    (tmp_path / "a-sweep" / "20260104").mkdir()
    assert [found.path.name for found in run_folders(tmp_path)] == ["20260101", "20260102", "20260103"]


def test_a_candidate_is_named_by_path_and_parameters() -> None:
    assert record().candidate == "dense(query_chunk=64)"
    assert record(parameters={}).candidate == "dense"


def test_records_are_grouped_by_problem_and_pattern() -> None:
    both = [record(), record(pattern="random"), record(path="gather"), record(problem={"mode": "decode", "T": 64})]
    assert [[each.path for each in group] for group in by_problem(both).values()] == [
        ["dense", "gather"],
        ["dense"],
        ["dense"],
    ]


def test_runs_that_begin_in_the_same_second_have_ids_of_their_own_and_ids_sort_by_time() -> None:
    now = datetime(2026, 11, 23, 4, 3, 2, tzinfo=UTC)
    one, two = (new_run_id(now, "61e91521e9") for _ in range(2))
    assert one != two
    assert one.startswith("20261123T040302-61e9152-")
    assert max(one, two) < new_run_id(now.replace(second=3), "61e91521e9")

"""Claims about dispatch table files: what is refused, in which words, and that the rest comes back equal."""

import json
from pathlib import Path

import msgspec
import pytest
import torch

from nsa import dispatch_table
from nsa.device import device_identity, software_identity
from nsa.dispatch_entry import DispatchEntry
from nsa.dispatch_table import (
    MAX_TABLE_BYTES,
    VERSION,
    DispatchTable,
    load_dispatch_table,
    read_dispatch_table,
    user_table_path,
)
from nsa.errors import DispatchTableError
from nsa.paths import PATHS, Candidate, varlen

BRANCH = {"block_size": 0, "topk": 1, "form": "ranges", "window": 16}
COMMITTED = sorted((Path(__file__).parents[2] / "results" / "dispatch_tables").glob("*.json"))


def entry(**changes):
    """An entry as it stands in a file."""
    return {
        "mode": "decode", "dtype": "float32", "B": 1, "S": 1, "T": 32, "G": 2, "h": 2, "Dk": 8, "Dv": 8,
        "block_size": 8, "topk": 2, "path": "packed", "parameters": {"bucket_rounding": 16, "row_chunk": 0},
        "tied": [{"path": "dense", "parameters": {"query_chunk": 64}}],
        "runner_up": {"path": "gather", "parameters": {"row_chunk": 0}},
        "pairs": 40, "ratio": 0.5, "ratio_low": 0.4, "ratio_high": 0.6, "e_value": 1e5, "median_us": 12.5,
        "peak_bytes": 4096, "oracle_error": 1e-7, "oracle_bound": 1e-6, "kernels": ["aten::bincount"],
        "run_id": "run", "date": "2026-11-22", **changes,
    }  # fmt: skip


def table(*entries, **changes):
    """A table as JSON, of this device."""
    fields = {"device": device_identity("cpu"), "software": software_identity(), "entries": entries, "version": VERSION}
    return msgspec.json.encode({**fields, **changes})


def refusal(data):
    """What decoding says."""
    with pytest.raises(DispatchTableError) as raised:
        DispatchTable.decode(data)
    return str(raised.value)


def prompt(**changes):
    """An entry of a prefill whose pick needs no hint."""
    return entry(**{
        "mode": "prefill", "S": 32, "path": "dense", "parameters": {"query_chunk": 0}, "tied": [], "runner_up": None,
        **changes,
    })  # fmt: skip


DENSE_PREFIX = {"path": "causal_prefix", "parameters": {"prefix": "math", "inner": "dense"}, "complete": True}


def test_an_entry_that_needs_complete_selections_serves_no_other_call():
    both = DispatchTable.decode(table(prompt(**DENSE_PREFIX)))
    problem = both.entries[0].problem()
    assert both.lookup(problem).path == "causal_prefix"
    assert both.lookup(problem).status == "exact"
    other = both.lookup(msgspec.structs.replace(problem, complete=False))
    assert (other.path, other.status, other.entry) == ("dense", "default", "")


@pytest.mark.parametrize("measured", [False, True])
def test_a_pick_that_needs_no_hint_serves_calls_with_and_without_it(measured):
    both = DispatchTable.decode(table(prompt(complete=measured)))
    for complete in (False, True):
        choice = both.lookup(msgspec.structs.replace(both.entries[0].problem(), complete=complete))
        assert (choice.path, choice.status, choice.entry) == ("dense", "exact", "run#0")


def test_of_two_entries_that_differ_in_the_hint_each_serves_its_own_calls():
    both = DispatchTable.decode(table(prompt(), prompt(**DENSE_PREFIX), prompt(T=64, S=64)))
    for number in (0, 1, 2):
        assert both.lookup(both.entries[number].problem()).entry == f"run#{number}"
    later = msgspec.structs.replace(both.entries[2].problem(), complete=True)
    assert both.lookup(later).entry == "run#2"


def test_encoding_and_decoding_are_inverse():
    both = DispatchTable.decode(table(entry(), entry(T=64, path="dense", parameters={"query_chunk": 0}, tied=[])))
    again = DispatchTable.decode(both.encode())
    assert (again.device, again.software, again.entries) == (both.device, both.software, both.entries)
    assert again.encode() == both.encode()
    assert both.encode().endswith(b"}\n")
    assert isinstance(again.entries[0], DispatchEntry)
    assert again.entries[0].tied == (Candidate(path="dense", parameters={"query_chunk": 64}),)


def test_what_is_written_holds_every_field_by_name():
    found = json.loads(DispatchTable.decode(table(entry())).encode())
    assert set(found) == {"version", "device", "software", "entries"}
    assert {**found["entries"][0]}.items() >= entry().items()


@pytest.mark.parametrize("data", [b"", b"{", table(entry())[:-40], b"\x00\xff", b"[]", b"null"])
def test_what_is_no_json_or_no_table_is_refused(data):
    assert "not a dispatch table" in refusal(data)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (table(entry(), surprise=1), ("surprise",)),
        (table(entry(), entry(T=64, note="hello")), ("note", "$.entries[1]")),
        (table(entry(tied=[{"path": "dense", "code": "import os"}])), ("code", "$.entries[0].tied[0]")),
        (table(entry(path="denser")), ("unknown path 'denser'", "'dense'", "$.entries[0]")),
        (table(entry(tied=[{"path": "denser"}])), ("unknown path 'denser'", "$.entries[0]")),
        (table(entry(path="reference", parameters={})), ("unknown path 'reference'", "$.entries[0]")),
        (table(entry(tied=[{"path": "reference"}])), ("unknown path 'reference'", "$.entries[0]")),
        (table(entry(parameters={"row_chnk": 1})), ("row_chnk", "packed", "$.entries[0]")),
        (table(entry(), version=3), ("version 3", "reads [1, 2]")),
        (table(entry(operation="windows")), ("operation", "$.entries[0]")),
        (table(entry(operation="window", **BRANCH)), ("'packed' is no path of window", "$.entries[0]")),
        (table(entry(operation="window")), ("do not go with 'window'", "$.entries[0]")),
        (table(entry(window=512)), ("do not go with 'selection'", "$.entries[0]")),
        (table(entry(default={"path": "denser"})), ("unknown path 'denser'", "$.entries[0]")),
        (table(entry(level="model")), ("level", "$.entries[0]")),
        (table(entry(), entry(T=64), entry()), ("entries 0 and 2", "same problem")),
        (table(entry(T="many")), ("$.entries[0].T", "int")),
        (table(entry(mode="training")), ("$.entries[0].mode",)),
        (table(entry(T=0)), ("positive", "$.entries[0]")),
        (table(entry(S=2)), ("decode has one query", "$.entries[0]")),
        (table(entry(form="ranges")), ("block_size 8", "$.entries[0]")),
        (table(entry(parameters={"row_chunk": {"os": "system"}})), ("$.entries[0].parameters",)),
    ],
)
def test_a_fault_is_named_with_its_json_path(data, words):
    said = refusal(data)
    for word in words:
        assert word in said


def test_a_table_of_version_1_reads_as_selection_at_the_level_of_the_branch():
    newer = {"operation", "window", "kernel_size", "kernel_stride", "level", "default"}
    old = {name: value for name, value in entry().items() if name not in newer}
    found = DispatchTable.decode(table(old, version=1))
    (kept,) = found.entries
    assert (kept.operation, kept.level, kept.default) == ("selection", "branch", None)
    assert json.loads(found.encode())["version"] == VERSION
    assert DispatchTable.decode(found.encode()).entries == found.entries


def test_one_table_holds_the_operations_apart():
    filled = {"path": "sdpa_window", "parameters": {"query_chunk": 128}, "tied": [], "runner_up": None}
    found = DispatchTable.decode(table(entry(), entry(operation="window", **BRANCH, **filled)))
    selection, window = (found.lookup(kept.problem()) for kept in found.entries)
    assert (selection.path, window.path, window.status) == ("packed", "sdpa_window", "exact")
    other = msgspec.structs.replace(found.entries[1].problem(), window=8)
    assert found.lookup(other).status == "default"


def test_what_was_measured_with_flash_attn_is_read_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(varlen, "installed", lambda name: False)
    picked = {"path": "varlen", "parameters": {"backend": "flash_attn", "row_chunk": 0}, "dtype": "bfloat16"}
    found = DispatchTable.decode(table(entry(**picked, tied=[], runner_up=None)))
    problem = found.entries[0].problem()
    assert found.lookup(problem).parameters["backend"] == "flash_attn"
    reason = PATHS["varlen"].unsupported_reason(problem, torch.device("cuda"), {"backend": "flash_attn"})
    assert reason == "varlen backend flash_attn needs the package flash-attn"
    assert PATHS["varlen"].defaults(problem, torch.device("cuda"))["backend"] == "torch"


@pytest.mark.parametrize(("context", "status"), [(16, "extrapolated"), (32, "exact")])
def test_a_pick_that_launches_less_for_a_dense_prompt_is_no_exact_answer_across_the_hint(context, status):
    union = {
        "path": "triton_union",
        "parameters": {"tokens": 4},
        "h": 4,
        "block_size": 16,
        "topk": 1,
        "Dk": 16,
        "Dv": 16,
    }
    found = DispatchTable.decode(table(prompt(**union, complete=True, S=context, T=context, overlap="high")))
    measured = found.entries[0].problem()
    assert measured.dense is (context == 16)
    assert found.lookup(measured).status == "exact"
    other = found.lookup(msgspec.structs.replace(measured, complete=False))
    assert (other.path, other.status) == ("triton_union", status)


def test_a_hinted_entry_is_no_exact_answer():
    found = DispatchTable.decode(table(prompt(hinted=True)))
    assert found.lookup(found.entries[0].problem()).status == "extrapolated"


def test_what_is_extrapolated_across_the_hint_is_so_in_a_stale_table_too():
    old = msgspec.structs.replace(software_identity(), torch="1.13.1")
    union = {"path": "triton_union", "parameters": {"tokens": 4}, "complete": True, "overlap": "high"}
    sizes = {"h": 4, "block_size": 16, "topk": 1, "S": 16, "T": 16, "Dk": 16, "Dv": 16}
    for measured in (prompt(hinted=True), prompt(**union, **sizes)):
        found = DispatchTable.decode(table(measured, software=old))
        choice = found.lookup(msgspec.structs.replace(found.entries[0].problem(), complete=False))
        assert choice.status == "extrapolated"
        assert "torch 1.13.1 then" in choice.reason


def test_a_missing_field_is_named():
    partial = entry()
    del partial["run_id"]
    said = refusal(table(partial))
    assert "run_id" in said
    assert "$.entries[0]" in said


def test_the_error_of_a_file_names_the_file_and_what_to_do(tmp_path):
    file = tmp_path / "mine.json"
    file.write_bytes(table(entry(path="denser")))
    with pytest.raises(DispatchTableError, match=r"mine\.json.*denser.*nsa-tune sweep"):
        read_dispatch_table(file)
    assert file.read_bytes() == table(entry(path="denser"))


def test_a_table_of_another_device_is_refused_naming_both(tmp_path):
    here = device_identity("cpu")
    file = tmp_path / "theirs.json"
    file.write_bytes(table(entry(), device=msgspec.structs.replace(here, slug="cpu-abacus-x2")))
    with pytest.raises(DispatchTableError) as raised:
        load_dispatch_table(file, device="cpu")
    assert "cpu-abacus-x2" in str(raised.value)
    assert here.slug in str(raised.value)
    assert read_dispatch_table(file).device.slug == "cpu-abacus-x2"  # to look at it is fine


def test_a_file_that_is_too_large_is_refused_without_being_read(tmp_path, monkeypatch):
    file = tmp_path / "large.json"
    with file.open("wb") as sparse:
        sparse.truncate(MAX_TABLE_BYTES + 1)
    reads = []
    monkeypatch.setattr(Path, "read_bytes", lambda path: reads.append(path))
    monkeypatch.setattr(Path, "open", lambda path, *_: reads.append(path))
    with pytest.raises(DispatchTableError, match=str(MAX_TABLE_BYTES + 1)):
        load_dispatch_table(file, device="cpu")
    assert reads == []


def test_data_that_is_too_large_is_refused_before_decoding(monkeypatch):
    decoded = []
    monkeypatch.setattr(msgspec.json, "decode", lambda *_, **__: decoded.append(1))
    assert str(MAX_TABLE_BYTES) in refusal(b" " * (MAX_TABLE_BYTES + 1))
    assert decoded == []


def test_a_named_file_that_is_missing_is_an_error_and_no_other_source_is_asked(tmp_path, monkeypatch):
    for path in (
        user_table_path(device_identity("cpu")),
        tmp_path / "packaged" / f"{device_identity('cpu').slug}.json",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(table(entry()))
    monkeypatch.setattr(dispatch_table, "PACKAGED", tmp_path / "packaged")
    assert load_dispatch_table(device="cpu").entries
    monkeypatch.setenv("NSA_DISPATCH_TABLE", str(tmp_path / "nowhere.json"))
    with pytest.raises(DispatchTableError, match=r"nowhere\.json.*No such file"):
        load_dispatch_table(device="cpu")
    with pytest.raises(DispatchTableError, match=r"elsewhere\.json.*No such file"):
        load_dispatch_table(tmp_path / "elsewhere.json", device="cpu")


def test_a_folder_in_place_of_a_file_is_refused(tmp_path):
    with pytest.raises(DispatchTableError, match="Is a directory"):
        read_dispatch_table(tmp_path)


def test_without_any_table_the_defaults_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(dispatch_table, "PACKAGED", tmp_path / "packaged")
    found = load_dispatch_table(device="cpu")
    assert found.entries == ()
    choice = found.lookup(DispatchTable.decode(table(entry())).entries[0].problem())
    assert (choice.path, choice.status, choice.tier) == ("gather", "default", "defaults")
    assert "no dispatch table" in choice.reason


def test_a_lookup_is_remembered():
    found = DispatchTable.decode(table(entry()))
    posed = found.entries[0].problem()
    assert found.lookup(posed) is found.lookup(posed)


def test_committed_tables_decode_and_name_their_device():
    for file in COMMITTED:
        found = read_dispatch_table(file)
        assert file.stem == found.device.slug
        assert found.encode() == file.read_bytes(), file
        for entry in found.entries:
            assert PATHS[entry.path].dispatchable
            assert entry.oracle_error <= entry.oracle_bound, (file, entry)
            assert entry.run_id

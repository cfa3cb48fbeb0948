"""Claims about dispatch: which choice a call gets and says it got, the chain where that cannot run, and what raises."""

import builtins
import importlib.util
import subprocess
import sys
import tracemalloc
import warnings
from collections import Counter
from pathlib import Path

import msgspec
import pytest
import torch

import nsa
from nsa import dispatch, dispatch_table
from nsa.device import device_identity, software_identity
from nsa.dispatch import DispatchWarning
from nsa.dispatch_entry import DispatchEntry
from nsa.dispatch_table import MAX_REMEMBERED, DispatchTable, load_dispatch_table, user_table_path
from nsa.errors import ArgumentError, DispatchTableError, StrictDispatchError
from nsa.paths import PATHS, Candidate, gather, reference
from nsa.problem import SelectionProblem
from nsa.selection import Selection
from nsa.workspace import Workspace

ROOT = Path(__file__).parents[2]
NOT_OURS = ("optuna", "rich", "typer", "matplotlib")


@pytest.fixture(autouse=True)
def _fresh_dispatch(monkeypatch, tmp_path):
    """As in a process that has not dispatched yet, with nothing packaged."""
    for name in ("_default_tables", "_forced_plans"):
        monkeypatch.setattr(dispatch, name, {})
    for name in ("_calls", "_steps"):
        monkeypatch.setattr(dispatch, name, Counter())
    monkeypatch.setattr(dispatch_table, "PACKAGED", tmp_path / "packaged")


def problem(**changes):
    """The problem that ``arguments()`` poses; a whole prefill where T is changed in that mode."""
    fields = {
        "mode": "decode", "dtype": "float32", "B": 1, "S": 1, "T": 32, "G": 2, "h": 2, "Dk": 8, "Dv": 8,
        "block_size": 8, "topk": 2,
    }  # fmt: skip
    return SelectionProblem(**{**fields, **changes})


def entry(posed, path, parameters=None, tied=(), **fields):
    """A table entry for a problem; by default at the path's default parameters."""
    filled = PATHS[path].defaults(posed, torch.device("cpu")) if parameters is None else parameters
    return DispatchEntry(
        **{name: getattr(posed, name) for name in SelectionProblem.__struct_fields__}, path=path, parameters=filled,
        tied=tied, median_us=1.0, peak_bytes=1, oracle_error=0.0, oracle_bound=1.0, kernels=(), run_id="run",
        date="2026-11-22", **fields,
    )  # fmt: skip


def table(*entries, **software):
    """A table of this device, made by this software but for what is changed."""
    return DispatchTable(
        device=device_identity("cpu"),
        entries=entries,
        software=msgspec.structs.replace(software_identity(), **software),
    )


def written(to, *entries):
    """A table file with these entries."""
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_bytes(table(*entries).encode())
    return to


def arguments(context=32, queries=1, requires_grad=False):
    """Query, key, value and selection of ``problem()``."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, *shape, 8, generator=generator).requires_grad_(requires_grad)
        for shape in ((queries, 2, 2), (2, context), (2, context))
    )
    blocks = torch.randint(0, context // 8, (1, queries, 2, 2), generator=generator, dtype=torch.int32)
    return query, key, value, Selection.from_blocks(blocks, block_size=8, context_length=context)


def executed(*args, **options):
    """The single record of a call, and its output."""
    with nsa.record_paths() as recorder:
        out = nsa.selection_attention(*args, **options)
    (record,) = recorder.executed
    return record, out


def without(monkeypatch, *names, reason="not today"):
    """Make paths unsupported everywhere."""
    for name in names:
        monkeypatch.setitem(PATHS, name, msgspec.structs.replace(PATHS[name], unsupported=lambda *_: reason))


def with_target(monkeypatch, name, function):
    """Make a path run a function of this module."""
    target = f"{__name__}:{function.__name__}"
    monkeypatch.setitem(PATHS, name, msgspec.structs.replace(PATHS[name], target=target))


def finds_out_late(*args, **options):
    """A path that learns only while it runs that it cannot."""
    raise nsa.UnsupportedPathError("found out late")


def breaks(*args, **options):
    """A path with a defect."""
    raise ZeroDivisionError("a defect")


# Lookups


def test_a_measured_problem_is_exact_and_names_its_entry():
    choice = table(entry(problem(T=64), "dense"), entry(problem(), "packed")).lookup(problem())
    assert (choice.path, choice.status, choice.entry, choice.tier) == ("packed", "exact", "run#1", "argument")


def test_an_unmeasured_batch_takes_the_next_larger_measured_one():
    found = table(*(entry(problem(B=batch), path) for batch, path in ((2, "dense"), (4, "packed"), (8, "varlen"))))
    choice = found.lookup(problem(B=3))
    assert (choice.path, choice.status) == ("packed", "bucket")
    assert "4" in choice.reason
    assert found.lookup(problem(B=4)).status == "exact"
    beyond = found.lookup(problem(B=9))
    assert (beyond.path, beyond.status) == ("varlen", "extrapolated")


def test_between_contexts_that_agree_the_upper_parameters_are_taken():
    found = table(entry(problem(), "gather", {"row_chunk": 0}), entry(problem(T=96), "gather", {"row_chunk": 64}))
    choice = found.lookup(problem(T=33))
    assert (choice.path, choice.parameters, choice.status) == ("gather", {"row_chunk": 64}, "interpolated")
    assert "32" in choice.reason
    assert "96" in choice.reason


def test_between_contexts_that_disagree_the_upper_one_is_taken_and_says_so():
    found = table(entry(problem(), "packed"), entry(problem(T=96), "varlen"))
    choice = found.lookup(problem(T=64))
    assert (choice.path, choice.status, choice.entry) == ("varlen", "interpolated", "run#1")
    assert "disagree" in choice.reason
    assert "packed" in choice.reason
    assert "varlen" in choice.reason


@pytest.mark.parametrize("context", [16, 128])
def test_beyond_the_measured_contexts_the_nearest_one_is_taken_as_extrapolated(context):
    choice = table(entry(problem(), "packed"), entry(problem(T=96), "varlen")).lookup(problem(T=context))
    assert (choice.path, choice.status) == ("packed" if context < 32 else "varlen", "extrapolated")
    assert "[32, 96]" in choice.reason


@pytest.mark.parametrize("change", [{"dtype": "bfloat16"}, {"h": 1}, {"topk": 3}, {"cache": "cold"}])
def test_another_kind_of_problem_gets_the_default(change):
    choice = table(entry(problem(), "packed")).lookup(problem(**change))
    assert (choice.path, choice.status) == ("gather", "default")
    assert "no measurement" in choice.reason


@pytest.mark.parametrize("measured", ["low", "high"])
def test_rows_of_another_overlap_are_answered_from_afar_but_one_query_has_no_neighbours(measured):
    asked = "high" if measured == "low" else "low"
    step = table(entry(problem(overlap=measured), "packed")).lookup(problem(overlap=asked))
    assert (step.path, step.status) == ("packed", "exact")
    whole = problem(mode="prefill", S=32, overlap=measured)
    found = table(entry(whole, "packed"))
    assert found.lookup(whole).status == "exact"
    other = found.lookup(msgspec.structs.replace(whole, overlap=asked))
    assert (other.path, other.status) == ("packed", "extrapolated")
    assert f"with {measured} overlap, none with {asked}" in other.reason
    both = table(entry(whole, "packed"), entry(msgspec.structs.replace(whole, overlap=asked), "varlen"))
    assert [both.lookup(one.problem()).path for one in both.entries] == ["packed", "varlen"]


def test_one_query_takes_what_was_measured_of_the_other_overlap_before_what_lies_beyond_its_own():
    found = table(entry(problem(overlap="low"), "packed"), entry(problem(overlap="high", T=96), "varlen"))
    for overlap in ("low", "high"):
        assert found.lookup(problem(overlap=overlap)).path == "packed"
        nearest = found.lookup(problem(overlap=overlap, T=96))
        assert (nearest.path, nearest.status) == ("varlen", "exact")
    beyond = found.lookup(problem(overlap="low", T=16))
    assert (beyond.path, beyond.status) == ("packed", "extrapolated")


@pytest.mark.parametrize("path", ["auto", "dense", "gather", "packed", "varlen", "causal_prefix"])
@pytest.mark.parametrize(("scale", "handed"), [(-0.3, 0.3), (0.0, 1.0)])
def test_no_path_is_handed_a_scale_that_is_not_above_0(path, scale, handed, monkeypatch):
    query, key, value, selection = arguments(queries=32)
    selection = Selection.from_blocks(
        torch.arange(4, dtype=torch.int32).expand(1, 32, 2, 4), block_size=8, context_length=32, complete=True
    )
    scales = []

    def spied_on(run):
        def spied(*args, scale, **options):
            scales.append(scale)
            return run(*args, scale=scale, **options)

        return spied

    for name, known in PATHS.items():
        monkeypatch.setitem(globals(), f"spied_{name}", spied_on(known.function()))
        monkeypatch.setitem(PATHS, name, msgspec.structs.replace(known, target=f"{__name__}:spied_{name}"))
    truth = reference.run(query, key, value, selection, scale=scale)
    out = nsa.selection_attention(query, key, value, selection, scale=scale, path=path)
    assert (out - truth).abs().max() < 1e-5
    assert set(scales) == {handed}


@pytest.mark.parametrize("mode", ["prefill", "train"])
def test_whole_prefills_are_one_family_and_later_chunks_another(mode):
    posed = problem(mode=mode, S=32)
    found = table(entry(posed, "packed"), entry(problem(mode=mode, S=64, T=64), "packed"))
    assert found.lookup(problem(mode=mode, S=48, T=48)).status == "interpolated"
    chunk = found.lookup(problem(mode=mode, S=32, T=48))
    assert (chunk.path, chunk.status) == ("dense", "default")


@pytest.mark.parametrize(
    ("changed", "field"), [({"torch": "1.13.1"}, "torch 1.13.1"), ({"driver": "535.1.2"}, "driver 535.1.2")]
)
def test_a_table_of_other_software_is_used_and_says_stale(changed, field):
    choice = table(entry(problem(), "packed"), **changed).lookup(problem())
    assert (choice.path, choice.status) == ("packed", "stale")
    assert field in choice.reason


def test_a_patch_release_of_torch_is_not_stale():
    newer = ".".join((*software_identity().torch.split("+")[0].split(".")[:2], "99"))
    assert table(entry(problem(), "packed"), torch=newer).lookup(problem()).status == "exact"


def test_only_a_driver_major_makes_a_table_stale():
    then = msgspec.structs.replace(software_identity(), driver="570.86.15")
    assert not then.stale_against(msgspec.structs.replace(then, driver="570.124.6"))
    assert "580" in then.stale_against(msgspec.structs.replace(then, driver="580.1"))


def test_strict_accepts_exact_and_bucket_only():
    near, far = arguments(), arguments(context=64)
    both = table(entry(problem(), "packed"), entry(problem(T=96), "packed"))
    larger = table(entry(problem(B=2), "packed"))
    for accepted, status in ((both, "exact"), (larger, "bucket")):
        assert executed(*near, table=accepted, strict=True)[0].status == status
    with pytest.raises(StrictDispatchError, match=r"'interpolated'.*expected one of \['bucket', 'exact'\]"):
        nsa.selection_attention(*far, table=both, strict=True)
    with pytest.raises(StrictDispatchError, match="'default'"):
        nsa.selection_attention(*near, table=table(), strict=True)


def test_a_misspelt_strict_is_an_error_and_not_plain_true():
    with pytest.raises(ArgumentError, match="strict is 'stale_ok', expected False, True or 'stale-ok'"):
        nsa.selection_attention(*arguments(), table=table(entry(problem(), "dense")), strict="stale_ok")


def test_block_indices_in_the_place_of_a_selection_are_told_what_makes_one_of_them():
    query, key, value, selection = arguments()
    with pytest.raises(ArgumentError, match=r"selection is a Tensor, expected a Selection; .*Selection\.from_blocks"):
        nsa.selection_attention(query, key, value, selection.indices)


def test_strict_refuses_stale_unless_that_is_ok():
    old = table(entry(problem(), "packed"), torch="1.13.1")
    with pytest.raises(StrictDispatchError, match="'stale'"):
        nsa.selection_attention(*arguments(), table=old, strict=True)
    record, _ = executed(*arguments(), table=old, strict="stale-ok")
    assert (record.path, record.status) == ("packed", "stale")
    between = table(entry(problem(T=16), "packed"), entry(problem(T=96), "packed"), torch="1.13.1")
    with pytest.raises(StrictDispatchError, match="'interpolated'"):
        nsa.selection_attention(*arguments(), table=between, strict="stale-ok")


def test_strict_does_not_go_down_the_chain(monkeypatch):
    without(monkeypatch, "packed")
    with pytest.raises(nsa.UnsupportedPathError, match="packed: unsupported: not today"):
        nsa.selection_attention(*arguments(), table=table(entry(problem(), "packed")), strict=True)


# Order of sources


def test_each_source_is_taken_before_the_next(tmp_path, monkeypatch):
    identity = device_identity("cpu")

    def taken(**options):
        monkeypatch.setattr(dispatch, "_default_tables", {})
        tier = dispatch.active_dispatch_table("cpu").lookup(problem()).tier
        return executed(*arguments(), **options)[0].path, tier

    assert taken() == ("gather", "defaults")
    written(tmp_path / "packaged" / f"{identity.slug}.json", entry(problem(), "dense"))
    assert taken() == ("dense", "packaged")
    written(user_table_path(identity), entry(problem(), "packed"))
    assert taken() == ("packed", "user")
    named = written(tmp_path / "named.json", entry(problem(), "varlen"))
    monkeypatch.setenv("NSA_DISPATCH_TABLE", str(named))
    assert taken() == ("varlen", "environment")
    with nsa.use_dispatch_table(table(entry(problem(), "dense"))):
        assert taken()[0] == "dense"
        assert taken(table=table(entry(problem(), "packed")))[0] == "packed"
        with nsa.use_dispatch_table(load_dispatch_table(named)) as inner:
            assert taken() == ("varlen", "argument")
            assert inner.lookup(problem()).tier == "argument"
        assert taken()[0] == "dense"
    assert taken() == ("varlen", "environment")


def test_a_source_given_to_load_wins_over_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("NSA_DISPATCH_TABLE", str(written(tmp_path / "named.json", entry(problem(), "varlen"))))
    found = load_dispatch_table(written(tmp_path / "given.json", entry(problem(), "dense")))
    assert found.lookup(problem()).path == "dense"


def test_a_broken_users_table_is_an_error_not_a_reason_to_go_on(tmp_path):
    identity = device_identity("cpu")
    written(tmp_path / "packaged" / f"{identity.slug}.json", entry(problem(), "dense"))
    written(user_table_path(identity), entry(problem(), "packed")).write_text("{")
    with pytest.raises(DispatchTableError, match="user-data"):
        nsa.selection_attention(*arguments())


def test_the_process_table_is_loaded_once_and_no_call_opens_a_file(monkeypatch):
    written(user_table_path(device_identity("cpu")), entry(problem(), "packed"))
    workspace = Workspace()
    nsa.selection_attention(*arguments(), workspace=workspace)

    def refuse(*args, **options):
        raise AssertionError(f"a file was opened: {args}")

    for owner, name in ((builtins, "open"), (Path, "open"), (Path, "read_bytes"), (Path, "stat"), (Path, "exists")):
        monkeypatch.setattr(owner, name, refuse)
    monkeypatch.setattr(dispatch, "load_dispatch_table", refuse)
    for _ in range(2):
        with nsa.record_paths() as recorder:
            nsa.selection_attention(*arguments(), workspace=workspace)
    nsa.selection_attention(*arguments(context=64))
    assert [record.path for record in recorder.executed] == ["packed"]


# Named paths


def test_what_dispatch_remembers_of_contexts_that_grow_stays_within_32_mib():
    found, query, key, value = table(), *arguments(context=400)[:3]
    blocks = torch.zeros(1, 1, 2, 2, dtype=torch.int32)

    def call(context):
        selection = Selection.from_blocks(blocks, block_size=8, context_length=context)
        nsa.selection_attention(query, key[:, :, :context], value[:, :, :context], selection, table=found)

    call(399)
    tracemalloc.start()
    for context in range(50, 350):
        call(context)
    grown = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(found.plans) == 301
    assert grown / 300 * MAX_REMEMBERED < 32 * 2**20


def test_kinds_of_calls_beyond_the_most_that_are_remembered_are_served_all_the_same(monkeypatch):
    for module in (dispatch, dispatch_table):
        monkeypatch.setattr(module, "MAX_REMEMBERED", 3)
    found = table(entry(problem(T=40), "packed"))
    for context in (16, 24, 40, 16, 24, 32, 48, 40):
        record, _ = executed(*arguments(context=context), table=found)
        assert record.path == "packed"
        assert len(found.plans) <= 3


def test_a_named_path_never_falls_back(monkeypatch):
    without(monkeypatch, "dense")
    with pytest.raises(nsa.UnsupportedPathError, match=r"^unsupported: not today"):
        nsa.selection_attention(*arguments(), path="dense", table=table(entry(problem(), "packed")))
    with_target(monkeypatch, "packed", finds_out_late)
    with pytest.raises(nsa.UnsupportedPathError, match=r"^unsupported: found out late"):
        nsa.selection_attention(*arguments(), path="packed")
    assert not nsa.dispatch_stats().calls


@pytest.mark.parametrize("name", ["dense", "gather", "packed", "varlen", "reference"])
def test_a_named_path_is_forced_and_recorded_with_its_parameters(name):
    record, _ = executed(*arguments(), path=name)
    assert (record.operation, record.path, record.status) == ("selection", name, "forced")
    defaults = PATHS[name].defaults(problem(), torch.device("cpu"))
    assert defaults.items() <= record.parameters.items()


def test_parameters_of_a_named_path_are_merged_with_its_defaults():
    record, _ = executed(*arguments(queries=4), path="packed", parameters={"bucket_rounding": 16})
    assert record.parameters["bucket_rounding"] == 16
    assert record.parameters["reserve_rows"] == 0


def test_parameters_with_auto_are_refused():
    with pytest.raises(ArgumentError, match="got path='auto'"):
        nsa.selection_attention(*arguments(), parameters={"row_chunk": 64})


def test_an_unknown_parameter_of_a_named_path_is_refused_with_those_it_has():
    with pytest.raises(nsa.UnsupportedPathError, match=r"no parameter \['row_chnk'\].*row_chunk"):
        nsa.selection_attention(*arguments(), path="gather", parameters={"row_chnk": 64})


@pytest.mark.parametrize("option", ["prefer", "avoid"])
def test_an_unknown_path_to_prefer_or_avoid_is_refused_with_the_known_ones(option):
    with pytest.raises(ArgumentError, match=r"unknown path 'flash'.*expected.*'varlen'"):
        nsa.selection_attention(*arguments(), table=table(), **{option: "flash"})


def test_tensors_on_a_device_that_is_neither_cpu_nor_gpu_are_refused():
    query, key, value, selection = arguments()
    selection = Selection.from_blocks(selection.indices.to("meta"), block_size=8, context_length=32)
    with pytest.raises(ArgumentError, match=r"query is on meta, expected one of \['cpu', 'cuda'\]"):
        nsa.selection_attention(query.to("meta"), key.to("meta"), value.to("meta"), selection)


def test_an_unknown_path_is_refused_with_the_known_ones():
    with pytest.raises(ArgumentError, match=r"unknown path 'dens'; expected 'auto' or one of .*'dense'"):
        nsa.selection_attention(*arguments(), path="dens")


# The chain

TIED = (Candidate(path="dense", parameters={"query_chunk": 0}),)


@pytest.mark.parametrize(
    ("broken", "tied", "taken"),
    [
        (("gather",), TIED, "dense"),
        (("gather",), (), "varlen"),
        (("gather", "dense"), TIED, "varlen"),
        (("gather", "varlen"), (), "dense"),
        (("gather", "varlen", "dense"), (), "packed"),
    ],
)
@pytest.mark.parametrize("late", [False, True], ids=["known beforehand", "found out late"])
def test_where_the_choice_cannot_run_the_chain_is_followed_and_told(monkeypatch, broken, tied, taken, late):
    for name in broken:
        if late:
            with_target(monkeypatch, name, finds_out_late)
        else:
            without(monkeypatch, name)
    found = table(entry(problem(), "gather", tied=tied))
    reason = "found out late" if late else "not today"
    with pytest.warns(DispatchWarning) as told:
        record, out = executed(*arguments(), table=found)
    assert [str(warning.message).split(": ")[1] for warning in told] == list(broken)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        executed(*arguments(), table=found)
    assert (record.path, record.status) == (taken, "default")
    for name in broken:
        assert f"{name}: unsupported: {reason}" in record.reason
    assert nsa.dispatch_stats().calls == {f"{taken} (default)": 2}
    assert nsa.dispatch_stats().steps == {f"{name}: unsupported: {reason}": 2 for name in broken}
    assert torch.equal(out, nsa.selection_attention(*arguments(), path=taken))


def test_a_choice_that_is_in_the_chain_itself_is_tried_once(monkeypatch):
    without(monkeypatch, "varlen")
    with pytest.warns(DispatchWarning):
        record, _ = executed(*arguments(), table=table(entry(problem(), "varlen")))
    assert record.path == "dense"
    assert nsa.dispatch_stats().steps == {"varlen: unsupported: not today": 1}


@pytest.mark.parametrize("avoid", ["gather", "dense", "varlen"])
def test_what_is_to_be_avoided_is_taken_nowhere_down_the_chain(monkeypatch, avoid):
    without(monkeypatch, *({"gather", "varlen", "dense"} - {avoid}))
    with pytest.warns(DispatchWarning):
        record, _ = executed(*arguments(), table=table(entry(problem(), "gather", tied=TIED)), avoid=avoid)
    assert record.path == "packed"


def test_where_only_the_avoided_path_is_known_the_error_says_so():
    selection = Selection.window(4, rows=(1, 1, 2), context_length=32, device=torch.device("cpu"))
    query, key, value, _ = arguments()
    with pytest.raises(nsa.UnsupportedPathError, match=r"sdpa_window is disallowed.*no other path"):
        nsa.selection_attention(query, key, value, selection, table=table(), avoid="sdpa_window")


def test_where_the_whole_chain_cannot_run_every_reason_is_given(monkeypatch):
    without(monkeypatch, "gather", "varlen", "dense", "packed")
    with pytest.raises(nsa.UnsupportedPathError) as raised:
        nsa.selection_attention(*arguments(), table=table(entry(problem(), "gather")))
    for name in ("gather", "varlen", "dense", "packed"):
        assert f"{name}: unsupported: not today" in str(raised.value)


@pytest.mark.parametrize("options", [{}, {"path": "packed"}], ids=["auto", "named"])
def test_an_exception_that_is_not_unsupported_passes_through(monkeypatch, options):
    with_target(monkeypatch, "packed", breaks)
    with nsa.use_dispatch_table(table(entry(problem(), "packed"))), nsa.record_paths() as recorder:
        with pytest.raises(ZeroDivisionError, match="a defect"):
            nsa.selection_attention(*arguments(), **options)
        gather.run(*arguments(), scale=1.0)
    assert [(record.path, record.status) for record in recorder.executed] == [("gather", "direct")]
    assert not nsa.dispatch_stats().calls
    assert not nsa.dispatch_stats().steps


# Records and counts


def test_executions_are_recorded_in_order_with_their_status():
    found = table(entry(problem(), "packed"))
    with nsa.record_paths() as outer:
        nsa.selection_attention(*arguments(), table=found)
        with nsa.record_paths() as inner:
            nsa.selection_attention(*arguments(queries=4), table=found)
            nsa.selection_attention(*arguments(requires_grad=True), table=found)
        gather.run(*arguments(), scale=1.0, row_chunk=64)
        nsa.selection_attention(*arguments(), path="dense")
    nsa.selection_attention(*arguments(), path="dense")
    seen = [(record.operation, record.path, record.status, record.reason) for record in outer.executed]
    assert seen[0] == ("selection", "packed", "exact", "measured")
    assert [record[1:3] for record in seen[1:]] == [
        ("dense", "default"), ("dense", "default"), ("gather", "direct"), ("dense", "forced")
    ]  # fmt: skip
    assert inner.executed == outer.executed[1:3]
    assert outer.executed[3].parameters == {"row_chunk": 64}


def test_calls_are_counted_by_path_and_status():
    for options in ({}, {}, {"path": "dense"}):
        nsa.selection_attention(*arguments(), table=table(entry(problem(), "packed")), **options)
    assert nsa.dispatch_stats().calls == {"packed (exact)": 2, "dense (forced)": 1}
    assert nsa.dispatch_stats().steps == {}


def test_the_mode_follows_from_the_call():
    posed = [problem(), problem(mode="prefill", S=4), problem(mode="train"), problem(mode="train", S=4)]
    found = table(
        *(entry(each, path) for each, path in zip(posed, ("varlen", "packed", "gather", "dense"), strict=True))
    )
    calls = [arguments(), arguments(queries=4), arguments(requires_grad=True), arguments(queries=4, requires_grad=True)]
    seen = [executed(*call, table=found)[0] for call in calls]
    assert [record.path for record in seen] == ["varlen", "packed", "gather", "dense"]
    assert {record.status for record in seen} == {"exact"}
    with torch.no_grad():
        assert executed(*calls[2], table=found)[0].path == "varlen"


# Arguments


@pytest.mark.parametrize("path", ["auto", "dense", "gather", "packed", "varlen"])
def test_a_context_shorter_than_the_cache_is_a_slice(path):
    query, key, value, selection = arguments()
    longer = [torch.cat((each, torch.full_like(each, float("nan"))), 2) for each in (key, value)]
    record, out = executed(query, *longer, selection, path=path)
    assert torch.equal(out, nsa.selection_attention(query, key, value, selection, path=record.path))


def bad_calls():
    """(what is wrong, arguments, words that the error must say)."""
    query, key, value, selection = arguments()
    wide = Selection.from_blocks(torch.zeros(1, 1, 3, 2, dtype=torch.int32), block_size=8, context_length=32)
    beyond = Selection.from_blocks(selection.indices, block_size=8, context_length=33)
    ragged = Selection.from_blocks(selection.indices, block_size=8, context_length=torch.tensor([40]))
    return {
        "query of 4 dims": ((query[:, :, 0], key, value, selection), ("(B, S, G, h, Dk)", "(1, 1, 2, 8)")),
        "key of 3 dims": ((query, key[:, 0], value, selection), ("(B, G, T, Dk)", "(1, 32, 8)")),
        "key of 2 dims": ((query, key[0, 0], value, selection), ("(B, G, T, Dk)", "(32, 8)")),
        "value of 2 dims": ((query, key, value[0, 0], selection), ("(B, G, T, Dv)", "(32, 8)")),
        "groups": ((query, key[:, :1], value, selection), ("key has shape (1, 1, 32, 8)", "expected (1, 2, 32, 8)")),
        "width": ((query, key[..., :4], value, selection), ("key has shape (1, 2, 32, 4)", "expected (1, 2, 32, 8)")),
        "keys": ((query, key, value[:, :, :8], selection), ("value has shape (1, 2, 8, 8)", "expected (1, 2, 32, 8)")),
        "rows": ((query, key, value, wide), ("selection rows has shape (1, 1, 3)", "expected (1, 1, 2)")),
        "dtypes": ((query, key.double(), value, selection), ("torch.float32, torch.float64", "float16")),
        "integers": ((query.int(), key.int(), value.int(), selection), ("torch.int32", "bfloat16")),
        "devices": ((query, key.to("meta"), value, selection), ("cpu", "meta", "move")),
        "context": ((query, key, value, beyond), ("context_length 33", "32 keys")),
        "ragged context": ((query, key, value, ragged), ("[40]", "32 keys")),
    }


@pytest.mark.parametrize("path", ["auto", "dense"])
@pytest.mark.parametrize("what", bad_calls())
def test_arguments_that_disagree_are_an_error_naming_got_and_expected(what, path):
    call, words = bad_calls()[what]
    with pytest.raises(ArgumentError) as raised:
        nsa.selection_attention(*call, path=path)
    for word in words:
        assert word in str(raised.value)


# The package


def test_importing_nsa_pulls_in_nothing_of_the_tool():
    code = f"import sys, nsa; print([name for name in {NOT_OURS} if name in sys.modules], 'tuner' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout.split("\n")[0] == "[] False"


@pytest.fixture
def other():
    """The same package under another name, as two commits are compared."""
    place = ROOT / "nsa"
    spec = importlib.util.spec_from_file_location(
        "nsa_other", place / "__init__.py", submodule_search_locations=[str(place)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["nsa_other"] = module
    spec.loader.exec_module(module)
    yield module
    for name in [name for name in sys.modules if name.split(".")[0] == "nsa_other"]:
        del sys.modules[name]


def test_nsa_under_two_names_keeps_two_registries_and_two_recorders(other):
    query, key, value, selection = arguments()
    twin = other.Selection.from_blocks(selection.indices, block_size=8, context_length=32)
    with nsa.record_paths() as mine, other.record_paths() as theirs:
        out = nsa.selection_attention(query, key, value, selection, path="dense")
        same = other.selection_attention(query, key, value, twin, path="gather")
    assert [record.path for record in mine.executed] == ["dense"]
    assert [record.path for record in theirs.executed] == ["gather"]
    torch.testing.assert_close(out, same)
    assert other.PATHS is not nsa.PATHS
    assert other.PATHS.keys() == nsa.PATHS.keys()
    assert other.PATHS["gather"].function() is not nsa.PATHS["gather"].function()
    assert other.PATHS["gather"].function().__module__ == "nsa_other.paths.gather"
    assert nsa.dispatch_stats().calls == {"dense (forced)": 1}
    assert other.dispatch_stats().calls == {"gather (forced)": 1}
    assert issubclass(other.UnsupportedPathError, RuntimeError)
    assert not issubclass(other.UnsupportedPathError, nsa.UnsupportedPathError)

"""Flags are read once, at the edge; they force what they name in every mode and refuse what they do not understand."""

from __future__ import annotations

import importlib
import importlib.util
import os

import msgspec
import pytest
import torch

import nsa.flags
import nsa.paths
from nsa.attention import NSAAttention, NSAConfig
from nsa.device import device_identity, software_identity
from nsa.dispatch import dispatch_stats, selection_attention, use_dispatch_table
from nsa.dispatch_entry import Choice
from nsa.dispatch_table import DispatchTable
from nsa.errors import FlagError, UnsupportedPathError
from nsa.flags import FLAGS, FORCING, RESERVES, Flags, read_flags
from nsa.paths import sdpa_compressed, sdpa_window
from nsa.trace import record_paths
from nsa.workspace import Workspace

PR31 = {
    "NSA_PREFILL_BATCHED": "1",
    "NSA_USE_SEL_PACK": "1",
    "NSA_SEL_RANGES_V2": "1",
    "NSA_USE_FA2": "1",
    "NSA_USE_FA2_CMP": "1",
    "NSA_USE_FA2_WIN": "0",
    "NSA_USE_SEL_VARLEN": "1",
    "NSA_VARLEN_RESERVE_N": "8192",
    "NSA_VARLEN_RESERVE_K": "33554432",
}
CONFIG = NSAConfig(
    dim=8, num_heads=2, num_kv_heads=1, head_dim=4, kernel_size=8, kernel_stride=4, block_size=8, topk=4, window_size=9
)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    """No flags but those a test sets, no table but the defaults."""
    for name in [name for name in os.environ if name.startswith("NSA_")]:
        monkeypatch.delenv(name)
    with use_dispatch_table(DispatchTable(device=device_identity("cpu"), software=software_identity())):
        yield


def set_flags(monkeypatch, flags: dict[str, str]) -> None:
    for name, value in flags.items():
        monkeypatch.setenv(name, value)


def layer_now() -> NSAAttention:
    torch.manual_seed(0)
    return NSAAttention(CONFIG, workspace=Workspace())


def tokens(length: int = 21) -> torch.Tensor:
    return torch.randn(1, length, 8, generator=torch.Generator().manual_seed(length))


def executed_in(layer: NSAAttention, mode: str, operation: str = "selection"):
    """Records of one operation in one call of a mode."""
    _, cache = layer.prefill(tokens())
    with record_paths() as recorder:
        if mode == "forward":
            layer(tokens()).sum().backward()
        elif mode == "prefill":
            layer.prefill(tokens())
        else:
            layer.decode(tokens(1), cache)
    return [record for record in recorder.executed if record.operation == operation]


def test_an_empty_environment_gives_the_defaults():
    assert read_flags({}) == Flags()
    assert read_flags({"HOME": "/", "XNSA_TYPO": "1"}) == Flags()
    assert Flags().batched_prefill
    assert Flags().ranges_v2


def test_every_flag_of_the_table_is_read_and_has_a_meaning():
    sample = {bool: "1", int: "7", str: "/tmp/table.json"}
    for name, (kind, meaning) in FLAGS.items():
        assert read_flags({name: sample[kind]}).given == {name: sample[kind]}
        assert meaning
    assert set(FORCING) | set(RESERVES) < set(FLAGS)
    assert set(PR31) < set(FLAGS)


@pytest.mark.parametrize("name", ["NSA_USE_SEL_VARLAN", "NSA_", "NSA_use_fa2", "NSA_USE_FA2 "])
def test_an_unknown_flag_is_an_error_that_lists_the_valid_ones(name):
    with pytest.raises(FlagError) as raised:
        read_flags({name: "1"})
    assert f"unknown flag {name}='1'" in str(raised.value)
    assert all(flag in str(raised.value) for flag in FLAGS)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("NSA_USE_FA2", "true", "0 or 1"),
        ("NSA_USE_FA2", "", "0 or 1"),
        ("NSA_PREFILL_BATCHED", "2", "0 or 1"),
        ("NSA_VARLEN_RESERVE_N", "-1", "a decimal number"),
        ("NSA_VARLEN_RESERVE_K", "1e6", "a decimal number"),
        ("NSA_SEL_PACK_RESERVE_L", " 5", "a decimal number"),
        ("NSA_SEL_PACK_RESERVE_N", "٣", "a decimal number"),
        ("NSA_DISPATCH_TABLE", "", "a file name"),
    ],
)
def test_a_malformed_value_says_what_it_got_and_what_was_expected(name, text, expected):
    with pytest.raises(FlagError) as raised:
        read_flags({name: text})
    message = str(raised.value)
    assert f"{name} is {text!r}, expected {expected}" in message
    assert all(flag in message for flag in FLAGS)


@pytest.mark.parametrize(
    ("switch", "reserve"),
    [
        ("NSA_USE_SEL_VARLEN", "NSA_VARLEN_RESERVE_N"),
        ("NSA_USE_SEL_VARLEN", "NSA_VARLEN_RESERVE_K"),
        ("NSA_USE_SEL_PACK", "NSA_SEL_PACK_RESERVE_N"),
        ("NSA_USE_SEL_PACK", "NSA_SEL_PACK_RESERVE_L"),
    ],
)
def test_a_reserve_for_a_path_that_is_switched_off_is_a_contradiction(switch, reserve):
    with pytest.raises(FlagError, match=f"{switch}=0 contradicts {reserve}=64"):
        read_flags({switch: "0", reserve: "64"})
    assert read_flags({switch: "0"}).path is None


def test_varlen_wins_over_packed_and_what_lost_is_reported():
    flags = read_flags({"NSA_USE_SEL_VARLEN": "1", "NSA_USE_SEL_PACK": "1", "NSA_SEL_PACK_RESERVE_N": "5"})
    assert flags.path == "varlen"
    assert set(flags.overridden) == {"NSA_USE_SEL_PACK", "NSA_SEL_PACK_RESERVE_N"}
    assert flags.reserves == {}
    only = read_flags({"NSA_USE_SEL_VARLEN": "0", "NSA_USE_SEL_PACK": "1"})
    assert (only.path, only.overridden) == ("packed", ())
    assert read_flags({"NSA_USE_SEL_VARLEN": "1", "NSA_USE_SEL_PACK": "0"}).overridden == ()


def test_reserves_become_the_paths_parameters():
    varlen = read_flags({"NSA_USE_SEL_VARLEN": "1", "NSA_VARLEN_RESERVE_N": "3", "NSA_VARLEN_RESERVE_K": "4"})
    assert varlen.adjust("varlen", {"row_chunk": 7}) == {"row_chunk": 7, "reserve_rows": 3, "reserve_keys": 4}
    packed = read_flags({"NSA_USE_SEL_PACK": "1", "NSA_SEL_PACK_RESERVE_N": "3", "NSA_SEL_PACK_RESERVE_L": "4"})
    assert packed.adjust("packed", {}) == {"reserve_rows": 3, "reserve_length": 4}
    assert packed.adjust("dense", {"query_chunk": 1}) == {"query_chunk": 1}


def test_fa2_disallows_and_the_branch_flags_speak_for_their_branch():
    def allowed(environ):
        flags = read_flags(environ)
        return flags.flash_attention, flags.flash_attention_compression, flags.flash_attention_window

    assert allowed({}) == (True, None, None)
    assert allowed({"NSA_USE_FA2": "1"}) == (True, True, True)
    assert allowed({"NSA_USE_FA2": "0"}) == (False, False, False)
    assert allowed({"NSA_USE_FA2": "0", "NSA_USE_FA2_CMP": "1"}) == (False, True, False)
    assert allowed({"NSA_USE_FA2_WIN": "1"}) == (True, None, True)
    assert allowed(PR31) == (True, True, False)
    assert read_flags({"NSA_USE_FA2": "0"}).adjust("varlen", {"backend": "torch"}) == {"backend": "segment"}
    assert read_flags({"NSA_USE_FA2": "1"}).adjust("varlen", {}) == {}


@pytest.mark.parametrize("mode", ["forward", "prefill", "decode"])
@pytest.mark.parametrize(
    ("environ", "path", "parameters"),
    [
        ({"NSA_USE_SEL_VARLEN": "1"}, "varlen", {"reserve_rows": 0, "reserve_keys": 0}),
        ({"NSA_USE_SEL_PACK": "1", "NSA_SEL_PACK_RESERVE_N": "32"}, "packed", {"reserve_rows": 32}),
        ({**PR31, "NSA_VARLEN_RESERVE_K": "4096"}, "varlen", {"reserve_rows": 8192, "reserve_keys": 4096}),
    ],
)
def test_a_flag_that_names_a_path_forces_it_in_every_mode(monkeypatch, mode, environ, path, parameters):
    set_flags(monkeypatch, environ)
    (record,) = executed_in(layer_now(), mode)
    assert (record.path, record.status) == (path, "forced")
    assert parameters.items() <= record.parameters.items()


def test_without_flags_dispatch_chooses():
    assert {executed_in(layer_now(), mode)[0].status for mode in ("forward", "prefill", "decode")} == {"default"}


@pytest.mark.parametrize("mode", ["forward", "prefill", "decode"])
def test_a_forced_path_that_cannot_run_raises(mode):
    layer = layer_now()
    layer.flags = Flags(path="flex", ranges_v2=False)
    cache = layer.empty_cache(1, capacity=1, device=torch.device("cpu"))
    arguments = (tokens(1), cache) if mode == "decode" else (tokens(),)
    with pytest.raises(UnsupportedPathError, match=r"^unsupported: needs blocks"):
        getattr(layer, mode)(*arguments)


def test_flags_are_read_when_a_layer_is_constructed_and_never_after(monkeypatch):
    layer = layer_now()
    monkeypatch.setenv("NSA_USE_SEL_PACK", "1")
    assert executed_in(layer, "decode")[0].path != "packed"
    assert executed_in(layer_now(), "decode")[0].path == "packed"
    monkeypatch.setenv("NSA_USE_SEL_PACK", "yes")
    assert executed_in(layer, "decode")[0].path != "packed"
    with pytest.raises(FlagError, match="NSA_USE_SEL_PACK is 'yes'"):
        layer_now()


def test_flags_are_not_read_at_import(monkeypatch):
    monkeypatch.setenv("NSA_TYPO", "1")
    assert nsa.flags.__file__ is not None
    spec = importlib.util.spec_from_file_location("nsa.flags_once_more", nsa.flags.__file__)
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    with pytest.raises(FlagError, match="NSA_TYPO"):
        fresh.read_flags()


def test_prefill_batched_0_runs_token_by_token_to_the_same_cache(monkeypatch):
    batched = layer_now()
    set_flags(monkeypatch, {"NSA_PREFILL_BATCHED": "0"})
    sequential = layer_now()
    x = tokens()
    with record_paths() as recorder:
        y, cache = sequential.prefill(x)
    assert sum(record.operation == "selection" for record in recorder.executed) == x.shape[1]
    other_y, other_cache = batched.prefill(x)
    assert (cache.length, cache.compressed_length) == (other_cache.length, other_cache.compressed_length)
    for mine, other in ((y, other_y), (cache.compressed_value, other_cache.compressed_value)):
        assert (mine - other).abs().max() <= 8 * torch.finfo(torch.float32).eps * other.abs().max()


def test_ranges_v2_0_derives_ranges_by_the_loop_to_the_same_output(monkeypatch):
    seen = []
    original = selection_attention
    monkeypatch.setattr(
        "nsa.attention.selection_attention",
        lambda query, key, value, selection, **rest: (
            seen.append(selection) or original(query, key, value, selection, **rest)
        ),
    )
    y, _ = layer_now().prefill(tokens())
    set_flags(monkeypatch, {"NSA_SEL_RANGES_V2": "0"})
    other, cache = layer_now().prefill(tokens())
    layer_now().decode(tokens(1), cache)
    assert [selection.form for selection in seen] == ["blocks", "ranges", "ranges"]
    assert torch.equal(seen[0].ranges, seen[1].ranges)
    assert (y - other).abs().max() <= 4 * torch.finfo(torch.float32).eps * y.abs().max()


class VarlenTable(DispatchTable, frozen=True, kw_only=True, eq=False, dict=True):
    """A table whose every choice is varlen with a FlashAttention backend."""

    def lookup(self, problem):  # noqa: ARG002  the signature of a table
        parameters = {"backend": "torch", "row_chunk": 0, "reserve_rows": 0, "reserve_keys": 0}
        return Choice(path="varlen", parameters=parameters, status="exact", tier="argument", reason="measured")


def test_fa2_0_and_reserves_change_the_parameters_of_what_dispatch_chose(monkeypatch):
    table = VarlenTable(device=device_identity("cpu"), software=software_identity())
    set_flags(monkeypatch, {"NSA_USE_FA2": "0", "NSA_VARLEN_RESERVE_N": "77"})
    layer = NSAAttention(CONFIG, workspace=Workspace(), dispatch_table=table)
    for mode in ("forward", "prefill", "decode"):
        (record,) = executed_in(layer, mode)
        assert (record.path, record.parameters["backend"], record.parameters["reserve_rows"]) == (
            "varlen",
            "segment",
            77,
        )


BRANCH_FLAGS = pytest.mark.parametrize(
    ("operation", "flag", "flash", "other"),
    [
        ("compression", "NSA_USE_FA2_CMP", "flash_attn_compressed", "sdpa_compressed"),
        ("window", "NSA_USE_FA2_WIN", "flash_attn_window", "sdpa_window"),
    ],
)


@BRANCH_FLAGS
@pytest.mark.parametrize("mode", ["forward", "prefill", "decode"])
def test_a_branch_flag_of_0_forbids_flash_attention_even_where_the_table_names_it(
    monkeypatch, mode, operation, flag, flash, other
):
    able(monkeypatch, flash, other)
    assert executed_in(layer_with(FlashTable), mode, operation)[0].path == flash
    set_flags(monkeypatch, {flag: "0"})
    (record,) = executed_in(layer_with(FlashTable), mode, operation)
    assert (record.path, record.status) == (other, "default")
    assert record.reason == f"{flash} is disallowed; measured"


@BRANCH_FLAGS
@pytest.mark.parametrize("mode", ["forward", "prefill", "decode"])
def test_a_branch_flag_of_1_takes_flash_attention_whatever_the_table_says(
    monkeypatch, mode, operation, flag, flash, other
):
    able(monkeypatch, flash, other)
    set_flags(monkeypatch, {flag: "1"})
    (record,) = executed_in(layer_with(DispatchTable), mode, operation)
    assert (record.path, record.status) == (flash, "forced")


@BRANCH_FLAGS
def test_a_branch_flag_of_1_that_cannot_be_is_a_counted_step_with_its_reason(
    monkeypatch, operation, flag, flash, other
):
    set_flags(monkeypatch, {flag: "1"})
    (record,) = executed_in(layer_now(), "forward", operation)
    why = f"{flash}: unsupported: flash_attn needs a CUDA device"
    assert (record.path, record.status) == (other, "default")
    assert record.reason == f"{why}; no dispatch table for this device"
    assert dispatch_stats().steps[why] > 0


def able(monkeypatch, flash: str, other: str) -> None:
    """Make the FlashAttention path one that runs here: as the other, under its own name."""
    known, twin = nsa.paths.PATHS[flash], nsa.paths.PATHS[other]
    named = {"name": flash, "target": f"{__name__}:{flash}"}
    monkeypatch.setitem(nsa.paths.PATHS, flash, msgspec.structs.replace(twin, **named))
    assert known.operations == twin.operations


def flash_attn_window(*tensors, **options):
    return relabelled("window", "flash_attn_window", sdpa_window.run, *tensors, **options)


def flash_attn_compressed(*tensors, **options):
    return relabelled("compression", "flash_attn_compressed", sdpa_compressed.run, *tensors, **options)


def relabelled(operation, path, run, *tensors, **options):
    module = importlib.import_module(run.__module__)
    report = module.executed
    module.executed = lambda _operation, _path, parameters: report(operation, path, parameters)
    try:
        return run(*tensors, **options)
    finally:
        module.executed = report


class FlashTable(DispatchTable, frozen=True, kw_only=True, eq=False, dict=True):
    """A table that names FlashAttention in the branches."""

    def lookup(self, problem):
        path = {"window": "flash_attn_window", "compression": "flash_attn_compressed", "selection": "dense"}
        filled = nsa.paths.PATHS[path[problem.operation]].defaults(problem, torch.device("cpu"))
        named = path[problem.operation]
        return Choice(path=named, parameters=filled, status="exact", tier="argument", reason="measured")


def layer_with(table: type[DispatchTable]) -> NSAAttention:
    torch.manual_seed(0)
    made = table(device=device_identity("cpu"), software=software_identity())
    return NSAAttention(CONFIG, workspace=Workspace(), dispatch_table=made)


def test_a_record_names_a_tables_file_without_its_folder():
    flags = read_flags({"NSA_DISPATCH_TABLE": "/somewhere/else/table.json", "NSA_USE_FA2": "0"})
    assert flags.dispatch_table == "/somewhere/else/table.json"
    assert flags.recorded == {"NSA_DISPATCH_TABLE": "table.json", "NSA_USE_FA2": "0"}

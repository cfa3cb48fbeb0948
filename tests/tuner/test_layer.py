"""Claims about the level of the layer: its oracle is the paper's layer, combinations are proven, entries name it."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from nsa import NSAAttention, NSAConfig
from nsa.device import device_identity, software_identity
from nsa.dispatch import selection_attention
from nsa.dispatch_table import DispatchTable, read_dispatch_table
from nsa.errors import DispatchTableError, UnsupportedPathError
from nsa.flags import Flags
from nsa.paths import PATHS, Candidate, dense
from nsa.problem import Mode, SelectionProblem
from nsa.trace import record_paths
from tests.nsa.reference_layer import cast, reference_layer
from tuner.attest import FellBack
from tuner.inputs import make_inputs
from tuner.layer import LAYER, OPERATIONS, LayerSizes, choices_of, combined
from tuner.layer_bench import LayerBench, LayerTrial
from tuner.layer_oracle import BRANCHES, chosen_blocks, decided, layer_rows, weights_of
from tuner.layer_search import LayerSearch
from tuner.oracle import WrongResult
from tuner.record import Record, RunFolder, Sample
from tuner.space import EFFORTS
from tuner.sweep import SweepError, read_sweep
from tuner.table import entries_of, kept_entries, write_table

CPU = torch.device("cpu")
SIZES = LayerSizes(window=20, kernel_size=8, kernel_stride=4)
SWEEP = """
name = "tiny"
description = "a layer in decode"
level = "layer"
budget_s = 3.0
paths = ["gather", "dense", "sdpa_window", "sdpa_compressed"]
[axes]
modes = ["decode"]
contexts = [40]
heads = [4]
kv_heads = [2]
head_dim = [8]
block_size = [8]
topk = [4]
window = [20]
kernel_size = [8]
kernel_stride = [4]
"""


def problem(mode: Mode = "prefill", **changes: Any) -> SelectionProblem:
    fields = {
        "mode": mode, "dtype": "float32", "B": 1, "S": 1 if mode == "decode" else 48, "T": 48, "G": 2, "h": 2,
        "Dk": 8, "Dv": 8, "block_size": 8, "topk": 4,
    }  # fmt: skip
    return SelectionProblem(**{**fields, **changes})


def trial(mode: Mode = "prefill", **changes: Any) -> LayerTrial:
    return LayerTrial(problem=problem(mode, **changes), pattern=SIZES.pattern, seed=0, device="cpu", sizes=SIZES)


def bench(mode: Mode = "prefill", **changes: Any) -> LayerBench:
    return trial(mode, **changes).open_bench(lambda _: None, 0)


def combination(selection: str = "dense", compression: str = "sdpa_compressed", window: str = "sdpa_window"):
    named = dict(zip(OPERATIONS, (selection, compression, window), strict=True))
    problems = SIZES.problems(problem())
    return combined({o: Candidate(path=p, parameters=PATHS[p].defaults(problems[o], CPU)) for o, p in named.items()})


# Values


def test_a_combination_and_its_choices_are_inverse() -> None:
    found = combination("packed")
    assert found.path == LAYER
    assert found.parameters["selection"] == "packed"
    assert combined(choices_of(found.parameters)) == found
    assert choices_of(found.parameters)["selection"].parameters == PATHS["packed"].defaults(problem(), CPU)


def test_sizes_and_their_pattern_are_inverse() -> None:
    assert LayerSizes.of_pattern(SIZES.pattern) == SIZES
    posed = SIZES.problems(problem(complete=True))
    assert {name: each.operation for name, each in posed.items()} == {o: o for o in OPERATIONS}
    assert [posed[o].complete for o in OPERATIONS] == [True, False, False]


# The oracle


@pytest.mark.parametrize("topk", [4, 9])
def test_the_oracle_is_the_reference_layer_that_the_runtime_is_tested_with(topk: int) -> None:
    config = NSAConfig(
        dim=16, num_heads=4, num_kv_heads=2, head_dim=4, value_head_dim=6, kernel_size=8, kernel_stride=4,
        block_size=8, topk=topk, window_size=9,
    )  # fmt: skip
    torch.manual_seed(3)
    layer = NSAAttention(config, flags=Flags(), dtype=torch.float64)
    x = torch.randn(2, 45, 16, dtype=torch.float64)
    expected = reference_layer(config, cast(layer.state_dict(), torch.float64), x)
    rows = torch.tensor([0, 1, 6, 7, 8, 30, 43, 44])
    weights = weights_of(layer.state_dict(), config, torch.float64)
    taken, gap = chosen_blocks(config, weights, x, rows)
    for b in range(2):
        for place, t in enumerate(rows.tolist()):
            for g in range(2):
                assert taken[b, place, g].nonzero().flatten().tolist() == expected.blocks[b, t, g]
    found = layer_rows(config, weights, x, rows, taken)
    assert float((found - expected.y[:, rows]).abs().max()) <= 64 * torch.finfo(torch.float64).eps
    assert decided(gap, torch.bfloat16)[0].tolist() == [t < topk * 8 for t in rows.tolist()]


def test_the_rows_of_the_projection_are_told_apart_by_role() -> None:
    config = NSAConfig(dim=16, num_heads=4, num_kv_heads=2, head_dim=4, value_head_dim=6)
    layer = NSAAttention(config, flags=Flags(), dtype=torch.float64)
    roles, x = weights_of(layer.state_dict(), config, torch.float64), torch.randn(1, 5, 16, dtype=torch.float64)
    _, gates, keys, values = layer._split(layer.project(x), 0)
    for branch in BRANCHES:
        mine = x @ roles[f"values.{branch}"].T
        assert torch.allclose(mine.unflatten(-1, (2, 6)).transpose(1, 2), values[branch])
        assert roles[f"keys.{branch}"].shape == (8, 16)
        assert torch.allclose((x[:, :1] @ roles[f"keys.{branch}"].T).view(1, 2, 1, 4), keys[branch][:, :, :1])
    mine = torch.sigmoid(x @ roles["gate"].T + roles["gate_bias"]).view(1, 5, 2, 2, 3)
    assert torch.allclose(mine, gates)


# The bench


@pytest.mark.parametrize("mode", ["decode", "prefill", "train"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_right_combinations_are_proven(mode: Mode, dtype: str) -> None:
    made = bench(mode, dtype=dtype)
    for wanted in (combination(), combination("varlen", "dense", "dense"), combination("packed")):
        found = made.assess(wanted, True)
        assert found.outcome == "ok"
        assert found.oracle_error is not None
        assert found.oracle_bound is not None
        assert 0 < found.oracle_error <= found.oracle_bound
        assert made.build(wanted) > 0
        made.recheck(wanted)


def off_by_a_percent(*tensors: Any, **options: Any) -> torch.Tensor:
    return dense.run(*tensors, **options) * 1.01


def gives_up(*_: Any, **__: Any) -> torch.Tensor:
    raise UnsupportedPathError("not today")


def wrong_gradient(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **options: Any):
    return dense.run(query, key, value, *rest, **options) + 0.01 * (value - value.detach()).sum()


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_a_wrong_path_in_any_place_is_caught_in_the_layer(operation: str, mode: Mode, monkeypatch: Any) -> None:
    known = {"selection": "gather", "compression": "sdpa_compressed", "window": "sdpa_window"}[operation]
    broken = {"target": f"{__name__}:off_by_a_percent", "tunables": dense.tunables}
    monkeypatch.setitem(PATHS, known, msgspec.structs.replace(PATHS[known], **broken))
    named = {"selection": "dense", "compression": "sdpa_compressed", "window": "sdpa_window", operation: known}
    with pytest.raises((WrongResult, FellBack)):
        bench(mode).assess(combination(**named), True)


def test_a_wrong_output_is_named_as_such(monkeypatch: Any) -> None:
    made = bench()
    made.assess(combination(), True)
    right = made._call(combination())

    def call(*_: Any) -> Any:
        return lambda: right() * 1.01

    monkeypatch.setattr(made, "_call", call)
    with pytest.raises(WrongResult, match=r"context 32: the layer is off by .*, derived bound"):
        made._check(combination())


def test_a_combination_that_falls_back_is_caught(monkeypatch: Any) -> None:
    broken = msgspec.structs.replace(PATHS["gather"], target=f"{__name__}:gives_up")
    monkeypatch.setitem(PATHS, "gather", broken)
    with pytest.raises(FellBack, match=r"was to run .*'selection': 'gather'.*, it ran .*'selection': 'varlen'"):
        bench().assess(combination("gather"), True)


def test_a_wrong_gradient_is_caught_in_train(monkeypatch: Any) -> None:
    broken = msgspec.structs.replace(PATHS["dense"], target=f"{__name__}:wrong_gradient")
    monkeypatch.setitem(PATHS, "dense", broken)
    with pytest.raises(WrongResult, match=r"context 32: gradient of x off by"):
        bench("train").assess(combination(), True)
    assert bench("prefill").assess(combination(), True).outcome == "ok"


def test_what_cannot_run_is_unsupported_before_anything_runs() -> None:
    found = bench().assess(combination(window="flash_attn_window"), True)
    assert (found.outcome, found.reason) == ("unsupported", "flash_attn needs a CUDA device")


def test_a_decode_call_can_be_repeated_with_the_same_result() -> None:
    made = bench("decode")
    call = made._call(combination("gather"))
    first = call()
    for _ in range(20):
        assert torch.equal(call(), first)


# Entries


def records(fast: Candidate, *others: Candidate, gain: float = 0.5) -> list[Record]:
    """A shoot-out of 60 rounds: the others at 100 us, the first of them the baseline."""
    noise = np.random.default_rng(0).normal(0.0, 0.005, (60, len(others) + 1))
    return [
        Record(
            run_id="run", commit="abc", date="2026-11-22", stage="shootout", pattern=SIZES.pattern,
            problem=msgspec.to_builtins(problem()), path=LAYER, parameters=candidate.parameters, baseline=number == 1,
            outcome="ok", oracle_error=1e-7, oracle_bound=1e-6, kernels={"aten::mm": 2}, peak_bytes=1000,
            samples=[
                Sample(turn, 0, float((100.0 if number else 100.0 * gain) * np.exp(noise[turn, number])))
                for turn in range(60)
            ],
        )
        for number, candidate in enumerate((fast, *others))
    ]  # fmt: skip


def test_what_differs_from_the_branches_choices_gets_entries_of_level_layer() -> None:
    base = combination("dense")
    (entry,) = entries_of(records(combination("packed"), base, combination("gather")))
    assert (entry.level, entry.operation, entry.path) == ("layer", "selection", "packed")
    assert entry.problem() == problem()
    assert entry.default == choices_of(base.parameters)["selection"]
    assert entry.ratio == pytest.approx(0.5, rel=0.02)
    both = entries_of(records(combination("packed", window="dense"), base))
    assert {(e.operation, e.path) for e in both} == {("selection", "packed"), ("window", "dense")}
    assert both[1].problem() == SIZES.problems(problem())["window"]


def test_where_the_branches_choices_stay_there_is_no_entry() -> None:
    assert entries_of(records(combination("packed"), combination("dense"), gain=1.0)) == []
    assert entries_of(records(combination("packed"), combination("dense"), gain=2.0)) == []


def test_an_entry_of_the_layer_stands_beside_the_branchs_and_answers_the_layer(tmp_path: Path) -> None:
    (made,) = entries_of(records(combination("packed"), combination("dense")))
    branch = msgspec.structs.replace(made, level="branch", path="gather", parameters={}, default=None)
    for entries in ((branch, made), (made, branch)):
        table = DispatchTable(device=device_identity("cpu"), software=software_identity(), entries=entries)
        table = DispatchTable.decode(table.encode())
        assert (table.lookup(problem()).path, table.lookup(problem()).status) == ("gather", "exact")
        inside = table.of_layer().lookup(problem())
        assert (inside.path, inside.status) == ("packed", "exact")
        assert inside.entry.endswith(f"#{entries.index(made)}")
        assert table.of_layer() is table.of_layer() is table.of_layer().of_layer()
        with pytest.raises(DispatchTableError, match="same problem"):
            DispatchTable(device=table.device, software=table.software, entries=(*entries, made))
    alone = DispatchTable(device=table.device, software=table.software, entries=(branch,))
    assert alone.of_layer() is alone


def test_a_layer_takes_the_layers_pick_and_a_call_of_the_branch_the_branchs() -> None:
    (made,) = entries_of(records(combination("packed"), combination("dense")))
    branch = msgspec.structs.replace(made, level="branch", path="gather", parameters={}, default=None)
    table = DispatchTable(device=device_identity("cpu"), software=software_identity(), entries=(branch, made))
    config = NSAConfig(
        dim=16, num_heads=4, num_kv_heads=2, head_dim=8, kernel_size=8, kernel_stride=4, block_size=8, topk=4,
        window_size=20,
    )  # fmt: skip
    case = make_inputs(problem(), "random", 0, CPU)
    with torch.no_grad(), record_paths() as seen:
        NSAAttention(config, dispatch_table=table, flags=Flags())(torch.randn(1, 48, 16))
        selection_attention(case.query, case.key, case.value, case.selection, table=table)
    taken = [executed.path for executed in seen.executed if executed.operation == "selection"]
    assert taken == ["packed", "gather"]


def test_writing_the_layers_picks_leaves_the_branchs(tmp_path: Path) -> None:
    (made,) = entries_of(records(combination("packed"), combination("dense")))
    branch = msgspec.structs.replace(made, level="branch", path="gather", parameters={}, default=None)
    file = tmp_path / "table.json"
    file.write_bytes(
        DispatchTable(device=device_identity("cpu"), software=software_identity(), entries=(branch,)).encode()
    )
    kept, word = kept_entries(file, device_identity("cpu"), software_identity(), [made], [])
    assert (kept, word) == ([branch], "")
    assert kept_entries(file, device_identity("cpu"), software_identity(), [branch], [])[0] == []


def test_an_entry_written_for_calls_without_the_hint_goes_with_its_twin(tmp_path: Path) -> None:
    (made,) = entries_of(records(combination("packed"), combination("dense")))
    plain = msgspec.structs.replace(made, level="branch", default=None, complete=False)
    hinted = msgspec.structs.replace(plain, complete=True)
    alone = msgspec.structs.replace(plain, run_id="another")
    fresh = [msgspec.structs.replace(hinted, run_id="new")]
    file, here = tmp_path / "table.json", (device_identity("cpu"), software_identity())
    for entries, kept in (((plain, hinted), []), ((alone, hinted), [alone])):
        file.write_bytes(DispatchTable(device=here[0], software=here[1], entries=entries).encode())
        assert kept_entries(file, *here, fresh, [])[0] == kept


# The search


def searched(tmp_path: Path, **settings: Any) -> LayerSearch:
    file = tmp_path / "tiny.toml"
    file.write_text(SWEEP)
    empty = DispatchTable(device=device_identity("cpu"), software=software_identity())
    return LayerSearch(
        read_sweep(str(file), settings.pop("overrides", ())), out=tmp_path, device="cpu", commit="abcdef0",
        effort=EFFORTS["quick"], paths=PATHS, table=settings.pop("table", empty),
    )  # fmt: skip


def test_candidates_change_one_choice_of_the_table_in_force(tmp_path: Path) -> None:
    search = searched(tmp_path)
    posed = search.families[0].problems[0]
    base, *changed = (choices_of(candidate.parameters) for candidate in search.combinations(posed))
    assert {o: c.path for o, c in base.items()} == {
        "selection": "gather", "compression": "sdpa_compressed", "window": "sdpa_window",
    }  # fmt: skip
    assert all(sum(found[o] != base[o] for o in OPERATIONS) == 1 for found in changed)
    assert {found["selection"].path for found in changed} == {"gather", "dense"}


def test_the_tables_own_ties_are_tried(tmp_path: Path) -> None:
    posed = searched(tmp_path).families[0].problems[0]
    tied = Candidate(path="packed", parameters={"bucket_rounding": 16, "row_chunk": 0})
    (made,) = entries_of(records(combination("packed"), combination("dense")))
    fields = {**msgspec.structs.asdict(made), **msgspec.structs.asdict(posed), "level": "branch", "default": None}
    own = type(made)(**{**fields, "path": "dense", "parameters": {"query_chunk": 0}, "tied": (tied,)})
    table = DispatchTable(device=device_identity("cpu"), software=software_identity(), entries=(own,))
    search = searched(tmp_path, table=table)
    base, *changed = (choices_of(candidate.parameters) for candidate in search.combinations(posed))
    assert base["selection"].path == "dense"
    assert tied in [found["selection"] for found in changed]


def test_another_table_in_force_makes_another_run(tmp_path: Path) -> None:
    one = searched(tmp_path)
    (made,) = entries_of(records(combination("packed"), combination("dense")))
    other = DispatchTable(device=device_identity("cpu"), software=software_identity(), entries=(made,))
    assert one.asked() == searched(tmp_path).asked()
    assert one.asked() != searched(tmp_path, table=other).asked()


def test_a_layer_sweep_with_operations_or_several_windows_is_refused(tmp_path: Path) -> None:
    for override in ("operations=window", "window=8,16"):
        with pytest.raises(SweepError, match="a layer has every operation, one window and one compression"):
            searched(tmp_path, overrides=(override,))


@pytest.mark.slow
def test_a_layer_sweep_runs_end_to_end_and_writes_a_readable_table(tmp_path: Path) -> None:
    folder: RunFolder = searched(tmp_path).run()
    found, word = folder.records()
    assert folder.complete
    assert word == ""
    assert {record.path for record in found} == {LAYER}
    assert all(record.outcome == "ok" for record in found)
    assert sum(record.baseline for record in found if record.stage == "shootout") == 1
    write_table(tmp_path / "table.json", folder, keep=True)
    assert all(entry.level == "layer" for entry in read_dispatch_table(tmp_path / "table.json").entries)

"""Claims about sweep files: those we ship expand, overrides reach every axis, and a typo is named."""

import itertools
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
import torch

from nsa.paths import PATHS
from tuner import sweep as module
from tuner.console import seconds
from tuner.record import DEFAULT_REGISTRY, RunFolder
from tuner.sweep import (
    SHAPE_AXES,
    Axes,
    SweepDefinition,
    SweepError,
    families,
    read_sweep,
    sweep_command_line,
    sweep_names,
)  # fmt: skip

ROOT = Path(__file__).parents[2]

TINY = """
name = "tiny"
description = "for tests"
budget_s = 5.0
paths = ["dense", "gather"]
[axes]
modes = ["decode", "prefill"]
contexts = [64, 32]
{axes}
[ladders.dense]
query_chunk = [0, 64]
"""


def written(tmp_path: Path, axes: str = "", text: str = TINY) -> str:
    """A sweep file's name."""
    file = tmp_path / "tiny.toml"
    file.write_text(text.replace("{axes}", axes))
    return str(file)


@pytest.mark.parametrize("name", sweep_names())
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_every_sweep_of_the_project_decodes_and_expands(name: str, kind: str) -> None:
    definition = read_sweep(name)
    assert definition.name == name
    found = families(definition, kind)
    assert found
    assert len({family.name for family in found}) == len(found)
    for family in found:
        contexts = [problem.T for problem in family.problems]
        assert contexts == sorted(set(contexts))
        assert {problem.cache for problem in family.problems} == {"cold" if kind == "cuda" else "hot"}


@pytest.mark.parametrize("name", sweep_names())
def test_every_sweep_of_the_project_names_paths_and_parameters_that_exist(name: str) -> None:
    definition = read_sweep(name)
    assert set(definition.paths) | set(definition.ladders) <= set(PATHS)
    problems = [family.problems[-1] for family in families(definition, "cpu")]
    for path, ladders in definition.ladders.items():
        own = [problem for problem in problems if problem.operation in PATHS[path].operations]
        known = {item.name for problem in own for item in PATHS[path].tunables(problem, torch.device("cpu"))}
        assert set(ladders) <= known, path


def recorded(
    *arguments: str, budget: str | None = None, effort: str = "quick", registry: str = DEFAULT_REGISTRY
) -> Any:
    """What the environment of a run that was asked for so keeps of its sweep, as JSON gives it back."""
    definition = read_sweep(arguments[0], arguments[1:])
    definition = msgspec.structs.replace(definition, budget_s=seconds(budget)) if budget else definition
    asked = {**msgspec.to_builtins(definition), "effort": effort, "registry": registry}
    return msgspec.json.decode(msgspec.json.encode(asked))


def test_a_run_names_the_whole_command_that_asks_for_it_again() -> None:
    sets = ("contexts=16384,512", "head_dim=192", "complete=false", "pattern=random,smooth")
    words = [word for pair in sets for word in ("--set", pair)]
    line = f"nsa-tune sweep h200-others-prefill {' '.join(words)} --budget 90s --effort full --registry mine:PATHS"
    made = recorded("h200-others-prefill", *sets, budget="90s", effort="full", registry="mine:PATHS")
    assert sweep_command_line(made) == line
    assert sweep_command_line(recorded("quick", "batch=1")) == "nsa-tune sweep quick"


def test_a_run_of_a_users_own_file_names_that_file(tmp_path: Path) -> None:
    assert sweep_command_line(recorded(written(tmp_path))) == "nsa-tune sweep tiny.toml"


@pytest.mark.parametrize("run", sorted((ROOT / "results" / "records").glob("*/*/*/environment.json")), ids=str)
def test_the_command_of_every_committed_sweep_asks_for_what_was_measured(run: Path) -> None:
    environment = RunFolder(run.parent).environment()
    if environment.tool != "nsa-tune sweep":
        return
    words = sweep_command_line(environment.sweep).split()
    sets = [value for option, value in itertools.pairwise(words) if option == "--set"]
    assert msgspec.to_builtins(read_sweep(words[2], sets).axes) == msgspec.to_builtins(
        msgspec.convert(environment.sweep["axes"], Axes)
    )


def test_the_sweeps_that_the_readme_promises_are_there() -> None:
    assert {"quick", "decode", "prefill", "train", "reserve"} <= set(sweep_names())


def test_a_sweep_expands_to_a_family_per_crossing_and_contexts_ascending(tmp_path: Path) -> None:
    definition = read_sweep(written(tmp_path, 'batch = [1, 2]\ndtype = ["float32", "bfloat16"]'))
    found = families(definition, "cpu")
    assert len(found) == 2 * 2 * 2
    for family in found:
        assert [problem.T for problem in family.problems] == [32, 64]
        for problem in family.problems:
            assert (problem.S == 1) == (problem.mode == "decode")
            assert problem.S in (1, problem.T)


def test_a_context_that_is_named_twice_is_measured_once(tmp_path: Path) -> None:
    definition = read_sweep(written(tmp_path), ["contexts=64,32,64"])
    assert {tuple(problem.T for problem in family.problems) for family in families(definition, "cpu")} == {(32, 64)}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (TINY.replace("budget_s", "budgets"), ("budgets", "budget_s")),
        (TINY.replace("contexts", "context"), ("context", "$.axes")),
        (TINY.replace("{axes}", "head = [4]"), ("head", "$.axes")),
        (TINY.replace("{axes}", 'dtype = ["float31"]'), ("float31", "$.axes.dtype[0]")),
        (TINY.replace("{axes}", 'kernel = ["x"]'), ("kernel",)),
        (TINY.replace('"decode", ', '"decoding", '), ("decoding", "$.axes.modes[0]")),
        (TINY.replace("[64, 32]", '["64"]'), ("$.axes.contexts[0]",)),
        (TINY.replace('name = "tiny"\n', ""), ("name",)),
        (TINY.replace("[axes]", "[axes"), ("not TOML",)),
    ],
)
def test_a_typo_is_an_error_naming_file_and_key(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    with pytest.raises(SweepError) as raised:
        read_sweep(written(tmp_path, text=text))
    for word in ("tiny.toml", *words):
        assert word in str(raised.value)


def test_a_file_that_is_missing_and_a_name_that_is_unknown_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match=r"cannot read sweep .*nowhere\.toml: No such file"):
        read_sweep(str(tmp_path / "nowhere.toml"))
    with pytest.raises(SweepError, match=r"no sweep named 'quik'; expected one of .*'quick'"):
        read_sweep("quik")


OVERRIDES: dict[str, tuple[str, Any]] = {
    "operations": ("window,compression", ("window", "compression")),
    "window": ("64,128", (64, 128)),
    "kernel_size": ("16", (16,)),
    "kernel_stride": ("8", (8,)),
    "modes": ("train", ("train",)),
    "contexts": ("96,48", (96, 48)),
    "batch": ("1, 3", (1, 3)),
    "heads": ("12", (12,)),
    "kv_heads": ("4", (4,)),
    "head_dim": ("16", (16,)),
    "value_head_dim": ("24", (24,)),
    "block_size": ("16,32", (16, 32)),
    "topk": ("4", (4,)),
    "dtype": ("bfloat16,float16", ("bfloat16", "float16")),
    "execution": ("graph", ("graph",)),
    "cache": ("cold", ("cold",)),
    "complete": ("true", (True,)),
    "pattern": ("scored,random", ("scored", "random")),
}


def test_every_axis_has_an_override_in_this_file() -> None:
    assert set(OVERRIDES) == set(Axes.__struct_fields__)


@pytest.mark.parametrize("axis", OVERRIDES)
def test_an_axis_is_overridden_from_the_command_line(tmp_path: Path, axis: str) -> None:
    text, values = OVERRIDES[axis]
    before = read_sweep(written(tmp_path))
    after = read_sweep(written(tmp_path), [f"{axis}={text}"])
    assert getattr(after.axes, axis) == values != getattr(before.axes, axis)
    for other in set(OVERRIDES) - {axis}:
        assert getattr(after.axes, other) == getattr(before.axes, other)


def test_overrides_reach_the_problems(tmp_path: Path) -> None:
    overrides = [
        *("modes=decode", "contexts=48", "heads=6", "kv_heads=3", "head_dim=16", "value_head_dim=24", "batch=5"),
        *("dtype=bfloat16", "execution=graph", "cache=cold", "pattern=random", "block_size=16", "topk=4"),
    ]
    (family,) = families(read_sweep(written(tmp_path), overrides), "cpu")
    (problem,) = family.problems
    assert (problem.T, problem.G, problem.h, problem.Dk, problem.Dv, problem.B) == (48, 3, 2, 16, 24, 5)
    assert (problem.dtype, problem.execution, problem.cache, problem.overlap) == ("bfloat16", "graph", "cold", "low")
    assert (problem.block_size, problem.topk) == (16, 4)


def test_selections_are_declared_complete_where_the_sweep_says_so_and_never_in_decode(tmp_path: Path) -> None:
    overrides = ["modes=decode,prefill", "complete=false,true", "contexts=48", "heads=6", "kv_heads=3"]
    found = families(read_sweep(written(tmp_path), overrides), "cpu")
    assert {family.problems[0].complete for family in found if family.problems[0].mode == "decode"} == {False}
    prefill = [family for family in found if family.problems[0].mode == "prefill"]
    assert {family.problems[0].complete for family in prefill} == {False, True}
    assert len({family.name for family in prefill}) == len(prefill)


@pytest.mark.parametrize("override", ["contxts=32", "contexts", "budget_s=5", "=32", ""])
def test_an_unknown_axis_is_refused_with_the_known_ones(tmp_path: Path, override: str) -> None:
    with pytest.raises(SweepError, match=r"expected AXIS=VALUE\[,VALUE\.\.\.\] with AXIS of .*'contexts'") as raised:
        read_sweep(written(tmp_path), [override])
    assert repr(override) in str(raised.value)


@pytest.mark.parametrize("override", ["contexts=many", "contexts=32,6.5", "dtype=int8", "modes=decoding"])
def test_an_override_of_the_wrong_kind_names_the_axis(tmp_path: Path, override: str) -> None:
    with pytest.raises(SweepError, match=rf"\$\.axes\.{override.split('=')[0]}"):
        read_sweep(written(tmp_path), [override])


@pytest.mark.parametrize("override", ["contexts=", "modes=,", "batch=", "dtype=", "heads="])
def test_an_axis_without_values_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(SweepError, match=override.split("=")[0]):
        families(read_sweep(written(tmp_path), [override]), "cpu")


def test_heads_that_are_no_multiple_of_kv_heads_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match="heads 6 is not a multiple of kv_heads 4"):
        families(read_sweep(written(tmp_path, "heads = [6]\nkv_heads = [4]")), "cpu")
    with pytest.raises(SweepError, match="heads 6 is not a multiple of kv_heads 0"):
        families(read_sweep(written(tmp_path, "heads = [6]\nkv_heads = [0]")), "cpu")


def test_sizes_that_cannot_be_are_refused_with_the_sweeps_name(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match="sweep 'tiny': problem sizes must be positive"):
        families(read_sweep(written(tmp_path), ["contexts=0"]), "cpu")


def test_shape_axes_go_together_element_by_element(tmp_path: Path) -> None:
    axes = "heads = [4, 8, 16]\nkv_heads = [2, 4, 16]\nhead_dim = [32]\nvalue_head_dim = [0, 16, 0]"
    found = families(read_sweep(written(tmp_path, axes), ["modes=decode"]), "cpu")
    shapes = [(p.G, p.h, p.Dk, p.Dv) for p in (family.problems[0] for family in found)]
    assert shapes == [(2, 2, 32, 32), (4, 2, 32, 16), (16, 1, 32, 32)]


def test_shape_axes_of_different_lengths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match=r"axis kv_heads has 2 values, expected 1 or 3"):
        families(read_sweep(written(tmp_path, "heads = [4, 8, 16]\nkv_heads = [2, 4]")), "cpu")
    assert set(SHAPE_AXES) < set(Axes.__struct_fields__)


def test_each_operation_crosses_its_own_axes_and_no_others(tmp_path: Path) -> None:
    overrides = [
        *("operations=selection,window,compression", "modes=prefill", "contexts=64", "heads=4", "kv_heads=2"),
        *("pattern=scored,random", "topk=2", "block_size=16", "window=8,16", "kernel_size=16,32", "kernel_stride=8"),
    ]
    found = families(read_sweep(written(tmp_path), overrides), "cpu")
    problems = [family.problems[0] for family in found]
    assert len({family.name for family in found}) == len(found) == 6
    assert [(p.operation, p.window, p.kernel_size, p.kernel_stride) for p in problems] == [
        ("selection", 0, 0, 0),
        ("selection", 0, 0, 0),
        ("window", 8, 0, 0),
        ("window", 16, 0, 0),
        ("compression", 0, 16, 8),
        ("compression", 0, 32, 8),
    ]
    assert [family.pattern for family in found] == ["scored", "random", *("fixed",) * 4]
    assert {(p.form, p.block_size, p.topk) for p in problems[2:]} == {("ranges", 0, 1)}
    assert all(p.overlap == "high" for p in problems[2:])


def test_a_context_without_a_compressed_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match="no compressed token exists for a context of 16"):
        families(read_sweep(written(tmp_path), ["operations=compression", "contexts=16,64"]), "cpu")
    with pytest.raises(SweepError, match="kernel_size 32 is no multiple of kernel_stride 12"):
        families(read_sweep(written(tmp_path), ["operations=compression", "kernel_stride=12"]), "cpu")


def test_a_pattern_says_what_overlap_its_selections_have() -> None:
    assert set(module.OVERLAP_OF) == set(get_args(module.Pattern))
    assert {pattern: module.OVERLAP_OF[pattern] for pattern in ("scored", "random")} == {
        "scored": "high",
        "random": "low",
    }


def test_a_definition_without_paths_takes_all_that_dispatch_may_choose() -> None:
    definition = SweepDefinition(name="x", description="", axes=Axes(modes=("decode",), contexts=(32,)))
    assert set(definition.paths) == {name for name, path in PATHS.items() if path.dispatchable}


@pytest.mark.parametrize(
    ("text", "value"), [("90s", 90.0), ("10m", 600.0), ("1h", 3600.0), ("45", 45.0), ("1.5m", 90.0)]
)
def test_a_time_is_read_in_seconds(text: str, value: float) -> None:
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["", "m", "10 minutes", "-5s", "0", "nan", "inf", "1e9h", "ten"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(SweepError, match="expected a time such as 90s, 10m or 1h"):
        seconds(text)


def test_a_sweep_that_names_no_paths_tries_every_path_that_a_table_may_name() -> None:
    dispatchable = {name for name, path in PATHS.items() if path.dispatchable}
    assert set(read_sweep("quick").paths) == dispatchable

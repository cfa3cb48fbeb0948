"""Claims of the figures: what they show is computed right from records, and they draw whatever a run leaves behind."""

import itertools
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from nsa.dispatch_entry import DispatchEntry
from nsa.paths import Candidate
from nsa.problem import SelectionProblem
from tuner import plot, plot_info, plot_panels, plot_picks, plot_regressions, plot_style, regressions, reserves
from tuner.plot_info import KNOWN_RATES, Rates
from tuner.record import Environment, Record, RunFolder, Sample, SequenceSample
from tuner.regressions import RegressionPoint
from tuner.sweep import read_sweep

H200 = KNOWN_RATES["nvidia-h200"]
RUN_ID, COMMIT = "20261122T120000-0123456", "0123456789abcdef"
ENVIRONMENT = Environment(
    run_id=RUN_ID, commit=COMMIT, date="2026-11-22", tool="nsa-tune sweep",
    device={"slug": "cpu-test-x2", "name": "Test CPU", "kind": "cpu"}, software={}, clocks={}, timer={},
    sweep=msgspec.to_builtins(read_sweep("quick")),
)  # fmt: skip


def parameters(path: str, value: int) -> dict[str, int]:
    """The one parameter that the tests vary."""
    return {"query_chunk" if path == "dense" else "row_chunk": value}


def problem(T: int = 512, mode: str = "decode", **changes: Any) -> SelectionProblem:
    """A problem of the PR31 shape."""
    sizes = {"B": 1, "G": 2, "h": 4, "Dk": 32, "Dv": 32, "block_size": 64, "topk": 16, "dtype": "float32", **changes}
    return SelectionProblem(**{"mode": mode, "S": 1 if mode == "decode" else T, "T": T, **sizes})


def record(path: str, us: Sequence[float] = (), T: int = 512, mode: str = "decode", **fields: Any) -> Record:
    """A screening record with these samples; ``value`` sets its only parameter."""
    chosen = parameters(path, fields.pop("value", 0))
    posed = fields.pop("problem", problem(T, mode))
    return Record(**{
        "run_id": RUN_ID, "commit": COMMIT, "date": "2026-11-22", "stage": "screen", "pattern": "scored",
        "problem": msgspec.to_builtins(posed), "path": path, "parameters": chosen,
        "outcome": "ok" if us else "crash", "samples": [Sample(number, 0, each) for number, each in enumerate(us)],
        **fields,
    })  # fmt: skip


def rung(size: int, p99_us: float, growths: int = 0) -> reserves.Rung:
    """A rung by its costs."""
    return reserves.Rung(
        candidate=f"packed({size})", reserves={"reserve_rows": size}, reserved_bytes=size, peak_bytes=size,
        median_us=p99_us, p99_us=p99_us, growths=growths, calls=16,
    )  # fmt: skip


def reserve_record(path: str, size: int, sequence: Sequence[tuple[float, int]], **fields: Any) -> Record:
    """A reserve record whose calls took these microseconds with these growths so far."""
    samples = [SequenceSample(step, 512, us, growths) for step, (us, growths) in enumerate(sequence)]
    return record(
        path, [], stage="reserve", outcome="ok", parameters={"row_chunk": 0, "reserve_rows": size}, sequence=samples,
        workspace_bytes=size, **fields,
    )  # fmt: skip


def entry(path: str, T: int = 512, mode: str = "decode", value: int = 0, **fields: Any) -> DispatchEntry:
    """A table entry; by default a certified pick against nothing said."""
    posed = {name: getattr(problem(T, mode), name) for name in SelectionProblem.__struct_fields__}
    return DispatchEntry(**{
        **posed, "path": path, "parameters": parameters(path, value), "pairs": 40, "ratio": 0.5, "ratio_low": 0.4,
        "ratio_high": 0.6, "e_value": 1e5, "median_us": 1.0, "peak_bytes": 1, "oracle_error": 0.0, "oracle_bound": 1.0,
        "kernels": (), "run_id": RUN_ID, "date": "2026-11-22", **fields,
    })  # fmt: skip


# The floor

A, P, G1 = (
    {"G": 4, "h": 16, "Dk": 128, "Dv": 128},
    {"G": 4, "h": 16, "Dk": 192, "Dv": 128},
    {"G": 16, "h": 1, "Dk": 128, "Dv": 128},
)


@pytest.mark.parametrize(
    ("shape", "T", "floor_ms"),
    [(A, 1024, 0.022), (A, 4096, 0.148), (A, 16384, 0.654), (A, 65536, 2.68), (P, 16384, 0.818), (G1, 16384, 0.164)],
)
def test_the_prefill_floor_is_that_of_the_published_table(shape: dict[str, int], T: int, floor_ms: float) -> None:
    found = plot_info.floor_us(problem(T, "prefill", dtype="bfloat16", **shape), H200)
    assert found is not None
    assert found / 1e3 == pytest.approx(floor_ms, rel=0.02 if T == 1024 else 0.004)  # the table's last digit


@pytest.mark.parametrize(("B", "floor"), [(1, 0.5), (8, 4.0), (64, 31.7)])
@pytest.mark.parametrize("T", [1024, 65536])
def test_the_decode_floor_is_that_of_the_published_table_at_any_context(B: int, floor: float, T: int) -> None:
    found = plot_info.floor_us(problem(T, "decode", B=B, dtype="bfloat16", **A), H200)
    assert found == pytest.approx(floor, abs=0.06)


@pytest.mark.parametrize(("shape", "floor_ms"), [(A, 0.654 + 1.64), (P, 0.818 + 2.13), (G1, 0.164 + 0.409)])
def test_the_train_floor_is_forward_plus_backward(shape: dict[str, int], floor_ms: float) -> None:
    found = plot_info.floor_us(problem(16384, "train", dtype="bfloat16", **shape), H200)
    assert found is not None
    assert found / 1e3 == pytest.approx(floor_ms, rel=0.004)


def test_the_floor_counts_a_partial_own_block_by_hand() -> None:
    # One row at position 129 of 130, blocks of 64, top 2: one whole block and 2 keys of its own.
    posed = problem(130, "decode", G=1, h=1, Dk=3, Dv=5, topk=2)
    by_flops = plot_info.floor_us(posed, Rates(flops_per_s=1e6, bytes_per_s=1e30))
    by_bytes = plot_info.floor_us(posed, Rates(flops_per_s=1e30, bytes_per_s=1e6))
    assert by_flops == pytest.approx(2 * 66 * (3 + 5))
    assert by_bytes == pytest.approx(4 * (3 + 66 * (3 + 5) + 5))


def test_a_chunk_of_prefill_reads_at_least_its_own_blocks() -> None:
    posed = problem(512, "prefill", S=256, G=1, h=1, Dk=1, Dv=1, topk=1)
    found = plot_info.floor_us(posed, Rates(flops_per_s=1e30, bytes_per_s=1e6))
    assert found == pytest.approx(4 * (256 + 256 * 2 + 256))


WINDOW = {"operation": "window", "window": 512, "form": "ranges", "block_size": 0, "topk": 1}
COMPRESSION = {
    **{"operation": "compression", "kernel_size": 32, "kernel_stride": 16},
    **{"form": "ranges", "block_size": 0, "topk": 1},
}


@pytest.mark.parametrize(("sizes", "floor_ms"), [(WINDOW, 1.39), (COMPRESSION, 5.57)])
def test_the_branches_floors_are_those_of_the_layer_at_64k(sizes: dict[str, Any], floor_ms: float) -> None:
    found = plot_info.floor_us(problem(65536, "prefill", dtype="bfloat16", **A, **sizes), H200)
    assert found is not None
    assert found / 1e3 == pytest.approx(floor_ms, rel=0.005)


def test_a_decode_steps_branches_read_their_keys_once() -> None:
    rates = Rates(flops_per_s=1e30, bytes_per_s=1e6)
    window = problem(2048, G=1, h=1, Dk=3, Dv=5, **WINDOW)
    assert plot_info.floor_us(window, rates) == pytest.approx(4 * (3 + 512 * (3 + 5) + 5))
    compressed = problem(2048, G=1, h=1, Dk=3, Dv=5, **COMPRESSION)
    assert plot_info.floor_us(compressed, rates) == pytest.approx(4 * (3 + 127 * (3 + 5) + 5))


def test_operations_are_families_of_their_own_and_say_what_they_read() -> None:
    families = [plot_info.family_of(problem(**sizes), "fixed") for sizes in ({}, WINDOW, COMPRESSION)]
    _, labels = plot_info.family_labels(families)
    assert len(set(labels.values())) == 3
    assert "window of 512" in labels[families[1]]
    assert "compressed by 16, blocks of 32" in labels[families[2]]


def test_ranges_have_no_floor_because_their_width_is_not_known() -> None:
    assert plot_info.floor_us(problem(form="ranges", block_size=0), H200) is None


# Latency


def test_a_path_is_shown_by_its_fastest_candidate_with_a_band_of_measured_samples() -> None:
    slow = record("dense", [300.0] * 3, value=1)
    fast = record("dense", [float(us) for us in (9, 1, 5, 3, 7, 2, 8, 4, 6, 10, 11)], value=2)
    (panel,) = plot_info.latency_panels([slow, fast], None)
    (point,) = panel.lines["dense"]
    assert (point.median_us, point.low_us, point.high_us, point.samples) == (6.0, 2.0, 10.0, 11)
    assert point.candidate == "dense(query_chunk=2)"
    assert panel.floor == ()


def test_shoot_out_samples_come_before_faster_screening_samples() -> None:
    screened = record("dense", [1.0], value=1)
    decided = record("dense", [2.0], value=2, stage="shootout")
    (panel,) = plot_info.latency_panels([decided, screened], None)
    assert panel.lines["dense"][0].stage == "shootout"
    assert panel.lines["dense"][0].median_us == 2.0


def test_a_path_without_a_time_is_named_with_its_outcome_and_never_with_a_number() -> None:
    found = [record("dense", [1.0]), record("varlen", T=512), record("varlen", [2.0], T=1024), record("flex")]
    (panel,) = plot_info.latency_panels([*found, record("varlen", T=512, outcome="wrong", value=1)], None)
    assert {path: [point.T for point in line] for path, line in panel.lines.items()} == {
        "dense": [512],
        "varlen": [1024],
    }
    assert [(item.path, item.outcome, item.contexts) for item in panel.untimed] == [
        ("flex", "crash", (512,)),
        ("varlen", "crash", (512,)),
    ]
    assert plot_panels.wrapped_note(panel.untimed, panel) == "\nnot timed: flex crash at 512; varlen\ncrash at 512"


def test_families_share_a_panel_over_contexts_only_and_have_a_floor_where_rates_are_known() -> None:
    posed = [problem(T, mode) for mode in ("decode", "prefill") for T in (1024, 512)]
    panels = plot_info.latency_panels([record("dense", [1.0], problem=each) for each in posed], H200)
    assert [[point.T for point in panel.lines["dense"]] for panel in panels] == [[512, 1024], [512, 1024]]
    assert [T for T, _ in panels[0].floor] == [512, 1024]
    common, labels = plot_info.family_labels(panel.family for panel in panels)
    assert list(labels.values()) == ["decode", "prefill"]
    assert common.startswith("batch 1, 8/2 heads, head dim 32, block 64, top 16, float32")


def test_a_label_names_what_sets_a_family_apart() -> None:
    posed = [problem(), problem(B=8), problem(B=8, Dv=16), problem(64, "prefill", S=8)]
    families = [plot_info.family_of(each, "scored") for each in posed]
    _, labels = plot_info.family_labels(families)
    assert list(labels.values()) == [
        "decode, batch 1, head dim 32",
        "decode, batch 8, head dim 32",
        "decode, batch 8, head dims 32 and 16",
        "prefill of a chunk of 8, batch 1, head dim 32",
    ]
    assert plot_info.family_labels([]) == ("", {})


# Reserves


def test_the_pareto_set_holds_what_nothing_beats_in_bytes_and_p99_at_once() -> None:
    rungs = [rung(4, 5.0), rung(1, 9.0), rung(2, 9.0), rung(8, 5.0), rung(16, 1.0), rung(1, 9.5)]
    assert reserves.pareto_set(rungs) == (1, 0, 4)


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), max_size=8))
def test_every_rung_off_the_pareto_set_is_beaten_by_one_on_it(costs: list[tuple[int, int]]) -> None:
    rungs = [rung(size, float(us)) for size, us in costs]
    best = [costs[index] for index in reserves.pareto_set(rungs)]
    for size, us in costs:
        beaten = any(a <= size and b <= us and (a, b) != (size, us) for a, b in best)
        assert beaten != ((size, us) in best)


def test_the_smallest_reserve_without_growth_has_the_fewest_bytes_then_the_lower_p99() -> None:
    assert reserves.smallest_without_growth([rung(1, 1.0, 3), rung(4, 1.0), rung(2, 9.0), rung(2, 8.0)]) == 3
    assert reserves.smallest_without_growth([rung(1, 1.0, 3)]) is None
    assert reserves.smallest_without_growth([]) is None


def test_growths_count_after_the_first_call_and_p99_is_a_measured_call() -> None:
    calls = [(100.0, 2), *[(float(us), 2 + (us > 4)) for us in range(1, 9)]]
    (panel,) = reserves.reserve_panels(
        [reserve_record("packed", 64, calls), record("packed", stage="reserve", value=9)]
    )
    assert [(r.growths, r.p99_us, r.median_us, r.calls) for r in panel.rungs] == [(1, 100.0, 5.0, 9)]
    assert panel.rungs[0].reserves == {"reserve_rows": 64}
    assert (panel.pareto, panel.enough, panel.failed) == ((0,), None, ("crash",))


# Picks


def default_record(T: int = 512) -> Record:
    """The baseline of a problem."""
    return record("gather", [1.0], T, stage="shootout", baseline=True)


def test_a_pick_other_than_the_default_is_certified_against_it() -> None:
    (info,) = plot_info.pick_infos([entry("dense", runner_up=Candidate(path="varlen"))], [default_record()])
    assert (info.stays, info.certainty, info.against) == (
        False,
        "certified",
        Candidate(path="gather", parameters={"row_chunk": 0}),
    )
    assert plot_picks.standing(info) == "faster"
    assert plot_picks.contest(info) == "dense vs gather (default)"


@pytest.mark.parametrize(("tied", "certainty"), [((Candidate(path="dense"),), "tie"), ((), "certified")])
def test_the_default_stays_by_a_tie_or_because_it_is_best(tied: tuple[Candidate, ...], certainty: str) -> None:
    other = Candidate(path="gather", parameters={"row_chunk": 64})
    (info,) = plot_info.pick_infos([entry("gather", tied=tied, runner_up=other)], [default_record()])
    assert (info.stays, info.certainty) == (True, certainty)
    assert plot_picks.contest(info) == "gather [row_chunk 0] (default) vs gather [row_chunk 64]"


def test_an_entry_without_pairs_is_unopposed_and_has_no_ratio() -> None:
    alone = entry("gather", pairs=0, ratio=None, ratio_low=None, ratio_high=None, e_value=None)
    (info,) = plot_info.pick_infos([alone], [default_record()])
    assert (info.certainty, info.ratio, info.e_value, info.against) == ("unopposed", None, None, None)
    assert (plot_picks.standing(info), plot_picks.contest(info)) == ("only one", "gather alone")


def test_one_unbounded_or_far_interval_does_not_squeeze_the_forest() -> None:
    entries = [entry("dense"), entry("dense", T=1024, ratio=0.8, ratio_low=0.0, ratio_high=1e6)]
    infos = plot_info.pick_infos([*entries, entry("dense", T=2048, ratio_high=None)], [])
    low, high = plot_picks.ratio_range(infos)
    assert 0.3 < low < 0.4
    assert 1.0 < high < 1.2


# Marks and labels


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9), st.floats(0.01, 0.1))
def test_labels_keep_apart_in_order_and_inside(wanted: list[float], gap: float) -> None:
    placed = plot_style.dodged(wanted, gap)
    ordered = [place for _, place in sorted(zip(wanted, placed, strict=True))]
    assert all(b - a >= gap - 1e-9 for a, b in itertools.pairwise(ordered))
    assert min(placed) >= -1e-9
    assert max(placed) <= 1 + 1e-9


def test_labels_that_do_not_touch_stay_and_those_that_do_part_evenly() -> None:
    assert plot_style.dodged([0.9, 0.1, 0.5], 0.1) == pytest.approx([0.9, 0.1, 0.5])
    assert plot_style.dodged([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])


@given(st.floats(1e-3, 1e7), st.floats(1.0, 1e6))
def test_axes_have_few_ticks_and_all_of_them_inside(low: float, times: float) -> None:
    for ticks in (plot_style.series(low, low * times), plot_style.ratio_ticks(low, low * times)):
        assert len(ticks) <= 6
        assert all(low * (1 - 1e-6) <= tick <= low * times * (1 + 1e-6) for tick in ticks)


def test_ticks_read_as_one_would_say_them() -> None:
    assert plot_style.ratio_ticks(0.93, 1.09) == pytest.approx([0.95, 1.0, 1.05])
    assert plot_style.byte_ticks(1000, 5 * 2**20) == [2.0**10, 2.0**13, 2.0**16, 2.0**19, 2.0**22]
    assert plot_style.context_ticks([512, 1024, 2048, 4096, 8192]) == [512, 1024, 2048, 4096, 8192]
    assert plot_style.context_ticks([512, 640, 4096, 65536]) == [512, 4096, 65536]
    assert plot_style.context_ticks([512]) == [512]
    assert [plot_style.time_text(us) for us in (0.5, 200, 5e3, 2e6)] == ["0.5 µs", "200 µs", "5 ms", "2 s"]
    assert [plot_style.byte_text(size) for size in (0, 512, 2**18, 3 * 2**29)] == ["0", "512 B", "256 KiB", "1.5 GiB"]
    assert [plot_style.context_text(T) for T in (512, 1024, 1536, 65536)] == ["512", "1k", "1536", "64k"]
    assert [plot_style.percent_text(r) for r in (1.043, 1.0, 0.875, 27)] == [
        "+4.3 %",
        "0 %",
        "\N{MINUS SIGN}12.5 %",
        "27" + plot_style.TIMES,
    ]
    assert [plot_style.evidence_text(e) for e in (None, 1.25, 370.0, 4.7e12, 1e200)] == [
        plot_style.EN_DASH,
        "1.2",
        "370",
        "4.7e+12",
        "> 1e+99",
    ]


def test_a_known_path_looks_the_same_in_every_figure_and_strangers_differ() -> None:
    styles = plot_style.path_styles(["dense", "stranger_b", "stranger_a"])
    assert styles["dense"] == plot_style.path_styles(["dense", "varlen"])["dense"]
    looks = {(style.marker, style.colour) for style in [*plot_style.KNOWN.values(), *plot_style.SPARE]}
    assert len({marker for marker, _ in looks}) == len(plot_style.KNOWN) + len(plot_style.SPARE)
    assert styles["stranger_a"] != styles["stranger_b"]


# Drawing a run


def legible(figure: Figure) -> None:
    """No text below 8 points, none cut off at the edge of the sheet, none on another one."""
    figure.draw_without_rendering()
    edge = figure.bbox.padded(1)
    found = [text for text in figure.findobj(Text) if isinstance(text, Text) and text.get_visible()]
    boxes = [(text.get_text(), Text.get_window_extent(text)) for text in found if text.get_text().strip()]  # no arrows
    assert min(text.get_fontsize() for text in found) >= plot_style.SMALL_PT
    for text, box in boxes:
        assert edge.x0 <= box.x0 <= box.x1 <= edge.x1, f"{text!r} is cut off"
        assert edge.y0 <= box.y0 <= box.y1 <= edge.y1, f"{text!r} is cut off"
    for (text, box), (other, another) in itertools.combinations(boxes, 2):
        assert not box.padded(-1.5).overlaps(another.padded(-1.5)), f"{text!r} stands on {other!r}"


def whole(files: Sequence[Path]) -> None:
    """Every SVG parses and every PNG decodes to a picture that is not blank."""
    for file in files:
        if file.suffix == ".svg":
            assert ElementTree.parse(file).getroot().tag.endswith("svg")
        if file.suffix == ".png":
            assert imread(file).min() < 0.5


def run_folder(path: Path, records: Sequence[Record]) -> RunFolder:
    """A run folder on disk with these records."""
    folder = RunFolder(path / "run")
    folder.start(ENVIRONMENT)
    folder.append(list(records))
    return folder


def full_run() -> tuple[list[Record], list[DispatchEntry]]:
    """Two modes, three contexts, four paths, long names, failures, reserves that fail, ties and open intervals."""
    records, entries = [], []
    for mode, T in itertools.product(("decode", "prefill"), (512, 1024, 65536)):
        names = ("gather", "dense", "a_path_with_quite_a_long_name", "varlen")
        for number, path in enumerate(names):
            us = [T * (1.0 + 0.01 * number + 0.001 * step) for step in range(12)]
            stage = "shootout" if number < 2 else "screen"
            records.append(record(path, us, T, mode, baseline=number == 0, stage=stage))
        records.append(record("flex", T=T, mode=mode, outcome="unsupported"))
        entries.append(entry("dense" if T > 512 else "gather", T, mode, tied=(Candidate(path="dense"),)))
    entries[-1] = entry("dense", 65536, "prefill", ratio_low=0.0, ratio_high=None, pairs=1, e_value=1e299)
    for path, size in itertools.product(("packed", "varlen"), (2**14, 2**20, 2**33)):
        records.append(reserve_record(path, size, [(5.0, 2), (50.0 + size / 2**30, 2 if size > 2**14 else 30)]))
    records.append(record("packed", stage="reserve", outcome="oom", value=9))
    return records, entries


def test_every_figure_of_a_full_run_is_legible() -> None:
    records, entries = full_run()
    with plot_style.house_style():
        drawn = list(plot.sheets(records, entries, ENVIRONMENT, H200))
        assert [sheet.name for sheet in drawn] == ["latency", "winners", "reserve", "evidence"]
        for sheet in drawn:
            legible(sheet.figure)


def test_a_run_is_drawn_whole_with_a_gallery_and_twice_to_the_same_bytes(tmp_path: Path) -> None:
    records, entries = full_run()
    folder = run_folder(tmp_path, records)
    first = plot.draw_run(folder, entries, tmp_path / "one", rates=H200)
    second = plot.draw_run(folder, entries, tmp_path / "two", rates=H200)
    names = [f"{name}.{kind}" for name in ("latency", "winners", "reserve", "evidence") for kind in ("svg", "png")]
    assert [file.name for file in first] == [*names, "README.md"]
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]
    whole(first)
    readme = first[-1].read_text()
    assert readme.count("](latency.svg)") == readme.count(RUN_ID + "` |") == 1
    for word in ("nsa-tune sweep quick", RUN_ID, COMMIT, "Test CPU (`cpu-test-x2`)"):
        assert word in readme


EDGES: dict[str, tuple[list[Record], list[DispatchEntry], list[str]]] = {
    "nothing": ([], [], []),
    "one context, one candidate, one sample": ([record("dense", [5.0])], [], ["latency"]),
    "failures only": ([record("dense"), record("varlen", outcome="hang")], [], ["latency"]),
    "an entry without interval": (
        [default_record()],
        [entry("gather", pairs=0, ratio=None, ratio_low=None, ratio_high=None, e_value=None)],
        ["latency", "winners", "evidence"],
    ),
    "an entry of another run": ([default_record()], [entry("gather", run_id="another")], ["latency"]),
    "a reserve of no bytes": ([reserve_record("packed", 0, [(5.0, 0)])], [], ["reserve"]),
    "reserves that all failed": ([record("packed", stage="reserve", outcome="oom")], [], ["reserve"]),
}


@pytest.mark.parametrize("edge", EDGES)
def test_whatever_a_run_leaves_behind_is_drawn_and_nothing_else(edge: str, tmp_path: Path) -> None:
    records, entries, names = EDGES[edge]
    files = plot.draw_run(run_folder(tmp_path, records), entries, tmp_path / "figures")
    assert [file.name for file in files[:-1]] == [f"{name}.{kind}" for name in names for kind in ("svg", "png")]
    whole(files)


def test_many_families_go_on_in_further_figures() -> None:
    panels = [record("dense", [1.0], problem=problem(B=B)) for B in range(1, 10)]
    with plot_style.house_style():
        drawn = [sheet.name for sheet in plot.sheets(panels, [], ENVIRONMENT, None)]
    assert drawn == ["latency", "latency-2"]


def test_a_map_of_many_contexts_and_families_stays_within_the_page() -> None:
    entries = [
        entry("dense" if T > 2048 else "gather", T, mode, B=B, tied=(Candidate(path="dense"),))
        for T, mode, B in itertools.product([512 * 2**n for n in range(8)], ("decode", "prefill"), (1, 64))
    ]
    infos = plot_info.pick_infos(entries, [])
    common, labels = plot_info.family_labels(info.family for info in infos)
    with plot_style.house_style():
        figure = plot_picks.winners_figure(infos, labels, common, plot_style.path_styles(["dense", "gather"]))
        assert figure.get_figwidth() <= plot_style.WIDTH_IN + 0.01
        legible(figure)


# Regressions


def history(ratios: Sequence[float | None], scenario: str = "decode 512", **fields: Any) -> list[RegressionPoint]:
    """A point per commit; 3 % off is slower or faster, None a wrong result."""
    points = []
    for order, ratio in enumerate(ratios):
        judged = "same" if ratio is None else "slower" if ratio > 1.03 else "faster" if ratio < 0.97 else "same"
        own: dict[str, Any] = {"verdict": "wrong"} if ratio is None else {
            "verdict": judged, "ratio": ratio, "ratio_low": ratio * 0.99, "ratio_high": ratio * 1.01,
        }  # fmt: skip
        commit = f"{order:07x}fedcba"
        points.append(
            RegressionPoint(
                **{
                    "commit": commit,
                    "subject": f"Commit {order}",
                    "order": order,
                    "scenario": scenario,
                    **own,
                    **fields,
                }
            )
        )
    return points


def test_levels_are_medians_between_change_points_and_their_change() -> None:
    points = history([1.0, 1.02, 0.98, 1.04, None, 1.06])
    (panel,) = regressions.regression_panels(list(reversed(points)), {"decode 512": [points[3].commit]})
    assert [(level.first, level.last, level.ratio) for level in panel.levels] == [(0, 2, 1.0), (3, 5, 1.05)]
    assert panel.levels[1].change == pytest.approx(1.05)
    assert [place for place, _ in panel.points] == [0, 1, 2, 3, 4, 5]


def test_notes_name_the_commit_the_change_and_the_subject() -> None:
    points = history([1.0, None, 1.05])
    panels = regressions.regression_panels(points, {"decode 512": [points[2].commit]})
    assert plot_regressions.notes(panels) == [
        "0000001 wrong in decode 512: Commit 1",
        "0000002 +5 % in decode 512: Commit 2",
    ]


def test_a_lone_outlier_does_not_flatten_the_rest_but_another_level_is_shown() -> None:
    low, high = regressions.shown_range(history([1.0, 1.01, 27.0, 0.99, 1.0, 1.0, 1.04]))
    assert low > 0.9
    assert high < 1.3
    low, high = regressions.shown_range(history([1.0, 1.01, 1.0, 0.5, 0.5, 0.51, 0.52]))
    assert low < 0.5
    assert high > 1.01
    low, high = regressions.shown_range([])
    assert 0.98 < low < 1 < high < 1.02


def test_an_outlier_has_room_at_its_edge() -> None:
    (panel,) = regressions.regression_panels(history([1.0] * 9 + [27.0]), {})
    low, high = plot_regressions.frame(panel)
    assert low == panel.low
    assert panel.high < high < 1.1


def test_a_change_point_that_no_commit_has_is_refused() -> None:
    with pytest.raises(ValueError, match="nowhere"):
        regressions.regression_panels(history([1.0]), {"decode 512": ["nowhere"]})
    with pytest.raises(ValueError, match="another"):
        regressions.regression_panels(history([1.0]), {"another": []})


HISTORIES = {
    "one commit": history([1.0]),
    "no ratio at all": history([None, None]),
    "undecided without pairs": history([1.0, 1.0]) + history([None, 1.0], "prefill", verdict="undecided"),
    "open intervals": history([1.0, 1.02], ratio_low=0.0, ratio_high=None),
    "forty commits, three scenarios": [
        *history([1.0 + 0.002 * math.sin(7 * n) + 0.045 * (n >= 30) for n in range(40)]),
        *history([None if 10 < n < 14 else 1.0 + 0.26 * (n == 20) for n in range(40)], "prefill 2048, a long scenario"),
        *history([27.0 if n == 5 else 1.0 - 0.4 * (n > 20) for n in range(40)], "train"),
    ],
}


@pytest.mark.parametrize("name", HISTORIES)
def test_histories_are_drawn_legibly(name: str, tmp_path: Path) -> None:
    points = HISTORIES[name]
    commits = list(regressions.commits_of(points))
    changes = {"decode 512": [commits[30], commits[31], commits[39]]} if len(commits) == 40 else {}
    title = "Selection time per commit against anchor 0123456\nTest CPU (cpu-test-x2), sweep quick"
    files = plot_regressions.draw_regressions(points, changes, tmp_path, title)
    assert [file.name for file in files] == ["regressions.svg", "regressions.png"]
    whole(files)
    with plot_style.house_style():
        legible(plot_regressions.regressions_figure(regressions.regression_panels(points, changes), commits, title))


def test_drawing_a_history_loads_no_torch() -> None:
    code = "import sys, tuner.plot_regressions; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

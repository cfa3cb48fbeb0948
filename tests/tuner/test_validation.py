"""Claims about the validation report: what it recommends follows from records by its rules, and it can be read."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import pytest
from typer.testing import CliRunner

from tests.tuner.validated import (
    COMMIT,
    GOOD,
    HEAD,
    SLUG,
    STEPS,
    compare_lines,
    environment,
    problem,
    reading,
    record,
    route,
    write_compare,
    write_good,
    write_history,
    write_sweep,
    write_training,
)
from tuner.cli import app
from tuner.kernel_kinds import kind_of
from tuner.record import RecordError, RunFolder
from tuner.trees import Tree
from tuner.validation import read_validation
from tuner.validation_report import as_html, as_markdown, as_text, document_of
from tuner.validation_rules import FAILED, Recommendation, recommend
from tuner.validation_times import path_tables

ROOT = Path(__file__).parent.parent.parent
PR31 = ROOT / "results" / "pr31"


def recommended(root: Path, **chosen: str) -> Recommendation:
    return recommend(read_validation(root, **chosen))


def texts(found: Recommendation) -> str:
    return "\n".join(f"{reason.word}: {reason.text}" for reason in found.reasons)


def test_good_records_of_one_commit_say_merge_without_a_reason(tmp_path: Path) -> None:
    found = recommended(write_good(tmp_path))
    assert (found.word, found.reasons, found.exit_code) == ("merge", (), 0)


def test_a_selftest_after_the_comparison_is_not_what_the_report_is_about(tmp_path: Path) -> None:
    installed = Tree(asked="installed", folder="here", digest="1")
    later = {"run_id": "compare-run-of-selftest", "date": "2026-11-22T13:00:00+00:00"}
    write_compare(write_good(tmp_path), [], base=installed, head=installed, **later)
    found = read_validation(tmp_path)
    assert (found.subject, recommend(found).word) == (COMMIT, "merge")
    assert found.left_out == ("comparisons of a tree with itself, as selftest makes",)


# --- do not merge ---


@pytest.mark.parametrize("outcome", FAILED)
def test_a_path_that_failed_flips_the_recommendation(tmp_path: Path, outcome: Any) -> None:
    write_good(tmp_path)
    write_sweep(tmp_path, [*GOOD, record("gather", outcome=outcome, reason="off by 0.3")])
    found = recommended(tmp_path)
    assert (found.word, found.exit_code) == ("do not merge", 3)
    assert texts(found) == f"do not merge: selection by gather: {outcome} at decode T=512 float32: off by 0.3"


@pytest.mark.parametrize("outcome", ["oom", "unsupported"])
def test_a_limit_of_a_candidate_has_no_vote_and_that_of_a_default_has(tmp_path: Path, outcome: Any) -> None:
    write_good(tmp_path)
    write_sweep(tmp_path, [*GOOD, record("gather", outcome=outcome, reason="too large")])
    assert recommended(tmp_path).word == "merge"
    write_sweep(tmp_path, [record("varlen", outcome=outcome, reason="too large", baseline=True)])
    assert recommended(tmp_path).word == "do not merge"


COMPARISONS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "slower": (lambda: compare_lines((1.04, 1.0)), "do not merge", "decode T=512 auto: kernel slower|slower"),
    "faster": (lambda: compare_lines((0.9, 1.0)), "merge", ""),
    "wrong": (lambda: compare_lines(outcome="wrong", reason="off by 0.3"), "do not merge", "wrong: off by 0.3"),
    "fell back": (lambda: compare_lines(outcome="fell_back", reason="saw sdpa"), "do not merge", "fell_back: saw sdpa"),
    "crash": (lambda: compare_lines(outcome="crash", reason="unbound"), "do not merge", "crash: unbound"),
    "oom": (lambda: compare_lines(outcome="oom", reason="32 GiB"), "do not merge", "oom: 32 GiB"),
    "more memory": (lambda: compare_lines(peak_bytes=2**25), "do not merge", "more memory: peak of a call"),
    "more growths": (lambda: compare_lines(growths=3), "do not merge", "more growths"),
    "unsupported": (lambda: compare_lines(outcome="unsupported", reason="no triton"), "do not merge", "no triton"),
    "few pairs": (lambda: compare_lines(rounds=2), "undecided", "6 pairs, at least"),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPARISONS)
def test_each_verdict_of_the_comparison_has_its_recommendation_and_reason(tmp_path: Path, name: str) -> None:
    lines, word, reason = COMPARISONS[name]
    write_good(tmp_path)
    shutil.rmtree(tmp_path / "compares")
    write_compare(tmp_path, lines())
    found = recommended(tmp_path)
    assert found.word == word
    assert re.search(reason, texts(found))


TRAININGS: dict[str, tuple[list[Any], str]] = {
    "crash": (
        [reading(0, [], tokens=0, outcome="crash", reason="UnboundLocalError: out")],
        "training pr31 varlen B1: crash after step 0: UnboundLocalError: out",
    ),
    "another route": (
        [*STEPS[:1], reading(1, [4.0] * 5, executed=[route(path="packed", met=False, reason="swallowed")])],
        "selection was to be varlen, packed ran: swallowed",
    ),
    "waits": ([*STEPS[:2], msgspec.structs.replace(STEPS[2], synchronisations=64)], "makes the host wait 64 times"),
    "no learning": ([reading(0, [5.5]), reading(1, [5.5] * 9)], "the loss did not fall in 10 steps"),
    "not finite": ([*STEPS[:2], reading(10, [], outcome="wrong", reason="loss of step 11 is nan")], "step 11 is nan"),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_run_that_went_wrong_flips_the_recommendation(tmp_path: Path, name: str) -> None:
    records, reason = TRAININGS[name]
    write_good(tmp_path)
    shutil.rmtree(tmp_path / "records" / SLUG / "pr31")
    write_training(tmp_path, records, complete=False)
    found = recommended(tmp_path)
    assert found.word == "do not merge"
    assert reason in texts(found)


def test_a_last_commit_worse_than_the_anchor_flips_the_recommendation(tmp_path: Path) -> None:
    write_good(tmp_path)
    shutil.rmtree(tmp_path / "history")
    write_history(tmp_path, "regressed")
    found = recommended(tmp_path)
    assert texts(found) == "do not merge: commit 3333333333 is worse than ffffffffff in decode T=512 auto"


# --- undecided ---

MISSING = {
    "compares": "no comparison with base; run 'nsa-tune compare main'",
    f"records/{SLUG}/pr31": "no training run; run 'python examples/train.py'",
}


@pytest.mark.parametrize("folder", MISSING)
def test_missing_evidence_is_undecided_and_names_its_command(tmp_path: Path, folder: str) -> None:
    write_good(tmp_path)
    shutil.rmtree(tmp_path / folder)
    found = recommended(tmp_path)
    assert (found.word, found.exit_code) == ("undecided", 4)
    assert texts(found) == f"undecided: {MISSING[folder]}"


def test_without_prefill_anywhere_it_is_undecided(tmp_path: Path) -> None:
    write_sweep(tmp_path, [each for each in GOOD if each.problem["mode"] == "decode"])
    assert "nothing of prefill; run 'nsa-tune sweep quick'" in texts(recommended(tmp_path))


def test_times_without_proof_are_undecided(tmp_path: Path) -> None:
    write_good(tmp_path)
    write_sweep(tmp_path, [*GOOD, record("flex", kernels={}), record("gather", oracle_error=None)])
    found = recommended(tmp_path)
    assert found.word == "undecided"
    assert "flex at decode has times and was not seen to execute" in texts(found)
    assert "gather at decode has times and was not held against the oracle" in texts(found)


def test_evidence_of_another_commit_is_undecided(tmp_path: Path) -> None:
    write_good(tmp_path)
    write_sweep(tmp_path, GOOD, commit="9" * 40)
    found = recommended(tmp_path)
    assert texts(found) == "undecided: a sweep is of 9999999999, the report is about 0123456789"


def test_what_is_said_to_be_right_beyond_its_bound_is_undecided(tmp_path: Path) -> None:
    write_good(tmp_path)
    write_sweep(tmp_path, [*GOOD, record("flex", oracle_error=2e-6)])
    write_compare(tmp_path, compare_lines(oracle_error=2e-6))
    found = recommended(tmp_path)
    assert found.word == "undecided"
    assert "flex at decode is said to be right and is beyond its bound" in texts(found)
    assert "decode T=512 auto: head is said to be right and is beyond its bound" in texts(found)


def test_a_run_that_did_not_reach_its_end_is_undecided(tmp_path: Path) -> None:
    for run in ("quick/sweep-run", "pr31/train-run"):
        write_good(tmp_path)
        (tmp_path / "records" / SLUG / run / "complete").unlink()
        found = recommended(tmp_path)
        assert found.word == "undecided"
        assert f"{run.partition('/')[2]} did not reach its end" in texts(found)
        shutil.rmtree(tmp_path / "records")


def test_a_few_losses_are_no_training(tmp_path: Path) -> None:
    write_good(tmp_path)
    shutil.rmtree(tmp_path / "records" / SLUG / "pr31")
    write_training(tmp_path, STEPS[:1])
    assert texts(recommended(tmp_path)) == "undecided: training pr31 varlen B1: 1 losses show no learning"


def test_a_training_run_that_shows_no_route_is_undecided(tmp_path: Path) -> None:
    write_good(tmp_path)
    (tmp_path / "records" / SLUG / "pr31" / "train-run" / "training.jsonl").unlink()
    write_training(tmp_path, [msgspec.structs.replace(STEPS[0], executed=[]), *STEPS[1:]])
    assert texts(recommended(tmp_path)) == ("undecided: training pr31 varlen B1: nothing shows what ran from step 0 on")


def test_a_record_of_another_commit_among_a_runs_own_is_undecided(tmp_path: Path) -> None:
    write_good(tmp_path)
    write_sweep(tmp_path, [record("flex", commit="9" * 40)])
    assert texts(recommended(tmp_path)) == "undecided: a sweep is of 9999999999, the report is about 0123456789"


def test_evidence_of_uncommitted_changes_is_undecided_even_where_all_is_of_such(tmp_path: Path) -> None:
    commit = f"{COMMIT}-dirty-aaaaaaaa"
    write_sweep(tmp_path, [msgspec.structs.replace(each, commit=commit) for each in GOOD], commit=commit)
    steps = [msgspec.structs.replace(step, commit=commit) for step in STEPS]
    write_training(tmp_path, steps, commit=commit)
    write_compare(tmp_path, compare_lines(), head=msgspec.structs.replace(HEAD, dirty=True))
    found = recommended(tmp_path)
    assert found.word == "undecided"
    assert "0123456789+ has uncommitted changes" in texts(found)


def test_a_commit_compared_with_itself_is_no_comparison(tmp_path: Path) -> None:
    write_good(tmp_path)
    shutil.rmtree(tmp_path / "compares")
    write_compare(tmp_path, compare_lines(), base=msgspec.structs.replace(HEAD, asked="main"))
    assert "no comparison with base" in texts(recommended(tmp_path))
    shutil.rmtree(tmp_path / "compares")
    write_compare(tmp_path, compare_lines(), base=msgspec.structs.replace(HEAD, commit="f" * 40))
    assert recommended(tmp_path).word == "merge"


def test_a_reason_against_outweighs_what_is_undecided(tmp_path: Path) -> None:
    write_sweep(tmp_path, [record("gather", outcome="wrong", reason="x")])
    found = recommended(tmp_path)
    assert found.word == "do not merge"
    assert [reason.word for reason in found.reasons] == ["do not merge", *["undecided"] * (len(found.reasons) - 1)]


# --- PR31 ---


def test_the_figures_of_pr31_are_undecided_for_one_run_per_arm() -> None:
    found = recommended(PR31)
    assert (found.word, found.exit_code) == ("undecided", 4)
    for context, change in ((512, "+4.3%"), (1024, "+5.2%"), (2048, "+3.9%")):
        assert f"undecided: decode T={context} varlen: one run per arm: {change} says something if" in texts(found)
    assert "nothing shows that head executed, or was right" in texts(found)


def test_the_crash_that_pr31_swallowed_would_have_said_do_not_merge(tmp_path: Path) -> None:
    shutil.copytree(PR31, tmp_path, dirs_exist_ok=True)
    device = read_validation(PR31).environments[0].device
    crash = reading(0, [], tokens=0, outcome="crash", reason="UnboundLocalError: Kf")
    write_training(tmp_path, [crash], complete=False, device=device)
    assert recommended(tmp_path, device=str(device["slug"])).word == "do not merge"


# --- what counts ---


def test_the_newest_run_of_a_problem_counts(tmp_path: Path) -> None:
    write_good(tmp_path)
    write_sweep(tmp_path, [record("dense", outcome="wrong", reason="x")], run_id="a-older-run")
    assert recommended(tmp_path).word == "merge"
    write_sweep(tmp_path, [record("gather", outcome="wrong", reason="x")], run_id="z-newer-run")
    assert recommended(tmp_path).word == "do not merge"


@pytest.mark.parametrize(("commit", "word"), [(COMMIT, "do not merge"), ("9" * 40, "merge")])
def test_a_failure_stands_until_the_same_code_tries_that_path_again(tmp_path: Path, commit: str, word: str) -> None:
    write_good(tmp_path)
    older = [record("gather", outcome="wrong", reason="off by 0.3", commit=commit)]
    write_sweep(tmp_path, older, run_id="a-older-run", commit=commit)
    assert recommended(tmp_path).word == word
    write_sweep(tmp_path, [*GOOD, record("gather")], run_id="z-newer-run")
    assert recommended(tmp_path).word == "merge"


def test_a_regression_stands_however_often_the_same_two_trees_are_compared(tmp_path: Path) -> None:
    write_good(tmp_path)
    write_compare(tmp_path, compare_lines((1.04, 1.0)), run_id="a-older-run")
    found = recommended(tmp_path)
    assert found.word == "do not merge"
    assert "comparison a-older-run of the same two trees found a regression" in texts(found)
    other = msgspec.structs.replace(HEAD, digest="another")
    write_compare(tmp_path, compare_lines((1.04, 1.0)), run_id="a-older-run", head=other)
    assert recommended(tmp_path).word == "merge"


def test_a_device_and_a_commit_can_be_asked_for(tmp_path: Path) -> None:
    write_good(tmp_path)
    other = {"slug": "other", "name": "Other", "kind": "cpu", "units": 1}
    write_sweep(tmp_path, [record("gather", outcome="wrong")], "z", device=other, commit="9" * 40, date="2027-01-01")
    assert read_validation(tmp_path).device == "other"
    assert recommended(tmp_path, device=SLUG).word == "merge"
    found = read_validation(tmp_path, device=SLUG, commit="9999")
    assert not found.environments
    assert "runs of commit 0123456789" in found.left_out
    assert recommended(tmp_path, device=SLUG, commit=COMMIT[:7]).word == "merge"


def test_a_line_that_is_no_record_is_named(tmp_path: Path) -> None:
    write_good(tmp_path)
    (file,) = tmp_path.glob("**/training.jsonl")
    file.write_text('{"what": 1}\n')
    with pytest.raises(RecordError, match=r"training\.jsonl:1"):
        read_validation(tmp_path)


def test_times_by_graphs_of_another_number_of_calls_stand_in_a_table_of_their_own(tmp_path: Path) -> None:
    write_good(tmp_path)
    by_graph = {T: {**msgspec.to_builtins(problem("decode", T)), "execution": "graph"} for T in (1024, 2048)}
    for run_id, T, clock in (("old-run", 1024, {}), ("new-run", 2048, {"calls_per_graph": 8})):
        folder = RunFolder(tmp_path / "records" / SLUG / "quick" / run_id)
        folder.start(environment(run_id, {"name": "quick", **clock}))
        both = [record(path, baseline=path == "varlen", problem=by_graph[T]) for path in ("varlen", "dense")]
        folder.append([msgspec.structs.replace(one, run_id=run_id) for one in both])
    tables = path_tables(read_validation(tmp_path), "decode")
    shown = {table.caption: {row[0].text for row in table.rows} for table in tables}
    by_graphs = {caption.split("graph, ")[1]: rows for caption, rows in shown.items() if "graph, " in caption}
    assert by_graphs == {
        "hot cache, high overlap, scored": {"1024"},
        "hot cache, high overlap, scored, graph of 8 calls": {"2048"},
    }


def test_a_layers_combinations_are_compared_among_themselves(tmp_path: Path) -> None:
    write_good(tmp_path)
    rest = {"compression": "sdpa_compressed", "window": "sdpa_window"}
    both = [{"selection": path, **rest} for path in ("varlen", "dense")]
    layers = [
        record("layer", us=us, parameters=choices, baseline=baseline, pattern="layer window=512")
        for choices, us, baseline in zip(both, (100.0, 80.0), (True, False), strict=True)
    ]
    write_sweep(tmp_path, [*GOOD, *layers])
    found = read_validation(tmp_path)
    assert recommend(found).word == "merge"
    page = as_html(document_of(found, recommend(found)))
    assert "layer, 8/2 heads" in page
    assert "layer(selection=varlen, compression=sdpa_compressed, window=sdpa_window) (default)" in page
    assert "0.800 [0." in page


# --- what bounds a step ---


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nsa_gradient_block", "NSA kernels"),
        ("void flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd", "attention"),
        ("fmha_cutlassB_f32_aligned_64x64_k32_sm80(PyTorchMemEff", "attention"),
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT", "matrix products"),
        ("void gemv2N_kernel<int, int, float, float", "matrix products"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::T", "copies and casts"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>", "element-wise"),
        ("void at::native::indexFuncLargeIndex<float, long", "gather and scatter"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<c10::BFloat16", "reductions"),
        ("triton_poi_fused_add_mul_3", "compiled element-wise"),
        ("aten::addmm", "matrix products"),
        ("aten::mul", "element-wise"),
        ("Memcpy DtoD (Device -> Device)", "copies and casts"),
        ("something else", "other"),
    ],
)
def test_a_kernels_name_says_what_kind_of_work_it_does(name: str, kind: str) -> None:
    assert kind_of(name) == kind


# --- what is shown ---


class Strict(HTMLParser):
    """Raises for a tag that is not closed in order, and collects attributes."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, _tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def everything(root: Path) -> Path:
    """All outcomes, a slower scenario, a marked commit."""
    write_good(root)
    for part in ("compares", "history"):
        shutil.rmtree(root / part)
    bad = [record("gather", outcome=each, reason=f"<{each}> | `why`") for each in (*FAILED, "oom", "unsupported")]
    write_sweep(root, [*GOOD, *bad])
    write_compare(root, compare_lines((1.04, 1.0)))
    write_history(root, "regressed")
    return root


def test_the_html_is_one_file_that_parses_and_fetches_nothing(tmp_path: Path) -> None:
    found = read_validation(everything(tmp_path))
    page = as_html(document_of(found, recommend(found)))
    reader = Strict()
    reader.feed(page)
    assert reader.open == []
    assert not [pair for pair in reader.attributes if pair[0] in ("src", "srcset", "xlink:href", "data")]
    links = [value for name, value in reader.attributes if name == "href"]
    ids = [value for name, value in reader.attributes if name == "id"]
    assert all(link.startswith("#") and link[1:] in ids for link in links)
    assert len(ids) == len(set(ids))
    assert not re.search(r"@import|url\((?!#)|https?://|<script|<link", page)
    assert page.count("<svg") > 4


@pytest.mark.parametrize("form", ["html", "markdown"])
def test_every_outcome_verdict_and_section_is_shown(tmp_path: Path, form: str) -> None:
    found = read_validation(everything(tmp_path))
    document = document_of(found, recommend(found))
    shown = as_html(document) if form == "html" else as_markdown(document, tmp_path / "report.md").replace("\\", "")
    for outcome in (*FAILED, "oom", "unsupported"):
        assert outcome in shown
    for words in (
        "slower", "same within 1 %", "faster", "1.040 [1.0", "pr31", "102,400", "5.500 to 4.200", "580.1", "1500",
        "NSA_USE_SEL_PACK=1 NSA_USE_SEL_VARLEN=1; overridden: NSA_USE_SEL_PACK", "Executed against requested",
        "varlen, 60 calls", "1 GiB",
        "0123456789", "merge",
    ):  # fmt: skip
        assert words in shown, words


def test_markdown_tables_are_regular_and_its_pictures_are_files(tmp_path: Path) -> None:
    found = read_validation(everything(tmp_path))
    lines = as_markdown(document_of(found, recommend(found)), tmp_path / "report.md").splitlines()
    table: list[str] = []
    for line in [*lines, ""]:
        if line.startswith("|"):
            table.append(line)
        elif table:
            assert len({row.replace("\\|", "").count("|") for row in table}) == 1
            assert set(table[1]) <= set("|-: ")
            table = []
    pictures = [name for line in lines for name in re.findall(r"\]\((\S+\.svg)\)", line)]
    assert "report-regressions.svg" in pictures
    for name in pictures:
        assert ElementTree.parse(tmp_path / name).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_an_empty_folder_says_what_to_run(tmp_path: Path) -> None:
    found = read_validation(tmp_path)
    shown = as_text(document_of(found, recommend(found)))
    assert shown.startswith(f"UNDECIDED  no records below {tmp_path}")
    for how in ("nsa-tune compare main", "nsa-tune sweep quick", "python examples/train.py", "nsa-tune history"):
        assert how in shown
    for how in re.findall("run '([^']*)'", shown):
        assert re.fullmatch(r"(nsa-tune|python) [\w./ ]+", how)  # one command, as it is typed
    as_html(document_of(found, recommend(found)))


@pytest.mark.parametrize("wrong", [("--device", "h2000"), ("--commit", "zzzz")])
def test_a_device_or_commit_that_nothing_was_recorded_of_is_a_usage_error_that_says_what_there_is(
    tmp_path: Path, wrong: tuple[str, str]
) -> None:
    write_good(tmp_path)
    done = CliRunner().invoke(app, ["report", "--records", str(tmp_path), *wrong])
    assert done.exit_code == 2
    assert f"fit {wrong[0]} {wrong[1]}; there are: runs o" in done.stderr


def test_the_command_writes_both_forms_and_exits_by_its_recommendation(tmp_path: Path) -> None:
    write_good(tmp_path / "results")
    files = [tmp_path / "out" / "report.html", tmp_path / "out" / "report.md"]
    words = ["report", "--records", str(tmp_path / "results"), "--html", str(files[0]), "--markdown", str(files[1])]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("MERGE  0123456789 on test-gpu, against ffffffffff")
    assert all(file.exists() and str(file) in done.stderr for file in files)
    empty = CliRunner().invoke(app, ["report", "--records", str(tmp_path / "nowhere"), "--json"])
    assert empty.exit_code == 4
    assert msgspec.json.decode(empty.stdout)["word"] == "undecided"


def test_the_newest_run_to_plot_is_a_sweeps_and_no_training_run(tmp_path: Path) -> None:
    write_training(tmp_path, STEPS)
    done = CliRunner().invoke(app, ["plot", "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert "run 'nsa-tune sweep' first" in done.stderr


def test_a_head_without_a_commit_is_named_by_its_folder(tmp_path: Path) -> None:
    write_compare(tmp_path, compare_lines(), head=Tree(asked="x", folder="exported", digest="abc"))
    assert read_validation(tmp_path).subject == "exported (abc)"


def test_a_head_with_uncommitted_changes_is_not_its_commit(tmp_path: Path) -> None:
    write_good(tmp_path)
    write_compare(tmp_path, [], head=msgspec.structs.replace(HEAD, dirty=True))
    assert "a sweep is of 0123456789, the report is about 0123456789+" in texts(recommended(tmp_path))

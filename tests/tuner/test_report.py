"""Claims about what is printed: a reason and a path are shown as they are, and no parameter of a pick is cut off."""

import io
import re
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from nsa.dispatch_table import read_dispatch_table
from tests.tuner.test_plot import record
from tests.tuner.validated import environment
from tuner import report
from tuner.console import plain_console, results_console
from tuner.gate_commands import Progress
from tuner.record import RunFolder
from tuner.table import entries_of

ROOT = Path(__file__).parents[2]
TABLES = sorted((ROOT / "results" / "dispatch_tables").glob("*.json"))
WORDS = "[/tmp/x] is not one of [varlen], shape [B, S], [bold]"


def printed(console: Console, *things: object) -> str:
    """What a console makes of things, on one line where it wrapped."""
    console.file = io.StringIO()
    for thing in things:
        console.print(thing)
    return " ".join(console.file.getvalue().split())


def test_brackets_in_a_reason_are_printed_and_end_nothing() -> None:
    failed = record("varlen", outcome="crash", reason=WORDS)
    console = plain_console()
    console.file = io.StringIO()
    report.LiveProgress(console).recorded(failed)
    assert WORDS in console.file.getvalue()
    assert WORDS in printed(results_console(), report.outcome_table([failed]))
    assert WORDS in printed(plain_console(stderr=True), f"moved {WORDS}")


def test_brackets_in_what_the_gate_is_doing_are_printed() -> None:
    progress = Progress()
    progress.working(WORDS, 0.0)
    assert WORDS in printed(plain_console(soft_wrap=False, width=130), progress.status.renderable)


def test_the_table_that_the_readme_shows_is_what_show_prints_of_that_run() -> None:
    text = (ROOT / "README.md").read_text()
    sweep, commit = re.findall(r"`nsa-tune sweep (\S+)`, commit (\w+), ", text)[0]
    (folder,) = (ROOT / "results" / "records").glob(f"*/{sweep}/*-{commit}*")
    console = plain_console(soft_wrap=False, width=130)
    console.file = io.StringIO()
    console.print(report.evidence_tables(entries_of(RunFolder(folder).records()[0]), "cuda", 130))
    lines = "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())
    (block,) = re.findall(r"```\n(64/4 heads .*?)```", text, re.DOTALL)
    assert block in lines


def test_rows_stand_by_mode_batch_and_context_whichever_run_came_last() -> None:
    table = read_dispatch_table(TABLES[0])
    one = next(entry for entry in table.entries if entry.mode == "prefill")
    entries = [msgspec.structs.replace(one, T=context) for context in (2048, 512, 1024)]
    console = plain_console(soft_wrap=False, width=130)
    console.file = io.StringIO()
    console.print(report.evidence_tables(entries, "cuda", 130))
    assert re.findall(r"^prefill +(\d+)", console.file.getvalue(), re.MULTILINE) == ["512", "1024", "2048"]


@pytest.mark.parametrize(("known", "busy"), [("1.00", True), ("1.04", True), ("", False)])
def test_a_timer_that_misreads_any_known_ratio_is_told(known: str, busy: bool) -> None:
    read = {f"{ratio} reads": float(ratio) * (0.8 if ratio == known else 1.001) for ratio in report.KNOWN}
    console = plain_console()
    console.file = io.StringIO()
    report.LiveProgress(console).started(
        msgspec.structs.replace(environment("run", {"name": "x"}), timer=read), 1, 0, ""
    )
    assert ("this machine is busy" in console.file.getvalue()) == busy


@pytest.mark.parametrize("file", TABLES, ids=lambda file: file.stem)
@pytest.mark.parametrize("width", [report.TABLE_WIDTH, 130])
def test_every_parameter_of_every_pick_is_printed(file: Path, width: int) -> None:
    table = read_dispatch_table(file)
    text = printed(
        plain_console(soft_wrap=False, width=width), report.evidence_tables(table.entries, table.device.kind, width)
    )
    assert "…" not in text
    for entry in table.entries:
        for name, value in entry.parameters.items():
            assert re.search(rf"\b{name}={value}\b", text)

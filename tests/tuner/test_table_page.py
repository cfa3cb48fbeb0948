"""Claims about a table's page: an entry is a cell, a tie says so, and the committed page comes from committed files."""

import re
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from nsa.dispatch_table import DispatchTable, read_dispatch_table
from tuner.cli import app
from tuner.record import RunFolder, run_folders
from tuner.table_page import page

ROOT = Path(__file__).parents[2]
TABLES = sorted((ROOT / "results" / "dispatch_tables").glob("*.json"))


def cells(text: str) -> list[str]:
    """Cells that name a path."""
    text, _, _ = text.partition("## Runs")
    return [cell.strip() for line in text.splitlines() for cell in line.split("|") if cell.strip().startswith("`")]


@pytest.mark.parametrize("file", TABLES, ids=lambda file: file.stem)
def test_the_committed_page_is_that_of_the_committed_table_and_records(file: Path) -> None:
    table = read_dispatch_table(file)
    text = page(table, ROOT / "results" / "records")
    assert file.with_suffix(".md").read_text() == text
    assert len(cells(text)) == len(table.entries)
    assert "records are not here" not in text


@pytest.mark.parametrize("file", TABLES, ids=lambda file: file.stem)
def test_every_cell_of_the_readme_stands_on_a_committed_page(file: Path) -> None:
    shown = re.findall(r"`\w+` [\d.]+ [mu]s, [^|]*\]", (ROOT / "README.md").read_text())
    assert shown
    known = cells(file.with_suffix(".md").read_text())
    assert [cell for cell in shown if not any(one.startswith(cell) for one in known)] == []


def test_picks_timed_by_graphs_of_another_number_of_calls_stand_in_a_row_of_their_own(tmp_path: Path) -> None:
    table = read_dispatch_table(TABLES[0])
    entry = next(one for one in table.entries if one.mode == "decode" and one.execution == "graph")
    entries = (entry, msgspec.structs.replace(entry, T=2 * entry.T, run_id="new"))
    records = ROOT / "results" / "records" / table.device.slug
    (old,) = (folder.environment() for folder in run_folders(records) if folder.path.name == entry.run_id)
    new = msgspec.structs.replace(old, run_id="new", sweep={**old.sweep, "calls_per_graph": 8})
    for environment in (old, new):
        RunFolder(tmp_path / table.device.slug / environment.run_id).start(environment)
    text = page(DispatchTable(device=table.device, software=table.software, entries=entries), tmp_path)
    rows = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| decode")]
    assert rows == [f"| decode B{entry.B}, graph", f"| decode B{entry.B}, graph of 8 calls"]


def test_a_graph_whose_run_is_not_at_hand_shares_no_row_with_others_and_show_says_which_folder_to_name(
    tmp_path: Path,
) -> None:
    file, out = TABLES[0], tmp_path / "page.md"
    shown = CliRunner().invoke(app, ["show", str(file), "--markdown", str(out), "--records", str(tmp_path)])
    assert shown.exit_code == 0
    assert "| decode B8, graph of calls not known |" in out.read_text()
    assert "| decode B8, graph |" not in out.read_text()
    runs = {entry.run_id for entry in read_dispatch_table(file).entries}
    assert f"records of {len(runs)} runs are not below {tmp_path}: name their folder with --records" in shown.stderr


def test_a_pick_that_is_not_certified_says_so(tmp_path: Path) -> None:
    table = read_dispatch_table(TABLES[0])
    entry = msgspec.structs.replace(table.entries[0], ratio=0.98, ratio_low=0.9, ratio_high=1.1)
    text = page(DispatchTable(device=table.device, software=table.software, entries=(entry,)), tmp_path)
    (only,) = cells(text)
    assert only.endswith("0.98 [0.9, 1.1], *tied*")
    assert "its records are not here" in text

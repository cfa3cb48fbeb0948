"""Claims about the command line: results on stdout, words on stderr, exit codes, and a runtime that takes its table."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from nsa.device import device_identity
from nsa.dispatch_table import DispatchTable, read_dispatch_table, user_table_path
from nsa.paths import PATHS
from tuner import gate_commands, sweep_command
from tuner.cli import app
from tuner.compare_record import Question
from tuner.judge import CompareResult, judge
from tuner.record import RunFolder

ROOT = Path(__file__).parents[2]
TINY = """
name = "tiny"
description = "two contexts in decode"
budget_s = 4.0
paths = ["gather", "dense", "varlen"]
[axes]
modes = ["decode"]
contexts = [32, 64]
heads = [2]
kv_heads = [1]
head_dim = [8]
block_size = [16]
topk = [2]
[ladders.gather]
row_chunk = [0]
"""

ATTEND = """
import json, sys, torch, nsa
from nsa.dispatch import active_dispatch_table
from nsa.planning import call_problem

found = []
for T in (32, 48, 64, 128):
    query, key, value = (torch.randn(1, *shape, 8) for shape in ((1, 1, 2), (1, T), (1, T)))
    selection = nsa.Selection.from_blocks(torch.tensor([[[[0, 1]]]]), block_size=16, context_length=T)
    with nsa.record_paths() as recorder:
        nsa.selection_attention(query, key, value, selection)
    (record,) = recorder.executed
    problem = call_problem(query, key, value, selection, grad=False, capturing=False)
    choice = active_dispatch_table("cpu").lookup(problem)
    found.append([T, record.path, record.parameters, record.status, choice.tier, choice.entry])
print(json.dumps(found))
"""


def command(*words: str) -> Result:
    """``nsa-tune`` in this process."""
    return CliRunner().invoke(app, list(words))


def fresh(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NSA_")}
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env={**kept, **environ}, capture_output=True, text=True, check=False
    )


class Swept:
    """A sweep by the command line, in folders of its own."""

    def __init__(self, place: Path) -> None:
        self.data, self.out, self.file = place / "data", place / "out", place / "tiny.toml"
        self.file.write_text(TINY)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_DATA_HOME", str(self.data))
            self.table = user_table_path(device_identity("cpu"))
            self.result = command(*self.sweep_words("--export", "--json"))
        self.shown = json.loads(self.result.stdout) if self.result.exit_code == 0 else {}

    def sweep_words(self, *more: str) -> Sequence[str]:
        """The sweep's command."""
        return ("sweep", str(self.file), "--out", str(self.out), "--device", "cpu", "--commit", "abc", *more)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """One sweep for all tests of this file."""
    return Swept(tmp_path_factory.mktemp("swept"))


@pytest.fixture
def _users_table(swept: Swept, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the user who swept."""
    monkeypatch.setenv("XDG_DATA_HOME", str(swept.data))


@pytest.fixture
def file(tmp_path: Path) -> str:
    """The tiny sweep's file."""
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return str(path)


# Sweep


def test_a_sweep_ends_well_with_json_alone_on_stdout(swept: Swept) -> None:
    assert swept.result.exit_code == 0, swept.result.output
    assert set(swept.shown) == {"run", "tables", "figures", "entries"}
    assert [(entry["T"], entry["mode"]) for entry in swept.shown["entries"]] == [(32, "decode"), (64, "decode")]
    assert RunFolder(Path(swept.shown["run"])).complete


def test_progress_and_advice_are_on_stderr(swept: Swept) -> None:
    for words in ("timer self-test", "records", str(swept.table), "nsa-tune show"):
        assert words in swept.result.stderr


def test_a_sweep_writes_below_out_and_to_the_users_tables_only(swept: Swept) -> None:
    slug = device_identity("cpu").slug
    assert swept.shown["tables"] == [str(swept.table), str(swept.out / "dispatch_tables" / f"{slug}.json")]
    assert Path(swept.shown["run"]).parent == swept.out / "records" / slug / "tiny"
    written = {path for path in swept.file.parent.rglob("*") if path.is_file()} - {swept.file}
    allowed = (Path(swept.shown["run"]), swept.table, swept.out / "dispatch_tables")
    assert all(any(path == root or root in path.parents for root in allowed) for path in written)
    assert not [path for path in written if path.name.startswith(".")]


def test_the_exported_table_is_the_users(swept: Swept) -> None:
    mine, exported = (read_dispatch_table(Path(path)) for path in swept.shown["tables"])
    assert mine.entries == exported.entries
    assert [entry.T for entry in mine.entries] == [32, 64]


def test_figures_are_written_as_svg_and_png(swept: Swept) -> None:
    figures = [Path(figure) for figure in swept.shown["figures"]]
    assert {figure.suffix for figure in figures} >= {".svg", ".png"}
    assert all(figure.stat().st_size > 0 for figure in figures)


def test_a_fresh_process_takes_the_tables_picks_and_says_so(swept: Swept) -> None:
    shown = fresh("-c", ATTEND, XDG_DATA_HOME=str(swept.data))
    assert shown.returncode == 0, shown.stderr
    found = {T: rest for T, *rest in json.loads(shown.stdout)}
    entries = {entry.T: entry for entry in read_dispatch_table(swept.table).entries}
    for number, T in enumerate((32, 64)):
        path, parameters, status, tier, entry = found[T]
        assert (path, status, tier) == (entries[T].path, "exact", "user")
        assert entries[T].parameters.items() <= parameters.items()
        assert entry == f"{Path(swept.shown['run']).name}#{number}"
    assert (found[48][0], found[48][2]) == (entries[64].path, "interpolated")
    assert (found[128][0], found[128][2]) == (entries[64].path, "extrapolated")


def test_another_users_process_does_not(tmp_path: Path, swept: Swept) -> None:
    assert swept.result.exit_code == 0
    shown = fresh("-c", ATTEND, XDG_DATA_HOME=str(tmp_path))
    assert {rest[4] for rest in json.loads(shown.stdout)} <= {"packaged", "defaults"}


# Show, doctor, plot


@pytest.mark.usefixtures("_users_table")
def test_show_prints_the_table_in_force_as_it_is(swept: Swept) -> None:
    shown = command("show", "--json")
    assert shown.exit_code == 0
    assert DispatchTable.decode(shown.stdout.encode()).entries == read_dispatch_table(swept.table).entries
    assert shown.stdout_bytes == swept.table.read_bytes()
    assert command("show", str(swept.table), "--json").stdout_bytes == shown.stdout_bytes


@pytest.mark.usefixtures("_users_table")
def test_show_tells_a_person_what_why_and_how_sure(swept: Swept) -> None:
    shown = command("show")
    assert shown.exit_code == 0
    for words in ("tier user", "current", "decode", "gather", Path(swept.shown["run"]).name, "oracle"):
        assert words in shown.stdout
    assert command("show", str(swept.table)).exit_code == 0


@pytest.mark.usefixtures("_users_table")
def test_doctor_tells_device_paths_and_table(swept: Swept) -> None:
    found = json.loads(command("doctor", "--json").stdout)
    assert found["device"]["slug"] == device_identity("cpu").slug
    assert found["software"]["torch"]
    assert set(found["paths"]) == set(PATHS)
    for name in ("dense", "gather", "packed", "varlen"):
        assert found["paths"][name] == {"available": ["every mode, float32 and bfloat16"]}
    assert found["table"].startswith("tier user: 2 entries")
    assert found["user_table"] == str(swept.table)
    assert "tier user" in command("doctor").stdout


def test_doctor_names_a_table_that_is_unusable() -> None:
    table = user_table_path(device_identity("cpu"))
    table.parent.mkdir(parents=True)
    table.write_text("{")
    shown = command("doctor", "--json")
    assert shown.exit_code == 0
    state = json.loads(shown.stdout)["table"]
    assert state.startswith("unusable: ")
    assert str(table) in state


def test_plot_draws_a_runs_figures_where_it_is_told(swept: Swept, tmp_path: Path) -> None:
    for number, words in enumerate(([swept.shown["run"]], ["--out", str(swept.out)])):
        to = tmp_path / str(number)
        shown = command("plot", *words, "--to", str(to))
        assert shown.exit_code == 0
        figures = [Path(line) for line in shown.stdout.split()]
        assert figures
        assert all(to in figure.parents and figure.stat().st_size > 0 for figure in figures)


@pytest.mark.usefixtures("_users_table")
def test_a_run_that_timed_nothing_gives_no_table_and_no_regret(swept: Swept, tmp_path: Path) -> None:
    run = Path(shutil.copytree(swept.shown["run"], tmp_path / "run"))
    (run / "trials.jsonl").write_bytes(b"")
    for words in (("export", str(run), "--to", str(tmp_path / "table.json")), ("regret", str(run))):
        shown = command(*words)
        assert (shown.exit_code, shown.stdout) == (1, "")
        assert f"nsa-tune: {run}: no problem of this run was timed" in shown.stderr
    assert not (tmp_path / "table.json").exists()


# A dry run


def test_a_dry_run_says_what_would_be_measured_and_writes_nothing(file: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("sweep", file, "--dry-run", "--json", "--device", "cpu", "--out", str(out), "--budget", "2m")
    shown = command(*words, "--set", "modes=decode,prefill", "--set", "contexts=48,32")
    assert shown.exit_code == 0
    found = json.loads(shown.stdout)
    assert (found["sweep"], found["device"], found["budget_s"]) == ("tiny", "cpu", 120.0)
    assert [family["contexts"] for family in found["families"]] == [[32, 48], [32, 48]]
    assert all(family["candidates"] >= 3 for family in found["families"])
    assert not out.exists()
    assert not user_table_path(device_identity("cpu")).exists()


def test_a_sweep_of_which_nothing_can_be_timed_fails_and_says_so(file: str, tmp_path: Path) -> None:
    words = ("--set", "execution=graph", "--device", "cpu", "--out", str(tmp_path / "out"), "--no-figures")
    shown = command("sweep", file, *words)
    assert shown.exit_code == 1
    assert "no candidate was proven and timed" in shown.stderr
    assert "crash" not in shown.output
    assert "unsupported: execution graph replays a CUDA graph" in " ".join(shown.stdout.split())
    assert not user_table_path(device_identity("cpu")).exists()


def test_a_table_that_cannot_be_written_leaves_the_run_shown_and_names_the_command_that_writes_it(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").touch()
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "full"))
    shown = command("sweep", file, "--device", "cpu", "--set", "contexts=32", "--out", str(tmp_path), "--no-figures")
    assert shown.exit_code == 1
    assert "proven and timed" in shown.stdout
    (run,) = (tmp_path / "records").glob("*/*/*")
    last = shown.stderr.splitlines()[-1]
    assert last.startswith("nsa-tune: cannot write the table ")
    assert f"'nsa-tune export {run} --to FILE'" in last
    assert command("export", str(run), "--to", str(tmp_path / "table.json")).exit_code == 0


def test_a_registry_in_the_folder_one_is_in_is_swept_whole_and_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_paths.py").write_text(
        "import msgspec\nfrom nsa.paths import PATHS as ALL\n"
        "PATHS = {'mine': msgspec.structs.replace(ALL['dense'], name='mine'), 'gather': ALL['gather']}\n"
        "WRONG = {'mine': 'nsa.paths.dense'}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    words = ("sweep", "--dry-run", "--device", "cpu", "--json", "--set", "modes=decode", "--registry")
    shown = command(*words, "own_paths:PATHS")
    assert shown.exit_code == 0, shown.stderr
    (family,) = json.loads(shown.stdout)["families"]
    assert (family["candidates"], family["left_out"]) == (2, {})
    shown = command(*words, "own_paths:WRONG")
    assert shown.exit_code == 2
    assert "['mine'] are no SelectionPath" in shown.stderr


def test_a_dry_run_of_the_default_sweep_names_who_is_left_out_and_why() -> None:
    shown = command("sweep", "--dry-run", "--device", "cpu")
    assert shown.exit_code == 0
    assert shown.stdout.startswith("quick: ")
    assert "without flex: " in shown.stdout


# Usage


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("sweep", "quik"), "no sweep named 'quik'"),
        (("sweep", "nowhere.toml"), "cannot read sweep nowhere.toml"),
        (("sweep", "--set", "contxts=32"), "--set 'contxts=32'"),
        (("sweep", "--set", "contexts=many"), "$.axes.contexts"),
        (("sweep", "--set", "heads=3", "--dry-run"), "heads 3 is not a multiple of kv_heads 2"),
        (("sweep", "--budget", "soon"), "--budget 'soon'"),
        (("sweep", "--effort", "some"), "--effort 'some'"),
        (("sweep", "--device", "tpu"), "--device 'tpu'"),
        (("sweep", "--registry", "nowhere:PATHS"), "--registry 'nowhere:PATHS'"),
        (("sweep", "--registry", "nsa.paths:NOTHING"), "--registry 'nsa.paths:NOTHING'"),
        (("plot", "nowhere"), "no run below nowhere"),
        (("sweep", "--bugdet", "5m"), "--bugdet"),
        (("sweeep",), "sweeep"),
        (("compare", str(ROOT), str(ROOT), "--effect", "9%"), "the 4 % lane cannot be found"),
        (("compare", str(ROOT), str(ROOT), "--effect", "some"), "--effect 'some'"),
        (("compare", str(ROOT), str(ROOT), "--alpha", "2"), "alpha 2.0: expected a rate"),
        (("compare", "no-such-commit"), "is no folder that holds nsa/"),
        (("plot", "regressions"), "no history below"),
        (("show", "a", "b"), "b"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_a_usage_error_is_exit_2_with_the_message_on_stderr(
    words: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = command(*words)
    assert shown.exit_code == 2
    assert said in shown.stderr
    assert shown.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (('paths = ["gather"', 'paths = ["gatherer"'), "unknown paths ['gatherer']"),
        (("[ladders.gather]", "[ladders.gatherer]"), "ladders for 'gatherer'"),
        (("contexts", "context"), "context"),
        (("[axes]", "[axes"), "not TOML"),
    ],
)
def test_a_sweep_file_with_a_typo_is_exit_2(file: str, edit: tuple[str, str], said: str) -> None:
    Path(file).write_text(TINY.replace(*edit))
    shown = command("sweep", file, "--device", "cpu")
    assert shown.exit_code == 2
    assert said in shown.stderr
    assert shown.stdout == ""


def test_what_went_wrong_is_exit_1_with_one_line_on_stderr(tmp_path: Path) -> None:
    (tmp_path / "half.json").write_text("{")
    for name in ("half.json", "nowhere.json"):
        shown = command("show", str(tmp_path / name))
        assert shown.exit_code == 1
        assert name in shown.stderr
        assert len(shown.stderr.splitlines()) == 1
        assert shown.stdout == ""


class Unpaired:
    """Stands where a comparison does, and finds no pairs."""

    def __init__(self, question: Question, **_: Any) -> None:
        self.question = question

    def run(self) -> CompareResult:
        """A result."""
        return judge(self.question, [], run="the run")


def test_a_comparison_is_told_before_its_comment_is_written_and_makes_the_comments_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate_commands, "Comparing", Unpaired)
    (tmp_path / "file").touch()
    words = ("compare", str(ROOT), str(ROOT), "--set", "contexts=512", "--markdown")
    shown = command(*words, str(tmp_path / "file" / "comment.md"))
    assert shown.exit_code == 1
    assert shown.stdout.startswith("UNDECIDED")
    assert "records  the run" in shown.stderr
    assert shown.stderr.splitlines()[-1].endswith(f": {tmp_path / 'file'}")
    comment = tmp_path / "new" / "comment.md"
    assert command(*words, str(comment)).exit_code == 4
    assert comment.read_text().startswith("### nsa-tune: UNDECIDED")


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "stopped; a sweep, compare or history goes on where it was when"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device; make room, then a sweep"),
        (OSError(errno.EACCES, "Permission denied", "/there"), 1, "Permission denied: /there"),
    ],
)
def test_what_stops_a_command_from_outside_is_told_in_one_line_with_what_to_do(
    raised: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(_: Any) -> None:
        raise raised

    monkeypatch.setattr(sweep_command, "sweep", stopped)
    shown = command("sweep")
    assert (shown.exit_code, shown.stdout, len(shown.stderr.splitlines())) == (code, "", 1)
    assert shown.stderr.startswith(f"nsa-tune: {said}")


# Help


def modules_after(*words: str) -> Any:
    """Exit code, stdout and which heavy modules a command pulled in."""
    code = (
        "import json, sys\nfrom tuner.__main__ import main\n"
        f"sys.argv = {['nsa-tune', *words]!r}\n"
        "try:\n    main()\nexcept SystemExit as end:\n    code = end.code\n"
        "heavy = ('torch', 'optuna', 'matplotlib', 'scipy', 'numpy')\n"
        "print(json.dumps([code, [name for name in heavy if name in sys.modules]]), file=sys.stderr)\n"
    )
    shown = fresh("-c", code)
    return *json.loads(shown.stderr.splitlines()[-1]), shown.stdout


@pytest.mark.parametrize("words", [("--help",), ("sweep", "--help"), ("--version",)], ids=" ".join)
def test_help_and_version_import_nothing_heavy(words: tuple[str, ...]) -> None:
    code, heavy, stdout = modules_after(*words)
    assert code in (0, None)
    assert heavy == []
    assert stdout


def test_help_lists_the_commands_and_the_options() -> None:
    shown = command("--help")
    assert shown.exit_code == 0
    for name in ("sweep", "show", "doctor", "plot"):
        assert name in shown.stdout
    shown = CliRunner().invoke(app, ["sweep", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    for option in ("--budget", "--effort", "--set", "--out", "--export", "--storage", "--dry-run", "--json"):
        assert option in shown.stdout


def test_version_is_printed() -> None:
    shown = command("--version")
    assert shown.exit_code == 0
    assert shown.stdout.startswith("nsa-tune ")

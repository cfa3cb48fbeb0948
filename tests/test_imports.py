"""Claims about the package: what the wheel holds, what importing it pulls in, and what listing paths needs."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def tracked(pattern: str) -> set[str]:
    """Names of the files that git tracks below a folder."""
    out = subprocess.run(["git", "ls-files", pattern], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {Path(line).name for line in out.splitlines()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from this checkout as it stands."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)],
        check=True, capture_output=True,
    )  # fmt: skip
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        yield set(archive.namelist())


def test_the_wheel_installs_nsa_and_tuner_and_nothing_else(wheel):
    tops = {name.split("/")[0] for name in wheel if ".dist-info" not in name}
    assert tops == {"nsa", "tuner"}


def test_the_wheel_holds_exactly_the_tracked_tables_and_sweeps(wheel):
    tables = {Path(name).name for name in wheel if name.startswith("nsa/dispatch_tables/")}
    sweeps = {Path(name).name for name in wheel if name.startswith("tuner/sweeps/")}
    assert tables == tracked("results/dispatch_tables")
    assert sweeps == tracked("sweeps")
    assert "tuner/validation.html.j2" in wheel


def imported(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after running ``code``."""
    probe = f"{code}\nimport sys; print(' '.join(sorted({{name.split('.')[0] for name in sys.modules}})))"
    out = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return set(out.split())


def test_importing_nsa_pulls_in_no_part_of_the_tool():
    assert not imported("import nsa") & {"tuner", "optuna", "rich", "typer", "matplotlib", "scipy", "flash_attn"}


def test_listing_paths_needs_neither_triton_nor_flash_attn():
    assert not imported("import nsa; list(nsa.PATHS)") & {"triton", "flash_attn"}


def test_help_imports_no_torch():
    code = (
        "import sys; sys.argv = ['nsa-tune', '--help']\nfrom tuner.__main__ import main\n"
        "try: main()\nexcept SystemExit: pass"
    )
    assert not imported(code) & {"torch", "optuna", "matplotlib", "nsa"}


def test_records_and_verdicts_need_no_torch():
    assert not imported("import tuner.record, tuner.rounds, tuner.stats, tuner.verdict") & {"torch", "nsa"}

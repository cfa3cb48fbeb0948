"""Claims about the documents: what they tell a reader to run exists and works, and nothing names one machine."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nsa
from nsa.problem import SelectionProblem

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    ROOT / name for name in ("README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")))
]


def blocks(document: Path, language: str) -> list[str]:
    """Fenced code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", document.read_text(), re.DOTALL)


def test_the_readmes_python_runs_as_written(capsys):
    G, h, T = 2, 4, 128
    q, k, v = torch.randn(1, T, G * h, 16), torch.randn(1, T, G, 16), torch.randn(1, T, G, 16)
    usage, views = blocks(ROOT / "README.md", "python")
    scope = {"q": q, "k": k, "v": v, "G": G, "h": h, "nsa": nsa}
    exec(views, scope)
    assert scope["query"].data_ptr() == q.data_ptr()
    assert scope["key"].data_ptr() == k.data_ptr()
    scope["block_indices"] = torch.zeros(1, T, G, 2, dtype=torch.int32)
    exec(usage, scope)
    assert scope["out"].shape == (1, T, G, h, 16)
    assert "selection" in capsys.readouterr().out


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_pictures_lead_to_files(document):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


def test_every_nsa_tune_command_in_the_documents_exists():
    from tuner.cli import app

    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    known |= {group.name for group in app.registered_groups}
    for document in DOCUMENTS:
        text = document.read_text()
        code = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL) + re.findall(r"`([^`\n]+)`", text)
        for name in re.findall(r"^ *nsa-tune ([a-z]+)", "\n".join(code), re.MULTILINE):
            assert name in known, (document.name, name)


def test_every_benchmark_in_the_documents_exists():
    for document in DOCUMENTS:
        for name in re.findall(r"benchmarks/(\w+\.py)", document.read_text()):
            assert (ROOT / "benchmarks" / name).exists(), (document.name, name)


def test_no_tracked_file_names_a_path_of_one_machine():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    homes = re.compile(r"/(work|root|home)/\w")
    for name in files:
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".json", ".jsonl", ".yml", ".txt", "") and path.is_file():
            found = homes.search(path.read_text(errors="replace"))
            assert found is None or name == "tests/test_docs.py", (name, found)


def test_dispatch_benchmark_prints_its_line():
    out = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "dispatch.py")], capture_output=True, text=True, check=True,
        cwd=ROOT, env={"PYTHONPATH": str(ROOT), "PATH": ""},
    ).stdout  # fmt: skip
    assert re.search(r"^median lookup \d+\.\d+ us$", out, re.MULTILINE)


RANGES = {"form": "ranges", "block_size": 0, "topk": 1}
PROBLEMS = {
    "selection": {"block_size": 64, "topk": 16},
    "window": {"operation": "window", "window": 512, **RANGES},
    "compression": {"operation": "compression", "kernel_size": 32, "kernel_stride": 16, **RANGES},
}
"""Fields of a problem of each operation."""


def test_the_page_of_paths_has_every_path_and_every_parameter_under_it():
    text = (ROOT / "docs" / "paths.md").read_text()
    sections = dict(re.findall(r"^### (.+)\n((?:(?!#).*\n)*)", text, re.MULTILINE))
    assert set(nsa.PATHS) <= set(sections)
    shared = sections["What the Triton paths of selection share"]
    for name, path in nsa.PATHS.items():
        said = sections[name] + (shared if "see below" in sections[name] else "")
        said += sections["triton_compressed"] if "as `triton_compressed`" in said else ""
        for parameter in parameters_of(path):
            assert f"`{parameter}`" in said, (name, parameter)
        for parameter in re.findall(r"^- `(\w+)`", sections[name], re.MULTILINE):
            assert parameter in parameters_of(path), (name, parameter)


def parameters_of(path):
    """Names of a path's parameters, in any mode and on any device."""
    return {
        parameter.name
        for operation, mode, kind in itertools.product(path.operations, path.modes, ("cpu", "cuda"))
        for parameter in path.tunables(
            SelectionProblem(
                mode=mode, dtype="bfloat16", B=1, S=1 if mode == "decode" else 4096, T=4096, G=4, h=16, Dk=128, Dv=128,
                **PROBLEMS[operation],
            ),
            torch.device(kind),
        )
    }  # fmt: skip

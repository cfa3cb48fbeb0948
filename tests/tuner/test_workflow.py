"""The CI guard can be parsed, asks for what exists, and turns every exit code but 0 red: PR31's could and did none."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def steps() -> dict[str, dict[str, Any]]:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "nsa-tune.yml").read_text())
    return {step.get("name", step.get("uses", "")): step for step in workflow["jobs"]["compare"]["steps"]}


def test_the_base_is_the_merge_base_and_the_history_is_there(steps: dict[str, dict[str, Any]]) -> None:
    assert steps["actions/checkout@v4"]["with"]["fetch-depth"] == 0
    assert "git merge-base" in steps["Find the base"]["run"]


@pytest.mark.parametrize("code", ["0", "1", "2", "3", "4", ""])
def test_only_exit_code_0_is_green(steps: dict[str, dict[str, Any]], code: str) -> None:
    command = ["bash", "-e", "-c", steps["Verdict"]["run"]]
    done = subprocess.run(command, env={"CODE": code}, capture_output=True, check=False)
    assert (done.returncode == 0) == (code == "0")


@pytest.mark.parametrize("code", [0, 3, 4])
def test_the_exit_code_of_the_comparison_reaches_the_verdict(
    steps: dict[str, dict[str, Any]], tmp_path: Path, code: int
) -> None:
    fake = tmp_path / "nsa-tune"
    fake.write_text(f"#!/bin/sh\necho '{{}}'\nexit {code}\n")
    fake.chmod(0o755)
    env = {
        "PATH": f"{tmp_path}:/usr/bin:/bin", "GITHUB_OUTPUT": str(tmp_path / "output"), "BASE": "b", "SWEEP": "quick",
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary"), "BUDGET": "1m",
    }  # fmt: skip
    subprocess.run(["bash", "-e", "-c", steps["Compare"]["run"]], env=env, cwd=tmp_path, check=True)
    assert (tmp_path / "output").read_text() == f"code={code}\n"

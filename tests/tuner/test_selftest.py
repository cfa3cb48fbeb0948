"""The selftest says what a machine can and cannot detect, and fails where a broken path passes. Scripted times."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tuner.scripted import Clock, LocalWorker, one_thread
from tuner import drill, gate_commands, selftest
from tuner.record import Sample
from tuner.sweep import SweepError
from tuner.trial import Timing


class SelfTimed(LocalWorker):
    """A worker whose timer reads known work to 0.2 %, off by ``error``."""

    error = 0.0

    def ask(self, verb: str, argument: Any = None, **timeout: float) -> Any:
        if verb != "self_test":
            return super().ask(verb, argument, **timeout)
        known = {"base": 1.0, "1.00": 1.0, "1.01": 1.01, "1.04": 1.04 + self.error}
        coin = random.Random(1)
        return {
            name: Timing(
                samples=[Sample(turn, 0, 100.0 * ratio * coin.gauss(1.0, 0.002)) for turn in range(argument)],
                dropped=0, calls_per_sample=1,
            )
            for name, ratio in known.items()
        }  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    some = ("1 another path runs", "4 first key only")
    monkeypatch.setattr(selftest, "ITEMS", {name: drill.ITEMS[name] for name in some})
    with one_thread():
        yield


def run_selftest(out: Path, hire: Any = SelfTimed, watch: str = "Watch", budget_s: float = 60.0) -> selftest.SelfTest:
    return selftest.selftest(
        out=out, hire=hire, hire_limited=lambda _: LocalWorker(), clock=Clock(), watch=f"tests.tuner.scripted:{watch}",
        budget_s=budget_s,
    )  # fmt: skip


def test_a_machine_that_sees_and_a_drill_that_is_caught_pass(tmp_path: Path) -> None:
    found = run_selftest(tmp_path)
    text = selftest.as_text(found)
    assert found.exit_code == 0, text
    assert "CAN detect a slowdown of" in text
    assert "CAN tell broken paths: 2 of 2 caught" in text
    assert "1.04 reads 1.04" in text


def test_a_biased_machine_cannot_gate_and_says_so(tmp_path: Path) -> None:
    found = run_selftest(tmp_path, watch="BiasedWatch")
    assert found.exit_code == 4
    assert "CANNOT gate here and now: the A/A lane alarms" in selftest.as_text(found)
    assert "; stop other work and try again" in selftest.as_text(found)


def test_a_budget_that_was_too_short_is_what_to_change(tmp_path: Path) -> None:
    found = run_selftest(tmp_path, budget_s=0.2)
    assert found.exit_code == 4
    assert "of 3 launches: more time is needed; " in selftest.as_text(found)
    assert "; give it a larger --budget" in selftest.as_text(found)


def test_a_timer_that_misreads_known_work_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SelfTimed, "error", 0.03)
    found = run_selftest(tmp_path)
    assert found.exit_code == 4
    assert "misread work of known ratios" in selftest.as_text(found)


def test_a_broken_path_that_passes_fails_the_selftest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    healthy = type(drill.ITEMS["8 future seen"])(
        path=drill.PATHS["crashes_with_gradients"], expected="crash", mode="prefill"
    )
    monkeypatch.setattr(selftest, "ITEMS", {"no defect": healthy})
    found = run_selftest(tmp_path)
    assert found.exit_code == 1
    assert "MISS no defect: ok (expected crash)" in selftest.as_text(found)


def test_settings_of_the_command_line_are_read_strictly() -> None:
    options = gate_commands.GateOptions(effect="1%", budget="5m", device="cpu")
    assert (options.settings()["effect"], options.settings()["budget_s"]) == (0.01, 300.0)
    assert gate_commands.fraction("0.02") == 0.02
    with pytest.raises(SweepError, match="--effect"):
        gate_commands.fraction("much")
    with pytest.raises(SweepError, match="has no paths"):
        gate_commands.GateOptions(paths=("auto", "nonsense")).scenarios()


def test_a_scenario_is_named_in_full_or_by_a_part_that_only_it_has() -> None:
    known = gate_commands.GateOptions(device="cpu", paths=("auto", "varlen")).scenarios()
    assert gate_commands.named("decode T=512 auto", known).name == "decode T=512 auto"
    assert gate_commands.named("prefill T=2048 varlen", known).path == "varlen"
    with pytest.raises(SweepError, match="names 2 scenarios"):
        gate_commands.named("decode T=512", known)
    with pytest.raises(SweepError, match="names 0 scenarios"):
        gate_commands.named("train", known)

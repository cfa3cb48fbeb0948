"""Claims about examples/train.py: the loss falls, a step waits for nothing, and the records say what ran."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from nsa.errors import UnsupportedPathError
from nsa.flags import Flags, read_flags
from nsa.trace import record_paths
from tuner.training import WAITS, TrainingLog, host_waits, requested_by
from tuner.training_record import TrainingFolder, TrainingRecord

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
PR31_FLAGS = {
    "NSA_PREFILL_BATCHED": "1", "NSA_USE_SEL_PACK": "1", "NSA_SEL_RANGES_V2": "1", "NSA_USE_FA2": "1",
    "NSA_USE_FA2_CMP": "1", "NSA_USE_FA2_WIN": "0", "NSA_USE_SEL_VARLEN": "1", "NSA_VARLEN_RESERVE_N": "8192",
    "NSA_VARLEN_RESERVE_K": "33554432",
}  # fmt: skip


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train", ROOT / "examples" / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train"] = module
    spec.loader.exec_module(module)
    return module


def tiny(example: ModuleType, **changes: object) -> object:
    """A preset of some ten steps of some ten milliseconds."""
    sizes = {"layers": 1, "batch": 4, "sequence": 64, "steps": 13}
    return replace(example.PRESETS["small"], **(sizes | changes))


def run(
    example: ModuleType, preset: object, out: Path, flags: Flags | None = None
) -> tuple[TrainingFolder, list[TrainingRecord]]:
    folder = TrainingFolder(example.train("tiny", preset, CPU, flags or read_flags({}), out, commit="abc"))
    return folder, folder.lines.read()


def test_the_loss_falls_on_text(example: ModuleType, tmp_path: Path) -> None:
    folder, records = run(example, tiny(example, steps=25), tmp_path)
    losses = [loss for record in records for loss in record.losses]
    assert len(losses) == 25
    assert losses[0] == pytest.approx(5.55, abs=0.2)  # log 256: nothing is known at first
    assert sum(losses[-5:]) / 5 < losses[0] - 1.5
    assert folder.done_file.exists()
    assert all(record.tokens_per_s > 0 for record in records if not record.profiled)


def test_ten_steps_at_the_shape_of_pr31_under_its_flags_run_varlen_and_learn(
    example: ModuleType, tmp_path: Path
) -> None:
    flags = read_flags(PR31_FLAGS)
    preset = replace(example.PRESETS["pr31"], sequence=128, layers=1)
    folder, records = run(example, preset, tmp_path, flags)
    losses = [loss for record in records for loss in record.losses]
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 0.5
    routes = [route for record in records for route in record.executed]
    assert {route.path for route in routes if route.operation == "selection"} == {"varlen"}
    assert {route.status for route in routes if route.operation == "selection"} == {"forced"}
    assert not any(route.path.startswith("flash_attn") for route in routes if route.operation == "window")
    assert all(route.met for route in routes)
    setup = folder.setup()
    assert setup.requested["selection"] == "varlen"
    assert setup.overridden == ("NSA_USE_SEL_PACK",)
    assert setup.flags == PR31_FLAGS


def test_compiled_parts_learn_what_the_eager_model_does(example: ModuleType) -> None:
    losses = []
    for backend in (None, "eager"):
        torch.manual_seed(0)
        model = example.LanguageModel(tiny(example, layers=2), read_flags({}))
        if backend:
            model.compile_parts(backend)
        step = example.training_step(tiny(example, layers=2), model, CPU)
        with record_paths() as seen:
            losses.append([float(step()) for _ in range(3)])
        assert [run.operation for run in seen.executed].count("selection") == 6
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_step_reads_nothing_back_to_the_host(example: ModuleType) -> None:
    preset = tiny(example)
    model = example.LanguageModel(preset, read_flags({}))
    step = example.training_step(preset, model, CPU)
    step()
    assert waits(step) == 0
    assert waits(lambda: step().item()) == 1


def test_the_log_reads_losses_only_every_few_steps(example: ModuleType, tmp_path: Path) -> None:
    preset = tiny(example)
    model = example.LanguageModel(preset, read_flags({}))
    step = example.training_step(preset, model, CPU)
    setup = example.setup_of("tiny", preset, model, read_flags({}), compiled=False)
    with TrainingLog(setup, read_flags({}), model, device=CPU, out=tmp_path, every=4) as log:
        log.add(step())
        assert waits(lambda: [log.add(step()) for _ in range(3)]) == 0
    assert [record.first_step for record in log.folder.lines.read()] == [0]


def waits(call: Callable[[], object]) -> int:
    """Reads of tensors by the host, but for the CPU's AdamW, which keeps its step counts in tensors on the host."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    inside = sum(1 for event in profiler.events() if event.name in WAITS["cpu"] and in_optimizer(event))
    return host_waits(profiler, CPU) - inside


def in_optimizer(event: Any) -> bool:
    while event is not None and not event.name.startswith("Optimizer.step"):
        event = event.cpu_parent
    return event is not None


def test_a_failure_becomes_a_record_and_is_raised(example: ModuleType, tmp_path: Path) -> None:
    flags = Flags(path="varlen", reserves={"varlen": {"row_chunk": -1}})
    with pytest.raises(Exception, match="row_chunk"):
        run(example, tiny(example), tmp_path, flags)
    (file,) = tmp_path.glob("**/training.jsonl")
    folder = TrainingFolder(file.parent)
    (record,) = folder.lines.read()
    assert record.outcome == "crash"
    assert "row_chunk" in record.reason
    assert not folder.done_file.exists()


def test_a_forced_path_that_cannot_run_is_recorded_as_unsupported(example: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedPathError):
        run(example, tiny(example), tmp_path, Flags(path="varlen", reserves={"varlen": {"backend": "flash_attn"}}))
    (file,) = tmp_path.glob("**/training.jsonl")
    assert [record.outcome for record in TrainingFolder(file.parent).lines.read()] == ["unsupported"]


def test_a_loss_that_is_not_finite_is_wrong_and_is_not_a_number(example: ModuleType, tmp_path: Path) -> None:
    _, records = run(example, tiny(example, learning_rate=float("inf"), steps=5), tmp_path)
    wrong = [record for record in records if record.outcome == "wrong"]
    assert wrong
    assert "not finite" in wrong[0].reason
    assert len(wrong[0].losses) < 4


def test_flags_say_what_is_requested_and_a_route_against_them_is_not_met() -> None:
    from tuner.training import met

    flags = read_flags({"NSA_USE_FA2_WIN": "0", "NSA_USE_FA2_CMP": "1", "NSA_USE_SEL_PACK": "1"})
    assert requested_by(flags) == {
        "selection": "packed", "compression": "flash_attn where it can run", "window": "not flash_attn",
    }  # fmt: skip
    assert met("selection", "packed", flags)
    assert not met("selection", "dense", flags)
    assert not met("window", "flash_attn", flags)
    assert met("compression", "flash_attn", flags)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--steps", "0"), "'0': expected a whole number, at least 1"),
        (("--batch", "-3"), "'-3': expected a whole number, at least 1"),
        (("--path", "varlenn"), "invalid choice: 'varlenn'"),
        (("--path", "sdpa_window"), "invalid choice: 'sdpa_window'"),
        (("--device", "tpu"), "--device tpu: expected cpu or cuda"),
        (("--device", "cuda:9"), "--device cuda:9: torch sees no GPU here; use --device cpu"),
    ],
)
def test_what_cannot_be_asked_for_is_a_usage_error_and_leaves_no_record(
    example: ModuleType, words: tuple[str, str], said: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(tmp_path), *words])
    with pytest.raises(SystemExit) as ended:
        example.main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_flag_or_a_path_that_this_machine_refuses_ends_in_one_line(
    example: ModuleType, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--device", "cpu", "--path", "flex", "--out", str(tmp_path)])
    monkeypatch.setenv("NSA_VARLEN_RESERVE_N", "many")
    with pytest.raises(SystemExit, match=r"^train\.py: NSA_VARLEN_RESERVE_N is 'many', expected a decimal number"):
        example.main()
    monkeypatch.delenv("NSA_VARLEN_RESERVE_N")
    monkeypatch.setitem(example.PRESETS, "small", tiny(example))
    with pytest.raises(SystemExit, match=r"^train\.py: unsupported: "):
        example.main()


@pytest.mark.slow
def test_the_command_trains_in_a_minute_and_prints_what_it_reached(tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "examples" / "train.py"), "--steps", "12", "--out", str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
    assert "tokens/s" in done.stdout
    assert list(tmp_path.glob("records/*/small/*/complete"))


@pytest.mark.gpu
def test_no_training_step_waits_for_the_gpu(example: ModuleType) -> None:
    device = torch.device("cuda")
    preset = tiny(example)
    model = example.LanguageModel(preset, read_flags({})).to(device)
    step = example.training_step(preset, model, device)
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_read_of_a_loss_is_counted_as_a_wait_on_a_gpu() -> None:
    device = torch.device("cuda")
    loss = torch.ones((), device=device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        loss.item()
    assert host_waits(profiler, device) == 1

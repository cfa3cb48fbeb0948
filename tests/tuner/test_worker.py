"""Claims about workers: what a candidate does to its process becomes an outcome, and the session goes on."""

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa.errors import ReserveError, UnsupportedPathError
from nsa.paths import Candidate
from nsa.problem import SelectionProblem
from tests.tuner.misbehaving import PATHS, REGISTRY
from tuner import worker as worker_process
from tuner.attest import FellBack
from tuner.oracle import WrongResult
from tuner.session import Seat, Session, Timed
from tuner.trial import Assessment, SequenceResult, Trial
from tuner.worker import CandidateFailed, Worker, WorkerDied, classify

CPU = torch.device("cpu")
PROBLEM = SelectionProblem(
    mode="decode", dtype="float32", B=1, S=1, T=48, G=1, h=2, Dk=8, Dv=8, block_size=16, topk=2
)  # fmt: skip
TRIAL = Trial(problem=PROBLEM, pattern="scored", seed=0, device="cpu", registry=REGISTRY)
PATIENT_S = 120.0


def candidate(name: str, **parameters: Any) -> Candidate:
    """A path of the registry at its defaults but for what is given."""
    return Candidate(path=name, parameters={**PATHS[name].defaults(PROBLEM, CPU), **parameters})


@pytest.fixture(scope="module")
def held() -> Iterator[Session]:
    """One session for all tests: it must survive every one of them."""
    session = Session("cpu", timeout_s=PATIENT_S)
    session.hold(TRIAL)
    yield session
    session.close()


@pytest.fixture
def session(held: Session) -> Session:
    """The session, nothing assessed yet."""
    held.assessed.clear()
    held.timeout_s = PATIENT_S
    return held


def assess(session: Session, name: str, **parameters: Any) -> Assessment:
    """What a session says of a path."""
    return session.assess(candidate(name, **parameters), thorough=False)


# Exceptions


class InductorError(Exception):
    """As torch's compiler raises them."""

    __module__ = "torch._inductor.exc"


class CompilationError(Exception):
    """As Triton's does."""

    __module__ = "triton.compiler.errors"


class OutOfResources(Exception):
    """As Triton's launcher does."""

    __module__ = "triton.runtime.errors"


@pytest.mark.parametrize(
    ("error", "outcome", "reason"),
    [
        (UnsupportedPathError("needs blocks"), "unsupported", "needs blocks"),
        (WrongResult("off by 1"), "wrong", "off by 1"),
        (FellBack("saw 0"), "fell_back", "saw 0"),
        (ReserveError("asked for 5 bytes"), "oom", "ReserveError: asked for 5 bytes"),
        (MemoryError(), "oom", "MemoryError: "),
        (torch.OutOfMemoryError("CUDA out of memory"), "oom", "OutOfMemoryError: CUDA out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "oom", "can't allocate memory"),
        (RuntimeError("HIP out of memory"), "oom", "out of memory"),
        (InductorError("no compiler"), "compile_error", "InductorError: no compiler"),
        (CompilationError("bad type"), "compile_error", "CompilationError: bad type"),
        (OutOfResources("shared memory"), "compile_error", "OutOfResources: shared memory"),
        (RuntimeError("illegal memory access"), "crash", "RuntimeError: illegal memory access"),
        (ZeroDivisionError("a defect"), "crash", "ZeroDivisionError: a defect"),
        (KeyError("out of memory"), "crash", "KeyError: 'out of memory'"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_an_exception_has_its_outcome_and_its_reason(error: BaseException, outcome: str, reason: str) -> None:
    found, said = classify(error)
    assert found == outcome
    assert reason in said


def test_a_crash_names_the_innermost_line() -> None:
    def innermost() -> None:
        raise ZeroDivisionError("a defect")

    try:
        innermost()
    except ZeroDivisionError as error:
        _, said = classify(error)
        line = innermost.__code__.co_firstlineno + 1
    assert said == f"ZeroDivisionError: a defect (at {Path(__file__).name}:{line})"


def test_a_message_of_many_lines_is_said_in_one() -> None:
    outcome, said = classify(CompilationError("ptxas failed\n`stderr`:\n  line 3\nRepro command: /a/path/ptxas\n"))
    assert (outcome, said) == ("compile_error", "CompilationError: ptxas failed `stderr`: line 3")


def test_a_long_message_is_cut() -> None:
    assert len(classify(RuntimeError("x" * 10_000))[1]) < 600


def test_what_torch_raises_without_memory_is_oom() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**50)
    assert classify(raised.value)[0] == "oom"


# One candidate


@pytest.mark.parametrize(
    ("name", "outcome", "reason"),
    [
        ("exits", "crash", "the worker exited with 3"),
        ("segfaults", "crash", "the worker was ended by SIGSEGV"),
        ("runs_out_of_memory", "oom", "MemoryError: 64 GiB for a mask"),
        ("raises", "crash", "ZeroDivisionError: a defect (at misbehaving.py:"),
        ("off_by_a_percent", "wrong", "derived bound"),
        ("runs_packed", "fell_back", "index_select"),
    ],
)
def test_a_candidate_that_misbehaves_has_its_outcome_and_the_next_one_is_served(
    session: Session, name: str, outcome: str, reason: str
) -> None:
    found = assess(session, name)
    assert found.outcome == outcome
    assert reason in found.reason
    assert found.oracle_error is None
    assert candidate(name).name not in session.built
    assert assess(session, "gather").outcome == "ok"


def test_a_candidate_that_forks_does_not_answer_for_the_next_one(session: Session) -> None:
    for name, outcome in (
        ("forks", "wrong"),
        ("gather", "ok"),
        ("forks", "wrong"),
        ("dense", "ok"),
        ("raises", "crash"),
    ):
        session.assessed.pop(candidate(name).name, None)
        assert assess(session, name).outcome == outcome, name


def test_what_a_path_prints_is_none_of_the_tools_output(capfd: pytest.CaptureFixture[str]) -> None:
    session = Session("cpu", timeout_s=PATIENT_S)
    session.hold(TRIAL)
    assert assess(session, "prints").outcome == "ok"
    session.close()
    assert capfd.readouterr().out == ""


def test_a_candidate_that_hangs_is_ended_and_the_next_one_is_served(session: Session) -> None:
    assert assess(session, "gather").outcome == "ok"
    assert session.prover.worker is not None
    process = session.prover.worker.process
    session.timeout_s = 3.0
    found = assess(session, "hangs")
    assert (found.outcome, found.reason) == ("hang", "no answer to 'assess' within 3 s")
    assert not process.is_alive()
    session.timeout_s = PATIENT_S
    assert assess(session, "dense").outcome == "ok"


def test_a_candidate_that_passes_comes_with_its_proof(session: Session) -> None:
    found = assess(session, "gather")
    assert found.outcome == "ok"
    assert found.oracle_error is not None
    assert found.oracle_bound is not None
    assert found.oracle_error <= found.oracle_bound
    assert found.kernels["aten::scaled_dot_product_attention"] == 1
    assert found.peak_bytes
    assert found.growths == 2
    assert found.workspace_bytes == 2 * 32 * 8 * 4


def test_a_parameter_that_a_path_does_not_have_is_unsupported(session: Session) -> None:
    found = assess(session, "gather", row_chnk=64)
    assert found.outcome == "unsupported"
    assert "row_chnk" in found.reason


def test_a_path_that_the_registry_does_not_have_does_not_end_the_session(session: Session) -> None:
    found = session.assess(Candidate(path="nowhere"), thorough=False)
    assert found.outcome == "crash"
    assert "nowhere" in found.reason
    assert assess(session, "gather").outcome == "ok"


def test_a_failure_is_remembered_and_not_tried_again(session: Session) -> None:
    first = assess(session, "raises")
    assert session.prover.worker is not None
    process = session.prover.worker.process.pid
    assert assess(session, "raises") is first
    assert session.prover.worker.process.pid == process


# Several provers


def test_candidates_proven_side_by_side_have_the_outcomes_that_they_have_alone() -> None:
    names = ["gather", "exits", "off_by_a_percent", "dense", "runs_packed", "raises"]
    alone, side_by_side = (Session("cpu", timeout_s=PATIENT_S, provers=count) for count in (1, 3))
    begun: list[str] = []
    try:
        for session in (alone, side_by_side):
            session.hold(TRIAL)
            asked = session.prove(
                [candidate(name) for name in names], math.inf, thorough=True, begun=lambda one: begun.append(one.path)
            )
            assert [one.path for one in asked] == names
        assert sum(seat.worker is not None for seat in side_by_side.provers) == 3
        assert sorted(begun) == sorted(2 * names)
        outcomes = [{name: found.outcome for name, found in s.assessed.items()} for s in (alone, side_by_side)]
        assert outcomes[0] == outcomes[1]
        assert [alone.assessed[candidate(name).name].outcome for name in names] == [
            *("ok", "crash", "wrong", "ok", "fell_back", "crash")
        ]
    finally:
        alone.close()
        side_by_side.close()


def test_out_of_time_the_first_candidate_of_each_path_is_still_proven(session: Session) -> None:
    wanted = [candidate("gather"), candidate("dense"), candidate("gather", row_chunk=16)]
    asked = session.prove(wanted, 0.0, thorough=True, begun=lambda _: None)
    assert asked == wanted[:2]
    assert set(session.assessed) == {one.name for one in wanted[:2]}


# Shared rounds


def timed(session: Session, *names: str) -> Timed:
    """Six rounds over paths that were assessed before."""
    ready = [candidate(name) for name in names]
    assert [session.assess(each, thorough=False).outcome for each in ready] == ["ok"] * len(names)
    return session.time(ready, count=6, batch=3, first=10, budget_s=60.0)


def test_who_ends_the_timing_worker_while_built_takes_nobody_with_it(session: Session) -> None:
    names = ("gather", "exits_while_built", "dense")
    outcomes = [session.assess(candidate(name), thorough=False).outcome for name in names]
    assert outcomes == ["ok", "crash", "ok"]
    found = session.time([candidate("gather"), candidate("dense")], count=6, batch=3, first=0, budget_s=60.0)
    assert not found.failed
    assert set(found.rounds()) == {candidate("gather").name, candidate("dense").name}


def test_provers_that_wait_hold_nothing() -> None:
    session = Session("cpu", timeout_s=PATIENT_S, provers=2)
    try:
        session.hold(TRIAL)
        session.prove([candidate("gather"), candidate("dense")], math.inf, thorough=True, begun=lambda _: None)
        first, second = session.provers
        assert (first.held, second.held, second.alive) == (TRIAL, None, True)
        session.prove([candidate("gather", row_chunk=16), candidate("raises")], math.inf, thorough=True, begun=print)
        assert session.assessed[candidate("gather", row_chunk=16).name].outcome == "ok"
    finally:
        session.close()


def test_who_runs_out_of_memory_beside_others_is_proven_again_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session("cpu", timeout_s=PATIENT_S, provers=2)
    both, met = threading.Barrier(2, timeout=PATIENT_S), set[str]()

    def prove(seat: Seat, one: Candidate, thorough: bool) -> Assessment:
        if one.name in met:
            assert [other.held for other in session.provers if other is not seat] == [None]
            return Assessment(outcome="oom" if one.path == "dense" else "ok", reason="alone")
        met.add(one.name)
        seat.held = TRIAL
        both.wait()
        return Assessment(outcome="oom", reason="beside another")

    monkeypatch.setattr(session, "_prove", prove)
    monkeypatch.setattr(Seat, "forget", lambda seat, _: setattr(seat, "held", None))
    session.hold(TRIAL)
    begun: list[str] = []
    session.prove(
        [candidate("gather"), candidate("dense")], math.inf, thorough=True, begun=lambda one: begun.append(one.path)
    )
    found = [session.assessed[candidate(name).name] for name in ("gather", "dense")]
    assert [(one.outcome, one.reason) for one in found] == [("ok", "alone"), ("oom", "alone")]
    assert sorted(begun) == ["dense", "dense", "gather", "gather"]


@pytest.mark.parametrize(("held", "times"), [(True, 2), (False, 1)])
def test_alone_means_without_the_timing_worker_too(held: bool, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    session, asked = Session("cpu", timeout_s=PATIENT_S, provers=1), list[str]()

    def prove(seat: Seat, one: Candidate, thorough: bool) -> Assessment:
        asked.append(one.path)
        if again := asked.count(one.path) == 2:
            assert session.timer.held is None
            assert not session.built
        return Assessment(outcome="ok" if again else "oom")

    monkeypatch.setattr(session, "_prove", prove)
    monkeypatch.setattr(Seat, "forget", lambda seat, _: setattr(seat, "held", None))
    session.hold(TRIAL)
    session.timer.held, session.built = TRIAL if held else None, {"gather"}
    names = ["gather", "dense"]
    session.prove([candidate(name) for name in names], math.inf, thorough=False, begun=lambda _: None)
    assert sorted(asked) == sorted(times * names)
    outcomes = [session.assessed[candidate(name).name].outcome for name in names]
    assert outcomes == ["ok" if held else "oom"] * 2


def test_what_is_over_the_limit_is_not_proven_again(monkeypatch: pytest.MonkeyPatch) -> None:
    session, asked = Session("cpu", memory_limit_bytes=100, timeout_s=PATIENT_S, provers=2), list[str]()

    def prove(seat: Seat, one: Candidate, thorough: bool) -> Assessment:
        asked.append(one.path)
        return Assessment(outcome="ok", peak_bytes=101)

    monkeypatch.setattr(session, "_prove", prove)
    session.hold(TRIAL)
    session.prove([candidate("gather"), candidate("dense")], math.inf, thorough=True, begun=lambda _: None)
    assert sorted(asked) == ["dense", "gather"]
    found = session.assessed[candidate("gather").name]
    assert (found.outcome, found.reason) == ("oom", "one call held 101 bytes, the limit is 100")


@pytest.mark.parametrize(
    ("culprit", "reason"),
    [
        ("exits_while_timed", "while timed: the worker exited with 3"),
        ("raises_while_timed", "while timed: ZeroDivisionError: a defect under load"),
    ],
)
def test_who_breaks_while_timed_is_left_out_and_the_rest_is_measured(
    session: Session, culprit: str, reason: str
) -> None:
    found = timed(session, "gather", culprit, "dense")
    out = candidate(culprit).name
    assert set(found.failed) == {out}
    assert found.failed[out].outcome == "crash"
    assert found.failed[out].reason.startswith(reason)
    assert session.assessed[out] == found.failed[out]
    taken = found.rounds()
    assert set(taken) == {candidate("gather").name, candidate("dense").name}
    for rounds in taken.values():
        assert sorted(rounds) == [10, 11, 12, 13, 14, 15]
        assert min(rounds.values()) > 0


def test_a_shoot_out_ends_when_it_is_settled(session: Session) -> None:
    ready = [candidate("gather"), candidate("dense")]
    for each in ready:
        session.assess(each, thorough=False)
    asked: list[int] = []

    def settled(taken: dict[str, dict[int, float]]) -> bool:
        asked.append(len(taken[ready[0].name]))
        return len(asked) == 2

    session.time(ready, count=100, batch=3, first=0, budget_s=60.0, settled=settled)
    assert asked == [3, 6]


def test_who_was_released_is_built_again_when_wanted(session: Session) -> None:
    assert assess(session, "gather").outcome == assess(session, "dense").outcome == "ok"
    session.release([candidate("gather")])
    assert session.built == {candidate("gather").name}
    assert set(timed(session, "gather", "dense").timings) == {candidate("gather").name, candidate("dense").name}


def test_a_sequence_of_contexts_reports_each_call_and_its_growths(session: Session) -> None:
    found = session.call_sequence(candidate("gather"), (16, 48, 16, 48))
    assert isinstance(found, SequenceResult)
    assert [(sample.step, sample.T) for sample in found.samples] == [(0, 16), (1, 48), (2, 16), (3, 48)]
    assert [sample.growths for sample in found.samples] == [2, 4, 4, 4]
    assert found.growths == 4


@pytest.mark.parametrize("name", ["raises", "exits_while_timed"])
def test_a_sequence_that_breaks_is_an_outcome(session: Session, name: str) -> None:
    found = session.call_sequence(candidate(name), (16, 48))
    assert isinstance(found, Assessment)
    assert found.outcome == "crash"


# The process


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    """A worker that has answered once."""
    found = Worker("cpu")
    found.ask("identify", timeout_s=PATIENT_S)
    yield found
    found.close()


def test_what_is_asked_before_a_trial_is_held_is_an_answer_not_a_death(worker: Worker) -> None:
    with pytest.raises(CandidateFailed, match="prepare comes first"):
        worker.ask("assess", (candidate("gather"), False), timeout_s=PATIENT_S)
    assert worker.alive


def test_inputs_that_cannot_be_made_are_an_answer_not_a_death(worker: Worker) -> None:
    broken = Trial(problem=PROBLEM, pattern="scored", seed=0, device="cpu", registry="tests.tuner.misbehaving:NOTHING")
    with pytest.raises(CandidateFailed, match="NOTHING"):
        worker.ask("prepare", broken, timeout_s=PATIENT_S)
    assert worker.ask("prepare", TRIAL, timeout_s=PATIENT_S) is None  # decode has no overlap


def test_the_worker_measures_known_work(worker: Worker) -> None:
    found = worker.ask("self_test", 3, timeout_s=PATIENT_S)
    assert set(found) == {"base", "1.00", "1.01", "1.04"}
    assert {len(timing.samples) for timing in found.values()} == {3}


def test_a_worker_that_the_kernel_kills_ran_out_of_memory_and_leaves_nothing_behind(worker: Worker) -> None:
    worker.ask("prepare", TRIAL, timeout_s=PATIENT_S)
    pid = worker.process.pid
    assert pid is not None
    assert worker.log.exists()

    def kill_when_busy() -> None:
        while worker.doing != candidate("hangs").name:
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)

    killing = threading.Thread(target=kill_when_busy, daemon=True)
    killing.start()
    with pytest.raises(WorkerDied, match="ended by SIGKILL") as raised:
        worker.ask("assess", (candidate("hangs"), False), timeout_s=PATIENT_S)
    killing.join()
    assert raised.value.outcome == "oom"
    assert raised.value.about == candidate("hangs").name
    assert not worker.alive
    assert not worker.log.exists()


def test_a_proof_gives_its_memory_back_before_another_worker_builds_what_it_proved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In train at 16k the first prover's allocator kept 119 GiB, and the timing worker found none for the default."""
    happened: list[str] = []

    class Bench:
        def __init__(self, *_: Any) -> None:
            happened.append("inputs")

        def assess(self, name: str) -> None:
            happened.append("assess")
            if name == "wrong":
                raise WrongResult("off by one")

        def build(self, _: str) -> None:
            happened.append("build")

        def prepared(self) -> None:
            pass

    class Pipe:
        def __init__(self) -> None:
            self.requests = [("prepare", TRIAL), ("assess", ("wrong",)), ("assess", ("it",)), ("build", ("it",))]

        def recv(self) -> tuple[str, Any]:
            if not self.requests:
                raise EOFError
            return self.requests.pop(0)

        def send(self, message: tuple[str, Any]) -> None:
            happened.append(message[0])

    monkeypatch.setattr(worker_process.signal, "signal", lambda *_: None)
    monkeypatch.setattr(worker_process.os, "dup2", lambda *_: None)
    monkeypatch.setattr(worker_process, "open_bench", Bench)
    monkeypatch.setattr(worker_process, "release_memory", lambda _: happened.append("release"))
    worker_process.serve(Pipe(), "cpu", 0, str(tmp_path / "log"))  # type: ignore[arg-type]
    proofs = ["assess", "release", "raised", "assess", "release", "answer"]
    assert happened == ["release", "inputs", "release", "answer", *proofs, "build", "answer"]


def test_a_worker_is_deaf_to_ctrl_c_from_its_first_import_on_and_the_tool_is_not() -> None:
    worker = Worker("cpu")
    try:
        status = Path(f"/proc/{worker.process.pid}/status").read_text()
        (mask,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigBlk:"))
        assert int(mask, 16) >> (signal.SIGINT - 1) & 1
    finally:
        worker.close()
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())

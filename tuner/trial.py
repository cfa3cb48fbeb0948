"""Trial: one problem's inputs by pattern and seed, and the messages that pass between the tool and its worker.

Plain frozen values, so that they can be pickled, replayed and recorded. It runs nothing.
"""

from __future__ import annotations

import msgspec

from nsa.paths import Candidate
from nsa.problem import SelectionProblem
from tuner.record import DEFAULT_REGISTRY, Outcome, Sample, SequenceSample


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker prepares: a problem, how its selections are made, and the seed of its inputs.

    ``registry`` is ``"module:name"`` of the PATHS to use; tests put broken twins there, engineers a path of their own.
    """

    problem: SelectionProblem
    pattern: str
    seed: int
    device: str
    registry: str = DEFAULT_REGISTRY


class Assessment(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a candidate before it is timed; ``outcome`` "ok" means checked and attested."""

    outcome: Outcome
    reason: str = ""
    oracle_error: float | None = None
    oracle_bound: float | None = None
    kernels: dict[str, int] = {}
    gpu_kernels: tuple[str, ...] = ()
    peak_bytes: int | None = None
    workspace_bytes: int | None = None
    growths: int | None = None


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """Samples of one candidate from shared rounds."""

    samples: list[Sample]
    dropped: int
    calls_per_sample: int


class Rounds(msgspec.Struct, frozen=True, kw_only=True):
    """A request: time these candidates in ``count`` shared rounds, each in fresh random order, from ``first`` on."""

    candidates: tuple[Candidate, ...]
    count: int
    first: int
    seed: int
    sample_us: float
    budget_s: float


class Sequence(msgspec.Struct, frozen=True, kw_only=True):
    """A request: call the candidate along ``contexts`` with one workspace, as a serving process would."""

    candidate: Candidate
    contexts: tuple[int, ...]


class SequenceResult(msgspec.Struct, frozen=True, kw_only=True):
    """Per-call samples of a Sequence, and the workspace at its end."""

    samples: list[SequenceSample]
    workspace_bytes: int
    growths: int

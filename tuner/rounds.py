"""Shared rounds as arrays: samples of several candidates lined up by round, NaN where one was dropped. Leaf."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from tuner.record import Record, Sample


def by_round(samples: Iterable[Sample]) -> dict[int, float]:
    """Round -> microseconds."""
    return {sample.round: sample.us for sample in samples}


def aligned(taken: Mapping[str, Mapping[int, float]]) -> dict[str, list[float]]:
    """Candidate -> microseconds by round, all lists of one length, NaN where a round has no sample."""
    numbers = sorted(set().union(*taken.values())) if taken else []
    return {name: [found.get(number, math.nan) for number in numbers] for name, found in taken.items()}


def rounds_of(records: Iterable[Record]) -> dict[str, dict[int, float]]:
    """Candidate -> round -> microseconds, of the records that have samples."""
    found: dict[str, dict[int, float]] = {}
    for record in records:
        if record.outcome == "ok" and record.samples:
            found.setdefault(record.candidate, {}).update(by_round(record.samples))
    return found


def aligned_records(records: Iterable[Record]) -> dict[str, list[float]]:
    """``aligned`` over records."""
    return aligned(rounds_of(records))

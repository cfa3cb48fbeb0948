"""Every defect of the PR31 story, alive again in a path, gets its named outcome from the worker and never a time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tuner.drill import DRILL, ITEMS, PATHS
from tuner.trial import Assessment, Rounds
from tuner.worker import CandidateFailed, Worker

WORKERS: dict[int, Worker] = {}


@pytest.fixture(scope="module", autouse=True)
def _ended_workers() -> Iterator[None]:
    yield
    for worker in WORKERS.values():
        worker.close()


def worker_with(memory_limit_bytes: int) -> Worker:
    """A worker that serves every item with that limit."""
    if memory_limit_bytes not in WORKERS or not WORKERS[memory_limit_bytes].alive:
        WORKERS[memory_limit_bytes] = Worker("cpu", memory_limit_bytes=memory_limit_bytes)
    return WORKERS[memory_limit_bytes]


def assessed(name: str) -> tuple[Worker, Assessment]:
    """What a worker says of an item; a failure inside is its outcome, as the tool takes it."""
    item = ITEMS[name]
    worker = worker_with(item.memory_limit_bytes)
    worker.ask("prepare", item.trial("cpu"), timeout_s=60)
    try:
        return worker, worker.ask("assess", (item.candidate("cpu"), True), timeout_s=60)
    except CandidateFailed as failed:
        return worker, Assessment(outcome=failed.outcome, reason=failed.reason)


@pytest.mark.parametrize("name", ITEMS)
def test_broken_path_gets_its_outcome_and_no_time(name: str) -> None:
    worker, found = assessed(name)
    assert found.outcome == DRILL[name], found.reason
    assert found.reason
    request = Rounds(candidates=(ITEMS[name].candidate("cpu"),), count=1, first=0, seed=0, sample_us=1.0, budget_s=1.0)
    with pytest.raises(CandidateFailed, match="KeyError"):
        worker.ask("rounds", (request,), timeout_s=60)


def test_reasons_name_what_is_broken() -> None:
    telling = {
        "1 another path runs": "scatter_reduce_",
        "2 error swallowed": "scatter_reduce_",
        "3 crash with gradients": "UnboundLocalError",
        "4 first key only": "derived bound",
        "6 heads replicated": "shape",
        "6 reserve of 32 GiB": "GiB",
        "7 workspace forgotten": "alternated",
        "9 synchronises": "_local_scalar_dense",
    }
    for name, words in telling.items():
        assert words in assessed(name)[1].reason, name


def test_every_defect_of_a_path_has_its_item() -> None:
    assert [name.split()[0] for name in ITEMS] == ["1", "2", "3", "4", "5", "6", "6", "7", "8", "9"]
    assert set(PATHS) == {item.path.name for item in ITEMS.values()}


def test_broken_paths_are_right_where_their_defect_does_not_show() -> None:
    """The drill proves something only if nothing but the defect itself gives the path away."""
    worker = worker_with(0)
    for name, mode in (("3 crash with gradients", "prefill"), ("8 future seen", "decode")):
        item = ITEMS[name]
        trial = type(item)(path=item.path, expected="ok", mode=mode).trial("cpu")
        worker.ask("prepare", trial, timeout_s=60)
        found = worker.ask("assess", (item.candidate("cpu"), mode != "decode"), timeout_s=60)
        assert found.outcome == "ok", found.reason

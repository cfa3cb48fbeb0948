"""Claims about the ledger: small spaces are enumerated, large ones searched without duplicates, kills survived."""

import json
import math
from pathlib import Path

import optuna
import pytest
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from nsa.paths import Parameter
from tuner.ledger import ENUMERATE_AT_MOST, PER_GENERATION, PRUNE_ABOVE, Ledger, Space, candidates_of, size_of
from tuner.record import RunFolder

SMALL: Space = {
    "dense": (Parameter("query_chunk", (0, 64, 256), 64),),
    "packed": (Parameter("bucket_rounding", (16, 64), 64), Parameter("row_chunk", (0, 64), 0)),
    "bare": (),
}
LARGE: Space = {
    "varlen": (
        Parameter("row_chunk", (0, 64, 256, 1024, 4096), 256),
        Parameter("backend", ("segment", "torch", "flash_attn"), "segment"),
        Parameter("split", tuple(range(8)), 0),
    ),
    "dense": (Parameter("query_chunk", (0, 64, 256), 0),),
}


def journal(tmp_path: Path) -> optuna.storages.BaseStorage:
    """Storage as a sweep keeps it."""
    return optuna.storages.JournalStorage(JournalFileBackend(str(tmp_path / "optuna.journal")))


@pytest.fixture
def storage() -> optuna.storages.BaseStorage:
    """Storage of this test alone."""
    return optuna.storages.InMemoryStorage()


def names(ledger: Ledger, generation: int = 0) -> list[str]:
    """What a generation proposes."""
    return [proposal.candidate.name for proposal in ledger.ask(generation)]


def test_a_space_has_as_many_candidates_as_its_ladders_cross() -> None:
    assert size_of(SMALL) == 3 + 4 + 1
    assert size_of(LARGE) == 5 * 3 * 8 + 3 > ENUMERATE_AT_MOST
    assert size_of({}) == 0


def test_combinations_come_defaults_first_and_each_once() -> None:
    found = [candidate.parameters for candidate in candidates_of("packed", SMALL["packed"])]
    assert found[0] == {"bucket_rounding": 64, "row_chunk": 0}
    assert len(found) == 4 == len({tuple(parameters.items()) for parameters in found})


def test_a_small_space_is_enumerated_paths_taking_turns_defaults_first(storage: optuna.storages.BaseStorage) -> None:
    ledger = Ledger("small", SMALL, storage, seed=0)
    assert (ledger.enumerated, ledger.generations) == (True, 1)
    found = names(ledger)
    assert found[:3] == ["dense(query_chunk=64)", "packed(bucket_rounding=64, row_chunk=0)", "bare"]
    assert len(found) == 8 == len(set(found))


def test_proposals_have_the_values_of_the_ladders_in_their_own_types(storage: optuna.storages.BaseStorage) -> None:
    for proposal in Ledger("large", LARGE, storage, seed=0).ask(0):
        ladders = {item.name: item.ladder for item in LARGE[proposal.candidate.path]}
        assert set(proposal.candidate.parameters) == set(ladders)
        for name, value in proposal.candidate.parameters.items():
            assert value in ladders[name]
            assert type(value) is type(ladders[name][0])


def test_a_large_space_starts_with_each_paths_defaults_and_goes_on_without_duplicates(
    storage: optuna.storages.BaseStorage,
) -> None:
    ledger = Ledger("large", LARGE, storage, seed=0)
    assert (ledger.enumerated, ledger.generations) == (False, 4)
    seen: list[str] = []
    for generation in range(ledger.generations):
        proposals = ledger.ask(generation)
        if generation == 0:
            assert [each.candidate.name for each in proposals] == [
                "varlen(row_chunk=256, backend=segment, split=0)", "dense(query_chunk=0)"
            ]  # fmt: skip
        else:
            assert len(proposals) == PER_GENERATION
        for number, proposal in enumerate(proposals):
            ledger.report(proposal, -0.01 * number, 32)
            ledger.close(proposal, [-0.01 * number], -1.0, pruned=False)
        seen += [each.candidate.name for each in proposals]
    assert len(seen) == len(set(seen))


def test_the_value_is_the_mean_log_ratio_over_contexts(storage: optuna.storages.BaseStorage) -> None:
    ledger = Ledger("small", SMALL, storage, seed=0)
    first, second = ledger.ask(0)[:2]
    for context, ratio in ((32, -0.2), (64, -0.4)):
        assert not ledger.report(first, ratio, context)
    ledger.close(first, [-0.2, -0.4], -100.0, pruned=False)
    ledger.close(second, [], 0.0, pruned=False)
    trials = ledger.study.get_trials()
    assert trials[0].state == TrialState.COMPLETE
    assert trials[0].value == pytest.approx(-0.3)
    assert trials[0].intermediate_values == {32: -0.2, 64: -0.4}
    assert trials[1].state == TrialState.FAIL
    assert trials[1].value is None


def test_twice_as_slow_as_the_default_is_pruned_and_a_little_less_is_not(storage: optuna.storages.BaseStorage) -> None:
    ledger = Ledger("small", SMALL, storage, seed=0)
    slow, middling = ledger.ask(0)[:2]
    assert math.log(2.0) == PRUNE_ABOVE
    assert ledger.report(slow, math.log(2.01), 32)
    assert not ledger.report(middling, math.log(1.99), 32)
    ledger.close(slow, [math.log(2.01)], -1.0, pruned=True)
    assert ledger.study.get_trials()[0].state == TrialState.PRUNED


def test_peak_bytes_beyond_the_limit_are_a_broken_constraint(storage: optuna.storages.BaseStorage) -> None:
    ledger = Ledger("small", SMALL, storage, seed=0)
    greedy, modest = ledger.ask(0)[:2]
    ledger.close(greedy, [-5.0], 4096.0, pruned=False)
    ledger.close(modest, [-0.1], -4096.0, pruned=False)
    assert ledger.study.best_trial.user_attrs["candidate"] == modest.candidate.name


def test_after_a_kill_everything_is_proposed_again_and_nothing_is_left_running(tmp_path: Path) -> None:
    before = Ledger("small", SMALL, journal(tmp_path), seed=0)
    proposals = before.ask(0)
    before.close(proposals[0], [-0.1], -1.0, pruned=False)
    after = Ledger("small", SMALL, journal(tmp_path), seed=0)
    states = [trial.state for trial in after.study.get_trials()]
    assert states == [TrialState.COMPLETE] + [TrialState.FAIL] * 7
    again = after.ask(0)
    assert [each.candidate for each in again] == [each.candidate for each in proposals]
    assert len({each.trial.number for each in again} - {each.trial.number for each in proposals}) == 8


def test_after_a_kill_between_enqueuing_and_asking_every_candidate_is_proposed_once(tmp_path: Path) -> None:
    killed = Ledger("small", SMALL, journal(tmp_path), seed=0)
    for candidate in list(killed.everything())[:3]:
        killed.study.enqueue_trial(killed._fixed(candidate))
    found = names(Ledger("small", SMALL, journal(tmp_path), seed=0))
    assert sorted(found) == sorted(candidate.name for candidate in killed.everything())


def test_after_a_kill_a_large_space_goes_on_without_what_was_proposed(tmp_path: Path) -> None:
    before = Ledger("large", LARGE, journal(tmp_path), seed=0)
    seen = names(before) + names(before, 1)
    after = Ledger("large", LARGE, journal(tmp_path), seed=0)
    assert not set(names(after, 1)) & set(seen)


def test_a_ledger_that_a_full_disk_tore_is_opened_again_after_repair_and_proposes_everything(tmp_path: Path) -> None:
    seen = names(Ledger("small", SMALL, journal(tmp_path), seed=0))
    file = tmp_path / "optuna.journal"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:-2], lines[-2][:20], lines[-1]]))
    with pytest.raises(json.JSONDecodeError):
        Ledger("small", SMALL, journal(tmp_path), seed=0)
    assert RunFolder(tmp_path).repair().startswith("cut ")
    assert names(Ledger("small", SMALL, journal(tmp_path), seed=0)) == seen


def test_two_families_share_a_storage_and_no_trials(tmp_path: Path) -> None:
    one, two = (Ledger(name, SMALL, journal(tmp_path), seed=0) for name in ("decode", "prefill"))
    assert names(one) == names(two)
    assert len(one.study.get_trials()) == len(two.study.get_trials()) == 8
    assert set(optuna.get_all_study_names(journal(tmp_path))) == {"decode", "prefill"}


def test_an_optuna_url_is_a_storage_too(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    assert len(names(Ledger("small", SMALL, url, seed=0))) == 8
    assert len(optuna.load_study(study_name="small", storage=url).get_trials()) == 8


def test_a_space_without_any_candidate_proposes_nothing(storage: optuna.storages.BaseStorage) -> None:
    assert Ledger("none", {}, storage, seed=0).ask(0) == []

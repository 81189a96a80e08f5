"""Successive halving: who stops at a rung, and who is promoted from it."""

import pytest

from graftstack.sweep.asha import Asha
from graftstack.sweep.trials import Row


def asha(*, grace_epochs: int = 1, reduction_factor: float = 3.0, most_epochs: int = 9) -> Asha:
    return Asha(grace_epochs=grace_epochs, reduction_factor=reduction_factor, most_epochs=most_epochs)


def row(epoch: int, accuracy: float, loss: float = 1.0) -> Row:
    return {"epoch": epoch, "accuracy": accuracy, "loss": loss}


def reach(scheduler: Asha, epoch: int, *accuracies: float) -> list[int]:
    """Brings trials 0, 1, ... to an epoch, one by one; returns those that go on."""
    return [
        index
        for number, value in enumerate(accuracies)
        for index in scheduler.keep({number: row(epoch, value)}, is_fused=False)
    ]


def promoted(scheduler: Asha, stopped: set[int], *, is_last_chance: bool = False) -> list[int]:
    """Promotes until nobody is left to; they are over or under way then, and no longer stopped."""
    found = []
    while (index := scheduler.promote(stopped - set(found), is_last_chance=is_last_chance)) is not None:
        found.append(index)
    return found


def test_a_trial_waits_at_every_rung_and_nowhere_else() -> None:
    scheduler = asha()
    kept = [epoch for epoch in range(1, 10) if scheduler.keep({0: row(epoch, 0.5)}, is_fused=False)]
    assert kept == [2, 4, 5, 6, 7, 8, 9]


def test_one_in_three_is_promoted_the_best_first() -> None:
    scheduler = asha()
    assert reach(scheduler, 1, 0.1, 0.9, 0.4, 0.6, 0.8, 0.2, 0.7, 0.3, 0.5) == []
    assert promoted(scheduler, set(range(9))) == [1, 4, 6]


def test_equal_accuracies_are_told_apart_by_their_loss() -> None:
    scheduler = asha()
    for index, loss in enumerate([0.5, 0.3, 0.4]):
        scheduler.keep({index: row(1, 0.9, loss)}, is_fused=False)
    assert promoted(scheduler, {0, 1, 2}) == [1]


def test_too_few_trials_to_compare_wait_until_nothing_else_is_left() -> None:
    scheduler = asha()
    reach(scheduler, 1, 0.5, 0.6)
    assert promoted(scheduler, {0, 1}) == []
    assert promoted(scheduler, {0, 1}, is_last_chance=True) == [1]


def test_the_highest_rung_comes_first() -> None:
    scheduler = asha()
    reach(scheduler, 1, *(number / 10 for number in range(9)))
    reach(scheduler, 3, 0.1, 0.9, 0.2)
    assert scheduler.promote({0, 1, 2, 6, 7, 8}, is_last_chance=False) == 1


def test_who_was_promoted_once_is_not_promoted_from_there_again() -> None:
    scheduler = asha()
    reach(scheduler, 1, 0.9, 0.1, 0.2)
    assert promoted(scheduler, {0, 1, 2}) == [0]
    scheduler.keep({0: row(3, 0.05)}, is_fused=False)
    assert promoted(scheduler, {0, 1, 2}) == []


def test_a_trial_that_was_promoted_passes_its_rung_if_it_has_to_begin_again() -> None:
    scheduler = asha()
    reach(scheduler, 1, 0.9, 0.1, 0.2)
    assert promoted(scheduler, {0, 1, 2}) == [0]
    assert scheduler.keep({0: row(1, 0.9)}, is_fused=False) == [0]


def test_the_last_of_fused_trials_passes_too() -> None:
    assert asha().keep({0: row(1, 0.9)}, is_fused=True) == [0]


def test_trials_that_are_over_for_other_reasons_are_left_alone() -> None:
    scheduler = asha()
    reach(scheduler, 1, 0.9, 0.8, 0.7)
    assert promoted(scheduler, {1, 2}) == []


def test_fused_trials_pass_the_rungs_and_others_have_to_be_better() -> None:
    scheduler = asha()
    assert scheduler.keep({7: row(1, 0.9), 8: row(1, 0.3)}, is_fused=True) == [7, 8]
    reach(scheduler, 1, 0.8, 0.7, 0.1)
    assert promoted(scheduler, {0, 1, 2}) == []


def test_fused_trials_make_no_room_for_others() -> None:
    scheduler = asha()
    scheduler.keep({index: row(1, 0.01) for index in range(10, 20)}, is_fused=True)
    reach(scheduler, 1, 0.8, 0.7, 0.1)
    assert promoted(scheduler, {0, 1, 2}) == [0]


@pytest.mark.parametrize(
    ("grace_epochs", "reduction_factor", "most_epochs", "rungs"),
    [
        (1, 3.0, 27, [1, 3, 9]),
        (3, 3.0, 27, [3, 9]),
        (1, 3.0, 28, [1, 3, 9, 27]),
        (2, 2.0, 9, [2, 4, 8]),
        (1, 1.5, 4, [1, 2]),
        (9, 3.0, 9, []),
        (1, 3.0, 1, []),
    ],
)
def test_rungs_are_powers_of_the_factor_before_the_last_epoch(
    grace_epochs: int, reduction_factor: float, most_epochs: int, rungs: list[int]
) -> None:
    scheduler = asha(grace_epochs=grace_epochs, reduction_factor=reduction_factor, most_epochs=most_epochs)
    assert [
        epoch for epoch in range(1, most_epochs + 1) if not scheduler.keep({0: row(epoch, 0.5)}, is_fused=False)
    ] == rungs

"""The chosen taps are those that an exhaustive search would choose, and each choice says why."""

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pytest

from graftstack.taps.costs import Boundary, Choice, Demand, Rates, choose, compute_s, making_s, read_s

KIB, MIB, GIB = 1024, 1024**2, 1024**3
UNBOUND = 2**60


class Case(NamedTuple):
    boundaries: tuple[Boundary, ...]
    demands: tuple[Demand, ...]
    rates: Rates
    num_items: int
    budget_bytes: int

    @property
    def choices(self) -> tuple[Choice, ...]:
        return choose(
            self.boundaries, self.demands, self.rates, num_items=self.num_items, budget_bytes=self.budget_bytes
        )

    def missing(self) -> list[Boundary]:
        return [boundary for boundary in self.boundaries if boundary.boundary > 0 and not boundary.is_stored]

    def num_bytes(self, taps: Sequence[Boundary]) -> int:
        return sum(self.num_items * tap.item_bytes for tap in taps)

    def spared_s(self, boundary: Boundary) -> float:
        return sum(
            compute_s(boundary, demand, self.rates) - read_s(boundary, demand, self.rates)
            for demand in self.demands
            if demand.boundary == boundary.boundary and demand.obstacle is None
        )

    def used(self) -> list[Boundary]:
        """The stored taps whose reads are cheaper than computing."""
        return [boundary for boundary in self.boundaries if boundary.is_stored and self.spared_s(boundary) > 0]

    def net_s(self, taps: Sequence[Boundary]) -> float:
        return sum(map(self.spared_s, taps)) - making_s(taps, self.rates, num_items=self.num_items)

    def selections(self) -> Iterator[tuple[Boundary, ...]]:
        """Every set of taps that could be made within the budget."""
        room = self.budget_bytes - self.num_bytes(self.used())
        for number in range(len(self.missing()) + 1):
            for taps in itertools.combinations(self.missing(), number):
                if not taps or self.num_bytes(taps) <= room:
                    yield taps

    def made(self) -> list[Boundary]:
        chosen = {choice.boundary for choice in self.choices if choice.action == "tap"}
        return [boundary for boundary in self.boundaries if boundary.boundary in chosen]


def random_case(seed: int, *, is_budget_tight: bool) -> Case:
    """Up to seven boundaries of growing forward, in which taps are sometimes worth it and sometimes not."""
    draw = random.Random(seed)
    numbers = sorted(draw.sample(range(1, 12), draw.randint(1, 7)))
    prefix = itertools.accumulate(draw.uniform(0.1e-3, 2e-3) for _ in numbers)
    boundaries = [
        Boundary(
            boundary=number,
            prefix_s=prefix_s,
            item_bytes=int(10 ** draw.uniform(2.5, 6)),
            is_stored=draw.random() < 0.2,
        )
        for number, prefix_s in zip(numbers, prefix, strict=True)
    ]
    demands = []
    for number in draw.sample(numbers, draw.randint(1, len(numbers))):
        uses, num_fused = draw.randint(0, 3000), draw.choice([1, 1, 8])
        obstacle = "augment=standard" if draw.random() < 0.1 else None
        demands.append(Demand(number, uses, uses // 4, num_fused * uses, num_fused * (uses // 4), obstacle))
    rates = Rates(
        decode_s=draw.choice([0.0, 0.5e-3]),
        read_s_per_byte=10 ** draw.uniform(-10, -8),
        write_s_per_byte=10 ** draw.uniform(-10, -8),
    )
    largest = max(boundary.item_bytes for boundary in boundaries)
    budget_bytes = int(1000 * largest * draw.uniform(0.1, 2)) if is_budget_tight else UNBOUND
    return Case(tuple(boundaries), tuple(demands), rates, 1000, budget_bytes)


@pytest.mark.parametrize("seed", range(300))
def test_without_a_tight_budget_no_other_selection_saves_more(seed: int) -> None:
    case = random_case(seed, is_budget_tight=False)
    assert case.net_s(case.made()) == pytest.approx(max(map(case.net_s, case.selections())), abs=1e-9)


@pytest.mark.parametrize("seed", range(300))
def test_a_tight_budget_is_kept_and_costs_at_most_half_of_what_the_shallower_taps_gain(seed: int) -> None:
    case = random_case(seed, is_budget_tight=True)
    made = case.made()
    assert not made or case.num_bytes([*made, *case.used()]) <= case.budget_bytes
    assert case.net_s(made) >= -1e-9
    for taps in filter(None, case.selections()):
        deepest = max(taps, key=lambda tap: tap.prefix_s)
        assert case.net_s(made) >= (case.net_s(taps) + case.net_s([deepest])) / 2 - 1e-9


@pytest.mark.parametrize("seed", range(100))
def test_choices_are_those_of_the_demands_in_their_order(seed: int) -> None:
    case = random_case(seed, is_budget_tight=True)
    assert [choice.boundary for choice in case.choices] == [demand.boundary for demand in case.demands]
    for choice, demand in zip(case.choices, case.demands, strict=True):
        if demand.obstacle is not None:
            assert (choice.action, choice.reason) == ("recompute", demand.obstacle)
        assert (choice.bytes > 0) == (choice.saved_s > 0) == (choice.action in ("tap", "stored"))
        assert choice.reason
        assert "\n" not in choice.reason


def test_many_boundaries_are_chosen_among_at_once() -> None:
    boundaries = [boundary(number, 1e-3 * number, KIB * (1 + number * 37 % 101)) for number in range(1, 61)]
    demands = [demand(number) for number in range(1, 61)]
    assert len(choose(boundaries, demands, RATES, num_items=100, budget_bytes=MIB)) == 60


RATES = Rates(decode_s=0.0, read_s_per_byte=1e-9, write_s_per_byte=1e-9)


def boundary(number: int, prefix_s: float, item_bytes: int, *, is_stored: bool = False) -> Boundary:
    return Boundary(boundary=number, prefix_s=prefix_s, item_bytes=item_bytes, is_stored=is_stored)


def demand(number: int, uses: int = 10_000, *, num_fused: int = 1, obstacle: str | None = None) -> Demand:
    return Demand(number, uses, 0, num_fused * uses, 0, obstacle)


def test_one_pass_pays_for_the_taps_on_its_way() -> None:
    shallow, deep = boundary(3, 1e-3, KIB), boundary(6, 1.2e-3, KIB)
    few = [demand(3, 900), demand(6, 1000)]
    alone = [
        choose([tap], [wish], RATES, num_items=1000, budget_bytes=UNBOUND)
        for tap, wish in zip([shallow, deep], few, strict=True)
    ]
    assert [choice.action for (choice,) in alone] == ["recompute", "recompute"]
    together = choose([shallow, deep], few, RATES, num_items=1000, budget_bytes=UNBOUND)
    assert [choice.action for choice in together] == ["tap", "tap"]


def test_a_tap_that_is_there_needs_no_pass() -> None:
    wish = demand(3, 10)
    tap = boundary(3, 1e-3, KIB)
    (missing,) = choose([tap], [wish], RATES, num_items=1000, budget_bytes=UNBOUND)
    assert missing.action == "recompute"
    assert missing.reason == "making 1000.0 KiB takes 1.0 s, and reading it saves 10 ms"
    (there,) = choose([boundary(3, 1e-3, KIB, is_stored=True)], [wish], RATES, num_items=1000, budget_bytes=0)
    assert there == Choice(
        3, "stored", "1000.0 KiB, read in 10 µs instead of 10 ms of forward", 1000 * KIB, 10e-3 - 10 * KIB * 1e-9
    )


def test_fused_trials_read_together_where_each_would_compute_for_itself() -> None:
    tap = boundary(6, 0.1e-3, 200_000)
    assert choose([tap], [demand(6)], RATES, num_items=100, budget_bytes=UNBOUND)[0].action == "recompute"
    assert choose([tap], [demand(6, num_fused=8)], RATES, num_items=100, budget_bytes=UNBOUND)[0].action == "tap"


def test_the_images_are_no_tap() -> None:
    (choice,) = choose([boundary(0, 0.0, 3 * KIB)], [demand(0)], RATES, num_items=100, budget_bytes=UNBOUND)
    assert choice == Choice(0, "images", "freeze_depth=0: nothing is frozen", 0, 0.0)


def reason(
    boundaries: list[Boundary], demands: list[Demand], *, num_items: int = 1000, budget_bytes: int = UNBOUND
) -> str:
    """Why the last demand is met as it is."""
    return choose(boundaries, demands, RATES, num_items=num_items, budget_bytes=budget_bytes)[-1].reason


def test_reasons_name_the_numbers() -> None:
    tap = boundary(5, 4e-3, 12_500)
    assert reason([tap], [demand(5)]) == "11.9 MiB, read in 0.1 s instead of 40 s of forward"
    slow = boundary(1, 0.05e-3, 80 * KIB)
    assert reason([slow], [demand(1)]) == "reading 80.0 KiB in 82 µs costs more than 50 µs of forward"
    assert reason([tap], [demand(5, 0)]) == "no trial needs it"
    why = "augment=standard changes images at random; augment_views=V caches V views"
    assert reason([tap], [demand(5, obstacle=why)]) == why


def test_a_tap_beyond_the_budget_is_told_what_would_fit() -> None:
    large, small = boundary(3, 4e-3, 3 * MIB), boundary(6, 5e-3, KIB)
    assert (
        reason([large, small], [demand(3)], budget_bytes=GIB)
        == "needs 2.9 GiB; taps.budget_bytes=1.0 GiB holds freeze_depth=6 (1000.0 KiB)"
    )
    assert reason([large], [demand(3)], budget_bytes=GIB) == "needs 2.9 GiB; taps.budget_bytes=1.0 GiB holds no tap"
    stored = boundary(4, 4.5e-3, 900 * KIB, is_stored=True)
    assert (
        reason([large, stored, small], [demand(4), demand(3)], budget_bytes=GIB)
        == "needs 2.9 GiB; taps.budget_bytes=1.0 GiB, 878.9 MiB of it in use, holds freeze_depth=6 (1000.0 KiB)"
    )


def test_a_tap_that_another_one_displaces_is_told_which() -> None:
    first, second = boundary(3, 4e-3, 600 * KIB), boundary(6, 8e-3, 600 * KIB)
    assert (
        reason([first, second], [demand(6), demand(3)], budget_bytes=GIB)
        == "needs 585.9 MiB; taps.budget_bytes=1.0 GiB is better spent on freeze_depth=6"
    )


def test_a_pass_that_begins_with_a_tap_reads_it_and_spares_the_images_and_what_lies_below() -> None:
    rates = Rates(decode_s=1.0, read_s_per_byte=0.01, write_s_per_byte=0.1)
    shallow, deep = boundary(1, 2.0, 10, is_stored=True), boundary(3, 5.0, 20)
    assert making_s([deep], rates, num_items=7) == pytest.approx(7 * (1.0 + 5.0 + 2.0))
    assert making_s([deep], rates, num_items=7, start=shallow) == pytest.approx(7 * (0.1 + 3.0 + 2.0))
    assert making_s([], rates, num_items=7, start=shallow) == 0.0


def test_making_nothing_costs_nothing() -> None:
    assert making_s([], RATES, num_items=1000) == 0.0

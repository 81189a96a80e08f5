"""Which taps are worth storing: the cost model of a sweep. Pure arithmetic, without torch.

Let D be the seconds that decoding a sample takes, P_b its forward up to boundary b, and n the items that a tap holds.

- without a tap, each use of an item costs D + P_b, in every trial for itself;
- with one, each use costs a read, and trials that train together share it;
- making taps costs one pass to the deepest of them, n * (D + P_max), and the writes; the pass passes by all the
  shallower boundaries, so that their taps cost their writes alone.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from graftstack.amounts import duration, size

Action = Literal["tap", "stored", "recompute", "images"]
"""tap: make it and read it; stored: read the one that is there; recompute: run the frozen part each time; images:
nothing is frozen, so training begins with the images."""


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """A place between layer groups where a tap can lie."""

    boundary: int
    """Output of layer group ``boundary - 1``."""
    prefix_s: float
    """Seconds of forward a sample, from the decoded image to here."""
    item_bytes: int
    """What one item takes in the tap."""
    is_stored: bool
    """Whether a whole tap is there already."""


class Demand(NamedTuple):
    """How often the trials that begin at one boundary need its items, over all their epochs."""

    boundary: int
    train_uses: int
    """Reads of training items from a tap; trials that are fused read together and count once."""
    val_uses: int
    """The same of validation items."""
    uncached_train_uses: int
    """Forwards of training items without a tap: every trial computes its own."""
    uncached_val_uses: int
    """The same of validation items."""
    obstacle: str | None = None
    """Why no tap is valid here, in words for the user; None: one is."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What this machine needs for what isn't forward."""

    decode_s: float
    """Seconds an image, from where it lies to the input of the backbone."""
    read_s_per_byte: float
    """Seconds a byte, from a tap to the device."""
    write_s_per_byte: float
    """Seconds a byte, from the pass to a tap."""


class Choice(NamedTuple):
    """What is done for one demand, and why."""

    boundary: int
    action: Action
    reason: str
    """A few words, with the numbers that decided."""
    bytes: int
    """Size of the tap that is read; 0 if none is."""
    saved_s: float
    """Seconds of computing that the tap spares, less its reads. What making it costs is in `making_s`, for all taps."""


def read_s(boundary: Boundary, demand: Demand, rates: Rates) -> float:
    """Returns the seconds that the demand costs with a tap."""
    return (demand.train_uses + demand.val_uses) * boundary.item_bytes * rates.read_s_per_byte


def compute_s(boundary: Boundary, demand: Demand, rates: Rates) -> float:
    """Returns the seconds that the demand costs without a tap."""
    return (demand.uncached_train_uses + demand.uncached_val_uses) * (rates.decode_s + boundary.prefix_s)


def making_s(taps: Iterable[Boundary], rates: Rates, *, num_items: int, start: Boundary | None = None) -> float:
    """Returns the seconds of the one pass that makes `taps`, writes included; 0 for none.

    Args:
        taps: those that are made.
        rates: of the machine.
        num_items: items that each holds.
        start: a stored tap shallower than all of them, with which the pass begins instead of the images.
    """
    made = tuple(taps)
    if not made:
        return 0.0
    deepest_s = max(tap.prefix_s for tap in made)
    writes_s = sum(tap.item_bytes for tap in made) * rates.write_s_per_byte
    if start is None:
        return num_items * (rates.decode_s + deepest_s + writes_s)
    return num_items * (start.item_bytes * rates.read_s_per_byte + deepest_s - start.prefix_s + writes_s)


def choose(
    boundaries: Iterable[Boundary], demands: Sequence[Demand], rates: Rates, *, num_items: int, budget_bytes: int
) -> tuple[Choice, ...]:
    """Returns what to do for each demand, in their order; choices for one boundary share its tap.

    The taps to make are those that save the most seconds. Where the budget binds, they are chosen by what a byte of
    them saves. A tap that is stored already costs its reads alone, and its bytes count against the budget.

    Args:
        boundaries: those of all demands but 0, and any others of which a reason may say that they would fit.
        demands: at most one for each boundary and obstacle.
        rates: of the machine on which the trials run.
        num_items: items that each tap holds, cached views included.
        budget_bytes: what all taps together may take.
    """
    market = _Market(tuple(boundaries), tuple(demands), rates, num_items, budget_bytes)
    wanted = _best_selection(market.candidates, room_bytes=sum(offer.num_bytes for offer in market.candidates))
    made = _best_selection(market.candidates, room_bytes=market.room_bytes)
    return tuple(_choice(demand, market, wanted=_numbers(wanted), made=_numbers(made)) for demand in demands)


class _Offer(NamedTuple):
    """A tap that could be made or is stored, with what all demands for it come to."""

    boundary: Boundary
    num_bytes: int
    spared_s: float
    """Computing that it makes unnecessary, less its reads."""
    pass_s: float
    """The pass up to it, without writes."""
    write_s: float

    @property
    def gain_s(self) -> float:
        """What adding it to a pass that goes as deep anyway is worth."""
        return self.spared_s - self.write_s


class _Market:
    """All that a choice depends on."""

    def __init__(
        self,
        boundaries: tuple[Boundary, ...],
        demands: tuple[Demand, ...],
        rates: Rates,
        num_items: int,
        budget_bytes: int,
    ) -> None:
        self.rates = rates
        self.num_items = num_items
        self.budget_bytes = budget_bytes
        self.boundaries = {boundary.boundary: boundary for boundary in boundaries}
        self.offers = {number: self._offer(boundary, demands) for number, boundary in self.boundaries.items()}

    @property
    def candidates(self) -> list[_Offer]:
        """The taps that aren't stored and are worth their writes, by what a byte of them is worth."""
        useful = (offer for offer in self.offers.values() if not offer.boundary.is_stored and offer.gain_s > 0)
        return sorted(useful, key=lambda offer: offer.gain_s / max(1, offer.num_bytes), reverse=True)

    @property
    def used_bytes(self) -> int:
        """What the stored taps take that will be read."""
        read = (offer for offer in self.offers.values() if offer.boundary.is_stored and offer.spared_s > 0)
        return sum(offer.num_bytes for offer in read)

    @property
    def room_bytes(self) -> int:
        """What the budget leaves for taps to be made."""
        return max(0, self.budget_bytes - self.used_bytes)

    def _offer(self, boundary: Boundary, demands: tuple[Demand, ...]) -> _Offer:
        """The tap of a boundary; boundary 0, the images themselves, spares nothing."""
        valid = [demand for demand in demands if demand.boundary == boundary.boundary > 0 and demand.obstacle is None]
        return _Offer(
            boundary,
            num_bytes=self.num_items * boundary.item_bytes,
            spared_s=sum(_spared_s(boundary, demand, self.rates) for demand in valid),
            pass_s=self.num_items * (self.rates.decode_s + boundary.prefix_s),
            write_s=self.num_items * boundary.item_bytes * self.rates.write_s_per_byte,
        )


def _spared_s(boundary: Boundary, demand: Demand, rates: Rates) -> float:
    return compute_s(boundary, demand, rates) - read_s(boundary, demand, rates)


def _best_selection(candidates: Sequence[_Offer], *, room_bytes: int) -> tuple[_Offer, ...]:
    """Returns the taps to make: for each deepest one, the others that fit beside it, by worth a byte.

    Greed alone may take something small and lose something large. So one other tap is fixed too, each in turn: what
    the others gain is then at least half of the most that they can (Kellerer et al. 2004, "Knapsack problems",
    section 2.5).
    """
    best: tuple[_Offer, ...] = ()
    for deepest in candidates:
        passed = [offer for offer in candidates if offer.pass_s <= deepest.pass_s]
        for first in passed:
            best = max(best, _filled(tuple(dict.fromkeys((deepest, first))), passed, room_bytes=room_bytes), key=_net_s)
    return best


def _filled(start: tuple[_Offer, ...], candidates: Sequence[_Offer], *, room_bytes: int) -> tuple[_Offer, ...]:
    """Returns `start` and those of the candidates, in their order, that still fit; nothing if `start` doesn't."""
    taken = list(start)
    left = room_bytes - sum(offer.num_bytes for offer in taken)
    if left < 0:
        return ()
    for offer in candidates:
        if offer not in start and offer.num_bytes <= left:
            taken.append(offer)
            left -= offer.num_bytes
    return tuple(taken)


def _net_s(selection: Sequence[_Offer]) -> float:
    """Returns the seconds that a selection saves, its pass included; 0 for none."""
    return sum(offer.gain_s for offer in selection) - max((offer.pass_s for offer in selection), default=0.0)


def _numbers(selection: Iterable[_Offer]) -> list[int]:
    return sorted(offer.boundary.boundary for offer in selection)


def _choice(demand: Demand, market: _Market, *, wanted: Sequence[int], made: Sequence[int]) -> Choice:
    if demand.boundary == 0:
        return Choice(0, "images", "freeze_depth=0: nothing is frozen", 0, 0.0)
    offer = market.offers[demand.boundary]
    saved_s = _spared_s(offer.boundary, demand, market.rates)
    is_read = (offer.boundary.is_stored and offer.spared_s > 0) or demand.boundary in made
    if demand.obstacle is None and is_read:
        action: Action = "stored" if offer.boundary.is_stored else "tap"
        return Choice(demand.boundary, action, _why(demand, offer, market), offer.num_bytes, saved_s)
    return Choice(demand.boundary, "recompute", _why_not(demand, market, wanted=wanted, made=made), 0, 0.0)


def _why(demand: Demand, offer: _Offer, market: _Market) -> str:
    reads = duration(read_s(offer.boundary, demand, market.rates))
    forwards = duration(compute_s(offer.boundary, demand, market.rates))
    return f"{size(offer.num_bytes)}, read in {reads} instead of {forwards} of forward"


def _why_not(demand: Demand, market: _Market, *, wanted: Sequence[int], made: Sequence[int]) -> str:
    offer = market.offers[demand.boundary]
    if demand.obstacle is not None:
        return demand.obstacle
    if demand.uncached_train_uses + demand.uncached_val_uses == 0:
        return "no trial needs it"
    if offer.spared_s <= 0:
        return _why_slow(offer.boundary, market.rates)
    if demand.boundary in wanted and offer.num_bytes > market.room_bytes:
        return _why_too_large(offer, market)
    if demand.boundary in wanted and made:
        depths = ", ".join(map(str, made))
        budget = f"taps.budget_bytes={size(market.budget_bytes)}"
        return f"needs {size(offer.num_bytes)}; {budget} is better spent on freeze_depth={depths}"
    return _why_unpaid(offer, market, made)


def _why_slow(boundary: Boundary, rates: Rates) -> str:
    reading = duration(boundary.item_bytes * rates.read_s_per_byte)
    forward = duration(rates.decode_s + boundary.prefix_s)
    return f"reading {size(boundary.item_bytes)} in {reading} costs more than {forward} of forward"


def _why_too_large(offer: _Offer, market: _Market) -> str:
    """The largest depth that fits is what a user can have without a larger budget."""
    fitting = [other for number, other in market.offers.items() if number > 0 and other.num_bytes <= market.room_bytes]
    largest = max(fitting, key=lambda other: other.boundary.boundary, default=None)
    holds = "no tap" if largest is None else f"freeze_depth={largest.boundary.boundary} ({size(largest.num_bytes)})"
    beside = f", {size(market.used_bytes)} of it in use," if market.used_bytes else ""
    return f"needs {size(offer.num_bytes)}; taps.budget_bytes={size(market.budget_bytes)}{beside} holds {holds}"


def _why_unpaid(offer: _Offer, market: _Market, made: Sequence[int]) -> str:
    rest = [market.boundaries[number] for number in made]
    more_s = making_s([*rest, offer.boundary], market.rates, num_items=market.num_items) - making_s(
        rest, market.rates, num_items=market.num_items
    )
    return f"making {size(offer.num_bytes)} takes {duration(more_s)}, and reading it saves {duration(offer.spared_s)}"

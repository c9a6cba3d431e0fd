"""What a card costs, and what of that is a guess of ours."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

HOURS_A_YEAR = 8760
_OF_POWER = {"power_price", "pue"}


@dataclass(frozen=True)
class Prices:
    """card_price: of one card with its share of the server; written off over `years`, in use `utilisation` of the time
    power_price: a kWh; pue: power of the building for each watt of the cards
    rent: of one card for an hour; None: not given
    assumed: names of those that nobody gave
    """

    card_price: float = 35_000.0
    years: float = 3.0
    utilisation: float = 0.6
    power_price: float = 0.25
    pue: float = 1.3
    rent: float | None = None
    currency: str = "EUR"
    assumed: frozenset[str] = frozenset()

    @classmethod
    def of(cls, **given: Any) -> Prices:
        """The default for what is None."""
        known = {name: value for name, value in given.items() if value is not None}
        names = {field.name for field in fields(cls)} - {"rent", "currency", "assumed"}
        return cls(**known, assumed=frozenset(names - known.keys()))

    def owned_hour(self, watts: float) -> float:
        """One card for an hour of work: write-off, and power at so many watts."""
        return self.card_price / (self.years * HOURS_A_YEAR * self.utilisation) + watts / 1e3 * self.pue * self.power_price

    def guessed(self, powered: bool) -> frozenset[str]:
        """Of `assumed` those that have a part in the costs. powered: power has one."""
        return self.assumed if powered else self.assumed - _OF_POWER

    def words(self, powered: bool) -> list[str]:
        """The prices that have a part in the costs, in sentences: those that were given, and the defaults with the options that change
        them."""
        parts = {
            "card_price": f"a card with its share of the server {self.currency} {self.card_price:,.0f}",
            "years": f"written off over {self.years:g} years",
            "utilisation": f"in use {self.utilisation * 100:.3g}\u00a0% of the time",
            "power_price": f"{self.currency} {self.power_price:g} a kWh",
            "pue": f"PUE {self.pue:g}",
        }
        given = [part for name, part in parts.items() if name not in self.assumed and (powered or name not in _OF_POWER)]
        guessed = {name: part for name, part in parts.items() if name in self.guessed(powered)}
        options = ", ".join(f"--{name.replace('_', '-')}" for name in guessed)
        said = [f"As given: {', '.join(given)}."] if given else []
        said += [f"Default, change with {options}: {', '.join(guessed.values())}."] if guessed else []
        return said if powered else [*said, "Costs are without power, which was not measured."]

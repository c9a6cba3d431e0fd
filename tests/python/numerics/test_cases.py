"""Every case of the shared matrix on the CPU device, element by element against FP64, and cases drawn from the whole contract."""

from __future__ import annotations

import pytest
from cases import Case
from harness import check_case
from matrix import ALL, random_case


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_case(case: Case, seed: int) -> None:
    """Guards against reads of pages, tails and table entries that a call must not touch, which poison turns into NaN; against 15 months
    of wrong elements behind a loose test; against results that change from call to call."""
    check_case(case, seed, "cpu")


@pytest.mark.parametrize("number", range(60))
def test_random_case(number: int, seed: int) -> None:
    """Combinations that nobody thought of."""
    case = random_case(seed)
    print(case)
    check_case(case, seed, "cpu")

"""Combinations of parameters of which a part tells what the whole does, nearly always."""

import pytest


def by_day(combinations, chosen):
    """All ``combinations`` as test parameters; those that are not ``chosen`` are marked to run at night only.

    Each value of each parameter has to be in one that is chosen, so that no claim waits for the night.
    """
    combinations, chosen = list(combinations), list(chosen)
    assert [c for c in chosen if c not in combinations] == []
    for position, values in enumerate(zip(*combinations, strict=True)):
        seen = [c[position] for c in chosen]
        assert all(value in seen for value in values)
    return [c if c in chosen else pytest.param(*c, marks=pytest.mark.nightly) for c in combinations]

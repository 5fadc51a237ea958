"""Examples that need a framework which is not installed are left out, and no others."""

import doctest
import importlib.util

import pytest
from support import pages

PAGE = """
# Page
>>> import jax

## Haiku
>>> import haiku as hk
>>> hk.Linear(3)

## Flax
>>> import jbn.linen
>>> 1 + 1
2
"""


@pytest.fixture
def installed(monkeypatch):
    """Sets which frameworks there are."""

    def only(*names):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in names else None)

    return only


def left_out():
    examples = doctest.DocTestParser().get_examples(PAGE)
    pages.leave_out_what_is_absent(PAGE, examples)
    return [example.source.strip() for example in examples if example.options.get(doctest.SKIP)]


def test_a_section_is_left_out_as_a_whole(installed):
    installed("flax")
    assert left_out() == ["import haiku as hk", "hk.Linear(3)"]


def test_a_door_needs_its_framework(installed):
    installed("haiku")
    assert left_out() == ["import jbn.linen", "1 + 1"]
    assert pages.needs_what_is_absent("from jbn.nnx import BatchNorm")
    assert not pages.needs_what_is_absent("from jbn.convert import from_torch")


def test_nothing_is_left_out_where_all_are_installed(installed):
    installed("flax", "haiku")
    assert left_out() == []

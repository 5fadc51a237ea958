"""Whole networks of torchvision's: the same function in float64, by files that torchvision wrote and by itself."""

import importlib.util
from functools import partial
from pathlib import Path

import pytest
from support import golden
from support.torchvision_parity import assert_equals_torchvision

from jbn.networks import imagenet, resnet

WIDTHS = (2, 3, 4, 6)
NARROW = {
    "basic": {"block": "basic", "blocks": (2, 1, 1, 2)},
    "bottleneck": {"block": "bottleneck", "blocks": (1, 2, 1, 1)},
}


@pytest.mark.parametrize("name", ["bottleneck", pytest.param("basic", marks=pytest.mark.nightly)])
def test_a_narrow_network_is_what_torchvision_computed(name):
    """``tests/convert/golden/torchvision/make.py`` wrote the file."""
    answers = golden.load(Path(__file__).parent / "golden" / "torchvision" / f"{name}.npz")
    make = partial(resnet, 5, stem="imagenet", widths=WIDTHS, **NARROW[name])
    assert_equals_torchvision(make, answers, answers.pop("x"))


@pytest.mark.parametrize("depth", [18, 50])
def test_a_whole_network_is_what_torchvision_computes(depth):
    if not all(map(importlib.util.find_spec, ("torch", "torchvision"))):
        pytest.skip("needs PyTorch and torchvision: pip install '.[parity]'")
    from support import torchvision_models as theirs

    x = theirs.images(2, 64, 64, 3)
    assert_equals_torchvision(partial(resnet, 7, **imagenet(depth)), theirs.answers(theirs.whole(depth), x), x)

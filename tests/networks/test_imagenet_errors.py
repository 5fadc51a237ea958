"""What `resnet` and `imagenet` refuse of the arguments of larger networks: the call, the exception, its full text."""

import jax
import jax.numpy as jnp
from support.refusals import assert_refused, refusals
from support.small_imagenet import made

from jbn.networks import imagenet, resnet

DEPTHS = "18, 34, 50, 101 or 152; pass stem, block, widths and blocks to resnet yourself for a network of another depth"
STEM = 'expected "cifar" or "imagenet"; pass "cifar" for images of some 32 pixels, "imagenet" for those of some 224.'
BLOCK = 'expected "basic" or "bottleneck"; pass "bottleneck" for 50 layers and more.'
ONE_EACH = "pass one number for each stage, as in widths=(64, 128, 256, 512), blocks=(3, 4, 6, 3)."
INIT = "pass what the network's init returned: params, state = init(key)."


def applied_to_another():
    _, params, state, x = made("basic")
    return made("bottleneck")[0].apply(params, state, x, train=True)


def applied_to_another_stem():
    params, state = resnet(3, in_channels=2, widths=(2, 3), blocks=(1, 2)).init(jax.random.key(0))
    return made("basic")[0].apply(params, state, jnp.ones((1, 8, 8, 2)), train=False)


ERRORS = [
    (lambda: imagenet(51), ValueError, f"depth: got 51; expected {DEPTHS}."),
    (lambda: imagenet("50"), TypeError, f"depth: got '50'; expected {DEPTHS}."),
    (lambda: imagenet(True), TypeError, f"depth: got True; expected {DEPTHS}."),
    (lambda: resnet(10, stem="7x7"), ValueError, f"stem: got '7x7'; {STEM}"),
    (lambda: resnet(10, stem=None), ValueError, f"stem: got None; {STEM}"),
    (lambda: resnet(10, block="Bottleneck"), ValueError, f"block: got 'Bottleneck'; {BLOCK}"),
    (
        lambda: resnet(10, blocks=(3, 4, 6, 3)),
        ValueError,
        f"blocks: got (3, 4, 6, 3); expected 3 numbers, one for each of widths; {ONE_EACH}",
    ),
    (lambda: resnet(10, blocks=(3, 0, 3)), ValueError, f"blocks: got 0; expected at least 1; {ONE_EACH}"),
    (lambda: resnet(10, blocks=[3, 3, "3"]), TypeError, f"blocks: got '3'; expected an int; {ONE_EACH}"),
    (
        applied_to_another,
        ValueError,
        "params['blocks'][0]: got a dict of conv1, conv2; expected a dict of conv1, conv2, conv3, shortcut; " + INIT,
    ),
    (
        applied_to_another_stem,
        ValueError,
        f"params['stem']['W']: got shape (3, 3, 2, 2); expected (7, 7, 2, 2); {INIT}",
    ),
]


@refusals(ERRORS)
def test_errors_say_what_was_given_what_was_expected_and_what_to_do(call, error, text):
    assert_refused(call, error, text)

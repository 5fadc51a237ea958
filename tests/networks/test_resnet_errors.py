"""What `resnet` refuses, in one table: the call, the exception, its full text."""

from functools import partial

import jax
import jax.numpy as jnp
from support.refusals import assert_refused, refusals

from jbn.networks import resnet

N, SHAPE = 8, (7, 5, 2)
small = partial(resnet, 3, in_channels=2, widths=(4, 6), blocks=1)


def applied(x=None, change=lambda params, state: (params, state), **options):
    network = small()
    params, state = change(*network.init(jax.random.key(0)))
    return network.apply(params, state, jnp.ones((N, *SHAPE)) if x is None else x, train=True, **options)


INIT = "pass what the network's init returned: params, state = init(key)."
IMAGES = "move the channels with jnp.moveaxis(x, 1, -1), add missing ones with x[..., None], or change in_channels."
WIDTHS = "pass the channels of each stage, as in widths=(16, 32, 64)."
ERRORS = [
    (
        lambda: resnet(2.5),
        TypeError,
        "num_classes: got 2.5; expected an int; pass the number of classes, as in resnet(10).",
    ),
    (
        lambda: resnet(10, in_channels=0),
        ValueError,
        "in_channels: got 0; expected at least 1; pass 3 for colour images, 1 for grey ones.",
    ),
    (
        lambda: resnet(10, blocks=True),
        TypeError,
        "blocks: got True; expected an int; pass the blocks in each stage, as in blocks=3.",
    ),
    (lambda: resnet(10, widths=16), TypeError, f"widths: got 16; expected a sequence of ints; {WIDTHS}"),
    (lambda: resnet(10, widths=()), ValueError, f"widths: got (); expected at least one stage; {WIDTHS}"),
    (lambda: resnet(10, widths=(16, 0)), ValueError, f"widths: got 0; expected at least 1; {WIDTHS}"),
    (
        lambda: resnet(10, norm="a"),
        ValueError,
        'norm: got \'a\'; expected "z" or None; pass "z" to normalize before the activation, None not to normalize.',
    ),
    (
        lambda: resnet(10, norm=None, zero_gamma=True),
        ValueError,
        'zero_gamma: got True without a norm; expected False; there is no γ, pass norm="z".',
    ),
    (
        lambda: resnet(10, remat=1),
        TypeError,
        "remat: got 1; expected a bool; pass remat=True or remat=False.",
    ),
    (
        lambda: resnet(10, bn="bn_apply"),
        TypeError,
        "bn: got 'bn_apply'; expected a function; pass it, not its name.",
    ),
    (
        lambda: applied(jnp.ones((N, 7, 5), jnp.float32)),
        ValueError,
        f"x: got shape (8, 7, 5); expected (N, H, W, 2), channels last; {IMAGES}",
    ),
    (
        lambda: applied(jnp.ones((N, 2, 7, 5), jnp.float32)),
        ValueError,
        f"x: got shape (8, 2, 7, 5); expected (N, H, W, 2), channels last; {IMAGES}",
    ),
    (
        lambda: applied(jnp.ones((N, *SHAPE), jnp.uint8)),
        TypeError,
        "x: got dtype uint8; expected a real floating-point array; convert it with x.astype(jnp.float32).",
    ),
    (
        lambda: applied(mask=jnp.ones((N, 1, 1, 1), bool)),
        ValueError,
        "mask: got shape (8, 1, 1, 1); expected rank 2 with each size 1 or that of x (8, 1); "
        "give the missing axes size 1, as in mask[:, None].",
    ),
    (
        lambda: applied(change=lambda params, state: ([], state)),
        ValueError,
        f"params: got list; expected a dict of stem, blocks, head; {INIT}",
    ),
    (
        lambda: applied(change=lambda params, state: (params, {**state, "blocks": []})),
        ValueError,
        f"state['blocks']: got 0 entries; expected a list with one entry for each of 2 blocks; {INIT}",
    ),
    (
        lambda: applied(change=lambda params, state: ({**params, "blocks": params["blocks"][::-1]}, state)),
        ValueError,
        f"params['blocks'][0]: got a dict of conv1, conv2, shortcut; expected a dict of conv1, conv2; {INIT}",
    ),
    (
        lambda: applied(change=lambda params, state: ({**params, "stem": params["head"]}, state)),
        ValueError,
        f"params['stem']['W']: got shape (6, 3); expected (3, 3, 2, 4); {INIT}",
    ),
    (
        lambda: small(norm=None).apply(*small().init(jax.random.key(0)), jnp.ones((N, *SHAPE)), train=False),
        ValueError,
        "params['stem']['bn']: got BNParams; expected None, for the network has no norm there; "
        "fold the norm into W and b, or make the network with the norm it was trained with.",
    ),
]


@refusals(ERRORS)
def test_errors_say_what_was_given_what_was_expected_and_what_to_do(call, error, text):
    assert_refused(call, error, text)

"""Every option of `bn_apply` compiles for a TPU, where libtpu is installed."""

from support import tpu


def test_every_option_compiles_for_a_tpu_forward_and_backward_in_float32_and_bfloat16():
    found = tpu.compiled("every_option")
    assert len(found) == len(tpu.OPTIONS) * 2 * 2
    assert {name: wrong for name, wrong in found.items() if wrong} == {}

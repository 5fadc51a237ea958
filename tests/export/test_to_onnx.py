"""Networks as ONNX, run by onnxruntime; where the converter does not work, one line says so."""

import sys
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbn import BNStats, normalize_inputs
from jbn.export import to_onnx
from jbn.networks import fold, mlp, resnet

ONE = np.ones((2, 3), np.float32)
# jax2onnx 0.17.1 uses what JAX 0.12 no longer has: jbn.export says so in its docstring.
SUPPORTED = tuple(map(int, jax.__version__.split(".")[:2])) < (0, 12)


@pytest.fixture(scope="module")
def onnxruntime():
    pytest.importorskip("jax2onnx", reason="needs what converts to ONNX: pip install 'jbn[onnx]'")
    if not SUPPORTED:
        pytest.skip(f"jax2onnx does not work with JAX {jax.__version__}")
    return pytest.importorskip("onnxruntime", reason="needs what runs ONNX: pip install 'jbn[onnx]'")


MAKE = {
    "mlp": partial(mlp, (4, 6, 3), activation=jax.nn.silu),
    "norm after": partial(mlp, (4, 6, 5, 3), norm="a", activation=jax.nn.gelu),
    "resnet": partial(resnet, 3, in_channels=4, widths=(2, 3), blocks=1),
}


@pytest.mark.parametrize("folded", [False, True], ids=["as trained", "folded"])
@pytest.mark.parametrize("kind", MAKE)
def test_gives_the_outputs_of_the_network_for_any_batch_size(kind, folded, onnxruntime):
    network = MAKE[kind]()
    params, state = network.init(jax.random.key(0))
    state = jax.tree.map(lambda v: v + 1 if v.dtype == jnp.float32 else v, state)
    if folded:
        network, params = fold(MAKE[kind], params, state)
        state = None
    x = np.random.default_rng(0).normal(3, 2, (9, 5, 6, 4) if kind == "resnet" else (9, 4)).astype(np.float32)
    z, inputs = normalize_inputs(x)

    def logits(params, state, z):
        return network.apply(params, state, z, train=False)[0]

    model = to_onnx(logits, params, state, x, inputs=inputs, name="classifier")
    session = onnxruntime.InferenceSession(model)
    assert session.get_inputs()[0].shape == ["n", *x.shape[1:]]
    assert session.get_modelmeta().graph_name == "classifier"
    wanted = np.asarray(logits(params, state, z))
    for rows in (slice(None), slice(1), slice(2, 4)):
        (got,) = session.run(["y"], {"x": x[rows]})
        np.testing.assert_allclose(got, wanted[rows], atol=1e-5 * np.abs(wanted).max())


@pytest.mark.skipif(SUPPORTED, reason="this JAX is one that jax2onnx works with")
def test_a_jax_that_the_converter_does_not_work_with_is_named():
    pytest.importorskip("jax2onnx", reason="needs what converts to ONNX: pip install 'jbn[onnx]'")
    with pytest.raises(
        ValueError, match=rf"^apply_fn: got a function that jax2onnx \S+ does not convert with JAX {jax.__version__} "
    ):
        to_onnx(lambda p, s, x: jnp.tanh(x), None, None, ONE)


@pytest.fixture
def converter(monkeypatch):
    """A stand-in for jax2onnx that fails as its user says."""

    def install(error):
        def fail(*arguments, **options):
            raise error

        module = types.ModuleType("jax2onnx")
        module.to_onnx = fail
        monkeypatch.setitem(sys.modules, "jax2onnx", module)
        monkeypatch.setattr("jbn.export._onnx.version", lambda name: "1.2")

    return install


def test_what_the_converter_fails_on_is_said_in_one_line(converter):
    converter(NotImplementedError("no plugin\nfor primitive fft."))
    with pytest.raises(ValueError, match=r"^apply_fn: ") as caught:
        to_onnx(lambda p, s, x: x, None, None, ONE)
    assert str(caught.value) == (
        f"apply_fn: got a function that jax2onnx 1.2 does not convert with JAX {jax.__version__} (NotImplementedError: "
        f"no plugin for primitive fft); expected one that it does; use to_stablehlo, or another JAX."
    )


def test_without_the_converter_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(ModuleNotFoundError, match=r"expected jax2onnx, which .*; run pip install 'jbn\[onnx\]'"):
        to_onnx(lambda p, s, x: x, None, None, ONE)


def test_float64_and_several_outputs_are_refused():
    far = BNStats(np.full(3, 1.7e9), np.ones(3), np.ones(3))
    with pytest.raises(ValueError, match=r"^x: got dtype float64; expected at most 32 bits, which"):
        to_onnx(lambda p, s, x: x, None, None, ONE.astype(np.float64), inputs=far)
    with pytest.raises(ValueError, match=r"^x: got dtype float32 for feature 0 of mean 1\.7e\+09 "):
        to_onnx(lambda p, s, x: x, None, None, ONE, inputs=far)
    with pytest.raises(ValueError, match=r"^apply_fn: got 2 outputs; expected one array; return it alone, as in"):
        to_onnx(lambda p, s, x: (x, x), None, None, ONE)

"""Exported networks: the same outputs for any batch size, normalization inside, and no source needed to read them."""

import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support.closeness import assert_close

from jbn import BNStats, normalize_inputs
from jbn.export import Array, describe, needs_float64, to_stablehlo
from jbn.networks import fold, mlp, resnet

pytest.importorskip("flatbuffers")

MAKE = {
    "mlp": partial(mlp, (4, 6, 3), activation=jax.nn.gelu),
    "norm after": partial(mlp, (4, 6, 5, 3), norm="a", activation=jnp.tanh),
    "bfloat16": partial(mlp, (4, 6, 3), dtype=jnp.bfloat16),
    "resnet": partial(resnet, 3, in_channels=4, widths=(2, 3), blocks=1),
}


def logits(network, params, state, z):
    return network.apply(params, state, z, train=False)[0]


def posed(kind):
    """(what makes it, params, state, x): running statistics that are not those of the start."""
    network = MAKE[kind]()
    params, state = network.init(jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 99))
    state = jax.tree.map(
        lambda v: v if v.dtype == jnp.int32 else jax.random.uniform(next(keys), v.shape, v.dtype, 0.5, 2.0), state
    )
    x = np.random.default_rng(0).normal(3, 2, (9, 5, 6, 4) if kind == "resnet" else (9, 4)).astype(np.float32)
    return MAKE[kind], params, state, x


@pytest.mark.parametrize("folded", [False, True], ids=["as trained", "folded"])
@pytest.mark.parametrize("kind", MAKE)
def test_gives_the_outputs_of_the_network_for_any_batch_size(kind, folded):
    make, params, state, x = posed(kind)
    network = make()
    if folded:
        network, params = fold(make, params, state)
        state = None
    z, inputs = normalize_inputs(x)
    data = to_stablehlo(partial(logits, network), params, state, x, inputs=inputs)
    read = export.deserialize(bytearray(data))
    wanted = jax.jit(partial(logits, network))(params, state, z)
    for rows in (slice(None), slice(1), slice(2, 4)):
        got = read.call(x[rows])
        assert got.dtype == wanted.dtype
        assert_close(got, wanted[rows], roundings=8 if kind == "bfloat16" else 256, computed_in=wanted.dtype)
    said = describe(data)
    assert said.x == Array(("n", *x.shape[1:]), "float32")
    assert said.outputs == Array(("n", 3), str(wanted.dtype))
    assert said.platforms == ("cpu", "cuda", "tpu")


def test_without_inputs_nothing_is_done_to_x():
    make, params, state, x = posed("mlp")
    run = partial(logits, make())
    data = to_stablehlo(run, params, state, x, platforms=("cpu",), name="digits")
    assert_close(export.deserialize(bytearray(data)).call(x), jax.jit(run)(params, state, x))
    assert describe(data)[::3] == ("digits", ("cpu",))


def test_height_and_width_may_stay_open_too():
    make, params, state, x = posed("resnet")
    spec = jax.ShapeDtypeStruct(export.symbolic_shape("n, h, w, 4"), jnp.float32)
    data = to_stablehlo(partial(logits, make()), params, state, spec)
    assert describe(data).x.shape == ("n", "h", "w", 4)
    for images in (x, x[:2, 1:, :3]):
        assert_close(export.deserialize(bytearray(data)).call(images), logits(make(), params, state, images))


def clock(n=40):
    """Seconds since 1970, of one minute: float32 tells apart every 128."""
    return 1.7e9 + 60 * np.random.default_rng(0).uniform(size=(n, 1)), 3 + np.arange(n)[:, None] % 5


def test_data_that_float32_would_lose_are_standardized_in_float64():
    x = np.concatenate(clock(), axis=1)
    inputs = BNStats(x.mean(0), x.var(0), np.full(2, len(x), np.float32))
    assert needs_float64(inputs)
    assert not needs_float64(BNStats(*(values[1:] for values in inputs)))
    data = to_stablehlo(lambda p, s, z: jnp.tanh(z.astype(jnp.float32)), None, None, x, inputs=inputs)
    assert describe(data).x == Array(("n", 2), "float64")
    assert describe(data).outputs == Array(("n", 2), "float32")
    with jax.enable_x64(True):
        got = export.deserialize(bytearray(data)).call(x)
    np.testing.assert_allclose(got, np.tanh((x - x.mean(0)) / x.std(0)), atol=1e-6)


def test_the_mean_keeps_more_digits_than_a_float32_x():
    x = (5e3 + np.random.default_rng(0).normal(size=(50, 3))).astype(np.float32)
    exact = x.astype(np.float64)
    inputs = BNStats(exact.mean(0), exact.var(0), np.full(3, 50, np.float32))
    data = to_stablehlo(lambda p, s, z: z, None, None, x, inputs=inputs)
    got = export.deserialize(bytearray(data)).call(x)
    np.testing.assert_allclose(got, (exact - exact.mean(0)) / exact.std(0), atol=1e-6)


def test_integers_and_constant_features_are_standardized():
    x = np.stack([np.arange(8) % 3, np.full(8, 7)], 1).astype(np.uint8)
    z, inputs = normalize_inputs(x)
    data = to_stablehlo(lambda p, s, z: {"z": z}, None, None, x, inputs=inputs)
    got = export.deserialize(bytearray(data)).call(x)
    assert_close(got["z"], z)
    assert not got["z"][:, 1].any()
    assert describe(data)[1:3] == (Array(("n", 2), "uint8"), {"z": Array(("n", 2), "float32")})


def test_params_on_several_devices_run_on_one():
    make, params, state, x = posed("mlp")
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    spread = jax.device_put(params, NamedSharding(mesh, P()))
    data = to_stablehlo(partial(logits, make()), spread, state, x)
    assert export.deserialize(bytearray(data)).nr_devices == 1
    assert_close(export.deserialize(bytearray(data)).call(x), logits(make(), params, state, x))


READER = """
import sys
sys.modules["jbn"] = None  # an import of it fails
import jax, jax.export, numpy as np
network = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
print(np.asarray(network.call(np.full((2, 4), 0.5, np.float32))).tobytes().hex(), "jbn" in str(network.out_tree))
"""


@pytest.mark.processes
def test_a_process_without_jbn_runs_it(tmp_path):
    make, params, state, x = posed("mlp")
    _, inputs = normalize_inputs(x)
    data = to_stablehlo(partial(logits, make()), params, state, x, inputs=inputs)
    (tmp_path / "network").write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", READER, str(tmp_path / "network")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    shown, named = done.stdout.split()
    wanted = export.deserialize(bytearray(data)).call(np.full((2, 4), 0.5, np.float32))
    assert_close(jnp.asarray(np.frombuffer(bytes.fromhex(shown), np.float32).reshape(2, 3)), wanted)
    assert named == "False"


ONE = np.ones((2, 3), np.float32)
STATS = BNStats(*np.ones((3, 3), np.float32))
FAR = BNStats(np.float64([1, 1.7e9, 1]), np.float64([1, 300, 1]), np.ones(3))
REFUSED = {
    "no function": ((None, None, None, ONE), {}, "apply_fn: got NoneType; expected a function; "),
    "no x": ((max, None, None, (2, 3)), {}, "x: got tuple; expected an array, or its shape and dtype; pass an example"),
    "no batch": ((max, None, None, ONE[0, 0]), {}, "x: got shape (); expected a batch along the leading axis; pass an"),
    "no numbers": ((max, None, None, np.array(["a"])), {}, "x: got dtype <U1; expected numbers; pass an example batch"),
    "inputs": (
        (max, None, None, ONE),
        {"inputs": 1},
        "inputs: got int; expected BNStats; pass those that",
    ),
    "shape": (
        (max, None, None, ONE[:, :2]),
        {"inputs": STATS},
        "inputs: got statistics of shape (3,); expected (2,), that of the last axis of x; pass those of these features",
    ),
    "variance": (
        (max, None, None, ONE),
        {"inputs": STATS._replace(var=-STATS.var)},
        "inputs: got a mean or variance that is not finite, or a variance below 0; expected those of data; compute",
    ),
    "far": (
        (max, None, None, ONE),
        {"inputs": FAR},
        "x: got dtype float32 for feature 1 of mean 1.7e+09 and standard deviation 17.3; expected float64, since float",
    ),
    "platform": (
        (max, None, None, ONE),
        {"platforms": ("cpu", "gpu")},
        "platforms: got ('cpu', 'gpu'); expected some of cpu, cuda, rocm, tpu; pass names, as in platforms=",
    ),
    "name": ((max, None, None, ONE), {"name": "a b"}, "name: got 'a b'; expected a Python identifier; pass one, as in"),
    "outputs": (
        (lambda p, s, x: (x, [STATS]), None, None, ONE),
        {},
        "apply_fn: got a BNStats in its outputs; expected arrays in tuples, lists and dicts, which need no import to",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exported_is_said_in_one_line(case):
    arguments, options, message = REFUSED[case]
    with pytest.raises((TypeError, ValueError)) as caught:
        to_stablehlo(*arguments, **options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_more_than_a_file_can_hold_is_refused_before_it_is_copied(monkeypatch):
    monkeypatch.setattr("jbn.export._forward._MOST_BYTES", 10)
    with pytest.raises(ValueError, match=r"^params: got 0\.0 GiB of arrays; expected less than 2 GiB, which"):
        to_stablehlo(max, ONE, None, ONE)


def test_without_flatbuffers_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr("jbn.export._stablehlo.find_spec", lambda name: None)
    for act in (lambda: to_stablehlo(max, None, None, ONE), lambda: describe(b"")):
        with pytest.raises(ModuleNotFoundError, match=r"^jbn\.export: got no package flatbuffers; expected it to be"):
            act()


def test_a_file_that_holds_no_network_is_said_to_be_none():
    data = to_stablehlo(lambda p, s, x: x, None, None, ONE)
    several = export.export(jax.jit(lambda x, y: x))(ONE, ONE).serialize()
    for wrong in (b"", b"garbage", data[: len(data) // 2], data[:40], bytes(several)):
        with pytest.raises(ValueError, match=r"^data: got \d+ bytes that hold no exported network; expected those of"):
            describe(wrong)
    with pytest.raises(TypeError, match=r"^data: got str; expected bytes; read them with"):
        describe("file")

"""The layer of `jbn.haiku` beside Haiku's own: what it computes, what it keeps, where it is better."""

import inspect
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from support import oracle
from support.beside_stock import assert_near, assert_same, bits, outline
from support.closeness import assert_close

hk = pytest.importorskip("haiku")
door = pytest.importorskip("jbn.haiku")


def made(cls, **options):
    """A transformed layer: apply(params, state, None, x, is_training, **call) -> (y, state)."""
    options = {"create_scale": True, "create_offset": True, "decay_rate": 0.9, **options}
    normal = hk.initializers.RandomNormal(mean=1.0)
    for name in ("scale", "offset"):
        if options[f"create_{name}"]:
            options.setdefault(f"{name}_init", normal)
    return hk.transform_with_state(lambda x, is_training, **call: cls(**options)(x, is_training, **call))


def batch(shape=(6, 4, 3), dtype=jnp.float32, *, seed=1, offset=2.0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * 1.5 + offset, dtype)


def value(f, params, state, x, is_training, **call):
    """Of the output and of the new state, so that gradients through both are seen."""
    y, state = f.apply(params, state, None, x, is_training, **call)
    moments = [v for v in jax.tree.leaves(state) if jnp.issubdtype(v.dtype, jnp.floating)]
    weights = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
    return jnp.sum(weights * jnp.sin(y)) + sum(jnp.sum(jnp.cos(v)) for v in moments), (y, state)


def history(cls, x, options):
    """Initial variables, and outputs, gradients and states of two training steps and two evaluations."""
    f = made(cls, **options)

    def step(params, state, x, is_training, **call):
        def of(params, x):
            return value(f, params, state, x, is_training, **call)

        (_, (y, state)), gradients = jax.value_and_grad(of, (0, 1), has_aux=True)(params, x)
        return y, state, gradients

    @jax.jit
    def run(x):
        params, first = f.init(jax.random.key(0), x, True)
        results = [step(params, first, x, True)]
        results.append(step(params, results[-1][1], 3 * x - 1, True))
        results.append(step(params, results[-1][1], 2 * x, False))
        results.append(step(params, results[-1][1], 2 * x, False, test_local_stats=True))
        return params, first, results

    return run(x)


LAYOUTS = {
    "channels last": {},
    "channels first": {"data_format": "channels_first"},
    "axis": {"axis": [0, 1]},
    "axis of the batch alone": {"axis": (0,)},
    "negative axis": {"axis": [0, -2], "create_scale": False},
    "all axes": {"axis": [0, 1, 2]},
    "no axes": {"axis": []},
    "no scale": {"create_scale": False},
    "no offset": {"create_offset": False},
    "neither": {"create_scale": False, "create_offset": False},
    "eps and decay": {"eps": 0.1, "decay_rate": 0.5},
}


BY_NIGHT = {"axis", "negative axis", "all axes", "neither"}
NAMES = [pytest.param(name, marks=[pytest.mark.nightly] * (name in BY_NIGHT)) for name in LAYOUTS]


@pytest.mark.parametrize("name", NAMES)
def test_outputs_gradients_and_state_are_those_of_haiku(name):
    got, expected = (history(cls, batch(), LAYOUTS[name]) for cls in (door.BatchNorm, hk.BatchNorm))
    if name == "no axes":  # each value is its own mean: Haiku divides what rounding left by the square root of ε
        got, expected = ([result[0] for result in results[:2]] for _, _, results in (got, expected))
        assert_same(got, expected, 1e-3)
    else:
        assert_same(got, expected, 2e-5)


AFFINE = {
    "per channel": ((3,), (1, 1, 3)),
    "numbers": ((), ()),
    "per example": ((6, 1, 3), (6, 1, 3)),
    "per value, and an offset per channel": ((6, 4, 3), (3,)),
    "none, and an offset per example": (None, (6, 1, 1)),
}


@pytest.mark.parametrize("name", AFFINE)
def test_scale_and_offset_at_call_time_are_those_of_haiku(name):
    shapes = dict(zip(("scale", "offset"), AFFINE[name], strict=True))
    call = {key: batch(shape, seed=5) for key, shape in shapes.items() if shape is not None}
    answers = []
    for cls in (door.BatchNorm, hk.BatchNorm):
        f = made(cls, create_scale=False, create_offset=False)
        _, state = f.init(None, batch(), True, **call)

        @jax.jit
        def both(call, x, f=f, state=state):
            def of(is_training):
                gradient = jax.value_and_grad(lambda call, x: value(f, {}, state, x, is_training, **call), (0, 1), True)
                return gradient(call, x)

            return of(True), of(False)

        answers.append(both(call, batch()))
    assert_same(*answers, 2e-5)


def test_constructor_and_call_have_the_signature_of_haiku():
    assert outline(inspect.signature(door.BatchNorm)) == outline(inspect.signature(hk.BatchNorm))
    calls = (inspect.signature(cls.__call__) for cls in (door.BatchNorm, hk.BatchNorm))
    assert len({str(outline(call)) for call in calls}) == 1


@pytest.mark.parametrize("key", ["scale", "offset"])
def test_a_layer_with_its_own_refuses_another_in_one_line(key):
    f = made(door.BatchNorm)
    with pytest.raises(ValueError, match="at call time") as caught:
        f.init(jax.random.key(0), batch(), True, **{key: jnp.ones(3)})
    assert str(caught.value).splitlines()[0] == (
        f"{key}: got an array at call time with create_{key}=True; expected None; "
        f"leave it out, or construct the layer with create_{key}=False."
    )
    with pytest.raises(ValueError, match=f"Cannot set `{key}_init`"):
        made(door.BatchNorm, **{f"create_{key}": False, f"{key}_init": jnp.ones}).init(None, batch(), True)


def test_evaluation_before_training_is_an_error_as_in_haiku():
    with pytest.raises(ValueError, match="average"):
        made(door.BatchNorm).init(jax.random.key(0), batch(), False)


@pytest.mark.parametrize("kept", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("given", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("is_training", [True, False])
def test_output_and_state_have_the_dtypes_of_haiku(kept, given, is_training):
    def dtypes(cls):
        f = made(cls)
        variables = jax.eval_shape(lambda x: f.init(jax.random.key(0), x, True), batch(dtype=kept))
        y, state = jax.eval_shape(lambda v, x: f.apply(*v, None, x, is_training), variables, batch(dtype=given))
        return y.dtype, jax.tree.map(lambda v: v.dtype, variables), jax.tree.map(lambda v: v.dtype, state)

    got, expected = dtypes(door.BatchNorm), dtypes(hk.BatchNorm)
    assert got[:2] == expected[:2]
    assert got[2] == got[1][1]  # Haiku's own changes with x, which no scan takes


def test_half_precision_is_rounded_once():
    x = batch(dtype=jnp.bfloat16, offset=30.0)
    f = made(door.BatchNorm, create_scale=False, create_offset=False)
    y, _ = f.apply(*f.init(None, x, True), None, x, True)
    assert_close(y, oracle.batch_norm(x))


@pytest.mark.parametrize("shape", [(), (5,), (4, 3)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int32])
def test_integers_and_numbers_are_taken(shape, dtype):
    x = (10 * batch(shape)).astype(dtype)
    options = {"create_scale": False, "create_offset": False}
    answers = []
    for cls in (door.BatchNorm, hk.BatchNorm):
        f = made(cls, **options)
        params, state = f.init(None, x, True)
        answers.append([state, f.apply(params, state, None, x, True)])
    if len(shape) < 2:  # one value to a channel
        assert_near(answers[0][1][0], np.zeros(shape), 1e-6)
        answers = [[state, y.dtype, new] for state, (y, new) in answers]
        assert answers[0][1] == answers[1][1]
        answers = [[state["batch_norm/~/mean_ema"], new["batch_norm/~/mean_ema"]] for state, _, new in answers]
    assert_same(*answers, 1e-4)  # Haiku's variance is a difference of large numbers
    y, _ = f.apply(params, state, None, x.astype(float), False)
    f = made(door.BatchNorm, **options)
    assert_near(f.apply(params, state, None, x, False)[0], y, 2e-5)  # which Haiku refuses for integers


def test_complex_x_is_computed_by_haiku():
    x = batch() + 1j * batch(seed=5)
    answers = []
    for cls in (door.BatchNorm, hk.BatchNorm):
        f = made(cls, create_scale=False, create_offset=False)
        answers.append(f.apply(*f.init(None, x, True), None, x, True))
    assert bits(answers[0]) == bits(answers[1])


@pytest.mark.parametrize(("names", "local"), [("i", False), (["i", "j"], False), (("j", "i"), True)], ids=str)
def test_replicas_under_vmap_pool_as_in_haiku(names, local):
    # The gradient is taken of a compiled function, where JAX runs the rules of custom derivatives late.
    x = batch((3, 2, 4, 5))
    answers = []
    for cls in (door.BatchNorm, hk.BatchNorm):
        f = made(cls, cross_replica_axis=names)

        def over(g):
            return jax.vmap(jax.vmap(g, axis_name="j"), axis_name="i")

        params, state = over(lambda x, f=f: f.init(jax.random.key(0), x, True))(x)

        @jax.jit
        def of(params, state, x, f=f):
            call = {"test_local_stats": True} if local else {}
            y, state = over(lambda p, s, x: f.apply(p, s, None, x, not local, **call))(params, state, x)
            return jnp.sum(jnp.cos(jnp.arange(y.size)).reshape(y.shape) * jnp.sin(y)), (y, state)

        (_, (y, state)), gradients = jax.value_and_grad(of, (0, 2), has_aux=True)(params, state, x)
        answers.append([y, state, gradients])
    assert_same(*answers, 2e-5)


@pytest.mark.parametrize("groups", [[[0, 1], [2, 3]], [[0], [1, 2, 3]]], ids=str)
def test_groups_as_lists_work_under_vmap_too(groups):
    x = batch((4, 5, 3))
    f = made(
        door.BatchNorm,
        cross_replica_axis="i",
        cross_replica_axis_index_groups=groups,
        create_scale=False,
        create_offset=False,
    )
    _, state = jax.vmap(lambda x: f.init(None, x, True), axis_name="i")(x)

    def apply(x):
        return jax.vmap(lambda s, x: f.apply({}, s, None, x, True), axis_name="i")(state, x)

    y, new = jax.jit(apply)(x)
    for group in groups:
        expected = oracle.batch_norm(x[np.array(group)])
        assert_near(y[np.array(group)], expected, 2e-6)
        assert_near(new["batch_norm/~/mean_ema"]["average"][group[0], 0], oracle.moments(x[np.array(group)]).mean, 2e-6)
    got = jax.grad(lambda x: jnp.sum(jnp.sin(jax.jit(apply)(x)[0])))(x)
    for group in map(np.array, groups):
        g = np.cos(oracle.batch_norm(x[group]))
        assert_near(got[group], oracle.gradients(x[group], g).x, 2e-5)
    wrong = made(door.BatchNorm, cross_replica_axis="i", cross_replica_axis_index_groups=[[0, 1]])
    with pytest.raises(ValueError, match="expected each of the indices 0 to 3 in one group"):
        jax.vmap(lambda x: wrong.init(jax.random.key(0), x, True), axis_name="i")(x)


def test_devices_pool_inside_a_checked_shard_map():
    x = batch((16, 3))
    f, whole = made(door.BatchNorm, cross_replica_axis="devices"), made(door.BatchNorm)
    params, state = whole.init(jax.random.key(0), x, True)
    mesh = jax.make_mesh((4,), ("devices",), axis_types=(AxisType.Auto,))

    def step(params, state, x):
        return f.apply(params, state, None, x, True)

    specs = {"in_specs": (P(), P(), P("devices")), "out_specs": (P("devices"), P())}
    got = jax.jit(jax.shard_map(step, mesh=mesh, **specs))(params, state, x)
    assert_same(list(got), list(whole.apply(params, state, None, x, True)), 5e-6)


def test_an_unbound_axis_is_a_name_error():
    with pytest.raises(NameError):
        made(door.BatchNorm, cross_replica_axis="i").init(jax.random.key(0), batch(), True)


@pytest.mark.parametrize("x64", [False, True])
def test_the_state_is_a_scan_carry(x64):
    with jax.enable_x64(x64):
        xs = batch((5, 6, 3), jnp.float32)
        f = made(door.BatchNorm)
        params, state = f.init(jax.random.key(0), xs[0], True)
        for given in (jnp.float32, jnp.bfloat16, jnp.result_type(float)):

            def one(state, x):
                y, state = f.apply(params, state, None, x, True)
                return state, y

            after, ys = jax.lax.scan(one, state, xs.astype(given))
            assert jax.tree.map(lambda v: v.dtype, after) == jax.tree.map(lambda v: v.dtype, state)
            assert ys.dtype == jnp.result_type(given, jnp.float32)
        assert int(after["batch_norm/~/mean_ema"]["counter"]) == 5


def test_the_transforms_of_haiku_go_through_it():
    def model(cls):
        def f(x):
            first, second = cls(True, True, 0.9, name="a"), cls(True, True, 0.9, cross_replica_axis="i", name="b")
            x = hk.vmap(lambda x: second(x, True), axis_name="i", split_rng=False)(x)
            x = hk.remat(lambda x: first(x, True))(x)
            layers = hk.experimental.layer_stack(2)(lambda x: jnp.tanh(cls(True, True, 0.9, name="c")(x, True)))
            x = layers(x)
            last = cls(True, True, 0.9, name="d")

            def step(carry, _):
                return carry + last(carry, True), None

            return hk.scan(step, x, None, length=3)[0]

        return hk.transform_with_state(f)

    answers = []
    for cls in (door.BatchNorm, hk.BatchNorm):
        f = model(cls)
        params, state = f.init(jax.random.key(0), batch())

        @jax.jit
        def of(params, x, f=f, state=state):
            y, new = f.apply(params, state, None, x)
            return jnp.sum(jnp.sin(y)), new

        answers.append([params, state, jax.value_and_grad(of, (0, 1), has_aux=True)(params, batch())])
    assert_same(*answers, 1e-4)


def test_a_vmap_without_a_name_gives_each_member_its_own_statistics():
    x = batch((4, 6, 3))
    f = made(door.BatchNorm)
    params, state = f.init(jax.random.key(0), x[0], True)
    ys, states = jax.jit(jax.vmap(lambda x: f.apply(params, state, None, x, True)))(x)
    for i in range(4):
        expected = f.apply(params, state, None, x[i], True)
        assert_same([ys[i], jax.tree.map(lambda v, i=i: v[i], states)], list(expected), 5e-6)


def trained(f, *batches):
    params, state = f.init(jax.random.key(0), batches[0], True)
    for x in batches:
        y, state = f.apply(params, state, None, x, True)
    return params, state, y


def test_checkpoints_are_exchanged_in_both_directions():
    x = batch(seed=9)
    stock, ours = made(hk.BatchNorm), made(door.BatchNorm)
    for source, target in ((stock, ours), (ours, stock)):
        params, state, _ = trained(source, batch(), batch(seed=3))
        params, state = pickle.loads(pickle.dumps(jax.device_get((params, state))))  # as Haiku users store them
        for is_training in (True, False):
            got, expected = (list(f.apply(params, state, None, x, is_training)) for f in (target, source))
            assert_same(got, expected, 5e-6)


def test_a_batch_that_is_not_finite_moves_nothing():
    f = made(door.BatchNorm)
    params, state, _ = trained(f, batch(), batch(seed=3))
    y, new = f.apply(params, state, None, batch().at[0].set(jnp.nan), True)
    assert bits(new) == bits(state)
    assert not jnp.isfinite(y).any()  # and hides nothing
    new = f.init(jax.random.key(0), batch().at[0].set(jnp.nan), True)[1]
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(new))


def test_a_channel_that_is_not_finite_keeps_its_average_and_does_not_hold_up_the_others():
    f = made(door.BatchNorm)
    params, state, _ = trained(f, batch(), batch(seed=3))
    x = batch(seed=4)
    _, clean = f.apply(params, state, None, x, True)
    _, got = f.apply(params, state, None, x.at[2, 1, 1].set(jnp.inf), True)
    for ema in ("batch_norm/~/mean_ema", "batch_norm/~/var_ema"):
        others = np.array([0, 2])
        assert bits(got[ema]["average"][..., 1]) == bits(state[ema]["average"][..., 1])
        assert bits(got[ema]["average"][..., others]) == bits(clean[ema]["average"][..., others])
        _, again = f.apply(params, got, None, x, True)
        read = again[ema]["hidden"] / (1 - jnp.float32(0.9) ** again[ema]["counter"])
        assert_near(again[ema]["average"], read, 1e-6)


def test_at_a_large_mean_only_the_door_is_right():
    x = batch((64, 16, 3), offset=0.0) + 1e4
    expected = oracle.batch_norm(x)
    g = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)
    errors = {}
    for cls in (door.BatchNorm, hk.BatchNorm):
        f = made(cls, create_scale=False, create_offset=False)
        state = f.init(None, x, True)[1]
        y, pullback = jax.vjp(lambda x, f=f, state=state: f.apply({}, state, None, x, True)[0], x)
        gradient = oracle.gradients(x, g).x
        errors[cls] = [np.max(np.abs(np.asarray(y) - expected)), np.max(np.abs(np.asarray(pullback(g)[0]) - gradient))]
    assert max(errors[door.BatchNorm]) < 1e-4
    assert not min(errors[hk.BatchNorm]) < 0.1  # it may be NaN


def test_replicas_with_means_of_their_own_are_pooled_exactly():
    x = batch((4, 16, 3), offset=0.0) + 1e3 * jnp.arange(4.0)[:, None, None] + 1e5
    f = made(door.BatchNorm, cross_replica_axis="i", create_scale=False, create_offset=False)
    y, _ = jax.vmap(lambda x: f.apply(*f.init(None, x, True), None, x, True), axis_name="i")(x)
    assert_near(y, oracle.batch_norm(x), 2e-6)

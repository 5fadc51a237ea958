"""`jbn.keras.replace` exchanges the batch norms of any model and leaves everything else as it was."""

import keras
import numpy as np
from support.closeness import bits, relative_error
from support.keras_twins import Door, Stock
from support.refusals import assert_refused

import jbn.keras

OFFSET = np.float32(2**20)


@keras.saving.register_keras_serializable("tests")
class Frozen(Stock):
    """A published model's own kind of batch norm."""

    def call(self, inputs, training=None, mask=None):
        return super().call(inputs, training=False, mask=mask)


class Block(keras.layers.Layer):
    """Residual; made of functions, so that Keras cannot copy it from a config."""

    def __init__(self, width, activation):
        super().__init__()
        self.layers_in_turn = [keras.layers.Dense(width), Stock(momentum=0.9)]
        self.activation = activation

    def call(self, x, training=None):
        dense, norm = self.layers_in_turn
        return x + self.activation(norm(dense(x), training=training))


class Net(keras.Model):
    """A published model, subclassed."""

    def __init__(self, width, depth=2):
        super().__init__()
        self.first = Stock(name="first")
        self.stem = keras.layers.Dense(width)
        self.blocks = [Block(width, lambda x: keras.ops.relu(x)) for _ in range(depth)]
        self.top = keras.layers.Dense(1)

    def call(self, x, training=None):
        x = self.stem(self.first(x, training=training))
        for block in self.blocks:
            x = block(x, training=training)
        return self.top(x)


def data(n=48):
    """Multiples of 1/8, so that the sum with OFFSET is exact."""
    x = np.random.default_rng(4).integers(-16, 16, (n, 4)).astype("float32") / 8
    return x, x[:, :1] * x[:, 1:2]


def subclassed(seed=0):
    keras.utils.set_random_seed(seed)
    net = Net(6)
    net(np.zeros((1, 4), "float32"))
    net.compile(keras.optimizers.SGD(1e-2, momentum=0.9), "mse")
    return net


def nested():
    """Functional around Sequential around Functional, one layer in two places, and wrapped ones."""
    shared = Stock(name="shared")
    inner_input = keras.Input((3, 4))
    inner = keras.Model(inner_input, shared(keras.layers.Dense(4)(inner_input)), name="inner")
    middle = keras.Sequential([keras.Input((3, 4)), inner, Stock(name="middle"), keras.layers.Dense(4)], name="middle")
    inputs = keras.Input((3, 4))
    x = keras.layers.TimeDistributed(Stock(name="wrapped"))(shared(middle(inputs)))
    return keras.Model(inputs, Frozen(name="frozen")(x))


def norms(model):
    return [layer for layer in model._flatten_layers() if isinstance(layer, Stock)]


def losses(model, offset=0, steps=20):
    x, y = data()
    return [float(model.train_on_batch(x + np.float32(offset), y)) for _ in range(steps)]


def test_every_batch_norm_in_nested_models_is_exchanged_and_nothing_else_is_touched():
    model = nested()
    before = [(id(layer), layer.name) for layer in model._flatten_layers()]
    variables = [(id(v), v.path, bits(v.value)) for v in model.variables]
    kinds = [type(layer) for layer in model._flatten_layers() if not isinstance(layer, Stock)]
    x = np.random.default_rng(5).normal(size=(6, 3, 4)).astype("float32")
    y = model(x, training=False)
    assert jbn.keras.replace(model) is model
    assert [(id(layer), layer.name) for layer in model._flatten_layers()] == before
    assert [(id(v), v.path, bits(v.value)) for v in model.variables] == variables
    assert [type(layer) for layer in model._flatten_layers() if not isinstance(layer, Stock)] == kinds
    assert {layer.name for layer in norms(model)} == {"shared", "middle", "wrapped", "frozen"}
    assert all(isinstance(layer, Door) for layer in norms(model))
    np.testing.assert_allclose(model(x, training=False), y, rtol=1e-5, atol=1e-5)


def test_a_subclass_stays_one_between_jbn_and_its_own_rules(tmp_path):
    model = jbn.keras.replace(keras.Sequential([keras.Input((4,)), Frozen(epsilon=1e-6)]))
    (layer,) = norms(model)
    assert isinstance(layer, Frozen)
    assert [type(layer).__name__, *(c.__name__ for c in type(layer).mro()[1:4])] == [
        "Frozen",
        "Frozen",
        "BatchNormalization",
        "BatchNormalization",
    ]
    layer.moving_mean.assign(np.full(4, OFFSET))
    layer.moving_variance.assign(np.full(4, 3.0))
    x, _ = data()
    exact = x / np.sqrt(3 + 1e-6)
    assert np.abs(model(x + OFFSET, training=True) - exact).max() < 1e-5
    assert type(jbn.keras.replace(keras.Sequential([keras.Input((4,)), Frozen()])).layers[0]) is type(layer)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert type(again.layers[0]) is Frozen  # as it was published
    assert isinstance(jbn.keras.replace(again).layers[0], Door)
    assert bits(again(x + OFFSET)) == bits(model(x + OFFSET))


def test_a_model_is_trained_as_keras_would_where_keras_is_right_and_only_ours_at_a_large_mean():
    stock, ours = subclassed(), jbn.keras.replace(subclassed())
    expected = losses(stock)
    np.testing.assert_allclose(losses(ours), expected, rtol=1e-4)
    in_evaluation = [np.asarray(model(data()[0], training=False)) for model in (stock, ours)]
    np.testing.assert_allclose(*in_evaluation, rtol=1e-3, atol=1e-3)
    # An offset of the inputs is what the first layer takes away, exactly.
    shifted = [losses(model, OFFSET) for model in (subclassed(), jbn.keras.replace(subclassed()))]
    errors = [relative_error(got, expected) for got in shifted]
    assert errors[1] < 1e-4 < 1e-3 < errors[0]


def test_training_goes_on_with_the_optimizer_that_had_begun_and_compiled_functions_are_made_anew():
    untouched, model = subclassed(), subclassed()
    expected = losses(untouched, steps=6)
    x, _ = data()
    first = losses(model, steps=3)
    model.first.moving_mean.assign(np.full(4, OFFSET))
    rough = model.predict(x + OFFSET, verbose=0)  # compiled with Keras's layers
    slots = [id(v) for v in model.optimizer.variables]
    jbn.keras.replace(model)
    fine = model.predict(x + OFFSET, verbose=0)
    assert np.abs(fine - rough).max() > 1e-4
    np.testing.assert_allclose(fine, model(x + OFFSET, training=False), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(first + losses(model, steps=3), expected, rtol=1e-4)
    assert [id(v) for v in model.optimizer.variables] == slots


def test_a_model_that_is_not_built_yet_is_exchanged_too():
    net = jbn.keras.replace(Net(6))
    net(np.zeros((1, 4), "float32"))
    assert [type(layer) for layer in norms(net)] == 3 * [Door]


def test_an_application_is_exchanged_and_gives_the_same_outputs():
    keras.utils.set_random_seed(0)
    model = keras.applications.MobileNet((32, 32, 3), alpha=0.25, weights=None, classes=5)
    x = np.random.default_rng(6).normal(size=(4, 32, 32, 3)).astype("float32")
    front = lambda: keras.Model(model.input, model.get_layer("conv_pw_2_relu").output).predict(x, verbose=0)  # noqa: E731
    outputs = front()
    assert len(norms(jbn.keras.replace(model))) == 27
    assert all(type(layer) is Door for layer in norms(model))
    np.testing.assert_allclose(front(), outputs, rtol=1e-4, atol=1e-6)


def test_a_model_without_batch_norms_is_refused():
    text = (
        "model: got 'plain', which holds no keras.layers.BatchNormalization; expected at least one; "
        "pass a model whose layers are built in its constructor, or in build."
    )
    plain = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)], name="plain")
    exchanged = jbn.keras.replace(keras.Sequential([keras.Input((3,)), Stock()], name="plain"))
    for model in (plain, exchanged):
        assert_refused(lambda model=model: jbn.keras.replace(model), ValueError, text)


def test_what_is_no_model_is_refused():
    text = "model: got function; expected a Keras model or layer; pass one."
    assert_refused(lambda: jbn.keras.replace(lambda x: x), TypeError, text)

"""Models with the door in them: saved, saved and loaded, cloned; and what importing the door asks for."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from support.closeness import bits
from support.keras_twins import Door, Stock

import jbn.keras


def sequences(n=32, offset=1.0):
    rng = np.random.default_rng(3)
    x = rng.normal(offset, 2, (n, 5, 4)).astype("float32")
    x[:, 3:][rng.random((n, 2)) < 0.5] = 0  # padding
    return x, x[:, :, :1].sum(1) - 2 * x[:, :, 1].max(1, keepdims=True)


def model_with(make, seed=0):
    """Not trained with Adam: where a batch norm takes a bias away, Adam makes steps of the rounding of its gradient."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((None, 4))
    x = keras.layers.Masking()(inputs)
    x = make(renorm=True, renorm_clipping={"rmax": 3.0, "rmin": 0.3}, momentum=0.8)(x)
    x = keras.layers.Dense(6)(x)
    x = make(momentum=0.9, scale=False)(keras.layers.GlobalAveragePooling1D()(x))
    model = keras.Model(inputs, keras.layers.Dense(1)(make()(keras.layers.Dense(5)(x))))
    model.compile(keras.optimizers.SGD(1e-2, momentum=0.9), "mse")
    return model


def assert_same_weights(ours, theirs):
    assert [w.name for w in ours.weights] == [w.name for w in theirs.weights]
    for a, b in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        assert bits(a) == bits(b)


def norms(model):
    return [type(layer) for layer in model.layers if isinstance(layer, Stock)]


def test_fit_and_predict_give_the_numbers_of_keras():
    x, y = sequences()
    losses, predictions = [], []
    for make in (Stock, Door):
        model = model_with(make)
        losses.append(model.fit(x, y, batch_size=8, epochs=3, verbose=0, shuffle=False).history["loss"])
        predictions.append(model.predict(x, verbose=0))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    np.testing.assert_allclose(predictions[1], predictions[0], rtol=1e-3, atol=1e-3)


@pytest.fixture(params=[Stock, Door], ids=["stock", "door"])
def saved(request):
    """A model whose weights no other model is made with."""
    model = model_with(request.param)
    model.set_weights([w + 0.5 for w in model.get_weights()])
    return model


def test_a_file_with_the_door_in_it_comes_back_with_it_and_without_jbn_as_stock(tmp_path, monkeypatch):
    x, y = sequences()
    ours = model_with(Door)
    ours.fit(x, y, epochs=1, verbose=0)
    ours.save(tmp_path / "ours.keras")
    again = keras.saving.load_model(tmp_path / "ours.keras")
    assert norms(again) == 3 * [Door]
    assert_same_weights(again, ours)
    assert bits(again.predict(x, verbose=0)) == bits(ours.predict(x, verbose=0))
    loss = [model.fit(x, y, verbose=0, shuffle=False).history["loss"] for model in (ours, again)]
    assert loss[0] == pytest.approx(loss[1])  # the optimizer's state came along
    monkeypatch.delitem(keras.saving.get_custom_objects(), "jbn>BatchNormalization")  # as where jbn is not imported
    stock = keras.saving.load_model(tmp_path / "ours.keras", custom_objects={"jbn>BatchNormalization": Stock})
    assert norms(stock) == 3 * [Stock]


def test_a_stock_file_is_loaded_and_replaced(tmp_path):
    stock = model_with(Stock)
    stock.set_weights([w + 0.5 for w in stock.get_weights()])
    stock.save(tmp_path / "stock.keras")
    ours = jbn.keras.replace(keras.saving.load_model(tmp_path / "stock.keras"))
    assert norms(ours) == 3 * [Door]
    assert_same_weights(ours, stock)


@pytest.mark.parametrize("ending", ["weights.h5", "keras"])
def test_saved_weights_load_into_either(saved, ending, tmp_path):
    path = tmp_path / f"model.{ending}"
    (saved.save if ending == "keras" else saved.save_weights)(path)
    for make in (Stock, Door):
        other = model_with(make, seed=1)
        other.load_weights(path)
        assert_same_weights(other, saved)


def test_a_clone_has_the_door_and_a_clone_function_puts_it_in():
    assert norms(keras.models.clone_model(model_with(Door))) == 3 * [Door]
    clone = keras.models.clone_model(
        model_with(Stock),
        clone_function=lambda layer: (Door if type(layer) is Stock else type(layer)).from_config(layer.get_config()),
    )
    assert norms(clone) == 3 * [Door]


def test_a_frozen_layer_is_left_alone_by_fit():
    model = model_with(Door)
    for layer in model.layers:
        if isinstance(layer, Stock):  # as code does that was written for Keras's own
            layer.trainable = False
    before = [[bits(w) for w in layer.get_weights()] for layer in model.layers if isinstance(layer, Stock)]
    model.compile("sgd", "mse")
    model.fit(*sequences(), epochs=1, verbose=0)
    assert before == [[bits(w) for w in lay.get_weights()] for lay in model.layers if isinstance(lay, Stock)]


def run(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )
    return done.stdout.strip(), done.stderr.strip().splitlines()[-1:]


@pytest.mark.processes
def test_importing_the_door_imports_keras_and_no_other_framework():
    code = """import sys, jax.export, keras; before = set(sys.modules); import jbn.keras
print(*{name.split(".")[0] for name in set(sys.modules) - before})"""
    new = set(run(code)[0].split())
    assert "jbn" in new
    assert new <= {"jbn", "jax", "keras"} | sys.stdlib_module_names


@pytest.mark.processes
def test_without_keras_one_line_names_the_extra():
    _, error = run("import sys; sys.modules['keras'] = None; import jbn.keras")
    expected = "jbn.keras: got no package keras; expected it to be installed; run pip install 'jbn[keras]'."
    assert error == [f"ModuleNotFoundError: {expected}"]


@pytest.mark.processes
def test_another_backend_is_refused_in_one_line():
    _, error = run("import jbn.keras", KERAS_BACKEND="numpy")
    expected = "got the Keras backend numpy; expected jax; set KERAS_BACKEND=jax before keras is imported."
    assert error == [f"ImportError: jbn.keras: {expected}"]


@pytest.mark.processes
def test_a_backend_that_is_not_installed_is_refused_in_the_same_line():
    _, error = run("import sys; sys.modules['torch'] = None; import jbn.keras", KERAS_BACKEND="torch")
    expected = "got the Keras backend torch, which is not installed; expected jax; set KERAS_BACKEND=jax before keras"
    assert error == [f"ImportError: jbn.keras: {expected} is imported."]

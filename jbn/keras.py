"""The door to Keras, on its JAX backend: its BatchNormalization with jbn inside, and a way to put it into a model.

Numbers computed from a batch are ours, stored formats are Keras's.
"""

import functools
import importlib.util
import inspect
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jbn._core import apply_unchecked
from jbn._doors import blended, keras_renorm, missing, usable_channels
from jbn._normalize import Layout
from jbn._pytrees import BNParams, BNState, BNStats

if importlib.util.find_spec("keras") is None:
    raise missing("keras", "keras", "keras")
_BACKEND = "jbn.keras: got the Keras backend {}; expected jax; set KERAS_BACKEND=jax before keras is imported."
try:
    import keras
except ModuleNotFoundError as error:  # Keras's default backend is tensorflow, which it imports
    raise ImportError(_BACKEND.format(f"{str(error.name).split('.')[0]}, which is not installed")) from error
if keras.backend.backend() != "jax":
    raise ImportError(_BACKEND.format(keras.backend.backend()))

__all__ = ["BatchNormalization", "replace"]

_SIGNATURE = inspect.signature(keras.layers.BatchNormalization.__init__)
_Model = TypeVar("_Model", bound=keras.Layer)


@keras.saving.register_keras_serializable(package="jbn")
class BatchNormalization(keras.layers.BatchNormalization):
    """Keras's BatchNormalization with jbn inside: z̃ = γ·(z−μ)/√(σ²+ε) + β for each channel.

    In training (``training=True``, and the layer trainable) μ and σ² are those of the batch, and the moving averages
    take them in: moving ← momentum·moving + (1−momentum)·batch. Otherwise they are the moving averages. Arguments,
    variables, config, dtype policies and files are those of the class it derives from.

    Ours: the moments and the normalization, exact where the mean is large, and in float64 for float64; a masked value
    moves neither statistics nor gradients, even if it is NaN; a channel whose batch holds a NaN or an infinity, or
    nothing unmasked, leaves its moving averages as they were; one channel under a mask; ``synchronized=True``, which
    Keras refuses on JAX: under ``jit`` with a sharded batch the statistics are those of the whole batch in any case.

    Keras's: ε = 1e-3, the biased variance in the averages, which start at (0, 1) uncorrected; one value per channel,
    whose output is β; x of integers; a ``mask`` of one rank less than x and of any dtype, with the last axis missing;
    the output in the compute dtype of the layer. ``renorm=True`` is x̂ from jbn and then Keras's formula,
    γ·(x̂·r + d) + β, with its own averages and limits; d is as exact as the averages are.

    Attributes:
        gamma: (C,) scale γ, or None.
        beta: (C,) shift β, or None.
        moving_mean: (C,) average of μ.
        moving_variance: (C,) average of σ².

    Example:
        >>> import numpy as np
        >>> import jbn.keras
        >>> layer = jbn.keras.BatchNormalization(epsilon=1e-6)
        >>> y = layer(np.array([[1e6 - 1], [1e6 + 1]], "float32"), training=True)
        >>> print(y.round(3))
        [[-1.]
         [ 1.]]

    References:
        Ioffe & Szegedy 2015, Algorithms 1 and 2; Ioffe 2017 for ``renorm``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = _SIGNATURE.bind(self, *args, **kwargs)
        synchronized = given.arguments.pop("synchronized", False)
        super().__init__(*given.args[1:], **given.kwargs)
        self.synchronized = synchronized

    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        x = jnp.asarray(inputs)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            x = x.astype(jnp.float32)
        if mask is not None:
            mask = jnp.asarray(mask).astype(bool)
            if mask.ndim != x.ndim - 1:
                raise ValueError(
                    f"mask: got shape {mask.shape} for inputs of shape {x.shape}; expected one axis less; "
                    "leave out the last axis."
                )
            mask = mask[..., None]
        train = bool(training and self.trainable)
        feature = self.axis % x.ndim
        layout = Layout(
            tuple(a for a in range(x.ndim) if a != feature), train=train, dtype=jnp.dtype(self.compute_dtype)
        )
        mean, var = self.moving_mean.value, self.moving_variance.value
        params = BNParams(self.gamma.value if self.scale else None, self.beta.value if self.center else None)
        if train and getattr(self, "renorm", False):  # Keras has it since 3.14
            return self._renormalized(layout, params, x, mask)
        state = BNState(mean, var, jnp.zeros(mean.shape, jnp.int32))
        y, stats = apply_unchecked(layout, params, state, x, self.epsilon, mask)
        if train:
            self._assign((self.moving_mean, self.moving_variance), stats, self.momentum)
        return y

    def _assign(self, averages: tuple[Any, Any], stats: BNStats, momentum: float) -> tuple[jax.Array, jax.Array]:
        """Moves two of Keras's averages towards the mean and variance of a batch; returns them, not yet rounded."""
        old = tuple(v.value.astype(stats.mean.dtype) for v in averages)
        moved = lax.stop_gradient(blended(old, stats, momentum))
        for variable, value in zip(averages, moved, strict=True):
            variable.assign(value)
        return moved

    def _renormalized(self, layout: Layout, params: BNParams, x: Any, mask: Any) -> Any:
        """y = γ·(x̂·r + d) + β, and the averages that Keras keeps for it."""
        unrounded = layout._replace(dtype=jnp.promote_types(x.dtype, jnp.float32))
        xhat, stats = apply_unchecked(unrounded, BNParams(None, None), None, x, self.epsilon, mask)
        mean, std = self.renorm_mean.value, self.renorm_stddev.value
        r, d, seen = keras_renorm(stats, mean, std, self.epsilon, self.renorm_clipping)
        self._assign((self.renorm_mean, self.renorm_stddev), seen, self.renorm_momentum)
        _, moving_std = self._assign((self.moving_mean, self.moving_stddev), seen, self.momentum)
        var = jnp.maximum(moving_std**2 - self.epsilon, 0).astype(self.moving_variance.dtype)
        usable = usable_channels(seen, self.moving_stddev.dtype)
        self.moving_variance.assign(jnp.where(usable, var, self.moving_variance.value))
        gamma, beta = (None if v is None else v.astype(r.dtype) for v in params)
        scale, shift = (r, d) if gamma is None else (gamma * r, gamma * d)
        shift = shift if beta is None else shift + beta
        scale, shift = (jnp.expand_dims(v, layout.reduce_axes) for v in (scale, shift))
        return (xhat * scale + shift).astype(layout.dtype)


# For Keras, which looks up the names of positional arguments in it, and for readers.
BatchNormalization.__init__.__signature__ = _SIGNATURE  # type: ignore[attr-defined]


def replace(model: _Model) -> _Model:
    """Gives every batch normalization in a model jbn's numbers, in place, and returns the model.

    Each layer stays the object that it is and changes its class, at any depth, in Functional, Sequential and
    subclassed models alike, which `keras.models.clone_model` skips or refuses. So weights, averages, names, frozen
    and shared layers, and an optimizer that has begun are untouched; what Keras had compiled for the model is traced
    anew. A function of your own that was compiled before (with the model in its closure) is not: replace first.

    To keep the stock model beside it, build it a second time and copy the weights with ``set_weights``.

    A subclass of Keras's layer stays one, with jbn between it and Keras: what it overrides is its own, what it asks
    of ``super()`` is jbn's, and files know it by the name that it had. A stock file is loaded and then replaced:
    ``replace(keras.saving.load_model(path))``. A file with jbn's layers comes back with them where ``jbn.keras`` has
    been imported, and as stock elsewhere, with ``load_model``'s
    ``custom_objects={"jbn>BatchNormalization": keras.layers.BatchNormalization}``.

    Args:
        model: a `keras.Model`, or a layer that contains others; built or not, compiled or not.

    Returns:
        The same object.

    Raises:
        TypeError: not a Keras model or layer.
        ValueError: no batch normalization of Keras's in it.

    Example:
        >>> import keras
        >>> import jbn.keras
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization()])
        >>> model = jbn.keras.replace(model)
        >>> isinstance(model.layers[0], jbn.keras.BatchNormalization)
        True
    """
    if not isinstance(model, keras.Layer):
        raise TypeError(f"model: got {type(model).__name__}; expected a Keras model or layer; pass one.")
    layers = model._flatten_layers()  # those whose weights are the model's; Keras has no public name for it
    found = [
        layer
        for layer in layers
        if isinstance(layer, keras.layers.BatchNormalization) and not isinstance(layer, BatchNormalization)
    ]
    if not found:
        raise ValueError(
            f"model: got {model.name!r}, which holds no keras.layers.BatchNormalization; expected at least one; "
            "pass a model whose layers are built in its constructor, or in build."
        )
    for layer in found:
        layer.__class__ = _exchanged(layer.__class__)
    for layer in layers:
        if isinstance(layer, keras.Model):
            layer.train_function = layer.test_function = layer.predict_function = None
    return model


@functools.cache
def _exchanged(stock: Any) -> Any:
    """The class with ours before Keras's among its ancestors, known to Keras's files by the name that it had."""
    if stock is keras.layers.BatchNormalization:
        return BatchNormalization
    ours = type(stock.__name__, (stock, BatchNormalization), {"__module__": stock.__module__, "__doc__": stock.__doc__})
    package, _, name = keras.saving.get_registered_name(stock).rpartition(">")
    if package:
        for each in (ours, stock):  # a file is loaded as the class that was registered last
            keras.saving.register_keras_serializable(package, name)(each)
    return ours

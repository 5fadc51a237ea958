"""The door to Flax nnx: its own BatchNorm with the numbers of jbn, and a way into models that one cannot edit."""

import math
from functools import cache
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import io_callback

from jbn._doors import any_complex, blended, feature_axes, missing, normalized
from jbn._pytrees import BNParams

try:
    from flax import nnx
    from flax.errors import TraceContextError
    from flax.nnx.nn.dtypes import canonicalize_dtype
except ModuleNotFoundError as error:
    raise missing("nnx", "flax", "flax") from error

__all__ = ["BatchNorm", "replace"]

_Model = TypeVar("_Model")


class BatchNorm(nnx.BatchNorm):
    """`flax.nnx.BatchNorm` with the numbers of jbn: y = scale·(x−μ)/√(σ²+ε) + bias.

    A subclass of Flax's, which differs in its call alone: arguments, variables, views and checkpoints are
    Flax's, and so are its conventions. In training μ and σ² (biased) are the moments of x over all axes but
    ``axis``, and the running ``mean`` and ``var`` move to d·running + (1−d)·batch, without debiasing and
    without a gradient; else they are the running ones. ``promote_dtype`` says what becomes of x, scale and
    bias, and y takes the dtype that they promote to, or ``dtype``. A mask is anything that broadcasts against x.

    What is jbn's: σ² is exact at any mean, whatever ``use_fast_variance`` says, and the running statistics
    are used as they are stored, without being rounded to ``dtype``. Under ``axis_name`` unequal masks and
    shards are pooled by their counts, and ``axis_index_groups`` work under every transformation. Masked-out
    values that are not finite harm neither y nor a gradient. The running statistics keep their dtype, in a
    ``scan`` with 64 bit too, and a channel that saw nothing, or nothing finite, keeps its own. Several feature
    axes may be trained, ``num_features`` the product of their sizes. A module from outside a traced function
    cannot be updated in it: here that is an error when the function runs, not when it is traced, so that
    `flax.nnx.eval_shape` of one works. What is Flax's own code: the call where x, ``dtype`` or ``param_dtype``
    is complex.

    Attributes:
        mean: running mean (C,), a `flax.nnx.BatchStat`.
        var: running variance (C,), biased, a `flax.nnx.BatchStat`.
        scale: γ (C,), a `flax.nnx.Param`, or None.
        bias: β (C,), a `flax.nnx.Param`, or None.
        use_running_average: whether to normalize with the running statistics; set by ``train()``, ``eval()``.
        use_fast_variance: accepted, and of no effect.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jbn.nnx import BatchNorm
        >>> layer = BatchNorm(1, momentum=0.0, rngs=nnx.Rngs(0))
        >>> layer(1e4 + jnp.array([[-1.0], [1.0]])).round(3)
        Array([[-1.],
               [ 1.]], dtype=float32)
        >>> layer.mean[...], layer.var[...]
        (Array([10000.], dtype=float32), Array([1.], dtype=float32))

    `flax.nnx.BatchNorm` finds a variance of 0 here.

    References:
        Ioffe & Szegedy 2015, Algorithms 1 and 2.
    """

    def __call__(self, x, use_running_average: bool | None = None, *, mask: jax.Array | None = None):
        """Normalizes x, and updates the running statistics in training; arguments as in Flax."""
        evaluate = self.use_running_average if use_running_average is None else use_running_average
        if evaluate is None or any_complex(x, self.dtype, self.param_dtype):
            return super().__call__(x, use_running_average, mask=mask)  # the first is an error that Flax words
        mean, var = self.mean[...], self.var[...]
        learned: Any = (None if v is None else v[...] for v in (self.scale, self.bias))
        x, _, _, *learned = self.promote_dtype((jnp.asarray(x), mean, var, *learned), dtype=self.dtype)
        axes = feature_axes(self.axis, x.ndim)
        shape = tuple(x.shape[a] for a in axes)
        if math.prod(shape) != mean.size:
            raise ValueError(
                f"num_features: got {mean.size}; expected {math.prod(shape)}, the size of x of shape {x.shape} along "
                f"axis {self.axis}; change num_features or axis."
            )
        moments = (mean.reshape(shape), var.reshape(shape))
        y, stats = normalized(
            BNParams(*(None if v is None else v.reshape(shape) for v in learned)),
            moments,
            x,
            train=not evaluate,
            axes=axes,
            eps=self.epsilon,
            dtype=canonicalize_dtype(x, *learned, dtype=self.dtype),
            mask=mask,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
        )
        if not evaluate:
            moved = lax.stop_gradient(blended(moments, stats, self.momentum))
            try:
                self.mean[...], self.var[...] = (v.reshape(mean.shape) for v in moved)
            except TraceContextError as error:
                _raise_when_run(error.with_traceback(None))  # which would hold on to what is traced
        return y


def _raise_when_run(error: Exception) -> None:
    """Leaves an error to the run of what is being traced: `jax.eval_shape` traces and does not run."""

    def fail():
        raise error

    io_callback(fail, None)


def replace(model: _Model) -> _Model:
    """Returns the model with every `flax.nnx.BatchNorm` in it exchanged for the door.

    The modules are new and the variables are those of ``model``, the same objects: parameters and statistics
    are shared with it, both ways, and so is what was shared within it. The state has the same structure, so
    that an `flax.nnx.Optimizer` made before, a checkpoint, or a split goes with either. A subclass of Flax's
    layer stays one of its class, and keeps what it adds; what it takes from Flax, inherited or by
    ``super().__call__``, is exchanged.

    Args:
        model: a module, or a container of modules; it stays as it is.

    Returns:
        A model of the same class and structure.

    Raises:
        ValueError: where there is no batch norm in it.

    Example:
        >>> from flax import nnx
        >>> import jbn.nnx
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs))
        >>> ours = jbn.nnx.replace(model)
        >>> isinstance(ours.layers[1], jbn.nnx.BatchNorm), ours.layers[1].scale is model.layers[1].scale
        (True, True)
    """
    model = nnx.clone(model, variables=False)
    layers = [node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.BatchNorm)]
    if not layers:
        raise ValueError(
            "model: got no flax.nnx.BatchNorm in it; expected at least one; linen layers are exchanged by "
            "jbn.linen.replace, and where there is none leave replace out."
        )
    for layer in layers:
        object.__setattr__(layer, "__class__", _exchanged(type(layer)))  # of the clone, which has no other owner
    return model


@cache
def _exchanged(layer_class: type) -> type:
    """The door, or for a subclass of Flax's layer one of its own that has the door between itself and Flax's."""
    if issubclass(layer_class, BatchNorm):
        return layer_class
    if layer_class is nnx.BatchNorm:
        return BatchNorm
    body: dict[str, Any] = {name: getattr(layer_class, name) for name in ("__module__", "__qualname__", "__doc__")}
    body["__reduce__"] = lambda self: (_empty, (layer_class,), self.__getstate__())  # to be found by pickle
    return type(layer_class.__name__, (layer_class, BatchNorm), body)


def _empty(layer_class: type) -> Any:
    return object.__new__(_exchanged(layer_class))

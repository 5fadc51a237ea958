"""The door to Flax linen: its own BatchNorm with the numbers of jbn, and a way into models that one cannot edit."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jbn._doors import any_complex, blended, feature_axes, missing, normalized
from jbn._pytrees import BNParams

try:
    import flax.linen as nn
    from flax.linen.dtypes import canonicalize_dtype
except ModuleNotFoundError as error:
    raise missing("linen", "flax", "flax") from error

__all__ = ["BatchNorm", "replace"]


class BatchNorm(nn.BatchNorm):
    """`flax.linen.BatchNorm` with the numbers of jbn: y = scale·(x−μ)/√(σ²+ε) + bias.

    A subclass of Flax's, which differs in its call alone: arguments, variables and checkpoints are Flax's,
    and so are its conventions. In training μ and σ² (biased) are the moments of x over all axes but ``axis``,
    and ``batch_stats`` move to d·running + (1−d)·batch, without debiasing, unless the module is being
    initialized; else they are ``batch_stats``. y takes the dtype that x, scale and bias promote to, or
    ``dtype``. A mask is anything that broadcasts against x.

    What is jbn's: σ² is exact at any mean, whatever ``use_fast_variance`` says, and computed in float32 or
    float64, whatever ``force_float32_reductions`` says (which keeps its say over the dtype of new
    ``batch_stats``). Under ``axis_name`` unequal masks and shards are pooled by their counts, and
    ``axis_index_groups`` work under every transformation. Masked-out values that are not finite harm neither
    y nor a gradient. ``batch_stats`` keep their dtype, in a ``scan`` with 64 bit too, and a channel that saw
    nothing, or nothing finite, keeps its statistics. What is Flax's own code: the call where x, ``dtype`` or
    ``param_dtype`` is complex.

    Attributes:
        use_running_average: whether to normalize with ``batch_stats``; here or in the call.
        axis: the feature axis, or axes.
        momentum: d, the share of the running statistics that is kept.
        epsilon: ε.
        dtype: of y; None to promote.
        param_dtype: of scale and bias.
        use_bias: whether there is a bias.
        use_scale: whether there is a scale.
        bias_init: initializer of the bias.
        scale_init: initializer of the scale.
        axis_name: name, or names, of mapped axes over which statistics are synchronized.
        axis_index_groups: lists of indices along ``axis_name``, each synchronized by itself.
        use_fast_variance: accepted, and of no effect.
        force_float32_reductions: False to create ``batch_stats`` in ``param_dtype``, not in float32.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jbn.linen import BatchNorm
        >>> x = 1e4 + jnp.array([[-1.0], [1.0]])
        >>> layer = BatchNorm(use_running_average=False, momentum=0.0)
        >>> variables = layer.init(jax.random.key(0), x)
        >>> y, updates = layer.apply(variables, x, mutable=["batch_stats"])
        >>> updates["batch_stats"]
        {'mean': Array([10000.], dtype=float32), 'var': Array([1.], dtype=float32)}
        >>> y.round(3)
        Array([[-1.],
               [ 1.]], dtype=float32)

    `flax.linen.BatchNorm` finds a variance of 0 here.

    References:
        Ioffe & Szegedy 2015, Algorithms 1 and 2.
    """

    @nn.compact
    def __call__(self, x, use_running_average: bool | None = None, *, mask: jax.Array | None = None):
        """Normalizes x, and updates ``batch_stats`` in training; arguments as in Flax."""
        return _call(self, super().__call__, x, use_running_average, mask=mask)


def _call(
    layer: nn.BatchNorm, stock: Callable[..., Any], x: Any, use_running_average: bool | None = None, *, mask: Any = None
) -> Any:
    """The call of the door, for any of Flax's layers; ``stock`` is Flax's own for what is complex."""
    if any_complex(x, layer.dtype, layer.param_dtype):
        return stock(x, use_running_average, mask=mask)
    train = not nn.merge_param("use_running_average", layer.use_running_average, use_running_average)
    x = jnp.asarray(x)
    axes = feature_axes(layer.axis, x.ndim)
    shape = tuple(x.shape[a] for a in axes)
    running_dtype = jnp.float32 if layer.force_float32_reductions else layer.param_dtype
    mean = layer.variable("batch_stats", "mean", jnp.zeros, shape, running_dtype)
    var = layer.variable("batch_stats", "var", jnp.ones, shape, running_dtype)
    scale = layer.param("scale", layer.scale_init, shape, layer.param_dtype) if layer.use_scale else None
    bias = layer.param("bias", layer.bias_init, shape, layer.param_dtype) if layer.use_bias else None
    y, stats = normalized(
        BNParams(scale, bias),
        (mean.value, var.value),
        x,
        train=train,
        axes=axes,
        eps=layer.epsilon,
        dtype=canonicalize_dtype(x, scale, bias, dtype=layer.dtype),
        mask=mask,
        axis_name=None if layer.is_initializing() else layer.axis_name,
        axis_index_groups=layer.axis_index_groups,
    )
    if train and not layer.is_initializing():
        mean.value, var.value = blended((mean.value, var.value), stats, layer.momentum)
    return y


_STOCK, _DOOR = (inspect.unwrap(layer.__call__) for layer in (nn.BatchNorm, BatchNorm))

# A part of the key of JAX's caches: a function that was traced outside is traced anew inside, and the other way round.
_exchanging = jax.make_user_context(default_value=False)

_found_in: set[type] = set()  # the outermost modules in which a batch norm was ever called and exchanged


@contextlib.contextmanager
def replace() -> Iterator[None]:
    """Exchanges every `flax.linen.BatchNorm` called inside for the door: a context, and a decorator of functions.

    A linen module is made anew at each call, so that it is the call which is exchanged: ``replace()(model.apply)``
    is ``model.apply`` with the numbers of `jbn.linen.BatchNorm`, and takes the same variables. Variables,
    optimizer states and checkpoints need nothing done to them. A subclass of Flax's layer keeps what it adds;
    what it takes from Flax by ``super().__call__`` is exchanged.

    Decorate the function that is traced, and the exchange is part of it for good: ``jax.jit(replace()(model.apply))``.
    A ``with replace():`` holds for the calls inside it, not for a model that is made inside it and called later;
    what ``jax.jit`` has traced outside is traced once more inside.

    Args:
        Takes none.

    Returns:
        A context manager that is a decorator, too.

    Raises:
        ValueError: at its end, where no batch norm was called.

    Example:
        >>> import flax.linen as nn
        >>> import jax, jax.numpy as jnp
        >>> from jbn import linen
        >>> model = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=False)])
        >>> apply = jax.jit(linen.replace()(model.apply), static_argnames="mutable")
        >>> x = jnp.ones((4, 2))
        >>> variables = model.init(jax.random.key(0), x)
        >>> y, updates = apply(variables, x, mutable="batch_stats")
        >>> updates["batch_stats"]["layers_1"]["var"]
        Array([0.99, 0.99, 0.99], dtype=float32)
    """
    running: list[type] = []
    called: set[type] = set()
    found = False

    def exchange(proceed, args, kwargs, context):
        nonlocal found
        running.append(type(context.module))
        called.add(running[0])
        try:
            method = inspect.unwrap(context.orig_method.func)
            if method in (_STOCK, _DOOR):
                found = True
                _found_in.add(running[0])
            return _call(context.module, proceed, *args, **kwargs) if method is _STOCK else proceed(*args, **kwargs)
        finally:
            running.pop()

    with _exchanging(True), nn.intercept_methods(exchange):
        yield
    # What jit traced inside an earlier replace() it runs again without calling a module: that is not nothing.
    if not found and _found_in.isdisjoint(called or _found_in):
        raise ValueError(
            "replace: got no call of flax.linen.BatchNorm inside; expected at least one; "
            "decorate the function that calls the model: jax.jit(replace()(model.apply))."
        )

"""The door to Haiku: its batch norm with jbn's arithmetic, under the same name and with the same variables.

    from jbn.haiku import BatchNorm  # in the place of haiku.BatchNorm

`replace` exchanges the layers of a model whose source cannot be edited.
"""

import math
from contextlib import ContextDecorator, ExitStack
from functools import partial

import jax.numpy as jnp
from jax import lax

from jbn._core import apply_unchecked
from jbn._doors import as_floating, exchanged, missing, reading, undebiased, usable_channels, widened
from jbn._normalize import Layout
from jbn._pytrees import BNParams, BNState

try:
    import haiku as hk
except ModuleNotFoundError:
    raise missing("haiku", "dm-haiku", "haiku") from None

__all__ = ["BatchNorm", "replace"]


class BatchNorm(hk.BatchNorm):
    """Haiku's `BatchNorm`, computed by jbn: y = scale·(x−μ)/√(σ²+ε) + offset.

    In training, and with ``test_local_stats``, μ and σ² are the exact moments over ``axis``, the axes to *reduce*,
    by default all but that of the channels; with ``cross_replica_axis`` over those named axes as well. Otherwise
    they are the averages of the training batches, d being ``decay_rate``:
    hidden ← d·hidden + (1−d)·batch and average = hidden/(1−dᵗ).

    Constructor, call, the parameters ``scale`` and ``offset``, and the state ``mean_ema`` and ``var_ema`` with
    ``hidden``, ``average`` and ``counter`` are those of `haiku.BatchNorm`: names, shapes (reduced axes kept, with
    size 1) and dtypes, those of x when the module was initialized. The stored variance is the biased one.

    What is jbn's: the variance at a large mean, also over devices with shares of their own means; a channel in
    which a batch is not finite leaves its averages alone; the state keeps its dtype whatever that of x; half
    precision is rounded once; ``cross_replica_axis_index_groups`` under `jax.vmap` and `jax.shard_map` too; integer
    x in evaluation. A ``scale`` or ``offset`` that differs within a channel is applied to jbn's x̂. What is Haiku's
    own code: complex x.

    Attributes:
        create_scale, create_offset, eps, scale_init, offset_init, axis, cross_replica_axis,
            cross_replica_axis_index_groups: as they were passed.
        channel_index: the axis of the channels, from ``data_format``.
        mean_ema, var_ema: the modules that own the averages.

    Raises:
        NameError: ``cross_replica_axis`` is not bound where a batch is measured.
        ValueError: ``scale`` or ``offset`` passed to a layer with its own; an evaluation before there are averages;
            groups that do not hold each index once.

    Example:
        >>> import haiku as hk, jax.numpy as jnp
        >>> from jbn.haiku import BatchNorm
        >>> f = hk.transform_with_state(lambda x, train: BatchNorm(True, True, 0.9)(x, train))
        >>> x = jnp.array([[100001.0], [100003.0]])
        >>> params, state = f.init(None, x, True)
        >>> y, state = f.apply(params, state, None, x, True)
        >>> y.round(3)
        Array([[-1.],
               [ 1.]], dtype=float32)

    References:
        Ioffe & Szegedy 2015, Algorithms 1 and 2; Kingma & Ba 2015, section 3, for the division by 1−dᵗ.
    """

    def __call__(self, inputs, is_training, test_local_stats=False, scale=None, offset=None):
        for name, created, given in (("scale", self.create_scale, scale), ("offset", self.create_offset, offset)):
            if created and given is not None:
                raise ValueError(
                    f"{name}: got an array at call time with create_{name}=True; expected None; "
                    f"leave it out, or construct the layer with create_{name}=False."
                )
        if jnp.iscomplexobj(inputs):
            return super().__call__(inputs, is_training, test_local_stats, scale, offset)
        inputs, x = jnp.asarray(inputs), as_floating(inputs)
        axis = self.axis
        if axis is None:
            axis = [a for a in range(x.ndim) if a != self.channel_index % x.ndim]
        shape = [1 if a in axis else n for a, n in enumerate(x.shape)]
        if self.create_scale:
            scale = hk.get_parameter("scale", shape, inputs.dtype, self.scale_init)
        if self.create_offset:
            offset = hk.get_parameter("offset", shape, inputs.dtype, self.offset_init)
        reduce_axes = tuple(sorted({a % x.ndim for a in axis}))
        y, stats = _normalized(self, x, reduce_axes, is_training or test_local_stats, scale, offset)
        if is_training:
            shape = [1 if a in reduce_axes else n for a, n in enumerate(x.shape)]
            usable = usable_channels(stats, stats.mean.dtype).reshape(shape)
            for ema, batch in ((self.mean_ema, stats.mean), (self.var_ema, stats.var)):
                batch = batch.reshape(shape)
                with hk.intercept_methods(partial(_average, batch, usable, x.dtype)):
                    ema(batch)
        return y


def _normalized(layer, x, reduce_axes, train, scale, offset):
    """(y, stats), by the moments of x or by the averages."""
    affine = [v for v in (scale, offset) if v is not None]
    dtype = jnp.result_type(x, *affine)
    in_kernel = all(_is_per_channel(jnp.shape(v), x.shape, reduce_axes) for v in affine)
    # jbn wants an axis of features: where all are reduced, or x is a number, there is one of size 1 in front.
    lone = len(reduce_axes) == x.ndim
    features = [n for a, n in enumerate(x.shape) if a not in reduce_axes] or [1]
    names = layer.cross_replica_axis or ()
    names = (names,) if isinstance(names, str) else tuple(names)
    layout = Layout(
        reduce_axes=tuple(a + lone for a in reduce_axes),
        names=names,
        groups=_groups(layer.cross_replica_axis_index_groups, names) if train else None,
        train=train,
        dtype=dtype if in_kernel else jnp.promote_types(dtype, jnp.float32),
    )
    params = BNParams(None, None)
    if in_kernel:
        params = BNParams(*(v if v is None else _per_channel(v, features, reduce_axes, x) for v in (scale, offset)))
    x = widened(x[None] if lone else x, dtype)
    if train:
        y, stats = apply_unchecked(layout, params, None, x, layer.eps)
    else:
        mean, var = (ema.average.reshape(features) for ema in (layer.mean_ema, layer.var_ema))
        y, stats = apply_unchecked(layout, params, BNState(mean, var, jnp.ones(features, jnp.int32)), x, layer.eps)
    y = y[0] if lone else y
    if not in_kernel:
        y = ((y if scale is None else y * scale) + (0 if offset is None else offset)).astype(dtype)
    return y, stats


def _aligned(shape, ndim):
    return (1,) * (ndim - len(shape)) + tuple(shape)


def _is_per_channel(shape, x_shape, reduce_axes):
    """Whether a scale or offset broadcasts to x, and is one number for all of a channel."""
    if len(shape) > len(x_shape):
        return False
    sizes = enumerate(zip(_aligned(shape, len(x_shape)), x_shape, strict=True))
    return all(n == 1 or (a not in reduce_axes and n == size) for a, (n, size) in sizes)


def _per_channel(v, features, reduce_axes, x):
    kept = [n for a, n in enumerate(_aligned(jnp.shape(v), x.ndim)) if a not in reduce_axes]
    return jnp.broadcast_to(jnp.reshape(v, kept or [1]), features)


def _groups(groups, names):
    """Groups of indices along the named axes, as a tuple of tuples."""
    if groups is None or not names:
        return None
    size = math.prod(lax.axis_size(name) for name in names)
    canonical = tuple(tuple(int(i) for i in group) for group in groups)
    if sorted(i for group in canonical for i in group) != list(range(size)):
        raise ValueError(
            f"cross_replica_axis_index_groups: got {groups}; expected each of the indices 0 to {size - 1} in one "
            f"group; name every index along {names} once."
        )
    return canonical


def _average(batch, usable, dtype, next_method, args, kwargs, context):
    """Stands in for the call of an `hk.ExponentialMovingAverage`, among its variables."""
    if context.method_name != "__call__":
        return next_method(*args, **kwargs)
    # As in Haiku, the average of a module that is initialized is that of the batch it is initialized with.
    first = jnp.where(usable, batch, 0)
    average = hk.get_state("average", batch.shape, dtype, init=lambda shape, dtype: first.astype(dtype))
    hidden = hk.get_state("hidden", batch.shape, dtype, init=jnp.zeros)
    count = hk.get_state("counter", (), jnp.int32, init=jnp.zeros)
    usable = usable & jnp.isfinite(batch.astype(hidden.dtype))
    decay = jnp.asarray(context.module.decay, jnp.promote_types(hidden.dtype, jnp.float32))
    hidden, count = undebiased(hidden, count, batch, usable, decay)
    read = reading(hidden, count, decay).astype(average.dtype)
    hk.set_state("counter", count)
    hk.set_state("hidden", hidden)
    hk.set_state("average", jnp.where(usable, read, average))
    return average


def replace() -> "_Replacement":
    """Exchanges every Haiku batch norm made inside it for jbn's: a context manager, and a decorator of functions.

    The form that cannot go wrong decorates the function that is transformed, or what `haiku.transform` returned,
    *before* it is compiled: ``apply = jax.jit(replace()(model.apply))``. A function that `jax.jit` has traced
    before is not exchanged by a call inside ``with replace():``, and one that was traced inside stays exchanged.

    Modules keep their names, parameters and state; a subclass of `haiku.BatchNorm` stays one, with jbn's layer
    below it; policies of `haiku.mixed_precision` for `haiku.BatchNorm` hold.

    Args:
        None: layers are found as they are made.

    Returns:
        The context manager. Decorating, ``replace()(function)``, it gives a function of the same signature.

    Raises:
        ValueError: on leaving it for the first time, where no batch norm was made inside.

    Example:
        >>> import haiku as hk, jax, jax.numpy as jnp, jbn.haiku
        >>> model = hk.transform_with_state(lambda x: hk.BatchNorm(True, True, 0.9)(x, is_training=True))
        >>> x = jnp.array([[100001.0], [100003.0]])
        >>> params, state = model.init(None, x)
        >>> apply = jax.jit(jbn.haiku.replace()(model.apply))
        >>> y, state = apply(params, state, None, x)
        >>> y.round(3)
        Array([[-1.],
               [ 1.]], dtype=float32)
    """
    return _Replacement()


class _Replacement(ContextDecorator):
    def __init__(self):
        self._found = False
        self._open = []

    def __enter__(self):
        stack = ExitStack()
        stack.enter_context(hk.intercept_methods(self._exchange))
        self._open.append(stack)
        return self

    def __exit__(self, kind, error, trace):
        self._open.pop().close()
        if kind is None and not self._found:
            raise ValueError(
                "replace: got no haiku.BatchNorm made inside; expected at least one; a function compiled before is not "
                "traced again: put jax.jit outside, as in jax.jit(replace()(model.apply))."
            )

    def _exchange(self, next_method, args, kwargs, context):
        result = next_method(*args, **kwargs)
        layer = context.module
        if context.method_name == "__init__" and isinstance(layer, hk.BatchNorm):
            self._found = True
            if not isinstance(layer, BatchNorm):
                layer.__class__ = exchanged(type(layer), BatchNorm)  # type: ignore[arg-type]
        return result

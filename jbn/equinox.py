"""The door to Equinox: its batch norm with jbn's arithmetic, under the same name and with the same variables.

    from jbn.equinox import BatchNorm  # in the place of equinox.nn.BatchNorm

`replace` exchanges the layers of a model whose source cannot be edited.
"""

from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp

from jbn._core import apply_unchecked
from jbn._doors import as_floating, exchanged, missing, reading, undebiased, usable_channels, widened
from jbn._normalize import Layout
from jbn._pytrees import BNParams, BNState

try:
    import equinox as eqx
except ModuleNotFoundError:
    raise missing("equinox", "equinox", "equinox") from None

__all__ = ["BatchNorm", "replace"]


class BatchNorm(eqx.nn.BatchNorm):
    """Equinox's `BatchNorm`, computed by jbn: y = weight·(x−μ)/√(σ²+ε) + bias for each channel.

    x is (C, …), one example under `jax.vmap` with ``axis_name``. In training μ and σ² are the exact moments over
    the named axes and all axes of x but the first. What runs along, m being ``momentum``:

    - mode "batch": hidden ← m·hidden + (1−m)·batch, with which inference normalizes, divided by 1−mᵗ;
    - mode "ema": running ← m·running + (1−m)·batch, the first batch copied. Training batches too are normalized
      with the running statistics, and gradients flow through the batch's share in them.

    Constructor, call, fields, dtypes and `equinox.nn.State` are those of `equinox.nn.BatchNorm`, so that a file of
    `equinox.tree_serialise_leaves` loads into either. What is stored means what Equinox makes of it: the biased
    variance, and in mode "batch" a start at (0, 1) that leaks into the variance which is read first.

    What is jbn's: the variance at a large mean; a channel in which a batch is not finite leaves what is read of the
    running statistics alone; the state keeps its dtype whatever that of x, also in mode "ema"; half precision is
    rounded once; the buffers of mode "ema" start at 0, not as uninitialised memory. What is Equinox's own code:
    complex x.

    Attributes:
        weight: (C,) γ, or None without ``channelwise_affine``.
        bias: (C,) β, or None.
        ema_first_time_index, ema_state_index: in mode "ema" where `equinox.nn.State` holds whether a batch is still
            to come, and (mean, var), each (C,).
        batch_counter, batch_state_index: in mode "batch" where it holds t, and the hidden (mean, var).
        axis_name: name, or names, of the `jax.vmap` or `jax.pmap` axes over which the statistics are taken.
        inference: whether to normalize with the running statistics; `equinox.nn.inference_mode` switches it.
        input_size, eps, channelwise_affine, momentum, mode: as they were passed.

    Raises:
        NameError: ``axis_name`` is not bound in training.
        ValueError: the first axis of x is not that of the statistics.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp
        >>> from jbn.equinox import BatchNorm
        >>> layer, state = eqx.nn.make_with_state(BatchNorm)(1, "batch", mode="batch")
        >>> x = jnp.array([[100001.0], [100003.0]])
        >>> y, state = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)
        >>> y.round(3)
        Array([[-1.],
               [ 1.]], dtype=float32)

    References:
        Ioffe & Szegedy 2015, Algorithms 1 and 2; Kingma & Ba 2015, section 3, for the division by 1−mᵗ.
    """

    @wraps(eqx.nn.BatchNorm.__init__)  # type: ignore[misc]
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        index = self.ema_state_index
        if index is not None:  # made by jnp.empty, which from JAX 0.11 on is whatever the memory held
            self.ema_state_index = eqx.nn.StateIndex(jax.tree.map(jnp.zeros_like, index.init))

    @jax.named_scope("eqx.nn.BatchNorm")
    def __call__(self, x, state, *, key=None, inference=None):
        if jnp.iscomplexobj(x) or jnp.iscomplexobj(self.weight):
            return super().__call__(x, state, key=key, inference=inference)
        inference = self.inference if inference is None else inference
        index = self.ema_state_index if self.mode == "ema" else self.batch_state_index
        mean, var = state.get(index)
        given, x = jnp.asarray(x).dtype, as_floating(x)
        if x.shape[:1] != mean.shape:
            raise ValueError(
                f"x: got shape {x.shape}; expected ({mean.shape[0]}, …), channels first and no batch axis; "
                f"map over the batch with jax.vmap(layer, axis_name={self.axis_name!r}, in_axes=(0, None))."
            )
        if self.mode == "batch" and not inference:
            y, stats = self._normalized(x, x.dtype)
            usable, count = usable_channels(stats, mean.dtype), state.get(self.batch_counter)
            mean, _ = undebiased(mean, count, stats.mean, usable, self.momentum)
            var, count = undebiased(var, count, stats.var, usable, self.momentum)
            return y, state.set(self.batch_counter, count).set(index, (mean, var))
        if self.mode == "batch":
            count = state.get(self.batch_counter)
            mean, var = (reading(v, count, self.momentum).astype(v.dtype) for v in (mean, var))
        elif not inference:
            _, stats = self._normalized(x, x.dtype)
            usable, first = usable_channels(stats, mean.dtype), state.get(self.ema_first_time_index)
            kept, m = (mean, var), self.momentum
            mean, var = (
                jnp.where(first, batch.astype(old.dtype), (1 - m) * batch.astype(old.dtype) + m * old)
                for batch, old in zip(stats[:2], kept, strict=True)
            )
            # One flag serves all channels: it falls with the first batch that all of them could use.
            state = state.set(self.ema_first_time_index, first & ~jnp.all(usable))
            moved = tuple(jnp.where(usable, new, old) for new, old in zip((mean, var), kept, strict=True))
            state = state.set(index, moved)
        return self._normalized(x, given if inference else x.dtype, (mean, var))[0], state

    def _normalized(self, x, given, running=None):
        """(y, stats), by the moments of x, ``given`` in that dtype, or by (mean, var)."""
        params = BNParams(self.weight, self.bias)
        dtype = jnp.result_type(given, *jax.tree.leaves((params, running)))
        names = tuple(self.axis_name) if isinstance(self.axis_name, (list, tuple)) else (self.axis_name,)
        layout = Layout(tuple(range(1, x.ndim)), names, train=running is None, dtype=dtype)
        x = widened(x, dtype)
        if running is None:
            return apply_unchecked(layout, params, None, x, self.eps)
        mean, var = running
        return apply_unchecked(layout, params, BNState(mean, var, jnp.ones(mean.shape, jnp.int32)), x, self.eps)


def replace(model: Any) -> Any:
    """Exchanges every Equinox batch norm in a model for jbn's.

    Fields are carried over, the `equinox.nn.StateIndex` in them included, so that a `equinox.nn.State` made before
    stays valid. An object that stands at two places stays one; a subclass stays one, with jbn's layer below it.

    Args:
        model: any pytree with batch norms in it: a model, the pair of `equinox.nn.make_with_state`, or a model
            together with its optimizer's state, whose moments have the structure of the model.

    Returns:
        The same pytree, with `jbn.equinox.BatchNorm` wherever `equinox.nn.BatchNorm` was, and the same arrays.

    Raises:
        ValueError: there is no batch norm in it.

    Example:
        >>> import equinox as eqx, jax, jbn.equinox
        >>> make = lambda: eqx.nn.Sequential([eqx.nn.BatchNorm(2, "batch", mode="batch")])
        >>> model, state = eqx.nn.make_with_state(make)()
        >>> model = jbn.equinox.replace(model)
        >>> type(model[0])
        <class 'jbn.equinox.BatchNorm'>
        >>> step = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        >>> y, state = step(jax.numpy.eye(2), state)

    What it cannot see: a layer in a static field, or closed over by a function.
    """
    done: dict[int, BatchNorm] = {}

    def exchange(node):
        if not isinstance(node, eqx.nn.BatchNorm):
            return node
        if id(node) not in done:
            done[id(node)] = node if isinstance(node, BatchNorm) else _copied(node)
        return done[id(node)]

    exchanged_model = jax.tree.map(exchange, model, is_leaf=lambda node: isinstance(node, eqx.nn.BatchNorm))
    if not done:
        raise ValueError(
            f"model: got {type(model).__name__} without a batch norm; expected equinox.nn.BatchNorm in it; "
            f"pass the model itself, with its layers in fields that are not static."
        )
    return exchanged_model


def _copied(layer: eqx.nn.BatchNorm) -> Any:
    """The same fields in an object of the other class, none of them made anew."""
    cls = BatchNorm if type(layer) is eqx.nn.BatchNorm else exchanged(type(layer), BatchNorm)
    copy = object.__new__(cls)
    for name, value in vars(layer).items():
        object.__setattr__(copy, name, value)
    return copy

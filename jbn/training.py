"""One training step for any network of pure functions and any optax optimizer. Knows no model."""

from collections.abc import Callable
from itertools import accumulate as running_sums
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jbn import _checks, _checks_axes, _checks_layer
from jbn._collectives import as_device_share, axis_total, mean_gradient
from jbn._core import bn_update_stats
from jbn._pool import Moments, as_stats, bn_merge_stats, pool_over_devices
from jbn._pytrees import BNStats
from jbn._shardings import cut, filled_like, laid_out_like

__all__ = ["TrainState", "make_train_step"]


class TrainState(NamedTuple):
    """All that training carries from step to step.

    Attributes:
        params: what is learned, any pytree of floating-point arrays.
        bn_state: the running statistics, a pytree with a `BNState` for each batch norm.
        opt_state: what ``optimizer.init(params)`` made.
        step: () int32, how many steps were made, skipped ones included; saturates, never wraps.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from jbn.networks import mlp
        >>> from jbn.training import TrainState
        >>> optimizer = optax.adam(1e-3)
        >>> params, bn_state = mlp((4, 8, 3)).init(jax.random.key(0))
        >>> train_state = TrainState(params, bn_state, optimizer.init(params), jnp.zeros((), jnp.int32))
        >>> train_state.step
        Array(0, dtype=int32)
    """

    params: Any
    bn_state: Any
    opt_state: Any
    step: jax.Array  # () int32


def make_train_step(
    apply: Callable[..., tuple[Any, Any]],
    loss_fn: Callable[[Any, Any], jax.Array],
    optimizer: optax.GradientTransformation,
    *,
    momentum: Any = 0.9,
    accumulate: int = 1,
    axis_name: Any = None,
    sync_stats: bool = True,
    skip_nonfinite: bool = True,
) -> Callable[[TrainState, tuple[Any, Any]], tuple[TrainState, dict[str, jax.Array]]]:
    """Makes a pure ``step(train_state, (x, y)) -> (train_state, metrics)``, for you to jit.

    One step: the gradient of ``loss_fn(outputs, y)``, one update by the optimizer, and one of the running
    statistics with what the batch showed.

    Args:
        apply: ``apply(params, bn_state, x, train=True) -> (outputs, stats)``, as `Network.apply`.
        loss_fn: ``loss_fn(outputs, y)``, a scalar mean over the examples.
        optimizer: any optax optimizer; those that look at the loss (`optax.lbfgs`,
            `optax.contrib.reduce_on_plateau`) are given it.
        momentum: share of the running statistics that is kept, as in `bn_update_stats`.
        accumulate: k, to split the batch into k consecutive microbatches that are run one after the
            other: memory for one of them, the mean of their gradients and losses, and their statistics
            merged exactly into one update. Each is normalized by itself, as in a batch of its size.
        axis_name: name, or names, of the mesh axes of an enclosing `jax.shard_map` over which the batch
            is split (same size on each device) and the train state replicated. It is passed on to
            ``apply``; train state and metrics come out replicated, equal to a step on the whole batch.
        sync_stats: False to let each device normalize with the statistics of its own share, by not passing
            ``axis_name`` on to ``apply``: ghost batches, one a device. What the devices showed is merged
            before it updates the running statistics, so that those are replicated too.
        skip_nonfinite: whether a step whose loss or any gradient is not finite changes nothing but
            ``step``: no parameter, running statistic or optimizer state.

    Returns:
        ``step``. Its metrics are ``"loss"``, () at least float32, and ``"skipped"``, () bool. The train
        state keeps its structure, shapes and dtypes: donate it, or carry it through `jax.lax.scan`.

    Raises:
        TypeError: an argument of another type.
        ValueError: ``accumulate`` below 1 or, in the step, not dividing the batch; ``momentum`` outside
            [0, 1]; a loss that is no scalar; an unbound ``axis_name``.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from jbn.networks import mlp
        >>> from jbn.training import TrainState, make_train_step
        >>> init, apply = mlp((2, 16, 2))
        >>> def loss_fn(outputs, y):
        ...     return optax.softmax_cross_entropy_with_integer_labels(outputs, y).mean()
        >>> optimizer = optax.adam(1e-2)
        >>> step = jax.jit(make_train_step(apply, loss_fn, optimizer), donate_argnums=0)
        >>> params, bn_state = init(jax.random.key(0))
        >>> train_state = TrainState(params, bn_state, optimizer.init(params), jnp.zeros((), jnp.int32))
        >>> x = jax.random.normal(jax.random.key(1), (64, 2))
        >>> y = (x[:, 0] * x[:, 1] > 0).astype(jnp.int32)
        >>> for _ in range(100):
        ...     train_state, metrics = step(train_state, (x, y))
        >>> bool(metrics["loss"] < 0.3), int(train_state.step)
        (True, 100)

        The batch split over all devices, each of which normalizes with its own share:

        >>> from jax.sharding import NamedSharding, PartitionSpec as P
        >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
        >>> local = make_train_step(apply, loss_fn, optimizer, axis_name="data", sync_stats=False)
        >>> sharded = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()))
        >>> batch = jax.device_put((x, y), NamedSharding(mesh, P("data")))
        >>> train_state, metrics = sharded(train_state, batch)
        >>> int(train_state.step), bool(metrics["skipped"])
        (101, False)

    Keras: ``model.fit``. Flax: a ``TrainState`` with ``batch_stats`` added by hand.

    References:
        Ioffe & Szegedy 2015, Algorithm 2.
    """
    apply, loss_fn = _checks.as_function("apply", apply), _checks.as_function("loss_fn", loss_fn)
    momentum = _checks_layer.as_momentum(momentum)
    names = _checks_axes.as_names(axis_name)
    parts = _checks.as_size("accumulate", accumulate, "pass accumulate=1 for no splitting")
    guarded = _checks.as_flag("skip_nonfinite", skip_nonfinite)
    optimizer = optax.with_extra_args_support(optimizer)
    synced = _checks.as_flag("sync_stats", sync_stats)
    options = {"train": True, "axis_name": axis_name} if names and synced else {"train": True}

    def objective(params, bn_state, batch):
        x, y = batch
        outputs, stats = apply(params, bn_state, x, **options)
        loss = _as_loss(loss_fn(outputs, y))
        # Before it is differentiated: a mean of gradients would come on top of JAX's own sum of them.
        return (lax.pmean(loss, names) if names else loss), stats

    def step(train_state, batch):
        params, bn_state, opt_state, count = train_state
        if names:
            axis_total(names)  # an unbound name is an error that says so
        micro = _split(batch, parts)
        loss, stats, grads = _mean_gradient(objective, params, bn_state, micro, parts, names)
        if not synced:
            stats = _merged(stats, names)

        def value_fn(params):
            losses = lax.map(lambda one: objective(params, bn_state, one)[0], micro)
            return jnp.mean(losses)

        with jax.numpy_dtype_promotion("standard"):  # optax relies on it, whatever the caller's setting
            updates, new_opt_state = optimizer.update(
                grads, opt_state, params, value=loss, grad=grads, value_fn=value_fn
            )
            new_params = optax.apply_updates(params, updates)
        new = (new_params, bn_update_stats(bn_state, stats, momentum=momentum), new_opt_state)
        skipped = jnp.zeros((), bool)
        if guarded:
            finite = [jnp.all(jnp.isfinite(leaf)) for leaf in (loss, *jax.tree.leaves(grads))]
            skipped = ~jnp.all(jnp.stack(finite))
            new = jax.tree.map(lambda old, now: jnp.where(skipped, old, laid_out_like(now, old)), train_state[:3], new)
        return TrainState(*new, optax.safe_increment(count)), {"loss": loss, "skipped": skipped}

    return step


def _mean_gradient(objective, params, bn_state, micro, parts, names):
    """Mean loss, merged statistics and mean gradient over the microbatches, stacked along axis 0.

    Parameters are marked as each device's own, so that devices add up their gradients once a step and
    not once for each microbatch and parameter.
    """
    own = jax.tree.map(lambda p: as_device_share(p, names), params)
    gradient = jax.value_and_grad(objective, has_aux=True)

    def one(total, batch):
        (loss, stats), grads = gradient(own, bn_state, batch)
        return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grads), (loss, stats)

    if parts == 1:
        (loss, stats), grads = gradient(own, bn_state, jax.tree.map(lambda leaf: leaf[0], micro))
    else:
        zeros = jax.tree.map(lambda p: filled_like(p, 0, _checks.compute_dtype(p.dtype)), own)
        total, (losses, stacked) = lax.scan(one, zeros, micro)
        loss, stats = jnp.mean(losses), bn_merge_stats(stacked, axis=0)
        grads = jax.tree.map(lambda t, p: (t / parts).astype(p.dtype), total, params)
    return loss, stats, mean_gradient(grads, names)


def _merged(stats, names):
    """The statistics of all devices, pooled: all layers together, so that they travel once a step."""
    layers, structure = jax.tree.flatten(stats, is_leaf=lambda node: isinstance(node, BNStats))
    if not layers or not names:
        return stats
    mean, var, count = (jnp.concatenate([jnp.ravel(v) for v in field]) for field in zip(*layers, strict=True))
    pooled = as_stats(pool_over_devices(Moments(mean, jnp.zeros_like(mean), var, count.astype(mean.dtype)), names))
    ends = list(running_sums(layer.mean.size for layer in layers))
    columns = (jnp.split(field, ends[:-1]) for field in pooled)
    merged = [
        jax.tree.map(lambda old, new: new.reshape(old.shape).astype(old.dtype), layer, BNStats(*parts))
        for layer, *parts in zip(layers, *columns, strict=True)
    ]
    return jax.tree.unflatten(structure, merged)


def _split(batch: Any, parts: int) -> Any:
    """The batch as ``parts`` consecutive microbatches, stacked along a new axis 0."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise TypeError(f"batch: got {_checks.kind_of(batch)}; expected (x, y); call step(train_state, (x, y)).")
    batch = jax.tree.map(jnp.asarray, tuple(batch))
    shapes = [leaf.shape for leaf in jax.tree.leaves(batch)]
    if len({shape[:1] for shape in shapes}) != 1 or () in shapes:
        raise ValueError(f"batch: got shapes {shapes}; expected one leading size, the examples; give each x its y.")
    size = shapes[0][0]
    if size % parts:
        raise ValueError(
            f"accumulate: got {parts} for a batch of {size}; expected a divisor of the batch size; "
            f"use another accumulate, or leave the last, short batch out."
        )
    return jax.tree.map(lambda leaf: cut(leaf, parts, size // parts, between=False), batch)


def _as_loss(loss: Any) -> jax.Array:
    """A real scalar, at least float32."""
    loss = jnp.asarray(loss)
    if loss.shape != () or not jnp.issubdtype(loss.dtype, jnp.floating):
        raise ValueError(
            f"loss_fn: got shape {loss.shape} and dtype {loss.dtype}; expected a real scalar, the mean over "
            f"the examples; end it with .mean()."
        )
    return loss.astype(_checks.compute_dtype(loss.dtype))

"""The three functions: check, measure, normalize. No arithmetic beyond composition."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jbn import _checks, _checks_axes, _checks_layer
from jbn._collectives import as_device_share, axis_total, on_mesh
from jbn._measure import measure
from jbn._normalize import Layout, normalize
from jbn._pool import Moments, as_stats, pool, pool_over_devices, unbiased_factor
from jbn._pytrees import BNParams, BNState, BNStats, map_nodes
from jbn._shardings import filled_like, laid_out_like, spec_of, with_spec
from jbn._variants import in_blocks, out_of_blocks, renormalized

__all__ = ["apply_unchecked", "bn_apply", "bn_init", "bn_update_stats"]


def bn_init(
    num_features: int | tuple[int, ...],
    *,
    use_gamma: bool = True,
    use_beta: bool = True,
    dtype: Any = jnp.float32,
) -> tuple[BNParams, BNState]:
    """Makes the parameters and running statistics of one batch norm: γ = 1, β = 0, mean = 0, var = 1.

    Args:
        num_features: C, the size of the feature axis, or a tuple of sizes for several.
        use_gamma: whether there is a γ; without it ``params.gamma`` is None and γ = 1.
        use_beta: whether there is a β; without it ``params.beta`` is None and β = 0.
        dtype: of γ and β. Running statistics are float32 (float64 when ``dtype`` is float64): in
            bfloat16 they would stall.

    Returns:
        ``(params, state)``: `BNParams` and `BNState` with fields of shape (C,).

    Raises:
        TypeError: ``num_features`` not integers, a flag not a bool, ``dtype`` not floating point.
        ValueError: a size below 1.

    Example:
        >>> from jbn import bn_init
        >>> params, state = bn_init(2)
        >>> params
        BNParams(gamma=Array([1., 1.], dtype=float32), beta=Array([0., 0.], dtype=float32))
        >>> bn_init((3, 4), use_beta=False)[0].gamma.shape
        (3, 4)

    Flax infers the size at the first call; here it is given, as in PyTorch.

    References:
        Ioffe & Szegedy 2015, section 3.
    """
    shape = _checks_layer.as_feature_shape(num_features)
    dtype = _checks.as_float_dtype(dtype)
    gamma = jnp.ones(shape, dtype) if _checks.as_flag("use_gamma", use_gamma) else None
    beta = jnp.zeros(shape, dtype) if _checks.as_flag("use_beta", use_beta) else None
    running = _checks.compute_dtype(dtype)
    state = BNState(jnp.zeros(shape, running), jnp.ones(shape, running), jnp.zeros(shape, jnp.int32))
    return BNParams(gamma, beta), state


def bn_apply(
    params: BNParams,
    state: BNState | None,
    x: Any,
    *,
    train: bool,
    axis: int | tuple[int, ...] = -1,
    eps: Any = 1e-5,
    mask: Any = None,
    axis_name: Any = None,
    axis_index_groups: Any = None,
    ghost_size: int | None = None,
    renorm: Any = None,
) -> tuple[jax.Array, BNStats]:
    """Normalizes x for each channel: z̃ = γ·(z−μ)/√(σ²+ε) + β.

    In training μ and σ² (biased) are the moments of x over all axes that are not in ``axis``, and
    gradients flow through them; in evaluation they are the running statistics in ``state``.

    Args:
        params: γ and β, each (C,) or None.
        state: running statistics, (C,); may be None in training. There the running mean may be the shift
            of the sums (on a TPU it is), so that y depends on it in its last bits, never in its value: far
            from the mean of x, as in a loop that never updates its state, it costs a second read of x.
        x: floating-point array, with the feature sizes C along ``axis``.
        train: whether to normalize with the statistics of x (static).
        axis: the feature axis, or axes; -1 for NHWC and (N, C), 1 for NCHW (static).
        eps: ε > 0, added to the variance; may be traced.
        mask: bool, of x's rank, each size 1 or x's; True where a value counts. Masked-out values move
            neither the statistics nor, where the loss ignores their outputs, any gradient.
        axis_name: name, or names, of axes of `jax.shard_map`, `jax.vmap` or `jax.pmap` over which the
            statistics are synchronized: pooled by count, exact for unequal shards and masks (static).
            Where all devices are known to sum about one shift (on a CPU, and on a TPU with a state that a
            checked `jax.shard_map` has replicated) one all-reduce of 2·C numbers does it; elsewhere one
            all-gather of their moments up to 16 shards, above that two all-reduces.
        axis_index_groups: tuple of tuples of indices along ``axis_name``, each index in one of them;
            statistics are synchronized within each group (static).
        ghost_size: g, to normalize the leading axis in blocks of g examples; the returned statistics
            are those of the whole batch, over all devices with ``axis_name`` (static).
        renorm: (r_max, d_max), the limits of batch renormalization against ``state``: r_max ≥ 1,
            d_max ≥ 0, both may be traced or infinite; (1, 0) is plain batch norm.

    Returns:
        ``(y, stats)``. y has x's shape and dtype. ``stats`` are the `BNStats` used, in float32
        (float64 for float64 x), for `bn_update_stats`; in evaluation their count is 0, so that the
        update changes nothing. Statistics, γ and β are computed in that dtype, whatever x is.
        An empty batch or mask gives count 0, mean 0, var 0.

    Raises:
        TypeError: x not floating point, mask not bool, ``params`` or ``state`` of another type, a
            traced static argument.
        ValueError: shapes that do not fit, ``axis`` out of range, ``eps`` ≤ 0, one value per channel
            in training, an unbound ``axis_name``, groups that are no partition of its indices, a
            ``ghost_size`` that does not divide the batch, limits out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from jbn import bn_apply, bn_init, bn_update_stats
        >>> params, state = bn_init(1)
        >>> x = jnp.array([[1.0], [3.0]])
        >>> y, stats = bn_apply(params, state, x, train=True)
        >>> y.round(3)
        Array([[-1.],
               [ 1.]], dtype=float32)
        >>> state = bn_update_stats(state, stats)
        >>> bn_apply(params, state, x, train=False)[0].round(3)  # unbiased variance: 2, not 1
        Array([[-0.707],
               [ 0.707]], dtype=float32)

    Flax: ``scale, bias, epsilon, use_running_average=not train``, and ``axis`` the same. PyTorch: the
    feature axis is 1. Keras: ε is 1e-3 there. All three use E[x²]−μ² or two passes; this is exact at
    any offset.

    References:
        Ioffe & Szegedy 2015, Algorithms 1 and 2; Chan, Golub & LeVeque 1983 for the pooling; Hoffer,
        Hubara & Soudry 2017 for ghost batches; Ioffe 2017 for renormalization.
    """
    train = _checks.as_flag("train", train)
    x = _checks.as_array("x", x)
    axes = _checks_axes.as_axes(axis, x.ndim)
    shape = tuple(x.shape[a] for a in axes)
    params = _checks_layer.as_params(params, shape)
    eps = _checks_layer.as_eps(eps)
    if mask is not None:
        mask = _checks_layer.as_mask(mask, x.shape)
    names = _checks_axes.as_names(axis_name)
    groups = _checks_axes.as_groups(axis_index_groups, names)
    ghost_size = _checks_axes.as_ghost_size(ghost_size, axes)
    limits = _checks_layer.as_renorm(renorm)
    if state is not None or not train or limits is not None:
        state = _checks_layer.as_state(state, shape)
    layout = Layout(tuple(a for a in range(x.ndim) if a not in axes), names, groups, train, ghost_size)
    if train:
        devices = axis_total(names)
        _checks_axes.check_groups(groups, devices)
        _checks_axes.refuse_one_value(x.shape, layout.reduce_axes, devices, groups, ghost_size)
    return apply_unchecked(layout, params, state, x, eps, mask, limits)


def apply_unchecked(
    layout: Layout,
    params: BNParams,
    state: BNState | None,
    x: jax.Array,
    eps: Any,
    mask: jax.Array | None = None,
    limits: tuple[Any, Any] | None = None,
) -> tuple[jax.Array, BNStats]:
    """`bn_apply` below its checks, for the doors to other frameworks, whose conventions are wider.

    The layout says what is static. x is a real floating-point array; a mask is bool and broadcasts against x;
    y takes ``layout.dtype``, whatever that is; γ and β take any shape that broadcasts against (C,); one value
    per channel has variance 0 and output β.
    """
    if mask is not None and mask.ndim < x.ndim:
        mask = lax.expand_dims(mask, range(x.ndim - mask.ndim))
    if not layout.train:
        layout = layout._replace(names=(), groups=None, ghost_size=None)
        return _bn_evaluate(layout, params, state, x, eps, mask)
    return _bn_train(layout, params, state, as_device_share(x, layout.names), eps, mask, limits)


# Compiled as one piece also where the caller does not: an eager call is one dispatch. In a trace it stays a call, so
# that layers of one shape are differentiated and lowered once, and a profile shows it; XLA inlines it before it fuses.
_compiled = partial(jax.jit, static_argnums=0)


@_compiled
def _bn_train(whole, params, state, x, eps, mask, limits):
    x, mask, params, state = _aligned(whole, x, mask, params, state)
    equal, like = mask is None, x
    layout = whole
    if whole.ghost_size is not None:
        layout, x, mask = in_blocks(whole, x, mask)
    moments, layout = _measured(layout, x, mask, None if state is None else state.mean)
    gamma, beta, eps = _as_vectors(params, eps, moments)
    if limits is not None:
        gamma, beta = renormalized(gamma, beta, eps, moments, state, limits)
    y, moments = normalize(layout, x, gamma, beta, eps, moments, mask)
    if whole.ghost_size is not None:
        y = out_of_blocks(y, like)
        moments = pool_over_devices(pool(moments), whole.names, whole.groups, equal)
    return y, as_stats(moments)


def _measured(layout, x, mask, known):
    """The moments to normalize x with, and the layout for it.

    Where `jax.jit` or `jax.checkpoint` stands between `jax.vmap` and `jax.grad`, JAX runs the rule of a
    `jax.custom_jvp` when the name that vmap bound is gone (seen with 0.10 and 0.12;
    tests/collectives/test_named_axes.py notices). So over the members of a vmap the rule sees the values of one member
    alone. The moments are pooled behind it, by code that JAX differentiates itself, and x is normalized with what
    comes out as in evaluation, with gradients to mean and variance.
    """
    dtype = _checks.compute_dtype(x.dtype)
    if on_mesh(layout.names):
        over = {"names": layout.names, "groups": layout.groups}
        return measure(x, mask, layout.reduce_axes, dtype, known=known, **over), layout
    alone = layout._replace(names=(), groups=None)
    own = measure(x, mask, layout.reduce_axes, dtype, known=known)
    one, nothing = filled_like(own.mean_hi, 1), filled_like(own.mean_hi, 0)
    _, own = normalize(alone, x, one, nothing, jnp.ones((), dtype), own, mask)  # for the derivative of its moments
    pooled = pool_over_devices(own, layout.names, layout.groups, equal=mask is None)
    return pooled, alone._replace(train=False)


@_compiled
def _bn_evaluate(layout, params, state, x, eps, mask):
    x, mask, params, state = _aligned(layout, x, mask, params, state)
    dtype = _checks.compute_dtype(x.dtype)
    mean, var = state.mean.astype(dtype), state.var.astype(dtype)
    nothing = filled_like(mean, 0)
    moments = Moments(mean, nothing, var, nothing)
    gamma, beta, eps = _as_vectors(params, eps, moments)
    y, moments = normalize(layout, x, gamma, beta, eps, moments, mask)
    return y, as_stats(moments)


def _aligned(layout, x, mask, params, state):
    """The same arrays, all split over an explicit mesh as x·γ is: x's feature axes as γ's where x itself is whole.

    Resharding here keeps everything behind it free of shardings that differ, and its transpose gives each cotangent
    the layout of its primal.
    """
    features = [a for a in range(x.ndim) if a not in layout.reduce_axes]
    spec = list(spec_of(x))
    if params.gamma is not None and jnp.ndim(params.gamma) == len(features):
        for a, entry in zip(features, spec_of(params.gamma), strict=True):
            spec[a] = entry if spec[a] is None else spec[a]
    x = with_spec(x, spec, mesh_of=params.gamma)
    if mask is not None:
        mask = with_spec(mask, [spec[a] if mask.shape[a] == n else None for a, n in enumerate(x.shape)], mesh_of=x)
    shape = tuple(x.shape[a] for a in features)

    def along_features(v):
        v = jnp.asarray(v)
        return with_spec(v, [spec[a] for a in features], mesh_of=x) if v.shape == shape else v

    return x, mask, *jax.tree.map(along_features, (params, state))


def _as_vectors(params, eps, moments):
    """γ (1 where it was left out), β (0 where it was), and ε, in the shape, dtype and layout of the moments."""
    like = moments.mean_hi
    gamma, beta = (
        filled_like(like, default)
        if value is None
        else laid_out_like(jnp.broadcast_to(jnp.asarray(value, like.dtype), like.shape), like)
        for value, default in zip(params, (1, 0), strict=True)
    )
    return gamma, beta, jnp.asarray(eps, like.dtype)


def bn_update_stats(state: Any, stats: Any, *, momentum: Any = 0.9, debias: bool = True, unbiased: bool = True) -> Any:
    """Moves running statistics towards those of a batch: running ← (1−w)·running + w·batch.

    With ``debias`` w = (1−d)/(1−dᵗ) at update t and momentum d: the first update copies the batch, so
    that the (0, 1) start never leaks in; without it w = 1−d. Each channel stands alone: one whose
    stats have count 0, or hold a NaN or an infinity, stays exactly as it was.

    Args:
        state: a `BNState` with fields of shape (C,), or any pytree (dict, list, tuple, NamedTuple,
            dataclass) with one for each batch norm; a None takes any stats and stays None.
        stats: `BNStats` from `bn_apply` at the same places.
        momentum: d in [0, 1], the share of the running statistic that is kept; may be traced. 0.0
            replaces; 1.0 with ``debias`` is w = 1/t, the plain average of all batches.
        debias: whether w corrects for the start, as Adam does (static).
        unbiased: whether the running variance takes σ²·m/(m−1) (static); m ≤ 1 keeps σ².

    Returns:
        The new state, same structure, shapes and dtypes. It carries no gradient.

    Raises:
        TypeError: not a `BNState`, or not `BNStats`; a flag or momentum of another type.
        ValueError: structures or shapes that do not match (with the path), momentum outside [0, 1].

    Example:
        >>> import jax.numpy as jnp
        >>> from jbn import BNStats, bn_init, bn_update_stats
        >>> _, state = bn_init(1)
        >>> stats = BNStats(jnp.array([5.0]), jnp.array([3.0]), jnp.array([4.0]))
        >>> bn_update_stats(state, stats)
        BNState(mean=Array([5.], dtype=float32), var=Array([4.], dtype=float32), count=Array([1], dtype=int32))

    Flax and Keras: momentum is the share kept, ``debias=False``, ``unbiased=False``. PyTorch: its
    momentum is 1−d, ``debias=False``, ``unbiased=True``; its ``momentum=None`` is 1.0 with debias.

    References:
        Ioffe & Szegedy 2015, Algorithm 2; Kingma & Ba 2015, section 3, for the correction.
    """
    left = 1 - _checks_layer.as_momentum(momentum)  # in full precision, where it is a Python number
    options = (_checks.as_flag("debias", debias), _checks.as_flag("unbiased", unbiased))

    def update(node, seen, *, path):
        _checks_layer.check_matching(path, node, seen)
        return _bn_update(options, node, seen, left)

    return map_nodes(update, (("state", BNState), ("stats", BNStats)), state, stats)


@_compiled
def _bn_update(options, state, stats, left):
    debias, unbiased = options
    spec = spec_of(state.mean)
    running_mean, running_var, updates = (with_spec(v, spec, mesh_of=stats.mean) for v in state)
    mean, var, m = (laid_out_like(v, running_mean) for v in lax.stop_gradient(stats))
    m = m.astype(var.dtype)
    if unbiased:
        var = var * unbiased_factor(m)
    mean, var = mean.astype(running_mean.dtype), var.astype(running_var.dtype)
    usable = (m > 0) & jnp.isfinite(m) & jnp.isfinite(mean) & jnp.isfinite(var)
    count = jnp.minimum(updates, jnp.iinfo(updates.dtype).max - 1) + 1
    w = _share_of_batch(count, jnp.asarray(left, mean.dtype), debias)

    def moved(running, batch):
        return lax.stop_gradient(lax.select(w == 1, batch, (1 - w) * running + w * batch))

    new = (moved(running_mean, mean), moved(running_var, var), count)
    kept = (lax.select(usable, now, old) for now, old in zip(new, (running_mean, running_var, updates), strict=True))
    return BNState(*(laid_out_like(v, old) for v, old in zip(kept, state, strict=True)))


def _share_of_batch(count, left, debias):
    """w of the batch at update t = ``count`` and momentum 1 − ``left``, keeping its digits for momentum close to 1."""
    if not debias:
        return left
    t = count.astype(left.dtype)
    w = left / -jnp.expm1(t * jnp.log1p(-left))
    return jnp.where(t == 1, 1, jnp.where(left == 0, 1 / t, w))

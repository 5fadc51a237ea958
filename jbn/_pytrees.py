"""The three pytrees of batch normalization, and the one walk over a network of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.export

from jbn._checks import check_array, kind_of

__all__ = ["BNParams", "BNState", "BNStats", "bn_labels", "map_nodes", "weight_decay_mask"]

# Last keys of leaves that weight decay leaves alone, beside everything in a BNParams.
_UNDECAYED = frozenset({"b", "bias", "gamma", "beta", "scale", "offset"})


class BNParams(NamedTuple):
    """What batch normalization learns: z̃ = γ·z_norm + β.

    C stands for the shape of the feature axes: ``(C,)`` for one, ``(C1, C2)`` for two.

    Attributes:
        gamma: (C,) scale γ, float; None when left out (then γ = 1).
        beta: (C,) shift β, float; None when left out (then β = 0).

    Example:
        >>> from jbn import bn_init
        >>> params, state = bn_init(3)
        >>> params.gamma.shape, params.beta.shape
        ((3,), (3,))

    References:
        Ioffe & Szegedy 2015, "Batch Normalization", Algorithm 1.
    """

    gamma: jax.Array | None  # (C,)
    beta: jax.Array | None  # (C,)


class BNState(NamedTuple):
    """Running statistics, carried from step to step and used at test time.

    Attributes:
        mean: (C,) running mean, float32 (float64 for float64 params).
        var: (C,) running variance, same dtype.
        count: (C,) int32, how many updates each channel has absorbed; saturates, never wraps.

    Example:
        >>> from jbn import bn_init
        >>> _, state = bn_init(3)
        >>> state.mean, state.var, state.count
        (Array([0., 0., 0.], dtype=float32), Array([1., 1., 1.], dtype=float32), Array([0, 0, 0], dtype=int32))

    References:
        Ioffe & Szegedy 2015, Algorithm 2.
    """

    mean: jax.Array  # (C,) float32
    var: jax.Array  # (C,) float32
    count: jax.Array  # type: ignore[assignment]  # (C,) int32; it hides tuple.count


class BNStats(NamedTuple):
    """Moments of the values seen in each channel of one batch.

    Attributes:
        mean: (C,) mean μ, float32 (float64 for float64 inputs).
        var: (C,) biased variance σ² (divided by m), same dtype.
        count: (C,) float32, how many values were seen: the m of the papers; 0 = nothing.

    Example:
        >>> import jax.numpy as jnp
        >>> from jbn import bn_apply, bn_init
        >>> params, state = bn_init(2)
        >>> _, stats = bn_apply(params, state, jnp.array([[0., 1.], [2., 5.]]), train=True)
        >>> stats.mean, stats.var, stats.count
        (Array([1., 3.], dtype=float32), Array([1., 4.], dtype=float32), Array([2., 2.], dtype=float32))

    References:
        Ioffe & Szegedy 2015, Algorithm 1.
    """

    mean: jax.Array  # (C,) float32
    var: jax.Array  # (C,) float32
    count: jax.Array  # type: ignore[assignment]  # (C,) float32


for _node in (BNParams, BNState, BNStats):
    jax.export.register_namedtuple_serialization(_node, serialized_name=f"jbn.{_node.__name__}")


def map_nodes(fn: Callable[..., Any], expected: tuple[tuple[str, Any], ...], *trees: Any, path: str = "") -> Any:
    """Maps ``fn`` over the nodes of several trees at matching places.

    ``expected`` holds (argument name, node type) for each tree. A None in the first tree takes
    whatever stands there in the others and stays None. A mismatch is an error naming the path.
    """
    (lead_name, lead_type), lead = expected[0], trees[0]
    if lead is None:
        return None
    if isinstance(lead, lead_type):
        for (name, kind), node in zip(expected[1:], trees[1:], strict=True):
            if not isinstance(node, kind):
                # A wrong thing as the whole argument is a wrong type; inside trees it is a wrong structure.
                error = ValueError if path else TypeError
                hint = _pair_hint(node) or _structure_hint(lead_name)
                raise error(f"{name}{path}: got {_described(node)}; expected {kind.__name__}; {hint}.")
        for (name, kind), node in zip(expected, trees, strict=True):
            for field, value in zip(kind._fields, node, strict=True):
                check_array(f"{name}{path}.{field}", value, or_number=True)
        return fn(*trees, path=path)
    keys, children, treedef = _one_level(lead)
    pair = _pair_hint(lead)
    if keys is None or pair:
        hint = pair or _confusion(lead, lead_type)
        wanted = f"{lead_type.__name__}, or a pytree of them"
        raise TypeError(f"{lead_name}{path}: got {kind_of(lead)}; expected {wanted}; {hint}.")
    columns = [children]
    for (name, _), tree in zip(expected[1:], trees[1:], strict=True):
        other_keys, other_children, _ = _one_level(tree)
        if other_keys != keys or type(tree) is not type(lead):
            hint = _structure_hint(lead_name)
            raise ValueError(f"{name}{path}: got {_described(tree)}; expected {_outline(lead, keys)}; {hint}.")
        columns.append(other_children)
    rows = zip(keys, *columns, strict=True)
    return jax.tree.unflatten(treedef, [map_nodes(fn, expected, *row, path=path + key) for key, *row in rows])


def _one_level(tree: Any) -> tuple[list[str] | None, list[Any], Any]:
    """Keys, children and structure of one node; keys None where ``tree`` is a leaf."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda t: t is not tree)
    leaf: Any = jax.tree.structure(0)
    if treedef == leaf or isinstance(tree, (BNParams, BNState, BNStats)):
        return None, [], treedef
    return [jax.tree_util.keystr(path) for path, _ in flat], [child for _, child in flat], treedef


def _described(value: Any) -> str:
    keys, _, _ = _one_level(value)
    if value is None or keys is None or _pair_hint(value):
        return kind_of(value)
    return _outline(value, keys)


def _outline(tree: Any, keys: list[str]) -> str:
    shown = ", ".join(keys[:4]) + (", …" if len(keys) > 4 else "")
    return f"{type(tree).__name__} with {shown}" if keys else f"empty {type(tree).__name__}"


def _structure_hint(lead_name: str) -> str:
    return f"give it the structure of {lead_name}, with None where there is no batch norm"


def _pair_hint(value: Any) -> str:
    """What to do about a pair that was not unpacked; empty if it is none."""
    if isinstance(value, tuple) and len(value) == 2:
        if isinstance(value[0], BNParams):
            return "unpack the pair of bn_init: params, state = bn_init(...)"
        if isinstance(value[1], BNStats) and isinstance(value[0], jax.Array):
            return "unpack the pair of bn_apply: y, stats = bn_apply(...)"
    return ""


def _confusion(value: Any, wanted: type) -> str:
    """What to do about something else in the place of a node."""
    if isinstance(value, BNStats):
        return "stats are what a batch showed; the running statistics go first"
    if isinstance(value, BNParams):
        return "params hold gamma and beta; bn_init returns (params, state)"
    if wanted is BNStats:
        return "pass the stats that bn_apply returned"
    return "pass what bn_init or a network's init returned"


def weight_decay_mask(params: Any) -> Any:
    """Tells optax which parameters decay: weights do; γ, β and biases do not.

    By type and key, never by ndim, so stacked and vmapped parameters work.

    Args:
        params: any pytree of parameters.

    Returns:
        A pytree of bools of the same structure, for the ``mask=`` of optax's weight decay: False
        for everything in a `BNParams` and for leaves whose key is ``b``, ``bias``, ``gamma``,
        ``beta``, ``scale`` or ``offset``; True for the rest.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from jbn import bn_init, weight_decay_mask
        >>> params = {"W": jnp.ones((2, 3)), "b": jnp.zeros(3), "bn": bn_init(3)[0]}
        >>> weight_decay_mask(params)
        {'W': True, 'b': False, 'bn': BNParams(gamma=False, beta=False)}
        >>> optimizer = optax.adamw(1e-3, weight_decay=1e-4, mask=weight_decay_mask)

    Flax and Keras leave this to the user; PyTorch wants parameter groups.
    """

    def decays(path, leaf):
        if isinstance(leaf, BNParams):
            return jax.tree.map(lambda _: False, leaf)
        return not (path and _key_name(path[-1]) in _UNDECAYED)

    return jax.tree_util.tree_map_with_path(decays, params, is_leaf=_is_params)


def bn_labels(params: Any) -> Any:
    """Labels each parameter "bn" or "other", for `optax.multi_transform`.

    Args:
        params: any pytree of parameters.

    Returns:
        A pytree of strings of the same structure: "bn" for everything in a `BNParams`, else "other".

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from jbn import bn_init, bn_labels
        >>> bn_labels({"W": jnp.ones((2, 3)), "bn": bn_init(3, use_beta=False)[0]})
        {'W': 'other', 'bn': BNParams(gamma='bn', beta=None)}
        >>> optimizer = optax.multi_transform({"bn": optax.sgd(0.1), "other": optax.adam(1e-3)}, bn_labels)
    """

    def label(node):
        if isinstance(node, BNParams):
            return jax.tree.map(lambda _: "bn", node)
        return "other"

    return jax.tree.map(label, params, is_leaf=_is_params)


def _is_params(node: Any) -> bool:
    return isinstance(node, BNParams)


def _key_name(key: Any) -> Any:
    return getattr(key, "key", getattr(key, "name", None))

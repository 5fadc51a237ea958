"""A trained network without its batch norms: the same outputs from fewer operations."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jbn._checks_axes import as_axes
from jbn._core import bn_apply
from jbn._inference import bn_affine, bn_fold
from jbn.networks._mlp import mlp
from jbn.networks._network import Network
from jbn.networks._resnet import resnet

__all__ = ["fold"]

# What may be bound to `bn_apply` without being lost: ε and the axis are read here, the network itself gives the next
# three at each call, and the last three do nothing in evaluation.
_KNOWN = ("eps", "axis", "train", "axis_name", "mask", "axis_index_groups", "ghost_size", "renorm")


def fold(make: Callable[..., Network], params: Any, state: Any) -> tuple[Network, Any]:
    """Folds all batch norms of a trained network into the layers next to them, for inference.

    A norm after W and b becomes part of them, as in `bn_fold`. One after the activation (``norm="a"``)
    becomes part of the next layer: with scale and shift as in `bn_affine`,

        (g(z)·scale + shift)·W + b = g(z)·(scale·W) + (shift·W + b)

    Args:
        make: what made the network: `mlp` or `resnet` with its arguments bound by `functools.partial`.
            Where the norms stand and their ε are read from there.
        params: the trained params.
        state: the running statistics.

    Returns:
        ``(network, params)``: the same `Network` made with ``norm=None``, and its params; each ``bn`` is
        None. Its ``apply`` takes None for a state. Outputs agree to rounding with those in evaluation.

    Raises:
        TypeError: ``make`` no partial of `mlp` or `resnet`, a ``bn`` that is not `bn_apply` or a partial of it.
        ValueError: params or state that are not those of the network, an option of ``bn`` that would be lost:
            one that is not known, or another ``axis`` than the network's.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from functools import partial
        >>> from jbn.networks import fold, mlp
        >>> make = partial(mlp, (4, 8, 3))
        >>> network = make()
        >>> params, state = network.init(jax.random.key(0))  # and train
        >>> folded, folded_params = fold(make, params, state)
        >>> x = jnp.ones((2, 4))
        >>> y, _ = network.apply(params, state, x, train=False)
        >>> y_folded, _ = folded.apply(folded_params, None, x, train=False)
        >>> bool(jnp.allclose(y_folded, y, atol=1e-5))
        True

    PyTorch: ``torch.fx.experimental.optimization.fuse``, which finds the layers by tracing.

    References:
        Jacob et al. 2018, "Quantization and Training of Neural Networks", section 3.2.
    """
    keywords, rank = _bound_to(make)
    norm, eps = keywords.get("norm", "z"), _eps_of(keywords.get("bn", bn_apply), rank)
    own_params, own_state = jax.eval_shape(make().init, jax.random.key(0))
    _check_fit("params", params, own_params)
    _check_fit("state", state, own_state)
    plain = make(norm=None, zero_gamma=False) if "zero_gamma" in keywords else make(norm=None)
    if not jax.tree.leaves(own_state):
        return plain, params
    if norm == "a":
        return plain, _fold_forward(params, state, eps)
    return plain, _fold_back(params, state, eps)


def _fold_back(params: Any, state: Any, eps: Any) -> Any:
    """Each norm into its own layer, wherever in the tree that is."""
    if isinstance(params, Mapping):
        if "W" not in params:
            return {key: _fold_back(params[key], state[key], eps) for key in params}
        W, b = params["W"], params["b"]
        if params["bn"] is not None:
            W, b = bn_fold(params["bn"], state, W, b, eps=eps)
        return {"W": W, "b": b, "bn": None}
    return [_fold_back(*pair, eps) for pair in zip(params, state, strict=True)]


def _fold_forward(params: Any, state: Any, eps: Any) -> list[dict[str, Any]]:
    """Each norm of a list of dense layers into the layer after it; the last has none."""
    folded, norm = [], None
    for layer, running in zip(params, state, strict=True):
        W, b = layer["W"], layer["b"]
        if norm is not None:
            scale, shift = norm
            b = b + jnp.matmul(shift, W, precision=lax.Precision.HIGHEST).astype(b.dtype)
            W = (scale[:, None] * W).astype(W.dtype)
        folded.append({"W": W, "b": b, "bn": None})
        norm = None if layer["bn"] is None else bn_affine(layer["bn"], running, eps=eps)
    return folded


def _bound_to(make: Any) -> tuple[Mapping[str, Any], int]:
    """The keywords that made the network, and the rank of its inputs."""
    if isinstance(make, partial) and make.func in (mlp, resnet):
        return make.keywords, 2 if make.func is mlp else 4
    raise TypeError(
        f"make: got {_name_of(make)}; expected functools.partial of mlp or resnet; pass what made the network, "
        f"as in make = partial(mlp, (64, 128, 10)) and network = make()."
    )


def _eps_of(bn: Any, rank: int) -> Any:
    """The ε of evaluation, from a ``bn`` with no other option that does anything there; x has this rank."""
    if bn is bn_apply:
        return 1e-5
    if isinstance(bn, partial) and bn.func is bn_apply and not bn.args:
        unknown = [name for name in bn.keywords if name not in _KNOWN]
        if unknown:
            raise ValueError(
                f"bn: got keyword {unknown[0]}; expected {', '.join(_KNOWN)}; fold a norm that does more in "
                f"evaluation yourself, with bn_fold."
            )
        axis = bn.keywords.get("axis", -1)
        if as_axes(axis, rank) != (rank - 1,):
            raise ValueError(f"bn: got axis={axis!r}; expected axis=-1, that of the network's features; leave it out.")
        return bn.keywords.get("eps", 1e-5)
    raise TypeError(
        f"bn: got {_name_of(bn)}; expected bn_apply, or functools.partial of it with keywords; "
        f"fold the layers of another norm yourself, with bn_fold."
    )


def _name_of(function: Any) -> str:
    """What was given in the place of a function: its name, not the arrays that may be bound to it."""
    if isinstance(function, partial):
        bound = f" with {len(function.args)} positional" if function.args else ""
        return f"functools.partial of {_name_of(function.func)}{bound}"
    return getattr(function, "__name__", type(function).__name__)


def _check_fit(name: str, tree: Any, own: Any) -> None:
    """Raises unless the arrays of a tree have the places and shapes of the network's own."""
    (got, want) = (
        {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(t)}
        for t in (tree, own)
    )
    for path in [*want, *got]:
        if got.get(path) != want.get(path):
            shown = [f"shape {shapes[path]}" if path in shapes else "nothing" for shapes in (got, want)]
            raise ValueError(
                f"{name}{path}: got {shown[0]}; expected {shown[1]}; "
                f"pass make with the arguments of the network that was trained."
            )

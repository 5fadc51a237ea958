"""The places of a network of jbn's: the arrays and batch norms in its params, the running statistics in its state."""

from collections.abc import Mapping
from typing import Any

import jax

from jbn._checks import kind_of
from jbn._pytrees import BNParams, BNState
from jbn.convert._formats import as_names, shown

__all__ = ["Place", "as_places", "flat", "label", "norm_place", "refill"]

Place = tuple[str, str | None]  # in the params, and in the state if it was said


def flat(tree: Any) -> dict[str, Any]:
    """Arrays, batch norms and what is None, by path."""
    return {_name(path): node for path, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_node)[0]}


def refill(tree: Any, values: Mapping[str, Any]) -> Any:
    """The same tree with other values at some paths."""
    return jax.tree_util.tree_map_with_path(lambda path, node: values.get(_name(path), node), tree, is_leaf=_is_node)


def _is_node(node: Any) -> bool:
    return node is None or isinstance(node, (BNParams, BNState))


def _name(path: Any) -> str:
    return "/".join(jax.tree_util.keystr((key,), simple=True) for key in path)


def label(tree: str, name: str) -> str:
    """How a place is named in an error."""
    return f"{tree}[{name!r}]"


def as_places(theirs: str, value: Any) -> list[Place]:
    """Where one foreign array or module belongs: a path, or a list of them."""
    return [_as_place(theirs, member) for member in (value if isinstance(value, list) else [value])]


def _as_place(theirs: str, value: Any) -> Place:
    argument = f"mapping[{theirs!r}]"
    if not isinstance(value, Mapping):
        return "/".join(as_names(argument, value, "/")), None
    if set(value) != {"params", "state"}:
        raise ValueError(
            f"{argument}: got a dict of {shown(value)}; expected 'params' and 'state', the two places of a batch norm; "
            f"pass both."
        )
    params, state = ("/".join(as_names(argument, value[key], "/")) for key in ("params", "state"))
    return params, state


def norm_place(argument: str, params: Mapping[str, Any], state: Mapping[str, Any], place: Place) -> tuple[str, str]:
    """The two places of a batch norm: that in the state is the same, or one step up, unless it was said."""
    name, said = place
    if not isinstance(params.get(name), BNParams):
        got = f"a place that holds {kind_of(params[name])}" if name in params else "no such place"
        norms = [repr(key) for key, node in params.items() if isinstance(node, BNParams)]
        raise ValueError(
            f"{argument}: got {name!r}, {got}; expected a BNParams, one of {shown(norms) or 'none'}; "
            f"name its path in params."
        )
    candidates = [name, name.rpartition("/")[0]] if said is None else [said]
    for candidate in candidates:
        if isinstance(state.get(candidate), BNState):
            return name, candidate
    raise ValueError(
        f"{argument}: got no BNState at {' or '.join(map(repr, dict.fromkeys(candidates)))} in state; expected the "
        f"running statistics of {name!r}; name both places, {{'params': …, 'state': …}}."
    )

"""Whole networks: every array of a foreign tree at its place in ours, and the way back."""

from typing import Any

import numpy as np

from jbn.convert._arrays import as_weights
from jbn.convert._equinox import EQUINOX
from jbn.convert._fit import as_field, as_ours, as_theirs, put
from jbn.convert._flax import FLAX
from jbn.convert._formats import Format, found, shown
from jbn.convert._haiku import HAIKU
from jbn.convert._keras import KERAS
from jbn.convert._nnx import NNX
from jbn.convert._places import flat, label, refill
from jbn.convert._plan import Plan, planned
from jbn.convert._torch import TORCH

__all__ = ["dump_network", "load_network", "plan_network"]

_FORMATS = {form.name: form for form in (TORCH, FLAX, NNX, HAIKU, EQUINOX, KERAS)}


def plan_network(
    params: Any, state: Any, variables: Any, mapping: Any, *, format: str, skip: Any = (), layout: Any = None
) -> Plan:
    """What `load_network` would put where: a dry run that reads no values, and prints as a table.

    Args:
        params, state, variables, mapping, format, skip, layout: as for `load_network`; for arrays anything with a
            shape will do, as `jax.eval_shape` returns it.

    Returns:
        A `Plan`; ``print`` it.

    Raises:
        TypeError, ValueError: as `load_network`, but for what the values are.

    Example:
        >>> import jax, jbn
        >>> import numpy as np
        >>> network = jbn.networks.mlp((4, 3, 2))
        >>> params, state = jax.eval_shape(network.init, jax.random.key(0))
        >>> shapes = {"fc1.weight": (3, 4), "fc2.weight": (2, 3), "fc2.bias": (2,),
        ...           "bn.weight": (3,), "bn.bias": (3,), "bn.running_mean": (3,), "bn.running_var": (3,)}
        >>> state_dict = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
        >>> mapping = {"fc1": "0", "bn": "0/bn", "fc2": "1"}
        >>> print(jbn.convert.plan_network(params, state, state_dict, mapping, format="torch", skip=["0/b"]))
        theirs      ours           layout      shape
        fc1.weight  0/W            OI → IO     (4, 3)
        bn          0/bn, state 0  batch norm  (3,)
        fc2.weight  1/W            OI → IO     (3, 2)
        fc2.bias    1/b                        (2,)
        skipped: params['0/b']
    """
    form = _as_format(format)
    return planned(form, params, state, form.entries(variables), mapping, skip, layout)


def load_network(
    params: Any,
    state: Any,
    variables: Any,
    mapping: Any,
    *,
    format: str,
    skip: Any = (),
    layout: Any = None,
    momentum: Any = None,
    axis: Any = -1,
    count: Any = None,
) -> tuple[Any, Any]:
    """Fills the params and state of a network of jbn's with the arrays of another framework.

    ``mapping`` says which of theirs belongs where: its keys are names of modules or of single arrays in the foreign
    tree, its values are places in ours. A batch norm goes to a `BNParams` in ``params``, and its running statistics to
    the `BNState` at the same place of ``state`` or one step up, as `jbn.networks` have it. A dense or convolution layer
    goes to a dict with its kernel under ``W``, ``kernel``, ``w`` or ``weight`` and its bias under ``b`` or ``bias``;
    output features that stand first, as in PyTorch and Equinox, are moved to the end.

    Every array of theirs is taken and every place of ours is filled, or an error names it.

    Args:
        params, state: what the network's ``init`` returned, or the shapes of it by `jax.eval_shape`. ``state`` may be
            None where there is no batch norm.
        variables: the foreign tree, as the ``from_…`` function of the format takes it.
        mapping: a dict from names in the foreign tree, ``"layer1.0.conv1"``, to places in ours: a path
            ``"blocks/0/conv1"``, or a tuple of the names along it; a list of places for a layer that ours has more than
            once; a dict ``{"params": …, "state": …}`` for a batch norm whose state is elsewhere. Two names with one
            place, a layer that ours shares, have to hold the same.
        format: ``"torch"``, ``"flax"``, ``"nnx"``, ``"haiku"``, ``"equinox"`` or ``"keras"``.
        skip: names on either side to be left as they are, of arrays or of modules with all in them.
        layout: how our kernels lie, ``"HWIO"`` (outputs last; (in, out) for dense layers) or ``"OIHW"``. None takes it
            from the shapes where they allow one only, and asks otherwise; what Flax, Haiku and Keras have is then taken
            as it is. Also a dict by name, ``""`` for all others, whose values may be patterns, ``"IOHW -> HWIO"`` for a
            transposed convolution of PyTorch's, or two functions (to ours, to theirs) of a NumPy array.
        momentum: of batch norms that are stored as hidden averages without their momentum, as for `from_equinox`.
        axis: of the features in Haiku's batch norms, as for `from_haiku`.
        count: how many updates the running statistics hold, as for `from_torch`; one number.

    Returns:
        ``(params, state)`` of the same structure, shapes and dtypes, JAX arrays. What was skipped is as it was.

    Raises:
        TypeError: an array that holds no real floating-point numbers, ``mapping`` no dict.
        ValueError: a name or a place that is not there, is left over, or has another shape; numbers that the dtype of
            the place would round; γ or β on one side only; a kernel that fits in two ways; all that a ``from_…``
            function refuses.

    Example:
        >>> import jax, jbn
        >>> import numpy as np
        >>> network = jbn.networks.mlp((4, 3, 2))
        >>> params, state = network.init(jax.random.key(0))
        >>> shapes = {"fc1.weight": (3, 4), "fc2.weight": (2, 3), "fc2.bias": (2,),
        ...           "bn.weight": (3,), "bn.bias": (3,), "bn.running_mean": (3,), "bn.running_var": (3,)}
        >>> state_dict = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
        >>> mapping = {"fc1": "0", "bn": "0/bn", "fc2": "1"}
        >>> params, state = jbn.convert.load_network(
        ...     params, state, state_dict, mapping, format="torch", skip=["0/b"])
        >>> params[0]["W"].shape, state[0].mean
        ((4, 3), Array([1., 1., 1.], dtype=float32))
    """
    form = _as_format(format)
    entries = form.entries(variables)
    plan = planned(form, params, state, entries, mapping, skip, layout)
    ours, states = flat(params), flat(state)
    options = {"momentum": momentum, "axis": axis, "count": count}
    new: dict[str, Any] = {}
    running: dict[str, Any] = {}
    came_from: dict[tuple[str, str], str] = {}
    for move in plan.moves:
        if move.state is None:
            array = move.layout.to_ours(as_weights(*entries[move.theirs])).reshape(-1)
            if array.size != np.prod(move.shape):
                raise ValueError(
                    f"layout[{move.theirs!r}]: got {array.size} numbers from the function; expected shape "
                    f"{move.shape}; return that."
                )
            value = as_ours(entries[move.theirs].label, array.reshape(move.shape), ours[move.ours], "params", move.ours)
            put(new, came_from, "params", move.ours, value, move.theirs)
            continue
        loaded = form.read(found(form, entries, move.theirs), options)
        for tree, into, place, was, node in (
            ("params", new, move.ours, ours[move.ours], loaded[0]),
            ("state", running, move.state, states[move.state], loaded[1]),
        ):
            fields = [
                as_field(form, move.theirs, tree, place, field, value, old)
                for field, value, old in zip(was._fields, node, was, strict=True)
            ]
            put(into, came_from, tree, place, type(was)(*fields), move.theirs)
    return refill(params, new), refill(state, running)


def dump_network(
    params: Any,
    state: Any,
    mapping: Any,
    *,
    format: str,
    like: Any = None,
    skip: Any = (),
    layout: Any = None,
    momentum: Any = None,
    axis: Any = -1,
    dtype: Any = None,
) -> Any:
    """The converse of `load_network`: a foreign tree out of the params and state of a network of jbn's.

    Args:
        params, state: those of the network.
        mapping: the one that `load_network` takes. Of a layer that stands at several places of ours, all have to hold
            the same.
        format: as for `load_network`.
        like: a foreign tree to fill: what its framework's ``init`` or ``state_dict()`` returned, or the shapes of it.
            It decides names, shapes and dtypes, and everything in it has to be mapped. Haiku and Equinox need one,
            since the rank of Haiku's arrays and the fields of Equinox's modules are not in ours.
        skip: names on either side to be left as they are.
        layout: how our kernels lie. None, without ``like``, is ``"HWIO"``.
        momentum: of Haiku's batch norms, their ``decay_rate``, as for `to_haiku`.
        axis: of the features in Haiku's batch norms, as for `from_haiku`.
        dtype: of all floats; None takes that of ``like`` where no number is rounded by it, else each array's own.

    Returns:
        The foreign tree, of nested dicts with JAX arrays (NumPy for PyTorch and Keras); a list, as ``set_weights``
        wants it, where ``like`` is a list of Keras's; a pair for Haiku, and for Equinox (model, state).

    Raises:
        TypeError, ValueError: as `load_network`; and without ``like`` where it is needed.

    Example:
        >>> import jax, jbn
        >>> network = jbn.networks.mlp((4, 3, 2))
        >>> params, state = network.init(jax.random.key(0))
        >>> mapping = {"fc1": "0", "bn": "0/bn", "fc2": "1"}
        >>> state_dict = jbn.convert.dump_network(params, state, mapping, format="torch")
        >>> {name: array.shape for name, array in state_dict.items() if "fc" in name}
        {'fc1.weight': (3, 4), 'fc1.bias': (3,), 'fc2.weight': (2, 3), 'fc2.bias': (2,)}
    """
    form = _as_format(format)
    if like is None and form.needs_like:
        raise ValueError(
            f"like: got None; expected a foreign tree to fill, which {form.name} needs; pass what its init returned."
        )
    entries = None if like is None else form.entries(like)
    plan = planned(form, params, state, entries, mapping, skip, layout)
    ours, states = flat(params), flat(state)
    written: dict[str, Any] = {}
    came_from: dict[tuple[str, str], str] = {}
    for move in plan.moves:
        if move.state is None:
            array = move.layout.to_theirs(as_weights(label("params", move.ours), ours[move.ours]))
            leaves = {move.theirs: (array, label("params", move.ours))}
        else:
            pieces = {} if entries is None else found(form, entries, move.theirs)
            start = f"{move.theirs}{form.separator}" if move.theirs else ""
            layer = form.write(ours[move.ours], states[move.state], pieces, {"momentum": momentum, "axis": axis})
            for leaf in {*layer, *pieces} - {"momentum"}:
                if entries is not None and (leaf not in layer or leaf not in pieces) and leaf not in form.optional:
                    has, lacks = ("params", "like") if leaf in layer else ("like", "params")
                    raise ValueError(
                        f"{form.argument}: got {start + leaf} in {has} alone, and no such thing in {lacks}; expected γ "
                        f"and β on both sides or on neither; make both layers alike."
                    )
            leaves = {start + leaf: (array, label("params", move.ours)) for leaf, array in layer.items()}
        for name, (array, origin) in leaves.items():
            if entries is not None and name not in entries:
                continue  # optional, and not there
            value = as_theirs(form, name, array, None if entries is None else entries[name], origin, dtype)
            put(written, came_from, form.argument, name, value, move.ours)
    return form.build(written, like)


def _as_format(format: Any) -> Format:
    if not isinstance(format, str) or format not in _FORMATS:
        raise ValueError(f"format: got {format!r}; expected one of {shown(map(repr, _FORMATS))}; name theirs.")
    return _FORMATS[format]

"""What goes where between a foreign tree and a network of jbn's: every array on either side, or an error naming it."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from jbn._checks import kind_of
from jbn._pytrees import BNParams, BNState
from jbn.convert._arrays import shape_of
from jbn.convert._formats import Entry, Format, found, layers_of, shown
from jbn.convert._kernels import Layout, as_layout, layout_of
from jbn.convert._places import as_places, flat, label, norm_place

__all__ = ["Move", "Plan", "planned"]

_KERNELS, _BIASES = ("W", "kernel", "w", "weight"), ("b", "bias")


class Move(NamedTuple):
    """One array, or one batch norm."""

    theirs: str
    ours: str
    state: str | None  # where a batch norm has its running statistics; None for an array
    layout: Layout
    shape: tuple[int, ...]  # ours


class Plan(NamedTuple):
    """What goes where; printed, a table.

    Attributes:
        moves: a named tuple for each array and each batch norm, with the name in the foreign tree (``theirs``), the
            place in params (``ours``) and for a batch norm that in ``state``, the ``layout`` of a kernel there and
            here, and our ``shape``.
        skipped: names of both sides that were to be skipped.

    Example:
        >>> import numpy as np
        >>> from jbn.convert import plan_network
        >>> state_dict = {"fc.weight": np.ones((3, 2), "float32"), "fc.bias": np.zeros(3, "float32")}
        >>> params = {"W": np.ones((2, 3), "float32"), "b": np.zeros(3, "float32")}
        >>> print(plan_network(params, None, state_dict, {"fc": ""}, format="torch"))
        theirs     ours  layout   shape
        fc.weight  W     OI → IO  (2, 3)
        fc.bias    b              (3,)
    """

    moves: tuple[Move, ...]
    skipped: tuple[str, ...]

    def __repr__(self) -> str:
        rows = [("theirs", "ours", "layout", "shape")]
        for move in self.moves:
            ours = move.ours if move.state in (None, move.ours) else f"{move.ours}, state {move.state}"
            kind = str(move.layout) if move.state is None else "batch norm"
            rows.append((move.theirs, ours, kind, str(move.shape)))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, *(f"skipped: {name}" for name in self.skipped)])


def planned(
    form: Format,
    params: Any,
    state: Any,
    entries: dict[str, Entry] | None,
    mapping: Any,
    skip: Any,
    layout: Any,
) -> Plan:
    """The plan; ``entries`` of the foreign tree, or None where it is to be made."""
    if not isinstance(mapping, Mapping):
        raise TypeError(
            f"mapping: got {kind_of(mapping)}; expected a dict from their names to places in ours; "
            f"pass {{'conv1': 'stem', 'bn1': 'stem/bn'}}."
        )
    ours, states, answers = flat(params), flat(state), as_layout(layout)
    norms = None if entries is None else frozenset(layers_of(form, entries))
    names = {form.separator.join(map(str, key)) if isinstance(key, tuple) else key: key for key in mapping}
    moves: list[Move] = []
    for theirs, key in names.items():
        for place in as_places(theirs, mapping[key]):
            moves += _moves(form, ours, states, entries, norms, theirs, place, answers)
    _check_answers(form, answers, moves)
    skipped = _accounted(form, moves, entries, ours, states, _as_skip(skip))
    return Plan(tuple(moves), skipped)


def _moves(form, ours, states, entries, norms, theirs, place, answers):
    argument = f"mapping[{theirs!r}]"
    if isinstance(ours.get(place[0]), BNParams) if norms is None else theirs in norms:
        params_place, state_place = norm_place(argument, ours, states, place)
        if entries is not None:
            found(form, entries, theirs)
        return [Move(theirs, params_place, state_place, Layout(), _shape(states[state_place].mean))]
    name = place[0]
    if entries is not None and theirs in entries:
        return [_array(form, ours, entries, theirs, name, answers)]
    if entries is None and name in ours:
        return [_array(form, ours, entries, theirs, name, answers)]
    start, inside = (f"{p}{s}" if p else "" for p, s in ((theirs, form.separator), (name, "/")))
    moves = []
    for leaf, known in ((form.kernel, _KERNELS), (form.bias, _BIASES)):
        at = next((inside + key for key in known if inside + key in ours), None)
        if entries is not None and start + leaf in entries:
            moves.append(_array(form, ours, entries, start + leaf, inside + known[0] if at is None else at, answers))
        elif entries is None and at is not None and ours[at] is not None:
            moves.append(_array(form, ours, entries, start + leaf, at, answers))
    if not moves and entries is not None:
        near = [n for n in entries if n.startswith(start)] or list(entries)
        raise ValueError(
            f"{argument}: got a name with no array, batch norm, {form.kernel!r} or {form.bias!r} in {form.argument}; "
            f"expected one of theirs; there is {shown(map(repr, near))}."
        )
    if not moves:
        raise ValueError(f"{argument}: got {name!r}; expected a place in params; there is {shown(map(repr, ours))}.")
    return moves


def _array(form, ours, entries, theirs, name, answers):
    """The move of one array, kernel or not, to the place of that name."""
    where = label("params", name)
    target = ours.get(name)
    if shape_of(target) is None:
        got = "no such place" if name not in ours else f"a place that holds {kind_of(target)}"
        arrays = [repr(key) for key, node in ours.items() if shape_of(node) is not None]
        raise ValueError(
            f"mapping: got {theirs!r} for {where}, {got}; expected an array; map it to one of {shown(arrays)}, or name "
            f"it in skip."
        )
    shape = _shape(target)
    source = None if entries is None else _shape(entries[theirs].value)
    reached = form.argument if entries is None else entries[theirs].label
    module, _, leaf = theirs.rpartition(form.separator)
    answer = next((answers[key] for key in (theirs, module, "") if key in answers), None)
    if leaf == form.kernel and (len(shape) >= 2 or isinstance(answer, tuple)):
        layout = layout_of(answer, form.kernels_first, source, shape, (reached, where))
        return Move(theirs, name, None, layout, shape)
    # A bias may have axes of size 1 behind, as Equinox's convolutions have it.
    if source is not None and source != shape and source != (*shape, *(1,) * (len(source) - len(shape))):
        raise ValueError(f"{reached}: got shape {source}; expected {shape}, that of {where}; map the array elsewhere.")
    return Move(theirs, name, None, Layout(), shape)


def _shape(array):
    return shape_of(array) or ()


def _check_answers(form, answers, moves):
    names = {move.theirs for move in moves}
    for key in answers:
        if key and not any(name == key or name.startswith(key + form.separator) for name in names):
            raise ValueError(
                f"layout[{key!r}]: got a name that is not mapped; expected one of {shown(map(repr, sorted(names)))}; "
                f"correct it."
            )


def _as_skip(skip: Any) -> list[str]:
    if isinstance(skip, str) or not isinstance(skip, Iterable):
        raise TypeError(f"skip: got {kind_of(skip)}; expected names of arrays or modules in a tuple; pass ('head',).")
    return list(skip)


def _accounted(form, moves, entries, ours, states, skip):
    """The names that were skipped; one on either side that is in no move and not skipped is an error."""
    used = {move.theirs for move in moves}
    norms = tuple(f"{m.theirs}{form.separator}" if m.theirs else "" for m in moves if m.state is not None)
    theirs = [n for n in entries or () if n not in used and not any(n.startswith(norm) for norm in norms)]
    filled = {move.ours for move in moves} | {f"{move.ours}/" for move in moves if move.state is not None}
    params = [n for n, node in ours.items() if n not in filled and node is not None]
    running = {move.state for move in moves}
    stats = [n for n, node in states.items() if n not in running and isinstance(node, BNState)]
    skipped, hits = [], set()

    def left(names, separator, tree):
        for name in names:
            hit = [s for s in skip if name == s or name.startswith(s + separator)]
            hits.update(hit)
            if hit:
                skipped.append(entries[name].label if tree is None else label(tree, name))
            else:
                yield name

    for name in left(theirs, form.separator, None):
        raise ValueError(
            f"{entries[name].label}: got an array that mapping does not name; expected a place for each; "
            f"map {name!r}, or name it in skip."
        )
    for tree, names in (("params", params), ("state", stats)):
        for name in left(names, "/", tree):
            raise ValueError(
                f"{label(tree, name)}: got nothing for it from mapping; expected something for each place; "
                f"map a name to it, or name it in skip."
            )
    for name in skip:
        if name not in hits:
            raise ValueError(f"skip: got {name!r}, which is mapped or is not there; expected a leftover; drop it.")
    return tuple(skipped)

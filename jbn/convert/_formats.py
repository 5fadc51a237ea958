"""What a format of another framework is: a tree of named arrays, and what the ones of a batch norm are called."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from jbn._checks import kind_of

__all__ = [
    "Entry",
    "Format",
    "as_names",
    "found",
    "layer_of",
    "layers_of",
    "leaves",
    "named",
    "nested",
    "refilled",
    "shown",
    "slashed",
]


class Entry(NamedTuple):
    """One array of a foreign tree."""

    label: str  # how it is reached from the argument, for errors: state_dict['bn1.weight']
    value: Any


class Format(NamedTuple):
    """How a framework stores networks.

    Attributes:
        name: ``"torch"`` and the like.
        argument: what the foreign tree is called in errors.
        separator: between the names of nested modules.
        learned: the leaves that hold γ and β; either may be absent.
        running: the leaves that hold running statistics, in alternatives of which one has to be complete.
        optional: leaves of a batch norm that may be absent.
        kernel, bias: the leaves of a dense or convolution layer.
        kernels_first: whether kernels have their output features first, (out, in) and OIHW, or last.
        needs_like: whether a tree of it can be written only in the place of one that is there.
        entries: the foreign tree as a flat dict, from the name of each array to its entry.
        read: ``read(pieces, options)``, from the leaves of one batch norm to its (params, state).
        write: ``write(params, state, like, options)``, from a batch norm to a dict of its leaves; ``like`` holds the
            arrays that stand there now, or is empty.
        build: ``build(arrays, like)``, from a dict of names and arrays to a foreign tree, with all else as in the tree
            ``like``, unless that is None.
    """

    name: str
    argument: str
    separator: str
    learned: tuple[str, str]
    running: tuple[tuple[str, ...], ...]
    optional: tuple[str, ...]
    kernel: str
    bias: str
    kernels_first: bool
    needs_like: bool
    entries: Callable[[Any], dict[str, Entry]]
    read: Callable[[dict[str, Entry], dict[str, Any]], Any]
    write: Callable[[Any, Any, dict[str, Entry], dict[str, Any]], dict[str, Any]]
    build: Callable[[dict[str, Any], Any], Any]


def as_names(name: str, prefix: Any, separator: str) -> tuple[str, ...]:
    """A path as the names along it, from a string or a tuple; a separator at the end means nothing."""
    if isinstance(prefix, str):
        return tuple(part for part in prefix.split(separator) if part)
    if isinstance(prefix, (tuple, list)) and all(isinstance(part, (str, int)) for part in prefix):
        return tuple(str(part) for part in prefix)
    raise TypeError(
        f"{name}: got {kind_of(prefix)}; expected a path, as text or as a tuple of names; pass 'block{separator}bn'."
    )


def slashed(path: tuple[Any, ...]) -> str:
    """The names along a path as one, with slashes between them."""
    return "/".join(map(str, path))


def leaves(label: str, tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Entry]]:
    """(path, entry) of each array in nested mappings; what is None is not there."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from leaves(f"{label}[{key!r}]", value, (*path, key))
    elif tree is not None:
        yield path, Entry(label, tree)


def named(label: str, tree: Any, name_of: Callable[..., str]) -> dict[str, Entry]:
    """The arrays of nested mappings by name; two that have one name are an error."""
    entries: dict[str, Entry] = {}
    for path, entry in leaves(label, tree):
        name = name_of(path)
        if name in entries:
            raise ValueError(
                f"{entry.label}: got an array that has the name {name!r}, as {entries[name].label} has; expected one "
                f"of a name; leave one of them out."
            )
        entries[name] = entry
    return entries


def nested(flat: Mapping[tuple[Any, ...], Any]) -> dict[Any, Any]:
    """Nested dicts from paths and arrays."""
    tree: dict[Any, Any] = {}
    for path, value in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return tree


def refilled(tree: Any, arrays: Mapping[str, Any], name_of: Callable[..., str], path: tuple[Any, ...] = ()) -> Any:
    """Nested mappings as dicts, with other arrays at the names that are given; boxes stay around theirs."""
    if isinstance(tree, Mapping):
        return {key: refilled(value, arrays, name_of, (*path, key)) for key, value in tree.items()}
    name = name_of(path)
    if name not in arrays or tree is None:
        return tree
    return tree.replace_boxed(arrays[name]) if hasattr(tree, "replace_boxed") else arrays[name]


def shown(names: Any, most: int = 6) -> str:
    """Names in a row, not too many of them."""
    names = [str(name) for name in names]
    return ", ".join(names[:most]) + (f", … ({len(names)} in all)" if len(names) > most else "")


def found(form: Format, entries: dict[str, Entry], prefix: Any) -> dict[str, Entry]:
    """The leaves of the one batch norm at ``prefix``; one too few or too many is an error that names it."""
    path = form.separator.join(as_names("prefix", prefix, form.separator))
    start = path + form.separator if path else ""
    pieces = {name.removeprefix(start): entry for name, entry in entries.items() if name.startswith(start)}
    known = {*form.learned, *form.optional, *(leaf for running in form.running for leaf in running)}
    extra = [name for name in pieces if name not in known]
    if not pieces or (extra and not any(leaf in pieces for running in form.running for leaf in running)):
        others = [layer for layer in layers_of(form, entries) if layer != path]
        where = f"one of {shown(map(repr, others))}" if others else "where a batch norm is"
        raise ValueError(
            f"prefix: got {path!r}, where {form.argument} has no batch norm; expected {where}; "
            f"name the layer in prefix, or convert the whole network with load_network."
        )
    for name in extra:
        raise ValueError(
            f"{pieces[name].label}: got a key that is no part of a batch norm; expected "
            f"{shown(sorted(known), 9)}; leave it out, or name the layer in prefix."
        )
    complete = [running for running in form.running if all(leaf in pieces for leaf in running)]
    if not complete:
        best = max(form.running, key=lambda running: sum(leaf in pieces for leaf in running))
        missing = next(leaf for leaf in best if leaf not in pieces)
        raise ValueError(
            f"{form.argument}: got no {start + missing}; expected the running statistics "
            f"{shown(best)}; convert a layer that keeps them."
        )
    return pieces


def layers_of(form: Format, entries: dict[str, Entry]) -> list[str]:
    """The paths at which there are running statistics."""
    return list(dict.fromkeys(path for name in entries if (path := layer_of(form, name)) is not None))


def layer_of(form: Format, name: str) -> str | None:
    """The path of the batch norm whose running statistic this is; None where it is none."""
    for running in form.running:
        for leaf in running:
            if name == leaf:
                return ""
            if name.endswith(form.separator + leaf):
                return name.removesuffix(form.separator + leaf)
    return None

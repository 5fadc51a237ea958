"""The house rules that a program can check: floors, a light import, documented names, signatures, small files."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import jbn
import jbn.networks
import jbn.training

ROOT = Path(jbn.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# A room imports rooms of lower floors, and those that stand before it on its own.
FLOORS = (
    ("_checks", "_pytrees", "_checks_layer", "_checks_axes", "_checks_inference"),
    ("_collectives", "_shardings", "_xla"),
    ("_pool",),
    ("_measure",),
    ("_normalize", "_variants"),
    ("_core", "_inputs"),
    ("_inference", "_calibrate"),
    ("_doors",),
    ("networks", "training", "linen", "nnx", "equinox", "haiku", "keras", "convert", "report"),
    ("__init__",),  # what `import jbn` gives
    ("cli", "__main__"),
)
ORDER = [room for floor in FLOORS for room in floor]

# Beside the standard library and jax: who may import what, "inside" a function or at the "top".
GUESTS = {
    "numpy": {"_checks", "_calibrate", "convert", "report", "cli"},
    "optax": {"training", "cli"},
    "flax": {"linen", "nnx"},
    "equinox": {"equinox"},
    "haiku": {"haiku"},
    "keras": {"keras"},
    "matplotlib": {"report"},
    "typer": {"cli"},
    "rich": {"_calibrate", "cli"},
    "sklearn": {"cli"},
    "safetensors": {"cli"},
    "orbax": {"cli"},
}
HEAVY = (
    "equinox",
    "flax",
    "haiku",
    "keras",
    "matplotlib",
    "optax",
    "orbax",
    "pandas",
    "rich",
    "safetensors",
    "scipy.stats",
    "sklearn",
    "torch",
    "typer",
)

PUBLIC_MODULES = [
    "jbn" if path == ROOT / "__init__.py" else f"jbn.{path.stem}"
    for path in sorted(ROOT.glob("*.py"))
    if not path.stem.startswith("_") or path.stem == "__init__"
] + [f"jbn.{path.parent.name}" for path in sorted(ROOT.glob("*/__init__.py"))]
PUBLIC = [(module, name) for module in PUBLIC_MODULES for name in importlib.import_module(module).__all__]


def room_of(path):
    """The top-level name below jbn that a file belongs to."""
    relative = path.relative_to(ROOT)
    return relative.parts[0].removesuffix(".py")


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path):
    """(dotted name, whether it is imported at the top of the file), relative imports refused."""
    tree = tree_of(path)
    top = {id(node) for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))}
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.Lambda)) or _only_for_types(function):
            top -= {id(node) for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}: relative import"
            yield from ((f"{node.module}.{alias.name}", id(node) in top) for alias in node.names)


def _only_for_types(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def test_every_file_has_a_floor():
    assert {room_of(path) for path in FILES} <= set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_imports_lower_floors_only(path):
    room = room_of(path)
    for name, _ in imports(path):
        if name.split(".")[0] != "jbn":
            continue
        parts = name.split(".")
        imported = parts[1] if len(parts) > 1 and parts[1] in ORDER else "__init__"
        if imported == room and (ROOT / room).is_dir():
            continue  # the files of one folder
        assert ORDER.index(imported) < ORDER.index(room), f"{room} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_public_jax_the_standard_library_and_its_known_guests(path):
    for name, at_top in imports(path):
        first = name.split(".")[0]
        if first == "jax":
            assert not any(part.startswith("_") or part == "interpreters" for part in name.split(".")), name
        elif first not in sys.stdlib_module_names | {"jbn"}:
            assert room_of(path) in GUESTS.get(first, ()), f"{room_of(path)} imports {name}"
            assert first != "matplotlib" or not at_top, "matplotlib is imported inside the function that draws"
        assert first not in ("pickle", "shelve", "marshal"), name


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_small_documented_and_free_of_asserts_and_prints(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    tree = tree_of(path)
    assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Assert), f"line {node.lineno}: raise an error that says what to do"
        if room_of(path) == "cli":
            continue
        called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id
        assert called != "print", f"line {node.lineno}: only the command line prints"
        if isinstance(node, ast.ClassDef):
            bases = {ast.unparse(base) for base in node.bases}
            assert not any(b.endswith(("Exception", "Error", "Warning")) for b in bases), node.name


@pytest.mark.parametrize("module", ["jbn", "jbn.convert", "jbn.networks"])
def test_the_import_is_light(module):
    code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_package_is_typed():
    assert (ROOT / "py.typed").exists()


@pytest.mark.parametrize(("module", "name"), PUBLIC, ids=lambda v: v)
def test_every_public_name_is_documented_with_an_example(module, name):
    value = getattr(importlib.import_module(module), name)
    doc = inspect.getdoc(value)
    assert doc, "no docstring"
    assert doc.splitlines()[0].endswith((".", ":")), "the first line is a sentence"
    assert ">>>" in doc
    for section in ("Attributes:",) if inspect.isclass(value) else ("Args:", "Returns:", "Example:"):
        assert section in doc


def test_all_lists_are_sorted_and_complete():
    for module in map(importlib.import_module, PUBLIC_MODULES):
        assert list(module.__all__) == sorted(module.__all__)
        own = {
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
        }
        assert own <= set(module.__all__)


class Contract:
    """The signatures that users rely on."""

    def bn_init(num_features, *, use_gamma=True, use_beta=True, dtype=jnp.float32): ...

    def bn_apply(
        params,
        state,
        x,
        *,
        train,
        axis=-1,
        eps=1e-5,
        mask=None,
        axis_name=None,
        axis_index_groups=None,
        ghost_size=None,
        renorm=None,
    ): ...

    def bn_update_stats(state, stats, *, momentum=0.9, debias=True, unbiased=True): ...

    def bn_merge_stats(*stats, axis=None): ...

    def normalize_inputs(x, stats=None, *, axis=-1, eps=0.0): ...

    def weight_decay_mask(params): ...

    def bn_labels(params): ...

    def bn_affine(params, state, *, eps=1e-5): ...

    def bn_fold(params, state, kernel, bias=None, *, eps=1e-5, kernel_axis=-1): ...

    def bn_calibrate(apply_fn, params, state, batches, *, progress=False): ...

    def mlp(sizes, *, norm="z", activation=jax.nn.relu, dtype=None, bn=jbn.bn_apply): ...

    def resnet(
        num_classes,
        *,
        in_channels=3,
        widths=(16, 32, 64),
        blocks=3,
        norm="z",
        activation=jax.nn.relu,
        zero_gamma=False,
        remat=False,
        dtype=None,
        bn=jbn.bn_apply,
    ): ...

    def make_train_step(
        apply,
        loss_fn,
        optimizer,
        *,
        momentum=0.9,
        accumulate=1,
        axis_name=None,
        sync_stats=True,
        skip_nonfinite=True,
    ): ...


def _outline(function):
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in parameters]


FUNCTIONS = [
    (module, name)
    for module, name in PUBLIC
    if module in ("jbn", "jbn.training") and inspect.isfunction(getattr(importlib.import_module(module), name))
] + [("jbn.networks", "mlp"), ("jbn.networks", "resnet")]


@pytest.mark.parametrize(("module", "name"), FUNCTIONS, ids=lambda v: v)
def test_signatures_are_those_of_the_contract(module, name):
    assert _outline(getattr(importlib.import_module(module), name)) == _outline(getattr(Contract, name))


@pytest.mark.parametrize(
    ("node", "fields"),
    [
        (jbn.BNParams, ("gamma", "beta")),
        (jbn.BNState, ("mean", "var", "count")),
        (jbn.BNStats, ("mean", "var", "count")),
        (jbn.networks.Network, ("init", "apply")),
        (jbn.training.TrainState, ("params", "bn_state", "opt_state", "step")),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_the_pytrees_have_these_fields_in_this_order_and_no_defaults(node, fields):
    assert node._fields == fields
    assert not node._field_defaults
    assert issubclass(node, tuple)


def test_the_core_is_there():
    assert {
        "BNParams",
        "BNState",
        "BNStats",
        "bn_apply",
        "bn_init",
        "bn_labels",
        "bn_merge_stats",
        "bn_update_stats",
        "normalize_inputs",
        "weight_decay_mask",
    } <= set(jbn.__all__)

"""What is written for a compiler and not for a reader: which way is taken on which platform, and how XLA:CPU is
kept from writing intermediate arrays to memory.

All of it was seen with jaxlib 0.10.2 and holds with 0.12. None of it changes a value beyond its rounding.
"""

import math
import operator
from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jbn._collectives import as_varying, varying_axes
from jbn._shardings import spec_of

__all__ = [
    "narrow_select",
    "pool_by_platform",
    "raw_sums",
    "raw_sums_are_rough",
    "sum_of_terms",
    "unshared",
    "way_by_platform",
    "weighted",
]

# From so many rows on, and where nothing is to be converted, two sums in turn are faster than side by side.
_TALL = 2**11


def way_by_platform(
    *operands: Any, zero: Callable[..., Any], known: Callable[..., Any], sample: Callable[..., Any]
) -> Any:
    """Calls the way to measure moments that is the cheapest where the program runs: sums about which shift?

    About 0 on a CPU, which sums x and x² twice as fast as anything about another shift, and where the branch to a
    second read costs next to nothing. About a shift that is known before x is on a TPU: there sums that do not
    depend on one of x's are made inside the kernel that computes x (a convolution, say), which saves a read. About
    the mean of a sample on a GPU, where a branch would make the host wait for its predicate. ``benchmarks/aot.py``
    counts the passes over x of each, ``benchmarks/layer.py`` takes the time.
    """
    return lax.platform_dependent(*operands, cpu=zero, tpu=known, default=sample)


def pool_by_platform(
    a: jax.Array, *, window: Callable[[jax.Array], jax.Array], slices: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """Calls the way to pool that is the cheapest where the program runs: windows, or the larger of shifted slices?

    A TPU has instructions for windows, and for the scatter to their largest values that is their transpose: between
    two convolutions slices cost it three times the bytes. XLA:CPU and XLA:GPU have loops for both: on a GPU slices
    take two thirds of the bytes, on a CPU a fifth of the time forward and half of it backward.
    """
    return lax.platform_dependent(a, tpu=window, default=slices)


def raw_sums(axes: tuple[int, ...], x: jax.Array, mask: jax.Array | None, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Σx and Σx² of the values that count, in ``dtype``, each as one kernel with all threads of a CPU."""
    (x1, mask1), (x2, mask2) = unshared(((x, mask),) * 2)
    total = jnp.sum(weighted(x1.astype(dtype), mask1), axes)
    squares = lax.square(weighted(x2.astype(dtype), mask2))
    in_turn = x.dtype == dtype and math.prod(x.shape[a] for a in axes) >= _TALL
    return total, _sum_after(total, squares, axes) if in_turn else jnp.sum(squares, axes)


def raw_sums_are_rough(x: jax.Array, axes: tuple[int, ...]) -> bool:
    """Whether XLA:CPU adds in the order of the rows, which is too rough for a difference of sums.

    It does where summed axes lie between feature axes; elsewhere it adds in several partial sums.
    """
    kept = [a for a in range(x.ndim) if a not in axes]
    return bool(kept) and kept != list(range(kept[0], kept[-1] + 1))


def weighted(values: jax.Array, mask: jax.Array | None) -> jax.Array:
    """The values that count, and 0 in the place of others, NaN where those are not finite.

    XLA:CPU computes a product inside a reduction, but writes a selection to memory; and it converts bytes inside a
    reduction, but not bools. ``tests/costs/test_layer.py`` counts what is written at full size.
    """
    return values if mask is None else values * mask.astype(jnp.uint8).astype(values.dtype)


def _barrier(*arrays):
    return lax.optimization_barrier(arrays)


def _identity(*arrays):
    return arrays


def unshared(tree: Any) -> Any:
    """The same arrays, as values that XLA:CPU does not merge with other uses of them.

    XLA:CPU computes a conversion, a subtraction or a broadcast inside a reduction only if that reduction is its one
    user; with several users it writes the result to memory at full size. An optimization barrier keeps the copies
    apart until after common subexpressions are merged, and is dropped before fusion, so it costs nothing there. On a
    TPU a barrier costs passes over x: none is emitted there, nor on a GPU. Two calls give different values only if
    their trees hold different arrays. ``tests/costs/test_layer.py`` counts what is written at full size.
    """
    arrays, structure = jax.tree.flatten(tree)
    # JAX 0.10 gives all results of a barrier one type inside shard_map, so its operands are made alike first.
    varying = frozenset[Any]().union(*map(varying_axes, arrays))
    arrays = [as_varying(array, varying) for array in arrays]
    return jax.tree.unflatten(structure, lax.platform_dependent(*arrays, cpu=_barrier, default=_identity))


def _sum_after(first: jax.Array, values: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The sum of ``values`` over ``axes``, begun when ``first``, another sum, is done; NaN if that is not finite.

    XLA:CPU runs kernels that do not depend on each other side by side, with one thread for each; one after the other
    each has all threads, which for two sums over x is a fifth faster (``benchmarks/layer.py``). The second sum is
    made to depend on the first by starting it from 0 times an entry of the first; XLA does not replace that product
    by 0, because it is NaN where the entry is not finite. ``tests/costs/test_layer.py`` checks that the sums wait.
    """
    if any(spec_of(first)):  # split over an explicit mesh, no entry is on all devices
        return jnp.sum(values, axes)
    return lax.reduce(values, 0 * first[(0,) * first.ndim], lax.add, axes)


@jax.custom_jvp
def narrow_select(mask: jax.Array, x: jax.Array, other: jax.Array) -> jax.Array:
    """``x`` where ``mask`` holds, elsewhere the finite number of x's dtype next to ``other``.

    XLA:CPU does not compute a selection inside a reduction but writes it to memory, and computes selections of
    bfloat16 and float16 in float32, so that it writes twice the bytes. A selection of their bits stays as narrow as
    x, and fits where a result of x's size is put later. ``tests/costs/test_layer.py`` counts the temporary bytes.
    """
    largest = jnp.finfo(x.dtype).max.astype(other.dtype)
    other = jnp.clip(other, -largest, largest).astype(x.dtype)
    return lax.platform_dependent(mask, x, other, cpu=_select_bits, default=jnp.where)


@narrow_select.defjvp
def _narrow_select_tangent(primals, tangents):
    mask, x, _ = primals
    _, x_dot, other_dot = tangents
    return narrow_select(*primals), jnp.where(mask, x_dot, other_dot.astype(x.dtype))


def _select_bits(mask, x, other):
    bits = partial(lax.bitcast_convert_type, new_dtype=f"uint{jnp.finfo(x.dtype).bits}")
    return lax.bitcast_convert_type(jnp.where(mask, bits(x), bits(other)), x.dtype)


def sum_of_terms(dtype: Any, *terms: jax.Array) -> jax.Array:
    """The sum of the terms, in ``dtype``; on a CPU its transpose reads the cotangent once for each term.

    Transposed, a sum hands one cotangent to all of its terms, and XLA:CPU writes the conversion of that shared
    cotangent to float32 to memory. The transpose of a barrier is a barrier: with another number of barriers behind
    each term, each term gets a copy of the cotangent that is not merged with the others, and converts it inside the
    reduction that uses it. The price is paid by forward-mode tangents of narrow dtypes on a CPU: each term is rounded
    to ``dtype`` before the sum. ``tests/costs/test_layer.py`` counts the temporary bytes.
    """
    return lax.platform_dependent(*terms, cpu=partial(_add_apart, dtype), default=partial(_add, dtype))


def _add(dtype, *terms):
    return reduce(operator.add, terms).astype(dtype)


def _add_apart(dtype, *terms):
    apart = []
    for depth, term in enumerate(terms):
        wide, term = term.dtype, term.astype(dtype)
        for _ in range(depth):
            term = lax.optimization_barrier(term)
        apart.append(term.astype(wide))
    return _add(dtype, *apart)

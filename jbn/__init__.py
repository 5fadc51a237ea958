"""Batch normalization as pure functions.

For each channel: z̃ = γ·(z−μ)/√(σ²+ε) + β, with μ and σ² those of the batch in training, and running
averages of them at test time (Ioffe & Szegedy 2015). Three functions over three small pytrees:

    >>> import jax, jax.numpy as jnp
    >>> import jbn
    >>> params, state = jbn.bn_init(64)                                  # learned γ, β; running statistics
    >>> x = jax.random.normal(jax.random.key(0), (32, 64))
    >>> y, stats = jbn.bn_apply(params, state, x, train=True)            # the statistics of this batch
    >>> state = jbn.bn_update_stats(state, stats)                        # running ← (1−w)·running + w·batch
    >>> y, _ = jbn.bn_apply(params, state, x, train=False)               # normalized with the running ones

No hidden state: what is learned, what runs along and what a batch showed are three things, passed in
and returned. Everything works under ``jit``, ``vmap``, ``grad`` and JAX's other transformations.
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from jbn._calibrate import bn_calibrate
from jbn._core import bn_apply, bn_init, bn_update_stats
from jbn._inference import bn_affine, bn_fold
from jbn._inputs import normalize_inputs
from jbn._pool import bn_merge_stats
from jbn._pytrees import BNParams, BNState, BNStats, bn_labels, weight_decay_mask

if TYPE_CHECKING:
    from jbn import convert as convert
    from jbn import networks as networks
    from jbn import report as report
    from jbn import training as training

__version__ = "0.1.0"

__all__ = [
    "BNParams",
    "BNState",
    "BNStats",
    "bn_affine",
    "bn_apply",
    "bn_calibrate",
    "bn_fold",
    "bn_init",
    "bn_labels",
    "bn_merge_stats",
    "bn_update_stats",
    "normalize_inputs",
    "weight_decay_mask",
]

# The doors to other frameworks. `dir` leaves them out until they are used: what walks over it, as `help` does, would
# import every framework, or fail on the first that is not installed.
_DOORS = frozenset({"equinox", "haiku", "keras", "linen", "nnx"})


def _submodules() -> set[str]:
    return {module.name for module in iter_modules(__path__) if not module.name.startswith("_")}


def __dir__() -> list[str]:
    return sorted({*globals(), *_submodules() - _DOORS})


if not TYPE_CHECKING:  # a type checker would take any name for one of ours

    def __getattr__(name: str) -> Any:
        """Submodules are imported on first use, so that ``import jbn`` stays light."""
        if name in _submodules():
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

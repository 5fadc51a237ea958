"""What a trained batch norm becomes: an affine map, or a part of the layer before it."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jbn import _checks, _checks_inference, _checks_layer
from jbn._pytrees import BNParams, BNState

__all__ = ["bn_affine", "bn_fold"]


def bn_affine(params: BNParams, state: BNState, *, eps: Any = 1e-5) -> tuple[jax.Array, jax.Array]:
    """Inference as one multiplication and one addition: y = x·scale + shift.

    scale = γ/√(σ²+ε) and shift = β − μ·scale, with the running μ and σ². Where |μ|/σ is large both terms
    are, and digits cancel; `bn_apply` subtracts μ first and keeps them.

    Args:
        params: γ and β, each (C,) or None.
        state: running statistics, (C,). Stacks of layers (L, C) are as welcome.
        eps: ε > 0, the one the network was trained with; may be traced.

    Returns:
        ``(scale, shift)``, each of the shape of the state's fields, float32 (float64 for a float64 state).

    Raises:
        TypeError: ``params`` or ``state`` of another type, ``eps`` no number.
        ValueError: fields that differ in shape, ``eps`` ≤ 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from jbn import BNParams, BNState, bn_affine
        >>> params = BNParams(jnp.array([3.0]), jnp.array([1.0]))
        >>> state = BNState(jnp.array([5.0]), jnp.array([4.0]), jnp.array([1]))
        >>> scale, shift = bn_affine(params, state, eps=1e-12)
        >>> scale, shift
        (Array([1.5], dtype=float32), Array([-6.5], dtype=float32))

    Flax, PyTorch and Keras have no such function for users.

    References:
        Ioffe & Szegedy 2015, Algorithm 2, step 11.
    """
    params, state = _checks_layer.as_layer(params, state)
    return _affine(params, state, _checks_layer.as_eps(eps))


@jax.jit
def _affine(params, state, eps):
    dtype = _checks.compute_dtype(state.mean.dtype)
    mean, var, eps = (jnp.asarray(v, dtype) for v in (state.mean, state.var, eps))
    scale = lax.rsqrt(var + eps)
    if params.gamma is not None:
        scale = jnp.asarray(params.gamma, dtype) * scale
    shift = -mean * scale
    if params.beta is not None:
        shift = jnp.asarray(params.beta, dtype) + shift
    return scale, shift


def bn_fold(
    params: BNParams, state: BNState, kernel: Any, bias: Any = None, *, eps: Any = 1e-5, kernel_axis: int = -1
) -> tuple[jax.Array, jax.Array]:
    """Folds a batch norm into the dense or convolution layer before it: one layer, the same outputs.

    With `bn_affine`'s scale and shift, BN(x ∗ kernel + bias) = x ∗ (kernel·scale) + (bias·scale + shift).
    There may be nothing between the two, no activation either.

    Args:
        params: γ and β of the batch norm, each (C,) or None.
        state: its running statistics, (C,).
        kernel: floating-point weights of any rank, with the C output features along ``kernel_axis``.
        bias: (C,) floating-point, or None.
        eps: ε > 0, the one the network was trained with; may be traced.
        kernel_axis: the axis of the output features (static): -1 for dense (in, out) and for convolutions
            HWIO, grouped and depthwise too; 0 for OIHW. Transposed without groups: -1 for HWIO, as
            `jax.lax.conv_transpose` has it (-2 with its ``transpose_kernel``), 1 for PyTorch's.

    Returns:
        ``(kernel, bias)`` in the kernel's dtype, computed in at least float32. The bias is (C,).

    Raises:
        TypeError: ``kernel`` or ``bias`` not floating point, ``kernel_axis`` no int, ``params`` or
            ``state`` of another type.
        ValueError: ``kernel_axis`` out of range or not of size C, another shape of ``bias``, ``eps`` ≤ 0.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jbn import BNState, bn_apply, bn_fold, bn_init
        >>> params, _ = bn_init(3)
        >>> state = BNState(jnp.array([1.0, 2.0, 3.0]), jnp.array([4.0, 5.0, 6.0]), jnp.ones(3, jnp.int32))
        >>> W, x = jax.random.normal(jax.random.key(0), (4, 3)), jnp.ones((2, 4))
        >>> y, _ = bn_apply(params, state, x @ W, train=False)
        >>> W_folded, b_folded = bn_fold(params, state, W)
        >>> bool(jnp.allclose(x @ W_folded + b_folded[None], y, atol=1e-5))
        True

    Layers that are stacked are folded by `jax.vmap`. PyTorch: ``torch.nn.utils.fusion.fuse_conv_bn_weights``.

    References:
        Jacob et al. 2018, "Quantization and Training of Neural Networks", equation 14.
    """
    params, state = _checks_layer.as_layer(params, state)
    kernel = _checks.as_array("kernel", kernel)
    channels = jnp.shape(state.mean)
    axis = _checks_inference.as_kernel_axis(kernel_axis, kernel.shape, channels)
    if bias is not None:
        bias = _checks_inference.as_bias(bias, channels)
    return _folded(axis, params, state, kernel, bias, _checks_layer.as_eps(eps))


@partial(jax.jit, static_argnums=0)
def _folded(axis, params, state, kernel, bias, eps):
    scale, shift = _affine(params, state, eps)
    dtype = max(scale.dtype, _checks.compute_dtype(kernel.dtype), key=lambda dtype: dtype.itemsize)
    scale, shift = scale.astype(dtype), shift.astype(dtype)
    if bias is not None:
        shift = bias.astype(dtype) * scale + shift
    over = lax.expand_dims(scale, [a for a in range(kernel.ndim) if a != axis])
    return (kernel.astype(dtype) * over).astype(kernel.dtype), shift.astype(kernel.dtype)

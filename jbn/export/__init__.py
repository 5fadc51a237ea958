"""A trained network as one file that runs without its source: StableHLO for JAX, or ONNX."""

from jbn.export._forward import needs_float64
from jbn.export._onnx import to_onnx
from jbn.export._stablehlo import Array, Description, describe, to_stablehlo

__all__ = ["Array", "Description", "describe", "needs_float64", "to_onnx", "to_stablehlo"]

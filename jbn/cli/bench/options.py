"""The options of ``jbn bench``: what is timed, and whether it can be."""

import math
from dataclasses import dataclass

from jbn.cli.bad_input import BadInput
from jbn.cli.parsers import choice, integer, option, sizes

__all__ = ["BenchOptions"]

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class BenchOptions:
    """What ``jbn bench`` was asked for, in the words of its options."""

    shape: tuple[int, ...] = option(sizes("32,56,56,64", "dimension of x"), "INT,INT,…", "Of x.", "32,56,56,64")
    dtype: str = option(choice(DTYPES), "|".join(DTYPES), "Of x and y.", "float32")
    axis: int = option(integer(-64, -1, 63), "INT", "The feature axis; -1 for NHWC, 1 for NCHW.", -1)
    rounds: int = option(integer(7, 11), "INT", "In which each takes a turn, fewer if time is up.", 11)
    json: bool = option(None, "", "JSON on a terminal too.", False)

    def __post_init__(self) -> None:
        rank = len(self.shape)
        if not -rank <= self.axis < rank:
            raise BadInput(
                f"--axis: got {self.axis} with --shape {self.shown}; expected {-rank} to {rank - 1}; "
                f"pass the axis of the features, as in --axis -1."
            )
        if math.prod(self.shape) < 2 * self.shape[self.axis]:
            raise BadInput(
                f"--shape: got {self.shown} with --axis {self.axis}; expected at least 2 values in each channel, "
                f"since the variance of one is 0; use a larger batch."
            )

    @property
    def shown(self) -> str:
        """The shape, as it is typed."""
        return ",".join(map(str, self.shape))

    @property
    def nbytes(self) -> int:
        """Bytes of x."""
        return math.prod(self.shape) * (4 if self.dtype == "float32" else 2)

"""Writes tests/convert/golden/torchvision/*.npz: what narrow networks of torchvision's compute.

Run from the root, with the extra ``parity`` installed: ``python tests/convert/golden/torchvision/make.py``.
"""

import sys
from pathlib import Path

FOLDER = Path(__file__).parent
SHAPE = (4, 37, 30, 3)  # odd and even, so that padding on one side alone would be seen


def main():
    sys.path.insert(0, str(Path(__file__).parents[3]))
    from support import golden
    from support import torchvision_models as theirs

    for name in theirs.NARROW:
        x = theirs.images(*SHAPE)
        arrays = theirs.answers(theirs.narrow(name), x)
        # What training leaves as it was is there once.
        arrays = {k: v for k, v in arrays.items() if not k.startswith("after/") or "running" in k or v.ndim == 0}
        path = FOLDER / f"{name}.npz"
        golden.save(path, {"x": x, **arrays})
        print(path, path.stat().st_size, "bytes", theirs.torch.__version__, theirs.torchvision.__version__)


if __name__ == "__main__":
    main()

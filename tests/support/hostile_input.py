"""Files and options that claim far more than there is; as a program, what the command line says to each of them."""

import io
import json
import resource
import sys
import zipfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


def commands(folder):
    """(arguments, how the line begins that they end with); `make` has made the files."""
    data = ["--data", str(folder / "data.npz")]
    width = "--hidden: got a network of 2 layers and"
    train = {
        ("--devices", "1000", "--batch-size", "1000"): "--devices: got 1000; expected at most 64, as many",
        ("--hidden", str(10**13)): width,
        ("--hidden", str(10**9)): width,
        ("--hidden", ",".join(["2"] * 20000)): "--hidden: got a network of 20001 layers and 80004 weights; expected at",
        ("--data", str(folder / "huge.npz")): f"--data: got {folder}/huge.npz, which is no .npz file, is damaged or",
        ("--data", str(folder / "deep.npz")): f"--data: got {folder}/deep.npz, which is no .npz file, is damaged or",
        ("--seed", str(10**30)): "--seed: got 1000000000000000000000000000000; expected a whole number from 0 to",
    }
    run, unknown = folder / "run", "(it does not say which network it holds); expected"
    yield from ((["train", *data, "--out", str(folder / "out"), *given], line) for given, line in train.items())
    for name in ("layers", "width", "activation", "deep"):
        file = f"{name}.safetensors"
        yield ["inspect", str(run), "--model", file], f"--model: got {run / file} {unknown}"
    for name in ("seed", "deep"):
        place = folder / f"run with a {name}"
        yield ["inspect", str(place)], f"RUN_DIR: got {place} with a damaged metrics.json; expected"


def make(folder):
    """Small files, whatever they claim."""
    rng = np.random.default_rng(0)
    np.savez(folder / "data.npz", x=rng.normal(size=(2000, 2)), y=np.arange(2000) % 2)
    (run := folder / "run").mkdir()
    options = {"data": None, "seed": 0, "batch_size": 8}
    (run / "metrics.json").write_text(json.dumps({"options": options}))
    fields = {"network": "mlp", "sizes": [2, 3, 2], "norm": "z", "activation": "relu", "dtype": "float32", "blocks": 0}
    changes = {
        "layers": {"sizes": [2] * 20000},
        "width": {"sizes": [2, 10**9, 2]},
        "activation": {"activation": "one_hot"},
        "deep": {},
    }
    for name, change in changes.items():
        network = "[" * 10**5 if name == "deep" else json.dumps({**fields, **change})
        save_file({"params/0/W": np.ones((2, 3), np.float32)}, run / f"{name}.safetensors", {"network": network})
    for name, text in (("seed", json.dumps({"options": {**options, "seed": 10**30}})), ("deep", "[" * 10**5)):
        (place := folder / f"run with a {name}").mkdir()
        (place / "metrics.json").write_text(text)
    shapes = {"huge": f"({10**12}, 2)", "deep": "(" * 4000 + "2" + ",)" * 4000}
    for name, shape in shapes.items():
        header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".encode() + b"\n"
        with zipfile.ZipFile(folder / f"{name}.npz", "w") as archive:
            for array in ("x.npy", "y.npy"):
                archive.writestr(array, b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)


def main(folder):
    """Prints for each command its exit code, how many lines it said, and the first; at the end the bytes it took."""
    from jbn.cli import main as jbn

    make(folder)
    for arguments, _ in commands(folder):
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
            code = jbn(arguments)
        said = out.getvalue() + err.getvalue()
        print(code, said.count("\n"), said.partition("\n")[0])
    print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

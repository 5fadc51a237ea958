"""The process that holds torch, so that its threads do not disturb JAX's."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jbn.cli.bench.options import BenchOptions

__all__ = ["Torch", "torch_process"]


class Torch:
    """Asks for turns; what goes wrong over there is a RuntimeError here."""

    def __init__(self, process: Any) -> None:
        self.version: str | None = None
        self._process = process

    def turn(self, mode: str, steps: int) -> Callable[[int], float]:
        """A turn of torch, in place of the one that was there before."""
        self.version = self.ask(mode=mode, steps=steps)["version"]
        return lambda repeats: self.ask(repeats=repeats)["seconds"]

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to one request."""
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"its process ended with status {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer


@contextmanager
def torch_process(options: BenchOptions, platform: str) -> Iterator[Torch]:
    """A process with torch, for the time of the block; ``platform`` is JAX's."""
    process = subprocess.Popen(
        # -P keeps the program's folder, whose modules are not for torch, off its path.
        [sys.executable, "-P", str(Path(__file__).with_name("torch_program.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={"OMP_WAIT_POLICY": "passive", **os.environ},  # spinning threads would take JAX's cores
    )
    try:
        torch = Torch(process)
        torch.ask(shape=options.shape, dtype=options.dtype, axis=options.axis, platform=platform)
        yield torch
    finally:
        process.kill()
        process.communicate()

"""The process that holds torch, so that its threads do not disturb JAX's."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Any

from jbn.cli.bench.contestants import Case
from jbn.cli.bench.engine import Turn
from jbn.cli.child import start

__all__ = ["Torch", "torch_process"]

# glibc keeps freed memory instead of handing it back, so that torch pays no page faults.
_TUNED = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(1 << 28),
}


class Torch:
    """Asks for turns; what goes wrong over there is a RuntimeError here."""

    def __init__(self, process: Any, platform: str) -> None:
        self._process, self._platform = process, platform

    def turn(self, name: str, case: Case) -> Turn:
        """A turn of a contestant, in place of the one that it had before."""
        self._ask(prepare=name, platform=self._platform, **case._asdict())
        return lambda repeats: self._ask(turn=name, repeats=repeats)["seconds"]

    def _ask(self, **request: Any) -> dict[str, Any]:
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
def torch_process(platform: str, *, tuned: bool = False) -> Iterator[Torch]:
    """A process with torch, for the time of the block; ``platform`` is JAX's."""
    # Threads that spin would take JAX's cores.
    environment = {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive"), **(_TUNED if tuned else {})}
    program = str(Path(__file__).with_name("torch_program.py"))
    process = start([program], environment, stdout=PIPE, stderr=DEVNULL)
    try:
        yield Torch(process, platform)
    finally:
        process.kill()
        process.communicate()

"""A process that holds one engine (JAX, torch, torch with tuned malloc) and times a turn when it is asked.

Requests are lines of JSON on stdin, answers lines of JSON on stdout. Between its turns a worker waits
in a read, and before it answers it rests until its own threads have stopped spinning: so the engines
take turns in one interleaved run and none disturbs another.
"""

import gc
import importlib.metadata
import json
import math
import os
import sys
import time
import traceback

REST = 0.02  # s; longer than the OpenMP and Eigen thread pools spin by default
# Distributions whose versions are reported.
PACKAGES = {
    "jax": ("jax", "jaxlib", "jbn", "flax", "dm-haiku", "equinox", "keras"),
    "torch": ("torch",),
    "torch_tuned": ("torch",),
}


def main(engine):
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not end up among the answers
    gc.disable()
    worker = _Worker(engine)
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(worker, request.pop("call"))(**request)
        time.sleep(REST)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


class _Worker:
    def __init__(self, engine):
        self.engine = engine
        self.turns = {}

    def describe(self):
        """Versions and device."""
        versions = {}
        for package in PACKAGES[self.engine]:
            try:
                versions[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue
        if self.engine == "jax":
            import jax

            device = jax.devices()[0]
            return {"versions": versions, "device": f"{device.platform}: {device.device_kind}"}
        import torch

        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        return {"versions": versions, "device": device, "threads": torch.get_num_threads()}

    def prepare(self, name, case, turn_seconds):
        """Builds and warms one contestant: compilation, two more chains, and how many fill a turn."""
        import chains
        from contestants import Case

        case = Case(**{k: tuple(v) if isinstance(v, list) else v for k, v in case.items()})
        try:
            if name == "copy":
                chain = chains.copy_chain(case)
            elif self.engine == "jax":
                chain = chains.jax_chain(name, case)
            else:
                chain = chains.torch_chain(name, case)
            start = time.perf_counter()
            chain()
            compiled = time.perf_counter()
            chain()
            chain()
            seconds = (time.perf_counter() - compiled) / 2
        except Exception as error:
            traceback.print_exc()
            return {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"}
        repeats = max(1, math.ceil(turn_seconds / seconds))
        self.turns[name] = (chain, repeats * case.steps, repeats)
        return {"first": compiled - start, "seconds": seconds / case.steps, "repeats": repeats}

    def turn(self, name):
        """Seconds per call, over one turn."""
        chain, calls, repeats = self.turns[name]
        start = time.perf_counter()
        for _ in range(repeats):
            chain()
        return (time.perf_counter() - start) / calls

    def clear(self):
        """Forgets the contestants of a case, with their buffers and compiled code."""
        self.turns = {}
        if self.engine == "jax":
            import jax

            jax.clear_caches()
        gc.collect()


if __name__ == "__main__":
    main(sys.argv[1])

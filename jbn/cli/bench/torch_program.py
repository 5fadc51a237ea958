"""What is timed in torch; a program, run in a process of its own.

A request is a line of JSON on stdin, its answer a line of JSON on stdout: a contestant to make ready for a case, or
a turn of it.
"""

import json
import os
import sys
import time
from importlib import import_module
from typing import Any

_EPS, _MOMENTUM = 1e-5, 0.1  # in torch, the share that is new


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what torch prints must not end up among the answers
    chains: dict[str, Any] = {}
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            if name := request.pop("prepare", None):
                chains.pop(name, None)  # frees its buffers first
                chains[name] = _chain(import_module("torch"), name, **request)
            else:
                start = time.perf_counter()
                chains[request["turn"]](request["repeats"])
                answer = {"seconds": time.perf_counter() - start}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _chain(torch, name, platform, shape, axis, dtype, mode, steps):
    """The same calls as in JAX, eagerly: γ and β float32, channels_last where channels are last."""
    if platform == "gpu" and not torch.cuda.is_available():
        raise RuntimeError("this torch has no CUDA")
    device, backward = "cuda" if platform == "gpu" else "cpu", mode == "forward+backward"
    generator = torch.Generator().manual_seed(0)

    def data():
        return torch.randn(shape, generator=generator).to(device, getattr(torch, dtype)).movedim(axis, 1)

    x, g = data(), data() if backward else None
    gamma, var = torch.ones(2, x.shape[1], device=device)
    beta, mean = torch.zeros(2, x.shape[1], device=device)
    gamma, beta = (v.clone().requires_grad_(backward) for v in (gamma, beta))

    def apply(x):
        return torch.nn.functional.batch_norm(x, mean, var, gamma, beta, mode != "evaluation", _MOMENTUM, _EPS)

    call = torch.compile(apply) if name == "torch_compile" else apply

    def forward(calls):
        value = x
        with torch.no_grad():
            for _ in range(calls):
                value = call(value)

    def forward_and_backward(calls):
        value, cotangent = x, g
        for _ in range(calls):
            value = value.detach().requires_grad_()
            y = call(value)
            cotangent, *_ = torch.autograd.grad(y, (value, gamma, beta), cotangent)
            value = y

    def chain(repeats):
        (forward_and_backward if backward else forward)(repeats * steps)
        if device == "cuda":
            torch.cuda.synchronize()

    return chain


if __name__ == "__main__":
    main()

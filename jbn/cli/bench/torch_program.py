"""What ``jbn bench`` times in torch; a program, run in a process of its own.

A request is a line of JSON on stdin, its answer a line of JSON on stdout: first the setting, then a mode
to make ready, then turns of it.
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
    setting: dict[str, Any] = {}
    turn: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "shape" in request:
                setting, answer = request, {}
            elif "mode" in request:
                turn = None  # frees its buffers first
                torch = import_module("torch")
                turn, answer = _turn(torch, setting, **request), {"version": torch.__version__}
            else:
                start = time.perf_counter()
                turn(request["repeats"])
                answer = {"seconds": time.perf_counter() - start}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _turn(torch, setting, mode, steps):
    """The same calls as in JAX, eagerly: γ and β float32, channels_last where channels are last."""
    on_gpu = setting["platform"] == "gpu"
    if on_gpu and not torch.cuda.is_available():
        raise RuntimeError("this torch has no CUDA")
    device, dtype = "cuda" if on_gpu else "cpu", getattr(torch, setting["dtype"])
    generator = torch.Generator().manual_seed(0)

    def data():
        return torch.randn(setting["shape"], generator=generator).to(device, dtype).movedim(setting["axis"], 1)

    x = data()
    channels = x.shape[1]
    gamma, beta = torch.ones(channels, device=device), torch.zeros(channels, device=device)
    mean, var = torch.zeros(channels, device=device), torch.ones(channels, device=device)

    def apply(x):
        return torch.nn.functional.batch_norm(x, mean, var, gamma, beta, mode != "evaluation", _MOMENTUM, _EPS)

    def forward(calls):
        value = x
        with torch.no_grad():
            for _ in range(calls):
                value = apply(value)

    def forward_and_backward(calls):
        value, cotangent = x, g
        for _ in range(calls):
            value = value.detach().requires_grad_()
            y = apply(value)
            cotangent, *_ = torch.autograd.grad(y, (value, gamma, beta), cotangent)
            value = y

    if mode == "forward+backward":
        g = data()
        gamma.requires_grad_()
        beta.requires_grad_()
    body = forward_and_backward if mode == "forward+backward" else forward

    def turn(repeats):
        body(repeats * steps)
        if on_gpu:
            torch.cuda.synchronize()

    return turn


if __name__ == "__main__":
    main()

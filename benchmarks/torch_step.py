"""A training step of torchvision's ResNet-50 on the weights of `jbn.networks.resnet`, in the form of `step.py`.

Channels last in memory, as convolutions on a CPU want them; bfloat16 by autocast, which leaves weights in float32 as
`jbn.networks` does.
"""

import importlib.util
import math
import re
from pathlib import Path
from typing import Any

import torch


def _torchvision() -> Any:
    """torchvision, also where its compiled operators do not load, of which the network needs none.

    It describes them when it is imported, and so they have to be declared.
    """
    try:
        import torchvision
    except (RuntimeError, OSError):
        folder = Path(importlib.util.find_spec("torchvision").origin).parent
        text = (folder / "_meta_registrations.py").read_text(encoding="utf-8")
        for name in dict.fromkeys(re.findall(r'register_(?:meta\("|fake\("torchvision::)(\w+)"', text)):
            if not hasattr(torch.ops.torchvision, name):
                _OPERATORS.define(f"{name}(Tensor x) -> Tensor")
        import torchvision
    return torchvision


_OPERATORS = torch.library.Library("torchvision", "FRAGMENT")


class Step:
    """A training step that runs on from where it stopped, with its first loss."""

    temporaries = compilation = None  # of which PyTorch does not tell on a CPU, and has none

    def __init__(self, case: Any, dtype: str):
        import jax
        import numpy as np
        from step import batch_of

        from jbn.convert import to_torchvision

        network = case.network()
        arrays = to_torchvision(*jax.jit(network.init)(jax.random.key(0)))
        self._model = _torchvision().models.resnet50(num_classes=case.network.args[0])
        self._model.load_state_dict({name: torch.as_tensor(array) for name, array in arrays.items()})
        self._model = self._model.train().to(memory_format=torch.channels_last)
        x, y = batch_of(case, "float32")
        # The axes (N, C, H, W) over memory in which the channels are last.
        self._x = torch.as_tensor(np.array(x)).permute(0, 3, 1, 2)
        self._y = torch.as_tensor(np.array(y)).long()
        self._narrow = dtype == "bfloat16"
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=1e-5, momentum=0.9)
        self.last_metrics: dict[str, Any] = {}
        self.first_loss = self()

    def __call__(self) -> float:
        """One step; gives its loss."""
        self._optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=self._narrow):
            outputs = self._model(self._x)
        loss = torch.nn.functional.cross_entropy(outputs.float(), self._y)
        loss.backward()
        self._optimizer.step()
        value = loss.item()
        self.last_metrics = {"skipped": not math.isfinite(value)}
        return value

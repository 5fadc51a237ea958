"""torchvision's residual networks in float64, and one training step and one evaluation of them, as arrays."""

import copy
import importlib.util
import re
from pathlib import Path

import numpy as np
import torch


def _declare_operators():
    """Without its compiled operators torchvision cannot be imported, for it describes them; networks need none.

    So operators that are not there are declared by name, where the compiled library is missing or does not load.
    """
    folder = Path(importlib.util.find_spec("torchvision").origin).parent
    text = (folder / "_meta_registrations.py").read_text(encoding="utf-8")
    found = re.findall(r'register_(?:meta\("|fake\("torchvision::)(\w+)"', text)
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in dict.fromkeys(found):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor x) -> Tensor")
    return library


try:
    import torchvision
except (RuntimeError, OSError):
    _operators = _declare_operators()  # they last as long as this
    import torchvision

from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet  # noqa: E402

WIDTHS, CLASSES = (2, 3, 4, 6), 5
# The arguments of `jbn.networks.resnet` and of torchvision's class for networks that are small enough for a file.
NARROW = {
    "basic": ({"block": "basic", "blocks": (2, 1, 1, 2)}, BasicBlock),
    "bottleneck": ({"block": "bottleneck", "blocks": (1, 2, 1, 1)}, Bottleneck),
}


class Narrow(ResNet):
    """torchvision's network with other widths, which its constructor does not take."""

    def _make_layer(self, block, planes, *args, **options):
        planes = WIDTHS[(64, 128, 256, 512).index(planes)]
        if planes == WIDTHS[0]:
            self.inplanes = planes
            self.conv1 = torch.nn.Conv2d(3, planes, 7, 2, 3, bias=False)
            self.bn1 = torch.nn.BatchNorm2d(planes)
        return super()._make_layer(block, planes, *args, **options)


def narrow(name):
    options, block = NARROW[name]
    model = Narrow(block, list(options["blocks"]))
    model.fc = torch.nn.Linear(WIDTHS[-1] * block.expansion, CLASSES)
    return trained(model)


def whole(depth):
    return trained(getattr(torchvision.models, f"resnet{depth}")(num_classes=7))


def trained(model):
    """As after training: nothing is 0 or 1. Numbers have float32's precision and float64's dtype."""
    torch.manual_seed(0)
    model = model.float()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.2)
            torch.nn.init.normal_(module.running_mean, std=0.3)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
            module.num_batches_tracked.fill_(7)
        elif isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            torch.nn.init.normal_(module.weight, std=(1 / module.weight[0].numel()) ** 0.5)
    torch.nn.init.normal_(model.fc.bias)
    return model.double()


def images(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def answers(model, x):
    """Arrays by name, for images (N, H, W, C).

    ``logits`` in both modes and of the network that PyTorch folds; ``grad/…`` of the sum of the training logits, each
    times an entry of ``cotangent``; ``before/…`` and ``after/…``, the state dict around the training pass.
    """
    x = torch.as_tensor(x).double().permute(0, 3, 1, 2)
    model, numbers = copy.deepcopy(model), np.random.default_rng(1)
    found = {f"before/{k}": v.clone() for k, v in model.state_dict().items()}
    found["logits/evaluation"] = model.eval()(x)
    found["logits/folded"] = folded(model)(x)
    logits = model.train()(x)
    cotangent = torch.as_tensor(numbers.normal(size=logits.shape))
    (logits * cotangent).sum().backward()
    found |= {"logits/training": logits, "cotangent": cotangent}
    found |= {f"grad/{k}": v.grad for k, v in model.named_parameters()}
    found |= {f"after/{k}": v for k, v in model.state_dict().items()}
    return {name: value.detach().numpy() for name, value in found.items()}


def folded(model):
    """The network in evaluation mode, with each norm folded by PyTorch into the convolution before it."""
    fuse = torch.nn.utils.fusion.fuse_conv_bn_eval
    model = copy.deepcopy(model).eval()
    for module in list(model.modules()):
        for i in (1, 2, 3):
            if hasattr(module, f"bn{i}"):
                setattr(module, f"conv{i}", fuse(getattr(module, f"conv{i}"), getattr(module, f"bn{i}")))
                setattr(module, f"bn{i}", torch.nn.Identity())
        if getattr(module, "downsample", None) is not None:
            module.downsample = fuse(*module.downsample)
    return model

"""Reference networks as pairs of pure functions over plain dicts: W, b, γ and β of each layer in sight."""

from jbn.networks._fold import fold
from jbn.networks._mlp import mlp
from jbn.networks._network import Network
from jbn.networks._residual import imagenet
from jbn.networks._resnet import resnet

__all__ = ["Network", "fold", "imagenet", "mlp", "resnet"]

"""Compilers for machines that are not there. Import it before jax, since it sets what they read by then."""

import os
from typing import Any

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing runs, so two may compile at once
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import harness
from jax.experimental import topologies

from jbn.cli.bench.contestants import versions
from jbn.cli.bench.engine import said


def compiler(run: harness.Run, title: str, target: str) -> list[Any]:
    """The devices of ``target``: "gpu", or a topology of TPUs such as v5e:2x2. None where it is to be skipped."""
    package = "jax-cuda12-pjrt" if target == "gpu" else "libtpu"
    try:
        if target == "gpu":
            profile = (harness.HERE / "h100_sxm.txtpb").read_text()
            described = topologies.get_topology_desc("h100", "cuda", topology="1x1x1", target_config=profile)
        else:
            described = topologies.get_topology_desc(target, "tpu")
        devices = list(described.devices)
    except Exception as error:
        run.skipped[title] = f"{said(error)} ({package} is needed)"
        return []
    run.versions |= versions([package])
    return devices

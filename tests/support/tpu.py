"""Programs compiled ahead of time for TPUs that need not be there, by a process of its own.

libtpu holds a lock and stays loaded, so no test loads it: :func:`compiled` starts this file, which prints what
it found as JSON.
"""

import importlib.util
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support.counting import Hlo

from jbn import BNParams, BNState, BNStats, bn_apply, bn_update_stats

STATS = BNStats(P(), P(), P())
SHAPE = (32, 16, 16, 128)
# What a call of bn_apply may ask for; `train` is True unless told.
OPTIONS = {
    "plain": {},
    "mask": {},
    "ghost": {"ghost_size": 8},
    "renorm": {"renorm": (1.5, 0.5)},
    "axis_name": {"axis_name": "data"},
    "mask and axis_name": {"axis_name": "data"},
    "evaluation": {"train": False},
}


def compiled(programs, timeout=500):
    """What :func:`main` prints of ``programs``, the name of a function here; skips where libtpu is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu, which compiles for TPUs without one: pip install libtpu")
    # libtpu ends the process at flags of XLA:CPU that it does not know.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r}); import support.tpu as t; t.main()"
    command = [sys.executable, "-c", code, programs]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def main():
    print(json.dumps(globals()[sys.argv[1]]()))


def every_option():
    """For each option, dtype and program, what went wrong, in one line, or nothing."""
    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    mesh = topologies.make_mesh(chips, (4,), ("data",))
    results = {}
    for option, keywords in OPTIONS.items():
        for dtype in ("float32", "bfloat16"):
            for program in (_forward, _gradient):
                name = f"{option}, {dtype}, {program.__name__.strip('_')}"
                try:
                    _compile_layer(program, mesh, dtype, "mask" in option, keywords)
                    results[name] = ""
                except Exception as error:  # whatever it is, it belongs into the table
                    results[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return results


def _forward(params, state, x, mask, **keywords):
    y, stats = bn_apply(params, state, x, mask=mask, **keywords)
    return y, bn_update_stats(state, stats)


def _gradient(params, state, x, mask, **keywords):
    def loss(params, x):
        y, new = _forward(params, state, x, mask, **keywords)
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), new

    return jax.grad(loss, (0, 1), has_aux=True)(params, x)


def _compile_layer(program, mesh, dtype, masked, keywords):
    keywords = {"train": True, **keywords}
    rows = P("data") if "axis_name" in keywords else P()
    channels = SHAPE[-1:]
    params = BNParams(*[_array(mesh, P(), channels)] * 2)
    state = BNState(*[_array(mesh, P(), channels)] * 2, _array(mesh, P(), channels, "int32"))
    x = _array(mesh, rows, SHAPE, dtype)
    mask = _array(mesh, rows, (SHAPE[0], 1, 1, 1), "bool") if masked else None
    run = partial(program, **keywords)
    if "axis_name" in keywords:
        out_specs = (rows, P()) if program is _forward else ((P(), rows), P())
        in_specs = (P(), P(), rows, rows if masked else None)
        run = jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
    jax.jit(run).lower(params, state, x, mask).compile()


def _array(mesh, spec, shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def received_by_each_of_256_chips():
    """Bytes for each of 512 channels, forward and forward+backward; an all-reduce brings its operand twice."""
    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:16x16")
    mesh, channels = topologies.make_mesh(chips, (256,), ("data",)), 512

    def forward(params, x):
        return bn_apply(params, None, x, train=True, axis_name="data")

    def both(params, x):
        y, vjp, stats = jax.vjp(lambda x: forward(params, x), x, has_aux=True)
        return vjp(y)[0], stats

    def received(fn):
        run = jax.shard_map(fn, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P("data"), STATS))
        args = BNParams(*[_array(mesh, P(), (channels,))] * 2), _array(mesh, P("data"), (256 * 8, channels))
        total = 0.0
        for collective in Hlo(jax.jit(run).lower(*args).compile().as_text()).collectives():
            opcode = collective.opcode.removesuffix("-start")
            assert opcode in ("all-reduce", "all-gather")
            total += (2 if opcode == "all-reduce" else 1) * 4 * max(collective.sizes) * 255 / 256
        return total / channels

    return {"forward": received(forward), "both": received(both)}

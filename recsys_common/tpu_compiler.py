"""What does XLA make of a lowered step, for a TPU that is not there or for the processor that is?

    python -m recsys_common.tpu_compiler job.json result.json

A program of its own, since JAX and TensorFlow do not share a process; tpu.py writes the job and reads the result. The
job: {"hlo": file, "topology": "v5e:2x2" | "cpu" | "gpu", "shard": {parameter: true}, "text": file, "seconds": 5}. On a
slice, a parameter of `shard` is split by its first dimension among the chips and the others are on every chip.

All private API of this project is here: jaxlib's compiler, in the versions of `TESTED`.

Needs: hlo.py
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import sys
import time
from pathlib import Path

from recsys_common.hlo import Program

TESTED = {"jax": "0.10.2", "jaxlib": "0.10.2", "libtpu": "0.0.52"}
INSTALL = "pip install " + " ".join(f"{name}=={version}" for name, version in TESTED.items() if name != "jaxlib")


def missing(topology: str = "v5e:1x1") -> str:
    """What is not there, or not in the version that this file was tested with; "" if nothing."""
    wrong = []
    for name, version in TESTED.items():
        if name == "libtpu" and topology in ("cpu", "gpu"):
            continue
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = "none"
        if found != version:
            wrong.append(f"{name} {version} is needed, found {found}")
    return f"{'; '.join(wrong)}: {INSTALL}. It is Linux's only; nothing of it is needed to train." if wrong else ""


def compiled(job: dict) -> dict:
    """Compile, and run if the job says so; see `tpu.Report` for the result.

    Raises:
      RuntimeError: other versions than `TESTED`.
      Whatever the compiler raises.
    """
    if wrong := missing(job["topology"]):
        raise RuntimeError(wrong)
    here = job["topology"] in ("cpu", "gpu")
    os.environ["JAX_ENABLE_X64"] = "1"  # or int64 variables would become int32
    os.environ["JAX_PLATFORMS"] = {"gpu": "cuda"}.get(job["topology"], "cpu")
    # Nothing is to be asked: no metadata server, no chips; and as none is shared, several may compile at once.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    os.environ |= {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    text = Path(job["text"])
    os.environ["XLA_FLAGS"] = f"--xla_dump_to={text.parent} --xla_dump_hlo_as_text --xla_dump_hlo_pass_re=^$"
    import jax
    from jax._src.interpreters import mlir
    from jax._src.lib import xla_client
    from jax.experimental import topologies
    from jaxlib.mlir import ir

    # A v4 chip's two cores work as one device, which libtpu has to be told.
    how = {"chip_config_name": "megacore"} if job["topology"].startswith("v4") else {}
    try:
        devices = jax.devices()[:1] if here else topologies.get_topology_desc(job["topology"], "tpu", **how).devices
    except Exception as error:  # of the asker, not of the step
        raise LookupError(f"topology {job['topology']!r}: {error}") from None
    computation = xla_client.XlaComputation(Path(job["hlo"]).read_bytes())
    stable = xla_client._xla.mlir.xla_computation_to_mlir_module(computation)
    # TensorFlow's copies of outputs have no StableHLO counterpart; a reshape to the same shape is the identity.
    stable = re.sub(r"mhlo\.copy (%\S+) : (tensor<[^>]*>)", r"stablehlo.reshape \1 : (\2) -> \2", stable)
    options = xla_client.CompileOptions()
    with mlir.make_ir_context():
        module = ir.Module.parse(stable)
        if len(devices) > 1:
            _split(module, options, len(devices), job["shard"])
        start = time.perf_counter()
        client = devices[0].client
        executable = (client.compile_and_load if here else client.compile)(
            module, executable_devices=xla_client.DeviceList(tuple(devices)), compile_options=options
        )
        seconds = time.perf_counter() - start
    [optimized] = text.parent.glob("*after_optimizations.txt") if not here else [None]
    text.write_text(executable.hlo_modules()[0].to_string() if here else optimized.read_text())
    memory, cost = executable.get_compiled_memory_stats(), executable.cost_analysis()
    result = {
        "seconds_to_compile": seconds,
        "chips": len(devices),
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
        "compiler_memory": _high_water(),
        "flops": cost.get("flops", 0.0),
        "compiler_bytes": cost.get("bytes accessed", 0.0),
    }
    if here and job.get("seconds"):
        result["steps"] = _run(executable, devices[0], Program(text.read_text()), job)
    return result


def _high_water() -> int:
    """Bytes that this process had at most."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def _split(module, options, count: int, shard: dict[str, bool]) -> None:
    """Let XLA partition a program: the way of GSPMD, by a sharding at each parameter."""
    import numpy as np
    from jax._src.lib import xla_client
    from jaxlib.mlir import ir

    [main] = [
        each for each in module.body.operations if getattr(each, "sym_name", None) and each.sym_name.value == "main"
    ]
    shardings = []
    for number, kind in enumerate(main.type.inputs):
        ones = ["1"] * (len(ir.RankedTensorType(kind).shape) - 1)
        split = f"{{devices=[{','.join([str(count), *ones])}]<=[{count}]}}"
        value = ir.StringAttr.get(split if shard.get(str(number)) else "{replicated}")
        shardings.append(ir.DictAttr.get({"mhlo.sharding": value}))
    main.arg_attrs = ir.ArrayAttr.get(shardings)
    build = options.executable_build_options
    build.num_replicas, build.num_partitions, build.use_spmd_partitioning = 1, count, True
    build.allow_spmd_sharding_propagation_to_output = [True]
    build.device_assignment = xla_client.DeviceAssignment.create(np.arange(count).reshape(1, count))


def _run(executable, device, program: Program, job: dict) -> list[float]:
    """Seconds of steps, each with the variables that the one before left."""
    import jax
    import numpy as np

    random, given = np.random.default_rng(1), np.load(job["values"]) if job.get("values") else {}
    dtypes = {"bf16": jax.numpy.bfloat16, "pred": np.bool_, "f16": np.float16}
    values = []
    for number, shape in enumerate(program.parameters()):
        dtype = dtypes.get(shape.dtype) or np.dtype(re.sub(r"\D", "", shape.dtype) and {
            "f": "float", "s": "int", "u": "uint"}[shape.dtype[0]] + shape.dtype[1:])  # fmt: skip
        if f"p{number}" in given:
            value = given[f"p{number}"].astype(dtype)
        elif np.dtype(dtype).kind in "iub":
            value = np.zeros(shape.dims, dtype)
        else:
            value = (random.random(shape.dims, np.float32) * 0.1).astype(dtype)
        values.append(jax.device_put(value, device))
    aliases, seconds, until = program.aliases(), [], time.perf_counter() + job["seconds"]
    while len(seconds) < 5 or (time.perf_counter() < until and len(seconds) < 200):
        start = time.perf_counter()
        outputs = executable.execute_sharded(values).disassemble_into_single_device_arrays()
        for output in outputs:
            output[0].block_until_ready()
        seconds.append(time.perf_counter() - start)
        for output, parameter in aliases.items():
            values[parameter] = outputs[output][0]
    return seconds[1:]  # the first one touches fresh pages


if __name__ == "__main__":
    try:
        answer = compiled(json.loads(Path(sys.argv[1]).read_text()))
    except Exception as error:  # whatever it is, the process that asked tells it
        answer = {"error": f"{type(error).__name__}: {error}"}
    Path(sys.argv[2]).write_text(json.dumps(answer))

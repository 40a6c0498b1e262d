"""Where does a training run get its strategy, and is the device the one that was asked for?

    strategy = get_strategy("tpu")     # or "auto", "cpu", "cpus:4", "gpu", the name of a TPU; before TensorFlow
    with strategy.scope(): ...

No TPU was there to try this on: see the README for what was run and what was not.

Needs: scale.py embeddings.py optimizers.py errors.py (when there is a TPU)
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
from pathlib import Path

# What TensorFlow's PJRT plugin for TPUs reads at import (keras-io, distributed_embedding_tf, run on a v6e).
ENVIRONMENT = {
    "PJRT_DEVICE": "TPU",
    "NEXT_PLUGGABLE_DEVICE_USE_C_API": "true",
    "TF_XLA_FLAGS": "--tf_mlir_enable_mlir_bridge=true --tf_mlir_enable_convert_control_to_data_outputs_pass=true "
    "--tf_mlir_enable_merge_control_flow_pass=true",
}
# libtpu of this version and later lacks what tensorflow-tpu 2.20.0 looks up when it is imported: that aborts.
LIBTPU_BEFORE = (0, 0, 32)


def get_strategy(device: str = "auto"):
    """The `tf.distribute` strategy of a device, which has computed something before it is returned.

    Args:
      device: "auto": TPUs if this machine and its TensorFlow have them, else GPUs, else the CPU; "cpu"; "cpus:4",
        logical devices that share this CPU, to rehearse replicas; "gpu", all of them; "tpu", the chips of this machine
        (a TPU VM, a Colab TPU runtime); or the name of a TPU. For a TPU call this before anything imports TensorFlow,
        which reads its environment once.

    Raises:
      RuntimeError: the device is not there, not the one asked for, or cannot be used any more in this process.
    """
    installed = {each.metadata["Name"] for each in importlib.metadata.distributions()}
    if device == "auto" and _chips() and "tensorflow-tpu" in installed:
        device = "tpu"
    if not re.fullmatch(r"auto|cpu|gpu|cpus:\d+", device):
        return _tpu_strategy("local" if device == "tpu" else device)
    import tensorflow as tf

    if device == "auto":
        device = "gpu" if tf.config.list_physical_devices("GPU") else "cpu"
    if device == "gpu":
        found = tf.config.list_physical_devices("GPU")
        if not found:
            raise RuntimeError(
                "no GPU: TensorFlow sees none; `nvidia-smi`, then tensorflow[and-cuda], then its warnings"
            )
        strategy = tf.distribute.MirroredStrategy() if len(found) > 1 else tf.distribute.OneDeviceStrategy("/gpu:0")
    elif device == "cpu":
        strategy = tf.distribute.OneDeviceStrategy("/cpu:0")
    else:
        count = int(device.removeprefix("cpus:"))
        [cpu] = tf.config.list_physical_devices("CPU")
        try:
            tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * count)
        except RuntimeError:  # TensorFlow has begun; it may have as many already
            if len(tf.config.list_logical_devices("CPU")) < count:
                raise RuntimeError(
                    f"{device}: TensorFlow has started with {len(tf.config.list_logical_devices('CPU'))} logical CPU; "
                    "call get_strategy before anything computes (in a notebook: restart the kernel)"
                ) from None
        strategy = tf.distribute.MirroredStrategy([f"/cpu:{number}" for number in range(count)])
    return _asserted(strategy, "GPU" if device == "gpu" else "CPU")


def _chips() -> list[Path]:
    """Those of this machine: v2 to v4 are there by the first name, newer ones (and other devices) by the second."""
    return sorted(Path("/dev").glob("accel*")) + sorted(Path("/dev/vfio").glob("[0-9]*"))


def _tpu_strategy(name: str):
    if name == "local" and not _chips():
        raise RuntimeError(
            "no TPU chip in this machine (no /dev/accel*, no /dev/vfio/*). On Colab: Runtime, Change runtime type. "
            "Elsewhere give the name of a TPU, or rehearse: python -m recsys_common.tpu config.yaml --topology v5e:1x1"
        )
    try:
        version = importlib.metadata.version("tensorflow-tpu")
    except importlib.metadata.PackageNotFoundError:
        raise RuntimeError(
            "tensorflow-tpu is not installed: this TensorFlow has no TPU support. pip uninstall -y tensorflow; "
            "pip install --no-deps --require-hashes -r requirements-tpu.txt (2.20.0: there is no 2.21)"
        ) from None
    libtpu_version = importlib.metadata.version("libtpu")
    if tuple(map(int, libtpu_version.split(".")[:3])) >= LIBTPU_BEFORE:
        raise RuntimeError(
            f"libtpu {libtpu_version}: tensorflow-tpu {version} would abort on import; pip install --no-deps "
            "--require-hashes -r requirements-tpu.txt installs the two that fit"
        )
    absent = [key for key in ENVIRONMENT if key not in os.environ]
    if absent and "tensorflow" in sys.modules:
        raise RuntimeError(
            f"TensorFlow was imported without {', '.join(absent)} in the environment, which it reads once. Restart "
            "Python and call get_strategy first"
        )
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    import libtpu

    os.environ.setdefault("TF_PLUGGABLE_DEVICE_LIBRARY_PATH", libtpu.get_library_path())
    import tensorflow as tf

    from recsys_common import errors

    with errors.decoding():
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=name)
        if name != "local":
            tf.config.experimental_connect_to_cluster(resolver)
        topology = tf.tpu.experimental.initialize_tpu_system(resolver)
        # Some versions place replicas on no core unless they are told.
        assignment = tf.tpu.experimental.DeviceAssignment.build(
            topology, num_replicas=resolver.num_accelerators().get("TPU", 1)
        )
        strategy = tf.distribute.TPUStrategy(resolver, experimental_device_assignment=assignment)
        try:
            return _asserted(strategy, "TPU")
        except RuntimeError as error:
            error.add_note(f"tensorflow-tpu {version}")
            raise


def _asserted(strategy, kind: str):
    """The strategy, once each of its devices has added two numbers and is of the kind that was asked for."""
    import tensorflow as tf

    devices = strategy.extended.worker_devices
    if not all(f":{kind}:" in device.upper() for device in devices):
        raise RuntimeError(f"asked for {kind}, and the strategy has {devices}; nothing was trained")
    seen = strategy.run(tf.function(lambda: tf.constant(1.0) + 1.0))
    for result in strategy.experimental_local_results(seen):
        if float(result) != 2 or f":{kind}:" not in result.device.upper():
            raise RuntimeError(f"asked for {kind}, and 1 + 1 = {float(result)} came from {result.device}")
    return strategy

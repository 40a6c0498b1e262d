"""How much memory does it take to save a model with a large table, and to load it?

    python benchmarks/_saving_memory.py [rows] [folder]

Each part runs in a process of its own. Its peak is the kernel's VmHWM: what the process ever held, mapped files
included. `base` is the process after its imports; of the rest the table is 1.0.

Needs nothing but the repository; 3 times the table on the disk.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROWS, DIM, ITEMS = 10_000_000, 32, 1000
PARTS = ("save", "load", "tensorflow alone", "onnx")


def measure(rows: int = ROWS, folder: str | None = None) -> list[dict]:
    """Rows for `scale.result`: of each part the peak less its base as a multiple of the table, both in MB, seconds."""
    table, found = rows * DIM * 4, []
    with tempfile.TemporaryDirectory(dir=folder) as model:
        for part in PARTS:
            arguments = [sys.executable, __file__, part, str(rows), model]
            done = subprocess.run(arguments, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{part}: {done.stderr[-2000:]}")
            about = json.loads(done.stdout.splitlines()[-1])
            case = "save" if part == "save" else f"load, {part}"
            found += [
                {"case": f"memory to {case}", "value": (about["peak"] - about["base"]) / table, "unit": "tables"},
                {"case": f"memory to {case}: peak", "value": about["peak"] / 1e6, "unit": "MB"},
                {"case": f"memory to {case}: after the imports", "value": about["base"] / 1e6, "unit": "MB"},
                {"case": f"seconds to {case}", "value": about["seconds"], "unit": "s"},
            ]
    return found


def _memory(field: str) -> int:
    [line] = [each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith(field)]
    return int(line.split()[1]) * 1024


def _part(part: str, rows: int, folder: str) -> dict:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import numpy as np

    if part == "onnx":
        import onnxruntime
    else:
        import tensorflow as tf
    if part in ("save", "load"):
        from recsys_common import saving
    if part == "save":
        import onnx  # noqa: F401  imports are no part of what is measured
        import onnxruntime
        import tf2onnx  # noqa: F401
        import usearch.index  # noqa: F401

        from recsys_common.models.matrix_factorization import MatrixFactorization

        base = _memory("VmRSS")
        model = MatrixFactorization(rows, ITEMS + 1, DIM)
        # As a vocabulary has them: in no order.
        ids = {"user_index": np.random.default_rng(0).permutation(rows - 1) * 7, "item_index": np.arange(ITEMS)}
        for _ in range(2):  # a table that was trained is read by rows, which changes how TensorFlow copies it
            model.user_table.scatter_sub(tf.IndexedSlices(tf.ones([2, DIM]), tf.constant([1, 2])))
        start = time.perf_counter()
        saving.export(Path(folder) / "model", model, ids)
        return {"base": base, "seconds": time.perf_counter() - start}
    base, start = _memory("VmRSS"), time.perf_counter()
    model = Path(folder) / "model"
    if part == "onnx":
        session = onnxruntime.InferenceSession(model / "onnx/user_embedding.onnx", providers=["CPUExecutionProvider"])
        found = session.run(["embedding"], {"user_index": np.arange(0, rows, rows // 100, np.int32)})[0]
    else:
        loaded = saving.load(model) if part == "load" else tf.saved_model.load(str(model / "saved_model"))
        ids = tf.constant(np.arange(0, rows, rows // 100) * 7)
        found = loaded.signatures["user_embedding"](user_id=ids)["embedding"].numpy()
    assert np.isfinite(found).all() and found.any()
    return {"base": base, "seconds": time.perf_counter() - start}


if __name__ == "__main__":
    if len(sys.argv) == 4:
        about = _part(sys.argv[1], int(sys.argv[2]), sys.argv[3])
        print(json.dumps(about | {"peak": _memory("VmHWM")}))
    else:
        for row in measure(int(sys.argv[1]) if len(sys.argv) > 1 else ROWS, *sys.argv[2:3]):
            print(json.dumps(row))

"""Importing the package: which Keras, how fast, and what it drags in."""

import subprocess
import sys
import time

import pytest

QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3"}


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    import os

    clean = {name: value for name, value in os.environ.items() if name != "TF_USE_LEGACY_KERAS"}
    return subprocess.run(
        [sys.executable, "-c", code], env=clean | QUIET | env, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    "code",
    [
        "import recsys_common, tensorflow as tf",
        "import tensorflow as tf; import recsys_common",  # tf.keras is lazy: not touched yet
        "import keras; import recsys_common, tensorflow as tf",  # Keras 3 itself does no harm
    ],
)
def test_tf_keras_is_chosen(code):
    done = python(f"{code}; import tensorflow_recommenders; print(tf.keras.Model.__module__)")
    assert done.stdout.startswith("tf_keras."), done.stderr[-500:]


def test_keras_3_touched_first_is_refused_with_the_cure():
    done = python("import tensorflow as tf; tf.keras.Model; import recsys_common")
    assert done.returncode != 0
    assert "tf.keras is already Keras 3 in this process" in done.stderr
    assert "restart the kernel" in done.stderr


def test_an_environment_that_asks_for_keras_3_is_refused():
    done = python("import recsys_common", TF_USE_LEGACY_KERAS="0")
    assert done.returncode != 0
    assert "TF_USE_LEGACY_KERAS='0'" in done.stderr and "Unset the variable" in done.stderr


def test_what_needs_no_tensorflow_does_not_import_it():
    modules = "bigquery, cleanup, costs, datasets, devices, doctor, embedded_bigquery, hlo, prices, scale, tpu, "
    modules += "tpu_compiler, tpu_pictures, training_costs"
    done = python(
        f"import sys; from recsys_common import {modules}; from recsys_common.datasets import movielens, netflix, "
        "simulated; print('tensorflow' in sys.modules)"
    )
    assert done.stdout.strip() == "False", done.stderr[-500:]


def test_import_adds_less_than_300_ms_to_tensorflow():
    code = "import time, tensorflow; t = time.perf_counter(); import recsys_common; print(time.perf_counter() - t)"
    assert float(python(code).stdout) < 0.3


def test_doctor_answers_and_finds_nothing_broken():
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "recsys_common.doctor"], capture_output=True, text=True, timeout=60, check=False
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout
    assert all(line.startswith(("[OK]", "[FAIL]", "[skip]")) for line in lines[:-1])
    assert any("[OK]   embedded BigQuery" in line for line in lines)
    # 3 s on a machine with nothing else to do is the goal (benchmarks/road.json); here others may be at work.
    assert time.perf_counter() - start < 15


def test_doctor_names_what_is_wrong(monkeypatch, tmp_path, capsys):
    from recsys_common import doctor

    lock = tmp_path / "requirements.txt"
    lock.write_text("numpy==0.0.1 \\\n    --hash=sha256:00\n")
    monkeypatch.setattr(doctor, "LOCK", lock)
    monkeypatch.setattr(doctor, "CHECKS", {"packages": doctor.lock, "GPU": doctor.gpu})
    monkeypatch.setattr(sys, "argv", ["doctor"])
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi
    assert doctor.main() == 1
    said = capsys.readouterr().out
    assert "[FAIL] packages" in said and "numpy" in said and "(locked: 0.0.1)" in said
    assert "[skip] GPU" in said

"""Which Keras is `tf.keras`? This package needs the answer to be tf-keras (Keras 2), and settles it on import.

    import recsys_common          # before or after `import tensorflow`, but before the first use of `tf.keras`

TensorFlow Recommenders refuses Keras 3, and only tf-keras has stock optimizers that stay row-sparse (chapter 4).
`tf.keras` decides for good at its first attribute access, by the environment variable TF_USE_LEGACY_KERAS; so the
variable is set here, and an import that comes too late fails now, with the cure, rather than in the first `fit`.
Nothing here imports TensorFlow.

`python -m recsys_common...` does not look for modules in the current folder, as Python would: a config names the module
of its architecture, and a folder that came with a config could bring one. `--allow-own-code`, or RECSYS_OWN_CODE=1 in
the environment, is for who trusts the folder.

Needs: nothing else.
"""

import os
import sys

__version__ = "0.1.0"


def _settle_keras() -> None:
    """Make `tf.keras` tf-keras, or say why that is no longer possible."""
    wanted = os.environ.get("TF_USE_LEGACY_KERAS")
    if wanted is not None and wanted not in ("1", "true", "True"):
        raise ImportError(
            f"TF_USE_LEGACY_KERAS={wanted!r} in the environment asks for Keras 3, but recsys_common needs tf-keras "
            "(TensorFlow Recommenders refuses Keras 3). Unset the variable, or set it to 1, and start Python again."
        )
    os.environ["TF_USE_LEGACY_KERAS"] = "1"
    # TensorFlow keeps a lazy loader at tf.keras and replaces it by the module it chose at the first touch.
    keras = vars(sys.modules["tensorflow"]).get("keras") if "tensorflow" in sys.modules else None
    if keras is not None and object.__getattribute__(keras, "__dict__").get("__name__", "").startswith("keras."):
        raise ImportError(
            "tf.keras is already Keras 3 in this process: something used it before recsys_common was imported, and "
            "TensorFlow chooses only once. Restart Python (in a notebook: restart the kernel) and import "
            "recsys_common first, or set TF_USE_LEGACY_KERAS=1 before TensorFlow is used."
        )


def _forget_the_current_folder() -> None:
    """Before anything else is imported; while Python looks for what `-m` names, that stands for the program's name."""
    trusted = "--allow-own-code" in sys.argv or os.environ.get("RECSYS_OWN_CODE") == "1"
    if sys.argv[:1] == ["-m"] and not trusted and sys.path[:1] == [os.getcwd()]:
        del sys.path[0]


# TensorFlow's C++ start-up notes would land in every notebook; warnings and errors of Python code still show.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
_forget_the_current_folder()
_settle_keras()

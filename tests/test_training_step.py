"""What a step takes from its config and its layers; tests/test_training.py has whole runs."""

import pytest
import tensorflow as tf

from recsys_common import training_step
from recsys_common.config import Config
from recsys_common.embeddings import Embeddings, Table

CONFIG = Config(
    features={"user": {"kind": "index", "column": "user_index", "rows": 9}},
    optimizer={"second_moment": "row", "correct_skipped": True, "weight_decay": 0.25},
)


class Penalized(training_step.tfrs.Model):
    """A table, and a dense layer with a penalty on its kernel."""

    def __init__(self):
        super().__init__()
        self.rows = Embeddings({"user": Table("users", 9, 2)})
        self.dense = tf.keras.layers.Dense(1, kernel_initializer="ones", kernel_regularizer=lambda x: 3 * tf.norm(x, 1))

    def compute_loss(self, batch, training=False):
        return tf.reduce_sum(self.dense(self.rows(batch)["user"])) * 0 + 1


def test_the_tables_optimizer_takes_what_the_config_says():
    rows, _ = training_step.optimizer(CONFIG, Penalized(), 10).optimizers
    assert (rows.second_moment, rows.correct_skipped, rows.weight_decay, rows.clip_norm) == ("row", True, 0.25, None)


def test_the_loss_has_the_penalties_of_layers():
    batch = {"user": tf.constant([1, 2])}
    assert float(training_step.loss_of(Penalized(), batch, training=True)) == 1 + 3 * 2


def test_a_function_that_forgets_its_model_is_told():
    with pytest.raises(ValueError, match=r"NoneType: expected a tfrs\.Model"):
        training_step.made(CONFIG, lambda: None)

"""How is a table trained at the cost of the rows touched?

    model.compile(optimizer=LazyAdam(1e-3))    # or RowWiseAdagrad, Adagrad: a step costs what the batch looked up
    check_sparse(model, dataset.element_spec)  # or the error that names what would make it cost the whole table

In tf-keras Adagrad updates a table by rows, and so do legacy SGD, Adagrad, Adadelta, Adamax and Ftrl. Adam and the
others walk through all of it, and weight decay or EMA makes Adagrad do so too. Here the rows that a gradient's
`tf.IndexedSlices` name are read, changed and written; the others stay as they are.

What holds for all three optimizers:

- A variable with a dense gradient is updated in full by the same rule, so that one optimizer can train a whole model.
- The arithmetic and the slots are float32. A bfloat16 variable is rounded up or down by chance, in proportion: to the
  nearest, a change of less than 1/512 of a number would always be lost.
- weight_decay is decoupled (Loshchilov & Hutter 2019): row -= learning_rate * weight_decay * row, of touched rows only.
- clip_norm scales the gradient of each variable, by itself, down to that norm. Of a table it is the norm over the
  touched rows, after duplicates are summed.
- learning_rate may be a `tf.keras.optimizers.schedules.LearningRateSchedule`.
- A checkpoint finds the slots among the optimizer's variables; `slots(variable)` are one variable's own.

Tables and dense layers by different optimizers, through TFRS:

    tfrs.experimental.optimizers.CompositeOptimizer([
        (LazyAdam(1e-3), lambda: [model.user_table, model.item_table]),
        (tf.keras.optimizers.Adam(1e-3), lambda: model.dense.trainable_variables),
    ])  # its annotation asks for legacy optimizers; it takes these as well

Needs: nothing else.
"""

from __future__ import annotations

import functools
import linecache
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import tensorflow as tf
from tensorflow.python.ops.resource_variable_ops import UninitializedVariable

_LIBRARIES = tuple(
    str(Path(tf.__file__).parent.parent / name) + os.sep
    for name in ("tensorflow", "tf_keras", "tensorflow_recommenders")
)
_OPTIMIZERS = str(Path(tf.__file__).parent.parent / "tf_keras" / "src" / "optimizers") + os.sep


class _RowSparse(tf.keras.optimizers.Optimizer):
    """What the optimizers share. A variable is seen as [rows, width], whatever its rank; a scalar as [1, 1].

    A subclass gives `_make_slots(variable) -> [tf.Variable]` and
    `_rule(g, slots, rate) -> (what to take off the rows, [the slots' new rows])`, with g float32 [n, width].
    """

    # Of tf.unique, by which tf-keras sums duplicate ids, XLA makes a loop of one trip for each id. True: sum them by a
    # sort, and write the row of an id as often as it is there, each time the same. Set it under XLA and on a TPU.
    static_shapes = False

    def __init__(self, name, learning_rate, weight_decay, clip_norm, **settings):
        # jit_compile: XLA would compile anew for every number of distinct ids (tf-keras asks for it on a GPU).
        super().__init__(name=name, weight_decay=weight_decay, jit_compile=False)
        self._learning_rate = self._build_learning_rate(learning_rate)
        self._settings = {**settings, "weight_decay": weight_decay, "clip_norm": clip_norm}
        for setting, value in self._settings.items():
            setattr(self, setting, value)

    def get_config(self) -> dict:
        """The constructor's arguments."""
        rate = self._serialize_hyperparameter(self._learning_rate)
        return {"name": self.name, "learning_rate": rate, **self._settings}

    def build(self, variables):
        """Make the slots of these variables, at the first call."""
        super().build(variables)
        if not getattr(self, "_built", False):
            self._built = True
            self.row_slots = [self._make_slots(variable) for variable in variables]

    def slots(self, variable: tf.Variable) -> list[tf.Variable]:
        """The slots of a variable that the optimizer was built with: each [rows] or [rows, columns]."""
        return list(self.row_slots[self._index_dict[self._var_key(variable)]])

    def _slot(self, variable, name, columns, value=0.0, dtype=tf.float32):
        rows = variable.shape[0] if variable.shape.rank else 1
        shape = [rows, columns] if columns else [rows]
        with tf.distribute.get_strategy().extended.colocate_vars_with(variable):
            slot = tf.Variable(
                # The variable takes over the tensor's memory: the table never exists twice.
                lambda: tf.fill(shape, tf.cast(value, dtype)), shape=shape, dtype=dtype, trainable=False,
                name=f"{variable.name.split(':')[0]}/{name}",
            )  # fmt: skip
        self._variables.append(slot)
        return slot

    def _apply_weight_decay(self, variables):
        """Nothing: tf-keras would decay every row of a table. update_step decays those that are touched."""

    def apply_gradients(self, grads_and_vars, *args, **kwargs):
        """As in tf-keras; bfloat16 gradients become float32 first, or those of a popular row would stop adding up."""

        def wide(gradient):
            if isinstance(gradient, tf.IndexedSlices):
                return tf.IndexedSlices(wide(gradient.values), gradient.indices, gradient.dense_shape)
            return gradient if gradient is None else tf.cast(gradient, tf.float32)

        return super().apply_gradients([(wide(g), variable) for g, variable in grads_and_vars], *args, **kwargs)

    def _deduplicate_sparse_grad(self, gradients):
        if not self.static_shapes:
            return super()._deduplicate_sparse_grad(gradients)
        return [_summed(g) if isinstance(g, tf.IndexedSlices) else g for g in gradients]

    def update_step(self, gradient, variable):
        """Change the rows that a gradient touches; duplicate ids are summed by now."""
        index, ids = self._index_dict[self._var_key(variable)], None
        if isinstance(gradient, tf.IndexedSlices):
            gradient, ids = gradient.values, gradient.indices

        def read(var):
            return var.read_value() if ids is None else var.sparse_read(ids)

        def write(var, value):
            var.assign(value) if ids is None else var.scatter_update(tf.IndexedSlices(value, ids))

        width = _width(variable)
        g = tf.reshape(tf.cast(gradient, tf.float32), [-1, width])
        if self.clip_norm is not None:
            once = g * tf.cast(_first(ids), tf.float32)[:, None] if self.static_shapes and ids is not None else g
            g *= self.clip_norm / tf.maximum(tf.norm(once), self.clip_norm)
        rate = tf.cast(self.learning_rate, tf.float32)
        rows = tf.reshape(tf.cast(read(variable), tf.float32), [-1, width])
        # A mirrored variable cannot be read by rows, the copy that stands on this device can.
        slots = [getattr(slot, "_get", lambda slot=slot: slot)() for slot in self.row_slots[index]]
        change, new = self._rule(g, [read(slot) for slot in slots], rate)
        if self.weight_decay and self._use_weight_decay(variable):
            rows -= rows * (rate * self.weight_decay)
        rows -= change
        if variable.dtype == tf.bfloat16:
            numbers = tf.range(tf.shape(rows)[0]) if ids is None else ids
            rows = stochastic_bfloat16(rows, numbers, self.iterations * len(self._index_dict) + index)
        # The rows that are known to be static, so that XLA can follow the number of distinct ids.
        rows = tf.reshape(rows, [-1, *variable.shape[1:]] if variable.shape.rank else [])
        for var, value in zip((*slots, variable), (*new, tf.cast(rows, variable.dtype)), strict=True):
            write(var, value)

    def _refuse_on_tpu(self, **settings):
        for setting, plain in settings.items():
            if (found := getattr(self, setting)) != plain:
                raise ValueError(f"{self.name}: TPU embeddings have no {setting}={found!r}, only {plain!r}")

    def _rate_after(self, steps):
        schedule = isinstance(self._learning_rate, tf.keras.optimizers.schedules.LearningRateSchedule)
        return self._learning_rate(steps) if schedule else self._learning_rate


def _summed(gradient: tf.IndexedSlices) -> tf.IndexedSlices:
    """Sorted by id, each id as often as before, with the sum of its rows in each place."""
    order = tf.argsort(gradient.indices, stable=True)
    ids, count = tf.gather(gradient.indices, order), tf.size(order)
    number = tf.cumsum(tf.cast(_first(ids), tf.int32)) - 1
    sums = tf.math.unsorted_segment_sum(tf.gather(gradient.values, order), number, count)
    return tf.IndexedSlices(tf.gather(sums, number), ids, gradient.dense_shape)


def _first(ids: tf.Tensor) -> tf.Tensor:
    """bool [n]: where sorted ids are not those before."""
    return tf.concat([tf.ones_like(ids[:1], tf.bool), ids[1:] != ids[:-1]], 0)


def _width(variable) -> int:
    return int(np.prod(variable.shape[1:]))


def _mix(x):
    """uint32 -> uint32, every bit of the answer depending on every bit of x (lowbias32 of C. Wellons)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        x = tf.bitwise.bitwise_xor(x, tf.bitwise.right_shift(x, tf.constant(shift, tf.uint32)))
        x = x * tf.constant(factor, tf.uint32)
    return x


def stochastic_bfloat16(values: tf.Tensor, rows: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
    """float32 [n, width] -> bfloat16, up or down with the probabilities that make the mean right.

    The choice is a pure function of (key, rows[i], column): replicas agree, and a run can be repeated.
    """
    columns = tf.cast(tf.range(values.shape[1]), tf.uint32) * tf.constant(0x9E3779B9, tf.uint32)
    noise = _mix(_mix(tf.cast(rows, tf.uint32) + _mix(tf.cast(key, tf.uint32)))[:, None] + columns)
    bits = tf.bitcast(values, tf.uint32) + tf.bitwise.right_shift(noise, tf.constant(16, tf.uint32))
    cut = tf.bitcast(tf.bitwise.bitwise_and(bits, tf.constant(0xFFFF0000, tf.uint32)), tf.float32)
    return tf.cast(tf.where(tf.math.is_finite(values), cut, values), tf.bfloat16)


class LazyAdam(_RowSparse):
    """Adam (Kingma & Ba 2015) in which a row that the batch did not touch keeps its moments and its place.

    For a touched row with gradient g in step t = iterations + 1:

        m = beta_1 m + (1 - beta_1) g,    v = beta_2 v + (1 - beta_2) g^2                                     (1)
        row -= learning_rate sqrt(1 - beta_2^t) / (1 - beta_1^t) * m / (sqrt(v) + epsilon)                    (2)

    t counts all steps, not those of the row, and epsilon stands beside sqrt(v), as in tf-keras Adam: where every row is
    touched in every step the two are equal.

    `tf.tpu.experimental.embedding.Adam` is lazy by default (lazy_adam=True), sums duplicates first by default
    (use_gradient_accumulation=True), and differs from (1) and (2) in two points. It corrects no bias and knows no step
    number: optimization_parameters.proto of TensorFlow asks for a dynamic learning rate instead, "user learning_rate *
    sqrt(1 - beta2^t) / (1 - beta1^t)". And its default, sum_inside_sqrt=True, divides by
    sqrt(v + epsilon^2). `tpu()` gives it the corrected rate and this optimizer's denominator, so that the updates are
    the same.

    Args:
      learning_rate: float or schedule.
      beta_1, beta_2, epsilon: of (1) and (2).
      second_moment: "element": v has the shape of the table; "row": one v for each row, of the mean of g^2 over the
        row, which needs half the memory for slots (in a dense variable one v for each index of its first axis).
      correct_skipped: do at a touch what dense Adam would have done to the row in the k steps since the last one:

            row -= rate m / (sqrt(v) + epsilon) * (r + r^2 + ... + r^k),    r = beta_1 / sqrt(beta_2)             (3)
            m = beta_1^k m,    v = beta_2^k v                                                                     (4)

        before (1). The moments are then those of dense Adam, and the row is close to its row: (3) takes one bias
        correction for the k steps, and today's learning rate. The batch itself still saw the row as it was, and a row
        that is never touched again is never moved again. Takes 4 bytes a row, for its last step. Needs r < 1, or (3)
        would grow without end, and an epsilon above 0, or it would divide 0 by 0 at a row's first touch.
      sum_inside_sqrt: divide by sqrt(v + epsilon^2), the TPU's default.
      weight_decay, clip_norm: see the top of this file.

    Slots: "moments" float32 [rows, 2 * width], m and v side by side (one look-up serves both), or [rows, width + 1];
    with correct_skipped "last_step" int32 [rows].
    """

    def __init__(
        self, learning_rate=1e-3, beta_1=0.9, beta_2=0.999, epsilon=1e-7, *, second_moment="element",
        correct_skipped=False, sum_inside_sqrt=False, weight_decay=0.0, clip_norm=None, name="LazyAdam",
    ):  # fmt: skip
        if second_moment not in ("element", "row"):
            raise ValueError(f"second_moment is {second_moment!r}, expected 'element' or 'row'")
        if correct_skipped and not (beta_1**2 < beta_2 and epsilon > 0):
            raise ValueError(
                f"correct_skipped: beta_1 is {beta_1}, beta_2 {beta_2}, epsilon {epsilon}; expected beta_1 below "
                "sqrt(beta_2), and epsilon above 0"
            )
        super().__init__(
            name, learning_rate, weight_decay, clip_norm, beta_1=beta_1, beta_2=beta_2, epsilon=epsilon,
            second_moment=second_moment, correct_skipped=correct_skipped, sum_inside_sqrt=sum_inside_sqrt,
        )  # fmt: skip

    def _make_slots(self, variable):
        width = _width(variable)
        slots = [self._slot(variable, "moments", width + (width if self.second_moment == "element" else 1))]
        return slots + ([self._slot(variable, "last_step", 0, 0, tf.int32)] if self.correct_skipped else [])

    def _correction(self, steps):
        t = tf.cast(steps, tf.float32) + 1
        return tf.sqrt(1 - tf.pow(self.beta_2, t)) / (1 - tf.pow(self.beta_1, t))

    def _direction(self, moments, width):
        m, v = moments[:, :width], moments[:, width:]
        return m / (tf.sqrt(v + self.epsilon**2) if self.sum_inside_sqrt else tf.sqrt(v) + self.epsilon)

    def _rule(self, g, slots, rate):
        old, width, change = slots[0], g.shape[1], 0.0
        square = g * g if self.second_moment == "element" else tf.reduce_mean(g * g, 1, keepdims=True)
        betas, new_slots = np.array([self.beta_1] * width + [self.beta_2] * (old.shape[1] - width)), []
        if self.correct_skipped:
            done = tf.cast(self.iterations, tf.int32)
            last, skipped = (tf.cast(steps, tf.float32)[:, None] for steps in (slots[1], done - slots[1]))
            # Most of (3) is moved in the first 1 / (1 - beta_1) steps: the bias correction of their middle.
            soon = self._correction(last + tf.minimum(skipped, 1 / (1 - self.beta_1)) / 2)
            r = self.beta_1 / self.beta_2**0.5
            change = self._direction(old, width) * (rate * soon * r * (1 - tf.pow(r, skipped)) / (1 - r))
            fade = tf.pow(np.float32([self.beta_1, self.beta_2]), skipped)
            old = tf.concat([old[:, :width] * fade[:, :1], old[:, width:] * fade[:, 1:]], 1)
            new_slots = [tf.zeros_like(slots[1]) + done + 1]
        new = old + (tf.concat([g, square], 1) - old) * np.float32(1 - betas)
        change += self._direction(new, width) * (rate * self._correction(self.iterations))
        return change, [new, *new_slots]

    def tpu(self, iterations: tf.Variable | None = None) -> tf.tpu.experimental.embedding.Adam:
        """The `tf.tpu.experimental.embedding` optimizer with the same updates.

        Args:
          iterations: steps made so far; None: this optimizer's own, which only its `apply_gradients` counts up. Give
            the dense layers' `optimizer.iterations` where tables are trained by the TPU alone.

        Raises:
          ValueError: a setting that a TPU does not have, or defines in another way.
        """
        self._refuse_on_tpu(second_moment="element", correct_skipped=False, weight_decay=0.0, clip_norm=None)
        steps = self.iterations if iterations is None else iterations
        return tf.tpu.experimental.embedding.Adam(
            learning_rate=lambda: self._rate_after(steps) * self._correction(steps), beta_1=self.beta_1,
            beta_2=self.beta_2, epsilon=self.epsilon, lazy_adam=True, sum_inside_sqrt=self.sum_inside_sqrt,
        )  # fmt: skip


class Adagrad(_RowSparse):
    """Adagrad (Duchi et al. 2011): a += g^2, row -= learning_rate g / sqrt(a + epsilon), as tf-keras writes it.

    Args:
      learning_rate: float or schedule.
      initial: of a, above 0.
      epsilon: as above.
      weight_decay, clip_norm: see the top of this file.

    Slots: "accumulator" float32 [rows, width].
    """

    def __init__(
        self, learning_rate=0.05, initial=0.1, epsilon=1e-7, *, weight_decay=0.0, clip_norm=None, name="Adagrad"
    ):
        super().__init__(name, learning_rate, weight_decay, clip_norm, initial=initial, epsilon=epsilon)

    def _make_slots(self, variable):
        return [self._slot(variable, "accumulator", _width(variable), self.initial)]

    def _rule(self, g, slots, rate):
        total = slots[0] + g * g
        return g * rate / tf.sqrt(total + self.epsilon), [total]

    def tpu(self, iterations: tf.Variable | None = None) -> tf.tpu.experimental.embedding.Adagrad:
        """The TPU's Adagrad, which has no epsilon: relative to `initial` it must be too small for float32.

        Args, Raises: as `LazyAdam.tpu`.
        """
        self._refuse_on_tpu(weight_decay=0.0, clip_norm=None)
        if self.epsilon > 1e-6 * self.initial:
            raise ValueError(f"{self.name}: TPU embeddings have no epsilon, found {self.epsilon}; try epsilon=0")
        steps = self.iterations if iterations is None else iterations
        return tf.tpu.experimental.embedding.Adagrad(lambda: self._rate_after(steps), self.initial)


class RowWiseAdagrad(Adagrad):
    """Adagrad with one accumulator a row: a += mean(g^2), row -= learning_rate g / sqrt(a + epsilon).

    Of a table of dimension d it keeps 1 / d as many slots as Adagrad does; Mudigere et al., "Software-Hardware
    Co-design for Fast and Scalable Training of Deep Learning Recommendation Models", ISCA 2022. Arguments as `Adagrad`.

    Slots: "accumulator" float32 [rows].
    """

    def __init__(
        self, learning_rate=0.05, initial=0.1, epsilon=1e-7, *, weight_decay=0.0, clip_norm=None, name="RowWiseAdagrad"
    ):
        super().__init__(learning_rate, initial, epsilon, weight_decay=weight_decay, clip_norm=clip_norm, name=name)

    def _make_slots(self, variable):
        return [self._slot(variable, "accumulator", 0, self.initial)]

    def _rule(self, g, slots, rate):
        total = slots[0] + tf.reduce_mean(g * g, 1)
        return g * (rate / tf.sqrt(total + self.epsilon))[:, None], [total]

    def tpu(self, iterations=None):
        """Raises ValueError: a TPU's embeddings have no row-wise Adagrad."""
        raise ValueError("TPU embeddings have no row-wise Adagrad; use Adagrad or LazyAdam")


# --- the guard --------------------------------------------------------------------------------------------------


def check_sparse(model_or_function: tf.keras.Model | Callable, batch_spec, *, at_least: int = 1_000_000) -> None:
    """Raise if a training step would compute something as long as a large table.

    The step is traced, not run, and slots that the model's optimizer has not made yet stand in without memory. The
    graph, and the functions in it, are then searched for operations that take or give a tensor with as many rows as a
    table has.

    Args:
      model_or_function: a compiled model; or a training step, function(batch), whose optimizer is built already.
      batch_spec: of the batches, as `dataset.element_spec` gives it.
      at_least: rows of a table that is large.

    Raises:
      ValueError: names the table, the operation, the line that made it, and the cure.
    """
    graph, variables = _trace(model_or_function, batch_spec)
    tables: dict[int, str] = {}
    for variable in sorted(variables, key=lambda variable: variable.name):  # a graph has them in any order
        if variable.shape.rank and variable.shape[0] >= at_least:
            rows, name = variable.shape[0], variable.name.split(":")[0]
            tables[rows] = f"{tables[rows]} or {name}" if rows in tables else name
    faults = {}
    for operation in _operations(graph):
        for rows in tables:
            if rows not in faults and _is_long(operation, rows):
                faults[rows] = f"table {tables[rows]} ({rows:,} rows): {_blame(operation)}"
    if faults:
        told = "\n  ".join(faults.values())
        raise ValueError(f"a training step would cost what the table has, not what the batch touches:\n  {told}")


def _trace(step, batch_spec):
    if not isinstance(step, tf.keras.Model):
        graph = tf.function(step).get_concrete_function(batch_spec).graph
        return graph, graph.trainable_variables
    optimizer = step.optimizer
    if optimizer is None:
        raise ValueError(f"model {step.name} has no optimizer; compile it first")
    run = step.distribute_strategy.run
    with step.distribute_strategy.scope():
        step.optimizer = _stand_in(optimizer)
    try:
        graph = tf.function(lambda batch: run(step.train_step, (batch,))).get_concrete_function(batch_spec).graph
    finally:
        step.optimizer = optimizer
    return graph, step.trainable_variables


def _stand_in(optimizer):
    """A copy of an optimizer, whose slots have a shape and no memory."""
    if hasattr(optimizer, "_optimizers_and_vars"):  # TFRS's CompositeOptimizer
        return type(optimizer)([(_stand_in(part), variables) for part, variables in optimizer._optimizers_and_vars])
    if hasattr(optimizer, "inner_optimizer"):  # mixed precision's LossScaleOptimizer
        return type(optimizer)(_stand_in(optimizer.inner_optimizer))
    # The rate changes nothing here, and a schedule of one's own cannot always be made from its config.
    copy = type(optimizer).from_config({**optimizer.get_config(), "learning_rate": 0.0})
    name = "_create_all_weights" if isinstance(copy, tf.keras.optimizers.legacy.Optimizer) else "build"
    object.__setattr__(copy, name, functools.partial(_without_memory, getattr(copy, name)))
    return copy


def _without_memory(build, variables):
    """Build an optimizer in a graph that never runs, so that initial values are shapes alone."""

    def creator(next_creator, initial_value=None, dtype=None, name=None, **_):
        value = tf.convert_to_tensor(initial_value() if callable(initial_value) else initial_value, dtype)
        with tf.init_scope():
            return UninitializedVariable(shape=value.shape, dtype=value.dtype, name=name, trainable=False)

    with tf.__internal__.FuncGraph("slots").as_default(), tf.variable_creator_scope(creator):
        build(variables)


def _operations(graph) -> Iterator[tf.Operation]:
    # Bodies of tf.cond and the like come first: they know the line, the call of them does not.
    for function in graph._functions.values():
        yield from _operations(function.graph)
    yield from graph.get_operations()


def _is_long(operation, rows: int) -> bool:
    # A read alone costs nothing: TensorFlow leaves out what nobody uses. So does a constant that rows are taken from.
    if operation.type in ("ReadVariableOp", "Identity", "Shape", "Placeholder", "Const"):
        return False
    tensors = [*operation.outputs, *[t for t in operation.inputs if _source(t.op).type == "ReadVariableOp"]]
    return any(t.dtype != tf.resource and t.shape.rank and t.shape[0] == rows for t in tensors)


def _source(operation):
    return _source(operation.inputs[0].op) if operation.type == "Identity" else operation


def _blame(operation) -> str:
    """Which line made an operation, and what to do about it."""
    frames = list(operation.traceback)
    called = [i for i, frame in enumerate(frames) if frame.filename == __file__ and frame.name == "_trace"]
    frames = [frame for frame in frames[max(called, default=-1) + 1 :] if frame.filename != __file__]
    optimizer = [frame for frame in frames if frame.filename.startswith(_OPTIMIZERS)]
    own = [frame for frame in frames if not frame.filename.startswith(_LIBRARIES)]
    if optimizer:
        # Its ops are named after it, inside a condition when the loss is scaled.
        name = next(part for part in operation.name.split("/") if not part.startswith("cond"))
        methods = {frame.name for frame in optimizer}
        line = f"by optimizer {name} ({Path(optimizer[-1].filename).name}, line {optimizer[-1].lineno})"
        if "_apply_weight_decay" in methods:
            cure = f"weight_decay of tf-keras {name} reaches every row; that of LazyAdam and RowWiseAdagrad does not"
        elif "_update_model_variables_moving_average" in methods:
            cure = f"use_ema of {name} averages every row; leave it out where there are tables"
        elif ".constraint(" in _line(optimizer[-1]):
            cure = "a constraint reads and writes every row; leave it out, or bound the rows that are looked up"
        else:
            cure = f"tf-keras {name} updates every row; take LazyAdam or RowWiseAdagrad for the tables"
    else:
        # What Keras adds by itself has no line of one's own: Keras's then, rather than where TensorFlow makes any op.
        frame = (own or [frame for frame in frames if not frame.filename.startswith(_LIBRARIES[0])] or frames)[-1]
        line = f"in {frame.filename}, line {frame.lineno}: {_line(frame)}"
        cure = (
            "read rows by tf.nn.embedding_lookup (embeddings.lookup under a strategy), and leave the gradient the "
            "tf.IndexedSlices that it is: arithmetic on the whole table, or on a tensor made of its gradient, is dense"
        )
        if "/Regularizer/" in operation.name:
            cure = "embeddings_regularizer adds up every row; weight_decay of LazyAdam and RowWiseAdagrad does not"
    return f"operation {operation.name} ({operation.type}), made {line}\n    cure: {cure}"


def _line(frame) -> str:
    return linecache.getline(frame.filename, frame.lineno).strip()

"""What follows from the declaration of a feature? Columns, batches, tables and what a served model takes.

    features = Features({
        "item": Index(kind="index", column="item_index", rows=501),
        "history": History(kind="history", column="history", length=50, table="item"),
    })
    features.record_columns()      # {"history": "int32", "item_index": "int32"}
    features.transform()           # a function for input_pipeline.batches

A feature's name is its key in a batch, and the name of its table, unless it shares another feature's with `table`. In
a config (config.py) they stand in the section `features`.

Needs: features.py embeddings.py (when they are used)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

Rows = Annotated[int, Field(ge=1, lt=2**31)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0), AfterValidator(abs)]  # -0.0 becomes 0.0: one value, one hash
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=128)]
REFUSED = ("__setitem__", "__delitem__", "__ior__", "update", "setdefault", "pop", "popitem", "clear")


def field(default, about: str, **limits) -> Any:
    """A field with its description."""
    return Field(default, description=about, **limits)


class Section(BaseModel):
    """A part of a config: frozen, no unknown fields, and nothing converted but integers where floats are meant."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False, validate_default=True)


class _Column(Section):
    kind: str
    column: Name = field(..., "column of the table and of the files")


class _Ids(_Column):
    table: Name | None = field(None, "feature whose table is shared, with its way from ids to rows; null: its own")
    rows: Rows | None = field(None, "rows of its own table; null: the data says, or the other feature")


class Index(_Ids):
    """Row numbers of a table, from 0 on, as vocabularies.sql gives them."""

    kind: Literal["index"] = field(..., "int32 row numbers of a table, from vocabularies.sql")


class Hash(_Ids):
    """Integer ids of any size, which `features.hash_bucket` turns into rows of a table: `rows` is required."""

    kind: Literal["hash"] = field(..., "int64 ids of any size, hashed to the rows of a table")


class History(_Ids):
    """Lists of row numbers; or of ids, which are hashed, where `table` names a hashed feature."""

    kind: Literal["history"] = field(..., "list of row numbers, or of ids where `table` is a hashed feature")
    length: Rows = field(50, "items that are kept at most: the latest")
    combiner: Literal["sum", "mean", "sqrtn"] = field("mean", "how the items' vectors become one")


class Number(_Column):
    """Numbers, float32 in a batch: an input, what is predicted, or how much a row counts."""

    kind: Literal["number", "label", "weight"] = field(..., "float32; a served model takes only those of kind number")


KINDS = {"index": Index, "hash": Hash, "history": History, "number": Number, "label": Number, "weight": Number}


class Features(dict):
    """Name -> feature, sorted by name: the order in which they are declared means nothing. Frozen.

    Raises:
      ValueError: features that do not fit together; names them.
    """

    def __init__(self, declared: dict):
        super().__init__(sorted(declared.items()))
        self._owners = {name: (f.table or name) if isinstance(f, _Ids) else None for name, f in self.items()}
        keys, columns, combiners = {}, {}, {}
        for name, feature in self.items():
            path, owner, history = f"features.{name}", self._owners[name], isinstance(feature, History)
            for key in (name, f"{name}_length")[: 1 + history]:
                if keys.setdefault(key, path) != path:
                    raise ValueError(f"{path}: a batch would have two columns {key!r}, one from {keys[key]}")
            if name == "weight" != feature.kind:
                raise ValueError(
                    f"{path}: found kind {feature.kind}, but `weight` is that of rows: expected kind weight"
                )
            layout = (owner is None, feature.length if history else None)
            # Beside a list's column the pipeline puts its lengths.
            for column, form in ((feature.column, layout), (f"{feature.column}_length", "lengths"))[: 1 + history]:
                if columns.setdefault(column, (form, path))[0] != form:
                    other = columns[column][1]
                    raise ValueError(f"{path}.column: {column!r} is of another type or length in {other}")
            if owner not in (name, None):
                self._check_shared(path, feature, owner)
            elif feature.kind == "hash" and not feature.rows:
                raise ValueError(f"{path}.rows: found null, expected how many rows the ids are hashed to")
            if history and combiners.setdefault(owner, (feature.combiner, path))[0] != feature.combiner:
                other = " of ".join(combiners[owner])
                raise ValueError(
                    f"{path}.combiner: {feature.combiner}, but {other}; the table {owner} has one combiner"
                )

    def _check_shared(self, path: str, feature: _Ids, owner: str) -> None:
        shared = self.get(owner)
        if not isinstance(shared, _Ids) or shared.table:
            there = [name for name, own in self._owners.items() if name == own and f"features.{name}" != path]
            raise ValueError(f"{path}.table: {owner!r} has no table of its own; expected one of {there}")
        if feature.rows:
            raise ValueError(f"{path}.rows: found {feature.rows}, but the table is that of {owner}: expected null")
        if {feature.kind, shared.kind} == {"index", "hash"}:
            raise ValueError(f"{path}.kind: {feature.kind}, but {owner}, whose table it shares, is of {shared.kind}")

    def _refuse(self, *_, **__):
        raise TypeError("features are frozen; config.override('features.name.field=value') makes another config")

    def __hash__(self):
        return hash(tuple(self.items()))

    def __reduce__(self):  # pickle would fill an empty one
        return Features, (dict(self),)

    def with_rows(self, rows: dict[str, int]) -> dict[str, dict]:
        """The declarations as dicts, with `rows`; see `Config.with_rows`."""
        tree = {name: feature.model_dump() for name, feature in self.items()}
        for name, needed in rows.items():
            if self._owners.get(name) is None:
                expected = [each for each, owner in self._owners.items() if owner]
                raise ValueError(f"rows of {name!r}: no feature with a table; expected one of {expected}")
            if self[name].table or self[name].kind == "hash":
                continue
            if (self[name].rows or needed) < needed:
                raise ValueError(f"features.{name}.rows: found {self[name].rows:,}, but the data needs {needed:,}")
            tree[name]["rows"] = self[name].rows or int(needed)
        return tree

    def record_columns(self) -> dict[str, str]:
        """Column -> dtype, as `conversion.convert` takes them: ids to hash are int64, row numbers int32."""
        columns = {}
        for name, feature in self.items():
            owner = self._owners[name]
            dtype = "float32" if owner is None else "int64" if self[owner].kind == "hash" else "int32"
            columns[feature.column] = max(dtype, columns.get(feature.column, dtype))  # int64 takes int32's numbers
        return columns

    def lengths(self) -> dict[str, int]:
        """Ragged column -> places, as `input_pipeline.batches` takes them."""
        return {feature.column: feature.length for feature in self.values() if isinstance(feature, History)}

    def transform(self) -> Callable:
        """A function `(batch, key)` for `input_pipeline.batches(features=...)` and for serving: columns to features.

        Native ops alone. It returns {feature: int32 [B]}, of a history int32 [B, length] and `<feature>_length`, int32
        [B], of numbers float32 [B]. What stands in a history's padding is any row: tell it by the length. A label or
        weight whose column is not in the batch is left out.
        """
        import tensorflow as tf

        from recsys_common.features import hash_bucket

        @tf.autograph.experimental.do_not_convert
        def features(batch, key=None):
            result = {}
            for name, feature in self.items():
                owner = self._owners[name]
                if owner is not None:
                    ids, hashed = batch[feature.column], self[owner].kind == "hash"
                    result[name] = hash_bucket(ids, self[owner].rows, owner) if hashed else tf.cast(ids, tf.int32)
                elif feature.kind == "number" or feature.column in batch:
                    result[name] = tf.cast(batch[feature.column], tf.float32)
                if isinstance(feature, History):
                    result[f"{name}_length"] = batch[f"{feature.column}_length"]
            return result

        return features

    def batch_spec(self, batch_size: int) -> dict:
        """Name -> tf.TensorSpec of a training batch as `transform` makes it, labels and weights included.

        `input_pipeline.batches(remainder="pad")` adds `weight`, float32 [batch_size], where none is declared.
        """
        import tensorflow as tf

        lengths, columns = self.lengths(), {}
        for column, dtype in self.record_columns().items():
            places = [lengths[column]] if column in lengths else []
            columns[column] = tf.TensorSpec([batch_size, *places], dtype)
            if places:
                columns[f"{column}_length"] = tf.TensorSpec([batch_size], tf.int32)
        traced = tf.function(self.transform()).get_concrete_function(columns).structured_outputs
        return {name: tf.TensorSpec(value.shape, value.dtype) for name, value in traced.items()}

    def tables(self, **options) -> dict:
        """Feature -> `embeddings.Table`, the same one for features that share it.

        Args:
          **options: dim, dtype and initial of the tables.

        Raises:
          ValueError: the rows of a table are not known yet.
        """
        from recsys_common.embeddings import Table

        combiners = {self._owners[name]: f.combiner for name, f in self.items() if isinstance(f, History)}
        made = {}
        for owner in filter(None, self._owners.values()):
            if not self[owner].rows:
                raise ValueError(
                    f"features.{owner}.rows: not known yet. Say how many the data has, its largest index + 1: "
                    f"config.with_rows({{{owner!r}: ...}})"
                )
            made[owner] = Table(owner, self[owner].rows, combiner=combiners.get(owner, "mean"), **options)
        return {name: made[owner] for name, owner in self._owners.items() if owner}

    def signature(self) -> dict[str, tuple[str, tuple[int | None, ...]]]:
        """What a served model takes: column -> (dtype, shape), all that `transform` needs but labels and weights."""
        dtypes, inputs = self.record_columns(), {}
        for feature in self.values():
            if isinstance(feature, History):
                inputs[feature.column] = (dtypes[feature.column], (None, feature.length))
                inputs[f"{feature.column}_length"] = ("int32", (None,))
            elif feature.kind not in ("label", "weight"):
                inputs[feature.column] = (dtypes[feature.column], (None,))
        return inputs


for _method in REFUSED:
    setattr(Features, _method, Features._refuse)
Declared = Annotated[
    dict[Name, Annotated[Index | Hash | History | Number, Field(discriminator="kind")]],
    Field(min_length=1, json_schema_extra={"additionalProperties": False}),  # names that do not match the pattern
    AfterValidator(Features),
]

"""What exactly is this run? One frozen tree of typed fields, as YAML, with a name that follows from its content.

    config = Config.load("run.yaml", "model.embedding_dim=64")    # or Config.default("medium")
    config = config.with_rows({"user": 1001, "item": 501})        # which the data says
    train = conversion.convert(folder, conversion.TableShards(warehouse, "examples"), config.record_columns())
    dataset = input_pipeline.batches(train, 1024, lengths=config.lengths(), features=config.transform())
    model = config.build()
    config.name, config.dump(), differences(config, Config.default("small"))

    python -m recsys_common.config show small                     # every field, with its meaning and default
    python -m recsys_common.config check run.yaml training.epochs=2       # config_commands.py

A file says what differs from the defaults. An unknown key, a wrong type and a value out of range are refused with their
path; nothing is converted but an integer where a float is meant. Features are declared once: declared_features.py.

`model.architecture` names a module: `matrix_factorization` is recsys_common.models.matrix_factorization, and with a dot
in its name it is a module of your own. It has a class `Parameters(Model)`, the fields of the section `model`, and a
function `build(config, frequency=None)`, which returns the model. So a new architecture is one file. A config is always
whole: making one imports the module of its architecture, and TensorFlow with it; importing this file does not.

A config is plain values and runs nothing, but that name is imported: in Python as `import` would, from wherever Python
looks. `RECSYS_OWN_CODE=0` in the environment refuses a name with a dot, and that is how the command lines begin, since
there a file may come from anybody and the module may lie beside it; `--allow-own-code` is for your own.

Needs: declared_features.py plain_yaml.py masking.py models/ (or an architecture of your own), and config_commands.py
for its command line
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import json
import os
import pkgutil
import re
import reprlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SerializeAsAny, ValidationError, create_model, field_validator, model_validator

from recsys_common.declared_features import KINDS, Declared, History, Name, NotNegative, Positive, Rows, Section, field
from recsys_common.masking import masked
from recsys_common.plain_yaml import read, written

Count = Annotated[int, Field(ge=1, le=2**53)]
Text = Annotated[str, Field(min_length=1)]
Metric = Annotated[str, Field(pattern=r"^((NDCG|HR|recall)@[1-9][0-9]{0,8}|MRR)$")]


class Data(Section):
    """Where rows come from, and which of them are trained on."""

    dataset: Text = field("simulated", "simulated, sample, netflix, ml-1m and the like, or project.dataset.table")
    rows: Count | None = field(None, "ratings that are drawn where they are simulated; null: 100,000")
    split_by: Literal["auto", "temporal", "leave-one-out"] = field("auto", "how train, validation and test are parted")
    table: Name = field("examples", "table of the warehouse with a column `shard`: examples, or histories")
    split: Name | None = field("train", "rows to export are those whose column `split` has this value; null: all rows")
    shards: Count | None = field(None, "shards that SQL deals rows out to; null: one for 4 million rows, 8 at least")
    oov_buckets: Rows = field(1, "rows at the head of a table for ids out of the vocabulary")
    minimum_frequency: Count = field(1, "training rows that an id needs for a row of its own")
    folder: Text | None = field(None, "folder of the prepared files, local or gs://; null: named by what is in it")
    window: Count | None = field(None, "rows that are shuffled together; null: those of 4 record batches")
    limit: Count | None = field(None, "rows to read, the first of the files; null: all")


class Model(Section):
    """The model. An architecture adds its own fields, in a subclass `Parameters`."""

    architecture: Text = field("matrix_factorization", "module of recsys_common.models, or your own: package.module")
    embedding_dim: Annotated[int, Field(ge=1, le=2**16)] = field(32, "numbers in a row of a table")
    embedding_dtype: Literal["float32", "bfloat16"] = field("float32", "of the stored rows of a table")
    embedding_initial: NotNegative = field(0.05, "rows begin uniform from minus this to this; 0: zeros")


class Optimizer(Section):
    """How tables are updated, where a batch touches them, and dense layers."""

    name: Literal["lazy_adam", "row_wise_adagrad", "adagrad"] = field("lazy_adam", "of tables")
    learning_rate: Positive = field(0.01, "of tables, after warm-up and before decay")
    second_moment: Literal["element", "row"] = field("element", "of lazy_adam: one for each number, or one for a row")
    correct_skipped: bool = field(False, "of lazy_adam: make up for the steps that did not touch a row")
    weight_decay: NotNegative = field(0.0, "times learning rate and row, what a step takes off a row that it touches")
    clip_norm: Positive | None = field(None, "largest norm of a variable's gradient; null: no limit")
    dense_name: Literal["adam", "adagrad"] = field("adam", "of dense layers")
    dense_learning_rate: Positive | None = field(None, "of dense layers; null: that of tables")
    warmup_steps: Annotated[int, Field(ge=0, le=2**53)] = field(0, "steps in which learning rates rise from 0")
    decay: Literal["none", "cosine", "linear"] = field("none", "how learning rates fall to 0, at the last step")

    @model_validator(mode="after")
    def _only_adam(self):
        if self.name != "lazy_adam" and (self.second_moment != "element" or self.correct_skipped):
            raise ValueError(f"second_moment and correct_skipped are of lazy_adam; {self.name} has no such thing")
        return self


class Training(Section):
    """How long, in which batches, and what is kept of it."""

    batch_size: Rows = field(1024, "rows in a batch of one replica")
    epochs: Count = field(4, "passes over the training rows")
    steps_per_execution: Rows = field(1, "steps between two returns to Python")
    remainder: Literal["drop", "pad"] = field("drop", "what becomes of an epoch's last rows that fill no batch")
    log_every: Count = field(50, "steps between two lines of the log")
    checkpoint_every: Count = field(100, "steps between two checkpoints")
    keep: Count = field(3, "checkpoints that are kept, the latest")
    early_stopping: Count | None = field(None, "epochs without a better evaluation.metric, then it ends; null: never")
    mixed_precision: bool = field(False, "whether dense layers compute in bfloat16")
    jit_compile: bool = field(False, "whether XLA compiles the step")
    tensorboard: bool = field(True, "whether TensorBoard's files are written too")


class Evaluation(Section):
    """Exact ranking of all items, by evaluation.py."""

    metric: Metric = field("NDCG@10", "the figure that decides: NDCG@k, HR@k, recall@k or MRR")
    k: Rows = field(10, "places of the list that a user is shown")
    users: Count = field(10_000, "users who are asked, at most")

    @model_validator(mode="after")
    def _same_k(self):
        name, at, k = self.metric.partition("@")
        if at and int(k) != self.k:
            raise ValueError(f"evaluation.metric: found {self.metric}, but k is {self.k}: expected {name}@{self.k}")
        return self


class Export(Section):
    """The model that leaves."""

    folder: Text = field("model", "folder of the SavedModel, within the run's folder")


# What differs from the defaults of the fields, as overrides.
BY_SCALE = {
    "small": "",
    "medium": "data.rows=1_000_000 model.embedding_dim=64 training.batch_size=8192 "
    "training.steps_per_execution=10 training.checkpoint_every=1000",
    "full": "model.embedding_dim=64 optimizer.second_moment=row optimizer.warmup_steps=1000 "
    "training.batch_size=16384 training.epochs=1 training.steps_per_execution=100 training.log_every=1000 "
    "training.checkpoint_every=10000",
}


USER_AND_ITEM = {name: {"kind": "index", "column": f"{name}_index"} for name in ("user", "item")}


class Config(Section):
    """A run. `Config(training={"epochs": 2})` checks, and imports the module of the architecture.

    Raises:
      ValueError: all that is wrong: the path of each field, what was found and what is expected; or a value that looks
        like a credential (masking.py).
    """

    seed: Annotated[int, Field(ge=0, lt=2**31)] = field(1, "of initial tables, of the order of rows, and other chance")
    data: Data = Data()
    features: Declared = field(USER_AND_ITEM, "what the model sees: name -> declaration")
    model: SerializeAsAny[Model] = field({}, "fields of the architecture")
    optimizer: Optimizer = Optimizer()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    export: Export = Export()

    def __init__(self, /, **sections):  # a file may have the key `self` too
        try:
            super().__init__(**sections)
        except ValidationError as error:
            raise ValueError(_explained(error, sections)) from None
        for path, value in leaves(self.tree()).items():  # masked in a file, it would be another config
            if (found := masked(text := str(value))) != text:
                raise ValueError(f"{path}: found {found}, expected no credential: a config is kept, printed and shared")

    @field_validator("model", mode="before")
    @classmethod
    def _with_own_fields(cls, value):
        value = value.model_dump(mode="json") if isinstance(value, Model) else value
        if not isinstance(value, dict):
            return value  # which is refused as such
        architecture = value.get("architecture", Model().architecture)
        # By way of JSON, where a list may stand for the tuple of an architecture's field.
        # What JSON has not, such as a NumPy integer, becomes a list of its name, which is refused.
        return parameters(architecture).model_validate_json(json.dumps(value, default=lambda each: [repr(each)]))

    @classmethod
    def default(cls, scale: str) -> Config:
        """The defaults at a scale: "small" (those of the fields), "medium" or "full".

        Raises:
          ValueError: another scale.
        """
        if scale not in BY_SCALE:
            raise ValueError(f"scale {scale!r}, expected one of {', '.join(BY_SCALE)}")
        return cls().override(*BY_SCALE[scale].split())

    @classmethod
    def parse(cls, text: str) -> Config:
        """A config from YAML; what is left out has its default.

        Raises:
          ValueError: not YAML, a key twice, or as `Config`.
        """
        tree = read(text)
        if not isinstance(tree, dict | None):
            raise ValueError(f"found {reprlib.repr(tree)}, expected sections: {', '.join(cls.model_fields)}")
        return cls(**{str(name): value for name, value in (tree or {}).items()})

    @classmethod
    def load(cls, path: str | Path, *overrides: str) -> Config:
        """A config from a YAML file, then `override`.

        Raises:
          ValueError: as `parse` and `override`; names the file.
          OSError: the file cannot be read.
        """
        try:
            return cls.parse(Path(path).read_text(encoding="utf-8")).override(*overrides)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def tree(self) -> dict:
        """All fields, defaults too, as JSON has them: dicts, lists, strings, numbers, booleans, None."""
        return self.model_dump(mode="json")

    def dump(self) -> str:
        """All fields, defaults too, as YAML. `parse` makes an equal config of it."""
        return written(self.tree())

    def override(self, *settings: str) -> Config:
        """Another config, with settings such as "model.embedding_dim=64". Values are YAML.

        It is checked once all settings are made. Where one changes model.architecture, or the kind of a feature, fields
        that the new one does not have are dropped.

        Raises:
          ValueError: not path=value, or as `Config`.
        """
        tree, pairs = self.tree(), []
        for setting in settings:
            path, equals, value = setting.partition("=")
            if not equals:
                raise ValueError(f"{setting!r}: expected path=value, such as model.embedding_dim=64")
            try:
                pairs.append((path.strip().split("."), read(value)))
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
        for path, value in pairs:
            if path == ["model", "architecture"] and value != self.model.architecture:
                tree["model"] = {name: tree["model"][name] for name in Model.model_fields}
            if path[0] == "features" and path[2:] == ["kind"] and path[1] in self.features and str(value) in KINDS:
                known = KINDS[value].model_fields
                tree["features"][path[1]] = {k: v for k, v in tree["features"][path[1]].items() if k in known}
        for path, value in pairs:
            place = tree
            for part in path[:-1]:
                place = place.setdefault(part, {})
                if not isinstance(place, dict):
                    raise ValueError(f"{'.'.join(path)}: no such field; {part} has no fields of its own")
            place[path[-1]] = value
        return type(self)(**tree)

    @property
    def hash(self) -> str:
        """SHA-256 of the whole tree as canonical JSON.

        Defaults are part of it: a version of this code with another default gives the run another name. The order of
        keys is not, nor whether a default was written out.
        """
        canonical = json.dumps(self.tree(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def name(self) -> str:
        """A name of the run: its architecture, and 12 digits of the hash."""
        return f"{self.model.architecture}-{self.hash[:12]}"

    @classmethod
    def json_schema(cls, architecture: str | None = None) -> dict:
        """JSON Schema (2020-12) for editors. Without an architecture, the section `model` may have any fields.

        It takes what `parse` takes, and what JSON Schema cannot tell: 2.0 for an integer, a fault of two fields.
        """
        if architecture:
            cls = create_model("Config", __base__=cls, model=(parameters(architecture), field({}, "its own fields")))
        schema = cls.model_json_schema()
        model = schema["$defs"][schema["properties"]["model"]["$ref"].rpartition("/")[2]]
        model["additionalProperties"] = not architecture
        if architecture:
            model["properties"]["architecture"]["const"] = architecture
            model.setdefault("required", []).extend(["architecture"] * (architecture != Model().architecture))
        return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema

    def build(self, frequency=None):
        """The model, by the architecture's own `build`. `frequency`: training rows of each row of the item table."""
        return importlib.import_module(_module(self.model.architecture)).build(self, frequency)

    def with_rows(self, rows: dict[str, int]) -> Config:
        """Another config, with the rows of tables as the data has them, such as {"user": 1001}; so its name is another.

        Rows that the config gives stay, as long as they are enough: it may give more, for ids to come. A feature that
        is hashed or shares a table may be named and stays as it is.

        Raises:
          ValueError: a feature that has no table, or fewer rows in the config than the data needs.
        """
        return type(self)(**self.tree() | {"features": self.features.with_rows(rows)})

    def sql_columns(self) -> list[str]:
        """The columns to SELECT."""
        return list(self.record_columns())

    def record_columns(self) -> dict[str, str]:
        """Column -> dtype, as `conversion.convert` takes them."""
        return self.features.record_columns()

    def lengths(self) -> dict[str, int]:
        """Ragged column -> places, as `input_pipeline.batches` takes them."""
        return self.features.lengths()

    def transform(self) -> Callable:
        """`features(batch, key)`, as `input_pipeline.batches` takes it: columns to features."""
        return self.features.transform()

    def tables(self) -> dict:
        """Feature -> `embeddings.Table`.

        Raises:
          ValueError: the rows of a table are not known yet.
        """
        m = self.model
        return self.features.tables(dim=m.embedding_dim, dtype=m.embedding_dtype, initial=m.embedding_initial)

    def signature(self) -> dict[str, tuple[str, tuple[int | None, ...]]]:
        """What a served model takes: column -> (dtype, shape)."""
        return self.features.signature()


def parameters(architecture: str) -> type[Model]:
    """The class of an architecture's section `model`; imports its module.

    Raises:
      ValueError: no such module, or one without `Parameters` and `build`; one of your own while RECSYS_OWN_CODE is 0.
    """
    path = f"model.architecture: found {architecture!r}"
    if not isinstance(architecture, str) or not all(part.isidentifier() for part in architecture.split(".")):
        raise ValueError(f"{path}, expected the name of a module")
    if "." in architecture and os.environ.get("RECSYS_OWN_CODE") == "0":
        raise ValueError(f"{path}, a module that would be run; if it is yours: --allow-own-code, or RECSYS_OWN_CODE=1")
    name = _module(architecture)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise  # it is there; what it imports is not
        known = [found.name for found in pkgutil.iter_modules([str(Path(__file__).parent / "models")])]
        known = f"one of {', '.join(known)} (nearest: {_nearest(architecture, known)}), or package.module"
        raise ValueError(f"{path}, but there is no module {error.name}; expected {known}") from None
    found = getattr(module, "Parameters", None)
    if not (isinstance(found, type) and issubclass(found, Model) and callable(getattr(module, "build", None))):
        raise ValueError(f"{path}, which lacks a class Parameters(config.Model), or build(config, frequency=None)")
    return found


def _module(architecture: str) -> str:
    return architecture if "." in architecture else f"recsys_common.models.{architecture}"


ABSENT = type("Absent", (), {"__repr__": lambda self: "absent"})()  # of a field that one of two configs does not have


def differences(a: Config, b: Config) -> list[tuple]:
    """(path, value in a, value in b) of each field that differs; `ABSENT` where there is no such field."""
    return tree_differences(a.tree(), b.tree())


def tree_differences(a: dict, b: dict) -> list[tuple]:
    """`differences` of two trees, such as those of config.yaml of two runs; imports no architecture."""
    left, right = leaves(a), leaves(b)
    pairs = [(path, left.get(path, ABSENT), right.get(path, ABSENT)) for path in left | right]
    return [pair for pair in pairs if pair[1] != pair[2]]


def leaves(tree: dict, prefix: str = "") -> dict:
    """Path -> value of each field of a tree that has no fields of its own."""
    found = {}
    for name, value in tree.items():
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


# Faults ------------------------------------------------------------------------------------------------


def _fields(section: type[Section], path: str = "") -> dict[str, str]:
    """Path -> description of each field of a section, and of the sections in it."""
    fields = {path + name: each.description or "" for name, each in section.model_fields.items()}
    for name, each in section.model_fields.items():
        if isinstance(each.annotation, type) and issubclass(each.annotation, Section):
            fields |= _fields(each.annotation, f"{path}{name}.")
    return fields


def _valid(tree: dict) -> dict[str, str]:
    """Path -> description of each field that this tree could have."""
    valid, model, features = _fields(Config), tree.get("model"), tree.get("features")
    with contextlib.suppress(ValueError, AttributeError):  # a fault that has a line of its own
        valid |= _fields(parameters(model.get("architecture", Model().architecture)), "model.")
    for name, feature in features.items() if isinstance(features, dict) else ():
        kind = str(feature.get("kind")) if isinstance(feature, dict) else ""
        valid |= _fields(KINDS.get(kind, History), f"features.{name}.")
    return valid


def _nearest(path: str, paths: Iterable[str]) -> str:
    """The one with the most similar last name; one of the same section is nearer."""

    def similar(other: str) -> float:
        (section, _, name), (its_section, _, its_name) = path.rpartition("."), other.rpartition(".")
        return difflib.SequenceMatcher(None, its_name, name).ratio() + 0.2 * (its_section == section)

    return max(paths, key=similar)


def _explained(error: ValidationError, tree: dict) -> str:
    """A line for each fault."""
    valid, lines = _valid(tree), []
    for fault in error.errors(include_url=False):
        place, kind, found = [str(part) for part in fault["loc"] if part != "[key]"], fault["type"], fault["input"]
        message = re.sub(r"^Value error, |^\w+ should (be |have |match )?| after validation.*", "", fault["msg"])
        message = re.sub("^a valid dictionary.*", "a section with fields", message)
        if place[0] == "features" and place[2:3] in [[each] for each in KINDS]:
            del place[2]  # which member of the union it is
        path = ".".join(place)
        what = f" ({valid[path]})" if valid.get(path) else ""
        if kind.startswith("union_tag"):
            path, found, message = f"{path}.kind", found.get("kind"), f"one of {', '.join(KINDS)}"
        if kind in ("extra_forbidden", "invalid_key"):
            message = f"no such field (nearest: {_nearest(path, valid)})"
        elif kind == "missing":
            message = f"missing{what}"
        elif kind not in ("value_error", "assertion_error"):  # what a validator says stands as it is
            name = "null" if found is None else f"{reprlib.repr(masked(found))} ({type(found).__name__})"
            message = f"found {name}, expected {message}{what}"
        lines.append(message if message.startswith(f"{path}.") else f"{path}: {message}")
    return "\n  ".join([f"{len(lines)} fault{'s' * (len(lines) > 1)} in the config", *lines])


if __name__ == "__main__":
    sys.exit(importlib.import_module("recsys_common.config_commands").main())

"""Configs: in and out of YAML, what is refused and how, a new architecture, features declared once.

`RANDOM_CONFIGS=10000 pytest tests/test_config.py -k random` takes that many random configs instead of 200.
"""

import copy
import functools
import hashlib
import json
import os
import pickle
import random
import runpy
import subprocess
import sys
from collections import Counter

import hypothesis
import hypothesis.strategies as st
import jsonschema
import numpy as np
import pytest
import tensorflow as tf
import yaml
from test_sql import crowded, put

from recsys_common import bigquery, config, config_commands, conversion, features, input_pipeline, plain_yaml
from recsys_common.config import ABSENT, Config, differences

# Random configs ----------------------------------------------------------------------------------------

# What each field may have, written down once more: (type, least, most), a list of what it may be, or its type; with a
# "?" it may be null.
COUNT, ROWS = ("int", 1, 2**53), ("int", 1, 2**31 - 1)
FIELDS = {
    "seed": ("int", 0, 2**31 - 1),
    "data.dataset": "text",
    "data.rows": ("int?", 1, 2**53),
    "data.split_by": ["auto", "temporal", "leave-one-out"],
    "data.table": "name",
    "data.split": "name?",
    "data.shards": ("int?", 1, 2**53),
    "data.oov_buckets": ROWS,
    "data.minimum_frequency": COUNT,
    "data.folder": "text?",
    "data.window": ("int?", 1, 2**53),
    "data.limit": ("int?", 1, 2**53),
    "model.architecture": ["matrix_factorization"],
    "model.embedding_dim": ("int", 1, 2**16),
    "model.embedding_dtype": ["float32", "bfloat16"],
    "model.embedding_initial": ("float", 0, 1e308),
    "model.user": "any text",
    "model.item": "any text",
    "model.log_q": "bool",
    "optimizer.name": ["lazy_adam", "row_wise_adagrad", "adagrad"],
    "optimizer.learning_rate": ("float", 5e-324, 1e308),
    "optimizer.second_moment": ["element", "row"],
    "optimizer.correct_skipped": "bool",
    "optimizer.weight_decay": ("float", 0, 1e308),
    "optimizer.clip_norm": ("float?", 5e-324, 1e308),
    "optimizer.dense_name": ["adam", "adagrad"],
    "optimizer.dense_learning_rate": ("float?", 5e-324, 1e308),
    "optimizer.warmup_steps": ("int", 0, 2**53),
    "optimizer.decay": ["none", "cosine", "linear"],
    "training.batch_size": ROWS,
    "training.epochs": COUNT,
    "training.steps_per_execution": ROWS,
    "training.remainder": ["drop", "pad"],
    "training.log_every": COUNT,
    "training.checkpoint_every": COUNT,
    "training.keep": COUNT,
    "training.early_stopping": ("int?", 1, 2**53),
    "training.mixed_precision": "bool",
    "training.jit_compile": "bool",
    "training.tensorboard": "bool",
    "evaluation.k": ROWS,
    "evaluation.metric": ["MRR"],
    "evaluation.users": COUNT,
    "export.folder": "text",
}
FEATURE_FIELDS = {
    "column": "name",
    "table": "name?",
    "rows": ("int?", 1, 2**31 - 1),
    "length": ROWS,
    "combiner": ["sum", "mean", "sqrtn"],
}
# Strings that YAML could take for something else.
WORDS = (
    "1e-3 yes No null ~ 1:30 2024-01-01 0x1F 0o17 010 1_000 .inf .nan = << - ? : a: {} [] { } [ ] , | > % %x @a ` !t"
)
WORDS += " &a *a #a '' \"a' true FALSE 1.0 -.5 +7 0 e1 1e5 1e400 ... --- gs://bucket/über ünï 日本 😀 \\n"
STRINGS = [
    *WORDS.split(),
    " leading",
    "trailing ",
    "- a",
    "a: b",
    "a #b",
    "? a",
    "a\tb",
    "\ta",
    "a\nb",
    "a\n\n b\n",
    "\n",
    " ",
]
STRINGS += ["\r\n", "\x07", "\x7f", "\x85", "\u2028", "\ufeffa", "two\nlines\n", "x" * 300, "word " * 60]
CROSSED = [  # faults that two fields make together: (path, fields)
    ("evaluation.metric", {"evaluation": {"metric": "HR@20", "k": 10}}),
    ("optimizer", {"optimizer": {"name": "adagrad", "correct_skipped": True}}),
    ("optimizer", {"optimizer": {"name": "row_wise_adagrad", "second_moment": "row"}}),
    ("features.a.rows", {"features": {"a": {"kind": "hash", "column": "a"}}}),
    ("features.a.table", {"features": {"a": {"kind": "index", "column": "a", "table": "b"}}}),
    ("features.weight", {"features": {"weight": {"kind": "number", "column": "a"}}}),
]


def text(random: random.Random) -> str:
    if random.random() < 0.7:
        return random.choice(STRINGS)
    points = [random.choice([random.randrange(1, 0xD800), random.randrange(0xE000, 0x110000)]) for _ in range(5)]
    return "".join(map(chr, points))


def valid(spec, random: random.Random):
    """A random value that fits."""
    kind, *limits = spec if isinstance(spec, tuple) else [spec]
    if isinstance(kind, list):
        return random.choice(kind)
    if kind.endswith("?") and random.random() < 0.2:
        return None
    kind = kind.removesuffix("?")
    if kind == "int":
        return random.choice([*limits, random.randint(*limits), min(limits[1], random.randint(1, 1000))])
    if kind == "float":
        value = random.choice([10 ** random.uniform(-300, 300), random.random(), *limits, 1e-3, 1, 1000, 1e22, 1e16])
        return max(value, limits[0])
    if kind == "name":
        return random.choice(
            ["a", "_", "Null", "yes", "y", "e1", "_1", "train", "x" * 128, f"c{random.randrange(10**6)}"]
        )
    if kind == "bool":
        return random.choice([True, False])
    return text(random)


def wrong(spec, random: random.Random):
    """A random value that does not fit: another type, or out of range."""
    kind, *limits = spec if isinstance(spec, tuple) else [spec]
    kind, null = ("choice" if isinstance(kind, list) else kind.removesuffix("?")), str(kind).endswith("?")
    values = {
        "int": [1.5, 2.0, "5", "", True, False, float("nan"), float("inf"), 10**40, -(10**40)],
        "float": ["0.1", "1e-3", "", True, False, float("nan"), float("inf"), -float("inf"), 10**400],
        "bool": [0, 1, 1.0, "yes", "true", "", "off"],
        "name": ["", "a b", "1a", "x" * 129, "é", "a-b", "a.b", "a\n", 5, 1.5, True],
        "text": ["", 5, 1.5, True, False, float("nan")],
        "any text": [5, 1.5, True, False],
        "choice": ["", "other", "Mean", 5, 1.5, True],
    }[kind] + [[], [1], {}, {"a": 1}, [[{}]], *[None] * (not null)]
    if limits:
        values += [limits[0] - 1, limits[0] - 1] + [limits[1] + 1] * (kind == "int")
    return random.choice(values)


def declarations(random: random.Random) -> dict:
    """Some valid features."""
    result, combiners = {}, {}
    for number in range(random.randint(1, 5)):
        name, spec = f"{random.choice(['user', 'Item', '_f', 'yes'])}{number}", FEATURE_FIELDS["rows"]
        feature = {"kind": random.choice(["index", "hash", "history", "number", "label", "weight"])}
        feature["column"] = random.choice([f"c{number}", f"Column_{number}", f"null{number}"])
        if feature["kind"] in ("index", "hash", "history"):
            alike = {"index": ["index"], "hash": ["hash"], "history": ["index", "hash", "history"]}[feature["kind"]]
            owners = [n for n, f in result.items() if f["kind"] in alike and not f.get("table")]
            if owners and random.random() < 0.5:
                feature["table"] = random.choice(owners)
            elif feature["kind"] == "hash" or random.random() < 0.5:
                feature["rows"] = valid(("int", *spec[1:]), random)
        if feature["kind"] == "history":
            feature["length"] = valid(FEATURE_FIELDS["length"], random)
            owner = feature.get("table", name)
            combiners.setdefault(owner, random.choice(FEATURE_FIELDS["combiner"]))
            feature["combiner"] = combiners[owner]
        result[name] = dict(random.sample(list(feature.items()), len(feature)))
    return result


def misspelt(name: str, random: random.Random) -> str:
    at = random.randrange(len(name))
    letter = random.choice("abcxyz_")
    return random.choice([name[:at] + name[at + 1 :], name[:at] + letter + name[at:], name + "s", name.upper() + "_"])


def generate(random: random.Random) -> tuple[dict, dict[str, str]]:
    """The tree of a random config, with what is wrong in it: path -> "unknown", "wrong" or "crossed".

    Each of the sections has one fault at most; about half of the configs have none.
    """
    tree, faults = {}, {}
    for path in random.sample(list(FIELDS), random.randint(0, len(FIELDS))):
        section, _, name = path.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = valid(FIELDS[path], random)
    if tree.get("optimizer", {}).get("name", "lazy_adam") != "lazy_adam":
        tree["optimizer"] = {
            k: v for k, v in tree["optimizer"].items() if k not in ("second_moment", "correct_skipped")
        }
    if "k" in tree.get("evaluation", {}):
        tree["evaluation"]["metric"] = random.choice(["MRR", f"NDCG@{tree['evaluation']['k']}"])
        if tree["evaluation"]["k"] >= 10**9:
            tree["evaluation"]["metric"] = "MRR"
    if random.random() < 0.7:
        tree["features"] = declarations(random)
    number = random.choice([0, 0, 1, 1, 2])
    sections = random.sample(["", "data", "features", "model", "optimizer", "training", "evaluation", "export"], number)
    for section in sections:
        how = random.choice(["unknown", "wrong", "crossed"])
        crossed = [(path, fields) for path, fields in CROSSED if section in fields]
        if how == "crossed" and crossed:
            path, fields = random.choice(crossed)
            tree |= copy.deepcopy(fields)
            faults[path] = how
            continue
        place, prefix, fields = (
            tree,
            "",
            {n.rpartition(".")[2]: s for n, s in FIELDS.items() if n.rpartition(".")[0] == section},
        )
        if section == "features":
            place = tree.setdefault("features", declarations(random))
            name = random.choice(list(place))
            place, prefix = place[name], f"features.{name}."
            fields = {n: s for n, s in FEATURE_FIELDS.items() if n in place} | {"kind": [place["kind"]]}
        elif section:
            place, prefix = tree.setdefault(section, {}), f"{section}."
        name = random.choice(list(fields))
        if how == "unknown":
            key = misspelt(name, random)
            known = (
                {*fields, *FEATURE_FIELDS, "features", *Config.model_fields} if section in ("", "features") else fields
            )
            if key in known or not key:
                key = "unheard_of"
            place[key] = random.choice([5, None, "a", {"b": 1}])
            faults[prefix + key] = how
        else:
            place[name] = wrong(fields[name], random)
            faults[prefix + name] = "wrong"
            if section == "features" and name == "kind" and not isinstance(place[name], str):
                place[name] = "other"
    if random.random() < 0.5:
        tree = dict(random.sample(list(tree.items()), len(tree)))
    return tree, faults


def check(random: random.Random) -> str:
    """Whether a random config does what it must: "round trip" or "refused", or AssertionError."""
    tree, faults = generate(random)
    flow = random.choice([True, False, None])
    options = {
        "default_flow_style": flow,
        "allow_unicode": random.choice([True, False]),
        "width": random.choice([20, 999]),
    }
    written = yaml.dump(tree, Dumper=plain_yaml._Dumper, **options)
    if faults:
        with pytest.raises(ValueError) as refused:
            Config.parse(written)
        lines = str(refused.value).splitlines()
        told = [line.split(": ", 1)[0].strip() for line in lines[1:] if line.startswith("  ")]
        assert sorted(told) == sorted(faults), f"{refused.value}\n{faults}\n{written}"
        unknown = [line for line in lines if "no such field (nearest: " in line]
        assert len(unknown) == list(faults.values()).count("unknown")
        return "refused"
    made = Config.parse(written)
    found = config.leaves(made.tree())
    for path, value in config.leaves(tree).items():
        assert found[path] == value and isinstance(found[path], bool) == isinstance(value, bool), path
    again = Config.parse(made.dump())
    assert again == made and again.hash == made.hash and again.dump() == made.dump() and differences(made, again) == []
    assert yaml.safe_load(made.dump()) == made.tree()  # YAML 1.1 reads the same
    return "round trip"


def random_configs(number: int, seed: int = 0) -> Counter:
    """How many of `number` random configs came back from YAML the same, and how many were refused with the paths."""
    return Counter(check(random.Random(f"{seed} {each}")) for each in range(number))


@hypothesis.settings(
    max_examples=int(os.environ.get("RANDOM_CONFIGS", 200)),
    deadline=None,
    derandomize=True,
    database=None,
    phases=[hypothesis.Phase.generate],  # to make the config of a failure smaller takes minutes
    suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(st.randoms(use_true_random=False))
def test_a_random_config_comes_back_the_same_or_is_refused_with_the_paths_of_its_faults(chance):
    check(chance)


def test_random_configs_are_of_every_sort():
    drawn = [generate(random.Random(f"sort {each}")) for each in range(300)]
    planted = Counter(how for _, faults in drawn for how in faults.values())
    assert 100 < sum(not faults for _, faults in drawn) < 200 and min(planted[how] for how in planted) > 10
    assert set(planted) == {"unknown", "wrong", "crossed"}
    depths = Counter(path.count(".") for _, faults in drawn for path in faults)
    assert min(depths[0], depths[1], depths[2]) > 10
    assert random_configs(20) == random_configs(20) and set(random_configs(20)) == {"round trip", "refused"}


# YAML --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "written, value",
    [
        ("1e-3", 0.001),
        ("1E5", 1e5),
        ("-1.5e+3", -1500.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("100_000", 100_000),
        ("-7", -7),
        ("0", 0),
        ("'1e-3'", "1e-3"),
        ("010", "010"),
        ("0x1F", "0x1F"),
        ("0o17", "0o17"),
        ("1:30", "1:30"),
        ("yes", "yes"),
        ("2024-01-01", "2024-01-01"),
        ("1e", "1e"),
        ("True", True),
        ("", None),
        ("~", None),
        ("[1, [2.0, a]]", [1, [2.0, "a"]]),
        ("{a: {b: null}}", {"a": {"b": None}}),
        ("|\n a\n  b\n", "a\n b\n"),
        ("&x [1]", [1]),
    ],
)
def test_words_are_what_yaml_1_2_says(written, value):
    found = plain_yaml.read(written)
    assert found == value and type(found) is type(value)


@hypothesis.settings(max_examples=200, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.sampled_from(STRINGS),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.sampled_from(STRINGS), inner, max_size=3)
        ),
        max_leaves=8,
    )
)
def test_plain_values_come_back_from_yaml(value):
    assert plain_yaml.read(plain_yaml.written(value)) == value
    assert yaml.safe_load(plain_yaml.written(value)) == value  # YAML 1.1 reads the same


@pytest.mark.parametrize(
    "written, said",
    [
        ("seed: 1\ndata:\n  limit: 1\n  limit: 2", "key 'limit' occurs twice"),
        ("{a: 1, a: 1}", "key 'a' occurs twice"),
        ("a: [1", "expected ',' or ']'"),
        ("a: 1\n---\nb: 2", "another document"),
        ("a: !!python/object/apply:os.getcwd []", "python/object/apply:os.getcwd"),
        ("a: !!timestamp 2024-01-01", "tag:yaml.org,2002:timestamp"),
        ("? [a]\n: b", "unhashable key"),
        ("a: *b", "undefined alias"),
        ("seed: " + "9" * 5000, "4300"),
        ("seed: !!bool maybe", "maybe"),
        ("seed: !!int ''", "out of range"),
        ("- a", "found ['a'], expected sections: seed, data, features"),
    ],
)
def test_what_is_no_tree_of_plain_values_is_refused(written, said):
    with pytest.raises(ValueError, match=r"not YAML of plain values|expected sections") as refused:
        Config.parse(written)
    assert said in str(refused.value)


# What is refused, and what is said ---------------------------------------------------------------------


def faults(text: str = "", *overrides: str) -> list[str]:
    with pytest.raises(ValueError) as refused:
        Config.parse(text).override(*overrides)
    return str(refused.value).splitlines()


def test_every_fault_is_told_with_path_found_and_expected():
    assert faults("""
seed: null
model: {embeding_dim: 5, embedding_dim: 1.0, user: 3}
batch_size: 4
training: {batch_size: '5', epochs: true, keep: 0, jit_compile: 1, remainder: dorp, folder: x}
optimizer: {learning_rate: .nan, clip_norm: 0, warmup_steps: -1}
features: {user: {kind: indx, column: y}, a b: {kind: index, column: y}, c: {kind: hash, colum: c, rows: 5}}
""") == [
        "18 faults in the config",
        "  seed: found null, expected a valid integer (of initial tables, of the order of rows, and other chance)",
        "  features.user.kind: found 'indx' (str), expected one of index, hash, history, number, label, weight",
        "  features.a b: found 'a b' (str), expected pattern '^[A-Za-z_][A-Za-z0-9_]*$'",
        "  features.c.column: missing (column of the table and of the files)",
        "  features.c.colum: no such field (nearest: features.c.column)",
        "  model.embedding_dim: found 1.0 (float), expected a valid integer (numbers in a row of a table)",
        "  model.user: found 3 (int), expected a valid string (name of the feature that is the user)",
        "  model.embeding_dim: no such field (nearest: model.embedding_dim)",
        "  optimizer.learning_rate: found nan (float), expected a finite number (of tables, after warm-up and "
        "before decay)",
        "  optimizer.clip_norm: found 0 (int), expected greater than 0 (largest norm of a variable's gradient; "
        "null: no limit)",
        "  optimizer.warmup_steps: found -1 (int), expected greater than or equal to 0 (steps in which learning "
        "rates rise from 0)",
        "  training.batch_size: found '5' (str), expected a valid integer (rows in a batch of one replica)",
        "  training.epochs: found True (bool), expected a valid integer (passes over the training rows)",
        "  training.remainder: found 'dorp' (str), expected 'drop' or 'pad' (what becomes of an epoch's last rows that "
        "fill no batch)",
        "  training.keep: found 0 (int), expected greater than or equal to 1 (checkpoints that are kept, the latest)",
        "  training.jit_compile: found 1 (int), expected a valid boolean (whether XLA compiles the step)",
        "  training.folder: no such field (nearest: data.folder)",
        "  batch_size: no such field (nearest: training.batch_size)",
    ]


@pytest.mark.parametrize(
    "given, said",
    [
        ("data: 5", "data: found 5 (int), expected a section with fields"),
        ("self: 5", "self: no such field (nearest: seed)"),
        ("epoch: 5", "epoch: no such field (nearest: training.epochs)"),
        ("training: {embeding_dim: 5}", "training.embeding_dim: no such field (nearest: model.embedding_dim)"),
        ("features: {}", "features: found {} (dict), expected at least 1 item"),
        ("features: {a: 5}", "features.a: found 5 (int), expected a section with fields"),
        ("model: {architecture: matrix_factorisation}", "found 'matrix_factorisation', but there is no module"),
        ("model: {architecture: matrix_factorisation}", "nearest: matrix_factorization"),
        ("model: {architecture: no.such}", "model.architecture: found 'no.such', but there is no module no;"),
        ("model: {architecture: ..x}", "model.architecture: found '..x', expected the name of a module"),
        ("model: {architecture: os.path}", "found 'os.path', which lacks a class Parameters(config.Model), or build("),
        ("model: {architecture: [a], user: u}", "model.architecture: found ['a'], expected the name of a module"),
        ("evaluation: {k: 20}", "evaluation.metric: found NDCG@10, but k is 20: expected NDCG@20"),
        ("optimizer: {name: adagrad, correct_skipped: true}", "optimizer: second_moment and correct_skipped are of"),
        ("optimizer: {learning_rate: 1e400}", "optimizer.learning_rate: found inf (float), expected a finite number"),
        ("features: {h: {kind: hash, column: a}}", "features.h.rows: found null, expected how many rows"),
        ("features: {weight: {kind: number, column: a}}", "features.weight: found kind number"),
        (
            "features: {a: {kind: index, column: a, table: b}, c: {kind: index, column: c}}",
            "features.a.table: 'b' has no table of its own; expected one of ['c']",
        ),
        (
            "features: {a: {kind: history, column: a}, a_length: {kind: number, column: b}}",
            "features.a_length: a batch would have two columns 'a_length', one from features.a",
        ),
        (
            "features: {a: {kind: index, column: x}, b: {kind: number, column: x}}",
            "features.b.column: 'x' is of another type or length in features.a",
        ),
        (
            "features: {a: {kind: number, column: x_length}, b: {kind: history, column: x}}",
            "features.b.column: 'x_length' is of another type or length in features.a",
        ),
        (
            "features: {a: {kind: index, column: x}, b: {kind: index, column: y, table: a, rows: 5}}",
            "features.b.rows: found 5, but the table is that of a: expected null",
        ),
        (
            "features: {a: {kind: hash, column: x, rows: 5}, b: {kind: index, column: y, table: a}}",
            "features.b.kind: index, but a, whose table it shares, is of hash",
        ),
        (
            "features: {a: {kind: index, column: x}, b: {kind: hash, column: y, table: a}}",
            "features.b.kind: hash, but a, whose table it shares, is of index",
        ),
        (
            "features: {a: {kind: history, column: x, combiner: sum}, b: {kind: history, column: y, table: a}}",
            "features.b.combiner: mean, but sum of features.a; the table a has one combiner",
        ),
    ],
)  # fmt: skip
def test_one_fault(given, said):
    first, line, *more = faults(given)
    assert first == "1 fault in the config" and said in line and not more


def test_a_file_is_named_and_python_is_checked_too(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("seed: a")
    with pytest.raises(ValueError, match=r"run.yaml: 1 fault in the config\n  seed: found 'a'"):
        Config.load(path)
    path.write_text("\ufeffdata:\n  folder: ünï\n", encoding="utf-8")
    assert Config.load(path, "seed=3").tree() == Config(seed=3, data={"folder": "ünï"}).tree()
    with pytest.raises(ValueError, match=r"training.epoch: no such field \(nearest: training.epochs\)"):
        Config(training={"epoch": 3})
    with pytest.raises(
        ValueError, match=r"model.embedding_dim: found \['np.int64\(5\)'\] \(list\), expected a valid integer"
    ):
        Config(model={"embedding_dim": np.int64(5)})
    with pytest.raises(ValueError, match="scale 'huge', expected one of small, medium, full"):
        Config.default("huge")


# The tree ----------------------------------------------------------------------------------------------


def test_overrides_are_checked_together_and_values_are_yaml():
    base = Config.default("small")
    made = base.override(
        "model.embedding_dim=64", "optimizer.learning_rate=1e-3", "data.folder=gs://b/x=y", "data.split="
    )
    assert (made.model.embedding_dim, made.optimizer.learning_rate) == (64, 0.001)
    assert (made.data.folder, made.data.split) == ("gs://b/x=y", None)
    # one of them alone would be refused
    assert base.override("evaluation.k=20", "evaluation.metric=NDCG@20").evaluation.k == 20
    hashed = base.override("features.item.kind=hash", "features.item.rows=1000", "features.item.column=item_id")
    assert hashed.features["item"].model_dump() == {"kind": "hash", "column": "item_id", "table": None, "rows": 1000}
    whole = base.override("features.h={kind: history, column: history, length: 7, table: item}")
    assert whole.features["h"].length == 7 and whole.features["user"] == base.features["user"]
    # the fields of a history go with its kind
    assert whole.override("features.h.kind=index").features["h"].model_dump()["table"] == "item"
    assert base == Config() and base.override() == base
    for setting, said in {
        "seed": "'seed': expected path=value",
        "seed.x=1": "seed.x: no such field",
        "model.embedding_dimm=1": r"model.embedding_dimm: no such field \(nearest: model.embedding_dim\)",
        "data.limit='1'": "data.limit: found '1'",
        "data.limit=[1": "data.limit: not YAML",
        "features.user.rows=0": "features.user.rows: found 0",
    }.items():
        with pytest.raises(ValueError, match=said):
            base.override(setting)


def test_a_config_is_frozen_and_can_be_sent_to_another_process():
    made = Config.default("medium")
    with pytest.raises(ValueError, match="frozen"):
        made.seed = 2
    with pytest.raises(ValueError, match="frozen"):
        made.training.epochs = 2
    for change in (
        lambda f: f.pop("user"),
        lambda f: f.update({}),
        lambda f: f.__setitem__("a", 1),
        lambda f: f.clear(),
    ):
        with pytest.raises(TypeError, match="frozen"):
            change(made.features)
    for other in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
        assert other == made and other.record_columns() == made.record_columns()
    assert len({made, Config.default("medium"), Config.default("small")}) == 2


def test_the_hash_is_of_the_resolved_tree():
    made = Config.parse("features: {b: {kind: index, column: b}, a: {kind: index, column: a}}\nseed: 2")
    # by hand, from what another reader finds in the YAML
    canonical = json.dumps(yaml.safe_load(made.dump()), sort_keys=True, separators=(",", ":"))
    assert made.hash == hashlib.sha256(canonical.encode()).hexdigest()
    assert made.name == f"matrix_factorization-{made.hash[:12]}"
    same = "seed: 2\ntraining: {epochs: 4}\noptimizer: {weight_decay: 0}\n"
    same += "features: {a: {kind: index, column: a}, b: {column: b, kind: index}}"
    assert Config.parse(same).hash == made.hash and Config.parse(same) == made
    same = same.replace("weight_decay: 0", "weight_decay: -0.0")
    assert Config.parse(same).hash == made.hash
    assert Config.parse(same).dump() == made.dump() and list(made.features) == ["a", "b"]  # the order means nothing
    others = [
        made.override(setting).hash for setting in ("seed=3", "data.limit=1", "features.a.rows=5", "model.log_q=false")
    ]
    assert len({made.hash, *others}) == 5

    class Later(Config):
        seed: int = 7  # a version with another default

    assert Later().hash != Config().hash


def test_scales_differ_in_size_alone_and_differences_are_told_field_by_field():
    small, medium, full = map(Config.default, ("small", "medium", "full"))
    assert small == Config()
    assert {path for path, *_ in differences(small, medium)} == {
        "data.rows", "model.embedding_dim", "training.batch_size", "training.checkpoint_every",
        "training.steps_per_execution",
    }  # fmt: skip
    assert differences(small, medium)[:2] == [("data.rows", None, 1_000_000), ("model.embedding_dim", 32, 64)]
    assert all(full.tree()[s] == small.tree()[s] for s in ("features", "evaluation", "export", "seed"))
    more = small.override("features.c={kind: number, column: c}")
    assert differences(small, more) == [("features.c.kind", ABSENT, "number"), ("features.c.column", ABSENT, "c")]
    assert differences(more, small)[0][2] is ABSENT and str(ABSENT) == "absent" and differences(more, more) == []


def test_the_json_schema_says_what_the_config_says():
    own, any_model = Config.json_schema("matrix_factorization"), Config.json_schema()
    jsonschema.Draft202012Validator.check_schema(own)
    judge, lenient = map(jsonschema.Draft202012Validator, (own, any_model))
    judged = Counter()

    def whole(tree, paths) -> bool:
        """Whether the only faults are floats such as 2.0, which JSON Schema takes for integers."""
        found = [functools.reduce(lambda place, part: place[part], path.split("."), tree) for path in paths]
        return all(isinstance(value, float) and value.is_integer() for value in found)

    for each in range(150):
        tree, planted = generate(random.Random(f"schema {each}"))
        if planted and "crossed" not in planted.values() and "nan" not in str(tree) and not whole(tree, planted):
            assert not judge.is_valid(tree), (tree, planted)
            judged["refused"] += 1
        elif not planted:
            judge.validate(tree)
            lenient.validate(tree)
            judged["valid"] += 1
    assert min(judged.values()) > 20
    assert lenient.is_valid({"model": {"layers": 5}}) and not judge.is_valid({"model": {"layers": 5}})
    for tree in (
        {"features": {"a b": {"kind": "index", "column": "a"}}},
        {"model": {"architecture": "another"}},
    ):
        assert not judge.is_valid(tree)
        with pytest.raises(ValueError, match="1 fault"):
            Config(**tree)
    described = json.dumps(own).count('"description"')
    fields = [path for path in config._valid(Config().tree()) if path.count(".") == 1]
    assert described > len(fields) > 35
    assert [path for path, about in config._fields(Config).items() if not about] == [
        "data", "optimizer", "training", "evaluation", "export",
    ]  # fmt: skip  # these have a docstring


# Command line ------------------------------------------------------------------------------------------


def test_the_command_line(tmp_path, capsys):
    def call(*words: str) -> tuple[int, str, str]:
        code = config_commands.main(list(words))
        return code, *capsys.readouterr()

    path = tmp_path / "run.yaml"
    path.write_text('training: {epochs: 2}\ndata: {folder: "a\\n\\n b\\n"}\n')
    code, shown, _ = call("show", str(path), "seed=5")
    assert code == 0 and Config.parse(shown) == Config.load(path, "seed=5")
    assert "  # passes over the training rows\n  epochs: 2\n" in shown
    assert call("check", "small") == (0, Config().name + "\n", "")
    assert call("diff", "small", str(path)) == (
        1, "data.folder: None -> 'a\\n\\n b\\n'\ntraining.epochs: 4 -> 2\n", "",
    )  # fmt: skip
    assert call("diff", str(path), str(path)) == (0, "the same\n", "")
    assert json.loads(call("schema", "matrix_factorization")[1]) == Config.json_schema("matrix_factorization")
    code, out, err = call("check", "small", "training.epoch=2")
    assert code == 1 and out == "" and "training.epoch: no such field (nearest: training.epochs)" in err
    code, out, err = call("show", str(tmp_path / "none.yaml"))
    assert code == 1 and "none.yaml" in err


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_run_as_a_program_it_takes_the_model_class_of_the_architectures(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["config", "check", "small"])
    monkeypatch.setenv("RECSYS_OWN_CODE", "1")  # else the command line forbids it, here for the tests after this one
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("recsys_common.config", run_name="__main__", alter_sys=True)
    assert ended.value.code == 0 and capsys.readouterr() == (Config().name + "\n", "")


def test_tensorflow_is_imported_for_a_config_but_not_for_help_or_schema():
    code = """
import sys, recsys_common.config_commands as config
config.main(["schema"])
try:
    config.main(["--help"])
except SystemExit:
    pass
print("tensorflow" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.endswith("False\n") and "{show,check,diff,schema}" in done.stdout, done.stderr


# Architectures -----------------------------------------------------------------------------------------

TWO_TOWERS = """
import tensorflow as tf
from pydantic import Field

from recsys_common.config import Model, Section
from recsys_common.embeddings import Embeddings


class Tower(Section):
    units: int = Field(4, ge=1, description="numbers that come out")


class Parameters(Model):
    layers: tuple[int, ...] = Field((8, 4), min_length=1, description="units of each layer,\\nthe first is the lowest")
    undescribed: str = "a"
    tower: Tower = Tower()


class TwoTowers(tf.keras.Model):
    def __init__(self, config):
        super().__init__()
        self.embeddings = Embeddings(config.tables(), seed=config.seed)
        self.dense = tf.keras.Sequential([tf.keras.layers.Dense(units) for units in (*config.model.layers, 1)])

    def call(self, batch):
        vectors = self.embeddings(batch)
        return self.dense(tf.concat([vectors[name] for name in sorted(vectors)], 1))[:, 0]


def build(config, frequency=None):
    return TwoTowers(config)
"""


@pytest.fixture
def two_towers(tmp_path, monkeypatch):
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "two_towers.py").write_text(TWO_TOWERS)
    (package / "half.py").write_text("from recsys_common.config import Model\nclass Parameters(Model): pass\n")
    (package / "broken.py").write_text("import a_library_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_package.two_towers"
    for name in [name for name in sys.modules if name.split(".")[0] == "my_package"]:
        del sys.modules[name]


def test_a_new_architecture_is_one_file_and_one_config(two_towers, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{architecture: {two_towers}, layers: [16, 8], embedding_dim: 3}}\n")
    made = Config.load(path, "model.tower.units=5").with_rows({"user": 10, "item": 20})
    assert made.model.layers == (16, 8) and made.model.tower.units == 5
    assert Config.parse(made.dump()) == made and Config.parse(made.dump()).hash == made.hash
    model = made.build()
    scores = model({"user": tf.constant([1, 9]), "item": tf.constant([19, 0])})
    assert scores.shape == [2] and model.dense.layers[0].kernel.shape == [6, 16]
    # its defaults are in the tree, and so in the hash
    only = Config.parse(f"model: {{architecture: {two_towers}}}")
    assert only.tree()["model"]["layers"] == [8, 4] and made.name.startswith(f"{two_towers}-")
    # the fields of the earlier architecture go, those of every model stay
    switched = Config.default("medium").override(f"model.architecture={two_towers}", "model.layers=[2]")
    assert switched.model.layers == (2,) and switched.model.embedding_dim == 64
    assert switched.override("model.architecture=matrix_factorization") == Config.default("medium")
    shown = "\n".join(config_commands._described(made, made.tree()))
    assert Config.parse(shown) == made and "    # numbers that come out\n    units: 5" in shown
    judge = jsonschema.Draft202012Validator(Config.json_schema(two_towers))
    judge.validate(made.tree())
    for without in ({"layers": [2]}, {"architecture": "matrix_factorization"}):
        assert not judge.is_valid({"model": without})


def test_the_faults_of_an_architecture_have_paths(two_towers):
    model = f"architecture: {two_towers}"
    assert faults(f"model: {{{model}, layer: 1, layers: [1, a], tower: {{unit: 1, units: 0}}}}")[1:] == [
        "  model.layers.1: found 'a' (str), expected a valid integer",
        "  model.tower.units: found 0 (int), expected greater than or equal to 1 (numbers that come out)",
        "  model.tower.unit: no such field (nearest: model.tower.units)",
        "  model.layer: no such field (nearest: model.layers)",
    ]
    assert "found 'my_package.half', which lacks a class" in faults("model: {architecture: my_package.half}")[1]
    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_not_there"):
        Config.parse("model: {architecture: my_package.broken}")


def test_matrix_factorization_takes_its_tables_and_its_features_from_the_config():
    made = Config(model={"embedding_dim": 4, "item": "film"}, features={
        "user": {"kind": "index", "column": "user_index"}, "film": {"kind": "hash", "column": "item_id", "rows": 9},
    })  # fmt: skip
    with pytest.raises(ValueError, match=r"features.user.rows: not known yet"):
        made.build()
    made = made.with_rows({"user": 5}).override("model.embedding_initial=0.5")
    half = made.override("model.embedding_dtype=bfloat16").build()
    assert half.user_table.dtype == half.item_table.dtype == tf.bfloat16 and half.user_table.shape == [5, 4]
    assert 0.3 < float(tf.reduce_max(tf.abs(half.user_table))) <= 0.5
    batch = made.transform()({"user_index": tf.constant([1, 4]), "item_id": tf.constant([7, 10**12], tf.int64)}, None)
    frequency = np.arange(9.0)
    plain, corrected = made.override("model.log_q=false").build(frequency), made.build(frequency)
    assert plain.scores(np.array([0])).shape == (1, 9)
    vectors = plain.users(batch["user"]).numpy() @ plain.items(batch["film"]).numpy().T
    loss = lambda scores: float((np.log(np.exp(scores).sum(1)) - np.diag(scores)).sum())  # noqa: E731
    assert float(plain.compute_loss(batch)) == pytest.approx(loss(vectors), rel=1e-5)
    log_q = np.log(np.maximum(frequency, 1) / frequency.sum())[batch["film"].numpy()]
    assert float(corrected.compute_loss(batch)) == pytest.approx(loss(vectors - log_q), rel=1e-5)
    with pytest.raises(ValueError, match=r"model.user, model.item: 'item' is no feature with a table; there are \["):
        made.override("model.item=item").build()
    one_table = made.override("features.user={kind: hash, column: user_id, table: film}")
    for shared in (one_table, made.override("model.item=user")):
        with pytest.raises(ValueError, match=r"model.user, model.item: 'user' and '(film|user)' share a table"):
            shared.build()


# Features ----------------------------------------------------------------------------------------------

DECLARED = """
features:
  user: {kind: index, column: user_index}
  item: {kind: hash, column: item_id, rows: 1000}
  history: {kind: history, column: seen, length: 3, combiner: sum, table: item}
  recent: {kind: history, column: recent, length: 2, rows: 7}
  price: {kind: number, column: price}
  clicked: {kind: label, column: clicked}
  importance: {kind: weight, column: w}
"""


def test_what_follows_from_the_features_by_hand():
    made = Config.parse(DECLARED)
    columns = {"clicked": "float32", "seen": "int64", "w": "float32", "item_id": "int64", "price": "float32"}
    columns |= {"recent": "int32", "user_index": "int32"}
    assert made.record_columns() == columns and sorted(made.sql_columns()) == sorted(columns)
    assert made.lengths() == {"seen": 3, "recent": 2}
    assert made.signature() == {
        "user_index": ("int32", (None,)),
        "item_id": ("int64", (None,)),
        "seen": ("int64", (None, 3)),
        "seen_length": ("int32", (None,)),
        "recent": ("int32", (None, 2)),
        "recent_length": ("int32", (None,)),
        "price": ("float32", (None,)),
    }
    with pytest.raises(ValueError, match=r"features.user.rows: not known yet.*config.with_rows\(\{'user': ...\}\)"):
        made.tables()
    tables = made.with_rows({"user": np.int64(501), "item": 10**6, "recent": 7}).tables()
    assert {name: (t.name, t.rows, t.dim, t.combiner) for name, t in tables.items()} == {
        "user": ("user", 501, 32, "mean"),
        "item": ("item", 1000, 32, "sum"),
        "history": ("item", 1000, 32, "sum"),
        "recent": ("recent", 7, 32, "mean"),
    }
    assert tables["history"] is tables["item"]
    # one column, read as ids to hash and as row numbers
    for name in ("a", "z"):
        assert made.override(f"features.{name}={{kind: index, column: item_id}}").record_columns()["item_id"] == "int64"


def test_rows_from_the_data_may_be_fewer_than_the_config_gives_but_not_more():
    made = Config.parse("features: {user: {kind: index, column: u, rows: 100}, n: {kind: number, column: n}}")
    assert made.with_rows({"user": 99}) == made
    with pytest.raises(ValueError, match=r"features.user.rows: found 100, but the data needs 101"):
        made.with_rows({"user": 101})
    for name in ("usr", "n"):
        with pytest.raises(ValueError, match=rf"rows of '{name}': no feature with a table; expected one of \['user'\]"):
            made.with_rows({name: 5})
    with pytest.raises(ValueError, match=r"features.user.rows: found 0"):
        Config.default("small").with_rows({"user": 0})


def test_the_transform_by_hand():
    batch = {
        "user_index": tf.constant([3, 4], tf.int64),
        "item_id": tf.constant([5, 2**40], tf.int64),
        "seen": tf.constant([[0, 0, 5], [7, 8, 2**40]], tf.int64),
        "seen_length": tf.constant([1, 3]),
        "recent": tf.constant([[0, 1], [2, 3]]),
        "recent_length": tf.constant([1, 2]),
        "price": tf.constant([1, 2], tf.int32),
        "unused": tf.constant([1, 2]),
    }
    transform = Config.parse(DECLARED).transform()
    made = transform(batch, None)
    assert set(made) == {"user", "item", "history", "history_length", "recent", "recent_length", "price"}
    hashed = features.hash_bucket(batch["item_id"], 1000, "item").numpy()
    assert made["item"].numpy().tolist() == hashed.tolist() and made["user"].numpy().tolist() == [3, 4]
    assert made["history"].numpy()[:, 2].tolist() == hashed.tolist()  # of one table: an id has the same row in both
    assert made["history_length"].numpy().tolist() == [1, 3] and made["recent"].numpy().tolist() == [[0, 1], [2, 3]]
    assert {name: column.dtype.name for name, column in made.items() if name != "price"} == dict.fromkeys(
        set(made) - {"price"}, "int32"
    )
    assert made["price"].dtype == tf.float32
    with_label = transform(batch | {"clicked": tf.constant([1, 0]), "w": tf.constant([0.5, 2.0])}, None)
    assert with_label["clicked"].numpy().tolist() == [1.0, 0.0] and with_label["importance"].numpy().tolist() == [
        0.5,
        2.0,
    ]
    with pytest.raises(KeyError, match="price"):
        transform({name: column for name, column in batch.items() if name != "price"}, None)


# The road, from one declaration ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def warehouse():
    with bigquery.connect() as connected:
        put(connected, "ratings", crowded())
        connected.run("temporal_split.sql", train_fraction=0.8, validation_fraction=0.0)
        data = config.Data()
        rows = {"oov_buckets": data.oov_buckets, "minimum_frequency": data.minimum_frequency}
        connected.run("vocabularies.sql", **rows, pieces=1)
        yield connected


def trained(warehouse, folder, made: Config):
    """SQL, files, batches, a model and one step, with nothing but the config to say how. The config, batch, model."""
    data = made.data
    warehouse.run("histories.sql", length=max(made.lengths().values()), shards=data.shards or 2)
    rows = warehouse.query(
        "SELECT MAX(user_index) + 1 AS user, MAX(item_index) + 1 AS item FROM histories"
    ).to_pylist()[0]
    made = made.with_rows(rows)
    source = conversion.TableShards(warehouse, data.table, {"split": data.split})
    manifest = conversion.convert(folder, source, made.record_columns(), seed=made.seed)
    batches = input_pipeline.batches(
        manifest,
        made.training.batch_size,
        seed=made.seed,
        window=data.window,
        remainder=made.training.remainder,
        lengths=made.lengths(),
        features=made.transform(),
    )
    batch, model = next(iter(batches)), made.build()
    model.compile(tf.keras.optimizers.Adagrad(0.1), "mse")
    before = model(batch).numpy()
    label = batch.pop("rating")
    loss = model.train_on_batch(batch, label)
    assert np.isfinite(loss) and not np.allclose(model(batch).numpy(), before)
    return made, batch, model


ROAD = """
data: {table: histories, shards: 2}
features:
  user: {kind: index, column: user_index}
  item: {kind: index, column: item_index}
  history: {kind: history, column: history, length: 10, table: item}
  rating: {kind: label, column: rating}
model: {architecture: my_package.two_towers, embedding_dim: 4}
training: {batch_size: 64}
"""


@pytest.mark.parametrize(
    "change, rows, length",
    [
        ([], 31, 10),
        (["features.item.kind=hash", "features.item.rows=1000"], 1000, 10),
        (["features.history.length=3"], 31, 3),
    ],
)
def test_one_feature_is_changed_in_one_place_and_all_follows(warehouse, tmp_path, two_towers, change, rows, length):
    made, batch, model = trained(warehouse, tmp_path / "files", Config.parse(ROAD).override(*change))
    assert model.embeddings.tables["item"].shape == [rows, 4] and batch["history"].shape == [64, length]
    stored = warehouse.query("SELECT user_index, item_index, history FROM histories WHERE split = 'train'").to_pylist()
    row_of = np.arange(31)
    if rows == 1000:
        row_of = features.hash_bucket(tf.range(31, dtype=tf.int64), 1000, "item").numpy()
    rows_of = lambda ids: row_of[ids]  # noqa: E731
    expected = Counter(
        (
            row["user_index"],
            int(rows_of([row["item_index"]])[0]),
            *rows_of(row["history"] or [0])[-length:][: 99 * bool(row["history"])],
        )
        for row in stored
    )
    user, item, history, lengths = (batch[name].numpy() for name in ("user", "item", "history", "history_length"))
    found = Counter((user[i], item[i], *history[i, length - lengths[i] :]) for i in range(64))
    assert not found - expected and max(len(key) for key in found) == 2 + length
    # Serving: what the signature says, through the same transform, gives the same scores.
    specs = {name: tf.TensorSpec(shape, dtype, name) for name, (dtype, shape) in made.signature().items()}
    transform = made.transform()
    served = tf.function(lambda columns: model(transform(columns)), input_signature=[specs])
    row = stored[0]
    kept = row["history"][-length:]
    columns = {"user_index": [row["user_index"]], "item_index": [row["item_index"]], "history_length": [len(kept)]}
    columns["history"] = [[0] * (length - len(kept)) + kept]
    columns = {name: tf.constant(value, specs[name].dtype) for name, value in columns.items()}
    batch = {"user": columns["user_index"], "item": tf.constant(rows_of([row["item_index"]]), tf.int32)}
    batch |= {"history": tf.constant([rows_of(columns["history"].numpy()[0])], tf.int32)}
    batch["history_length"] = columns["history_length"]
    assert np.allclose(served(columns).numpy(), model(batch).numpy())

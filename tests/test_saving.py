"""saving.py, signatures.py, golden.py, saved_graph.py and onnx_export.py: a model leaves, and is what it was."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from recsys_common import artifact, golden, onnx_export, saved_graph, saving, signatures
from recsys_common.config import Config
from recsys_common.features import hash_bucket
from recsys_common.models.matrix_factorization import MatrixFactorization

USERS, ITEMS, TOWER_ITEMS, LENGTH = 300, 50, 40, 6


def some_ids(count, seed):
    """Distinct, unsorted int64, with both ends of the range and 0 among them; every other one is odd."""
    random = np.random.default_rng(seed)
    ids = random.choice(2**40, count, replace=False) * 2 + 1
    ids[random.choice(count, 3, replace=False)] = [np.iinfo(np.int64).min, np.iinfo(np.int64).max, 0]
    return ids


def factorization(users=USERS, items=ITEMS, **more):
    """A model whose numbers are large enough to matter, and its ids."""
    model, random = MatrixFactorization(users + 1, items + 1, 6, **more), np.random.default_rng(8)
    for table in (model.user_table, model.item_table, model.item_bias):
        table.assign(random.normal(size=table.shape))
    model.item_bias[0].assign([50.0])  # what the unknown row holds must never be recommended
    return model, {"user_index": some_ids(users, 1), "item_index": some_ids(items, 2)}


def tower():
    """Two towers: a hashed user, an item by strings with 3 rows for unknown ones, a history of items."""
    features = {
        "user": {"kind": "hash", "column": "user_id", "rows": 64},
        "item": {"kind": "index", "column": "item_index", "rows": TOWER_ITEMS + 3},
        "history": {"kind": "history", "column": "history", "length": LENGTH, "table": "item"},
    }
    own = {"architecture": "two_tower", "embedding_dim": 8, "embedding_initial": 1.0, "hidden": [16, 8]}
    config = Config(features=features, model=own, data={"oov_buckets": 3})
    names = [f'é "{number}"' if number % 5 == 0 else f"item {number}" for number in range(TOWER_ITEMS)]
    return config.build(), {"item": np.array(names)[np.random.default_rng(3).permutation(TOWER_ITEMS)]}, config


def plain_environment():
    return {name: text for name, text in os.environ.items() if name not in ("TF_USE_LEGACY_KERAS", "PYTHONPATH")}


def start(*command, cwd=None, **more):
    command = [sys.executable, *map(str, command)]
    return subprocess.Popen(command, cwd=cwd, env=plain_environment() | more, stderr=subprocess.PIPE, text=True)


def finish(process):
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors[-3000:]


LOAD = """
import sys
import numpy as np
import tensorflow as tf
for name in ("factorization", "tower"):
    signatures = tf.saved_model.load(f"{name}/saved_model").signatures
    asked = np.load(f"{name}.npz")
    answers = {}
    for signature, function in signatures.items():
        inputs = {key: tf.constant(asked[f"{signature}/{key}"]) for key in function.structured_input_signature[1]}
        for key, value in function(**inputs).items():
            answers[f"{signature}/{key}"] = np.array(np.asarray(value.numpy()).tolist())
    np.savez(f"{name}-answers.npz", **answers)
for module in ("recsys_common", "tensorflow_recommenders", "tf_keras"):
    assert module not in sys.modules, module
"""


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A folder with both models, exported by a process; in `again` by another one at the same time."""
    folder = tmp_path_factory.mktemp("saving")
    root = str(Path(__file__).resolve().parent.parent)
    processes = [start(__file__, each, PYTHONPATH=root) for each in (folder, folder / "again")]
    for process in processes:
        finish(process)
    return folder


@pytest.fixture(scope="session")
def answers(exported):
    """What a process with TensorFlow alone, without this project, answers: model -> (asked, answered)."""
    random = np.random.default_rng(5)
    _, ids = factorization()
    users = np.concatenate([ids["user_index"], [2, 4, -2]])[random.permutation(USERS + 3)]
    items = random.choice(np.concatenate([ids["item_index"], [2, 2**63 - 2]]), len(users))
    seen = random.choice(np.concatenate([ids["item_index"], [-1, 2]]), [len(users), 7])
    seen[0] = -1
    asked = {
        "user_embedding/user_id": users, "item_embedding/item_id": items, "score/user_id": users,
        "score/item_id": items, "recommend/user_id": users, "recommend/seen_item_id": seen,
        "recommend/k": np.int32(ITEMS + 5),
    }  # fmt: skip
    np.savez(exported / "factorization.npz", **asked)
    _, names, _ = tower()
    count = 30
    history = random.choice(np.concatenate([names["item"], ["unknown", "", "another"]]), [count, LENGTH])
    given = {"user_id": random.integers(-5, 2**60, count), "history": np.char.encode(history, "utf-8")}
    given["history_length"] = np.arange(count, dtype=np.int32) % (LENGTH + 1)
    items = np.char.encode(random.choice(np.concatenate([names["item"], ["unknown"]]), count), "utf-8")
    towers = {
        f"{name}/{key}": value for name in ("user_embedding", "score", "recommend") for key, value in given.items()
    }
    towers |= {"item_embedding/item_id": items, "score/item_id": items, "recommend/k": np.int32(9)}
    towers |= {"recommend/seen_item_id": np.char.encode(history, "utf-8")}
    np.savez(exported / "tower.npz", **towers)
    finish(start("-c", LOAD, cwd=exported))
    return {
        "factorization": (asked, dict(np.load(exported / "factorization-answers.npz"))),
        "tower": (towers, dict(np.load(exported / "tower-answers.npz"))),
    }


# --- the same numbers elsewhere ------------------------------------------------------------------------------------


def test_factorization_elsewhere_gives_equation_1(answers):
    model, ids = factorization()
    asked, found = answers["factorization"]
    row = {name: {each: number for number, each in enumerate(ids[name].tolist(), 1)} for name in ids}
    users = [row["user_index"].get(each, 0) for each in asked["score/user_id"].tolist()]
    items = [row["item_index"].get(each, 0) for each in asked["score/item_id"].tolist()]
    assert users.count(0) == 3 and items.count(0) > 3
    p, q, b = (table.numpy().astype(float) for table in (model.user_table, model.item_table, model.item_bias))
    scores = p @ q.T + b[:, 0]
    np.testing.assert_allclose(found["score/score"], scores[users, items], rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(found["user_embedding/embedding"][:, :6], p[users], rtol=1e-6)
    np.testing.assert_allclose(found["item_embedding/embedding"], np.concatenate([q, b], 1)[items], rtol=1e-6)
    for number, user in enumerate(users):
        seen = {row["item_index"].get(each) for each in asked["recommend/seen_item_id"][number].tolist()}
        left = [item for item in np.argsort(-scores[user]) if item not in seen | {0}]
        expected = ids["item_index"][np.array(left) - 1].tolist()
        expected += [-1] * (ITEMS + 5 - len(expected))
        assert found["recommend/item_id"][number].tolist() == expected
        np.testing.assert_allclose(found["recommend/score"][number, : len(left)], scores[user, left], atol=1e-5)
        assert np.isneginf(found["recommend/score"][number, len(left) :]).all()


def test_towers_elsewhere_give_what_the_model_gives(answers):
    model, names, _ = tower()
    asked, found = answers["tower"]
    place = {name.encode(): number for number, name in enumerate(names["item"].tolist())}

    def rows(ids):  # unknown strings as vocabularies.sql has it: the fingerprint of 'item' + id modulo 3
        out = {each: int(tf.strings.to_hash_bucket_fast([b"item" + each], 3)[0]) for each in set(ids.ravel().tolist())}
        one = [place[each] + 3 if each in place else out[each] for each in ids.ravel().tolist()]
        return np.array(one, np.int32).reshape(ids.shape)

    history, length = asked["recommend/history"], asked["recommend/history_length"]
    batch = {"user": hash_bucket(asked["recommend/user_id"], 64, "user"), "history": tf.constant(rows(history))}
    u = model.users(batch | {"history_length": tf.constant(length)}).numpy() / 0.05
    np.testing.assert_allclose(found["user_embedding/embedding"], u, atol=1e-4, rtol=1e-5)
    v = model.items(tf.constant(rows(asked["item_embedding/item_id"]))).numpy()
    np.testing.assert_allclose(found["item_embedding/embedding"], v, atol=1e-5)
    np.testing.assert_allclose(found["score/score"], (u * v).sum(1), atol=1e-4)
    every = u @ model.items(tf.range(3, TOWER_ITEMS + 3)).numpy().T
    for number, best in enumerate(found["recommend/item_id"]):
        assert not set(best) & set(history[number].tolist())
        left = [item for item in np.argsort(-every[number]) if names["item"][item].encode() not in history[number]]
        assert [each.decode() for each in best] == names["item"][left[:9]].tolist()
    assert len(np.unique(u.round(4), axis=0)) > 20


def test_the_numeric_part_is_the_same_in_onnx_with_its_tables_outside(exported, answers):
    import onnxruntime

    metadata = artifact.verify(exported / "factorization")
    about = metadata.onnx["user_embedding"]
    session = onnxruntime.InferenceSession(exported / "factorization" / about.file)
    model, _ = factorization()
    rows = np.array([0, 7, USERS], np.int32)
    [found] = session.run([*about.outputs], {"user_index": rows})
    np.testing.assert_allclose(found[:, :6], model.user_table.numpy()[rows], rtol=1e-6)
    assert (exported / "factorization" / about.file).stat().st_size < 5000
    table = np.fromfile(exported / "factorization/onnx/user_table.f32", "<f4")
    np.testing.assert_array_equal(table.reshape(USERS + 1, 6), model.user_table.numpy())


def test_metadata_stands_in_the_graph_too(exported, answers):
    inside = json.loads(answers["factorization"][1]["metadata/json"].item())
    beside = json.loads((exported / "factorization/metadata.json").read_text())
    assert beside["metrics"] == {"NDCG@10": 0.25} and beside["model"]["dim"] == 7
    for name, value in inside.items():
        expected = beside[name] if name != "items" else {k: v for k, v in beside[name].items() if k != "index"}
        assert value == expected, name
    assert beside["model"]["parameters"] == (USERS + 1) * 6 + (ITEMS + 1) * 7


def test_no_id_and_no_vector_is_in_the_graph(exported):
    for name in ("factorization", "tower"):
        assert (exported / name / "saved_model/saved_model.pb").stat().st_size < 200_000
    # A hundred times the rows, the same graph.
    sizes = [plain_export(exported / f"large{n}", n, n).joinpath("saved_model/saved_model.pb").stat().st_size
             for n in (50, 5000)]  # fmt: skip
    assert sizes[1] - sizes[0] < 2000


def test_golden_vectors_have_the_first_the_last_and_an_unknown_id(exported):
    metadata = artifact.verify(exported / "factorization")
    ids = factorization()[1]["user_index"]
    one = {each.signature: each for each in metadata.golden}
    assert set(one) == {"user_embedding", "item_embedding", "score", "recommend"}
    users = one["recommend"].inputs["user_id"]
    assert users[:2] == [str(ids[0]), str(ids[-1])] and int(users[2]) not in ids
    assert one["recommend"].rows["user_index"][:3] == [1, USERS, 0]
    history = {each.signature: each for each in artifact.verify(exported / "tower").golden}["recommend"]
    assert history.rows["history_length"][:3] == [0, LENGTH, 3]


def test_two_exports_are_the_same_bytes_but_for_dates(exported):
    for name in ("factorization", "tower"):
        both = [artifact.verify(exported / part / name) for part in ("", "again")]
        assert both[0].model_copy(update={"created": ""}) == both[1].model_copy(update={"created": ""})
        files = [json.loads((exported / part / name / "manifest.json").read_text())["files"] for part in ("", "again")]
        differ = [one["name"] for one, other in zip(*files, strict=True) if one["sha256"] != other["sha256"]]
        assert set(differ) <= {"metadata.json"}, name
        assert len(files[0]) > 10


# --- trust ------------------------------------------------------------------------------------------------------------


def test_every_file_is_checked_before_anything_is_loaded(exported, tmp_path, monkeypatch):
    def loading(*_, **__):
        raise AssertionError("loaded before all files were checked")

    monkeypatch.setattr(tf.saved_model, "load", loading)
    folder = tmp_path / "model"
    shutil.copytree(exported / "tower", folder)
    names = [each["name"] for each in json.loads((folder / "manifest.json").read_text())["files"]]
    assert len(names) > 12
    for name in names:
        content = (folder / name).read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 1
        for broken in (flipped, content[:-1]):
            (folder / name).write_bytes(broken)
            with pytest.raises(ValueError, match=name.replace(".", r"\.")):
                saving.load(folder)
        (folder / name).write_bytes(content)
    with pytest.raises(AssertionError):
        saving.load(folder)


def test_a_whole_artifact_is_loaded(exported):
    loaded = saving.load(exported / "factorization")
    assert set(loaded.signatures) == {"user_embedding", "item_embedding", "score", "recommend", "metadata"}


def read_file(x):
    return tf.io.read_file(x)


def write_file(x):
    tf.io.write_file(x, x)
    return x


def printed(x):
    tf.print(x, output_stream="file:///tmp/never-written")
    return x


def python(x):
    return tf.py_function(lambda value: value, [x], tf.string)


def numpy_function(x):
    return tf.numpy_function(lambda value: value, [x], tf.string)


def saved(x):
    tf.raw_ops.Save(filename="/tmp/never-written", tensor_names=["a"], data=[tf.constant([1])])
    return x


def restored(x):
    return tf.raw_ops.RestoreV2(prefix=x, tensor_names=["a"], shape_and_slices=[""], dtypes=[tf.string])[0]


def matching(x):
    return tf.io.matching_files(x)


def in_a_branch(x):
    return tf.cond(tf.size(x) > 3, lambda: tf.io.read_file(x), lambda: x)


@pytest.mark.parametrize(
    "reaching, operation",
    [
        (read_file, "ReadFile"), (write_file, "WriteFile"), (printed, "PrintV2"), (python, "EagerPyFunc"),
        (numpy_function, "PyFunc"), (saved, "Save"), (restored, "RestoreV2"), (matching, "MatchingFiles"),
        (in_a_branch, "ReadFile|StatelessIf"),
    ],
)  # fmt: skip
def test_a_graph_that_reaches_out_is_refused(tmp_path, reaching, operation):
    module = tf.Module()
    module.inner = tf.function(reaching, input_signature=[tf.TensorSpec([], tf.string)])
    module.outer = tf.function(lambda x: {"y": module.inner(x)}, input_signature=[tf.TensorSpec([], tf.string, "x")])
    tf.saved_model.save(module, str(tmp_path / "model"), signatures={"outer": module.outer})
    with pytest.raises(ValueError, match=f"operation ({operation}) "):
        saved_graph.check(tmp_path / "model")


@pytest.fixture
def plain(tmp_path):
    """A SavedModel of one variable and one signature, and its protocol buffer."""
    module = tf.Module()
    module.table = tf.Variable([1.0, 2.0])
    spec = [tf.TensorSpec([], tf.int32, "x")]
    module.read = tf.function(lambda x: {"y": module.table[x]}, input_signature=spec)
    tf.saved_model.save(module, str(tmp_path / "model"), signatures={"read": module.read})
    saved_graph.check(tmp_path / "model")
    return tmp_path / "model", saved_graph._read(tmp_path / "model")


def saver_function(graph, tensor):
    """The function that a node of the saver calls."""
    [node] = [each for each in graph.graph_def.node if each.name == tensor.partition(":")[0]]
    [function] = [each for each in graph.graph_def.library.function if each.signature.name == node.attr["f"].func.name]
    return function


def constant_prefix(graph, operation="RestoreV2", saver="restore_op_name"):
    function = saver_function(graph, getattr(graph.saver_def, saver))
    [node] = [each for each in function.node_def if each.op == operation]
    constant = next(each for each in function.node_def if each.name.endswith("/tensor_names"))
    copied = function.node_def.add()
    copied.CopyFrom(constant)
    copied.name = "elsewhere"
    copied.attr["value"].tensor.string_val[:] = [b"/tmp/never-written"]
    node.input[0] = "elsewhere:output:0"


def constant_shard(graph):
    constant_prefix(graph, "ShardedFilename", "save_tensor_name")


def constant_ending(graph):
    function = saver_function(graph, graph.saver_def.save_tensor_name)
    [constant] = [each for each in function.node_def if each.attr["value"].tensor.string_val[:] == [b".part"]]
    constant.attr["value"].tensor.string_val[:] = [b"/../../../never-written"]


def constant_merge(graph):
    function = saver_function(graph, graph.saver_def.save_tensor_name)
    [merge] = [each for each in function.node_def if each.op == "MergeV2Checkpoints"]
    merge.input[1] = "Const:output:0"


def constant_from_outside(graph):
    """The function is as it was, but the path that it is called with is the graph's."""
    path = graph.graph_def.node.add(name="elsewhere", op="Const")
    path.attr["value"].tensor.string_val[:] = [b"/tmp/never-written"]
    [node] = [each for each in graph.graph_def.node if each.name == graph.saver_def.restore_op_name]
    node.input[0] = "elsewhere"


def named_by_objects(graph):
    name = saver_function(graph, graph.saver_def.restore_op_name).signature.name
    graph.object_graph_def.nodes.add().bare_concrete_function.concrete_function_name = name


def concrete_in_objects(graph):
    name = saver_function(graph, graph.saver_def.save_tensor_name).signature.name
    graph.object_graph_def.nodes.add().function.concrete_functions.append(name)


def wired_to_an_output(graph):
    saver = graph.saver_def.save_tensor_name
    graph.graph_def.node.add(name="result", op="Identity", input=[saver])
    graph.signature_def["read"].outputs["y"].name = "result:0"


def wired_by_control(graph):
    graph.graph_def.node.add(name="init", op="NoOp", input=["^" + graph.saver_def.restore_op_name])


def an_output_itself(graph):
    graph.signature_def["read"].outputs["y"].name = graph.saver_def.save_tensor_name


def an_operation_at_the_start(graph):
    graph.collection_def["saved_model_main_op"].node_list.value.append(graph.saver_def.restore_op_name)


def in_place_of_a_function(graph):
    saver_function(graph, graph.saver_def.restore_op_name).attr["api_implements"].s = b"read"


def no_objects(graph):
    graph.ClearField("object_graph_def")


@pytest.mark.parametrize(
    "change, expected",
    [
        (constant_prefix, r"RestoreV2 \(.* has a path of its own"),
        (constant_shard, r"ShardedFilename \(.* has a path of its own"),
        (constant_ending, "has a path of its own"), (constant_merge, r"MergeV2Checkpoints \(.* has a path of its own"),
        (constant_from_outside, r"RestoreV2 \(.* has a path of its own"), (named_by_objects, "operation RestoreV2"),
        (concrete_in_objects, "operation StaticRegexFullMatch"),
        (wired_to_an_output, "operation StaticRegexFullMatch"), (wired_by_control, "operation RestoreV2"),
        (an_output_itself, "operation StaticRegexFullMatch"), (an_operation_at_the_start, "operation RestoreV2"),
        (in_place_of_a_function, "operation RestoreV2"), (no_objects, "a graph of objects"),
    ],
)  # fmt: skip
def test_what_saves_and_restores_cannot_be_used_for_more(plain, change, expected):
    folder, found = plain
    change(found.meta_graphs[0])
    (folder / "saved_model.pb").write_bytes(found.SerializeToString())
    with pytest.raises(ValueError, match=expected):
        saved_graph.check(folder)


def test_a_second_graph_is_refused(plain):
    folder, found = plain
    found.meta_graphs.add().CopyFrom(found.meta_graphs[0])
    (folder / "saved_model.pb").write_bytes(found.SerializeToString())
    with pytest.raises(ValueError, match="expected one graph"):
        saved_graph.check(folder)
    (folder / "saved_model.cpb").touch()
    with pytest.raises(ValueError, match=r"it has saved_model\.cpb"):
        saved_graph.check(folder)


def test_load_checks_the_graph_of_a_whole_artifact(exported, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(exported / "factorization", folder)
    module = tf.Module()
    module.read = tf.function(lambda x: {"y": tf.io.read_file(x)}, input_signature=[tf.TensorSpec([], tf.string, "x")])
    shutil.rmtree(folder / "saved_model")
    tf.saved_model.save(module, str(folder / "saved_model"), signatures={"read": module.read})
    artifact.write_manifest(folder)  # whoever writes the whole folder can write that
    with pytest.raises(ValueError, match="operation ReadFile"):
        saving.load(folder)


def test_files_among_the_assets_and_what_is_no_saved_model_are_refused(tmp_path):
    (tmp_path / "words").write_text("a")
    module = tf.Module()
    module.asset = tf.saved_model.Asset(str(tmp_path / "words"))
    module.path = tf.function(lambda: {"y": module.asset.asset_path}, input_signature=[])
    tf.saved_model.save(module, str(tmp_path / "model"), signatures={"path": module.path})
    with pytest.raises(ValueError, match="names the file 'words'"):
        saved_graph.check(tmp_path / "model")
    (tmp_path / "model/saved_model.pb").write_bytes(b"\xff\xff\xff")
    with pytest.raises(ValueError, match="no SavedModel"):
        saved_graph.check(tmp_path / "model")


def test_credentials_are_masked_everywhere(tmp_path):
    model, ids = factorization(5, 4)
    secret = "https://me:hunter2hunter2@example.com"
    about = {"run": {"source": secret, "api_key": "abcdef123456"}, "data": {"queries": [secret]}}
    saving.export(tmp_path / "model", model, ids, about=about, index=False, onnx=False)
    assert "[masked" in json.dumps(artifact.verify(tmp_path / "model").run)
    for path in (tmp_path / "model").rglob("*"):
        if path.is_file():
            assert not any(word in path.read_bytes() for word in (b"hunter2", b"abcdef123456")), path


# --- whole or not at all ----------------------------------------------------------------------------------------------


def plain_export(folder, users=5, items=4, **more):
    model, ids = factorization(users, items)
    return saving.export(folder, model, ids, index=False, onnx=False, **more)


def test_an_export_that_fails_leaves_the_old_model(tmp_path, monkeypatch):
    plain_export(tmp_path / "model", about={"name": "old"})
    (tmp_path / "model.writing").mkdir()
    (tmp_path / "model.writing/left").write_text("by a process that was killed")

    def killed(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(artifact, "write_manifest", killed)
        with pytest.raises(KeyboardInterrupt):
            plain_export(tmp_path / "model", about={"name": "new"})
    assert artifact.verify(tmp_path / "model").name == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    plain_export(tmp_path / "model", about={"name": "new"})
    assert artifact.verify(tmp_path / "model").name == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_killed_between_the_renames_both_are_whole(tmp_path, monkeypatch):
    plain_export(tmp_path / "model", about={"name": "old"})
    rename, count = Path.rename, []

    def second_fails(self, target):
        count.append(target)
        if len(count) == 2:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", second_fails)
        with pytest.raises(KeyboardInterrupt):
            plain_export(tmp_path / "model", about={"name": "new"})
    assert artifact.verify(tmp_path / "model.old").name == "old"
    assert artifact.verify(tmp_path / "model.writing").name == "new"


def test_what_gives_other_numbers_is_not_left_behind(tmp_path, monkeypatch):
    right = golden.vectors

    def wrong(*arguments):
        found = right(*arguments)
        found[2]["outputs"]["score"][1] += 1e-3
        return found

    monkeypatch.setattr(golden, "vectors", wrong)
    with pytest.raises(ValueError, match=r"saved_model, score: score differs from the model's by 0\.00"):
        plain_export(tmp_path / "model")
    assert [*tmp_path.iterdir()] == []


def test_large_tables_are_lent_to_the_check_and_come_back(tmp_path, monkeypatch):
    model, ids = factorization(5, 4)
    before = [variable.numpy().copy() for variable in model.variables]
    monkeypatch.setattr(saving, "READ_BACK", 0)
    saving.export(tmp_path / "model", model, ids, index=False, onnx=False)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
    monkeypatch.setattr(golden, "compare", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        saving.export(tmp_path / "model", model, ids, index=False, onnx=False)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


def test_a_graph_that_grows_is_refused(tmp_path, monkeypatch):
    class Constant(MatrixFactorization):
        def users(self, users):
            return super().users(users) + tf.constant(np.random.default_rng(0).normal(size=[1, 200_000]))[0, 0]

    model = Constant(6, 5, 6)
    model.users = lambda users: (
        MatrixFactorization.users(model, users)
        + tf.reduce_sum(tf.constant(np.random.default_rng(0).normal(size=200_000).astype("f4")))
    )
    monkeypatch.setattr(saving, "GRAPH_LIMIT", 500_000)
    with pytest.raises(ValueError, match=r"the graph has .* bytes, at most 500,000"):
        saving.export(tmp_path / "model", model, factorization(5, 4)[1], index=False, onnx=False)
    assert [*tmp_path.iterdir()] == [] and saving.GRAPH_LIMIT < 64 << 20


# --- ids --------------------------------------------------------------------------------------------------------------


def test_a_hashed_item_is_recommended_from_the_catalogue(tmp_path):
    features = {
        "user": {"kind": "index", "column": "user_index", "rows": 4},
        "item": {"kind": "hash", "column": "item_id", "rows": 1000},
    }
    config = Config(features=features, model={"embedding_dim": 4, "embedding_initial": 1.0})
    ids = {"user": np.array([30, 10, 20]), "item": np.array([2**62, -5, 77, 4])}
    model = config.build()
    saving.export(tmp_path / "model", model, ids, config, index=False, onnx=False)
    found = saving.load(tmp_path / "model").signatures["recommend"](
        user_id=tf.constant([10], tf.int64), k=tf.constant(3), seen_item_id=tf.constant([[77, 123]], tf.int64)
    )
    scores = model.scores(np.array([2]))[0][hash_bucket(ids["item"], 1000, "item").numpy()]
    expected = [each for each in ids["item"][np.argsort(-scores)].tolist() if each != 77]
    assert found["item_id"].numpy().tolist() == [expected]
    with pytest.raises(ValueError, match="must have the items to recommend"):
        saving.export(tmp_path / "model", model, {"user": ids["user"]}, config)


def test_places_of_strings_and_numbers():
    ids = np.array([5, -(2**63), 2**63 - 1, 0])
    asked = tf.constant([[0, 5], [-1, 2**63 - 1]], tf.int64)
    assert signatures.Places("user", ids)(asked).numpy().tolist() == [[3, 0], [-1, 2]]
    strings = signatures.Places("item", signatures.checked("item", ["b", "", "é", "a" * 200]))
    assert strings(tf.constant(["é", "c", "", "a" * 200, "a" * 199])).numpy().tolist() == [2, -1, 1, 3, -1]
    twice = np.arange(signatures.SLICE + 5)
    twice[-1] = signatures.SLICE - 1  # where one slice ends
    with pytest.raises(ValueError, match=f"id {signatures.SLICE - 1} occurs twice"):
        signatures.Places("x", twice)
    large = np.arange(3 * signatures.SLICE // 2)[::-1] * 3
    assert signatures.Places("x", large)(tf.constant([0, 3, 4], tf.int64)).numpy().tolist() == [
        len(large) - 1,
        len(large) - 2,
        -1,
    ]


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"user_index": [1, 2, 3, 2, 5]}, "'user_index': id 2 occurs twice"),
        ({"user_index": ["a", "b", "é", "c", "é"]}, "'user_index': id 'é' occurs twice"),
        ({"user_index": [1.5, 2, 3, 4, 5]}, "'user_index': found float64"),
        ({"user_index": []}, "'user_index': found"),
        ({"item_index": [1, 2, -1, 4]}, "'item_index': -1 is an item's id"),
        ({"item_index": ["a", "b", "", "c"]}, "'item_index': '' is an item's id"),
        ({"user_index": [1, 2, 3]}, "'user_index': 3 ids and 1 rows for unknown ones, but 6 rows"),
    ],
)
def test_vocabularies_that_do_not_fit_are_refused(tmp_path, change, expected):
    model, ids = factorization(5, 4)
    with pytest.raises(ValueError, match=expected):
        saving.export(tmp_path / "model", model, ids | change, index=False, onnx=False)
    assert [*tmp_path.iterdir()] == []


def test_what_is_asked_for_wrongly_is_named(tmp_path):
    model, ids = factorization(5, 4)
    with pytest.raises(ValueError, match=r"no ids of 'user_index'; there are \['item_index'\]"):
        saving.export(tmp_path / "model", model, {"item_index": ids["item_index"]})
    with pytest.raises(ValueError, match="about has 'nonsense'"):
        saving.export(tmp_path / "model", model, ids, about={"nonsense": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        saving.export(tmp_path / "model", model, ids, about={"run": {"rows": np.int64(1)}})
    assert [*tmp_path.iterdir()] == []


def test_onnx_refuses_what_it_cannot_convert(tmp_path):
    table = tf.Variable(tf.ones([4, 2]))
    spec = {"x": tf.TensorSpec([None], tf.int32)}
    with pytest.raises(ValueError, match=r"ResourceGatherNd takes the variable"):
        onnx_export.export(tmp_path, "a", lambda given: {"y": table.gather_nd(given["x"][:, None])}, spec)
    with pytest.raises(ValueError, match=r"b\.onnx: tf2onnx made a file that is no ONNX model"):
        onnx_export.export(tmp_path, "b", lambda given: {"y": tf.fingerprint(tf.strings.as_string(given["x"]))}, spec)


def test_a_table_of_bfloat16_leaves_as_float32(tmp_path):
    model, ids = factorization(5, 4, dtype="bfloat16")
    saving.export(tmp_path / "model", model, ids, index=False)
    table = np.fromfile(tmp_path / "model/onnx/user_table.f32", "<f4").reshape(6, 6)
    np.testing.assert_array_equal(table, tf.cast(model.user_table, tf.float32).numpy())


def test_factorization_takes_a_dict_as_towers_do():
    model, _ = factorization(5, 4)
    users = np.array([3, 0])
    np.testing.assert_array_equal(model.scores({"user_index": users, "more": 1}), model.scores(users))
    batch = {"user_index": tf.constant(users)}
    np.testing.assert_array_equal(model.users(batch), model.users(tf.constant(users)))


def test_compare_takes_ties_but_no_other_item():
    expected = {"item_id": [["1", "2", "3"]], "score": [[5.0, 5.0, 1.0]]}
    score = np.array([[5, 5, 1]], np.float32)
    golden.compare("here", expected, {"item_id": np.array([[2, 1, 3]]), "score": score})
    for wrong in ([1, 3, 2], [1, 1, 3], [9, 2, 3]):
        with pytest.raises(ValueError, match="here: row 0"):
            golden.compare("here", expected, {"item_id": np.array([wrong]), "score": score})
    with pytest.raises(ValueError, match="score differs"):
        golden.compare("here", expected, {"item_id": np.array([[1, 2, 3]]), "score": score + 1e-4})
    with pytest.raises(ValueError, match="score differs"):
        golden.compare("here", expected, {"item_id": np.array([[1, 2, 3]]), "score": score * np.nan})


if __name__ == "__main__":
    out = Path(sys.argv[1])
    out.mkdir(exist_ok=True)
    model, ids = factorization()
    saving.export(out / "factorization", model, ids, about={"name": "mf", "metrics": {"NDCG@10": 0.25}})
    model, ids, config = tower()
    saving.export(out / "tower", model, ids, config)

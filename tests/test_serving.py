"""Do C and Node.js score a saved model as Python does, and what does the service answer?"""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from recsys_common import artifact, item_index, saved_graph, saving
from recsys_common.config import Config
from recsys_common.models.matrix_factorization import MatrixFactorization

ROOT = Path(__file__).parent.parent
BUILT = ROOT / "build" / "serving"
NODE = [BUILT / "node", BUILT / "score.mjs"]
needs_cc = pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler (cc) is on the PATH")
CLIENTS = [pytest.param([BUILT / "score"], id="C", marks=needs_cc), pytest.param(NODE, id="Node.js")]
HISTORY, ITEMS, TOWER_ITEMS = 8, 400, 300
sys.path.append(str(ROOT / "serving"))


@pytest.fixture(scope="module", autouse=True)
def built():
    """`make serving`: at once, but for the first time."""
    subprocess.run(["make", "serving"], cwd=ROOT, check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Matrix factorization with int64 ids; two towers with a hashed user, string items and their history."""
    folder, dice = tmp_path_factory.mktemp("models"), np.random.default_rng(1)
    small = MatrixFactorization(201, ITEMS + 1, 16, seed=1, initial=0.7)
    small.item_bias.assign(dice.normal(size=(ITEMS + 1, 1)))
    users = np.concatenate([[-7, 0, 2**53 + 1, 2**63 - 1], dice.choice(2**40, 196, replace=False)])
    items = 3 + 7 * dice.permutation(ITEMS)
    saving.export(folder / "matrix", small, {"user_index": users, "item_index": items})
    history = {"kind": "history", "column": "history", "length": HISTORY, "table": "item"}
    config = Config(
        features={
            "user": {"kind": "hash", "column": "user_id", "rows": 150},
            "item": {"kind": "index", "column": "item_index", "rows": TOWER_ITEMS + 3},
            "history": history,
        },
        model={"architecture": "two_tower", "embedding_dim": 16, "hidden": [32, 16]},
        data={"oov_buckets": 3},
    )
    names = [f'"{n}"\\ п\U0001f3ac\t' if n % 40 == 0 else f"item-{n}" for n in dice.permutation(TOWER_ITEMS)]
    saving.export(folder / "tower", config.build(np.ones(TOWER_ITEMS + 3)), {"item": np.array(names)}, config)
    return folder


@pytest.fixture
def copy(models, tmp_path):
    """A copy of the matrix factorization, to be spoiled."""
    return shutil.copytree(models / "matrix", tmp_path / "model")


def run(command: list, *words) -> subprocess.CompletedProcess:
    return subprocess.run([*command, *words], capture_output=True, text=True, timeout=60)


def rewrite(folder: Path, change) -> None:
    """Change metadata.json, and make the manifest fit again."""
    path = folder / "metadata.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content, {each["signature"]: each for each in content["golden"]})
    path.write_text(json.dumps(content), encoding="utf-8")
    artifact.write_manifest(folder)


# C and Node.js -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ("matrix", "tower"))
@pytest.mark.parametrize("client", CLIENTS)
def test_golden_vectors_agree(client, model, models, tell):
    done = run(client, models / model, "--repeat", "20")
    assert done.returncode == 0, done.stderr
    [line] = done.stdout.splitlines()
    found = json.loads(line)
    assert found["golden"] == 4 and found["largest_difference"] <= 1e-5
    assert found["wrong_ids"] == 0 and found.get("wrong_rows", 0) == 0
    if client is NODE:  # it has vectors of the catalogue's items only
        assert found["skipped"] == skipped(models / model) > 0
    assert 0 < found["recommend_ms"]["p50"] <= found["recommend_ms"]["p99"]
    tell(f"golden vectors, {model}, {found['client']}: largest difference {found['largest_difference']:.1e}")


def skipped(folder: Path) -> int:
    """Golden items that are not in the catalogue."""
    metadata = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
    path = folder / metadata["items"]["ids"]["file"]
    lines = path.read_text(encoding="utf-8").splitlines() if path.suffix == ".txt" else np.fromfile(path, "<i8")
    known = {json.loads(line) if path.suffix == ".txt" else str(line) for line in lines}
    [name] = [each["name"] for each in metadata["inputs"] if each["side"] == "item"]
    each = [g["inputs"][name] for g in metadata["golden"] if g["signature"] in ("item_embedding", "score")]
    assert len(each) == 2
    return sum(str(item) not in known for items in each for item in items)


def off_by(amount: float, signature: str):
    """The first number that this signature must give is another one; relative above 1."""

    def change(content, golden):
        [values] = [values for name, values in golden[signature]["outputs"].items() if name != "item_id"]
        first = values[0] if isinstance(values[0], list) else values
        first[0] += amount * max(1, abs(first[0]))

    return change


def another_item(content, golden):
    ids, scores = (golden["recommend"]["outputs"][name][1] for name in ("item_id", "score"))
    assert scores[2] - scores[3] > 1e-3
    ids[2], ids[3] = ids[3], ids[2]


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize(
    "change",
    [*(off_by(3e-5, name) for name in ("user_embedding", "item_embedding", "score", "recommend")), another_item],
    ids=["user_embedding", "item_embedding", "score", "recommend", "item_id"],
)
def test_what_a_client_must_give_is_compared(client, change, copy):
    rewrite(copy, change)
    done = run(client, copy, "--repeat", "1")
    found = json.loads(done.stdout)
    assert done.returncode == 1 and re.search("^error: differs by ", done.stderr, re.M)
    if change is another_item:
        assert found["wrong_ids"] == 2 and found["largest_difference"] <= 1e-5
    else:
        assert found["largest_difference"] > 1e-5 and found["wrong_ids"] == 0


@pytest.mark.parametrize("client", CLIENTS)
def test_ties_may_stand_in_another_order(client, copy):
    def change(content, golden):
        outputs = golden["recommend"]["outputs"]
        ids, scores = outputs["item_id"][1], outputs["score"][1]
        ids[2], ids[3] = ids[3], ids[2]
        content["golden"] = [golden["user_embedding"], golden["recommend"]]
        scores[3] = scores[2]  # the model's own differ, so the number is wrong and the order is not

    rewrite(copy, change)
    assert json.loads(run(client, copy, "--repeat", "1").stdout)["wrong_ids"] == 0


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("value", ('"nan"', "1e999"))
def test_what_is_no_number_is_a_difference(client, value, copy):
    """Also where right numbers follow; and what is printed is JSON."""

    def change(content, golden):
        golden["score"]["outputs"]["score"][1] = "PLACE"

    rewrite(copy, change)
    path = copy / "metadata.json"
    path.write_text(path.read_text().replace('"PLACE"', value))
    artifact.write_manifest(copy)
    done = run(client, copy, "--repeat", "1")
    assert done.returncode == 1 and "differs by 1e+300" in done.stderr
    assert json.loads(done.stdout, parse_constant=pytest.fail)["largest_difference"] == 1e300


def recommending(folder: Path, ids, expected) -> Path:
    """A model whose `recommend` gives these ids and scores of 0, with golden vectors that expect others."""

    @tf.function(input_signature=[tf.TensorSpec([None], tf.int32, name="number")])
    def recommend(number):
        return {"item_id": tf.constant(ids), "score": tf.zeros(np.shape(ids))}

    module = tf.Module()
    module.recommend = recommend
    tf.saved_model.save(module, str(folder / "saved_model"), {"recommend": recommend})
    outputs = {"item_id": expected, "score": np.zeros(np.shape(expected)).tolist()}
    golden = [{"signature": "recommend", "inputs": {"number": [0]}, "outputs": outputs}]
    content = {"signatures": saved_graph.signatures(folder / "saved_model"), "golden": golden}
    (folder / "metadata.json").write_text(json.dumps(content))
    artifact.write_manifest(folder)
    return folder


@needs_cc
@pytest.mark.parametrize(
    "ids, expected, wrong",
    [
        ([[5, 6], [6, 5]], [["5", "6"], ["5", "6"]], 0),
        ([[5, 6], [5, 5]], [["5", "6"], ["5", "6"]], 1),
        ([["a", "b"], ["b", "b"]], [["a", "b"], ["a", "b"]], 1),
        ([["a", "aa"]], [["aa", "a"]], 0),
    ],
)
def test_no_id_stands_twice_in_a_list_in_c(ids, expected, wrong, tmp_path):
    folder = recommending(tmp_path, np.array(ids, np.int64 if ids[0][0] == 5 else object), expected)
    done = run([BUILT / "score"], folder, "--repeat", "1")
    assert json.loads(done.stdout)["wrong_ids"] == wrong and done.returncode == (wrong > 0), done.stderr


def test_no_id_stands_twice_in_a_list_in_node(copy):
    content = json.loads((copy / "metadata.json").read_text())
    [golden] = [each for each in content["golden"] if each["signature"] == "recommend"]
    first, second = golden["outputs"]["item_id"][1][2:4]
    path = copy / content["items"]["ids"]["file"]
    ids = np.fromfile(path, "<i8")
    ids[ids == int(second)] = int(first)
    ids.tofile(path)

    def change(content, golden):
        outputs = golden["recommend"]["outputs"]
        content["golden"] = [golden["recommend"]]
        for values in golden["recommend"]["inputs"].values():
            if isinstance(values, list):
                values[:] = values[1:2]
        for name in outputs:
            outputs[name][:] = outputs[name][1:2]
        for values in golden["recommend"]["rows"].values():
            values[:] = values[1:2]
        outputs["score"][0][3] = outputs["score"][0][2]

    rewrite(copy, change)
    assert json.loads(run(NODE, copy, "--repeat", "1").stdout)["wrong_ids"] == 1


def recommended(ids=None, score=None):
    """Of `recommend`, the ids or the scores that are expected become others."""

    def change(content, golden):
        outputs = golden["recommend"]["outputs"]
        outputs["item_id"] = ids(outputs["item_id"]) if ids else outputs["item_id"]
        outputs["score"] = score(outputs["score"]) if score else outputs["score"]
        content["golden"] = [golden["recommend"]]

    return change


def signature_of(name: str, **changed):
    """An input's dtype, shape or tensor becomes another."""
    return lambda content, golden: content["signatures"]["recommend"]["inputs"][name].update(changed)


HOSTILE = {  # how metadata.json is changed, what C says
    "flat ids": (recommended(lambda ids: [id for row in ids for id in row]), "lists of the same number"),
    "one id": (recommended(lambda ids: "3"), "list of lists"),
    "no ids": (recommended(lambda ids: []), "list of lists"),
    "empty lists": (recommended(lambda ids: [[] for _ in ids]), "lists of the same number"),
    "ragged ids": (recommended(lambda ids: [ids[0] + ids[1][:1], ids[1][1:], *ids[2:]]), "lists of the same number"),
    "an id is an object": (recommended(lambda ids: [[{}, *row[1:]] for row in ids]), "a list or an object"),
    "more scores": (recommended(score=lambda scores: [[*row, *[0] * 5000] for row in scores]), "a score for each id"),
    "a score is an object": (
        recommended(score=lambda scores: [[{}, *row[1:]] for row in scores]),
        "a list or an object",
    ),
    "nine dimensions": (signature_of("user_id", shape=[None] * 9), "9 dimensions"),
    "a million dimensions": (signature_of("user_id", shape=[1] * 10**6), "1000000 dimensions"),
    "dtype is a list": (signature_of("user_id", dtype=[]), '"dtype"'),
    "tensor is an object": (signature_of("user_id", tensor={}), '"tensor"'),
    "signature is a list": (lambda content, golden: golden["recommend"].update(signature=[]), '"signature"'),
}


@needs_cc
@pytest.mark.parametrize("change, message", HOSTILE.values(), ids=HOSTILE)
def test_hostile_metadata_is_refused_by_c(change, message, copy):
    rewrite(copy, change)
    done = run([BUILT / "score"], copy, "--repeat", "1")
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and last.startswith("error: ") and message in last, done.stderr


@needs_cc
def test_ids_of_another_type_are_refused_by_c(tmp_path):
    done = run([BUILT / "score"], recommending(tmp_path, np.array([[5, 6]], np.int32), [["5", "6"]]))
    assert done.returncode == 1 and "item_id: neither float32 nor int64 nor string" in done.stderr


@needs_cc
@pytest.mark.parametrize("field", ("name", "sha256", "bytes"))
def test_a_hostile_manifest_is_refused_by_c(field, copy):
    path = copy / "manifest.json"
    content = json.loads(path.read_text())
    content["files"][0][field] = {}
    path.write_text(json.dumps(content))
    done = run([BUILT / "score"], copy)
    assert (
        done.returncode == 1
        and f'error: metadata.json or manifest.json has a list or an object as "{field}"' in done.stderr
    )


def test_node_finds_the_rows_of_ids(copy):
    def change(content, golden):
        golden["user_embedding"]["rows"]["user_index"][0] += 1

    rewrite(copy, change)
    done = run(NODE, copy, "--repeat", "1")
    assert done.returncode == 1 and json.loads(done.stdout)["wrong_rows"] == 1


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


SPOILED = {
    "one bit of a table": ("saved_model/variables/variables.data-00000-of-00001", flip),
    "cut short": ("items/index.usearch", lambda path: path.write_bytes(path.read_bytes()[:-1])),
    "metadata": ("metadata.json", lambda path: path.write_text(path.read_text().replace('"dim": 17', '"dim": 16'))),
    "missing": ("onnx/user_embedding.onnx", Path.unlink),
    "not in the manifest": ("saved_model/assets.extra/more.txt", lambda path: path.write_text("more")),
    "half a manifest": ("manifest.json", lambda path: path.write_text(path.read_text()[:-9])),
}


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("name, spoil", SPOILED.values(), ids=SPOILED)
def test_a_spoiled_model_is_refused_before_use(client, name, spoil, copy):
    (copy / name).parent.mkdir(exist_ok=True)
    spoil(copy / name)
    done = run(client, copy)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and not done.stdout, done.stderr
    assert last.startswith("error: ") and (name in last or "JSON" in last), last


@pytest.mark.parametrize("client", CLIENTS)
def test_a_manifest_cannot_lead_out_of_its_folder(client, copy):
    path = copy / "manifest.json"
    path.write_text(path.read_text().replace("metadata.json", "../elsewhere.json"))
    (copy.parent / "elsewhere.json").write_bytes((copy / "metadata.json").read_bytes())
    done = run(client, copy)
    assert done.returncode == 1 and "../elsewhere.json" in done.stderr


NAMED = {  # where metadata.json names a file
    "vocabulary": lambda content: content["inputs"][0]["vocabulary"],
    "ids": lambda content: content["items"]["ids"],
    "vectors": lambda content: content["items"]["vectors"],
    "index": lambda content: content["items"]["index"],
    "onnx": lambda content: content["onnx"]["user_embedding"],
}


@pytest.mark.parametrize("name", NAMED)
def test_metadata_cannot_lead_out_of_the_manifest(name, copy):
    """C opens no file that metadata.json names."""

    def change(content, golden):
        about = NAMED[name](content)
        shutil.copy(copy / about["file"], copy.parent / Path(about["file"]).name)
        about["file"] = f"../{Path(about['file']).name}"

    rewrite(copy, change)
    done = run(NODE, copy, "--repeat", "1")
    assert done.returncode == 1 and not done.stdout
    assert re.search(r"^error: .*metadata\.json: the file \.\./\S+ is not in manifest\.json$", done.stderr, re.M)


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("name", ("items/vectors.f32", "saved_model/fingerprint.pb", "onnx"))
def test_links_are_refused(client, name, copy):
    """What one leads to can be changed after it was compared. The fingerprint is in no manifest."""
    (copy / name).rename(copy.parent / "elsewhere")
    (copy / name).symlink_to(copy.parent / "elsewhere")
    done = run(client, copy, "--repeat", "1")
    assert (
        done.returncode == 1 and not done.stdout and re.search(f"^error: .*{name}: is no plain file", done.stderr, re.M)
    )


@pytest.mark.parametrize("client", CLIENTS)
def test_a_folder_may_end_with_slashes_or_be_a_link(client, copy):
    (copy.parent / "link").symlink_to(copy)
    for folder in (f"{copy}/", f"{copy}//", copy.parent / "link"):
        done = run(client, folder, "--repeat", "1")
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("client", CLIENTS)
def test_how_to_call_it_is_said(client):
    done = run(client, "model", "--repeat", "0")
    assert done.returncode == 1 and "usage: score" in done.stderr


@pytest.fixture(scope="module")
def right(models):
    """The exact lists of some users, by NumPy; and a file of these users."""
    vectors = np.fromfile(models / "matrix/items/vectors.f32", "<f4").reshape(ITEMS, 17)
    users = np.random.default_rng(3).normal(size=(9, 17)).astype("<f4")
    users.tofile(models / "users.f32")
    return np.argsort(-(users.astype(float) @ vectors.T.astype(float)), 1, kind="stable")[:, :100]


@needs_cc
def test_exact_search_in_c(models, right, tmp_path):
    """Of equal scores, here of each item and its twin, the first in the file comes first."""
    files = models / "matrix/items/vectors.f32", "17", models / "users.f32"
    found = json.loads(run([BUILT / "exact"], *files, "9").stdout)
    assert found["rows"] == ITEMS and found["repeats"] == 9 and found["exact_ms"]["p50"] > 0
    np.testing.assert_array_equal(found["top"], right)
    vectors = np.random.default_rng(4).normal(size=(20_000, 17)).astype("<f4")
    np.concatenate([vectors, vectors]).tofile(tmp_path / "twins.f32")
    users = np.fromfile(files[2], "<f4").reshape(9, 17).astype(float)
    best = np.argsort(-(users @ vectors.T.astype(float)), 1, kind="stable")[:, :50]
    found = json.loads(run([BUILT / "exact"], tmp_path / "twins.f32", *files[1:], "9").stdout)
    np.testing.assert_array_equal(found["top"], np.stack([best, best + 20_000], 2).reshape(9, 100))
    vectors[5] = np.nan
    vectors.tofile(tmp_path / "nan.f32")
    found = json.loads(run([BUILT / "exact"], tmp_path / "nan.f32", *files[1:], "9").stdout)
    best = np.argsort(-(users @ np.nan_to_num(vectors, nan=-9e9).T.astype(float)), 1, kind="stable")
    assert 5 not in np.ravel(found["top"])
    np.testing.assert_array_equal(found["top"], np.stack([row[row != 5][:100] for row in best]))
    vectors[3:] = np.nan  # three are left
    vectors.tofile(tmp_path / "nan.f32")
    found = json.loads(run([BUILT / "exact"], tmp_path / "nan.f32", *files[1:], "9").stdout)
    np.testing.assert_array_equal(found["top"], np.argsort(-(users @ vectors[:3].T.astype(float)), 1))
    vectors[:] = np.nan
    vectors.tofile(tmp_path / "nan.f32")
    assert json.loads(run([BUILT / "exact"], tmp_path / "nan.f32", *files[1:], "9").stdout)["top"] == [[]] * 9
    done = run([BUILT / "exact"], files[0], "18", files[2])
    assert done.returncode == 1 and "no whole number of rows" in done.stderr


def test_exact_search_and_index_in_node(models, right):
    found = json.loads(run(NODE, models / "matrix", "--users", models / "users.f32", "--repeat", "9").stdout)
    np.testing.assert_array_equal(found["top"], right)
    assert found["recall"] > 0.9 and found["index_ms"]["repeats"] == found["exact_ms"]["repeats"] == 9


def test_node_searches_exactly_where_the_index_finds_too_few(models, right, copy):
    vectors = np.fromfile(copy / "items/vectors.f32", "<f4").reshape(ITEMS, 17)
    metadata = json.loads((copy / "metadata.json").read_text())
    about = item_index.build(copy / "items/index.usearch", vectors[:50], vectors[:9], 10)
    rewrite(copy, lambda content, golden: content["items"]["index"].update(dim=about["dim"]))
    assert metadata["items"]["index"]["file"] == "items/index.usearch"
    found = json.loads(run(NODE, copy, "--users", models / "users.f32", "--repeat", "9").stdout)
    np.testing.assert_array_equal(found["top"], right)
    assert found["recall"] == 1


# Building ----------------------------------------------------------------------------------------------


@needs_cc
def test_what_is_built_is_not_built_again():
    assert run(["make", "-C", ROOT, "-q", "serving"]).returncode == 0


def test_without_a_compiler_node_is_built(tmp_path):
    for name in (".venv", "serving", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(BUILT, tmp_path / "build/serving", symlinks=True, ignore=shutil.ignore_patterns("node_modules"))
    (tmp_path / "build/serving/score.mjs").unlink()
    (tmp_path / "bin").mkdir()
    for tool in ("sh", "mkdir", "rm", "cp", "ln", "cmp", "touch"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    command = ["sh", "tools/serving.sh"]
    done = subprocess.run(command, cwd=tmp_path, env={"PATH": str(tmp_path / "bin")}, capture_output=True, text=True)
    assert done.returncode == 0 and "no C compiler (cc) on the PATH" in done.stderr
    assert (tmp_path / "build/serving/score.mjs").exists() and not (tmp_path / "build/serving/built").exists()


def test_the_lock_names_hashes_and_no_registry():
    text = (ROOT / "serving/package-lock.json").read_text()
    packages = json.loads(text)["packages"]
    own = packages.pop("")
    assert own["dependencies"] == json.loads((ROOT / "serving/package.json").read_text())["dependencies"]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in own["dependencies"].values())
    assert len(packages) > 3 and all(each["integrity"].startswith("sha512-") for each in packages.values())
    assert "resolved" not in text and "registry" not in text
    hosts = set(re.findall(r"https?://([^/\"]+)", text))
    assert hosts <= {"github.com"}, "pages of sponsors are all that a lock may name"


# The service -------------------------------------------------------------------------------------------


def test_the_fingerprint_is_tensorflows():
    from fingerprint import fingerprint64

    dice = np.random.default_rng(1)
    data = [dice.bytes(length) for length in [*range(260), 1000, 4097]]
    expected = tf.bitcast(tf.fingerprint(data), tf.uint64).numpy()
    assert [fingerprint64(each) for each in data] == expected.tolist()


class Service:
    """The service in a process of its own, on a free port."""

    def __init__(self, folder: Path, *options: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, ROOT / "serving/service.py", folder, "--port", str(self.port), *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(300):
            if self.process.poll() is not None:
                raise RuntimeError(self.process.stdout.read())
            try:
                self.ask("/health")
                return
            except urllib.error.URLError:
                time.sleep(0.1)

    def ask(self, path: str, body=None) -> tuple[int, dict]:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def stop(self) -> str:
        """What it wrote."""
        self.process.terminate()
        return self.process.communicate(timeout=30)[0]


@pytest.fixture(scope="module")
def services(models):
    """By model: the two-tower reads all items, the matrix factorization asks the index."""
    found = {"matrix": Service(models / "matrix"), "tower": Service(models / "tower", "--exact")}
    yield found
    for each in found.values():
        each.stop()


def asked(metadata: dict) -> list[tuple[dict, list, list]]:
    """Requests from the golden vectors of `recommend`, with the ids and scores that they must give."""
    [golden] = [each for each in metadata["golden"] if each["signature"] == "recommend"]
    found = []
    for number, (ids, scores) in enumerate(zip(golden["outputs"]["item_id"], golden["outputs"]["score"], strict=True)):
        body = {name: values if name == "k" else values[number] for name, values in golden["inputs"].items()}
        if "history" in body:
            body["history"] = body["history"][HISTORY - body.pop("history_length") :]
        found.append((body, ids, scores))
    return found


@pytest.mark.parametrize("model", ("matrix", "tower"))
def test_the_service_gives_what_the_model_gives(model, services):
    """Unknown users and items among them, empty histories and full ones."""
    status, metadata = services[model].ask("/metadata")
    assert status == 200 and metadata["name"] == services[model].ask("/health")[1]["model"]
    requests = asked(metadata)
    assert len(requests) == 6
    for body, ids, scores in requests:
        status, answer = services[model].ask("/recommend", body)
        assert status == 200 and answer["model"] == metadata["name"], answer
        assert [item["item_id"] for item in answer["items"]] == ids
        np.testing.assert_allclose([item["score"] for item in answer["items"]], scores, rtol=1e-5, atol=1e-5)


def test_ids_are_integers_or_strings_of_digits(services):
    one, other = (services["matrix"].ask("/recommend", {"user_id": each}) for each in (2**53 + 1, str(2**53 + 1)))
    assert one == other and one[0] == 200 and len(one[1]["items"]) == 10
    neighbour = services["matrix"].ask("/recommend", {"user_id": 2**53})  # as a double, it would be the same
    assert neighbour[1]["items"] != one[1]["items"]


def test_fewer_are_given_where_no_more_are_left(services):
    everything = [str(3 + 7 * n) for n in range(ITEMS - 2)]
    status, answer = services["matrix"].ask("/recommend", {"user_id": 0, "k": 10, "seen_item_id": everything})
    assert status == 200 and {item["item_id"] for item in answer["items"]} == {"2789", "2796"}


BAD = {  # model, what is sent in place or besides, the field that the answer names
    "float": ("matrix", {"user_id": 5.5}, "user_id"),
    "text": ("matrix", {"user_id": "five"}, "user_id"),
    "boolean": ("matrix", {"user_id": True}, "user_id"),
    "null": ("matrix", {"user_id": None}, "user_id"),
    "list": ("matrix", {"user_id": [5]}, "user_id"),
    "above int64": ("matrix", {"user_id": 2**63}, "user_id"),
    "below int64": ("matrix", {"user_id": str(-(2**63) - 1)}, "user_id"),
    "very long": ("matrix", {"user_id": "1" * 100_000}, "user_id"),
    "zeros before it": ("matrix", {"user_id": "0" * 20 + "1234"}, "user_id"),
    "a long name": ("matrix", {"x" * 5000: 3}, "x" * 200),
    "unknown field": ("matrix", {"item_id": 3}, "item_id"),
    "k is 0": ("matrix", {"k": 0}, "k"),
    "k is too large": ("matrix", {"k": ITEMS + 1}, "k"),
    "k is a string": ("matrix", {"k": "10"}, "k"),
    "k is a float": ("matrix", {"k": 10.0}, "k"),
    "seen is one id": ("matrix", {"seen_item_id": 3}, "seen_item_id"),
    "seen has a text": ("matrix", {"seen_item_id": [3, "x"]}, "seen_item_id.1"),
    "seen is too long": ("matrix", {"seen_item_id": [3] * 10_001}, "seen_item_id"),
    "history is too long": ("tower", {"history": ["a"] * (HISTORY + 1)}, "history"),
    "history has a number": ("tower", {"history": ["a", 3]}, "history.1"),
    "half a character": ("tower", {"history": ["\ud800"]}, "history.0"),
    "history is missing": ("tower", {"history": ...}, "history"),
}


@pytest.mark.parametrize("model, changed, field", BAD.values(), ids=BAD)
def test_a_bad_request_is_refused_with_its_field(model, changed, field, services):
    body = {"user_id": 5} | ({"history": ["item-1"]} if model == "tower" else {})
    assert services[model].ask("/recommend", body)[0] == 200
    body = {name: value for name, value in (body | changed).items() if value is not ...}
    status, answer = services[model].ask("/recommend", body)
    assert status == 422 and [each["field"] for each in answer["detail"]] == [field], answer
    assert all(each["message"] for each in answer["detail"]) and len(json.dumps(answer)) < 1000


def test_what_is_no_request_at_all_is_refused(services):
    for body, message in ((b'{"user_id": 5', "JSON decode error"), (b"[5]", "dictionary"), (b"", "Field required")):
        status, answer = services["matrix"].ask("/recommend", body)
        assert status == 422 and message in answer["detail"][0]["message"], answer
    assert services["matrix"].ask("/recommend", b"9" * 5000)[0] in (400, 422)
    assert services["matrix"].ask("/recommend")[0] == 405 and services["matrix"].ask("/nowhere")[0] == 404
    assert services["matrix"].ask("/health") == (200, {"status": "ok", "model": "matrix"})


def test_a_refusal_is_short(services):
    body = {"user_id": 5} | {f"field {n}": 1 for n in range(5000)}
    status, answer = services["matrix"].ask("/recommend", body)
    assert status == 422 and len(answer["detail"]) == 20


def test_a_body_is_limited_whatever_its_headers_say(services):
    body = b'{"user_id": 5, "k": 3}'
    padded = body + b" " * ((1 << 20) - len(body))
    assert services["matrix"].ask("/recommend", padded)[0] == 200
    assert services["matrix"].ask("/recommend", padded + b" ")[0] == 413
    for size, expected in ((len(padded), b" 200 "), (len(padded) + 1, b" 413 ")):
        with socket.create_connection(("127.0.0.1", services["matrix"].port), timeout=30) as client:
            head = "POST /recommend HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n"
            client.sendall(f"{head}transfer-encoding: chunked\r\n\r\n".encode())
            for begin in range(0, size, 1 << 16):  # no content-length
                part = (padded + b" ")[begin : min(size, begin + (1 << 16))]
                client.sendall(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            client.sendall(b"0\r\n\r\n")
            assert expected in client.recv(1000).splitlines()[0]


def test_metadata_is_what_was_read_at_the_start(copy):
    service = Service(copy)
    try:
        before = service.ask("/metadata")
        (copy / "metadata.json").write_text("{}")
        assert before[0] == 200 and service.ask("/metadata") == before
    finally:
        service.stop()


def test_a_number_that_float32_has_not_is_refused(models):
    import service
    from pydantic import ValidationError

    recommender = service.Recommender(models / "matrix")
    user = recommender.users[0]
    number = user.model_copy(update={"name": "age", "kind": "number", "dtype": "float32"})
    recommender.users = [user, number]
    wanted = service.request_model(recommender)
    assert wanted(user_id=5, age=3.4e38).age == 3.4e38
    for age in (1e39, -1e39, float("inf"), float("nan"), "3"):
        with pytest.raises(ValidationError) as error:
            wanted(user_id=5, age=age)
        assert [each["loc"] for each in error.value.errors()] == [("age",)]


def test_the_service_gives_all_items_where_the_index_finds_fewer(models, monkeypatch):
    import service

    recommender = service.Recommender(models / "matrix")
    search = recommender.index.search

    class Few:
        ndim = recommender.index.ndim

        def __len__(self):
            return ITEMS

        def search(self, users, k):
            return search(users, k // 2)

    everything = [each.item_id for each in recommender.recommend({"user_id": 0}, ITEMS, [], exact=True)]
    recommender.index = Few()
    assert [each.item_id for each in recommender.recommend({"user_id": 0}, ITEMS, [])] == everything
    assert len(set(everything)) == ITEMS


def test_the_service_has_no_tensorflow_and_logs_no_body(models):
    service = Service(models / "matrix")
    for user in (987654321, "987654321x"):
        service.ask("/recommend", {"user_id": user})
    maps = Path(f"/proc/{service.process.pid}/maps")
    if maps.exists():
        libraries = maps.read_text()
        assert "onnxruntime" in libraries and "libtensorflow" not in libraries
    assert "987654321" not in service.stop()


def test_the_service_refuses_a_spoiled_model(copy):
    flip(copy / "items/vectors.f32")
    done = run([sys.executable, ROOT / "serving/service.py"], copy, "--port", "0")
    assert done.returncode == 1 and "items/vectors.f32: has SHA-256" in done.stderr


def test_the_service_refuses_a_model_that_gives_other_numbers(copy):
    rewrite(copy, off_by(3e-5, "user_embedding"))
    done = run([sys.executable, ROOT / "serving/service.py"], copy, "--port", "0")
    assert done.returncode == 1 and "golden user 0: the embedding differs by" in done.stderr


def other_rows(content, golden):
    golden["user_embedding"]["rows"]["user_index"][1] += 1


def another_length(content, golden):
    for values in golden["recommend"]["outputs"].values():
        values[3].pop()


def no_golden(content, golden):
    content["golden"] = []


def golden_of_nobody(content, golden):
    for part in ("inputs", "outputs"):
        golden["recommend"][part] |= {name: [] for name in golden["recommend"][part] if name != "k"}


def fewer_vectors(content, golden):
    content["items"]["vectors"]["shape"][0] -= 1


@pytest.mark.parametrize(
    "change, expected",
    [
        (other_rows, "golden user 1: user_index becomes 200, expected 201"),
        (off_by(3e-5, "recommend"), "golden user 0: the score differs by"),
        (another_item, "golden user 1: the score of item .* differs by"),
        (another_length, "golden user 3: 10 items, expected 9"),
        (no_golden, "no golden vectors of recommend"),
        (golden_of_nobody, "no golden vectors of recommend"),
        (fewer_vectors, r"are \[400, 399, 400\], expected the same"),
    ],
    ids=["rows", "score", "item", "fewer items", "no golden", "empty golden", "vectors"],
)
def test_the_service_refuses_what_golden_vectors_do_not_bear_out(change, expected, copy):
    import service

    rewrite(copy, change)
    with pytest.raises(ValueError, match=expected):
        service.Recommender(copy)

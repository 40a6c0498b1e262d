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

from recsys_common import artifact, saving
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
    assert 0 < found["recommend_ms"]["p50"] <= found["recommend_ms"]["p99"]
    tell(f"golden vectors, {model}, {found['client']}: largest difference {found['largest_difference']:.1e}")


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
    done = run([BUILT / "exact"], files[0], "18", files[2])
    assert done.returncode == 1 and "no whole number of rows" in done.stderr


def test_exact_search_and_index_in_node(models, right):
    found = json.loads(run(NODE, models / "matrix", "--users", models / "users.f32", "--repeat", "9").stdout)
    np.testing.assert_array_equal(found["top"], right)
    assert found["recall"] > 0.9 and found["index_ms"]["repeats"] == 9


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

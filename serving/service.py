"""How does a model answer over HTTP? A small service on FastAPI and uvicorn, without TensorFlow.

    python serving/service.py <model> --port 8000        (make serve MODEL=folder PORT=8000)
    curl localhost:8000/recommend -H 'content-type: application/json' -d '{"user_id": 5, "k": 10}'

    POST /recommend     the user's inputs as metadata.json names them, k, seen_item_id -> {"model", "items"}
    GET  /metadata      metadata.json
    GET  /health        {"status": "ok", "model": its name}
    GET  /docs          a page to try it, made from the checks themselves

Why FastAPI: what checks a request is the pydantic that checks this project's configs, every refusal names its field,
and the OpenAPI page comes with it. uvicorn is the server it is made for. TensorFlow Serving, the obvious other choice,
comes as a container or from a package archive of its own, takes no string apart and knows no index.

<model> is a folder of recsys_common/saving.py: compared with its manifest first, then its golden vectors are run, and
only then is it served. Ids become rows of tables here, ONNX Runtime makes the user's embedding, and the index finds
items; --exact reads all of them. int64 ids are taken as integers or as strings of digits, and given as strings, for
numbers of JSON are doubles. An unknown id is no error: it has a row of its own. No request's body is logged. There is
no encryption and no login: that is what stands before a service in every company.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fingerprint import fingerprint64
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, WithJsonSchema, create_model
from pydantic_core import PydanticCustomError

from recsys_common import artifact, item_index
from recsys_common.artifact import Input

MOST_ITEMS, MOST_SEEN = 1000, 10_000  # of one request
MOST_BYTES = 1 << 20  # of a request's body
MOST_ERRORS, MOST_NAME = 20, 200  # that a refusal lists, and characters of a field's name
LARGEST = float(np.finfo(np.float32).max)
TOLERANCE = 1e-5  # golden vectors; relative above 1


def _int64(value: Any) -> int:
    if isinstance(value, str) and value.lstrip("-").isascii() and value.removeprefix("-").isdigit():
        value = int(value) if len(value) <= 20 else None  # as long as the longest int64
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise PydanticCustomError("int64", "expected an int64 id: an integer, or a string of its digits")
    return value


ID = {
    "int64": Annotated[
        int, BeforeValidator(_int64), WithJsonSchema({"anyOf": [{"type": "integer"}, {"type": "string"}]})
    ],
    "string": Annotated[str, StringConstraints(strict=True, max_length=1000)],
}


class Item(BaseModel):
    """One recommendation."""

    item_id: str
    score: float


class Answer(BaseModel):
    """What /recommend gives, best first."""

    model: str
    items: list[Item]


class Rows:
    """From raw ids of one input to rows of its table, as metadata.json says."""

    def __init__(self, folder: Path, given: Input):
        self.given = given
        if given.salt is not None:
            self.salt = fingerprint64(given.salt.encode())
        if given.vocabulary is not None:
            self.find = places(folder / given.vocabulary.file)

    def __call__(self, raw: int | str) -> int:
        """The row of one id."""
        given = self.given
        if given.buckets is not None:
            salted = (raw % 2**64) ^ self.salt
            return (fingerprint64(salted.to_bytes(8, "little")) >> 32) * given.buckets >> 32
        if (place := self.find(raw)) >= 0:
            return given.oov_buckets + place
        return fingerprint64(f"{given.salt}{raw}".encode()) % given.oov_buckets if given.oov_buckets > 1 else 0


def places(path: Path) -> Callable[[int | str], int]:
    """A function: id -> its place in a file of ids, -1 if it has none. int64 take 16 bytes an id."""
    ids = artifact.read_ids(path)
    if isinstance(ids, list):
        known = {each: place for place, each in enumerate(ids)}
        return lambda raw: known.get(raw, -1)
    order = np.argsort(ids, kind="stable")
    ordered = np.asarray(ids)[order]

    def find(raw: int) -> int:
        place = int(ordered.searchsorted(raw))
        return int(order[place]) if place < len(ordered) and ordered[place] == raw else -1

    return find


class Recommender:
    """A model in memory.

    Args:
      folder: of `saving.export`, with ONNX.
      exact: read all items for each request, whether there is an index or not.

    Raises:
      ValueError: the folder is not as it was written, has no ONNX or no golden vectors, its ids, vectors and index are
        not equally many, or it does not give what its golden vectors say.
    """

    def __init__(self, folder: str | Path, exact: bool = False):
        folder = Path(folder)
        self.metadata = artifact.verify(folder)
        self.metadata_bytes = (folder / artifact.METADATA).read_bytes()
        if "user_embedding" not in self.metadata.onnx:
            raise ValueError(
                f"{folder}: has no ONNX of user_embedding, which the service runs; export it with onnx=True"
            )
        about, items = self.metadata.onnx["user_embedding"], self.metadata.items
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # one user is too little to share out
        self.session = onnxruntime.InferenceSession(folder / about.file, options, providers=["CPUExecutionProvider"])
        self.feeds, self.output = about.inputs, about.outputs["embedding"].tensor
        self.users = [each for each in self.metadata.inputs if each.side == "user"]
        self.rows = {each.name: Rows(folder, each) for each in self.users if each.kind != "number"}
        self.item_ids = artifact.read_ids(folder / items.ids.file)
        self.place = places(folder / items.ids.file)
        self.vectors = np.memmap(folder / items.vectors.file, "<f4", "r", shape=tuple(items.vectors.shape))
        self.index = None
        if items.index is not None and not exact:
            self.index = item_index.load(folder / items.index.file, items.index.expansion_search)
        counts = [len(self.item_ids), len(self.vectors)] + ([] if self.index is None else [len(self.index)])
        if len(set(counts)) > 1:
            raise ValueError(f"{folder}: numbers of ids, vectors (and in the index) are {counts}, expected the same")
        self.check_golden()

    def batch(self, raw: dict[str, Any]) -> dict[str, np.ndarray]:
        """Inputs of one user as features [1] or [1, L]: histories are padded at the left."""
        features = {}
        for each in self.users:
            value = raw[each.name]
            if each.kind == "number":
                features[each.feature] = [value]
            elif each.length:
                length = each.shape[1]
                known = [self.rows[each.name](one) for one in value]
                features[each.feature] = [[0] * (length - len(known)) + known]
                features[each.length] = [len(known)]
            else:
                features[each.feature] = [self.rows[each.name](value)]
        return features

    def embedding(self, batch: dict) -> np.ndarray:
        """Features -> float32 [n, D]."""
        feeds = {spec.tensor: np.asarray(batch[name], spec.dtype) for name, spec in self.feeds.items()}
        return self.session.run([self.output], feeds)[0]

    def recommend(self, raw: dict[str, Any], k: int, seen: list, exact: bool = False) -> list[Item]:
        """The k best items that are not seen, best first; fewer where there are no more."""
        left_out = {self.place(each) for each in seen} - {-1}
        user, wanted = self.embedding(self.batch(raw)), k + len(left_out)
        if self.index is None or exact:
            found, scores = item_index.exact(self.vectors, user, wanted)
        else:
            found, scores = item_index.search(self.index, user, wanted, self.vectors)
        pairs = [pair for pair in zip(found[0].tolist(), scores[0].tolist(), strict=True) if pair[0] not in left_out]
        return [Item(item_id=str(self.item_ids[place]), score=score) for place, score in pairs[:k]]

    def check_golden(self) -> None:
        """Run the golden vectors of user_embedding and, with exact search, of recommend.

        Rows must be the same, embeddings and scores within 1e-5, and the items those of these scores, in any order
        where they are equal.

        Raises:
          ValueError: they are not, or there are none.
        """
        checked = {"user_embedding": self.check_embedding, "recommend": self.check_recommend}
        if missing := sorted(
            checked.keys() - {each.signature for each in self.metadata.golden if any(each.outputs.values())}
        ):
            raise ValueError(f"metadata.json: has no golden vectors of {missing[0]}, without which nothing is served")
        for golden in self.metadata.golden:
            if golden.signature not in checked:
                continue
            for number in range(len(next(iter(golden.outputs.values())))):
                raw = self.raw(golden, number)
                batch = self.batch(raw)
                for each in self.users:
                    begin = each.shape[1] - batch[each.length][0] if each.length else None  # padding may be anything
                    found, wanted = batch[each.feature][0], golden.rows[each.feature][number]
                    if (found[begin:] != wanted[begin:]) if each.length else (found != wanted):
                        raise ValueError(f"golden user {number}: {each.feature} becomes {found}, expected {wanted}")
                checked[golden.signature](golden, number, raw)

    def raw(self, golden: artifact.Golden, number: int) -> dict[str, Any]:
        """Inputs of one user of golden vectors as a request has them."""
        raw = {each.name: golden.inputs[each.name][number] for each in self.users}
        for each in self.users:
            if each.length:  # without its padding
                raw[each.name] = raw[each.name][each.shape[1] - golden.inputs[each.length][number] :]
            if each.dtype == "int64":
                raw[each.name] = [*map(int, raw[each.name])] if each.length else int(raw[each.name])
        return raw

    def check_embedding(self, golden: artifact.Golden, number: int, raw: dict) -> None:
        """Compare one user's embedding."""
        found = self.embedding(self.batch(raw))[0]
        _compare(f"golden user {number}: the embedding", found, golden.outputs["embedding"][number])

    def check_recommend(self, golden: artifact.Golden, number: int, raw: dict) -> None:
        """Compare one user's exact list."""
        seen, k = golden.inputs["seen_item_id"][number], golden.inputs["k"]
        if self.metadata.items.ids.dtype == "int64":
            seen = [*map(int, seen)]
        wanted = {name: golden.outputs[name][number] for name in ("item_id", "score")}
        found = self.recommend(raw, k, seen, exact=True)
        if len(found) != len(wanted["item_id"]):
            raise ValueError(f"golden user {number}: {len(found)} items, expected {len(wanted['item_id'])}")
        _compare(f"golden user {number}: the score", [each.score for each in found], wanted["score"])
        score = dict(zip(wanted["item_id"], wanted["score"], strict=True))
        for each in found:
            near = score.get(each.item_id, wanted["score"][-1])  # the last may be another one of the same score
            _compare(f"golden user {number}: the score of item {each.item_id}", each.score, near)


def _compare(what: str, found: Any, wanted: Any) -> None:
    found, wanted = np.asarray(found, np.float32), np.asarray(wanted, np.float32)
    if found.shape != wanted.shape:
        raise ValueError(f"{what} has shape {found.shape}, expected {wanted.shape}")
    difference = float((np.abs(found - wanted) / np.maximum(np.abs(wanted), 1)).max())
    if not difference <= TOLERANCE:
        raise ValueError(f"{what} differs by {difference}; expected {TOLERANCE}")


def request_model(recommender: Recommender) -> type[BaseModel]:
    """What /recommend takes, as a pydantic model: the user's inputs of metadata.json, k and seen_item_id."""
    fields = {}
    for each in recommender.users:
        if each.kind == "number":
            fields[each.name] = (
                Annotated[float, Field(strict=True, allow_inf_nan=False, ge=-LARGEST, le=LARGEST)],
                ...,
            )
        elif each.length:
            about = f"the latest last, at most {each.shape[1]}"
            fields[each.name] = (
                Annotated[list[ID[each.dtype]], Field(max_length=each.shape[1], description=about)],
                ...,
            )
        else:
            fields[each.name] = (ID[each.dtype], ...)
    most = min(MOST_ITEMS, len(recommender.item_ids))
    seen = list[ID[recommender.metadata.items.ids.dtype]]
    fields["k"] = (Annotated[int, Field(strict=True, ge=1, le=most, description="how many")], min(10, most))
    fields["seen_item_id"] = (Annotated[seen, Field(max_length=MOST_SEEN, description="left out")], [])
    return create_model("Wanted", __config__=ConfigDict(extra="forbid"), **fields)


class Limited:
    """Middleware: status 413 for a body above `MOST_BYTES`, by the bytes that come, whatever its headers say."""

    def __init__(self, app: Callable):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        """One request of ASGI; its body is read here, and then given on."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        body, message = bytearray(), {"more_body": True}
        while message.get("more_body"):
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message["body"]
            if len(body) > MOST_BYTES:
                detail = [{"field": "", "message": f"a body has at most {MOST_BYTES:,} bytes"}]
                return await JSONResponse({"detail": detail}, 413, {"connection": "close"})(scope, receive, send)
        parts = iter([{"type": "http.request", "body": bytes(body), "more_body": False}])

        async def again() -> dict:
            return next(parts, None) or await receive()

        return await self.app(scope, again, send)


def application(folder: str | Path, exact: bool = False) -> FastAPI:
    """The service of one model.

    Raises:
      ValueError: as `Recommender`.
    """
    recommender = Recommender(folder, exact)
    name = recommender.metadata.name
    wanted_model = request_model(recommender)
    app = FastAPI(title=name, description=(__doc__ or "").partition("\n")[0])
    app.add_middleware(Limited)

    @app.exception_handler(RequestValidationError)
    def refuse(request: Request, error: RequestValidationError) -> JSONResponse:
        """Status 422: the fields that are wrong, and why; not the values, which may be long or private."""
        detail = []
        for each in error.errors()[:MOST_ERRORS]:
            place = ".".join(str(part) for part in each["loc"] if part != "body")[:MOST_NAME]
            detail.append({"field": place if each["type"] != "json_invalid" else "", "message": each["msg"]})
        return JSONResponse({"detail": detail}, 422)

    @app.post("/recommend")
    def recommend(wanted: wanted_model) -> Answer:
        raw = {each.name: getattr(wanted, each.name) for each in recommender.users}
        return Answer(model=name, items=recommender.recommend(raw, wanted.k, wanted.seen_item_id))

    @app.get("/metadata")
    def metadata() -> Response:
        return Response(recommender.metadata_bytes, media_type="application/json")

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok", "model": name}

    return app


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="a folder of saving.export")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--host", default="127.0.0.1", help="this machine alone, unless said otherwise")
    parser.add_argument("--exact", action="store_true", help="read all items for each request, index or not")
    arguments = parser.parse_args()
    try:
        app = application(arguments.model, arguments.exact)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    uvicorn.run(app, host=arguments.host, port=arguments.port, access_log=False, log_level="warning")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""One run of implicit ALS, ours or that of the library `implicit`: NDCG@10 on validation after each pass, and when.

    python benchmarks/_ials.py data.npz ours --factors 64 --passes 15 --alpha0 0.2 --l2 2

Not a benchmark itself: collaborative_filtering.py starts it, in an environment of its own. Prints one JSON line a pass;
the seconds leave the evaluation out. Both minimise the same function: ours with nu = 0,

    sum_S (s - 1)^2 + alpha0 sum_all s^2 + l2 |rows|^2,

and with s = t / (1 + alpha0), rows scaled likewise, and all of it times 1 + alpha0,

    sum_S (t - 1)^2 + alpha0 / (1 + alpha0) sum_(not S) t^2 + l2 |rows|^2,

which is what the library minimises, divided by its alpha = (1 + alpha0) / alpha0, with regularization = l2 alpha.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ |= {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # as the library asks for; both have own threads
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from recsys_common import evaluation
from recsys_common.interactions import Interactions


def main() -> None:
    """Fit, and print a line after each pass."""
    parser = argparse.ArgumentParser(description="one run of implicit ALS")
    parser.add_argument("data", help="train_offsets, train_items, num_items; test_users, test_items")
    parser.add_argument("library", choices=("ours", "implicit"))
    parser.add_argument("--factors", type=int, required=True)
    parser.add_argument("--passes", type=int, required=True)
    parser.add_argument("--alpha0", type=float, required=True)
    parser.add_argument("--l2", type=float, required=True)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    stored = np.load(given.data)
    train = Interactions(stored["train_offsets"], stored["train_items"], int(stored["num_items"]))
    asked = np.unique(stored["test_users"])
    had = train.rows(asked)
    away = [0.0]  # seconds of evaluation, and of what comes before the first pass
    started = time.perf_counter()

    def told(users, items, done: int) -> None:
        paused = time.perf_counter()
        seconds = paused - started - away[0]
        seen = asked[had.users], had.items
        test = stored["test_users"], stored["test_items"]
        found = evaluation.evaluate(lambda rows: users[rows] @ items.T, *test, *seen, train.num_items, 10)
        print(json.dumps({"pass": done, "seconds": round(seconds, 3), "ndcg": found["NDCG@10"]}), flush=True)
        away[0] += time.perf_counter() - paused

    if given.library == "ours":
        from recsys_common.models import ials

        few = {"dim": given.factors, "epochs": 1, "block": 32, "alpha0": given.alpha0, "l2": given.l2, "nu": 0.0}
        ials.fit(train.rows(asked[:2]), ials.Parameters(**few))  # compiled before the clock starts
        started = time.perf_counter()
        parameters = ials.Parameters(**few | {"epochs": given.passes})
        ials.fit(train, parameters, given.seed, lambda model, epoch: told(model.users, model.items, epoch))
    else:
        from implicit.cpu.als import AlternatingLeastSquares

        alpha = (1 + given.alpha0) / given.alpha0
        model = AlternatingLeastSquares(
            given.factors,
            regularization=given.l2 * alpha,
            alpha=alpha,
            iterations=given.passes,
            random_state=given.seed,
        )
        matrix = train.matrix()
        started = time.perf_counter()
        model.fit(
            matrix,
            show_progress=False,
            callback=lambda epoch, *_: told(model.user_factors, model.item_factors, epoch + 1),
        )


if __name__ == "__main__":
    main()

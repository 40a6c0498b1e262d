"""What would ratings look like if the truth about every person were known?

    tables = simulated.load(rows=100_000, seed=1)                    # RatingTables; tables.truth is the Truth below
    for table in simulated.stream(rows=100_000_000): ...             # the same model, 4,096 users at a time

Every item has a home among 18 taste groups and a weaker place in another; popularity is long-tailed. A user has a
taste, which is a distribution over the groups. Tastes and popularity drift: at time t, from 0 at the start to 1 at
the end of the four years,

    taste_u(t) = (1 - t) taste_u(0) + t taste_u(1)        p(i | g, t) = (1 - t) p(i | g, 0) + t p(i | g, 1)

and a user u who took item j last takes the next item i, among those not taken yet, with odds proportional to

    P(i | u, j, t) = NOISE p(i | all, t) + ORDER follows(i | j) + TASTE sum_g taste_ug(t) p(i | g, t)

`follows` leads to the next three items of the group's ring, where a sequel stands after its first part. Users arrive
over the years and come back in visits until the end. Stars are mood, the item's quality, liking and noise. Users grow
with the rows, items with their square root. A chunk depends on (rows, seed, its number) alone, on every machine, so
several processes can draw different chunks.

Needs: __init__.py simulated_items.py
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from . import RATINGS_SCHEMA, RatingTables, simulated_items
from .simulated_items import GROUP_SHARE, Catalogue, G, generator

# Set so that 100,000 rows look like ml-100k to popularity and to matrix factorization. What each one moves:
NOISE, ORDER, TASTE = 0.10, 0.10, 0.80  # more ORDER: sequence models gain; more TASTE: matrix factorization gains
PEAK = 1.8  # Dirichlet mass of a taste; less is a sharper taste and a larger gain of matrix factorization
KEPT_TASTE = 0.6  # share of the first taste that is left at the end; less: old rows mislead
FOLLOWERS = (0.6, 0.25, 0.15)  # how ORDER divides over the next three items of the ring
MEAN_ROWS, MIN_ROWS, ROWS_SCALE, ROWS_SHAPE = 106, 20, 74.0, 1.3  # rows a user: MIN_ROWS + Weibull
ITEMS_AT_100K = 1700
STARS, USER_STARS, LIKING, STAR_NOISE = 3.0, 0.4, 1.2, 0.9  # mean and spread of the stars
START, SECONDS = 1_577_836_800, 1461 * 86_400  # 2020-01-01 and the four years after it
CHUNK_USERS = 4096  # users drawn side by side: more is faster and takes more memory


def _sizes(rows: int) -> tuple[int, int]:
    """Users and items that go with `rows`."""
    if rows < 1000:
        raise ValueError(f"simulated ratings: rows is {rows:,}, expected 1,000 or more (a user has {MEAN_ROWS})")
    return round(rows / MEAN_ROWS), max(300, round(ITEMS_AT_100K * (rows / 100_000) ** 0.5))


def _tastes(rows: int, seed: int, number: int) -> np.ndarray:
    """Tastes of the users of a chunk at the start and at the end: float64 [users, 2, G]."""
    rng, users = generator(seed, 2, number), min(CHUNK_USERS, _sizes(rows)[0] - number * CHUNK_USERS)
    first, fresh = rng.standard_gamma(PEAK * GROUP_SHARE, (2, users, G)) + 1e-9
    first /= first.sum(1, keepdims=True)
    fresh /= fresh.sum(1, keepdims=True)
    return np.stack([first, KEPT_TASTE * first + (1 - KEPT_TASTE) * fresh], axis=1)


def _elapsed(timestamps: np.ndarray) -> np.ndarray:
    """Seconds since 1970 -> 0 at the start of the four years, 1 at their end."""
    return np.clip((np.asarray(timestamps, np.float64) - START) / SECONDS, 0, 1)


def _rows_per_user(rng: np.random.Generator, users: int, rows: int, items: int) -> np.ndarray:
    # The quantiles of the distribution, one for each user, and no draws: the sum is exact in every chunk.
    extra = ROWS_SCALE * (-np.log1p(-(rng.permutation(users) + 0.5) / users)) ** ROWS_SHAPE
    extra = np.cumsum(np.minimum(extra, items // 2 - MIN_ROWS))  # leaves heavy users something to choose from
    extra = np.rint(extra * ((rows - MIN_ROWS * users) / extra[-1])).astype(np.int64)
    return MIN_ROWS + np.diff(extra, prepend=0)


def _timestamps(rng: np.random.Generator, counts: np.ndarray) -> np.ndarray:
    """Seconds since 1970 of every row, user after user, strictly increasing within a user."""
    rows, first = counts.sum(), np.cumsum(counts) - counts
    returns = rng.random(rows) < 0.15  # a visit has about seven rows
    away = np.cumsum(np.where(returns, rng.standard_exponential(rows), 0))
    pause = np.cumsum(rng.integers(20, 240, rows))
    arrival = 0.97 * rng.random(len(counts)) ** 2  # rows a month grow fivefold over the years
    away_in_all = away[first + counts - 1] - away[first] + rng.standard_exponential(len(counts))
    stretch = (1 - arrival) / away_in_all
    moment = np.repeat(arrival - away[first] * stretch, counts) + away * np.repeat(stretch, counts)
    # The last three days are left to the pauses, which are two minutes on average.
    return START + (moment * (SECONDS - 3 * 86_400)).astype(np.int64) + pause - np.repeat(pause[first], counts)


def _propose(
    rng: np.random.Generator, catalogue: Catalogue, taste_sums: np.ndarray, user: np.ndarray, t: np.ndarray
) -> np.ndarray:
    """Draw an item for each (user, t); ~k stands for "follower k of the last item"."""
    which, u_taste, u_group, u_time, u_item = rng.random((5, len(user)))
    group = np.searchsorted(taste_sums, 2 * user + (u_taste < t) + u_group) % G
    row = np.where(which < TASTE, 1 + group, 0) + (1 + G) * (u_time < t)
    item = catalogue.sums_item[np.searchsorted(catalogue.sums, row + u_item)]
    return np.where(which < 1 - ORDER, item, ~np.searchsorted(np.cumsum(FOLLOWERS)[:-1], u_item))


def _walk(
    rng: np.random.Generator, catalogue: Catalogue, tastes: np.ndarray, counts: np.ndarray, t: np.ndarray
) -> np.ndarray:
    """Let every user of a chunk take items one after the other: int64 [rows], user after user."""
    users, items = len(counts), len(catalogue.home)
    taste_sums = np.cumsum(tastes, axis=2)
    taste_sums /= taste_sums[:, :, -1:]
    taste_sums = (taste_sums + np.arange(2 * users).reshape(users, 2, 1)).ravel()
    proposal = _propose(rng, catalogue, taste_sums, np.repeat(np.arange(users), counts), t)

    # Below, users stand by falling number of rows, so that those who still go on are the first `active`.
    who = np.argsort(-counts, kind="stable")
    start, length = (np.cumsum(counts) - counts)[who], counts[who]
    taken = np.zeros((users, items // 8 + 1), np.uint8)  # one bit an item
    taken[:, items // 8] = 1 << items % 8  # "no item yet" cannot be taken
    last = np.full(users, items)
    out = np.empty(len(t), np.int64)

    def resolve(pick: np.ndarray, user: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        item = np.where(pick < 0, catalogue.followers[last[user], np.maximum(~pick, 0)], pick)
        return item, (taken[user, item >> 3] >> (item & 7) & 1) == 0

    going_on = users - np.searchsorted(length[::-1], np.arange(length[0]), side="right")
    for step, active in enumerate(going_on):
        user, at = np.arange(active), start[:active] + step
        item, free = resolve(proposal[at], user)
        again = np.flatnonzero(~free)
        while again.size:  # a taken item is rejected and drawn again, which leaves the others their odds
            some = np.repeat(again, 1 + 256 // again.size)  # several tries each when few users are left
            pick, free = resolve(_propose(rng, catalogue, taste_sums, who[some], t[at[some]]), some)
            pick, free = pick.reshape(again.size, -1), free.reshape(again.size, -1)
            found = free.any(1)
            item[again[found]] = pick[found, free.argmax(1)[found]]
            again = again[~found]
        taken[user, item >> 3] |= np.left_shift(1, item & 7).astype(np.uint8)
        last[:active] = out[at] = item
    return out


def _chunk(catalogue: Catalogue, rows: int, seed: int, number: int) -> pa.Table:
    """The ratings of the users of a chunk."""
    tastes = _tastes(rows, seed, number)
    rng, all_users, first = generator(seed, 3, number), _sizes(rows)[0], number * CHUNK_USERS
    rows_here = (first + len(tastes)) * rows // all_users - first * rows // all_users
    counts = _rows_per_user(rng, len(tastes), rows_here, len(catalogue.home))
    timestamp = _timestamps(rng, counts)
    t = _elapsed(timestamp)
    item = _walk(rng, catalogue, tastes, counts, t)

    user, home = np.repeat(np.arange(len(counts)), counts), catalogue.home[item]
    taste = tastes[user, 0, home] * (1 - t) + tastes[user, 1, home] * t
    stars = STARS + USER_STARS * rng.standard_normal(len(counts))[user] + catalogue.quality[item]
    stars += LIKING * np.sqrt(taste) + STAR_NOISE * rng.standard_normal(len(item))
    columns = [first + user + 1, item + 1, np.rint(stars).clip(1, 5).astype(np.float32), timestamp]
    return pa.table(columns, schema=RATINGS_SCHEMA)


def chunk_count(rows: int) -> int:
    """How many chunks `stream` yields."""
    return -(-_sizes(rows)[0] // CHUNK_USERS)


def stream(rows: int = 100_000, seed: int = 1, chunks: Iterable[int] | None = None) -> Iterator[pa.Table]:
    """Yield tables of `RATINGS_SCHEMA`, the users of one chunk after the other, sorted by user and time.

    Args:
      rows: ratings in all, exactly; ValueError under 1,000. Memory grows with the items only: 0.2 GB at 100 M rows.
      seed: another seed is another world.
      chunks: the numbers of the chunks wanted; None for all, which is range(chunk_count(rows)).
    """
    catalogue = simulated_items.build(_sizes(rows)[1], seed)
    for number in range(chunk_count(rows)) if chunks is None else chunks:
        yield _chunk(catalogue, rows, seed, number)


def item_table(rows: int = 100_000, seed: int = 1) -> pa.Table:
    """The items that go with `stream(rows, seed)`: rows of `ITEMS_SCHEMA`, sorted by item_id."""
    return simulated_items.titles_and_genres(simulated_items.build(_sizes(rows)[1], seed), seed)


def load(rows: int = 100_000, seed: int = 1) -> RatingTables:
    """All of `stream` and `item_table`, named "simulated", time in seconds, with their `Truth`."""
    ratings = pa.concat_tables(stream(rows, seed)).combine_chunks()
    return RatingTables("simulated", ratings, item_table(rows, seed), "seconds", Truth(rows, seed))


@dataclass(frozen=True)
class Truth:
    """The probabilities that the rows of `load(rows, seed)` were drawn from.

    In the methods user_ids, last_item_ids (the item taken last, 0 for none yet) and times (seconds since 1970) are
    int [n]; ids that do not exist raise ValueError. Results are float32 [n, items], where column c stands for
    item_id c + 1, and take about 20 bytes a cell to make: ask for a block of users where the catalogue is large.
    """

    rows: int
    seed: int

    @cached_property
    def _catalogue(self) -> Catalogue:
        return simulated_items.build(_sizes(self.rows)[1], self.seed)

    @property
    def item_ids(self) -> np.ndarray:
        """int64 [items], the item of each column: 1, 2, 3, ..."""
        return np.arange(1, len(self._catalogue.home) + 1)

    def scores(self, user_ids: np.ndarray, last_item_ids: np.ndarray, timestamps: np.ndarray) -> np.ndarray:
        """P(next item = i | user, item taken last, time), before the items already taken are left out.

        With those left out, the order of the scores is the order of the true probabilities: where the next item
        is asked for (leave-one-out), no model can expect a better HR@k, NDCG@k or MRR. Rows sum to 1.
        """
        return self._add_order(self._all_but_order(user_ids, timestamps), last_item_ids).astype(np.float32)

    def expected_counts(
        self, user_ids: np.ndarray, last_item_ids: np.ndarray, start: np.ndarray, end: np.ndarray, steps: int = 10
    ) -> np.ndarray:
        """How often each item is expected among a user's next `steps` items, taken between two times.

        For a cut in time: with the items already taken left out, the order of the counts is close to the best that a
        model can do; not exactly, because an item may come twice here and the steps are spread evenly. The more
        steps, the less weighs the item taken last. Rows sum to `steps`.
        """
        start, end = (np.broadcast_to(x, len(user_ids)) for x in (start, end))
        # Simpson's rule, which is exact here: the probabilities are of second degree in time.
        simpson = ((0, 1 / 6), (0.5, 4 / 6), (1, 1 / 6))
        rest = sum(w * self._all_but_order(user_ids, start + x * (end - start)) for x, w in simpson)
        p = self._add_order(rest.copy(), last_item_ids)
        counts = p.copy()
        leader = np.argsort(self._catalogue.followers[:-1], axis=0)  # the columns are permutations; their inverse
        for _ in range(min(steps, 6) - 1):  # from then on p no longer changes
            p = rest + ORDER * sum(share * p[:, leader[:, k]] for k, share in enumerate(FOLLOWERS))
            counts += p
        return (counts + max(steps - 6, 0) * p).astype(np.float32)

    def ranker(self, last_seen, item_ids: np.ndarray, window: tuple[int, int]):
        """The best reachable ranking of a window of time (first and last second), for `evaluation.evaluate`.

        `last_seen` is a table with user_index, user_id and last_item_id, the user's last item before the window;
        `item_ids` is int [num_items], the id of each item_index, where place 0 is for unknown items. Returns a
        function from int [U] user indices to `expected_counts` as float32 [U, num_items].
        """
        row = {index: row for row, index in enumerate(np.asarray(last_seen["user_index"]).tolist())}
        user_ids, last = np.asarray(last_seen["user_id"]), np.asarray(last_seen["last_item_id"])

        def scores(user_index: np.ndarray) -> np.ndarray:
            rows = [row[index] for index in np.asarray(user_index).tolist()]
            counts = self.expected_counts(user_ids[rows], last[rows], *window)
            return np.hstack([np.full((len(rows), 1), -np.inf, np.float32), counts[:, item_ids[1:] - 1]])

        return scores

    def _all_but_order(self, user_ids: np.ndarray, times: np.ndarray) -> np.ndarray:
        """The noise and the taste in P: float64 [n, items], rows sum to 1 - ORDER."""
        user, t = _known("user_ids", user_ids, 1, _sizes(self.rows)[0]) - 1, _elapsed(times)[:, None]
        tastes = np.empty((len(user), 2, G))
        for number in np.unique(user // CHUNK_USERS):
            here = user // CHUNK_USERS == number
            tastes[here] = _tastes(self.rows, self.seed, number)[user[here] % CHUNK_USERS]
        taste = tastes[:, 0] * (1 - t) + tastes[:, 1] * t
        mix = np.hstack([np.full_like(t, NOISE), TASTE * taste])
        return np.hstack([mix * (1 - t), mix * t]) @ self._catalogue.p

    def _add_order(self, p: np.ndarray, last_item_ids: np.ndarray) -> np.ndarray:
        last = _known("last_item_ids", last_item_ids, 0, p.shape[1])
        p[last == 0] /= 1 - ORDER
        known = np.flatnonzero(last)
        for k, share in enumerate(FOLLOWERS):
            p[known, self._catalogue.followers[last[known] - 1, k]] += ORDER * share
        return p


def _known(name: str, ids: np.ndarray, low: int, high: int) -> np.ndarray:
    ids = np.asarray(ids)
    if ids.size and not low <= ids.min() <= ids.max() <= high:
        raise ValueError(f"{name} run from {ids.min()} to {ids.max()}, expected {low} to {high}")
    return ids

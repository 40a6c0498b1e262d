"""How good is a list, a predicted rating or a probability, and is the difference between two models more than chance?

    ranking = evaluation.rank(model.scores, ...)
    of_users = per_user(ranking, k=(10, 100))                    # {"NDCG@10": float [users], ...}
    interval(of_users["NDCG@10"])                                # (.0812, .0851), by bootstrap over users
    paired(of_users["NDCG@10"], of_another_model["NDCG@10"])     # difference, its interval, p

For a user with test items T, of which `hits` are among the k shown, and ranks r from 1:

    HR@k              1 if there is a hit, else 0
    recall@k          hits / |T|
    capped-recall@k   hits / min(k, |T|), the "Recall@k" of Liang et al., WWW 2018, section 4.2
    precision@k       hits / k
    NDCG@k            sum of 1 / log2(1 + r) over the hits, divided by that of a perfect list,
                      sum_(j=1..min(k, |T|)) 1 / log2(1 + j)           (Jarvelin & Kekalainen, TOIS 2002, binary gains)
    MAP@k             sum over the hits of (hits down to rank r) / r, divided by min(k, |T|)
    MRR               1 / (rank of the first test item, over the whole ranking)

Needs: nothing else.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

AT_K = ("HR", "recall", "capped-recall", "precision", "NDCG", "MAP")
NAMES = (*AT_K, "MRR")


def per_user(ranking, k: tuple[int, ...] = (10,), names: tuple[str, ...] = NAMES) -> dict[str, np.ndarray]:
    """Metrics of each user that is asked for something, in ascending order of users.

    Args:
      ranking: an `evaluation.Ranking`; only its ranks and users are looked at.
      k: lengths of lists.
      names: of the table above, without @k.

    Returns:
      {"NDCG@10": float64 [U], ...}; "MRR" has no @k.
    """
    order = np.lexsort([ranking.ranks, ranking.users])
    ranks = ranking.ranks[order]
    _, begin, row, targets = np.unique(ranking.users[order], return_index=True, return_inverse=True, return_counts=True)
    place = np.arange(1, len(row) + 1) - begin[row]  # how many of the user's targets stand down to this one

    def summed(values) -> np.ndarray:
        return np.bincount(row, values, len(targets))

    found = {}
    for each in k:
        within, capped = ranks <= each, np.minimum(each, targets)
        hits = summed(within)
        perfect = np.cumsum(1 / np.log2(np.arange(2, each + 2)))
        for name in names:
            if name == "HR":
                found[f"HR@{each}"] = (hits > 0).astype(np.float64)
            elif name == "recall":
                found[f"recall@{each}"] = hits / targets
            elif name == "capped-recall":
                found[f"capped-recall@{each}"] = hits / capped
            elif name == "precision":
                found[f"precision@{each}"] = hits / each
            elif name == "NDCG":
                found[f"NDCG@{each}"] = summed(within / np.log2(1 + ranks)) / perfect[capped - 1]
            elif name == "MAP":
                found[f"MAP@{each}"] = summed(within * place / ranks) / capped
    if "MRR" in names:
        found["MRR"] = 1 / ranks[begin]
    return found


def coverage(ranking, k: int) -> float:
    """Share of the items 1 to num_items - 1 that are among the first k shown to at least one user."""
    shown = ranking.shown[:, :k]
    return float(len(np.unique(shown[shown > 0])) / (ranking.num_items - 1))


# Where it is good ---------------------------------------------------------------------------------------


def by_popularity(ranking, frequency: np.ndarray, k: int = 10) -> dict[str, dict[str, float]]:
    """Head, middle and tail: the most popular items, which have a third of all training interactions, and so on.

    Args:
      ranking: an `evaluation.Ranking`.
      frequency: int [num_items], the training interactions of each item.
      k: length of the list.

    Returns:
      For each slice: its share of the items, of the targets and of the places shown, and of its targets the share that
      is hit ("recall@k"; not a mean over users).
    """
    order = np.argsort(-frequency[1:], kind="stable") + 1
    before = (np.cumsum(frequency[order]) - frequency[order]) / max(frequency[1:].sum(), 1)
    slice_of = np.zeros(len(frequency), np.int64)
    slice_of[order] = 1 + np.searchsorted([1 / 3, 2 / 3], before, side="right")
    shown, slices = ranking.shown[:, :k], {}
    for number, name in enumerate(("head", "middle", "tail"), start=1):
        of_slice = (slice_of[ranking.items] == number) & (ranking.items > 0)
        slices[name] = {
            "items": float(np.mean(slice_of[1:] == number)),
            "targets": float(np.mean(of_slice)),
            "shown": float((slice_of[shown] == number).sum() / max((shown > 0).sum(), 1)),
            f"recall@{k}": float(np.mean(ranking.ranks[of_slice] <= k)) if of_slice.any() else float("nan"),
        }
    return slices


def by_history(ranking, lengths: np.ndarray, bounds: tuple[int, ...] = (1, 10, 50), k: int = 10) -> list[dict]:
    """NDCG@k of users by how many items they had before: cold users, without any, first.

    Args:
      ranking: an `evaluation.Ranking`.
      lengths: int, the items that user u had: lengths[u].
      bounds: each begins a new group.

    Returns:
      {"history": (least, most or None), "users": number, "NDCG@k": mean} of each group that has users.
    """
    values, had = per_user(ranking, (k,), ("NDCG",))[f"NDCG@{k}"], lengths[np.unique(ranking.users)]
    group, rows = np.searchsorted(bounds, had, side="right"), []
    for number in np.unique(group).tolist():
        least = bounds[number - 1] if number else 0
        most = bounds[number] - 1 if number < len(bounds) else None
        of_group = values[group == number]
        rows.append({"history": (least, most), "users": len(of_group), f"NDCG@{k}": float(of_group.mean())})
    return rows


# Is it chance? ------------------------------------------------------------------------------------------


def interval(values: np.ndarray, level: float = 0.95, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """The percentile bootstrap's confidence interval of a mean over users (Efron 1979); `values` are `per_user`'s."""
    from scipy import stats

    if len(values) < 2 or np.ptp(values) == 0:
        return float(np.mean(values)), float(np.mean(values))
    found = stats.bootstrap(
        (values,), np.mean, confidence_level=level, n_resamples=draws, method="percentile",
        rng=np.random.default_rng(seed), batch=max(1, 5_000_000 // len(values)),
    )  # fmt: skip
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


class Paired(NamedTuple):
    """The mean difference of two models over the same users, its 95% interval, and how often chance alone does it."""

    difference: float
    low: float
    high: float
    p: float


def paired(a: np.ndarray, b: np.ndarray, draws: int = 2000, seed: int = 0) -> Paired:
    """Is a better than b? A sign-flip permutation test of the users' differences, two-sided.

    Args:
      a, b: float [U], a metric of the same users in the same order, from two models.
      draws: of signs, and of the bootstrap. The least p is about 1 / draws.

    Raises:
      ValueError: not of the same users.
    """
    from scipy import stats

    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} users, expected the same users of both models")
    differences = np.asarray(a) - np.asarray(b)
    if not differences.any():
        return Paired(0.0, 0.0, 0.0, 1.0)
    tested = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=draws, vectorized=True,
        rng=np.random.default_rng(seed), batch=max(1, 5_000_000 // len(differences)),
    )  # fmt: skip
    return Paired(float(differences.mean()), *interval(differences, draws=draws, seed=seed), float(tested.pvalue))


# How sampled metrics mislead ----------------------------------------------------------------------------


def sampled(ranking, seen: np.ndarray, negatives: int = 100, seed: int = 0):
    """The ranking that one gets against a random sample of items, as in papers of 2017 to 2020. It misleads.

    Among `negatives` items drawn without replacement from those that the user has not seen, the number of those above
    the target is hypergeometric; nothing has to be scored again (Krichene & Rendle, KDD 2020, section 4). Each target
    is a list of its own, as in those papers; other targets of the same user are among the candidates.

    Args:
      ranking: an `evaluation.Ranking` of exact ranks.
      seen: int, distinct items that user u has seen: seen[u].
      negatives: items that a target is compared with.

    Returns:
      A `Ranking` for `per_user`, with a "user" for each target. Its lists are the exact ones.
    """
    others = ranking.num_items - 2 - seen[ranking.users]
    above = np.where(np.isinf(ranking.ranks), others, ranking.ranks - 1).astype(np.int64)
    drawn = np.random.default_rng(seed).hypergeometric(above, others - above, np.minimum(negatives, others))
    return ranking._replace(ranks=1.0 + drawn, users=np.arange(len(drawn)))


# Ratings and clicks -------------------------------------------------------------------------------------


def rating_errors(predicted: np.ndarray, ratings: np.ndarray) -> dict[str, float]:
    """RMSE and MAE of predicted ratings, both float [N], in stars."""
    errors = np.asarray(predicted, np.float64) - ratings
    return {"RMSE": float(np.sqrt(np.mean(errors**2))), "MAE": float(np.mean(np.abs(errors)))}


def click_errors(probability: np.ndarray, clicked: np.ndarray) -> dict[str, float]:
    """Log loss (natural logarithm, mean over the rows) and AUC, the chance that a click is ranked above a non-click.

    Args:
      probability: float [N]; it is kept 1e-7 away from 0 and 1.
      clicked: 0 or 1 [N]. With equal probabilities half a win is counted (Mann & Whitney 1947).

    Raises:
      ValueError: only clicks, or none.
    """
    from scipy import stats

    clicked = np.asarray(clicked, bool)
    positives, negatives = int(clicked.sum()), int((~clicked).sum())
    if not positives or not negatives:
        raise ValueError(f"{positives} clicks and {negatives} rows without: AUC needs both")
    p = np.clip(np.asarray(probability, np.float64), 1e-7, 1 - 1e-7)
    ranks = stats.rankdata(probability)
    return {
        "logloss": float(-np.mean(np.where(clicked, np.log(p), np.log1p(-p)))),
        "AUC": float((ranks[clicked].sum() - positives * (positives + 1) / 2) / (positives * negatives)),
    }

"""Is a uniform permutation 1, 1, 1, 0, and does every other order show in the measure that is meant to see it?"""

import itertools
import math
import re

import numpy as np
import pytest

from recsys_common.shuffle_quality import autocorrelation_bound, measure

NAMES = ["displacement", "spread of a batch", "rows of the same user in a batch", "label autocorrelation"]
ROWS, BATCH = 40_000, 100


def of(order, batch_size=BATCH, user=None, label=None):
    """The four measures of a sorted table taken in this order. Without `user`, 200 rows in succession are a user's."""
    order = np.asarray(order)
    user = np.arange(ROWS) // 200 if user is None else np.asarray(user)
    label = np.arange(len(user)) % 7 if label is None else np.asarray(label)
    result = measure(order, user[order], label[order], batch_size)
    assert list(result) == NAMES and all(type(value) is float for value in result.values())
    return list(result.values())


# --- hand arithmetic --------------------------------------------------------------------------------------------


def test_the_measures_by_hand():
    # Four rows of users a a b b and labels 0 0 1 1, in batches of two.
    # A uniform permutation: mean |i - j| is 15/12; a stretch of two rows is missed with 2/4 * 1/3; a row has one other
    # row of its user, in its batch with 1/3.
    def by_hand(*order):
        return of(order, 2, list("aabb"), [0, 0, 1, 1])

    assert by_hand(0, 1, 2, 3) == pytest.approx([0, (1 / 2) / (5 / 6), 1 / (1 / 3), (1 / 4 - 1 / 4 + 1 / 4) / 1])
    assert by_hand(3, 2, 1, 0) == pytest.approx([(8 / 4) / (15 / 12), 0.6, 3, 1 / 4])
    assert by_hand(0, 2, 1, 3) == pytest.approx([(2 / 4) / (15 / 12), 1 / (5 / 6), 0, (-1 / 4 - 1 / 4 - 1 / 4) / 1])


def test_rows_after_the_last_full_batch_move_and_have_neighbours_but_are_in_no_batch():
    # Five rows in batches of two: row 4 is alone. Stretches hold rows 0 1 2 and 3 4.
    displacement, spread, same_user, autocorrelation = of([0, 3, 1, 2, 4], 2, [7, 8, 7, 8, 8], [0, 0, 0, 0, 5])
    assert displacement == pytest.approx((0 + 2 + 1 + 1 + 0) / 5 / (24 / 15))
    missed = (2 / 5 * 1 / 4 + 3 / 5 * 2 / 4) / 2  # the stretch of three, and the one of two
    assert spread == pytest.approx(((2 + 1) / 4) / (1 - missed))
    # (7, 8) and (8, 7) hold nobody twice; in (7, 8), (7, 8) it would be the same.
    assert same_user == 0
    assert autocorrelation == pytest.approx((1 + 1 + 1 - 4) / 20)


def test_the_mean_over_all_permutations_is_1_1_1_and_the_known_bias_of_an_autocorrelation():
    for rows, batch_size in [(2, 2), (5, 2), (6, 3), (6, 4), (6, 5), (6, 6)]:
        user, label = [3, 3, 1, 3, 1, 9][:rows], [0, 2, 2, 5, -1, 0.5][:rows]
        every = [of(order, batch_size, user, label) for order in itertools.permutations(range(rows))]
        assert np.mean(every, 0) == pytest.approx([1, 1, 1, -1 / rows])


# --- against a slow computation ---------------------------------------------------------------------------------


def slowly(position, user, label, batch_size):
    """The definitions, one row at a time."""
    n = len(position)
    batches = [range(first, first + batch_size) for first in range(0, n - batch_size + 1, batch_size)]
    moved = sum(abs(place - position[place]) for place in range(n)) / n
    uniform_moved = sum(abs(i - j) for i in range(n) for j in range(n)) / n**2

    stretches = [[p for p in range(n) if p * batch_size // n == s] for s in range(batch_size)]
    reached = [len({position[place] * batch_size // n for place in batch}) for batch in batches]
    uniform_reached = sum(1 - math.comb(n - len(s), batch_size) / math.comb(n, batch_size) for s in stretches)

    others = [sum(user[a] == user[b] for b in batch) - 1 for batch in batches for a in batch]
    uniform_others = sum(user.count(u) - 1 for u in user) / n * (batch_size - 1) / (n - 1)

    mean = sum(label) / n
    together = sum((label[i] - mean) * (label[i + 1] - mean) for i in range(n - 1))
    return [
        moved / uniform_moved,
        sum(reached) / len(reached) / uniform_reached,
        sum(others) / len(others) / uniform_others,
        together / sum((value - mean) ** 2 for value in label),
    ]


@pytest.mark.parametrize("seed", range(20))
def test_equal_to_the_definitions(seed):
    random = np.random.default_rng(seed)
    rows = int(random.integers(10, 80))
    batch_size = int(random.integers(2, rows + 1))
    position = random.permutation(rows) if seed % 2 else np.roll(np.arange(rows), int(random.integers(rows)))
    user = random.integers(0, 6, rows)
    label = random.normal(size=rows)
    result = measure(position.tolist(), user, label.tolist(), batch_size)
    assert list(result.values()) == pytest.approx(slowly(position.tolist(), user.tolist(), label.tolist(), batch_size))


def test_types_of_columns_as_they_come_from_a_pipeline():
    order = np.random.default_rng(0).permutation(1_000)
    user, label = order // 10, (order % 2).astype(np.float32)
    expected = measure(order, user, label, 50)
    assert measure(order.astype(np.int32), user.astype(str).astype("S"), label > 0, 50) == expected
    assert measure(order.astype(np.uint64), user.astype(str).astype(object), label, 50) == expected


# --- orders whose answer is known -------------------------------------------------------------------------------


def test_uniform_permutations_are_close_to_1_1_1_0():
    results = np.array([of(np.random.default_rng(seed).permutation(ROWS)) for seed in range(40)])
    # Four standard deviations: of the footrule sqrt(2 n^3 / 45), of the stretches reached sqrt((1/e - 2/e^2) n), of the
    # n (B - 1) / 2 / 200 pairs of a user the root.
    pairs = ROWS * (BATCH - 1) / 2 / (ROWS / 200)
    reached = (1 / math.e - 2 / math.e**2) ** 0.5 / (1 - 1 / math.e)
    bands = 4 * np.array([3 * (2 / 45 / ROWS) ** 0.5, reached / ROWS**0.5, pairs**-0.5, ROWS**-0.5])
    assert (np.abs(results - [1, 1, 1, 0]) < bands).all()
    assert (np.abs(results - [1, 1, 1, 0]).max(0) > bands / 4).all()  # the bands are no wider than they need be


def test_the_autocorrelation_of_uniform_permutations_stays_below_the_bound_in_95_percent():
    random = np.random.default_rng(0)
    label = random.normal(size=400)
    found = [of(random.permutation(400), 10, np.arange(400) // 4, label)[3] for _ in range(600)]
    assert autocorrelation_bound(400) == 0.1
    assert 0.93 < np.mean(np.abs(found) < autocorrelation_bound(400)) < 0.98


def test_the_order_of_the_table():
    displacement, spread, same_user, _ = of(np.arange(ROWS))
    assert displacement == 0
    # A batch of 100 rows lies in one of 100 stretches of 400 rows; two halves of users of 200 rows make a batch one's.
    assert spread == pytest.approx(0.01 / (1 - math.exp(-1)), rel=0.01)
    assert same_user == pytest.approx(99 / (199 * 99 / (ROWS - 1)))


def test_a_reversal_and_a_rotation_move_rows_and_mix_nothing():
    identity, reversal, rotation = (
        of(order) for order in (np.arange(ROWS), np.arange(ROWS)[::-1], np.roll(np.arange(ROWS), ROWS // 2))
    )
    assert reversal[0] == pytest.approx(1.5) and rotation[0] == pytest.approx(1.5)
    assert reversal[1:3] == pytest.approx(identity[1:3]) and rotation[1:3] == pytest.approx(identity[1:3])
    assert reversal[3] == pytest.approx(identity[3])


def test_rows_permuted_within_a_tenth_of_the_table_show_that_tenth():
    random, window = np.random.default_rng(5), ROWS // 10
    order = np.concatenate([begin + random.permutation(window) for begin in range(0, ROWS, window)])
    displacement, spread, same_user, _ = of(order)
    assert displacement == pytest.approx(1 / 10, rel=0.03)
    # 100 rows into 10 stretches of 100; and a user's share of a window is ten times that of the table.
    assert spread == pytest.approx((1 - (1 - 1 / 10) ** 100) / 10 / (1 - math.exp(-1)), rel=0.01)
    assert same_user == pytest.approx((ROWS - 1) / (window - 1), rel=0.03)


def test_eight_moments_far_apart_are_not_the_table():
    # Eight of 400 sorted files read in turn, which files at random: displacement cannot tell, nor could the standard
    # deviation of the positions in a batch.
    random = np.random.default_rng(6)
    files = random.permutation(np.arange(ROWS).reshape(400, 100)).reshape(50, 8, 100)
    order = files.transpose(0, 2, 1).reshape(-1)
    displacement, spread, _, _ = of(order)
    assert displacement == pytest.approx(1, abs=0.1)
    assert order.reshape(-1, BATCH).std(1).mean() / (ROWS / 12**0.5) > 0.9
    assert spread < 8 / 100 / (1 - math.exp(-1)) * 2  # at most two rounds of eight files in a batch


def test_rows_dealt_out_evenly_are_spread_wider_than_by_chance():
    order = np.arange(ROWS).reshape(BATCH, -1).T.reshape(-1)  # one of each stretch in every batch
    _, spread, same_user, _ = of(order)
    assert spread == pytest.approx(1 / (1 - math.exp(-1)), rel=0.01)
    assert same_user == 0


def test_labels_that_drift_correlate_until_they_are_shuffled():
    label = np.random.default_rng(7).normal(size=ROWS) + np.linspace(-2, 2, ROWS)
    drift = (4**2 / 12) / (4**2 / 12 + 1)  # the share of the variance that neighbours have in common
    assert of(np.arange(ROWS), label=label)[3] == pytest.approx(drift, abs=0.02)
    shuffled = of(np.random.default_rng(8).permutation(ROWS), label=label)[3]
    assert abs(shuffled) < autocorrelation_bound(ROWS)


def test_nothing_to_measure_is_nan():
    assert math.isnan(of([0, 2, 1], 2, user=[1, 2, 3])[2])
    assert math.isnan(of([0, 2, 1], 2, user=[1, 1, 3], label=[0.1, 0.1, 0.1])[3])


# --- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("position", "message"),
    [
        (
            [0, 1, 2, 2, 4],
            "position 2 comes 2 times; expected 0 to 4, each once. Hand in one whole pass over the table",
        ),
        ([4, 1, 0, 1, 1], "position 1 comes 3 times"),
        ([5, 4, 3, 1, 0], "position 2 is missing"),  # a table of six rows of which one is lost
        ([1, 2, 3, 4, 5], "position 0 is missing"),  # counted from 1
        ([3, -1, 0, 1, 2], "position -1 comes 1 times; expected 0 to 4"),
    ],
)
def test_no_permutation_is_refused_with_the_first_doubled_or_missing_position(position, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        measure(position, [1] * 5, [0.0] * 5, 2)


@pytest.mark.parametrize(
    ("position", "user", "label", "batch_size", "message"),
    [
        ([0, 1, 2], [1, 1], [0, 0, 0], 2, "[(3,), (2,), (3,)], int64; expected [n] of each"),
        ([0, 1, 2], [1, 1, 1], [0, 0], 2, "[(3,), (3,), (2,)]"),
        ([0.0, 1.0], [1, 1], [0, 0], 2, "float64; expected [n] of each, integer positions"),
        ([[0], [1]], [[1], [1]], [[0], [0]], 2, "[(2, 1), (2, 1), (2, 1)]"),
        ([0, 1, 2], [1, 1, 1], [0, 0, 0], 4, "batch_size 4 and 3 rows; expected a batch of 2 rows to all rows"),
        ([0, 1, 2], [1, 1, 1], [0, 0, 0], 1, "batch_size 1 and 3 rows"),
        ([0], [1], [0], 2, "batch_size 2 and 1 rows"),
        (np.zeros(0, int), [], [], 2, "batch_size 2 and 0 rows"),
    ],
)
def test_what_is_no_order_is_refused(position, user, label, batch_size, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        measure(position, user, label, batch_size)

"""Interactions with a taste that is known, for the question whether a model learns."""

import numpy as np

from recsys_common import evaluation


def taste_of_groups(users, groups):
    """Each user has 12 of their group's 25 items, and a 13th is asked for: users, items, the items asked for."""
    random, group = np.random.default_rng(0), np.arange(users) % groups
    had = np.array([1 + own * 25 + random.permutation(25)[:13] for own in group])
    return np.repeat(np.arange(users), 12), had[:, 1:].ravel(), had[:, 0]


def hit_rate(model, train, asked):
    """HR@10, with `train` as what was seen: 10/13 for a model that knows the groups and no more."""
    found = evaluation.evaluate(
        lambda rows: model.scores(train, rows),
        np.arange(train.num_users), asked, train.users, train.items, train.num_items, k=10,
    )  # fmt: skip
    return found["HR@10"]

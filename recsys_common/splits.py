"""What may the model see, and what is it asked?

    splits.split(warehouse, "auto", tables.time)        # writes split_ratings; returns the name of the SQL that did

temporal        one moment for everyone; the model sees nothing of what came after it, of anyone. With a
                `validation_fraction`, what comes next is for validation, and the test begins after that
leave-one-out   each user's last item is asked for, the last but one kept out for validation. Common in papers, and
                possible with an order alone; the model does see what *others* did later

Needs: sql/temporal_split.sql sql/leave_last_out.sql
"""

from __future__ import annotations

SPLITS = ("auto", "temporal", "leave-one-out")
TRAIN_FRACTION = 0.8


def split(warehouse, how: str, time: str, validation_fraction: float = 0.0) -> str:
    """Mark each row of `ratings` as train, validation or test, in `split_ratings`.

    Args:
      warehouse: a `bigquery.Warehouse` with the table `ratings`.
      how: "temporal", "leave-one-out", or "auto": temporal where there is a clock, leave-one-out where there is only
        an order.
      time: what the timestamps mean, `RatingTables.time`: "seconds", "order" or "none".
      validation_fraction: of a temporal split, the share of ratings for validation; leave-one-out always has one.

    Raises:
      ValueError: an unknown split, or one that these timestamps cannot carry.
    """
    if how not in SPLITS:
        raise ValueError(f"SPLIT={how!r} is not a split; expected one of {', '.join(SPLITS)}")
    if time == "none":
        raise ValueError(
            "these ratings have neither a clock nor an order, so nothing in them comes last: they serve to predict "
            "ratings, not the next item. Take a data set with timestamps, such as ml-latest-small."
        )
    if how == "temporal" and time != "seconds":
        raise ValueError(
            "SPLIT='temporal' needs timestamps in seconds; these ratings have only each user's order. "
            "Use SPLIT='leave-one-out'."
        )
    if how == "temporal" or (how == "auto" and time == "seconds"):
        fractions = {"train_fraction": TRAIN_FRACTION, "validation_fraction": float(validation_fraction)}
        warehouse.run("temporal_split.sql", **fractions)
        return "temporal_split.sql"
    warehouse.run("leave_last_out.sql", holdout=1)
    return "leave_last_out.sql"

-- Which ratings may the model see? Those before one moment in time, the same for everyone.
-- A random split would let it learn on Tuesday what it is asked about on Monday.
-- APPROX_QUANTILES is approximate: the share is nearly, not exactly, the one asked for.
-- parameter train_fraction: FLOAT64  share of all ratings before the cut, such as 0.8
-- reads ratings; writes split_ratings
CREATE OR REPLACE TABLE split_ratings CLUSTER BY user_id AS
WITH quantiles AS (
  SELECT APPROX_QUANTILES(timestamp, 1000) AS moments
  FROM ratings
),
cut AS (
  SELECT moments[OFFSET(CAST(ROUND(1000 * @train_fraction) AS INT64))] AS moment
  FROM quantiles
)
SELECT
  ratings.user_id,
  ratings.item_id,
  ratings.rating,
  ratings.timestamp,
  IF(ratings.timestamp < cut.moment, 'train', 'test') AS split
FROM ratings
CROSS JOIN cut;

-- Which ratings may the model see? Those before one moment in time, the same for everyone.
-- A random split would let it learn on Tuesday what it is asked about on Monday. With a validation_fraction above 0 a
-- second moment parts what comes after the first: choices are made on `validation`, and `test` is asked once.
-- APPROX_QUANTILES is approximate: the shares are nearly, not exactly, those asked for.
-- parameter train_fraction: FLOAT64  share of all ratings before the cut, such as 0.8
-- parameter validation_fraction: FLOAT64  share of them that comes next, such as 0.1; 0.0: no validation
-- reads ratings; writes split_ratings
CREATE OR REPLACE TABLE split_ratings CLUSTER BY user_id AS
WITH quantiles AS (
  SELECT APPROX_QUANTILES(timestamp, 1000) AS moments
  FROM ratings
),
cut AS (
  SELECT
    moments[OFFSET(CAST(ROUND(1000 * @train_fraction) AS INT64))] AS moment,
    moments[OFFSET(CAST(ROUND(1000 * (@train_fraction + @validation_fraction)) AS INT64))] AS test_moment
  FROM quantiles
)
SELECT
  ratings.user_id,
  ratings.item_id,
  ratings.rating,
  ratings.timestamp,
  CASE
    WHEN ratings.timestamp < cut.moment THEN 'train'
    WHEN ratings.timestamp < cut.test_moment THEN 'validation'
    ELSE 'test'
  END AS split
FROM ratings
CROSS JOIN cut;

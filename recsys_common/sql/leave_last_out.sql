-- Which ratings may the model see? All but each user's last ones: the last are the test, those before them
-- the validation. With holdout = 1 this is leave-one-out. item_id breaks equal timestamps, and the rating equal
-- items, so that the split is the same on every run; histories.sql goes by the same order.
-- parameter holdout: INT64  rows held out for each user, for test and again for validation
-- reads ratings; writes split_ratings
CREATE OR REPLACE TABLE split_ratings CLUSTER BY user_id AS
WITH numbered AS (
  SELECT
    user_id,
    item_id,
    rating,
    timestamp,
    ROW_NUMBER() OVER (PARTITION BY user_id ORDER BY timestamp DESC, item_id DESC, rating DESC) AS from_last
  FROM ratings
)
SELECT
  user_id,
  item_id,
  rating,
  timestamp,
  CASE
    WHEN from_last <= @holdout THEN 'test'
    WHEN from_last <= 2 * @holdout THEN 'validation'
    ELSE 'train'
  END AS split
FROM numbered;

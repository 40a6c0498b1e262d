-- Is the table fit to train on? One scan, before anything else is paid for.
-- reads ratings
SELECT
  COUNT(*) AS `rows`,
  COUNTIF(user_id IS NULL) AS null_user_id,
  COUNTIF(item_id IS NULL) AS null_item_id,
  COUNTIF(rating IS NULL) AS null_rating,
  COUNTIF(timestamp IS NULL) AS null_timestamp,
  COUNTIF(IS_NAN(rating) OR IS_INF(rating)) AS not_finite_rating,
  COUNTIF(user_id < 0) AS negative_user_id,
  COUNTIF(item_id < 0) AS negative_item_id
FROM ratings;

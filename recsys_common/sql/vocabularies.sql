-- Which row of the embedding table belongs to which id? 1 is the most frequent id of the training ratings,
-- 2 the next; 0 is for ids that training never saw. `frequency` also feeds the log-Q correction, and
-- `fingerprint`, taken once for each id rather than once for each rating, spreads rows over files.
-- ROW_NUMBER over everything sorts on one worker: chapter 2 numbers hundreds of millions of ids in pieces.
-- reads split_ratings; writes user_vocabulary, item_vocabulary
CREATE OR REPLACE TABLE user_vocabulary AS
WITH counted AS (
  SELECT user_id, CAST(COUNTIF(split = 'train') AS INT64) AS frequency
  FROM split_ratings
  GROUP BY user_id
)
SELECT
  user_id,
  frequency,
  IF(frequency > 0, ROW_NUMBER() OVER (ORDER BY frequency DESC, user_id), 0) AS user_index,
  FARM_FINGERPRINT(CONCAT('user', CAST(user_id AS STRING))) AS fingerprint
FROM counted;

CREATE OR REPLACE TABLE item_vocabulary AS
WITH counted AS (
  SELECT item_id, CAST(COUNTIF(split = 'train') AS INT64) AS frequency
  FROM split_ratings
  GROUP BY item_id
)
SELECT
  item_id,
  frequency,
  IF(frequency > 0, ROW_NUMBER() OVER (ORDER BY frequency DESC, item_id), 0) AS item_index,
  FARM_FINGERPRINT(CONCAT('item', CAST(item_id AS STRING))) AS fingerprint
FROM counted;

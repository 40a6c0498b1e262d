-- What had this user taken before? Each row of `examples`, with the items before it, the oldest first.
-- "Before" is the order of leave_last_out.sql: timestamp, then item_id, then rating; of equal rows the one in
-- training comes first. So what is held out there as the last stands in no history of an earlier row. A history draws
-- on all of a user's rows: a test row sees the training rows before it, and no row sees itself or anything later.
-- Users are told apart by user_id: out of the vocabulary many share one user_index.
-- parameter length: INT64  most items of a history; the latest are kept
-- parameter shards: INT64  as for examples.sql
-- reads split_ratings, user_vocabulary, item_vocabulary; writes histories
CREATE OR REPLACE TABLE histories CLUSTER BY split, shard AS
SELECT
  users.user_index,
  items.item_index,
  ratings.rating,
  ratings.timestamp,
  ratings.split,
  -- A product, not a sum: by a sum, which items a file has for a user would follow one rule for all users. 31 bits of
  -- each, so that it fits; its middle bits depend on all of them.
  MOD(((users.fingerprint & 0x7fffffff) * (items.fingerprint & 0x7fffffff)) >> 24, @shards) AS shard,
  IFNULL(
    ARRAY_AGG(items.item_index) OVER (
      PARTITION BY ratings.user_id
      ORDER BY
        ratings.timestamp,
        ratings.item_id,
        ratings.rating,
        CASE ratings.split WHEN 'train' THEN 1 WHEN 'validation' THEN 2 ELSE 3 END
      ROWS BETWEEN @length PRECEDING AND 1 PRECEDING
    ),
    []
  ) AS history
FROM split_ratings AS ratings
JOIN user_vocabulary AS users ON users.user_id = ratings.user_id
JOIN item_vocabulary AS items ON items.item_id = ratings.item_id;

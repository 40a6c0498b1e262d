-- The rows that leave the warehouse: integers that are rows of embedding tables, and a shard number.
-- The shard of a rating is decided by the fingerprints of its two ids, so every file is a random sample of
-- the whole, and an export that is repeated puts every rating into the same file again.
-- parameter shards: INT64  number of files to write
-- reads split_ratings, user_vocabulary, item_vocabulary; writes examples
CREATE OR REPLACE TABLE examples CLUSTER BY split, shard AS
SELECT
  users.user_index,
  items.item_index,
  ratings.rating,
  ratings.timestamp,
  ratings.split,
  -- 2 * shards: MOD of a negative number is negative, and a fingerprint is signed
  MOD(MOD(users.fingerprint, @shards) + MOD(items.fingerprint, @shards) + 2 * @shards, @shards) AS shard
FROM split_ratings AS ratings
JOIN user_vocabulary AS users ON users.user_id = ratings.user_id
JOIN item_vocabulary AS items ON items.item_id = ratings.item_id;

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
  -- A product, not a sum: by a sum, which items a file has for a user would follow one rule for all users. 31 bits of
  -- each, so that it fits; its middle bits depend on all of them.
  MOD(((users.fingerprint & 0x7fffffff) * (items.fingerprint & 0x7fffffff)) >> 24, @shards) AS shard
FROM split_ratings AS ratings
JOIN user_vocabulary AS users ON users.user_id = ratings.user_id
JOIN item_vocabulary AS items ON items.item_id = ratings.item_id;

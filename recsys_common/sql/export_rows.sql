-- The ratings with a shard number, ready to leave the warehouse as they are: raw ids, no split, no vocabulary.
-- The shard is decided by the fingerprints of the row's two ids, taken once for each id, so that every shard is a
-- random sample of the whole, and a repeated export puts every rating into the same shard again.
-- parameter shards: INT64  number of files to write
-- reads ratings; writes export_rows
CREATE OR REPLACE TABLE export_rows CLUSTER BY shard AS
WITH users AS (
  SELECT user_id, FARM_FINGERPRINT(CONCAT('user', CAST(user_id AS STRING))) AS fingerprint
  FROM (SELECT DISTINCT user_id FROM ratings)
),
items AS (
  SELECT item_id, FARM_FINGERPRINT(CONCAT('item', CAST(item_id AS STRING))) AS fingerprint
  FROM (SELECT DISTINCT item_id FROM ratings)
)
SELECT
  ratings.user_id,
  ratings.item_id,
  ratings.rating,
  ratings.timestamp,
  -- A product, not a sum: by a sum, which items a file has for a user would follow one rule for all users. 31 bits of
  -- each, so that it fits; its middle bits depend on all of them.
  MOD(((users.fingerprint & 0x7fffffff) * (items.fingerprint & 0x7fffffff)) >> 24, @shards) AS shard
FROM ratings
JOIN users ON users.user_id = ratings.user_id
JOIN items ON items.item_id = ratings.item_id;

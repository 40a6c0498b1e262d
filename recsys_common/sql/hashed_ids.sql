-- Which row of the embedding table, without any vocabulary? The id's hash bucket, equal to what
-- tf.strings.to_hash_bucket_fast gives for the string 'user5' or 'item5', so a served model needs no table of ids.
-- TensorFlow takes the 64 bits of a fingerprint for an unsigned number, SQL for a signed one. So they are taken in
-- two parts that have no sign: twice the upper 63 bits (`>>` may bring the sign along, `&` drops it), and the last.
-- Each id is fingerprinted once, not once for each rating.
-- The embedded service's FARM_FINGERPRINT is right for strings of up to 64 bytes; an id makes 24 at most.
-- parameters user_buckets, item_buckets: INT64  rows of the two tables, 1 to 2^62
-- reads split_ratings; writes hashed_examples
CREATE OR REPLACE TABLE hashed_examples CLUSTER BY split AS
WITH users AS (
  SELECT user_id, FARM_FINGERPRINT(CONCAT('user', CAST(user_id AS STRING))) AS fingerprint
  FROM split_ratings
  GROUP BY user_id
),
items AS (
  SELECT item_id, FARM_FINGERPRINT(CONCAT('item', CAST(item_id AS STRING))) AS fingerprint
  FROM split_ratings
  GROUP BY item_id
)
SELECT
  MOD(
    MOD((users.fingerprint >> 1) & 0x7fffffffffffffff, @user_buckets)
    + MOD((users.fingerprint >> 1) & 0x7fffffffffffffff, @user_buckets) + (users.fingerprint & 1),
    @user_buckets
  ) AS user_bucket,
  MOD(
    MOD((items.fingerprint >> 1) & 0x7fffffffffffffff, @item_buckets)
    + MOD((items.fingerprint >> 1) & 0x7fffffffffffffff, @item_buckets) + (items.fingerprint & 1),
    @item_buckets
  ) AS item_bucket,
  ratings.rating,
  ratings.timestamp,
  ratings.split
FROM split_ratings AS ratings
JOIN users USING (user_id)
JOIN items USING (item_id);

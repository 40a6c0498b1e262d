-- Which row of the embedding table belongs to which id? Rows 0 to oov_buckets - 1 are for ids out of the vocabulary:
-- training saw them less than minimum_frequency times, or never. Such an id takes the bucket that
-- tf.strings.to_hash_bucket_fast gives for the string 'user5' or 'item5'; the feature's name is in the string, so
-- that user 5 and item 5 are two strings. From row oov_buckets on come the known ids, the most frequent first.
-- ROW_NUMBER over a whole table sorts it on one worker. Here the ids of one frequency are numbered in pieces, each by
-- its own worker, and a piece starts where those before it end: the order is frequency, then piece, then id.
-- `frequency` also feeds the log-Q correction, and `fingerprint`, taken once for each id rather than once for each
-- rating, spreads rows over files.
-- parameter oov_buckets: INT64  rows at the head of the table for ids out of the vocabulary, 1 or more
-- parameter minimum_frequency: INT64  training rows that an id needs for a row of its own, 1 or more
-- parameter pieces: INT64  pieces that the ids of one frequency are numbered in; 1 for small tables
-- reads split_ratings; writes user_vocabulary, item_vocabulary
CREATE OR REPLACE TABLE user_vocabulary AS
SELECT
  user_id,
  CAST(COUNTIF(split = 'train') AS INT64) AS frequency,
  FARM_FINGERPRINT(CONCAT('user', CAST(user_id AS STRING))) AS fingerprint
FROM split_ratings
GROUP BY user_id;

-- Two statements, because the counts are read twice, and a WITH that is read twice runs twice over all ratings.
CREATE OR REPLACE TABLE user_vocabulary AS
WITH counted AS (
  SELECT
    user_id,
    frequency,
    fingerprint,
    MOD(MOD(fingerprint, @pieces) + @pieces, @pieces) AS piece
  FROM user_vocabulary
),
known AS (
  SELECT frequency, piece, SUM(COUNT(*)) OVER (ORDER BY frequency DESC, piece) - COUNT(*) AS earlier
  FROM counted
  WHERE frequency >= GREATEST(@minimum_frequency, 1)
  GROUP BY frequency, piece
)
SELECT
  user_id,
  frequency,
  CAST(IF(
    earlier IS NULL,
    -- the fingerprint modulo oov_buckets, unsigned: hashed_ids.sql says how
    MOD(
      MOD((fingerprint >> 1) & 0x7fffffffffffffff, @oov_buckets)
      + MOD((fingerprint >> 1) & 0x7fffffffffffffff, @oov_buckets) + (fingerprint & 1),
      @oov_buckets
    ),
    @oov_buckets + earlier + ROW_NUMBER() OVER (PARTITION BY frequency, piece ORDER BY user_id) - 1
  ) AS INT64) AS user_index,
  fingerprint
FROM counted
LEFT JOIN known USING (frequency, piece);

CREATE OR REPLACE TABLE item_vocabulary AS
SELECT
  item_id,
  CAST(COUNTIF(split = 'train') AS INT64) AS frequency,
  FARM_FINGERPRINT(CONCAT('item', CAST(item_id AS STRING))) AS fingerprint
FROM split_ratings
GROUP BY item_id;

CREATE OR REPLACE TABLE item_vocabulary AS
WITH counted AS (
  SELECT
    item_id,
    frequency,
    fingerprint,
    MOD(MOD(fingerprint, @pieces) + @pieces, @pieces) AS piece
  FROM item_vocabulary
),
known AS (
  SELECT frequency, piece, SUM(COUNT(*)) OVER (ORDER BY frequency DESC, piece) - COUNT(*) AS earlier
  FROM counted
  WHERE frequency >= GREATEST(@minimum_frequency, 1)
  GROUP BY frequency, piece
)
SELECT
  item_id,
  frequency,
  CAST(IF(
    earlier IS NULL,
    MOD(
      MOD((fingerprint >> 1) & 0x7fffffffffffffff, @oov_buckets)
      + MOD((fingerprint >> 1) & 0x7fffffffffffffff, @oov_buckets) + (fingerprint & 1),
      @oov_buckets
    ),
    @oov_buckets + earlier + ROW_NUMBER() OVER (PARTITION BY frequency, piece ORDER BY item_id) - 1
  ) AS INT64) AS item_index,
  fingerprint
FROM counted
LEFT JOIN known USING (frequency, piece);

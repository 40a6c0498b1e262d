-- Whom do we ask, what have they seen, and what did they take next? All rows of the users who have both a
-- training history and a test row; of many users, every stride-th.
-- Users in row 0 are left out: with oov_buckets = 1 in vocabularies.sql, those are all that training never saw.
-- parameter stride: INT64  1 asks everyone
-- reads examples; writes evaluation_pairs
CREATE OR REPLACE TABLE evaluation_pairs AS
SELECT user_index, item_index, split = 'test' AS asked
FROM examples
WHERE
  user_index > 0
  AND MOD(user_index, @stride) = 0
  AND user_index IN (SELECT user_index FROM examples WHERE split = 'test');

-- Whom do we ask, what have they seen, and what did they take next, in one part of the data? All rows up to the end
-- of that part of the users who have a row in it and were seen in training; of many users, every stride-th.
-- What is asked in validation is seen in the test.
-- parameter part: STRING  validation or test
-- parameter stride: INT64  1 asks everyone
-- parameter oov_buckets: INT64  as for vocabularies.sql: users in these rows are left out
-- reads examples; writes part_pairs
CREATE OR REPLACE TABLE part_pairs AS
SELECT user_index, item_index, split = @part AS asked
FROM examples
WHERE
  user_index >= @oov_buckets
  AND MOD(user_index, @stride) = 0
  AND split IN ('train', 'validation', @part)
  AND user_index IN (SELECT user_index FROM examples WHERE split = @part);

-- What had the users of part_pairs taken when they were asked? Their last items before that part of the data, the
-- oldest first, in the order of histories.sql. One row a user.
-- parameter part: STRING  validation or test
-- parameter earlier: INT64  most items of a history, less one; the latest are kept
-- reads split_ratings, user_vocabulary, item_vocabulary, part_pairs; writes part_histories
CREATE OR REPLACE TABLE part_histories AS
WITH numbered AS (
  SELECT
    users.user_index,
    ARRAY_AGG(items.item_index) OVER (
      PARTITION BY ratings.user_id
      ORDER BY
        ratings.timestamp,
        ratings.item_id,
        ratings.rating,
        CASE ratings.split WHEN 'train' THEN 1 ELSE 2 END
      ROWS BETWEEN @earlier PRECEDING AND CURRENT ROW
    ) AS history,
    ROW_NUMBER() OVER (
      PARTITION BY ratings.user_id
      ORDER BY
        ratings.timestamp DESC,
        ratings.item_id DESC,
        ratings.rating DESC,
        CASE ratings.split WHEN 'train' THEN 1 ELSE 2 END DESC
    ) AS from_last
  FROM split_ratings AS ratings
  JOIN user_vocabulary AS users ON users.user_id = ratings.user_id
  JOIN item_vocabulary AS items ON items.item_id = ratings.item_id
  WHERE
    ratings.split IN ('train', 'validation')
    AND ratings.split != @part
    AND users.user_index IN (SELECT user_index FROM part_pairs)
)
SELECT user_index, history
FROM numbered
WHERE from_last = 1;

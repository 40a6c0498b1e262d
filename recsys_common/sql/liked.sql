-- What did this person like before the test? Best rated first, the latest first among equals.
-- parameters user_id: INT64, rows: INT64
-- reads split_ratings, items
SELECT
  COALESCE(items.title, CONCAT('item ', CAST(ratings.item_id AS STRING))) AS title,
  ARRAY_TO_STRING(items.genres, ', ') AS genres
FROM split_ratings AS ratings
LEFT JOIN items ON items.item_id = ratings.item_id
WHERE ratings.user_id = @user_id AND ratings.split = 'train'
ORDER BY ratings.rating DESC, ratings.timestamp DESC, title
LIMIT @rows;

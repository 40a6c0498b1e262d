-- What did this person like before the test? Best rated first, the latest of those first.
-- parameters user_index: INT64, rows: INT64
-- reads split_ratings, user_vocabulary, items
SELECT items.title, ARRAY_TO_STRING(items.genres, ', ') AS genres
FROM split_ratings
JOIN user_vocabulary USING (user_id)
JOIN items USING (item_id)
WHERE user_vocabulary.user_index = @user_index AND split_ratings.split = 'train'
ORDER BY split_ratings.rating DESC, split_ratings.timestamp DESC, items.title
LIMIT @rows;

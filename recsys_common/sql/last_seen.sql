-- What did each user take last before the cut? Simulated ratings only: the best reachable ranking starts there.
-- reads split_ratings, user_vocabulary
SELECT
  user_index,
  user_id,
  ARRAY_AGG(item_id ORDER BY timestamp DESC LIMIT 1)[OFFSET(0)] AS last_item_id
FROM split_ratings
JOIN user_vocabulary USING (user_id)
WHERE split = 'train'
GROUP BY user_index, user_id
ORDER BY user_index;

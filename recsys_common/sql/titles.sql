-- Which titles have these rows of the item table?
-- parameter item_indices: ARRAY<INT64>
-- reads item_vocabulary, items
SELECT
  vocabulary.item_index,
  COALESCE(items.title, CONCAT('item ', CAST(vocabulary.item_id AS STRING))) AS title,
  ARRAY_TO_STRING(items.genres, ', ') AS genres
FROM item_vocabulary AS vocabulary
LEFT JOIN items ON items.item_id = vocabulary.item_id
WHERE vocabulary.item_index IN UNNEST(@item_indices);

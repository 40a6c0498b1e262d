-- Which titles have these rows of the item table?
-- parameter item_indices: ARRAY<INT64>
-- reads item_vocabulary, items
SELECT item_vocabulary.item_index, items.title, ARRAY_TO_STRING(items.genres, ', ') AS genres
FROM item_vocabulary
JOIN items USING (item_id)
WHERE item_vocabulary.item_index IN UNNEST(@item_indices);

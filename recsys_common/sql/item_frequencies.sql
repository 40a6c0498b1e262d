-- How often does training see each row of the item table? The log-Q correction needs it. One row for each index
-- from 0 to the largest, without gaps: a bucket counts all of its ids, and an empty one has 0.
-- Not in order: sort what you read by item_index.
-- reads item_vocabulary; writes item_frequencies
CREATE OR REPLACE TABLE item_frequencies AS
WITH counted AS (
  SELECT item_index, SUM(frequency) AS frequency
  FROM item_vocabulary
  GROUP BY item_index
),
-- in steps, because BigQuery refuses an array of more than about a million elements
starts AS (
  SELECT start, LEAST(start + 999999, largest) AS last
  FROM (SELECT MAX(item_index) AS largest FROM item_vocabulary)
  CROSS JOIN UNNEST(GENERATE_ARRAY(0, largest, 1000000)) AS start
)
SELECT number AS item_index, CAST(IFNULL(counted.frequency, 0) AS INT64) AS frequency
FROM starts
CROSS JOIN UNNEST(GENERATE_ARRAY(start, last)) AS number
LEFT JOIN counted ON counted.item_index = number;

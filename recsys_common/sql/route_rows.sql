-- The rows that the comparison of routes carries: the first shards, each a random sample of the whole.
-- parameter files: INT64  number of shards
-- reads export_rows; writes route_rows
CREATE OR REPLACE TABLE route_rows CLUSTER BY shard AS
SELECT *
FROM export_rows
WHERE shard < @files;

-- Can BigQuery pack the record batches itself? One row for each record: its number of rows, and each column as one
-- string: the values one after the other, each 8 bytes, big-endian, two's complement, then web-safe base64 (RFC 4648,
-- section 5). EXPORT DATA writes it as CSV, and decode_csv, decode_base64 and decode_raw read it.
-- SQL does not show the bits of a float, so the rating is in 65536ths, rounded: exact for half and quarter stars.
-- STRING_AGG over BYTES would save the detour through hexadecimal digits; the embedded service gets it wrong.
-- A fixed order that looks random spreads users and items over the records of a shard, and `number` is that order for
-- all columns: equal rows cannot make one column's order differ from another's.
-- parameter shard: INT64  the rows to pack
-- parameter rows_per_record: INT64  such as 4096; the last record of a shard has what is left
-- reads export_rows
WITH spread AS (
  SELECT *, MOD(MOD(user_id, 134217689) * 31415927 + MOD(item_id, 134217689) * 27182819, 134217689) AS mixed
  FROM export_rows
  WHERE shard = @shard
),
numbered AS (
  SELECT
    user_id,
    item_id,
    CAST(ROUND(rating * 65536) AS INT64) AS rating,
    timestamp,
    ROW_NUMBER() OVER (ORDER BY MOD(mixed * mixed, 134217689), user_id, item_id, timestamp, rating) - 1 AS number
  FROM spread
)
SELECT
  IF(
    COUNTIF(user_id IS NULL OR item_id IS NULL OR rating IS NULL OR timestamp IS NULL) = 0,
    COUNT(*),
    ERROR(CONCAT('export_rows, shard ', CAST(@shard AS STRING), ': a NULL in user_id, item_id, rating or timestamp'))
  ) AS `rows`,
  REPLACE(REPLACE(TO_BASE64(FROM_HEX(STRING_AGG(
    FORMAT('%08x%08x', (user_id >> 32) & 0xffffffff, user_id & 0xffffffff), '' ORDER BY number
  ))), '+', '-'), '/', '_') AS user_id,
  REPLACE(REPLACE(TO_BASE64(FROM_HEX(STRING_AGG(
    FORMAT('%08x%08x', (item_id >> 32) & 0xffffffff, item_id & 0xffffffff), '' ORDER BY number
  ))), '+', '-'), '/', '_') AS item_id,
  REPLACE(REPLACE(TO_BASE64(FROM_HEX(STRING_AGG(
    FORMAT('%08x%08x', (rating >> 32) & 0xffffffff, rating & 0xffffffff), '' ORDER BY number
  ))), '+', '-'), '/', '_') AS rating,
  REPLACE(REPLACE(TO_BASE64(FROM_HEX(STRING_AGG(
    FORMAT('%08x%08x', (timestamp >> 32) & 0xffffffff, timestamp & 0xffffffff), '' ORDER BY number
  ))), '+', '-'), '/', '_') AS timestamp
FROM numbered
GROUP BY DIV(number, @rows_per_record);

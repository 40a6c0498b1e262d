-- Are these the same rows? One row of checks that do not depend on the order of the rows, and that add up: the checks
-- of the parts of a table, each sum added to its own, are the checks of the whole.
-- rows         how many
-- x_sum        sum of x modulo p; MOD takes the sign of x
-- x_cubes      sum of the cubes of x modulo q: notices values that differ and have the same sum
-- row_cubes    sum of the cubes of a weighted sum of the row's values: notices values that changed places
-- A rating is two whole numbers: its 65536ths, and what is left of it in 2^-62; so a float's last bit counts.
-- p and q are primes, 2^27 - 39 and 2^27 - 111 (no two residues have one cube): products stay below 2^54, and a sum
-- leaves INT64 only after 2^36 rows.
-- reads ratings
WITH numbers AS (
  SELECT
    user_id,
    item_id,
    timestamp,
    CAST(TRUNC(rating * 65536) AS INT64) AS rating,
    CAST(TRUNC((rating * 65536 - TRUNC(rating * 65536)) * 70368744177664) AS INT64) AS rest
  FROM ratings
),
residues AS (
  SELECT
    MOD(user_id, 134217689) AS user_p,
    MOD(item_id, 134217689) AS item_p,
    MOD(rating, 134217689) AS rating_p,
    MOD(timestamp, 134217689) AS timestamp_p,
    MOD(user_id, 134217617) AS user_q,
    MOD(item_id, 134217617) AS item_q,
    MOD(MOD(rating, 134217617) + MOD(rest, 134217617), 134217617) AS rating_q,
    MOD(timestamp, 134217617) AS timestamp_q
  FROM numbers
),
weighted AS (
  SELECT
    *,
    MOD(user_q * 31415927 + item_q * 27182819 + rating_q * 14142137 + timestamp_q * 57721567, 134217617) AS row_q
  FROM residues
)
SELECT
  COUNT(*) AS `rows`,
  CAST(SUM(user_p) AS INT64) AS user_id_sum,
  CAST(SUM(item_p) AS INT64) AS item_id_sum,
  CAST(SUM(rating_p) AS INT64) AS rating_sum,
  CAST(SUM(timestamp_p) AS INT64) AS timestamp_sum,
  CAST(SUM(MOD(MOD(user_q * user_q, 134217617) * user_q, 134217617)) AS INT64) AS user_id_cubes,
  CAST(SUM(MOD(MOD(item_q * item_q, 134217617) * item_q, 134217617)) AS INT64) AS item_id_cubes,
  CAST(SUM(MOD(MOD(rating_q * rating_q, 134217617) * rating_q, 134217617)) AS INT64) AS rating_cubes,
  CAST(SUM(MOD(MOD(timestamp_q * timestamp_q, 134217617) * timestamp_q, 134217617)) AS INT64) AS timestamp_cubes,
  CAST(SUM(MOD(MOD(row_q * row_q, 134217617) * row_q, 134217617)) AS INT64) AS row_cubes
FROM weighted;

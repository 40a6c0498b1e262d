// How does a Node.js program use a model of this repository? By ONNX Runtime, farmhash and usearch, without TensorFlow.
//
//   make serving                                         puts this file and its packages into build/serving
//   node build/serving/score.mjs <model> [--repeat N]    runs the golden vectors; times recommending
//   node build/serving/score.mjs <model> --users users.f32 [--repeat N]    exact search against the index, N users;
//                                                                          the next N of the file warm up
//
// <model> is a folder that recsys_common/saving.py exported. Every file is compared with its manifest by SHA-256 before
// it is used. metadata.json then says what the inputs are, so nothing here knows the model. Raw ids become rows of
// tables by vocabulary or hash, rows become the user's embedding by ONNX, and its inner products with the items'
// vectors are the scores. A golden vector is inputs with the outputs that the Python model gave: rows must be the same,
// numbers within 1e-5 (relative above 1), ids the same up to ties.
//
// Into a program of your own take `load` and what it returns: `rows`, `embed`, `recommend`. It works for one user at a
// time. Prints one line of JSON. What is wrong goes to stderr, with exit code 1.
import { createHash } from 'node:crypto';
import { closeSync, openSync, readFileSync, readSync, readdirSync, statSync } from 'node:fs';
import { join, relative, sep } from 'node:path';
import farmhash from 'farmhash';
import * as ort from 'onnxruntime-node';
import usearch from 'usearch';

const TOLERANCE = 1e-5;
const BLOCK = 1 << 24; // bytes read at once
const ARRAYS = { int32: Int32Array, float32: Float32Array };

// Files ---------------------------------------------------------------------------------------------------------------

function* blocks(path) {
  const block = Buffer.alloc(BLOCK), file = openSync(path);
  try {
    for (let count; (count = readSync(file, block, 0, BLOCK, null)); ) yield block.subarray(0, count);
  } finally {
    closeSync(file);
  }
}

/** A raw little-endian file as a typed array, of any size. */
function readArray(path, Type) {
  const bytes = new Uint8Array(statSync(path).size);
  let at = 0;
  for (const block of blocks(path)) bytes.set(block, at), (at += block.length);
  return new Type(bytes.buffer);
}

/** Ids in their order: of a .i64 bigints, of a .txt strings, one as JSON on each line. */
function readIds(path) {
  if (path.endsWith('.i64')) return readArray(path, BigInt64Array);
  return readFileSync(path, 'utf8').split('\n').filter(Boolean).map((line) => JSON.parse(line));
}

function sha256(path) {
  const hash = createHash('sha256');
  for (const block of blocks(path)) hash.update(block);
  return hash.digest('hex');
}

/** Every file that manifest.json names has its size and its SHA-256, and there is no other file. Their names. */
function verify(folder) {
  const again = 'The model is not as it was written: copy or export it again.';
  const manifest = JSON.parse(readFileSync(join(folder, 'manifest.json'), 'utf8'));
  if (manifest.version !== 1) throw new Error(`${folder}/manifest.json: version ${manifest.version}, expected 1`);
  for (const { name, bytes, sha256: expected } of manifest.files) {
    if (!/^\w[\w.-]*(\/\w[\w.-]*)*$/.test(name)) throw new Error(`${folder}/manifest.json: ${name} is no file's name`);
    const path = join(folder, name), { size } = statSync(path);
    if (size !== bytes) throw new Error(`${path}: ${size} bytes, expected ${bytes}. ${again}`);
    const found = sha256(path);
    if (found !== expected) throw new Error(`${path}: SHA-256 ${found}, expected ${expected}. ${again}`);
  }
  const known = new Set(['manifest.json', 'saved_model/fingerprint.pb', ...manifest.files.map(({ name }) => name)]);
  for (const entry of readdirSync(folder, { recursive: true, withFileTypes: true })) {
    const name = relative(folder, join(entry.parentPath, entry.name)).split(sep).join('/');
    if (entry.isDirectory()) continue;
    if (!entry.isFile()) throw new Error(`${folder}/${name}: is no plain file. ${again}`);
    if (!known.has(name)) throw new Error(`${folder}/${name}: not in manifest.json. ${again}`);
  }
  return new Set(manifest.files.map(({ name }) => name));
}

// Ids and rows --------------------------------------------------------------------------------------------------------

/** int64 as a bigint, strings as they are: what a Map or a hash takes. */
const idOf = (dtype, value) => (dtype === 'int64' ? BigInt(value) : value);

const placesOf = (ids) => new Map(Array.from(ids, (id, place) => [id, place]));

/** (Fingerprint64 of the 8 bytes of id XOR Fingerprint64(salt), upper half) * buckets >> 32. */
function hashBucket(id, buckets, salt) {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64LE(BigInt.asUintN(64, id) ^ farmhash.fingerprint64(salt));
  return Number(((farmhash.fingerprint64(bytes) >> 32n) * BigInt(buckets)) >> 32n);
}

/** The row of a table for one id, as the input's metadata says. */
function rowOf(input, places, id) {
  if (input.buckets !== null) return hashBucket(id, input.buckets, input.salt);
  const place = places.get(id);
  if (place !== undefined) return input.oov_buckets + place;
  return Number(farmhash.fingerprint64(`${input.salt}${id}`) % BigInt(input.oov_buckets));
}

// The model -----------------------------------------------------------------------------------------------------------

/** What a program needs of a model: {metadata, rows, embed, exact, nearest, recommend}. */
async function load(folder) {
  const verified = verify(folder);
  /** The path of a file that metadata.json names; only what was verified is read. */
  const pathOf = (file) => {
    if (!verified.has(file)) throw new Error(`${folder}/metadata.json: the file ${file} is not in manifest.json`);
    return join(folder, file);
  };
  const metadata = JSON.parse(readFileSync(join(folder, 'metadata.json'), 'utf8'));
  if (metadata.version !== 1) throw new Error(`${folder}/metadata.json: version ${metadata.version}, expected 1`);
  const places = new Map(); // of each vocabulary's file
  for (const { vocabulary } of metadata.inputs)
    if (vocabulary && !places.has(vocabulary.file))
      places.set(vocabulary.file, placesOf(readIds(pathOf(vocabulary.file))));
  const onnx = metadata.onnx.user_embedding;
  if (!onnx) throw new Error(`${folder}: has no onnx/user_embedding.onnx; export it with onnx=True`);
  const session = await ort.InferenceSession.create(pathOf(onnx.file));
  const itemIds = readIds(pathOf(metadata.items.ids.file)), itemPlaces = placesOf(itemIds);
  const vectors = readArray(pathOf(metadata.items.vectors.file), Float32Array);
  const [count, dim] = metadata.items.vectors.shape, about = metadata.items.index;
  let index = null;
  if (about) {
    const { dim: dimensions, metric, dtype: quantization, connectivity, expansion_add, expansion_search } = about;
    index = new usearch.Index({ dimensions, metric, quantization, connectivity, expansion_add, expansion_search });
    index.view(pathOf(about.file));
  }

  /** Raw inputs of one side as features of a batch: {feature: {data, dims}}. */
  function rows(side, raw) {
    const batch = {};
    for (const input of metadata.inputs.filter((each) => each.side === side)) {
      const values = raw[input.name], flat = values.flat();
      const dims = input.shape.length === 2 ? [values.length, input.shape[1]] : [values.length];
      if (flat.length !== dims.reduce((a, b) => a * b)) throw new Error(`${input.name}: expected the shape ${dims}`);
      const own = input.vocabulary && places.get(input.vocabulary.file);
      const data = input.kind === 'number' ? flat : flat.map((id) => rowOf(input, own, idOf(input.dtype, id)));
      batch[input.feature] = { data, dims };
      if (input.length) batch[input.length] = { data: raw[input.length], dims: [values.length] };
    }
    return batch;
  }

  /** Rows of n users -> their embeddings, Float32Array [n * dim]. */
  async function embed(batch) {
    const feeds = {};
    for (const [name, { tensor, dtype }] of Object.entries(onnx.inputs))
      feeds[tensor] = new ort.Tensor(dtype, ARRAYS[dtype].from(batch[name].data), batch[name].dims);
    return (await session.run(feeds))[onnx.outputs.embedding.tensor].data;
  }

  /** The inner product of a user's embedding with the item at a place of the catalogue: its score. */
  function score(user, place) {
    let sum = 0;
    for (let i = 0; i < dim; i++) sum += user[i] * vectors[place * dim + i];
    return sum;
  }

  /** Places and scores, best first; of equal scores the first place. */
  const sorted = (user, keys) =>
    Array.from(keys, (key) => ({ place: Number(key), score: score(user, Number(key)) })).sort(
      (a, b) => b.score - a.score || a.place - b.place,
    );

  /** usearch reads an array from the start of its buffer, so a part of one, as `subarray` gives it, is copied. */
  const exact = (user, k) =>
    sorted(user, usearch.exactSearch(vectors, user.slice(), dim, Math.min(k, count), usearch.MetricKind.IP, 1).keys);

  /** As `exact`, nearly. The index may have one number more than the embedding: 0. It may find fewer than there are. */
  function nearest(user, k) {
    const longer = new Float32Array(about.dim);
    longer.set(user);
    const { keys } = index.search(longer, Math.min(k, count), 1);
    return keys.length < Math.min(k, count) ? exact(user, k) : sorted(user, keys);
  }

  /** The k best items of one user, without those seen. As many more are asked for as may be left out. */
  function recommend(user, k, seen, search = exact) {
    const left = new Set(seen.map((id) => itemPlaces.get(idOf(metadata.items.ids.dtype, id))));
    left.delete(undefined); // what is no item's id: padding
    const found = search(user, k + left.size).filter(({ place }) => !left.has(place));
    return found.slice(0, k).map(({ place, score }) => ({ item_id: itemIds[place], score }));
  }

  const data = { metadata, itemIds, itemPlaces, vectors, dim };
  return { ...data, rows, embed, score, exact, nearest: index && nearest, recommend };
}

// Golden vectors ------------------------------------------------------------------------------------------------------

/** What is no number differs hugely from everything; JSON has neither NaN nor infinity. */
function difference(found, expected) {
  const apart = Math.abs(found - expected) / Math.max(1, Math.abs(expected));
  return apart < 1e300 ? apart : 1e300;
}

/** Largest difference, wrong rows and ids of one golden vector; items outside the catalogue, of no vector, are skipped. */
async function check(model, golden, state) {
  const { metadata, dim } = model, { inputs, outputs, rows: expected } = golden;
  const numbers = (found, wanted) => {
    const [has, needs] = [found.length, wanted.length];
    if (has !== needs) throw new Error(`${golden.signature}: ${has} values, expected ${needs}`);
    wanted.forEach((value, i) => (state.largest = Math.max(state.largest, difference(found[i], value))));
  };
  const item = metadata.inputs.find(({ side }) => side === 'item');
  const batch = {};
  for (const side of ['user', 'item']) {
    const given = metadata.inputs.filter((each) => each.side === side && each.name in inputs);
    if (given.length) Object.assign(batch, model.rows(side, inputs));
  }
  for (const [name, rows] of Object.entries(expected))
    rows.flat().forEach((row, i) => (state.wrongRows += Number(batch[name].data[i] !== row)));
  const placesOfItems = (inputs[item.name] ?? []).map((id) => model.itemPlaces.get(idOf(item.dtype, id)));
  if (golden.signature === 'item_embedding' || golden.signature === 'score')
    state.skipped += placesOfItems.filter((place) => place === undefined).length;
  const vector = (place) => model.vectors.subarray(place * dim, (place + 1) * dim);
  if (golden.signature === 'item_embedding') {
    placesOfItems.forEach((place, i) => place !== undefined && numbers(vector(place), outputs.embedding[i]));
    return;
  }
  const all = await model.embed(batch), user = (i) => all.subarray(i * dim, (i + 1) * dim);
  if (golden.signature === 'user_embedding') numbers(all, outputs.embedding.flat());
  if (golden.signature === 'score')
    placesOfItems.forEach((at, i) => at !== undefined && numbers([model.score(user(i), at)], [outputs.score[i]]));
  if (golden.signature !== 'recommend') return;
  outputs.item_id.forEach((wanted, i) => {
    const found = model.recommend(user(i), inputs.k, inputs.seen_item_id[i]);
    numbers(found.map(({ score }) => score), outputs.score[i]);
    const ids = found.map(({ item_id }) => item_id);
    ids.forEach((item_id, place) => {
      // Another id may stand where its own score is the same; one that is not in the list may tie with the last.
      // None may stand twice.
      const at = wanted.indexOf(String(item_id)), other = outputs.score[i][at < 0 ? wanted.length - 1 : at];
      const tie = at === place || difference(other, outputs.score[i][place]) <= TOLERANCE;
      if (!tie || ids.indexOf(item_id) < place) state.wrongIds++;
    });
  });
}

// The command line ----------------------------------------------------------------------------------------------------

function quantiles(times) {
  const sorted = times.toSorted((a, b) => a - b), of = (share) => sorted[Math.round(share * (sorted.length - 1))];
  return { p50: of(0.5), p99: of(0.99), min: sorted[0], max: sorted.at(-1), repeats: sorted.length };
}

async function goldenVectors(folder, repeat) {
  const start = performance.now(), model = await load(folder), load_ms = performance.now() - start;
  const state = { largest: 0, wrongRows: 0, wrongIds: 0, skipped: 0 }, { golden } = model.metadata;
  for (const each of golden) await check(model, each, state);
  const asked = golden.find(({ signature }) => signature === 'recommend'), times = [];
  for (let i = 0; asked && i < repeat; i++) {
    const place = i % asked.inputs.seen_item_id.length, begin = performance.now(), one = {};
    for (const [name, values] of Object.entries(asked.inputs)) if (Array.isArray(values)) one[name] = [values[place]];
    model.recommend(await model.embed(model.rows('user', one)), asked.inputs.k, one.seen_item_id[0]);
    times.push(performance.now() - begin);
  }
  const { largest: largest_difference, wrongRows: wrong_rows, wrongIds: wrong_ids, skipped } = state;
  const result = { client: 'Node.js', onnxruntime: ort.env.versions.node, golden: golden.length, largest_difference };
  console.log(JSON.stringify({ ...result, wrong_rows, wrong_ids, skipped, load_ms, recommend_ms: quantiles(times) }));
  if (!golden.length) throw new Error(`${folder}/metadata.json has no golden vectors`);
  if (!(largest_difference <= TOLERANCE) || wrong_rows || wrong_ids)
    throw new Error(`differs by ${largest_difference}, ${wrong_rows} wrong rows, ${wrong_ids} wrong ids; not 1e-5, 0, 0`);
}

async function searches(folder, path, repeat, k = 100) {
  const model = await load(folder), users = readArray(path, Float32Array);
  /** Lists and times of `repeat` users, in a loop of its own. */
  const each = (search, first) => {
    const lists = [], times = [];
    for (let i = first; i < first + repeat; i++) {
      const at = (i * model.dim) % users.length, user = users.slice(at, at + model.dim), start = performance.now();
      const found = search(user, k);
      times.push(performance.now() - start), lists.push(found.map(({ place }) => place));
    }
    return { lists, times };
  };
  const timed = (search) => (each(search, repeat), each(search, 0)); // the next users of the file warm up
  const exact = timed(model.exact), index = model.nearest && timed(model.nearest), top = exact.lists;
  const shares = index?.lists.map((near, i) => near.filter((place) => top[i].includes(place)).length / top[i].length);
  const recall = shares ? shares.reduce((a, b) => a + b) / repeat : null;
  const times = { exact_ms: quantiles(exact.times), index_ms: index && quantiles(index.times), recall };
  console.log(JSON.stringify({ client: 'Node.js', rows: model.itemIds.length, dim: model.dim, ...times, top }));
}

try {
  const words = process.argv.slice(2), options = { '--repeat': '200', '--users': null }, [folder] = words.splice(0, 1);
  for (; words[0] in options && words.length > 1; words.splice(0, 2)) options[words[0]] = words[1];
  const repeat = Number(options['--repeat']);
  if (!folder || words.length || !(repeat >= 1))
    throw new Error('usage: score.mjs <model> [--users users.f32] [--repeat N]');
  await (options['--users'] ? searches(folder, options['--users'], repeat) : goldenVectors(folder, repeat));
} catch (error) {
  console.error(`error: ${error.message}`);
  process.exitCode = 1;
}

/* How does a C program use a model of this repository? Through TensorFlow's C API, with no Python and no project code.

     make serving                                            builds it as build/serving/score
     build/serving/score <model> [--repeat N]                runs the golden vectors; times `recommend` N times

   <model> is a folder that recsys_common/saving.py exported. It is compared with its manifest first, file by file, by
   SHA-256: what was changed or cut short is not used. metadata.json then says which tensors a signature has, so nothing
   here knows the model. A golden vector is inputs with the outputs that the Python model gave; every number must come
   within 1e-5 of them, relative above 1, and every id must be the same, up to ties.

   Into a program of your own take json.h, `check_files`, `tensor_of` and `run`. What is allocated lives as long as the
   program: it answers and ends. A server would free what TF_DeleteTensor and free() take.

   Prints one line of JSON. What is wrong goes to stderr, with exit code 1. TensorFlow itself
   writes much to stderr; TF_CPP_MIN_LOG_LEVEL=3 in the environment keeps it short. */
#include "json.h"

#include <ftw.h>
#include <math.h>
#include <time.h>

#include "tensorflow/c/c_api.h"
#include "tensorflow/c/tf_tstring.h"

#define TOLERANCE 1e-5

/* BoringSSL's, which TensorFlow's library carries and no header of it declares. */
uint8_t *SHA256(const uint8_t *data, size_t length, uint8_t digest[32]);

static double milliseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1e3 + now.tv_nsec / 1e6;
}

/* What a string, number or word says; a list or an object says nothing. */
static const char *text_of(Json *value) {
    if (!value->text)
        die("metadata.json or manifest.json has a list or an object as \"%s\", where a string or a number is expected",
            value->key ? value->key : "an entry of a list");
    return value->text;
}

/* The manifest ----------------------------------------------------------------------------------------------------- */

static Json *manifest;
static size_t folder_length;

static int is_in_manifest(const char *path, const struct stat *about, int type, struct FTW *walk) {
    (void)walk;
    if (type == FTW_D) return 0;
    if (type != FTW_F || !S_ISREG(about->st_mode)) die("%s: is no plain file; copy what it leads to", path);
    const char *name = path + folder_length + 1;
    if (!strcmp(name, "manifest.json")) return 0;
    /* It differs from export to export. TensorFlow reads it, for a line of its own log. */
    if (!strcmp(name, "saved_model/fingerprint.pb")) return 0;
    for (Json *file = get(manifest, "files", NULL)->first; file; file = file->next)
        if (!strcmp(name, text_of(get(file, "name", NULL)))) return 0;
    die("%s: is not in manifest.json; a model has no other files: export it again", path);
    return 1;
}

/* Every file that the manifest names has its size and its SHA-256, and there is no other file.
   `folder` is as realpath() gives it: with no slash at its end, and no link. */
static void check_files(const char *folder) {
    manifest = json_parse(join(folder, "manifest.json"));
    const char *version = text_of(get(manifest, "version", NULL));
    if (strcmp(version, "1")) die("%s/manifest.json: version %s, expected 1", folder, version);
    for (Json *entry = get(manifest, "files", NULL)->first; entry; entry = entry->next) {
        const char *name = text_of(get(entry, "name", NULL)), *expected = text_of(get(entry, "sha256", NULL));
        if (name[0] == '/' || strstr(name, "..")) die("%s/manifest.json: %s leads out of the folder", folder, name);
        File file = map_file(join(folder, name));
        size_t bytes = strtoull(text_of(get(entry, "bytes", NULL)), NULL, 10);
        if (file.size != bytes)
            die("%s/%s: %zu bytes, the manifest says %zu: export or copy it again", folder, name, file.size, bytes);
        uint8_t digest[32];
        char found[65];
        SHA256(file.bytes, file.size, digest);
        for (int i = 0; i < 32; i++) sprintf(found + 2 * i, "%02x", digest[i]);
        if (strcmp(found, expected))
            die("%s/%s: SHA-256 %s, the manifest says %s: export or copy it again", folder, name, found, expected);
        if (file.size) munmap((void *)file.bytes, file.size);
    }
    folder_length = strlen(folder);
    if (nftw(folder, is_in_manifest, 16, FTW_PHYS)) die("%s: cannot be listed: %s", folder, strerror(errno));
}

/* Tensors ---------------------------------------------------------------------------------------------------------- */

static void check(TF_Status *status, const char *doing) {
    if (TF_GetCode(status) != TF_OK) die("%s: %s", doing, TF_Message(status));
}

static size_t leaves(Json *value, Json **into) {
    if (value->kind != '[') {
        if (into) *into = value;
        return 1;
    }
    size_t count = 0;
    for (Json *child = value->first; child; child = child->next) count += leaves(child, into ? into + count : NULL);
    return count;
}

/* A tensor from nested JSON lists; `about` is {"tensor", "dtype", "shape"} of the metadata. int64 are strings there. */
static TF_Tensor *tensor_of(Json *value, Json *about, const char *name) {
    const char *dtype = text_of(get(about, "dtype", NULL));
    int64_t shape[8] = {0};
    size_t rank = get(about, "shape", NULL)->count, count = leaves(value, NULL), product = 1;
    if (rank > 8) die("%s: %zu dimensions, expected at most 8", name, rank);
    Json *level = value;
    for (size_t i = 0; i < rank && level && level->kind == '['; i++, level = level->first) shape[i] = level->count;
    int huge = 0;
    for (size_t i = 0; i < rank; i++) huge |= __builtin_mul_overflow(product, (size_t)shape[i], &product);
    if (huge || count != product) die("%s: %zu values do not fill its %zu dimensions", name, count, rank);
    Json **all = allocate(count * sizeof *all);
    leaves(value, all);
    TF_DataType type = !strcmp(dtype, "int64") ? TF_INT64 : !strcmp(dtype, "int32") ? TF_INT32
                     : !strcmp(dtype, "float32") ? TF_FLOAT : !strcmp(dtype, "string") ? TF_STRING : 0;
    if (!type) die("%s: dtype %s, expected int64, int32, float32 or string", name, dtype);
    size_t size = type == TF_STRING ? sizeof(TF_TString) : TF_DataTypeSize(type);
    TF_Tensor *tensor = TF_AllocateTensor(type, shape, rank, count * size);
    void *data = TF_TensorData(tensor);
    for (size_t i = 0; i < count; i++) {
        const char *text = text_of(all[i]);
        if (type == TF_INT64) ((int64_t *)data)[i] = strtoll(text, NULL, 10);
        if (type == TF_INT32) ((int32_t *)data)[i] = strtol(text, NULL, 10);
        if (type == TF_FLOAT) ((float *)data)[i] = strtof(text, NULL);
        if (type != TF_STRING) continue;
        TF_StringInit((TF_TString *)data + i);
        TF_StringCopy((TF_TString *)data + i, text, strlen(text));
    }
    free(all);
    return tensor;
}

typedef struct {
    TF_Graph *graph;
    TF_Session *session;
    Json *metadata;
} Model;

static Model load(const char *folder) {
    check_files(folder);
    Model model = {TF_NewGraph(), NULL, json_parse(join(folder, "metadata.json"))};
    TF_Status *status = TF_NewStatus();
    const char *tags[] = {"serve"};
    model.session = TF_LoadSessionFromSavedModel(TF_NewSessionOptions(), NULL, join(folder, "saved_model"), tags, 1,
                                                 model.graph, NULL, status);
    check(status, folder);
    return model;
}

/* The place of a tensor of a signature, such as "recommend_user_id:0", in the graph. */
static TF_Output output_of(Model *model, Json *about) {
    char *name = strdup(text_of(get(about, "tensor", NULL))), *colon = strrchr(name, ':');
    if (!colon) die("metadata.json: tensor %s, expected operation:number", name);
    *colon = 0;
    TF_Output output = {TF_GraphOperationByName(model->graph, name), atoi(colon + 1)};
    if (!output.oper) die("saved_model has no operation %s, which metadata.json names", name);
    free(name);
    return output;
}

#define MOST 64

/* A signature prepared once and run many times. */
typedef struct {
    TF_Output inputs[MOST], outputs[MOST];
    TF_Tensor *given[MOST], *found[MOST];
    int num_inputs, num_outputs;
} Call;

static Call prepare(Model *model, Json *golden) {
    Json *signature = get(model->metadata, "signatures", text_of(get(golden, "signature", NULL)), NULL);
    Call call = {.num_inputs = 0};
    for (Json *input = get(golden, "inputs", NULL)->first; input && call.num_inputs < MOST; input = input->next) {
        Json *about = get(signature, "inputs", input->key, NULL);
        call.given[call.num_inputs] = tensor_of(input, about, input->key);
        call.inputs[call.num_inputs++] = output_of(model, about);
    }
    for (Json *output = get(golden, "outputs", NULL)->first; output && call.num_outputs < MOST; output = output->next)
        call.outputs[call.num_outputs++] = output_of(model, get(signature, "outputs", output->key, NULL));
    return call;
}

static void run(Model *model, Call *call) {
    TF_Status *status = TF_NewStatus();
    TF_SessionRun(model->session, NULL, call->inputs, call->given, call->num_inputs, call->outputs, call->found,
                  call->num_outputs, NULL, 0, NULL, status);
    check(status, "running a signature");
    TF_DeleteStatus(status);
}

/* Golden vectors --------------------------------------------------------------------------------------------------- */

/* Absolute up to 1, relative above, for float32 has seven digits. What is no number differs hugely from everything;
   JSON has neither NaN nor infinity. */
static double difference(double found, double expected) {
    double apart = fabs(found - expected) / fmax(1, fabs(expected));
    return apart < 1e300 ? apart : 1e300;
}

/* The largest difference of the numbers of one output; ids must be equal. */
static double compare(TF_Tensor *found, Json *expected, const char *name) {
    size_t count = leaves(expected, NULL), size = TF_TensorElementCount(found);
    if (count != size) die("%s: %zu values, expected %zu", name, size, count);
    Json **all = allocate(count * sizeof *all);
    leaves(expected, all);
    double largest = 0;
    for (size_t i = 0; i < count; i++) {
        double one = difference(((float *)TF_TensorData(found))[i], strtod(text_of(all[i]), NULL));
        if (one > largest) largest = one;
    }
    free(all);
    return largest;
}

static int same_id(TF_Tensor *found, size_t i, const char *expected) {
    if (TF_TensorType(found) == TF_INT64) return ((int64_t *)TF_TensorData(found))[i] == strtoll(expected, NULL, 10);
    const TF_TString *text = (TF_TString *)TF_TensorData(found) + i;
    size_t length = strlen(expected);
    return TF_StringGetSize(text) == length && !memcmp(TF_StringGetDataPointer(text), expected, length);
}

static int same_ids(TF_Tensor *found, size_t i, size_t j) {
    const int64_t *numbers = TF_TensorData(found);
    if (TF_TensorType(found) == TF_INT64) return numbers[i] == numbers[j];
    const TF_TString *one = (TF_TString *)TF_TensorData(found) + i, *other = (TF_TString *)TF_TensorData(found) + j;
    size_t length = TF_StringGetSize(one);
    return TF_StringGetSize(other) == length &&
           !memcmp(TF_StringGetDataPointer(one), TF_StringGetDataPointer(other), length);
}

/* How many ids of lists of k stand there twice, or differ by more than a tie: another id may stand where its own score
   is the same. */
static size_t wrong_ids(TF_Tensor *found, Json *ids, Json *scores) {
    size_t count = leaves(ids, NULL), k = ids->first ? ids->first->count : 0, wrong = 0;
    if (TF_TensorType(found) != TF_INT64 && TF_TensorType(found) != TF_STRING)
        die("%s: neither float32 nor int64 nor string", ids->key);
    for (Json *row = ids->first; row; row = row->next)
        if (!k || row->count != k) die("%s: expected lists of the same number of ids", ids->key);
    if (!k || count != k * ids->count || count != leaves(scores, NULL))
        die("%s: expected a list of lists, with a score for each id", ids->key);
    if (count != (size_t)TF_TensorElementCount(found)) die("%s: expected %zu ids", ids->key, count);
    Json **id = allocate(count * sizeof *id), **score = allocate(count * sizeof *score);
    leaves(ids, id), leaves(scores, score);
    for (size_t i = 0; i < count; i++) {
        size_t row = i / k * k, place = row;
        while (place < row + k && !same_id(found, i, text_of(id[place]))) place++;
        if (place == row + k) place--; /* not in the list: it may tie with the last one, which it then pushed out */
        int tie = difference(strtod(text_of(score[place]), NULL), strtod(text_of(score[i]), NULL)) <= TOLERANCE;
        size_t before = row;
        while (before < i && !same_ids(found, i, before)) before++;
        wrong += before < i || !(tie || same_id(found, i, text_of(id[i])));
    }
    free(id), free(score);
    return wrong;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double quantile(double *sorted, int count, double share) { return sorted[(int)(share * (count - 1) + 0.5)]; }

static int golden_vectors(const char *folder, int repeat) {
    double start = milliseconds();
    Model model = load(folder);
    double loaded = milliseconds() - start, largest = 0, *times = allocate(repeat * sizeof *times);
    size_t vectors = 0, wrong = 0;
    Call recommend = {.num_inputs = -1};
    for (Json *golden = get(model.metadata, "golden", NULL)->first; golden; golden = golden->next, vectors++) {
        const char *signature = text_of(get(golden, "signature", NULL));
        Call call = prepare(&model, golden);
        run(&model, &call);
        Json *output = get(golden, "outputs", NULL)->first;
        for (int i = 0; i < call.num_outputs; i++, output = output->next) {
            if (TF_TensorType(call.found[i]) == TF_FLOAT) {
                double one = compare(call.found[i], output, output->key);
                if (one > largest) largest = one;
            } else {
                wrong += wrong_ids(call.found[i], output, get(golden, "outputs", "score", NULL));
            }
        }
        if (!strcmp(signature, "recommend")) recommend = call;
    }
    for (int i = 0; i < repeat && recommend.num_inputs > 0; i++) {
        start = milliseconds();
        run(&model, &recommend);
        times[i] = milliseconds() - start;
        for (int j = 0; j < recommend.num_outputs; j++) TF_DeleteTensor(recommend.found[j]);
    }
    qsort(times, repeat, sizeof *times, ascending);
    printf("{\"client\": \"C\", \"tensorflow\": \"%s\", \"golden\": %zu, ", TF_Version(), vectors);
    printf("\"largest_difference\": %.9g, \"wrong_ids\": %zu, \"load_ms\": %.1f, ", largest, wrong, loaded);
    printf("\"recommend_ms\": {\"p50\": %.3f, \"p99\": %.3f, \"repeats\": %d}}\n", quantile(times, repeat, .5),
           quantile(times, repeat, .99), repeat);
    fflush(stdout);
    if (!vectors) die("%s/metadata.json has no golden vectors", folder);
    if (!(largest <= TOLERANCE) || wrong)
        die("differs by %g with %zu wrong ids, expected %g and 0", largest, wrong, TOLERANCE);
    return 0;
}

int main(int count, char **words) {
    int repeat = count == 4 && !strcmp(words[2], "--repeat") ? atoi(words[3]) : 200;
    if ((count != 2 && count != 4) || repeat < 1) die("usage: score <model> [--repeat N]");
    const char *folder = realpath(words[1], NULL);
    if (!folder) die("%s: %s", words[1], strerror(errno));
    return golden_vectors(folder, repeat);
}

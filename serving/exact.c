/* Which k items score best for a user, of all of them? Exactly, in C, at about the speed of memory.

     make serving                                                      builds it as build/serving/exact
     build/serving/exact <model>/items/vectors.f32 64 users.f32 [N]    the best 100 for N users, in turn, with times

   Both files are float32, row after row, here of 64 numbers; a score is the inner product of a user's and an item's row.
   The function to copy is `exact_top`. One pass over the items keeps the best in a heap; after the first some thousand
   items hardly one gets into it, so that what is left is reading, multiplying and adding. A sum over all numbers, timed
   in turn with it, tells what reading alone costs. One thread. score.c shows how a model's files are verified.

   Prints one line of JSON. What is wrong goes to stderr, with exit code 1. */
#define _GNU_SOURCE
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>

#define TOP 100

typedef struct {
    float score;
    int32_t item;
} Scored;

static int worse(Scored a, Scored b) { return a.score < b.score || (a.score == b.score && a.item > b.item); }

static int best_first(const void *a, const void *b) { return worse(*(const Scored *)a, *(const Scored *)b) ? 1 : -1; }

/* The k best of `rows` items for one user, best first; of equals the one that comes first. k <= rows. How many there
   are: fewer than k where scores are NaN or -infinity, which are left out.
   The root of the heap `best` is its worst. The pragma makes SIMD of the sum (-fopenmp-simd). */
static int exact_top(const float *items, int32_t rows, int dim, const float *user, int k, Scored *best) {
    for (int i = 0; i < k; i++) best[i] = (Scored){-INFINITY, INT32_MAX};
    for (int32_t item = 0; item < rows; item++) {
        const float *vector = items + (size_t)item * dim;
        float score = 0;
#pragma omp simd reduction(+ : score)
        for (int j = 0; j < dim; j++) score += user[j] * vector[j];
        if (!(score > best[0].score)) continue; /* nor is NaN greater */
        Scored entering = {score, item};
        int hole = 0;
        for (int child; (child = 2 * hole + 1) < k; hole = child) {
            if (child + 1 < k && worse(best[child + 1], best[child])) child++;
            if (!worse(best[child], entering)) break;
            best[hole] = best[child];
        }
        best[hole] = entering;
    }
    qsort(best, k, sizeof *best, best_first);
    while (k && best[k - 1].item == INT32_MAX) k--;
    return k;
}

/* What reading costs: the sum of all numbers, in one stream and in four. */
static float sum_one(const float *numbers, size_t count) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (size_t i = 0; i < count; i++) sum += numbers[i];
    return sum;
}

static float sum_four(const float *numbers, size_t count) {
    float a = 0, b = 0, c = 0, d = 0;
    size_t part = count / 4;
    const float *second = numbers + part, *third = second + part, *fourth = third + part;
#pragma omp simd reduction(+ : a, b, c, d)
    for (size_t i = 0; i < part; i++) a += numbers[i], b += second[i], c += third[i], d += fourth[i];
    return a + b + c + d;
}

static void die(const char *what, const char *about) {
    fprintf(stderr, "error: %s%s\n", what, about);
    exit(1);
}

/* A whole file of float32, and how many rows of `dim` numbers it has. */
static float *read_rows(const char *path, int dim, size_t *rows) {
    struct stat about;
    FILE *file = fopen(path, "rb");
    if (!file || fstat(fileno(file), &about)) die("cannot read ", path);
    size_t bytes = about.st_size, huge = 1 << 21;
    if (!bytes || bytes % (4 * (size_t)dim)) die("is no whole number of rows: ", path);
    float *numbers = aligned_alloc(huge, (bytes / huge + 1) * huge);
    if (!numbers) die("no memory for ", path);
#ifdef MADV_HUGEPAGE
    madvise(numbers, bytes, MADV_HUGEPAGE); /* pages of 2 MB, where the kernel has them: fewer look-ups of addresses */
#endif
    if (fread(numbers, 1, bytes, file) != bytes) die("ended early: ", path);
    fclose(file);
    *rows = bytes / 4 / dim;
    return numbers;
}

static double milliseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1e3 + now.tv_nsec / 1e6;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void print_times(const char *name, double *times, int count) {
    qsort(times, count, sizeof *times, ascending);
    double p50 = times[count / 2], most = times[count - 1];
    printf(", \"%s\": {\"p50\": %.3f, \"min\": %.3f, \"max\": %.3f}", name, p50, times[0], most);
}

int main(int count, char **words) {
    int dim = count >= 4 ? atoi(words[2]) : 0, repeat = count == 5 ? atoi(words[4]) : 1;
    if (count < 4 || count > 5 || dim < 1 || repeat < 1) die("usage: exact vectors.f32 dim users.f32 [times]", "");
    size_t rows, num_users;
    float *items = read_rows(words[1], dim, &rows), *users = read_rows(words[3], dim, &num_users);
    if (rows > INT32_MAX) die("has more than 2^31 - 1 rows: ", words[1]);
    int k = rows < TOP ? rows : TOP;
    double *times = calloc(3 * (size_t)repeat, sizeof *times);
    double *search = times, *one = times + repeat, *four = one + repeat;
    if (!times) die("no memory", "");
    Scored best[TOP];
    volatile float sink = 0;
    printf("{\"client\": \"C\", \"rows\": %zu, \"dim\": %d, \"top\": [", rows, dim);
    for (int i = 0; i < repeat; i++) {
        double start = milliseconds();
        int found = exact_top(items, rows, dim, users + i % num_users * dim, k, best);
        double searched = milliseconds();
        sink += sum_one(items, rows * dim);
        double summed = milliseconds();
        sink += sum_four(items, rows * dim);
        four[i] = milliseconds() - summed, one[i] = summed - searched, search[i] = searched - start;
        if ((size_t)i >= num_users) continue;
        printf(i ? "], [" : "[");
        for (int j = 0; j < found; j++) printf("%s%d", j ? ", " : "", best[j].item);
    }
    printf("]]");
    print_times("exact_ms", search, repeat);
    print_times("read_ms", one, repeat);
    print_times("read_four_streams_ms", four, repeat);
    printf(", \"repeats\": %d}\n", repeat);
    return 0;
}

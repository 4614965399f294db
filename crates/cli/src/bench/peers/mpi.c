/* Times MPI_Allreduce in place, the way the benchmark times its own: one check, a warm-up, then back-to-back calls; the
 * median of each rank's calls, the maximum over ranks.
 *
 *   mpi BUDGET_MS CALLS_MIN CALLS_MAX TYPE:ELEMENTS...
 *
 * One line of JSON for each TYPE:ELEMENTS on rank 0's standard output. */
#include <mpi.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>

enum { DIFFERENT = 7, WARM_UP = 3, WARM_UP_SHORT = 10, SHORT_BYTES = 4 << 20 };

static int rank, world;

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static int by_value(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

static _Noreturn void fail(const char *why, const char *what) {
    fprintf(stderr, "rank %d of %d: %s: %s\n", rank, world, why, what);
    MPI_Abort(MPI_COMM_WORLD, 1);
    _Exit(1);
}

static MPI_Datatype type_of(const char *name, size_t *bytes) {
    if (!strcmp(name, "f32")) return *bytes = 4, MPI_FLOAT;
    if (!strcmp(name, "f64")) return *bytes = 8, MPI_DOUBLE;
    if (!strcmp(name, "i32")) return *bytes = 4, MPI_INT32_T;
    if (!strcmp(name, "i64")) return *bytes = 8, MPI_INT64_T;
    if (!strcmp(name, "u8")) return *bytes = 1, MPI_UINT8_T;
    fail("there is no such type", name);
}

static void put(void *data, const char *type, size_t at, unsigned value) {
    if (!strcmp(type, "f32")) ((float *)data)[at] = (float)value;
    else if (!strcmp(type, "f64")) ((double *)data)[at] = value;
    else if (!strcmp(type, "i32")) ((int32_t *)data)[at] = (int32_t)value;
    else if (!strcmp(type, "i64")) ((int64_t *)data)[at] = value;
    else ((uint8_t *)data)[at] = (uint8_t)value;
}

static unsigned get(const void *data, const char *type, size_t at) {
    if (!strcmp(type, "f32")) return (unsigned)((const float *)data)[at];
    if (!strcmp(type, "f64")) return (unsigned)((const double *)data)[at];
    if (!strcmp(type, "i32")) return (unsigned)((const int32_t *)data)[at];
    if (!strcmp(type, "i64")) return (unsigned)((const int64_t *)data)[at];
    return ((const uint8_t *)data)[at];
}

static uint64_t one_sum(void *data, int elements, MPI_Datatype type) {
    uint64_t began = now_ns();
    MPI_Allreduce(MPI_IN_PLACE, data, elements, type, MPI_SUM, MPI_COMM_WORLD);
    return now_ns() - began;
}

static void time_sums(const char *type_name, int elements, uint64_t budget_ms, uint64_t least, uint64_t most) {
    size_t bytes;
    MPI_Datatype type = type_of(type_name, &bytes);
    void *data = malloc(bytes * (size_t)elements);
    if (!data) fail("no memory for", type_name);
    for (size_t at = 0; at < (size_t)elements; at++)
        put(data, type_name, at, (unsigned)rank + 1 + at % DIFFERENT);
    one_sum(data, elements, type);
    for (size_t at = 0; at < (size_t)elements; at++) {
        unsigned sum = (unsigned)(world * (world + 1) / 2) + (unsigned)world * (at % DIFFERENT);
        if (get(data, type_name, at) != sum) fail("a wrong sum of", type_name);
    }
    memset(data, 0, bytes * (size_t)elements);

    uint64_t shortest = UINT64_MAX;
    int warm_up = bytes * (size_t)elements < SHORT_BYTES ? WARM_UP_SHORT : WARM_UP;
    for (int i = 0; i < warm_up; i++) {
        uint64_t took = one_sum(data, elements, type);
        if (took < shortest) shortest = took;
    }
    uint64_t calls = budget_ms * 1000000u / (shortest ? shortest : 1);
    calls = calls < least ? least : calls > most ? most : calls;
    MPI_Bcast(&calls, 1, MPI_UINT64_T, 0, MPI_COMM_WORLD);
    uint64_t *took = malloc(calls * sizeof *took);
    if (!took) fail("no memory for the times of", type_name);
    for (uint64_t i = 0; i < calls; i++) took[i] = one_sum(data, elements, type);
    qsort(took, calls, sizeof *took, by_value);
    double median = (double)took[(calls + 1) / 2 - 1] / 1e3, slowest;
    MPI_Reduce(&median, &slowest, 1, MPI_DOUBLE, MPI_MAX, 0, MPI_COMM_WORLD);
    if (rank == 0) {
        printf("{\"type\":\"%s\",\"elements\":%d,\"median_us\":%.4f}\n", type_name, elements, slowest);
        fflush(stdout);
    }
    free(took);
    free(data);
}

int main(int argc, char **argv) {
    /* A rank does not outlive the mpirun that started it. */
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &world);
    if (argc < 5) fail("wants", "BUDGET_MS CALLS_MIN CALLS_MAX TYPE:ELEMENTS...");
    uint64_t budget_ms = strtoull(argv[1], NULL, 10);
    uint64_t least = strtoull(argv[2], NULL, 10), most = strtoull(argv[3], NULL, 10);
    for (int i = 4; i < argc; i++) {
        char *elements = strchr(argv[i], ':');
        if (!elements) fail("is no TYPE:ELEMENTS", argv[i]);
        *elements++ = 0;
        time_sums(argv[i], atoi(elements), budget_ms, least, most);
    }
    MPI_Finalize();
    return 0;
}

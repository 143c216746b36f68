// The compiled CPU kernels of kvmosaic: every kernel once for each instruction set that the compiler knows, and the
// entry points that Python calls through ctypes (native.py). No -march: each function names its own target.

#include "native.h"

#define ISA_PLAIN 0
#define ISA_AVX2 1
#define ISA_AVX512 2
#define ISA_NEON 3
#if defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11 // older compilers do not know it
#define HAVE_AVXVNNI 1
#else
#define HAVE_AVXVNNI 0
#endif

#if defined(__x86_64__) && !defined(KVMOSAIC_PLAIN)
#include <immintrin.h>

#define VARIANT avx512vnni
#define VARIANT_ISA ISA_AVX512
#define LANES 16
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")))
#include "variant.h"

#if HAVE_AVXVNNI
#define VARIANT avxvnni
#define VARIANT_ISA ISA_AVX2
#define VARIANT_VNNI 1
#define LANES 8
#define TARGET __attribute__((target("avx2,fma,f16c,avxvnni")))
#include "variant.h"
#endif

#define VARIANT avx2
#define VARIANT_ISA ISA_AVX2
#define LANES 8
#define TARGET __attribute__((target("avx2,fma,f16c")))
#include "variant.h"

#elif defined(__aarch64__) && !defined(KVMOSAIC_PLAIN)
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif

#define VARIANT neon
#define VARIANT_ISA ISA_NEON
#define LANES 4
#define TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
#include "variant.h"
#endif

#define VARIANT plain
#define VARIANT_ISA ISA_PLAIN
#define LANES 4
#define TARGET
#include "variant.h"

static const struct variant {
    const char *name;
    void (*attend)(void *), (*encode)(void *);
} VARIANTS[] = {
#if defined(__x86_64__) && !defined(KVMOSAIC_PLAIN)
    {"avx512vnni", attend_body_avx512vnni, encode_body_avx512vnni},
#if HAVE_AVXVNNI
    {"avxvnni", attend_body_avxvnni, encode_body_avxvnni},
#endif
    {"avx2", attend_body_avx2, encode_body_avx2},
#elif defined(__aarch64__) && !defined(KVMOSAIC_PLAIN)
    {"neon", attend_body_neon, encode_body_neon},
#endif
    {"plain", attend_body_plain, encode_body_plain},
};
enum { VARIANT_COUNT = sizeof VARIANTS / sizeof *VARIANTS };

static const char *names[VARIANT_COUNT + 1];

// The variants that this CPU can run, best first; null ends the list.
const char *const *kvmosaic_variants(void) {
    int count = 0;
#if defined(__x86_64__) && !defined(KVMOSAIC_PLAIN)
    __builtin_cpu_init();
    const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (avx2 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"))
        names[count++] = "avx512vnni";
#if HAVE_AVXVNNI
    if (avx2 && __builtin_cpu_supports("avxvnni")) names[count++] = "avxvnni";
#endif
    if (avx2) names[count++] = "avx2";
#elif defined(__aarch64__) && !defined(KVMOSAIC_PLAIN)
#if defined(__linux__)
    if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) names[count++] = "neon";
#else
    names[count++] = "neon"; // every Apple machine of this architecture has the dot product
#endif
#endif
    names[count++] = "plain";
    names[count] = NULL;
    return names;
}

static const struct variant *variant_of(const char *name) {
    const struct variant *variant = VARIANTS;
    while (strcmp(variant->name, name)) variant++;
    return variant;
}

static void run(void (*body)(void *), void *data, parallel_fn *parallel, int64_t threads, int64_t tasks) {
    if (parallel && threads > 1 && tasks > 1) parallel(body, data, (unsigned)least_of(threads, tasks), 0);
    else body(data);
}

// Every count that indexes memory, so that no store, however it came about, is read outside its buffers.
static int lengths_fit(const struct attention *a, const struct lane *lane) {
    const int by_run = lane->codes && (lane->axis == CHANNEL ? !lane->group : lane->channel != NULL);
    for (int64_t head = 0; head < a->batch * a->heads; head++) {
        const int64_t coded = lane->coded[head], length = a->length[head];
        if (coded < 0 || coded > lane->room || length < 0 || length - coded > lane->ring_size) return 0;
        if (length > coded && lane->ring_room < lane->ring_size && length > lane->ring_room) return 0;
        if (coded && by_run && !lane->runs) return 0;
    }
    return 1;
}

// One list of pieces: whole units, cut along the tokens where there are too few of them to keep the threads busy.
static int64_t cut(const struct attention *a, int64_t tiles, struct piece *pieces, int64_t *parts) {
    enum { LEAST = 4 }; // blocks in a piece: less is not worth slicing the query again
    int64_t total = 0, count = 0;
    for (int64_t head = 0; head < a->batch * a->heads; head++)
        total += ceil_div(a->length[head] + a->fresh, BLOCK) * tiles;
    const int64_t target = a->threads > 1 ? most_of(LEAST, ceil_div(total, a->threads * 4)) : total + 1;
    *parts = 0;
    for (int64_t unit = 0; unit < a->batch * a->heads * tiles; unit++) {
        const int64_t blocks = ceil_div(a->length[unit / tiles] + a->fresh, BLOCK);
        const int64_t cuts = most_of(1, ceil_div(blocks, target));
        for (int64_t i = 0; i < cuts; i++, count++)
            if (pieces)
                pieces[count] = (struct piece){unit, blocks * i / cuts, blocks * (i + 1) / cuts,
                                               cuts > 1 ? (*parts)++ : -1};
    }
    return count;
}

// Joins the parts of each cut unit, in order: the exact merge of partial.py.
static void join(const struct attention_run *run) {
    const struct attention *a = run->a;
    const int64_t size = 2 + a->channels;
    for (int64_t i = 0, next; i < run->count; i = next) {
        for (next = i + 1; next < run->count && run->pieces[next].unit == run->pieces[i].unit; next++) {}
        if (run->pieces[i].part < 0) continue;
        const int64_t first = run->pieces[i].unit % run->tiles * ROWS, head = run->pieces[i].unit / run->tiles;
        for (int64_t r = 0; r < least_of(ROWS, a->rows - first); r++) {
            float *sum = run->partials + (run->pieces[i].part * ROWS + r) * size, top = sum[0];
            for (int64_t part = 1; part < next - i; part++) top = fmaxf(top, sum[part * ROWS * size]);
            for (int64_t part = 0; part < next - i; part++) {
                const float *own = sum + part * ROWS * size, fade = own[1] == 0 ? 0 : expf(own[0] - top);
                for (int64_t j = 1; j < size; j++) sum[j] = (part ? sum[j] : 0) + own[j] * fade;
            }
            finish_row(a, head * a->rows + first + r, top, sum[1], sum + 2);
        }
    }
}

// Affine's first pass: the least and the greatest logit of each row over all pieces of its unit.
static void find_ranges(struct attention_run *attend, void (*body)(void *)) {
    const struct attention *a = attend->a;
    for (int64_t i = 0; i < attend->count; i++)
        for (int r = 0; r < ROWS; r++) attend->ranges[i][0][r] = INFINITY, attend->ranges[i][1][r] = -INFINITY;
    attend->ranging = 1;
    run(body, attend, a->parallel, a->threads, attend->count);
    attend->ranging = 0;
    attend->next = 0;
    for (int64_t i = 1; i < attend->count; i++) { // the last piece of a unit gathers, then all of them take its range
        if (attend->pieces[i].unit != attend->pieces[i - 1].unit) continue;
        for (int r = 0; r < ROWS; r++) {
            attend->ranges[i][0][r] = fminf(attend->ranges[i][0][r], attend->ranges[i - 1][0][r]);
            attend->ranges[i][1][r] = fmaxf(attend->ranges[i][1][r], attend->ranges[i - 1][1][r]);
        }
    }
    for (int64_t i = attend->count - 1; i > 0; i--)
        if (attend->pieces[i].unit == attend->pieces[i - 1].unit)
            memcpy(attend->ranges[i - 1], attend->ranges[i], sizeof *attend->ranges);
}

int kvmosaic_attend(const char *variant, const struct attention *a) {
    if (!lengths_fit(a, &a->keys) || !lengths_fit(a, &a->values)) return BAD_LENGTHS;
    struct attention_run attend = {.a = a, .tiles = ceil_div(a->rows, ROWS)};
    int64_t parts;
    attend.count = cut(a, attend.tiles, NULL, &parts);
    attend.pieces = malloc(attend.count * sizeof *attend.pieces + 1);
    attend.ranges = a->affine ? malloc(attend.count * sizeof *attend.ranges + 1) : NULL;
    int result = attend.pieces && (attend.ranges || !a->affine) ? DONE : NO_MEMORY;
    if (result == DONE) {
        cut(a, attend.tiles, attend.pieces, &parts);
        attend.partials = malloc(parts * ROWS * (2 + a->channels) * sizeof(float) + 1);
        if (!attend.partials) result = NO_MEMORY;
    }
    if (result == DONE) {
        void (*body)(void *) = variant_of(variant)->attend;
        if (a->affine) find_ranges(&attend, body);
        run(body, &attend, a->parallel, a->threads, attend.count);
        join(&attend);
    }
    free(attend.pieces);
    free(attend.ranges);
    free(attend.partials);
    return result;
}

int kvmosaic_encode(const char *variant, const struct encoding *e) {
    int64_t tokens = 0;
    for (int64_t head = 0; head < e->batch * e->heads; head++) {
        const int64_t coded = e->lane.coded[head], count = e->count[head];
        if (coded < 0 || count < 0 || coded + count > e->lane.room) return BAD_LENGTHS;
        const int64_t unit = e->lane.axis == CHANNEL && e->lane.group ? e->lane.group : 1;
        if (coded % unit || count % unit) return BAD_LENGTHS;
        tokens += count;
    }
    enum { WORTH_THREADS = 1 << 15 }; // numbers: below it, starting threads takes longer
    struct encode_run encode = {.e = e};
    run(variant_of(variant)->encode, &encode, tokens * e->channels < WORTH_THREADS ? NULL : e->parallel, e->threads,
        e->batch * e->heads);
    return DONE;
}

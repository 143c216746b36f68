// Every kernel over random stores whose buffers are exactly as large as they must be, and every variant against the
// plain one: built by test_cpu_native.py, with the sanitizers and for other machines, which wants this to end quietly.

#include "native.c"

#include <pthread.h>
#include <stdio.h>

static uint64_t state = 1;

static int64_t draw(int64_t below) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (int64_t)((state >> 33) % (uint64_t)below);
}

static void *bytes(int64_t count) {
    uint8_t *x = malloc((size_t)count);
    for (int64_t i = 0; i < count; i++) x[i] = (uint8_t)draw(256);
    return x;
}

static int wild; // whether exact numbers and queries may not be finite: whole rows of the output are then NaN

// Numbers of [-1, 1], and now and then one that is not finite, where that `can` be.
static void *numbers(int64_t count, int number, int can) {
    float *x = malloc((size_t)count * 4);
    uint16_t *half = malloc((size_t)count * 2);
    for (int64_t i = 0; i < count; i++) {
        x[i] = (float)draw(2001) / 1000 - 1;
        if (wild && can && !draw(97)) x[i] = draw(2) ? NAN : INFINITY;
        half[i] = number == FLOAT16 ? half_of_float(x[i]) : (uint16_t)(bits_of_float(x[i]) >> 16);
    }
    free(number == FLOAT32 ? (void *)half : (void *)x);
    return number == FLOAT32 ? (void *)x : (void *)half;
}

static void two_threads(void (*body)(void *), void *data, unsigned threads, unsigned flags) {
    (void)threads, (void)flags;
    pthread_t other;
    pthread_create(&other, NULL, (void *(*)(void *))(void *)body, data);
    body(data);
    pthread_join(other, NULL);
}

static struct lane random_lane(int64_t heads, int64_t channels, int64_t *length, int role, int number) {
    struct lane lane = {.role = role, .number = number, .axis = (int32_t)draw(2), .bits = 1 << draw(4)};
    // in keys of one bit a group of channels is 32 at least (cpu.py)
    const int64_t groups[] = {0, 32, 64, lane.bits == 1 ? 32 : 16}, group = groups[draw(4)];
    int64_t most = 0;
    for (int64_t head = 0; head < heads; head++) most = most_of(most, length[head]);
    lane.group = lane.axis == CHANNEL ? group : group && channels % group == 0 ? group : channels;
    lane.runs = lane.axis == CHANNEL && lane.group ? 0 : 1 + draw(3);
    int64_t *coded = malloc((size_t)heads * 8), *starts = malloc((size_t)(heads * lane.runs) * 8);
    lane.ring_size = draw(200);
    for (int64_t head = 0; head < heads; head++) {
        coded[head] = most_of(0, length[head] - lane.ring_size);
        if (lane.axis == CHANNEL && lane.group) {
            coded[head] = ceil_div(coded[head], lane.group) * lane.group;
            length[head] = most_of(length[head], coded[head]);
        }
        lane.room = most_of(lane.room, coded[head]);
        for (int64_t run = 0; run < lane.runs; run++) starts[head * lane.runs + run] = run * coded[head] / (lane.runs + 1);
    }
    lane.coded = coded, lane.starts = starts;
    lane.ring_room = lane.ring_size;
    lane.ring = numbers(heads * lane.ring_room * channels, number, 1);
    lane.blocks = ceil_div(lane.room, BLOCK);
    if (!draw(4)) {
        lane.blocks = lane.room;
        lane.numbers = numbers(heads * lane.room * channels, number, 0);
        return lane;
    }
    lane.rotation = draw(3) ? NULL : numbers(channels * channels, FLOAT32, 0);
    if (!draw(3)) { // Sphere
        lane.bits = 1 + (int32_t)draw(4), lane.axis = TOKEN, lane.group = channels, lane.entries = lane.room;
        lane.codes = bytes(heads * lane.blocks * block_bytes(channels, lane.bits == 3 ? 2 : lane.bits));
        if (lane.bits == 3) lane.top = bytes(heads * lane.blocks * block_bytes(channels, 1));
        int8_t *levels = bytes(1 << lane.bits);
        for (int i = 0; i < 1 << lane.bits; i++) levels[i] = (int8_t)(levels[i] % LIFT);
        lane.levels = levels;
        lane.scale = numbers(heads * lane.entries, FLOAT16, 0);
        return lane;
    }
    lane.codes = bytes(heads * lane.blocks * block_bytes(channels, lane.bits));
    lane.entries = lane.axis == TOKEN ? lane.room : lane.group ? ceil_div(lane.room, lane.group) : lane.runs;
    const int64_t width = lane.axis == TOKEN ? channels / lane.group : channels;
    lane.scale = numbers(heads * lane.entries * width, FLOAT16, 0);
    lane.low = numbers(heads * lane.entries * width, FLOAT16, 0);
    if (lane.axis == TOKEN && draw(2)) lane.channel = numbers(heads * lane.runs * channels, FLOAT16, 0);
    return lane;
}

static void free_lane(struct lane *lane) {
    free(lane->top), free((void *)lane->levels), free((void *)lane->rotation);
    free(lane->codes), free((void *)lane->numbers), free(lane->scale), free(lane->low), free(lane->channel);
    free((void *)lane->coded), free((void *)lane->starts), free((void *)lane->ring);
}

static struct exact random_tokens(int64_t heads, int64_t tokens, int64_t channels, int number) {
    return (struct exact){numbers(heads * tokens * channels, number, 0), heads * tokens * channels, tokens * channels,
                          channels, number};
}

// What a kernel wrote: attention's outputs, or a lane's codes and scales.
struct outcome {
    int result;
    int64_t count;
    float *numbers;
};

static struct outcome attend_once(const char *variant) {
    const int64_t sizes[] = {16, 64, 80, 96, 128, 256}, channels = sizes[draw(6)], heads = 1 + draw(3);
    const int number = (int)draw(3);
    int64_t *length = malloc((size_t)heads * 8);
    wild = !draw(4);
    for (int64_t head = 0; head < heads; head++) length[head] = draw(4) ? draw(700) : 0;
    struct attention a = {.batch = 1, .heads = heads, .rows = 1 + draw(18), .channels = channels, .fresh = draw(3)};
    a.keys = random_lane(heads, channels, length, KEYS, number);
    a.values = random_lane(heads, channels, length, VALUES, number);
    for (int64_t head = 0; head < heads; head++) // where the values' lane came out longer than the keys'
        length[head] = least_of(length[head], a.keys.coded[head] + a.keys.ring_size);
    a.fresh_keys = random_tokens(heads, a.fresh, channels, number);
    a.fresh_values = random_tokens(heads, a.fresh, channels, number);
    a.length = length;
    a.query = numbers(heads * a.rows * channels, FLOAT32, 1);
    a.out = malloc((size_t)(heads * a.rows * channels) * 4), a.lse = malloc((size_t)(heads * a.rows) * 4);
    a.parallel = draw(2) ? two_threads : NULL, a.threads = 2;
    a.scale = 0.1f, a.softcap = draw(2) ? 20 : 0, a.affine = (int32_t)draw(2), a.affine_high = 3;
    const int result = kvmosaic_attend(variant, &a);
    free_lane(&a.keys), free_lane(&a.values), free(length), free((void *)a.query), free(a.lse);
    free((void *)a.fresh_keys.start), free((void *)a.fresh_values.start);
    return (struct outcome){result, heads * a.rows * channels, a.out};
}

static struct outcome encode_once(const char *variant) {
    const int64_t sizes[] = {16, 64, 80, 96, 128, 256}, channels = sizes[draw(6)], heads = 1 + draw(3);
    int64_t *length = malloc((size_t)heads * 8), *count = malloc((size_t)heads * 8), most = 0;
    for (int64_t head = 0; head < heads; head++) length[head] = 500;
    struct encoding e = {.batch = 1, .heads = heads, .channels = channels};
    do e.lane = random_lane(heads, channels, length, (int)draw(2), FLOAT32);
    while (!e.lane.codes && (free_lane(&e.lane), 1));
    for (int64_t head = 0; head < heads; head++) {
        const int64_t unit = e.lane.axis == CHANNEL && e.lane.group ? e.lane.group : 1;
        ((int64_t *)e.lane.coded)[head] = draw(e.lane.room / unit + 1) * unit;
        count[head] = draw((e.lane.room - e.lane.coded[head]) / unit + 1) * unit;
        most = most_of(most, count[head]);
    }
    e.x = random_tokens(heads, most, channels, (int)draw(3));
    float *clip = numbers(heads, FLOAT32, 0);
    e.unit = 0.1f, e.keep = (int32_t)draw(4);
    e.count = count, e.clip = draw(2) ? clip : NULL, e.about_center = (int32_t)draw(2);
    e.parallel = draw(2) ? two_threads : NULL, e.threads = 2;
    const int result = kvmosaic_encode(variant, &e);
    // sums over a token may differ in their last bits, and a code with them: only without them everything is the same
    const int64_t size = heads * e.lane.blocks * block_bytes(channels, e.lane.bits);
    struct outcome outcome = {result, e.lane.levels || e.lane.rotation ? 0 : size, malloc((size_t)size * 4)};
    for (int64_t i = 0; i < outcome.count; i++) outcome.numbers[i] = e.lane.codes[i];
    free_lane(&e.lane), free(length), free(count), free(clip), free((void *)e.x.start);
    return outcome;
}

// The difference from plain, where both are finite, as a share of plain's numbers or of 1, whichever are greater; -1 if a
// kernel refused. The same case for both.
static double apart(struct outcome (*once)(const char *), const char *variant, uint64_t seed) {
    state = seed;
    const struct outcome ours = once(variant);
    state = seed;
    const struct outcome plain = once("plain");
    double sum = 0, all = (double)most_of(plain.count, 1);
    for (int64_t i = 0; i < plain.count; i++) {
        const double difference = ours.numbers[i] - plain.numbers[i];
        if (!isfinite(difference)) continue;
        sum += difference * difference, all += plain.numbers[i] * plain.numbers[i];
    }
    free(ours.numbers), free(plain.numbers);
    return ours.result == DONE && plain.result == DONE ? sqrt(sum / all) : -1;
}

int main(void) {
    for (const char *const *variant = kvmosaic_variants(); *variant; variant++)
        for (int i = 0; i < 60; i++) {
            const double attended = apart(attend_once, *variant, 2 * i), encoded = apart(encode_once, *variant, 2 * i + 1);
            if (attended >= 0 && attended < 1e-4 && encoded == 0) continue;
            printf("%s, case %d: attention is %g from plain, codes are %g\n", *variant, i, attended, encoded);
            return 1;
        }
    return 0;
}

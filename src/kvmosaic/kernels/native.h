// What Python passes to the compiled CPU kernels (the same structs, field by field, are in native.py), and the few
// scalar helpers that need no vector. All tensors are contiguous unless strides come with them.
#ifndef KVMOSAIC_NATIVE_H
#define KVMOSAIC_NATIVE_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { BLOCK = 128 };         // tokens in a block, as in layout.py
enum { MOST_CHANNELS = 256 }; // greatest head size, padded to a multiple of 32

enum number { FLOAT32, BFLOAT16, FLOAT16 };
enum axis { CHANNEL, TOKEN };
enum role { KEYS, VALUES };
enum keep { NORM, MATCHED, UNBIASED, LEAST }; // what Sphere's scale keeps
enum { LIFT = 64 };                            // added to levels that are looked up, so that they are positive
enum result { DONE, BAD_LENGTHS, NO_MEMORY };

// Starts `body(data)` on `threads` threads and waits for them: GOMP_parallel of the OpenMP runtime that torch has
// loaded, so that torch and these kernels share one pool of threads.
typedef void parallel_fn(void (*body)(void *), void *data, unsigned threads, unsigned flags);

struct lane {
    uint8_t *codes;         // [B, H, blocks, bytes] packed, or null: `numbers` holds exact tokens
    uint8_t *top;           // three bits: the third, packed by itself; `codes` has the two others
    const int8_t *levels;   // Sphere: [2**bits] what the codes stand for, in scales of a token. Null = Uniform
    const float *rotation;  // [D, D]: what is coded is x @ rotation (rotate.h). Null = x itself
    const void *numbers;    // [B, H, room, D]
    uint16_t *scale, *low;  // float16 [B, H, entries, width]; Sphere has no low
    uint16_t *channel;      // float16 [B, H, runs, D], or null
    const int64_t *coded;   // [B, H] slots that are encoded
    const int64_t *starts;  // [B, H, runs], first slot of each run
    const void *ring;       // [B, H, ring_room, D], slot s at s % ring_size
    int64_t room;           // slots that every part has space for
    int64_t blocks;         // codes: blocks of a head in memory; exact numbers: tokens
    int64_t entries, runs, ring_room, ring_size;
    int64_t group;          // axis CHANNEL: tokens that share a range, 0 = a run; TOKEN: channels that share one
    int32_t bits, axis, number, role;
};

struct exact { // tokens as they are, any strides but the last
    const void *start;
    int64_t batch_stride, head_stride, token_stride; // in numbers
    int32_t number;
};

struct attention {
    struct lane keys, values;
    struct exact fresh_keys, fresh_values;
    const int64_t *length; // [B, H]
    const float *query;    // [B, H, rows, D]
    float *out, *lse;      // [B, H, rows, D], [B, H, rows]
    parallel_fn *parallel; // null = one thread
    int64_t batch, heads, rows, channels, fresh;
    float scale, softcap; // softcap 0 = none
    float affine_low, affine_high;
    int32_t affine, official, threads;
};

struct encoding {
    struct lane lane;
    struct exact x;
    const int64_t *count;  // [B, H] tokens to encode, into the slots after `coded`
    const float *clip;     // [H]
    parallel_fn *parallel; // null = one thread
    int64_t batch, heads, channels;
    float unit; // Sphere: of its levels, for a token of length 1
    int32_t about_center, keep, threads;
};

static inline int64_t least_of(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most_of(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t padded(int64_t channels) { return ceil_div(channels, 32) * 32; }
static inline int looks_up(const struct lane *lane) { return lane->levels && lane->bits > 2; }
static inline int64_t block_bytes(int64_t channels, int bits) { return BLOCK * padded(channels) * bits / 8; }

static inline float float_of_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline uint32_t bits_of_float(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float float_of_half(uint16_t half) {
    const uint32_t magnitude = half & 0x7fff, sign = (uint32_t)(half & 0x8000) << 16;
    if (magnitude >= 0x7c00) return float_of_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    return float_of_bits(sign | bits_of_float(float_of_bits(magnitude << 13) * 0x1p112f)); // exact, subnormals too
}

// Round to nearest, ties to even, as torch's .to(float16); too large becomes infinity.
static inline uint16_t half_of_float(float x) {
    const uint32_t bits = bits_of_float(x), magnitude = bits & 0x7fffffff, sign = bits >> 16 & 0x8000;
    if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
    if (magnitude < 0x38800000) // subnormal: the sum's last bits are the result, rounded by the addition itself
        return (uint16_t)(sign | (bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000));
    return (uint16_t)(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13));
}

#endif

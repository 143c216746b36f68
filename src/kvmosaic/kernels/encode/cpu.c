// Encoding, packing and writing into a store's blocks in one pass, on a CPU. The codecs are the specification. Of
// Uniform parameters and codes are the same bit by bit, so nothing there may be reassociated or fused; sums over a token
// (Sphere's length, rotations) may differ in their last bits.
//
// A KV head of a sequence is one task: its tokens are read twice (range, then codes), and nobody else writes its bytes.
// The numbers are finite and fit float16: the store has looked (LaneBytes.check).
//
// This file is compiled once for each instruction set: native.c includes it under different names.

#ifndef KVMOSAIC_ENCODE
#define KVMOSAIC_ENCODE

struct encode_run {
    const struct encoding *e;
    int64_t next;
};

// Parameters of a group of numbers as stored and as used: codes are round((x - low) / step), at most `most`.
struct range {
    uint16_t low_half, scale_half;
    float low, step, most;
};

static inline struct range range_of(float low, float high, const float *clip, int about_center, int bits) {
    const float most = (float)((1 << bits) - 1);
    if (clip && about_center) {
        const float middle = (low + high) / 2, half = (high - low) / 2, part = *clip * half;
        low = middle - part, high = middle + part;
    } else if (clip) {
        low *= *clip, high *= *clip;
    }
    struct range range = {.low_half = half_of_float(low)};
    range.low = float_of_half(range.low_half);
    const float scale = (high - range.low) / most;
    range.scale_half = half_of_float(scale < 0 ? 0 : scale);
    range.step = float_of_half(range.scale_half);
    range.most = range.step > 0 ? most : 0; // equal numbers: code 0, and no division by zero
    if (!(range.step > 0)) range.step = 1;
    return range;
}

// Codes of tokens [first, last) of a block, [token][channel], into the block's bytes: the layout of layout.py.
#define PACK(bits)                                                                                                     \
    static void pack_keys_##bits(const uint8_t (*codes)[MOST_CHANNELS], int64_t width, int64_t first, int64_t last,    \
                                 uint8_t *block) {                                                                     \
        for (int64_t v = 0; v < width * (bits) / 32; v++)                                                              \
            for (int64_t t = first; t < last; t++) {                                                                   \
                uint32_t packed = 0, four;                                                                             \
                for (int plane = 0; plane < 8 / (bits); plane++) {                                                     \
                    memcpy(&four, codes[t] + (v * (8 / (bits)) + plane) * 4, 4);                                       \
                    packed |= four << (plane * (bits));                                                                \
                }                                                                                                      \
                memcpy(block + (v * BLOCK + t) * 4, &packed, 4);                                                       \
            }                                                                                                          \
    }
PACK(1) PACK(2) PACK(4) PACK(8)
#undef PACK

#endif

// Four tokens share a word of values, so the bits of the other tokens stay as they are.
FN void NAME(pack_values)(const uint8_t (*codes)[MOST_CHANNELS], int64_t width, int64_t first, int64_t last,
                          uint8_t *block, int bits) {
    const int planes = 8 / bits;
    for (int64_t quad = first / 4; quad * 4 < last; quad++) {
        const int shift = (int)(quad % planes) * bits;
        uint32_t own = 0;
        for (int64_t t = most_of(first, quad * 4); t < least_of(last, quad * 4 + 4); t++)
            own |= ((1u << bits) - 1) << (t % 4 * 8 + shift);
        const uint8_t(*four)[MOST_CHANNELS] = codes + quad * 4;
        uint8_t *to = block + quad / planes * width * 4;
        for (int64_t d = 0; d < width; d++) {
            uint32_t old;
            memcpy(&old, to + d * 4, 4);
            const uint32_t new = (uint32_t)four[0][d] | (uint32_t)four[1][d] << 8 | (uint32_t)four[2][d] << 16 |
                                 (uint32_t)four[3][d] << 24;
            old = (old & ~own) | (new << shift & own);
            memcpy(to + d * 4, &old, 4);
        }
    }
}

FN void NAME(pack_plane)(int role, int64_t width, const uint8_t (*codes)[MOST_CHANNELS], int64_t first, int64_t last,
                         uint8_t *to, int bits) {
    if (role == VALUES) NAME(pack_values)(codes, width, first, last, to, bits);
    else if (bits == 1) pack_keys_1(codes, width, first, last, to);
    else if (bits == 2) pack_keys_2(codes, width, first, last, to);
    else if (bits == 4) pack_keys_4(codes, width, first, last, to);
    else pack_keys_8(codes, width, first, last, to);
}

// Puts codes of tokens [first, last) of a block into its bytes.
FN void NAME(pack)(const struct encoding *e, int64_t head, int64_t block, const uint8_t (*codes)[MOST_CHANNELS],
                   int64_t first, int64_t last) {
    const struct lane *lane = &e->lane;
    const int64_t index = head * lane->blocks + block, width = padded(e->channels);
    if (lane->bits != 3) {
        uint8_t *to = lane->codes + index * block_bytes(e->channels, lane->bits);
        NAME(pack_plane)(lane->role, width, codes, first, last, to, lane->bits);
        return;
    }
    uint8_t plane[BLOCK][MOST_CHANNELS];
    for (int64_t t = first / 4 * 4; t < ceil_div(last, 4) * 4; t++)
        for (int64_t d = 0; d < width; d++) plane[t][d] = codes[t][d] & 3;
    NAME(pack_plane)(lane->role, width, plane, first, last, lane->codes + index * block_bytes(e->channels, 2), 2);
    for (int64_t t = first / 4 * 4; t < ceil_div(last, 4) * 4; t++)
        for (int64_t d = 0; d < width; d++) plane[t][d] = codes[t][d] >> 2;
    NAME(pack_plane)(lane->role, width, plane, first, last, lane->top + index * block_bytes(e->channels, 1), 1);
}

INLINE void NAME(load_row_of)(const void *x, int64_t at, int64_t channels, float *row, const int number) {
    int64_t d = 0;
    for (; d + LANES <= channels; d += LANES) NAME(store)(row + d, NAME(load_numbers)(x, at + d, number));
    for (; d < channels; d++) row[d] = NAME(load_number)(x, at + d, number);
}

// One token of a head as float32, rotated if the lane is, each channel divided by `channel` if given.
FN void NAME(load_row)(const struct encoding *e, int64_t head, int64_t token, const float *channel, float *row) {
    const struct exact *x = &e->x;
    const int64_t at = head / e->heads * x->batch_stride + head % e->heads * x->head_stride + token * x->token_stride;
    if (x->number == FLOAT32) NAME(load_row_of)(x->start, at, e->channels, row, FLOAT32);
    else if (x->number == BFLOAT16) NAME(load_row_of)(x->start, at, e->channels, row, BFLOAT16);
    else NAME(load_row_of)(x->start, at, e->channels, row, FLOAT16);
    if (e->lane.rotation) NAME(rotate)(e->lane.rotation, e->channels, row);
    for (int64_t d = 0; channel && d < padded(e->channels); d += LANES)
        NAME(store)(row + d, NAME(load)(row + d) / NAME(load)(channel + d));
}

INLINE void NAME(quantize)(const float *x, floats low, floats step, floats most, uint8_t *codes) {
    const floats code = NAME(lesser)(NAME(greater)((NAME(load)(x) - low) / step, (floats){0}), most);
    NAME(store_bytes)(codes, (words)(code + ROUNDER));
}

// Tokens [from, to) of x share a range in each channel, written at `entry`.
FN void NAME(encode_channels)(const struct encoding *e, int64_t head, int64_t from, int64_t to, int64_t entry,
                             uint8_t (*codes)[MOST_CHANNELS]) {
    const struct lane *lane = &e->lane;
    const int64_t channels = e->channels, width = padded(channels), at = (head * lane->entries + entry) * channels;
    const float *clip = e->clip ? e->clip + head % e->heads : NULL;
    float row[MOST_CHANNELS] = {0}, low[MOST_CHANNELS], high[MOST_CHANNELS], step[MOST_CHANNELS], most[MOST_CHANNELS];
    for (int64_t d = 0; d < width; d++) low[d] = INFINITY, high[d] = -INFINITY;
    for (int64_t t = from; t < to; t++) {
        NAME(load_row)(e, head, t, NULL, row);
        for (int64_t d = 0; d < width; d += LANES) {
            const floats x = NAME(load)(row + d);
            NAME(store)(low + d, NAME(lesser)(NAME(load)(low + d), x));
            NAME(store)(high + d, NAME(greater)(NAME(load)(high + d), x));
        }
    }
    for (int64_t d = 0; d < width; d++) {
        const struct range range = range_of(low[d], high[d], clip, e->about_center, lane->bits);
        low[d] = range.low, step[d] = range.step, most[d] = range.most;
        if (d >= channels) continue;
        lane->low[at + d] = range.low_half, lane->scale[at + d] = range.scale_half;
    }
    const int64_t start = lane->coded[head]; // the slot of x's first token
    for (int64_t slot = start + from, end; slot < start + to; slot = end) {
        const int64_t base = slot / BLOCK * BLOCK;
        end = least_of(base + BLOCK, start + to);
        for (int64_t s = slot; s < end; s++) {
            NAME(load_row)(e, head, s - start, NULL, row);
            for (int64_t d = 0; d < width; d += LANES)
                NAME(quantize)(row + d, NAME(load)(low + d), NAME(load)(step + d), NAME(load)(most + d),
                               codes[s - base] + d);
        }
        NAME(pack)(e, head, base / BLOCK, (const uint8_t(*)[MOST_CHANNELS])codes, slot - base, end - base);
    }
}

// Equalize: the square root of each channel's greatest magnitude over the run, as stored; 1 for a channel of zeros.
FN void NAME(encode_factors)(const struct encoding *e, int64_t head, int64_t tokens, float *channel) {
    const int64_t channels = e->channels, width = padded(channels);
    float row[MOST_CHANNELS] = {0};
    for (int64_t d = 0; d < width; d++) channel[d] = 0;
    for (int64_t t = 0; t < tokens; t++) {
        NAME(load_row)(e, head, t, NULL, row);
        for (int64_t d = 0; d < width; d += LANES) {
            const floats x = NAME(load)(row + d);
            NAME(store)(channel + d, NAME(greater)(NAME(load)(channel + d), NAME(greater)(x, -x)));
        }
    }
    uint16_t *stored = e->lane.channel + (head * e->lane.runs + e->lane.runs - 1) * channels;
    for (int64_t d = 0; d < width; d++) {
        const uint16_t half = half_of_float(channel[d] > 0 ? sqrtf(channel[d]) : 1);
        channel[d] = float_of_half(half);
        if (d < channels) stored[d] = half;
    }
}

// Each token has a range of its own in each group of channels.
FN void NAME(encode_tokens)(const struct encoding *e, int64_t head, int64_t tokens, uint8_t (*codes)[MOST_CHANNELS]) {
    const struct lane *lane = &e->lane;
    const int64_t channels = e->channels, group = lane->group, groups = channels / group;
    const float *clip = e->clip ? e->clip + head % e->heads : NULL;
    float row[MOST_CHANNELS] = {0}, factors[MOST_CHANNELS], *channel = NULL;
    if (lane->channel) NAME(encode_factors)(e, head, tokens, channel = factors);
    const int64_t start = lane->coded[head];
    for (int64_t slot = start, end; slot < start + tokens; slot = end) {
        const int64_t base = slot / BLOCK * BLOCK;
        end = least_of(base + BLOCK, start + tokens);
        for (int64_t s = slot; s < end; s++) {
            NAME(load_row)(e, head, s - start, channel, row);
            for (int64_t g = 0; g < groups; g++) {
                const float *x = row + g * group;
                floats lows = NAME(all)(INFINITY), highs = NAME(all)(-INFINITY);
                int64_t d = 0;
                for (; d + LANES <= group; d += LANES) {
                    const floats v = NAME(load)(x + d);
                    lows = NAME(lesser)(lows, v), highs = NAME(greater)(highs, v);
                }
                float low = -NAME(greatest)(-lows), high = NAME(greatest)(highs);
                for (; d < group; d++) low = fminf(low, x[d]), high = fmaxf(high, x[d]);
                const struct range range = range_of(low, high, clip, e->about_center, lane->bits);
                const int64_t at = (head * lane->entries + s) * groups + g;
                lane->low[at] = range.low_half, lane->scale[at] = range.scale_half;
                // the last vector may pass the group: the next group, or zeroing the padding, puts that right
                for (d = 0; d < group; d += LANES)
                    NAME(quantize)(x + d, NAME(all)(range.low), NAME(all)(range.step), NAME(all)(range.most),
                                   codes[s - base] + g * group + d);
            }
            memset(codes[s - base] + channels, 0, padded(channels) - channels);
        }
        NAME(pack)(e, head, base / BLOCK, (const uint8_t(*)[MOST_CHANNELS])codes, slot - base, end - base);
    }
}

// Each number to the nearest of the levels, for a length of the token that makes these the best ones.
FN void NAME(encode_sphere)(const struct encoding *e, int64_t head, int64_t tokens, uint8_t (*codes)[MOST_CHANNELS]) {
    const struct lane *lane = &e->lane;
    const int64_t channels = e->channels, width = padded(channels), start = lane->coded[head];
    const int edges = (1 << lane->bits) - 1;
    float row[MOST_CHANNELS] = {0}, inside[MOST_CHANNELS];
    for (int64_t d = 0; d < width; d++) inside[d] = d < channels;
    for (int64_t slot = start, end; slot < start + tokens; slot = end) {
        const int64_t base = slot / BLOCK * BLOCK;
        end = least_of(base + BLOCK, start + tokens);
        for (int64_t s = slot; s < end; s++) {
            NAME(load_row)(e, head, s - start, NULL, row);
            floats squares = {0}, along = {0}, energy = {0};
            for (int64_t d = 0; d < width; d += LANES)
                squares = NAME(fma)(NAME(load)(row + d), NAME(load)(row + d), squares);
            const float length = sqrtf(NAME(sum)(squares)), norm = length * e->unit;
            for (int64_t d = 0; d < width; d += LANES) {
                const floats x = NAME(load)(row + d);
                floats level = NAME(all)(lane->levels[0]);
                ints code = {0};
                for (int i = 0; i < edges; i++) {
                    const float below = lane->levels[i], above = lane->levels[i + 1];
                    const ints passed = x > (below + above) / 2 * norm;
                    code -= passed;
                    level += (floats)((ints)NAME(all)(above - below) & passed);
                }
                level *= NAME(load)(inside + d);
                along = NAME(fma)(level, x, along);
                energy = NAME(fma)(level, level, energy);
                NAME(store_bytes)(codes[s - base] + d, (words)code);
            }
            memset(codes[s - base] + channels, 0, width - channels);
            const float inner = NAME(sum)(along), square = NAME(sum)(energy);
            const float scale = e->keep == NORM       ? norm
                                : e->keep == MATCHED  ? length / sqrtf(square)
                                : e->keep == UNBIASED ? length * length / fmaxf(inner, 1e-30f)
                                                      : inner / square;
            lane->scale[head * lane->entries + s] = half_of_float(scale);
        }
        NAME(pack)(e, head, base / BLOCK, (const uint8_t(*)[MOST_CHANNELS])codes, slot - base, end - base);
    }
}

FN void NAME(encode_body)(void *data) {
    struct encode_run *run = data;
    const struct encoding *e = run->e;
    const struct lane *lane = &e->lane;
    uint8_t codes[BLOCK][MOST_CHANNELS] = {{0}};
    for (int64_t head; (head = __atomic_fetch_add(&run->next, 1, __ATOMIC_RELAXED)) < e->batch * e->heads;) {
        const int64_t tokens = e->count[head];
        if (lane->levels) NAME(encode_sphere)(e, head, tokens, codes);
        else if (lane->axis == TOKEN) NAME(encode_tokens)(e, head, tokens, codes);
        else if (!lane->group && tokens) NAME(encode_channels)(e, head, 0, tokens, lane->runs - 1, codes);
        for (int64_t t = 0; lane->axis == CHANNEL && lane->group && t < tokens; t += lane->group)
            NAME(encode_channels)(e, head, t, t + lane->group, (lane->coded[head] + t) / lane->group, codes);
    }
}

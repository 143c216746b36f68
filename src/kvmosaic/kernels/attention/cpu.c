// Attention of a step's queries over one coded store, on a CPU. The specification is reference.py; the algebra:
//
//   a coded number is x[t, d] = scale * code[t, d] + low, its scale shared by tokens (axis CHANNEL) or by channels
//   (Sphere: code or a small integer that it stands for, moved so that it is positive; low follows from the scale)
//   logits   q . x[t] = (q * scale) . code[t] + q . low         the scale moves to the query
//   output   sum p x  = (sum (p * scale) code) + (sum p low)    or to the probabilities, or to the output
//
// so both products are of codes as they lie in memory (unsigned bytes) with a float vector that is known beforehand.
// That vector is written as 15-bit integers in two signed bytes, high and low, and a vector instruction multiplies
// bytes and sums four products at once. Sums of integers are exact; floats only meet between blocks of 128 tokens.
//
// Layout "dots" (layout.py) is one for both sides, [vector][lane][4 codes of the depth]: lanes are what a product
// keeps (keys: tokens, values: channels), the depth is what it sums over. Hence one function, `multiply`, does both.
//
// This file is compiled once for each instruction set: native.c includes it under different names.

#ifndef KVMOSAIC_ATTENTION
#define KVMOSAIC_ATTENTION

enum { ROWS = 16 };              // query rows that go over the codes together
enum { MOST_GROUPS = MOST_CHANNELS / 16 }; // axis TOKEN: a channel group is 16 channels at least (cpu.py asks for it)
enum { EDGE = 32 };              // a vector's depth and SPAN vectors of lanes are at most this, and divide it
enum { SLICE_MOST = 127 * 256 }; // greatest integer that splits into two signed bytes
#define NEGLIGIBLE 1e-30f        // a vector below it counts as zero: its inverse would overflow

// Some blocks of one unit. A unit is a KV head of a sequence and up to ROWS of its query rows.
struct piece {
    int64_t unit, first, last; // blocks [first, last)
    int64_t part;              // its place in `partials`, -1: it is the whole unit
};

struct attention_run {
    const struct attention *a;
    struct piece *pieces;
    int64_t count, next, tiles; // tiles: units of a head
    float *partials;            // [parts][ROWS][2 + D]: top, mass, mixed
    float (*ranges)[2][ROWS];   // Affine: least and greatest logit of each row, by piece; null = none
    int ranging;                // the pass that finds them
};

// A float vector for each row as two slices of signed bytes: x is about worth * (256 * high + low).
struct slices {
    int8_t bytes[ROWS][MOST_CHANNELS * 2]; // of each four numbers the high bytes, then the low ones
};
// What comes with the slices of a group: what 1 is worth, the product with another vector, and the mean rounding, to be
// taken off.
struct sliced {
    float worth[ROWS], product[ROWS], correction[ROWS];
};

// A block's codes. `ahead`: how far two blocks are, in bytes for each bit of a code.
struct packed {
    const uint8_t *codes, *top, *operands;
    int64_t lanes, ahead;
};

// What one thread holds of one piece.
struct work {
    const struct attention *a;
    int64_t head, rows, length, total; // length: tokens in the store, total: with the fresh ones
    const float (*range)[ROWS];
    float query[ROWS][MOST_CHANNELS]; // times the logits' scale; zero from `channels` on
    float rotated[ROWS][MOST_CHANNELS]; // the same for keys that are coded rotated
    uint8_t operands[2][16];            // by role: what levels are looked up to
    float poison[ROWS];               // 0, or NaN where the row's query is not finite
    struct slices query_slices;       // of the query times the scales of entry `sliced_entry`, -1 = none yet
    int64_t sliced_entry;
    struct sliced query_groups[MOST_GROUPS]; // product: q . low (axis CHANNEL), sum q (TOKEN: times low[t])
    float logits[ROWS][BLOCK];         // then probabilities
    uint16_t token_scale[MOST_GROUPS * BLOCK], token_low[MOST_GROUPS * BLOCK]; // axis TOKEN: [channel group][token]
    float top[ROWS], mass[ROWS];       // so far: greatest logit, sum of probabilities relative to it
    float mixed[ROWS][MOST_CHANNELS];  // and of values weighted by them
    float turned[ROWS][MOST_CHANNELS]; // the part of coded values, if these are rotated
};

static const float ONES[MOST_CHANNELS] = {[0 ... MOST_CHANNELS - 1] = 1};

static int64_t entry_of(const struct lane *lane, int64_t head, int64_t slot, int64_t *end) {
    if (lane->axis == CHANNEL && lane->group) {
        *end = (slot / lane->group + 1) * lane->group;
        return slot / lane->group;
    }
    const int64_t *starts = lane->starts + head * lane->runs;
    int64_t run = 0;
    while (run + 1 < lane->runs && starts[run + 1] <= slot) run++;
    *end = run + 1 < lane->runs ? starts[run + 1] : INT64_MAX;
    return run;
}

// Writes a row's result from what was summed.
static void finish_row(const struct attention *a, int64_t row, float top, float mass, const float *mixed) {
    for (int64_t d = 0; d < a->channels; d++) a->out[row * a->channels + d] = mass == 0 ? 0 : mixed[d] / mass;
    a->lse[row] = mass == 0 ? -INFINITY : top + logf(mass);
}

// The middle of a code's operands in the products, and what an operand's step is worth in scales.
static float middle_of(const struct lane *lane) { return looks_up(lane) ? LIFT : ((1 << lane->bits) - 1) / 2.0f; }
static float step_of(const struct lane *lane) { return lane->levels && lane->bits <= 2 ? 2 : 1; }

static struct packed packed_of(const struct work *w, const struct lane *lane, int64_t block) {
    const int64_t channels = w->a->channels, index = w->head * lane->blocks + block;
    const int low = lane->bits == 3 ? 2 : lane->bits;
    return (struct packed){lane->codes + index * block_bytes(channels, low),
                           lane->top ? lane->top + index * block_bytes(channels, 1) : NULL, w->operands[lane->role],
                           lane->role == KEYS ? BLOCK : padded(channels), 2 * block_bytes(channels, 1)};
}

static const void *at_number(const void *numbers, int number, int64_t index) {
    return (const char *)numbers + index * (number == FLOAT32 ? 4 : 2);
}

// Tokens [slot, ...) that lie exact one after another: where, how far apart, how many of the `most` wanted.
static struct exact exact_at(const struct lane *lane, const struct exact *fresh, const struct work *w, int64_t slot,
                             int64_t *most) {
    const int64_t channels = w->a->channels, heads = w->a->heads;
    if (slot >= w->length)
        return (struct exact){at_number(fresh->start, fresh->number,
                                        w->head / heads * fresh->batch_stride + w->head % heads * fresh->head_stride +
                                            (slot - w->length) * fresh->token_stride),
                              0, 0, fresh->token_stride, fresh->number};
    *most = least_of(*most, w->length - slot);
    const int64_t coded = lane->coded[w->head];
    if (slot < coded) { // codec Exact: the numbers themselves are behind
        *most = least_of(*most, coded - slot);
        return (struct exact){at_number(lane->numbers, lane->number, (w->head * lane->blocks + slot) * channels), 0, 0,
                              channels, lane->number};
    }
    const int64_t index = slot % lane->ring_size;
    *most = least_of(*most, lane->ring_size - index);
    return (struct exact){at_number(lane->ring, lane->number, (w->head * lane->ring_room + index) * channels), 0, 0,
                          channels, lane->number};
}

#endif

#define SPAN (VARIANT_ISA == ISA_AVX2 ? 1 : 2) // vectors of lanes at a time: four rows' sums fill half the registers
// out[row][lane] += worth[row] * lane_scale[lane] * sum over the depth of code * slice, for SPAN vectors of lanes.
INLINE void NAME(tile)(const int rows, const int bits, const int looks_up, const struct packed *packed, int64_t first,
                       int64_t at, int64_t vectors, const int8_t *slices, const float *worth, const float *lane_scale,
                       float *out, int64_t out_stride, int64_t ahead) {
    const int low = bits == 3 ? 2 : bits, planes = bits == 3 ? 8 : 8 / bits, loads = bits == 3 ? 2 : 1;
    const int64_t stride = packed->lanes * 4;
    const uint8_t *codes = packed->codes + (first * loads) * stride + at * 4;
    const uint8_t *top = bits == 3 ? packed->top + first * stride + at * 4 : NULL;
    const words mask = NAME(all_words)(((1u << low) - 1) * 0x01010101u), third = NAME(all_words)(0x04040404u);
    words table = {0};
    for (int i = 0; looks_up && i < LANES; i++) memcpy((char *)&table + i * 4, packed->operands + i % 4 * 4, 4);
    ints acc[4][2][SPAN];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
        for (int u = 0; u < SPAN; u++) acc[r][0][u] = acc[r][1][u] = (ints){0};
    for (int64_t v = 0; v < vectors; v++) {
        words held[2][SPAN], held_top[SPAN];
#pragma GCC unroll 2
        for (int u = 0; u < SPAN; u++) {
            // codes of the blocks to come are on their way to L2 (in L1 they would push these out)
#pragma GCC unroll 2
            for (int i = 0; i < loads; i++) {
                held[i][u] = NAME(load_words)(codes + i * stride + u * LANES * 4);
                __builtin_prefetch(codes + i * stride + u * LANES * 4 + ahead * low, 0, 2);
            }
            if (bits != 3) continue;
            held_top[u] = NAME(load_words)(top + u * LANES * 4);
            __builtin_prefetch(top + u * LANES * 4 + ahead, 0, 2);
        }
        codes += loads * stride;
        if (bits == 3) top += stride;
#pragma GCC unroll 8
        for (int plane = 0; plane < planes; plane++) {
            words code[SPAN];
#pragma GCC unroll 2
            for (int u = 0; u < SPAN; u++) {
                code[u] = held[plane * low / 8][u] >> (plane * low % 8) & mask;
                if (bits == 3) code[u] |= (plane < 2 ? held_top[u] << (2 - plane) : held_top[u] >> (plane - 2)) & third;
                if (looks_up) code[u] = NAME(look_up)(table, code[u]);
            }
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
#pragma GCC unroll 2
                for (int s = 0; s < 2; s++) {
                    uint32_t four;
                    memcpy(&four, slices + r * MOST_CHANNELS * 2 + plane * 8 + s * 4, 4);
                    const words b = NAME(all_words)(four);
#pragma GCC unroll 2
                    for (int u = 0; u < SPAN; u++) acc[r][s][u] = NAME(dot)(acc[r][s][u], code[u], b, bits);
                }
            }
        }
        slices += 8 * planes;
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
#pragma GCC unroll 2
        for (int u = 0; u < SPAN; u++) {
            const floats high = __builtin_convertvector(acc[r][0][u], floats);
            const floats low = __builtin_convertvector(acc[r][1][u], floats);
            const floats sum = NAME(fma)(high, NAME(all)(256.0f), low);
            float *o = out + r * out_stride + u * LANES;
            NAME(store)(o, NAME(fma)(sum, worth[r] * NAME(load)(lane_scale + u * LANES), NAME(load)(o)));
        }
    }
}

#define TILE(name, bits, looks_up, rows)                                                                               \
    FN void NAME(tile_##name##_##rows)(const struct packed *packed, int64_t first, int64_t at, int64_t vectors,        \
                                       const int8_t *slices, const float *worth, const float *lane_scale, float *out,  \
                                       int64_t out_stride, int64_t ahead) {                                            \
        NAME(tile)(rows, bits, looks_up, packed, first, at, vectors, slices, worth, lane_scale, out, out_stride,       \
                   ahead);                                                                                             \
    }
#define TILES(name, bits, looks_up)                                                                                    \
    TILE(name, bits, looks_up, 1)                                                                                      \
    TILE(name, bits, looks_up, 2) TILE(name, bits, looks_up, 3) TILE(name, bits, looks_up, 4)
TILES(1, 1, 0) TILES(2, 2, 0) TILES(4, 4, 0) TILES(8, 8, 0) TILES(levels3, 3, 1) TILES(levels4, 4, 1)
#undef TILES
#undef TILE

// The same over a block's lanes [lane, last_lane) and depth [depth, last_depth), in whole vectors around both: slices
// are zero where the depth is not meant, lane_scale where the lane is not.
FN void NAME(multiply)(const struct lane *of, const struct packed *packed, int64_t rows, int64_t lane,
                       int64_t last_lane, int64_t depth, int64_t last_depth, const struct slices *slices,
                       const float *worth, const float *lane_scale, float *out, int64_t out_stride) {
    typedef void tile_fn(const struct packed *, int64_t, int64_t, int64_t, const int8_t *, const float *, const float *,
                         float *, int64_t, int64_t);
#define TILES(name) {NAME(tile_##name##_1), NAME(tile_##name##_2), NAME(tile_##name##_3), NAME(tile_##name##_4)}
    static tile_fn *const tiles[9][2][4] = {
        [1] = {TILES(1)}, [2] = {TILES(2)}, [3] = {{0}, TILES(levels3)}, [4] = {TILES(4), TILES(levels4)},
        [8] = {TILES(8)},
    };
#undef TILES
    tile_fn *const *tile = tiles[of->bits][looks_up(of)];
    const int64_t per_vector = of->bits == 3 ? 32 : 32 / of->bits, first = depth / per_vector;
    const int64_t vectors = ceil_div(last_depth, per_vector) - first;
    for (int64_t at = lane & -(SPAN * LANES); at < last_lane; at += SPAN * LANES)
        for (int64_t row = 0; row < rows; row += 4)
            tile[least_of(rows - row, 4) - 1](packed, first, at, vectors, slices->bytes[row] + first * per_vector * 2,
                                              worth + row, lane_scale + at, out + row * out_stride + at, out_stride,
                                              row ? 0 : packed->ahead);
}

// Up to four rows times `factor` in slices, numbers [0, count) of each.
INLINE void NAME(slice_four)(const float *rows, int64_t stride, int64_t many, const float *factor, const float *other,
                             const int64_t count, float middle, int8_t (*bytes)[MOST_CHANNELS * 2],
                             struct sliced *sliced, int64_t row) {
    float scaled[4][MOST_CHANNELS], most[4];
    floats tops[4] = {{0}, {0}, {0}, {0}}, sums[4] = {{0}, {0}, {0}, {0}}, products[4] = {{0}, {0}, {0}, {0}};
    for (int r = 0; r < many; r++) {
        floats top = {0}, sum = {0}, product = {0};
        for (int64_t i = 0; i < count; i += LANES) {
            const floats q = NAME(load)(rows + r * stride + i), x = q * NAME(load)(factor + i);
            NAME(store)(scaled[r] + i, x);
            top = NAME(greater_magnitude)(top, x);
            sum += x;
            product = NAME(fma)(q, NAME(load)(other + i), product);
        }
        if (count % (2 * LANES)) NAME(store)(scaled[r] + count, (floats){0}); // a group of one vector
        tops[r] = top, sums[r] = sum, products[r] = product;
    }
    NAME(greatest_four)(tops, most);
    NAME(sum_four)(products, sliced->product + row);
    // 128 more rounds the integer's high byte, and turns the sign of the low one round
    const floats rounder = NAME(all)(ROUNDER + 128);
    for (int r = 0; r < many; r++) {
        const float worth = sliced->worth[row + r] = most[r] > NEGLIGIBLE ? most[r] / SLICE_MOST : 0;
        const floats inverse = NAME(all)(most[r] > NEGLIGIBLE ? SLICE_MOST / most[r] : 0);
        words integers = {0};
        for (int64_t i = 0; i < count; i += 2 * LANES) {
            const words a = (words)NAME(fma)(NAME(load)(scaled[r] + i), inverse, rounder);
            const words b = (words)NAME(fma)(NAME(load)(scaled[r] + i + LANES), inverse, rounder);
            int8_t both[LANES * 4];
            NAME(store_slices)(both, a, b);
            memcpy(bytes[r] + i * 2, both, least_of(count - i, 2 * LANES) * 2);
            integers += (a - (words)rounder) + (b - (words)rounder);
        }
        sums[r] -= __builtin_convertvector((ints)integers, floats) * worth;
    }
    NAME(sum_four)(sums, sliced->correction + row);
    for (int r = 0; r < 4; r++) sliced->correction[row + r] *= middle;
}

// Rows times `factor` in slices, numbers [first, first + count) of each, whole vectors; `other` is what the rows'
// product is with. What rounding adds up to comes out of a product with codes multiplied by their `middle`.
FN void NAME(slice)(const float *x, int64_t stride, int64_t rows, const float *factor, const float *other,
                    int64_t first, int64_t count, float middle, struct slices *slices, struct sliced *sliced) {
    for (int64_t row = 0; row < rows; row += 4) {
        int8_t(*bytes)[MOST_CHANNELS * 2] = (void *)(slices->bytes[row] + first * 2);
        const float *from = x + row * stride + first;
        if (count == 128 && rows - row >= 4)
            NAME(slice_four)(from, stride, 4, factor + first, other + first, 128, middle, bytes, sliced, row);
        else
            NAME(slice_four)(from, stride, least_of(rows - row, 4), factor + first, other + first, count, middle, bytes,
                             sliced, row);
    }
}

FN void NAME(load_halves)(const uint16_t *x, int64_t count, float *out) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) NAME(store)(out + i, NAME(of_halves)(NAME(load_shorts)(x + i)));
    for (; i < count; i++) out[i] = float_of_half(x[i]);
    for (; i < padded(count); i++) out[i] = 0;
}

// [token][group] to [group][BLOCK tokens]. With the counts of groups in use as constants the compiler shuffles.
FN void NAME(by_group)(const uint16_t *restrict x, int64_t tokens, int64_t groups, uint16_t *restrict out) {
#define TRANSPOSE(count)                                                                                               \
    for (int64_t t = 0; t < tokens; t++)                                                                               \
        for (int g = 0; g < (count); g++) out[g * BLOCK + t] = x[t * (count) + g];
    if (groups == 1) memcpy(out, x, tokens * sizeof *x);
    else if (groups == 2) TRANSPOSE(2)
    else if (groups == 4) TRANSPOSE(4)
    else TRANSPOSE(groups)
#undef TRANSPOSE
}

// Sets `to` to `from` on [first, last) and to zero around it, up to whole edges.
INLINE void NAME(window)(float *to, const float *from, int64_t first, int64_t last) {
    if (first % EDGE == 0 && last % EDGE == 0) {
        memcpy(to + first, from + first, (last - first) * sizeof *to);
        return;
    }
    ints lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    for (int64_t i = first & -EDGE; i < last || i % EDGE; i += LANES) {
        const ints inside = (lane >= (int32_t)(first - i)) & (lane < (int32_t)(last - i));
        NAME(store)(to + i, (floats)((ints)NAME(load)(from + i) & inside));
    }
}

// The query in slices, times the scales of a group of tokens or a run (axis CHANNEL), or of a run's channels.
FN void NAME(slice_query)(struct work *w, const struct lane *lane, int64_t entry) {
    const int64_t channels = w->a->channels, width = padded(channels);
    const int64_t group = lane->axis == CHANNEL || lane->group == channels ? width : lane->group;
    const float(*query)[MOST_CHANNELS] = lane->rotation ? w->rotated : w->query;
    float scale[MOST_CHANNELS], low[MOST_CHANNELS];
    if (lane->axis == CHANNEL) {
        const int64_t at = (w->head * lane->entries + entry) * channels;
        NAME(load_halves)(lane->scale + at, channels, scale);
        NAME(load_halves)(lane->low + at, channels, low);
    } else {
        NAME(window)(scale, ONES, 0, channels);
        if (lane->channel)
            NAME(load_halves)(lane->channel + (w->head * lane->runs + entry) * channels, channels, scale);
        NAME(window)(low, scale, 0, channels); // the lows are the tokens': each is worth the sum of the scaled query
    }
    for (int64_t g = 0; g * group < width; g++) {
        NAME(slice)(query[0], MOST_CHANNELS, w->rows, scale, low, g * group, group, middle_of(lane), &w->query_slices,
                    w->query_groups + g);
        for (int64_t r = 0; r < w->rows; r++) w->query_groups[g].product[r] += w->poison[r];
    }
    w->sliced_entry = entry;
}

// The part of a block that is coded, tokens [base, to): which parameters its tokens share, span by span.
FN int64_t NAME(span)(const struct work *w, const struct lane *lane, int64_t slot, int64_t to, int64_t *entry) {
    *entry = 0;
    if (lane->axis == TOKEN && !lane->channel) return to;
    int64_t end;
    *entry = entry_of(lane, w->head, slot, &end);
    return least_of(end, to);
}

FN void NAME(load_token_scales)(struct work *w, const struct lane *lane, int64_t base, int64_t tokens) {
    const int64_t groups = w->a->channels / lane->group, at = (w->head * lane->entries + base) * groups;
    NAME(by_group)(lane->scale + at, tokens, groups, w->token_scale);
    if (!lane->levels) NAME(by_group)(lane->low + at, tokens, groups, w->token_low);
}

// What the tokens [first, last) of a block bring along: 1 where their channels have the scales.
FN void NAME(token_scales)(const struct work *w, const struct lane *lane, int64_t group, int64_t first, int64_t last,
                           float *scale, float *low) {
    if (lane->axis == CHANNEL) {
        NAME(window)(scale, ONES, first, last);
        NAME(window)(low, ONES, first, last);
        return;
    }
    NAME(load_halves)(w->token_scale + group * BLOCK, last, scale);
    if (!lane->levels) NAME(load_halves)(w->token_low + group * BLOCK, last, low);
    if (first) NAME(window)(scale, scale, first, last), NAME(window)(low, low, first, last);
    for (int64_t t = first & -EDGE; lane->levels && t < padded(last); t += LANES) { // zero is in the middle of the levels
        const floats x = NAME(load)(scale + t) * step_of(lane);
        NAME(store)(scale + t, x);
        NAME(store)(low + t, x * -middle_of(lane));
    }
}

FN void NAME(coded_logits)(struct work *w, int64_t block, int64_t to) {
    const struct lane *lane = &w->a->keys;
    const int64_t channels = w->a->channels, base = block * BLOCK;
    const struct packed packed = packed_of(w, lane, block);
    const int64_t group = lane->axis == TOKEN ? lane->group : channels;
    if (lane->axis == TOKEN) NAME(load_token_scales)(w, lane, base, to - base);
    for (int64_t r = 0; r < w->rows; r++)
        for (int64_t t = 0; t < BLOCK; t += LANES) NAME(store)(w->logits[r] + t, (floats){0});
    for (int64_t slot = base, end, entry; slot < to; slot = end) {
        end = NAME(span)(w, lane, slot, to, &entry);
        if (entry != w->sliced_entry) NAME(slice_query)(w, lane, entry);
        const int64_t first = slot - base, last = end - base;
        for (int64_t g = 0; g * group < channels; g++) {
            float scale[BLOCK], low[BLOCK];
            NAME(token_scales)(w, lane, g, first, last, scale, low);
            for (int64_t r = 0; r < w->rows; r++)
                for (int64_t t = first & -EDGE; t < last; t += LANES) {
                    const floats x = NAME(fma)(NAME(load)(low + t), NAME(all)(w->query_groups[g].product[r]),
                                               NAME(load)(w->logits[r] + t));
                    NAME(store)(w->logits[r] + t,
                                NAME(fma)(NAME(load)(scale + t), NAME(all)(w->query_groups[g].correction[r]), x));
                }
            NAME(multiply)(lane, &packed, w->rows, first, last, g * group, (g + 1) * group, &w->query_slices,
                           w->query_groups[g].worth, scale, w->logits[0], BLOCK);
        }
    }
}

FN void NAME(coded_values)(struct work *w, int64_t block, int64_t to) {
    const struct lane *lane = &w->a->values;
    const int64_t channels = w->a->channels, base = block * BLOCK;
    const struct packed packed = packed_of(w, lane, block);
    const int64_t group = lane->axis == TOKEN ? lane->group : channels;
    float(*mixed)[MOST_CHANNELS] = lane->rotation ? w->turned : w->mixed;
    if (lane->axis == TOKEN) NAME(load_token_scales)(w, lane, base, to - base);
    struct slices slices;
    for (int64_t slot = base, end, entry; slot < to; slot = end) {
        end = NAME(span)(w, lane, slot, to, &entry);
        const int64_t first = slot - base, last = end - base;
        for (int64_t g = 0; g * group < channels; g++) {
            // weights times scale[t] go into the integers; what they give is worth lane_scale[d]. The lows: the sum of
            // weights times low[t] is worth lane_low[d].
            float scale[BLOCK], low[BLOCK], lane_scale[MOST_CHANNELS], lane_low[MOST_CHANNELS], own[MOST_CHANNELS];
            const int64_t d0 = g * group, d1 = d0 + group;
            NAME(token_scales)(w, lane, g, first, last, scale, low);
            if (lane->axis == CHANNEL) {
                const int64_t at = (w->head * lane->entries + entry) * channels;
                NAME(load_halves)(lane->scale + at, channels, lane_scale);
                NAME(load_halves)(lane->low + at, channels, lane_low);
            } else {
                if (lane->channel)
                    NAME(load_halves)(lane->channel + (w->head * lane->runs + entry) * channels, channels, own);
                NAME(window)(lane_scale, lane->channel ? own : ONES, d0, d1);
                NAME(window)(lane_low, lane_scale, d0, d1);
            }
            const int64_t edge = first & -EDGE, width = ceil_div(last, EDGE) * EDGE - edge;
            struct sliced sliced;
            NAME(slice)(w->logits[0], BLOCK, w->rows, scale, low, edge, width, middle_of(lane), &slices, &sliced);
            for (int64_t r = 0; r < w->rows; r++)
                for (int64_t d = d0 & -EDGE; d < d1; d += LANES) {
                    const floats product = NAME(all)(sliced.product[r]), correction = NAME(all)(sliced.correction[r]);
                    const floats x = NAME(fma)(NAME(load)(lane_low + d), product, NAME(load)(mixed[r] + d));
                    NAME(store)(mixed[r] + d, NAME(fma)(NAME(load)(lane_scale + d), correction, x));
                }
            NAME(multiply)(lane, &packed, w->rows, d0, d1, first, last, &slices, sliced.worth, lane_scale, mixed[0],
                           MOST_CHANNELS);
        }
    }
}

INLINE void NAME(exact_logits_of)(struct work *w, const struct exact *x, int64_t tokens, int64_t at, const int number) {
    const int64_t channels = w->a->channels, whole = channels / LANES * LANES;
    for (int64_t row = 0; row < w->rows; row += 4)
        for (int64_t t = 0; t < tokens; t++) {
            floats sum[4] = {{0}, {0}, {0}, {0}};
            float rest[4] = {0};
            for (int64_t d = 0; d < whole; d += LANES) {
                const floats k = NAME(load_numbers)(x->start, t * x->token_stride + d, number);
#pragma GCC unroll 4
                for (int r = 0; r < 4; r++) sum[r] = NAME(fma)(k, NAME(load)(w->query[row + r] + d), sum[r]);
            }
            for (int64_t d = whole; d < channels; d++)
                for (int r = 0; r < 4; r++)
                    rest[r] += NAME(load_number)(x->start, t * x->token_stride + d, number) * w->query[row + r][d];
            for (int r = 0; r < 4; r++) w->logits[row + r][at + t] = NAME(sum)(sum[r]) + rest[r];
        }
}

INLINE void NAME(exact_values_of)(struct work *w, const struct exact *x, int64_t tokens, int64_t at, const int number) {
    const int64_t channels = w->a->channels, whole = channels / LANES * LANES;
    for (int64_t row = 0; row < w->rows; row += 4) {
        for (int64_t d = 0; d < whole; d += 2 * LANES) {
            const int64_t next = d + LANES < whole ? LANES : 0; // an odd last vector is read twice and stored once
            floats sum[4][2];
            for (int r = 0; r < 4; r++) {
                sum[r][0] = NAME(load)(w->mixed[row + r] + d);
                sum[r][1] = NAME(load)(w->mixed[row + r] + d + next);
            }
            for (int64_t t = 0; t < tokens; t++) {
                const floats left = NAME(load_numbers)(x->start, t * x->token_stride + d, number);
                const floats right = NAME(load_numbers)(x->start, t * x->token_stride + d + next, number);
#pragma GCC unroll 4
                for (int r = 0; r < 4; r++) {
                    const floats p = NAME(all)(w->logits[row + r][at + t]);
                    sum[r][0] = NAME(fma)(left, p, sum[r][0]);
                    sum[r][1] = NAME(fma)(right, p, sum[r][1]);
                }
            }
            for (int r = 0; r < 4; r++) {
                NAME(store)(w->mixed[row + r] + d + next, sum[r][1]);
                NAME(store)(w->mixed[row + r] + d, sum[r][0]);
            }
        }
        for (int64_t d = whole; d < channels; d++)
            for (int64_t t = 0; t < tokens; t++)
                for (int r = 0; r < 4; r++)
                    w->mixed[row + r][d] +=
                        NAME(load_number)(x->start, t * x->token_stride + d, number) * w->logits[row + r][at + t];
    }
}

// A block's tokens [from, to) that are not coded: `base` is the block's first slot.
#define EXACT(product, lane, fresh)                                                                                    \
    FN void NAME(product)(struct work *w, int64_t base, int64_t from, int64_t to) {                                    \
        for (int64_t slot = from, many; slot < to; slot += many) {                                                     \
            many = to - slot;                                                                                          \
            const struct exact x = exact_at(&w->a->lane, &w->a->fresh, w, slot, &many);                                \
            if (x.number == FLOAT32) NAME(product##_of)(w, &x, many, slot - base, FLOAT32);                            \
            else if (x.number == BFLOAT16) NAME(product##_of)(w, &x, many, slot - base, BFLOAT16);                     \
            else NAME(product##_of)(w, &x, many, slot - base, FLOAT16);                                                \
        }                                                                                                              \
    }
EXACT(exact_logits, keys, fresh_keys)
EXACT(exact_values, values, fresh_values)
#undef EXACT

// What the reference does between logits and softmax: softcap, Affine over the store's own tokens.
FN void NAME(shape_logits)(const struct work *w, float *logits, int64_t row, int64_t stored) {
    const struct attention *a = w->a;
    if (a->softcap > 0)
        for (int64_t t = 0; t < BLOCK; t += LANES) { // tanh x = sign(x) (1 - e) / (1 + e), e = exp(-2 |x|)
            const floats x = NAME(load)(logits + t) / a->softcap;
            const floats e = NAME(exp)(-2.0f * NAME(greater)(x, -x)), tanh = (1.0f - e) / (1.0f + e);
            NAME(store)(logits + t, a->softcap * (floats)((ints)tanh | ((ints)x & INT32_MIN)));
        }
    if (w->range) {
        const float least = w->range[0][row], spread = w->range[1][row] - least;
        float slope = 1 - (a->affine_high - a->affine_low) / (spread + 1e-8f);
        if (!a->official && slope < 1e-3f) slope = 1e-3f;
        for (int64_t t = 0; t < stored; t++) logits[t] = least - a->affine_low + (logits[t] - least) * slope;
    }
}

// Logits to probabilities, relative to each row's greatest logit so far.
FN void NAME(softmax)(struct work *w) {
    for (int64_t r = 0; r < w->rows; r++) {
        floats top = NAME(all)(-INFINITY), mass = {0};
        for (int64_t t = 0; t < BLOCK; t += LANES) top = NAME(greater)(top, NAME(load)(w->logits[r] + t));
        const float most = NAME(greatest)(top);
        if (most > w->top[r]) {
            const float fade = expf(w->top[r] - most);
            w->top[r] = most;
            w->mass[r] *= fade;
            for (int64_t d = 0; d < padded(w->a->channels); d += LANES)
                NAME(store)(w->mixed[r] + d, NAME(load)(w->mixed[r] + d) * fade);
            for (int64_t d = 0; w->a->values.rotation && d < padded(w->a->channels); d += LANES)
                NAME(store)(w->turned[r] + d, NAME(load)(w->turned[r] + d) * fade);
        }
        for (int64_t t = 0; t < BLOCK; t += LANES) {
            const floats p = NAME(exp)(NAME(load)(w->logits[r] + t) - w->top[r]);
            NAME(store)(w->logits[r] + t, p);
            mass += p;
        }
        w->mass[r] += NAME(sum)(mass);
    }
}

FN void NAME(begin)(struct work *w, const struct attention_run *run, const struct piece *piece) {
    const struct attention *a = w->a = run->a;
    const int64_t row = piece->unit % run->tiles * ROWS;
    w->head = piece->unit / run->tiles;
    w->rows = least_of(a->rows - row, ROWS);
    w->length = a->length[w->head];
    w->total = w->length + a->fresh;
    w->sliced_entry = -1;
    for (int64_t r = 0; r < ceil_div(w->rows, 4) * 4; r++) { // the products go over four rows at a time
        memset(w->query[r], 0, sizeof w->query[r]);
        memset(w->mixed[r], 0, sizeof w->mixed[r]);
        memset(w->turned[r], 0, sizeof w->turned[r]);
        w->top[r] = -INFINITY;
        w->mass[r] = w->poison[r] = 0;
        for (int64_t d = 0; r < w->rows && d < a->channels; d++) {
            w->query[r][d] = a->query[((w->head * a->rows) + row + r) * a->channels + d] * a->scale;
            w->poison[r] += w->query[r][d] * 0;
        }
        if (!a->keys.rotation) continue;
        memcpy(w->rotated[r], w->query[r], sizeof w->query[r]);
        NAME(rotate)(a->keys.rotation, a->channels, w->rotated[r]);
    }
    for (int role = KEYS; role <= VALUES; role++) {
        const struct lane *lane = role == KEYS ? &a->keys : &a->values;
        for (int i = 0; looks_up(lane) && i < 16; i++)
            w->operands[role][i] = i < 1 << lane->bits ? (uint8_t)(lane->levels[i] + LIFT) : 0;
    }
}

FN void NAME(piece)(struct attention_run *run, int64_t index, struct work *w) {
    const struct piece *piece = run->pieces + index;
    NAME(begin)(w, run, piece);
    w->range = run->ranges && !run->ranging ? run->ranges[index] : NULL;
    for (int64_t block = piece->first; block < piece->last; block++) {
        const int64_t base = block * BLOCK, end = least_of(base + BLOCK, w->total);
        const struct lane *keys = &w->a->keys, *values = &w->a->values;
        const int64_t coded_keys = keys->codes ? least_of(least_of(keys->coded[w->head], w->length), end) : 0;
        const int64_t coded_values = values->codes ? least_of(least_of(values->coded[w->head], w->length), end) : 0;
        if (base < coded_keys) NAME(coded_logits)(w, block, coded_keys);
        NAME(exact_logits)(w, base, most_of(base, coded_keys), end);
        for (int64_t r = 0; r < w->rows; r++) {
            const int64_t stored = least_of(end, w->length) - base;
            NAME(shape_logits)(w, w->logits[r], r, stored);
            for (int64_t t = 0; run->ranging && t < stored; t++) {
                float *least = &run->ranges[index][0][r], *most = &run->ranges[index][1][r];
                if (!(*least < w->logits[r][t])) *least = w->logits[r][t];
                if (!(*most > w->logits[r][t])) *most = w->logits[r][t];
            }
            for (int64_t t = end - base; t < BLOCK; t++) w->logits[r][t] = -INFINITY;
        }
        if (run->ranging) continue;
        NAME(softmax)(w);
        if (base < coded_values) NAME(coded_values)(w, block, coded_values);
        NAME(exact_values)(w, base, most_of(base, coded_values), end);
    }
    const int64_t channels = w->a->channels, row = w->head * w->a->rows + piece->unit % run->tiles * ROWS;
    for (int64_t r = 0; r < w->rows && !run->ranging; r++) {
        if (w->a->values.rotation) NAME(add_unrotated)(w->a->values.rotation, channels, w->turned[r], w->mixed[r]);
        if (piece->part < 0) {
            finish_row(w->a, row + r, w->top[r], w->mass[r], w->mixed[r]);
            continue;
        }
        float *partial = run->partials + (piece->part * ROWS + r) * (2 + channels);
        partial[0] = w->top[r];
        partial[1] = w->mass[r];
        memcpy(partial + 2, w->mixed[r], channels * sizeof(float));
    }
}

FN void NAME(attend_body)(void *data) {
    struct attention_run *run = data;
    struct work w;
    for (int64_t i; (i = __atomic_fetch_add(&run->next, 1, __ATOMIC_RELAXED)) < run->count;) NAME(piece)(run, i, &w);
}

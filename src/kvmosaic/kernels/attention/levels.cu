// Attention over learned levels (codecs/levels.py): keys by channel, maybe before their rotary positions, and values by token, some
// numbers of each token kept beside their codes.
//
// A lane has a token's keys: its levels are looked up in shared memory, where each lane has a bank of its own, brought to the channel's
// range, rotated and multiplied with the queries in float32. Of 32 tokens in a row the rotation is that of the first, which the
// queries take on instead, and a further one by 0 ... 31 places, which is a table. Tokens with gaps between them take as many rounds.
// Values are operands of the 16-bit product: two channels' levels are one look-up, a token's range is a factor of its probability.
//
// Compiled for HEAD channels, NUMBER 0 bfloat16 or 1 float16, SOFTCAP, PRE_ROPE, WARPS, POOL_BYTES, and of each side BITS and OUTLIERS.
#include "attention/streams.cuh"

constexpr int HALF = HEAD / 2, UNITS = HALF / 8;  // of rotated channels i, i + HALF; of 8 channels
constexpr int KEY_BYTES = HEAD * KEY_BITS / 8, VALUE_BYTES = HEAD * VALUE_BITS / 8;
constexpr int PAIRS_AT = 0;                                        // [codes of two values][lanes] float16 twice
constexpr int LEVELS_AT = PAIRS_AT + (1 << 2 * VALUE_BITS) * 128;  // [codes of a key][lanes] float32
constexpr int RANGES_AT = LEVELS_AT + (1 << KEY_BITS) * 128;       // [HALF]: middle and half width of i, of i + HALF
constexpr int TURNS_AT = RANGES_AT + HALF * 16;                    // [HALF][places] cosine and sine
constexpr int WARPS_AT = TURNS_AT + PRE_ROPE * HALF * TOKENS * 8;
constexpr int STAGES = 2 * TOKENS * (pitch(KEY_BYTES) + pitch(VALUE_BYTES));
constexpr int QUERY_AT = STAGES, SHARES_AT = QUERY_AT + HEAD * 16, PATCHES_AT = SHARES_AT + TOKENS * ROWS * 2;
constexpr int WARP_BYTES = PATCHES_AT + (TOKENS * VALUE_OUTLIERS * 4 + 15) / 16 * 16;
static_assert(WARPS_AT + WARPS * WARP_BYTES <= POOL_BYTES && WARPS * ROWS * HEAD * 4 <= POOL_BYTES, "as levels.py counts");

struct alignas(8) Two {
  float x, y;
};
struct alignas(16) Four {
  float x[4];
};

// levels of values are stretched to -1 ... 1, which their range takes on: the ends, and most of the others' sum, are exact in float16
struct Stretch {
  float middle, half;
  DEVICE_MEMBER Stretch(const float* levels) {
    const float least = levels[0], most = levels[(1 << VALUE_BITS) - 1];
    middle = (most + least) / 2, half = (most - least) / 2;
  }
  DEVICE_MEMBER u32 apply(float level) const { return float_to_half(half > 0.f ? (level - middle) / half : 0.f); }
};

DEVICE void make_tables(const Work& w, i64 head, u8* pool) {
  const Lane &keys = w.store.keys, &values = w.store.values;
  const Stretch stretch(values.restored);
  for (int x = threadIdx.x; x < (1 << 2 * VALUE_BITS) * 32; x += THREADS) {
    const float *one = values.restored + (x / 32 & ((1 << VALUE_BITS) - 1)), *other = values.restored + (x / 32 >> VALUE_BITS);
    ((u32*)(pool + PAIRS_AT))[x] = stretch.apply(*one) | stretch.apply(*other) << 16;
  }
  for (int x = threadIdx.x; x < (1 << KEY_BITS) * 32; x += THREADS) ((float*)(pool + LEVELS_AT))[x] = keys.restored[x / 32];
  const u16 *middle = (const u16*)keys.learned + head * HEAD, *half = middle + w.heads * HEAD;
  for (int i = threadIdx.x; i < HALF; i += THREADS)
    ((Four*)(pool + RANGES_AT))[i] = Four{half_to_float(middle[i]), half_to_float(half[i]), half_to_float(middle[i + HALF]),
                                          half_to_float(half[i + HALF])};
  for (int x = threadIdx.x; PRE_ROPE && x < HALF * TOKENS; x += THREADS) {
    Two turn;
    sincosf((float)(x % TOKENS) * keys.turns[x / TOKENS], &turn.y, &turn.x);
    ((Two*)(pool + TURNS_AT))[x] = Two{turn.x * keys.stretch, turn.y * keys.stretch};
  }
  barrier();
}

// the queries as keys see them that are turned by `place` less than they are yet to be: [HEAD][ROWS]
DEVICE void turn_queries(const Work& w, const float* query, int place, Four* turned) {
  warp_barrier();  // what lay there has been read
  for (int i = threadIdx.x & 31; i < HALF; i += 32) {
    float cosine = 1.f, sine = 0.f;
    if (PRE_ROPE) sincosf((float)place * w.store.keys.turns[i], &sine, &cosine);
#pragma unroll
    for (int q = 0; q < ROWS; q++) {
      const float a = query[q * HEAD + i], b = query[q * HEAD + i + HALF];
      turned[i].x[q] = a * cosine + b * sine, turned[i + HALF].x[q] = b * cosine - a * sine;
    }
  }
  warp_barrier();
}

// logits of this lane's token; slot: its own among all rows'
DEVICE void add_logits(const Work& w, const u8* pool, const Four* query, const u8* codes, i64 slot, bool real, float (&s)[ROWS]) {
  constexpr int WHOLE = KEY_BYTES % 16 == 0 ? 4 : 1;
  const int lane = threadIdx.x & 31;
  const float* levels = (const float*)(pool + LEVELS_AT) + lane;
  const Two* turns = (const Two*)(pool + TURNS_AT) + lane;
  u32 words[KEY_BYTES / 4 + 1];
#pragma unroll
  for (int x = 0; x < KEY_BYTES / 4; x += WHOLE) {
    const Vector<WHOLE> v = *(const Vector<WHOLE>*)(codes + 4 * x);
#pragma unroll
    for (int e = 0; e < WHOLE; e++) words[x + e] = v.word[e];
  }
  words[KEY_BYTES / 4] = 0;
  auto unit = [&](int u) {  // codes of 8 channels
    const int bit = 8 * KEY_BITS * u, shift = bit % 32;
    return words[bit / 32] >> shift | (shift ? words[bit / 32 + 1] << (32 - shift) : 0u);
  };
  auto add = [&](int i, float a, float b) {
    if (PRE_ROPE) {
      const Two turn = turns[i * TOKENS];
      const float x = a * turn.x - b * turn.y;
      b = b * turn.x + a * turn.y, a = x;
    }
    const Four qa = query[i], qb = query[i + HALF];
#pragma unroll
    for (int q = 0; q < ROWS; q++) s[q] += qa.x[q] * a, s[q] += qb.x[q] * b;  // two fused operations
  };
#pragma unroll
  for (int u = 0; u < UNITS; u++) {
    const u32 first = unit(u), second = unit(u + UNITS);
#pragma unroll
    for (int e = 0; e < 8; e++) {
      const Four range = ((const Four*)(pool + RANGES_AT))[8 * u + e];
      constexpr u32 MASK = (1u << KEY_BITS) - 1;
      add(8 * u + e, range.x[0] + range.x[1] * levels[(first >> (KEY_BITS * e) & MASK) * 32],
          range.x[2] + range.x[3] * levels[(second >> (KEY_BITS * e) & MASK) * 32]);
    }
  }
#pragma unroll
  for (int o = 0; o < KEY_OUTLIERS; o++) {
    const int channel = real ? w.store.keys.where[slot * KEY_OUTLIERS + o] : 0;
    const float missing = real ? half_to_float(w.store.keys.missing[slot * KEY_OUTLIERS + o]) : 0.f;
    add(channel % HALF, channel < HALF ? missing : 0.f, channel < HALF ? 0.f : missing);
  }
}

// pairs of channels of one token that this lane holds, in units of half of its range
DEVICE void read_levels(const u8* pool, const u8* codes, const u32* patches, bool flat, u32 (&words)[2 * TILES]) {
  const int lane = threadIdx.x & 31, r = lane >> 2;
#pragma unroll
  for (int x = 0; x < WORDS; x++)
    words[x] = ((const u32*)(pool + PAIRS_AT))[code_at<2 * VALUE_BITS>(codes, 8 * x + r) * 32 + lane];
  if (WORDS % 2) words[WORDS] = 0;
#pragma unroll
  for (int o = 0; o < VALUE_OUTLIERS; o++) {
    const u32 patch = patches[o];
    const int mine = (int)(patch >> 1 & 7) == r ? (int)(patch >> 4 & 15) : -1;
    const u32 add = (patch >> 16) << (16 * (patch & 1));
#pragma unroll
    for (int x = 0; x < WORDS; x++) {
      if (o == 0 && flat && patch & 256) words[x] = 0;
      if (x == mine) words[x] = add_halves(words[x], add);
    }
  }
}

DEVICE void attend_codes(const Work& w, i64 row, const float* query, u8* pool, Sums& sums) {
  const Lane &keys = w.store.keys, &values = w.store.values;
  const int lane = threadIdx.x & 31, r = lane >> 2, j = lane & 3, limit = (int)keys.coded[row];
  const i64 key_slots = row * (keys.code_stride / KEY_BYTES), value_slots = row * (values.code_stride / VALUE_BYTES);
  const int* position = keys.position + (keys.position_heads > 1 ? row : row / w.heads) * keys.position_room;
  u8* own = pool + WARPS_AT + (threadIdx.x >> 5) * WARP_BYTES;
  Four* turned = (Four*)(own + QUERY_AT);
  u16* shares = (u16*)(own + SHARES_AT);       // [TOKENS][ROWS] float16
  u32* patches = (u32*)(own + PATCHES_AT);     // [TOKENS][VALUE_OUTLIERS]: channel, 256 = nothing else of the token, float16
  const Stretch stretch(values.restored);
  float below[ROWS] = {}, unit = 0.f;          // what middles come to, this lane's tokens; of the half widths
  auto prepare = [&] {
    make_tables(w, row % w.heads, pool);
    if (!PRE_ROPE) turn_queries(w, query, 0, turned);
  };
  for_each_chunk<KEY_BYTES, VALUE_BYTES>(w, row, own, prepare, [&](int chunk, const u8* key_codes, const u8* value_codes) {
    const int token = chunk * TOKENS + lane;
    const bool real = token < limit;
    const u8* codes = key_codes + lane * pitch(KEY_BYTES);
    float s[ROWS] = {};
    if (PRE_ROPE) {
      const int place = (real ? position[token] : 0) - lane;  // of the chunk's first token, if tokens follow one another
      bool left = real;
      while (any(left)) {
        int base = left ? place : 0x7fffffff;
#pragma unroll
        for (int far = 1; far < 32; far *= 2) {
          const int other = (int)shuffle((u32)base, lane ^ far);
          base = other < base ? other : base;
        }
        turn_queries(w, query, base, turned);
        float here[ROWS] = {};
        add_logits(w, pool, turned, codes, key_slots + token, real, here);
        if (left && place == base) {
          left = false;
#pragma unroll
          for (int q = 0; q < ROWS; q++) s[q] = here[q];
        }
      }
    } else {
      add_logits(w, pool, turned, codes, key_slots + token, real, s);
    }
    sums.weigh(w, real, s, [&](int q, float old) { below[q] *= old; });
    const u32 range = real ? *(const u32*)(values.scale + (value_slots + token) * 2) : 0;
    const float width = half_to_float((u16)(range >> 16)), half = width * stretch.half;
    const float middle = half_to_float((u16)range) + width * stretch.middle;
    // a token without a range still has outliers
    const float scale = real && half == 0.f && VALUE_OUTLIERS ? 1.f : half;
    if (any(scale > 8.f * unit)) {
      float most = fmaxf(scale, unit);
#pragma unroll
      for (int far = 1; far < 32; far *= 2) most = fmaxf(most, shuffle_xor(most, far));
      sums.rescale(unit / most);
      unit = most;
    }
    const bool flat = any(scale != half);
    u32 p[ROWS];
#pragma unroll
    for (int q = 0; q < ROWS; q++) {
      if (real) below[q] += s[q] * middle;
      p[q] = float_to_half(scale > 0.f ? s[q] * (scale / unit) : 0.f);
    }
    ((Vector<2>*)shares)[lane] = Vector<2>{p[0] | p[1] << 16, p[2] | p[3] << 16};
#pragma unroll
    for (int o = 0; o < VALUE_OUTLIERS; o++) {
      u32 patch = 0;
      if (real) {
        const i64 at = (value_slots + token) * VALUE_OUTLIERS + o;
        const float missing = fminf(fmaxf(half_to_float(values.missing[at]) / scale, -65504.f), 65504.f);
        patch = values.where[at] | (scale != half ? 256u : 0u) | (u32)float_to_half(missing) << 16;
      }
      patches[lane * VALUE_OUTLIERS + o] = patch;
    }
    warp_barrier();
#pragma unroll
    for (int first = 0; first < TOKENS; first += 8) {
      const int t = first + j;
      u32 a[2 * TILES], b[2 * TILES];
      read_levels(pool, value_codes + t * pitch(VALUE_BYTES), patches + t * VALUE_OUTLIERS, flat, a);
      read_levels(pool, value_codes + (t + 4) * pitch(VALUE_BYTES), patches + (t + 4) * VALUE_OUTLIERS, flat, b);
      sums.mix(shares + t * ROWS, a, b);
    }
  });
  float mine = 0.f;  // of head j
#pragma unroll
  for (int q = 0; q < ROWS; q++) {
#pragma unroll
    for (int far = 1; far < 32; far *= 2) below[q] += shuffle_xor(below[q], far);
    if (q == j) mine = below[q];
  }
  sums.rescale(unit);
#pragma unroll
  for (int x = 0; x < TILES; x++)
#pragma unroll
    for (int e = 0; e < 4; e++) sums.out[x][e] += mine;
}

KERNEL(THREADS, 1) attend(const Work w) {
  POOL(pool, POOL_BYTES);
  attend_part(w, pool, [&](i64 row, const float* query, Sums& sums) { attend_codes(w, row, query, pool, sums); },
              [](int x, int r) { return 16 * x + 2 * r; });
}

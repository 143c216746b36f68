// Attention of a step's queries over one coded store, on the codes as they lie: no code is ever turned back into a number.
//
// A block of threads takes one part of one KV head's tokens: some of the codes, and some of the tokens that are exact, stored or
// the step's own; of rotated codes a part of its own has all that is exact. Each part leaves maximum, sum and output, which
// are joined in order (combine.cuh), so the same input gives the same bits.
//
// Integer products: a logit is sum of query times scale times code. The scaled query is written as 15-bit integers in two
// signed bytes (columns 2h and 2h + 1 of the product are the high and the low byte of head h), codes are the unsigned
// operand, masked out of the packed bytes; plane p comes out multiplied by 2^(bits p), which is taken off again.
// Probabilities meet values in the same way. For exact tokens the two columns are a 16-bit number and what it leaves.
//
// Compiled for one form of store: HEAD channels, NUMBER 0 bfloat16 or 1 float16, TILES of 4 query heads, and of each side
//   FORM 0 exact, 1 ranges by channel, 2 ranges by token; BITS;
//   GROUP (keys) tokens that share a channel's range, 0 = a run; GROUPS (values) ranges of a token;
//   FACTOR 1 = channel factors once a run; LOW 1 = low is stored, 0 = number = STEP * scale * (code - ZERO);
//   TABLE 1 = a code stands for a byte of LEVELS, four words of them. RUNS 1 = there is more than one run.
// LOGITS 1 = the logits themselves are left, too, for the tokens' scores (scores/cuda.cu).
#include "attention/work.cuh"

enum { EXACT, CHANNEL, TOKEN };
constexpr int WARPS = 4, ROWS = 4 * TILES;
constexpr int DP = padded(HEAD), CHUNKS32 = DP / 32, GROUPS16 = DP / 16;
constexpr int KEY_PLANES = 8 / KEY_BITS, VALUE_PLANES = 8 / VALUE_BITS;
// tokens that a warp takes at a time: whole bytes of keys and of values
constexpr int NT = larger(larger(32, 16 * KEY_PLANES), 32 * (VALUE_PLANES / greatest_divisor(VALUE_PLANES, GROUPS16)));
constexpr int KEY_LOADS = NT / 16 * CHUNKS32 / KEY_PLANES, VALUE_LOADS = NT / 32 * GROUPS16 / VALUE_PLANES;
constexpr bool CODED = KEY_FORM != EXACT && VALUE_FORM != EXACT;
constexpr bool GROUPED = KEY_FORM == CHANNEL && KEY_GROUP > 0;
constexpr int KEY_ENTRY = GROUPED ? KEY_GROUP : 1;
constexpr bool BY_RUN = (KEY_FORM == CHANNEL && KEY_GROUP == 0) || KEY_FACTOR || VALUE_FORM == CHANNEL || VALUE_FACTOR;
constexpr bool SCALED = VALUE_FORM == CHANNEL || VALUE_FACTOR;  // output channels have factors of their own
constexpr bool WIDE = !CODED && HEAD % 64 == 0;         // a lane's output channels are neighbours: loads of 16 bytes
// ranges of keys that a chunk meets; numbers of its ranges, brought to shared memory while the chunk before is worked on
constexpr int ENTRIES = KEY_ENTRY % NT == 0 ? 1 : NT % KEY_ENTRY == 0 ? NT / KEY_ENTRY : (NT - 1) / KEY_ENTRY + 2;
constexpr int KEY_STAGE = GROUPED ? ENTRIES * HEAD : KEY_FORM == TOKEN ? NT : 0;  // scales; lows are as many
constexpr int VALUE_STAGE = VALUE_FORM == TOKEN ? NT * VALUE_GROUPS : 0;
constexpr int STAGE = KEY_STAGE * (1 + KEY_LOW) + VALUE_STAGE * (1 + VALUE_LOW);
constexpr bool STAGED = CODED && STAGE > 0 && STAGE <= 2048;  // more would not leave room for two a warp: read where they are
constexpr int QS = DP + 16;                     // a query row in shared memory, apart by half of the banks
constexpr float MOST = 32512.f;                 // 127 * 256: the largest that two signed bytes hold, and even

// what a plane's operands come out multiplied by, taken off
DEVICE float plane_factor(bool table, int bits, int plane) { return table ? 1.f : 1.f / (float)(1 << (bits * plane)); }

// four codes of a plane as operands of a product: their bytes masked out, or what a table of bytes below 128 has for them
template <bool TABLE, int BITS>
DEVICE u32 operand(u32 word, int plane, u32 t0, u32 t1, u32 t2, u32 t3) {
  if constexpr (!TABLE) {
    return word & (0x01010101u * ((1u << BITS) - 1)) << (BITS * plane);
  } else {
    const u32 codes = word >> (16 * plane), eight = (word & 0x77777777u) >> (16 * plane);
    const u32 lower = permute(t0, t1, eight), upper = permute(t2, t3, eight);
    const u32 is_upper = permute(0x80808080u, 0x80808080u, codes);  // 255, or 128: of bytes that have no such bit
    return (lower & ~is_upper) | (upper & is_upper);
  }
}
DEVICE u32 key_operand(u32 word, int plane) { return operand<KEY_TABLE, KEY_BITS>(word, plane, KEY_LEVELS); }
DEVICE u32 value_operand(u32 word, int plane) { return operand<VALUE_TABLE, VALUE_BITS>(word, plane, VALUE_LEVELS); }

// four 15-bit integers, as fixed_point leaves them, to the high or the low bytes
DEVICE u32 high_bytes(const u32 (&u)[4]) {
  return __byte_perm(__byte_perm(u[0], u[1], 0x0051), __byte_perm(u[2], u[3], 0x0051), 0x5410);
}
DEVICE u32 low_bytes(const u32 (&u)[4]) {
  return __byte_perm(__byte_perm(u[0], u[1], 0x0040), __byte_perm(u[2], u[3], 0x0040), 0x5410) ^ 0x80808080u;
}
// x in -MOST ... MOST: its nearest integer v, plus 128, in the low 16 bits
DEVICE u32 fixed_point(float x) { return __float_as_uint(x + 12583040.f); }  // 1.5 * 2^23 + 128
constexpr u32 FIXED_ZERO = 0x4b400080u;

// where output [x][half] of a lane lies among the channels
DEVICE int output_channel(int x, int r, int half) { return (WIDE ? r * (HEAD / 8) + 2 * x : 16 * x + 2 * r) + half; }

// the ranges of a chunk: of its keys from the one that its first token has, of its values from its first token's on
struct Ranges {
  const u16 *key_scale, *key_low, *value_scale, *value_low;
};

struct Warp {
  int lane, r, j;
  const float* query;  // shared, [ROWS][QS]
  u32 slices[TILES][CHUNKS32][2];
  float unit[TILES], offset[TILES];  // of a head's slices, and what does not depend on codes; of head j
  float most[TILES], sum[TILES], out[TILES][GROUPS16][2];
  float below[TILES][VALUE_GROUPS];  // what the zero points of values multiply, this lane's tokens
  float factor[GROUPS16][2];         // of output channels
  int entry, run;
  u16* stages;         // shared, [2][STAGE]: of the chunk that is worked on and of the next
  int staged, coming;  // the last range of keys that was brought; which stage is filled
  Ranges ranges;

  DEVICE_MEMBER void begin(const float* shared, u16* stage) {
    lane = threadIdx.x & 31, r = lane >> 2, j = lane & 3, query = shared, entry = run = staged = -1;
    stages = stage, coming = 0;
#pragma unroll
    for (int t = 0; t < TILES; t++) {
      most[t] = LEAST, sum[t] = 0.f;
#pragma unroll
      for (int x = 0; x < GROUPS16; x++) out[t][x][0] = out[t][x][1] = 0.f;
#pragma unroll
      for (int g = 0; g < VALUE_GROUPS; g++) below[t][g] = 0.f;
    }
#pragma unroll
    for (int x = 0; x < GROUPS16; x++) factor[x][0] = factor[x][1] = 1.f;
  }

  // the query times `scales` in two bytes, and its product with `lows` (or its sum): for one range of each channel.
  // The lanes of a head's high and of its low bytes (4 apart) do half of the channels each, and exchange.
  DEVICE_MEMBER void slice(const u16* scales, const u16* lows) {
    const bool low_lane = (lane >> 2) & 1;
#pragma unroll
    for (int t = 0; t < TILES; t++) {
      float x[CHUNKS32][4], largest = 0.f, along = 0.f;
#pragma unroll
      for (int c = 0; c < CHUNKS32; c++) {
        const int d = 32 * c + (low_lane ? 16 : 0) + 4 * j;
        const bool real = HEAD % 32 == 0 || d < HEAD;
        const float* q = query + (4 * t + (lane >> 3)) * QS + d;
        u32 s[2] = {0, 0}, b[2] = {0, 0};
        if (scales != nullptr && real) s[0] = *(const u32*)(scales + d), s[1] = *(const u32*)(scales + d + 2);
        if (lows != nullptr && real) b[0] = *(const u32*)(lows + d), b[1] = *(const u32*)(lows + d + 2);
#pragma unroll
        for (int e = 0; e < 4; e++) {
          float y = q[e];  // zero beyond the head's channels
          if (lows != nullptr) along += y * half_to_float((u16)(b[e >> 1] >> (16 * (e & 1))));
          if (scales != nullptr) y *= half_to_float((u16)(s[e >> 1] >> (16 * (e & 1))));
          if (lows == nullptr) along += y;
          x[c][e] = y;
          largest = max_or_nan(largest, fabsf(y));
        }
      }
#pragma unroll
      for (int far = 1; far < 8; far *= 2) {
        largest = max_or_nan(largest, shuffle_xor(largest, far));
        along += shuffle_xor(along, far);
      }
      const float inverse = largest > 0.f ? MOST / largest : 0.f;
#pragma unroll
      for (int c = 0; c < CHUNKS32; c++) {
        u32 u[4];
#pragma unroll
        for (int e = 0; e < 4; e++) u[e] = fixed_point(x[c][e] * inverse);
        const u32 high = high_bytes(u), low = low_bytes(u);
        const u32 mine = low_lane ? low : high, other = shuffle(low_lane ? high : low, lane ^ 4);
        slices[t][c][0] = low_lane ? other : mine, slices[t][c][1] = low_lane ? mine : other;
      }
      unit[t] = shuffle(largest * (1.f / MOST), 8 * j);
      offset[t] = shuffle(along, 8 * j);
    }
  }

  DEVICE_MEMBER void slice_entry(const Lane& keys, i64 row, int e) {
    entry = e;
    const i64 at = row * keys.entry_stride + (i64)e * HEAD;
    slice(keys.scale + at, keys.low + at);
  }

  static DEVICE_MEMBER Ranges stored_ranges(const Store& store, i64 row, int t0) {
    const Lane &keys = store.keys, &values = store.values;
    const i64 key = row * keys.entry_stride + (GROUPED ? (i64)(t0 / KEY_ENTRY) * HEAD : t0);
    const i64 value = row * values.entry_stride + (i64)t0 * VALUE_GROUPS;
    return Ranges{keys.scale + key, keys.low + key, values.scale + value, values.low + value};
  }

  template <int MOST_NUMBERS>
  DEVICE_MEMBER void bring(u16* to, const u16* from, int count) const {
#pragma unroll
    for (int x = 0; x < MOST_NUMBERS; x += 256)
      if (x + 8 * lane < count) copy_async(to + x + 8 * lane, from + x + 8 * lane);
  }

  // the ranges of the chunk at t0, of a row of `limit` coded tokens, on their way to shared memory
  DEVICE_MEMBER void stage(const Store& store, i64 row, int t0, int limit) {
    if constexpr (STAGED) {
      coming ^= 1;
      u16* to = stages + coming * STAGE;
      const Ranges from = stored_ranges(store, row, t0);
      const int tokens = limit - t0 < NT ? limit - t0 : NT, first = t0 / KEY_ENTRY;
      if (GROUPED && (ENTRIES > 1 || first != staged)) {
        const int entries = (limit - 1) / KEY_ENTRY + 1 - first, count = (entries < ENTRIES ? entries : ENTRIES) * HEAD;
        bring<KEY_STAGE>(to, from.key_scale, count), bring<KEY_STAGE>(to + KEY_STAGE, from.key_low, count);
        staged = first;
      }
      if (KEY_FORM == TOKEN) {
        bring<KEY_STAGE>(to, from.key_scale, tokens);
        if (KEY_LOW) bring<KEY_STAGE>(to + KEY_STAGE, from.key_low, tokens);
      }
      if (VALUE_FORM == TOKEN) {
        u16* values = to + KEY_STAGE * (1 + KEY_LOW);
        bring<VALUE_STAGE>(values, from.value_scale, tokens * VALUE_GROUPS);
        if (VALUE_LOW) bring<VALUE_STAGE>(values + VALUE_STAGE, from.value_low, tokens * VALUE_GROUPS);
      }
    }
  }

  // before a chunk is worked on: its ranges are there; of values that are none, zeros
  DEVICE_MEMBER void take(const Store& store, i64 row, int t0, int limit) {
    if constexpr (STAGED) {
      wait_async();
      u16* here = stages + coming * STAGE;
      u16* values = here + KEY_STAGE * (1 + KEY_LOW);
      ranges = Ranges{here, here + KEY_STAGE, values, values + VALUE_STAGE};
      if (VALUE_FORM == TOKEN && limit - t0 < NT) {
        for (int x = (limit - t0) * VALUE_GROUPS + lane; x < VALUE_STAGE; x += 32) {
          values[x] = 0;
          if (VALUE_LOW) values[VALUE_STAGE + x] = 0;
        }
        warp_barrier();
      }
    } else {
      ranges = stored_ranges(store, row, t0);
    }
  }

  // the parameters that change from run to run
  DEVICE_MEMBER void enter(const Store& store, i64 row, int new_run) {
    if (new_run == run) return;
    if (run >= 0) leave(store, row);
    run = new_run;
    if constexpr (KEY_FORM == CHANNEL && KEY_GROUP == 0) slice_entry(store.keys, row, run);
    if constexpr (KEY_FORM == TOKEN) {
      slice(KEY_FACTOR ? store.keys.channel + (row * store.keys.runs + run) * HEAD : nullptr, nullptr);
    }
    if constexpr (SCALED) {
      load_factors(store, row);
      if (!RUNS) {  // so far in numbers, from here on in codes
#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
          for (int x = 0; x < GROUPS16; x++) out[t][x][0] /= factor[x][0], out[t][x][1] /= factor[x][1];
      }
    }
  }

  DEVICE_MEMBER void load_factors(const Store& store, i64 row) {
    const Lane& v = store.values;
    const u16* from = VALUE_FORM == CHANNEL ? v.scale + row * v.entry_stride + (i64)run * HEAD
                                            : v.channel + (row * v.runs + run) * HEAD;
#pragma unroll
    for (int x = 0; x < GROUPS16; x++) {
      if (16 * x >= HEAD) continue;
      const u32 two = *(const u32*)(from + 16 * x + 2 * r);
      factor[x][0] = half_to_float((u16)two), factor[x][1] = half_to_float((u16)(two >> 16));
      if (!RUNS) {  // a constant channel: all of its codes are 0
        if (factor[x][0] == 0.f) factor[x][0] = 1.f;
        if (factor[x][1] == 0.f) factor[x][1] = 1.f;
      }
    }
  }

  // back to numbers, with what the zero points of this run's values come to
  DEVICE_MEMBER void leave(const Store& store, i64 row) {
    if constexpr (SCALED && !RUNS) load_factors(store, row);  // not kept meanwhile
    constexpr int per = GROUPS16 / VALUE_GROUPS;
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
      for (int g = 0; g < VALUE_GROUPS; g++) {
        float total = below[t][g];
        total += shuffle_xor(total, 4);
        total += shuffle_xor(total, 8);
        total += shuffle_xor(total, 16);
        below[t][g] = 0.f;
        const float share = VALUE_LOW ? total : -VALUE_ZERO * total;
#pragma unroll
        for (int x = g * per; x < (g + 1) * per; x++) {
          if (16 * x >= HEAD) continue;
#pragma unroll
          for (int half = 0; half < 2; half++) {
            float& y = out[t][x][half];
            if constexpr (VALUE_FORM == CHANNEL) {
              const Lane& v = store.values;
              const u16 low = v.low[row * v.entry_stride + (i64)run * HEAD + 16 * x + 2 * r + half];
              y = (RUNS ? y : y * factor[x][half]) + total * half_to_float(low);
            } else if constexpr (SCALED) {
              y = RUNS ? y + share * factor[x][half] : (y + share) * factor[x][half];
            } else {
              y += share;
            }
          }
        }
      }
  }

  DEVICE_MEMBER float capped(float x, float softcap) const { return SOFTCAP ? softcap * tanhf(x / softcap) : x; }

  // logits of NT coded tokens from t0 on: [2 i + half] is token 16 i + r + 8 half, of head j
  DEVICE_MEMBER void logits(const Work& w, const Words (&k)[KEY_LOADS], int t0, float (&s)[TILES][NT / 8]) {
    float scales[NT / 8], lows[NT / 8];
    if constexpr (KEY_FORM == TOKEN) {
#pragma unroll
      for (int x = 0; x < NT / 8; x++) {
        scales[x] = KEY_STEP * half_to_float(ranges.key_scale[8 * x + r]);
        lows[x] = KEY_LOW ? half_to_float(ranges.key_low[8 * x + r]) : -KEY_ZERO * scales[x];
      }
    }
#pragma unroll
    for (int i = 0; i < NT / 16; i++) {
      if constexpr (GROUPED) {
        const int here = (t0 + 16 * i) / KEY_ENTRY, at = (here - t0 / KEY_ENTRY) * HEAD;
        if (i % 2 == 0 && here != entry) entry = here, slice(ranges.key_scale + at, ranges.key_low + at);
      }
      int c[TILES][4] = {};
      const int plane = i % KEY_PLANES;
#pragma unroll
      for (int x = 0; x < CHUNKS32; x++) {
        const Words& word = k[i / KEY_PLANES * CHUNKS32 + x];
        const u32 a[4] = {key_operand(word.x, plane), key_operand(word.y, plane), key_operand(word.z, plane),
                          key_operand(word.w, plane)};
#pragma unroll
        for (int t = 0; t < TILES; t++) mma(c[t], a[0], a[1], a[2], a[3], slices[t][x][0], slices[t][x][1]);
      }
#pragma unroll
      for (int t = 0; t < TILES; t++) {
        const float f = unit[t] * plane_factor(KEY_TABLE, KEY_BITS, plane);
#pragma unroll
        for (int half = 0; half < 2; half++) {
          float x = (float)(c[t][2 * half] * 256 + c[t][2 * half + 1]) * f;
          x = KEY_FORM == TOKEN ? x * scales[2 * i + half] + offset[t] * lows[2 * i + half] : x + offset[t];
          s[t][2 * i + half] = capped(x, w.softcap);
        }
      }
    }
  }

  // logits to probabilities relative to their own maximum; returns what they are to be multiplied by
  template <int N>
  DEVICE_MEMBER void weigh(float (&s)[TILES][N], float (&weight)[TILES]) {
#pragma unroll
    for (int t = 0; t < TILES; t++) {
      float here = LEAST, total = 0.f;
#pragma unroll
      for (int x = 0; x < N; x++) here = fmaxf(here, s[t][x]);
      here = fmaxf(here, shuffle_xor(here, 4));
      here = fmaxf(here, shuffle_xor(here, 8));
      here = fmaxf(here, shuffle_xor(here, 16));
#pragma unroll
      for (int x = 0; x < N; x++) s[t][x] = exp2_fast(s[t][x] - here), total += s[t][x];
      const float now = fmaxf(most[t], here), old = exp2_fast(most[t] - now);
      weight[t] = exp2_fast(here - now);
      most[t] = now;
      sum[t] = sum[t] * old + total * weight[t];
      if (any(old != 1.f)) {
#pragma unroll
        for (int x = 0; x < GROUPS16; x++) out[t][x][0] *= old, out[t][x][1] *= old;
#pragma unroll
        for (int g = 0; g < VALUE_GROUPS; g++) below[t][g] *= old;
      }
    }
  }

  // the weighted sum of NT coded values; s holds probabilities
  DEVICE_MEMBER void mix(const Words (&v)[VALUE_LOADS], float (&s)[TILES][NT / 8], const float (&weight)[TILES]) {
    constexpr int per = GROUPS16 / VALUE_GROUPS;
    // a byte may hold codes of two chunks of 32 tokens, which then come out multiplied by other powers of two
    constexpr bool apart = GROUPS16 % VALUE_PLANES != 0;
#pragma unroll
    for (int g = 0; g < VALUE_GROUPS; g++) {
      u32 b[TILES][NT / 32][2];
      float back[TILES];  // from integers to numbers
#pragma unroll
      for (int t = 0; t < TILES; t++) {
        float p[NT / 8], largest = 1.f, low = 0.f;
        if constexpr (VALUE_FORM == TOKEN) {
          largest = 0.f;
#pragma unroll
          for (int x = 0; x < NT / 8; x++) {
            const int at = (8 * x + r) * VALUE_GROUPS + g;
            const bool real = STAGED || s[t][x] != 0.f;
            p[x] = real ? s[t][x] * half_to_float(ranges.value_scale[at]) : 0.f;
            if (VALUE_LOW && real) low += s[t][x] * half_to_float(ranges.value_low[at]);
            largest = fmaxf(largest, p[x]);
          }
          largest = fmaxf(largest, shuffle_xor(largest, 4));
          largest = fmaxf(largest, shuffle_xor(largest, 8));
          largest = fmaxf(largest, shuffle_xor(largest, 16));
        }
        const float inverse = largest > 0.f ? MOST / largest : 0.f;
        back[t] = weight[t] * largest * (1.f / MOST);
        u32 total = 0;
#pragma unroll
        for (int i = 0; i < NT / 32; i++) {
          u32 four[4];
#pragma unroll
          for (int x = 0; x < 4; x++) {
            four[x] = fixed_point((VALUE_FORM == TOKEN ? p[4 * i + x] : s[t][4 * i + x]) * inverse);
            total += four[x] - FIXED_ZERO;
          }
          const u32 high = high_bytes(four), low_byte = low_bytes(four);
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const int from = (j + 4 * h) * 4 + (lane >> 3);
            const u32 x = shuffle(high, from), y = shuffle(low_byte, from);
            b[t][i][h] = (lane >> 2) & 1 ? y : x;
          }
        }
        if (VALUE_FORM == TOKEN && VALUE_LOW) {
          below[t][g] += low * weight[t];
        } else {  // the integers' own sum: what rounding adds must not meet the zero point
          if (VALUE_FORM == TOKEN) back[t] *= VALUE_STEP;
          below[t][g] += (float)(int)total * back[t];
        }
      }
#pragma unroll
      for (int x = g * per; x < (g + 1) * per; x++) {
        int c[TILES][4] = {};
#pragma unroll
        for (int i = 0; i < NT / 32; i++) {
          const int fragment = i * GROUPS16 + x, plane = fragment % VALUE_PLANES;
          const Words& word = v[fragment / VALUE_PLANES];
          const u32 a[4] = {value_operand(word.x, plane), value_operand(word.y, plane), value_operand(word.z, plane),
                            value_operand(word.w, plane)};
#pragma unroll
          for (int t = 0; t < TILES; t++) {
            mma(c[t], a[0], a[1], a[2], a[3], b[t][i][0], b[t][i][1]);
            if (!apart && i < NT / 32 - 1) continue;
            const float f = back[t] * plane_factor(VALUE_TABLE, VALUE_BITS, plane);
            out[t][x][0] += (float)(c[t][0] * 256 + c[t][1]) * (SCALED && RUNS ? f * factor[x][0] : f);
            out[t][x][1] += (float)(c[t][2] * 256 + c[t][3]) * (SCALED && RUNS ? f * factor[x][1] : f);
            c[t][0] = c[t][1] = c[t][2] = c[t][3] = 0;
          }
        }
      }
    }
  }

  // exact tokens: the query as numbers of 16 bits and what they leave, for head lane / 8
  DEVICE_MEMBER void split_query(u32 (&q)[TILES][CHUNKS32][4]) const {
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
      for (int c = 0; c < CHUNKS32; c++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const float* x = query + (4 * t + (lane >> 3)) * QS + 32 * c + 8 * j + 2 * e;
          const u32 high = pack_numbers(x[0], x[1]);
          const float left = x[0] - number_to_float((u16)high), right = x[1] - number_to_float((u16)(high >> 16));
          q[t][c][e] = (lane >> 2) & 1 ? pack_numbers(left, right) : high;
        }
  }

  // 16 exact tokens: rows of keys r and r + 8, pairs of channels of values j, j + 8, j + 4, j + 12; zeros where not real.
  // `from` points at a token, or nowhere
  DEVICE_MEMBER void load_keys(Words (&k)[2][CHUNKS32], const u16* const (&from)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int c = 0; c < CHUNKS32; c++) {
        k[half][c] = Words{0, 0, 0, 0};
        if (from[half] != nullptr && 32 * c + 8 * j < HEAD) k[half][c] = load_once(from[half] + 32 * c + 8 * j);
      }
  }
  DEVICE_MEMBER void load_values(u32 (&v)[4][GROUPS16], const u16* const (&from)[4]) const {
#pragma unroll
    for (int e = 0; e < 4; e++) {
#pragma unroll
      for (int x = 0; x < GROUPS16; x++) v[e][x] = 0;
      if (from[e] == nullptr) continue;
      if constexpr (WIDE) {
#pragma unroll
        for (int x = 0; x < GROUPS16; x += 4) {
          const Words four = load_once(from[e] + output_channel(x, r, 0));
          v[e][x] = four.x, v[e][x + 1] = four.y, v[e][x + 2] = four.z, v[e][x + 3] = four.w;
        }
      } else {
#pragma unroll
        for (int x = 0; x < GROUPS16; x++)
          if (16 * x < HEAD) v[e][x] = load_once_u32(from[e] + output_channel(x, r, 0));
      }
    }
  }

  DEVICE_MEMBER void exact_logits(const Words (&k)[2][CHUNKS32], const u32 (&q)[TILES][CHUNKS32][4], float softcap,
                                  float (&s)[TILES][2]) const {
#pragma unroll
    for (int t = 0; t < TILES; t++) {
      float c[4] = {};
#pragma unroll
      for (int x = 0; x < CHUNKS32; x++) {
        mma(c, k[0][x].x, k[1][x].x, k[0][x].y, k[1][x].y, q[t][x][0], q[t][x][1]);
        mma(c, k[0][x].z, k[1][x].z, k[0][x].w, k[1][x].w, q[t][x][2], q[t][x][3]);
      }
      s[t][0] = capped(c[0] + c[1], softcap), s[t][1] = capped(c[2] + c[3], softcap);
    }
  }

  DEVICE_MEMBER void exact_mix(const u32 (&v)[4][GROUPS16], const float (&p)[TILES][2], const float (&weight)[TILES]) {
#pragma unroll
    for (int t = 0; t < TILES; t++) {
      const u32 high = pack_numbers(p[t][0], p[t][1]);
      const u32 low =
          pack_numbers(p[t][0] - number_to_float((u16)high), p[t][1] - number_to_float((u16)(high >> 16)));
      u32 b[2];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int from = (j + 4 * h) * 4 + (lane >> 3);
        const u32 x = shuffle(high, from), y = shuffle(low, from);
        b[h] = (lane >> 2) & 1 ? y : x;
      }
#pragma unroll
      for (int x = 0; x < GROUPS16; x++) {
        if (16 * x >= HEAD) continue;
        float c[4] = {};
        mma(c, __byte_perm(v[0][x], v[1][x], 0x5410), __byte_perm(v[0][x], v[1][x], 0x7632),
            __byte_perm(v[2][x], v[3][x], 0x5410), __byte_perm(v[2][x], v[3][x], 0x7632), b[0], b[1]);
        out[t][x][0] += (c[0] + c[1]) * weight[t];
        out[t][x][1] += (c[2] + c[3]) * weight[t];
      }
    }
  }
};

// where part `index` of `parts` begins. A division of 64 bits takes as long as a load
DEVICE int share_of(int all, u32 index, int parts) { return (int)((u32)all * index / (u32)parts); }

// the part of the coded tokens that a block of threads and a warp take: units of some chunks of NT tokens
struct Range {
  int unit, end, chunk, last, size;
  DEVICE_MEMBER Range(int limit, const Work& w) {
    const int chunks = (limit + NT - 1) / NT, units = (chunks + w.unit - 1) / w.unit;
    unit = share_of(units, blockIdx.x, w.splits) + (int)(threadIdx.x >> 5);
    end = share_of(units, blockIdx.x + 1, w.splits);
    size = w.unit, chunk = unit * size, last = chunks;
  }
  DEVICE_MEMBER bool more() const { return unit < end && chunk < last; }
  DEVICE_MEMBER void advance() {
    if (++chunk == (unit + 1) * size) unit += WARPS, chunk = unit * size;
  }
};

DEVICE void load_codes(const Lane& lane, i64 row, int loads_per_chunk, int chunk, int x, Words& to) {
  to = load_once(lane.codes + row * lane.code_stride + ((i64)chunk * loads_per_chunk + x) * 512 + (threadIdx.x & 31) * 16);
}

// tokens of which both sides are codes
DEVICE int coded_tokens(const Store& store, i64 row) {
  const i64 keys = store.keys.coded[row], values = store.values.coded[row];
  return (int)(keys < values ? keys : values);
}

DEVICE void fetch_codes(const Lane& lane, i64 row, int loads, int chunk) {
  for (int x = 0; x < loads; x++)
    fetch(lane.codes + row * lane.code_stride + ((i64)chunk * loads + x) * 512 + (threadIdx.x & 31) * 16);
}

// the coded tokens of a part, chunk by chunk and run by run: visit(chunk's first token, begin, end, codes of the keys)
template <class Visit, class Next>
DEVICE void for_each_chunk(Warp& warp, const Work& w, i64 row, int limit, Visit visit, Next next) {
  const Store& store = w.store;
  const Lane& by_run = (KEY_FORM == CHANNEL && KEY_GROUP == 0) || KEY_FACTOR ? store.keys : store.values;
  const i64* starts = by_run.starts + row * by_run.runs;
  const int runs = BY_RUN ? by_run.runs : 1;
  int run = 0;
  Range range(limit, w);
  if (range.more()) {
    next(range.chunk);
    if (!RUNS) warp.enter(store, row, 0);
  }
  while (range.more()) {
    const int t0 = range.chunk * NT, end = limit < t0 + NT ? limit : t0 + NT;
    range.advance();
    const int following = range.more() ? range.chunk : -1;
    if (BY_RUN && RUNS) {
      while (run + 1 < runs && starts[run + 1] <= t0) run++;
      int begin = t0;
      for (int each = run; begin < end; each++) {
        const int stop = each + 1 < runs && starts[each + 1] < end ? (int)starts[each + 1] : end;
        if (stop <= begin) continue;
        warp.enter(store, row, each);
        visit(t0, begin, stop, stop == end ? following : -1);
        begin = stop;
      }
    } else {
      visit(t0, t0, end, following);
    }
  }
}

// the queries, scaled, into shared memory; `rotated`: as the codes see them
DEVICE void load_query(const Work& w, i64 row, bool rotated, float* shared) {
  const int first = blockIdx.z * ROWS;
  const float* from = rotated && !HADAMARD ? w.query.rotated : w.query.rows;
  for (int x = threadIdx.x; x < ROWS * DP; x += 32 * WARPS) {
    const int q = x / DP, d = x % DP;
    shared[q * QS + d] = query_number(w, from, row, first + q, d);
  }
  barrier();
  if constexpr (ROTATED && HADAMARD) {
    if (rotated) {
      const int lane = threadIdx.x & 31;
      for (int q = threadIdx.x >> 5; q < ROWS; q += WARPS) {
        float x[CHUNKS32];
#pragma unroll
        for (int k = 0; k < CHUNKS32; k++) x[k] = shared[q * QS + lane + 32 * k] * w.query.rotate[(lane + 32 * k) * HEAD];
        hadamard(x);
#pragma unroll
        for (int k = 0; k < CHUNKS32; k++) shared[q * QS + lane + 32 * k] = x[k];
      }
      barrier();
    }
  }
}

// the map of calibrated logits: x -> (x - least) * slope + least - affine_low, for the heads that this lane holds
DEVICE void calibration(const Work& w, i64 row, int j, float (&slope)[TILES], float (&lowest)[TILES]) {
#pragma unroll
  for (int t = 0; t < TILES; t++) {
    const int q = blockIdx.z * ROWS + 4 * t + j;
    float least = -LEAST, greatest = LEAST;
    if (q < w.query.count)
      for (int split = 0; split < w.splits; split++) {
        const i64 at = ((i64)split * gridDim.y + row) * w.query.count + q;
        least = fminf(least, w.least[at]), greatest = fmaxf(greatest, w.greatest[at]);
      }
    slope[t] = 1.f - (w.affine_high - w.affine_low) / (greatest - least + 1.442695e-8f);
    if (!w.official) slope[t] = fmaxf(slope[t], 1e-3f);
    lowest[t] = least;
  }
}

// the logits of tokens t0 ..., of which [begin, end) are real
template <int N>
DEVICE void leave_logits(const Warp& warp, const Work& w, i64 row, int t0, int begin, int end, const float (&s)[TILES][N]) {
#pragma unroll
  for (int t = 0; t < TILES; t++) {
    const int q = blockIdx.z * ROWS + 4 * t + warp.j;
    if (q >= w.query.count) continue;
    float* to = w.logits + (row * w.query.count + q) * w.logit_stride;
#pragma unroll
    for (int x = 0; x < N; x++) {
      const int token = t0 + 8 * x + warp.r;
      if (token >= begin && token < end) to[token] = s[t][x];
    }
  }
}

DEVICE void attend_codes(Warp& warp, const Work& w, i64 row, int limit) {
  Words k[KEY_LOADS], v[VALUE_LOADS];
  float slope[TILES], least[TILES];
  if (AFFINE) calibration(w, row, warp.j, slope, least);
  auto load_keys = [&](int chunk) {
#pragma unroll
    for (int x = 0; x < KEY_LOADS; x++) load_codes(w.store.keys, row, KEY_LOADS, chunk, x, k[x]);
  };
  auto load_values = [&](int chunk) {
#pragma unroll
    for (int x = 0; x < VALUE_LOADS; x++) load_codes(w.store.values, row, VALUE_LOADS, chunk, x, v[x]);
  };
  for_each_chunk(
      warp, w, row, limit,
      [&](int t0, int begin, int end, int following) {
        float s[TILES][NT / 8], weight[TILES];
        warp.take(w.store, row, t0, limit);
        if (following >= 0) warp.stage(w.store, row, following * NT, limit);
        warp.logits(w, k, t0, s);
        if (following >= 0) load_keys(following);
        if (AFFINE) {
#pragma unroll
          for (int t = 0; t < TILES; t++)
#pragma unroll
            for (int x = 0; x < NT / 8; x++) s[t][x] = (s[t][x] - least[t]) * slope[t] + (least[t] - w.affine_low);
        }
        const bool whole = end - begin == NT;
        if (!whole) {
#pragma unroll
          for (int t = 0; t < TILES; t++)
#pragma unroll
            for (int x = 0; x < NT / 8; x++) {
              const int token = t0 + 8 * x + warp.r;
              if (token < begin || token >= end) s[t][x] = -infinity();
            }
        }
        if (LOGITS) leave_logits(warp, w, row, t0, begin, end, s);
        warp.weigh(s, weight);
        warp.mix(v, s, weight);
        if (following >= 0) load_values(following);
      },
      [&](int chunk) { load_keys(chunk), load_values(chunk); });
  if (warp.run >= 0) warp.leave(w.store, row);
}

// keys of 16 tokens that are codes already while their values are exact still; slow, and few
DEVICE void coded_logits(Warp& warp, const Work& w, i64 row, int t0, float (&s)[TILES][2]) {
  if constexpr (KEY_FORM != EXACT) {
    const Lane& keys = w.store.keys;
    if constexpr (GROUPED) {
      if (t0 / KEY_ENTRY != warp.entry) warp.slice_entry(keys, row, t0 / KEY_ENTRY);
    }
    const int group = t0 / 16, shift = (KEY_TABLE ? 16 : KEY_BITS) * (group % KEY_PLANES);
    int c[TILES][4] = {};
#pragma unroll
    for (int x = 0; x < CHUNKS32; x++) {
      Words word;
      load_codes(keys, row, CHUNKS32, group / KEY_PLANES, x, word);
      const u32 a[4] = {key_operand(word.x >> shift, 0), key_operand(word.y >> shift, 0), key_operand(word.z >> shift, 0),
                        key_operand(word.w >> shift, 0)};
#pragma unroll
      for (int t = 0; t < TILES; t++) mma(c[t], a[0], a[1], a[2], a[3], warp.slices[t][x][0], warp.slices[t][x][1]);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float a = 1.f, b = 1.f;
      if constexpr (KEY_FORM == TOKEN) {
        const i64 at = row * keys.entry_stride + t0 + 8 * half + warp.r;
        a = half_to_float(keys.scale[at]) * KEY_STEP, b = KEY_LOW ? half_to_float(keys.low[at]) : -KEY_ZERO * a;
      }
#pragma unroll
      for (int t = 0; t < TILES; t++) {
        const float x = (float)(c[t][2 * half] * 256 + c[t][2 * half + 1]) * warp.unit[t];
        s[t][half] = warp.capped(x * a + warp.offset[t] * b, w.softcap);
      }
    }
  }
}

// where the exact tokens of a row lie: those that are stored, and after them the step's own
struct Exact {
  const u16 *keys, *values, *fresh_keys, *fresh_values;
  i64 fresh_key_stride, fresh_value_stride;
  int length, key_ring, value_ring, key_behind, value_behind;
  DEVICE_MEMBER Exact(const Work& w, i64 row) {
    const Lane &k = w.store.keys, &v = w.store.values;
    const Fresh& fresh = w.fresh;
    const u32 batch = (u32)row / w.heads, head = (u32)row % w.heads;
    keys = k.exact + row * k.exact_room * HEAD, values = v.exact + row * v.exact_room * HEAD;
    fresh_keys = fresh.keys + batch * fresh.key_strides[0] + head * fresh.key_strides[1];
    fresh_values = fresh.values + batch * fresh.value_strides[0] + head * fresh.value_strides[1];
    fresh_key_stride = fresh.key_strides[2], fresh_value_stride = fresh.value_strides[2];
    length = (int)w.store.length[row], key_ring = k.ring, value_ring = v.ring;
    key_behind = whole_rings(k, row), value_behind = whole_rings(v, row);
  }
  // the first tokens that are exact lie a ring's worth at most behind the last: one division is enough
  static DEVICE_MEMBER int whole_rings(const Lane& lane, i64 row) {
    return CODED && lane.ring ? (int)lane.coded[row] / lane.ring * lane.ring : 0;
  }
  DEVICE_MEMBER const u16* key(int t) const {
    return t < length ? keys + slot(t - key_behind, key_ring) * HEAD : fresh_keys + (t - length) * fresh_key_stride;
  }
  DEVICE_MEMBER const u16* value(int t) const {
    return t < length ? values + slot(t - value_behind, value_ring) * HEAD : fresh_values + (t - length) * fresh_value_stride;
  }
  static DEVICE_MEMBER i64 slot(int t, int ring) { return CODED && ring && t >= ring ? t - ring : t; }
};

// tokens [begin, end), 16 at a time, of which this warp takes the `first`-th and every `step`-th further one; keys before
// `coded` are codes
DEVICE void attend_exact(Warp& warp, const Work& w, i64 row, const Exact& exact, int begin, int end, int coded, int first,
                         int step, const u32 (&q)[TILES][CHUNKS32][4]) {
  Words k[2][CHUNKS32];
  u32 v[4][GROUPS16];
  auto load_keys = [&](int t0) {
    const u16* from[2];
    for (int half = 0; half < 2; half++) {
      const int t = t0 + warp.r + 8 * half;
      from[half] = t >= begin && t < end && t >= coded ? exact.key(t) : nullptr;
    }
    warp.load_keys(k, from);
  };
  auto load_values = [&](int t0) {
    const u16* from[4];
    for (int e = 0; e < 4; e++) {
      const int t = t0 + warp.j + 4 * (e >> 1) + 8 * (e & 1);
      from[e] = t >= begin && t < end ? exact.value(t) : nullptr;
    }
    warp.load_values(v, from);
  };
  int t0 = begin / 16 * 16 + 16 * first;
  if (t0 < end) load_keys(t0), load_values(t0);
  for (; t0 < end; t0 += 16 * step) {
    float s[TILES][2], weight[TILES];
    warp.exact_logits(k, q, w.softcap, s);
    if (t0 < coded) {
      float other[TILES][2] = {};
      coded_logits(warp, w, row, t0, other);
#pragma unroll
      for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int half = 0; half < 2; half++)
          if (t0 + warp.r + 8 * half < coded) s[t][half] = other[t][half];
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int token = t0 + warp.r + 8 * half;
#pragma unroll
      for (int t = 0; t < TILES; t++)
        if (token < begin || token >= end) s[t][half] = -infinity();
    }
    const int following = t0 + 16 * step;
    if (following < end) load_keys(following);
    if (LOGITS) leave_logits(warp, w, row, t0, begin, end, s);
    warp.weigh(s, weight);
    warp.exact_mix(v, s, weight);
    if (following < end) load_values(following);
  }
}

// this warp's share of what is exact: of the stored tokens, and the step's own
DEVICE void attend_all_exact(Warp& warp, const Work& w, i64 row, const Exact& exact) {
  const Lane &keys = w.store.keys, &values = w.store.values;
  u32 q[TILES][CHUNKS32][4];
  warp.split_query(q);
  const int end = exact.length + w.fresh.count, index = threadIdx.x >> 5;
  if constexpr (CODED) {  // of rotated codes one part has all of it; else the parts of the codes share it
    const int share = ROTATED ? index : (int)blockIdx.x * WARPS + index, shares = ROTATED ? WARPS : w.splits * WARPS;
    const int coded_keys = (int)keys.coded[row], coded_values = (int)values.coded[row];
    const int begin = coded_keys < coded_values ? coded_keys : coded_values;
    if (KEY_FORM == TOKEN && begin < coded_keys) warp.slice(nullptr, nullptr);  // keys ahead of values have no factors
    attend_exact(warp, w, row, exact, begin, end, coded_keys, share, shares, q);
  } else {  // neighbours for one block of threads
    const int groups = (end + 15) / 16;
    const int begin = 16 * share_of(groups, blockIdx.x, w.splits), stop = 16 * share_of(groups, blockIdx.x + 1, w.splits);
    attend_exact(warp, w, row, exact, begin, stop < end ? stop : end, 0, index, WARPS, q);
  }
}

// what a block of threads shares: ranges on their way, and at the end what its warps found
union alignas(16) Shared {
  u16 stages[WARPS][2][STAGED ? STAGE : 8];
  float outs[WARPS][ROWS][HEAD];
};

KERNEL(32 * WARPS, BLOCKS) attend(const Work w) {
  SHARED float query[ROWS * QS], sums[WARPS][ROWS], mosts[WARPS][ROWS];
  SHARED Shared shared;
  const i64 row = blockIdx.y;
  const bool codes = CODED && (!ROTATED || blockIdx.x < w.splits);
  const int limit = CODED ? coded_tokens(w.store, row) : 0;
  Warp warp;
  warp.begin(query, shared.stages[threadIdx.x >> 5][0]);
  if constexpr (CODED) {  // the first bytes come while the query is scaled
    const Range range(limit, w);
    if (codes && range.more()) {
      fetch_codes(w.store.keys, row, KEY_LOADS, range.chunk), fetch_codes(w.store.values, row, VALUE_LOADS, range.chunk);
      warp.stage(w.store, row, range.chunk * NT, limit);
    }
  }
  const Exact exact(w, row);
  load_query(w, row, ROTATED && codes, query);
  const bool some = !CODED || w.store.values.ring || w.fresh.count;  // values wait at least as long as keys
  if (some && (!ROTATED || !codes)) attend_all_exact(warp, w, row, exact);
  if constexpr (CODED) {
    if (codes) attend_codes(warp, w, row, limit);
    if (STAGED) barrier();  // what follows lies where ranges lay
  }
  const int index = threadIdx.x >> 5;
#pragma unroll
  for (int t = 0; t < TILES; t++) {
    float total = warp.sum[t];
    total += shuffle_xor(total, 4);
    total += shuffle_xor(total, 8);
    total += shuffle_xor(total, 16);
    const int q = 4 * t + warp.j;
    if (warp.r == 0) mosts[index][q] = warp.most[t], sums[index][q] = total;
#pragma unroll
    for (int x = 0; x < GROUPS16; x++) {
      if (16 * x >= HEAD) continue;
      shared.outs[index][q][output_channel(x, warp.r, 0)] = warp.out[t][x][0];
      shared.outs[index][q][output_channel(x, warp.r, 1)] = warp.out[t][x][1];
    }
  }
  barrier();
  write_part<WARPS, ROWS>(w, row, mosts[0], sums[0], shared.outs[0][0]);
}

#if AFFINE
// the least and the greatest logit of each query over a part of the codes, before they are mapped
KERNEL(32 * WARPS, BLOCKS) ranges(const Work w) {
  SHARED float query[ROWS * QS], leasts[WARPS][ROWS], greatests[WARPS][ROWS];
  SHARED Shared shared;
  const i64 row = blockIdx.y;
  const int limit = coded_tokens(w.store, row);
  Warp warp;
  warp.begin(query, shared.stages[threadIdx.x >> 5][0]);
  const Range range(limit, w);
  if (range.more()) warp.stage(w.store, row, range.chunk * NT, limit);
  load_query(w, row, ROTATED, query);
  float least[TILES], greatest[TILES];
#pragma unroll
  for (int t = 0; t < TILES; t++) least[t] = -LEAST, greatest[t] = LEAST;
  Words k[KEY_LOADS];
  auto load_keys = [&](int chunk) {
#pragma unroll
    for (int x = 0; x < KEY_LOADS; x++) load_codes(w.store.keys, row, KEY_LOADS, chunk, x, k[x]);
  };
  for_each_chunk(
      warp, w, row, limit,
      [&](int t0, int begin, int end, int following) {
        float s[TILES][NT / 8];
        warp.take(w.store, row, t0, limit);
        if (following >= 0) warp.stage(w.store, row, following * NT, limit);
        warp.logits(w, k, t0, s);
        if (following >= 0) load_keys(following);
#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
          for (int x = 0; x < NT / 8; x++) {
            const int token = t0 + 8 * x + warp.r;
            if (token >= begin && token < end) least[t] = fminf(least[t], s[t][x]), greatest[t] = fmaxf(greatest[t], s[t][x]);
          }
      },
      load_keys);
  const int index = threadIdx.x >> 5;
#pragma unroll
  for (int t = 0; t < TILES; t++) {
#pragma unroll
    for (int far = 4; far < 32; far *= 2) {
      least[t] = fminf(least[t], shuffle_xor(least[t], far));
      greatest[t] = fmaxf(greatest[t], shuffle_xor(greatest[t], far));
    }
    if (warp.r == 0) leasts[index][4 * t + warp.j] = least[t], greatests[index][4 * t + warp.j] = greatest[t];
  }
  barrier();
  const int q = threadIdx.x, first = blockIdx.z * ROWS;
  if (q < ROWS && first + q < w.query.count) {
    float low = leasts[0][q], high = greatests[0][q];
    for (int i = 1; i < WARPS; i++) low = fminf(low, leasts[i][q]), high = fmaxf(high, greatests[i][q]);
    const i64 at = ((i64)blockIdx.x * gridDim.y + row) * w.query.count + first + q;
    w.least[at] = low, w.greatest[at] = high;
  }
}
#endif

// Attention over codes of coupled channels (codecs/coupled.py): a code points to a learned vector, its centroid.
//
// A block of threads takes a part of one KV head's codes, for four of its queries. In its shared memory lie
//   scores   [key codes][key groups], 8 bytes: the products of the four queries with a centroid, as 15-bit integers of a
//            common unit above the group's least: a token's logits are sums of them. A lane has a token, and lanes begin
//            with different groups, which are different banks.
//   vectors  [value codes][copies][value groups]: the centroids of the values, left operand of the 16-bit product as they
//            lie. A row of it is a pair of channels, a column one channel of the pair in one token; in the right operand, the
//            probabilities, a pair's channels are columns of their own, with zeros where the other one's rows are. Lanes
//            that meet in a token's group read another group first, or another copy.
// The last block, if anything is exact, takes the ring and the step's own tokens.
//
// Compiled for HEAD channels, NUMBER 0 bfloat16 or 1 float16, SOFTCAP, WARPS, POOL_BYTES, and of each side BITS and COUPLED;
// COPIES of the vectors, 0 = they are read from global memory.
#include "attention/streams.cuh"

constexpr int KEY_CODES = 1 << KEY_BITS, KEY_GROUPS = HEAD / KEY_COUPLED, KEY_BYTES = (KEY_GROUPS * KEY_BITS + 7) / 8;
constexpr int VALUE_CODES = 1 << VALUE_BITS, VALUE_GROUPS = HEAD / VALUE_COUPLED;
constexpr int VALUE_BYTES = (VALUE_GROUPS * VALUE_BITS + 7) / 8;
constexpr bool WIDE = HEAD % 64 == 0 && (VALUE_COUPLED == 2 || VALUE_COUPLED == 4 || VALUE_COUPLED == 8);
constexpr int RUN = WIDE ? VALUE_COUPLED : 2, RUNS = HEAD / 8 / RUN;  // neighbouring channels that a lane reads at once
constexpr bool TURNS = WIDE && (RUNS & (RUNS - 1)) == 0;
constexpr int APART = 16 / RUN * RUNS;  // groups that lanes of one access read, of which each copy has its own banks
constexpr int STEPS = 32767;            // of a score

constexpr int SCORES_AT = 0, VECTORS_AT = SCORES_AT + KEY_CODES * KEY_GROUPS * 8;
constexpr int WARPS_AT = VECTORS_AT + COPIES * VALUE_CODES * HEAD * 2;
constexpr int STAGES = 2 * TOKENS * (pitch(KEY_BYTES) + pitch(VALUE_BYTES)), WARP_BYTES = STAGES + TOKENS * ROWS * 2;
static_assert(WARPS_AT + WARPS * WARP_BYTES <= POOL_BYTES && WARPS * ROWS * HEAD * 4 <= POOL_BYTES, "as lookup.py counts");

// products of the queries with a centroid of the keys
DEVICE void products(const Work& w, i64 head, const float* query, int group, int code, float (&s)[ROWS]) {
  using Centroid = Vector<KEY_COUPLED / 2>;
  const Centroid centroid = ((const Centroid*)w.store.keys.learned)[(head * KEY_GROUPS + group) * KEY_CODES + code];
#pragma unroll
  for (int q = 0; q < ROWS; q++) {
    s[q] = 0.f;
#pragma unroll
    for (int c = 0; c < KEY_COUPLED; c++)
      s[q] += query[q * HEAD + group * KEY_COUPLED + c] * half_to_float((u16)(centroid.word[c / 2] >> (16 * (c & 1))));
  }
}

// the tables of a head; unit, offset [ROWS]: a logit is unit * sum of scores + offset
DEVICE void make_tables(const Work& w, i64 head, const float* query, u8* pool, float* unit, float* offset) {
  SHARED float least[KEY_GROUPS][ROWS], range[KEY_GROUPS][ROWS];
  const int lane = threadIdx.x & 31;
  for (int group = threadIdx.x >> 5; group < KEY_GROUPS; group += WARPS) {
    float low[ROWS], high[ROWS];
#pragma unroll
    for (int q = 0; q < ROWS; q++) low[q] = infinity(), high[q] = -infinity();
    for (int code = lane; code < KEY_CODES; code += 32) {
      float s[ROWS];
      products(w, head, query, group, code, s);
#pragma unroll
      for (int q = 0; q < ROWS; q++) low[q] = fminf(low[q], s[q]), high[q] = max_or_nan(high[q], s[q]);
    }
#pragma unroll
    for (int q = 0; q < ROWS; q++) {
#pragma unroll
      for (int far = 1; far < 32; far *= 2) {
        low[q] = fminf(low[q], shuffle_xor(low[q], far));
        high[q] = max_or_nan(high[q], shuffle_xor(high[q], far));
      }
      if (lane == 0) least[group][q] = low[q], range[group][q] = high[q] - low[q];
    }
  }
  barrier();
  if (threadIdx.x < ROWS) {
    float most = 0.f, total = 0.f;
    for (int group = 0; group < KEY_GROUPS; group++) {
      most = max_or_nan(most, range[group][threadIdx.x]);
      total += least[group][threadIdx.x];
    }
    unit[threadIdx.x] = most / STEPS, offset[threadIdx.x] = total;
  }
  barrier();
  float inverse[ROWS];
#pragma unroll
  for (int q = 0; q < ROWS; q++) inverse[q] = unit[q] > 0.f ? 1.f / unit[q] : 0.f;
  for (int x = threadIdx.x; x < KEY_CODES * KEY_GROUPS; x += THREADS) {
    const int group = x % KEY_GROUPS;
    float s[ROWS];
    products(w, head, query, group, x / KEY_GROUPS, s);
    u32 score[ROWS];
#pragma unroll
    for (int q = 0; q < ROWS; q++)
      score[q] = __float_as_uint((s[q] - least[group][q]) * inverse[q] + 8388608.f) & 0x7fffu;  // 2^23: to an integer
    ((Vector<2>*)(pool + SCORES_AT))[x] = Vector<2>{score[0] | score[1] << 16, score[2] | score[3] << 16};
  }
  using Centroid = Vector<VALUE_COUPLED / 2>;
  const Centroid* centroids = (const Centroid*)w.store.values.learned + head * VALUE_GROUPS * VALUE_CODES;
  for (int x = threadIdx.x; COPIES && x < VALUE_CODES * VALUE_GROUPS; x += THREADS) {
    const int group = x % VALUE_GROUPS, code = x / VALUE_GROUPS;
    const Centroid centroid = centroids[group * VALUE_CODES + code];
    for (int copy = 0; copy < COPIES; copy++)
      ((Centroid*)(pool + VECTORS_AT))[(code * COPIES + copy) * VALUE_GROUPS + (group ^ copy * APART)] = centroid;
  }
  barrier();
}

// sums of a token's scores; codes: its own
DEVICE void add_scores(const u8* pool, const u8* codes, int (&total)[ROWS]) {
  const Vector<2>* scores = (const Vector<2>*)(pool + SCORES_AT);
  const int lane = threadIdx.x & 31;
  auto add = [&](u32 two, u32 other) {  // of four queries, two in a word
    total[0] += two & 0xffffu, total[1] += two >> 16;
    total[2] += other & 0xffffu, total[3] += other >> 16;
  };
  if constexpr (KEY_BITS == 8 && KEY_GROUPS % 16 == 0) {
    const u32 selector = 0x3210u ^ 0x1111u * (lane & 3);
#pragma unroll
    for (int first = 0; first < KEY_GROUPS; first += 16) {
      // byte s becomes that of group s ^ lane
      const Vector<4> v = *(const Vector<4>*)(codes + first);
      u32 x[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const u32 near = lane & 4 ? v.word[i ^ 1] : v.word[i], far = lane & 4 ? v.word[i ^ 3] : v.word[i ^ 2];
        x[i] = __byte_perm(lane & 8 ? far : near, 0, selector);
      }
#pragma unroll
      for (int s = 0; s < 16; s += 2) {
        const int one = (int)(x[s / 4] >> (8 * (s % 4)) & 255), two = (int)(x[s / 4] >> (8 * (s % 4) + 8) & 255);
        const Vector<2> a = scores[one * KEY_GROUPS + first + (s ^ (lane & 15))];
        const Vector<2> b = scores[two * KEY_GROUPS + first + (s + 1 ^ (lane & 15))];
        add(a.word[0] + b.word[0], a.word[1] + b.word[1]);  // two of 15 bits fit 16
      }
    }
  } else {
    constexpr int MASK = (KEY_GROUPS & -KEY_GROUPS) - 1 & 15;
#pragma unroll 4
    for (int group = 0; group < KEY_GROUPS; group++) {
      const int own = group ^ (lane & MASK);
      const Vector<2> a = scores[code_at<KEY_BITS>(codes, own) * KEY_GROUPS + own];
      add(a.word[0], a.word[1]);
    }
  }
}

// pairs of channels of one token that this lane holds, [WORDS]
DEVICE void read_vectors(const Work& w, i64 head, const u8* pool, const u8* codes, u32 (&words)[2 * TILES]) {
  const int lane = threadIdx.x & 31, r = lane >> 2, j = lane & 3;
  const int turn = TURNS ? (RUNS > 4 ? 2 * j + (r >> 2) : j) & (RUNS - 1) : 0;
  const int copy = COPIES > 1 ? j / RUNS % COPIES : 0;
  Vector<RUN / 2> v[RUNS];
#pragma unroll
  for (int i = 0; i < RUNS; i++) {
    const int channel = WIDE ? (r * RUNS + (i ^ turn)) * RUN : 16 * i + 2 * r, group = channel / VALUE_COUPLED;
    const int code = code_at<VALUE_BITS>(codes, group);
    const int at = COPIES ? (code * COPIES + copy) * VALUE_GROUPS + (group ^ copy * APART)
                          : ((int)head * VALUE_GROUPS + group) * VALUE_CODES + code;
    const u8* table = COPIES ? pool + VECTORS_AT : (const u8*)w.store.values.learned;
    v[i] = *(const Vector<RUN / 2>*)(table + at * (2 * VALUE_COUPLED) + channel % VALUE_COUPLED * 2);
  }
#pragma unroll
  for (int far = 1; TURNS && far < RUNS; far *= 2)
#pragma unroll
    for (int i = 0; i < RUNS; i++)
      if (!(i & far)) {
#pragma unroll
        for (int e = 0; e < RUN / 2; e++) {
          const u32 x = v[i].word[e], y = v[i | far].word[e];
          v[i].word[e] = turn & far ? y : x, v[i | far].word[e] = turn & far ? x : y;
        }
      }
#pragma unroll
  for (int i = 0; i < RUNS; i++)
#pragma unroll
    for (int e = 0; e < RUN / 2; e++) words[i * (RUN / 2) + e] = v[i].word[e];
  if (WORDS % 2) words[WORDS] = 0;
}

DEVICE void attend_codes(const Work& w, i64 row, const float* query, u8* pool, Sums& sums) {
  SHARED float units[ROWS], offsets[ROWS];
  const int lane = threadIdx.x & 31, j = lane & 3, limit = (int)w.store.keys.coded[row];
  const i64 head = row % w.heads;
  u8* stages = pool + WARPS_AT + (threadIdx.x >> 5) * WARP_BYTES;
  u16* shares = (u16*)(stages + STAGES);  // [TOKENS][ROWS] float16
  float unit[ROWS], offset[ROWS];
  auto prepare = [&] {
    make_tables(w, head, query, pool, units, offsets);
#pragma unroll
    for (int q = 0; q < ROWS; q++) unit[q] = units[q], offset[q] = offsets[q];
  };
  for_each_chunk<KEY_BYTES, VALUE_BYTES>(w, row, stages, prepare, [&](int chunk, const u8* keys, const u8* values) {
    int total[ROWS] = {};
    add_scores(pool, keys + lane * pitch(KEY_BYTES), total);
    float s[ROWS];
#pragma unroll
    for (int q = 0; q < ROWS; q++) s[q] = (float)total[q] * unit[q] + offset[q];
    sums.weigh(w, chunk * TOKENS + lane < limit, s, [](int, float) {});
    u32 p[ROWS];
#pragma unroll
    for (int q = 0; q < ROWS; q++) p[q] = float_to_half(s[q]);
    ((Vector<2>*)shares)[lane] = Vector<2>{p[0] | p[1] << 16, p[2] | p[3] << 16};
    warp_barrier();
#pragma unroll
    for (int first = 0; first < TOKENS; first += 8) {
      const int t = first + j;
      u32 a[2 * TILES], b[2 * TILES];
      read_vectors(w, head, pool, values + t * pitch(VALUE_BYTES), a);
      read_vectors(w, head, pool, values + (t + 4) * pitch(VALUE_BYTES), b);
      sums.mix(shares + t * ROWS, a, b);
    }
  });
}

KERNEL(THREADS, 1) attend(const Work w) {
  POOL(pool, POOL_BYTES);
  attend_part(w, pool, [&](i64 row, const float* query, Sums& sums) { attend_codes(w, row, query, pool, sums); },
              [](int x, int r) { return WIDE ? r * (HEAD / 8) + 2 * x : 16 * x + 2 * r; });
}

// Tokens into codes of coupled channels (codecs/coupled.py): `append` for the token of a decode step, `encode` for many.
//
// The code of a group is the nearest of its centroids, found by |c|^2 / 2 - x . c; codes of a token lie as a stream of bits.
// Compiled for HEAD, NUMBER, and of each side (for `encode`: of the one that is written, as KEY) BITS and COUPLED.
#include "encode/append.cuh"

constexpr int THREADS = 128, WARPS = THREADS / 32, AT_ONCE = 256;  // centroids of a group in shared memory

template <int N>
struct alignas(N % 4 == 0 ? 16 : N % 2 == 0 ? 8 : 4) Vector {
  u32 word[N];
};
template <int BITS, int COUPLED>
struct Of {
  static constexpr int bits = BITS, coupled = COUPLED, count = 1 << BITS, groups = HEAD / COUPLED;
  static constexpr int bytes = (groups * BITS + 7) / 8;
  using Centroid = Vector<COUPLED / 2>;
};
using Keys = Of<KEY_BITS, KEY_COUPLED>;

struct Side {           // a lane to be written; a row is a KV head of a sequence
  u8* codes;            // as in `struct Lane` of warp.cuh
  u16* exact;
  i64* coded;
  const void* learned;
  i64 code_stride, exact_room;
  int ring;
};

struct Append {
  Side keys, values;
  StepEnd end;
};

struct Writing {        // of one side
  Side side;
  const u16* x;         // [batch][heads][tokens][channels]
  const i64* count;     // [rows], how many of the tokens are the row's; null = all
  i64 strides[3];
  int heads, tokens;
};

// byte `at` of a token's stream
template <class O>
DEVICE u8 stream_byte(const u16* codes, int at) {
  if (O::bits == 8) return (u8)codes[at];
  u32 byte = 0;
  for (int bit = 0; bit < 8; bit++) {
    const int place = 8 * at + bit, group = place / O::bits;
    if (group < O::groups) byte |= (u32)(codes[group] >> place % O::bits & 1) << bit;
  }
  return (u8)byte;
}

#if APPENDS
// one token, by a block of threads: a warp takes a group in turn, its lanes the group's centroids
template <class O>
DEVICE void encode_token(const Side& side, i64 row, i64 head, int slot, const u16* token) {
  SHARED float x[HEAD];
  SHARED u16 codes[O::groups];
  const int lane = threadIdx.x & 31;
  for (int d = threadIdx.x; d < HEAD; d += THREADS) x[d] = number_to_float(token[d]);
  barrier();
  for (int group = threadIdx.x >> 5; group < O::groups; group += WARPS) {
    const auto* centroids = (const typename O::Centroid*)side.learned + (head * O::groups + group) * O::count;
    float least = infinity();
    int nearest = 0;
#pragma unroll 4
    for (int code = lane; code < O::count; code += 32) {
      const auto centroid = centroids[code];
      float norm = 0.f, along = 0.f;
#pragma unroll
      for (int c = 0; c < O::coupled; c++) {
        const float y = half_to_float((u16)(centroid.word[c / 2] >> (16 * (c & 1))));
        norm += y * y, along += x[group * O::coupled + c] * y;
      }
      const float distance = norm / 2 - along;
      if (distance < least) least = distance, nearest = code;
    }
#pragma unroll
    for (int far = 1; far < 32; far *= 2) {
      const float other = shuffle_xor(least, far);
      const int code = (int)shuffle((u32)nearest, lane ^ far);
      if (other < least || (other == least && code < nearest)) least = other, nearest = code;
    }
    if (lane == 0) codes[group] = (u16)nearest;
  }
  barrier();
  for (int at = threadIdx.x; at < O::bytes; at += THREADS)
    side.codes[row * side.code_stride + (i64)slot * O::bytes + at] = stream_byte<O>(codes, at);
}

// the oldest exact token becomes codes once the ring is full, and the new one takes its place
template <class O>
DEVICE void append_to(const Side& side, i64 row, i64 head, int slot, const u16* token) {
  const int coded = (int)side.coded[row];
  u16* place = side.exact + row * side.exact_room * HEAD + (side.ring ? slot % side.ring : 0) * HEAD;
  if (slot - coded >= side.ring) {
    encode_token<O>(side, row, head, coded, side.ring ? place : token);
    if (threadIdx.x == 0) side.coded[row] = coded + 1;
  }
  if (side.ring)
    for (int d = threadIdx.x; d < HEAD; d += THREADS) place[d] = token[d];
}

KERNEL(THREADS, 4) append(const Append w) {
  using Values = Of<VALUE_BITS, VALUE_COUPLED>;
  end_step(
      w.end, [&](i64 row, int head, int slot, const u16* token) { append_to<Keys>(w.keys, row, head, slot, token); },
      [&](i64 row, int head, int slot, const u16* token) { append_to<Values>(w.values, row, head, slot, token); });
}
#else
// a token for each thread; centroids come to shared memory some at a time, with half of their squared length
KERNEL(THREADS, 4) encode(const Writing w) {
  constexpr int COUPLED = Keys::coupled, COUNT = Keys::count, PART = COUNT < AT_ONCE ? COUNT : AT_ONCE;
  SHARED float table[PART][COUPLED], half_norms[PART];
  SHARED u16 codes[THREADS][Keys::groups];
  const i64 row = blockIdx.x, head = row % w.heads;
  const int first = blockIdx.y * THREADS, mine = first + threadIdx.x;
  const int count = w.count == nullptr ? w.tokens : (int)w.count[row];
  if (first >= count) return;
  const u16* token = w.x + row / w.heads * w.strides[0] + head * w.strides[1] + (mine < count ? mine : first) * w.strides[2];
  for (int group = 0; group < Keys::groups; group++) {
    const auto* centroids = (const Keys::Centroid*)w.side.learned + (head * Keys::groups + group) * COUNT;
    float x[COUPLED], least = infinity();
    int nearest = 0;
#pragma unroll
    for (int c = 0; c < COUPLED; c++) x[c] = number_to_float(token[group * COUPLED + c]);
    for (int base = 0; base < COUNT; base += PART) {
      barrier();  // the part before has been read
      for (int code = threadIdx.x; code < PART; code += THREADS) {
        const auto centroid = centroids[base + code];
        float norm = 0.f;
#pragma unroll
        for (int c = 0; c < COUPLED; c++) {
          const float y = half_to_float((u16)(centroid.word[c / 2] >> (16 * (c & 1))));
          table[code][c] = y, norm += y * y;
        }
        half_norms[code] = norm / 2;
      }
      barrier();
#pragma unroll 4
      for (int code = 0; code < PART; code++) {
        float along = 0.f;
#pragma unroll
        for (int c = 0; c < COUPLED; c++) along += x[c] * table[code][c];
        const float distance = half_norms[code] - along;
        if (distance < least) least = distance, nearest = base + code;
      }
    }
    codes[threadIdx.x][group] = (u16)nearest;
  }
  barrier();
  const int slot = (int)w.side.coded[row] + first, tokens = count - first < THREADS ? count - first : THREADS;
  u8* to = w.side.codes + row * w.side.code_stride + (i64)slot * Keys::bytes;  // tokens one after another
  for (int at = threadIdx.x; at < tokens * Keys::bytes; at += THREADS)
    to[at] = stream_byte<Keys>(codes[at / Keys::bytes], at % Keys::bytes);
}
#endif

// What attention over codes that lie token by token shares (lookup.cu, levels.cu): four queries a block of threads; 32 tokens at
// a time for a warp, a lane each, whose codes come to shared memory ahead; probabilities on the way to the product with values;
// and the exact tokens beside the codes.
#pragma once
#include "attention/work.cuh"

constexpr int THREADS = 32 * WARPS, ROWS = 4, TOKENS = 32;
constexpr int WORDS = HEAD / 16, TILES = (WORDS + 1) / 2;  // pairs of channels of a lane; products
constexpr float SLACK = 8.f;  // how far logits may exceed the maximum that probabilities are relative to

template <int N>
struct alignas(N % 4 == 0 ? 16 : N % 2 == 0 ? 8 : 4) Vector {
  u32 word[N];
};

// bytes from one token's codes to the next in shared memory: lanes that read 16 of their own meet in no bank
DEVICE constexpr int pitch(int bytes) { return bytes % 32 == 0 ? bytes + 16 : bytes; }

// code `group` of a token, whose stream of bits begins at `from`
template <int BITS>
DEVICE int code_at(const u8* from, int group) {
  if constexpr (BITS == 8) return from[group];
  const int bit = group * BITS;
  u32 x = from[bit >> 3] | (u32)from[(bit >> 3) + 1] << 8;
  if (BITS > 9) x |= (u32)from[(bit >> 3) + 2] << 16;
  return (int)(x >> (bit & 7) & ((1u << BITS) - 1));
}

// 32 tokens' codes of one side, on their way
template <int BYTES>
DEVICE void fetch_codes(const Lane& lane, i64 row, int chunk, u8* to) {
  const u8* from = lane.codes + row * lane.code_stride + (i64)chunk * TOKENS * BYTES;
  for (int x = 16 * (threadIdx.x & 31); x < TOKENS * BYTES; x += 512)
    copy_async(to + (pitch(BYTES) == BYTES ? x : x / BYTES * pitch(BYTES) + x % BYTES), from + x);
}

// the coded tokens of a part, 32 at a time: prepare() once the first are on their way, then visit(chunk, its codes of keys, of values)
template <int KEY_BYTES, int VALUE_BYTES, class Prepare, class Visit>
DEVICE void for_each_chunk(const Work& w, i64 row, u8* stages, Prepare prepare, Visit visit) {
  constexpr int KEYS = TOKENS * pitch(KEY_BYTES), STAGE = KEYS + TOKENS * pitch(VALUE_BYTES);
  const int chunks = ((int)w.store.keys.coded[row] + TOKENS - 1) / TOKENS;
  int chunk = (int)((i64)chunks * blockIdx.x / w.splits);
  const int end = (int)((i64)chunks * (blockIdx.x + 1) / w.splits);
  if (chunk >= end) return;
  auto fetch_both = [&](int which, u8* to) {
    fetch_codes<KEY_BYTES>(w.store.keys, row, which, to);
    fetch_codes<VALUE_BYTES>(w.store.values, row, which, to + KEYS);
  };
  chunk += threadIdx.x >> 5;
  if (chunk < end) fetch_both(chunk, stages);
  prepare();
  for (int buffer = 0; chunk < end; chunk += WARPS, buffer ^= 1) {
    const u8* stage = stages + buffer * STAGE;
    wait_async();  // and every lane is done with the other buffer
    if (chunk + WARPS < end) fetch_both(chunk + WARPS, stages + (buffer ^ 1) * STAGE);
    visit(chunk, stage, stage + KEYS);
  }
}

// a warp's sums: of a lane's own token with each query; out, of query lane % 4, over all of them
struct Sums {
  float most[ROWS], sum[ROWS], out[TILES][4];
  DEVICE_MEMBER Sums() : out{} {
#pragma unroll
    for (int q = 0; q < ROWS; q++) most[q] = LEAST, sum[q] = 0.f;
  }
  // logits (base 2, before the cap) of this lane's token to probabilities relative to `most`; changed(query, factor) where that grows
  template <class Changed>
  DEVICE_MEMBER void weigh(const Work& w, bool real, float (&s)[ROWS], Changed changed) {
    bool above = false;
#pragma unroll
    for (int q = 0; q < ROWS; q++) {
      if (SOFTCAP) s[q] = w.softcap * tanhf(s[q] / w.softcap);
      if (!real) s[q] = -infinity();
      above |= s[q] > most[q] + SLACK;
    }
    if (any(above)) {
      const int j = threadIdx.x & 3;
      float mine = 1.f;
#pragma unroll
      for (int q = 0; q < ROWS; q++) {
        float now = fmaxf(most[q], s[q]);
#pragma unroll
        for (int far = 1; far < 32; far *= 2) now = fmaxf(now, shuffle_xor(now, far));
        const float old = exp2_fast(most[q] - now);
        most[q] = now, sum[q] *= old;
        changed(q, old);
        if (q == j) mine = old;
      }
      rescale(mine);
    }
#pragma unroll
    for (int q = 0; q < ROWS; q++) s[q] = exp2_fast(s[q] - most[q]), sum[q] += s[q];
  }
  // pairs of channels a of a token j and b of the fourth after it, with their probabilities [ROWS] float16. A row of the product is a
  // pair, a column of it one channel of the pair in one token; columns of the probabilities are a query's for a pair's first
  // channel and for its second, with zeros where the other's numbers are
  DEVICE_MEMBER void mix(const u16* shares, const u32 (&a)[2 * TILES], const u32 (&b)[2 * TILES]) {
    const int r = (threadIdx.x & 31) >> 2;
    const u32 one = (u32)shares[r >> 1] << (16 * (r & 1)), other = (u32)shares[4 * ROWS + (r >> 1)] << (16 * (r & 1));
#pragma unroll
    for (int x = 0; x < TILES; x++) mma_half(out[x], a[2 * x], a[2 * x + 1], b[2 * x], b[2 * x + 1], one, other);
  }
  DEVICE_MEMBER void rescale(float by) {
#pragma unroll
    for (int x = 0; x < TILES; x++)
#pragma unroll
      for (int e = 0; e < 4; e++) out[x][e] *= by;
  }
  // sums of the warp, and outputs by channel; channel(x, r): of pair x of lanes 4 r ...
  template <class Channel>
  DEVICE_MEMBER void finish(float* outs, Channel channel) {
    const int j = threadIdx.x & 3;
#pragma unroll
    for (int q = 0; q < ROWS; q++)
#pragma unroll
      for (int far = 1; far < 32; far *= 2) sum[q] += shuffle_xor(sum[q], far);
#pragma unroll
    for (int x = 0; x < WORDS; x++)
#pragma unroll
      for (int half = 0; half < 2; half++) outs[j * HEAD + channel(x, threadIdx.x % 32 >> 2) + half] = out[x / 2][2 * (x % 2) + half];
  }
};

// the ring and the step's own tokens, few, a warp each in turn; query: [ROWS][HEAD] in shared memory, scaled; out: this warp's
DEVICE void attend_exact(const Work& w, i64 row, const float* query, float (&most)[ROWS], float (&sum)[ROWS], float* out) {
  constexpr int PAIRS = (HEAD + 63) / 64;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  float mixed[ROWS][PAIRS][2] = {};
  auto take = [&](const u16* key, const u16* value) {
    float k[PAIRS][2], v[PAIRS][2];
#pragma unroll
    for (int x = 0; x < PAIRS; x++) {
      const int d = 64 * x + 2 * lane;
      const u32 both[2] = {d < HEAD ? *(const u32*)(key + d) : 0, d < HEAD ? *(const u32*)(value + d) : 0};
#pragma unroll
      for (int half = 0; half < 2; half++) {
        k[x][half] = number_to_float((u16)(both[0] >> (16 * half)));
        v[x][half] = number_to_float((u16)(both[1] >> (16 * half)));
      }
    }
#pragma unroll
    for (int q = 0; q < ROWS; q++) {
      float s = 0.f;
#pragma unroll
      for (int x = 0; x < PAIRS; x++) {
        const int d = 64 * x + 2 * lane;
        if (d < HEAD) s += query[q * HEAD + d] * k[x][0] + query[q * HEAD + d + 1] * k[x][1];
      }
#pragma unroll
      for (int far = 1; far < 32; far *= 2) s += shuffle_xor(s, far);
      if (SOFTCAP) s = w.softcap * tanhf(s / w.softcap);
      const float now = fmaxf(most[q], s), old = exp2_fast(most[q] - now), p = exp2_fast(s - now);
      most[q] = now, sum[q] = sum[q] * old + p;
#pragma unroll
      for (int x = 0; x < PAIRS; x++)
#pragma unroll
        for (int half = 0; half < 2; half++) mixed[q][x][half] = mixed[q][x][half] * old + p * v[x][half];
    }
  };
  const Lane &keys = w.store.keys, &values = w.store.values;
  const int length = (int)w.store.length[row];
  if (keys.ring)
    for (int t = (int)keys.coded[row] + warp; t < length; t += WARPS)
      take(keys.exact + (row * keys.exact_room + t % keys.ring) * HEAD,
           values.exact + (row * values.exact_room + t % values.ring) * HEAD);
  const Fresh& fresh = w.fresh;
  const i64 batch = row / w.heads, head = row % w.heads;
  for (int t = warp; t < fresh.count; t += WARPS)
    take(fresh.keys + batch * fresh.key_strides[0] + head * fresh.key_strides[1] + t * fresh.key_strides[2],
         fresh.values + batch * fresh.value_strides[0] + head * fresh.value_strides[1] + t * fresh.value_strides[2]);
#pragma unroll
  for (int q = 0; q < ROWS; q++)
#pragma unroll
    for (int x = 0; x < PAIRS; x++) {
      const int d = 64 * x + 2 * lane;
      if (d < HEAD) out[q * HEAD + d] = mixed[q][x][0], out[q * HEAD + d + 1] = mixed[q][x][1];
    }
}

// a block's part: codes(row, query, sums) attends this warp's share of the codes, or it is the last part, of exact tokens
template <class Codes, class Channel>
DEVICE void attend_part(const Work& w, u8* pool, Codes codes, Channel channel) {
  SHARED float query[ROWS * HEAD], mosts[WARPS][ROWS], totals[WARPS][ROWS];
  const i64 row = blockIdx.y;
  const int warp = threadIdx.x >> 5;
  for (int x = threadIdx.x; x < ROWS * HEAD; x += THREADS)
    query[x] = query_number(w, w.query.rows, row, blockIdx.z * ROWS + x / HEAD, x % HEAD);
  barrier();
  Sums sums;
  float* outs = (float*)pool + warp * ROWS * HEAD;
  if (blockIdx.x == w.splits) {
    attend_exact(w, row, query, sums.most, sums.sum, outs);
  } else {
    codes(row, query, sums);
    barrier();  // what follows lies where the tables lay
    sums.finish(outs, channel);
  }
  if ((threadIdx.x & 31) == 0) {
#pragma unroll
    for (int q = 0; q < ROWS; q++) mosts[warp][q] = sums.most[q], totals[warp][q] = sums.sum[q];
  }
  barrier();
  write_part<WARPS, ROWS>(w, row, mosts[0], totals[0], (const float*)pool);
}

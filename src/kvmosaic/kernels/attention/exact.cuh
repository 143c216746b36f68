// The exact tokens beside codes that have a kernel of their own: the ring, and the step's own. Few, so plain sums do.
#pragma once
#include "attention/work.cuh"

// BLOCK_WARPS warps take a token each in turn; query: [QUERIES][HEAD] in shared memory, scaled; out: this warp's [QUERIES][HEAD]
template <int BLOCK_WARPS, int QUERIES>
DEVICE void attend_exact(const Work& w, i64 row, const float* query, float (&most)[QUERIES], float (&sum)[QUERIES], float* out) {
  constexpr int PAIRS = (HEAD + 63) / 64;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  float mixed[QUERIES][PAIRS][2] = {};
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
    for (int q = 0; q < QUERIES; q++) {
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
    for (int t = (int)keys.coded[row] + warp; t < length; t += BLOCK_WARPS)
      take(keys.exact + (row * keys.exact_room + t % keys.ring) * HEAD,
           values.exact + (row * values.exact_room + t % values.ring) * HEAD);
  const Fresh& fresh = w.fresh;
  const i64 batch = row / w.heads, head = row % w.heads;
  for (int t = warp; t < fresh.count; t += BLOCK_WARPS)
    take(fresh.keys + batch * fresh.key_strides[0] + head * fresh.key_strides[1] + t * fresh.key_strides[2],
         fresh.values + batch * fresh.value_strides[0] + head * fresh.value_strides[1] + t * fresh.value_strides[2]);
#pragma unroll
  for (int q = 0; q < QUERIES; q++)
#pragma unroll
    for (int x = 0; x < PAIRS; x++) {
      const int d = 64 * x + 2 * lane;
      if (d < HEAD) out[q * HEAD + d] = mixed[q][x][0], out[q * HEAD + d + 1] = mixed[q][x][1];
    }
}

// Joins the parts that `attend` left, of one store or of several: exact, and in a fixed order.
#pragma once
#include "warp.cuh"

constexpr int MOST_STORES = 4;

struct Joined {
  const float* out;    // [parts][rows][count][channels]
  const float* most;   // [parts][rows][count]
  const float* sum;
  float* rows;         // [rows][count][channels] float32 and
  float* lse;          // [rows][count]; or null, and then
  u16* numbers;        // [batch][query heads][channels] in the model's type
  const float* unrotate[MOST_STORES];  // [channels][channels], the rotation of a store's codes; null = as they are
  int first[MOST_STORES + 1];          // part that each store begins with, and how many there are
  int tails[MOST_STORES];              // 1: the store's last part is of exact tokens
  int stores, count;
};

// x, of which a lane holds channels lane, lane + 32, ..., times the transposed matrix; `plain` is the warp's own
DEVICE void turn_back(float (&x)[padded(HEAD) / 32], const float* matrix, float* plain) {
  const int lane = threadIdx.x & 31;
  if (HADAMARD) {
    hadamard(x);
#pragma unroll
    for (int k = 0; k < padded(HEAD) / 32; k++) x[k] *= matrix[(lane + 32 * k) * HEAD];
    return;
  }
  warp_barrier();
#pragma unroll
  for (int k = 0; k < padded(HEAD) / 32; k++)
    if (lane + 32 * k < HEAD) plain[lane + 32 * k] = x[k], x[k] = 0.f;
  warp_barrier();
  for (int from = 0; from < HEAD; from++)
#pragma unroll
    for (int k = 0; k < padded(HEAD) / 32; k++)
      if (lane + 32 * k < HEAD) x[k] += plain[from] * matrix[(lane + 32 * k) * HEAD + from];
}

// query q of a row, by a block of 128 threads: each of its warps takes every fourth part
DEVICE void combine(const Joined& w, i64 row, i64 rows, int q) {
  constexpr int WARPS = 4, CHUNKS = padded(HEAD) / 32;
  SHARED float outs[WARPS][HEAD], sums[WARPS];
  const int parts = w.first[w.stores], lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const i64 at = row * w.count + q, step = rows * w.count;
  float most = LEAST;
  for (int part = lane; part < parts; part += 32) most = fmaxf(most, w.most[part * step + at]);
#pragma unroll
  for (int far = 16; far; far /= 2) most = fmaxf(most, shuffle_xor(most, far));
  float total = 0.f, out[CHUNKS], turned[CHUNKS];
#pragma unroll
  for (int k = 0; k < CHUNKS; k++) out[k] = 0.f;
  for (int store = 0; store < w.stores; store++) {
    const float* matrix = w.unrotate[store];
    const int first = w.first[store], end = w.first[store + 1], coded = end - w.tails[store];
#pragma unroll
    for (int k = 0; k < CHUNKS; k++) turned[k] = 0.f;
    for (int base = first; base < end; base += 32 * WARPS) {
      const int mine = base + WARPS * lane + warp;
      float weight = 0.f;
      if (mine < end) weight = exp2_fast(w.most[mine * step + at] - most), total += weight * w.sum[mine * step + at];
#pragma unroll 4
      for (int i = 0; base + WARPS * i + warp < end; i++) {
        if (i == 32) break;
        const int part = base + WARPS * i + warp;
        const float f = shuffle(weight, i);
#pragma unroll
        for (int k = 0; k < CHUNKS; k++) {
          if (lane + 32 * k >= HEAD) continue;
          const float x = f * w.out[(part * step + at) * HEAD + lane + 32 * k];
          if (matrix != nullptr && part < coded)
            turned[k] += x;
          else
            out[k] += x;
        }
      }
    }
    if (matrix == nullptr) continue;
    turn_back(turned, matrix, outs[warp]);
#pragma unroll
    for (int k = 0; k < CHUNKS; k++) out[k] += turned[k];
  }
#pragma unroll
  for (int far = 16; far; far /= 2) total += shuffle_xor(total, far);
  warp_barrier();
#pragma unroll
  for (int k = 0; k < CHUNKS; k++)
    if (lane + 32 * k < HEAD) outs[warp][lane + 32 * k] = out[k];
  if (lane == 0) sums[warp] = total;
  barrier();
  const float sum = sums[0] + sums[1] + sums[2] + sums[3];
  const float inverse = sum == 0.f ? 0.f : 1.f / sum;  // NaN stays NaN
  for (int d = threadIdx.x; d < HEAD; d += 32 * WARPS) {
    const float x = (outs[0][d] + outs[1][d] + outs[2][d] + outs[3][d]) * inverse;
    if (w.rows != nullptr)
      w.rows[at * HEAD + d] = x;
    else
      w.numbers[at * HEAD + d] = (u16)pack_numbers(x, 0.f);
  }
  if (threadIdx.x == 0 && w.lse != nullptr) w.lse[at] = sum == 0.f ? -infinity() : (most + log2f(sum)) * 0.69314718f;
}

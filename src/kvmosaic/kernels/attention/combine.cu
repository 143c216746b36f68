// Joins the parts that `attend` left, of one store or of several: exact, and in a fixed order.
#include "warp.cuh"

constexpr int THREADS = 128;
constexpr int MOST_PARTS = 2048;  // of all stores together
constexpr int MOST_STORES = 4;

struct Joined {
  const float* out;    // [parts][rows][count][channels]
  const float* most;   // [parts][rows][count]
  const float* sum;
  float* rows;         // [rows][count][channels] float32 and
  float* lse;          // [rows][count]; or null, and then
  u16* numbers;        // [batch][query heads][channels] in the model's type
  i64* length;         // [rows], to be one more
  const int* live;     // 0: the step is one too many, and lengths stay; null, and no lengths are told
  const float* unrotate[MOST_STORES];  // [channels][channels], the rotation of a store's codes; null = as they are
  int first[MOST_STORES + 1];          // part that each store begins with, and how many there are
  int tails[MOST_STORES];              // 1: the store's last part is of exact tokens
  int stores, count;
};

KERNEL(THREADS, 8) combine(const Joined w) {
  SHARED float weights[MOST_PARTS], partial[THREADS], rotated[HEAD];
  const i64 row = blockIdx.x, rows = gridDim.x;
  const int q = blockIdx.y, parts = w.first[w.stores], thread = threadIdx.x;
  const i64 at = row * w.count + q, step = rows * w.count;
  float most = LEAST;
  for (int part = thread; part < parts; part += THREADS) most = fmaxf(most, w.most[part * step + at]);
  partial[thread] = most;
  barrier();
  for (int x = 0; x < THREADS; x++) most = fmaxf(most, partial[x]);
  barrier();
  float sum = 0.f;
  for (int part = thread; part < parts; part += THREADS) {
    const float f = exp2_fast(w.most[part * step + at] - most);
    weights[part] = f;
    sum += f * w.sum[part * step + at];
  }
  partial[thread] = sum;
  barrier();
  sum = 0.f;
  for (int x = 0; x < THREADS; x++) sum += partial[x];
  const float inverse = sum == 0.f ? 0.f : 1.f / sum;  // NaN stays NaN
  constexpr int PER_THREAD = (HEAD + THREADS - 1) / THREADS;
  float out[PER_THREAD];
#pragma unroll
  for (int i = 0; i < PER_THREAD; i++) out[i] = 0.f;
  for (int store = 0; store < w.stores; store++) {
    const float* unrotate = w.unrotate[store];
    const int end = w.first[store + 1], coded = end - w.tails[store];
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
      const int d = thread + i * THREADS;
      if (d >= HEAD) continue;
      float codes = 0.f, exact = 0.f;
      for (int part = w.first[store]; part < coded; part++) codes += weights[part] * w.out[(part * step + at) * HEAD + d];
      for (int part = coded; part < end; part++) exact += weights[part] * w.out[(part * step + at) * HEAD + d];
      if (unrotate != nullptr)
        rotated[d] = codes;
      else
        exact += codes;
      out[i] += exact;
    }
    if (unrotate != nullptr) {
      barrier();
      if (HADAMARD && thread < 32) {
        float x[padded(HEAD) / 32];
#pragma unroll
        for (int k = 0; k < padded(HEAD) / 32; k++) x[k] = rotated[thread + 32 * k];
        hadamard(x);
#pragma unroll
        for (int k = 0; k < padded(HEAD) / 32; k++) rotated[thread + 32 * k] = x[k];
      }
      barrier();
#pragma unroll
      for (int i = 0; i < PER_THREAD; i++) {
        const int d = thread + i * THREADS;
        if (d >= HEAD) continue;
        if (HADAMARD) {
          out[i] += rotated[d] * unrotate[d * HEAD];
        } else {
          for (int k = 0; k < HEAD; k++) out[i] += rotated[k] * unrotate[d * HEAD + k];
        }
      }
      barrier();
    }
  }
#pragma unroll
  for (int i = 0; i < PER_THREAD; i++) {
    const int d = thread + i * THREADS;
    if (d >= HEAD) continue;
    if (w.rows != nullptr)
      w.rows[at * HEAD + d] = out[i] * inverse;
    else
      w.numbers[at * HEAD + d] = (u16)pack_numbers(out[i] * inverse, 0.f);
  }
  if (thread == 0 && w.lse != nullptr) w.lse[at] = sum == 0.f ? -infinity() : (most + log2f(sum)) * 0.69314718f;
  if (thread == 0 && q == 0 && w.live != nullptr && *w.live) w.length[row]++;
}

// What attention over one store takes (cuda.py fills it), whatever its codes are, and the part that a block of threads leaves.
#pragma once
#include "warp.cuh"

struct Query {
  const float* rows;     // [rows][count][channels]; or null, and then
  const u16* numbers;    // [batch][query heads][channels] of one step, with these strides
  const float* rotated;  // [rows][count][channels], what the codes see, where they are of rotated numbers; or null, and
  const float* rotate;   // [channels][channels], the matrix: its first column has the signs of a Hadamard rotation
  i64 batch_stride, head_stride;
  int count;             // queries of a KV head
};

struct Work {
  Store store;
  Query query;
  Fresh fresh;
  float* out;            // [parts][rows][count][channels], not divided by the sum
  float* most;           // [parts][rows][count], of the logits in base 2
  float* sum;
  float* least;          // [splits][rows][count], of `ranges`
  float* greatest;
  float* logits;         // [rows][count][logit_stride] in base 2, of the tokens held and then of the step's own
  i64 logit_stride;
  float scale, softcap;  // both times log2(e); softcap 0 = none
  float affine_low, affine_high;  // times log2(e)
  int heads, splits, official;
  int unit;              // chunks in a row for one warp, which then scales the query once a group
};

// channel d of query q of a row, scaled; zero where there is none. from: [rows][count][channels], or null
DEVICE float query_number(const Work& w, const float* from, i64 row, int q, int d) {
  if (q >= w.query.count || d >= HEAD) return 0.f;
  if (from != nullptr) return from[(row * w.query.count + q) * HEAD + d] * w.scale;
  const u32 batch = (u32)row / w.heads, head = (u32)row % w.heads * w.query.count + q;
  return number_to_float(w.query.numbers[batch * w.query.batch_stride + head * w.query.head_stride + d]) * w.scale;
}

// a block's part from those of its warps: mosts, sums [BLOCK_WARPS][QUERIES], outs [BLOCK_WARPS][QUERIES][HEAD]
template <int BLOCK_WARPS, int QUERIES>
DEVICE void write_part(const Work& w, i64 row, const float* mosts, const float* sums, const float* outs) {
  const int first = blockIdx.z * QUERIES;
  for (int x = threadIdx.x; x < QUERIES * HEAD; x += 32 * BLOCK_WARPS) {
    const int q = x / HEAD, d = x % HEAD;
    if (first + q >= w.query.count) break;
    float most = LEAST, sum = 0.f, out = 0.f;
    for (int i = 0; i < BLOCK_WARPS; i++) most = fmaxf(most, mosts[i * QUERIES + q]);
    for (int i = 0; i < BLOCK_WARPS; i++) {
      const float f = exp2_fast(mosts[i * QUERIES + q] - most);
      sum += sums[i * QUERIES + q] * f, out += outs[i * QUERIES * HEAD + x] * f;
    }
    const i64 at = ((i64)blockIdx.x * gridDim.y + row) * w.query.count + first + q;
    w.out[at * HEAD + d] = out;
    if (d == 0) w.most[at] = most, w.sum[at] = sum;
  }
}

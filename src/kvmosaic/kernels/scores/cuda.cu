// What a decode step pays to the tokens of a store that carry scores, and the slot that the step's own token takes.
//
// `receive` adds to each token's score what it receives, from the logits that attention left, and finds in each part of a full
// store the token that would leave first, the step's own among them; `replace` joins the parts, in order, so the same input
// gives the same slots.
#include "warp.cuh"

constexpr int THREADS = 128, WARPS = THREADS / 32;
constexpr int MOST_QUERIES = 128;  // of a KV head

struct Received {
  const float* logits;  // [rows][count][stride] in base 2: of the tokens held and, after them, of the step's own
  const float* most;    // [joined][rows][count], the parts of attention over all tokens everywhere: the greatest logit
  const float* sum;     // and the sum of 2 to the logits less that
  const float* asks;    // [slots] 0 or 1: whether the step's query counts where a row holds so many tokens; null = always
  float* score;         // [rows][columns]
  int* position;        // [rows][columns]
  i64* length;          // [rows] tokens held
  i64* placed;          // [batch] tokens that have come
  const i64* capacity;  // [batch] tokens that a row may hold
  i64* slot;            // [rows] where the step's own token goes; -1: nowhere
  const int* live;      // 0: the step is one too many, and nothing changes
  float* least;         // [parts][rows] rank of the token that leaves first
  int* least_at;        // [parts][rows] its slot
  i64 stride, columns;
  int heads, count, joined, parts, first, recent, by_score;
};

// of two tokens the one that leaves: of equals the one in the lower slot, the longer here
DEVICE void keep_least(float& least, int& at, float other, int other_at) {
  if (other < least || (other == least && other_at < at)) least = other, at = other_at;
}

KERNEL(THREADS, 8) receive(const Received w) {
  SHARED float leasts[WARPS], lse[MOST_QUERIES];  // lse in base 2
  SHARED int ats[WARPS];
  if (!*w.live) return;
  const i64 row = blockIdx.x, rows = gridDim.x, batch = row / w.heads;
  const int part = blockIdx.y, length = (int)w.length[row], placed = (int)w.placed[batch];
  const bool full = length >= w.capacity[batch];
  const float share = (w.asks == nullptr ? 1.f : w.asks[length]) / (float)w.count;
  const int index = threadIdx.x >> 5, lane = threadIdx.x & 31;
  for (int q = index; q < w.count; q += WARPS) {
    float most = LEAST, sum = 0.f;
    for (int each = lane; each < w.joined; each += 32) most = fmaxf(most, w.most[(each * rows + row) * w.count + q]);
#pragma unroll
    for (int far = 16; far; far /= 2) most = fmaxf(most, shuffle_xor(most, far));
    for (int each = lane; each < w.joined; each += 32) {
      const i64 from = (each * rows + row) * w.count + q;
      sum += exp2_fast(w.most[from] - most) * w.sum[from];
    }
#pragma unroll
    for (int far = 16; far; far /= 2) sum += shuffle_xor(sum, far);
    if (lane == 0) lse[q] = most + log2f(sum);
  }
  barrier();
  float least = infinity();
  int at = length;
  // tokens 0 ... length - 1, and the step's own as if it had been put after them
  for (int s = part * THREADS + threadIdx.x; s <= length; s += w.parts * THREADS) {
    float mass = 0.f;
    for (int q = 0; q < w.count; q++) mass += exp2_fast(w.logits[(row * w.count + q) * w.stride + s] - lse[q]);
    const i64 column = row * w.columns + s;
    const float score = (s < length ? w.score[column] : 0.f) + mass * share;
    const int position = s < length ? w.position[column] : placed;
    w.score[column] = score;
    if (s == length) w.position[column] = placed;
    const bool never = position < w.first || position > placed - w.recent || !(fabsf(score) < infinity());
    keep_least(least, at, never ? infinity() : w.by_score ? score : (float)position, s);
  }
  if (!full) return;
#pragma unroll
  for (int far = 16; far; far /= 2) {
    const float other = shuffle_xor(least, far);
    const int other_at = (int)shuffle((u32)at, lane ^ far);
    keep_least(least, at, other, other_at);
  }
  if (lane == 0) leasts[index] = least, ats[index] = at;
  barrier();
  if (threadIdx.x) return;
  for (int i = 1; i < WARPS; i++) keep_least(least, at, leasts[i], ats[i]);
  w.least[part * rows + row] = least, w.least_at[part * rows + row] = at;
}

// a block of threads has a sequence, a thread some of its heads
KERNEL(THREADS, 8) replace(const Received w) {
  const i64 batch = blockIdx.x, rows = (i64)gridDim.x * w.heads;
  const int live = *w.live;
  for (int head = threadIdx.x; head < w.heads; head += THREADS) {
    const i64 row = batch * w.heads + head;
    const int length = (int)w.length[row];
    int slot = length;
    if (!live) {
      slot = -1;
    } else if (length >= w.capacity[batch]) {
      float least = w.least[row];
      slot = w.least_at[row];
      for (int part = 1; part < w.parts; part++) keep_least(least, slot, w.least[part * rows + row], w.least_at[part * rows + row]);
      if (slot == length) {
        slot = -1;  // the step's own token leaves
      } else {
        const i64 to = row * w.columns + slot, from = row * w.columns + length;
        w.score[to] = w.score[from], w.position[to] = w.position[from];
      }
    } else {
      w.length[row] = length + 1;
    }
    w.slot[row] = slot;
  }
  if (threadIdx.x == 0 && live) w.placed[batch]++;
}

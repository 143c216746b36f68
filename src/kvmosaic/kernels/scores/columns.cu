// Column sums of causal attention: what each token receives from some of the queries, without a matrix of tokens by tokens.
//
// Two passes over the products of queries and keys: `normalize` finds maximum and sum of each query's logits, part by part of
// the keys; `columns` adds up the probabilities of each key, which one warp owns, in order, so the same input gives the same
// bits. Products are the 16-bit ones of the model's type; a lane's four registers of a row are eight channels side by side.
// HEAD channels, a multiple of 16; NUMBER 0 bfloat16 or 1 float16.
#include "warp.cuh"

constexpr int THREADS = 128, WARPS = THREADS / 32, CHUNKS32 = padded(HEAD) / 32;
constexpr int TILE = 64;                     // rows that lie in shared memory
constexpr int STRIDE = padded(HEAD) + (padded(HEAD) % 64 ? 0 : 32);  // of such a row: neighbours half of the banks apart
constexpr int HELD = HEAD > 128 ? 1 : 2;     // times 16 keys that a warp of `columns` keeps
constexpr int WORDS = TILE * CHUNKS32 * 4;   // of 16 bytes
constexpr int EACH = WORDS / THREADS;

struct alignas(16) Quad {  // read and written at once
  u32 x, y, z, w;
};

struct Columns {
  const u16* query;      // [batch][query heads][tokens][channels]
  const u16* keys;       // [batch][heads][tokens][channels]
  i64 query_strides[3], key_strides[3];
  const int* rows;       // [asked] places of the queries that count in any sequence, ascending
  const u8* valid;       // [batch][tokens], 0: padding
  const u8* asking;      // [batch][tokens], 0: the query does not count
  float* most;           // [splits][batch][query heads][asked] of the logits in base 2
  float* sum;
  float* out;            // [batch][heads][tokens], the mean over the query heads of a KV head
  float scale;           // times log2(e)
  int tokens, heads, groups, asked, splits;
};

SHARED Quad tile[TILE * STRIDE / 8];

DEVICE Quad read(const u16* row, int word) {  // zeros beyond the channels
  return row != nullptr && 8 * word < HEAD ? *(const Quad*)(row + 8 * word) : Quad{0, 0, 0, 0};
}
DEVICE Quad row_word(int row, int c) { return tile[row * (STRIDE / 8) + 4 * c + (threadIdx.x & 3)]; }

// the next rows on their way to shared memory: row(i) points at the tile's i-th, or nowhere
template <class Row>
DEVICE void load(Quad (&held)[EACH], Row row) {
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int at = i * THREADS + threadIdx.x;
    held[i] = read(row(at / (CHUNKS32 * 4)), at % (CHUNKS32 * 4));
  }
}
DEVICE void store(const Quad (&held)[EACH]) {
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int at = i * THREADS + threadIdx.x;
    tile[at / (CHUNKS32 * 4) * (STRIDE / 8) + at % (CHUNKS32 * 4)] = held[i];
  }
}

// 16 rows of one operand times 8 rows of the tile
DEVICE void product(float (&c)[4], const Quad (&upper)[CHUNKS32], const Quad (&lower)[CHUNKS32], int row) {
#pragma unroll
  for (int x = 0; x < CHUNKS32; x++) {
    const Quad b = row_word(row, x);
    mma(c, upper[x].x, lower[x].x, upper[x].y, lower[x].y, b.x, b.y);
    mma(c, upper[x].z, lower[x].z, upper[x].w, lower[x].w, b.z, b.w);
  }
}

// blockIdx: (64 queries of a head, part of the keys, KV head of a sequence)
KERNEL(THREADS, 4) normalize(const Columns w) {
  SHARED float hidden[TILE];  // 0, or far below, where a key is padding
  const int lane = threadIdx.x & 31, r = lane >> 2, j = lane & 3, index = threadIdx.x >> 5;
  const int tiles = (w.asked + TILE - 1) / TILE, group = blockIdx.x / tiles, first = blockIdx.x % tiles * TILE;
  const i64 batch = blockIdx.z / w.heads, head = blockIdx.z % w.heads;
  const u16* queries = w.query + batch * w.query_strides[0] + (head * w.groups + group) * w.query_strides[1];
  const u16* keys = w.keys + batch * w.key_strides[0] + head * w.key_strides[1];
  const int last = w.rows[(first + TILE < w.asked ? first + TILE : w.asked) - 1];
  int place[2];
  Quad q[2][CHUNKS32];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int at = first + 16 * index + r + 8 * half;
    place[half] = at < w.asked ? w.rows[at] : -1;
#pragma unroll
    for (int x = 0; x < CHUNKS32; x++)
      q[half][x] = read(at < w.asked ? queries + place[half] * w.query_strides[2] : nullptr, 4 * x + j);
  }
  const int parts = last / TILE + 1;  // tiles of keys that are seen
  const int begin = (int)((i64)parts * blockIdx.y / w.splits), end = (int)((i64)parts * (blockIdx.y + 1) / w.splits);
  auto key = [&](int t0) {
    return [&, t0](int i) { return t0 + i < w.tokens ? keys + (i64)(t0 + i) * w.key_strides[2] : nullptr; };
  };
  float most[2] = {LEAST, LEAST}, sum[2] = {0.f, 0.f};
  Quad held[EACH];
  if (begin < end) load(held, key(begin * TILE));
  for (int part = begin; part < end; part++) {
    const int t0 = part * TILE;
    barrier();
    store(held);
    if (threadIdx.x < TILE) {
      const int t = t0 + threadIdx.x;
      hidden[threadIdx.x] = t < w.tokens && w.valid[batch * w.tokens + t] ? 0.f : LEAST;
    }
    barrier();
    if (part + 1 < end) load(held, key(t0 + TILE));
    float s[TILE / 8][4], here[2] = {LEAST, LEAST};
#pragma unroll
    for (int n = 0; n < TILE / 8; n++) {
      s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.f;
      product(s[n], q[0], q[1], 8 * n + r);
#pragma unroll
      for (int x = 0; x < 4; x++) {
        const int t = 8 * n + 2 * j + (x & 1);
        s[n][x] = t0 + t <= place[x >> 1] ? s[n][x] * w.scale + hidden[t] : LEAST;
        here[x >> 1] = fmaxf(here[x >> 1], s[n][x]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float now = fmaxf(most[half], here[half]);
      sum[half] *= exp2_fast(most[half] - now);
#pragma unroll
      for (int n = 0; n < TILE / 8; n++)
        sum[half] += exp2_fast(s[n][2 * half] - now) + exp2_fast(s[n][2 * half + 1] - now);
      most[half] = now;
    }
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
#pragma unroll
    for (int far = 1; far < 4; far *= 2) {
      const float other = shuffle_xor(most[half], far), now = fmaxf(most[half], other);
      const float theirs = shuffle_xor(sum[half], far) * exp2_fast(other - now);
      sum[half] = sum[half] * exp2_fast(most[half] - now) + theirs, most[half] = now;
    }
    const int at = first + 16 * index + r + 8 * half;
    if (j == 0 && at < w.asked) {
      const i64 to = (((i64)blockIdx.y * gridDim.z + blockIdx.z) * w.groups + group) * w.asked + at;
      w.most[to] = most[half], w.sum[to] = sum[half];
    }
  }
}

// blockIdx: (keys, KV head of a sequence)
KERNEL(THREADS, 3) columns(const Columns w) {
  SHARED float shift[TILE];  // minus the log-sum-exp of a query, in base 2; far below where it does not count
  SHARED int place[TILE];
  const int lane = threadIdx.x & 31, r = lane >> 2, j = lane & 3, index = threadIdx.x >> 5;
  const i64 batch = blockIdx.y / w.heads, head = blockIdx.y % w.heads;
  const u16* keys = w.keys + batch * w.key_strides[0] + head * w.key_strides[1];
  const int block = blockIdx.x * (16 * HELD * WARPS), first = block + index * (16 * HELD);
  Quad k[HELD][2][CHUNKS32];
  float sum[HELD][2];
#pragma unroll
  for (int m = 0; m < HELD; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int t = first + 16 * m + r + 8 * half;
      sum[m][half] = 0.f;
#pragma unroll
      for (int x = 0; x < CHUNKS32; x++)
        k[m][half][x] = read(t < w.tokens ? keys + (i64)t * w.key_strides[2] : nullptr, 4 * x + j);
    }
  int begin = 0;  // the first query that sees any of these keys
  for (int end = w.asked; begin < end;) {
    const int middle = (begin + end) / 2;
    if (w.rows[middle] < block)
      begin = middle + 1;
    else
      end = middle;
  }
  begin = begin / TILE * TILE;
  const int tiles = (w.asked - begin + TILE - 1) / TILE;
  auto query = [&](int step) {
    const int group = step / tiles, from = begin + step % tiles * TILE;
    const u16* queries = w.query + batch * w.query_strides[0] + (head * w.groups + group) * w.query_strides[1];
    return [&w, queries, from](int i) {
      return from + i < w.asked ? queries + w.rows[from + i] * w.query_strides[2] : nullptr;
    };
  };
  Quad held[EACH];
  if (tiles) load(held, query(0));
  for (int step = 0; step < w.groups * tiles; step++) {
    barrier();
    store(held);
    if (threadIdx.x < TILE) {
      const int at = begin + step % tiles * TILE + threadIdx.x;
      const int t = at < w.asked ? w.rows[at] : 0;
      float most = LEAST, sum = 0.f;
      if (at < w.asked && w.asking[batch * w.tokens + t])
        for (int split = 0; split < w.splits; split++) {
          const i64 from = (((i64)split * gridDim.y + blockIdx.y) * w.groups + step / tiles) * w.asked + at;
          const float now = fmaxf(most, w.most[from]);
          sum = sum * exp2_fast(most - now) + w.sum[from] * exp2_fast(w.most[from] - now), most = now;
        }
      shift[threadIdx.x] = sum > 0.f ? -most - log2f(sum) : LEAST;
      place[threadIdx.x] = t;
    }
    barrier();
    if (step + 1 < w.groups * tiles) load(held, query(step + 1));
    const bool whole = place[0] >= first + 16 * HELD - 1;  // all of these queries see all of the warp's keys
#pragma unroll 2
    for (int n = 0; n < TILE / 8; n++) {
      float s[HELD][4];
#pragma unroll
      for (int m = 0; m < HELD; m++) {
        s[m][0] = s[m][1] = s[m][2] = s[m][3] = 0.f;
        product(s[m], k[m][0], k[m][1], 8 * n + r);
      }
#pragma unroll
      for (int x = 0; x < 4; x++) {
        const int q = 8 * n + 2 * j + (x & 1);
        const float below = shift[q];
#pragma unroll
        for (int m = 0; m < HELD; m++) {
          const float p = exp2_fast(s[m][x] * w.scale + below);
          if (whole || place[q] >= first + 16 * m + r + 8 * (x >> 1)) sum[m][x >> 1] += p;
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < HELD; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float total = sum[m][half];
      total += shuffle_xor(total, 1);
      total += shuffle_xor(total, 2);
      const int t = first + 16 * m + r + 8 * half;
      if (j == 0 && t < w.tokens)
        w.out[((i64)blockIdx.y) * w.tokens + t] = w.valid[batch * w.tokens + t] ? total / (float)w.groups : 0.f;
    }
}

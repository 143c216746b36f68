// A GPU's threads on a CPU, for the CUDA sources as they are: each thread is a fiber, and what a warp does together waits
// until all of its lanes have come. Slow, and right in every bit that does not depend on the GPU's own approximations.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <ucontext.h>

#define DEVICE static inline
#define DEVICE_MEMBER inline
#define KERNEL(threads, blocks) extern "C" void
#define SHARED static
#define POOL(name, bytes) alignas(16) static u8 name[bytes]
#define __global__

struct Index {
  unsigned x, y, z;
};
static Index threadIdx, blockIdx, gridDim, blockDim;

struct Words {
  u32 x, y, z, w;
};

namespace fibers {
constexpr int MOST = 512, STACK = 128 * 1024;
struct Warp {
  u32 values[32][16];  // what each lane brought
  u32 results[32][4];
  int arrived, turn;
};
static ucontext_t contexts[MOST], scheduler;
static bool done[MOST];
static int current, count, waiting, barriers;
static Warp warps[MOST / 32];
static std::function<void()>* body;

static void yield() { swapcontext(&contexts[current], &scheduler); }
static void enter() {
  (*body)();
  done[current] = true;
  yield();
}
static void run(int threads, std::function<void()> work) {
  static char* const stacks = new char[(size_t)MOST * STACK];  // not touched, so not taken, where no thread runs
  body = &work, count = threads, waiting = barriers = 0;
  memset(warps, 0, sizeof warps);
  for (int i = 0; i < threads; i++) {
    done[i] = false;
    getcontext(&contexts[i]);
    contexts[i].uc_stack.ss_sp = stacks + (size_t)i * STACK;
    contexts[i].uc_stack.ss_size = STACK;
    contexts[i].uc_link = nullptr;
    makecontext(&contexts[i], enter, 0);
  }
  for (int left = threads; left > 0;) {
    for (int i = 0; i < threads; i++) {
      if (done[i]) continue;
      current = i, threadIdx = Index{(unsigned)i, 0, 0};
      swapcontext(&scheduler, &contexts[i]);
      if (done[i]) left--;
    }
  }
}
// each lane of a warp brings some words; the last one to come computes for all
template <class Compute>
static void together(const u32* mine, int words, Compute compute) {
  Warp& warp = warps[current / 32];
  memcpy(warp.values[current % 32], mine, words * 4);
  const int turn = warp.turn;
  if (++warp.arrived == 32) {
    compute(warp);
    warp.arrived = 0, warp.turn++;
  } else {
    while (warp.turn == turn) yield();
  }
}
}  // namespace fibers

static inline void barrier() {
  const int turn = fibers::barriers;
  if (++fibers::waiting == fibers::count)
    fibers::waiting = 0, fibers::barriers++;
  else
    while (fibers::barriers == turn) fibers::yield();
}
static inline u32 shuffle(u32 x, int lane) {
  u32 mine[2] = {x, (u32)lane};
  fibers::together(mine, 2, [](fibers::Warp& warp) {
    for (int i = 0; i < 32; i++) warp.results[i][0] = warp.values[warp.values[i][1] & 31][0];
  });
  return fibers::warps[fibers::current / 32].results[fibers::current % 32][0];
}
static inline u32 __float_as_uint(float x) {
  u32 y;
  memcpy(&y, &x, 4);
  return y;
}
static inline float __uint_as_float(u32 x) {
  float y;
  memcpy(&y, &x, 4);
  return y;
}
static inline float __int_as_float(int x) { return __uint_as_float((u32)x); }
static inline float shuffle(float x, int lane) { return __uint_as_float(shuffle(__float_as_uint(x), lane)); }
static inline float shuffle_xor(float x, int mask) { return shuffle(x, (fibers::current % 32) ^ mask); }
static inline bool any(bool x) {
  u32 mine = x;
  fibers::together(&mine, 1, [](fibers::Warp& warp) {
    u32 all = 0;
    for (int i = 0; i < 32; i++) all |= warp.values[i][0];
    for (int i = 0; i < 32; i++) warp.results[i][0] = all;
  });
  return fibers::warps[fibers::current / 32].results[fibers::current % 32][0];
}
static inline void copy_async(void* to, const void* from) {
  if ((uintptr_t)to % 16 || (uintptr_t)from % 16) abort();
  memcpy(to, from, 16);
}
static inline void warp_barrier() { any(false); }
static inline void wait_async() { warp_barrier(); }
static inline u32 arrive_of_two(u32* count) {
  const u32 before = *count;
  *count = !before;
  return before;
}
static inline void fetch(const void*) {}
static inline u32 __byte_perm(u32 a, u32 b, u32 selector) {
  const uint64_t both = (uint64_t)b << 32 | a;
  u32 y = 0;
  for (int i = 0; i < 4; i++) y |= (u32)(both >> (8 * (selector >> (4 * i) & 7)) & 255) << (8 * i);
  return y;
}
static inline u32 permute(u32 a, u32 b, u32 selector) {
  u32 y = __byte_perm(a, b, selector);
  for (int i = 0; i < 4; i++)
    if (selector >> (4 * i + 3) & 1) y = (y & ~(255u << (8 * i))) | (y >> (8 * i + 7) & 1 ? 255u : 0u) << (8 * i);
  return y;
}
static inline float half_to_float(u16 x) {
  _Float16 y;
  memcpy(&y, &x, 2);
  return (float)y;
}
static inline u16 float_to_half(float x) {
  const _Float16 y = (_Float16)x;
  u16 z;
  memcpy(&z, &y, 2);
  return z;
}
static inline u32 add_halves(u32 a, u32 b) {
  const float low = half_to_float((u16)a) + half_to_float((u16)b), high = half_to_float((u16)(a >> 16)) + half_to_float((u16)(b >> 16));
  return float_to_half(low) | (u32)float_to_half(high) << 16;
}
static inline float number_to_float(u16 x) {
#if NUMBER == 0
  return __uint_as_float((u32)x << 16);
#else
  return half_to_float(x);
#endif
}
static inline u16 float_to_number(float x) {
#if NUMBER == 0
  if (std::isnan(x)) return 0x7fff;
  const u32 y = __float_as_uint(x);
  return (u16)((y + 0x7fff + (y >> 16 & 1)) >> 16);
#else
  return float_to_half(x);
#endif
}
static inline u32 pack_numbers(float low, float high) { return float_to_number(low) | (u32)float_to_number(high) << 16; }
static inline float exp2_fast(float x) { return exp2f(x); }
static inline float max_or_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : fmaxf(a, b); }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline Words load_once(const void* from) {
  Words v;
  if ((uintptr_t)from % 16) abort();
  memcpy(&v, from, 16);
  return v;
}
static inline u32 load_once_u32(const void* from) {
  u32 v;
  if ((uintptr_t)from % 4) abort();
  memcpy(&v, from, 4);
  return v;
}

// m16n8k32: of lane l, registers hold A's rows l / 4 (+ 8 in the second and fourth) and columns 4 (l mod 4) ... (+ 16 in
// the last two); B's column l / 4 and rows alike; C's rows l / 4 (+ 8) and columns 2 (l mod 4), + 1
static inline void mma(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  u32 mine[10] = {a0, a1, a2, a3, b0, b1, (u32)c[0], (u32)c[1], (u32)c[2], (u32)c[3]};
  fibers::together(mine, 10, [](fibers::Warp& warp) {
    for (int i = 0; i < 32; i++)
      for (int x = 0; x < 4; x++) {
        const int row = i / 4, high = x / 2, column = 2 * (i % 4) + x % 2;
        int sum = (int)warp.values[i][6 + x];
        for (int k = 0; k < 32; k++) {
          const u32 a = warp.values[row * 4 + k % 16 / 4][high + 2 * (k / 16)] >> (8 * (k % 4)) & 255;
          const u32 b = warp.values[column * 4 + k % 16 / 4][4 + k / 16] >> (8 * (k % 4)) & 255;
          sum += (int)a * (int)(signed char)b;
        }
        warp.results[i][x] = (u32)sum;
      }
  });
  memcpy(c, fibers::warps[fibers::current / 32].results[fibers::current % 32], 16);
}
// m16n8k16 of 16-bit numbers: the same, with two numbers a register and columns 2 (l mod 4), + 8
template <float (*TO_FLOAT)(u16)>
static void mma_of(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  u32 mine[10] = {a0, a1, a2, a3, b0, b1};
  memcpy(mine + 6, c, 16);
  fibers::together(mine, 10, [](fibers::Warp& warp) {
    for (int i = 0; i < 32; i++)
      for (int x = 0; x < 4; x++) {
        const int row = i / 4, high = x / 2, column = 2 * (i % 4) + x % 2;
        float sum = __uint_as_float(warp.values[i][6 + x]);
        for (int k = 0; k < 16; k++) {
          const u32 a = warp.values[row * 4 + k % 8 / 2][high + 2 * (k / 8)] >> (16 * (k % 2));
          const u32 b = warp.values[column * 4 + k % 8 / 2][4 + k / 8] >> (16 * (k % 2));
          sum += TO_FLOAT((u16)a) * TO_FLOAT((u16)b);
        }
        warp.results[i][x] = __float_as_uint(sum);
      }
  });
  memcpy(c, fibers::warps[fibers::current / 32].results[fibers::current % 32], 16);
}
static inline void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  mma_of<number_to_float>(c, a0, a1, a2, a3, b0, b1);
}
static inline void mma_half(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  mma_of<half_to_float>(c, a0, a1, a2, a3, b0, b1);
}

// every block of a grid, one after another
template <class Body>
static void grid(const int* sizes, int threads, Body body) {
  gridDim = Index{(unsigned)sizes[0], (unsigned)sizes[1], (unsigned)sizes[2]}, blockDim = Index{(unsigned)threads, 1, 1};
  for (int z = 0; z < sizes[2]; z++)
    for (int y = 0; y < sizes[1]; y++)
      for (int x = 0; x < sizes[0]; x++) {
        blockIdx = Index{(unsigned)x, (unsigned)y, (unsigned)z};
        fibers::run(threads, body);
      }
}

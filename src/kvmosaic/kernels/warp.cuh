// What the CUDA kernels share: the structs that Python fills (gpu.py), a warp's matrix products, small numbers.
// No CUDA headers: NVRTC compiles this by itself, and tests/kernels/emulate.h stands in for the GPU on a CPU.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

#ifdef KVMOSAIC_EMULATE
#include "emulate.h"
#else
#define DEVICE static __device__ __forceinline__
#define DEVICE_MEMBER __device__ __forceinline__
#define KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
#define SHARED __shared__
#define POOL(name, bytes) extern __shared__ __align__(16) u8 name[]  // as many as the launch says, beyond 48 KiB too
struct Words {
  u32 x, y, z, w;
};

// u8 rows times s8 columns into s32: A 16 x 32, B 32 x 8
DEVICE void mma(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
#if NUMBER == 0
#define KIND "bf16"
#else
#define KIND "f16"
#endif
// 16-bit numbers into float32: A 16 x 16, B 16 x 8
#define MMA(name, kind)                                                                                     \
  DEVICE void name(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {                         \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." kind "." kind                                     \
                 ".f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"                                  \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                           \
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));                                   \
  }
MMA(mma, KIND)  // of the model's type
MMA(mma_half, "f16")
DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float max_or_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0,%1,%2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
DEVICE Words load_once(const void* from) {  // 16 bytes that no one reads again
  Words v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3},[%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}
DEVICE u32 load_once_u32(const void* from) {
  u32 v;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0,[%1];" : "=r"(v) : "l"(from));
  return v;
}
DEVICE float half_to_float(u16 x) {
  float y;
  asm("cvt.f32.f16 %0,%1;" : "=f"(y) : "h"(x));
  return y;
}
DEVICE u16 float_to_half(float x) {
  u16 y;
  asm("cvt.rn.f16.f32 %0,%1;" : "=h"(y) : "f"(x));
  return y;
}
DEVICE float number_to_float(u16 x) {
#if NUMBER == 0
  return __uint_as_float((u32)x << 16);
#else
  return half_to_float(x);
#endif
}
DEVICE u32 pack_numbers(float low, float high) {
  u32 y;
  asm("cvt.rn." KIND "x2.f32 %0,%1,%2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
// as __byte_perm; where a nibble of the selector has its fourth bit set, the chosen byte's sign is repeated
DEVICE u32 permute(u32 low, u32 high, u32 selector) {
  u32 y;
  asm("prmt.b32 %0,%1,%2,%3;" : "=r"(y) : "r"(low), "r"(high), "r"(selector));
  return y;
}
DEVICE u32 add_halves(u32 a, u32 b) {  // two float16
  u32 y;
  asm("add.rn.f16x2 %0,%1,%2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}
DEVICE u32 shuffle(u32 x, int lane) { return __shfl_sync(~0u, x, lane); }
DEVICE float shuffle(float x, int lane) { return __shfl_sync(~0u, x, lane); }
DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
DEVICE bool any(bool x) { return __any_sync(~0u, x); }
DEVICE void barrier() { __syncthreads(); }
DEVICE void warp_barrier() { __syncwarp(); }
// how many came before this one, 0 or 1; the second begins anew
DEVICE u32 arrive_of_two(u32* count) { return atomicInc(count, 1u); }
// 16 bytes on their way to shared memory; `wait_async`: all of this warp's have come, for each of its lanes
DEVICE void copy_async(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0],[%1],16;" ::"r"((u32)__cvta_generic_to_shared(shared)), "l"(global) : "memory");
}
DEVICE void wait_async() {
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncwarp();
}
DEVICE void fetch(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }
#endif

constexpr int BLOCK = 128;  // tokens in a block of codes (layout.py)
DEVICE float infinity() { return __int_as_float(0x7f800000); }
constexpr float LEAST = -1e30f;  // stands for the log of nothing: finite, so that differences are numbers

DEVICE constexpr int padded(int channels) { return (channels + 31) / 32 * 32; }
DEVICE constexpr int greatest_divisor(int a, int b) { return b == 0 ? a : greatest_divisor(b, a % b); }
DEVICE constexpr int larger(int a, int b) { return a > b ? a : b; }

struct Lane {            // one side of a store; a row is a KV head of a sequence
  const u8* codes;       // [rows][blocks of 128 tokens], layout "fragments"
  const u16* scale;      // [rows][entries][width] float16
  const u16* low;        // the same
  const u16* channel;    // [rows][runs][channels] float16, factors of channels
  const u16* exact;      // [rows][exact_room][channels] tokens as they are
  const void* learned;   // float16: of Coupled [heads][groups][codes][channels of a group]; of Levels [2][heads][channels], ranges
  const float* restored; // of Levels [codes]
  const u8* where;       // of Levels [rows][slots][outliers] channels
  const u16* missing;    // the same, float16
  const int* position;   // [rows or sequences][position_room], of keys before their rotary positions
  const float* turns;    // [channels / 2] radians a place, of channels i and i + channels / 2
  const i64* coded;      // [rows] tokens that are codes
  const i64* starts;     // [rows][runs] first token of each run
  i64 code_stride;       // bytes of a row
  i64 entry_stride;      // numbers of a row in scale and in low
  i64 exact_room;
  int ring;              // token t lies in exact at t % ring; 0: at t
  int runs;
  int position_room, position_heads;  // heads: 1 = all of a sequence's are alike
  float stretch;         // of rotated keys
};

struct Store {
  Lane keys, values;
  const i64* length;     // [rows] tokens held
};

struct Fresh {           // tokens of the step itself, [batch][heads][count][channels] with any strides but the last
  const u16* keys;
  const u16* values;
  i64 key_strides[3], value_strides[3];
  int count;
};

constexpr bool HADAMARD = HEAD >= 32 && (HEAD & (HEAD - 1)) == 0;  // rotations of these sizes are signed Hadamard matrices

// of a warp: x @ H for the channels that its lanes hold, N each (in any order that gives each bit of a channel's number to a bit of
// the lane's or the register's); H has entries 1 and -1 (not normalized)
template <int N>
DEVICE void hadamard(float (&x)[N]) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int far = 1; far < HEAD / N; far *= 2)
#pragma unroll
    for (int k = 0; k < N; k++) {
      const float other = shuffle_xor(x[k], far);
      x[k] = lane & far ? other - x[k] : x[k] + other;
    }
#pragma unroll
  for (int far = 1; far < N; far *= 2)
#pragma unroll
    for (int k = 0; k < N; k++)
      if (!(k & far)) {
        const float a = x[k], b = x[k + far];
        x[k] = a + b, x[k + far] = a - b;
      }
}

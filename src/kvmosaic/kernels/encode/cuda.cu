// Tokens into a store's bytes: `append` for the token of a decode step, `encode` for many at once.
//
// A block of threads encodes the tokens of one block of codes (128 slots): parameters and codes first, codes into shared
// memory, then whole words in the layout "fragments", of which the bits of other tokens stay.
// The macros are those of attention/cuda.cu, with FIT: how a token of fixed levels is scaled, and UNIT: its "norm".
#include "attention/combine.cuh"

enum { EXACT, CHANNEL, TOKEN };
enum { UNIFORM, NORM, MATCHED, UNBIASED, LEAST_SQUARES };
constexpr int THREADS = 128, WARPS = THREADS / 32;
constexpr int DP = padded(HEAD), CHUNKS32 = DP / 32, GROUPS16 = DP / 16;

#define FORM_OF(ROLE, SIDE)                                                                                          \
  struct ROLE {                                                                                                      \
    static constexpr bool keys = SIDE##_IS_KEYS;                                                                     \
    static constexpr int form = SIDE##_FORM, bits = SIDE##_BITS, group = SIDE##_GROUP, groups = SIDE##_GROUPS,       \
                         fit = SIDE##_FIT;                                                                           \
    static constexpr bool factor = SIDE##_FACTOR, rotated = SIDE##_ROTATED;                                          \
    static constexpr float unit = SIDE##_UNIT;                                                                       \
    static DEVICE_MEMBER float level(int code) {                                                                     \
      const u32 levels[4] = {SIDE##_LEVELS};                                                                         \
      return SIDE##_TABLE ? (float)(int)(levels[code / 4] >> (8 * (code % 4)) & 255) - 64.f                          \
                          : (float)(2 * code - (1 << bits) + 1);                                                     \
    }                                                                                                                \
  }
#define KEY_IS_KEYS true
#define VALUE_IS_KEYS false
FORM_OF(Keys, KEY);
FORM_OF(Values, VALUE);

struct Side {          // a lane to be written; a row is a KV head of a sequence
  u8* codes;           // as in `struct Lane` of warp.cuh
  u16* scale;
  u16* low;
  const u16* channel;
  u16* exact;
  i64* coded;
  const float* rotate; // [channels][channels], or null
  const float* clip;   // [KV heads], the share of a range that is kept; or null
  i64 code_stride, entry_stride, exact_room;
  int ring, window, flush, runs, about_center;
};

struct Append {
  Side keys, values;
  i64* length;         // [rows], to be one more; or null, and then
  const i64* slot;     // [rows], where it goes, among tokens that are written one by one; -1: nowhere
  u32* arrived;        // [rows], zeros between launches
  const int* live;     // 0: no token is written
  Fresh fresh;         // that token
  Joined joined;       // of the step's attention, which has read the store already; count 0 = none
  int heads;
};

struct Writing {       // of one side
  Side side;
  const u16* x;        // [batch][heads][tokens][channels]
  const i64* count;    // [rows], how many of the tokens are the row's
  i64 strides[3];
  int heads, run;      // run: where parameters lie that a whole run shares
};

SHARED u8 codes[BLOCK][DP];

// a range as the codec (codecs/uniform.py) stores it
DEVICE void fit_range(const Side& side, int head, float low, float high, int bits, u16& low16, u16& scale16) {
  if (side.clip != nullptr) {
    const float clip = side.clip[head], middle = (low + high) / 2.f, half = (high - low) / 2.f;
    low = side.about_center ? middle - clip * half : low * clip;
    high = side.about_center ? middle + clip * half : high * clip;
  }
  low16 = float_to_half(low);
  scale16 = float_to_half(fmaxf(__fdiv_rn(high - half_to_float(low16), (float)((1 << bits) - 1)), 0.f));
}
DEVICE u8 quantize(float x, float low, float scale, int bits) {
  if (!(scale > 0.f)) return 0;
  return (u8)fminf(fmaxf(rintf(__fdiv_rn(x - low, scale)), 0.f), (float)((1 << bits) - 1));
}

// ranges by channel: a thread has a channel, `at(slot)` is where a token lies
template <class Form, class At>
DEVICE void encode_channels(const Side& side, i64 row, int head, int block, int begin, int end, int run, At at) {
  for (int d = threadIdx.x; d < HEAD; d += THREADS) {
    constexpr int group = Form::group ? Form::group : BLOCK;
    for (int start = begin; start < end; start += group) {
      const int stop = start + group < end ? start + group : end;
      u16 low16, scale16;
      if (Form::group) {
        float low = infinity(), high = -infinity();
#pragma unroll 8
        for (int slot = start; slot < stop; slot++) {
          const float x = number_to_float(at(slot)[d]);
          low = fminf(low, x), high = fmaxf(high, x);
        }
        fit_range(side, head, low, high, Form::bits, low16, scale16);
        const i64 entry = row * side.entry_stride + (i64)(start / group) * HEAD + d;
        side.low[entry] = low16, side.scale[entry] = scale16;
      } else {
        const i64 entry = row * side.entry_stride + (i64)run * HEAD + d;
        low16 = side.low[entry], scale16 = side.scale[entry];
      }
      const float low = half_to_float(low16), scale = half_to_float(scale16);
#pragma unroll 8
      for (int slot = start; slot < stop; slot++)
        codes[slot - block * BLOCK][d] = quantize(number_to_float(at(slot)[d]), low, scale, Form::bits);
    }
  }
}

DEVICE float warp_sum(float x) {
#pragma unroll
  for (int far = 16; far; far /= 2) x += shuffle_xor(x, far);
  return x;
}

// ranges by token: a warp has a token, a lane channels lane, lane + 32, ...
template <class Form, class At>
DEVICE void encode_tokens(const Side& side, i64 row, int head, int block, int begin, int end, int run, At at) {
  SHARED float plain[WARPS][DP];
  const int lane = threadIdx.x & 31, index = threadIdx.x >> 5;
  constexpr int together = 4;  // tokens that a warp loads at a time
  for (int first = begin; first < end; first += WARPS * together) {
    float all[together][CHUNKS32];
#pragma unroll
    for (int i = 0; i < together; i++)
#pragma unroll
      for (int k = 0; k < CHUNKS32; k++) {
        const int slot = first + i * WARPS + index, d = lane + 32 * k;
        all[i][k] = slot < end && d < HEAD ? number_to_float(at(slot)[d]) : 0.f;
      }
#pragma unroll
    for (int i = 0; i < together; i++) {
      const int slot = first + i * WARPS + index;
      if (first + i * WARPS >= end) break;  // all warps go round alike
      const bool real = slot < end;
      float(&x)[CHUNKS32] = all[i];
      if constexpr (Form::factor) {
#pragma unroll
        for (int k = 0; k < CHUNKS32; k++) {
          const int d = lane + 32 * k;
          if (d < HEAD) x[k] = __fdiv_rn(x[k], half_to_float(side.channel[(row * side.runs + run) * HEAD + d]));
        }
      }
      if (HADAMARD && Form::rotated) {
#pragma unroll
        for (int k = 0; k < CHUNKS32; k++) x[k] *= side.rotate[(lane + 32 * k) * HEAD];
        hadamard(x);
      } else if (Form::rotated) {
#pragma unroll
        for (int k = 0; k < CHUNKS32; k++) plain[index][lane + 32 * k] = x[k], x[k] = 0.f;
        barrier();
        for (int from = 0; from < HEAD; from++)
#pragma unroll
          for (int k = 0; k < CHUNKS32; k++)
            if (lane + 32 * k < HEAD) x[k] += plain[index][from] * side.rotate[from * HEAD + lane + 32 * k];
        barrier();
      }
      u8 code[CHUNKS32];
      if constexpr (Form::fit != UNIFORM) {
        float square = 0.f;
#pragma unroll
        for (int k = 0; k < CHUNKS32; k++) square += x[k] * x[k];
        const float length = sqrtf(warp_sum(square)), norm = length * Form::unit;
        float along = 0.f, coarse = 0.f;
#pragma unroll
        for (int k = 0; k < CHUNKS32; k++) {
          const float y = __fdiv_rn(x[k], norm > 0.f ? norm : 1.f);
          int c = 0;
#pragma unroll
          for (int edge = 0; edge + 1 < 1 << Form::bits; edge++)
            c += y > (Form::level(edge) + Form::level(edge + 1)) / 2.f;
          code[k] = (u8)c;
          if (lane + 32 * k < HEAD) along += Form::level(c) * x[k], coarse += Form::level(c) * Form::level(c);
        }
        along = warp_sum(along), coarse = warp_sum(coarse);
        const float scale = Form::fit == NORM       ? norm
                            : Form::fit == MATCHED  ? __fdiv_rn(length, sqrtf(coarse))
                            : Form::fit == UNBIASED ? __fdiv_rn(length * length, fmaxf(along, 1e-30f))
                                                    : __fdiv_rn(along, coarse);
        if (real && lane == 0) side.scale[row * side.entry_stride + slot] = float_to_half(scale);
      } else {
        // least and greatest of every 16 channels, then of every group of them
        float least[GROUPS16], greatest[GROUPS16];
#pragma unroll
        for (int k = 0; k < CHUNKS32; k++) {
          float low = lane + 32 * k < HEAD ? x[k] : infinity(), high = lane + 32 * k < HEAD ? x[k] : -infinity();
#pragma unroll
          for (int far = 8; far; far /= 2)
            low = fminf(low, shuffle_xor(low, far)), high = fmaxf(high, shuffle_xor(high, far));
          const float other_low = shuffle_xor(low, 16), other_high = shuffle_xor(high, 16);
          least[2 * k] = lane < 16 ? low : other_low, least[2 * k + 1] = lane < 16 ? other_low : low;
          greatest[2 * k] = lane < 16 ? high : other_high, greatest[2 * k + 1] = lane < 16 ? other_high : high;
        }
        constexpr int per = HEAD / Form::groups / 16;
        u16 low16[Form::groups], scale16[Form::groups];
#pragma unroll
        for (int g = 0; g < Form::groups; g++) {
          float low = infinity(), high = -infinity();
#pragma unroll
          for (int x16 = g * per; x16 < (g + 1) * per; x16++)
            low = fminf(low, least[x16]), high = fmaxf(high, greatest[x16]);
          fit_range(side, head, low, high, Form::bits, low16[g], scale16[g]);
          const i64 entry = row * side.entry_stride + (i64)slot * Form::groups + g;
          if (real && lane == 0) side.low[entry] = low16[g], side.scale[entry] = scale16[g];
        }
#pragma unroll
        for (int k = 0; k < CHUNKS32; k++) {
          u16 low = low16[0], scale = scale16[0];
#pragma unroll
          for (int g = 1; g < Form::groups; g++)
            if ((2 * k + lane / 16) / per == g) low = low16[g], scale = scale16[g];
          code[k] = quantize(x[k], half_to_float(low), half_to_float(scale), Form::bits);
        }
      }
#pragma unroll
      for (int k = 0; k < CHUNKS32; k++)
        if (real && lane + 32 * k < HEAD) codes[slot - block * BLOCK][lane + 32 * k] = code[k];
    }
  }
}

// slots begin ... end - 1, all of one block of codes
template <class Form, class At>
DEVICE void encode_block(const Side& side, i64 row, int head, int block, int begin, int end, int run, At at) {
  if constexpr (Form::form == CHANNEL)
    encode_channels<Form>(side, row, head, block, begin, end, run, at);
  else
    encode_tokens<Form>(side, row, head, block, begin, end, run, at);
  barrier();
  constexpr int planes = 8 / Form::bits;
  u32* words = (u32*)(side.codes + row * side.code_stride + (i64)block * (BLOCK * DP * Form::bits / 8));
  // the tiles of 512 bytes that these tokens are in
  constexpr int unit = Form::keys ? 16 * planes : 32;  // tokens
  const int first = (begin - block * BLOCK) / unit, last = (end - 1 - block * BLOCK) / unit;
  const int first_tile = Form::keys ? first * CHUNKS32 : first * GROUPS16 / planes;
  const int last_tile = Form::keys ? (last + 1) * CHUNKS32 - 1 : ((last + 1) * GROUPS16 - 1) / planes;
  for (int at_word = first_tile * 128 + threadIdx.x; at_word < (last_tile + 1) * 128; at_word += THREADS) {
    const int tile = at_word / 128, lane = at_word % 128 / 4, r = lane / 4, j = lane % 4;
    const int row_half = at_word & 1, column_half = at_word >> 1 & 1;
    u32 word = 0, touched = 0;
#pragma unroll
    for (int e = 0; e < 4; e++)
#pragma unroll
      for (int plane = 0; plane < planes; plane++) {
        int token, channel;
        if (Form::keys) {
          token = 16 * (tile / CHUNKS32 * planes + plane) + r + 8 * row_half;
          channel = 32 * (tile % CHUNKS32) + 16 * column_half + 4 * j + e;
        } else {
          const int fragment = tile * planes + plane;
          token = 32 * (fragment / GROUPS16) + 16 * (e >> 1) + 8 * (e & 1) + j + 4 * column_half;
          channel = 16 * (fragment % GROUPS16) + 2 * r + row_half;
        }
        if (token < begin - block * BLOCK || token >= end - block * BLOCK) continue;
        const int shift = 8 * e + Form::bits * plane;
        touched |= ((1u << Form::bits) - 1) << shift;
        if (channel < HEAD) word |= (u32)codes[token][channel] << shift;
      }
    if (touched) words[at_word] = touched == ~0u ? word : (words[at_word] & ~touched) | word;
  }
  barrier();
}

template <class Form>
DEVICE void append_to(const Side& side, i64 row, int head, int slot, const u16* token) {
  bool stays = true;  // exact, that is
  if constexpr (Form::form != EXACT) {
    const int coded = (int)side.coded[row];
    if (slot < coded) {  // in another's place
      encode_block<Form>(side, row, head, slot / BLOCK, slot, slot + 1, 0, [&](int) { return token; });
      return;
    }
    if (slot - coded + 1 - side.window >= side.flush) {
      const int end = coded + side.flush;
      const u16* ring = side.exact + row * side.exact_room * HEAD;
      auto at = [&](int each) { return each < slot ? ring + (i64)(each % side.ring) * HEAD : token; };
      for (int block = coded / BLOCK; block * BLOCK < end; block++) {
        const int begin = coded > block * BLOCK ? coded : block * BLOCK;
        const int stop = end < (block + 1) * BLOCK ? end : (block + 1) * BLOCK;
        encode_block<Form>(side, row, head, block, begin, stop, 0, at);
      }
      if (threadIdx.x == 0) side.coded[row] = end;
      stays = slot >= end;
    }
  }
  if (!stays) return;
  if (Form::form == EXACT && threadIdx.x == 0 && slot >= side.coded[row]) side.coded[row] = slot + 1;
  u16* to = side.exact + (row * side.exact_room + (side.ring ? slot % side.ring : slot)) * HEAD;
  for (int d = threadIdx.x; d < HEAD; d += THREADS) to[d] = token[d];
}

#if APPENDS
// a block of threads a row for each query that is to be joined, one for its keys and one for its values
KERNEL(THREADS, 4) append(const Append w) {
  const i64 row = blockIdx.x, batch = row / w.heads, head = row % w.heads;
  const int side = (int)blockIdx.y - w.joined.count;
  if (side < 0) {
    combine(w.joined, row, gridDim.x, blockIdx.y);
    return;
  }
  const int live = *w.live, slot = (int)(w.slot == nullptr ? w.length : w.slot)[row];
  if (!live || slot < 0) return;
  const Fresh& new_token = w.fresh;
  if (side == 0)
    append_to<Keys>(w.keys, row, (int)head, slot, new_token.keys + batch * new_token.key_strides[0] + head * new_token.key_strides[1]);
  else
    append_to<Values>(w.values, row, (int)head, slot,
                      new_token.values + batch * new_token.value_strides[0] + head * new_token.value_strides[1]);
  barrier();  // each thread has read the length
  if (threadIdx.x == 0 && w.slot == nullptr && arrive_of_two(w.arrived + row)) w.length[row] = slot + 1;
}
#else
KERNEL(THREADS, 8) encode(const Writing w) {
  const i64 row = blockIdx.x;
  const int head = (int)(row % w.heads), coded = (int)w.side.coded[row], all = coded + (int)w.count[row];
  const int block = coded / BLOCK + blockIdx.y;
  const int begin = coded > block * BLOCK ? coded : block * BLOCK, end = all < (block + 1) * BLOCK ? all : (block + 1) * BLOCK;
  if (begin >= end) return;
  const u16* x = w.x + row / w.heads * w.strides[0] + head * w.strides[1];
  encode_block<WRITES>(w.side, row, head, block, begin, end, w.run, [&](int slot) { return x + (slot - coded) * w.strides[2]; });
}
#endif

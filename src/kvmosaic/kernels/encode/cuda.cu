// Tokens into a store's bytes: `append` for the token of a decode step, `encode` for many at once.
//
// A block of threads encodes the tokens of one block of codes (128 slots): parameters and codes first, codes into shared
// memory so that the four of a word lie together, then whole words in the layout "fragments", of which the bits of other
// tokens stay.
// The macros are those of attention/cuda.cu, with FIT: how a token of fixed levels is scaled, and UNIT: its "norm".
#include "encode/append.cuh"

enum { EXACT, CHANNEL, TOKEN };
enum { UNIFORM, NORM, MATCHED, UNBIASED, LEAST_SQUARES };
constexpr int THREADS = 128, WARPS = THREADS / 32;
constexpr int DP = padded(HEAD), CHUNKS32 = DP / 32, GROUPS16 = DP / 16;
constexpr int QUADS = (DP + 127) / 128, PER = 4 * QUADS;  // a lane holds channels 4 lane ... 4 lane + 3, and 128 further on

#define FORM_OF(ROLE, SIDE)                                                                                          \
  struct ROLE {                                                                                                      \
    static constexpr bool keys = SIDE##_IS_KEYS;                                                                     \
    static constexpr int form = SIDE##_FORM, bits = SIDE##_BITS, group = SIDE##_GROUP, groups = SIDE##_GROUPS,       \
                         fit = SIDE##_FIT;                                                                           \
    static constexpr bool factor = SIDE##_FACTOR, rotated = SIDE##_ROTATED, table = SIDE##_TABLE;                    \
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
  StepEnd end;
};

struct Writing {       // of one side
  Side side;
  const u16* x;        // [batch][heads][tokens][channels]
  const i64* count;    // [rows], how many of the tokens are the row's; null = all
  i64 strides[3];
  int heads, run;      // run: where parameters lie that a whole run shares
  int tokens;
};

// of keys [tokens][channels], of values [channels][tokens], where tokens t, t + 8, t + 16, t + 24 are neighbours; a word further
// apart, so that columns lie in different banks
constexpr int KEY_ROW = DP + 4, VALUE_ROW = BLOCK + 4;
SHARED u32 codes[(BLOCK * KEY_ROW > DP * VALUE_ROW ? BLOCK * KEY_ROW : DP * VALUE_ROW) / 4];
template <class Form>
DEVICE u8* code_of(int token, int channel) {  // token: within its block
  u8* all = (u8*)codes;
  return Form::keys ? all + token * KEY_ROW + channel
                    : all + channel * VALUE_ROW + (token & ~31) + 4 * (token & 7) + (token >> 3 & 3);
}

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
// numbers of one range to codes, as the codec rounds them
struct Quantizer {
  float low, scale, inverse, top;
  DEVICE_MEMBER Quantizer(u16 low16, u16 scale16, int bits)
      : low(half_to_float(low16)), scale(half_to_float(scale16)), inverse(scale > 0.f ? __fdiv_rn(1.f, scale) : 0.f),
        top((float)((1 << bits) - 1)) {}
  DEVICE_MEMBER u32 operator()(float x) const {
    constexpr float SHIFT = 12582912.f;  // 1.5 * 2^23: the sum's low bits are the nearest integer
    const float above = x - low, nearly = above * inverse;
    const float quotient = fmaf(fmaf(-nearly, scale, above), inverse, nearly);  // rounded as a division is
    return __float_as_uint(fminf(fmaxf(quotient, 0.f), top) + SHIFT) & 255u;
  }
};

// where tokens lie that are to be encoded: in the order of their slots, or in a ring that the newest one follows
struct Rows {
  static constexpr bool in_order = true;
  const u16* first;
  i64 stride;
  int slot;  // of the first
  DEVICE_MEMBER const u16* operator()(int each) const { return first + (each - slot) * stride; }
};
struct Ring {
  static constexpr bool in_order = false;
  static constexpr i64 stride = 0;
  const u16 *ring, *newest;
  int size, slot;  // of the newest
  DEVICE_MEMBER const u16* operator()(int each) const { return each < slot ? ring + (i64)(each % size) * HEAD : newest; }
};

// ranges by channel: a thread has two channels and every TEAMS-th batch of 32 tokens
template <class Form, class At>
DEVICE void encode_channels(const Side& side, i64 row, int head, int block, int begin, int end, int run, At at) {
  constexpr int PAIRS = HEAD / 2, TEAMS = THREADS / PAIRS > 0 ? THREADS / PAIRS : 1, BATCH = 32;
  constexpr bool one = Form::group == BATCH;  // batch a range
  SHARED float ends[2][TEAMS][HEAD];
  const int team = threadIdx.x / PAIRS, d = 2 * (threadIdx.x % PAIRS);
  u32 two[BATCH];
  auto load = [&](int from) {
    if (At::in_order && from >= begin && from + BATCH <= end) {  // one address, and steps that all threads share
      const u16* each = at(from) + d;
#pragma unroll
      for (int i = 0; i < BATCH; i++) two[i] = *(const u32*)(each + i * at.stride);
      return;
    }
#pragma unroll  // tokens of others: one of these in their place
    for (int i = 0; i < BATCH; i++) {
      const int slot = from + i < begin ? begin : from + i < end ? from + i : end - 1;
      two[i] = *(const u32*)(at(slot) + d);
    }
  };
  auto number = [&](int i, int half) { return number_to_float((u16)(two[i] >> (16 * half))); };
  auto quantize_batch = [&](int from, const Quantizer (&by)[2]) {
    u8* to = code_of<Form>(from - block * BLOCK, d);
#pragma unroll
    for (int i = 0; i < BATCH; i++) {
      const u32 low = by[0](number(i, 0)), high = by[1](number(i, 1));
      if (Form::keys)
        *(u16*)(to + i * KEY_ROW) = (u16)(low | high << 8);
      else
        to[4 * (i & 7) + (i >> 3)] = (u8)low, to[VALUE_ROW + 4 * (i & 7) + (i >> 3)] = (u8)high;
    }
  };
  constexpr int group = Form::group ? Form::group : BLOCK;
  for (int start = begin / BATCH * BATCH; start < end; start += group) {
    const int stop = start + group < end ? start + group : end;
    if (one && start / BATCH % TEAMS != team) continue;
    float low[2] = {infinity(), infinity()}, high[2] = {-infinity(), -infinity()};
    if (Form::group) {
      for (int from = start + (one ? 0 : BATCH * team); from < stop && team < TEAMS; from += BATCH * (one ? 1 : TEAMS)) {
        load(from);
#pragma unroll
        for (int i = 0; i < BATCH; i++)
#pragma unroll
          for (int half = 0; half < 2; half++)
            low[half] = fminf(low[half], number(i, half)), high[half] = fmaxf(high[half], number(i, half));
      }
      if (!one) {
        barrier();
        if (team < TEAMS)
          for (int half = 0; half < 2; half++) ends[0][team][d + half] = low[half], ends[1][team][d + half] = high[half];
        barrier();
        for (int other = 0; other < TEAMS; other++)
          for (int half = 0; half < 2; half++)
            low[half] = fminf(low[half], ends[0][other][d + half]), high[half] = fmaxf(high[half], ends[1][other][d + half]);
      }
    }
    if (team >= TEAMS) continue;
    const i64 entry = row * side.entry_stride + (i64)(Form::group ? start / group : run) * HEAD + d;
    u16 low16[2], scale16[2];
    for (int half = 0; half < 2; half++) {
      if (Form::group) {
        fit_range(side, head, low[half], high[half], Form::bits, low16[half], scale16[half]);
        if (one || team == 0) side.low[entry + half] = low16[half], side.scale[entry + half] = scale16[half];
      } else {
        low16[half] = side.low[entry + half], scale16[half] = side.scale[entry + half];
      }
    }
    const Quantizer by[2] = {{low16[0], scale16[0], Form::bits}, {low16[1], scale16[1], Form::bits}};
    if (one) {
      quantize_batch(start, by);
    } else {
      for (int from = start + BATCH * team; from < stop; from += BATCH * TEAMS) load(from), quantize_batch(from, by);
    }
  }
}

DEVICE float warp_sum(float x) {
#pragma unroll
  for (int far = 16; far; far /= 2) x += shuffle_xor(x, far);
  return x;
}

// ranges by token: a warp has a token, a lane four neighbouring channels; four tokens at a time, 8 apart
template <class Form, class At>
DEVICE void encode_tokens(const Side& side, i64 row, int head, int block, int begin, int end, int run, At at) {
  SHARED float plain[WARPS][DP];
  constexpr int TOGETHER = 4;
  const int lane = threadIdx.x & 31, index = threadIdx.x >> 5;
  auto channel = [&](int k) { return 128 * (k / 4) + 4 * lane + k % 4; };
  const int first = (begin - block * BLOCK) / 32 * 32;
  for (int base = first; block * BLOCK + base < end; base += base % 8 ? 28 : 4) {  // 0, 4, 32, 36, ...
    float all[TOGETHER][PER];
    u32 word[PER];
    const int first_slot = block * BLOCK + base + index;
    const u16* in_order = At::in_order ? at(first_slot) : nullptr;
#pragma unroll
    for (int i = 0; i < TOGETHER; i++) {
      const int slot = first_slot + 8 * i;
#pragma unroll
      for (int q = 0; q < QUADS; q++) {
        u32 two[2] = {0, 0};
        if (slot >= begin && slot < end && channel(4 * q) < HEAD) {
          const u16* token = At::in_order ? in_order + 8 * i * at.stride : at(slot);
          const u32* from = (const u32*)(token + channel(4 * q));
          two[0] = from[0], two[1] = from[1];
        }
#pragma unroll
        for (int e = 0; e < 4; e++) all[i][4 * q + e] = number_to_float((u16)(two[e / 2] >> (16 * (e % 2))));
      }
    }
#pragma unroll
    for (int k = 0; k < PER; k++) word[k] = 0;
#pragma unroll
    for (int i = 0; i < TOGETHER; i++) {
      const int slot = first_slot + 8 * i;
      const bool real = slot >= begin && slot < end;  // others go round as well: what a warp does together it does at once
      float(&x)[PER] = all[i];
      if constexpr (Form::factor) {
#pragma unroll
        for (int k = 0; k < PER; k++)
          if (channel(k) < HEAD) x[k] = __fdiv_rn(x[k], half_to_float(side.channel[(row * side.runs + run) * HEAD + channel(k)]));
      }
      if constexpr (HADAMARD && Form::rotated) {
#pragma unroll
        for (int k = 0; k < PER; k++)
          if (channel(k) < HEAD) x[k] *= side.rotate[channel(k) * HEAD];
        hadamard(x);
      } else if constexpr (Form::rotated) {
        warp_barrier();
#pragma unroll
        for (int k = 0; k < PER; k++)
          if (channel(k) < HEAD) plain[index][channel(k)] = x[k], x[k] = 0.f;
        warp_barrier();
        for (int from = 0; from < HEAD; from++)
#pragma unroll
          for (int k = 0; k < PER; k++)
            if (channel(k) < HEAD) x[k] += plain[index][from] * side.rotate[from * HEAD + channel(k)];
      }
      u8 code[PER];
      if constexpr (Form::fit != UNIFORM) {
        float square = 0.f;
#pragma unroll
        for (int k = 0; k < PER; k++) square += channel(k) < HEAD ? x[k] * x[k] : 0.f;
        const float length = sqrtf(warp_sum(square)), norm = length * Form::unit;
        const float inverse = __fdiv_rn(1.f, norm > 0.f ? norm : 1.f);
        float along = 0.f, coarse = 0.f;
#pragma unroll
        for (int k = 0; k < PER; k++) {
          const float y = x[k] * inverse;
          int c = 0;
#pragma unroll
          for (int edge = 0; edge + 1 < 1 << Form::bits; edge++)
            c += y > (Form::level(edge) + Form::level(edge + 1)) / 2.f;
          code[k] = (u8)c;
          if (channel(k) < HEAD) along += Form::level(c) * x[k], coarse += Form::level(c) * Form::level(c);
        }
        if (Form::fit == UNBIASED || Form::fit == LEAST_SQUARES) along = warp_sum(along);
        if (Form::fit == MATCHED || Form::fit == LEAST_SQUARES) coarse = warp_sum(coarse);
        const float scale = Form::fit == NORM       ? norm
                            : Form::fit == MATCHED  ? __fdiv_rn(length, sqrtf(coarse))
                            : Form::fit == UNBIASED ? __fdiv_rn(length * length, fmaxf(along, 1e-30f))
                                                    : __fdiv_rn(along, coarse);
        if (real && lane == 0) side.scale[row * side.entry_stride + slot] = float_to_half(scale);
      } else {
        constexpr int wide = HEAD / Form::groups;  // channels that share a range
        float low[QUADS], high[QUADS];
#pragma unroll
        for (int q = 0; q < QUADS; q++) {
          low[q] = infinity(), high[q] = -infinity();
#pragma unroll
          for (int e = 0; e < 4; e++)
            if (channel(4 * q) < HEAD) low[q] = fminf(low[q], x[4 * q + e]), high[q] = fmaxf(high[q], x[4 * q + e]);
#pragma unroll
          for (int far = 1; far < (Form::groups == 1 ? 32 : 4); far *= 2)
            low[q] = fminf(low[q], shuffle_xor(low[q], far)), high[q] = fmaxf(high[q], shuffle_xor(high[q], far));
        }
        if constexpr (Form::groups == 1 && QUADS == 2) {
          low[0] = low[1] = fminf(low[0], low[1]), high[0] = high[1] = fmaxf(high[0], high[1]);
        } else if constexpr (Form::groups > 1 && wide > 16) {  // every four lanes have a range of 16 channels
          float least[QUADS], greatest[QUADS];
#pragma unroll
          for (int q = 0; q < QUADS; q++) least[q] = infinity(), greatest[q] = -infinity();
#pragma unroll
          for (int sixteen = 0; sixteen < HEAD / 16; sixteen++) {
            const float a = shuffle(low[sixteen / 8], 4 * (sixteen % 8)), b = shuffle(high[sixteen / 8], 4 * (sixteen % 8));
#pragma unroll
            for (int q = 0; q < QUADS; q++)
              if (channel(4 * q) / wide == 16 * sixteen / wide) least[q] = fminf(least[q], a), greatest[q] = fmaxf(greatest[q], b);
          }
#pragma unroll
          for (int q = 0; q < QUADS; q++) low[q] = least[q], high[q] = greatest[q];
        }
#pragma unroll
        for (int q = 0; q < QUADS; q++) {
          u16 low16, scale16;
          fit_range(side, head, low[q], high[q], Form::bits, low16, scale16);
          const i64 entry = row * side.entry_stride + (i64)slot * Form::groups + channel(4 * q) / wide;
          if (real && channel(4 * q) < HEAD && channel(4 * q) % wide == 0) side.low[entry] = low16, side.scale[entry] = scale16;
          const Quantizer by(low16, scale16, Form::bits);
#pragma unroll
          for (int e = 0; e < 4; e++) code[4 * q + e] = (u8)by(x[4 * q + e]);
        }
      }
#pragma unroll
      for (int q = 0; q < QUADS; q++)
        if (Form::keys && real && channel(4 * q) < HEAD)
          *(u32*)code_of<Form>(slot - block * BLOCK, channel(4 * q)) =
              code[4 * q] | code[4 * q + 1] << 8 | code[4 * q + 2] << 16 | (u32)code[4 * q + 3] << 24;
#pragma unroll
      for (int k = 0; k < PER; k++) word[k] |= (u32)code[k] << (8 * i);
    }
    if (!Form::keys)
#pragma unroll
      for (int k = 0; k < PER; k++)
        if (channel(k) < HEAD) *(u32*)code_of<Form>(base + index, channel(k)) = word[k];
  }
}

// where a word has the four codes of a plane, which come in a byte each (and, of a mask, in all bits of a byte)
template <class Form>
DEVICE u32 placed(u32 bytes, int plane) {
  if (!Form::table) return (bytes & 0x01010101u * ((1u << Form::bits) - 1)) << (Form::bits * plane);
  const u32 two = (bytes & 0x0f0f0f0fu) | (bytes & 0x0f0f0f0fu) >> 4;
  return ((two & 255u) | (two >> 8 & 0xff00u)) << (16 * plane);
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
  Words* words = (Words*)(side.codes + row * side.code_stride + (i64)block * (BLOCK * DP * Form::bits / 8));
  begin -= block * BLOCK, end -= block * BLOCK;
  // the tiles of 512 bytes that these tokens are in
  constexpr int unit = Form::keys ? 16 * planes : 32;  // tokens
  const int first = begin / unit, last = (end - 1) / unit;
  const int first_tile = Form::keys ? first * CHUNKS32 : first * GROUPS16 / planes;
  const int last_tile = Form::keys ? (last + 1) * CHUNKS32 - 1 : ((last + 1) * GROUPS16 - 1) / planes;
  for (int at_lane = first_tile * 32 + threadIdx.x; at_lane < (last_tile + 1) * 32; at_lane += THREADS) {
    const int tile = at_lane / 32, r = at_lane % 32 / 4, j = at_lane % 4;
    u32 word[4] = {0, 0, 0, 0}, touched[4] = {0, 0, 0, 0};
#pragma unroll
    for (int plane = 0; plane < planes; plane++)
#pragma unroll
      for (int x = 0; x < 4; x++) {
        const int row_half = x & 1, column_half = x >> 1;
        int token, channel;
        u32 bytes = ~0u;  // those of these tokens
        if (Form::keys) {
          token = 16 * (tile / CHUNKS32 * planes + plane) + r + 8 * row_half;
          channel = 32 * (tile % CHUNKS32) + 16 * column_half + 4 * j;
          if (token < begin || token >= end) bytes = 0;
        } else {
          const int fragment = tile * planes + plane;
          token = 32 * (fragment / GROUPS16) + j + 4 * column_half;
          channel = 16 * (fragment % GROUPS16) + 2 * r + row_half;
#pragma unroll
          for (int e = 0; e < 4; e++)
            if (token + 8 * e < begin || token + 8 * e >= end) bytes &= ~(255u << (8 * e));
        }
        touched[x] |= placed<Form>(bytes, plane);
        if (bytes && channel < HEAD) word[x] |= placed<Form>(*(const u32*)code_of<Form>(token, channel) & bytes, plane);
      }
    if ((touched[0] | touched[1] | touched[2] | touched[3]) == 0) continue;
    if ((touched[0] & touched[1] & touched[2] & touched[3]) != ~0u) {
      const Words old = words[at_lane];
      word[0] |= old.x & ~touched[0], word[1] |= old.y & ~touched[1];
      word[2] |= old.z & ~touched[2], word[3] |= old.w & ~touched[3];
    }
    words[at_lane] = Words{word[0], word[1], word[2], word[3]};
  }
  barrier();
}

template <class Form>
DEVICE void append_to(const Side& side, i64 row, int head, int slot, const u16* token) {
  bool stays = true;  // exact, that is
  if constexpr (Form::form != EXACT) {
    const int coded = (int)side.coded[row];
    if (Form::form == TOKEN && slot < coded) {  // in another's place
      encode_block<Form>(side, row, head, slot / BLOCK, slot, slot + 1, 0, Rows{token, 0, slot});
      return;
    }
    if (slot - coded + 1 - side.window >= side.flush) {
      const int end = coded + side.flush;
      const Ring at{side.exact + row * side.exact_room * HEAD, token, side.ring, slot};
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
KERNEL(THREADS, 4) append(const Append w) {
  end_step(
      w.end, [&](i64 row, int head, int slot, const u16* token) { append_to<Keys>(w.keys, row, head, slot, token); },
      [&](i64 row, int head, int slot, const u16* token) { append_to<Values>(w.values, row, head, slot, token); });
}
#else
KERNEL(THREADS, 6) encode(const Writing w) {
  const i64 row = blockIdx.x;
  const int head = blockIdx.x % w.heads, coded = (int)w.side.coded[row], all = coded + (w.count == nullptr ? w.tokens : (int)w.count[row]);
  const int block = coded / BLOCK + blockIdx.y;
  const int begin = coded > block * BLOCK ? coded : block * BLOCK, end = all < (block + 1) * BLOCK ? all : (block + 1) * BLOCK;
  if (begin >= end) return;
  const Rows at{w.x + blockIdx.x / w.heads * w.strides[0] + head * w.strides[1], w.strides[2], coded};
  encode_block<WRITES>(w.side, row, head, block, begin, end, w.run, at);
}
#endif

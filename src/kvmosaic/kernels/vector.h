// One variant's vectors: LANES numbers of 32 bits in GCC's and clang's generic vector types, and the handful of
// operations that need the instruction set by name. Included once for each variant, by native.c, which defines
// VARIANT (a suffix for every name) and TARGET (the attribute under which its functions are compiled).

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define NAME(x) JOIN(x, VARIANT)
#define FN static TARGET __attribute__((unused))
#define INLINE static inline TARGET __attribute__((always_inline, unused))

#define floats NAME(floats)
#define ints NAME(ints)
#define words NAME(words)
#define shorts NAME(shorts)
typedef float floats __attribute__((vector_size(LANES * 4)));
typedef int32_t ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t words __attribute__((vector_size(LANES * 4)));
typedef uint16_t shorts __attribute__((vector_size(LANES * 2)));

INLINE floats NAME(load)(const float *x) {
    floats v;
    memcpy(&v, x, sizeof v);
    return v;
}

INLINE void NAME(store)(float *x, floats v) { memcpy(x, &v, sizeof v); }

INLINE words NAME(load_words)(const void *x) {
    words v;
    memcpy(&v, x, sizeof v);
    return v;
}

INLINE shorts NAME(load_shorts)(const void *x) {
    shorts v;
    memcpy(&v, x, sizeof v);
    return v;
}

INLINE floats NAME(all)(float x) { return x - (floats){0}; }
INLINE words NAME(all_words)(uint32_t x) { return x - (words){0}; }

// Where the numbers compare as unordered, `greater` and `lesser` give b: a NaN in b stays. `store_bytes` keeps the
// lowest byte of each lane (compilers take lanes apart for it, so it has a name). `store_slices` writes, of each four
// lanes of a and then of b, the four second bytes and the four lowest with their signs turned round. `look_up` takes each byte to that
// byte, below 16, of a table that is repeated every 16 bytes.
#if VARIANT_ISA == ISA_AVX512

INLINE floats NAME(greater)(floats a, floats b) { return (floats)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE floats NAME(lesser)(floats a, floats b) { return (floats)_mm512_min_ps((__m512)a, (__m512)b); }
INLINE floats NAME(fma)(floats a, floats b, floats c) {
    return (floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
INLINE floats NAME(of_halves)(shorts x) { return (floats)_mm512_cvtph_ps((__m256i)x); }
INLINE float NAME(sum)(floats v) { return _mm512_reduce_add_ps((__m512)v); }
INLINE float NAME(greatest)(floats v) { return _mm512_reduce_max_ps((__m512)v); }
INLINE void NAME(store_bytes)(void *x, words v) { _mm_storeu_si128(x, _mm512_cvtepi32_epi8((__m512i)v)); }
INLINE void NAME(store_slices)(void *x, words a, words b) {
    const __m512i order = _mm512_set1_epi64(0x0c0804000d090501), even = _mm512_set_epi64(14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i first = _mm512_shuffle_epi8((__m512i)a, order), second = _mm512_shuffle_epi8((__m512i)b, order);
    const __m512i both = _mm512_permutex2var_epi64(first, even, second);
    _mm512_storeu_si512(x, _mm512_xor_si512(both, _mm512_set1_epi64((int64_t)0x8080808000000000)));
}
// the greatest of magnitudes so far, and that of x
INLINE floats NAME(greater_magnitude)(floats most, floats x) {
    return (floats)_mm512_range_ps((__m512)most, (__m512)x, 0xb);
}
INLINE words NAME(look_up)(words table, words codes) {
    return (words)_mm512_shuffle_epi8((__m512i)table, (__m512i)codes);
}
// acc + the four products of unsigned and signed bytes in each lane
INLINE ints NAME(dot)(ints acc, words codes, words slices, int bits) {
    (void)bits;
    return (ints)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)codes, (__m512i)slices);
}

#else

INLINE floats NAME(greater)(floats a, floats b);
INLINE floats NAME(greater_magnitude)(floats most, floats x) {
    return NAME(greater)(most, (floats)((ints)x & INT32_MAX));
}

#if VARIANT_ISA == ISA_AVX2

INLINE floats NAME(greater)(floats a, floats b) { return (floats)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE floats NAME(lesser)(floats a, floats b) { return (floats)_mm256_min_ps((__m256)a, (__m256)b); }
INLINE floats NAME(fma)(floats a, floats b, floats c) {
    return (floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
INLINE floats NAME(of_halves)(shorts x) { return (floats)_mm256_cvtph_ps((__m128i)x); }
INLINE void NAME(store_bytes)(void *x, words v) {
    const __m256i first = _mm256_set1_epi32(0x0c080400), each = _mm256_shuffle_epi8((__m256i)v, first);
    _mm_storel_epi64(x, _mm_unpacklo_epi32(_mm256_castsi256_si128(each), _mm256_extracti128_si256(each, 1)));
}
INLINE void NAME(store_slices)(void *x, words a, words b) {
    const __m256i order = _mm256_set1_epi64x(0x0c0804000d090501);
    const __m256i first = _mm256_shuffle_epi8((__m256i)a, order), second = _mm256_shuffle_epi8((__m256i)b, order);
    const __m256i both = _mm256_permute4x64_epi64(_mm256_unpacklo_epi64(first, second), 0xd8);
    _mm256_storeu_si256(x, _mm256_xor_si256(both, _mm256_set1_epi64x((int64_t)0x8080808000000000)));
}
INLINE words NAME(look_up)(words table, words codes) {
    return (words)_mm256_shuffle_epi8((__m256i)table, (__m256i)codes);
}
#if VARIANT_VNNI
INLINE ints NAME(dot)(ints acc, words codes, words slices, int bits) {
    (void)bits;
    return (ints)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)codes, (__m256i)slices);
}
#endif
INLINE ints NAME(dot_small)(words codes, words slices) {
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)codes, (__m256i)slices);
    return (ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

#elif VARIANT_ISA == ISA_NEON

INLINE floats NAME(greater)(floats a, floats b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
INLINE floats NAME(lesser)(floats a, floats b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
INLINE floats NAME(fma)(floats a, floats b, floats c) { return vfmaq_f32(c, a, b); }
INLINE floats NAME(of_halves)(shorts x) { return vcvt_f32_f16((float16x4_t)x); }
INLINE void NAME(store_bytes)(void *x, words v) {
    const uint16x4_t pairs = vmovn_u32(v);
    const uint32x2_t bytes = vreinterpret_u32_u8(vmovn_u16(vcombine_u16(pairs, pairs)));
    memcpy(x, &bytes, 4);
}
INLINE void NAME(store_slices)(void *x, words a, words b) {
    const uint8x8_t order = vcreate_u8(0x0c0804000d090501), sign = vcreate_u8(0x8080808000000000);
    const uint8x8_t first = veor_u8(vqtbl1_u8((uint8x16_t)a, order), sign);
    const uint8x8_t second = veor_u8(vqtbl1_u8((uint8x16_t)b, order), sign);
    memcpy(x, &first, 8), memcpy((char *)x + 8, &second, 8);
}
INLINE words NAME(look_up)(words table, words codes) {
    return (words)vqtbl1q_u8((uint8x16_t)table, (uint8x16_t)codes);
}
INLINE ints NAME(dot_small)(words codes, words slices) { // codes below 128 are the same signed
    return vdotq_s32(vdupq_n_s32(0), (int8x16_t)codes, (int8x16_t)slices);
}

#else

INLINE floats NAME(greater)(floats a, floats b) {
    const ints which = a > b;
    return (floats)(((ints)a & which) | ((ints)b & ~which));
}
INLINE floats NAME(lesser)(floats a, floats b) {
    const ints which = a < b;
    return (floats)(((ints)a & which) | ((ints)b & ~which));
}
INLINE floats NAME(fma)(floats a, floats b, floats c) { return a * b + c; }
INLINE floats NAME(of_halves)(shorts x) {
    floats v;
    for (int i = 0; i < LANES; i++) v[i] = float_of_half(x[i]);
    return v;
}
INLINE void NAME(store_bytes)(void *x, words v) {
    for (int i = 0; i < LANES; i++) ((uint8_t *)x)[i] = (uint8_t)v[i];
}
INLINE void NAME(store_slices)(void *x, words a, words b) {
    uint8_t *to = x;
    for (int i = 0; i < LANES; i++) to[i] = (uint8_t)(a[i] >> 8), to[LANES + i] = (uint8_t)(a[i] ^ 128);
    for (int i = 0; i < LANES; i++) to[8 + i] = (uint8_t)(b[i] >> 8), to[8 + LANES + i] = (uint8_t)(b[i] ^ 128);
}
INLINE words NAME(look_up)(words table, words codes) {
    words out;
    for (int i = 0; i < LANES * 4; i++) ((uint8_t *)&out)[i] = ((uint8_t *)&table)[((uint8_t *)&codes)[i]];
    return out;
}
INLINE ints NAME(dot_small)(words codes, words slices) {
    ints sum = {0};
    for (int i = 0; i < 32; i += 8) // arithmetic shifts carry the sign of each byte down
        sum += (ints)(codes >> i & 255) * ((ints)(slices << (24 - i)) >> 24);
    return sum;
}

#endif

INLINE float NAME(sum)(floats v) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
}

INLINE float NAME(greatest)(floats v) {
    float most = v[0];
    for (int i = 1; i < LANES; i++) most = most > v[i] ? most : v[i];
    return most;
}

#if !VARIANT_VNNI
// Bytes above 4 bits in two halves: pairs of products would pass 16 bits in AVX2, codes above 127 are negative in NEON.
INLINE ints NAME(dot)(ints acc, words codes, words slices, int bits) {
    if (bits < 8) return acc + NAME(dot_small)(codes, slices);
    const words low = codes & 0x0f0f0f0f, high = codes >> 4 & 0x0f0f0f0f;
    return acc + NAME(dot_small)(low, slices) + (NAME(dot_small)(high, slices) << 4);
}
#endif

#endif

// The sums, or the greatest numbers, of four vectors at once.
#if VARIANT_ISA == ISA_AVX512 || VARIANT_ISA == ISA_AVX2
#if VARIANT_ISA == ISA_AVX512
#define OF(operation, ...) (floats)_mm512_##operation(__VA_ARGS__)
#define WIDE __m512
#else
#define OF(operation, ...) (floats)_mm256_##operation(__VA_ARGS__)
#define WIDE __m256
#endif
#define FOUR(name, join, narrow)                                                                                       \
    INLINE void NAME(name)(const floats *v, float *out) {                                                              \
        const floats a = join(OF(unpacklo_ps, (WIDE)v[0], (WIDE)v[1]), OF(unpackhi_ps, (WIDE)v[0], (WIDE)v[1]));       \
        const floats b = join(OF(unpacklo_ps, (WIDE)v[2], (WIDE)v[3]), OF(unpackhi_ps, (WIDE)v[2], (WIDE)v[3]));       \
        const floats c = join(OF(shuffle_ps, (WIDE)a, (WIDE)b, 0x44), OF(shuffle_ps, (WIDE)a, (WIDE)b, 0xee));         \
        __m128 quarter[LANES / 4]; /* each has something of all four */                                                \
        memcpy(quarter, &c, sizeof c);                                                                                 \
        for (int i = LANES / 8; i > 0; i /= 2)                                                                         \
            for (int j = 0; j < i; j++) quarter[j] = narrow(quarter[j], quarter[i + j]);                               \
        memcpy(out, quarter, sizeof *quarter);                                                                         \
    }
#define PLUS(a, b) ((a) + (b))
FOUR(sum_four, PLUS, _mm_add_ps) FOUR(greatest_four, NAME(greater), _mm_max_ps)
#undef PLUS
#undef FOUR
#undef WIDE
#undef OF
#else
INLINE void NAME(sum_four)(const floats *v, float *out) {
    for (int i = 0; i < 4; i++) out[i] = NAME(sum)(v[i]);
}
INLINE void NAME(greatest_four)(const floats *v, float *out) {
    for (int i = 0; i < 4; i++) out[i] = NAME(greatest)(v[i]);
}
#endif

// Numbers as stored, as float32; `number` is a constant where this is inlined.
INLINE floats NAME(load_numbers)(const void *x, int64_t at, int number) {
    if (number == FLOAT32) return NAME(load)((const float *)x + at);
    const shorts v = NAME(load_shorts)((const uint16_t *)x + at);
    if (number == FLOAT16) return NAME(of_halves)(v);
    return (floats)(__builtin_convertvector(v, words) << 16);
}

INLINE float NAME(load_number)(const void *x, int64_t at, int number) {
    if (number == FLOAT32) return ((const float *)x)[at];
    const uint16_t v = ((const uint16_t *)x)[at];
    return number == FLOAT16 ? float_of_half(v) : float_of_bits((uint32_t)v << 16);
}

// Adding 1.5 * 2^23 rounds to an integer (ties to even) and leaves it in the low 16 bits, for magnitudes below 2^15: no
// instruction by name, and a NaN gives some integer where a cast would be undefined.
#define ROUNDER 12582912.0f

// e^x for x <= 0; below -87 the least normal number. A NaN stays one.
INLINE floats NAME(exp)(floats x) {
    const floats y = NAME(greater)(NAME(all)(-126.0f), x * 1.442695041f);
    const floats shifted = y + ROUNDER, f = y - (shifted - ROUNDER);
    // 2^f on [-1/2, 1/2], least greatest relative error (7.5e-8)
    floats p = NAME(all)(0.0013276470f);
    p = NAME(fma)(p, f, NAME(all)(0.0096755410f));
    p = NAME(fma)(p, f, NAME(all)(0.055507135f));
    p = NAME(fma)(p, f, NAME(all)(0.24022120f));
    p = NAME(fma)(p, f, NAME(all)(0.69314694f));
    p = NAME(fma)(p, f, NAME(all)(1.0000001f));
    return p * (floats)(((words)shifted + (127 - 0x4b400000u)) << 23);
}

// Vectors of BESTIARY_LANES floats and the few functions of them that the kernels need.
//
// The same source is compiled once for each instruction set. The number of lanes is a macro, because a compiler that
// is given wider vectors than the machine has lowers them to scalars. GCC's and Clang's vector extensions do the
// arithmetic; intrinsics stand only where they save instructions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace bestiary {

constexpr int W = BESTIARY_LANES;
typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
#define BK_INLINE inline __attribute__((always_inline))

#if BESTIARY_LANES == 16 && defined(__AVX512F__) && defined(__AVX512DQ__)
#define BK_AVX512 1
#elif BESTIARY_LANES == 8 && defined(__AVX2__) && defined(__FMA__)
#define BK_AVX2 1
#endif

BK_INLINE vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
BK_INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
BK_INLINE vf set1(float x) {
#if BK_AVX512
  return (vf)_mm512_set1_ps(x);
#elif BK_AVX2
  return (vf)_mm256_set1_ps(x);
#else
  return x - vf{};
#endif
}
BK_INLINE vf bits(vi v) {
  vf r;
  std::memcpy(&r, &v, sizeof r);
  return r;
}
BK_INLINE vi bits(vf v) {
  vi r;
  std::memcpy(&r, &v, sizeof r);
  return r;
}
BK_INLINE vf fma(vf a, vf b, vf c) {
#if BK_AVX512
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif BK_AVX2
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
// NaN in `b` stays NaN; NaN in `a` gives b.
BK_INLINE vf max(vf a, vf b) {
#if BK_AVX512
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif BK_AVX2
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
BK_INLINE vf min(vf a, vf b) {
#if BK_AVX512
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif BK_AVX2
  return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}
BK_INLINE vf abs(vf v) { return bits(bits(v) & 0x7fffffff); }

// Sum over lanes in a fixed tree.
BK_INLINE float hsum(vf v) {
  float x[W];
  store(x, v);
  for (int s = W / 2; s; s /= 2)
    for (int i = 0; i < s; ++i) x[i] += x[i + s];
  return x[0];
}

// Loads and stores of the first n lanes; the others read as 0 and are left alone.
BK_INLINE vf load_n(const float* p, int n) {
#if BK_AVX512
  return (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#else
  float x[W] = {};
  std::memcpy(x, p, sizeof(float) * n);
  return load(x);
#endif
}
BK_INLINE void store_n(float* p, vf v, int n) {
#if BK_AVX512
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#else
  std::memcpy(p, &v, sizeof(float) * n);
#endif
}

// 2^r on [-1/2, 1/2]: degree 6, relative error 2e-9, so that what remains is rounding. Degree 5 is biased by about an
// ulp, which shows in gradients of A.
BK_INLINE vf exp2_poly(vf r) {
  vf p = set1(0.00015346f);
  p = fma(p, r, set1(0.00133999f));
  p = fma(p, r, set1(0.00961849f));
  p = fma(p, r, set1(0.05550329f));
  p = fma(p, r, set1(0.24022646f));
  p = fma(p, r, set1(0.69314718f));
  return fma(p, r, set1(1.0f));
}

// x to the nearest integer n, and 2^n where that is no AVX-512 instruction: adding 1.5 * 2^23 rounds and leaves n in the
// low bits, and 127 more is the exponent of 2^n; n from -126 to 127.
struct Rounded {
  vf value, power;
};
BK_INLINE Rounded round(vf x) {
#if BK_AVX512
  vf n = (vf)_mm512_roundscale_ps((__m512)x, 0);
  return {n, n};
#else
  const vf big = set1(12582912.0f + 127.0f);
  vf t = x + big;
  return {t - big, bits(bits(t) << 23)};
#endif
}

// p * 2^n; NaN stays.
BK_INLINE vf scale(vf p, Rounded n) {
#if BK_AVX512
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n.value);
#else
  return p * n.power;
#endif
}

// 2^x. AVX-512 gives 0 and inf beyond the range of floats; the others stop at 2^-125.5 and 2^127.4. NaN stays.
BK_INLINE vf exp2(vf x) {
#if BK_AVX512
  vf r = (vf)_mm512_reduce_ps((__m512)x, 0);  // x - round(x) in one instruction; 0 for infinities
  return (vf)_mm512_scalef_ps((__m512)exp2_poly(r), (__m512)(x - r));
#else
  x = max(set1(-125.5f), min(set1(127.4f), x));
  Rounded n = round(x);
  return scale(exp2_poly(x - n.value), n);
#endif
}

// e^r on [-ln 2 / 2, ln 2 / 2]: exp2_poly with its argument's unit changed.
BK_INLINE vf exp_poly(vf r) {
  vf p = set1(0.00138370155f);
  p = fma(p, r, set1(0.00837479629f));
  p = fma(p, r, set1(0.0416682301f));
  p = fma(p, r, set1(0.1666642084f));
  p = fma(p, r, set1(0.4999999023f));
  p = fma(p, r, set1(1.0f));
  return fma(p, r, set1(1.0f));
}

// e^x for x in [-87, 88.3] to about an ulp: ln 2 in two words, since x * log2(e) alone is off by many ulps at x = -40.
constexpr float EXP_LOW = -87.0f, EXP_HIGH = 88.3f;
BK_INLINE vf exp_within(vf x) {
  Rounded n = round(x * set1(1.44269504f));
  vf r = fma(n.value, set1(-0.693145752f), x);
  r = fma(n.value, set1(-1.42860677e-6f), r);
  return scale(exp_poly(r), n);
}
// e^-|x|, 0 where that is no normal number
BK_INLINE vf exp_minus_abs(vf x) {
  const vf low = set1(EXP_LOW);
  vf y = -abs(x), e = exp_within(max(low, y));
  return y < low ? vf{} : e;
}

struct Sigmoid {
  vf value, e;  // 1 / (1 + exp(-x)) and exp(-|x|)
};
BK_INLINE Sigmoid sigmoid_e(vf x) {
  vf e = exp_minus_abs(x);
  vf s = 1.0f / (1.0f + e);
  return {x < 0.0f ? e * s : s, e};
}
// e^-x in the range of normal numbers: no less than 1.6e-38, no more than 2.2e38
BK_INLINE vf exp_minus(vf x) { return exp_within(max(set1(EXP_LOW), min(set1(EXP_HIGH), -x))); }
// v, but 0 where e^-x is out of range above: v stands for something that e^x multiplies
BK_INLINE vf unless_tiny(vf x, vf v) { return x < -EXP_HIGH ? vf{} : v; }
BK_INLINE vf sigmoid(vf x) { return unless_tiny(x, 1.0f / (1.0f + exp_minus(x))); }
BK_INLINE vf silu(vf x) { return unless_tiny(x, x / (1.0f + exp_minus(x))); }
struct Silu {
  vf value, slope;  // x s and s (1 + x (1 - s)), where 1 - s is e s and loses no digits
};
BK_INLINE Silu silu_and_slope(vf x) {
  vf e = exp_minus(x), s = unless_tiny(x, 1.0f / (1.0f + e));
  return {unless_tiny(x, x * s), s * fma(min(set1(-EXP_LOW), x), e * s, set1(1.0f))};
}
BK_INLINE vf dsilu(vf x) { return silu_and_slope(x).slope; }

// log(1 + e^x) = max(x, 0) + 2 atanh(e / (2 + e)) with e = exp(-|x|). torch's threshold of 20 changes no float.
BK_INLINE vf softplus_e(vf x, vf e) {
  vf s = e / (2.0f + e), q = s * s;
  vf p = set1(2.0f / 15);
  p = fma(p, q, set1(2.0f / 13));
  p = fma(p, q, set1(2.0f / 11));
  p = fma(p, q, set1(2.0f / 9));
  p = fma(p, q, set1(2.0f / 7));
  p = fma(p, q, set1(2.0f / 5));
  p = fma(p, q, set1(2.0f / 3));
  p = fma(p, q, set1(2.0f));
  return fma(s, p, max(vf{}, x));
}
BK_INLINE vf softplus(vf x) { return softplus_e(x, exp_minus_abs(x)); }

// --- transposing W x W ------------------------------------------------------------------------------------------

// One step of a butterfly: lanes whose index has bit S trade places between two rows.
template <int S, int... I>
BK_INLINE vf mix_low(vf a, vf b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I & S ? W + (I ^ S) : I)...);
}
template <int S, int... I>
BK_INLINE vf mix_high(vf a, vf b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I & S ? W + I : (I | S))...);
}
template <int S>
BK_INLINE void transpose_step(vf* r) {
  using Lanes = std::make_integer_sequence<int, W>;
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if (!(i & S)) {
      vf a = r[i], b = r[i | S];
      r[i] = mix_low<S>(a, b, Lanes{});
      r[i | S] = mix_high<S>(a, b, Lanes{});
    }
}
BK_INLINE void transpose(vf* r) {
  transpose_step<1>(r);
  transpose_step<2>(r);
#if BESTIARY_LANES >= 8
  transpose_step<4>(r);
#endif
#if BESTIARY_LANES >= 16
  transpose_step<8>(r);
#endif
}

// Lane i of the result is the sum over lanes of r[i]: log2(W) rounds, each of which halves the number of vectors.
template <int S>
BK_INLINE void sum_step(vf* r) {
  using Lanes = std::make_integer_sequence<int, W>;
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if (!(i & (2 * S - 1))) r[i] = mix_low<S>(r[i], r[i | S], Lanes{}) + mix_high<S>(r[i], r[i | S], Lanes{});
}
BK_INLINE vf sum_rows(vf* r) {
  sum_step<1>(r);
  sum_step<2>(r);
#if BESTIARY_LANES >= 8
  sum_step<4>(r);
#endif
#if BESTIARY_LANES >= 16
  sum_step<8>(r);
#endif
  return r[0];
}

// --- half precision ---------------------------------------------------------------------------------------------

enum Dtype : int { F32, BF16, F16 };

BK_INLINE float from_bf16(uint16_t x) {
  uint32_t u = (uint32_t)x << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
BK_INLINE uint16_t to_bf16(float f) {  // to nearest, ties to even; NaN stays NaN
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
BK_INLINE float from_f16(uint16_t x) {
#if defined(__F16C__)
  return _cvtsh_ss(x);
#else
  uint32_t sign = (uint32_t)(x & 0x8000) << 16, mantissa = x & 0x3ff, exponent = (x >> 10) & 31;
  float f;
  if (exponent == 0) {
    f = (float)mantissa * 5.9604645e-8f;  // 2^-24
  } else {
    uint32_t u = exponent == 31 ? 0x7f800000 | (mantissa << 13) : ((exponent + 112) << 23) | (mantissa << 13);
    std::memcpy(&f, &u, 4);
  }
  return sign ? -f : f;
#endif
}
BK_INLINE uint16_t to_f16(float f) {  // to nearest, ties to even
#if defined(__F16C__)
  return (uint16_t)_cvtss_sh(f, 0);
#else
  uint32_t u;
  std::memcpy(&u, &f, 4);
  uint16_t sign = (uint16_t)((u >> 16) & 0x8000);
  u &= 0x7fffffff;
  if (u > 0x7f800000) return sign | 0x7e00;
  if (u >= 0x477ff000) return sign | 0x7c00;  // rounds to 65536 or more
  if (u < 0x38800000) {                       // below 2^-14: adding 0.5 aligns the subnormal's bits and rounds
    float a;
    std::memcpy(&a, &u, 4);
    a += 0.5f;
    std::memcpy(&u, &a, 4);
    return sign | (uint16_t)(u - 0x3f000000);
  }
  u += 0xfff + ((u >> 13) & 1);
  return sign | (uint16_t)((u - 0x38000000) >> 13);
#endif
}
BK_INLINE float from_half(const void* p, int64_t i, int dtype) {
  uint16_t x = static_cast<const uint16_t*>(p)[i];
  return dtype == BF16 ? from_bf16(x) : from_f16(x);
}
BK_INLINE void to_half(void* p, int64_t i, int dtype, float f) {
  static_cast<uint16_t*>(p)[i] = dtype == BF16 ? to_bf16(f) : to_f16(f);
}

// Contiguous half to float and back; the loops become vector conversions.
inline void halves_to_floats(float* out, const uint16_t* in, int64_t n, int dtype) {
  int64_t i = 0;
#if BK_AVX512
  for (; i + 16 <= n; i += 16) {
    __m256i h = _mm256_loadu_si256((const __m256i*)(in + i));
    __m512 f = dtype == BF16 ? _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)) : _mm512_cvtph_ps(h);
    _mm512_storeu_ps(out + i, f);
  }
#endif
  for (; i < n; ++i) out[i] = dtype == BF16 ? from_bf16(in[i]) : from_f16(in[i]);
}
inline void floats_to_halves(uint16_t* out, const float* in, int64_t n, int dtype) {
  int64_t i = 0;
#if BK_AVX512
  if (dtype == F16)
    for (; i + 16 <= n; i += 16)
      _mm256_storeu_si256((__m256i*)(out + i), _mm512_cvtps_ph(_mm512_loadu_ps(in + i), 0));
#endif
  for (; i < n; ++i) out[i] = dtype == BF16 ? to_bf16(in[i]) : to_f16(in[i]);
}

// While it lives, results too small for a normal float are 0: a decayed state would else cost an assist a step.
struct FlushToZero {
#if defined(__x86_64__)
  unsigned saved = _mm_getcsr();
  FlushToZero() { _mm_setcsr(saved | 0x8040); }
  ~FlushToZero() { _mm_setcsr(saved); }
#endif
};

}  // namespace bestiary

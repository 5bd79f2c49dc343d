// Sixteen float32 at a time, by AVX-512 or by AVX2 with FMA.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)

struct V {
  __m512 v;
};
inline __mmask16 first(int64_t n) { return n >= 16 ? 0xffff : (1u << n) - 1; }
inline V zero() { return {_mm512_setzero_ps()}; }
inline V all(float x) { return {_mm512_set1_ps(x)}; }
inline V load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline V load(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
inline void store(float* p, V a) { _mm512_storeu_ps(p, a.v); }
inline void store(float* p, V a, int64_t n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
inline V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline V operator+(V a, V b) { return {_mm512_add_ps(a.v, b.v)}; }
inline V operator-(V a, V b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline V operator*(V a, V b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline V max(V a, V b) { return {_mm512_max_ps(a.v, b.v)}; }
inline float sum(V a) { return _mm512_reduce_add_ps(a.v); }
inline float largest(V a) { return _mm512_reduce_max_ps(a.v); }
inline V of_bf16(const uint16_t* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
}
inline V of_int8(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
// e4m3 by way of float16: its bits, moved, are those of the same number times 2^-8, subnormals too.
inline V of_e4m3(const uint8_t* p) {
  __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)), 7);
  return {_mm512_mul_ps(_mm512_cvtph_ps(_mm256_and_si256(wide, _mm256_set1_epi16((short)0xbfff))), _mm512_set1_ps(256))};
}
inline V round_to_int(V a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline V scale_by_power(V a, V power) { return {_mm512_scalef_ps(a.v, power.v)}; }
// [16] sums of the lanes of 16 vectors each.
inline V sums(const V* a) {
  __m512 b[8], c[4], d[2];
  for (int i = 0; i < 8; ++i)
    b[i] = _mm512_add_ps(_mm512_unpacklo_ps(a[2 * i].v, a[2 * i + 1].v), _mm512_unpackhi_ps(a[2 * i].v, a[2 * i + 1].v));
  for (int i = 0; i < 4; ++i)
    c[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(b[2 * i]), _mm512_castps_pd(b[2 * i + 1]))),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(b[2 * i]), _mm512_castps_pd(b[2 * i + 1]))));
  for (int i = 0; i < 2; ++i)
    d[i] = _mm512_add_ps(_mm512_shuffle_f32x4(c[2 * i], c[2 * i + 1], 0x88), _mm512_shuffle_f32x4(c[2 * i], c[2 * i + 1], 0xdd));
  return {_mm512_add_ps(_mm512_shuffle_f32x4(d[0], d[1], 0x88), _mm512_shuffle_f32x4(d[0], d[1], 0xdd))};
}

#else

struct V {
  __m256 a, b;
};
inline V zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline V all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline V load(const float* p, int64_t n) {
  if (n >= 16) return load(p);
  float held[16] = {};
  std::memcpy(held, p, n * sizeof(float));
  return load(held);
}
inline void store(float* p, V v) {
  _mm256_storeu_ps(p, v.a);
  _mm256_storeu_ps(p + 8, v.b);
}
inline void store(float* p, V v, int64_t n) {
  if (n >= 16) return store(p, v);
  float held[16];
  store(held, v);
  std::memcpy(p, held, n * sizeof(float));
}
inline V fma(V a, V b, V c) { return {_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)}; }
inline V operator+(V a, V b) { return {_mm256_add_ps(a.a, b.a), _mm256_add_ps(a.b, b.b)}; }
inline V operator-(V a, V b) { return {_mm256_sub_ps(a.a, b.a), _mm256_sub_ps(a.b, b.b)}; }
inline V operator*(V a, V b) { return {_mm256_mul_ps(a.a, b.a), _mm256_mul_ps(a.b, b.b)}; }
inline V max(V a, V b) { return {_mm256_max_ps(a.a, b.a), _mm256_max_ps(a.b, b.b)}; }
inline float sum(V v) {
  __m256 h = _mm256_add_ps(v.a, v.b);
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
inline float largest(V v) {
  float held[16], m;
  store(held, v);
  m = held[0];
  for (int i = 1; i < 16; ++i) m = held[i] > m ? held[i] : m;
  return m;
}
inline V of_bf16(const uint16_t* p) {
  auto half = [](const uint16_t* q) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)q)), 16));
  };
  return {half(p), half(p + 8)};
}
inline V of_int8(const int8_t* p) {
  auto half = [](const int8_t* q) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)q))); };
  return {half(p), half(p + 8)};
}
inline V of_e4m3(const uint8_t* p) {
  __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)), 7);
  wide = _mm256_and_si256(wide, _mm256_set1_epi16((short)0xbfff));
  __m256 scale = _mm256_set1_ps(256);
  return {_mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(wide)), scale),
          _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(wide, 1)), scale)};
}
inline V round_to_int(V v) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(v.a, mode), _mm256_round_ps(v.b, mode)};
}
inline V scale_by_power(V v, V power) {
  auto half = [](__m256 a, __m256 p) {
    __m256i e = _mm256_cvtps_epi32(_mm256_max_ps(p, _mm256_set1_ps(-126)));
    return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23)));
  };
  return {half(v.a, power.a), half(v.b, power.b)};
}
inline V sums(const V* a) {
  float held[16];
  for (int i = 0; i < 16; ++i) held[i] = sum(a[i]);
  return load(held);
}

#endif

// exp(x) for x <= 0, to 2 units in the last place; 1e-38 below -87.3 (Cephes' polynomial).
inline V exp(V x) {
  x = max(all(-87.3f), x);  // in this order NaN stays NaN
  V n = round_to_int(x * all(1.44269504f));
  V r = fma(n, all(-0.693359375f), x);
  r = fma(n, all(2.12194440e-4f), r);
  V p = all(1.9875691500e-4f);
  p = fma(p, r, all(1.3981999507e-3f));
  p = fma(p, r, all(8.3334519073e-3f));
  p = fma(p, r, all(4.1665795894e-2f));
  p = fma(p, r, all(1.6666665459e-1f));
  p = fma(p, r, all(5.0000001201e-1f));
  return scale_by_power(fma(p, r * r, r + all(1)), n);
}

inline uint16_t to_bf16(float x) {  // half to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
}
inline void store_bf16(uint16_t* p, V a, int64_t n) {
#ifdef __AVX512BF16__
  _mm256_mask_storeu_epi16(p, first(n), (__m256i)_mm512_cvtneps_pbh(a.v));
#else
  float held[16];
  store(held, a);
  for (int64_t i = 0; i < n; ++i) p[i] = to_bf16(held[i]);
#endif
}
inline float from_bf16(uint16_t x) {
  uint32_t bits = uint32_t(x) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

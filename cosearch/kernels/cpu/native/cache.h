// A KV cache of one tensor, as `cosearch/architecture/cache.py` stores it: [B, S, K, D] in one of three memory orders.
//
// FORMAT names a struct below. Formats with scales have one bfloat16 for each token and head.
#pragma once
#include "formats.h"

enum Layout { BSHD, BHSD, BHDS };

namespace cached {

struct float32 : ::float32 {
  static constexpr bool scaled = false;
  static void encode(const float* x, int64_t d, void* to, int64_t stride, uint16_t*) {
    for (int64_t i = 0; i < d; ++i) ((float*)to)[i * stride] = x[i];
  }
};
struct bfloat16 : ::bfloat16 {
  static constexpr bool scaled = false;
  static void encode(const float* x, int64_t d, void* to, int64_t stride, uint16_t*) {
    for (int64_t i = 0; i < d; ++i) ((uint16_t*)to)[i * stride] = to_bf16(x[i]);
  }
};

// The scale that brings the largest to `limit`, as it is stored; NaN if one of them is.
inline float choose_scale(const float* x, int64_t d, float limit, uint16_t* stored) {
  float most = 0;
  bool nan = false;
  for (int64_t i = 0; i < d; ++i) most = std::fabs(x[i]) > most ? std::fabs(x[i]) : most, nan |= x[i] != x[i];
  float scale = most * float(1.0 / double(limit));
  if (scale < 1.17549435e-38f) scale = 0;
  if (nan) scale = NAN;
  *stored = to_bf16(scale);
  return from_bf16(*stored);
}
inline float clipped(float x, float scale, float limit) {
  float y = scale > 0 ? x / scale : 0;
  return y > limit ? limit : y > -limit ? y : -limit;  // a number also for NaN
}

struct int8 : ::int8 {
  static constexpr bool scaled = true;
  static void encode(const float* x, int64_t d, void* to, int64_t stride, uint16_t* scale) {
    float by = choose_scale(x, d, 127, scale);
    for (int64_t i = 0; i < d; ++i) ((int8_t*)to)[i * stride] = int8_t(std::nearbyintf(clipped(x[i], by, 127)));
  }
};
struct float8_e4m3 : ::float8_e4m3 {
  static constexpr bool scaled = true;
  static uint8_t code(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint32_t sign = bits >> 24 & 128, size = bits & 0x7fffffff;
    float magnitude = std::fabs(x);
    uint32_t small = uint32_t(std::nearbyintf(magnitude * 512));
    uint32_t normal = ((size + 0x7ffff + (size >> 20 & 1)) >> 20) - (120 << 3);
    return uint8_t(sign | (magnitude < 0.015625f ? small : normal));
  }
  static void encode(const float* x, int64_t d, void* to, int64_t stride, uint16_t* scale) {
    float by = choose_scale(x, d, 448, scale);
    for (int64_t i = 0; i < d; ++i) ((uint8_t*)to)[i * stride] = code(clipped(x[i], by, 448));
  }
};
// Byte i holds dimension i in its low nibble and i + D / 2 in its high one; D is a multiple of 32.
struct int4 {
  static constexpr int bits = 4;
  static constexpr bool scaled = true;
  static void encode(const float* x, int64_t d, void* to, int64_t stride, uint16_t* scale) {
    float by = choose_scale(x, d, 7, scale);
    for (int64_t i = 0; i < d / 2; ++i) {
      int low = int(std::nearbyintf(clipped(x[i], by, 7))) + 8, high = int(std::nearbyintf(clipped(x[i + d / 2], by, 7))) + 8;
      ((uint8_t*)to)[i * stride] = uint8_t(low | high << 4);
    }
  }
};

}  // namespace cached

inline V of_nibbles(const uint8_t* p, bool high) {
  __m128i both = _mm_loadu_si128((const __m128i*)p);
  __m128i code = _mm_and_si128(high ? _mm_srli_epi16(both, 4) : both, _mm_set1_epi8(15));
  alignas(16) int8_t value[16];
  _mm_store_si128((__m128i*)value, _mm_sub_epi8(code, _mm_set1_epi8(8)));
  return of_int8(value);
}

// The keys, or the values, of one sequence and head.
template <class F>
struct Head {
  const char* values;
  const uint16_t* scales;
  int64_t slot, dimension;  // strides, in numbers (for 4 bits, in bytes)
  int64_t scale_slot;
  int64_t size, slots;      // D, S

  Head(const void* all, const void* all_scales, Layout layout, int64_t b, int64_t k, int64_t slots, int64_t heads, int64_t d)
      : size(d), slots(slots) {
    int64_t held = F::bits == 4 ? d / 2 : d, first, first_scale;
    if (layout == BSHD) {
      first = (b * slots * heads + k) * held, slot = heads * held, dimension = 1;
      first_scale = b * slots * heads + k, scale_slot = heads;
    } else {
      first = (b * heads + k) * slots * held;
      slot = layout == BHSD ? held : 1, dimension = layout == BHSD ? 1 : slots;
      first_scale = (b * heads + k) * slots, scale_slot = 1;
    }
    values = (const char*)all + first * (F::bits == 4 ? 8 : F::bits) / 8;
    scales = F::scaled ? (const uint16_t*)all_scales + first_scale : nullptr;
  }

  static constexpr int64_t bytes(int64_t count) { return F::bits == 4 ? count : count * F::bits / 8; }

  // Of one slot the dimensions from d on; `n` of them where fewer than 16 are left.
  V along(int64_t s, int64_t d, int64_t n) const {
    if constexpr (F::bits == 4) {
      int64_t half = size / 2;
      return of_nibbles((const uint8_t*)values + s * slot + (d < half ? d : d - half), d >= half);
    } else {
      const char* row = values + bytes(s * slot);
      return n >= 16 ? F::load16(row, d) : load_part<F>(row, d, n);
    }
  }
  // Of one dimension the slots from s on.
  V across(int64_t s, int64_t d, int64_t n) const {
    if constexpr (F::bits == 4) {
      int64_t half = size / 2;
      const uint8_t* row = (const uint8_t*)values + (d < half ? d : d - half) * dimension + s;
      if (n >= 16) return of_nibbles(row, d >= half);
      uint8_t held[16] = {};
      std::memcpy(held, row, n);
      return of_nibbles(held, d >= half);
    } else {
      const char* row = values + bytes(d * dimension);
      return n >= 16 ? F::load16(row, s) : load_part<F>(row, s, n);
    }
  }
  // The scales of 16 slots; 1 without scales, and for slots past the n-th 0.
  V scales_of(int64_t s, int64_t n) const {
    float held[16] = {};
    for (int64_t i = 0; i < (n < 16 ? n : 16); ++i) held[i] = F::scaled ? from_bf16(scales[(s + i) * scale_slot]) : 1;
    return load(held);
  }
  void ask_for(int64_t s) const {
    if (dimension != 1) return;
    const char* row = values + bytes(s * slot);
    for (int64_t line = 0; line < bytes(F::bits == 4 ? size / 2 : size); line += 64) _mm_prefetch(row + line, _MM_HINT_T0);
  }
};

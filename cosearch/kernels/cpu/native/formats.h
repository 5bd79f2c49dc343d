// The number formats of `cosearch/precision`, as a row of a matrix "out_in" or the vector of a head in a cache holds them.
//
// FORMAT names the struct that a file is compiled for. `load16` gives 16 consecutive numbers, without their scale; `scale_bytes`
// is what a row of so many numbers has of scales.
#pragma once
#include "simd.h"

// What a format's file stores beside its values: nothing, one scale a column, or one a group of rows.
enum class Scales { none, column, group };

struct float32 {
  static constexpr int64_t scale_bytes(int64_t) { return 0; }
  static constexpr Scales scales = Scales::none;
  static constexpr int bits = 32;
  static V load16(const void* row, int64_t k) { return load((const float*)row + k); }
};
struct bfloat16 {
  static constexpr int64_t scale_bytes(int64_t) { return 0; }
  static constexpr Scales scales = Scales::none;
  static constexpr int bits = 16;
  static V load16(const void* row, int64_t k) { return of_bf16((const uint16_t*)row + k); }
};
struct int8 {
  static constexpr int64_t scale_bytes(int64_t) { return 4; }
  static constexpr Scales scales = Scales::column;
  static constexpr int bits = 8;
  static V load16(const void* row, int64_t k) { return of_int8((const int8_t*)row + k); }
};
struct float8_e4m3 {
  static constexpr int64_t scale_bytes(int64_t) { return 4; }
  static constexpr Scales scales = Scales::column;
  static constexpr int bits = 8;
  static V load16(const void* row, int64_t k) { return of_e4m3((const uint8_t*)row + k); }
};

// The first n < 16 numbers, and zeros: a row's end may be the end of the memory.
template <class Format>
inline V load_part(const void* row, int64_t k, int64_t n) {
  alignas(64) char held[64] = {};
  std::memcpy(held, (const char*)row + k * Format::bits / 8, n * Format::bits / 8);
  return Format::load16(held, 0);
}

// Formats of 4 bits: a group of G rows is G / 2 bytes, row k in the low nibble of byte k, row k + G / 2 in the high one.
struct integers4 {
  static constexpr float value(int code) { return code - 8; }
};
struct e2m1 {
  static constexpr float value(int code) {
    constexpr float size[8] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
    return code < 8 ? size[code] : -size[code - 8];
  }
};

struct bfloat16_scale {
  static constexpr int bytes = 2;
  static float get(const void* p, int64_t i, float) { return from_bf16(((const uint16_t*)p)[i]); }
};
struct power_scale {
  static constexpr int bytes = 1;
  static float get(const void* p, int64_t i, float) {
    uint32_t bits = uint32_t(((const uint8_t*)p)[i]) << 23;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
  }
};
struct e4m3_scale {
  static constexpr int bytes = 1;
  static float get(const void* p, int64_t i, float tensor) {
    uint8_t b = ((const uint8_t*)p)[i];
    int exponent = b >> 3 & 15, fraction = b & 7;
    float size = exponent ? std::ldexp(float(8 + fraction), exponent - 10) : std::ldexp(float(fraction), -9);
    return (b & 128 ? -size : size) * tensor;
  }
};

template <class C, int G, class S>
struct Nibbles {
  static constexpr Scales scales = Scales::group;
  static constexpr int bits = 4, group = G;
  using Code = C;
  using Scale = S;
  static constexpr int64_t scale_bytes(int64_t rows) { return rows / G * S::bytes; }
};
using int4_g32 = Nibbles<integers4, 32, bfloat16_scale>;
using int4_g64 = Nibbles<integers4, 64, bfloat16_scale>;
using int4_g128 = Nibbles<integers4, 128, bfloat16_scale>;
using mxfp4 = Nibbles<e2m1, 32, power_scale>;
using nvfp4 = Nibbles<e2m1, 16, e4m3_scale>;

// A whole row in order and times its scales: `write(k, values, n)` gets the n (16, or 8) numbers from the k-th on.
template <class Format, class Write>
inline void open_row(const uint8_t* row, const void* scales, float tensor, int64_t rows, Write write) {
  constexpr int half = Format::group / 2, step = half < 16 ? half : 16;
  alignas(64) int8_t codes[16];
  for (int i = 0; i < 16; ++i) codes[i] = int8_t(2 * Format::Code::value(i));
  const __m128i table = _mm_load_si128((const __m128i*)codes), low = _mm_set1_epi8(15);
  for (int64_t g = 0; g < rows / Format::group; ++g) {
    V scale = all(0.5f * Format::Scale::get(scales, g, tensor));
    for (int i = 0; i < half; i += step) {
      const uint8_t* from = row + g * half + i;
      __m128i both = step == 16 ? _mm_loadu_si128((const __m128i*)from) : _mm_loadl_epi64((const __m128i*)from);
      for (int high = 0; high < 2; ++high) {
        alignas(16) int8_t doubled[16];
        __m128i code = _mm_and_si128(high ? _mm_srli_epi16(both, 4) : both, low);
        _mm_store_si128((__m128i*)doubled, _mm_shuffle_epi8(table, code));
        write(g * Format::group + i + high * half, of_int8(doubled) * scale, step);
      }
    }
  }
}

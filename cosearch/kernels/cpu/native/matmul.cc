// Products of prepared inputs (prepare.cc) with matrices "out_in": each of the matrix' columns is a row of memory.
//
// Macros: FORMAT; INPUT float32, bfloat16 or int8 (how the input is prepared); ROWS, TOKENS: the tile that is summed in
// registers where there are more than two tokens; KEPT of every GROUP rows are stored (`cosearch/sparsity/n_m.py`), or
// GROUP is 0.
//
// One to four matrices of the same format are multiplied with the same input, as if they were one: their results stand
// side by side. buffers: x, out [tokens, columns of all] float32, residual (or out again), then for each matrix its
// values, scale, tensor scale and indices (values again where there is none).
// params: tokens, rows, epilogue, chunks a thread, bytes to prefetch ahead of what few tokens read, bytes of rows that are
//   opened at a time for many tokens, count of matrices, columns of each
// epilogue: 0 none; 1 adds the residual [tokens, columns]; 2 silu of the first times the second, [tokens, columns of
// one]; 3 gelu (tanh)
#include <algorithm>

#include "formats.h"
#include "op.h"
#include "prepared.h"

#define FLOAT32_INPUT 0
#define BFLOAT16_INPUT 1
#define INT8_INPUT 2
constexpr bool NIBBLES = FORMAT::bits == 4;
#ifdef COSEARCH_WIDE
constexpr int64_t MOST_FEW = 2;  // tokens
#else
constexpr int64_t MOST_FEW = NIBBLES ? 0 : 2;
#endif

// How the input is prepared for so many tokens.
inline int64_t kind(int64_t tokens) {
  if constexpr (GROUP > 0) return 6;
  if (INPUT == INT8_INPUT) return NIBBLES ? 5 : 4;
  return INPUT + (NIBBLES && tokens <= MOST_FEW ? 2 : 0);
}

struct Matrix {
  const char* values;
  const char* scale;
  const float* tensor;
  const uint8_t* indices;
  int64_t row_bytes, scale_bytes;
};

// Tiles: ROWS rows of the matrix by T tokens, [T, ROWS] in `out`. -----------------------------------------------------

// Memory is read fastest as one stream. What lies `ahead` of it is asked for where the processor would ask too late: where
// much is computed between two lines; elsewhere asking only takes its turns, and `ahead` is 0.
template <int BYTES>
inline void prefetch(const char* at, int64_t ahead) {
  for (int line = 0; line < BYTES; line += 64) _mm_prefetch(at + ahead + line, _MM_HINT_T0);
}

// Few sums leave room for several at a time along a row, which the processor adds up independently.
template <int R, int T>
constexpr int CHAINS = R * T >= 8 ? 1 : R * T >= 4 ? 2 : 4;

template <class F, int R, int T>
inline void tile_float32(const char* const* row, const char* x, int64_t stride, int64_t rows, int64_t ahead, float* out) {
  constexpr int U = CHAINS<R, T>;
  V acc[U][R][T];
  for (int u = 0; u < U; ++u)
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t) acc[u][r][t] = zero();
  int64_t k = 0;
  for (; k + 16 * U <= rows; k += 16 * U)
    for (int u = 0; u < U; ++u) {
      V w[R];
      for (int r = 0; r < R; ++r) {
        w[r] = F::load16(row[r], k + 16 * u);
        if (T <= 2 && u == 0) prefetch<16 * U * F::bits / 8>(row[r] + k * F::bits / 8, ahead);
      }
      for (int t = 0; t < T; ++t) {
        V in = load((const float*)(x + t * stride) + k + 16 * u);
        for (int r = 0; r < R; ++r) acc[u][r][t] = fma(w[r], in, acc[u][r][t]);
      }
    }
  for (; k + 16 <= rows; k += 16)
    for (int r = 0; r < R; ++r) {
      V w = F::load16(row[r], k);
      for (int t = 0; t < T; ++t) acc[0][r][t] = fma(w, load((const float*)(x + t * stride) + k), acc[0][r][t]);
    }
  if (k < rows)
    for (int r = 0; r < R; ++r) {
      V w = load_part<F>(row[r], k, rows - k);
      for (int t = 0; t < T; ++t) acc[0][r][t] = fma(w, load((const float*)(x + t * stride) + k), acc[0][r][t]);
    }
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < R; ++r) {
      for (int u = 1; u < U; ++u) acc[0][r][t] = acc[0][r][t] + acc[u][r][t];
      out[t * R + r] = sum(acc[0][r][t]);
    }
}

#ifdef __AVX512BF16__
inline __m512bh pairs(const void* p) { return (__m512bh)_mm512_loadu_si512(p); }

template <int R, int T>
inline void tile_bfloat16(const char* const* row, const char* x, int64_t stride, int64_t rows, int64_t ahead, float* out) {
  constexpr int U = CHAINS<R, T>;
  __m512 acc[U][R][T];
  for (int u = 0; u < U; ++u)
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t) acc[u][r][t] = _mm512_setzero_ps();
  int64_t k = 0;
  for (; k + 32 * U <= rows; k += 32 * U)
    for (int u = 0; u < U; ++u) {
      __m512bh w[R];
      for (int r = 0; r < R; ++r) {
        w[r] = pairs(row[r] + 2 * k + 64 * u);
        if (T <= 2 && u == 0) prefetch<64 * U>(row[r] + 2 * k, ahead);
      }
      for (int t = 0; t < T; ++t) {
        __m512bh in = pairs(x + t * stride + 2 * k + 64 * u);
        for (int r = 0; r < R; ++r) acc[u][r][t] = _mm512_dpbf16_ps(acc[u][r][t], w[r], in);
      }
    }
  for (; k < rows; k += 32) {
    __mmask32 left = rows - k >= 32 ? ~0u : (1u << (rows - k)) - 1;
    for (int r = 0; r < R; ++r) {
      __m512bh w = (__m512bh)_mm512_maskz_loadu_epi16(left, row[r] + 2 * k);
      for (int t = 0; t < T; ++t) acc[0][r][t] = _mm512_dpbf16_ps(acc[0][r][t], w, pairs(x + t * stride + 2 * k));
    }
  }
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < R; ++r) {
      for (int u = 1; u < U; ++u) acc[0][r][t] = _mm512_add_ps(acc[0][r][t], acc[u][r][t]);
      out[t * R + r] = _mm512_reduce_add_ps(acc[0][r][t]);
    }
}
#endif

#ifdef COSEARCH_WIDE
inline __m512i bytes(const char* row, int64_t k, int64_t count) {
  if (k + 64 <= count) return _mm512_loadu_si512(row + k);
  return _mm512_maskz_loadu_epi8((1ull << (count - k)) - 1, row + k);
}
#endif

#ifdef __AVX512VNNI__
// The input is unsigned, with 128 added: 128 times the sum of the weights is taken off again.
template <int R, int T>
inline void tile_int8(const char* const* row, const char* x, int64_t stride, int64_t rows, int64_t ahead, float* out) {
  __m512i acc[R][T], sum_of[R], ones = _mm512_set1_epi8(1);
  for (int r = 0; r < R; ++r) {
    sum_of[r] = _mm512_setzero_si512();
    for (int t = 0; t < T; ++t) acc[r][t] = _mm512_setzero_si512();
  }
  for (int64_t k = 0; k < rows; k += 64) {
    __m512i w[R];
    for (int r = 0; r < R; ++r) {
      w[r] = bytes(row[r], k, rows);
      if constexpr (T <= 2) prefetch<64>(row[r] + k, ahead);
      sum_of[r] = _mm512_dpbusd_epi32(sum_of[r], ones, w[r]);
    }
    for (int t = 0; t < T; ++t) {
      __m512i in = _mm512_loadu_si512(x + t * stride + k);
      for (int r = 0; r < R; ++r) acc[r][t] = _mm512_dpbusd_epi32(acc[r][t], in, w[r]);
    }
  }
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < R; ++r)
      out[t * R + r] = float(_mm512_reduce_add_epi32(_mm512_sub_epi32(acc[r][t], _mm512_slli_epi32(sum_of[r], 7))));
}
#endif

#ifdef COSEARCH_WIDE
// The scales of the groups in 128 rows, each on the lanes that its products are summed in.
template <class F>
inline __m512 spread(const char* scales, int64_t group, int64_t groups, float tensor) {
  constexpr int count = 128 / F::group;
  __mmask16 there = first(std::min<int64_t>(count, groups - group));
  __m512 each;
  if constexpr (F::Scale::bytes == 2) {
    __m256i held = _mm256_maskz_loadu_epi16(there, scales + 2 * group);
    each = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(held), 16));
  } else {
    __m128i held = _mm_maskz_loadu_epi8(there, scales + group);
    if constexpr (std::is_same_v<typename F::Scale, power_scale>)
      each = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu8_epi32(held), 23));
    else {
      __m256i wide = _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(held), 7), _mm256_set1_epi16((short)0xbfff));
      each = _mm512_mul_ps(_mm512_cvtph_ps(wide), _mm512_set1_ps(256 * tensor));
    }
  }
  constexpr int lanes = 16 / count;
  const __m512i from = _mm512_setr_epi32(0, 1 / lanes, 2 / lanes, 3 / lanes, 4 / lanes, 5 / lanes, 6 / lanes, 7 / lanes, 8 / lanes,
                                         9 / lanes, 10 / lanes, 11 / lanes, 12 / lanes, 13 / lanes, 14 / lanes, 15 / lanes);
  return _mm512_permutexvar_ps(from, each);
}

// Nibbles choose from a table of their values as they stand in the weights' words; the input was put in their order.
template <class F, int R, int T>
inline void tile_nibbles(const Matrix& m, const char* const* row, const char* const* scales, const char* x, int64_t stride,
                         int64_t rows, int64_t ahead, float* out) {
  __m512 acc[R][T];
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) acc[r][t] = _mm512_setzero_ps();
  float tensor = m.tensor ? *m.tensor : 1;
#if INPUT == BFLOAT16_INPUT
  alignas(64) uint16_t codes[32];
  for (int i = 0; i < 32; ++i) codes[i] = to_bf16(F::Code::value(i & 15));
#else
  alignas(64) float codes[16];
  for (int i = 0; i < 16; ++i) codes[i] = F::Code::value(i);
#endif
  const __m512i table = _mm512_load_si512(codes);
  (void)table;
  for (int64_t k = 0; k < rows; k += 128) {
    for (int r = 0; r < R; ++r) {
      __m512i w = bytes(row[r], k / 2, rows / 2);
      if constexpr (T <= 2) prefetch<64>(row[r] + k / 2, ahead);
      __m512 part[T];
#if INPUT == INT8_INPUT
      __m512i low = _mm512_and_si512(w, _mm512_set1_epi8(15));
      __m512i high = _mm512_and_si512(_mm512_srli_epi16(w, 4), _mm512_set1_epi8(15));
      for (int t = 0; t < T; ++t) {
        const char* in = x + t * stride + k / 128 * 192;
        __m512i whole = _mm512_dpbusd_epi32(_mm512_loadu_si512(in + 128), low, _mm512_loadu_si512(in));
        part[t] = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(whole, high, _mm512_loadu_si512(in + 64)));
      }
#elif INPUT == BFLOAT16_INPUT
      for (int t = 0; t < T; ++t) part[t] = _mm512_setzero_ps();
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        __m512bh value = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(w, 4 * j), table);
        for (int t = 0; t < T; ++t) part[t] = _mm512_dpbf16_ps(part[t], value, pairs(x + t * stride + 2 * k + 64 * j));
      }
#else
      for (int t = 0; t < T; ++t) part[t] = _mm512_setzero_ps();
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        __m512 value = _mm512_permutexvar_ps(_mm512_srli_epi32(w, 4 * j), _mm512_castsi512_ps(table));
        for (int t = 0; t < T; ++t)
          part[t] = _mm512_fmadd_ps(value, _mm512_loadu_ps(x + t * stride + 4 * k + 64 * j), part[t]);
      }
#endif
      __m512 scale = spread<F>(scales[r], k / F::group, rows / F::group, tensor);
      for (int t = 0; t < T; ++t) acc[r][t] = _mm512_fmadd_ps(part[t], scale, acc[r][t]);
    }
  }
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < R; ++r) out[t * R + r] = _mm512_reduce_add_ps(acc[r][t]);
}
#endif

#if defined(COSEARCH_WIDE) && GROUP
constexpr int INDEX_BITS = GROUP == 4 ? 2 : 4, SHARED = 8 / INDEX_BITS;

// For each of 16 groups the number of the chosen place, whose bits are `bit`, among GROUP numbers `at(place)`.
template <class At>
inline __m512 pick(const __mmask16* bit, At at) {
  __m512 some[GROUP];
  for (int i = 0; i < GROUP; ++i) some[i] = at(i);
  for (int level = 0, left = GROUP / 2; left; ++level, left /= 2)
    for (int i = 0; i < left; ++i) some[i] = _mm512_mask_blend_ps(bit[level], some[2 * i], some[2 * i + 1]);
  return some[0];
}

// What 16 stored weights' indices say: bit by bit, for the groups from `b` on of those that share their bits at `q`.
inline void places(const uint8_t* indices, int64_t b, int64_t n, int q, __mmask16* bit) {
  __m128i held = _mm_maskz_loadu_epi8(first(n), indices + b);
  for (int level = 0; 1 << level < GROUP; ++level) bit[level] = _mm_test_epi8_mask(held, _mm_set1_epi8(char(1 << (q * INDEX_BITS + level))));
}

// A row whose stored weights each pick their input.
template <class F, int T>
inline void tile_sparse(const char* row, const uint8_t* indices, const char* x, int64_t stride, int64_t rows, int64_t ahead, float* out) {
  int64_t groups = rows / GROUP, shared = groups / SHARED;
  V acc[T];
  for (int t = 0; t < T; ++t) acc[t] = zero();
  for (int q = 0; q < SHARED; ++q)
    for (int64_t b = 0; b < shared; b += 16) {
      int64_t n = std::min<int64_t>(16, shared - b), g = q * shared + b;
      for (int i = 0; i < KEPT; ++i) {
        int64_t at = i * groups + g;
        V w = n == 16 ? F::load16(row, at) : load_part<F>(row, at, n);
        __mmask16 bit[3];
        places(indices + i * shared, b, n, q, bit);
        for (int t = 0; t < T; ++t) {
          const float* in = (const float*)(x + t * stride) + g;
          acc[t] = fma(w, V{pick(bit, [&](int place) { return _mm512_loadu_ps(in + place * groups); })}, acc[t]);
        }
      }
      prefetch<64>(row + (KEPT * g) * F::bits / 8, ahead);
    }
  for (int t = 0; t < T; ++t) out[t] = sum(acc[t]);
}

// The whole row in the inputs' order, zeros where nothing is stored.
template <class F>
inline void spread_row(const char* row, const uint8_t* indices, int64_t rows, float* to) {
  int64_t groups = rows / GROUP, shared = groups / SHARED;
  for (int q = 0; q < SHARED; ++q)
    for (int64_t b = 0; b < shared; b += 16) {
      int64_t n = std::min<int64_t>(16, shared - b), g = q * shared + b;
      __m512 dense[GROUP];
      for (int place = 0; place < GROUP; ++place) dense[place] = _mm512_setzero_ps();
      for (int i = 0; i < KEPT; ++i) {
        int64_t at = i * groups + g;
        V w = n == 16 ? F::load16(row, at) : load_part<F>(row, at, n);
        __mmask16 bit[3];
        places(indices + i * shared, b, n, q, bit);
        for (int place = 0; place < GROUP; ++place) {
          __mmask16 here = first(n);
          for (int level = 0; 1 << level < GROUP; ++level) here &= place >> level & 1 ? bit[level] : ~bit[level];
          dense[place] = _mm512_mask_mov_ps(dense[place], here, w.v);
        }
      }
      for (int place = 0; place < GROUP; ++place) store(to + place * groups + g, V{dense[place]}, n);
    }
}
#endif

// Rows that a tile reads: those of the matrix where they lie, or opened ones.
struct Rows {
  const char* values;
  const char* scale;
  int64_t row_bytes, scale_bytes;
  const char *column_scale;  // of formats with one scale a column
};

template <bool OPENED, int R, int T>
inline void tile(const Matrix& m, const Rows& from, int64_t at, const char* x, int64_t stride, int64_t rows, int64_t ahead,
                 float* out) {
  const char *row[R], *scales[R];
  for (int r = 0; r < R; ++r) {
    row[r] = from.values + (at + r) * from.row_bytes;
    scales[r] = from.scale + (at + r) * from.scale_bytes;
  }
#if defined(COSEARCH_WIDE) && GROUP
  if constexpr (!OPENED) {
    static_assert(R == 1);
    tile_sparse<FORMAT, T>(row[0], m.indices + at * (rows / GROUP / SHARED * KEPT), x, stride, rows, ahead, out);
    if constexpr (FORMAT::scales == Scales::column)
      for (int t = 0; t < T; ++t) out[t] *= ((const float*)from.column_scale)[at];
    return;
  }
#endif
  if constexpr (NIBBLES && (!OPENED || INPUT == INT8_INPUT)) {
#ifdef COSEARCH_WIDE
    tile_nibbles<FORMAT, R, T>(m, row, scales, x, stride, rows, ahead, out);
#endif
  } else {
    if constexpr (INPUT == FLOAT32_INPUT)
      tile_float32<std::conditional_t<OPENED, float32, FORMAT>, R, T>(row, x, stride, rows, ahead, out);
#ifdef __AVX512BF16__
    if constexpr (INPUT == BFLOAT16_INPUT) tile_bfloat16<R, T>(row, x, stride, rows, ahead, out);
#endif
#ifdef __AVX512VNNI__
    if constexpr (INPUT == INT8_INPUT) tile_int8<R, T>(row, x, stride, rows, ahead, out);
#endif
    if constexpr (FORMAT::scales == Scales::column)
      for (int t = 0; t < T; ++t)
        for (int r = 0; r < R; ++r) out[t * R + r] *= ((const float*)from.column_scale)[at + r];
  }
  if constexpr (INPUT == INT8_INPUT)
    for (int t = 0; t < T; ++t) {
      float scale = *(const float*)(x + (t + 1) * stride - 64);
      for (int r = 0; r < R; ++r) out[t * R + r] *= scale;
    }
}

// Opening: rows as the tiles for many tokens read them, one behind the other in memory that is at hand ------------------

constexpr int64_t opened_bits = INPUT == FLOAT32_INPUT ? 32 : INPUT == BFLOAT16_INPUT ? 16 : FORMAT::bits;

inline int64_t opened_bytes(const Matrix& m, int64_t rows) {
  int64_t bytes = (rows * opened_bits / 8 + 63) / 64 * 64 + (NIBBLES && INPUT == INT8_INPUT ? (m.scale_bytes + 63) / 64 * 64 : 0);
  return bytes % 1024 ? bytes : bytes + 64;  // rows a power of two apart would share a few places of the cache
}

template <class F>
inline void open(const Matrix& m, int64_t row, int64_t rows, char* to) {
  const char* from = m.values + row * m.row_bytes;
#if defined(COSEARCH_WIDE) && GROUP
  return spread_row<F>(from, m.indices + row * (rows / GROUP / SHARED * KEPT), rows, (float*)to);
#endif
  if constexpr (INPUT == INT8_INPUT || (INPUT == BFLOAT16_INPUT && FORMAT::bits == 16) || FORMAT::bits == 32) {
    std::memcpy(to, from, m.row_bytes);
    if (NIBBLES) std::memcpy(to + (m.row_bytes + 63) / 64 * 64, m.scale + row * m.scale_bytes, m.scale_bytes);
  } else if constexpr (NIBBLES) {
    open_row<F>((const uint8_t*)from, m.scale + row * m.scale_bytes, m.tensor ? *m.tensor : 1, rows,
                     [&](int64_t k, V values, int64_t n) {
                       if constexpr (INPUT == FLOAT32_INPUT) store((float*)to + k, values, n);
                       else store_bf16((uint16_t*)to + k, values, n);
                     });
  } else {
    for (int64_t k = 0; k < rows; k += 16) {
      int64_t n = std::min<int64_t>(16, rows - k);
      V values = n == 16 ? F::load16(from, k) : load_part<F>(from, k, n);
      if constexpr (INPUT == FLOAT32_INPUT) store((float*)to + k, values, n);
      else store_bf16((uint16_t*)to + k, values, n);
    }
  }
}

// The product of some rows, finished -----------------------------------------------------------------------------------

inline V silu(V x) {
  V size = max(x, zero() - x), small = exp(zero() - size);  // exp(-|x|), so that it cannot overflow
  float held[16], in[16], to[16];
  store(held, small);
  store(in, x);
  for (int i = 0; i < 16; ++i) to[i] = in[i] >= 0 ? in[i] / (1 + held[i]) : in[i] * held[i] / (1 + held[i]);
  return load(to);
}
inline V gelu(V x) {  // x times the logistic function of 2 sqrt(2 / pi) (x + 0.044715 x^3): the tanh form
  V inner = all(1.5957691216f) * fma(all(0.044715f) * x * x, x, x);
  V size = max(inner, zero() - inner), small = exp(zero() - size);
  float held[16], in[16], at[16], to[16];
  store(held, small);
  store(in, x);
  store(at, inner);
  for (int i = 0; i < 16; ++i) to[i] = at[i] >= 0 ? in[i] / (1 + held[i]) : in[i] * held[i] / (1 + held[i]);
  return load(to);
}

constexpr int MOST_MATRICES = 4;

struct Product {
  int64_t tokens, rows, epilogue, ahead, panel, count, stride, out_columns;
  const char* x;
  float* out;
  const float* residual;
  Matrix matrices[MOST_MATRICES];
  int64_t columns[MOST_MATRICES];

  Product(Buffers b, Params p) : tokens(p[0]), rows(p[1]), epilogue(p[2]), ahead(p[4]), panel(p[5]), count(p[6]) {
    x = (const char*)b[0];
    out = (float*)b[1];
    residual = (const float*)b[2];
    stride = prepared_stride(kind(tokens), rows);
    out_columns = 0;
    for (int i = 0; i < count; ++i) {
      columns[i] = p[7 + i];
      Matrix& m = matrices[i];
      m.values = (const char*)b[3 + 4 * i];
      m.scale = (const char*)b[4 + 4 * i];
      m.tensor = FORMAT::scales == Scales::group && b[5 + 4 * i] != b[3 + 4 * i] ? (const float*)b[5 + 4 * i] : nullptr;
      m.indices = (const uint8_t*)b[6 + 4 * i];
      m.row_bytes = (GROUP ? rows / std::max(GROUP, 1) * KEPT : rows) * FORMAT::bits / 8;
      m.scale_bytes = FORMAT::scale_bytes(rows);
      out_columns += epilogue == 2 && i ? 0 : columns[i];
    }
  }

  // `first` is a column of all matrices' side by side.
  std::pair<int, int64_t> find(int64_t first) const {
    int i = 0;
    while (first >= columns[i]) first -= columns[i++];
    return {i, first};
  }

  void write(int64_t column, int64_t width, int64_t t, const float* values) const {
    float* to = out + t * out_columns + column;
    if (epilogue == 1) {
      const float* from = residual + t * out_columns + column;
      for (int64_t r = 0; r < width; ++r) to[r] = from[r] + values[r];
    } else {
      for (int64_t r = 0; r < width; ++r) to[r] = values[r];
    }
  }

  // The sums [tokens, width] of both halves of what a tile has, or of the one.
  void finish(int64_t column, int64_t width, int64_t first_token, int64_t tokens, float* sums, const float* others) const {
    int64_t count = tokens * width;
    for (int64_t at = 0; at < count; at += 16) {
      V value = load(sums + at, count - at);
      if (epilogue == 2) value = silu(value) * load(others + at, count - at);
      if (epilogue == 3) value = gelu(value);
      if (epilogue >= 2) store(sums + at, value, count - at);
    }
    for (int64_t t = 0; t < tokens; ++t) write(column, width, first_token + t, sums + t * width);
  }
};

// Few tokens: every row is read once, as one stream of memory.
template <int T>
static void few(const Product& p, int64_t begin, int64_t end) {
  constexpr int64_t most = 16;
  alignas(64) float sums[most * T], others[most * T];
  for (int64_t column = begin; column < end;) {
    auto [i, row] = p.find(column);
    int64_t width = std::min<int64_t>({most, end - column, p.columns[i] - row});
    for (int half = 0; half < (p.epilogue == 2 ? 2 : 1); ++half) {
      const Matrix& m = p.matrices[half ? 1 : i];
      Rows rows{m.values, m.scale, m.row_bytes, m.scale_bytes, m.scale};
      for (int64_t r = 0; r < width; ++r) {
        float one[T];
        tile<false, 1, T>(m, rows, row + r, p.x, p.stride, p.rows, p.ahead, one);
        for (int t = 0; t < T; ++t) (half ? others : sums)[t * width + r] = one[t];
      }
    }
    p.finish(column, width, 0, T, sums, others);
    column += width;
  }
}

// Many tokens: rows are opened into a panel that stays in the cache, and all tokens go by it.
template <int R, int T>
static void stripe(const Product& p, const Matrix& m, const Rows& rows, int64_t at, int64_t first, float* sums) {
  tile<true, R, T>(m, rows, at, p.x + first * p.stride, p.stride, p.rows, 0, sums);
}

template <int R>
static void many_rows(const Product& p, const Rows* rows, const Matrix* const* m, int64_t column, int64_t at) {
  alignas(64) float sums[2][R * TOKENS];
  int halves = p.epilogue == 2 ? 2 : 1;
  for (int64_t t = 0; t < p.tokens;) {
    int64_t left = p.tokens - t;
    // 8 are better as 4 and 4 than as 6 and 2.
    bool whole = left >= TOKENS && !(TOKENS == 6 && left == 8);
    int64_t tokens = whole ? TOKENS : left >= 4 ? 4 : left >= 2 ? 2 : 1;
    for (int h = 0; h < halves; ++h) {
      if (tokens == TOKENS) stripe<R, TOKENS>(p, *m[h], rows[h], at, t, sums[h]);
      else if (tokens == 4) stripe<R, (TOKENS > 4 ? 4 : TOKENS)>(p, *m[h], rows[h], at, t, sums[h]);
      else if (tokens == 2) stripe<R, (TOKENS > 2 ? 2 : TOKENS)>(p, *m[h], rows[h], at, t, sums[h]);
      else stripe<R, 1>(p, *m[h], rows[h], at, t, sums[h]);
    }
    p.finish(column, R, t, tokens, sums[0], sums[1]);
    t += tokens;
  }
}

static void many(const Product& p, int64_t begin, int64_t end, char* scratch) {
  int halves = p.epilogue == 2 ? 2 : 1;
  for (int64_t column = begin; column < end;) {
    auto [i, row] = p.find(column);
    const Matrix* m[2] = {&p.matrices[i], &p.matrices[1]};
    int64_t bytes = opened_bytes(*m[0], p.rows);
    int64_t height = std::max<int64_t>(ROWS, std::min<int64_t>(p.panel, SCRATCH_BYTES) / (bytes * halves) / ROWS * ROWS);
    int64_t width = std::min<int64_t>({height, end - column, p.columns[i] - row});
    Rows rows[2];
    for (int h = 0; h < halves; ++h) {
      char* panel = scratch + h * height * bytes;
      for (int64_t r = 0; r < width; ++r) open<FORMAT>(*m[h], row + r, p.rows, panel + r * bytes);
      rows[h] = {panel, panel + (m[h]->row_bytes + 63) / 64 * 64, bytes, bytes, m[h]->scale + row * 4};
    }
    int64_t r = 0;
    for (; r + ROWS <= width; r += ROWS) many_rows<ROWS>(p, rows, m, column + r, r);
    for (; r < width; ++r) many_rows<1>(p, rows, m, column + r, r);
    column += width;
  }
}

extern "C" int64_t chunks(Params p, int64_t threads) {
  int64_t columns = 0;
  for (int i = 0; i < p[6]; ++i) columns += p[2] == 2 && i ? 0 : p[7 + i];
  int64_t work = p[0] * p[1] * columns;
  // A chunk should be worth waking a thread up for.
  return std::max<int64_t>(1, std::min({threads * p[3], (columns + 15) / 16, work >> 14}));
}

extern "C" void run(Buffers b, Params params, int64_t chunk, int64_t chunks, void* scratch) {
  Product p(b, params);
  Part part(p.out_columns, 16, chunk, chunks);
  if (p.tokens == 1 && MOST_FEW) few<1>(p, part.begin, part.end);
  else if (p.tokens == 2 && MOST_FEW) few<2>(p, part.begin, part.end);
  else many(p, part.begin, part.end, (char*)scratch);
}

// Attention of a chunk of tokens to the cache, and to itself where that does not hold it yet, block by block of keys (Dao et al. 2022, arXiv:2205.14135).
//
// Macro: FORMAT of the cache (cache.h).
// buffers: queries [B T, H D] float32 times D^-0.5, the chunk's keys and values [B T, K D] float32, key values, key
//   scales, value values, value scales (of the cache), held [S] int32: the position of each slot
//   (below 0: none), start [] int32, out [B T, H D] float32
// params: B, T, H, K, D, S, layout, window (0: none), sinks, whether the chunk is not in the cache
#include <algorithm>

#include "cache.h"
#include "op.h"

using F = cached::FORMAT;

constexpr int64_t QUERIES = 32;  // tokens at a time
constexpr int64_t KEYS = 64;

extern "C" int64_t chunks(Params p, int64_t threads) { return p[0] * p[3] * ((p[1] + QUERIES - 1) / QUERIES); }

#ifdef COSEARCH_WIDE
inline void transpose(V* a) {
  __m512 b[16], c[16];
  for (int i = 0; i < 8; ++i) {
    b[2 * i] = _mm512_unpacklo_ps(a[2 * i].v, a[2 * i + 1].v);
    b[2 * i + 1] = _mm512_unpackhi_ps(a[2 * i].v, a[2 * i + 1].v);
  }
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 2; ++j) {
      __m512d low = _mm512_castps_pd(b[4 * i + j]), high = _mm512_castps_pd(b[4 * i + 2 + j]);
      c[4 * i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      c[4 * i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  for (int j = 0; j < 4; ++j) {
    __m512 x = _mm512_shuffle_f32x4(c[j], c[4 + j], 0x88), y = _mm512_shuffle_f32x4(c[j], c[4 + j], 0xdd);
    __m512 z = _mm512_shuffle_f32x4(c[8 + j], c[12 + j], 0x88), w = _mm512_shuffle_f32x4(c[8 + j], c[12 + j], 0xdd);
    a[j].v = _mm512_shuffle_f32x4(x, z, 0x88);
    a[8 + j].v = _mm512_shuffle_f32x4(x, z, 0xdd);
    a[4 + j].v = _mm512_shuffle_f32x4(y, w, 0x88);
    a[12 + j].v = _mm512_shuffle_f32x4(y, w, 0xdd);
  }
}
#else
inline void transpose(V* a) {
  float in[16][16], out[16][16];
  for (int i = 0; i < 16; ++i) store(in[i], a[i]);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) out[j][i] = in[i][j];
  for (int i = 0; i < 16; ++i) a[i] = load(out[i]);
}
#endif

// out [R, 16 C] (+)= a [R rows of `stride`, n] times b [n, 16 C of `row`]
template <int R, int C>
inline void multiply(const float* a, int64_t stride, const float* b, int64_t row, int64_t n, float* out, int64_t out_stride, bool add) {
  V acc[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) acc[r][c] = add ? load(out + r * out_stride + 16 * c) : zero();
  for (int64_t i = 0; i < n; ++i) {
    V right[C];
    for (int c = 0; c < C; ++c) right[c] = load(b + i * row + 16 * c);
    for (int r = 0; r < R; ++r) {
      V left = all(a[r * stride + i]);
      for (int c = 0; c < C; ++c) acc[r][c] = fma(left, right[c], acc[r][c]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) store(out + r * out_stride + 16 * c, acc[r][c]);
}

template <int C>
static void multiply_all(const float* a, int64_t stride, const float* b, int64_t row, int64_t n, float* out, int64_t out_stride,
                         bool add, int64_t rows) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) multiply<4, C>(a + r * stride, stride, b, row, n, out + r * out_stride, out_stride, add);
  for (; r < rows; ++r) multiply<1, C>(a + r * stride, stride, b, row, n, out + r * out_stride, out_stride, add);
}

struct Block {
  int64_t D, G, padded;  // `padded`: D up to a multiple of 16
  float *queries, *keys, *values, *scores, *weighted, *largest, *total;
  int32_t* positions;  // of the keys

  Block(Params p, void* scratch) : D(p[4]), G(p[2] / p[3]) {
    padded = (D + 15) / 16 * 16;
    queries = (float*)scratch;
    keys = queries + QUERIES * G * padded;
    values = keys + padded * KEYS;
    scores = values + KEYS * padded;
    weighted = scores + QUERIES * G * KEYS;
    largest = weighted + QUERIES * G * padded;
    total = largest + QUERIES * G;
    positions = (int32_t*)(total + QUERIES * G);
  }

  // 16 keys from the `first` of the block on, key i's dimensions from `key(i, d)`.
  template <class Key>
  void put_keys(int64_t first, int64_t n, Key key) {
    for (int64_t d = 0; d < padded; d += 16) {
      V rows[16];
      for (int64_t i = 0; i < 16; ++i) rows[i] = i < n && d < D ? key(i, d) : zero();
      transpose(rows);
      for (int64_t i = 0; i < 16; ++i) store(keys + (d + i) * KEYS + first, rows[i]);
    }
  }

  // Take the block's keys in for `tokens` queries from position `at` on.
  void take(int64_t tokens, int64_t at, int64_t window, int64_t sinks) {
    int64_t rows = tokens * G;
    multiply_all<KEYS / 16>(queries, padded, keys, KEYS, padded, scores, KEYS, false, rows);
    for (int64_t r = 0; r < rows; ++r) {
      int64_t position = at + r / G;
      float* score = scores + r * KEYS;
      float now = largest[r];
      bool any = false;
      for (int64_t i = 0; i < KEYS; ++i) {
        int64_t key = positions[i];
        bool seen = key >= 0 && key <= position && (window == 0 || position - key < window || key < sinks);
        any |= seen;
        score[i] = seen ? score[i] : -INFINITY;
        now = score[i] > now ? score[i] : now;
      }
      if (!any) {
        for (int64_t i = 0; i < KEYS; ++i) score[i] = 0;
        continue;
      }
      if (now > largest[r]) {
        float by = std::exp(largest[r] - now);
        for (int64_t d = 0; d < padded; ++d) weighted[r * padded + d] *= by;
        total[r] *= by;
        largest[r] = now;
      }
      V sums = zero();
      for (int64_t i = 0; i < KEYS; i += 16) {
        V s = load(score + i), weight = exp(s - all(now));
        float held[16], in[16];  // exp is not quite 0 for what is not seen
        store(held, weight);
        store(in, s);
        for (int j = 0; j < 16; ++j) held[j] = in[j] == -INFINITY ? 0 : held[j];
        weight = load(held);
        store(score + i, weight);
        sums = sums + weight;
      }
      total[r] += sum(sums);
    }
    int64_t d = 0;
    for (; d + 64 <= padded; d += 64)
      multiply_all<4>(scores, KEYS, values + d, padded, KEYS, weighted + d, padded, true, rows);
    for (; d < padded; d += 16) multiply_all<1>(scores, KEYS, values + d, padded, KEYS, weighted + d, padded, true, rows);
  }
};

extern "C" void run(Buffers b, Params p, int64_t chunk, int64_t chunks, void* scratch) {
  int64_t T = p[1], H = p[2], K = p[3], D = p[4], S = p[5], window = p[7], sinks = p[8];
  Layout layout = Layout(p[6]);
  int64_t blocks = (T + QUERIES - 1) / QUERIES;
  // The last tokens see most: they come first, so that no thread is left alone with them.
  int64_t first = (blocks - 1 - chunk % blocks) * QUERIES, k = chunk / blocks % K, sequence = chunk / blocks / K;
  int64_t tokens = std::min(QUERIES, T - first), start = *(const int32_t*)b[8];
  const int32_t* held = (const int32_t*)b[7];
  Block block(p, scratch);
  int64_t G = block.G, padded = block.padded;
  for (int64_t r = 0; r < tokens * G; ++r) {
    const float* from = (const float*)b[0] + ((sequence * T + first + r / G) * H + k * G + r % G) * D;
    for (int64_t d = 0; d < padded; ++d) block.queries[r * padded + d] = d < D ? from[d] : 0, block.weighted[r * padded + d] = 0;
    block.largest[r] = -INFINITY, block.total[r] = 0;
  }
  Head<F> keys(b[3], b[4], layout, sequence, k, S, K, D), values(b[5], b[6], layout, sequence, k, S, K, D);
  for (int64_t s = 0; s < S; s += KEYS) {
    int64_t n = std::min(KEYS, S - s);
    bool any = false;
    for (int64_t i = 0; i < KEYS; ++i) {
      int32_t at = i < n ? held[s + i] : -1;
      block.positions[i] = at;
      any |= at >= 0 && at < start + first + tokens && (window == 0 || start + first - at < window || at < sinks);
    }
    if (!any) continue;
    for (int64_t i = 0; i < KEYS; i += 16) {
      int64_t left = n - i;
      float by[2][16];
      store(by[0], left > 0 ? keys.scales_of(s + i, left) : zero());
      store(by[1], left > 0 ? values.scales_of(s + i, left) : zero());
      if (layout == BHDS) {
        for (int64_t d = 0; d < padded; ++d)
          store(block.keys + d * KEYS + i, d < D && left > 0 ? keys.across(s + i, d, left) * load(by[0]) : zero());
        for (int64_t d = 0; d < padded; d += 16) {
          V across[16];
          for (int64_t j = 0; j < 16; ++j) across[j] = d + j < D && left > 0 ? values.across(s + i, d + j, left) * load(by[1]) : zero();
          transpose(across);
          for (int64_t j = 0; j < 16; ++j) store(block.values + (i + j) * padded + d, across[j]);
        }
      } else {
        block.put_keys(i, left, [&](int64_t j, int64_t d) { return keys.along(s + i + j, d, D - d) * all(by[0][j]); });
        for (int64_t j = 0; j < 16; ++j)
          for (int64_t d = 0; d < padded; d += 16)
            store(block.values + (i + j) * padded + d, j < left && d < D ? values.along(s + i + j, d, D - d) * all(by[1][j]) : zero());
      }
      // A slot that holds no token may hold anything, and nothing times NaN is NaN.
      for (int64_t j = 0; j < 16; ++j)
        if (block.positions[i + j] < 0)
          for (int64_t d = 0; d < padded; ++d) block.values[(i + j) * padded + d] = 0;
    }
    block.take(tokens, start + first, window, sinks);
  }
  const float *own_keys = (const float*)b[1] + (sequence * T * K + k) * D, *own_values = (const float*)b[2] + (sequence * T * K + k) * D;
  for (int64_t s = window ? std::max<int64_t>(0, (sinks ? 0 : first - window + 1)) / KEYS * KEYS : 0; p[9] && s < first + tokens; s += KEYS) {
    int64_t n = std::min(KEYS, T - s);
    for (int64_t i = 0; i < KEYS; ++i) block.positions[i] = i < n ? start + s + i : -1;
    for (int64_t i = 0; i < KEYS; i += 16) {
      int64_t left = n - i;
      block.put_keys(i, left, [&](int64_t j, int64_t d) { return load(own_keys + (s + i + j) * K * D + d, D - d); });
      for (int64_t j = 0; j < 16; ++j)
        for (int64_t d = 0; d < padded; d += 16)
          store(block.values + (i + j) * padded + d, j < left && d < D ? load(own_values + (s + i + j) * K * D + d, D - d) : zero());
    }
    block.take(tokens, start + first, window, sinks);
  }
  for (int64_t r = 0; r < tokens * G; ++r) {
    float* out = (float*)b[9] + ((sequence * T + first + r / G) * H + k * G + r % G) * D;
    for (int64_t d = 0; d < D; ++d) out[d] = block.weighted[r * padded + d] / block.total[r];
  }
}

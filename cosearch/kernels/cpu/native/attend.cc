// Decode attention: each query to the first slots of a cache, the queries that share a head's keys together.
//
// The slots are split among chunks, whose softmax sums are put together by combine.cc (Dao et al. 2023, Flash-Decoding).
// Macro: FORMAT of the cache (cache.h).
// buffers: queries [B, H D] float32 times D^-0.5, key values, key scales, value values, value scales, length [] int32,
//   out: [B, H D] float32 for one split, else [B, K, splits, H / K, D + 2]: sums, then the largest score and the
//   sum of the weights
// params: B, H, K, D, S, layout, splits
#include "cache.h"
#include "op.h"

using F = cached::FORMAT;

extern "C" int64_t chunks(Params p, int64_t threads) { return p[0] * p[2] * p[6]; }

constexpr int64_t SLOTS = 64;  // at a time

struct Sums {
  float* weighted;  // [G, D]; [G, D, 16] across
  float* largest;   // [G]
  float* total;     // [G]
};

// Take the scores [G, SLOTS] in: they become weights, after what was summed has been brought to the new largest score.
inline void weigh(float* scores, int64_t G, int64_t held, const Sums& sums) {
  for (int64_t g = 0; g < G; ++g) {
    float *score = scores + SLOTS * g, before = sums.largest[g];
    V most = load(score);
    for (int64_t i = 16; i < SLOTS; i += 16) most = max(most, load(score + i));
    float now = std::fmax(before, ::largest(most));
    if (now > before) {
      float by = std::exp(before - now);
      for (int64_t i = 0; i < held; i += 16) {
        float* at = sums.weighted + g * held + i;
        store(at, load(at, held - i) * all(by), held - i);
      }
      sums.total[g] *= by;
      sums.largest[g] = now;
    }
    V total = zero();
    for (int64_t i = 0; i < SLOTS; i += 16) {
      V weight = exp(load(score + i) - all(now));
      total = total + weight;
      store(score + i, weight);
    }
    sums.total[g] += sum(total);
  }
}

// D is the size of a head where it is known when this is compiled, else 0.
template <int G, int D>
inline void score_along(const Head<F>& keys, const float* query, int64_t s, int64_t n, float* scores) {
  const int64_t size = D ? D : keys.size;
  for (int64_t first = 0; first < n; first += 16) {
    V parts[G][16];
    int64_t count = n - first < 16 ? n - first : 16;
    for (int64_t i = 0; i < count; ++i) {
      V part[G];
      for (int g = 0; g < G; ++g) part[g] = zero();
      for (int64_t d = 0; d < size; d += 16) {
        V key = keys.along(s + first + i, d, D ? 16 : size - d);
        for (int g = 0; g < G; ++g)
          part[g] = fma(key, D ? load(query + g * size + d) : load(query + g * size + d, size - d), part[g]);
      }
      for (int g = 0; g < G; ++g) parts[g][i] = part[g];
    }
    for (int64_t i = count; i < 16; ++i)
      for (int g = 0; g < G; ++g) parts[g][i] = zero();
    for (int g = 0; g < G; ++g) store(scores + SLOTS * g + first, sums(parts[g]));
  }
}

template <int G, int D>
inline void add_along(const Head<F>& values, const float* weights, int64_t s, int64_t n, float* weighted) {
  constexpr int64_t step = 16 / G * 16;  // dimensions whose sums stay in registers
  const int64_t size = D ? D : values.size;
  for (int64_t from = 0; from < size; from += step) {
    const int64_t to = from + step < size ? from + step : size;
    V out[G][step / 16];
    for (int g = 0; g < G; ++g)
      for (int64_t d = from, j = 0; d < to; d += 16, ++j) out[g][j] = load(weighted + g * size + d, size - d);
    for (int64_t i = 0; i < n; ++i) {
      V by[G];
      for (int g = 0; g < G; ++g) by[g] = all(weights[SLOTS * g + i]);
      for (int64_t d = from, j = 0; d < to; d += 16, ++j) {
        V value = values.along(s + i, d, D ? 16 : size - d);
        for (int g = 0; g < G; ++g) out[g][j] = fma(by[g], value, out[g][j]);
      }
    }
    for (int g = 0; g < G; ++g)
      for (int64_t d = from, j = 0; d < to; d += 16, ++j) store(weighted + g * size + d, out[g][j], size - d);
  }
}

template <int G>
inline void score_group(const Head<F>& keys, const float* query, int64_t s, int64_t n, float* scores) {
  if (keys.size == 64) score_along<G, 64>(keys, query, s, n, scores);
  else if (keys.size == 128) score_along<G, 128>(keys, query, s, n, scores);
  else if (keys.size == 32) score_along<G, 32>(keys, query, s, n, scores);
  else score_along<G, 0>(keys, query, s, n, scores);
}
template <int G>
inline void add_group(const Head<F>& values, const float* weights, int64_t s, int64_t n, float* weighted) {
  if (values.size == 64) add_along<G, 64>(values, weights, s, n, weighted);
  else if (values.size == 128) add_along<G, 128>(values, weights, s, n, weighted);
  else if (values.size == 32) add_along<G, 32>(values, weights, s, n, weighted);
  else add_along<G, 0>(values, weights, s, n, weighted);
}

// Layout BHDS: slots lie side by side, and so sums are kept by lane until the end.
inline void score_across(const Head<F>& keys, const float* query, int64_t G, int64_t s, int64_t n, float* scores) {
  for (int64_t first = 0; first < n; first += 16)
    for (int64_t g = 0; g < G; g += 4) {
      V sums[4] = {zero(), zero(), zero(), zero()};
      int64_t count = G - g < 4 ? G - g : 4;
      for (int64_t d = 0; d < keys.size; ++d) {
        V key = keys.across(s + first, d, n - first);
        for (int64_t j = 0; j < count; ++j) sums[j] = fma(key, all(query[(g + j) * keys.size + d]), sums[j]);
      }
      for (int64_t j = 0; j < count; ++j) store(scores + SLOTS * (g + j) + first, sums[j]);
    }
}
inline void add_across(const Head<F>& values, const float* weights, int64_t G, int64_t s, int64_t n, float* weighted) {
  for (int64_t d = 0; d < values.size; ++d)
    for (int64_t g = 0; g < G; g += 4) {
      int64_t count = G - g < 4 ? G - g : 4;
      V sums[4];
      for (int64_t j = 0; j < count; ++j) sums[j] = load(weighted + ((g + j) * values.size + d) * 16);
      for (int64_t first = 0; first < n; first += 16) {
        V value = values.across(s + first, d, n - first);
        for (int64_t j = 0; j < count; ++j) sums[j] = fma(load(weights + SLOTS * (g + j) + first), value, sums[j]);
      }
      for (int64_t j = 0; j < count; ++j) store(weighted + ((g + j) * values.size + d) * 16, sums[j]);
    }
}

extern "C" void run(Buffers b, Params p, int64_t chunk, int64_t chunks, void* scratch) {
  int64_t H = p[1], K = p[2], D = p[3], S = p[4], splits = p[6], G = H / K;
  Layout layout = Layout(p[5]);
  int64_t split = chunk % splits, k = chunk / splits % K, sequence = chunk / splits / K;
  int64_t length = *(const int32_t*)b[5];
  if (length > S) length = S;
  Part part(length, 16, split, splits);
  const float* query = (const float*)b[0] + (sequence * H + k * G) * D;
  Head<F> keys(b[1], b[2], layout, sequence, k, S, K, D), values(b[3], b[4], layout, sequence, k, S, K, D);
  int64_t held = layout == BHDS ? D * 16 : D;
  Sums sums;
  sums.weighted = (float*)scratch;
  sums.largest = sums.weighted + G * held;
  sums.total = sums.largest + G;
  float* scores = sums.total + G;
  for (int64_t i = 0; i < G * held; ++i) sums.weighted[i] = 0;
  for (int64_t g = 0; g < G; ++g) sums.largest[g] = -INFINITY, sums.total[g] = 0;
  for (int64_t s = part.begin; s < part.end; s += SLOTS) {
    int64_t n = part.end - s < SLOTS ? part.end - s : SLOTS;
    for (int64_t i = s + SLOTS; i < s + 2 * SLOTS && i < part.end; ++i) keys.ask_for(i);
    if (layout == BHDS) score_across(keys, query, G, s, n, scores);
    else
      for (int64_t g = 0; g < G;) {
        if (G - g >= 4) score_group<4>(keys, query + g * D, s, n, scores + SLOTS * g), g += 4;
        else if (G - g >= 2) score_group<2>(keys, query + g * D, s, n, scores + SLOTS * g), g += 2;
        else score_group<1>(keys, query + g * D, s, n, scores + SLOTS * g), g += 1;
      }
    float scale[SLOTS];
    if (F::scaled) {
      for (int64_t i = 0; i < n; i += 16) store(scale + i, keys.scales_of(s + i, n - i));
      for (int64_t g = 0; g < G; ++g)
        for (int64_t i = 0; i < n; i += 16) store(scores + SLOTS * g + i, load(scores + SLOTS * g + i) * load(scale + i));
    }
    for (int64_t g = 0; g < G; ++g)
      for (int64_t i = n; i < SLOTS; ++i) scores[SLOTS * g + i] = -INFINITY;
    weigh(scores, G, held, sums);
    if (F::scaled) {
      for (int64_t i = 0; i < n; i += 16) store(scale + i, values.scales_of(s + i, n - i));
      for (int64_t g = 0; g < G; ++g)
        for (int64_t i = 0; i < n; i += 16) store(scores + SLOTS * g + i, load(scores + SLOTS * g + i) * load(scale + i));
    }
    for (int64_t i = s + SLOTS; i < s + 2 * SLOTS && i < part.end; ++i) values.ask_for(i);
    if (layout == BHDS) add_across(values, scores, G, s, n, sums.weighted);
    else
      for (int64_t g = 0; g < G;) {
        float* to = sums.weighted + g * D;
        if (G - g >= 4) add_group<4>(values, scores + SLOTS * g, s, n, to), g += 4;
        else if (G - g >= 2) add_group<2>(values, scores + SLOTS * g, s, n, to), g += 2;
        else add_group<1>(values, scores + SLOTS * g, s, n, to), g += 1;
      }
  }
  for (int64_t g = 0; g < G; ++g) {
    float* out = splits == 1 ? (float*)b[6] + (sequence * H + k * G + g) * D : (float*)b[6] + (chunk * G + g) * (D + 2);
    float by = splits == 1 ? 1 / sums.total[g] : 1;
    for (int64_t d = 0; d < D; ++d)
      out[d] = by * (layout == BHDS ? sum(load(sums.weighted + (g * D + d) * 16)) : sums.weighted[g * D + d]);
    if (splits > 1) out[D] = sums.largest[g], out[D + 1] = sums.total[g];
  }
}

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

struct Sums {
  float* weighted;  // [G, D]; [G, D, 16] across
  float* largest;   // [G]
  float* total;     // [G]
};

// Take 16 scores of each query in: the weights [G, 16], after what was summed has been brought to the new largest score.
inline void weigh(const float* scores, int64_t G, int64_t held, const Sums& sums, float* weights) {
  for (int64_t g = 0; g < G; ++g) {
    V score = load(scores + 16 * g);
    float before = sums.largest[g], now = std::fmax(before, ::largest(score));
    if (now > before) {
      float by = std::exp(before - now);
      for (int64_t i = 0; i < held; i += 16) {
        float* at = sums.weighted + g * held + i;
        store(at, load(at, held - i) * all(by), held - i);
      }
      sums.total[g] *= by;
      sums.largest[g] = now;
    }
    V weight = exp(score - all(now));
    sums.total[g] += sum(weight);
    store(weights + 16 * g, weight);
  }
}

template <int G>
inline void score_along(const Head<F>& keys, const float* query, int64_t s, int64_t n, float* scores) {
  V parts[G][16];
  for (int64_t i = 0; i < 16; ++i)
    for (int g = 0; g < G; ++g) parts[g][i] = zero();
  for (int64_t i = 0; i < n; ++i) {
    V part[G];
    for (int g = 0; g < G; ++g) part[g] = zero();
    for (int64_t d = 0; d < keys.size; d += 16) {
      V key = keys.along(s + i, d, keys.size - d);
      for (int g = 0; g < G; ++g) part[g] = fma(key, load(query + g * keys.size + d, keys.size - d), part[g]);
    }
    for (int g = 0; g < G; ++g) parts[g][i] = part[g];
  }
  for (int g = 0; g < G; ++g) store(scores + 16 * g, sums(parts[g]));
}

template <int G>
inline void add_along(const Head<F>& values, const float* weights, int64_t s, int64_t n, float* weighted) {
  for (int64_t d = 0; d < values.size; d += 16) {
    V out[G];
    int64_t left = values.size - d;
    for (int g = 0; g < G; ++g) out[g] = load(weighted + g * values.size + d, left);
    for (int64_t i = 0; i < n; ++i) {
      V value = values.along(s + i, d, left);
      for (int g = 0; g < G; ++g) out[g] = fma(all(weights[16 * g + i]), value, out[g]);
    }
    for (int g = 0; g < G; ++g) store(weighted + g * values.size + d, out[g], left);
  }
}

// Layout BHDS: slots lie side by side, and so sums are kept by lane until the end.
inline void score_across(const Head<F>& keys, const float* query, int64_t G, int64_t s, int64_t n, float* scores) {
  for (int64_t g = 0; g < G; ++g) store(scores + 16 * g, zero());
  for (int64_t d = 0; d < keys.size; ++d) {
    V key = keys.across(s, d, n);
    for (int64_t g = 0; g < G; ++g) {
      float* at = scores + 16 * g;
      store(at, fma(key, all(query[g * keys.size + d]), load(at)));
    }
  }
}
inline void add_across(const Head<F>& values, const float* weights, int64_t G, int64_t s, int64_t n, float* weighted) {
  for (int64_t d = 0; d < values.size; ++d) {
    V value = values.across(s, d, n);
    for (int64_t g = 0; g < G; ++g) {
      float* at = weighted + (g * values.size + d) * 16;
      store(at, fma(load(weights + 16 * g), value, load(at)));
    }
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
  float *scores = sums.total + G, *weights = scores + 16 * G;
  for (int64_t i = 0; i < G * held; ++i) sums.weighted[i] = 0;
  for (int64_t g = 0; g < G; ++g) sums.largest[g] = -INFINITY, sums.total[g] = 0;
  for (int64_t s = part.begin; s < part.end; s += 16) {
    int64_t n = part.end - s < 16 ? part.end - s : 16;
    for (int64_t i = s + 16; i < s + 32 && i < part.end; ++i) keys.ask_for(i), values.ask_for(i);
    if (layout == BHDS) score_across(keys, query, G, s, n, scores);
    else
      for (int64_t g = 0; g < G;) {
        if (G - g >= 4) score_along<4>(keys, query + g * D, s, n, scores + 16 * g), g += 4;
        else if (G - g >= 2) score_along<2>(keys, query + g * D, s, n, scores + 16 * g), g += 2;
        else score_along<1>(keys, query + g * D, s, n, scores + 16 * g), g += 1;
      }
    if (F::scaled)
      for (int64_t g = 0; g < G; ++g) store(scores + 16 * g, load(scores + 16 * g) * keys.scales_of(s, n));
    for (int64_t g = 0; g < G; ++g)
      for (int64_t i = n; i < 16; ++i) scores[16 * g + i] = -INFINITY;
    weigh(scores, G, held, sums, weights);
    if (F::scaled)
      for (int64_t g = 0; g < G; ++g) store(weights + 16 * g, load(weights + 16 * g) * values.scales_of(s, n));
    if (layout == BHDS) add_across(values, weights, G, s, n, sums.weighted);
    else
      for (int64_t g = 0; g < G;) {
        float* to = sums.weighted + g * D;
        if (G - g >= 4) add_along<4>(values, weights + 16 * g, s, n, to), g += 4;
        else if (G - g >= 2) add_along<2>(values, weights + 16 * g, s, n, to), g += 2;
        else add_along<1>(values, weights + 16 * g, s, n, to), g += 1;
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

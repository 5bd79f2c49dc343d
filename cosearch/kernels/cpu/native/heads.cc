// Queries, keys and values from their projections: normalised, turned by RoPE, and written to the cache.
//
// Macro: FORMAT of the cache (cache.h).
// buffers: projections [B T, (H + 2 K) D] float32 (query, key, value side by side; a layer that borrows keys has H D),
//   cosine and sine [T, D / 2], query norm [D], key norm [D] (cosine again where there are none), slots [T] int32 (one that
//   is negative or too large is not written), key values, key scales, value values, value scales (of the cache; values again where
//   there are no scales), queries out [B T, H D] times D^-0.5, keys and values as the cache holds them [B T, K D] (queries
//   again where they are not kept)
// params: B, T, H, K (0 where keys are borrowed), D, S, layout, whether normed, whether kept
#include "cache.h"
#include "op.h"

using F = cached::FORMAT;

extern "C" int64_t chunks(Params p, int64_t threads) {
  int64_t tokens = p[0] * p[1], each = (p[2] + 2 * p[3]) * p[4];
  int64_t most = tokens < 4 * threads ? tokens : 4 * threads;
  return tokens * each < 8192 ? 1 : most;
}

static void norm(const float* x, const float* scale, bool normed, int64_t d, float by, float* to) {
  if (normed) {
    float squares = 0;
    V total = zero();
    for (int64_t i = 0; i < d; i += 16) {
      V a = load(x + i, d - i);
      total = fma(a, a, total);
    }
    squares = sum(total);
    by *= 1 / std::sqrt(squares / d + 1e-6f);
    for (int64_t i = 0; i < d; ++i) to[i] = x[i] * by * scale[i];
  } else {
    for (int64_t i = 0; i < d; ++i) to[i] = x[i] * by;
  }
}

static void turn(float* x, const float* cosine, const float* sine, int64_t d) {
  for (int64_t i = 0; i < d / 2; ++i) {
    float a = x[i], b = x[i + d / 2];
    x[i] = a * cosine[i] - b * sine[i];
    x[i + d / 2] = b * cosine[i] + a * sine[i];
  }
}

extern "C" void run(Buffers b, Params p, int64_t chunk, int64_t chunks, void* scratch) {
  int64_t T = p[1], H = p[2], K = p[3], D = p[4], S = p[5];
  Layout layout = Layout(p[6]);
  bool normed = p[7], kept = p[8];
  float* held = (float*)scratch;
  int64_t width = (H + 2 * K) * D;
  Part part(p[0] * T, 1, chunk, chunks);
  for (int64_t i = part.begin; i < part.end; ++i) {
    int64_t sequence = i / T, t = i % T, slot = ((const int32_t*)b[5])[t];
    const float* x = (const float*)b[0] + i * width;
    const float *cosine = (const float*)b[1] + t * D / 2, *sine = (const float*)b[2] + t * D / 2;
    float* query = (float*)b[10] + i * H * D;
    for (int64_t h = 0; h < H; ++h) {
      norm(x + h * D, (const float*)b[3], normed, D, 1 / std::sqrt(float(D)), query + h * D);
      turn(query + h * D, cosine, sine, D);
    }
    for (int64_t k = 0; k < K; ++k)
      for (int value = 0; value < 2; ++value) {
        const float* from = x + (H + (value ? K : 0) + k) * D;
        if (!value) {
          norm(from, (const float*)b[4], normed, D, 1, held);
          turn(held, cosine, sine, D);
          from = held;
        }
        Head<F> head(b[6 + 2 * value], b[7 + 2 * value], layout, sequence, k, S, K, D);
        if (slot >= 0 && slot < S)
          F::encode(from, D, (char*)head.values + Head<F>::bytes(slot * head.slot), head.dimension,
                    F::scaled ? (uint16_t*)head.scales + slot * head.scale_slot : nullptr);
        if (kept) {
          float* to = (float*)b[11 + value] + (i * K + k) * D;
          alignas(64) char one[4096];
          uint16_t scale = 0;
          F::encode(from, D, one, 1, &scale);
          Head<F> back(one, &scale, BHSD, 0, 0, 1, 1, D);
          V by = back.scales_of(0, 1);
          float first[16];
          store(first, by);
          for (int64_t d = 0; d < D; d += 16) store(to + d, back.along(0, d, D - d) * all(first[0]), D - d);
        }
      }
  }
}

// One token of the gated delta rule (`cosearch/architecture/attention/gated_delta.py`), from its projections on.
//
// buffers: projections [B, 4 H D] float32 (query less key, key, value, gate), gates [B, 2 H] float32 (beta, decay),
//   convolution [4, 3 H D], decay rate [H], decay bias [H], output norm [D], the last inputs [B, 3, 3 H D] and the state
//   [B, H, D, D], both updated, out [B, H D]
// params: B, H, D
#include "op.h"
#include "simd.h"

extern "C" int64_t chunks(Params p, int64_t threads) {
  int64_t heads = p[0] * p[1], work = heads * p[2] * p[2];
  return work < 16384 ? 1 : heads < 4 * threads ? heads : 4 * threads;
}

static float logistic(float x) { return x >= 0 ? 1 / (1 + std::exp(-x)) : std::exp(x) / (1 + std::exp(x)); }

// Times the reciprocal of its length.
static void unit(float* x, int64_t d) {
  V squares = zero();
  for (int64_t i = 0; i < d; i += 16) {
    V a = load(x + i, d - i);
    squares = fma(a, a, squares);
  }
  float by = 1 / std::sqrt(sum(squares) + 1e-6f);
  for (int64_t i = 0; i < d; ++i) x[i] *= by;
}

extern "C" void run(Buffers b, Params p, int64_t chunk, int64_t chunks, void* scratch) {
  int64_t H = p[1], D = p[2], wide = H * D;
  float *mixed = (float*)scratch, *written = mixed + 3 * D;
  Part part(p[0] * H, 1, chunk, chunks);
  for (int64_t i = part.begin; i < part.end; ++i) {
    int64_t sequence = i / H, h = i % H;
    const float* projections = (const float*)b[0] + sequence * 4 * wide;
    const float* gates = (const float*)b[1] + sequence * 2 * H;
    const float* taps = (const float*)b[2];
    for (int64_t kind = 0; kind < 3; ++kind)
      for (int64_t d = 0; d < D; ++d) {
        int64_t channel = kind * wide + h * D + d;
        float* past = (float*)b[6] + sequence * 9 * wide + channel;
        float now = projections[channel] + (kind == 0 ? projections[wide + h * D + d] : 0);
        float total = taps[channel] * past[0] + taps[3 * wide + channel] * past[3 * wide] +
                      taps[6 * wide + channel] * past[6 * wide] + taps[9 * wide + channel] * now;
        past[0] = past[3 * wide];
        past[3 * wide] = past[6 * wide];
        past[6 * wide] = now;
        mixed[kind * D + d] = total;
      }
    for (int64_t d = 0; d < 3 * D; ++d) mixed[d] *= logistic(mixed[d]);
    unit(mixed, D);
    unit(mixed + D, D);
    const float *query = mixed, *key = mixed + D, *value = mixed + 2 * D;
    float decay = gates[H + h] + ((const float*)b[4])[h];
    float softplus = std::fmax(decay, 0.0f) + std::log1p(std::exp(-std::fabs(decay)));
    float fade = std::exp(-std::exp(((const float*)b[3])[h]) * softplus), rate = logistic(gates[h]);
    float* state = (float*)b[7] + i * D * D;
    for (int64_t e = 0; e < D; e += 16) {  // by columns: 16 numbers of the value at a time
      V read = zero();
      for (int64_t d = 0; d < D; ++d) read = fma(all(key[d]), load(state + d * D + e, D - e), read);
      store(written + e, all(rate) * (load(value + e, D - e) - all(fade) * read), D - e);
    }
    float* out = (float*)b[8] + sequence * wide + h * D;
    V squares = zero();
    for (int64_t e = 0; e < D; e += 16) {
      V add = load(written + e, D - e), answer = zero();
      for (int64_t d = 0; d < D; ++d) {
        V next = fma(all(key[d]), add, all(fade) * load(state + d * D + e, D - e));
        store(state + d * D + e, next, D - e);
        answer = fma(all(query[d]), next, answer);
      }
      store(out + e, answer, D - e);
      squares = fma(answer, answer, squares);
    }
    float by = 1 / std::sqrt(sum(squares) / D + 1e-6f);
    for (int64_t d = 0; d < D; ++d) {
      float gate = projections[3 * wide + h * D + d];
      out[d] *= by * ((const float*)b[5])[d] * gate * logistic(gate);
    }
  }
}

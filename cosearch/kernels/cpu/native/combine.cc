// The parts of decode attention (attend.cc) put together.
//
// buffers: parts [B, K, splits, G, D + 2], out [B, H D] float32; params: B, H, K, D, splits
#include "op.h"
#include "simd.h"

extern "C" int64_t chunks(Params p, int64_t threads) { return p[0] * p[1] * p[3] < 8192 ? 1 : p[0] < threads ? p[0] : threads; }

extern "C" void run(Buffers b, Params p, int64_t chunk, int64_t chunks, void*) {
  int64_t H = p[1], K = p[2], D = p[3], splits = p[4], G = H / K;
  Part part(p[0], 1, chunk, chunks);
  for (int64_t i = part.begin * H; i < part.end * H; ++i) {
    const float* parts = (const float*)b[0] + (i / G * splits * G + i % G) * (D + 2);
    int64_t next = G * (D + 2);
    float* out = (float*)b[1] + i * D;
    float most = -INFINITY, total = 0;
    for (int64_t s = 0; s < splits; ++s) most = std::fmax(most, parts[s * next + D]);
    for (int64_t d = 0; d < D; ++d) out[d] = 0;
    for (int64_t s = 0; s < splits; ++s) {
      const float* one = parts + s * next;
      float by = std::exp(one[D] - most);  // 0 for a split without slots
      total += by * one[D + 1];
      for (int64_t d = 0; d < D; ++d) out[d] += by * one[d];
    }
    for (int64_t d = 0; d < D; ++d) out[d] /= total;
  }
}

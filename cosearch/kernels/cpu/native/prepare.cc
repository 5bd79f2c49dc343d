// The input of products: each token's row, normalised if need be, in the order and dtype in which a product reads it.
//
// buffers: x [tokens, rows] float32, the norm's scale [rows] float32 (x again where there is none), out
// params: tokens, rows, whether normed, kind, group of the weights' 4-bit format
// out, by kind, a row of `stride` bytes for each token, with zeros behind the last of the rows:
//   0 float32 in order            1 bfloat16 in order
//   2 float32, 3 bfloat16: in the order of 4-bit weights, 64 bytes (128 rows) at a time: first what meets the lowest
//     nibble of each of their 32-bit (16-bit) words, then the next nibble
//   4 int8 and one float32 scale (in the last 64 bytes) for the row; int8 with 128 added, to be unsigned
//   6 float32, the first of every `group` rows, then the second of each, …: what meets weights of which some are stored
//   5 int8 of 64 low nibbles, of 64 high ones, and -8 times the sum of each 8 that meet in one 32-bit lane
#include "op.h"
#include "prepared.h"
#include "simd.h"

extern "C" int64_t chunks(Params p, int64_t threads) {
  int64_t tokens = p[0];
  return tokens < 4 * threads ? (tokens + 3) / 4 : 4 * threads;
}

static float rounded_scale(const float* x, int64_t rows, int8_t* out) {
  V largest_of = zero();
  bool nan = false;
  for (int64_t k = 0; k < rows; k += 16) {
    V a = load(x + k, rows - k);
    largest_of = max(max(a, zero() - a), largest_of);  // in this order NaN is passed over
  }
  for (int64_t k = 0; k < rows; ++k) nan |= x[k] != x[k];
  float most = largest(largest_of);
  float scale = most * float(1.0 / 127.0);
  if (scale < 1.17549435e-38f) scale = 0;
  if (nan) scale = NAN;
  float by = scale > 0 ? scale : 1;
  for (int64_t k = 0; k < rows; ++k) {
    float y = scale > 0 ? x[k] / by : 0;
    y = y > 127 ? 127 : y > -127 ? y : -127;  // a number also for NaN
    out[k] = int8_t(std::nearbyintf(y));
  }
  return scale;
}

// Which of 128 rows meets the i-th number of weights of 4 bits that are read as words of so many nibbles.
struct Order {
  int32_t at[128];
  Order(int nibbles, int group) {
    int lanes = 128 / nibbles, half = group / 2;  // powers of two: shifts and masks, for this is done for every call
    int by_lanes = __builtin_ctz(lanes), by_half = __builtin_ctz(half);
    for (int i = 0; i < 128; ++i) {
      int j = i >> by_lanes, byte = (i & (lanes - 1)) * (nibbles / 2) + j / 2;
      at[i] = (byte >> by_half) * group + (byte & (half - 1)) + (j & 1 ? half : 0);
    }
  }
};

extern "C" void run(Buffers b, Params p, int64_t chunk, int64_t chunks, void* scratch) {
  int64_t rows = p[1], kind = p[3], group = p[4], stride = prepared_stride(kind, rows);
  bool normed = p[2];
  auto* scale = (const float*)b[1];
  float* held = (float*)scratch;
  int8_t* bytes = (int8_t*)(held + rows + 256);
  Part part(p[0], 1, chunk, chunks);
  for (int64_t t = part.begin; t < part.end; ++t) {
    const float* x = (const float*)b[0] + t * rows;
    char* out = (char*)b[2] + t * stride;
    if (normed) {
      int64_t k = 0;
      V acc = zero(), more = zero();
      for (; k + 32 <= rows; k += 32) {
        V a = load(x + k), c = load(x + k + 16);
        acc = fma(a, a, acc);
        more = fma(c, c, more);
      }
      for (; k < rows; k += 16) {
        V a = load(x + k, rows - k);
        acc = fma(a, a, acc);
      }
      float by = 1 / std::sqrt(sum(acc + more) / rows + 1e-6f);
      float* to = kind == 0 ? (float*)out : held;
      for (k = 0; k < rows; ++k) to[k] = x[k] * by * scale[k];
      x = to;
    }
    switch (kind) {
      case 0:
        if (!normed) std::memcpy(out, x, rows * 4);
        std::memset(out + rows * 4, 0, stride - rows * 4);
        break;
      case 6: {
        auto* to = (float*)out;
        int64_t groups = rows / group;
        for (int64_t place = 0; place < group; ++place)
          for (int64_t g = 0; g < groups; ++g) to[place * groups + g] = x[g * group + place];
        std::memset(out + rows * 4, 0, stride - rows * 4);
        break;
      }
      case 1: {
        auto* to = (uint16_t*)out;
        for (int64_t k = 0; k < rows; ++k) to[k] = to_bf16(x[k]);
        std::memset(to + rows, 0, stride - rows * 2);
        break;
      }
      case 2:
      case 3: {
        const Order order(kind == 2 ? 8 : 4, int(group));
        for (int64_t c = 0; c < rows; c += 128) {
          float inside[128];
          const float* from = x + c;
          if (c + 128 > rows) {
            std::memset(inside, 0, sizeof inside);
            std::memcpy(inside, from, (rows - c) * 4);
            from = inside;
          }
          if (kind == 2)
            for (int i = 0; i < 128; ++i) ((float*)out)[c + i] = from[order.at[i]];
          else
            for (int i = 0; i < 128; ++i) ((uint16_t*)out)[c + i] = to_bf16(from[order.at[i]]);
        }
        break;
      }
      case 4: {
        *(float*)(out + stride - 64) = rounded_scale(x, rows, bytes);
        auto* to = (uint8_t*)out;
        for (int64_t k = 0; k < rows; ++k) to[k] = uint8_t(bytes[k] + 128);
        std::memset(to + rows, 0, stride - 64 - rows);
        break;
      }
      case 5: {
        *(float*)(out + stride - 64) = rounded_scale(x, rows, bytes);
        std::memset(bytes + rows, 0, 128);
        int64_t half = group / 2;
        for (int64_t c = 0; c < (rows + 127) / 128; ++c) {
          auto* to = (int8_t*)(out + c * 192);
          for (int64_t g = 0; g < 64; g += half) {
            std::memcpy(to + g, bytes + c * 128 + 2 * g, half);
            std::memcpy(to + 64 + g, bytes + c * 128 + 2 * g + half, half);
          }
          auto* lanes = (int32_t*)(to + 128);
          for (int i = 0; i < 16; ++i) {
            int total = 0;
            for (int k = 4 * i; k < 4 * i + 4; ++k) total += to[k] + to[64 + k];
            lanes[i] = -8 * total;
          }
        }
        break;
      }
    }
  }
}

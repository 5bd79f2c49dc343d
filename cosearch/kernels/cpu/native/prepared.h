// How long a token's row of prepared input is (prepare.cc), in bytes; rows begin at multiples of 64 bytes.
#pragma once
#include <cstdint>

inline int64_t prepared_stride(int64_t kind, int64_t rows) {
  int64_t padded = (rows + 127) / 128 * 128;
  switch (kind) {
    case 0: return (rows + 15) / 16 * 64;
    case 1: return (rows + 31) / 32 * 64;
    case 2: return padded * 4;
    case 3: return padded * 2;
    case 6: return (rows + 15) / 16 * 64 + 64;
    case 4: return (rows + 63) / 64 * 64 + 64;
    default: return padded / 128 * 192 + 64;
  }
}

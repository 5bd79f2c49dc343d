// What an operation of a native program is: so many independent chunks of work over some buffers.
//
// A file of this folder defines one operation, for the macros it is compiled with (the number format, tile sizes), as
// the two functions below. `buffers` and `params` are what the program names for it, in the order that the operation's
// Python side (`operations.py`) documents. Chunks write to places of their own, so that any thread may run any of them;
// each of them starts from what the operations before have written. `scratch` is aligned memory of the running thread.
#pragma once
#include <cstdint>

using Buffers = void* const*;
using Params = const int64_t*;

constexpr int64_t SCRATCH_BYTES = 4 << 20;

#if defined(__AVX512F__)
#define COSEARCH_WIDE 1
#endif

extern "C" {
int64_t chunks(Params params, int64_t threads);
void run(Buffers buffers, Params params, int64_t chunk, int64_t chunks, void* scratch);
}

// The part of `total`, in whole units of `unit`, that is the chunk's.
struct Part {
  int64_t begin, end;
  Part(int64_t total, int64_t unit, int64_t chunk, int64_t chunks) {
    int64_t units = (total + unit - 1) / unit;
    begin = units * chunk / chunks * unit;
    end = units * (chunk + 1) / chunks * unit;
    if (end > total) end = total;
  }
};

// Runs native programs inside XLA's executables: an FFI handler that takes a program as data.
//
// A program is a list of operations, each of which is a number of independent chunks. The calling thread and what
// threads of XLA's own pool are free claim chunks from one counter; an operation begins when all chunks of the one
// before are done. So no thread waits for another to wake up, and a call that finds the pool busy does all by itself.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include <immintrin.h>
#include <sched.h>

#include "op.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

struct Operation {
  int64_t (*chunks)(Params, int64_t);
  void (*run)(Buffers, Params, int64_t, int64_t, void*);
};

std::unordered_map<int64_t, Operation>& operations() {
  static auto* all = new std::unordered_map<int64_t, Operation>();
  return *all;
}

std::mutex& operations_lock() {
  static auto* lock = new std::mutex();
  return *lock;
}

constexpr int64_t MOST_THREADS = 64;

void* scratch() {
  static thread_local std::unique_ptr<void, decltype(&std::free)> memory(
      std::aligned_alloc(4096, SCRATCH_BYTES), &std::free);
  return memory.get();
}

struct Phase {
  void (*run)(Buffers, Params, int64_t, int64_t, void*);
  const int64_t* params;
  int64_t first_buffer;
  int64_t chunks;
};

// One run of a program. The ticket holds the phase at hand and the next of its chunks; a thread that helps takes a seat.
struct Run {
  std::vector<Phase> phases;
  std::vector<void*> buffers;
  std::atomic<int64_t> seats{0};
  alignas(64) std::atomic<uint64_t> ticket{0};
  alignas(64) std::atomic<int64_t> done{0};

  void work() {
    void* memory = scratch();
    for (int64_t idle = 0;;) {
      uint64_t seen = ticket.load(std::memory_order_acquire);
      size_t phase = seen >> 32;
      if (phase >= phases.size()) return;
      if (int64_t(seen & 0xffffffffu) >= phases[phase].chunks) {
        _mm_pause();
        if (++idle > 4096) sched_yield();
        continue;
      }
      idle = 0;
      seen = ticket.fetch_add(1, std::memory_order_acq_rel);
      phase = seen >> 32;
      if (phase >= phases.size()) return;
      const Phase& at = phases[phase];
      int64_t chunk = seen & 0xffffffffu;
      if (chunk >= at.chunks) continue;
      at.run(buffers.data() + at.first_buffer, at.params, chunk, at.chunks, memory);
      if (done.fetch_add(1, std::memory_order_acq_rel) + 1 == at.chunks) {
        done.store(0, std::memory_order_relaxed);
        ticket.store(uint64_t(phase + 1) << 32, std::memory_order_release);
      }
    }
  }
};

using Clock = std::chrono::steady_clock;

// Threads that have helped stay for a moment, for the next run is likely to follow. A thread that sleeps is often woken
// up on the caller's own core, where it waits until the system moves it, which took longer than whole runs. While they
// stay they give way to whatever else wants their core, but are missing from XLA's pool: hence not for long, and not
// without an end. One more of them than a run has seats for may be there: it takes the place of one that is late.
constexpr std::chrono::microseconds STAY(200);
constexpr std::chrono::milliseconds MOST_STAY(100);

struct Crew {
  std::mutex lock;
  std::shared_ptr<Run> newest;
  std::atomic<uint64_t> runs{0};
  std::atomic<int64_t> waiting{0};
};

Crew& crew() {
  static auto* all = new Crew();
  return *all;
}

void help(std::shared_ptr<Run> run, uint64_t number) {
  Crew& all = crew();
  Clock::time_point last = Clock::now() + MOST_STAY, until = Clock::now() + STAY;
  for (;;) {
    if (run->seats.fetch_sub(1, std::memory_order_relaxed) > 0) {
      run->work();
      until = std::min(last, Clock::now() + STAY);
    }
    all.waiting.fetch_add(1);
    while (all.runs.load(std::memory_order_acquire) == number && Clock::now() < until) sched_yield();
    all.waiting.fetch_sub(1);
    std::lock_guard<std::mutex> hold(all.lock);
    if (all.runs.load() == number || Clock::now() >= last) return;
    number = all.runs.load();
    run = all.newest;
  }
}

// `program`: for each operation its name's hash, how many buffers and parameters it has, and those. A buffer is an
// argument (0, 1, …), a result (from the number of arguments on; the last is the arena), or, below zero, -1 - offset
// in the arena.
ffi::Error Execute(ffi::ThreadPool pool, ffi::Span<const int64_t> program, std::string_view kernels,
                   ffi::RemainingArgs arguments, ffi::RemainingRets results) {
  auto run = std::make_shared<Run>();
  std::vector<void*> data(arguments.size() + results.size());
  for (size_t i = 0; i < arguments.size(); ++i) {
    auto buffer = arguments.get<ffi::AnyBuffer>(i);
    if (!buffer) return buffer.error();
    data[i] = buffer->untyped_data();
  }
  for (size_t i = 0; i < results.size(); ++i) {
    auto buffer = results.get<ffi::AnyBuffer>(i);
    if (!buffer) return buffer.error();
    data[arguments.size() + i] = (*buffer)->untyped_data();
  }
  char* arena = static_cast<char*>(data.back());
  int64_t threads = pool.num_threads(), widest = 1;
  const int64_t* at = program.begin();
  {
    std::lock_guard<std::mutex> hold(operations_lock());
    while (at != program.end()) {
      auto found = operations().find(*at);
      if (found == operations().end())
        return ffi::Error(ffi::ErrorCode::kFailedPrecondition,
                          "a kernel of this program is not loaded in this process: one of " + std::string(kernels));
      int64_t buffers = at[1], params = at[2];
      at += 3;
      int64_t first = run->buffers.size();
      for (int64_t i = 0; i < buffers; ++i)
        run->buffers.push_back(at[i] < 0 ? arena + (-1 - at[i]) : data[at[i]]);
      at += buffers;
      int64_t chunks = found->second.chunks(at, threads);
      run->phases.push_back({found->second.run, at, first, chunks});
      if (chunks > widest) widest = chunks;
      at += params;
    }
  }
  int64_t helpers = std::min({threads - 1, widest - 1, MOST_THREADS});
  run->seats = helpers;
  Crew& all = crew();
  uint64_t number;
  {
    std::lock_guard<std::mutex> hold(all.lock);
    all.newest = run;
    number = all.runs.fetch_add(1) + 1;
  }
  for (int64_t i = all.waiting.load(); i < helpers; ++i) pool.Schedule([=] { help(run, number); });
  run->work();
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(CosearchRun, Execute,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<ffi::Span<const int64_t>>("program")
                                  .Attr<std::string_view>("cosearch_kernels")
                                  .RemainingArgs()
                                  .RemainingRets());

extern "C" void CosearchRegister(int64_t name, void* chunks, void* run) {
  std::lock_guard<std::mutex> hold(operations_lock());
  operations()[name] = {reinterpret_cast<decltype(Operation::chunks)>(chunks),
                        reinterpret_cast<decltype(Operation::run)>(run)};
}

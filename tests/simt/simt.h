// Runs CUDA kernels on the CPU, compiled by g++: every thread of a block is a fiber, blocks run one after another.
//
// What it checks: values, index arithmetic, missing barriers (fibers run until they block, in an order that
// SIMT_ORDER=forward|reverse|shuffle chooses, and shared memory starts as NaN), divergent barriers (reported as a
// deadlock), writes beyond a shared array (red zones). What it cannot check: memory ordering within a warp, speed.
// Where a test has planted faults, SIMT_FAULT=<number> chooses the one that acts.
#pragma once

#include <setjmp.h>
#include <ucontext.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using cudaStream_t = void*;

inline dim3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

namespace simt {

constexpr size_t kStack = 256 * 1024;
constexpr size_t kRedZone = 64;
constexpr unsigned char kPoison = 0xff;  // an all-ones float, double, half or bfloat16 is NaN

enum class State { ready, block, warp, done };

struct Stack {
  const void* bottom = nullptr;
  size_t size = 0;
};

// AddressSanitizer is told of every switch to another stack.
#ifdef __SANITIZE_ADDRESS__
inline void leave(const void* bottom, size_t size) { __sanitizer_start_switch_fiber(nullptr, bottom, size); }
inline void arrive(Stack* from = nullptr) {
  __sanitizer_finish_switch_fiber(nullptr, from ? &from->bottom : nullptr, from ? &from->size : nullptr);
}
#else
inline void leave(const void*, size_t) {}
inline void arrive(Stack* = nullptr) {}
#endif

struct Fiber {
  jmp_buf context;
  char* stack = nullptr;
  State state = State::ready;
  dim3 thread;
  unsigned linear = 0;
  unsigned mask = 0;         // lanes this fiber waits for
  size_t shared_cursor = 0;  // how far into the block's shared memory its declarations have come
  alignas(16) unsigned char slot[64] = {};
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<std::unique_ptr<char[]>> stacks;  // of the fibers, kept from launch to launch
  jmp_buf scheduler;
  Stack own;  // the scheduler's
  Fiber* current = nullptr;
  int fault = -1;
  std::function<void()> body;
  std::vector<unsigned char> shared;
  std::vector<std::pair<size_t, size_t>> arrays;  // offset and size of each shared array of this block
  std::string error;
};

inline Machine& machine() {
  static Machine m;
  return m;
}

// Whether the planted fault `number` acts.
inline bool fault(int number) { return machine().fault == number; }

// Fibers are entered by setcontext once a launch and switched by _setjmp and _longjmp, which make no system call.
inline void yield(State state) {
  Machine& m = machine();
  m.current->state = state;
  leave(m.own.bottom, m.own.size);
  if (_setjmp(m.current->context) == 0) _longjmp(m.scheduler, 1);
  arrive();
}

// A fiber's life: a block after another.
inline void entry() {
  Machine& m = machine();
  arrive(&m.own);
  while (true) {
    yield(State::done);
    try {
      m.body();
    } catch (const std::exception& error) {
      m.error = error.what();
    }
  }
}

// Runs a fiber until it yields. Not inlined: _setjmp spares no local variable that changes meanwhile.
[[gnu::noinline]] inline void resume(Machine& m, Fiber& fiber) {
  m.current = &fiber;
  threadIdx = fiber.thread;
  leave(fiber.stack, kStack);
  if (_setjmp(m.scheduler) == 0) _longjmp(fiber.context, 1);
  arrive();
}

// Lets a fiber come to `entry`'s loop; the first `resume` runs its first block.
[[gnu::noinline]] inline void start(Machine& m, Fiber& fiber, char* stack) {
  m.current = &fiber;
  fiber.stack = stack;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
  leave(stack, kStack);
  if (_setjmp(m.scheduler) == 0) setcontext(&context);
  arrive();
}

// Where lanes in `mask` have all arrived (lanes that returned count as arrived), let them go on.
inline bool release_warps(Machine& m) {
  bool any = false;
  for (Fiber& fiber : m.fibers) {
    if (fiber.state != State::warp) continue;
    const unsigned first = fiber.linear / 32 * 32;
    bool complete = true;
    for (unsigned lane = 0; lane < 32 && first + lane < m.fibers.size(); ++lane) {
      const Fiber& other = m.fibers[first + lane];
      if ((fiber.mask >> lane & 1u) == 0 || other.state == State::done) continue;
      complete &= other.state == State::warp && other.mask == fiber.mask;
    }
    if (!complete) continue;
    const unsigned mask = fiber.mask;
    for (unsigned lane = 0; lane < 32 && first + lane < m.fibers.size(); ++lane) {
      Fiber& other = m.fibers[first + lane];
      if ((mask >> lane & 1u) != 0 && other.state == State::warp) other.state = State::ready;
    }
    any = true;
  }
  return any;
}

inline void run_block(Machine& m, const std::vector<unsigned>& order) {
  while (true) {
    bool progressed = false;
    for (const unsigned index : order) {
      Fiber& fiber = m.fibers[index];
      if (fiber.state != State::ready) continue;
      resume(m, fiber);
      if (!m.error.empty()) throw std::runtime_error(m.error);
      progressed = true;
    }
    if (progressed) continue;
    const auto is = [](State state) { return [state](const Fiber& f) { return f.state == state; }; };
    if (std::all_of(m.fibers.begin(), m.fibers.end(), is(State::done))) return;
    if (release_warps(m)) continue;
    if (std::none_of(m.fibers.begin(), m.fibers.end(), is(State::warp))) {
      if (std::any_of(m.fibers.begin(), m.fibers.end(), is(State::done)))
        throw std::runtime_error("simt: a barrier is not reached by threads that have returned");
      for (Fiber& fiber : m.fibers) fiber.state = State::ready;
      continue;
    }
    throw std::runtime_error("simt: deadlock, threads of one block wait at different barriers");
  }
}

template <class Body>
void launch(dim3 grid, dim3 block, size_t dynamic_shared, Body body) {
  Machine& m = machine();
  const unsigned threads = block.x * block.y * block.z;
  if (threads == 0 || threads > 1024) throw std::runtime_error("simt: a block has 1 to 1024 threads");
  gridDim = grid;
  blockDim = block;
  m.body = body;
  m.error.clear();
  m.fibers.clear();
  m.fibers.resize(threads);
  while (m.stacks.size() < threads) m.stacks.emplace_back(new char[kStack]);
  for (unsigned i = 0; i < threads; ++i) start(m, m.fibers[i], m.stacks[i].get());
  m.shared.resize(256 * 1024);
  const char* planted = std::getenv("SIMT_FAULT");
  m.fault = planted == nullptr || *planted == '\0' ? -1 : std::atoi(planted);

  std::vector<unsigned> order(threads);
  for (unsigned i = 0; i < threads; ++i) order[i] = i;
  const char* asked = std::getenv("SIMT_ORDER");
  const std::string how = asked == nullptr ? "forward" : asked;
  if (how == "reverse") std::reverse(order.begin(), order.end());
  if (how == "shuffle") std::shuffle(order.begin(), order.end(), std::mt19937(1));

  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        std::memset(m.shared.data(), kPoison, m.shared.size());
        m.arrays.clear();
        if (dynamic_shared > 0) m.arrays.push_back({0, dynamic_shared});
        for (unsigned i = 0; i < threads; ++i) {
          Fiber& fiber = m.fibers[i];
          fiber.state = State::ready;
          fiber.linear = i;
          fiber.thread = dim3(i % block.x, i / block.x % block.y, i / (block.x * block.y));
          fiber.shared_cursor = dynamic_shared + kRedZone;
        }
        run_block(m, order);
        for (const auto& [offset, size] : m.arrays)
          for (size_t i = 0; i < kRedZone; ++i)
            if (m.shared[offset + size + i] != kPoison)
              throw std::runtime_error("simt: write beyond a shared array of " + std::to_string(size) + " bytes");
      }
}

// A __shared__ array: all threads of a block pass the same declarations in the same order.
template <class T>
T* shared_array(size_t count) {
  Machine& m = machine();
  const size_t offset = (m.current->shared_cursor + 15) / 16 * 16;
  const size_t size = count * sizeof(T);
  m.current->shared_cursor = offset + size + kRedZone;
  if (m.current->shared_cursor > m.shared.size()) throw std::runtime_error("simt: out of shared memory");
  if (std::find(m.arrays.begin(), m.arrays.end(), std::pair<size_t, size_t>(offset, size)) == m.arrays.end())
    m.arrays.push_back({offset, size});
  return reinterpret_cast<T*>(m.shared.data() + offset);
}

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(machine().shared.data());
}

inline unsigned lane() { return machine().current->linear % 32; }

inline void warp_wait(unsigned mask) {
  machine().current->mask = mask;
  yield(State::warp);
}

// Every lane of `mask` gives `mine`; `use(other)` may then read any lane's value.
template <class T, class Use>
auto exchange(unsigned mask, const T& mine, Use use) {
  static_assert(sizeof(T) <= sizeof(Fiber::slot));
  Machine& m = machine();
  Fiber* self = m.current;
  std::memcpy(self->slot, &mine, sizeof(T));
  warp_wait(mask);
  const unsigned first = self->linear / 32 * 32;
  auto result = use([&](unsigned other) -> const T& {
    const Fiber& fiber = first + other < m.fibers.size() ? m.fibers[first + other] : *self;
    return *reinterpret_cast<const T*>(fiber.slot);
  });
  warp_wait(mask);
  return result;
}

}  // namespace simt

inline void __syncthreads() { simt::yield(simt::State::block); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { simt::warp_wait(mask); }
inline void __threadfence() {}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const unsigned base = simt::lane() / width * width;
  return simt::exchange(mask, value, [&](auto of) { return of(base + source % width); });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const unsigned me = simt::lane(), other = me ^ static_cast<unsigned>(bits);
  return simt::exchange(mask, value, [&](auto of) { return of(other / width == me / width ? other : me); });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned me = simt::lane();
  return simt::exchange(mask, value,
                        [&](auto of) { return of(me % width + delta < unsigned(width) ? me + delta : me); });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned me = simt::lane();
  return simt::exchange(mask, value, [&](auto of) { return of(me % width >= delta ? me - delta : me); });
}

template <class T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}
template <class T>
T __ldg(const T* address) {
  return *address;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

namespace simt {

// mma.sync m16n8k8 with TF32 operands (fragments as csrc/cuda/mma.cuh lists them): the last 13 bits of the operands are
// dropped, products and their sum are exact here, the result is truncated to float32.
inline void mma(float (&d)[4], const float (&a)[4], const float (&b)[2], const float (&c)[4]) {
  struct Operands {
    float a[4], b[2];
  };
  Operands mine;
  const auto tf32 = [](float x) { return __uint_as_float(__float_as_uint(x) & 0xffffe000u); };
  for (int i = 0; i < 4; ++i) mine.a[i] = tf32(a[i]);
  for (int i = 0; i < 2; ++i) mine.b[i] = tf32(b[i]);
  const unsigned row = lane() / 4, column = lane() % 4 * 2;
  exchange(0xffffffffu, mine, [&](auto of) {
    double left[2][8], right[2][8];
    for (unsigned k = 0; k < 8; ++k) {
      const Operands& from = of(4 * row + k % 4);
      for (unsigned i = 0; i < 2; ++i) {
        left[i][k] = from.a[i + k / 4 * 2];
        right[i][k] = of(4 * (column + i) + k % 4).b[k / 4];
      }
    }
    for (unsigned i = 0; i < 4; ++i) {
      double sum = c[i];
      for (unsigned k = 0; k < 8; ++k) sum += left[i / 2][k] * right[i % 2][k];
      float result = static_cast<float>(sum);
      if (std::fabs(static_cast<double>(result)) > std::fabs(sum)) result = std::nextafterf(result, 0.0f);
      d[i] = result;
    }
    return 0;
  });
}

}  // namespace simt

namespace simt {

// The special function unit's: with rounding off by a relative 2^-23, to either side, as they may be.
inline float approximate(double exact, float x) {
  return static_cast<float>(exact + exact * ((__float_as_uint(x) & 1u) != 0 ? 0x1p-24 : -0x1p-24));
}
inline float approximate_reciprocal(float x) { return approximate(1.0 / x, x); }
inline float approximate_root(float x) { return approximate(std::sqrt(static_cast<double>(x)), x); }

}  // namespace simt

inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline void sincosf(float x, float* s, float* c) {
  *s = std::sin(x);
  *c = std::cos(x);
}
using std::max;
using std::min;

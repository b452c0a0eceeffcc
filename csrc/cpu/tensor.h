// What the CPU operators share about torch's tensors.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "cpu/element.h"

namespace psf {

inline Element element_of(const char* name, const torch::stable::Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Element::f32;
    case ScalarType::Double:
      return Element::f64;
    case ScalarType::BFloat16:
      return Element::bf16;
    case ScalarType::Half:
      return Element::f16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, float64, bfloat16 or float16");
  }
}

// Memory aligned to a cache line, not initialised.
template <typename T>
class AlignedBuffer {
 public:
  explicit AlignedBuffer(int64_t count)
      : data_(static_cast<T*>(::operator new(static_cast<size_t>(count) * sizeof(T), std::align_val_t(64)))) {}
  ~AlignedBuffer() { ::operator delete(data_, std::align_val_t(64)); }
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

// Runs body(next) on every thread; next() is the number of a task to do, or -1 when all `count` are taken. Threads take
// tasks as they come to need them, because cores differ in speed and are shared with other programs; so what a task
// computes must not depend on who does it.
template <typename Body>
void for_tasks(int64_t count, const Body& body) {
  std::atomic<int64_t> taken{0};
  const auto next = [&taken, count] {
    const int64_t task = taken.fetch_add(1, std::memory_order_relaxed);
    return task < count ? task : int64_t{-1};
  };
  const int64_t workers = std::min<int64_t>(count, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) { body(next); });
}

// The memory of a new result, which decides how it is best written; no wishes unless all results of the call (`bytes`)
// have 32 MiB or more.
//
// Memory that was used before should be written past the caches, which cannot hold it. glibc returns blocks above its
// largest mmap threshold, 32 MiB, to the system at once, so that they come fresh at every call: those are asked for in
// huge pages, which cost far less than page faults, and their zeros are still in the cache when the result is written.
class ResultMemory {
 public:
  explicit ResultMemory(const torch::stable::Tensor& result, int64_t bytes = 0) {
    const uintptr_t size = static_cast<uintptr_t>(result.numel() * result.element_size());
    big_ = std::max(size, static_cast<uintptr_t>(bytes)) >= uintptr_t{32} << 20;
#ifdef __linux__
    constexpr uintptr_t kPage = 4096;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(result.mutable_data_ptr());
    const auto page = [](uintptr_t at) { return reinterpret_cast<void*>(at / kPage * kPage); };
    unsigned char resident = 1;
    fresh_ = big_ && mincore(page(begin + size / 2), kPage, &resident) == 0 && (resident & 1) == 0;
    if (fresh_) madvise(page(begin), begin % kPage + size, MADV_HUGEPAGE);
#endif
  }
  bool past_caches() const { return big_ && !fresh_; }

 private:
  bool big_ = false, fresh_ = false;
};

}  // namespace psf

// The little that CUDA sources need beyond the language, in two versions: nvcc's, and (PSF_SIMT) the CPU shim of
// tests/simt, with which g++ compiles the same files and tests run every kernel on tiny shapes without a GPU.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#ifdef PSF_SIMT

#include "simt.h"
// Operators of a shim library take CPU tensors and stand in a namespace of their own, PSF_SIMT.
#define PSF_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(PSF_SIMT, CPU, m)
// A __shared__ array of a block; `count` is a constant expression.
#define PSF_SHARED(type, name, count) type* name = ::simt::shared_array<type>(count)
// The block's dynamic shared memory.
#define PSF_DYNAMIC_SHARED(type, name) type* name = ::simt::dynamic_shared<type>()

namespace psf {

struct Launch {
  explicit Launch(const torch::stable::Tensor&) {}
  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, Arguments... arguments) const {
    ::simt::launch(grid, block, shared, [=] { kernel(arguments...); });
  }
};

}  // namespace psf

#else

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#define PSF_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(pansharp_fast, CUDA, m)
#define PSF_SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define PSF_DYNAMIC_SHARED(type, name)                       \
  extern __shared__ __align__(16) char psf_dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(psf_dynamic_shared)

// Weak: the library then also loads where torch has no CUDA, and reports what it lacks only when it is used.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**) __attribute__((weak));

namespace psf {

// Launches kernels on the device and the current stream of a tensor; lives as long as the launches are being made.
class Launch {
 public:
  explicit Launch(const torch::stable::Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, Arguments... arguments) const {
    if (shared > 48 * 1024)
      STD_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                          cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
    // clang-format off
    kernel<<<grid, block, shared, stream_>>>(arguments...);
    // clang-format on
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace psf

#endif

// What the frequency attention's passes ask of their tensors, the same on every device.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace psf {

template <typename T>
T* data(const torch::stable::Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// Calls body(T()) with the type that is computed in, which is also that of spectra.
template <typename Body>
void dispatch_spectrum(const torch::stable::Tensor& tensor, Body body) {
  if (tensor.scalar_type() == torch::headeronly::ScalarType::Double)
    body(double());
  else
    body(float());
}

inline void check_spectrum(const torch::stable::Tensor& x, int64_t width) {
  STD_TORCH_CHECK(x.dim() == 5 && x.size(3) == width / 2 + 1 && x.is_contiguous(),
                  "spectrum: expected contiguous [B, C, H, W / 2 + 1, 2]");
}

// Pixels of x [B, C, H, W] are one run of equal strides.
inline void check_pixels(const torch::stable::Tensor& x) {
  STD_TORCH_CHECK(x.stride(2) == x.size(3) * x.stride(3) || x.size(2) == 1, "x: expected rows that follow each other");
}

}  // namespace psf

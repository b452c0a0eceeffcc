// Amplitudes and phases [2, N] of values [N, 2], as the frequency attention's kernels form them: for tests of their
// accuracy.
#include "cuda/polar.cuh"

namespace {

__global__ void polar_kernel(const float* values, int64_t count, float* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const psf::Polar<float> polar = psf::fast_polar(values[2 * i], values[2 * i + 1]);
  out[i] = polar.amplitude;
  out[count + i] = polar.phase;
}

torch::stable::Tensor polar(const torch::stable::Tensor& values) {
  const int64_t count = values.size(0);
  torch::stable::Tensor out = torch::stable::new_empty(values, {2, count});
  const psf::Launch launch(values);
  launch(polar_kernel, static_cast<unsigned>((count + 255) / 256), 256, 0,
         static_cast<const float*>(values.const_data_ptr()), count, static_cast<float*>(out.mutable_data_ptr()));
  return out;
}

}  // namespace

PSF_CUDA_LIBRARY(m) { m.impl("frequency_attention_polar", TORCH_BOX(&polar)); }

// Softmax over the J neighbours of a pixel and its gradient, the same on host and device.
//
// T is a scalar, or on the CPU a vector of pixels (GCC vector extensions). Internal linkage: CPU kernels include this
// once per instruction set.
#pragma once

#ifdef __CUDACC__
#define PSF_CM3A_FUNCTION static __host__ __device__ __forceinline__
#define PSF_CM3A_UNROLL _Pragma("unroll")  // the arrays stay in registers
#else
#define PSF_CM3A_FUNCTION static inline __attribute__((always_inline))
#define PSF_CM3A_UNROLL
#endif

namespace psf::cm3a {

// Logits become attention; exponential(T) is exp for arguments <= 0. NaN spreads to the whole neighbourhood.
template <int J, typename T, typename Exponential>
PSF_CM3A_FUNCTION void softmax(T (&logits)[J], Exponential exponential) {
  T most = logits[0];
  PSF_CM3A_UNROLL
  for (int j = 1; j < J; ++j) most = logits[j] > most ? logits[j] : most;
  T sum = most - most;
  PSF_CM3A_UNROLL
  for (int j = 0; j < J; ++j) {
    logits[j] = exponential(logits[j] - most);
    sum += logits[j];
  }
  const T inverse = 1 / sum;
  PSF_CM3A_UNROLL
  for (int j = 0; j < J; ++j) logits[j] *= inverse;
}

// Gradient of the unscaled logits from attention and its gradient, which it replaces.
template <int J, typename T>
PSF_CM3A_FUNCTION void softmax_backward(const T (&attention)[J], T (&grad)[J], T scale) {
  T mean = attention[0] * grad[0];
  PSF_CM3A_UNROLL
  for (int j = 1; j < J; ++j) mean += attention[j] * grad[j];
  PSF_CM3A_UNROLL
  for (int j = 0; j < J; ++j) grad[j] = scale * attention[j] * (grad[j] - mean);
}

}  // namespace psf::cm3a

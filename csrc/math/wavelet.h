// Geometry and border rules of the wavelet transforms, the same on host and device; pansharp_fast/reference/wavelet.py
// states them next to the equations.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define PSF_WAVELET_FUNCTION static __host__ __device__ __forceinline__
#else
#define PSF_WAVELET_FUNCTION static inline __attribute__((always_inline))
#endif

namespace psf::wavelet {

// In the order of MODES in pansharp_fast/reference/wavelet.py.
enum Mode : int64_t {
  kZero,
  kConstant,
  kSymmetric,
  kReflect,
  kPeriodic,
  kAntisymmetric,
  kPeriodization,
  kSmooth,
  kAntireflect,
  kStationary,
};

// y[i] = sum_k f[k] e[step i + offset - dilation k] for 0 <= i < count.
struct Geometry {
  int64_t step, offset, count;
};

PSF_WAVELET_FUNCTION Geometry geometry(int64_t mode, int64_t n, int64_t taps, int64_t dilation) {
  if (mode == kStationary) return {1, dilation * (taps / 2), n};
  if (mode == kPeriodization) return {2, taps / 2, (n + 1) / 2};
  return {2, 1, (n + taps - 1) / 2};
}

// e[j] = sum_t weight[t] x[index[t]], at most three terms.
struct Extension {
  int count;
  int64_t index[3];
  int64_t weight[3];
};

template <class Index>
PSF_WAVELET_FUNCTION Index floor_mod(Index a, Index b) {
  const Index m = a % b;
  return m < 0 ? m + b : m;
}

// Sample j, any integer, of x [n] continued by `mode`. Index: int64_t, or int where n < 2^30 (GPUs divide it faster).
template <class Index>
PSF_WAVELET_FUNCTION Extension extension(int64_t mode, Index j, Index n) {
  if (j >= 0 && j < n) return {1, {j, 0, 0}, {1, 0, 0}};
  const Index edge = j < 0 ? 0 : n - 1;
  switch (mode) {
    case kZero:
      return {0, {0, 0, 0}, {0, 0, 0}};
    case kSymmetric:
    case kAntisymmetric: {
      const Index m = floor_mod(j, 2 * n);
      return {1, {m < n ? m : 2 * n - 1 - m, 0, 0}, {m >= n && mode == kAntisymmetric ? -1 : 1, 0, 0}};
    }
    case kReflect: {
      const Index m = floor_mod(j, 2 * n - 2);
      return {1, {m < n ? m : 2 * n - 2 - m, 0, 0}, {1, 0, 0}};
    }
    case kPeriodic:
    case kStationary:
      return {1, {floor_mod(j, n), 0, 0}, {1, 0, 0}};
    case kPeriodization: {
      const Index m = floor_mod(j, n + n % 2);
      return {1, {m < n ? m : n - 1, 0, 0}, {1, 0, 0}};
    }
    case kSmooth: {
      if (n == 1) return {1, {0, 0, 0}, {1, 0, 0}};
      const Index distance = j < 0 ? -j : j - edge;
      return {2, {edge, j < 0 ? 1 : n - 2, 0}, {1 + distance, -distance, 0}};
    }
    case kAntireflect: {
      const Index period = 2 * (n - 1), m = floor_mod(j, period), turns = (j - m) / period;
      const bool inside = m < n;
      return {3, {inside ? m : period - m, n - 1, 0}, {inside ? 1 : -1, 2 * turns + (inside ? 0 : 2), -2 * turns}};
    }
    default:  // kConstant
      return {1, {edge, 0, 0}, {1, 0, 0}};
  }
}

}  // namespace psf::wavelet

// Amplitude and phase on CUDA devices: psf::polar with the special function unit's reciprocal and root, which spare the
// slow paths of a division and a square root (two fifths of the instructions).
#pragma once

#include "cuda/runtime.cuh"
#include "math/frequency_attention.h"

namespace psf {

// Off by at most one unit in the last place; subnormal results are 0.
__device__ __forceinline__ float approximate_reciprocal(float x) {
#ifdef PSF_SIMT
  return ::simt::approximate_reciprocal(x);
#else
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}

// Off by at most 2^-23 of it.
__device__ __forceinline__ float approximate_root(float x) {
#ifdef PSF_SIMT
  return ::simt::approximate_root(x);
#else
  float result;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}

// As psf::polar; the relative error of amplitudes is at most 2^-22, phases are good to 2 ulp below a modulus of 2^126.
__device__ __forceinline__ Polar<float> fast_polar(float re, float im) {
  const float x = fabsf(re), y = fabsf(im);
  const bool steep = y > x;
  const float high = steep ? y : x, low = steep ? x : y;
  // low / high, corrected once.
  const float inverse = approximate_reciprocal(high), quotient = low * inverse;
  const float t = fmaf(fmaf(-quotient, high, low), inverse, quotient);
  // π/2 and π as exact products: right to twice float32's digits within the multiply-add.
  constexpr float kFactor = 1.68325555f, kHalf = 0.93318945f;
  float phase = arctangent(t);
  phase = steep ? fmaf(kHalf, kFactor, -phase) : phase;
  phase = re < 0.0f ? fmaf(2.0f * kHalf, kFactor, -phase) : phase;
  phase = im < 0.0f ? -phase : phase;
  const bool zero = high < negligible<float>();
  return {zero ? 0.0f : high * approximate_root(fmaf(t, t, 1.0f)), zero ? 0.0f : phase};
}

__device__ __forceinline__ Polar<double> fast_polar(double re, double im) { return polar(re, im); }

}  // namespace psf

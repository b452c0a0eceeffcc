// Amplitude, phase and their gradients, the same on host and device.
//
// Everything is branch-free, so that the CPU compiler vectorises loops over it and no warp diverges. The float32
// functions are good to 2 ulp. Internal linkage: CPU kernels include this once per instruction set.
#pragma once

// PSF_MATH: the C library's functions without <cmath>, whose inline functions kernel files must not share.
#ifdef __CUDACC__
#define PSF_FREQUENCY_FUNCTION static __host__ __device__ __forceinline__
#define PSF_MATH(name) name
#else
#define PSF_FREQUENCY_FUNCTION static inline __attribute__((always_inline))
#define PSF_MATH(name) __builtin_##name
#endif

namespace psf {

template <typename T>
struct Polar {
  T amplitude, phase;
};
template <typename T>
struct Complex {
  T re, im;
};

// Below this modulus (the square root of the smallest normal number) a value counts as 0: amplitude, phase and their
// gradients are 0.
template <typename T>
PSF_FREQUENCY_FUNCTION T negligible() {
  return static_cast<T>(sizeof(T) == 4 ? 1.0842021724855044e-19 : 1.4916681462400413e-154);
}

// atan(t) of t in [0, 1]; a Chebyshev fit of (atan(t) - t) / t^3 in s = t^2, error 2.5e-9.
PSF_FREQUENCY_FUNCTION float arctangent(float t) {
  const float s = t * t;
  float p = 0.001488691939f;
  p = p * s + -0.009144629761f;
  p = p * s + 0.02630500111f;
  p = p * s + -0.04896051403f;
  p = p * s + 0.0703191425f;
  p = p * s + -0.08931826777f;
  p = p * s + 0.1108826163f;
  p = p * s + -0.1428400379f;
  p = p * s + 0.1999994932f;
  p = p * s + -0.3333333308f;
  return t + t * s * p;
}

// Modulus and angle in (-π, π] of a complex number; an imaginary part of -0 counts as +0.
PSF_FREQUENCY_FUNCTION Polar<float> polar(float re, float im) {
  const float x = PSF_MATH(fabsf)(re), y = PSF_MATH(fabsf)(im);
  const bool steep = y > x;
  const float high = steep ? y : x, low = steep ? x : y;
  const bool zero = high < negligible<float>();
  const float t = zero ? 0.0f : low / (zero ? 1.0f : high);
  const float s = t * t;
  const float angle = arctangent(t);
  // First quadrant: angle or π/2 - angle; second: π - angle or π/2 + angle. The constants in two parts.
  const bool left = re < 0.0f;
  const float high_part = steep ? 1.5707963705062866f : (left ? 3.1415927410125732f : 0.0f);
  const float low_part = steep ? -4.371138828673793e-08f : (left ? -8.742277657347586e-08f : 0.0f);
  const float signed_angle = steep != left ? -angle : angle;
  const float upper = high_part + (signed_angle + low_part);
  const float phase = zero ? 0.0f : (im < 0.0f ? -upper : upper);
  return {zero ? 0.0f : high * PSF_MATH(sqrtf)(1.0f + s), phase};
}

PSF_FREQUENCY_FUNCTION Polar<double> polar(double re, double im) {
  const double amplitude = PSF_MATH(hypot)(re, im);
  if (amplitude < negligible<double>()) return {0.0, 0.0};
  return {amplitude, PSF_MATH(atan2)(im + 0.0, re)};
}

// The same where the spectrum of a real map is real: imaginary rounding noise is dropped, the phase is 0 or π.
template <typename T>
PSF_FREQUENCY_FUNCTION Polar<T> polar_real(T re) {
  const T amplitude = re < T(0) ? -re : re;
  if (amplitude < negligible<T>()) return {T(0), T(0)};
  return {amplitude, re < T(0) ? T(3.14159265358979323846) : T(0)};
}

// exp(i phase) for |phase| <= π and a little (attended phases are averages of phases in (-π, π]).
PSF_FREQUENCY_FUNCTION Complex<float> unit(float phase) {
  // The nearest multiple of π/2, -2 to 2: adding and subtracting 1.5 * 2^23 rounds to an integer.
  const float quarter = (phase * 0.63661977236758134f + 12582912.0f) - 12582912.0f;
  // π/2 in two parts; the first product is exact.
  float r = phase - quarter * 1.5707963705062866f;
  r = r + quarter * 4.371138828673793e-08f;
  const float z = r * r;
  // Chebyshev fits on [-π/4, π/4].
  const float sine = r + r * z * (-0.1666666466f + z * (0.008332748038f + z * -0.0001958784052f));
  const float cosine = 1.0f - 0.5f * z + z * z * (0.04166666466f + z * (-0.00138883028f + z * 2.454789162e-5f));
  const bool swap = quarter * quarter == 1.0f;
  const float a = swap ? sine : cosine, b = swap ? cosine : sine;
  return {quarter > 0.5f || quarter < -1.5f ? -a : a, quarter > 1.5f || quarter < -0.5f ? -b : b};
}

PSF_FREQUENCY_FUNCTION Complex<double> unit(double phase) { return {PSF_MATH(cos)(phase), PSF_MATH(sin)(phase)}; }

// Gradients with respect to re and im from those with respect to amplitude and phase.
template <typename T>
PSF_FREQUENCY_FUNCTION Complex<T> polar_gradient(T re, T im, T amplitude, T grad_amplitude, T grad_phase) {
  const bool zero = amplitude < negligible<T>();
  const T inverse = zero ? T(0) : T(1) / (zero ? T(1) : amplitude);
  const T cosine = re * inverse, sine = im * inverse, turn = grad_phase * inverse;
  return {grad_amplitude * cosine - turn * sine, grad_amplitude * sine + turn * cosine};
}

}  // namespace psf

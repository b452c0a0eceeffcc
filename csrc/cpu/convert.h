// bfloat16 and float16 as stored, for CPU kernels that compute in float32: rounding to nearest even, NaN kept.
// Internal linkage and no branches: kernels include this once per instruction set, loops over it vectorise.
#pragma once

#include <cstdint>

#define PSF_CONVERT static inline __attribute__((always_inline))

namespace psf {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

PSF_CONVERT float from_bits(uint32_t bits) { return __builtin_bit_cast(float, bits); }
PSF_CONVERT uint32_t to_bits(float value) { return __builtin_bit_cast(uint32_t, value); }

// widen(x): the value in the type that kernels compute in.
PSF_CONVERT float widen(float value) { return value; }
PSF_CONVERT double widen(double value) { return value; }
PSF_CONVERT float widen(BFloat16 value) { return from_bits(static_cast<uint32_t>(value.bits) << 16); }
PSF_CONVERT float widen(Half value) {
  // Moving the exponent needs a factor of 2^112, which also makes subnormals right; all ones stays infinity or NaN.
  const uint32_t sign = (value.bits & 0x8000u) << 16, magnitude = (value.bits & 0x7fffu) << 13;
  const float finite = from_bits(magnitude) * from_bits(0x77800000u);
  return from_bits(sign | (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : to_bits(finite)));
}

// narrow(value, result): rounded to the type that is stored.
PSF_CONVERT void narrow(float value, float& result) { result = value; }
PSF_CONVERT void narrow(double value, double& result) { result = value; }
PSF_CONVERT void narrow(float value, BFloat16& result) {
  const uint32_t bits = to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  result.bits = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u : rounded);
}
PSF_CONVERT void narrow(float value, Half& result) {
  const uint32_t bits = to_bits(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  // Subnormal results: adding 0.5 leaves the rounded 10 bits at the bottom of the sum.
  const uint32_t subnormal = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  result.bits = static_cast<uint16_t>(sign | (magnitude >= 0x47800000u ? special : finite));
}

}  // namespace psf

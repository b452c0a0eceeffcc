// exp of a vector of float32, for CPU kernels.
#pragma once

namespace psf {

// For arguments up to 87, good to 1 ulp; below the smallest normal number 0. Floats and Int32s: GCC vectors of as many
// lanes.
template <typename Floats, typename Int32s>
static inline __attribute__((always_inline)) Floats exponential_of(Floats x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const Floats shifted = x * 1.44269504088896341f + magic;
  const Floats n = shifted - magic;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  const Int32s exponent = (reinterpret_cast<Int32s>(shifted) - 0x4b400000 + 127) << 23;
  const Floats result = p * reinterpret_cast<Floats>(exponent);
  return x < -87.0f ? Floats{} : result;
}

}  // namespace psf

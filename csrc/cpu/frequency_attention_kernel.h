// CPU kernels of the frequency attention. Each call does one task, a run of frequencies (or pixels) of one head (or
// image); the operator file cuts the work into tasks, so that results do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "cpu/capability.h"

namespace psf {

// A batch of half spectra [B, heads * depth, height, columns] of complex numbers, columns = width / 2 + 1, contiguous.
struct Spectrum {
  int64_t depth;   // channels of a head
  int64_t height;  // of the image
  int64_t width;   // of the image
  int64_t columns() const { return width / 2 + 1; }
  int64_t frequencies() const { return height * columns(); }
};

// How the elements of an input are stored: as the type that is computed in, or in 16 bits.
enum class Stored { plain, bfloat16, float16 };

// One image of a batch [B, channels, pixels] of any strides: x[c * channel_stride + pixel * pixel_stride].
struct Pixels {
  Stored stored;
  int64_t channels;
  int64_t pixels;
  int64_t channel_stride;
  int64_t pixel_stride;
};

// Norms below this are taken as this, as torch.nn.functional.normalize does.
constexpr double kSmallestNorm = 1e-12;

// Frequencies (or pixels) that stay in the first-level cache together.
constexpr int64_t kFrequencyBlock = 128;
constexpr int64_t kNormalizeBlock = 512;

// Rows are padded to a multiple of 4, so that the small matrix products need no special case.
constexpr int64_t padded_depth(int64_t depth) { return (depth + 3) / 4 * 4; }
// Scalars of scratch memory per task, aligned to 64 bytes.
constexpr int64_t frequency_scratch(int64_t depth) {
  const int64_t rows = padded_depth(depth);
  return 10 * rows * kFrequencyBlock + 4 * rows * rows + 2 * rows * rows * 16 + 4 * kFrequencyBlock;
}

// Pointers to spectra point to the head's first channel. A Gram result is [2, depth, depth] (amplitudes, phases).
#define PSF_DECLARE_FREQUENCY(T)                                                                                     \
  /* gram = Σ |q||k|ᵀ and Σ ∠q∠kᵀ over the frequencies begin..end. */                                                \
  PSF_DECLARE(void, frequency_gram, const Spectrum& spectrum, const T* q, const T* k, int64_t begin, int64_t end,    \
              T* scratch, double* gram)                                                                              \
  /* v becomes A|v| exp(i P∠v); attention is [2, depth, depth]. */                                                   \
  PSF_DECLARE(void, frequency_apply, const Spectrum& spectrum, T* v, const T* attention, int64_t begin, int64_t end, \
              T* scratch)                                                                                            \
  /* v becomes its gradient (for the inverse transform); gram = gradient of the attention. grad is rfft2 of the      \
     output's gradient, weight the number of times that each column stands in the full spectrum, repeated. */        \
  PSF_DECLARE(void, frequency_apply_backward, const Spectrum& spectrum, T* v, const T* grad, const T* weight,        \
              const T* attention, int64_t begin, int64_t end, T* scratch, double* gram)                              \
  /* q and k become their gradients; grad_gram is [2, depth, depth]. */                                              \
  PSF_DECLARE(void, frequency_gram_backward, const Spectrum& spectrum, T* q, T* k, const T* weight,                  \
              const T* grad_gram, int64_t begin, int64_t end, T* scratch)                                            \
  /* out [height, width] = re + im over the whole plane of one map's half spectrum (see the operator file). */       \
  PSF_DECLARE(void, frequency_hartley, const Spectrum& s, const T* spectrum, T* out)

PSF_DECLARE_FREQUENCY(float)
PSF_DECLARE_FREQUENCY(double)

// out [pixels] = 1 / the norm of x over channels, for the pixels begin..end; block: scratch [channels,
// kNormalizeBlock]. Backward: grad [channels, pixels], that of x / norm, becomes that of x.
#define PSF_DECLARE_NORMALIZE(T)                                                                                   \
  PSF_DECLARE(void, frequency_inverse_norm, const Pixels& p, const void* x, int64_t begin, int64_t end, T* block,  \
              T* out)                                                                                              \
  PSF_DECLARE(void, frequency_normalize_backward, const Pixels& p, const void* x, const T* inverse, int64_t begin, \
              int64_t end, T* block, T* grad)

PSF_DECLARE_NORMALIZE(float)
PSF_DECLARE_NORMALIZE(double)

// The elementary functions alone, for tests of their accuracy: values [count, 2] <-> amplitude and phase [count].
PSF_DECLARE(void, frequency_polar, const float* values, int64_t count, float* amplitude, float* phase)
PSF_DECLARE(void, frequency_unit, const float* phase, int64_t count, float* values)

}  // namespace psf

#include "cpu/frequency_attention_kernel.h"

#include "math/frequency_attention.h"

namespace psf {
namespace PSF_CAPABILITY {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kTileColumns = 4;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
constexpr int kTileColumns = 2;
#else
constexpr int kVectorBytes = 16;
constexpr int kTileColumns = 2;
#endif
constexpr int kTileRows = 4;
constexpr int64_t kBlock = kFrequencyBlock;

template <typename T>
struct Vector {
  typedef T type __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
  static constexpr int lanes = kVectorBytes / static_cast<int>(sizeof(T));
};

inline __attribute__((always_inline)) int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Flat indices of the at most four frequencies at which the transform of a real map is real.
struct RealFrequencies {
  int64_t index[4];
  int count = 0;
  explicit RealFrequencies(const Spectrum& s) {
    const int64_t rows[2] = {0, s.height / 2}, columns[2] = {0, s.width / 2};
    for (int i = 0; i < (s.height % 2 == 0 ? 2 : 1); ++i)
      for (int j = 0; j < (s.width % 2 == 0 ? 2 : 1); ++j) index[count++] = rows[i] * s.columns() + columns[j];
  }
};

// Amplitudes and phases [padded depth, kBlock] of `count` frequencies from `begin`; the rest of the block is 0.
template <typename T>
void load_polar(const Spectrum& s, const RealFrequencies& real, const T* spectrum, int64_t begin, int64_t count,
                T* amplitude, T* phase) {
  T tail[2 * kBlock];
  for (int64_t d = 0; d < padded_depth(s.depth); ++d, amplitude += kBlock, phase += kBlock) {
    if (d >= s.depth) {
      for (int64_t t = 0; t < kBlock; ++t) amplitude[t] = phase[t] = T(0);
      continue;
    }
    const T* row = spectrum + (d * s.frequencies() + begin) * 2;
    const T* source = row;
    if (count < kBlock) {
      for (int64_t t = 0; t < 2 * kBlock; ++t) tail[t] = t < 2 * count ? row[t] : T(0);
      source = tail;
    }
    for (int64_t t = 0; t < kBlock; ++t) {
      const Polar<T> value = polar(source[2 * t], source[2 * t + 1]);
      amplitude[t] = value.amplitude;
      phase[t] = value.phase;
    }
    for (int i = 0; i < real.count; ++i) {
      const int64_t t = real.index[i] - begin;
      if (t < 0 || t >= count) continue;
      const Polar<T> value = polar_real(row[2 * t]);
      amplitude[t] = value.amplitude;
      phase[t] = value.phase;
    }
  }
}

// Overwrites a spectrum by its gradient, given those of amplitude and phase; 1 / weight is what the adjoint of rfft2
// asks of the inverse transform.
template <typename T>
void store_gradient(const Spectrum& s, const RealFrequencies& real, T* spectrum, int64_t begin, int64_t count,
                    const T* weight, const T* amplitude, const T* grad_amplitude, const T* grad_phase) {
  T tail[2 * kBlock];
  for (int64_t d = 0; d < s.depth; ++d) {
    T* row = spectrum + (d * s.frequencies() + begin) * 2;
    T* target = row;
    if (count < kBlock) {
      for (int64_t t = 0; t < 2 * kBlock; ++t) tail[t] = t < 2 * count ? row[t] : T(0);
      target = tail;
    }
    T real_gradient[4] = {};
    for (int i = 0; i < real.count; ++i) {
      const int64_t t = real.index[i] - begin;
      if (t < 0 || t >= count) continue;
      const T amplitude_there = amplitude[d * kBlock + t], gradient = grad_amplitude[d * kBlock + t];
      real_gradient[i] = amplitude_there == T(0) ? T(0) : (row[2 * t] < T(0) ? -gradient : gradient);
    }
    for (int64_t t = 0; t < kBlock; ++t) {
      const int64_t at = d * kBlock + t;
      const Complex<T> gradient =
          polar_gradient(target[2 * t], target[2 * t + 1], amplitude[at], grad_amplitude[at], grad_phase[at]);
      const T inverse_weight = T(1.5) - T(0.5) * weight[t];  // weights are 1 or 2
      target[2 * t] = gradient.re * inverse_weight;
      target[2 * t + 1] = gradient.im * inverse_weight;
    }
    if (count < kBlock)
      for (int64_t t = 0; t < 2 * count; ++t) row[t] = tail[t];
    for (int i = 0; i < real.count; ++i) {
      const int64_t t = real.index[i] - begin;
      if (t < 0 || t >= count) continue;
      row[2 * t] = real_gradient[i];  // these columns have weight 1
      row[2 * t + 1] = T(0);
    }
  }
}

// out[i] = Σ_j matrix[i, j] in[j], rows of kBlock; matrix [rows, rows] padded with zeros.
template <typename T>
void mix(int64_t rows, const T* matrix, const T* in, T* out) {
  using V = typename Vector<T>::type;
  constexpr int lanes = Vector<T>::lanes;
  for (int64_t i = 0; i < rows; i += kTileRows)
    for (int64_t t = 0; t < kBlock; t += 2 * lanes) {
      V sum[kTileRows][2] = {};
      for (int64_t j = 0; j < rows; ++j) {
        const V a = *reinterpret_cast<const V*>(in + j * kBlock + t);
        const V b = *reinterpret_cast<const V*>(in + j * kBlock + t + lanes);
        for (int r = 0; r < kTileRows; ++r) {
          sum[r][0] += matrix[(i + r) * rows + j] * a;
          sum[r][1] += matrix[(i + r) * rows + j] * b;
        }
      }
      for (int r = 0; r < kTileRows; ++r) {
        *reinterpret_cast<V*>(out + (i + r) * kBlock + t) = sum[r][0];
        *reinterpret_cast<V*>(out + (i + r) * kBlock + t + lanes) = sum[r][1];
      }
    }
}

// sums[i, j] += Σ_t x[i, t] y[j, t], a vector of partial sums each.
template <typename T>
void accumulate_gram(int64_t rows, const T* x, const T* y, T* sums) {
  using V = typename Vector<T>::type;
  constexpr int lanes = Vector<T>::lanes;
  for (int64_t i = 0; i < rows; i += kTileRows)
    for (int64_t j = 0; j < rows; j += kTileColumns) {
      V sum[kTileRows][kTileColumns] = {};
      for (int64_t t = 0; t < kBlock; t += lanes) {
        V b[kTileColumns];
        for (int c = 0; c < kTileColumns; ++c) b[c] = *reinterpret_cast<const V*>(y + (j + c) * kBlock + t);
        for (int r = 0; r < kTileRows; ++r) {
          const V a = *reinterpret_cast<const V*>(x + (i + r) * kBlock + t);
          for (int c = 0; c < kTileColumns; ++c) sum[r][c] += a * b[c];
        }
      }
      for (int r = 0; r < kTileRows; ++r)
        for (int c = 0; c < kTileColumns; ++c)
          *reinterpret_cast<V*>(sums + ((i + r) * rows + j + c) * lanes) += sum[r][c];
    }
}

template <typename T>
void clear(T* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] = T(0);
}

// gram [depth, depth] from the vectors of partial sums, added up in double.
template <typename T>
void finish_gram(int64_t depth, const T* sums, double* gram) {
  constexpr int lanes = Vector<T>::lanes;
  const int64_t rows = padded_depth(depth);
  for (int64_t i = 0; i < depth; ++i)
    for (int64_t j = 0; j < depth; ++j) {
      double total = 0;
      for (int lane = 0; lane < lanes; ++lane) total += sums[(i * rows + j) * lanes + lane];
      gram[i * depth + j] = total;
    }
}

// Copies [depth, depth] into [rows, rows], transposed or not, zeros outside.
template <typename T>
void pad_matrix(int64_t depth, const T* matrix, bool transposed, T* padded) {
  const int64_t rows = padded_depth(depth);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < rows; ++j)
      padded[i * rows + j] =
          i < depth && j < depth ? (transposed ? matrix[j * depth + i] : matrix[i * depth + j]) : T(0);
}

// Hands out parts of the scratch memory.
template <typename T>
struct Scratch {
  T* next;
  T* take(int64_t count) {
    T* part = next;
    next += count;
    return part;
  }
};

template <typename T>
void gram_task(const Spectrum& s, const T* q, const T* k, int64_t begin, int64_t end, T* memory, double* gram) {
  const RealFrequencies real(s);
  const int64_t rows = padded_depth(s.depth), sums = rows * rows * Vector<T>::lanes;
  Scratch<T> scratch{memory};
  T* const q_amplitude = scratch.take(rows * kBlock);
  T* const q_phase = scratch.take(rows * kBlock);
  T* const k_amplitude = scratch.take(rows * kBlock);
  T* const k_phase = scratch.take(rows * kBlock);
  T* const amplitude_sums = scratch.take(sums);
  T* const phase_sums = scratch.take(sums);
  clear(amplitude_sums, 2 * sums);
  for (int64_t n = begin; n < end; n += kBlock) {
    const int64_t count = smaller(kBlock, end - n);
    load_polar(s, real, q, n, count, q_amplitude, q_phase);
    load_polar(s, real, k, n, count, k_amplitude, k_phase);
    accumulate_gram(rows, q_amplitude, k_amplitude, amplitude_sums);
    accumulate_gram(rows, q_phase, k_phase, phase_sums);
  }
  finish_gram(s.depth, amplitude_sums, gram);
  finish_gram(s.depth, phase_sums, gram + s.depth * s.depth);
}

template <typename T>
void apply_task(const Spectrum& s, T* v, const T* attention, int64_t begin, int64_t end, T* memory) {
  const RealFrequencies real(s);
  const int64_t rows = padded_depth(s.depth);
  Scratch<T> scratch{memory};
  T* const amplitude = scratch.take(rows * kBlock);
  T* const phase = scratch.take(rows * kBlock);
  T* const mixed_amplitude = scratch.take(rows * kBlock);
  T* const mixed_phase = scratch.take(rows * kBlock);
  T* const amplitude_attention = scratch.take(rows * rows);
  T* const phase_attention = scratch.take(rows * rows);
  T* const tail = scratch.take(2 * kBlock);
  pad_matrix(s.depth, attention, false, amplitude_attention);
  pad_matrix(s.depth, attention + s.depth * s.depth, false, phase_attention);
  for (int64_t n = begin; n < end; n += kBlock) {
    const int64_t count = smaller(kBlock, end - n);
    load_polar(s, real, v, n, count, amplitude, phase);
    mix(rows, amplitude_attention, amplitude, mixed_amplitude);
    mix(rows, phase_attention, phase, mixed_phase);
    for (int64_t d = 0; d < s.depth; ++d) {
      T* row = v + (d * s.frequencies() + n) * 2;
      T* target = count < kBlock ? tail : row;
      const T* const a = mixed_amplitude + d * kBlock;
      const T* const p = mixed_phase + d * kBlock;
      for (int64_t t = 0; t < kBlock; ++t) {
        const Complex<T> direction = unit(p[t]);
        target[2 * t] = a[t] * direction.re;
        target[2 * t + 1] = a[t] * direction.im;
      }
      if (count < kBlock)
        for (int64_t t = 0; t < 2 * count; ++t) row[t] = tail[t];
    }
  }
}

template <typename T>
void apply_backward_task(const Spectrum& s, T* v, const T* grad, const T* weight, const T* attention, int64_t begin,
                         int64_t end, T* memory, double* gram) {
  const RealFrequencies real(s);
  const int64_t rows = padded_depth(s.depth), sums = rows * rows * Vector<T>::lanes;
  Scratch<T> scratch{memory};
  T* const amplitude = scratch.take(rows * kBlock);
  T* const phase = scratch.take(rows * kBlock);
  T* const mixed_amplitude = scratch.take(rows * kBlock);  // then its gradient
  T* const mixed_phase = scratch.take(rows * kBlock);
  T* const grad_amplitude = scratch.take(rows * kBlock);
  T* const grad_phase = scratch.take(rows * kBlock);
  T* const matrices = scratch.take(4 * rows * rows);  // A, P and their transposes
  T* const amplitude_sums = scratch.take(sums);
  T* const phase_sums = scratch.take(sums);
  T* const tail = scratch.take(2 * kBlock);
  const int64_t square = s.depth * s.depth;
  for (int part = 0; part < 4; ++part)
    pad_matrix(s.depth, attention + part % 2 * square, part >= 2, matrices + part * rows * rows);
  clear(amplitude_sums, 2 * sums);
  for (int64_t n = begin; n < end; n += kBlock) {
    const int64_t count = smaller(kBlock, end - n);
    const T* const weights = weight + n % s.columns();
    load_polar(s, real, v, n, count, amplitude, phase);
    mix(rows, matrices, amplitude, mixed_amplitude);
    mix(rows, matrices + rows * rows, phase, mixed_phase);
    for (int64_t d = 0; d < s.depth; ++d) {
      const T* const row = grad + (d * s.frequencies() + n) * 2;
      const T* source = row;
      if (count < kBlock) {
        for (int64_t t = 0; t < 2 * kBlock; ++t) tail[t] = t < 2 * count ? row[t] : T(0);
        source = tail;
      }
      T* const a = mixed_amplitude + d * kBlock;
      T* const p = mixed_phase + d * kBlock;
      for (int64_t t = 0; t < kBlock; ++t) {
        const Complex<T> direction = unit(p[t]);
        const T re = source[2 * t] * weights[t], im = source[2 * t + 1] * weights[t], value = a[t];
        a[t] = re * direction.re + im * direction.im;
        p[t] = value * (im * direction.re - re * direction.im);
      }
    }
    accumulate_gram(rows, mixed_amplitude, amplitude, amplitude_sums);
    accumulate_gram(rows, mixed_phase, phase, phase_sums);
    mix(rows, matrices + 2 * rows * rows, mixed_amplitude, grad_amplitude);
    mix(rows, matrices + 3 * rows * rows, mixed_phase, grad_phase);
    store_gradient(s, real, v, n, count, weights, amplitude, grad_amplitude, grad_phase);
  }
  finish_gram(s.depth, amplitude_sums, gram);
  finish_gram(s.depth, phase_sums, gram + square);
}

template <typename T>
void gram_backward_task(const Spectrum& s, T* q, T* k, const T* weight, const T* grad_gram, int64_t begin, int64_t end,
                        T* memory) {
  const RealFrequencies real(s);
  const int64_t rows = padded_depth(s.depth);
  Scratch<T> scratch{memory};
  T* const q_amplitude = scratch.take(rows * kBlock);
  T* const q_phase = scratch.take(rows * kBlock);
  T* const k_amplitude = scratch.take(rows * kBlock);
  T* const k_phase = scratch.take(rows * kBlock);
  T* const grad_amplitude = scratch.take(rows * kBlock);
  T* const grad_phase = scratch.take(rows * kBlock);
  T* const matrices = scratch.take(4 * rows * rows);
  for (int part = 0; part < 4; ++part)
    pad_matrix(s.depth, grad_gram + part % 2 * s.depth * s.depth, part >= 2, matrices + part * rows * rows);
  for (int64_t n = begin; n < end; n += kBlock) {
    const int64_t count = smaller(kBlock, end - n);
    const T* const weights = weight + n % s.columns();
    load_polar(s, real, q, n, count, q_amplitude, q_phase);
    load_polar(s, real, k, n, count, k_amplitude, k_phase);
    mix(rows, matrices, k_amplitude, grad_amplitude);
    mix(rows, matrices + rows * rows, k_phase, grad_phase);
    store_gradient(s, real, q, n, count, weights, q_amplitude, grad_amplitude, grad_phase);
    mix(rows, matrices + 2 * rows * rows, q_amplitude, grad_amplitude);
    mix(rows, matrices + 3 * rows * rows, q_phase, grad_phase);
    store_gradient(s, real, k, n, count, weights, k_amplitude, grad_amplitude, grad_phase);
  }
}

// Values of a run of pixels, channel by channel.
template <typename T>
struct Rows {
  const T* values;
  int64_t stride;
  const T* operator[](int64_t channel) const { return values + channel * stride; }
};

struct BFloat16 {
  uint16_t bits;
  operator float() const { return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16); }
};

// Copies `count` pixels from `begin` to `block` [channels, kNormalizeBlock].
template <typename T, typename S>
Rows<T> copy_pixels(const Pixels& p, const S* x, int64_t begin, int64_t count, T* block) {
  if (p.pixel_stride == 1) {
    for (int64_t c = 0; c < p.channels; ++c)
      for (int64_t t = 0; t < count; ++t)
        block[c * kNormalizeBlock + t] = static_cast<T>(x[c * p.channel_stride + begin + t]);
  } else {
    for (int64_t t = 0; t < count; ++t)
      for (int64_t c = 0; c < p.channels; ++c)
        block[c * kNormalizeBlock + t] = static_cast<T>(x[(begin + t) * p.pixel_stride + c * p.channel_stride]);
  }
  return {block, kNormalizeBlock};
}

// `count` pixels from `begin`: where they lie if that will do, else copied to `block`.
template <typename T>
Rows<T> load_pixels(const Pixels& p, const void* x, int64_t begin, int64_t count, T* block) {
  switch (p.stored) {
    case Stored::bfloat16:
      return copy_pixels(p, static_cast<const BFloat16*>(x), begin, count, block);
    case Stored::float16:
      return copy_pixels(p, static_cast<const _Float16*>(x), begin, count, block);
    default:
      if (p.pixel_stride == 1) return {static_cast<const T*>(x) + begin, p.channel_stride};
      return copy_pixels(p, static_cast<const T*>(x), begin, count, block);
  }
}

inline __attribute__((always_inline)) float root(float x) { return __builtin_sqrtf(x); }
inline __attribute__((always_inline)) double root(double x) { return __builtin_sqrt(x); }

template <typename T>
void inverse_norm_task(const Pixels& p, const void* x, int64_t begin, int64_t end, T* block, T* out) {
  for (int64_t n = begin; n < end; n += kNormalizeBlock) {
    const int64_t count = smaller(kNormalizeBlock, end - n);
    const Rows<T> rows = load_pixels(p, x, n, count, block);
    T sum[kNormalizeBlock] = {};
    for (int64_t c = 0; c < p.channels; ++c) {
      const T* const row = rows[c];
      for (int64_t t = 0; t < count; ++t) sum[t] += row[t] * row[t];
    }
    for (int64_t t = 0; t < count; ++t) {
      const T norm = root(sum[t]);
      out[n + t] = T(1) / (norm < T(kSmallestNorm) ? T(kSmallestNorm) : norm);
    }
  }
}

template <typename T>
void normalize_backward_task(const Pixels& p, const void* x, const T* inverse, int64_t begin, int64_t end, T* block,
                             T* grad) {
  for (int64_t n = begin; n < end; n += kNormalizeBlock) {
    const int64_t count = smaller(kNormalizeBlock, end - n);
    const Rows<T> rows = load_pixels(p, x, n, count, block);
    T along[kNormalizeBlock] = {};
    for (int64_t c = 0; c < p.channels; ++c) {
      const T* const row = rows[c];
      const T* const g = grad + c * p.pixels + n;
      for (int64_t t = 0; t < count; ++t) along[t] += row[t] * g[t];
    }
    for (int64_t t = 0; t < count; ++t) {
      // Where the norm is clamped the result is x times a constant.
      const bool clamped = inverse[n + t] >= T(1) / T(kSmallestNorm);
      along[t] = clamped ? T(0) : along[t] * inverse[n + t] * inverse[n + t];
    }
    for (int64_t c = 0; c < p.channels; ++c) {
      const T* const row = rows[c];
      T* const g = grad + c * p.pixels + n;
      for (int64_t t = 0; t < count; ++t) g[t] = (g[t] - row[t] * along[t]) * inverse[n + t];
    }
  }
}

template <typename T>
void hartley_map(const Spectrum& s, const T* spectrum, T* out) {
  const int64_t columns = s.columns();
  for (int64_t h = 0; h < s.height; ++h) {
    const T* const row = spectrum + h * columns * 2;
    const T* const mirrored = spectrum + (h == 0 ? 0 : s.height - h) * columns * 2;
    T* const target = out + h * s.width;
    for (int64_t w = 0; w < columns; ++w) target[w] = row[2 * w] + row[2 * w + 1];
    for (int64_t w = columns; w < s.width; ++w) {
      const int64_t from = s.width - w;
      target[w] = mirrored[2 * from] - mirrored[2 * from + 1];
    }
    // Of the columns that mirror themselves only the part with the symmetry of a real map's spectrum counts.
    for (int side = 0; side < (s.width % 2 == 0 ? 2 : 1); ++side) {
      const int64_t w = side * (s.width / 2);
      target[w] = T(0.5) * ((row[2 * w] + mirrored[2 * w]) + (row[2 * w + 1] - mirrored[2 * w + 1]));
    }
  }
}

}  // namespace

#define PSF_DEFINE_FREQUENCY(T)                                                                                      \
  void frequency_gram(const Spectrum& spectrum, const T* q, const T* k, int64_t begin, int64_t end, T* scratch,      \
                      double* gram) {                                                                                \
    gram_task(spectrum, q, k, begin, end, scratch, gram);                                                            \
  }                                                                                                                  \
  void frequency_apply(const Spectrum& spectrum, T* v, const T* attention, int64_t begin, int64_t end, T* scratch) { \
    apply_task(spectrum, v, attention, begin, end, scratch);                                                         \
  }                                                                                                                  \
  void frequency_apply_backward(const Spectrum& spectrum, T* v, const T* grad, const T* weight, const T* attention,  \
                                int64_t begin, int64_t end, T* scratch, double* gram) {                              \
    apply_backward_task(spectrum, v, grad, weight, attention, begin, end, scratch, gram);                            \
  }                                                                                                                  \
  void frequency_gram_backward(const Spectrum& spectrum, T* q, T* k, const T* weight, const T* grad_gram,            \
                               int64_t begin, int64_t end, T* scratch) {                                             \
    gram_backward_task(spectrum, q, k, weight, grad_gram, begin, end, scratch);                                      \
  }                                                                                                                  \
  void frequency_hartley(const Spectrum& s, const T* spectrum, T* out) { hartley_map(s, spectrum, out); }

PSF_DEFINE_FREQUENCY(float)
PSF_DEFINE_FREQUENCY(double)

#define PSF_DEFINE_NORMALIZE(T)                                                                                   \
  void frequency_inverse_norm(const Pixels& p, const void* x, int64_t begin, int64_t end, T* block, T* out) {     \
    inverse_norm_task(p, x, begin, end, block, out);                                                              \
  }                                                                                                               \
  void frequency_normalize_backward(const Pixels& p, const void* x, const T* inverse, int64_t begin, int64_t end, \
                                    T* block, T* grad) {                                                          \
    normalize_backward_task(p, x, inverse, begin, end, block, grad);                                              \
  }

PSF_DEFINE_NORMALIZE(float)
PSF_DEFINE_NORMALIZE(double)

void frequency_polar(const float* values, int64_t count, float* amplitude, float* phase) {
  for (int64_t i = 0; i < count; ++i) {
    const Polar<float> value = polar(values[2 * i], values[2 * i + 1]);
    amplitude[i] = value.amplitude;
    phase[i] = value.phase;
  }
}

void frequency_unit(const float* phase, int64_t count, float* values) {
  for (int64_t i = 0; i < count; ++i) {
    const Complex<float> value = unit(phase[i]);
    values[2 * i] = value.re;
    values[2 * i + 1] = value.im;
  }
}

}  // namespace PSF_CAPABILITY
}  // namespace psf

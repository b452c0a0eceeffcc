// The frequency attention's passes on CUDA devices; the FFTs between them are torch's
// (pansharp_fast/ops/frequency_attention.py, which also holds the schemas).
//
// A block works on a run of frequencies of one head, a tile at a time: amplitudes and phases [depth, tile] lie in
// shared memory, each computed once from a coalesced read. Sums over frequencies leave a result a run, and these are
// added up in double in a fixed order: no atomics, the same bits every time, in runs that depend on sizes alone.
//
// Products of float32 run on the tensor cores, operands split in two TF32 terms: as good as float32 whatever torch's
// precision setting, and fast enough. float64 is scalar.
#include "cuda/mma.cuh"
#include "cuda/polar.cuh"
#include "cuda/runtime.cuh"
#include "frequency_attention_tensors.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxDepth = 64;
// Blocks of a launch that its runs aim at: two rounds on the largest devices. Half of them where heads are wider, whose
// blocks take more of a multiprocessor and leave larger sums.
constexpr int kBlocks = 1024;
constexpr int64_t kMaxFrequencies = 1 << 30;
constexpr double kSmallestNorm = 1e-12;

// A spectrum's value, read and written in one piece.
template <typename T>
struct alignas(2 * sizeof(T)) Value {
  T re, im;
};

struct Shape {
  int frequencies, depth, width, columns;
  int padded;   // depth rounded up to eights
  int real[4];  // where the spectrum of a real map is real; -1: nowhere
  int runs, length;
  int step;  // of columns, a tile
};

// What depends on the channels of a head, of which there are at most kDepth.
template <typename T, int kDepth>
struct Layout {
  // Frequencies of a tile: what the shared memory holds of the backward's arrays and matrices.
  static constexpr int kTile = kDepth <= 16 ? 128 : 2048 / kDepth;
  // Of a shared array: rows of floats 8 banks apart keep the tensor cores' operands free of bank conflicts, an odd
  // number of doubles columns and rows.
  static constexpr int kRow = sizeof(T) == 4 ? kTile + 8 : kTile + 1;
  // A thread has one frequency and kOut channels.
  static constexpr int kOut = kDepth * kTile / kThreads;
  // Rows of arrays and matrices in shared memory; a constant where loops over so few had better be unrolled.
  static __host__ __device__ int padded(const Shape& s) { return kDepth == 8 ? 8 : s.padded; }
  // Elements of an array, of a matrix's row and of a matrix: rows 4 banks apart, as the tensor cores read them.
  static __host__ __device__ int array(const Shape& s) { return padded(s) * kRow; }
  static __host__ __device__ int line(const Shape& s) { return padded(s) + 4; }
  static __host__ __device__ int matrix(const Shape& s) { return padded(s) * line(s); }
};

// Blocks of a multiprocessor, which bound a kernel's registers; narrow: those where heads have at most 8 channels.
template <typename T, int kDepth>
constexpr int resident(int narrow) {
  return sizeof(T) == 8 ? 1 : (kDepth == 8 ? narrow : 2);
}

// A block's head and run, and the frequency and first channel of a thread, which goes along with the tiles.
template <class L>
struct Run {
  int64_t head;
  int last, t, n, channel, column;

  __device__ explicit Run(const Shape& s) : head(blockIdx.x / static_cast<unsigned>(s.runs)) {
    const int first = static_cast<int>(blockIdx.x % static_cast<unsigned>(s.runs)) * s.length;
    last = min(first + s.length, s.frequencies);
    t = static_cast<int>(threadIdx.x) % L::kTile;
    channel = static_cast<int>(threadIdx.x) / L::kTile * L::kOut;
    n = first + t;
    column = n % s.columns;
  }

  // Where the thread's values begin in a spectrum.
  template <typename V>
  __device__ V* in(const Shape& s, V* x) const {
    return x + (head * s.depth + channel) * s.frequencies + n;
  }

  // The same of another channel and frequency of the tile.
  template <typename V>
  __device__ V* in(const Shape& s, V* x, int i, int of) const {
    return x + (head * s.depth + i) * s.frequencies + (n - t) + of;
  }

  __device__ bool more() const { return n - t < last; }
  __device__ bool inside(const Shape& s, int i, int of) const { return n - t + of < s.frequencies && i < s.depth; }
  __device__ void next(const Shape& s) {
    n += L::kTile;
    column += s.step;
    if (column >= s.columns) column -= s.columns;
  }

  // Where the spectrum of a real map is real.
  __device__ bool real(const Shape& s) const {
    return n == s.real[0] || n == s.real[1] || n == s.real[2] || n == s.real[3];
  }
  // How often the column stands in the full spectrum; 0 where the spectrum is real (in columns that stand there once).
  template <typename T>
  __device__ T weight(const Shape& s) const {
    return real(s) ? T(0) : column == 0 || 2 * column == s.width ? T(1) : T(2);
  }
};

template <typename T>
__device__ T kernel_sqrt(T x) {
  return static_cast<T>(sqrt(x));
}

// Amplitudes and phases of a tile of spectra, x[m] + e * frequencies pointing to the thread's values: arrays
// [padded, kRow] follow each other in shared memory, 0 beyond the channels and frequencies.
template <typename T, int kDepth, int kSpectra>
__device__ void load_polar(const Shape& s, const Run<Layout<T, kDepth>>& run, const Value<T>* const (&x)[kSpectra],
                           T* shared) {
  using L = Layout<T, kDepth>;
  constexpr int kLoads = 4;  // on their way together, of every spectrum
  const bool real = run.real(s);
  const int array = L::array(s);
  T* const to = shared + run.channel * L::kRow + run.t;
#pragma unroll
  for (int first = 0; first < L::kOut; first += kLoads) {
    if (run.channel + first >= L::padded(s)) break;
    Value<T> values[kLoads][kSpectra];
#pragma unroll
    for (int e = 0; e < kLoads; ++e) {
#pragma unroll
      for (int m = 0; m < kSpectra; ++m) {
        values[e][m] = {T(0), T(0)};
        if (run.inside(s, run.channel + first + e, run.t))
          values[e][m] = x[m][(first + e) * static_cast<int64_t>(s.frequencies)];
      }
    }
#pragma unroll
    for (int e = 0; e < kLoads; ++e) {
#pragma unroll
      for (int m = 0; m < kSpectra; ++m) {
        const psf::Polar<T> polar = psf::fast_polar(values[e][m].re, real ? T(0) : values[e][m].im);
        to[2 * m * array + (first + e) * L::kRow] = polar.amplitude;
        to[(2 * m + 1) * array + (first + e) * L::kRow] = polar.phase;
      }
    }
  }
}

// Both [depth, depth] matrices into shared memory, zeros around them.
template <typename T, int kDepth>
__device__ void load_matrices(const Shape& s, const T* matrices, T* shared) {
  using L = Layout<T, kDepth>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll 4
  for (int row = static_cast<int>(threadIdx.x) / 32; row < 2 * L::padded(s); row += kWarps) {
    const int which = row >= L::padded(s) ? 1 : 0, y = row - which * L::padded(s);
#pragma unroll
    for (int x = lane; x < lane + kDepth; x += 32) {
      // Read in any case, so that several are on their way.
      const T value = matrices[(which * s.depth + min(y, s.depth - 1)) * s.depth + min(x, s.depth - 1)];
      if (x < L::padded(s)) shared[row * L::line(s) + x] = y < s.depth && x < s.depth ? value : T(0);
    }
  }
}

// body(i, t, Σ_j matrices[0, i, j] x[0, j, t], Σ_j matrices[1, i, j] x[1, j, t]), or of the transposes, for every
// channel and frequency of the tile; x: arrays of amplitudes and of phases.
template <typename T, int kDepth, bool kTransposed = false, typename Body>
__device__ void mix(const Shape& s, const Run<Layout<T, kDepth>>& run, const T* matrices, const T* x, Body body) {
  using L = Layout<T, kDepth>;
  const auto element = [&](int which, int i, int j) {
    return matrices[which * L::matrix(s) + (kTransposed ? j * L::line(s) + i : i * L::line(s) + j)];
  };
  if constexpr (sizeof(T) == 8) {
    for (int i = run.channel; i < min(run.channel + L::kOut, L::padded(s)); ++i) {
      T sums[2] = {};
      for (int j = 0; j < s.depth; ++j)
        for (int m = 0; m < 2; ++m) sums[m] += element(m, i, j) * x[m * L::array(s) + j * L::kRow + run.t];
      body(i, run.t, sums[0], sums[1]);
    }
  } else {
    // A warp has 16 channels and 16 frequencies. Columns of a product are frequencies 0, 4, 1, 5, ...: a lane's two
    // results then lie apart, and those of four lanes together.
    // Up to 8 channels rows of both matrices share a product, of which half is of use.
    constexpr bool kBoth = kDepth == 8;
    constexpr int kStrips = (kDepth + 15) / 16;
    const int warp = static_cast<int>(threadIdx.x) / 32, q = static_cast<int>(threadIdx.x) % 32 / 4;
    const int r = static_cast<int>(threadIdx.x) % 4, first = warp % kStrips * 16, t = warp / kStrips * 16;
    if (first >= L::padded(s)) return;
    const int upper = min(first + q, L::padded(s) - 1), lower = min(upper + (kBoth ? 0 : 8), L::padded(s) - 1);
    psf::Sum<true> sums[2][2];
#pragma unroll(kDepth == 8 ? 2 : 1)
    for (int j = 0; j < L::padded(s); j += 8) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const int above = kBoth ? 0 : m, below = kBoth ? 1 : m;
        const psf::Operand<true> a({element(above, upper, j + r), element(below, lower, j + r),
                                    element(above, upper, j + r + 4), element(below, lower, j + r + 4)});
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const float* const right = x + m * L::array(s) + (j + r) * L::kRow + t + 8 * n + q / 2 + q % 2 * 4;
          sums[m][n].add(a, psf::Terms<2>({right[0], right[4 * L::kRow]}));
          sums[m][n].close();
        }
      }
    }
#pragma unroll
    for (int e = 0; e < (kBoth ? 2 : 4); ++e) {
#pragma unroll
      for (int n = 0; n < 2; ++n)
        if (first + q + e / 2 * 8 < L::padded(s))
          body(first + q + e / 2 * 8, t + 8 * n + r + e % 2 * 4, sums[0][n][e], sums[1][n][kBoth ? e + 2 : e]);
    }
  }
}

// Sums of x[i, t] y[j, t] over tiles for both Gram matrices; x and y: arrays of amplitudes, then of phases.
template <typename T, int kDepth>
struct Gram {
  using L = Layout<T, kDepth>;
  static constexpr int kGroups = 1;  // how many results a block stores
  static constexpr int kCount = (2 * kDepth * kDepth + kThreads - 1) / kThreads;
  T sums[kCount] = {};

  __device__ void add(const Shape& s, const T* x, const T* y) {
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      const int entry = static_cast<int>(threadIdx.x) + e * kThreads, row = entry / s.depth, matrix = row / s.depth;
      if (matrix >= 2) break;
      const T* const left = x + (matrix * L::padded(s) + row % s.depth) * L::kRow;
      const T* const right = y + (matrix * L::padded(s) + entry % s.depth) * L::kRow;
      T sum = T(0);
      for (int t = 0; t < L::kTile; ++t) sum += left[t] * right[t];
      sums[e] += sum;
    }
  }

  __device__ void store(const Shape& s, T* partial) const {
    T* const out = partial + static_cast<int64_t>(blockIdx.x) * 2 * s.depth * s.depth;
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      const int entry = static_cast<int>(threadIdx.x) + e * kThreads;
      if (entry < 2 * s.depth * s.depth) out[entry] = sums[e];
    }
  }
};

// A warp has a strip of 16 rows of a matrix; where strips are fewer than warps, groups of warps share the eights of a
// tile and store a result each. Up to 8 channels a strip holds both matrices: rows of amplitudes, then of phases, times
// columns of either, of which half is of use.
template <int kDepth>
struct Gram<float, kDepth> {
  using L = Layout<float, kDepth>;
  static constexpr bool kBoth = kDepth == 8;
  static constexpr int kStrips = kBoth ? 1 : kDepth / 8, kGroups = kWarps / kStrips;
  static constexpr int kColumns = kBoth ? 2 : kDepth / 8;  // of 8
  psf::Sum<true> sums[kColumns];

  int lane, group, matrix, first;
  __device__ Gram() : lane(threadIdx.x % 32), group(static_cast<int>(threadIdx.x) / 32 / kStrips) {
    const int strip = static_cast<int>(threadIdx.x) / 32 % kStrips;
    matrix = 2 * strip / kStrips;
    first = 2 * strip % kStrips * 8;
  }

  __device__ void add(const Shape& s, const float* x, const float* y) {
    if (first >= s.depth) return;
    // Eights of rows and columns beyond the head's channels only reach results that are not stored. Which eight
    // frequencies a product takes is free: a lane's are neighbours, read together.
    const auto line = [&](const float* array, int which, int eight) {
      const float* const rows = array + which * L::array(s) + min(eight, L::padded(s) - 8) * L::kRow;
      return reinterpret_cast<const float2*>(rows + lane / 4 * L::kRow) + lane % 4;
    };
    const float2* const upper = line(x, matrix, first);
    const float2* const lower = line(x, kBoth ? 1 : matrix, first + 8);
#pragma unroll(kDepth >= 32 ? 1 : 4)
    for (int eight = 0; eight < L::kTile / 8; eight += kGroups) {
      const int t = 4 * (eight + group);
      const psf::Operand<true> a({upper[t].x, lower[t].x, upper[t].y, lower[t].y});
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        const float2 right = line(y, kBoth ? n : matrix, 8 * n)[t];
        sums[n].add(a, psf::Terms<2>({right.x, right.y}));
        sums[n].close();
      }
    }
    if constexpr (kDepth == 64) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) sums[n].fold();
    }
  }

  __device__ void store(const Shape& s, float* partial) const {
    partial += (static_cast<int64_t>(blockIdx.x) * kGroups + group) * 2 * s.depth * s.depth;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int e = kBoth ? 2 * n : 0; e < (kBoth ? 2 * n + 2 : 4); ++e) {
        const int which = kBoth ? n : matrix, i = first + lane / 4 + (kBoth ? 0 : e / 2 * 8);
        const int j = (kBoth ? 0 : 8 * n) + lane % 4 * 2 + e % 2;
        if (i < s.depth && j < s.depth) partial[(which * s.depth + i) * s.depth + j] = sums[n][e];
      }
    }
  }
};

// Writes the gradient of one value of a spectrum in its place; 1 / its column's weight is what the adjoint of rfft2
// asks of the inverse transform.
template <typename T>
__device__ void store_gradient(Value<T>* at, T weight, T amplitude, T grad_amplitude, T grad_phase) {
  const Value<T> value = *at;
  psf::Complex<T> gradient{T(0), T(0)};
  if (weight > T(0))
    gradient = psf::polar_gradient(value.re, value.im, amplitude, grad_amplitude, grad_phase);
  else if (amplitude > T(0))
    gradient.re = value.re < T(0) ? -grad_amplitude : grad_amplitude;
  const T inverse = weight > T(1) ? T(0.5) : T(1);
  *at = {gradient.re * inverse, gradient.im * inverse};
}

template <typename T, int kDepth>
__global__ void __launch_bounds__(kThreads, (resident<T, kDepth>(4)))
    gram_kernel(Shape s, const Value<T>* q, const Value<T>* k, T* out) {
  using L = Layout<T, kDepth>;
  PSF_DYNAMIC_SHARED(T, shared);
  Run<L> run(s);
  q = run.in(s, q);
  k = run.in(s, k);
  Gram<T, kDepth> sums;
  for (; run.more(); run.next(s), q += L::kTile, k += L::kTile) {
    load_polar<T, kDepth, 2>(s, run, {q, k}, shared);
    __syncthreads();
    sums.add(s, shared, shared + 2 * L::array(s));
    __syncthreads();
  }
  sums.store(s, out);
}

// out [heads, entries] = the sum over parts of partial [heads, parts, entries]: 8 neighbouring entries a block, whose
// parts 32 threads share.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    reduce_kernel(const T* partial, int64_t total, int entries, int parts, double* out) {
  PSF_SHARED(double, sums, kThreads);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 8 + thread % 8;
  double sum = 0;
  if (i < total) {
    partial += i / entries * parts * entries + i % entries;
#pragma unroll 8
    for (int part = thread / 8; part < parts; part += kThreads / 8)
      sum += partial[static_cast<int64_t>(part) * entries];
  }
  sums[thread] = sum;
  for (int half = kThreads / 2; half >= 8; half /= 2) {
    __syncthreads();
    if (thread < half) sums[thread] += sums[thread + half];
  }
  if (thread < 8 && i < total) out[i] = sums[thread];
}

template <typename T, int kDepth>
__global__ void __launch_bounds__(kThreads, (resident<T, kDepth>(4)))
    apply_kernel(Shape s, Value<T>* v, const T* attention) {
  using L = Layout<T, kDepth>;
  PSF_DYNAMIC_SHARED(T, shared);
  T* const matrices = shared + 2 * L::array(s);
  Run<L> run(s);
  load_matrices<T, kDepth>(s, attention + run.head * 2 * s.depth * s.depth, matrices);
  for (const Value<T>* from = run.in(s, v); run.more(); run.next(s), from += L::kTile) {
    load_polar<T, kDepth, 1>(s, run, {from}, shared);
    __syncthreads();
    mix<T, kDepth>(s, run, matrices, shared, [&](int i, int t, T amplitude, T phase) {
      const psf::Complex<T> direction = psf::unit(phase);
      if (run.inside(s, i, t)) *run.in(s, v, i, t) = {amplitude * direction.re, amplitude * direction.im};
    });
    __syncthreads();
  }
}

template <typename T, int kDepth>
__global__ void __launch_bounds__(kThreads, (resident<T, kDepth>(2)))
    apply_backward_kernel(Shape s, Value<T>* v, const Value<T>* grad, const T* attention, T* out) {
  using L = Layout<T, kDepth>;
  PSF_DYNAMIC_SHARED(T, shared);
  T* const grads = shared + 2 * L::array(s);  // of mixed amplitudes, then of mixed phases
  T* const matrices = grads + 2 * L::array(s);
  T* const weights = matrices + 2 * L::matrix(s);  // of the tile's frequencies
  Run<L> run(s);
  load_matrices<T, kDepth>(s, attention + run.head * 2 * s.depth * s.depth, matrices);
  Gram<T, kDepth> sums;
  for (const Value<T>* from = run.in(s, v); run.more(); run.next(s), from += L::kTile) {
    load_polar<T, kDepth, 1>(s, run, {from}, shared);
    if (run.channel == 0) weights[run.t] = run.template weight<T>(s);
    __syncthreads();
    mix<T, kDepth>(s, run, matrices, shared, [&](int i, int t, T amplitude, T phase) {
      Value<T> value{T(0), T(0)};
      if (run.inside(s, i, t)) value = *run.in(s, grad, i, t);
      const T weight = weights[t] > T(1) ? T(2) : T(1), re = value.re * weight, im = value.im * weight;
      const psf::Complex<T> direction = psf::unit(phase);
      grads[i * L::kRow + t] = re * direction.re + im * direction.im;
      grads[i * L::kRow + t + L::array(s)] = amplitude * (im * direction.re - re * direction.im);
    });
    __syncthreads();
    sums.add(s, grads, shared);
    mix<T, kDepth, true>(s, run, matrices, grads, [&](int i, int t, T grad_amplitude, T grad_phase) {
      if (run.inside(s, i, t))
        store_gradient(run.in(s, v, i, t), weights[t], shared[i * L::kRow + t], grad_amplitude, grad_phase);
    });
    __syncthreads();
  }
  sums.store(s, out);
}

template <typename T, int kDepth>
__global__ void __launch_bounds__(kThreads, (resident<T, kDepth>(2)))
    gram_backward_kernel(Shape s, Value<T>* q, Value<T>* k, const T* grad) {
  using L = Layout<T, kDepth>;
  PSF_DYNAMIC_SHARED(T, shared);
  T* const for_k = shared + 2 * L::array(s);
  T* const matrices = for_k + 2 * L::array(s);
  T* const weights = matrices + 2 * L::matrix(s);
  Run<L> run(s);
  load_matrices<T, kDepth>(s, grad + run.head * 2 * s.depth * s.depth, matrices);
  const auto store = [&](Value<T>* x, const T* amplitudes) {
    return [&, x, amplitudes](int i, int t, T grad_amplitude, T grad_phase) {
      if (run.inside(s, i, t))
        store_gradient(run.in(s, x, i, t), weights[t], amplitudes[i * L::kRow + t], grad_amplitude, grad_phase);
    };
  };
  const Value<T>* from_k = run.in(s, k);
  for (const Value<T>* from_q = run.in(s, q); run.more(); run.next(s), from_q += L::kTile, from_k += L::kTile) {
    load_polar<T, kDepth, 2>(s, run, {from_q, from_k}, shared);
    if (run.channel == 0) weights[run.t] = run.template weight<T>(s);
    __syncthreads();
    mix<T, kDepth>(s, run, matrices, for_k, store(q, shared));
    mix<T, kDepth, true>(s, run, matrices, shared, store(k, for_k));
    __syncthreads();
  }
}

struct Pixels {
  int64_t channels, pixels, image_stride, channel_stride, pixel_stride, total;  // total: pixels of the batch
};

// S: how x is stored. T: what is computed in.
template <typename S, typename T>
__global__ void __launch_bounds__(kThreads) inverse_norm_kernel(Pixels p, const S* x, T* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.total) return;
  x += i / p.pixels * p.image_stride + i % p.pixels * p.pixel_stride;
  T sum = T(0);
  for (int64_t c = 0; c < p.channels; ++c) {
    const T value = static_cast<T>(x[c * p.channel_stride]);
    sum += value * value;
  }
  const T norm = kernel_sqrt(sum);
  out[i] = T(1) / (norm < T(kSmallestNorm) ? T(kSmallestNorm) : norm);
}

template <typename S, typename T>
__global__ void __launch_bounds__(kThreads) normalize_backward_kernel(Pixels p, const S* x, const T* inverse, T* grad) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.total) return;
  x += i / p.pixels * p.image_stride + i % p.pixels * p.pixel_stride;
  grad += i / p.pixels * p.channels * p.pixels + i % p.pixels;
  const T factor = inverse[i];
  T along = T(0);
  for (int64_t c = 0; c < p.channels; ++c) along += static_cast<T>(x[c * p.channel_stride]) * grad[c * p.pixels];
  // Where the norm is clamped the result is x times a constant.
  along = factor >= T(1) / T(kSmallestNorm) ? T(0) : along * factor * factor;
  for (int64_t c = 0; c < p.channels; ++c)
    grad[c * p.pixels] = (grad[c * p.pixels] - static_cast<T>(x[c * p.channel_stride]) * along) * factor;
}

// body(S(), T()) with the type that x is stored in and the type that is computed in.
template <typename Body>
void dispatch_stored(const Tensor& x, Body body) {
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return body(double(), double());
    case ScalarType::BFloat16:
      return body(torch::headeronly::BFloat16(), float());
    case ScalarType::Half:
      return body(torch::headeronly::Half(), float());
    default:
      return body(float(), float());
  }
}

// body with the depth that kernels are compiled for.
template <typename Body>
void dispatch_depth(int depth, Body body) {
  if (depth <= 8)
    body(std::integral_constant<int, 8>());
  else if (depth <= 16)
    body(std::integral_constant<int, 16>());
  else if (depth <= 32)
    body(std::integral_constant<int, 32>());
  else
    body(std::integral_constant<int, 64>());
}

// body(T(), the depth compiled for, Shape) of spectra x.
template <typename Body>
void dispatch(const Tensor& x, int64_t num_heads, int64_t width, Body body) {
  const int64_t height = x.size(2), columns = x.size(3), frequencies = height * columns, depth = x.size(1) / num_heads;
  psf::check_spectrum(x, width);
  STD_TORCH_CHECK(depth <= kMaxDepth, "spectrum: expected at most ", kMaxDepth, " channels a head, got ", depth);
  STD_TORCH_CHECK(frequencies <= kMaxFrequencies, "spectrum: expected at most ", kMaxFrequencies, " frequencies, got ",
                  frequencies);
  Shape s{};
  s.frequencies = static_cast<int>(frequencies);
  s.depth = static_cast<int>(depth);
  s.width = static_cast<int>(width);
  s.columns = static_cast<int>(columns);
  for (int i = 0; i < 4; ++i) {
    const bool row = i / 2 == 0 || height % 2 == 0, column = i % 2 == 0 || width % 2 == 0;
    s.real[i] = row && column ? static_cast<int>(i / 2 * (height / 2) * columns + i % 2 * (width / 2)) : -1;
  }
  const int64_t heads = x.size(0) * num_heads;
  psf::dispatch_spectrum(x, [&](auto zero) {
    dispatch_depth(s.depth, [&](auto most) {
      using L = Layout<decltype(zero), most()>;
      const auto divide = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
      const int64_t wanted = divide(most() == 8 ? kBlocks : kBlocks / 2, heads);
      s.padded = static_cast<int>(divide(depth, 8)) * 8;
      s.length = static_cast<int>(divide(divide(frequencies, wanted), L::kTile)) * L::kTile;
      s.runs = static_cast<int>(divide(frequencies, s.length));
      s.step = L::kTile % s.columns;
      body(zero, most, s);
    });
  });
}

unsigned blocks(int64_t count) { return static_cast<unsigned>(count); }

// Of arrays [padded, kRow], matrices and, with those, weights.
template <typename T, int kDepth>
size_t shared_bytes(const Shape& s, int arrays, int matrices) {
  using L = Layout<T, kDepth>;
  return sizeof(T) * (arrays * L::array(s) + matrices * L::matrix(s) + (matrices > 0 ? L::kTile : 0));
}

template <typename T>
auto values(const Tensor& spectrum) {
  return psf::data<Value<T>>(spectrum);
}

// Partial sums [heads, parts, ...] of a launch.
template <typename T, int kDepth>
Tensor partial_sums(const Tensor& x, const Shape& s, int64_t heads) {
  return torch::stable::new_empty(x, {heads, s.runs * Gram<T, kDepth>::kGroups, 2, s.depth, s.depth});
}

template <typename T>
Tensor reduce(const psf::Launch& launch, const Tensor& partial, int64_t batch, int64_t num_heads) {
  const int64_t depth = partial.size(4), entries = 2 * depth * depth, total = batch * num_heads * entries;
  Tensor out =
      torch::stable::new_empty(partial, {batch, num_heads, 2, depth, depth}, std::make_optional(ScalarType::Double));
  launch(reduce_kernel<T>, blocks((total + 7) / 8), kThreads, 0, psf::data<const T>(partial), total,
         static_cast<int>(entries), static_cast<int>(partial.size(1)), psf::data<double>(out));
  return out;
}

Tensor gram(const Tensor& q, const Tensor& k, int64_t num_heads, int64_t width) {
  const int64_t heads = q.size(0) * num_heads;
  const psf::Launch launch(q);
  Tensor out;
  dispatch(q, num_heads, width, [&](auto zero, auto most, const Shape& s) {
    using T = decltype(zero);
    const Tensor partial = partial_sums<T, most()>(q, s, heads);
    launch(gram_kernel<T, most()>, blocks(heads * s.runs), kThreads, shared_bytes<T, most()>(s, 4, 0), s, values<T>(q),
           values<T>(k), psf::data<T>(partial));
    out = reduce<T>(launch, partial, q.size(0), num_heads);
  });
  return out;
}

void gram_backward(Tensor q, Tensor k, const Tensor& grad, int64_t num_heads, int64_t width) {
  const psf::Launch launch(q);
  dispatch(q, num_heads, width, [&](auto zero, auto most, const Shape& s) {
    using T = decltype(zero);
    launch(gram_backward_kernel<T, most()>, blocks(q.size(0) * num_heads * s.runs), kThreads,
           shared_bytes<T, most()>(s, 4, 2), s, values<T>(q), values<T>(k), psf::data<const T>(grad));
  });
}

void apply(Tensor v, const Tensor& attention, int64_t num_heads, int64_t width) {
  const psf::Launch launch(v);
  dispatch(v, num_heads, width, [&](auto zero, auto most, const Shape& s) {
    using T = decltype(zero);
    launch(apply_kernel<T, most()>, blocks(v.size(0) * num_heads * s.runs), kThreads, shared_bytes<T, most()>(s, 2, 2),
           s, values<T>(v), psf::data<const T>(attention));
  });
}

Tensor apply_backward(Tensor v, const Tensor& grad, const Tensor& attention, int64_t num_heads, int64_t width) {
  const int64_t heads = v.size(0) * num_heads;
  const psf::Launch launch(v);
  Tensor out;
  dispatch(v, num_heads, width, [&](auto zero, auto most, const Shape& s) {
    using T = decltype(zero);
    const Tensor partial = partial_sums<T, most()>(v, s, heads);
    launch(apply_backward_kernel<T, most()>, blocks(heads * s.runs), kThreads, shared_bytes<T, most()>(s, 4, 2), s,
           values<T>(v), values<T>(grad), psf::data<const T>(attention), psf::data<T>(partial));
    out = reduce<T>(launch, partial, v.size(0), num_heads);
  });
  return out;
}

Pixels pixels_of(const Tensor& x) {
  psf::check_pixels(x);
  const int64_t pixels = x.size(2) * x.size(3);
  return {x.size(1), pixels, x.stride(0), x.stride(1), x.stride(3), x.size(0) * pixels};
}

Tensor inverse_norm(const Tensor& x) {
  const Pixels p = pixels_of(x);
  const psf::Launch launch(x);
  Tensor out;
  dispatch_stored(x, [&](auto stored, auto zero) {
    using S = decltype(stored);
    using T = decltype(zero);
    out = torch::stable::new_empty(
        x, {x.size(0), 1, x.size(2), x.size(3)},
        std::make_optional(sizeof(T) == sizeof(double) ? ScalarType::Double : ScalarType::Float));
    launch(inverse_norm_kernel<S, T>, blocks((p.total + kThreads - 1) / kThreads), kThreads, 0, p,
           psf::data<const S>(x), psf::data<T>(out));
  });
  return out;
}

void normalize_backward(const Tensor& x, const Tensor& inverse, Tensor grad) {
  const Pixels p = pixels_of(x);
  const psf::Launch launch(x);
  dispatch_stored(x, [&](auto stored, auto zero) {
    using S = decltype(stored);
    using T = decltype(zero);
    launch(normalize_backward_kernel<S, T>, blocks((p.total + kThreads - 1) / kThreads), kThreads, 0, p,
           psf::data<const S>(x), psf::data<const T>(inverse), psf::data<T>(grad));
  });
}

}  // namespace

PSF_CUDA_LIBRARY(m) {
  m.impl("frequency_attention_inverse_norm", TORCH_BOX(&inverse_norm));
  m.impl("frequency_attention_normalize_bwd", TORCH_BOX(&normalize_backward));
  m.impl("frequency_attention_gram", TORCH_BOX(&gram));
  m.impl("frequency_attention_gram_bwd", TORCH_BOX(&gram_backward));
  m.impl("frequency_attention_apply", TORCH_BOX(&apply));
  m.impl("frequency_attention_apply_bwd", TORCH_BOX(&apply_backward));
}

// The frequency attention's passes on CUDA devices; the FFTs between them are torch's
// (pansharp_fast/ops/frequency_attention.py, which also holds the schemas).
//
// A block works on tiles of kTile frequencies of one head: amplitudes and phases [depth, kTile] lie in shared memory,
// each computed once from a coalesced read. Sums over frequencies are cut into runs of kRun, a block each, and the
// runs' results are added up in double in a fixed order: no atomics, the same bits every time.
//
// Gram matrices of float32 run on the tensor cores, operands split in two TF32 terms: as good as float32 whatever
// torch's precision setting, and fast enough, as one TF32 term would wait for memory just as well.
#include "cuda/mma.cuh"
#include "cuda/runtime.cuh"
#include "frequency_attention_tensors.h"
#include "math/frequency_attention.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kTile = 32;
// Of a shared array: 36 floats keep the tensor cores' operands free of bank conflicts, 33 doubles columns and rows.
template <typename T>
constexpr int kRow = sizeof(T) == 4 ? kTile + 4 : kTile + 1;
constexpr int kRun = 2048;
constexpr int kThreads = 256;
constexpr int kRows = kThreads / kTile;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxDepth = 64;
constexpr double kSmallestNorm = 1e-12;

struct Shape {
  int64_t frequencies;
  int depth, height, width, columns;
  int64_t runs;
};

template <typename T>
__device__ T kernel_sqrt(T x) {
  return static_cast<T>(sqrt(x));
}

// Where the spectrum of a real map is real.
__device__ bool is_real(const Shape& s, int64_t n) {
  const int row = static_cast<int>(n / s.columns), column = static_cast<int>(n % s.columns);
  return (row == 0 || 2 * row == s.height) && (column == 0 || 2 * column == s.width);
}

// How often the column of a frequency stands in the full spectrum.
template <typename T>
__device__ T column_weight(const Shape& s, int64_t n) {
  const int column = static_cast<int>(n % s.columns);
  return column == 0 || 2 * column == s.width ? T(1) : T(2);
}

// Amplitudes and phases of a tile, 0 beyond the end; x points to the head.
template <typename T>
__device__ void load_polar(const Shape& s, const T* x, int64_t first, T* amplitude, T* phase) {
  const int t = static_cast<int>(threadIdx.x) % kTile;
  const int64_t n = first + t;
  for (int d = static_cast<int>(threadIdx.x) / kTile; d < s.depth; d += kRows) {
    psf::Polar<T> value{T(0), T(0)};
    if (n < s.frequencies) {
      const T* at = x + (d * s.frequencies + n) * 2;
      value = is_real(s, n) ? psf::polar_real(at[0]) : psf::polar(at[0], at[1]);
    }
    amplitude[d * kRow<T> + t] = value.amplitude;
    phase[d * kRow<T> + t] = value.phase;
  }
}

// Both [depth, depth] matrices into shared memory.
template <typename T>
__device__ void load_matrices(const Shape& s, const T* matrices, T* shared) {
  for (int i = static_cast<int>(threadIdx.x); i < 2 * s.depth * s.depth; i += kThreads) shared[i] = matrices[i];
}

// Σ_j matrix[i, j] x[j, t], or of its transpose.
template <typename T>
__device__ T mix(const Shape& s, const T* matrix, bool transposed, const T* x, int i, int t) {
  T sum = T(0);
  for (int j = 0; j < s.depth; ++j) sum += matrix[transposed ? j * s.depth + i : i * s.depth + j] * x[j * kRow<T> + t];
  return sum;
}

// Sums of x[i, t] y[j, t] over tiles, for both Gram matrices; kCount: entries of a thread, or tiles of a warp.
template <typename T, int kCount>
struct Gram {
  T sums[kCount] = {};

  // How many results a block stores.
  static __host__ __device__ int groups(int) { return 1; }
  static int count(int depth) { return (2 * depth * depth + kThreads - 1) / kThreads; }

  __device__ void add(const Shape& s, const T* x_amplitude, const T* y_amplitude, const T* x_phase, const T* y_phase) {
    const int square = s.depth * s.depth;
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      const int entry = static_cast<int>(threadIdx.x) + e * kThreads;
      if (entry >= 2 * square) break;
      const int i = entry % square / s.depth, j = entry % square % s.depth;
      const T* x = (entry < square ? x_amplitude : x_phase) + i * kRow<T>;
      const T* y = (entry < square ? y_amplitude : y_phase) + j * kRow<T>;
      T sum = T(0);
      for (int t = 0; t < kTile; ++t) sum += x[t] * y[t];
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

template <int kCount>
struct Gram<float, kCount> {
  psf::Sum<true> sums[kCount];

  // 16 x 8 tiles of both matrices. Where there are fewer than warps, groups of warps share the eights of a tile of
  // frequencies and store a result each.
  static __host__ __device__ int tiles(int depth) { return 2 * ((depth + 15) / 16) * ((depth + 7) / 8); }
  static __host__ __device__ int groups(int depth) { return tiles(depth) < kWarps ? kWarps / tiles(depth) : 1; }
  static int count(int depth) { return (tiles(depth) + kWarps - 1) / kWarps; }

  // body(n-th tile of this warp, matrix, first row, first column)
  template <class Body>
  static __device__ void for_tiles(const Shape& s, Body body) {
    const int all = tiles(s.depth), columns = (s.depth + 7) / 8;
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      const int tile = static_cast<int>(threadIdx.x) / 32 % all + n * kWarps;
      if (tile >= all) break;
      body(n, tile / (all / 2), tile % (all / 2) / columns * 16, tile % columns * 8);
    }
  }

  __device__ void add(const Shape& s, const float* x_amplitude, const float* y_amplitude, const float* x_phase,
                      const float* y_phase) {
    const int lane = threadIdx.x % 32, group = static_cast<int>(threadIdx.x) / 32 / tiles(s.depth);
    for_tiles(s, [&](int n, int matrix, int row, int column) {
      // Rows and columns beyond the head's channels only reach results that are not stored.
      const auto line = [&](const float* array, int i) { return array + min(i, s.depth - 1) * kRow<float> + lane % 4; };
      const float* const upper = line(matrix == 0 ? x_amplitude : x_phase, row + lane / 4);
      const float* const lower = line(matrix == 0 ? x_amplitude : x_phase, row + lane / 4 + 8);
      const float* const right = line(matrix == 0 ? y_amplitude : y_phase, column + lane / 4);
      for (int t = 8 * group; t < kTile; t += 8 * groups(s.depth)) {
        const float a[4] = {upper[t], lower[t], upper[t + 4], lower[t + 4]}, b[2] = {right[t], right[t + 4]};
        sums[n].add(psf::Operand<true>(a), psf::Terms<2>(b));
        sums[n].close();
      }
    });
  }

  __device__ void store(const Shape& s, float* partial) const {
    const int lane = threadIdx.x % 32, group = static_cast<int>(threadIdx.x) / 32 / tiles(s.depth);
    partial += (static_cast<int64_t>(blockIdx.x) * groups(s.depth) + group) * 2 * s.depth * s.depth;
    for_tiles(s, [&](int n, int matrix, int row, int column) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = row + lane / 4 + e / 2 * 8, j = column + lane % 4 * 2 + e % 2;
        if (i < s.depth && j < s.depth) partial[(matrix * s.depth + i) * s.depth + j] = sums[n][e];
      }
    });
  }
};

// Writes the gradient of one value of a spectrum in its place; 1 / weight is what the adjoint of rfft2 asks of the
// inverse transform.
template <typename T>
__device__ void store_gradient(const Shape& s, T* at, int64_t n, T amplitude, T grad_amplitude, T grad_phase) {
  const T re = at[0], im = at[1];
  psf::Complex<T> gradient{T(0), T(0)};
  if (!is_real(s, n))
    gradient = psf::polar_gradient(re, im, amplitude, grad_amplitude, grad_phase);
  else if (amplitude > T(0))
    gradient.re = re < T(0) ? -grad_amplitude : grad_amplitude;
  const T inverse_weight = T(1) / column_weight<T>(s, n);
  at[0] = gradient.re * inverse_weight;
  at[1] = gradient.im * inverse_weight;
}

template <typename T, int kCount>
__global__ void __launch_bounds__(kThreads) gram_kernel(Shape s, const T* q, const T* k, T* out) {
  PSF_DYNAMIC_SHARED(T, shared);
  const int64_t head = blockIdx.x / s.runs, run = blockIdx.x % s.runs;
  const int64_t offset = head * s.depth * s.frequencies * 2;
  T* const q_amplitude = shared;
  T* const q_phase = q_amplitude + s.depth * kRow<T>;
  T* const k_amplitude = q_phase + s.depth * kRow<T>;
  T* const k_phase = k_amplitude + s.depth * kRow<T>;
  Gram<T, kCount> sums;
  for (int64_t first = run * kRun; first < (run + 1) * kRun && first < s.frequencies; first += kTile) {
    load_polar(s, q + offset, first, q_amplitude, q_phase);
    load_polar(s, k + offset, first, k_amplitude, k_phase);
    __syncthreads();
    sums.add(s, q_amplitude, k_amplitude, q_phase, k_phase);
    __syncthreads();
  }
  sums.store(s, out);
}

// out [heads, entries] = the sum over runs of partial [heads, runs, entries].
template <typename T>
__global__ void reduce_kernel(const T* partial, int64_t total, int64_t entries, int64_t runs, double* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= total) return;
  double sum = 0;
  for (int64_t run = 0; run < runs; ++run) sum += partial[(i / entries * runs + run) * entries + i % entries];
  out[i] = sum;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) apply_kernel(Shape s, T* v, const T* attention) {
  PSF_DYNAMIC_SHARED(T, shared);
  const int64_t tiles = (s.frequencies + kTile - 1) / kTile;
  const int64_t head = blockIdx.x / tiles, first = blockIdx.x % tiles * kTile;
  v += head * s.depth * s.frequencies * 2;
  T* const amplitude = shared;
  T* const phase = amplitude + s.depth * kRow<T>;
  T* const matrices = phase + s.depth * kRow<T>;
  load_matrices(s, attention + head * 2 * s.depth * s.depth, matrices);
  load_polar(s, v, first, amplitude, phase);
  __syncthreads();
  const int t = static_cast<int>(threadIdx.x) % kTile;
  const int64_t n = first + t;
  if (n >= s.frequencies) return;
  for (int i = static_cast<int>(threadIdx.x) / kTile; i < s.depth; i += kRows) {
    const T a = mix(s, matrices, false, amplitude, i, t);
    const psf::Complex<T> direction = psf::unit(mix(s, matrices + s.depth * s.depth, false, phase, i, t));
    T* at = v + (i * s.frequencies + n) * 2;
    at[0] = a * direction.re;
    at[1] = a * direction.im;
  }
}

template <typename T, int kCount>
__global__ void __launch_bounds__(kThreads)
    apply_backward_kernel(Shape s, T* v, const T* grad, const T* attention, T* out) {
  PSF_DYNAMIC_SHARED(T, shared);
  const int64_t head = blockIdx.x / s.runs, run = blockIdx.x % s.runs;
  v += head * s.depth * s.frequencies * 2;
  grad += head * s.depth * s.frequencies * 2;
  T* const amplitude = shared;
  T* const phase = amplitude + s.depth * kRow<T>;
  T* const grad_mixed = phase + s.depth * kRow<T>;
  T* const grad_turned = grad_mixed + s.depth * kRow<T>;
  T* const matrices = grad_turned + s.depth * kRow<T>;
  T* const for_phases = matrices + s.depth * s.depth;
  load_matrices(s, attention + head * 2 * s.depth * s.depth, matrices);
  const int t = static_cast<int>(threadIdx.x) % kTile;
  Gram<T, kCount> sums;
  for (int64_t first = run * kRun; first < (run + 1) * kRun && first < s.frequencies; first += kTile) {
    const int64_t n = first + t;
    load_polar(s, v, first, amplitude, phase);
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x) / kTile; i < s.depth; i += kRows) {
      T along = T(0), across = T(0);
      if (n < s.frequencies) {
        const T* at = grad + (i * s.frequencies + n) * 2;
        const T weight = column_weight<T>(s, n), re = at[0] * weight, im = at[1] * weight;
        const psf::Complex<T> direction = psf::unit(mix(s, for_phases, false, phase, i, t));
        along = re * direction.re + im * direction.im;
        across = mix(s, matrices, false, amplitude, i, t) * (im * direction.re - re * direction.im);
      }
      grad_mixed[i * kRow<T> + t] = along;
      grad_turned[i * kRow<T> + t] = across;
    }
    __syncthreads();
    sums.add(s, grad_mixed, amplitude, grad_turned, phase);
    for (int i = static_cast<int>(threadIdx.x) / kTile; i < s.depth && n < s.frequencies; i += kRows)
      store_gradient(s, v + (i * s.frequencies + n) * 2, n, amplitude[i * kRow<T> + t],
                     mix(s, matrices, true, grad_mixed, i, t), mix(s, for_phases, true, grad_turned, i, t));
    __syncthreads();
  }
  sums.store(s, out);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) gram_backward_kernel(Shape s, T* q, T* k, const T* grad) {
  PSF_DYNAMIC_SHARED(T, shared);
  const int64_t tiles = (s.frequencies + kTile - 1) / kTile;
  const int64_t head = blockIdx.x / tiles, first = blockIdx.x % tiles * kTile;
  q += head * s.depth * s.frequencies * 2;
  k += head * s.depth * s.frequencies * 2;
  T* const q_amplitude = shared;
  T* const q_phase = q_amplitude + s.depth * kRow<T>;
  T* const k_amplitude = q_phase + s.depth * kRow<T>;
  T* const k_phase = k_amplitude + s.depth * kRow<T>;
  T* const matrices = k_phase + s.depth * kRow<T>;
  T* const for_phases = matrices + s.depth * s.depth;
  load_matrices(s, grad + head * 2 * s.depth * s.depth, matrices);
  load_polar(s, q, first, q_amplitude, q_phase);
  load_polar(s, k, first, k_amplitude, k_phase);
  __syncthreads();
  const int t = static_cast<int>(threadIdx.x) % kTile;
  const int64_t n = first + t;
  if (n >= s.frequencies) return;
  for (int i = static_cast<int>(threadIdx.x) / kTile; i < s.depth; i += kRows) {
    const int64_t at = (i * s.frequencies + n) * 2;
    store_gradient(s, q + at, n, q_amplitude[i * kRow<T> + t], mix(s, matrices, false, k_amplitude, i, t),
                   mix(s, for_phases, false, k_phase, i, t));
    store_gradient(s, k + at, n, k_amplitude[i * kRow<T> + t], mix(s, matrices, true, q_amplitude, i, t),
                   mix(s, for_phases, true, q_phase, i, t));
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

// body with the kCount of Gram.
template <typename T, typename Body>
void dispatch_gram(int depth, Body body) {
  const int count = Gram<T, 1>::count(depth);
  if (count <= 1)
    body(std::integral_constant<int, 1>());
  else if (count <= 2)
    body(std::integral_constant<int, 2>());
  else if (count <= 8 || sizeof(T) == 4)
    body(std::integral_constant<int, 8>());
  else if constexpr (sizeof(T) == 8)
    body(std::integral_constant<int, 32>());
}

Shape shape_of(const Tensor& x, int64_t num_heads, int64_t width) {
  Shape s{};
  s.depth = static_cast<int>(x.size(1) / num_heads);
  s.height = static_cast<int>(x.size(2));
  s.width = static_cast<int>(width);
  s.columns = static_cast<int>(x.size(3));
  s.frequencies = x.size(2) * x.size(3);
  s.runs = (s.frequencies + kRun - 1) / kRun;
  psf::check_spectrum(x, width);
  STD_TORCH_CHECK(s.depth <= kMaxDepth, "spectrum: expected at most ", kMaxDepth, " channels a head, got ", s.depth);
  return s;
}

unsigned blocks(int64_t count) { return static_cast<unsigned>(count); }

template <typename T>
size_t shared_bytes(const Shape& s, int rows, int matrices) {
  return (static_cast<size_t>(rows) * kRow<T> + static_cast<size_t>(matrices) * s.depth) * s.depth * sizeof(T);
}

// How many partial sums a head has.
template <typename T>
int64_t parts(const Shape& s) {
  return s.runs * Gram<T, 1>::groups(s.depth);
}

template <typename T>
Tensor partial_sums(const Tensor& x, const Shape& s, int64_t heads) {
  return torch::stable::new_empty(x, {heads, parts<T>(s), 2, s.depth, s.depth});
}

template <typename T>
Tensor reduce(const psf::Launch& launch, const Tensor& partial, const Shape& s, int64_t batch, int64_t num_heads) {
  Tensor out = torch::stable::new_empty(partial, {batch, num_heads, 2, s.depth, s.depth},
                                        std::make_optional(ScalarType::Double));
  const int64_t entries = 2 * s.depth * s.depth, total = batch * num_heads * entries;
  launch(reduce_kernel<T>, blocks((total + kThreads - 1) / kThreads), kThreads, 0, psf::data<const T>(partial), total,
         entries, parts<T>(s), psf::data<double>(out));
  return out;
}

Tensor gram(const Tensor& q, const Tensor& k, int64_t num_heads, int64_t width) {
  const Shape s = shape_of(q, num_heads, width);
  const int64_t heads = q.size(0) * num_heads;
  const psf::Launch launch(q);
  Tensor out;
  psf::dispatch_spectrum(q, [&](auto zero) {
    using T = decltype(zero);
    const Tensor partial = partial_sums<T>(q, s, heads);
    dispatch_gram<T>(s.depth, [&](auto count) {
      launch(gram_kernel<T, count()>, blocks(heads * s.runs), kThreads, shared_bytes<T>(s, 4, 0), s,
             psf::data<const T>(q), psf::data<const T>(k), psf::data<T>(partial));
    });
    out = reduce<T>(launch, partial, s, q.size(0), num_heads);
  });
  return out;
}

void gram_backward(Tensor q, Tensor k, const Tensor& grad, int64_t num_heads, int64_t width) {
  const Shape s = shape_of(q, num_heads, width);
  const int64_t tiles = (s.frequencies + kTile - 1) / kTile;
  const psf::Launch launch(q);
  psf::dispatch_spectrum(q, [&](auto zero) {
    using T = decltype(zero);
    launch(gram_backward_kernel<T>, blocks(q.size(0) * num_heads * tiles), kThreads, shared_bytes<T>(s, 4, 2), s,
           psf::data<T>(q), psf::data<T>(k), psf::data<const T>(grad));
  });
}

void apply(Tensor v, const Tensor& attention, int64_t num_heads, int64_t width) {
  const Shape s = shape_of(v, num_heads, width);
  const int64_t tiles = (s.frequencies + kTile - 1) / kTile;
  const psf::Launch launch(v);
  psf::dispatch_spectrum(v, [&](auto zero) {
    using T = decltype(zero);
    launch(apply_kernel<T>, blocks(v.size(0) * num_heads * tiles), kThreads, shared_bytes<T>(s, 2, 2), s,
           psf::data<T>(v), psf::data<const T>(attention));
  });
}

Tensor apply_backward(Tensor v, const Tensor& grad, const Tensor& attention, int64_t num_heads, int64_t width) {
  const Shape s = shape_of(v, num_heads, width);
  const int64_t heads = v.size(0) * num_heads;
  const psf::Launch launch(v);
  Tensor out;
  psf::dispatch_spectrum(v, [&](auto zero) {
    using T = decltype(zero);
    const Tensor partial = partial_sums<T>(v, s, heads);
    dispatch_gram<T>(s.depth, [&](auto count) {
      launch(apply_backward_kernel<T, count()>, blocks(heads * s.runs), kThreads, shared_bytes<T>(s, 4, 2), s,
             psf::data<T>(v), psf::data<const T>(grad), psf::data<const T>(attention), psf::data<T>(partial));
    });
    out = reduce<T>(launch, partial, s, v.size(0), num_heads);
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

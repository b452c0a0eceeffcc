// Wavelet transforms: one level over rows and columns at once; pansharp_fast/reference/wavelet.py states the equations.
//
// General filters: a block owns a tile of the result. Analysis filters every input row that the tile needs along W into
// shared memory (two lines, low and high pass), then along H; synthesis first along W, then along H, the other way.
// Border samples follow csrc/math/wavelet.h; blocks away from the border take none of those branches.
// A dilated (stationary) transform is an undilated one of each of dilation^2 interleaved images.
//
// Haar: threads read squares of 2 x 2 (vectors of them) and write four bands, or the reverse; no shared memory.
//
// Bytes: every kernel reads its input once from memory (overlaps from the caches) and writes its output once.
#include "cuda/runtime.cuh"
#include "math/wavelet.h"

#ifdef PSF_SIMT
#define PSF_NOINLINE
#else
#define PSF_NOINLINE __noinline__
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using namespace psf::wavelet;

constexpr int kMostTaps = 104;  // of all filters of PyWavelets; four filters in float64 still fit a kernel's parameters
constexpr int kThreads = 256;

template <class A>
struct Taps {
  A y[2][kMostTaps], x[2][kMostTaps];  // low, high
};

struct Axis {
  int64_t mode, size, count;  // samples and coefficients (of one interleaved image)
  int taps, step, offset;
};

struct Shape {
  Axis y, x;
  int64_t dilation;
  int tile_y, tile_x;        // of the result
  int64_t tiles_y, tiles_x;  // that many tiles
  int lines;                 // rows of the intermediate tile
  int64_t plane[4], row[4];  // strides of the input: x, or the four bands
};

// What a block works on: its plane, its interleaved image and its tile.
struct Place {
  int64_t plane, phase_y, phase_x, y0, x0;
};

__device__ inline Place place_of(int64_t block, const Shape& s) {
  Place p;
  p.x0 = block % s.tiles_x * s.tile_x;
  block /= s.tiles_x;
  p.y0 = block % s.tiles_y * s.tile_y;
  block /= s.tiles_y;
  p.phase_x = block % s.dilation;
  block /= s.dilation;
  p.phase_y = block % s.dilation;
  p.plane = block / s.dilation;
  return p;
}

// sum_k f[k] e[position - k] of one row, low and high pass.
template <int kTaps, class T, class A>
__device__ inline void filter_row(const T* row, int64_t stride, int64_t position, const Axis& axis, const A* f,
                                  const A* g, A& low, A& high) {
  const int taps = kTaps > 0 ? kTaps : axis.taps;
  low = high = A(0);
  if (position - taps + 1 >= 0 && position < axis.size) {
    const T* last = row + position * stride;
#pragma unroll(kTaps > 0 ? kTaps : 4)
    for (int k = 0; k < taps; ++k) {
      const A value = static_cast<A>(last[-k * stride]);
      low += f[k] * value;
      high += g[k] * value;
    }
    return;
  }
  for (int k = 0; k < taps; ++k) {
    const Extension e = extension(axis.mode, position - k, axis.size);
    A value = A(0);
#pragma unroll
    for (int t = 0; t < 3; ++t)
      if (t < e.count) value += static_cast<A>(e.weight[t]) * static_cast<A>(row[e.index[t] * stride]);
    low += f[k] * value;
    high += g[k] * value;
  }
}

template <class T, class A, int kTaps>
__global__ void __launch_bounds__(kThreads)
    analysis_kernel(const T* x, T* y, const __grid_constant__ Shape s, const __grid_constant__ Taps<A> f) {
  PSF_DYNAMIC_SHARED(A, lines);  // low, then high: [2][s.lines][s.tile_x]
  const int taps = kTaps > 0 ? kTaps : s.y.taps;
  const Place p = place_of(blockIdx.x, s);
  const T* image = x + p.plane * s.plane[0] + p.phase_y * s.row[0] + p.phase_x;
  const int64_t first = s.y.step * p.y0 + s.y.offset - (taps - 1);  // extended row of line 0
  A* high_lines = lines + s.lines * s.tile_x;

  for (int t = threadIdx.x; t < s.lines * s.tile_x; t += kThreads) {
    const int64_t j = p.x0 + t % s.tile_x;
    A low = A(0), high = A(0);
    if (j < s.x.count) {
      const Extension e = extension(s.y.mode, first + t / s.tile_x, s.y.size);
#pragma unroll 1
      for (int a = 0; a < e.count; ++a) {
        A l, h;
        const int64_t index = a == 0 ? e.index[0] : a == 1 ? e.index[1] : e.index[2];
        const int64_t weight = a == 0 ? e.weight[0] : a == 1 ? e.weight[1] : e.weight[2];
        filter_row<kTaps>(image + index * s.dilation * s.row[0], s.dilation, s.x.step * j + s.x.offset, s.x, f.x[0],
                          f.x[1], l, h);
        low += static_cast<A>(weight) * l;
        high += static_cast<A>(weight) * h;
      }
    }
    lines[t] = low;
    high_lines[t] = high;
  }
  __syncthreads();

  const int64_t width = s.x.count * s.dilation, band = s.y.count * s.dilation * width;
  for (int t = threadIdx.x; t < s.tile_y * s.tile_x; t += kThreads) {
    const int64_t i = p.y0 + t / s.tile_x, j = p.x0 + t % s.tile_x;
    if (i >= s.y.count || j >= s.x.count) continue;
    A sums[4] = {A(0), A(0), A(0), A(0)};
    const int at = (s.y.step * (t / s.tile_x) + taps - 1) * s.tile_x + t % s.tile_x;
#pragma unroll(kTaps > 0 ? kTaps : 4)
    for (int k = 0; k < taps; ++k) {
      const A low = lines[at - k * s.tile_x], high = high_lines[at - k * s.tile_x];
      sums[0] += f.y[0][k] * low;
      sums[1] += f.y[1][k] * low;
      sums[2] += f.y[0][k] * high;
      sums[3] += f.y[1][k] * high;
    }
    T* out = y + p.plane * 4 * band + (i * s.dilation + p.phase_y) * width + j * s.dilation + p.phase_x;
    for (int b = 0; b < 4; ++b) out[b * band] = static_cast<T>(sums[b]);
  }
}

// Calls use(position, weight) for every extended position that takes sample n, the sample itself first. One loop and
// one call of `use`, so that it is compiled once.
template <class Use>
__device__ inline void for_positions(const Axis& axis, int64_t n, Use use) {
  const int64_t begin = axis.offset - (axis.taps - 1), end = axis.step * (axis.count - 1) + axis.offset + 1;
  const int64_t before = begin < 0 ? -begin : 0, after = end > axis.size ? end - axis.size : 0;
  const int64_t reach = before > after ? before : after;
  const bool inner = axis.mode == kZero || (n > reach && n < axis.size - 1 - reach);
  const int64_t last = inner ? 0 : before + after;
#pragma unroll 1
  for (int64_t b = -1; b < last; ++b) {
    int64_t position = n, weight = 1;
    if (b >= 0) {
      position = b < before ? b - before : axis.size + b - before;
      const Extension e = extension(axis.mode, position, axis.size);
      weight = 0;  // no two terms of a border sample are the same sample, but those of antireflect on two samples
#pragma unroll
      for (int t = 0; t < 3; ++t) weight += t < e.count && e.index[t] == n ? e.weight[t] : 0;
      if (weight == 0) continue;
    }
    use(position, weight);
  }
}

// Calls use(coefficient, k) for every coefficient that tap k of the filters joins to an extended position.
template <int kTaps, class Use>
__device__ inline void for_coefficients(const Axis& axis, int64_t position, Use use) {
  const int taps = kTaps > 0 ? kTaps : axis.taps;
  const int64_t from = position - axis.offset;
  if (axis.step == 1) {
    for (int k = 0; k < taps; ++k)
      if (from + k >= 0 && from + k < axis.count) use(from + k, k);
    return;
  }
  const int odd = static_cast<int>(from & 1);
#pragma unroll(kTaps > 0 ? kTaps / 2 : 4)
  for (int m = 0; m < taps / 2; ++m) {
    const int k = 2 * m + odd;
    const int64_t i = (from + k) / 2;  // even and, where it counts, not negative
    if (from + k >= 0 && i < axis.count) use(i, k);
  }
}

template <class T>
struct Bands {
  const T* band[4];
};

// Column c of coefficient row i after synthesis along W: low and high pass along H.
template <int kTaps, class T, class A>
__device__ inline void join_row(const T* const* rows, int64_t stride, const Axis& axis, const Taps<A>& f, int64_t c,
                                A& low, A& high) {
  low = high = A(0);
  for_positions(axis, c, [&](int64_t position, int64_t weight) {
    A l = A(0), h = A(0);
    for_coefficients<kTaps>(axis, position, [&](int64_t j, int k) {
      l += f.x[0][k] * static_cast<A>(rows[0][j * stride]) + f.x[1][k] * static_cast<A>(rows[2][j * stride]);
      h += f.x[0][k] * static_cast<A>(rows[1][j * stride]) + f.x[1][k] * static_cast<A>(rows[3][j * stride]);
    });
    low += static_cast<A>(weight) * l;
    high += static_cast<A>(weight) * h;
  });
}

// join_row for a row outside the block's tile: only borders that wrap around need one.
template <class T, class A>
PSF_NOINLINE __device__ void far_row(const T* const* rows, int64_t stride, const Axis& axis, const Taps<A>& f,
                                     int64_t c, A& low, A& high) {
  join_row<0>(rows, stride, axis, f, c, low, high);
}

template <class T, class A, int kTaps>
__global__ void __launch_bounds__(kThreads)
    synthesis_kernel(Bands<T> bands, T* x, const __grid_constant__ Shape s, const __grid_constant__ Taps<A> f) {
  PSF_DYNAMIC_SHARED(A, lines);  // low, then high: [2][s.lines][s.tile_x]
  const Place p = place_of(blockIdx.x, s);
  A* high_lines = lines + s.lines * s.tile_x;
  const auto rows_of = [&](int64_t i, const T** rows) {
    for (int b = 0; b < 4; ++b)
      rows[b] = bands.band[b] + p.plane * s.plane[b] + (i * s.dilation + p.phase_y) * s.row[b] + p.phase_x;
  };
  const int64_t from = p.y0 - s.y.offset;
  const int64_t first = s.y.step == 1 ? from : (from - (from & 1)) / 2;  // coefficient row of line 0

  for (int t = threadIdx.x; t < s.lines * s.tile_x; t += kThreads) {
    const int64_t i = first + t / s.tile_x, c = p.x0 + t % s.tile_x;
    A low = A(0), high = A(0);
    if (i >= 0 && i < s.y.count && c < s.x.size) {
      const T* rows[4];
      rows_of(i, rows);
      join_row<kTaps>(rows, s.dilation, s.x, f, c, low, high);
    }
    lines[t] = low;
    high_lines[t] = high;
  }
  __syncthreads();

  const int64_t width = s.x.size * s.dilation;
  for (int t = threadIdx.x; t < s.tile_y * s.tile_x; t += kThreads) {
    const int64_t r = p.y0 + t / s.tile_x, c = p.x0 + t % s.tile_x;
    if (r >= s.y.size || c >= s.x.size) continue;
    A sum = A(0);
    for_positions(s.y, r, [&](int64_t position, int64_t weight) {
      A part = A(0);
      for_coefficients<kTaps>(s.y, position, [&](int64_t i, int k) {
        A low, high;
        if (i >= first && i < first + s.lines) {
          low = lines[(i - first) * s.tile_x + t % s.tile_x];
          high = high_lines[(i - first) * s.tile_x + t % s.tile_x];
        } else {
          const T* rows[4];
          rows_of(i, rows);
          far_row(rows, s.dilation, s.x, f, c, low, high);
        }
        part += f.y[0][k] * low + f.y[1][k] * high;
      });
      sum += static_cast<A>(weight) * part;
    });
    x[(p.plane * s.y.size * s.dilation + r * s.dilation + p.phase_y) * width + c * s.dilation + p.phase_x] =
        static_cast<T>(sum);
  }
}

// ---- Two taps, no border: images of even size, or stationary -------------------------------------------------------

template <class A>
struct TwoTaps {
  A y[2][2], x[2][2];  // low, high
};

struct Even {
  int64_t squares, rows, count;  // squares of 2 x 2 in all, bands of rows x count
  int64_t plane[4], row[4];
};

template <class T, int kSize>
struct alignas(sizeof(T) * kSize) Pack {
  T value[kSize];
};

// One thread: kSquares adjacent squares.
template <class T, class A, int kSquares>
__global__ void __launch_bounds__(kThreads) two_taps_analysis_kernel(const T* x, T* y, Even s, TwoTaps<A> f) {
  const int64_t square = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kSquares;
  if (square >= s.squares) return;
  const int64_t j = square % s.count, i = square / s.count % s.rows, n = square / s.count / s.rows;
  const T* source = x + n * s.plane[0] + 2 * i * s.row[0] + 2 * j;
  const auto top = *reinterpret_cast<const Pack<T, 2 * kSquares>*>(source);
  const auto bottom = *reinterpret_cast<const Pack<T, 2 * kSquares>*>(source + s.row[0]);
  Pack<T, kSquares> out[4];
#pragma unroll
  for (int q = 0; q < kSquares; ++q) {
    A line[2][2];  // low and high along H; left, right
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const A a = static_cast<A>(top.value[2 * q + c]), b = static_cast<A>(bottom.value[2 * q + c]);
      line[0][c] = f.y[0][0] * b + f.y[0][1] * a;
      line[1][c] = f.y[1][0] * b + f.y[1][1] * a;
    }
#pragma unroll
    for (int b = 0; b < 4; ++b)
      out[b].value[q] = static_cast<T>(f.x[b / 2][0] * line[b % 2][1] + f.x[b / 2][1] * line[b % 2][0]);
  }
  const int64_t band = s.rows * s.count;
  T* target = y + n * 4 * band + i * s.count + j;
#pragma unroll
  for (int b = 0; b < 4; ++b) *reinterpret_cast<Pack<T, kSquares>*>(target + b * band) = out[b];
}

template <class T, class A, int kSquares>
__global__ void __launch_bounds__(kThreads) two_taps_synthesis_kernel(Bands<T> bands, T* x, Even s, TwoTaps<A> f) {
  const int64_t square = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kSquares;
  if (square >= s.squares) return;
  const int64_t j = square % s.count, i = square / s.count % s.rows, n = square / s.count / s.rows;
  Pack<T, kSquares> in[4];
#pragma unroll
  for (int b = 0; b < 4; ++b)
    in[b] = *reinterpret_cast<const Pack<T, kSquares>*>(bands.band[b] + n * s.plane[b] + i * s.row[b] + j);
  Pack<T, 2 * kSquares> out[2];
#pragma unroll
  for (int q = 0; q < kSquares; ++q) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {  // tap 1 - c of the filters along W
      const A low = f.x[0][1 - c] * static_cast<A>(in[0].value[q]) + f.x[1][1 - c] * static_cast<A>(in[2].value[q]);
      const A high = f.x[0][1 - c] * static_cast<A>(in[1].value[q]) + f.x[1][1 - c] * static_cast<A>(in[3].value[q]);
#pragma unroll
      for (int r = 0; r < 2; ++r) out[r].value[2 * q + c] = static_cast<T>(f.y[0][1 - r] * low + f.y[1][1 - r] * high);
    }
  }
  T* target = x + (n * 2 * s.rows + 2 * i) * 2 * s.count + 2 * j;
  *reinterpret_cast<Pack<T, 2 * kSquares>*>(target) = out[0];
  *reinterpret_cast<Pack<T, 2 * kSquares>*>(target + 2 * s.count) = out[1];
}

struct Stationary {
  int64_t pixels, height, width, dilation;
  int64_t plane[4], row[4];
};

// y[i] = f[0] x[i + d] + f[1] x[i], around the image.
template <class T, class A>
__global__ void __launch_bounds__(kThreads) stationary_analysis_kernel(const T* x, T* y, Stationary s, TwoTaps<A> f) {
  const int64_t pixel = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (pixel >= s.pixels) return;
  const int64_t j = pixel % s.width, i = pixel / s.width % s.height, n = pixel / s.width / s.height;
  const int64_t columns[2] = {j, (j + s.dilation) % s.width}, rows[2] = {i, (i + s.dilation) % s.height};
  A line[2][2];
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const T* column = x + n * s.plane[0] + columns[c];
    const A a = static_cast<A>(column[rows[0] * s.row[0]]), b = static_cast<A>(column[rows[1] * s.row[0]]);
    line[0][c] = f.y[0][0] * b + f.y[0][1] * a;
    line[1][c] = f.y[1][0] * b + f.y[1][1] * a;
  }
  const int64_t band = s.height * s.width;
  T* target = y + n * 4 * band + i * s.width + j;
#pragma unroll
  for (int b = 0; b < 4; ++b)
    target[b * band] = static_cast<T>(f.x[b / 2][0] * line[b % 2][1] + f.x[b / 2][1] * line[b % 2][0]);
}

// x[r] = f[0] y[r - d] + f[1] y[r].
template <class T, class A>
__global__ void __launch_bounds__(kThreads)
    stationary_synthesis_kernel(Bands<T> bands, T* x, Stationary s, TwoTaps<A> f) {
  const int64_t pixel = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (pixel >= s.pixels) return;
  const int64_t c = pixel % s.width, r = pixel / s.width % s.height, n = pixel / s.width / s.height;
  const int64_t dx = s.dilation % s.width, dy = s.dilation % s.height;
  const int64_t columns[2] = {c >= dx ? c - dx : c - dx + s.width, c},
                rows[2] = {r >= dy ? r - dy : r - dy + s.height, r};
  A sum = A(0);
#pragma unroll
  for (int b = 0; b < 4; ++b)
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const T* row = bands.band[b] + n * s.plane[b] + rows[k] * s.row[b];
      sum += f.y[b % 2][k] *
             (f.x[b / 2][0] * static_cast<A>(row[columns[0]]) + f.x[b / 2][1] * static_cast<A>(row[columns[1]]));
    }
  x[pixel] = static_cast<T>(sum);
}

// ---- Host side
// -------------------------------------------------------------------------------------------------------

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

Tensor with_adjacent_columns(const Tensor& x) {
  return x.stride(2) == 1 || x.size(2) <= 1 ? x : torch::stable::contiguous(x);
}

Axis axis_of(const std::vector<double>& taps, int64_t mode, int64_t n, int64_t dilation) {
  STD_TORCH_CHECK(!taps.empty() && taps.size() % 4 == 0 && taps.size() <= 2 * kMostTaps,
                  "taps: expected two filters of one even length up to ", kMostTaps, ", got ", taps.size(), " values");
  STD_TORCH_CHECK(n % dilation == 0, "size: expected a multiple of the dilation ", dilation, ", got ", n);
  const int64_t length = static_cast<int64_t>(taps.size()) / 2;
  const Geometry g = geometry(mode, n / dilation, length, 1);
  return {mode, n / dilation, g.count, static_cast<int>(length), static_cast<int>(g.step), static_cast<int>(g.offset)};
}

template <class A>
Taps<A> taps_of(const std::vector<double>& y, const std::vector<double>& x) {
  Taps<A> f{};
  for (size_t i = 0; i < y.size(); ++i) f.y[i >= y.size() / 2][i % (y.size() / 2)] = static_cast<A>(y[i]);
  for (size_t i = 0; i < x.size(); ++i) f.x[i >= x.size() / 2][i % (x.size() / 2)] = static_cast<A>(x[i]);
  return f;
}

template <class A>
TwoTaps<A> two_taps_of(const std::vector<double>& y, const std::vector<double>& x) {
  TwoTaps<A> f;
  for (int i = 0; i < 4; ++i) {
    f.y[i / 2][i % 2] = static_cast<A>(y[i]);
    f.x[i / 2][i % 2] = static_cast<A>(x[i]);
  }
  return f;
}

dim3 grid_of(int64_t blocks) {
  STD_TORCH_CHECK(blocks < int64_t{1} << 31, "x: expected fewer than 2^31 tiles, got ", blocks);
  return dim3(static_cast<unsigned>(blocks));
}

// Runs use.operator()<T, A>() for the dtype.
template <class Use>
void with_types(ScalarType type, Use use) {
  switch (type) {
    case ScalarType::Float:
      return use.template operator()<float, float>();
    case ScalarType::Double:
      return use.template operator()<double, double>();
    case ScalarType::BFloat16:
      return use.template operator()<torch::headeronly::BFloat16, float>();
    case ScalarType::Half:
      return use.template operator()<torch::headeronly::Half, float>();
    default:
      STD_TORCH_CHECK(false, "x: expected float32, float64, bfloat16 or float16");
  }
}

// Whether rows of packs of `size` elements may be read as such.
bool aligned(const Tensor& x, int64_t size) {
  const int64_t bytes = size * static_cast<int64_t>(x.element_size());
  return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % bytes == 0 && x.stride(0) % size == 0 &&
         x.stride(1) % size == 0;
}

Shape shape_of(const Axis& y, const Axis& x, int64_t dilation, int64_t result_y, int64_t result_x, bool synthesis) {
  const bool small = y.taps <= 20;
  Shape s{};
  s.y = y;
  s.x = x;
  s.dilation = dilation;
  s.tile_y = small ? 16 : 8;
  s.tile_x = small ? 32 : 16;
  s.tiles_y = divide_up(result_y, s.tile_y);
  s.tiles_x = divide_up(result_x, s.tile_x);
  s.lines = synthesis ? (s.tile_y + y.taps) / y.step + 1 : y.step * (s.tile_y - 1) + y.taps;
  return s;
}

Tensor wavelet_fwd(const Tensor& x, std::vector<double> taps_y, std::vector<double> taps_x, int64_t mode_y,
                   int64_t mode_x, int64_t dilation) {
  STD_TORCH_CHECK(x.dim() == 3, "x: expected [N, H, W], got ", x.dim(), " dimensions");
  const int64_t planes = x.size(0), height = x.size(1), width = x.size(2);
  const Axis ay = axis_of(taps_y, mode_y, height, dilation), ax = axis_of(taps_x, mode_x, width, dilation);
  const Tensor source = with_adjacent_columns(x);
  const int64_t rows = ay.count * dilation, count = ax.count * dilation;
  Tensor y = torch::stable::new_empty(x, {planes, 4, rows, count});
  if (y.numel() == 0) return y;
  psf::Launch launch(x);
  const bool two = ay.taps == 2 && ax.taps == 2;
  with_types(x.scalar_type(), [&]<class T, class A>() {
    const T* in = static_cast<const T*>(source.const_data_ptr());
    T* out = static_cast<T*>(y.mutable_data_ptr());
    if (two && ay.step == 1 && ax.step == 1) {
      const Stationary s{planes * height * width, height, width, dilation, {source.stride(0)}, {source.stride(1)}};
      return launch(stationary_analysis_kernel<T, A>, grid_of(divide_up(s.pixels, kThreads)), kThreads, 0, in, out, s,
                    two_taps_of<A>(taps_y, taps_x));
    }
    if (two && height == 2 * rows && width == 2 * count) {
      const Even s{planes * rows * count, rows, count, {source.stride(0)}, {source.stride(1)}};
      constexpr int kPack = 8 / sizeof(T);
      const auto f = two_taps_of<A>(taps_y, taps_x);
      if (count % kPack == 0 && aligned(source, 2 * kPack))
        return launch(two_taps_analysis_kernel<T, A, kPack>, grid_of(divide_up(s.squares, kThreads * kPack)), kThreads,
                      0, in, out, s, f);
      if (aligned(source, 2))
        return launch(two_taps_analysis_kernel<T, A, 1>, grid_of(divide_up(s.squares, kThreads)), kThreads, 0, in, out,
                      s, f);
    }
    Shape s = shape_of(ay, ax, dilation, ay.count, ax.count, false);
    s.plane[0] = source.stride(0);
    s.row[0] = source.stride(1);
    const int64_t blocks = planes * dilation * dilation * s.tiles_y * s.tiles_x;
    const size_t shared = 2 * static_cast<size_t>(s.lines) * s.tile_x * sizeof(A);
    const auto f = taps_of<A>(taps_y, taps_x);
    if (ay.taps == 4 && ax.taps == 4)
      return launch(analysis_kernel<T, A, 4>, grid_of(blocks), kThreads, shared, in, out, s, f);
    if (ay.taps == 8 && ax.taps == 8)
      return launch(analysis_kernel<T, A, 8>, grid_of(blocks), kThreads, shared, in, out, s, f);
    launch(analysis_kernel<T, A, 0>, grid_of(blocks), kThreads, shared, in, out, s, f);
  });
  return y;
}

Tensor wavelet_bwd(const Tensor& a, const Tensor& h, const Tensor& v, const Tensor& d, std::vector<double> taps_y,
                   std::vector<double> taps_x, int64_t mode_y, int64_t mode_x, int64_t dilation, int64_t height,
                   int64_t width) {
  const Axis ay = axis_of(taps_y, mode_y, height, dilation), ax = axis_of(taps_x, mode_x, width, dilation);
  const int64_t planes = a.size(0), rows = ay.count * dilation, count = ax.count * dilation;
  std::vector<Tensor> sources;
  for (const Tensor* band : {&a, &h, &v, &d}) {
    STD_TORCH_CHECK(band->dim() == 3 && band->size(0) == planes && band->size(1) == rows && band->size(2) == count &&
                        band->scalar_type() == a.scalar_type(),
                    "bands: expected four of [", planes, ", ", rows, ", ", count, "] and one dtype");
    sources.push_back(with_adjacent_columns(*band));
  }
  Tensor x = torch::stable::new_empty(a, {planes, height, width});
  if (x.numel() == 0) return x;
  psf::Launch launch(a);
  const bool two = ay.taps == 2 && ax.taps == 2;
  with_types(a.scalar_type(), [&]<class T, class A>() {
    T* out = static_cast<T*>(x.mutable_data_ptr());
    Bands<T> bands;
    for (int b = 0; b < 4; ++b) bands.band[b] = static_cast<const T*>(sources[b].const_data_ptr());
    const auto strides = [&](auto& s) {
      for (int b = 0; b < 4; ++b) {
        s.plane[b] = sources[b].stride(0);
        s.row[b] = sources[b].stride(1);
      }
    };
    if (two && ay.step == 1 && ax.step == 1) {
      Stationary s{planes * height * width, height, width, dilation, {}, {}};
      strides(s);
      return launch(stationary_synthesis_kernel<T, A>, grid_of(divide_up(s.pixels, kThreads)), kThreads, 0, bands, out,
                    s, two_taps_of<A>(taps_y, taps_x));
    }
    if (two && height == 2 * rows && width == 2 * count) {
      Even s{planes * rows * count, rows, count, {}, {}};
      strides(s);
      constexpr int kPack = 8 / sizeof(T);
      const auto f = two_taps_of<A>(taps_y, taps_x);
      bool packed = count % kPack == 0;
      for (const Tensor& source : sources) packed = packed && aligned(source, kPack);
      if (packed)
        return launch(two_taps_synthesis_kernel<T, A, kPack>, grid_of(divide_up(s.squares, kThreads * kPack)), kThreads,
                      0, bands, out, s, f);
      return launch(two_taps_synthesis_kernel<T, A, 1>, grid_of(divide_up(s.squares, kThreads)), kThreads, 0, bands,
                    out, s, f);
    }
    Shape s = shape_of(ay, ax, dilation, ay.size, ax.size, true);
    strides(s);
    const int64_t blocks = planes * dilation * dilation * s.tiles_y * s.tiles_x;
    const size_t shared = 2 * static_cast<size_t>(s.lines) * s.tile_x * sizeof(A);
    const auto f = taps_of<A>(taps_y, taps_x);
    if (ay.taps == 4 && ax.taps == 4)
      return launch(synthesis_kernel<T, A, 4>, grid_of(blocks), kThreads, shared, bands, out, s, f);
    if (ay.taps == 8 && ax.taps == 8)
      return launch(synthesis_kernel<T, A, 8>, grid_of(blocks), kThreads, shared, bands, out, s, f);
    launch(synthesis_kernel<T, A, 0>, grid_of(blocks), kThreads, shared, bands, out, s, f);
  });
  return x;
}

}  // namespace

PSF_CUDA_LIBRARY(m) {
  m.impl("wavelet_fwd", TORCH_BOX(&wavelet_fwd));
  m.impl("wavelet_bwd", TORCH_BOX(&wavelet_bwd));
}

// Wavelet transforms: one level over rows and columns at once; pansharp_fast/reference/wavelet.py states the equations.
//
// General filters: a block owns a tile of the result. A thread filters a column of the input along H in registers (a
// window that slides over the taps) into shared memory, low and high pass side by side; after a barrier, threads filter
// these lines along W. Border samples follow csrc/math/wavelet.h, evaluated once for each row and column of a tile;
// tiles away from the border do without. Analysis and synthesis differ in the direction of the window only.
// A dilated (stationary) transform is an undilated one of each of dilation^2 interleaved images.
//
// Two taps without a border, or stationary: threads join packs of 2 x 2 samples, no shared memory.
//
// Bytes: every kernel reads its input once from memory (overlaps from the caches) and writes its output once.
#include <algorithm>
#include <tuple>

#include "cuda/runtime.cuh"
#include "math/wavelet.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using namespace psf::wavelet;

constexpr int kMostTaps = 104;  // of all filters of PyWavelets; four filters in float64 still fit a kernel's parameters
constexpr int kThreads = 256;   // of a block for two taps
constexpr int kLine = 16;       // results of a thread, and rows of a tile, along H

// Columns of a tile, a thread each, at most. Filters of any length need 214: the longest reach over 206.
constexpr int columns_of(int taps) { return taps > 0 ? 160 : 224; }

// Blocks of a multiprocessor that share its registers: as many as need no spills.
constexpr int blocks_of(int taps, size_t bytes, int few) { return bytes > 4 ? 1 : taps > 0 ? few : 2; }

template <class T, int kSize>
struct alignas(sizeof(T) * kSize < 16 ? sizeof(T) * kSize : 16) Pack {
  T value[kSize];
};

template <class T, int kSize>
__device__ inline Pack<T, kSize> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, kSize>*>(from);
}

// Division of 0 <= n < 2^31 by a constant of the launch.
struct Divisor {
  int value;
  uint32_t multiplier, shift;
};

__device__ inline int divide(int n, const Divisor& d) {
  return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(n)) * d.multiplier >> d.shift);
}

template <class A>
struct Taps {
  A y[2][kMostTaps], x[2][kMostTaps];  // low, high
};

// A step joins `step` results of synthesis: those of step s are step s + offset - q with 0 <= q < step, made by the
// taps step m + q of the coefficients s + m. Tiles are of coefficients (analysis) or of steps (synthesis).
struct Axis {
  int mode, size, count;  // samples and coefficients (of one interleaved image)
  int taps, step, offset;
  int first, tile;    // step of synthesis at which the first tile starts; coefficients or steps of a tile
  int before, after;  // extended positions before and after the samples that take part in synthesis
  Divisor tiles;
};

struct Shape {
  Axis y, x;
  Divisor dilation;
  int columns;               // of a tile's lines, at most one a thread
  int left, right;           // further columns for synthesis at the border: first and last of the coefficients
  bool packed;               // results of a step along W are aligned
  int64_t plane[4], row[4];  // strides of the input: x, or the four bands
};

// What a block works on: its plane, its interleaved image and its tile.
struct Place {
  int plane, phase_y, phase_x, y0, x0;
};

__device__ inline Place place_of(int block, const Shape& s) {
  const auto next = [&](const Divisor& d) {
    const int all = block;
    block = divide(all, d);
    return all - block * d.value;
  };
  Place p;
  p.x0 = next(s.x.tiles) * s.x.tile;
  p.y0 = next(s.y.tiles) * s.y.tile;
  p.phase_x = next(s.dilation);
  p.phase_y = next(s.dilation);
  p.plane = block;
  return p;
}

// An extended sample as a sum of samples; terms that are not there have weight zero.
template <class A>
struct Source {
  struct {
    int index;
    A weight;
  } term[3];
};

template <class A>
__device__ inline Source<A> source_of(const Axis& axis, int position) {
  const Extension e = extension(axis.mode, position, axis.size);
  Source<A> source;
#pragma unroll
  for (int t = 0; t < 3; ++t) source.term[t] = {static_cast<int>(e.index[t]), static_cast<A>(e.weight[t])};
  return source;
}

__device__ inline int terms_of(const Axis& axis) {
  return axis.mode == kSmooth ? 2 : axis.mode == kAntireflect ? 3 : 1;
}

// Calls use(load), where load(n) gives sample n, inner(n) or the sum of border(n, term): all `kCount` read at once, so
// that none waits for another, or (kCount = 0) each as it is needed.
template <int kCount, class A, class Inner, class Border, class Use>
__device__ inline void with_samples(bool inside, int terms, Inner inner, Border border, Use use) {
  if constexpr (kCount > 0) {
    A samples[kCount];
    if (inside) {
#pragma unroll
      for (int n = 0; n < kCount; ++n) samples[n] = inner(n);
    } else {
#pragma unroll
      for (int n = 0; n < kCount; ++n) samples[n] = border(n, 0);
#pragma unroll 1
      for (int t = 1; t < terms; ++t)
#pragma unroll
        for (int n = 0; n < kCount; ++n) samples[n] += border(n, t);
    }
    use([&](int n) { return samples[n]; });
  } else {
    use([&](int n) {
      A sum = inside ? inner(n) : border(n, 0);
#pragma unroll 1
      for (int t = 1; t < (inside ? 1 : terms); ++t) sum += border(n, t);
      return sum;
    });
  }
}

// low[r] = sum_k f[k] e[kStep r + taps - 1 - k], high[r] likewise with g.
template <int kTaps, int kStep, class A, class Load>
__device__ inline void filter(int taps, const A* f, const A* g, Load load, A (&low)[kLine], A (&high)[kLine]) {
  A window[kStep][kLine];
#pragma unroll
  for (int r = 0; r < kLine; ++r)
#pragma unroll
    for (int q = 0; q < kStep; ++q) window[q][r] = load(kStep * r + taps - 1 - q);
#pragma unroll(kTaps > 0 ? kTaps / kStep : 1)
  for (int m = 0; m < taps / kStep; ++m) {
#pragma unroll
    for (int q = 0; q < kStep; ++q) {
      const int k = kStep * m + q;
      if (m > 0) {
#pragma unroll
        for (int r = kLine - 1; r > 0; --r) window[q][r] = window[q][r - 1];
        window[q][0] = load(taps - 1 - k);
      }
#pragma unroll
      for (int r = 0; r < kLine; ++r) {
        low[r] += f[k] * window[q][r];
        high[r] += g[k] * window[q][r];
      }
    }
  }
}

// Where analysis writes to: rows of a band are adjacent.
template <class T>
struct Outputs {
  T* band[4];
  int64_t plane;  // between two planes of a band
};

template <class T, class A, int kTaps, int kStep>
__global__ void __launch_bounds__(columns_of(kTaps), blocks_of(kTaps, sizeof(A), 3))
    analysis_kernel(const T* x, Outputs<T> y, const __grid_constant__ Shape s, const __grid_constant__ Taps<A> f) {
  PSF_DYNAMIC_SHARED(A, lines);  // [kLine][columns][low, high], then the sources of rows and columns
  const int taps_y = kTaps > 0 ? kTaps : s.y.taps, taps_x = kTaps > 0 ? kTaps : s.x.taps;
  const int columns = s.columns, rows = kStep * (kLine - 1) + taps_y, thread = threadIdx.x;
  auto* sources_y = reinterpret_cast<Source<A>*>(lines + 2 * kLine * columns);
  const Source<A>* sources_x = sources_y + rows;

  const Place p = place_of(blockIdx.x, s);
  const int dilation = s.dilation.value;
  const int first_y = kStep * p.y0 + s.y.offset - (taps_y - 1), first_x = kStep * p.x0 + s.x.offset - (taps_x - 1);
  const bool inner_y = first_y >= 0 && first_y + rows <= s.y.size;
  const bool inner_x = first_x >= 0 && first_x + columns <= s.x.size;
  if (!inner_y || !inner_x) {
    for (int t = thread; t < rows + columns; t += blockDim.x)
      sources_y[t] = source_of<A>(t < rows ? s.y : s.x, t < rows ? first_y + t : first_x + t - rows);
    __syncthreads();
  }

  if (thread < columns) {
    const T* image = x + p.plane * s.plane[0] + p.phase_y * s.row[0] + p.phase_x;
    const int64_t row = s.row[0] * dilation;
    Pack<A, 2>* line = reinterpret_cast<Pack<A, 2>*>(lines) + thread;
    for (int term = 0; term < (inner_x ? 1 : terms_of(s.x)); ++term) {
      const A weight = inner_x ? A(1) : sources_x[thread].term[term].weight;
      if (term > 0 && weight == A(0)) continue;
      A low[kLine] = {}, high[kLine] = {};
      if (weight != A(0)) {
        const T* column = image + (inner_x ? first_x + thread : sources_x[thread].term[term].index) * dilation;
        const T* from = column + first_y * row;
        with_samples<kTaps == 0 ? 0 : kStep * (kLine - 1) + kTaps, A>(
            inner_y, terms_of(s.y), [&](int n) { return static_cast<A>(from[n * row]); },
            [&](int n, int t) {
              const auto e = sources_y[n].term[t];
              return e.weight == A(0) ? A(0) : e.weight * static_cast<A>(column[e.index * row]);
            },
            [&](auto load) { filter<kTaps, kStep>(taps_y, f.y[0], f.y[1], load, low, high); });
      }
      if (weight != A(1))
#pragma unroll
        for (int r = 0; r < kLine; ++r) {
          low[r] *= weight;
          high[r] *= weight;
        }
      if (term > 0)
#pragma unroll
        for (int r = 0; r < kLine; ++r) {
          const Pack<A, 2> before = line[r * columns];
          low[r] += before.value[0];
          high[r] += before.value[1];
        }
#pragma unroll
      for (int r = 0; r < kLine; ++r) line[r * columns] = {low[r], high[r]};
    }
  }
  __syncthreads();

  // Eight rows a thread: there are two columns to a coefficient (or, stationary, two turns), so none is idle.
  constexpr int kRows = 8;
  const int64_t width = s.x.count * dilation;
  for (int t = thread; t < kLine / kRows * s.x.tile; t += blockDim.x) {
    const int group = t >= s.x.tile, c = group ? t - s.x.tile : t;
    const int i = p.y0 + group * kRows, j = p.x0 + c;
    if (i >= s.y.count || j >= s.x.count) continue;
    A sums[kRows][4] = {};
    const A* at = lines + 2 * (group * kRows * columns + kStep * c + taps_x - kStep);
#pragma unroll(kTaps > 0 ? kTaps / kStep : 1)
    for (int m = 0; m < taps_x / kStep; ++m)
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const auto line = load_pack<A, 2 * kStep>(at + 2 * (r * columns - kStep * m));
#pragma unroll
        for (int q = 0; q < kStep; ++q)
#pragma unroll
          for (int b = 0; b < 4; ++b) sums[r][b] += f.x[b / 2][kStep * m + q] * line.value[2 * (kStep - 1 - q) + b % 2];
      }
    int64_t at_y = y.plane * p.plane + (int64_t{i} * dilation + p.phase_y) * width + j * dilation + p.phase_x;
#pragma unroll
    for (int r = 0; r < kRows; ++r, at_y += dilation * width)
      if (i + r < s.y.count)
#pragma unroll
        for (int b = 0; b < 4; ++b) y.band[b][at_y] = static_cast<T>(sums[r][b]);
  }
}

// sums[kStep g + kStep - 1 - q] += sum_m f[kStep m + q] y[g + m].
template <int kTaps, int kStep, class A, class Load>
__device__ inline void join(int taps, const A* f, Load load, A (&sums)[kLine]) {
  constexpr int kSteps = kLine / kStep;
  A window[kSteps];
#pragma unroll
  for (int g = 0; g < kSteps; ++g) window[g] = load(g);
#pragma unroll(kTaps > 0 ? kTaps / kStep : 1)
  for (int m = 0; m < taps / kStep; ++m) {
    if (m > 0) {
#pragma unroll
      for (int g = 0; g < kSteps - 1; ++g) window[g] = window[g + 1];
      window[kSteps - 1] = load(kSteps - 1 + m);
    }
#pragma unroll
    for (int q = 0; q < kStep; ++q)
#pragma unroll
      for (int g = 0; g < kSteps; ++g) sums[kStep * g + kStep - 1 - q] += f[kStep * m + q] * window[g];
  }
}

// Weights with which results first, first + 1, ... are part of an extended sample; whether any is.
template <class A, int kCount>
__device__ inline bool weights_of(const Source<A>& e, int first, A (&weights)[kCount]) {
  bool any = false;
#pragma unroll
  for (int r = 0; r < kCount; ++r) weights[r] = A(0);
#pragma unroll
  for (int t = 0; t < 3; ++t) {
    const int r0 = e.term[t].index - first;
    any |= e.term[t].weight != A(0) && r0 >= 0 && r0 < kCount;
#pragma unroll
    for (int r = 0; r < kCount; ++r) weights[r] += r0 == r ? e.term[t].weight : A(0);
  }
  return any;
}

// Extended position b of those outside the samples.
__device__ inline int outer_position(const Axis& axis, int b) {
  return b < axis.before ? b - axis.before : axis.size + b - axis.before;
}

// Whether positions outside the samples may be made of results first to last.
__device__ inline bool takes_border(const Axis& axis, int first, int last) {
  const int reach = axis.before > axis.after ? axis.before : axis.after;
  return reach > 0 && (first <= reach || last >= axis.size - 1 - reach);
}

template <class T>
struct Bands {
  const T* band[4];
};

template <class T, class A, int kTaps, int kStep>
__global__ void __launch_bounds__(columns_of(kTaps), blocks_of(kTaps, sizeof(A), 4))
    synthesis_kernel(Bands<T> bands, T* x, const __grid_constant__ Shape s, const __grid_constant__ Taps<A> f) {
  PSF_DYNAMIC_SHARED(A, lines);  // [kLine][columns][low, high], then the sources of outer rows and columns
  constexpr int kSteps = kLine / kStep;
  const int taps_y = kTaps > 0 ? kTaps : s.y.taps, taps_x = kTaps > 0 ? kTaps : s.x.taps;
  const int columns = s.columns, own = s.x.tile + taps_x / kStep - 1, thread = threadIdx.x;
  const int outer_y = s.y.before + s.y.after, outer_x = s.x.before + s.x.after;
  auto* sources_y = reinterpret_cast<Source<A>*>(lines + 2 * kLine * columns);
  const Source<A>* sources_x = sources_y + outer_y;

  const Place p = place_of(blockIdx.x, s);
  const int dilation = s.dilation.value;
  const int step_y = s.y.first + p.y0, step_x = s.x.first + p.x0;
  const int row0 = kStep * step_y + s.y.offset - (kStep - 1), column0 = kStep * step_x + s.x.offset - (kStep - 1);
  const bool inner_y = step_y >= 0 && step_y + kSteps + taps_y / kStep - 1 <= s.y.count;
  const bool border_y = takes_border(s.y, row0, row0 + kLine - 1);
  const bool border_x = takes_border(s.x, column0, column0 + kStep * s.x.tile - 1);
  if (border_y || border_x) {
    for (int t = thread; t < outer_y + outer_x; t += blockDim.x) {
      const Axis& axis = t < outer_y ? s.y : s.x;
      sources_y[t] = source_of<A>(axis, outer_position(axis, t < outer_y ? t : t - outer_y));
    }
    __syncthreads();
  }

  if (thread < (border_x ? columns : own)) {
    const int j = thread < own ? step_x + thread : thread < own + s.left ? thread - own : thread - columns + s.x.count;
    A low[kLine] = {}, high[kLine] = {};
    if (j >= 0 && j < s.x.count) {
      const T* column[4];
      int64_t row[4];
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        column[b] = bands.band[b] + p.plane * s.plane[b] + p.phase_y * s.row[b] + p.phase_x + j * dilation;
        row[b] = s.row[b] * dilation;
        const T* from = column[b] + step_y * row[b];
        with_samples<kTaps == 0 ? 0 : kSteps + kTaps / kStep - 1, A>(
            inner_y, 1, [&](int n) { return static_cast<A>(from[n * row[b]]); },
            [&](int n, int) {
              return step_y + n >= 0 && step_y + n < s.y.count ? static_cast<A>(from[n * row[b]]) : A(0);
            },
            [&](auto load) { join<kTaps, kStep>(taps_y, f.y[b % 2], load, b < 2 ? low : high); });
      }
#pragma unroll 1
      for (int o = 0; o < (border_y ? outer_y : 0); ++o) {
        A weights[kLine];
        if (!weights_of(sources_y[o], row0, weights)) continue;
        const int from = outer_position(s.y, o) - s.y.offset, q = from & (kStep - 1);
        A l = A(0), h = A(0);
#pragma unroll 1
        for (int k = q, i = (from + q) / kStep; k < taps_y; k += kStep, ++i) {
          if (i < 0 || i >= s.y.count) continue;
          l += f.y[0][k] * static_cast<A>(column[0][i * row[0]]) + f.y[1][k] * static_cast<A>(column[1][i * row[1]]);
          h += f.y[0][k] * static_cast<A>(column[2][i * row[2]]) + f.y[1][k] * static_cast<A>(column[3][i * row[3]]);
        }
#pragma unroll
        for (int r = 0; r < kLine; ++r) {
          low[r] += weights[r] * l;
          high[r] += weights[r] * h;
        }
      }
    }
    Pack<A, 2>* line = reinterpret_cast<Pack<A, 2>*>(lines) + thread;
#pragma unroll
    for (int r = 0; r < kLine; ++r) line[r * columns] = {low[r], high[r]};
  }
  __syncthreads();

  const int c0 = column0 + kStep * thread;
  if (thread >= s.x.tile || c0 >= s.x.size) return;
  A sums[kLine][kStep] = {};
  const auto* line = reinterpret_cast<const Pack<A, 2>*>(lines);
#pragma unroll(kTaps > 0 ? kTaps / kStep : 1)
  for (int m = 0; m < taps_x / kStep; ++m)
#pragma unroll
    for (int r = 0; r < kLine; ++r) {
      const Pack<A, 2> both = line[r * columns + thread + m];
#pragma unroll
      for (int q = 0; q < kStep; ++q) {
        sums[r][kStep - 1 - q] += f.x[0][kStep * m + q] * both.value[0];
        sums[r][kStep - 1 - q] += f.x[1][kStep * m + q] * both.value[1];
      }
    }
#pragma unroll 1
  for (int o = 0; o < (border_x ? outer_x : 0); ++o) {
    A weights[kStep];
    if (!weights_of(sources_x[o], c0, weights)) continue;
    const int from = outer_position(s.x, o) - s.x.offset, q = from & (kStep - 1);
    const auto* first = line + (o < s.x.before ? own : columns - s.x.count);  // where coefficient 0 would be
#pragma unroll 1
    for (int k = q, j = (from + q) / kStep; k < taps_x; k += kStep, ++j) {
      if (j < 0 || j >= s.x.count) continue;
#pragma unroll
      for (int r = 0; r < kLine; ++r) {
        const Pack<A, 2> both = first[r * columns + j];
        const A value = f.x[0][k] * both.value[0] + f.x[1][k] * both.value[1];
#pragma unroll
        for (int e = 0; e < kStep; ++e) sums[r][e] += weights[e] * value;
      }
    }
  }
  const int64_t width = s.x.size * dilation, plane = s.y.size * dilation * width;
  T* out = x + plane * p.plane + (int64_t{row0} * dilation + p.phase_y) * width + c0 * dilation + p.phase_x;
  const int begin = -row0, end = s.y.size - row0;  // rows of x
#pragma unroll
  for (int r = 0; r < kLine; ++r, out += dilation * width) {
    if (r < begin || r >= end) continue;
    Pack<T, kStep> pack;
#pragma unroll
    for (int e = 0; e < kStep; ++e) pack.value[e] = static_cast<T>(sums[r][e]);
    if (s.packed)
      *reinterpret_cast<Pack<T, kStep>*>(out) = pack;
    else
#pragma unroll
      for (int e = 0; e < kStep; ++e)
        if (c0 + e >= 0 && c0 + e < s.x.size) out[e * dilation] = pack.value[e];
  }
}

// ---- Two taps, no border: images of even size, or stationary -------------------------------------------------------

// A block owns `group` rows of the bands, or a part of one; a thread one pack of adjacent coefficients.
struct Rows {
  int rows, group;           // of all planes; of a block
  Divisor height, span;      // rows of a plane; packs of a row in a block
  int packs, width;          // of a row; columns
  int shift_y, shift_x;      // stationary: rows and columns between a sample and its partner's pack
  int64_t plane[4], row[4];  // strides of the input
};

struct Spot {
  int plane, i, j;
  bool inside;
};

template <int kSize>
__device__ inline Spot spot_of(const Rows& s) {
  const int thread = threadIdx.x, line = divide(thread, s.span), row = blockIdx.x * s.group + line;
  const int pack = blockIdx.y * s.span.value + thread - line * s.span.value, plane = divide(row, s.height);
  return {plane, row - plane * s.height.value, pack * kSize, line < s.group && row < s.rows && pack < s.packs};
}

template <class T, class A, int kSize>
__global__ void __launch_bounds__(kThreads)
    two_taps_analysis_kernel(const T* x, Outputs<T> y, Rows s, const __grid_constant__ Taps<A> f) {
  const Spot p = spot_of<kSize>(s);
  if (!p.inside) return;
  const T* source = x + p.plane * s.plane[0] + 2 * p.i * s.row[0] + 2 * p.j;
  const auto top = load_pack<T, 2 * kSize>(source), bottom = load_pack<T, 2 * kSize>(source + s.row[0]);
  Pack<T, kSize> out[4];
#pragma unroll
  for (int q = 0; q < kSize; ++q) {
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
  const int64_t target = y.plane * p.plane + int64_t{p.i} * s.width + p.j;
#pragma unroll
  for (int b = 0; b < 4; ++b) *reinterpret_cast<Pack<T, kSize>*>(y.band[b] + target) = out[b];
}

template <class T, class A, int kSize>
__global__ void __launch_bounds__(kThreads)
    two_taps_synthesis_kernel(Bands<T> bands, T* x, Rows s, const __grid_constant__ Taps<A> f) {
  const Spot p = spot_of<kSize>(s);
  if (!p.inside) return;
  Pack<T, kSize> in[4];
#pragma unroll
  for (int b = 0; b < 4; ++b) in[b] = load_pack<T, kSize>(bands.band[b] + p.plane * s.plane[b] + p.i * s.row[b] + p.j);
  Pack<T, 2 * kSize> out[2];
#pragma unroll
  for (int q = 0; q < kSize; ++q) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {  // tap 1 - c of the filters along W
      const A low = f.x[0][1 - c] * static_cast<A>(in[0].value[q]) + f.x[1][1 - c] * static_cast<A>(in[2].value[q]);
      const A high = f.x[0][1 - c] * static_cast<A>(in[1].value[q]) + f.x[1][1 - c] * static_cast<A>(in[3].value[q]);
#pragma unroll
      for (int r = 0; r < 2; ++r) out[r].value[2 * q + c] = static_cast<T>(f.y[0][1 - r] * low + f.y[1][1 - r] * high);
    }
  }
  T* target = x + (2 * int64_t{p.plane} * s.height.value + 2 * p.i) * 2 * s.width + 2 * p.j;
  *reinterpret_cast<Pack<T, 2 * kSize>*>(target) = out[0];
  *reinterpret_cast<Pack<T, 2 * kSize>*>(target + 2 * s.width) = out[1];
}

// y[i] = f[0] x[i + d] + f[1] x[i], around the image. Partners of a pack along W begin kOffset columns on: in the pack
// itself and the next one, or (kOffset = kSize) in a pack of their own.
template <class T, class A, int kSize, int kOffset>
__global__ void __launch_bounds__(kThreads)
    stationary_analysis_kernel(const T* x, Outputs<T> y, Rows s, const __grid_constant__ Taps<A> f) {
  const Spot p = spot_of<kSize>(s);
  if (!p.inside) return;
  const int height = s.height.value, row = p.i + s.shift_y, column = p.j + s.shift_x;
  const T* top = x + p.plane * s.plane[0] + p.i * s.row[0];
  const T* bottom = x + p.plane * s.plane[0] + (row < height ? row : row - height) * s.row[0];
  const int columns[2] = {p.j, column < s.width ? column : column - s.width};
  A line[2][2 * kSize];  // low and high along H
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const auto a = load_pack<T, kSize>(top + columns[c]), b = load_pack<T, kSize>(bottom + columns[c]);
#pragma unroll
    for (int q = 0; q < kSize; ++q)
#pragma unroll
      for (int g = 0; g < 2; ++g)
        line[g][c * kSize + q] = f.y[g][0] * static_cast<A>(b.value[q]) + f.y[g][1] * static_cast<A>(a.value[q]);
  }
  const int64_t target = y.plane * p.plane + int64_t{p.i} * s.width + p.j;
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    Pack<T, kSize> out;
#pragma unroll
    for (int q = 0; q < kSize; ++q)
      out.value[q] = static_cast<T>(f.x[b / 2][0] * line[b % 2][q + kOffset] + f.x[b / 2][1] * line[b % 2][q]);
    *reinterpret_cast<Pack<T, kSize>*>(y.band[b] + target) = out;
  }
}

// x[r] = f[0] y[r - d] + f[1] y[r]; partners end kOffset columns before the pack's end.
template <class T, class A, int kSize, int kOffset>
__global__ void __launch_bounds__(kThreads)
    stationary_synthesis_kernel(Bands<T> bands, T* x, Rows s, const __grid_constant__ Taps<A> f) {
  const Spot p = spot_of<kSize>(s);
  if (!p.inside) return;
  const int height = s.height.value, row = p.i - s.shift_y, column = p.j - s.shift_x;
  const int rows[2] = {row < 0 ? row + height : row, p.i}, columns[2] = {column < 0 ? column + s.width : column, p.j};
  A line[2][2 * kSize] = {};  // low and high along W
#pragma unroll
  for (int b = 0; b < 4; ++b)
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const T* from = bands.band[b] + p.plane * s.plane[b] + rows[k] * s.row[b];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const auto pack = load_pack<T, kSize>(from + columns[c]);
#pragma unroll
        for (int q = 0; q < kSize; ++q) line[b / 2][c * kSize + q] += f.y[b % 2][k] * static_cast<A>(pack.value[q]);
      }
    }
  Pack<T, kSize> out;
#pragma unroll
  for (int q = 0; q < kSize; ++q) {
    A sum = A(0);
#pragma unroll
    for (int g = 0; g < 2; ++g) {
      sum += f.x[g][0] * line[g][kSize - kOffset + q];
      sum += f.x[g][1] * line[g][kSize + q];
    }
    out.value[q] = static_cast<T>(sum);
  }
  *reinterpret_cast<Pack<T, kSize>*>(x + (int64_t{p.plane} * height + p.i) * s.width + p.j) = out;
}

// ---- Host side -----------------------------------------------------------------------------------------------------

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

Divisor divisor(int64_t value) {
  uint32_t log = 0;
  while (int64_t{1} << log < value) ++log;
  return {static_cast<int>(value), static_cast<uint32_t>((uint64_t{1} << (31 + log)) / value + 1), 31 + log};
}

Tensor with_adjacent_columns(const Tensor& x) {
  return x.stride(2) == 1 || x.size(2) <= 1 ? x : torch::stable::contiguous(x);
}

Axis axis_of(const std::vector<double>& taps, int64_t mode, int64_t n, int64_t dilation) {
  STD_TORCH_CHECK(!taps.empty() && taps.size() % 4 == 0 && taps.size() <= 2 * kMostTaps,
                  "taps: expected two filters of one even length up to ", kMostTaps, ", got ", taps.size(), " values");
  STD_TORCH_CHECK(n % dilation == 0, "size: expected a multiple of the dilation ", dilation, ", got ", n);
  STD_TORCH_CHECK(n < int64_t{1} << 30, "size: expected fewer than 2^30 samples along an axis, got ", n);
  const int64_t length = static_cast<int64_t>(taps.size()) / 2;
  const Geometry g = geometry(mode, n / dilation, length, 1);
  Axis axis{};
  axis.mode = static_cast<int>(mode);
  axis.size = static_cast<int>(n / dilation);
  axis.count = static_cast<int>(g.count);
  axis.taps = static_cast<int>(length);
  axis.step = static_cast<int>(g.step);
  axis.offset = static_cast<int>(g.offset);
  return axis;
}

template <class A>
Taps<A> taps_of(const std::vector<double>& y, const std::vector<double>& x) {
  Taps<A> f{};
  for (size_t i = 0; i < y.size(); ++i) f.y[i >= y.size() / 2][i % (y.size() / 2)] = static_cast<A>(y[i]);
  for (size_t i = 0; i < x.size(); ++i) f.x[i >= x.size() / 2][i % (x.size() / 2)] = static_cast<A>(x[i]);
  return f;
}

dim3 grid_of(int64_t blocks, int64_t parts = 1) {
  STD_TORCH_CHECK(blocks < int64_t{1} << 31 && parts < int64_t{1} << 16, "x: expected fewer than 2^31 tiles, got ",
                  blocks * parts);
  return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(parts));
}

// Whole warps.
dim3 block_of(int64_t threads) { return dim3(static_cast<unsigned>(divide_up(threads, 32) * 32)); }

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

bool aligned(const std::vector<Tensor>& sources, int64_t size) {
  return std::all_of(sources.begin(), sources.end(), [&](const Tensor& x) { return aligned(x, size); });
}

template <class S>
void set_strides(S& s, const std::vector<Tensor>& sources) {
  for (size_t b = 0; b < sources.size(); ++b) {
    s.plane[b] = sources[b].stride(0);
    s.row[b] = sources[b].stride(1);
  }
}

struct Plan {
  Shape shape;
  int64_t blocks;
  int sources;  // of a tile
  dim3 block;

  template <class A>
  size_t shared() const {
    return 2 * kLine * shape.columns * sizeof(A) + sources * sizeof(Source<A>);
  }
};

Plan plan_of(const Axis& y, const Axis& x, int64_t dilation, const std::vector<Tensor>& sources, bool synthesis) {
  STD_TORCH_CHECK(y.step == x.step, "mode: expected both axes stationary or none, got one");
  const int step = y.step;
  Plan plan{};
  Shape& s = plan.shape;
  s.y = y;
  s.x = x;
  s.y.tile = synthesis ? kLine / step : kLine;
  int results[2] = {y.count, x.count};  // coefficients or steps
  if (synthesis)
    for (Axis* axis : {&s.y, &s.x}) {
      axis->first = -(axis->offset / step);
      results[axis == &s.x] = (axis->size + step - 2 - axis->offset % step) / step + 1;
      if (axis->mode == kZero) continue;
      axis->before = std::max(0, axis->taps - 1 - axis->offset);
      axis->after = std::max(0, step * (axis->count - 1) + axis->offset + 1 - axis->size);
    }
  s.left = std::min<int>(x.count, divide_up(s.x.before, step));
  s.right = std::min<int>(x.count, divide_up(s.x.after, step));
  const int scale = synthesis ? 1 : step, reach = synthesis ? x.taps / step - 1 + s.left + s.right : x.taps - step;
  // The tile width that leaves the fewest lanes idle.
  const int most = std::max(8, (columns_of(1) - reach) / scale);
  int64_t least = INT64_MAX;
  for (int width = most; width >= std::min(most, 32); --width) {
    const int64_t tiles = divide_up(results[1], width), tile = divide_up(results[1], tiles);
    const int64_t lanes = tiles * divide_up(scale * tile + reach, 32) * 32;
    if (lanes >= least) continue;
    least = lanes;
    s.x.tile = static_cast<int>(tile);
    s.x.tiles = divisor(tiles);
  }
  s.columns = scale * s.x.tile + reach;
  s.y.tiles = divisor(divide_up(results[0], s.y.tile));
  s.dilation = divisor(dilation);
  s.packed = dilation == 1 && step == 2 && x.size % 2 == 0 && x.offset % 2 == 1;
  set_strides(s, sources);
  plan.blocks = sources[0].size(0) * dilation * dilation * s.y.tiles.value * s.x.tiles.value;
  plan.block = block_of(s.columns);
  plan.sources = synthesis ? s.y.before + s.y.after + s.x.before + s.x.after : step * (kLine - 1) + y.taps + s.columns;
  return plan;
}

// Runs use.operator()<kTaps, kStep>() for filters of both axes; kTaps = 0 takes any length.
template <class Use>
void with_taps(const Axis& y, const Axis& x, Use use) {
  const int taps = y.taps == x.taps ? y.taps : 0;
  if (y.step == 1) return use.template operator()<0, 1>();
  if (taps == 4) return use.template operator()<4, 2>();
  if (taps == 8) return use.template operator()<8, 2>();
  if (taps == 10) return use.template operator()<10, 2>();
  use.template operator()<0, 2>();
}

// Launches a kernel for two taps on [rows, count] coefficients a plane, in packs of `size`.
template <class Kernel, class In, class Out, class Filters>
void launch_rows(const psf::Launch& launch, Kernel kernel, int64_t shift_y, int64_t shift_x, int64_t size,
                 const std::vector<Tensor>& sources, int64_t rows, int64_t count, const In& in, const Out& out,
                 const Filters& f) {
  const int64_t all = sources[0].size(0) * rows, packs = count / size, parts = divide_up(packs, kThreads);
  STD_TORCH_CHECK(all < (int64_t{1} << 31) - kThreads, "x: expected fewer than 2^31 rows, got ", all);
  Rows s{};
  s.shift_y = static_cast<int>(shift_y);
  s.shift_x = static_cast<int>(shift_x);
  s.rows = static_cast<int>(all);
  s.height = divisor(rows);
  s.span = divisor(divide_up(packs, parts));
  s.group = parts > 1 ? 1 : kThreads / s.span.value;
  s.packs = static_cast<int>(packs);
  s.width = static_cast<int>(count);
  set_strides(s, sources);
  launch(kernel, grid_of(divide_up(all, s.group), parts), block_of(s.group * s.span.value), 0, in, out, s, f);
}

// Runs use.operator()<kSize, kOffset>(shift_x): the widest packs of a stationary transform of two taps.
template <class T, class Use>
void with_packs(const std::vector<Tensor>& sources, int64_t dilation, int64_t width, Use use) {
  constexpr int kSize = 16 / sizeof(T);
  const int64_t shift = dilation % width;
  if (width % kSize == 0 && aligned(sources, kSize)) {
    if (shift % kSize == 0) return use.template operator()<kSize, kSize>(shift);
    if (shift == 1) return use.template operator()<kSize, 1>(kSize);
    if constexpr (kSize > 2)
      if (shift == 2) return use.template operator()<kSize, 2>(kSize);
    if constexpr (kSize > 4)
      if (shift == 4) return use.template operator()<kSize, 4>(kSize);
  }
  use.template operator()<1, 1>(shift);
}

// Four bands [N, H', W'], or one tensor [N, 4, H', W'] that holds them.
std::vector<Tensor> analysis(const Tensor& x, const std::vector<double>& taps_y, const std::vector<double>& taps_x,
                             int64_t mode_y, int64_t mode_x, int64_t dilation, bool stack) {
  STD_TORCH_CHECK(x.dim() == 3, "x: expected [N, H, W], got ", x.dim(), " dimensions");
  const int64_t planes = x.size(0), height = x.size(1), width = x.size(2);
  const Axis ay = axis_of(taps_y, mode_y, height, dilation), ax = axis_of(taps_x, mode_x, width, dilation);
  const std::vector<Tensor> source{with_adjacent_columns(x)};
  const int64_t rows = ay.count * dilation, count = ax.count * dilation;
  std::vector<Tensor> y;
  if (stack)
    y.push_back(torch::stable::new_empty(x, {planes, 4, rows, count}));
  else
    for (int b = 0; b < 4; ++b) y.push_back(torch::stable::new_empty(x, {planes, rows, count}));
  if (y[0].numel() == 0) return y;
  psf::Launch launch(x);
  const bool two = ay.taps == 2 && ax.taps == 2;
  with_types(x.scalar_type(), [&]<class T, class A>() {
    const T* in = static_cast<const T*>(source[0].const_data_ptr());
    Outputs<T> out{{}, (stack ? 4 : 1) * rows * count};
    for (int b = 0; b < 4; ++b)
      out.band[b] = static_cast<T*>(y[stack ? 0 : b].mutable_data_ptr()) + (stack ? b * rows * count : 0);
    if (two && ay.step == 1 && ax.step == 1)
      return with_packs<T>(source, dilation, width, [&]<int kSize, int kOffset>(int64_t shift) {
        launch_rows(launch, stationary_analysis_kernel<T, A, kSize, kOffset>, dilation % height, shift, kSize, source,
                    height, width, in, out, taps_of<A>(taps_y, taps_x));
      });
    if (two && height == 2 * rows && width == 2 * count) {
      constexpr int kPack = 8 / sizeof(T);
      const auto f = taps_of<A>(taps_y, taps_x);
      if (count % kPack == 0 && aligned(source, 2 * kPack))
        return launch_rows(launch, two_taps_analysis_kernel<T, A, kPack>, 0, 0, kPack, source, rows, count, in, out, f);
      if (aligned(source, 2))
        return launch_rows(launch, two_taps_analysis_kernel<T, A, 1>, 0, 0, 1, source, rows, count, in, out, f);
    }
    const Plan plan = plan_of(ay, ax, dilation, source, false);
    with_taps(ay, ax, [&]<int kTaps, int kStep>() {
      launch(analysis_kernel<T, A, kTaps, kStep>, grid_of(plan.blocks), plan.block, plan.shared<A>(), in, out,
             plan.shape, taps_of<A>(taps_y, taps_x));
    });
  });
  return y;
}

Tensor wavelet_fwd(const Tensor& x, std::vector<double> taps_y, std::vector<double> taps_x, int64_t mode_y,
                   int64_t mode_x, int64_t dilation) {
  return analysis(x, taps_y, taps_x, mode_y, mode_x, dilation, true)[0];
}

std::tuple<Tensor, Tensor, Tensor, Tensor> wavelet_bands_fwd(const Tensor& x, std::vector<double> taps_y,
                                                             std::vector<double> taps_x, int64_t mode_y, int64_t mode_x,
                                                             int64_t dilation) {
  const std::vector<Tensor> y = analysis(x, taps_y, taps_x, mode_y, mode_x, dilation, false);
  return {y[0], y[1], y[2], y[3]};
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
    if (two && ay.step == 1 && ax.step == 1)
      return with_packs<T>(sources, dilation, width, [&]<int kSize, int kOffset>(int64_t shift) {
        launch_rows(launch, stationary_synthesis_kernel<T, A, kSize, kOffset>, dilation % height, shift, kSize, sources,
                    height, width, bands, out, taps_of<A>(taps_y, taps_x));
      });
    if (two && height == 2 * rows && width == 2 * count) {
      constexpr int kPack = 8 / sizeof(T);
      const auto f = taps_of<A>(taps_y, taps_x);
      if (count % kPack == 0 && aligned(sources, kPack))
        return launch_rows(launch, two_taps_synthesis_kernel<T, A, kPack>, 0, 0, kPack, sources, rows, count, bands,
                           out, f);
      return launch_rows(launch, two_taps_synthesis_kernel<T, A, 1>, 0, 0, 1, sources, rows, count, bands, out, f);
    }
    const Plan plan = plan_of(ay, ax, dilation, sources, true);
    with_taps(ay, ax, [&]<int kTaps, int kStep>() {
      launch(synthesis_kernel<T, A, kTaps, kStep>, grid_of(plan.blocks), plan.block, plan.shared<A>(), bands, out,
             plan.shape, taps_of<A>(taps_y, taps_x));
    });
  });
  return x;
}

}  // namespace

PSF_CUDA_LIBRARY(m) {
  m.impl("wavelet_fwd", TORCH_BOX(&wavelet_fwd));
  m.impl("wavelet_bands_fwd", TORCH_BOX(&wavelet_bands_fwd));
  m.impl("wavelet_bwd", TORCH_BOX(&wavelet_bwd));
}

// Local attention of one query over a window in two modalities (PAN-Crafter, equations 9-12): forward and backward.
//
// Per pixel x, head and modality, J = window^2 candidates j, offsets p:
//   nb(k)[d,j](x) = sum_p W[d,j,p] k[d](x+p) + b[d,j],   out(x) = sum_j softmax_j(scale q(x).nb(k)[:,j](x))
//   nb(v)[:,j](x)
// The expansion nb() exists in registers only, one channel at a time. Channels of a head are worked on in chunks of
// kChunk, so that any head size runs through the same code. Accumulation is in float32 for every dtype.
//
// Bytes: forward reads q, k, v of both modalities once (plus halos, from L2) and writes two outputs: 7 tensors.
// Backward: attention and logit gradients go through a workspace of 4 J floats a pixel and head, written once.
#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <type_traits>

#include "cuda/mma.cuh"
#include "cuda/runtime.cuh"
#include "math/cm3a.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kChunk = 8;       // channels of a head that a block holds in shared memory
constexpr int kTileWidth = 32;  // pixels along x: one warp
constexpr int kWarps = 8;

template <int kWindow>
struct Geometry {
  static constexpr int J = kWindow * kWindow;
  static constexpr int kRadius = kWindow / 2;
  static constexpr int kPixels = kWindow == 3 ? 2 : 1;  // rows a thread owns: each weight read serves all of them
  static constexpr int kTileHeight = kWarps * kPixels;
  static constexpr int kHaloWidth = kTileWidth + 2 * kRadius;
  static constexpr int kHaloHeight = kTileHeight + 2 * kRadius;
  static constexpr int kHaloArea = kHaloWidth * kHaloHeight;
};

// Sizes and strides (in elements) shared by q, k, v, their gradients and the outputs.
struct Shape {
  int64_t image;  // elements of one image: C * H * W
  int channel;    // from channel to channel
  int pixel;      // from pixel to pixel along x; a row is width * pixel
  int heads, dim, height, width;
  int tiles_x, tiles_y;
  bool channels_last;

  __device__ int64_t offset(int d) const { return static_cast<int64_t>(d) * channel; }
};

// What kernels with learned neighbours may take for granted. rows, pixels: the head size is a multiple of kChunk and
// maps are aligned to as many of their values; rows: rows of a channel are contiguous and of a multiple of four pixels.
// pixels: channels_last.
enum class Layout { rows, pixels, any };

template <Layout kLayout>
struct Map : Shape {
  // Of a pixel along x.
  __device__ auto step() const {
    if constexpr (kLayout == Layout::rows)
      return std::integral_constant<int, 1>();
    else
      return static_cast<int64_t>(pixel);
  }
  // The same pixels in float planes of their own, `count` of them, a multiple of kChunk: channel-contiguous.
  __device__ auto planes(int count) const {
    Map<kLayout == Layout::rows ? Layout::rows : Layout::any> map{*this};
    map.channel = height * width;
    map.pixel = 1;
    map.dim = count;
    return map;
  }
};

// Neighbouring values, aligned to their size. Words: zeroed or loaded as a whole, 16-bit types stay packed.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  uint32_t words[sizeof(T) * kCount / 4];

  Vector() = default;
  __device__ Vector(float first, float second) {
    static_assert(kCount == 2);
    if constexpr (sizeof(T) == 4)
      words[0] = __float_as_uint(first), words[1] = __float_as_uint(second);
    else
      words[0] = static_cast<T>(first).x | static_cast<uint32_t>(static_cast<T>(second).x) << 16;
  }
  __device__ float operator[](int i) const {
    if constexpr (sizeof(T) == 4)
      return __uint_as_float(words[i]);
    else
      return static_cast<float>(T(static_cast<uint16_t>(words[i / 2] >> i % 2 * 16), T::from_bits()));
  }
};

// A chunk of channels of a tile with halo in shared memory: planes of kTogether channels, pixel by pixel.
template <int kRadius_, int kTileHeight, int kTogether>
struct Halo {
  static constexpr int kRadius = kRadius_;
  static constexpr int kLeft = 4 / kTogether;  // columns before the tile: its rows are stored in vectors of four floats
  static constexpr int kWidth = kTileWidth + 2 * kLeft;
  static constexpr int kHeight = kTileHeight + 2 * kRadius;
  static constexpr int kPlane = (kTogether * kWidth * kHeight + 31 - 8) / 32 * 32 + 8;  // planes begin 8 banks apart
  static constexpr int kFloats = kChunk / kTogether * kPlane;

  // of channel d, row and column counted from the tile's first pixel less the radius
  static __device__ int offset(int d, int row, int column) {
    return d / kTogether * kPlane + kTogether * (row * kWidth + column + kLeft - kRadius) + d % kTogether;
  }
  // Channels d and d + 1 of a pixel, or of four.
  static __device__ void put(float* tile, int d, int row, int column, float first, float second) {
    float* const to = tile + offset(d, row, column);
    if constexpr (kTogether == 2)
      *reinterpret_cast<float2*>(to) = make_float2(first, second);
    else
      to[0] = first, to[kPlane] = second;
  }
  template <class T>
  static __device__ void put(float* tile, int d, int row, int column, const Vector<T, 4>& a, const Vector<T, 4>& b) {
    float* const to = tile + offset(d, row, column);
    if constexpr (kTogether == 2) {
      reinterpret_cast<float4*>(to)[0] = make_float4(a[0], b[0], a[1], b[1]);
      reinterpret_cast<float4*>(to)[1] = make_float4(a[2], b[2], a[3], b[3]);
    } else {
      *reinterpret_cast<float4*>(to) = make_float4(a[0], a[1], a[2], a[3]);
      *reinterpret_cast<float4*>(to + kPlane) = make_float4(b[0], b[1], b[2], b[3]);
    }
  }
};

// What a block works on: one head of one image, one tile of pixels.
struct Place {
  int64_t base;  // offset of the head's first channel at pixel (0, 0)
  int64_t head;  // image * heads + head
  int x0, y0;
};

__device__ Place place_of(int64_t block, const Shape& s, int tile_height) {
  const int64_t tiles = static_cast<int64_t>(s.tiles_x) * s.tiles_y;
  const int64_t head = block / tiles;
  const int tile = static_cast<int>(block % tiles);
  return {head / s.heads * s.image + head % s.heads * s.dim * s.channel, head, tile % s.tiles_x * kTileWidth,
          tile / s.tiles_x * tile_height};
}

// One chunk of channels of a tile, `radius` pixels of halo around it, as float32, zero outside image and head.
template <class T>
__device__ void load_tile(float* tile, const T* data, const Shape& s, int chunk, int x0, int y0, int halo_width,
                          int halo_area, int plane, int radius) {
  for (int i = threadIdx.x; i < kChunk * halo_area; i += blockDim.x) {
    // Neighbouring threads read neighbouring addresses in either layout.
    const int d = s.channels_last ? i % kChunk : i / halo_area;
    const int at = s.channels_last ? i / kChunk : i % halo_area;
    const int y = y0 + at / halo_width - radius, x = x0 + at % halo_width - radius;
    float value = 0.0f;
    if (chunk + d < s.dim && y >= 0 && y < s.height && x >= 0 && x < s.width)
      value = static_cast<float>(data[s.offset(chunk + d) + (static_cast<int64_t>(y) * s.width + x) * s.pixel]);
    tile[d * plane + at] = value;
  }
}

// Element of one channel at a thread's n-th pixel; zero outside the image and beyond the head's channels.
template <class T>
__device__ float load_pixel(const T* data, const Shape& s, int d, int x, int y) {
  if (x >= s.width || y >= s.height || d >= s.dim) return 0.0f;
  return static_cast<float>(data[s.offset(d) + (static_cast<int64_t>(y) * s.width + x) * s.pixel]);
}

template <class T>
__device__ void store_pixel(T* data, float value, const Shape& s, int d, int x, int y) {
  if (x >= s.width || y >= s.height || d >= s.dim) return;
  data[s.offset(d) + (static_cast<int64_t>(y) * s.width + x) * s.pixel] = static_cast<T>(value);
}

// The window of channel d around each of a thread's pixels: rows shared by the pixels are read once.
template <int kWindow, int kPixels>
__device__ void load_window(float (&window)[kPixels - 1 + kWindow][kWindow], const float* tile, int tx, int ty) {
#pragma unroll
  for (int r = 0; r < kPixels - 1 + kWindow; ++r)
#pragma unroll
    for (int c = 0; c < kWindow; ++c) window[r][c] = tile[(ty + r) * Geometry<kWindow>::kHaloWidth + tx + c];
}

// The loops over a chunk's channels stay loops: unrolled they multiply the code by eight and gain nothing.

// sums[n][j] += sum_d left[d] tile[d](x+p_j) for one chunk: the exact shift.
template <int kWindow, class T>
__device__ void add_dots(float (&sums)[Geometry<kWindow>::kPixels][Geometry<kWindow>::J], const T* left,
                         const float* tile, const Shape& s, int chunk, int x, int y, int tx, int ty) {
  using G = Geometry<kWindow>;
#pragma unroll 1
  for (int d = 0; d < kChunk; ++d) {
    float window[G::kPixels - 1 + kWindow][kWindow];
    load_window<kWindow, G::kPixels>(window, tile + d * G::kHaloArea, tx, ty);
#pragma unroll
    for (int n = 0; n < G::kPixels; ++n) {
      const float value = load_pixel(left, s, chunk + d, x, y + n);
#pragma unroll
      for (int j = 0; j < G::J; ++j) sums[n][j] += value * window[n + j / kWindow][j % kWindow];
    }
  }
}

// out[n] += sum_j factor[n][j] tile[d](x+p_j) for channel d of a chunk and each of the thread's pixels.
template <int kWindow>
__device__ void add_mix(float (&out)[Geometry<kWindow>::kPixels],
                        const float (&factor)[Geometry<kWindow>::kPixels][Geometry<kWindow>::J], const float* tile,
                        int d, int tx, int ty) {
  using G = Geometry<kWindow>;
  float window[G::kPixels - 1 + kWindow][kWindow];
  load_window<kWindow, G::kPixels>(window, tile + d * G::kHaloArea, tx, ty);
#pragma unroll
  for (int n = 0; n < G::kPixels; ++n)
#pragma unroll
    for (int j = 0; j < G::J; ++j) out[n] += factor[n][j] * window[n + j / kWindow][j % kWindow];
}

template <int kPixels, int J>
__device__ void softmax(float (&values)[kPixels][J], float scale) {
#pragma unroll
  for (int n = 0; n < kPixels; ++n) {
#pragma unroll
    for (int j = 0; j < J; ++j) values[n][j] *= scale;
    psf::cm3a::softmax(values[n], [](float x) { return expf(x); });
  }
}

// A map of both modalities: 0 is PAN, 1 is MS.
template <class T>
struct Both {
  T *pan, *ms;
  __device__ T* operator[](int m) const { return m == 0 ? pan : ms; }
};

template <class T>
struct Inputs {
  const T* q;
  Both<const T> k, v;
  float scale;
};

// ---- Learned neighbours on the tensor cores -------------------------------------------------------------------------
//
// Attention does not change when all logits of a pixel change by the same amount, and it sums to one: with
//   V[d,j,p] = W[d,j,p] - W[d,J-1,p]   (p = J: the bias)
// the logits l_j = sum_d,p V[d,j,p] q[d](x) k[d](x+p) of j < J-1 beside l_{J-1} = 0 give the attention, and
//   out[d](x) = sum_p v[d](x+p) (mean_j W[d,j,p] + sum_{j<J-1} V[d,j,p] (a_j(x) - 1/J)).
// J-1 is 8 or 24: whole tiles of the tensor cores. Both products have V as constant factor and pixels as rows:
//   project:  [16 pixels, 8 channels] x [8 channels, 8 candidates] for each p, summed over p and channels
//   transfer: [16 pixels, 8 candidates] x [8 candidates, 8 channels] for each p
// A warp owns 8 pixels along x and kRows along y; its lane (q, r) pixels (x = q, all y), channels 2r and 2r + 1 of a
// chunk and candidates 2r and 2r + 1 of each eight: operands of one product are results of the other, in place.
//
// Precision: kSplit writes every operand as the sum of two TF32 values and adds three products: as good as float32.
// Without it operands are TF32: for bfloat16 and float16, whose products it holds to 2^-10 at worst, and for float32
// where torch allows that.
template <int kWindow>
struct Tiles {
  static constexpr int J = kWindow * kWindow;
  static constexpr int kRadius = kWindow / 2;
  static constexpr int kEights = J / 8;                // of candidates
  static constexpr int kPairs = kWindow == 3 ? 4 : 2;  // of rows of pixels a warp owns: products of one factor
  static constexpr int kRows = 2 * kPairs;
  static constexpr int kTileHeight = 2 * kRows;  // four warps along x, two along y
  using Halo = ::Halo<kRadius, kTileHeight, 2>;
  static constexpr int kTile = Halo::kFloats;
};

// The constant factor as lanes read it, in float32 terms of TF32 values, for chunks of channels c, kinds (0: project,
// 1: transfer), offsets p, eights of candidates e: [c][kind][p][e][lane][high, high, low, low], without the low terms
// where kSplit is false; behind each c mean_j W[d,j,p] as [p][8 channels].
template <int kWindow, bool kSplit>
struct Factor {
  static constexpr int J = kWindow * kWindow;
  static constexpr int kLane = kSplit ? 4 : 2;
  static constexpr int kEight = 32 * kLane;
  static constexpr int kKind = (J + 1) * (J / 8) * kEight;
  static constexpr int kBase = (J + 1) * kChunk;
  const float* packed;

  static constexpr int kAll = 2 * kKind + kBase;  // of a chunk
  __device__ const float* kind(int chunk, int kind) const {
    return packed + static_cast<int64_t>(chunk / kChunk) * kAll + kind * kKind;
  }
};

template <int kWindow, bool kSplit>
__global__ void pack_kernel(const float* weight, const float* bias, float* packed, int dim, int chunks) {
  using F = Factor<kWindow, kSplit>;
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const auto value = [&](int d, int j, int p) {
    if (d >= dim) return 0.0f;
    return p < F::J ? weight[(d * F::J + j) * F::J + p] : bias[d * F::J + j];
  };
  constexpr int kSlots = F::kKind / F::kLane;
  if (i < chunks * 2 * kSlots) {
    const int q = i % 32 / 4, r = i % 4, e = i / 32 % (F::J / 8), p = i / 32 / (F::J / 8) % (F::J + 1);
    const int kind = i / kSlots % 2, chunk = i / kSlots / 2 * kChunk;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int d = chunk + (kind == 0 ? 2 * r + n : q), j = 8 * e + (kind == 0 ? q : 2 * r + n);
      const float exact = value(d, j, p) - value(d, F::J - 1, p), high = psf::rounded(exact);
      float* const to = packed + i / (2 * kSlots) * F::kAll + i % (2 * kSlots) * F::kLane + n;
      to[0] = high;
      if constexpr (kSplit) to[2] = psf::rounded(exact - high);
    }
  }
  if (i < chunks * F::kBase) {
    float mean = 0.0f;
    for (int j = 0; j < F::J; ++j) mean += value(i / F::kBase * kChunk + i % kChunk, j, i / kChunk % (F::J + 1));
    packed[i / F::kBase * F::kAll + 2 * F::kKind + i % F::kBase] = mean / F::J;
  }
}

// Where a thread stands in its block's tile.
template <int kWindow>
struct Lane {
  using G = Tiles<kWindow>;
  int x, y;         // in the image, of its first pixel
  int column, row;  // in the tile
  int q, r;

  __device__ explicit Lane(const Place& at) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    q = lane / 4;
    r = lane % 4;
    column = warp % 4 * 8 + q;
    row = warp / 4 * G::kRows;
    x = at.x0 + column;
    y = at.y0 + row;
  }

  // Offset of its pairs of channels in the halo, beside its first pixel.
  __device__ int first() const { return G::Halo::offset(2 * r, row, column); }
  // Of its pixel in the first row, or of the nearest pixel of the image; the step from the n-th row to the next.
  __device__ int pixel(const Shape& s) const { return min(y, s.height - 1) * s.width + min(x, s.width - 1); }
  __device__ int step(const Shape& s, int n) const { return y + n + 1 < s.height ? s.width : 0; }
};

// What is multiplied into products before the hardware cuts them down to TF32: it then rounds, as the mean of what is
// cut off is 2^-11 / m for a mantissa 1 <= m < 2, 1 / m being 0.72 on average; what TF32 holds stays as it is.
template <bool kSplit>
constexpr float kUp = kSplit ? 1.0f : 1.0f + 0.72f / 2048;

// One chunk of channels with halo, zero outside image and head; the first channel's address is `data`, `left` channels
// are left of the head. A warp loads every kWarps-th row, then all share the columns beside the tile.
template <class Halo, class T, Layout kLayout>
__device__ void load_halo(float* tile, const T* data, int left, int x0, int y0, const Map<kLayout>& s) {
  constexpr int kRadius = Halo::kRadius, kSteps = (Halo::kHeight + kWarps - 1) / kWarps;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, reverse = kWarps * 32 - 1 - static_cast<int>(threadIdx.x);
  x0 -= kRadius;
  y0 -= kRadius;
  const auto inside = [&](int row, int column) {
    return y0 + row >= 0 && y0 + row < s.height && x0 + column >= 0 && x0 + column < s.width;
  };
  if constexpr (kLayout == Layout::rows) {  // four pixels of two channels
    const int d = lane / 8 * 2, column = kRadius + lane % 8 * 4;
    const T* from = data + s.offset(d) + x0 + column + static_cast<int64_t>(y0 + warp) * s.width;
    Vector<T, 4> values[kSteps][2];
#pragma unroll
    for (int n = 0; n < kSteps; ++n) {
      const int row = warp + n * kWarps;
      values[n][0] = values[n][1] = {};
      if (row < Halo::kHeight && inside(row, column)) {
        values[n][0] = *reinterpret_cast<const Vector<T, 4>*>(from);
        values[n][1] = *reinterpret_cast<const Vector<T, 4>*>(from + s.channel);
      }
      from += static_cast<int64_t>(kWarps) * s.width;
    }
    const int edge = reverse / 4 % 2 * (kTileWidth + kRadius), row = reverse / 8;
    static_assert(Halo::kHeight * 8 <= kWarps * 32);
    if (row < Halo::kHeight) {
      const int d = reverse % 4 * 2;
#pragma unroll
      for (int n = 0; n < kRadius; ++n) {
        T pair[2] = {};
        if (inside(row, edge + n)) {
          const T* const at = data + s.offset(d) + ((y0 + row) * s.width + x0 + edge + n);
          pair[0] = at[0];
          pair[1] = at[s.channel];
        }
        Halo::put(tile, d, row, edge + n, static_cast<float>(pair[0]), static_cast<float>(pair[1]));
      }
    }
#pragma unroll
    for (int n = 0; n < kSteps; ++n)
      if (warp + n * kWarps < Halo::kHeight) Halo::put(tile, d, warp + n * kWarps, column, values[n][0], values[n][1]);
    return;
  }
  const auto load = [&](int row, int column) {  // all channels of a pixel
    float values[kChunk] = {};
    if (inside(row, column)) {
      const T* const at = data + static_cast<int64_t>((y0 + row) * s.width + x0 + column) * s.pixel;
      if constexpr (kLayout == Layout::pixels) {
        const auto vector = *reinterpret_cast<const Vector<T, kChunk>*>(at);
#pragma unroll
        for (int d = 0; d < kChunk; ++d) values[d] = vector[d];
      } else {
#pragma unroll
        for (int d = 0; d < kChunk; ++d)
          if (d < left) values[d] = static_cast<float>(at[s.offset(d)]);
      }
    }
#pragma unroll
    for (int d = 0; d < kChunk; d += 2) Halo::put(tile, d, row, column, values[d], values[d + 1]);
  };
  for (int row = warp; row < Halo::kHeight; row += kWarps) load(row, kRadius + lane);
  if (reverse < Halo::kHeight * 2 * kRadius) {
    const int column = reverse % (2 * kRadius);
    load(reverse / (2 * kRadius), column < kRadius ? column : kTileWidth + column);
  }
}

// `factor` times a lane's channels 2r and 2r + 1 of its pixels. Outside image and head it reads what is nearest: those
// products reach nothing, or they multiply a zero of the constant factor.
template <int kWindow, class T, Layout kLayout>
__device__ void load_own(float (&own)[Tiles<kWindow>::kRows][2], const T* data, const Lane<kWindow>& lane,
                         const Map<kLayout>& s, int chunk, float factor) {
  const int d = chunk + 2 * lane.r;
  const int64_t at = static_cast<int64_t>(lane.pixel(s)) * s.step();
  if constexpr (kLayout == Layout::pixels) {
    const T* from = data + d + at;
#pragma unroll
    for (int n = 0; n < Tiles<kWindow>::kRows; ++n) {
      const auto pair = *reinterpret_cast<const Vector<T, 2>*>(from);
      own[n][0] = factor * pair[0];
      own[n][1] = factor * pair[1];
      from += lane.step(s, n) * s.step();
    }
  } else {
    const T* first = data + s.offset(min(d, s.dim - 1)) + at;
    const T* second = data + s.offset(min(d + 1, s.dim - 1)) + at;
#pragma unroll
    for (int n = 0; n < Tiles<kWindow>::kRows; ++n) {
      own[n][0] = factor * static_cast<float>(*first);
      own[n][1] = factor * static_cast<float>(*second);
      first += lane.step(s, n) * s.step();
      second += lane.step(s, n) * s.step();
    }
  }
}

template <int kWindow, class T, Layout kLayout>
__device__ void store_own(T* data, const float (&own)[Tiles<kWindow>::kRows][2], const Lane<kWindow>& lane,
                          const Map<kLayout>& s, int chunk) {
  const int d = chunk + 2 * lane.r, rows = lane.x < s.width ? s.height - lane.y : 0;
  const int64_t at = (static_cast<int64_t>(lane.y) * s.width + lane.x) * s.step();
  if constexpr (kLayout == Layout::pixels) {
    T* to = data + d + at;
#pragma unroll
    for (int n = 0; n < Tiles<kWindow>::kRows; ++n) {
      if (n < rows) *reinterpret_cast<Vector<T, 2>*>(to) = {own[n][0], own[n][1]};
      to += s.width * s.step();
    }
  } else {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      T* to = data + s.offset(d + c) + at;
      const int count = d + c < s.dim ? rows : 0;
#pragma unroll
      for (int n = 0; n < Tiles<kWindow>::kRows; ++n) {
        if (n < count) *to = static_cast<T>(own[n][c]);
        to += s.width * s.step();
      }
    }
  }
}

// kCount floats, a multiple of four, into shared memory.
template <int kCount>
__device__ void copy(float* shared, const float* data) {
#pragma unroll
  for (int n = 0; n < kCount / 4; n += kWarps * 32)
    if (const int i = n + static_cast<int>(threadIdx.x); i < kCount / 4)
      reinterpret_cast<float4*>(shared)[i] = reinterpret_cast<const float4*>(data)[i];
}

// A lane's share of the factor for one p and eight candidates: B of a product, as high and low terms.
template <bool kSplit>
struct Constant {
  float high[2], low[2];

  Constant() = default;
  __device__ Constant(const float* packed, int lane) {
    if constexpr (kSplit) {
      const float4 terms = reinterpret_cast<const float4*>(packed)[lane];
      high[0] = terms.x, high[1] = terms.y, low[0] = terms.z, low[1] = terms.w;
    } else {
      const float2 terms = reinterpret_cast<const float2*>(packed)[lane];
      high[0] = terms.x, high[1] = terms.y, low[0] = low[1] = 0.0f;
    }
  }
};

// Candidates of a lane's pixels: 2r and 2r + 1 of each eight.
template <int kWindow>
struct Candidates {
  float values[Tiles<kWindow>::kEights][Tiles<kWindow>::kRows][2];
};

// sums += sum_d,p left[d] tile[d](x+p) V[d,j,p] for a chunk.
template <int kWindow, bool kSplit>
__device__ void project(psf::Sum<kSplit> (&sums)[Tiles<kWindow>::kPairs][Tiles<kWindow>::kEights],
                        const float (&left)[Tiles<kWindow>::kRows][2], const float* tile, const float* factor,
                        const Lane<kWindow>& at) {
  using G = Tiles<kWindow>;
  using F = Factor<kWindow, kSplit>;
  const int lane = threadIdx.x % 32;
  const float* from = tile + at.first();
  const auto add = [&](const auto& near, int p) {  // near(n): the lane's two channels beside its n-th pixel
#pragma unroll
    for (int e = 0; e < G::kEights; ++e) {
      const Constant<kSplit> constant(factor + (p * G::kEights + e) * F::kEight, lane);
#pragma unroll
      for (int t = 0; t < G::kPairs; ++t) {
        const float2 upper = near(2 * t), lower = near(2 * t + 1);
        const float a[4] = {left[2 * t][0], left[2 * t + 1][0], left[2 * t][1], left[2 * t + 1][1]};
        const float b[4] = {upper.x, lower.x, upper.y, lower.y};
        sums[t][e].add(psf::Operand<kSplit>(a, b), constant);
      }
    }
  };
  const auto close = [&] {
#pragma unroll
    for (int t = 0; t < G::kPairs; ++t)
#pragma unroll
      for (int e = 0; e < G::kEights; ++e) sums[t][e].close();
  };
#pragma unroll 1
  for (int dx = 0; dx < kWindow; ++dx) {
    float2 column[G::kRows + 2 * G::kRadius];
#pragma unroll
    for (int n = 0; n < G::kRows + 2 * G::kRadius; ++n)
      column[n] = *reinterpret_cast<const float2*>(from + 2 * (n * G::Halo::kWidth + dx));
#pragma unroll
    for (int dy = 0; dy < kWindow; ++dy) add([&](int n) { return column[n + dy]; }, dy * kWindow + dx);
    close();
  }
  add([](int) { return make_float2(1.0f, 1.0f); }, G::J);
  close();
}

// Sum or maximum over the four lanes that hold the candidates of a pixel.
template <class Combine>
__device__ float across(float value, Combine combine) {
  value = combine(value, __shfl_xor_sync(0xffffffffu, value, 1));
  return combine(value, __shfl_xor_sync(0xffffffffu, value, 2));
}

__device__ float sum_across(float value) {
  return across(value, [](float a, float b) { return a + b; });
}

// Logits become attention less 1 / J; four lanes hold the candidates of a pixel, the last candidate's logit is 0.
template <int kWindow>
__device__ void softmax(Candidates<kWindow>& logits, float scale) {
  using G = Tiles<kWindow>;
#pragma unroll
  for (int n = 0; n < G::kRows; ++n) {
    float largest = 0.0f, total = 0.0f;
#pragma unroll
    for (int e = 0; e < G::kEights; ++e)
#pragma unroll
      for (float& logit : logits.values[e][n]) {
        logit *= scale;
        largest = fmaxf(largest, logit);
        total += 0.0f * logit;  // NaN where a logit is not finite: the difference of two that were not is lost
      }
    largest = across(largest, [](float a, float b) { return fmaxf(a, b); });
#pragma unroll
    for (int e = 0; e < G::kEights; ++e)
#pragma unroll
      for (float& logit : logits.values[e][n]) total += logit = expf(logit - largest);
    total = sum_across(total) + expf(-largest);
    const float inverse = 1.0f / total;
#pragma unroll
    for (int e = 0; e < G::kEights; ++e)
#pragma unroll
      for (float& logit : logits.values[e][n]) logit = logit * inverse - 1.0f / G::J;
  }
}

// Candidates as A of products.
template <int kWindow, bool kSplit>
struct Rows {
  psf::Operand<kSplit> values[Tiles<kWindow>::kPairs][Tiles<kWindow>::kEights];

  __device__ explicit Rows(const Candidates<kWindow>& c) {
#pragma unroll
    for (int t = 0; t < Tiles<kWindow>::kPairs; ++t)
#pragma unroll
      for (int e = 0; e < Tiles<kWindow>::kEights; ++e) {
        const float (&upper)[2] = c.values[e][2 * t], (&lower)[2] = c.values[e][2 * t + 1];
        const float a[4] = {kUp<kSplit> * upper[0], kUp<kSplit> * lower[0], kUp<kSplit> * upper[1],
                            kUp<kSplit> * lower[1]};
        values[t][e] = psf::Operand<kSplit>(a);
      }
  }
};

// out[n] += near(n) (mean + sum_e rows[n] constants[e]) for a lane's pixels n and two channels of each. Where TF32 will
// do, the mean begins the chain of products, which would make it less accurate than float32.
template <bool kSplit, int kPairs, int kEights, class Near>
__device__ void add_products(float (&out)[2 * kPairs][2], const Near& near, float2 mean,
                             const psf::Operand<kSplit> (&rows)[kPairs][kEights],
                             const Constant<kSplit> (&constants)[kEights]) {
  float sums[kPairs][4];
#pragma unroll
  for (float (&sum)[4] : sums) {
    sum[0] = sum[2] = kSplit ? 0.0f : mean.x;
    sum[1] = sum[3] = kSplit ? 0.0f : mean.y;
  }
#pragma unroll
  for (int term = 0; term < psf::kTerms<kSplit>; ++term)
#pragma unroll
    for (int e = 0; e < kEights; ++e)
#pragma unroll
      for (int t = 0; t < kPairs; ++t) psf::add_term<kSplit>(sums[t], rows[t][e], constants[e], term);
#pragma unroll
  for (int n = 0; n < 2 * kPairs; ++n) {
    const float2 value = near(n);
    const float first = sums[n / 2][n % 2 * 2], second = sums[n / 2][n % 2 * 2 + 1];
    out[n][0] += value.x * (kSplit ? mean.x + first : first);
    out[n][1] += value.y * (kSplit ? mean.y + second : second);
  }
}

// out[d] += sum_p tile[d](x+p) (base[d,p] + sum_j V[d,j,p] c_j) for a chunk; base: [p][8 channels], or null for none.
template <int kWindow, bool kSplit>
__device__ void transfer(float (&out)[Tiles<kWindow>::kRows][2], const Rows<kWindow, kSplit>& rows, const float* tile,
                         const float* factor, const float* base, const Lane<kWindow>& at) {
  using G = Tiles<kWindow>;
  using F = Factor<kWindow, kSplit>;
  const int lane = threadIdx.x % 32;
  const float* from = tile + at.first();
  const auto add = [&](const auto& near, int p) {
    const float2 mean =
        base == nullptr ? make_float2(0.0f, 0.0f) : *reinterpret_cast<const float2*>(base + p * kChunk + 2 * at.r);
    Constant<kSplit> constants[G::kEights];
#pragma unroll
    for (int e = 0; e < G::kEights; ++e)
      constants[e] = Constant<kSplit>(factor + (p * G::kEights + e) * F::kEight, lane);
    add_products<kSplit>(out, near, mean, rows.values, constants);
  };
#pragma unroll 1
  for (int dx = 0; dx < kWindow; ++dx) {
    float2 column[G::kRows + 2 * G::kRadius];
#pragma unroll
    for (int n = 0; n < G::kRows + 2 * G::kRadius; ++n)
      column[n] = *reinterpret_cast<const float2*>(from + 2 * (n * G::Halo::kWidth + dx));
#pragma unroll
    for (int dy = 0; dy < kWindow; ++dy) add([&](int n) { return column[n + dy]; }, dy * kWindow + dx);
  }
  add([](int) { return make_float2(1.0f, 1.0f); }, G::J);
}

// sum_d left[d] nb(right)[d,j] less that of the last candidate, for all channels of a head.
template <int kWindow, bool kSplit, class T, Layout kLayout>
__device__ void contract(Candidates<kWindow>& result, const T* left, const T* right,
                         const Factor<kWindow, kSplit>& factor, float* tile, float* constants,
                         const Lane<kWindow>& lane, const Place& at, const Map<kLayout>& s) {
  using G = Tiles<kWindow>;
  psf::Sum<kSplit> sums[G::kPairs][G::kEights];
  for (int chunk = 0; chunk < s.dim; chunk += kChunk) {
    float own[G::kRows][2];
    load_own<kWindow>(own, left, lane, s, chunk, kUp<kSplit>);
    __syncthreads();  // what was loaded before has been read
    load_halo<typename G::Halo>(tile, right + s.offset(chunk), s.dim - chunk, at.x0, at.y0, s);
    copy<Factor<kWindow, kSplit>::kKind>(constants, factor.kind(chunk, 0));
    __syncthreads();
    project<kWindow, kSplit>(sums, own, tile, constants, lane);
  }
#pragma unroll
  for (int e = 0; e < G::kEights; ++e)
#pragma unroll
    for (int n = 0; n < G::kRows; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) result.values[e][n][i] = sums[n / 2][e][n % 2 * 2 + i];
}

template <class T, int kWindow, bool kSplit, Layout kLayout>
__global__ void __launch_bounds__(kWarps * 32, 2)
    learned_forward_kernel(Inputs<T> in, Factor<kWindow, kSplit> factor, Both<T> outs, Map<kLayout> s) {
  using G = Tiles<kWindow>;
  using F = Factor<kWindow, kSplit>;
  PSF_DYNAMIC_SHARED(float, tile);
  float* const constants = tile + G::kTile;
  float* const base = constants + F::kKind;
  const Place at = place_of(blockIdx.x, s, G::kTileHeight);
  const Lane<kWindow> lane(at);
  for (int m = 0; m < 2; ++m) {
    Candidates<kWindow> attention;
    contract<kWindow, kSplit>(attention, in.q + at.base, in.k[m] + at.base, factor, tile, constants, lane, at, s);
    softmax<kWindow>(attention, in.scale);
    const Rows<kWindow, kSplit> rows(attention);
    for (int chunk = 0; chunk < s.dim; chunk += kChunk) {
      __syncthreads();
      load_halo<typename G::Halo>(tile, in.v[m] + at.base + s.offset(chunk), s.dim - chunk, at.x0, at.y0, s);
      copy<F::kKind + F::kBase>(constants, factor.kind(chunk, 1));
      __syncthreads();
      float out[G::kRows][2] = {};
      transfer<kWindow, kSplit>(out, rows, tile, constants, base, lane);
      store_own<kWindow>(outs[m] + at.base, out, lane, s, chunk);
    }
  }
}

template <class T, int kWindow>
__global__ void __launch_bounds__(kWarps * 32) shift_forward_kernel(Inputs<T> in, Both<T> outs, Shape s) {
  using G = Geometry<kWindow>;
  PSF_SHARED(float, tile, kChunk* G::kHaloArea);
  const Place at = place_of(blockIdx.x, s, G::kTileHeight);
  const int tx = threadIdx.x % 32, ty = threadIdx.x / 32 * G::kPixels;
  const int x = at.x0 + tx, y = at.y0 + ty;
  const auto load = [&](const T* data, int chunk) {
    __syncthreads();  // the previous chunk has been read
    load_tile(tile, data + at.base, s, chunk, at.x0, at.y0, G::kHaloWidth, G::kHaloArea, G::kHaloArea, G::kRadius);
    __syncthreads();
  };
  for (int m = 0; m < 2; ++m) {
    float attention[G::kPixels][G::J] = {};
    for (int chunk = 0; chunk < s.dim; chunk += kChunk) {
      load(in.k[m], chunk);
      add_dots<kWindow>(attention, in.q + at.base, tile, s, chunk, x, y, tx, ty);
    }
    softmax(attention, in.scale);
    T* out = outs[m] + at.base;
    for (int chunk = 0; chunk < s.dim; chunk += kChunk) {
      load(in.v[m], chunk);
#pragma unroll 1
      for (int d = 0; d < kChunk; ++d) {
        float mixed[G::kPixels] = {};
        add_mix<kWindow>(mixed, attention, tile, d, tx, ty);
#pragma unroll
        for (int n = 0; n < G::kPixels; ++n) store_pixel(out, mixed[n], s, chunk + d, x, y + n);
      }
    }
  }
}

// Planes of `count` candidates: [2 modalities][attention, scale * logit gradient][images * heads][count][H * W]. All J;
// with learned neighbours J - 1, and attention less 1 / J.
struct Workspace {
  float* data;
  int64_t plane;  // images * heads * count * H * W
  __device__ float* at(int modality, int kind, int64_t head, int64_t area, int count) const {
    return data + (modality * 2 + kind) * plane + head * count * area;
  }
};

// Attention and logit gradients of both modalities to the workspace, and the gradient of q:
//   g_j = grad.nb(v)[:,j],  ds_j = scale a_j (g_j - sum_i a_i g_i),  dq[d] = sum over modalities sum_j ds_j nb(k)[d,j].
template <class T, int kWindow>
__global__ void __launch_bounds__(kWarps * 32)
    backward_query_kernel(Inputs<T> in, Both<const T> grads, T* grad_q, Workspace workspace, Shape s) {
  using G = Geometry<kWindow>;
  PSF_SHARED(float, tile, kChunk* G::kHaloArea);
  PSF_SHARED(float, sums, kChunk* G::kPixels * kWarps * 32);
  const Place at = place_of(blockIdx.x, s, G::kTileHeight);
  const int tx = threadIdx.x % 32, ty = threadIdx.x / 32 * G::kPixels;
  const int x = at.x0 + tx, y = at.y0 + ty;
  const int64_t area = static_cast<int64_t>(s.height) * s.width;
  const auto load = [&](const T* data, int chunk) {
    __syncthreads();
    load_tile(tile, data + at.base, s, chunk, at.x0, at.y0, G::kHaloWidth, G::kHaloArea, G::kHaloArea, G::kRadius);
    __syncthreads();
  };
  for (int m = 0; m < 2; ++m) {
    float attention[G::kPixels][G::J] = {}, change[G::kPixels][G::J] = {};
    for (int chunk = 0; chunk < s.dim; chunk += kChunk) {
      load(in.k[m], chunk);
      add_dots<kWindow>(attention, in.q + at.base, tile, s, chunk, x, y, tx, ty);
      load(in.v[m], chunk);
      const T* grad = grads[m] + at.base;
      add_dots<kWindow>(change, grad, tile, s, chunk, x, y, tx, ty);
    }
    softmax(attention, in.scale);
#pragma unroll
    for (int n = 0; n < G::kPixels; ++n) {
      if (x >= s.width || y + n >= s.height) continue;
      psf::cm3a::softmax_backward(attention[n], change[n], in.scale);
      const int64_t pixel = static_cast<int64_t>(y + n) * s.width + x;
#pragma unroll
      for (int j = 0; j < G::J; ++j) {
        workspace.at(m, 0, at.head, area, G::J)[j * area + pixel] = attention[n][j];
        workspace.at(m, 1, at.head, area, G::J)[j * area + pixel] = change[n][j];
      }
    }
  }
  for (int chunk = 0; chunk < s.dim; chunk += kChunk)
    for (int m = 0; m < 2; ++m) {
      load(in.k[m], chunk);
      float slope[G::kPixels][G::J];  // as this thread left it above
#pragma unroll
      for (int n = 0; n < G::kPixels; ++n)
#pragma unroll
        for (int j = 0; j < G::J; ++j)
          slope[n][j] =
              x < s.width && y + n < s.height
                  ? workspace.at(m, 1, at.head, area, G::J)[j * area + static_cast<int64_t>(y + n) * s.width + x]
                  : 0.0f;
#pragma unroll 1
      for (int d = 0; d < kChunk; ++d) {
        float mixed[G::kPixels] = {};
        add_mix<kWindow>(mixed, slope, tile, d, tx, ty);
#pragma unroll
        for (int n = 0; n < G::kPixels; ++n) {
          float& sum = sums[(d * G::kPixels + n) * kWarps * 32 + threadIdx.x];  // a thread's own
          if (m == 0)
            sum = mixed[n];
          else
            store_pixel(grad_q + at.base, sum + mixed[n], s, chunk + d, x, y + n);
        }
      }
    }
}

// Gradients of keys and values, gathered: with L = q and c = ds for keys, L = grad and c = a for values,
//   d[d](y) = sum_p L[d](y-p) sum_j W[d,j,p] c_j(y-p).
// No two threads write the same element, so the result does not depend on scheduling. One thread, one pixel.
template <class T, int kWindow>
__global__ void __launch_bounds__(kWarps * 32)
    backward_neighbour_kernel(const T* q, Both<const T> grads, Both<T> grads_k, Both<T> grads_v, Workspace workspace,
                              Shape s) {
  using G = Geometry<kWindow>;
  const Place at = place_of(blockIdx.x, s, kWarps);
  const int x = at.x0 + static_cast<int>(threadIdx.x % 32), y = at.y0 + static_cast<int>(threadIdx.x / 32);
  const int64_t area = static_cast<int64_t>(s.height) * s.width;
  for (int chunk = 0; chunk < s.dim; chunk += kChunk)
    for (int m = 0; m < 2; ++m)
      for (int kind = 0; kind < 2; ++kind) {  // 0: values, 1: keys
        const T* left = (kind == 1 ? q : grads[m]) + at.base;
        const float* factor = workspace.at(m, kind, at.head, area, G::J);
        T* result = (kind == 1 ? grads_k[m] : grads_v[m]) + at.base;
        float sums[kChunk] = {};
#pragma unroll 1
        for (int p = 0; p < G::J; ++p) {
          const int from_x = x - (p % kWindow - G::kRadius), from_y = y - (p / kWindow - G::kRadius);
          if (from_x < 0 || from_x >= s.width || from_y < 0 || from_y >= s.height) continue;
          const float c = factor[p * area + static_cast<int64_t>(from_y) * s.width + from_x];
#pragma unroll
          for (int d = 0; d < kChunk; ++d) sums[d] += load_pixel(left, s, chunk + d, from_x, from_y) * c;
        }
#pragma unroll
        for (int d = 0; d < kChunk; ++d) store_pixel(result, sums[d], s, chunk + d, x, y);
      }
}

// As backward_query_kernel. ds does not change when all g of a pixel do alike, and sums to zero.
template <class T, int kWindow, bool kSplit, Layout kLayout>
__global__ void __launch_bounds__(kWarps * 32, 2)
    learned_backward_query_kernel(Inputs<T> in, Factor<kWindow, kSplit> factor, Both<const T> grads, T* grad_q,
                                  Workspace workspace, Map<kLayout> s) {
  using G = Tiles<kWindow>;
  PSF_DYNAMIC_SHARED(float, tile);
  float* const constants = tile + G::kTile;
  const Place at = place_of(blockIdx.x, s, G::kTileHeight);
  const Lane<kWindow> lane(at);
  const auto planes = s.planes(G::J - 1);
  const int64_t area = planes.channel;
  for (int m = 0; m < 2; ++m) {
    Candidates<kWindow> attention, slope;
    contract<kWindow, kSplit>(attention, in.q + at.base, in.k[m] + at.base, factor, tile, constants, lane, at, s);
    softmax<kWindow>(attention, in.scale);
    const auto store = [&](int kind, const Candidates<kWindow>& c) {
#pragma unroll
      for (int e = 0; e < G::kEights; ++e)
        store_own<kWindow>(workspace.at(m, kind, at.head, area, G::J - 1), c.values[e], lane, planes, 8 * e);
    };
    store(0, attention);
    contract<kWindow, kSplit>(slope, grads[m] + at.base, in.v[m] + at.base, factor, tile, constants, lane, at, s);
#pragma unroll
    for (int n = 0; n < G::kRows; ++n) {
      float mean = 0.0f;
#pragma unroll
      for (int e = 0; e < G::kEights; ++e)
#pragma unroll
        for (int i = 0; i < 2; ++i) mean += (attention.values[e][n][i] + 1.0f / G::J) * slope.values[e][n][i];
      mean = sum_across(mean);
#pragma unroll
      for (int e = 0; e < G::kEights; ++e)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          slope.values[e][n][i] = in.scale * (attention.values[e][n][i] + 1.0f / G::J) * (slope.values[e][n][i] - mean);
    }
    store(1, slope);
  }
  for (int chunk = 0; chunk < s.dim; chunk += kChunk) {
    float out[G::kRows][2] = {};
    for (int m = 0; m < 2; ++m) {
      Candidates<kWindow> slope;  // as this lane left it above
#pragma unroll
      for (int e = 0; e < G::kEights; ++e)
        load_own<kWindow>(slope.values[e], workspace.at(m, 1, at.head, area, G::J - 1), lane, planes, 8 * e, 1.0f);
      __syncthreads();
      load_halo<typename G::Halo>(tile, in.k[m] + at.base + s.offset(chunk), s.dim - chunk, at.x0, at.y0, s);
      copy<Factor<kWindow, kSplit>::kKind>(constants, factor.kind(chunk, 1));
      __syncthreads();
      transfer<kWindow, kSplit>(out, Rows<kWindow, kSplit>(slope), tile, constants, nullptr, lane);
    }
    store_own<kWindow>(grad_q + at.base, out, lane, s, chunk);
  }
}

// out[d](y) += sum_p left[d](y-p) (base[d,p] + sum_j V[d,j,p] c_j(y-p)) for a chunk; base as for transfer.
template <int kWindow, bool kSplit>
__device__ void gather(float (&out)[Tiles<kWindow>::kRows][2], const float* left, const float* c, const float* factor,
                       const float* base, const Lane<kWindow>& at) {
  using G = Tiles<kWindow>;
  using F = Factor<kWindow, kSplit>;
  constexpr int kColumn = G::kRows + 2 * G::kRadius;
  const int lane = threadIdx.x % 32, first = at.first();
#pragma unroll 1
  for (int dx = 0; dx < kWindow; ++dx) {
    const auto load = [&](float2(&column)[kColumn], const float* tile) {
#pragma unroll
      for (int n = 0; n < kColumn; ++n)
        column[n] = *reinterpret_cast<const float2*>(tile + first + 2 * (n * G::Halo::kWidth + dx));
    };
    float2 values[kColumn], candidates[G::kEights][kColumn];
    load(values, left);
#pragma unroll
    for (int e = 0; e < G::kEights; ++e) load(candidates[e], c + e * G::kTile);
#pragma unroll
    for (int dy = 0; dy < kWindow; ++dy) {
      const int p = G::J - 1 - (dy * kWindow + dx);  // from the source at (dx, dy) this pixel is the opposite way
      const float2 mean =
          base == nullptr ? make_float2(0.0f, 0.0f) : *reinterpret_cast<const float2*>(base + p * kChunk + 2 * at.r);
      Constant<kSplit> constants[G::kEights];
      psf::Operand<kSplit> rows[G::kPairs][G::kEights];
#pragma unroll
      for (int e = 0; e < G::kEights; ++e) {
        constants[e] = Constant<kSplit>(factor + (p * G::kEights + e) * F::kEight, lane);
#pragma unroll
        for (int t = 0; t < G::kPairs; ++t) {
          const float2 upper = candidates[e][2 * t + dy], lower = candidates[e][2 * t + 1 + dy];
          const float a[4] = {kUp<kSplit> * upper.x, kUp<kSplit> * lower.x, kUp<kSplit> * upper.y,
                              kUp<kSplit> * lower.y};
          rows[t][e] = psf::Operand<kSplit>(a);
        }
      }
      add_products<kSplit>(out, [&](int n) { return values[n + dy]; }, mean, rows, constants);
    }
  }
}

// As backward_neighbour_kernel.
template <class T, int kWindow, bool kSplit, Layout kLayout>
__global__ void __launch_bounds__(kWarps * 32, 2)
    learned_backward_neighbour_kernel(const T* q, Factor<kWindow, kSplit> factor, Both<const T> grads, Both<T> grads_k,
                                      Both<T> grads_v, Workspace workspace, Map<kLayout> s) {
  using G = Tiles<kWindow>;
  using F = Factor<kWindow, kSplit>;
  PSF_DYNAMIC_SHARED(float, tile);
  float* const constants = tile + G::kTile;
  float* const base = constants + F::kKind;
  float* const candidates = base + F::kBase;
  const Place at = place_of(blockIdx.x, s, G::kTileHeight);
  const Lane<kWindow> lane(at);
  const auto planes = s.planes(G::J - 1);
  const int64_t area = planes.channel;
  for (int m = 0; m < 2; ++m)
    for (int kind = 0; kind < 2; ++kind) {  // 0: values, 1: keys
      const T* left = (kind == 1 ? q : grads[m]) + at.base;
      T* result = (kind == 1 ? grads_k[m] : grads_v[m]) + at.base;
      __syncthreads();
      for (int e = 0; e < G::kEights; ++e)
        load_halo<typename G::Halo>(candidates + e * G::kTile,
                                    workspace.at(m, kind, at.head, area, G::J - 1) + planes.offset(8 * e), kChunk,
                                    at.x0, at.y0, planes);
      for (int chunk = 0; chunk < s.dim; chunk += kChunk) {
        if (chunk > 0) __syncthreads();
        load_halo<typename G::Halo>(tile, left + s.offset(chunk), s.dim - chunk, at.x0, at.y0, s);
        copy<F::kKind + F::kBase>(constants, factor.kind(chunk, 1));
        __syncthreads();
        float out[G::kRows][2] = {};
        gather<kWindow, kSplit>(out, tile, candidates, constants, kind == 0 ? base : nullptr, lane);
        store_own<kWindow>(result, out, lane, s, chunk);
      }
    }
}

// Gradients of W and b: with L, R, c as above (R = k or v), over pixels, heads, images, modalities, keys and values,
//   dW[d,j,p] = sum c_j(x) L[d](x) R[d](x+p),   db[d,j] = sum c_j(x) L[d](x)   (p = J).
// On the tensor cores with pixels as the sum's index: [8 channels of two offsets, 8 pixels] x [8 pixels, 8 candidates].
// The last candidate follows from the others as sum_j a_j = 1 and sum_j ds_j = 0: with c_j less 1 / J for values and
//   S[d,p] = sum L[d](x) R[d](x+p) over values only,
// dW[d,j,p] is sum c_j L R + S / J, and that of the last S / J less the other sums.
// A block walks over tiles with one chunk of channels; groups of its warps share the offsets, the warps of a group the
// pixels. A lane (q, r) owns pixels 2r and 2r + 1 of eight along x: channel q of L and candidate q, which nobody else
// needs, come straight from memory. Sums of blocks go to `partial` [blocks of a chunk][dim][J + 1][J], S as last
// candidate, and are added up in a fixed order afterwards.
template <int kWindow>
struct WeightTiles {
  static constexpr int J = kWindow * kWindow;
  static constexpr int kRadius = kWindow / 2;
  static constexpr int kEights = J / 8;  // of candidates
  static constexpr int kGroups = kWindow == 3 ? 1 : 8;
  static constexpr int kSlices = kWarps / kGroups;
  static constexpr int kPairs = ((J + 2) / 2 + kGroups - 1) / kGroups;  // of offsets a warp owns
  static constexpr int kRows = 4;                                       // of pixels a warp owns
  static constexpr int kTileHeight = kSlices == 1 ? kRows : 2 * kRows;
  using Halo = ::Halo<kRadius, kTileHeight, 1>;
  static constexpr int kSums = kChunk * (J + 1) * J;
  static constexpr int kShared = std::max(Halo::kFloats, kSlices* kSums);
};

// Of one channel the pixels x and x + 1 in rows y and below, zero outside the image; x is even.
template <int kRows, class T, Layout kLayout>
__device__ void load_twos(float (&twos)[kRows][2], const T* data, int x, int y, const Map<kLayout>& s) {
  if constexpr (kLayout == Layout::rows) {
    const T* from = data + static_cast<int64_t>(y) * s.width + x;
#pragma unroll
    for (int n = 0; n < kRows; ++n) {
      Vector<T, 2> two = {};
      if (x < s.width && y + n < s.height) two = *reinterpret_cast<const Vector<T, 2>*>(from);
      twos[n][0] = two[0];
      twos[n][1] = two[1];
      from += s.width;
    }
  } else {
#pragma unroll
    for (int n = 0; n < kRows; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bool inside = x + i < s.width && y + n < s.height;
        twos[n][i] =
            inside ? static_cast<float>(data[static_cast<int64_t>((y + n) * s.width + x + i) * s.pixel]) : 0.0f;
      }
  }
}

template <class T, int kWindow, bool kSplit, Layout kLayout>
__global__ void __launch_bounds__(kWarps * 32, 2)
    backward_weight_kernel(Inputs<T> in, Both<const T> grads, Workspace workspace, float* partial, int64_t tiles,
                           int chunks, Map<kLayout> s) {
  using G = WeightTiles<kWindow>;
  PSF_SHARED(float, right, G::kShared);
  const int lane = threadIdx.x % 32, q = lane / 4, r = lane % 4, warp = threadIdx.x / 32;
  const int slice = warp % G::kSlices;
  const int first = G::kGroups == 1 ? 0 : warp / G::kSlices * G::kPairs * 2;
  const int chunk = static_cast<int>(blockIdx.x) % chunks * kChunk;
  const int walker = static_cast<int>(blockIdx.x) / chunks, walkers = static_cast<int>(gridDim.x) / chunks;
  const auto planes = s.planes(G::J - 1);
  const int row = slice / 4 * G::kRows;
  float sums[G::kPairs][G::kEights][4] = {};
  float whole[G::kPairs][2] = {};  // S
  for (int64_t tile = walker; tile < tiles; tile += walkers) {
    const Place at = place_of(tile, s, G::kTileHeight);
    for (int m = 0; m < 2; ++m)
      for (int kind = 0; kind < 2; ++kind) {  // 0: values, 1: keys
        const T* l = (kind == 1 ? in.q : grads[m]) + at.base;
        const T* near = (kind == 1 ? in.k[m] : in.v[m]) + at.base;
        const float* c = workspace.at(m, kind, at.head, planes.channel, G::J - 1);
        __syncthreads();
        load_halo<typename G::Halo>(right, near + s.offset(chunk), s.dim - chunk, at.x0, at.y0, s);
        __syncthreads();
#pragma unroll 1
        for (int x = slice % 4 * 8 + 2 * r; x < kTileWidth; x += 8 * std::min(4, G::kSlices)) {
          float left[G::kRows][2], candidates[G::kEights][G::kRows][2];
          load_twos(left, l + s.offset(min(chunk + q, s.dim - 1)), at.x0 + x, at.y0 + row, s);
#pragma unroll
          for (int e = 0; e < G::kEights; ++e)
            load_twos(candidates[e], c + planes.offset(8 * e + q), at.x0 + x, at.y0 + row, planes);
          const float* const around = right + G::Halo::offset(q, row, x);
#pragma unroll
          for (int n = 0; n < G::kRows; ++n) {
            // R at offset p from the lane's i-th pixel
            const auto beside = [&](int p, int i) {
              if (p >= G::J) return p == G::J ? 1.0f : 0.0f;
              return around[(n + p / kWindow) * G::Halo::kWidth + p % kWindow + i];
            };
            psf::Terms<2> columns[G::kEights];
#pragma unroll
            for (int e = 0; e < G::kEights; ++e) columns[e] = psf::Terms<2>(candidates[e][n]);
            const float a[4] = {kUp<kSplit> * left[n][0], kUp<kSplit> * left[n][0], kUp<kSplit> * left[n][1],
                                kUp<kSplit> * left[n][1]};
#pragma unroll
            for (int i = 0; i < G::kPairs; ++i) {
              const int p = first + 2 * i;
              const float b[4] = {beside(p, 0), beside(p + 1, 0), beside(p, 1), beside(p + 1, 1)};
              const psf::Operand<kSplit> rows(a, b);
#pragma unroll
              for (int e = 0; e < G::kEights; ++e) psf::add<kSplit>(sums[i][e], rows, columns[e]);
              if (kind == 0) {
                whole[i][0] += left[n][0] * b[0] + left[n][1] * b[2];
                whole[i][1] += left[n][0] * b[1] + left[n][1] * b[3];
              }
            }
          }
        }
      }
  }
  __syncthreads();
  float* const slices = right;  // [kSlices][kChunk][J + 1][J]
#pragma unroll
  for (int i = 0; i < G::kPairs; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int p = first + 2 * i + half;
      const float all = sum_across(whole[i][half]);
      if (p > G::J) continue;
      float* const to = slices + slice * G::kSums + (q * (G::J + 1) + p) * G::J;
#pragma unroll
      for (int e = 0; e < G::kEights; ++e)
#pragma unroll
        for (int n = 0; n < 2; ++n) to[8 * e + 2 * r + n] = sums[i][e][2 * half + n];
      if (r == 0) to[G::J - 1] = all;
    }
  __syncthreads();
  for (int i = threadIdx.x; i < G::kSums; i += blockDim.x) {
    float sum = 0.0f;
    for (int n = 0; n < G::kSlices; ++n) sum += slices[n * G::kSums + i];
    const int d = chunk + i / ((G::J + 1) * G::J);
    if (d < s.dim)
      partial[(static_cast<int64_t>(walker) * s.dim + d) * (G::J + 1) * G::J + i % ((G::J + 1) * G::J)] = sum;
  }
}

// Adds the partial sums up, always in the same order: a block for one d and p, a warp for each candidate.
template <int J>
__global__ void reduce_kernel(const float* partial, float* grad_weight, float* grad_bias, int count, int dim) {
  PSF_SHARED(float, sums, J);
  const int lane = threadIdx.x % 32, j = threadIdx.x / 32, p = blockIdx.x % (J + 1), d = blockIdx.x / (J + 1);
  float sum = 0.0f;
  for (int n = lane; n < count; n += 32) sum += partial[(static_cast<int64_t>(n) * dim * (J + 1) + blockIdx.x) * J + j];
#pragma unroll
  for (int other = 16; other > 0; other /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
  if (lane == 0) sums[j] = sum;
  __syncthreads();
  if (lane > 0) return;
  sum = sums[J - 1] / J;
  if (j < J - 1) {
    sum += sums[j];
  } else {
    for (int i = 0; i < J - 1; ++i) sum -= sums[i];
  }
  if (p < J)
    grad_weight[(d * J + j) * J + p] = sum;
  else
    grad_bias[d * J + j] = sum;
}

// ---- Host side ----------------------------------------------------------------------------------------------------

Shape shape_of(const Tensor& q, int64_t heads, bool channels_last) {
  const int64_t channels = q.size(1), height = q.size(2), width = q.size(3);
  STD_TORCH_CHECK(height < (1 << 30) && width < (1 << 30) && height * width < (int64_t{1} << 31),
                  "cm3a: height, width: expected fewer than 2^31 pixels, below 2^30 along each, got ", height, " x ",
                  width);
  Shape s;
  s.image = channels * height * width;
  s.channel = channels_last ? 1 : static_cast<int>(height * width);
  s.pixel = channels_last ? static_cast<int>(channels) : 1;
  s.heads = static_cast<int>(heads);
  s.dim = static_cast<int>(channels / heads);
  s.height = static_cast<int>(height);
  s.width = static_cast<int>(width);
  s.channels_last = channels_last;
  return s;
}

// Sets the tiling and returns how many tiles all heads of all images have.
int64_t tile(Shape& s, int64_t batch, int tile_height) {
  s.tiles_x = (s.width + kTileWidth - 1) / kTileWidth;
  s.tiles_y = (s.height + tile_height - 1) / tile_height;
  return batch * s.heads * s.tiles_x * s.tiles_y;
}

dim3 grid_of(int64_t blocks) {
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31), "cm3a: expected fewer than 2^31 tiles, got ", blocks);
  return dim3(static_cast<unsigned>(blocks));
}

Tensor dense(const Tensor& t, bool channels_last) {
  using torch::headeronly::MemoryFormat;
  return torch::stable::contiguous(t, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

template <class T>
T* pointer(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <class T>
Both<T> both(const Tensor& pan, const Tensor& ms) {
  return {pointer<T>(pan), pointer<T>(ms)};
}

Tensor like(const Tensor& q, bool channels_last) {
  using torch::headeronly::MemoryFormat;
  return torch::stable::empty(q.sizes(), q.scalar_type(), std::nullopt, q.device(), std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// Calls body.template operator()<scalar, window, learned>() for the run-time choice.
template <class Body>
void dispatch(ScalarType type, int64_t window, bool learned, Body body) {
  const auto with_type = [&]<class T>() {
    if (window == 3)
      learned ? body.template operator()<T, 3, true>() : body.template operator()<T, 3, false>();
    else
      learned ? body.template operator()<T, 5, true>() : body.template operator()<T, 5, false>();
  };
  STD_TORCH_CHECK(window == 3 || window == 5, "window: expected 3 or 5, got ", window);
  if (type == ScalarType::Float)
    with_type.template operator()<float>();
  else if (type == ScalarType::BFloat16)
    with_type.template operator()<c10::BFloat16>();
  else if (type == ScalarType::Half)
    with_type.template operator()<c10::Half>();
  else
    STD_TORCH_CHECK(false, "cm3a: dtype: expected float32, bfloat16 or float16");
}

struct Arguments {
  Tensor q, k_pan, v_pan, k_ms, v_ms;
  std::optional<Tensor> weight, bias;

  template <class T>
  Inputs<T> inputs(double scale) const {
    return {pointer<T>(q), both<const T>(k_pan, k_ms), both<const T>(v_pan, v_ms), static_cast<float>(scale)};
  }
};

// Calls body(Map) with the narrowest layout that all maps have.
template <class Body>
void with_layout(const Shape& s, std::initializer_list<const Tensor*> maps, Body body) {
  bool vectors = s.dim % kChunk == 0 && (s.channels_last || s.width % 4 == 0);
  for (const Tensor* map : maps)
    vectors &= reinterpret_cast<uintptr_t>(map->mutable_data_ptr()) % (kChunk * map->element_size()) == 0;
  if (!vectors)
    body(Map<Layout::any>{s});
  else if (s.channels_last)
    body(Map<Layout::pixels>{s});
  else
    body(Map<Layout::rows>{s});
}

Arguments prepare(const Tensor& q, const Tensor& k_pan, const Tensor& v_pan, const Tensor& k_ms, const Tensor& v_ms,
                  std::optional<Tensor> weight, std::optional<Tensor> bias, bool channels_last) {
  Arguments a{dense(q, channels_last),
              dense(k_pan, channels_last),
              dense(v_pan, channels_last),
              dense(k_ms, channels_last),
              dense(v_ms, channels_last),
              std::nullopt,
              std::nullopt};
  if (weight) {
    STD_TORCH_CHECK(
        weight->scalar_type() == ScalarType::Float && bias.has_value() && bias->scalar_type() == ScalarType::Float,
        "weight, bias: expected both in float32");
    a.weight = torch::stable::contiguous(*weight);
    a.bias = torch::stable::contiguous(*bias);
  }
  return a;
}

// Calls body.template operator()<kSplit>(): float32 is split where torch does not allow TF32.
template <class T, class Body>
void with_split(bool tf32, Body body) {
  if constexpr (std::is_same_v<T, float>) {
    if (!tf32) return body.template operator()<true>();
  }
  body.template operator()<false>();
}

// Calls body.template operator()<kSplit>(factor) with the packed factor.
template <class T, int kWindow, class Body>
void with_factor(const psf::Launch& launch, const Arguments& a, const Shape& s, bool tf32, Body body) {
  with_split<T>(tf32, [&]<bool kSplit>() {
    using F = Factor<kWindow, kSplit>;
    const int chunks = (s.dim + kChunk - 1) / kChunk;
    const Tensor packed =
        torch::stable::empty({int64_t{chunks} * F::kAll}, ScalarType::Float, std::nullopt, a.q.device());
    const int threads = chunks * std::max(2 * F::kKind / F::kLane, F::kBase);
    launch(pack_kernel<kWindow, kSplit>, dim3((threads + 255) / 256), dim3(256), 0,
           static_cast<const float*>(pointer<float>(*a.weight)), static_cast<const float*>(pointer<float>(*a.bias)),
           pointer<float>(packed), s.dim, chunks);
    body.template operator()<kSplit>(F{pointer<float>(packed)});
  });
}

// Shared memory of a kernel with a tile of channels, one kind of the factor and some tiles of eight candidates.
template <int kWindow, bool kSplit>
size_t shared_bytes(int eights = 0) {
  using F = Factor<kWindow, kSplit>;
  return ((1 + eights) * Tiles<kWindow>::kTile + F::kKind + F::kBase) * sizeof(float);
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k_pan, const Tensor& v_pan, const Tensor& k_ms,
                                   const Tensor& v_ms, std::optional<Tensor> weight, std::optional<Tensor> bias,
                                   int64_t num_heads, int64_t window, double scale, bool channels_last, bool tf32) {
  Tensor out_pan = like(q, channels_last), out_ms = like(q, channels_last);
  if (q.numel() == 0) return {out_pan, out_ms};
  const psf::Launch launch(q);
  const Arguments a = prepare(q, k_pan, v_pan, k_ms, v_ms, weight, bias, channels_last);
  Shape s = shape_of(q, num_heads, channels_last);
  dispatch(q.scalar_type(), window, weight.has_value(), [&]<class T, int kWindow, bool kLearned>() {
    if constexpr (kLearned) {
      const int64_t blocks = tile(s, q.size(0), Tiles<kWindow>::kTileHeight);
      with_factor<T, kWindow>(launch, a, s, tf32, [&]<bool kSplit>(const Factor<kWindow, kSplit>& factor) {
        with_layout(s, {&a.q, &a.k_pan, &a.v_pan, &a.k_ms, &a.v_ms}, [&]<Layout kLayout>(const Map<kLayout>& map) {
          launch(learned_forward_kernel<T, kWindow, kSplit, kLayout>, grid_of(blocks), dim3(kWarps * 32),
                 shared_bytes<kWindow, kSplit>(), a.inputs<T>(scale), factor, both<T>(out_pan, out_ms), map);
        });
      });
    } else {
      const int64_t blocks = tile(s, q.size(0), Geometry<kWindow>::kTileHeight);
      launch(shift_forward_kernel<T, kWindow>, grid_of(blocks), dim3(kWarps * 32), 0, a.inputs<T>(scale),
             both<T>(out_pan, out_ms), s);
    }
  });
  return {out_pan, out_ms};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_pan_, const Tensor& grad_ms_, const Tensor& q, const Tensor& k_pan, const Tensor& v_pan,
    const Tensor& k_ms, const Tensor& v_ms, std::optional<Tensor> weight, std::optional<Tensor> bias, int64_t num_heads,
    int64_t window, double scale, bool channels_last, bool tf32) {
  Tensor grads[5];
  for (Tensor& grad : grads) grad = like(q, channels_last);
  Shape s = shape_of(q, num_heads, channels_last);
  const int64_t J = window * window, batch = q.size(0);
  const bool learned = weight.has_value();
  const auto small = [&](std::initializer_list<int64_t> sizes) {
    return torch::stable::empty(sizes, ScalarType::Float, std::nullopt, q.device());
  };
  Tensor grad_weight = learned ? small({s.dim, J, window, window})
                               : torch::stable::empty({0}, q.scalar_type(), std::nullopt, q.device());
  Tensor grad_bias = learned ? small({s.dim, J}) : torch::stable::empty({0}, q.scalar_type(), std::nullopt, q.device());
  if (q.numel() == 0) {
    torch::stable::zero_(grad_weight);
    torch::stable::zero_(grad_bias);
    return {grads[0], grads[1], grads[2], grads[3], grads[4], grad_weight, grad_bias};
  }
  const psf::Launch launch(q);
  const Arguments a = prepare(q, k_pan, v_pan, k_ms, v_ms, weight, bias, channels_last);
  const Tensor grad_pan = dense(grad_pan_, channels_last), grad_ms = dense(grad_ms_, channels_last);
  // With learned neighbours the last candidate follows from the others.
  const int64_t plane = batch * num_heads * (learned ? J - 1 : J) * s.height * s.width;
  const Tensor space = small({4, plane});
  const Workspace workspace{pointer<float>(space), plane};
  dispatch(q.scalar_type(), window, learned, [&]<class T, int kWindow, bool kLearned>() {
    const Inputs<T> in = a.inputs<T>(scale);
    const dim3 block(kWarps * 32);
    const Both<const T> grads_out = both<const T>(grad_pan, grad_ms);
    const Both<T> grads_k = both<T>(grads[1], grads[3]), grads_v = both<T>(grads[2], grads[4]);
    if constexpr (!kLearned) {
      int64_t tiles = tile(s, batch, Geometry<kWindow>::kTileHeight);
      launch(backward_query_kernel<T, kWindow>, grid_of(tiles), block, 0, in, grads_out, pointer<T>(grads[0]),
             workspace, s);
      tiles = tile(s, batch, kWarps);
      launch(backward_neighbour_kernel<T, kWindow>, grid_of(tiles), block, 0, in.q, grads_out, grads_k, grads_v,
             workspace, s);
    } else {
      using W = WeightTiles<kWindow>;
      // Enough blocks to fill a large GPU; a fixed number, so that the order of addition is the same everywhere. Blocks
      // that follow each other share tiles and what they read of the workspace.
      const int64_t weight_tiles = tile(s, batch, W::kTileHeight);
      const int chunks = (s.dim + kChunk - 1) / kChunk, blocks = static_cast<int>(std::min<int64_t>(weight_tiles, 528));
      const Tensor partial = small({blocks, s.dim, W::J + 1, W::J});
      with_factor<T, kWindow>(launch, a, s, tf32, [&]<bool kSplit>(const Factor<kWindow, kSplit>& factor) {
        const auto maps = {&a.q, &a.k_pan, &a.v_pan, &a.k_ms, &a.v_ms, &grad_pan, &grad_ms};
        with_layout(s, maps, [&]<Layout kLayout>(Map<kLayout> map) {
          const int64_t tiles = tile(map, batch, Tiles<kWindow>::kTileHeight);
          launch(learned_backward_query_kernel<T, kWindow, kSplit, kLayout>, grid_of(tiles), block,
                 shared_bytes<kWindow, kSplit>(), in, factor, grads_out, pointer<T>(grads[0]), workspace, map);
          launch(learned_backward_neighbour_kernel<T, kWindow, kSplit, kLayout>, grid_of(tiles), block,
                 shared_bytes<kWindow, kSplit>(Tiles<kWindow>::kEights), in.q, factor, grads_out, grads_k, grads_v,
                 workspace, map);
          tile(map, batch, W::kTileHeight);
          launch(backward_weight_kernel<T, kWindow, kSplit, kLayout>, grid_of(int64_t{blocks} * chunks), block, 0, in,
                 grads_out, workspace, pointer<float>(partial), weight_tiles, chunks, map);
        });
      });
      launch(reduce_kernel<W::J>, grid_of(int64_t{s.dim} * (W::J + 1)), dim3(W::J * 32), 0,
             static_cast<const float*>(pointer<float>(partial)), pointer<float>(grad_weight), pointer<float>(grad_bias),
             blocks, s.dim);
    }
  });
  return {grads[0], grads[1], grads[2], grads[3], grads[4], grad_weight, grad_bias};
}

}  // namespace

PSF_CUDA_LIBRARY(m) {
  m.impl("cm3a_fwd", TORCH_BOX(&forward));
  m.impl("cm3a_bwd", TORCH_BOX(&backward));
}

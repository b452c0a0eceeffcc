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
  int64_t image;    // elements of one image: C * H * W
  int64_t channel;  // from channel to channel
  int64_t pixel;    // from pixel to pixel along x; a row is width * pixel
  int heads, dim, height, width;
  int tiles_x, tiles_y;
  bool channels_last;
  bool whole_chunks;  // dim is a multiple of kChunk, and maps are aligned to eight of their values
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
      value = static_cast<float>(data[(chunk + d) * s.channel + (static_cast<int64_t>(y) * s.width + x) * s.pixel]);
    tile[d * plane + at] = value;
  }
}

// Element of one channel at a thread's n-th pixel; zero outside the image and beyond the head's channels.
template <class T>
__device__ float load_pixel(const T* data, const Shape& s, int d, int x, int y) {
  if (x >= s.width || y >= s.height || d >= s.dim) return 0.0f;
  return static_cast<float>(data[d * s.channel + (static_cast<int64_t>(y) * s.width + x) * s.pixel]);
}

template <class T>
__device__ void store_pixel(T* data, float value, const Shape& s, int d, int x, int y) {
  if (x >= s.width || y >= s.height || d >= s.dim) return;
  data[d * s.channel + (static_cast<int64_t>(y) * s.width + x) * s.pixel] = static_cast<T>(value);
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

template <class T>
struct Inputs {
  const T* q;
  const T *k_pan, *v_pan, *k_ms, *v_ms;
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
  static constexpr int kHaloWidth = kTileWidth + 2 * kRadius;
  static constexpr int kHaloArea = kHaloWidth * (kTileHeight + 2 * kRadius);
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kOwned = (kHaloArea + kThreads - 1) / kThreads;  // pixels of the halo a thread loads
  // Floats of a plane of pairs of channels: planes begin 8 banks apart.
  static constexpr int kPlane = (2 * kHaloArea + 31 - 8) / 32 * 32 + 8;
  static constexpr int kTile = kChunk / 2 * kPlane;
};

// The constant factor as lanes read it, in float32 terms of TF32 values, for chunks of channels c, kinds (0: project,
// 1: transfer), offsets p, eights of candidates e: [c][kind][p][e][lane][high, high, low, low], without the low terms
// where kSplit is false; then mean_j W[d,j,p] as [c][p][8 channels].
template <int kWindow, bool kSplit>
struct Factor {
  static constexpr int J = kWindow * kWindow;
  static constexpr int kLane = kSplit ? 4 : 2;
  static constexpr int kEight = 32 * kLane;
  static constexpr int kKind = (J + 1) * (J / 8) * kEight;
  static constexpr int kBase = (J + 1) * kChunk;
  const float* packed;
  int chunks;

  __device__ const float* kind(int chunk, int kind) const {
    return packed + (static_cast<int64_t>(chunk / kChunk) * 2 + kind) * kKind;
  }
  __device__ const float* base(int chunk) const {
    return packed + static_cast<int64_t>(chunks) * 2 * kKind + chunk / kChunk * kBase;
  }
  static int64_t size(int chunks) { return static_cast<int64_t>(chunks) * (2 * kKind + kBase); }
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
      packed[i * F::kLane + n] = high;
      if constexpr (kSplit) packed[i * F::kLane + 2 + n] = psf::rounded(exact - high);
    }
  }
  if (i < chunks * F::kBase) {
    float mean = 0.0f;
    for (int j = 0; j < F::J; ++j) mean += value(i / F::kBase * kChunk + i % kChunk, j, i / kChunk % (F::J + 1));
    packed[static_cast<int64_t>(chunks) * 2 * F::kKind + i] = mean / F::J;
  }
}

// Where a thread stands in its block's tile.
template <int kWindow>
struct Lane {
  using G = Tiles<kWindow>;
  int x, y;         // in the image, of its first pixel
  int column, row;  // in the tile
  int q, r;
  int owned[G::kOwned];  // pixels of the halo that it loads, y * width + x, or -1 outside

  __device__ Lane(const Place& at, const Shape& s) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    q = lane / 4;
    r = lane % 4;
    column = warp % 4 * 8 + q;
    row = warp / 4 * G::kRows;
    x = at.x0 + column;
    y = at.y0 + row;
#pragma unroll
    for (int n = 0; n < G::kOwned; ++n) {
      const int i = static_cast<int>(threadIdx.x) + n * G::kThreads;
      const int from_x = at.x0 + i % G::kHaloWidth - G::kRadius, from_y = at.y0 + i / G::kHaloWidth - G::kRadius;
      const bool inside = from_x >= 0 && from_x < s.width && from_y >= 0 && from_y < s.height;
      owned[n] = i < G::kHaloArea && inside ? from_y * s.width + from_x : -1;
    }
  }
};

// What is multiplied into products before the hardware cuts them down to TF32: it then rounds, as the mean of what is
// cut off is 2^-11 / m for a mantissa 1 <= m < 2, 1 / m being 0.72 on average; what TF32 holds stays as it is.
template <bool kSplit>
constexpr float kUp = kSplit ? 1.0f : 1.0f + 0.72f / 2048;

// Eight neighbouring values, aligned to their size.
template <class T>
struct alignas(sizeof(T) * 8) Eight {
  T values[8];
};

// One chunk of channels with halo into planes of pairs [4][kPlane / 2][2], zero outside image and head.
template <int kWindow, class T>
__device__ void load_pairs(float* tile, const T* data, const Lane<kWindow>& lane, const Shape& s, int chunk) {
  using G = Tiles<kWindow>;
#pragma unroll
  for (int n = 0; n < G::kOwned; ++n) {
    const int i = static_cast<int>(threadIdx.x) + n * G::kThreads;
    if (i >= G::kHaloArea) break;
    float values[kChunk] = {};
    if (lane.owned[n] >= 0) {
      const T* from = data + chunk * s.channel + lane.owned[n] * s.pixel;
      if (s.whole_chunks && s.channels_last) {
        const Eight<T> eight = *reinterpret_cast<const Eight<T>*>(from);
#pragma unroll
        for (int d = 0; d < kChunk; ++d) values[d] = static_cast<float>(eight.values[d]);
      } else {
#pragma unroll
        for (int d = 0; d < kChunk; ++d)
          if (s.whole_chunks || chunk + d < s.dim) values[d] = static_cast<float>(from[d * s.channel]);
      }
    }
#pragma unroll
    for (int pair = 0; pair < kChunk / 2; ++pair)
      *reinterpret_cast<float2*>(tile + pair * G::kPlane + 2 * i) = make_float2(values[2 * pair], values[2 * pair + 1]);
  }
}

// `factor` times a lane's channels 2r and 2r + 1 of its pixels, zero outside image and head.
template <int kWindow, class T>
__device__ void load_own(float (&own)[Tiles<kWindow>::kRows][2], const T* data, const Lane<kWindow>& lane,
                         const Shape& s, int chunk, float factor) {
#pragma unroll
  for (int n = 0; n < Tiles<kWindow>::kRows; ++n)
#pragma unroll
    for (int c = 0; c < 2; ++c) own[n][c] = factor * load_pixel(data, s, chunk + 2 * lane.r + c, lane.x, lane.y + n);
}

template <int kWindow, class T>
__device__ void store_own(T* data, const float (&own)[Tiles<kWindow>::kRows][2], const Lane<kWindow>& lane,
                          const Shape& s, int chunk) {
#pragma unroll
  for (int n = 0; n < Tiles<kWindow>::kRows; ++n)
#pragma unroll
    for (int c = 0; c < 2; ++c) store_pixel(data, own[n][c], s, chunk + 2 * lane.r + c, lane.x, lane.y + n);
}

// `count` floats, a multiple of four, into shared memory.
__device__ void copy(float* shared, const float* data, int count) {
  for (int i = threadIdx.x; i < count / 4; i += blockDim.x)
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

// Candidates of a lane's pixels: [pair of rows][eight of candidates], each as in C of a product.
template <int kWindow>
struct Candidates {
  float values[Tiles<kWindow>::kPairs][Tiles<kWindow>::kEights][4];
};

// sums += sum_d,p left[d] tile[d](x+p) V[d,j,p] for a chunk.
template <int kWindow, bool kSplit>
__device__ void project(psf::Sum<kSplit> (&sums)[Tiles<kWindow>::kPairs][Tiles<kWindow>::kEights],
                        const float (&left)[Tiles<kWindow>::kRows][2], const float* tile, const float* factor,
                        const Lane<kWindow>& at) {
  using G = Tiles<kWindow>;
  using F = Factor<kWindow, kSplit>;
  const int lane = threadIdx.x % 32;
  const float* from = tile + at.r * G::kPlane + 2 * (at.row * G::kHaloWidth + at.column);
  const auto add = [&](const auto& near, int p) {  // near(n): the lane's two channels beside its n-th pixel
#pragma unroll
    for (int e = 0; e < G::kEights; ++e) {
      const Constant<kSplit> constant(factor + (p * G::kEights + e) * F::kEight, lane);
#pragma unroll
      for (int t = 0; t < G::kPairs; ++t) {
        const float2 upper = near(2 * t), lower = near(2 * t + 1);
        const float a[4] = {left[2 * t][0] * upper.x, left[2 * t + 1][0] * lower.x, left[2 * t][1] * upper.y,
                            left[2 * t + 1][1] * lower.y};
        sums[t][e].add(psf::Operand<kSplit>(a), constant);
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
      column[n] = *reinterpret_cast<const float2*>(from + 2 * (n * G::kHaloWidth + dx));
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
  for (int t = 0; t < G::kPairs; ++t)
#pragma unroll
    for (int half = 0; half < 4; half += 2) {
      float largest = 0.0f, total = 0.0f;
#pragma unroll
      for (int e = 0; e < G::kEights; ++e)
#pragma unroll
        for (int i = half; i < half + 2; ++i) {
          float& logit = logits.values[t][e][i];
          logit *= scale;
          largest = fmaxf(largest, logit);
          total += 0.0f * logit;  // NaN where a logit is not finite: the difference of two that were not is lost
        }
      largest = across(largest, [](float a, float b) { return fmaxf(a, b); });
#pragma unroll
      for (int e = 0; e < G::kEights; ++e)
#pragma unroll
        for (int i = half; i < half + 2; ++i) total += logits.values[t][e][i] = expf(logits.values[t][e][i] - largest);
      total = sum_across(total) + expf(-largest);
      const float inverse = 1.0f / total;
#pragma unroll
      for (int e = 0; e < G::kEights; ++e)
#pragma unroll
        for (int i = half; i < half + 2; ++i) logits.values[t][e][i] = logits.values[t][e][i] * inverse - 1.0f / G::J;
    }
}

// out[d] += sum_p tile[d](x+p) (base[d,p] + sum_j V[d,j,p] c_j) for a chunk; base: [p][8 channels], or null for none.
template <int kWindow, bool kSplit>
__device__ void transfer(float (&out)[Tiles<kWindow>::kRows][2], const Candidates<kWindow>& c, const float* tile,
                         const float* factor, const float* base, const Lane<kWindow>& at) {
  using G = Tiles<kWindow>;
  using F = Factor<kWindow, kSplit>;
  const int lane = threadIdx.x % 32;
  const float* from = tile + at.r * G::kPlane + 2 * (at.row * G::kHaloWidth + at.column);
  psf::Operand<kSplit> rows[G::kPairs][G::kEights];
#pragma unroll
  for (int t = 0; t < G::kPairs; ++t)
#pragma unroll
    for (int e = 0; e < G::kEights; ++e) {
      const float (&v)[4] = c.values[t][e];
      const float a[4] = {kUp<kSplit> * v[0], kUp<kSplit> * v[2], kUp<kSplit> * v[1], kUp<kSplit> * v[3]};
      rows[t][e] = psf::Operand<kSplit>(a);
    }
  const auto add = [&](const auto& near, int p) {
    const float2 first =
        base == nullptr ? make_float2(0.0f, 0.0f) : *reinterpret_cast<const float2*>(base + p * kChunk + 2 * at.r);
    float sums[G::kPairs][4] = {};
    Constant<kSplit> constants[G::kEights];
#pragma unroll
    for (int e = 0; e < G::kEights; ++e) {
      constants[e] = Constant<kSplit>(factor + (p * G::kEights + e) * F::kEight, lane);
#pragma unroll
      for (int t = 0; t < G::kPairs; ++t) psf::add_small<kSplit>(sums[t], rows[t][e], constants[e]);
    }
#pragma unroll
    for (int e = 0; e < G::kEights; ++e)
#pragma unroll
      for (int t = 0; t < G::kPairs; ++t) psf::add_large<kSplit>(sums[t], rows[t][e], constants[e]);
#pragma unroll
    for (int n = 0; n < G::kRows; ++n) {
      const float2 value = near(n);
      out[n][0] += value.x * (first.x + sums[n / 2][n % 2 * 2]);
      out[n][1] += value.y * (first.y + sums[n / 2][n % 2 * 2 + 1]);
    }
  };
#pragma unroll 1
  for (int dx = 0; dx < kWindow; ++dx) {
    float2 column[G::kRows + 2 * G::kRadius];
#pragma unroll
    for (int n = 0; n < G::kRows + 2 * G::kRadius; ++n)
      column[n] = *reinterpret_cast<const float2*>(from + 2 * (n * G::kHaloWidth + dx));
#pragma unroll
    for (int dy = 0; dy < kWindow; ++dy) add([&](int n) { return column[n + dy]; }, dy * kWindow + dx);
  }
  add([](int) { return make_float2(1.0f, 1.0f); }, G::J);
}

// sum_d left[d] nb(right)[d,j] less that of the last candidate, for all channels of a head.
template <int kWindow, bool kSplit, class T>
__device__ void contract(Candidates<kWindow>& result, const T* left, const T* right,
                         const Factor<kWindow, kSplit>& factor, float* tile, float* constants,
                         const Lane<kWindow>& lane, const Shape& s) {
  using G = Tiles<kWindow>;
  psf::Sum<kSplit> sums[G::kPairs][G::kEights];
  for (int chunk = 0; chunk < s.dim; chunk += kChunk) {
    __syncthreads();  // what was loaded before has been read
    load_pairs<kWindow>(tile, right, lane, s, chunk);
    copy(constants, factor.kind(chunk, 0), Factor<kWindow, kSplit>::kKind);
    float own[G::kRows][2];
    load_own<kWindow>(own, left, lane, s, chunk, kUp<kSplit>);
    __syncthreads();
    project<kWindow, kSplit>(sums, own, tile, constants, lane);
  }
#pragma unroll
  for (int t = 0; t < G::kPairs; ++t)
#pragma unroll
    for (int e = 0; e < G::kEights; ++e)
#pragma unroll
      for (int i = 0; i < 4; ++i) result.values[t][e][i] = sums[t][e][i];
}

template <class T, int kWindow, bool kSplit>
__global__ void __launch_bounds__(kWarps * 32, 2)
    learned_forward_kernel(Inputs<T> in, Factor<kWindow, kSplit> factor, T* out_pan, T* out_ms, Shape s) {
  using G = Tiles<kWindow>;
  using F = Factor<kWindow, kSplit>;
  PSF_DYNAMIC_SHARED(float, tile);
  float* const constants = tile + G::kTile;
  float* const base = constants + F::kKind;
  const Place at = place_of(blockIdx.x, s, G::kTileHeight);
  const Lane<kWindow> lane(at, s);
  for (int m = 0; m < 2; ++m) {
    Candidates<kWindow> attention;
    contract<kWindow, kSplit>(attention, in.q + at.base, (m == 0 ? in.k_pan : in.k_ms) + at.base, factor, tile,
                              constants, lane, s);
    softmax<kWindow>(attention, in.scale);
    for (int chunk = 0; chunk < s.dim; chunk += kChunk) {
      __syncthreads();
      load_pairs<kWindow>(tile, (m == 0 ? in.v_pan : in.v_ms) + at.base, lane, s, chunk);
      copy(constants, factor.kind(chunk, 1), F::kKind);
      copy(base, factor.base(chunk), F::kBase);
      __syncthreads();
      float out[G::kRows][2] = {};
      transfer<kWindow, kSplit>(out, attention, tile, constants, base, lane);
      store_own<kWindow>((m == 0 ? out_pan : out_ms) + at.base, out, lane, s, chunk);
    }
  }
}

template <class T, int kWindow>
__global__ void __launch_bounds__(kWarps * 32) shift_forward_kernel(Inputs<T> in, T* out_pan, T* out_ms, Shape s) {
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
      load((m == 0 ? in.k_pan : in.k_ms), chunk);
      add_dots<kWindow>(attention, in.q + at.base, tile, s, chunk, x, y, tx, ty);
    }
    softmax(attention, in.scale);
    T* out = (m == 0 ? out_pan : out_ms) + at.base;
    for (int chunk = 0; chunk < s.dim; chunk += kChunk) {
      load((m == 0 ? in.v_pan : in.v_ms), chunk);
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

// Workspace planes of J floats a pixel: [2 modalities][attention, scale * logit gradient][images * heads][J][H * W].
struct Workspace {
  float* data;
  int64_t plane;  // images * heads * J * H * W
  __device__ float* at(int modality, int kind, int64_t head, int64_t area, int count) const {
    return data + (modality * 2 + kind) * plane + head * count * area;
  }
};

// Attention and logit gradients of both modalities to the workspace, and the gradient of q:
//   g_j = grad.nb(v)[:,j],  ds_j = scale a_j (g_j - sum_i a_i g_i),  dq[d] = sum over modalities sum_j ds_j nb(k)[d,j].
template <class T, int kWindow>
__global__ void __launch_bounds__(kWarps * 32)
    backward_query_kernel(Inputs<T> in, const T* grad_pan, const T* grad_ms, T* grad_q, Workspace workspace, Shape s) {
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
      load(m == 0 ? in.k_pan : in.k_ms, chunk);
      add_dots<kWindow>(attention, in.q + at.base, tile, s, chunk, x, y, tx, ty);
      load(m == 0 ? in.v_pan : in.v_ms, chunk);
      const T* grad = (m == 0 ? grad_pan : grad_ms) + at.base;
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
      load(m == 0 ? in.k_pan : in.k_ms, chunk);
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
    backward_neighbour_kernel(const T* q, const T* grad_pan, const T* grad_ms, T* grad_k_pan, T* grad_v_pan,
                              T* grad_k_ms, T* grad_v_ms, Workspace workspace, Shape s) {
  using G = Geometry<kWindow>;
  const Place at = place_of(blockIdx.x, s, kWarps);
  const int x = at.x0 + static_cast<int>(threadIdx.x % 32), y = at.y0 + static_cast<int>(threadIdx.x / 32);
  const int64_t area = static_cast<int64_t>(s.height) * s.width;
  for (int chunk = 0; chunk < s.dim; chunk += kChunk)
    for (int m = 0; m < 2; ++m)
      for (int kind = 0; kind < 2; ++kind) {  // 0: values, 1: keys
        const T* left = (kind == 1 ? q : m == 0 ? grad_pan : grad_ms) + at.base;
        const float* factor = workspace.at(m, kind, at.head, area, G::J);
        T* result = (kind == 1 ? (m == 0 ? grad_k_pan : grad_k_ms) : (m == 0 ? grad_v_pan : grad_v_ms)) + at.base;
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

// A lane's candidates of its pixels to planes [J][H * W], `offset` added; the last one makes the sum `total`.
template <int kWindow>
__device__ void store_candidates(float* planes, const Candidates<kWindow>& c, float offset, float total,
                                 const Lane<kWindow>& lane, const Shape& s) {
  using G = Tiles<kWindow>;
  const int64_t area = static_cast<int64_t>(s.height) * s.width;
#pragma unroll
  for (int n = 0; n < G::kRows; ++n) {
    const bool inside = lane.x < s.width && lane.y + n < s.height;
    float* const to = planes + static_cast<int64_t>(lane.y + n) * s.width + lane.x;
    float sum = 0.0f;
#pragma unroll
    for (int e = 0; e < G::kEights; ++e)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float value = c.values[n / 2][e][n % 2 * 2 + i] + offset;
        sum += value;
        if (inside) to[(8 * e + 2 * lane.r + i) * area] = value;
      }
    sum = sum_across(sum);
    if (inside && lane.r == 0) to[(G::J - 1) * area] = total - sum;
  }
}

template <int kWindow>
__device__ void load_candidates(Candidates<kWindow>& c, const float* planes, const Lane<kWindow>& lane,
                                const Shape& s) {
  using G = Tiles<kWindow>;
  const int64_t area = static_cast<int64_t>(s.height) * s.width;
#pragma unroll
  for (int n = 0; n < G::kRows; ++n) {
    const bool inside = lane.x < s.width && lane.y + n < s.height;
    const float* const from = planes + static_cast<int64_t>(lane.y + n) * s.width + lane.x;
#pragma unroll
    for (int e = 0; e < G::kEights; ++e)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        c.values[n / 2][e][n % 2 * 2 + i] = inside ? from[(8 * e + 2 * lane.r + i) * area] : 0.0f;
  }
}

// As backward_query_kernel. ds does not change when all g of a pixel do alike, and sums to zero.
template <class T, int kWindow, bool kSplit>
__global__ void __launch_bounds__(kWarps * 32, 2)
    learned_backward_query_kernel(Inputs<T> in, Factor<kWindow, kSplit> factor, const T* grad_pan, const T* grad_ms,
                                  T* grad_q, Workspace workspace, Shape s) {
  using G = Tiles<kWindow>;
  PSF_DYNAMIC_SHARED(float, tile);
  float* const constants = tile + G::kTile;
  const Place at = place_of(blockIdx.x, s, G::kTileHeight);
  const Lane<kWindow> lane(at, s);
  const int64_t area = static_cast<int64_t>(s.height) * s.width;
  for (int m = 0; m < 2; ++m) {
    Candidates<kWindow> attention, slope;
    contract<kWindow, kSplit>(attention, in.q + at.base, (m == 0 ? in.k_pan : in.k_ms) + at.base, factor, tile,
                              constants, lane, s);
    softmax<kWindow>(attention, in.scale);
    store_candidates<kWindow>(workspace.at(m, 0, at.head, area, G::J), attention, 1.0f / G::J, 1.0f, lane, s);
    contract<kWindow, kSplit>(slope, (m == 0 ? grad_pan : grad_ms) + at.base, (m == 0 ? in.v_pan : in.v_ms) + at.base,
                              factor, tile, constants, lane, s);
#pragma unroll
    for (int t = 0; t < G::kPairs; ++t)
#pragma unroll
      for (int half = 0; half < 4; half += 2) {
        float mean = 0.0f;
#pragma unroll
        for (int e = 0; e < G::kEights; ++e)
#pragma unroll
          for (int i = half; i < half + 2; ++i)
            mean += (attention.values[t][e][i] + 1.0f / G::J) * slope.values[t][e][i];
        mean = sum_across(mean);
#pragma unroll
        for (int e = 0; e < G::kEights; ++e)
#pragma unroll
          for (int i = half; i < half + 2; ++i)
            slope.values[t][e][i] =
                in.scale * (attention.values[t][e][i] + 1.0f / G::J) * (slope.values[t][e][i] - mean);
      }
    store_candidates<kWindow>(workspace.at(m, 1, at.head, area, G::J), slope, 0.0f, 0.0f, lane, s);
  }
  for (int chunk = 0; chunk < s.dim; chunk += kChunk) {
    float out[G::kRows][2] = {};
    for (int m = 0; m < 2; ++m) {
      __syncthreads();
      load_pairs<kWindow>(tile, (m == 0 ? in.k_pan : in.k_ms) + at.base, lane, s, chunk);
      copy(constants, factor.kind(chunk, 1), Factor<kWindow, kSplit>::kKind);
      Candidates<kWindow> slope;  // as this lane left it above
      load_candidates<kWindow>(slope, workspace.at(m, 1, at.head, area, G::J), lane, s);
      __syncthreads();
      transfer<kWindow, kSplit>(out, slope, tile, constants, nullptr, lane);
    }
    store_own<kWindow>(grad_q + at.base, out, lane, s, chunk);
  }
}

// Candidates' planes with halo into planes of pairs, as load_pairs does with channels: [eight][4][kPlane / 2][2].
template <int kWindow>
__device__ void load_candidate_pairs(float* tile, const float* planes, float offset, const Lane<kWindow>& lane,
                                     const Shape& s) {
  using G = Tiles<kWindow>;
  const int64_t area = static_cast<int64_t>(s.height) * s.width;
#pragma unroll
  for (int n = 0; n < G::kOwned; ++n) {
    const int i = static_cast<int>(threadIdx.x) + n * G::kThreads;
    if (i >= G::kHaloArea) break;
#pragma unroll
    for (int pair = 0; pair < G::kEights * 4; ++pair) {
      float2 values = make_float2(0.0f, 0.0f);
      if (lane.owned[n] >= 0) {
        const float* from = planes + 2 * pair * area + lane.owned[n];
        values = make_float2(from[0] + offset, from[area] + offset);
      }
      *reinterpret_cast<float2*>(tile + pair * G::kPlane + 2 * i) = values;
    }
  }
}

// out[d](y) += sum_p left[d](y-p) (base[d,p] + sum_j V[d,j,p] c_j(y-p)) for a chunk; base as for transfer.
template <int kWindow, bool kSplit>
__device__ void gather(float (&out)[Tiles<kWindow>::kRows][2], const float* left, const float* c, const float* factor,
                       const float* base, const Lane<kWindow>& at) {
  using G = Tiles<kWindow>;
  using F = Factor<kWindow, kSplit>;
  constexpr int kColumn = G::kRows + 2 * G::kRadius;
  const int lane = threadIdx.x % 32, first = at.r * G::kPlane + 2 * (at.row * G::kHaloWidth + at.column);
#pragma unroll 1
  for (int dx = 0; dx < kWindow; ++dx) {
    const auto load = [&](float2(&column)[kColumn], const float* tile) {
#pragma unroll
      for (int n = 0; n < kColumn; ++n)
        column[n] = *reinterpret_cast<const float2*>(tile + first + 2 * (n * G::kHaloWidth + dx));
    };
    float2 values[kColumn], candidates[G::kEights][kColumn];
    load(values, left);
#pragma unroll
    for (int e = 0; e < G::kEights; ++e) load(candidates[e], c + e * G::kTile);
#pragma unroll
    for (int dy = 0; dy < kWindow; ++dy) {
      const int p = G::J - 1 - (dy * kWindow + dx);  // from the source at (dx, dy) this pixel is the opposite way
      const float2 start =
          base == nullptr ? make_float2(0.0f, 0.0f) : *reinterpret_cast<const float2*>(base + p * kChunk + 2 * at.r);
      float sums[G::kPairs][4] = {};
      Constant<kSplit> constants[G::kEights];
      psf::Operand<kSplit> rows[G::kEights][G::kPairs];
#pragma unroll
      for (int e = 0; e < G::kEights; ++e) {
        constants[e] = Constant<kSplit>(factor + (p * G::kEights + e) * F::kEight, lane);
#pragma unroll
        for (int t = 0; t < G::kPairs; ++t) {
          const float2 upper = candidates[e][2 * t + dy], lower = candidates[e][2 * t + 1 + dy];
          const float a[4] = {kUp<kSplit> * upper.x, kUp<kSplit> * lower.x, kUp<kSplit> * upper.y,
                              kUp<kSplit> * lower.y};
          rows[e][t] = psf::Operand<kSplit>(a);
          psf::add_small<kSplit>(sums[t], rows[e][t], constants[e]);
        }
      }
#pragma unroll
      for (int e = 0; e < G::kEights; ++e)
#pragma unroll
        for (int t = 0; t < G::kPairs; ++t) psf::add_large<kSplit>(sums[t], rows[e][t], constants[e]);
#pragma unroll
      for (int n = 0; n < G::kRows; ++n) {
        const float2 value = values[n + dy];
        out[n][0] += value.x * (start.x + sums[n / 2][n % 2 * 2]);
        out[n][1] += value.y * (start.y + sums[n / 2][n % 2 * 2 + 1]);
      }
    }
  }
}

// As backward_neighbour_kernel.
template <class T, int kWindow, bool kSplit>
__global__ void __launch_bounds__(kWarps * 32, 2)
    learned_backward_neighbour_kernel(const T* q, Factor<kWindow, kSplit> factor, const T* grad_pan, const T* grad_ms,
                                      T* grad_k_pan, T* grad_v_pan, T* grad_k_ms, T* grad_v_ms, Workspace workspace,
                                      Shape s) {
  using G = Tiles<kWindow>;
  using F = Factor<kWindow, kSplit>;
  PSF_DYNAMIC_SHARED(float, tile);
  float* const constants = tile + G::kTile;
  float* const base = constants + F::kKind;
  float* const candidates = base + F::kBase;
  const Place at = place_of(blockIdx.x, s, G::kTileHeight);
  const Lane<kWindow> lane(at, s);
  const int64_t area = static_cast<int64_t>(s.height) * s.width;
  for (int m = 0; m < 2; ++m)
    for (int kind = 0; kind < 2; ++kind) {  // 0: values, 1: keys
      const T* left = (kind == 1 ? q : m == 0 ? grad_pan : grad_ms) + at.base;
      T* result = (kind == 1 ? (m == 0 ? grad_k_pan : grad_k_ms) : (m == 0 ? grad_v_pan : grad_v_ms)) + at.base;
      __syncthreads();
      load_candidate_pairs<kWindow>(candidates, workspace.at(m, kind, at.head, area, G::J),
                                    kind == 0 ? -1.0f / G::J : 0.0f, lane, s);
      for (int chunk = 0; chunk < s.dim; chunk += kChunk) {
        if (chunk > 0) __syncthreads();
        load_pairs<kWindow>(tile, left, lane, s, chunk);
        copy(constants, factor.kind(chunk, 1), F::kKind);
        copy(base, factor.base(chunk), F::kBase);
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
// A block walks over every gridDim.x-th tile; groups of its warps share the offsets, the warps of a group the pixels.
// Sums of blocks go to `partial` [gridDim.x][dim][J + 1][J] and are added up in a fixed order afterwards.
template <int kWindow>
struct WeightTiles {
  static constexpr int J = kWindow * kWindow;
  static constexpr int kRadius = kWindow / 2;
  static constexpr int kEights = (J + 7) / 8;  // of candidates
  static constexpr int kGroups = kWindow == 3 ? 1 : 8;
  static constexpr int kSlices = kWarps / kGroups;
  static constexpr int kPairs = ((J + 2) / 2 + kGroups - 1) / kGroups;  // of offsets a warp owns
  static constexpr int kRows = kWindow == 3 ? 8 : 4;                    // pixel rows of a tile
  static constexpr int kArea = kRows * kTileWidth;
  static constexpr int kHaloWidth = kTileWidth + 2 * kRadius;
  static constexpr int kHaloArea = kHaloWidth * (kRows + 2 * kRadius);
  // Floats of a plane: planes begin 4 banks apart.
  static constexpr int kPlane = (kArea + 31 - 4) / 32 * 32 + 4;
  static constexpr int kHaloPlane = (kHaloArea + 31 - 4) / 32 * 32 + 4;
  static constexpr int kSums = kChunk * (J + 1) * J;
  static constexpr int kShared = std::max(kChunk * (kHaloPlane + kPlane) + 8 * kEights * kPlane, kSlices* kSums);
};

template <class T, int kWindow, bool kSplit>
__global__ void __launch_bounds__(kWarps * 32, 2)
    backward_weight_kernel(Inputs<T> in, const T* grad_pan, const T* grad_ms, Workspace workspace, float* partial,
                           int64_t tiles, Shape s) {
  using G = WeightTiles<kWindow>;
  PSF_SHARED(float, right, G::kShared);
  float* const left = right + kChunk * G::kHaloPlane;
  float* const candidates = left + kChunk * G::kPlane;
  const int lane = threadIdx.x % 32, q = lane / 4, r = lane % 4, warp = threadIdx.x / 32;
  const int slice = warp % G::kSlices, first = warp / G::kSlices * G::kPairs;
  const int64_t area = static_cast<int64_t>(s.height) * s.width;
  for (int chunk = 0; chunk < s.dim; chunk += kChunk) {
    psf::Sum<kSplit> sums[G::kPairs][G::kEights];
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      const Place at = place_of(tile, s, G::kRows);
      for (int m = 0; m < 2; ++m)
        for (int kind = 0; kind < 2; ++kind) {
          const T* l = (kind == 1 ? in.q : m == 0 ? grad_pan : grad_ms) + at.base;
          const T* near = (kind == 1 ? (m == 0 ? in.k_pan : in.k_ms) : (m == 0 ? in.v_pan : in.v_ms)) + at.base;
          const float* c = workspace.at(m, kind, at.head, area, G::J);
          __syncthreads();
          load_tile(right, near, s, chunk, at.x0, at.y0, G::kHaloWidth, G::kHaloArea, G::kHaloPlane, G::kRadius);
          load_tile(left, l, s, chunk, at.x0, at.y0, kTileWidth, G::kArea, G::kPlane, 0);
          for (int i = threadIdx.x; i < 8 * G::kEights * G::kArea; i += blockDim.x) {
            const int j = i / G::kArea, t = i % G::kArea;
            const int x = at.x0 + t % kTileWidth, y = at.y0 + t / kTileWidth;
            const bool real = j < G::J && x < s.width && y < s.height;
            candidates[j * G::kPlane + t] = real ? c[j * area + static_cast<int64_t>(y) * s.width + x] : 0.0f;
          }
          __syncthreads();
#pragma unroll 1
          for (int step = slice; step < G::kArea / 8; step += G::kSlices) {
            const int row = step / (kTileWidth / 8), x = step % (kTileWidth / 8) * 8 + r;
            const float* own = left + q * G::kPlane + row * kTileWidth + x;
            const float values[2] = {kUp<kSplit> * own[0], kUp<kSplit> * own[4]};
            // R at offset p from pixel x + 4 n
            const auto beside = [&](int p, int n) {
              if (p >= G::J) return p == G::J ? 1.0f : 0.0f;
              return right[q * G::kHaloPlane + (row + p / kWindow) * G::kHaloWidth + x + 4 * n + p % kWindow];
            };
            psf::Terms<2> columns[G::kEights];
#pragma unroll
            for (int e = 0; e < G::kEights; ++e) {
              const float* column = candidates + (8 * e + q) * G::kPlane + row * kTileWidth + x;
              const float b[2] = {column[0], column[4]};
              columns[e] = psf::Terms<2>(b);
            }
#pragma unroll
            for (int i = 0; i < G::kPairs; ++i) {
              const int p = 2 * (first + i);
              const float a[4] = {values[0] * beside(p, 0), values[0] * beside(p + 1, 0), values[1] * beside(p, 1),
                                  values[1] * beside(p + 1, 1)};
              const psf::Operand<kSplit> rows(a);
#pragma unroll
              for (int e = 0; e < G::kEights; ++e) {
                sums[i][e].add(rows, columns[e]);
                sums[i][e].close();
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
      for (int e = 0; e < G::kEights; ++e)
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const int p = 2 * (first + i) + n / 2, j = 8 * e + 2 * r + n % 2;
          if (p <= G::J && j < G::J) slices[slice * G::kSums + (q * (G::J + 1) + p) * G::J + j] = sums[i][e][n];
        }
    __syncthreads();
    for (int i = threadIdx.x; i < G::kSums; i += blockDim.x) {
      float sum = 0.0f;
      for (int n = 0; n < G::kSlices; ++n) sum += slices[n * G::kSums + i];
      const int d = chunk + i / ((G::J + 1) * G::J);
      if (d < s.dim)
        partial[(static_cast<int64_t>(blockIdx.x) * s.dim + d) * (G::J + 1) * G::J + i % ((G::J + 1) * G::J)] = sum;
    }
  }
}

// Adds the partial sums up, one thread a sum, always in the same order.
__global__ void reduce_kernel(const float* partial, float* grad_weight, float* grad_bias, int count, int J, int dim) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x), total = dim * (J + 1) * J;
  if (i >= total) return;
  float sum = 0.0f;
  for (int n = 0; n < count; ++n) sum += partial[static_cast<int64_t>(n) * total + i];
  const int j = i % J, p = i / J % (J + 1), d = i / (J * (J + 1));
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
  s.channel = channels_last ? 1 : height * width;
  s.pixel = channels_last ? channels : 1;
  s.heads = static_cast<int>(heads);
  s.dim = static_cast<int>(channels / heads);
  s.height = static_cast<int>(height);
  s.width = static_cast<int>(width);
  s.channels_last = channels_last;
  s.whole_chunks = s.dim % kChunk == 0;
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
    return {pointer<T>(q),    pointer<T>(k_pan), pointer<T>(v_pan),
            pointer<T>(k_ms), pointer<T>(v_ms),  static_cast<float>(scale)};
  }
};

bool aligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.mutable_data_ptr()) % (kChunk * t.element_size()) == 0;
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
    const Tensor packed = torch::stable::empty({F::size(chunks)}, ScalarType::Float, std::nullopt, a.q.device());
    const int threads = chunks * std::max(2 * F::kKind / F::kLane, F::kBase);
    launch(pack_kernel<kWindow, kSplit>, dim3((threads + 255) / 256), dim3(256), 0,
           static_cast<const float*>(pointer<float>(*a.weight)), static_cast<const float*>(pointer<float>(*a.bias)),
           pointer<float>(packed), s.dim, chunks);
    body.template operator()<kSplit>(F{pointer<float>(packed), chunks});
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
  s.whole_chunks &= aligned(a.k_pan) && aligned(a.v_pan) && aligned(a.k_ms) && aligned(a.v_ms);
  dispatch(q.scalar_type(), window, weight.has_value(), [&]<class T, int kWindow, bool kLearned>() {
    if constexpr (kLearned) {
      const int64_t blocks = tile(s, q.size(0), Tiles<kWindow>::kTileHeight);
      with_factor<T, kWindow>(launch, a, s, tf32, [&]<bool kSplit>(const Factor<kWindow, kSplit>& factor) {
        launch(learned_forward_kernel<T, kWindow, kSplit>, grid_of(blocks), dim3(kWarps * 32),
               shared_bytes<kWindow, kSplit>(), a.inputs<T>(scale), factor, pointer<T>(out_pan), pointer<T>(out_ms), s);
      });
    } else {
      const int64_t blocks = tile(s, q.size(0), Geometry<kWindow>::kTileHeight);
      launch(shift_forward_kernel<T, kWindow>, grid_of(blocks), dim3(kWarps * 32), 0, a.inputs<T>(scale),
             pointer<T>(out_pan), pointer<T>(out_ms), s);
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
  for (const Tensor* map : {&a.q, &a.k_pan, &a.v_pan, &a.k_ms, &a.v_ms, &grad_pan, &grad_ms})
    s.whole_chunks &= aligned(*map);
  const int64_t plane = batch * num_heads * J * s.height * s.width;
  const Tensor space = small({4, plane});
  const Workspace workspace{pointer<float>(space), plane};
  dispatch(q.scalar_type(), window, learned, [&]<class T, int kWindow, bool kLearned>() {
    const Inputs<T> in = a.inputs<T>(scale);
    const dim3 block(kWarps * 32);
    int64_t tiles = tile(s, batch, Geometry<kWindow>::kTileHeight);
    if constexpr (kLearned) {
      tiles = tile(s, batch, Tiles<kWindow>::kTileHeight);
      with_factor<T, kWindow>(launch, a, s, tf32, [&]<bool kSplit>(const Factor<kWindow, kSplit>& factor) {
        launch(learned_backward_query_kernel<T, kWindow, kSplit>, grid_of(tiles), block,
               shared_bytes<kWindow, kSplit>(), in, factor, pointer<T>(grad_pan), pointer<T>(grad_ms),
               pointer<T>(grads[0]), workspace, s);
        launch(learned_backward_neighbour_kernel<T, kWindow, kSplit>, grid_of(tiles), block,
               shared_bytes<kWindow, kSplit>(Tiles<kWindow>::kEights), in.q, factor, pointer<T>(grad_pan),
               pointer<T>(grad_ms), pointer<T>(grads[1]), pointer<T>(grads[2]), pointer<T>(grads[3]),
               pointer<T>(grads[4]), workspace, s);
      });
    } else {
      launch(backward_query_kernel<T, kWindow>, grid_of(tiles), block, 0, in, pointer<T>(grad_pan), pointer<T>(grad_ms),
             pointer<T>(grads[0]), workspace, s);
    }
    if constexpr (!kLearned) {
      tiles = tile(s, batch, kWarps);
      launch(backward_neighbour_kernel<T, kWindow>, grid_of(tiles), block, 0, in.q, pointer<T>(grad_pan),
             pointer<T>(grad_ms), pointer<T>(grads[1]), pointer<T>(grads[2]), pointer<T>(grads[3]),
             pointer<T>(grads[4]), workspace, s);
    }
    if constexpr (kLearned) {
      using W = WeightTiles<kWindow>;
      tiles = tile(s, batch, W::kRows);
      // Enough blocks to fill a large GPU; a fixed number, so that the order of addition is the same everywhere.
      const int64_t blocks = tiles < 528 ? tiles : 528;
      const int total = s.dim * (W::J + 1) * W::J;
      const Tensor partial = small({blocks, total});
      with_split<T>(tf32, [&]<bool kSplit>() {
        launch(backward_weight_kernel<T, kWindow, kSplit>, grid_of(blocks), block, 0, in, pointer<T>(grad_pan),
               pointer<T>(grad_ms), workspace, pointer<float>(partial), tiles, s);
      });
      launch(reduce_kernel, dim3((total + 255) / 256), dim3(256), 0, static_cast<const float*>(pointer<float>(partial)),
             pointer<float>(grad_weight), pointer<float>(grad_bias), static_cast<int>(blocks), W::J, s.dim);
    }
  });
  return {grads[0], grads[1], grads[2], grads[3], grads[4], grad_weight, grad_bias};
}

}  // namespace

PSF_CUDA_LIBRARY(m) {
  m.impl("cm3a_fwd", TORCH_BOX(&forward));
  m.impl("cm3a_bwd", TORCH_BOX(&backward));
}

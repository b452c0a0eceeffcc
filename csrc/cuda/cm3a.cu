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
#include <cmath>
#include <optional>
#include <tuple>

#include "cuda/runtime.cuh"

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
  // W[d,j,0..J-1] followed by b[d,j], padded to whole float4.
  static constexpr int kRow = (J + 1 + 3) / 4 * 4;
};

// Sizes and strides (in elements) shared by q, k, v, their gradients and the outputs.
struct Shape {
  int64_t image;    // elements of one image: C * H * W
  int64_t channel;  // from channel to channel
  int64_t pixel;    // from pixel to pixel along x; a row is width * pixel
  int heads, dim, height, width;
  int tiles_x, tiles_y;
  bool channels_last;
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
                          int halo_area, int radius) {
  for (int i = threadIdx.x; i < kChunk * halo_area; i += blockDim.x) {
    // Neighbouring threads read neighbouring addresses in either layout.
    const int d = s.channels_last ? i % kChunk : i / halo_area;
    const int at = s.channels_last ? i / kChunk : i % halo_area;
    const int y = y0 + at / halo_width - radius, x = x0 + at % halo_width - radius;
    float value = 0.0f;
    if (chunk + d < s.dim && y >= 0 && y < s.height && x >= 0 && x < s.width)
      value = static_cast<float>(data[(chunk + d) * s.channel + (static_cast<int64_t>(y) * s.width + x) * s.pixel]);
    tile[d * halo_area + at] = value;
  }
}

// Rows W[d,j,:] | b[d,j] of one chunk, [kChunk][J][kRow], zero beyond the head's channels.
template <int kWindow>
__device__ void load_weight(float* rows, const float* weight, const float* bias, int chunk, int dim) {
  using G = Geometry<kWindow>;
  for (int i = threadIdx.x; i < kChunk * G::J * G::kRow; i += blockDim.x) {
    const int p = i % G::kRow, dj = i / G::kRow + chunk * G::J;
    float value = 0.0f;
    if (dj < dim * G::J && p <= G::J) value = p < G::J ? weight[dj * G::J + p] : bias[dj];
    rows[i] = value;
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

// sum_p row[p] z[p] over a padded row of weights and bias.
template <int kRow, int kUsed>
__device__ float dot_row(const float* row, const float (&z)[kUsed]) {
  float sum = 0.0f;
#pragma unroll
  for (int p = 0; p < kRow; p += 4) {
    const float4 w = *reinterpret_cast<const float4*>(row + p);
    sum += w.x * z[p];
    if (p + 1 < kUsed) sum += w.y * z[p + 1 < kUsed ? p + 1 : 0];
    if (p + 2 < kUsed) sum += w.z * z[p + 2 < kUsed ? p + 2 : 0];
    if (p + 3 < kUsed) sum += w.w * z[p + 3 < kUsed ? p + 3 : 0];
  }
  return sum;
}

// The loops over a chunk's channels stay loops: unrolled they multiply the code by eight and gain nothing.

// sums[n][j] += sum_d left[d] nb(tile)[d,j] for one chunk.
template <int kWindow, bool kLearned, class T>
__device__ void add_dots(float (&sums)[Geometry<kWindow>::kPixels][Geometry<kWindow>::J], const T* left,
                         const float* tile, const float* rows, const Shape& s, int chunk, int x, int y, int tx,
                         int ty) {
  using G = Geometry<kWindow>;
#pragma unroll 1
  for (int d = 0; d < kChunk; ++d) {
    float window[G::kPixels - 1 + kWindow][kWindow];
    load_window<kWindow, G::kPixels>(window, tile + d * G::kHaloArea, tx, ty);
#pragma unroll
    for (int n = 0; n < G::kPixels; ++n) {
      const float value = load_pixel(left, s, chunk + d, x, y + n);
      float z[G::J + 1];
#pragma unroll
      for (int p = 0; p < G::J; ++p) z[p] = value * window[n + p / kWindow][p % kWindow];
      z[G::J] = value;
#pragma unroll
      for (int j = 0; j < G::J; ++j) {
        if constexpr (kLearned)
          sums[n][j] += dot_row<G::kRow>(rows + (d * G::J + j) * G::kRow, z);
        else
          sums[n][j] += z[j];
      }
    }
  }
}

// sum_j factor[n][j] nb(tile)[d,j] for channel d of a chunk and each of the thread's pixels.
template <int kWindow, bool kLearned>
__device__ void add_mix(float (&out)[Geometry<kWindow>::kPixels],
                        const float (&factor)[Geometry<kWindow>::kPixels][Geometry<kWindow>::J], const float* tile,
                        const float* rows, int d, int tx, int ty) {
  using G = Geometry<kWindow>;
  float window[G::kPixels - 1 + kWindow][kWindow];
  load_window<kWindow, G::kPixels>(window, tile + d * G::kHaloArea, tx, ty);
#pragma unroll
  for (int n = 0; n < G::kPixels; ++n) {
    float z[G::J + 1];
#pragma unroll
    for (int p = 0; p < G::J; ++p) z[p] = window[n + p / kWindow][p % kWindow];
    z[G::J] = 1.0f;
#pragma unroll
    for (int j = 0; j < G::J; ++j) {
      if constexpr (kLearned)
        out[n] += factor[n][j] * dot_row<G::kRow>(rows + (d * G::J + j) * G::kRow, z);
      else
        out[n] += factor[n][j] * z[j];
    }
  }
}

template <int kPixels, int J>
__device__ void softmax(float (&values)[kPixels][J], float scale) {
#pragma unroll
  for (int n = 0; n < kPixels; ++n) {
    float largest = values[n][0] * scale;
#pragma unroll
    for (int j = 0; j < J; ++j) {
      values[n][j] *= scale;
      largest = fmaxf(largest, values[n][j]);
    }
    float total = 0.0f;
#pragma unroll
    for (int j = 0; j < J; ++j) total += values[n][j] = expf(values[n][j] - largest);
#pragma unroll
    for (int j = 0; j < J; ++j) values[n][j] /= total;
  }
}

template <class T>
struct Inputs {
  const T* q;
  const T *k_pan, *v_pan, *k_ms, *v_ms;
  const float* weight;  // null: exact shift
  const float* bias;
  float scale;
};

template <class T, int kWindow, bool kLearned>
__global__ void __launch_bounds__(kWarps * 32) forward_kernel(Inputs<T> in, T* out_pan, T* out_ms, Shape s) {
  using G = Geometry<kWindow>;
  PSF_SHARED(float, tile, kChunk* G::kHaloArea);
  PSF_SHARED(float, rows, kLearned ? kChunk * G::J * G::kRow : 4);
  const Place at = place_of(blockIdx.x, s, G::kTileHeight);
  const int tx = threadIdx.x % 32, ty = threadIdx.x / 32 * G::kPixels;
  const int x = at.x0 + tx, y = at.y0 + ty;
  const auto load = [&](const T* data, int chunk) {
    __syncthreads();  // the previous chunk has been read
    load_tile(tile, data + at.base, s, chunk, at.x0, at.y0, G::kHaloWidth, G::kHaloArea, G::kRadius);
    if constexpr (kLearned) load_weight<kWindow>(rows, in.weight, in.bias, chunk, s.dim);
    __syncthreads();
  };
  for (int m = 0; m < 2; ++m) {
    float attention[G::kPixels][G::J] = {};
    for (int chunk = 0; chunk < s.dim; chunk += kChunk) {
      load((m == 0 ? in.k_pan : in.k_ms), chunk);
      add_dots<kWindow, kLearned>(attention, in.q + at.base, tile, rows, s, chunk, x, y, tx, ty);
    }
    softmax(attention, in.scale);
    T* out = (m == 0 ? out_pan : out_ms) + at.base;
    for (int chunk = 0; chunk < s.dim; chunk += kChunk) {
      load((m == 0 ? in.v_pan : in.v_ms), chunk);
#pragma unroll 1
      for (int d = 0; d < kChunk; ++d) {
        float mixed[G::kPixels] = {};
        add_mix<kWindow, kLearned>(mixed, attention, tile, rows, d, tx, ty);
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
template <class T, int kWindow, bool kLearned>
__global__ void __launch_bounds__(kWarps * 32)
    backward_query_kernel(Inputs<T> in, const T* grad_pan, const T* grad_ms, T* grad_q, Workspace workspace, Shape s) {
  using G = Geometry<kWindow>;
  PSF_SHARED(float, tile, kChunk* G::kHaloArea);
  PSF_SHARED(float, sums, kChunk* G::kPixels * kWarps * 32);
  PSF_SHARED(float, rows, kLearned ? kChunk * G::J * G::kRow : 4);
  const Place at = place_of(blockIdx.x, s, G::kTileHeight);
  const int tx = threadIdx.x % 32, ty = threadIdx.x / 32 * G::kPixels;
  const int x = at.x0 + tx, y = at.y0 + ty;
  const int64_t area = static_cast<int64_t>(s.height) * s.width;
  const auto load = [&](const T* data, int chunk) {
    __syncthreads();
    load_tile(tile, data + at.base, s, chunk, at.x0, at.y0, G::kHaloWidth, G::kHaloArea, G::kRadius);
    if constexpr (kLearned) load_weight<kWindow>(rows, in.weight, in.bias, chunk, s.dim);
    __syncthreads();
  };
  for (int m = 0; m < 2; ++m) {
    float attention[G::kPixels][G::J] = {}, change[G::kPixels][G::J] = {};
    for (int chunk = 0; chunk < s.dim; chunk += kChunk) {
      load(m == 0 ? in.k_pan : in.k_ms, chunk);
      add_dots<kWindow, kLearned>(attention, in.q + at.base, tile, rows, s, chunk, x, y, tx, ty);
      load(m == 0 ? in.v_pan : in.v_ms, chunk);
      const T* grad = (m == 0 ? grad_pan : grad_ms) + at.base;
      add_dots<kWindow, kLearned>(change, grad, tile, rows, s, chunk, x, y, tx, ty);
    }
    softmax(attention, in.scale);
#pragma unroll
    for (int n = 0; n < G::kPixels; ++n) {
      if (x >= s.width || y + n >= s.height) continue;
      float mean = 0.0f;
#pragma unroll
      for (int j = 0; j < G::J; ++j) mean += attention[n][j] * change[n][j];
      const int64_t pixel = static_cast<int64_t>(y + n) * s.width + x;
#pragma unroll
      for (int j = 0; j < G::J; ++j) {
        workspace.at(m, 0, at.head, area, G::J)[j * area + pixel] = attention[n][j];
        workspace.at(m, 1, at.head, area, G::J)[j * area + pixel] = in.scale * attention[n][j] * (change[n][j] - mean);
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
        add_mix<kWindow, kLearned>(mixed, slope, tile, rows, d, tx, ty);
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
template <class T, int kWindow, bool kLearned>
__global__ void __launch_bounds__(kWarps * 32)
    backward_neighbour_kernel(const T* q, const T* grad_pan, const T* grad_ms, T* grad_k_pan, T* grad_v_pan,
                              T* grad_k_ms, T* grad_v_ms, const float* weight, Workspace workspace, Shape s) {
  using G = Geometry<kWindow>;
  constexpr int kColumn = (G::J + 3) / 4 * 4;
  PSF_SHARED(float, columns, kLearned ? kChunk * G::J * kColumn : 4);  // [d][p][j], the transpose of a row of W
  const Place at = place_of(blockIdx.x, s, kWarps);
  const int x = at.x0 + static_cast<int>(threadIdx.x % 32), y = at.y0 + static_cast<int>(threadIdx.x / 32);
  const int64_t area = static_cast<int64_t>(s.height) * s.width;
  for (int chunk = 0; chunk < s.dim; chunk += kChunk) {
    if constexpr (kLearned) {
      __syncthreads();
      for (int i = threadIdx.x; i < kChunk * G::J * kColumn; i += blockDim.x) {
        const int j = i % kColumn, p = i / kColumn % G::J, d = chunk + i / (kColumn * G::J);
        columns[i] = j < G::J && d < s.dim ? weight[(d * G::J + j) * G::J + p] : 0.0f;
      }
      __syncthreads();
    }
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
          const int64_t pixel = static_cast<int64_t>(from_y) * s.width + from_x;
          float c[kColumn] = {};
          if constexpr (kLearned) {
#pragma unroll
            for (int j = 0; j < G::J; ++j) c[j] = factor[j * area + pixel];
          } else {
            c[0] = factor[p * area + pixel];
          }
#pragma unroll
          for (int d = 0; d < kChunk; ++d) {
            float mixed = c[0];
            if constexpr (kLearned) mixed = dot_row<kColumn>(columns + (d * G::J + p) * kColumn, c);
            sums[d] += load_pixel(left, s, chunk + d, from_x, from_y) * mixed;
          }
        }
#pragma unroll
        for (int d = 0; d < kChunk; ++d) store_pixel(result, sums[d], s, chunk + d, x, y);
      }
  }
}

// Gradients of W and b: with L, R, c as above (R = k or v), over pixels, heads, images, modalities, keys and values,
//   dW[d,j,p] = sum c_j(x) L[d](x) R[d](x+p),   db[d,j] = sum c_j(x) L[d](x)   (p = J).
// A lane owns pairs (d, p) of a chunk, a block walks over every gridDim.x-th tile; partial sums of blocks and slices
// go to `partial` [gridDim.x * slices][dim][J + 1][J] and are added up in a fixed order afterwards.
template <int kWindow>
struct WeightGeometry {
  using G = Geometry<kWindow>;
  static constexpr int kPairs = kChunk * (G::J + 1);
  static constexpr int kPairWarps = (kPairs + 31) / 32;
  static constexpr int kSlices = kWarps / kPairWarps > 0 ? kWarps / kPairWarps : 1;
  static constexpr int kThreads = kPairWarps * kSlices * 32;
  static constexpr int kRows = kWindow == 3 ? 8 : 4;  // pixel rows of a tile
  static constexpr int kHaloArea = G::kHaloWidth * (kRows + 2 * G::kRadius);
  static constexpr int kColumn = (G::J + 3) / 4 * 4;
};

template <class T, int kWindow>
__global__ void __launch_bounds__(WeightGeometry<kWindow>::kThreads)
    backward_weight_kernel(Inputs<T> in, const T* grad_pan, const T* grad_ms, Workspace workspace, float* partial,
                           int64_t tiles, Shape s) {
  using G = Geometry<kWindow>;
  using W = WeightGeometry<kWindow>;
  PSF_SHARED(float, right, kChunk* W::kHaloArea);
  PSF_SHARED(float, left, kChunk* W::kRows* kTileWidth);
  PSF_SHARED(float, factor, W::kRows * kTileWidth * W::kColumn);
  const int slice = threadIdx.x / 32 / W::kPairWarps;
  const int pair = static_cast<int>(threadIdx.x) - slice * W::kPairWarps * 32;
  const int d = min(pair / (G::J + 1), kChunk - 1), p = pair % (G::J + 1);
  const int64_t area = static_cast<int64_t>(s.height) * s.width;
  for (int chunk = 0; chunk < s.dim; chunk += kChunk) {
    float sums[G::J] = {};
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      const Place at = place_of(tile, s, W::kRows);
      for (int m = 0; m < 2; ++m)
        for (int kind = 0; kind < 2; ++kind) {
          const T* l = (kind == 1 ? in.q : m == 0 ? grad_pan : grad_ms) + at.base;
          const T* r = (kind == 1 ? (m == 0 ? in.k_pan : in.k_ms) : (m == 0 ? in.v_pan : in.v_ms)) + at.base;
          const float* c = workspace.at(m, kind, at.head, area, G::J);
          __syncthreads();
          load_tile(right, r, s, chunk, at.x0, at.y0, G::kHaloWidth, W::kHaloArea, G::kRadius);
          load_tile(left, l, s, chunk, at.x0, at.y0, kTileWidth, W::kRows * kTileWidth, 0);
          for (int i = threadIdx.x; i < W::kRows * kTileWidth * G::J; i += blockDim.x) {
            const int j = i / (W::kRows * kTileWidth), t = i % (W::kRows * kTileWidth);
            const int x = at.x0 + t % kTileWidth, y = at.y0 + t / kTileWidth;
            const bool inside = x < s.width && y < s.height;
            factor[t * W::kColumn + j] = inside ? c[j * area + static_cast<int64_t>(y) * s.width + x] : 0.0f;
          }
          __syncthreads();
          for (int t = slice; t < W::kRows * kTileWidth; t += W::kSlices) {
            float z = left[d * W::kRows * kTileWidth + t];
            if (p < G::J)
              z *= right[d * W::kHaloArea + (t / kTileWidth + p / kWindow) * G::kHaloWidth + t % kTileWidth +
                         p % kWindow];
#pragma unroll
            for (int j = 0; j < G::J; ++j) sums[j] += z * factor[t * W::kColumn + j];
          }
        }
    }
    if (pair < W::kPairs && chunk + d < s.dim) {
      float* to = partial +
                  ((static_cast<int64_t>(blockIdx.x) * W::kSlices + slice) * s.dim + chunk + d) * (G::J + 1) * G::J +
                  p * G::J;
#pragma unroll
      for (int j = 0; j < G::J; ++j) to[j] = sums[j];
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
  STD_TORCH_CHECK(height < (1 << 30) && width < (1 << 30), "cm3a: height, width: expected below 2^30, got ", height,
                  " x ", width);
  Shape s;
  s.image = channels * height * width;
  s.channel = channels_last ? 1 : height * width;
  s.pixel = channels_last ? channels : 1;
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
    return {pointer<T>(q),
            pointer<T>(k_pan),
            pointer<T>(v_pan),
            pointer<T>(k_ms),
            pointer<T>(v_ms),
            weight ? pointer<float>(*weight) : nullptr,
            bias ? pointer<float>(*bias) : nullptr,
            static_cast<float>(scale)};
  }
};

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

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k_pan, const Tensor& v_pan, const Tensor& k_ms,
                                   const Tensor& v_ms, std::optional<Tensor> weight, std::optional<Tensor> bias,
                                   int64_t num_heads, int64_t window, double scale, bool channels_last) {
  Tensor out_pan = like(q, channels_last), out_ms = like(q, channels_last);
  if (q.numel() == 0) return {out_pan, out_ms};
  const psf::Launch launch(q);
  const Arguments a = prepare(q, k_pan, v_pan, k_ms, v_ms, weight, bias, channels_last);
  Shape s = shape_of(q, num_heads, channels_last);
  dispatch(q.scalar_type(), window, weight.has_value(), [&]<class T, int kWindow, bool kLearned>() {
    const int64_t blocks = tile(s, q.size(0), Geometry<kWindow>::kTileHeight);
    launch(forward_kernel<T, kWindow, kLearned>, grid_of(blocks), dim3(kWarps * 32), 0, a.inputs<T>(scale),
           pointer<T>(out_pan), pointer<T>(out_ms), s);
  });
  return {out_pan, out_ms};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_pan_, const Tensor& grad_ms_, const Tensor& q, const Tensor& k_pan, const Tensor& v_pan,
    const Tensor& k_ms, const Tensor& v_ms, std::optional<Tensor> weight, std::optional<Tensor> bias, int64_t num_heads,
    int64_t window, double scale, bool channels_last) {
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
  const int64_t plane = batch * num_heads * J * s.height * s.width;
  const Tensor space = small({4, plane});
  const Workspace workspace{pointer<float>(space), plane};
  dispatch(q.scalar_type(), window, learned, [&]<class T, int kWindow, bool kLearned>() {
    const Inputs<T> in = a.inputs<T>(scale);
    const dim3 block(kWarps * 32);
    int64_t tiles = tile(s, batch, Geometry<kWindow>::kTileHeight);
    launch(backward_query_kernel<T, kWindow, kLearned>, grid_of(tiles), block, 0, in, pointer<T>(grad_pan),
           pointer<T>(grad_ms), pointer<T>(grads[0]), workspace, s);
    tiles = tile(s, batch, kWarps);
    launch(backward_neighbour_kernel<T, kWindow, kLearned>, grid_of(tiles), block, 0, in.q, pointer<T>(grad_pan),
           pointer<T>(grad_ms), pointer<T>(grads[1]), pointer<T>(grads[2]), pointer<T>(grads[3]), pointer<T>(grads[4]),
           in.weight, workspace, s);
    if constexpr (kLearned) {
      using W = WeightGeometry<kWindow>;
      tiles = tile(s, batch, W::kRows);
      // Enough blocks to fill a large GPU; a fixed number, so that the order of addition is the same everywhere.
      const int64_t blocks = tiles < 528 ? tiles : 528;
      const int total = s.dim * (W::G::J + 1) * W::G::J;
      const Tensor partial = small({blocks * W::kSlices, total});
      launch(backward_weight_kernel<T, kWindow>, grid_of(blocks), dim3(W::kThreads), 0, in, pointer<T>(grad_pan),
             pointer<T>(grad_ms), workspace, pointer<float>(partial), tiles, s);
      launch(reduce_kernel, dim3((total + 255) / 256), dim3(256), 0, static_cast<const float*>(pointer<float>(partial)),
             pointer<float>(grad_weight), pointer<float>(grad_bias), static_cast<int>(blocks * W::kSlices), W::G::J,
             s.dim);
    }
  });
  return {grads[0], grads[1], grads[2], grads[3], grads[4], grad_weight, grad_bias};
}

}  // namespace

PSF_CUDA_LIBRARY(m) {
  m.impl("cm3a_fwd", TORCH_BOX(&forward));
  m.impl("cm3a_bwd", TORCH_BOX(&backward));
}

// What cm3a_op.cpp prepares and cm3a_kernel.cpp runs.
//
// The work is cut into items, a tile of pixels of one head of one image each, whatever the number of threads. A tile is
// copied with its surroundings (zero outside the image) into scratch memory, a plane of pixels a channel.
#pragma once

#include <cstdint>

#include "cpu/capability.h"
#include "cpu/element.h"

namespace psf::cm3a {

// A [B, C, H, W] tensor with any strides, in elements.
struct Map {
  void* data;
  int64_t batch, channel, row, column;
};

struct Call {
  Element element;
  int64_t batch, heads, dim, height, width;
  int64_t window;
  double scale;
  // [dim, window^2 + 1, window^2]: weight[d, j, p] at (d, p, j) and bias[d, j] at (d, window^2, j), in the type
  // computed in (float, double for f64); null for the exact shift.
  const void* factor;
  Map q, k[2], v[2];                              // 0: PAN, 1: MS
  Map out[2];                                     // forward
  Map grad_out[2], grad_q, grad_k[2], grad_v[2];  // backward
};

// How a call is cut; the forward reaches `reach` = window / 2 pixels beyond the tile, the backward twice that.
struct Tiling {
  int64_t rows, columns;             // of a tile
  int64_t tiles_down, tiles_across;  // of an image
  int64_t items;
  int64_t scratch_bytes;  // of each thread, aligned to 64
};

}  // namespace psf::cm3a

namespace psf {
PSF_DECLARE(cm3a::Tiling, cm3a_tiling, const cm3a::Call& call, bool backward)
// Items [begin, end).
PSF_DECLARE(void, cm3a_forward, const cm3a::Call& call, const cm3a::Tiling& tiling, int64_t begin, int64_t end,
            void* scratch)
// The same; adds the gradient of `factor`, in its order, to grad_factor.
PSF_DECLARE(void, cm3a_backward, const cm3a::Call& call, const cm3a::Tiling& tiling, int64_t begin, int64_t end,
            void* scratch, double* grad_factor)
}  // namespace psf

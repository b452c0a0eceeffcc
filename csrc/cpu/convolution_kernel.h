// What convolution_op.cpp prepares and convolution_kernel.cpp runs: 3x3 convolutions as Winograd's F(4x4, 3x3) or
// F(6x6, 3x3).
#pragma once

#include <cstdint>

#include "cpu/capability.h"
#include "cpu/element.h"

namespace psf::convolution {

constexpr int64_t kChunk = 256;  // pixels whose moments are summed in float32

// [B, channels, H, W] with adjacent channels; strides in elements.
struct Image {
  void* data;
  int64_t image, row, pixel;
};

struct Call {
  Element element;
  int64_t height, width, channels, outputs;
  Image x, residual, y;  // residual.data null: none
  bool stream;           // results go past the caches: y is float32 and its pixels are whole cache lines
  // x becomes scale x + shift, then x sigmoid(x) where silu; [B, channels], null for none.
  const float *scale, *shift;
  bool silu;
  const float* bias;    // [outputs]
  int64_t bias_image;   // from image to image: 0 or outputs
  const float* weight;  // as winograd_weight leaves it
};

// How images are cut into blocks of tiles, and the memory that takes, in floats.
struct Plan {
  int64_t tile;     // 4 or 6: pixels of the result that a tile has in each direction
  int64_t columns;  // tiles of a block along a row
  int64_t blocks_down, blocks_across;
  int64_t panel;  // outputs that are worked on at once
  int64_t panels;
  int64_t row;      // floats of a tile's channels
  int64_t weights;  // of all panels
  int64_t panel_weights;
  int64_t scratch;
};

}  // namespace psf::convolution

namespace psf {
PSF_DECLARE(convolution::Plan, winograd_plan, const convolution::Call& call)
// One panel of the transformed weight: [panels][(tile + 2)²][channels][panel]; strides of weight [outputs,
// channels, 3, 3] in elements; scratch: 9 * channels * panel floats.
PSF_DECLARE(void, winograd_weight, const convolution::Call& call, const convolution::Plan& plan, Element element,
            const void* weight, const int64_t (&strides)[4], int64_t panel, float* scratch, float* result)
// Block `task` of blocks_down * blocks_across an image.
PSF_DECLARE(void, winograd_block, const convolution::Call& call, const convolution::Plan& plan, int64_t task,
            float* scratch)
// Sums of x - origin and of its square over a run of pixels of one image, added to sums [2][channels], and the origin,
// the image's first pixel, to sums[2].
PSF_DECLARE(void, channel_sums, const convolution::Call& call, const void* image, int64_t begin, int64_t end,
            double* sums)
}  // namespace psf

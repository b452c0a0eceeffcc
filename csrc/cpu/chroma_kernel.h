// What chroma_op.cpp prepares and chroma_kernel.cpp runs: bands held within what others have near.
#pragma once

#include <cstdint>

#include "cpu/capability.h"
#include "cpu/element.h"

namespace psf::chroma {

// Bands of an image; strides in elements, within a row pixels are adjacent.
struct Bands {
  const void* data;
  int64_t band, row;
};

struct Image {
  Element element;  // f32 or f64
  int64_t bands, height, width;
  int64_t reach[2];  // rows and columns to each side that count as near
  Bands x, start, near;
  void* y;  // [bands, height, width]
};

constexpr int64_t kRows = 16;  // of the result that a call should make at once, at most

}  // namespace psf::chroma

namespace psf {
// Bytes of scratch, aligned to 64.
PSF_DECLARE(int64_t, chroma_scratch, const chroma::Image& image)
// Rows [begin, end) of the result, not more than kRows.
PSF_DECLARE(void, hold_chroma, const chroma::Image& image, int64_t begin, int64_t end, void* scratch)
}  // namespace psf

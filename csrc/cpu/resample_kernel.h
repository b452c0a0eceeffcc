// What resample_op.cpp prepares and resample_kernel.cpp runs: a banded matrix along each axis of an image.
#pragma once

#include <cstdint>

#include "cpu/capability.h"
#include "cpu/element.h"

namespace psf::resample {

// Sample i is the sum over t of weight[i * taps + t] times pixel first[i] + t.
struct Axis {
  int64_t count, taps;
  const int64_t* first;
  const void* weight;  // double for float64, else float
};

struct Image {
  Element element;
  int64_t height, width;
  const void* x;
  int64_t row;  // stride in elements; within a row pixels are adjacent
  Axis rows, columns;
  void* y;  // [rows.count, columns.count]
};

}  // namespace psf::resample

namespace psf {
// Rows of the result that a call should make at once, at most.
PSF_DECLARE(int64_t, resample_rows_at_once, Element element)
// Bytes of scratch, aligned to 64.
PSF_DECLARE(int64_t, resample_scratch, const resample::Image& image)
// Rows [begin, end) of the result, not more than resample_rows_at_once.
PSF_DECLARE(void, resample_rows, const resample::Image& image, int64_t begin, int64_t end, void* scratch)
}  // namespace psf

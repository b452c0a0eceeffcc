// What wavelet_op.cpp prepares and wavelet_kernel.cpp runs.
//
// Along H a transform is a sparse matrix with two weights an entry (low and high pass), borders included: `Rows`. Along
// W it is a filter over one row with a border on both sides: `Line`. Weights are double for float64 and float
// otherwise.
#pragma once

#include <cstdint>

#include "cpu/capability.h"
#include "cpu/element.h"

namespace psf::wavelet {

// Row r of the result combines rows index[start[r]] ... index[start[r + 1] - 1] of the source.
struct Rows {
  const int64_t* start;
  const int64_t* index;
  const void* low;
  const void* high;
  int64_t most;  // entries of the longest row
};

// The extended line has `size` samples, of which [left, left + n) are x itself; `left` is even.
struct Line {
  int64_t n, count, left, size;
  int64_t step, first, dilation;  // y[i] = sum_k f[k] e[step i + first - dilation k], positions from the line's begin
  int64_t taps;
  const void* low = nullptr;
  const void* high = nullptr;
  // e[position[b]] takes weight[b] x[index[b]]: every border sample that is not zero.
  int64_t borders = 0;
  const int64_t* position = nullptr;
  const int64_t* index = nullptr;
  const void* weight = nullptr;
};

struct Plane {
  const void* data;
  int64_t plane, row;  // strides in elements; within a row elements are adjacent
};

// x [N, H, W] -> four bands of [N, rows, line.count], rows of which are adjacent.
struct Analysis {
  Element element;
  Plane x;
  void* y[4];
  int64_t plane;  // between two planes of a band
  int64_t rows;
  Rows vertical;
  Line line;
  bool stream;  // float32 results go past the caches: every row of them is aligned to 128 bytes
};

// bands of [N, H', line.count] -> x [N, rows, line.n], dense. vertical.index holds rows of the bands.
struct Synthesis {
  Element element;
  Plane bands[4];
  void* x;
  int64_t rows;
  Rows vertical;
  Line line;
  bool stream;  // float32 results go past the caches: every row of them is aligned to 128 bytes
};

}  // namespace psf::wavelet

namespace psf {
// Rows [begin, end) of the N * rows rows of the result; `scratch` has scratch_bytes(...) bytes, aligned to 64.
PSF_DECLARE(void, wavelet_analysis, const wavelet::Analysis& call, int64_t begin, int64_t end, void* scratch)
PSF_DECLARE(void, wavelet_synthesis, const wavelet::Synthesis& call, int64_t begin, int64_t end, void* scratch)
}  // namespace psf

// Operator hold_chroma_fwd on the CPU: checks and threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>

#include "cpu/chroma_kernel.h"
#include "cpu/tensor.h"

namespace psf {

namespace {

using torch::stable::Tensor;
using namespace chroma;

Tensor with_adjacent_columns(const Tensor& x) {
  return x.stride(3) == 1 || x.size(3) <= 1 ? x : torch::stable::contiguous(x);
}

Bands bands_of(const Tensor& x, int64_t image) {
  const int64_t bytes = image * x.stride(0) * static_cast<int64_t>(x.element_size());
  return {static_cast<const char*>(x.const_data_ptr()) + bytes, x.stride(1), x.stride(2)};
}

Tensor hold_chroma_fwd(const Tensor& image, const Tensor& before, const Tensor& around, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(image.dim() == 4, "x: expected [B, C, H, W], got ", image.dim(), " dimensions");
  for (const Tensor* other : {&before, &around}) {
    STD_TORCH_CHECK(other->dim() == 4 && other->scalar_type() == image.scalar_type(),
                    "start, near: expected the shape and dtype of x");
    for (int axis = 0; axis < 4; ++axis)
      STD_TORCH_CHECK(other->size(axis) == image.size(axis), "start, near: expected the shape and dtype of x");
  }
  const Element element = element_of("x", image);
  STD_TORCH_CHECK(element == Element::f32 || element == Element::f64, "x: expected float32 or float64");
  STD_TORCH_CHECK(rows >= 0 && columns >= 0, "reach: expected 0 or more, got ", std::min(rows, columns));
  const Tensor x = with_adjacent_columns(image), start = with_adjacent_columns(before),
               near = with_adjacent_columns(around);
  const int64_t batch = x.size(0), bands = x.size(1), height = x.size(2), width = x.size(3);
  Tensor y = torch::stable::new_empty(x, {batch, bands, height, width});
  if (y.numel() == 0) return y;
  const ResultMemory memory(y);
  const auto call = [&](int64_t b) {
    char* target = static_cast<char*>(y.mutable_data_ptr());
    return Image{element,
                 bands,
                 height,
                 width,
                 {rows, columns},
                 bands_of(x, b),
                 bands_of(start, b),
                 bands_of(near, b),
                 target + b * bands * height * width * static_cast<int64_t>(y.element_size())};
  };
  const int64_t groups = (height + kRows - 1) / kRows;
  for_tasks(batch * groups, [&](const auto& next) {
    const AlignedBuffer<char> scratch(PSF_DISPATCH(chroma_scratch, call(0)));
    for (int64_t task = next(); task >= 0; task = next()) {
      const int64_t begin = task % groups * kRows;
      PSF_DISPATCH(hold_chroma, call(task / groups), begin, std::min(begin + kRows, height), scratch.get());
    }
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pansharp_fast, CPU, m) { m.impl("hold_chroma_fwd", TORCH_BOX(&hold_chroma_fwd)); }

}  // namespace psf

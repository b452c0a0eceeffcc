// Operator resample_fwd on the CPU: checks, planes, threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>

#include "cpu/resample_kernel.h"
#include "cpu/tensor.h"

namespace psf {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using namespace resample;

// Matrices along one axis, one for all images or bands or one for each.
class Matrices {
 public:
  Matrices(const char* name, const Tensor& x, int64_t length, const Tensor& first, const Tensor& weight)
      : first_(torch::stable::contiguous(first)), weight_(torch::stable::contiguous(weight)) {
    const ScalarType type = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    STD_TORCH_CHECK(first.dim() == 3 && weight.dim() == 4 && first.scalar_type() == ScalarType::Long &&
                        weight.scalar_type() == type,
                    name, ": expected first pixels [B, C, count] int64 and weights [B, C, count, taps]");
    for (int axis = 0; axis < 3; ++axis)
      STD_TORCH_CHECK(first.size(axis) == weight.size(axis), name, ": expected a first pixel for each row of weights");
    for (int axis = 0; axis < 2; ++axis) {
      const int64_t have = first.size(axis);
      STD_TORCH_CHECK(have == 1 || have == x.size(axis), name, ": expected 1 or ", x.size(axis), " matrices, got ",
                      have);
      step_[axis] = have == 1 ? 0 : axis == 0 ? first.size(1) : 1;
    }
    count_ = weight.size(2);
    taps_ = weight.size(3);
    const int64_t* index = static_cast<const int64_t*>(first_.const_data_ptr());
    for (int64_t i = 0; i < first.numel(); ++i)
      STD_TORCH_CHECK(index[i] >= 0 && index[i] <= length - taps_, name, ": expected ", taps_, " pixels within ",
                      length, ", got such from ", index[i]);
  }
  Axis of(int64_t image, int64_t band) const {
    const int64_t matrix = image * step_[0] + band * step_[1];
    return {count_, taps_, static_cast<const int64_t*>(first_.const_data_ptr()) + matrix * count_,
            static_cast<const char*>(weight_.const_data_ptr()) +
                matrix * count_ * taps_ * static_cast<int64_t>(weight_.element_size())};
  }
  int64_t count() const { return count_; }

 private:
  Tensor first_, weight_;
  int64_t step_[2], count_, taps_;
};

Tensor resample_fwd(const Tensor& image, const Tensor& row_first, const Tensor& row_weight, const Tensor& column_first,
                    const Tensor& column_weight) {
  STD_TORCH_CHECK(image.dim() == 4, "x: expected [B, C, H, W], got ", image.dim(), " dimensions");
  const Tensor x = image.stride(3) == 1 || image.size(3) <= 1 ? image : torch::stable::contiguous(image);
  const int64_t bands = x.size(1), height = x.size(2), width = x.size(3);
  const Matrices rows("rows", x, height, row_first, row_weight);
  const Matrices columns("columns", x, width, column_first, column_weight);
  Tensor y = torch::stable::new_empty(x, {x.size(0), bands, rows.count(), columns.count()});
  if (y.numel() == 0) return y;
  const ResultMemory memory(y);

  const Element element = element_of("x", x);
  const int64_t most = PSF_DISPATCH(resample_rows_at_once, element);
  const int64_t groups = (rows.count() + most - 1) / most;
  const int64_t size = (rows.count() + groups - 1) / groups;  // as even as they go
  const auto plane = [&](int64_t number) {
    const int64_t b = number / bands, c = number % bands;
    const char* source = static_cast<const char*>(x.const_data_ptr());
    char* target = static_cast<char*>(y.mutable_data_ptr());
    return Image{element,
                 height,
                 width,
                 source + (b * x.stride(0) + c * x.stride(1)) * static_cast<int64_t>(x.element_size()),
                 x.stride(2),
                 rows.of(b, c),
                 columns.of(b, c),
                 target + number * rows.count() * columns.count() * static_cast<int64_t>(y.element_size())};
  };
  for_tasks(x.size(0) * bands * groups, [&](const auto& next) {
    const AlignedBuffer<char> scratch(PSF_DISPATCH(resample_scratch, plane(0)));
    for (int64_t task = next(); task >= 0; task = next()) {
      const int64_t begin = task % groups * size, end = std::min(begin + size, rows.count());
      if (begin < end) PSF_DISPATCH(resample_rows, plane(task / groups), begin, end, scratch.get());
    }
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pansharp_fast, CPU, m) { m.impl("resample_fwd", TORCH_BOX(&resample_fwd)); }

}  // namespace psf

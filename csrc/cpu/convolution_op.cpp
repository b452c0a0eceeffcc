// Operators conv3x3_fwd and group_norm_factors on the CPU: checks, outputs, threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/convolution_kernel.h"
#include "cpu/tensor.h"

namespace psf {
namespace {

using convolution::Call;
using convolution::Image;
using convolution::Plan;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// [B, H, W, C] seen as [B, C, H, W].
Tensor channels_first(const Tensor& x) { return torch::stable::transpose(torch::stable::transpose(x, 2, 3), 1, 2); }

// x itself where its channels are adjacent, or a copy of which that is true.
Tensor adjacent(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, "x: expected [B, C, H, W], got ", x.dim(), " dimensions");
  if (x.stride(1) == 1 || x.size(1) == 1) return x;
  return channels_first(torch::stable::contiguous(torch::stable::transpose(torch::stable::transpose(x, 1, 2), 2, 3)));
}

Image image_of(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(2), x.stride(3)}; }

const float* floats(const char* name, const std::optional<Tensor>& tensor, int64_t rows, int64_t columns) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(
      tensor->scalar_type() == ScalarType::Float && tensor->is_contiguous() && tensor->numel() == rows * columns, name,
      ": expected ", rows, " x ", columns, " contiguous float32 values");
  return static_cast<const float*>(tensor->const_data_ptr());
}

Tensor conv3x3_fwd(const Tensor& image, const Tensor& weight, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
                   const std::optional<Tensor>& added, bool silu) {
  const Tensor x = adjacent(image);
  const int64_t batch = x.size(0), channels = x.size(1), outputs = weight.size(0);
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(1) == channels && weight.size(2) == 3 && weight.size(3) == 3,
                  "weight: expected [O, ", channels, ", 3, 3]");
  STD_TORCH_CHECK(scale.has_value() == shift.has_value(), "shift: expected together with scale");
  const Tensor memory = torch::stable::new_empty(x, {batch, x.size(2), x.size(3), outputs});
  const Tensor y = channels_first(memory);
  Call call{};
  call.element = element_of("x", x);
  STD_TORCH_CHECK(call.element != Element::f64, "x: expected float32, bfloat16 or float16");
  call.height = x.size(2);
  call.width = x.size(3);
  call.channels = channels;
  call.outputs = outputs;
  call.x = image_of(x);
  call.y = image_of(y);
  call.stream = ResultMemory(memory).past_caches() && call.element == Element::f32 && outputs % 16 == 0 &&
                reinterpret_cast<uintptr_t>(call.y.data) % 64 == 0;
  std::optional<Tensor> residual;
  if (added) {
    residual = adjacent(*added);
    STD_TORCH_CHECK(residual->sizes().equals(y.sizes()) && residual->scalar_type() == x.scalar_type(),
                    "residual: expected the shape of the result and the dtype of x");
    call.residual = image_of(*residual);
  }
  call.scale = floats("scale", scale, batch, channels);
  call.shift = floats("shift", shift, batch, channels);
  call.silu = silu;
  const bool shared = bias && bias->dim() == 1;
  call.bias = floats("bias", bias, shared ? 1 : batch, outputs);
  call.bias_image = shared ? 0 : outputs;

  const Plan plan = PSF_DISPATCH(winograd_plan, call);
  const AlignedBuffer<float> packed(plan.weights);
  call.weight = packed.get();
  const Element element = element_of("weight", weight);
  STD_TORCH_CHECK(element != Element::f64, "weight: expected float32, bfloat16 or float16");
  const int64_t strides[4] = {weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)};
  for_tasks(plan.panels, [&](const auto& next) {
    const AlignedBuffer<float> scratch(9 * channels * plan.panel);
    for (int64_t panel = next(); panel >= 0; panel = next())
      PSF_DISPATCH(winograd_weight, call, plan, element, weight.const_data_ptr(), strides, panel, scratch.get(),
                   packed.get());
  });
  for_tasks(batch * plan.blocks_down * plan.blocks_across, [&](const auto& next) {
    const AlignedBuffer<float> scratch(plan.scratch);
    for (int64_t task = next(); task >= 0; task = next()) PSF_DISPATCH(winograd_block, call, plan, task, scratch.get());
  });
  return y;
}

std::tuple<Tensor, Tensor> group_norm_factors(const Tensor& image, const std::optional<Tensor>& weight,
                                              const std::optional<Tensor>& bias, int64_t groups, double eps) {
  const Tensor x = adjacent(image);
  const int64_t batch = x.size(0), channels = x.size(1), pixels = x.size(2) * x.size(3);
  STD_TORCH_CHECK(groups > 0 && channels % groups == 0, "groups: expected a divisor of ", channels, ", got ", groups);
  Call call{};
  call.element = element_of("x", x);
  STD_TORCH_CHECK(call.element != Element::f64, "x: expected float32, bfloat16 or float16");
  call.width = x.size(3);
  call.channels = channels;
  call.x = image_of(x);
  const float* factor = floats("weight", weight, 1, channels);
  const float* offset = floats("bias", bias, 1, channels);

  constexpr int64_t kRun = 32 * convolution::kChunk;  // pixels of a task, whatever the number of threads
  const int64_t runs = (pixels + kRun - 1) / kRun;
  std::vector<double> sums(static_cast<size_t>(batch * runs * 3 * channels));
  const char* data = static_cast<const char*>(x.const_data_ptr());
  for_tasks(batch * runs, [&](const auto& next) {
    for (int64_t task = next(); task >= 0; task = next()) {
      const int64_t begin = task % runs * kRun, end = begin + kRun < pixels ? begin + kRun : pixels;
      PSF_DISPATCH(channel_sums, call, data + task / runs * x.stride(0) * x.element_size(), begin, end,
                   sums.data() + task * 3 * channels);
    }
  });

  Tensor scale = torch::stable::new_empty(x, {batch, channels}, std::make_optional(ScalarType::Float));
  Tensor shift = torch::stable::new_empty(x, {batch, channels}, std::make_optional(ScalarType::Float));
  float* scales = static_cast<float*>(scale.mutable_data_ptr());
  float* shifts = static_cast<float*>(shift.mutable_data_ptr());
  const int64_t members = channels / groups;
  std::vector<double> means(static_cast<size_t>(members)), variances(means);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t g = 0; g < groups; ++g) {
      double mean = 0, variance = 0;
      for (int64_t i = 0; i < members; ++i) {
        const int64_t c = g * members + i;
        double sum = 0, square = 0;
        for (int64_t run = 0; run < runs; ++run) {
          sum += sums[(b * runs + run) * 3 * channels + c];
          square += sums[((b * runs + run) * 3 + 1) * channels + c];
        }
        sum /= pixels;
        means[i] = sums[(b * runs * 3 + 2) * channels + c] + sum;
        variances[i] = square / pixels - sum * sum;
        mean += means[i] / members;
      }
      for (int64_t i = 0; i < members; ++i)
        variance += (variances[i] + (means[i] - mean) * (means[i] - mean)) / members;
      const double inverse = 1 / std::sqrt((variance < 0 ? 0 : variance) + eps);
      for (int64_t i = 0; i < members; ++i) {
        const int64_t c = g * members + i;
        const double slope = inverse * (factor != nullptr ? factor[c] : 1.0f);
        scales[b * channels + c] = static_cast<float>(slope);
        shifts[b * channels + c] = static_cast<float>((offset != nullptr ? offset[c] : 0.0f) - mean * slope);
      }
    }
  return {scale, shift};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pansharp_fast, CPU, m) {
  m.impl("conv3x3_fwd", TORCH_BOX(&conv3x3_fwd));
  m.impl("group_norm_factors", TORCH_BOX(&group_norm_factors));
}

}  // namespace psf

// The frequency attention's passes on the CPU: shapes, tasks and threads. The FFTs between them are torch's
// (pansharp_fast/ops/frequency_attention.py, which also holds the schemas).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <vector>

#include "cpu/frequency_attention_kernel.h"
#include "cpu/tensor.h"
#include "frequency_attention_tensors.h"

namespace psf {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Frequencies and pixels of a task: enough to hide the cost of starting one, few enough to balance threads.
constexpr int64_t kTaskFrequencies = 32 * kFrequencyBlock;
constexpr int64_t kTaskPixels = 8 * kNormalizeBlock;

// A batch of spectra [B, C, height, columns, 2] cut into tasks.
struct Plan {
  Spectrum spectrum;
  int64_t batch, heads, runs;
  int64_t head_size;  // scalars between heads

  Plan(const Tensor& x, int64_t num_heads, int64_t width)
      : spectrum{x.size(1) / num_heads, x.size(2), width}, batch(x.size(0)), heads(num_heads) {
    check_spectrum(x, width);
    runs = (spectrum.frequencies() + kTaskFrequencies - 1) / kTaskFrequencies;
    head_size = 2 * spectrum.depth * spectrum.frequencies();
  }

  int64_t square() const { return spectrum.depth * spectrum.depth; }

  // body(scratch, task, head, begin, end) for every run of frequencies of every head.
  template <typename T, typename Body>
  void run(Body body) const {
    const int64_t total = spectrum.frequencies();
    for_tasks(batch * heads * runs, [&](const auto& next) {
      AlignedBuffer<T> scratch(frequency_scratch(spectrum.depth));
      for (int64_t task = next(); task >= 0; task = next()) {
        const int64_t begin = task % runs * kTaskFrequencies;
        const int64_t end = begin + kTaskFrequencies < total ? begin + kTaskFrequencies : total;
        body(scratch.get(), task, task / runs, begin, end);
      }
    });
  }

  // [B, heads, 2, depth, depth] in double: the tasks' results added up in a fixed order.
  Tensor reduce(const Tensor& like, const std::vector<double>& partial) const {
    Tensor result = torch::stable::new_zeros(like, {batch, heads, 2, spectrum.depth, spectrum.depth},
                                             std::make_optional(ScalarType::Double));
    double* out = data<double>(result);
    for (int64_t task = 0; task < batch * heads * runs; ++task)
      for (int64_t i = 0; i < 2 * square(); ++i)
        out[task / runs * 2 * square() + i] += partial[static_cast<size_t>(task * 2 * square() + i)];
    return result;
  }

  std::vector<double> partial() const {
    return std::vector<double>(static_cast<size_t>(batch * heads * runs * 2 * square()));
  }
};

// How often each column of the half spectrum stands in the full one, repeated so that a block may start anywhere.
template <typename T>
std::vector<T> column_weights(const Spectrum& s) {
  std::vector<T> weights(static_cast<size_t>(s.columns() + kFrequencyBlock));
  for (size_t i = 0; i < weights.size(); ++i) {
    const int64_t column = static_cast<int64_t>(i) % s.columns();
    weights[i] = column == 0 || 2 * column == s.width ? T(1) : T(2);
  }
  return weights;
}

Tensor gram(const Tensor& q, const Tensor& k, int64_t num_heads, int64_t width) {
  const Plan plan(q, num_heads, width);
  std::vector<double> partial = plan.partial();
  dispatch_spectrum(q, [&](auto zero) {
    using T = decltype(zero);
    plan.run<T>([&](T* scratch, int64_t task, int64_t head, int64_t begin, int64_t end) {
      PSF_DISPATCH(frequency_gram, plan.spectrum, data<const T>(q) + head * plan.head_size,
                   data<const T>(k) + head * plan.head_size, begin, end, scratch,
                   partial.data() + task * 2 * plan.square());
    });
  });
  return plan.reduce(q, partial);
}

void gram_backward(Tensor q, Tensor k, const Tensor& grad, int64_t num_heads, int64_t width) {
  const Plan plan(q, num_heads, width);
  dispatch_spectrum(q, [&](auto zero) {
    using T = decltype(zero);
    const std::vector<T> weights = column_weights<T>(plan.spectrum);
    plan.run<T>([&](T* scratch, int64_t, int64_t head, int64_t begin, int64_t end) {
      PSF_DISPATCH(frequency_gram_backward, plan.spectrum, data<T>(q) + head * plan.head_size,
                   data<T>(k) + head * plan.head_size, weights.data(), data<const T>(grad) + head * 2 * plan.square(),
                   begin, end, scratch);
    });
  });
}

void apply(Tensor v, const Tensor& attention, int64_t num_heads, int64_t width) {
  const Plan plan(v, num_heads, width);
  dispatch_spectrum(v, [&](auto zero) {
    using T = decltype(zero);
    plan.run<T>([&](T* scratch, int64_t, int64_t head, int64_t begin, int64_t end) {
      PSF_DISPATCH(frequency_apply, plan.spectrum, data<T>(v) + head * plan.head_size,
                   data<const T>(attention) + head * 2 * plan.square(), begin, end, scratch);
    });
  });
}

Tensor apply_backward(Tensor v, const Tensor& grad, const Tensor& attention, int64_t num_heads, int64_t width) {
  const Plan plan(v, num_heads, width);
  std::vector<double> partial = plan.partial();
  dispatch_spectrum(v, [&](auto zero) {
    using T = decltype(zero);
    const std::vector<T> weights = column_weights<T>(plan.spectrum);
    plan.run<T>([&](T* scratch, int64_t task, int64_t head, int64_t begin, int64_t end) {
      PSF_DISPATCH(frequency_apply_backward, plan.spectrum, data<T>(v) + head * plan.head_size,
                   data<const T>(grad) + head * plan.head_size, weights.data(),
                   data<const T>(attention) + head * 2 * plan.square(), begin, end, scratch,
                   partial.data() + task * 2 * plan.square());
    });
  });
  return plan.reduce(v, partial);
}

// out [B, C, H, W] = re + im of x [B, C, H, W / 2 + 1, 2] over the whole plane of frequencies. With it the inverse
// transform needs no FFT but rfft2: irfft2(x) = hartley(rfft2(hartley(x))), all orthonormal, because a discrete Hartley
// transform is its own inverse.
void hartley(const Tensor& x, Tensor out) {
  const Plan plan(x, x.size(1), out.size(3));
  STD_TORCH_CHECK(out.stride(3) == 1 && out.stride(2) == out.size(3), "out: expected contiguous maps");
  dispatch_spectrum(x, [&](auto zero) {
    using T = decltype(zero);
    for_tasks(plan.batch * plan.heads, [&](const auto& next) {
      for (int64_t map = next(); map >= 0; map = next())
        PSF_DISPATCH(frequency_hartley, plan.spectrum, data<const T>(x) + map * plan.head_size,
                     data<T>(out) + map / plan.heads * out.stride(0) + map % plan.heads * out.stride(1));
    });
  });
}

Stored stored(ScalarType type) {
  switch (type) {
    case ScalarType::BFloat16:
      return Stored::bfloat16;
    case ScalarType::Half:
      return Stored::float16;
    default:
      return Stored::plain;
  }
}

// body(pointer to the image, image, pixels, block, begin, end) for every run of pixels of every image of x [B, C, H,
// W].
template <typename T, typename Body>
void run_pixels(const Tensor& x, Body body) {
  check_pixels(x);
  const Pixels pixels{stored(x.scalar_type()), x.size(1), x.size(2) * x.size(3), x.stride(1), x.stride(3)};
  const int64_t runs = (pixels.pixels + kTaskPixels - 1) / kTaskPixels;
  for_tasks(x.size(0) * runs, [&](const auto& next) {
    AlignedBuffer<T> block(pixels.channels * kNormalizeBlock);
    for (int64_t task = next(); task >= 0; task = next()) {
      const int64_t begin = task % runs * kTaskPixels;
      const int64_t end = begin + kTaskPixels < pixels.pixels ? begin + kTaskPixels : pixels.pixels;
      const char* image = data<const char>(x) + task / runs * x.stride(0) * static_cast<int64_t>(x.element_size());
      body(image, task / runs, pixels, block.get(), begin, end);
    }
  });
}

Tensor inverse_norm(const Tensor& x) {
  const ScalarType type = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor out = torch::stable::new_empty(x, {x.size(0), 1, x.size(2), x.size(3)}, std::make_optional(type));
  dispatch_spectrum(x, [&](auto zero) {
    using T = decltype(zero);
    run_pixels<T>(
        x, [&](const void* values, int64_t image, const Pixels& pixels, T* block, int64_t begin, int64_t end) {
          PSF_DISPATCH(frequency_inverse_norm, pixels, values, begin, end, block, data<T>(out) + image * pixels.pixels);
        });
  });
  return out;
}

void normalize_backward(const Tensor& x, const Tensor& inverse, Tensor grad) {
  dispatch_spectrum(x, [&](auto zero) {
    using T = decltype(zero);
    run_pixels<T>(
        x, [&](const void* values, int64_t image, const Pixels& pixels, T* block, int64_t begin, int64_t end) {
          PSF_DISPATCH(frequency_normalize_backward, pixels, values, data<const T>(inverse) + image * pixels.pixels,
                       begin, end, block, data<T>(grad) + image * pixels.channels * pixels.pixels);
        });
  });
}

Tensor polar_of(const Tensor& values) {
  const int64_t count = values.numel() / 2;
  Tensor out = torch::stable::new_empty(values, {2, count});
  PSF_DISPATCH(frequency_polar, data<const float>(values), count, data<float>(out), data<float>(out) + count);
  return out;
}

Tensor unit_of(const Tensor& phase) {
  Tensor out = torch::stable::new_empty(phase, {phase.numel(), 2});
  PSF_DISPATCH(frequency_unit, data<const float>(phase), phase.numel(), data<float>(out));
  return out;
}

}  // namespace
}  // namespace psf

STABLE_TORCH_LIBRARY_IMPL(pansharp_fast, CPU, m) {
  m.impl("frequency_attention_inverse_norm", TORCH_BOX(&psf::inverse_norm));
  m.impl("frequency_attention_normalize_bwd", TORCH_BOX(&psf::normalize_backward));
  m.impl("frequency_attention_gram", TORCH_BOX(&psf::gram));
  m.impl("frequency_attention_gram_bwd", TORCH_BOX(&psf::gram_backward));
  m.impl("frequency_attention_apply", TORCH_BOX(&psf::apply));
  m.impl("frequency_attention_apply_bwd", TORCH_BOX(&psf::apply_backward));
  m.impl("frequency_attention_hartley", TORCH_BOX(&psf::hartley));
  m.impl("frequency_attention_polar", TORCH_BOX(&psf::polar_of));
  m.impl("frequency_attention_unit", TORCH_BOX(&psf::unit_of));
}

// cm3a on CPU tensors: checks, memory, threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/cm3a_kernel.h"
#include "cpu/tensor.h"

namespace {

using psf::Element;
using psf::cm3a::Call;
using psf::cm3a::Map;
using psf::cm3a::Tiling;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Gradients of weight and bias are summed per chunk of items and then in the order of chunks, so that they do not
// depend on the number of threads.
constexpr int64_t kMostChunks = 64;

Map map_of(const Tensor& tensor) {
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

Map checked_map(const char* name, const Tensor& tensor, const Tensor& q) {
  STD_TORCH_CHECK(tensor.sizes().equals(q.sizes()) && tensor.scalar_type() == q.scalar_type(), name,
                  ": expected the shape and dtype of q");
  return map_of(tensor);
}

// weight [D, J, window, window] and bias [D, J] interleaved as the kernels read them; empty without a weight.
template <typename T>
std::vector<T> pack_factor(const Call& call, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias) {
  if (!weight) return {};
  const int64_t count = call.window * call.window;
  const T* w = static_cast<const T*>(weight->const_data_ptr());
  const T* b = static_cast<const T*>(bias->const_data_ptr());
  std::vector<T> packed(call.dim * (count + 1) * count);
  for (int64_t d = 0; d < call.dim; ++d)
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t p = 0; p < count; ++p) packed[(d * (count + 1) + p) * count + j] = w[(d * count + j) * count + p];
      packed[(d * (count + 1) + count) * count + j] = b[d * count + j];
    }
  return packed;
}

struct Arguments {
  Call call;
  std::vector<float> factor;
  std::vector<double> factor64;
};

Arguments arguments_of(const Tensor& q, const Tensor& k_pan, const Tensor& v_pan, const Tensor& k_ms,
                       const Tensor& v_ms, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                       int64_t heads, int64_t window, double scale) {
  STD_TORCH_CHECK(q.dim() == 4, "q: expected 4 dimensions, got ", q.dim());
  STD_TORCH_CHECK(heads > 0 && q.size(1) % heads == 0, "num_heads: expected a divisor of ", q.size(1), ", got ", heads);
  STD_TORCH_CHECK(window == 3 || window == 5, "window: expected 3 or 5, got ", window);
  Arguments result;
  Call& call = result.call;
  call.element = psf::element_of("q", q);
  call.batch = q.size(0);
  call.heads = heads;
  call.dim = q.size(1) / heads;
  call.height = q.size(2);
  call.width = q.size(3);
  call.window = window;
  call.scale = scale;
  call.q = map_of(q);
  call.k[0] = checked_map("k_pan", k_pan, q);
  call.v[0] = checked_map("v_pan", v_pan, q);
  call.k[1] = checked_map("k_ms", k_ms, q);
  call.v[1] = checked_map("v_ms", v_ms, q);
  call.factor = nullptr;
  STD_TORCH_CHECK(weight.has_value() == bias.has_value(), "bias: expected together with weight");
  if (weight) {
    const bool wide = call.element == Element::f64;
    const ScalarType type = wide ? ScalarType::Double : ScalarType::Float;
    const int64_t count = window * window;
    STD_TORCH_CHECK(
        weight->scalar_type() == type && weight->is_contiguous() && weight->numel() == call.dim * count * count,
        "weight: expected contiguous [D, J, window, window] of the accumulation dtype");
    STD_TORCH_CHECK(bias->scalar_type() == type && bias->is_contiguous() && bias->numel() == call.dim * count,
                    "bias: expected contiguous [D, J] of the accumulation dtype");
    if (wide) {
      result.factor64 = pack_factor<double>(call, weight, bias);
      call.factor = result.factor64.data();
    } else {
      result.factor = pack_factor<float>(call, weight, bias);
      call.factor = result.factor.data();
    }
  }
  return result;
}

Tensor like_q(const Tensor& q, bool channels_last) {
  using torch::headeronly::MemoryFormat;
  const Tensor result = torch::stable::empty(q.sizes(), q.scalar_type(), std::nullopt, q.device(), std::nullopt,
                                             channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  psf::ResultMemory{result};  // huge pages where they pay
  return result;
}

// Runs f(chunk, first item, last item, scratch) over all chunks, in parallel.
template <typename F>
void for_chunks(const Tiling& tiling, int64_t chunks, const F& f) {
  psf::for_tasks(chunks, [&](const auto& next) {
    const psf::AlignedBuffer<char> scratch(tiling.scratch_bytes);
    for (int64_t chunk = next(); chunk >= 0; chunk = next())
      f(chunk, tiling.items * chunk / chunks, tiling.items * (chunk + 1) / chunks, scratch.get());
  });
}

std::tuple<Tensor, Tensor> cm3a_fwd(const Tensor& q, const Tensor& k_pan, const Tensor& v_pan, const Tensor& k_ms,
                                    const Tensor& v_ms, const std::optional<Tensor>& weight,
                                    const std::optional<Tensor>& bias, int64_t num_heads, int64_t window, double scale,
                                    bool channels_last, bool /*tf32*/) {
  Arguments arguments = arguments_of(q, k_pan, v_pan, k_ms, v_ms, weight, bias, num_heads, window, scale);
  Call& call = arguments.call;
  Tensor out_pan = like_q(q, channels_last), out_ms = like_q(q, channels_last);
  call.out[0] = map_of(out_pan);
  call.out[1] = map_of(out_ms);
  if (q.numel() == 0) return {out_pan, out_ms};
  const Tiling tiling = PSF_DISPATCH(cm3a_tiling, call, false);
  for_chunks(tiling, tiling.items, [&](int64_t, int64_t begin, int64_t end, void* scratch) {
    PSF_DISPATCH(cm3a_forward, call, tiling, begin, end, scratch);
  });
  return {out_pan, out_ms};
}

// Sum of the chunks' gradients, taken apart into those of weight and bias.
template <typename T>
void unpack_factor(const Call& call, const std::vector<double>& partial, int64_t chunks, Tensor& weight, Tensor& bias) {
  const int64_t count = call.window * call.window, size = call.dim * (count + 1) * count;
  T* w = static_cast<T*>(weight.mutable_data_ptr());
  T* b = static_cast<T*>(bias.mutable_data_ptr());
  for (int64_t d = 0; d < call.dim; ++d)
    for (int64_t p = 0; p <= count; ++p)
      for (int64_t j = 0; j < count; ++j) {
        const double* from = partial.data() + (d * (count + 1) + p) * count + j;
        double sum = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += from[chunk * size];
        (p < count ? w[(d * count + j) * count + p] : b[d * count + j]) = static_cast<T>(sum);
      }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cm3a_bwd(
    const Tensor& grad_pan, const Tensor& grad_ms, const Tensor& q, const Tensor& k_pan, const Tensor& v_pan,
    const Tensor& k_ms, const Tensor& v_ms, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
    int64_t num_heads, int64_t window, double scale, bool channels_last, bool /*tf32*/) {
  Arguments arguments = arguments_of(q, k_pan, v_pan, k_ms, v_ms, weight, bias, num_heads, window, scale);
  Call& call = arguments.call;
  call.grad_out[0] = checked_map("grad_pan", grad_pan, q);
  call.grad_out[1] = checked_map("grad_ms", grad_ms, q);
  Tensor grad_q = like_q(q, channels_last);
  Tensor grad_k_pan = like_q(q, channels_last), grad_v_pan = like_q(q, channels_last);
  Tensor grad_k_ms = like_q(q, channels_last), grad_v_ms = like_q(q, channels_last);
  call.grad_q = map_of(grad_q);
  call.grad_k[0] = map_of(grad_k_pan);
  call.grad_v[0] = map_of(grad_v_pan);
  call.grad_k[1] = map_of(grad_k_ms);
  call.grad_v[1] = map_of(grad_v_ms);
  Tensor grad_weight = torch::stable::new_empty(weight ? *weight : q, {0});
  Tensor grad_bias = torch::stable::new_empty(weight ? *weight : q, {0});
  const int64_t count = window * window;
  if (weight) {
    grad_weight = torch::stable::new_empty(*weight, {call.dim, count, window, window});
    grad_bias = torch::stable::new_empty(*weight, {call.dim, count});
  }
  int64_t chunks = 0;
  std::vector<double> partial;
  if (q.numel() != 0) {
    const Tiling tiling = PSF_DISPATCH(cm3a_tiling, call, true);
    chunks = std::min(tiling.items, kMostChunks);
    const int64_t size = weight ? call.dim * (count + 1) * count : 0;
    partial.assign(chunks * size, 0.0);
    for_chunks(tiling, chunks, [&](int64_t chunk, int64_t begin, int64_t end, void* scratch) {
      PSF_DISPATCH(cm3a_backward, call, tiling, begin, end, scratch, partial.data() + chunk * size);
    });
  }
  if (weight && call.element == Element::f64) unpack_factor<double>(call, partial, chunks, grad_weight, grad_bias);
  if (weight && call.element != Element::f64) unpack_factor<float>(call, partial, chunks, grad_weight, grad_bias);
  return {grad_q, grad_k_pan, grad_v_pan, grad_k_ms, grad_v_ms, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pansharp_fast, CPU, m) {
  m.impl("cm3a_fwd", TORCH_BOX(&cm3a_fwd));
  m.impl("cm3a_bwd", TORCH_BOX(&cm3a_bwd));
}

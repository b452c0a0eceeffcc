// Operators wavelet_fwd and wavelet_bwd on the CPU: tables, output, threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu/tensor.h"
#include "cpu/wavelet_kernel.h"
#include "math/wavelet.h"

namespace psf {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using namespace wavelet;

// Weights in the type of the arithmetic.
class Weights {
 public:
  Weights(const std::vector<double>& values, Element type) : wide_(values), narrow_(values.begin(), values.end()) {
    wide = type == Element::f64;
  }
  const void* data(size_t from = 0) const {
    return wide ? static_cast<const void*>(wide_.data() + from) : static_cast<const void*>(narrow_.data() + from);
  }

 private:
  bool wide;
  std::vector<double> wide_;
  std::vector<float> narrow_;
};

// One axis of analysis as a sparse matrix, entries (coefficient, sample, low, high).
struct Entry {
  int64_t coefficient, sample;
  double low, high;
};

std::vector<Entry> entries(const std::vector<double>& taps, int64_t mode, int64_t n, int64_t dilation) {
  const int64_t length = static_cast<int64_t>(taps.size()) / 2;
  const Geometry g = geometry(mode, n, length, dilation);
  std::vector<Entry> found;
  for (int64_t i = 0; i < g.count; ++i) {
    const size_t begin = found.size();
    for (int64_t k = 0; k < length; ++k) {
      const Extension e = extension(mode, g.step * i + g.offset - dilation * k, n);
      for (int t = 0; t < e.count; ++t) {
        const double weight = static_cast<double>(e.weight[t]);
        const double low = weight * taps[k], high = weight * taps[length + k];
        const auto same = std::find_if(found.begin() + begin, found.end(),
                                       [&](const Entry& entry) { return entry.sample == e.index[t]; });
        if (same != found.end()) {
          same->low += low;
          same->high += high;
        } else if (low != 0 || high != 0) {
          found.push_back({i, e.index[t], low, high});
        }
      }
    }
  }
  return found;
}

// The matrix by rows of the result: coefficients, or samples for the transpose.
class Vertical {
 public:
  Vertical(std::vector<Entry> found, bool transpose, int64_t rows, Element type)
      : start_(rows + 1), low_({}, type), high_({}, type) {
    if (transpose) {
      for (Entry& entry : found) std::swap(entry.coefficient, entry.sample);
      std::stable_sort(found.begin(), found.end(),
                       [](const Entry& a, const Entry& b) { return a.coefficient < b.coefficient; });
    }
    std::vector<double> low, high;
    for (const Entry& entry : found) {
      ++start_[entry.coefficient + 1];
      index_.push_back(entry.sample);
      low.push_back(entry.low);
      high.push_back(entry.high);
    }
    for (int64_t r = 0; r < rows; ++r) {
      most_ = std::max(most_, start_[r + 1]);
      start_[r + 1] += start_[r];
    }
    low_ = Weights(low, type);
    high_ = Weights(high, type);
  }
  Rows rows() const { return {start_.data(), index_.data(), low_.data(), high_.data(), most_}; }

 private:
  std::vector<int64_t> start_, index_;
  Weights low_, high_;
  int64_t most_ = 1;
};

class Horizontal {
 public:
  Horizontal(const std::vector<double>& taps, int64_t mode, int64_t n, int64_t dilation, Element type)
      : taps_(taps, type), weight_({}, type) {
    const int64_t length = static_cast<int64_t>(taps.size()) / 2;
    const Geometry g = geometry(mode, n, length, dilation);
    const int64_t before = std::max<int64_t>(0, dilation * (length - 1) - g.offset);
    const int64_t left = (before + 1) / 2 * 2;
    const int64_t end = std::max(n, g.step * (g.count - 1) + g.offset + 1);
    std::vector<double> weights;
    for (int64_t j = -before; j < end; ++j) {
      if (j == 0) j = std::min(n, end);
      if (j == end) break;
      const Extension e = extension(mode, j, n);
      for (int t = 0; t < e.count; ++t) {
        if (e.weight[t] == 0) continue;
        position_.push_back(left + j);
        index_.push_back(e.index[t]);
        weights.push_back(static_cast<double>(e.weight[t]));
      }
    }
    weight_ = Weights(weights, type);
    line_ = {n, g.count, left, (left + end + 1) / 2 * 2, g.step, left + g.offset, dilation, length};
  }
  Line line() const {
    Line line = line_;
    line.low = taps_.data();
    line.high = taps_.data(static_cast<size_t>(line.taps));
    line.borders = static_cast<int64_t>(position_.size());
    line.position = position_.data();
    line.index = index_.data();
    line.weight = weight_.data();
    return line;
  }

 private:
  Weights taps_, weight_;
  std::vector<int64_t> position_, index_;
  Line line_;
};

// Enough for either kernel.
size_t scratch_bytes(const Line& line, const Rows& vertical) {
  const int64_t reach = line.first + line.dilation * line.taps + 2;
  const int64_t lines = 2 * (line.count + line.size + 2 * reach) + line.n;
  return static_cast<size_t>(8 * (lines + 6 * vertical.most + 8 * (line.taps + 2) + 2 * line.borders) + 16 * 64);
}

template <class Call>
void run(const Call& call, int64_t planes, void (*rows)(const Call&, int64_t, int64_t, void*)) {
  const size_t bytes = scratch_bytes(call.line, call.vertical);
  const int64_t total = planes * call.rows;
  const int64_t least = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, call.line.n));
  const int64_t size = std::max<int64_t>(least, total / (8 * static_cast<int64_t>(torch::stable::get_num_threads())));
  for_tasks((total + size - 1) / size, [&](const auto& next) {
    const AlignedBuffer<char> memory(static_cast<int64_t>(bytes));
    for (int64_t task = next(); task >= 0; task = next())
      rows(call, task * size, std::min(total, (task + 1) * size), memory.get());
  });
}

// Of all `results` of a call.
bool may_stream(const std::vector<Tensor>& results) {
  int64_t bytes = 0;
  for (const Tensor& x : results) bytes += x.numel() * static_cast<int64_t>(x.element_size());
  bool stream = true;
  for (const Tensor& x : results) {
    stream &= ResultMemory(x, bytes).past_caches();
    stream &= x.size(x.dim() - 1) * x.element_size() % 128 == 0;
    stream &= reinterpret_cast<uintptr_t>(x.mutable_data_ptr()) % 64 == 0;
  }
  return stream;
}

Tensor with_adjacent_columns(const Tensor& x) {
  return x.stride(2) == 1 || x.size(2) <= 1 ? x : torch::stable::contiguous(x);
}

Plane plane(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1)}; }

void check_taps(const std::vector<double>& taps) {
  STD_TORCH_CHECK(!taps.empty() && taps.size() % 4 == 0, "taps: expected two filters of one even length, got ",
                  taps.size(), " values");
}

// Four bands [N, H', W'], or one tensor [N, 4, H', W'] that holds them.
std::vector<Tensor> analysis(const Tensor& x, const std::vector<double>& taps_y, const std::vector<double>& taps_x,
                             int64_t mode_y, int64_t mode_x, int64_t dilation, bool stack) {
  STD_TORCH_CHECK(x.dim() == 3, "x: expected [N, H, W], got ", x.dim(), " dimensions");
  check_taps(taps_y);
  check_taps(taps_x);
  const Element type = element_of("x", x);
  const Tensor source = with_adjacent_columns(x);
  const int64_t rows = geometry(mode_y, x.size(1), static_cast<int64_t>(taps_y.size()) / 2, dilation).count;
  const Vertical vertical(entries(taps_y, mode_y, x.size(1), dilation), false, rows, type);
  const Horizontal horizontal(taps_x, mode_x, x.size(2), dilation, type);
  const Line line = horizontal.line();
  std::vector<Tensor> y;
  if (stack)
    y.push_back(torch::stable::new_empty(x, {x.size(0), 4, rows, line.count}));
  else
    for (int b = 0; b < 4; ++b) y.push_back(torch::stable::new_empty(x, {x.size(0), rows, line.count}));
  const bool stream = may_stream(y) && (line.step == 1 || line.n == 2 * line.count);
  Analysis call{type, plane(source), {}, (stack ? 4 : 1) * rows * line.count, rows, vertical.rows(), line, stream};
  for (size_t b = 0; b < 4; ++b)
    call.y[b] = stack ? static_cast<char*>(y[0].mutable_data_ptr()) + b * rows * line.count * x.element_size()
                      : y[b].mutable_data_ptr();
  run<Analysis>(call, x.size(0), [](const Analysis& c, int64_t begin, int64_t end, void* scratch) {
    PSF_DISPATCH(wavelet_analysis, c, begin, end, scratch);
  });
  return y;
}

Tensor wavelet_fwd(const Tensor& x, std::vector<double> taps_y, std::vector<double> taps_x, int64_t mode_y,
                   int64_t mode_x, int64_t dilation) {
  return analysis(x, taps_y, taps_x, mode_y, mode_x, dilation, true)[0];
}

std::tuple<Tensor, Tensor, Tensor, Tensor> wavelet_bands_fwd(const Tensor& x, std::vector<double> taps_y,
                                                             std::vector<double> taps_x, int64_t mode_y, int64_t mode_x,
                                                             int64_t dilation) {
  const std::vector<Tensor> y = analysis(x, taps_y, taps_x, mode_y, mode_x, dilation, false);
  return {y[0], y[1], y[2], y[3]};
}

Tensor wavelet_bwd(const Tensor& a, const Tensor& h, const Tensor& v, const Tensor& d, std::vector<double> taps_y,
                   std::vector<double> taps_x, int64_t mode_y, int64_t mode_x, int64_t dilation, int64_t height,
                   int64_t width) {
  check_taps(taps_y);
  check_taps(taps_x);
  const Element type = element_of("bands", a);
  const Vertical vertical(entries(taps_y, mode_y, height, dilation), true, height, type);
  const Horizontal horizontal(taps_x, mode_x, width, dilation, type);
  const Line line = horizontal.line();
  const int64_t rows = geometry(mode_y, height, static_cast<int64_t>(taps_y.size()) / 2, dilation).count;
  std::vector<Tensor> bands;
  for (const Tensor* band : {&a, &h, &v, &d}) {
    STD_TORCH_CHECK(band->dim() == 3 && band->size(0) == a.size(0) && band->size(1) == rows &&
                        band->size(2) == line.count && band->scalar_type() == a.scalar_type(),
                    "bands: expected four of [", a.size(0), ", ", rows, ", ", line.count, "] and one dtype");
    bands.push_back(with_adjacent_columns(*band));
  }
  Tensor x = torch::stable::new_empty(a, {a.size(0), height, width});
  const Synthesis call{type,
                       {plane(bands[0]), plane(bands[1]), plane(bands[2]), plane(bands[3])},
                       x.mutable_data_ptr(),
                       height,
                       vertical.rows(),
                       line,
                       may_stream({x}) && line.borders == 0};
  run<Synthesis>(call, a.size(0), [](const Synthesis& c, int64_t begin, int64_t end, void* scratch) {
    PSF_DISPATCH(wavelet_synthesis, c, begin, end, scratch);
  });
  return x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pansharp_fast, CPU, m) {
  m.impl("wavelet_fwd", TORCH_BOX(&wavelet_fwd));
  m.impl("wavelet_bands_fwd", TORCH_BOX(&wavelet_bands_fwd));
  m.impl("wavelet_bwd", TORCH_BOX(&wavelet_bwd));
}

}  // namespace psf

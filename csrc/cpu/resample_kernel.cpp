// Separable resampling on the CPU: a few rows of the result at a time, along H first, then along W.
//
// Along H every sample is a combination of whole rows: vectors run along the row. What comes out is transposed, so that
// along W vectors run across rows and nothing but loads, broadcasts and multiply-adds is left; blocks of the result are
// transposed back in registers.
#include "cpu/resample_kernel.h"

#include "cpu/vector.h"

namespace psf::PSF_CAPABILITY {

namespace {

using namespace psf::resample;

// Vectors across rows that share each weight.
constexpr int kMost = 4;

template <class A>
constexpr int64_t padded(int64_t width) {
  return (width + Vector<A>::lanes - 1) / Vector<A>::lanes * Vector<A>::lanes;
}

// out[x] = sum_t weight[t] * x[t * row + x] for x in [0, width).
template <class T, class A>
PSF_INLINE void combine_rows(const T* first, int64_t row, const A* weight, int64_t taps, int64_t width, A* out) {
  constexpr int kLanes = Vector<A>::lanes;
  using V = typename Vector<A>::type;
  const auto block = [&]<int kVectors>(int64_t x) __attribute__((always_inline)) {
    V sum[kVectors] = {};
    const T* p = first + x;
    for (int64_t t = 0; t < taps; ++t, p += row)
      for (int v = 0; v < kVectors; ++v) sum[v] += weight[t] * load(p + v * kLanes);
    for (int v = 0; v < kVectors; ++v) store(out + x + v * kLanes, sum[v]);
  };
  int64_t x = 0;
  for (; x + 4 * kLanes <= width; x += 4 * kLanes) block.template operator()<4>(x);
  for (; x + kLanes <= width; x += kLanes) block.template operator()<1>(x);
  if (x < width && width >= kLanes) {  // once more, overlapping
    block.template operator()<1>(width - kLanes);
    x = width;
  }
  for (; x < width; ++x) {
    A sum = 0;
    for (int64_t t = 0; t < taps; ++t) sum += weight[t] * static_cast<A>(load_one(first + t * row + x));
    out[x] = sum;
  }
}

// Rows begin .. end, of which there are at most kVectors vectors.
template <class T, class A, int kVectors>
void resample(const Image& image, int64_t begin, int64_t end, A* scratch) {
  constexpr int kLanes = Vector<A>::lanes;
  constexpr int64_t kRows = kVectors * kLanes;
  using V = typename Vector<A>::type;
  const int64_t width = padded<A>(image.width);
  A* const line = scratch;                     // [kLanes][width]
  A* const across = scratch + kLanes * width;  // [width][kRows]
  const A* const down = static_cast<const A*>(image.rows.weight);
  for (int64_t v = 0; v < kVectors; ++v) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t wanted = begin + v * kLanes + lane;
      const int64_t row = wanted < end ? wanted : end - 1;  // what is beyond the last row is not stored
      combine_rows(static_cast<const T*>(image.x) + image.rows.first[row] * image.row, image.row,
                   down + row * image.rows.taps, image.rows.taps, image.width, line + lane * width);
    }
    for (int64_t x = 0; x < width; x += kLanes) {
      V block[kLanes];
      for (int i = 0; i < kLanes; ++i) block[i] = load(line + i * width + x);
      transpose(block);
      for (int i = 0; i < kLanes; ++i) store(across + (x + i) * kRows + v * kLanes, block[i]);
    }
  }

  const int64_t count = image.columns.count, taps = image.columns.taps;
  const A* const weights = static_cast<const A*>(image.columns.weight);
  T* const y = static_cast<T*>(image.y);
  for (int64_t x = 0; x < count; x += kLanes) {
    V block[kVectors][kLanes];
    const int64_t columns = count - x < kLanes ? count - x : kLanes;
    for (int64_t i = 0; i < kLanes; ++i) {
      const int64_t column = i < columns ? x + i : count - 1;
      const A* weight = weights + column * taps;
      const A* p = across + image.columns.first[column] * kRows;
      V sum[kVectors] = {};
      for (int64_t t = 0; t < taps; ++t, p += kRows)
        for (int v = 0; v < kVectors; ++v) sum[v] += weight[t] * load(p + v * kLanes);
      for (int v = 0; v < kVectors; ++v) block[v][i] = sum[v];
    }
    for (int v = 0; v < kVectors; ++v) {
      transpose(block[v]);
      for (int64_t lane = 0; lane < kLanes && begin + v * kLanes + lane < end; ++lane) {
        T* const out = y + (begin + v * kLanes + lane) * count + x;
        if (columns == kLanes)
          store(out, block[v][lane]);
        else
          for (int64_t i = 0; i < columns; ++i) store_one(out + i, block[v][lane][i]);
      }
    }
  }
}

template <class T, class A>
void resample_any(const Image& image, int64_t begin, int64_t end, void* scratch) {
  A* const memory = static_cast<A*>(scratch);
  switch ((end - begin + Vector<A>::lanes - 1) / Vector<A>::lanes) {
    case 1:
      return resample<T, A, 1>(image, begin, end, memory);
    case 2:
      return resample<T, A, 2>(image, begin, end, memory);
    case 3:
      return resample<T, A, 3>(image, begin, end, memory);
    default:
      return resample<T, A, kMost>(image, begin, end, memory);
  }
}

template <class A>
int64_t scratch_bytes(int64_t width) {
  return (1 + kMost) * Vector<A>::lanes * padded<A>(width) * static_cast<int64_t>(sizeof(A));
}

}  // namespace

int64_t resample_rows_at_once(Element element) {
  return kMost * (element == Element::f64 ? Vector<double>::lanes : Vector<float>::lanes);
}

int64_t resample_scratch(const Image& image) {
  return image.element == Element::f64 ? scratch_bytes<double>(image.width) : scratch_bytes<float>(image.width);
}

void resample_rows(const Image& image, int64_t begin, int64_t end, void* scratch) {
  switch (image.element) {
    case Element::f32:
      return resample_any<float, float>(image, begin, end, scratch);
    case Element::f64:
      return resample_any<double, double>(image, begin, end, scratch);
    case Element::bf16:
      return resample_any<BFloat16, float>(image, begin, end, scratch);
    case Element::f16:
      return resample_any<Half, float>(image, begin, end, scratch);
  }
}

}  // namespace psf::PSF_CAPABILITY

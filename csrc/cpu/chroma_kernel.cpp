// Chroma, a band's distance from the mean of bands, held within its extremes in a window: down the columns first, then
// along the rows, a few rows of the result at a time.
#include "cpu/chroma_kernel.h"

#include "cpu/vector.h"

namespace psf::PSF_CAPABILITY {

namespace {

using namespace psf::chroma;

// body<V>(x) for all x in [0, width), V a vector of pixels from x on, or one where a row has no vector; vectors may
// overlap.
template <class T, class Body>
PSF_INLINE void across(int64_t width, const Body& body) {
  constexpr int kLanes = Vector<T>::lanes;
  using V = typename Vector<T>::type;
  int64_t x = 0;
  for (; x + kLanes <= width; x += kLanes) body.template operator()<V>(x);
  if (x < width && width >= kLanes) {
    body.template operator()<V>(width - kLanes);
    x = width;
  }
  for (; x < width; ++x) body.template operator()<T>(x);
}
template <class V, class T>
PSF_INLINE V get(const T* p) {
  if constexpr (sizeof(V) == sizeof(T))
    return *p;
  else
    return load(p);
}
template <class V, class T>
PSF_INLINE void put(T* p, V value) {
  if constexpr (sizeof(V) == sizeof(T))
    *p = value;
  else
    store(p, value);
}

template <class T>
const T* row_of(const Bands& bands, int64_t band, int64_t y) {
  return static_cast<const T*>(bands.data) + band * bands.band + y * bands.row;
}

template <class T>
void mean_of(const Image& image, const Bands& bands, int64_t y, T* out) {
  across<T>(image.width, [&]<class V>(int64_t x) __attribute__((always_inline)) {
    V sum{};
    for (int64_t band = 0; band < image.bands; ++band) sum += get<V>(row_of<T>(bands, band, y) + x);
    put<V>(out + x, sum / static_cast<T>(image.bands));
  });
}

template <class T>
void hold(const Image& image, int64_t begin, int64_t end, T* scratch) {
  const int64_t width = image.width, down = image.reach[0], along = image.reach[1];
  const int64_t top = begin - down > 0 ? begin - down : 0;
  const int64_t bottom = end + down < image.height ? end + down : image.height;
  T* const means = scratch;                              // of near, rows top .. bottom
  T* const lines = means + (kRows + 2 * down) * width;   // chroma of one band of near, likewise
  T* const x_mean = lines + (kRows + 2 * down) * width;  // rows begin .. end
  T* const start_mean = x_mean + kRows * width;          // likewise
  T* const high = start_mean + kRows * width;            // extremes down the columns, with `along` to each side
  T* const low = high + width + 2 * along;
  for (int64_t y = top; y < bottom; ++y) mean_of(image, image.near, y, means + (y - top) * width);
  for (int64_t y = begin; y < end; ++y) {
    mean_of(image, image.x, y, x_mean + (y - begin) * width);
    mean_of(image, image.start, y, start_mean + (y - begin) * width);
  }
  for (int64_t band = 0; band < image.bands; ++band) {
    for (int64_t y = top; y < bottom; ++y) {
      const T* const source = row_of<T>(image.near, band, y);
      const T* const mean = means + (y - top) * width;
      T* const line = lines + (y - top) * width;
      across<T>(width, [&]<class V>(int64_t x)
                           __attribute__((always_inline)) { put<V>(line + x, get<V>(source + x) - get<V>(mean + x)); });
    }
    for (int64_t y = begin; y < end; ++y) {
      const T* const first = lines + ((y - down > top ? y - down : top) - top) * width;
      const T* const last = lines + ((y + down < bottom ? y + down : bottom - 1) - top) * width;
      across<T>(width, [&]<class V>(int64_t x) __attribute__((always_inline)) {
        V most = get<V>(first + x), least = most;
        for (const T* line = first + width; line <= last; line += width) {
          const V value = get<V>(line + x);
          most = larger(most, value);
          least = smaller(least, value);
        }
        put<V>(high + along + x, most);
        put<V>(low + along + x, least);
      });
      // The window ends at the border, which repeating it does not change.
      for (int64_t i = 0; i < along; ++i) {
        high[i] = high[along];
        low[i] = low[along];
        high[along + width + i] = high[along + width - 1];
        low[along + width + i] = low[along + width - 1];
      }
      const T *const value = row_of<T>(image.x, band, y), *const mean = x_mean + (y - begin) * width;
      const T *const before = row_of<T>(image.start, band, y), *const mean_before = start_mean + (y - begin) * width;
      T* const out = static_cast<T*>(image.y) + (band * image.height + y) * width;
      across<T>(width, [&]<class V>(int64_t x) __attribute__((always_inline)) {
        V most = get<V>(before + x) - get<V>(mean_before + x), least = most;
        for (int64_t i = 0; i <= 2 * along; ++i) {
          most = larger(most, get<V>(high + x + i));
          least = smaller(least, get<V>(low + x + i));
        }
        const V pixel = get<V>(value + x), change = pixel - get<V>(mean + x);
        put<V>(out + x, pixel + (smaller(larger(change, least), most) - change));
      });
    }
  }
}

}  // namespace

int64_t chroma_scratch(const Image& image) {
  const int64_t lines = 2 * (kRows + 2 * image.reach[0]) + 2 * kRows + 2;
  return (lines * image.width + 4 * image.reach[1]) * (image.element == Element::f64 ? 8 : 4);
}

void hold_chroma(const Image& image, int64_t begin, int64_t end, void* scratch) {
  if (image.element == Element::f64)
    hold(image, begin, end, static_cast<double*>(scratch));
  else
    hold(image, begin, end, static_cast<float*>(scratch));
}

}  // namespace psf::PSF_CAPABILITY

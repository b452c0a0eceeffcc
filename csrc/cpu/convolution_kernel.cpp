// 3x3 convolutions by Winograd's minimal filtering (Lavin and Gray, 2016): F(4x4, 3x3), a quarter of the
// multiplications, or F(6x6, 3x3), a fifth, whose rounding error is some ten times larger, for images in 16 bits.
//
// A block of tiles goes through at once and stays in the second-level cache: patches of 6x6 (8x8) pixels, normalised
// and activated on the way in, become 36 (64) numbers a channel; as many matrix products over channels follow, a panel
// of outputs at a time; the way back to pixels adds bias and residual. Vectors run over channels. All arithmetic is
// float32.
#include "cpu/convolution_kernel.h"

#include "cpu/vector.h"

namespace psf::PSF_CAPABILITY {
namespace {

using namespace psf::convolution;

constexpr int64_t kLanes = Vector<float>::lanes;
#define PSF_UNROLL _Pragma("GCC unroll 16")
constexpr int64_t kRows = 4;  // rows of tiles of a block
// Tiles and vectors of outputs whose sums stay in registers.
constexpr int64_t kGroup = kBytes == 64 ? 8 : 4;
constexpr int64_t kPanelVectors = 2;
constexpr int64_t kPanel = kPanelVectors * kLanes;
constexpr int64_t kCacheLine = 64;

PSF_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The first `count` of a vector's lanes; the others are 0.
template <class T>
PSF_INLINE Floats load_some(const T* p, int64_t count) {
  if (count >= kLanes) return load(p);
  Floats v{};
  for (int64_t i = 0; i < count; ++i) v[i] = load_one(p + i);
  return v;
}
template <class T>
PSF_INLINE void store_some(T* p, Floats v, int64_t count) {
  if (count >= kLanes) return store(p, v);
  for (int64_t i = 0; i < count; ++i) store_one(p + i, v[i]);
}

// x sigmoid(x).
PSF_INLINE Floats silu(Floats x) {
  const Floats bounded = x < -87.0f ? Floats{} - 87.0f : x;
  const Floats e = exponential(bounded > 87.0f ? Floats{} - 87.0f : -bounded) + 1.0f;
#if defined(__AVX512F__)
  // Half the time of a division: 14 bits and one of Newton's steps.
  const Floats near = reinterpret_cast<Floats>(_mm512_maskz_rcp14_ps(0xffff, reinterpret_cast<__m512>(e)));
  return x * (near * (2.0f - near * e));
#else
  return x / e;
#endif
}

// d <- Bᵀ d: what a patch becomes along one axis.
PSF_INLINE void transform_patch(Floats (&d)[6]) {
  const Floats even = d[4] - 4.0f * d[2], odd = d[3] - 4.0f * d[1];
  const Floats near = d[4] - d[2], far = 2.0f * (d[3] - d[1]);
  d[0] = 4.0f * d[0] - 5.0f * d[2] + d[4];
  d[5] = 4.0f * d[1] - 5.0f * d[3] + d[5];
  d[1] = even + odd;
  d[2] = even - odd;
  d[3] = near + far;
  d[4] = near - far;
}

PSF_INLINE void transform_patch(Floats (&d)[8]) {
  const Floats first = d[0] - d[6] + 5.25f * (d[4] - d[2]), last = d[7] - d[1] + 5.25f * (d[3] - d[5]);
  const Floats e1 = d[2] + d[6] - 4.25f * d[4], o1 = d[1] + d[5] - 4.25f * d[3];
  const Floats e2 = d[6] + 0.25f * d[2] - 1.25f * d[4], o2 = 0.5f * d[1] - 2.5f * d[3] + 2.0f * d[5];
  const Floats e3 = d[6] + 4.0f * d[2] - 5.0f * d[4], o3 = 2.0f * d[1] - 2.5f * d[3] + 0.5f * d[5];
  d[0] = first;
  d[1] = e1 + o1;
  d[2] = e1 - o1;
  d[3] = e2 + o2;
  d[4] = e2 - o2;
  d[5] = e3 + o3;
  d[6] = e3 - o3;
  d[7] = last;
}

// Aᵀ m: products along one axis become pixels.
PSF_INLINE void transform_products(const Floats (&m)[6], Floats (&y)[4]) {
  const Floats s1 = m[1] + m[2], d1 = m[1] - m[2], s2 = m[3] + m[4], d2 = m[3] - m[4];
  y[0] = m[0] + s1 + s2;
  y[1] = d1 + 2.0f * d2;
  y[2] = s1 + 4.0f * s2;
  y[3] = d1 + 8.0f * d2 + m[5];
}

PSF_INLINE void transform_products(const Floats (&m)[8], Floats (&y)[6]) {
  const Floats s1 = m[1] + m[2], d1 = m[1] - m[2], s2 = m[3] + m[4], d2 = m[3] - m[4], s3 = m[5] + m[6],
               d3 = m[5] - m[6];
  y[0] = m[0] + s1 + s2 + s3;
  y[1] = d1 + 2.0f * d2 + 0.5f * d3;
  y[2] = s1 + 4.0f * s2 + 0.25f * s3;
  y[3] = d1 + 8.0f * d2 + 0.125f * d3;
  y[4] = s1 + 16.0f * s2 + 0.0625f * s3;
  y[5] = d1 + 32.0f * d2 + 0.03125f * d3 + m[7];
}

// G g: three taps along one axis become factors.
PSF_INLINE void transform_taps(Floats g0, Floats g1, Floats g2, Floats (&u)[6]) {
  const Floats outer = g0 + g2, spread = g0 + 4.0f * g2;
  u[0] = 0.25f * g0;
  u[1] = (outer + g1) * (-1.0f / 6);
  u[2] = (outer - g1) * (-1.0f / 6);
  u[3] = (spread + 2.0f * g1) * (1.0f / 24);
  u[4] = (spread - 2.0f * g1) * (1.0f / 24);
  u[5] = g2;
}

PSF_INLINE void transform_taps(Floats g0, Floats g1, Floats g2, Floats (&u)[8]) {
  const Floats outer = g0 + g2, rising = g0 + 4.0f * g2, falling = 4.0f * g0 + g2;
  u[0] = g0;
  u[1] = (outer + g1) * (-2.0f / 9);
  u[2] = (outer - g1) * (-2.0f / 9);
  u[3] = (rising + 2.0f * g1) * (1.0f / 90);
  u[4] = (rising - 2.0f * g1) * (1.0f / 90);
  u[5] = (falling + 2.0f * g1) * (8.0f / 45);
  u[6] = (falling - 2.0f * g1) * (8.0f / 45);
  u[7] = g2;
}

// Where a block lies: its image, first pixel and number of tiles.
struct Block {
  int64_t image, y, x, rows, columns;
  Block(const Call& call, const Plan& plan, int64_t task) {
    const int64_t blocks = plan.blocks_down * plan.blocks_across;
    image = task / blocks;
    const int64_t tile = plan.tile;
    y = task % blocks / plan.blocks_across * kRows * tile;
    x = task % blocks % plan.blocks_across * plan.columns * tile;
    rows = smaller(kRows, (call.height - y + tile - 1) / tile);
    columns = smaller(plan.columns, (call.width - x + tile - 1) / tile);
  }
  int64_t tiles() const { return rows * columns; }
};

// Scratch memory of a thread.
struct Scratch {
  float *pixels, *patches, *products;
  int64_t patch_step, product_step;  // from one of the 36 or 64 to the next
};

// A row of pixels, [vectors of channels][pixels of a block's row][lanes].
int64_t line_size(const Plan& plan) { return plan.row * (plan.columns * plan.tile + 2); }
int64_t products_of(const Plan& plan) { return (plan.tile + 2) * (plan.tile + 2); }
int64_t groups(const Plan& plan) { return (kRows * plan.columns + kGroup - 1) / kGroup * kGroup; }

Scratch scratch_of(const Plan& plan, float* memory) {
  // A cache line more than a power of two: the lines that a tile writes must not share one set of the cache.
  Scratch s;
  s.patch_step = groups(plan) * plan.row + 16;
  s.product_step = groups(plan) * kPanel + 16;
  s.pixels = memory;
  s.patches = s.pixels + (plan.tile + 2) * line_size(plan);
  s.products = s.patches + products_of(plan) * s.patch_step;
  return s;
}

// Row y of the image, where the block sees it: all channels, normalised and activated, zero outside.
template <int64_t kTile, class T>
void load_line(const Call& call, const Block& at, int64_t y, float* line) {
  const int64_t columns = at.columns * kTile + 2;
  const bool inside = y >= 0 && y < call.height;
  const int64_t first = inside ? (at.x == 0 ? 1 : 0) : columns;
  const int64_t last = inside ? smaller(columns, call.width - at.x + 1) : columns;
  const float* scale = call.scale == nullptr ? nullptr : call.scale + at.image * call.channels;
  const float* shift = call.scale == nullptr ? nullptr : call.shift + at.image * call.channels;
  const T* source =
      static_cast<const T*>(call.x.data) + at.image * call.x.image + y * call.x.row + (at.x - 1) * call.x.pixel;
  for (int64_t c = 0; c < call.channels; c += kLanes) {
    for (int64_t i = 0; i < first; ++i) store(line + (c * columns + i * kLanes), Floats{});
    for (int64_t i = last; i < columns; ++i) store(line + (c * columns + i * kLanes), Floats{});
  }
  // Pixel after pixel, as they lie in memory: another order would meet the same few sets of the cache again and again.
  for (int64_t i = first; i < last; ++i) {
    const T* pixel = source + i * call.x.pixel;
    for (int64_t c = 0; c < call.channels; c += kCacheLine / sizeof(T))  // of the next row
      __builtin_prefetch(pixel + call.x.row + c);
    for (int64_t c = 0; c < call.channels; c += kLanes) {
      const int64_t count = call.channels - c;
      Floats v = load_some(pixel + c, count);
      if (scale != nullptr) v = v * load_some(scale + c, count) + load_some(shift + c, count);
      if (call.silu) v = silu(v);
      store(line + (c * columns + i * kLanes), v);
    }
  }
}

// The numbers of every tile of one row of tiles, one vector of channels.
template <int64_t kTile>
PSF_INLINE void transform_pixels(const float* const (&lines)[kTile + 2], int64_t tiles, int64_t row, int64_t step,
                                 float* patches) {
  for (int64_t tile = 0; tile < tiles; ++tile) {
    constexpr int64_t kPatch = kTile + 2;
    Floats rows[kPatch][kPatch];
    PSF_UNROLL for (int64_t j = 0; j < kPatch; ++j) {
      Floats column[kPatch];
      PSF_UNROLL for (int64_t i = 0; i < kPatch; ++i) column[i] = load(lines[i] + (tile * kTile + j) * kLanes);
      transform_patch(column);
      PSF_UNROLL for (int64_t i = 0; i < kPatch; ++i) rows[i][j] = column[i];
    }
    float* out = patches + tile * row;
    PSF_UNROLL for (int64_t i = 0; i < kPatch; ++i) {
      transform_patch(rows[i]);
      PSF_UNROLL for (int64_t j = 0; j < kPatch; ++j) store(out + (i * kPatch + j) * step, rows[i][j]);
    }
  }
}

// products [kTiles, kPanel] = patches [kTiles, channels] weight [channels, kPanel]; kAhead: fetch the weight of the
// next product, which comes from the third-level cache.
template <int64_t kTiles, bool kAhead>
PSF_INLINE void multiply(const float* patches, int64_t row, const float* weight, int64_t channels, float* products) {
  Floats sum[kTiles][kPanelVectors] = {};
  for (int64_t c = 0; c < channels; ++c) {
    Floats w[kPanelVectors];
    PSF_UNROLL for (int64_t v = 0; v < kPanelVectors; ++v) {
      w[v] = load(weight + c * kPanel + v * kLanes);
      if (kAhead) __builtin_prefetch(weight + (channels + c) * kPanel + v * kLanes, 0, 2);
    }
    PSF_UNROLL for (int64_t t = 0; t < kTiles; ++t) {
      const float value = patches[t * row + c];
      PSF_UNROLL for (int64_t v = 0; v < kPanelVectors; ++v) sum[t][v] += value * w[v];
    }
  }
  PSF_UNROLL for (int64_t t = 0; t < kTiles; ++t) PSF_UNROLL for (int64_t v = 0; v < kPanelVectors; ++v)
      store(products + t * kPanel + v * kLanes, sum[t][v]);
}

// Pixels of one panel of outputs from `o`, all tiles.
template <int64_t kTile, class T>
void store_pixels(const Call& call, const Block& at, int64_t o, int64_t step, const float* products) {
  T* out = static_cast<T*>(call.y.data) + at.image * call.y.image + o;
  const T* residual = static_cast<const T*>(call.residual.data);
  if (residual != nullptr) residual += at.image * call.residual.image + o;
  const float* bias = call.bias == nullptr ? nullptr : call.bias + at.image * call.bias_image + o;
  constexpr int64_t kPatch = kTile + 2;
  const int64_t vectors = smaller(kPanelVectors, (call.outputs - o + kLanes - 1) / kLanes);
  for (int64_t tile = 0; tile < at.tiles(); ++tile) {
    const int64_t y = at.y + tile / at.columns * kTile, x = at.x + tile % at.columns * kTile;
    const int64_t rows = smaller(kTile, call.height - y), columns = smaller(kTile, call.width - x);
    // What the next tile will need.
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = kTile; j < smaller(2 * kTile, call.width - x); ++j)
        for (int64_t v = 0; v < vectors; ++v) {
          if (residual != nullptr)
            __builtin_prefetch(residual + (y + i) * call.residual.row + (x + j) * call.residual.pixel + v * kLanes);
          if (!call.stream) __builtin_prefetch(out + (y + i) * call.y.row + (x + j) * call.y.pixel + v * kLanes, 1);
        }
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t count = call.outputs - o - v * kLanes;
      const Floats add = bias != nullptr ? load_some(bias + v * kLanes, count) : Floats{};
      const float* in = products + tile * kPanel + v * kLanes;
      T* const to = out + y * call.y.row + x * call.y.pixel + v * kLanes;
      const T* const from =
          residual == nullptr ? nullptr : residual + y * call.residual.row + x * call.residual.pixel + v * kLanes;
      Floats half[kPatch][kTile];
      PSF_UNROLL for (int64_t i = 0; i < kPatch; ++i) {
        Floats m[kPatch];
        PSF_UNROLL for (int64_t j = 0; j < kPatch; ++j) m[j] = load(in + (i * kPatch + j) * step);
        transform_products(m, half[i]);
      }
      // kWhole: nothing of the tile or of the vector is cut off.
      const auto finish = [&]<bool kWhole>() __attribute__((always_inline)) {
        PSF_UNROLL for (int64_t j = 0; j < kTile; ++j) {
          Floats m[kPatch], pixels[kTile];
          PSF_UNROLL for (int64_t i = 0; i < kPatch; ++i) m[i] = half[i][j];
          transform_products(m, pixels);
          PSF_UNROLL for (int64_t i = 0; i < kTile; ++i) {
            if (!kWhole && (i >= rows || j >= columns)) continue;
            T* const at = to + i * call.y.row + j * call.y.pixel;
            Floats value = pixels[i] + add;
            if (residual != nullptr) {
              const T* const more = from + i * call.residual.row + j * call.residual.pixel;
              value += kWhole ? load(more) : load_some(more, count);
            }
            if (call.stream)
              stream(at, value);
            else if (kWhole)
              store(at, value);
            else
              store_some(at, value, count);
          }
        }
      };
      if (rows == kTile && columns == kTile && count >= kLanes)
        finish.template operator()<true>();
      else
        finish.template operator()<false>();
    }
  }
}

template <int64_t kTile, class T>
void run_block(const Call& call, const Plan& plan, int64_t task, float* memory) {
  constexpr int64_t kPatch = kTile + 2, kProducts = kPatch * kPatch;
  const Block at(call, plan, task);
  const Scratch s = scratch_of(plan, memory);
  const int64_t size = line_size(plan), columns = at.columns * kTile + 2;
  for (int64_t row = 0; row < at.rows; ++row) {
    // Two of the rows are there from the row of tiles above.
    for (int64_t i = row == 0 ? 0 : 2; i < kPatch; ++i)
      load_line<kTile, T>(call, at, at.y + row * kTile + i - 1, s.pixels + (row * kTile + i) % kPatch * size);
    for (int64_t c = 0; c < call.channels; c += kLanes) {
      const float* lines[kPatch];
      for (int64_t i = 0; i < kPatch; ++i) lines[i] = s.pixels + (row * kTile + i) % kPatch * size + c * columns;
      transform_pixels<kTile>(lines, at.columns, plan.row, s.patch_step, s.patches + row * at.columns * plan.row + c);
    }
  }
  for (int64_t tile = at.tiles(); tile % (kGroup / 2) != 0; ++tile)
    for (int64_t i = 0; i < kProducts; ++i)
      for (int64_t c = 0; c < plan.row; c += kLanes)
        store(s.patches + i * s.patch_step + tile * plan.row + c, Floats{});
  for (int64_t panel = 0; panel < plan.panels; ++panel) {
    const float* weight = call.weight + panel * plan.panel_weights;
    for (int64_t product = 0; product < kProducts; ++product)
      for (int64_t tile = 0; tile < at.tiles(); tile += kGroup) {
        const auto several = at.tiles() - tile > kGroup / 2
                                 ? (tile == 0 ? multiply<kGroup, true> : multiply<kGroup, false>)
                                 : (tile == 0 ? multiply<kGroup / 2, true> : multiply<kGroup / 2, false>);
        several(s.patches + product * s.patch_step + tile * plan.row, plan.row,
                weight + product * call.channels * kPanel, call.channels,
                s.products + product * s.product_step + tile * kPanel);
      }
    store_pixels<kTile, T>(call, at, panel * kPanel, s.product_step, s.products);
  }
  if (call.stream) end_of_streams();
}

// taps: scratch memory [9][channels][kPanel].
template <int64_t kTile, class T>
void weight_panel(const Call& call, const Plan& plan, const T* weight, const int64_t (&strides)[4], int64_t panel,
                  float* taps, float* result) {
  constexpr int64_t kPatch = kTile + 2;
  const int64_t first = panel * kPanel, size = call.channels * kPanel;
  for (int64_t o = 0; o < kPanel; ++o)
    for (int64_t tap = 0; tap < 9; ++tap) {
      const T* from = weight + (first + o) * strides[0] + tap / 3 * strides[2] + tap % 3 * strides[3];
      for (int64_t c = 0; c < call.channels; ++c)
        taps[tap * size + c * kPanel + o] = first + o < call.outputs ? load_one(from + c * strides[1]) : 0.0f;
    }
  result += panel * plan.panel_weights;
  for (int64_t at = 0; at < size; at += kLanes) {
    Floats half[3][kPatch];
    for (int64_t j = 0; j < 3; ++j)
      transform_taps(load(taps + j * size + at), load(taps + (3 + j) * size + at), load(taps + (6 + j) * size + at),
                     half[j]);
    for (int64_t i = 0; i < kPatch; ++i) {
      Floats u[kPatch];
      transform_taps(half[0][i], half[1][i], half[2][i], u);
      for (int64_t j = 0; j < kPatch; ++j) store(result + (i * kPatch + j) * size + at, u[j]);
    }
  }
}

// Pixels first..last of an image, counted along its rows, as runs that lie in one row: body(first pixel, how many).
template <class T, class Body>
void by_rows(const Call& call, const T* image, int64_t first, int64_t last, Body body) {
  const bool dense = call.x.row == call.width * call.x.pixel;
  while (first < last) {
    const int64_t y = dense ? 0 : first / call.width, x = first - y * call.width;
    const int64_t count = dense ? last - first : smaller(last - first, call.width - x);
    body(image + y * call.x.row + x * call.x.pixel, count);
    first += count;
  }
}

template <class T>
void sum_channels(const Call& call, const T* image, int64_t begin, int64_t end, double* sums) {
  constexpr int64_t kVectors = kBytes == 64 ? 8 : 4;
  for (int64_t first = begin; first < end; first += kChunk)
    for (int64_t c = 0; c < call.channels; c += kVectors * kLanes) {
      Floats origin[kVectors], sum[kVectors] = {}, square[kVectors] = {};
      const int64_t left = call.channels - c, vectors = smaller(kVectors, (left + kLanes - 1) / kLanes);
      for (int64_t v = 0; v < vectors; ++v) origin[v] = load_some(image + c + v * kLanes, left - v * kLanes);
      by_rows(call, image, first, smaller(first + kChunk, end), [&](const T* pixel, int64_t count) {
        for (int64_t i = 0; i < count; ++i, pixel += call.x.pixel) {
          if (left >= kVectors * kLanes) {
            PSF_UNROLL for (int64_t v = 0; v < kVectors; ++v) {
              const Floats value = load(pixel + c + v * kLanes) - origin[v];
              sum[v] += value;
              square[v] += value * value;
            }
          } else {
            for (int64_t v = 0; v < vectors; ++v) {
              const Floats value = load_some(pixel + c + v * kLanes, left - v * kLanes) - origin[v];
              sum[v] += value;
              square[v] += value * value;
            }
          }
        }
      });
      for (int64_t v = 0; v < vectors; ++v)
        for (int64_t i = 0; i < smaller(kLanes, left - v * kLanes); ++i) {
          sums[c + v * kLanes + i] += sum[v][i];
          sums[call.channels + c + v * kLanes + i] += square[v][i];
          sums[2 * call.channels + c + v * kLanes + i] = origin[v][i];
        }
    }
}

// body(value of the element's type) for the types that are computed in float32.
template <class Body>
void by_element(Element element, Body body) {
  switch (element) {
    case Element::bf16:
      return body(BFloat16{});
    case Element::f16:
      return body(Half{});
    default:
      return body(float{});
  }
}

}  // namespace

Plan winograd_plan(const Call& call) {
  Plan plan{};
  const auto tiles = [&](int64_t tile) { return ((call.height + tile - 1) / tile) * ((call.width + tile - 1) / tile); };
  // Larger tiles where 16 bits hide their rounding errors, and neither the weight nor the border costs what they save.
  plan.tile =
      call.element != Element::f32 && call.height * call.width >= 96 * 96 && 64 * tiles(6) < 34 * tiles(4) ? 6 : 4;
  const int64_t down = (call.height + plan.tile - 1) / plan.tile, across = (call.width + plan.tile - 1) / plan.tile;
  // Patches and products of a block should fit the second-level cache.
  const bool wide = call.channels > 192;
  plan.columns = smaller(across, plan.tile == 4 ? (wide ? 4 : 8) : (wide ? 4 : 6));
  plan.blocks_down = (down + kRows - 1) / kRows;
  plan.blocks_across = (across + plan.columns - 1) / plan.columns;
  plan.panel = kPanel;
  plan.panels = (call.outputs + kPanel - 1) / kPanel;
  plan.row = (call.channels + kLanes - 1) / kLanes * kLanes;
  plan.panel_weights = products_of(plan) * call.channels * kPanel;
  plan.weights = plan.panels * plan.panel_weights;
  const Scratch s = scratch_of(plan, nullptr);
  plan.scratch = (plan.tile + 2) * line_size(plan) + products_of(plan) * (s.patch_step + s.product_step);
  return plan;
}

void winograd_weight(const Call& call, const Plan& plan, Element element, const void* weight,
                     const int64_t (&strides)[4], int64_t panel, float* scratch, float* result) {
  by_element(element, [&](auto type) {
    const auto* values = static_cast<const decltype(type)*>(weight);
    if (plan.tile == 4)
      weight_panel<4>(call, plan, values, strides, panel, scratch, result);
    else
      weight_panel<6>(call, plan, values, strides, panel, scratch, result);
  });
}

void winograd_block(const Call& call, const Plan& plan, int64_t task, float* scratch) {
  by_element(call.element, [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) == 2)
      if (plan.tile == 6) return run_block<6, T>(call, plan, task, scratch);
    run_block<4, T>(call, plan, task, scratch);
  });
}

void channel_sums(const Call& call, const void* image, int64_t begin, int64_t end, double* sums) {
  by_element(call.element,
             [&](auto type) { sum_channels(call, static_cast<const decltype(type)*>(image), begin, end, sums); });
}

}  // namespace psf::PSF_CAPABILITY

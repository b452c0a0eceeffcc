// CPU kernels of cm3a, vectorised over pixels.
//
// A plane of a tile is one line of memory, row after row with the halo between them, so that the neighbour at offset p
// is a constant distance away and vectors may run across row ends; what they compute in the halo is masked or never
// stored. Per channel and pixel the learned neighbourhood costs J * J multiplications each for logits and for values;
// both are small matrix products whose accumulators stay in registers.
#include "cpu/cm3a_kernel.h"

#include <type_traits>

#include "cpu/vector.h"
#include "math/cm3a.h"

#define PSF_UNROLL _Pragma("GCC unroll 32")

namespace psf::PSF_CAPABILITY {
namespace {

using cm3a::Call;
using cm3a::Map;
using cm3a::Tiling;

template <typename T>
using VectorOf = typename Vector<T>::type;
template <typename T>
constexpr int64_t kLanes = Vector<T>::lanes;
// Vectors of pixels in flight: as many accumulators as fit the registers (32 with AVX-512, 16 otherwise).
constexpr bool kManyRegisters = kBytes == 64;
constexpr int64_t kMostVectors = 2;

// Lane l of the result is lane index(l) of a and b side by side.
template <typename T, typename Index>
inline VectorOf<T> shuffle(VectorOf<T> a, VectorOf<T> b, Index index) {
  using Lane = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  VectorOf<Lane> picked;
  PSF_UNROLL for (Lane l = 0; l < kLanes<T>; ++l) picked[l] = index(l);
  return __builtin_shuffle(a, b, picked);
}

template <typename T>
inline T sum_of(VectorOf<T> value) {
  PSF_UNROLL for (int64_t step = kLanes<T> / 2; step > 0; step /= 2) {
    value += shuffle<T>(value, value, [step](int64_t l) { return l ^ step; });
  }
  return value[0];
}

// Rows become columns in each of the G x G squares that lie side by side: in each step the blocks of `step` lanes off
// the diagonals change places.
template <typename T, int64_t G>
inline void transpose(VectorOf<T> (&rows)[G]) {
  constexpr int64_t L = kLanes<T>;
  PSF_UNROLL for (int64_t step = 1; step < G; step *= 2) {
    PSF_UNROLL for (int64_t i = 0; i < G; ++i) {
      if (i & step) continue;
      const VectorOf<T> a = rows[i], b = rows[i + step];
      rows[i] = shuffle<T>(a, b, [step](int64_t l) { return l & step ? L + l - step : l; });
      rows[i + step] = shuffle<T>(a, b, [step](int64_t l) { return l & step ? L + l : l + step; });
    }
  }
}

inline Doubles exponential(Doubles x) {
  for (int64_t i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

// Where a tile and its surroundings lie in a plane of scratch memory.
struct Tile {
  int64_t top, bottom, left, right;  // pixels of the tile, in the image
  int64_t halo;                      // pixels around it that a plane holds
  int64_t pitch, rows, plane;        // elements of a row, rows, elements of a plane

  int64_t at(int64_t y, int64_t x) const { return (y - top + halo) * pitch + (x - left + halo); }
};

template <typename T>
int64_t plane_elements(int64_t rows, int64_t pitch) {
  // The last vectors of a pass run over the end, at most one row and a bit further for neighbours; an odd number of
  // cache lines keeps the planes of a pixel out of the same cache set.
  const int64_t line = 64 / sizeof(T);
  const int64_t lines = (rows * pitch + kMostVectors * kLanes<T> + 2 + line - 1) / line;
  return (lines | 1) * line;
}

// ---- Between memory and planes
// ---------------------------------------------------------------------------------------

inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <typename S>
S* head_of(const Map& map, const Call& call, int64_t image, int64_t head) {
  return static_cast<S*>(map.data) + image * map.batch + head * call.dim * map.channel;
}

// Stored values in the type of the arithmetic, and back.
template <typename T, typename S>
void copy_line(const S* from, int64_t count, T* to) {
  int64_t i = 0;
  if constexpr (sizeof(S) < sizeof(T))
    for (; i + kLanes<T> <= count; i += kLanes<T>) store(to + i, load(from + i));
  else if constexpr (sizeof(S) > sizeof(T))
    for (; i + kLanes<S> <= count; i += kLanes<S>) store(to + i, load(from + i));
  for (; i < count; ++i) store_one(to + i, load_one(from + i));
}

// The next G channels of L pixels, adjacent in memory, to planes: vector i has those of the pixels i, i + G, ...
template <int64_t G, typename S, typename T>
inline void to_planes(const S* from, int64_t column, T* to, int64_t plane) {
  constexpr int64_t L = kLanes<T>;
  VectorOf<T> block[G];
  PSF_UNROLL for (int64_t i = 0; i < G; ++i) {
    S values[L];
    PSF_UNROLL for (int64_t l = 0; l < L / G; ++l) {
      __builtin_prefetch(from + (i + l * G + L) * column);
      __builtin_memcpy(values + l * G, from + (i + l * G) * column, sizeof(S) * G);
    }
    block[i] = load(values);
  }
  transpose<T, G>(block);
  PSF_UNROLL for (int64_t d = 0; d < G; ++d) store(to + d * plane, block[d]);
}

template <int64_t G, typename S, typename T>
inline void from_planes(const T* from, int64_t plane, S* to, int64_t column) {
  constexpr int64_t L = kLanes<T>;
  VectorOf<T> block[G];
  PSF_UNROLL for (int64_t d = 0; d < G; ++d) block[d] = load(from + d * plane);
  transpose<T, G>(block);
  PSF_UNROLL for (int64_t i = 0; i < G; ++i) {
    S values[L];
    store(values, block[i]);
    PSF_UNROLL for (int64_t l = 0; l < L / G; ++l) {
      __builtin_prefetch(to + (i + l * G + L) * column, 1);
      __builtin_memcpy(to + (i + l * G) * column, values + l * G, sizeof(S) * G);
    }
  }
}

// body<G>(first channel) for all channels in groups as large as fit, of a vector at most; returns how many those cover.
template <typename T, typename Body>
inline int64_t in_groups(int64_t channels, Body body) {
  int64_t d = 0;
  const auto groups = [&]<int64_t G>() {
    if constexpr (G <= kLanes<T>)
      for (; d + G <= channels; d += G) body.template operator()<G>(d);
  };
  groups.template operator()<16>();
  groups.template operator()<8>();
  groups.template operator()<4>();
  return d;
}

// Planes of the tile and `reach` pixels around it; zero outside the image and in the rest of the plane.
template <typename S, typename T>
void load_planes(const Call& call, const Map& map, int64_t image, int64_t head, const Tile& tile, int64_t reach,
                 T* planes) {
  constexpr int64_t L = kLanes<T>;
  const S* source = head_of<S>(map, call, image, head);
  const int64_t left = larger(tile.left - reach, 0), right = smaller(tile.right + reach, call.width);
  const int64_t top = larger(tile.top - reach, 0), bottom = smaller(tile.bottom + reach, call.height);
  const int64_t count = right - left, before = left - (tile.left - tile.halo);
  for (int64_t d = 0; d < call.dim; ++d) {
    T* line = planes + d * tile.plane;
    for (int64_t i = 0; i < tile.at(top, left); ++i) line[i] = 0;
    for (int64_t y = top; y < bottom; ++y) {
      T* row = line + tile.at(y, tile.left - tile.halo);
      for (int64_t i = 0; i < before; ++i) row[i] = 0;
      for (int64_t i = before + count; i < tile.pitch; ++i) row[i] = 0;
      if (map.column == 1) {
        const S* from = source + d * map.channel + y * map.row + left;
        copy_line(from, count, row + before);
      }
    }
    for (int64_t i = tile.at(bottom, tile.left - tile.halo); i < tile.plane; ++i) line[i] = 0;
  }
  if (map.column == 1) return;
  for (int64_t y = top; y < bottom; ++y) {
    const S* from = source + y * map.row + left * map.column;
    T* to = planes + tile.at(y, left);
    int64_t i = 0;
    for (; map.channel == 1 && i + L <= count; i += L, from += L * map.column, to += L) {
      int64_t d = in_groups<T>(call.dim, [&]<int64_t G>(int64_t first) {
        to_planes<G>(from + first, map.column, to + first * tile.plane, tile.plane);
      });
      for (; d < call.dim; ++d)
        for (int64_t l = 0; l < L; ++l) to[d * tile.plane + l] = load_one(from + l * map.column + d);
    }
    for (; i < count; ++i, from += map.column, ++to)
      for (int64_t d = 0; d < call.dim; ++d) to[d * tile.plane] = load_one(from + d * map.channel);
  }
}

template <typename S, typename T>
void store_planes(const Call& call, const Map& map, int64_t image, int64_t head, const Tile& tile, const T* planes) {
  constexpr int64_t L = kLanes<T>;
  S* target = head_of<S>(map, call, image, head);
  const int64_t count = tile.right - tile.left;
  if (map.column == 1) {
    for (int64_t d = 0; d < call.dim; ++d)
      for (int64_t y = tile.top; y < tile.bottom; ++y) {
        S* to = target + d * map.channel + y * map.row + tile.left;
        const T* row = planes + d * tile.plane + tile.at(y, tile.left);
        copy_line(row, count, to);
      }
    return;
  }
  for (int64_t y = tile.top; y < tile.bottom; ++y) {
    S* to = target + y * map.row + tile.left * map.column;
    const T* from = planes + tile.at(y, tile.left);
    int64_t i = 0;
    for (; map.channel == 1 && i + L <= count; i += L, to += L * map.column, from += L) {
      int64_t d = in_groups<T>(call.dim, [&]<int64_t G>(int64_t first) {
        from_planes<G>(from + first * tile.plane, tile.plane, to + first, map.column);
      });
      for (; d < call.dim; ++d)
        for (int64_t l = 0; l < L; ++l) store_one(to + l * map.column + d, from[d * tile.plane + l]);
    }
    for (; i < count; ++i, to += map.column, ++from)
      for (int64_t d = 0; d < call.dim; ++d) store_one(to + d * map.channel, from[d * tile.plane]);
  }
}

// ---- Stages, each over the pixels begin <= i < end of the planes
// -------------------------------------------------------

// What every stage needs to know; offset[p] is the distance to neighbour p.
template <typename T, int J>
struct Stage {
  const T* factor;
  int64_t dim, plane;
  int64_t offset[J];
};

// c[j](i) = scale * sum_d x[d](i) * nb(y)[d,j](i)
template <typename T, int J, bool kLearned, int kBlock, int kVectors>
void project(const Stage<T, J>& stage, const T* x, const T* y, T* c, int64_t begin, int64_t end, T scale) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t i = begin; i < end; i += kVectors * L)
    for (int j0 = 0; j0 < J; j0 += kBlock) {
      VectorOf<T> sum[kBlock][kVectors] = {};
      for (int64_t d = 0; d < stage.dim; ++d) {
        const T* const at = y + d * stage.plane + i;
        VectorOf<T> value[kVectors];
        PSF_UNROLL for (int v = 0; v < kVectors; ++v) value[v] = load(x + d * stage.plane + i + v * L);
        if constexpr (kLearned) {
          // First the neighbourhood of one channel: short sums, as accurate as the reference's.
          const T* f = stage.factor + d * (J + 1) * J + j0;
          VectorOf<T> mixed[kBlock][kVectors];
          PSF_UNROLL for (int j = 0; j < kBlock; ++j) {
            PSF_UNROLL for (int v = 0; v < kVectors; ++v) mixed[j][v] = VectorOf<T>{} + f[J * J + j];
          }
#pragma GCC unroll 1
          for (int p = 0; p < J; ++p, f += J) {
            VectorOf<T> neighbour[kVectors];
            PSF_UNROLL for (int v = 0; v < kVectors; ++v) neighbour[v] = load(at + stage.offset[p] + v * L);
            PSF_UNROLL for (int j = 0; j < kBlock; ++j) {
              PSF_UNROLL for (int v = 0; v < kVectors; ++v) mixed[j][v] += neighbour[v] * f[j];
            }
          }
          PSF_UNROLL for (int j = 0; j < kBlock; ++j) {
            PSF_UNROLL for (int v = 0; v < kVectors; ++v) sum[j][v] += mixed[j][v] * value[v];
          }
        } else {
          PSF_UNROLL for (int j = 0; j < kBlock; ++j) {
            PSF_UNROLL for (int v = 0; v < kVectors; ++v) sum[j][v] +=
                value[v] * load(at + stage.offset[j0 + j] + v * L);
          }
        }
      }
      PSF_UNROLL for (int j = 0; j < kBlock; ++j) {
        PSF_UNROLL for (int v = 0; v < kVectors; ++v) store(c + (j0 + j) * stage.plane + i + v * L, sum[j][v] * scale);
      }
    }
}

// t[p] = sum_j c[j] W[d,j,p], and from it, for one channel d or several,
// kDot: out[d](i) (+)= sum_p t[p](i) y[d](i+p) + sum_j c[j] b[d,j], which is sum_j c[j] nb(y)[d,j];
// kSpread: spread[p](i) = x[d](i) t[p](i), what pixel i adds to the gradient of pixel i + p.
template <typename T, int J, bool kLearned, bool kDot, bool kSpread, int kVectors>
void mix(const Stage<T, J>& stage, const T* c, const T* y, T* out, bool add, const T* x, T* spread, int64_t d_begin,
         int64_t d_end, int64_t begin, int64_t end) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t i = begin; i < end; i += kVectors * L) {
    VectorOf<T> weight[J][kVectors];
    PSF_UNROLL for (int j = 0; j < J; ++j) {
      PSF_UNROLL for (int v = 0; v < kVectors; ++v) weight[j][v] = load(c + j * stage.plane + i + v * L);
    }
    for (int64_t d = d_begin; d < d_end; ++d) {
      const int64_t at = d * stage.plane + i;
      const T* f = stage.factor + d * (J + 1) * J;
      VectorOf<T> sum[kVectors] = {}, value[kVectors] = {};
      if (kDot && add) {
        PSF_UNROLL for (int v = 0; v < kVectors; ++v) sum[v] = load(out + at + v * L);
      }
      if (kSpread) {
        PSF_UNROLL for (int v = 0; v < kVectors; ++v) value[v] = load(x + at + v * L);
      }
      if constexpr (kLearned) {
#pragma GCC unroll 3
        for (int p = 0; p < J; ++p, f += J) {
          VectorOf<T> t[kVectors];
          PSF_UNROLL for (int v = 0; v < kVectors; ++v) t[v] = weight[0][v] * f[0];
          PSF_UNROLL for (int j = 1; j < J; ++j) {
            PSF_UNROLL for (int v = 0; v < kVectors; ++v) t[v] += weight[j][v] * f[j];
          }
          PSF_UNROLL for (int v = 0; v < kVectors; ++v) {
            if (kDot) sum[v] += t[v] * load(y + at + stage.offset[p] + v * L);
            if (kSpread) store(spread + p * stage.plane + i + v * L, t[v] * value[v]);
          }
        }
        if (kDot) {
          PSF_UNROLL for (int j = 0; j < J; ++j) {
            PSF_UNROLL for (int v = 0; v < kVectors; ++v) sum[v] += weight[j][v] * f[j];
          }
        }
      } else {
        PSF_UNROLL for (int p = 0; p < J; ++p) {
          PSF_UNROLL for (int v = 0; v < kVectors; ++v) {
            if (kDot) sum[v] += weight[p][v] * load(y + at + stage.offset[p] + v * L);
            if (kSpread) store(spread + p * stage.plane + i + v * L, weight[p][v] * value[v]);
          }
        }
      }
      if (kDot) {
        PSF_UNROLL for (int v = 0; v < kVectors; ++v) store(out + at + v * L, sum[v]);
      }
    }
  }
}

// out(i) = sum_p spread[p](i - p)
template <typename T, int J>
void gather(const Stage<T, J>& stage, const T* spread, T* out, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += kLanes<T>) {
    VectorOf<T> sum = load(spread + i - stage.offset[0]);
    PSF_UNROLL for (int p = 1; p < J; ++p) sum += load(spread + p * stage.plane + i - stage.offset[p]);
    store(out + i, sum);
  }
}

// grad[d,p,j] += sum_i c[j](i) x[d](i) y[d](i+p), and without y for the bias (p = J); c is zero where nothing counts.
template <typename T, int J, int kNeighbours>
void factor_gradient(const Stage<T, J>& stage, const T* c, const T* x, const T* y, double* grad, int64_t begin,
                     int64_t end) {
  constexpr int kBlock = kManyRegisters || J == 9 ? J : 5;
  for (int64_t d = 0; d < stage.dim; ++d)
    for (int p0 = 0; p0 <= J; p0 += p0 < J ? kNeighbours : 1)
      for (int j0 = 0; j0 < J; j0 += kBlock) {
        const T* const from = x + d * stage.plane;
        const T* const at = y + d * stage.plane;
        double* const to = grad + (d * (J + 1) + p0) * J + j0;
        if (p0 == J) {
          VectorOf<T> sum[kBlock] = {};
          for (int64_t i = begin; i < end; i += kLanes<T>) {
            const VectorOf<T> value = load(from + i);
            PSF_UNROLL for (int j = 0; j < kBlock; ++j) sum[j] += value * load(c + (j0 + j) * stage.plane + i);
          }
          PSF_UNROLL for (int j = 0; j < kBlock; ++j) to[j] += sum_of<T>(sum[j]);
          continue;
        }
        VectorOf<T> sum[kNeighbours][kBlock] = {};
        for (int64_t i = begin; i < end; i += kLanes<T>) {
          const VectorOf<T> value = load(from + i);
          VectorOf<T> product[kNeighbours];
          PSF_UNROLL for (int p = 0; p < kNeighbours; ++p) product[p] = value * load(at + i + stage.offset[p0 + p]);
          PSF_UNROLL for (int j = 0; j < kBlock; ++j) {
            const VectorOf<T> weight = load(c + (j0 + j) * stage.plane + i);
            PSF_UNROLL for (int p = 0; p < kNeighbours; ++p) sum[p][j] += product[p] * weight;
          }
        }
        PSF_UNROLL for (int p = 0; p < kNeighbours; ++p) {
          PSF_UNROLL for (int j = 0; j < kBlock; ++j) to[p * J + j] += sum_of<T>(sum[p][j]);
        }
      }
}

// c: logits in, attention out, zero where mask is zero.
template <typename T, int J>
void attend(const Stage<T, J>& stage, T* c, const T* mask, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += kLanes<T>) {
    VectorOf<T> value[J];
    PSF_UNROLL for (int j = 0; j < J; ++j) value[j] = load(c + j * stage.plane + i);
    cm3a::softmax<J>(value, [](VectorOf<T> x) { return exponential(x); });
    const auto inside = load(mask + i) != 0;
    PSF_UNROLL for (int j = 0; j < J; ++j) store(c + j * stage.plane + i, inside ? value[j] : VectorOf<T>{});
  }
}

// grad: gradient of the attention c in, gradient of the unscaled logits out.
template <typename T, int J>
void attend_backward(const Stage<T, J>& stage, const T* c, T* grad, const T* mask, int64_t begin, int64_t end,
                     T scale) {
  for (int64_t i = begin; i < end; i += kLanes<T>) {
    VectorOf<T> value[J], change[J];
    PSF_UNROLL for (int j = 0; j < J; ++j) value[j] = load(c + j * stage.plane + i);
    PSF_UNROLL for (int j = 0; j < J; ++j) change[j] = load(grad + j * stage.plane + i);
    cm3a::softmax_backward<J>(value, change, VectorOf<T>{} + scale);
    const auto inside = load(mask + i) != 0;
    PSF_UNROLL for (int j = 0; j < J; ++j) store(grad + j * stage.plane + i, inside ? change[j] : VectorOf<T>{});
  }
}

// ---- The two passes
// ----------------------------------------------------------------------------------------------------

template <typename T, int J, bool kLearned>
struct Pass {
  static constexpr int kReach = J == 9 ? 1 : 2;
  static constexpr int kBlock = kManyRegisters || J == 9 ? J : 5;
  static constexpr int kVectors = kManyRegisters == (J == 9) ? 2 : 1;  // of project
  static constexpr int kMixVectors = kManyRegisters && J == 9 ? 2 : 1;
  static constexpr int kNeighbours = kManyRegisters && J == 9 ? 3 : 1;  // of factor_gradient

  static int64_t planes(const Call& call, bool backward) {
    return backward ? 6 * call.dim + 3 * J + 1 : 3 * call.dim + J + 1;
  }

  static Tiling tiling(const Call& call, bool backward) {
    const int64_t halo = kReach * (backward ? 2 : 1);
    const int64_t budget = backward ? 640 * 1024 : 256 * 1024;  // bytes that should stay in the second-level cache
    Tiling cut;
    cut.tiles_across = larger((call.width + 63) / 64, 1);
    cut.columns = (call.width + cut.tiles_across - 1) / cut.tiles_across;
    const int64_t pitch = cut.columns + 2 * halo;
    const int64_t fit = budget / (planes(call, backward) * static_cast<int64_t>(sizeof(T)) * pitch) - 2 * halo;
    const int64_t most = larger(fit, 4 * halo);
    cut.tiles_down = larger((call.height + most - 1) / most, 1);
    cut.rows = (call.height + cut.tiles_down - 1) / cut.tiles_down;
    cut.items = call.batch * call.heads * cut.tiles_down * cut.tiles_across;
    cut.scratch_bytes =
        planes(call, backward) * plane_elements<T>(cut.rows + 2 * halo, pitch) * static_cast<int64_t>(sizeof(T));
    return cut;
  }

  struct Item {
    int64_t image, head;
    Tile tile;
  };

  static Item item(const Call& call, const Tiling& cut, int64_t index, int64_t halo) {
    // With channels last the heads of a tile follow each other, since they lie on neighbouring cache lines; otherwise
    // the tiles of a head do.
    const int64_t tiles = cut.tiles_down * cut.tiles_across;
    const bool interleaved = call.q.channel < call.q.column;
    const int64_t head = (interleaved ? index : index / tiles) % call.heads;
    const int64_t place = (interleaved ? index / call.heads : index) % tiles;
    const int64_t image = index / tiles / call.heads;
    const int64_t across = place % cut.tiles_across, down = place / cut.tiles_across;
    Tile tile;
    // Rounding up the tiles' size may leave the last one empty.
    tile.top = smaller(down * cut.rows, call.height);
    tile.bottom = smaller(tile.top + cut.rows, call.height);
    tile.left = smaller(across * cut.columns, call.width);
    tile.right = smaller(tile.left + cut.columns, call.width);
    tile.halo = halo;
    tile.pitch = tile.right - tile.left + 2 * halo;
    tile.rows = tile.bottom - tile.top + 2 * halo;
    tile.plane = plane_elements<T>(tile.rows, tile.pitch);
    return {image, head, tile};
  }

  static Stage<T, J> stage(const Call& call, const Tile& tile) {
    Stage<T, J> result;
    result.factor = static_cast<const T*>(call.factor);
    result.dim = call.dim;
    result.plane = tile.plane;
    for (int p = 0; p < J; ++p)
      result.offset[p] = (p / (2 * kReach + 1) - kReach) * tile.pitch + p % (2 * kReach + 1) - kReach;
    return result;
  }

  // One where a pixel of the image lies within `reach` of the tile, zero elsewhere.
  static void fill_mask(const Call& call, const Tile& tile, int64_t reach, T* mask) {
    for (int64_t i = 0; i < tile.plane; ++i) mask[i] = 0;
    for (int64_t y = larger(tile.top - reach, 0); y < smaller(tile.bottom + reach, call.height); ++y)
      for (int64_t x = larger(tile.left - reach, 0); x < smaller(tile.right + reach, call.width); ++x)
        mask[tile.at(y, x)] = 1;
  }

  template <typename S>
  static void forward(const Call& call, const Tiling& cut, int64_t begin, int64_t end, T* scratch) {
    for (int64_t index = begin; index < end; ++index) {
      const auto [image, head, tile] = item(call, cut, index, kReach);
      if (tile.top == tile.bottom || tile.left == tile.right) continue;
      const Stage<T, J> s = stage(call, tile);
      T* const q = scratch;
      T* const kv = q + call.dim * tile.plane;
      T* const out = kv + call.dim * tile.plane;
      T* const c = out + call.dim * tile.plane;
      T* const mask = c + J * tile.plane;
      const int64_t first = aligned(tile.at(tile.top, tile.left));
      const int64_t last = whole_steps(first, tile.at(tile.bottom - 1, tile.right - 1) + 1);
      fill_mask(call, tile, 0, mask);
      load_planes<S>(call, call.q, image, head, tile, 0, q);
      for (int m = 0; m < 2; ++m) {
        load_planes<S>(call, call.k[m], image, head, tile, kReach, kv);
        project<T, J, kLearned, kBlock, kVectors>(s, q, kv, c, first, last, static_cast<T>(call.scale));
        attend<T, J>(s, c, mask, first, last);
        load_planes<S>(call, call.v[m], image, head, tile, kReach, kv);
        mix<T, J, kLearned, true, false, kMixVectors>(s, c, kv, out, false, nullptr, nullptr, 0, call.dim, first, last);
        store_planes<S>(call, call.out[m], image, head, tile, out);
      }
    }
  }

  template <typename S>
  static void backward(const Call& call, const Tiling& cut, int64_t begin, int64_t end, T* scratch,
                       double* grad_factor) {
    for (int64_t index = begin; index < end; ++index) {
      const auto [image, head, tile] = item(call, cut, index, 2 * kReach);
      if (tile.top == tile.bottom || tile.left == tile.right) continue;
      const Stage<T, J> s = stage(call, tile);
      const int64_t size = call.dim * tile.plane;
      T* const q = scratch;
      T* const grad = q + size;
      T* const k = grad + size;
      T* const v = k + size;
      T* const grad_q = v + size;
      T* const result = grad_q + size;
      T* const c = result + size;
      T* const change = c + J * tile.plane;
      T* const spread = change + J * tile.plane;
      T* const mask = spread + J * tile.plane;
      // Gradients of k and v in the tile come from pixels of the image around it too.
      const int64_t top = larger(tile.top - kReach, 0), bottom = smaller(tile.bottom + kReach, call.height);
      const int64_t first = aligned(tile.at(top, tile.left - kReach));
      const int64_t last = whole_steps(first, tile.at(bottom - 1, tile.right - 1 + kReach) + 1);
      const int64_t inner = tile.at(tile.top, tile.left), inner_last = tile.at(tile.bottom - 1, tile.right - 1) + 1;
      fill_mask(call, tile, kReach, mask);
      load_planes<S>(call, call.q, image, head, tile, kReach, q);
      // Rows outside the image are never computed and add nothing.
      for (int p = 0; p < J; ++p) {
        for (int64_t i = 0; i < first; ++i) spread[p * tile.plane + i] = 0;
        for (int64_t i = last; i < tile.plane; ++i) spread[p * tile.plane + i] = 0;
      }
      for (int m = 0; m < 2; ++m) {
        load_planes<S>(call, call.k[m], image, head, tile, 2 * kReach, k);
        load_planes<S>(call, call.v[m], image, head, tile, 2 * kReach, v);
        load_planes<S>(call, call.grad_out[m], image, head, tile, kReach, grad);
        project<T, J, kLearned, kBlock, kVectors>(s, q, k, c, first, last, static_cast<T>(call.scale));
        attend<T, J>(s, c, mask, first, last);
        project<T, J, kLearned, kBlock, kVectors>(s, grad, v, change, first, last, T(1));
        attend_backward<T, J>(s, c, change, mask, first, last, static_cast<T>(call.scale));
        for (int64_t d = 0; d < call.dim; ++d) {
          mix<T, J, kLearned, true, true, kMixVectors>(s, change, k, grad_q, m == 1, q, spread, d, d + 1, first, last);
          gather<T, J>(s, spread, result + d * tile.plane, inner, inner_last);
        }
        store_planes<S>(call, call.grad_k[m], image, head, tile, result);
        for (int64_t d = 0; d < call.dim; ++d) {
          mix<T, J, kLearned, false, true, kMixVectors>(s, c, nullptr, nullptr, false, grad, spread, d, d + 1, first,
                                                        last);
          gather<T, J>(s, spread, result + d * tile.plane, inner, inner_last);
        }
        store_planes<S>(call, call.grad_v[m], image, head, tile, result);
        if constexpr (kLearned) {
          clear_outside(tile, inner, inner_last, c);
          clear_outside(tile, inner, inner_last, change);
          factor_gradient<T, J, kNeighbours>(s, change, q, k, grad_factor, aligned(inner), inner_last);
          factor_gradient<T, J, kNeighbours>(s, c, grad, v, grad_factor, aligned(inner), inner_last);
        }
      }
      store_planes<S>(call, call.grad_q, image, head, tile, grad_q);
    }
  }

  // The vector that an element lies in.
  static int64_t aligned(int64_t element) { return element / kLanes<T> * kLanes<T>; }

  // The end of a range after which every stage stops, whatever its number of vectors.
  static int64_t whole_steps(int64_t first, int64_t last) {
    constexpr int64_t step = kMostVectors * kLanes<T>;
    return first + (last - first + step - 1) / step * step;
  }

  // Zero between the rows of the tile and in the rest of the first and the last vector.
  static void clear_outside(const Tile& tile, int64_t inner, int64_t inner_last, T* c) {
    const int64_t width = tile.right - tile.left;
    for (int j = 0; j < J; ++j) {
      T* const line = c + j * tile.plane;
      for (int64_t i = aligned(inner); i < inner; ++i) line[i] = 0;
      for (int64_t row = inner + width; row < inner_last; row += tile.pitch)
        for (int64_t i = 0; i < tile.pitch - width; ++i) line[row + i] = 0;
      for (int64_t i = 0; i < kLanes<T>; ++i) line[inner_last + i] = 0;
    }
  }
};

// Calls f(Pass<...>{}, S{}) for the types and the window of the call, S the type in memory.
template <typename F>
auto with_pass(const Call& call, F f) {
  const bool learned = call.factor != nullptr;
  const auto by_type = [&](auto computed, auto stored) {
    using T = decltype(computed);
    if (call.window == 3) return learned ? f(Pass<T, 9, true>{}, stored) : f(Pass<T, 9, false>{}, stored);
    return learned ? f(Pass<T, 25, true>{}, stored) : f(Pass<T, 25, false>{}, stored);
  };
  switch (call.element) {
    case Element::f64:
      return by_type(double{}, double{});
    case Element::bf16:
      return by_type(float{}, BFloat16{});
    case Element::f16:
      return by_type(float{}, Half{});
    default:
      return by_type(float{}, float{});
  }
}

}  // namespace

Tiling cm3a_tiling(const Call& call, bool backward) {
  return with_pass(call, [&](auto pass, auto) { return pass.tiling(call, backward); });
}

void cm3a_forward(const Call& call, const Tiling& tiling, int64_t begin, int64_t end, void* scratch) {
  with_pass(call, [&]<typename T, int J, bool kLearned, typename S>(Pass<T, J, kLearned> pass, S) {
    pass.template forward<S>(call, tiling, begin, end, static_cast<T*>(scratch));
  });
}

void cm3a_backward(const Call& call, const Tiling& tiling, int64_t begin, int64_t end, void* scratch,
                   double* grad_factor) {
  with_pass(call, [&]<typename T, int J, bool kLearned, typename S>(Pass<T, J, kLearned> pass, S) {
    pass.template backward<S>(call, tiling, begin, end, static_cast<T*>(scratch), grad_factor);
  });
}

}  // namespace psf::PSF_CAPABILITY

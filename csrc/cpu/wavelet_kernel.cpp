// Wavelet transforms on the CPU: one pass over the image per level.
//
// Analysis of a row of the result: one linear combination of a few rows of x gives a low-pass and a high-pass line,
// kept in cache and split into even and odd samples; four more combinations, of shifted parts of those lines, give the
// four bands. Synthesis goes the other way. Everything is `combine`, which holds its sums in registers; filters of two
// taps (Haar) run through both steps in registers.
#include "cpu/wavelet_kernel.h"

#include "cpu/vector.h"

namespace psf::PSF_CAPABILITY {

namespace {

using namespace psf::wavelet;

// Samples 0, 2, 4, ... and 1, 3, 5, ... of two adjacent vectors.
template <class V>
PSF_INLINE V evens(V a, V b) {
  return __builtin_shuffle(a, b, lane_list<Index<V>>(0, 2));
}
template <class V>
PSF_INLINE V odds(V a, V b) {
  return __builtin_shuffle(a, b, lane_list<Index<V>>(1, 2));
}
// For x in [0, n): low(x) = sum_t wl[t] src[t][x] and, where kSums is 2, high(x) = sum_t wh[t] src[t][x]. The sink
// takes pairs of adjacent vectors, sink.pair(x, low0, low1, high0, high1) with even x, and single values, sink.one(x,
// low, high); it may be given a pair twice. kTerms fixes the number of terms at compile time where it is not 0. The
// lines `ahead` are brought into the cache on the way.
template <int kSums, int kTerms, class S, class A, class Sink>
PSF_INLINE void combine(const S* const* src, const A* wl, const A* wh, int terms, int64_t n, Sink sink,
                        const S* const* ahead = nullptr, int lines_ahead = 0) {
  constexpr int kLanes = Vector<A>::lanes;
  using V = typename Vector<A>::type;
  const int count = kTerms > 0 ? kTerms : terms;
  const auto block = [&]<int kVectors>(int64_t x) __attribute__((always_inline)) {
    for (int t = 0; t < lines_ahead; ++t)
      for (int byte = 0; byte < kVectors * kLanes * static_cast<int>(sizeof(S)); byte += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(ahead[t] + x) + byte);
    V low[kVectors] = {}, high[kVectors] = {};
    for (int t = 0; t < count; ++t) {
      const S* p = src[t] + x;
      const A l = wl[t], h = kSums == 2 ? wh[t] : A(0);
      for (int v = 0; v < kVectors; ++v) {
        const V value = load(p + v * kLanes);
        low[v] += l * value;
        if constexpr (kSums == 2) high[v] += h * value;
      }
    }
    for (int v = 0; v < kVectors; v += 2) sink.pair(x + v * kLanes, low[v], low[v + 1], high[v], high[v + 1]);
  };
  int64_t x = 0;
  for (; x + 4 * kLanes <= n; x += 4 * kLanes) block.template operator()<4>(x);
  for (; x + 2 * kLanes <= n; x += 2 * kLanes) block.template operator()<2>(x);
  if (x < n && n >= 2 * kLanes) {  // once more, overlapping
    x = (n - 2 * kLanes) / 2 * 2;
    block.template operator()<2>(x);
    x += 2 * kLanes;
  }
  for (; x < n; ++x) {
    A low = 0, high = 0;
    for (int t = 0; t < count; ++t) {
      const A value = load_one(src[t] + x);
      low += wl[t] * value;
      if constexpr (kSums == 2) high += wh[t] * value;
    }
    sink.one(x, low, high);
  }
}

// combine with the number of terms fixed where it is 2.
template <int kSums, class S, class A, class Sink>
PSF_INLINE void combine_any(const S* const* src, const A* wl, const A* wh, int terms, int64_t n, Sink sink,
                            const S* const* ahead = nullptr, int lines_ahead = 0) {
  if (terms == 2)
    combine<kSums, 2>(src, wl, wh, terms, n, sink, ahead, lines_ahead);
  else
    combine<kSums, 0>(src, wl, wh, terms, n, sink, ahead, lines_ahead);
}

template <int kSums, class T, class A, bool kStream = false>
struct Store {
  using V = typename Vector<A>::type;
  T *low, *high;
  void pair(int64_t x, V low0, V low1, V high0, V high1) const {
    put<kStream>(low + x, low0);
    put<kStream>(low + x + Vector<A>::lanes, low1);
    if constexpr (kSums == 2) {
      put<kStream>(high + x, high0);
      put<kStream>(high + x + Vector<A>::lanes, high1);
    }
  }
  void one(int64_t x, A l, A h) const {
    store_one(low + x, l);
    if constexpr (kSums == 2) store_one(high + x, h);
  }
};

// Splits both lines into even and odd samples.
template <class A>
struct Split {
  using V = typename Vector<A>::type;
  A *low_even, *low_odd, *high_even, *high_odd;
  void pair(int64_t x, V low0, V low1, V high0, V high1) const {
    store(low_even + x / 2, evens(low0, low1));
    store(low_odd + x / 2, odds(low0, low1));
    store(high_even + x / 2, evens(high0, high1));
    store(high_odd + x / 2, odds(high0, high1));
  }
  void one(int64_t x, A l, A h) const {
    // Halved by a shift: told to watch for overflow, GCC 12 takes x / 2 for 0 where x % 2 is.
    const uint64_t at = static_cast<uint64_t>(x);
    (at & 1 ? low_odd : low_even)[at >> 1] = l;
    (at & 1 ? high_odd : high_even)[at >> 1] = h;
  }
};

// Two taps along W, straight from the registers: even and odd sample give one coefficient of each band.
template <class S, class A, bool kStream>
struct TwoTaps {
  using V = typename Vector<A>::type;
  S* bands[4];
  A low[2], high[2];  // filters
  void pair(int64_t x, V low0, V low1, V high0, V high1) const {
    const V le = evens(low0, low1), lo = odds(low0, low1), he = evens(high0, high1), ho = odds(high0, high1);
    put<kStream>(bands[0] + x / 2, low[0] * lo + low[1] * le);
    put<kStream>(bands[1] + x / 2, low[0] * ho + low[1] * he);
    put<kStream>(bands[2] + x / 2, high[0] * lo + high[1] * le);
    put<kStream>(bands[3] + x / 2, high[0] * ho + high[1] * he);
  }
  void two(int64_t i, A le, A lo, A he, A ho) const {
    store_one(bands[0] + i, low[0] * lo + low[1] * le);
    store_one(bands[1] + i, low[0] * ho + low[1] * he);
    store_one(bands[2] + i, high[0] * lo + high[1] * le);
    store_one(bands[3] + i, high[0] * ho + high[1] * he);
  }
  mutable A last_low, last_high;
  void one(int64_t x, A l, A h) const {
    if (x % 2) two(x / 2, last_low, l, last_high, h);
    last_low = l;
    last_high = h;
  }
};

// Even and odd samples side by side.
template <class T, class A, bool kStream>
struct Join {
  using V = typename Vector<A>::type;
  T* out;
  void pair(int64_t x, V even0, V even1, V odd0, V odd1) const {
    constexpr int kLanes = Vector<A>::lanes;
    put<kStream>(out + 2 * x, interleave(even0, odd0, 0));
    put<kStream>(out + 2 * x + kLanes, interleave(even0, odd0, 1));
    put<kStream>(out + 2 * x + 2 * kLanes, interleave(even1, odd1, 0));
    put<kStream>(out + 2 * x + 3 * kLanes, interleave(even1, odd1, 1));
  }
  void one(int64_t x, A even, A odd) const {
    store_one(out + 2 * x, even);
    store_one(out + 2 * x + 1, odd);
  }
};

// Hands out pieces of the scratch memory, each aligned to 64 bytes.
struct Scratch {
  char* next;
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next);
    next += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return piece;
  }
};

template <class S, class A, bool kStream>
static void analyse(const Analysis& call, int64_t begin, int64_t end, void* memory) {
  const Line& line = call.line;
  const Rows& vertical = call.vertical;
  const A *low = static_cast<const A*>(vertical.low), *high = static_cast<const A*>(vertical.high);
  const A* border = static_cast<const A*>(line.weight);
  const A *f = static_cast<const A*>(line.low), *g = static_cast<const A*>(line.high);
  Scratch scratch{static_cast<char*>(memory)};
  const S** rows = scratch.take<const S*>(vertical.most);
  const A** sources = scratch.take<const A*>(2 * line.taps);
  A *wl = scratch.take<A>(line.taps), *wh = scratch.take<A>(line.taps);
  A* lines[2] = {scratch.take<A>(line.size), scratch.take<A>(line.size)};
  const bool halves = line.step == 2;
  const int64_t half = halves ? line.size / 2 : 0;  // odd samples of a line stand behind the even ones
  const auto place = [&](int64_t position) { return halves ? (position % 2) * half + position / 2 : position; };
  int64_t *border_to = scratch.take<int64_t>(line.borders), *border_from = scratch.take<int64_t>(line.borders);
  for (int64_t b = 0; b < line.borders; ++b) {
    border_to[b] = place(line.position[b]);
    border_from[b] = place(line.left + line.index[b]);
  }
  for (A* e : lines)
    for (int64_t i = 0; i < line.size; ++i) e[i] = 0;

  int terms = 0;
  for (int64_t k = 0; k < line.taps; ++k) {
    if (f[k] == A(0) && g[k] == A(0)) continue;
    const int64_t shift = place(line.first - line.dilation * k);
    for (int which = 0; which < 2; ++which) sources[which * line.taps + terms] = lines[which] + shift;
    wl[terms] = f[k];
    wh[terms++] = g[k];
  }

  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / call.rows, i = row % call.rows;
    const S* plane = static_cast<const S*>(call.x.data) + n * call.x.plane;
    S* out[4];
    for (int b = 0; b < 4; ++b) out[b] = static_cast<S*>(call.y[b]) + n * call.plane + i * line.count;
    const int64_t at_row = vertical.start[i];
    const int entries = static_cast<int>(vertical.start[i + 1] - at_row);
    for (int t = 0; t < entries; ++t) rows[t] = plane + vertical.index[at_row + t] * call.x.row;
    const A *row_low = low + at_row, *row_high = high + at_row;
    // The rows that the result's row after the next one is the first to need.
    const S* ahead[2];
    int lines_ahead = 0;
    if (row + 2 < end) {
      const int64_t later = (i + 2) % call.rows, from = vertical.start[later];
      const S* later_plane = plane + (i + 2) / call.rows * call.x.plane;
      for (; lines_ahead < line.step && from + lines_ahead < vertical.start[later + 1]; ++lines_ahead)
        ahead[lines_ahead] = later_plane + vertical.index[from + lines_ahead] * call.x.row;
    }

    if (halves && line.taps == 2) {
      const TwoTaps<S, A, kStream> sink{{out[0], out[1], out[2], out[3]}, {f[0], f[1]}, {g[0], g[1]}, 0, 0};
      combine_any<2>(rows, row_low, row_high, entries, line.n, sink, ahead, lines_ahead);
      if (line.n % 2) {  // the last sample meets the border
        A edge[4] = {};
        const auto sum = [&](int64_t x, A weight, A* pair) {
          for (int t = 0; t < entries; ++t) {
            const A value = weight * load_one(rows[t] + x);
            pair[0] += row_low[t] * value;
            pair[1] += row_high[t] * value;
          }
        };
        sum(line.n - 1, 1, edge);
        for (int64_t b = 0; b < line.borders; ++b) sum(line.index[b], border[b], edge + 2);
        sink.two(line.n / 2, edge[0], edge[2], edge[1], edge[3]);
      }
      continue;
    }

    if (halves) {
      const int64_t to = line.left / 2;
      const Split<A> sink{lines[0] + to, lines[0] + half + to, lines[1] + to, lines[1] + half + to};
      combine_any<2>(rows, row_low, row_high, entries, line.n, sink, ahead, lines_ahead);
    } else {
      const Store<2, A, A> sink{lines[0] + line.left, lines[1] + line.left};
      combine_any<2>(rows, row_low, row_high, entries, line.n, sink, ahead, lines_ahead);
    }
    for (A* e : lines) {
      for (int64_t b = 0; b < line.borders; ++b) e[border_to[b]] = 0;
      for (int64_t b = 0; b < line.borders; ++b) e[border_to[b]] += border[b] * e[border_from[b]];
    }
    combine_any<2>(sources, wl, wh, terms, line.count, Store<2, S, A, kStream>{out[0], out[2]});
    combine_any<2>(sources + line.taps, wl, wh, terms, line.count, Store<2, S, A, kStream>{out[1], out[3]});
  }
}

template <class S, class A, bool kStream>
static void synthesise(const Synthesis& call, int64_t begin, int64_t end, void* memory) {
  const Line& line = call.line;
  const Rows& vertical = call.vertical;
  const A *low = static_cast<const A*>(vertical.low), *high = static_cast<const A*>(vertical.high);
  const A* border = static_cast<const A*>(line.weight);
  const A *f = static_cast<const A*>(line.low), *g = static_cast<const A*>(line.high);
  const bool halves = line.step == 2;
  const int64_t reach = line.first + line.dilation * line.taps + 2;  // zeros on both sides of a line of coefficients
  Scratch scratch{static_cast<char*>(memory)};
  const S** rows = scratch.take<const S*>(4 * vertical.most);
  A* weights = scratch.take<A>(2 * vertical.most);
  const int64_t padded = line.count + line.size + 2 * reach;
  A* lines[2] = {scratch.take<A>(padded), scratch.take<A>(padded)};
  for (A* e : lines)
    for (int64_t i = 0; i < padded; ++i) e[i] = 0;
  A* wide = scratch.take<A>(line.n);  // a row of x before it is rounded to S
  const A** sources = scratch.take<const A*>(2 * line.taps + 4);
  const A** inner = scratch.take<const A*>(2 * line.taps + 4);
  A *wl = scratch.take<A>(2 * line.taps + 4), *wh = scratch.take<A>(2 * line.taps + 4);

  // Sample p of the extended line: sum_t wl[t] sources[t][p] for step 1; for step 2 sample 2 m takes wl and sample
  // 2 m + 1 takes wh, both of sources[t][m].
  int terms = 0;
  const auto add = [&](int64_t shift, A f_low, A f_high, A g_low, A g_high) {
    if (f_low != A(0) || f_high != A(0)) {
      sources[terms] = lines[0] + reach + shift;
      wl[terms] = f_low;
      wh[terms++] = f_high;
    }
    if (g_low != A(0) || g_high != A(0)) {
      sources[terms] = lines[1] + reach + shift;
      wl[terms] = g_low;
      wh[terms++] = g_high;
    }
  };
  if (halves) {
    const auto tap = [&](const A* taps, int64_t k) { return k >= 0 && k < line.taps ? taps[k] : A(0); };
    for (int64_t shift = -(line.first / 2); 2 * shift + line.first - 1 < line.taps; ++shift) {
      const int64_t even = 2 * shift + line.first, odd = even - 1;
      add(shift, tap(f, even), tap(f, odd), tap(g, even), tap(g, odd));
    }
  } else {
    for (int64_t k = 0; k < line.taps; ++k) add(line.dilation * k - line.first, f[k], 0, g[k], 0);
  }
  const int64_t origin = halves ? line.left / 2 : line.left;
  for (int t = 0; t < terms; ++t) inner[t] = sources[t] + origin;
  const auto sample = [&](int64_t p) {
    const A* w = halves && p % 2 ? wh : wl;
    A sum = 0;
    for (int t = 0; t < terms; ++t) sum += w[t] * sources[t][halves ? p / 2 : p];
    return sum;
  };

  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / call.rows, r = row % call.rows;
    const int64_t at_row = vertical.start[r];
    const int entries = static_cast<int>(vertical.start[r + 1] - at_row);
    const S** pieces[2] = {rows, rows + 2 * entries};
    for (int t = 0; t < entries; ++t) {
      const int64_t i = vertical.index[at_row + t];
      for (int b = 0; b < 4; ++b) {
        const Plane& p = call.bands[b];
        pieces[b / 2][2 * t + b % 2] = static_cast<const S*>(p.data) + n * p.plane + i * p.row;
      }
      weights[2 * t] = low[at_row + t];
      weights[2 * t + 1] = high[at_row + t];
    }
    for (int which = 0; which < 2; ++which)
      combine_any<1>(pieces[which], weights, weights, 2 * entries, line.count,
                     Store<1, A, A>{lines[which] + reach, {}});

    S* out = static_cast<S*>(call.x) + row * line.n;
    A* target;
    if constexpr (sizeof(S) == sizeof(A))
      target = out;
    else
      target = wide;
    if (halves) {
      combine_any<2>(inner, wl, wh, terms, line.n / 2, Join<A, A, kStream>{target});
      if (line.n % 2) target[line.n - 1] = sample(line.left + line.n - 1);
    } else {
      combine_any<1>(inner, wl, wh, terms, line.n, Store<1, A, A, kStream>{target, {}});
    }
    for (int64_t b = 0; b < line.borders; ++b) target[line.index[b]] += border[b] * sample(line.position[b]);
    if constexpr (sizeof(S) != sizeof(A)) {
      const A* const source[1] = {wide};
      const A one = 1;
      combine<1, 1>(source, &one, &one, 1, line.n, Store<1, S, A>{out, {}});
    }
  }
}

}  // namespace

void wavelet_analysis(const Analysis& call, int64_t begin, int64_t end, void* scratch) {
  switch (call.element) {
    case Element::f32:
      if (call.stream) {
        analyse<float, float, true>(call, begin, end, scratch);
        return end_of_streams();
      }
      return analyse<float, float, false>(call, begin, end, scratch);
    case Element::f64:
      return analyse<double, double, false>(call, begin, end, scratch);
    case Element::bf16:
      return analyse<BFloat16, float, false>(call, begin, end, scratch);
    case Element::f16:
      return analyse<Half, float, false>(call, begin, end, scratch);
  }
}

void wavelet_synthesis(const Synthesis& call, int64_t begin, int64_t end, void* scratch) {
  switch (call.element) {
    case Element::f32:
      if (call.stream) {
        synthesise<float, float, true>(call, begin, end, scratch);
        return end_of_streams();
      }
      return synthesise<float, float, false>(call, begin, end, scratch);
    case Element::f64:
      return synthesise<double, double, false>(call, begin, end, scratch);
    case Element::bf16:
      return synthesise<BFloat16, float, false>(call, begin, end, scratch);
    case Element::f16:
      return synthesise<Half, float, false>(call, begin, end, scratch);
  }
}

}  // namespace psf::PSF_CAPABILITY

// Vectors of the instruction set at hand, for CPU kernels: loads, stores, rounding to 16 bits, exp.
//
// Internal linkage, as kernels include this once per instruction set.
#pragma once

#include <cstdint>

#include "cpu/exponential.h"

#if defined(__SSE2__)
#include <immintrin.h>  // conversion of float16; masked forms, as GCC 12 warns of the others
#endif

#define PSF_INLINE static inline __attribute__((always_inline))

namespace psf::PSF_CAPABILITY {
namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

struct BFloat16 {
  uint16_t bits;
};
using Half = _Float16;

// A: type of the arithmetic, float or double.
template <class A>
struct Vector {
  static constexpr int lanes = kBytes / sizeof(A);
  typedef A type __attribute__((vector_size(kBytes)));
  typedef A unaligned __attribute__((vector_size(kBytes), aligned(alignof(A)), may_alias));
};
typedef uint32_t Words __attribute__((vector_size(kBytes)));
typedef int32_t Int32s __attribute__((vector_size(kBytes)));
typedef uint16_t Shorts __attribute__((vector_size(kBytes / 2)));
typedef uint16_t UnalignedShorts __attribute__((vector_size(kBytes / 2), aligned(2), may_alias));
using Floats = Vector<float>::type;
using Doubles = Vector<double>::type;
PSF_INLINE Floats load(const float* p) { return *reinterpret_cast<const Vector<float>::unaligned*>(p); }
PSF_INLINE Doubles load(const double* p) { return *reinterpret_cast<const Vector<double>::unaligned*>(p); }
// Words of 16 bits as such of 32 and back; left to itself GCC 12 takes vectors of 512 bits apart for this.
PSF_INLINE Words widen(const uint16_t* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<Words>(
      _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#else
  return __builtin_convertvector(*reinterpret_cast<const UnalignedShorts*>(p), Words);
#endif
}
PSF_INLINE void narrow(uint16_t* p, Words v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtepi32_epi16(0xffff, reinterpret_cast<__m512i>(v)));
#else
  *reinterpret_cast<UnalignedShorts*>(p) = __builtin_convertvector(v, Shorts);
#endif
}
PSF_INLINE Floats load(const BFloat16* p) { return reinterpret_cast<Floats>(widen(&p->bits) << 16); }
PSF_INLINE Floats load(const Half* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(
      _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
  return reinterpret_cast<Floats>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  Floats v;
  for (int i = 0; i < Vector<float>::lanes; ++i) v[i] = static_cast<float>(p[i]);
  return v;
#endif
}

PSF_INLINE void store(float* p, Floats v) { *reinterpret_cast<Vector<float>::unaligned*>(p) = v; }
PSF_INLINE void store(double* p, Doubles v) { *reinterpret_cast<Vector<double>::unaligned*>(p) = v; }
PSF_INLINE void store(BFloat16* p, Floats v) {
  const Words bits = reinterpret_cast<Words>(v);
  const Words rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
  const Words result = v != v ? Words{} + 0x7fc0 : rounded;
  narrow(&p->bits, result);
}
PSF_INLINE void store(Half* p, Floats v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(v), 0));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(reinterpret_cast<__m256>(v), 0));
#else
  for (int i = 0; i < Vector<float>::lanes; ++i) p[i] = static_cast<Half>(v[i]);
#endif
}

// Past the caches; p is aligned to the vector.
PSF_INLINE void stream(float* p, Floats v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, reinterpret_cast<__m512>(v));
#elif defined(__AVX__)
  _mm256_stream_ps(p, reinterpret_cast<__m256>(v));
#elif defined(__SSE2__)
  _mm_stream_ps(p, reinterpret_cast<__m128>(v));
#else
  store(p, v);
#endif
}
template <class T, class V>
PSF_INLINE void stream(T* p, V v) {
  store(p, v);
}
template <bool kStream, class T, class V>
PSF_INLINE void put(T* p, V v) {
  if constexpr (kStream)
    stream(p, v);
  else
    store(p, v);
}
PSF_INLINE void end_of_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

PSF_INLINE float load_one(const float* p) { return *p; }
PSF_INLINE double load_one(const double* p) { return *p; }
PSF_INLINE float load_one(const Half* p) { return static_cast<float>(*p); }
PSF_INLINE float load_one(const BFloat16* p) { return __builtin_bit_cast(float, uint32_t{p->bits} << 16); }
PSF_INLINE void store_one(float* p, float v) { *p = v; }
PSF_INLINE void store_one(double* p, double v) { *p = v; }
PSF_INLINE void store_one(Half* p, float v) { *p = static_cast<Half>(v); }
PSF_INLINE void store_one(BFloat16* p, float v) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, v);
  p->bits = static_cast<uint16_t>(v != v ? 0x7fc0u : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// The larger and the smaller of two; the second where one is NaN.
template <class V>
PSF_INLINE V larger(V a, V b) {
  return a > b ? a : b;
}
template <class V>
PSF_INLINE V smaller(V a, V b) {
  return a < b ? a : b;
}
#if defined(__SSE2__)
// GCC takes the choice above for two instructions.
PSF_INLINE Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(
      _mm512_maskz_max_ps(0xffff, reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX__)
  return reinterpret_cast<Floats>(_mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return reinterpret_cast<Floats>(_mm_max_ps(reinterpret_cast<__m128>(a), reinterpret_cast<__m128>(b)));
#endif
}
PSF_INLINE Floats smaller(Floats a, Floats b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(
      _mm512_maskz_min_ps(0xffff, reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX__)
  return reinterpret_cast<Floats>(_mm256_min_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return reinterpret_cast<Floats>(_mm_min_ps(reinterpret_cast<__m128>(a), reinterpret_cast<__m128>(b)));
#endif
}
#endif

// Numbers of lanes, as shuffles take them.
template <class I>
constexpr I lane_list(int first, int step) {
  I lanes{};
  for (unsigned i = 0; i < sizeof(I) / sizeof(lanes[0]); ++i) lanes[i] = first + step * static_cast<int>(i);
  return lanes;
}
template <class V, int size>
struct Lanes;
typedef int64_t Int64s __attribute__((vector_size(kBytes)));
template <class V>
struct Lanes<V, 4> {
  using type = Int32s;
};
template <class V>
struct Lanes<V, 8> {
  using type = Int64s;
};
template <class V>
using Index = typename Lanes<V, sizeof(V{}[0])>::type;

// a[0] b[0] a[1] b[1] ...: the first and the second vector of it.
template <class V>
PSF_INLINE V interleave(V a, V b, int half) {
  constexpr int lanes = sizeof(V) / sizeof(V{}[0]);
  Index<V> first{}, second{};
  for (int i = 0; i < lanes; ++i) {
    first[i] = i / 2 + (i % 2) * lanes;
    second[i] = first[i] + lanes / 2;
  }
  return half == 0 ? __builtin_shuffle(a, b, first) : __builtin_shuffle(a, b, second);
}

// Rows become columns.
template <class V>
PSF_INLINE void transpose(V (&rows)[sizeof(V) / sizeof(V{}[0])]) {
  constexpr int lanes = sizeof(V) / sizeof(V{}[0]);
  for (int round = 1; round < lanes; round *= 2) {
    V next[lanes];
    for (int i = 0; i < lanes / 2; ++i) {
      next[2 * i] = interleave(rows[i], rows[i + lanes / 2], 0);
      next[2 * i + 1] = interleave(rows[i], rows[i + lanes / 2], 1);
    }
    for (int i = 0; i < lanes; ++i) rows[i] = next[i];
  }
}

PSF_INLINE Floats exponential(Floats x) { return exponential_of<Floats, Int32s>(x); }

}  // namespace
}  // namespace psf::PSF_CAPABILITY

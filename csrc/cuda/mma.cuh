// Products of small matrices on the tensor cores: one warp, 16 x 8 x 8, operands in TF32, sums in float32.
//
// With q = lane / 4 and r = lane % 4 a lane holds of
//   A [16, 8]   (q, r), (q + 8, r), (q, r + 4), (q + 8, r + 4)
//   B [8, 8]    (r, q), (r + 4, q)
//   C, D [16, 8] (q, 2r), (q, 2r + 1), (q + 8, 2r), (q + 8, 2r + 1)
// Operands are float32 of which the hardware drops the last 13 bits: TF32 has 11 significant bits. Sums are truncated,
// not rounded, so that long chains drift: where float32 accuracy counts, chain what is small and add the rest outside.
#pragma once

#include "cuda/runtime.cuh"

namespace psf {

// d = a b + c; all lanes of the warp take part. d may be c.
__device__ __forceinline__ void mma(float (&d)[4], const float (&a)[4], const float (&b)[2], const float (&c)[4]) {
#ifdef PSF_SIMT
  ::simt::mma(d, a, b, c);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
#endif
}

// x rounded to TF32; x - rounded(x) is exact. Not finite where 8193 x is not.
__device__ __forceinline__ float rounded(float x) { return fmaf(x, -8192.0f, x * 8193.0f); }

// x as sums of two TF32 values.
template <int kCount>
struct Terms {
  float high[kCount], low[kCount];

  Terms() = default;
  __device__ __forceinline__ explicit Terms(const float (&x)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      high[i] = rounded(x[i]);
      low[i] = x[i] - high[i];
    }
  }
};

// A of a product: as two terms, or as it is.
template <bool kSplit>
struct Operand {
  float values[4];
  Operand() = default;
  __device__ __forceinline__ explicit Operand(const float (&a)[4]) : values{a[0], a[1], a[2], a[3]} {}
  __device__ __forceinline__ Operand(const float (&x)[4], const float (&y)[4])
      : values{x[0] * y[0], x[1] * y[1], x[2] * y[2], x[3] * y[3]} {}
};
template <>
struct Operand<true> : Terms<4> {
  using Terms<4>::Terms;
  // Of products x y, which the two terms hold more exactly than a float32 would.
  __device__ __forceinline__ Operand(const float (&x)[4], const float (&y)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      high[i] = rounded(x[i] * y[i]);
      low[i] = fmaf(x[i], y[i], -high[i]);
    }
  }
};

// d += a b as kTerms products, small ones first: a chain that takes those first loses no more than its large ones do.
// B has `high` and, for kSplit, `low` as fragments.
template <bool kSplit>
constexpr int kTerms = kSplit ? 3 : 1;
template <bool kSplit, class B>
__device__ __forceinline__ void add_term(float (&d)[4], const Operand<kSplit>& a, const B& b, int term) {
  if constexpr (kSplit)
    mma(d, term == 0 ? a.low : a.high, term == 1 ? b.low : b.high, d);
  else
    mma(d, a.values, b.high, d);
}

// d += a b, its terms a chain of their own.
template <bool kSplit, class B>
__device__ __forceinline__ void add(float (&d)[4], const Operand<kSplit>& a, const B& b) {
  if constexpr (kSplit) {
    float chain[4] = {};
#pragma unroll
    for (int term = 0; term < kTerms<kSplit>; ++term) add_term<kSplit>(chain, a, b, term);
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] += chain[i];
  } else {
    add_term<kSplit>(d, a, b, 0);
  }
}

// A sum of products a b with operands as accurate as float32 (kSplit: both as two TF32 terms, three products), or TF32.
// Of the large products, those between two calls of `close` are a chain.
template <bool kSplit>
struct Sum {
  float total[4] = {}, small[kSplit ? 4 : 1] = {}, chain[kSplit ? 4 : 1] = {};

  template <class B>
  __device__ __forceinline__ void add(const Operand<kSplit>& a, const B& b) {
    if constexpr (kSplit) {
      add_term<kSplit>(small, a, b, 0);
      add_term<kSplit>(small, a, b, 1);
      add_term<kSplit>(chain, a, b, 2);
    } else {
      add_term<kSplit>(total, a, b, 0);
    }
  }

  __device__ __forceinline__ void close() {
    if constexpr (kSplit) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        total[i] += chain[i];
        chain[i] = 0.0f;
      }
    }
  }

  // The same sum in half of the registers, until the next addition.
  __device__ __forceinline__ void fold() {
    if constexpr (kSplit) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        total[i] += small[i];
        small[i] = 0.0f;
      }
    }
  }

  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (kSplit)
      return total[i] + small[i];
    else
      return total[i];
  }
};

}  // namespace psf

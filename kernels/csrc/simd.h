// Vectors of the instruction set of this translation unit, as vector extensions of the compiler: one source for
// AVX-512, AVX2 and baseline. Included by isa.h only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace vlmr1::VLMR1_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kTileRows = 14;  // 28 accumulators, 2 columns of b, 1 broadcast: 31 of 32 registers
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kTileRows = 6;  // 12 + 2 + 1 of 16 registers
#else
constexpr int kLanes = 4;
constexpr int kTileRows = 6;
#endif
constexpr int kTileCols = 2 * kLanes;

using Floats = float __attribute__((vector_size(4 * kLanes)));
using Words = uint32_t __attribute__((vector_size(4 * kLanes)));
using Ints = int32_t __attribute__((vector_size(4 * kLanes)));
using Halves = uint16_t __attribute__((vector_size(2 * kLanes)));

template <class Vector>
inline Vector load(const void* from) {
  Vector value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <class Vector>
inline void store(void* to, Vector value) {
  std::memcpy(to, &value, sizeof value);
}

inline Floats splat(float x) { return x - Floats{}; }

inline Floats maximum(Floats a, Floats b) { return a > b ? a : b; }

inline Floats at_least(Floats x, float bound) { return maximum(splat(bound), x); }  // NaN stays NaN

template <int Step, size_t... I>
inline Floats rotated(Floats x, std::index_sequence<I...>) {
  return __builtin_shufflevector(x, x, int((I + Step) % kLanes)...);
}

// Sum over all lanes, pairwise.
template <int Step = kLanes / 2>
inline float sum(Floats x) {
  if constexpr (Step == 0) {
    return x[0];
  } else {
    return sum<Step / 2>(x + rotated<Step>(x, std::make_index_sequence<kLanes>{}));
  }
}

template <int Step = kLanes / 2>
inline float highest(Floats x) {
  if constexpr (Step == 0) {
    return x[0];
  } else {
    return highest<Step / 2>(maximum(x, rotated<Step>(x, std::make_index_sequence<kLanes>{})));
  }
}

// e^x for -87.3 <= x <= 88, to about 2 ulp; undefined for other x, NaN included.
inline Floats exponential(Floats x) {
  const Floats shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer sits in the low bits
  const Floats r = x - (shifted - 12582912.0f) * 0.69314718f, square = r * r;
  // Short dependency chains: Horner's scheme would be bound by latency.
  const Floats low = r * 1.6666665459e-1f + 5.0000001201e-1f;
  const Floats middle = r * 8.3334519073e-3f + 4.1665795894e-2f;
  const Floats high = r * 1.9875691500e-4f + 1.3981999507e-3f;
  const Floats y = ((high * square + middle) * square + low) * square + (r + 1.0f);
  return (Floats)((Words)y + ((Words)shifted << 23));
}

// tanh to about 2 ulp.
inline Floats tanh(Floats x) {
  const Floats magnitude = (Floats)((Words)x & 0x7fffffffu), square = x * x;
  Floats p = splat(-5.70498872745e-3f);
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const Floats small = p * square * x + x;
  const Floats capped = magnitude > 9.02f ? splat(9.02f) : magnitude;
  const Floats large = 1.0f - 2.0f / (exponential(capped + capped) + 1.0f);
  const Floats with_sign = (Floats)((Words)large | ((Words)x & 0x80000000u));
  return magnitude >= 0.625f ? with_sign : small;  // small propagates NaN
}

inline Floats from_bfloat16(Halves x) { return (Floats)(__builtin_convertvector(x, Words) << 16); }

inline Halves to_bfloat16(Floats x) {
#if defined(__AVX512BF16__)
  return (Halves)_mm512_cvtneps_pbh((__m512)x);
#else
  const Words bits = (Words)x;
  return __builtin_convertvector((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, Halves);
#endif
}

// Product of 32-bit words: one float, or two bfloat16 that are adjacent along the summed dimension.
struct Float32 {
  static constexpr int kPerWord = 1;
  static inline Floats multiply_add(uint32_t a, Words b, Floats sum) {
    float x;
    std::memcpy(&x, &a, sizeof x);
    return sum + (Floats)b * x;
  }
};

#if defined(__AVX512BF16__)
struct BFloat16 {
  static constexpr int kPerWord = 2;
  static inline Floats multiply_add(uint32_t a, Words b, Floats sum) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b);
  }
};
#endif

}  // namespace vlmr1::VLMR1_ISA

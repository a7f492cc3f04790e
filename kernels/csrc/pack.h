// Conversion and packing of matrices of any dtype into the words that tiles multiply, and back.
#pragma once

#include "gemm.h"
#include "head.h"

namespace vlmr1::VLMR1_ISA {

using HalfRow = uint16_t __attribute__((vector_size(4 * kLanes)));

inline Floats from_float16(Halves x) {
  const Words half = __builtin_convertvector(x, Words);
  const Words magnitude = (half & 0x7fffu) << 13;
  const Floats finite = (Floats)magnitude * 0x1p112f;  // rebiases the exponent, subnormals included
  const Floats special = (Floats)(magnitude | 0x7f800000u);
  const Floats value = magnitude >= 0x0f800000u ? special : finite;
  return (Floats)((Words)value | ((half & 0x8000u) << 16));
}

inline Halves to_float16(Floats x) {
  const Words bits = (Words)x, magnitude = bits & 0x7fffffffu;
  const Words normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  const Words subnormal = (Words)((Floats)magnitude + 0.5f) - 0x3f000000u;
  const Words special = 0x7c00u + ((Words)(magnitude > 0x7f800000u) & 0x200u);
  Words half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? special : half;
  return __builtin_convertvector(half | ((bits >> 16) & 0x8000u), Halves);
}

// Loads `count` <= kLanes elements as float32, padded with zeros.
inline Floats widen(const char* from, DType dtype, int64_t count) {
  alignas(64) char padded[4 * kLanes];
  if (__builtin_expect(count < kLanes, 0)) {
    std::memset(padded, 0, sizeof padded);
    if (count > 0) std::memcpy(padded, from, size_t(count * bytes_of(dtype)));
    from = padded;
  }
  if (dtype == kFloat32) return load<Floats>(from);
  const Halves half = load<Halves>(from);
  return dtype == kBFloat16 ? from_bfloat16(half) : from_float16(half);
}

inline void narrow(Floats from, char* to, DType dtype) {
  if (dtype == kFloat32) {
    store(to, from);
  } else {
    store(to, dtype == kBFloat16 ? to_bfloat16(from) : to_float16(from));
  }
}

template <class Op>
inline int64_t words(int64_t elements) {
  return (elements + Op::kPerWord - 1) / Op::kPerWord;
}

// Loads kLanes words of a row from word k on, padded with zeros.
template <class Op>
inline Words row_words(const char* row, DType dtype, int64_t k, int64_t elements) {
  if constexpr (Op::kPerWord == 1) {
    return (Words)widen(row + k * bytes_of(dtype), dtype, elements - k < kLanes ? elements - k : kLanes);
  } else {
    const int64_t bytes = 2 * elements - 4 * k;
    if (bytes >= 4 * kLanes) return load<Words>(row + 4 * k);
    Words value{};
    if (bytes > 0) std::memcpy(&value, row + 4 * k, size_t(bytes));
    return value;
  }
}

constexpr int64_t kAheadInRow = 4 * kLanes;  // words of a row of the weight to prefetch: it streams from memory

template <int Step, size_t... I>
inline Words interleave_low(Words a, Words b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, ((I & Step) ? kLanes + int(I) - Step : int(I))...);
}

template <int Step, size_t... I>
inline Words interleave_high(Words a, Words b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, ((I & Step) ? kLanes + int(I) : int(I) + Step)...);
}

template <int Step>
inline void transpose_steps(Words* rows) {
  if constexpr (Step < kLanes) {
    constexpr auto lanes = std::make_index_sequence<kLanes>{};
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & Step) continue;
      const Words a = rows[i], b = rows[i + Step];
      rows[i] = interleave_low<Step>(a, b, lanes);
      rows[i + Step] = interleave_high<Step>(a, b, lanes);
    }
    transpose_steps<2 * Step>(rows);
  }
}

// Packs the transpose of `source` [count <= kTileCols][elements] as b [k][kTileCols].
template <class Op>
static void pack_transposed(const char* source, int64_t stride, DType dtype, int64_t count, int64_t elements,
                            uint32_t* to) {
  const int64_t length = words<Op>(elements), row_bytes = stride * bytes_of(dtype);
  for (int half = 0; half < 2; ++half, to += kLanes, source += kLanes * row_bytes, count -= kLanes) {
    for (int64_t k = 0; k < length; k += kLanes) {
      const int64_t steps = length - k < kLanes ? length - k : kLanes;
      Words square[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const char* row = source + i * row_bytes;
        __builtin_prefetch(row + (k + kAheadInRow) * Op::kPerWord * bytes_of(dtype));
        square[i] = i < count ? row_words<Op>(row, dtype, k, elements) : Words{};
      }
      transpose_steps<1>(square);
      for (int64_t i = 0; i < steps; ++i) store(to + (k + i) * kTileCols, square[i]);
    }
  }
}

// Stores 2 * kLanes columns of two half-precision rows as pairs.
template <size_t... I>
inline void store_pairs(const void* first, const void* second, uint32_t* to, std::index_sequence<I...>) {
  const HalfRow a = load<HalfRow>(first), b = second ? load<HalfRow>(second) : HalfRow{};
  store(to, __builtin_shufflevector(a, b, int(I / 2 + I % 2 * 2 * kLanes)...));
  store(to + kLanes, __builtin_shufflevector(a, b, int(kLanes + I / 2 + I % 2 * 2 * kLanes)...));
}

inline void store_pairs(const void* first, const void* second, uint32_t* to) {
  store_pairs(first, second, to, std::make_index_sequence<2 * kLanes>{});
}

// Packs `source` [rows][columns] as panels b [k][kTileCols]; a word holds the same column of kPerWord rows.
template <class Op>
static void pack_rows(const char* source, int64_t stride, DType dtype, int64_t rows, int64_t columns, uint32_t* to) {
  const int64_t length = words<Op>(rows), row_bytes = stride * bytes_of(dtype);
  for (int64_t column = 0; column < columns; column += kTileCols) {
    const int64_t count = columns - column < kTileCols ? columns - column : kTileCols;
    const char* row = source + column * bytes_of(dtype);
    for (int64_t k = 0; k < length; ++k, to += kTileCols, row += Op::kPerWord * row_bytes) {
      if constexpr (Op::kPerWord == 1) {
        store(to, (Words)widen(row, dtype, count < kLanes ? count : kLanes));
        store(to + kLanes, (Words)widen(row + kLanes * bytes_of(dtype), dtype, count - kLanes));
      } else {
        const char* next = 2 * k + 1 < rows ? row + row_bytes : nullptr;
        if (count == kTileCols) {
          store_pairs(row, next, to);
        } else {
          HalfRow narrow[2]{};
          std::memcpy(&narrow[0], row, size_t(2 * count));
          if (next) std::memcpy(&narrow[1], next, size_t(2 * count));
          store_pairs(&narrow[0], &narrow[1], to);
        }
      }
    }
  }
}

}  // namespace vlmr1::VLMR1_ISA

// Partition of a chunk into blocks of columns, strips of rows and tasks; scratch sizes; encoding of stored logits.
#pragma once

#include <algorithm>
#include <cmath>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "pack.h"

namespace vlmr1::VLMR1_ISA {

// 16-bit codes: z - largest in steps of kStep down to -32, or exp(z - largest) with 6 exponent and 10 fraction bits.
constexpr float kStep = 0x1p-11f;
constexpr float kLargestCode = 65535.0f;
constexpr uint32_t kLeastExponent = 0x20000000u;  // 2^-63

inline Halves encode_difference(Floats below) {
  const Floats code = below * (-1 / kStep) + 0.5f;
  const Floats bounded = code < kLargestCode ? code : splat(kLargestCode);
  return __builtin_convertvector(__builtin_convertvector(bounded, Ints), Halves);
}

inline Floats decode_difference(Halves code) {
  return __builtin_convertvector(__builtin_convertvector(code, Ints), Floats) * -kStep;
}

inline Halves encode_exponential(Floats e) {
  const Ints above = (Ints)((Words)e + (0x1000u - kLeastExponent));
  return __builtin_convertvector((above > 0 ? above : Ints{}) >> 13, Halves);
}

inline Floats decode_exponential(Halves code) {
  return (Floats)((__builtin_convertvector(code, Words) << 13) + kLeastExponent);
}

constexpr float kSmallest = -87.0f;  // lower bound of arguments of exp
constexpr float kLowest = -3e38f;    // largest logit of a block of which all are -inf

inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Splits rows [0, rows) into strips of nearly equal height, at most kTileRows: short tiles run far below peak.
template <class Body>
static void for_strips(int64_t rows, Body body) {
  const int64_t strips = (rows + kTileRows - 1) / kTileRows;
  for (int64_t i = 0, row = 0; i < strips; ++i) {
    const int64_t height = (rows - row + strips - i - 1) / (strips - i);
    body(row, int(height));
    row += height;
  }
}

inline int thread() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

template <class Op>
struct Layout {
  static constexpr bool kCoded = Op::kPerWord == 2;
  static constexpr int64_t kLogitBytes = kCoded ? 2 : 4;

  static int64_t block_columns(const Head& head) {
    // The packed block of the weight takes half of an L2 cache.
    const int64_t fitting = (512 << 10) / (4 * words<Op>(head.dim)) / kTileCols * kTileCols;
    const int64_t most = std::min<int64_t>(512, round_up(head.vocab, kTileCols));
    return std::min(most, std::max<int64_t>(fitting, 2 * kTileCols));
  }

  // d_hidden is computed in tasks of these columns and rows.
  static int64_t task_columns(const Head& head, int threads) {
    return std::min<int64_t>(512, round_up((head.dim + threads - 1) / threads, kTileCols));
  }

  static int64_t most_task_rows(const Head& head, int threads) {
    return (512 << 10) / (4 * task_columns(head, threads));
  }

  static int64_t task_rows(const Head& head, int64_t rows, int threads) {
    const int64_t tasks = (head.dim + task_columns(head, threads) - 1) / task_columns(head, threads);
    const int64_t most = most_task_rows(head, threads);
    const int64_t parts = std::max<int64_t>((rows + most - 1) / most, (threads + tasks - 1) / tasks);
    return std::max<int64_t>(1, (rows + parts - 1) / parts);
  }

  static void scratch(const Head& head, int64_t rows, int threads, int64_t* shared, int64_t* each) {
    const int64_t block = block_columns(head), length = words<Op>(head.dim), columns = task_columns(head, threads);
    const int64_t as_rows = rows * length, as_panels = round_up(head.dim, kTileCols) * words<Op>(rows);
    *shared = 4 * round_up(std::max(as_rows, as_panels), 16);
    const int64_t forward = block * length + (kTileRows + 1) * block;
    const int64_t weights = block * words<Op>(rows) + kTileRows * kTileCols + block;
    const int64_t hidden = std::min(rows, most_task_rows(head, threads)) * columns + columns * words<Op>(block);
    *each = 4 * round_up(std::max({forward, weights, hidden}), 16);
  }

  template <class Encode>
  static void put(char* kept, int64_t j, Floats value, Encode encode) {
    if constexpr (kCoded) {
      store(kept + 2 * j, encode(value));
    } else {
      store(kept + 4 * j, value);
    }
  }

  template <class Decode>
  static Floats get(const char* kept, int64_t j, Decode decode) {
    if constexpr (kCoded) {
      return decode(load<Halves>(kept + 2 * j));
    } else {
      return load<Floats>(kept + 4 * j);
    }
  }
};

}  // namespace vlmr1::VLMR1_ISA

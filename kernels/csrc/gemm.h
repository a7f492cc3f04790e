// Register tiles of a matrix product. Operands are matrices of 32-bit words (see Float32 and BFloat16 in simd.h):
// a [rows][k] and b [k][columns], b packed in panels of kTileCols columns.
#pragma once

#include "simd.h"

namespace vlmr1::VLMR1_ISA {

// The words a[r] of R rows at one k, with rows `stride` bytes apart. Three pointers and two strides address 14 rows;
// one pointer per row would exceed the registers.
template <int R>
struct Rows {
  const char *first, *second, *third;
  ptrdiff_t stride, stride3;

  Rows(const void* a, ptrdiff_t stride_)
      : first((const char*)a),
        second(first + 5 * stride_),
        third(second + 5 * stride_),
        stride(stride_),
        stride3(3 * stride_) {}

  template <int r>
  inline uint32_t word(ptrdiff_t k) const {
    const char* base = (r < 5 ? first : r < 10 ? second : third) + k;
    constexpr int local = r % 5;
    const char* at = local == 3 ? base + stride3 : base + local * stride;
    uint32_t value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }
};

constexpr int kAhead = 16 * kTileCols;  // words of b to prefetch: it streams from the L2 cache

// c [R][kTileCols] (+)= a [R][k] b [k][kTileCols]. Rows of a are `stride` bytes apart; if `Columns`, its columns are,
// and its rows are adjacent words.
template <class Op, int R, bool Columns, size_t... I>
static void tile(const void* a, ptrdiff_t stride, const uint32_t* b, int64_t k, float* c, ptrdiff_t c_stride, bool add,
                 std::index_sequence<I...>) {
  Floats sums[R][2];
  ((sums[I][0] = Floats{}, sums[I][1] = Floats{}), ...);
  if constexpr (Columns) {
    const char* words = (const char*)a;
    for (int64_t i = 0; i < k; ++i, b += kTileCols, words += stride) {
      const Words left = load<Words>(b), right = load<Words>(b + kLanes);
      __builtin_prefetch(b + kAhead);
      __builtin_prefetch(b + kAhead + kLanes);
      auto step = [&](int r, Floats* sum) {
        uint32_t x;
        std::memcpy(&x, words + 4 * r, sizeof x);
        sum[0] = Op::multiply_add(x, left, sum[0]);
        sum[1] = Op::multiply_add(x, right, sum[1]);
      };
      (step(I, sums[I]), ...);
    }
  } else {
    const Rows<R> rows(a, stride);
    for (int64_t i = 0; i < k; ++i, b += kTileCols) {
      const Words left = load<Words>(b), right = load<Words>(b + kLanes);
      __builtin_prefetch(b + kAhead);
      __builtin_prefetch(b + kAhead + kLanes);
      auto step = [&](uint32_t x, Floats* sum) {
        sum[0] = Op::multiply_add(x, left, sum[0]);
        sum[1] = Op::multiply_add(x, right, sum[1]);
      };
      (step(rows.template word<I>(4 * i), sums[I]), ...);
    }
  }
  auto finish = [&](float* at, Floats* sum) {
    if (add) {
      sum[0] = sum[0] + load<Floats>(at);
      sum[1] = sum[1] + load<Floats>(at + kLanes);
    }
    store(at, sum[0]);
    store(at + kLanes, sum[1]);
  };
  (finish(c + I * c_stride, sums[I]), ...);
}

using TileFunction = void (*)(const void*, ptrdiff_t, const uint32_t*, int64_t, float*, ptrdiff_t, bool);

// Words per partial sum: the error of a single float32 sum would grow with its length.
constexpr int64_t kDepth = 256;

template <class Op, bool Columns, int R>
static void tile_of(const void* a, ptrdiff_t stride, const uint32_t* b, int64_t k, float* c, ptrdiff_t c_stride,
                    bool add) {
  for (int64_t done = 0; done == 0 || done < k; done += kDepth, add = true) {
    const int64_t depth = k - done < kDepth ? k - done : kDepth;
    const char* words = (const char*)a + done * (Columns ? stride : 4);
    tile<Op, R, Columns>(words, stride, b + done * kTileCols, depth, c, c_stride, add, std::make_index_sequence<R>{});
  }
}

template <class Op, bool Columns, size_t... I>
static TileFunction tile_function(int rows, std::index_sequence<I...>) {
  static constexpr TileFunction functions[] = {tile_of<Op, Columns, int(I) + 1>...};
  return functions[rows - 1];
}

// Returns the function for tiles of `rows` rows, 1..kTileRows.
template <class Op, bool Columns>
static TileFunction tile_function(int rows) {
  return tile_function<Op, Columns>(rows, std::make_index_sequence<kTileRows>{});
}

}  // namespace vlmr1::VLMR1_ISA

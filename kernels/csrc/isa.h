// The output head for one instruction set. VLMR1_ISA names the namespace and is defined by the file that includes this.
#pragma once

#include <algorithm>
#include <cmath>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "pack.h"

namespace vlmr1::VLMR1_ISA {

// 16 bits: z - largest in steps of kStep, 32 in all; or exp(z - largest), its exponent in 6 bits and 10 of fraction.
constexpr float kStep = 0x1p-11f;
constexpr float kLargestCode = 65535.0f;
constexpr uint32_t kLeastExponent = 0x20000000u;  // 2^-63

inline Halves encode_difference(Floats below) {
  const Floats code = below * (-1 / kStep) + 0.5f;
  const Floats bounded = code < kLargestCode ? code : splat(kLargestCode);
  return __builtin_convertvector(__builtin_convertvector(bounded, Ints), Halves);
}

inline Floats decode_difference(Halves code) { return __builtin_convertvector(__builtin_convertvector(code, Ints), Floats) * -kStep; }

inline Halves encode_exponential(Floats e) {
  const Ints above = (Ints)((Words)e + (0x1000u - kLeastExponent));
  return __builtin_convertvector((above > 0 ? above : Ints{}) >> 13, Halves);
}

inline Floats decode_exponential(Halves code) { return (Floats)((__builtin_convertvector(code, Words) << 13) + kLeastExponent); }

constexpr float kSmallest = -87.0f;  // of a log-prob whose exp is taken
constexpr float kLowest = -3e38f;  // stands for the largest of a block of logits that are all -inf

inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Rows [0, rows) in strips of nearly equal height, at most kTileRows: the tallest tiles run at the peak, the
// shortest far below it.
template <class Body>
static void for_strips(int64_t rows, Body body) {
  const int64_t strips = (rows + kTileRows - 1) / kTileRows;
  for (int64_t i = 0, row = 0; i < strips; ++i) {
    const int64_t height = (rows - row + strips - i - 1) / (strips - i);
    body(row, int(height));
    row += height;
  }
}

template <class Op>
struct HeadPass {
  static constexpr bool kCoded = Op::kPerWord == 2;
  static constexpr int64_t kLogitBytes = kCoded ? 2 : 4;

  static int64_t block_columns(const Head& head) {
    // The packed block of the weight fills half an L2 cache.
    const int64_t fitting = (512 << 10) / (4 * words<Op>(head.dim)) / kTileCols * kTileCols;
    const int64_t most = std::min<int64_t>(512, round_up(head.vocab, kTileCols));
    return std::min(most, std::max<int64_t>(fitting, 2 * kTileCols));
  }

  // d_hidden is made in tasks of these columns and rows.
  static int64_t task_columns(const Head& head, int threads) {
    return std::min<int64_t>(512, round_up((head.dim + threads - 1) / threads, kTileCols));
  }

  static int64_t most_task_rows(const Head& head, int threads) { return (512 << 10) / (4 * task_columns(head, threads)); }

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
    const int64_t weights = (kCoded ? block * words<Op>(rows) : 0) + block + kTileRows * kTileCols;
    const int64_t hidden = std::min(rows, most_task_rows(head, threads)) * columns + columns * words<Op>(block);
    *each = 4 * round_up(std::max({forward, weights, hidden}), 16);
  }

  // --- forward ---------------------------------------------------------------------------------------------

  static void forward(const Head& head, const Chunk& chunk, const Logits* keep, float* block_sums, RowStatistics out,
                      char* shared, char* each, int threads) {
    const int64_t length = words<Op>(head.dim), block = block_columns(head), rows = chunk.rows;
    const int64_t blocks = (head.vocab + block - 1) / block, stride = chunk.hidden_stride * bytes_of(head.dtype);
    float *largest = block_sums, *sums = largest + blocks * rows, *weighted = sums + blocks * rows;
    int64_t shared_bytes, each_bytes;
    scratch(head, rows, threads, &shared_bytes, &each_bytes);
    uint32_t* hidden = (uint32_t*)shared;  // [rows][length]
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
      for (int64_t row = 0; row < rows; ++row) {
        out.logp[row] = NAN;  // of a target outside the vocabulary
        const char* from = (const char*)chunk.hidden + row * stride;
        for (int64_t k = 0; k < length; k += kLanes) {
          const Words value = row_words<Op>(from, head.dtype, k, head.dim);
          std::memcpy(hidden + row * length + k, &value, size_t(4 * std::min<int64_t>(kLanes, length - k)));
        }
      }
      uint32_t* panels = (uint32_t*)(each + thread() * each_bytes);
      float* strip = (float*)(panels + block * length);  // [kTileRows][block]
      float* bias = strip + kTileRows * block;
#pragma omp for schedule(dynamic)
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t first = b * block, columns = std::min(block, head.vocab - first);
        for (int64_t j = 0; j < columns; j += kTileCols) {
          const char* from = (const char*)head.weight + (first + j) * head.weight_stride * bytes_of(head.dtype);
          pack_transposed<Op>(from, head.weight_stride, head.dtype, std::min<int64_t>(kTileCols, columns - j), head.dim,
                              panels + j * length);
        }
        if (head.bias) load_bias(head, first, columns, bias);
        for_strips(rows, [&](int64_t row, int height) {
          const TileFunction multiply = tile_function<Op, false>(height);
          for (int64_t j = 0; j < columns; j += kTileCols)
            multiply(hidden + row * length, 4 * length, panels + j * length, length, strip + j, block, false);
          for (int r = 0; r < height; ++r, ++row) {
            float* logits = strip + r * block;
            const int64_t at = b * rows + row, target = chunk.targets[row] - first;
            const float top = finish(head, logits, columns, head.bias ? bias : nullptr);
            if (target >= 0 && target < columns) out.logp[row] = logits[target];
            char* kept = keep ? keep->data + at * block * kLogitBytes : nullptr;
            summarize(logits, columns, top, kept, keep && keep->exponentiated, &sums[at], &weighted[at]);
            largest[at] = top;
            if (keep) keep->largest[at] = top;
          }
        });
      }
#pragma omp for
      for (int64_t row = 0; row < rows; ++row) {
        float top = -INFINITY;
        for (int64_t b = 0; b < blocks; ++b) top = std::max(top, largest[b * rows + row]);
        double total = 0, product = 0;
        for (int64_t b = 0; b < blocks; ++b) {
          const int64_t at = b * rows + row;
          const double below = double(largest[at]) - top, factor = std::exp(below);
          total += sums[at] * factor;
          product += (weighted[at] + below * sums[at]) * factor;
        }
        const double lse = std::isnan(product) ? NAN : top + std::log(total);  // a logit was NaN, or infinite
        out.lse[row] = float(lse);
        out.logp[row] = float(out.logp[row] - lse);
        out.entropy[row] = float(std::log(total) - product / total);
      }
    }
  }

  static void load_bias(const Head& head, int64_t first, int64_t columns, float* to) {
    const char* from = (const char*)head.bias + first * bytes_of(head.dtype);
    for (int64_t j = 0; j < columns; j += kLanes)
      store(to + j, widen(from + j * bytes_of(head.dtype), head.dtype, std::min<int64_t>(kLanes, columns - j)));
  }

  // Bias, softcap and temperature; fills the last vector's lanes behind the columns; returns the largest logit.
  static float finish(const Head& head, float* logits, int64_t columns, const float* bias) {
    const bool capped = head.softcap > 0;
    const float divisor = capped ? head.softcap : head.temperature, factor = head.softcap / head.temperature;
    if (bias || divisor != 1 || capped) {
      for (int64_t j = 0; j < columns; j += kLanes) {
        Floats z = load<Floats>(logits + j);
        if (bias) z = z + load<Floats>(bias + j);
        z = z / divisor;
        store(logits + j, capped ? tanh(z) * factor : z);
      }
    }
    for (int64_t j = columns; j < round_up(columns, kLanes); ++j) logits[j] = -INFINITY;
    Floats top = splat(kLowest);
    for (int64_t j = 0; j < columns; j += kLanes) top = maximum(load<Floats>(logits + j), top);
    return highest(top);
  }

  // Sum of exp(z - top) and of (z - top) exp(z - top), the latter for the entropy; keeps the logits.
  static void summarize(const float* logits, int64_t columns, float top, char* kept, bool exponentiated, float* sum_of,
                        float* weighted) {
    Floats total{}, product{};
    auto each = [&](auto keep) {
      for (int64_t j = 0; j < columns; j += kLanes) {
        const Floats below = at_least(load<Floats>(logits + j) - top, kSmallest), e = exponential(below);
        total = total + e;
        product = product + below * e;
        keep(j, below, e);
      }
    };
    if (!kept) {
      each([](int64_t, Floats, Floats) {});
    } else if (exponentiated) {
      each([&](int64_t j, Floats, Floats e) { put(kept, j, e, encode_exponential); });
    } else {
      each([&](int64_t j, Floats below, Floats) { put(kept, j, below, encode_difference); });
    }
    *sum_of = sum(total);
    *weighted = sum(product);
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

  // --- backward --------------------------------------------------------------------------------------------

  static void backward(const Head& head, const Chunk& chunk, const Logits& logits, RowGradient row, HeadGradient out,
                       char* shared, char* each, int threads) {
    const int64_t rows = chunk.rows, depth = words<Op>(rows);
    int64_t shared_bytes, each_bytes;
    scratch(head, rows, threads, &shared_bytes, &each_bytes);
    uint32_t* panels = (uint32_t*)shared;  // [dim / kTileCols][depth][kTileCols] of hidden
#pragma omp parallel num_threads(threads)
    {
      char* own = each + thread() * each_bytes;
      if (out.weight) {
#pragma omp for
        for (int64_t j = 0; j < head.dim; j += kTileCols) {
          const char* from = (const char*)chunk.hidden + j * bytes_of(head.dtype);
          pack_rows<Op>(from, chunk.hidden_stride, head.dtype, rows, std::min<int64_t>(kTileCols, head.dim - j), panels + j * depth);
        }
      }
      float* column_sums = (float*)own;                                 // [block]
      float* one_tile = column_sums + logits.block;                     // [kTileRows][kTileCols]
      uint32_t* pairs = (uint32_t*)(one_tile + kTileRows * kTileCols);  // [depth][block], two rows a word
#pragma omp for schedule(dynamic)
      for (int64_t b = 0; b < logits.blocks; ++b) {
        gradient_of_block(head, chunk, logits, b, row, out, column_sums, kCoded && out.weight ? pairs : nullptr);
        if (out.weight) {
          const void* left = kCoded ? (const void*)pairs : (const void*)(logits.data + b * rows * logits.block * 4);
          weight_of_block(head, logits, b, left, panels, depth, out, one_tile);
        }
      }
      if (out.hidden) {
        const int64_t columns = task_columns(head, threads), height = task_rows(head, rows, threads);
        const int64_t across = (head.dim + columns - 1) / columns, down = (rows + height - 1) / height;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < across * down; ++task) {
          const int64_t column = task % across * columns, first = task / across * height;
          hidden_of_task(head, chunk, logits, out, own, column, std::min(columns, head.dim - column), first,
                         std::min(height, rows - first));
        }
      }
    }
  }

  // The gradient of one row's logits in a block, a vector at a time.
  struct RowSlope {
    float lse, offset, factor, constant, through_entropy, of_target, squash;

    RowSlope(const Head& head, RowGradient row, int64_t r, float top)
        : lse(row.of.lse[r]), offset(top - lse), factor(std::exp(offset)), constant(row.logp[r]), through_entropy(0),
          of_target(row.logp[r] / head.temperature), squash(head.softcap > 0 ? head.temperature / head.softcap : 0) {
      if (row.entropy) {
        through_entropy = row.entropy[r] / head.temperature;
        constant += row.entropy[r] * row.of.entropy[r];
      }
      constant = std::isnan(lse) ? NAN : constant / head.temperature;
      const float y = (row.of.logp[r] + lse) * squash;  // the target's own logit may lie below what the codes reach
      of_target *= 1 - y * y;
    }

    static void put(char* kept, int64_t j, Floats value) { HeadPass::put(kept, j, value, to_bfloat16); }

    // The row, in place, and added to the sums of columns. The lanes behind the columns are not cleared.
    template <class Gradient>
    void write(char* kept, int64_t columns, int64_t target, float* column_sums, Gradient gradient) const {
      const int64_t first = target / kLanes * kLanes, lane = target - first;
      const bool hit = target >= 0 && target < columns;
      Floats special{};
      if (hit) {
        special = gradient(first);
        special[lane] += of_target;
        if (column_sums) column_sums[target] += of_target;
      }
      for (int64_t j = 0; j < columns; j += kLanes) {
        const Floats value = gradient(j);
        put(kept, j, value);
        if (column_sums) store(column_sums + j, load<Floats>(column_sums + j) + value);
      }
      if (hit) put(kept, first, special);
    }

    void operator()(char* kept, int64_t columns, int64_t target, float* column_sums, bool exponentiated) const {
      auto log_p = [&](int64_t j) { return at_least(get(kept, j, decode_difference) + offset, kSmallest); };
      auto value = [&](Floats x) { return exponential(x) * -(x * through_entropy + constant); };
      auto slope = [&](Floats x) {  // d softcap(y) / d y where the logits came from it
        const Floats y = (x + lse) * squash;
        return 1.0f - y * y;
      };
      if (exponentiated) {
        const float scale = -constant * factor;
        write(kept, columns, target, column_sums, [&](int64_t j) { return get(kept, j, decode_exponential) * scale; });
      } else if (squash > 0) {
        auto gradient = [&](int64_t j) {
          const Floats x = log_p(j);
          return value(x) * slope(x);
        };
        write(kept, columns, target, column_sums, gradient);
      } else {
        write(kept, columns, target, column_sums, [&](int64_t j) { return value(log_p(j)); });
      }
    }
  };

  // Kept logits of a block -> their gradient, in the same memory; for bfloat16 also with rows in pairs.
  static void gradient_of_block(const Head& head, const Chunk& chunk, const Logits& logits, int64_t b, RowGradient row,
                                HeadGradient out, float* column_sums, uint32_t* pairs) {
    const int64_t block = logits.block, first = b * block, columns = std::min(block, head.vocab - first);
    if (out.bias) std::fill(column_sums, column_sums + block, 0.0f);
    for (int64_t r = 0; r < chunk.rows; ++r) {
      char* kept = logits.data + (b * chunk.rows + r) * block * kLogitBytes;
      const RowSlope gradient(head, row, r, logits.largest[b * chunk.rows + r]);
      gradient(kept, columns, chunk.targets[r] - first, out.bias ? column_sums : nullptr, logits.exponentiated);
      std::memset(kept + columns * kLogitBytes, 0, size_t((block - columns) * kLogitBytes));
      if (!pairs || !(r % 2 || r + 1 == chunk.rows)) continue;
      const char* above = r % 2 ? kept - block * kLogitBytes : kept;
      for (int64_t j = 0; j < block; j += 2 * kLanes)
        store_pairs(above + 2 * j, r % 2 ? kept + 2 * j : nullptr, pairs + r / 2 * block + j);
    }
    if (!out.bias) return;
    for (int64_t j = 0; j < columns; ++j) out.bias[first + j] = column_sums[j] + (out.first ? 0 : out.bias[first + j]);
  }

  // d_weight [block][dim] from the gradient [depth][block] of a block and the packed hidden rows.
  static void weight_of_block(const Head& head, const Logits& logits, int64_t b, const void* left, const uint32_t* panels,
                              int64_t depth, HeadGradient out, float* one_tile) {
    const int64_t first = b * logits.block, columns = std::min(logits.block, head.vocab - first);
    const bool wide = head.dtype == kFloat32 || out.wide;
    float* sums = head.dtype == kFloat32 ? (float*)out.weight : out.wide;
    for (int64_t j = 0; j < head.dim; j += kTileCols) {
      const int64_t count = std::min<int64_t>(kTileCols, head.dim - j);
      for_strips(columns, [&](int64_t v, int height) {
        const TileFunction multiply = tile_function<Op, true>(height);
        const char* at = (const char*)left + 4 * v;
        const int64_t corner = (first + v) * head.dim + j;
        if (wide && count == kTileCols) {
          multiply(at, 4 * logits.block, panels + j * depth, depth, sums + corner, head.dim, !out.first);
          return;
        }
        multiply(at, 4 * logits.block, panels + j * depth, depth, one_tile, kTileCols, false);
        for (int r = 0; r < height; ++r) {
          const float* from = one_tile + r * kTileCols;
          if (wide) {
            float* to = sums + corner + r * head.dim;
            for (int64_t i = 0; i < count; ++i) to[i] = from[i] + (out.first ? 0 : to[i]);
          } else {
            store_row(from, (char*)out.weight + (corner + r * head.dim) * bytes_of(head.dtype), head.dtype, count);
          }
        }
      });
    }
  }

  static void store_row(const float* from, char* to, DType dtype, int64_t count) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) narrow(load<Floats>(from + i), to + i * bytes_of(dtype), dtype);
    if (i == count) return;
    alignas(64) char last[4 * kLanes];
    narrow(widen((const char*)(from + i), kFloat32, count - i), last, dtype);
    std::memcpy(to + i * bytes_of(dtype), last, size_t((count - i) * bytes_of(dtype)));
  }

  // d_hidden [height][width] = gradient [height][vocab] weight [vocab][width].
  static void hidden_of_task(const Head& head, const Chunk& chunk, const Logits& logits, HeadGradient out, char* own,
                             int64_t column, int64_t width, int64_t first, int64_t height) {
    const int64_t padded = round_up(width, kTileCols), block = logits.block;
    float* sums = (float*)own;                              // [height][padded]
    uint32_t* panels = (uint32_t*)(sums + height * padded);  // [padded / kTileCols][words of a block][kTileCols]
    std::fill(sums, sums + height * padded, 0.0f);
    for (int64_t b = 0; b < logits.blocks; ++b) {
      const int64_t columns = std::min(block, head.vocab - b * block), depth = words<Op>(columns);
      const char* from = (const char*)head.weight + (b * block * head.weight_stride + column) * bytes_of(head.dtype);
      pack_rows<Op>(from, head.weight_stride, head.dtype, columns, width, panels);
      const char* gradient = logits.data + (b * chunk.rows + first) * block * kLogitBytes;
      for (int64_t j = 0; j < padded; j += kTileCols)
        for_strips(height, [&](int64_t row, int rows) {
          tile_function<Op, false>(rows)(gradient + row * block * kLogitBytes, block * kLogitBytes, panels + j * depth, depth,
                                         sums + row * padded + j, padded, true);
        });
    }
    for (int64_t row = 0; row < height; ++row) {
      const int64_t at = (first + row) * head.dim + column;
      store_row(sums + row * padded, (char*)out.hidden + at * bytes_of(head.dtype), head.dtype, width);
    }
  }

  static int thread() {
#if defined(_OPENMP)
    return omp_get_thread_num();
#else
    return 0;
#endif
  }
};

// float32 operands, and float16 everywhere, multiply as float32; bfloat16 in pairs where the processor can.
template <class Half>
struct Dispatch {
  static int64_t block_columns(const Head& head) {
    return head.dtype == kBFloat16 ? HeadPass<Half>::block_columns(head) : HeadPass<Float32>::block_columns(head);
  }
  static int64_t logit_bytes(const Head& head) {
    return head.dtype == kBFloat16 ? HeadPass<Half>::kLogitBytes : HeadPass<Float32>::kLogitBytes;
  }
  static void scratch(const Head& head, int64_t rows, int threads, int64_t* shared, int64_t* each) {
    (head.dtype == kBFloat16 ? HeadPass<Half>::scratch : HeadPass<Float32>::scratch)(head, rows, threads, shared, each);
  }
  static void forward(const Head& head, const Chunk& chunk, const Logits* keep, float* sums, RowStatistics out, char* shared,
                      char* each, int threads) {
    (head.dtype == kBFloat16 ? HeadPass<Half>::forward : HeadPass<Float32>::forward)(head, chunk, keep, sums, out, shared, each, threads);
  }
  static void backward(const Head& head, const Chunk& chunk, const Logits& logits, RowGradient row, HeadGradient out,
                       char* shared, char* each, int threads) {
    (head.dtype == kBFloat16 ? HeadPass<Half>::backward : HeadPass<Float32>::backward)(head, chunk, logits, row, out, shared, each, threads);
  }
  static void narrow_all(const float* from, void* to, DType dtype, int64_t count, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < count; i += kLanes)
      HeadPass<Half>::store_row(from + i, (char*)to + i * bytes_of(dtype), dtype, std::min<int64_t>(kLanes, count - i));
  }
  static constexpr Backend table(const char* name) {
    return {name, kLanes, block_columns, logit_bytes, scratch, forward, backward, narrow_all};
  }
};

}  // namespace vlmr1::VLMR1_ISA

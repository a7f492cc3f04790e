// Stored logits -> their gradient, in place -> d_hidden, d_weight, d_bias.
#pragma once

#include "layout.h"

namespace vlmr1::VLMR1_ISA {

// Converts a row of float32 sums to any dtype.
inline void store_row(const float* from, char* to, DType dtype, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) narrow(load<Floats>(from + i), to + i * bytes_of(dtype), dtype);
  if (i == count) return;
  alignas(64) char last[4 * kLanes];
  narrow(widen((const char*)(from + i), kFloat32, count - i), last, dtype);
  std::memcpy(to + i * bytes_of(dtype), last, size_t((count - i) * bytes_of(dtype)));
}

template <class Op>
struct Backward : Layout<Op> {
  using Layout<Op>::kCoded, Layout<Op>::kLogitBytes, Layout<Op>::get, Layout<Op>::put, Layout<Op>::scratch;
  using Layout<Op>::task_columns, Layout<Op>::task_rows;

  static void run(const Head& head, const Chunk& chunk, const Logits& logits, RowGradient row, HeadGradient out,
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
          pack_rows<Op>(from, chunk.hidden_stride, head.dtype, rows, std::min<int64_t>(kTileCols, head.dim - j),
                        panels + j * depth);
        }
      }
      float* column_sums = (float*)own;  // [block]
#pragma omp for schedule(dynamic)
      for (int64_t b = 0; b < logits.blocks; ++b) gradient_of_block(head, chunk, logits, b, row, out, column_sums);
      if (out.hidden) {
        const int64_t columns = task_columns(head, threads), height = task_rows(head, rows, threads);
        const int64_t across = (head.dim + columns - 1) / columns, down = (rows + height - 1) / height;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < across * down; ++task) {
          const int64_t column = task % across * columns, first = task / across * height;
          hidden_of_task(head, logits, out, own, column, std::min(columns, head.dim - column), first,
                         std::min(height, rows - first));
        }
      }
      if (out.weight) {                                                  // last: d_weight may overwrite the logits
        float* one_tile = (float*)own;                                   // [kTileRows][kTileCols]
        uint32_t* left = (uint32_t*)(one_tile + kTileRows * kTileCols);  // [depth][block]
#pragma omp for schedule(dynamic)
        for (int64_t b = 0; b < logits.blocks; ++b) {
          transposed_operand(logits, b, rows, left);
          weight_of_block(head, logits, b, left, panels, depth, out, one_tile);
        }
      }
    }
  }

  // Gradient of one row's logits in a block.
  struct RowSlope {
    float lse, offset, factor, constant, through_entropy, of_target, squash;

    RowSlope(const Head& head, RowGradient row, int64_t r, float top)
        : lse(row.of.lse[r]),
          offset(top - lse),
          factor(std::exp(offset)),
          constant(row.logp[r]),
          through_entropy(0),
          of_target(row.logp[r] / head.temperature),
          squash(head.softcap > 0 ? head.temperature / head.softcap : 0) {
      if (row.entropy) {
        through_entropy = row.entropy[r] / head.temperature;
        constant += row.entropy[r] * row.of.entropy[r];
      }
      constant = std::isnan(lse) ? NAN : constant / head.temperature;
      const float y = (row.of.logp[r] + lse) * squash;  // from logp: the 16-bit codes may not reach it
      of_target *= 1 - y * y;
    }

    static void put(char* kept, int64_t j, Floats value) { Layout<Op>::put(kept, j, value, to_bfloat16); }

    // Overwrites the row by its gradient and adds it to the column sums. Lanes after the last column are undefined.
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
      auto slope = [&](Floats x) {  // derivative of the softcap
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

  // Overwrites the stored logits of a block by their gradient.
  static void gradient_of_block(const Head& head, const Chunk& chunk, const Logits& logits, int64_t b, RowGradient row,
                                HeadGradient out, float* column_sums) {
    const int64_t block = logits.block, first = b * block, columns = std::min(block, head.vocab - first);
    if (out.bias) std::fill(column_sums, column_sums + block, 0.0f);
    for (int64_t r = 0; r < chunk.rows; ++r) {
      char* kept = logits.at(b, r);
      const RowSlope gradient(head, row, r, logits.largest[b * chunk.rows + r]);
      gradient(kept, columns, chunk.targets[r] - first, out.bias ? column_sums : nullptr, logits.exponentiated);
      std::memset(kept + columns * kLogitBytes, 0, size_t((block - columns) * kLogitBytes));
    }
    if (!out.bias) return;
    for (int64_t j = 0; j < columns; ++j) out.bias[first + j] = column_sums[j] + (out.first ? 0 : out.bias[first + j]);
  }

  // Packs the gradient of a block as the left operand of d_weight: [words of rows][block].
  static void transposed_operand(const Logits& logits, int64_t b, int64_t rows, uint32_t* to) {
    for (int64_t r = 0; r < rows; r += Op::kPerWord, to += logits.block) {
      if constexpr (kCoded) {
        const char *row = logits.at(b, r), *next = r + 1 < rows ? logits.at(b, r + 1) : nullptr;
        for (int64_t j = 0; j < logits.block; j += 2 * kLanes)
          store_pairs(row + 2 * j, next ? next + 2 * j : nullptr, to + j);
      } else {
        std::memcpy(to, logits.at(b, r), size_t(4 * logits.block));
      }
    }
  }

  // d_weight [block][dim] from the gradient [depth][block] of a block and the packed hidden rows.
  static void weight_of_block(const Head& head, const Logits& logits, int64_t b, const void* left,
                              const uint32_t* panels, int64_t depth, HeadGradient out, float* one_tile) {
    const int64_t first = b * logits.block, columns = std::min(logits.block, head.vocab - first);
    for (int64_t j = 0; j < head.dim; j += kTileCols) {
      const int64_t count = std::min<int64_t>(kTileCols, head.dim - j);
      for_strips(columns, [&](int64_t v, int height) {
        const TileFunction multiply = tile_function<Op, true>(height);
        const char* at = (const char*)left + 4 * v;
        const int64_t corner = (first + v) * head.dim + j;
        if (out.wide && count == kTileCols) {
          multiply(at, 4 * logits.block, panels + j * depth, depth, out.wide + corner, head.dim, !out.first);
          return;
        }
        multiply(at, 4 * logits.block, panels + j * depth, depth, one_tile, kTileCols, false);
        for (int r = 0; r < height; ++r) {
          const float* from = one_tile + r * kTileCols;
          if (out.wide) {
            float* to = out.wide + corner + r * head.dim;
            for (int64_t i = 0; i < count; ++i) to[i] = from[i] + (out.first ? 0 : to[i]);
          } else {
            store_row(from, (char*)out.weight + (corner + r * head.dim) * bytes_of(head.dtype), head.dtype, count);
          }
        }
      });
    }
  }

  // d_hidden [height][width] = gradient [height][vocab] weight [vocab][width].
  static void hidden_of_task(const Head& head, const Logits& logits, HeadGradient out, char* own, int64_t column,
                             int64_t width, int64_t first, int64_t height) {
    const int64_t padded = round_up(width, kTileCols), block = logits.block;
    float* sums = (float*)own;                               // [height][padded]
    uint32_t* panels = (uint32_t*)(sums + height * padded);  // [padded / kTileCols][words of a block][kTileCols]
    std::fill(sums, sums + height * padded, 0.0f);
    for (int64_t b = 0; b < logits.blocks; ++b) {
      const int64_t columns = std::min(block, head.vocab - b * block), depth = words<Op>(columns);
      const char* from = (const char*)head.weight + (b * block * head.weight_stride + column) * bytes_of(head.dtype);
      pack_rows<Op>(from, head.weight_stride, head.dtype, columns, width, panels);
      // Strips must not cross `split`, where the memory of the logits changes.
      const int64_t cut = std::clamp<int64_t>(logits.split - first, 0, height);
      for (int64_t j = 0; j < padded; j += kTileCols)
        for (const auto& [from, to] : {std::pair{int64_t(0), cut}, std::pair{cut, height}})
          for_strips(to - from, [&, from = from](int64_t strip, int rows) {
            const int64_t row = from + strip;
            tile_function<Op, false>(rows)(logits.at(b, first + row), logits.row_bytes, panels + j * depth, depth,
                                           sums + row * padded + j, padded, true);
          });
    }
    for (int64_t row = 0; row < height; ++row) {
      const int64_t at = (first + row) * head.dim + column;
      store_row(sums + row * padded, (char*)out.hidden + at * bytes_of(head.dtype), head.dtype, width);
    }
  }
};

}  // namespace vlmr1::VLMR1_ISA

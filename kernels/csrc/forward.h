// Hidden rows -> log-probs, entropies, log-sum-exps, one cached block of columns at a time.
#pragma once

#include "layout.h"

namespace vlmr1::VLMR1_ISA {

template <class Op>
struct Forward : Layout<Op> {
  using Layout<Op>::block_columns, Layout<Op>::put, Layout<Op>::scratch;

  static void run(const Head& head, const Chunk& chunk, const Logits* keep, float* block_sums, RowStatistics out,
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
        out.logp[row] = NAN;  // stays NaN for a target outside the vocabulary
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
            char* kept = keep ? keep->at(b, row) : nullptr;
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

  // Applies bias, softcap and temperature, pads the last vector with -inf, and returns the largest logit.
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

  // Sums exp(z - top) and, for the entropy, (z - top) exp(z - top); stores the logits if `kept` is not null.
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
};

}  // namespace vlmr1::VLMR1_ISA

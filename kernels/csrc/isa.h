// Output head for one instruction set. The including file defines VLMR1_ISA, the namespace of its code.
#pragma once

#include "backward.h"
#include "forward.h"

namespace vlmr1::VLMR1_ISA {

// float32 and float16 operands multiply as float32, bfloat16 in pairs if the processor supports it.
template <class Half>
struct Dispatch {
  static int64_t block_columns(const Head& head) {
    return head.dtype == kBFloat16 ? Layout<Half>::block_columns(head) : Layout<Float32>::block_columns(head);
  }
  static int64_t logit_bytes(const Head& head) {
    return head.dtype == kBFloat16 ? Layout<Half>::kLogitBytes : Layout<Float32>::kLogitBytes;
  }
  static void scratch(const Head& head, int64_t rows, int threads, int64_t* shared, int64_t* each) {
    (head.dtype == kBFloat16 ? Layout<Half>::scratch : Layout<Float32>::scratch)(head, rows, threads, shared, each);
  }
  static void forward(const Head& head, const Chunk& chunk, const Logits* keep, float* sums, RowStatistics out,
                      char* shared, char* each, int threads) {
    (head.dtype == kBFloat16 ? Forward<Half>::run : Forward<Float32>::run)(head, chunk, keep, sums, out, shared, each,
                                                                           threads);
  }
  static void backward(const Head& head, const Chunk& chunk, const Logits& logits, RowGradient row, HeadGradient out,
                       char* shared, char* each, int threads) {
    (head.dtype == kBFloat16 ? Backward<Half>::run : Backward<Float32>::run)(head, chunk, logits, row, out, shared,
                                                                             each, threads);
  }
  static void narrow_all(const float* from, void* to, DType dtype, int64_t count, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < count; i += kLanes)
      store_row(from + i, (char*)to + i * bytes_of(dtype), dtype, std::min<int64_t>(kLanes, count - i));
  }
  static constexpr Backend table(const char* name) {
    return {name, kLanes, block_columns, logit_bytes, scratch, forward, backward, narrow_all};
  }
};

}  // namespace vlmr1::VLMR1_ISA

// The output head on a chunk of rows, as the instruction sets implement it. Row-major matrices throughout.
#pragma once

#include <cstdint>

namespace vlmr1 {

enum DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

inline int64_t bytes_of(DType dtype) { return dtype == kFloat32 ? 4 : 2; }

// z = softcap(hidden weight^T + bias) / temperature
struct Head {
  const void* weight;  // [vocab][dim], rows `weight_stride` elements apart
  const void* bias;    // [vocab] or null
  int64_t weight_stride, vocab, dim;
  DType dtype;
  float temperature, softcap;  // softcap 0: none
};

struct Chunk {
  const void* hidden;  // [rows][dim], rows `hidden_stride` elements apart
  const int64_t* targets;
  int64_t hidden_stride, rows;
};

// What backward keeps of the logits of a chunk, each relative to the largest z of its row's block: exp(z - largest),
// or, where the derivative needs the logit too (entropy, softcap), z - largest itself. In float32, or, for operands of
// half precision, in 16 bits of at least 11 significant ones: the gradient is rounded to fewer afterwards. Log-probs
// and entropies come from the float32 logits.
//
// Rows before `split` live in the memory where the gradient of their block of the weight will be written.
struct Logits {
  char *borrowed, *own, *last;  // blocks [split][block], [rows - split][block]; the last block, [rows][block]
  float* largest;               // [blocks][rows]
  int64_t block, blocks, split, row_bytes, borrowed_pitch, own_pitch;
  bool exponentiated;

  char* at(int64_t b, int64_t row) const {
    if (b + 1 == blocks) return last + row * row_bytes;
    return row < split ? borrowed + b * borrowed_pitch + row * row_bytes
                       : own + b * own_pitch + (row - split) * row_bytes;
  }
};

struct RowStatistics {
  float *logp, *entropy, *lse;  // [rows]
};

// d loss / d z = logp * (onehot - p) - entropy * p (log p + H), both factors given by row.
struct RowGradient {
  const float *logp, *entropy;  // [rows]; entropy null: 0
  RowStatistics of;
};

struct HeadGradient {
  void* hidden;  // [rows][dim] in the dtype of the head, or null
  void* weight;  // [vocab][dim] in the dtype of the head, or null
  float* wide;   // [vocab][dim] sums over chunks of half precision, or null: a single chunk, straight to weight
  float* bias;   // [vocab] or null
  bool first;    // the first chunk overwrites weight, wide and bias, others add
};

struct Backend {
  const char* name;
  int lanes;
  // Columns of a block of logits, and bytes a kept logit takes.
  int64_t (*block_columns)(const Head&);
  int64_t (*logit_bytes)(const Head&);
  // Bytes of scratch memory: shared by all threads, and of each.
  void (*scratch)(const Head&, int64_t rows, int threads, int64_t* shared, int64_t* each);
  // Statistics of the rows; keeps the logits where asked. block_sums: [3][blocks][rows].
  void (*forward)(const Head&, const Chunk&, const Logits*, float* block_sums, RowStatistics, char* shared, char* each,
                  int threads);
  // Turns the kept logits into their gradient, in place, and multiplies.
  void (*backward)(const Head&, const Chunk&, const Logits&, RowGradient, HeadGradient, char* shared, char* each,
                   int threads);
  // float32 -> half precision.
  void (*narrow)(const float* from, void* to, DType dtype, int64_t count, int threads);
};

// The best backend of this processor, or the one that was asked for.
const Backend& backend();

// Null: the best. False where the processor does not run it, or there is none of that name.
bool use_backend(const char* name);

}  // namespace vlmr1

// Interface of the output head on a chunk of rows, implemented for each instruction set. All matrices are row-major.
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

// Logits of a chunk stored for backward, relative to the largest z of the row's block: exp(z - largest), or z - largest
// if the derivative needs the logit (entropy, softcap). They are float32, or for half-precision operands 16 bits with
// at least 11 significant bits; the gradient is rounded to fewer. Log-probs and entropies use the float32 logits.
//
// Rows before `split` are stored in the memory of the weight gradient of their block, which is written last.
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

// d loss / d z = logp * (onehot - p) - entropy * p (log p + H) with factors `logp` and `entropy` of each row.
struct RowGradient {
  const float *logp, *entropy;  // [rows]; entropy null: 0
  RowStatistics of;
};

struct HeadGradient {
  void* hidden;  // [rows][dim] in the dtype of the head, or null
  void* weight;  // [vocab][dim], or null; the dtype of the head where a single chunk writes to it
  float* wide;   // [vocab][dim] float32 sums over chunks, in place of weight or to be rounded to it; null: none
  float* bias;   // [vocab] or null
  bool first;    // the first chunk overwrites weight, wide and bias, others add
};

struct Backend {
  const char* name;
  int lanes;
  // Columns of a block of logits, and bytes of a stored logit.
  int64_t (*block_columns)(const Head&);
  int64_t (*logit_bytes)(const Head&);
  // Bytes of scratch memory: shared by all threads, and per thread.
  void (*scratch)(const Head&, int64_t rows, int threads, int64_t* shared, int64_t* each);
  // Computes statistics of the rows and stores the logits if not null. block_sums: [3][blocks][rows].
  void (*forward)(const Head&, const Chunk&, const Logits*, float* block_sums, RowStatistics, char* shared, char* each,
                  int threads);
  // Overwrites the stored logits by their gradient and computes the gradients of the head.
  void (*backward)(const Head&, const Chunk&, const Logits&, RowGradient, HeadGradient, char* shared, char* each,
                   int threads);
  // float32 -> half precision.
  void (*narrow)(const float* from, void* to, DType dtype, int64_t count, int threads);
};

// Returns the selected backend, by default the best of this processor.
const Backend& backend();

// Selects a backend by name, null: the best. Returns false if it does not exist or is not supported.
bool use_backend(const char* name);

}  // namespace vlmr1

// C interface, bound by vlmr1_kernels/native/library.py. Functions return a Status.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "head.h"
#include "objective.h"

using namespace vlmr1;

namespace {

enum Status : int { kDone = 0, kNoMemory = 1, kSequenceIds = 2 };

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

template <class T>
class Memory {
 public:
  Memory() = default;
  explicit Memory(int64_t count) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, size_t(std::max<int64_t>(count, 1)) * sizeof(T))) throw std::bad_alloc();
    memory_.reset((T*)memory);
  }
  T* get() const { return memory_.get(); }
  T& operator[](int64_t i) const { return memory_.get()[i]; }

 private:
  std::unique_ptr<T, Free> memory_;
};

// Head, rows, and scratch memory for chunks of at most `most` rows.
class Pass {
 public:
  // `keeps`: store logits for backward, if `exponentiated` as exp(z - largest). A single chunk may use the memory of
  // d_weight for them, whose elements have `size` bytes.
  Pass(const Head& head, const Chunk& rows, int64_t most, bool keeps, bool exponentiated, void* d_weight, int64_t size,
       int threads)
      : head_(head), rows_(rows), threads_(std::max(threads, 1)), logits_{} {
    logits_.block = backend().block_columns(head);
    logits_.blocks = (head.vocab + logits_.block - 1) / logits_.block;
    logits_.exponentiated = exponentiated && head.softcap == 0;
    sums_ = Memory<float>(3 * logits_.blocks * most);
    int64_t shared, each;
    backend().scratch(head, most, threads_, &shared, &each);
    shared_ = Memory<char>(shared);
    each_ = Memory<char>(each * threads_);
    if (!keeps) return;
    logits_.row_bytes = logits_.block * backend().logit_bytes(head);
    logits_.borrowed = (char*)d_weight;
    logits_.borrowed_pitch = logits_.block * head.dim * size;
    logits_.split = d_weight ? std::min(most, logits_.borrowed_pitch / logits_.row_bytes) : 0;
    logits_.own_pitch = (most - logits_.split) * logits_.row_bytes;
    own_ = Memory<char>((logits_.blocks - 1) * logits_.own_pitch);
    last_ = Memory<char>(most * logits_.row_bytes);
    largest_ = Memory<float>(logits_.blocks * most);
    logits_.own = own_.get();
    logits_.last = last_.get();
    logits_.largest = largest_.get();
  }

  void forward(int64_t first, int64_t count, bool keep, RowStatistics out) {
    backend().forward(head_, chunk(first, count), keep ? &logits_ : nullptr, sums_.get(), out, shared_.get(),
                      each_.get(), threads_);
  }

  void backward(int64_t first, int64_t count, RowGradient row, HeadGradient out) {
    if (out.hidden) out.hidden = (char*)out.hidden + first * head_.dim * bytes_of(head_.dtype);
    backend().backward(head_, chunk(first, count), logits_, row, out, shared_.get(), each_.get(), threads_);
  }

 private:
  Chunk chunk(int64_t first, int64_t count) const {
    const char* hidden = (const char*)rows_.hidden + first * rows_.hidden_stride * bytes_of(head_.dtype);
    return {hidden, rows_.targets + first, rows_.hidden_stride, count};
  }

  Head head_;
  Chunk rows_;
  int threads_;
  Logits logits_;
  Memory<float> sums_, largest_;
  Memory<char> shared_, each_, own_, last_;
};

// Destination of the gradients of a head. Several half-precision chunks are summed in float32: in d_weight where it is
// float32, else in memory of their own.
class HeadSums {
 public:
  HeadSums(const Head& head, void* d_hidden, void* d_weight, DType weight_dtype, float* d_bias, bool several,
           int threads)
      : head_(head),
        threads_(threads),
        bytes_(bytes_of(weight_dtype)),
        narrows_(d_weight && several && weight_dtype != kFloat32),
        sums_(narrows_ ? head.vocab * head.dim : 0),
        out_{d_hidden, d_weight, nullptr, d_bias, true} {
    if (narrows_) out_.wide = sums_.get();
    if (d_weight && weight_dtype == kFloat32) out_.wide = (float*)d_weight;
  }

  HeadGradient next() {
    const HeadGradient out = out_;
    out_.first = false;
    return out;
  }

  void finish() const {
    if (narrows_) backend().narrow(out_.wide, out_.weight, head_.dtype, head_.vocab * head_.dim, threads_);
    if (!out_.first) return;  // no rows
    if (out_.weight) std::memset(out_.weight, 0, size_t(head_.vocab * head_.dim * bytes_));
    if (out_.bias) std::fill(out_.bias, out_.bias + head_.vocab, 0.0f);
  }

 private:
  Head head_;
  int threads_;
  int64_t bytes_;  // of an element of d_weight
  bool narrows_;
  Memory<float> sums_;
  HeadGradient out_;
};

// Returns the ends of chunks of nearly equal size, at most `size` rows.
std::vector<int64_t> even_chunks(int64_t rows, int64_t size) {
  std::vector<int64_t> ends;
  const int64_t count = (rows + size - 1) / size;
  for (int64_t i = 1; i <= count; ++i) ends.push_back(rows * i / count);
  return ends;
}

// Returns the ends of chunks of whole sequences, at most `size` rows; empty if a sequence is longer.
std::vector<int64_t> whole_sequences(const Objective& objective, int64_t rows, int64_t size) {
  std::vector<int64_t> ends;
  for (int64_t first = 0, start = 0; start < rows;) {
    int64_t end = start + 1;
    while (end < rows && objective.sequence(end) == objective.sequence(start)) ++end;
    if (end - start > size) return {};
    if (end - first > size) {
      ends.push_back(start);
      first = start;
    }
    start = end;
    if (end == rows) ends.push_back(rows);
  }
  return ends;
}

struct Values {
  explicit Values(int64_t rows)
      : lse(rows),
        entropy(rows),
        through_logp(rows),
        through_entropy(rows),
        wide(rows),
        coefficient(rows),
        wide_entropy(rows) {}
  Memory<float> lse, entropy, through_logp, through_entropy;
  Memory<double> wide, coefficient, wide_entropy;
};

template <class Body>
int guarded(Body body) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
}

constexpr int64_t kForwardRows = 1024;  // without gradient a chunk needs memory for its hidden rows only

}  // namespace

#define VLMR1_EXPORT __attribute__((visibility("default")))

extern "C" {

VLMR1_EXPORT int vlmr1_interface() { return 2; }

VLMR1_EXPORT const char* vlmr1_backend() { return backend().name; }

// For tests; null: the best of this processor. Returns 0 if it is not supported.
VLMR1_EXPORT int vlmr1_use_backend(const char* name) { return use_backend(name); }

// Bytes of a stored logit.
VLMR1_EXPORT int64_t vlmr1_logit_bytes(const Head* head) { return backend().logit_bytes(*head); }

VLMR1_EXPORT void vlmr1_group_advantages(const double* rewards, int64_t count, int64_t num_generations, int scale,
                                         double* advantages) {
  group_advantages(rewards, count, num_generations, scale, advantages);
}

VLMR1_EXPORT int vlmr1_linear_logprob(const Head* head, const Chunk* rows, int threads, float* logp, float* entropy,
                                      float* lse) {
  return guarded([&] {
    const int64_t size = std::min(rows->rows, kForwardRows);
    Pass pass(*head, *rows, size, false, false, nullptr, 0, threads);
    for (int64_t first = 0; first < rows->rows; first += size)
      pass.forward(first, std::min(size, rows->rows - first), false, {logp + first, entropy + first, lse + first});
    return kDone;
  });
}

VLMR1_EXPORT int vlmr1_linear_logprob_backward(const Head* head, const Chunk* rows, int64_t chunk, int threads,
                                               const float* d_logp, const float* d_entropy, int weight_dtype,
                                               void* d_hidden, void* d_weight, float* d_bias) {
  return guarded([&] {
    const std::vector<int64_t> ends = even_chunks(rows->rows, chunk);
    void* borrowed = ends.size() == 1 ? d_weight : nullptr;
    const DType dtype = DType(weight_dtype);
    Pass pass(*head, *rows, std::min(chunk, rows->rows), true, !d_entropy, borrowed, bytes_of(dtype), threads);
    HeadSums sums(*head, d_hidden, d_weight, dtype, d_bias, ends.size() > 1, threads);
    Memory<float> again(3 * std::min(chunk, rows->rows));
    int64_t first = 0;
    for (const int64_t end : ends) {
      const int64_t count = end - first;
      const RowStatistics of{again.get(), again.get() + count, again.get() + 2 * count};
      pass.forward(first, count, true, of);
      const RowGradient row{d_logp + first, d_entropy ? d_entropy + first : nullptr, of};
      pass.backward(first, count, row, sums.next());
      first = end;
    }
    sums.finish();
    return kDone;
  });
}

VLMR1_EXPORT int vlmr1_grpo_loss(const Rows* rows, const Settings* settings, const double* logp, double* d_logp,
                                 Summary* summary) {
  return guarded([&] {
    Objective objective;
    if (!objective.prepare(*rows, *settings)) return int(kSequenceIds);
    objective.coefficients(logp, 0, rows->count, d_logp);
    *summary = objective.summary(logp, nullptr);
    return int(kDone);
  });
}

VLMR1_EXPORT int vlmr1_linear_grpo_loss(const Head* head, const Chunk* hidden, const Rows* rows,
                                        const Settings* settings, int64_t chunk, double scale, int threads,
                                        int weight_dtype, float* logp, void* d_hidden, void* d_weight, float* d_bias,
                                        Summary* summary) {
  return guarded([&] {
    Objective objective;
    if (!objective.prepare(*rows, *settings)) return int(kSequenceIds);
    const int64_t count = rows->count;
    const bool gradient = d_hidden || d_weight || d_bias;
    chunk = std::max<int64_t>(1, std::min(gradient ? chunk : kForwardRows, count));
    std::vector<int64_t> ends;
    if (gradient && settings->sequence_level) ends = whole_sequences(objective, count, chunk);
    const bool twice = gradient && settings->sequence_level && ends.empty();
    if (ends.empty()) ends = even_chunks(count, chunk);

    void* borrowed = ends.size() == 1 ? d_weight : nullptr;
    const DType dtype = DType(weight_dtype);
    Pass pass(*head, *hidden, chunk, gradient, settings->entropy_coef == 0, borrowed, bytes_of(dtype), threads);
    HeadSums sums(*head, d_hidden, d_weight, dtype, d_bias, ends.size() > 1, threads);
    Values values(count);
    auto forward = [&](int64_t first, int64_t end, bool keep) {
      pass.forward(first, end - first, keep, {logp + first, values.entropy.get() + first, values.lse.get() + first});
      std::copy(logp + first, logp + end, values.wide.get() + first);
      std::copy(values.entropy.get() + first, values.entropy.get() + end, values.wide_entropy.get() + first);
    };

    int64_t first = 0;
    if (twice) {
      for (const int64_t end : ends) {
        forward(first, end, false);
        first = end;
      }
      objective.coefficients(values.wide.get(), 0, count, values.coefficient.get());
    }
    first = 0;
    for (const int64_t end : ends) {
      forward(first, end, gradient);
      if (gradient) {
        if (!twice) objective.coefficients(values.wide.get(), first, end, values.coefficient.get() + first);
        for (int64_t row = first; row < end; ++row) {
          values.through_logp[row] = float(scale * values.coefficient[row]);
          values.through_entropy[row] = float(-scale * settings->entropy_coef * objective.weight(row));
        }
        const bool entropy = settings->entropy_coef != 0;
        const RowGradient row{values.through_logp.get() + first,
                              entropy ? values.through_entropy.get() + first : nullptr,
                              {logp + first, values.entropy.get() + first, values.lse.get() + first}};
        pass.backward(first, end - first, row, sums.next());
      }
      first = end;
    }
    sums.finish();
    *summary = objective.summary(values.wide.get(), values.wide_entropy.get());
    return int(kDone);
  });
}

}  // extern "C"

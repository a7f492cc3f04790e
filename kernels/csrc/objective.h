// Token losses of all loss types, in double; GRPOSettings has the formulas.
#pragma once

#include <cstdint>
#include <vector>

namespace vlmr1 {

enum LossType : int32_t { kGrpo = 0, kBnpo, kDapo, kDrGrpo, kCispo, kGspo };
enum Kl : int32_t { kK1 = 1, kK2, kK3 };

// Mirrored by vlmr1_kernels/native/library.py.
struct Settings {
  int32_t loss_type, kl, sequence_level, has_delta, has_tis_cap, use_bias_correction_kl;
  double epsilon_low, epsilon_high, delta, beta, tis_cap, entropy_coef, max_completion_length;
};

struct Rows {
  int64_t total;                       // N rows whose lengths count
  int64_t count;                       // n rows of this call
  int64_t sequences;                   // B
  int64_t num_generations;             // with rewards
  const int64_t* seq_ids;              // [N]
  const int64_t* selected;             // [n] indices of the rows, or null: all
  const double* advantages;            // [B] or null
  const double* rewards;               // [B] or null
  const double *old, *ref, *sampling;  // [n] or null
  double normalizer;                   // 0: that of this call
};

struct Summary {
  double loss, kl, entropy, clip_low, clip_high, ratio_max;
};

// advantages [count] of groups of adjacent rewards. scale: 0 none, 1 group, 2 batch.
void group_advantages(const double* rewards, int64_t count, int64_t num_generations, int scale, double* advantages);

class Objective {
 public:
  // Returns false if a sequence id is outside 0..B-1.
  bool prepare(const Rows& rows, const Settings& settings);

  int64_t sequence(int64_t row) const { return rows_.seq_ids[rows_.selected ? rows_.selected[row] : row]; }
  // Weight of a row in the loss.
  double weight(int64_t row) const { return weight_[sequence(row)]; }
  // Writes d loss / d logp of rows [first, last), at sequence level whole sequences.
  void coefficients(const double* logp, int64_t first, int64_t last, double* out) const;
  // Returns the summary of all rows; entropy [n] or null. It does not depend on the number of threads.
  Summary summary(const double* logp, const double* entropy) const;

 private:
  struct Token {
    double loss, ratio, kl;
    double through_ratio;  // d loss / d log-ratio
    double direct;         // remaining d loss / d logp
  };
  double log_ratio(const double* logp, int64_t row) const;
  Token token(double logp, double log_ratio, int64_t row) const;
  std::vector<int64_t> parts(int64_t first, int64_t last) const;
  template <class Body>
  void for_tokens(const double* logp, int64_t first, int64_t last, Body body) const;

  Rows rows_;
  Settings settings_;
  std::vector<double> advantage_, weight_, length_;  // [B]
};

}  // namespace vlmr1

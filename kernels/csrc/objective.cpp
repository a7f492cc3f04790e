#include "objective.h"

#include <algorithm>
#include <cmath>

namespace vlmr1 {

namespace {

double higher(double a, double b) { return b > a || std::isnan(b) ? b : a; }

}  // namespace

void group_advantages(const double* rewards, int64_t count, int64_t num_generations, int scale, double* advantages) {
  constexpr double kFloor = 1e-4;
  auto deviation = [](const double* values, int64_t n, double mean) {
    double squares = 0;
    for (int64_t i = 0; i < n; ++i) squares += (values[i] - mean) * (values[i] - mean);
    return std::sqrt(squares / double(std::max<int64_t>(n - 1, 1)));
  };
  // Relative to the first reward, so that equal rewards cancel exactly.
  auto mean_of = [](const double* values, int64_t n) {
    double total = 0;
    for (int64_t i = 0; i < n; ++i) total += values[i] - values[0];
    return n ? values[0] + total / double(n) : 0;
  };
  const double batch = scale == 2 ? deviation(rewards, count, mean_of(rewards, count)) : 0;
  for (int64_t first = 0; first < count; first += num_generations) {
    const double* group = rewards + first;
    const double mean = mean_of(group, num_generations);
    const double std = scale == 1 ? deviation(group, num_generations, mean) : batch;
    for (int64_t i = 0; i < num_generations; ++i)
      advantages[first + i] = (group[i] - mean) / (scale ? std + kFloor : 1);
  }
}

bool Objective::prepare(const Rows& rows, const Settings& settings) {
  rows_ = rows;
  settings_ = settings;
  length_.assign(size_t(rows.sequences), 0);
  for (int64_t row = 0; row < rows.total; ++row) {
    const int64_t sequence = rows.seq_ids[row];
    if (sequence < 0 || sequence >= rows.sequences) return false;
    ++length_[sequence];
  }
  advantage_.resize(size_t(rows.sequences));
  if (rows.advantages) {
    std::copy_n(rows.advantages, rows.sequences, advantage_.begin());
  } else {
    group_advantages(rows.rewards, rows.sequences, rows.num_generations, 1, advantage_.data());
  }
  const bool by_sequence = settings.loss_type == kGrpo || settings.loss_type == kGspo;
  const bool of_sequences = by_sequence || settings.loss_type == kDrGrpo;
  const double own = double(std::max<int64_t>(of_sequences ? rows.sequences : rows.total, 1));
  const double count = rows.normalizer > 0 ? rows.normalizer : own;
  const double length = settings.loss_type == kDrGrpo ? settings.max_completion_length : 1;
  weight_.resize(size_t(rows.sequences));
  for (int64_t s = 0; s < rows.sequences; ++s)
    weight_[s] = 1 / (count * (by_sequence ? std::max(length_[s], 1.0) : length));
  return true;
}

double Objective::log_ratio(const double* logp, int64_t row) const {
  return rows_.old ? logp[row] - rows_.old[row] : 0;
}

Objective::Token Objective::token(double logp, double log_ratio, int64_t row) const {
  const double advantage = advantage_[sequence(row)], ratio = std::exp(log_ratio);
  Token out{0, ratio, 0, 0, 0};
  if (settings_.loss_type == kCispo) {
    out.direct = -std::min(ratio, settings_.epsilon_high) * advantage;
    out.loss = out.direct * logp;
  } else {
    const double low = 1 - settings_.epsilon_low, high = 1 + settings_.epsilon_high;
    const bool over = settings_.has_delta && ratio > settings_.delta;
    const double capped = (over ? settings_.delta : ratio) * advantage;
    const double clipped = std::min(std::max(ratio, low), high) * advantage;
    const double d_capped = over ? 0 : ratio * advantage,
                 d_clipped = ratio >= low && ratio <= high ? ratio * advantage : 0;
    out.loss = -(clipped < capped ? clipped : capped);  // NaN propagates
    if (std::isnan(clipped)) out.loss = clipped;
    out.through_ratio = -(capped < clipped ? d_capped : clipped < capped ? d_clipped : (d_capped + d_clipped) / 2);
  }
  if (settings_.has_tis_cap) {
    const double old = rows_.old ? rows_.old[row] : logp;
    const double factor = std::min(std::exp(old - rows_.sampling[row]), settings_.tis_cap);
    out.loss *= factor;
    out.through_ratio *= factor;
    out.direct *= factor;
  }
  if (rows_.ref) {
    const double d = rows_.ref[row] - logp;
    out.kl = settings_.kl == kK1 ? -d : settings_.kl == kK2 ? d * d / 2 : std::exp(d) - d - 1;
    double slope = settings_.kl == kK1 ? 1 : settings_.kl == kK2 ? -d : 1 - std::exp(d);
    if (settings_.use_bias_correction_kl) {
      out.kl *= ratio;
      slope *= ratio;
      if (settings_.beta > 0) out.through_ratio += settings_.beta * out.kl;
    }
    if (settings_.beta > 0) {
      out.loss += settings_.beta * out.kl;
      out.direct += settings_.beta * slope;
    }
  }
  return out;
}

// Returns the ends of parts of about kPart rows of [first, last), at sequence level of whole sequences.
std::vector<int64_t> Objective::parts(int64_t first, int64_t last) const {
  constexpr int64_t kPart = 2048;
  std::vector<int64_t> ends{first};
  while (ends.back() < last) {
    int64_t end = std::min(ends.back() + kPart, last);
    while (settings_.sequence_level && end < last && sequence(end) == sequence(end - 1)) ++end;
    ends.push_back(end);
  }
  return ends;
}

template <class Body>
void Objective::for_tokens(const double* logp, int64_t first, int64_t last, Body body) const {
  while (first < last) {
    int64_t end = first + 1;
    double shared = log_ratio(logp, first);
    if (settings_.sequence_level) {
      for (; end < last && sequence(end) == sequence(first); ++end) shared += log_ratio(logp, end);
      shared /= length_[sequence(first)];
    }
    for (; first < end; ++first) body(first, token(logp[first], shared, first));
  }
}

void Objective::coefficients(const double* logp, int64_t first, int64_t last, double* out) const {
  const std::vector<int64_t> ends = parts(first, last);
#pragma omp parallel for schedule(static)
  for (size_t part = 1; part < ends.size(); ++part) {
    // At sequence level each row changes the mean log-ratio of all rows of its sequence.
    int64_t begin = ends[part - 1];
    double through = 0;
    auto spread = [&](int64_t end) {
      for (; begin < end; ++begin) out[begin - first] += through / length_[sequence(begin)];
      through = 0;
    };
    for_tokens(logp, ends[part - 1], ends[part], [&](int64_t row, const Token& token) {
      const double share = weight(row);
      if (!settings_.sequence_level) {
        out[row - first] = share * (token.through_ratio + token.direct);
        return;
      }
      if (sequence(row) != sequence(begin)) spread(row);
      through += share * token.through_ratio;
      out[row - first] = share * token.direct;
    });
    if (settings_.sequence_level) spread(ends[part]);
  }
}

Summary Objective::summary(const double* logp, const double* entropy) const {
  const bool cispo = settings_.loss_type == kCispo;
  const std::vector<int64_t> ends = parts(0, rows_.count);
  std::vector<Summary> sums(ends.size() - 1);
#pragma omp parallel for schedule(static)
  for (size_t part = 1; part < ends.size(); ++part) {
    Summary sum{};
    sum.ratio_max = -INFINITY;
    for_tokens(logp, ends[part - 1], ends[part], [&](int64_t row, const Token& token) {
      const double advantage = advantage_[sequence(row)];
      sum.loss += weight(row) * (token.loss - (entropy ? settings_.entropy_coef * entropy[row] : 0));
      sum.kl += token.kl;
      sum.entropy += entropy ? entropy[row] : 0;
      sum.clip_low += !cispo && advantage < 0 && token.ratio < 1 - settings_.epsilon_low;
      sum.clip_high += advantage > 0 && token.ratio > (cispo ? 0 : 1) + settings_.epsilon_high;
      sum.ratio_max = higher(sum.ratio_max, token.ratio);
    });
    sums[part - 1] = sum;
  }
  Summary out{};
  if (rows_.count > 0) out.ratio_max = -INFINITY;
  const double count = double(std::max<int64_t>(rows_.count, 1));
  for (const Summary& sum : sums) {
    out.loss += sum.loss;
    out.kl += sum.kl / count;
    out.entropy += sum.entropy / count;
    out.clip_low += sum.clip_low / count;
    out.clip_high += sum.clip_high / count;
    out.ratio_max = higher(out.ratio_max, sum.ratio_max);
  }
  return out;
}

}  // namespace vlmr1

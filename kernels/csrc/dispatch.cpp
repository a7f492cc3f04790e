#include <cstring>

#include "head.h"

namespace vlmr1 {

extern const Backend k_baseline;
#if defined(VLMR1_X86)
extern const Backend k_avx2, k_avx512, k_avx512bf16;
#endif

namespace {

const Backend* chosen = nullptr;

// The best backend that this processor supports; with a name, that one, or null if it is not supported.
const Backend* find(const char* name) {
  auto wanted = [&](const Backend& one, bool runs) { return runs && (!name || !std::strcmp(name, one.name)); };
#if defined(VLMR1_X86)
  __builtin_cpu_init();
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (wanted(k_avx512bf16, wide && __builtin_cpu_supports("avx512bf16"))) return &k_avx512bf16;
  if (wanted(k_avx512, wide)) return &k_avx512;
  if (wanted(k_avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return &k_avx2;
#endif
  return wanted(k_baseline, true) ? &k_baseline : nullptr;
}

}  // namespace

const Backend& backend() { return chosen ? *chosen : *(chosen = find(nullptr)); }

bool use_backend(const char* name) {
  const Backend* found = find(name);
  if (found) chosen = found;
  return found;
}

}  // namespace vlmr1

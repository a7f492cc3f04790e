#define VLMR1_ISA avx512bf16
#include "isa.h"

namespace vlmr1 {
extern const Backend k_avx512bf16 = avx512bf16::Dispatch<avx512bf16::BFloat16>::table("avx512bf16");
}

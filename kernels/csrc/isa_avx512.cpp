#define VLMR1_ISA avx512
#include "isa.h"

namespace vlmr1 {
extern const Backend k_avx512 = avx512::Dispatch<avx512::Float32>::table("avx512");
}

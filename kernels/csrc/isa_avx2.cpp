#define VLMR1_ISA avx2
#include "isa.h"

namespace vlmr1 {
extern const Backend k_avx2 = avx2::Dispatch<avx2::Float32>::table("avx2");
}

#define VLMR1_ISA baseline
#include "isa.h"

namespace vlmr1 {
extern const Backend k_baseline = baseline::Dispatch<baseline::Float32>::table("baseline");
}

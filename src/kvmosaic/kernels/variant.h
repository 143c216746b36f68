// Every kernel for one instruction set. Included by native.c, once for each, with VARIANT, VARIANT_ISA, LANES, TARGET.

#include "vector.h"
#include "rotate.h"

#include "attention/cpu.c"
#include "encode/cpu.c"

#undef floats
#undef ints
#undef words
#undef shorts
#undef VARIANT
#undef VARIANT_ISA
#undef VARIANT_VNNI
#undef LANES
#undef TARGET
#undef NAME
#undef JOIN
#undef JOIN_
#undef FN
#undef INLINE
#undef ROUNDER
#undef SPAN

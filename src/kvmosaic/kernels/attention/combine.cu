// Attention by itself: its parts joined. A decode step joins them where it stores its token (encode/cuda.cu).
#include "attention/combine.cuh"

KERNEL(128, 8) combine_parts(const Joined w) { combine(w, blockIdx.x, gridDim.x, blockIdx.y); }

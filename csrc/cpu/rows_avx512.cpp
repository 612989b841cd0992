// The row algorithms compiled for AVX512; chosen at run time.
#include "rows_abi.h"

#if defined(__x86_64__)
#include <immintrin.h>  // before the pragma: inline functions of the headers must stay plain

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

#define SDK_ISA avx512
#define SDK_LANES 16
#include "../kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

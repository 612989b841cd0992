// The row algorithms for any processor.
#include "rows_abi.h"

#define SDK_ISA plain
#define SDK_LANES 4
#include "../kernels.h"

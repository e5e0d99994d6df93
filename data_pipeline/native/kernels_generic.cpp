#define SIMD_LEVEL 0
#include "resample.h"
#include "photometrics.h"

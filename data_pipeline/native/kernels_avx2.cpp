#if defined(__x86_64__)
#include <algorithm>
#include <cmath>
#include <vector>
#pragma GCC target("avx2,fma,f16c")
#define SIMD_LEVEL 2
#include "resample.h"
#include "photometrics.h"
#endif

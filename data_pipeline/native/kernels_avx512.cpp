#if defined(__x86_64__)
#include <algorithm>
#include <cmath>
#include <vector>
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
#define SIMD_LEVEL 512
#include "resample.h"
#include "photometrics.h"
#endif

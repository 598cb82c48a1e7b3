// Which arithmetic a call runs with.

#pragma once

#include <new>

#include "amx.h"

namespace moba {

// Calls pass(arithmetic, element) by what the processor multiplies bfloat16 with. `narrow` is 0 for float32 and 1 for
// bfloat16; tests ask for 2, without tiles, and 3, by float32. Returns 0, or 1 for want of memory.
template <class Pass>
int64_t dispatch(int64_t narrow, const Pass& pass) {
  try {
    if (!narrow) {
      pass(Vectors<Single>(), float());
#ifdef MOBA_AMX
    } else if (Tiled::able() && narrow == 1) {
      pass(Tiled(), Bfloat16());
#endif
#ifdef MOBA_PAIRS
    } else if (narrow <= 2) {
      pass(Vectors<Pairs>(), Bfloat16());
#endif
    } else {
      pass(Vectors<Single>(), Bfloat16());
    }
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

}  // namespace moba

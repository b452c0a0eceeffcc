#include "cpu/capability.h"

#include <cstdlib>
#include <cstring>

namespace psf {

static Capability detect() {
  Capability best = Capability::baseline;
#ifdef PSF_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v3")) best = Capability::v3;
  if (__builtin_cpu_supports("x86-64-v4")) best = Capability::v4;
#endif
  const char* asked = std::getenv("PANSHARP_FAST_CPU_CAPABILITY");
  if (asked == nullptr) return best;
  if (std::strcmp(asked, "baseline") == 0) return Capability::baseline;
  if (std::strcmp(asked, "v3") == 0 && best >= Capability::v3) return Capability::v3;
  return best;
}

Capability capability() {
  static const Capability chosen = detect();
  return chosen;
}

const char* capability_name() {
  switch (capability()) {
    case Capability::v4:
      return "v4";
    case Capability::v3:
      return "v3";
    default:
      return "baseline";
  }
}

}  // namespace psf

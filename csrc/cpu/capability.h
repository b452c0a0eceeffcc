// Run-time choice between the instruction sets that CMakeLists.txt compiles every *_kernel.cpp for.
//
// A kernel file is torch-free and lives in namespace psf::PSF_CAPABILITY; what it shares with the operator file is a
// function declared with PSF_DECLARE in its header. Kernel files must not include headers with inline functions of
// external linkage (containers, iostreams): the linker would keep one copy, possibly the one for the newest CPU.
#pragma once

namespace psf {

enum class Capability { baseline, v3, v4 };

// The best set that this CPU has, or PANSHARP_FAST_CPU_CAPABILITY (baseline, v3, v4) where that asks for less.
Capability capability();
const char* capability_name();

}  // namespace psf

#ifdef PSF_X86
#define PSF_DECLARE(result, name, ...) \
  namespace baseline {                 \
  result name(__VA_ARGS__);            \
  }                                    \
  namespace v3 {                       \
  result name(__VA_ARGS__);            \
  }                                    \
  namespace v4 {                       \
  result name(__VA_ARGS__);            \
  }
#define PSF_DISPATCH(name, ...)                                                  \
  (::psf::capability() == ::psf::Capability::v4   ? ::psf::v4::name(__VA_ARGS__) \
   : ::psf::capability() == ::psf::Capability::v3 ? ::psf::v3::name(__VA_ARGS__) \
                                                  : ::psf::baseline::name(__VA_ARGS__))
#else
#define PSF_DECLARE(result, name, ...) \
  namespace baseline {                 \
  result name(__VA_ARGS__);            \
  }
#define PSF_DISPATCH(name, ...) ::psf::baseline::name(__VA_ARGS__)
#endif

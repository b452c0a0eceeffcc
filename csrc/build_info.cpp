// Facts of the build: what `python -m pansharp_fast.info` prints and what a load failure is explained with.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_build_info, m) {
  m.doc() = "Facts of the build of pansharp_fast's compiled libraries.";
  m.attr("torch") = PSF_TORCH;
  m.attr("compiler") = PSF_COMPILER;
  m.attr("cxx_standard") = PSF_CXX_STANDARD;
  m.attr("cpu_capabilities") = PSF_CPU_CAPABILITIES;
  m.attr("cuda") = PSF_CUDA;
  m.attr("cuda_archs") = PSF_CUDA_ARCHS;
  m.attr("cuda_reason") = PSF_CUDA_REASON;
}

// dfkd_fast._C: what was built, and what its kernels take of a multiprocessor.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "launchers.h"

namespace py = pybind11;

namespace {

py::dict build() {
  std::vector<std::string> architectures;
  std::istringstream list(DFKD_ARCHITECTURES);
  for (std::string each; std::getline(list, each, ',');) architectures.push_back(each);
  py::dict found;
  found["toolkit"] = DFKD_TOOLKIT;
  found["architectures"] = architectures;
  found["commit"] = DFKD_COMMIT;
  return found;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "What the CUDA extension of dfkd_fast is made of.";
  module.def("build", &build, "Toolkit, architectures and commit of this build.");
}

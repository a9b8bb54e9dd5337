// The Python module cmaclip_fast._C: importing it registers the operators.

#include <Python.h>

#include "isa.h"
#include "tensors.h"

namespace cmaclip {

int64_t isa_number() {
  return static_cast<int64_t>(isa());
}

STABLE_TORCH_LIBRARY_FRAGMENT(cmaclip, m) {
  m.def("_isa() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(cmaclip, CompositeExplicitAutograd, m) {
  m.impl("_isa", TORCH_BOX(&isa_number));
}

}  // namespace cmaclip

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}

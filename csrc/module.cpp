// The Python module: empty, because loading the library registers the operators.
#include <Python.h>

#include <cstdlib>

namespace {

// Of Python 3.13. The headers of the limited API of 3.10 do not name them, and a Python before 3.13
// does not load a module that does: so the version decides when the module is loaded.
constexpr int kGilSlot = 4;                            // Py_mod_gil
void* const kGilNotUsed = reinterpret_cast<void*>(1);  // Py_MOD_GIL_NOT_USED
#ifdef Py_mod_gil
static_assert(kGilSlot == Py_mod_gil);
#endif

bool knows_gil_slot() {
  char* end = nullptr;
  const char* version = Py_GetVersion();  // "3.13.0 (main, ..."
  const long major = std::strtol(version, &end, 10);
  const long minor = *end == '.' ? std::strtol(end + 1, nullptr, 10) : 0;
  return major > 3 || (major == 3 && minor >= 13);
}

}  // namespace

/// The module holds no state, and operators may be called from any thread: a free-threaded Python
/// need not take its lock back for it.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef_Slot slots[] = {{knows_gil_slot() ? kGilSlot : 0, kGilNotUsed}, {0, nullptr}};
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, 0, nullptr, slots, nullptr, nullptr, nullptr};
  return PyModuleDef_Init(&definition);
}

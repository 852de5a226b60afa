#include <nanobind/nanobind.h>

NB_MODULE(_native, m) { m.doc() = "Compiled kernels and the decoder graph of minicpm."; }

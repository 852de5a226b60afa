// The parts of the Python module that have files of their own.
#pragma once

#include <nanobind/nanobind.h>

namespace minicpm::history {

void add_to(nanobind::module_& m);

}  // namespace minicpm::history

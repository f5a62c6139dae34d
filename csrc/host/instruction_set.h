// Choice of the instruction set whose CPU kernels run.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace mvsplit {

// Return the kernels of the instruction set in use.
const Kernels& kernels();

// Return the names of the instruction sets that were compiled in and that this processor runs.
std::vector<std::string> capabilities();

// Return the name of the instruction set in use.
std::string capability();

// Use another of capabilities(), for example in a test. Throws ValueError for any other name.
void set_capability(const std::string& name);

}  // namespace mvsplit

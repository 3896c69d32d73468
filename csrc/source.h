// What a user's rule is compiled from, and how: the headers and the flags of this very build, as CMakeLists.txt has them.
#pragma once

#include <map>
#include <string>

namespace fusedopt {

// Their text, by file name.
std::map<std::string, std::string> kernel_headers();

// By instruction set, apart by spaces.
std::map<std::string, std::string> kernel_flags();

}  // namespace fusedopt

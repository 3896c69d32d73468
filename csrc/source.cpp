#include "source.h"

namespace fusedopt {

std::map<std::string, std::string> kernel_headers() {
  return {
#include "kernel_headers.inc"
  };
}

std::map<std::string, std::string> kernel_flags() {
  return {
#include "kernel_flags.inc"
  };
}

}  // namespace fusedopt

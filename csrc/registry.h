// The rules that have kernels: those of rules.h, and rules of users, compiled when first used.
#pragma once

#include <string>

#include "step.h"

namespace fusedopt {

struct RuleInfo {
  std::string name;
  int states, scalars;
};

// The number of a rule of rules.h; -1 where there is none.
int find_rule(const std::string& name);

// A user's rule, as the numbers that follow. Its kernels are never unloaded.
int add_rule(RuleInfo info, UpdateRange in_float32, UpdateRange in_float64);

int rule_count();
const RuleInfo& rule_info(int rule);
UpdateRange update_kernel(int rule, bool is_double);

// The kernels of rules.h in use: the machine's best unless another was asked for.
const Kernels* kernels();
bool use_kernels(const std::string& name);

}  // namespace fusedopt

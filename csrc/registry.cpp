#include "registry.h"

#include <deque>

#include "cpu/threads.h"

namespace fusedopt {
namespace {

#define FUSEDOPT_INFO(RULE) RuleInfo{RULE::name, RULE::states, RULE::scalars},
const RuleInfo built_in[] = {FUSEDOPT_RULES(FUSEDOPT_INFO)};
constexpr int built_in_count = int(std::size(built_in));

struct Added {
  RuleInfo info;
  UpdateRange in_float32, in_float64;
};
std::deque<Added> added;  // references stay valid; changed with the GIL held

const Kernels* selected = nullptr;

}  // namespace

int find_rule(const std::string& name) {
  for (int i = 0; i < built_in_count; ++i)
    if (name == built_in[i].name) return i;
  return -1;
}

int add_rule(RuleInfo info, UpdateRange in_float32, UpdateRange in_float64) {
  added.push_back({std::move(info), in_float32, in_float64});
  return rule_count() - 1;
}

int rule_count() { return built_in_count + int(added.size()); }

const RuleInfo& rule_info(int rule) {
  return rule < built_in_count ? built_in[rule] : added[size_t(rule - built_in_count)].info;
}

UpdateRange update_kernel(int rule, bool is_double) {
  if (rule < built_in_count) return (is_double ? kernels()->in_float64 : kernels()->in_float32)[rule];
  const Added& own = added[size_t(rule - built_in_count)];
  return is_double ? own.in_float64 : own.in_float32;
}

const Kernels* kernels() { return selected ? selected : available_kernels()[0]; }

bool use_kernels(const std::string& name) {
  for (auto* known = available_kernels(); *known; ++known)
    if (name == (*known)->name) {
      selected = *known;
      return true;
    }
  return false;
}

}  // namespace fusedopt

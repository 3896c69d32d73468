#include "launch.h"

#include <algorithm>

namespace fusedopt {

bool LaunchForm::serves(const LaunchForm& other) const {
  return device == other.device && rule == other.rule && states == other.states && param == other.param &&
         grad == other.grad && std::equal(state, state + states, other.state) && has_master == other.has_master &&
         (!has_master || master == other.master) && stochastic == other.stochastic && captured == other.captured &&
         zero_grad == other.zero_grad && aligned == other.aligned && dims == other.dims;
}

void Launches::begin() {
  used_.clear();
  for (Open& open : open_) {
    open.table.clear();
    open.scalars.clear();
    open.row_of.clear();
    open.launch.parameters.clear();
    open.tiles = 0;
  }
}

void Launches::add(const LaunchForm& form, int64_t numel, uint64_t key, const std::vector<int64_t>& words,
                   int parameter, int scalars, const std::vector<double>& values, double grad_scale) {
  const auto found = std::find_if(open_.begin(), open_.end(),
                                  [&](const Open& open) { return open.launch.form.serves(form); });
  const auto place = int(found - open_.begin());
  if (found == open_.end()) open_.emplace_back().launch.form = form;
  Open& open = open_[size_t(place)];
  Launch& launch = open.launch;
  if (launch.parameters.empty()) used_.push_back(place);
  auto row = int(launch.parameters.size());  // captured scalars have a row for each tensor
  if (!form.captured) {
    if (open.row_of.size() <= size_t(scalars)) open.row_of.resize(size_t(scalars) + 1, -1);
    int& known = open.row_of[size_t(scalars)];
    if (known < 0) {
      known = int(open.scalars.size() / (values.size() + 1));
      open.scalars.insert(open.scalars.end(), values.begin(), values.end());
      open.scalars.push_back(grad_scale);
    }
    row = known;
  }
  open.table.insert(open.table.end(), {numel, row, int64_t(key), open.tiles});
  open.table.insert(open.table.end(), words.begin(), words.end());
  open.tiles += (numel + tile_size - 1) / tile_size;
  launch.parameters.push_back(parameter);
}

void Launches::end() {
  for (const int place : used_) {
    Open& open = open_[size_t(place)];
    Launch& launch = open.launch;
    const auto width = size_t(launch.form.width());
    // Tiles follow from the numbers of elements.
    launch.new_tiles = open.table.size() != launch.table.size();
    for (size_t at = 0; at < open.table.size() && !launch.new_tiles; at += width)
      launch.new_tiles = open.table[at] != launch.table[at];
    launch.new_table = open.table != launch.table;
    launch.new_scalars = open.scalars != launch.scalars;
    launch.table.swap(open.table);
    launch.scalars.swap(open.scalars);
    if (!launch.new_tiles) continue;
    launch.tiles.clear();
    for (size_t at = 0; at < launch.table.size(); at += width) {
      const int64_t tiles = (launch.table[at] + tile_size - 1) / tile_size;
      launch.tiles.insert(launch.tiles.end(), size_t(tiles), int32_t(at / width));
    }
  }
}

std::vector<int64_t> joint_walk(const std::vector<int64_t>& shape, const std::vector<const int64_t*>& strides,
                                const std::vector<int>& order, bool is_complex, int& dims) {
  const int64_t parts = is_complex ? 2 : 1;
  std::vector<int64_t> sizes;
  std::vector<std::vector<int64_t>> walked(strides.size());
  const auto append = [&](int64_t size, const auto& stride) {
    if (size == 1) return;
    bool merges = !sizes.empty();
    for (size_t i = 0; i < strides.size() && merges; ++i) merges = walked[i].back() == stride(i) * size;
    if (merges)
      sizes.back() *= size;
    else
      sizes.push_back(size);
    for (size_t i = 0; i < strides.size(); ++i) {
      if (merges) walked[i].pop_back();
      walked[i].push_back(stride(i));
    }
  };
  for (const int d : order) append(shape[size_t(d)], [&](size_t i) { return strides[i] ? strides[i][d] * parts : 0; });
  append(parts, [&](size_t i) { return int64_t(strides[i] != nullptr); });
  bool in_one_piece = sizes.size() <= 1;
  for (size_t i = 0; i < strides.size() && in_one_piece; ++i)
    in_one_piece = !strides[i] || sizes.empty() || walked[i][0] == 1;
  dims = in_one_piece ? 0 : int(sizes.size());
  if (in_one_piece) return {};
  std::vector<int64_t> words = sizes;
  for (const auto& each : walked) words.insert(words.end(), each.begin(), each.end());
  return words;
}

}  // namespace fusedopt

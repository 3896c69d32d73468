// The matrix product of one tile. Instruction sets differ in bits here, as some fuse multiplications and additions. But
// in each of them an element is one sum in one order, however the result is cut into tiles.
#pragma once

#include "matmul_pack.h"

namespace fusedopt {
namespace {

// Rows, and registers of columns, whose sums stay in registers beside a row of B and an element of A.
#if defined(__AVX512F__)
constexpr int kernel_rows = 14;
#elif defined(__aarch64__)
constexpr int kernel_rows = 8;
#else
constexpr int kernel_rows = 6;
#endif
constexpr int kernel_vectors = 2, kernel_columns = kernel_vectors * lanes;

// From one word of a packed panel of A to the next.
constexpr int packed_rows = lanes == 16 ? 16 : 8;

// Rows of a symmetric result that are mirrored at a time: few enough to be in the cache still, but some lines of it.
constexpr int mirrored_rows = 64;

constexpr int line = 64 / sizeof(float);  // of the cache, in elements

static_assert(kernel_rows <= packed_rows && packed_rows % lanes == 0 && packed_rows <= matmul_rows, "");
static_assert(matmul_columns % kernel_columns == 0, "");

// sums = the product of a panel of A and one of B, of `rows` x (vectors * lanes).
template <class Format, int rows, int vectors>
void multiply_panels(int64_t words, const float* a, const float* b, float* sums) {
  FloatVector sum[rows][vectors] = {};
  for (int64_t word = 0; word < words; ++word, a += packed_rows, b += kernel_columns) {
    FloatVector right[vectors];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) right[v] = load(b + v * lanes);
#pragma GCC unroll 14
    for (int row = 0; row < rows; ++row) {
      const FloatVector left = broadcast(a[row], every_lane);
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) sum[row][v] = Format::add_product(left, right[v], sum[row][v]);
    }
  }
#pragma GCC unroll 14
  for (int row = 0; row < rows; ++row)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) store(sum[row][v], sums + row * kernel_columns + v * lanes);
}

using MultiplyPanels = void (*)(int64_t words, const float* a, const float* b, float* sums);

template <class Format, int vectors, int... rows>
MultiplyPanels panel_kernel(int64_t count, std::integer_sequence<int, rows...>) {
  constexpr MultiplyPanels kernels[] = {multiply_panels<Format, rows + 1, vectors>...};
  return kernels[count - 1];
}

template <class Format>
MultiplyPanels panel_kernel(int64_t rows, int64_t columns) {
  constexpr auto every = std::make_integer_sequence<int, kernel_rows>();
  return columns > lanes ? panel_kernel<Format, 2>(rows, every) : panel_kernel<Format, 1>(rows, every);
}

// Brings a panel's sums into the result: with C the first ones, then added.
inline void add_sums(const Matmul& of, int64_t batch, const MatmulTile& tile, const float* sums, bool first) {
  const FloatVector alpha = broadcast(of.alpha, every_lane), beta = broadcast(of.beta, every_lane);
  for (int64_t r = 0; r < tile.rows; ++r, sums += kernel_columns) {
    const int64_t row = tile.row + r, start = of.symmetric && row > tile.column ? row - tile.column : 0;
    float* out = of.out_at(batch, row, tile.column);
    const float* c = of.c.data ? of.c.at(batch, row, tile.column) : nullptr;
    float gathered[kernel_columns];
    if (first && c && of.c.column_stride != 1) {
      for (int64_t i = start; i < tile.columns; ++i) gathered[i] = c[i * of.c.column_stride];
      c = gathered;
    }
    for (int64_t i = start / lanes * lanes; i < tile.columns; i += lanes) {
      const int64_t begin = start < i ? 0 : start - i, end = tile.columns - i < lanes ? tile.columns - i : lanes;
      const auto read = [&](const float* x) { return load_part(x + i, begin, end); };
      const FloatVector sum = load(sums + i);
      const FloatVector value = !first ? multiply_add(beta, sum, read(out))
                                : c    ? multiply_add(beta, sum, alpha * read(c))
                                       : beta * sum;
      store_part(value, begin, end, out + i);
    }
  }
}

// Copies what a tile has above the diagonal to below it.
inline void mirror(const Matmul& of, int64_t batch, const MatmulTile& tile) {
  const int64_t stride = of.out_row_stride, last_row = tile.row + tile.rows, last_column = tile.column + tile.columns;
  for (int64_t column = tile.column; column < last_column; column += lanes) {
    const int64_t columns = last_column - column < lanes ? last_column - column : lanes;
    for (int64_t row = tile.row; row < last_row && row < column + columns; row += lanes) {
      const int64_t rows = last_row - row < lanes ? last_row - row : lanes;
      const float* from = of.out_at(batch, row, column);
      float* to = of.out_at(batch, column, row);
      FloatVector values[lanes];
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) {
        const int64_t start = row + i - column, begin = start < 0 ? 0 : start;
        values[i] = i < rows && begin < columns ? load_part(from + i * stride, begin, columns) : FloatVector{};
      }
      transpose(values);
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) {
        const int64_t above = column + i - row, end = above < rows ? above : rows;
        if (i < columns && end > 0) store_part(values[i], 0, end, to + i * stride);
      }
    }
  }
}

template <class Format>
void matmul_tile(const Matmul& of, int64_t batch, const MatmulTile& tile, float* workspace) {
  float* left = workspace;
  float* right = workspace + matmul_depth * packed_rows;
  alignas(64) float sums[kernel_rows * kernel_columns];
  const int64_t panels = (tile.rows + kernel_rows - 1) / kernel_rows;
  int64_t k = 0, mirrored = 0;
  do {  // once even where the inner dimension is empty, and the operands have no memory
    const int64_t rest = of.inner - k, most = matmul_depth * Format::inner, inner = rest < most ? rest : most;
    const int64_t words = (inner + Format::inner - 1) / Format::inner;
    if (inner > 0)
      pack<Format>(of.b.at(batch, k, tile.column), of.b.column_stride, of.b.row_stride, tile.columns,
                   of.columns - tile.column, inner, kernel_columns, right);
    for (int64_t panel = 0; panel < panels; ++panel) {
      // Panels of about the same height: a last one of few rows would leave the arithmetic units waiting for sums.
      MatmulTile part;
      part.row = tile.row + tile.rows * panel / panels;
      part.rows = tile.row + tile.rows * (panel + 1) / panels - part.row;
      if (inner > 0)
        pack<Format>(of.a.at(batch, part.row, k), of.a.row_stride, of.a.column_stride, part.rows, of.rows - part.row,
                     inner, packed_rows, left);
      for (int64_t column = 0; column < tile.columns; column += kernel_columns) {
        part.column = tile.column + column;
        part.columns = tile.columns - column < kernel_columns ? tile.columns - column : kernel_columns;
        if (of.symmetric && part.column + part.columns <= part.row) continue;
        for (int64_t row = part.row; row < part.row + part.rows; ++row)
          for (int64_t i = 0; i < part.columns; i += line)
            __builtin_prefetch(of.out_at(batch, row, part.column + i), 1);
        panel_kernel<Format>(part.rows, part.columns)(words, left, right + column * words, sums);
        add_sums(of, batch, part, sums, k == 0);
      }
      if (of.symmetric && k + inner == of.inner) {
        const int64_t done = part.row + part.rows - tile.row;
        if (panel + 1 == panels || done - mirrored >= mirrored_rows) {
          const int64_t end = panel + 1 == panels ? done : done / lanes * lanes;
          mirror(of, batch, {tile.row + mirrored, end - mirrored, tile.column, tile.columns});
          mirrored = end;
        }
      }
    }
    k += inner;
  } while (k < of.inner);
}

}  // namespace
}  // namespace fusedopt

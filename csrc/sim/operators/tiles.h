// SPDX-License-Identifier: Apache-2.0
//
// FRACTAL_NZ: the matrices of a tensor in tiles of 16 rows by `width` columns, column by column.
// Sizes [..., rows, columns] are stored as [..., ceil(columns / width), ceil(rows / 16), 16,
// width].
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>

namespace sim {

class Tiling {
 public:
  // `stored` are the sizes in memory. Empty if they are not the tiles of the tensor's sizes.
  template <typename Sizes, typename Stored>
  static std::optional<Tiling> of(const Sizes& sizes, const Stored& stored, size_t unit) {
    Tiling tiling;
    const size_t dimensions = sizes.size();
    if (stored.size() < 4) return std::nullopt;
    tiling.rows_ = dimensions == 0 ? 1 : size(sizes, dimensions < 2 ? 0 : dimensions - 2);
    tiling.columns_ = dimensions < 2 ? 1 : size(sizes, dimensions - 1);
    tiling.width_ = size(stored, stored.size() - 1);
    tiling.unit_ = unit;
    for (size_t i = 0; i + 2 < dimensions; ++i) tiling.matrices_ *= size(sizes, i);
    size_t elements = 1;
    for (size_t i = 0; i < stored.size(); ++i) elements *= size(stored, i);
    if (tiling.width_ == 0 || elements * unit != tiling.tiled_bytes()) return std::nullopt;
    return tiling;
  }

  size_t bytes() const { return matrices_ * rows_ * columns_ * unit_; }
  size_t tiled_bytes() const { return matrices_ * across() * down() * kRows * width_ * unit_; }

  // Zeros in tiles outside the matrix.
  void tile(const char* plain, char* tiled) const {
    std::memset(tiled, 0, tiled_bytes());
    each_run([&](size_t in_plain, size_t in_tiled, size_t bytes) {
      std::memcpy(tiled + in_tiled, plain + in_plain, bytes);
    });
  }

  void untile(const char* tiled, char* plain) const {
    each_run([&](size_t in_plain, size_t in_tiled, size_t bytes) {
      std::memcpy(plain + in_plain, tiled + in_tiled, bytes);
    });
  }

 private:
  static constexpr size_t kRows = 16;

  template <typename Sizes>
  static size_t size(const Sizes& sizes, size_t dimension) {
    return static_cast<size_t>(sizes[dimension]);
  }

  size_t across() const { return (columns_ + width_ - 1) / width_; }
  size_t down() const { return (rows_ + kRows - 1) / kRows; }

  // What is contiguous in both layouts: one row of one tile.
  template <typename Move>
  void each_run(Move move) const {
    const size_t padded_rows = down() * kRows;
    for (size_t matrix = 0; matrix < matrices_; ++matrix) {
      for (size_t x = 0; x < across(); ++x) {
        const size_t run = std::min(width_, columns_ - x * width_) * unit_;
        for (size_t row = 0; row < rows_; ++row) {
          const size_t plain = ((matrix * rows_ + row) * columns_ + x * width_) * unit_;
          const size_t tiled = ((matrix * across() + x) * padded_rows + row) * width_ * unit_;
          move(plain, tiled, run);
        }
      }
    }
  }

  size_t matrices_ = 1;
  size_t rows_ = 0;
  size_t columns_ = 0;
  size_t width_ = 0;
  size_t unit_ = 0;
};

}  // namespace sim

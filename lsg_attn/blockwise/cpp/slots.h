// What makes compressed keys: the hash that sends tokens to slots, and sums of rows.
#pragma once

#include <ATen/native/CPUBlas.h>

#include "windows.h"

namespace lsg {

inline Floats load_floats(const float* x) {
  return load<Floats>(x);
}

inline Floats load_floats(const at::BFloat16* x) {
  return (Floats)(widen(x) << 16);
}

// out += row * weight.
template <typename T>
void add_scaled(const T* row, float weight, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(load<Floats>(out + i) + load_floats(row + i) * weight, out + i);
  for (; i < count; ++i) out[i] += row[i] * weight;
}

// Hashes the tokens of one chunk and head at a time, in the memory of one thread.
template <typename T>
class Hash {
 public:
  // key: (key heads, T, head_dim), each read by ``group`` heads; directions: of each round (heads, head_dim,
  // buckets / 2) float32, contiguous.
  Hash(const Tensor& key, const std::optional<Tensor>& keep, const std::vector<Tensor>& directions,
       at::IntArrayRef buckets, int64_t chunk, int64_t group)
      : key_(key), keep_(keep), directions_(directions), buckets_(buckets), chunk_(chunk), group_(group),
        width_(key.size(2)) {
    int64_t ld = kLanes;
    for (const Tensor& x : directions) ld = std::max(ld, round_up(x.size(2), kLanes));
    for (float** rows : {&rows_, &sums_}) *rows = scratch_.take<float>(chunk * width_);
    products_ = scratch_.take<float>(chunk * ld);
    bucket_.resize(chunk);
  }

  // Writes the slots of the tokens [first, first + chunk), fewer at the end. The chunk's slots start at ``first_slot``.
  void find_slots(int64_t head, int64_t first, int64_t first_slot, int64_t* slot) {
    const int64_t count = std::min(chunk_, key_.size(1) - first);
    load_rows(head, first, count);
    int64_t rows = count;  // those past the end would be 0, and change no sum
    for (size_t round = 0; round < buckets_.size(); ++round) {
      hash_rows(directions_[round], head, rows);
      for (int64_t i = 0; i < count; ++i) slot[i] = round == 0 ? bucket_[i] : bucket_[slot[i]];
      if (round + 1 == buckets_.size()) break;
      std::fill_n(sums_, buckets_[round] * width_, 0.0f);
      for (int64_t i = 0; i < rows; ++i) add_scaled(rows_ + i * width_, 1, width_, sums_ + bucket_[i] * width_);
      std::swap(rows_, sums_);
      rows = buckets_[round];
    }
    for (int64_t i = 0; i < count; ++i) slot[i] += first_slot;
  }

 private:
  void load_rows(int64_t head, int64_t first, int64_t count) {
    const T* key = key_.const_data_ptr<T>() + head / group_ * key_.stride(0) + first * key_.stride(1);
    const bool* keep = keep_ ? keep_->const_data_ptr<bool>() + first : nullptr;
    std::fill_n(rows_, count * width_, 0.0f);
    for (int64_t i = 0; i < count; ++i)
      if (!keep || keep[i]) add_scaled(key + i * key_.stride(1), 1, width_, rows_ + i * width_);
  }

  // The bucket of each row: the argmax of [p, -p], where p are its products with the directions.
  void hash_rows(const Tensor& directions, int64_t head, int64_t rows) {
    const int64_t half = directions.size(2), ld = round_up(half, kLanes);
    if (half == 0) {
      std::fill_n(bucket_.begin(), rows, 0);
      return;
    }
    at::native::cpublas::brgemm(
        rows, half, width_, width_, half, ld, false, rows_,
        directions.const_data_ptr<float>() + head * width_ * half, products_);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t largest = largest_of(products_ + r * ld, half);
      bucket_[r] = largest + (products_[r * ld + largest] < 0 ? half : 0);
    }
  }

  // The first index of the largest magnitude.
  static int64_t largest_of(const float* x, int64_t count) {
    Floats most = Floats{} - 1;
    Ints where = {};
    for (int64_t i = 0; i < count; i += kLanes) {
      const Ints index = kIota + (int32_t)i;
      const Floats magnitude = (Floats)(load<Ints>(x + i) & 0x7fffffff);
      const Ints is_more = (index < (int32_t)count) & (magnitude > most);
      most = is_more ? magnitude : most;
      where = is_more ? index : where;
    }
    int best = 0;
    for (int i = 1; i < kLanes; ++i)
      if (most[i] > most[best] || (most[i] == most[best] && where[i] < where[best])) best = i;
    return where[best];
  }

  const Tensor& key_;
  const std::optional<Tensor>& keep_;
  const std::vector<Tensor>& directions_;
  const at::IntArrayRef buckets_;
  const int64_t chunk_, group_, width_;
  Scratch scratch_;
  float *rows_, *sums_, *products_;
  std::vector<int64_t> bucket_;
};

}  // namespace lsg

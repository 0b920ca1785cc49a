// The forward of one block of queries, in the memory of one thread.
#pragma once

#include <ATen/native/CPUBlas.h>

#include <cmath>

#include "windows.h"

namespace lsg {

// Scores are (queries, keys), float32. Keys are a right factor (head_dim, keys), values one (keys, head_dim).
template <typename T>
class Forward {
 public:
  Forward(const Inputs& in, const Sizes& most, Tensor& out, Tensor& lse)
      : in_(in), out_(out), lse_(lse), width_(in.head_dim()), scale_((float)in.scale * kLog2e) {
    const int64_t queries = most.queries, ld = stride_of(most.keys);
    query_ = scratch_.take<T>(queries * width_);
    key_ = scratch_.take<float>(width_ / kPerWord<T> * ld);
    value_ = scratch_.take<T>(ld * width_);
    scores_ = scratch_.take<float>(queries * ld);
    sums_ = scratch_.take<float>(queries * width_);
    max_ = scratch_.take<float>(queries);
    sum_ = scratch_.take<float>(queries);
    first_query_ = scratch_.take<int32_t>(ld);
  }

  // Writes the output of a block and the log-sum-exp of its scores.
  void attend(int64_t head, const Block& block) {
    const int64_t count = block.stop - block.start;
    const Sources<T> from = in_.sources<T>(head);
    const T* query = in_.query.const_data_ptr<T>() + head * in_.query.stride(0) + block.start * in_.query.stride(1);
    for (int64_t r = 0; r < count; ++r) std::copy_n(query + r * in_.query.stride(1), width_, query_ + r * width_);
    std::fill_n(max_, count, kLowest);
    std::fill_n(sum_, count, 0.0f);
    bool is_first = true;
    const std::vector<Run> runs = in_.runs(block);
    const Piece next = in_.rows_after(runs, block);
    if (runs.empty()) std::fill_n(sums_, count * width_, 0.0f);
    for (const Run& run : runs) {
      const int64_t ld = stride_of(run.keys);
      gather(from, run, ld);
      at::native::cpublas::brgemm(
          count, run.keys, width_, width_, ld, ld, false, query_, reinterpret_cast<const T*>(key_), scores_);
      const bool sees_all = in_.find_first_queries(from, run, block, first_query_);
      for (int64_t r = 0; r < count; ++r) {
        const float factor = exponentiate(r, block.start + r, run.keys, ld, sees_all);
        if (!is_first) write_scaled(sums_ + r * width_, factor, width_, sums_ + r * width_);
        if (is_first && r < next.size) {  // between, so that they come while something else is done
          prefetch_row(from[0].key + (next.start + r) * from[0].key_stride, width_);
          prefetch_row(from[0].value + (next.start + r) * from[0].value_stride, width_);
        }
      }
      at::native::cpublas::brgemm(
          count, width_, round_up(run.keys, kPerWord<T>), ld * kPerWord<T>, width_, width_, !is_first,
          reinterpret_cast<const T*>(scores_), value_, sums_);
      is_first = false;
    }
    T* out = out_.mutable_data_ptr<T>() + head * out_.stride(0) + block.start * out_.stride(1);
    float* lse = lse_.mutable_data_ptr<float>() + head * lse_.stride(0) + block.start;
    for (int64_t r = 0; r < count; ++r) {
      const bool sees_nothing = sum_[r] == 0;
      write_scaled(sums_ + r * width_, sees_nothing ? 0 : 1 / sum_[r], width_, out + r * out_.stride(1));
      lse[r] = sees_nothing ? kInfinity : (max_[r] + std::log2(sum_[r])) / kLog2e;
    }
  }

 private:
  void gather(const Sources<T>& from, const Run& run, int64_t ld) {
    transpose_keys(from, run, width_, key_, ld);
    for (const Piece& piece : run.pieces) {
      const Source<T>& x = from[piece.source];
      pack_rows(x.value + piece.start * x.value_stride, x.value_stride, piece.first, piece.size, width_, value_);
    }
    if (run.keys % kPerWord<T>)  // the last pair has one row
      for (int64_t c = 0; c < width_; ++c) value_[(run.keys - 1) * width_ + 2 * c + 1] = 0;
  }

  // Turns a row of scores into powers of two less than or equal to 1, in T and in place, 0 where a key is not visible.
  // Updates the row's maximum and sum, and returns what earlier powers and their sum are to be multiplied by.
  float exponentiate(int64_t r, int64_t query, int64_t keys, int64_t ld, bool sees_all) {
    float* scores = scores_ + r * ld;
    T* powers = reinterpret_cast<T*>(scores);  // never ahead of what is read
    const int64_t plain = sees_all ? keys / kLanes * kLanes : 0;
    const auto is_seen = [&](int64_t i) { return load<Ints>(first_query_ + i) <= (int32_t)query; };
    const auto raise = [&](Floats& most, int64_t i, bool is_plain) {
      const Floats x = load<Floats>(scores + i) * scale_;
      most = is_plain ? max(most, x) : is_seen(i) & (x > most) ? x : most;
    };
    Floats most = Floats{} + max_[r], other = most;  // two chains: each waits for itself
    int64_t start = 0;
    for (; start + 2 * kLanes <= plain; start += 2 * kLanes) {
      raise(most, start, true);
      raise(other, start + kLanes, true);
    }
    for (; start < plain; start += kLanes) raise(most, start, true);
    for (; start + kLanes < keys; start += 2 * kLanes) {
      raise(most, start, false);
      raise(other, start + kLanes, false);
    }
    if (start < keys) raise(most, start, false);
    most = max(most, other);
    const float shift = max_of(most);
    Floats sum = {};
    for (int64_t i = 0; i < plain; i += kLanes) {
      const Floats power = exp2(load<Floats>(scores + i) * scale_ - shift);
      sum += power;
      narrow(power, powers + i);
    }
    for (int64_t i = plain; i < keys; i += kLanes) {
      const Floats power = is_seen(i) ? exp2(load<Floats>(scores + i) * scale_ - shift) : Floats{};
      sum += power;
      narrow(power, powers + i);
    }
    const float factor = exp2(max_[r] - shift);
    max_[r] = shift;
    sum_[r] = sum_[r] * factor + sum_of(sum);
    return factor;
  }

  const Inputs& in_;
  Tensor &out_, &lse_;
  const int64_t width_;
  const float scale_;
  Scratch scratch_;
  T *query_, *value_;
  float *key_, *scores_, *sums_, *max_, *sum_;
  int32_t* first_query_;
};

}  // namespace lsg

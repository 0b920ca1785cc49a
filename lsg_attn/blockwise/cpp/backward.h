// The backward of one block of queries, in the memory of one thread.
#pragma once

#include <ATen/native/CPUBlas.h>

#include "windows.h"

namespace lsg {

// Scores are (keys, queries), float32: keys and values are then left factors as they lie in memory, and so are the
// probabilities and the gradients of scores, for what values and keys get. Queries are padded to a multiple of kLanes.
template <typename T>
class Backward {
 public:
  Backward(const Inputs& in, const Sizes& most, const Gradients& grads)
      : in_(in), grads_(grads), width_(in.head_dim()), scale_((float)in.scale) {
    const int64_t padded = round_up(most.queries, kLanes), ld = stride_of(most.keys);
    for (Side* side : {&query_, &dout_}) {
      side->rows = scratch_.take<T>(padded * width_);
      side->columns = scratch_.take<float>(width_ / kPerWord<T> * padded);
    }
    probs_ = scratch_.take<float>(ld * padded);
    dprobs_ = scratch_.take<float>(ld * padded);
    key_words_ = scratch_.take<float>(width_ / kPerWord<T> * ld);
    if constexpr (kPerWord<T> == 1) {
      dscores_ = dprobs_;
      key_ = key_words_;
    } else {
      dscores_ = scratch_.take<T>(ld * padded);
      key_ = scratch_.take<T>(width_ * ld);
    }
    dquery_ = scratch_.take<float>(width_ * padded);
    dquery_rows_ = scratch_.take<float>(padded * width_);
    for (float** x : {&lse_, &sum_, &inverse_, &delta_}) *x = scratch_.take<float>(padded);
    first_query_ = scratch_.take<int32_t>(ld);
  }

  // Writes the gradient of a block's queries, and adds to those of its keys and values.
  void differentiate(int64_t head, int64_t group, const Block& block) {
    const int64_t count = block.stop - block.start;
    padded_ = round_up(count, kLanes);
    from_ = in_.sources<T>(head);
    load_side(in_.query, head, block, query_);
    load_side(grads_.dout, head, block, dout_);
    const float* lse = grads_.lse.const_data_ptr<float>() + head * grads_.lse.stride(0) + block.start;
    for (int64_t r = 0; r < padded_; ++r) lse_[r] = r < count ? lse[r] * kLog2e : kInfinity;
    std::fill_n(sum_, padded_, 0.0f);
    std::fill_n(delta_, padded_, 0.0f);
    const std::vector<Run> runs = in_.runs(block);
    for (const Run& run : runs) {
      find_probs(run, block);
      add_sums(run.keys);
    }
    const auto& dlse = grads_.dlse;
    const float* given = dlse ? dlse->const_data_ptr<float>() + head * dlse->stride(0) + block.start : nullptr;
    for (int64_t r = 0; r < padded_; ++r) {
      inverse_[r] = sum_[r] == 0 ? 0 : 1 / sum_[r];
      delta_[r] = delta_[r] * inverse_[r] - (given && r < count ? given[r] : 0);
    }
    bool is_first = true;
    if (runs.empty()) std::fill_n(dquery_, width_ * padded_, 0.0f);
    for (const Run& run : runs) {
      if (runs.size() > 1) find_probs(run, block);  // else they are still there
      differentiate_scores(run.keys);
      add_rows(run, head, group);
      multiply_keys(run, is_first);
      is_first = false;
    }
    transpose_words(dquery_, padded_, width_, padded_, dquery_rows_, width_);
    const Tensor& dquery = grads_.dquery;
    T* out = dquery.mutable_data_ptr<T>() + head * dquery.stride(0) + block.start * dquery.stride(1);
    for (int64_t r = 0; r < count; ++r) write_scaled(dquery_rows_ + r * width_, 1, width_, out + r * dquery.stride(1));
  }

 private:
  struct Side {
    T* rows;         // a right factor (queries, head_dim)
    float* columns;  // a right factor (head_dim, queries)
  };

  void load_side(const Tensor& x, int64_t head, const Block& block, const Side& out) {
    const int64_t count = block.stop - block.start;
    const T* rows = x.const_data_ptr<T>() + head * x.stride(0) + block.start * x.stride(1);
    if (count < padded_) {
      std::fill_n(out.rows, padded_ * width_, T(0));
      std::fill_n(out.columns, width_ / kPerWord<T> * padded_, 0.0f);
    }
    pack_rows(rows, x.stride(1), 0, count, width_, out.rows);
    transpose_words(rows, x.stride(1), count, width_, out.columns, padded_);
  }

  // Probabilities, and what they get from dout; both 0 where a key is not visible.
  void find_probs(const Run& run, const Block& block) {
    for (const Piece& piece : run.pieces) {
      const auto multiply = [&](const T* rows, int64_t stride, const Side& side, float* out) {
        at::native::cpublas::brgemm(
            piece.size, padded_, width_, stride, padded_, padded_, false, rows + piece.start * stride,
            reinterpret_cast<const T*>(side.columns), out + piece.first * padded_);
      };
      const Source<T>& x = from_[piece.source];
      multiply(x.key, x.key_stride, query_, probs_);
      multiply(x.value, x.value_stride, dout_, dprobs_);
    }
    in_.find_first_queries(from_, run, block, first_query_);
    for (int64_t n = 0; n < run.keys; ++n)
      for (int64_t i = 0; i < padded_; i += kLanes) {
        float *prob = probs_ + n * padded_ + i, *dprob = dprobs_ + n * padded_ + i;
        const Ints is_seen = (int32_t)(block.start + i) + kIota >= first_query_[n];
        const Floats power = exp2(load<Floats>(prob) * (scale_ * kLog2e) - load<Floats>(lse_ + i));
        store(is_seen ? power : Floats{}, prob);
        store(is_seen ? load<Floats>(dprob) : Floats{}, dprob);
      }
  }

  // Of each query the sum of probs, which is 1 but for the rounding of lse, and delta, that of probs * dprobs.
  void add_sums(int64_t keys) {
    for (int64_t i = 0; i < padded_; i += kLanes) {
      Floats sum = load<Floats>(sum_ + i), delta = load<Floats>(delta_ + i);
      for (int64_t n = 0; n < keys; ++n) {
        const Floats prob = load<Floats>(probs_ + n * padded_ + i);
        sum += prob;
        delta += prob * load<Floats>(dprobs_ + n * padded_ + i);
      }
      store(sum, sum_ + i);
      store(delta, delta_ + i);
    }
  }

  // Divides probs by their sum, turns dprobs into gradients of scores, probs * (dprobs - delta) * scale, and both into T
  // in place. The gradients also go to dscores, as a right factor.
  void differentiate_scores(int64_t keys) {
    const auto differentiate_row = [&](int64_t n, int64_t i) {
      const Floats prob = load<Floats>(probs_ + n * padded_ + i) * load<Floats>(inverse_ + i);
      const Floats dprob = load<Floats>(dprobs_ + n * padded_ + i);
      const Floats dscore = prob * (dprob - load<Floats>(delta_ + i)) * scale_;
      narrow(prob, row_of(probs_, n) + i);  // never ahead of what is read
      narrow(dscore, row_of(dprobs_, n) + i);
      return dscore;
    };
    for (int64_t n = 0; n < keys; n += 2)
      for (int64_t i = 0; i < padded_; i += kLanes) {
        const Floats low = differentiate_row(n, i), high = n + 1 < keys ? differentiate_row(n + 1, i) : Floats{};
        if constexpr (kPerWord<T> == 2)
          store(pair(round_bfloat16(low) >> 16, round_bfloat16(high) >> 16), dscores_ + n * padded_ + 2 * i);
      }
  }

  // Row n of scores in T, which starts where that of float32 does.
  T* row_of(float* scores, int64_t n) const { return reinterpret_cast<T*>(scores + n * padded_); }

  // What keys and values get from the block.
  void add_rows(const Run& run, int64_t head, int64_t group) {
    for (const Piece& piece : run.pieces) {
      const auto add = [&](float* scores, const Side& side, int64_t which) {
        at::native::cpublas::brgemm(
            piece.size, width_, padded_, padded_ * kPerWord<T>, width_, width_, true, row_of(scores, piece.first),
            side.rows, grads_.rows_of(piece.source, group, which, head) + piece.start * width_);
      };
      add(dprobs_, query_, 0);
      add(probs_, dout_, 1);
    }
  }

  // What queries get: (head_dim, keys) times (keys, queries).
  void multiply_keys(const Run& run, bool is_first) {
    const int64_t ld = stride_of(run.keys);
    transpose_keys(from_, run, width_, key_words_, ld);
    if constexpr (kPerWord<T> == 2) split_words(run.keys, ld);
    at::native::cpublas::brgemm(
        width_, padded_, round_up(run.keys, kPerWord<T>), ld, padded_, padded_, !is_first, key_, dscores_, dquery_);
  }

  // key (head_dim, ld) from key_words, which have two elements of a key each; a key that fills up a pair is 0.
  void split_words(int64_t keys, int64_t ld) {
    for (int64_t w = 0; w < width_ / 2; ++w) {
      float* words = key_words_ + w * ld;
      if (keys % 2) words[keys] = 0;
      for (int64_t i = 0; i < keys; i += kLanes) {
        const Ints word = load<Ints>(words + i);
        store(__builtin_convertvector(word, Halves), key_ + 2 * w * ld + i);
        store(__builtin_convertvector(word >> 16, Halves), key_ + (2 * w + 1) * ld + i);
      }
    }
  }

  const Inputs& in_;
  const Gradients& grads_;
  const int64_t width_;
  const float scale_;
  Scratch scratch_;
  Sources<T> from_;
  int64_t padded_ = 0;  // queries of the block, with padding
  Side query_, dout_;
  float *probs_, *dprobs_, *key_words_, *dquery_, *dquery_rows_, *lse_, *sum_, *inverse_, *delta_;
  T *dscores_, *key_;
  int32_t* first_query_;
};

}  // namespace lsg

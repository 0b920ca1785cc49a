// What the operators are given: windows as lists of segments, and how products want their rows.
#pragma once

#include <ATen/ATen.h>
#include <ATen/cpu/vec/vec.h>

#include <array>
#include <optional>
#include <vector>

#include "vectors.h"

namespace lsg {

using at::Tensor;

constexpr int64_t kMaxKeys = 1024;  // of a run
constexpr int32_t kNever = std::numeric_limits<int32_t>::max();

// ---- the order of elements that oneDNN's products want
//
// Left factors and float32 are row-major. A right factor of bfloat16 is in "VNNI" order: rows in pairs, the two elements
// of a column side by side. Its transpose has words of two elements, and is a plain transpose of words.

template <typename T>
constexpr int64_t kPerWord = sizeof(float) / sizeof(T);

// out (width / kPerWord, ld) = the transpose of rows (count, width), in words.
template <typename T>
void transpose_words(const T* rows, int64_t stride, int64_t count, int64_t width, float* out, int64_t ld) {
  const int64_t words = width / kPerWord<T>;
  for (int64_t i = 0; i < count; i += kLanes)
    for (int64_t w = 0; w < words; w += kLanes)
      at::vec::transpose_mxn<float>(
          reinterpret_cast<const float*>(rows + i * stride) + w, stride / kPerWord<T>, out + w * ld + i, ld,
          (int)std::min(kLanes, count - i), (int)std::min(kLanes, words - w));
}

// Two elements of type bfloat16 in each word.
inline Ints pair(Ints low, Ints high) {
  return (low & 0xffff) | (high << 16);
}

inline Ints widen(const at::BFloat16* x) {
  return __builtin_convertvector(load<Halves>(x), Ints);
}

// Copy rows (count, width) to rows ``first`` and later of a right factor.
inline void pack_rows(const float* rows, int64_t stride, int64_t first, int64_t count, int64_t width, float* out) {
  for (int64_t i = 0; i < count; ++i) std::copy_n(rows + i * stride, width, out + (first + i) * width);
}

inline void pack_rows(
    const at::BFloat16* rows, int64_t stride, int64_t first, int64_t count, int64_t width, at::BFloat16* out) {
  int64_t i = 0;
  const auto pack_one = [&] {
    at::BFloat16* target = out + (first + i) / 2 * 2 * width + (first + i) % 2;
    for (int64_t c = 0; c < width; ++c) target[2 * c] = rows[i * stride + c];
    ++i;
  };
  if (first % 2 && count > 0) pack_one();
  for (; i + 1 < count; i += 2) {
    const at::BFloat16 *low = rows + i * stride, *high = low + stride;
    at::BFloat16* target = out + (first + i) * width;
    int64_t c = 0;
    for (; c + kLanes <= width; c += kLanes) store(pair(widen(low + c), widen(high + c)), target + 2 * c);
    for (; c < width; ++c) target[2 * c] = low[c], target[2 * c + 1] = high[c];
  }
  if (i < count) pack_one();
}

// Rows of scores lie this far apart. At a multiple of 1 KiB, all elements of a column would share few lines of a cache.
inline int64_t stride_of(int64_t keys) {
  const int64_t padded = round_up(keys, kLanes);
  return padded % 256 == 0 ? padded + kLanes : padded;
}

// ---- windows

struct Segment {
  int64_t source, start, size;  // consecutive rows of the sequence (source 0) or of the slots (1)
};

struct Block {
  int64_t start, stop;  // its queries
  int64_t first, last;  // the segments of its window
};

struct Piece : Segment {
  int64_t first;  // its place among the keys of its run
};

// As much of a window as is taken at once.
struct Run {
  int64_t keys = 0;
  std::vector<Piece> pieces;
};

// A source of keys, of one head. ``keep`` is null where all rows are visible.
template <typename T>
struct Source {
  const T *key, *value;
  int64_t key_stride, value_stride;
  const bool* keep;
};

template <typename T>
using Sources = std::array<Source<T>, 2>;

// Asks for a row's memory, which the processor does not do by itself where rows lie a page apart.
template <typename T>
void prefetch_row(const T* row, int64_t width) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < width; i += kLine) __builtin_prefetch(row + i, 0, 2);
}

// out (width / kPerWord, ld) = the transpose of a run's keys, in words.
template <typename T>
void transpose_keys(const Sources<T>& from, const Run& run, int64_t width, float* out, int64_t ld) {
  for (const Piece& piece : run.pieces) {
    const Source<T>& x = from[piece.source];
    transpose_words(x.key + piece.start * x.key_stride, x.key_stride, piece.size, width, out + piece.first, ld);
  }
}

// Queries of the largest block and keys of the largest run.
struct Sizes {
  int64_t queries = 0, keys = 0;
};

struct Inputs {
  const Tensor &query, &key, &value;             // (heads, G+T, head_dim)
  const std::optional<Tensor>& slots;            // (2, heads, N, head_dim), of keys and of values
  const std::optional<Tensor>&keep, &slot_keep;  // (heads, G+T) and (heads, N) bool
  const Tensor& blocks;                          // (n, 4) int64, each row a Block
  const Tensor& segments;                        // (m, 3) int64, each row a Segment
  double scale;
  int64_t causal_from;  // rows of the sequence from here on are seen by no earlier query

  int64_t heads() const { return query.size(0); }
  int64_t head_dim() const { return query.size(2); }
  Block block(int64_t i) const { return reinterpret_cast<const Block*>(blocks.const_data_ptr<int64_t>())[i]; }

  template <typename T>
  Sources<T> sources(int64_t head) const {
    const auto keep_of = [&](const std::optional<Tensor>& x) {
      return x ? x->const_data_ptr<bool>() + head * x->stride(0) : nullptr;
    };
    Sources<T> out{};
    out[0] = {
        key.const_data_ptr<T>() + head * key.stride(0), value.const_data_ptr<T>() + head * value.stride(0),
        key.stride(1), value.stride(1), keep_of(keep)};
    if (slots) {
      const T* first = slots->const_data_ptr<T>() + head * slots->stride(1);
      out[1] = {first, first + slots->stride(0), slots->stride(2), slots->stride(2), keep_of(slot_keep)};
    }
    return out;
  }

  // A block's window, cut into runs of at most kMaxKeys keys.
  std::vector<Run> runs(const Block& block) const {
    const auto* all = reinterpret_cast<const Segment*>(segments.const_data_ptr<int64_t>());
    std::vector<Run> out;
    for (int64_t i = block.first; i < block.last; ++i)
      for (Segment rest = all[i]; rest.size > 0;) {
        if (out.empty() || out.back().keys == kMaxKeys) out.emplace_back();
        Run& run = out.back();
        const int64_t size = std::min(rest.size, kMaxKeys - run.keys);
        run.pieces.push_back({{rest.source, rest.start, size}, run.keys});
        run.keys += size;
        rest.start += size;
        rest.size -= size;
      }
    return out;
  }

  // The rows of the sequence that follow a block's window: what the next block's has besides.
  Piece rows_after(const std::vector<Run>& runs, const Block& block) const {
    int64_t stop = block.stop;
    for (const Run& run : runs)
      for (const Piece& piece : run.pieces)
        if (piece.source == 0) stop = std::max(stop, piece.start + piece.size);
    const int64_t size = std::min(block.stop - block.start, key.size(1) - stop);
    return {{0, stop, size}, 0};
  }

  // Writes of each key of a run the first query that sees it, kNever for padding, also up to a multiple of kLanes keys.
  // Returns whether all keys are visible to all of the block.
  template <typename T>
  bool find_first_queries(const Sources<T>& from, const Run& run, const Block& block, int32_t* out) const {
    bool sees_all = true;
    int32_t* end = out;
    for (const Piece& piece : run.pieces)
      for (int64_t row = piece.start; row < piece.start + piece.size; ++row, ++end) {
        const bool* keep = from[piece.source].keep;
        const bool is_later = piece.source == 0 && row >= causal_from;
        *end = keep && !keep[row] ? kNever : is_later ? (int32_t)row : 0;
        sees_all = sees_all && *end <= block.start;
      }
    std::fill(end, out + round_up(run.keys, kLanes), kNever);
    return sees_all;
  }

  Sizes largest() const {
    Sizes out;
    for (int64_t i = 0; i < blocks.size(0); ++i) {
      const Block one = block(i);
      out.queries = std::max(out.queries, one.stop - one.start);
      for (const Run& run : runs(one)) out.keys = std::max(out.keys, run.keys);
    }
    return out;
  }
};

// What the backward is given besides, and what it writes.
struct Gradients {
  const Tensor &lse, &dout;                // (heads, G+T) float32, (heads, G+T, head_dim)
  const std::optional<Tensor>& dlse;       // (heads, G+T) float32
  Tensor& dquery;                          // (heads, G+T, head_dim)
  Tensor& dsequence;                       // (groups, 2, heads, G+T, head_dim) float32, of keys and of values
  const std::optional<Tensor>& dslots;     // (groups, 2, heads, N, head_dim) float32

  float* rows_of(int64_t source, int64_t group, int64_t which, int64_t head) const {
    const Tensor& x = source == 0 ? dsequence : *dslots;
    return x.mutable_data_ptr<float>() + group * x.stride(0) + which * x.stride(1) + head * x.stride(2);
  }
};

// Memory of a thread.
class Scratch {
 public:
  template <typename T>
  T* take(int64_t size) {
    memory_.push_back(at::empty({size * (int64_t)sizeof(T)}, at::kByte));
    return reinterpret_cast<T*>(memory_.back().mutable_data_ptr<uint8_t>());
  }

 private:
  std::vector<Tensor> memory_;
};

}  // namespace lsg

// The operators: blocks of queries against windows of keys, forward and backward, and what makes compressed keys, on all
// threads; and huge pages.

#include <ATen/Parallel.h>
#include <sys/mman.h>
#include <torch/library.h>

#include "backward.h"
#include "forward.h"
#include "slots.h"

namespace lsg {
namespace {

// Asks for huge pages for large fresh memory, which the system else clears and maps 4 KiB at a time. It may decline.
void advise_huge_pages(const Tensor& x) {
  constexpr size_t kPage = 2 << 20;
  const size_t begin = reinterpret_cast<size_t>(x.storage().data()), end = begin + x.storage().nbytes();
  const size_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}

// Whether oneDNN multiplies bfloat16 on this processor, which the attempt alone tells.
bool has_bfloat16_products() {
  const Tensor x = at::zeros({16, 16}, at::kBFloat16);
  Tensor out = at::empty({16, 16}, at::kFloat);
  const at::BFloat16* data = x.const_data_ptr<at::BFloat16>();
  try {
    at::native::cpublas::brgemm(16, 16, 16, 16, 16, 16, false, data, data, out.mutable_data_ptr<float>());
    at::native::cpublas::brgemm_release();
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

// Gives a thread's AMX tiles back, where products took them.
struct Release {
  ~Release() { at::native::cpublas::brgemm_release(); }
};

// f(0.0f) or f(BFloat16(0)), for what the products are of.
template <typename F>
void with_type_of(const Tensor& x, const F& f) {
  if (x.scalar_type() == at::kFloat)
    f(0.0f);
  else
    f(at::BFloat16(0));
}

void forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& slots,
    const std::optional<Tensor>& keep, const std::optional<Tensor>& slot_keep, const Tensor& blocks,
    const Tensor& segments, double scale, int64_t causal_from, Tensor out, Tensor lse) {
  const Inputs in{query, key, value, slots, keep, slot_keep, blocks, segments, scale, causal_from};
  const Sizes most = in.largest();
  const int64_t per_head = blocks.size(0);
  with_type_of(query, [&](auto zero) {
    at::parallel_for(0, in.heads() * per_head, 1, [&](int64_t begin, int64_t end) {
      const Release release;
      Forward<decltype(zero)> work(in, most, out, lse);
      for (int64_t i = begin; i < end; ++i) work.attend(i / per_head, in.block(i % per_head));
    });
  });
}

// The blocks of a head are cut into groups. Each has gradients of keys and values of its own, and is one thread's.
void backward(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& slots,
    const std::optional<Tensor>& keep, const std::optional<Tensor>& slot_keep, const Tensor& blocks,
    const Tensor& segments, double scale, int64_t causal_from, const Tensor& lse, const Tensor& dout,
    const std::optional<Tensor>& dlse, Tensor dquery, Tensor dsequence, const std::optional<Tensor>& dslots) {
  const Inputs in{query, key, value, slots, keep, slot_keep, blocks, segments, scale, causal_from};
  const Gradients grads{lse, dout, dlse, dquery, dsequence, dslots};
  const Sizes most = in.largest();
  const int64_t per_head = blocks.size(0), groups = dsequence.size(0);
  with_type_of(query, [&](auto zero) {
    at::parallel_for(0, in.heads() * groups, 1, [&](int64_t begin, int64_t end) {
      const Release release;
      Backward<decltype(zero)> work(in, most, grads);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i / groups, group = i % groups;
        for (int64_t b = group * per_head / groups; b < (group + 1) * per_head / groups; ++b)
          work.differentiate(head, group, in.block(b));
      }
    });
  });
}

// Hashes keys (key heads, T, head_dim) in chunks, and writes the slot of each token to slot (heads, T).
void hash_slots(
    const Tensor& key, const std::optional<Tensor>& keep, const std::vector<Tensor>& directions,
    at::IntArrayRef buckets, int64_t chunk, Tensor slot) {
  const int64_t length = key.size(1), chunks = (length + chunk - 1) / chunk;
  with_type_of(key, [&](auto zero) {
    at::parallel_for(0, slot.size(0) * chunks, 1, [&](int64_t begin, int64_t end) {
      const Release release;
      Hash<decltype(zero)> work(key, keep, directions, buckets, chunk, slot.size(0) / key.size(0));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i / chunks, c = i % chunks;
        work.find_slots(
            head, c * chunk, c * buckets.back(), slot.mutable_data_ptr<int64_t>() + head * length + c * chunk);
      }
    });
  });
}

// out (heads, N, head_dim) = the rows of x (heads, T, head_dim), each times its weight, summed by slot.
void sum_slots(const Tensor& x, const Tensor& slot, const Tensor& weight, Tensor out) {
  const int64_t rows = x.size(1), width = x.size(2), num_slots = out.size(1);
  with_type_of(x, [&](auto zero) {
    using T = decltype(zero);
    at::parallel_for(0, x.size(0), 1, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      float* sums = scratch.take<float>(num_slots * width);
      for (int64_t head = begin; head < end; ++head) {
        const T* row = x.const_data_ptr<T>() + head * x.stride(0);
        const int64_t* slots = slot.const_data_ptr<int64_t>() + head * slot.stride(0);
        const float* weights = weight.const_data_ptr<float>() + head * weight.stride(0);
        std::fill_n(sums, num_slots * width, 0.0f);
        for (int64_t i = 0; i < rows; ++i)
          add_scaled(row + i * x.stride(1), weights[i * weight.stride(1)], width, sums + slots[i * slot.stride(1)] * width);
        T* target = out.mutable_data_ptr<T>() + head * out.stride(0);
        write_scaled(sums, 1, num_slots * width, target);
      }
    });
  });
}

}  // namespace
}  // namespace lsg

// TORCH_LIBRARY takes the name as it is written; as an argument of another macro, LSG_NAMESPACE is written out first.
#define LSG_LIBRARY(name, m) TORCH_LIBRARY(name, m)

LSG_LIBRARY(LSG_NAMESPACE, m) {
  const std::string inputs =
      "Tensor query, Tensor key, Tensor value, Tensor? slots, Tensor? keep, Tensor? slot_keep, Tensor blocks, "
      "Tensor segments, float scale, int causal_from";
  const std::string forward = "forward(" + inputs + ", Tensor(a!) out, Tensor(b!) lse) -> ()";
  const std::string backward = "backward(" + inputs +
      ", Tensor lse, Tensor dout, Tensor? dlse, Tensor(a!) dquery, Tensor(b!) dsequence, Tensor(c!)? dslots) -> ()";
  m.def("has_bfloat16_products() -> bool", &lsg::has_bfloat16_products);
  m.def("advise_huge_pages(Tensor x) -> ()", &lsg::advise_huge_pages);
  m.def(
      "hash_slots(Tensor key, Tensor? keep, Tensor[] directions, int[] buckets, int chunk, Tensor(a!) slot) -> ()",
      &lsg::hash_slots);
  m.def("sum_slots(Tensor x, Tensor slot, Tensor weight, Tensor(a!) out) -> ()", &lsg::sum_slots);
  m.def(forward.c_str(), &lsg::forward);
  m.def(backward.c_str(), &lsg::backward);
}

// The operators: blocks of queries against windows of keys, forward and backward, on all threads; and huge pages.

#include <ATen/Parallel.h>
#include <sys/mman.h>
#include <torch/library.h>

#include "backward.h"
#include "forward.h"

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
    const Tensor& segments, double scale, int64_t causal_from, const Tensor& lse, const Tensor& dout, Tensor dquery,
    Tensor dsequence, const std::optional<Tensor>& dslots) {
  const Inputs in{query, key, value, slots, keep, slot_keep, blocks, segments, scale, causal_from};
  const Gradients grads{lse, dout, dquery, dsequence, dslots};
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

}  // namespace
}  // namespace lsg

TORCH_LIBRARY(lsg_attn_cpp, m) {
  const std::string inputs =
      "Tensor query, Tensor key, Tensor value, Tensor? slots, Tensor? keep, Tensor? slot_keep, Tensor blocks, "
      "Tensor segments, float scale, int causal_from";
  const std::string forward = "forward(" + inputs + ", Tensor(a!) out, Tensor(b!) lse) -> ()";
  const std::string backward = "backward(" + inputs +
      ", Tensor lse, Tensor dout, Tensor(a!) dquery, Tensor(b!) dsequence, Tensor(c!)? dslots) -> ()";
  m.def("has_bfloat16_products() -> bool", &lsg::has_bfloat16_products);
  m.def("advise_huge_pages(Tensor x) -> ()", &lsg::advise_huge_pages);
  m.def(forward.c_str(), &lsg::forward);
  m.def(backward.c_str(), &lsg::backward);
}

// SPDX-License-Identifier: Apache-2.0
// regroup on the CPU: out[o, g, :] = (sum of the members' x[o, member, :]) / divisor[g] over tensors seen as
// [outer, D, inner] (Stoica et al. 2024, eq. 2 to 4).
//
// Work is cut into (outer, group) rows of the output, each owned by one thread; sums run in float64 in the order of
// `order`, so results depend neither on threads nor on the cut.  Every input element is read once per membership.
#include "cpu/simd.h"
#include "stable.h"

namespace zipfast {
namespace {

template <class scalar_t>
struct Rows {
  const scalar_t* const* member;  // [members], where each member's entries start in the first outer slice
  const int64_t* start;           // [groups + 1]
  const double* divisor;          // [groups] or null
  scalar_t* out;                  // [outer, groups, inner]
  int64_t slice, inner, groups;   // slice: elements from one outer index to the next in x
};

// Groups of one or two members, nearly all of them in practice, are summed without a buffer.  Every sum starts from +0,
// as in the general case, so that the sign of a zero does not depend on the path.
template <class scalar_t>
ZF_INLINE void sum_rows(const Rows<scalar_t>& r, int64_t begin, int64_t end) {
  constexpr int64_t kTile = 256;
  double acc[kTile];
  int64_t o = begin / r.groups, g = begin % r.groups;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t p0 = r.start[g], p1 = r.start[g + 1], at = o * r.slice;
    const bool plain = !r.divisor;
    const double divisor = plain ? 1 : r.divisor[g];
    scalar_t* dst = r.out + item * r.inner;
    if (p1 - p0 == 1 && plain) {
      const scalar_t* a = r.member[p0] + at;
      for (int64_t k = 0; k < r.inner; ++k) dst[k] = narrow<scalar_t>(widen(a[k]) + 0);
    } else if (p1 - p0 == 2 && plain && sizeof(scalar_t) >= 4) {
      // The sum of two is rounded once, here as in float64: the same bits.
      const scalar_t *a = r.member[p0] + at, *b = r.member[p0 + 1] + at;
      for (int64_t k = 0; k < r.inner; ++k) dst[k] = narrow<scalar_t>(widen(a[k]) + 0 + widen(b[k]));
    } else if (p1 - p0 == 2) {
      const scalar_t *a = r.member[p0] + at, *b = r.member[p0 + 1] + at;
      for (int64_t k = 0; k < r.inner; ++k)
        dst[k] = narrow<scalar_t>((double(widen(a[k])) + 0 + double(widen(b[k]))) / divisor);
    } else {
      for (int64_t k0 = 0; k0 < r.inner; k0 += kTile) {
        const int64_t n = std::min(kTile, r.inner - k0);
        for (int64_t k = 0; k < n; ++k) acc[k] = 0;
        for (int64_t p = p0; p < p1; ++p) {
          const scalar_t* src = r.member[p] + at + k0;
          for (int64_t k = 0; k < n; ++k) acc[k] += widen(src[k]);
        }
        for (int64_t k = 0; k < n; ++k) dst[k0 + k] = narrow<scalar_t>(acc[k] / divisor);
      }
    }
    if (++g == r.groups) g = 0, ++o;
  }
}

ZF_MULTIVERSION void run_rows(const Rows<float>& r, int64_t b, int64_t e) { sum_rows(r, b, e); }
ZF_MULTIVERSION void run_rows(const Rows<double>& r, int64_t b, int64_t e) { sum_rows(r, b, e); }
ZF_MULTIVERSION void run_rows(const Rows<Half>& r, int64_t b, int64_t e) { sum_rows(r, b, e); }
ZF_MULTIVERSION void run_rows(const Rows<BFloat16>& r, int64_t b, int64_t e) { sum_rows(r, b, e); }

Tensor regroup_cpu(const std::vector<Tensor>& x, const Tensor& order_, const Tensor& start_,
                   const std::optional<Tensor>& divisor_, int64_t axis) {
  STD_TORCH_CHECK(!x.empty(), "regroup: 'x' must not be empty");
  const AxisView view(x[0], axis);
  std::vector<Tensor> input;
  std::vector<const void*> data;
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < x[0].dim(); ++d) shape.push_back(x[0].size(d));
  for (const Tensor& t : x) {
    STD_TORCH_CHECK(t.numel() == x[0].numel() && t.scalar_type() == x[0].scalar_type(), "regroup: malformed 'x'");
    input.push_back(as_contiguous(t));
    data.push_back(input.back().const_data_ptr());
  }
  const Tensor order = as_contiguous(order_), start = as_contiguous(start_);
  const int64_t groups = start.size(0) - 1, members = order.size(0), features = view.size * int64_t(x.size());
  const int64_t *po = order.const_data_ptr<int64_t>(), *ps = start.const_data_ptr<int64_t>();
  STD_TORCH_CHECK(ps[0] == 0 && ps[groups] == members, "regroup: 'start' must run from 0 to ", members);
  for (int64_t g = 0; g < groups; ++g) STD_TORCH_CHECK(ps[g] <= ps[g + 1], "regroup: 'start' must ascend");
  for (int64_t p = 0; p < members; ++p)
    STD_TORCH_CHECK(po[p] >= 0 && po[p] < features, "regroup: 'order' must be in [0, ", features, "), got ", po[p]);
  std::optional<Tensor> divisor;
  if (divisor_) {
    divisor = as_contiguous(*divisor_);
    STD_TORCH_CHECK(divisor->numel() == groups, "regroup: malformed 'divisor'");
  }
  shape[axis] = groups;
  Tensor out = torch::stable::new_empty(x[0], shape);
  dispatch(dtype_of("regroup", x[0]), [&](auto* tag) {
    using scalar_t = std::remove_pointer_t<decltype(tag)>;
    std::vector<const scalar_t*> member(members);
    for (int64_t p = 0; p < members; ++p)
      member[p] = static_cast<const scalar_t*>(data[po[p] / view.size]) + po[p] % view.size * view.inner;
    const Rows<scalar_t> rows{member.data(),
                              ps,
                              divisor ? divisor->const_data_ptr<double>() : nullptr,
                              static_cast<scalar_t*>(out.mutable_data_ptr()),
                              view.size * view.inner,
                              view.inner,
                              groups};
    const int64_t work = groups ? std::max<int64_t>(1, view.inner * members / groups) : 1;
    torch::stable::parallel_for(0, view.outer * groups, std::max<int64_t>(1, 32768 / work),
                                [&](int64_t b, int64_t e) { run_rows(rows, b, e); });
  });
  return out;
}

}  // namespace
}  // namespace zipfast

STABLE_TORCH_LIBRARY_IMPL(zipfast, CPU, m) { m.impl("regroup", TORCH_BOX(&zipfast::regroup_cpu)); }

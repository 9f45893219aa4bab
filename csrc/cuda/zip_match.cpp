// SPDX-License-Identifier: Apache-2.0
// Glue of zip_match's CUDA kernel: outputs of all spaces in four tensors, launches of up to kMatchSpaces spaces, blocks
// and memory for each.
#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

#include "cuda/scope.h"
#include "rule.h"

namespace zipfast {
namespace {

#ifdef ZF_EMU
constexpr double kLeast = 64;
#else
constexpr double kLeast = 65536;  // 40 us that a space takes however small it is, in elements of a block's share
#endif

// Shares the blocks out over the spaces, in proportion to their matrices; bytes of scratch memory.  Spaces that are
// worth two blocks or more have them to themselves; the others are dealt to the rest of the blocks, largest first, each
// to the block with least to do.
int64_t plan(cuda::MatchJob& job, DType dtype, int blocks) {
  constexpr int kRows = cuda::kMatchThreads / 32;  // that keep a block busy
  std::vector<int> order(job.spaces), large, small;
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return job.space[a].n > job.space[b].n; });
  auto weight = [&](int s) { return double(job.space[s].n) * job.space[s].n + kLeast; };
  auto useful = [&](int s) { return (job.space[s].n + kRows - 1) / kRows; };
  double total = 0;
  for (int s : order) total += weight(s);
  int rest = blocks;
  for (int s : order) {
    cuda::MatchSpace& space = job.space[s];
    space.blocks = job.sequential ? 1 : std::min(useful(s), int(weight(s) * blocks / total));
    space.next = -1, space.head = true;
    if (space.blocks > 1) rest -= space.blocks;
    (space.blocks > 1 ? large : small).push_back(s);
  }
  const size_t queues = std::min(size_t(rest), small.size());  // rest > 0 if any is small: shares were rounded down
  for (rest -= int(queues); rest > 0; --rest) {                // what is left, to whoever has most to do
    int most = -1;
    for (int s : large)
      if (job.space[s].blocks < useful(s) &&
          (most < 0 || weight(s) / job.space[s].blocks > weight(most) / job.space[most].blocks))
        most = s;
    if (most < 0) break;
    ++job.space[most].blocks;
  }
  int64_t bytes = 0;
  job.blocks = 0;
  auto place = [&](cuda::MatchSpace& space) {
    space.block = job.blocks, space.scratch = bytes;
    job.blocks += space.blocks;
    bytes += cuda::zip_match_bytes(dtype, space.n, space.blocks);
  };
  for (int s : large) place(job.space[s]);
  std::vector<int> last(queues);
  std::vector<double> load(queues);
  for (size_t at = 0; at < small.size(); ++at) {
    cuda::MatchSpace& space = job.space[small[at]];
    space.blocks = 1;
    const size_t q = at < queues ? at : size_t(std::min_element(load.begin(), load.end()) - load.begin());
    load[q] += weight(small[at]);
    if (at < queues) {
      place(space);
    } else {  // in the memory of the first of its block, which is the largest
      cuda::MatchSpace& before = job.space[last[q]];
      space.head = false, space.block = before.block, space.scratch = before.scratch;
      before.next = small[at];
    }
    last[q] = small[at];
  }
  return bytes;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> zip_match_cuda(const std::vector<Tensor>& sim, int64_t models,
                                                          const std::vector<int64_t>& keep,
                                                          const std::vector<int64_t>& budget, double alpha, bool compat,
                                                          std::string path) {
  const int64_t spaces = int64_t(sim.size());
  STD_TORCH_CHECK(spaces > 0 && keep.size() == sim.size() && budget.size() == sim.size() && models > 0 && models < 32,
                  "zip_match: malformed arguments");
  STD_TORCH_CHECK(path == "auto" || path == "rounds" || path == "sequential", "zip_match: unknown path '", path, "'");
  CudaScope scope(sim[0]);
  const DType dtype = dtype_of("zip_match", sim[0]);
  int64_t features = 0, merges = 0;
  for (int64_t s = 0; s < spaces; ++s) {
    const int64_t n = sim[s].size(0);
    STD_TORCH_CHECK(sim[s].dim() == 2 && n == sim[s].size(1) && n > 0 && n % models == 0 && n < (1 << 30) &&
                        keep[s] >= 1 && keep[s] <= n,
                    "zip_match: malformed similarity");
    features += n;
    merges += n - keep[s];
  }
  using torch::stable::new_empty;
  Tensor group = new_empty(sim[0], {features}, ScalarType::Long);
  Tensor pair = new_empty(sim[0], {merges, 2}, ScalarType::Long);
  Tensor value = new_empty(sim[0], {merges});
  Tensor status = new_empty(sim[0], {spaces, int64_t(rule::kStatusFields)}, ScalarType::Long);

  std::vector<Tensor> input;
  cuda::MatchJob job{};
  auto flush = [&] {
    if (job.spaces == 0) return;
    job.alpha = alpha, job.models = int(models), job.compat = compat, job.sequential = path == "sequential";
    int blocks = 0;
    check_launch("zip_match", cuda::zip_match_resident(dtype, blocks));
    Tensor scratch = new_empty(sim[0], {plan(job, dtype, blocks)}, ScalarType::Byte);
    job.scratch = scratch.mutable_data_ptr();
    check_launch("zip_match", cuda::zip_match(dtype, job, scope.stream));
    job = {};
  };
  int64_t feature = 0, merge = 0;
  const int64_t value_bytes = dtype == DType::f64 ? 8 : 4;
  for (int64_t s = 0; s < spaces; ++s) {
    if (job.spaces == cuda::kMatchSpaces) flush();
    input.push_back(as_contiguous(sim[s]));
    const int64_t n = sim[s].size(0);
    cuda::MatchSpace& space = job.space[job.spaces++];
    space.sim = input.back().const_data_ptr();
    space.group = group.mutable_data_ptr<int64_t>() + feature;
    space.pair = pair.mutable_data_ptr<int64_t>() + 2 * merge;
    space.value = static_cast<char*>(value.mutable_data_ptr()) + value_bytes * merge;
    space.status = status.mutable_data_ptr<int64_t>() + s * rule::kStatusFields;
    space.budget = budget[s];
    space.n = int(n), space.keep = int(keep[s]);
    feature += n;
    merge += n - keep[s];
  }
  flush();
  return {group, pair, value, status};
}

}  // namespace
}  // namespace zipfast

ZF_CUDA_LIBRARY(m) { m.impl("zip_match", TORCH_BOX(&zipfast::zip_match_cuda)); }

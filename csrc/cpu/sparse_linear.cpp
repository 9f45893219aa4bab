// SPDX-License-Identifier: Apache-2.0
// sparse_linear, sparse_linear_input and sparse_linear_weight on the CPU: a linear layer over its alive weights, in
// compressed rows with 16-bit columns (Frankle & Carbin 2019, section 2).
//
// A batch is packed once into chunks of `lanes` samples, [columns][lanes], so that each weight is one broadcast and a
// few multiply-adds on samples that lie side by side; the sums of a row stay in registers.  One sample alone is
// gathered from instead: its weights and columns are read by whole vectors, as loads are what such a row is bound by.
// The input gradient scatters row after row into a tile of columns that stays in the second cache: weights are read in
// their order, which beats a transposed layout whose values lie apart.  The weight gradient is a dot product over the
// lanes for each weight, a vector's worth of them summed across by one tree.  Each sum has one owner and one order:
// equal on every run and thread count.  Columns are looked through before a row is used: a wrong one is refused, not
// followed.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>

#include "cpu/lanes.h"
#include "cpu/simd.h"
#include "stable.h"

namespace zipfast {
namespace {

using cpu::Buffer;
using cpu::buffer;
using cpu::Chunk;
using cpu::kWidest;
using cpu::row_of_lanes;
using cpu::row_of_weights;
using cpu::scatter_lanes;
using cpu::Vector;

constexpr int64_t kRows = 32, kPackColumns = 256;
constexpr int64_t kUnit = 64, kTileBytes = 256 << 10;  // columns of the input gradient: least cut, most at a time
constexpr int64_t kGrain = 32768;                      // multiply-adds that are worth a thread

struct Layout {
  const int32_t* row_start;  // [rows + 1]
  const void* column;        // [alive] uint16 or uint32
  int64_t rows, columns, alive;
  bool narrow;
  std::atomic<bool>* wrong;  // an index was out of range
};

template <class scalar_t>
struct Forward {
  using acc_t = typename Accumulate<scalar_t>::type;
  Layout layout;
  const scalar_t *value, *bias;  // [alive]; [rows] or null
  const Chunk* chunk;            // null: one sample, as it lies in `packed`
  const acc_t* packed;
  scalar_t* y;  // [batch, rows]
};

template <class scalar_t>
struct Input {
  using acc_t = typename Accumulate<scalar_t>::type;
  Layout layout;
  const scalar_t* value;  // [alive]
  const Chunk* chunk;     // null: one sample, as it lies in `packed`
  int64_t chunks;
  const acc_t* packed;  // the gradient by the outputs
  scalar_t* out;        // [batch, columns]
};

template <class scalar_t>
struct Weight {
  using acc_t = typename Accumulate<scalar_t>::type;
  Layout layout;
  const Chunk *x_chunk, *grad_chunk;
  int64_t chunks;
  const acc_t *x, *grad;  // packed
  acc_t* sum;             // [alive]
  scalar_t* out;          // [alive]; `sum` itself where nothing is narrowed
};

// Are the columns of the entries [begin, end) in [first, last)?
template <class index_t>
ZF_INLINE bool sound(const Layout& l, const index_t* column, int64_t begin, int64_t end, int64_t first, int64_t last) {
  index_t most = 0;  // columns before `first` wrap around: no tile is as wide as they end up large
  for (int64_t i = begin; i < end; ++i) most = std::max(most, index_t(column[i] - index_t(first)));
  const bool fine = begin == end || int64_t(most) < last - first;
  if (!fine) l.wrong->store(true, std::memory_order_relaxed);
  return fine;
}

template <class scalar_t, class index_t>
ZF_INLINE void rows_of_lanes(const Forward<scalar_t>& f, const index_t* column, const Chunk& chunk, int64_t begin,
                             int64_t end) {
  using acc_t = typename Accumulate<scalar_t>::type;
  alignas(64) acc_t y[kRows * kWidest / sizeof(acc_t)];  // [rows][lanes]: written out sample by sample
  const Layout& l = f.layout;
  const acc_t* x = f.packed + chunk.offset;
  const int64_t bytes = chunk.lanes * int64_t(sizeof(acc_t));
  for (int64_t r = begin; r < end; ++r) {
    acc_t* own = y + (r - begin) * chunk.lanes;
    const int64_t from = l.row_start[r], to = l.row_start[r + 1];
    if (!sound(l, column, from, to, 0, l.columns)) return;
    if (bytes == 32)
      row_of_lanes<32, 1, 4>(x, f.value, column, from, to, own);
    else if (bytes == 64)
      row_of_lanes<64, 1, 4>(x, f.value, column, from, to, own);
    else if (bytes == 128)
      row_of_lanes<64, 2, 4>(x, f.value, column, from, to, own);
    else
      row_of_lanes<64, 4, 2>(x, f.value, column, from, to, own);
  }
  for (int64_t s = 0; s < chunk.count; ++s) {
    scalar_t* out = f.y + (chunk.first + s) * l.rows + begin;
    for (int64_t r = 0; r < end - begin; ++r) {
      const acc_t sum = y[r * chunk.lanes + s];
      out[r] = narrow<scalar_t>(double(f.bias ? sum + acc_t(widen(f.bias[begin + r])) : sum));
    }
  }
}

// Eight columns: two loads where they are narrow.
ZF_INLINE void eight(const uint16_t* column, uint32_t* c) {
  uint64_t low, high;
  std::memcpy(&low, column, 8);
  std::memcpy(&high, column + 4, 8);
  c[0] = uint16_t(low), c[1] = uint16_t(low >> 16), c[2] = uint16_t(low >> 32), c[3] = uint32_t(low >> 48);
  c[4] = uint16_t(high), c[5] = uint16_t(high >> 16), c[6] = uint16_t(high >> 32), c[7] = uint32_t(high >> 48);
}
ZF_INLINE void eight(const uint32_t* column, uint32_t* c) { std::memcpy(c, column, 32); }

template <class scalar_t, class acc_t, class index_t>
ZF_INLINE void add_eight(const acc_t* x, const scalar_t* value, const index_t* column, int64_t i,
                         typename Vector<acc_t, 8 * sizeof(acc_t)>::type& sum) {
  using vec = typename Vector<acc_t, 8 * sizeof(acc_t)>::type;
  uint32_t c[8];
  eight(column + i, c);
  const vec sample = {x[c[0]], x[c[1]], x[c[2]], x[c[3]], x[c[4]], x[c[5]], x[c[6]], x[c[7]]};
  vec weight;
  if constexpr (std::is_same_v<scalar_t, acc_t>) {
    std::memcpy(&weight, value + i, sizeof weight);
  } else {
    for (int k = 0; k < 8; ++k) weight[k] = widen(value[i + k]);
  }
  sum += sample * weight;
}

// One sample: x [columns].
template <class scalar_t, class index_t>
ZF_INLINE void rows_of_one(const Forward<scalar_t>& f, const index_t* column, int64_t begin, int64_t end) {
  using acc_t = typename Accumulate<scalar_t>::type;
  const Layout& l = f.layout;
  for (int64_t r = begin; r < end; ++r) {
    int64_t i = l.row_start[r];
    const int64_t to = l.row_start[r + 1];
    if (!sound(l, column, i, to, 0, l.columns)) return;
    typename Vector<acc_t, 8 * sizeof(acc_t)>::type sum[2] = {};
    for (; i + 16 <= to; i += 16) {
      add_eight(f.packed, f.value, column, i, sum[0]);
      add_eight(f.packed, f.value, column, i + 8, sum[1]);
    }
    acc_t total = f.bias ? acc_t(widen(f.bias[r])) : acc_t(0);
    sum[0] += sum[1];
    for (int k = 0; k < 8; ++k) total += sum[0][k];
    for (; i < to; ++i) total += acc_t(widen(f.value[i])) * f.packed[column[i]];
    f.y[r] = narrow<scalar_t>(double(total));
  }
}

// Tasks [begin, end): blocks of kRows rows, chunk after chunk.
template <class scalar_t, class index_t>
ZF_INLINE void forward_tasks(const Forward<scalar_t>& f, const index_t* column, int64_t begin, int64_t end) {
  const int64_t blocks = (f.layout.rows + kRows - 1) / kRows;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t row = t % blocks * kRows, last = std::min(row + kRows, f.layout.rows);
    if (f.chunk)
      rows_of_lanes(f, column, f.chunk[t / blocks], row, last);
    else
      rows_of_one(f, column, row, last);
  }
}

template <class scalar_t>
ZF_INLINE void forward_layouts(const Forward<scalar_t>& f, int64_t begin, int64_t end) {
  const auto* narrow = static_cast<const uint16_t*>(f.layout.column);
  const auto* wide = static_cast<const uint32_t*>(f.layout.column);
  f.layout.narrow ? forward_tasks(f, narrow, begin, end) : forward_tasks(f, wide, begin, end);
}

// Columns [first, last) of one chunk (count = lanes = 1: of the one sample), all rows in their order.
template <class scalar_t, class acc_t, class index_t>
ZF_INLINE void scatter_tile(const Input<scalar_t>& g, const index_t* column, const Chunk& chunk, int64_t first,
                            int64_t last, acc_t* tile) {
  const Layout& l = g.layout;
  const int64_t lanes = chunk.lanes, bytes = lanes * int64_t(sizeof(acc_t));
  const acc_t* grad = g.packed + chunk.offset;
  std::fill(tile, tile + (last - first) * lanes, acc_t(0));
  acc_t* origin = tile - first * lanes;  // where column 0 would be
  for (int64_t r = 0; r < l.rows; ++r) {
    const index_t *begin = column + l.row_start[r], *end = column + l.row_start[r + 1];
    if (first > 0) begin = std::lower_bound(begin, end, first);
    if (last < l.columns) end = std::lower_bound(begin, end, last);
    const int64_t i = begin - column, e = end - column;
    if (!sound(l, column, i, e, first, last)) return;  // also where columns do not ascend
    const acc_t* own = grad + r * lanes;
    if (lanes == 1)
      for (int64_t k = i; k < e; ++k) origin[column[k]] += acc_t(widen(g.value[k])) * *own;
    else if (bytes == 32)
      scatter_lanes<32, 1>(own, g.value, column, i, e, origin);
    else if (bytes == 64)
      scatter_lanes<64, 1>(own, g.value, column, i, e, origin);
    else if (bytes == 128)
      scatter_lanes<64, 2>(own, g.value, column, i, e, origin);
    else
      scatter_lanes<64, 4>(own, g.value, column, i, e, origin);
  }
  for (int64_t s = 0; s < chunk.count; ++s) {
    scalar_t* out = g.out + (chunk.first + s) * l.columns;
    for (int64_t c = first; c < last; ++c) out[c] = narrow<scalar_t>(double(origin[c * lanes + s]));
  }
}

// Units [begin, end) of kUnit columns.  The cut may fall anywhere: each column adds its rows in their order.
template <class scalar_t, class index_t>
ZF_INLINE void input_tasks(const Input<scalar_t>& g, const index_t* column, int64_t begin, int64_t end) {
  using acc_t = typename Accumulate<scalar_t>::type;
  const int64_t last = std::min(end * kUnit, g.layout.columns);
  Buffer<acc_t> tile = buffer<acc_t>(kTileBytes / int64_t(sizeof(acc_t)));
  const Chunk one{0, 1, 1, 0};
  for (int64_t c = 0; c < g.chunks; ++c) {
    const Chunk& chunk = g.chunk ? g.chunk[c] : one;
    const int64_t step = kTileBytes / (chunk.lanes * int64_t(sizeof(acc_t)));
    for (int64_t at = begin * kUnit; at < last; at += step)
      scatter_tile(g, column, chunk, at, std::min(at + step, last), tile.get());
  }
}

template <class scalar_t>
ZF_INLINE void input_layouts(const Input<scalar_t>& g, int64_t begin, int64_t end) {
  const auto* narrow = static_cast<const uint16_t*>(g.layout.column);
  const auto* wide = static_cast<const uint32_t*>(g.layout.column);
  g.layout.narrow ? input_tasks(g, narrow, begin, end) : input_tasks(g, wide, begin, end);
}

template <class scalar_t, class index_t>
ZF_INLINE void weight_tasks(const Weight<scalar_t>& w, const index_t* column, int64_t begin, int64_t end) {
  using acc_t = typename Accumulate<scalar_t>::type;
  const Layout& l = w.layout;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t row = t * kRows, last = std::min(row + kRows, l.rows);
    const int64_t from = l.row_start[row], to = l.row_start[last];
    if (!sound(l, column, from, to, 0, l.columns)) return;
    if (!w.chunks) std::fill(w.sum + from, w.sum + to, acc_t(0));
    for (int64_t c = 0; c < w.chunks; ++c) {
      const acc_t *x = w.x + w.x_chunk[c].offset, *grad = w.grad + w.grad_chunk[c].offset;
      const int64_t lanes = w.x_chunk[c].lanes, bytes = lanes * int64_t(sizeof(acc_t));
      for (int64_t r = row; r < last; ++r) {
        const int64_t i = l.row_start[r], e = l.row_start[r + 1];
        const acc_t* own = grad + r * lanes;
        if (bytes == 32)
          row_of_weights<32, 1>(x, own, column, i, e, w.sum, c == 0);
        else if (bytes == 64)
          row_of_weights<64, 1>(x, own, column, i, e, w.sum, c == 0);
        else if (bytes == 128)
          row_of_weights<64, 2>(x, own, column, i, e, w.sum, c == 0);
        else
          row_of_weights<64, 4>(x, own, column, i, e, w.sum, c == 0);
      }
    }
    if constexpr (!std::is_same_v<scalar_t, acc_t>)
      for (int64_t i = from; i < to; ++i) w.out[i] = narrow<scalar_t>(double(w.sum[i]));
  }
}

template <class scalar_t>
ZF_INLINE void weight_layouts(const Weight<scalar_t>& w, int64_t begin, int64_t end) {
  if (w.layout.narrow)
    weight_tasks(w, static_cast<const uint16_t*>(w.layout.column), begin, end);
  else
    weight_tasks(w, static_cast<const uint32_t*>(w.layout.column), begin, end);
}

#define ZF_SPARSE_RUN(scalar_t)                                                                            \
  ZF_MULTIVERSION void run(const Forward<scalar_t>& f, int64_t b, int64_t e) { forward_layouts(f, b, e); } \
  ZF_MULTIVERSION void run(const Input<scalar_t>& g, int64_t b, int64_t e) { input_layouts(g, b, e); }     \
  ZF_MULTIVERSION void run(const Weight<scalar_t>& w, int64_t b, int64_t e) { weight_layouts(w, b, e); }   \
  ZF_MULTIVERSION void run_pack(const scalar_t* x, int64_t columns, const Chunk& chunk,                    \
                                Accumulate<scalar_t>::type* packed, int64_t b, int64_t e) {                \
    cpu::pack_columns(x, columns, chunk, packed, b, e);                                                    \
  }
ZF_SPARSE_RUN(float)
ZF_SPARSE_RUN(double)
ZF_SPARSE_RUN(Half)
ZF_SPARSE_RUN(BFloat16)
#undef ZF_SPARSE_RUN

template <class scalar_t, class acc_t>
Buffer<acc_t> pack(const scalar_t* x, int64_t columns, const std::vector<Chunk>& chunks) {
  const int64_t size = chunks.empty() ? 0 : chunks.back().offset + columns * chunks.back().lanes;
  Buffer<acc_t> packed = buffer<acc_t>(size);
  const int64_t pieces = (columns + kPackColumns - 1) / kPackColumns;
  torch::stable::parallel_for(0, pieces * int64_t(chunks.size()), 4, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t at = t % pieces * kPackColumns;
      run_pack(x, columns, chunks[size_t(t / pieces)], packed.get(), at, std::min(at + kPackColumns, columns));
    }
  });
  return packed;
}

// A batch as the kernels take it: one sample lies in its place if it needs no widening.
template <class scalar_t>
struct Packed {
  using acc_t = typename Accumulate<scalar_t>::type;
  bool one;
  std::vector<Chunk> list;
  Buffer<acc_t> own;
  const acc_t* data;
  Packed(const Tensor& x, int64_t batch, int64_t columns) : one(batch == 1) {
    const auto* from = static_cast<const scalar_t*>(x.const_data_ptr());
    if (one)
      list.push_back({0, 1, 1, 0});
    else
      list = cpu::chunks_of(batch, columns, sizeof(acc_t));
    if (!one || !std::is_same_v<scalar_t, acc_t>) own = pack<scalar_t, acc_t>(from, columns, list);
    data = own ? own.get() : reinterpret_cast<const acc_t*>(from);
  }
  const Chunk* chunk() const { return one ? nullptr : list.data(); }
  int64_t chunks() const { return int64_t(list.size()); }
};

Layout layout_of(const char* op, const Tensor& row_start, const Tensor& column, int64_t columns,
                 std::atomic<bool>* wrong) {
  const int64_t rows = row_start.numel() - 1, alive = column.numel();
  const bool narrow = column.scalar_type() == ScalarType::Short;
  STD_TORCH_CHECK(rows >= 0 && (narrow || column.scalar_type() == ScalarType::Int), op, ": malformed layout");
  const int32_t* start = row_start.const_data_ptr<int32_t>();
  STD_TORCH_CHECK(start[0] == 0 && start[rows] == alive, op, ": 'row_start' must run from 0 to ", alive);
  for (int64_t r = 0; r < rows; ++r) STD_TORCH_CHECK(start[r] <= start[r + 1], op, ": 'row_start' must ascend");
  return {start, column.const_data_ptr(), rows, columns, alive, narrow, wrong};
}

int64_t grain_of(int64_t blocks, int64_t alive, int64_t lanes) {
  return std::max<int64_t>(1, kGrain * blocks / std::max<int64_t>(1, alive * lanes));
}

Tensor sparse_linear_cpu(const Tensor& row_start_, const Tensor& column_, const Tensor& value_, const Tensor& x_,
                         const std::optional<Tensor>& bias_, std::string) {
  const Tensor row_start = as_contiguous(row_start_), column = as_contiguous(column_), value = as_contiguous(value_);
  const Tensor x = as_contiguous(x_);
  std::optional<Tensor> bias;
  if (bias_) bias = as_contiguous(*bias_);
  const int64_t batch = x.size(0), columns = x.size(1);
  std::atomic<bool> wrong{false};
  const Layout layout = layout_of("sparse_linear", row_start, column, columns, &wrong);
  STD_TORCH_CHECK(value.numel() == layout.alive && value.scalar_type() == x.scalar_type() &&
                      (!bias || (bias->numel() == layout.rows && bias->scalar_type() == x.scalar_type())),
                  "sparse_linear: malformed 'value' or 'bias'");
  Tensor y = torch::stable::new_empty(x, {batch, layout.rows});
  dispatch(dtype_of("sparse_linear", x), [&](auto* tag) {
    using scalar_t = std::remove_pointer_t<decltype(tag)>;
    const Packed<scalar_t> packed(x, batch, columns);
    const Forward<scalar_t> forward{layout,
                                    static_cast<const scalar_t*>(value.const_data_ptr()),
                                    bias ? static_cast<const scalar_t*>(bias->const_data_ptr()) : nullptr,
                                    packed.chunk(),
                                    packed.data,
                                    static_cast<scalar_t*>(y.mutable_data_ptr())};
    const int64_t blocks = (layout.rows + kRows - 1) / kRows;
    const int64_t lanes = packed.list.empty() ? 1 : packed.list[0].lanes;
    torch::stable::parallel_for(0, blocks * packed.chunks(), grain_of(blocks, layout.alive, lanes),
                                [&](int64_t begin, int64_t end) { run(forward, begin, end); });
  });
  STD_TORCH_CHECK(!wrong, "sparse_linear: 'column' must be in [0, ", columns, ")");
  return y;
}

Tensor sparse_linear_input_cpu(const Tensor& row_start_, const Tensor& column_, const Tensor& value_,
                               const std::vector<Tensor>&, const Tensor& grad_, int64_t columns) {
  const Tensor row_start = as_contiguous(row_start_), column = as_contiguous(column_), value = as_contiguous(value_);
  const Tensor grad = as_contiguous(grad_);
  const int64_t batch = grad.size(0);
  std::atomic<bool> wrong{false};
  const Layout layout = layout_of("sparse_linear_input", row_start, column, columns, &wrong);
  STD_TORCH_CHECK(columns >= 0 && value.numel() == layout.alive && value.scalar_type() == grad.scalar_type() &&
                      grad.numel() == batch * layout.rows,
                  "sparse_linear_input: malformed 'value' or 'grad'");
  Tensor out = torch::stable::new_empty(grad, {batch, columns});
  dispatch(dtype_of("sparse_linear_input", grad), [&](auto* tag) {
    using scalar_t = std::remove_pointer_t<decltype(tag)>;
    const Packed<scalar_t> packed(grad, batch, layout.rows);
    const Input<scalar_t> input{layout,         static_cast<const scalar_t*>(value.const_data_ptr()),
                                packed.chunk(), packed.chunks(),
                                packed.data,    static_cast<scalar_t*>(out.mutable_data_ptr())};
    const int64_t units = (columns + kUnit - 1) / kUnit;
    torch::stable::parallel_for(0, units, grain_of(units, layout.alive, std::max<int64_t>(batch, 1)),
                                [&](int64_t begin, int64_t end) { run(input, begin, end); });
  });
  STD_TORCH_CHECK(!wrong, "sparse_linear_input: 'column' must ascend in each row and be in [0, ", columns, ")");
  return out;
}

Tensor sparse_linear_weight_cpu(const Tensor& row_start_, const Tensor& column_, const Tensor& grad_,
                                const Tensor& x_) {
  const Tensor row_start = as_contiguous(row_start_), column = as_contiguous(column_);
  const Tensor grad = as_contiguous(grad_), x = as_contiguous(x_);
  const int64_t batch = x.size(0), columns = x.size(1);
  std::atomic<bool> wrong{false};
  const Layout layout = layout_of("sparse_linear_weight", row_start, column, columns, &wrong);
  STD_TORCH_CHECK(grad.numel() == batch * layout.rows && grad.scalar_type() == x.scalar_type(),
                  "sparse_linear_weight: malformed 'grad'");
  Tensor out = torch::stable::new_empty(x, {layout.alive});
  dispatch(dtype_of("sparse_linear_weight", x), [&](auto* tag) {
    using scalar_t = std::remove_pointer_t<decltype(tag)>;
    using acc_t = typename Accumulate<scalar_t>::type;
    const std::vector<Chunk> x_chunk = cpu::chunks_of(batch, columns, sizeof(acc_t));
    const std::vector<Chunk> grad_chunk = cpu::chunks_of(batch, layout.rows, sizeof(acc_t));
    const Buffer<acc_t> packed_x =
        pack<scalar_t, acc_t>(static_cast<const scalar_t*>(x.const_data_ptr()), columns, x_chunk);
    const Buffer<acc_t> packed_grad =
        pack<scalar_t, acc_t>(static_cast<const scalar_t*>(grad.const_data_ptr()), layout.rows, grad_chunk);
    auto* to = static_cast<scalar_t*>(out.mutable_data_ptr());
    Buffer<acc_t> sum;
    if (!std::is_same_v<scalar_t, acc_t>) sum = buffer<acc_t>(layout.alive);
    const Weight<scalar_t> weight{layout,
                                  x_chunk.data(),
                                  grad_chunk.data(),
                                  int64_t(x_chunk.size()),
                                  packed_x.get(),
                                  packed_grad.get(),
                                  sum ? sum.get() : reinterpret_cast<acc_t*>(to),
                                  to};
    const int64_t blocks = (layout.rows + kRows - 1) / kRows;
    torch::stable::parallel_for(0, blocks, grain_of(blocks, layout.alive, std::max<int64_t>(batch, 1)),
                                [&](int64_t begin, int64_t end) { run(weight, begin, end); });
  });
  STD_TORCH_CHECK(!wrong, "sparse_linear_weight: 'column' must be in [0, ", columns, ")");
  return out;
}

}  // namespace
}  // namespace zipfast

STABLE_TORCH_LIBRARY_IMPL(zipfast, CPU, m) {
  m.impl("sparse_linear", TORCH_BOX(&zipfast::sparse_linear_cpu));
  m.impl("sparse_linear_input", TORCH_BOX(&zipfast::sparse_linear_input_cpu));
  m.impl("sparse_linear_weight", TORCH_BOX(&zipfast::sparse_linear_weight_cpu));
}

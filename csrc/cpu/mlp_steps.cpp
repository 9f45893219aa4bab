// SPDX-License-Identifier: Apache-2.0
// mlp_steps_ on the CPU: T training iterations of a masked perceptron in one call (Frankle & Carbin 2019, section 2).
//
// Layers of low density are packed once, with the states of their survivors, and unpacked at the end: an iteration then
// costs what its survivors cost, in time and in memory touched.  mlp_steps.h holds what a layer computes; here are the
// packing, the batch, the loss and the order of the passes.  The input of a layer gets its gradient before the weights
// take their step, so that gradients of weights need no memory beyond a block (dense) or the survivors (sparse).
//
// Each pass of a layer is cut into pieces of rows or columns by the layer's shape and density alone, so that results
// have the same bits for any number of threads; layers as small as LeNet's are one piece.  Losses are added in float64,
// sample after sample.
#include <string>

#include "cpu/mlp_steps.h"
#include "stable.h"

namespace zipfast {
namespace {

using cpu::Buffer;
using cpu::MlpLayer;
using cpu::MlpRule;
using cpu::MlpUpdate;
using cpu::Wide;

constexpr int64_t kPieceWork = 1 << 21;   // multiply-adds of a piece: about 50 microseconds
constexpr int64_t kTileBytes = 24 << 10;  // activations of a tile of columns, half of a first cache or less
constexpr int64_t kLeastRun = 12;         // survivors that a row should have in a tile
constexpr int64_t kMostSide = 65536;      // columns and rows of a sparse layer are 16 bits

enum class Pass { batch, forward, samples, loss, input, step };

template <class T>
struct Net {
  std::vector<MlpLayer<T>> layer;
  MlpUpdate<T> update;
  int vectors = 1;  // V: a panel's samples are V * kLanes
  const T* data;
  const int64_t* label;
  std::vector<const T*> row;  // of this batch: the samples and their classes
  std::vector<int64_t> target;
  double loss;
  int64_t width() const { return vectors * Wide<T>::kLanes; }
  int64_t samples() const { return int64_t(row.size()); }
  int64_t panels() const { return (samples() + width() - 1) / width(); }
};

// The batch, transposed into panels, and as rows too where the first layer is dense.
template <int V, class T>
ZF_INLINE void gather(Net<T>& net) {
  constexpr int W = V * Wide<T>::kLanes;
  MlpLayer<T>& f = net.layer.front();
  if (!f.sparse)
    for (int64_t j = 0; j < net.samples(); ++j) std::copy_n(net.row[size_t(j)], f.in, f.sample + j * f.padded);
  for (int64_t p = 0; p < net.panels(); ++p) {
    T* x = f.x + p * f.in * W;
    const int64_t n = std::min<int64_t>(W, net.samples() - p * W);
    cpu::flip(net.row.data() + p * W, n, f.in, x, W);
    for (int64_t c = 0; n < W && c < f.in; ++c) std::fill(x + c * W + n, x + (c + 1) * W, T(0));
  }
}

// The input of a dense layer again, as rows of samples.
template <int V, class T>
ZF_INLINE void unflip(const Net<T>& net, const MlpLayer<T>& f) {
  constexpr int W = V * Wide<T>::kLanes, L = Wide<T>::kLanes;
  const T* source[Wide<T>::kLanes];
  for (int64_t p = 0; p < net.panels(); ++p)
    for (int64_t c = 0; c < f.in; c += L) {
      const int64_t n = std::min<int64_t>(L, f.in - c);
      for (int64_t k = 0; k < n; ++k) source[k] = f.x + (p * f.in + c + k) * W;
      cpu::flip(source, n, std::min<int64_t>(W, net.samples() - p * W), f.sample + p * W * f.padded + c, f.padded);
    }
}

// Softmax cross entropy: the loss, and (softmax - target) / samples into the gradient of the last layer.
template <int V, class T>
ZF_INLINE void cross_entropy(Net<T>& net) {
  constexpr int W = V * Wide<T>::kLanes;
  const MlpLayer<T>& f = net.layer.back();
  double loss = 0;
  for (int64_t p = 0; p < net.panels(); ++p) {
    const T* y = f.y + p * f.out * W;
    T *d = f.d + p * f.out * W, most[W], sum[W] = {};
    const int64_t n = std::min<int64_t>(W, net.samples() - p * W);
    std::fill(most, most + W, -std::numeric_limits<T>::infinity());
    for (int64_t k = 0; k < f.out; ++k)
#pragma omp simd
      for (int64_t j = 0; j < W; ++j) most[j] = y[k * W + j] > most[j] ? y[k * W + j] : most[j];
    for (int64_t k = 0; k < f.out; ++k) {
      for (int64_t j = 0; j < n; ++j) d[k * W + j] = std::exp(y[k * W + j] - most[j]);
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) sum[j] += d[k * W + j];
    }
    const int64_t* target = net.target.data() + p * W;
    for (int64_t j = 0; j < n; ++j) loss += double(std::log(sum[j]) + most[j] - y[target[j] * W + j]);
    const T count = T(net.samples());
    for (int64_t k = 0; k < f.out; ++k)
      for (int64_t j = 0; j < W; ++j) d[k * W + j] = j < n ? (d[k * W + j] / sum[j] - T(target[j] == k)) / count : T(0);
  }
  net.loss = loss / double(net.samples());
}

template <int V, class T>
ZF_INLINE void run_pass(Net<T>& net, Pass pass, int64_t l, int64_t piece) {
  const MlpLayer<T>& f = net.layer[size_t(l)];
  const bool columns = pass == Pass::input;
  const int64_t n = columns ? f.in : f.out, pieces = columns ? f.pieces_of_columns : f.pieces_of_rows;
  const int64_t begin = cpu::cut(n, pieces, piece), end = cpu::cut(n, pieces, piece + 1);
  switch (pass) {
    case Pass::batch:
      return gather<V>(net);
    case Pass::forward:
      return cpu::forward<V>(f, net.panels(), begin, end);
    case Pass::samples:
      return unflip<V>(net, f);
    case Pass::loss:
      return cross_entropy<V>(net);
    case Pass::input:
      return cpu::input_gradient<V>(f, net.panels(), begin, end);
    case Pass::step:
      return cpu::step<V>(f, net.update, net.samples(), net.panels(), begin, end);
  }
}

template <class T>
ZF_INLINE void run_any(Net<T>& net, Pass pass, int64_t l, int64_t piece) {
  if (net.vectors == 1) return run_pass<1>(net, pass, l, piece);
  if (net.vectors == 2) return run_pass<2>(net, pass, l, piece);
  run_pass<4>(net, pass, l, piece);
}

ZF_MULTIVERSION void run(Net<float>& net, Pass pass, int64_t l, int64_t piece) { run_any(net, pass, l, piece); }
ZF_MULTIVERSION void run(Net<double>& net, Pass pass, int64_t l, int64_t piece) { run_any(net, pass, l, piece); }

template <class T>
void run_pieces(Net<T>& net, Pass pass, int64_t l, int64_t pieces) {
  if (pieces == 1) return run(net, pass, l, 0);
  torch::stable::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) run(net, pass, l, p);
  });
}

template <class T>
void iterate(Net<T>& net) {
  const int64_t layers = int64_t(net.layer.size());
  run(net, Pass::batch, 0, 0);
  for (int64_t l = 0; l < layers; ++l) {
    if (l && !net.layer[size_t(l)].sparse) run(net, Pass::samples, l, 0);
    run_pieces(net, Pass::forward, l, net.layer[size_t(l)].pieces_of_rows);
  }
  run(net, Pass::loss, 0, 0);
  for (int64_t l = layers - 1; l >= 0; --l) {
    if (l) run_pieces(net, Pass::input, l, net.layer[size_t(l)].pieces_of_columns);
    run_pieces(net, Pass::step, l, net.layer[size_t(l)].pieces_of_rows);
  }
}

// --- packing --------------------------------------------------------------------------------------------------------

inline bool alive(const uint8_t* mask, int64_t i) { return !mask || (mask[i >> 3] >> (i & 7) & 1); }

inline uint64_t word(const uint8_t* mask, int64_t i) {  // 64 bits of a mask, whose length is a multiple of that
  uint64_t bits;
  std::memcpy(&bits, mask + 8 * i, sizeof bits);
  return bits;
}

int64_t survivors(const uint8_t* mask, int64_t n) {
  if (!mask) return n;
  int64_t count = 0;
  for (int64_t i = 0; i < (n + 63) / 64; ++i) count += __builtin_popcountll(word(mask, i));
  return count;
}

// Calls visit(i) for the survivors of [begin, end).
template <class F>
void each_alive(const uint8_t* mask, int64_t begin, int64_t end, F&& visit) {
  for (int64_t i = begin; i < end; ++i) {
    if (mask) {
      const uint64_t left = word(mask, i >> 6) >> (i & 63);
      i = left ? i + __builtin_ctzll(left) : i | 63;
      if (!left || i >= end) continue;
    }
    visit(i);
  }
}

// What a layer owns for one call.  `full`: the tensors [out, in] of weight and states, null where there is none.
template <class T>
struct Held {
  T* full[3];
  const uint8_t* mask;  // null: none
  std::vector<int8_t> keep;
  std::vector<T> packed[3], gradient;
  Buffer<T> y, d, sample;

  void pack(MlpLayer<T>& f, int64_t count, int64_t width, bool by_column) {
    const int64_t most = std::max<int64_t>(1, kTileBytes / (width * int64_t(sizeof(T))));
    f.tiles = std::max<int64_t>(1, std::min((f.in + most - 1) / most, count / (kLeastRun * f.out)));
    const int64_t tile = (f.in + f.tiles - 1) / f.tiles;
    std::vector<int64_t> from;  // where each survivor comes from
    from.reserve(size_t(count));
    for (int64_t t = 0; t < f.tiles; ++t)
      for (int64_t r = 0; r < f.out; ++r) {
        f.row.push_back(uint32_t(from.size()));
        each_alive(mask, r * f.in + std::min(f.in, t * tile), r * f.in + std::min(f.in, (t + 1) * tile),
                   [&](int64_t i) {
                     from.push_back(i);
                     f.column.push_back(uint16_t(i - r * f.in));
                   });
      }
    f.row.push_back(uint32_t(count));
    for (int k = 0; k < 3; ++k)
      if (full[k])
        for (int64_t i : from) packed[k].push_back(full[k][i]);
    if (by_column) {
      f.by_column.assign(size_t(f.in + 1), 0);
      for (int64_t i = 0; i < count; ++i) ++f.by_column[size_t(f.column[size_t(i)] + 1)];
      for (int64_t c = 0; c < f.in; ++c) f.by_column[size_t(c + 1)] += f.by_column[size_t(c)];
      std::vector<uint32_t> next(f.by_column.begin(), f.by_column.end() - 1);
      f.owner.resize(size_t(count));
      f.place.resize(size_t(count));
      for (int64_t t = 0; t < f.tiles; ++t)
        for (int64_t r = 0; r < f.out; ++r)
          for (uint32_t i = f.row[size_t(t * f.out + r)]; i < f.row[size_t(t * f.out + r + 1)]; ++i) {
            const uint32_t k = next[f.column[i]]++;
            f.owner[k] = uint16_t(r);
            f.place[k] = i;
          }
    }
    f.column.resize(size_t(count + 3), 0);  // sums are formed by fours
    gradient.resize(size_t(count + 4));
    f.gradient = gradient.data();
    f.w = packed[0].data();
    f.w1 = full[1] ? packed[1].data() : nullptr;
    f.w2 = full[2] ? packed[2].data() : nullptr;
  }

  void unpack(const MlpLayer<T>& f) const {
    for (int k = 0; k < 3; ++k) {
      if (!full[k]) continue;
      std::fill(full[k], full[k] + f.out * f.in, T(0));
      for (int64_t line = 0; line < f.tiles * f.out; ++line)
        for (uint32_t i = f.row[size_t(line)]; i < f.row[size_t(line + 1)]; ++i)
          full[k][line % f.out * f.in + f.column[i]] = packed[k][i];
    }
  }

  // Dense: the dead as bytes, and 0 whatever they hold.
  void drop(MlpLayer<T>& f) {
    if (!mask) return;
    keep.resize(size_t(f.out * f.in));
    for (int64_t i = 0; i < f.out * f.in; ++i) {
      keep[size_t(i)] = alive(mask, i);
      for (T* p : full)
        if (p && !keep[size_t(i)]) p[i] = 0;
    }
    f.keep = keep.data();
  }
};

struct Parameters {
  const std::vector<Tensor>&weight, &bias, &mask, &first, &second;
};

template <class T>
T* place_of(const std::vector<Tensor>& list, size_t i) {
  return i < list.size() ? list[i].mutable_data_ptr<T>() : nullptr;
}

template <class T>
Buffer<T> zeros(int64_t n) {
  Buffer<T> b = cpu::buffer<T>(std::max<int64_t>(n, 1));
  std::fill(b.get(), b.get() + n, T(0));
  return b;
}

template <class T>
void build(Net<T>& net, std::vector<Held<T>>& held, const Parameters& p, int64_t batch, double sparse_below) {
  constexpr int L = Wide<T>::kLanes;
  const size_t layers = p.weight.size();
  net.vectors = batch <= L ? 1 : batch <= 2 * L ? 2 : 4;
  const int64_t width = net.width(), samples = (batch + width - 1) / width * width;
  net.layer.resize(layers);
  held.resize(layers + 1);  // the last one holds the input
  held[layers].y = zeros<T>(p.weight[0].size(1) * samples);
  for (size_t l = 0; l < layers; ++l) {
    MlpLayer<T>& f = net.layer[l];
    Held<T>& h = held[l];
    f.out = p.weight[l].size(0);
    f.in = p.weight[l].size(1);
    f.relu = l + 1 < layers;
    h.full[0] = f.w = place_of<T>(p.weight, l);
    h.full[1] = f.w1 = place_of<T>(p.first, l);
    h.full[2] = f.w2 = place_of<T>(p.second, l);
    f.bias = place_of<T>(p.bias, l);
    f.b1 = place_of<T>(p.first, layers + l);
    f.b2 = place_of<T>(p.second, layers + l);
    h.mask = p.mask[l].numel() ? p.mask[l].const_data_ptr<uint8_t>() : nullptr;
    const int64_t n = f.out * f.in, count = survivors(h.mask, n);
    f.sparse = n > 0 && double(count) / double(n) < sparse_below && f.out <= kMostSide && f.in <= kMostSide &&
               n < int64_t(UINT32_MAX) - 8;
    f.padded = (f.in + 4 * L - 1) / (4 * L) * 4 * L;
    if (f.sparse) {
      h.pack(f, count, width, l > 0);
    } else {
      h.drop(f);
      h.sample = zeros<T>(f.padded * samples);
      f.sample = h.sample.get();
    }
    const int64_t work = std::max<int64_t>(1, (f.sparse ? count : n) * samples / kPieceWork);
    f.pieces_of_rows = std::min(work, (f.out + 3) / 4 + (f.out == 0));
    f.pieces_of_columns = std::min(work, (f.in + 3) / 4 + (f.in == 0));
    h.y = zeros<T>(f.out * samples);
    h.d = zeros<T>(f.out * samples);
    f.x = (l ? held[l - 1] : held[layers]).y.get();
    f.y = h.y.get();
    f.d = h.d.get();
    f.dx = l ? held[l - 1].d.get() : nullptr;
  }
}

struct Options {
  MlpRule rule;
  double beta1, beta2, eps, decay;
  bool nesterov;
  int64_t step;
};

// The constants of the step after `taken` others.
template <class T>
MlpUpdate<T> update_of(const Options& o, double lr, int64_t taken) {
  const bool adam = o.rule != MlpRule::sgd;
  const double k = double(taken + 1), bias1 = adam ? 1 - std::pow(o.beta1, k) : 1;
  const double bias2 = adam ? 1 - std::pow(o.beta2, k) : 1;
  return {o.rule,   adam || o.beta1 > 0, o.nesterov,    T(o.beta1),          T(o.beta2),
          T(o.eps), T(o.decay),          T(lr / bias1), T(1 - lr * o.decay), T(1 / std::sqrt(bias2))};
}

template <class T>
void train(const Parameters& p, const Tensor& data, const Tensor& label, const Tensor& order, const Tensor& lr,
           const Options& o, double sparse_below, double* loss) {
  const int64_t steps = order.size(0), batch = order.size(1), features = data.size(1);
  Net<T> net;
  std::vector<Held<T>> held;
  build(net, held, p, batch, sparse_below);
  const T* x = data.const_data_ptr<T>();
  const int64_t *y = label.const_data_ptr<int64_t>(), *rows = order.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < steps; ++t) {
    net.row.clear();
    net.target.clear();
    for (int64_t j = 0; j < batch; ++j) {
      const int64_t r = rows[t * batch + j];
      if (r < 0) continue;
      net.row.push_back(x + r * features);
      net.target.push_back(y[r]);
    }
    net.update = update_of<T>(o, lr.const_data_ptr<double>()[t], o.step + t);
    iterate(net);
    loss[t] = net.loss;
  }
  for (size_t l = 0; l < net.layer.size(); ++l)
    if (net.layer[l].sparse) held[l].unpack(net.layer[l]);
}

// What would read or write outside the arguments.
void check_memory(const Parameters& p, const Tensor& data, const Tensor& label, const Tensor& order, const Tensor& lr) {
  const size_t layers = p.weight.size();
  STD_TORCH_CHECK(layers > 0 && p.bias.size() == layers && p.mask.size() == layers, "mlp_steps_: malformed lists");
  auto same = [&](const std::vector<Tensor>& list, size_t i, const Tensor& like) {
    STD_TORCH_CHECK(list[i].numel() == like.numel() && list[i].is_contiguous(), "mlp_steps_: malformed parameters");
  };
  for (size_t l = 0; l < layers; ++l) {
    const Tensor& w = p.weight[l];
    const int64_t before = l ? p.weight[l - 1].size(0) : data.size(1);
    STD_TORCH_CHECK(w.dim() == 2 && w.size(1) == before && w.is_contiguous() && p.bias[l].is_contiguous() &&
                        p.bias[l].numel() == w.size(0) && p.mask[l].is_contiguous() &&
                        (p.mask[l].numel() == 0 || p.mask[l].numel() == (w.numel() + 511) / 512 * 64),
                    "mlp_steps_: malformed layer");
    for (const auto* list : {&p.first, &p.second}) {
      if (list->empty()) continue;
      STD_TORCH_CHECK(list->size() == 2 * layers, "mlp_steps_: malformed states");
      same(*list, l, w);
      same(*list, layers + l, p.bias[l]);
    }
  }
  const int64_t n = data.size(0), classes = p.weight.back().size(0), batch = order.size(1);
  STD_TORCH_CHECK(label.numel() == n && lr.numel() == order.size(0), "mlp_steps_: malformed 'label' or 'lr'");
  const int64_t *rows = order.const_data_ptr<int64_t>(), *y = label.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < order.size(0) * batch; ++i) {
    if (rows[i] < 0) continue;
    STD_TORCH_CHECK(rows[i] < n, "mlp_steps_: 'order' must be below N = ", n, ", got ", rows[i]);
    STD_TORCH_CHECK(y[rows[i]] >= 0 && y[rows[i]] < classes, "mlp_steps_: 'label' must be in [0, ", classes, "), got ",
                    y[rows[i]]);
  }
}

Tensor mlp_steps_cpu(const std::vector<Tensor>& weight, const std::vector<Tensor>& bias,
                     const std::vector<Tensor>& mask_, const std::vector<Tensor>& first,
                     const std::vector<Tensor>& second, const Tensor& data_, const Tensor& label_, const Tensor& order_,
                     const Tensor& lr_, std::string rule, double beta1, double beta2, double eps, double weight_decay,
                     bool nesterov, int64_t step, double sparse_below) {
  std::vector<Tensor> mask;
  for (const Tensor& m : mask_) mask.push_back(as_contiguous(m));
  const Tensor data = as_contiguous(data_), label = as_contiguous(label_), order = as_contiguous(order_),
               lr = as_contiguous(lr_);
  const Parameters p{weight, bias, mask, first, second};
  check_memory(p, data, label, order, lr);
  const Options o{rule == "sgd"    ? MlpRule::sgd
                  : rule == "adam" ? MlpRule::adam
                                   : MlpRule::adamw,
                  beta1,
                  beta2,
                  eps,
                  weight_decay,
                  nesterov,
                  step};
  const bool adam = o.rule != MlpRule::sgd;
  STD_TORCH_CHECK(first.empty() == !(adam || beta1 > 0) && second.empty() == !adam, "mlp_steps_: malformed states");
  Tensor loss = torch::stable::new_empty(data, {order.size(0)}, ScalarType::Double);
  auto* train_as = dtype_of("mlp_steps_", data) == DType::f64 ? train<double> : train<float>;
  train_as(p, data, label, order, lr, o, sparse_below, loss.mutable_data_ptr<double>());
  return loss;
}

}  // namespace
}  // namespace zipfast

STABLE_TORCH_LIBRARY_IMPL(zipfast, CPU, m) { m.impl("mlp_steps_", TORCH_BOX(&zipfast::mlp_steps_cpu)); }

// SPDX-License-Identifier: Apache-2.0
// gram on a GPU: k x k inner products of x_a - base, tensor by tensor, in two launches.
//
// Path "plain": a block owns kSoupPiece elements of one tensor and blocks of 4 x 4 pairs, as many as it has threads.
// Tile by tile it puts the differences of all models into shared memory, as float64; a thread adds the products of its
// 16 pairs over its slice of a tile's elements, in registers.  Shared memory bounds it: a read for two multiply-adds.
//
// Path "tensor": the tensor cores' product of 8 x 4 by 4 x 8 float64 numbers.  In a product of a matrix with its own
// transpose a lane holds the same number on either side, so that a lane loads four elements of one model in 16 bytes,
// takes the base away and multiplies them straight from its registers; a warp has a slice of the piece to itself, for
// up to 32 x 32 models.
//
// On both, a second kernel adds the pieces, a warp for each sum.  No atomics: equal on every run.
#include "cuda/soup.cuh"

namespace zipfast::cuda {

namespace {

constexpr int kWarps = kSoupThreads / 32;
constexpr int kShared = 5120;  // doubles: 40 KB
constexpr int kSide = 4;       // models of a block of pairs
constexpr int kOct = 8;        // models of a tensor core's operand

// Pairs (a <= b) of a triangle, row after row.
__device__ inline int pair_of(int a, int b, int side) { return a * side - a * (a - 1) / 2 + b - a; }
__device__ inline void pair_at(int pair, int side, int& a, int& b) {
  a = 0;
  while (pair >= side - a) pair -= side - a++;
  b = a + pair;
}

// Four elements of one tensor, x - base (zeros where there is none): rounded to float32, unless one of the tensors is
// float64.
template <class Type>
__device__ inline void difference(const uint32_t* word, DType dtype, const uint32_t* base, DType base_dtype, bool wide,
                                  double* out) {
  if (wide) {
    double from[4];
    Type::open(word, dtype, out);
    Type::open(base, base_dtype, from);
    ZF_UNROLL
    for (int e = 0; e < 4; ++e) out[e] -= from[e];
  } else {
    float value[4], from[4];
    Type::open(word, dtype, value);
    Type::open(base, base_dtype, from);
    ZF_UNROLL
    for (int e = 0; e < 4; ++e) out[e] = value[e] - from[e];
  }
}

__device__ inline void keep_pair(const GramJob& job, int a, int b, long long piece, double sum) {
  if (a <= b && b < job.list.models) job.part[pair_of(a, b, job.list.models) * job.list.blocks + piece] = sum;
}

// Products of blocks of 4 x 4 pairs [first, first + count) of a tensor's piece.
__device__ inline void plain_piece(const GramJob& job, const SoupPlace& place, long long piece, int first, int count,
                                   double* shared) {
  const SoupList& list = job.list;
  const int models = list.models, side = (models + kSide - 1) / kSide;
  const void* const* x = list.x + place.tensor * models;
  const uint8_t* dtype = list.dtype + place.tensor * models;
  const void* base = job.base[place.tensor];
  const DType base_dtype = DType(job.base_dtype[place.tensor]);
  const bool wide = job.wide[place.tensor], aligned = list.aligned[place.tensor];
  const int most = kShared / models / 4 * 4, width = most < 256 ? most : 256;  // shared [models, width]
  // Neighbouring threads have one block of pairs and neighbouring elements: no bank conflicts.
  const int slices = kSoupThreads / count, block = int(threadIdx.x) / slices, slice = int(threadIdx.x) % slices;
  int across = 0, down = 0;
  if (block < count) pair_at(first + block, side, across, down);
  int row[2][kSide];
  ZF_UNROLL
  for (int i = 0; i < kSide; ++i) {  // what lies behind the last model is computed and dropped
    row[0][i] = (across * kSide + i < models ? across * kSide + i : models - 1) * width;
    row[1][i] = (down * kSide + i < models ? down * kSide + i : models - 1) * width;
  }
  double sum[kSide][kSide] = {};
  for (long long begin = place.begin; begin < place.end; begin += width) {
    const int n = place.end - begin < width ? int(place.end - begin) : width, groups = (n + 3) / 4;
    __syncthreads();  // the tile before has been read
    for (int item = threadIdx.x; item < models * groups; item += kSoupThreads) {
      const int i = item / groups, at = item % groups * 4, left = n - at < 4 ? n - at : 4;
      uint32_t word[8], from[8] = {};
      double own[4];
      AnyType::fetch(x[i], DType(dtype[i]), begin + at, left, aligned && left == 4, word);
      if (base) AnyType::fetch(base, base_dtype, begin + at, left, aligned && left == 4, from);
      difference<AnyType>(word, DType(dtype[i]), from, base_dtype, wide, own);
      ZF_UNROLL
      for (int e = 0; e < 4; ++e) shared[i * width + at + e] = own[e];
    }
    __syncthreads();
    if (block >= count) continue;
    for (int k = slice; k < n; k += slices) {
      double a[kSide], b[kSide];
      ZF_UNROLL
      for (int i = 0; i < kSide; ++i) a[i] = shared[row[0][i] + k], b[i] = shared[row[1][i] + k];
      ZF_UNROLL
      for (int i = 0; i < kSide; ++i) {
        ZF_UNROLL
        for (int j = 0; j < kSide; ++j) sum[i][j] += a[i] * b[j];
      }
    }
  }
  __syncthreads();
  constexpr int kPairs = kSide * kSide;
  if (block < count) {
    ZF_UNROLL
    for (int i = 0; i < kPairs; ++i) shared[int(threadIdx.x) * kPairs + i] = sum[i / kSide][i % kSide];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < count * kPairs; i += kSoupThreads) {
    double total = 0;
    for (int s = 0; s < slices; ++s) total += shared[(i / kPairs * slices + s) * kPairs + i % kPairs];
    pair_at(first + i / kPairs, side, across, down);
    keep_pair(job, across * kSide + i % kPairs / kSide, down * kSide + i % kSide, piece, total);
  }
}

// c [8, 8] += a [8, 4] b [4, 8]; of a, b and c a lane has a[lane / 4][lane % 4], b[lane % 4][lane / 4] and
// c[lane / 4][2 (lane % 4) ...].
__device__ inline void multiply_8x4x8(double (&c)[2], double a, double b) {
#if defined(ZF_EMU) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800)
  const int lane = int(threadIdx.x) % 32, row = lane / 4, col = 2 * (lane % 4);
  for (int k = 0; k < 4; ++k) {
    const double left = __shfl_sync(kFullWarp, a, 4 * row + k);
    c[0] += left * __shfl_sync(kFullWarp, b, 4 * col + k);
    c[1] += left * __shfl_sync(kFullWarp, b, 4 * (col + 1) + k);
  }
#else
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
      : "+d"(c[0]), "+d"(c[1])
      : "d"(a), "d"(b));
#endif
}

// Of kOcts times eight models from the `first` one on, those that a lane of path "tensor" reads; the first model of all
// in place of those behind the last, whose products are dropped.
template <int kOcts>
struct Rows {
  const void* x[kOcts];
  uint32_t dtypes = 0;  // a byte each
  __device__ DType dtype(int o) const { return DType(dtypes >> 8 * o & 0xff); }
  __device__ Rows(const SoupList& list, int tensor, int first) {
    ZF_UNROLL
    for (int o = 0; o < kOcts; ++o) {
      const int model = first + o * kOct + int(threadIdx.x) % 32 / 4;
      const int of = tensor * list.models + (model < list.models ? model : 0);
      x[o] = list.x[of], dtypes |= uint32_t(list.dtype[of]) << 8 * o;
    }
  }
};

// Products of models [first, first + 8 kOcts) with [other, other + 8 kOcts); kDiagonal: with themselves.  A lane asks
// for kGroups groups of each of its models before it uses one.  `fold` holds 64 sums of each warp.
template <class Type, int kOcts, int kGroups, bool kDiagonal>
__device__ inline void tensor_piece(const GramJob& job, const SoupPlace& place, long long piece, int first, int other,
                                    double (*fold)[kOct * kOct]) {
  constexpr int kOthers = kDiagonal ? 1 : kOcts, kTurn = 16 * kGroups;
  const SoupList& list = job.list;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const void* base = job.base[place.tensor];
  const DType base_dtype = DType(job.base_dtype[place.tensor]);
  const bool wide = std::is_same_v<Type, AnyType> && job.wide[place.tensor], aligned = list.aligned[place.tensor];
  const Rows<kOcts> rows(list, place.tensor, first);
  const Rows<kOthers> others(list, place.tensor, other);
  double sum[kOcts][kOcts][2] = {};
  // Every lane takes every turn of its warp, as the products are the warp's.
  for (long long turn = place.begin + warp * kTurn; turn < place.end; turn += kWarps * kTurn) {
    uint32_t word[kGroups][kOcts][Type::kWords], with[kGroups][kOthers][Type::kWords];
    uint32_t from[kGroups][Type::kWords] = {};
    ZF_UNROLL
    for (int q = 0; q < kGroups; ++q) {
      const long long at = turn + q * 16 + lane % 4 * 4, left = place.end - at;
      const int n = left > 4 ? 4 : left > 0 ? int(left) : 0;
      const bool whole = aligned && n == 4;
      if (base) Type::fetch(base, base_dtype, at, n, whole, from[q]);
      ZF_UNROLL
      for (int o = 0; o < kOcts; ++o) {
        Type::fetch(rows.x[o], rows.dtype(o), at, n, whole, word[q][o]);
        if constexpr (!kDiagonal) Type::fetch(others.x[o], others.dtype(o), at, n, whole, with[q][o]);
      }
    }
    ZF_UNROLL
    for (int q = 0; q < kGroups; ++q) {
      double a[kOcts][4], b[kOthers][4];
      ZF_UNROLL
      for (int o = 0; o < kOcts; ++o) {
        difference<Type>(word[q][o], rows.dtype(o), from[q], base_dtype, wide, a[o]);
        if constexpr (!kDiagonal) difference<Type>(with[q][o], others.dtype(o), from[q], base_dtype, wide, b[o]);
      }
      ZF_UNROLL
      for (int e = 0; e < 4; ++e) {
        ZF_UNROLL
        for (int o = 0; o < kOcts; ++o) {
          ZF_UNROLL
          for (int p = kDiagonal ? o : 0; p < kOcts; ++p)
            multiply_8x4x8(sum[o][p], a[o][e], kDiagonal ? a[p][e] : b[kDiagonal ? 0 : p][e]);
        }
      }
    }
  }
  ZF_UNROLL
  for (int o = 0; o < kOcts; ++o) {
    ZF_UNROLL
    for (int p = kDiagonal ? o : 0; p < kOcts; ++p) {
      fold[warp][2 * lane] = sum[o][p][0], fold[warp][2 * lane + 1] = sum[o][p][1];
      __syncthreads();
      for (int i = threadIdx.x; i < kOct * kOct; i += kSoupThreads) {
        double total = fold[0][i];
        for (int w = 1; w < kWarps; ++w) total += fold[w][i];
        keep_pair(job, first + o * kOct + i / kOct, other + p * kOct + i % kOct, piece, total);
      }
      __syncthreads();  // before the next products
    }
  }
}

}  // namespace

// part [pairs a <= b, blocks], on both paths
__global__ void __launch_bounds__(kSoupThreads) gram_plain_kernel(const __grid_constant__ GramJob job) {
  __shared__ double shared[kShared];
  const int side = (job.list.models + kSide - 1) / kSide, all = side * (side + 1) / 2;
  const int chunks = (all + kSoupThreads - 1) / kSoupThreads, first = int(blockIdx.x) % chunks * kSoupThreads;
  const long long piece = blockIdx.x / chunks;
  plain_piece(job, soup_place(job.list, piece), piece, first, all - first < kSoupThreads ? all - first : kSoupThreads,
              shared);
}

// kAlone: all models are in one block of 8 kOcts, else a block of the grid has a pair of such blocks.  kFloats: all
// tensors are float32.  Both keep registers free, for a second block of threads on a multiprocessor.
template <int kOcts, bool kAlone, bool kFloats = false>
__global__ void __launch_bounds__(kSoupThreads, kAlone ? 2 : 1)
    gram_tensor_kernel(const __grid_constant__ GramJob job) {
  constexpr int kGroups = kOcts == 1   ? 4
                          : kOcts == 2 ? 2
                                       : 1;  // so that as much is in flight for few models as for many
  __shared__ double fold[kWarps][kOct * kOct];
  const int side = (job.list.models + kOct * kOcts - 1) / (kOct * kOcts), all = kAlone ? 1 : side * (side + 1) / 2;
  const long long piece = blockIdx.x / all;
  const SoupPlace place = soup_place(job.list, piece);
  int across = 0, down = 0;
  if (!kAlone) pair_at(int(blockIdx.x) % all, side, across, down);
  const int first = across * kOct * kOcts, other = down * kOct * kOcts;
  const auto run = [&](auto type, auto diagonal) {
    tensor_piece<decltype(type), kOcts, kGroups, decltype(diagonal)::value>(job, place, piece, first, other, fold);
  };
  const bool floats = job.list.same[place.tensor] == uint8_t(DType::f32);
  if constexpr (kFloats) {
    run(OneType<float>{}, std::true_type{});
  } else if (kAlone || first == other) {
    if (floats)
      run(OneType<float>{}, std::true_type{});
    else
      run(AnyType{}, std::true_type{});
  } else if constexpr (!kAlone) {
    if (floats)
      run(OneType<float>{}, std::false_type{});
    else
      run(AnyType{}, std::false_type{});
  }
}

// A warp per (tensor, a <= b): lane l adds pieces l, l + 32, ... in order; mirrored.
__global__ void __launch_bounds__(kSoupThreads) gram_add_kernel(const __grid_constant__ GramJob job) {
  const SoupList& list = job.list;
  const int models = list.models, pairs = models * (models + 1) / 2, lane = int(threadIdx.x) % 32;
  const long long at = (long long)blockIdx.x * kWarps + threadIdx.x / 32;
  if (at >= (long long)list.tensors * pairs) return;
  const int tensor = int(at / pairs), pair = int(at % pairs);
  int a, b;
  pair_at(pair, models, a, b);
  const long long first = list.tensor[tensor].first;
  const long long last = tensor + 1 < list.tensors ? list.tensor[tensor + 1].first : list.blocks;
  double sum = strided_sum<32>(job.part + pair * list.blocks + first, last - first, lane);
  if (last - first > 1) sum = warp_sum(sum);
  if (lane != 0) return;
  double* out = job.out + (list.column + tensor) * (long long)models * models;
  out[a * models + b] = out[b * models + a] = sum;
}

cudaError_t gram(const GramJob& job, bool tensor, cudaStream_t stream) {
  const SoupList& list = job.list;
  const auto triangle = [&](int step) {
    const long long side = (list.models + step - 1) / step;
    return side * (side + 1) / 2;
  };
  const unsigned threads = unsigned(kSoupThreads);
  if (list.blocks > 0) {
    bool floats = true;
    for (int j = 0; j < list.tensors; ++j) floats = floats && list.same[j] == uint8_t(DType::f32);
    const unsigned alone = unsigned(list.blocks), plain = unsigned((triangle(kSide) + threads - 1) / threads);
    if (!tensor)
      ZF_LAUNCH((gram_plain_kernel), alone * plain, threads, 0, stream, job);
    else if (list.models <= kOct)
      ZF_LAUNCH((gram_tensor_kernel<1, true>), alone, threads, 0, stream, job);
    else if (list.models <= 2 * kOct)
      ZF_LAUNCH((gram_tensor_kernel<2, true>), alone, threads, 0, stream, job);
    else if (list.models <= 4 * kOct && floats)
      ZF_LAUNCH((gram_tensor_kernel<4, true, true>), alone, threads, 0, stream, job);
    else
      ZF_LAUNCH((gram_tensor_kernel<4, false>), alone * unsigned(triangle(4 * kOct)), threads, 0, stream, job);
  }
  const long long sums = list.tensors * triangle(1);
  ZF_LAUNCH((gram_add_kernel), unsigned((sums + kWarps - 1) / kWarps), threads, 0, stream, job);
  return cudaGetLastError();
}

}  // namespace zipfast::cuda

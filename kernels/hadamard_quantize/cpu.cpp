// Rotate and quantize tokens on a CPU; reference.py defines it.
//
// 16 tokens are handled at once, one in each lane, so that a transform is additions of whole
// vectors. Rows go through LayerNorm and modulation first, where memory is contiguous.

#include "../hadamard.hpp"

#include <algorithm>
#include <cmath>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace {

constexpr int RANKS = 8;  // branch outputs that lie side by side

}  // namespace

extern "C" {

// Mirrored by cpu.py. Null stands for an operand that is left out; strides are in elements.
struct HadamardQuantize {
  const float* x;
  const float* shift;
  const float* scale;
  const float* signs;
  const float* inner;  // [order, order]
  const float* down;
  int8_t* codes;
  float* token_scale;
  float* token_offset;
  int32_t* code_sums;
  float* branch;
  int64_t rows, width, order, outer, rank, tokens_per_image;
  int64_t x_stride, shift_stride, scale_stride;
  float norm, layer_norm_eps, factor, epsilon, low, high;
  int32_t statistic, floor, threads, instruction_set;
};
}

namespace {

// What maps a token x to y = (x - mean) inverse (1 + scale) + shift.
struct LayerNorm {
  const float* shift;
  const float* scale;
  float mean, inverse;
};

template <class V>
INLINE LayerNorm layer_norm(const HadamardQuantize& q, int64_t m) {
  // Always 16 partial sums, so that a mean is the same on every instruction set.
  constexpr int LANES = V::LANES, VECTORS = TOKENS / LANES;
  typename V::Floats sums[VECTORS] = {}, squares[VECTORS] = {};
  float mean = 0.0f, variance = 0.0f;
  const int64_t width = q.width, whole = width / TOKENS * TOKENS, image = m / q.tokens_per_image;
  const float* x = q.x + m * q.x_stride;
  for (int64_t k = 0; k < whole; k += TOKENS)
    for (int v = 0; v < VECTORS; v++) sums[v] += V::load(x + k + v * LANES);
  for (int i = 0; i < TOKENS; i++) mean += sums[i / LANES][i % LANES];
  for (int64_t k = whole; k < width; k++) mean += x[k];
  mean /= static_cast<float>(width);
  for (int64_t k = 0; k < whole; k += TOKENS)
    for (int v = 0; v < VECTORS; v++) {
      const typename V::Floats centred = V::load(x + k + v * LANES) - mean;
      squares[v] += centred * centred;
    }
  for (int i = 0; i < TOKENS; i++) variance += squares[i / LANES][i % LANES];
  for (int64_t k = whole; k < width; k++) variance += (x[k] - mean) * (x[k] - mean);
  variance /= static_cast<float>(width);
  return {q.shift + image * q.shift_stride, q.scale + image * q.scale_stride, mean,
          1.0f / std::sqrt(variance + q.layer_norm_eps)};
}

// Tokens [first, first + count), one per lane, after LayerNorm, modulation and signs, times the
// norm of the transform; lanes without a token are zero.
template <class V>
INLINE void prepare(const HadamardQuantize& q, int64_t first, int count, typename V::Floats* z) {
  constexpr int LANES = V::LANES;
  using Floats = typename V::Floats;
  using Ints = typename V::Ints;
  LayerNorm norms[LANES];
  if (q.shift)
    for (int i = 0; i < count; i++) norms[i] = layer_norm<V>(q, first + i);
  const float* x = q.x + first * q.x_stride;
  for (int64_t k = 0; k < q.width; k += LANES) {
    const int64_t columns = std::min<int64_t>(LANES, q.width - k);
    const auto load = [&](const float* from) __attribute__((always_inline)) {
      if (columns == LANES) return V::load(from);
      Floats y{};
      memcpy(&y, from, columns * sizeof(float));
      return y;
    };
    const Floats signs = q.signs ? load(q.signs + k) * q.norm : V::floats(q.norm);
    Ints tile[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
      tile[i] = Ints{};
      if (i >= count) continue;
      Floats y = load(x + i * q.x_stride + k);
      if (q.shift) {
        const LayerNorm& norm = norms[i];
        y = (y - norm.mean) * norm.inverse * (1.0f + load(norm.scale + k)) + load(norm.shift + k);
      }
      tile[i] = bits<Ints>(y * signs);
    }
    V::transpose(tile);
    if (columns == LANES)
      memcpy(z + k, tile, sizeof tile);
    else
      memcpy(z + k, tile, columns * sizeof(Floats));
  }
}

// z @ down.T of the tokens that exist.
// `down` is [rank / RANKS][width][RANKS], GROUPS of which are done at once.
template <class V, int GROUPS>
INLINE void project(const HadamardQuantize& q, const float* down, int64_t group, int64_t first,
                    int count, const typename V::Floats* z) {
  using Floats = typename V::Floats;
  constexpr int ALL = GROUPS * RANKS;
  down += group * RANKS * q.width;
  Floats total[ALL] = {};
  for (int64_t begin = 0; begin < q.width; begin += PART) {
    Floats part[ALL] = {};
    for (int64_t k = begin; k < std::min(q.width, begin + PART); k++)
#pragma GCC unroll 16
      for (int i = 0; i < ALL; i++) {
        const float weight = down[(i / RANKS * q.width + k) * RANKS + i % RANKS];
        part[i] = V::multiply_add(z[k], V::floats(weight), part[i]);
      }
    for (int i = 0; i < ALL; i++) total[i] += part[i];
  }
  const int64_t r = group * RANKS;
  for (int i = 0; i < ALL && r + i < q.rank; i++)
    for (int t = 0; t < count; t++) q.branch[(first + t) * q.rank + r + i] = total[i][t];
}

struct Scratch {
  float* z;         // [width, 16]
  float* shared;    // [max(16 quads, outer), 16]
  uint8_t* patterns;  // [order, quads]
  float* down;        // as `project` takes it
};

// Tokens from `first`, one per lane.
template <class V>
INLINE void block(const HadamardQuantize& q, int64_t first, const Scratch& scratch) {
  constexpr int LANES = V::LANES;
  using Floats = typename V::Floats;
  using Ints = typename V::Ints;
  const int64_t width = q.width;
  const int count = static_cast<int>(std::min<int64_t>(LANES, q.rows - first));
  Floats* z = reinterpret_cast<Floats*>(scratch.z);
  prepare<V>(q, first, count, z);
  if (q.inner) transform<V>(q, scratch.patterns, z, reinterpret_cast<Floats*>(scratch.shared));

  const Levels<V> l = levels<V>(q, z);
  Ints sums{};
  for (int64_t k = 0; k < width; k += 4 * LANES) {
    const int64_t columns = std::min<int64_t>(4 * LANES, width - k);
    Ints tile[LANES];  // four codes of a token in a lane
    if (columns == 4 * LANES) {
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) {
        tile[i] = Ints{};
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
          const Ints c = code<V>(q, l, z[k + 4 * i + j]);
          sums += c;
          tile[i] |= (c & 255) << (8 * j);
        }
      }
    } else {
      for (int i = 0; i < LANES; i++) tile[i] = Ints{};
      for (int i = 0; i < columns; i++) {
        const Ints c = code<V>(q, l, z[k + i]);
        sums += c;
        tile[i / 4] |= (c & 255) << (8 * (i % 4));
      }
    }
    V::transpose(tile);
    int8_t* codes = q.codes + first * width + k;
    if (columns == 4 * LANES)
      for (int i = 0; i < count; i++) memcpy(codes + i * width, &tile[i], sizeof(Ints));
    else
      for (int i = 0; i < count; i++) memcpy(codes + i * width, &tile[i], columns);
  }
  const Floats offset = q.floor ? l.shift + l.scale / 2.0f : l.shift;
  memcpy(q.token_scale + first, &l.scale, count * sizeof(float));
  memcpy(q.token_offset + first, &offset, count * sizeof(float));
  memcpy(q.code_sums + first, &sums, count * sizeof(int32_t));
  const int64_t groups = (q.rank + RANKS - 1) / RANKS;
  int64_t group = 0;
  if (LANES == 16)  // has registers for two
    for (; group + 2 <= groups; group += 2)
      project<V, 2>(q, scratch.down, group, first, count, z);
  for (; group < groups; group++) project<V, 1>(q, scratch.down, group, first, count, z);
}

// Tokens [first, first + 16) that exist.
template <class V>
INLINE void tokens(const HadamardQuantize& q, int64_t first, const Scratch& scratch) {
  for (int64_t m = first; m < std::min(q.rows, first + TOKENS); m += V::LANES)
    block<V>(q, m, scratch);
}

void portable(const HadamardQuantize& q, int64_t first, const Scratch& scratch) {
  tokens<Vectors<4, false>>(q, first, scratch);
}

#if defined(X86)
TARGET_AVX2 void avx2(const HadamardQuantize& q, int64_t first, const Scratch& scratch) {
  tokens<Vectors<8, true>>(q, first, scratch);
}

TARGET_AVX512 void avx512(const HadamardQuantize& q, int64_t first, const Scratch& scratch) {
  tokens<Vectors<16, true>>(q, first, scratch);
}
#endif

}  // namespace

// 0; nothing was written where memory ran out (1) or `inner` has another entry than ±1 (2).
extern "C" int32_t robuq_hadamard_quantize(const HadamardQuantize* arguments) {
  const HadamardQuantize& q = *arguments;
  void (*run)(const HadamardQuantize&, int64_t, const Scratch&) = portable;
#if defined(X86)
  if (q.instruction_set == AVX2_FMA) run = avx2;
  if (q.instruction_set >= AVX512_VNNI) run = avx512;
#endif
  const int64_t blocks = (q.rows + TOKENS - 1) / TOKENS;
  const int threads = static_cast<int>(std::min<int64_t>(std::max(1, q.threads), blocks));
  if (threads == 0) return 0;
  const int64_t quads = (q.order + QUAD - 1) / QUAD;
  const int64_t shared_size = std::max(quads * SUMS, q.outer) * TOKENS;
  const auto z = allocate<float>(threads * q.width * TOKENS);
  const auto shared = allocate<float>(threads * shared_size);
  const auto patterns = allocate<uint8_t>(q.order * quads);
  const auto down = allocate<float>(round_up(q.rank, RANKS) * q.width);
  if (!z || !shared || !patterns || !down) return 1;
  if (q.inner && !find_patterns(q.inner, q.order, patterns.get())) return 2;
  for (int64_t r = 0; r < round_up(q.rank, RANKS); r++)
    for (int64_t k = 0; k < q.width; k++)
      down[(r / RANKS * q.width + k) * RANKS + r % RANKS] =
          r < q.rank ? q.down[r * q.width + k] : 0.0f;
#pragma omp parallel num_threads(threads)
  {
#if defined(_OPENMP)
    const int thread = omp_get_thread_num();
#else
    const int thread = 0;
#endif
    const Scratch scratch{&z[thread * q.width * TOKENS], &shared[thread * shared_size],
                          patterns.get(), down.get()};
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; b++) run(q, b * TOKENS, scratch);
  }
  return 0;
}

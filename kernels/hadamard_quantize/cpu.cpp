// Rotate and quantize tokens on a CPU; reference.py defines it.
//
// 16 tokens are handled at once, one in each lane, so that a transform is additions of whole
// vectors. Rows go through LayerNorm and modulation first, where memory is contiguous.

#include "../cpu.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace {

constexpr int TOKENS = 16;  // of a work item
constexpr int QUAD = 4;     // inputs whose signed sums are shared by all outputs
constexpr int SUMS = 16;    // signed sums of a quad
constexpr int PART = 128;   // columns of a partial sum: long fp32 sums lose digits
constexpr int RANKS = 8;    // branch outputs that lie side by side

enum Statistic : int32_t { MEAN_MAD, MIN_MAX, ABSMAX, ABSMEAN };

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

// A token after LayerNorm, modulation and signs, times the norm of the transform.
template <class V>
INLINE void prepare(const HadamardQuantize& q, int64_t m, float* row) {
  const int64_t width = q.width, image = m / q.tokens_per_image;
  const float* x = q.x + m * q.x_stride;
  if (q.shift) {
    // Always 16 partial sums, so that a mean is the same on every instruction set.
    constexpr int LANES = V::LANES, VECTORS = TOKENS / LANES;
    typename V::Floats sums[VECTORS] = {}, squares[VECTORS] = {};
    float mean = 0.0f, variance = 0.0f;
    const int64_t whole = width / TOKENS * TOKENS;
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
    const float inverse = 1.0f / std::sqrt(variance + q.layer_norm_eps);
    const float* shift = q.shift + image * q.shift_stride;
    const float* scale = q.scale + image * q.scale_stride;
    for (int64_t k = 0; k < width; k++)
      row[k] = (x[k] - mean) * inverse * (1.0f + scale[k]) + shift[k];
    x = row;
  }
  if (q.signs)
    for (int64_t k = 0; k < width; k++) row[k] = x[k] * (q.signs[k] * q.norm);
  else
    for (int64_t k = 0; k < width; k++) row[k] = x[k] * q.norm;
}

// x [outer, m] of the tokens becomes Sylvester(outer) x H.
//
// The signs of four rows of H in column j are one of 16 patterns; bit i of patterns[j, quad] is set
// where row 4 quad + i has -1. `shared` has room for 16 signed sums per quad, and for a column.
template <class V>
INLINE void transform(const HadamardQuantize& q, const uint8_t* patterns, typename V::Floats* z,
                      typename V::Floats* shared) {
  using Floats = typename V::Floats;
  const int64_t m = q.order, quads = (m + QUAD - 1) / QUAD;
  for (int64_t o = 0; o < q.outer; o++) {
    Floats* x = z + o * m;
    for (int64_t quad = 0; quad < quads; quad++) {
      Floats in[QUAD];
      for (int i = 0; i < QUAD; i++) in[i] = QUAD * quad + i < m ? x[QUAD * quad + i] : Floats{};
      const Floats first[4] = {in[0] + in[1], in[1] - in[0], in[0] - in[1], -in[0] - in[1]};
      const Floats second[4] = {in[2] + in[3], in[3] - in[2], in[2] - in[3], -in[2] - in[3]};
      Floats* sums = shared + quad * SUMS;
#pragma GCC unroll 16
      for (int s = 0; s < SUMS; s++) sums[s] = first[s % 4] + second[s / 4];
    }
    for (int64_t j = 0; j < m; j++) {
      const uint8_t* pattern = patterns + j * quads;
      Floats y = shared[pattern[0]];
      const Floats* sums = shared + SUMS;
#pragma GCC unroll 4
      for (int64_t quad = 1; quad < quads; quad++, sums += SUMS) y += sums[pattern[quad]];
      x[j] = y;
    }
  }
  if (q.outer == 1) return;
  // Factors [[1, 1], [1, -1]] of a column at a time, which the first-level cache holds.
  for (int64_t j = 0; j < m; j++) {
    Floats* column = shared;
    for (int64_t o = 0; o < q.outer; o++) column[o] = z[o * m + j];
    int64_t stage = q.outer / 2;
    for (; stage >= 2; stage /= 4) {
      const int64_t near = stage / 2;
      for (Floats* block = column; block < column + q.outer; block += 2 * stage)
        for (Floats* p = block; p < block + near; p++) {
          const Floats a = p[0] + p[stage], c = p[0] - p[stage];
          const Floats b = p[near] + p[stage + near], d = p[near] - p[stage + near];
          p[0] = a + b, p[near] = a - b, p[stage] = c + d, p[stage + near] = c - d;
        }
    }
    for (int64_t o = 0; o < q.outer; o += 2) {
      const Floats a = column[o], b = column[o + 1];
      z[o * m + j] = stage ? a + b : a;
      z[(o + 1) * m + j] = stage ? a - b : b;
    }
  }
}

template <class V>
INLINE typename V::Floats magnitude(typename V::Floats x) {
  return bits<typename V::Floats>(bits<typename V::Ints>(x) & 0x7fffffff);
}

// Sum over the columns of |z - shift|, or of z - shift, by parts.
template <class V, bool MAGNITUDE>
INLINE typename V::Floats sum(const typename V::Floats* z, int64_t width,
                              typename V::Floats shift) {
  using Floats = typename V::Floats;
  Floats total{};
  for (int64_t begin = 0; begin < width; begin += PART) {
    const int64_t end = std::min(width, begin + PART);
    Floats part[4] = {};
    int64_t k = begin;
    for (; k + 4 <= end; k += 4)
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++)
        part[i] += MAGNITUDE ? magnitude<V>(z[k + i] - shift) : z[k + i] - shift;
    for (; k < end; k++) part[0] += MAGNITUDE ? magnitude<V>(z[k] - shift) : z[k] - shift;
    total += (part[0] + part[1]) + (part[2] + part[3]);
  }
  return total;
}

template <class V>
struct Levels {
  typename V::Floats scale, shift, inverse;
};

template <class V>
INLINE Levels<V> levels(const HadamardQuantize& q, const typename V::Floats* z) {
  using Floats = typename V::Floats;
  const float count = static_cast<float>(q.width);
  Floats shift{}, statistic{};
  if (q.statistic == MEAN_MAD) shift = sum<V, false>(z, q.width, shift) / count;
  if (q.statistic == MEAN_MAD || q.statistic == ABSMEAN) {
    statistic = sum<V, true>(z, q.width, shift) / count;
  } else {
    Floats low = z[0], high = z[0], most{}, infinite{};
    for (int64_t k = 0; k < q.width; k++) {
      const Floats v = z[k], a = magnitude<V>(v);
      low = v < low ? v : low;
      high = v > high ? v : high;
      most = a > most ? a : most;
      infinite += v * 0.0f;  // NaN where v is, which no comparison shows
    }
    if (q.statistic == MIN_MAX) {
      shift = low;
      statistic = high - low + infinite;
    } else {
      statistic = most + infinite;
    }
  }
  const Floats scale = q.factor * statistic;
  if (q.statistic == MIN_MAX) shift -= q.low * scale;
  const Floats divisor = q.factor * (statistic + q.epsilon);
  const float infinity = std::numeric_limits<float>::infinity();
  Floats inverse = 1.0f / divisor;
  inverse = inverse < infinity ? inverse : Floats{};
  const Floats one = V::floats(1.0f);
  return {scale < infinity ? scale : one, scale < infinity ? shift : Floats{},
          scale < infinity ? inverse : one};
}

template <class V>
INLINE typename V::Ints code(const HadamardQuantize& q, const Levels<V>& l,
                             typename V::Floats z) {
  using Floats = typename V::Floats;
  Floats t = (z - l.shift) * l.inverse;
  t = t > q.low ? t : V::floats(q.low);  // also NaN
  t = t < q.high ? t : V::floats(q.high);
  constexpr float ROUNDER = 12582912.0f;  // 1.5 * 2^23: adding it rounds half to even
  Floats whole = (t + ROUNDER) - ROUNDER;
  if (q.floor) whole = whole > t ? whole - 1.0f : whole;
  return V::int_of(whole);
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
  float* rows;      // [16, round_up(width, 16)]
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
  const int64_t width = q.width, padded = round_up(width, LANES);
  const int count = static_cast<int>(std::min<int64_t>(LANES, q.rows - first));
  Floats* z = reinterpret_cast<Floats*>(scratch.z);
  for (int i = 0; i < count; i++) prepare<V>(q, first + i, scratch.rows + i * padded);
  for (int64_t k = 0; k < width; k += LANES) {
    Ints tile[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) memcpy(&tile[i], scratch.rows + i * padded + k, sizeof(Ints));
    V::transpose(tile);
    if (k + LANES <= width)
      memcpy(z + k, tile, sizeof tile);
    else
      memcpy(z + k, tile, (width - k) * sizeof(Floats));
  }
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

// The pattern of every column and quad of rows of `inner`; whether all its entries are ±1.
bool find_patterns(const float* inner, int64_t m, uint8_t* patterns) {
  const int64_t quads = (m + QUAD - 1) / QUAD;
  memset(patterns, 0, m * quads);
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < m; j++) {
      const float entry = inner[i * m + j];
      if (entry != 1.0f && entry != -1.0f) return false;
      if (entry < 0.0f) patterns[j * quads + i / QUAD] |= 1 << i % QUAD;
    }
  return true;
}

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
  const int64_t row_size = round_up(q.width, TOKENS) * TOKENS;
  const int64_t quads = (q.order + QUAD - 1) / QUAD;
  const int64_t shared_size = std::max(quads * SUMS, q.outer) * TOKENS;
  const auto rows = allocate<float>(threads * row_size);
  const auto z = allocate<float>(threads * q.width * TOKENS);
  const auto shared = allocate<float>(threads * shared_size);
  const auto patterns = allocate<uint8_t>(q.order * quads);
  const auto down = allocate<float>(round_up(q.rank, RANKS) * q.width);
  if (!rows || !z || !shared || !patterns || !down) return 1;
  if (q.inner && !find_patterns(q.inner, q.order, patterns.get())) return 2;
  // Lanes without a token compute with what is here.
  std::fill_n(rows.get(), threads * row_size, 0.0f);
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
    const Scratch scratch{&rows[thread * row_size], &z[thread * q.width * TOKENS],
                          &shared[thread * shared_size], patterns.get(), down.get()};
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; b++) run(q, b * TOKENS, scratch);
  }
  return 0;
}

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

constexpr int QUAD = 4;     // inputs whose signed sums are shared by all outputs
constexpr int SUMS = 16;    // signed sums of a quad
constexpr int PART = 128;   // columns of a partial sum: long fp32 sums lose digits
constexpr int RANKS = 8;    // branch outputs accumulated at once

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
INLINE void prepare(const HadamardQuantize& q, int64_t m, float* row) {
  const int64_t width = q.width, image = m / q.tokens_per_image;
  const float* x = q.x + m * q.x_stride;
  if (q.shift) {
    Floats sum{}, squares{};
    float mean = 0.0f, variance = 0.0f;
    const int64_t whole = width / LANES * LANES;
    for (int64_t k = 0; k < whole; k += LANES) sum += load<Floats>(x + k);
    for (int i = 0; i < LANES; i++) mean += sum[i];
    for (int64_t k = whole; k < width; k++) mean += x[k];
    mean /= static_cast<float>(width);
    for (int64_t k = 0; k < whole; k += LANES) {
      const Floats centred = load<Floats>(x + k) - mean;
      squares += centred * centred;
    }
    for (int i = 0; i < LANES; i++) variance += squares[i];
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

// x [outer, m] of 16 tokens becomes Sylvester(outer) x H.
//
// The signs of four rows of H in column j are one of 16 patterns; bit i of patterns[j, quad] is set
// where row 4 quad + i has -1. `shared` has room for the 16 signed sums of every quad.
INLINE void transform(const HadamardQuantize& q, const uint8_t* patterns, Floats* z,
                      Floats* shared) {
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
      for (int64_t quad = 1; quad < quads; quad++) y += shared[quad * SUMS + pattern[quad]];
      x[j] = y;
    }
  }
  // Factors [[1, 1], [1, -1]], first factor first; two of them share a pass over memory.
  int64_t stage = q.outer / 2;
  for (; stage >= 2; stage /= 4) {
    const int64_t far = stage * m, near = far / 2;
    for (int64_t block = 0; block < q.outer * m; block += 2 * far)
      for (Floats* p = z + block; p < z + block + near; p++) {
        const Floats a = p[0] + p[far], c = p[0] - p[far];
        const Floats b = p[near] + p[far + near], d = p[near] - p[far + near];
        p[0] = a + b, p[near] = a - b, p[far] = c + d, p[far + near] = c - d;
      }
  }
  if (stage == 1)
    for (Floats* block = z; block < z + q.outer * m; block += 2 * m)
      for (Floats* p = block; p < block + m; p++) {
        const Floats a = p[0], b = p[m];
        p[0] = a + b, p[m] = a - b;
      }
}

INLINE Floats magnitude(const Floats& x) { return bits<Floats>(bits<Ints>(x) & 0x7fffffff); }

// Sum over the columns of f(z), by parts.
template <class F>
INLINE Floats sum(const Floats* z, int64_t width, F f) {
  Floats total{};
  for (int64_t begin = 0; begin < width; begin += PART) {
    const int64_t end = std::min(width, begin + PART);
    Floats part[4] = {};
    int64_t k = begin;
    for (; k + 4 <= end; k += 4)
      for (int i = 0; i < 4; i++) part[i] += f(z[k + i]);
    for (; k < end; k++) part[0] += f(z[k]);
    total += (part[0] + part[1]) + (part[2] + part[3]);
  }
  return total;
}

struct Levels {
  Floats scale, shift, inverse;
};

INLINE Levels levels(const HadamardQuantize& q, const Floats* z) {
  const float count = static_cast<float>(q.width);
  Floats shift{}, statistic{};
  if (q.statistic == MEAN_MAD) {
    shift = sum(z, q.width, [](const Floats& v) INLINE_LAMBDA { return v; }) / count;
    statistic = sum(z, q.width, [&](const Floats& v) INLINE_LAMBDA { return magnitude(v - shift); });
    statistic /= count;
  } else if (q.statistic == ABSMEAN) {
    statistic = sum(z, q.width, [](const Floats& v) INLINE_LAMBDA { return magnitude(v); }) / count;
  } else {
    Floats low = z[0], high = z[0], most{}, infinite{};
    for (int64_t k = 0; k < q.width; k++) {
      const Floats v = z[k], a = magnitude(v);
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
  Floats scale = q.factor * statistic;
  if (q.statistic == MIN_MAX) shift -= q.low * scale;
  const Floats divisor = q.factor * (statistic + q.epsilon);
  Floats inverse = divisor > 0.0f ? 1.0f / divisor : Floats{};
  const float infinity = std::numeric_limits<float>::infinity();
  inverse = inverse < infinity ? inverse : Floats{};
  const auto alive = scale < infinity;
  return {alive ? scale : floats(1.0f), alive ? shift : Floats{}, alive ? inverse : floats(1.0f)};
}

INLINE Ints code(const HadamardQuantize& q, const Levels& l, const Floats& z) {
  Floats t = (z - l.shift) * l.inverse;
  t = t > q.low ? t : floats(q.low);  // also NaN
  t = t < q.high ? t : floats(q.high);
  constexpr float ROUNDER = 12582912.0f;  // 1.5 * 2^23: adding it rounds half to even
  Floats whole = (t + ROUNDER) - ROUNDER;
  if (q.floor) whole = whole > t ? whole - 1.0f : whole;
  return int_of(whole);
}

// Tokens [first, first + 16) that exist. `rows` [16, round_up(width, 16)] and z are scratch.
template <bool FMA>
INLINE void block(const HadamardQuantize& q, const uint8_t* patterns, int64_t first, float* rows,
                  Floats* z, Floats* shared) {
  const int64_t width = q.width, padded = round_up(width, LANES);
  const int count = static_cast<int>(std::min<int64_t>(LANES, q.rows - first));
  for (int i = 0; i < count; i++) prepare(q, first + i, rows + i * padded);
  for (int64_t k = 0; k < width; k += LANES) {
    Ints tile[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) tile[i] = load<Ints>(reinterpret_cast<int32_t*>(rows + i * padded + k));
    transpose(tile);
    const int columns = static_cast<int>(std::min<int64_t>(LANES, width - k));
    memcpy(z + k, tile, columns * sizeof(Floats));
  }
  if (q.inner) transform(q, patterns, z, shared);

  const Levels l = levels(q, z);
  Ints sums{};
  for (int64_t k = 0; k < width; k += 4 * LANES) {
    Ints tile[LANES];  // four codes of a token in a lane
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
      tile[i] = Ints{};
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        if (k + 4 * i + j >= width) break;
        const Ints c = code(q, l, z[k + 4 * i + j]);
        sums += c;
        tile[i] |= (c & 255) << (8 * j);
      }
    }
    transpose(tile);
    const size_t columns = static_cast<size_t>(std::min<int64_t>(4 * LANES, width - k));
    for (int i = 0; i < count; i++) memcpy(q.codes + (first + i) * width + k, &tile[i], columns);
  }
  const Floats offset = q.floor ? l.shift + l.scale / 2.0f : l.shift;
  memcpy(q.token_scale + first, &l.scale, count * sizeof(float));
  memcpy(q.token_offset + first, &offset, count * sizeof(float));
  memcpy(q.code_sums + first, &sums, count * sizeof(int32_t));

  for (int64_t r = 0; r < q.rank; r += RANKS) {
    const float* down[RANKS];
    for (int i = 0; i < RANKS; i++) down[i] = q.down + std::min(r + i, q.rank - 1) * width;
    Floats total[RANKS] = {};
    for (int64_t begin = 0; begin < width; begin += PART) {
      Floats part[RANKS] = {};
      for (int64_t k = begin; k < std::min(width, begin + PART); k++)
#pragma GCC unroll 8
        for (int i = 0; i < RANKS; i++) part[i] = multiply_add<FMA>(z[k], floats(down[i][k]), part[i]);
      for (int i = 0; i < RANKS; i++) total[i] += part[i];
    }
    for (int i = 0; i < RANKS && r + i < q.rank; i++)
      for (int t = 0; t < count; t++) q.branch[(first + t) * q.rank + r + i] = total[i][t];
  }
}

void portable(const HadamardQuantize& q, const uint8_t* patterns, int64_t first, float* rows,
              Floats* z, Floats* shared) {
  block<false>(q, patterns, first, rows, z, shared);
}

#if defined(X86)
TARGET_AVX2 void avx2(const HadamardQuantize& q, const uint8_t* patterns, int64_t first,
                      float* rows, Floats* z, Floats* shared) {
  block<true>(q, patterns, first, rows, z, shared);
}

TARGET_AVX512 void avx512(const HadamardQuantize& q, const uint8_t* patterns, int64_t first,
                          float* rows, Floats* z, Floats* shared) {
  block<true>(q, patterns, first, rows, z, shared);
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
  void (*tokens)(const HadamardQuantize&, const uint8_t*, int64_t, float*, Floats*, Floats*) =
      portable;
#if defined(X86)
  if (q.instruction_set == AVX2_FMA) tokens = avx2;
  if (q.instruction_set >= AVX512_VNNI) tokens = avx512;
#endif
  const int64_t blocks = (q.rows + LANES - 1) / LANES;
  const int threads = static_cast<int>(std::min<int64_t>(std::max(1, q.threads), blocks));
  if (threads == 0) return 0;
  const int64_t row_size = round_up(q.width, LANES) * LANES;
  const int64_t quads = (q.order + QUAD - 1) / QUAD, shared_size = quads * SUMS;
  const auto rows = allocate<float>(threads * row_size);
  const auto z = allocate<Floats>(threads * q.width);
  const auto shared = allocate<Floats>(threads * shared_size);
  const auto patterns = allocate<uint8_t>(q.order * quads);
  if (!rows || !z || !shared || !patterns) return 1;
  if (q.inner && !find_patterns(q.inner, q.order, patterns.get())) return 2;
  // Lanes without a token compute with what is here.
  std::fill_n(rows.get(), threads * row_size, 0.0f);
#pragma omp parallel num_threads(threads)
  {
#if defined(_OPENMP)
    const int thread = omp_get_thread_num();
#else
    const int thread = 0;
#endif
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; b++)
      tokens(q, patterns.get(), b * LANES, rows.get() + thread * row_size, z.get() + thread * q.width,
             shared.get() + thread * shared_size);
  }
  return 0;
}

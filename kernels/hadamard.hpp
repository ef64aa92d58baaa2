// Hadamard transform and grid of tokens, 16 at once with one in each lane.
//
// Arguments are those of a kernel: order and outer, the orders of the two factors; width; and the
// fields of `Grid` in hadamard_quantize/reference.py.
#pragma once

#include "cpu.hpp"

#include <algorithm>
#include <limits>

constexpr int TOKENS = 16;  // of a work item
constexpr int QUAD = 4;     // inputs whose signed sums are shared by all outputs
constexpr int SUMS = 16;    // signed sums of a quad
constexpr int PART = 128;   // columns of a partial sum: long fp32 sums lose digits

enum Statistic : int32_t { MEAN_MAD, MIN_MAX, ABSMAX, ABSMEAN };

// x [outer, m] of the tokens becomes Sylvester(outer) x H.
//
// The signs of four rows of H in column j are one of 16 patterns; bit i of patterns[j, quad] is set
// where row 4 quad + i has -1. `shared` has room for 16 signed sums per quad, and for a column.
template <class V, class Arguments>
INLINE void transform(const Arguments& q, const uint8_t* patterns, typename V::Floats* z,
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

template <class V, class Arguments>
INLINE Levels<V> levels(const Arguments& q, const typename V::Floats* z) {
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

template <class V, class Arguments>
INLINE typename V::Ints code(const Arguments& q, const Levels<V>& l,
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

// The pattern of every column and quad of rows of `inner`, or of its transpose; whether all its
// entries are ±1.
inline bool find_patterns(const float* inner, int64_t m, uint8_t* patterns,
                          bool transposed = false) {
  const int64_t quads = (m + QUAD - 1) / QUAD;
  memset(patterns, 0, m * quads);
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < m; j++) {
      const float entry = transposed ? inner[j * m + i] : inner[i * m + j];
      if (entry != 1.0f && entry != -1.0f) return false;
      if (entry < 0.0f) patterns[j * quads + i / QUAD] |= 1 << i % QUAD;
    }
  return true;
}

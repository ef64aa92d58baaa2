// Attention with both products in integers on a CPU; reference.py defines it.
//
// A thread does a head. Its keys and values become panels in which one vector holds 32 bits of
// codes of as many keys, or channels, as it has lanes, so that a product multiplies it with 32 bits
// of a query, or of probabilities, in all lanes. The results are the same on every instruction set.

#include "../cpu.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#if defined(_OPENMP)
#include <omp.h>
#endif

extern "C" {

// Mirrored by cpu.py.
struct QuantizedAttention {
  const float* qkv;
  float* out;
  int64_t batch, tokens, heads, head_dim;
  float score_scale;  // log2(e) / sqrt(head_dim)
  int32_t limit, threads, instruction_set;
};
}

namespace {

constexpr int QUERIES = 8;  // at once
constexpr int SUMS = 16;    // partial sums of a row of probabilities; also what lengths are padded to

// GROUP codes fill 32 bits of a panel. The other operand must not be negative where bytes are
// multiplied, so that queries have OFFSET added there.
struct Portable : Vectors<4, false> {
  using Code = int16_t;
  static constexpr int GROUP = 2, OFFSET = 0;

  // Sums [QUERIES][VECTORS][LANES] of `steps` words; rows of codes are `stride` words apart.
  template <int VECTORS>
  static void sums(const int32_t* panel, const int32_t* codes, int64_t stride, int64_t steps,
                   int32_t* out) {
    for (int m = 0; m < QUERIES; m++)
      for (int v = 0; v < VECTORS; v++) {
        Ints acc{};
        for (int64_t s = 0; s < steps; s++) {
          const Ints w = load(panel + (v * steps + s) * LANES);
          const int32_t c = codes[m * stride + s];
          acc += (w << 16 >> 16) * static_cast<int16_t>(c) + (w >> 16) * (c >> 16);
        }
        memcpy(out + (m * VECTORS + v) * LANES, &acc, sizeof acc);
      }
  }
};

#if defined(X86)
struct Avx2 : Vectors<8, true> {
  using Code = int16_t;
  static constexpr int GROUP = 2, OFFSET = 0;

  template <int VECTORS>
  TARGET_AVX2 static void sums(const int32_t* panel, const int32_t* codes, int64_t stride,
                               int64_t steps, int32_t* out) {
    constexpr int ROWS = QUERIES / 2;  // for 16 registers
    for (int begin = 0; begin < QUERIES; begin += ROWS) {
      __m256i acc[ROWS][VECTORS];
      for (int m = 0; m < ROWS; m++)
        for (int v = 0; v < VECTORS; v++) acc[m][v] = _mm256_setzero_si256();
      for (int64_t s = 0; s < steps; s++)
        for (int m = 0; m < ROWS; m++) {
          const __m256i c = _mm256_set1_epi32(codes[(begin + m) * stride + s]);
          for (int v = 0; v < VECTORS; v++) {
            const auto* w = reinterpret_cast<const __m256i*>(panel + (v * steps + s) * LANES);
            acc[m][v] = _mm256_add_epi32(acc[m][v], _mm256_madd_epi16(_mm256_load_si256(w), c));
          }
        }
      for (int m = 0; m < ROWS; m++)
        for (int v = 0; v < VECTORS; v++)
          _mm256_store_si256(
              reinterpret_cast<__m256i*>(out + ((begin + m) * VECTORS + v) * LANES), acc[m][v]);
    }
  }
};

struct Avx512 : Vectors<16, true> {
  using Code = uint8_t;
  static constexpr int GROUP = 4, OFFSET = 128;

  template <int VECTORS>
  TARGET_AVX512 static void sums(const int32_t* panel, const int32_t* codes, int64_t stride,
                                 int64_t steps, int32_t* out) {
    __m512i acc[QUERIES][VECTORS];
    for (int m = 0; m < QUERIES; m++)
      for (int v = 0; v < VECTORS; v++) acc[m][v] = _mm512_setzero_si512();
    for (int64_t s = 0; s < steps; s++) {
      __m512i w[VECTORS];
      for (int v = 0; v < VECTORS; v++) w[v] = _mm512_load_si512(panel + (v * steps + s) * LANES);
      for (int m = 0; m < QUERIES; m++) {
        const __m512i c = _mm512_set1_epi32(codes[m * stride + s]);
        for (int v = 0; v < VECTORS; v++) acc[m][v] = _mm512_dpbusd_epi32(acc[m][v], c, w[v]);
      }
    }
    for (int m = 0; m < QUERIES; m++)
      for (int v = 0; v < VECTORS; v++)
        _mm512_store_si512(out + (m * VECTORS + v) * LANES, acc[m][v]);
  }
};
#endif

struct Scratch {
  int32_t* queries;  // [round_up(T, QUERIES)][stride_d]
  int32_t* keys;     // [vectors of T][steps_d][LANES]
  int32_t* values;   // [vectors of D][steps_t][LANES]
  int32_t* weights;  // [QUERIES][stride_t]
  int32_t* row;      // [QUERIES][stride_d]
  int32_t* key_sums;
  float* query_scale;
  float* key_scale;
  float* value_scale;
  float* scores;  // [QUERIES][round_up(T, SUMS)]
};

constexpr int BUFFERS = 10;

// Words of all buffers with the rounding that any instruction set needs.
INLINE void sizes(const QuantizedAttention& a, int64_t* words) {
  const int64_t t = round_up(a.tokens, SUMS), d = round_up(a.head_dim, SUMS);
  const int64_t all[BUFFERS] = {t * d / 2, t * d / 2, t * d / 2, QUERIES * t / 2, QUERIES * d / 2,
                                t,         t,         t,         d,               QUERIES * t};
  for (int i = 0; i < BUFFERS; i++) words[i] = round_up(all[i], SUMS);
}

// Elements [d, d + LANES) of a row of a head, zeros behind its last one.
template <class V>
INLINE typename V::Floats load_part(const QuantizedAttention& a, const float* row, int64_t d) {
  using Floats = typename V::Floats;
  using Ints = typename V::Ints;
  const int64_t count = a.head_dim - d;
  if (count >= V::LANES) return V::load(row + d);
  Floats x{};
  if (row + d + V::LANES > a.qkv + 3 * a.batch * a.tokens * a.heads * a.head_dim) {
    memcpy(&x, row + d, count * sizeof(float));
    return x;
  }
  Ints mask;
  for (int i = 0; i < V::LANES; i++) mask[i] = i < count ? -1 : 0;
  return bits<Floats>(V::template load_as<Ints>(row + d) & mask);
}

constexpr float ROUNDER = 12582912.0f;  // 1.5 * 2^23: adding it rounds half to even

// The code of x in the lowest bits, others above; any code where x is not finite.
template <class V>
INLINE typename V::Ints encode(typename V::Floats x, typename V::Floats inverse) {
  return bits<typename V::Ints>(x * inverse + ROUNDER);
}

template <class V>
INLINE void keep_largest(typename V::Ints& most, typename V::Floats x) {
  using Ints = typename V::Ints;
  const Ints magnitude = bits<Ints>(x) & 0x7fffffff;
  most = magnitude > most ? magnitude : most;
}

template <class V>
struct Scale {
  typename V::Floats scale, inverse;
};

// From the bits of the largest magnitude, NaN and infinity being larger than all others.
template <class V>
INLINE Scale<V> scale_of(typename V::Ints most, int32_t limit) {
  using Floats = typename V::Floats;
  const Floats largest = bits<Floats>(most), zero = largest * 0.0f;  // or NaN
  const Floats scale = largest / static_cast<float>(limit) + zero, inverse = 1.0f / scale;
  return {scale, inverse < std::numeric_limits<float>::infinity() ? inverse : Floats{}};
}

// Codes plus `offset` of a row of D floats, zeros behind it; returns the scale.
template <class Set>
INLINE float encode_row(const QuantizedAttention& a, const float* x, int offset,
                        typename Set::Code* codes) {
  constexpr int LANES = Set::LANES;
  using Ints = typename Set::Ints;
  Ints most{};
  for (int64_t d = 0; d < a.head_dim; d += LANES) keep_largest<Set>(most, load_part<Set>(a, x, d));
  int32_t lanes[LANES], largest = 0;
  memcpy(lanes, &most, sizeof lanes);
  for (const int32_t lane : lanes) largest = std::max(largest, lane);
  const Scale<Set> s = scale_of<Set>(Ints{} + largest, a.limit);
  for (int64_t d = 0; d < a.head_dim; d += LANES) {
    const Ints c = encode<Set>(load_part<Set>(a, x, d), s.inverse) + offset;
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) codes[d + i] = static_cast<typename Set::Code>(c[i]);
  }
  return s.scale[0];
}

// Codes of the values, whose rows are channels.
template <class Set>
INLINE void encode_values(const QuantizedAttention& a, const float* v, int64_t stride,
                          int64_t steps, const Scratch& scratch) {
  constexpr int LANES = Set::LANES, GROUP = Set::GROUP, BITS = 32 / GROUP;
  using Ints = typename Set::Ints;
  for (int64_t d = 0; d < a.head_dim; d += LANES) {
    Ints most{};
    for (int64_t t = 0; t < a.tokens; t++)
      keep_largest<Set>(most, load_part<Set>(a, v + t * stride, d));
    const Scale<Set> s = scale_of<Set>(most, a.limit);
    memcpy(scratch.value_scale + d, &s.scale, sizeof s.scale);
    for (int64_t step = 0; step < steps; step++) {
      Ints word{};
#pragma GCC unroll 4
      for (int i = 0; i < GROUP; i++) {
        const int64_t t = step * GROUP + i;
        if (t >= a.tokens) break;
        const Ints c = encode<Set>(load_part<Set>(a, v + t * stride, d), s.inverse);
        word |= (c & ((1 << BITS) - 1)) << (BITS * i);
      }
      memcpy(scratch.values + (d / LANES * steps + step) * LANES, &word, sizeof word);
    }
  }
}

// Sums of all queries with panels [vector, vector + 2) of `vectors`, each given to `use`.
template <class Set, class Use>
INLINE void products(const int32_t* panel, int64_t vectors, const int32_t* codes, int64_t stride,
                     int64_t steps, Use use) {
  constexpr int LANES = Set::LANES;
  alignas(64) int32_t sums[QUERIES * 2 * LANES];
  for (int64_t v = 0; v < vectors; v += 2) {
    const int count = v + 2 <= vectors ? 2 : 1;
    const int32_t* from = panel + v * steps * LANES;
    if (count == 2)
      Set::template sums<2>(from, codes, stride, steps, sums);
    else
      Set::template sums<1>(from, codes, stride, steps, sums);
    for (int m = 0; m < QUERIES; m++)
      for (int i = 0; i < count; i++) use(m, v + i, Set::load(sums + (m * count + i) * LANES));
  }
}

// 2^x of x <= 0, to a few units in the last place.
template <class V>
INLINE typename V::Floats power_of_two(typename V::Floats x) {
  using Floats = typename V::Floats;
  using Ints = typename V::Ints;
  x = x < -126.0f ? V::floats(-126.0f) : x;
  const Floats whole = (x + ROUNDER) - ROUNDER;
  const Floats f = (x - whole) * 0.693147181f;
  Floats power = f * 1.9841270e-4f + 1.3888889e-3f;  // Taylor's series of e^f, |f| < 0.35
  power = power * f + 8.3333333e-3f;
  power = power * f + 4.1666667e-2f;
  power = power * f + 1.6666667e-1f;
  power = power * f + 0.5f;
  power = power * f + 1.0f;
  power = power * f + 1.0f;
  return bits<Floats>(bits<Ints>(power) + (V::int_of(whole) << 23));
}

// Codes of the probabilities of a query from its scores; returns their scale.
template <class Set>
INLINE float encode_weights(const QuantizedAttention& a, const float* scores, int64_t padded,
                            typename Set::Code* codes) {
  constexpr int LANES = Set::LANES, PARTS = SUMS / LANES;
  using Floats = typename Set::Floats;
  using Ints = typename Set::Ints;
  Floats most = Set::load(scores), total[PARTS] = {};
  for (int64_t t = LANES; t < padded; t += LANES) {
    const Floats x = Set::load(scores + t);
    most = x > most ? x : most;
  }
  float lanes[LANES], sum = 0.0f;
  memcpy(lanes, &most, sizeof lanes);
#pragma GCC unroll 4
  for (int half = LANES / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; i++) lanes[i] = std::max(lanes[i], lanes[i + half]);
  const float largest = lanes[0];
  const float limit = static_cast<float>(a.limit);
  for (int64_t t = 0; t < padded; t += SUMS)
    for (int p = 0; p < PARTS; p++) {
      const Floats e = power_of_two<Set>(Set::load(scores + t + p * LANES) - largest);
      total[p] += e;
      const Ints c = encode<Set>(e, Set::floats(limit));
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++)
        codes[t + p * LANES + i] = static_cast<typename Set::Code>(c[i]);
    }
  for (int i = 0; i < SUMS; i++) sum += total[i / LANES][i % LANES];
  return 1.0f / (limit * sum);
}

template <class Set>
INLINE void head(const QuantizedAttention& a, int64_t item, const Scratch& scratch) {
  constexpr int LANES = Set::LANES, GROUP = Set::GROUP;
  using Code = typename Set::Code;
  using Floats = typename Set::Floats;
  using Ints = typename Set::Ints;
  const int64_t T = a.tokens, D = a.head_dim, C = a.heads * D, stride = 3 * C;
  const int64_t image = item / a.heads, first = item % a.heads * D;
  const float* q = a.qkv + image * T * stride + first;
  float* out = a.out + image * T * C + first;
  const int64_t steps_d = (D + GROUP - 1) / GROUP, stride_d = round_up(D, LANES) / GROUP;
  const int64_t steps_t = (T + GROUP - 1) / GROUP, padded = round_up(T, SUMS);
  const int64_t key_vectors = (T + LANES - 1) / LANES, channel_vectors = (D + LANES - 1) / LANES;

  for (int64_t t = 0; t < round_up(T, QUERIES); t++) {
    auto* codes = reinterpret_cast<Code*>(scratch.queries + t * stride_d);
    scratch.query_scale[t] = 0.0f;
    if (t < T)
      scratch.query_scale[t] = encode_row<Set>(a, q + t * stride, Set::OFFSET, codes);
    else
      memset(codes, 0, stride_d * sizeof(int32_t));
  }
  for (int64_t t = 0; t < key_vectors * LANES; t++) {
    int32_t* panel = scratch.keys + t / LANES * steps_d * LANES + t % LANES;
    auto* codes = reinterpret_cast<Code*>(scratch.row);
    scratch.key_scale[t] = 0.0f;
    if (t < T) scratch.key_scale[t] = encode_row<Set>(a, q + C + t * stride, 0, codes);
    for (int64_t s = 0; s < steps_d; s++) panel[s * LANES] = t < T ? scratch.row[s] : 0;
  }
  if (Set::OFFSET) {  // what it adds to the sums of a key
    std::fill_n(scratch.row, QUERIES * steps_d, Set::OFFSET * 0x01010101);
    products<Set>(scratch.keys, key_vectors, scratch.row, steps_d, steps_d,
                  [&](int m, int64_t v, Ints sums) {
                    if (m == 0) memcpy(scratch.key_sums + v * LANES, &sums, sizeof sums);
                  });
  }
  encode_values<Set>(a, q + 2 * C, stride, steps_t, scratch);

  for (int64_t begin = 0; begin < T; begin += QUERIES) {
    const int rows = static_cast<int>(std::min<int64_t>(QUERIES, T - begin));
    products<Set>(scratch.keys, key_vectors, scratch.queries + begin * stride_d, stride_d, steps_d,
                  [&](int m, int64_t v, Ints sums) {
                    if (Set::OFFSET) sums -= Set::load(scratch.key_sums + v * LANES);
                    const Floats s = Set::float_of(sums) *
                                     (scratch.query_scale[begin + m] * a.score_scale) *
                                     Set::load(scratch.key_scale + v * LANES);
                    memcpy(scratch.scores + m * padded + v * LANES, &s, sizeof s);
                  });
    float weight_scale[QUERIES] = {};
    for (int m = 0; m < rows; m++) {
      float* scores = scratch.scores + m * padded;
      std::fill(scores + T, scores + padded, -std::numeric_limits<float>::infinity());
      auto* codes = reinterpret_cast<Code*>(scratch.weights + m * (padded / GROUP));
      weight_scale[m] = encode_weights<Set>(a, scores, padded, codes);
    }
    products<Set>(scratch.values, channel_vectors, scratch.weights, padded / GROUP, steps_t,
                  [&](int m, int64_t v, Ints sums) {
                    if (m >= rows) return;
                    const Floats y = Set::float_of(sums) * weight_scale[m] *
                                     Set::load(scratch.value_scale + v * LANES);
                    float* to = out + (begin + m) * C + v * LANES;
                    const int64_t count = D - v * LANES;
                    if (count >= LANES)
                      memcpy(to, &y, sizeof y);
                    else if (count == LANES / 2)  // D = 72; a variable length is a call
                      memcpy(to, &y, sizeof y / 2);
                    else
                      memcpy(to, &y, count * sizeof(float));
                  });
  }
}

void portable(const QuantizedAttention& a, int64_t item, const Scratch& scratch) {
  head<Portable>(a, item, scratch);
}

#if defined(X86)
TARGET_AVX2 void avx2(const QuantizedAttention& a, int64_t item, const Scratch& scratch) {
  head<Avx2>(a, item, scratch);
}

TARGET_AVX512 void avx512(const QuantizedAttention& a, int64_t item, const Scratch& scratch) {
  head<Avx512>(a, item, scratch);
}
#endif

}  // namespace

// 0, or 1 where memory ran out and nothing was written.
extern "C" int32_t robuq_quantized_attention(const QuantizedAttention* arguments) {
  const QuantizedAttention& a = *arguments;
  void (*run)(const QuantizedAttention&, int64_t, const Scratch&) = portable;
#if defined(X86)
  if (a.instruction_set == AVX2_FMA) run = avx2;
  if (a.instruction_set >= AVX512_VNNI) run = avx512;
#endif
  const int64_t items = a.batch * a.heads;
  const int threads = static_cast<int>(std::min<int64_t>(std::max(1, a.threads), items));
  if (threads == 0) return 0;
  int64_t words[BUFFERS], all = 0;
  sizes(a, words);
  for (const int64_t count : words) all += count;
  const auto memory = allocate<int32_t>(threads * all);
  if (!memory) return 1;
  std::fill_n(memory.get(), threads * all, 0);  // queries that do not exist are computed with
#pragma omp parallel num_threads(threads)
  {
#if defined(_OPENMP)
    const int thread = omp_get_thread_num();
#else
    const int thread = 0;
#endif
    int32_t* at[BUFFERS + 1] = {memory.get() + thread * all};
    for (int i = 0; i < BUFFERS; i++) at[i + 1] = at[i] + words[i];
    const auto floats = [&](int i) { return reinterpret_cast<float*>(at[i]); };
    const Scratch scratch{at[0], at[1],     at[2],     at[3],     at[4],
                          at[5], floats(6), floats(7), floats(8), floats(9)};
#pragma omp for schedule(static)
    for (int64_t item = 0; item < items; item++) run(a, item, scratch);
  }
  return 0;
}

// Packed ternary weight times int8 codes on a CPU; reference.py defines it.
//
// 32 outputs make a panel. A thread unpacks it to bytes w + 1 [K / 4][32][4], the operand order of
// vpdpbusd and of AMX tiles alike, and multiplies it with every token of a chunk. A few tokens do
// not pay for that: they are multiplied with one channel after the other. Sums are exact, and the
// epilogue rounds in the same order on every instruction set.

#include "../cpu.hpp"

#include <algorithm>
#include <cmath>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace {

constexpr int PANEL = 32;        // outputs
constexpr int STEP = 4 * PANEL;  // bytes of a panel per four columns
constexpr int BLOCK_K = 128;     // columns that share PLANE_BYTES, as layout.py has it
constexpr int PLANE_BYTES = 32;
constexpr int TOKENS = 12;  // rows of a register tile
constexpr int TILE = 16;    // rows of an AMX tile
constexpr int FEW = 3;      // tokens that are multiplied without a panel

}  // namespace

extern "C" {

// Mirrored by cpu.py. Null stands for an operand that is left out.
struct TernaryMatmul {
  const int8_t* codes;
  const uint8_t* planes;
  const float* token_scale;
  const float* token_offset;
  const int32_t* code_sums;
  const float* channel_scale;
  const int32_t* weight_sums;
  const float* bias;
  const float* branch;
  const float* up;
  const float* gate;
  const float* residual;
  float* out;
  int64_t rows, outputs, width, rank, tokens_per_image;
  int32_t gelu, threads, instruction_set;
};
}

namespace {

// Bytes w + 1 of 32 outputs; an output past the last one repeats it.
template <class V>
INLINE void unpack_panel(const TernaryMatmul& x, int64_t first, uint8_t* panel) {
  constexpr int LANES = V::LANES, WORDS = PLANE_BYTES / 4;
  const int64_t words = (x.width + BLOCK_K - 1) / BLOCK_K * WORDS;
  for (int part = 0; part < PANEL; part += LANES) {
    const uint8_t* rows[LANES];
    for (int i = 0; i < LANES; i++)
      rows[i] = x.planes + std::min(first + part + i, x.outputs - 1) * 4 * words;
    for (int64_t w = 0; w < words; w += LANES) {
      const int count = static_cast<int>(std::min<int64_t>(LANES, words - w));
      typename V::Ints tile[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) {
        if (count == LANES) {
          memcpy(&tile[i], rows[i] + 4 * w, 4 * LANES);
        } else {
          tile[i] = typename V::Ints{};
          memcpy(&tile[i], rows[i] + 4 * w, 4 * std::min(LANES, WORDS));
        }
      }
      V::transpose(tile);  // word d of all outputs: columns 4 d to 4 d + 3 of each plane
      for (int d = 0; d < count; d++)
#pragma GCC unroll 4
        for (int plane = 0; plane < 4; plane++) {
          const int64_t step = (w + d) / WORDS * (BLOCK_K / 4) + plane * WORDS + (w + d) % WORDS;
          const auto codes = tile[d] >> (2 * plane) & 0x03030303;
          memcpy(panel + step * STEP + 4 * part, &codes, sizeof codes);
        }
    }
  }
}

template <class V>
INLINE typename V::Floats gelu(typename V::Floats y) {
  using Floats = typename V::Floats;
  // 0.5 y (1 + tanh(sqrt(2 / pi) (y + 0.044715 y^3))) = y / (1 + 2^x)
  Floats x = y * (y * y * -0.1029432397f - 2.302208198f);
  x = x > 126.0f ? V::floats(126.0f) : x;
  x = x < -126.0f ? V::floats(-126.0f) : x;
  constexpr float ROUNDER = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  const Floats whole = (x + ROUNDER) - ROUNDER;
  const Floats f = (x - whole) * 0.693147181f;
  Floats power = f * 1.9841270e-4f + 1.3888889e-3f;  // Taylor's series of e^f, |f| < 0.35
  power = power * f + 8.3333333e-3f;
  power = power * f + 4.1666667e-2f;
  power = power * f + 1.6666667e-1f;
  power = power * f + 0.5f;
  power = power * f + 1.0f;
  power = power * f + 1.0f;
  using Ints = typename V::Ints;
  return y / (1.0f + bits<Floats>(bits<Ints>(power) + (V::int_of(whole) << 23)));
}

// Per-channel operands of a panel, zeros past the last output.
struct Channels {
  alignas(64) float scale[PANEL], weight_sums[PANEL], bias[PANEL];
};

INLINE Channels channels(const TernaryMatmul& x, int64_t first, int count, float* up) {
  Channels c{};
  for (int n = 0; n < count; n++) {
    c.scale[n] = x.channel_scale[first + n];
    c.weight_sums[n] = static_cast<float>(x.weight_sums[first + n]);
    if (x.bias) c.bias[n] = x.bias[first + n];
  }
  for (int64_t r = 0; r < x.rank; r++)
    for (int n = 0; n < PANEL; n++)
      up[r * PANEL + n] = n < count ? x.up[(first + n) * x.rank + r] : 0.0f;
  return c;
}

// A vector of a row of which `count` elements are left.
template <class V, bool WHOLE>
INLINE typename V::Floats load_outputs(const float* from, int count) {
  if (WHOLE) return V::load(from);
  typename V::Floats y{};
  memcpy(&y, from, std::min(std::max(count, 0), V::LANES) * sizeof(float));
  return y;
}

// ROWS tokens of a panel of `count` outputs from their integer sums.
template <class V, int ROWS, bool WHOLE>
INLINE void finish_rows(const TernaryMatmul& x, const Channels& c, const float* up,
                        const int32_t* sums, int64_t first_row, int64_t first, int count) {
  using Floats = typename V::Floats;
  constexpr int LANES = V::LANES, PARTS = PANEL / LANES;
  Floats branch[ROWS][PARTS] = {};
  for (int64_t r = 0; r < x.rank; r++)
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; i++) {
      const Floats b = V::floats(x.branch[(first_row + i) * x.rank + r]);
#pragma GCC unroll 8
      for (int p = 0; p < PARTS; p++)
        branch[i][p] = V::multiply_add(b, V::load(up + r * PANEL + p * LANES), branch[i][p]);
    }
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; i++) {
    const int64_t m = first_row + i;
    const int64_t at = m * x.outputs + first;
    const float* gate = x.gate ? x.gate + m / x.tokens_per_image * x.outputs + first : nullptr;
#pragma GCC unroll 8
    for (int p = 0; p < PARTS; p++) {
      const int part = p * LANES, rest = count - part;
      Floats y = V::float_of(V::load(sums + i * PANEL + part) - x.code_sums[m]) * x.token_scale[m];
      y += x.token_offset[m] * V::load(c.weight_sums + part);
      y *= V::load(c.scale + part);
      if (x.rank) y += branch[i][p];
      if (x.bias) y += V::load(c.bias + part);
      if (x.gelu) y = gelu<V>(y);
      if (gate) y *= load_outputs<V, WHOLE>(gate + part, rest);
      if (x.residual) y += load_outputs<V, WHOLE>(x.residual + at + part, rest);
      if (WHOLE)
        memcpy(x.out + at + part, &y, sizeof y);
      else
        memcpy(x.out + at + part, &y, std::min(std::max(rest, 0), LANES) * sizeof(float));
    }
  }
}

// Tokens [m, m + rows) of a panel from their integer sums.
template <class V>
INLINE void finish(const TernaryMatmul& x, const Channels& c, const float* up, const int32_t* sums,
                   int64_t m, int rows, int64_t first, int count) {
  constexpr int ROWS = V::LANES / 4;  // for which there are registers
  int i = 0;
  if (count < PANEL) {
    for (; i < rows; i++)
      finish_rows<V, 1, false>(x, c, up, sums + i * PANEL, m + i, first, count);
    return;
  }
  for (; i + ROWS <= rows; i += ROWS)
    finish_rows<V, ROWS, true>(x, c, up, sums + i * PANEL, m + i, first, count);
  for (; i < rows; i++) finish_rows<V, 1, true>(x, c, up, sums + i * PANEL, m + i, first, count);
}

INLINE int32_t word(const int8_t* codes) {
  int32_t four;
  memcpy(&four, codes, 4);
  return four;
}

// Products of two pairs reach at most 2 * 2 * 128 in magnitude, so 63 steps fit int16.
constexpr int64_t SHORT_STEPS = 63;

// Sums of ROWS tokens: codes are rows `stride` bytes apart, the panel has `steps` steps.
struct Portable : Vectors<4, false> {
  template <int ROWS>
  static void sums(const uint8_t* panel, const int8_t* codes, int64_t stride, int64_t steps,
                   int32_t* out) {
    for (int m = 0; m < ROWS; m++)
      for (int part = 0; part < PANEL; part += 16)
        outputs(panel + 4 * part, codes + m * stride, steps, out + m * PANEL + part);
  }

  // 16 outputs of a panel, a token.
  static void outputs(const uint8_t* panel, const int8_t* codes, int64_t steps, int32_t* out) {
    Ints total[4] = {};
    for (int64_t begin = 0; begin < steps; begin += SHORT_STEPS) {
      Shorts acc[4] = {};
      for (int64_t s = begin; s < std::min(steps, begin + SHORT_STEPS); s++) {
        const Shorts c = bits<Shorts>(Ints{} + word(codes + 4 * s));
        const Shorts even = (c << 8) >> 8, odd = c >> 8;
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) {
          const Shorts w = load_as<Shorts>(panel + s * STEP + 16 * v);
          acc[v] += (w & 255) * even + (w >> 8) * odd;
        }
      }
      for (int v = 0; v < 4; v++) {
        const Ints pairs = bits<Ints>(acc[v]);
        total[v] += (pairs << 16 >> 16) + (pairs >> 16);
      }
    }
    memcpy(out, total, sizeof total);
  }

  // Sum over a channel: plane p of `planes` times codes[p * bytes], `bytes` a multiple of 32.
  static int32_t channel(const uint8_t* planes, const int8_t* codes, int64_t bytes) {
    int32_t total = 0;
    for (int plane = 0; plane < 4; plane++)
      for (int64_t i = 0; i < bytes; i++)
        total += (planes[i] >> (2 * plane) & 3) * codes[plane * bytes + i];
    return total;
  }
};

#if defined(X86)
struct Avx2 : Vectors<8, true> {
  template <int ROWS>
  TARGET_AVX2 static void sums(const uint8_t* panel, const int8_t* codes, int64_t stride,
                               int64_t steps, int32_t* out) {
    for (int m = 0; m < ROWS; m += 4)
      for (int part = 0; part < 2; part++)
        if (m + 4 <= ROWS) {
          tile<4>(panel + 64 * part, codes + m * stride, stride, steps,
                  out + m * PANEL + 16 * part);
        } else {
          constexpr int REST = ROWS % 4 ? ROWS % 4 : 4;
          tile<REST>(panel + 64 * part, codes + m * stride, stride, steps,
                     out + m * PANEL + 16 * part);
        }
  }

  // 16 outputs of a panel.
  template <int ROWS>
  TARGET_AVX2 static void tile(const uint8_t* panel, const int8_t* codes, int64_t stride,
                               int64_t steps, int32_t* out) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i total[ROWS][2];
    for (int m = 0; m < ROWS; m++) total[m][0] = total[m][1] = _mm256_setzero_si256();
    for (int64_t begin = 0; begin < steps; begin += SHORT_STEPS) {
      __m256i acc[ROWS][2];
      for (int m = 0; m < ROWS; m++) acc[m][0] = acc[m][1] = _mm256_setzero_si256();
      for (int64_t s = begin; s < std::min(steps, begin + SHORT_STEPS); s++) {
        const auto* w = reinterpret_cast<const __m256i*>(panel + s * STEP);
        const __m256i w0 = _mm256_load_si256(w), w1 = _mm256_load_si256(w + 1);
        for (int m = 0; m < ROWS; m++) {
          const __m256i c = _mm256_set1_epi32(word(codes + m * stride + 4 * s));
          acc[m][0] = _mm256_add_epi16(acc[m][0], _mm256_maddubs_epi16(w0, c));
          acc[m][1] = _mm256_add_epi16(acc[m][1], _mm256_maddubs_epi16(w1, c));
        }
      }
      for (int m = 0; m < ROWS; m++)
        for (int v = 0; v < 2; v++)
          total[m][v] = _mm256_add_epi32(total[m][v], _mm256_madd_epi16(acc[m][v], ones));
    }
    for (int m = 0; m < ROWS; m++)
      for (int v = 0; v < 2; v++)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + m * PANEL + 8 * v), total[m][v]);
  }

  TARGET_AVX2 static int32_t channel(const uint8_t* planes, const int8_t* codes, int64_t bytes) {
    const __m256i ones = _mm256_set1_epi16(1), mask = _mm256_set1_epi8(3);
    __m256i total = _mm256_setzero_si256();
    for (int64_t i = 0; i < bytes; i += 32) {
      const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(planes + i));
      __m256i sums = _mm256_setzero_si256();
      for (int plane = 0; plane < 4; plane++) {
        const auto* from = reinterpret_cast<const __m256i*>(codes + plane * bytes + i);
        const __m256i of_plane = _mm256_and_si256(_mm256_srli_epi16(w, 2 * plane), mask);
        const __m256i pairs = _mm256_maddubs_epi16(of_plane, _mm256_loadu_si256(from));
        sums = _mm256_add_epi16(sums, pairs);
      }
      total = _mm256_add_epi32(total, _mm256_madd_epi16(sums, ones));
    }
    alignas(32) int32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), total);
    int32_t sum = 0;
    for (const int32_t lane : lanes) sum += lane;
    return sum;
  }
};

struct Avx512 : Vectors<16, true> {
  template <int ROWS>
  TARGET_AVX512 static void sums(const uint8_t* panel, const int8_t* codes, int64_t stride,
                                 int64_t steps, int32_t* out) {
    __m512i acc[ROWS][2];
    for (int m = 0; m < ROWS; m++) acc[m][0] = acc[m][1] = _mm512_setzero_si512();
    for (int64_t s = 0; s < steps; s++) {
      const __m512i w0 = _mm512_load_si512(panel + s * STEP);
      const __m512i w1 = _mm512_load_si512(panel + s * STEP + 64);
      for (int m = 0; m < ROWS; m++) {
        const __m512i c = _mm512_set1_epi32(word(codes + m * stride + 4 * s));
        acc[m][0] = _mm512_dpbusd_epi32(acc[m][0], w0, c);
        acc[m][1] = _mm512_dpbusd_epi32(acc[m][1], w1, c);
      }
    }
    for (int m = 0; m < ROWS; m++)
      for (int v = 0; v < 2; v++) _mm512_store_si512(out + m * PANEL + 16 * v, acc[m][v]);
  }

  TARGET_AVX512 static int32_t channel(const uint8_t* planes, const int8_t* codes, int64_t bytes) {
    const __m512i mask = _mm512_set1_epi8(3);
    __m512i total[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    for (int64_t i = 0; i < bytes; i += 64) {
      const __mmask64 there = bytes - i < 64 ? 0xffffffff : ~__mmask64{0};
      const __m512i w = _mm512_maskz_loadu_epi8(there, planes + i);
      for (int plane = 0; plane < 4; plane++) {
        const __m512i of_plane = _mm512_and_si512(_mm512_srli_epi16(w, 2 * plane), mask);
        const __m512i c = _mm512_maskz_loadu_epi8(there, codes + plane * bytes + i);
        total[plane % 2] = _mm512_dpbusd_epi32(total[plane % 2], of_plane, c);
      }
    }
    return _mm512_reduce_add_epi32(_mm512_add_epi32(total[0], total[1]));
  }
};
#endif

#if defined(AMX)
TARGET_AMX void release_tiles() { _tile_release(); }

// Sums of 32 tokens.
TARGET_AMX void amx_sums(const uint8_t* panel, const int8_t* codes, int64_t stride, int64_t steps,
                         int32_t* out) {
  asm volatile("" ::: "memory");  // nor does it know that tiles are loaded from memory
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t s = 0; s < steps; s += 16) {
    _tile_loadd(6, panel + s * STEP, STEP);
    _tile_loadd(7, panel + s * STEP + 64, STEP);
    _tile_loadd(4, codes + 4 * s, stride);
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    _tile_loadd(5, codes + TILE * stride + 4 * s, stride);
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
  }
  _tile_stored(0, out, 4 * PANEL);
  _tile_stored(1, out + 16, 4 * PANEL);
  _tile_stored(2, out + TILE * PANEL, 4 * PANEL);
  _tile_stored(3, out + TILE * PANEL + 16, 4 * PANEL);
}
#endif

template <class Set, int ROWS = TOKENS>
INLINE void sums_of(int rows, const uint8_t* panel, const int8_t* codes, int64_t stride,
                    int64_t steps, int32_t* out) {
  if (rows == ROWS) {
    Set::template sums<ROWS>(panel, codes, stride, steps, out);
  } else if constexpr (ROWS > 1) {
    sums_of<Set, ROWS - 1>(rows, panel, codes, stride, steps, out);
  }
}

// One panel, few tokens. Codes are [rows][4][bytes], as `channel` takes them.
template <class Set>
INLINE void few_products(const TernaryMatmul& x, const int8_t* codes, int64_t bytes, int64_t first,
                         float* up) {
  const int count = static_cast<int>(std::min<int64_t>(PANEL, x.outputs - first));
  alignas(64) int32_t sums[(FEW + 1) * PANEL] = {};  // finish_rows<4>, never reached, would read 4
  for (int n = 0; n < count; n++)
    for (int64_t m = 0; m < x.rows; m++)
      sums[m * PANEL + n] =
          Set::channel(x.planes + (first + n) * bytes, codes + m * 4 * bytes, bytes);
  const Channels c = channels(x, first, count, up);
  finish<Set>(x, c, up, sums, 0, static_cast<int>(x.rows), first, count);
}

// One panel, tokens [begin, end). Codes are padded to whole steps.
template <class Set, bool TILES>
INLINE void panel_product(const TernaryMatmul& x, const int8_t* codes, int64_t stride,
                          int64_t steps, int64_t begin, int64_t end, int64_t first, uint8_t* panel,
                          float* up) {
  if (x.rows <= FEW) return few_products<Set>(x, codes, stride / 4, first, up);
  const int count = static_cast<int>(std::min<int64_t>(PANEL, x.outputs - first));
  alignas(64) int32_t sums[2 * TILE * PANEL];
  unpack_panel<Set>(x, first, panel);
  const Channels c = channels(x, first, count, up);
  for (int64_t m = begin; m < end;) {
    int rows = static_cast<int>(std::min<int64_t>(TOKENS, end - m));
#if defined(AMX)
    if (TILES && end - m >= 2 * TILE) {
      rows = 2 * TILE;
      amx_sums(panel, codes + m * stride, stride, steps, sums);
    } else
#endif
      sums_of<Set>(rows, panel, codes + m * stride, stride, steps, sums);
    finish<Set>(x, c, up, sums, m, rows, first, count);
    m += rows;
  }
}

struct Work {
  const TernaryMatmul& x;
  const int8_t* codes;
  int64_t stride, steps;
};

void portable(const Work& w, int64_t begin, int64_t end, int64_t first, uint8_t* panel, float* up) {
  panel_product<Portable, false>(w.x, w.codes, w.stride, w.steps, begin, end, first, panel, up);
}

#if defined(X86)
TARGET_AVX2 void avx2(const Work& w, int64_t begin, int64_t end, int64_t first, uint8_t* panel,
                      float* up) {
  panel_product<Avx2, false>(w.x, w.codes, w.stride, w.steps, begin, end, first, panel, up);
}

TARGET_AVX512 void avx512(const Work& w, int64_t begin, int64_t end, int64_t first, uint8_t* panel,
                          float* up) {
  panel_product<Avx512, false>(w.x, w.codes, w.stride, w.steps, begin, end, first, panel, up);
}
#endif

#if defined(AMX)
TARGET_AVX512 void amx(const Work& w, int64_t begin, int64_t end, int64_t first, uint8_t* panel,
                       float* up) {
  panel_product<Avx512, true>(w.x, w.codes, w.stride, w.steps, begin, end, first, panel, up);
}
#endif

}  // namespace

// 0, or 1 where memory ran out and nothing was written.
extern "C" int32_t robuq_ternary_matmul(const TernaryMatmul* arguments) {
  const TernaryMatmul& x = *arguments;
  const int32_t set = x.instruction_set;
  void (*product)(const Work&, int64_t, int64_t, int64_t, uint8_t*, float*) = portable;
#if defined(X86)
  if (set == AVX2_FMA) product = avx2;
  if (set >= AVX512_VNNI) product = avx512;
#endif
#if defined(AMX)
  if (set == AMX_INT8) product = amx;
#endif
  // A chunk of codes and a panel share the second-level cache.
  constexpr int64_t CHUNK_BYTES = 1 << 20;
  const bool few = x.rows <= FEW;
  const int64_t stride = round_up(x.width, few ? BLOCK_K : set == AMX_INT8 ? 64 : 4);
  const int64_t chunk = std::max<int64_t>(96, CHUNK_BYTES / stride / 96 * 96);
  const int64_t chunks = (x.rows + chunk - 1) / chunk, panels = (x.outputs + PANEL - 1) / PANEL;
  const int64_t panel_bytes = round_up(x.width, 2 * BLOCK_K) * PANEL;
  const int threads = static_cast<int>(std::min<int64_t>(std::max(1, x.threads), chunks * panels));
  if (threads == 0) return 0;

  const int8_t* codes = x.codes;
  std::unique_ptr<int8_t[], Free> padded;
  if (few || stride != x.width) {
    padded = allocate<int8_t>(x.rows * stride);
    if (!padded) return 1;
    codes = padded.get();
  }
  if (few) {
    std::fill_n(padded.get(), x.rows * stride, 0);
    for (int64_t m = 0; m < x.rows; m++)
      for (int64_t k = 0; k < x.width; k++) {
        const int64_t plane = k % BLOCK_K / PLANE_BYTES;
        const int64_t byte = k / BLOCK_K * PLANE_BYTES + k % PLANE_BYTES;
        padded[m * stride + plane * (stride / 4) + byte] = x.codes[m * x.width + k];
      }
  } else if (padded) {
    for (int64_t m = 0; m < x.rows; m++) {
      memcpy(&padded[m * stride], x.codes + m * x.width, x.width);
      memset(&padded[m * stride + x.width], 0, stride - x.width);
    }
  }
  const auto scratch = allocate<uint8_t>(threads * panel_bytes);
  const auto ups = allocate<float>(threads * x.rank * PANEL);
  if (!scratch || !ups) return 1;
  const Work work{x, codes, stride, stride / 4};
#pragma omp parallel num_threads(threads)
  {
#if defined(_OPENMP)
    const int thread = omp_get_thread_num();
#else
    const int thread = 0;
#endif
#if defined(AMX)
    if (set == AMX_INT8) configure_tiles();
#endif
#pragma omp for schedule(static)
    for (int64_t item = 0; item < chunks * panels; item++) {
      const int64_t begin = item / panels * chunk;
      product(work, begin, std::min(x.rows, begin + chunk), item % panels * PANEL,
              scratch.get() + thread * panel_bytes, ups.get() + thread * x.rank * PANEL);
    }
#if defined(AMX)
    if (set == AMX_INT8) release_tiles();
#endif
  }
  return 0;
}

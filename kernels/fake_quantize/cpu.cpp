// Fake quantization for training on a CPU: rotate and quantize tokens, and the gradient of it;
// operands of attention by their largest magnitude.
//
// 16 tokens are handled at once, one in each lane. The backward pass rotates the tokens again,
// which costs less than to write and read what it would need of them. Multiply-adds are rounded
// once on every instruction set, so that all give the same bits.

#include "../hadamard.hpp"

#include <algorithm>
#include <cmath>

#if defined(_OPENMP)
#include <omp.h>
#endif

extern "C" {

// Mirrored by cpu.py. Null stands for an operand that is left out; strides are in elements.
// `grad` makes it the backward pass: `out` is then the gradient [rows, width] at x, and otherwise
// the quantized tokens with z @ down.T beside them, [rows, width + rank].
struct FakeQuantize {
  const float* x;      // not read by a backward pass whose gradient does not depend on it
  const float* signs;
  const float* inner;  // [order, order]
  const float* down;   // [rank, width]
  const float* grad;   // [rows, width + rank]
  float* out;
  int64_t rows, width, order, outer, rank, x_stride, grad_stride;
  float norm, factor, divisor, epsilon, low, high;
  int32_t statistic, floor, threads, instruction_set;
};

// x [items, groups, n, m] becomes s round(x / s), s = max|x| / limit over `m`, or over `n` where
// `by_column`. The last axis of x and `out` is contiguous, `out` altogether.
struct Absmax {
  const float* x;
  float* out;
  int64_t items, groups, n, m, item_stride, group_stride, row_stride;
  float limit;
  int32_t by_column, threads, instruction_set;
};
}

namespace {

constexpr int32_t UNQUANTIZED = -1;     // in place of a Statistic
constexpr float ROUNDER = 12582912.0f;  // 1.5 * 2^23: adding it rounds half to even

struct Scratch {
  float* z;         // [width, 16]
  float* gradient;  // [width, 16]
  float* shared;    // [max(16 quads, outer), 16]
};

// What all blocks of a call read.
struct Factors {
  const uint8_t* patterns;    // of H; null without a rotation
  const uint8_t* transposed;  // of its transpose
  const float* columns;       // [round_up(width, 16)], signs times the norm of the transform
  const float* down;          // [width, padded_rank], zeros behind the rank
  int64_t padded_rank;
};

// Of the branch that are handled at once, and to which its rank is padded.
constexpr int FEW_RANKS = 4, RANKS = 16;

// Rows of `from` times `columns`, where there are any, into the lanes of `to` [width, LANES]; lanes
// without a row repeat the last.
template <class V>
INLINE void load_tokens(const float* from, int64_t stride, int count, int64_t width,
                        const float* columns, typename V::Floats* to) {
  constexpr int LANES = V::LANES;
  using Floats = typename V::Floats;
  using Ints = typename V::Ints;
  const float* row[LANES];
  for (int i = 0; i < LANES; i++) row[i] = from + std::min(i, count - 1) * stride;
  for (int64_t k = 0; k < width; k += LANES) {
    const int64_t size = std::min<int64_t>(LANES, width - k);
    Ints tile[LANES];
    if (size == LANES) {
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) memcpy(&tile[i], row[i] + k, sizeof(Ints));
    } else {
      for (int i = 0; i < LANES; i++) {
        tile[i] = Ints{};
        memcpy(&tile[i], row[i] + k, size * sizeof(float));
      }
    }
    if (columns) {
      const Floats factors = V::load(columns + k);
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) tile[i] = bits<Ints>(bits<Floats>(tile[i]) * factors);
    }
    V::transpose(tile);
    memcpy(to + k, tile, size * sizeof(Ints));
  }
}

// The lanes of `from` [width, LANES] into rows, times `columns` where there are any.
template <class V>
INLINE void store_tokens(const typename V::Floats* from, int64_t stride, int count, int64_t width,
                         const float* columns, float* to) {
  constexpr int LANES = V::LANES;
  using Floats = typename V::Floats;
  using Ints = typename V::Ints;
  for (int64_t k = 0; k < width; k += LANES) {
    const int64_t size = std::min<int64_t>(LANES, width - k);
    Ints tile[LANES] = {};
    memcpy(tile, from + k, size * sizeof(Ints));
    V::transpose(tile);
    if (columns) {
      const Floats factors = V::load(columns + k);
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) tile[i] = bits<Ints>(bits<Floats>(tile[i]) * factors);
    }
    if (size == LANES && count == LANES)
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) memcpy(to + i * stride + k, &tile[i], sizeof(Ints));
    else
      for (int i = 0; i < count; i++)
        memcpy(to + i * stride + k, &tile[i], size * sizeof(float));
  }
}

// Grid of the tokens in the lanes: t = (z - shift) * inverse, x = scale * code + offset.
template <class V>
struct TokenGrid {
  typename V::Floats scale, inverse, shift, offset;
  typename V::Floats alive;  // 0 where a statistic is infinite and counts as a constant, else 1
};

// The largest magnitude of a lane; NaN, whose bits are the largest of all, where there is one.
template <class V>
struct Largest {
  typename V::Ints most{};

  INLINE void see(typename V::Floats x) {
    const auto a = bits<typename V::Ints>(x) & 0x7fffffff;
    most = a > most ? a : most;
  }
  INLINE typename V::Floats value() const { return bits<typename V::Floats>(most); }
};

// Only selections of floats by a comparison: GCC takes other uses of its result apart.
template <class V>
INLINE TokenGrid<V> token_grid(const FakeQuantize& q, const typename V::Floats* z) {
  using Floats = typename V::Floats;
  const Floats infinity = V::floats(std::numeric_limits<float>::infinity());
  const Floats nan = V::floats(std::numeric_limits<float>::quiet_NaN());
  const Floats count = V::floats(static_cast<float>(q.width)), one = V::floats(1.0f);
  const Floats divisor = V::floats(q.divisor), none{};
  Floats shift{}, scale, alive = one;
  if (q.statistic == MEAN_MAD) {
    const Floats mean = sum<V, false>(z, q.width, none) / count;
    shift = magnitude<V>(mean) < infinity ? mean : none;
    scale = sum<V, true>(z, q.width, shift) / count * q.factor;
  } else if (q.statistic == ABSMEAN) {
    scale = sum<V, true>(z, q.width, none) / count;
  } else {
    Floats low = z[0], high = z[0];
    Largest<V> most;
    for (int64_t k = 0; k < q.width; k++) {
      const Floats v = z[k];
      low = v < low ? v : low;
      high = v > high ? v : high;
      most.see(v);
    }
    if (q.statistic == MIN_MAX) {
      shift = low + (most.value() - most.value());  // NaN where an entry is not finite
      scale = (high - low) / divisor;
      const Floats constant = low == high ? none : one;
      alive = magnitude<V>(low) == infinity ? constant : alive;
    } else {
      scale = most.value();
    }
  }
  alive = scale == infinity ? none : alive;
  if (q.statistic == ABSMAX || q.statistic == ABSMEAN) {
    const Floats statistic = alive == one ? scale : divisor;
    const Floats inverse = one / (statistic + q.epsilon) * divisor;
    return {statistic / divisor, inverse, none, none, alive};
  }
  scale = scale < infinity ? scale : one;  // also NaN
  Floats inverse = one / scale;
  inverse = inverse < infinity ? inverse : none;
  if (q.statistic == MIN_MAX) shift = alive == one ? shift - q.low * scale : none;
  return {scale, inverse, shift, q.floor ? shift + scale / 2.0f : shift, alive};
}

// The codes of a grid, as floats; NaN stays NaN.
template <class V>
struct Codes {
  using Floats = typename V::Floats;
  const Floats low, high, rounder, down;

  INLINE explicit Codes(const FakeQuantize& q)
      : low(V::floats(q.low)),
        high(V::floats(q.high)),
        rounder(V::floats(ROUNDER)),
        down(V::floats(q.floor ? 1.0f : 0.0f)) {}

  INLINE Floats operator()(Floats t) const {
    t = t < low ? low : t;
    t = t > high ? high : t;
    const Floats whole = (t + rounder) - rounder;
    return whole - (whole > t ? down : Floats{});
  }
};

// z @ down.T of the tokens that exist.
template <class V, int AT_ONCE>
INLINE void project(const FakeQuantize& q, const Factors& factors, int count,
                    const typename V::Floats* z, float* out) {
  using Floats = typename V::Floats;
  for (int64_t r = 0; r < q.rank; r += AT_ONCE) {
    Floats total[AT_ONCE] = {};
    for (int64_t begin = 0; begin < q.width; begin += PART) {
      Floats part[AT_ONCE] = {};
      for (int64_t k = begin; k < std::min(q.width, begin + PART); k++) {
        const float* down = factors.down + k * factors.padded_rank + r;
#pragma GCC unroll 16
        for (int i = 0; i < AT_ONCE; i++)
          part[i] = V::multiply_add(z[k], V::floats(down[i]), part[i]);
      }
      for (int i = 0; i < AT_ONCE; i++) total[i] += part[i];
    }
    for (int i = 0; i < AT_ONCE && r + i < q.rank; i++)
      for (int t = 0; t < count; t++) out[t * (q.width + q.rank) + q.width + r + i] = total[i][t];
  }
}

template <class V>
INLINE void load_rotated(const FakeQuantize& q, const Factors& factors, int64_t first, int count,
                         typename V::Floats* z, float* shared) {
  const float* x = q.x + first * q.x_stride;
  load_tokens<V>(x, q.x_stride, count, q.width, factors.columns, z);
  if (factors.patterns)
    transform<V>(q, factors.patterns, z, reinterpret_cast<typename V::Floats*>(shared));
}

template <class V>
INLINE void forward(const FakeQuantize& q, const Factors& factors, int64_t first, int count,
                    const Scratch& scratch) {
  using Floats = typename V::Floats;
  Floats* z = reinterpret_cast<Floats*>(scratch.z);
  float* out = q.out + first * (q.width + q.rank);
  load_rotated<V>(q, factors, first, count, z, scratch.shared);
  if (q.rank <= FEW_RANKS)
    project<V, FEW_RANKS>(q, factors, count, z, out);
  else
    project<V, V::LANES>(q, factors, count, z, out);  // as many as there are registers for
  if (q.statistic != UNQUANTIZED) {
    const TokenGrid<V> grid = token_grid<V>(q, z);
    const Codes<V> code(q);
    for (int64_t k = 0; k < q.width; k++)
      z[k] = V::multiply_add(code((z[k] - grid.shift) * grid.inverse), grid.scale, grid.offset);
  }
  store_tokens<V>(z, q.width + q.rank, count, q.width, nullptr, out);
}

// The gradient g at the values of a grid by mean and mean absolute deviation becomes that at z:
// with t, its level and m = 1 inside the clip, d x = (1 - m) d mean + m dz + (level - m t) d scale.
template <class V>
INLINE void through_statistics(const FakeQuantize& q, const typename V::Floats* z,
                               typename V::Floats* g) {
  using Floats = typename V::Floats;
  const TokenGrid<V> grid = token_grid<V>(q, z);
  const Codes<V> code(q);
  const float above = q.floor ? 0.5f : 0.0f, below = 0.5f - above;
  // The first and the last value that pass; clamping finds them by one comparison.
  const Floats low = V::floats(std::nextafter(q.low - below, 0.0f));
  const Floats high = V::floats(std::nextafter(q.high + 1.0f - below, 0.0f));
  const Floats to_level = V::floats(above), one = V::floats(1.0f), none{};
  Floats clipped_sum{}, slope_sum{}, sign_sum{};
  for (int64_t begin = 0; begin < q.width; begin += PART) {
    Floats clipped_part{}, slope_part{}, sign_part{};
    for (int64_t k = begin; k < std::min(q.width, begin + PART); k++) {
      const Floats centred = z[k] - grid.shift, t = centred * grid.inverse, grad = g[k];
      Floats clamped = t < low ? low : t;
      clamped = clamped > high ? high : clamped;
      const Floats passed = clamped == t ? grad : none;
      clipped_part += grad - passed;
      slope_part = V::multiply_add(grad, code(t) + to_level, slope_part);
      slope_part = V::multiply_add(-passed, t, slope_part);
      sign_part += centred > none ? one : none;
      sign_part -= centred < none ? one : none;
      g[k] = passed;
    }
    clipped_sum += clipped_part;
    slope_sum += slope_part;
    sign_sum += sign_part;
  }
  const Floats share = grid.alive / static_cast<float>(q.width);
  const Floats slope = grid.inverse * grid.alive > none ? slope_sum * share * q.factor : none;
  const Floats constant = (clipped_sum - sign_sum * slope) * share;
  for (int64_t k = 0; k < q.width; k++) {
    const Floats centred = z[k] - grid.shift;
    const Floats up = centred > none ? slope : none, down = centred < none ? slope : none;
    g[k] = g[k] + (up - down) + constant;
  }
}

// The gradient at the branch times `down` is added to that at z.
template <class V, int AT_ONCE>
INLINE void add_branch(const FakeQuantize& q, const Factors& factors, int count, const float* grad,
                       typename V::Floats* g) {
  using Floats = typename V::Floats;
  for (int64_t r = 0; r < q.rank; r += AT_ONCE) {
    Floats branch[AT_ONCE] = {};
    for (int i = 0; i < AT_ONCE && r + i < q.rank; i++)
      for (int t = 0; t < count; t++) branch[i][t] = grad[t * q.grad_stride + q.width + r + i];
    for (int64_t k = 0; k < q.width; k++) {
      const float* down = factors.down + k * factors.padded_rank + r;
      Floats y = g[k];
#pragma GCC unroll 16
      for (int i = 0; i < AT_ONCE; i++) y = V::multiply_add(branch[i], V::floats(down[i]), y);
      g[k] = y;
    }
  }
}

template <class V>
INLINE void backward(const FakeQuantize& q, const Factors& factors, int64_t first, int count,
                     const Scratch& scratch) {
  using Floats = typename V::Floats;
  Floats* z = reinterpret_cast<Floats*>(scratch.z);
  Floats* g = reinterpret_cast<Floats*>(scratch.gradient);
  const float* grad = q.grad + first * q.grad_stride;
  load_tokens<V>(grad, q.grad_stride, count, q.width, nullptr, g);
  if (q.statistic == MEAN_MAD) {
    load_rotated<V>(q, factors, first, count, z, scratch.shared);
    through_statistics<V>(q, z, g);
  }
  if (q.rank <= FEW_RANKS)
    add_branch<V, FEW_RANKS>(q, factors, count, grad, g);
  else
    add_branch<V, RANKS>(q, factors, count, grad, g);
  if (factors.transposed)
    transform<V>(q, factors.transposed, g, reinterpret_cast<Floats*>(scratch.shared));
  store_tokens<V>(g, q.width, count, q.width, factors.columns, q.out + first * q.width);
}

// Tokens [first, first + 16) that exist.
template <class V>
INLINE void tokens(const FakeQuantize& q, const Factors& factors, int64_t first,
                   const Scratch& scratch) {
  for (int64_t m = first; m < std::min(q.rows, first + TOKENS); m += V::LANES) {
    const int count = static_cast<int>(std::min<int64_t>(V::LANES, q.rows - m));
    if (q.grad)
      backward<V>(q, factors, m, count, scratch);
    else
      forward<V>(q, factors, m, count, scratch);
  }
}

template <class V>
struct Rounding {
  using Floats = typename V::Floats;
  Floats scale, inverse, rounder;

  INLINE Rounding(const Largest<V>& largest, float limit)
      : scale(largest.value() / limit), inverse(1.0f / scale), rounder(V::floats(ROUNDER)) {
    // Also NaN, which the scale shows.
    inverse = inverse < V::floats(std::numeric_limits<float>::infinity()) ? inverse : Floats{};
  }
  INLINE Floats operator()(Floats x) const {
    return ((x * inverse + rounder) - rounder) * scale;
  }
};

// One matrix [n, m]; `scratch` has room for a token of m entries in each lane.
template <class V>
INLINE void absmax(const Absmax& q, int64_t index, float* scratch) {
  constexpr int LANES = V::LANES;
  using Floats = typename V::Floats;
  const float* x = q.x + index / q.groups * q.item_stride + index % q.groups * q.group_stride;
  float* out = q.out + index * q.n * q.m;
  if (!q.by_column) {
    Floats* z = reinterpret_cast<Floats*>(scratch);
    for (int64_t i = 0; i < q.n; i += LANES) {
      const int count = static_cast<int>(std::min<int64_t>(LANES, q.n - i));
      load_tokens<V>(x + i * q.row_stride, q.row_stride, count, q.m, nullptr, z);
      Largest<V> largest;
      for (int64_t k = 0; k < q.m; k++) largest.see(z[k]);
      const Rounding<V> rounding(largest, q.limit);
      for (int64_t k = 0; k < q.m; k++) z[k] = rounding(z[k]);
      store_tokens<V>(z, q.m, count, q.m, nullptr, out + i * q.m);
    }
    return;
  }
  for (int64_t j = 0; j < q.m; j += LANES) {
    const int64_t columns = std::min<int64_t>(LANES, q.m - j);
    const auto load = [&](int64_t i) __attribute__((always_inline)) {
      if (columns == LANES) return V::load(x + i * q.row_stride + j);
      Floats some{};
      memcpy(&some, x + i * q.row_stride + j, columns * sizeof(float));
      return some;
    };
    Largest<V> largest;
    for (int64_t i = 0; i < q.n; i++) largest.see(load(i));
    const Rounding<V> rounding(largest, q.limit);
    for (int64_t i = 0; i < q.n; i++) {
      const Floats y = rounding(load(i));
      float* to = out + i * q.m + j;
      memcpy(to, &y, columns == LANES ? sizeof y : columns * sizeof(float));
    }
  }
}

using Portable = Vectors<4, true>;

void portable(const FakeQuantize& q, const Factors& f, int64_t first, const Scratch& scratch) {
  tokens<Portable>(q, f, first, scratch);
}
void portable_absmax(const Absmax& q, int64_t index, float* scratch) {
  absmax<Portable>(q, index, scratch);
}

#if defined(X86)
TARGET_AVX2 void avx2(const FakeQuantize& q, const Factors& f, int64_t first,
                      const Scratch& scratch) {
  tokens<Vectors<8, true>>(q, f, first, scratch);
}
TARGET_AVX2 void avx2_absmax(const Absmax& q, int64_t index, float* scratch) {
  absmax<Vectors<8, true>>(q, index, scratch);
}

TARGET_AVX512 void avx512(const FakeQuantize& q, const Factors& f, int64_t first,
                          const Scratch& scratch) {
  tokens<Vectors<16, true>>(q, f, first, scratch);
}
TARGET_AVX512 void avx512_absmax(const Absmax& q, int64_t index, float* scratch) {
  absmax<Vectors<16, true>>(q, index, scratch);
}
#endif

}  // namespace

extern "C" {

// 0; nothing was written where memory ran out (1) or `inner` has another entry than ±1 (2).
int32_t robuq_fake_quantize(const FakeQuantize* arguments) {
  const FakeQuantize& q = *arguments;
  void (*run)(const FakeQuantize&, const Factors&, int64_t, const Scratch&) = portable;
#if defined(X86)
  if (q.instruction_set == AVX2_FMA) run = avx2;
  if (q.instruction_set >= AVX512_VNNI) run = avx512;
#endif
  const int64_t blocks = (q.rows + TOKENS - 1) / TOKENS;
  const int threads = static_cast<int>(std::min<int64_t>(std::max(1, q.threads), blocks));
  if (threads == 0) return 0;
  const int64_t token_size = q.width * TOKENS;
  const int64_t quads = (q.order + QUAD - 1) / QUAD;
  const int64_t shared_size = std::max(quads * SUMS, q.outer) * TOKENS;
  const int64_t padded_rank = round_up(q.rank, q.rank <= FEW_RANKS ? FEW_RANKS : RANKS);
  const auto z = allocate<float>(threads * token_size);
  const auto gradient = allocate<float>(q.grad ? threads * token_size : 0);
  const auto shared = allocate<float>(threads * shared_size);
  const auto columns = allocate<float>(round_up(q.width, TOKENS));
  const auto down = allocate<float>(q.width * padded_rank);
  const auto patterns = allocate<uint8_t>(2 * q.order * quads);
  if (!z || !gradient || !shared || !columns || !down || !patterns) return 1;
  uint8_t* transposed = patterns.get() + q.order * quads;
  if (q.inner && !(find_patterns(q.inner, q.order, patterns.get()) &&
                   find_patterns(q.inner, q.order, transposed, true)))
    return 2;
  for (int64_t k = 0; k < q.width; k++)
    for (int64_t r = 0; r < padded_rank; r++)
      down[k * padded_rank + r] = r < q.rank ? q.down[r * q.width + k] : 0.0f;
  for (int64_t k = 0; k < round_up(q.width, TOKENS); k++)
    columns[k] = q.signs && k < q.width ? q.signs[k] * q.norm : q.norm;
  const Factors factors{q.inner ? patterns.get() : nullptr, q.inner ? transposed : nullptr,
                        q.inner ? columns.get() : nullptr, down.get(), padded_rank};
#pragma omp parallel num_threads(threads)
  {
#if defined(_OPENMP)
    const int thread = omp_get_thread_num();
#else
    const int thread = 0;
#endif
    const Scratch scratch{&z[thread * token_size], q.grad ? &gradient[thread * token_size] : nullptr,
                          &shared[thread * shared_size]};
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; b++) run(q, factors, b * TOKENS, scratch);
  }
  return 0;
}

// 0; nothing was written where memory ran out (1).
int32_t robuq_absmax_fake_quantize(const Absmax* arguments) {
  const Absmax& q = *arguments;
  void (*run)(const Absmax&, int64_t, float*) = portable_absmax;
#if defined(X86)
  if (q.instruction_set == AVX2_FMA) run = avx2_absmax;
  if (q.instruction_set >= AVX512_VNNI) run = avx512_absmax;
#endif
  const int64_t matrices = q.items * q.groups;
  const int threads = static_cast<int>(std::min<int64_t>(std::max(1, q.threads), matrices));
  if (threads == 0) return 0;
  const auto scratch = allocate<float>(threads * q.m * TOKENS);
  if (!scratch) return 1;
#pragma omp parallel num_threads(threads)
  {
#if defined(_OPENMP)
    const int thread = omp_get_thread_num();
#else
    const int thread = 0;
#endif
#pragma omp for schedule(static)
    for (int64_t i = 0; i < matrices; i++) run(q, i, &scratch[thread * q.m * TOKENS]);
  }
  return 0;
}
}

// Fake quantization for training on a CPU: rotate and quantize tokens, and the gradient of it;
// operands of attention by their largest magnitude.
//
// 16 tokens are handled at once, one in each lane. The backward pass rotates the tokens again,
// which costs less than to write and read what it would need of them. Multiply-adds are rounded
// once on every instruction set, so that all give the same bits.

#include "../hadamard.hpp"

#include <algorithm>

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

constexpr int32_t UNQUANTIZED = -1;  // in place of a Statistic
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
  const float* down;          // [width, padded_rank], zeros behind the rank
  int64_t padded_rank;
};

constexpr int RANKS = 16;  // to which the rank is padded

// Rows of `from` into the lanes of `to` [width, LANES]; lanes without a row repeat the last.
template <class V>
INLINE void load_tokens(const float* from, int64_t stride, int count, int64_t width,
                        typename V::Floats* to) {
  constexpr int LANES = V::LANES;
  using Ints = typename V::Ints;
  const float* row[LANES];
  for (int i = 0; i < LANES; i++) row[i] = from + std::min(i, count - 1) * stride;
  for (int64_t k = 0; k < width; k += LANES) {
    const int64_t columns = std::min<int64_t>(LANES, width - k);
    Ints tile[LANES];
    if (columns == LANES) {
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) memcpy(&tile[i], row[i] + k, sizeof(Ints));
    } else {
      for (int i = 0; i < LANES; i++) {
        tile[i] = Ints{};
        memcpy(&tile[i], row[i] + k, columns * sizeof(float));
      }
    }
    V::transpose(tile);
    if (columns == LANES)
      memcpy(to + k, tile, sizeof tile);
    else
      memcpy(to + k, tile, columns * sizeof(Ints));
  }
}

// The lanes of `from` [width, LANES] into rows.
template <class V>
INLINE void store_tokens(const typename V::Floats* from, int64_t stride, int count, int64_t width,
                         float* to) {
  constexpr int LANES = V::LANES;
  using Ints = typename V::Ints;
  for (int64_t k = 0; k < width; k += LANES) {
    const int64_t columns = std::min<int64_t>(LANES, width - k);
    Ints tile[LANES];
    if (columns == LANES) {
      memcpy(tile, from + k, sizeof tile);
    } else {
      for (int i = 0; i < LANES; i++) tile[i] = Ints{};
      memcpy(tile, from + k, columns * sizeof(Ints));
    }
    V::transpose(tile);
    if (columns == LANES)
      for (int i = 0; i < count; i++) memcpy(to + i * stride + k, &tile[i], sizeof(Ints));
    else
      for (int i = 0; i < count; i++)
        memcpy(to + i * stride + k, &tile[i], columns * sizeof(float));
  }
}

// z times the signs and the norm of the transform.
template <class V>
INLINE void scale_columns(const FakeQuantize& q, typename V::Floats* z) {
  if (q.signs)
    for (int64_t k = 0; k < q.width; k++) z[k] *= V::floats(q.signs[k] * q.norm);
  else
    for (int64_t k = 0; k < q.width; k++) z[k] *= V::floats(q.norm);
}

template <class V>
INLINE void rotate(const FakeQuantize& q, const Factors& factors, typename V::Floats* z,
                   float* shared) {
  if (!factors.patterns) return;
  scale_columns<V>(q, z);
  transform<V>(q, factors.patterns, z, reinterpret_cast<typename V::Floats*>(shared));
}

// Grid of the tokens in the lanes: t = (z - shift) * inverse, x = scale * code + offset.
template <class V>
struct TokenGrid {
  typename V::Floats scale, inverse, shift, offset;
  typename V::Ints dead;  // -1 where a statistic is infinite: it is then a constant
};

template <class V>
INLINE TokenGrid<V> token_grid(const FakeQuantize& q, const typename V::Floats* z) {
  using Floats = typename V::Floats;
  using Ints = typename V::Ints;
  const float infinity = std::numeric_limits<float>::infinity();
  const Floats count = V::floats(static_cast<float>(q.width)), one = V::floats(1.0f);
  const Floats none{};
  TokenGrid<V> grid{};
  if (q.statistic == MEAN_MAD) {
    const Floats mean = sum<V, false>(z, q.width, none) / count;
    grid.shift = magnitude<V>(mean) < infinity ? mean : none;
    grid.scale = sum<V, true>(z, q.width, grid.shift) / count * q.factor;
  } else if (q.statistic == ABSMEAN) {
    grid.scale = sum<V, true>(z, q.width, none) / count;
  } else {
    Floats low = z[0], high = z[0], most{};
    Ints unordered{};
    for (int64_t k = 0; k < q.width; k++) {
      const Floats v = z[k], a = magnitude<V>(v);
      low = v < low ? v : low;
      high = v > high ? v : high;
      most = a > most ? a : most;
      unordered |= v != v;
    }
    const Floats nan = V::floats(std::numeric_limits<float>::quiet_NaN());
    if (q.statistic == MIN_MAX) {
      grid.shift = unordered ? nan : low;
      grid.scale = (high - low) / q.divisor;
      grid.dead = (magnitude<V>(low) == infinity) & (low == high);
    } else {
      grid.scale = unordered ? nan : most;
    }
  }
  grid.dead |= grid.scale == infinity;
  if (q.statistic == ABSMAX || q.statistic == ABSMEAN) {
    const Floats statistic = grid.dead ? V::floats(q.divisor) : grid.scale;
    grid.inverse = one / (statistic + q.epsilon) * q.divisor;
    grid.scale = statistic / q.divisor;
    return grid;
  }
  grid.scale = grid.scale < infinity ? grid.scale : one;  // also NaN
  grid.inverse = one / grid.scale;
  grid.inverse = grid.inverse < infinity ? grid.inverse : none;
  if (q.statistic == MIN_MAX) grid.shift = grid.dead ? none : grid.shift - q.low * grid.scale;
  grid.offset = q.floor ? grid.shift + grid.scale / 2.0f : grid.shift;
  return grid;
}

// Code of a coordinate, as a float; NaN stays NaN.
template <class V>
INLINE typename V::Floats code_of(const FakeQuantize& q, typename V::Floats t) {
  t = t < q.low ? V::floats(q.low) : t;
  t = t > q.high ? V::floats(q.high) : t;
  const typename V::Floats whole = (t + ROUNDER) - ROUNDER;
  return q.floor ? (whole > t ? whole - 1.0f : whole) : whole;
}

// z @ down.T of the tokens that exist.
template <class V>
INLINE void project(const FakeQuantize& q, const Factors& factors, int count,
                    const typename V::Floats* z, float* out) {
  constexpr int AT_ONCE = V::LANES;  // as many as there are registers for
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
INLINE void forward(const FakeQuantize& q, const Factors& factors, int64_t first, int count,
                    const Scratch& scratch) {
  using Floats = typename V::Floats;
  Floats* z = reinterpret_cast<Floats*>(scratch.z);
  float* out = q.out + first * (q.width + q.rank);
  load_tokens<V>(q.x + first * q.x_stride, q.x_stride, count, q.width, z);
  rotate<V>(q, factors, z, scratch.shared);
  project<V>(q, factors, count, z, out);
  if (q.statistic != UNQUANTIZED) {
    const TokenGrid<V> grid = token_grid<V>(q, z);
    for (int64_t k = 0; k < q.width; k++) {
      const Floats code = code_of<V>(q, (z[k] - grid.shift) * grid.inverse);
      z[k] = V::multiply_add(code, grid.scale, grid.offset);
    }
  }
  store_tokens<V>(z, q.width + q.rank, count, q.width, out);
}

// The gradient g at the values of a grid by mean and mean absolute deviation becomes that at z:
// with t, its level and m = 1 inside the clip, d x = (1 - m) d mean + m dz + (level - m t) d scale.
template <class V>
INLINE void through_statistics(const FakeQuantize& q, const typename V::Floats* z,
                               typename V::Floats* g) {
  using Floats = typename V::Floats;
  const TokenGrid<V> grid = token_grid<V>(q, z);
  const float below = q.floor ? 0.0f : 0.5f, up = q.floor ? 0.5f : 0.0f;
  const float low = q.low - below, high = q.high + 1.0f - below;
  const Floats one = V::floats(1.0f), none{};
  Floats clipped_sum{}, slope_sum{}, sign_sum{};
  for (int64_t begin = 0; begin < q.width; begin += PART) {
    Floats clipped_part{}, slope_part{}, sign_part{};
    for (int64_t k = begin; k < std::min(q.width, begin + PART); k++) {
      const Floats centred = z[k] - grid.shift, t = centred * grid.inverse, grad = g[k];
      const Floats level = code_of<V>(q, t) + up;
      const auto is_clipped = (t <= low) | (t >= high);
      const Floats passed = is_clipped ? none : grad;
      clipped_part += is_clipped ? grad : none;
      slope_part = V::multiply_add(grad, level, slope_part);
      slope_part = V::multiply_add(-passed, t, slope_part);
      sign_part += (centred > none ? one : none) - (centred < none ? one : none);
      g[k] = passed;
    }
    clipped_sum += clipped_part;
    slope_sum += slope_part;
    sign_sum += sign_part;
  }
  const Floats share = V::floats(1.0f / static_cast<float>(q.width));
  Floats slope = slope_sum * (share * q.factor);
  slope = (grid.dead | (grid.inverse == none)) ? none : slope;
  Floats constant = grid.dead ? none : clipped_sum * share;
  constant -= sign_sum * share * slope;
  for (int64_t k = 0; k < q.width; k++) {
    const Floats centred = z[k] - grid.shift;
    const Floats step = (centred > none ? slope : none) - (centred < none ? slope : none);
    g[k] = g[k] + step + constant;
  }
}

template <class V>
INLINE void backward(const FakeQuantize& q, const Factors& factors, int64_t first, int count,
                     const Scratch& scratch) {
  using Floats = typename V::Floats;
  Floats* z = reinterpret_cast<Floats*>(scratch.z);
  Floats* g = reinterpret_cast<Floats*>(scratch.gradient);
  const float* grad = q.grad + first * q.grad_stride;
  load_tokens<V>(grad, q.grad_stride, count, q.width, g);
  if (q.statistic == MEAN_MAD) {
    load_tokens<V>(q.x + first * q.x_stride, q.x_stride, count, q.width, z);
    rotate<V>(q, factors, z, scratch.shared);
    through_statistics<V>(q, z, g);
  }
  for (int64_t r = 0; r < q.rank; r += RANKS) {
    Floats branch[RANKS] = {};
    for (int i = 0; i < RANKS && r + i < q.rank; i++)
      for (int t = 0; t < count; t++) branch[i][t] = grad[t * q.grad_stride + q.width + r + i];
    for (int64_t k = 0; k < q.width; k++) {
      const float* down = factors.down + k * factors.padded_rank + r;
      Floats y = g[k];
#pragma GCC unroll 16
      for (int i = 0; i < RANKS; i++) y = V::multiply_add(branch[i], V::floats(down[i]), y);
      g[k] = y;
    }
  }
  if (factors.transposed) {
    transform<V>(q, factors.transposed, g, reinterpret_cast<Floats*>(scratch.shared));
    scale_columns<V>(q, g);
  }
  store_tokens<V>(g, q.width, count, q.width, q.out + first * q.width);
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

// Largest magnitudes become s and its inverse, both 0 where there is nothing to divide by.
template <class V>
INLINE void scale_and_inverse(typename V::Floats most, float limit, typename V::Floats& scale,
                              typename V::Floats& inverse) {
  const float infinity = std::numeric_limits<float>::infinity();
  scale = most / limit;
  inverse = 1.0f / scale;
  inverse = inverse < infinity ? inverse : typename V::Floats{};  // NaN too: the scale shows it
}

template <class V>
INLINE typename V::Floats rounded(typename V::Floats x, typename V::Floats scale,
                                  typename V::Floats inverse) {
  return ((x * inverse + ROUNDER) - ROUNDER) * scale;
}

// NaN wins, as it does in torch.
template <class V>
INLINE typename V::Floats larger(typename V::Floats most, typename V::Floats x) {
  const typename V::Floats a = magnitude<V>(x);
  return ((a > most) | (a != a)) ? a : most;
}

template <class V>
INLINE typename V::Floats load_some(const float* from, int64_t count) {
  if (count >= V::LANES) return V::load(from);
  typename V::Floats x{};
  memcpy(&x, from, count * sizeof(float));
  return x;
}

template <class V>
INLINE void store_some(typename V::Floats x, int64_t count, float* to) {
  memcpy(to, &x, std::min<int64_t>(V::LANES, count) * sizeof(float));
}

// One matrix [n, m].
template <class V>
INLINE void absmax(const Absmax& q, int64_t index) {
  using Floats = typename V::Floats;
  const float* x = q.x + index / q.groups * q.item_stride + index % q.groups * q.group_stride;
  float* out = q.out + index * q.n * q.m;
  Floats scale, inverse;
  if (q.by_column) {
    for (int64_t j = 0; j < q.m; j += V::LANES) {
      Floats most{};
      for (int64_t i = 0; i < q.n; i++)
        most = larger<V>(most, load_some<V>(x + i * q.row_stride + j, q.m - j));
      scale_and_inverse<V>(most, q.limit, scale, inverse);
      for (int64_t i = 0; i < q.n; i++) {
        const Floats v = load_some<V>(x + i * q.row_stride + j, q.m - j);
        store_some<V>(rounded<V>(v, scale, inverse), q.m - j, out + i * q.m + j);
      }
    }
    return;
  }
  for (int64_t i = 0; i < q.n; i++) {
    const float* row = x + i * q.row_stride;
    Floats lanes{}, most{};
    for (int64_t j = 0; j < q.m; j += V::LANES)
      lanes = larger<V>(lanes, load_some<V>(row + j, q.m - j));
    for (int l = 0; l < V::LANES; l++) most = larger<V>(most, V::floats(lanes[l]));
    scale_and_inverse<V>(most, q.limit, scale, inverse);
    for (int64_t j = 0; j < q.m; j += V::LANES)
      store_some<V>(rounded<V>(load_some<V>(row + j, q.m - j), scale, inverse), q.m - j,
                    out + i * q.m + j);
  }
}

using Portable = Vectors<4, true>;

void portable(const FakeQuantize& q, const Factors& f, int64_t first, const Scratch& scratch) {
  tokens<Portable>(q, f, first, scratch);
}
void portable_absmax(const Absmax& q, int64_t index) { absmax<Portable>(q, index); }

#if defined(X86)
TARGET_AVX2 void avx2(const FakeQuantize& q, const Factors& f, int64_t first,
                      const Scratch& scratch) {
  tokens<Vectors<8, true>>(q, f, first, scratch);
}
TARGET_AVX2 void avx2_absmax(const Absmax& q, int64_t index) {
  absmax<Vectors<8, true>>(q, index);
}

TARGET_AVX512 void avx512(const FakeQuantize& q, const Factors& f, int64_t first,
                          const Scratch& scratch) {
  tokens<Vectors<16, true>>(q, f, first, scratch);
}
TARGET_AVX512 void avx512_absmax(const Absmax& q, int64_t index) {
  absmax<Vectors<16, true>>(q, index);
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
  const int64_t padded_rank = round_up(q.rank, RANKS);
  const auto z = allocate<float>(threads * token_size);
  const auto gradient = allocate<float>(q.grad ? threads * token_size : 0);
  const auto shared = allocate<float>(threads * shared_size);
  const auto down = allocate<float>(q.width * padded_rank);
  const auto patterns = allocate<uint8_t>(2 * q.order * quads);
  if (!z || !gradient || !shared || !down || !patterns) return 1;
  uint8_t* transposed = patterns.get() + q.order * quads;
  if (q.inner && !(find_patterns(q.inner, q.order, patterns.get()) &&
                   find_patterns(q.inner, q.order, transposed, true)))
    return 2;
  for (int64_t k = 0; k < q.width; k++)
    for (int64_t r = 0; r < padded_rank; r++)
      down[k * padded_rank + r] = r < q.rank ? q.down[r * q.width + k] : 0.0f;
  const Factors factors{q.inner ? patterns.get() : nullptr, q.inner ? transposed : nullptr,
                        down.get(), padded_rank};
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

int32_t robuq_absmax_fake_quantize(const Absmax* arguments) {
  const Absmax& q = *arguments;
  void (*run)(const Absmax&, int64_t) = portable_absmax;
#if defined(X86)
  if (q.instruction_set == AVX2_FMA) run = avx2_absmax;
  if (q.instruction_set >= AVX512_VNNI) run = avx512_absmax;
#endif
  const int64_t matrices = q.items * q.groups;
#pragma omp parallel for schedule(static) num_threads(std::max(1, q.threads))
  for (int64_t i = 0; i < matrices; i++) run(q, i);
  return 0;
}
}

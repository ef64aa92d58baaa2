// Ternary weights for training on a CPU; reference.py defines the rules.
//
// Sums have always 16 partial ones, whatever a register holds, so that all instruction sets give
// the same bits.

#include "../cpu.hpp"

#include <algorithm>
#include <cmath>

extern "C" {

// Mirrored by cpu.py. The forward pass writes the quantized weight [outputs, width], and `up`
// [outputs, rank] beside it where there is one; the backward pass, told by `grad`, copies the first
// `width` columns of `grad`, clamped to [-1, 1] where `clamp`. `scale` [outputs], or [1] where there
// is one for all, is written too where it is asked for. Strides are in elements.
struct TernaryWeight {
  const float* weight;
  const float* up;
  const float* grad;
  float* out;
  float* scale;
  int64_t outputs, width, rank, weight_stride, up_stride, grad_stride;
  float epsilon;
  int32_t per_row, clamp, threads, instruction_set;
};
}

namespace {

constexpr int SUMS = 16;

template <class V>
INLINE typename V::Floats magnitude(typename V::Floats x) {
  return bits<typename V::Floats>(bits<typename V::Ints>(x) & 0x7fffffff);
}

// 1 where |w| reaches the threshold, and where either is NaN.
template <class V>
INLINE typename V::Floats kept(typename V::Floats size, typename V::Floats threshold) {
  return size < threshold ? typename V::Floats{} : V::floats(1.0f);
}

// Sums over a row of |w| and, with a threshold, of what `kept` keeps of it and how many.
template <class V>
INLINE void sums_of(const float* row, int64_t width, float threshold, float& total, float& count) {
  constexpr int LANES = V::LANES, VECTORS = SUMS / LANES;
  using Floats = typename V::Floats;
  Floats sizes[VECTORS] = {}, counts[VECTORS] = {};
  const Floats least = V::floats(threshold);
  for (int64_t k = 0; k < width; k += SUMS)
    for (int v = 0; v < VECTORS; v++) {
      const int64_t left = width - k - v * LANES;
      Floats size{}, keep{};
      if (left >= LANES) {
        size = magnitude<V>(V::load(row + k + v * LANES));
        keep = kept<V>(size, least);
      } else {
        for (int64_t i = 0; i < left; i++) {
          const float a = std::abs(row[k + v * LANES + i]);
          size[i] = a;
          keep[i] = a < threshold ? 0.0f : 1.0f;
        }
      }
      sizes[v] += size * keep;
      counts[v] += keep;
    }
  total = count = 0.0f;
  for (int i = 0; i < SUMS; i++) total += sizes[i / LANES][i % LANES];
  for (int i = 0; i < SUMS; i++) count += counts[i / LANES][i % LANES];
}

template <class V, class Function>
INLINE void for_row(const float* from, int64_t width, float* to, Function function) {
  constexpr int LANES = V::LANES;
  int64_t k = 0;
  for (; k + LANES <= width; k += LANES) {
    const typename V::Floats y = function(V::load(from + k));
    memcpy(to + k, &y, sizeof y);
  }
  if (k == width) return;
  typename V::Floats x{};
  memcpy(&x, from + k, (width - k) * sizeof(float));
  const typename V::Floats y = function(x);
  memcpy(to + k, &y, (width - k) * sizeof(float));
}

template <class V>
INLINE void quantize_row(const TernaryWeight& q, int64_t row, float shared_scale) {
  using Floats = typename V::Floats;
  const float* weight = q.weight + row * q.weight_stride;
  float* out = q.out + row * (q.width + q.rank);
  if (q.rank) memcpy(out + q.width, q.up + row * q.up_stride, q.rank * sizeof(float));
  const Floats one = V::floats(1.0f), none{};
  if (!q.per_row) {
    const Floats scale = V::floats(shared_scale), divisor = V::floats(shared_scale + q.epsilon);
    const Floats rounder = V::floats(12582912.0f);  // 1.5 * 2^23: adding it rounds half to even
    for_row<V>(weight, q.width, out, [&](Floats w) __attribute__((always_inline)) {
      Floats t = w / divisor;
      t = t < -one ? -one : t;
      t = t > one ? one : t;  // NaN passes
      return ((t + rounder) - rounder) * scale;
    });
    return;
  }
  float total, count;
  sums_of<V>(weight, q.width, 0.0f, total, count);
  const float threshold = total / static_cast<float>(q.width) * 0.5f;
  sums_of<V>(weight, q.width, threshold, total, count);
  const float row_scale = total / std::max(count, 1.0f);
  if (q.scale) q.scale[row] = row_scale;
  const Floats scale = V::floats(row_scale), least = V::floats(threshold);
  for_row<V>(weight, q.width, out, [&](Floats w) __attribute__((always_inline)) {
    const Floats sign = (w > none ? one : none) - (w < none ? one : none);
    return sign * kept<V>(magnitude<V>(w), least) * scale;
  });
}

template <class V>
INLINE void gradient_row(const TernaryWeight& q, int64_t row) {
  using Floats = typename V::Floats;
  const float* grad = q.grad + row * q.grad_stride;
  float* out = q.out + row * q.width;
  if (!q.clamp) {
    memcpy(out, grad, q.width * sizeof(float));
    return;
  }
  const Floats one = V::floats(1.0f);
  for_row<V>(grad, q.width, out, [&](Floats g) __attribute__((always_inline)) {
    g = g < -one ? -one : g;
    return g > one ? one : g;  // NaN passes
  });
}

// Row `row` of the pass; with `sums`, the sum of its magnitudes only.
template <class V>
INLINE void work(const TernaryWeight& q, int64_t row, float shared_scale, float* sums) {
  float count;
  if (sums)
    sums_of<V>(q.weight + row * q.weight_stride, q.width, 0.0f, sums[row], count);
  else if (q.grad)
    gradient_row<V>(q, row);
  else
    quantize_row<V>(q, row, shared_scale);
}

void portable(const TernaryWeight& q, int64_t row, float scale, float* sums) {
  work<Vectors<4, false>>(q, row, scale, sums);
}
#if defined(X86)
TARGET_AVX2 void avx2(const TernaryWeight& q, int64_t row, float scale, float* sums) {
  work<Vectors<8, true>>(q, row, scale, sums);
}
TARGET_AVX512 void avx512(const TernaryWeight& q, int64_t row, float scale, float* sums) {
  work<Vectors<16, true>>(q, row, scale, sums);
}
#endif

}  // namespace

// 0; nothing was written where memory ran out (1).
extern "C" int32_t robuq_ternary_weight(const TernaryWeight* arguments) {
  const TernaryWeight& q = *arguments;
  void (*run)(const TernaryWeight&, int64_t, float, float*) = portable;
#if defined(X86)
  if (q.instruction_set == AVX2_FMA) run = avx2;
  if (q.instruction_set >= AVX512_VNNI) run = avx512;
#endif
  const int threads = static_cast<int>(
      std::min<int64_t>(std::max(1, q.threads), std::max<int64_t>(1, q.outputs)));
  float scale = 0.0f;
  if (!q.grad && !q.per_row) {
    const auto sums = allocate<float>(q.outputs);
    if (!sums) return 1;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < q.outputs; row++) run(q, row, 0.0f, sums.get());
    double total = 0.0;
    for (int64_t row = 0; row < q.outputs; row++) total += sums[row];
    scale = static_cast<float>(total / static_cast<double>(q.outputs * q.width));
    if (q.scale) *q.scale = scale;
  }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < q.outputs; row++) run(q, row, scale, nullptr);
  return 0;
}

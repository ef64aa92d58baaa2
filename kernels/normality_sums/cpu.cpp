// Sums of sorted tokens on a CPU; robuq_bench/normality/token_sums.py computes the same with numpy.
//
// Eight entries are handled at once whatever the instruction set holds, and no product is fused with
// a sum, so that all instruction sets give the same bits. Everything is float64.

#include "../cpu.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

extern "C" {

// Mirrored by cpu.py.
struct NormalitySums {
  const void* x;          // [rows, n], each row sorted
  const double* weights;  // [n] of Shapiro and Wilk
  const double* density;  // [n + 1] normal density at the quantiles of i / n
  double* sums;           // [rows, SUMS]
  int64_t rows, n, window;
  int32_t float64, instruction_set;
};
}

namespace {

constexpr int EIGHT = 8;
// Factors whose logarithm is taken at once: a float64 holds 8 spacings of 1e-38, and 1e-4 to the power
// of 12 * 13 / 2, which exp(z²/2) Φ(-|z|) of 96 neighbours is only from a billion entries on.
constexpr int SPACINGS = 8, TAILS = 12;

// In the order of cpu.py.
enum Sum { MEAN, STD, SHAPIRO_W, SKEWNESS, KURTOSIS, ANDERSON, KS, WASSERSTEIN, ENTROPY, L3, SUMS };

// exp(x²/2) Φ(-x) (5 + x) as a polynomial in (x - 5) / (x + 5), lowest power first: the Chebyshev
// interpolant on x >= 0, computed with 50 digits. Relative error 1.3e-16.
constexpr double MILLS_CENTRE = 5.0;
constexpr double MILLS[] = {
    0.769193049750063,      -0.6653825028900576,    0.4953056159699805,
    -0.3135331566712172,    0.16502036617019517,    -0.06911863870874183,
    0.02079506680323404,    -0.0029933767389359726, -0.0007978694277475297,
    0.0005448988347568596,  -5.937558833377767e-05, -4.976178374018789e-05,
    1.6680852719925394e-05, 3.977938262343427e-06,  -2.7688787836720915e-06,
    -3.311028544331811e-07, 4.3347664285137567e-07, 3.5844546560871596e-08,
    -6.741689051823604e-08, -5.027231930966982e-09, 9.275082241537343e-09,
    5.059297487966696e-10,  -7.854458583247658e-10};

// 1 / k!, and 1 / (2 k + 1): exp on |x| <= ln(2) / 2 and atanh(x) / x in x² on |x| <= 0.172.
constexpr double EXP[] = {1.0,         1.0,          1.0 / 2,       1.0 / 6,       1.0 / 24,
                          1.0 / 120,   1.0 / 720,    1.0 / 5040,    1.0 / 40320,   1.0 / 362880,
                          1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600};
constexpr double ATANH[] = {1.0,      1.0 / 3,  1.0 / 5,  1.0 / 7,  1.0 / 9, 1.0 / 11,
                            1.0 / 13, 1.0 / 15, 1.0 / 17, 1.0 / 19, 1.0 / 21};
// ln 2 in two parts: the first times any exponent is exact.
constexpr double LN2_HIGH = 0x1.62e42fefa38p-1, LN2_LOW = 0x1.ef35793c7673p-45;
constexpr double LOG2_E = 1.4426950408889634, SQRT_2_OVER_PI = 0.7978845608028654;
constexpr double INFINITE = std::numeric_limits<double>::infinity();

// Eight float64 in as many registers as the instruction set needs.
template <class V>
struct Eight {
  static constexpr int LANES = V::LANES / 2, PARTS = EIGHT / LANES;
  using Doubles = typename V::Doubles;
  using Words = typename V::Words;
  Doubles part[PARTS];

  INLINE Eight() = default;
  INLINE Eight(double x) {
    for (int p = 0; p < PARTS; p++) part[p] = x + Doubles{};
  }

  // The entries that exist, and zeros behind them.
  static INLINE Eight load(const double* from, int64_t count) {
    double some[EIGHT];
    if (count < EIGHT) {
      std::fill_n(some, EIGHT, 0.0);
      from = static_cast<double*>(memcpy(some, from, count * sizeof(double)));
    }
    Eight y;
    for (int p = 0; p < PARTS; p++) y.part[p] = V::template load_as<Doubles>(from + p * LANES);
    return y;
  }

  INLINE double lane(int i) const { return part[i / LANES][i % LANES]; }

  INLINE double total() const {
    double sum = 0.0;
    for (int i = 0; i < EIGHT; i++) sum += lane(i);
    return sum;
  }

#define OPERATOR(op)                                                       \
  friend INLINE Eight operator op(Eight a, const Eight& b) {               \
    for (int p = 0; p < PARTS; p++) a.part[p] = a.part[p] op b.part[p];    \
    return a;                                                              \
  }                                                                        \
  INLINE Eight& operator op##=(const Eight& b) { return *this = *this op b; }
  OPERATOR(+)
  OPERATOR(-)
  OPERATOR(*)
  OPERATOR(/)
#undef OPERATOR

  // yes where a < b, else no.
  static INLINE Eight where_less(const Eight& a, const Eight& b, const Eight& yes,
                                 const Eight& no) {
    Eight y;
    for (int p = 0; p < PARTS; p++) y.part[p] = a.part[p] < b.part[p] ? yes.part[p] : no.part[p];
    return y;
  }

  static INLINE Eight larger(const Eight& a, const Eight& b) { return where_less(a, b, b, a); }

  INLINE Eight magnitude() const {
    Eight y;
    for (int p = 0; p < PARTS; p++)
      y.part[p] = bits<Doubles>(bits<Words>(part[p]) & 0x7fffffffffffffffu);
    return y;
  }

  // Sum of coefficients[k] x^k, in four chains: each step of one waits for the step before.
  template <size_t N>
  static INLINE Eight polynomial(const double (&coefficients)[N], const Eight& x) {
    const Eight square = x * x, fourth = square * square;
    Eight chains[4];
#pragma GCC unroll 4
    for (size_t j = 0; j < 4; j++) {
      size_t k = N - 1 - (N - 1 - j) % 4;
      chains[j] = coefficients[k];
#pragma GCC unroll 16
      for (; k >= 4; k -= 4) chains[j] = chains[j] * fourth + coefficients[k - 4];
    }
    return (chains[2] * square + chains[0]) + (chains[3] * square + chains[1]) * x;
  }

  // e^x for x <= 0, and no less than e^-700.
  static INLINE Eight exp(Eight x) {
    constexpr double ROUNDER = 6755399441055744.0;  // 1.5 * 2^52: its last bits hold the integer
    x = larger(x, -700.0);
    const Eight shifted = x * LOG2_E + ROUNDER, whole = shifted - ROUNDER;
    Eight y = polynomial(EXP, (x - whole * LN2_HIGH) - whole * LN2_LOW);
    for (int p = 0; p < PARTS; p++)
      y.part[p] = bits<Doubles>(bits<Words>(y.part[p]) + (bits<Words>(shifted.part[p]) << 52));
    return y;
  }

  // ln x for x >= 0, minus infinity below the normal numbers.
  static INLINE Eight log(const Eight& x) {
    constexpr uint64_t ROOT_HALF = 0x3fe6a09e667f3bcdu, ONE = 0x3ff0000000000000u;
    constexpr uint64_t FRACTION = 0x000fffffffffffffu;
    constexpr double TWO_52 = 4503599627370496.0;
    Eight exponent, m;
    for (int p = 0; p < PARTS; p++) {
      const Words word = bits<Words>(x.part[p]) + (ONE - ROOT_HALF);
      const Words biased = (word >> 52) | bits<uint64_t>(TWO_52);
      exponent.part[p] = bits<Doubles>(biased) - (TWO_52 + 1023.0);
      m.part[p] = bits<Doubles>((word & FRACTION) + ROOT_HALF);  // in [√½, √2)
    }
    const Eight s = (m - 1.0) / (m + 1.0);
    const Eight y = exponent * LN2_HIGH +
                    (s * polynomial(ATANH, s * s) * 2.0 + exponent * LN2_LOW);
    return where_less(x, std::numeric_limits<double>::min(), -INFINITE, y);
  }
};

// A row with its sums of squares, fourth powers and so on into `sums`; `y` has n + 2 window entries.
template <class V, class T>
INLINE void token(const NormalitySums& q, const T* x, double* y, double* sums) {
  using E = Eight<V>;
  const int64_t n = q.n, m = q.window;
  const double count = static_cast<double>(n);
  std::fill_n(sums, SUMS, std::numeric_limits<double>::quiet_NaN());
  const double low = static_cast<double>(x[0]), high = static_cast<double>(x[n - 1]);
  if (!(low > -INFINITE && high < INFINITE && low < high)) return;

  // The largest magnitude comes into [1/2, 1): no power of it overflows.
  int exponent;
  std::frexp(std::max(-low, high), &exponent);
  const double scale = std::ldexp(1.0, std::clamp(-exponent, -1000, 1000));
  double* d = y + m;
  for (int64_t i = 0; i < n; i++) d[i] = static_cast<double>(x[i]) * scale;
  E sum = 0.0, cubes = 0.0;
  for (int64_t i = 0; i < n; i += EIGHT) {
    const E v = E::load(d + i, n - i);
    sum += v;
    cubes += v * v * v.magnitude();
  }
  const double mean = sum.total() / count;

  for (int64_t i = 0; i < n; i++) d[i] -= mean;
  E squares = 0.0, third = 0.0, fourth = 0.0, shapiro = 0.0;
  for (int64_t i = 0; i < n; i += EIGHT) {
    const E v = E::load(d + i, n - i), square = v * v;
    squares += square;
    third += square * v;
    fourth += square * square;
    shapiro += v * E::load(q.weights + i, n - i);
  }
  const double sum2 = squares.total(), std = std::sqrt(sum2 / (count - 1.0));
  if (!(std / scale > 0.0)) return;

  // Φ(z) of every order statistic against the uniform. With Φ(-|z|) = mills exp(-z²/2), the
  // logarithms that A² weights need neither that exponential nor one call for every entry: weights
  // are linear in i, so the logarithms of a product and of the product of its beginnings suffice.
  const double inverse_std = 1.0 / std, inverse_n = 1.0 / count;
  E index;
  for (int i = 0; i < EIGHT; i++) index.part[i / E::LANES][i % E::LANES] = i;
  E logarithms = 0.0, half_squares = 0.0, distance = 0.0, wasserstein = 0.0;
  for (int64_t begin = 0; begin < n; begin += TAILS * EIGHT) {
    const int64_t end = std::min(n, begin + TAILS * EIGHT);
    const E first = (index + static_cast<double>(begin)) * (2.0 * inverse_n) + inverse_n;
    E lower = 1.0, upper = 1.0, lower_begins = 1.0, upper_begins = 1.0;
    for (int64_t i = begin; i < end; i += EIGHT) {
      const E number = index + static_cast<double>(i);
      const E weight = number * (2.0 * inverse_n) + inverse_n;  // (2 i + 1) / n
      const E z = E::load(d + i, n - i) * inverse_std, magnitude = z.magnitude();
      const E inverse = E(1.0) / (magnitude + MILLS_CENTRE);
      const E mills = E::polynomial(MILLS, (magnitude - MILLS_CENTRE) * inverse) * inverse;
      const E half_square = z * z * 0.5, density = E::exp(E(0.0) - half_square);
      const E tail = mills * density, body = E(1.0) - tail;
      E below = E::where_less(z, 0.0, mills, body), above = E::where_less(z, 0.0, body, mills);
      half_squares += E::where_less(z, 0.0, weight, E(2.0) - weight) * half_square;

      // Φ(z) minus the middle of interval i of the uniform.
      const E centred = E::where_less(z, 0.0, tail - 0.5, E(0.5) - tail);
      const E difference = centred - (weight * 0.5 - 0.5);
      E gap = difference.magnitude();
      // Where the quantile function crosses z inside the interval, its integral has two parts.
      const E left = E::load(q.density + i, n - i), right = E::load(q.density + i + 1, n - i);
      const E crossing = z * difference * 2.0 + density * SQRT_2_OVER_PI - (left + right);
      const E apart = (z * inverse_n - (left - right)).magnitude();
      E area = E::where_less(gap, 0.5 * inverse_n, crossing, apart);
      if (n - i < EIGHT) {
        const E limit = count;
        below = E::where_less(number, limit, below, 1.0);
        above = E::where_less(number, limit, above, 1.0);
        gap = E::where_less(number, limit, gap, 0.0);
        area = E::where_less(number, limit, area, 0.0);
      }
      lower *= below;
      upper *= above;
      lower_begins *= lower;
      upper_begins *= upper;
      distance = E::larger(distance, gap);
      wasserstein += area;
    }
    const double vectors = static_cast<double>((end - begin + EIGHT - 1) / EIGHT);
    const double step = 2.0 * EIGHT * inverse_n;
    const E last = first + vectors * step;
    logarithms += last * E::log(lower / upper) + E::log(upper) * 2.0;
    logarithms += E::log(upper_begins / lower_begins) * step;
  }
  double farthest = 0.0;
  for (int i = 0; i < EIGHT; i++) farthest = std::max(farthest, distance.lane(i));

  // Spacings x_(i+m) - x_(i-m), indices clamped; the mean is added again by nobody.
  std::fill_n(y, m, d[0]);
  std::fill_n(d + n, m, d[n - 1]);
  E spacings = 0.0;
  for (int64_t begin = 0; begin < n; begin += SPACINGS * EIGHT) {
    E product = 1.0;
    for (int64_t i = begin; i < std::min(n, begin + SPACINGS * EIGHT); i += EIGHT) {
      E spacing = E::load(y + i + 2 * m, n - i) - E::load(y + i, n - i);
      if (n - i < EIGHT)
        spacing = E::where_less(index + static_cast<double>(i), count, spacing, 1.0);
      product *= spacing;
    }
    spacings += E::log(product);
  }

  const double total2 = sum2 + count * mean * mean;
  sums[MEAN] = mean / scale;
  sums[STD] = std / scale;
  sums[SHAPIRO_W] = std::min(1.0, shapiro.total() * shapiro.total() / sum2);
  sums[SKEWNESS] = std::sqrt(count) * third.total() / (sum2 * std::sqrt(sum2));
  sums[KURTOSIS] = count * fourth.total() / (sum2 * sum2) - 3.0;
  sums[ANDERSON] = half_squares.total() - logarithms.total() - count;
  sums[KS] = farthest + 0.5 * inverse_n;
  sums[WASSERSTEIN] = wasserstein.total();
  sums[ENTROPY] = spacings.total() * inverse_n - E::log(std).lane(0);
  sums[L3] = cubes.total() / (total2 * std::sqrt(total2));
}

template <class V>
INLINE void tokens(const NormalitySums& q, double* scratch) {
  for (int64_t r = 0; r < q.rows; r++) {
    double* sums = q.sums + r * SUMS;
    if (q.float64)
      token<V>(q, static_cast<const double*>(q.x) + r * q.n, scratch, sums);
    else
      token<V>(q, static_cast<const float*>(q.x) + r * q.n, scratch, sums);
  }
}

void portable(const NormalitySums& q, double* scratch) { tokens<Vectors<4, false>>(q, scratch); }

#if defined(X86)
TARGET_AVX2 void avx2(const NormalitySums& q, double* scratch) {
  tokens<Vectors<8, true>>(q, scratch);
}

TARGET_AVX512 void avx512(const NormalitySums& q, double* scratch) {
  tokens<Vectors<16, true>>(q, scratch);
}
#endif

}  // namespace

// 0, or 1 where memory ran out.
extern "C" int32_t robuq_normality_sums(const NormalitySums* arguments) {
  const NormalitySums& q = *arguments;
  void (*run)(const NormalitySums&, double*) = portable;
#if defined(X86)
  if (q.instruction_set == AVX2_FMA) run = avx2;
  if (q.instruction_set >= AVX512_VNNI) run = avx512;
#endif
  const auto scratch = allocate<double>(q.n + 2 * q.window);
  if (!scratch) return 1;
  run(q, scratch.get());
  return 0;
}

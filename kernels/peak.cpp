// How many operations on 8-bit integers a CPU does when nothing waits for memory.

#include "cpu.hpp"

namespace {

// Hides a value from the compiler, which would otherwise multiply once or move registers around.
#define HIDE(kind, x) asm volatile("" : "+" kind(x))
// Sums with names of their own: an array of them would live in memory.
#define TWELVE(step) \
  step(a) step(b) step(c) step(d) step(e) step(f) step(g) step(h) step(i) step(j) step(k) step(l)

int64_t portable(int64_t steps) {
  using Shorts = Types<4>::Shorts;
  Shorts weight = Shorts{} + 1, codes = Shorts{} + 3;
  Shorts a{}, b{}, c{}, d{}, e{}, f{}, g{}, h{}, i{}, j{}, k{}, l{};
#if defined(X86)
#define ANYWHERE "x"
#elif defined(__aarch64__)
#define ANYWHERE "w"
#else
#define ANYWHERE "m"
#endif
#define STEP(sum)        \
  HIDE(ANYWHERE, codes); \
  sum += weight * codes; \
  HIDE(ANYWHERE, sum);
  for (int64_t s = 0; s < steps; s++) { TWELVE(STEP) }
#undef STEP
  return steps * 12 * 2 * 8;
}

#if defined(X86)
TARGET_AVX2 int64_t avx2(int64_t steps) {
  const __m256i weight = _mm256_set1_epi8(1);
  __m256i codes = _mm256_set1_epi8(3);
  __m256i a{}, b{}, c{}, d{}, e{}, f{}, g{}, h{}, i{}, j{}, k{}, l{};
#define STEP(sum)                                                    \
  HIDE("x", codes);                                                  \
  sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(weight, codes)); \
  HIDE("x", sum);
  for (int64_t s = 0; s < steps; s++) { TWELVE(STEP) }
#undef STEP
  return steps * 12 * 2 * 32;
}

TARGET_AVX512 int64_t avx512(int64_t steps) {
  const __m512i weight = _mm512_set1_epi8(1), codes = _mm512_set1_epi8(3);
  __m512i a{}, b{}, c{}, d{}, e{}, f{}, g{}, h{}, i{}, j{}, k{}, l{};
#define STEP(sum)                                   \
  sum = _mm512_dpbusd_epi32(sum, weight, codes); \
  HIDE("v", sum);
  for (int64_t s = 0; s < steps; s++) { TWELVE(STEP) }
#undef STEP
  return steps * 12 * 2 * 64;
}
#endif

#if defined(AMX)
TARGET_AMX int64_t amx(int64_t steps) {
  configure_tiles();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (int64_t s = 0; s < steps; s++) {
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
  }
  _tile_release();
  return steps * 4 * 2 * 16 * 16 * 64;
}
#endif

}  // namespace

// Runs `steps` steps on each of `threads` threads and returns the operations of all of them, two
// per multiply-accumulate.
extern "C" int64_t robuq_peak(int32_t set, int32_t threads, int64_t steps) {
  int64_t (*loop)(int64_t) = portable;
#if defined(X86)
  if (set == AVX2_FMA) loop = avx2;
  if (set >= AVX512_VNNI) loop = avx512;
#endif
#if defined(AMX)
  if (set == AMX_INT8) loop = amx;
#endif
  static_cast<void>(threads);  // without OpenMP there is one
  int64_t operations = 0;
#pragma omp parallel num_threads(threads) reduction(+ : operations)
  operations += loop(steps);
  return operations;
}

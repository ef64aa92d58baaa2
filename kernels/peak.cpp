// How many operations on 8-bit integers a CPU does when nothing waits for memory.

#include "cpu.hpp"

namespace {

// Hides a value from the compiler, which would otherwise multiply once or move registers around.
#define HIDE(kind, x) asm volatile("" : "+" kind(x))

int64_t portable(int64_t steps) {
  using Shorts = Types<4>::Shorts;
  constexpr int CHAINS = 8;
  Shorts sums[CHAINS] = {}, weight = Shorts{} + 1, codes = Shorts{} + 3;
  for (int64_t s = 0; s < steps; s++)
#pragma GCC unroll 8
    for (int i = 0; i < CHAINS; i++) {
      HIDE("m", codes);
      sums[i] += weight * codes;
    }
  for (auto& sum : sums) HIDE("m", sum);
  return steps * CHAINS * 2 * 8;
}

#if defined(X86)
TARGET_AVX2 int64_t avx2(int64_t steps) {
  constexpr int CHAINS = 8;
  __m256i sums[CHAINS], weight = _mm256_set1_epi8(1), codes = _mm256_set1_epi8(3);
  for (auto& sum : sums) sum = _mm256_setzero_si256();
  for (int64_t s = 0; s < steps; s++)
#pragma GCC unroll 8
    for (int i = 0; i < CHAINS; i++) {
      HIDE("x", codes);
      sums[i] = _mm256_add_epi16(sums[i], _mm256_maddubs_epi16(weight, codes));
      HIDE("x", sums[i]);
    }
  return steps * CHAINS * 2 * 32;
}

TARGET_AVX512 int64_t avx512(int64_t steps) {
  constexpr int CHAINS = 16;
  __m512i sums[CHAINS], weight = _mm512_set1_epi8(1), codes = _mm512_set1_epi8(3);
  for (auto& sum : sums) sum = _mm512_setzero_si512();
  for (int64_t s = 0; s < steps; s++)
#pragma GCC unroll 16
    for (int i = 0; i < CHAINS; i++) {
      sums[i] = _mm512_dpbusd_epi32(sums[i], weight, codes);
      HIDE("v", sums[i]);
    }
  return steps * CHAINS * 2 * 64;
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
  int64_t operations = 0;
#pragma omp parallel num_threads(threads) reduction(+ : operations)
  operations += loop(steps);
  return operations;
}

// What the library says of itself and of the CPU it runs on.

#include "cpu.hpp"

#if defined(AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

extern "C" {

// The best instruction set of this CPU.
int32_t robuq_instruction_set() {
#if defined(X86)
  __builtin_cpu_init();
#endif
#if defined(AMX)
  // Linux lends the tile registers to a process that asks; asking again changes nothing.
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  unsigned a, b, c, d;
  const bool tiles = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 3) == 3;
  if (tiles && __builtin_cpu_supports("avx512vnni") &&
      syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0)
    return AMX_INT8;
#endif
#if defined(X86)
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl"))
    return AVX512_VNNI;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2_FMA;
#endif
  return PORTABLE;
}

int32_t robuq_has_openmp() {
#if defined(_OPENMP)
  return 1;
#else
  return 0;
#endif
}

// Changes with the sources that the library was built from.
const char* robuq_source() { return ROBUQ_SOURCE; }
}

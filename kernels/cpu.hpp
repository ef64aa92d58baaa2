// What the compiled CPU kernels share: instruction sets, vectors, memory.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#if defined(__x86_64__)
#include <immintrin.h>
#define X86 1
#define TARGET_AVX2 __attribute__((target("avx2,fma")))
#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")))
#if defined(__linux__)
#define AMX 1
#define TARGET_AMX __attribute__((target("avx512f,avx512bw,avx512vl,amx-tile,amx-int8")))
#endif
#endif

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "lanes are taken apart into bytes");

// Code that is written once and compiled for the instruction set of each caller.
#define INLINE inline __attribute__((always_inline))

enum InstructionSet : int32_t { PORTABLE, AVX2_FMA, AVX512_VNNI, AMX_INT8 };

template <class To, class From>
INLINE To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Ints{__VA_ARGS__})
#endif

// GCC drops the attribute where its size depends on a parameter.
template <int N>
struct Types;
#define TYPES(N)                                          \
  template <>                                             \
  struct Types<N> {                                       \
    using Floats = float __attribute__((vector_size(4 * N))); \
    using Ints = int32_t __attribute__((vector_size(4 * N))); \
    using Shorts = int16_t __attribute__((vector_size(4 * N))); \
    using Doubles = double __attribute__((vector_size(4 * N))); \
    using Words = uint64_t __attribute__((vector_size(4 * N))); \
  }
TYPES(4);
TYPES(8);
TYPES(16);
#undef TYPES

// Vectors of N lanes of 32 bits; N is what a register of the instruction set holds, since GCC makes
// poor code of longer ones.
template <int N, bool HAS_FMA>
struct Vectors {
  static constexpr int LANES = N;
  static constexpr bool FMA = HAS_FMA;
  using Floats = typename Types<N>::Floats;
  using Ints = typename Types<N>::Ints;
  using Shorts = typename Types<N>::Shorts;
  using Doubles = typename Types<N>::Doubles;
  using Words = typename Types<N>::Words;

  static INLINE Floats floats(float x) { return x - Floats{}; }  // + would lose the sign of -0
  static INLINE Floats load(const float* from) { return load_as<Floats>(from); }
  static INLINE Ints load(const int32_t* from) { return load_as<Ints>(from); }
  static INLINE Ints int_of(Floats x) { return __builtin_convertvector(x, Ints); }
  static INLINE Floats float_of(Ints x) { return __builtin_convertvector(x, Floats); }

  template <class To>
  static INLINE To load_as(const void* from) {
    To to;
    memcpy(&to, from, sizeof to);
    return to;
  }

  // a b + c, rounded once where the instruction set has it.
  static INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
    if constexpr (!FMA) return a * b + c;
    Floats y;
    for (int i = 0; i < N; i++) y[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return y;
  }

  // Lane j of vector i and lane i of vector j change places, by perfect shuffles.
  static INLINE void transpose(Ints (&rows)[N]) {
#pragma GCC unroll 4
    for (int size = 1; size < N; size *= 2) {
      Ints shuffled[N];
#pragma GCC unroll 8
      for (int i = 0; i < N / 2; i++) {
        const Ints a = rows[i], b = rows[i + N / 2];
        if constexpr (N == 16) {
          shuffled[2 * i] = SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
          shuffled[2 * i + 1] =
              SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        } else if constexpr (N == 8) {
          shuffled[2 * i] = SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
          shuffled[2 * i + 1] = SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
        } else {
          static_assert(N == 4, "4, 8 or 16 lanes");
          shuffled[2 * i] = SHUFFLE(a, b, 0, 4, 1, 5);
          shuffled[2 * i + 1] = SHUFFLE(a, b, 2, 6, 3, 7);
        }
      }
#pragma GCC unroll 16
      for (int i = 0; i < N; i++) rows[i] = shuffled[i];
    }
  }
};

struct Free {
  void operator()(void* memory) const { free(memory); }
};

// Uninitialised memory on a 64-byte boundary; null where there is none.
template <class T>
std::unique_ptr<T[], Free> allocate(int64_t count) {
  const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, bytes ? bytes : 64) != 0) memory = nullptr;
  return std::unique_ptr<T[], Free>(static_cast<T*>(memory));
}

INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

#if defined(AMX)
// All eight tiles with 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

TARGET_AMX inline void configure_tiles() {
  TileConfig config;
  for (int t = 0; t < 8; t++) config.row_bytes[t] = 64, config.rows[t] = 16;
  asm volatile("" ::"r"(&config) : "memory");  // GCC takes 8 bytes of it for all that is read
  _tile_loadconfig(&config);
}
#endif

// What the compiled CPU kernels share: instruction sets and vectors of 16 lanes.
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

// Code that is written once and compiled for the instruction set of each caller.
#define INLINE inline __attribute__((always_inline))
// The same of a lambda.
#define INLINE_LAMBDA __attribute__((always_inline))

enum InstructionSet : int32_t { PORTABLE, AVX2_FMA, AVX512_VNNI, AMX_INT8 };

constexpr int LANES = 16;
using Floats = float __attribute__((vector_size(64)));
using Ints = int32_t __attribute__((vector_size(64)));

INLINE Floats floats(float x) { return Floats{} + x; }
INLINE Ints ints(int32_t x) { return Ints{} + x; }

template <class To, class From>
INLINE To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class Vector, class Scalar>
INLINE Vector load(const Scalar* from) {
  static_assert(sizeof(Vector) == LANES * sizeof(Scalar), "16 lanes");
  Vector to;
  memcpy(&to, from, sizeof to);
  return to;
}

template <class Vector, class Scalar>
INLINE void store(Scalar* to, const Vector& from) {
  static_assert(sizeof(Vector) == LANES * sizeof(Scalar), "16 lanes");
  memcpy(to, &from, sizeof from);
}

INLINE Ints int_of(const Floats& x) { return __builtin_convertvector(x, Ints); }
INLINE Floats float_of(const Ints& x) { return __builtin_convertvector(x, Floats); }

// a b + c rounded once where the instruction set has it.
template <bool FMA>
INLINE Floats multiply_add(const Floats& a, const Floats& b, const Floats& c) {
  if constexpr (!FMA) return a * b + c;
  Floats y;
  for (int i = 0; i < LANES; i++) y[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return y;
}

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Ints{__VA_ARGS__})
#endif

// Lane j of vector i and lane i of vector j change places: four perfect shuffles.
INLINE void transpose(Ints (&rows)[LANES]) {
#pragma GCC unroll 4
  for (int round = 0; round < 4; round++) {
    Ints shuffled[LANES];
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 2; i++) {
      const Ints a = rows[i], b = rows[i + LANES / 2];
      shuffled[2 * i] = SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      shuffled[2 * i + 1] =
          SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) rows[i] = shuffled[i];
  }
}

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

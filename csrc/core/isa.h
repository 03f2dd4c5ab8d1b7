// CPU instruction sets. Every CPU kernel file is compiled once a level, into the namespace of that level, with the
// flags of that level; which one runs is chosen here at run time. Code outside those namespaces uses the baseline.
#pragma once

// A kernel file opens with `namespace pyaccel::<family>::PYACCEL_ISA`. The build defines PYACCEL_ISA and the width.
#define PYACCEL_DECLARE_KERNELS(...)      \
  namespace baseline { __VA_ARGS__ }      \
  namespace avx2 { __VA_ARGS__ }          \
  namespace avx512 { __VA_ARGS__ }

#if defined(__x86_64__)
#define PYACCEL_CALL(call)                                \
  (::pyaccel::isa() == ::pyaccel::Isa::avx512 ? avx512::call \
   : ::pyaccel::isa() == ::pyaccel::Isa::avx2 ? avx2::call   \
                                              : baseline::call)
#else
#define PYACCEL_CALL(call) baseline::call
#endif

namespace pyaccel {

enum class Isa : int { baseline, avx2, avx512 };

constexpr const char* name(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "baseline";
}

Isa best_isa();  // what this machine can do
Isa isa();       // the level in force: PYACCEL_ISA if set, else the best
void force_isa(Isa level);  // for tests and benchmarks; throws std::invalid_argument where the machine cannot

}  // namespace pyaccel

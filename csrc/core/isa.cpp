#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace pyaccel {
namespace {

Isa parse(const std::string& text) {
  if (text == "baseline") return Isa::baseline;
  if (text == "avx2") return Isa::avx2;
  if (text == "avx512") return Isa::avx512;
  throw std::invalid_argument("PYACCEL_ISA must be baseline, avx2 or avx512, got \"" + text + "\"");
}

Isa checked(Isa level) {
  if (level > best_isa())
    throw std::invalid_argument(std::string("PYACCEL_ISA asks for ") + name(level) + ", but this processor offers " +
                                name(best_isa()) + " at most");
  return level;
}

Isa& in_force() {
  static Isa level = [] {
    const char* wish = std::getenv("PYACCEL_ISA");
    return wish != nullptr && *wish != '\0' ? checked(parse(wish)) : best_isa();
  }();
  return level;
}

}  // namespace

Isa best_isa() {
#if defined(__x86_64__)
  static const Isa best = [] {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
      return Isa::baseline;
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return wide ? Isa::avx512 : Isa::avx2;
  }();
  return best;
#else
  return Isa::baseline;
#endif
}

Isa isa() { return in_force(); }

void force_isa(Isa level) { in_force() = checked(level); }

}  // namespace pyaccel

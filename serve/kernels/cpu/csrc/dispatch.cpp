// Chooses the instruction set, once per process.
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace ria {
namespace {

#if defined(__x86_64__)
// __builtin_cpu_supports also checks that the operating system saves the registers (xgetbv).
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx_vnni() { return has_avx2() && __builtin_cpu_supports("avxvnni"); }
bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
bool has_avx512_vbmi2() { return has_avx512_vnni() && __builtin_cpu_supports("avx512vbmi2"); }
bool has_avx512_bf16() {
  return has_avx512_vbmi2() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
}

// Whether this process may use tile registers. Linux saves them for a process that has asked for them; threads that
// start later inherit the permission, and it does no harm to processes that do not use it.
bool may_use_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
bool has_amx() {
  unsigned a, b, c, d;
  if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned needed = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
  return (d & needed) == needed && may_use_tiles();
}

// A set with other kernels for int8 activations.
InstructionSet with_int8(InstructionSet set, const char* name, const Int8Kernels& kernels) {
  set.name = name;
  set.int8_activations = &kernels;
  return set;
}

// Kernels for bfloat16 activations, with those of `floats` for float16 and float32 weights.
Products with_floats(Products products, const Products& floats) {
  for (Dtype dtype : {Dtype::float16, Dtype::float32})
    products.kernels[static_cast<int>(dtype)] = floats.kernels[static_cast<int>(dtype)];
  return products;
}

const Products kBf16Of16 = with_floats(kAvx512Bf16Of16, kAvx512Of16),
               kTilesOf16 = with_floats(kAmxBf16Of16, kAvx512Of16);
const InstructionSet kAvx512WithBf16 = {"avx512_bf16", with_floats(kAvx512Bf16, kAvx512.of_4), &kBf16Of16,
                                        &kAvx512VnniInt8, &kAvx512};
const InstructionSet kAmx = {"amx", with_floats(kAmxBf16, kAvx512.of_4), &kTilesOf16, &kAmxInt8Activations, &kAvx512};
#endif

struct Candidate {
  const InstructionSet* set;
  bool supported;
};

const InstructionSet& choose() {
#if defined(__x86_64__)
  static const Int8Kernels vnni = [] {
    Int8Kernels kernels = kAvx512VnniInt8;
    if (!has_avx512_vbmi2()) kernels.of_16 = &kAvx2Int8Of16;
    return kernels;
  }();
  static const InstructionSet avx512_vnni = with_int8(kAvx512, "avx512_vnni", vnni);
  static const InstructionSet avx_vnni = with_int8(kAvx2, "avx_vnni", kAvxVnniInt8);
#endif
  const Candidate candidates[] = {
#if defined(__x86_64__)
      {&kAmx, has_amx()},       {&kAvx512WithBf16, has_avx512_bf16()}, {&avx512_vnni, has_avx512_vnni()},
      {&kAvx512, has_avx512()}, {&avx_vnni, has_avx_vnni()},           {&kAvx2, has_avx2()},
#endif
      {&kPortable, true},
  };
  const char* forced = std::getenv("RIA_VLLM_CPU_ISA");
  std::string known;
  for (const Candidate& candidate : candidates) {
    if (forced == nullptr || *forced == '\0') {
      if (candidate.supported) return *candidate.set;
      continue;
    }
    if (std::strcmp(forced, candidate.set->name) == 0) {
      if (candidate.supported) return *candidate.set;
      throw std::runtime_error(std::string("RIA_VLLM_CPU_ISA=") + forced +
                               ": this machine lacks these instructions; unset the variable or name a lower set");
    }
    known += std::string(known.empty() ? "" : ", ") + candidate.set->name;
  }
  throw std::runtime_error(std::string("RIA_VLLM_CPU_ISA=") + forced + " is not known here; choose from " + known);
}

}  // namespace

const InstructionSet& instruction_set() {
  static const InstructionSet& chosen = choose();
  return chosen;
}

}  // namespace ria

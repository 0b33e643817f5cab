// PTX as the interpreter wants it: kernels of decoded instructions, read from the text that nvcc embeds.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace emulator {

struct Error : std::runtime_error { using std::runtime_error::runtime_error; };

struct Thread;
struct Warp;
struct Instruction;
struct Module;

// One thread's instruction; one that all named lanes of a warp reach together.
using Scalar = void (*)(Thread&, Instruction const&);
using Collective = void (*)(Warp&, uint32_t lanes, Instruction const&);

enum class Space { kGeneric, kGlobal, kShared };

struct Operand {
  enum Kind { kRegister, kImmediate, kAddress, kVector, kPair, kSink };
  Kind kind = kImmediate;
  int slot = -1;         // of a register, or of an address's base (-1: none)
  uint64_t value = 0;    // of an immediate, or an address's offset
  bool dynamic = false;  // the value is an offset into dynamic shared memory, whose place is not known yet
  bool negated = false;
  std::vector<Operand> parts;  // of a vector or a pair; of an address what follows its base

  bool is_vector(size_t size) const { return kind == kVector && parts.size() == size; }
};

struct Instruction {
  std::vector<std::string> name;  // split at its dots
  std::vector<Operand> operands;
  int predicate = -1;  // a slot
  bool predicate_negated = false;
  int target = -1;  // of a branch
  int line = 0;
  std::string text;

  // The rest is filled in by decode(): the function, and what it needs to know of the modifiers.
  Scalar scalar = nullptr;
  Collective collective = nullptr;
  int mask_operand = -1;  // which operand names the lanes; -1: all that have not exited
  Space space = Space::kGeneric;
  int mode = 0;              // a comparison, a rounding, an atomic operation
  int combination = 0;       // of a comparison with another predicate
  int count = 1;             // values of a vector, matrices, columns
  int bits = 0;              // of all that a mov moves; of a value that the tensor cores multiply
  bool nan_is_true = false;  // of a comparison
  bool waits = false;        // what is loaded may be what others wait to write
  bool transposed = false, bfloat16 = false;

  bool has(std::string_view part) const {
    for (auto const& own : name)
      if (own == part) return true;
    return false;
  }
};

// Instructions whose names start alike. Any with a modifier or a number of operands not listed is unknown, and so is
// one for which `decode` finds no function.
struct Form {
  std::string_view start;
  std::string_view modifiers;  // besides types; "m64n*" is any that starts so
  size_t fewest, most;         // operands
  void (*decode)(Instruction&);
};

// Decodes to one function, whatever the modifiers.
template <Scalar kFunction>
void always(Instruction& instruction) {
  instruction.scalar = kFunction;
}

template <Collective kFunction, int kMaskOperand = -1>
void together(Instruction& instruction) {
  instruction.collective = kFunction;
  instruction.mask_operand = kMaskOperand;
}

inline void nothing(Thread&, Instruction const&) {}
inline void nothing_together(Warp&, uint32_t, Instruction const&) {}

// Of instructions.cpp, tensor.cpp and tensor_memory.cpp.
std::span<Form const> scalar_forms();
std::span<Form const> tensor_forms();
std::span<Form const> tensor_memory_forms();

// Registers that every thread starts with.
// clang-format off
enum Special : int {
  kTidX, kTidY, kTidZ, kNtidX, kNtidY, kNtidZ, kCtaidX, kCtaidY, kCtaidZ, kNctaidX, kNctaidY, kNctaidZ,
  kLaneid, kWarpid, kSmid, kClusterCtarank, kClusterNctarank, kClusteridX, kClusteridY, kClusteridZ,
  kNclusteridX, kNclusteridY, kNclusteridZ, kClusterCtaidX, kClusterCtaidY, kClusterCtaidZ,
  kClusterNctaidX, kClusterNctaidY, kClusterNctaidZ, kDynamicSmemSize, kLocalBase, kSpecials
};
// clang-format on

// Where shared memory starts, as on hardware that keeps the first KiB for itself.
constexpr uint32_t kSharedBase = 1024;

struct Kernel {
  std::string name;
  Module const* module = nullptr;
  std::vector<Instruction> code;
  int registers = kSpecials;
  uint32_t static_shared = 0, local = 0;
  uint64_t most_threads = 1024;                           // of a block; less where .maxntid says so
  std::vector<std::pair<uint32_t, uint32_t>> parameters;  // offset, size
  std::unique_ptr<uint8_t[]> parameter_memory;            // aligned to 128 within
  uint8_t* parameter_base = nullptr;
  uint32_t parameter_bytes = 0;
  bool decoded = false;
};

// A variable outside of kernels.
struct Global {
  std::unique_ptr<uint8_t[]> memory;
  uint8_t* start;  // aligned within
  size_t bytes;
  bool writable;
};

struct Module {
  int target = 0;  // 90 of sm_90a
  std::vector<std::unique_ptr<Kernel>> kernels;
  std::vector<Global> globals;
};

// Throws Error where the text is not understood; instructions are looked at no closer than by their operands.
std::unique_ptr<Module> parse(std::string_view text);

// Finds each instruction's function. One that is unknown throws when it is reached, not before.
void decode(Kernel&);

}  // namespace emulator

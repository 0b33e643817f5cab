// PTX for the interpreter: kernels of decoded instructions, parsed from the text that nvcc embeds.
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

// The function of an instruction: of a single thread, or of the lanes of a warp that must reach it together.
using Scalar = void (*)(Thread&, Instruction const&);
using Collective = void (*)(Warp&, uint32_t lanes, Instruction const&);

enum class Space { kGeneric, kGlobal, kShared };

struct Operand {
  enum Kind { kRegister, kImmediate, kAddress, kVector, kPair, kSink };
  Kind kind = kImmediate;
  int slot = -1;         // register, or base register of an address (-1: none)
  uint64_t value = 0;    // immediate, or offset of an address
  bool dynamic = false;  // value is an offset into dynamic shared memory, whose address is not known yet
  bool negated = false;
  std::vector<Operand> parts;  // of a vector or a pair; or the coordinates after an address's base

  bool is_vector(size_t size) const { return kind == kVector && parts.size() == size; }
};

struct Instruction {
  std::vector<std::string> name;  // split at its dots
  std::vector<Operand> operands;
  int predicate = -1;  // its register, -1: none
  bool predicate_negated = false;
  int target = -1;  // of a branch
  int line = 0;
  std::string text;

  // Set by decode(): the function, and what it needs from the modifiers.
  Scalar scalar = nullptr;
  Collective collective = nullptr;
  int mask_operand = -1;  // the operand that names the lanes; -1: all that have not exited
  Space space = Space::kGeneric;
  int mode = 0;              // which comparison, rounding or atomic operation
  int combination = 0;       // how a comparison is combined with another predicate
  int count = 1;             // number of vector elements, matrices or columns
  int bits = 0;              // moved by a mov; of a value that the tensor cores multiply
  bool nan_is_true = false;  // of a comparison
  bool waits = false;        // a load that may be polling for another thread's write
  bool transposed = false, bfloat16 = false;

  bool has(std::string_view part) const {
    for (auto const& own : name)
      if (own == part) return true;
    return false;
  }
};

// Instructions with the same start of their names. One with a modifier or a number of operands that is not listed is
// unknown, and so is one for which `decode` finds no function.
struct Form {
  std::string_view start;
  std::string_view modifiers;  // besides types; "m64n*" stands for any that starts with m64n
  size_t fewest, most;         // operands
  void (*decode)(Instruction&);
};

// Modifiers that many forms share.
#define SHARED "shared shared::cta"
#define SPACES SHARED " shared::cluster global "
#define SCOPES "relaxed cta cluster gpu sys "

// Decodes to one function, for any modifiers.
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

// Each defined in the file of that name.
std::span<Form const> arithmetic_forms();
std::span<Form const> memory_forms();
std::span<Form const> control_forms();
std::span<Form const> tensor_forms();
std::span<Form const> tensor_memory_forms();

// The special registers, which lie before the others.
// clang-format off
enum Special : int {
  kTidX, kTidY, kTidZ, kNtidX, kNtidY, kNtidZ, kCtaidX, kCtaidY, kCtaidZ, kNctaidX, kNctaidY, kNctaidZ,
  kLaneid, kWarpid, kSmid, kClusterCtarank, kClusterNctarank, kClusteridX, kClusteridY, kClusteridZ,
  kNclusteridX, kNclusteridY, kNclusteridZ, kClusterCtaidX, kClusterCtaidY, kClusterCtaidZ,
  kClusterNctaidX, kClusterNctaidY, kClusterNctaidZ, kDynamicSmemSize, kLocalBase, kSpecials
};
// clang-format on

// Shared memory starts here, as on hardware that reserves the first KiB.
constexpr uint32_t kSharedBase = 1024;

struct Kernel {
  std::string name;
  Module const* module = nullptr;
  std::vector<Instruction> code;
  int registers = kSpecials;
  uint32_t static_shared = 0, local = 0;
  uint64_t most_threads = 1024;                           // per block; fewer if .maxntid says so
  std::vector<std::pair<uint32_t, uint32_t>> parameters;  // offset, size
  std::unique_ptr<uint8_t[]> parameter_memory;            // with room to align it to 128
  uint8_t* parameter_base = nullptr;
  uint32_t parameter_bytes = 0;
  bool decoded = false;
};

// A variable outside of kernels.
struct Global {
  std::unique_ptr<uint8_t[]> memory;
  uint8_t* start;  // aligned, in `memory`
  size_t bytes;
  bool writable;
};

struct Module {
  int target = 0;  // 90 of sm_90a
  std::vector<std::unique_ptr<Kernel>> kernels;
  std::vector<Global> globals;
};

// Throws Error if the text is not understood. Of instructions it parses only names and operands.
std::unique_ptr<Module> parse(std::string_view text);

// Finds each instruction's function. An unknown instruction throws only when it is reached.
void decode(Kernel&);

}  // namespace emulator

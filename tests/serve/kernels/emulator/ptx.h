// PTX as the interpreter wants it: kernels of decoded instructions, read from the text that nvcc embeds.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace emulator {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Thread;
struct Warp;
struct Instruction;

// One thread's instruction; one that all named lanes of a warp reach together.
using Scalar = void (*)(Thread&, Instruction const&);
using Collective = void (*)(Warp&, uint32_t lanes, Instruction const&);

struct Operand {
  enum Kind { kRegister, kImmediate, kAddress, kVector, kPair, kSink };
  Kind kind = kImmediate;
  int slot = -1;       // of a register, or of an address's base (-1: none)
  uint64_t value = 0;  // of an immediate, or an address's offset
  bool negated = false;
  std::vector<Operand> parts;  // of a vector or a pair; of an address what follows its base
};

struct Instruction {
  std::vector<std::string> name;  // split at its dots
  std::vector<Operand> operands;
  int predicate = -1;  // a slot
  bool predicate_negated = false;
  int target = -1;  // of a branch
  int line = 0;
  std::string text;
  // Filled in by decode():
  Scalar scalar = nullptr;
  Collective collective = nullptr;
  int mask_operand = -1;  // which operand names the lanes; -1: all that have not exited
  std::array<int, 4> numbers{};
  mutable bool ran = false;

  bool has(std::string_view part) const {
    for (auto const& own : name)
      if (own == part) return true;
    return false;
  }
};

// Registers that every thread starts with.
enum Special : int {
  kTidX, kTidY, kTidZ, kNtidX, kNtidY, kNtidZ, kCtaidX, kCtaidY, kCtaidZ, kNctaidX, kNctaidY, kNctaidZ,
  kLaneid, kWarpid, kSmid, kClusterCtarank, kClusterNctarank, kClusteridX, kClusteridY, kClusteridZ,
  kNclusteridX, kNclusteridY, kNclusteridZ, kClusterCtaidX, kClusterCtaidY, kClusterCtaidZ,
  kClusterNctaidX, kClusterNctaidY, kClusterNctaidZ, kDynamicSmemSize, kLocalBase, kSpecials
};

// Where shared memory starts, as on hardware that keeps the first KiB for itself.
constexpr uint32_t kSharedBase = 1024;

struct Kernel {
  std::string name;
  std::vector<Instruction> code;
  int registers = kSpecials;
  uint32_t static_shared = 0, local = 0;
  std::vector<std::pair<uint32_t, uint32_t>> parameters;  // offset, size
  std::unique_ptr<uint8_t[]> parameter_memory;            // aligned to 128 within
  uint8_t* parameter_base = nullptr;
  uint32_t parameter_bytes = 0;
  bool decoded = false;
};

struct Module {
  std::vector<std::unique_ptr<Kernel>> kernels;
  std::vector<std::pair<std::unique_ptr<uint8_t[]>, size_t>> globals;
};

// Throws Error where the text is not understood; instructions are looked at no closer than by their operands.
std::unique_ptr<Module> parse(std::string_view text);

// Finds each instruction's function. One that is unknown throws when it is reached, not before.
void decode(Kernel&);

// Of instructions.cpp, tensor.cpp and tensor_memory.cpp: true when the instruction is one of theirs.
bool decode_scalar(Instruction&);
bool decode_tensor(Instruction&);
bool decode_tensor_memory(Instruction&);

}  // namespace emulator

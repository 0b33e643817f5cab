// Finds the function of each instruction among the forms that the other files list.
#include <algorithm>

#include "ptx.h"

namespace emulator {
namespace {

constexpr std::string_view kTypes[] = {"pred", "b8",  "b16", "b32", "b64", "b128", "u8",  "u16",  "u32",   "u64",
                                       "s8",   "s16", "s32", "s64", "f16", "f32",  "f64", "bf16", "f16x2", "bf16x2"};

void unknown(Thread&, Instruction const&) { throw Error("the emulator does not know this instruction"); }

// The next word of a text from position `at` on, which moves past it; empty at the end.
std::string_view next_word(std::string_view text, char separator, size_t& at) {
  size_t const start = std::min(at, text.size()), end = std::min(text.find(separator, start), text.size());
  at = end + 1;
  return text.substr(start, end - start);
}

// How many parts of the instruction's name the form's start matches, or 0 if it does not match.
size_t parts_of(Form const& form, Instruction const& instruction) {
  size_t parts = 0;
  for (size_t at = 0; at < form.start.size(); ++parts)
    if (parts == instruction.name.size() || next_word(form.start, '.', at) != instruction.name[parts]) return 0;
  return parts;
}

bool allows(Form const& form, std::string_view modifier) {
  for (size_t at = 0; at < form.modifiers.size();) {
    std::string_view const word = next_word(form.modifiers, ' ', at);
    if (word == modifier) return true;
    if (word.ends_with('*') && modifier.starts_with(word.substr(0, word.size() - 1))) return true;
  }
  return std::find(std::begin(kTypes), std::end(kTypes), modifier) != std::end(kTypes);
}

void decode(Instruction& instruction) {
  Form const* found = nullptr;
  size_t most = 0;
  for (auto const forms : {arithmetic_forms(), memory_forms(), control_forms(), tensor_forms(), tensor_memory_forms()})
    for (Form const& form : forms)
      if (size_t const parts = parts_of(form, instruction); parts > most) {
        found = &form;
        most = parts;
      }
  size_t const operands = instruction.operands.size();
  if (!found || operands < found->fewest || operands > found->most) return;
  for (size_t part = most; part < instruction.name.size(); ++part)
    if (!allows(*found, instruction.name[part])) return;
  found->decode(instruction);
}

}  // namespace

void decode(Kernel& kernel) {
  if (kernel.decoded) return;
  for (Instruction& instruction : kernel.code) {
    decode(instruction);
    if (!instruction.scalar && !instruction.collective) instruction.scalar = &unknown;
  }
  kernel.decoded = true;
}

}  // namespace emulator

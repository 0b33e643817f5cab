// Loads, stores, atomic operations, copies, and addresses.
#include "machine.h"
#include "scalar_types.h"

namespace emulator {
namespace {

Space space_of(Instruction const& i) {
  if (i.has("shared") || i.has("shared::cta") || i.has("shared::cluster")) return Space::kShared;
  return i.has("global") || i.has("param") || i.has("local") || i.has("const") ? Space::kGlobal : Space::kGeneric;
}

template <class T>
void load(Thread& t, Instruction const& i) {
  size_t const bytes = i.count * sizeof(T);
  uint8_t const* const from = memory(t, i.space, address_of(t, i.operands[1]), bytes, bytes, false);
  for (int k = 0; k < i.count; ++k) {
    T value;
    std::memcpy(&value, from + k * sizeof(T), sizeof(T));
    put<T>(t, i.count > 1 ? i.operands[0].parts[k] : i.operands[0], value);
  }
  t.yields = i.waits;
}

template <class T>
void store(Thread& t, Instruction const& i) {
  size_t const bytes = i.count * sizeof(T);
  uint8_t* const to = memory(t, i.space, address_of(t, i.operands[0]), bytes, bytes, true);
  for (int k = 0; k < i.count; ++k) {
    T const value = get<T>(t, i.count > 1 ? i.operands[1].parts[k] : i.operands[1]);
    std::memcpy(to + k * sizeof(T), &value, sizeof(T));
  }
  ++grid_of(t).progress;
}

// Loads 128 bits into two neighbouring slots.
void load_wide(Thread& t, Instruction const& i) {
  uint8_t const* const from = memory(t, i.space, address_of(t, i.operands[1]), 16, 16, false);
  std::memcpy(&t.registers[i.operands[0].slot], from, 16);
}

template <bool kLoad>
void memory_access(Instruction& i) {
  Operand const& values = i.operands[kLoad ? 0 : 1];
  i.space = space_of(i);
  i.count = i.has("v2") ? 2 : i.has("v4") ? 4 : i.has("v8") ? 8 : 1;
  i.waits = i.has("acquire") || i.has("volatile") || i.has("relaxed");
  if (i.count == 1 ? values.kind == Operand::kVector : !values.is_vector(i.count)) return;
  if (kLoad && i.count == 1 && i.name.back() == "b128") {
    i.scalar = &load_wide;
    return;
  }
  i.scalar = with_type<kStored>(i.name.back(), []<class T>(TypeOf<T>) { return kLoad ? &load<T> : &store<T>; });
}

enum Atomic { kAtomAdd, kAtomMin, kAtomMax, kAtomExch, kAtomCas, kAtomInc, kAtomAnd, kAtomOr, kAtomXor };

// kReturns: the first operand receives the old value.
template <class T, bool kReturns>
void atomic(Thread& t, Instruction const& i) {
  uint8_t* const place = memory(t, i.space, address_of(t, i.operands[kReturns]), sizeof(T), sizeof(T), true);
  T old, next;
  std::memcpy(&old, place, sizeof(T));
  T const b = get<T>(t, i.operands[kReturns + 1]);
  switch (i.mode) {
    case kAtomAdd: next = Add::of(old, b); break;
    case kAtomMin: next = Min::of(old, b); break;
    case kAtomMax: next = Max::of(old, b); break;
    case kAtomCas: next = old == b ? get<T>(t, i.operands[kReturns + 2]) : old; break;
    case kAtomExch: next = b; break;
    case kAtomInc: next = old >= b ? T(0) : Add::of(old, T(1)); break;
    default:
      if constexpr (kInteger<T>)
        next = i.mode == kAtomAnd ? T(old & b) : i.mode == kAtomOr ? T(old | b) : T(old ^ b);
      else
        throw Error("a bitwise operation on floats");
  }
  std::memcpy(place, &next, sizeof(T));
  if (kReturns) put<T>(t, i.operands[0], old);
  // A compare-and-swap that changes nothing may be a spin lock.
  if (i.mode == kAtomCas && std::memcmp(&old, &next, sizeof(T)) == 0)
    t.yields = true;
  else
    ++grid_of(t).progress;
}

template <bool kReturns>
void atomic_access(Instruction& i) {
  static char const* const kNames[] = {"add", "min", "max", "exch", "cas", "inc", "and", "or", "xor"};
  for (i.mode = 0; i.mode < 9; ++i.mode)
    if (i.has(kNames[i.mode])) break;
  i.space = space_of(i);
  if (i.mode == 9 || i.operands.size() != size_t(kReturns + 2 + (i.mode == kAtomCas))) return;
  i.scalar = with_type<kNumbers>(
      i.name.back(), []<class T>(TypeOf<T>) -> Scalar { return sizeof(T) >= 4 ? &atomic<T, kReturns> : nullptr; });
}

void to_shared(Thread& t, Instruction const& i) {
  uint64_t const address = get<uint64_t>(t, i.operands[1]);
  put<uint64_t>(t, i.operands[0], address >= kSharedWindow ? address - kSharedWindow : address);
}
void from_shared(Thread& t, Instruction const& i) {
  put<uint64_t>(t, i.operands[0], get<uint32_t>(t, i.operands[1]) + kSharedWindow);
}
void keep_address(Thread& t, Instruction const& i) { put<uint64_t>(t, i.operands[0], get<uint64_t>(t, i.operands[1])); }

void address_conversion(Instruction& i) {
  Space const space = space_of(i);
  if (space == Space::kShared)
    i.scalar = i.has("to") ? &to_shared : &from_shared;
  else if (space == Space::kGlobal)
    i.scalar = &keep_address;
}

// The same offset in the shared memory of another block of the cluster.
void map_address(Thread& t, Instruction const& i) {
  uint32_t const address = get<uint32_t>(t, i.operands[1]), rank = get<uint32_t>(t, i.operands[2]);
  if (address >> 24) throw Error("the address is already that of another block");
  if (rank >= t.block().cluster->blocks.size()) throw Error("the cluster has no such rank");
  put<uint32_t>(t, i.operands[0], address | (rank + 1) << 24);
}

// cp.async dst, src, size{, bytes to read}; the rest of dst becomes zeros.
void copy_async(Thread& t, Instruction const& i) {
  size_t const size = i.operands[2].value;
  size_t const read = i.operands.size() > 3 ? get<uint32_t>(t, i.operands[3]) : size;
  if (read > size) throw Error("reads more than it writes");
  uint64_t const to = address_of(t, i.operands[0]), from = address_of(t, i.operands[1]);
  memory(t, Space::kShared, to, size, size, true);
  if (read) memory(t, Space::kGlobal, from, read, size, false);
  t.copies.add(i, [&t, to, from, size, read] {
    uint8_t* const place = memory(t, Space::kShared, to, size, size, true);
    std::memset(place, 0, size);
    if (read) std::memcpy(place, memory(t, Space::kGlobal, from, read, 1, false), read);
  });
}

void copying(Instruction& i) {
  Operand const& size = i.operands[2];
  bool const right = size.value == 16 || (i.has("ca") && (size.value == 4 || size.value == 8));
  if (size.kind == Operand::kImmediate && right) i.scalar = &copy_async;
}

void copies_commit(Thread& t, Instruction const&) { t.copies.commit(); }
void copies_wait(Thread& t, Instruction const& i) { t.copies.finish(get<uint32_t>(t, i.operands[0])); }
void copies_wait_all(Thread& t, Instruction const&) {
  t.copies.commit();
  t.copies.finish(0);
}
void stores_commit(Thread& t, Instruction const&) { t.stores.commit(); }
void stores_wait(Thread& t, Instruction const& i) { t.stores.finish(get<uint32_t>(t, i.operands[0])); }

constexpr Form kForms[] = {
    {"ld", SPACES SCOPES "param local const v2 v4 v8 weak acquire volatile nc ca cg cs cv", 2, 2, memory_access<true>},
    {"st", SPACES SCOPES "local v2 v4 v8 weak release volatile wb cg cs wt", 2, 2, memory_access<false>},
    {"atom", SPACES SCOPES "acquire release acq_rel add min max exch cas inc and or xor", 3, 4, atomic_access<true>},
    {"red", SPACES SCOPES "release add min max inc and or xor", 2, 2, atomic_access<false>},
    {"cvta", SHARED " to global param local const", 2, 2, address_conversion},
    {"mapa", "shared::cluster", 3, 3, always<map_address>},

    {"cp.async.ca", SHARED " global L2::64B L2::128B L2::256B", 3, 4, copying},
    {"cp.async.cg", SHARED " global L2::64B L2::128B L2::256B", 3, 4, copying},
    {"cp.async.commit_group", "", 0, 0, always<copies_commit>},
    {"cp.async.wait_group", "", 1, 1, always<copies_wait>},
    {"cp.async.wait_all", "", 0, 0, always<copies_wait_all>},
    {"cp.async.bulk.commit_group", "", 0, 0, always<stores_commit>},
    {"cp.async.bulk.wait_group", "read", 1, 1, always<stores_wait>},
};

}  // namespace

std::span<Form const> memory_forms() { return kForms; }

}  // namespace emulator

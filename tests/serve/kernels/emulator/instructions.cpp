// What one thread does alone: arithmetic, memory, branches, and its part in barriers.
#include <cmath>
#include <limits>

#include "machine.h"

namespace emulator {
namespace {

using std::string;

template <class T>
struct TypeOf {
  using type = T;
};

// Calls `use` with the C++ type of a PTX type; bits count as unsigned.
template <class Use>
Scalar with_type(string const& name, Use use) {
  if (name == "pred") return use(TypeOf<bool>{});
  if (name == "u8" || name == "b8") return use(TypeOf<uint8_t>{});
  if (name == "u16" || name == "b16") return use(TypeOf<uint16_t>{});
  if (name == "u32" || name == "b32") return use(TypeOf<uint32_t>{});
  if (name == "u64" || name == "b64") return use(TypeOf<uint64_t>{});
  if (name == "s8") return use(TypeOf<int8_t>{});
  if (name == "s16") return use(TypeOf<int16_t>{});
  if (name == "s32") return use(TypeOf<int32_t>{});
  if (name == "s64") return use(TypeOf<int64_t>{});
  if (name == "f32") return use(TypeOf<float>{});
  if (name == "f64") return use(TypeOf<double>{});
  return nullptr;
}

template <class T>
constexpr bool kInteger = std::is_integral_v<T> && !std::is_same_v<T, bool>;

// Twice as wide.
template <class T>
struct Wide;
template <> struct Wide<int16_t> { using type = int32_t; };
template <> struct Wide<uint16_t> { using type = uint32_t; };
template <> struct Wide<int32_t> { using type = int64_t; };
template <> struct Wide<uint32_t> { using type = uint64_t; };
template <> struct Wide<int64_t> { using type = __int128; };
template <> struct Wide<uint64_t> { using type = unsigned __int128; };

// Signed overflow wraps.
template <class T, class F>
T wrapped(T a, T b, F f) {
  if constexpr (kInteger<T>) {
    using U = std::make_unsigned_t<T>;
    return T(U(f(uint64_t(U(a)), uint64_t(U(b)))));
  } else {
    return T(f(a, b));
  }
}

struct Add { template <class T> static T of(T a, T b) { return wrapped(a, b, [](auto x, auto y) { return x + y; }); } };
struct Sub { template <class T> static T of(T a, T b) { return wrapped(a, b, [](auto x, auto y) { return x - y; }); } };
struct Mul { template <class T> static T of(T a, T b) { return wrapped(a, b, [](auto x, auto y) { return x * y; }); } };
struct MulHigh {
  template <class T> static T of(T a, T b) {
    using W = typename Wide<T>::type;
    return T(W(a) * W(b) >> 8 * sizeof(T));
  }
};
struct Div {
  template <class T> static T of(T a, T b) {
    if constexpr (kInteger<T>)
      if (b == 0) throw Error("a division by zero");
    return T(a / b);
  }
};
struct Rem {
  template <class T> static T of(T a, T b) {
    if (b == 0) throw Error("a division by zero");
    return T(a % b);
  }
};
struct Min {
  template <class T> static T of(T a, T b) {
    if constexpr (std::is_floating_point_v<T>) return std::fmin(a, b);
    else return a < b ? a : b;
  }
};
struct Max {
  template <class T> static T of(T a, T b) {
    if constexpr (std::is_floating_point_v<T>) return std::fmax(a, b);
    else return a > b ? a : b;
  }
};
struct And { template <class T> static T of(T a, T b) { return T(a & b); } };
struct Or { template <class T> static T of(T a, T b) { return T(a | b); } };
struct Xor { template <class T> static T of(T a, T b) { return T(a ^ b); } };

template <class T, class F>
void binary(Thread& t, Instruction const& i) {
  put<T>(t, i.operands[0], F::of(get<T>(t, i.operands[1]), get<T>(t, i.operands[2])));
}

template <class F>
Scalar integer_binary(string const& type) {
  return with_type(type, [](auto tag) -> Scalar {
    using T = typename decltype(tag)::type;
    if constexpr (kInteger<T> && sizeof(T) > 1) return &binary<T, F>;
    else return nullptr;
  });
}

template <class F>
Scalar number_binary(string const& type) {
  return with_type(type, [](auto tag) -> Scalar {
    using T = typename decltype(tag)::type;
    if constexpr (!std::is_same_v<T, bool> && sizeof(T) > 1) return &binary<T, F>;
    else return nullptr;
  });
}

template <class F>
Scalar bit_binary(string const& type) {
  return with_type(type, [](auto tag) -> Scalar {
    using T = typename decltype(tag)::type;
    if constexpr (std::is_integral_v<T>) return &binary<T, F>;
    else return nullptr;
  });
}

// d = a * b + c of the same width, and of twice the width; without c for mul.
template <class T, class F>
void multiply_add(Thread& t, Instruction const& i) {
  put<T>(t, i.operands[0], Add::of(F::of(get<T>(t, i.operands[1]), get<T>(t, i.operands[2])), get<T>(t, i.operands[3])));
}

template <class T>
void wide(Thread& t, Instruction const& i) {
  using W = typename Wide<T>::type;
  W value = W(get<T>(t, i.operands[1])) * W(get<T>(t, i.operands[2]));
  if (i.operands.size() > 3) value = Add::of(value, get<W>(t, i.operands[3]));
  put<W>(t, i.operands[0], value);
}

template <class T>
void fused_multiply_add(Thread& t, Instruction const& i) {
  put<T>(t, i.operands[0], std::fma(get<T>(t, i.operands[1]), get<T>(t, i.operands[2]), get<T>(t, i.operands[3])));
}

Scalar multiplication(Instruction const& i, string const& type) {
  bool const add = i.name[0] == "mad";
  return with_type(type, [&](auto tag) -> Scalar {
    using T = typename decltype(tag)::type;
    if constexpr (std::is_floating_point_v<T>) {
      return add ? &fused_multiply_add<T> : &binary<T, Mul>;
    } else if constexpr (kInteger<T> && sizeof(T) > 1) {
      if (i.has("wide")) {
        if constexpr (sizeof(T) < 8) return &wide<T>;
        else return nullptr;
      }
      if (i.has("hi")) return add ? &multiply_add<T, MulHigh> : &binary<T, MulHigh>;
      return add ? &multiply_add<T, Mul> : &binary<T, Mul>;
    } else {
      return nullptr;
    }
  });
}

template <class T, bool kLeft>
void shift(Thread& t, Instruction const& i) {
  T const value = get<T>(t, i.operands[1]);
  uint32_t const by = get<uint32_t>(t, i.operands[2]), bits = 8 * sizeof(T);
  T result;
  if constexpr (kLeft) result = by >= bits ? T(0) : T(value << by);
  else result = by >= bits ? T(std::is_signed_v<T> && value < 0 ? -1 : 0) : T(value >> by);
  put<T>(t, i.operands[0], result);
}

template <bool kLeft>
Scalar shifting(string const& type) {
  return with_type(type, [](auto tag) -> Scalar {
    using T = typename decltype(tag)::type;
    if constexpr (kInteger<T> && sizeof(T) > 1) return &shift<T, kLeft>;
    else return nullptr;
  });
}

template <class T>
void negate(Thread& t, Instruction const& i) {
  T const value = get<T>(t, i.operands[1]);
  if constexpr (kInteger<T>) put<T>(t, i.operands[0], Sub::of(T(0), value));
  else put<T>(t, i.operands[0], T(-value));
}

template <class T>
void invert(Thread& t, Instruction const& i) {
  T const value = get<T>(t, i.operands[1]);
  if constexpr (std::is_same_v<T, bool>) put<bool>(t, i.operands[0], !value);
  else put<T>(t, i.operands[0], T(~value));
}

template <class T>
void absolute(Thread& t, Instruction const& i) {
  T const value = get<T>(t, i.operands[1]);
  put<T>(t, i.operands[0], value < T(0) ? T(-value) : value);
}

template <class T>
void select(Thread& t, Instruction const& i) {
  put<T>(t, i.operands[0], get<T>(t, i.operands[get<bool>(t, i.operands[3]) ? 1 : 2]));
}

enum Comparison { kEq, kNe, kLt, kLe, kGt, kGe };
enum Combination { kAlone, kAnd, kOr, kXor };

// numbers: the comparison, whether NaN counts as true, the combination.
template <class T>
void compare(Thread& t, Instruction const& i) {
  T const a = get<T>(t, i.operands[1]), b = get<T>(t, i.operands[2]);
  bool result = false;
  switch (i.numbers[0]) {
    case kEq: result = a == b; break;
    case kNe: result = a != b; break;
    case kLt: result = a < b; break;
    case kLe: result = a <= b; break;
    case kGt: result = a > b; break;
    case kGe: result = a >= b; break;
  }
  if constexpr (std::is_floating_point_v<T>)
    if (std::isnan(a) || std::isnan(b)) result = i.numbers[1];
  auto const combined = [&](bool value) {
    if (i.numbers[2] == kAlone) return value;
    bool const other = get<bool>(t, i.operands[3]);
    return i.numbers[2] == kAnd ? value && other : i.numbers[2] == kOr ? value || other : value != other;
  };
  Operand const& to = i.operands[0];
  if (to.kind == Operand::kPair) {
    put<bool>(t, to.parts[0], combined(result));
    put<bool>(t, to.parts[1], combined(!result));
  } else {
    put<bool>(t, to, combined(result));
  }
}

Scalar comparison(Instruction& i, string const& type) {
  string name = i.name[1];
  bool const is_float = type[0] == 'f';
  if (is_float && name.size() == 3 && name.back() == 'u') {
    i.numbers[1] = 1;
    name.pop_back();
  }
  static char const* const names[] = {"eq", "ne", "lt", "le", "gt", "ge"};
  static char const* const unsigned_names[] = {"", "", "lo", "ls", "hi", "hs"};
  i.numbers[0] = -1;
  for (int k = 0; k < 6; ++k)
    if (name == names[k] || name == unsigned_names[k]) i.numbers[0] = k;
  if (i.numbers[0] < 0) return nullptr;
  i.numbers[2] = i.has("and") ? kAnd : i.has("or") ? kOr : i.has("xor") ? kXor : kAlone;
  return with_type(type, [](auto tag) -> Scalar {
    using T = typename decltype(tag)::type;
    if constexpr (!std::is_same_v<T, bool>) return &compare<T>;
    else return nullptr;
  });
}

// numbers: how a float becomes an integer (0 towards zero, 1 to the nearest, 2 down, 3 up), whether to saturate.
template <class To, class From>
void convert(Thread& t, Instruction const& i) {
  From const value = get<From>(t, i.operands[1]);
  if constexpr (std::is_floating_point_v<From> && kInteger<To>) {
    double const whole = i.numbers[0] == 1 ? std::nearbyint(double(value)) : i.numbers[0] == 2 ? std::floor(double(value))
                         : i.numbers[0] == 3 ? std::ceil(double(value)) : std::trunc(double(value));
    double const low = double(std::numeric_limits<To>::min()), high = double(std::numeric_limits<To>::max());
    put<To>(t, i.operands[0], std::isnan(whole) ? To(0) : whole <= low ? std::numeric_limits<To>::min()
                              : whole >= high ? std::numeric_limits<To>::max() : To(whole));
  } else {
    put<To>(t, i.operands[0], To(value));
  }
}

void widen_bfloat16(Thread& t, Instruction const& i) { put<float>(t, i.operands[0], from_bfloat16(get<uint16_t>(t, i.operands[1]))); }
void widen_float16(Thread& t, Instruction const& i) { put<float>(t, i.operands[0], from_float16(get<uint16_t>(t, i.operands[1]))); }
void round_bfloat16(Thread& t, Instruction const& i) { put<uint16_t>(t, i.operands[0], to_bfloat16(get<float>(t, i.operands[1]))); }
void round_float16(Thread& t, Instruction const& i) { put<uint16_t>(t, i.operands[0], to_float16(get<float>(t, i.operands[1]))); }

// The first operand goes to the upper half.
template <uint16_t (*kRound)(float)>
void round_pair(Thread& t, Instruction const& i) {
  uint32_t const high = kRound(get<float>(t, i.operands[1])), low = kRound(get<float>(t, i.operands[2]));
  put<uint32_t>(t, i.operands[0], high << 16 | low);
}

Scalar conversion(Instruction& i) {
  string const to = i.name[i.name.size() - 2], from = i.name.back();
  bool const nearest = i.has("rn") && !i.has("sat") && !i.has("relu");
  if (to == "bf16x2" && from == "f32" && nearest) return &round_pair<to_bfloat16>;
  if (to == "f16x2" && from == "f32" && nearest) return &round_pair<to_float16>;
  if (to == "bf16" && from == "f32" && nearest) return &round_bfloat16;
  if (to == "f16" && from == "f32" && nearest) return &round_float16;
  if (to == "f32" && from == "bf16") return &widen_bfloat16;
  if (to == "f32" && from == "f16") return &widen_float16;
  if (i.has("sat") || i.has("rm") || i.has("rp") || (i.has("rz") && to[0] == 'f')) return nullptr;
  i.numbers[0] = i.has("rni") ? 1 : i.has("rmi") ? 2 : i.has("rpi") ? 3 : 0;
  return with_type(to, [&](auto to_tag) -> Scalar {
    using To = typename decltype(to_tag)::type;
    return with_type(from, [&](auto from_tag) -> Scalar {
      using From = typename decltype(from_tag)::type;
      if constexpr (std::is_same_v<To, bool> || std::is_same_v<From, bool>) return nullptr;
      else return &convert<To, From>;
    });
  });
}

uint32_t bits_of(string const& type) { return type == "pred" ? 1 : uint32_t(std::stoi(type.substr(type.find_first_of("0123456789")))); }

// Also what packs registers into a wider one and takes them apart; numbers[0]: bits of the whole.
void move(Thread& t, Instruction const& i) {
  Operand const &to = i.operands[0], &from = i.operands[1];
  if (to.kind == Operand::kVector) {
    uint32_t const each = uint32_t(i.numbers[0] / to.parts.size());
    uint64_t const value = get<uint64_t>(t, from);
    for (size_t k = 0; k < to.parts.size(); ++k)
      put<uint64_t>(t, to.parts[k], value >> k * each & (each == 64 ? ~uint64_t(0) : (uint64_t(1) << each) - 1));
  } else if (from.kind == Operand::kVector) {
    uint32_t const each = uint32_t(i.numbers[0] / from.parts.size());
    uint64_t value = 0;
    for (size_t k = 0; k < from.parts.size(); ++k)
      value |= (get<uint64_t>(t, from.parts[k]) & ((uint64_t(1) << each) - 1)) << k * each;
    put<uint64_t>(t, to, value);
  } else {
    put<uint64_t>(t, to, get<uint64_t>(t, from));
  }
}

void move_predicate(Thread& t, Instruction const& i) { put<bool>(t, i.operands[0], get<bool>(t, i.operands[1])); }

template <class T>
void extract_bits(Thread& t, Instruction const& i) {
  uint32_t const at = get<uint32_t>(t, i.operands[2]) & 255, count = get<uint32_t>(t, i.operands[3]) & 255;
  uint32_t const width = 8 * sizeof(T);
  T const value = get<T>(t, i.operands[1]);
  std::make_unsigned_t<T> result = 0;
  uint32_t const sign_at = std::min(at + count - 1, width - 1);
  bool const negative = std::is_signed_v<T> && count && (value >> sign_at & 1);
  for (uint32_t k = 0; k < width; ++k) {
    bool const bit = k < count && at + k < width ? value >> (at + k) & 1 : negative;
    result |= std::make_unsigned_t<T>(bit) << k;
  }
  put<T>(t, i.operands[0], T(result));
}

template <class T>
void insert_bits(Thread& t, Instruction const& i) {
  T const source = get<T>(t, i.operands[1]);
  T result = get<T>(t, i.operands[2]);
  uint32_t const at = get<uint32_t>(t, i.operands[3]) & 255, count = get<uint32_t>(t, i.operands[4]) & 255;
  for (uint32_t k = 0; k < count && at + k < 8 * sizeof(T); ++k)
    result = T(result & ~(T(1) << (at + k))) | T((source >> k & 1) << (at + k));
  put<T>(t, i.operands[0], result);
}

void permute_bytes(Thread& t, Instruction const& i) {
  uint64_t const both = uint64_t(get<uint32_t>(t, i.operands[2])) << 32 | get<uint32_t>(t, i.operands[1]);
  uint32_t const selector = get<uint32_t>(t, i.operands[3]);
  uint32_t result = 0;
  for (int k = 0; k < 4; ++k) {
    uint32_t const pick = selector >> 4 * k & 15;
    uint32_t byte = both >> 8 * (pick & 7) & 255;
    if (pick & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << 8 * k;
  }
  put<uint32_t>(t, i.operands[0], result);
}

void logic3(Thread& t, Instruction const& i) {
  uint32_t const a = get<uint32_t>(t, i.operands[1]), b = get<uint32_t>(t, i.operands[2]), c = get<uint32_t>(t, i.operands[3]);
  uint32_t const table = get<uint32_t>(t, i.operands[4]);
  uint32_t result = 0;
  for (int k = 0; k < 32; ++k)
    result |= (table >> ((a >> k & 1) << 2 | (b >> k & 1) << 1 | (c >> k & 1)) & 1) << k;
  put<uint32_t>(t, i.operands[0], result);
}

// numbers: left?, clamped?
void funnel_shift(Thread& t, Instruction const& i) {
  uint64_t const both = uint64_t(get<uint32_t>(t, i.operands[2])) << 32 | get<uint32_t>(t, i.operands[1]);
  uint32_t by = get<uint32_t>(t, i.operands[3]);
  by = i.numbers[1] ? std::min(by, 32u) : by & 31;
  put<uint32_t>(t, i.operands[0], uint32_t(i.numbers[0] ? both << by >> 32 : both >> by));
}

template <class T>
void count_ones(Thread& t, Instruction const& i) { put<uint32_t>(t, i.operands[0], uint32_t(__builtin_popcountll(get<T>(t, i.operands[1])))); }
template <class T>
void leading_zeros(Thread& t, Instruction const& i) {
  uint32_t count = 0;
  for (T const value = get<T>(t, i.operands[1]); count < 8 * sizeof(T) && !(value >> (8 * sizeof(T) - 1 - count) & 1);) ++count;
  put<uint32_t>(t, i.operands[0], count);
}

Space space_of(Instruction const& i) {
  if (i.has("shared") || i.has("shared::cta") || i.has("shared::cluster")) return Space::kShared;
  return i.has("global") || i.has("param") || i.has("local") || i.has("const") ? Space::kGlobal : Space::kGeneric;
}

// numbers: the space, how many in a vector, whether others may be waited for.
template <class T>
void load(Thread& t, Instruction const& i) {
  int const count = i.numbers[1];
  uint8_t const* const from =
      memory(t, Space(i.numbers[0]), address_of(t, i.operands[1]), count * sizeof(T), count * sizeof(T), false);
  for (int k = 0; k < count; ++k) {
    T value;
    std::memcpy(&value, from + k * sizeof(T), sizeof(T));
    Operand const& to = count > 1 ? i.operands[0].parts[k] : i.operands[0];
    if constexpr (std::is_signed_v<T> && std::is_integral_v<T>) put<int64_t>(t, to, value);
    else put<T>(t, to, value);
  }
  t.yields = i.numbers[2];
}

template <class T>
void store(Thread& t, Instruction const& i) {
  int const count = i.numbers[1];
  uint8_t* const to = memory(t, Space(i.numbers[0]), address_of(t, i.operands[0]), count * sizeof(T), count * sizeof(T), true);
  for (int k = 0; k < count; ++k) {
    T const value = get<T>(t, count > 1 ? i.operands[1].parts[k] : i.operands[1]);
    std::memcpy(to + k * sizeof(T), &value, sizeof(T));
  }
  ++t.block().cluster->grid->progress;
}

// 128 bits, into two neighbouring slots.
void load_wide(Thread& t, Instruction const& i) {
  uint8_t const* const from = memory(t, space_of(i), address_of(t, i.operands[1]), 16, 16, false);
  std::memcpy(&t.registers[i.operands[0].slot], from, 16);
}

Scalar memory_access(Instruction& i, string const& type, bool is_load) {
  i.numbers = {int(space_of(i)), i.has("v2") ? 2 : i.has("v4") ? 4 : i.has("v8") ? 8 : 1,
               i.has("acquire") || i.has("volatile") || i.has("relaxed")};
  return with_type(type, [&](auto tag) -> Scalar {
    using T = typename decltype(tag)::type;
    if constexpr (std::is_same_v<T, bool>) return nullptr;
    else return is_load ? Scalar(&load<T>) : Scalar(&store<T>);
  });
}

enum Atomic { kAtomAdd, kAtomMin, kAtomMax, kAtomExch, kAtomCas, kAtomAnd, kAtomOr, kAtomXor, kAtomInc };

// numbers: the space, the operation, whether the old value is wanted.
template <class T>
void atomic(Thread& t, Instruction const& i) {
  int const first = i.numbers[2];
  uint8_t* const place = memory(t, Space(i.numbers[0]), address_of(t, i.operands[first]), sizeof(T), sizeof(T), true);
  T old, next;
  std::memcpy(&old, place, sizeof(T));
  T const b = get<T>(t, i.operands[first + 1]);
  switch (i.numbers[1]) {
    case kAtomAdd: next = Add::of(old, b); break;
    case kAtomMin: next = Min::of(old, b); break;
    case kAtomMax: next = Max::of(old, b); break;
    case kAtomCas: next = old == b ? get<T>(t, i.operands[first + 2]) : old; break;
    case kAtomExch: next = b; break;
    case kAtomInc: next = old >= b ? T(0) : Add::of(old, T(1)); break;
    default:
      if constexpr (kInteger<T>) next = i.numbers[1] == kAtomAnd ? T(old & b) : i.numbers[1] == kAtomOr ? T(old | b) : T(old ^ b);
      else throw Error("bits of a float");
  }
  std::memcpy(place, &next, sizeof(T));
  if (first) put<T>(t, i.operands[0], old);
  // A comparison that fails is how a lock is waited for.
  if (i.numbers[1] == kAtomCas && std::memcmp(&old, &next, sizeof(T)) == 0) t.yields = true;
  else ++t.block().cluster->grid->progress;
}

Scalar atomic_access(Instruction& i, string const& type) {
  static char const* const names[] = {"add", "min", "max", "exch", "cas", "and", "or", "xor", "inc"};
  i.numbers[1] = -1;
  for (int k = 0; k < 9; ++k)
    if (i.has(names[k])) i.numbers[1] = k;
  if (i.numbers[1] < 0 || i.has("v2") || i.has("v4") || i.has("noftz")) return nullptr;
  i.numbers[0] = int(space_of(i));
  i.numbers[2] = i.name[0] == "atom";
  return with_type(type, [&](auto tag) -> Scalar {
    using T = typename decltype(tag)::type;
    if constexpr (!std::is_same_v<T, bool> && sizeof(T) >= 4) return &atomic<T>;
    else return nullptr;
  });
}

void branch(Thread& t, Instruction const& i) { t.pc = i.target; }

void leave(Thread& t, Instruction const&) {
  if (t.copies.back().size()) throw Error("ends with copies that it does not wait for");
  commit(t.stores);
  finish(t.stores, 0);
  t.state = Thread::kExited;
}

void trap(Thread&, Instruction const&) { throw Error("the kernel stopped itself"); }
void nothing(Thread&, Instruction const&) {}
void pause(Thread& t, Instruction const&) { t.yields = true; }

void to_shared(Thread& t, Instruction const& i) {
  uint64_t const address = get<uint64_t>(t, i.operands[1]);
  put<uint64_t>(t, i.operands[0], address >= kSharedWindow ? address - kSharedWindow : address);
}
void from_shared(Thread& t, Instruction const& i) { put<uint64_t>(t, i.operands[0], get<uint32_t>(t, i.operands[1]) + kSharedWindow); }
void same_address(Thread& t, Instruction const& i) { put<uint64_t>(t, i.operands[0], get<uint64_t>(t, i.operands[1])); }

void block_barrier(Thread& t, Instruction const& i) {
  uint32_t const expected = i.operands.size() > 1 ? get<uint32_t>(t, i.operands[1]) : t.block().running;
  arrive(t.block(), get<uint32_t>(t, i.operands[0]), expected, i.numbers[0] ? &t : nullptr);
}

void cluster_arrive(Thread& t, Instruction const&) {
  Cluster& cluster = *t.block().cluster;
  t.cluster_phase = cluster.phase;
  ++cluster.arrived;
  check_cluster(cluster);
}

void cluster_wait(Thread& t, Instruction const&) {
  if (t.block().cluster->phase == t.cluster_phase) t.state = Thread::kClusterBarrier;
}

// The address of the same place in another block of the cluster.
void map_address(Thread& t, Instruction const& i) {
  uint32_t const address = get<uint32_t>(t, i.operands[1]), rank = get<uint32_t>(t, i.operands[2]);
  if (address >> 24) throw Error("an address that is another block's already");
  if (rank >= t.block().cluster->blocks.size()) throw Error("a rank that the cluster does not have");
  put<uint32_t>(t, i.operands[0], address | (rank + 1) << 24);
}

uint8_t* barrier_at(Thread& t, Operand const& operand) { return t.block().shared_at(uint32_t(address_of(t, operand)), 8); }
Grid& grid_of(Thread& t) { return *t.block().cluster->grid; }

void barrier_init(Thread& t, Instruction const& i) { mbarrier_init(barrier_at(t, i.operands[0]), get<uint32_t>(t, i.operands[1])); }

void barrier_invalidate(Thread& t, Instruction const& i) { std::memset(barrier_at(t, i.operands[0]), 0xFF, 8); }

// numbers: 1 where bytes are announced.
void barrier_arrive(Thread& t, Instruction const& i) {
  if (i.operands[0].kind != Operand::kSink) throw Error("the state of an mbarrier is not kept");
  uint8_t* const place = barrier_at(t, i.operands[1]);
  uint32_t const number = i.operands.size() > 2 ? get<uint32_t>(t, i.operands[2]) : 1;
  if (i.numbers[0]) mbarrier_expect(grid_of(t), place, number);
  mbarrier_arrive(grid_of(t), place, i.numbers[0] ? 1 : number);
}

void barrier_expect(Thread& t, Instruction const& i) { mbarrier_expect(grid_of(t), barrier_at(t, i.operands[0]), get<uint32_t>(t, i.operands[1])); }
void barrier_complete(Thread& t, Instruction const& i) { mbarrier_complete(grid_of(t), barrier_at(t, i.operands[0]), get<uint32_t>(t, i.operands[1])); }

void barrier_test(Thread& t, Instruction const& i) {
  bool const done = mbarrier_done(barrier_at(t, i.operands[1]), get<uint32_t>(t, i.operands[2]));
  put<bool>(t, i.operands[0], done);
  if (!done) t.yields = true;
}

// cp.async dst, src, size{, bytes of it that are read; the rest becomes zeros}.
void copy_async(Thread& t, Instruction const& i) {
  size_t const size = get<uint32_t>(t, i.operands[2]);
  size_t const read = i.operands.size() > 3 ? get<uint32_t>(t, i.operands[3]) : size;
  if (read > size) throw Error("reads more than it writes");
  uint64_t const to = address_of(t, i.operands[0]), from = address_of(t, i.operands[1]);
  memory(t, Space::kShared, to, size, size, true);
  if (read) memory(t, Space::kGlobal, from, read, size, false);
  t.copies.back().push_back([&t, to, from, size, read] {
    uint8_t* const place = memory(t, Space::kShared, to, size, size, true);
    std::memset(place, 0, size);
    if (read) std::memcpy(place, memory(t, Space::kGlobal, from, read, 1, false), read);
  });
}

void copies_commit(Thread& t, Instruction const&) { commit(t.copies); }
void copies_wait(Thread& t, Instruction const& i) { finish(t.copies, get<uint32_t>(t, i.operands[0])); }
void copies_wait_all(Thread& t, Instruction const&) {
  commit(t.copies);
  finish(t.copies, 0);
}
void stores_commit(Thread& t, Instruction const&) { commit(t.stores); }
void stores_wait(Thread& t, Instruction const& i) { finish(t.stores, get<uint32_t>(t, i.operands[0])); }

Scalar find(Instruction& i) {
  string const &op = i.name[0], &type = i.name.back();
  if (op == "add") return number_binary<Add>(type);
  if (op == "sub") return number_binary<Sub>(type);
  if (op == "mul" || op == "mad") return multiplication(i, type);
  if (op == "fma") return type == "f32" ? &fused_multiply_add<float> : type == "f64" ? &fused_multiply_add<double> : nullptr;
  if (op == "div") return number_binary<Div>(type);
  if (op == "rem") return integer_binary<Rem>(type);
  if (op == "min") return number_binary<Min>(type);
  if (op == "max") return number_binary<Max>(type);
  if (op == "and") return bit_binary<And>(type);
  if (op == "or") return bit_binary<Or>(type);
  if (op == "xor") return bit_binary<Xor>(type);
  if (op == "shl") return shifting<true>(type);
  if (op == "shr") return shifting<false>(type);
  if (op == "setp") return comparison(i, type);
  if (op == "cvt") return conversion(i);
  if (op == "neg" || op == "not" || op == "abs" || op == "selp")
    return with_type(type, [&](auto tag) -> Scalar {
      using T = typename decltype(tag)::type;
      if constexpr (std::is_same_v<T, bool>) {
        return op == "not" ? &invert<bool> : nullptr;
      } else {
        if constexpr (kInteger<T>)
          if (op == "not") return &invert<T>;
        if (op == "not") return nullptr;
        return op == "neg" ? &negate<T> : op == "selp" ? &select<T> : &absolute<T>;
      }
    });
  if (op == "mov") {
    if (type == "pred") return &move_predicate;
    i.numbers[0] = int(bits_of(type));
    return i.numbers[0] <= 64 ? &move : nullptr;
  }
  if (op == "bfe") return type == "u32" ? &extract_bits<uint32_t> : type == "s32" ? &extract_bits<int32_t>
                        : type == "u64" ? &extract_bits<uint64_t> : type == "s64" ? &extract_bits<int64_t> : nullptr;
  if (op == "bfi") return type == "b32" ? &insert_bits<uint32_t> : type == "b64" ? &insert_bits<uint64_t> : nullptr;
  if (op == "prmt") return i.name.size() == 2 ? &permute_bytes : nullptr;
  if (op == "lop3") return i.name.size() == 2 ? &logic3 : nullptr;
  if (op == "shf") {
    i.numbers = {i.has("l"), i.has("clamp")};
    return &funnel_shift;
  }
  if (op == "popc") return type == "b32" ? &count_ones<uint32_t> : &count_ones<uint64_t>;
  if (op == "clz") return type == "b32" ? &leading_zeros<uint32_t> : &leading_zeros<uint64_t>;
  if (op == "ld" && type == "b128") return &load_wide;
  if (op == "ld" || op == "ldu") return memory_access(i, type, true);
  if (op == "st") return i.has("async") ? nullptr : memory_access(i, type, false);
  if (op == "atom" || op == "red") return i.has("async") ? nullptr : atomic_access(i, type);
  if (op == "bra") return &branch;
  if (op == "ret" || op == "exit") return &leave;
  if (op == "trap") return &trap;
  if (op == "nanosleep") return &pause;
  if (op == "cvta") {
    if (i.has("shared")) return i.has("to") ? &to_shared : &from_shared;
    return i.has("global") || i.has("param") || i.has("local") || i.has("const") ? &same_address : nullptr;
  }
  if (op == "bar" || (op == "barrier" && !i.has("cluster"))) {
    i.numbers[0] = i.has("sync");
    return (i.has("sync") && !i.has("warp")) || i.has("arrive") ? &block_barrier : nullptr;
  }
  if (op == "barrier") return i.has("arrive") ? &cluster_arrive : &cluster_wait;
  if (op == "mapa") return type == "u32" ? &map_address : nullptr;
  if (op == "mbarrier") {
    i.numbers[0] = i.has("expect_tx");
    if (i.has("init")) return &barrier_init;
    if (i.has("inval")) return &barrier_invalidate;
    if (i.has("arrive") && !i.has("noComplete")) return &barrier_arrive;
    if (i.has("expect_tx")) return &barrier_expect;
    if (i.has("complete_tx")) return &barrier_complete;
    if ((i.has("try_wait") || i.has("test_wait")) && i.has("parity")) return &barrier_test;
    return nullptr;
  }
  if (op == "cp" && i.has("async") && !i.has("bulk") && !i.has("mbarrier")) {
    if (i.has("commit_group")) return &copies_commit;
    if (i.has("wait_group")) return &copies_wait;
    if (i.has("wait_all")) return &copies_wait_all;
    return i.has("shared") || i.has("shared::cta") ? &copy_async : nullptr;
  }
  if (op == "cp" && i.has("bulk") && i.has("commit_group")) return &stores_commit;
  if (op == "cp" && i.has("bulk") && i.has("wait_group")) return &stores_wait;
  // Orderings: this machine runs everything in order but what it puts off on purpose.
  if (op == "fence" || op == "membar" || op == "prefetch" || op == "prefetchu" || op == "griddepcontrol" ||
      op == "setmaxnreg" || op == "createpolicy" || op == "discard" || op == "applypriority")
    return &nothing;
  return nullptr;
}

}  // namespace

bool decode_scalar(Instruction& instruction) {
  instruction.scalar = find(instruction);
  return instruction.scalar;
}

namespace {
void unknown(Thread&, Instruction const&) { throw Error("the emulator does not know this instruction"); }
}  // namespace

void decode(Kernel& kernel) {
  if (kernel.decoded) return;
  for (Instruction& instruction : kernel.code)
    if (!decode_tensor(instruction) && !decode_tensor_memory(instruction) && !decode_scalar(instruction)) instruction.scalar = &unknown;
  kernel.decoded = true;
}

}  // namespace emulator

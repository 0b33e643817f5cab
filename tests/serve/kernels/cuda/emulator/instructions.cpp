// Instructions of a single thread: arithmetic, memory, branches, and barriers.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <map>

#include "machine.h"

namespace emulator {
namespace {

using std::string;

template <class T>
struct TypeOf {
  using type = T;
};

template <class T>
constexpr bool kInteger = std::is_integral_v<T> && !std::is_same_v<T, bool>;

// Which types a function takes: integers of 16 bits and more; these and floats; integers and predicates; all that
// memory holds.
enum Types { kIntegers, kNumbers, kBits, kStored };

template <Types kTypes, class T>
constexpr bool includes() {
  if (kTypes == kIntegers) return kInteger<T> && sizeof(T) > 1;
  if (kTypes == kNumbers) return !std::is_same_v<T, bool> && sizeof(T) > 1;
  return kTypes == kBits ? std::is_integral_v<T> : !std::is_same_v<T, bool>;
}

// Calls `use` with the C++ type of a PTX type, if it is among `kTypes`; b types count as unsigned.
template <Types kTypes, class Use>
Scalar with_type(string const& name, Use use) {
  auto const allowed = [&]<class T>(TypeOf<T> type) -> Scalar {
    if constexpr (includes<kTypes, T>())
      return use(type);
    else
      return nullptr;
  };
  if (name == "pred") return allowed(TypeOf<bool>{});
  if (name == "u8" || name == "b8") return allowed(TypeOf<uint8_t>{});
  if (name == "u16" || name == "b16") return allowed(TypeOf<uint16_t>{});
  if (name == "u32" || name == "b32") return allowed(TypeOf<uint32_t>{});
  if (name == "u64" || name == "b64") return allowed(TypeOf<uint64_t>{});
  if (name == "s8") return allowed(TypeOf<int8_t>{});
  if (name == "s16") return allowed(TypeOf<int16_t>{});
  if (name == "s32") return allowed(TypeOf<int32_t>{});
  if (name == "s64") return allowed(TypeOf<int64_t>{});
  if (name == "f32") return allowed(TypeOf<float>{});
  if (name == "f64") return allowed(TypeOf<double>{});
  return nullptr;
}

// The integer type of twice the width.
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

struct Add {
  template <class T> static T of(T a, T b) {
    return wrapped(a, b, [](auto x, auto y) { return x + y; });
  }
};
struct Sub {
  template <class T> static T of(T a, T b) {
    return wrapped(a, b, [](auto x, auto y) { return x - y; });
  }
};
struct Mul {
  template <class T> static T of(T a, T b) {
    return wrapped(a, b, [](auto x, auto y) { return x * y; });
  }
};
struct MulHigh {
  template <class T> static T of(T a, T b) {
    using W = typename Wide<T>::type;
    return T(W(a) * W(b) >> 8 * sizeof(T));
  }
};
struct Div {
  template <class T> static T of(T a, T b) {
    if constexpr (kInteger<T>) {
      if (b == 0) throw Error("a division by zero");
      if (std::is_signed_v<T> && b == T(-1)) return Sub::of(T(0), a);
    }
    return T(a / b);
  }
};
struct Rem {
  template <class T> static T of(T a, T b) {
    if (b == 0) throw Error("a division by zero");
    return std::is_signed_v<T> && b == T(-1) ? T(0) : T(a % b);
  }
};
// -0 is smaller than +0. Of a NaN and a number, the result is the number.
struct Min {
  template <class T> static T of(T a, T b) {
    if constexpr (std::is_floating_point_v<T>)
      return a == b ? (std::signbit(a) ? a : b) : std::fmin(a, b);
    else
      return a < b ? a : b;
  }
};
struct Max {
  template <class T> static T of(T a, T b) {
    if constexpr (std::is_floating_point_v<T>)
      return a == b ? (std::signbit(a) ? b : a) : std::fmax(a, b);
    else
      return a > b ? a : b;
  }
};
struct And {
  template <class T> static T of(T a, T b) { return T(a & b); }
};
struct Or {
  template <class T> static T of(T a, T b) { return T(a | b); }
};
struct Xor {
  template <class T> static T of(T a, T b) { return T(a ^ b); }
};

struct Negate {
  template <class T> static T of(T a) {
    if constexpr (kInteger<T>)
      return Sub::of(T(0), a);
    else
      return -a;
  }
};
struct Absolute {
  template <class T> static T of(T a) {
    if constexpr (kInteger<T>)
      return a < T(0) ? Sub::of(T(0), a) : a;
    else
      return std::fabs(a);
  }
};
struct Invert {
  template <class T> static T of(T a) {
    if constexpr (std::is_same_v<T, bool>)
      return !a;
    else
      return T(~a);
  }
};

template <class T, class F>
void apply(Thread& t, Instruction const& i) {
  put<T>(t, i.operands[0], F::of(get<T>(t, i.operands[1])));
}

template <class T, class F>
void apply_to_two(Thread& t, Instruction const& i) {
  put<T>(t, i.operands[0], F::of(get<T>(t, i.operands[1]), get<T>(t, i.operands[2])));
}

template <class F, Types kTypes>
void unary(Instruction& i) {
  i.scalar = with_type<kTypes>(i.name.back(), []<class T>(TypeOf<T>) -> Scalar { return &apply<T, F>; });
}

template <class F, Types kTypes>
void binary(Instruction& i) {
  i.scalar = with_type<kTypes>(i.name.back(), []<class T>(TypeOf<T>) -> Scalar { return &apply_to_two<T, F>; });
}

// d = a * b + c in the same width (multiply_add) or in twice the width (wide, without c for mul).
template <class T, class F>
void multiply_add(Thread& t, Instruction const& i) {
  T const product = F::of(get<T>(t, i.operands[1]), get<T>(t, i.operands[2]));
  put<T>(t, i.operands[0], Add::of(product, get<T>(t, i.operands[3])));
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

template <bool kAdd>
void multiplication(Instruction& i) {
  i.scalar = with_type<kNumbers>(i.name.back(), [&]<class T>(TypeOf<T>) -> Scalar {
    bool const half = i.has("lo") || i.has("hi");
    if constexpr (std::is_floating_point_v<T>) {
      if (half || i.has("wide")) return nullptr;
      return kAdd ? &fused_multiply_add<T> : &apply_to_two<T, Mul>;
    } else {
      if constexpr (sizeof(T) < 8)
        if (i.has("wide")) return &wide<T>;
      if (!half) return nullptr;
      if (i.has("hi")) return kAdd ? &multiply_add<T, MulHigh> : &apply_to_two<T, MulHigh>;
      return kAdd ? &multiply_add<T, Mul> : &apply_to_two<T, Mul>;
    }
  });
}

template <class T, bool kLeft>
void shift(Thread& t, Instruction const& i) {
  T const value = get<T>(t, i.operands[1]);
  uint32_t const by = get<uint32_t>(t, i.operands[2]), bits = 8 * sizeof(T);
  T result;
  if constexpr (kLeft)
    result = by >= bits ? T(0) : T(value << by);
  else
    result = by >= bits ? T(std::is_signed_v<T> && value < 0 ? -1 : 0) : T(value >> by);
  put<T>(t, i.operands[0], result);
}

template <bool kLeft>
void shifting(Instruction& i) {
  i.scalar = with_type<kIntegers>(i.name.back(), []<class T>(TypeOf<T>) -> Scalar { return &shift<T, kLeft>; });
}

template <class T>
void select(Thread& t, Instruction const& i) {
  put<T>(t, i.operands[0], get<T>(t, i.operands[get<bool>(t, i.operands[3]) ? 1 : 2]));
}

void selection(Instruction& i) {
  i.scalar = with_type<kNumbers>(i.name.back(), []<class T>(TypeOf<T>) -> Scalar { return &select<T>; });
}

enum Comparison { kEq, kNe, kLt, kLe, kGt, kGe };
enum Combination { kAlone, kAnd, kOr, kXor };

template <class T>
void compare(Thread& t, Instruction const& i) {
  T const a = get<T>(t, i.operands[1]), b = get<T>(t, i.operands[2]);
  bool result = false;
  switch (i.mode) {
    case kEq: result = a == b; break;
    case kNe: result = a != b; break;
    case kLt: result = a < b; break;
    case kLe: result = a <= b; break;
    case kGt: result = a > b; break;
    case kGe: result = a >= b; break;
  }
  if constexpr (std::is_floating_point_v<T>)
    if (std::isnan(a) || std::isnan(b)) result = i.nan_is_true;
  auto const combined = [&](bool value) {
    if (i.combination == kAlone) return value;
    bool const other = get<bool>(t, i.operands[3]);
    return i.combination == kAnd ? value && other : i.combination == kOr ? value || other : value != other;
  };
  Operand const& to = i.operands[0];
  if (to.kind == Operand::kPair) {
    put<bool>(t, to.parts[0], combined(result));
    put<bool>(t, to.parts[1], combined(!result));
  } else {
    put<bool>(t, to, combined(result));
  }
}

void comparison(Instruction& i) {
  string name = i.name[1];
  string const& type = i.name.back();
  i.combination = i.has("and") ? kAnd : i.has("or") ? kOr : i.has("xor") ? kXor : kAlone;
  if (i.operands.size() != (i.combination == kAlone ? 3 : 4)) return;
  if (type[0] == 'f' && name.size() == 3 && name.back() == 'u') {
    i.nan_is_true = true;
    name.pop_back();
  }
  static char const* const kNames[] = {"eq", "ne", "lt", "le", "gt", "ge"};
  static char const* const kUnsignedNames[] = {"", "", "lo", "ls", "hi", "hs"};
  for (i.mode = 0; i.mode < 6; ++i.mode)
    if (name == kNames[i.mode] || name == kUnsignedNames[i.mode]) break;
  if (i.mode < 6) i.scalar = with_type<kNumbers>(type, []<class T>(TypeOf<T>) -> Scalar { return &compare<T>; });
}

// How a float is rounded to an integer.
enum Rounding { kNone, kNearest, kZero, kDown, kUp };

// A NaN becomes 0, or only the topmost bit if either type has 64 bits.
template <class To, class From>
To to_integer(From value, int rounding) {
  constexpr To kTopmost = To(std::make_unsigned_t<To>(1) << (8 * sizeof(To) - 1));
  if (std::isnan(value)) return sizeof(To) == 8 || sizeof(From) == 8 ? kTopmost : To(0);
  double const exact = double(value);
  double const whole = rounding == kNearest ? std::nearbyint(exact)
                       : rounding == kDown  ? std::floor(exact)
                       : rounding == kUp    ? std::ceil(exact)
                                            : std::trunc(exact);
  if (whole <= double(std::numeric_limits<To>::min())) return std::numeric_limits<To>::min();
  if (whole >= double(std::numeric_limits<To>::max())) return std::numeric_limits<To>::max();
  return To(whole);
}

template <class To, class From>
void convert(Thread& t, Instruction const& i) {
  From const value = get<From>(t, i.operands[1]);
  To result;
  if constexpr (std::is_floating_point_v<From> && kInteger<To>)
    result = to_integer<To>(value, i.mode);
  else
    result = To(value);
  put<To>(t, i.operands[0], result);
}

template <float (*kWiden)(uint16_t)>
void widen(Thread& t, Instruction const& i) {
  put<float>(t, i.operands[0], kWiden(get<uint16_t>(t, i.operands[1])));
}

template <uint16_t (*kRound)(float)>
void round(Thread& t, Instruction const& i) {
  put<uint16_t>(t, i.operands[0], kRound(get<float>(t, i.operands[1])));
}

// The first operand goes to the upper half.
template <uint16_t (*kRound)(float)>
void round_pair(Thread& t, Instruction const& i) {
  uint32_t const high = kRound(get<float>(t, i.operands[1])), low = kRound(get<float>(t, i.operands[2]));
  put<uint32_t>(t, i.operands[0], high << 16 | low);
}

// Conversions from and to 16-bit floats.
Scalar conversion_of_halves(Instruction const& i) {
  static std::map<string, Scalar> const kKnown = {
      {"rn.bf16.f32", &round<to_bfloat16>},        {"rn.f16.f32", &round<to_float16>},
      {"rn.bf16x2.f32", &round_pair<to_bfloat16>}, {"rn.f16x2.f32", &round_pair<to_float16>},
      {"f32.bf16", &widen<from_bfloat16>},         {"f32.f16", &widen<from_float16>}};
  string written = i.name[1];
  for (size_t part = 2; part < i.name.size(); ++part) written += "." + i.name[part];
  auto const found = kKnown.find(written);
  bool const is_pair = written.find("x2") != written.npos;
  return found == kKnown.end() || is_pair != (i.operands.size() == 3) ? nullptr : found->second;
}

void conversion(Instruction& i) {
  i.scalar = conversion_of_halves(i);
  if (i.scalar || i.operands.size() != 2 || i.name.size() < 3) return;
  i.mode = i.has("rni") ? kNearest : i.has("rzi") ? kZero : i.has("rmi") ? kDown : i.has("rpi") ? kUp : kNone;
  i.scalar = with_type<kStored>(i.name[i.name.size() - 2], [&]<class To>(TypeOf<To>) -> Scalar {
    return with_type<kStored>(i.name.back(), [&]<class From>(TypeOf<From>) -> Scalar {
      constexpr bool kToInteger = std::is_floating_point_v<From> && kInteger<To>;
      return kToInteger == (i.mode != kNone) ? &convert<To, From> : nullptr;
    });
  });
}

// mov, which also packs registers into a wider one and unpacks them.
void move(Thread& t, Instruction const& i) {
  Operand const &to = i.operands[0], &from = i.operands[1];
  if (to.kind == Operand::kVector) {
    uint32_t const each = uint32_t(i.bits / to.parts.size());
    uint64_t const value = get<uint64_t>(t, from);
    for (size_t k = 0; k < to.parts.size(); ++k)
      put<uint64_t>(t, to.parts[k], value >> k * each & ((uint64_t(1) << each) - 1));
  } else if (from.kind == Operand::kVector) {
    uint32_t const each = uint32_t(i.bits / from.parts.size());
    uint64_t value = 0;
    for (size_t k = 0; k < from.parts.size(); ++k)
      value |= (get<uint64_t>(t, from.parts[k]) & ((uint64_t(1) << each) - 1)) << k * each;
    put<uint64_t>(t, to, value);
  } else {
    put<uint64_t>(t, to, get<uint64_t>(t, from));
  }
}

void move_predicate(Thread& t, Instruction const& i) { put<bool>(t, i.operands[0], get<bool>(t, i.operands[1])); }

void moving(Instruction& i) {
  string const& type = i.name.back();
  size_t const digits = type.find_first_of("0123456789");
  i.bits = digits == type.npos ? 0 : std::stoi(type.substr(digits));
  for (Operand const& operand : i.operands)
    if (operand.kind == Operand::kVector && operand.parts.size() != 2 && operand.parts.size() != 4) return;
  if (type == "pred")
    i.scalar = &move_predicate;
  else if (i.bits <= 64)
    i.scalar = &move;
}

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

void extraction(Instruction& i) {
  i.scalar = with_type<kIntegers>(i.name.back(), []<class T>(TypeOf<T>) -> Scalar { return &extract_bits<T>; });
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
  uint32_t const a = get<uint32_t>(t, i.operands[1]), b = get<uint32_t>(t, i.operands[2]);
  uint32_t const c = get<uint32_t>(t, i.operands[3]), table = get<uint32_t>(t, i.operands[4]);
  uint32_t result = 0;
  for (int k = 0; k < 32; ++k) result |= (table >> ((a >> k & 1) << 2 | (b >> k & 1) << 1 | (c >> k & 1)) & 1) << k;
  put<uint32_t>(t, i.operands[0], result);
}

template <bool kLeft, bool kClamps>
void funnel_shift(Thread& t, Instruction const& i) {
  uint64_t const both = uint64_t(get<uint32_t>(t, i.operands[2])) << 32 | get<uint32_t>(t, i.operands[1]);
  uint32_t by = get<uint32_t>(t, i.operands[3]);
  by = kClamps ? std::min(by, 32u) : by & 31;
  put<uint32_t>(t, i.operands[0], uint32_t(kLeft ? both << by >> 32 : both >> by));
}

template <class T>
void count_ones(Thread& t, Instruction const& i) {
  put<uint32_t>(t, i.operands[0], uint32_t(std::popcount(get<T>(t, i.operands[1]))));
}

template <class T>
void leading_zeros(Thread& t, Instruction const& i) {
  put<uint32_t>(t, i.operands[0], uint32_t(std::countl_zero(get<T>(t, i.operands[1]))));
}

Grid& grid_of(Thread& t) { return *t.block().cluster->grid; }

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

void branch(Thread& t, Instruction const& i) { t.pc = i.target; }

void exit_thread(Thread& t, Instruction const&) {
  if (!t.copies.empty()) throw Error("exits without waiting for its copies");
  // CUTLASS's Hopper kernels wait for their last stores; its Blackwell kernels exit while they are pending.
  if (grid_of(t).launch.kernel->module->target >= 100) t.stores.finish(0);
  if (!t.stores.empty()) throw Error("exits without waiting for its bulk stores");
  t.state = Thread::kExited;
}

void trap(Thread&, Instruction const&) { throw Error("the kernel trapped"); }
void pause(Thread& t, Instruction const&) { t.yields = true; }

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

template <bool kWaits>
void block_barrier(Thread& t, Instruction const& i) {
  std::optional<uint32_t> expected;
  if (i.operands.size() > 1) expected = get<uint32_t>(t, i.operands[1]);
  arrive(t.block(), get<uint32_t>(t, i.operands[0]), expected, kWaits ? &t : nullptr);
}

void cluster_arrive(Thread& t, Instruction const&) {
  Cluster& cluster = *t.block().cluster;
  if (t.arrived) throw Error("arrives twice without waiting");
  t.arrived = true;
  t.cluster_phase = cluster.phase;
  ++cluster.arrived;
  check_cluster(cluster);
}

void cluster_wait(Thread& t, Instruction const&) {
  if (!t.arrived) throw Error("waits without having arrived");
  if (t.block().cluster->phase == t.cluster_phase)
    t.state = Thread::kClusterBarrier;
  else
    t.arrived = false;
}

// The same offset in the shared memory of another block of the cluster.
void map_address(Thread& t, Instruction const& i) {
  uint32_t const address = get<uint32_t>(t, i.operands[1]), rank = get<uint32_t>(t, i.operands[2]);
  if (address >> 24) throw Error("the address is already that of another block");
  if (rank >= t.block().cluster->blocks.size()) throw Error("the cluster has no such rank");
  put<uint32_t>(t, i.operands[0], address | (rank + 1) << 24);
}

uint8_t* barrier_at(Thread& t, Operand const& operand) {
  return t.block().shared_at(uint32_t(address_of(t, operand)), 8);
}
void barrier_init(Thread& t, Instruction const& i) {
  mbarrier_init(barrier_at(t, i.operands[0]), get<uint32_t>(t, i.operands[1]));
}

void barrier_invalidate(Thread& t, Instruction const& i) { std::memset(barrier_at(t, i.operands[0]), 0xFF, 8); }

// kExpects: expects that many bytes and arrives once; else arrives that many times.
template <bool kExpects>
void barrier_arrive(Thread& t, Instruction const& i) {
  if (i.operands[0].kind != Operand::kSink) throw Error("the emulator does not return the state of an mbarrier");
  uint8_t* const place = barrier_at(t, i.operands[1]);
  uint32_t const number = i.operands.size() > 2 ? get<uint32_t>(t, i.operands[2]) : 1;
  if (kExpects) mbarrier_expect(grid_of(t), place, number);
  mbarrier_arrive(grid_of(t), place, kExpects ? 1 : number);
}

void barrier_expect(Thread& t, Instruction const& i) {
  mbarrier_expect(grid_of(t), barrier_at(t, i.operands[0]), get<uint32_t>(t, i.operands[1]));
}
void barrier_complete(Thread& t, Instruction const& i) {
  mbarrier_complete(grid_of(t), barrier_at(t, i.operands[0]), get<uint32_t>(t, i.operands[1]));
}

void barrier_test(Thread& t, Instruction const& i) {
  bool const done = mbarrier_done(barrier_at(t, i.operands[1]), get<uint32_t>(t, i.operands[2]));
  put<bool>(t, i.operands[0], done);
  if (!done) t.yields = true;
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

#define SHARED "shared shared::cta"
#define SPACES SHARED " shared::cluster global "
#define SCOPES "relaxed cta cluster gpu sys "

constexpr Form kForms[] = {
    {"add", "rn", 3, 3, binary<Add, kNumbers>},
    {"sub", "rn", 3, 3, binary<Sub, kNumbers>},
    {"mul", "rn lo hi wide", 3, 3, multiplication<false>},
    {"mad", "rn lo hi wide", 4, 4, multiplication<true>},
    {"fma", "rn", 4, 4, multiplication<true>},
    {"div", "rn", 3, 3, binary<Div, kNumbers>},
    {"rem", "", 3, 3, binary<Rem, kIntegers>},
    {"min", "", 3, 3, binary<Min, kNumbers>},
    {"max", "", 3, 3, binary<Max, kNumbers>},
    {"and", "", 3, 3, binary<And, kBits>},
    {"or", "", 3, 3, binary<Or, kBits>},
    {"xor", "", 3, 3, binary<Xor, kBits>},
    {"neg", "", 2, 2, unary<Negate, kNumbers>},
    {"abs", "", 2, 2, unary<Absolute, kNumbers>},
    {"not", "", 2, 2, unary<Invert, kBits>},
    {"shl", "", 3, 3, shifting<true>},
    {"shr", "", 3, 3, shifting<false>},
    {"selp", "", 4, 4, selection},
    {"setp", "eq ne lt le gt ge lo ls hi hs equ neu ltu leu gtu geu and or xor", 3, 4, comparison},
    {"cvt", "rn rni rzi rmi rpi", 2, 3, conversion},
    {"mov", "", 2, 2, moving},
    {"bfe", "", 4, 4, extraction},
    {"bfi.b32", "", 5, 5, always<insert_bits<uint32_t>>},
    {"bfi.b64", "", 5, 5, always<insert_bits<uint64_t>>},
    {"prmt.b32", "", 4, 4, always<permute_bytes>},
    {"lop3.b32", "", 5, 5, always<logic3>},
    {"shf.l.wrap", "", 4, 4, always<funnel_shift<true, false>>},
    {"shf.l.clamp", "", 4, 4, always<funnel_shift<true, true>>},
    {"shf.r.wrap", "", 4, 4, always<funnel_shift<false, false>>},
    {"shf.r.clamp", "", 4, 4, always<funnel_shift<false, true>>},
    {"popc.b32", "", 2, 2, always<count_ones<uint32_t>>},
    {"popc.b64", "", 2, 2, always<count_ones<uint64_t>>},
    {"clz.b32", "", 2, 2, always<leading_zeros<uint32_t>>},
    {"clz.b64", "", 2, 2, always<leading_zeros<uint64_t>>},

    {"ld", SPACES SCOPES "param local const v2 v4 v8 weak acquire volatile nc ca cg cs cv", 2, 2, memory_access<true>},
    {"st", SPACES SCOPES "local v2 v4 v8 weak release volatile wb cg cs wt", 2, 2, memory_access<false>},
    {"atom", SPACES SCOPES "acquire release acq_rel add min max exch cas inc and or xor", 3, 4, atomic_access<true>},
    {"red", SPACES SCOPES "release add min max inc and or xor", 2, 2, atomic_access<false>},
    {"cvta", SHARED " to global param local const", 2, 2, address_conversion},
    {"mapa", "shared::cluster", 3, 3, always<map_address>},

    {"bra", "uni", 0, 0, always<branch>},
    {"ret", "uni", 0, 0, always<exit_thread>},
    {"exit", "", 0, 0, always<exit_thread>},
    {"trap", "", 0, 0, always<trap>},
    {"nanosleep", "", 1, 1, always<pause>},
    {"bar.sync", "", 1, 2, always<block_barrier<true>>},
    {"bar.arrive", "", 2, 2, always<block_barrier<false>>},
    {"barrier.sync", "aligned", 1, 2, always<block_barrier<true>>},
    {"barrier.arrive", "aligned", 2, 2, always<block_barrier<false>>},
    {"barrier.cluster.arrive", "release relaxed aligned", 0, 0, always<cluster_arrive>},
    {"barrier.cluster.wait", "acquire aligned", 0, 0, always<cluster_wait>},

    {"mbarrier.init", SHARED, 2, 2, always<barrier_init>},
    {"mbarrier.inval", SHARED, 1, 1, always<barrier_invalidate>},
    {"mbarrier.arrive", SPACES SCOPES "release", 2, 3, always<barrier_arrive<false>>},
    {"mbarrier.arrive.expect_tx", SPACES SCOPES "release", 3, 3, always<barrier_arrive<true>>},
    {"mbarrier.expect_tx", SPACES SCOPES, 2, 2, always<barrier_expect>},
    {"mbarrier.complete_tx", SPACES SCOPES, 2, 2, always<barrier_complete>},
    {"mbarrier.test_wait.parity", SHARED " " SCOPES "acquire", 3, 3, always<barrier_test>},
    {"mbarrier.try_wait.parity", SHARED " " SCOPES "acquire", 3, 4, always<barrier_test>},

    {"cp.async.ca", SHARED " global L2::64B L2::128B L2::256B", 3, 4, copying},
    {"cp.async.cg", SHARED " global L2::64B L2::128B L2::256B", 3, 4, copying},
    {"cp.async.commit_group", "", 0, 0, always<copies_commit>},
    {"cp.async.wait_group", "", 1, 1, always<copies_wait>},
    {"cp.async.wait_all", "", 0, 0, always<copies_wait_all>},
    {"cp.async.bulk.commit_group", "", 0, 0, always<stores_commit>},
    {"cp.async.bulk.wait_group", "read", 1, 1, always<stores_wait>},

    // Orderings and hints do nothing: this machine runs everything in order but what it defers on purpose.
    {"fence", "acq_rel sc acquire release proxy async mbarrier_init " SPACES SCOPES, 0, 0, always<nothing>},
    {"membar", "cta gl sys", 0, 0, always<nothing>},
    {"prefetch", "tensormap global local param const L1 L2", 1, 1, always<nothing>},
    {"griddepcontrol", "wait launch_dependents", 0, 0, always<nothing>},
    {"setmaxnreg", "inc dec sync aligned", 1, 1, always<nothing>},
};

}  // namespace

std::span<Form const> scalar_forms() { return kForms; }

}  // namespace emulator

// Arithmetic, comparisons, conversions and moves between registers.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <map>

#include "machine.h"
#include "scalar_types.h"

namespace emulator {
namespace {

using std::string;

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
};

}  // namespace

std::span<Form const> arithmetic_forms() { return kForms; }

}  // namespace emulator

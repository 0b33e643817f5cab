// The C++ types of PTX's types, and arithmetic on them.
#pragma once

#include <cmath>
#include <string>
#include <type_traits>

#include "machine.h"

namespace emulator {

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
Scalar with_type(std::string const& name, Use use) {
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

}  // namespace emulator

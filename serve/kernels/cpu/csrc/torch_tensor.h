// What the operators need of torch: tensors, and the checks of their arguments. For one file each; all is internal.
#pragma once
#include <initializer_list>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "torch_stable.h"

namespace {

using namespace ria;

inline void check(AOTITorchError error) {
  if (error) throw std::runtime_error("torch's C interface failed");
}
inline void require(bool condition, const char* message) {
  if (!condition) throw std::runtime_error(std::string("ria::sparse24: ") + message);
}

// Owns a tensor handle.
class Tensor {
 public:
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {}
  explicit Tensor(StableIValue value) : Tensor(reinterpret_cast<AtenTensorHandle>(value)) {}

  AtenTensorHandle get() const { return handle_.get(); }
  StableIValue release() { return reinterpret_cast<StableIValue>(handle_.release()); }
  template <class T>
  T* data() const {
    void* pointer;
    check(aoti_torch_get_data_ptr(get(), &pointer));
    return static_cast<T*>(pointer);
  }
  int64_t dim() const {
    int64_t dim;
    check(aoti_torch_get_dim(get(), &dim));
    return dim;
  }
  const int64_t* sizes() const {
    int64_t* sizes;
    check(aoti_torch_get_sizes(get(), &sizes));
    return sizes;
  }
  const int64_t* strides() const {
    int64_t* strides;
    check(aoti_torch_get_strides(get(), &strides));
    return strides;
  }
  int32_t dtype() const {
    int32_t dtype;
    check(aoti_torch_get_dtype(get(), &dtype));
    return dtype;
  }
  bool contiguous() const {
    bool contiguous;
    check(aoti_torch_is_contiguous(get(), &contiguous));
    return contiguous;
  }
  // Whether this is a contiguous tensor of this dtype and shape.
  bool is(int32_t dtype, const std::vector<int64_t>& shape) const {
    if (this->dtype() != dtype || dim() != static_cast<int64_t>(shape.size()) || !contiguous()) return false;
    const int64_t* size = sizes();
    for (int64_t wanted : shape)
      if (*size++ != wanted) return false;
    return true;
  }

 private:
  struct Delete {
    void operator()(AtenTensorHandle handle) const { aoti_torch_delete_tensor_object(handle); }
  };
  std::unique_ptr<AtenTensorOpaque, Delete> handle_;
};

inline Tensor take_optional(StableIValue value) {
  if (value == 0) return Tensor(AtenTensorHandle{nullptr});
  const std::unique_ptr<StableIValue> inner(reinterpret_cast<StableIValue*>(value));
  return Tensor(*inner);
}

inline Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= sizes[d] > 0 ? sizes[d] : 1) strides[d] = stride;
  AtenTensorHandle handle;
  check(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0,
                                 &handle));
  return Tensor(handle);
}

inline int32_t torch_dtype(Dtype dtype) {
  switch (dtype) {
    case Dtype::bfloat16: return aoti_torch_dtype_bfloat16();
    case Dtype::float16: return aoti_torch_dtype_float16();
    case Dtype::int8: return aoti_torch_dtype_int8();
    case Dtype::int4: return aoti_torch_dtype_uint8();  // two to a byte
    default: return aoti_torch_dtype_float32();
  }
}

// The stride between tokens, if one stride walks all leading dimensions of x and the last dimension is contiguous.
inline std::optional<int64_t> token_stride(const Tensor& x) {
  const int64_t dim = x.dim(), *sizes = x.sizes(), *strides = x.strides();
  if (strides[dim - 1] != 1) return std::nullopt;
  std::optional<int64_t> stride;
  int64_t next = 0;  // the stride that the next outer dimension must have
  for (int64_t d = dim - 2; d >= 0; --d) {
    if (sizes[d] == 1) continue;
    if (stride && strides[d] != next) return std::nullopt;
    if (!stride) stride = strides[d];
    next = strides[d] * sizes[d];
  }
  return stride.value_or(sizes[dim - 1]);
}

// Throws unless this is an order of `columns` channels.
inline void check_permutation(const Tensor& permutation, int64_t columns) {
  require(permutation.is(aoti_torch_dtype_int32(), {columns}),
          "input_permutation must be contiguous int32 [in_features]");
  const int32_t* p = permutation.data<const int32_t>();
  uint32_t largest = 0;
  for (int64_t i = 0; i < columns; ++i) largest = static_cast<uint32_t>(p[i]) > largest ? p[i] : largest;
  require(largest < columns, "input_permutation has an index that is out of range");
}

// The tensor's dtype if it is one of floating-point numbers, else `otherwise`.
inline Dtype float_dtype(const Tensor& tensor, Dtype otherwise) {
  for (Dtype dtype : {Dtype::bfloat16, Dtype::float16, Dtype::float32})
    if (tensor.dtype() == torch_dtype(dtype)) return dtype;
  return otherwise;
}

// The layout of a weight whose `rows` and columns are the last two dimensions of its stored tensors; each may be
// preceded by `experts`. Throws if no kernel multiplies it. group_size: 0 for one scale per row, or none.
inline Layout check_weight(const Tensor& compressed, const Tensor& bitmask, const Tensor& scales, int64_t group_size,
                           std::initializer_list<int64_t> experts) {
  const int64_t dim = 2 + static_cast<int64_t>(experts.size());
  int kind = 0;
  while (kind < kNumDtypes && compressed.dtype() != torch_dtype(static_cast<Dtype>(kind))) ++kind;
  require(kind < kNumDtypes, "compressed must be bfloat16, float16, float32, int8 or uint8, which holds int4");
  require(compressed.dim() == dim, "compressed must be [out, in / 2], or [out, in / 4] of int4");
  const Dtype dtype = static_cast<Dtype>(kind);
  const int64_t rows = compressed.sizes()[dim - 2];
  const int64_t columns = compressed.sizes()[dim - 1] * (dtype == Dtype::int4 ? 4 : 2);
  require(columns % 64 == 0 && columns > 0 && rows > 0, "in-features must be a multiple of 64, out-features positive");
  const auto is = [&](const Tensor& tensor, int32_t dtype, std::initializer_list<int64_t> shape) {
    std::vector<int64_t> whole(experts);
    whole.insert(whole.end(), shape);
    return tensor.is(dtype, whole);
  };
  require(is(compressed, compressed.dtype(), {rows, compressed.sizes()[dim - 1]}), "compressed must be contiguous");
  require(is(bitmask, aoti_torch_dtype_uint8(), {rows, columns / 8}),
          "bitmask must be contiguous uint8 [out, in / 8] for compressed [out, in / 2], or [out, in / 4] of int4");
  require(has_scales(dtype) == (scales.get() != nullptr), "int8 and int4 weights need scales; others take none");
  Layout layout{rows, columns, dtype};
  if (group_size == 0) {
    require(!scales.get() || is(scales, aoti_torch_dtype_float32(), {rows}),
            "scales of rows must be contiguous float32 [out]");
    return layout;
  }
  require(has_scales(dtype) && Layout::valid_group(group_size, columns),
          "only int8 and int4 weights have groups: of 32, 64 or 128 columns, a whole number of them");
  layout.group_size = group_size;
  layout.scale_dtype = float_dtype(scales, layout.scale_dtype);
  require(is(scales, torch_dtype(layout.scale_dtype), {rows, columns / group_size}),
          "scales of groups must be contiguous bfloat16, float16 or float32 [out, in / group_size]");
  return layout;
}

// The scales as they are stored.
inline GivenScales given_scales(const Layout& layout, const Tensor& scales) {
  return {scales.get() ? scales.data<const void>() : nullptr, layout.group_size, layout.scale_dtype};
}

// Says which activations a weight is for, and the columns of which half are kept. Throws if no kernel multiplies it.
inline void set_activations(Layout& layout, bool int8, int64_t pattern) {
  layout.int8_activations = int8;
  layout.pattern = pattern;
  require(Layout::valid_pattern(pattern), "pattern must be 4 (2:4) or 16 (8:16)");
  require(has_scales(layout.dtype) || !layout.int8_activations, "only int8 and int4 weights take int8 activations");
  require(!layout.int8_activations || layout.columns <= kMaxInt8Columns, "too many columns for int8 activations");
  require(!layout.int8_activations || !layout.group_size || layout.dtype == Dtype::int4,
          "with int8 activations, int8 weights have one scale per row");
  if (layout.int8_activations) layout.group_size = 0, layout.scale_dtype = Dtype::float32;
}

inline Tensor contiguous_copy(const Tensor& tensor) {
  Tensor copy = empty(std::vector<int64_t>(tensor.sizes(), tensor.sizes() + tensor.dim()), tensor.dtype());
  check(aoti_torch_copy_(copy.get(), tensor.get(), 0));
  return copy;
}

// x, copied if no one stride walks its tokens.
inline Tensor with_token_stride(Tensor x) { return token_stride(x) ? std::move(x) : contiguous_copy(x); }

}  // namespace

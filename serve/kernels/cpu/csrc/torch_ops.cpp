// The operators `ria::sparse24_pack.cpu` and `ria::sparse24_linear.cpu`: they check their arguments and call the
// kernels.
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

void check(AOTITorchError error) {
  if (error) throw std::runtime_error("torch's C interface failed");
}
void require(bool condition, const char* message) {
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
  bool is(int32_t dtype, std::initializer_list<int64_t> shape) const {
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

Tensor take_optional(StableIValue value) {
  if (value == 0) return Tensor(AtenTensorHandle{nullptr});
  const std::unique_ptr<StableIValue> inner(reinterpret_cast<StableIValue*>(value));
  return Tensor(*inner);
}

Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= sizes[d] > 0 ? sizes[d] : 1) strides[d] = stride;
  AtenTensorHandle handle;
  check(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0,
                                 &handle));
  return Tensor(handle);
}

int32_t torch_dtype(Dtype dtype) {
  switch (dtype) {
    case Dtype::bfloat16: return aoti_torch_dtype_bfloat16();
    case Dtype::float16: return aoti_torch_dtype_float16();
    case Dtype::int8: return aoti_torch_dtype_int8();
    default: return aoti_torch_dtype_float32();
  }
}

// The stride between tokens, if one stride walks all leading dimensions of x and the last dimension is contiguous.
std::optional<int64_t> token_stride(const Tensor& x) {
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

void linear_op(StableIValue* stack, uint64_t, uint64_t) {
  Tensor x(stack[0]);
  const Tensor packed(stack[1]);
  const int64_t rows = static_cast<int64_t>(stack[2]);
  const Tensor permutation = take_optional(stack[3]), bias = take_optional(stack[4]);

  const int64_t dim = x.dim();
  require(dim >= 1, "x needs at least one dimension");
  std::vector<int64_t> shape(x.sizes(), x.sizes() + dim);
  const int64_t columns = shape.back();
  int64_t tokens = 1;
  for (int64_t d = 0; d < dim - 1; ++d) tokens *= shape[d];

  require(packed.dtype() == aoti_torch_dtype_uint8() && packed.dim() == 1 && packed.contiguous() &&
              packed.sizes()[0] >= static_cast<int64_t>(sizeof(Header)),
          "the packed weight was not made by sparse24_pack");
  const Header& header = *packed.data<const Header>();
  require(header.magic == Header::kMagic && static_cast<int>(header.dtype) < kNumDtypes && header.rows == rows &&
              header.columns == columns,
          "the packed weight does not fit out_features or x's last dimension");
  const Layout layout{rows, columns, header.dtype};
  require(packed.sizes()[0] == layout.bytes(), "the packed weight is truncated");
  require(x.dtype() == torch_dtype(has_scales(layout.dtype) ? Dtype::bfloat16 : layout.dtype),
          "x must have the weight's dtype, and bfloat16 for int8 weights");
  require(!bias.get() || bias.is(x.dtype(), {rows}), "bias must be contiguous, [out_features], of x's dtype");
  if (permutation.get()) {
    require(permutation.is(aoti_torch_dtype_int32(), {columns}),
            "input_permutation must be contiguous int32 [in_features]");
    const int32_t* p = permutation.data<const int32_t>();
    uint32_t largest = 0;
    for (int64_t i = 0; i < columns; ++i) largest = static_cast<uint32_t>(p[i]) > largest ? p[i] : largest;
    require(largest < columns, "input_permutation has an index that is out of range");
  }

  std::optional<int64_t> stride = token_stride(x);
  if (!stride) {
    Tensor contiguous = empty(shape, x.dtype());
    check(aoti_torch_copy_(contiguous.get(), x.get(), 0));
    x = std::move(contiguous);
    stride = columns;
  }
  shape.back() = rows;
  Tensor y = empty(shape, x.dtype());
  if (tokens > 0) {
    GemmArgs args{};
    args.layout = layout;
    args.packed = packed.data<const uint8_t>();
    args.x = x.data<const void>();
    args.x_stride = *stride;
    args.permutation = permutation.get() ? permutation.data<const int32_t>() : nullptr;
    args.bias = bias.get() ? bias.data<const void>() : nullptr;
    args.y = y.data<void>();
    linear(args, tokens, instruction_set());
  }
  stack[0] = y.release();
}

void pack_op(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor compressed(stack[0]), bitmask(stack[1]), scales = take_optional(stack[2]);
  require(compressed.dim() == 2, "compressed must be a matrix");
  const int64_t rows = compressed.sizes()[0], columns = compressed.sizes()[1] * 2;
  int kind = 0;
  while (kind < kNumDtypes && compressed.dtype() != torch_dtype(static_cast<Dtype>(kind))) ++kind;
  require(kind < kNumDtypes, "compressed must be bfloat16, float16, float32 or int8");
  require(columns % 64 == 0 && columns > 0 && rows > 0, "in-features must be a multiple of 64, out-features positive");
  require(compressed.contiguous(), "compressed must be contiguous");
  require(bitmask.is(aoti_torch_dtype_uint8(), {rows, columns / 8}),
          "bitmask must be contiguous uint8 [out, in / 8] for compressed [out, in / 2]");
  const Layout layout{rows, columns, static_cast<Dtype>(kind)};
  require(has_scales(layout.dtype) == (scales.get() != nullptr) &&
              (!scales.get() || scales.is(aoti_torch_dtype_float32(), {rows})),
          "int8 weights need scales, contiguous float32 [out]; other weights take none");
  Tensor packed = empty({layout.bytes()}, aoti_torch_dtype_uint8());
  pack(layout, compressed.data<const void>(), bitmask.data<const uint8_t>(),
       scales.get() ? scales.data<const float>() : nullptr, packed.data<uint8_t>());
  stack[0] = packed.release();
}

struct Registration {
  Registration() {
    TorchLibraryHandle schemas, cpu;
    check(aoti_torch_library_init_fragment("ria", __FILE__, __LINE__, &schemas));
    check(aoti_torch_library_def(schemas,
                                 "sparse24_pack.cpu(Tensor compressed, Tensor bitmask, Tensor? scales) -> Tensor"));
    check(aoti_torch_library_def(schemas,
                                 "sparse24_linear.cpu(Tensor x, Tensor packed, int out_features, "
                                 "Tensor? input_permutation, Tensor? bias) -> Tensor"));
    check(aoti_torch_library_init_impl("ria", "CPU", __FILE__, __LINE__, &cpu));
    check(aoti_torch_library_impl(cpu, "sparse24_pack.cpu", pack_op));
    check(aoti_torch_library_impl(cpu, "sparse24_linear.cpu", linear_op));
  }
} registration;  // never destroyed before the process ends: torch keeps the functions

}  // namespace

int64_t ria::threads() {
  uint32_t count;
  check(torch_get_num_threads(&count));
  return count;
}

void ria::parallel_for(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  check(torch_parallel_for(0, count, grain, body, context));
}

// The name of the instruction set in use, or the reason why there is none. Valid until the thread's next call.
extern "C" __attribute__((visibility("default"))) const char* ria_cpu_instruction_set(int* available) {
  thread_local std::string answer;
  try {
    answer = ria::instruction_set().name;
    *available = 1;
  } catch (const std::exception& error) {
    answer = error.what();
    *available = 0;
  }
  return answer.c_str();
}

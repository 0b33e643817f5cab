// The operators `ria::sparse24_pack.cpu` and `ria::sparse24_linear.cpu`: they check their arguments and call the
// kernels.
#include "torch_tensor.h"

namespace {

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
  require(Layout::valid(header) && header.rows == rows && header.columns == columns,
          "the packed weight does not fit out_features or x's last dimension");
  const Layout layout = Layout::of(header);
  require(packed.sizes()[0] == layout.bytes(), "the packed weight is truncated");
  const Dtype act_dtype = has_scales(layout.dtype) ? float_dtype(x, Dtype::bfloat16) : layout.dtype;
  require(x.dtype() == torch_dtype(act_dtype),
          "x must have the weight's dtype, and bfloat16, float16 or float32 for int8 and int4 weights");
  require(!bias.get() || bias.is(x.dtype(), {rows}), "bias must be contiguous, [out_features], of x's dtype");
  if (permutation.get()) check_permutation(permutation, columns);

  x = with_token_stride(std::move(x));
  shape.back() = rows;
  Tensor y = empty(shape, x.dtype());
  if (tokens > 0) {
    GemmArgs args{};
    args.layout = layout;
    args.packed = packed.data<const uint8_t>();
    args.x = x.data<const void>();
    args.x_stride = *token_stride(x);
    args.permutation = permutation.get() ? permutation.data<const int32_t>() : nullptr;
    args.bias = bias.get() ? bias.data<const void>() : nullptr;
    args.y = y.data<void>();
    args.act_dtype = act_dtype;
    linear(args, tokens, instruction_set());
  }
  stack[0] = y.release();
}

void pack_op(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor compressed(stack[0]), bitmask(stack[1]), scales = take_optional(stack[2]);
  Layout layout = check_weight(compressed, bitmask, scales, static_cast<int64_t>(stack[3]), {});
  const GivenScales given = given_scales(layout, scales);
  set_activations(layout, stack[4] != 0, static_cast<int64_t>(stack[5]));
  Tensor packed = empty({layout.bytes()}, aoti_torch_dtype_uint8());
  ask_for_huge_pages(packed.data<uint8_t>(), layout.bytes());
  pack(layout, compressed.data<const void>(), bitmask.data<const uint8_t>(), given, packed.data<uint8_t>());
  stack[0] = packed.release();
}

void int8_rows_op(StableIValue* stack, uint64_t, uint64_t) {
  Tensor x(stack[0]);
  const Tensor weights(stack[1]), scales(stack[2]), bias = take_optional(stack[3]);
  const int64_t dim = x.dim();
  require(dim >= 1 && weights.dim() == 2, "x needs at least one dimension, the weight two");
  const int64_t rows = weights.sizes()[0], columns = weights.sizes()[1];
  std::vector<int64_t> shape(x.sizes(), x.sizes() + dim);
  require(weights.is(aoti_torch_dtype_int8(), {rows, columns}) && scales.is(aoti_torch_dtype_float32(), {rows, 1}),
          "the weight must be contiguous int8 [out, in], its scales float32 [out, 1]");
  require(columns > 0 && columns % 64 == 0 && columns <= kMaxInt8Columns && shape.back() == columns,
          "x's last dimension must be the weight's, a multiple of 64");
  const Dtype act_dtype = float_dtype(x, Dtype::int8);
  require(act_dtype != Dtype::int8, "x must be bfloat16, float16 or float32");
  require(!bias.get() || bias.is(x.dtype(), {rows}), "bias must be contiguous, [out_features], of x's dtype");
  int64_t tokens = 1;
  for (int64_t d = 0; d < dim - 1; ++d) tokens *= shape[d];
  x = with_token_stride(std::move(x));
  shape.back() = rows;
  Tensor y = empty(shape, x.dtype());
  if (tokens > 0 && rows > 0) {
    DenseArgs args{};
    args.weights = weights.data<const int8_t>();
    args.scales = scales.data<const float>();
    args.rows = rows;
    args.columns = columns;
    args.tokens = tokens;
    args.bias = bias.get() ? bias.data<const void>() : nullptr;
    args.act_dtype = act_dtype;
    args.y = y.data<void>();
    dense_linear(args, x.data<const void>(), *token_stride(x), instruction_set());
  }
  stack[0] = y.release();
}

struct Registration {
  Registration() {
    TorchLibraryHandle schemas, cpu;
    check(aoti_torch_library_init_fragment("ria", __FILE__, __LINE__, &schemas));
    check(aoti_torch_library_def(schemas,
                                 "sparse24_pack.cpu(Tensor compressed, Tensor bitmask, Tensor? scales, int group_size, "
                                 "bool int8_activations=False, int pattern=4) "
                                 "-> Tensor"));
    check(aoti_torch_library_def(schemas,
                                 "sparse24_linear.cpu(Tensor x, Tensor packed, int out_features, "
                                 "Tensor? input_permutation, Tensor? bias) -> Tensor"));
    check(aoti_torch_library_def(schemas,
                                 "int8_rows_linear.cpu(Tensor x, Tensor integers, Tensor scales, Tensor? bias) "
                                 "-> Tensor"));
    check(aoti_torch_library_init_impl("ria", "CPU", __FILE__, __LINE__, &cpu));
    check(aoti_torch_library_impl(cpu, "int8_rows_linear.cpu", int8_rows_op));
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

// See `ria::ask_for_huge_pages`.
extern "C" __attribute__((visibility("default"))) void ria_cpu_ask_for_huge_pages(void* begin, int64_t bytes) {
  ria::ask_for_huge_pages(static_cast<uint8_t*>(begin), bytes);
}

// The operators `ria::sparse24_pack_experts.cpu` and `ria::sparse24_experts.cpu`.
#include <cstring>

#include "torch_tensor.h"

namespace {

// The layout of packed experts [experts, bytes]; throws if they were not packed as such. Each expert has a header, and
// only one that is used is looked at, see `check_header`.
Layout layout_of(const Tensor& packed) {
  require(packed.dtype() == aoti_torch_dtype_uint8() && packed.dim() == 2 && packed.contiguous() &&
              packed.sizes()[0] > 0 && packed.sizes()[1] >= static_cast<int64_t>(sizeof(Header)),
          "packed experts were not made by sparse24_pack_experts");
  const Header& header = *packed.data<const Header>();
  require(Layout::valid(header), "packed experts were not made by sparse24_pack_experts");
  const Layout layout = Layout::of(header);
  require(packed.sizes()[1] == layout.bytes(), "packed experts are truncated");
  return layout;
}

void check_header(const Tensor& packed, const Layout& layout, int64_t expert) {
  const Header header = layout.header();
  require(std::memcmp(packed.data<const uint8_t>() + expert * layout.bytes(), &header, sizeof header) == 0,
          "an expert was packed unlike the first one");
}

template <class Index>
std::vector<int32_t> local_ids(const Index* ids, int64_t count, const int32_t* map, int64_t mapped, int64_t experts) {
  std::vector<int32_t> local(count);
  for (int64_t i = 0; i < count; ++i) {
    int64_t id = ids[i];
    require(id >= -1 && id < mapped, "topk_ids has an expert that does not exist");
    if (map && id >= 0) id = map[id];
    require(id >= -1 && id < experts, "expert_map has an expert that does not exist");
    local[i] = static_cast<int32_t>(id);
  }
  return local;
}

float to_float(StableIValue value) {
  double number;
  std::memcpy(&number, &value, sizeof number);
  return static_cast<float>(number);
}

void experts_op(StableIValue* stack, uint64_t, uint64_t) {
  Tensor x(stack[0]), weights(stack[1]), ids(stack[2]);
  const Tensor gate_up(stack[3]), down(stack[4]), gate_up_bias = take_optional(stack[5]),
                                                  down_bias = take_optional(stack[6]),
                                                  permutation = take_optional(stack[7]), map = take_optional(stack[8]);
  ExpertsArgs args{};
  const int64_t kind = static_cast<int64_t>(stack[9]);
  require(kind >= 0 && kind < Activation::kKinds, "there is no such activation");
  args.activation = {static_cast<Activation::Kind>(kind), stack[10] != 0, to_float(stack[11]), to_float(stack[12]),
                     to_float(stack[13])};

  args.gate_up = layout_of(gate_up);
  args.down = layout_of(down);
  args.num_experts = gate_up.sizes()[0];
  args.hidden = args.down.rows;
  const int64_t written = args.gate_up.strips() * kStripRows / (args.activation.gated ? 2 : 1);
  require(!args.activation.gated || args.gate_up.strips() % 2 == 0, "gate and up were packed as one matrix");
  require(down.sizes()[0] == args.num_experts && args.down.dtype == args.gate_up.dtype &&
              args.down.group_size == args.gate_up.group_size &&
              args.down.int8_activations == args.gate_up.int8_activations &&
              args.down.pattern == args.gate_up.pattern && args.down.columns >= written &&
              args.gate_up.columns >= args.hidden,
          "the packed down does not fit the packed gate and up");
  args.act_dtype = has_scales(args.down.dtype) ? float_dtype(x, Dtype::bfloat16) : args.down.dtype;
  const int32_t dtype = torch_dtype(args.act_dtype);
  require(x.dim() == 2 && x.sizes()[1] == args.hidden && x.dtype() == dtype,
          "x must be [tokens, hidden] of the weights' dtype, and for int8 and int4 weights of any float dtype");
  args.tokens = x.sizes()[0];
  require(ids.dim() == 2 && ids.sizes()[0] == args.tokens &&
              (ids.dtype() == aoti_torch_dtype_int32() || ids.dtype() == aoti_torch_dtype_int64()),
          "topk_ids must be int32 or int64 [tokens, k]");
  args.top_k = ids.sizes()[1];
  if (!ids.contiguous()) ids = contiguous_copy(ids);
  if (!weights.contiguous()) weights = contiguous_copy(weights);
  require(weights.is(aoti_torch_dtype_float32(), {args.tokens, args.top_k}),
          "topk_weights must be float32 [tokens, k]");
  require(!gate_up_bias.get() == !down_bias.get(), "both products have a bias, or none");
  require(!down_bias.get() || (gate_up_bias.is(dtype, {args.num_experts, args.gate_up.rows}) &&
                               down_bias.is(dtype, {args.num_experts, args.down.rows})),
          "biases must be contiguous, [experts, rows], of x's dtype");
  if (permutation.get()) check_permutation(permutation, args.hidden);
  require(!map.get() || (map.dtype() == aoti_torch_dtype_int32() && map.dim() == 1 && map.contiguous()),
          "expert_map must be contiguous int32 [experts]");

  const int32_t* mapping = map.get() ? map.data<const int32_t>() : nullptr;
  const int64_t count = args.tokens * args.top_k, mapped = map.get() ? map.sizes()[0] : args.num_experts;
  const std::vector<int32_t> local =
      ids.dtype() == aoti_torch_dtype_int32()
          ? local_ids(ids.data<const int32_t>(), count, mapping, mapped, args.num_experts)
          : local_ids(ids.data<const int64_t>(), count, mapping, mapped, args.num_experts);
  std::vector<bool> checked(args.num_experts);
  for (int32_t expert : local) {
    if (expert < 0 || checked[expert]) continue;
    check_header(gate_up, args.gate_up, expert);
    check_header(down, args.down, expert);
    checked[expert] = true;
  }

  x = with_token_stride(std::move(x));
  Tensor y = empty({args.tokens, args.hidden}, dtype);
  if (args.tokens > 0) {
    args.gate_up_packed = gate_up.data<const uint8_t>();
    args.down_packed = down.data<const uint8_t>();
    args.gate_up_bias = gate_up_bias.get() ? gate_up_bias.data<const void>() : nullptr;
    args.down_bias = down_bias.get() ? down_bias.data<const void>() : nullptr;
    args.x = x.data<const void>();
    args.x_stride = *token_stride(x);
    args.permutation = permutation.get() ? permutation.data<const int32_t>() : nullptr;
    args.ids = local.data();
    args.weights = weights.data<const float>();
    args.y = y.data<void>();
    experts(args, instruction_set());
  }
  stack[0] = y.release();
}

void pack_experts_op(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor compressed(stack[0]), bitmask(stack[1]), scales = take_optional(stack[2]);
  const bool gated = stack[4] != 0;
  require(compressed.dim() == 3 && compressed.sizes()[0] > 0, "compressed must be [experts, out, in / 2]");
  const int64_t count = compressed.sizes()[0];
  Layout layout = check_weight(compressed, bitmask, scales, static_cast<int64_t>(stack[3]), {count});
  GivenScales given = given_scales(layout, scales);
  set_activations(layout, stack[5] != 0, static_cast<int64_t>(stack[6]));
  const int64_t rows = layout.rows, gates = gated ? rows / 2 : 0;
  require(!gated || rows % 2 == 0, "gate and up must have as many rows");
  if (gated) layout.rows = gated_rows(gates);
  Tensor packed = empty({count, layout.bytes()}, aoti_torch_dtype_uint8());
  uint8_t* to = packed.data<uint8_t>();
  ask_for_huge_pages(to, count * layout.bytes());
  const int64_t value_bytes = rows * layout.groups() * pair_bytes(layout.dtype);
  const int64_t bitmask_bytes = rows * layout.columns / 8;
  const int64_t scale_bytes = rows * (given.group_size ? layout.columns / given.group_size : 1) * bits(given.dtype) / 8;
  for (int64_t expert = 0; expert < count; ++expert, to += layout.bytes()) {
    try {
      pack(layout, compressed.data<const uint8_t>() + expert * value_bytes,
           bitmask.data<const uint8_t>() + expert * bitmask_bytes, given, to, gates);
      if (given.values) given.values = static_cast<const uint8_t*>(given.values) + scale_bytes;
    } catch (const std::runtime_error& error) {
      throw std::runtime_error("expert " + std::to_string(expert) + ": " + error.what());
    }
  }
  stack[0] = packed.release();
}

struct Registration {
  Registration() {
    TorchLibraryHandle schemas, cpu;
    check(aoti_torch_library_init_fragment("ria", __FILE__, __LINE__, &schemas));
    check(aoti_torch_library_def(
        schemas,
        "sparse24_pack_experts.cpu(Tensor compressed, Tensor bitmask, Tensor? scales, int group_size, int gated, "
        "bool int8_activations=False, int pattern=4) -> Tensor"));
    check(aoti_torch_library_def(
        schemas,
        "sparse24_experts.cpu(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor gate_up, Tensor down, "
        "Tensor? gate_up_bias, Tensor? down_bias, Tensor? input_permutation, Tensor? expert_map, int activation, "
        "int gated, float alpha, float beta, float limit) -> Tensor"));
    check(aoti_torch_library_init_impl("ria", "CPU", __FILE__, __LINE__, &cpu));
    check(aoti_torch_library_impl(cpu, "sparse24_pack_experts.cpu", pack_experts_op));
    check(aoti_torch_library_impl(cpu, "sparse24_experts.cpu", experts_op));
  }
} registration;  // never destroyed before the process ends: torch keeps the functions

}  // namespace

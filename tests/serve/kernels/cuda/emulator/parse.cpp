#include <cctype>
#include <cstdlib>
#include <cstring>
#include <map>
#include <unordered_map>

#include "ptx.h"

namespace emulator {
namespace {

std::string without_comments(std::string_view text) {
  std::string plain(text);
  for (size_t i = 0; i + 1 < plain.size(); ++i) {
    size_t end = i;
    if (plain[i] == '/' && plain[i + 1] == '/') end = std::min(plain.find('\n', i), plain.size());
    if (plain[i] == '/' && plain[i + 1] == '*') end = std::min(plain.find("*/", i + 2) + 2, plain.size());
    for (; i < end; ++i)
      if (plain[i] != '\n') plain[i] = ' ';
  }
  return plain;
}

bool is_name(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' || c == '.';
}

uint32_t align_up(uint32_t value, uint32_t alignment) { return (value + alignment - 1) / alignment * alignment; }

// A function, because libraries register their PTX before the static variables of other files are initialised.
std::map<std::string_view, int> const& special_names() {
  // clang-format off
  static std::map<std::string_view, int> const names = {
      {"%tid.x", kTidX}, {"%tid.y", kTidY}, {"%tid.z", kTidZ},
      {"%ntid.x", kNtidX}, {"%ntid.y", kNtidY}, {"%ntid.z", kNtidZ},
      {"%ctaid.x", kCtaidX}, {"%ctaid.y", kCtaidY}, {"%ctaid.z", kCtaidZ},
      {"%nctaid.x", kNctaidX}, {"%nctaid.y", kNctaidY}, {"%nctaid.z", kNctaidZ},
      {"%laneid", kLaneid}, {"%warpid", kWarpid}, {"%smid", kSmid},
      {"%cluster_ctarank", kClusterCtarank}, {"%cluster_nctarank", kClusterNctarank},
      {"%clusterid.x", kClusteridX}, {"%clusterid.y", kClusteridY}, {"%clusterid.z", kClusteridZ},
      {"%nclusterid.x", kNclusteridX}, {"%nclusterid.y", kNclusteridY}, {"%nclusterid.z", kNclusteridZ},
      {"%cluster_ctaid.x", kClusterCtaidX}, {"%cluster_ctaid.y", kClusterCtaidY}, {"%cluster_ctaid.z", kClusterCtaidZ},
      {"%cluster_nctaid.x", kClusterNctaidX}, {"%cluster_nctaid.y", kClusterNctaidY},
      {"%cluster_nctaid.z", kClusterNctaidZ}, {"%dynamic_smem_size", kDynamicSmemSize},
  };
  // clang-format on
  return names;
}

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(without_comments(text)) {}

  std::unique_ptr<Module> module() {
    while (skip_space(), at_ < text_.size()) top_level();
    return std::move(module_);
  }

 private:
  // Registers and labels between braces; inline assembly has such scopes.
  struct Scope {
    std::unordered_map<std::string, Operand> names;
    std::unordered_map<std::string, int> labels;
    int parent;
  };
  struct Jump {
    int instruction;
    std::string label;
    int scope;
  };

  [[noreturn]] void fail(std::string const& why) const {
    throw Error("PTX line " + std::to_string(line()) + ": " + why);
  }

  int line() const {
    while (counted_ < at_ && counted_ < text_.size()) lines_ += text_[counted_++] == '\n';
    return lines_ + 1;
  }

  void skip_space() {
    while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_]))) ++at_;
  }

  bool take(char c) {
    skip_space();
    if (at_ >= text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }

  void expect(char c) {
    if (!take(c)) fail(std::string("expected '") + c + "' before '" + text_.substr(at_, 20) + "'");
  }

  std::string word() {
    skip_space();
    size_t const start = at_;
    // "::" belongs to an instruction's modifiers; a single colon ends a label.
    while (at_ < text_.size() &&
           (is_name(text_[at_]) || (text_[at_] == ':' && text_[at_ + 1] == ':' && is_name(text_[at_ + 2])) ||
            (text_[at_] == ':' && at_ > start && text_[at_ - 1] == ':')))
      ++at_;
    return text_.substr(start, at_ - start);
  }

  std::string until_semicolon() {
    size_t const start = at_;
    at_ = std::min(text_.find(';', at_), text_.size());
    return text_.substr(start, at_++ - start);
  }

  uint64_t number(std::string const& written) const {
    bool const is_float = written.size() > 1 && written[0] == '0' && std::strchr("fFdD", written[1]);
    if (is_float) return std::strtoull(written.c_str() + 2, nullptr, 16);
    std::string digits = written;
    if (!digits.empty() && (digits.back() == 'U' || digits.back() == 'u')) digits.pop_back();
    char* end = nullptr;
    uint64_t const value = std::strtoull(digits.c_str(), &end, 0);
    if (*end) fail("not a number: " + written);
    return value;
  }

  void top_level() {
    std::string const first = word();
    if (first == ".target") {
      std::string const name = word();
      if (!name.starts_with("sm_")) fail("target " + name);
      module_->target = std::atoi(name.c_str() + 3);
      skip_line();
    } else if (first == ".version" || first == ".address_size" || first == ".file" || first == ".section") {
      skip_line();
    } else if (first == ".entry") {
      entry();
    } else if (first == ".visible" || first == ".weak" || first == ".extern") {
      skip_space();
      // ".visible .entry", ".extern .shared", ".weak .func"
      if (text_.compare(at_, 6, ".entry")) return variable_or_function();
      word();
      entry();
    } else {
      at_ -= first.size();
      variable_or_function();
    }
  }

  void skip_line() { at_ = std::min(text_.find('\n', at_), text_.size()); }

  void skip_braces() {
    int depth = 0;
    for (; at_ < text_.size(); ++at_) {
      depth += text_[at_] == '{' ? 1 : text_[at_] == '}' ? -1 : 0;
      if (text_[at_] == '}' && depth == 0) break;
    }
    ++at_;
  }

  void variable_or_function() {
    size_t const stop = text_.find_first_of(";{", at_);
    if (text_.substr(at_, stop - at_).find(".func") != std::string::npos) {  // functions are not supported
      if (stop != std::string::npos && text_[stop] == '{')
        skip_braces();
      else
        at_ = stop + 1;
      return;
    }
    declare(globals_, nullptr);
  }

  static uint32_t size_of(std::string const& type) {
    static std::map<std::string, uint32_t> const sizes = {
        {".b8", 1},  {".u8", 1},  {".s8", 1},  {".b16", 2}, {".u16", 2}, {".s16", 2}, {".f16", 2}, {".b32", 4},
        {".u32", 4}, {".s32", 4}, {".f32", 4}, {".b64", 8}, {".u64", 8}, {".s64", 8}, {".f64", 8}};
    auto const found = sizes.find(type);
    return found == sizes.end() ? 0 : found->second;
  }

  struct Variable {
    std::string space, name;
    uint32_t alignment = 1, bytes = 0;
    bool sized = true;
  };

  // A declaration such as ".shared .align 16 .b8 name[40]", also of a parameter.
  Variable variable() {
    Variable found;
    uint32_t element = 0, count = 1;
    for (skip_space(); text_[at_] == '.'; skip_space()) {
      std::string const part = word();
      if (part == ".align")
        found.alignment = uint32_t(number(word()));
      else if (size_of(part))
        element = size_of(part);
      else if (part == ".shared" || part == ".global" || part == ".local" || part == ".const")
        found.space = part;
    }
    found.name = word();
    if (take('[')) {
      found.sized = !take(']');
      if (found.sized) {
        count = uint32_t(number(word()));
        expect(']');
      }
    }
    found.alignment = std::max(found.alignment, element);
    found.bytes = count * element;
    return found;
  }

  // `kernel` is null outside of kernels.
  void declare(std::unordered_map<std::string, Operand>& names, Kernel* kernel) {
    Variable const declared = variable();
    std::string const initial = until_semicolon();
    Operand symbol;
    if (declared.space == ".global" || declared.space == ".const") {
      if (initial.find('=') != std::string::npos) fail("a variable with a value: " + declared.name);
      symbol.value = add_global(declared);
    } else if (declared.space == ".shared" && declared.sized && kernel) {
      kernel->static_shared = align_up(kernel->static_shared, declared.alignment);
      symbol.value = kSharedBase + kernel->static_shared;
      kernel->static_shared += declared.bytes;
    } else if (declared.space == ".shared" && !declared.sized) {
      symbol.dynamic = true;
    } else if (declared.space == ".local" && kernel) {
      if (kernel->local) fail("two variables in local memory");
      kernel->local = declared.bytes;
      symbol.kind = Operand::kRegister;
      symbol.slot = kLocalBase;
    } else {
      fail("variable " + declared.name + " in " + declared.space);
    }
    names[declared.name] = symbol;
  }

  uint64_t add_global(Variable const& declared) {
    Global global{std::make_unique<uint8_t[]>(declared.bytes + declared.alignment), nullptr, declared.bytes,
                  declared.space == ".global"};
    auto const address = reinterpret_cast<uint64_t>(global.memory.get());
    uint64_t const aligned = (address + declared.alignment - 1) / declared.alignment * declared.alignment;
    global.start = reinterpret_cast<uint8_t*>(aligned);
    module_->globals.push_back(std::move(global));
    return aligned;
  }

  void entry() {
    auto kernel = std::make_unique<Kernel>();
    kernel->name = word();
    kernel->module = module_.get();
    scopes_.assign(1, Scope{globals_, {}, -1});
    scope_ = 0;
    jumps_.clear();
    parameters(*kernel);
    while (!take('{')) performance_directive(*kernel);
    body(*kernel);
    for (Jump const& jump : jumps_) kernel->code[jump.instruction].target = label(jump);
    // Dynamic shared memory follows static shared memory; its size is known at launch.
    uint32_t const dynamic = kSharedBase + align_up(kernel->static_shared, 128);
    for (Instruction& instruction : kernel->code)
      for (Operand& operand : instruction.operands) settle(operand, dynamic);
    if (kernel->static_shared) kernel->static_shared = dynamic - kSharedBase;
    module_->kernels.push_back(std::move(kernel));
  }

  // Directives such as ".maxntid 256, 1, 1".
  void performance_directive(Kernel& kernel) {
    std::string const name = word();
    if (name != ".maxntid" && name != ".minnctapersm" && name != ".maxnreg") fail("directive " + name);
    uint64_t product = 1;
    do product *= number(word());
    while (take(','));
    if (name == ".maxntid") kernel.most_threads = product;
  }

  static void settle(Operand& operand, uint32_t dynamic) {
    if (operand.dynamic) operand.value += dynamic;
    for (Operand& part : operand.parts) settle(part, dynamic);
  }

  void parameters(Kernel& kernel) {
    struct Parameter {
      std::string name;
      uint32_t offset;
    };
    std::vector<Parameter> found;
    if (take('(') && !take(')')) {
      do {
        Variable const declared = variable();
        uint32_t const offset = align_up(kernel.parameter_bytes, declared.alignment);
        kernel.parameters.emplace_back(offset, declared.bytes);
        kernel.parameter_bytes = offset + declared.bytes;
        found.push_back({declared.name, offset});
      } while (take(','));
      expect(')');
    }
    kernel.parameter_memory.reset(new uint8_t[kernel.parameter_bytes + 128]);
    auto const address = reinterpret_cast<uint64_t>(kernel.parameter_memory.get());
    kernel.parameter_base = reinterpret_cast<uint8_t*>((address + 127) / 128 * 128);
    for (Parameter const& parameter : found) {
      Operand symbol;
      symbol.value = reinterpret_cast<uint64_t>(kernel.parameter_base) + parameter.offset;
      scopes_[0].names[parameter.name] = symbol;
    }
  }

  void body(Kernel& kernel) {
    for (int depth = 1; depth;) {
      skip_space();
      if (at_ >= text_.size()) fail("a kernel without an end");
      if (take('{')) {
        scopes_.push_back({{}, {}, scope_});
        scope_ = int(scopes_.size()) - 1;
        ++depth;
      } else if (take('}')) {
        scope_ = scopes_[scope_].parent;
        --depth;
      } else if (!take(';')) {
        statement(kernel);
      }
    }
    Instruction end;
    end.name = {"ret"};
    end.text = "ret";
    kernel.code.push_back(end);
  }

  void directive(Kernel& kernel) {
    size_t const start = at_;
    std::string const name = word();
    if (name == ".reg") {
      registers(kernel);
    } else if (name == ".shared" || name == ".local") {
      at_ = start;
      declare(scopes_[scope_].names, &kernel);
    } else if (name == ".loc") {
      skip_line();
    } else if (name == ".pragma") {
      until_semicolon();
    } else {
      fail("directive " + name);
    }
  }

  void statement(Kernel& kernel) {
    if (text_[at_] == '.') return directive(kernel);
    size_t const start = at_;
    int const at_line = line();
    Instruction instruction;
    instruction.line = at_line;
    if (take('@')) {
      instruction.predicate_negated = take('!');
      instruction.predicate = operand_named(word()).slot;
    }
    std::string const name = word();
    if (name.empty()) fail("not understood: " + text_.substr(at_, 40));
    if (take(':')) {
      scopes_[scope_].labels[name] = int(kernel.code.size());
      return;
    }
    for (size_t from = 0, dot; from <= name.size(); from = dot + 1) {
      dot = std::min(name.find('.', from), name.size());
      instruction.name.push_back(name.substr(from, dot - from));
    }
    if (instruction.name[0] == "bra") {
      jumps_.push_back({int(kernel.code.size()), word(), scope_});
    } else if (instruction.name[0] == "call") {  // operands are skipped: it fails when it is reached
      at_ = text_.find(';', at_);
    } else {
      skip_space();
      for (bool more = text_[at_] != ';'; more; more = take(',')) instruction.operands.push_back(operand());
    }
    instruction.text = text_.substr(start, at_ - start);
    expect(';');
    kernel.code.push_back(std::move(instruction));
  }

  void registers(Kernel& kernel) {
    // Types are in the instructions; only 128-bit registers need more than one slot.
    int const slots = word() == ".b128" ? 2 : 1;
    do {
      std::string const name = word();
      if (take('<')) {
        int const count = int(number(word()));
        expect('>');
        for (int i = 0; i < count; ++i) add_register(kernel, name + std::to_string(i), slots);
      } else {
        add_register(kernel, name, slots);
      }
    } while (take(','));
    expect(';');
  }

  void add_register(Kernel& kernel, std::string const& name, int slots) {
    Operand operand;
    operand.kind = Operand::kRegister;
    operand.slot = kernel.registers;
    kernel.registers += slots;
    scopes_[scope_].names[name] = operand;
  }

  Operand operand_named(std::string const& name) const {
    for (int scope = scope_; scope >= 0; scope = scopes_[scope].parent) {
      auto const found = scopes_[scope].names.find(name);
      if (found != scopes_[scope].names.end()) return found->second;
    }
    auto const special = special_names().find(name);
    if (special == special_names().end()) fail("unknown name " + name);
    Operand operand;
    operand.kind = Operand::kRegister;
    operand.slot = special->second;
    return operand;
  }

  int label(Jump const& jump) const {
    for (int scope = jump.scope; scope >= 0; scope = scopes_[scope].parent) {
      auto const found = scopes_[scope].labels.find(jump.label);
      if (found != scopes_[scope].labels.end()) return found->second;
    }
    fail("no label " + jump.label);
  }

  // A register, number or symbol, plus an offset.
  Operand atom() {
    Operand operand;
    bool const minus = take('-');
    skip_space();
    if (std::isdigit(static_cast<unsigned char>(text_[at_]))) {
      operand.value = number(word());
      if (minus) operand.value = -operand.value;
    } else {
      std::string const name = word();
      if (name == "_")
        operand.kind = Operand::kSink;
      else
        operand = operand_named(name);
    }
    if (take('+')) {
      bool const back = take('-');
      uint64_t const offset = number(word());
      operand.value += back ? -offset : offset;
    }
    return operand;
  }

  Operand operand() {
    Operand result;
    if (take('[')) {
      result = atom();
      result.slot = result.kind == Operand::kRegister ? result.slot : -1;
      result.kind = Operand::kAddress;
      while (take(',')) result.parts.push_back(operand());
      expect(']');
      return result;
    }
    if (take('{')) {
      result.kind = Operand::kVector;
      do result.parts.push_back(operand());
      while (take(','));
      expect('}');
      return result;
    }
    bool const negated = take('!');
    result = atom();
    result.negated = negated;
    if (take('|')) {
      Operand pair;
      pair.kind = Operand::kPair;
      pair.parts = {result, atom()};
      return pair;
    }
    return result;
  }

  std::string text_;
  size_t at_ = 0;
  mutable size_t counted_ = 0;
  mutable int lines_ = 0;
  std::unique_ptr<Module> module_ = std::make_unique<Module>();
  std::unordered_map<std::string, Operand> globals_;
  std::vector<Scope> scopes_;
  int scope_ = 0;
  std::vector<Jump> jumps_;
};

}  // namespace

std::unique_ptr<Module> parse(std::string_view text) { return Parser(text).module(); }

}  // namespace emulator

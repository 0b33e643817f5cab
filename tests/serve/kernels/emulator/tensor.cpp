// What a warp does together: shuffles, matrices between shared memory and registers, tensor cores; and TMA.
//
// The fragments are those of the PTX manual (sections on mma.sp, wgmma.mma_async.sp), written down
// without a look at how CUTLASS describes them.
#include <algorithm>

#include "machine.h"
#include "matrices.h"
#include "tensor_map.h"

namespace emulator {
namespace {

bool in(uint32_t lanes, uint32_t lane) { return lanes >> lane & 1; }

enum Shuffle { kUp, kDown, kButterfly, kIndex };

void shuffle(Warp& warp, uint32_t lanes, Instruction const& i) {
  std::array<uint32_t, 32> values{}, results{};
  std::array<bool, 32> inside{};
  for (Thread& t : warp.threads) values[t.lane] = get<uint32_t>(t, i.operands[1]);
  for (Thread& t : warp.threads) {
    if (!in(lanes, t.lane)) continue;
    uint32_t const b = get<uint32_t>(t, i.operands[2]) & 31, c = get<uint32_t>(t, i.operands[3]);
    int const segment = c >> 8 & 31, clamp = c & 31, lane = int(t.lane);
    int const last = (lane & segment) | (clamp & ~segment);
    int from = lane;
    switch (i.numbers[0]) {
      case kUp: from = lane - int(b); inside[lane] = from >= last; break;
      case kDown: from = lane + int(b); inside[lane] = from <= last; break;
      case kButterfly: from = lane ^ int(b); inside[lane] = from <= last; break;
      case kIndex: from = (lane & segment) | (int(b) & ~segment); inside[lane] = from <= last; break;
    }
    if (!inside[lane]) from = lane;
    if (!in(lanes, uint32_t(from))) throw Error("a shuffle from a lane that takes no part");
    results[lane] = values[from];
  }
  for (Thread& t : warp.threads) {
    if (!in(lanes, t.lane)) continue;
    Operand const& to = i.operands[0];
    put<uint32_t>(t, to.kind == Operand::kPair ? to.parts[0] : to, results[t.lane]);
    if (to.kind == Operand::kPair) put<bool>(t, to.parts[1], inside[t.lane]);
  }
}

void elect(Warp& warp, uint32_t lanes, Instruction const& i) {
  uint32_t const leader = uint32_t(__builtin_ctz(lanes));
  for (Thread& t : warp.threads) {
    if (!in(lanes, t.lane)) continue;
    put<uint32_t>(t, i.operands[0].parts[0], leader);
    put<bool>(t, i.operands[0].parts[1], t.lane == leader);
  }
}

void vote(Warp& warp, uint32_t lanes, Instruction const& i) {
  uint32_t yes = 0;
  for (Thread& t : warp.threads)
    if (in(lanes, t.lane) && get<bool>(t, i.operands[1])) yes |= 1u << t.lane;
  for (Thread& t : warp.threads) {
    if (!in(lanes, t.lane)) continue;
    if (i.has("ballot")) put<uint32_t>(t, i.operands[0], yes);
    else put<bool>(t, i.operands[0], i.has("all") ? yes == lanes : i.has("any") ? yes != 0 : yes == 0 || yes == lanes);
  }
}

void nothing(Warp&, uint32_t, Instruction const&) {}

// numbers: how many 8 x 8 matrices of 16 bits, whether each is transposed. Lanes 8k to 8k + 7 hold the addresses of
// matrix k's rows; a lane's register holds elements 2 * (lane % 4) and the next of row lane / 4.
template <bool kLoad>
void matrices(Warp& warp, uint32_t lanes, Instruction const& i) {
  need_all(lanes);
  Operand const &registers = i.operands[kLoad ? 0 : 1], &address = i.operands[kLoad ? 1 : 0];
  for (int matrix = 0; matrix < i.numbers[0]; ++matrix) {
    std::array<uint16_t*, 8> rows;
    for (int row = 0; row < 8; ++row) {
      Thread& t = warp.threads[matrix * 8 + row];
      rows[row] = reinterpret_cast<uint16_t*>(memory(t, Space::kShared, uint32_t(address_of(t, address)), 16, 16, !kLoad));
    }
    for (Thread& t : warp.threads) {
      Operand const& own = registers.kind == Operand::kVector ? registers.parts[matrix] : registers;
      int const first = t.lane / 4, second = t.lane % 4 * 2;
      uint16_t* const low = i.numbers[1] ? rows[second] + first : rows[first] + second;
      uint16_t* const high = i.numbers[1] ? rows[second + 1] + first : rows[first] + second + 1;
      if constexpr (kLoad) {
        put<uint32_t>(t, own, uint32_t(*high) << 16 | *low);
      } else {
        uint32_t const value = get<uint32_t>(t, own);
        *low = uint16_t(value);
        *high = uint16_t(value >> 16);
      }
    }
  }
  ++warp.block->cluster->grid->progress;
}

// mma.sp.m16n8k32 of 16-bit values with fp32 sums. With g = lane / 4 and t = lane % 4, two values a register:
// A (the kept values, 16 x 16): rows g and g + 8 in turn, columns 2t, then 8 + 2t. B (32 x 8): rows 2t, 8 + 2t, and so
// on, column g. C: row g, then g + 8, columns 2t. Metadata: lane 4g + 2 * selector holds columns 0 to 15 of row g (low
// half) and row g + 8, the next lane columns 16 to 31.
void mma_sparse(Warp& warp, uint32_t lanes, Instruction const& i) {
  need_all(lanes);
  ++warp.block->products;
  ToFloat const value = float_of(i.numbers[0]);
  float a[16][16], b[32][8];
  uint32_t metadata[16][2];
  auto const half = [](uint32_t both, int which) { return uint16_t(both >> 16 * which); };
  uint32_t const selector = get<uint32_t>(warp.threads[0], i.operands[5]);
  if (selector > 1) throw Error("a selector of 0 or 1");
  for (Thread& thread : warp.threads) {
    int const g = thread.lane / 4, t = thread.lane % 4;
    for (int k = 0; k < 4; ++k) {
      uint32_t const of_a = get<uint32_t>(thread, i.operands[1].parts[k]), of_b = get<uint32_t>(thread, i.operands[2].parts[k]);
      for (int side = 0; side < 2; ++side) {
        a[g + k % 2 * 8][k / 2 * 8 + 2 * t + side] = value(half(of_a, side));
        b[8 * k + 2 * t + side][g] = value(half(of_b, side));
      }
    }
    if (uint32_t(t) / 2 != selector) continue;
    uint32_t const bits = get<uint32_t>(thread, i.operands[4]);
    metadata[g][t % 2] = half(bits, 0);
    metadata[g + 8][t % 2] = half(bits, 1);
  }
  for (Thread& thread : warp.threads)
    for (int k = 0; k < 4; ++k) {
      int const row = thread.lane / 4 + k / 2 * 8, column = thread.lane % 4 * 2 + k % 2;
      double sum = 0;
      for (int group = 0; group < 8; ++group) {
        Kept const at = kept(metadata[row][group / 4], group % 4);
        sum += at.start + double(a[row][2 * group]) * b[4 * group + at.first][column];
        sum += double(a[row][2 * group + 1]) * b[4 * group + at.second][column];
      }
      put<float>(thread, i.operands[0].parts[k], float(sum + get<float>(thread, i.operands[3].parts[k])));
    }
}

// numbers: columns N, whether bf16, bytes of a value.
//
// wgmma.mma_async.sp of m64nNk32 (16-bit values) or m64nNk64 (e4m3): 16 rows of it for each warp of the four. A lane's
// sums: row lane / 4, then that + 8, columns 2 * (lane % 4) and the next of each eight. Metadata of 16 bits as in
// mma.sp; of 8 bits every lane has eight groups: rows r and r + 8 of columns 0 to 31, then the same of 32 to 63.
void warpgroup_product(Warp& warp, uint32_t lanes, Instruction const& i) {
  need_all(lanes);
  ++warp.block->products;
  Thread& first = warp.threads[0];
  bool const bytes = i.numbers[2] == 1;
  uint32_t const n = uint32_t(i.numbers[0]), k = bytes ? 64 : 32;
  SharedMatrix const a = SharedMatrix::of_wgmma(get<uint64_t>(first, i.operands[1]));
  SharedMatrix const b = SharedMatrix::of_wgmma(get<uint64_t>(first, i.operands[2]));
  uint32_t const selector = get<uint32_t>(first, i.operands[4]);
  if (selector > (bytes ? 0 : 1)) throw Error("no such selector");
  if (get<int32_t>(first, i.operands[6]) != 1 || get<int32_t>(first, i.operands[7]) != 1) throw Error("a negated operand");
  for (size_t transposed = 8; transposed < i.operands.size(); ++transposed)
    if (get<int32_t>(first, i.operands[transposed])) throw Error("a transposed operand");
  bool const adds = get<bool>(first, i.operands[5]);
  std::array<uint32_t, 32> metadata;
  for (Thread& t : warp.threads) metadata[t.lane] = get<uint32_t>(t, i.operands[3]);

  warp.products.back().push_back([=, &warp, &i] {
    std::vector<float> const values = read_matrix(*warp.block, a, warp.index % 4 * 16, 16, k / 2, i.numbers[2], i.numbers[1]);
    std::vector<float> const x = read_matrix(*warp.block, b, 0, n, k, i.numbers[2], i.numbers[1]);
    for (uint32_t row = 0; row < 16; ++row) {
      std::vector<Kept> at;
      for (uint32_t group = 0; group < k / 4; ++group) {
        uint32_t const lane = row % 8 * 4;
        at.push_back(bytes ? kept(metadata[lane + row / 8 + group / 8 * 2], group % 8)
                           : kept(metadata[lane + selector * 2 + group / 4] >> row / 8 * 16, group % 4));
      }
      for (uint32_t column = 0; column < n; ++column) {
        double sum = 0;
        for (uint32_t group = 0; group < k / 4; ++group) {
          float const* const inputs = &x[column * k + 4 * group];
          sum += at[group].start + double(values[row * (k / 2) + 2 * group]) * inputs[at[group].first];
          sum += double(values[row * (k / 2) + 2 * group + 1]) * inputs[at[group].second];
        }
        Thread& owner = warp.threads[row % 8 * 4 + column % 8 / 2];
        Operand const& to = i.operands[0].parts[column / 8 * 4 + row / 8 * 2 + column % 2];
        put<float>(owner, to, float(adds ? sum + get<float>(owner, to) : sum));
      }
    }
  });
}

void products_commit(Warp& warp, uint32_t, Instruction const&) {
  commit(warp.products);
  ++warp.products_committed;
}

// The four warps' products are one: they are done once all four have asked for them, and then for all four, whichever
// waits. (CUTLASS lets one warp's thread hand the operands' memory back for the whole warpgroup.)
void products_wait(Warp& warp, uint32_t, Instruction const& i) {
  uint64_t const left = get<uint32_t>(warp.threads[0], i.operands[0]);
  if (warp.products_committed < left) return;
  uint64_t const until = warp.products_committed - left;
  uint32_t const first = warp.index / 4 * 4;
  if (first + 4 > warp.block->warps.size()) throw Error("a warpgroup of less than four warps");
  for (uint32_t k = first; k < first + 4; ++k)
    if (warp.block->warps[k].products_committed < until) {
      for (Thread& t : warp.threads) {  // tries again later
        --t.pc;
        t.yields = true;
      }
      return;
    }
  for (uint32_t k = first; k < first + 4; ++k) {
    Warp& each = warp.block->warps[k];
    finish(each.products, each.products_committed - until);
  }
}

// A box of a tensor and where it lies in shared memory.
struct Box {
  TensorMap map;
  std::array<int32_t, 5> corner{};

  Box(Thread& t, Operand const& operand) {
    std::memcpy(&map, memory(t, Space::kGeneric, address_of(t, operand), sizeof map, 64, false), sizeof map);
    if (map.magic != TensorMap::kMagic) throw Error("no tensor map at this address");
    Operand const& corners = operand.parts.at(0);
    if (corners.parts.size() != map.rank) throw Error("another number of dimensions than the tensor map's");
    for (uint32_t d = 0; d < map.rank; ++d) corner[d] = get<int32_t>(t, corners.parts[d]);
  }

  uint32_t bytes() const {
    uint32_t count = map.element_bytes;
    for (uint32_t d = 0; d < map.rank; ++d) count *= map.box[d];
    return count;
  }

  // Calls use(offset in shared memory, address, inside?) for each 16 bytes' worth of elements or less.
  template <class Use>
  void each_element(Use use) const {
    uint32_t const count = bytes() / map.element_bytes;
    for (uint32_t element = 0; element < count; ++element) {
      uint64_t address = map.address;
      bool inside = true;
      uint32_t rest = element;
      for (uint32_t d = 0; d < map.rank; ++d) {
        int64_t const at = int64_t(corner[d]) + rest % map.box[d];
        rest /= map.box[d];
        inside &= at >= 0 && at < int64_t(map.sizes[d]);
        address += at * int64_t(d ? map.strides[d - 1] : map.element_bytes);
      }
      use(element * map.element_bytes, address, inside);
    }
  }
};

// Elements outside of the tensor read as zeros and count as bytes all the same.
void tensor_load(Thread& t, Instruction const& i) {
  Box const box(t, i.operands[1]);
  uint32_t const to = uint32_t(address_of(t, i.operands[0])), barrier = uint32_t(address_of(t, i.operands[2]));
  if (to % 128) throw Error("TMA writes to multiples of 128 bytes");
  std::vector<Block*> blocks{&t.block()};
  if (i.has("multicast::cluster")) {
    uint32_t const mask = get<uint16_t>(t, i.operands[3]);
    if (to >> 24 || barrier >> 24) throw Error("a multicast from another block's address");
    blocks.clear();
    for (uint32_t rank = 0; rank < 16; ++rank)
      if (mask >> rank & 1) {
        if (rank >= t.block().cluster->blocks.size()) throw Error("a multicast to a block that the cluster does not have");
        blocks.push_back(&t.block().cluster->blocks[rank]);
      }
  }
  Grid& grid = *t.block().cluster->grid;
  for (Block* block : blocks)
    grid.pending.push_back([=, &grid] {
      box.each_element([&](uint32_t offset, uint64_t address, bool inside) {
        uint32_t const size = box.map.element_bytes;
        uint8_t* const place = block->shared_at(swizzled(to + offset, box.map.swizzle_bytes), size);
        if (inside) std::memcpy(place, global_memory().at(address, size, false), size);
        else std::memset(place, 0, size);
      });
      mbarrier_complete(grid, block->shared_at(barrier, 8), box.bytes());
    });
}

void tensor_store(Thread& t, Instruction const& i) {
  Box const box(t, i.operands[0]);
  uint32_t const from = uint32_t(address_of(t, i.operands[1]));
  if (from % 128) throw Error("TMA reads from multiples of 128 bytes");
  Block& block = t.block();
  t.stores.back().push_back([=, &block] {
    box.each_element([&](uint32_t offset, uint64_t address, bool inside) {
      uint32_t const size = box.map.element_bytes;
      uint8_t const* const place = block.shared_at(swizzled(from + offset, box.map.swizzle_bytes), size);
      if (inside) std::memcpy(global_memory().at(address, size, true), place, size);
    });
  });
}

int number_after(std::string const& text, char letter) {
  size_t const at = text.find(letter);
  return at == std::string::npos ? 0 : std::atoi(text.c_str() + at + 1);
}

}  // namespace

bool decode_tensor(Instruction& i) {
  std::string const& op = i.name[0];
  if (op == "shfl") {
    i.numbers[0] = i.has("up") ? kUp : i.has("down") ? kDown : i.has("bfly") ? kButterfly : kIndex;
    i.collective = &shuffle;
    i.mask_operand = 4;
  } else if (op == "elect") {
    i.collective = &elect;
    i.mask_operand = 1;
  } else if (op == "vote") {
    i.collective = &vote;
    i.mask_operand = 2;
  } else if (op == "bar" && i.has("warp")) {
    i.collective = &nothing;
    i.mask_operand = 0;
  } else if ((op == "ldmatrix" || op == "stmatrix") && i.has("m8n8") && i.has("b16")) {
    i.numbers = {i.has("x1") ? 1 : i.has("x2") ? 2 : 4, i.has("trans")};
    i.collective = op == "ldmatrix" ? &matrices<true> : &matrices<false>;
  } else if (op == "mma" && i.has("m16n8k32") && (i.has("sp") || i.has("sp::ordered_metadata")) &&
             (i.has("bf16") || i.has("f16")) && i.name.back() == "f32") {
    i.numbers[0] = i.has("bf16");
    i.collective = &mma_sparse;
  } else if (op == "wgmma" && i.has("mma_async") && i.has("sp") && i.has("f32") &&
             (i.has("bf16") || i.has("f16") || i.has("e4m3"))) {
    bool const bytes = i.has("e4m3");
    for (std::string const& part : i.name)
      if (part.starts_with("m64n")) {
        i.numbers = {number_after(part, 'n'), i.has("bf16"), bytes ? 1 : 2};
        if (number_after(part, 'k') != (bytes ? 64 : 32)) return false;
      }
    i.collective = &warpgroup_product;
  } else if (op == "wgmma" && i.has("fence")) {
    i.collective = &nothing;
  } else if (op == "wgmma" && i.has("commit_group")) {
    i.collective = &products_commit;
  } else if (op == "wgmma" && i.has("wait_group")) {
    i.collective = &products_wait;
  } else if (op == "cp" && i.has("bulk") && i.has("tensor") && !i.has("im2col") && !i.has("gather4")) {
    if (i.has("shared::cta") && i.has("bulk_group")) i.scalar = &tensor_store;
    else if (i.has("mbarrier::complete_tx::bytes")) i.scalar = &tensor_load;
  }
  return i.scalar || i.collective;
}

}  // namespace emulator

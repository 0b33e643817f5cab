// Instructions of a whole warp: shuffles, matrices between shared memory and registers, tensor cores; and TMA.
//
// The fragments follow the PTX manual (sections on mma.sp and wgmma.mma_async.sp), independently of CUTLASS.
#include <algorithm>
#include <limits>

#include "machine.h"
#include "matrices.h"
#include "tensor_map.h"

namespace emulator {
namespace {

bool in(uint32_t lanes, uint32_t lane) { return lanes >> lane & 1; }

enum Shuffle { kUp, kDown, kButterfly, kIndex };

// The lane that `lane` reads from, and whether it is within the segment.
template <Shuffle kShuffle>
std::pair<int, bool> source_of(int lane, uint32_t b, uint32_t c) {
  int const segment = c >> 8 & 31, clamp = c & 31, by = int(b & 31);
  int const last = (lane & segment) | (clamp & ~segment);
  int from = 0;
  switch (kShuffle) {
    case kUp: from = lane - by; return {from, from >= last};
    case kDown: from = lane + by; break;
    case kButterfly: from = lane ^ by; break;
    case kIndex: from = (lane & segment) | (by & ~segment); break;
  }
  return {from, from <= last};
}

template <Shuffle kShuffle>
void shuffle(Warp& warp, uint32_t lanes, Instruction const& i) {
  std::array<uint32_t, 32> values{}, results{};
  std::array<bool, 32> inside{};
  for (Thread& t : warp.threads) values[t.lane] = get<uint32_t>(t, i.operands[1]);
  for (Thread& t : warp.threads) {
    if (!in(lanes, t.lane)) continue;
    auto const [from, reached] =
        source_of<kShuffle>(int(t.lane), get<uint32_t>(t, i.operands[2]), get<uint32_t>(t, i.operands[3]));
    uint32_t const source = reached ? uint32_t(from) : t.lane;
    if (!in(lanes, source)) throw Error("a shuffle from a lane that does not take part");
    results[t.lane] = values[source];
    inside[t.lane] = reached;
  }
  for (Thread& t : warp.threads) {
    if (!in(lanes, t.lane)) continue;
    Operand const& to = i.operands[0];
    put<uint32_t>(t, to.kind == Operand::kPair ? to.parts[0] : to, results[t.lane]);
    if (to.kind == Operand::kPair) put<bool>(t, to.parts[1], inside[t.lane]);
  }
}

void elect(Warp& warp, uint32_t lanes, Instruction const& i) {
  Operand const& to = i.operands[0];
  if (to.kind != Operand::kPair) throw Error("elect.sync without two results");
  uint32_t const leader = uint32_t(__builtin_ctz(lanes));
  for (Thread& t : warp.threads) {
    if (!in(lanes, t.lane)) continue;
    put<uint32_t>(t, to.parts[0], leader);
    put<bool>(t, to.parts[1], t.lane == leader);
  }
}

enum Vote { kBallot, kAll, kAny, kUniform };

template <Vote kVote>
void vote(Warp& warp, uint32_t lanes, Instruction const& i) {
  uint32_t yes = 0;
  for (Thread& t : warp.threads)
    if (in(lanes, t.lane) && get<bool>(t, i.operands[1])) yes |= 1u << t.lane;
  bool const all = yes == lanes, any = yes != 0;
  for (Thread& t : warp.threads) {
    if (!in(lanes, t.lane)) continue;
    if (kVote == kBallot)
      put<uint32_t>(t, i.operands[0], yes);
    else
      put<bool>(t, i.operands[0], kVote == kAll ? all : kVote == kAny ? any : all || !any);
  }
}

// 8 x 8 matrices of 16-bit elements. Lanes 8k to 8k + 7 hold the addresses of matrix k's rows. A lane's register holds
// elements 2 * (lane % 4) and the next of row lane / 4, or of that column if the matrix is transposed.
template <bool kLoad>
void matrices(Warp& warp, uint32_t lanes, Instruction const& i) {
  need_all(lanes);
  Operand const &registers = i.operands[kLoad ? 0 : 1], &address = i.operands[kLoad ? 1 : 0];
  for (int matrix = 0; matrix < i.count; ++matrix) {
    std::array<uint16_t*, 8> rows;
    for (int row = 0; row < 8; ++row) {
      Thread& t = warp.threads[matrix * 8 + row];
      uint8_t* const place = memory(t, Space::kShared, uint32_t(address_of(t, address)), 16, 16, !kLoad);
      rows[row] = reinterpret_cast<uint16_t*>(place);
    }
    for (Thread& t : warp.threads) {
      Operand const& own = registers.kind == Operand::kVector ? registers.parts[matrix] : registers;
      int const first = t.lane / 4, second = t.lane % 4 * 2;
      uint16_t* const low = i.transposed ? rows[second] + first : rows[first] + second;
      uint16_t* const high = i.transposed ? rows[second + 1] + first : rows[first] + second + 1;
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

template <bool kLoad>
void matrix_access(Instruction& i) {
  i.count = i.has("x1") ? 1 : i.has("x2") ? 2 : i.has("x4") ? 4 : 0;
  i.transposed = i.has("trans");
  Operand const& registers = i.operands[kLoad ? 0 : 1];
  bool const fits = registers.is_vector(i.count) || (i.count == 1 && registers.kind == Operand::kRegister);
  if (i.count && fits && i.has("m8n8") && i.name.back() == "b16") i.collective = &matrices<kLoad>;
}

// mma.sp.m16n8k32 of 16-bit values with fp32 sums. Let g = lane / 4 and t = lane % 4; a register has two values.
// A (the kept values, 16 x 16): rows g and g + 8 alternately, columns 2t, then 8 + 2t. B (32 x 8): rows 2t, 8 + 2t, and
// so on, column g. C: row g, then g + 8, columns 2t. Metadata: lane 4g + 2 * selector holds columns 0 to 15 of row g
// (low half) and row g + 8; the next lane holds columns 16 to 31.
void mma_sparse(Warp& warp, uint32_t lanes, Instruction const& i) {
  need_all(lanes);
  ++warp.block->products;
  ToFloat const value = float_of(i.bfloat16);
  float a[16][16], b[8][32];  // rows of A, columns of B
  uint32_t metadata[16][2];
  auto const half = [](uint32_t both, int which) { return uint16_t(both >> 16 * which); };
  uint32_t const selector = get<uint32_t>(warp.threads[0], i.operands[5]);
  if (selector > 1) throw Error("the selector must be 0 or 1");
  for (Thread& thread : warp.threads) {
    int const g = thread.lane / 4, t = thread.lane % 4;
    for (int k = 0; k < 4; ++k) {
      uint32_t const of_a = get<uint32_t>(thread, i.operands[1].parts[k]);
      uint32_t const of_b = get<uint32_t>(thread, i.operands[2].parts[k]);
      for (int side = 0; side < 2; ++side) {
        a[g + k % 2 * 8][k / 2 * 8 + 2 * t + side] = value(half(of_a, side));
        b[g][8 * k + 2 * t + side] = value(half(of_b, side));
      }
    }
    if (uint32_t(t) / 2 != selector) continue;
    uint32_t const bits = get<uint32_t>(thread, i.operands[4]);
    metadata[g][t % 2] = half(bits, 0);
    metadata[g + 8][t % 2] = half(bits, 1);
  }
  std::array<std::array<Kept, 8>, 16> groups;
  for (int row = 0; row < 16; ++row)
    for (int group = 0; group < 8; ++group) groups[row][group] = kept(metadata[row][group / 4], group % 4);
  for (Thread& thread : warp.threads)
    for (int k = 0; k < 4; ++k) {
      int const row = thread.lane / 4 + k / 2 * 8, column = thread.lane % 4 * 2 + k % 2;
      double const sum = sparse_dot(a[row], groups[row], b[column]);
      put<float>(thread, i.operands[0].parts[k], float(sum + get<float>(thread, i.operands[3].parts[k])));
    }
}

// mma.sp.m16n8k64 of s8 with s32 sums: as above, but a register has four values, and each lane the metadata of eight
// groups. Of the lanes 4g to 4g + 3, the first two hold columns 0 to 31 of rows g and g + 8, the others 32 to 63.
// Integers have no NaN: a sum that metadata leaves undefined is the smallest integer, and stays it.
void mma_sparse_int8(Warp& warp, uint32_t lanes, Instruction const& i) {
  need_all(lanes);
  ++warp.block->products;
  constexpr int64_t kUndefined = std::numeric_limits<int32_t>::min(), kMost = std::numeric_limits<int32_t>::max();
  float a[16][32], b[8][64];  // rows of A, columns of B
  std::array<std::array<Kept, 16>, 16> groups;
  if (get<uint32_t>(warp.threads[0], i.operands[5]) != 0) throw Error("the selector must be 0");
  for (Thread& thread : warp.threads) {
    int const g = thread.lane / 4, t = thread.lane % 4;
    for (int k = 0; k < 4; ++k)
      for (int byte = 0; byte < 4; ++byte) {
        auto const value = [&](int operand) {
          return float(int8_t(get<uint32_t>(thread, i.operands[operand].parts[k]) >> 8 * byte));
        };
        a[g + k % 2 * 8][k / 2 * 16 + 4 * t + byte] = value(1);
        b[g][16 * k + 4 * t + byte] = value(2);
      }
    uint32_t const bits = get<uint32_t>(thread, i.operands[4]);
    for (int group = 0; group < 8; ++group) groups[g + t % 2 * 8][t / 2 * 8 + group] = kept(bits, group);
  }
  for (Thread& thread : warp.threads)
    for (int k = 0; k < 4; ++k) {
      int const row = thread.lane / 4 + k / 2 * 8, column = thread.lane % 4 * 2 + k % 2;
      double const product = sparse_dot(a[row], groups[row], b[column]);
      int64_t sum = get<int32_t>(thread, i.operands[3].parts[k]);
      if (sum != kUndefined) sum = std::isnan(product) ? kUndefined : std::clamp(sum + int64_t(product), -kMost, kMost);
      put<int32_t>(thread, i.operands[0].parts[k], int32_t(sum));
    }
}

// The last four parts of the name are the types of D, A, B and C.
void sparse_mma(Instruction& i) {
  size_t const size = i.name.size();
  std::string const &d = i.name[size - 4], &a = i.name[size - 3], &b = i.name[size - 2], &c = i.name[size - 1];
  i.bfloat16 = a == "bf16";
  bool fits = d == "f32" && c == "f32" && a == b && (i.bfloat16 || a == "f16");
  for (int operand = 0; operand < 4; ++operand) fits &= i.operands[operand].is_vector(4);
  if (fits) i.collective = &mma_sparse;
}

void sparse_mma_int8(Instruction& i) {
  bool fits = true;
  for (int operand = 0; operand < 4; ++operand) fits &= i.operands[operand].is_vector(4);
  if (fits) i.collective = &mma_sparse_int8;
}

// wgmma.mma_async.sp of m64nNk32 (16-bit values) or m64nNk64 (e4m3); each of the four warps has 16 of the rows. A
// lane's sums: row lane / 4, then 8 rows below, columns 2 * (lane % 4) and the next of each eight. Metadata for 16-bit
// values is as in mma.sp. For 8-bit values every lane has eight groups: rows r and r + 8 of columns 0 to 31, then of 32
// to 63.
void warpgroup_product(Warp& warp, uint32_t lanes, Instruction const& i) {
  need_all(lanes);
  ++warp.block->products;
  Thread& first = warp.threads[0];
  bool const bytes = i.bits == 8;
  uint32_t const n = uint32_t(i.count), k = bytes ? 64 : 32, size = uint32_t(i.bits / 8);
  SharedMatrix const a = SharedMatrix::of_wgmma(get<uint64_t>(first, i.operands[1]));
  SharedMatrix const b = SharedMatrix::of_wgmma(get<uint64_t>(first, i.operands[2]));
  uint32_t const selector = get<uint32_t>(first, i.operands[4]);
  if (selector > (bytes ? 0 : 1)) throw Error("no such selector");
  if (get<int32_t>(first, i.operands[6]) != 1 || get<int32_t>(first, i.operands[7]) != 1)
    throw Error("a negated operand");
  for (size_t transposed = 8; transposed < i.operands.size(); ++transposed)
    if (get<int32_t>(first, i.operands[transposed])) throw Error("a transposed operand");
  bool const adds = get<bool>(first, i.operands[5]);
  std::array<uint32_t, 32> metadata;
  for (Thread& t : warp.threads) metadata[t.lane] = get<uint32_t>(t, i.operands[3]);

  warp.products.add(i, [=, &warp, &i] {
    auto const values = read_matrix(*warp.block, a, warp.index % 4 * 16, 16, k / 2, size, i.bfloat16);
    auto const x = read_matrix(*warp.block, b, 0, n, k, size, i.bfloat16);
    for (uint32_t row = 0; row < 16; ++row) {
      std::vector<Kept> groups;
      for (uint32_t group = 0; group < k / 4; ++group) {
        uint32_t const lane = row % 8 * 4;
        groups.push_back(bytes ? kept(metadata[lane + row / 8 + group / 8 * 2], group % 8)
                               : kept(metadata[lane + selector * 2 + group / 4] >> row / 8 * 16, group % 4));
      }
      for (uint32_t column = 0; column < n; ++column) {
        double const sum = sparse_dot(&values[row * (k / 2)], groups, &x[column * k]);
        Thread& owner = warp.threads[row % 8 * 4 + column % 8 / 2];
        Operand const& to = i.operands[0].parts[column / 8 * 4 + row / 8 * 2 + column % 2];
        put<float>(owner, to, float(adds ? sum + get<float>(owner, to) : sum));
      }
    }
  });
}

// "wgmma.mma_async.sp.sync.aligned.m64n128k32.f32.bf16.bf16"
void sparse_wgmma(Instruction& i) {
  if (i.name.size() != 9) return;
  std::string const &shape = i.name[5], &d = i.name[6], &a = i.name[7], &b = i.name[8];
  i.bfloat16 = a == "bf16";
  i.bits = a == "e4m3" ? 8 : 16;
  if (d != "f32" || a != b || !(i.bfloat16 || a == "f16" || a == "e4m3")) return;
  i.count = std::atoi(shape.c_str() + 4);
  if (shape != "m64n" + std::to_string(i.count) + (i.bits == 8 ? "k64" : "k32")) return;
  if (i.operands[0].is_vector(i.count / 2)) i.collective = &warpgroup_product;
}

void products_commit(Warp& warp, uint32_t, Instruction const&) {
  warp.products.commit();
  ++warp.products_committed;
}

// The four warps' products are one instruction: it runs once all four have issued it, and then for all four, no matter
// which one waits. (In CUTLASS one warp's thread releases the operands' memory for the whole warpgroup.)
void products_wait(Warp& warp, uint32_t, Instruction const& i) {
  uint64_t const left = get<uint32_t>(warp.threads[0], i.operands[0]);
  if (warp.products_committed < left) return;
  uint64_t const until = warp.products_committed - left;
  uint32_t const first = warp.index / 4 * 4;
  if (first + 4 > warp.block->warps.size()) throw Error("a warpgroup of fewer than four warps");
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
    each.products.finish(each.products_committed - until);
  }
}

// The box of a tensor that a TMA copy transfers.
struct Box {
  TensorMap map;
  std::array<int32_t, 5> corner{};

  Box(Thread& t, Operand const& operand) {
    std::memcpy(&map, memory(t, Space::kGeneric, address_of(t, operand), sizeof map, 64, false), sizeof map);
    if (map.magic != TensorMap::kMagic) throw Error("there is no tensor map at this address");
    Operand const& corners = operand.parts.at(0);
    if (corners.parts.size() != map.rank) throw Error("the number of dimensions is not the tensor map's");
    for (uint32_t d = 0; d < map.rank; ++d) corner[d] = get<int32_t>(t, corners.parts[d]);
  }

  uint32_t bytes() const {
    uint32_t count = map.element_bytes;
    for (uint32_t d = 0; d < map.rank; ++d) count *= map.box[d];
    return count;
  }

  // Calls use(offset in shared memory, address, inside?) for each element.
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

// Elements outside of the tensor read as zeros, and their bytes count for the mbarrier.
void tensor_load(Thread& t, Instruction const& i) {
  Box const box(t, i.operands[1]);
  uint32_t const to = uint32_t(address_of(t, i.operands[0])), barrier = uint32_t(address_of(t, i.operands[2]));
  if (to % 128) throw Error("TMA writes only to multiples of 128 bytes");
  Cluster& cluster = *t.block().cluster;
  std::vector<Block*> blocks{&t.block()};
  if (i.has("multicast::cluster")) {
    uint32_t const mask = get<uint16_t>(t, i.operands[3]);
    if (to >> 24 || barrier >> 24) throw Error("a multicast from another block's address");
    blocks.clear();
    for (uint32_t rank = 0; rank < 16; ++rank)
      if (mask >> rank & 1) {
        if (rank >= cluster.blocks.size()) throw Error("a multicast to a block that is not in the cluster");
        blocks.push_back(&cluster.blocks[rank]);
      }
  }
  Grid& grid = *cluster.grid;
  for (Block* block : blocks)
    grid.defer(cluster, i, [=, &grid] {
      box.each_element([&](uint32_t offset, uint64_t address, bool inside) {
        uint32_t const size = box.map.element_bytes;
        uint8_t* const place = block->shared_at(swizzled(to + offset, box.map.swizzle_bytes), size);
        if (inside)
          std::memcpy(place, global_memory().at(address, size, false), size);
        else
          std::memset(place, 0, size);
      });
      mbarrier_complete(grid, block->shared_at(barrier, 8), box.bytes());
    });
}

void tensor_store(Thread& t, Instruction const& i) {
  Box const box(t, i.operands[0]);
  uint32_t const from = uint32_t(address_of(t, i.operands[1]));
  if (from % 128) throw Error("TMA reads only from multiples of 128 bytes");
  Block& block = t.block();
  t.stores.add(i, [=, &block] {
    box.each_element([&](uint32_t offset, uint64_t address, bool inside) {
      uint32_t const size = box.map.element_bytes;
      uint8_t const* const place = block.shared_at(swizzled(from + offset, box.map.swizzle_bytes), size);
      if (inside) std::memcpy(global_memory().at(address, size, true), place, size);
    });
  });
}

void tensor_copy(Instruction& i) {
  bool const is_store = i.has("bulk_group"), multicast = i.has("multicast::cluster"), hint = i.has("L2::cache_hint");
  size_t const operands = (is_store ? 2 : 3) + multicast + hint;
  if (is_store == i.has("mbarrier::complete_tx::bytes") || i.operands.size() != operands) return;
  i.scalar = is_store ? &tensor_store : &tensor_load;
}

constexpr Form kForms[] = {
    {"shfl.sync.up", "", 5, 5, together<shuffle<kUp>, 4>},
    {"shfl.sync.down", "", 5, 5, together<shuffle<kDown>, 4>},
    {"shfl.sync.bfly", "", 5, 5, together<shuffle<kButterfly>, 4>},
    {"shfl.sync.idx", "", 5, 5, together<shuffle<kIndex>, 4>},
    {"elect.sync", "", 2, 2, together<elect, 1>},
    {"vote.sync.ballot", "", 3, 3, together<vote<kBallot>, 2>},
    {"vote.sync.all", "", 3, 3, together<vote<kAll>, 2>},
    {"vote.sync.any", "", 3, 3, together<vote<kAny>, 2>},
    {"vote.sync.uni", "", 3, 3, together<vote<kUniform>, 2>},
    {"bar.warp.sync", "", 1, 1, together<nothing_together, 0>},
    {"ldmatrix.sync.aligned", "m8n8 x1 x2 x4 trans shared shared::cta", 2, 2, matrix_access<true>},
    {"stmatrix.sync.aligned", "m8n8 x1 x2 x4 trans shared shared::cta", 2, 2, matrix_access<false>},
    {"mma.sp.sync.aligned.m16n8k32.row.col", "", 6, 6, sparse_mma},
    {"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col", "", 6, 6, sparse_mma},
    {"mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32.satfinite", "", 6, 6, sparse_mma_int8},
    {"wgmma.mma_async.sp.sync.aligned", "m64n* e4m3", 8, 10, sparse_wgmma},
    {"wgmma.fence.sync.aligned", "", 0, 0, together<nothing_together>},
    {"wgmma.commit_group.sync.aligned", "", 0, 0, together<products_commit>},
    {"wgmma.wait_group.sync.aligned", "", 1, 1, together<products_wait>},
    {"cp.async.bulk.tensor",
     "1d 2d 3d 4d 5d tile global shared::cta shared::cluster mbarrier::complete_tx::bytes "
     "multicast::cluster bulk_group L2::cache_hint",
     2, 5, tensor_copy},
};

}  // namespace

std::span<Form const> tensor_forms() { return kForms; }

}  // namespace emulator

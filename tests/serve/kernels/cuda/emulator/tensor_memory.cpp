// tcgen05: tensor memory and the products that accumulate there; and cluster launch control, which is as new.
#include "machine.h"
#include "matrices.h"

namespace emulator {
namespace {

constexpr uint32_t kLanes = 128, kColumns = 512;

uint32_t& cell(Block& block, uint32_t lane, uint32_t column) {
  if (lane >= kLanes || column >= block.tensor_columns) throw Error("outside of the allocated tensor memory");
  return block.tensor_memory[lane * kColumns + column];
}

uint32_t lane_of(uint32_t address) { return address >> 16; }
uint32_t column_of(uint32_t address) { return address & 0xFFFF; }

// One allocation at a time, always from column 0.
void allocate(Warp& warp, uint32_t lanes, Instruction const& i) {
  need_all(lanes);
  Block& block = *warp.block;
  uint32_t const columns = get<uint32_t>(warp.threads[0], i.operands[1]);
  if (columns < 32 || columns > kColumns || columns & (columns - 1))
    throw Error("the number of columns must be a power of two from 32 to 512");
  if (block.tensor_columns) throw Error("a second allocation of tensor memory");
  block.tensor_columns = columns;
  block.tensor_memory.assign(kLanes * kColumns, 0xFFFFFFFF);
  uint32_t const base = 0;
  std::memcpy(block.shared_at(uint32_t(address_of(warp.threads[0], i.operands[0])), 4), &base, 4);
}

void free_columns(Warp& warp, uint32_t lanes, Instruction const& i) {
  need_all(lanes);
  Thread& first = warp.threads[0];
  if (get<uint32_t>(first, i.operands[0]) || get<uint32_t>(first, i.operands[1]) != warp.block->tensor_columns)
    throw Error("frees tensor memory that was not allocated");
  warp.block->tensor_columns = 0;
}

// Copies 128 rows of 16 bytes from shared memory to four columns of the 128 lanes.
void copy(Thread& t, Instruction const& i) {
  Block& block = t.block();
  uint32_t const to = uint32_t(address_of(t, i.operands[0]));
  SharedMatrix const from = SharedMatrix::of_tcgen05(get<uint64_t>(t, i.operands[1]));
  if (lane_of(to)) throw Error("copies start at lane 0");
  block.tensor_work.push_back({&i, [=, &block] {
                                 for (uint32_t lane = 0; lane < kLanes; ++lane)
                                   for (uint32_t word = 0; word < 4; ++word)
                                     std::memcpy(&cell(block, lane, column_of(to) + word),
                                                 block.shared_at(from.place(lane, 4 * word), 4), 4);
                               }});
}

// tcgen05.mma.sp.kind::f16 with 128 rows: the sums of row r are in lane r, one per column. Metadata: one 32-bit column
// per 32 columns of A; the selector chooses from a pair. Of each 16 rows and lanes, lane l of the first eight has
// columns 0 to 15 of rows l (low half) and l + 8, and lane l + 8 has columns 16 to 31 of the same rows.
void product(Thread& t, Instruction const& i) {
  Block& block = t.block();
  ++block.products;
  uint32_t const description = get<uint32_t>(t, i.operands[4]);
  uint32_t const selector = description & 3, m = (description >> 24 & 31) << 4, n = (description >> 17 & 63) << 3;
  uint32_t const a_type = description >> 7 & 7, b_type = description >> 10 & 7;
  bool const sparse = description >> 2 & 1, fp32 = (description >> 4 & 3) == 1;
  if (!sparse || !fp32 || selector > 1 || a_type > 1 || a_type != b_type || description >> 13 & 15 || m != kLanes)
    throw Error("the emulator does not know this kind of product");
  for (Operand const& mask : i.operands[5].parts)
    if (get<uint32_t>(t, mask)) throw Error("the emulator does not know disabled lanes");
  uint32_t const to = uint32_t(address_of(t, i.operands[0])), meta = uint32_t(address_of(t, i.operands[3]));
  if (lane_of(to) || lane_of(meta) || column_of(meta) % 2) throw Error("a misplaced operand in tensor memory");
  SharedMatrix const a = SharedMatrix::of_tcgen05(get<uint64_t>(t, i.operands[1]));
  SharedMatrix const b = SharedMatrix::of_tcgen05(get<uint64_t>(t, i.operands[2]));
  bool const adds = get<bool>(t, i.operands[6]);
  block.tensor_work.push_back({&i, [=, &block] {
                                 std::vector<float> const values = read_matrix(block, a, 0, m, 16, 2, a_type == 1);
                                 std::vector<float> const x = read_matrix(block, b, 0, n, 32, 2, a_type == 1);
                                 for (uint32_t row = 0; row < m; ++row) {
                                   std::array<Kept, 8> groups;
                                   for (uint32_t group = 0; group < 8; ++group) {
                                     uint32_t const word = cell(block, row / 16 * 16 + group / 4 * 8 + row % 8,
                                                                column_of(meta) + selector);
                                     groups[group] = kept(word >> row % 16 / 8 * 16, int(group % 4));
                                   }
                                   for (uint32_t column = 0; column < n; ++column) {
                                     double const sum = sparse_dot(&values[row * 16], groups, &x[column * 32]);
                                     uint32_t& place = cell(block, row, column_of(to) + column);
                                     float const result = float(adds ? sum + from_bits<float>(place) : sum);
                                     std::memcpy(&place, &result, 4);
                                   }
                                 }
                               }});
}

// Arrives at the mbarrier when all earlier work is done.
void commit_work(Thread& t, Instruction const& i) {
  Block& block = t.block();
  uint32_t const barrier = uint32_t(address_of(t, i.operands[0]));
  uint64_t const until = block.tensor_work_done + block.tensor_work.size();
  Grid& grid = *block.cluster->grid;
  grid.defer(*block.cluster, i, [=, &block, &grid] {
    for (; block.tensor_work_done < until; ++block.tensor_work_done) {
      block.tensor_work.front()();
      block.tensor_work.pop_front();
    }
    mbarrier_arrive(grid, block.shared_at(barrier, 8), 1);
  });
}

// Shape 16x256b: 16 lanes and 8 columns at a time. A thread has columns 2 * (lane % 4) and the next of lane / 4, then
// of lane / 4 + 8. A warp can access only its own 32 of the 128 lanes.
//
// A load is done at once, not at its tcgen05.wait::ld: CUTLASS waits only before it releases the columns, and relies on
// the assembler to wait before the registers are read.
template <bool kLoad>
void registers(Warp& warp, uint32_t lanes, Instruction const& i) {
  need_all(lanes);
  Operand const &own = i.operands[kLoad ? 0 : 1], &address = i.operands[kLoad ? 1 : 0];
  for (Thread& t : warp.threads) {
    uint32_t const base = uint32_t(address_of(t, address));
    if (lane_of(base) / 32 != warp.index % 4 || lane_of(base) % 16)
      throw Error("tensor memory of another warp's lanes");
    for (int k = 0; k < i.count * 4; ++k) {
      uint32_t& place = cell(*warp.block, lane_of(base) + t.lane / 4 + k % 4 / 2 * 8,
                             column_of(base) + k / 4 * 8 + t.lane % 4 * 2 + k % 2);
      if constexpr (kLoad)
        put<uint32_t>(t, own.parts[k], place);
      else
        place = get<uint32_t>(t, own.parts[k]);
    }
  }
  if (!kLoad) ++warp.block->cluster->grid->progress;
}

// The response to try_cancel: the first block of a cluster that has not started, or none.
struct Answer { uint32_t x, y, z, given; };

void try_cancel(Thread& t, Instruction const& i) {
  uint32_t const to = uint32_t(address_of(t, i.operands[0])), barrier = uint32_t(address_of(t, i.operands[1]));
  Cluster& cluster = *t.block().cluster;
  bool const all = i.has("multicast::cluster::all");
  Block* const own = &t.block();
  cluster.grid->defer(cluster, i, [=, &cluster] {
    Dim first;
    bool const given = cluster.grid->take_next_cluster(first);
    Answer const answer{first.x, first.y, first.z, given};
    for (Block& block : cluster.blocks) {
      if (!all && &block != own) continue;
      std::memcpy(block.shared_at(to, 16), &answer, 16);
      mbarrier_complete(*cluster.grid, block.shared_at(barrier, 8), 16);
    }
  });
}

Answer answer_of(Thread& t, Operand const& operand) {
  Answer answer;
  std::memcpy(&answer, &t.registers[operand.slot], 16);
  if (answer.given > 1) throw Error("reads a response without waiting for it");
  return answer;
}

void is_cancelled(Thread& t, Instruction const& i) { put<bool>(t, i.operands[0], answer_of(t, i.operands[1]).given); }

void first_block(Thread& t, Instruction const& i) {
  Answer const answer = answer_of(t, i.operands[1]);
  uint32_t const at[] = {answer.x, answer.y, answer.z};
  for (size_t d = 0; d < 3; ++d) put<uint32_t>(t, i.operands[0].parts.at(d), at[d]);
}

// Repetitions of 8 columns, which are 4 registers per lane.
template <bool kLoad>
void register_access(Instruction& i) {
  i.count = 0;
  for (int count = 1; count <= 32; count *= 2)
    if (i.has("x" + std::to_string(count))) i.count = count;
  bool const fits = i.operands[kLoad ? 0 : 1].is_vector(i.count * 4);
  if (i.count && fits && i.has("16x256b") && i.name.back() == "b32") i.collective = &registers<kLoad>;
}

constexpr Form kForms[] = {
    {"tcgen05.alloc", "cta_group::1 sync aligned shared::cta", 2, 2, together<allocate>},
    {"tcgen05.dealloc", "cta_group::1 sync aligned", 2, 2, together<free_columns>},
    {"tcgen05.relinquish_alloc_permit", "cta_group::1 sync aligned", 0, 0, together<nothing_together>},
    {"tcgen05.cp.cta_group::1.128x128b", "", 2, 2, always<copy>},
    {"tcgen05.mma.sp.cta_group::1.kind::f16", "", 7, 7, always<product>},
    {"tcgen05.commit.cta_group::1.mbarrier::arrive::one", "shared::cluster", 1, 1, always<commit_work>},
    {"tcgen05.ld.sync.aligned", "16x256b x1 x2 x4 x8 x16 x32", 2, 2, register_access<true>},
    {"tcgen05.st.sync.aligned", "16x256b x1 x2 x4 x8 x16 x32", 2, 2, register_access<false>},
    {"tcgen05.wait::ld.sync.aligned", "", 0, 0, together<nothing_together>},
    {"tcgen05.wait::st.sync.aligned", "", 0, 0, together<nothing_together>},
    {"tcgen05.fence::before_thread_sync", "", 0, 0, always<nothing>},
    {"tcgen05.fence::after_thread_sync", "", 0, 0, always<nothing>},
    {"clusterlaunchcontrol.try_cancel.async", "shared::cta mbarrier::complete_tx::bytes multicast::cluster::all", 2, 2,
     always<try_cancel>},
    {"clusterlaunchcontrol.query_cancel.is_canceled", "", 2, 2, always<is_cancelled>},
    {"clusterlaunchcontrol.query_cancel.get_first_ctaid", "v4", 2, 2, always<first_block>},
};

}  // namespace

std::span<Form const> tensor_memory_forms() { return kForms; }

}  // namespace emulator

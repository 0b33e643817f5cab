#include "machine.h"

#include <algorithm>
#include <cmath>

namespace emulator {

GlobalMemory& global_memory() {
  static GlobalMemory memory;
  return memory;
}

uint8_t* Block::shared_at(uint64_t address, size_t bytes) {
  uint32_t const offset = uint32_t(address) & 0xFFFFFF, other = uint32_t(address) >> 24;
  if (other > cluster->blocks.size()) throw Error("shared memory of a block that is not in the cluster");
  Block& owner = other ? cluster->blocks[other - 1] : *this;
  if (!owner.running) throw Error("shared memory of a block that has exited");
  if (address >> 32 || offset < kSharedBase || offset + bytes > kSharedBase + owner.shared.size())
    throw Error("outside of shared memory");
  return owner.shared.data() + (offset - kSharedBase);
}

uint32_t Cluster::threads() const {
  uint32_t count = 0;
  for (Block const& block : blocks) count += block.running;
  return count;
}

uint8_t* memory(Thread& thread, Space space, uint64_t address, size_t bytes, size_t alignment, bool write) {
  if (address % alignment) throw Error("a misaligned address");
  if (space == Space::kGeneric && address >= kSharedWindow) {
    space = Space::kShared;
    address -= kSharedWindow;
  }
  return space == Space::kShared ? thread.block().shared_at(address, bytes) : global_memory().at(address, bytes, write);
}

void Groups::finish(size_t left) {
  while (groups_.size() > left + 1) {
    auto const oldest = std::move(groups_.front());
    groups_.erase(groups_.begin());
    for (Work const& work : oldest) work();
  }
}

bool Groups::empty() const {
  return std::all_of(groups_.begin(), groups_.end(), [](auto const& group) { return group.empty(); });
}

float from_e4m3(uint8_t bits) {
  int const exponent = bits >> 3 & 15, mantissa = bits & 7;
  if (exponent == 15 && mantissa == 7) return NAN;
  float const size = exponent ? std::ldexp(1.0f + mantissa / 8.0f, exponent - 7) : std::ldexp(mantissa / 8.0f, -6);
  return bits & 128 ? -size : size;
}

uint16_t to_bfloat16(float value) {
  if (std::isnan(value)) return 0x7FFF;
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

uint16_t to_float16(float value) {
  if (std::isnan(value)) return 0x7FFF;
  _Float16 const half = _Float16(value);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}

void arrive(Block& block, uint32_t barrier, std::optional<uint32_t> expected, Thread* waiting) {
  if (barrier >= block.barriers.size()) throw Error("there are 16 barriers");
  Block::Barrier& own = block.barriers[barrier];
  if (own.arrived && own.expected != expected) throw Error("a barrier with two thread counts");
  ++own.arrived;
  own.expected = expected;
  if (waiting) {
    waiting->state = Thread::kBarrier;
    own.waiting.push_back(waiting);
  }
  if (own.arrived > expected.value_or(block.running)) throw Error("more threads at a barrier than it expects");
  check_barriers(block);
}

void check_barriers(Block& block) {
  for (Block::Barrier& own : block.barriers) {
    if (!own.arrived || own.arrived < own.expected.value_or(block.running)) continue;
    for (Thread* thread : own.waiting) thread->state = Thread::kReady;
    own = {};
    ++block.cluster->grid->progress;
  }
}

void check_cluster(Cluster& cluster) {
  if (cluster.arrived < cluster.threads()) return;
  cluster.arrived = 0;
  ++cluster.phase;
  ++cluster.grid->progress;
  for (Block& block : cluster.blocks)
    for (Warp& warp : block.warps)
      for (Thread& thread : warp.threads)
        if (thread.state == Thread::kClusterBarrier) {
          thread.state = Thread::kReady;
          thread.arrived = false;
        }
}

namespace {

// phase: parity of the current phase. wanted, bytes: arrivals and bytes that it still waits for. count: arrivals per
// phase.
struct Mbarrier {
  uint64_t phase : 1, valid : 1, wanted : 20, count : 20;
  int64_t bytes : 22;
};
static_assert(sizeof(Mbarrier) == 8);

Mbarrier load(uint8_t const* place) {
  Mbarrier barrier;
  std::memcpy(&barrier, place, 8);
  if (!barrier.valid || barrier.count == 0xFFFFF) throw Error("an mbarrier that was not initialised");
  return barrier;
}

void store(Grid& grid, uint8_t* place, Mbarrier barrier) {
  if (barrier.wanted == 0 && barrier.bytes == 0) {
    barrier.phase ^= 1;
    barrier.wanted = barrier.count;
  }
  std::memcpy(place, &barrier, 8);
  ++grid.progress;
}

}  // namespace

void mbarrier_init(uint8_t* place, uint32_t count) {
  Mbarrier barrier{};
  barrier.valid = 1;
  barrier.wanted = barrier.count = count;
  std::memcpy(place, &barrier, 8);
}

void mbarrier_expect(Grid& grid, uint8_t* place, int64_t bytes) {
  Mbarrier barrier = load(place);
  barrier.bytes += bytes;
  std::memcpy(place, &barrier, 8);
  ++grid.progress;
}

void mbarrier_arrive(Grid& grid, uint8_t* place, uint32_t count) {
  Mbarrier barrier = load(place);
  if (barrier.wanted < count) throw Error("more arrivals at an mbarrier than it expects");
  barrier.wanted -= count;
  store(grid, place, barrier);
}

void mbarrier_complete(Grid& grid, uint8_t* place, int64_t bytes) {
  Mbarrier barrier = load(place);
  barrier.bytes -= bytes;
  store(grid, place, barrier);
}

bool mbarrier_done(uint8_t* place, uint32_t parity) { return load(place).phase != (parity & 1); }

Dim Grid::place(uint64_t cluster) const {
  uint32_t const across = launch.grid.x / launch.cluster.x, down = launch.grid.y / launch.cluster.y;
  return {uint32_t(cluster % across), uint32_t(cluster / across % down), uint32_t(cluster / across / down)};
}

bool Grid::take_next_cluster(Dim& first_block) {
  if (clusters_started >= launch.grid.count() / launch.cluster.count()) return false;
  Dim const at = place(clusters_started++);
  first_block = {at.x * launch.cluster.x, at.y * launch.cluster.y, at.z * launch.cluster.z};
  return true;
}

void Grid::start(uint64_t index) {
  Cluster& cluster = clusters.emplace_back();
  cluster.grid = this;
  cluster.blocks.resize(launch.cluster.count());
  for (Block& block : cluster.blocks) {
    block.cluster = &cluster;
    block.rank = uint32_t(&block - cluster.blocks.data());
    start_block(block, place(index));
  }
}

void Grid::start_block(Block& block, Dim cluster) {
  Kernel const& kernel = *launch.kernel;
  uint32_t const count = uint32_t(launch.block.count());
  size_t const local = kernel.local + 16;  // per thread, with room to align it to 16
  // NaN as fp64, and its parts NaN as fp32, bf16 and fp16; false as a predicate.
  constexpr uint64_t kUnwritten = 0x7FFF'FFFF'FFFF'FFFE;
  block.running = count;
  block.shared.assign(kernel.static_shared + launch.dynamic_shared, 0xFF);
  block.registers.assign(size_t(count) * kernel.registers, kUnwritten);
  block.local.assign(count * local, 0xFF);
  if (kernel.local) global_memory().allow(block.local.data(), block.local.size(), true);
  block.warps.resize((count + 31) / 32);
  for (uint32_t id = 0; id < count; ++id) {
    Warp& warp = block.warps[id / 32];
    warp.block = &block;
    warp.index = id / 32;
    Thread& thread = warp.threads.emplace_back();
    thread.warp = &warp;
    thread.lane = id % 32;
    thread.registers = block.registers.data() + size_t(id) * kernel.registers;
    set_specials(block, cluster, id, thread.registers);
    auto const own = reinterpret_cast<uint64_t>(block.local.data() + id * local);
    thread.registers[kLocalBase] = (own + 15) / 16 * 16;
  }
}

void Grid::set_specials(Block const& block, Dim cluster, uint32_t id, uint64_t* r) const {
  Dim const size = launch.cluster, all = launch.grid, threads = launch.block;
  uint32_t const rank = block.rank;
  Dim const within{rank % size.x, rank / size.x % size.y, rank / size.x / size.y};
  Dim const first{cluster.x * size.x, cluster.y * size.y, cluster.z * size.z};
  r[kTidX] = id % threads.x, r[kTidY] = id / threads.x % threads.y, r[kTidZ] = id / threads.x / threads.y;
  r[kNtidX] = threads.x, r[kNtidY] = threads.y, r[kNtidZ] = threads.z;
  r[kCtaidX] = first.x + within.x, r[kCtaidY] = first.y + within.y, r[kCtaidZ] = first.z + within.z;
  r[kNctaidX] = all.x, r[kNctaidY] = all.y, r[kNctaidZ] = all.z;
  r[kLaneid] = id % 32, r[kWarpid] = id / 32;
  r[kSmid] = (r[kCtaidZ] * all.y + r[kCtaidY]) * all.x + r[kCtaidX];  // a different one for each block
  r[kClusterCtarank] = rank, r[kClusterNctarank] = size.count();
  r[kClusteridX] = cluster.x, r[kClusteridY] = cluster.y, r[kClusteridZ] = cluster.z;
  r[kNclusteridX] = all.x / size.x, r[kNclusteridY] = all.y / size.y, r[kNclusteridZ] = all.z / size.z;
  r[kClusterCtaidX] = within.x, r[kClusterCtaidY] = within.y, r[kClusterCtaidZ] = within.z;
  r[kClusterNctaidX] = size.x, r[kClusterNctaidY] = size.y, r[kClusterNctaidZ] = size.z;
  r[kDynamicSmemSize] = launch.dynamic_shared;
}

// Checks and counts a cluster whose threads have all exited.
void Grid::retire(Cluster& cluster) {
  auto const of_it = [&](Pending const& each) { return each.cluster == &cluster; };
  bool busy = std::any_of(pending.begin(), pending.end(), of_it);
  for (Block& block : cluster.blocks) {
    busy |= !block.tensor_work.empty();
    for (Warp const& warp : block.warps) busy |= !warp.products.empty();
    load.blocks += block.products > 0;
    load.most = std::max(load.most, block.products);
    load.all += block.products;
    if (launch.kernel->local) global_memory().forbid(block.local.data());
  }
  if (busy) throw Error("the last thread exits while asynchronous work is pending");
}

void Grid::exit_thread(Thread& thread) {
  Block& block = thread.block();
  Cluster& cluster = *block.cluster;
  ++progress;
  --block.running;
  if (thread.arrived && thread.cluster_phase == cluster.phase) --cluster.arrived;
  check_barriers(block);
  check_cluster(cluster);
  if (!cluster.threads()) retire(cluster);
}

void Grid::run_thread(Thread& thread) {
  auto const& code = launch.kernel->code;
  thread.yields = false;
  for (int budget = 4000; budget && !thread.yields; --budget) {
    Instruction const& instruction = code[thread.pc];
    bool const guarded = instruction.predicate >= 0;
    if (guarded && bool(thread.registers[instruction.predicate] & 1) == instruction.predicate_negated) {
      ++thread.pc;
      continue;
    }
    if (instruction.collective) {
      thread.state = Thread::kWarp;
      return;
    }
    ++thread.pc;
    at_instruction(instruction, [&] {
      instruction.scalar(thread, instruction);
      if (thread.state == Thread::kExited) exit_thread(thread);
    });
    if (thread.state != Thread::kReady) return;
  }
}

// Runs one collective instruction that all of its lanes have reached, if there is one.
bool Grid::run_collective(Warp& warp) {
  auto const& code = launch.kernel->code;
  uint32_t const alive = warp.alive();
  uint32_t tried = 0;
  for (Thread& first : warp.threads) {
    if (first.state != Thread::kWarp || tried >> first.lane & 1) continue;
    Instruction const& instruction = code[first.pc];
    uint32_t here = 0;
    for (Thread const& thread : warp.threads)
      if (thread.state == Thread::kWarp && thread.pc == first.pc) here |= 1u << thread.lane;
    tried |= here;
    uint32_t wanted = alive;
    if (instruction.mask_operand >= 0) wanted &= get<uint32_t>(first, instruction.operands[instruction.mask_operand]);
    if ((here & wanted) != wanted || !(wanted >> first.lane & 1)) continue;
    for (Thread& thread : warp.threads)
      if (wanted >> thread.lane & 1) {
        thread.state = Thread::kReady;
        ++thread.pc;
      }
    at_instruction(instruction, [&] { instruction.collective(warp, wanted, instruction); });
    return true;
  }
  return false;
}

void Grid::run_warp(Warp& warp) {
  for (int rounds = 0; rounds < 200; ++rounds) {
    bool spins = false;
    for (Thread& thread : warp.threads)
      if (thread.state == Thread::kReady) {
        run_thread(thread);
        spins |= thread.yields;
      }
    if (!run_collective(warp) || spins) return;
    for (Thread const& thread : warp.threads)
      if (thread.yields && thread.state == Thread::kReady) return;
  }
}

void Grid::run_warps() {
  std::vector<Warp*> warps;
  for (Cluster& cluster : clusters)
    for (Block& block : cluster.blocks)
      if (block.running)
        for (Warp& warp : block.warps) warps.push_back(&warp);
  if (launch.seed) std::shuffle(warps.begin(), warps.end(), random);
  for (Warp* warp : warps) run_warp(*warp);
}

void Grid::run_pending(size_t which) {
  Work const work = std::move(pending[which].work);
  pending.erase(pending.begin() + which);
  work();
}

// Where the warp's threads are; neighbours at the same instruction are named once.
std::string Grid::places(Warp const& warp) const {
  std::string lines;
  int last = -1;
  for (Thread const& thread : warp.threads) {
    if (thread.state == Thread::kExited) continue;
    // A thread at a barrier is already past the instruction that it waits in.
    int const at = thread.pc - (thread.state == Thread::kBarrier || thread.state == Thread::kClusterBarrier);
    if (at == last) continue;
    last = at;
    Instruction const& instruction = launch.kernel->code[at];
    lines += " lane " + std::to_string(thread.lane) + " at line " + std::to_string(instruction.line) + " `" +
             instruction.text + "`";
    if (lines.size() > 300) break;
  }
  return lines;
}

void Grid::report_deadlock() {
  std::string where;
  for (Cluster& cluster : clusters)
    for (Block& block : cluster.blocks)
      for (Warp& warp : block.warps) {
        std::string const lines = places(warp);
        if (!lines.empty() && where.size() < 4000)
          where += "\n  block " + std::to_string(warp.threads[0].registers[kCtaidX]) + " warp " +
                   std::to_string(warp.index) + ":" + lines;
      }
  throw Error("deadlock, no thread can proceed:" + where);
}

void Grid::run() {
  uint64_t const count = launch.grid.count() / launch.cluster.count();
  uint64_t const at_once = std::max<uint64_t>(1, launch.resident / launch.cluster.count());
  int idle = 0;
  while (true) {
    while (!clusters.empty() && !clusters.front().threads()) clusters.pop_front();
    uint64_t live = 0;
    for (Cluster const& cluster : clusters) live += cluster.threads() > 0;
    for (; live < at_once && clusters_started < count; ++live) start(clusters_started++);
    if (clusters.empty()) return;

    uint64_t const before = progress;
    run_warps();
    if (launch.seed)
      for (size_t i = pending.size(); i-- > 0;)
        if (random() % 4 == 0) run_pending(i);
    if (progress != before) {
      idle = 0;
    } else if (!pending.empty()) {
      run_pending(launch.seed ? random() % pending.size() : 0);
    } else if (++idle > 1000) {
      report_deadlock();
    }
  }
}

}  // namespace emulator

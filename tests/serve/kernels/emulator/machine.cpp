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
  if (other > cluster->blocks.size()) throw Error("shared memory of a block that the cluster does not have");
  Block& owner = other ? cluster->blocks[other - 1] : *this;
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

void finish(std::vector<std::vector<std::function<void()>>>& groups, size_t left) {
  while (groups.size() > left + 1) {
    auto const oldest = std::move(groups.front());
    groups.erase(groups.begin());
    for (auto const& work : oldest) work();
  }
}

void commit(std::vector<std::vector<std::function<void()>>>& groups) { groups.emplace_back(); }

float from_e4m3(uint8_t bits) {
  int const exponent = bits >> 3 & 15, mantissa = bits & 7;
  if (exponent == 15 && mantissa == 7) return NAN;
  float const size = exponent ? std::ldexp(1.0f + mantissa / 8.0f, exponent - 7) : std::ldexp(mantissa / 8.0f, -6);
  return bits & 128 ? -size : size;
}

uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (std::isnan(value)) return 0x7FFF;
  return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

void arrive(Block& block, uint32_t barrier, uint32_t expected, Thread* waiting) {
  if (barrier >= block.barriers.size()) throw Error("there are 16 barriers");
  Block::Barrier& own = block.barriers[barrier];
  ++own.arrived;
  if (waiting) {
    waiting->state = Thread::kBarrier;
    own.waiting.push_back(waiting);
  }
  if (own.arrived > expected) throw Error("more threads at a barrier than it expects");
  if (own.arrived < expected) return;
  for (Thread* thread : own.waiting) thread->state = Thread::kReady;
  own = {};
  ++block.cluster->grid->progress;
}

void check_cluster(Cluster& cluster) {
  if (cluster.arrived < cluster.threads()) return;
  cluster.arrived = 0;
  ++cluster.phase;
  ++cluster.grid->progress;
  for (Block& block : cluster.blocks)
    for (Warp& warp : block.warps)
      for (Thread& thread : warp.threads)
        if (thread.state == Thread::kClusterBarrier) thread.state = Thread::kReady;
}

namespace {

// The current phase's parity; arrivals still wanted, those of a phase, bytes still expected.
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

bool Grid::steal(Dim& first_block) {
  if (clusters_started >= launch.grid.count() / launch.cluster.count()) return false;
  Dim const at = place(clusters_started++);
  first_block = {at.x * launch.cluster.x, at.y * launch.cluster.y, at.z * launch.cluster.z};
  return true;
}

void Grid::start(uint64_t index) {
  Kernel const& kernel = *launch.kernel;
  Dim const at = place(index), size = launch.cluster, all = launch.grid, threads = launch.block;
  Dim const clusters_in_grid{all.x / size.x, all.y / size.y, all.z / size.z};
  Cluster& cluster = clusters.emplace_back();
  cluster.grid = this;
  cluster.blocks.resize(size.count());
  for (uint32_t rank = 0; rank < size.count(); ++rank) {
    Block& block = cluster.blocks[rank];
    Dim const within{rank % size.x, rank / size.x % size.y, rank / size.x / size.y};
    block.cluster = &cluster;
    block.rank = rank;
    block.shared.assign(kernel.static_shared + launch.dynamic_shared, 0xFF);
    uint32_t const count = uint32_t(threads.count());
    block.running = count;
    block.registers.assign(size_t(count) * kernel.registers, 0xBAD0BAD0BAD0BAD0);
    block.local.assign(size_t(count) * (kernel.local + 16), 0xFF);
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
      uint64_t* const r = thread.registers;
      r[kTidX] = id % threads.x, r[kTidY] = id / threads.x % threads.y, r[kTidZ] = id / threads.x / threads.y;
      r[kNtidX] = threads.x, r[kNtidY] = threads.y, r[kNtidZ] = threads.z;
      r[kCtaidX] = at.x * size.x + within.x, r[kCtaidY] = at.y * size.y + within.y, r[kCtaidZ] = at.z * size.z + within.z;
      r[kNctaidX] = all.x, r[kNctaidY] = all.y, r[kNctaidZ] = all.z;
      r[kLaneid] = id % 32, r[kWarpid] = id / 32, r[kSmid] = index * size.count() + rank;
      r[kClusterCtarank] = rank, r[kClusterNctarank] = size.count();
      r[kClusteridX] = at.x, r[kClusteridY] = at.y, r[kClusteridZ] = at.z;
      r[kNclusteridX] = clusters_in_grid.x, r[kNclusteridY] = clusters_in_grid.y, r[kNclusteridZ] = clusters_in_grid.z;
      r[kClusterCtaidX] = within.x, r[kClusterCtaidY] = within.y, r[kClusterCtaidZ] = within.z;
      r[kClusterNctaidX] = size.x, r[kClusterNctaidY] = size.y, r[kClusterNctaidZ] = size.z;
      r[kDynamicSmemSize] = launch.dynamic_shared;
      r[kLocalBase] = (reinterpret_cast<uint64_t>(block.local.data() + size_t(id) * (kernel.local + 16)) + 15) / 16 * 16;
    }
  }
}

void Grid::run_thread(Thread& thread) {
  auto const& code = launch.kernel->code;
  thread.yields = false;
  for (int budget = 4000; budget && !thread.yields; --budget) {
    Instruction const& instruction = code[thread.pc];
    if (instruction.predicate >= 0 && bool(thread.registers[instruction.predicate] & 1) == instruction.predicate_negated) {
      ++thread.pc;
      continue;
    }
    if (instruction.collective) {
      thread.state = Thread::kWarp;
      return;
    }
    ++thread.pc;
    instruction.ran = true;
    try {
      instruction.scalar(thread, instruction);
    } catch (Error const& error) {
      throw Error("PTX line " + std::to_string(instruction.line) + ", `" + instruction.text + "`: " + error.what());
    }
    if (thread.state == Thread::kExited) {
      ++progress;
      --thread.block().running;
      check_cluster(*thread.block().cluster);
    }
    if (thread.state != Thread::kReady) return;
  }
}

// Runs one collective instruction that all its lanes have reached.
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
    instruction.ran = true;
    try {
      instruction.collective(warp, wanted, instruction);
    } catch (Error const& error) {
      throw Error("PTX line " + std::to_string(instruction.line) + ", `" + instruction.text + "`: " + error.what());
    }
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

void Grid::hang() {
  std::string where;
  for (Cluster& cluster : clusters)
    for (Block& block : cluster.blocks)
      for (Warp& warp : block.warps) {
        std::string lines;
        int last = -1;
        for (Thread& thread : warp.threads)
          if (thread.state != Thread::kExited && thread.pc != last) {
            last = thread.pc;
            Instruction const& instruction = launch.kernel->code[thread.pc];
            lines += " lane " + std::to_string(thread.lane) + " at line " + std::to_string(instruction.line) + " `" +
                     instruction.text + "`";
            if (lines.size() > 300) break;
          }
        if (!lines.empty() && where.size() < 4000)
          where += "\n  block " + std::to_string(warp.threads[0].registers[kCtaidX]) + " warp " +
                   std::to_string(warp.index) + ":" + lines;
      }
  throw Error("no thread can go on:" + where);
}

void Grid::run() {
  uint64_t const count = launch.grid.count() / launch.cluster.count();
  uint64_t const at_once = std::max<uint64_t>(1, launch.resident / launch.cluster.count());
  int idle = 0;
  while (true) {
    while (!clusters.empty() && clusters.front().threads() == 0) {
      for (Block const& block : clusters.front().blocks) {
        load.blocks += block.products > 0;
        load.most = std::max(load.most, block.products);
        load.all += block.products;
      }
      clusters.pop_front();
    }
    uint64_t live = 0;
    for (Cluster const& cluster : clusters) live += cluster.threads() > 0;
    for (; live < at_once && clusters_started < count; ++live) start(clusters_started++);
    if (clusters.empty()) break;

    std::vector<Warp*> warps;
    for (Cluster& cluster : clusters)
      for (Block& block : cluster.blocks)
        if (block.running)
          for (Warp& warp : block.warps) warps.push_back(&warp);
    if (launch.seed) std::shuffle(warps.begin(), warps.end(), random);
    uint64_t const before = progress;
    for (Warp* warp : warps) run_warp(*warp);

    auto const finish_one = [&](size_t which) {
      auto const work = std::move(pending[which]);
      pending.erase(pending.begin() + which);
      work();
    };
    if (launch.seed)
      for (size_t i = pending.size(); i-- > 0;)
        if (random() % 4 == 0) finish_one(i);
    if (progress != before) {
      idle = 0;
    } else if (!pending.empty()) {
      finish_one(launch.seed ? random() % pending.size() : 0);
    } else if (++idle > 1000) {
      hang();
    }
  }
  if (!pending.empty()) throw Error("the kernel ended before its asynchronous copies");
}

}  // namespace emulator

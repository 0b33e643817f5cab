// The machine that runs PTX: threads, each with its own program counter, in warps, blocks, clusters and a grid.
//
// Asynchronous work (TMA, wgmma, cp.async) is deferred as long as the program allows, or for a random time if there is
// a seed, so that a missing wait shows as a wrong result. Unwritten memory and registers read as NaN.
#pragma once

#include <array>
#include <cstring>
#include <deque>
#include <functional>
#include <optional>
#include <random>

#include "ptx.h"

namespace emulator {

struct Block;
struct Cluster;
struct Grid;

// The parts of this process's memory that kernels may read or write; everything else is out of bounds.
class GlobalMemory {
 public:
  void allow(void const* start, size_t bytes, bool writable) {
    ranges_.push_back({reinterpret_cast<uint64_t>(start), bytes, writable});
  }
  void forbid(void const* start) {
    std::erase_if(ranges_, [=](Range const& range) { return range.start == reinterpret_cast<uint64_t>(start); });
  }
  size_t size() const { return ranges_.size(); }
  void shrink(size_t size) { ranges_.resize(size); }
  uint8_t* at(uint64_t address, size_t bytes, bool write) {
    bool seen = false;
    for (auto const& range : ranges_) {
      if (address < range.start || bytes > range.bytes || address - range.start > range.bytes - bytes) continue;
      if (!write || range.writable) return reinterpret_cast<uint8_t*>(address);
      seen = true;
    }
    if (seen) throw Error("writes to read-only memory");
    throw Error(std::string(write ? "writes" : "reads") + " outside of global memory");
  }

 private:
  struct Range {
    uint64_t start, bytes;
    bool writable;
  };
  std::vector<Range> ranges_;
};

GlobalMemory& global_memory();

// Calls `use` and adds the instruction to an error that it throws.
template <class Use>
void at_instruction(Instruction const& instruction, Use const& use) {
  try {
    use();
  } catch (Error const& error) {
    throw Error("PTX line " + std::to_string(instruction.line) + ", `" + instruction.text + "`: " + error.what());
  }
}

// Deferred work, and the instruction that asked for it.
struct Work {
  Instruction const* instruction;
  std::function<void()> run;

  void operator()() const { at_instruction(*instruction, run); }
};

// Deferred work in groups, as in cp.async.commit_group and wait_group.
class Groups {
 public:
  void add(Instruction const& instruction, std::function<void()> run) {
    groups_.back().push_back({&instruction, std::move(run)});
  }
  void commit() { groups_.emplace_back(); }
  // Runs all committed groups but the newest `left`.
  void finish(size_t left);
  bool empty() const;

 private:
  std::vector<std::vector<Work>> groups_{1};  // oldest first; the last one is not committed
};

struct Thread {
  enum State { kReady, kWarp, kBarrier, kClusterBarrier, kExited };
  State state = kReady;
  bool yields = false;
  int pc = 0;
  uint64_t* registers = nullptr;
  Warp* warp = nullptr;
  uint32_t lane = 0;
  bool arrived = false;        // has arrived at the cluster's barrier and not yet waited there
  uint64_t cluster_phase = 0;  // the phase in which it arrived
  Groups copies, stores;       // cp.async, cp.async.bulk

  Block& block() const;
};

struct Warp {
  Block* block = nullptr;
  uint32_t index = 0;
  std::vector<Thread> threads;
  Groups products;  // of wgmma: this warp's rows of the warpgroup's result
  uint64_t products_committed = 0;

  uint32_t alive() const {
    uint32_t lanes = 0;
    for (Thread const& thread : threads)
      if (thread.state != Thread::kExited) lanes |= 1u << thread.lane;
    return lanes;
  }
};

struct Block {
  Cluster* cluster = nullptr;
  uint32_t rank = 0;
  std::vector<uint8_t> shared;
  std::vector<uint64_t> registers;
  std::vector<uint8_t> local;
  std::vector<Warp> warps;
  struct Barrier {
    uint32_t arrived = 0;
    std::optional<uint32_t> expected;  // none: all threads that have not exited
    std::vector<Thread*> waiting;
  };
  std::array<Barrier, 16> barriers;
  uint32_t running = 0;
  uint64_t products = 0;  // tensor-core instructions, counted per warp
  // 128 lanes x 512 columns (tensor_memory.cpp); allocated columns; pending work, in order; number of finished ones.
  std::vector<uint32_t> tensor_memory;
  uint32_t tensor_columns = 0;
  std::deque<Work> tensor_work;
  uint64_t tensor_work_done = 0;

  // Translates an address in the shared window: this block's, or another's in the cluster (mapa) that has not exited.
  uint8_t* shared_at(uint64_t address, size_t bytes);
};

struct Cluster {
  Grid* grid = nullptr;
  std::vector<Block> blocks;
  uint32_t arrived = 0;  // threads at the barrier, without those that have exited
  uint64_t phase = 0;
  uint32_t threads() const;
};

struct Dim {
  uint32_t x = 1, y = 1, z = 1;
  uint64_t count() const { return uint64_t(x) * y * z; }
};

struct Launch {
  Kernel* kernel;
  Dim grid, block, cluster;
  size_t dynamic_shared = 0;
  uint32_t resident = 16;  // most blocks at a time
  uint64_t seed = 0;       // 0: threads in order, asynchronous work as late as possible; else both at random
};

// How tensor-core instructions were distributed over the blocks.
struct Load {
  uint64_t blocks = 0, most = 0, all = 0;  // blocks with any; most in one block; in all blocks
};

struct Grid {
  explicit Grid(Launch const& launch) : launch(launch), random(launch.seed) {}
  void run();

  // Defers work that may run in any order, such as TMA loads.
  void defer(Cluster& cluster, Instruction const& instruction, std::function<void()> run) {
    pending.push_back({&cluster, {&instruction, std::move(run)}});
  }

  // Takes the next cluster of the grid that has not started, for cluster launch control; false if there is none.
  bool take_next_cluster(Dim& first_block);

  Launch launch;
  uint64_t progress = 0;
  Load load;

 private:
  struct Pending {
    Cluster* cluster;
    Work work;
  };

  Dim place(uint64_t cluster) const;
  void start(uint64_t cluster);
  void start_block(Block&, Dim cluster);
  void set_specials(Block const&, Dim cluster, uint32_t thread, uint64_t* registers) const;
  void retire(Cluster&);
  void exit_thread(Thread&);
  void run_warp(Warp&);
  void run_warps();
  void run_thread(Thread&);
  bool run_collective(Warp&);
  void run_pending(size_t which);
  std::string places(Warp const&) const;
  [[noreturn]] void report_deadlock();

  std::mt19937_64 random;
  std::vector<Pending> pending;
  uint64_t clusters_started = 0;
  std::deque<Cluster> clusters;
};

inline Block& Thread::block() const { return *warp->block; }

inline Grid& grid_of(Thread const& thread) { return *thread.block().cluster->grid; }

// Counts one more thread at a barrier of its block; `waiting` is null if it does not wait. Without `expected`, the
// barrier is for all threads that have not exited.
void arrive(Block&, uint32_t barrier, std::optional<uint32_t> expected, Thread* waiting);
// Releases the threads at barriers that are complete.
void check_barriers(Block&);
void check_cluster(Cluster&);

// mbarrier objects, each in 64 bits of shared memory.
void mbarrier_init(uint8_t*, uint32_t count);
void mbarrier_expect(Grid&, uint8_t*, int64_t bytes);
void mbarrier_arrive(Grid&, uint8_t*, uint32_t count);
void mbarrier_complete(Grid&, uint8_t*, int64_t bytes);
bool mbarrier_done(uint8_t*, uint32_t parity);

template <class T>
T from_bits(uint64_t raw) {
  T value;
  std::memcpy(&value, &raw, sizeof value);
  return value;
}

template <class T>
T get(Thread const& thread, Operand const& operand) {
  bool const is_register = operand.kind == Operand::kRegister;
  uint64_t const raw = is_register ? thread.registers[operand.slot] + operand.value : operand.value;
  if constexpr (std::is_same_v<T, bool>)
    return bool(raw & 1) != operand.negated;
  else
    return from_bits<T>(raw);
}

// Signed values are sign-extended to the register's width.
template <class T>
void put(Thread& thread, Operand const& operand, T value) {
  if (operand.kind == Operand::kSink) return;
  uint64_t raw = 0;
  if constexpr (std::is_integral_v<T>)
    raw = uint64_t(value);
  else
    std::memcpy(&raw, &value, sizeof value);
  thread.registers[operand.slot] = raw;
}

inline uint64_t address_of(Thread const& thread, Operand const& operand) {
  return (operand.slot >= 0 ? thread.registers[operand.slot] : 0) + operand.value;
}

// Generic addresses of shared memory.
constexpr uint64_t kSharedWindow = uint64_t(1) << 60;

// Throws if the address is not aligned to `alignment` or is out of bounds.
uint8_t* memory(Thread&, Space, uint64_t address, size_t bytes, size_t alignment, bool write);

inline float from_bfloat16(uint16_t bits) { return from_bits<float>(uint64_t(bits) << 16); }
inline float from_float16(uint16_t bits) { return float(from_bits<_Float16>(bits)); }
float from_e4m3(uint8_t bits);
uint16_t to_bfloat16(float value);
uint16_t to_float16(float value);

}  // namespace emulator

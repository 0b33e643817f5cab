// The machine that PTX runs on: threads that each keep their own place in the code, warps, blocks, clusters, a grid.
//
// Asynchronous work (TMA, wgmma, cp.async) is put off as far as the program allows, or a random time where a seed asks
// for it, so that a wait that is missing shows as a wrong result. Memory and registers that nobody wrote read as NaN.
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

// What may be read and written of this process's memory; everything else is out of bounds.
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
    if (seen) throw Error("writes to memory that may only be read");
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

// Calls `use`; an error of it then names the instruction.
template <class Use>
void at_instruction(Instruction const& instruction, Use const& use) {
  try {
    use();
  } catch (Error const& error) {
    throw Error("PTX line " + std::to_string(instruction.line) + ", `" + instruction.text + "`: " + error.what());
  }
}

// What an instruction asked for and what is done later.
struct Work {
  Instruction const* instruction;
  std::function<void()> run;

  void operator()() const { at_instruction(*instruction, run); }
};

// Work that is waited for by groups.
class Groups {
 public:
  void add(Instruction const& instruction, std::function<void()> run) {
    groups_.back().push_back({&instruction, std::move(run)});
  }
  void commit() { groups_.emplace_back(); }
  // Does all but the newest `left` groups; the open one stays as it is.
  void finish(size_t left);
  bool empty() const;

 private:
  std::vector<std::vector<Work>> groups_{1};  // one at first; the oldest comes first, the last is open
};

struct Thread {
  enum State { kReady, kWarp, kBarrier, kClusterBarrier, kExited };
  State state = kReady;
  bool yields = false;
  int pc = 0;
  uint64_t* registers = nullptr;
  Warp* warp = nullptr;
  uint32_t lane = 0;
  bool arrived = false;        // at the cluster's barrier, and has not waited for the others yet
  uint64_t cluster_phase = 0;  // in which it arrived
  Groups copies, stores;       // cp.async, cp.async.bulk

  Block& block() const;
};

struct Warp {
  Block* block = nullptr;
  uint32_t index = 0;
  std::vector<Thread> threads;
  Groups products;  // wgmma: this warp's rows of the warpgroup's
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
    std::optional<uint32_t> expected;  // none: all that have not exited
    std::vector<Thread*> waiting;
  };
  std::array<Barrier, 16> barriers;
  uint32_t running = 0;
  uint64_t products = 0;  // tensor-core instructions, of each warp
  // 128 lanes x 512 columns (tensor_memory.cpp); columns in use; work in order, and how much of it is done.
  std::vector<uint32_t> tensor_memory;
  uint32_t tensor_columns = 0;
  std::deque<Work> tensor_work;
  uint64_t tensor_work_done = 0;

  // An address of the shared window: of this block, or of another of its cluster (mapa) that has not exited.
  uint8_t* shared_at(uint64_t address, size_t bytes);
};

struct Cluster {
  Grid* grid = nullptr;
  std::vector<Block> blocks;
  uint32_t arrived = 0;  // threads at the barrier that have not exited
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
  uint32_t resident = 16;  // blocks at once
  uint64_t seed = 0;       // 0: in order, asynchronous work as late as it can be
};

// How the tensor-core instructions were spread over the blocks.
struct Load {
  uint64_t blocks = 0, most = 0, all = 0;  // blocks with any; the most in one; in all together
};

struct Grid {
  explicit Grid(Launch const& launch) : launch(launch), random(launch.seed) {}
  void run();

  // TMA loads and the like, done in any order.
  void put_off(Cluster& cluster, Instruction const& instruction, std::function<void()> run) {
    pending.push_back({&cluster, {&instruction, std::move(run)}});
  }

  // The next cluster of the grid that nobody has begun, for cluster launch control; false when there is none.
  bool steal(Dim& first_block);

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
  void leave(Thread&);
  void run_warp(Warp&);
  void run_warps();
  void run_thread(Thread&);
  bool run_collective(Warp&);
  void run_pending(size_t which);
  std::string places(Warp const&) const;
  [[noreturn]] void hang();

  std::mt19937_64 random;
  std::vector<Pending> pending;
  uint64_t clusters_started = 0;
  std::deque<Cluster> clusters;
};

inline Block& Thread::block() const { return *warp->block; }

// One more thread at a barrier of its block; `waiting` is null where it does not wait. Without `expected` the barrier
// is for all threads that have not exited.
void arrive(Block&, uint32_t barrier, std::optional<uint32_t> expected, Thread* waiting);
// Lets the threads go that wait for nobody any more.
void check_barriers(Block&);
void check_cluster(Cluster&);

// mbarrier objects, in 64 bits of shared memory.
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

// Signed values fill the register, which may be wider.
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

// Throws where the address is not aligned to `alignment` or lies outside.
uint8_t* memory(Thread&, Space, uint64_t address, size_t bytes, size_t alignment, bool write);

inline float from_bfloat16(uint16_t bits) { return from_bits<float>(uint64_t(bits) << 16); }
inline float from_float16(uint16_t bits) { return float(from_bits<_Float16>(bits)); }
float from_e4m3(uint8_t bits);
uint16_t to_bfloat16(float value);
uint16_t to_float16(float value);

}  // namespace emulator

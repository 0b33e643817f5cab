// The machine that PTX runs on: threads that each keep their own place in the code, warps, blocks, clusters, a grid.
//
// Asynchronous work (TMA, wgmma, cp.async) is put off as far as the program allows, or a random time where a seed asks
// for it, so that a wait that is missing shows as a wrong result. Memory that nobody wrote reads as NaN.
#pragma once

#include <cstring>
#include <deque>
#include <functional>
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
  size_t size() const { return ranges_.size(); }
  void shrink(size_t size) { ranges_.resize(size); }
  uint8_t* at(uint64_t address, size_t bytes, bool write) {
    for (auto const& range : ranges_)
      if (address >= range.start && address + bytes <= range.start + range.bytes) {
        if (write && !range.writable) throw Error("writes to memory that may only be read");
        return reinterpret_cast<uint8_t*>(address);
      }
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

struct Thread {
  enum State { kReady, kWarp, kBarrier, kClusterBarrier, kExited };
  State state = kReady;
  bool yields = false;
  int pc = 0;
  uint64_t* registers = nullptr;
  uint8_t* local = nullptr;
  Warp* warp = nullptr;
  uint32_t lane = 0;
  uint64_t cluster_phase = 0;
  // Committed groups, oldest first; the last one is open.
  std::vector<std::vector<std::function<void()>>> copies{1}, stores{1};

  Block& block() const;
};

struct Warp {
  Block* block = nullptr;
  uint32_t index = 0;
  std::vector<Thread> threads;
  // wgmma, by groups as above: this warp's rows of the warpgroup's products; how many groups were committed.
  std::vector<std::vector<std::function<void()>>> products{1};
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
    std::vector<Thread*> waiting;
  };
  std::array<Barrier, 16> barriers;
  uint32_t running = 0;
  uint64_t products = 0;  // tensor-core instructions, of each warp
  // 128 lanes x 512 columns (tensor_memory.cpp); columns in use; work in order, and how much of it is done.
  std::vector<uint32_t> tensor_memory;
  uint32_t tensor_columns = 0;
  std::deque<std::function<void()>> tensor_work;
  uint64_t tensor_work_done = 0;

  // An address of the shared window: of this block, or of another of its cluster (mapa).
  uint8_t* shared_at(uint64_t address, size_t bytes);
};

struct Cluster {
  Grid* grid = nullptr;
  std::vector<Block> blocks;
  uint32_t arrived = 0;
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
  uint32_t dynamic_shared = 0;
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

  Launch launch;
  std::mt19937_64 random;
  std::vector<std::function<void()>> pending;  // TMA loads and the like, in any order
  uint64_t progress = 0;
  uint64_t clusters_started = 0;
  Load load;
  std::deque<Cluster> clusters;

  // The next cluster of the grid that nobody has begun, for cluster launch control; false when there is none.
  bool steal(Dim& first_block);

 private:
  Dim place(uint64_t cluster) const;
  void start(uint64_t cluster);
  void run_warp(Warp&);
  void run_thread(Thread&);
  bool run_collective(Warp&);
  [[noreturn]] void hang();
};

inline Block& Thread::block() const { return *warp->block; }

// A blocked barrier's threads go on.
void arrive(Block&, uint32_t barrier, uint32_t expected, Thread* waiting);
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
  uint64_t const raw = operand.kind == Operand::kRegister ? thread.registers[operand.slot] + operand.value : operand.value;
  if constexpr (std::is_same_v<T, bool>) return bool(raw & 1) != operand.negated;
  else return from_bits<T>(raw);
}

template <class T>
void put(Thread& thread, Operand const& operand, T value) {
  if (operand.kind == Operand::kSink) return;
  uint64_t raw = 0;
  std::memcpy(&raw, &value, sizeof value);
  thread.registers[operand.slot] = raw;
}

enum class Space { kGeneric, kGlobal, kShared };

inline uint64_t address_of(Thread const& thread, Operand const& operand) {
  return (operand.slot >= 0 ? thread.registers[operand.slot] : 0) + operand.value;
}

// Generic addresses of shared memory.
constexpr uint64_t kSharedWindow = uint64_t(1) << 60;

// Throws where the address is not aligned to `alignment` or lies outside.
uint8_t* memory(Thread&, Space, uint64_t address, size_t bytes, size_t alignment, bool write);

// Runs all groups but the newest `left`; the open one stays as it is.
void finish(std::vector<std::vector<std::function<void()>>>& groups, size_t left);
void commit(std::vector<std::vector<std::function<void()>>>& groups);

inline float from_bfloat16(uint16_t bits) { return from_bits<float>(uint64_t(bits) << 16); }
inline float from_float16(uint16_t bits) { return float(from_bits<_Float16>(bits)); }
float from_e4m3(uint8_t bits);
uint16_t to_bfloat16(float value);
inline uint16_t to_float16(float value) {
  _Float16 const half = _Float16(value);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}

}  // namespace emulator

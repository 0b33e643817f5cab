// Branches, exits, barriers, and what orders memory.
#include "machine.h"

namespace emulator {
namespace {

void branch(Thread& t, Instruction const& i) { t.pc = i.target; }

void exit_thread(Thread& t, Instruction const&) {
  if (!t.copies.empty()) throw Error("exits without waiting for its copies");
  // CUTLASS's Hopper kernels wait for their last stores; its Blackwell kernels exit while they are pending.
  if (grid_of(t).launch.kernel->module->target >= 100) t.stores.finish(0);
  if (!t.stores.empty()) throw Error("exits without waiting for its bulk stores");
  t.state = Thread::kExited;
}

void trap(Thread&, Instruction const&) { throw Error("the kernel trapped"); }
void pause(Thread& t, Instruction const&) { t.yields = true; }

template <bool kWaits>
void block_barrier(Thread& t, Instruction const& i) {
  std::optional<uint32_t> expected;
  if (i.operands.size() > 1) expected = get<uint32_t>(t, i.operands[1]);
  arrive(t.block(), get<uint32_t>(t, i.operands[0]), expected, kWaits ? &t : nullptr);
}

void cluster_arrive(Thread& t, Instruction const&) {
  Cluster& cluster = *t.block().cluster;
  if (t.arrived) throw Error("arrives twice without waiting");
  t.arrived = true;
  t.cluster_phase = cluster.phase;
  ++cluster.arrived;
  check_cluster(cluster);
}

void cluster_wait(Thread& t, Instruction const&) {
  if (!t.arrived) throw Error("waits without having arrived");
  if (t.block().cluster->phase == t.cluster_phase)
    t.state = Thread::kClusterBarrier;
  else
    t.arrived = false;
}

uint8_t* barrier_at(Thread& t, Operand const& operand) {
  return t.block().shared_at(uint32_t(address_of(t, operand)), 8);
}
void barrier_init(Thread& t, Instruction const& i) {
  mbarrier_init(barrier_at(t, i.operands[0]), get<uint32_t>(t, i.operands[1]));
}

void barrier_invalidate(Thread& t, Instruction const& i) { std::memset(barrier_at(t, i.operands[0]), 0xFF, 8); }

// kExpects: expects that many bytes and arrives once; else arrives that many times.
template <bool kExpects>
void barrier_arrive(Thread& t, Instruction const& i) {
  if (i.operands[0].kind != Operand::kSink) throw Error("the emulator does not return the state of an mbarrier");
  uint8_t* const place = barrier_at(t, i.operands[1]);
  uint32_t const number = i.operands.size() > 2 ? get<uint32_t>(t, i.operands[2]) : 1;
  if (kExpects) mbarrier_expect(grid_of(t), place, number);
  mbarrier_arrive(grid_of(t), place, kExpects ? 1 : number);
}

void barrier_expect(Thread& t, Instruction const& i) {
  mbarrier_expect(grid_of(t), barrier_at(t, i.operands[0]), get<uint32_t>(t, i.operands[1]));
}
void barrier_complete(Thread& t, Instruction const& i) {
  mbarrier_complete(grid_of(t), barrier_at(t, i.operands[0]), get<uint32_t>(t, i.operands[1]));
}

void barrier_test(Thread& t, Instruction const& i) {
  bool const done = mbarrier_done(barrier_at(t, i.operands[1]), get<uint32_t>(t, i.operands[2]));
  put<bool>(t, i.operands[0], done);
  if (!done) t.yields = true;
}

constexpr Form kForms[] = {
    {"bra", "uni", 0, 0, always<branch>},
    {"ret", "uni", 0, 0, always<exit_thread>},
    {"exit", "", 0, 0, always<exit_thread>},
    {"trap", "", 0, 0, always<trap>},
    {"nanosleep", "", 1, 1, always<pause>},
    {"bar.sync", "", 1, 2, always<block_barrier<true>>},
    {"bar.arrive", "", 2, 2, always<block_barrier<false>>},
    {"barrier.sync", "aligned", 1, 2, always<block_barrier<true>>},
    {"barrier.arrive", "aligned", 2, 2, always<block_barrier<false>>},
    {"barrier.cluster.arrive", "release relaxed aligned", 0, 0, always<cluster_arrive>},
    {"barrier.cluster.wait", "acquire aligned", 0, 0, always<cluster_wait>},

    {"mbarrier.init", SHARED, 2, 2, always<barrier_init>},
    {"mbarrier.inval", SHARED, 1, 1, always<barrier_invalidate>},
    {"mbarrier.arrive", SPACES SCOPES "release", 2, 3, always<barrier_arrive<false>>},
    {"mbarrier.arrive.expect_tx", SPACES SCOPES "release", 3, 3, always<barrier_arrive<true>>},
    {"mbarrier.expect_tx", SPACES SCOPES, 2, 2, always<barrier_expect>},
    {"mbarrier.complete_tx", SPACES SCOPES, 2, 2, always<barrier_complete>},
    {"mbarrier.test_wait.parity", SHARED " " SCOPES "acquire", 3, 3, always<barrier_test>},
    {"mbarrier.try_wait.parity", SHARED " " SCOPES "acquire", 3, 4, always<barrier_test>},

    // Orderings and hints do nothing: this machine runs everything in order but what it defers on purpose.
    {"fence", "acq_rel sc acquire release proxy async mbarrier_init " SPACES SCOPES, 0, 0, always<nothing>},
    {"membar", "cta gl sys", 0, 0, always<nothing>},
    {"prefetch", "tensormap global local param const L1 L2", 1, 1, always<nothing>},
    {"griddepcontrol", "wait launch_dependents", 0, 0, always<nothing>},
    {"setmaxnreg", "inc dec sync aligned", 1, 1, always<nothing>},
};

}  // namespace

std::span<Form const> control_forms() { return kForms; }

}  // namespace emulator

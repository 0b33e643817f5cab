// The shapes of AMX's tile registers while a kernel runs.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

// Eight tiles of 64 bytes by up to 16 rows. A thread's configuration belongs to whoever set it, and other libraries set
// theirs once and rely on it (oneDNN does). So it is saved, and restored at the end.
class TileConfiguration {
 public:
  // `tokens`: the rows of the tiles 0 to 5, which hold sums (0 to 3) and activations. 6 and 7 hold weights.
  explicit TileConfiguration(int64_t tokens) {
    asm volatile("" ::: "memory");  // or the zeros in `previous_` might be written after it
    _tile_storeconfig(&previous_);
    asm volatile("" ::: "memory");
    Registers registers;
    registers.palette = 1;
    for (int i = 0; i < 8; ++i) {
      registers.row_bytes[i] = 64;
      registers.rows[i] = static_cast<uint8_t>(i < 6 ? tokens : 16);
    }
    asm volatile("" ::: "memory");
    _tile_loadconfig(&registers);
  }
  ~TileConfiguration() {
    if (previous_.palette)
      _tile_loadconfig(&previous_);
    else
      _tile_release();
  }
  TileConfiguration(const TileConfiguration&) = delete;
  TileConfiguration& operator=(const TileConfiguration&) = delete;

 private:
  struct alignas(64) Registers {
    uint8_t palette = 0, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };
  static_assert(sizeof(Registers) == 64, "what ldtilecfg reads");
  Registers previous_;
};

// Between writing memory and loading tiles from it, or storing tiles and reading them: GCC's tile instructions do not
// say that they touch memory, and it would move others across them.
[[gnu::always_inline]] inline void tile_barrier() { asm volatile("" ::: "memory"); }

}  // namespace

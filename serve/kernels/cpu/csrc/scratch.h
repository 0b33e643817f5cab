// Memory that a thread uses again and again.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace ria {

// Grows to the largest size ever needed and is kept. What it held is lost when it grows.
class Scratch {
 public:
  uint8_t* bytes(int64_t count) {
    if (count > capacity_) {
      capacity_ = 0;
      buffer_.reset(static_cast<uint8_t*>(std::aligned_alloc(64, (count + 63) / 64 * 64)));
      if (!buffer_) throw std::bad_alloc();
      capacity_ = count;
    }
    return buffer_.get();
  }

 private:
  struct Free {
    void operator()(uint8_t* p) const { std::free(p); }
  };
  std::unique_ptr<uint8_t, Free> buffer_;
  int64_t capacity_ = 0;
};

}  // namespace ria

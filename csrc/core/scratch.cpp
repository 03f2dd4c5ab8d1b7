#include "scratch.h"

#include <cstdlib>
#include <new>

namespace pyaccel {
namespace {

struct Block {
  void* data = nullptr;
  size_t bytes = 0;
  ~Block() { std::free(data); }
};

}  // namespace

void* scratch(int slot, size_t bytes) {
  static thread_local Block blocks[4];
  Block& block = blocks[slot];
  if (block.bytes < bytes) {
    std::free(block.data);
    block = {};
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    block.data = std::aligned_alloc(4096, rounded);
    if (block.data == nullptr) throw std::bad_alloc();
    block.bytes = rounded;
  }
  return block.data;
}

}  // namespace pyaccel

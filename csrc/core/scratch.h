// Scratch memory of a kernel: one block a thread, grown when needed and kept, aligned to a page.
#pragma once
#include <cstddef>

namespace pyaccel {

// The calling thread's block number `slot` (0..3), at least `bytes` long. Contents are undefined.
// Throws std::bad_alloc.
void* scratch(int slot, size_t bytes);

}  // namespace pyaccel

// Keeping freed memory for the next tensor of the same size, in place of giving it back to the system.
#pragma once

namespace pyaccel {

// From now on the C allocator keeps and reuses large blocks of this process. By default glibc maps every block above
// 32 MiB anew, and the first touch of fresh pages costs several times what a kernel costs. Returns whether it took effect.
bool recycle_memory();

// Gives freed memory back to the system now. Returns whether any was.
bool release_memory();

}  // namespace pyaccel

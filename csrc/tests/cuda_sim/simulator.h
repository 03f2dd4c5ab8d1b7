// The one definition of the simulator's shared memory, and a way to expect that it aborts. Included by each test
// program.
#pragma once
#include <sys/wait.h>
#include <unistd.h>

#include "../../core/cuda_vector.h"

namespace pyaccel::cuda {
uint4 shared_memory[(sim::kShared + sim::kGuard) / sizeof(uint4)];  // what dynamic_shared() declares
}

namespace sim {

char* shared_memory() {
  return reinterpret_cast<char*>(pyaccel::cuda::shared_memory);
}

template <class F>
bool aborts(const F& run) {
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    std::freopen("/dev/null", "w", stderr);
    run();
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT;
}

}  // namespace sim

// From a binding to the kernel of the device on which its tensors lie; other Python threads run meanwhile.
#pragma once
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "isa.h"
#include "tensor.h"

// Where `tensor` lies on a GPU: cuda::function(arguments..., device, stream) of the family, and return from the binding.
#ifdef PYACCEL_CUDA
#define PYACCEL_ON(tensor, function, ...)                                 \
  if ((tensor).on_cuda()) {                                               \
    void* const on_stream = ::pyaccel::current_stream(tensor);            \
    pybind11::gil_scoped_release release;                                 \
    cuda::function(__VA_ARGS__, (tensor).device.id, on_stream);           \
    return;                                                               \
  }
#else
#define PYACCEL_ON(tensor, function, ...) \
  if ((tensor).on_cuda()) throw std::runtime_error("this build of pyaccel has no CUDA kernels (see python -m pyaccel doctor)");
#endif

// function(parameters) of the family, for the instruction set in use.
#define PYACCEL_RUN(function, parameters)   \
  {                                         \
    pybind11::gil_scoped_release release;   \
    PYACCEL_CALL(function(parameters));     \
  }

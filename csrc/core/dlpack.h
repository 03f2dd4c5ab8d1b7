// The part of the DLPack 1.x C ABI that reaches a kernel: a borrowed tensor view and the table of functions
// that an array library publishes on its tensor type (`__dlpack_c_exchange_api__`, DLPack 1.3).
// Declared here, field by field, so that nothing of torch is needed to build.
#pragma once
#include <cstdint>

namespace pyaccel::dlpack {

struct Version {
  uint32_t major;
  uint32_t minor;
};
constexpr uint32_t kMajor = 1;  // the major version whose structs these are

enum DeviceType : int32_t { kCPU = 1, kCUDA = 2, kCUDAHost = 3 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6 };

struct Device {
  int32_t type;
  int32_t id;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct ExchangeHeader {
  Version version;
  ExchangeHeader* previous;  // an older table, should the newest one be of a later major version
};

struct ExchangeApi {
  ExchangeHeader header;
  void* allocate;             // managed_tensor_allocator
  void* managed_from_object;  // managed_tensor_from_py_object_no_sync
  void* managed_to_object;    // managed_tensor_to_py_object_no_sync
  int (*view_of_object)(void* object, Tensor* out);
  int (*current_stream)(int32_t device_type, int32_t device_id, void** out);
};

}  // namespace pyaccel::dlpack

// The functions of torch's stable C interface (torch 2.10 and later) that the operators need. They are declared here so
// that the library builds without torch and one binary serves every version.
#pragma once
#include <cstdint>

extern "C" {
using AOTITorchError = int32_t;
using AtenTensorHandle = struct AtenTensorOpaque*;
using TorchLibraryHandle = struct TorchLibraryOpaque*;
using StableIValue = uint64_t;  // an int64, a double, a tensor handle, or for an optional: null or a pointer

AOTITorchError aoti_torch_library_init_fragment(const char* ns, const char* file, uint32_t line, TorchLibraryHandle*);
AOTITorchError aoti_torch_library_init_impl(const char* ns, const char* key, const char* file, uint32_t line,
                                            TorchLibraryHandle*);
AOTITorchError aoti_torch_library_def(TorchLibraryHandle, const char* schema);
AOTITorchError aoti_torch_library_impl(TorchLibraryHandle, const char* name,
                                       void (*)(StableIValue* stack, uint64_t inputs, uint64_t outputs));

AOTITorchError aoti_torch_get_data_ptr(AtenTensorHandle, void**);
AOTITorchError aoti_torch_get_dim(AtenTensorHandle, int64_t*);
AOTITorchError aoti_torch_get_sizes(AtenTensorHandle, int64_t**);
AOTITorchError aoti_torch_get_strides(AtenTensorHandle, int64_t**);
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle, int32_t*);
AOTITorchError aoti_torch_get_device_type(AtenTensorHandle, int32_t*);
AOTITorchError aoti_torch_is_contiguous(AtenTensorHandle, bool*);
AOTITorchError aoti_torch_empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                        int32_t device_type, int32_t device_index, AtenTensorHandle*);
AOTITorchError aoti_torch_copy_(AtenTensorHandle self, AtenTensorHandle source, int32_t non_blocking);
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle);
int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_dtype_float16();
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_int32();
int32_t aoti_torch_dtype_int64();
int32_t aoti_torch_dtype_int8();
int32_t aoti_torch_dtype_uint8();

AOTITorchError torch_get_num_threads(uint32_t*);
AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain,
                                  void (*)(int64_t begin, int64_t end, void* context), void* context);
}

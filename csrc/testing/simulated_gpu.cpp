// Two CUDA devices for a build of torch that has none, so that launchers and whole jobs run on
// tensors that say they are on `cuda`. What has no kernel here runs on copies on the host;
// liar_ext's own kernels run by the host shim (simulated_launchers.cpp). Host code that touches a
// tensor's memory ends in a segmentation fault, as it does on a GPU.
//
// Built as libtorch_cuda.so, whose name and one function the launchers look for, and loaded before
// torch: getAccelerator and isAccelerator below are to be found before those of a CPU build, which
// know of no accelerator.
#include <ATen/DeviceAccelerator.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/util/ScopeExit.h>
#include <torch/library.h>

#include <atomic>

#include "device_memory.h"

#define LIAR_EXPORT __attribute__((visibility("default")))

namespace {

using liar::testing::DeviceMemory;

constexpr c10::DeviceIndex kDevices = 2;
thread_local c10::DeviceIndex current = 0;

DeviceMemory& memory(int device) {
  static DeviceMemory all[kDevices];
  return all[device];
}

struct Allocator final : c10::Allocator {
  struct Block {
    int device;
    void* data;
  };
  c10::DataPtr allocate(std::size_t bytes) override {
    const c10::Device device(c10::kCUDA, current);
    if (bytes == 0) return {nullptr, device};
    void* data = memory(current).allocate(bytes);
    return {data, new Block{current, data}, &release, device};
  }
  static void release(void* context) {
    const std::unique_ptr<Block> block(static_cast<Block*>(context));
    memory(block->device).release(block->data);
  }
  void copy_data(void*, const void*, std::size_t) const override {
    TORCH_CHECK(false, "simulated GPU: no copies of bare storage");
  }
} allocator;

// Everything runs at once, so streams are all the same, and events have nothing to wait for.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = c10::kCUDA;
  c10::DeviceType type() const override { return c10::kCUDA; }
  c10::Device exchangeDevice(c10::Device d) const override {
    return {c10::kCUDA, std::exchange(current, d.index())};
  }
  c10::Device getDevice() const override { return {c10::kCUDA, current}; }
  void setDevice(c10::Device d) const override { current = d.index(); }
  void uncheckedSetDevice(c10::Device d) const noexcept override { current = d.index(); }
  c10::Stream getStream(c10::Device d) const override {
    return c10::Stream(c10::Stream::DEFAULT, d);
  }
  c10::Stream getDefaultStream(c10::Device d) const override { return getStream(d); }
  c10::Stream exchangeStream(c10::Stream s) const override { return getStream(s.device()); }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// torch looks for a class of this name.
struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex current_device() const override { return current; }
  int getNumGPUs() const override { return kDevices; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &allocator; }
  void deviceSynchronize(c10::DeviceIndex) const override {}
};
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks)

const c10::DispatchKeySet kKeys(c10::DispatchKey::CUDA);

c10::Device or_current(std::optional<at::Device> device) {
  return device && device->has_index() ? *device : c10::Device(c10::kCUDA, current);
}

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype,
                 std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>,
                 std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(or_current(device));
  return at::detail::empty_generic(size, &allocator, kKeys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride,
                         std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<at::Device> device, std::optional<bool>) {
  const c10::DeviceGuard guard(or_current(device));
  return at::detail::empty_strided_generic(size, stride, &allocator, kKeys,
                                           c10::dtype_or_default(dtype));
}

// A tensor's memory as a tensor of the host, for its lifetime; itself if it is one.
class SeenByHost {
 public:
  explicit SeenByHost(const at::Tensor& t) : seen_(t) {
    if (!t.is_cuda() || t.numel() == 0) return;
    const auto& storage = t.storage();
    open_.emplace(memory(t.device().index()), storage.data(), storage.nbytes());
    seen_ = at::from_blob(const_cast<void*>(t.const_data_ptr()), t.sizes(), t.strides(),
                          at::TensorOptions(t.dtype()));
  }
  at::Tensor& operator*() { return seen_; }

 private:
  at::Tensor seen_;
  std::optional<DeviceMemory::Open> open_;
};

std::atomic<int64_t> waits{0};      // for a value to reach the host
thread_local bool copying = false;  // for an operator that has no kernel here: nobody waits

at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool) {
  if (self.numel() == 0) return self;
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  at::Tensor between = source;
  if (self.is_cuda() && source.is_cuda()) between = (*SeenByHost(source)).clone();
  if (!self.is_cuda() && !copying) ++waits;
  SeenByHost to(self), from(between);
  (*to).copy_(*from);
  return self;
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& to, bool non_blocking) {
  at::Tensor target = to;
  return copy_(target, self, non_blocking);
}

const at::Tensor& resize_(const at::Tensor& self, at::IntArrayRef size,
                          std::optional<at::MemoryFormat>) {
  const at::Tensor before = self.detach();
  const c10::DeviceGuard guard(self.device());
  const at::Tensor after =
      at::detail::empty_generic(size, &allocator, kKeys, self.scalar_type(), std::nullopt);
  const int64_t common = std::min(before.numel(), after.numel());
  after.view(-1).narrow(0, 0, common).copy_(before.reshape(-1).narrow(0, 0, common));
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(after.storage());
  impl->set_sizes_and_strides(after.sizes(), after.strides(), 0);
  return self;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& to) {
  if (to.sizes() != self.sizes()) to.resize_(self.sizes());
  return copy_from(self, to, false);
}

at::Scalar local_scalar_dense(const at::Tensor& self) {
  ++waits;
  SeenByHost seen(self);
  return at::_local_scalar_dense(*seen);
}

at::Tensor& set_storage(at::Tensor& self, at::Storage storage, int64_t offset, at::IntArrayRef size,
                        at::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_sizes_and_strides(size, stride, offset);
  return self;
}

// The rule of CUDA's kernels: one device for all arguments, but for numbers. Indices may come from
// the host; they come as optional tensors, which are not looked at.
void check_devices(const std::string& name, const torch::jit::Stack& arguments) {
  std::optional<c10::Device> device;
  const auto check = [&](const at::Tensor& t) {
    if (!t.defined() || (t.is_cpu() && t.dim() == 0)) return;
    if (!device) device = t.device();
    TORCH_CHECK(*device == t.device(), name,
                ": Expected all tensors to be on the same device, got ", *device, " and ",
                t.device());
  };
  for (const c10::IValue& argument : arguments) {
    if (argument.isTensor()) check(argument.toTensor());
    if (argument.isTensorList()) {
      for (const at::Tensor& t : argument.toTensorVector()) check(t);
    }
  }
}

void on_copies(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  check_devices(op.schema().name(), torch::jit::last(*stack, op.schema().arguments().size()).vec());
  const auto restore = c10::make_scope_exit([before = copying] { copying = before; });
  copying = true;
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_copies>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("copy_", &copy_);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("resize_", &resize_);
  m.impl("_local_scalar_dense", &local_scalar_dense);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("unfold", &at::native::unfold);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
}

const int registered = (c10::SetAllocator(c10::kCUDA, &allocator), 0);

void* const kStreams[kDevices] = {const_cast<int*>(&registered), &allocator};  // any two addresses

}  // namespace

namespace at::accelerator {

LIAR_EXPORT std::optional<c10::DeviceType> getAccelerator(bool) { return c10::kCUDA; }
LIAR_EXPORT bool isAccelerator(c10::DeviceType type) { return type == c10::kCUDA; }

}  // namespace at::accelerator

extern "C" {

// torch's own function of this name is where the launchers get their stream.
LIAR_EXPORT int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  *stream = kStreams[device];
  return 0;
}

// How often the host has waited for a value of a device.
LIAR_EXPORT int64_t liar_count_waits() { return waits; }

// Around each kernel; what the first returns is for the second.
LIAR_EXPORT void* liar_open_memory(int device) { return new DeviceMemory::Open(memory(device)); }
LIAR_EXPORT void liar_close_memory(void* open) { delete static_cast<DeviceMemory::Open*>(open); }
}

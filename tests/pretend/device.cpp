// Shows torch's CPU build two CUDA devices: streams and guards that do nothing. No memory, no kernels:
// tensors.py holds what they compute. Must be loaded before torch first asks for its CUDA hooks, at `import torch`.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

constexpr c10::DeviceType kCuda = c10::DeviceType::CUDA;
constexpr c10::DeviceIndex kCount = 2;
thread_local c10::DeviceIndex current = 0;
int anything;

c10::DeviceIndex indexOf(c10::Device device) { return device.index() < 0 ? 0 : device.index(); }

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kCuda; }
  c10::Device exchangeDevice(c10::Device device) const override {
    c10::Device before(kCuda, current);
    current = indexOf(device);
    return before;
  }
  c10::Device getDevice() const override { return c10::Device(kCuda, current); }
  void setDevice(c10::Device device) const override { current = indexOf(device); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current = indexOf(device); }
  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getNewStream(c10::Device device, int) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return getStream(stream.device()); }
  c10::DeviceIndex deviceCount() const noexcept override { return kCount; }
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    *event = &anything;
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};

Guard guard;

} // namespace

namespace at {

struct CUDAHooks : CUDAHooksInterface { // the registry looks for this name
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  bool isPinnedPtr(const void*) const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return kCount; }
  DeviceIndex deviceCount() const override { return kCount; }
  DeviceIndex getCurrentDevice() const override { return current; }
};

REGISTER_CUDA_HOOKS(CUDAHooks);

} // namespace at

extern "C" void install() {
  c10::impl::device_guard_impl_registry[static_cast<size_t>(kCuda)].store(&guard);
}

// The current device of the calling thread; autograd sets it in its own threads, one for each device.
extern "C" int current_device() { return current; }

extern "C" int exchange_device(int device) { // as torch's: a negative one changes nothing
  int before = current;
  if (device >= 0) current = static_cast<c10::DeviceIndex>(device);
  return before;
}

// A device for tests of devices without one: memory is the host's and kernels are the CPU's, but torch takes its tensors
// for those of another device. An operation on tensors of both is refused, as CUDA refuses it. It has no sparse tensors,
// no convolutions and no fused cells of recurrent networks.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <set>

namespace {

using at::IValue;
using at::Tensor;
using c10::Device;
using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::Storage;

constexpr auto FAKE = c10::DeviceType::PrivateUse1;
const Device DEVICE(FAKE, 0);

// What torch asks of every device

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return FAKE; }
  Device exchangeDevice(Device) const override { return DEVICE; }
  Device getDevice() const override { return DEVICE; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  c10::Stream getStream(Device) const override { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
  c10::Stream getDefaultStream(Device) const override { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Generator : at::CPUGeneratorImpl {
  Generator() { move(DEVICE, DispatchKey::PrivateUse1); }
  void move(Device device, DispatchKey key) {
    device_ = device;
    key_set_ = DispatchKeySet(key);
  }
};

struct Allocator final : c10::Allocator {
  at::DataPtr allocate(size_t size) override {
    void* data = size ? std::aligned_alloc(64, (size + 63) / 64 * 64) : nullptr;
    return {data, data, &std::free, DEVICE};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t size) const override { std::memcpy(to, from, size); }
};
Allocator allocator;
REGISTER_ALLOCATOR(FAKE, &allocator);

struct Hooks : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Generator>(); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static const at::Generator generator = at::make_generator<Generator>();
    return generator;
  }
};
const bool registered = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  return true;
}();

// The same memory, seen from the host and from the device

Tensor view(Storage storage, const Tensor& like, DispatchKey key) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), DispatchKeySet(key), like.dtype());
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  tensor._set_conj(like.is_conj());
  tensor._set_neg(like.is_neg());
  return tensor;
}

Storage alias(const Storage& storage, Device device) {
  auto* kept = new Storage(storage);
  at::DataPtr data(const_cast<void*>(storage.data()), kept, [](void* p) { delete static_cast<Storage*>(p); }, device);
  return Storage(Storage::use_byte_size_t(), storage.nbytes(), std::move(data), c10::GetAllocator(device.type()), true);
}

Tensor on_host(const Tensor& tensor) {
  return tensor.device() == DEVICE ? view(alias(tensor.storage(), c10::kCPU), tensor, DispatchKey::CPU) : tensor;
}

// Every operation: check devices, run on the host, hand back

struct Call {
  std::vector<std::pair<Tensor, Tensor>> pairs;  // on the device, on the host
  std::vector<Generator*> generators;
  std::string foreign;

  Tensor give(const Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (tensor.device() != DEVICE) {
      if (tensor.dim() > 0) foreign = tensor.toString();
      return tensor;
    }
    for (auto& [device, host] : pairs)
      if (device.is_same(tensor)) return host;
    pairs.emplace_back(tensor, on_host(tensor));
    return pairs.back().second;
  }

  IValue give(const IValue& value) {
    if (value.isTensor()) return give(value.toTensor());
    if (value.isDevice() && value.toDevice() == DEVICE) return Device(c10::kCPU);
    if (value.isTensorList()) {
      c10::List<Tensor> given;
      for (const Tensor& tensor : value.toTensorVector()) given.push_back(give(tensor));
      return given;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> given;
      for (const std::optional<Tensor>& tensor : value.toOptionalTensorVector())
        given.push_back(tensor ? std::optional<Tensor>(give(*tensor)) : tensor);
      return given;
    }
    if (value.isGenerator() && value.toGenerator().device() == DEVICE)
      generators.push_back(static_cast<Generator*>(value.toGenerator().unsafeGetGeneratorImpl()));
    return value;
  }

  Tensor take(const Tensor& host) {
    if (!host.defined() || host.device() == DEVICE) return host;
    for (auto& [device, given] : pairs) {
      if (!given.is_same(host)) continue;
      auto* tensor = device.unsafeGetTensorImpl();
      if (host.storage().data() != device.storage().data())
        tensor->set_storage_keep_dtype(alias(host.storage(), DEVICE));
      if (host.sizes() != device.sizes() || host.strides() != device.strides())
        tensor->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
      return device;
    }
    for (auto& [device, given] : pairs)
      if (given.storage().unsafeGetStorageImpl() == host.storage().unsafeGetStorageImpl())
        return view(device.storage(), host, DispatchKey::PrivateUse1);
    return view(alias(host.storage(), DEVICE), host, DispatchKey::PrivateUse1);
  }

  IValue take(const IValue& value) {
    if (value.isTensor()) return take(value.toTensor());
    if (!value.isTensorList()) return value;
    c10::List<Tensor> taken;
    for (const Tensor& tensor : value.toTensorVector()) taken.push_back(take(tensor));
    return taken;
  }
};

void run(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  static const std::set<std::string> take_indices_of_the_host = {
      "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"};
  const auto& schema = op.schema();
  Call call;
  for (size_t i = stack->size() - schema.arguments().size(); i < stack->size(); ++i) (*stack)[i] = call.give((*stack)[i]);
  TORCH_CHECK(
      call.pairs.empty() || call.foreign.empty() || take_indices_of_the_host.count(schema.name()),
      "Expected all tensors to be on the same device, but found fake and ", call.foreign, " in ", schema.name());
  auto move = [&](Device device, DispatchKey key) {
    for (auto* generator : call.generators) generator->move(device, key);
  };
  move(Device(c10::kCPU), DispatchKey::CPU);
  try {
    op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
  } catch (...) {
    move(DEVICE, DispatchKey::PrivateUse1);
    throw;
  }
  move(DEVICE, DispatchKey::PrivateUse1);
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i) (*stack)[i] = call.take((*stack)[i]);
}

// What the host cannot do for the device

using Sizes = c10::SymIntArrayRef;
using Type = std::optional<at::ScalarType>;
using Layout = std::optional<at::Layout>;
using Flag = std::optional<bool>;

Tensor empty(Sizes sizes, Type type, Layout, std::optional<Device>, Flag, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(
      C10_AS_INTARRAYREF_SLOW(sizes), &allocator, DispatchKeySet(DispatchKey::PrivateUse1),
      at::dtype_or_default(type), format);
}

Tensor empty_strided(Sizes sizes, Sizes strides, Type type, Layout, std::optional<Device>, Flag) {
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides), &allocator,
      DispatchKeySet(DispatchKey::PrivateUse1), at::dtype_or_default(type));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  on_host(to).copy_(on_host(from));
  return to;
}

Tensor& set_storage(Tensor& tensor, Storage storage, c10::SymInt offset, Sizes sizes, Sizes strides) {
  auto* given = tensor.unsafeGetTensorImpl();
  given->set_storage_keep_dtype(std::move(storage));
  given->set_sizes_and_strides(
      C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides), offset.expect_int());
  return tensor;
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&run>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("_copy_from", copy_from);
  library.impl("set_.source_Storage_storage_offset", set_storage);
}

// A GPU for tests on machines that have none. Tensors say cuda:0 (mps:0 if FAKE_GPU is "mps") and are computed by the
// CPU: one kernel for all operators hands them over as CPU tensors of the same memory, and the results back. It refuses
// what a GPU refuses: CPU tensors among its own, more memory than FAKE_GPU_BYTES, on Apple's float64 and CTC.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/detail/MPSHooksInterface.h>
#include <ATen/ops/_scaled_dot_product_attention_math.h>
#include <torch/library.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <set>

namespace {

std::string setting(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

const bool is_mps = setting("FAKE_GPU") == "mps";
const at::Device gpu(is_mps ? at::kMPS : at::kCUDA, 0);
const auto key = is_mps ? c10::DispatchKey::MPS : c10::DispatchKey::CUDA;

// ---------------------------------------------------------------- memory

// As PyTorch's caching allocator counts it: in blocks of 512 bytes, and what was freed stays reserved, in segments of
// 2 MiB, until the cache is emptied. There is no fragmentation.
struct Memory {
  std::mutex lock;
  int64_t limit = -1, allocated = 0, peak = 0, reserved = 0;

  void take(int64_t bytes) {
    std::lock_guard<std::mutex> guard(lock);
    if (limit < 0) limit = std::stoll("0" + setting("FAKE_GPU_BYTES"));
    if (limit && allocated + bytes > limit) {
      auto text = setting("FAKE_GPU_ERROR");  // what the libraries beneath PyTorch say is a plain RuntimeError
      TORCH_CHECK(text.empty(), text);
      TORCH_CHECK(!is_mps, "MPS backend out of memory (MPS allocated: ", allocated, ", max allowed: ", limit, ").");
      TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", bytes, " bytes of ", limit);
    }
    allocated += bytes;
    peak = std::max(peak, allocated);
    reserved = std::max(reserved, std::min(limit ? limit : INT64_MAX, (allocated + (2 << 20) - 1) >> 21 << 21));
  }

  void give(int64_t bytes) {
    std::lock_guard<std::mutex> guard(lock);
    allocated -= bytes;
  }
} memory;

struct Block {
  c10::DataPtr data;
  int64_t bytes;
};

// The same bytes, counted as the GPU's until they are let go.
c10::DataPtr counted(c10::DataPtr data, int64_t bytes) {
  bytes = (bytes + 511) / 512 * 512;
  memory.take(bytes);
  void* pointer = data.get();
  auto free = [](void* block) {
    memory.give(static_cast<Block*>(block)->bytes);
    delete static_cast<Block*>(block);
  };
  return {pointer, new Block{std::move(data), bytes}, free, gpu};
}

// A DataPtr to the memory of a storage that keeps the storage.
c10::DataPtr kept(const at::Storage& storage, at::Device device) {
  auto free = [](void* held) { delete static_cast<at::Storage*>(held); };
  return {storage.mutable_data(), new at::Storage(storage), free, device};
}

struct Allocator : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    return counted(c10::GetAllocator(at::kCPU)->allocate(bytes), bytes);
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
} allocator;

std::mutex pinned_lock;
std::map<const char*, size_t> pinned;  // where each block of pinned memory starts, and its bytes
c10::Dict<std::string, int64_t> counts;  // of blocks pinned so far, and of products in each precision
void count(const std::string& what) { counts.insert_or_assign(what, (counts.contains(what) ? counts.at(what) : 0) + 1); }

struct PinnedAllocator : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    std::lock_guard<std::mutex> guard(pinned_lock);
    char* block = static_cast<char*>(std::malloc(bytes + 64));
    pinned[block] = bytes;
    count("pinned");
    auto free = [](void* block) {
      std::lock_guard<std::mutex> guard(pinned_lock);
      pinned.erase(static_cast<char*>(block));
      std::free(block);
    };
    return {block, block, free, at::kCPU};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
} pinned_allocator;

// ---------------------------------------------------------------- what PyTorch asks a backend

struct Guard : c10::impl::DeviceGuardImplInterface {
  at::DeviceType type() const override { return gpu.type(); }
  at::Device exchangeDevice(at::Device) const override { return gpu; }
  at::Device getDevice() const override { return gpu; }
  void setDevice(at::Device) const override {}
  void uncheckedSetDevice(at::Device) const noexcept override {}
  c10::Stream getStream(at::Device) const override { return c10::Stream(c10::Stream::DEFAULT, gpu); }
  c10::Stream getDefaultStream(at::Device) const override { return c10::Stream(c10::Stream::DEFAULT, gpu); }
  c10::Stream exchangeStream(c10::Stream) const override { return c10::Stream(c10::Stream::DEFAULT, gpu); }
  at::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const at::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

template <typename Interface>
struct Hooks : Interface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(at::DeviceIndex) const override { return true; }
  at::DeviceIndex deviceCount() const override { return 1; }
  at::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(at::DeviceIndex) const override {}
  at::DeviceIndex exchangeDevice(at::DeviceIndex) const override { return 0; }
  at::DeviceIndex maybeExchangeDevice(at::DeviceIndex) const override { return 0; }
};

struct Cuda : Hooks<at::CUDAHooksInterface> {
  bool hasCUDA() const override { return true; }
  int getNumGPUs() const override { return 1; }
  at::DeviceIndex current_device() const override { return 0; }
  at::Device getDeviceFromPtr(void*) const override { return gpu; }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  bool isPinnedPtr(const void* pointer) const override {
    std::lock_guard<std::mutex> guard(pinned_lock);
    auto after = pinned.upper_bound(static_cast<const char*>(pointer));
    return after != pinned.begin() && pointer <= std::prev(after)->first + std::prev(after)->second;
  }
};

struct Apple : Hooks<at::MPSHooksInterface> {
  bool hasMPS() const override { return true; }
};

// ---------------------------------------------------------------- one kernel for all operators

// A tensor of these bytes without a copy, with the sizes, strides and type of another.
template <typename... Kind>
at::Tensor tensor_of(at::Storage storage, const at::Tensor& like, c10::DispatchKeySet keys, Kind... kind) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(kind..., std::move(storage), keys, like.dtype());
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return tensor;
}

at::Storage storage_of(c10::DataPtr data, size_t bytes, c10::Allocator* allocator) {
  return {at::Storage::use_byte_size_t(), bytes, std::move(data), allocator, true};
}

auto generator = at::detail::createCPUGenerator(0);  // of the GPU, in the place of the CPU's where it draws

struct Drawing {
  at::Generator cpu = at::detail::getDefaultCPUGenerator();
  at::Tensor before = cpu.get_state();
  Drawing() { cpu.set_state(generator.get_state()); }
  ~Drawing() {
    generator.set_state(cpu.get_state());
    cpu.set_state(before);
  }
};

struct Call {
  std::vector<std::pair<at::Tensor, at::Tensor>> given;         // GPU tensors, and the CPU's of the same memory
  std::map<c10::StorageImpl*, at::Storage> made;                // of results: the CPU's, and the GPU's
  bool cpu_joins = false;

  at::Tensor on_cpu(const at::Tensor& tensor) {
    if (!tensor.defined() || tensor.device() != gpu) {
      cpu_joins |= tensor.defined() && tensor.dim() > 0;
      return tensor;
    }
    for (auto& [on_gpu, on_cpu] : given)
      if (on_gpu.is_same(tensor)) return on_cpu;
    auto storage = tensor.storage();
    auto same = storage_of(kept(storage, at::kCPU), storage.nbytes(), c10::GetAllocator(at::kCPU));
    given.emplace_back(tensor, tensor_of(same, tensor, c10::DispatchKeySet(c10::DispatchKey::CPU)));
    return given.back().second;
  }

  at::Tensor on_gpu(const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    for (auto& [on_gpu, on_cpu] : given) {
      if (on_cpu.is_same(tensor)) return on_gpu;
      if (on_cpu.storage().is_alias_of(tensor.storage())) 
        return tensor_of(on_gpu.storage(), tensor, on_gpu.key_set(), c10::TensorImpl::VIEW);
    }
    auto storage = tensor.storage();
    auto& found = made[storage.unsafeGetStorageImpl()];
    TORCH_CHECK_TYPE(!is_mps || tensor.scalar_type() != at::kDouble,
        "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. "
        "Please use float32 instead.");
    if (!found) found = storage_of(counted(kept(storage, at::kCPU), storage.nbytes()), storage.nbytes(), &allocator);
    return tensor_of(found, tensor, c10::DispatchKeySet(key));
  }

  // Operators that resize what they write, or change its shape.
  void follow() {
    for (auto& [on_gpu, on_cpu] : given) {
      auto storage = on_gpu.storage();
      if (on_cpu.storage().data() != storage.data()) {
        auto bytes = on_cpu.storage().nbytes();
        storage.set_data_ptr_noswap(counted(kept(on_cpu.storage(), at::kCPU), bytes));
        storage.set_nbytes(bytes);
      }
      if (on_cpu.sizes() != on_gpu.sizes() || on_cpu.strides() != on_gpu.strides())
        on_gpu.unsafeGetTensorImpl()->set_sizes_and_strides(on_cpu.sizes(), on_cpu.strides(), on_cpu.storage_offset());
    }
  }

  void convert(c10::IValue& value, bool to_cpu) {
    auto other = [&](const at::Tensor& tensor) { return to_cpu ? on_cpu(tensor) : on_gpu(tensor); };
    if (value.isTensor()) {
      value = other(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> tensors;
      for (const at::Tensor& tensor : value.toTensorVector()) tensors.push_back(other(tensor));
      value = tensors;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> tensors;
      for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorList())
        tensors.push_back(tensor ? std::optional<at::Tensor>(other(*tensor)) : std::nullopt);
      value = tensors;
    } else if (value.isDevice()) {
      value = at::Device(at::kCPU);
    }
  }
};

// Where a GPU takes a CPU tensor beside its own.
const std::set<std::string> mixing = {"aten::copy_", "aten::index", "aten::_index_put_impl_"};
const std::set<std::string> ctc = {"aten::_ctc_loss", "aten::_ctc_loss_backward"};
const std::set<std::string> products = {"aten::mm", "aten::addmm", "aten::bmm", "aten::convolution"};

void run(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& name = schema.name();
  auto arguments = torch::jit::last(*stack, schema.arguments().size());
  const size_t first = stack->size() - arguments.size();
  TORCH_CHECK_NOT_IMPLEMENTED(!is_mps || !ctc.count(name),
      "The operator '", name, "' is not currently implemented for the MPS device.");
  if (name == "aten::_use_cudnn_ctc_loss" || name == "aten::_use_miopen_ctc_loss") {  // asked on a GPU alone
    torch::jit::drop(*stack, arguments.size());
    return stack->emplace_back(false), void();
  }
  if (name == "aten::_ctc_loss_backward") at::globalContext().alertNotDeterministic("ctc_loss_backward_gpu");
  Call call;
  for (size_t index = first; index < stack->size(); ++index) call.convert((*stack)[index], true);
  TORCH_CHECK(!call.cpu_joins || call.given.empty() || mixing.count(name), "Expected all tensors to be on the same ",
      "device, but found at least two devices, ", gpu, " and cpu! (in ", name, ")");
  // On a GPU the softmax of float16 can be float32 at once.
  bool to_half = false;
  if (name == "aten::_softmax" || name == "aten::_log_softmax") {
    auto& widen = (*stack)[first + 2];
    if (widen.toBool()) (*stack)[first] = (*stack)[first].toTensor().to(at::kFloat);
    widen = false;
  } else if (name == "aten::_softmax_backward_data" || name == "aten::_log_softmax_backward_data") {
    auto& type = (*stack)[first + 3];
    to_half = type.toScalarType() == at::kHalf && (*stack)[first].toTensor().scalar_type() == at::kFloat;
    if (to_half) type = at::kFloat;
  }
  {
    c10::impl::ExcludeDispatchKeyGuard below(c10::autograd_dispatch_keyset_with_ADInplaceOrView);
    std::optional<Drawing> drawing;
    if (op.hasTag(at::Tag::nondeterministic_seeded)) drawing.emplace();
    op.callBoxed(stack);
  }
  if (products.count(name)) count(c10::toString(stack->back().toTensor().scalar_type()));
  if (to_half) stack->back() = stack->back().toTensor().to(at::kHalf);
  call.follow();
  for (size_t index = stack->size() - schema.returns().size(); index < stack->size(); ++index)
    call.convert((*stack)[index], false);
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size,
    at::IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return self;
}

at::Tensor& set_whole_storage(at::Tensor& self, at::Storage source) {
  const int64_t size = source.nbytes() / self.itemsize();
  return set_storage(self, std::move(source), 0, size, 1);
}

// PyTorch asks which way a device prefers, and only a build for Apple may ask one of Apple's.
at::Tensor attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const std::optional<at::Tensor>& mask, double dropout, bool causal, std::optional<double> scale, bool grouped) {
  auto added = mask;  // what is added to the scores: 0, and minus infinity where the mask is false
  if (mask && mask->scalar_type() == at::kBool) added = mask->to(query.scalar_type()).log();
  return std::get<0>(at::_scaled_dot_product_attention_math(
      query, key, value, added, dropout, causal, std::nullopt, scale, grouped));
}

#define BOXED torch::CppFunction::makeFromBoxedFunction<&run>()

void kernels(torch::Library& all, torch::Library& aten) {
  all.fallback(BOXED);
  // PyTorch has code for any backend for these, which asks for kernels of this one, or writes into a tensor of its own.
  for (const char* name : {"copy_", "convolution", "convolution_backward", "_softmax", "_log_softmax",
           "_softmax_backward_data", "_log_softmax_backward_data"})
    aten.impl(name, BOXED);
  aten.impl("set_.source_Storage", set_whole_storage);
  aten.impl("set_.source_Storage_storage_offset", set_storage);
}

// Before `import torch`, which asks for the hooks once.
const bool installed = [] {
  if (is_mps) {
    at::MPSHooksRegistry()->Register("MPSHooks", []() -> std::unique_ptr<at::MPSHooksInterface> { return std::make_unique<Apple>(); });
  } else {
    at::CUDAHooksRegistry()->Register("CUDAHooks", [](at::CUDAHooksArgs) -> std::unique_ptr<at::CUDAHooksInterface> { return std::make_unique<Cuda>(); });
  }
  static Guard guard;
  c10::impl::registerDeviceGuard(gpu.type(), &guard);
  c10::SetAllocator(gpu.type(), &allocator);
  static torch::Library all(torch::Library::IMPL, "_", key, __FILE__, __LINE__);
  static torch::Library aten(torch::Library::IMPL, "aten", key, __FILE__, __LINE__);
  static torch::Library autograd(torch::Library::IMPL, "aten", c10::DispatchKey::AutogradMPS, __FILE__, __LINE__);
  kernels(all, aten);
  if (is_mps)
    for (auto library : {&aten, &autograd}) library->impl("scaled_dot_product_attention", attention);
  return true;
}();

}  // namespace

TORCH_LIBRARY(fake_gpu, m) {
  m.def("memory", [] { return std::vector<int64_t>{memory.limit, memory.allocated, memory.peak, memory.reserved}; });
  m.def("counts", [] { return counts; });
  m.def("limit", [](int64_t bytes) { memory.limit = bytes; });
  m.def("empty_cache", [] { memory.reserved = (memory.allocated + (2 << 20) - 1) >> 21 << 21; });
  m.def("reset_peak", [] { memory.peak = memory.allocated; });
  m.def("random_state", [] { return generator.get_state(); });
  m.def("set_random_state", [](const at::Tensor& state) { generator.set_state(state); });
  m.def("seed", [](int64_t seed) { generator.set_current_seed(seed); });
}

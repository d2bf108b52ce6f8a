// A GPU for tests on machines that have none. Its tensors say cuda:0 (mps:0 if FAKE_GPU is "mps"), and the CPU computes
// them: one kernel for all operators takes them for CPU tensors of the same memory, and gives its results back as the
// GPU's. It refuses what a GPU refuses: CPU tensors among its own, more memory than there is; Apple's, float64 and CTC.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/detail/MPSHooksInterface.h>
#include <ATen/ops/_scaled_dot_product_attention_math.h>
#include <torch/library.h>

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
const bool apple_falls_back = setting("PYTORCH_ENABLE_MPS_FALLBACK") == "1";  // read once, as PyTorch does
const c10::DispatchKeySet gpu_keys(is_mps ? c10::DispatchKey::MPS : c10::DispatchKey::CUDA);
const c10::DispatchKeySet cpu_keys(c10::DispatchKey::CPU);

// ---------------------------------------------------------------- memory

// As PyTorch's caching allocator counts it: in blocks of 512 bytes, and what was freed stays reserved, in segments of
// 2 MiB, until the cache is emptied. There is no fragmentation.
struct Memory {
  std::mutex lock;
  int64_t limit = -1, allocated = 0, peak = 0, reserved = 0;
  std::map<const char*, size_t> pinned;    // where each block of pinned memory starts, and its bytes
  c10::Dict<std::string, int64_t> counts;  // of blocks pinned so far, and of products so far in each precision

  void take(int64_t bytes) {
    std::lock_guard<std::mutex> guard(lock);
    if (limit < 0) limit = std::stoll("0" + setting("FAKE_GPU_BYTES"));
    if (limit && allocated + bytes > limit) {
      const auto text = setting("FAKE_GPU_ERROR");
      TORCH_CHECK(text.empty(), text);
      TORCH_CHECK(!is_mps, "MPS backend out of memory (MPS allocated: ", allocated, ", max allowed: ", limit, ").");
      TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", bytes, " bytes of ", limit);
    }
    allocated += bytes;
    peak = std::max(peak, allocated);
    reserved = std::max(reserved, segments());
  }

  int64_t segments() const { return (allocated + (2 << 20) - 1) >> 21 << 21; }

  void count(const std::string& what) {
    std::lock_guard<std::mutex> guard(lock);
    counts.insert_or_assign(what, (counts.contains(what) ? counts.at(what) : 0) + 1);
  }
} memory;

struct Held {
  at::Storage storage;
  int64_t bytes;  // of the GPU's memory that it takes
};

// The same memory as another storage's, for another device: what it holds is the GPU's if it is `counted`.
at::Storage same_memory(const at::Storage& storage, at::Device device, bool counted) {
  const int64_t bytes = counted ? (storage.nbytes() + 511) / 512 * 512 : 0;
  memory.take(bytes);
  const auto release = [](void* pointer) {
    auto held = static_cast<Held*>(pointer);
    {
      std::lock_guard<std::mutex> guard(memory.lock);
      memory.allocated -= held->bytes;
    }
    delete held;
  };
  c10::DataPtr data(storage.mutable_data(), new Held{storage, bytes}, release, device);
  return {at::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), c10::GetAllocator(at::kCPU), true};
}

struct PinnedMemory : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    const auto block = static_cast<char*>(std::malloc(bytes + 1));
    memory.count("pinned");
    std::lock_guard<std::mutex> guard(memory.lock);
    memory.pinned[block] = bytes;
    const auto release = [](void* block) {
      std::lock_guard<std::mutex> guard(memory.lock);
      memory.pinned.erase(static_cast<char*>(block));
      std::free(block);
    };
    return {block, block, release, at::kCPU};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
  bool has(const void* pointer) {
    std::lock_guard<std::mutex> guard(memory.lock);
    const auto after = memory.pinned.upper_bound(static_cast<const char*>(pointer));
    return after != memory.pinned.begin() && pointer <= std::prev(after)->first + std::prev(after)->second;
  }
} pinned_memory;

// ---------------------------------------------------------------- what PyTorch asks a backend

struct Guard : c10::impl::DeviceGuardImplInterface {
  const c10::Stream stream = c10::Stream(c10::Stream::DEFAULT, gpu);
  at::DeviceType type() const override { return gpu.type(); }
  at::Device exchangeDevice(at::Device) const override { return gpu; }
  at::Device getDevice() const override { return gpu; }
  void setDevice(at::Device) const override {}
  void uncheckedSetDevice(at::Device) const noexcept override {}
  c10::Stream getStream(at::Device) const override { return stream; }
  c10::Stream exchangeStream(c10::Stream) const override { return stream; }
  at::DeviceIndex deviceCount() const noexcept override { return 1; }
} device_guard;

template <typename Interface>
struct Hooks : Interface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(at::DeviceIndex) const override { return true; }
  at::DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(at::DeviceIndex) const override {}
};

struct Cuda : Hooks<at::CUDAHooksInterface> {
  bool hasCUDA() const override { return true; }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  bool isPinnedPtr(const void* pointer) const override { return pinned_memory.has(pointer); }
};

struct Apple : Hooks<at::MPSHooksInterface> {
  bool hasMPS() const override { return true; }
};

// ---------------------------------------------------------------- one kernel for all operators

// A tensor of such memory with the sizes, strides and type of another one.
template <typename... Kind>
at::Tensor tensor_of(at::Storage storage, const at::Tensor& like, c10::DispatchKeySet keys, Kind... kind) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(kind..., std::move(storage), keys, like.dtype());
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return tensor;
}

struct Call {
  std::vector<std::pair<at::Tensor, at::Tensor>> given;  // GPU tensors, and the CPU's of the same memory
  std::map<c10::StorageImpl*, at::Storage> made;         // of results: the CPU's, and the GPU's
  bool cpu_joins = false;

  at::Tensor on_cpu(const at::Tensor& tensor) {
    if (!tensor.defined() || tensor.device() != gpu) {
      cpu_joins |= tensor.defined() && tensor.dim() > 0;
      return tensor;
    }
    for (auto& [ours, cpus] : given)
      if (ours.is_same(tensor)) return cpus;
    given.emplace_back(tensor, tensor_of(same_memory(tensor.storage(), at::kCPU, false), tensor, cpu_keys));
    return given.back().second;
  }

  at::Tensor on_gpu(const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    for (auto& [ours, cpus] : given) {
      if (cpus.is_same(tensor)) return ours;
      if (cpus.storage().is_alias_of(tensor.storage()))
        return tensor_of(ours.storage(), tensor, ours.key_set(), c10::TensorImpl::VIEW);
    }
    TORCH_CHECK_TYPE(!is_mps || tensor.scalar_type() != at::kDouble, "Cannot convert a MPS Tensor to float64 dtype as ",
        "the MPS framework doesn't support float64. Please use float32 instead.");
    auto& storage = made[tensor.storage().unsafeGetStorageImpl()];
    if (!storage) storage = same_memory(tensor.storage(), gpu, true);
    return tensor_of(storage, tensor, gpu_keys);
  }

  // What operators write into may get other memory, or another shape.
  void follow() {
    for (auto& [ours, cpus] : given) {
      auto storage = ours.storage();
      if (cpus.storage().data() != storage.data()) {
        auto larger = same_memory(cpus.storage(), gpu, true);
        storage.set_nbytes(larger.nbytes());
        storage.set_data_ptr_noswap(std::move(larger.unsafeGetStorageImpl()->mutable_data_ptr()));
      }
      if (cpus.sizes() != ours.sizes() || cpus.strides() != ours.strides())
        ours.unsafeGetTensorImpl()->set_sizes_and_strides(cpus.sizes(), cpus.strides(), cpus.storage_offset());
    }
  }

  void convert(c10::IValue& value, bool to_cpu) {
    const auto other = [&](const at::Tensor& tensor) { return to_cpu ? on_cpu(tensor) : on_gpu(tensor); };
    if (value.isTensor()) {
      value = other(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> tensors;
      for (const at::Tensor& tensor : value.toTensorVector()) tensors.push_back(other(tensor));
      value = tensors;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> tensors;
      for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorList())
        tensors.push_back(tensor ? std::optional(other(*tensor)) : std::nullopt);
      value = tensors;
    } else if (value.isDevice()) {
      value = at::Device(at::kCPU);
    }
  }
};

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

using Names = const std::set<std::string>;
Names mixing = {"aten::copy_", "aten::index", "aten::_index_put_impl_"};  // where a CPU tensor may be
Names ctc = {"aten::_ctc_loss", "aten::_ctc_loss_backward"}, softmax = {"aten::_softmax", "aten::_log_softmax"};
Names softmax_backward = {"aten::_softmax_backward_data", "aten::_log_softmax_backward_data"};
Names asked_of_gpus = {"aten::_use_cudnn_ctc_loss", "aten::_use_miopen_ctc_loss"};
Names products = {"aten::mm", "aten::addmm", "aten::bmm", "aten::convolution"};

void run(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& name = op.schema().name();
  const size_t first = stack->size() - op.schema().arguments().size();
  const auto tensor_at = [&](size_t index) { return (*stack)[index].toTensor(); };
  TORCH_CHECK_NOT_IMPLEMENTED(!is_mps || apple_falls_back || !ctc.count(name), "The operator '", name,
      "' is not currently implemented for the MPS device.");
  if (asked_of_gpus.count(name)) {
    stack->resize(first);
    stack->emplace_back(false);
    return;
  }
  if (name == "aten::_ctc_loss_backward") at::globalContext().alertNotDeterministic("ctc_loss_backward_gpu");
  Call call;
  for (size_t index = first; index < stack->size(); ++index) call.convert((*stack)[index], true);
  TORCH_CHECK(!call.cpu_joins || call.given.empty() || mixing.count(name), "Expected all tensors to be on the same ",
      "device, but found at least two devices, ", gpu, " and cpu! (in ", name, ")");
  bool to_half = false;  // softmax: on a GPU from float16 to float32 at once
  if (softmax.count(name)) {
    if ((*stack)[first + 2].toBool()) (*stack)[first] = tensor_at(first).to(at::kFloat);
    (*stack)[first + 2] = false;
  } else if (softmax_backward.count(name)) {
    to_half = (*stack)[first + 3].toScalarType() == at::kHalf && tensor_at(first).scalar_type() == at::kFloat;
    if (to_half) (*stack)[first + 3] = at::kFloat;
  }
  {
    c10::impl::ExcludeDispatchKeyGuard below(c10::autograd_dispatch_keyset_with_ADInplaceOrView);
    std::optional<Drawing> drawing;
    if (op.hasTag(at::Tag::nondeterministic_seeded)) drawing.emplace();
    op.callBoxed(stack);
  }
  if (to_half) stack->back() = stack->back().toTensor().to(at::kHalf);
  if (products.count(name)) memory.count(c10::toString(stack->back().toTensor().scalar_type()));
  call.follow();
  for (size_t index = stack->size() - op.schema().returns().size(); index < stack->size(); ++index)
    call.convert((*stack)[index], false);
}

at::Tensor& set(at::Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return self;
}

at::Tensor& set_whole(at::Tensor& self, at::Storage source) {
  const int64_t size = source.nbytes() / self.itemsize();
  return set(self, std::move(source), 0, size, 1);
}

// PyTorch asks which way a device prefers, and only a build for Apple may ask one of Apple's.
at::Tensor attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const std::optional<at::Tensor>& mask, double dropout, bool causal, std::optional<double> scale, bool grouped) {
  auto added = mask;  // to the scores: 0, and minus infinity where the mask is false
  if (mask && mask->scalar_type() == at::kBool) added = mask->to(query.scalar_type()).log();
  return std::get<0>(at::_scaled_dot_product_attention_math(
      query, key, value, added, dropout, causal, std::nullopt, scale, grouped));
}

void register_kernels() {
  const auto key = gpu_keys.highestPriorityTypeId();
  static torch::Library all(torch::Library::IMPL, "_", key, __FILE__, __LINE__);
  static torch::Library aten(torch::Library::IMPL, "aten", key, __FILE__, __LINE__);
  static torch::Library autograd(torch::Library::IMPL, "aten", c10::DispatchKey::AutogradMPS, __FILE__, __LINE__);
  all.fallback(torch::CppFunction::makeFromBoxedFunction<&run>());
  // PyTorch has code for any backend for these, which asks for kernels of this one, or writes into a tensor of its own.
  for (const char* name : {"copy_", "convolution", "convolution_backward", "_softmax", "_log_softmax",
           "_softmax_backward_data", "_log_softmax_backward_data"})
    aten.impl(name, torch::CppFunction::makeFromBoxedFunction<&run>());
  aten.impl("set_.source_Storage", set_whole);
  aten.impl("set_.source_Storage_storage_offset", set);
  if (is_mps)
    for (auto library : {&aten, &autograd}) library->impl("scaled_dot_product_attention", attention);
}

// When this library is loaded, which is before `import torch` asks for the hooks, once.
const bool installed = [] {
  if (is_mps) {
    at::MPSHooksRegistry()->Register("MPSHooks", [] { return std::unique_ptr<at::MPSHooksInterface>(new Apple); });
  } else {
    at::CUDAHooksRegistry()->Register(
        "CUDAHooks", [](at::CUDAHooksArgs) { return std::unique_ptr<at::CUDAHooksInterface>(new Cuda); });
  }
  c10::impl::registerDeviceGuard(gpu.type(), &device_guard);
  register_kernels();
  return true;
}();

}  // namespace

TORCH_LIBRARY(fake_gpu, m) {
  m.def("memory", [] { return std::vector<int64_t>{memory.limit, memory.allocated, memory.peak, memory.reserved}; });
  m.def("counts", [] { return memory.counts; });
  m.def("limit", [](int64_t bytes) { memory.limit = bytes; });
  m.def("empty_cache", [] { memory.reserved = memory.segments(); });
  m.def("reset_peak", [] { memory.peak = memory.allocated; });
  m.def("random_state", [] { return generator.get_state(); });
  m.def("set_random_state", [](const at::Tensor& state) { generator.set_state(state); });
  m.def("seed", [](int64_t seed) { generator.set_current_seed(seed); });
}

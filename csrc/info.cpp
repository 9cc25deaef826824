// dfkd_fast._C: build information, supported sizes, and recorded launches with their resources.
#include <cuda_runtime.h>
#include <cxxabi.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "launchers.h"

namespace py = pybind11;

namespace {

py::dict build() {
  py::dict info;
  info["toolkit"] = DFKD_TOOLKIT;
  info["architecture"] = "sm_90a";
  info["commit"] = DFKD_COMMIT;
  return info;
}

// The keyword arguments of a call. Unknown names are errors.
class Options {
 public:
  explicit Options(const py::kwargs& given) : given_(given) {}

  int64_t size(const char* name) const {
    known_.insert(name);
    if (!given_.contains(name)) throw py::type_error("this op needs '" + std::string(name) + "'");
    return given_[name].cast<int64_t>();
  }
  template <typename T>
  T get(const char* name, T otherwise) const {
    known_.insert(name);
    return given_.contains(name) ? given_[name].template cast<T>() : otherwise;
  }
  // The index of a word in a list.
  int one_of(const char* name, const std::vector<std::string>& words) const {
    const auto word = get(name, words[0]);
    const auto found = std::find(words.begin(), words.end(), word);
    if (found == words.end()) throw py::value_error("no " + std::string(name) + " '" + word + "'");
    return static_cast<int>(found - words.begin());
  }
  // A dfkd_dtype, or -1, for which launchers return a reason.
  int dtype(const char* name, const std::string& otherwise = "bfloat16") const {
    const auto word = get(name, otherwise);
    if (word == "float32") return DFKD_FLOAT32;
    return word == "float16" ? DFKD_FLOAT16 : word == "bfloat16" ? DFKD_BFLOAT16 : -1;
  }
  // Whether a gradient is needed; by default it is.
  bool needs_grad(const char* of) const { return get(("needs_grad_" + std::string(of)).c_str(), true); }

  // Called after all options have been read.
  void reject_unknown() const {
    for (const auto& each : given_) {
      const auto name = each.first.cast<std::string>();
      if (known_.count(name) == 0) throw py::type_error("this op takes no '" + name + "'");
    }
  }

 private:
  const py::kwargs& given_;
  mutable std::set<std::string> known_;
};

// A dummy pointer. A launcher that only records checks pointers for null and alignment.
template <typename T = void>
T* dummy(bool needed = true) {
  return needed ? reinterpret_cast<T*>(uintptr_t{1} << 20) : nullptr;
}

int contrastive_loss(const Options& given, bool backward) {
  const int64_t count = given.size("count"), dim = given.size("dim");
  const int64_t row = given.get<int64_t>("row", dim), column = given.get<int64_t>("column", 1);
  const int dtype = given.dtype("dtype");
  const auto temperature = static_cast<float>(given.get("temperature", 0.1));
  const bool symmetric = given.get("symmetric", false), normalize = given.get("normalize", true);
  const int reduction = given.one_of("reduction", {"mean", "sum", "none"});
  if (!backward) {
    given.reject_unknown();
    return dfkd_contrastive_loss(dummy(), dummy(), count, dim, row, column, row, column, dtype, temperature, symmetric,
                                 normalize, reduction, dummy<float>(), dummy<float>(), dummy(), nullptr);
  }
  const bool anchors = given.needs_grad("anchors"), positives = given.needs_grad("positives");
  given.reject_unknown();
  return dfkd_contrastive_loss_backward(dummy<float>(), reduction == DFKD_NONE, dummy(), dummy(), dummy<float>(), count,
                                        dim, row, column, row, column, dtype, temperature, symmetric, normalize,
                                        reduction, dummy(anchors), dummy(positives), dim, 1, dim, 1, dummy(), nullptr);
}

int spatial_attention(const Options& given, bool backward) {
  const int64_t samples = given.size("samples"), channels = given.size("channels"), units = given.size("hidden");
  const int64_t positions = given.size("positions");
  const int dtype = given.dtype("dtype");
  const auto same = given.get<std::string>("dtype", "bfloat16");
  const int weight_dtype = given.dtype("weight_dtype", same), bias_dtype = given.dtype("bias_dtype", same);
  const bool bias = given.get("bias", true);
  const auto scale = static_cast<float>(given.get("scale", 0.05));
  const int form = given.one_of("form", {"spatial", "spatial_mean1", "channel"});
  if (!backward) {
    given.reject_unknown();
    return dfkd_spatial_attention(dummy(), dummy(), dummy(), samples, channels, units, positions, dtype, weight_dtype,
                                  scale, form, dummy(), dummy(), nullptr);
  }
  const bool features = given.needs_grad("features"), hidden = given.needs_grad("hidden");
  const bool weight = given.needs_grad("weight"), to_bias = given.needs_grad("bias");
  given.reject_unknown();
  return dfkd_spatial_attention_backward(dummy(), dummy(), dummy(), dummy(), dummy(), samples, channels, units,
                                         positions, dtype, weight_dtype, bias_dtype, scale, form, dummy(features),
                                         dummy(hidden), dummy(weight), dummy(bias && to_bias), dummy(), nullptr);
}

int high_order_attention(const Options& given, bool backward) {
  const int64_t positions = given.size("positions"), channels = given.size("channels");
  const int64_t hidden = given.size("hidden"), order = given.get<int64_t>("order", 3);
  const int dtype = given.dtype("dtype");
  const int mode = given.one_of("mode", {"joint", "per_order"});
  const int result = given.one_of("result", {"features", "map"});
  if (!backward) {
    given.reject_unknown();
    return dfkd_high_order_attention(dummy(), dummy(), dummy(), positions, channels, hidden, order, dtype, mode, result,
                                     dummy(), nullptr);
  }
  const int form = static_cast<int>(given.get<int64_t>("form", 0));  // the operators use 0
  const bool x = given.needs_grad("x"), proj = given.needs_grad("proj"), out = given.needs_grad("out");
  given.reject_unknown();
  return dfkd_high_order_attention_backward(dummy(), dummy(), dummy(), dummy(), positions, channels, hidden, order,
                                            dtype, mode, result, form, dummy(x), dummy(proj), dummy(out), dummy(),
                                            nullptr);
}

// Records what a launcher would launch. Returns its status.
int record(const std::string& op, const py::kwargs& given, std::vector<dfkd_launch>* launches) {
  using Call = int (*)(const Options&, bool);
  static const std::map<std::string, Call> calls = {{"contrastive_loss", &contrastive_loss},
                                                    {"spatial_attention", &spatial_attention},
                                                    {"high_order_attention", &high_order_attention}};
  const std::string ending = "_backward";
  const bool backward = op.size() > ending.size() && op.compare(op.size() - ending.size(), ending.size(), ending) == 0;
  const auto call = calls.find(backward ? op.substr(0, op.size() - ending.size()) : op);
  if (call == calls.end()) throw py::value_error("no op '" + op + "'");
  launches->resize(64);
  dfkd_record(launches->data(), static_cast<int64_t>(launches->size()));
  const std::unique_ptr<void, void (*)(void*)> end_record(launches, [](void*) { dfkd_record(nullptr, 0); });
  const int status = call->second(Options(given), backward);
  if (dfkd_recorded() > static_cast<int64_t>(launches->size())) throw std::runtime_error("more launches than expected");
  launches->resize(static_cast<size_t>(dfkd_recorded()));
  return status;
}

void require_success(int status) {
  if (status == cudaSuccess) return;
  const auto error = static_cast<cudaError_t>(status);
  (void)cudaGetLastError();
  const bool no_gpu = error == cudaErrorInsufficientDriver || error == cudaErrorNoDevice;
  throw std::runtime_error(no_gpu ? "this needs a GPU and its driver, but none was found"
                                  : "CUDA error " + std::to_string(status) + ": " + cudaGetErrorString(error));
}

// Returns why a launcher does not support a call, or nullopt. A cooperative launch needs one SM per block.
std::optional<std::string> unsupported_reason(const std::string& op, std::optional<int64_t> num_sms,
                                              const py::kwargs& given) {
  std::vector<dfkd_launch> launches;
  const int status = record(op, given, &launches);
  if (status == DFKD_INVALID) return dfkd_unsupported_reason();
  require_success(status);
  for (const dfkd_launch& each : launches) {
    const int64_t blocks = int64_t{each.grid[0]} * each.grid[1] * each.grid[2];
    if (num_sms && each.cooperative && blocks > *num_sms) {
      return op + " takes " + std::to_string(blocks) + " multiprocessors at once; the device has " +
             std::to_string(*num_sms);
    }
  }
  return std::nullopt;
}

std::string demangle(const char* symbol) {
  if (symbol == nullptr) return "unknown";
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> name(abi::__cxa_demangle(symbol, nullptr, nullptr, &status), std::free);
  return status == 0 ? name.get() : symbol;
}

py::tuple to_tuple(const uint32_t (&size)[3]) { return py::make_tuple(size[0], size[1], size[2]); }

std::vector<py::dict> launches(const std::string& op, bool resources, const py::kwargs& given) {
  std::vector<dfkd_launch> found;
  const int status = record(op, given, &found);
  if (status == DFKD_INVALID) throw py::value_error(op + ": " + dfkd_unsupported_reason());
  require_success(status);
  std::vector<py::dict> result;
  for (const dfkd_launch& each : found) {
    py::dict info;
    info["kernel"] = demangle(dfkd_kernel_name(each.kernel));
    info["grid"] = to_tuple(each.grid);
    info["block"] = to_tuple(each.block);
    info["cluster"] = each.cluster;
    info["cooperative"] = each.cooperative != 0;
    info["dynamic_shared"] = each.shared;
    if (resources) {
      dfkd_resources used;
      require_success(dfkd_resources_of(&each, &used));
      const double threads = each.block[0] * each.block[1] * each.block[2];
      info["static_shared"] = used.static_shared;
      info["registers"] = used.registers;
      info["local"] = used.local;
      info["blocks_per_multiprocessor"] = used.blocks_per_multiprocessor;
      info["active_clusters"] = used.active_clusters;
      info["multiprocessors"] = used.multiprocessors;
      info["occupancy"] = used.blocks_per_multiprocessor * threads / used.threads_per_multiprocessor;
    }
    result.push_back(info);
  }
  return result;
}

std::vector<std::string> kernels() {
  std::vector<const char*> symbols(static_cast<size_t>(dfkd_kernel_names(nullptr, 0)));
  dfkd_kernel_names(symbols.data(), static_cast<int64_t>(symbols.size()));
  std::vector<std::string> names(symbols.size());
  std::transform(symbols.begin(), symbols.end(), names.begin(), demangle);
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Build information, supported sizes and launches of dfkd_fast's CUDA extension.";
  module.def("build", &build, "Toolkit, architecture and commit of this build.");
  module.def("kernels", &kernels, "The names of all kernels of this build.");
  module.def("unsupported_reason", &unsupported_reason, py::arg("op"), py::arg("num_sms") = py::none(),
             "Why the launcher of an op (or op_backward) does not support these sizes and options; None if it does. "
             "Needs no GPU.");
  module.def("launches", &launches, py::arg("op"), py::arg("resources") = true,
             "The kernels that the launcher would launch, each with its name, grid, block, cluster and dynamic shared "
             "memory, and, unless resources is False, its registers and occupancy on the current GPU.\n\n"
             "Raises ValueError if the launcher does not support these sizes, and RuntimeError if resources is True "
             "and there is no GPU.");
}

// dfkd_fast._C: what was built, what its kernels serve, and what their launches take of a multiprocessor.
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
  py::dict found;
  found["toolkit"] = DFKD_TOOLKIT;
  found["architecture"] = "sm_90a";
  found["commit"] = DFKD_COMMIT;
  return found;
}

// The keyword arguments of a call: one that the op does not read is an error.
class Options {
 public:
  explicit Options(const py::kwargs& given) : given_(given) {}

  int64_t size(const char* name) const { return required(name).cast<int64_t>(); }
  int64_t size(const char* name, int64_t otherwise) const { return get(name, otherwise); }
  double number(const char* name, double otherwise) const { return get(name, otherwise); }
  bool flag(const char* name, bool otherwise) const { return get(name, otherwise); }
  // The place of a word in a list.
  int one_of(const char* name, const std::vector<std::string>& words, const std::string& otherwise) const {
    const auto word = get(name, otherwise);
    const auto found = std::find(words.begin(), words.end(), word);
    if (found == words.end()) throw py::value_error("no " + std::string(name) + " '" + word + "'");
    return static_cast<int>(found - words.begin());
  }
  // A dfkd_dtype, or -1, which launchers refuse with their reason.
  int dtype(const char* name, const std::string& otherwise = "bfloat16") const {
    const auto word = get(name, otherwise);
    if (word == "float32") return DFKD_FLOAT32;
    return word == "float16" ? DFKD_FLOAT16 : word == "bfloat16" ? DFKD_BFLOAT16 : -1;
  }
  std::string word(const char* name, const std::string& otherwise) const { return get(name, otherwise); }

  void finish() const {
    for (const auto& each : given_) {
      const auto name = each.first.cast<std::string>();
      if (asked_.count(name) == 0) throw py::type_error("this op takes no '" + name + "'");
    }
  }

 private:
  py::object required(const char* name) const {
    asked_.insert(name);
    if (!given_.contains(name)) throw py::type_error("this op needs '" + std::string(name) + "'");
    return given_[name];
  }
  template <typename T>
  T get(const char* name, T otherwise) const {
    asked_.insert(name);
    return given_.contains(name) ? given_[name].template cast<T>() : otherwise;
  }

  const py::kwargs& given_;
  mutable std::set<std::string> asked_;
};

// Where a tensor would be. Nothing is there: launchers that only record look at null and at alignment.
template <typename T = void>
T* somewhere(bool there = true) {
  return there ? reinterpret_cast<T*>(uintptr_t{1} << 20) : nullptr;
}

int contrastive_loss(const Options& given, bool backward) {
  const int64_t count = given.size("count"), dim = given.size("dim");
  const int64_t row = given.size("row", dim), column = given.size("column", 1);
  const int dtype = given.dtype("dtype");
  const auto temperature = static_cast<float>(given.number("temperature", 0.1));
  const bool symmetric = given.flag("symmetric", false), normalize = given.flag("normalize", true);
  const int reduction = given.one_of("reduction", {"mean", "sum", "none"}, "mean");
  if (!backward) {
    given.finish();
    return dfkd_contrastive_loss(somewhere(), somewhere(), count, dim, row, column, row, column, dtype, temperature,
                                 symmetric, normalize, reduction, somewhere<float>(), somewhere<float>(), somewhere(),
                                 nullptr);
  }
  const bool anchors = given.flag("needs_grad_anchors", true), positives = given.flag("needs_grad_positives", true);
  given.finish();
  return dfkd_contrastive_loss_backward(somewhere<float>(), reduction == DFKD_NONE, somewhere(), somewhere(),
                                        somewhere<float>(), count, dim, row, column, row, column, dtype, temperature,
                                        symmetric, normalize, reduction, somewhere(anchors), somewhere(positives), dim,
                                        1, dim, 1, somewhere(), nullptr);
}

int spatial_attention(const Options& given, bool backward) {
  const int64_t samples = given.size("samples"), channels = given.size("channels"), maps = given.size("maps");
  const int64_t positions = given.size("positions");
  const int dtype = given.dtype("dtype");
  const auto same = given.word("dtype", "bfloat16");
  const int weight_dtype = given.dtype("weight_dtype", same), bias_dtype = given.dtype("bias_dtype", same);
  const bool bias = given.flag("bias", true);
  const auto scale = static_cast<float>(given.number("scale", 0.05));
  const int softmax = given.one_of("form", {"spatial", "spatial_mean1", "channel"}, "spatial");
  if (!backward) {
    given.finish();
    return dfkd_spatial_attention(somewhere(), somewhere(), somewhere(), samples, channels, maps, positions, dtype,
                                  weight_dtype, scale, softmax, somewhere(), somewhere(), nullptr);
  }
  const bool features = given.flag("needs_grad_features", true), hidden = given.flag("needs_grad_hidden", true);
  const bool weight = given.flag("needs_grad_weight", true), to_bias = given.flag("needs_grad_bias", true);
  given.finish();
  return dfkd_spatial_attention_backward(somewhere(), somewhere(), somewhere(), somewhere(), somewhere(), samples,
                                         channels, maps, positions, dtype, weight_dtype, bias_dtype, scale, softmax,
                                         somewhere(features), somewhere(hidden), somewhere(weight),
                                         somewhere(bias && to_bias), somewhere(), nullptr);
}

int high_order_attention(const Options& given, bool backward) {
  const int64_t positions = given.size("positions"), channels = given.size("channels");
  const int64_t hidden = given.size("hidden"), order = given.size("order", 3);
  const int dtype = given.dtype("dtype");
  const int mode = given.one_of("mode", {"joint", "per_order"}, "joint");
  const int result = given.one_of("result", {"features", "map"}, "features");
  if (!backward) {
    given.finish();
    return dfkd_high_order_attention(somewhere(), somewhere(), somewhere(), positions, channels, hidden, order, dtype,
                                     mode, result, somewhere(), nullptr);
  }
  const int way = static_cast<int>(given.size("way", 0));  // form in launchers.h; the operators have 0
  const bool x = given.flag("needs_grad_x", true), proj = given.flag("needs_grad_proj", true), out = given.flag("needs_grad_out", true);
  given.finish();
  return dfkd_high_order_attention_backward(somewhere(), somewhere(), somewhere(), somewhere(), positions, channels,
                                            hidden, order, dtype, mode, result, way, somewhere(x), somewhere(proj),
                                            somewhere(out), somewhere(), nullptr);
}

// What a launcher would launch, and its status.
int recorded(const std::string& op, const py::kwargs& given, std::vector<dfkd_launch>* launches) {
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
  const std::unique_ptr<void, void (*)(void*)> ended(launches, [](void*) { dfkd_record(nullptr, 0); });
  const int status = call->second(Options(given), backward);
  if (dfkd_recorded() > static_cast<int64_t>(launches->size())) throw std::runtime_error("more launches than expected");
  launches->resize(static_cast<size_t>(dfkd_recorded()));
  return status;
}

void require_success(int status) {
  if (status == cudaSuccess) return;
  const auto error = static_cast<cudaError_t>(status);
  (void)cudaGetLastError();
  const bool nothing = error == cudaErrorInsufficientDriver || error == cudaErrorNoDevice;
  throw std::runtime_error(nothing ? "this needs a GPU and its driver, and finds none"
                                   : "CUDA error " + std::to_string(status) + ": " + cudaGetErrorString(error));
}

// Why a launcher does not serve a call on a device with so many multiprocessors, or nothing if it does. Blocks that wait
// for each other have one each.
std::optional<std::string> unsupported_reason(const std::string& op, std::optional<int64_t> num_sms,
                                              const py::kwargs& given) {
  std::vector<dfkd_launch> launches;
  const int status = recorded(op, given, &launches);
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

std::string readable(const char* symbol) {
  if (symbol == nullptr) return "unknown";
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> name(abi::__cxa_demangle(symbol, nullptr, nullptr, &status), std::free);
  return status == 0 ? name.get() : symbol;
}

py::tuple three(const uint32_t (&size)[3]) { return py::make_tuple(size[0], size[1], size[2]); }

std::vector<py::dict> launches(const std::string& op, bool resources, const py::kwargs& given) {
  std::vector<dfkd_launch> found;
  const int status = recorded(op, given, &found);
  if (status == DFKD_INVALID) throw py::value_error(op + ": " + dfkd_unsupported_reason());
  require_success(status);
  std::vector<py::dict> told;
  for (const dfkd_launch& each : found) {
    py::dict one;
    one["kernel"] = readable(dfkd_kernel_name(each.kernel));
    one["grid"] = three(each.grid);
    one["block"] = three(each.block);
    one["cluster"] = each.cluster;
    one["cooperative"] = each.cooperative != 0;
    one["dynamic_shared"] = each.shared;
    if (resources) {
      dfkd_resources takes;
      require_success(dfkd_resources_of(&each, &takes));
      const double threads = each.block[0] * each.block[1] * each.block[2];
      one["static_shared"] = takes.static_shared;
      one["registers"] = takes.registers;
      one["local"] = takes.local;
      one["blocks_per_multiprocessor"] = takes.blocks_per_multiprocessor;
      one["active_clusters"] = takes.active_clusters;
      one["multiprocessors"] = takes.multiprocessors;
      one["occupancy"] = takes.blocks_per_multiprocessor * threads / takes.threads_per_multiprocessor;
    }
    told.push_back(one);
  }
  return told;
}

std::vector<std::string> kernels() {
  std::vector<const char*> symbols(static_cast<size_t>(dfkd_kernel_names(nullptr, 0)));
  dfkd_kernel_names(symbols.data(), static_cast<int64_t>(symbols.size()));
  std::vector<std::string> names(symbols.size());
  std::transform(symbols.begin(), symbols.end(), names.begin(), readable);
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "What the CUDA extension of dfkd_fast is made of, what it serves and what it launches.";
  module.def("build", &build, "Toolkit, architecture and commit of this build.");
  module.def("kernels", &kernels, "The names of all kernels of this build.");
  module.def("unsupported_reason", &unsupported_reason, py::arg("op"), py::arg("num_sms") = py::none(),
             "Why the launcher of an op (or op_backward) does not serve these sizes and options; None if it does. "
             "Needs no GPU.");
  module.def("launches", &launches, py::arg("op"), py::arg("resources") = true,
             "What that launcher would launch: for each kernel its name, grid, block, cluster and dynamic shared "
             "memory, and, unless resources is False, what it takes of the present GPU's multiprocessors.\n\n"
             "Raises ValueError if the launcher does not serve these sizes, RuntimeError if resources are asked for "
             "and there is no GPU.");
}

// The Python module `cmaclip_emulator`: buffers, libraries of kernels, launches.
#include <dlfcn.h>
#include <link.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string_view>

#include "runtime/machine.h"

namespace py = pybind11;

namespace cmaclip::emulator {

namespace {

std::vector<Function>* registering = nullptr;

struct PyBuffer {
  PyBuffer(py::array array, std::string name, size_t offset) {
    if ((array.flags() & py::array::c_style) == 0) throw std::invalid_argument("a buffer's array must be C-contiguous");
    Machine& machine = Machine::instance();
    element_bytes = static_cast<int>(array.itemsize());
    index = machine.memory.add(std::move(name), array.nbytes(), element_bytes, offset);
    address = machine.memory.at(index).begin;
    bytes = array.nbytes();
    dtype = array.dtype();
    shape.assign(array.shape(), array.shape() + array.ndim());
    std::memcpy(reinterpret_cast<void*>(address), array.data(), bytes);
  }
  PyBuffer(const PyBuffer&) = delete;
  ~PyBuffer() { Machine::instance().memory.remove(index); }

  py::array numpy() const {
    py::array result(dtype, shape);
    std::memcpy(result.mutable_data(), reinterpret_cast<const void*>(address), bytes);
    return result;
  }

  void write(const py::array& array) {
    if ((array.flags() & py::array::c_style) == 0 || static_cast<size_t>(array.nbytes()) != bytes) {
      throw std::invalid_argument("the array must be C-contiguous and as large as the buffer");
    }
    std::memcpy(reinterpret_cast<void*>(address), array.data(), bytes);
  }

  int index;
  int element_bytes;
  uintptr_t address;
  size_t bytes;
  py::dtype dtype;
  std::vector<py::ssize_t> shape;
};

struct PyPointer {
  const PyBuffer* buffer;
  int64_t elements;
};

// The low bytes of a Python integer, signed or unsigned.
uint64_t integer_bits(const py::handle& value, uint32_t bytes) {
  const auto number = py::reinterpret_steal<py::int_>(PyNumber_Index(value.ptr()));
  if (!number) throw py::error_already_set();
  if (number.attr("bit_length")().cast<uint32_t>() > 8 * bytes) {
    throw std::invalid_argument("an integer argument does not fit its parameter");
  }
  const uint64_t all = ~uint64_t{0} >> (64 - 8 * bytes);
  return number.attr("__and__")(py::int_(all)).cast<uint64_t>();
}

class PyLibrary {
 public:
  explicit PyLibrary(const std::string& path) {
    registering = &functions_;
    handle_ = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    registering = nullptr;
    if (handle_ == nullptr) throw std::runtime_error(dlerror());
    if (functions_.empty()) throw std::runtime_error(path + " registers no kernel: see CMACLIP_EMULATE");
    Dl_info info{};
    dladdr(reinterpret_cast<const void*>(functions_.front().invoke), &info);
    image_.base = reinterpret_cast<uintptr_t>(info.dli_fbase);
    dl_iterate_phdr(&PyLibrary::read_segments, &image_);
  }
  PyLibrary(const PyLibrary&) = delete;
  ~PyLibrary() { dlclose(handle_); }

  std::vector<std::string> names() const {
    std::vector<std::string> result;
    for (const Function& function : functions_) result.emplace_back(function.name);
    return result;
  }

  py::dict launch(const std::string& name, std::array<uint32_t, 3> grid, std::array<uint32_t, 3> block,
                  const py::sequence& arguments, uint32_t dynamic_shared, const std::string& order, uint64_t seed,
                  uint64_t step_limit) {
    const Function& function = find(name);
    if (function.result_bytes != 0) throw std::invalid_argument(name + " is a host function: use call");
    Machine& machine = Machine::instance();
    for (Buffer& buffer : machine.memory.all()) buffer.read_only = true;
    Launch launch;
    launch.function = &function;
    launch.grid = {grid[0], grid[1], grid[2]};
    launch.block = {block[0], block[1], block[2]};
    launch.dynamic_shared = dynamic_shared;
    launch.order = order == "forward"   ? Order::forward
                   : order == "reverse" ? Order::reverse
                   : order == "random"  ? Order::random
                                        : throw std::invalid_argument("order is forward, reverse or random");
    launch.seed = seed;
    launch.step_limit = step_limit;
    launch.image = &image_;
    const std::vector<std::vector<char>> storage = convert(function, arguments);
    for (const std::vector<char>& bytes : storage) launch.arguments.push_back(const_cast<char*>(bytes.data()));
    const char* asked = std::getenv("CMACLIP_EMULATOR_MMA");
    const std::string_view mma = asked == nullptr ? "round" : asked;
    if (mma != "round" && mma != "truncate") throw std::invalid_argument("CMACLIP_EMULATOR_MMA is round or truncate");
    machine.mma_truncates = mma == "truncate";
    machine.run(launch);
    return results(machine);
  }

  py::object call(const std::string& name, const py::sequence& arguments) {
    const Function& function = find(name);
    if (function.result_bytes == 0) throw std::invalid_argument(name + " is a kernel: use launch");
    const std::vector<std::vector<char>> storage = convert(function, arguments);
    std::vector<void*> pointers;
    for (const std::vector<char>& bytes : storage) pointers.push_back(const_cast<char*>(bytes.data()));
    alignas(16) char result[16] = {};
    function.invoke(pointers.data(), result);
    if (function.result_floating) {
      if (function.result_bytes == 4) return py::float_(*reinterpret_cast<float*>(result));
      return py::float_(*reinterpret_cast<double*>(result));
    }
    int64_t value = 0;
    std::memcpy(&value, result, function.result_bytes);
    if (function.result_bytes == 4) value = static_cast<int32_t>(value);
    return py::int_(value);
  }

 private:
  static int read_segments(dl_phdr_info* info, size_t, void* target) {
    Image& image = *static_cast<Image*>(target);
    if (info->dlpi_addr != image.base) return 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      const auto& header = info->dlpi_phdr[i];
      if (header.p_type != PT_LOAD) continue;
      const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
      image.segments.emplace_back(begin, begin + header.p_filesz);
      if (header.p_memsz > header.p_filesz) {
        image.shared_begin = begin + header.p_filesz;
        image.shared_end = begin + header.p_memsz;
      }
    }
    return 1;
  }

  const Function& find(const std::string& name) const {
    for (const Function& function : functions_) {
      if (name == function.name) return function;
    }
    throw std::invalid_argument("no function '" + name + "' in this library");
  }

  static std::vector<std::vector<char>> convert(const Function& function, const py::sequence& arguments) {
    const std::string name = function.name;
    if (static_cast<int>(arguments.size()) != function.parameter_count) {
      throw std::invalid_argument(name + " takes " + std::to_string(function.parameter_count) + " arguments, not " +
                                  std::to_string(arguments.size()));
    }
    std::vector<std::vector<char>> storage;
    for (int i = 0; i < function.parameter_count; ++i) {
      const Parameter& parameter = function.parameters[i];
      const py::object value = arguments[i];
      const std::string which = "argument " + std::to_string(i) + " of " + name;
      std::vector<char> bytes(std::max<size_t>(parameter.bytes, 16), 0);
      if (parameter.kind == Parameter::pointer) {
        uint64_t address = 0;
        if (!value.is_none()) {
          const PyBuffer* buffer = nullptr;
          int64_t elements = 0;
          if (py::isinstance<PyPointer>(value)) {
            const auto& pointer = value.cast<const PyPointer&>();
            buffer = pointer.buffer;
            elements = pointer.elements;
          } else if (py::isinstance<PyBuffer>(value)) {
            buffer = &value.cast<const PyBuffer&>();
          } else {
            throw std::invalid_argument(which + " is a pointer: pass a Buffer, Buffer.at(n) or None");
          }
          if (parameter.element_bytes != 0 && static_cast<int>(parameter.element_bytes) != buffer->element_bytes) {
            throw std::invalid_argument(which + " points to elements of " + std::to_string(parameter.element_bytes) +
                                        " bytes, the buffer's have " + std::to_string(buffer->element_bytes));
          }
          address = buffer->address + elements * buffer->element_bytes;
          if (!parameter.constant) Machine::instance().memory.at(buffer->index).read_only = false;
        }
        std::memcpy(bytes.data(), &address, sizeof address);
      } else if (parameter.kind == Parameter::integer) {
        const uint64_t bits = integer_bits(value, parameter.bytes);
        std::memcpy(bytes.data(), &bits, parameter.bytes);
      } else if (parameter.kind == Parameter::floating) {
        const double number = value.cast<double>();
        if (parameter.bytes == 4) {
          const float single = static_cast<float>(number);
          std::memcpy(bytes.data(), &single, sizeof single);
        } else {
          std::memcpy(bytes.data(), &number, sizeof number);
        }
      } else {
        const py::buffer_info info = value.cast<py::buffer>().request();
        if (info.size * info.itemsize != static_cast<py::ssize_t>(parameter.bytes)) {
          throw std::invalid_argument(which + " is a structure of " + std::to_string(parameter.bytes) + " bytes");
        }
        std::memcpy(bytes.data(), info.ptr, parameter.bytes);
        // Whatever a pointer in it may reach may be written.
        for (size_t at = 0; at + 8 <= parameter.bytes; at += 8) {
          uintptr_t word = 0;
          std::memcpy(&word, bytes.data() + at, sizeof word);
          GlobalMemory& memory = Machine::instance().memory;
          Buffer* buffer = memory.contains(word) ? memory.find(word) : nullptr;
          if (buffer != nullptr) buffer->read_only = false;
        }
      }
      storage.push_back(std::move(bytes));
    }
    return storage;
  }

  static py::list to_list(const std::vector<Finding>& findings) {
    py::list list;
    for (const Finding& finding : findings) {
      list.append(py::make_tuple(finding.kind, finding.message, finding.site, finding.other_site, finding.block,
                                 finding.thread));
    }
    return list;
  }

  static py::dict results(const Machine& machine) {
    py::dict result;
    result["findings"] = to_list(machine.findings);
    result["doubtful"] = to_list(machine.doubtful);
    py::dict totals;
    const Totals& counted = machine.totals;
    totals["blocks"] = counted.blocks;
    totals["block_barriers"] = counted.block_barriers;
    totals["warp_barriers"] = counted.warp_barriers;
    totals["shuffles"] = counted.shuffles;
    totals["votes"] = counted.votes;
    totals["atomics"] = counted.atomics;
    totals["mma_f16"] = counted.mma_f16;
    totals["mma_bf16"] = counted.mma_bf16;
    totals["mma_tf32"] = counted.mma_tf32;
    totals["ldmatrix"] = counted.ldmatrix;
    totals["cp_async"] = counted.cp_async;
    totals["distinct_sectors_read"] = counted.distinct_sectors_read;
    totals["distinct_sectors_written"] = counted.distinct_sectors_written;
    result["totals"] = totals;
    py::list sites;
    for (size_t i = 0; i < machine.sites.size(); ++i) {
      const SiteCounts& counts = machine.site_counts[i];
      sites.append(py::make_tuple(machine.sites[i], counts.global_accesses, counts.sectors, counts.fewest_sectors,
                                  counts.shared_accesses, counts.wavefronts, counts.fewest_wavefronts));
    }
    result["sites"] = sites;
    return result;
  }

  void* handle_ = nullptr;
  std::vector<Function> functions_;
  Image image_;
};

}  // namespace

int register_function(const Function& function) {
  if (registering == nullptr) return 0;
  registering->push_back(function);
  return 1;
}

PYBIND11_MODULE(cmaclip_emulator, module) {
  module.doc() = "Runs CUDA device code on the host, checks it and counts what it costs. For tests only.";
  py::class_<PyBuffer>(module, "Buffer", "A guarded copy of an array in emulated global memory.")
      .def(py::init<py::array, std::string, size_t>(), py::arg("array"), py::arg("name") = "", py::arg("offset") = 0,
           "Copies a C-contiguous array to `offset` bytes past a multiple of 4096.")
      .def("numpy", &PyBuffer::numpy, "A copy of the present contents.")
      .def("write", &PyBuffer::write, py::arg("array"), "Replaces the contents.")
      .def("at", [](const PyBuffer& self, int64_t elements) { return PyPointer{&self, elements}; }, py::arg("elements"),
           py::keep_alive<0, 1>(), "A pointer to the element with this number, for a kernel's argument.")
      .def_readonly("address", &PyBuffer::address)
      .def_readonly("nbytes", &PyBuffer::bytes);
  py::class_<PyPointer>(module, "Pointer", "A place in a buffer, made by Buffer.at.");
  py::class_<PyLibrary>(module, "Library", "A compiled library of kernels that CMACLIP_EMULATE has named.")
      .def(py::init<std::string>(), py::arg("path"))
      .def_property_readonly("names", &PyLibrary::names)
      .def("launch", &PyLibrary::launch, py::arg("name"), py::arg("grid"), py::arg("block"), py::arg("arguments"),
           py::arg("dynamic_shared") = 0, py::arg("order") = "forward", py::arg("seed") = 0,
           py::arg("step_limit") = uint64_t{1} << 30)
      .def("call", &PyLibrary::call, py::arg("name"), py::arg("arguments"));
}

}  // namespace cmaclip::emulator

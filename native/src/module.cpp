#include <pybind11/pybind11.h>

#include "mlx_sidecar/pages.hpp"

namespace py = pybind11;

PYBIND11_MODULE(_core, m) {
  m.doc() = "Native components of mlx-sidecar; see the Python modules beside this one.";

  m.def(
      "file_pages",
      [](const std::string& path) {
        mlx_sidecar::FilePages pages{};
        {
          const py::gil_scoped_release release;
          pages = mlx_sidecar::file_pages(path);
        }
        return py::make_tuple(pages.resident_bytes, pages.total_bytes);
      },
      py::arg("path"));

  m.def("process_memory", [] {
    const auto memory = mlx_sidecar::process_memory();
    return py::make_tuple(memory.resident_bytes, memory.peak_resident_bytes);
  });

  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const std::system_error& error) {
      py::set_error(PyExc_OSError, py::make_tuple(error.code().value(), error.what()));
    }
  });
}

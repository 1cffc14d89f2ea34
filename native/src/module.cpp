#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <exception>
#include <memory>
#include <string_view>
#include <system_error>
#include <utility>

#include "mlx_sidecar/pages.hpp"
#include "mlx_sidecar/pulse.hpp"

namespace py = pybind11;

namespace {

// Not py::gil_scoped_release: at the interpreter's end a daemon thread that wants the lock back is unwound,
// and that must not happen in a destructor.
template <typename Work>
void without_gil(Work work) {
  PyThreadState* state = PyEval_SaveThread();
  std::exception_ptr error;
  try {
    work();
  } catch (...) {
    error = std::current_exception();
  }
  PyEval_RestoreThread(state);
  if (error) std::rethrow_exception(error);
}

using mlx_sidecar::Framing;

// Empty for what is not known.
Framing framing_named(std::string_view name) {
  return name == "lsp" ? Framing::lsp : name == "ndjson" ? Framing::ndjson : Framing::unknown;
}

std::string_view name_of(Framing framing) {
  return framing == Framing::lsp ? "lsp" : framing == Framing::ndjson ? "ndjson" : "";
}

void bind_pages(py::module_& m) {
  m.def(
      "file_pages",
      [](const std::string& path) {
        mlx_sidecar::FilePages pages{};
        without_gil([&] { pages = mlx_sidecar::file_pages(path); });
        return py::make_tuple(pages.resident_bytes, pages.total_bytes);
      },
      py::arg("path"));

  m.def("process_memory", [] {
    const auto memory = mlx_sidecar::process_memory();
    return py::make_tuple(memory.resident_bytes, memory.peak_resident_bytes);
  });
}

void bind_pulse(py::module_& m) {
  using mlx_sidecar::Pulse;
  using mlx_sidecar::Vitals;

  py::class_<Vitals, std::shared_ptr<Vitals>>(m, "Vitals")
      .def(py::init<double>(), py::arg("started_at"))
      .def("note_state", &Vitals::note_state, py::arg("state"))
      .def("note_step", &Vitals::note_step, py::arg("at"))
      .def_property_readonly("answered", [](const Vitals& vitals) { return vitals.answered.load(); })
      .def_property_readonly("overtook", [](const Vitals& vitals) { return vitals.overtook.load(); });

  py::class_<Pulse>(m, "Pulse")
      .def(py::init([](std::shared_ptr<Vitals> vitals, int read, int write, std::string_view framing) {
             return std::make_unique<Pulse>(std::move(vitals), read, write, framing_named(framing));
           }),
           py::arg("vitals"), py::arg("read"), py::arg("write"), py::arg("framing"))
      .def(
          "start",
          [](Pulse& pulse, const py::bytes& greeted) { pulse.start(static_cast<std::string_view>(greeted)); },
          py::arg("greeted"))
      .def_property_readonly("framing", [](Pulse& pulse) { return name_of(pulse.framing()); })
      .def_property_readonly("took_beginning", &Pulse::took_beginning)
      .def("read",
           [](Pulse& pulse) {
             while (true) {
               without_gil([&] { pulse.wait(); });
               // With the lock in hand: until then what there is can still be answered without us.
               if (auto bytes = pulse.take()) return py::bytes(*bytes);
             }
           })
      .def(
          "try_write",
          [](Pulse& pulse, std::string_view data) {
            std::size_t written = 0;
            without_gil([&] { written = pulse.writer.try_write(data); });
            return written;
          },
          py::arg("data"))
      .def(
          "write_all",
          [](Pulse& pulse, const py::buffer& data) {
            const auto buffer = data.request();
            const std::string_view bytes(static_cast<const char*>(buffer.ptr),
                                         static_cast<std::size_t>(buffer.size * buffer.itemsize));
            without_gil([&] { pulse.writer.write_all(bytes); });
          },
          py::arg("data"))
      .def("add", &Pulse::add, py::arg("request_id"))
      .def("discard", &Pulse::discard, py::arg("request_id"))
      .def("shut_down", &Pulse::shut_down)
      .def("stop", [](Pulse& pulse) { without_gil([&] { pulse.stop(); }); });
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "Native components of mlx-sidecar; see the Python modules beside this one.";
  bind_pages(m);
  bind_pulse(m);
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const std::system_error& error) {
      py::set_error(PyExc_OSError, py::make_tuple(error.code().value(), error.what()));
    }
  });
}

#include "mlx_sidecar/pages.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <system_error>
#include <vector>

#ifdef __APPLE__
#include <mach/mach.h>
#endif

namespace mlx_sidecar {
namespace {

[[noreturn]] void fail(const char* what) { throw std::system_error(errno, std::generic_category(), what); }

class File {
 public:
  explicit File(const std::string& path) : fd_(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    if (fd_ < 0) fail("open");
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  ~File() { ::close(fd_); }

  std::uint64_t size() const {
    struct stat status{};
    if (::fstat(fd_, &status) != 0) fail("fstat");
    return static_cast<std::uint64_t>(status.st_size);
  }
  int fd() const { return fd_; }

 private:
  int fd_;
};

class Mapping {
 public:
  Mapping(const File& file, std::uint64_t size)
      : size_(size), start_(::mmap(nullptr, size, PROT_READ, MAP_SHARED, file.fd(), 0)) {
    if (start_ == MAP_FAILED) fail("mmap");
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping() { ::munmap(start_, size_); }

  void* start() const { return start_; }

 private:
  std::uint64_t size_;
  void* start_;
};

ProcessMemory counted_memory() {
  struct rusage usage{};
  if (::getrusage(RUSAGE_SELF, &usage) != 0) fail("getrusage");
#ifdef __APPLE__
  task_vm_info_data_t info{};
  mach_msg_type_number_t count = TASK_VM_INFO_COUNT;
  if (task_info(mach_task_self(), TASK_VM_INFO, reinterpret_cast<task_info_t>(&info), &count) !=
      KERN_SUCCESS) {
    fail("task_info");
  }
  return {info.phys_footprint, static_cast<std::uint64_t>(usage.ru_maxrss)};
#else
  std::FILE* statm = std::fopen("/proc/self/statm", "re");
  if (statm == nullptr) fail("open /proc/self/statm");
  unsigned long long total = 0;
  unsigned long long resident = 0;
  const int fields = std::fscanf(statm, "%llu %llu", &total, &resident);
  std::fclose(statm);
  if (fields != 2) fail("read /proc/self/statm");
  const auto page = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
  return {resident * page, static_cast<std::uint64_t>(usage.ru_maxrss) * 1024};
#endif
}

}  // namespace

FilePages file_pages(const std::string& path) {
  const File file(path);
  const std::uint64_t size = file.size();
  if (size == 0) return {0, 0};
  const Mapping mapping(file, size);
  const auto page = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
#ifdef __APPLE__
  std::vector<char> flags((size + page - 1) / page);
#else
  std::vector<unsigned char> flags((size + page - 1) / page);
#endif
  if (::mincore(mapping.start(), size, flags.data()) != 0) fail("mincore");
  const auto resident = static_cast<std::uint64_t>(
      std::count_if(flags.begin(), flags.end(), [](auto flag) { return (flag & 1) != 0; }));
  return {std::min(resident * page, size), size};
}

ProcessMemory process_memory() {
  const ProcessMemory memory = counted_memory();
  // The kernel counts the two apart, and batches its updates: the peak may lag behind.
  return {memory.resident_bytes, std::max(memory.resident_bytes, memory.peak_resident_bytes)};
}

}  // namespace mlx_sidecar

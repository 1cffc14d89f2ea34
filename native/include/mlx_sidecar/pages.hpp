// Page residency of files and memory of this process, as the operating system counts them.
#pragma once

#include <cstdint>
#include <string>

namespace mlx_sidecar {

struct FilePages {
  std::uint64_t resident_bytes;
  std::uint64_t total_bytes;
};

// How much of a file the page cache holds now. Throws std::system_error if the file cannot be mapped.
FilePages file_pages(const std::string& path);

struct ProcessMemory {
  std::uint64_t resident_bytes;
  std::uint64_t peak_resident_bytes;
};

// On macOS `resident_bytes` is the physical footprint: resident size leaves out compressed and GPU memory.
ProcessMemory process_memory();

}  // namespace mlx_sidecar

// The end of a connection that is written to, by two: whoever has begun a frame finishes it first.
#pragma once

#include <cstddef>
#include <mutex>
#include <string>
#include <string_view>

namespace mlx_sidecar {

class Writer {
 public:
  explicit Writer(int fd);

  // Writes what fits without waiting and returns how much that is. What is left must follow by `write_all`.
  // Throws std::system_error if the peer has closed its end.
  std::size_t try_write(std::string_view data);

  // Writes everything, however long that takes. Throws like `try_write`.
  void write_all(std::string_view data);

  // Writes a whole frame between those of the others, without waiting; returns whether that was possible.
  bool slip_in(std::string_view frame);

  // Writes what is left of a frame that slipped in; returns whether nothing is.
  bool settle();

 private:
  enum class Kind { socket, pipe, file, other };

  std::size_t write_now(std::string_view data);
  void write_waiting(std::string_view data);
  bool send_rest();

  const int fd_;
  Kind kind_ = Kind::other;
  std::mutex mutex_;
  bool in_frame_ = false;
  std::string rest_;
};

}  // namespace mlx_sidecar

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

  // Writes what fits without waiting and returns how much that is. Exactly what is left must follow by
  // `write_all`; it is kept here as well, so that `settle` can finish the frame first.
  // Throws std::system_error if the peer has closed its end.
  std::size_t try_write(std::string_view data);

  // Writes everything, however long that takes. Throws like `try_write`.
  void write_all(std::string_view data);

  // Returns whether `slip_in` would likely succeed now. Costs nothing while somebody waits for the peer.
  bool has_room();

  // Writes a whole frame between those of the others, without waiting; returns whether that was possible.
  bool slip_in(std::string_view frame);

  // Writes what is left of a frame that has been begun; returns whether nothing is.
  bool settle();

 private:
  enum class Kind { socket, pipe, file, other };

  std::size_t write_now(std::string_view data);
  void write_waiting(std::string_view data);
  bool send_rest();
  void forget_rest();

  const int fd_;
  Kind kind_ = Kind::other;
  std::mutex mutex_;
  bool broken_ = false;
  std::string rest_;          // of the frame that was begun last, without what was sent since:
  std::size_t sent_ = 0;      // bytes of it
  std::size_t promised_ = 0;  // bytes that will come by `write_all`, and have been kept in the rest
};

}  // namespace mlx_sidecar

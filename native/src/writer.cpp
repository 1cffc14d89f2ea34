#include "mlx_sidecar/writer.hpp"

#include <limits.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>
#include <utility>

namespace mlx_sidecar {
namespace {

#ifdef MSG_NOSIGNAL
constexpr int kFlags = MSG_NOSIGNAL;
#else
constexpr int kFlags = 0;  // Python ignores SIGPIPE.
#endif

bool would_wait() { return errno == EAGAIN || errno == EWOULDBLOCK; }

[[noreturn]] void fail() { throw std::system_error(errno, std::generic_category(), "write"); }

bool is_writable(int fd, int timeout_ms) {
  pollfd poll_fd{fd, POLLOUT, 0};
  return ::poll(&poll_fd, 1, timeout_ms) > 0 && (poll_fd.revents & POLLOUT) != 0;
}

}  // namespace

Writer::Writer(int fd) : fd_(fd) {
  struct stat status{};
  if (::fstat(fd, &status) != 0) fail();
  if (S_ISSOCK(status.st_mode)) kind_ = Kind::socket;
  if (S_ISFIFO(status.st_mode)) kind_ = Kind::pipe;
  if (S_ISREG(status.st_mode)) kind_ = Kind::file;
}

std::size_t Writer::try_write(std::string_view data) {
  const std::lock_guard lock(mutex_);
  if (!send_rest()) return 0;
  std::size_t written = 0;
  while (written < data.size()) {
    const std::size_t more = write_now(data.substr(written));
    if (more == 0) break;
    written += more;
  }
  if (written > 0) {
    rest_ = data.substr(written);
    promised_ = rest_.size();
  }
  return written;
}

void Writer::write_all(std::string_view data) {
  const std::lock_guard lock(mutex_);
  broken_ = true;  // if this throws
  write_waiting(std::string_view(rest_).substr(sent_));
  forget_rest();
  data.remove_prefix(std::min(std::exchange(promised_, 0), data.size()));
  write_waiting(data);
  broken_ = false;
}

bool Writer::has_room() {
  const std::unique_lock lock(mutex_, std::try_to_lock);
  return lock && !broken_ && sent_ == rest_.size() && is_writable(fd_, 0);
}

bool Writer::slip_in(std::string_view frame) {
  const std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock || broken_ || (kind_ == Kind::pipe && frame.size() > PIPE_BUF)) return false;
  try {
    if (!send_rest()) return false;
    const std::size_t written = write_now(frame);
    if (written > 0) rest_ = frame.substr(written);
    return written > 0;
  } catch (const std::system_error&) {
    return false;  // Whoever writes next finds out, and knows what to do about it.
  }
}

bool Writer::settle() {
  const std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock) return true;  // Whoever has the lock begins with the rest.
  try {
    return send_rest();
  } catch (const std::system_error&) {
    return true;
  }
}

bool Writer::send_rest() {
  while (sent_ < rest_.size()) {
    const std::size_t written = write_now(std::string_view(rest_).substr(sent_));
    if (written == 0) return false;
    sent_ += written;
  }
  forget_rest();
  return true;
}

void Writer::forget_rest() {
  rest_ = {};
  sent_ = 0;
}

std::size_t Writer::write_now(std::string_view data) {
  while (true) {
    ssize_t written = 0;
    if (kind_ == Kind::socket) {
      written = ::send(fd_, data.data(), data.size(), MSG_DONTWAIT | kFlags);
    } else if (kind_ == Kind::file) {
      written = ::write(fd_, data.data(), data.size());
    } else if (kind_ == Kind::pipe && is_writable(fd_, 0)) {
      // A pipe that polls as writable takes at least PIPE_BUF bytes without waiting (POSIX, pipe(7)).
      written = ::write(fd_, data.data(), std::min<std::size_t>(data.size(), PIPE_BUF));
    }
    if (written >= 0) return static_cast<std::size_t>(written);
    if (would_wait()) return 0;
    if (errno != EINTR) fail();
  }
}

void Writer::write_waiting(std::string_view data) {
  while (!data.empty()) {
    const ssize_t written = kind_ == Kind::socket ? ::send(fd_, data.data(), data.size(), kFlags)
                                                  : ::write(fd_, data.data(), data.size());
    if (written >= 0) {
      data.remove_prefix(static_cast<std::size_t>(written));
    } else if (would_wait()) {
      is_writable(fd_, -1);
    } else if (errno != EINTR) {
      fail();
    }
  }
}

}  // namespace mlx_sidecar

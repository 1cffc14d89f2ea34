#include "mlx_sidecar/pulse.hpp"

#include <fcntl.h>
#include <poll.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <system_error>
#include <utility>

#include "mlx_sidecar/ping.hpp"

namespace mlx_sidecar {
namespace {

using std::chrono::milliseconds;

constexpr milliseconds kPatience{15};
constexpr milliseconds kRetry{5};
constexpr std::size_t kReadBytes = 64 * 1024;
constexpr std::size_t kTakeBytes = 256 * 1024;
constexpr std::size_t kMaxWaiting = 1024 * 1024;
constexpr std::size_t kMaxUnfinished = 64 * 1024;
constexpr auto npos = std::string::npos;

// The clock of Python's time.monotonic().
double monotonic_seconds() {
#ifdef __APPLE__
  constexpr clockid_t kClock = CLOCK_UPTIME_RAW;
#else
  constexpr clockid_t kClock = CLOCK_MONOTONIC;
#endif
  timespec now{};
  ::clock_gettime(kClock, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

// Not by printf, which would write the decimal point of the user's language.
std::string milliseconds_text(double seconds) {
  const auto microseconds = static_cast<std::uint64_t>(std::max(seconds, 0.0) * 1e6);
  const std::string fraction = std::to_string(microseconds % 1000);
  return std::to_string(microseconds / 1000) + "." + std::string(3 - fraction.size(), '0') + fraction;
}

void make_private(int fd) {
  ::fcntl(fd, F_SETFD, FD_CLOEXEC);
  ::fcntl(fd, F_SETFL, O_NONBLOCK);
}

void drain(int fd) {
  std::array<char, 64> bytes;
  while (::read(fd, bytes.data(), bytes.size()) > 0) {
  }
}

}  // namespace

void Vitals::note_state(std::string state) {
  const std::lock_guard lock(mutex_);
  state_ = std::move(state);
}

void Vitals::note_step(std::optional<double> at) {
  last_step_at_.store(at.value_or(kIdle), std::memory_order_relaxed);
}

std::string Vitals::ping_result(std::size_t in_flight) const {
  const double now = monotonic_seconds();
  const double last = last_step_at_.load(std::memory_order_relaxed);
  const std::lock_guard lock(mutex_);
  return "{\"state\":\"" + state_ + "\",\"uptimeMs\":" + milliseconds_text(now - started_at_) +
         ",\"inFlight\":" + std::to_string(in_flight) +
         ",\"lastStepAgeMs\":" + (last == kIdle ? "null" : milliseconds_text(now - last)) + "}";
}

Pulse::Pulse(std::shared_ptr<Vitals> vitals, int read_fd, int write_fd)
    : writer(write_fd), vitals_(std::move(vitals)), read_fd_(read_fd) {
  if (::pipe(wake_fds_) != 0) throw std::system_error(errno, std::generic_category(), "pipe");
  for (const int fd : wake_fds_) make_private(fd);
}

Pulse::~Pulse() { stop(); }

void Pulse::start(std::string_view greeted) {
  append(greeted);
  hand_over(waiting_.size());
  unfinished_.clear();
  consumed_ = true;
  thread_ = std::thread([this] { run(); });
}

void Pulse::wait() {
  std::unique_lock lock(mutex_);
  consumed_ = true;
  // A line that was taken in part is dealt with when the rest of it is.
  const auto newline = unfinished_.rfind('\n');
  if (newline != npos) unfinished_.erase(0, newline + 1);
  if (unfinished_.size() > kMaxUnfinished) unfinished_.resize(kMaxUnfinished);
  arrived_.wait(lock, [this] { return !waiting_.empty() || ended_ || stopping_; });
}

std::optional<std::string> Pulse::take() {
  const std::lock_guard lock(mutex_);
  if (waiting_.empty()) return ended_ || stopping_ ? std::make_optional<std::string>() : std::nullopt;
  const bool was_full = waiting_.size() >= kMaxWaiting;
  std::string chunk = hand_over(std::min(waiting_.size(), kTakeBytes));
  if (was_full) wake();
  return chunk;
}

void Pulse::add(const std::string& id) {
  const std::lock_guard lock(mutex_);
  in_flight_.insert(id);
}

void Pulse::discard(const std::string& id) {
  const std::lock_guard lock(mutex_);
  in_flight_.erase(id);
}

void Pulse::shut_down() {
  const std::lock_guard lock(mutex_);
  shut_down_ = true;
}

void Pulse::stop() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    wake();
  }
  arrived_.notify_all();
  const std::lock_guard stop_lock(stop_mutex_);
  if (thread_.joinable()) thread_.join();
  const std::lock_guard lock(mutex_);
  for (int& fd : wake_fds_) {
    if (fd >= 0) ::close(fd);
    fd = -1;
  }
}

void Pulse::run() {
  std::array<char, kReadBytes> buffer;
  std::array<pollfd, 2> fds{{{wake_fds_[0], POLLIN, 0}, {read_fd_, POLLIN, 0}}};
  std::unique_lock lock(mutex_);
  while (!stopping_) {
    const bool reading = !ended_ && waiting_.size() < kMaxWaiting;
    const int timeout = timeout_ms();
    lock.unlock();
    const int ready = ::poll(fds.data(), reading ? 2 : 1, timeout);
    if (ready > 0 && fds[0].revents != 0) drain(wake_fds_[0]);
    ssize_t size = -1;
    errno = EAGAIN;
    if (ready > 0 && reading && fds[1].revents != 0) size = ::read(read_fd_, buffer.data(), buffer.size());
    const bool failed = size < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR;
    lock.lock();
    if (size > 0) append({buffer.data(), static_cast<std::size_t>(size)});
    if (size == 0 || failed) ended_ = true;
    if (Clock::now() >= look_at_) overtake();
    if (!waiting_.empty() || ended_) arrived_.notify_one();
  }
}

void Pulse::append(std::string_view bytes) {
  const bool in_turn = waiting_.empty() && consumed_;
  if (waiting_.empty()) patience_ends_ = Clock::now() + kPatience;
  const std::size_t before = waiting_.size();
  waiting_.append(bytes);
  if (framing_ == Framing::unknown) detect(before);
  if (in_turn) answer_in_turn();
  look_at_ = waiting_.empty() ? Clock::time_point::max() : patience_ends_;
}

// Like protocol/framing.py. The first frame is Python's, which must find out the same.
void Pulse::detect(std::size_t from) {
  const auto first = waiting_.find_first_not_of(" \t\r\n\xef\xbb\xbf", from);
  if (first == npos) return;
  framing_ = (waiting_[first] | 0x20) == 'c' ? Framing::other : Framing::ndjson;
  looked_at_ = first;
}

std::string Pulse::hand_over(std::size_t size) {
  std::string chunk;
  if (size == waiting_.size()) {
    chunk.swap(waiting_);
    look_at_ = Clock::time_point::max();
  } else {
    chunk = waiting_.substr(0, size);
    waiting_.erase(0, size);
    look_at_ = patience_ends_ = Clock::now() + kPatience;
  }
  if (size > looked_at_) at_frame_ = framing_ == Framing::ndjson && chunk.back() == '\n';
  looked_at_ -= std::min(looked_at_, size);
  unfinished_ += chunk;
  consumed_ = false;
  return chunk;
}

bool Pulse::skip_to_frame() {
  if (framing_ != Framing::ndjson) return false;
  if (!at_frame_) {
    const auto newline = waiting_.find('\n', looked_at_);
    at_frame_ = newline != npos;
    looked_at_ = at_frame_ ? newline + 1 : waiting_.size();
  }
  return at_frame_;
}

void Pulse::answer_in_turn() {
  while (at_frame_ && looked_at_ == 0) {
    const auto newline = waiting_.find('\n');
    if (newline == npos) return;
    const auto id = plain_ping(std::string_view(waiting_).substr(0, newline));
    if (!id || !is_free(*id) || !answer(*id, false)) return;
    waiting_.erase(0, newline + 1);
  }
}

void Pulse::overtake() {
  look_at_ = Clock::time_point::max();
  if (shut_down_ || !skip_to_frame()) return;
  Ahead ahead;
  ahead.note(unfinished_ + waiting_.substr(0, looked_at_));
  for (auto newline = waiting_.find('\n', looked_at_); newline != npos && !ahead.shutdown;
       newline = waiting_.find('\n', looked_at_)) {
    const auto line = std::string_view(waiting_).substr(looked_at_, newline - looked_at_);
    const auto id = plain_ping(line);
    if (id && is_free(*id) && ahead.ids.count(std::string(*id)) == 0) {
      if (!answer(*id, true)) {
        look_at_ = Clock::now() + kRetry;
        return;
      }
      waiting_.erase(looked_at_, line.size() + 1);
    } else {
      ahead.note(line);
      looked_at_ = newline + 1;
    }
  }
}

bool Pulse::is_free(std::string_view id) const {
  return !shut_down_ && in_flight_.count(std::string(id)) == 0;
}

bool Pulse::answer(std::string_view id, bool overtaking) {
  const std::string frame = "{\"jsonrpc\":\"2.0\",\"id\":" + std::string(id) +
                            ",\"result\":" + vitals_->ping_result(in_flight_.size()) + "}\n";
  // Counted first: whoever has the answer finds it in `stats`.
  vitals_->answered += 1;
  vitals_->overtook += overtaking ? 1 : 0;
  if (writer.slip_in(frame)) return true;
  vitals_->answered -= 1;
  vitals_->overtook -= overtaking ? 1 : 0;
  return false;
}

int Pulse::timeout_ms() {
  auto at = look_at_;
  if (!writer.settle()) at = std::min(at, Clock::now() + kRetry);
  if (at == Clock::time_point::max()) return -1;
  const auto left = std::chrono::ceil<milliseconds>(at - Clock::now());
  return static_cast<int>(std::max(left, milliseconds(0)).count());
}

// Nothing waits for the byte to be written: a pipe that is full wakes as well.
void Pulse::wake() { [[maybe_unused]] const auto written = ::write(wake_fds_[1], "", 1); }

}  // namespace mlx_sidecar

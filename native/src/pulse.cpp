#include "mlx_sidecar/pulse.hpp"

#include <fcntl.h>
#include <poll.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <system_error>
#include <utility>

#include "mlx_sidecar/ping.hpp"

namespace mlx_sidecar {
namespace {

using std::chrono::milliseconds;

constexpr milliseconds kPatience{15};
constexpr milliseconds kRetry{20};
constexpr std::size_t kReadBytes = 64 * 1024;
constexpr std::size_t kTakeBytes = 256 * 1024;
constexpr std::size_t kMaxWaiting = 1024 * 1024;
constexpr std::size_t kMaxUnfinished = 1024 * 1024;
constexpr std::size_t kLongestPing = 1024;  // with its headers

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

Pulse::Pulse(std::shared_ptr<Vitals> vitals, int read_fd, int write_fd, Framing framing)
    : writer(write_fd), vitals_(std::move(vitals)), read_fd_(read_fd), finder_(framing) {
  if (::pipe(wake_fds_) != 0) throw std::system_error(errno, std::generic_category(), "pipe");
  for (const int fd : wake_fds_) make_private(fd);
}

Pulse::~Pulse() { stop(); }

void Pulse::start(std::string_view greeted) {
  began_ = !greeted.empty();
  while (!greeted.empty()) {
    if (finder_.at_frame()) unfinished_.clear();
    const auto size = finder_.pass(greeted);
    unfinished_ += greeted.substr(0, size);
    greeted.remove_prefix(size);
  }
  whole_ = finder_.at_frame();
  dealt_with();
  thread_ = std::thread([this] { run(); });
}

Framing Pulse::framing() {
  const std::lock_guard lock(mutex_);
  return finder_.framing();
}

void Pulse::wait() {
  std::unique_lock lock(mutex_);
  dealt_with();
  answer_in_turn();
  arrived_.wait(lock, [this] { return for_python(false) > 0 || ended_ || stopping_; });
}

std::optional<std::string> Pulse::take() {
  const std::lock_guard lock(mutex_);
  answer_in_turn();
  const std::size_t size = for_python(true);
  if (size == 0) return ended_ || stopping_ ? std::make_optional<std::string>() : std::nullopt;
  const bool was_full = waiting_.size() >= kMaxWaiting;
  std::string chunk = hand_over(size);
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
    if (consumed_ && (for_python(false) > 0 || ended_)) arrived_.notify_one();
  }
}

void Pulse::append(std::string_view bytes) {
  if (waiting_.empty()) patience_ends_ = Clock::now() + kPatience;
  waiting_.append(bytes);
  if (consumed_) answer_in_turn();
  look_at_ = waiting_.empty() ? Clock::time_point::max() : patience_ends_;
}

std::string_view Pulse::unseen() const { return std::string_view(waiting_).substr(passed_); }

std::optional<std::string_view> Pulse::free_ping(const Frame& frame) const {
  const auto id = shut_down_ ? std::nullopt : plain_ping(frame.body);
  return id && in_flight_.count(std::string(*id)) == 0 ? id : std::nullopt;
}

// How much of what is waiting Python may take: whole frames up to a ping, or a part of one that is too long
// to be a ping. If it takes them now, and there is no room for the answers, pings are Python's as well.
std::size_t Pulse::for_python(bool now) {
  bool stop_at_pings = true;
  while (passed_ < std::min(waiting_.size(), kTakeBytes)) {
    if (finder_.at_frame()) {
      const auto frame = finder_.whole(unseen());
      if (!frame && passed_ > 0) break;
      if (!frame && !ended_ && waiting_.size() <= kLongestPing && finder_.is_part(waiting_)) break;
      if (frame && stop_at_pings && free_ping(*frame)) {
        if (!now) return passed_ > 0 ? passed_ : frame->size;
        if (passed_ > 0 && writer.has_room()) break;
        stop_at_pings = false;
      }
    }
    passed_ += finder_.pass(unseen());
  }
  return passed_;
}

std::string Pulse::hand_over(std::size_t size) {
  std::string chunk = waiting_.substr(0, size);
  waiting_.erase(0, size);
  passed_ -= size;
  whole_ = finder_.at_frame();
  unfinished_ += chunk;
  began_ = true;
  consumed_ = false;
  ahead_.reset();
  patience_ends_ = Clock::now() + kPatience;
  look_at_ = waiting_.empty() ? Clock::time_point::max() : patience_ends_;
  return chunk;
}

// A frame that was taken in part is dealt with when the rest of it is.
void Pulse::dealt_with() {
  consumed_ = true;
  if (whole_) unfinished_.clear();
  too_long_ = unfinished_.size() > kMaxUnfinished;
  if (too_long_) unfinished_.resize(kMaxUnfinished);
  ahead_.reset();
}

void Pulse::answer_in_turn() {
  if (!finder_.at_frame()) passed_ += finder_.pass(unseen());
  if (passed_ > 0) return;
  std::size_t answered = 0;
  while (finder_.at_frame()) {
    const auto frame = finder_.whole(std::string_view(waiting_).substr(answered));
    const auto id = frame ? free_ping(*frame) : std::nullopt;
    if (!id || !answer(*id, false)) break;
    answered += frame->size;
  }
  waiting_.erase(0, answered);
}

void Pulse::overtake() {
  look_at_ = Clock::time_point::max();
  if (!finder_.at_frame()) passed_ += finder_.pass(unseen());
  if (shut_down_ || too_long_ || !finder_.at_frame() || unseen().empty()) return;
  if (!writer.has_room()) {
    // Not looked through again and again for one who does not read.
    look_at_ = Clock::now() + kRetry;
    return;
  }
  std::size_t at = passed_;
  while (const auto frame = finder_.whole(std::string_view(waiting_).substr(at))) {
    const auto id = free_ping(*frame);
    const bool mine = id && may_overtake(*id);
    if (ahead_ && ahead_->shutdown) break;
    if (mine) {
      if (!answer(*id, true)) {
        look_at_ = Clock::now() + kRetry;
        break;
      }
    } else {
      finder_.pass(std::string_view(waiting_).substr(at));
      std::memmove(&waiting_[passed_], &waiting_[at], frame->size);
      passed_ += frame->size;
    }
    at += frame->size;
  }
  waiting_.erase(passed_, at - passed_);
}

bool Pulse::may_overtake(std::string_view id) {
  if (!ahead_) {
    ahead_.emplace();
    ahead_->note(unfinished_ + waiting_.substr(0, passed_));
  } else {
    ahead_->note(std::string_view(waiting_).substr(noted_, passed_ - noted_));
  }
  noted_ = passed_;
  return !ahead_->shutdown && ahead_->ids.count(std::string(id)) == 0;
}

bool Pulse::answer(std::string_view id, bool overtaking) {
  std::string frame = "{\"jsonrpc\":\"2.0\",\"id\":" + std::string(id) +
                      ",\"result\":" + vitals_->ping_result(in_flight_.size()) + "}";
  if (finder_.framing() == Framing::lsp) {
    frame = "Content-Length: " + std::to_string(frame.size()) + "\r\n\r\n" + frame;
  } else {
    frame += '\n';
  }
  // Counted first: whoever has the answer finds it in `stats`.
  vitals_->answered += 1;
  vitals_->overtook += overtaking ? 1 : 0;
  if (writer.slip_in(frame)) {
    if (!began_ && passed_ == 0) took_beginning_ = true;
    return true;
  }
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

// Reads a connection ahead of Python, and answers `ping` where Python cannot: while somebody holds its lock.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <unordered_set>

#include "mlx_sidecar/frames.hpp"
#include "mlx_sidecar/ping.hpp"
#include "mlx_sidecar/writer.hpp"

namespace mlx_sidecar {

// What a ping is told of the process. Times are seconds of Python's time.monotonic().
class Vitals {
 public:
  explicit Vitals(double started_at) : started_at_(started_at) {}

  void note_state(std::string state);
  void note_step(std::optional<double> at);
  std::string ping_result(std::size_t in_flight) const;

  // Pings answered here, and those of them that overtook something.
  std::atomic<std::uint64_t> answered{0};
  std::atomic<std::uint64_t> overtook{0};

 private:
  static constexpr double kIdle = -1;

  const double started_at_;
  std::atomic<double> last_step_at_{kIdle};
  mutable std::mutex mutex_;
  std::string state_ = "starting";
};

// Every byte that is read here comes out of `take` in order, but for the frames of plain pings that were
// answered. That happens in two cases: Python has dealt with everything before; or it has not come for 15 ms,
// and nothing that the ping overtakes has its id or is a shutdown. A ping is never taken together with what
// stands before it: while Python deals with that, it can still overtake.
class Pulse {
 public:
  // With `framing` unknown the first byte tells.
  Pulse(std::shared_ptr<Vitals> vitals, int read_fd, int write_fd, Framing framing);
  Pulse(const Pulse&) = delete;
  Pulse& operator=(const Pulse&) = delete;
  ~Pulse();

  // Begins to read; `greeted` has been read already, and dealt with.
  void start(std::string_view greeted);

  // What has been found out by all that was read; Python may have seen nothing of it.
  Framing framing();

  // Whether the very first bytes were a ping that was answered: what Python gets does not begin at the
  // beginning.
  bool took_beginning() const { return took_beginning_; }

  // Returns when there is something to take, or nothing more will come. Says that all that was taken has been
  // dealt with.
  void wait();

  // Returns bytes, none at the end; or nothing, when what there was has been answered since.
  std::optional<std::string> take();

  // Requests in flight by their ids, as JSON text.
  void add(const std::string& id);
  void discard(const std::string& id);

  // From now on every ping is Python's to refuse.
  void shut_down();

  // Stops reading; afterwards the descriptor may be closed.
  void stop();

  Writer writer;

 private:
  using Clock = std::chrono::steady_clock;

  void run();
  void append(std::string_view bytes);
  std::size_t for_python(bool now);
  std::string hand_over(std::size_t size);
  void dealt_with();
  void answer_in_turn();
  void overtake();
  std::string_view unseen() const;
  bool may_overtake(std::string_view id);
  std::optional<std::string_view> free_ping(const Frame& frame) const;
  bool answer(std::string_view id, bool overtaking);
  int timeout_ms();
  void wake();

  const std::shared_ptr<Vitals> vitals_;
  const int read_fd_;
  std::thread thread_;
  std::mutex stop_mutex_;

  std::mutex mutex_;  // for everything below
  int wake_fds_[2] = {-1, -1};
  std::condition_variable arrived_;
  bool ended_ = false;
  bool stopping_ = false;
  bool shut_down_ = false;
  std::unordered_set<std::string> in_flight_;

  std::string waiting_;         // not taken yet
  std::string unfinished_;      // taken, but not known to have been dealt with
  bool whole_ = true;           // what was taken ends with a frame
  bool consumed_ = true;        // all of it has been dealt with, as far as it is whole
  bool too_long_ = false;       // a frame that was taken in part, to be remembered whole
  FrameFinder finder_;          // has passed all that was taken,
  std::size_t passed_ = 0;      // and so much of what is waiting, which is Python's for certain
  std::optional<Ahead> ahead_;  // what a ping would overtake: what is unfinished,
  std::size_t noted_ = 0;       // and so much of what is waiting
  bool began_ = false;          // something was handed to Python
  std::atomic<bool> took_beginning_{false};
  Clock::time_point look_at_ = Clock::time_point::max();
  Clock::time_point patience_ends_ = Clock::time_point::max();
};

}  // namespace mlx_sidecar

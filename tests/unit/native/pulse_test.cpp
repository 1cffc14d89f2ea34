// Drives pulses from several threads at once, for the sanitizers to watch: a reader that is sometimes late, a
// writer that fills the socket, ids that come and go, and peers that leave in the middle.
#include "mlx_sidecar/pulse.hpp"

#include <sys/socket.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

namespace {

using mlx_sidecar::Framing;

void check(bool fine, const char* what) {
  if (fine) return;
  std::fprintf(stderr, "%s\n", what);
  std::_Exit(1);
}

void say(int fd, const std::string& text) {
  for (std::size_t at = 0; at < text.size();) {
    const ssize_t said = ::write(fd, text.data() + at, text.size() - at);
    check(said > 0, "the pulse does not read");
    at += static_cast<std::size_t>(said);
  }
}

std::size_t count(const std::string& text, const std::string& part) {
  std::size_t found = 0;
  for (auto at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++found;
  return found;
}

std::string framed(Framing framing, const std::string& body) {
  if (framing == Framing::ndjson) return body + "\n";
  return "Content-Length: " + std::to_string(body.size()) + "\r\n\r\n" + body;
}

void converse(const std::shared_ptr<mlx_sidecar::Vitals>& vitals, Framing framing, bool leave_early) {
  constexpr int kPings = 400;
  constexpr int kFrames = 50;
  int ends[2];
  check(::socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0, "no sockets");
  mlx_sidecar::Pulse pulse(vitals, ends[0], ends[0], Framing::unknown);
  pulse.start("\r\n");
  say(ends[1], framed(framing, R"({"jsonrpc":"2.0","id":1,"method":"ping"})"));
  char answer[1000];
  check(::read(ends[1], answer, sizeof answer) > 0, "a ping was not answered");
  std::string read;
  std::string heard;

  std::thread reader([&] {
    for (int turn = 0;; ++turn) {
      pulse.wait();
      if (turn % 16 == 0) ::usleep(20'000);
      const auto bytes = pulse.take();
      if (bytes && bytes->empty()) return;
      if (bytes) read += *bytes;
    }
  });
  std::thread writer([&] {
    const std::string frame = framed(framing, "{\"frame\":\"" + std::string(100'000, 'x') + "\"}");
    try {
      for (int i = 0; i < kFrames; ++i) {
        const auto written = pulse.writer.try_write(frame);
        if (written < frame.size()) pulse.writer.write_all(frame.substr(written));
        pulse.add(std::to_string(i));
        vitals->note_state(i % 2 ? "ready" : "starting");
        vitals->note_step(i);
        pulse.discard(std::to_string(i));
      }
      ::shutdown(ends[0], SHUT_WR);
    } catch (const std::system_error&) {
      check(leave_early, "the peer was there");
    }
  });
  std::thread asker([&] {
    for (int i = 0; i < kPings; ++i) {
      const std::string id = std::to_string(1000 + i);
      say(ends[1], framed(framing, R"({"jsonrpc":"2.0","id":)" + id + R"(,"method":"ping"})"));
      say(ends[1], framed(framing, "{\"other\":" + id + "}"));
    }
    if (!leave_early) ::shutdown(ends[1], SHUT_WR);
  });
  std::thread listener([&] {
    std::vector<char> buffer(65536);
    ssize_t size = 0;
    while ((size = ::read(ends[1], buffer.data(), buffer.size())) > 0 &&
           !(leave_early && heard.size() > 1'000'000)) {
      heard.append(buffer.data(), static_cast<std::size_t>(size));
    }
  });
  asker.join();
  listener.join();
  if (leave_early) ::shutdown(ends[1], SHUT_RDWR);
  writer.join();
  reader.join();
  pulse.stop();
  pulse.stop();
  ::close(ends[0]);
  ::close(ends[1]);
  check(count(read, "\"other\"") == kPings, "something was lost");
  if (!leave_early) check(count(heard, "xx\"}") == kFrames, "a frame was broken");
}

}  // namespace

int main() {
  std::signal(SIGPIPE, SIG_IGN);
  const auto vitals = std::make_shared<mlx_sidecar::Vitals>(0.0);
  std::vector<std::thread> conversations;
  for (const auto framing : {Framing::ndjson, Framing::lsp}) {
    for (const bool leave_early : {false, true}) {
      conversations.emplace_back([&, framing, leave_early] { converse(vitals, framing, leave_early); });
    }
  }
  for (auto& conversation : conversations) conversation.join();
}

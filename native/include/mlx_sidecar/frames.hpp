// Where the frames of a connection begin and end, in either framing.
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <string_view>

namespace mlx_sidecar {

enum class Framing { unknown, ndjson, lsp };

struct Frame {
  std::size_t size = 0;   // with what keeps it apart from the next one
  std::string_view body;  // without
};

// Follows a stream that comes in pieces and is looked at once. Agrees with protocol/framing.py; but where
// that would have to judge an unusual header, it is lost: then no frame begins any more.
class FrameFinder {
 public:
  // With `framing` unknown the first byte that is not blank decides.
  explicit FrameFinder(Framing framing) : framing_(framing) {}

  // Looks at the bytes behind those of the last call, up to where the next frame begins; returns how many
  // those are.
  std::size_t pass(std::string_view bytes);

  // Whether a frame begins with the next byte.
  bool at_frame() const { return at_ == At::frame; }

  // The frame that `bytes` begin with, if all of it is there. Only at a frame.
  std::optional<Frame> whole(std::string_view bytes) const;

  // Whether `bytes` are only the beginning of a frame. Only at a frame.
  bool is_part(std::string_view bytes) const;

  Framing framing() const { return framing_; }

 private:
  enum class At { prefix, frame, line, header, body, nowhere };

  std::size_t pass_prefix(std::string_view bytes);
  std::size_t pass_header(std::string_view bytes);

  Framing framing_;
  At at_ = At::prefix;
  std::size_t mark_ = 0;       // bytes of a byte order mark so far
  std::string header_;         // so far
  std::size_t body_left_ = 0;  // bytes
};

}  // namespace mlx_sidecar

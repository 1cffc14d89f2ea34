// What can be told of a frame without Python: whether it is a plain `ping`, and which ids it may use.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <unordered_set>

namespace mlx_sidecar {

// The id, as JSON text, of a ping that needs no decoder to be understood; nothing for every other line. Plain
// is an object of "jsonrpc", "method", "id" and perhaps empty "params", each once and without escapes; the id
// is an integer that JavaScript can hold or a string of printable ASCII.
std::optional<std::string_view> plain_ping(std::string_view line);

// What a ping must know of the frames that it overtakes. A guess on the safe side: words inside a frame's
// parameters count as well.
struct Ahead {
  std::unordered_set<std::string> ids;
  bool shutdown = false;

  void note(std::string_view frames);
};

}  // namespace mlx_sidecar

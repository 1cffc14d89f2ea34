#include "mlx_sidecar/ping.hpp"

namespace mlx_sidecar {
namespace {

constexpr std::size_t kLongestLine = 512;
constexpr std::string_view kLargestInteger = "9007199254740991";  // 2^53 - 1

class Scanner {
 public:
  explicit Scanner(std::string_view text) : text_(text) {}

  bool at_end() {
    skip_blank();
    return text_.empty();
  }

  bool take(std::string_view token) {
    skip_blank();
    if (text_.substr(0, token.size()) != token) return false;
    text_.remove_prefix(token.size());
    return true;
  }

  std::optional<std::string_view> take_id() {
    skip_blank();
    const std::size_t size = text_.substr(0, 1) == "\"" ? string_size() : integer_size();
    if (size == 0) return std::nullopt;
    const std::string_view id = text_.substr(0, size);
    text_.remove_prefix(size);
    return id;
  }

  // Only what every layer above reads as no parameters: blanks inside are left to those.
  bool take_nothing() { return take("{}") || take("[]") || take("[null]") || take("null"); }

 private:
  void skip_blank() {
    const auto start = text_.find_first_not_of(" \t\r");
    text_.remove_prefix(start == std::string_view::npos ? text_.size() : start);
  }

  std::size_t string_size() const {
    for (std::size_t i = 1; i < text_.size(); ++i) {
      const char c = text_[i];
      if (c == '"') return i + 1;
      if (c < ' ' || c > '~' || c == '\\') break;
    }
    return 0;
  }

  std::size_t integer_size() const {
    const std::size_t sign = text_.substr(0, 1) == "-" ? 1 : 0;
    auto end = text_.find_first_not_of("0123456789", sign);
    if (end == std::string_view::npos) end = text_.size();
    const std::string_view digits = text_.substr(sign, end - sign);
    const bool is_fraction = end < text_.size() && (text_[end] == '.' || (text_[end] | 0x20) == 'e');
    if (digits.empty() || is_fraction || (digits[0] == '0' && end > 1)) return 0;
    if (digits.size() > kLargestInteger.size()) return 0;
    if (digits.size() == kLargestInteger.size() && digits > kLargestInteger) return 0;
    return end;
  }

  std::string_view text_;
};

}  // namespace

std::optional<std::string_view> plain_ping(std::string_view line) {
  Scanner scan(line.size() <= kLongestLine ? line : std::string_view());
  if (!scan.take("{")) return std::nullopt;
  bool version = false;
  bool method = false;
  bool params = false;
  std::optional<std::string_view> id;
  do {
    if (!version && scan.take("\"jsonrpc\"")) {
      version = scan.take(":") && scan.take("\"2.0\"");
      if (!version) return std::nullopt;
    } else if (!method && scan.take("\"method\"")) {
      method = scan.take(":") && scan.take("\"ping\"");
      if (!method) return std::nullopt;
    } else if (!params && scan.take("\"params\"")) {
      params = scan.take(":") && scan.take_nothing();
      if (!params) return std::nullopt;
    } else if (!id && scan.take("\"id\"")) {
      if (scan.take(":")) id = scan.take_id();
      if (!id) return std::nullopt;
    } else {
      return std::nullopt;
    }
  } while (scan.take(","));
  const bool whole = scan.take("}") && scan.at_end() && version && method;
  return whole ? id : std::nullopt;
}

void Ahead::note(std::string_view frames) {
  static constexpr std::string_view kId = "\"id\"";
  shutdown = shutdown || frames.find("\"shutdown\"") != std::string_view::npos;
  for (auto at = frames.find(kId); at != std::string_view::npos; at = frames.find(kId, at + 1)) {
    Scanner scan(frames.substr(at + kId.size()));
    if (!scan.take(":")) continue;
    if (const auto id = scan.take_id()) ids.emplace(*id);
  }
}

}  // namespace mlx_sidecar

#include "mlx_sidecar/frames.hpp"

#include <algorithm>
#include <utility>

namespace mlx_sidecar {
namespace {

constexpr auto npos = std::string_view::npos;
constexpr std::string_view kMark = "\xef\xbb\xbf";
constexpr std::string_view kHeaderEnd = "\r\n\r\n";
constexpr std::size_t kLongestHeader = 256;
constexpr std::size_t kLongestBody = 64 * 1024 * 1024;  // MAX_INBOUND_FRAME_BYTES of protocol/framing.py

bool is_blank(char c) { return c == ' ' || c == '\t' || c == '\r' || c == '\n'; }

char lower(char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c | 0x20) : c; }

std::string_view trimmed(std::string_view text) {
  const auto first = text.find_first_not_of(" \t");
  return first == npos ? std::string_view() : text.substr(first, text.find_last_not_of(" \t") - first + 1);
}

std::optional<std::size_t> decimal(std::string_view digits) {
  if (digits.empty() || digits.size() > 8 || digits.find_first_not_of("0123456789") != npos)
    return std::nullopt;
  std::size_t value = 0;
  for (const char digit : digits) value = value * 10 + static_cast<std::size_t>(digit - '0');
  return value <= kLongestBody ? std::make_optional(value) : std::nullopt;
}

bool is_utf8(std::string_view content_type) {
  constexpr std::string_view kCharset = "charset=";
  const auto at = content_type.find(kCharset);
  if (at == npos) return true;
  const auto charset = content_type.substr(at + kCharset.size());
  return charset == "utf-8" || charset == "utf8";
}

// What a block of headers says the body's length is; nothing if it is not of the plainest kind.
std::optional<std::size_t> content_length(std::string block) {
  std::transform(block.begin(), block.end(), block.begin(), lower);
  std::optional<std::size_t> length;
  std::string_view left = std::string_view(block).substr(0, block.size() - 2);
  while (!left.empty()) {
    const auto end = left.find("\r\n");
    const auto line = left.substr(0, end);
    left.remove_prefix(end + 2);
    const auto colon = line.find(':');
    if (colon == npos || line.find_first_of("\r\n") != npos) return std::nullopt;
    const auto name = line.substr(0, colon);
    const auto value = trimmed(line.substr(colon + 1));
    if (name == "content-length" && !length) {
      length = decimal(value);
      if (!length) return std::nullopt;
    } else if (name != "content-type" || !is_utf8(value)) {
      return std::nullopt;
    }
  }
  return length;
}

}  // namespace

std::size_t FrameFinder::pass(std::string_view bytes) {
  std::size_t at = 0;
  if (at_ == At::prefix) {
    at = pass_prefix(bytes);
    if (at_ == At::prefix || at_ == At::frame) return at;
  }
  if (at_ == At::frame && !bytes.empty()) at_ = framing_ == Framing::lsp ? At::header : At::line;
  if (at_ == At::line) {
    const auto newline = bytes.find('\n', at);
    if (newline == npos) return bytes.size();
    at_ = At::frame;
    return newline + 1;
  }
  if (at_ == At::header) at = pass_header(bytes);
  if (at_ == At::body) {
    const auto size = std::min(body_left_, bytes.size() - at);
    body_left_ -= size;
    if (body_left_ == 0) at_ = At::frame;
    return at + size;
  }
  return bytes.size();
}

std::optional<Frame> FrameFinder::whole(std::string_view bytes) const {
  FrameFinder ahead = *this;
  const auto size = ahead.pass(bytes);
  if (size == 0 || !ahead.at_frame()) return std::nullopt;
  const auto frame = bytes.substr(0, size);
  if (framing_ == Framing::ndjson) return Frame{size, frame.substr(0, size - 1)};
  return Frame{size, frame.substr(frame.find(kHeaderEnd) + kHeaderEnd.size())};
}

bool FrameFinder::is_part(std::string_view bytes) const {
  FrameFinder ahead = *this;
  ahead.pass(bytes);
  return ahead.at_ == At::line || ahead.at_ == At::header || ahead.at_ == At::body;
}

std::size_t FrameFinder::pass_prefix(std::string_view bytes) {
  for (std::size_t at = 0; at < bytes.size(); ++at) {
    const char c = bytes[at];
    if (mark_ < kMark.size() && c == kMark[mark_]) {
      ++mark_;
      continue;
    }
    const bool half_a_mark = mark_ > 0 && mark_ < kMark.size();
    if (!half_a_mark) {
      mark_ = kMark.size();
      if (is_blank(c)) continue;
    }
    if (framing_ == Framing::unknown) {
      framing_ = !half_a_mark && lower(c) == 'c' ? Framing::lsp : Framing::ndjson;
    }
    at_ = !half_a_mark ? At::frame : framing_ == Framing::ndjson ? At::line : At::nowhere;
    return at;
  }
  return bytes.size();
}

std::size_t FrameFinder::pass_header(std::string_view bytes) {
  for (std::size_t at = 0; at < bytes.size(); ++at) {
    header_ += bytes[at];
    const bool ends = header_.size() >= kHeaderEnd.size() &&
                      header_.compare(header_.size() - kHeaderEnd.size(), npos, kHeaderEnd) == 0;
    const bool odd = bytes[at] == '\n' && (header_.size() == 1 || header_[header_.size() - 2] != '\r');
    if (!ends && !odd && header_.size() < kLongestHeader) continue;
    const auto length = ends ? content_length(std::move(header_)) : std::nullopt;
    header_.clear();
    body_left_ = length.value_or(0);
    at_ = length ? At::body : At::nowhere;
    return at + 1;
  }
  return bytes.size();
}

}  // namespace mlx_sidecar

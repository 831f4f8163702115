// SPDX-License-Identifier: Apache-2.0
#include "faults.h"

#include <sys/stat.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <mutex>
#include <sstream>
#include <thread>
#include <vector>

#include "settings.h"

namespace sim::faults {
namespace {

struct Rule {
  std::string call;
  uint64_t first;
  uint64_t last;
  int code;
  int delay_ms;
  uint64_t seen = 0;
};

std::string read_file(const char* path) {
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

bool parse_number(const std::string& text, uint64_t* value) {
  char* end = nullptr;
  *value = std::strtoull(text.c_str(), &end, 10);
  return !text.empty() && *end == '\0';
}

// The part before the first single colon: `aten::mm` contains a double one.
std::string call_in(const std::string& rule) {
  size_t end = rule.find(':');
  while (end != std::string::npos && rule.compare(end, 2, "::") == 0) end = rule.find(':', end + 2);
  return rule.substr(0, end);
}

bool parse_rule(const std::string& text, Rule* rule) {
  std::vector<std::string> fields = {call_in(text)};
  std::stringstream stream(text.substr(std::min(text.size(), fields[0].size() + 1)));
  for (std::string field; std::getline(stream, field, ':');) fields.push_back(field);
  if (fields.size() != 3 && fields.size() != 4) return false;
  rule->call = fields[0];
  if (!parse_number(fields[1], &rule->first) || rule->first == 0) return false;
  bool is_delay = fields[2].rfind("delay_ms=", 0) == 0;
  uint64_t value;
  if (!parse_number(is_delay ? fields[2].substr(9) : fields[2], &value)) return false;
  rule->code = is_delay ? 0 : static_cast<int>(value);
  rule->delay_ms = is_delay ? static_cast<int>(value) : 0;
  uint64_t times = 1;
  if (fields.size() == 4 && fields[3] == "*") {
    rule->last = UINT64_MAX;
    return true;
  }
  if (fields.size() == 4 && !parse_number(fields[3], &times)) return false;
  rule->last = rule->first + times - 1;
  return true;
}

bool parse_rules(const std::string& text, std::vector<Rule>* rules) {
  std::stringstream stream(text);
  for (std::string entry; std::getline(stream, entry, ',');) {
    entry.erase(0, entry.find_first_not_of(" \n\t"));
    entry.erase(entry.find_last_not_of(" \n\t") + 1);
    if (entry.empty()) continue;
    Rule rule;
    if (!parse_rule(entry, &rule)) return false;
    rules->push_back(rule);
  }
  return true;
}

// The slow path of a call, taken only if there are rules, a log or a rules file.
class Watch {
 public:
  Watch() {
    const char* rules = std::getenv("NPU_SIM_FAULTS");
    if (rules != nullptr && !set(rules)) {
      fault("NPU_SIM_FAULTS is not understood: '%s'", rules);
    }
    file_ = std::getenv("NPU_SIM_FAULTS_FILE");
    refresh();
  }

  bool active() const { return active_.load(std::memory_order_relaxed); }

  bool set(const std::string& text) {
    std::vector<Rule> rules;
    if (!parse_rules(text, &rules)) return false;
    std::lock_guard<std::mutex> lock(mutex_);
    rules_.swap(rules);
    ++changes_;
    hits_ = 0;
    refresh();
    return true;
  }

  uint64_t hits() {
    std::lock_guard<std::mutex> lock(mutex_);
    return hits_;
  }

  void keep_log(bool on) {
    std::lock_guard<std::mutex> lock(mutex_);
    keeps_log_ = on;
    log_.clear();
    refresh();
  }

  std::string log() {
    std::lock_guard<std::mutex> lock(mutex_);
    return log_;
  }

  Hit find(const std::string& call) {
    follow_file();
    Hit hit;
    std::lock_guard<std::mutex> lock(mutex_);
    hit.rules = changes_;
    if (keeps_log_ && call.find("::") == std::string::npos) log_ += call + "\n";
    for (Rule& rule : rules_) {
      if (rule.call != call) continue;
      ++rule.seen;
      if (rule.seen < rule.first || rule.seen > rule.last) continue;
      hit.code = hit.code != 0 ? hit.code : rule.code;
      hit.delay_ms += rule.delay_ms;
      ++hits_;
    }
    return hit;
  }

  // New rules end a delay, so that a test can hold a call and release it.
  void wait(const Hit& hit) {
    auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(hit.delay_ms);
    while (changes_ == hit.rules && std::chrono::steady_clock::now() < end) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      follow_file();
    }
  }

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  void refresh() { active_ = !rules_.empty() || keeps_log_ || file_ != nullptr; }

  void follow_file() {
    if (file_ == nullptr) return;
    timespec now;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    int64_t now_ms = now.tv_sec * 1000 + now.tv_nsec / 1000000;
    if (now_ms == checked_ms_.exchange(now_ms)) return;
    struct stat status;
    int64_t version = 0;
    if (stat(file_, &status) == 0) {
      version = status.st_mtim.tv_sec * int64_t{1000000000} + status.st_mtim.tv_nsec;
    }
    if (version == version_.exchange(version)) return;
    std::string text = version == 0 ? "" : read_file(file_);
    if (!set(text)) fault("the rules in %s are not understood: '%s'", file_, text.c_str());
  }

  std::mutex mutex_;
  std::vector<Rule> rules_;
  std::atomic<uint64_t> changes_{0};
  uint64_t hits_ = 0;
  std::string log_;
  bool keeps_log_ = false;
  const char* file_ = nullptr;
  std::atomic<int64_t> checked_ms_{0};
  std::atomic<int64_t> version_{0};
  std::atomic<bool> active_{false};
};

Watch& watch() {
  static Watch* once = new Watch;
  return *once;
}

struct Calls {
  std::mutex mutex;
  std::map<std::string, Call*> by_name;
};

Calls& calls() {
  static Calls* once = new Calls;
  return *once;
}

std::atomic<bool> forked{false};

}  // namespace

Call::Call(const char* name) : name_(name), supported_(chip_supports(name)) {
  std::lock_guard<std::mutex> lock(calls().mutex);
  calls().by_name[name_] = this;
}

int Call::enter() {
  Hit found = hit();
  if (found.delay_ms > 0) found.wait();
  return found.code;
}

void Hit::wait() const { watch().wait(*this); }

Hit Call::hit() {
  if (forked.load(std::memory_order_relaxed)) {
    return {fail(ACL_ERROR_INTERNAL_ERROR,
                 "%s: the device was in use when this process was forked; a child must be spawned "
                 "to use a device",
                 name_.c_str())};
  }
  count_.fetch_add(1, std::memory_order_relaxed);
  if (!supported_) {
    return {fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "%s: %s does not support it", name_.c_str(),
                 settings().chip.soc_name)};
  }
  static Watch& rules = watch();
  if (!rules.active()) return {};
  Hit found = rules.find(name_);
  if (found.code != 0) fail(found.code, "%s: failed on request (fault injection)", name_.c_str());
  return found;
}

bool set(const char* rules) { return watch().set(rules); }

uint64_t hits() { return watch().hits(); }

uint64_t count(const char* name) {
  std::lock_guard<std::mutex> lock(calls().mutex);
  auto found = calls().by_name.find(name);
  return found == calls().by_name.end() ? 0 : found->second->count();
}

void reset_counts() {
  std::lock_guard<std::mutex> lock(calls().mutex);
  for (auto& [name, call] : calls().by_name) call->reset_count();
}

void keep_log(bool on) { watch().keep_log(on); }
std::string log() { return watch().log(); }
void refuse_after_fork() { forked = true; }

}  // namespace sim::faults

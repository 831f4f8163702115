// SPDX-License-Identifier: Apache-2.0
//
// Each AscendCL call of each operation fails once; then the operation is repeated.
// tests/allocator/test_faults.py does the same through Python; here the sanitizers watch.
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <set>
#include <thread>

#include "ascendcl/check.h"
#include "ascendcl/codes.h"
#include "ascendcl/contexts.h"
#include "ascendcl/newer.h"
#include "blocks.h"
#include "check.h"
#include "pool/pool.h"
#include "temporary_folder.h"

using camem::Action;
using camem::Until;
using device::Faults;
using device::held;
using device::kMiB;

namespace {

camem::Plan level(int number) {
  return plan({{"weights", number == 1 ? Action::kOffload : Action::kDiscard},
               {"runtime", Action::kOffload},
               {"kv_cache", Action::kDiscard}});
}

void wake_all() { wake({"weights", "runtime", "kv_cache"}); }

struct Operation {
  const char* name;
  std::function<void()> prepare;
  std::function<void()> run;
  bool keeps_weights;    // after it has succeeded
  bool may_fail = true;  // if false, it recovers from any single failing call
};

void sleep_and_commit() {
  pool().sleep(level(1), {}, Until::kPrepared);
  pool().commit();
}

void check_states(camem::State state, const std::set<std::string>& tags) {
  for (const camem::AllocationInfo& info : pool().allocations()) {
    CHECK(tags.count(pool().tag_name(info.tag)) == 0 || info.state == state);
  }
}

// An abort reports what it could not roll back, and a wake restores that.
void sleep_and_abort() {
  pool().sleep(level(1), {}, Until::kPrepared);
  if (pool().abort().empty())
    check_states(camem::State::kMapped, {"weights", "runtime", "kv_cache"});
}

void wake_and_commit() {
  pool().wake({pool().tag("weights"), pool().tag("runtime")}, {}, Until::kPrepared);
  pool().commit();
}

void wake_and_abort() {
  pool().wake({pool().tag("weights"), pool().tag("runtime")}, {}, Until::kPrepared);
  if (pool().abort().empty()) check_states(camem::State::kOffloaded, {"weights", "runtime"});
}

void take_and_free() { pool().free(pool().allocate(4 * kMiB, 0), nullptr); }

void take_and_trim() {
  void* address = pool().allocate(4 * kMiB, 0);
  try {
    CHECK_EQ(pool().trim({reinterpret_cast<std::uintptr_t>(address)}), 4 * kMiB);
  } catch (...) {
    pool().free(address, nullptr);
    throw;
  }
  pool().free(address, nullptr);
}

// A sleep allocates what a background thread could not.
void prepare_and_sleep() {
  pool().prepare({pool().tag("weights")}, false);
  CHECK(pool().wait_prepared(60));
  pool().sleep(level(1));
}

void prepare_and_release() {
  pool().prepare({pool().tag("weights")}, false);
  CHECK(pool().wait_prepared(60));
  pool().release_prepared();
  pool().prepare({}, false);  // waits until everything is freed
}

const Operation kOperations[] = {
    {"sleep 1", [] {}, [] { pool().sleep(level(1)); }, true},
    {"sleep 2", [] {}, [] { pool().sleep(level(2)); }, false},
    {"sleep 2 after 1", [] { pool().sleep(level(1)); }, [] { pool().sleep(level(2)); }, false},
    {"sleep, prepared and committed", [] {}, sleep_and_commit, true},
    {"sleep, prepared and aborted", [] {}, sleep_and_abort, true},
    {"discard", [] {}, [] { pool().sleep(plan({{"kv_cache", Action::kDiscard}})); }, true},
    {"wake", [] { pool().sleep(level(1)); }, wake_all, true},
    {"wake weights", [] { pool().sleep(level(1)); }, [] { wake({"weights"}); }, true},
    {"wake after 2", [] { pool().sleep(level(2)); }, wake_all, false},
    {"wake, prepared and committed", [] { pool().sleep(level(1)); }, wake_and_commit, true},
    {"wake, prepared and aborted", [] { pool().sleep(level(1)); }, wake_and_abort, true},
    {"allocate and free", [] {}, take_and_free, true},
    {"allocate and trim", [] {}, take_and_trim, true},
    {"prepare host memory and sleep", [] {}, prepare_and_sleep, true},
    {"prepare host memory and release it", [] {}, prepare_and_release, true, false},
};

void sleep_to(camem::Place place, Until until = Until::kCommitted) {
  camem::Plan plan = level(1);
  plan.place = place;
  pool().sleep(plan, {}, until);
}
void sleep_to_disk() { sleep_to(camem::Place::kDisk); }
void sleep_to_host() { sleep_to(camem::Place::kHost); }

const Operation kMoves[] = {
    {"sleep to disk after one in host memory",
     [] {
       sleep_to_host();
       wake_all();
     },
     sleep_to_disk, true},
    {"sleep in host memory after one on disk",
     [] {
       sleep_to_disk();
       wake_all();
     },
     sleep_to_host, true},
    {"move to disk", sleep_to_host, sleep_to_disk, true},
    {"move to host", sleep_to_disk, sleep_to_host, true},
    {"move to host, prepared and aborted", sleep_to_disk,
     [] {
       sleep_to(camem::Place::kHost, Until::kPrepared);
       CHECK_EQ(pool().abort(), "");
     },
     true},
    {"wake after a move to disk",
     [] {
       sleep_to_host();
       sleep_to_disk();
     },
     wake_all, true},
};

// Where another way exists, a failing call is no failing operation: memory that is not page-locked
// is copied through blocks or synchronously, and what is not given back now is offered again.
bool has_another_way(const std::string& rule) {
  const std::string call = rule.substr(0, rule.find(':'));
  static const std::set<std::string> calls = {
      "aclrtMallocHost",  "aclrtFreeHost",       "aclrtFreePhysical",  "aclrtReleaseMemAddress",
      "aclrtStreamQuery", "aclrtHostRegisterV2", "aclrtHostUnregister"};
  return calls.count(call) != 0;
}

struct World {
  Block weights{"weights", 4 * kMiB, 1};
  Block small{"weights", 2 * kMiB, 2};
  Block runtime{"runtime", 2 * kMiB, 3};
  Block cache{"kv_cache", 2 * kMiB, 4};

  bool is_mapped() const {
    const std::vector<camem::AllocationInfo> all = pool().allocations();
    return std::all_of(all.begin(), all.end(), [](const camem::AllocationInfo& info) {
      return info.state == camem::State::kMapped;
    });
  }

  static std::size_t backup_bytes() {
    std::size_t bytes = 0;
    for (const camem::AllocationInfo& info : pool().allocations()) {
      bytes += info.host_bytes + info.disk_bytes;
    }
    return bytes;
  }

  void check_intact(bool with_weights) const {
    CHECK(runtime.intact());
    CHECK(!with_weights || (weights.intact() && small.intact()));
  }
};

constexpr int kAttempts = 1000;

// After a wait that ended too early, the work may still be running.
void repeat(const Operation& operation) {
  for (int attempt = 1;; ++attempt) {
    try {
      return operation.run();
    } catch (const camem::TransactionError& error) {
      const bool waits = std::string(error.what()).find("not ended yet") != std::string::npos;
      if (!waits || attempt == kAttempts) throw;
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
  }
}

struct Outcome {
  bool came = false;      // the fault did
  bool reported = false;  // by the operation; otherwise it recovered
};

// Something that is done before each operation, with memory to do it with.
using Begin = std::function<void()>;

Outcome survive(const Operation& operation, const std::string& rules, bool gives_scratch_back,
                const Begin& begin) {
  const device::Held before = held();
  Outcome outcome;
  {
    World world;
    begin();
    operation.prepare();
    const bool had_weights = world.weights.info().state != camem::State::kDiscarded;
    const bool had_cache = world.is_mapped() && world.cache.intact();
    const std::size_t had_backups = World::backup_bytes();
    {
      const Faults faults(rules);
      try {
        operation.run();
      } catch (const camem::AclError&) {
        outcome.reported = true;  // by an allocation or a trim, which have nothing to roll back
      } catch (const camem::OutOfDeviceMemory&) {
        outcome.reported = true;
      } catch (const camem::TransactionError& error) {
        outcome.reported = true;
        const std::string message = error.what();
        CHECK(message.find("the same call can be repeated") != std::string::npos ||
              message.find("comes back with wake_up") != std::string::npos);
      }
      outcome.came = faults.hits() > 0;
    }
    if (outcome.reported) {
      CHECK(World::backup_bytes() >= had_backups);
      CHECK((world.weights.info().state != camem::State::kDiscarded) == had_weights);
      if (world.is_mapped()) {
        world.check_intact(true);
        CHECK(world.cache.intact() || gives_scratch_back || !had_cache);
      }
      if (!operation.keeps_weights) {  // the retried call discards them
        wake_all();
        world.check_intact(had_weights);
        operation.prepare();
      }
    }
    CHECK_EQ(camem::current_context(), camem::default_context(0));
    repeat(operation);
    wake_all();
    CHECK_EQ(held().device_bytes, before.device_bytes + 10 * kMiB);
    CHECK_EQ(held().mappings, before.mappings + 5);
    world.check_intact(operation.keeps_weights);
  }
  CHECK_EQ(held(), before);
  return outcome;
}

std::vector<std::string> log_of(const Operation& operation, const Begin& begin) {
  World world;
  begin();
  operation.prepare();
  const device::CallLog log;
  operation.run();
  std::vector<std::string> calls = log.calls();
  std::sort(calls.begin(), calls.end());
  return calls;
}

// Those of every run: how often copies wait for their streams, and whether a thread in the
// background is under way meanwhile, differs from run to run.
std::vector<std::string> calls_of(const Operation& operation, const Begin& begin = [] {}) {
  std::vector<std::string> calls = log_of(operation, begin);
  for (int run = 0; run < 4; ++run) {
    const std::vector<std::string> others = log_of(operation, begin);
    std::vector<std::string> both;
    std::set_intersection(calls.begin(), calls.end(), others.begin(), others.end(),
                          std::back_inserter(both));
    calls = both;
  }
  CHECK(!calls.empty());
  return calls;
}

// How many of these faults, each alone, the operation reported. A call that a run does not make is
// asked for again.
int survive_each(
    const Operation& operation, const std::vector<std::string>& rules,
    bool gives_scratch_back = false, const Begin& begin = [] {}) {
  int reported = 0;
  for (const std::string& rule : rules) {
    try {
      Outcome outcome;
      for (int run = 0; run < kAttempts && !outcome.came; ++run)
        outcome = survive(operation, rule, gives_scratch_back, begin);
      CHECK(outcome.came);
      CHECK(!(outcome.reported && has_another_way(rule)));
      reported += outcome.reported;
    } catch (const std::exception& error) {
      throw std::logic_error(std::string(operation.name) + " with " + rule + ": " + error.what());
    }
  }
  return reported;
}

TEST(every_call_of_every_operation_may_fail_once) {
  configure();
  for (const Operation& operation : kOperations) {
    const std::vector<std::string> calls = calls_of(operation);
    const int reported =
        survive_each(operation, device::single_faults(calls, device::kDriverError));
    CHECK_EQ(reported > 0, operation.may_fail);
  }
}

TEST(through_blocks_into_plain_memory_every_call_may_fail_once) {
  camem::Settings settings = small_settings();
  settings.unprepared = camem::Unprepared::kStage;
  settings.keep_host_backup = false;  // otherwise a background thread locks plain backups
  pool().configure(settings);
  for (const Operation& operation : kOperations) {
    survive_each(operation, device::single_faults(calls_of(operation), device::kDriverError));
  }
}

TEST(with_backups_on_disk_every_call_may_fail_once) {
  const TemporaryFolder folder;
  camem::Settings settings = small_settings();
  settings.place = camem::Place::kDisk;
  settings.backup_dir = folder.path();
  pool().configure(settings);
  for (const Operation& operation : kOperations) {
    survive_each(operation, device::single_faults(calls_of(operation), device::kDriverError));
  }
  settings.place = camem::Place::kHost;
  for (const bool keep : {true, false}) {
    settings.keep_host_backup = keep;
    pool().configure(settings);
    for (const Operation& move : kMoves) {
      survive_each(move, device::single_faults(calls_of(move), device::kDriverError));
    }
  }
  CHECK(std::filesystem::is_empty(folder.path()));
  configure();
}

TEST(scratch_memory_that_goes_at_once_comes_back_after_any_failing_call) {
  camem::Settings settings = small_settings();
  settings.scratch_chunk_bytes = settings.chunk_bytes;
  settings.scratch_tags = {pool().tag("kv_cache")};
  pool().configure(settings);
  for (const Operation& operation : kOperations) {
    survive_each(operation, device::single_faults(calls_of(operation), device::kDriverError), true);
  }
  configure();
}

TEST(without_kept_backups_every_call_may_find_no_memory) {
  configure(false);
  for (const Operation& operation : kOperations) {
    survive_each(operation, device::single_faults(calls_of(operation), device::kOutOfMemory));
  }
}

// After a failure to register no memory is registered: the choice is made anew each time.
void choose_registered_memory() {
  configure();
  camem::Settings settings = small_settings();
  settings.host_choice = {camem::HostSource::kRegistered, ""};
  pool().configure(settings);
  prepare_and_release();
  CHECK(pool().host_info().choice->source == camem::HostSource::kRegistered);
}

TEST_OF_NEWER_KERNEL(with_registered_backups_every_call_may_fail_once) {
  for (const Operation& operation : kOperations) {
    const std::vector<std::string> calls = calls_of(operation, choose_registered_memory);
    survive_each(operation, device::single_faults(calls, device::kDriverError), false,
                 choose_registered_memory);
  }
  configure();
}

// What AscendCL says of waiting it never says of the work (context.cc, stars_engine.cc).
bool may_come(const std::string& rule, aclError code) {
  const bool is_work = rule.find(".work:") != std::string::npos;
  return !is_work || (code != camem::kStreamSyncTimeout && code != ACL_ERROR_RT_EVENT_SYNC_TIMEOUT);
}

bool sweeps_all() {
  const char* wanted = std::getenv("SWEEP");
  return wanted != nullptr && std::string(wanted) == "all";
}

// The runtime has one table of codes for all of its calls and for what the driver answers: any call
// may return any of them. With SWEEP=all each call of each operation fails with each code,
// otherwise each code comes from one call of every third operation.
TEST(every_code_of_ascendcl_may_come) {
  configure();
  const bool all = sweeps_all();
  std::size_t number = 0;
  for (const Operation& operation : kOperations) {
    const std::vector<std::string> calls = calls_of(operation);
    std::vector<std::string> rules;
    std::size_t next = number++;
    for (const camem::AclCode& code : camem::acl_codes()) {
      if (!all && next++ % 3 != 0) continue;
      std::vector<std::string> faults = device::single_faults(calls, code.code);
      const auto never = [&](const std::string& rule) { return !may_come(rule, code.code); };
      faults.erase(std::remove_if(faults.begin(), faults.end(), never), faults.end());
      if (!all) faults = {faults[next / 3 % faults.size()]};
      rules.insert(rules.end(), faults.begin(), faults.end());
    }
    survive_each(operation, rules);
  }
}

// What finds out where page-locked memory comes from, apart from the pool's own.
struct Chooser {
  Chooser() {
    settings.host_choice = {camem::HostSource::kRegistered, ""};
    transfer.set_patience(settings.device_timeout);
    transfer.open(0);  // which is tried again by whoever needs it
  }
  // What a copy that was waited for too shortly uses goes once that has ended.
  ~Chooser() {
    do {
      transfer.is_stuck();
      registry.sweep(camem::Keep::kNothing, false);
    } while (registry.has_deferred());
    transfer.close();
  }

  std::mutex lock;
  camem::Settings settings = small_settings();
  camem::Registry registry;
  camem::Transfer transfer;
  camem::Backups backups{lock, settings, registry, transfer};
};

std::string locked_memory() {
  std::ifstream status("/proc/self/status");
  std::string line;
  while (std::getline(status, line) && line.rfind("VmLck:", 0) != 0) continue;
  return line;
}

std::uint64_t streams() {
  npuSimCounters counters;
  npuSimGetCounters(&counters);
  return counters.streams;
}

// A stream that cannot be asked once is asked again behind the next copies, one that is idle after
// a wait that took too long is waited for again, and the caller's context is set twice if need be.
bool leaves_registered_memory(const std::string& rule) {
  const bool asks = rule.rfind("aclrtStreamQuery:", 0) == 0 && rule.back() != '*';
  const bool waits_again = rule.rfind("aclrtSynchronizeStreamWithTimeout:", 0) == 0 &&
                           rule.find(std::to_string(camem::kStreamSyncTimeout)) != rule.npos;
  return asks || waits_again || rule.rfind("aclrtSetCurrentContext:2:", 0) == 0;
}

void check_choice(const std::string& rule) {
  const device::Held before = held();
  const std::string locked = locked_memory();
  const std::uint64_t had_streams = streams();
  const aclrtContext context = camem::current_context();
  {
    Chooser chooser;
    const Faults faults(rule);
    const bool registered = chooser.backups.source(0) == camem::HostSource::kRegistered;
    CHECK_EQ(camem::current_context(), context);
    if (rule.empty() || faults.hits() == 0) {
      CHECK(registered);
    } else {
      CHECK(!registered || leaves_registered_memory(rule));
      CHECK(registered || !chooser.backups.info().choice->why.empty());
    }
    npuSimSetFaults("");
  }
  CHECK_EQ(held(), before);
  CHECK_EQ(locked_memory(), locked);
  CHECK_EQ(streams(), had_streams);
  CHECK_EQ(camem::current_context(), context);
}

TEST_OF_NEWER_KERNEL(registered_memory_is_used_only_if_every_call_of_its_trial_succeeds) {
  std::vector<std::string> calls;
  {
    Chooser chooser;
    const device::CallLog log;
    chooser.backups.source(0);
    calls = log.calls();
  }
  std::vector<std::string> rules = device::single_faults(calls, device::kDriverError);
  rules.push_back("");
  rules.push_back("aclrtStreamQuery:1:507899:*");
  std::size_t next = 0;
  for (const camem::AclCode& code : camem::acl_codes()) {
    std::vector<std::string> faults = device::single_faults(calls, code.code);
    const auto never = [&](const std::string& rule) { return !may_come(rule, code.code); };
    faults.erase(std::remove_if(faults.begin(), faults.end(), never), faults.end());
    if (!sweeps_all()) faults = {faults[next++ % faults.size()]};
    rules.insert(rules.end(), faults.begin(), faults.end());
  }
  for (const std::string& rule : rules) {
    try {
      check_choice(rule);
    } catch (const std::exception& error) {
      throw std::logic_error("with " + rule + ": " + error.what());
    }
  }
}

TEST(weights_that_a_failed_discard_cannot_map_again_are_not_lost) {
  configure();
  World world;
  {
    const Faults faults("aclrtUnmapMem:5:507899,aclrtMapMem:1:507899:*");
    CHECK_THROWS(camem::TransactionError, pool().sleep(level(2)));
  }
  wake_all();
  world.check_intact(true);
}

TEST(a_free_whose_calls_all_fail_is_made_good_by_the_next_operation) {
  configure();
  const device::Held before = held();
  for (const char* call :
       {"aclrtStreamQuery", "aclrtUnmapMem", "aclrtFreePhysical", "aclrtReleaseMemAddress"}) {
    {
      Block block("weights", 4 * kMiB);
      npuSimSetFaults((std::string(call) + ":1:507899:*").c_str());
    }
    CHECK(!(held() == before));
    CHECK_EQ(pool().allocations().size(), 0u);
    npuSimSetFaults("");
    pool().sleep(level(1));
    CHECK_EQ(held(), before);
  }
}

TEST(errors_name_the_call_the_tag_and_the_device) {
  configure();
  Block block("weights", 4 * kMiB);
  const Faults faults("aclrtMemcpyAsync:1:507899");
  try {
    pool().sleep(level(1));
    CHECK(false);
  } catch (const camem::TransactionError& error) {
    CHECK_EQ(error.tag(), "weights");
    CHECK_EQ(error.device(), 0);
    const std::string message = error.what();
    CHECK(message.find("aclrtMemcpyAsync failed with 507899 (ACL_ERROR_RT_DRV_INTERNAL_ERROR) for "
                       "2097152 bytes") != std::string::npos);
    CHECK_THROWS(camem::AclError, std::rethrow_exception(error.cause()));
  }
}

}  // namespace

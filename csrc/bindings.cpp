// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <cmath>
#include <optional>

#include "ascendcl/check.h"
#include "ascendcl/optional.h"
#include "pool/pool.h"

namespace py = pybind11;
using namespace camem;

namespace {

// Releases the GIL. After the interpreter has ended, Python terminates threads that request the
// GIL, and C++ frames cannot be unwound then. Such a thread waits for the process to end instead.
class WithoutGil {
 public:
  WithoutGil() : alive_(!Pool::instance().has_ended()), state_(PyEval_SaveThread()) {}
  ~WithoutGil() {
    while (alive_ && Pool::instance().has_ended()) pause();
    PyEval_RestoreThread(state_);
  }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  bool alive_;
  PyThreadState* state_;
};

Action parse_action(const std::string& name) {
  if (name == "keep") return Action::kKeep;
  if (name == "offload") return Action::kOffload;
  if (name == "discard") return Action::kDiscard;
  throw py::value_error("unknown action '" + name + "'; one of keep, offload, discard");
}

HostSource parse_host_memory(const std::string& name) {
  if (name == "acl") return HostSource::kAcl;
  if (name == "registered") return HostSource::kRegistered;
  throw py::value_error("unknown host memory '" + name + "'; one of acl, registered");
}

Unprepared parse_unprepared(const std::string& name) {
  if (name == "measured") return Unprepared::kMeasured;
  if (name == "lock") return Unprepared::kLock;
  if (name == "stage") return Unprepared::kStage;
  throw py::value_error("unknown way '" + name + "'; one of measured, lock, stage");
}

const char* state_name(State state) {
  switch (state) {
    case State::kMapped:
      return "mapped";
    case State::kOffloaded:
      return "offloaded";
    case State::kDiscarded:
      return "discarded";
    default:
      return "trimmed";
  }
}

py::dict to_dict(const Report& report) {
  py::dict tags;
  for (const auto& [tag, moved] : report.tags) {
    py::dict bytes;
    bytes["offloaded"] = moved.offloaded;
    bytes["unchanged"] = moved.unchanged;
    bytes["discarded"] = moved.discarded;
    bytes["restored"] = moved.restored;
    bytes["remapped"] = moved.remapped;
    bytes["moved"] = moved.moved;
    bytes["written"] = moved.written;
    tags[py::str(Pool::instance().tag_name(tag))] = bytes;
  }
  py::dict result;
  result["tags"] = tags;
  result["seconds"] = report.seconds;
  return result;
}

std::optional<Place> parse_place(const std::string& name) {
  if (name.empty()) return std::nullopt;
  if (name == "host") return Place::kHost;
  if (name == "disk") return Place::kDisk;
  throw py::value_error("unknown place '" + name + "'; one of host, disk");
}

py::dict sleep_pool(const std::map<std::string, std::string>& actions, const std::string& otherwise,
                    const Sums& checksums, const std::string& place, bool commit) {
  Pool& pool = Pool::instance();
  Plan plan;
  plan.otherwise = parse_action(otherwise);
  plan.place = parse_place(place);
  for (const auto& [name, action] : actions) plan.actions[pool.tag(name)] = parse_action(action);
  Report report;
  {
    const WithoutGil released;
    report = pool.sleep(plan, checksums, commit ? Until::kCommitted : Until::kPrepared);
  }
  return to_dict(report);
}

std::set<TagId> tag_ids(const std::vector<std::string>& names) {
  std::set<TagId> ids;
  for (const std::string& name : names) ids.insert(Pool::instance().tag(name));
  return ids;
}

void configure_pool(std::size_t chunk_bytes, bool keep_host_backup, unsigned copy_threads,
                    unsigned host_threads, const std::string& host_memory,
                    const std::string& why_host_memory, const std::string& unprepared,
                    double device_timeout_s, std::size_t scratch_chunk_bytes,
                    const std::vector<std::string>& scratch_tags, const std::string& place,
                    const std::string& backup_dir, std::size_t disk_blocks_bytes) {
  Settings settings;
  settings.chunk_bytes = chunk_bytes;
  settings.keep_host_backup = keep_host_backup;
  settings.copy_threads = copy_threads;
  settings.host_threads = host_threads;
  settings.host_choice = {parse_host_memory(host_memory), why_host_memory};
  settings.unprepared = parse_unprepared(unprepared);
  settings.device_timeout = std::chrono::milliseconds(std::llround(device_timeout_s * 1000));
  settings.scratch_chunk_bytes = scratch_chunk_bytes;
  settings.scratch_tags = tag_ids(scratch_tags);
  settings.place = parse_place(place).value_or(Place::kHost);
  settings.backup_dir = backup_dir;
  settings.disk_blocks_bytes = disk_blocks_bytes;
  const WithoutGil released;  // a transaction may hold the lock for a long time
  Pool::instance().configure(settings);
}

py::dict wake_pool(const std::vector<std::string>& tags, double timeout_s, bool commit) {
  Pool& pool = Pool::instance();
  const std::set<TagId> ids = tag_ids(tags);
  Report report;
  {
    const WithoutGil released;
    report = pool.wake(ids, std::chrono::duration<double>(timeout_s),
                       commit ? Until::kCommitted : Until::kPrepared);
  }
  return to_dict(report);
}

py::dict commit_pool() {
  Report report;
  {
    const WithoutGil released;
    report = Pool::instance().commit();
  }
  return to_dict(report);
}

py::list allocations() {
  std::vector<AllocationInfo> infos;
  {
    const WithoutGil released;
    infos = Pool::instance().allocations();
  }
  py::list result;
  for (const AllocationInfo& info : infos) {
    py::dict entry;
    entry["address"] = info.address;
    entry["bytes"] = info.bytes;
    entry["device"] = info.device;
    entry["tag"] = Pool::instance().tag_name(info.tag);
    entry["state"] = state_name(info.state);
    entry["device_bytes"] = info.device_bytes;
    entry["host_bytes"] = info.host_bytes;
    entry["page_locked_bytes"] = info.page_locked_bytes;
    entry["disk_bytes"] = info.disk_bytes;
    entry["asleep_in_host_bytes"] = info.asleep_in_host_bytes;
    entry["asleep_on_disk_bytes"] = info.asleep_on_disk_bytes;
    entry["checksum"] = info.backup_sum;
    result.append(entry);
  }
  return result;
}

py::dict host_memory() {
  HostInfo info{};
  {
    const WithoutGil released;
    info = Pool::instance().host_info();
  }
  py::dict result;
  result["source"] = !info.choice                              ? ""
                     : info.choice->source == HostSource::kAcl ? "acl"
                                                               : "registered";
  result["why"] = info.choice ? info.choice->why : "";
  result["locking_bytes_per_s"] = info.speeds ? info.speeds->locking : 0.0;
  result["copying_bytes_per_s"] = info.speeds ? info.speeds->copying : 0.0;
  result["prepared"] = info.prepared;
  result["staging"] = info.staging;
  result["disk_staging"] = info.disk_staging;
  result["why_not_direct"] = why_not_direct();
  result["steps"] = info.steps;
  result["failure"] = last_locking_failure();
  return result;
}

std::optional<py::bytes> read_backup(std::uintptr_t address, std::size_t bytes) {
  std::string content(bytes, '\0');
  auto* target = reinterpret_cast<std::byte*>(content.data());
  bool found = false;
  {
    const WithoutGil released;
    found = Pool::instance().read_backup(address, bytes, target);
  }
  if (!found) return std::nullopt;
  return content;
}

// Raises vllm_sleep_ascend.errors.<type> with the error's figures as attributes.
void raise_error(const char* type, const std::string& message, const py::dict& figures) {
  const py::object cls = py::module_::import("vllm_sleep_ascend.errors").attr(type);
  const py::object error = cls(message);
  for (const auto& item : figures) error.attr(py::str(item.first)) = item.second;
  PyErr_SetObject(cls.ptr(), error.ptr());
}

void translate(std::exception_ptr error, const std::string& message, const py::dict& where) {
  try {
    std::rethrow_exception(error);
  } catch (const AclError& failed) {
    where["call"] = failed.call();
    where["code"] = failed.code();
    where["needed_bytes"] = failed.bytes();
    raise_error("AclError", message, where);
  } catch (const OutOfMemory& failed) {
    where["needed_bytes"] = failed.needed();
    where["free_bytes"] = failed.free();
    const bool host = dynamic_cast<const OutOfHostMemory*>(&failed) != nullptr;
    raise_error(host ? "HostOutOfMemoryError" : "DeviceOutOfMemoryError", message, where);
  } catch (const DiskError& failed) {
    where["needed_bytes"] = failed.needed();
    where["free_bytes"] = failed.free();
    raise_error("DiskError", message, where);
  } catch (const std::exception&) {
    raise_error("SleepModeError", message, where);
  }
}

}  // namespace

PYBIND11_MODULE(_camem, module) {
  module.doc() = "The allocator of vllm_sleep_ascend; see _camem.pyi.";

  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const TransactionError& failed) {
      py::dict where;
      where["tag"] = failed.tag();
      where["device"] = failed.device();
      translate(failed.cause(), failed.what(), where);
    } catch (const AclError& failed) {
      translate(error, failed.what(), py::dict());
    } catch (const OutOfMemory& failed) {
      translate(error, failed.what(), py::dict());
    } catch (const DiskError& failed) {
      translate(error, failed.what(), py::dict());
    }
  });

  module.def("configure", &configure_pool, py::kw_only(), py::arg("chunk_bytes"),
             py::arg("keep_host_backup"), py::arg("copy_threads"), py::arg("host_threads"),
             py::arg("host_memory") = "acl", py::arg("why_host_memory") = "",
             py::arg("unprepared") = "measured",
             py::arg("device_timeout_s") =
                 std::chrono::duration<double>(Settings().device_timeout).count(),
             py::arg("scratch_chunk_bytes") = Settings().scratch_chunk_bytes,
             py::arg("scratch_tags") = std::vector<std::string>(), py::arg("place") = "host",
             py::arg("backup_dir") = "",
             py::arg("disk_blocks_bytes") = Settings().disk_blocks_bytes);
  module.def("set_current_tag", [](const std::string& name) {
    Pool& pool = Pool::instance();
    return pool.tag_name(pool.set_current_tag(pool.tag(name)));
  });
  module.def("sleep", &sleep_pool, py::arg("actions"), py::arg("otherwise") = "offload",
             py::arg("checksums") = Sums(), py::kw_only(), py::arg("place") = "",
             py::arg("commit") = true);
  module.def("wake", &wake_pool, py::arg("tags"), py::arg("timeout_s") = 0.0, py::kw_only(),
             py::arg("commit") = true);
  module.def("commit", &commit_pool);
  module.def("abort", [] { return Pool::instance().abort(); }, py::call_guard<WithoutGil>());
  module.def(
      "prepare",
      [](const std::vector<std::string>& tags, bool slowly) {
        const std::set<TagId> ids = tag_ids(tags);
        const WithoutGil released;
        Pool::instance().prepare(ids, slowly);
      },
      py::arg("tags"), py::kw_only(), py::arg("slowly") = false);
  module.def(
      "release_prepared", [] { Pool::instance().release_prepared(); },
      py::call_guard<WithoutGil>());
  module.def(
      "wait_prepared", [](double timeout_s) { return Pool::instance().wait_prepared(timeout_s); },
      py::arg("timeout_s"), py::call_guard<WithoutGil>());
  module.def("step_begins", [] { Pool::instance().step_begins(); });
  module.def("step_ends", [] { Pool::instance().step_ends(); });
  module.def("copied_bytes", [] { return Pool::instance().copied_bytes(); });
  module.def(
      "wait_for_devices", [] { Pool::instance().wait_for_devices(); },
      py::call_guard<WithoutGil>());
  module.def("trim", [](const std::set<std::uintptr_t>& addresses) {
    const WithoutGil released;
    return Pool::instance().trim(addresses);
  });
  module.def("distrust_backups", [](const std::set<std::uintptr_t>& addresses) {
    const WithoutGil released;
    Pool::instance().distrust_backups(addresses);
  });
  module.def("allocations", &allocations);
  module.def("read_backup", &read_backup, py::arg("address"), py::arg("bytes"));
  module.def("tags", [] { return Pool::instance().tag_names(); });
  module.def("available_host_bytes", &available_host_bytes);
  module.def("pinned_host_bytes", &page_locked_host_bytes);
  module.def("plain_host_bytes", &plain_host_bytes);
  module.def("host_memory", &host_memory);
  module.def("component_bytes", &component_bytes, py::arg("device"), py::call_guard<WithoutGil>());

  py::module_::import("atexit").attr("register")(
      py::cpp_function([] { Pool::instance().abandon(); }));
}

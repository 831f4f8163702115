// SPDX-License-Identifier: Apache-2.0
//
// The common contract of all owners of resources: an owner allocates and moves its resource, frees
// it once, can be retried after a failed call, and its destructor reports errors without throwing.
#include <optional>
#include <type_traits>
#include <utility>

#include "ascendcl/check.h"
#include "ascendcl/vmm.h"
#include "check.h"
#include "device.h"
#include "host/memory.h"

using device::Faults;
using device::held;
using device::kMiB;

namespace {

constexpr std::size_t kBytes = 4 * kMiB;

// Each traits class says how to create an owner, what the counters are then, and which call frees
// it.
struct ReservationTraits {
  using Owner = camem::Reservation;
  static Owner make() { return Owner(kBytes); }
  static std::uint64_t count() { return held().reservations; }
  static bool holds(const Owner& owner) { return owner.base() != nullptr; }
  static constexpr const char* kTake = "aclrtReserveMemAddress";
  static constexpr const char* kRelease = "aclrtReleaseMemAddress";
};

struct PhysicalTraits {
  using Owner = camem::PhysicalMemory;
  static Owner make() { return Owner(0, kBytes); }
  static std::uint64_t count() { return held().device_bytes / kBytes; }
  static bool holds(const Owner& owner) { return bool(owner); }
  static constexpr const char* kTake = "aclrtMallocPhysical";
  static constexpr const char* kRelease = "aclrtFreePhysical";
};

struct RegisteredTraits {
  using Owner = camem::HostMemory;
  static Owner make() { return Owner::page_locked(kBytes, camem::HostSource::kRegistered); }
  static std::uint64_t count() { return held().registered_bytes / kBytes; }
  static bool holds(const Owner& owner) { return bool(owner); }
  static constexpr const char* kTake = nullptr;  // memory that cannot be registered is allocated
  static constexpr const char* kRelease = "aclrtHostUnregister";
};

struct MallocHostTraits {
  using Owner = camem::HostMemory;
  static Owner make() { return Owner::page_locked(kBytes, camem::HostSource::kAcl); }
  static std::uint64_t count() { return held().pinned_bytes / kBytes; }
  static bool holds(const Owner& owner) { return bool(owner); }
  static constexpr const char* kTake = "aclrtMallocHost";
  static constexpr const char* kRelease = "aclrtFreeHost";
};

std::string once(const char* call) { return std::string(call) + ":1:507899"; }

template <typename Traits>
void taken_and_given_back() {
  CHECK_EQ(Traits::count(), 0u);
  {
    auto owner = Traits::make();
    CHECK(Traits::holds(owner));
    CHECK_EQ(Traits::count(), 1u);
  }
  CHECK_EQ(Traits::count(), 0u);
  auto owner = Traits::make();
  owner.release();
  CHECK(!Traits::holds(owner));
  CHECK_EQ(Traits::count(), 0u);
}

template <typename Traits>
void moves() {
  using Owner = typename Traits::Owner;
  static_assert(!std::is_copy_constructible_v<Owner> && !std::is_copy_assignable_v<Owner>);
  static_assert(std::is_nothrow_move_constructible_v<Owner>);
  static_assert(std::is_nothrow_move_assignable_v<Owner>);
  static_assert(std::is_nothrow_destructible_v<Owner>);
  auto first = Traits::make();
  Owner second = std::move(first);
  CHECK(!Traits::holds(first) && Traits::holds(second));
  CHECK_EQ(Traits::count(), 1u);
  first = Traits::make();
  CHECK_EQ(Traits::count(), 2u);
  second = std::move(first);
  first = Owner();  // frees whatever the assignment left in it
  CHECK(!Traits::holds(first) && Traits::holds(second));
  CHECK_EQ(Traits::count(), 1u);
  Owner& same = second;
  second = std::move(same);
  CHECK(Traits::holds(second));
  CHECK_EQ(Traits::count(), 1u);
}

template <typename Traits>
void a_failed_release_can_be_repeated() {
  auto owner = Traits::make();
  {
    const Faults faults(once(Traits::kRelease));
    CHECK_THROWS(camem::AclError, owner.release());
    CHECK(Traits::holds(owner));
    CHECK_EQ(Traits::count(), 1u);
    owner.release();
  }
  CHECK(!Traits::holds(owner));
  CHECK_EQ(Traits::count(), 0u);
}

template <typename Traits>
void a_failed_constructor_holds_nothing() {
  const device::Held before = held();
  const Faults faults(once(Traits::kTake));
  CHECK_THROWS(camem::AclError, Traits::make());
  CHECK_EQ(held(), before);
}

template <typename Traits>
bool add(const std::string& name) {
  check::add(name + "_is_taken_and_given_back", taken_and_given_back<Traits>);
  check::add(name + "_moves", moves<Traits>);
  check::add(name + "_release_can_be_repeated", a_failed_release_can_be_repeated<Traits>);
  if constexpr (Traits::kTake != nullptr) {
    check::add(name + "_that_fails_holds_nothing", a_failed_constructor_holds_nothing<Traits>);
  }
  return true;
}

[[maybe_unused]] const bool added =
    add<ReservationTraits>("reservation") && add<PhysicalTraits>("physical_memory") &&
    add<RegisteredTraits>("registered_memory") && add<MallocHostTraits>("malloc_host_memory");

TEST(mapped_memory_is_unmapped_before_it_is_given_back) {
  camem::Reservation range(kBytes);
  {
    camem::PhysicalMemory memory(0, kBytes);
    memory.map(range.base());
    CHECK_EQ(held().mappings, 1u);
    camem::PhysicalMemory moved = std::move(memory);
    CHECK(moved.mapped() && !memory.mapped());
    CHECK_EQ(held().mappings, 1u);
  }
  CHECK_EQ(held().mappings, 0u);
  CHECK_EQ(held().device_bytes, 0u);
}

TEST(map_and_unmap_can_be_repeated_and_keep_the_content) {
  camem::Reservation range(kBytes);
  camem::PhysicalMemory memory(0, kBytes);
  {
    const Faults faults("aclrtMapMem:1:507899,aclrtUnmapMem:1:507899");
    CHECK_THROWS(camem::AclError, memory.map(range.base()));
    CHECK(!memory.mapped());
    memory.map(range.base());
    device::write(range.base(), kBytes, 1);
    CHECK_THROWS(camem::AclError, memory.unmap());
    CHECK(memory.mapped());
    CHECK(device::holds(range.base(), kBytes, 1));
    memory.unmap();
  }
  CHECK(!memory.mapped());
  memory.map(range.base());
  CHECK(device::holds(range.base(), kBytes, 1));
}

// Frees by hand what the destructors could not free.
TEST(destructors_report_what_fails_and_do_not_throw) {
  void* base = nullptr;
  {
    const Faults faults("aclrtReleaseMemAddress:1:507899");
    camem::Reservation range(kBytes);
    base = range.base();
  }
  CHECK_EQ(held().reservations, 1u);
  std::optional<camem::PhysicalMemory> memory(std::in_place, 0, kBytes);
  memory->map(static_cast<std::byte*>(base));
  {
    const Faults faults("aclrtUnmapMem:1:507899");
    memory.reset();
  }
  CHECK_EQ(held().mappings, 1u);
  CHECK_EQ(aclrtUnmapMem(base), ACL_SUCCESS);
  CHECK_EQ(aclrtReleaseMemAddress(base), ACL_SUCCESS);

  std::optional<camem::HostMemory> host(RegisteredTraits::make());
  std::byte* data = host->data();
  {
    const Faults faults("aclrtHostUnregister:1:507899:*");
    host.reset();
  }
  CHECK_EQ(held().registered_bytes, kBytes);
  data[kBytes - 1] = std::byte{1};  // memory that is still pinned is still mapped
  CHECK_EQ(aclrtHostUnregister(data), ACL_SUCCESS);
}

TEST(host_memory_whose_release_fails_once_is_given_back) {
  for (const auto& [make, call] :
       {std::pair{&RegisteredTraits::make, RegisteredTraits::kRelease},
        std::pair{&MallocHostTraits::make, MallocHostTraits::kRelease}}) {
    const Faults faults(once(call));
    {
      const camem::HostMemory block = make();
    }
    CHECK_EQ(faults.hits(), 1u);
    CHECK_EQ(held().host_bytes(), 0u);
  }
}

TEST(out_of_memory_is_its_own_error_with_figures) {
  const std::size_t free = device::free_bytes(0);
  try {
    camem::PhysicalMemory(0, free + 2 * kMiB);
    CHECK(false);
  } catch (const camem::OutOfDeviceMemory& error) {
    CHECK_EQ(error.needed(), free + 2 * kMiB);
    CHECK_EQ(error.free(), free);
  }
  const Faults faults("aclrtMallocHost:1:207001");
  try {
    MallocHostTraits::make();
    CHECK(false);
  } catch (const camem::OutOfHostMemory& error) {
    CHECK_EQ(error.needed(), kBytes);
    CHECK(error.free() > 0);
  }
}

}  // namespace

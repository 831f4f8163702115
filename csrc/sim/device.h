// SPDX-License-Identifier: Apache-2.0
//
// The device below the simulated AscendCL: basic memory, copy and stream operations.
//
// The AscendCL layer above has validated everything: sizes are positive multiples of the page size,
// addresses are in reservations, handles are alive. A backend checks and counts nothing. Functions
// that return bool or a pointer return false or nullptr if the operating system or the driver
// refuses. Nothing throws.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace sim::device {

enum class Direction { kHostToDevice, kDeviceToHost, kDeviceToDevice };

// Address space. A reservation is inaccessible until something is mapped into it.
void* reserve(size_t bytes, size_t alignment);
void release(void* address, size_t bytes);

// Physical memory, filled with kPoison. Its content survives unmapping, not destruction.
struct Physical;
constexpr uint16_t kPoison = 0x7fff;  // a NaN as fp16, bf16, fp32 (twice) and fp64 (four times)
Physical* create_physical(int device, size_t bytes);
void destroy_physical(Physical* memory);  // not mapped
bool map(void* address, Physical* memory);
void unmap(void* address, Physical* memory);

// Makes the memory accessible from other processes of this machine, which find it by the key.
bool share(Physical* memory, uint64_t* key);
Physical* open_shared(int device, uint64_t key, size_t* bytes);

// Host memory that the device can access directly.
extern const bool kRegisteringPins;  // otherwise registered memory is safe only if it is locked
void* allocate_host(size_t bytes);
void free_host(void* address, size_t bytes);
bool register_host(void* address, size_t bytes);
void unregister_host(void* address);

bool copy(int device, void* to, const void* from, size_t bytes, Direction direction);
bool fill(int device, void* address, int value, size_t bytes);

// The work of a stream runs in order, asynchronously to the caller. Tickets number it from 1; work
// is complete when completed() has reached its ticket.
struct Stream;
Stream* create_stream(int device);
void destroy_stream(Stream* stream);  // finishes the work first, without blocking the caller
uint64_t submit_copy(Stream* stream, void* to, const void* from, size_t bytes, Direction direction);
uint64_t submit_fill(Stream* stream, void* address, int value, size_t bytes);
uint64_t submit_call(Stream* stream, void (*function)(void*), void* argument);
uint64_t submitted(const Stream* stream);
uint64_t completed(const Stream* stream);
// Waits until the stream is idle; a negative timeout waits for ever. Returns false on a timeout.
bool synchronize(Stream* stream, int64_t timeout_ms);

// A point in the work of a stream.
struct Marker;
std::shared_ptr<Marker> record(Stream* stream);
void wait(Stream* stream, std::shared_ptr<Marker> marker);  // the stream waits, not the caller
bool reached(const Marker& marker);
bool synchronize(const Marker& marker, int64_t timeout_ms);
uint64_t nanoseconds(const Marker& marker);  // when it was reached, on a machine-wide clock

}  // namespace sim::device

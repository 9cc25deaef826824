// mbarriers, bulk copies, TMA and wgmma in the CPU emulation; see csrc/sm90.h.
//
// shim.h decides when an operation completes (enqueue(), immediate()). An operation reads its sources when it
// completes, not when it is issued, and accumulators in flight read as NaN. It sees ordinary stores to shared memory
// only after a proxy fence.
#include "sm90.h"

#include <algorithm>
#include <deque>
#include <limits>
#include <map>
#include <vector>

#include "../sm90.h"

namespace dfkd::host {

namespace {

constexpr int kGroup = 128;

// ---- mbarriers ------------------------------------------------------------------------------------------------------

struct BarrierState {
  uint16_t expected, pending;
  int32_t bytes_and_phase;  // 2 * pending bytes + phase
};
static_assert(sizeof(BarrierState) == sizeof(uint64_t));

BarrierState read(const uint64_t* barrier) {
  BarrierState state;
  std::memcpy(&state, barrier, sizeof(state));
  if (state.expected == 0xffff) fail("an mbarrier that is not initialized");
  return state;
}

void update(uint64_t* barrier, int arrivals, int bytes) {
  BarrierState state = read(barrier);
  if (arrivals > state.pending) fail("more than %d arrivals at an mbarrier", state.expected);
  state.pending = static_cast<uint16_t>(state.pending - arrivals);
  state.bytes_and_phase += 2 * bytes;
  if (state.pending == 0 && state.bytes_and_phase / 2 == 0 && state.bytes_and_phase >= 0) {
    state.pending = state.expected;
    state.bytes_and_phase ^= 1;
  }
  std::memcpy(barrier, &state, sizeof(state));
}

// ---- operations in flight, per block --------------------------------------------------------------------------------

struct Operation {
  Wgmma threads[kGroup];
  // The values of all threads' accumulators at issue. Until completion, the accumulators themselves hold NaN. Empty if an earlier operation
  // in flight has the same accumulators.
  std::vector<float> saved;
};

struct Warpgroup {
  ThreadBarrier barrier;
  Wgmma threads[kGroup];
  std::vector<Operation> uncommitted;
  std::deque<std::vector<Operation>> groups;

  bool in_flight(const float* d) const {
    const auto any = [d](const std::vector<Operation>& operations) {
      return std::any_of(operations.begin(), operations.end(),
                         [d](const auto& each) { return each.threads[0].d == d; });
    };
    return any(uncommitted) || std::any_of(groups.begin(), groups.end(), any);
  }
};

struct Stores {
  std::vector<std::function<void()>> uncommitted;
  std::deque<std::vector<std::function<void()>>> groups;
};

struct InFlight final : BlockState {
  std::map<int, Warpgroup> warpgroups;
  std::map<int, Stores> stores;
  std::map<int, ThreadBarrier> named_barriers;

  const char* pending() const override {
    for (const auto& [index, group] : warpgroups) {
      if (!group.uncommitted.empty() || !group.groups.empty()) return "wgmma without warpgroup_wait";
    }
    for (const auto& [index, store] : stores) {
      if (!store.uncommitted.empty() || !store.groups.empty()) return "TMA stores without tma_store_wait";
    }
    return nullptr;
  }
};

InFlight& in_flight() {
  return *static_cast<InFlight*>(block_state([]() -> BlockState* { return new InFlight; }));
}

void perform_all(std::vector<std::function<void()>>& operations) {
  for (const auto& operation : operations) operation();
  operations.clear();
}

// ---- TMA ------------------------------------------------------------------------------------------------------------

size_t swizzle(size_t offset, int width) {
  return width == 0 ? offset : offset ^ ((offset >> 7 & static_cast<size_t>(width / 8 - 1)) << 4);
}

// Calls f for each element of the tile at x, y, z with its byte offset in the tile, its index in the tensor, and
// whether it is inside the tensor.
template <typename F>
void for_elements(const TensorMap& map, int64_t x, int64_t y, int64_t z, F f) {
  size_t offset = 0;
  for (int64_t k = 0; k < map.tile[2]; ++k) {
    for (int64_t j = 0; j < map.tile[1]; ++j) {
      for (int64_t i = 0; i < map.tile[0]; ++i, offset += 2) {
        const bool inside = x + i >= 0 && x + i < map.sizes[0] && y + j >= 0 && y + j < map.sizes[1] && z + k >= 0 &&
                            z + k < map.sizes[2];
        f(offset, x + i + (y + j) * map.strides[1] + (z + k) * map.strides[2], inside);
      }
    }
  }
}

// ---- wgmma ----------------------------------------------------------------------------------------------------------

float value_of(uint16_t bits, bool bfloat) { return bfloat ? to_float(bfloat16{bits}) : to_float(float16{bits}); }

// Element (outer, k) of an operand in shared memory; outer is the row of A or the column of B.
float operand_element(const unsigned char* memory, uint64_t desc, bool transpose, int outer, int k, bool bfloat) {
  const uint64_t mode = desc >> 62;
  const size_t width = mode == 1 ? 64 : mode == 2 ? 32 : 16;
  const size_t start = (desc & 0x3fff) * 16, leading = (desc >> 16 & 0x3fff) * 16;
  const size_t stride = (desc >> 32 & 0x3fff) * 16;
  const auto o = static_cast<size_t>(outer), i = static_cast<size_t>(k);
  const size_t offset = transpose ? start + o / width * leading + o % width * 2 + i / 8 * stride + i % 8 * width * 2
                                  : start + o / 8 * stride + o % 8 * width * 2 + i * 2;
  uint16_t bits;
  std::memcpy(&bits, memory + swizzle(offset, static_cast<int>(width)), 2);
  return value_of(bits, bfloat);
}

void check(uint64_t desc, bool transpose, int outer) {
  const uint64_t mode = desc >> 62;
  if (mode == 0) fail("an operand without swizzle");
  const int width = mode == 1 ? 64 : mode == 2 ? 32 : 16;
  const auto start = static_cast<int>((desc & 0x3fff) * 16);
  if (start % (16 * width) >= 2 * width) fail("an operand that begins at byte %d, within a group of eight rows", start);
  if (transpose && outer > width && outer % width != 0) {
    fail("an MN-major operand of %d elements, not a multiple of its boxes' %d", outer, width);
  }
}

// Without sanitizers: this loop takes most of the time and accesses only plain arrays.
__attribute__((no_sanitize("address", "undefined"), optimize("O3"))) void multiply(const float* a, const float* b,
                                                                                  double* d, int n) {
  for (int m = 0; m < 64; ++m) {
    for (int k = 0; k < 16; ++k) {
      const double left = a[m * 16 + k];
      for (int j = 0; j < n; ++j) d[m * n + j] += left * static_cast<double>(b[k * n + j]);
    }
  }
}

void perform(const Operation& operation, const unsigned char* shared) {
  const unsigned char* memory = async_proxy_view(shared);
  const Wgmma& first = operation.threads[0];
  const int n = first.n;
  const auto columns = static_cast<size_t>(n);
  std::vector<float> a(64 * 16), b(16 * columns);
  std::vector<double> d(64 * columns);
  for (int thread = 0; thread < kGroup; ++thread) {
    const Wgmma& fragment = operation.threads[thread];
    const int row = thread / 32 * 16 + thread % 32 / 4, column = 2 * (thread % 4);
    if (!operation.saved.empty()) {
      std::memcpy(fragment.d, operation.saved.data() + static_cast<size_t>(thread) * columns / 2, columns * 2);
    }
    if (fragment.a != nullptr) {
      for (int i = 0; i < 8; ++i) {
        const auto bits = static_cast<uint16_t>(fragment.a[i / 2] >> (16 * (i % 2)));
        const int at = (row + i / 2 % 2 * 8) * 16 + column + i / 4 * 8 + i % 2;
        a[static_cast<size_t>(at)] = value_of(bits, fragment.bfloat);
      }
    }
  }
  for (int k = 0; k < 16; ++k) {
    for (int m = 0; first.a == nullptr && m < 64; ++m) {
      a[static_cast<size_t>(m * 16 + k)] =
          operand_element(memory, first.a_desc, first.transpose_a, m, k, first.bfloat);
    }
    for (int j = 0; j < n; ++j) {
      b[static_cast<size_t>(k * n + j)] =
          operand_element(memory, first.b_desc, first.transpose_b, j, k, first.bfloat);
    }
  }
  multiply(a.data(), b.data(), d.data(), n);
  for (int thread = 0; thread < kGroup; ++thread) {
    const Wgmma& fragment = operation.threads[thread];
    const int row = thread / 32 * 16 + thread % 32 / 4, column = 2 * (thread % 4);
    for (int i = 0; i < n / 2; ++i) {
      const int at = (row + i % 4 / 2 * 8) * n + i / 4 * 8 + column + i % 2;
      fragment.d[i] = (fragment.accumulate ? fragment.d[i] : 0.0f) + static_cast<float>(d[static_cast<size_t>(at)]);
    }
  }
}

Warpgroup& warpgroup() { return in_flight().warpgroups[thread_index() / kGroup]; }

}  // namespace

void mbarrier_init(uint64_t* barrier, int arrivals) {
  if (arrivals < 1 || arrivals > 0xfffe) fail("an mbarrier of %d arrivals", arrivals);
  const BarrierState state{static_cast<uint16_t>(arrivals), static_cast<uint16_t>(arrivals), 0};
  std::memcpy(barrier, &state, sizeof(state));
}

void mbarrier_arrive(uint64_t* barrier, int bytes) { update(barrier, 1, bytes); }

void mbarrier_wait(uint64_t* barrier, int parity) {
  wait_until("the phase of an mbarrier",
             [barrier, parity] { return (read(barrier).bytes_and_phase & 1) != (parity & 1); });
}

void cp_async_bulk(void* to, const void* from, int bytes, uint64_t* full) {
  if (bytes <= 0 || bytes % 16 != 0) fail("a bulk copy of %d bytes", bytes);
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) {
    fail("a bulk copy that is not aligned to 16 bytes");
  }
  enqueue([=] {
    const unsigned char* read = async_proxy_view(from);
    std::memcpy(async_proxy_view(to), read, static_cast<size_t>(bytes));
    std::memcpy(to, read, static_cast<size_t>(bytes));
    update(full, 0, -bytes);
  });
}

void st_async(void* to, const uint32_t (&values)[4], uint64_t* full) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) fail("a store of 16 bytes that is not aligned to 16 bytes");
  enqueue([=, first = values[0], second = values[1], third = values[2], fourth = values[3]] {
    const uint32_t all[4] = {first, second, third, fourth};
    std::memcpy(to, all, sizeof(all));  // an ordinary store: wgmma sees it after a fence
    update(full, 0, -static_cast<int>(sizeof(all)));
  });
}

bool make_tensor_map(TensorMap* to, const void* base, const int64_t (&sizes)[3], int64_t stride_y, int64_t stride_z,
                     const int64_t (&tile)[3], int width) {
  *to = {static_cast<unsigned char*>(const_cast<void*>(base)),
         {sizes[0], sizes[1], sizes[2]},
         {1, stride_y, stride_z},
         {tile[0], tile[1], tile[2]},
         width};
  bool valid = reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride_y % 8 == 0 && stride_z % 8 == 0 && stride_y > 0 &&
              stride_z > 0 && tile[0] % 8 == 0 && (width == 0 || tile[0] == width);
  for (int i = 0; i < 3; ++i) {
    valid = valid && sizes[i] > 0 && sizes[i] <= int64_t{1} << 32 && tile[i] > 0 && tile[i] <= 256;
  }
  return valid;
}

void tma_load(void* shared, const TensorMap& map, int x, int y, int z, uint64_t* full) {
  if (reinterpret_cast<uintptr_t>(shared) % 128 != 0) fail("a tile that is not aligned to 128 bytes");
  enqueue([=] {
    unsigned char* to = static_cast<unsigned char*>(shared);
    unsigned char* view = async_proxy_view(shared);
    const uintptr_t base = reinterpret_cast<uintptr_t>(to) % 1024;  // the swizzle depends on the address
    for_elements(map, x, y, z, [&](size_t linear, int64_t element, bool inside) {
      uint16_t bits = 0;
      if (inside) std::memcpy(&bits, map.base + 2 * element, 2);
      const size_t offset = swizzle(linear + base, map.width) - base;
      std::memcpy(to + offset, &bits, 2);
      std::memcpy(view + offset, &bits, 2);
    });
    update(full, 0, -static_cast<int>(2 * map.tile[0] * map.tile[1] * map.tile[2]));
  });
}

void tma_store(const TensorMap& map, const void* shared, int x, int y, int z) {
  if (reinterpret_cast<uintptr_t>(shared) % 128 != 0) fail("a tile that is not aligned to 128 bytes");
  auto& uncommitted = in_flight().stores[thread_index()].uncommitted;
  uncommitted.push_back([=] {
    const unsigned char* from = async_proxy_view(shared);
    const uintptr_t base = reinterpret_cast<uintptr_t>(shared) % 1024;
    for_elements(map, x, y, z, [&](size_t linear, int64_t element, bool inside) {
      if (inside) std::memcpy(map.base + 2 * element, from + swizzle(linear + base, map.width) - base, 2);
    });
  });
  if (immediate()) perform_all(uncommitted);
}

void tma_store_commit() {
  Stores& stores = in_flight().stores[thread_index()];
  stores.groups.push_back(std::move(stores.uncommitted));
  stores.uncommitted.clear();
}

void tma_store_wait(int pending) {
  Stores& stores = in_flight().stores[thread_index()];
  while (static_cast<int>(stores.groups.size()) > pending) {
    perform_all(stores.groups.front());
    stores.groups.pop_front();
  }
}

void named_barrier(int barrier, int threads, bool wait) {
  if (barrier < 1 || barrier > 15 || threads % kWarp != 0) fail("named barrier %d of %d threads", barrier, threads);
  arrive(in_flight().named_barriers[barrier], threads, wait, "a named barrier");
}

void global_barrier_arrive(unsigned* counter) { ++*counter; }
void global_barrier_wait(const unsigned* counter, unsigned arrivals) {
  wait_until("a global barrier", [counter, arrivals] { return *counter >= arrivals; });
}

void wgmma(const Wgmma& arguments) {
  Warpgroup& group = warpgroup();
  group.threads[thread_index() % kGroup] = arguments;
  const unsigned char* memory = shared_memory();
  arrive(group.barrier, kGroup, true, "its warpgroup", [&group, memory] {
    Operation operation;
    const Wgmma& first = group.threads[0];
    for (int thread = 0; thread < kGroup; ++thread) {
      const Wgmma& fragment = operation.threads[thread] = group.threads[thread];
      if (fragment.a_desc != first.a_desc || fragment.b_desc != first.b_desc || fragment.n != first.n ||
          fragment.accumulate != first.accumulate || (fragment.a == nullptr) != (first.a == nullptr)) {
        fail("the threads of a warpgroup issue different wgmma");
      }
    }
    check(first.b_desc, first.transpose_b, first.n);
    if (first.a == nullptr) check(first.a_desc, first.transpose_a, 64);
    if (!group.in_flight(first.d)) {
      if (immediate()) return perform(operation, memory);
      const auto each = static_cast<size_t>(first.n / 2);
      for (const Wgmma& fragment : operation.threads) {
        operation.saved.insert(operation.saved.end(), fragment.d, fragment.d + each);
        std::fill(fragment.d, fragment.d + each, std::numeric_limits<float>::quiet_NaN());
      }
    }
    group.uncommitted.push_back(std::move(operation));
  });
}

void warpgroup_commit_batch() {
  Warpgroup& group = warpgroup();
  arrive(group.barrier, kGroup, true, "its warpgroup", [&group] {
    group.groups.push_back(std::move(group.uncommitted));
    group.uncommitted.clear();
  });
}

void warpgroup_wait(int pending) {
  Warpgroup& group = warpgroup();
  const unsigned char* memory = shared_memory();
  arrive(group.barrier, kGroup, true, "its warpgroup", [&group, memory, pending] {
    while (static_cast<int>(group.groups.size()) > pending) {
      for (const Operation& operation : group.groups.front()) perform(operation, memory);
      group.groups.pop_front();
    }
  });
}

}  // namespace dfkd::host

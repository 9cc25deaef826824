// Barriers that count bytes, bulk copies and products of warpgroups in the execution shim; see csrc/sm90.h.
//
// Each is done when the shim lets it happen (later(), at_once()): what is under way reads its sources at that time, not
// when it was asked for, and accumulators of products under way read as NaN. What ordinary stores left in shared memory
// it sees after a fence alone.
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

// ---- barriers -------------------------------------------------------------------------------------------------------

struct BarrierState {
  uint16_t expected, pending;
  int32_t bytes_and_phase;  // 2 bytes + phase
};
static_assert(sizeof(BarrierState) == sizeof(uint64_t));

BarrierState read(const uint64_t* barrier) {
  BarrierState state;
  std::memcpy(&state, barrier, sizeof(state));
  if (state.expected == 0xffff) fail("a barrier that nobody has initialised");
  return state;
}

void update(uint64_t* barrier, int arrivals, int bytes) {
  BarrierState state = read(barrier);
  if (arrivals > state.pending) fail("more arrivals at a barrier than the %d it was made for", state.expected);
  state.pending = static_cast<uint16_t>(state.pending - arrivals);
  state.bytes_and_phase += 2 * bytes;
  if (state.pending == 0 && state.bytes_and_phase / 2 == 0 && state.bytes_and_phase >= 0) {
    state.pending = state.expected;
    state.bytes_and_phase ^= 1;
  }
  std::memcpy(barrier, &state, sizeof(state));
}

// ---- what a block has under way -------------------------------------------------------------------------------------

struct Operation {
  Product parts[kGroup];
  std::vector<float> before;  // of each thread, where d holds NaN meanwhile
};

struct Warpgroup {
  Meeting meeting;
  Product parts[kGroup];
  std::vector<Operation> open;
  std::deque<std::vector<Operation>> groups;

  bool has(const float* d) const {
    const auto writes = [d](const Operation& operation) { return operation.parts[0].d == d; };
    for (const auto& group : groups) {
      for (const auto& operation : group) {
        if (writes(operation)) return true;
      }
    }
    for (const auto& operation : open) {
      if (writes(operation)) return true;
    }
    return false;
  }
};

struct Stores {
  std::vector<std::function<void()>> open;
  std::deque<std::vector<std::function<void()>>> groups;
};

struct Asynchronous final : Extension {
  std::map<int, Warpgroup> warpgroups;
  std::map<int, Stores> stores;
  std::map<int, Meeting> some;

  const char* left_over() const override {
    for (const auto& [number, group] : warpgroups) {
      if (!group.open.empty() || !group.groups.empty()) return "products that nobody waited for";
    }
    for (const auto& [number, store] : stores) {
      if (!store.open.empty() || !store.groups.empty()) return "stores that nobody waited for";
    }
    return nullptr;
  }
};

Asynchronous& asynchronous() {
  return *static_cast<Asynchronous*>(extension([]() -> Extension* { return new Asynchronous; }));
}

void perform_all(std::vector<std::function<void()>>& works) {
  for (const auto& work : works) work();
  works.clear();
}

// ---- tiles ----------------------------------------------------------------------------------------------------------

size_t swizzle(size_t place, int width) {
  return width == 0 ? place : place ^ ((place >> 7 & static_cast<size_t>(width / 8 - 1)) << 4);
}

// Each chunk of 8 elements of a tile that begins at x, y, z: its place in the tile, the element of the tensor that it
// begins with, and how many of its elements the tensor has.
template <typename F>
void for_chunks(const TensorMap& map, int64_t x, int64_t y, int64_t z, F act) {
  size_t place = 0;
  for (int64_t k = 0; k < map.tile[2]; ++k) {
    for (int64_t j = 0; j < map.tile[1]; ++j) {
      for (int64_t i = 0; i < map.tile[0]; i += 8, place += 16) {
        const bool inside = y + j >= 0 && y + j < map.sizes[1] && z + k >= 0 && z + k < map.sizes[2];
        const int64_t element = x + i + (y + j) * map.strides[1] + (z + k) * map.strides[2];
        for (int64_t e = 0; e < 8; ++e) {
          act(place + 2 * static_cast<size_t>(e), element + e, inside && x + i + e >= 0 && x + i + e < map.sizes[0]);
        }
      }
    }
  }
}

// ---- products -------------------------------------------------------------------------------------------------------

float value_of(uint16_t bits, bool bfloat) { return bfloat ? to_float(bfloat16{bits}) : to_float(float16{bits}); }

// Element (outer, k) of an operand in shared memory, outer being the row of a or the column of b.
float element_of(const unsigned char* memory, uint64_t operand, bool columns, int outer, int k, bool bfloat) {
  const uint64_t mode = operand >> 62;
  const size_t width = mode == 1 ? 64 : mode == 2 ? 32 : 16;
  const size_t start = (operand & 0x3fff) * 16, leading = (operand >> 16 & 0x3fff) * 16;
  const size_t stride = (operand >> 32 & 0x3fff) * 16;
  const auto o = static_cast<size_t>(outer), i = static_cast<size_t>(k);
  const size_t place = columns ? start + o / width * leading + o % width * 2 + i / 8 * stride + i % 8 * width * 2
                               : start + o / 8 * stride + o % 8 * width * 2 + i * 2;
  uint16_t bits;
  std::memcpy(&bits, memory + swizzle(place, static_cast<int>(width)), 2);
  return value_of(bits, bfloat);
}

void check(uint64_t operand, bool columns, int outer) {
  const uint64_t mode = operand >> 62;
  if (mode == 0) fail("an operand without exchanged chunks");
  const int width = mode == 1 ? 64 : mode == 2 ? 32 : 16;
  const auto start = static_cast<int>((operand & 0x3fff) * 16);
  if (start % (16 * width) >= 2 * width) fail("an operand that begins at byte %d, in the midst of eight rows", start);
  if (columns && outer > width && outer % width != 0) fail("%d columns in panels of %d", outer, width);
}

// Not under the sanitizers: plain arrays, and where the time goes.
__attribute__((no_sanitize("address", "undefined"), optimize("O3"))) void multiply_arrays(const float* a,
                                                                                         const float* b, double* d,
                                                                                         int n) {
  for (int m = 0; m < 64; ++m) {
    for (int k = 0; k < 16; ++k) {
      const double left = a[m * 16 + k];
      for (int j = 0; j < n; ++j) d[m * n + j] += left * static_cast<double>(b[k * n + j]);
    }
  }
}

void perform(const Operation& operation, const unsigned char* shared) {
  const unsigned char* memory = asynchronous_view(shared);
  const Product& first = operation.parts[0];
  const int n = first.n;
  const auto columns = static_cast<size_t>(n);
  std::vector<float> a(64 * 16), b(16 * columns);
  std::vector<double> d(64 * columns);
  for (int thread = 0; thread < kGroup; ++thread) {
    const Product& part = operation.parts[thread];
    const int row = thread / 32 * 16 + thread % 32 / 4, column = 2 * (thread % 4);
    if (!operation.before.empty()) {
      std::memcpy(part.d, operation.before.data() + static_cast<size_t>(thread) * columns / 2, columns * 2);
    }
    if (part.a != nullptr) {
      for (int i = 0; i < 8; ++i) {
        const auto bits = static_cast<uint16_t>(part.a[i / 2] >> (16 * (i % 2)));
        a[static_cast<size_t>((row + i / 2 % 2 * 8) * 16 + column + i / 4 * 8 + i % 2)] = value_of(bits, part.bfloat);
      }
    }
  }
  for (int k = 0; k < 16; ++k) {
    for (int m = 0; first.a == nullptr && m < 64; ++m) {
      a[static_cast<size_t>(m * 16 + k)] = element_of(memory, first.a_operand, first.transpose_a, m, k, first.bfloat);
    }
    for (int j = 0; j < n; ++j) {
      b[static_cast<size_t>(k * n + j)] = element_of(memory, first.b_operand, first.transpose_b, j, k, first.bfloat);
    }
  }
  multiply_arrays(a.data(), b.data(), d.data(), n);
  for (int thread = 0; thread < kGroup; ++thread) {
    const Product& part = operation.parts[thread];
    const int row = thread / 32 * 16 + thread % 32 / 4, column = 2 * (thread % 4);
    for (int i = 0; i < n / 2; ++i) {
      const int at = (row + i % 4 / 2 * 8) * n + i / 4 * 8 + column + i % 2;
      part.d[i] = (part.add ? part.d[i] : 0.0f) + static_cast<float>(d[static_cast<size_t>(at)]);
    }
  }
}

Warpgroup& warpgroup() { return asynchronous().warpgroups[thread_index() / kGroup]; }

}  // namespace

void barrier_init(uint64_t* barrier, int arrivals) {
  if (arrivals < 1 || arrivals > 0xfffe) fail("a barrier of %d arrivals", arrivals);
  const BarrierState state{static_cast<uint16_t>(arrivals), static_cast<uint16_t>(arrivals), 0};
  std::memcpy(barrier, &state, sizeof(state));
}

void barrier_arrive(uint64_t* barrier, int bytes) { update(barrier, 1, bytes); }

void barrier_wait(uint64_t* barrier, int parity) {
  wait_until("a barrier's phase", [barrier, parity] { return (read(barrier).bytes_and_phase & 1) != (parity & 1); });
}

void copy_bulk(void* to, const void* from, int bytes, uint64_t* full) {
  if (bytes <= 0 || bytes % 16 != 0) fail("a bulk copy of %d bytes", bytes);
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) {
    fail("a bulk copy that is not aligned to 16 bytes");
  }
  later([=] {
    const unsigned char* read = asynchronous_view(from);
    std::memcpy(asynchronous_view(to), read, static_cast<size_t>(bytes));
    std::memcpy(to, read, static_cast<size_t>(bytes));
    update(full, 0, -bytes);
  });
}

void store_later(void* to, const uint32_t (&values)[4], uint64_t* full) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) fail("a store of 16 bytes that is not aligned to them");
  later([=, first = values[0], second = values[1], third = values[2], fourth = values[3]] {
    const uint32_t all[4] = {first, second, third, fourth};
    std::memcpy(to, all, sizeof(all));  // ordinary, if late: products see it after a fence
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
  bool good = reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride_y % 8 == 0 && stride_z % 8 == 0 && stride_y > 0 &&
              stride_z > 0 && tile[0] % 8 == 0 && (width == 0 || tile[0] == width);
  for (int i = 0; i < 3; ++i) {
    good = good && sizes[i] > 0 && sizes[i] <= int64_t{1} << 32 && tile[i] > 0 && tile[i] <= 256;
  }
  return good;
}

void load_tile(void* shared, const TensorMap& map, int x, int y, int z, uint64_t* full) {
  if (reinterpret_cast<uintptr_t>(shared) % 128 != 0) fail("a tile that is not aligned to 128 bytes");
  later([=] {
    unsigned char* to = static_cast<unsigned char*>(shared);
    unsigned char* view = asynchronous_view(shared);
    const uintptr_t phase = reinterpret_cast<uintptr_t>(to) % 1024;  // chunks are exchanged by their address
    for_chunks(map, x, y, z, [&](size_t place, int64_t element, bool inside) {
      uint16_t bits = 0;
      if (inside) std::memcpy(&bits, map.base + 2 * element, 2);
      const size_t offset = swizzle(place + phase, map.width) - phase;
      std::memcpy(to + offset, &bits, 2);
      std::memcpy(view + offset, &bits, 2);
    });
    update(full, 0, -static_cast<int>(2 * map.tile[0] * map.tile[1] * map.tile[2]));
  });
}

void store_tile(const TensorMap& map, const void* shared, int x, int y, int z) {
  if (reinterpret_cast<uintptr_t>(shared) % 128 != 0) fail("a tile that is not aligned to 128 bytes");
  auto& open = asynchronous().stores[thread_index()].open;
  open.push_back([=] {
    const unsigned char* from = asynchronous_view(shared);
    const uintptr_t phase = reinterpret_cast<uintptr_t>(shared) % 1024;
    for_chunks(map, x, y, z, [&](size_t place, int64_t element, bool inside) {
      if (inside) std::memcpy(map.base + 2 * element, from + swizzle(place + phase, map.width) - phase, 2);
    });
  });
  if (at_once()) perform_all(open);
}

void commit_stores() {
  Stores& stores = asynchronous().stores[thread_index()];
  stores.groups.push_back(std::move(stores.open));
  stores.open.clear();
}

void wait_stores(int newest_left) {
  Stores& stores = asynchronous().stores[thread_index()];
  while (static_cast<int>(stores.groups.size()) > newest_left) {
    perform_all(stores.groups.front());
    stores.groups.pop_front();
  }
}

void sync_some(int barrier, int threads, bool wait) {
  if (barrier < 1 || barrier > 15 || threads % kWarp != 0) fail("barrier %d of %d threads", barrier, threads);
  meet(asynchronous().some[barrier], threads, wait, "some of its block");
}

void global_barrier_arrive(unsigned* counter) { ++*counter; }
void global_barrier_wait(const unsigned* counter, unsigned arrivals) {
  wait_until("other blocks", [counter, arrivals] { return *counter >= arrivals; });
}

void multiply(const Product& product) {
  Warpgroup& group = warpgroup();
  group.parts[thread_index() % kGroup] = product;
  const unsigned char* memory = shared_memory();
  meet(group.meeting, kGroup, true, "its warpgroup", [&group, memory] {
    Operation operation;
    const Product& first = group.parts[0];
    for (int thread = 0; thread < kGroup; ++thread) {
      const Product& part = operation.parts[thread] = group.parts[thread];
      if (part.a_operand != first.a_operand || part.b_operand != first.b_operand || part.n != first.n ||
          part.add != first.add || (part.a == nullptr) != (first.a == nullptr)) {
        fail("threads of a warpgroup ask for different products");
      }
    }
    check(first.b_operand, first.transpose_b, first.n);
    if (first.a == nullptr) check(first.a_operand, first.transpose_a, 64);
    const bool behind_others = group.has(first.d);
    if (!behind_others && at_once()) {
      perform(operation, memory);
      return;
    }
    if (!behind_others) {
      const auto each = static_cast<size_t>(first.n / 2);
      for (const Product& part : operation.parts) {
        operation.before.insert(operation.before.end(), part.d, part.d + each);
        std::fill(part.d, part.d + each, std::numeric_limits<float>::quiet_NaN());
      }
    }
    group.open.push_back(std::move(operation));
  });
}

void commit_products() {
  Warpgroup& group = warpgroup();
  meet(group.meeting, kGroup, true, "its warpgroup", [&group] {
    group.groups.push_back(std::move(group.open));
    group.open.clear();
  });
}

void wait_products(int newest_left) {
  Warpgroup& group = warpgroup();
  const unsigned char* memory = shared_memory();
  meet(group.meeting, kGroup, true, "its warpgroup", [&group, memory, newest_left] {
    while (static_cast<int>(group.groups.size()) > newest_left) {
      for (const Operation& operation : group.groups.front()) perform(operation, memory);
      group.groups.pop_front();
    }
  });
}

}  // namespace dfkd::host

// Fibers and barriers of the CPU emulation; see shim.h.
#include "shim.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <new>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define DFKD_ASAN 1
#else
#define DFKD_ASAN 0
#endif

namespace dfkd::host {

unsigned order = 0;

void fail(const char* format, ...) {
  std::va_list arguments;
  va_start(arguments, format);
  std::fprintf(stderr, "shim: ");
  std::vfprintf(stderr, format, arguments);
  std::fprintf(stderr, "\n");
  va_end(arguments);
  std::abort();
}

namespace {

constexpr size_t kStack = 256 * 1024;  // sanitizers make frames large
constexpr std::align_val_t kSharedAlignment{1024};

enum class State { ready, at_block, at_warp, until, finished };

// Reused by later blocks, because allocation is slow.
std::vector<std::unique_ptr<unsigned char[]>> stacks;

std::unique_ptr<unsigned char[]> new_stack() {
  if (stacks.empty()) return std::unique_ptr<unsigned char[]>(new unsigned char[kStack]);
  auto stack = std::move(stacks.back());
  stacks.pop_back();
#if DFKD_ASAN
  __asan_unpoison_memory_region(stack.get(), kStack);  // frames that the last fiber never left
#endif
  return stack;
}

struct Block;

struct Fiber {
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber() { stacks.push_back(std::move(stack)); }

  ucontext_t context{};
  std::unique_ptr<unsigned char[]> stack = new_stack();
  State state = State::ready;
  Block* block = nullptr;
  ThreadIndices indices{};
  int index = 0;
  unsigned cluster_generation = 0;
  void* fake_stack = nullptr;
  const char* what = nullptr;
  std::function<bool()> until;
};

struct AlignedDelete {
  void operator()(unsigned char* memory) const { ::operator delete[](memory, kSharedAlignment); }
};

struct Cluster {
  std::vector<Block*> blocks;
  ThreadBarrier barrier;
};

struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<unsigned char> slots;
  std::unique_ptr<unsigned char[], AlignedDelete> shared;
  std::unique_ptr<unsigned char[], AlignedDelete> view;  // of the async proxy, created on first use
  bool fenced = false;                                   // whether a fence followed the view's last update
  size_t shared_bytes = 0;
  Cluster* cluster = nullptr;
  int rank = 0;
  std::unique_ptr<BlockState> state;

  bool finished() const {
    return std::all_of(fibers.begin(), fibers.end(), [](const auto& fiber) { return fiber->state == State::finished; });
  }
};

// The running kernel and fiber, and the context to switch to when the fiber waits.
const std::function<void()>* program = nullptr;
Fiber* running = nullptr;
ucontext_t scheduler{};
void* scheduler_fake_stack = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_size = 0;
std::mt19937 random_source;
std::deque<std::function<void()>> in_flight;
std::vector<std::unique_ptr<Block>> resident;  // the blocks that run concurrently

void to_scheduler(bool finished) {
  Fiber* self = running;
#if DFKD_ASAN
  __sanitizer_start_switch_fiber(finished ? nullptr : &self->fake_stack, scheduler_stack, scheduler_size);
#endif
  swapcontext(&self->context, &scheduler);
#if DFKD_ASAN
  __sanitizer_finish_switch_fiber(self->fake_stack, &scheduler_stack, &scheduler_size);
#endif
}

void begin() {
#if DFKD_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
#endif
  (*program)();
  running->state = State::finished;
  if (running->block->state && running->block->finished()) {
    if (const char* what = running->block->state->pending()) fail("a block finished with %s", what);
  }
  to_scheduler(true);
}

void make_context(Fiber& fiber) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, begin, 0);
}

void run_fiber(Fiber& fiber) {
  running = &fiber;
#if DFKD_ASAN
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack.get(), kStack);
#endif
  swapcontext(&scheduler, &fiber.context);
#if DFKD_ASAN
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
  running = nullptr;
}

bool can_run(Fiber& fiber) {
  if (fiber.state == State::until && fiber.until()) fiber.state = State::ready;
  return fiber.state == State::ready;
}

struct Warp {
  Block* block;
  size_t first, last;
};

// Releases the threads at a barrier that all of them have reached. Returns whether there were any.
bool release(const Warp& of, State at) {
  bool waiting = false;
  for (size_t i = of.first; i < of.last; ++i) {
    const State state = of.block->fibers[i]->state;
    if (state != at && state != State::finished) return false;
    waiting |= state == at;
  }
  for (size_t i = of.first; i < of.last; ++i) {
    if (of.block->fibers[i]->state == at) of.block->fibers[i]->state = State::ready;
  }
  return waiting;
}

void complete_one() {
  const size_t which = order > 1 ? random_source() % in_flight.size() : 0;
  const std::function<void()> operation = std::move(in_flight[which]);
  in_flight.erase(in_flight.begin() + static_cast<std::ptrdiff_t>(which));
  operation();
}

[[noreturn]] void report_deadlock() {
  for (const auto& block : resident) {
    for (const auto& fiber : block->fibers) {
      if (fiber->state == State::until) {
        fail("thread %d of block %u waits forever for %s", fiber->index, fiber->indices.block.x, fiber->what);
      }
      if (fiber->state != State::finished) {
        fail("thread %d waits at a barrier that other threads never reach", fiber->index);
      }
    }
  }
  fail("no thread waits");
}

// Runs the resident blocks until they finish.
void run_resident() {
  std::vector<Warp> warps;
  std::vector<size_t> lanes(kWarp);
  std::iota(lanes.begin(), lanes.end(), size_t{0});
  for (const auto& block : resident) {
    const size_t count = block->fibers.size();
    for (size_t first = 0; first < count; first += kWarp) {
      warps.push_back({block.get(), first, std::min(count, first + kWarp)});
    }
  }
  if (order == 1) {
    std::reverse(warps.begin(), warps.end());
    std::reverse(lanes.begin(), lanes.end());
  }
  const bool one_warp_first = order % 2 == 1;
  for (bool any = true; any;) {
    any = false;
    if (order > 1) std::shuffle(warps.begin(), warps.end(), random_source);
    for (const Warp& warp : warps) {
      for (bool ran = true; ran;) {
        ran = false;
        if (order > 1) std::shuffle(lanes.begin(), lanes.end(), random_source);
        for (const size_t lane : lanes) {
          if (warp.first + lane < warp.last && can_run(*warp.block->fibers[warp.first + lane])) {
            run_fiber(*warp.block->fibers[warp.first + lane]);
            ran = true;
          }
        }
        any |= ran;
        if (!one_warp_first) break;
        ran |= release(warp, State::at_warp);
      }
    }
    if (!one_warp_first) {
      for (const Warp& warp : warps) any |= release(warp, State::at_warp);
    }
    for (const auto& block : resident) any |= release({block.get(), 0, block->fibers.size()}, State::at_block);
    if (!in_flight.empty() && (!any || (order > 1 && random_source() % 4 == 0))) {
      complete_one();
      any = true;
    }
  }
  for (const auto& block : resident) {
    if (!block->finished()) report_deadlock();
  }
}

std::unique_ptr<Block> make_block(dim3 at, dim3 threads, dim3 blocks, size_t shared) {
  const unsigned count = threads.x * threads.y * threads.z;
  auto block = std::make_unique<Block>();
  block->slots.resize(static_cast<size_t>((count + kWarp - 1) / kWarp) * kWarp * kSlot);
  block->shared.reset(static_cast<unsigned char*>(::operator new[](shared, kSharedAlignment)));
  block->shared_bytes = shared;
  std::memset(block->shared.get(), 0xff, shared);
  for (unsigned index = 0; index < count; ++index) {
    auto fiber = std::make_unique<Fiber>();
    fiber->block = block.get();
    fiber->index = static_cast<int>(index);
    fiber->indices = {
        dim3(index % threads.x, index / threads.x % threads.y, index / threads.x / threads.y),
        at,
        threads,
        blocks,
    };
    make_context(*fiber);
    block->fibers.push_back(std::move(fiber));
  }
  return block;
}

}  // namespace

const ThreadIndices& indices() { return running->indices; }
int thread_index() { return running->index; }
int lane() { return running->index % kWarp; }
unsigned char* slot(int lane) {
  return running->block->slots.data() + ((running->index / kWarp) * kWarp + lane) * kSlot;
}
unsigned char* shared_memory() { return running->block->shared.get(); }

void block_barrier() {
  running->state = State::at_block;
  to_scheduler(false);
}

void warp_barrier() {
  running->state = State::at_warp;
  to_scheduler(false);
}

void wait_until(const char* what, std::function<bool()> ready) {
  if (ready()) return;
  running->what = what;
  running->until = std::move(ready);
  running->state = State::until;
  to_scheduler(false);
}

bool immediate() { return order == 1 || (order > 1 && random_source() % 2 == 0); }

void enqueue(std::function<void()> operation) {
  if (immediate()) {
    operation();
  } else {
    in_flight.push_back(std::move(operation));
  }
}

void arrive(ThreadBarrier& barrier, int threads, bool wait, const char* what, const std::function<void()>& act) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived > threads) fail("%d threads arrive at %s for %d", barrier.arrived, what, threads);
  if (barrier.arrived == threads) {
    if (act) act();
    barrier.arrived = 0;
    ++barrier.generation;
  } else if (wait) {
    wait_until(what, [&barrier, generation] { return barrier.generation != generation; });
  }
}

unsigned char* async_proxy_view(const void* address) {
  auto* pointer = static_cast<unsigned char*>(const_cast<void*>(address));
  for (const auto& block : resident) {
    const std::ptrdiff_t offset = pointer - block->shared.get();
    if (offset < 0 || offset >= static_cast<std::ptrdiff_t>(block->shared_bytes)) continue;
    if (!block->view) {
      block->view.reset(static_cast<unsigned char*>(::operator new[](block->shared_bytes, kSharedAlignment)));
      std::memset(block->view.get(), 0xff, block->shared_bytes);
    }
    if (block->fenced) std::memcpy(block->view.get(), block->shared.get(), block->shared_bytes);
    block->fenced = false;
    return block->view.get() + offset;
  }
  return pointer;
}
void fence_proxy_async() {
  for (const auto& block : resident) block->fenced = true;
}

BlockState* block_state(BlockState* (*make)()) {
  auto& state = running->block->state;
  if (!state) state.reset(make());
  return state.get();
}

int cluster_rank() { return running->block->rank; }
int cluster_size() { return static_cast<int>(running->block->cluster->blocks.size()); }

void* at_rank(const void* mine, int rank) {
  Block* here = running->block;
  if (rank < 0 || rank >= cluster_size()) fail("no block %d in a cluster of %d", rank, cluster_size());
  Block* there = here->cluster->blocks[static_cast<size_t>(rank)];
  if (there->finished()) fail("block %d uses the shared memory of block %d, which has finished", here->rank, rank);
  const auto offset = static_cast<const unsigned char*>(mine) - here->shared.get();
  const bool inside = offset >= 0 && offset < static_cast<std::ptrdiff_t>(here->shared_bytes);
  if (!inside) fail("an address outside of shared memory");
  return there->shared.get() + offset;
}

void cluster_arrive() {
  Cluster& cluster = *running->block->cluster;
  running->cluster_generation = cluster.barrier.generation;
  arrive(cluster.barrier, static_cast<int>(cluster.blocks.size() * running->block->fibers.size()), false,
         "the cluster's barrier");
}
void cluster_wait() {
  const ThreadBarrier& barrier = running->block->cluster->barrier;
  wait_until("its cluster", [&barrier, generation = running->cluster_generation] {
    return barrier.generation != generation;
  });
}

void run(dim3 blocks, dim3 threads, size_t shared, const std::function<void()>& thread, int cluster, bool cooperative) {
  random_source.seed(order);
  program = &thread;
  const auto width = static_cast<unsigned>(cluster);
  if (blocks.x % width != 0) fail("a grid of %u blocks in clusters of %d", blocks.x, cluster);
  std::vector<std::unique_ptr<Cluster>> clusters;
  const auto run_blocks = [&] {
    run_resident();
    if (!in_flight.empty()) fail("blocks finished with copies in flight");
    resident.clear();
    clusters.clear();
  };
  for (unsigned z = 0; z < blocks.z; ++z) {
    for (unsigned y = 0; y < blocks.y; ++y) {
      for (unsigned x = 0; x < blocks.x; ++x) {
        if (x % width == 0) clusters.push_back(std::make_unique<Cluster>());
        resident.push_back(make_block(dim3(x, y, z), threads, blocks, shared));
        resident.back()->cluster = clusters.back().get();
        resident.back()->rank = static_cast<int>(x % width);
        clusters.back()->blocks.push_back(resident.back().get());
        if (!cooperative && x % width == width - 1) run_blocks();
      }
    }
  }
  if (!resident.empty()) run_blocks();
  program = nullptr;
}

}  // namespace dfkd::host

extern "C" void dfkd_host_order(unsigned order) { dfkd::host::order = order; }

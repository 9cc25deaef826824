// Fibers and barriers of the execution shim; see shim.h.
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

enum class State { ready, at_block, at_warp, until, ended };

// Kept from block to block: new ones are slow to get.
std::vector<std::unique_ptr<unsigned char[]>> stacks;

std::unique_ptr<unsigned char[]> new_stack() {
  if (stacks.empty()) return std::unique_ptr<unsigned char[]>(new unsigned char[kStack]);
  auto stack = std::move(stacks.back());
  stacks.pop_back();
#if DFKD_ASAN
  __asan_unpoison_memory_region(stack.get(), kStack);  // the frames that its last fiber never left
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
  Place place{};
  int index = 0;
  unsigned cluster_turn = 0;
  void* fake_stack = nullptr;
  const char* what = nullptr;
  std::function<bool()> until;
};

struct AlignedDelete {
  void operator()(unsigned char* memory) const { ::operator delete[](memory, kSharedAlignment); }
};

struct Cluster {
  std::vector<Block*> blocks;
  Meeting meeting;
};

struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<unsigned char> slots;
  std::unique_ptr<unsigned char[], AlignedDelete> shared;
  std::unique_ptr<unsigned char[], AlignedDelete> view;  // of the asynchronous units, once one has looked
  bool fenced = false;                                   // since it was last brought up to date
  size_t shared_bytes = 0;
  Cluster* cluster = nullptr;
  int rank = 0;
  std::unique_ptr<Extension> extension;

  bool ended() const {
    return std::all_of(fibers.begin(), fibers.end(), [](const auto& fiber) { return fiber->state == State::ended; });
  }
};

// What is running, and where to go when it waits.
const std::function<void()>* program = nullptr;
Fiber* running = nullptr;
ucontext_t scheduler{};
void* scheduler_fake_stack = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_size = 0;
std::mt19937 random_source;
std::deque<std::function<void()>> under_way;
std::vector<std::unique_ptr<Block>> together;  // the blocks that run now

void to_scheduler(bool for_ever) {
  Fiber* self = running;
#if DFKD_ASAN
  __sanitizer_start_switch_fiber(for_ever ? nullptr : &self->fake_stack, scheduler_stack, scheduler_size);
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
  running->state = State::ended;
  if (running->block->extension && running->block->ended()) {
    if (const char* left = running->block->extension->left_over()) fail("a block ended with %s", left);
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

// Let go of those at a barrier that all of their kind have reached; whether there were any.
bool release(const Warp& of, State at) {
  bool waiting = false;
  for (size_t i = of.first; i < of.last; ++i) {
    const State state = of.block->fibers[i]->state;
    if (state != at && state != State::ended) return false;
    waiting |= state == at;
  }
  for (size_t i = of.first; i < of.last; ++i) {
    if (of.block->fibers[i]->state == at) of.block->fibers[i]->state = State::ready;
  }
  return waiting;
}

void perform_one() {
  const size_t which = order > 1 ? random_source() % under_way.size() : 0;
  const std::function<void()> work = std::move(under_way[which]);
  under_way.erase(under_way.begin() + static_cast<std::ptrdiff_t>(which));
  work();
}

[[noreturn]] void tell_who_waits() {
  for (const auto& block : together) {
    for (const auto& fiber : block->fibers) {
      if (fiber->state == State::until) {
        fail("thread %d of block %u waits for %s, which never comes", fiber->index, fiber->place.block.x, fiber->what);
      }
      if (fiber->state != State::ended) fail("thread %d waits at a barrier that others never reach", fiber->index);
    }
  }
  fail("nobody waits");
}

// Run blocks that run together to their end.
void run_together() {
  std::vector<Warp> warps;
  std::vector<size_t> lanes(kWarp);
  std::iota(lanes.begin(), lanes.end(), size_t{0});
  for (const auto& block : together) {
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
    for (const auto& block : together) any |= release({block.get(), 0, block->fibers.size()}, State::at_block);
    if (!under_way.empty() && (!any || (order > 1 && random_source() % 4 == 0))) {
      perform_one();
      any = true;
    }
  }
  for (const auto& block : together) {
    if (!block->ended()) tell_who_waits();
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
    fiber->place = {
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

const Place& place() { return running->place; }
int thread_index() { return running->index; }
int lane() { return running->index % kWarp; }
unsigned char* slot(int lane) {
  return running->block->slots.data() + ((running->index / kWarp) * kWarp + lane) * kSlot;
}
unsigned char* shared_memory() { return running->block->shared.get(); }
size_t shared_bytes() { return running->block->shared_bytes; }

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

bool at_once() { return order == 1 || (order > 1 && random_source() % 2 == 0); }

void later(std::function<void()> work) {
  if (at_once()) {
    work();
  } else {
    under_way.push_back(std::move(work));
  }
}

void meet(Meeting& meeting, int threads, bool wait, const char* what, const std::function<void()>& act) {
  const unsigned turn = meeting.turn;
  if (++meeting.arrived > threads) fail("%d threads at %s for %d", meeting.arrived, what, threads);
  if (meeting.arrived == threads) {
    if (act) act();
    meeting.arrived = 0;
    ++meeting.turn;
  } else if (wait) {
    wait_until(what, [&meeting, turn] { return meeting.turn != turn; });
  }
}

unsigned char* asynchronous_view(const void* address) {
  auto* place = static_cast<unsigned char*>(const_cast<void*>(address));
  for (const auto& block : together) {
    const std::ptrdiff_t offset = place - block->shared.get();
    if (offset < 0 || offset >= static_cast<std::ptrdiff_t>(block->shared_bytes)) continue;
    if (!block->view) {
      block->view.reset(static_cast<unsigned char*>(::operator new[](block->shared_bytes, kSharedAlignment)));
      std::memset(block->view.get(), 0xff, block->shared_bytes);
    }
    if (block->fenced) std::memcpy(block->view.get(), block->shared.get(), block->shared_bytes);
    block->fenced = false;
    return block->view.get() + offset;
  }
  return place;
}
void fence_asynchronous() {
  for (const auto& block : together) block->fenced = true;
}

Extension* extension(Extension* (*make)()) {
  auto& here = running->block->extension;
  if (!here) here.reset(make());
  return here.get();
}

int cluster_rank() { return running->block->rank; }
int cluster_size() { return static_cast<int>(running->block->cluster->blocks.size()); }

void* at_rank(const void* mine, int rank) {
  Block* here = running->block;
  if (rank < 0 || rank >= cluster_size()) fail("no block %d in a cluster of %d", rank, cluster_size());
  Block* there = here->cluster->blocks[static_cast<size_t>(rank)];
  if (there->ended()) fail("block %d of the cluster has ended, and block %d uses its shared memory", rank, here->rank);
  const auto offset = static_cast<const unsigned char*>(mine) - here->shared.get();
  if (offset < 0 || offset >= static_cast<std::ptrdiff_t>(here->shared_bytes)) fail("no place in shared memory");
  return there->shared.get() + offset;
}

void cluster_arrive() {
  Cluster& cluster = *running->block->cluster;
  running->cluster_turn = cluster.meeting.turn;
  meet(cluster.meeting, static_cast<int>(cluster.blocks.size() * running->block->fibers.size()), false,
       "the cluster's barrier");
}
void cluster_wait() {
  const Meeting& meeting = running->block->cluster->meeting;
  wait_until("its cluster", [&meeting, turn = running->cluster_turn] { return meeting.turn != turn; });
}

void run(dim3 blocks, dim3 threads, size_t shared, const std::function<void()>& thread, int cluster, bool cooperative) {
  random_source.seed(order);
  program = &thread;
  const auto width = static_cast<unsigned>(cluster);
  if (blocks.x % width != 0) fail("a grid of %u blocks in clusters of %d", blocks.x, cluster);
  std::vector<std::unique_ptr<Cluster>> clusters;
  const auto run_these = [&] {
    run_together();
    if (!under_way.empty()) fail("blocks ended with copies under way");
    together.clear();
    clusters.clear();
  };
  for (unsigned z = 0; z < blocks.z; ++z) {
    for (unsigned y = 0; y < blocks.y; ++y) {
      for (unsigned x = 0; x < blocks.x; ++x) {
        if (x % width == 0) clusters.push_back(std::make_unique<Cluster>());
        together.push_back(make_block(dim3(x, y, z), threads, blocks, shared));
        together.back()->cluster = clusters.back().get();
        together.back()->rank = static_cast<int>(x % width);
        clusters.back()->blocks.push_back(together.back().get());
        if (!cooperative && x % width == width - 1) run_these();
      }
    }
  }
  if (!together.empty()) run_these();
  program = nullptr;
}

}  // namespace dfkd::host

extern "C" void dfkd_host_order(unsigned order) { dfkd::host::order = order; }

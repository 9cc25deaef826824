// Fibers, barriers and deferred copies of the execution shim; see shim.h.
#include "shim.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
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

namespace {

constexpr size_t kStack = 256 * 1024;  // sanitizers make frames large

enum class State { ready, at_block, at_warp, ended };

struct Copy {
  void* to;
  const void* from;
  int bytes, valid;
};

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

struct Fiber {
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber() { stacks.push_back(std::move(stack)); }

  ucontext_t context{};
  std::unique_ptr<unsigned char[]> stack = new_stack();
  State state = State::ready;
  Place place{};
  int index = 0;
  void* fake_stack = nullptr;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<unsigned char> slots;
  std::unique_ptr<unsigned char[]> shared;
  size_t shared_bytes = 0;
  const std::function<void()>* thread = nullptr;
  ucontext_t scheduler{};
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_size = 0;
  Fiber* running = nullptr;
};

Block* block = nullptr;

void to_scheduler(bool for_ever) {
  Fiber* self = block->running;
#if DFKD_ASAN
  __sanitizer_start_switch_fiber(for_ever ? nullptr : &self->fake_stack, block->scheduler_stack, block->scheduler_size);
#endif
  swapcontext(&self->context, &block->scheduler);
#if DFKD_ASAN
  __sanitizer_finish_switch_fiber(self->fake_stack, &block->scheduler_stack, &block->scheduler_size);
#endif
}

void begin() {
#if DFKD_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &block->scheduler_stack, &block->scheduler_size);
#endif
  (*block->thread)();
  if (!block->running->open.empty() || !block->running->groups.empty()) {
    std::fprintf(stderr, "shim: thread %d ended with copies that nobody waited for\n", block->running->index);
    std::abort();
  }
  block->running->state = State::ended;
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
  block->running = &fiber;
#if DFKD_ASAN
  __sanitizer_start_switch_fiber(&block->scheduler_fake_stack, fiber.stack.get(), kStack);
#endif
  swapcontext(&block->scheduler, &fiber.context);
#if DFKD_ASAN
  __sanitizer_finish_switch_fiber(block->scheduler_fake_stack, nullptr, nullptr);
#endif
  block->running = nullptr;
}

// Let go of those at a barrier that all of their kind have reached; whether there were any.
bool release(size_t first, size_t last, State at) {
  bool waiting = false;
  for (size_t i = first; i < last; ++i) {
    State state = block->fibers[i]->state;
    if (state != at && state != State::ended) return false;
    waiting |= state == at;
  }
  for (size_t i = first; i < last; ++i) {
    if (block->fibers[i]->state == at) block->fibers[i]->state = State::ready;
  }
  return waiting;
}

void run_block(std::mt19937& random) {
  const size_t count = block->fibers.size();
  std::vector<size_t> warps((count + kWarp - 1) / kWarp), lanes(kWarp);
  std::iota(warps.begin(), warps.end(), size_t{0});
  std::iota(lanes.begin(), lanes.end(), size_t{0});
  if (order == 1) {
    std::reverse(warps.begin(), warps.end());
    std::reverse(lanes.begin(), lanes.end());
  }
  const bool one_warp_first = order % 2 == 1;
  for (bool any = true; any;) {
    any = false;
    if (order > 1) std::shuffle(warps.begin(), warps.end(), random);
    for (const size_t warp : warps) {
      const size_t first = warp * kWarp, last = std::min(count, first + kWarp);
      for (bool ran = true; ran;) {
        ran = false;
        if (order > 1) std::shuffle(lanes.begin(), lanes.end(), random);
        for (const size_t lane : lanes) {
          if (first + lane < last && block->fibers[first + lane]->state == State::ready) {
            run_fiber(*block->fibers[first + lane]);
            ran = true;
          }
        }
        any |= ran;
        if (!one_warp_first) break;
        ran |= release(first, last, State::at_warp);
      }
    }
    if (!one_warp_first) {
      for (const size_t warp : warps) any |= release(warp * kWarp, std::min(count, (warp + 1) * kWarp), State::at_warp);
    }
    any |= release(0, count, State::at_block);
  }
  for (const auto& fiber : block->fibers) {
    if (fiber->state != State::ended) {
      std::fprintf(stderr, "shim: thread %d waits at a barrier that others never reach\n", fiber->index);
      std::abort();
    }
  }
}

void perform(std::vector<Copy>& copies) {
  for (const Copy& copy : copies) {
    std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.valid));
    std::memset(static_cast<unsigned char*>(copy.to) + copy.valid, 0, static_cast<size_t>(copy.bytes - copy.valid));
  }
  copies.clear();
}

}  // namespace

const Place& place() { return block->running->place; }
int lane() { return block->running->index % kWarp; }
unsigned char* slot(int lane) {
  return block->slots.data() + ((block->running->index / kWarp) * kWarp + lane) * kSlot;
}
unsigned char* shared_memory() { return block->shared.get(); }
size_t shared_bytes() { return block->shared_bytes; }

void block_barrier() {
  block->running->state = State::at_block;
  to_scheduler(false);
}

void warp_barrier() {
  block->running->state = State::at_warp;
  to_scheduler(false);
}

void copy_later(void* to, const void* from, int bytes, int valid) {
  block->running->open.push_back({to, from, bytes, valid});
}
void commit_copies() {
  block->running->groups.push_back(std::move(block->running->open));
  block->running->open.clear();
}
void wait_copies(int newest_left) {
  auto& groups = block->running->groups;
  while (static_cast<int>(groups.size()) > newest_left) {
    perform(groups.front());
    groups.pop_front();
  }
}

void run(dim3 blocks, dim3 threads, size_t shared, const std::function<void()>& thread) {
  std::mt19937 random(order);
  const unsigned count = threads.x * threads.y * threads.z;
  for (unsigned z = 0; z < blocks.z; ++z) {
    for (unsigned y = 0; y < blocks.y; ++y) {
      for (unsigned x = 0; x < blocks.x; ++x) {
        Block here;
        block = &here;
        here.thread = &thread;
        here.slots.resize(static_cast<size_t>((count + kWarp - 1) / kWarp) * kWarp * kSlot);
        here.shared.reset(new unsigned char[shared]);
        here.shared_bytes = shared;
        std::memset(here.shared.get(), 0xff, shared);
        for (unsigned index = 0; index < count; ++index) {
          auto fiber = std::make_unique<Fiber>();
          fiber->index = static_cast<int>(index);
          fiber->place = {
              dim3(index % threads.x, index / threads.x % threads.y, index / threads.x / threads.y),
              dim3(x, y, z),
              threads,
              blocks,
          };
          make_context(*fiber);
          here.fibers.push_back(std::move(fiber));
        }
        run_block(random);
        block = nullptr;
      }
    }
  }
}

}  // namespace dfkd::host

extern "C" void dfkd_host_order(unsigned order) { dfkd::host::order = order; }

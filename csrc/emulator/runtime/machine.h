// Runs a grid: blocks one after another, the threads of a block as fibers that switch only where they wait.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <map>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "../device/emulator.h"
#include "../device/kernel.h"
#include "buffers.h"
#include "counts.h"
#include "fiber.h"
#include "shadow.h"

namespace cmaclip::emulator {

struct Size3 {
  uint32_t x = 1, y = 1, z = 1;
  uint64_t volume() const { return uint64_t{x} * y * z; }
};

enum class Order { forward, reverse, random };

struct Finding {
  std::string kind;
  std::string message;
  // Offsets into the kernels' library; 0: none.
  uint32_t site = 0;
  uint32_t other_site = 0;
  std::array<uint32_t, 3> block{};
  // -1: none.
  int thread = -1;
};

struct Totals {
  uint64_t blocks = 0;
  uint64_t block_barriers = 0;
  uint64_t warp_barriers = 0;
  uint64_t shuffles = 0;
  uint64_t votes = 0;
  uint64_t atomics = 0;
  uint64_t mma_f16 = 0;
  uint64_t mma_bf16 = 0;
  uint64_t mma_tf32 = 0;
  uint64_t ldmatrix = 0;
  uint64_t cp_async = 0;
  uint64_t distinct_sectors_read = 0;
  uint64_t distinct_sectors_written = 0;
};

struct Image {
  uintptr_t base = 0;
  std::vector<std::pair<uintptr_t, uintptr_t>> segments;
  // The zero-initialised data, where the kernels' static shared variables live.
  uintptr_t shared_begin = 0;
  uintptr_t shared_end = 0;
};

struct Launch {
  const Function* function;
  Size3 grid;
  Size3 block;
  uint32_t dynamic_shared = 0;
  Order order = Order::forward;
  uint64_t seed = 0;
  std::vector<void*> arguments;
  const Image* image = nullptr;
  // Memory accesses, collectives and basic blocks after which a launch is given up as endless.
  uint64_t step_limit = 0;
};

struct Lane {
  enum State : uint8_t { ready, waiting, exited };
  struct Copy {
    uintptr_t shared;
    uintptr_t global;
    int bytes;
    bool valid;
    uint32_t site;
  };

  State state = ready;
  uint16_t thread = 0;
  void* stack = nullptr;
  // Where it waits, for the report of a divergent collective.
  const char* waiting_for = nullptr;
  uint32_t waiting_site = 0;
  std::vector<Copy> open_copies;
  std::deque<std::vector<Copy>> groups;
};

struct Collective {
  const char* name;
  uint32_t mask;
  uint32_t arrived = 0;
  uint32_t site = 0;
  std::array<void*, 32> data{};
};

struct Warp {
  std::vector<Collective> open;
  WarpAccesses accesses;
};

class Machine {
 public:
  static Machine& instance();

  void run(const Launch& launch);
  bool running() const { return running_; }

  // Results of the last launch.
  std::vector<Finding> findings;
  // Collectives that lanes reached at two sites: a fault unless both are one line that the compiler doubled.
  std::vector<Finding> doubtful;
  Totals totals;
  // Whether `mma` cuts its sums as tensor cores do, instead of rounding them once.
  bool mma_truncates = false;
  std::vector<SiteCounts> site_counts;
  std::vector<uint32_t> sites;

  GlobalMemory memory;

  // For the device functions
  enum class Kind { read, write, atomic };
  void step(uint32_t site) {
    if (++steps_ > launch_->step_limit) fail("endless", "the launch's step limit is used up", site);
  }
  void access(uintptr_t address, int bytes, Kind kind, uint32_t site, bool aligned = true);
  uint32_t site(void* return_address) const {
    return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(return_address) - image_->base - 1);
  }
  // Waits until all lanes of the mask have brought their data; the last runs `finish` for all.
  void collective(const char* name, uint32_t mask, uint32_t site, void* data, bool orders_memory,
                  void (*finish)(const Collective& collective));
  int block_barrier(uint32_t site, bool predicate);
  void copy_async(uintptr_t shared, uintptr_t global, int bytes, bool valid, uint32_t site);
  void commit_copies();
  void wait_copies(int pending, uint32_t site);
  void* dynamic_shared_memory() const { return dynamic_; }
  // One row of 16 bytes, read in the name of the lane that gave its address.
  void read_row(uintptr_t address, uint32_t site, int thread);
  void count_row_phases(const std::array<uintptr_t, 32>& rows, int count, uint32_t site);
  int current_thread() const { return current_->thread; }
  int current_lane() const { return current_->thread & 31; }
  void report(const char* kind, std::string message, uint32_t site, uint32_t other_site = 0);
  [[noreturn]] void fail(const char* kind, std::string message, uint32_t site);
  bool on_stack(uintptr_t address) const { return stacks_.contains(reinterpret_cast<void*>(address)); }

 private:
  Machine();

  static void lane_main();
  void run_block(Size3 index);
  void resume(Lane& lane);
  void suspend();
  [[noreturn]] void leave_for_good();
  void report_divergence();
  void synchronise(int first_thread, uint32_t mask);
  void synchronise_block();
  bool happened_before(const Access& past) const;
  void check_cells(Cell* cells, int count, Kind kind, uint32_t site, bool shared);
  void add_reader(Cell& cell, const Access& now);
  void touch_sectors(Buffer& buffer, uintptr_t address, int bytes, bool write);
  int site_index(uint32_t site);
  Cell* shared_cells(uintptr_t address, int bytes, uint32_t site, const char* what);
  std::string describe_address(uintptr_t address);

  const Launch* launch_ = nullptr;
  const Image* image_ = nullptr;
  bool running_ = false;
  bool stopped_ = false;
  uint64_t steps_ = 0;

  FiberStacks stacks_;
  void* scheduler_ = nullptr;
  Lane* current_ = nullptr;
  std::vector<Lane> lanes_;
  std::vector<Warp> warps_;
  int threads_ = 0;
  std::mt19937_64 random_;

  // Serial numbers of blocks grow over all launches, so that cells need no clearing.
  uint32_t serial_ = 0;
  uint32_t first_serial_ = 1;
  uint32_t launch_serial_ = 0;
  std::array<uint32_t, 3> block_index_{};
  // Row i: for each thread, the last of its epochs that thread i knows to be over; its own current epoch on the diagonal.
  std::vector<uint32_t> clocks_;
  std::vector<std::vector<Access>> readers_;
  size_t readers_used_ = 0;

  int barrier_arrived_ = 0;
  int barrier_predicates_ = 0;
  int barrier_result_ = 0;
  uint32_t barrier_site_ = 0;

  // Dynamic shared memory with unmapped surroundings, and the cells of both kinds.
  char* dynamic_ = nullptr;
  ZeroedArray<Cell> dynamic_cells_;
  std::map<const Image*, ZeroedArray<Cell>> static_cells_;

  std::unordered_map<uint32_t, int> site_indices_;
  uint32_t last_site_ = 0;
  int last_site_index_ = -1;
};

}  // namespace cmaclip::emulator

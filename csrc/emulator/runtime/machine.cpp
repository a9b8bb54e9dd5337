#include "machine.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>

// Declared constant for the kernels, each of which sees its own value; set here at each switch.
struct EmulatedIndex {
  unsigned int x, y, z;
};
__attribute__((visibility("default"))) EmulatedIndex threadIdx{};
__attribute__((visibility("default"))) EmulatedIndex blockIdx{};
__attribute__((visibility("default"))) EmulatedIndex blockDim{};
__attribute__((visibility("default"))) EmulatedIndex gridDim{};

namespace cmaclip::emulator {

namespace {

constexpr size_t kDynamicReserve = size_t{1} << 22;
constexpr size_t kDynamicOffset = size_t{1} << 20;
constexpr int kSharedGranuleShift = 1;
// The most that sm_90 and sm_100 give a block.
constexpr uint32_t kMostShared = 227 * 1024;
constexpr size_t kMostFindings = 64;

std::string hexadecimal(uint32_t value) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", value);
  return text;
}

std::string lane_list(uint32_t mask) {
  std::string text;
  for (int lane = 0; lane < 32; ++lane) {
    if (((mask >> lane) & 1u) == 0) continue;
    int last = lane;
    while (last < 31 && ((mask >> (last + 1)) & 1u) != 0) ++last;
    if (!text.empty()) text += ", ";
    text += std::to_string(lane);
    if (last > lane) text += "-" + std::to_string(last);
    lane = last;
  }
  return text;
}

}  // namespace

Machine& Machine::instance() {
  // Never destroyed: buffers held by Python may outlive the static objects.
  static Machine* machine = new Machine;
  return *machine;
}

Machine::Machine() {
  void* memory = mmap(nullptr, kDynamicReserve, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  dynamic_ = static_cast<char*>(memory) + kDynamicOffset;
  mprotect(dynamic_, kMostShared + 4096, PROT_READ | PROT_WRITE);
  dynamic_cells_ = ZeroedArray<Cell>((kMostShared >> kSharedGranuleShift) + 1);
}

// ---- the grid

void Machine::run(const Launch& launch) {
  const uint64_t threads = launch.block.volume();
  if (threads < 1 || threads > 1024) throw std::invalid_argument("a block has 1 to 1024 threads");
  if (launch.grid.volume() < 1 || launch.grid.volume() > (uint64_t{1} << 24)) {
    throw std::invalid_argument("the emulator runs grids of 1 to 2^24 blocks");
  }
  if (launch.dynamic_shared > kMostShared) throw std::invalid_argument("a block has at most 227 KiB of shared memory");

  launch_ = &launch;
  image_ = launch.image;
  threads_ = static_cast<int>(threads);
  findings.clear();
  doubtful.clear();
  totals = Totals();
  site_counts.clear();
  sites.clear();
  site_indices_.clear();
  last_site_index_ = -1;
  steps_ = 0;
  stopped_ = false;
  first_serial_ = serial_ + 1;
  ++launch_serial_;
  random_.seed(launch.seed);
  stacks_.reserve(threads_);
  lanes_.resize(threads_);
  warps_.clear();
  warps_.resize((threads_ + 31) / 32);
  clocks_.assign(static_cast<size_t>(threads_) * threads_, 0);
  if (!static_cells_[image_]) {
    static_cells_[image_] =
        ZeroedArray<Cell>(((image_->shared_end - image_->shared_begin) >> kSharedGranuleShift) + 1);
  }
  blockDim = {launch.block.x, launch.block.y, launch.block.z};
  gridDim = {launch.grid.x, launch.grid.y, launch.grid.z};

  std::vector<uint32_t> order(launch.grid.volume());
  std::iota(order.begin(), order.end(), 0u);
  if (launch.order == Order::reverse) std::reverse(order.begin(), order.end());
  if (launch.order == Order::random) std::shuffle(order.begin(), order.end(), random_);

  running_ = true;
  for (uint32_t linear : order) {
    run_block({linear % launch.grid.x, linear / launch.grid.x % launch.grid.y,
               linear / launch.grid.x / launch.grid.y});
    if (stopped_) break;
  }
  running_ = false;
}

void Machine::run_block(Size3 index) {
  ++serial_;
  ++totals.blocks;
  block_index_ = {index.x, index.y, index.z};
  blockIdx = {index.x, index.y, index.z};
  std::fill(clocks_.begin(), clocks_.end(), 0u);
  readers_used_ = 0;
  barrier_arrived_ = 0;
  barrier_predicates_ = 0;
  // All ones: a NaN in every floating-point format.
  std::memset(dynamic_, 0xff, launch_->dynamic_shared);
  std::memset(reinterpret_cast<void*>(image_->shared_begin), 0xff, image_->shared_end - image_->shared_begin);
  for (int thread = 0; thread < threads_; ++thread) {
    Lane& lane = lanes_[thread];
    lane.state = Lane::ready;
    lane.thread = static_cast<uint16_t>(thread);
    lane.stack = stacks_.prepare(thread, &lane_main);
    lane.open_copies.clear();
    lane.groups.clear();
    clocks_[static_cast<size_t>(thread) * threads_ + thread] = 1;
  }
  for (Warp& warp : warps_) {
    warp.open.clear();
    warp.accesses.reset();
  }

  // Warps one after another, each as far as it comes: forward from the first, in reverse from the last, or any.
  const int warp_count = static_cast<int>(warps_.size());
  std::vector<int> candidates;
  std::array<int, 32> lane_order;
  int exited = 0;
  while (exited < threads_ && !stopped_) {
    candidates.clear();
    for (int warp = 0; warp < warp_count; ++warp) {
      const int first = warp * 32;
      const int last = std::min(first + 32, threads_);
      for (int thread = first; thread < last; ++thread) {
        if (lanes_[thread].state == Lane::ready) {
          candidates.push_back(warp);
          break;
        }
      }
    }
    if (candidates.empty()) {
      report_divergence();
      stopped_ = true;
      break;
    }
    int chosen = candidates.front();
    if (launch_->order == Order::reverse) chosen = candidates.back();
    if (launch_->order == Order::random) chosen = candidates[random_() % candidates.size()];
    const int first = chosen * 32;
    const int count = std::min(32, threads_ - first);
    std::iota(lane_order.begin(), lane_order.begin() + count, first);
    if (launch_->order == Order::reverse) std::reverse(lane_order.begin(), lane_order.begin() + count);
    if (launch_->order == Order::random) std::shuffle(lane_order.begin(), lane_order.begin() + count, random_);
    for (int i = 0; i < count && !stopped_; ++i) {
      Lane& lane = lanes_[lane_order[i]];
      if (lane.state != Lane::ready) continue;
      resume(lane);
      if (lane.state == Lane::exited) ++exited;
    }
  }
  for (Warp& warp : warps_) warp.accesses.flush(site_counts);
}

// ---- fibers

void Machine::lane_main() {
  Machine& machine = instance();
  machine.launch_->function->invoke(machine.launch_->arguments.data(), nullptr);
  machine.current_->state = Lane::exited;
  machine.leave_for_good();
}

void Machine::resume(Lane& lane) {
  current_ = &lane;
  const Size3& block = launch_->block;
  const uint32_t thread = lane.thread;
  threadIdx = {thread % block.x, thread / block.x % block.y, thread / block.x / block.y};
  switch_stack(&scheduler_, lane.stack);
  current_ = nullptr;
}

void Machine::suspend() { switch_stack(&current_->stack, scheduler_); }

void Machine::leave_for_good() {
  switch_stack(&current_->stack, scheduler_);
  __builtin_unreachable();
}

// ---- reports

void Machine::report(const char* kind, std::string message, uint32_t site, uint32_t other_site) {
  for (const Finding& known : findings) {
    if (known.site == site && known.other_site == other_site && known.kind == kind) return;
  }
  if (findings.size() >= kMostFindings) return;
  findings.push_back({kind, std::move(message), site, other_site, block_index_, current_ ? current_->thread : -1});
}

void Machine::fail(const char* kind, std::string message, uint32_t site) {
  report(kind, std::move(message), site);
  stopped_ = true;
  leave_for_good();
}

void Machine::report_divergence() {
  // One finding per barrier or collective that some reached and others did not.
  if (barrier_arrived_ > 0) {
    std::string missing;
    for (size_t warp = 0; warp < warps_.size(); ++warp) {
      uint32_t exited = 0;
      uint32_t elsewhere = 0;
      for (int lane = 0; lane < 32 && warp * 32 + lane < lanes_.size(); ++lane) {
        const Lane& other = lanes_[warp * 32 + lane];
        if (other.state == Lane::exited) exited |= 1u << lane;
        if (other.state == Lane::waiting && std::strcmp(other.waiting_for, "__syncthreads") != 0) {
          elsewhere |= 1u << lane;
        }
      }
      if (exited != 0) missing += "; lanes " + lane_list(exited) + " of warp " + std::to_string(warp) + " have returned";
      if (elsewhere != 0) {
        missing += "; lanes " + lane_list(elsewhere) + " of warp " + std::to_string(warp) + " wait elsewhere";
      }
    }
    report("divergence",
           "__syncthreads reached by " + std::to_string(barrier_arrived_) + " of " + std::to_string(threads_) +
               " threads" + missing,
           barrier_site_);
  }
  for (size_t warp = 0; warp < warps_.size(); ++warp) {
    for (const Collective& open : warps_[warp].open) {
      std::string states;
      uint32_t other_site = 0;
      for (int lane = 0; lane < 32; ++lane) {
        if (((open.mask & ~open.arrived) >> lane & 1u) == 0) continue;
        const size_t thread = warp * 32 + lane;
        states += "; lane " + std::to_string(lane);
        if (thread >= lanes_.size()) {
          states += " does not exist";
        } else if (lanes_[thread].state == Lane::exited) {
          states += " has returned";
        } else {
          states += std::string(" waits at ") + lanes_[thread].waiting_for;
          other_site = lanes_[thread].waiting_site;
        }
        break;
      }
      report("divergence",
             std::string(open.name) + " with mask " + hexadecimal(open.mask) + " reached only by lanes " +
                 lane_list(open.arrived) + " of warp " + std::to_string(warp) + ", not by lanes " +
                 lane_list(open.mask & ~open.arrived) + states,
             open.site, other_site);
    }
  }
}

// ---- collectives

void Machine::collective(const char* name, uint32_t mask, uint32_t site, void* data, bool orders_memory,
                         void (*finish)(const Collective& collective)) {
  step(site);
  Lane& self = *current_;
  const int lane = self.thread & 31;
  if (((mask >> lane) & 1u) == 0) {
    fail("divergence", std::string(name) + ": lane " + std::to_string(lane) + " is not in its own mask " + hexadecimal(mask),
         site);
  }
  Warp& warp = warps_[self.thread >> 5];
  auto open = std::find_if(warp.open.begin(), warp.open.end(), [&](const Collective& candidate) {
    return candidate.mask == mask && candidate.name == name && ((candidate.arrived >> lane) & 1u) == 0;
  });
  if (open == warp.open.end()) {
    warp.open.push_back({name, mask, 0, site, {}});
    open = warp.open.end() - 1;
  }
  if (open->site != site) {
    const bool known = std::any_of(doubtful.begin(), doubtful.end(), [&](const Finding& finding) {
      return finding.site == site && finding.other_site == open->site;
    });
    if (!known) {
      doubtful.push_back({"divergence", std::string(name) + " reached by the lanes of one warp at two places", site,
                          open->site, block_index_, self.thread});
    }
  }
  open->arrived |= 1u << lane;
  open->data[lane] = data;
  if (open->arrived != mask) {
    self.state = Lane::waiting;
    self.waiting_for = name;
    self.waiting_site = site;
    suspend();
    return;
  }
  const Collective complete = *open;
  warp.open.erase(open);
  const int first = self.thread & ~31;
  finish(complete);
  if (orders_memory) synchronise(first, mask);
  if (mask == 0xffffffffu) warp.accesses.flush(site_counts);
  for (int other = 0; other < 32; ++other) {
    if (((mask >> other) & 1u) != 0) lanes_[first + other].state = Lane::ready;
  }
}

int Machine::block_barrier(uint32_t site, bool predicate) {
  step(site);
  Lane& self = *current_;
  if (barrier_arrived_ == 0) barrier_site_ = site;
  if (barrier_site_ != site) {
    const bool known = std::any_of(doubtful.begin(), doubtful.end(), [&](const Finding& finding) {
      return finding.site == site && finding.other_site == barrier_site_;
    });
    if (!known) {
      doubtful.push_back({"divergence", "one block barrier reached by its threads at two places", site, barrier_site_,
                          block_index_, self.thread});
    }
  }
  barrier_predicates_ += predicate ? 1 : 0;
  if (++barrier_arrived_ < threads_) {
    self.state = Lane::waiting;
    self.waiting_for = "__syncthreads";
    self.waiting_site = site;
    suspend();
    return barrier_result_;
  }
  barrier_result_ = barrier_predicates_;
  barrier_arrived_ = 0;
  barrier_predicates_ = 0;
  ++totals.block_barriers;
  synchronise_block();
  for (Warp& warp : warps_) warp.accesses.flush(site_counts);
  for (Lane& lane : lanes_) lane.state = Lane::ready;
  return barrier_result_;
}

void Machine::synchronise(int first_thread, uint32_t mask) {
  std::vector<uint32_t> joined(threads_, 0);
  for (int lane = 0; lane < 32; ++lane) {
    if (((mask >> lane) & 1u) == 0) continue;
    const uint32_t* row = &clocks_[static_cast<size_t>(first_thread + lane) * threads_];
    for (int i = 0; i < threads_; ++i) joined[i] = std::max(joined[i], row[i]);
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (((mask >> lane) & 1u) == 0) continue;
    const int thread = first_thread + lane;
    uint32_t* row = &clocks_[static_cast<size_t>(thread) * threads_];
    std::copy(joined.begin(), joined.end(), row);
    ++row[thread];
  }
}

void Machine::synchronise_block() {
  // Nobody knows a thread's epoch better than the thread itself: the join is the diagonal.
  std::vector<uint32_t> joined(threads_);
  for (int i = 0; i < threads_; ++i) joined[i] = clocks_[static_cast<size_t>(i) * threads_ + i];
  for (int thread = 0; thread < threads_; ++thread) {
    uint32_t* row = &clocks_[static_cast<size_t>(thread) * threads_];
    std::copy(joined.begin(), joined.end(), row);
    ++row[thread];
  }
}

// ---- memory

bool Machine::happened_before(const Access& past) const {
  if (past.block != serial_) return past.block < first_serial_;
  return clocks_[static_cast<size_t>(current_->thread) * threads_ + past.thread] >= past.epoch;
}

int Machine::site_index(uint32_t site) {
  if (site == last_site_ && last_site_index_ >= 0) return last_site_index_;
  const auto [found, inserted] = site_indices_.try_emplace(site, static_cast<int>(sites.size()));
  if (inserted) {
    sites.push_back(site);
    site_counts.emplace_back();
  }
  last_site_ = site;
  last_site_index_ = found->second;
  return last_site_index_;
}

std::string Machine::describe_address(uintptr_t address) {
  if (const Buffer* buffer = memory.contains(address) ? memory.nearest(address) : nullptr) {
    const int64_t offset = static_cast<int64_t>(address) - static_cast<int64_t>(buffer->begin);
    return "byte " + std::to_string(offset) + " of buffer '" + buffer->name + "', which has " +
           std::to_string(buffer->bytes) + " bytes";
  }
  const int64_t offset = static_cast<int64_t>(address) - static_cast<int64_t>(reinterpret_cast<uintptr_t>(dynamic_));
  if (offset >= -static_cast<int64_t>(kDynamicOffset) && offset < static_cast<int64_t>(kDynamicReserve - kDynamicOffset)) {
    return "byte " + std::to_string(offset) + " of dynamic shared memory, which has " +
           std::to_string(launch_->dynamic_shared) + " bytes";
  }
  return address == 0 ? "a null pointer" : "an address in no buffer";
}

Cell* Machine::shared_cells(uintptr_t address, int bytes, uint32_t site, const char* what) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(dynamic_);
  if (address - (begin - kDynamicOffset) < kDynamicReserve) {
    if (address < begin || address + bytes > begin + launch_->dynamic_shared) {
      fail("out of bounds", std::string(what) + " of " + std::to_string(bytes) + " bytes at " + describe_address(address),
           site);
    }
    return dynamic_cells_.data() + ((address - begin) >> kSharedGranuleShift);
  }
  if (address >= image_->shared_begin && address + bytes <= image_->shared_end) {
    return static_cells_[image_].data() + ((address >> kSharedGranuleShift) - (image_->shared_begin >> kSharedGranuleShift));
  }
  return nullptr;
}

void Machine::access(uintptr_t address, int bytes, Kind kind, uint32_t site, bool aligned) {
  step(site);
  const char* what = kind == Kind::read ? "read" : kind == Kind::write ? "write" : "atomic";
  Warp& warp = warps_[current_->thread >> 5];
  if (memory.contains(address)) {
    Buffer* buffer = memory.find(address);
    if (buffer == nullptr || address < buffer->begin || address + bytes > buffer->begin + buffer->bytes) {
      fail("out of bounds", std::string(what) + " of " + std::to_string(bytes) + " bytes at " + describe_address(address),
           site);
    }
    if (aligned && (address & (bytes - 1)) != 0) {
      fail("misaligned", std::string(what) + " of " + std::to_string(bytes) + " bytes at " + describe_address(address), site);
    }
    warp.accesses.add(site_index(site), current_->thread & 31, address, bytes, Space::global);
    touch_sectors(*buffer, address, bytes, kind != Kind::read);
    if (buffer->read_only) {
      if (kind != Kind::read) {
        fail("constant written", "write to " + describe_address(address) + ", which the kernel takes as const", site);
      }
      return;
    }
    const int shift = buffer->granule_shift;
    if (!buffer->cells) buffer->cells = ZeroedArray<Cell>((buffer->bytes >> shift) + 1);
    const size_t first = (address - buffer->begin) >> shift;
    const size_t last = (address + bytes - 1 - buffer->begin) >> shift;
    check_cells(buffer->cells.data() + first, static_cast<int>(last - first + 1), kind, site, false);
    return;
  }
  if (Cell* cells = shared_cells(address, bytes, site, what)) {
    if (aligned && (address & (bytes - 1)) != 0) {
      fail("misaligned", std::string(what) + " of " + std::to_string(bytes) + " bytes of shared memory", site);
    }
    warp.accesses.add(site_index(site), current_->thread & 31, address, bytes, Space::shared);
    const int count = static_cast<int>(((address + bytes - 1) >> kSharedGranuleShift) - (address >> kSharedGranuleShift)) + 1;
    check_cells(cells, count, kind, site, true);
    return;
  }
  // Constants, and the indices where they are read through a reference, are no device memory.
  for (const auto& [begin, end] : image_->segments) {
    if (kind == Kind::read && address >= begin && address + bytes <= end) return;
  }
  for (const EmulatedIndex* index : {&threadIdx, &blockIdx, &blockDim, &gridDim}) {
    if (kind == Kind::read && address - reinterpret_cast<uintptr_t>(index) < sizeof *index) return;
  }
  fail("out of bounds", std::string(what) + " of " + std::to_string(bytes) + " bytes at " + describe_address(address), site);
}

void Machine::touch_sectors(Buffer& buffer, uintptr_t address, int bytes, bool write) {
  const size_t count = ((buffer.begin + buffer.bytes) >> 5) - (buffer.begin >> 5) + 1;
  if (!buffer.sectors) buffer.sectors = ZeroedArray<uint32_t>(2 * count);
  for (size_t sector = (address >> 5) - (buffer.begin >> 5); sector <= ((address + bytes - 1) >> 5) - (buffer.begin >> 5);
       ++sector) {
    uint32_t& seen = buffer.sectors.data()[2 * sector + (write ? 1 : 0)];
    if (seen == launch_serial_) continue;
    seen = launch_serial_;
    ++(write ? totals.distinct_sectors_written : totals.distinct_sectors_read);
  }
}

void Machine::check_cells(Cell* cells, int count, Kind kind, uint32_t site, bool shared) {
  const uint16_t thread = current_->thread;
  const uint32_t epoch = clocks_[static_cast<size_t>(thread) * threads_ + thread];
  const Access now{serial_, epoch, site, thread, kind == Kind::atomic};
  const char* space = shared ? "shared" : "global";
  const auto race = [&](const Access& past, const char* past_what, const char* what) {
    std::string who = past.block == serial_ ? "thread " + std::to_string(past.thread) + " of the block"
                                            : std::string("another block");
    report("race",
           std::string(space) + " memory: " + what + " by thread " + std::to_string(thread) + " and " + past_what +
               " by " + who + " with no barrier between them",
           site, past.site);
  };
  // Each block has its own shared memory, though all have it at one address here.
  const auto ordered = [&](const Access& past) { return (shared && past.block != serial_) || happened_before(past); };
  for (int i = 0; i < count; ++i) {
    Cell& cell = cells[i];
    if (shared) {
      if (kind != Kind::write && cell.write.block != serial_) {
        report("uninitialised", "shared memory is read that nobody has written in this block", site);
      } else if (cell.in_flight != 0 && cell.write.block == serial_) {
        report("cp.async",
               kind == Kind::read ? "shared memory is read whose cp.async has not been waited for"
                                  : "shared memory is written while a cp.async into it has not been waited for",
               site, cell.write.site);
      }
    }
    const bool both_atomic = kind == Kind::atomic && cell.write.atomic != 0;
    if (!both_atomic && !ordered(cell.write)) {
      race(cell.write, cell.write.atomic ? "atomic" : "write", kind == Kind::read ? "read" : kind == Kind::write ? "write" : "atomic");
    }
    if (kind == Kind::read) {
      if (cell.read.block == serial_ && cell.read.thread == thread && cell.read.epoch == epoch && cell.readers == 0) continue;
      if (cell.read.block != serial_) {
        if (cell.read.block >= first_serial_) cell.earlier_read = cell.read;
        cell.read = now;
        cell.readers = 0;
      } else if (ordered(cell.read) && cell.readers == 0) {
        cell.read = now;
      } else {
        add_reader(cell, now);
      }
      continue;
    }
    const char* what = kind == Kind::write ? "write" : "atomic";
    if (!ordered(cell.earlier_read)) race(cell.earlier_read, "read", what);
    if (!ordered(cell.read)) race(cell.read, "read", what);
    if (cell.read.block == serial_ && cell.readers != 0) {
      for (const Access& reader : readers_[cell.readers - 1]) {
        if (!ordered(reader)) {
          race(reader, "read", what);
          break;
        }
      }
    }
    cell.write = now;
    cell.in_flight = 0;
    cell.read.block = 0;
    cell.earlier_read.block = 0;
    cell.readers = 0;
  }
}

// Keeps, of the reads that do not precede this one, two of each warp: a writer that races with any, races with one.
void Machine::add_reader(Cell& cell, const Access& now) {
  if (cell.readers == 0) {
    if (readers_used_ == readers_.size()) readers_.emplace_back();
    readers_[readers_used_].clear();
    cell.readers = static_cast<uint32_t>(++readers_used_);
  }
  std::vector<Access>& readers = readers_[cell.readers - 1];
  bool placed = false;
  int same_warp = (cell.read.thread >> 5) == (now.thread >> 5) ? 1 : 0;
  if (happened_before(cell.read)) {
    cell.read = now;
    placed = true;
  }
  for (size_t i = 0; i < readers.size();) {
    if (happened_before(readers[i])) {
      if (placed) {
        readers[i] = readers.back();
        readers.pop_back();
        continue;
      }
      readers[i] = now;
      placed = true;
    } else if ((readers[i].thread >> 5) == (now.thread >> 5)) {
      ++same_warp;
    }
    ++i;
  }
  if (!placed && same_warp < 2) readers.push_back(now);
}

// ---- asynchronous copies

void Machine::copy_async(uintptr_t shared, uintptr_t global, int bytes, bool valid, uint32_t site) {
  ++totals.cp_async;
  Cell* cells = shared_cells(shared, bytes, site, "cp.async");
  if (cells == nullptr) fail("out of bounds", "cp.async to an address outside shared memory", site);
  if ((shared & (bytes - 1)) != 0) fail("misaligned", "cp.async to shared memory that is not aligned to its size", site);
  if (valid) {
    if (!memory.contains(global)) {
      fail("out of bounds", "cp.async reads " + describe_address(global) + ", not global memory", site);
    }
    access(global, bytes, Kind::read, site);
  }
  const int count = bytes >> kSharedGranuleShift;
  // The global and the shared side of one instruction are counted as two sites: its last byte and the one before.
  warps_[current_->thread >> 5].accesses.add(site_index(site - 1), current_->thread & 31, shared, bytes, Space::shared);
  check_cells(cells, count, Kind::write, site, true);
  for (int i = 0; i < count; ++i) cells[i].in_flight = 1;
  // What was there is gone, what comes is not there yet: a NaN in every format.
  std::memset(reinterpret_cast<void*>(shared), 0xff, bytes);
  current_->open_copies.push_back({shared, global, bytes, valid, site});
}

void Machine::commit_copies() {
  current_->groups.push_back(std::move(current_->open_copies));
  current_->open_copies.clear();
}

void Machine::wait_copies(int pending, uint32_t site) {
  Lane& self = *current_;
  const uint32_t epoch = clocks_[static_cast<size_t>(self.thread) * threads_ + self.thread];
  while (self.groups.size() > static_cast<size_t>(pending)) {
    for (const Lane::Copy& copy : self.groups.front()) {
      Cell* cells = shared_cells(copy.shared, copy.bytes, site, "cp.async");
      for (int i = 0; i < copy.bytes >> kSharedGranuleShift; ++i) {
        cells[i].write = {serial_, epoch, copy.site, self.thread, 0};
        cells[i].in_flight = 0;
      }
      if (copy.valid) {
        std::memcpy(reinterpret_cast<void*>(copy.shared), reinterpret_cast<const void*>(copy.global), copy.bytes);
      } else {
        std::memset(reinterpret_cast<void*>(copy.shared), 0, copy.bytes);
      }
    }
    self.groups.pop_front();
  }
}

// ---- ldmatrix

void Machine::read_row(uintptr_t address, uint32_t site, int thread) {
  Cell* cells = shared_cells(address, 16, site, "ldmatrix");
  if (cells == nullptr) fail("out of bounds", "ldmatrix from an address outside shared memory", site);
  if ((address & 15u) != 0) fail("misaligned", "ldmatrix from a row that is not 16-byte aligned", site);
  // The row is read for all lanes, in the name of the lane that gave its address.
  Lane* self = current_;
  current_ = &lanes_[thread];
  check_cells(cells, 16 >> kSharedGranuleShift, Kind::read, site, true);
  current_ = self;
}

void Machine::count_row_phases(const std::array<uintptr_t, 32>& rows, int count, uint32_t site) {
  SiteCounts& counts = site_counts[site_index(site)];
  count_shared(rows.data(), 16, count, counts);
}

}  // namespace cmaclip::emulator

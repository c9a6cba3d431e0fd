#include "cpu/pool.h"

#include <fenv.h>
#include <pthread.h>
#include <signal.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>

namespace etap::cpu {
namespace {

struct Loop {
  void (*body)(void *context, int64_t item, int worker);
  void *context;
  int64_t num_items;
  std::atomic<int64_t> next_item{0};

  void work(int worker) {
    fenv_t callers;
    fegetenv(&callers);
    fesetenv(FE_DFL_ENV);
    int64_t item;
    while ((item = next_item.fetch_add(1, std::memory_order_relaxed)) < num_items) body(context, item, worker);
    fesetenv(&callers);
  }
};

class Pool {
 public:
  // False when another thread has the pool.
  bool try_run(Loop *loop, int num_threads) {
    std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner.owns_lock()) return false;
    const int helpers = grow(num_threads - 1);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      loop_ = loop;
      wanted_ = helpers;
      started_ = 0;
      running_ = helpers;
    }
    work_.notify_all();
    loop->work(0);
    std::unique_lock<std::mutex> lock(mutex_);
    // Helpers that have not woken up by now are not needed any more.
    running_ -= wanted_ - started_;
    wanted_ = started_;
    idle_.wait(lock, [this] { return running_ == 0; });
    loop_ = nullptr;
    return true;
  }

 private:
  // Makes threads until there are `count`, or as many as can be had.
  int grow(int count) {
    while (num_threads_ < count && start_thread()) ++num_threads_;
    return num_threads_ < count ? num_threads_ : count;
  }

  bool start_thread() {
    // Signals are for the program's own threads.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_t thread;
    const bool started = pthread_create(&thread, nullptr, &Pool::main, this) == 0;
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (started) pthread_detach(thread);
    return started;
  }

  static void *main(void *pool) {
    static_cast<Pool *>(pool)->serve();
    return nullptr;
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      work_.wait(lock, [this] { return started_ < wanted_; });
      const int worker = ++started_;
      Loop *loop = loop_;
      lock.unlock();
      loop->work(worker);
      lock.lock();
      if (--running_ == 0) idle_.notify_one();
    }
  }

  std::mutex owner_;  // held by the thread whose loop it is
  int num_threads_ = 0;

  std::mutex mutex_;  // guards what follows
  std::condition_variable work_;
  std::condition_variable idle_;
  Loop *loop_ = nullptr;
  int wanted_ = 0;   // helpers this loop may have
  int started_ = 0;  // helpers that joined it
  int running_ = 0;  // helpers still to leave it
};

std::atomic<Pool *> the_pool{nullptr};

// The threads of the parent don't exist in the child, and its locks may be held for ever: forget the pool.
void forget_pool_in_child() { the_pool.store(nullptr); }

Pool *get_pool() {
  Pool *pool = the_pool.load();
  if (pool != nullptr) return pool;
  static const int registered = pthread_atfork(nullptr, nullptr, forget_pool_in_child);
  Pool *fresh = registered == 0 ? new (std::nothrow) Pool : nullptr;
  if (fresh == nullptr || the_pool.compare_exchange_strong(pool, fresh)) return fresh;
  delete fresh;
  return pool;
}

}  // namespace

void parallel_for(int64_t num_items, int num_threads, void (*body)(void *context, int64_t item, int worker),
                  void *context) {
  Loop loop{body, context, num_items};
  const int useful = num_items < num_threads ? static_cast<int>(num_items) : num_threads;
  Pool *pool = useful > 1 ? get_pool() : nullptr;
  if (pool == nullptr || !pool->try_run(&loop, useful)) loop.work(0);
}

}  // namespace etap::cpu

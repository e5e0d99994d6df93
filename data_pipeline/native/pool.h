// Threads that share out the items of one call at a time.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

class Pool {
public:
    explicit Pool(int threads) {
        // the calling thread is worker 0
        for (int i = 1; i < threads; i++) threads_.emplace_back([this, i] { loop(i); });
    }

    ~Pool() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stop_ = true;
        }
        wake_.notify_all();
        for (auto& t : threads_) t.join();
    }

    // work(item, worker) for every item in 0..n-1; returns when all are done. Calls from several threads queue up.
    void run(int64_t n, const std::function<void(int64_t, int)>& work) {
        std::lock_guard<std::mutex> one_call(call_);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            work_ = &work;
            count_ = n;
            next_ = 0;
            running_ = (int)threads_.size();
            round_++;
        }
        wake_.notify_all();
        take(work, n, 0);
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return running_ == 0; });
    }

private:
    void take(const std::function<void(int64_t, int)>& work, int64_t n, int worker) {
        for (int64_t i; (i = next_.fetch_add(1)) < n;) work(i, worker);
    }

    void loop(int worker) {
        for (uint64_t seen = 0;;) {
            const std::function<void(int64_t, int)>* work;
            int64_t n;
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return stop_ || round_ != seen; });
                if (stop_) return;
                seen = round_;
                work = work_;
                n = count_;
            }
            take(*work, n, worker);
            {
                std::lock_guard<std::mutex> lock(mutex_);
                running_--;
            }
            done_.notify_one();
        }
    }

    std::vector<std::thread> threads_;
    std::mutex mutex_, call_;
    std::condition_variable wake_, done_;
    const std::function<void(int64_t, int)>* work_ = nullptr;
    int64_t count_ = 0;
    std::atomic<int64_t> next_{0};
    int running_ = 0;
    uint64_t round_ = 0;
    bool stop_ = false;
};

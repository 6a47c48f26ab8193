#include "interrupt.h"

#include <dlfcn.h>
#if defined(__APPLE__)
#include <pthread.h>
#else
#include <sys/syscall.h>
#endif
#include <unistd.h>

#include <atomic>
#include <memory>

#include "error.h"

namespace annbatch {
namespace {

// Functions of Python's limited API, with PyObject* as void* and PyGILState_STATE as int, as its ABI has them.
struct Python {
  int (*is_initialized)();
  int (*gil_ensure)();
  void (*gil_release)(int);
  int (*check_signals)();
  void (*fetch)(void**, void**, void**);
  void (*restore)(void*, void*, void*);
  int (*add_pending_call)(int (*)(void*), void*);
  bool found;
};

template <class Function>
bool find(const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(RTLD_DEFAULT, name));
  return function != nullptr;
}

const Python& python() {
  static const Python table = [] {
    Python p{};
    p.found = find("Py_IsInitialized", p.is_initialized) && find("PyGILState_Ensure", p.gil_ensure) &&
              find("PyGILState_Release", p.gil_release) && find("PyErr_CheckSignals", p.check_signals) &&
              find("PyErr_Fetch", p.fetch) && find("PyErr_Restore", p.restore) &&
              find("Py_AddPendingCall", p.add_pending_call);
    return p;
  }();
  return table;
}

bool on_first_thread() {
#if defined(__APPLE__)
  return pthread_main_np() != 0;
#else
  return syscall(SYS_gettid) == getpid();
#endif
}

// A raised exception on its way from the handler to the interpreter. References are owned and handed on.
struct Raised {
  void* type = nullptr;
  void* value = nullptr;
  void* traceback = nullptr;
};

std::atomic<bool> exiting{false};

int raise_again(void* argument) {
  const std::unique_ptr<Raised> raised(static_cast<Raised*>(argument));
  python().restore(raised->type, raised->value, raised->traceback);
  return -1;
}

}  // namespace

void throw_if_interrupted() {
  const Python& py = python();
  // Off the first thread the GIL is not even asked for: in a finalizing interpreter that would end the thread.
  if (!py.found || !on_first_thread() || py.is_initialized() == 0) {
    return;
  }
  const int gil = py.gil_ensure();
  const bool interrupted = py.check_signals() != 0;
  if (interrupted) {
    auto raised = std::make_unique<Raised>();
    py.fetch(&raised->type, &raised->value, &raised->traceback);
    // The op can only throw a C++ exception, which Python sees as RuntimeError; a loop that swallows those must not
    // swallow Ctrl-C with them.
    if (py.add_pending_call(&raise_again, raised.get()) == 0) {
      raised.release();
    }
  }
  py.gil_release(gil);
  if (interrupted) {
    fail(kind::interrupted, "a signal handler raised while waiting for a batch");
  }
}

void announce_exit() { exiting.store(true); }

ParkAtExit::~ParkAtExit() {
  while (exiting.load() && !on_first_thread()) {
    pause();
  }
}

}  // namespace annbatch

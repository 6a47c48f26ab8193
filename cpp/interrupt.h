// What an op that waits owes the Python around it: Ctrl-C, and an exit that does not abort.
//
// An op runs without the GIL, so Python's signal handlers cannot run until it returns. The library holds no CPython
// symbol (one file serves every Python, and programs without one); the few functions needed are looked up in the
// running process, and absent there nothing is checked.
#pragma once

namespace annbatch {

// Runs pending Python signal handlers; throws "[annbatch:Interrupted]" when one of them raised, and leaves that very
// exception (KeyboardInterrupt, or what a handler of the user's raised) to be raised by the interpreter next.
// Does nothing on threads other than the process's first, where Python runs no handlers.
void throw_if_interrupted();

// From here on the process is exiting; see ParkAtExit.
void announce_exit();

// Stands in an op that may have waited. Once the exit is announced, threads other than the process's first stay in the
// op instead of returning from it: a (daemon) thread that asks for the GIL of a finalizing interpreter is ended by
// Python before 3.14 in a way that C++ frames answer with std::terminate.
struct ParkAtExit {
  ParkAtExit() = default;
  ParkAtExit(const ParkAtExit&) = delete;
  ParkAtExit& operator=(const ParkAtExit&) = delete;
  ~ParkAtExit();
};

}  // namespace annbatch

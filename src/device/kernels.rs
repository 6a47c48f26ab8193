//! Kernels: their source, and their machine code.

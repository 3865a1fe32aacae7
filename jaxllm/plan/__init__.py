"""Plan a run before it is paid for: compile its step with the real TPU compiler, without a TPU, and read figures."""

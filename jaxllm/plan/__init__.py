"""Plan a run before it is paid for: compile its step with the real TPU compiler, no TPU needed, and read off the figures."""

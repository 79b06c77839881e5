"""How a run's processes are started: by exec, or forked from a process that has their libraries."""

"""From a new process to a worker: lean imports, prefetched weights, missing weights, the cold start."""

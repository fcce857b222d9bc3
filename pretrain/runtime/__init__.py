"""What keeps a run alive: checkpoints, resuming, guards, the watchdog, stop requests and metrics."""

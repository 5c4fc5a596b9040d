"""What a run needs besides the science: its state, saving and resuming, processes, signals, logs."""

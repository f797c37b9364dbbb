"""What every job has: its log, its parent process, threads, memory."""

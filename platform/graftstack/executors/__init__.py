"""Executors of `runtime.py` on this machine: other processes, and this one until others are worth starting.

- `threads`: how many threads a call may use
- `messages`: how a call travels to another process, and its end back
- `shared_file`: a value in a file that processes read in place
- `local`: processes of this machine, one a slot
- `warming`: this process, until workers are worth their start
"""

from graftstack.executors.local import ProcessExecutor, inline, processes
from graftstack.executors.threads import limit_threads
from graftstack.executors.warming import WarmingExecutor, warm

__all__ = ["ProcessExecutor", "WarmingExecutor", "inline", "limit_threads", "processes", "warm"]

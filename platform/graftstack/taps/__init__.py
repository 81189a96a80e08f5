"""Taps: the outputs of frozen layer groups, stored once for every sample and shared by all trials, epochs and folds.

- `key`: what a tap's values depend on; equal keys, equal values
- `store`: where taps lie: verified Arrow IPC shards, memory-mapped, bounded in size
- `costs`: which taps are worth storing, by the cost model
"""

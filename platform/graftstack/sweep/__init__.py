"""Sweeps over freeze depth, learning rate and anything else, with the frozen part computed once; free of Ray.

- `trials`: what a trial is and leaves; `search`: which ones there are; `ledger`: their rows on disk
- `measure`, `prediction`: what each depth costs; `trunks`: which trials freeze the same; `planner`, `plan`: what is
  stored and how trials share it; `passes`: making the taps
- `fused`, `fused_member`: many heads on one tap, trained as one batched product
- `runner`: trains units of trials in one process; `drive`, `inline_pool`: keep all slots of a pool busy
- `asha`: who stops early, and who goes on after all
- `probe`, `probing`: how much each depth's frozen features already know
- `outcome`: the best model, and every trial's rows
"""

"""graftstack grafts a new head onto a pretrained backbone, on one machine or on a Ray cluster.

A map of the package, from the ground up; imports point down only, and importing this loads neither torch nor ray.

- `errors`, `reason`, `amounts`, `machine`, `seeding`: what everything else stands on
- `storage`, `remote`, `file_systems`: folders whose files are whole or not there, on a disk or in an object store
- `config`: YAML and overrides become one typed, validated dataclass, once, at the edge
- `runtime`, `executors`: what an algorithm sees of a machine or cluster; calls in this process or in others
- `checkpoint`, `runs`, `owners`: durable state; the run folder, and whose it is
- `data`, `backbones`, `taps`: Arrow tables to image batches; models as ordered layer groups; what frozen groups made
- `finetune`: the recipes and the training loop, free of Ray
- `sweep`: many fine-tunings that share their frozen part, free of Ray
- `stacking`: base models cross-validated in one task graph, and what learns from their predictions, free of Ray
- `meta`: networks that learn to learn from a few images of each class, free of Ray
- `cluster`: Ray, and how each job is launched on it
- `submit`: jobs sent to a Ray cluster or to Kubernetes
- `report`, `doctor`, `demo`, `cli`: what a person sees
"""

__version__ = "0.1.0"

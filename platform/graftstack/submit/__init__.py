"""Jobs that run elsewhere, on a *target*: they travel as a spec, and a *submission* is one time that one was sent.

On a Ray cluster, which is asked by `graftstack.cluster.submission`:

- `packing`: the files that go along, as one archive
- `submissions`: what is sent, and how a retry finds what the first attempt left there
- `following`: the log of a submission to its end, whatever happens to the connection

On Kubernetes, whose API server is asked by `kube_api`:

- `rayjob`, `pods`, `manifest`: the objects as types, and as YAML
- `render`: a spec and the configuration of its pods become those objects
- `rules`: what the cluster would refuse, said before it is sent
- `kubernetes`, `kube_states`, `kube_logs`: submitted, watched and followed to the exit status

Importing any of these loads neither torch, nor ray, nor the client of Kubernetes.
"""

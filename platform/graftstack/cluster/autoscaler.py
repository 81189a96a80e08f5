"""What the autoscaler of the connected cluster says, where there is one: whether nodes may come, and for whom never.

Ray's autoscaler (v2, KubeRay's) puts its view into the cluster's control store at each of its rounds. Of one of the
first version it is known that it is there; it doesn't say what it can't bring.
"""

import json
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

log = logging.getLogger(__name__)

# Where an autoscaler of the first version puts its view, and how it calls nodes that it can only watch.
_FIRST_STATUS = b"__autoscaling_status"
_WATCHED = "node_"

_ANSWER_S = 10.0

# An autoscaler brings nodes for what waits, and for nothing else.
_NUM_AHEAD = 4


def may_grow() -> bool:
    """Returns whether nodes may come by themselves. Raises `RayError`."""
    return _status().autoscaling_state.autoscaler_state_version > 0 or _first_version_grows()


def num_ahead() -> int:
    """Returns how many tasks or processes more than there is room for are to wait, so that room is made for them."""
    from ray.exceptions import RayError

    try:
        return _NUM_AHEAD if may_grow() else 0
    except RayError as error:  # a head that starts anew answers a moment later
        log.debug("whether nodes may come isn't known now: %s", error)
        return 0


def is_hopeless(group: "PlacementGroup") -> bool:
    """Returns whether `group`, for all that the autoscaler last said, can't be placed.

    Neither what is free nor what it may bring would hold the group, nothing is on its way, and nobody else waits.

    Raises:
        RayError: it can't be asked now.
    """
    status = _status()
    state, there = status.autoscaling_state, status.cluster_resource_state
    is_infeasible = any(
        request.details.startswith(group.id.hex()) for request in state.infeasible_gang_resource_requests
    )
    # What it brings for somebody else counts as taken in its view, and may be free for the group later.
    is_busy = bool(
        state.pending_instances
        or state.pending_instance_requests
        or there.pending_resource_requests
        or len(there.pending_gang_resource_requests) > 1
    )
    return is_infeasible and not is_busy


def _status() -> Any:
    """Returns what the autoscaler, and the nodes, last said; where there is no autoscaler, its state has version 0."""
    from ray._private.worker import global_worker
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    reply = GetClusterStatusReply()
    reply.ParseFromString(global_worker.gcs_client.get_cluster_status(timeout_s=_ANSWER_S))
    return reply


def _first_version_grows() -> bool:
    from ray.experimental.internal_kv import _internal_kv_get

    try:
        report = json.loads(_internal_kv_get(_FIRST_STATUS) or b"{}").get("autoscaler_report") or {}
    except ValueError:
        return False
    types = (report.get("node_type_mapping") or {}).values()
    return any(not str(name).startswith(_WATCHED) for name in types)

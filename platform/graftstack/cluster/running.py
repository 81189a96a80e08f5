"""The Ray clusters of this machine, found by the processes that belong to them."""


def running_clusters() -> list[str]:
    """Returns the addresses of the clusters that have a node on this machine, whoever started it and wherever."""
    from ray._private.services import find_gcs_addresses

    return sorted(find_gcs_addresses())

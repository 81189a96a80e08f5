"""What torch says of itself and of the GPUs, asked once: loading it takes seconds."""

import warnings
from dataclasses import dataclass

from graftstack.reason import reason


@dataclass(frozen=True, kw_only=True)
class TorchFacts:
    """The answers of the torch of this process."""

    is_loaded: bool = True
    load_error: str | None = None
    """What importing torch or torchvision raised; None when both load."""
    num_threads: int = 0
    """Threads that torch computes with on the CPU."""
    gpus: tuple[str, ...] = ()
    """The names of the GPUs that torch can use."""
    cuda_build: str | None = None
    """The CUDA version that torch was built for; None for a CPU build."""
    complaint: str = ""
    """What torch warned of when it was asked for GPUs."""


def load_torch() -> TorchFacts:
    """Imports torch and torchvision and asks them; a fault of theirs is an answer as well."""
    try:
        import torch
    except Exception as error:  # a package that is half there raises anything
        return TorchFacts(is_loaded=False, load_error=reason(error))
    load_error = None
    try:
        import torchvision.ops  # noqa: F401
    except Exception as error:
        load_error = reason(error)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return TorchFacts(
        load_error=load_error,
        num_threads=torch.get_num_threads(),
        gpus=tuple(torch.cuda.get_device_name(index) for index in range(num_gpus)),
        cuda_build=torch.version.cuda,
        complaint=reason(Warning(caught[0].message)) if caught else "",
    )

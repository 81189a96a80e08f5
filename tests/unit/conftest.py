"""What tests in this process share."""

import pytest


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of conv4's weights, which don't depend on the seed of a training."""
    import torch
    from safetensors.torch import save_file

    from graftstack.backbones.registry import build

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "conv4.safetensors"
    save_file(build("conv4").model.state_dict(), path)
    return str(path)

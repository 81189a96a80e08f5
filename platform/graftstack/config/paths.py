"""Where the configuration files and job scripts lie: in the checkout, or inside the installed package."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_BUNDLED = _PACKAGE / "_bundled"


def conf_dir() -> Path:
    """Returns the folder of Hydra's configuration groups."""
    return _root() / "conf"


def jobs_dir() -> Path:
    """Returns the folder of the job scripts."""
    return _root() / "jobs"


def _root() -> Path:
    return _BUNDLED if _BUNDLED.exists() else _PACKAGE.parents[1]

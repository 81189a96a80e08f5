"""Launching `pipeline`: a sweep, then a stack of its best trials, each a run of its own in the pipeline's folder."""

import time
from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

from graftstack.cluster.launching import beating, check, open_run
from graftstack.cluster.stack import StackDisplay, check_before_sweep, launch_stack
from graftstack.cluster.sweep import SweepDisplay, launch_sweep
from graftstack.config.compose import compose_job, known_to
from graftstack.config.plain import typed
from graftstack.config.space import Choice, Domain, full_key, parse_space, trial_config
from graftstack.config.stack import PipelineConfig, StackConfig
from graftstack.config.sweep import SweepConfig
from graftstack.errors import ConfigError
from graftstack.runs import MANIFEST, Run
from graftstack.storage import Folder

SWEEP, STACK = "sweep", "stack"

# Share of the time limit after which no trial of the sweep goes on: its best ones are trained again, once a fold.
_SWEEP_SHARE = 0.4

# What each part is told anew.
_OWN = ("name", "runs_dir", "resume", "time_limit_s", "from_sweep")

# What decides in which size a trial sees its images.
_SIZING = ("backbone.name", "backbone.weights", "data.image_size")


class PipelineDisplays(NamedTuple):
    """What the launch of a pipeline tells a person."""

    sweep: SweepDisplay
    stack: StackDisplay


def launch_pipeline(
    config: PipelineConfig, *, overrides: Sequence[str], displays: PipelineDisplays, verbose: bool = False
) -> Run:
    """Runs a sweep and the stack of its best trials, and returns the pipeline's run.

    Whatever ends the process, `resume=true` goes on in the part that it was in.

    Raises as `launch_sweep` and `launch_stack`.
    """
    began = time.monotonic()
    checked = check("pipeline", config, overrides)
    if checked.is_done:
        assert checked.existing is not None
        return checked.existing
    given = checked.manifest.overrides
    check_stack_part(checked.config, given, displays.stack)
    with open_run(checked) as run:
        limit_s = checked.config.time_limit_s
        with beating(run):
            sweep_config = _part(SWEEP, given, run.folder.location, limit_s and limit_s * _SWEEP_SHARE)
            assert isinstance(sweep_config.config, SweepConfig)
            sweep = launch_sweep(
                sweep_config.config, overrides=sweep_config.overrides, display=displays.sweep, verbose=verbose
            )
            left_s = None if limit_s is None else max(1.0, limit_s - (time.monotonic() - began))
            stack_config = _part(STACK, given, run.folder.location, left_s)
            assert isinstance(stack_config.config, StackConfig)
            stack = launch_stack(
                stack_config.config, overrides=stack_config.overrides, display=displays.stack, verbose=verbose
            )
        run.update(
            status="done",
            metrics=stack.manifest.metrics,
            artifacts={
                **{name: f"{STACK}/{path}" for name, path in stack.manifest.artifacts.items()},
                "sweep": SWEEP,
                "stack": STACK,
            },
            details={"best_single": sweep.manifest.metrics.get("accuracy"), **stack.manifest.details},
            results=_results(sweep, stack),
        )
    return run


def check_stack_part(config: PipelineConfig, given: Sequence[str], display: StackDisplay) -> None:
    """Checks the stack before the sweep begins, which may take hours. Raises `BadInputError`."""
    part = _part(STACK, given, str(config.runs_dir), None)
    assert isinstance(part.config, StackConfig)
    if config.top > 1:
        _check_one_image_size(config)
    check_before_sweep(part.config, display)


def _check_one_image_size(config: PipelineConfig) -> None:
    """Raises `ConfigError` if the best trials, whichever they are, might have seen images of several sizes."""
    domains = {name: domain for name, domain in parse_space(config.space).items() if full_key(name) in _SIZING}
    if config.data.image_size is not None or not domains:
        return
    from graftstack.finetune.initial import preprocessing_for

    sizes: dict[int, str] = {}
    for values in product(*map(_extremes, domains.values())):
        params = dict(zip(domains, values, strict=True))
        size = preprocessing_for(trial_config(config, params)).image_size
        sizes.setdefault(size, " ".join(f"{name}={typed(value)}" for name, value in params.items()))
    if len(sizes) > 1:
        (one, its), (other, others), *_ = sizes.items()
        raise ConfigError(
            f"space: {its} sees images of {one}x{one} pixels and {others} of {other}x{other}, and a stack reads them "
            f"in one size; add data.image_size={one} or data.image_size={other}, in which the best trials train again"
        )


def _extremes(domain: Domain) -> tuple[Any, ...]:
    return domain.values if isinstance(domain, Choice) else (domain.low, domain.high)


class _Part(NamedTuple):
    config: Any
    overrides: list[str]


def _part(job: str, given: Sequence[str], folder: str, time_limit_s: float | None) -> _Part:
    """Returns the configuration of a part, whose run is called as its job and lies in the pipeline's folder."""
    overrides = [override for override in known_to(job, given) if override.partition("=")[0] not in _OWN]
    overrides += [f"name={job}", f"runs_dir={folder}"]
    if job == STACK:
        overrides = [override for override in overrides if override.partition("=")[0] != "cluster.num_workers"]
        overrides += [f"from_sweep={folder}/{SWEEP}", "cluster.num_workers=1"]
    if time_limit_s is not None:
        overrides.append(f"time_limit_s={time_limit_s}")
    if (Folder(folder) / job).exists(MANIFEST):
        overrides.append("resume=true")
    return _Part(compose_job(job, overrides), overrides)


def _results(sweep: Run, stack: Run) -> dict[str, Any]:
    results = {**stack.manifest.results, **{key: sweep.manifest.results[key] for key in ("trials", "reuse")}}
    if "oof_path" in results:
        results["oof_path"] = f"{STACK}/{results['oof_path']}"
    return results

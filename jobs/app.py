"""The shell around every job: compose the config, start Ray, run the stages, print errors as a person wants them.

The library is imported late: a wrong option is answered at once, not after torch has loaded.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from curate.errors import ConfigError, CurateError, StorageError, near
from curate.runtime import events

if TYPE_CHECKING:
    from jobs.pipeline import Pipeline

FAILED = CurateError.status
_PLANNED = ("run", "retrain", "plan")
_GROUPS = (
    "source",
    "model",
    "concept",
    "scorer",
    "selector",
    "sink",
    "generation",
    "judge",
    "tuned",
    "query",
    "curvature",
    "cluster",
    "report",
    "study",
    "training",
    "evaluator",
    "evaluation",
    "sweep",
    "sae",
    "trace",
    "latents",
    "groups",
    "audit",
    "experiment",
)


def compose_config(job: str, overrides: list[str]) -> DictConfig:
    """The config of `job` with `overrides` applied.

    Raises:
        ConfigError: an unknown option or choice; names the near ones.
    """
    GlobalHydra.instance().clear()
    with initialize_config_module("conf", version_base=None, job_name=job):
        try:
            return compose(job, overrides)
        except (HydraException, OmegaConfBaseException) as e:
            raise ConfigError(_explain(job, overrides, e)) from None
        finally:
            GlobalHydra.instance().clear()


def _known_options(config: DictConfig) -> list[str]:
    out: list[str] = []

    def walk(node: object, prefix: str) -> None:
        if isinstance(node, dict):
            for k, v in node.items():
                out.append(f"{prefix}{k}")
                walk(v, f"{prefix}{k}.")

    walk(OmegaConf.to_container(config, resolve=False), "")
    return out


def _choices(group: str) -> list[str]:
    names = [f.name for f in (resources.files("conf") / group).iterdir()]
    return [n.removesuffix(".yaml") for n in names if n.endswith(".yaml")]


def _explain(job: str, overrides: list[str], error: Exception) -> str:
    """Hydra's message, shortened; for an unknown option the ones that are near."""
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except HydraException as e:
        return f"the command line cannot be read: {str(e).splitlines()[0]} Options are name=value."
    groups = [o.input_line or "" for o in parsed if o.key_or_group in _GROUPS]
    try:
        known = _known_options(compose(job, groups))
    except (HydraException, OmegaConfBaseException):
        known = []  # the group itself is what is wrong; Hydra's message lists its choices
    for o in parsed if known else []:
        name = o.key_or_group
        if name not in known and name not in _GROUPS:
            close = difflib.get_close_matches(name, sorted({*known, *_GROUPS}), n=3, cutoff=0.6)
            hint = f"did you mean {' or '.join(close)}?" if close else f"`curate {job} --cfg job` prints all options."
            return f"there is no option {name!r}; {hint}"
    text = re.sub(r"\s*\n\s*", " ", str(error)).strip()
    missing = re.search(r"Could not find '(\w+)/(.+?)' Available options in '\w+': (.*?) Config search path", text)
    if missing:
        group, name, choices = missing[1], missing[2], missing[3].split()
        return f"there is no {group} {name!r}{near(name, choices)}"
    missing = re.search(r"Could not load '(\w+)/(.+?)'", text)  # one of a list of choices
    if missing:
        return f"there is no {missing[1]} {missing[2]!r}{near(missing[2], _choices(missing[1]))}"
    return re.sub(r"(To append to your config|Set the environment variable HYDRA_FULL_ERROR).*", "", text).strip()


def entry(job: str, stages: Callable[[Pipeline], None]) -> Callable[[], None]:
    """The main function of a job: `stages` gets a Pipeline with a running Ray. Exits 2 on an error a user can mend,
    or with the error's own status."""

    @hydra.main(config_path="pkg://conf", config_name=job, version_base=None)
    def application(config: DictConfig) -> None:
        guarded(lambda: checked(config))  # here too: Hydra would print a traceback and exit with 1

    def checked(config: DictConfig) -> None:
        if config.plan and job not in _PLANNED:
            raise ConfigError(f"plan=true is for {', '.join(_PLANNED[:2])}; `curate plan` says what scores cost")
        run(config, stages, job, told)

    @contextmanager
    def told(pipeline: Pipeline) -> Iterator[None]:
        try:
            yield
        except CurateError as e:
            say(e)
            if pipeline.config.cluster.address == "inline" or not _own_process():
                sys.exit(e.status)
            # On a busy machine Ray's shutdown can end this process with a status of its own. An embedded Ray's
            # processes are tied to this one and end with it; a cluster frees what a driver held that is gone.
            sys.stdout.flush()
            os._exit(e.status)

    def say(error: CurateError) -> None:
        if events.as_json():
            events.say(str(error), "error", job=job, kind=type(error).__name__)
        else:
            print(f"curate {job}: {error}", file=sys.stderr, flush=True)

    def fail(error: CurateError) -> None:
        say(error)
        sys.exit(error.status)

    def guarded(act: Callable[[], None]) -> None:
        try:
            act()
        except CurateError as e:
            fail(e)
        except KeyboardInterrupt:
            print(f"curate {job}: interrupted; run the same command again to go on", file=sys.stderr)
            sys.exit(130)

    def main() -> None:
        if any(a.startswith("-") for a in sys.argv[1:]):
            guarded(application)  # --help, --cfg job and other flags of Hydra's own
        else:
            guarded(lambda: checked(compose_config(job, sys.argv[1:])))

    return main


def _own_process() -> bool:
    """Was this process started as a job (`curate …`, `python -m jobs.…`), and is no program that calls one?"""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    name = spec.name if spec is not None else Path(getattr(main, "__file__", None) or "").stem
    return name == "curate" or name.startswith("jobs.")


def run(
    config: DictConfig,
    stages: Callable[[Pipeline], None],
    job: str | None = None,
    told: Callable[[Pipeline], AbstractContextManager[None]] = lambda pipeline: nullcontext(),
) -> None:
    """Check what can be checked without a cluster, then run the stages on one.

    Args:
        job: the name under which logs and `curate status` know it; None: they do not.
        told: a context around the stages, to be left before the cluster is.
    """
    from conf.schema import settings
    from connectors import storage
    from curate.runtime.progress import show_log
    from curate.runtime.session import session
    from jobs.pipeline import Pipeline
    from jobs.work import at_work, noted_work

    show_log()
    pipeline = Pipeline(settings(config))
    with at_work(job, pipeline.config):
        pipeline.check()
        try:
            with session(pipeline.config.cluster) as running:
                pipeline.session = running
                with told(pipeline), noted_work(job, pipeline.config):
                    pipeline.check_shared()
                    stages(pipeline)
        except CurateError:
            # Of actors that took too long to end when an error ended the stage, and were killed at their next range.
            with suppress(StorageError):  # what ended the job is to be told
                storage.remove_stale_temps(pipeline.config.sink.url)
            raise

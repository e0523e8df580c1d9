"""The shell around every job: compose the config, start Ray, run the stages, print errors as a person wants them."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable
from dataclasses import asdict

import hydra
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.schema import Settings, settings
from curate.errors import ConfigError, CurateError
from curate.runtime.session import ClusterSpec, session
from jobs.pipeline import Pipeline

FAILED = 2


def compose_settings(job: str, overrides: list[str]) -> Settings:
    """Settings of `job` with `overrides` applied.

    Raises:
        ConfigError: an unknown option or choice, with the near ones; a missing or wrongly typed value.
    """
    GlobalHydra.instance().clear()
    with initialize_config_module("conf", version_base=None, job_name=job):
        try:
            return settings(compose(job, overrides))
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


def _explain(job: str, overrides: list[str], error: Exception) -> str:
    """Hydra's message, shortened, with the options that are near the unknown one."""
    text = re.sub(r"\s*\n\s*", " ", str(error)).strip()
    text = re.sub(r"\(To append to your config.*|Set the environment variable HYDRA_FULL_ERROR.*", "", text).strip()
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except HydraException as e:
        return f"the command line cannot be read: {re.sub(chr(10) + '.*', '', str(e))}. Options are name=value."
    groups = [o.input_line for o in parsed if "." not in o.key_or_group and not o.is_delete()]
    try:
        known = _known_options(compose(job, [g for g in groups if g.split("=")[0] in _GROUPS and "=" in g]))
    except (HydraException, OmegaConfBaseException):
        known = _known_options(compose(job, []))
    for o in parsed:
        name = o.key_or_group
        if name not in known and name not in _GROUPS:
            close = difflib.get_close_matches(name, [*known, *_GROUPS], n=3, cutoff=0.6)
            tail = "did you mean " + " or ".join(close) + "?" if close else f"see `curate {job} --cfg job` for all options"
            return f"there is no option {name!r}; {tail}"
    return text


_GROUPS = (
    "source", "model", "concept", "scorer", "selector", "sink", "generation", "judge", "cluster", "report", "experiment",
)  # fmt: skip


def entry(job: str, stages: Callable[[Pipeline], None]) -> Callable[[], None]:
    """The main function of a job: `stages` gets a Pipeline with a running Ray. Exits 2 on an error a user can mend."""

    @hydra.main(config_path="pkg://conf", config_name=job, version_base=None)
    def application(config: DictConfig) -> None:
        run(settings(config), stages)

    def main() -> None:
        try:
            if not any(a.startswith("-") for a in sys.argv[1:]):
                # Composed here as well, so that an error is ours to word; flags such as --help are Hydra's own.
                run(compose_settings(job, sys.argv[1:]), stages)
            else:
                application()
        except CurateError as e:
            print(f"curate {job}: {e}", file=sys.stderr)
            sys.exit(FAILED)
        except KeyboardInterrupt:
            print(f"curate {job}: interrupted; run the same command again to go on", file=sys.stderr)
            sys.exit(130)

    return main


def run(config: Settings, stages: Callable[[Pipeline], None]) -> None:
    """Check what can be checked without a cluster, then run the stages on one."""
    pipeline = Pipeline(config)
    pipeline.check()
    with session(ClusterSpec(**asdict(config.cluster))) as running:
        pipeline.session = running
        stages(pipeline)
